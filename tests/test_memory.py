"""The memory of a load with the largest inputs that it accepts: less than 250 MB, whatever they are."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.dataset.layout import MAXIMUM_DOCUMENT_BYTES, MAXIMUM_PHOTO_BYTES
from tests.services import Start

MEGABYTES = 250
RECOGNITIONS = 3
#: Run a command, and print its exit code and the most memory of one process of it, in bytes.
_MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
unit = 1 if sys.platform == "darwin" else 1024
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)
"""

pytestmark = pytest.mark.slow


def write(dataset: Path, photo: bytes, menu: bytes, receipt: bytes) -> None:
    for number in range(1, RECOGNITIONS + 1):
        folder = dataset / f"recognition_{number}"
        folder.mkdir(parents=True)
        for name, content in (("Main.jpg", photo), ("Qualifying.jpg", photo), ("AM.json", menu), ("CD.json", receipt)):
            (folder / name).write_bytes(content)


def encoded(size: tuple[int, int], *, progressive: bool = False) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (90, 90, 90)).save(stream, "JPEG", progressive=progressive)
    return stream.getvalue()


def large_photo() -> bytes:
    """A progressive photo with as many coefficients and bytes as a load accepts, and padding that is taken out."""
    content = encoded((4050, 4050), progressive=True)
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    count = (MAXIMUM_PHOTO_BYTES - len(content)) // len(comment)
    return content[:2] + comment * count + b"\0" + content[2:]


def filled(start: str, part: str, end: str) -> bytes:
    """A document of the largest size with as many parts as fit."""
    count = (MAXIMUM_DOCUMENT_BYTES - len(start) - len(end)) // (len(part) + 1)
    return (start + ",".join([part] * count) + end).encode()


def large_photos(folder: Path) -> tuple[str, ...]:
    write(folder / "ds", large_photo(), b"[]", b"[]")
    return "load", "--source", str(folder / "ds")


def large_documents(folder: Path) -> tuple[str, ...]:
    """Small objects take the most memory for their bytes."""
    menu = filled('[{"ExternalId":1,"Name":"a","x":[', '{"":0}', "]}]")
    receipt = filled('[{"Count":1,"Dishes":[{"ExternalId":1,"Name":"a"}],"x":[', '{"":0}', "]}]")
    write(folder / "ds", encoded((16, 16)), menu, receipt)
    return "load", "--source", str(folder / "ds")


def large_annotations(folder: Path) -> tuple[str, ...]:
    value = filled('{"dishes":{"qwen_detections":[],"x":[', '{"":0}', ']},"plates":{"qwen_detections":[]}}').decode()
    keys = (f"recognition_{number}/Main.jpg" for number in range(10))
    (folder / "file.json").write_text("{" + ",".join(f"{json.dumps(key)}:{value}" for key in keys) + "}")
    return "load-qwen", "--file", str(folder / "file.json")


@pytest.mark.parametrize("make", [large_photos, large_documents, large_annotations])
def test_the_largest_inputs_take_less_than_the_limit_of_memory(
    make: Callable[[Path], tuple[str, ...]], start: Start, tmp_path: Path
) -> None:
    command = (sys.executable, "-m", "pipeline", *make(tmp_path), "--batch-id", "b1", "--local-scheduler")
    measured = start(sys.executable, "-c", _MEASURE, *command)
    code, size = map(int, measured.communicate(timeout=300)[0].split())
    assert code in (0, 6)
    assert size < MEGABYTES * 1_000_000
