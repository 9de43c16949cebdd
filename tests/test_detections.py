"""The keys and the values of annotations: photos, detections and rejects."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.detections import MAXIMUM_KEY, detections_of, photo_of
from pipeline.dataset.records import MAXIMUM_BIGINT
from pipeline.errors import BadInput
from tests.annotations_support import STEADY, attempt, box, key_of, value_of

# Keys


@pytest.mark.parametrize(
    ("key", "photo"),
    [
        (key_of(100024), (100024, 1)),
        (key_of(100024, "Qualifying"), (100024, 2)),
        (r"C:\RRS Dataset 2\export_1\recognition_7\photos\recognition_7_2025-10-11_Main.jpg", (7, 1)),
        (r"C:\Main\recognition_7\photos\recognition_7_Qualifying.jpg", (7, 2)),
        ("recognition_7/MAIN.JPEG", (7, 1)),
        ("recognition_7/qualifying.jpg", (7, 2)),
        ("/данные/recognition_7/фото Main.jpg", (7, 1)),
        ("recognition_7_Main", (7, 1)),
        ("Main/recognition_7.jpg", (7, 1)),
        ("Qualifying/recognition_7.jpg", (7, 2)),
        ("Main/recognition_7_Qualifying.jpg", (7, 2)),
        ("Qualifying/Main/recognition_7_Main.jpg", (7, 1)),
        ("/srv/domain/Qualifying_2/recognition_7.jpg", (7, 2)),
        ("recognition_5/recognition_7/photos/recognition_7_Main.jpg", (7, 1)),
        ("100024/Main.jpg", (100024, 1)),
        ("export_1/4045/photos/Main.jpg", (4045, 1)),
        ("4045/photos/recognition_4045_2025-10-11_Qualifying.jpg", (4045, 2)),
        (r"D:\data\04045\PHOTOS\recognition_4045_Main.jpg", (4045, 1)),
        ("Recognition_7/photos/recognition_7_Main.jpg", (7, 1)),
        ("2025/recognition_7/photos/Main.jpg", (7, 1)),
        ("2025/10/images/recognition_7_Main.jpg", (7, 1)),
        ("recognition_0/Main.jpg", (0, 1)),
        ("recognition_007/Main.jpg", (7, 1)),
        (f"recognition_{'0' * 40}7/Main.jpg", (7, 1)),
        (f"recognition_{MAXIMUM_BIGINT}/Main.jpg", (MAXIMUM_BIGINT, 1)),
        ("x" * (MAXIMUM_KEY - 20) + "/recognition_7/Main", (7, 1)),
    ],
)
def test_a_key_names_a_photo(key: str, photo: tuple[int, int]) -> None:
    assert photo_of(key) == photo


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("", "annotation_key"),
        ("Main", "annotation_key"),
        ("recognıtıon_7/photos/Main.jpg", "annotation_key"),
        ("RECOGNİTİON_7_Main.jpg", "annotation_key"),
        ("recognition_4048/photos/recognition_4049_2025-10-11_Main.jpg", "annotation_key"),
        ("recognition_4048/recognition_4049_Main.jpg", "annotation_key"),
        (r"a\4048\photos\recognition_4049_Main.jpg", "annotation_key"),
        ("4048/recognition_4049_Main.jpg", "annotation_key"),
        ("recognition_5_copy/photos/recognition_7_Main.jpg", "annotation_key"),
        ("recognition_7/recognition_7_recognition_8_Main.jpg", "annotation_key"),
        ("recognition_7_recognition_8/Main.jpg", "annotation_key"),
        ("4045/images/Main.jpg", "annotation_key"),
        ("٧/Main.jpg", "annotation_key"),
        ("recognition_/Main.jpg", "annotation_key"),
        ("recognition_x7/Main.jpg", "annotation_key"),
        ("recognition 7/Main.jpg", "annotation_key"),
        ("recognition_٧/Main.jpg", "annotation_key"),
        ("recognition_-7/Main.jpg", "annotation_key"),
        ("recognition_7/photo.jpg", "annotation_key"),
        ("recognition_7/Side.jpg", "annotation_key"),
        ("recognition_7/Main_Qualifying.jpg", "annotation_key"),
        ("Main/Qualifying/recognition_7.jpg", "annotation_key"),
        ("Main/recognition_7_Main_Qualifying.jpg", "annotation_key"),
        ("/srv/domain/recognition_7/photos/recognition_7_Quali.jpg", "annotation_key"),
        (r"C:\Users\Maintenance\recognition_7\IMG_2.jpg", "annotation_key"),
        ("recognition_7/Main\0.jpg", "annotation_key"),
        (f"recognition_7/Main{chr(0xD800)}.jpg", "annotation_key"),
        (f"recognition_7/Main{chr(0xDCFF)}.jpg", "annotation_key"),
        ("x" * MAXIMUM_KEY + "/recognition_7/Main.jpg", "annotation_key"),
        (f"recognition_{MAXIMUM_BIGINT + 1}/Main.jpg", "id_invalid"),
        (f"recognition_{'9' * 20}/Main.jpg", "id_invalid"),
        (f"recognition_{'9' * 4000}/Main.jpg", "id_invalid"),
        (f"recognition_{'0' * 20}{'9' * 20}/Main.jpg", "id_invalid"),
        (f"recognition_000{MAXIMUM_BIGINT + 1}/Main.jpg", "id_invalid"),
    ],
)
def test_a_key_that_names_no_photo(key: str, code: str) -> None:
    with pytest.raises(BadInput) as caught:
        photo_of(key)
    assert caught.value.code == code
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


@settings(STEADY)
@given(st.text(max_size=80) | st.from_regex(r"\A[/\\a]*recognition_[0-9]{1,30}[/\\_]?(Main|Qualifying)?\Z"))
def test_any_key_is_a_photo_or_a_reject(key: str) -> None:
    photo, error = attempt(lambda: photo_of(key))
    if photo is None:
        assert isinstance(error, BadInput)
        assert error.code in ("annotation_key", "id_invalid")
        return
    recognition_id, camera = photo
    assert 0 <= recognition_id <= MAXIMUM_BIGINT
    assert camera in (1, 2)


# Values


def test_detections_are_those_of_dishes_and_then_of_plates_in_their_order() -> None:
    value = {
        "plates": {"qwen_detections": [box("plate", (0, 0, 99.5, 80))], "model": "qwen"},
        "other": [],
        "dishes": {"qwen_detections": [box("dish_3"), box("dish_0", (-5, -0.5, 7, 8)), {**box("dish_3"), "score": 1}]},
    }
    assert detections_of(value, set()) == (
        [
            ("dish_3", 1, 2, 30, 40),
            ("dish_0", -5, -0.5, 7, 8),
            ("dish_3", 1, 2, 30, 40),
            ("plate", 0, 0, 99.5, 80),
        ],
        [],
    )


@pytest.mark.parametrize(
    "value",
    [
        value_of(),
        {"dishes": {"qwen_detections": []}},
        {"plates": {"qwen_detections": []}, "dishes": {"qwen_detections": []}},
    ],
)
def test_a_photo_on_which_the_model_saw_nothing(value: object) -> None:
    assert detections_of(value, set()) == ([], [])


@pytest.mark.parametrize("missing", ["dishes", "plates"])
def test_one_of_the_two_sections_is_enough(missing: str) -> None:
    value = value_of(box(), plates=(box("plate"),))
    del value[missing]
    assert len(detections_of(value, set())[0]) == 1


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        1.5,
        "dishes",
        [],
        [box()],
        ["dishes", "plates"],
        {},
        {"Dishes": {"qwen_detections": []}},
        {"qwen_detections": [box()]},
        {"dishes": None},
        {"dishes": []},
        {"dishes": [box()]},
        {"dishes": {}},
        {"dishes": "none"},
        {"dishes": {"qwen_detections": None}},
        {"dishes": {"qwen_detections": {}}},
        {"dishes": {"detections": []}},
        {"dishes": {"qwen_detections": [box()]}, "plates": None},
        {"dishes": {"qwen_detections": [box()]}, "plates": {"qwen_detections": {}}},
    ],
)
def test_a_value_of_another_shape_is_one_reject(value: object) -> None:
    with pytest.raises(BadInput) as caught:
        detections_of(value, set())
    assert caught.value.code == "json_shape"


@pytest.mark.parametrize(
    "corners",
    [
        None,
        "10, 20, 60, 80",
        7,
        {},
        {"x": 1, "y": 2, "w": 3, "h": 4},
        [],
        [10, 20, 30],
        [10, 20, 60, 80, 90],
        [[10, 20], [60, 80]],
        [10, 20, None, 80],
        [10, 20, "60", 80],
        [10, 20, True, 80],
        [False, 20, 60, 80],
        [10, 20, [60], 80],
        [60, 20, 10, 80],
        [10, 80, 60, 20],
        [10, 20, 10, 80],
        [10, 20, 60, 20],
        [10, 20, 10, 20],
        [10, 20, float("nan"), 80],
        [10, 20, float("inf"), 80],
        [float("-inf"), 20, 60, 80],
        [10, 20, 1_000_000.5, 80],
        [-1_000_001, 20, 60, 80],
        [10, 20, 60, 10**30],
        [10, 20, 60, 1e300],
    ],
)
def test_a_malformed_box_is_one_reject_and_the_others_stay(corners: object) -> None:
    value = value_of(box("dish_1"), box("dish_0", corners), box("dish_2"), plates=(box("plate"), box("plate", corners)))
    usable, problems = detections_of(value, set())
    assert [label for label, *_ in usable] == ["dish_1", "dish_2", "plate"]
    assert [problem.code for problem in problems] == ["box_malformed", "box_malformed"]
    assert problems[0].message.startswith("detection 2 of dishes ")
    assert problems[1].message.startswith("detection 2 of plates ")


@pytest.mark.parametrize(
    "corners", [(0, 0, 1, 1), (0, 0, 1_000_000, 1_000_000), (-1_000_000, 0, 0, 0.25), (0, 0, 1e-9, 5e-324)]
)
def test_a_box_at_the_bounds_is_good(corners: tuple[float, float, float, float]) -> None:
    assert detections_of(value_of(box("dish_0", corners)), set()) == ([("dish_0", *corners)], [])


@pytest.mark.parametrize("entry", [None, 1, "box", [1, 2, 3, 4], [box()]])
def test_a_detection_that_is_no_object_is_one_reject(entry: object) -> None:
    usable, problems = detections_of(value_of(entry, box()), set())
    assert [label for label, *_ in usable] == ["dish_0"]
    assert [problem.code for problem in problems] == ["box_malformed"]


def test_a_detection_without_a_box_or_a_label_is_one_reject() -> None:
    usable, problems = detections_of(value_of({"label": "dish_0"}, {"bbox_2d": [1, 2, 3, 4]}, {}), set())
    assert usable == []
    assert [problem.code for problem in problems] == ["box_malformed", "label_unknown", "label_unknown"]


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        ("dish_0", "dish_0"),
        ("dish_9", "dish_9"),
        ("dish_12", "dish_12"),
        ("dish_007", "dish_7"),
        ("dish_00", "dish_0"),
        ("dish_999999", "dish_999999"),
        ("plate", "plate"),
    ],
)
def test_a_label_names_a_line_of_the_receipt_or_a_plate(label: str, meant: str) -> None:
    usable, problems = detections_of(value_of(box(label), plates=(box(label),)), set())
    assert ([label for label, *_ in usable], problems) == ([meant, meant], [])


@pytest.mark.parametrize(
    "label",
    [
        None,
        "",
        0,
        True,
        ["dish_0"],
        {"dish_0": 1},
        "dish",
        "dish_",
        "dish_x",
        "dish_-1",
        "dish_1.0",
        "dish_ 1",
        " dish_1",
        "dish_1\n",
        "dish_١",
        "dish_1000000",
        "dish_" + "9" * 30,
        "Dish_1",
        "plates",
        "Plate",
        "plate_0",
        "dish_0\0",
        "cup",
    ],
)
def test_any_other_label_is_one_reject(label: object) -> None:
    usable, problems = detections_of(value_of(box(label), box("dish_1")), set())
    assert [label for label, *_ in usable] == ["dish_1"]
    assert [problem.code for problem in problems] == ["label_unknown"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["plate", "dish_1", "x"]),
    lambda one: (
        st.lists(one, max_size=5)
        | st.dictionaries(
            st.sampled_from(["dishes", "plates", "qwen_detections", "bbox_2d", "label"]), one, min_size=1, max_size=5
        )
    ),
    max_leaves=25,
)
ENTRY = JSON | st.fixed_dictionaries(
    {"bbox_2d": JSON | st.lists(st.floats() | st.integers(), min_size=4, max_size=4), "label": JSON}
)
SECTION = JSON | st.fixed_dictionaries({"qwen_detections": JSON | st.lists(ENTRY, max_size=4)})


@settings(STEADY, max_examples=200)
@given(JSON | st.fixed_dictionaries({"dishes": SECTION, "plates": SECTION}))
def test_any_value_is_boxes_and_rejects(value: Any) -> None:
    found, error = attempt(lambda: detections_of(value, set()))
    if found is None:
        assert isinstance(error, BadInput)
        assert error.code == "json_shape"
        return
    usable, problems = found
    told = sum(len(value.get(name, {"qwen_detections": []})["qwen_detections"]) for name in ("dishes", "plates"))
    assert len(usable) + len(problems) == told
    for one in usable:
        _, x1, y1, x2, y2 = one
        assert x1 < x2
        assert y1 < y2
        assert max(map(abs, one[1:])) <= 1_000_000


@pytest.mark.parametrize(
    "key",
    [
        "100024_recognition_2025-10-11_Main.jpg",
        "recognition_100024/photos/100024_recognition_2025-10-11_Main.jpg",
        "100024/photos/100024_recognition_2025-10-11_Main.jpg",
        "recognition_2025-10-11/recognition_100024_2025-10-11_Main.jpg",
        "100024_recognition_20251011_Main.jpg",
    ],
)
def test_the_year_of_a_date_is_no_recognition(key: str) -> None:
    assert photo_of(key) == (100024, 1)


def test_a_folder_whose_number_may_be_a_date_is_a_recognition() -> None:
    assert photo_of("recognition_20251011/photos/recognition_20251011_2025-10-11_Main.jpg") == (20251011, 1)


def test_a_date_alone_names_no_recognition() -> None:
    with pytest.raises(BadInput, match="names no recognition"):
        photo_of("recognition_2025-10-11_Main.jpg")
