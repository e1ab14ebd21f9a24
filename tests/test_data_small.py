"""CIFAR-100, SVHN and small images in class folders: what their files hold is what a run is fed, and what is damaged
is named."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pliant import cli
from pliant.data import Feed, open_dataset
from pliant.data.index import Pixels
from pliant.data.sources import cifar10, cifar100, svhn
from pliant.errors import UserError
from pliant.experiment import Batching, Data
from tests.runs import REPOSITORY, only_run

IMAGES = {"train": 12, "test": 6, "extra": 5}


def drawn(split: str, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, 32, 32, 3) and their labels, both ends of the range among them."""
    generator = np.random.default_rng([classes, *split.encode()])
    labels = generator.integers(0, classes, IMAGES[split], np.uint8)
    labels[:2] = 0, classes - 1
    return generator.integers(0, 256, (IMAGES[split], 32, 32, 3), dtype=np.uint8), labels


def planes(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As CIFAR stores them: all red, then all green, then all blue values; (N, 3072)."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_cifar100(root: Path, layout: str, names: list[str] | None = None) -> Path:
    folder = root / ("cifar-100-binary" if layout == "bin" else "cifar-100-python")
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        images, labels = drawn(split, 100)
        coarse = labels // 5
        if layout == "bin":
            records = np.concatenate([coarse[:, None], labels[:, None], planes(images)], axis=1)
            (folder / f"{split}.bin").write_bytes(records.tobytes())
        else:
            entries = dict(data=planes(images), fine_labels=labels.tolist(), coarse_labels=coarse.tolist())
            (folder / split).write_bytes(pickle.dumps(entries, protocol=4))
    if names is not None and layout == "bin":
        (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    elif names is not None:
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    return folder


def write_svhn(root: Path, splits: tuple[str, ...] = ("train", "test")) -> Path:
    scipy_io = pytest.importorskip("scipy.io", reason="SVHN's files are written and read with scipy")
    root.mkdir(parents=True, exist_ok=True)
    for split in splits:
        images, labels = drawn(split, 10)
        entries = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
        scipy_io.savemat(root / f"{split}_32x32.mat", entries, do_compression=True)
    return root


def write_folders(root: Path, names: tuple[str, ...], test: str = "test") -> Path:
    for split in ("train", "test"):
        images, labels = drawn(split, len(names))
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / (split if split == "train" else test) / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:04d}.png")
    return root


def assert_holds(pixels: object, split: str, classes: int) -> None:
    assert isinstance(pixels, Pixels)
    images, labels = drawn(split, classes)
    np.testing.assert_array_equal(pixels.images, images)
    np.testing.assert_array_equal(pixels.labels, labels)


def assert_holds_by_class(pixels: object, split: str, classes: int) -> None:
    """The same images, class by class as folders list them."""
    assert isinstance(pixels, Pixels)
    images, labels = drawn(split, classes)
    expected = sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))
    found = sorted((int(k), image.tobytes()) for image, k in zip(pixels.images, pixels.labels, strict=True))
    assert found == expected


def refusal(**settings) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(Data(**settings), seed=0)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_cifar100_has_the_hundred_names_in_the_order_of_its_labels():
    assert len(set(cifar100.CLASSES)) == 100
    assert list(cifar100.CLASSES) == sorted(cifar100.CLASSES)
    assert (cifar100.CLASSES[8], cifar100.CLASSES[58], cifar100.CLASSES[99]) == ("bicycle", "pickup_truck", "worm")


@pytest.mark.parametrize("layout", ["bin", "pickle"])
@pytest.mark.parametrize("above", [True, False])
def test_cifar100_is_read_with_its_fine_classes(tmp_path, layout, above):
    folder = write_cifar100(tmp_path, layout)
    dataset = open_dataset(Data(source="cifar100", root=tmp_path if above else folder), seed=0)
    assert_holds(dataset.train, "train", 100)
    assert_holds(dataset.val, "test", 100)
    assert dataset.num_classes == 100
    assert dataset.classes == cifar100.CLASSES


@pytest.mark.parametrize("layout", ["bin", "pickle"])
def test_names_beside_the_images_come_first(tmp_path, layout):
    names = [f"kind_{number}" for number in range(100)]
    folder = write_cifar100(tmp_path, layout, names)
    assert open_dataset(Data(source="cifar100", root=tmp_path), seed=0).classes == tuple(names)
    file = folder / ("fine_label_names.txt" if layout == "bin" else "meta")
    file.write_bytes(pickle.dumps({"fine_label_names": names[:99]}) if layout == "pickle" else b"kind_0\n")
    assert "does not name 100 classes" in refusal(source="cifar100", root=tmp_path)


