"""Tar archives of others: their members, listed without unpacking, and refused where a name could do harm."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from pliant.errors import UserError

_BLOCK = 512  # bytes, tar's unit; an archive ends with a block of zeros


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files in an uncompressed archive, in its order; their `offset_data` is where each one's bytes begin.

    Raises:
        UserError: the archive cannot be read, ends early, or holds a link, a device or a name that leads out of the
            folder it is unpacked in.
    """
    try:
        with open(path, "rb") as file:
            yield from _listed(file, path, str(path))
    except OSError as error:
        raise UserError(f"The archive {path} cannot be read ({reason(error)}): write another one.") from None


def nested_members(path: Path, outer: tarfile.TarInfo) -> Iterator[tarfile.TarInfo]:
    """The regular files in an archive that lies in another as `outer`; `offset_data` counts from the outer's start.

    Raises:
        UserError: as `members`.
    """
    with tarfile.open(path, "r:") as archive:
        inner = archive.extractfile(outer)
        assert inner is not None  # a regular file
        for member in _listed(inner, path, f"{path}, member {outer.name}"):
            member.offset_data += outer.offset_data
            yield member


def check_member(member: tarfile.TarInfo, archive: str) -> None:
    """Refuse what must not be unpacked.

    Raises:
        UserError: the member is a link or a device, its name is absolute or leads upwards, or it is sparse.
    """
    name = PurePosixPath(member.name)
    if member.issym() or member.islnk():
        fault = f"is a link to {member.linkname}"
    elif not (member.isreg() or member.isdir()) or member.issparse():
        fault = "is no ordinary file"
    elif name.is_absolute():
        fault = "has no relative name"
    elif ".." in name.parts:
        fault = "leads out of the folder it is unpacked in"
    else:
        return
    raise UserError(f"The archive {archive} holds {member.name!r}, which {fault}: write an archive from the publisher.")


def reason(error: Exception) -> str:
    """Why an archive could not be read, on one line."""
    if isinstance(error, tarfile.ReadError) and "could not be opened" in str(error):
        return "it is no tar archive"  # tarfile lists what each of its readers found
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _listed(file: IO[bytes], path: Path, title: str) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                check_member(member, title)
                # The archive remembers each member it has met: a million of them, and all are here already.
                archive.members.clear()  # type: ignore[attr-defined]
                if member.isreg():
                    yield member
            end = archive.offset
        file.seek(end)
        # tarfile takes a damaged header, and an end without its block of zeros, for the end of the archive.
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("it ends early")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{title} is no whole uncompressed tar archive ({reason(error)}): fetch it again, or unpack its compression first."
        ) from None
