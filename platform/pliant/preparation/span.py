"""A stretch of a file: where the bytes of one image lie."""

from __future__ import annotations

from typing import NamedTuple

from pliant.errors import UserError


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
        """Its bytes.

        Raises:
            UserError: the file cannot be read or is shorter than it was.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                content = file.read(self.size + self.whole)
        except OSError as error:
            raise UserError(f"The file {self.path} cannot be read ({error.strerror}): mend that and go on.") from None
        if len(content) != self.size:
            raise UserError(f"The file {self.path} has another length than when it was listed: begin again.")
        return content
