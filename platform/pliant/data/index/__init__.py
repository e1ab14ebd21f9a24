"""What there is: the images of one split, found once and kept compactly.

An `Index` lists images in files or shards, `Pixels` holds small images themselves; both know the label of each image,
and position k means the same image in every part of a run.

table      the arrays, and the file that keeps them
cache      which kept file still holds, and who builds it
folders    folders of classes
shards     tar files
examine    opens each image once: size, checksum, broken or not
split      what the rest of the program asks
"""

from pliant.data.index.folders import SUFFIXES, class_folders, scan
from pliant.data.index.shards import is_beside, scan_shards
from pliant.data.index.split import Fingerprint, Index, Pixels, Split

__all__ = ["SUFFIXES", "Fingerprint", "Index", "Pixels", "Split", "class_folders", "is_beside", "scan", "scan_shards"]
