"""Several runs in one table and one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pliant import cli
from tests.tiny_run import refusal


def line(point: str, top1: float, macs: float, **more: Any) -> dict[str, Any]:
    figures = dict(
        point=point, images=1000, top1=top1, top5=0.99, loss=0.5, macs=macs, parameters=2_500_000, figures={}
    )
    return figures | more


def spectrum(folder: Path, name: str, *lines: dict[str, Any], **more: Any) -> Path:
    folder.mkdir(parents=True)
    plain = dict(name=name, method="USNet", step=10, generated=False, split="val", lines=list(lines)) | more
    (folder / "spectrum.json").write_text(json.dumps(plain))
    return folder


@pytest.fixture
def one(tmp_path: Path) -> Path:
    lines = (line("1x", 0.76, 22.6e6), line("0.35x", 0.68, 3.9e6, macs_sd=2e5))
    return spectrum(tmp_path / "us" / "day1", "usnet", *lines)


def test_runs_stand_below_each_other_with_their_means(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = spectrum(tmp_path / "i" / "day2", "inet", line("0.5x", 0.71, 7.9e6, figures={"blocks": 3.0}))
    cli.main(["compare", str(one), str(other), "--to", str(tmp_path / "both.png")])
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in said.splitlines() if row.startswith("│")]
    assert rows == [
        ["usnet", "0.35x", "68.00", "3.90", "2.500"],
        ["", "1x", "76.00", "22.60", "2.500"],
        ["", "mean", "72.00", "13.25", ""],
        ["inet", "0.5x", "71.00", "7.90", "2.500"],
    ]
    with Image.open(tmp_path / "both.png") as picture:
        assert min(picture.size) > 300


def test_runs_of_one_name_are_told_apart(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = spectrum(tmp_path / "us" / "day2", "usnet", line("1x", 0.7, 22.6e6))
    cli.main(["compare", str(one), str(other), "--to", str(tmp_path / "both.png")])
    said = capsys.readouterr().out
    assert "usnet day1" in said
    assert "usnet day2" in said
    elsewhere = spectrum(tmp_path / "elsewhere" / one.name, "usnet", line("1x", 0.6, 22.6e6))
    cli.main(["compare", str(one), str(elsewhere), str(other), "--to", str(tmp_path / "three.png")])
    said = capsys.readouterr().out
    assert f"us/{one.name}" in said and f"elsewhere/{one.name}" in said, "folders that are called alike too"
    assert "usnet day2" in said


def test_what_cannot_be_compared_is_refused(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = spectrum(tmp_path / "few", "inet", line("1x", 0.7, 1e6, images=500))
    held_out = spectrum(tmp_path / "held", "inet", line("1x", 0.7, 1e6), split="held_out")
    generated = spectrum(tmp_path / "made", "inet", line("1x", 0.7, 1e6), generated=True)
    drawn = [
        spectrum(tmp_path / f"draw{seed}", "inet", line("1x", 0.7, 1e6), fingerprint={"labels": seed})
        for seed in (1, 2)
    ]
    assert "other images than" in refusal(capsys, "compare", *drawn, "--to", str(tmp_path / "a.png"))
    for other in (fewer, held_out, generated):
        assert "measure both on the same" in refusal(capsys, "compare", one, other, "--to", str(tmp_path / "a.png"))
    assert "two runs or more" in refusal(capsys, "compare", one, one)
    (tmp_path / "bare").mkdir()
    assert "has no spectrum yet" in refusal(capsys, "compare", one, tmp_path / "bare")
    assert "ends in .png" in refusal(capsys, "compare", one, fewer, "--to", str(tmp_path / "a.pdf"))
    assert not (tmp_path / "a.png").exists()
