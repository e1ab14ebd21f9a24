"""Several ranks over gloo against one process that runs the same micro-batches in turn."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pliant.data import Batch as FedBatch
from pliant.engine.backends import Backend, wrap
from pliant.engine.backends.single import Single
from pliant.engine.batchnorm import RunningStatistics, calibrate, flat, mean_over_ranks, running_buffers
from pliant.engine.evaluation import Rows, evaluate
from pliant.engine.optimization import set_learning
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks, join, leave
from pliant.engine.step import accumulate
from pliant.errors import UserError
from pliant.experiment import Optimization
from pliant.methods.blockdrop import BlockDrop
from pliant.methods.fixed_blocks import FixedBlocks
from pliant.methods.skipnet import SkipNet
from pliant.methods.urnet import URNet
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet
from pliant.networks.resnet import ResNet
from pliant.randomness import Draw
from pliant.recipe import Batch, Measurement, Point, Progress, Recipe, Scale, Width
from tests.small_recipes import ALL, unmixed
from tests.test_step import micro_batch, progress_at

MICRO_BATCHES = 4
R8 = ResNet(depth=8)
DEPTH = (
    SkipNet(network=R8),
    SkipNet(network=R8, learning="rl"),
    BlockDrop(network=R8),
    BlockDrop(network=R8, policy_share=0.2),
    BlockDrop(network=R8, decide="block by block"),
    BlockDrop(network=R8, decide="recurrent"),
    URNet(network=R8, p=0.5),
    URNet(network=R8, variant="external", p=0.5),
    URNet(network=R8, variant="attention"),
    FixedBlocks(network=R8, keep=2),
)
US_NET = USNet(network=MobileNet(full=0.25, stem_stride=1, divisor=4), nonuniform=True)


def spawn(worker: object, ranks: int, *arguments: object) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_enter, args=(worker, ranks, port, arguments), nprocs=ranks, start_method="spawn")


def _enter(rank: int, worker: object, ranks: int, port: int, arguments: tuple[object, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    worker(Ranks(rank, ranks, torch.device("cpu")), *arguments)  # type: ignore[operator]
    leave()


def double(batch: Batch) -> Batch:
    """In float64, where a sum's order is all that differs, batch norm over a few values does not blow it up."""
    return unmixed(batch.images.double(), batch.labels)


def stages(recipes: Iterable[Recipe]) -> Iterator[tuple[Recipe, int]]:
    """Each recipe with each of its stages."""
    return ((recipe, stage) for recipe in recipes for stage in range(len(recipe.stages())))


def within(stage: int, step: int) -> Progress:
    """A step some way into a stage: BlockDrop decides two of three blocks there."""
    return dataclasses.replace(progress_at(20 + step), stage=stage)


def take_steps(recipe: Recipe, stage: int, net: nn.Module, ranks: Ranks, steps: int = 3) -> list[Tensor]:
    """Gradients of the last of a few steps, each followed by a plain update."""
    set_learning(net, recipe.stages()[stage])
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    backend = wrap(net, ranks, "auto", Optimization(), Precision("fp32", ranks.device))
    indices = ranks.micro_batches(MICRO_BATCHES)
    gradients: list[Tensor] = []
    for step in range(steps):
        net.zero_grad()
        accumulate(
            recipe,
            net,
            backend,
            RunningStatistics(net),
            [double(micro_batch(index)) for index in indices],
            [Draw(0, stage, step, index) for index in indices],
            within(stage, step),
            MICRO_BATCHES,
        )
        gradients = [parameter.grad.clone() for parameter in learning]
        with torch.no_grad():
            for parameter in learning:
                parameter -= 0.05 * parameter.grad
    return gradients


