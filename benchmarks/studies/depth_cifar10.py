"""SkipNet, BlockDrop and URNet on CIFAR-10 from one pretrained ResNet-32, with all that they have to beat.

    python benchmarks/studies/depth_cifar10.py --root data/cifar10 --pretrained resnet32.safetensors \
        --smaller resnet20.safetensors

Every row is a recipe file with options, trained, measured on the 10,000 test images, and written to the results at
once. Stopped at any time and started again, it goes on where it stood. With a GPU, several rows train side by side.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import tyro

from pliant.engine.ranks import Ranks
from pliant.engine.trained import open_run
from pliant.methods.depth import GatedRecipe
from pliant.methods.urnet import URNet
from pliant.networks.execution import folded
from pliant.networks.gated import GatedNet
from pliant.networks.gates import ClassPolicy, PolicyNetwork
from pliant.networks.resnet import ResidualNet
from pliant.recipe import parse_point

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SCALES = ("S0.2", "S0.4", "S0.6", "S0.8", "S1")
ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Row:
    """One training and its measurements."""

    recipe: str
    """File in recipes/."""
    options: tuple[str, ...]
    epochs: tuple[float, ...]
    """Of each stage; the last alone where there is one stage; (0,) measures what it begins with."""
    at: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    """Points whose commonest policy, unless it is all blocks, is frozen and fine-tuned as long as the last stage."""
    frozen_with: tuple[str, ...] = ()
    """Options of that training: the optimizer of the row itself, where it is another than `fixed` takes."""
    images: int = 256
    """Of a step."""


def depth(epochs: Sequence[float], *options: str, images: int = 256) -> tuple[str, ...]:
    """What all rows have in common."""
    given = ("--optimization.steps", "0") if not sum(epochs) else ("--optimization.epochs", f"{sum(epochs):g}")
    return (
        *("--recipe.network.shortcut", "pad", "--data.statistics", "imagenet", "--data.held-out", "5000"),
        *("--batch.images", f"{images}", "--batch.micro", f"{images}", "--optimization.floor", "0.01"),
        *("--optimization.schedule", "cosine", "--evaluate-epochs", "5", "--saving.keep", "100", "--log-steps", "50"),
        *given,
        *options,
    )


def blockdrop(*options: str, epochs: tuple[float, ...] = (40, 4, 16), images: int = 128) -> Row:
    """The policy network as a classifier, if there are three stages; the curriculum; joint fine-tuning.

    With 15 blocks, gamma 1 and an alpha of 0.8 no policy but all blocks for all images can be found: every sampled one
    lacks blocks and is wrong too often to pay. With a small gamma it pays to be right at all.
    """
    shares = [f"{each / sum(epochs):.6f}" for each in epochs]
    first = (f"--recipe.policy-share={shares[0]}",) if len(epochs) > 2 else ()
    own = (*first, "--recipe.curriculum-share", shares[-2], "--recipe.curriculum-batch", "1", *options)
    return Row("blockdrop_cifar10", depth(epochs, *own, images=images), epochs, frozen=("native",), images=images)


def skipnet(*options: str, epochs: tuple[float, ...] = (18, 8)) -> Row:
    """Supervised, then hybrid; or what `options` make of it, in one stage."""
    share = (f"--recipe.sp-share={epochs[0] / sum(epochs):.6f}",) if len(epochs) > 1 else ()
    frozen = ("native",) if len(epochs) > 1 else ()
    return Row("skipnet_cifar10", depth(epochs, "--optimization.lr", "0.04", *share, *options), epochs, frozen=frozen)


def urnet(*options: str, epochs: tuple[float, ...] = (5, 30), frozen: tuple[str, ...] = ()) -> Row:
    """Gates, then everything; or everything at once where the variant has one stage. By Adam, as the recipe file."""
    if len(epochs) > 1:
        share = f"--recipe.gates-share={epochs[0] / sum(epochs):.6f}"
        own: tuple[str, ...] = ("--optimization.lr", "5e-3", "--recipe.joint-rate", "0.2", share, "--recipe.beta", "8")
    else:
        own = ("--optimization.lr", "1e-3")
    return Row("urnet_cifar10", depth(epochs, *own, *options), epochs, SCALES, frozen)


def urnet_by_sgd(epochs: tuple[float, float] = (5, 30)) -> Row:
    """URNet by SGD, which forgets less of the pretrained network. Scales from 0.4: with 15 blocks the gates keep six
    open at 0.2 and seven at 0.4, so that smaller ones only take from the larger."""
    sgd = ("--optimization.optimizer", "sgd", "--optimization.weight-decay", "1e-4")
    share = f"--recipe.gates-share={epochs[0] / sum(epochs):.6f}"
    gates = ("--recipe.p", "0.1", "--recipe.gates-p", "0.5", "--recipe.beta", "12", "--recipe.smallest", "0.4", share)
    rates = ("--optimization.lr", "0.2", "--recipe.joint-rate", "0.2")
    options = depth(epochs, *sgd, *rates, *gates)
    again = (*sgd, "--optimization.lr=0.04")
    return Row("urnet_cifar10", options, epochs, SCALES, frozen=("S0.6", "S0.8"), frozen_with=again)


def urnet_standardised(epochs: tuple[float, float] = (0.25, 9.75)) -> Row:
    """By SGD too, with gates that read S standardised, and follow it at once."""
    sgd = ("--optimization.optimizer", "sgd", "--optimization.weight-decay", "1e-4", "--optimization.lr", "0.04")
    share = f"--recipe.gates-share={epochs[0] / sum(epochs):.6f}"
    gates = ("--recipe.p", "0.1", "--recipe.gates-p", "0.5", "--recipe.beta", "30", "--recipe.smallest", "0.3", share)
    options = depth(epochs, *sgd, *gates, "--recipe.standardise")
    return Row("urnet_cifar10", options, epochs, SCALES, frozen=("S0.6", "S0.8"), frozen_with=sgd)


def fixed(rule: str, keep: int, epochs: float, *options: str) -> Row:
    """Blocks that no image has a say in."""
    own = ("--optimization.lr", "1e-3", "--recipe.rule", rule, "--recipe.keep", str(keep))
    return Row("fixed_blocks_cifar10", depth((epochs,), *own, *options), (epochs,))


OLD = ("--optimization.lr=1e-3", "--recipe.joint-rate=0.3", "--recipe.joint-gamma", "5", "--recipe.grow", "0.6")
"""BlockDrop's settings beside a gamma of the size of the authors'."""

BY_CLASS = (
    *("--recipe.alpha", "0.9", "--recipe.grow", "0.05", "--recipe.open-rate", "0.5"),
    *("--optimization.lr", "4e-3", "--recipe.curriculum-rate", "2.5"),
)
"""BlockDrop's settings where the policy network learns the classes first."""

