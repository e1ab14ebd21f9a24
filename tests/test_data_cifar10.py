"""CIFAR-10 is read alike from both layouts, and a pickle cannot run anything."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from pliant.data import open_dataset
from pliant.errors import UserError
from pliant.experiment import Data

FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
IMAGES = 6


def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([*name.encode()])
    return generator.integers(0, 256, (IMAGES, 3072), dtype=np.uint8), generator.integers(0, 10, IMAGES, np.uint8)


def python2_pickle(values: np.ndarray, labels: np.ndarray) -> bytes:
    """As the published files were written: by Python 2's cPickle, with text and array contents as plain
    strings."""

    def string(raw: bytes) -> bytes:
        return b"T" + len(raw).to_bytes(4, "little") + raw

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + number(0) + b"\x85" + string(b"b") + b"tR"
    array += b"(" + number(1) + number(values.shape[0]) + number(values.shape[1]) + b"\x86" + dtype + b"\x89"
    array += string(values.tobytes()) + b"tb"
    entries = string(b"data") + array + string(b"labels") + b"](" + b"".join(map(number, labels.tolist())) + b"e"
    return b"\x80\x02}(" + entries + b"u."


def write(root: Path, layout: str) -> Path:
    folder = root / f"cifar-10-batches-{'bin' if layout == 'bin' else 'py'}"
    folder.mkdir(parents=True)
    for name in FILES:
        values, labels = batch(name)
        if layout == "bin":
            (folder / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], values], axis=1).tobytes())
        elif layout == "python2":
            (folder / name).write_bytes(python2_pickle(values, labels))
        else:
            (folder / name).write_bytes(pickle.dumps({"data": values, "labels": labels.tolist()}, protocol=4))
    return folder


def refusal(root: Path | None) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(Data(source="cifar10", root=root), seed=0)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("layout", ["bin", "python3", "python2"])
@pytest.mark.parametrize("above", [True, False])
def test_both_layouts_hold_the_same_images(tmp_path, layout, above):
    folder = write(tmp_path, layout)
    dataset = open_dataset(Data(source="cifar10", root=tmp_path if above else folder), seed=0)
    values = np.concatenate([batch(name)[0] for name in FILES[:5]])
    np.testing.assert_array_equal(dataset.train.images.transpose(0, 3, 1, 2).reshape(-1, 3072), values)
    np.testing.assert_array_equal(dataset.train.labels, np.concatenate([batch(name)[1] for name in FILES[:5]]))
    assert dataset.val is not None
    np.testing.assert_array_equal(dataset.val.labels, batch("test_batch")[1])
    assert dataset.num_classes == 10
    assert dataset.classes[6] == "frog"


def test_images_are_held_out(tmp_path):
    write(tmp_path, "bin")
    dataset = open_dataset(Data(source="cifar10", root=tmp_path, held_out=10), seed=0)
    assert len(dataset.train) == 20
    assert dataset.held_out is not None
    assert len(dataset.held_out) == 10


def test_what_is_missing_or_damaged_is_named(tmp_path):
    assert "--data.root" in refusal(None)
    assert str(tmp_path) in refusal(tmp_path)
    folder = write(tmp_path, "bin")
    (folder / "test_batch.bin").write_bytes(b"\0" * 3072)
    assert str(folder / "test_batch.bin") in refusal(tmp_path)
    (folder / "test_batch.bin").write_bytes(b"\x0a" * 3073)
    assert "label 10" in refusal(tmp_path)
    (folder / "data_batch_4.bin").unlink()
    assert str(folder / "data_batch_4.bin") in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps([1]), pickle.dumps({"data": [1], "labels": [1]})])
def test_damaged_pickles_are_named(tmp_path, content):
    folder = write(tmp_path, "python3")
    (folder / "data_batch_3").write_bytes(content)
    assert str(folder / "data_batch_3") in refusal(tmp_path)


class Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_cannot_run_anything(tmp_path):
    folder = write(tmp_path, "python3")
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": Hostile(tmp_path / "ran"), "labels": []}))
    assert "which CIFAR does not need" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()
