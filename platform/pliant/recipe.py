"""The contract between a method and the engine.

A recipe is a value: hyper-parameters, no tensors, no state. The network is state, the draws are arguments, so an
iteration can be tested by calling it. The engine calls `iteration` once per micro-batch and runs the backward of
each yielded pass before the generator goes on; see docs/recipes.md for a recipe of one's own.

Shapes: B images of a micro-batch, K classes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor, nn

from pliant.errors import UserError

if TYPE_CHECKING:
    from pliant.randomness import Draw


ScheduleName = Literal["linear", "cosine", "steps", "constant"]


class Batch(Protocol):
    """What the engine hands to an iteration: one micro-batch, on the device, normalised."""

    @property
    def images(self) -> Tensor:
        """float32, (B, 3, H, W), channels last in memory."""

    @property
    def labels(self) -> Tensor:
        """int64, (B,): each image's own class. What counts right answers reads these."""

    @property
    def targets(self) -> Tensor:
        """What a loss learns from, as torch's cross_entropy takes it: the labels, int64, (B,); or, in a run that mixes
        images in pairs, the share of each class in each image, of the images' type, (B, K)."""


@dataclass(frozen=True)
class Pass:
    """One forward of an iteration; the engine runs its backward."""

    name: str
    """The tag of its scalars, for instance "0.35x"."""
    loss: Tensor
    """A scalar with a graph, the mean over the micro-batch. Losses of one iteration's passes add up."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars without a graph, left on the device."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where in the schedule an iteration stands. Curricula and annealing read it; nothing counts for itself."""

    stage: int
    """Index of the stage, from 0."""
    step: int
    """Steps done in this stage before this iteration."""
    steps: int
    """Steps of this stage in all."""
    epoch: int
    """Epochs done in this stage before this iteration."""
    run_share: float
    """Share of the whole run done before this iteration, in [0, 1)."""

    @property
    def stage_share(self) -> float:
        """Share of the stage done before this iteration, in [0, 1)."""
        return self.step / self.steps


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training schedule: what learns in it, and for how long."""

    name: str = "train"
    learns: tuple[str, ...] = ("",)
    """Prefixes of the names of the parameters that learn; "" is every parameter. All others are frozen: in
    evaluation mode, without gradient and without optimizer state."""
    share: float = 1.0
    """Share of the run's epochs, in (0, 1]; the shares of a recipe's stages add up to 1."""
    learning_rate: float = 1.0
    """Factor on the run's learning rate."""
    schedule: ScheduleName | None = None
    """Shape of the learning rate in this stage; default: the run's."""
    batch: int = 1
    """Images of a step, as a multiple of the run's."""


class Point(ABC):
    """What a trained network is asked for: one place on its accuracy-cost curve. Readable, and parsed back."""

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def file_name(self) -> str:
        """The text as part of a file's name: without slashes, and short however many widths it lists."""
        name = str(self).replace("/", "_")
        if len(name) <= 100:
            return name
        return f"{name[:60]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


@dataclass(frozen=True)
class Native(Point):
    """The network as it is: the only point of a network that does not change its shape."""

    def __str__(self) -> str:
        return "native"


@dataclass(frozen=True, order=True)
class Width(Point):
    """One width for all layers, as a fraction of the full number of channels."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise UserError(f"A width lies above 0 and is at most 1, not {self.ratio:g}: write for instance 0.35.")

    def __str__(self) -> str:
        return f"{_decimal(self.ratio)}x"


@dataclass(frozen=True)
class Widths(Point):
    """A width for each independently slimmable group of layers (nonuniform, US-Nets section 6)."""

    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            Width(ratio)

    def __str__(self) -> str:
        return "/".join(map(_decimal, self.ratios)) + "x"


@dataclass(frozen=True, order=True)
class Scale(Point):
    """The share of blocks that a user wants to run, URNet's S."""

    wanted: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.wanted <= 1.0:
            raise UserError(f"A scale lies in [0, 1], not {self.wanted:g}: write for instance S0.6.")

    def __str__(self) -> str:
        return f"S{_decimal(self.wanted)}"


def _decimal(ratio: float) -> str:
    """Four digits where they say all; else as many as it takes, as a point's text names its statistics too."""
    short = f"{ratio:.4g}"
    return short if float(short) == ratio else repr(ratio)


def parse_point(text: str) -> Point:
    """The point that `str(point)` wrote: "0.35x" or "0.35", "1/0.5/0.5x", "S0.6", "native".

    Raises:
        UserError: the text is none of these.
    """
    plain = text.strip().removesuffix("x")
    if plain == "native":
        return Native()
    try:
        if plain.startswith("S"):
            return Scale(float(plain[1:]))
        ratios = tuple(float(part) for part in plain.split("/"))
    except ValueError:
        raise UserError(
            f"{text!r} is not a point: write a width such as 0.35, a width for each group of layers such as "
            "1/0.5/0.5, a scale such as S0.6, or native."
        ) from None
    return Width(ratios[0]) if len(ratios) == 1 else Widths(ratios)


