"""Tar archives of others: their members, listed without unpacking, and refused where a name could do harm."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import IO

from pliant.errors import UserError

DAMAGES = (EOFError, tarfile.TarError, zlib.error)
"""What a damaged archive, compressed or not, raises besides an OSError without a number."""
_BLOCK = 512  # bytes, tar's unit; an archive ends with a block of zeros


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files in an uncompressed archive, in its order; their `offset_data` is where each one's bytes begin.

    Raises:
        UserError: the archive cannot be read, ends early, or holds a link, a device or a name that leads out of the
            folder it is unpacked in.
    """
    return _listed(path, None)


def nested_members(path: Path, outer: tarfile.TarInfo) -> Iterator[tarfile.TarInfo]:
    """The regular files in an archive that lies in another as `outer`; `offset_data` counts from the outer's start.

    Raises:
        UserError: as `members`.
    """
    return _listed(path, outer)


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


def _listed(path: Path, outer: tarfile.TarInfo | None) -> Iterator[tarfile.TarInfo]:
    title = str(path) if outer is None else f"{path}, member {outer.name},"
    try:
        with ExitStack() as opened:
            file: IO[bytes] | None = opened.enter_context(open(path, "rb"))
            first = 0
            if outer is not None:
                around = opened.enter_context(tarfile.open(fileobj=file, mode="r:"))
                file, first = around.extractfile(outer), outer.offset_data
            assert file is not None  # a regular file
            archive = opened.enter_context(tarfile.open(fileobj=file, mode="r:"))
            while (member := archive.next()) is not None:
                check_member(member, title)
                # The archive remembers each member it has met: a million of them, and none is asked for again.
                archive.members.clear()  # type: ignore[attr-defined]
                if member.isreg():
                    member.offset_data += first
                    yield member
            file.seek(archive.offset)
            # tarfile takes a damaged header, and an end without its block of zeros, for the end of the archive.
            ended = file.read(_BLOCK) == bytes(_BLOCK)
    except OSError as error:
        raise UserError(f"The archive {path} cannot be read ({reason(error)}): write another one.") from None
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(title, reason(error)) from None
    if not ended:
        raise _damaged(title, "it ends early")


def _damaged(title: str, why: str) -> UserError:
    return UserError(
        f"{title} is no whole uncompressed tar archive ({why}): fetch it again, or unpack its compression first."
    )
