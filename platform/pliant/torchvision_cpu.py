"""Let torchvision be imported where torch computes on the CPU alone.

The torchvision that package registries offer for Linux is compiled against CUDA. Beside a CPU build of torch
its library cannot be loaded. torchvision puts up with that until it describes its operators `nms` and `qnms`
to torch: then `import torchvision` ends with "operator torchvision::nms does not exist", and so does
`import timm`, which imports it. Two declarations are all that is missing. With them models, transforms and
datasets work; the compiled operators (`torchvision.ops.nms`, `torchvision.io.decode_jpeg`) do not, and pliant
uses none.

Whatever imports torchvision or timm calls `make_importable()` above that import. Programs of others import them too
(`accelerate launch` does): `python -m pliant.torchvision_cpu`, which `make setup` runs, teaches the environment's
interpreter to call it by itself, before anyone's first import of torchvision.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an interpreter that only starts does not pay for torch
    import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

# Declarations last as long as the object that made them.
_declarations: list[torch.library.Library] = []


def make_importable() -> None:
    """Declare torchvision's operators where its own library cannot. Harmless when repeated or not needed."""
    import torch

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
    import torch

    return [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]


def _load_compiled_library() -> None:
    """Let a torchvision that fits this torch declare its operators: it would refuse to do so after us."""
    import torch

    spec = find_spec("torchvision")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for library in sorted(Path(folder).glob("_C*.so")):
            with suppress(OSError):  # what a CUDA library says without CUDA
                torch.ops.load_library(str(library))


class _BeforeTorchvision:
    """Stands before the interpreter's finders until someone asks for torchvision; finds nothing itself."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(cls)
            make_importable()


def hook() -> None:
    """Call `make_importable()` when torchvision is first imported, by whomever."""
    sys.meta_path.insert(0, _BeforeTorchvision)


def main() -> None:
    """Has this environment's interpreter call `hook()` at each start, if torchvision cannot be imported without."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        path = Path(sysconfig.get_path("purelib")) / "pliant_torchvision_cpu.pth"
        path.write_text("import pliant.torchvision_cpu; pliant.torchvision_cpu.hook()\n")
