"""Tar shards hold the same images as a folder; what they must not hold is refused in a sentence."""

import io
import tarfile
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pliant.data import Feed, open_dataset
from pliant.data.index import scan_shards
from pliant.data.index.shards import _class_names
from pliant.data.sources.folder import read_class_list
from pliant.errors import UserError
from pliant.experiment import Batching, Data

pytestmark = pytest.mark.usefixtures("own_cache")

Member = tuple[str, bytes] | tarfile.TarInfo


def pack(path: Path, members: Iterable[Member]) -> Path:
    """A plain tar of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                shard.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                shard.addfile(info, io.BytesIO(member[1]))
    return path


def test_an_image_stands_in_a_shard_once(tmp_path, own_cache):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    content = picture.getvalue()
    pack(tmp_path / "train-000000.tar", [("a/0.png", content), ("a/0.png", content), ("b/0.png", content)])
    with pytest.raises(UserError, match=r"holds two images named 'a/0\.png'"):
        scan_shards(tmp_path, "train-*.tar", None)


def test_of_the_members_of_a_sample_one_is_the_image(tmp_path, own_cache):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    content = picture.getvalue()
    samples = [[(f"{key}.png", content), (f"{key}.mask.png", content), (f"{key}.cls", b"1")] for key in ("p", "q")]
    pack(tmp_path / "train-000000.tar", [member for sample in samples for member in sample])
    index = scan_shards(tmp_path, "train-*.tar", None)
    assert [index.shown(position).rpartition(":")[2] for position in range(len(index))] == ["p.png", "q.png"]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.png"))


def as_folders(folder: Path, prefix: str = "") -> list[Member]:
    """CLASS/FILE."""
    return [(f"{prefix}{file.parent.name}/{file.name}", file.read_bytes()) for file in files(folder)]


def as_samples(folder: Path, classes: dict[str, str]) -> list[Member]:
    """KEY.png beside KEY.cls, the class before or after its image, and a member that is neither."""
    members: list[Member] = []
    for number, file in enumerate(files(folder)):
        key = f"sample{number:04d}"
        pair: list[Member] = [
            (f"{key}.png", file.read_bytes()),
            (f"{key}.cls", classes[file.parent.name].encode() + b"\n"),
        ]
        members += [*(pair if number % 2 else reversed(pair)), (f"{key}.json", b"{}")]
    return members


def refusal(root: Path | None, **settings) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(Data(source="shards", root=root, **settings), seed=0)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


NAMES = {"cat": "cat", "dog": "dog", "newt": "newt"}
NUMBERS = {"cat": "0", "dog": "1", "newt": "2"}


@pytest.mark.parametrize("beside", [True, False], ids=["train-*.tar", "train/*.tar"])
@pytest.mark.parametrize("classes", [None, NAMES, NUMBERS], ids=["folders", "names", "numbers"])
def test_shards_hold_the_images_of_the_folder(beside, classes, image_folder, tmp_path):
    root = tmp_path / "shards"
    for split in ("train", "val"):
        folder = image_folder / split
        members = as_folders(folder, "./") if classes is None else as_samples(folder, classes)
        cut = 3 * len(members) // 7 // 3 * 3  # a sample stays in one shard
        for number, part in enumerate((members[:cut], members[cut:])):
            pack(root / (f"{split}-{number}.tar" if beside else f"{split}/{number}.tar"), part)
    data = Data(source="shards", root=root)
    for _ in range(2):  # built, then kept
        dataset = open_dataset(data, 0)
        assert dataset.classes == (tuple("012") if classes is NUMBERS else ("cat", "dog", "newt"))
        for name in ("train", "val"):
            index, expected = dataset.split(name), open_dataset(Data(root=image_folder), 0).split(name)
            np.testing.assert_array_equal(index.labels, expected.labels)
            np.testing.assert_array_equal(index.sizes, expected.sizes)
            for position in range(len(expected)):
                assert index.encoded(position) == expected.encoded(position)
            assert index.path(0).endswith("-0.tar:" * beside + "0.tar:" * (not beside) + index.table.listing.name(0))


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_batches_from_shards_are_those_from_the_folder(loader, image_folder, tmp_path):
    if loader == "dali" and find_spec("nvidia") is None:
        pytest.skip("DALI is not installed")
    pack(tmp_path / "shards" / "train-0.tar", as_folders(image_folder / "train"))
    served = []
    for source, root in (("folder", image_folder), ("shards", tmp_path / "shards")):
        data = Data(source=source, root=root, loader=loader, size=16)
        feed = Feed(open_dataset(data, 0), data, Batching(images=12, micro=12), seed=0, device="cpu")
        with feed.training(stage=0, first_step=0, last_step=3, micro_batches=[0]) as batches:
            served.append(list(batches))
    for one, other in zip(*served, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_class_numbers_are_labels_and_a_list_names_them(image_folder, tmp_path):
    pack(tmp_path / "train-0.tar", as_samples(image_folder / "train", {"cat": "5", "dog": "0", "newt": "03"}))
    index = scan_shards(tmp_path, "train-*.tar", None)
    assert index.classes == tuple("012345")
    assert np.bincount(index.labels).tolist() == [8, 0, 0, 8, 0, 8]
    names = tuple("uvwxyz")
    named = scan_shards(tmp_path, "train-*.tar", names)
    assert named.classes == names
    np.testing.assert_array_equal(named.labels, index.labels)
    with pytest.raises(UserError, match="class 5 of the shards"):
        scan_shards(tmp_path, "train-*.tar", names[:5])


def test_names_of_numbers_lie_beside_the_shards(image_folder, tmp_path):
    """As `pliant data` writes them; a list of the user's own counts more, and names of folders are names already."""
    for split in ("train", "val"):
        pack(tmp_path / f"{split}-000000.tar", as_samples(image_folder / split, NUMBERS))
    (tmp_path / "classes.txt").write_text("ant\ncat\ndog\nnewt\n")
    (tmp_path / "own.txt").write_text("x\ny\nz\n")
    dataset = open_dataset(Data(source="shards", root=tmp_path), 0)
    assert dataset.classes == dataset.split("val").classes == ("ant", "cat", "dog", "newt")
    assert np.bincount(dataset.train.labels).tolist() == [8, 8, 8]
    assert dataset.num_classes == 4
    assert open_dataset(Data(source="shards", root=tmp_path, class_list=tmp_path / "own.txt"), 0).classes == tuple(
        "xyz"
    )
    (tmp_path / "classes.txt").write_text("ant\ncat\n")
    assert "class 2 of the shards" in refusal(tmp_path)
    for split in ("train", "val"):
        pack(tmp_path / f"{split}-000000.tar", as_folders(image_folder / split))
    assert open_dataset(Data(source="shards", root=tmp_path), 0).classes == ("cat", "dog", "newt")


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_that_are_not_all_in_their_place_are_refused(split, image_folder, tmp_path):
    """`pliant data` was stopped while it moved them, or before."""
    for name in ("train", "val"):
        members = as_folders(image_folder / name)
        for number in range(3):
            pack(tmp_path / f"{name}-{number:06d}.tar", members[number::3])
    data, whole = Data(source="shards", root=tmp_path), {"train": 24, "val": 9}
    content = tmp_path / f".{split}.partial" / "content"
    content.mkdir(parents=True)
    assert len(open_dataset(data, 0).split(split)) == whole[split]  # it was stopped before it removed that folder
    first = (tmp_path / f"{split}-000000.tar").rename(content / f"{split}-000000.tar")
    assert f"The shards of {split} in {tmp_path} are not finished: give the command of pliant data" in refusal(tmp_path)
    content.parent.rename(tmp_path / "elsewhere")
    assert f"The shards of {split} in {tmp_path} lack {split}-000000.tar" in refusal(tmp_path)
    (tmp_path / "elsewhere" / "content" / first.name).rename(tmp_path / f"{split}-000000.tar")
    (tmp_path / f"{split}-000001.tar").rename(tmp_path / "elsewhere" / "1")
    assert f"The shards of {split} in {tmp_path} lack {split}-000001.tar" in refusal(tmp_path)
    (tmp_path / f"{split}-000002.tar").unlink()
    assert len(open_dataset(data, 0).split(split)) < whole[split]  # how many there were, the names do not tell


