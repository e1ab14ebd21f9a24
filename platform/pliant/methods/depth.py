"""What the methods on depth have in common: a residual network whose blocks run or not, image by image."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.errors import UserError
from pliant.networks.execution import Closed, Execution, runner
from pliant.networks.gated import GatedNet, Walk, threshold
from pliant.networks.gates import Gates, open_at_start
from pliant.networks.resnet import ResidualNet, ResNet, Run
from pliant.randomness import Draw
from pliant.recipe import Batch, Native, Outcome, Pass, Point, Progress, Recipe, Scale


@dataclass(frozen=True, kw_only=True)
class ResidualRecipe(Recipe):
    """A method on a residual network, which may begin with trained weights."""

    network: ResNet = field(default_factory=ResNet)
    pretrained: Path | None = None
    """A .safetensors file with the backbone's weights, to begin with; default: they are drawn."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes."""

    def __post_init__(self) -> None:
        try:
            self.network.check()
        except ValueError as error:
            raise UserError(f"--recipe.network: {error}") from None
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(
                f"Label smoothing lies in [0, 1): write --recipe.label-smoothing so, not {self.label_smoothing:g}."
            )

    def _at_least_0(self, *names: str) -> None:
        """Raises: UserError: one of these settings is negative."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise UserError(f"--recipe.{name.replace('_', '-')} cannot be {value:g}: write 0 or more.")

    def start(self, net: nn.Module) -> None:
        if self.pretrained is not None:
            load_backbone(self.backbone(net), self.pretrained)

    def backbone(self, net: nn.Module) -> ResidualNet:
        """The residual network in `net`."""
        return cast(ResidualNet, getattr(net, "backbone", net))

    def calibrates(self, point: Point) -> bool:
        return False

    def admits_mixing(self) -> str | None:
        return None


def load_backbone(backbone: ResidualNet, path: Path) -> None:
    """Loads weights by torchvision's names; `linear` counts as `fc`, and batch norm's step counts may be missing.

    Raises:
        UserError: the file cannot be read, or they are of another network; the sentence names the first difference.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name.replace("linear.", "fc."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no dictionary
            exported = json.loads((file.metadata() or {}).get("network", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"No weights can be read from {path} ({error}): write another --recipe.pretrained.") from None
    # Two kinds of shortcut have no weights: names and shapes would not tell them apart.
    shortcut = exported.get("shortcut", backbone.spec.shortcut)
    if shortcut != backbone.spec.shortcut:
        raise UserError(
            f"{path} was trained with another shortcut: write --recipe.network.shortcut {shortcut}, not "
            f"{backbone.spec.shortcut}."
        )
    there = backbone.state_dict()
    wanted = {name for name in there if not name.endswith("num_batches_tracked")}
    for name in sorted(wanted | {name for name in found if name in there or not name.endswith("num_batches_tracked")}):
        mine = tuple(there[name].shape) if name in there else "missing"
        theirs = tuple(found[name].shape) if name in found else "missing"
        if mine != theirs:
            if name == "fc.bias":  # of each layer the names come in order: a weight differs with the depth too
                trained_with = "--data.source, or --data.classes,"
            else:
                trained_with = f"--recipe.network.{'shortcut' if '.downsample.' in name else 'depth'}"
            raise UserError(
                f"{path} holds the weights of another network: {name} is {theirs} there and {mine} in a ResNet-"
                f"{backbone.spec.depth} with {backbone.classes} classes. Write the {trained_with} it was trained with."
            )
    backbone.load_state_dict(found, strict=False)


@dataclass(frozen=True, kw_only=True)
class Plain(ResidualRecipe):
    """The residual network itself, all blocks for all images: what the methods on depth begin with."""

    def build(self, classes: int) -> nn.Module:
        return self.network.build(classes)

    def passes(self, progress: Progress) -> int:
        return 1

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        loss = cross_entropy(net(batch.images), batch.targets, label_smoothing=self.label_smoothing)
        yield Pass("all blocks", loss)

    def points(self) -> tuple[Point, ...]:
        return (Native(),)

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        return Outcome(net(images))

    def graphs(self) -> int | str:
        return 1

    def export(self, net: nn.Module, point: Point) -> nn.Module:
        return net.eval()


@dataclass(frozen=True, kw_only=True)
class GatedRecipe(ResidualRecipe):
    """A method whose network is a `GatedNet`, asked by thresholding its gates."""

    execution: Execution = "masked"
    """How a trained network skips. masked: every block runs and is multiplied by its gate. grouped: a block runs on the
    images that keep it; the same answers, sooner. Training is always masked."""

    @property
    def closed(self) -> Closed:
        """What is left of a closed block: SkipNet's Eq. 1, and BlockDrop's code."""
        return "around"

    def masked(self) -> Run:
        """How training carries decisions out."""
        return runner("masked", self.closed)

    def executed(self) -> Run:
        """How a trained network carries them out."""
        return runner(self.execution, self.closed)

    def points(self) -> tuple[Point, ...]:
        return (Native(),)

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        gated = cast(GatedNet, net)
        scale = point.wanted if isinstance(point, Scale) else None
        walk: Walk = gated(images, threshold, self.executed(), scale)
        return self.outcome(gated, images, walk)

    def outcome(self, net: GatedNet, images: Tensor, walk: Walk) -> Outcome:
        """With what each image cost, and which blocks it ran."""
        return Outcome(walk.logits, net.macs(walk.open, images.shape[-1]), {"open": walk.open})

    def figures(self, marks: Mapping[str, Tensor]) -> Mapping[str, float]:
        opened = marks["open"].double()
        blocks = opened.sum(1)
        return {
            "blocks": blocks.mean().item(),
            "blocks_sd": blocks.std(unbiased=False).item(),
            "policies": float(len(torch.unique(opened.round(), dim=0))),
        }


@dataclass(frozen=True, kw_only=True)
class GatingRecipe(GatedRecipe):
    """A method that learns which blocks run."""

    open_rate: float | None = None
    """Share of blocks open at the start, in (0, 1); default: undecided, as the layers' own initialisation has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.open_rate is not None and not 0.0 < self.open_rate < 1.0:
            raise UserError(f"An open rate lies in (0, 1): write --recipe.open-rate so, not {self.open_rate:g}.")

    def start(self, net: nn.Module) -> None:
        super().start(net)
        first = self.stages()[0]
        if self.pretrained is None and all(prefix.startswith("gates") for prefix in first.learns):
            warnings.warn(
                f"The residual network begins with random weights, which the stage {first.name} leaves as they are: "
                "--recipe.pretrained FILE gives it trained ones.",
                stacklevel=2,
            )

    def gated(self, backbone: ResidualNet, gates: Gates, first: int = 0) -> GatedNet:
        """The two together, the gates of the blocks from `first` on open at that rate."""
        if self.open_rate is not None:
            open_at_start(gates, self.open_rate)
        return GatedNet(backbone, gates, first)
