"""`pliant data`: what a person types to make a dataset ready."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pliant.aside import written_aside
from pliant.cores import usable_cores
from pliant.errors import Interrupted, UserError, printable
from pliant.images import Data
from pliant.preparation import imagenet, small, staging, truth
from pliant.preparation import split as held_out_split
from pliant.preparation import verify as verification
from pliant.preparation.progress import note
from pliant.preparation.writers import FormName, Sharding

_COMMANDS = {
    "imagenet": "ImageNet's archives into class folders or shards",
    "shards": "an image folder into shards",
    "cifar10": "unpack CIFAR-10's archive",
    "cifar100": "unpack CIFAR-100's archive",
    "svhn": "copy and check SVHN's files",
    "split": "list the images that a run holds out of training",
    "verify": "decode every image of a dataset; list what is broken or unusual",
}


@dataclass(frozen=True, kw_only=True)
class AskImagenet:
    """ImageNet's archives into class folders or shards. Stopped at any moment, the same command goes on."""

    train: Path | None = None
    """ILSVRC2012_img_train.tar."""
    val: Path | None = None
    """ILSVRC2012_img_val.tar; its classes stand in the development kit or in a list."""
    devkit: Path | None = None
    """ILSVRC2012_devkit_t12.tar.gz."""
    val_labels: Path | None = None
    """In the development kit's place: a text file with lines such as ILSVRC2012_val_00000001.JPEG n01751748."""
    to: Path
    """Folder to write to."""
    form: FormName = "folders"
    """folders: TO/train/WNID/FILE and TO/val/WNID/FILE. shards: TO/train-000000.tar and so on."""
    shard_images: int = 1000
    """Images of a shard, or one fewer."""
    seed: int = 0
    """Of the lot by which images are dealt out to shards."""

    def __post_init__(self) -> None:
        if self.train is None and self.val is None:
            raise UserError("Nothing is to be prepared: write ILSVRC2012_img_train.tar as --train, or --val, or both.")
        if self.val is None and (self.devkit, self.val_labels) != (None, None):
            raise UserError("--devkit and --val-labels are of the validation images: write their archive as --val.")
        if self.form == "folders" and self.shard_images != AskImagenet.shard_images:
            raise UserError("Folders have no use for --shard-images: leave it out, or write --form shards.")
        if self.val is not None and (self.devkit is None) == (self.val_labels is None):
            raise UserError(
                "The classes of the validation images stand elsewhere: write ILSVRC2012_devkit_t12.tar.gz as --devkit "
                "or a list of them as --val-labels, one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class AskShards:
    """An image folder into shards, each image kept byte for byte. Stopped at any moment, the same command goes on."""

    root: Path
    """Image folder: ROOT/train/CLASS/FILE and ROOT/val/CLASS/FILE."""
    to: Path
    """Folder to write to: TO/train-000000.tar and so on."""
    shard_images: int = 1000
    """Images of a shard, or one fewer."""
    seed: int = 0
    """Of the lot by which images are dealt out to shards."""


@dataclass(frozen=True, kw_only=True)
class AskSmall:
    """The authors' files, checked and unpacked."""

    from_: Annotated[Path, tyro.conf.arg(name="from")]
    """The archive, or the folder that holds it (SVHN: that holds its .mat files)."""
    to: Path
    """Folder to write to: what --data.root will be."""


@dataclass(frozen=True, kw_only=True)
class AskSplit:
    """The images that a run with this seed and --data.held-out keeps back, one a line: paths below ROOT, or positions
    in the training images where the dataset is held in memory."""

    root: Path
    """Where the dataset lies."""
    held_out: int
    """How many images, as --data.held-out."""
    seed: int = 0
    """Of the run."""
    source: Literal["folder", "shards", "cifar10", "cifar100", "svhn"] = "folder"
    """As --data.source."""
    class_list: Path | None = None
    """As --data.class-list."""
    extra: bool = False
    """As --data.extra."""
    check: Literal["strict", "header"] = "strict"
    """As --data.check."""
    broken_share: float = 0.01
    """As --data.broken-share."""
    rest: bool = False
    """List the images that the run learns from instead."""
    to: Path | None = None
    """File to write; default: stdout."""


@dataclass(frozen=True, kw_only=True)
class AskVerify:
    """Decode every image, whole and strictly. Status 2 if one is broken."""

    root: Annotated[Path, tyro.conf.Positional]
    """Image folder, or folder of shards."""
    split: verification.SplitName = "all"
    """Which images."""
    workers: int = field(default_factory=usable_cores)
    """Processes that decode; default: the cores that this one may use."""
    json: Path | None = None
    """File to write the findings to, for programs."""


def data_command(arguments: Sequence[str]) -> None:
    """What follows `pliant data`.

    Raises:
        UserError: it cannot be done, or no further; the sentence says why.
        Interrupted: Ctrl-C; the same command goes on.
    """
    command, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if command not in _COMMANDS:
        _usage(asked=command in ("-h", "--help"))
    prog = f"pliant data {command}"
    try:
        if command == "imagenet":
            _imagenet(tyro.cli(AskImagenet, args=rest, prog=prog))
        elif command == "shards":
            _shards(tyro.cli(AskShards, args=rest, prog=prog))
        elif command == "split":
            _split(tyro.cli(AskSplit, args=rest, prog=prog))
        elif command == "verify":
            _verify(tyro.cli(AskVerify, args=rest, prog=prog))
        else:
            ask = tyro.cli(AskSmall, args=rest, prog=prog)
            svhn = command == "svhn"
            _say(small.prepare_svhn(ask.from_, ask.to) if svhn else small.prepare_cifar(command, ask.from_, ask.to))
    except KeyboardInterrupt:
        raise Interrupted("Stopped; nothing unfinished has taken its place.") from None
    except OSError as error:  # a full disk, a folder that is gone
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror}: mend that, and the same command goes on.") from None


