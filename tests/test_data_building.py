"""An index is built by one process, whole or not at all, and what it costs with 1.28 million images."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pliant.data.index import scan
from pliant.data.index.cache import stamp, table_file
from pliant.data.index.examine import examine
from pliant.data.index.folders import joined
from pliant.data.index.table import Listing, Table, write_table

pytestmark = pytest.mark.usefixtures("own_cache")

BUILD = """
import sys, time
from pathlib import Path
from pliant.data.index import examine, scan

read, opened, pause = examine.read, [], float(sys.argv[2])

def slowly(path, offset, length):
    opened.append(path)
    print("opened", flush=True)
    time.sleep(pause)
    return read(path, offset, length)

examine.read = slowly
print("ready", flush=True)
sys.stdin.readline()
index = scan(Path(sys.argv[1]), None)
print("found", len(opened), len(index), len(index.broken), index.sizes.sum(), flush=True)
"""


def builder(folder: Path, how: float | str, script: str = BUILD) -> subprocess.Popen[str]:
    """A process that indexes `folder` once it is told to, every image taking `how` seconds more."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(how)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def found(process: subprocess.Popen[str]) -> list[int]:
    """Files opened, images, broken ones, sum of sizes."""
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return [int(word) for word in said.splitlines()[-1].split()[1:]]


def killed(process: subprocess.Popen[str]) -> None:
    """By SIGKILL, from here or by itself."""
    with process:
        process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL


def leftovers(folder: Path) -> list[str]:
    return sorted(
        "".join(path.suffixes) for path in table_file(folder, "folder").parent.iterdir() if path.suffix != ".lock"
    )


def test_of_several_processes_one_builds(image_folder):
    folder = image_folder / "train"
    processes = [builder(folder, 0.05) for _ in range(2)]
    for process in processes:
        begin(process)
    results = [found(process) for process in processes]
    assert sorted(opened for opened, *_ in results) == [0, 24]
    assert len({tuple(rest) for _, *rest in results}) == 1
    assert leftovers(folder) == [".safetensors"]


def test_killed_while_it_reads_the_next_one_builds(image_folder):
    folder = image_folder / "train"
    process = builder(folder, 0.2)
    waiting = builder(folder, 0.0)
    begin(process)
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline() == "opened\n"
    begin(waiting)
    time.sleep(0.3)
    assert waiting.poll() is None  # the other one has the lock
    process.send_signal(signal.SIGKILL)
    killed(process)
    expected = scan(folder, None)
    assert found(waiting)[1:] == [24, 0, int(expected.sizes.sum())]
    assert leftovers(folder) == [".safetensors"]


KILLED_WRITING = """
import os, signal, sys
from pathlib import Path
from pliant.data.index import scan, table

instant = sys.argv[2]
going_on = getattr(os, instant)

def killed(*given):
    if any(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.partial.*")):
        os.kill(os.getpid(), signal.SIGKILL)
    return going_on(*given)

print("ready", flush=True)
sys.stdin.readline()
setattr(table.os, instant, killed)
scan(Path(sys.argv[1]), None)
"""


@pytest.mark.parametrize("instant", ["fsync", "replace"])
def test_killed_while_it_writes_leaves_no_index(instant, image_folder, monkeypatch):
    folder = image_folder / "train"
    process = builder(folder, instant, KILLED_WRITING)
    begin(process)
    killed(process)
    assert leftovers(folder) == [".partial.safetensors"]
    assert len(scan(folder, None)) == 24
    assert leftovers(folder) == [".safetensors"]
    monkeypatch.setattr("pliant.data.index.folders.examine", None)  # not needed again
    assert len(scan(folder, None)) == 24


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What is warned of."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pliant").addHandler(handler)
    yield messages
    logging.getLogger("pliant").removeHandler(handler)


