"""ImageNet's archives become folders or shards that hold every image byte for byte, whatever stops the work."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant import cli
from pliant.data import open_dataset
from pliant.errors import UserError
from pliant.experiment import Data
from pliant.preparation import imagenet, staging, truth, writers
from pliant.preparation.imagenet import Target, prepare_train
from pliant.preparation.listing import Listing
from pliant.preparation.span import Span
from pliant.preparation.writers import Sharding
from tests import archives
from tests.archives import WNIDS, files, refusal

CLASSES = "".join(f"{wnid}\n" for wnid in WNIDS)


@pytest.fixture
def originals(tmp_path: Path) -> SimpleNamespace:
    folder = tmp_path / "archives"
    folder.mkdir()
    return SimpleNamespace(
        folder=folder,
        train=archives.train_archive(folder / "ILSVRC2012_img_train.tar"),
        val=archives.val_archive(folder / "ILSVRC2012_img_val.tar"),
        labels=archives.val_labels(folder / "val.txt"),
    )


def data(*arguments: object) -> None:
    cli.main(["data", *map(str, arguments)])


def imagenet_arguments(originals: SimpleNamespace, to: Path, *more: object) -> list[object]:
    where = ["--train", originals.train, "--val", originals.val, "--val-labels", originals.labels]
    return ["imagenet", *where, "--to", to, *more]


def without_record(root: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(root).items() if name != "classes.txt" and name[:9] != "prepared-"}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as shard:
        return {member.name: shard.extractfile(member).read() for member in shard}


def in_shards(root: Path, split: str) -> tuple[list[bytes], list[bytes]]:
    """Images and, in the same order, their .cls members, as a reader of WebDataset pairs them."""
    images, classes = [], []
    for path in sorted(root.glob(f"{split}-*.tar")):
        found = list(members(path).items())
        for (image, content), (label, number) in zip(found[::2], found[1::2], strict=True):
            assert label == f"{image.partition('.')[0]}.cls"
            images.append(content)
            classes.append(number)
    return images, classes


def expected_classes(contents: dict[str, bytes]) -> Counter[tuple[bytes, bytes]]:
    """Each image with its class number."""
    return Counter((content, str(WNIDS.index(name.split("/")[0])).encode()) for name, content in contents.items())


def test_what_cannot_be_finished_is_refused_before_anything_is_written(originals, tmp_path, capsys):
    root, train = tmp_path / "root", ["imagenet", "--train", originals.train, "--to", tmp_path / "root"]
    labels = ["--val-labels", originals.labels]
    assert "cannot be read" in refusal(capsys, *train, "--val", tmp_path / "absent.tar", *labels)
    assert "cannot be read" in refusal(capsys, *train, "--val", originals.val, "--devkit", tmp_path / "absent.tar.gz")
    assert "are of the validation images" in refusal(capsys, *train, *labels)
    assert "no use for --shard-images" in refusal(capsys, *train, "--shard-images", 7)
    assert not root.exists()


def test_shards_that_are_gone_are_missed(originals, tmp_path, capsys):
    """The last ones too, whose absence leaves no gap."""
    root = tmp_path / "root"
    arguments = imagenet_arguments(originals, root, "--form", "shards", "--shard-images", 5)
    data(*arguments)
    (root / "train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"prepared-train.json says 12: bring all of them back"):
        open_dataset(Data(source="shards", root=root, check="header"), 0)
    assert "train-000002.tar is gone" in refusal(capsys, *arguments)


def test_archives_become_class_folders(originals, tmp_path, capsys):
    data(*imagenet_arguments(originals, tmp_path / "root"))
    expected = {f"train/{name}": content for name, content in archives.train_images().items()}
    expected |= {f"val/{name}": content for name, content in archives.val_images().items()}
    assert without_record(tmp_path / "root") == expected
    assert (tmp_path / "root" / "classes.txt").read_text() == CLASSES
    said = capsys.readouterr()
    assert "train is complete, 12 images of 3 classes" in said.out
    assert "val is complete, 7 images of 3 classes" in said.out
    assert "Writing train: 12 of 12" in said.err


def test_devkit_and_list_name_the_same_classes(originals):
    kit = archives.devkit(originals.folder / "ILSVRC2012_devkit_t12.tar.gz")
    by_list = truth.from_text(originals.labels)
    assert truth.from_devkit(kit) == by_list
    assert by_list == {name.split("/")[1]: name.split("/")[0] for name in archives.val_images()}
    assert len(set(by_list.values())) == 3


def test_devkit_serves_a_whole_command(originals, tmp_path):
    kit = archives.devkit(originals.folder / "kit.tar.gz")
    data("imagenet", "--train", originals.train, "--val", originals.val, "--devkit", kit, "--to", tmp_path / "root")
    assert files(tmp_path / "root" / "val") == archives.val_images()


@pytest.mark.parametrize("images", [1, 5, 12, 100])
def test_archives_become_shards_that_hold_every_image_once(originals, tmp_path, images):
    root = tmp_path / "root"
    data(*imagenet_arguments(originals, root, "--form", "shards", "--shard-images", images))
    for split, contents in (("train", archives.train_images()), ("val", archives.val_images())):
        found, classes = in_shards(root, split)
        assert Counter(zip(found, classes, strict=True)) == expected_classes(contents)
    sizes = [len(members(path)) // 2 for path in sorted(root.glob("train-*.tar"))]
    assert (root / "train-000000.tar").is_file()
    assert len(sizes) == -(-12 // images) and max(sizes) <= images and max(sizes) - min(sizes) <= 1
    assert (root / "classes.txt").read_text() == CLASSES


def test_shards_depend_on_the_seed_alone(originals, tmp_path):
    def written(name: str, seed: int) -> dict[str, bytes]:
        root = tmp_path / name
        data(*imagenet_arguments(originals, root, "--form", "shards", "--shard-images", 5, "--seed", seed))
        return without_record(root)

    first = written("first", 1)
    os.utime(originals.train, (0, 0))
    assert written("again", 1) == first
    assert written("other", 2) != first


def test_classes_are_mixed_in_shards():
    dealt = writers.dealt(3000, Sharding(images=100, seed=0))
    labels = np.repeat(np.arange(3), 1000)
    shares = [np.bincount(labels[positions], minlength=3) for positions in dealt]
    assert np.min(shares) > 10


@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 2**63 - 1))
def test_every_image_is_dealt_out_once(images, per_shard, seed):
    dealt = writers.dealt(images, Sharding(images=per_shard, seed=seed))
    assert sorted(np.concatenate(dealt).tolist()) == list(range(images))
    assert all(0 < len(positions) <= per_shard for positions in dealt)


@given(st.lists(st.text("ab./_", min_size=1, max_size=5), min_size=1, max_size=8, unique=True))
def test_keys_of_shards_are_unique_and_end_at_no_dot(stems):
    names = np.array([f"a.b/x{stem}.png".encode() for stem in stems])
    listing = Listing(
        ("a.b",), names, np.zeros(len(names), np.int32), np.zeros((len(names), 3), np.int64), (Path("x"),)
    )
    keys = writers.shard_keys(listing)
    assert len(set(keys)) == len(keys)
    assert not any("." in key or "/" in key for key in keys)


def test_a_finished_command_says_so_and_does_nothing(originals, tmp_path, capsys, monkeypatch):
    root = tmp_path / "root"
    data(*imagenet_arguments(originals, root))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    capsys.readouterr()
    monkeypatch.setattr(imagenet, "members", None)  # no archive is listed
    originals.labels.unlink()
    data(*imagenet_arguments(originals, root))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert capsys.readouterr().out.splitlines() == [
        f"{root}: train is complete already, 12 images",
        f"{root}: val is complete already, 7 images",
    ]


def test_splits_may_come_one_by_one(originals, tmp_path):
    root = tmp_path / "root"
    data("imagenet", "--val", originals.val, "--val-labels", originals.labels, "--to", root)
    assert not (root / "train").exists()
    data("imagenet", "--train", originals.train, "--to", root)
    assert files(root / "train") == archives.train_images()
    assert files(root / "val") == archives.val_images()
    assert json.loads((root / "prepared-train.json").read_text())["images"] == 12
    assert json.loads((root / "prepared-val.json").read_text())["images"] == 7


def killed_at_work(arguments: list[object], root: Path, rng: random.Random) -> int:
    """Starts the command and kills it without warning once it has written something, again and again; how often."""
    code = "from pliant.preparation.command import data_command; import sys; data_command(sys.argv[1:])"

    def written() -> set[str]:
        with contextlib.suppress(FileNotFoundError):  # it is renaming
            found = map(str, (root / ".train.partial" / "content").rglob("*"))
            return {path for path in found if not path.endswith((".part", ".partial.tar"))}
        return set()

    for kills in range(3):
        before = written()
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and written() <= before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        if process.poll() is not None:
            assert process.returncode == 0
            return kills
        process.kill()
        process.wait()
        if (root / "prepared-train.json").is_file():  # whole, and then killed
            return kills + 1
        assert not (root / "train").exists() and not list(root.glob("train-*.tar"))
    return 3


@pytest.mark.parametrize("form", ["folders", "shards"])
def test_a_command_that_is_killed_again_and_again_ends_as_one_left_alone(tmp_path, form):
    archive = archives.train_archive(tmp_path / "train.tar", images=600)
    sharding = ["--shard-images", 60] if form == "shards" else []
    arguments = ["imagenet", "--train", archive, "--form", form, *sharding, "--to"]
    data(*arguments, tmp_path / "alone")
    kills = killed_at_work([*arguments, tmp_path / "root"], tmp_path / "root", random.Random(0))
    data(*arguments, tmp_path / "root")
    assert kills >= 2
    assert files(tmp_path / "root") == files(tmp_path / "alone")
    assert not list((tmp_path / "root").glob(".*"))


class Stop(BaseException):
    """In the place of a kill, at one exact moment."""


@pytest.mark.parametrize("form", ["folders", "shards"])
@pytest.mark.parametrize("moment", ["replace", "rename", "sync", "fsync", "read"])
def test_a_stop_at_any_call_of_the_file_system_leaves_work_that_goes_on(tmp_path, form, moment, monkeypatch, originals):
    target = Target(root=tmp_path / "root", form=form, sharding=Sharding(images=4, seed=0))
    prepare_train(originals.train, Target(root=tmp_path / "alone", form=form, sharding=target.sharding))
    expected = files(tmp_path / "alone")
    where = Span if moment == "read" else os
    real, stops = getattr(where, moment), 0
    for call in range(40):
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        calls = iter(range(call))

        def stopping(*given, calls=calls):
            if next(calls, None) is None:
                raise Stop
            return real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(where, moment, stopping)
            try:
                prepare_train(originals.train, target)
                break
            except Stop:
                stops += 1
                # Of shards that are moved one by one the first is the last to come.
                shards = sorted(path.name for path in (tmp_path / "root").glob("*.tar"))
                assert shards == [f"train-{number:06d}.tar" for number in range(3 - len(shards), 3)]
        prepare_train(originals.train, target)
        assert files(tmp_path / "root") == expected
    assert (stops > 0) == (call > 0) and call < 39
    assert stops > 0 or (form, moment) == ("shards", "sync")


def test_ctrl_c_says_how_to_go_on(tmp_path):
    archive = archives.train_archive(tmp_path / "train.tar", images=400)
    code = "import sys; sys.argv[0] = 'pliant'; from pliant import cli; cli.main()"
    command = [sys.executable, "-c", code, "data", "imagenet", "--train", str(archive), "--to", str(tmp_path / "root")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "root").glob(".train.partial/content/*/*.JPEG")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate()
    assert process.returncode == 75, complaints
    assert "Stopped; " in said
    assert re.search("^Go on with: .*pliant data imagenet --train", said, re.MULTILINE)
    assert "Traceback" not in complaints
    assert not (tmp_path / "root" / "train").exists()


def unsafe(kind: str) -> bytes:
    """A class archive of a good image and one member that must not be written."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archives.add(archive, "n01440764_1.JPEG", archives.picture("x"))
        member = tarfile.TarInfo({"absolute": "/tmp/x.JPEG", "upwards": "../../x.JPEG"}.get(kind, "x.JPEG"))
        member.type = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(kind, b"0")
        member.linkname = "/etc/passwd"
        archive.addfile(member)
    return file.getvalue()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("absolute", "has no relative name"),
        ("upwards", "leads out of the folder"),
        ("link", "is a link to /etc/passwd"),
        ("hard", "is a link"),
        ("device", "is no ordinary file"),
    ],
)
def test_unsafe_members_are_refused_before_anything_is_written(tmp_path, capsys, kind, said, nested):
    archive = tmp_path / "train.tar"
    if nested:
        archives.tar(archive, {"n01440764.tar": archives.tar_bytes({"a.JPEG": b"x"}), "n02105855.tar": unsafe(kind)})
    else:
        archive.write_bytes(unsafe(kind))
    assert said in refusal(capsys, "imagenet", "--train", archive, "--to", tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_archives_that_are_damaged_are_refused_before_anything_is_written(originals, tmp_path, capsys):
    whole = originals.train.read_bytes()
    command = ["imagenet", "--train", originals.train, "--to", tmp_path / "root"]
    with tarfile.open(originals.train) as archive:
        second = archive.getmembers()[1]
        inner = archive.getmembers()[0]
    damages = {
        "empty": b"",
        "cut in a class": whole[: second.offset_data + 700],
        "cut between classes": whole[: second.offset],
        "no header": whole[: second.offset] + b"x" * 512 + whole[second.offset + 512 :],
        "no header within a class": whole[: inner.offset_data] + b"x" * 512 + whole[inner.offset_data + 512 :],
        "text": b"text" * 1000,
    }
    for damage, content in damages.items():
        originals.train.write_bytes(content)
        assert "is no whole uncompressed tar archive" in refusal(capsys, *command), damage
    originals.train.write_bytes(whole)
    archives.tar(originals.train, {"x.JPEG": b"x"})
    assert "holds no archives of classes" in refusal(capsys, *command)
    archives.tar(originals.train, {"n01440764.tar": archives.tar_bytes({"readme": b""})})
    assert "holds no images" in refusal(capsys, *command)
    originals.train.unlink()
    assert "cannot be read" in refusal(capsys, *command)
    assert not (tmp_path / "root").exists()


def test_an_image_named_twice_is_refused(tmp_path, capsys):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as inner:
        for content in (b"one", b"two"):
            archives.add(inner, "a.JPEG", content)
    archive = archives.tar(tmp_path / "train.tar", {"n01440764.tar": file.getvalue()})
    assert "two images named n01440764/a.JPEG" in refusal(
        capsys, "imagenet", "--train", archive, "--to", tmp_path / "r"
    )


def test_labels_that_do_not_fit_are_refused(originals, tmp_path, capsys):
    command = imagenet_arguments(originals, tmp_path / "root")
    data("imagenet", "--train", originals.train, "--to", tmp_path / "root")
    lines = originals.labels.read_text().splitlines()
    for text, said in (
        ("", "is empty"),
        ("ILSVRC2012_val_00000001.JPEG\n", "Line 1"),
        ("\n".join([*lines, lines[0]]), "Line 8"),
        ("a.JPEG ../x\n", "Line 1"),
        ("\n".join(lines[1:]), "whose class is not known"),
        ("\n".join([*lines, "ILSVRC2012_val_00000008.JPEG n01440764"]), "7 images and 8 have a class"),
        ("\n".join([*lines[1:], f"{lines[0].split()[0]} n00000001"]), "which no training image has"),
    ):
        originals.labels.write_text(text)
        assert said in refusal(capsys, *command)
    assert "--val-labels" in refusal(capsys, "imagenet", "--val", originals.val, "--to", tmp_path / "root")
    assert "Nothing is to be prepared" in refusal(capsys, "imagenet", "--to", tmp_path / "root")
    kit = originals.folder / "kit.tar.gz"
    pytest.importorskip("scipy.io")
    where = ["--val", originals.val, "--devkit", kit, "--to", tmp_path / "root"]
    assert "cannot be read" in refusal(capsys, "imagenet", *where)
    archives.tar(kit, {"kit/data/meta.mat": b"x"}, "w:gz")
    assert "holds no data/ILSVRC2012_validation_ground_truth.txt" in refusal(capsys, "imagenet", *where)
    archives.tar(kit, {"k/data/meta.mat": b"x", "k/data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}, "w:gz")
    assert "The development kit" in refusal(capsys, "imagenet", *where)
    assert not (tmp_path / "root" / "val").exists()


def test_a_devkit_whose_classes_lead_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "WNIDS", ("..", "n02105855", "n15075141"))
    monkeypatch.setattr(archives, "IDS", dict(zip(archives.WNIDS, (449, 2, 100), strict=True)))
    kit = archives.devkit(tmp_path / "kit.tar.gz")
    with pytest.raises(UserError, match=r"names a class '\.\.'"):
        truth.from_devkit(kit)


def test_too_little_room_is_said_before_anything_is_written(originals, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * 4096 - 1))
    command = ["imagenet", "--train", originals.train, "--to", tmp_path / "root"]
    assert "GB are needed" in refusal(capsys, *command)
    assert not (tmp_path / "root").exists()
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * 4096))
    data(*command)