def _imagenet(ask: AskImagenet) -> None:
    target = imagenet.Target(root=ask.to, form=ask.form, sharding=Sharding(images=ask.shard_images, seed=ask.seed))
    for archive in (ask.train, ask.val):
        if archive is not None:
            imagenet.require_readable(archive)
    wnids = cache(partial(_wnids, ask))
    if ask.val is not None and not staging.recorded(ask.to, "val"):
        wnids()  # refused now, if it must be, and not when the training images are written
    if ask.train is not None:
        _say(imagenet.prepare_train(ask.train, target))
    if ask.val is not None:
        _say(imagenet.prepare_val(ask.val, wnids, target))


def _wnids(ask: AskImagenet) -> dict[str, str]:
    if ask.devkit is not None:
        return truth.from_devkit(ask.devkit)
    assert ask.val_labels is not None  # one of the two, says AskImagenet
    return truth.from_text(ask.val_labels)


def _shards(ask: AskShards) -> None:
    target = imagenet.Target(root=ask.to, form="shards", sharding=Sharding(images=ask.shard_images, seed=ask.seed))
    splits: tuple[imagenet.SplitName, ...] = ("train", "val")
    there = [split for split in splits if (ask.root / split).is_dir()]
    if "train" not in there:
        raise UserError(f"{ask.root} holds no folder train: write a folder that holds train/CLASS/FILE as --root.")
    imagenet.require_known_classes(ask.root, there)
    for split in there:
        _say(imagenet.prepare_folder(ask.root / split, split, target))


def _split(ask: AskSplit) -> None:
    if ask.held_out < 1:
        raise UserError(f"A split of {ask.held_out} images is none: write --held-out 1 or more.")
    data = Data(
        source=ask.source,
        root=ask.root,
        held_out=ask.held_out,
        class_list=ask.class_list,
        extra=ask.extra,
        check=ask.check,
        broken_share=ask.broken_share,
    )
    data.refuse_idle()
    held_out, learned = held_out_split.lists(data, ask.seed)
    lines = learned if ask.rest else held_out
    text = b"".join(os.fsencode(line) + b"\n" for line in lines)  # names as they are, UTF-8 or not: programs open them
    if ask.to is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(text)
    else:
        with written_aside(ask.to, flush=True) as beside:
            beside.write_bytes(text)
        note(f"{ask.to}: {len(lines):,} images")


def _verify(ask: AskVerify) -> None:
    if ask.workers < 1:
        raise UserError(f"{ask.workers} processes decode nothing: write --workers 1 or more.")
    if ask.json is not None and not ask.json.absolute().parent.is_dir():
        raise UserError(f"There is no folder for {ask.json}: make it, or write another file as --json.")
    found = verification.listings(ask.root, ask.split)
    reports = []
    for place, listing in found.items():
        report = verification.verify(place, listing, ask.workers)
        reports.append(report)
        for kind, findings in (("broken", report.broken), ("odd", report.odd)):
            for finding in findings:
                _say(f"{kind}: {finding.file}: {finding.reason}")
        broken, odd = len(report.broken), len(report.odd)
        _say(f"{place}: {report.images:,} images, {broken:,} broken, {odd:,} unusual")
    if ask.json is not None:
        verification.write_report(reports, ask.json)
    broken, images = sum(len(report.broken) for report in reports), sum(report.images for report in reports)
    if broken:
        raise UserError(f"{broken:,} of {images:,} images in {ask.root} are broken: replace or remove them.")


def _say(text: str) -> None:
    """A line on stdout, for a person: bytes of a name that are not UTF-8 are spelt out."""
    print(printable(text), flush=True)


def _usage(*, asked: bool) -> None:
    lines = "\n".join(f"  {name:<10} {text}" for name, text in _COMMANDS.items())
    print(
        f"usage: pliant data COMMAND …\n\n{lines}\n\npliant data COMMAND --help says more.",
        file=sys.stdout if asked else sys.stderr,
    )
    sys.exit(0 if asked else 2)
