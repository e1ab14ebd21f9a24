"""Images: index (what there is), order (which when), plan (which crop), loader (decodes), feed (batches).

What is exported here is imported when it is first asked for: the judge of images and the index need no torch, and a
process that only decodes should not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pliant.data.dataset import Dataset, SplitName, open_dataset
    from pliant.data.feed import Batch, Feed
    from pliant.data.index import Fingerprint
    from pliant.data.pictures import thumbnails

__all__ = ["Batch", "Dataset", "Feed", "Fingerprint", "SplitName", "open_dataset", "thumbnails"]

_HOMES = {  # none has the name of what it holds: Python would put the module in its place
    "Batch": "feed",
    "Dataset": "dataset",
    "Feed": "feed",
    "Fingerprint": "index",
    "SplitName": "dataset",
    "open_dataset": "dataset",
    "thumbnails": "pictures",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found  # not asked again
    return found