def test_a_full_disk_is_named_before_the_scan_and_nobody_waits(small_disk, image_folder, heard, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    folder, said = image_folder / "train", []

    def examining(listing: Listing, *, strict: bool) -> Table:
        said.append(list(heard))
        assert not list(small_disk.rglob("*.lock"))
        return examine(listing, strict=strict)

    monkeypatch.setattr("pliant.data.index.folders.examine", examining)
    assert len(scan(folder, None)) == 24
    (line,) = said[0]
    assert f"the index of {folder} cannot be kept in {small_disk}/pliant (No space left on device)" in line
    assert "set XDG_CACHE_HOME to a folder that can be written." in line
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []


def test_a_disk_that_fills_while_images_are_read_costs_the_index_alone(image_folder, heard, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = image_folder / "train"
    monkeypatch.setattr("pliant.data.index.table.save", full)
    assert len(scan(folder, None)) == 24
    assert ["(No space left on device)" in line for line in heard] == [True]
    assert leftovers(folder) == []


def test_a_user_without_a_home_is_told(image_folder, heard, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert len(scan(image_folder / "train", None)) == 24
    assert ["(there is no home)" in line for line in heard] == [True]


def test_without_locks_those_who_write_at_once_do_not_meet(image_folder, heard, monkeypatch):
    """Both are between their last byte and the renaming."""
    folder, renaming, meeting = image_folder / "train", os.replace, threading.Barrier(2, timeout=20)

    def met(source: Path, target: Path) -> None:
        if ".partial." in source.name:
            meeting.wait()
        renaming(source, target)

    monkeypatch.setattr("pliant.data.index.cache._locked", lambda *_: None)
    monkeypatch.setattr("pliant.aside.os.replace", met)
    with ThreadPoolExecutor(2) as both:
        found = list(both.map(lambda _: scan(folder, None), range(2)))
    assert [len(index) for index in found] == [24, 24]
    assert heard == []
    assert leftovers(folder) == [".safetensors"]


CLASSES, IMAGES = 1000, 1_281_167


@pytest.fixture
def million(tmp_path: Path) -> Path:
    """The index of ImageNet's size over class folders that hold no files, one image in ten thousand broken."""
    folder = tmp_path / "imagenet" / "train"
    names = [f"n{number:08d}" for number in range(CLASSES)]
    for name in names:
        (folder / name).mkdir(parents=True)
    stamps = [stamp(folder, f"{name}/") for name in names]
    number = np.sort(np.arange(IMAGES, dtype=np.int32) % CLASSES)
    files, ends = joined([f"n{label:08d}_{image}.JPEG" for image, label in enumerate(number.tolist())])
    generator = np.random.default_rng(0)
    listing = Listing(
        folder=folder,
        sources=tuple(names),
        whole=True,
        classes=tuple(names),
        numbered=False,
        source=number,
        label=number,
        names=files,
        ends=ends,
        offset=np.zeros(IMAGES, np.int64),
        length=generator.integers(10_000, 200_000, IMAGES),
        stamps=tuple(stamps),
    )
    broken = np.zeros(IMAGES, np.bool_)
    broken[::10_000] = True
    table = Table(
        listing=listing,
        strict=True,
        size=generator.integers(100, 600, (IMAGES, 2)).astype(np.int32),
        crc=generator.integers(0, 2**32, IMAGES).astype(np.uint32),
        broken=broken,
        reasons=("cut off",) * int(broken.sum()),
    )
    target = table_file(folder, "folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, target)
    return folder.parent


MEASURE = """
import sys, time  # its own time: others may use the machine
from pathlib import Path
from pliant.data import Feed, open_dataset
from pliant.data.index import Index
from pliant.experiment import Batching, Data

def grown():
    fields = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024

data = Data(root=Path(sys.argv[1]), held_out=int(sys.argv[2]), loader="torchvision")
batching = Batching(images=256, micro=64)
before, began = grown(), time.process_time()
dataset = open_dataset(data, 0)
opened = time.process_time() - began
feed = Feed(dataset, data, batching, seed=0, device="cpu")
seconds = {}
for step in (0, 1_000_000, 0, 1_000_000):  # the first ones warm up
    fresh = Feed(dataset, data, batching, seed=0, device="cpu")
    began = time.process_time()
    request = fresh._training_request(0, step, 0, batching)
    seconds[step] = time.process_time() - began
    del fresh
for step in range(0, 5004, 4):
    request = feed._training_request(0, step, 0, batching)
    assert isinstance(dataset.train, Index)
    words = [dataset.train.path(int(position)) for position in request.positions[:4]]
print(opened, grown() - before, seconds[0], seconds[1_000_000], len(dataset.train), words[0], flush=True)
"""


@pytest.mark.parametrize("held_out", [0, 50_000])
def test_a_million_images_open_fast_and_small(held_out, million):
    """In a process that looks at images all over the epoch; without a file, as none is read before it is decoded."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(million), str(held_out)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    opened, megabytes, first, later, images, path = done.stdout.split()
    print(f"opened in {opened} s, grown by {megabytes} MB, first plans after {first} and {later} s")
    assert int(images) == IMAGES - held_out
    assert path.startswith(f"{million}/train/n")
    assert float(opened) < 2.0
    assert float(megabytes) < 250.0
    assert abs(float(later) - float(first)) < 0.05
