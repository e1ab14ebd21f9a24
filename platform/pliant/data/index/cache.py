"""Tables are kept between runs, below ~/.cache/pliant or where XDG_CACHE_HOME says, and built by one process alone.

What is noticed at a start, without a look at every file: an image, a class or a folder that was added, removed or
renamed, a shard that was written anew, and a broken file that was mended. What is not: a file whose content was
changed in its place, as its folder keeps its time. That is found when it is read, by its length and crc32.

A process that is killed while it builds leaves no lock, as the system drops it, and no table, as that gets its name
last; what it had written is written over by the next.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from pliant.data.decoding import reason
from pliant.data.index.table import Stamp, Table, open_table, write_table
from pliant.errors import printable

_log = logging.getLogger(__name__)

VERSION = 2  # of the table's columns, and of what counts as broken: a file of another one is not looked at
_TICK_NS = 50_000_000  # more than a file system's clock may lag behind
_PATIENCE_S = 5.0  # a wait that is over sooner is not spoken of
_TRIED = 1 << 20  # bytes written to find out whether a table can be: one has 40 for each image, and the names
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, NotImplementedError)
"""What a cache may raise: it is absent, damaged, not ours to write, or cannot be locked."""


def kept_or_built(
    folder: Path, what: str, *, sources: Sequence[str], strict: bool, build: Callable[[], Table]
) -> Table:
    """The table of a folder: kept from before if nothing has changed since, else built and kept.

    Of several processes one builds; the others wait for it. A cache that cannot be written costs only time, and is
    spoken of: each process then builds for itself, and at once, as there is nothing to wait for.

    Args:
        folder: what is indexed.
        what: tells apart what may be indexed in one folder.
        sources: class folders or shards that are there now.
        strict: whether the table must be; a strict one serves otherwise too.
    """
    try:
        path = table_file(folder, what)
    except RuntimeError:
        _complain(folder, "~/.cache", "there is no home")
        return build()
    table = _kept(path, folder, sources, strict)
    if table is not None:
        return table
    obstacle = _obstacle(path.parent)
    if obstacle is not None:
        _complain(folder, path.parent, obstacle)
        return build()
    lock = _locked(path, folder)
    try:
        return _kept(path, folder, sources, strict) or _keep(build(), path, folder, alone=lock is not None)
    finally:
        if lock is not None:
            lock.release()


def _keep(table: Table, path: Path, folder: Path, *, alone: bool) -> Table:
    """The table, kept if that is possible.

    Args:
        alone: no other process writes it now; what a killed one left under the common name is written over.
    """
    try:
        write_table(table, path, contended=not alone)
        return open_table(path, folder)  # mapped: its pages are shared with other ranks
    except _UNUSABLE as error:
        _complain(folder, path.parent, reason(error))
        return table


def _obstacle(cache: Path) -> str | None:
    """Why nothing can be kept in a folder, found out before the minutes that a scan may take."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=cache) as file:
            file.write(bytes(_TRIED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return reason(error)
    return None


def _complain(folder: Path, cache: Path | str, why: str) -> None:
    _log.warning(
        "Warning: the index of %s cannot be kept in %s (%s), so every start builds it anew: mend that, or set "
        "XDG_CACHE_HOME to a folder that can be written.",
        printable(str(folder)),
        cache,
        why,
    )


def table_file(folder: Path, what: str) -> Path:
    """Where the table of a folder is kept.

    Machines that share a home may each have another copy at the same path: the folder's inode tells them apart.

    Raises:
        OSError: the folder is not there.
        RuntimeError: the user has no home, nor XDG_CACHE_HOME.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    named = b"\0".join((os.fsencode(folder.resolve()), str(folder.stat().st_ino).encode(), what.encode()))
    key = hashlib.blake2b(named, digest_size=12).hexdigest()
    return Path(root) / "pliant" / f"index{VERSION}-{key}.safetensors"


def stamp(folder: Path, name: str) -> Stamp:
    """The state of a file or folder below `folder`, to be asked before it is read.

    Waits, for one tick of a file system's clock at most, until a change from now on would show in another time.

    Raises:
        OSError: it is not there.
    """
    found = _stamp(folder, name)
    age = time.time_ns() - found[1]
    if 0 <= age < _TICK_NS:
        time.sleep((_TICK_NS - age) / 1e9)
    return found


def _stamp(folder: Path, name: str) -> Stamp:
    found = os.stat(folder / name)
    if S_ISDIR(found.st_mode):
        return name, found.st_mtime_ns, 0
    return name, max(found.st_mtime_ns, found.st_ctime_ns), found.st_size  # permissions change the latter alone


def _kept(path: Path, folder: Path, sources: Sequence[str], strict: bool) -> Table | None:
    with suppress(*_UNUSABLE):
        table = open_table(path, folder)
        fits = (table.strict or not strict) and table.listing.sources == tuple(sources)
        if fits and all(_stamp(folder, one[0]) == one for one in table.listing.stamps):
            return table
    return None


def _locked(path: Path, folder: Path) -> FileLock | None:
    """Held until released, or until this process ends; None where the cache cannot be locked."""
    with suppress(*_UNUSABLE):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the system's locks all build at once: a soft lock would outlive a machine that is gone.
        lock = FileLock(path.with_suffix(".lock"), fallback_to_soft=False)
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            _log.info("Waiting for another process that indexes %s", folder)
            lock.acquire()
        return lock
    return None