@dataclass(frozen=True)
class Outcome:
    """What a network answers at one point."""

    logits: Tensor
    """(B, K)."""
    macs: Tensor | None = None
    """Multiply-accumulates of each image, (B,); None where all images cost the same: then they are counted once."""
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's own, one row per image: gates open, configuration chosen."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of a spectrum: a point, its accuracy and its cost."""

    point: str
    images: int
    """Evaluated images; each counts once."""
    top1: float
    """Share in [0, 1]."""
    top5: float
    """Share in [0, 1]."""
    loss: float
    """Mean cross entropy in nats."""
    macs: float | None = None
    """Mean multiply-accumulates per image, where counted."""
    parameters: int | None = None
    """Elements of the weights that the point uses, where counted."""
    macs_sd: float | None = None
    """Standard deviation of the multiply-accumulates over images; None where all images cost the same."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The method's own (Recipe.figures)."""


class Recipe(ABC):
    """A training method. Subclasses are frozen dataclasses of hyper-parameters."""

    @abstractmethod
    def build(self, classes: int) -> nn.Module:
        """The network, initialised from torch's global generator. Several networks: one module that holds them."""

    def start(self, net: nn.Module) -> None:  # noqa: B027 - most methods begin with what `build` drew
        """Before the first step of a new run, on every rank: loads weights that it begins with. A run that goes on, and
        a trained one that is asked for a point, load their own instead.

        Raises:
            UserError: they cannot be loaded.
        """

    def stages(self) -> tuple[Stage, ...]:
        """The schedule's parts, in order; by default one in which everything learns."""
        return (Stage(),)

    @abstractmethod
    def passes(self, progress: Progress) -> int:
        """How many passes the iteration at `progress` yields: known before it starts, the same on every rank."""

    @abstractmethod
    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        """All that happens between two optimizer steps, for one micro-batch.

        Yields exactly `passes(progress)` passes, never inside a context manager of its own: it would leak into
        the engine. Work without gradient before a pass's forward is welcome.
        """

    @abstractmethod
    def points(self) -> tuple[Point, ...]:
        """The points that a spectrum shows unless told otherwise."""

    def tracked(self) -> tuple[Point, ...]:
        """The points whose running statistics are kept while training, followed in validation."""
        return self.points()

    def admits(self, point: Point) -> str | None:
        """None if the trained network can be asked for `point`, else the sentence that refuses it."""
        if point in self.points():
            return None
        return f"{point} is none of this recipe's points: write one of {', '.join(map(str, self.points()))}."

    @abstractmethod
    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        """The network's answer at `point` to `images`, normalised, (B, 3, H, W)."""

    def calibrates(self, point: Point) -> bool:
        """Whether batch norm needs statistics of its own at `point`, measured after training."""
        return not isinstance(point, Native)

    def narrower(self, net: nn.Module, point: Point, step: float) -> Sequence[Point]:
        """The points next below `point`, each of them cheaper in one place: what `pliant slim` chooses from.

        Args:
            step: share of what there is in a place that is taken at a time, in (0, 1].
        """
        return ()

    def export(self, net: nn.Module, point: Point) -> nn.Module | None:
        """The ordinary network at `point`, in evaluation mode, without anything of Pliant; None if there is none.
        `net` holds the point's statistics."""
        return None

    def figures(self, marks: Mapping[str, Tensor]) -> Mapping[str, float]:
        """More columns of a spectrum, from the marks of all images at one point, one row per image."""
        return {}

    def parameters_at(self, net: nn.Module, point: Point) -> int:
        """Elements of the weights in use at `point`."""
        return sum(parameter.numel() for parameter in net.parameters())

    def admits_mixing(self) -> str | None:
        """None if every loss that looks at labels takes `Batch.targets`, so that images may be mixed in pairs (mixup,
        CutMix); else the beginning of the sentence that refuses it."""
        return "This recipe does not say that it learns from mixed labels (Recipe.admits_mixing)"

    def graphs(self) -> int | str:
        """How many computation graphs the passes of an iteration need in all, for `--compile`; or, where that has
        no bound, the sentence that says why it cannot be compiled."""
        return "this recipe does not say how many computation graphs it runs (Recipe.graphs)"

    def score(self, spectrum: Sequence[Measurement]) -> float:
        """Which checkpoint is best: higher is better. By default the mean top-1 over the points measured."""
        return sum(line.top1 for line in spectrum) / len(spectrum)
