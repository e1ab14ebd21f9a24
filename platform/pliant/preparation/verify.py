"""Every image of a dataset decoded once, strictly, in parallel: what is broken, and what is unusual.

A run meets a broken image hours after its start, and some decoders fill what is missing of a truncated one with grey.
"""

from __future__ import annotations

import json
import queue
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pliant.data.index import class_folders
from pliant.data.sources.shards import find_shards
from pliant.errors import UserError
from pliant.preparation.examine import NO_MEMORY, READY
from pliant.preparation.listing import Listing, of_folder, of_shards
from pliant.preparation.progress import progress
from pliant.preparation.staging import write_text

SplitName = Literal["train", "val", "all"]

COMMAND = [sys.executable, "-m", "pliant.preparation.examine"]
"""What decodes."""
_CHUNK = 32  # images that one decoder takes at a time

_Found = tuple[str | None, list[str]]  # why an image is broken, and what is unusual about it


@dataclass(frozen=True)
class Finding:
    """One image that there is something to say about."""

    file: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was found in a split."""

    place: str
    """The folder or archives that were read."""
    images: int
    broken: tuple[Finding, ...]
    odd: tuple[Finding, ...]
    """Unusual, but to be used all the same."""


def listings(root: Path, split: SplitName) -> dict[str, Listing]:
    """What there is to verify, by where it lies: root/SPLIT/*.tar, root/SPLIT-*.tar or root/SPLIT/CLASS/FILE, the
    first that there is, as a run chooses; with `all` and neither train nor val in root, root/CLASS/FILE or root/*.tar.

    Raises:
        UserError: there is nothing.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder: write the root of a dataset.")
    found: dict[str, Listing] = {}
    for name in ("train", "val") if split == "all" else (split,):
        if where := find_shards(root, name):
            shards = sorted(where[0].glob(where[1]))
            found[f"{name}, {len(shards)} shards"] = of_shards(shards)
        elif (root / name).is_dir():
            found[str(root / name)] = of_folder(root / name)
    if not found and split == "all":
        if shards := sorted(root.glob("*.tar")):
            found[f"{root}, {len(shards)} shards"] = of_shards(shards)
        elif class_folders(root):
            found[str(root)] = of_folder(root)
    if not found:
        what = "no images" if split == "all" else f"no images of {split}"
        raise UserError(f"{root} holds {what}: write a folder that holds train/CLASS/FILE or shards.")
    return found


def verify(place: str, listing: Listing, workers: int) -> Report:
    """Decode every image.

    Args:
        place: where they lie, for the report.
        listing: the images.
        workers: processes that decode.

    Raises:
        UserError: this machine cannot decode them.
    """
    broken, odd = [], []
    with progress(f"Decoding {place}", len(listing)) as advance:
        for position, (reason, oddities) in enumerate(_examined(listing, workers)):
            # In an archive an image's name begins with the archive's.
            file = listing.span(position).path if listing.folder else listing.name(position)
            if reason is not None:
                broken.append(Finding(file, reason))
            if oddities:
                odd.append(Finding(file, ", ".join(oddities)))
            advance(1)
    return Report(place, len(listing), tuple(broken), tuple(odd))


def write_report(reports: list[Report], path: Path) -> None:
    """As JSON, for programs."""
    write_text(path, json.dumps([asdict(report) for report in reports], indent=2) + "\n")


class _Decoder:
    """A process that examines one image at a time; started anew when it dies of one."""

    def __init__(self) -> None:
        self._process = self._start()
        self._greeted = False

    def examine(self, listing: Listing, position: int) -> _Found:
        """What is found in one image.

        Raises:
            UserError: this machine is at fault, not the image.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        if not self._greeted:
            # Without this, a process that cannot start at all would have every image be broken.
            if self._process.stdout.readline().decode().strip() != READY:
                raise UserError(f"A process that decodes did not start: run {shlex.join(COMMAND)} to see why.")
            self._greeted = True
        question = json.dumps([*listing.span(position), listing.name(position)])
        try:
            self._process.stdin.write(question.encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            status = self._process.wait()
            if status in (NO_MEMORY, -signal.SIGKILL):  # a machine that runs out of it kills
                raise UserError(
                    f"There was too little memory to decode {listing.name(position)}: write a smaller --workers."
                )
            self.close()
            self._process, self._greeted = self._start(), False
            return f"its decoder ended with status {status}", []
        reason, oddities = json.loads(answer)
        return reason, oddities

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the one who waits for it
        )


def _examined(listing: Listing, workers: int) -> Iterator[_Found]:
    """What is found in each image, in the listing's order."""
    with _decoders(workers) as idle, ThreadPoolExecutor(workers) as threads:

        def examine(first: int) -> list[_Found]:
            decoder = idle.get()
            try:
                return [decoder.examine(listing, k) for k in range(first, min(first + _CHUNK, len(listing)))]
            finally:
                idle.put(decoder)

        try:
            for findings in threads.map(examine, range(0, len(listing), _CHUNK)):
                yield from findings
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # where the caller stops, all others are not waited for


@contextmanager
def _decoders(number: int) -> Iterator[queue.SimpleQueue[_Decoder]]:
    """That many decoders, each to be taken and put back."""
    idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
    decoders: list[_Decoder] = []
    try:
        for _ in range(number):
            decoders.append(_Decoder())
            idle.put(decoders[-1])
        yield idle
    finally:
        for decoder in decoders:
            decoder.close()
