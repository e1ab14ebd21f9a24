"""A stretch of a file: where the bytes of one image lie."""

from __future__ import annotations

import os
from typing import NamedTuple

from pliant.data.index.split import read
from pliant.errors import UserError


class Changed(UserError):  # noqa: N818 - it is what happened
    """What was listed is not there as it was: it must be listed anew."""


class Span(NamedTuple):
    """A stretch of a file."""

    path: str
    offset: int
    """Bytes before it."""
    size: int
    """Its length in bytes."""
    whole: bool
    """The file holds nothing else."""

    def read(self) -> bytes:
        """Its bytes. Storage that stumbles is asked again, as in a run.

        Raises:
            Changed: the file has another length than when it was listed, or is gone from its folder.
            UserError: it cannot be read.
        """
        try:
            content = read(self.path, self.offset, self.size + self.whole)  # a byte more tells whether it has grown
        except OSError as error:
            # Where the folder is gone too, a disk may be: what was listed there is not given up.
            if self.whole and isinstance(error, FileNotFoundError) and os.path.isdir(os.path.dirname(self.path)):
                raise Changed(f"The file {self.path} is gone since it was listed: begin again.") from None
            raise UserError(f"The file {self.path} cannot be read ({error.strerror}): mend that and go on.") from None
        if len(content) != self.size:
            raise Changed(f"The file {self.path} has another length than when it was listed: begin again.")
        return content
