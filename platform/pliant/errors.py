"""What a run says when it cannot go on, and the status it leaves with.

UserError          2   a mistake that the user can mend: shown as one sentence, without a traceback
Interrupted       75   stopped by a signal after a checkpoint: the same command with --resume RUN goes on
RanksLost         76   another rank does not answer: killed, or hanging; the newest checkpoint stands
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later", which no shell or scheduler uses itself
EXIT_RANKS_LOST = 76


class UserError(Exception):
    """A mistake in what was asked for. Its text says what is wrong, where, and what to write instead."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop and did
    """The command stopped on a signal. Its text says what stands."""

    def __init__(self, said: str, *, run: Path | None = None, command: Sequence[str] = ()) -> None:
        """What goes on with it.

        Args:
            run: the folder of a training, for --resume.
            command: in the place of the process's own, if another one does.
        """
        super().__init__(said)
        self.run, self.command = run, tuple(command)


class RanksLost(Exception):  # noqa: N818 - it is what happened
    """Another rank does not answer any more."""


def printable(text: str) -> str:
    """The text as any terminal can show it: bytes of a file's name that are no UTF-8 as \\xff, not as surrogates."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def optional_import(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import a package that only some users need.

    Args:
        module: dotted name to import.
        extra: the extra of this project that installs it, for instance `dali-cuda12`.
        purpose: what needs it, as the subject of the sentence shown where it is missing.

    Raises:
        UserError: the package is not installed; the sentence names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise UserError(
            f"{purpose} needs the package {error.name}, which is not installed: write pip install 'pliant[{extra}]'."
        ) from None
