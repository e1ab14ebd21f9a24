"""All ranks see the same images, and a resumed run those that it was begun with."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pliant.data import Fingerprint, open_dataset
from pliant.engine.ranks import Ranks
from pliant.engine.sameness import kept, require_same_as_begun, require_same_on_ranks
from pliant.errors import EXIT_USER_ERROR, UserError
from pliant.experiment import Data
from tests.runs import Launch, tiny_cifar

pytestmark = pytest.mark.usefixtures("own_cache")
RUN = Path("runs/name/time")


def fingerprint(root: Path, **settings) -> Fingerprint:
    return open_dataset(Data(root=root, **settings), seed=3).train.fingerprint


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def lengthen(file: Path) -> None:
    """An image of the same size, which only a checksum tells from the one before."""
    file.write_bytes(file.read_bytes() + b"0")


def test_a_copy_elsewhere_has_the_same_fingerprint(image_folder, tmp_path):
    copy = shutil.copytree(image_folder, tmp_path / "copy")
    for settings in ({}, {"held_out": 5}, {"check": "header"}):
        begun = fingerprint(image_folder, **settings)
        assert require_same_as_begun(kept(begun), fingerprint(copy, **settings), RUN) == []
    assert fingerprint(image_folder, held_out=5) != fingerprint(image_folder)


@pytest.mark.parametrize("held_out", [0, 5])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda train: (train / "cat" / "0.png").unlink(), "there are {fewer} and were {images}"),
        (lambda train: shutil.copy(train / "cat" / "0.png", train / "cat" / "9.png"), "there are {more} and were"),
        (
            lambda train: (train / "cat" / "0.png").rename(train / "dog" / "9.png"),
            r"as many \({images}\), but of other",
        ),
        (lambda train: lengthen(train / "cat" / "0.png"), r"as many \({images}\), but with other contents"),
    ],
)
def test_a_run_does_not_go_on_with_other_images(change, words, held_out, image_folder):
    begun = fingerprint(image_folder, held_out=held_out)
    images = begun.images
    # Which images are held out depends on how many there are: more may be changed than the one.
    change(image_folder / "train")
    (image_folder / "train" / "cat").touch()
    expected = words.format(images=images, fewer=images - 1, more=images + 1)
    with pytest.raises(UserError, match=f"^The training images are others than when {RUN} was begun, {expected}") as e:
        require_same_as_begun(kept(begun), fingerprint(image_folder, held_out=held_out), RUN)
    assert str(e.value).endswith("leave --resume out.")


def test_images_that_broke_or_were_mended_are_spoken_of_alone(image_folder):
    file = image_folder / "train" / "dog" / "3.png"
    whole, before = file.read_bytes(), fingerprint(image_folder)
    cut(file)
    (image_folder / "train" / "dog").touch()
    after = fingerprint(image_folder)
    for begun, now in ((before, after), (after, before)):
        (note,) = require_same_as_begun(kept(begun), now, RUN)
        assert note.startswith("other training images are broken than when the run was begun")
    file.write_bytes(whole)
    assert fingerprint(image_folder) == before


def test_headers_alone_are_not_compared_with_contents(image_folder):
    quick = fingerprint(image_folder, check="header")
    assert require_same_as_begun(kept(quick), fingerprint(image_folder), RUN) == []
    assert require_same_as_begun(kept(fingerprint(image_folder)), quick, RUN) == []


def test_a_checkpoint_of_an_earlier_version_is_believed(image_folder):
    assert require_same_as_begun(None, fingerprint(image_folder), RUN) == []


def test_images_in_memory_are_told_apart_by_pixels_and_labels(tmp_path):
    root = tiny_cifar(tmp_path)
    file = root / "cifar-10-batches-bin" / "data_batch_1.bin"
    content = file.read_bytes()
    found = []
    for place in (None, 0, 5):  # a label, a value of a pixel
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        file.write_bytes(changed)
        found.append(fingerprint(root, source="cifar10"))
    whole, label, pixel = found
    assert not whole.same_positions(label)
    assert whole.same_positions(pixel)
    assert not whole.same_contents(pixel)


OPENED_BY_TWO = """
import os, sys
from pathlib import Path
from pliant.guard import guarded
from pliant.engine.ranks import joined
from pliant.engine.session import make_feed
from pliant.experiment import Batching, Data, Experiment
from tests.small_recipes import Plain

def opened():
    data = Data(root=Path(sys.argv[1 + int(os.environ["RANK"])]), loader="torchvision")
    with joined() as ranks:
        make_feed(Experiment(name="two", recipe=Plain(), data=data, batch=Batching(images=8, micro=4)), ranks)

guarded(opened)
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, ""),
        (Path.unlink, "error: Rank 1 sees 23 training images and rank 0 sees 24: give every machine the same copy of"),
    ],
    ids=["one broken", "one fewer"],
)
def test_two_ranks_open_a_copy_each(
    change: Callable[[Path], None], said: str, image_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(image_folder, tmp_path / "other")
    change(other / "train" / "cat" / "0.png")
    for status, words in Launch([sys.executable, "-c", OPENED_BY_TWO, str(image_folder), str(other)]).start().finish():
        assert status == (EXIT_USER_ERROR if said else 0), words
        assert said in words


@dataclass(frozen=True)
class Gathered(Ranks):
    """Rank 0 of two, to whom the other says what it is given here."""

    other: object = None

    def all(self, value: object) -> list[object]:
        return [value, self.other]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "val/cat/0.png").rename(root / "val/dog/9.png"), r"other validation .* as many \(9\)"),
        (lambda root: lengthen(root / "train" / "cat" / "0.png"), r"other training .* as many \(24\)"),
        (lambda root: shutil.rmtree(root / "val"), "0 validation images and rank 0 sees 9"),
    ],
)
def test_a_rank_that_sees_other_images_is_named(change, words, image_folder, tmp_path):
    other = shutil.copytree(image_folder, tmp_path / "other")
    change(other)
    here, there = (open_dataset(Data(root=root), seed=3) for root in (image_folder, other))
    require_same_on_ranks(here, Gathered(0, 2, torch.device("cpu"), here.fingerprints()))
    with pytest.raises(UserError, match=f"^Rank 1 sees {words}"):
        require_same_on_ranks(here, Gathered(0, 2, torch.device("cpu"), there.fingerprints()))