def test_cifar100_that_is_damaged_is_named(tmp_path):
    assert "/path/to/cifar100" in refusal(source="cifar100")
    assert "CIFAR-100 is not in" in refusal(source="cifar100", root=tmp_path)
    folder = write_cifar100(tmp_path, "bin")
    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[:-1])
    assert "no whole number of images" in refusal(source="cifar100", root=tmp_path)
    (folder / "train.bin").write_bytes(content[:1] + b"\x64" + content[2:])
    assert "label 100" in refusal(source="cifar100", root=tmp_path)
    (folder / "train.bin").write_bytes(b"\xff" + content[1:])  # a coarse class is not looked at
    assert_holds(open_dataset(Data(source="cifar100", root=tmp_path), seed=0).train, "train", 100)


def test_cifar10_in_place_of_cifar100_is_refused(tmp_path):
    folder = write_cifar100(tmp_path, "pickle")
    images, labels = drawn("train", 10)
    (folder / "train").write_bytes(pickle.dumps({"data": planes(images), "labels": labels.tolist()}))
    assert "no entry 'fine_labels'" in refusal(source="cifar100", root=tmp_path)


def test_svhn_is_read_with_digits_as_labels(tmp_path):
    dataset = open_dataset(Data(source="svhn", root=write_svhn(tmp_path)), seed=0)
    assert_holds(dataset.train, "train", 10)
    assert_holds(dataset.val, "test", 10)
    assert dataset.classes == tuple("0123456789")


def test_extra_images_come_after_the_others_where_they_are_asked_for(tmp_path):
    root = write_svhn(tmp_path)
    assert "extra_32x32.mat is missing" in refusal(source="svhn", root=root, extra=True)
    write_svhn(tmp_path, ("extra",))
    train = open_dataset(Data(source="svhn", root=root, extra=True), seed=0).train
    assert_holds(train.subset(np.arange(12)), "train", 10)
    assert_holds(train.subset(np.arange(12, 17)), "extra", 10)
    assert len(open_dataset(Data(source="svhn", root=root), seed=0).train) == 12
    with pytest.raises(UserError, match=r"leave --data\.extra out"):
        Data(source="cifar10", extra=True)


def test_svhn_that_is_damaged_is_named(tmp_path):
    assert "/path/to/svhn" in refusal(source="svhn")
    assert "train_32x32.mat is missing" in refusal(source="svhn", root=tmp_path)
    scipy_io = pytest.importorskip("scipy.io")
    images, labels = drawn("train", 10)
    file = write_svhn(tmp_path) / "train_32x32.mat"
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:300], whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert str(file) in refusal(source="svhn", root=tmp_path)
    scipy_io.savemat(file, {"X": images.transpose(1, 2, 3, 0)})
    assert "no entry 'y'" in refusal(source="svhn", root=tmp_path)
    scipy_io.savemat(file, {"X": images, "y": labels})
    assert "no array of images" in refusal(source="svhn", root=tmp_path)
    scipy_io.savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": labels})
    assert "not 1 to 10" in refusal(source="svhn", root=tmp_path)


@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize(
    ("source", "names"), [("cifar10", cifar10.CLASSES), ("cifar100", cifar100.CLASSES), ("svhn", svhn.CLASSES)]
)
def test_class_folders_serve_every_small_dataset(tmp_path, source, names, test):
    dataset = open_dataset(Data(source=source, root=write_folders(tmp_path, names, test)), seed=0)
    assert_holds_by_class(dataset.train, "train", len(names))
    assert_holds_by_class(dataset.val, "test", len(names))
    assert dataset.classes == names


def test_numbered_class_folders_are_ordered_as_numbers(tmp_path):
    names = tuple(str(number) for number in range(12))
    write_folders(tmp_path, names)
    for name in names:
        (tmp_path / "train" / name).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "train" / name / "x.png")
    assert open_dataset(Data(source="cifar100", root=tmp_path), seed=0).classes == names


def test_class_folders_that_do_not_fit_are_named(tmp_path):
    write_folders(tmp_path, cifar10.CLASSES)
    file = tmp_path / "train" / "airplane" / "0000.png"
    for content, said in ((b"", "no readable image"), (b"text", "its format is unknown")):
        kept = file.read_bytes()
        file.write_bytes(content)
        assert said in refusal(source="cifar10", root=tmp_path)
        file.write_bytes(kept)
    Image.new("RGB", (28, 32)).save(file)
    assert f"{file} has 28 x 32 pixels" in refusal(source="cifar10", root=tmp_path)
    file.unlink()
    (tmp_path / "test" / "zebra").mkdir()
    assert "none of the 10 training classes" in refusal(source="cifar10", root=tmp_path)
    assert "leave --data.extra out" in refusal(source="svhn", root=tmp_path, extra=True)


