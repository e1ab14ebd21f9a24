"""An ordinary network cut out at one point, for use without Pliant."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save
from torch import nn

from pliant import record
from pliant.aside import written_aside
from pliant.engine.trained import Trained
from pliant.errors import UserError, optional_import
from pliant.networks.execution import folded
from pliant.networks.ordinary import absorbed
from pliant.networks.resnet import ResidualNet
from pliant.recipe import Point


def require_packages(formats: Sequence[str]) -> None:
    """Refuses a format whose package is missing.

    Raises:
        UserError: it says which.
    """
    if "onnx" in formats:
        for package in ("onnx", "onnxscript"):
            optional_import(package, extra="export", purpose="--formats onnx")


def export(trained: Trained, net: nn.Module, point: Point, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Writes the network at `point` in each format, with a description of its input beside.

    Args:
        net: the trained network with that point's statistics.
        formats: any of safetensors, onnx, torch.

    Returns:
        The files written.

    Raises:
        UserError: the recipe has no ordinary network to give, or a format's package is missing.
    """
    require_packages(formats)
    ordinary = trained.recipe.export(net, point)
    if ordinary is None:
        name = type(trained.recipe).__name__
        raise UserError(f"{name} has no ordinary network to export: it has no export() of its own.")
    plain = ordinary.cpu().float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    size = trained.experiment.data.side
    images = torch.zeros(2, 3, size, size)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if "safetensors" in formats:
        path = folder / "model.safetensors"
        network = json.loads(record.dump(trained.experiment))["recipe"].get("network", {})
        weights = {name: tensor.contiguous() for name, tensor in plain.state_dict().items()}
        with written_aside(path, contended=True) as beside:
            # Bytes, so that a full disk is an OSError.
            beside.write_bytes(save(weights, {"format": "pt", "network": json.dumps(network)}))
        written.append(path)
    program = None
    if "torch" in formats or "onnx" in formats:
        plain = folded(plain) if isinstance(plain, ResidualNet) else absorbed(plain)
        batch = torch.export.Dim("batch", min=1)
        with warnings.catch_warnings():  # of torch's, about itself
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            program = torch.export.export(plain, (images,), dynamic_shapes=({0: batch},))
    if "torch" in formats:
        path = folder / "model.pt2"
        with written_aside(path, contended=True) as beside:
            torch.export.save(cast(torch.export.ExportedProgram, program), beside)
        written.append(path)
    if "onnx" in formats:
        path = folder / "model.onnx"
        assert program is not None
        _write_onnx(program, images, path)
        written.append(path)
    path = folder / "model.json"
    with written_aside(path, contended=True) as beside:
        beside.write_text(json.dumps(_description(trained, point, size), indent=2) + "\n")
    return [*written, path]


def _write_onnx(program: torch.export.ExportedProgram, images: torch.Tensor, path: Path) -> None:
    with written_aside(path, contended=True) as beside:
        torch.onnx.export(
            program,
            (images,),
            beside,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
        )


def _description(trained: Trained, point: Point, size: int) -> dict[str, object]:
    normalisation = trained.feed.normalisation
    return {
        "point": str(point),
        "images": f"float32, (batch, 3, {size}, {size}), RGB in [0, 1], less the mean, over the deviation",
        "mean": normalisation.mean,
        "deviation": normalisation.std,
        "logits": "float32, (batch, classes)",
        "classes": list(trained.feed.dataset.classes),
        "trained": f"{trained.experiment.name}, {trained.step} steps",
        "generated": trained.feed.dataset.generated,  # what it was trained on: no photographs
    }
