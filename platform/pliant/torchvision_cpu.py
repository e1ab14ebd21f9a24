"""Let torchvision be imported where torch computes on the CPU alone.

The torchvision that package registries offer for Linux is compiled against CUDA. Beside a CPU build of torch
its library cannot be loaded. torchvision puts up with that until it describes its operators `nms` and `qnms`
to torch: then `import torchvision` ends with "operator torchvision::nms does not exist", and so does
`import timm`, which imports it. Two declarations are all that is missing. With them models, transforms and
datasets work; the compiled operators (`torchvision.ops.nms`, `torchvision.io.decode_jpeg`) do not, and pliant
uses none.

Whatever imports torchvision or timm calls `make_importable()` above that import.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

# Declarations last as long as the object that made them.
_declarations: list[torch.library.Library] = []


def make_importable() -> None:
    """Declare torchvision's operators where its own library cannot. Harmless when repeated or not needed."""
    if torch.version.cuda is not None or not _missing_operators():
        return
    _load_compiled_library()
    missing = _missing_operators()
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + _SIGNATURE)
        _declarations.append(library)


def _missing_operators() -> list[str]:
    return [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]


def _load_compiled_library() -> None:
    """Let a torchvision that fits this torch declare its operators: it would refuse to do so after us."""
    spec = find_spec("torchvision")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for library in sorted(Path(folder).glob("_C*.so")):
            with suppress(OSError):  # what a CUDA library says without CUDA
                torch.ops.load_library(str(library))
