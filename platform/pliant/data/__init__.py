"""Images: index (what there is), order (which when), plan (which crop), loader (decodes), feed (batches)."""

from pliant.data.dataset import Dataset, open_dataset
from pliant.data.feed import Batch, Feed

__all__ = ["Batch", "Dataset", "Feed", "open_dataset"]