def test_a_hundred_thousand_classes_are_told_apart_in_no_time(tmp_path):
    """A list as long as a million classes would be looked through for minutes if each were sought one by one."""
    names = [f"class{number:06d}" for number in range(100_000)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    began = time.process_time()
    assert read_class_list(tmp_path / "list.txt") == tuple(names)
    listing = SimpleNamespace(classes=tuple(reversed(names)), numbered=False, folder=tmp_path)
    assert _class_names(listing, names, None)[1] == listing.classes  # type: ignore[arg-type]
    assert time.process_time() - began < 5.0


def test_folders_that_are_numbers_stay_names(image_folder, tmp_path):
    folders = {"cat": "8", "dog": "9", "newt": "10"}
    members = [
        (f"{folders[file.parent.name]}/{file.name}", file.read_bytes()) for file in files(image_folder / "train")
    ]
    pack(tmp_path / "train-0.tar", members)
    assert scan_shards(tmp_path, "train-*.tar", None).classes == ("10", "8", "9")


def test_a_shard_written_anew_added_or_removed_is_noticed(image_folder, tmp_path):
    members = as_folders(image_folder / "train")
    first, second = tmp_path / "train-0.tar", tmp_path / "train-1.tar"
    pack(first, members)
    assert len(scan_shards(tmp_path, "train-*.tar", None)) == 24
    pack(second, members[:10])
    assert len(scan_shards(tmp_path, "train-*.tar", None)) == 34
    pack(second, members[:11])
    assert len(scan_shards(tmp_path, "train-*.tar", None)) == 35
    second.unlink()
    assert len(scan_shards(tmp_path, "train-*.tar", None)) == 24


def test_headers_alone_serve_shards_too(image_folder, tmp_path):
    members = as_folders(image_folder / "train")
    members[3] = (members[3][0], members[3][1][:-100])
    pack(tmp_path / "train-0.tar", members)
    quick, strict = (scan_shards(tmp_path, "train-*.tar", None, strict=strict) for strict in (False, True))
    assert quick.broken.tolist() == []
    assert strict.broken.tolist() == [3]
    np.testing.assert_array_equal(np.delete(quick.sizes, 3, 0), np.delete(strict.sizes, 3, 0))


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (("/etc/cat/0.png", b""), "'/etc/cat/0.png', whose name leads out of it"),
        (("cat/../../0.png", b""), "'cat/../../0.png', whose name leads out of it"),
        (("./../0.png", b""), "whose name leads out of it"),
        (special("cat/z.png", tarfile.SYMTYPE, "/etc/passwd"), "'cat/z.png', which is a link"),
        (special("cat/z.png", tarfile.LNKTYPE, "cat/0.png"), "'cat/z.png', which is a link"),
        (special("cat/z.png", tarfile.FIFOTYPE), "'cat/z.png', which is no plain file"),
        (("0.png", b""), r"'0.png' in the shard .* has no class: pack it in a folder CLASS, or 0\.cls"),
        (("x/7.cls", b"cat"), r"'cat/0.png' in the shard .* has no class: pack cat/0\.cls"),
        (("cat/0.cls", b""), r"'cat/0.png' in the shard .* has no class"),
    ],
)
def test_members_that_a_shard_must_not_hold(member, words, image_folder, tmp_path):
    shard = pack(tmp_path / "train-0.tar", [*as_folders(image_folder / "train"), member])
    text = refusal(tmp_path)
    assert str(shard) in text
    with pytest.raises(UserError, match=words):
        raise UserError(text)


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 3000, 10240])
def test_damaged_shards_are_named(kept, image_folder, tmp_path):
    shard = pack(tmp_path / "train-0.tar", as_folders(image_folder / "train"))
    content = shard.read_bytes()
    shard.write_bytes(content[:kept])
    assert f"The shard {shard} cannot be read as a plain tar" in refusal(tmp_path)