def test_a_disk_that_fills_up_is_said_in_a_sentence_and_the_work_goes_on(originals, tmp_path, capsys, monkeypatch):
    command = ["imagenet", "--train", originals.train, "--to", tmp_path / "root"]
    calls = iter(range(5))
    real = os.replace

    def full(source, target):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "No space left on device: mend that, and the same command goes on" in refusal(capsys, *command)
    data(*command)
    assert files(tmp_path / "root" / "train") == archives.train_images()


def test_what_stands_in_the_place_is_not_written_over(originals, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "x.png").write_text("mine")
    before = files(root)
    assert "is there already" in refusal(capsys, *imagenet_arguments(originals, root))
    assert "is there already" in refusal(capsys, *imagenet_arguments(originals, root, "--form", "shards"))
    assert files(root) == before
    shutil.rmtree(root)
    data(*imagenet_arguments(originals, root, "--form", "shards", "--seed", 1))
    before = files(root)
    assert "is there already" in refusal(capsys, *imagenet_arguments(originals, root, "--form", "shards", "--seed", 2))
    assert files(root) == before


def test_unfinished_work_is_not_mixed_with_other_settings(originals, tmp_path, monkeypatch):
    one = Target(root=tmp_path / "root", form="shards", sharding=Sharding(images=4, seed=0))
    stopped_before_the_end(originals, one, monkeypatch)
    other = Target(root=tmp_path / "root", form="shards", sharding=Sharding(images=4, seed=1))
    with pytest.raises(UserError, match="unfinished work with other settings"):
        prepare_train(originals.train, other)
    assert "complete, 12 images" in prepare_train(originals.train, one)