def test_a_class_folder_that_is_not_ours_to_read_is_named(tmp_path, monkeypatch):
    write_folders(tmp_path, cifar10.CLASSES)
    listed = Path.iterdir

    def guarded(folder: Path):
        if folder == tmp_path / "test" / "cat":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", guarded)
    said = refusal(source="cifar10", root=tmp_path)
    assert f"The class folder {tmp_path}/test/cat cannot be read (Permission denied): mend its permissions" in said


def test_digits_are_never_mirrored_and_colours_are_normalised_by_the_source(tmp_path):
    roots = {
        "svhn": write_folders(tmp_path / "s", svhn.CLASSES),
        "cifar10": write_folders(tmp_path / "c", cifar10.CLASSES),
    }
    mirrored = {}
    for source, root in roots.items():
        data = Data(source=source, root=root)
        batching = Batching(images=12, micro=12)
        feed = Feed(open_dataset(data, 0), data, batching, seed=0, device="cpu")
        mirrored[source] = feed._training_request(0, 0, 0, batching).plan.flip.any()
    assert mirrored == {"svhn": False, "cifar10": True}
    with feed.evaluation("val", batch=6) as batches:
        (batch,) = batches
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    images = feed.dataset.split("val").images / 255
    np.testing.assert_allclose(batch.images.permute(0, 2, 3, 1), (images - mean) / std, atol=1e-5)


def test_statistics_are_those_of_the_source(tmp_path):
    expected = {
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    }
    for source, (mean, std) in expected.items():
        root = write_folders(tmp_path / source, cifar100.CLASSES if source == "cifar100" else svhn.CLASSES)
        for path in (root / "test").rglob("*.png"):
            Image.new("RGB", (32, 32), (128, 128, 128)).save(path)
        data = Data(source=source, root=root)
        feed = Feed(open_dataset(data, 0), data, Batching(images=12, micro=12), seed=0, device="cpu")
        with feed.evaluation("val", batch=6) as batches:
            pixel = next(iter(batches)).images[0, :, 0, 0]
        np.testing.assert_allclose(pixel, (128 / 255 - np.array(mean)) / np.array(std), atol=1e-5)


@pytest.mark.parametrize("source", ["cifar100", "svhn"])
def test_a_recipe_for_cifar10_trains_on_the_other_small_datasets(tmp_path, source):
    root = write_cifar100(tmp_path / "data", "bin").parent if source == "cifar100" else write_svhn(tmp_path / "data")
    small = ["--recipe.network.depth", "8", "--data.held-out", "4", "--batch.images", "4", "--batch.micro", "4"]
    small += ["--optimization.steps", "4", "--threads", "1", "--log-steps", "1", "--optimization.warmup-epochs", "0"]
    small += ["--recipe.sp-share", "0.5", "--calibration.images", "8", "--calibration.batch", "8"]
    where = ["--data.source", source, "--data.root", str(root), "--runs", str(tmp_path / "runs")]
    cli.main(["train", str(REPOSITORY / "recipes" / "skipnet_cifar10.py"), *where, *small])
    log = (only_run(tmp_path / "runs") / "log.jsonl").read_text()
    steps = [line for line in map(json.loads, log.splitlines()) if line["event"] == "step"]
    assert len(steps) == 4
    first = next(iter(steps[0]["losses"].values()))
    # A fresh network's cross-entropy lies near that of a guess, and so tells how many classes it has.
    assert abs(first - np.log(100 if source == "cifar100" else 10)) < 1.5


def test_a_new_run_is_refused_a_setting_that_would_have_no_effect(tmp_path, capsys):
    root = write_cifar100(tmp_path / "data", "bin").parent
    where = ["--data.source", "cifar100", "--data.root", str(root), "--runs", str(tmp_path / "runs")]
    small = ["--batch.images", "4", "--batch.micro", "4", "--data.held-out", "0", "--data.jitter", "0.4"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(REPOSITORY / "recipes" / "skipnet_cifar10.py"), *where, *small])
    assert caught.value.code == 2
    assert "error: --data.source cifar100 has no use for --data.jitter, as its images" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
