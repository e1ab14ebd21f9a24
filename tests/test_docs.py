"""The recipe that docs/recipes.md teaches is the file beside it, and trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from pliant import cli
from pliant.recipe import Native
from pliant.record import load_recipe_file
from tests.runs import tiny_cifar

DOCS = Path(__file__).parents[1] / "docs"
RECIPE = DOCS / "example_recipe.py"


def test_page_shows_the_file() -> None:
    page = (DOCS / "recipes.md").read_text()
    assert f"```python\n{RECIPE.read_text()}```\n" in page


def test_recipe_of_the_page_trains_and_has_a_spectrum(tmp_path: Path) -> None:
    root = tiny_cifar(tmp_path / "cifar10", images=8)
    small = ["--batch.images", "8", "--batch.micro", "4", "--optimization.warmup-epochs", "0"]
    where = ["--data.root", str(root), "--runs", str(tmp_path / "runs")]
    cli.main(["train", str(RECIPE), *where, *small, "--optimization.steps", "3", "--log-steps", "1"])
    (run,) = (tmp_path / "runs" / "two_exits").iterdir()
    steps = [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if line["event"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert steps[0]["losses"].keys() == {"late", "early"}
    cli.main(["spectrum", str(run)])
    (line,) = json.loads((run / "spectrum.json").read_text())["lines"]
    assert line["point"] == "native"
    assert line["images"] == 8


def test_image_that_leaves_early_costs_less_and_gets_the_early_answer() -> None:
    recipe = load_recipe_file(RECIPE).EXPERIMENT.recipe
    torch.manual_seed(0)
    net = recipe.build(10).eval()
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        early, late = net(images, exit="early"), net(images, exit="late")
        surest = early.softmax(1).amax(1)
        outcome = replace(recipe, confidence=surest.median().item()).predict(net, images, Native())
    leaves = surest >= surest.median()
    torch.testing.assert_close(outcome.logits, torch.where(leaves[:, None], early, late))
    assert 0 < leaves.sum() < 16
    assert outcome.macs[leaves].max() < outcome.macs[~leaves].min()
