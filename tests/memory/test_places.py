"""Places give the bytes that were saved, or an error: from files, whatever happens to them, and from other memory."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path

import pytest
import torch

from foveate.errors import CheckpointError
from foveate.memory.places import FilePlace, HostPlace
from foveate.memory.reservation import PAGE, Reservation, lay_out
from foveate.memory.runs import Run, Tag, xxh3

_BYTES = torch.randint(0, 256, (5 * PAGE,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def _run(offset: int, size: int, first: int = 0, sha256: bool = False) -> Run:
    content = bytes(_BYTES[offset : offset + size].tolist())
    return Run(
        weight="w",
        plane=0,
        first=first,
        last=first + 1,
        offset=offset,
        size=size,
        checksum=hashlib.sha256(content).hexdigest() if sha256 else xxh3(content),
        tag=Tag(level=2),
    )


def _pages(lead: int, size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, -(-(lead + size) // PAGE) * PAGE))


def _written(path: Path) -> Path:
    path.write_bytes(bytes(_BYTES.tolist()))
    return path


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("offset", "size"), [(0, PAGE), (64, 2 * PAGE), (PAGE + 640, 100), (3 * PAGE + 64, 2 * PAGE - 64)]
)
def test_a_file_gives_its_bytes(tmp_path: Path, direct: bool, offset: int, size: int) -> None:
    with open(_written(tmp_path / "file"), "rb") as file:
        place = FilePlace("file", file.fileno(), direct=direct)
    run = _run(offset, size)
    for lead in (offset % PAGE, 128):  # where O_DIRECT can be used, and where not
        pages = _pages(lead, size)
        place.read(run, pages, lead)
        assert bytes(pages[lead : lead + size]) == bytes(_BYTES[offset : offset + size].tolist())
    place.close()


def test_the_checksum_is_the_one_that_others_compute() -> None:
    # xxhash's own vectors, in the canonical form
    assert xxh3(b"") == "99aa06d3014798d86001c324468d497f"
    assert xxh3(b"foveate") == xxh3(memoryview(b"foveate")) != xxh3(b"foveatf")


@pytest.mark.parametrize("sha256", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_changes_while_it_is_open(tmp_path: Path, direct: bool, sha256: bool) -> None:
    path = _written(tmp_path / "file")
    with open(path, "rb") as file:
        place = FilePlace("the file", file.fileno(), direct=direct)
    run = _run(PAGE, 2 * PAGE, sha256=sha256)
    # replaced by another one of its name: what was opened still serves
    (tmp_path / "other").write_bytes(b"x" * 5 * PAGE)
    os.replace(tmp_path / "other", path)
    pages = _pages(0, run.size)
    place.read(run, pages, 0)
    place.close()
    # damaged in place, and then cut off
    _written(path)
    with open(path, "rb") as file:
        place = FilePlace("the file", file.fileno(), direct=direct)
    with open(path, "r+b") as file:
        file.seek(2 * PAGE)
        file.write(bytes([int(_BYTES[2 * PAGE]) ^ 1]))
        file.flush()
        os.fsync(file.fileno())
    with pytest.raises(CheckpointError, match="the file is damaged: the checksum of plane 0 of w, strips 0 to 0"):
        place.read(run, pages, 0)
    os.truncate(path, 2 * PAGE + 5)
    with pytest.raises(CheckpointError, match="the file is cut off"):
        place.read(run, pages, 0)
    place.close()


def test_memory_of_another_device_by_the_same_interface() -> None:
    """Two host arenas stand for the memory of a device and that of the host."""
    runs = [_run(64 * 8 * n, 512, n) for n in range(4)]
    layout = lay_out(runs, {("w", 0): 512})
    far, near = Reservation(layout.total), Reservation(layout.total)
    for run, slot in zip(runs, layout.slots, strict=True):
        begin = slot.begin + slot.lead
        far.whole[begin : begin + run.size] = _BYTES[run.offset : run.offset + run.size]
    place = HostPlace(
        {
            (r.weight, r.plane, r.first): far.tensor(s.begin + s.lead, s.begin + s.lead + r.size)
            for r, s in zip(runs, layout.slots, strict=True)
        }
    )
    for run, slot in zip(runs, layout.slots, strict=True):
        place.read(run, near.slot(slot), slot.lead)
    assert torch.equal(near.whole, far.whole)
    with pytest.raises(CheckpointError, match="is not held here"):
        place.read(_run(0, 256, 9), near.slot(layout.slots[0]), 0)
    far.whole[layout.slots[1].begin + layout.slots[1].lead] ^= 1
    with pytest.raises(CheckpointError, match="does not match"):
        place.read(runs[1], near.slot(layout.slots[1]), layout.slots[1].lead)
    place.close()
    with pytest.raises(CheckpointError, match="is not held here"):
        place.read(runs[0], near.slot(layout.slots[0]), 0)