def test_a_shard_with_a_damaged_header_loses_no_images_silently(image_folder, tmp_path):
    shard = pack(tmp_path / "train-0.tar", as_folders(image_folder / "train"))
    index = scan_shards(tmp_path, "train-*.tar", None)
    content = bytearray(shard.read_bytes())
    header = int(index.table.listing.offset[12]) - 512
    content[header : header + 40] = b"\xff" * 40
    shard.write_bytes(content)
    assert f"byte {header} begins neither a member nor its end" in refusal(tmp_path)


def test_other_refusals(image_folder, tmp_path):
    assert "--data.root /path/to/shards" in refusal(None)
    assert "holds no shards" in refusal(tmp_path)
    with tarfile.open(tmp_path / "train-0.tar", "w:gz") as shard:
        shard.add(image_folder / "train" / "cat", "cat")
    assert "uncompressed" in refusal(tmp_path)
    pack(tmp_path / "train-0.tar", [("cat/notes.txt", b"")])
    assert "hold no image" in refusal(tmp_path)
    pack(tmp_path / "train-0.tar", [one for one in as_folders(image_folder / "train") if one[0].startswith("cat")])
    assert "one class only, cat" in refusal(tmp_path)
    pack(tmp_path / "train-0.tar", as_samples(image_folder / "train", NUMBERS | {"cat": "9999999"}))
    assert "class 9999999" in refusal(tmp_path)
    pack(tmp_path / "train-0.tar", as_folders(image_folder / "train"))
    pack(tmp_path / "val-0.tar", [("eft/0.png", b"")])
    assert "The class eft of the shards" in refusal(tmp_path)
    with pytest.raises(UserError, match=r"write --data\.source shards"):
        open_dataset(Data(root=tmp_path), 0)
