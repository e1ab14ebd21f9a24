"""Pictures of which blocks a network on depth runs, and for which images: reads spectrum.json and spectrum.npz."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.aside import written_aside
from pliant.report.spectrum import read, title

Rows = Mapping[str, NDArray[Any]]
_NAMES = ("blocks.png", "classes.png", "policies.png", "scales.png", "images.png")
_POLICIES = 8  # that a picture has room for
_EXAMPLES = 8  # of each


def draw(run: Path) -> list[Path]:
    """The pictures that the run's spectrum has the figures for; none where its method marks no images.

    blocks.png: the share of images that open each block, at each point (URNet Fig. 4, SkipNet Fig. 10a).
    classes.png: blocks left out per class, over the class's accuracy (SkipNet Fig. 9).
    policies.png: the sets of blocks that most images share, and some of these images (BlockDrop Fig. 4), at the point
    that has most of them.
    scales.png: single images at every point, first those that are right at one and wrong at another (URNet Fig. 6, 7).
    images.png: the images that cost least and most (SkipNet Fig. 7, BlockDrop Fig. 5), at the middle one of the points
    at which images differ in cost; there is none where they never do.
    """
    for name in _NAMES:
        (run / name).unlink(missing_ok=True)  # of an earlier spectrum, at other points
    path = run / "spectrum.npz"
    if not path.is_file():
        return []
    spectrum = read(run)
    with np.load(path) as kept:
        found = {name: kept[name] for name in kept.files}
    points = [line["point"] for line in spectrum["lines"] if f"{line['point']}/open" in found]
    if not points:
        return []
    rows = {point: {n.split("/", 1)[1]: v for n, v in found.items() if n.startswith(f"{point}/")} for point in points}
    middle = points[len(points) // 2]
    various = max(points, key=lambda point: len(np.unique(rows[point]["open"].round(), axis=0)))
    pictures: list[tuple[str, Callable[[Any], None]]] = [
        ("blocks.png", lambda figure: _usage(figure, spectrum, rows)),
        ("classes.png", lambda figure: _classes(figure, spectrum, middle, rows[middle])),
        ("policies.png", lambda figure: _policies(figure, spectrum, various, rows[various], found)),
    ]
    if len(points) > 1:
        pictures.append(("scales.png", lambda figure: _scales(figure, spectrum, rows, found)))
    differing = [point for point in points if "easiest" in rows[point] and np.ptp(rows[point]["macs"]) > 0]
    if differing:
        between = differing[len(differing) // 2]
        pictures.append(("images.png", lambda figure: _images(figure, spectrum, between, rows[between])))
    return [_saved(run / name, paint) for name, paint in pictures]


def _saved(path: Path, paint: Callable[[Any], None]) -> Path:
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(dpi=150, layout="constrained")
    paint(figure)
    with written_aside(path, contended=True) as beside:
        figure.savefig(beside)
    pyplot.close(figure)
    return path


def _usage(figure: Any, spectrum: Mapping[str, Any], rows: Mapping[str, Rows]) -> None:
    share = np.stack([one["open"].mean(0) for one in rows.values()], 1)  # (N, points)
    figure.set_size_inches(max(4.5, 1.2 * share.shape[1] + 2.5), max(3.5, 0.16 * len(share) + 1.6))
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel("block")
    axes.set_yticks(range(0, len(share), max(1, len(share) // 18)))
    figure.colorbar(image, label="share of images that run it")
    axes.set_title(title(dict(spectrum)), fontsize=7, wrap=True)


def _classes(figure: Any, spectrum: Mapping[str, Any], point: str, rows: Rows) -> None:
    names = spectrum.get("classes") or []
    skipped = rows["open"].shape[1] - rows["open"].sum(1)
    labels = np.unique(rows["label"])
    accuracy = np.array([rows["right"][rows["label"] == one].mean() for one in labels])
    spread = [skipped[rows["label"] == one] for one in labels]
    figure.set_size_inches(7, 4.2)
    axes = figure.subplots()
    if len(labels) <= 20:
        order = np.argsort(accuracy)
        axes.boxplot([spread[k] for k in order], showfliers=False, medianprops={"color": "#1f5fa8"})
        words = [names[labels[k]] if len(names) > labels[k] else str(labels[k]) for k in order]
        axes.set_xticks(
            range(1, len(labels) + 1),
            [f"{word}\n{100 * accuracy[k]:.0f} %" for word, k in zip(words, order, strict=True)],
            fontsize=7,
        )
        axes.set_xlabel("class, and its accuracy")
    else:
        axes.scatter(100 * accuracy, [one.mean() for one in spread], s=8, color="#1f5fa8")
        axes.set_xlabel("accuracy of a class (%)")
    axes.set_ylabel("blocks left out")
    axes.set_title(f"{title(dict(spectrum))}, at {point}", fontsize=7, wrap=True)


def _policies(figure: Any, spectrum: Mapping[str, Any], point: str, rows: Rows, found: Rows) -> None:
    """A row for each: its blocks, the share of images, their accuracy, and some of them."""
    policies, which, images = np.unique(rows["open"].round(), axis=0, return_inverse=True, return_counts=True)
    commonest = np.argsort(-images, kind="stable")[:_POLICIES]
    pictures, kept = _spaced(rows, found)
    figure.set_size_inches(9, 0.85 * len(commonest) + 0.9)
    grid = figure.subplots(len(commonest), _EXAMPLES + 1, squeeze=False, width_ratios=[3.5, *[1] * _EXAMPLES])
    for row, number in zip(grid, commonest, strict=True):
        having = which.reshape(-1) == number
        share, right = having.mean(), rows["right"][having].mean()
        _strip(row[0], policies[number], f"{share:.1%} of the images, {right:.1%} right")
        for axes, place in zip(row[1:], np.flatnonzero(having[kept])[:_EXAMPLES], strict=False):
            axes.imshow(pictures[place], interpolation="nearest")
        for axes in row[1:]:
            axes.set_axis_off()
    rest = "" if len(policies) <= _POLICIES else f", the commonest of {len(policies)}"
    figure.suptitle(f"{title(dict(spectrum))}, at {point}: blocks that run{rest}", fontsize=7)


def _spaced(rows: Rows, found: Rows) -> tuple[NDArray[Any], NDArray[Any]]:
    """The images whose pixels were kept, and the row of what was found of each."""
    there = np.isin(found["spaced_positions"], rows["position"])  # a broken one may have been left out
    order = np.argsort(rows["position"])
    kept = order[np.searchsorted(rows["position"][order], found["spaced_positions"][there])]
    return found["spaced"][there], kept


def _strip(axes: Any, opened: NDArray[Any], said: str, colour: str = "black") -> None:
    """The blocks that run, side by side."""
    axes.imshow(opened[None], vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_title(f"{opened.sum():.0f} blocks: {said}", fontsize=7, color=colour)
    axes.set_xticks([])
    axes.set_yticks([])


def _scales(figure: Any, spectrum: Mapping[str, Any], rows: Mapping[str, Rows], found: Rows) -> None:
    """A row for each image: its picture, and its blocks at every point."""
    pictures, kept = _spaced(next(iter(rows.values())), found)
    places = [dict(zip(one["position"].tolist(), range(len(one["position"])), strict=True)) for one in rows.values()]
    positions = next(iter(rows.values()))["position"][kept]
    seen = [[place[position] for place in places] for position in positions.tolist()]
    right = np.array([[one["right"][row] for one, row in zip(rows.values(), each, strict=True)] for each in seen])
    changing = np.argsort(right.all(1) | ~right.any(1), kind="stable")[:_POLICIES]
    figure.set_size_inches(1.2 + 2.2 * len(rows), 0.85 * len(changing) + 0.9)
    grid = figure.subplots(len(changing), 1 + len(rows), squeeze=False, width_ratios=[1, *[2.5] * len(rows)])
    for line, number in zip(grid, changing, strict=True):
        line[0].imshow(pictures[number], interpolation="nearest")
        line[0].set_axis_off()
        for axes, (point, one), row in zip(line[1:], rows.items(), seen[number], strict=True):
            said, colour = ("right", "#2a7d3b") if one["right"][row] else ("wrong", "#b03a2e")
            _strip(axes, one["open"][row], f"{said} at {point}", colour)
    figure.suptitle(f"{title(dict(spectrum))}: blocks that run", fontsize=7)


def _images(figure: Any, spectrum: Mapping[str, Any], point: str, rows: Rows) -> None:
    """Two rows of the cheapest images above two of the dearest, all answered rightly."""
    columns = 8
    figure.set_size_inches(8, 5.2)
    grid = figure.subplots(4, columns)
    for half, end in enumerate(("easiest", "hardest")):
        for number, (pixels, row) in enumerate(zip(rows[end], rows[f"{end}_rows"], strict=True)):
            axes = grid[2 * half + number // columns][number % columns]
            axes.imshow(pixels, interpolation="nearest")
            axes.set_title(f"{int(rows['open'][row].sum())} blocks", fontsize=6)
    for axes in grid.flat:
        axes.set_axis_off()
    figure.suptitle(f"{title(dict(spectrum))}, at {point}: fewest and most blocks, answered rightly", fontsize=7)
