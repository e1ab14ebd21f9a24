"""Images: index (what there is), order (which when), plan (which crop), loader (decodes), feed (batches)."""

from pliant.data.dataset import Dataset, SplitName, open_dataset
from pliant.data.feed import Batch, Feed
from pliant.data.index import Fingerprint
from pliant.data.thumbnails import thumbnails

__all__ = ["Batch", "Dataset", "Feed", "Fingerprint", "SplitName", "open_dataset", "thumbnails"]