ROWS = {
    "skipnet": skipnet("--recipe.alpha", "2", "--recipe.hrl-rate", "0.025", "--recipe.open-rate", "0.8"),
    "urnet": urnet("--recipe.p", "0.1", "--recipe.gates-p", "0.5", frozen=("S0.4", "S0.6")),
    "blockdrop": blockdrop(
        *("--recipe.gamma-from", "0.1", "--recipe.gamma", "1", "--recipe.doubt", "0.25", *BY_CLASS),
        *("--recipe.joint-rate", "0.25"),
        epochs=(40, 2, 10),
    ),
    "blockdrop without doubt": blockdrop(
        *("--recipe.gamma", "0.5", "--recipe.joint-gamma", "0.5", *BY_CLASS, "--recipe.joint-rate", "0.05"),
    ),
    "blockdrop gamma 1": blockdrop("--recipe.gamma", "1", *OLD, epochs=(26, 16), images=256),
    "blockdrop gamma 2": blockdrop("--recipe.gamma", "2", *OLD, epochs=(26, 16), images=256),
    "urnet by sgd": urnet_by_sgd(),
    "urnet standardised": urnet_standardised(),
    "urnet beta 12": urnet(
        *("--recipe.p", "0.1", "--recipe.gates-p", "0.5", "--recipe.beta=12", "--recipe.joint-rate=0.1"),
        epochs=(2, 6),
    ),
    "urnet p 0.2": urnet("--recipe.p", "0.2", "--recipe.gates-p", "0.5"),
    "skipnet alpha 5": skipnet("--recipe.alpha", "5", "--recipe.hrl-rate", "0.025", "--recipe.open-rate", "0.8"),
    "skipnet pooled": skipnet(
        *("--recipe.gate", "pooled", "--recipe.alpha", "1", "--recipe.open-rate", "0.8", "--optimization.lr=0.02"),
        *("--recipe.hrl-rate", "1", "--recipe.hrl-schedule", "cosine", "--recipe.rl-weight", "0.3"),
        epochs=(1, 9),
    ),
    "skipnet soft": skipnet("--recipe.learning", "soft", "--recipe.open-rate", "0.8", epochs=(18,)),
    "skipnet rl": skipnet("--recipe.learning", "rl", "--optimization.lr=0.001", epochs=(6,)),
    "skipnet sdv": skipnet("--recipe.learning", "sdv", "--recipe.sdv-rate", "0.75", epochs=(18,)),
    "skipnet hrl": skipnet("--recipe.learning", "hrl", "--recipe.alpha", "2", "--optimization.lr=0.01", epochs=(12,)),
    "urnet sg": urnet("--recipe.p", "1", epochs=(3, 12)),
    "urnet bg": urnet("--recipe.p", "0", epochs=(15,)),
    "urnet random": urnet("--recipe.variant", "random", epochs=(15,)),
    "urnet random test": urnet("--recipe.variant", "random_test", epochs=(0,)),
    "urnet attention": urnet("--recipe.variant", "attention", epochs=(15,)),
    "urnet external": urnet("--recipe.variant", "external", "--recipe.gates-p", "0.5", epochs=(3, 12)),
    "resnet-32": fixed("first", 15, 0),
    "resnet-20": fixed("first", 9, 0),
    **{f"{rule} 10": fixed(rule, 10, 0) for rule in ("first", "random", "distribute")},
    **{f"random 10, draw {draw}": fixed("random", 10, 0, "--recipe.draw", str(draw)) for draw in range(1, 5)},
    **{f"{rule} 8 tuned": fixed(rule, 8, 16) for rule in ("first", "random", "distribute")},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, from what, and where to."""

    root: Path
    """CIFAR-10, in its own files."""
    pretrained: Path
    """Weights of a ResNet-32."""
    smaller: Path
    """Weights of a ResNet-20, for comparison."""
    runs: Path = Path("runs/depth_cifar10")
    results: Path = Path("runs/depth_cifar10.json")
    only: tuple[str, ...] = ()
    """Names of rows; default: all."""
    side_by_side: int = 1
    """Rows that train at the same time."""
    options: str = ""
    """For every training, after its own: --options="--threads 1 --log-steps 10"."""


def ask(name: str, settings: Settings, arguments: Sequence[str]) -> None:
    """One command to its end, its words in NAME.txt.

    Raises:
        RuntimeError: it failed.
    """
    settings.runs.mkdir(parents=True, exist_ok=True)
    path = settings.runs / f"{name.replace(' ', '_')}.txt"
    with path.open("a") as log:
        done = subprocess.run([sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode}: see {path}")


def train(name: str, row: Row, settings: Settings) -> Path:
    """Trains a row, or goes on with it; the run's folder."""
    smaller = name == "resnet-20"
    network = ("--recipe.network.depth", "20" if smaller else "32")
    weights = ("--recipe.pretrained", str(settings.smaller if smaller else settings.pretrained))
    runs = settings.runs / name.replace(" ", "_")
    own = ("--data.root", str(settings.root), "--runs", str(runs), "--resume", "auto", *network, *weights)
    ask(name, settings, [str(RECIPES / f"{row.recipe}.py"), *own, *row.options, *shlex.split(settings.options)])
    return max((runs / row.recipe).iterdir())


def measure(name: str, row: Row, run: Path, settings: Settings, checkpoint: str = "newest") -> list[dict[str, Any]]:
    """Its spectrum, each point with which test images it got right."""
    at = ("--at", *row.at) if row.at else ()
    program = "from pliant.cli import main; main()"
    ask(name, settings, ["-c", program, "spectrum", str(run), "--checkpoint", checkpoint, *at])
    found = json.loads((run / "spectrum.json").read_text())["lines"]
    with np.load(run / "spectrum.npz") as rows:
        for line in found:
            line["right"] = rows[f"{line['point']}/right"][np.argsort(rows[f"{line['point']}/position"])] > 0
            line["opened"] = rows[f"{line['point']}/open"].round().astype(int)
    return found  # type: ignore[no-any-return]


def at_its_best(net: ResidualNet) -> ResidualNet:
    """For inference on a CPU."""
    return folded(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@torch.inference_mode()
def clock(run: Path, at: Sequence[str], settings: Settings) -> dict[str, float]:
    """Time of grouped execution over that of a ResNet-32 without gates, at each point: batches of 64 test images, in
    turn, on one thread, batch norm folded into the convolutions on both sides, a policy network's too; medians."""
    torch.set_num_threads(1)
    trained = open_run(run, ALONE, root=settings.root)
    net, recipe = cast(GatedNet, trained.net), cast(GatedRecipe, trained.recipe)
    if not (isinstance(recipe, URNet) and recipe.variant == "attention"):  # its blocks all run
        recipe = dataclasses.replace(recipe, execution="grouped")
    whole = at_its_best(dataclasses.replace(recipe.network, depth=32).build(10))
    net.backbone = at_its_best(net.backbone)
    if isinstance(net.gates, PolicyNetwork):
        net.gates.net = at_its_best(net.gates.net)
    with trained.feed.evaluation("val", batch=64) as batches:
        images = [batch.images for batch in islice(batches, 16)]
    ratios: dict[str, list[float]] = {point: [] for point in at}
    for one in images:
        started = time.perf_counter()
        whole(one)
        all_blocks = time.perf_counter() - started
        for point in at:
            asked = parse_point(point)
            started = time.perf_counter()
            recipe.predict(net, one, asked)
            ratios[point].append((time.perf_counter() - started) / all_blocks)
    return {point: round(statistics.median(several[1:] or several), 3) for point, several in ratios.items()}


@torch.inference_mode()
def policy_alone(run: Path, checkpoint: str, settings: Settings) -> float | None:
    """Top-1 of a policy network that learned the classes, asked for them: what it takes no residual network to do."""
    trained = open_run(run, ALONE, which=checkpoint, root=settings.root)
    gates = cast(GatedNet, trained.net).gates
    if not isinstance(gates, ClassPolicy):
        return None
    with trained.feed.evaluation("val", batch=500) as batches:
        right = [(gates.classes(batch.images).argmax(1) == batch.labels).double() for batch in batches]
    return torch.cat(right).mean().item()


def commonest(opened: np.ndarray[Any, Any]) -> tuple[list[int], float]:
    """The blocks of the policy that most images share, and the share."""
    policies, images = np.unique(opened, axis=0, return_counts=True)
    return np.flatnonzero(policies[images.argmax()]).tolist(), float(images.max() / len(opened))


def plain(line: dict[str, Any], reference: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A point for the results; `ahead` of the ResNet-20 on the same images, with the 95 % interval's half width."""
    apart = line["right"].astype(float) - reference
    blocks, share = commonest(line["opened"])
    return {
        "point": line["point"],
        "top1": line["top1"],
        "macs": line["macs"],
        "macs_sd": line["macs_sd"],
        **line["figures"],
        "commonest": blocks,
        "commonest_share": round(share, 4),
        "ahead": round(apart.mean(), 5),
        "ahead_within": round(1.96 * apart.std() / math.sqrt(len(apart)), 5),
    }


def work(name: str, row: Row, settings: Settings, reference: np.ndarray[Any, Any]) -> dict[str, Any]:
    """All of one row: what the results hold of it."""
    started = time.time()
    run = train(name, row, settings)
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    done: dict[str, Any] = {
        "recipe": row.recipe,
        "options": " ".join(row.options),
        "epochs": list(row.epochs),
        "training_minutes": round(sum(event.get("seconds", 0) for event in events if event["event"] == "step") / 60, 1),
    }
    if len(row.epochs) > 1:
        boundary = str(round(events[-1]["step"] * sum(row.epochs[:-1]) / sum(row.epochs)))
        done["before"] = [plain(line, reference) for line in measure(name, row, run, settings, boundary)]
        done["policy_alone"] = [policy_alone(run, which, settings) for which in (boundary, "newest")]
    lines = measure(name, row, run, settings)
    times = clock(run, [line["point"] for line in lines], settings)
    done["points"] = [plain(line, reference) | {"time": times[line["point"]]} for line in lines]
    for line in lines:
        if line["point"] in row.frozen:
            blocks, _ = commonest(line["opened"])
            if len(blocks) == line["opened"].shape[1]:
                continue  # the whole network, which is a row already
            closed = ("--recipe.closed", "inside" if row.recipe.startswith("urnet") else "around")
            chosen = ("--recipe.blocks", *map(str, blocks), *closed)
            given = fixed("given", len(blocks), row.epochs[-1], *chosen, *row.frozen_with)
            done[f"frozen {line['point']}"] = work(f"{name} frozen {line['point']}", given, settings, reference)
    print(f"{name}: {(time.time() - started) / 60:.1f} minutes", flush=True)
    return done


def main(settings: Settings) -> None:
    results = json.loads(settings.results.read_text()) if settings.results.is_file() else {}
    wanted = [name for name in (settings.only or ROWS) if name not in results]
    smaller = ROWS["resnet-20"]
    found = measure("resnet-20", smaller, train("resnet-20", smaller, settings), settings)
    reference = found[0]["right"].astype(float)
    with ThreadPoolExecutor(settings.side_by_side) as pool:
        futures = {name: pool.submit(work, name, ROWS[name], settings, reference) for name in wanted}
        for name, future in futures.items():
            results[name] = future.result()
            settings.results.parent.mkdir(parents=True, exist_ok=True)
            settings.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
