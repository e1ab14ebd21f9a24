"""The first 20 steps of every recipe, as they were: a change meant to leave numerics alone is seen to.

In fp64 and at a small learning rate, where 20 steps do not blow rounding up, so that another machine agrees to a
relative 1e-6. After a change that is meant to alter them: python -m tests.test_golden, and say why in the commit.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pliant import record
from pliant.engine.session import train
from pliant.experiment import Batching, Experiment
from pliant.methods.blockdrop import BlockDrop
from pliant.methods.depth import ResidualRecipe
from pliant.methods.fixed_blocks import FixedBlocks
from tests.runs import REPOSITORY, losses, tiny_cifar
from tests.test_step import ALONE

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
RECIPES = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.py") if path.stem != "__init__")
STEPS = 20


def small_folder(root: Path) -> Path:
    """Three classes of smooth noise, eight training and two validation images each, without loss of compression."""
    generator = np.random.default_rng(0)
    for split, images in (("train", 8), ("val", 2)):
        for name in ("cat", "dog", "newt"):
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                coarse = generator.integers(0, 256, (6, 7, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((56, 48), Image.Resampling.BILINEAR)
                image.save(root / split / name / f"{number}.png")
    return root


def small(experiment: Experiment, make_root: Callable[[str], Path], runs: Path) -> Experiment:
    """The recipe's own experiment on small data."""
    data = dataclasses.replace(experiment.data, root=make_root(experiment.data.source), threads=1, held_out=0)
    if data.source == "folder":
        data = dataclasses.replace(data, size=32, loader="torchvision")
    optimization = dataclasses.replace(
        experiment.optimization, lr=experiment.optimization.lr / 100, steps=STEPS, warmup_epochs=0.0
    )
    recipe: Any = experiment.recipe
    if isinstance(recipe, ResidualRecipe):  # the recipe's settings on few blocks
        network = dataclasses.replace(recipe.network, depth=14 if recipe.network.form == "cifar" else 18)
        fewer = {"keep": network.number_of_blocks // 2} if isinstance(recipe, FixedBlocks) else {}
        fewer |= {"curriculum_batch": 1} if isinstance(recipe, BlockDrop) else {}
        recipe = dataclasses.replace(recipe, network=network, **fewer)
    return dataclasses.replace(
        experiment,
        recipe=recipe,
        data=data,
        optimization=optimization,
        batch=Batching(images=8, micro=4),
        precision="fp64",
        runs=runs,
        evaluate_epochs=0.0,
        log_steps=1,
        threads=1,
    )


def measure(name: str, folder: Path) -> list[dict[str, float]]:
    """The losses of the first steps of recipes/NAME.py, by pass."""

    def make_root(source: str) -> Path:
        return tiny_cifar(folder / "data") if source == "cifar10" else small_folder(folder / "data")

    experiment = record.load_recipe_file(REPOSITORY / "recipes" / f"{name}.py").EXPERIMENT
    return losses(train(small(experiment, make_root, folder / "runs"), ALONE).path)


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_as_they_were(name: str, tmp_path: Path, own_cache: Path) -> None:
    want = json.loads(GOLDEN.read_text())[name]
    got = measure(name, tmp_path)
    assert len(got) == len(want) == STEPS
    for step, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine == pytest.approx(theirs, rel=1e-6), f"step {step}"


if __name__ == "__main__":
    written = {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as temporary:
            written[recipe] = measure(recipe, Path(temporary))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(written, indent=1) + "\n")