def _equals_one_process(ranks: Ranks) -> None:
    for recipe, stage in stages((*ALL, US_NET, *DEPTH)):
        torch.manual_seed(1)
        net = recipe.build(3).double()
        reference = copy.deepcopy(net)
        got = take_steps(recipe, stage, net, ranks)
        want = take_steps(recipe, stage, reference, Ranks(0, 1, ranks.device))
        names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        for name, a, b in zip(names, got, want, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-9, f"{type(recipe).__name__} {stage} {name}"
        rows = ranks.rows(flat(running_buffers(net)))
        torch.testing.assert_close(
            mean_over_ranks(rows, MICRO_BATCHES), flat(running_buffers(reference)), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_and_statistics_are_those_of_one_process(ranks: int) -> None:
    """Three ranks share four micro-batches unevenly; gates, policies and nonuniform widths differ per rank."""
    spawn(_equals_one_process, ranks)


def _goes_on_bit_for_bit(ranks: Ranks) -> None:
    torch.manual_seed(1)
    config = Optimization(lr=0.05)

    def step(net: nn.Module, backend: Backend, number: int) -> None:
        indices = ranks.micro_batches(MICRO_BATCHES)
        accumulate(
            US_NET,
            net,
            backend,
            RunningStatistics(net),
            [micro_batch(index) for index in indices],
            [Draw(0, 0, number, index) for index in indices],
            progress_at(number),
            MICRO_BATCHES,
        )
        backend.update(0.05)

    net = US_NET.build(3)
    backend = wrap(net, ranks, "ddp", config, Precision("fp32", ranks.device))
    for number in range(3):
        step(net, backend, number)
    resumed = copy.deepcopy(net)
    after = wrap(resumed, ranks, "ddp", config, Precision("fp32", ranks.device))
    after.load_optimizer_state(backend.optimizer_state())
    for one, on in ((net, backend), (resumed, after)):
        for number in (3, 4):
            step(one, on, number)
    for (name, mine), other in zip(net.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_three_ranks_go_on_bit_for_bit() -> None:
    """From three on, the order in which ranks are added follows the layout of DDP's buckets."""
    spawn(_goes_on_bit_for_bit, 3)


def _under_zero_equals_one_process(ranks: Ranks) -> None:
    for kind in ("zero0", "zero1", "zero2", "zero3"):
        for recipe, stage in stages(DEPTH):
            torch.manual_seed(1)
            net = recipe.build(3)
            set_learning(net, recipe.stages()[stage])
            backend = wrap(net, ranks, kind, Optimization(lr=0.01), Precision("fp32", ranks.device))
            indices = ranks.micro_batches(MICRO_BATCHES)
            for step in range(2):
                alone = recipe.build(3)
                set_learning(alone, recipe.stages()[stage])
                alone.load_state_dict(backend.whole().state_dict())
                one = Single(alone, Optimization(), Precision("fp32", ranks.device))
                for which, on, mine in ((net, backend, indices), (alone, one, range(MICRO_BATCHES))):
                    accumulate(
                        recipe,
                        which,
                        on,
                        RunningStatistics(which),
                        [micro_batch(index) for index in mine],
                        [Draw(0, stage, step, index) for index in mine],
                        within(stage, step),
                        MICRO_BATCHES,
                    )
                got = backend.gradients()
                for name, want in one.gradients().items():
                    apart = (got.get(name, torch.zeros_like(want)) - want).abs().max()
                    assert apart <= 2e-5 * want.abs().max() + 1e-7, (
                        f"{kind} {type(recipe).__name__} {stage} {step} {name}: {apart}"
                    )
                backend.update(0.01)
            backend.close()


def test_methods_on_depth_have_the_gradients_of_one_process_under_zero() -> None:
    """From the weights that each step begins with; every rank runs all blocks, so ZeRO 3 serves them too."""
    spawn(_under_zero_equals_one_process, 2)


def _calibrates(ranks: Ranks, folder: str) -> None:
    recipe = US_NET
    torch.manual_seed(1)
    net = recipe.build(3)
    for average in ("pooled", "cumulative", "moving"):
        batches = [(index, micro_batch(index, images=4 + index).images) for index in range(8)]
        measured = calibrate(
            recipe,
            net,
            [Width(1.0), Width(0.5)],
            batches[ranks.rank :: ranks.count],
            average=average,
            number=8,
            precision=Precision("fp32", ranks.device),
            ranks=ranks,
        )
        plain = {
            f"{point} {name}": torch.stack([layer.mean, layer.var])
            for point, layers in measured.items()
            for name, layer in layers.items()
        }
        if ranks.first:
            torch.save(plain, Path(folder) / f"{average}-{ranks.count}.pt")


def test_post_statistics_are_the_same_on_1_2_and_4_ranks(tmp_path: Path) -> None:
    spawn(_calibrates, 1, str(tmp_path))
    for ranks in (2, 4):
        spawn(_calibrates, ranks, str(tmp_path))
        for average in ("pooled", "cumulative", "moving"):
            one = torch.load(tmp_path / f"{average}-1.pt")
            several = torch.load(tmp_path / f"{average}-{ranks}.pt")
            assert one.keys() == several.keys()
            for name, value in one.items():
                torch.testing.assert_close(several[name], value, atol=1e-5, rtol=1e-5)


def _evaluates(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    recipe = URNet(network=R8)
    torch.manual_seed(2)
    net = recipe.build(3).eval()
    with torch.no_grad():  # as drawn, gates hardly differ between images
        for parameter in net.gates.parameters():
            parameter.mul_(8.0)
    ends = [0, *itertools.accumulate(sizes)]
    micro = micro_batch(0, images=sum(sizes))
    batches = [
        FedBatch(micro.images[start:end], micro.labels[start:end], torch.arange(start, end), micro.labels[start:end])
        for start, end in itertools.pairwise(ends)
    ]
    points = (Scale(0.3), Scale(1.0))

    def measured(own: list[FedBatch], among: Ranks) -> tuple[list[Measurement], dict[Point, Rows]]:
        rows: dict[Point, Rows] = {}
        precision = Precision("fp32", among.device)
        nets = dict.fromkeys(points, net)
        return evaluate(recipe, nets, own, precision=precision, ranks=among, rows=rows), rows

    alone, expected = measured(batches, Ranks(0, 1, torch.device("cpu")))
    together, found = measured(batches[ranks.rank :: ranks.count], ranks)
    assert alone[0].figures["policies"] > 1
    for one, other in zip(alone, together, strict=True):
        assert (one.point, one.images, one.figures) == (other.point, other.images, other.figures)
        for name in ("top1", "top5", "loss", "macs", "macs_sd"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6), name
    for point in points:
        order = found[point]["position"].argsort()
        for name, values in expected[point].items():
            torch.testing.assert_close(found[point][name][order], values)


@pytest.mark.parametrize("sizes", [(8, 8, 3), (8, 5)], ids=["a short batch", "a rank without images"])
def test_three_ranks_measure_what_one_does_image_by_image(sizes: tuple[int, ...]) -> None:
    spawn(_evaluates, 3, sizes)


def test_share_is_a_partition() -> None:
    for count in range(1, 6):
        for number in range(12):
            parts = [index for rank in range(count) for index in Ranks(rank, count, torch.device("cpu")).share(number)]
            assert parts == list(range(number))


def test_more_ranks_than_micro_batches_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be shared by 3 ranks"):
        Ranks(0, 3, torch.device("cpu")).micro_batches(2)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_each_believe_to_be_alone_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"started 2 processes \\({name}\\)"):
        join(environment={name: "2"})


def test_another_number_of_ranks_than_asked_for_is_refused() -> None:
    with pytest.raises(UserError, match="--ranks 4 was asked for and 1 take part"):
        join(4, environment={})
    assert join(1, environment={}).count == 1
