"""A listing written out, as class folders or as shards. Both go on where they were stopped.

Shards are tar archives as WebDataset reads them: each image KEY.jpg is followed by KEY.cls, its class as a number in
the order of the class names. Images are dealt out to the shards by lot, so that a reader that shuffles a few shards at
a time sees all classes; the lot depends on the seed alone, and so do the shards, byte for byte.

Shapes: N images.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pliant.aside import written_aside
from pliant.errors import UserError
from pliant.preparation.listing import Listing, is_image
from pliant.preparation.tars import members
from pliant.randomness import philox

FormName = Literal["folders", "shards"]

_READERS = 8  # threads that wait for storage
_AHEAD = 4 * _READERS  # images at most in memory
_PAGE = 4096  # bytes, what a file system hands out at least
_TAR_OVERHEAD = 3 * 512 + 512  # bytes an image costs at most besides its own: two headers, its class, padding


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How images are dealt out to shards."""

    images: int
    """Images of a shard, or one fewer."""
    seed: int

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"A shard cannot hold {self.images} images: write --shard-images 1 or more.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"A seed lies in [0, 2**63), not {self.seed}: write --seed 0.")


def write_folders(listing: Listing, content: Path, advance: Callable[[int], None]) -> None:
    """Each image to content/CLASS/FILE, byte for byte. A file is there whole or not at all."""
    made: set[str] = set()
    for position in range(len(listing)):
        name = listing.name(position)
        target = content / name
        folder = str(PurePosixPath(name).parent)
        if folder not in made:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.add(folder)
        if not _has_size(target, int(listing.sizes[position])):
            _replace(target, listing.span(position).read())
        advance(1)
    os.sync()  # once for all: flushing each of a million files takes hours


def write_shards(
    listing: Listing, content: Path, split: str, sharding: Sharding, advance: Callable[[int], None]
) -> None:
    """The images to content/SPLIT-000000.tar and so on. A shard is there whole or not at all."""
    keys = shard_keys(listing)
    for number, positions in enumerate(dealt(len(listing), sharding)):
        target = content / f"{split}-{number:06d}.tar"
        if not target.is_file():
            _write_shard(listing, keys, positions, target)
        advance(len(positions))


def dealt(images: int, sharding: Sharding) -> list[NDArray[np.int64]]:
    """Positions of the images of each shard, in their order; sizes differ by one at most."""
    order = philox(sharding.seed, "shards").permutation(images)
    return np.array_split(order, shards_of(images, sharding))


def shards_of(images: int, sharding: Sharding) -> int:
    """How many shards so many images fill."""
    return -(-images // sharding.images)


def shard_keys(listing: Listing) -> list[str]:
    """A key for each image, that no other has: its file's name, preceded by its class where it does not begin with it.

    WebDataset ends a key at the first dot, so there is none in it.
    """
    keys = [_key(listing.name(position)) for position in range(len(listing))]
    if len(set(keys)) < len(keys):
        keys = [f"{position:08d}_{key}" for position, key in enumerate(keys)]
    return keys


def verify(listing: Listing, content: Path, form: FormName) -> None:
    """Compare what was written with what was to be written, by number and by size.

    Raises:
        UserError: they differ.
    """
    written: dict[str, tuple[int, int]] = {}
    if form == "folders":
        for name, path in ((entry.name, entry) for entry in content.iterdir()):
            sizes = [entry.stat().st_size for entry in path.rglob("*") if entry.is_file()]
            written[name] = len(sizes), sum(sizes)
        counts = np.bincount(listing.labels, minlength=len(listing.classes)).tolist()
        sums = np.zeros(len(listing.classes), np.int64)
        np.add.at(sums, listing.labels, listing.sizes)
        expected = {name: (counts[k], int(sums[k])) for k, name in enumerate(listing.classes) if counts[k]}
    else:
        sizes = [member.size for path in content.glob("*.tar") for member in members(path) if is_image(member.name)]
        written["shards"] = len(sizes), sum(sizes)
        expected = {"shards": (len(listing), int(listing.sizes.sum()))}
    wrong = sorted(name for name in written | expected if written.get(name) != expected.get(name))
    if wrong:
        here, there = written.get(wrong[0], (0, 0)), expected.get(wrong[0], (0, 0))
        raise UserError(
            f"{content / wrong[0]} holds {here[0]} images of {here[1]} bytes where {there[0]} of {there[1]} were "
            f"listed: remove {content.parent} and begin again."
        )


def needed_bytes(listing: Listing, form: FormName) -> int:
    """Room that the written images take."""
    if form == "folders":
        return int((-(-listing.sizes // _PAGE) * _PAGE).sum())
    return int(listing.sizes.sum()) + len(listing) * _TAR_OVERHEAD


def publish(content: Path, root: Path, split: str, form: FormName) -> None:
    """Move what is whole into its place: a folder in one step, shards one by one from the highest number down. Where
    the number 0 is there, all are."""
    if form == "folders":
        os.rename(content, root / split)
        return
    for path in sorted(content.glob("*.tar"), reverse=True):
        os.rename(path, root / path.name)


def place(root: Path, split: str, form: FormName) -> Path:
    """What lies in root once `publish` is done."""
    return root / (split if form == "folders" else f"{split}-000000.tar")


def described(form: FormName, sharding: Sharding) -> dict[str, Any]:
    """What of the settings decides what is written."""
    return {"form": form} | (dict(images_per_shard=sharding.images, seed=sharding.seed) if form == "shards" else {})


def _key(name: str) -> str:
    folder, _, file = name.partition("/")
    stem = file.rpartition(".")[0].replace("/", "_").replace(".", "_")
    folder = folder.replace(".", "_")
    return stem if stem.startswith((folder, "ILSVRC2012_val_")) else f"{folder}_{stem}"


def _write_shard(listing: Listing, keys: list[str], positions: NDArray[np.int64], target: Path) -> None:
    with written_aside(target, flush=True) as beside, tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as shard:
        for position, image in zip(positions.tolist(), _read_ahead(listing, positions), strict=True):
            suffix = PurePosixPath(listing.name(position)).suffix.lower()
            suffix = ".jpg" if suffix == ".jpeg" else suffix
            _add(shard, keys[position] + suffix, image)
            _add(shard, keys[position] + ".cls", str(int(listing.labels[position])).encode())


def _read_ahead(listing: Listing, positions: NDArray[np.int64]) -> Iterator[bytes]:
    """The images' bytes in the order of `positions`. They lie at random places, for each of which a disk is waited for:
    a few are asked for at once, and no more than that wait in memory."""
    with ThreadPoolExecutor(_READERS, "pliant-read") as readers:
        asked: deque[Future[bytes]] = deque()
        try:
            for position in positions.tolist():
                asked.append(readers.submit(listing.span(position).read))
                if len(asked) == _AHEAD:
                    yield asked.popleft().result()
            while asked:
                yield asked.popleft().result()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)  # where it is stopped, none is read for nothing


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: the same images give the same bytes
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def _replace(target: Path, content: bytes) -> None:
    beside = target.with_name(f".{target.name}.part")  # a name that no image has
    beside.write_bytes(content)
    os.replace(beside, target)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
