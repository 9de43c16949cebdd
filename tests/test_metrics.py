"""observe/metrics.py, and the summary text in steps/summary.py."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches.summary import active_seconds, headline, performance_metrics
from pipeline.observe.metrics import LONGEST, SHORTEST, Metrics, bucket_of, merge
from pipeline.report.quantiles import bound_of, quantile
from pipeline.units import duration, size

NOON = datetime(2026, 1, 2, 12, 0, 0, tzinfo=timezone.utc)


# Gathering


def test_new_metrics_are_empty() -> None:
    assert Metrics().as_dict() == {"operations": {}, "counters": {}, "gauges": {}}


def test_operations_and_counters_add_up() -> None:
    metrics = Metrics()
    metrics.add("storage_upload", 0.5)
    metrics.add("db_bulk_copy", 2.0)
    metrics.add("storage_upload", 0.25)
    metrics.count("objects_uploaded")
    metrics.count("bytes_uploaded", 1000)
    metrics.count("objects_uploaded")
    assert metrics.as_dict() == {
        "operations": {
            "db_bulk_copy": {"ops": 1, "seconds": 2.0, "histogram": {"4": 1}},
            "storage_upload": {"ops": 2, "seconds": 0.75, "histogram": {"-8": 1, "-4": 1}},
        },
        "counters": {"bytes_uploaded": 1000, "objects_uploaded": 2},
        "gauges": {},
    }


def test_a_timed_block_counts_when_it_succeeds_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 10.5, 20.0])
    monkeypatch.setattr("pipeline.observe.metrics.time", SimpleNamespace(perf_counter=lambda: next(moments)))
    metrics = Metrics()
    with metrics.timed("work"):
        pass
    with pytest.raises(KeyError), metrics.timed("work"):
        raise KeyError
    assert metrics.as_dict()["operations"] == {"work": {"ops": 1, "seconds": 0.5, "histogram": {"-4": 1}}}


def test_the_returned_numbers_are_a_copy() -> None:
    metrics = Metrics()
    metrics.add("work", 1.0)
    before = metrics.as_dict()
    metrics.add("work", 1.0)
    assert before["operations"]["work"]["ops"] == 1


def test_counts_of_concurrent_threads_add_up() -> None:
    metrics = Metrics()

    def work(_: int) -> None:
        for _ in range(500):
            metrics.count("n")
            metrics.add("work", 0.001)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert metrics.as_dict() == {
        "operations": {"work": {"ops": 4000, "seconds": pytest.approx(4.0), "histogram": {"-39": 4000}}},
        "counters": {"n": 4000},
        "gauges": {},
    }


def test_a_gauge_keeps_its_latest_value_and_its_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 11.0, 12.00049])
    monkeypatch.setattr("pipeline.observe.metrics.time", SimpleNamespace(time=lambda: next(moments)))
    metrics = Metrics()
    metrics.gauge("requests_in_flight", 4, 16)
    metrics.gauge("requests_in_flight", 8)
    metrics.gauge("another", 5, 3)
    assert metrics.as_dict()["gauges"] == {
        "another": {"last": 5, "max": 5, "at": 12.0},
        "requests_in_flight": {"last": 8, "max": 16, "at": 11.0},
    }


def test_a_gauge_keeps_a_new_maximum_after_the_clock_is_set_back() -> None:
    total: dict[str, Any] = {}
    merge(total, {"gauges": {"n": {"last": 3, "max": 3, "at": 20.0}}})
    merge(total, {"gauges": {"n": {"last": 9, "max": 9, "at": 10.0}}})
    assert total == {"gauges": {"n": {"last": 3, "max": 9, "at": 20.0}}}


gauges = st.builds(
    lambda last, more, at: {"last": last, "max": last + more, "at": at},
    st.integers(1, 64),
    st.integers(0, 64),
    st.integers(0, 10**9),
)


@given(st.lists(gauges, min_size=1, max_size=8, unique_by=lambda gauge: gauge["at"]), st.randoms())
def test_merged_gauges_do_not_depend_on_the_order_of_markers(
    given_gauges: list[dict[str, int]], random: Random
) -> None:
    latest = max(given_gauges, key=lambda gauge: gauge["at"])
    random.shuffle(given_gauges)
    total: dict[str, Any] = {}
    for gauge in given_gauges:
        merge(total, {"gauges": {"n": gauge}})
    merge(total, {"counters": {}})
    most = max(gauge["max"] for gauge in given_gauges)
    assert total["gauges"] == {"n": {"last": latest["last"], "max": most, "at": latest["at"]}}


parts = st.lists(
    st.builds(
        lambda operations, counters: {"operations": operations, "counters": counters},
        st.dictionaries(
            st.sampled_from(["storage_upload", "db_bulk_copy", "transform"]),
            st.fixed_dictionaries(
                {"ops": st.integers(0, 10**6), "seconds": st.integers(0, 10**6)},
                # which markers of former versions have not
                optional={"histogram": st.dictionaries(st.sampled_from(["-40", "-8", "0", "12"]), st.integers(1, 9))},
            ),
        ),
        st.dictionaries(st.sampled_from(["bytes_uploaded", "retries_500"]), st.integers(0, 10**12)),
    ),
    max_size=6,
)


@given(parts)
def test_merging_sums_up_and_does_not_change_the_markers(markers: list[dict[str, Any]]) -> None:
    before = json.dumps(markers)
    total: dict[str, Any] = {}
    for marker in markers:
        merge(total, marker)
    assert json.dumps(markers) == before
    for group in ("operations", "counters"):
        assert set(total.get(group, {})) == {name for marker in markers for name in marker[group]}
    for name, entry in total.get("operations", {}).items():
        for field in ("ops", "seconds"):
            assert entry[field] == sum(marker["operations"].get(name, {}).get(field, 0) for marker in markers)
        given_histograms = [marker["operations"].get(name, {}).get("histogram", {}) for marker in markers]
        for bucket in {bucket for one in given_histograms for bucket in one} | set(entry["histogram"]):
            assert entry["histogram"][bucket] == sum(one.get(bucket, 0) for one in given_histograms)
    for name, value in total.get("counters", {}).items():
        assert value == sum(marker["counters"].get(name, 0) for marker in markers)


def test_a_marker_without_metrics_is_merged() -> None:
    total: dict[str, Any] = {}
    merge(total, {})
    merge(total, {"counters": {"n": 1}})
    merge(total, {"operations": {"work": {"ops": 1, "seconds": 0.5}}})
    assert total == {"counters": {"n": 1}, "operations": {"work": {"ops": 1, "seconds": 0.5, "histogram": {}}}}


# The distribution of durations


@given(st.floats(0, 1e9, allow_nan=False))
def test_a_duration_is_counted_in_its_bucket_or_the_outermost_one(seconds: float) -> None:
    bucket = bucket_of(seconds)
    assert SHORTEST <= bucket <= LONGEST
    slack = 1 + 1e-12  # of a logarithm
    assert seconds <= bound_of(bucket) * slack or bucket == LONGEST
    assert seconds * slack >= bound_of(bucket - 1) or bucket == SHORTEST


@given(st.lists(st.floats(1e-4, 900.0, allow_nan=False), min_size=1), st.floats(0.0, 1.0))
def test_a_quantile_is_off_by_a_bucket_at_most(durations: list[float], share: float) -> None:
    metrics = Metrics()
    for seconds in durations:
        metrics.add("work", seconds)
    histogram = metrics.as_dict()["operations"]["work"]["histogram"]
    assert sum(histogram.values()) == len(durations)
    assert all(SHORTEST <= int(bucket) <= LONGEST for bucket in histogram)
    exact = sorted(durations)[max(0, math.ceil(share * len(durations)) - 1)]
    assert exact / 1.2 <= quantile(histogram, share) <= exact * 1.2


# The time a batch took


def at(begin: float, end: float) -> tuple[datetime, datetime]:
    return NOON + timedelta(seconds=begin), NOON + timedelta(seconds=end)


@pytest.mark.parametrize(
    ("intervals", "seconds"),
    [
        ([], 0.0),
        ([at(0, 5)], 5.0),
        ([at(0, 5), at(5, 7)], 7.0),
        ([at(0, 5), at(3, 7)], 7.0),
        ([at(0, 9), at(3, 4)], 9.0),
        ([at(0, 5), at(3600, 3602)], 7.0),
        ([at(10, 12), at(0, 5), at(1, 2), at(11, 14)], 9.0),
        ([at(3, 3)], 0.0),
    ],
)
def test_active_time_counts_parallel_steps_once_and_no_pauses(
    intervals: list[tuple[datetime, datetime]], seconds: float
) -> None:
    assert active_seconds(intervals) == seconds


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_active_time_is_the_union_of_the_intervals(spans: list[tuple[int, int]]) -> None:
    union = {second for begin, length in spans for second in range(begin, begin + length)}
    assert active_seconds([at(begin, begin + length) for begin, length in spans]) == len(union)


# The text


SUMMARY: dict[str, Any] = {
    "batch_id": "batch_20260102_120000",
    "kind": "load",
    "state": "done",
    "recognitions_processed": 12904,
    "images_processed": 25808,
    "bytes": 3_226_000_000,
    "already_loaded": 0,
    "held_elsewhere": 0,
    "held_by": [],
    "beyond_limit": 0,
    "superseded_copies": 0,
    "rejected": 0,
    "rejects": {},
    "noticed": 0,
    "notices": {},
    "held_reason": None,
    "files": {},
    "counters": {},
    "gauges": {},
    "total_seconds": 75.0,
    "throughput": {
        "recognitions_processed": {"count": 12904, "per_second": 172.05},
        "images_processed": {"count": 25808, "per_second": 344.11},
        "bytes_uploaded": {"count": 3_226_000_000, "per_second": 43_013_333.33},
    },
    "operations": {
        "db_bulk_copy": {"ops": 130, "average_seconds": 0.0125, "total_seconds": 1.625},
        "storage_upload": {"ops": 25808, "average_seconds": 0.04416, "total_seconds": 1139.68},
    },
}


def test_the_block_of_performance_metrics() -> None:
    assert performance_metrics(SUMMARY).splitlines() == [
        "Performance Metrics:",
        "  Total time: 1m 15s",
        "  Throughput:",
        "    recognitions_processed: 12904 (172.1/s)",
        "    images_processed: 25808 (344.1/s)",
        "    bytes_uploaded: 3.2 GB (43.0 MB/s)",
        "  Operation timings:",
        "    storage_upload: 25808 ops, avg 44.16 ms, total 1139.68 s",
        "    db_bulk_copy: 130 ops, avg 12.50 ms, total 1.62 s",
    ]


def test_the_block_has_everything_by_total_when_asked_and_keeps_its_order() -> None:
    operations = {
        "a": {"ops": 1, "average_seconds": 2.0, "total_seconds": 2.0},
        **SUMMARY["operations"],
        "b": {"ops": 3, "average_seconds": 1.0, "total_seconds": 3.0},
    }
    summary = {**SUMMARY, "operations": operations, "throughput": dict(reversed(SUMMARY["throughput"].items()))}
    assert performance_metrics(summary) == performance_metrics(SUMMARY)
    shown = performance_metrics(summary, everything=True)
    names = [line.split(":")[0].strip() for line in shown.splitlines()]
    assert names[3:6] == ["recognitions_processed", "images_processed", "bytes_uploaded"]
    assert names[7:] == ["storage_upload", "b", "a", "db_bulk_copy"]


def test_the_block_shows_requests_in_flight_and_refused_ones_when_asked() -> None:
    gauges = {"requests_in_flight": {"last": 8, "max": 16}, "requests_refused_at": {"last": 9, "max": 9}}
    summary = {**SUMMARY, "gauges": gauges, "counters": {"requests_refused": 3}}
    before = performance_metrics(SUMMARY, everything=True)
    for one, more in (
        (summary, "\n  Requests in flight: 8 (peak 16), 3 refused"),
        ({**summary, "counters": {}}, "\n  Requests in flight: 8 (peak 16), 0 refused"),
        ({**summary, "gauges": {}}, ""),
    ):
        assert performance_metrics(one, everything=True) == before + more
        assert performance_metrics(one) == performance_metrics(SUMMARY)


def test_the_headline_of_a_batch_without_incident_is_one_line() -> None:
    assert headline(SUMMARY) == "Batch batch_20260102_120000 is done: 12904 recognitions, 25808 photos, 3.2 GB."


def test_the_headline_of_a_load_that_found_its_batch_done() -> None:
    summary = {**SUMMARY, "finished_at": "2026-01-02T13:00:05.123456+01:00"}
    summary |= {"rejected": 6, "rejects": {"json_broken": 6}, "already_loaded": 3, "files": {"used": 4}}
    assert headline(summary, was_done=True) == (
        "Batch batch_20260102_120000 is done already, since 2026-01-02 12:00:05 UTC: nothing was loaded."
        " It has 12904 recognitions, 25808 photos, 3.2 GB."
    )


def test_the_headline_tells_what_was_skipped_superseded_and_rejected() -> None:
    summary = {
        **SUMMARY,
        "already_loaded": 3,
        "held_elsewhere": 2,
        "held_by": ["batch_a", "batch_b"],
        "beyond_limit": 5,
        "superseded_copies": 4,
        "rejected": 6,
        "rejects": {"json_broken": 2, "photo_truncated": 4},
        "rejected_inputs": [
            {"code": "photo_empty", "path": f"a/{number}.jpg", "message": f"reason {number}"} for number in range(5)
        ],
    }
    assert headline(summary).splitlines()[1:] == [
        "Skipped: 3 already loaded; 2 held by unfinished batch_a, batch_b; 5 beyond the limit.",
        "Several folders hold the same recognition: the newest with two photos was taken, 4 earlier copies were left.",
        "Rejected: 6 (photo_truncated 4, json_broken 2).",
        *(f"  photo_empty: a/{number}.jpg: reason {number}" for number in range(5)),
        "  … and 1 more, in the table ingest.rejects",
    ]
    assert headline(summary, rejects=1).splitlines()[4:] == [
        "  photo_empty: a/0.jpg: reason 0",
        "  … and 5 more, in the table ingest.rejects",
    ]
    assert "Rejected" not in headline(summary, rejects=0)
    assert "ingest.rejects" not in headline({**summary, "state": "reset"}, rejects=1)
    all_shown = {**summary, "rejected": 5}
    assert headline(all_shown).splitlines()[-1] == "  photo_empty: a/4.jpg: reason 4"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (8.24, "8.2 s"), (60, "1m 00s"), (75.4, "1m 15s"), (3599, "59m 59s"), (7380, "2h 03m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("seconds", [59.95, 59.99])
def test_a_duration_that_rounds_to_a_minute_is_one(seconds: float) -> None:
    assert duration(seconds) == "1m 00s"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (125_300, "125.3 kB"),
        (3_226_000_000, "3.2 GB"),
        (4.2e12, "4.2 TB"),
        (7.5e15, "7500.0 TB"),
    ],
)
def test_sizes_in_decimal_units(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("count", "text"), [(999.7, "1.0 kB"), (999_960, "1.0 MB")])
def test_a_size_that_rounds_to_a_thousand_goes_to_the_next_unit(count: float, text: str) -> None:
    assert size(count) == text
