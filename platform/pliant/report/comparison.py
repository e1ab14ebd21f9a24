"""Several runs' spectra side by side, as US-Nets Fig. 1 and 3 set one network beside many: a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pliant.errors import UserError
from pliant.report.spectrum import label, millions, picture, plot, read


def read_all(runs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The spectra of runs, by a name for each.

    Raises:
        UserError: there are fewer than two, one has no spectrum, or they are not of the same images.
    """
    if len(dict.fromkeys(runs)) < 2:
        raise UserError("A comparison is of two runs or more: write for instance pliant compare RUN RUN.")
    found = {run: read(run) for run in dict.fromkeys(runs)}
    images = {run: _images(spectrum) for run, spectrum in found.items()}
    first = runs[0]
    for run, one in images.items():
        if one != images[first]:
            raise UserError(
                f"{first} was measured on {images[first]} and {run} on {one}: measure both on the same with pliant "
                "spectrum, before they are compared."
            )
        theirs, ours = (found[one].get("fingerprint", {}).get("labels") for one in (run, first))
        same_place = found[run].get("dataset") == found[first].get("dataset")  # shards have another order than folders
        if same_place and None not in (theirs, ours) and theirs != ours:
            raise UserError(
                f"{first} was measured on other images than {run}, though as many: measure both on the same with "
                "pliant spectrum, before they are compared."
            )
    return dict(zip(_labels({run: spectrum["name"] for run, spectrum in found.items()}), found.values(), strict=True))


def _labels(names: dict[Path, str]) -> list[str]:
    """Runs by name, and where several have one by as much of the end of their paths as tells them apart."""
    labels = []
    for run, name in names.items():
        others = [other.absolute().parts for other in names if other != run and names[other] == name]
        parts, tail = run.absolute().parts, 0
        while any(not tail or other[-tail:] == parts[-tail:] for other in others) and tail < len(parts):
            tail += 1
        labels.append(" ".join((name, *(["/".join(parts[-tail:])] if tail else []))))
    return labels


def _images(spectrum: dict[str, Any]) -> str:
    kind = "generated " if spectrum["generated"] else ""
    size = f" of {spectrum['size']} px" if spectrum.get("size") else ""
    return f"{spectrum['lines'][0]['images']} {kind}images{size} ({spectrum['split']})"


def table(spectra: dict[str, dict[str, Any]]) -> Table:
    """One row per run and point, by rising cost; the mean of a run with several points last (Table 1)."""
    rows = Table("run", "point", "top-1 %", "MACs (M)", "parameters (M)")
    for column in rows.columns[2:]:
        column.justify = "right"
    for name, spectrum in spectra.items():
        lines = sorted(spectrum["lines"], key=lambda line: float(line["macs"] or 0))
        for number, line in enumerate(lines):
            texts = (f"{100 * line['top1']:.2f}", millions(line["macs"]), millions(line["parameters"], digits=3))
            rows.add_row(name if number == 0 else "", label(line["point"]), *texts, end_section=len(lines) == 1)
        if len(lines) > 1:
            mean = 100 * sum(line["top1"] for line in lines) / len(lines)
            cost = millions(sum(float(line["macs"] or 0) for line in lines) / len(lines))
            rows.add_row("", "mean", f"{mean:.2f}", cost, "", end_section=True)
    return rows


def draw(spectra: dict[str, dict[str, Any]], path: Path) -> Path:
    """Top-1 accuracy over MACs, one curve per run; a run with one point is a mark. As a PNG."""
    with picture(path, _images(next(iter(spectra.values())))) as axes:
        for name, spectrum in spectra.items():
            plot(axes, spectrum["lines"], label=name)
        axes.legend(fontsize=8, loc="lower right")
    return path
