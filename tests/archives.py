"""Archives in the layouts of the originals, with a few tiny images each."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pliant import cli

WNIDS = ("n01440764", "n02105855", "n15075141")
IDS = {"n01440764": 449, "n02105855": 2, "n15075141": 100}
"""The devkit's own numbers, in another order than the wnids."""


def picture(name: str, form: str = "JPEG") -> bytes:
    """An encoded image that depends on the name alone."""
    generator = np.random.default_rng([*name.encode()])
    height, width = generator.integers(8, 40, 2)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def tar(path: Path, contents: Mapping[str, bytes], mode: str = "w") -> Path:
    """A tar archive of these members, in this order."""
    with tarfile.open(path, mode) as archive:
        for name, content in contents.items():
            add(archive, name, content)
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tar_bytes(contents: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in contents.items():
            add(archive, name, content)
    return file.getvalue()


def train_images(images: int = 4) -> dict[str, bytes]:
    """WNID/FILE of each training image."""
    names = [f"{wnid}/{wnid}_{10 * number + 3}.JPEG" for wnid in WNIDS for number in range(images)]
    found = {name: picture(name) for name in names}
    odd = f"{WNIDS[1]}/{WNIDS[1]}_3.JPEG"
    return found | {odd: picture(odd, "PNG")}  # as one of ImageNet's is


def train_archive(path: Path, images: int = 4) -> Path:
    """ILSVRC2012_img_train.tar: an archive for each class, not in the order of their names."""
    everything = train_images(images)
    inner = {}
    for wnid in reversed(WNIDS):
        own = {name.partition("/")[2]: content for name, content in everything.items() if name.startswith(wnid)}
        inner[f"{wnid}.tar"] = tar_bytes(own)
    return tar(path, inner)


def val_images(images: int = 7) -> dict[str, bytes]:
    """WNID/FILE of each validation image."""
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, images + 1)]
    return {f"{WNIDS[(2 * k + k // 3) % 3]}/{name}": picture(name) for k, name in enumerate(names)}


def val_archive(path: Path, images: int = 7) -> Path:
    """ILSVRC2012_img_val.tar: images without classes, not in the order of their names."""
    flat = {name.partition("/")[2]: content for name, content in val_images(images).items()}
    return tar(path, dict(reversed(flat.items())))


def val_labels(path: Path, images: int = 7) -> Path:
    """The list that may take the devkit's place."""
    pairs = sorted(name.split("/")[::-1] for name in val_images(images))
    path.write_text("".join(f"{name} {wnid}\n" for name, wnid in pairs))
    return path


def devkit(path: Path, images: int = 7) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz, with meta.mat in the original's structure: leaves, then groups of classes."""
    scipy_io = pytest.importorskip("scipy.io", reason="the development kit's meta.mat is written and read with scipy")
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    fields.append("num_train_images")
    synsets = np.zeros((len(WNIDS) + 1, 1), [(field, object) for field in fields])
    rows = [(IDS[wnid], wnid, "a, b", "gloss", 0, [], 0, 4) for wnid in sorted(WNIDS, key=IDS.__getitem__)]
    rows.append((1001, "n00001740", "entity", "a group", 3, [2, 100, 449], 3, 0))
    for place, row in enumerate(rows):
        for field, value in zip(fields, row, strict=True):
            synsets[place, 0][field] = value if isinstance(value, str) else np.array([value], float)
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets})
    by_number = sorted((name.partition("/")[2], name.partition("/")[0]) for name in val_images(images))
    truth = "".join(f"{IDS[wnid]}\n" for _, wnid in by_number)
    folder = "ILSVRC2012_devkit_t12"
    contents = {
        f"{folder}/readme.txt": b"",
        f"{folder}/data/meta.mat": meta.getvalue(),
        f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    return tar(path, contents, "w:gz")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence that `pliant data` ends with, with exit status 2; only lines of progress stand before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", *map(str, arguments)])
    *before, said = capsys.readouterr().err.strip().split("\n")
    assert caught.value.code == 2
    assert all(" of " in line or line.startswith("warning: ") for line in before)
    assert said.startswith("error: ")
    assert said.endswith(".")
    return said.removeprefix("error: ")


def files(root: Path) -> dict[str, bytes]:
    """What lies below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
