"""CIFAR and SVHN from the files their authors publish: checked, unpacked, and read once to see that they are whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from pliant.data.sources import cifar10, cifar100, svhn
from pliant.data.sources.cifar import Form, find_folder
from pliant.errors import UserError
from pliant.preparation.progress import note, progress
from pliant.preparation.staging import begin, check_space, discard, staging
from pliant.preparation.tars import DAMAGES, check_member, reason

FORMS: dict[str, tuple[Form, Callable[[Path], object]]] = {
    "cifar10": (cifar10.FORM, cifar10.open_cifar10),
    "cifar100": (cifar100.FORM, cifar100.open_cifar100),
}
MD5 = {
    # As published with the files, at cs.toronto.edu/~kriz/cifar.html.
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    # SVHN's authors publish none: those that torchvision compares with.
    svhn.TRAIN: "e26dedcc434d2e4c54c9b2d4a06d8373",
    svhn.TEST: "eb5a983be6a315427106f1b164d9cef3",
    svhn.EXTRA: "a93ce644f1a588dc4d68dda5feec44a7",
}
_PIECE = 1 << 20  # bytes read at once


def prepare_cifar(name: str, given: Path, root: Path) -> str:
    """Unpack CIFAR-10 or CIFAR-100. Returns what there is to say of it.

    Args:
        name: cifar10 or cifar100.
        given: the archive, or a folder that holds one under its original name.
        root: where the dataset's folder is to lie.

    Raises:
        UserError: there is no archive, it is damaged or unsafe, holds another dataset, or there is no room.
    """
    form, opened = FORMS[name]
    if (there := find_folder(form, root)) is not None:
        opened(root)
        return f"{there}: complete already"
    archive = _archive(form, given)
    _check_md5(archive, [MD5[file] for file in _archives(form)])
    with staging(root, name, {}) as folder:  # whichever archive was begun with: a few seconds' work, begun anew
        shutil.rmtree(folder / "content", ignore_errors=True)
        unpacked = _unpack(archive, folder, form)
        opened(unpacked)
        os.sync()
        place = root / (form.binary if (unpacked / f"{form.train[0]}.bin").is_file() else form.pickled)
        os.rename(unpacked, place)
        discard(root, name)
    return f"{place}: complete"


def prepare_svhn(given: Path, root: Path) -> str:
    """Copy SVHN's files, the extra images where they are there. Returns what there is to say of it.

    Args:
        given: the folder that holds them.
        root: where they are to lie.

    Raises:
        UserError: one is not there or damaged, another stands in its place, or there is no room.
    """
    files = [name for name in (svhn.TRAIN, svhn.TEST, svhn.EXTRA) if (given / name).is_file()]
    missing = [name for name in (svhn.TRAIN, svhn.TEST) if name not in files]
    if missing:
        raise UserError(f"{given} holds no {missing[0]}: write the folder that holds SVHN's files as --from.")
    written = [name for name in files if not _is_there(given / name, root / name)]
    if not written:
        return f"{root}: complete already, {', '.join(files)}"
    for name in written:
        if not _check_md5(given / name, [MD5[name]]):
            svhn.read_mat(given / name)
    with staging(root, "svhn", {}) as folder:
        check_space(folder / "content", sum((given / name).stat().st_size for name in written))
        content = begin(folder, {})
        for name in written:
            shutil.copyfile(given / name, content / name)
        os.sync()
        for name in written:
            os.rename(content / name, root / name)
        discard(root, "svhn")
    return f"{root}: complete, {', '.join(files)}"


def md5(path: Path) -> str:
    """The file's MD5, in hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(path, "rb") as file, progress(f"Reading {path.name}", path.stat().st_size) as advance:
            while piece := file.read(_PIECE):
                digest.update(piece)
                advance(len(piece))
    except OSError as error:
        raise UserError(f"The file {path} cannot be read ({error.strerror}): write another one.") from None
    return digest.hexdigest()


def _check_md5(path: Path, known: list[str]) -> bool:
    """Whether the file is one of those published; if not, a warning: a mirror's may hold the same images."""
    found = md5(path)
    if found not in known:
        note(f"warning: {path} is not the published file (MD5 {found}, not {' or '.join(known)}); its contents decide.")
    return found in known


def _archives(form: Form) -> tuple[str, str]:
    stem = form.title.lower()
    return f"{stem}-python.tar.gz", f"{stem}-binary.tar.gz"


def _archive(form: Form, given: Path) -> Path:
    for path in (given, *(given / name for name in _archives(form))):
        if path.is_file():
            return path
    raise UserError(f"There is no {' or '.join(_archives(form))} in {given}: write where it lies as --from.")


def _unpack(archive: Path, folder: Path, form: Form) -> Path:
    """The folder with the dataset's files, below folder/content.

    Raises:
        UserError: the archive is damaged or unsafe, holds another dataset, or there is no room.
        OSError: it cannot be read, or nothing can be written: a disk that is full, a folder of others.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError("This Python cannot unpack archives safely: use 3.11.4 or newer, or unpack it with tar.")
    try:
        with tarfile.open(archive, "r:*") as opened:
            found = opened.getmembers()
            for member in found:
                check_member(member, str(archive))
            check_space(folder / "content", sum(member.size for member in found))
            content = begin(folder, {})
            opened.extractall(content, filter="data")
    except (OSError, *DAMAGES) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, and no fault of the archive
            raise
        raise UserError(f"The archive {archive} cannot be unpacked ({reason(error)}): fetch it again.") from None
    unpacked = find_folder(form, content)
    if unpacked is None:
        raise UserError(f"{archive} does not hold {form.pickled} or {form.binary}: write another archive as --from.")
    return unpacked


def _is_there(source: Path, target: Path) -> bool:
    if not target.exists():
        return False
    if target.stat().st_size != source.stat().st_size or md5(target) != md5(source):
        raise UserError(f"{target} is there already and differs from {source}: move it away, or write another --to.")
    return True