def stopped_before_the_end(originals: SimpleNamespace, target: Target, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of unfinished work in which everything has been written."""
    with monkeypatch.context() as patch:
        patch.setattr(writers, "verify", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            prepare_train(originals.train, target)
    return target.root / ".train.partial" / "content"


@pytest.mark.parametrize("torn", ["image", "listing"])
def test_a_file_that_a_power_failure_cut_short_is_written_again(originals, tmp_path, monkeypatch, torn):
    target = Target(root=tmp_path / "root", form="folders", sharding=Sharding(images=4, seed=0))
    content = stopped_before_the_end(originals, target, monkeypatch)
    image, listing = next(iter(content.rglob("*.JPEG"))), content.parent / "listing.npz"
    (image if torn == "image" else listing).write_bytes(b"")
    prepare_train(originals.train, target)
    assert files(target.root / "train") == archives.train_images()


def test_work_begun_anew_is_not_taken_for_the_finished_work_before_it(originals, tmp_path, monkeypatch):
    target = Target(root=tmp_path / "root", form="folders", sharding=Sharding(images=4, seed=0))
    prepare_train(originals.train, target)
    shutil.rmtree(target.root / "train")
    content = stopped_before_the_end(originals, target, monkeypatch)
    shutil.rmtree(content / WNIDS[0])
    assert prepare_train(originals.train, target).endswith("complete, 12 images of 3 classes")
    assert files(target.root / "train") == archives.train_images()


def test_other_classes_than_those_that_are_there_are_refused(originals, tmp_path):
    target = Target(root=tmp_path / "root", form="folders", sharding=Sharding(images=4, seed=0))
    target.root.mkdir()
    (target.root / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="names other classes than ILSVRC2012_img_train"):
        prepare_train(originals.train, target)


def test_a_thousand_classes_with_other_numbers_of_images_draw_a_warning(originals, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(imagenet, "_CLASSES", 3)
    data(*imagenet_arguments(originals, tmp_path / "root"))
    said = capsys.readouterr().err
    assert "warning: ILSVRC2012 has 1,281,167 images in train, and ILSVRC2012_img_train.tar has 12." in said
    assert "warning: ILSVRC2012 has 50,000 images in val" in said


def test_two_processes_do_not_write_the_same(originals, tmp_path):
    target = Target(root=tmp_path / "root", form="folders", sharding=Sharding(images=4, seed=0))
    with staging.staging(target.root, "train", {}), pytest.raises(UserError, match="Another process prepares train"):
        prepare_train(originals.train, target)


@pytest.mark.parametrize("form", ["folders", "shards"])
def test_what_was_lost_while_the_work_stood_still_is_found_at_the_end(originals, tmp_path, monkeypatch, form):
    target = Target(root=tmp_path / "root", form=form, sharding=Sharding(images=4, seed=0))
    real = writers.write_folders if form == "folders" else writers.write_shards

    def lossy(listing, content, *rest):
        real(listing, content, *rest)
        lost = sorted(path for path in content.rglob("*") if path.is_file())[0]
        if form == "folders":
            lost.write_bytes(lost.read_bytes()[:-1])
        else:
            lost.unlink()

    monkeypatch.setattr(writers, real.__name__, lossy)
    with pytest.raises(UserError, match="images of"):
        prepare_train(originals.train, target)
    assert not writers.place(target.root, "train", form).exists()


def test_an_image_folder_becomes_shards(image_folder, tmp_path, capsys):
    twin = image_folder / "train" / "cat" / "0.jpg"  # the same key as 0.png would give
    twin.write_bytes(archives.picture("twin"))
    root = tmp_path / "shards"
    data("shards", "--root", image_folder, "--to", root, "--shard-images", 7)
    for split in ("train", "val"):
        images, classes = in_shards(root, split)
        there = files(image_folder / split)
        numbers = {"cat": b"0", "dog": b"1", "newt": b"2"}
        assert Counter(zip(images, classes, strict=True)) == Counter(
            (c, numbers[n.split("/")[0]]) for n, c in there.items()
        )
    assert (root / "classes.txt").read_text() == "cat\ndog\nnewt\n"
    suffixes = {name.partition(".")[2] for path in root.glob("*.tar") for name in members(path)}
    assert suffixes == {"png", "jpg", "cls"}
    data("shards", "--root", image_folder, "--to", root, "--shard-images", 7)
    assert "val is complete already, 9 images" in capsys.readouterr().out
    assert "no folder train" in refusal(capsys, "shards", "--root", tmp_path, "--to", root)


def test_shards_of_generated_images_are_marked_like_their_folder(image_folder, tmp_path):
    command = ["shards", "--root", image_folder, "--to", tmp_path / "shards"]

    def generated() -> bool:
        return open_dataset(Data(source="shards", root=tmp_path / "shards"), seed=0).generated

    data(*command)
    assert not generated()
    (image_folder / "sample.json").write_text('{"seed": 0}\n')
    data(*command)  # made before there was a mark
    assert generated()
    shutil.rmtree(tmp_path / "shards")
    data(*command)
    assert generated()
    assert (tmp_path / "shards" / "sample.json").read_bytes() == (image_folder / "sample.json").read_bytes()


def test_what_was_generated_marks_nothing_where_it_is_refused(image_folder, tmp_path, capsys):
    (image_folder / "sample.json").write_text("{}")
    root = tmp_path / "mine"
    (root / "train").mkdir(parents=True)
    assert "is there already" in refusal(capsys, "shards", "--root", image_folder, "--to", root)
    assert not (root / "sample.json").exists()


def test_images_are_read_ahead_but_written_in_order_and_few_wait_in_memory(image_folder, tmp_path, monkeypatch):
    def shards(name: str) -> dict[str, bytes]:
        target = Target(root=tmp_path / name, form="shards", sharding=Sharding(images=24, seed=0))
        imagenet.prepare_folder(image_folder / "train", "train", target)
        return {path.name: path.read_bytes() for path in target.root.glob("*.tar")}

    monkeypatch.setattr(writers, "_AHEAD", 1)
    expected = shards("one by one")
    monkeypatch.undo()
    monkeypatch.setattr(writers, "_AHEAD", 6)
    real, add, rng = Span.read, writers._add, random.Random(0)
    reading: set[int] = set()
    read = written = most_at_once = most_waiting = 0
    lock = threading.Lock()

    def slow(span: Span) -> bytes:
        nonlocal read, most_at_once, most_waiting
        with lock:
            read += 1
            reading.add(threading.get_ident())
            most_at_once, most_waiting = max(most_at_once, len(reading)), max(most_waiting, read - written)
            pause = rng.uniform(0.0, 0.03)
        time.sleep(pause)
        with lock:
            reading.remove(threading.get_ident())
        return real(span)

    def counted(shard: tarfile.TarFile, name: str, content: bytes) -> None:
        nonlocal written
        add(shard, name, content)
        with lock:
            written += not name.endswith(".cls")

    monkeypatch.setattr(Span, "read", slow)
    monkeypatch.setattr(writers, "_add", counted)
    assert shards("ahead") == expected
    assert read == written == 24
    assert 1 < most_at_once <= most_waiting <= 6


def test_a_validation_class_without_training_images_is_refused(image_folder, tmp_path, capsys):
    (image_folder / "val" / "newt").rename(image_folder / "val" / "zebra")
    said = refusal(capsys, "shards", "--root", image_folder, "--to", tmp_path / "shards")
    assert f"{image_folder / 'val' / 'zebra'} is not among the training classes" in said
    assert not (tmp_path / "shards").exists(), "before the training images are written"


def test_a_link_that_leads_nowhere_is_refused_before_anything_is_written(image_folder, tmp_path, capsys):
    (image_folder / "train" / "cat" / "9.png").symlink_to(image_folder / "absent.png")
    said = refusal(capsys, "shards", "--root", image_folder, "--to", tmp_path / "shards")
    assert "cat/9.png leads nowhere" in said
    assert not list((tmp_path / "shards").glob("**/*.tar"))


def test_images_may_have_names_that_are_not_utf_8_and_classes_may_not(image_folder, tmp_path, capsys):
    folder = image_folder / "train" / "dog"
    (folder / "0.png").rename(folder / os.fsdecode(b"\xe9.png"))
    command = ["shards", "--root", image_folder, "--to", tmp_path / "shards"]
    data(*command)
    assert Counter(in_shards(tmp_path / "shards", "train")[0]) == Counter(files(image_folder / "train").values())
    for split in ("train", "val"):
        dog = image_folder / split / "dog"
        dog.rename(dog.with_name(os.fsdecode(b"d\xf6g")))
    said = refusal(capsys, *command[:3], "--to", tmp_path / "other")
    assert "The name b'd\\xf6g' of a class" in said
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("change", ["grows", "goes"])
def test_a_file_that_changed_since_it_was_listed_is_named_and_the_same_command_begins_again(
    image_folder, tmp_path, monkeypatch, change
):
    target = Target(root=tmp_path / "root", form="shards", sharding=Sharding(images=2, seed=0))
    file = image_folder / "train" / "dog" / "3.png"
    real = writers.write_shards

    def late(*given):
        if change == "grows":
            file.write_bytes(file.read_bytes() + b"x")
        else:
            file.unlink()
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(writers, "write_shards", late)
        with pytest.raises(UserError, match=f"{file} (has another length|is gone).*: begin again"):
            imagenet.prepare_folder(image_folder / "train", "train", target)
    assert list((tmp_path / "root" / ".train.partial" / "content").glob("train-*.tar"))
    # What shards of the old listing hold would not be noticed: as many images of as many bytes.
    for path in (image_folder / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[::-1])
    imagenet.prepare_folder(image_folder / "train", "train", target)
    assert Counter(in_shards(tmp_path / "root", "train")[0]) == Counter(files(image_folder / "train").values())


def test_a_folder_that_is_gone_for_a_while_does_not_cost_what_is_written(image_folder, tmp_path):
    target = Target(root=tmp_path / "root", form="shards", sharding=Sharding(images=2, seed=0))
    away = image_folder.with_name("away")
    reads = iter(range(9))
    real = Span.read

    def read(span):
        if next(reads, None) is None and image_folder.exists():
            image_folder.rename(away)
        return real(span)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Span, "read", read)
        with pytest.raises(UserError, match=r"cannot be read .*: mend that and go on"):
            imagenet.prepare_folder(image_folder / "train", "train", target)
    away.rename(image_folder)
    written = sorted((tmp_path / "root" / ".train.partial" / "content").glob("train-*.tar"))
    before = [path.stat().st_mtime_ns for path in written]
    imagenet.prepare_folder(image_folder / "train", "train", target)
    assert before
    assert [(target.root / path.name).stat().st_mtime_ns for path in written] == before


@pytest.mark.parametrize("form", ["folders", "shards"])
def test_another_archive_of_the_same_size_is_not_mixed_with_the_first(originals, tmp_path, monkeypatch, form):
    target = Target(root=tmp_path / "root", form=form, sharding=Sharding(images=4, seed=0))
    stopped_before_the_end(originals, target, monkeypatch)
    content = originals.train.read_bytes()
    for image in archives.train_images().values():
        content = content.replace(image, image[::-1])
    originals.train.write_bytes(content)
    prepare_train(originals.train, target)
    prepare_train(originals.train, replace(target, root=tmp_path / "alone"))
    assert without_record(target.root) == without_record(tmp_path / "alone")
