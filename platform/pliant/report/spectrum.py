"""The spectrum of a run, as a table and as a picture: accuracy over cost, one line per point."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from pliant.aside import written_aside
from pliant.errors import UserError


def read(run: Path) -> dict[str, Any]:
    """The run's spectrum.json.

    Raises:
        UserError: there is none.
    """
    path = run / "spectrum.json"
    if not path.is_file():
        raise UserError(f"{run} has no spectrum yet: write pliant spectrum {run}.")
    spectrum: dict[str, Any] = json.loads(path.read_text())
    return spectrum


def title(spectrum: dict[str, Any]) -> str:
    """What was measured, on how many images of which kind."""
    images = spectrum["lines"][0]["images"]
    kind = "generated " if spectrum["generated"] else ""
    split = {"val": "validation", "held_out": "held-out"}[spectrum["split"]]
    size = f" of {spectrum['size']} px" if spectrum.get("size") else ""
    of = f"{images} {kind}{split} images{size}"
    return f"{spectrum['name']}: one {spectrum['method']} after {spectrum['step']} steps, {of}"


def table(spectrum: dict[str, Any]) -> Table:
    """One row per point, for a terminal. Where a method has figures of its own, they take the room of others."""
    texts = [_cells(line) for line in spectrum["lines"]]
    if len(texts) > 1:
        mean = sum(line["top1"] for line in spectrum["lines"]) / len(texts)
        texts.append({"point": "mean", "top-1 %": f"{100 * mean:.2f}"})
    rows = Table(title=title(spectrum), title_justify="left")
    for name in texts[0]:
        # In a narrow terminal the headings wrap, never the figures.
        rows.add_column(name, justify="right", min_width=max(len(line.get(name, "")) for line in texts))
    for number, line in enumerate(texts):
        rows.add_row(*(line.get(name, "") for name in texts[0]), end_section=number == len(spectrum["lines"]) - 1)
    return rows


def _cells(line: dict[str, Any]) -> dict[str, str]:
    """A line of the spectrum as text, by heading."""
    own = line.get("figures", {})
    cells = {
        "point": label(line["point"]),
        "top-1 %": f"{100 * line['top1']:.2f}",
        "top-5 %": f"{100 * line['top5']:.2f}",
        "loss": f"{line['loss']:.3f}",
        "MACs (M)": millions(line["macs"]),
        "± (M)": millions(line.get("macs_sd")),
        "parameters (M)": millions(line["parameters"], digits=3),
    }
    left_out = ("top-5 %", "parameters (M)") if own else ("± (M)",)
    cells = {name: text for name, text in cells.items() if name not in left_out}
    return cells | {name.replace("_sd", " ±"): f"{value:.2f}".removesuffix(".00") for name, value in own.items()}


def label(point: str) -> str:
    """A point as a table and a picture have room for it: of a width for each of many groups, the first ones. The
    spectrum.json holds it whole."""
    return point if len(point) <= 12 else f"{point[:10]}…"


def millions(value: float | None, digits: int = 2) -> str:
    """As text; nothing for None."""
    return "" if value is None else f"{value / 1e6:.{digits}f}"


def draw(spectrum: dict[str, Any], path: Path) -> Path:
    """Top-1 accuracy over MACs, as a PNG."""
    with picture(path, title(spectrum)) as axes:
        _curve(axes, spectrum["lines"])
    return path


@contextmanager
def picture(path: Path, above: str) -> Iterator[Any]:
    """Axes of accuracy over cost, to plot on; a PNG at the end."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), dpi=150)
    yield axes
    axes.set_xlabel("multiply-accumulates per image (millions)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(above, fontsize=9)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with written_aside(path, contended=True) as beside:
        figure.savefig(beside)
    pyplot.close(figure)


def _curve(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    for line, cost, accuracy in _apart(plot(axes, lines, color="#1f5fa8")):
        # Below and to the right: the curve rises, and no other point lies there.
        axes.annotate(
            label(line["point"]),
            (cost, accuracy),
            textcoords="offset points",
            xytext=(4, -4),
            ha="left",
            va="top",
            fontsize=8,
        )


def plot(axes: Any, lines: Sequence[dict[str, Any]], **style: Any) -> list[tuple[dict[str, Any], float, float]]:
    """Accuracy in percent over millions of MACs, with the spread of MACs over images; the points by rising cost."""
    lines = sorted(lines, key=lambda line: float(line["macs"] or 0))
    costs = [(line["macs"] or 0) / 1e6 for line in lines]
    accuracies = [100 * line["top1"] for line in lines]
    spread = [(line.get("macs_sd") or 0) / 1e6 for line in lines]
    (curve,) = axes.plot(costs, accuracies, marker="o", markersize=4, **style)
    if any(spread):
        axes.errorbar(costs, accuracies, xerr=spread, fmt="none", ecolor=curve.get_color(), alpha=0.35)
    return list(zip(lines, costs, accuracies, strict=True))


def _apart(points: list[tuple[dict[str, Any], float, float]]) -> list[tuple[dict[str, Any], float, float]]:
    """Those of the points, by rising cost, whose labels do not run into each other; both ends are always among them."""
    gap = 0.08 * (points[-1][1] - points[0][1])
    chosen = points[-1:]
    for point in reversed(points[1:]):
        if point[1] - points[0][1] > gap and chosen[0][1] - point[1] > gap:
            chosen.insert(0, point)
    return [*points[:1], *chosen] if len(points) > 1 else chosen


def scalars(spectrum: dict[str, Any], run: Path) -> None:
    """The spectrum into the run's TensorBoard: one scalar per point and figure, and the picture."""
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    place = f"spectrum {spectrum['size']} px" if spectrum.get("size") else "spectrum"
    with SummaryWriter(str(run / "tensorboard")) as boards:
        for line in spectrum["lines"]:
            for name in ("top1", "top5", "loss", "macs"):
                boards.add_scalar(f"{place}/{name}/{line['point']}", line[name], spectrum["step"])
        picture = np.asarray(Image.open(run / "spectrum.png").convert("RGB"))
        boards.add_image(place, picture, spectrum["step"], dataformats="HWC")
