"""CIFAR's archives and SVHN's files are unpacked safely, checked, and read once before they count."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pliant import cli
from pliant.data import open_dataset
from pliant.experiment import Data
from pliant.preparation import small
from tests.archives import files, refusal, tar
from tests.runs import tiny_cifar
from tests.test_data_small import write_cifar100, write_svhn


def packed(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


@pytest.fixture
def cifar_archive(tmp_path: Path) -> Path:
    (tmp_path / "from").mkdir()
    folder = tiny_cifar(tmp_path / "made", images=10) / "cifar-10-batches-bin"
    return packed(folder, tmp_path / "from" / "cifar-10-binary.tar.gz")


def data(*arguments: object) -> None:
    cli.main(["data", *map(str, arguments)])


@pytest.mark.parametrize("named", ["archive", "folder"])
def test_cifar10_is_unpacked_as_it_was_packed(cifar_archive, tmp_path, capsys, named):
    data("cifar10", "--from", cifar_archive if named == "archive" else cifar_archive.parent, "--to", tmp_path / "root")
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'root' / 'cifar-10-batches-bin'}: complete\n"
    assert "is not the published file (MD5 " in said.err
    assert files(tmp_path / "root") == files(tmp_path / "made")
    assert len(open_dataset(Data(source="cifar10", root=tmp_path / "root"), 0).train) == 50
    data("cifar10", "--from", cifar_archive, "--to", tmp_path / "root")
    assert capsys.readouterr().out.endswith("complete already\n")


@pytest.mark.parametrize("layout", ["bin", "pickle"])
def test_cifar100_is_unpacked_whatever_the_archive_is_called(tmp_path, capsys, layout):
    folder = write_cifar100(tmp_path / "made", layout)
    data("cifar100", "--from", packed(folder, tmp_path / "mirror.tgz"), "--to", tmp_path / "root")
    assert files(tmp_path / "root") == files(tmp_path / "made")


def test_a_published_archive_draws_no_warning(cifar_archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(small.MD5, cifar_archive.name, small.md5(cifar_archive))
    data("cifar10", "--from", cifar_archive, "--to", tmp_path / "root")
    assert "warning" not in capsys.readouterr().err


def test_md5_is_the_usual_one(tmp_path):
    (tmp_path / "x").write_bytes(b"message digest")
    assert small.md5(tmp_path / "x") == "f96b697d7cb7938d525a2f31aaf161d0"  # RFC 1321, section A.5


def test_archives_that_are_damaged_hold_something_else_or_could_do_harm(cifar_archive, tmp_path, capsys):
    command = ["cifar10", "--from", cifar_archive, "--to", tmp_path / "root"]
    whole = cifar_archive.read_bytes()
    tar(cifar_archive, {"x": np.random.default_rng(0).bytes(9999).hex().encode()}, "w:gz")  # compressed, unlike noise
    text = cifar_archive.read_bytes()
    spoilt = text[:5000] + b"x" * 5000
    for content in (b"", b"text", whole[: len(whole) // 2], spoilt):
        cifar_archive.write_bytes(content)
        assert "cannot be unpacked" in refusal(capsys, *command)
    tar(cifar_archive, {"x/readme": b""}, "w:gz")
    assert "does not hold cifar-10-batches-py or cifar-10-batches-bin" in refusal(capsys, *command)
    tar(cifar_archive, {"cifar-10-batches-bin/data_batch_1.bin": b"x" * 3073, "../x": b""}, "w:gz")
    assert "leads out of the folder" in refusal(capsys, *command)
    with tarfile.open(cifar_archive, "w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    assert "is a link to /etc" in refusal(capsys, *command)
    tar(cifar_archive, {"cifar-10-batches-bin/data_batch_1.bin": bytes(3072)}, "w:gz")
    assert "no whole number of images" in refusal(capsys, *command)
    cifar_archive.unlink()
    assert "There is no cifar-10-python.tar.gz or cifar-10-binary.tar.gz" in refusal(capsys, *command)
    assert not list((tmp_path / "root").glob("cifar*"))
    assert not (tmp_path / "x").exists()


def test_a_damaged_archive_does_not_stand_in_the_way_of_the_next(cifar_archive, tmp_path, capsys):
    damaged = cifar_archive.with_name("damaged.tgz")
    tar(damaged, {"cifar-10-batches-bin/data_batch_1.bin": bytes(3072)}, "w:gz")
    assert "no whole number of images" in refusal(capsys, "cifar10", "--from", damaged, "--to", tmp_path / "root")
    data("cifar10", "--from", cifar_archive, "--to", tmp_path / "root")
    assert files(tmp_path / "root") == files(tmp_path / "made")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_takes_no_more_is_no_fault_of_the_archive(cifar_archive, tmp_path, capsys, monkeypatch, number):
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    command = ["cifar10", "--from", cifar_archive, "--to", tmp_path / "root"]
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", full)
        assert refusal(capsys, *command) == f"{os.strerror(number)}: mend that, and the same command goes on."
    data(*command)
    assert files(tmp_path / "root") == files(tmp_path / "made")


def test_a_full_disk_is_no_fault_of_the_archive(cifar_archive, tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from pliant import cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"  # bytes of a file: the system says no more
        "cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "data", "cifar10", "--from", str(cifar_archive), "--to", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: File too large: mend that, and the same command goes on."


def test_an_unpacking_that_was_stopped_begins_again(cifar_archive, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    def stopping(*_: object) -> None:
        raise Stop

    for moment in ("rename", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, moment, stopping)
            with pytest.raises(Stop):
                small.prepare_cifar("cifar10", cifar_archive, tmp_path / "root")
        assert not list((tmp_path / "root").glob("cifar*"))
    small.prepare_cifar("cifar10", cifar_archive, tmp_path / "root")
    assert files(tmp_path / "root") == files(tmp_path / "made")


def test_svhn_is_copied_and_checked(tmp_path, capsys):
    made = write_svhn(tmp_path / "made")
    data("svhn", "--from", made, "--to", tmp_path / "root")
    assert files(tmp_path / "root") == files(made)
    assert "warning" in capsys.readouterr().err
    data("svhn", "--from", made, "--to", tmp_path / "root")
    assert "complete already" in capsys.readouterr().out
    write_svhn(made, ("extra",))
    data("svhn", "--from", made, "--to", tmp_path / "root")
    assert files(tmp_path / "root") == files(made)
    (made / "test_32x32.mat").write_bytes(b"other")
    assert "is there already and differs" in refusal(capsys, "svhn", "--from", made, "--to", tmp_path / "root")
    assert "SVHN file" in refusal(capsys, "svhn", "--from", made, "--to", tmp_path / "new")
    (made / "test_32x32.mat").unlink()
    assert "holds no test_32x32.mat" in refusal(capsys, "svhn", "--from", made, "--to", tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.mat"))


def test_split_lists_what_a_run_with_that_seed_holds_out(image_folder, tmp_path, capsys):
    where = ["split", "--root", image_folder, "--held-out", 7]
    data(*where, "--seed", 3)
    held_out = capsys.readouterr().out.splitlines()
    dataset = open_dataset(Data(root=image_folder, held_out=7), seed=3)
    assert [str(image_folder / line) for line in held_out] == [dataset.held_out.path(k) for k in range(7)]
    data(*where, "--seed", 3, "--rest", "--to", tmp_path / "rest.txt")
    rest = (tmp_path / "rest.txt").read_text().splitlines()
    assert [str(image_folder / line) for line in rest] == [dataset.train.path(k) for k in range(17)]
    data(*where, "--seed", 4)
    assert capsys.readouterr().out.splitlines() != held_out
    assert "--held-out 1 or more" in refusal(capsys, "split", "--root", image_folder, "--held-out", 0)
    assert "none would be left" in refusal(capsys, "split", "--root", image_folder, "--held-out", 24)


def test_split_writes_names_that_are_not_utf_8_as_they_are(image_folder, tmp_path, capfdbinary):
    folder = image_folder / "train" / "dog"
    for path in list(folder.iterdir()):
        path.rename(folder / os.fsdecode(b"\xe9" + os.fsencode(path.name)))
    data("split", "--root", image_folder, "--held-out", 7)
    said = capfdbinary.readouterr().out
    names = [os.fsdecode(line) for line in said.splitlines()]
    assert any(line.startswith(b"train/dog/\xe9") for line in said.splitlines())
    assert all((image_folder / name).is_file() for name in names) and len(names) == 7
    data("split", "--root", image_folder, "--held-out", 7, "--to", tmp_path / "list.txt")
    assert (tmp_path / "list.txt").read_bytes() == said


def test_split_follows_the_class_list_as_a_run_does(image_folder, tmp_path, capsys):
    names = tmp_path / "classes.txt"
    names.write_text("newt\ndog\ncat\n")
    data("split", "--root", image_folder, "--held-out", 7, "--class-list", names)
    dataset = open_dataset(Data(root=image_folder, held_out=7, class_list=names), seed=0)
    found = [str(image_folder / line) for line in capsys.readouterr().out.splitlines()]
    assert found == [dataset.held_out.path(k) for k in range(7)]


def test_split_of_images_in_memory_is_by_position(tmp_path, capsys):
    root = tiny_cifar(tmp_path / "root")
    data("split", "--source", "cifar10", "--root", root, "--held-out", 20)
    positions = [int(line) for line in capsys.readouterr().out.splitlines()]
    everything = open_dataset(Data(source="cifar10", root=root), seed=0).train
    held_out = open_dataset(Data(source="cifar10", root=root, held_out=20), seed=0).held_out
    np.testing.assert_array_equal(everything.images[positions], held_out.images)


def test_split_counts_extra_images_as_a_run_does(tmp_path, capsys):
    root = write_svhn(tmp_path / "root", ("train", "test", "extra"))
    data("split", "--source", "svhn", "--root", root, "--held-out", 4, "--extra")
    positions = [int(line) for line in capsys.readouterr().out.splitlines()]
    everything = open_dataset(Data(source="svhn", root=root, extra=True), seed=0).train
    held_out = open_dataset(Data(source="svhn", root=root, extra=True, held_out=4), seed=0).held_out
    np.testing.assert_array_equal(everything.images[positions], held_out.images)
    data("split", "--source", "svhn", "--root", root, "--held-out", 4, "--extra", "--rest")
    rest = [int(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(positions + rest) == list(range(len(everything)))
    data("split", "--source", "svhn", "--root", root, "--held-out", 4)
    assert [int(line) for line in capsys.readouterr().out.splitlines()] != positions


def test_split_refuses_broken_images_where_a_run_does(image_folder, capsys):
    where = ["split", "--root", image_folder, "--held-out", 7]

    def listed(*more: object) -> list[str]:
        data(*where, *more)
        return capsys.readouterr().out.splitlines()

    def damage(names: list[str]) -> None:
        for name in names:
            (image_folder / name).unlink()  # its folder tells the index to look again
            (image_folder / name).write_bytes(b"no image")

    held_out, rest = listed(), listed("--rest")
    by_class = [[name for name in rest if f"/{label}/" in name] for label in ("cat", "dog", "newt")]
    # 13 images are broken, but of neither split more than 10.
    damage([*held_out[:4], *(name for names in by_class for name in names[:3])])
    assert listed() == held_out
    damage([names[3] for names in by_class])
    assert "write a larger --data.broken-share" in refusal(capsys, *where)
    assert listed("--broken-share", 0.9) == held_out
    assert listed("--broken-share", 0.9, "--check", "header") == held_out


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_names_every_command(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        data(*arguments)
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for command in ("imagenet", "shards", "cifar10", "cifar100", "svhn", "split", "verify"):
        assert f"\n  {command} " in said
        with pytest.raises(SystemExit) as caught:
            data(command, "--help")
        assert caught.value.code == 0


def test_unknown_command_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit) as caught:
        data("mnist")
    assert caught.value.code == 2
    assert "imagenet" in capsys.readouterr().err
