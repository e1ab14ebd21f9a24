"""A network cut out at one point answers as its parent does there, without anything of Pliant."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pliant import cli
from pliant.engine.batchnorm import calibrate, impose
from pliant.engine.precision import Precision
from pliant.engine.trained import Trained, open_run
from pliant.errors import UserError
from pliant.export import export
from pliant.methods.s_net import SNet
from pliant.methods.us_net import USNet
from pliant.methods.widths import width_of
from pliant.networks.mobilenet import MobileNet
from pliant.networks.ordinary import absorbed, ordinary
from pliant.recipe import Point, Recipe, Width, Widths
from pliant.torchvision_cpu import make_importable
from tests.small_recipes import Plain
from tests.test_networks import shaken
from tests.test_step import ALONE
from tests.tiny_run import refusal, train_tiny

make_importable()
import torchvision

POINT = Width(0.75)
# What torch says of its own parts while it exports; nothing that a user could mend.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")


def images(number: int) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(number))


def calibrated(recipe: Recipe, point: Point) -> nn.Module:
    """A network that is not at its initial values, with the statistics of one point."""
    torch.manual_seed(0)
    net = shaken(recipe.build(10))
    options = dict(average="pooled", number=2, precision=Precision("fp32", ALONE.device), ranks=ALONE)
    return impose(net, calibrate(recipe, net, [point], enumerate((images(8), images(5))), **options)[point])


@torch.no_grad()
def answers(net: nn.Module, number: int, *point: object) -> Tensor:
    """In float64, where only a wrong weight shows: fp32's rounding is amplified by layers of small variance."""
    return copy.deepcopy(net).double()(images(number).double(), *point)


def uneven(groups: int) -> Widths:
    return Widths(tuple(0.4 + 0.6 * (7 * place % groups) / groups for place in range(groups)))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("which", [1.0, 0.55, 0.35, "uneven"])
def test_ordinary_network_answers_as_its_parent(version, which, average):
    network = MobileNet(version=version, full=0.25, divisor=2, average=average)
    recipe = USNet(network=network)
    point = uneven(network.number_of_groups) if which == "uneven" else Width(which)
    net = calibrated(recipe, point)
    plain = recipe.export(net, point)
    leaves = {type(module).__module__ for module in plain.modules() if not list(module.children())}
    assert all(name.startswith("torch.nn.modules") for name in leaves)
    assert not plain.training
    expected = answers(net, 5, width_of(point))
    assert expected.std() > 0.01
    # Averaged weights are multiplied out, and rounded to fp32 again.
    torch.testing.assert_close(answers(plain, 5), expected, atol=1e-5 if average else 1e-9, rtol=1e-9)
    assert sum(parameter.numel() for parameter in plain.parameters()) == recipe.parameters_at(net, point)


@pytest.mark.parametrize("private", [False, True])
def test_each_switch_of_an_s_net_is_cut_out_with_its_own_statistics_and_scales(private):
    recipe = SNet(network=MobileNet(full=0.25, divisor=2), widths=(1.0, 0.5, 0.35), private=private)
    torch.manual_seed(0)
    net = shaken(recipe.build(10))
    for width in recipe.widths:
        got = answers(recipe.export(net, Width(width)), 5)
        torch.testing.assert_close(got, answers(net, 5, width), atol=1e-9, rtol=1e-9)


def test_cutting_out_leaves_the_parent_alone_and_shares_nothing_with_it():
    recipe = USNet(network=MobileNet(full=0.25, divisor=4))
    net = calibrated(recipe, Width(0.5))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = recipe.export(net, Width(0.5))
    for tensor in plain.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_point_without_statistics_is_refused():
    recipe = USNet(network=MobileNet(full=0.25, divisor=4))
    net = recipe.build(10)
    ordinary(net, 0.35)
    with pytest.raises(ValueError, match="no statistics for this width: calibrate it first"):
        ordinary(net, 0.6)


def test_mobilenet_v2_at_width_1_is_loaded_by_torchvision():
    torch.manual_seed(0)
    recipe = USNet(network=MobileNet())
    net = shaken(recipe.build(1000))
    reference = torchvision.models.mobilenet_v2()
    reference.load_state_dict(recipe.export(net, Width(1.0)).state_dict(), strict=True)
    torch.testing.assert_close(answers(reference.eval(), 2), answers(net, 2, 1.0), atol=1e-9, rtol=1e-9)


# From a trained run to files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    """What `pliant export` wrote at one point, in every format."""
    cli.main(["export", str(run), "--at", str(POINT)])
    return run / "export" / "0.75x"


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return open_run(run, ALONE)


def parent(trained: Trained, point: Point, number: int) -> Tensor:
    return answers(trained.at([point], trained.experiment.calibration)[point], number, width_of(point))


def near(got: Tensor, expected: Tensor) -> None:
    """To fp32's rounding; another width's logits would be off by half a unit."""
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


def without_pliant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports anything of Pliant from here on fails."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "pliant"] + ["pliant"]:
        monkeypatch.setitem(sys.modules, name, None)


batch_sizes = pytest.mark.parametrize("number", [1, 5])


@batch_sizes
def test_safetensors_file_fits_an_ordinary_network_and_gives_the_same_logits(trained, folder, number):
    weights = load_file(folder / "model.safetensors")
    assert all(weight.dtype in (torch.float32, torch.int64) for weight in weights.values())
    torch.manual_seed(1)
    plain = trained.recipe.build(10).skeleton(POINT.ratio)
    plain.load_state_dict(weights, strict=True)
    torch.testing.assert_close(answers(plain.eval(), number), parent(trained, POINT, number), atol=1e-9, rtol=1e-9)


@batch_sizes
@torch.no_grad()
def test_torch_program_gives_the_same_logits_without_pliant(trained, folder, number, monkeypatch):
    expected = parent(trained, POINT, number)
    without_pliant(monkeypatch)
    program = torch.export.load(folder / "model.pt2").module()
    near(program(images(number)), expected)


def test_neither_program_has_a_batch_norm_left(folder):
    import onnx

    program = torch.export.load(folder / "model.pt2")
    operators = {str(node.target) for node in program.graph.nodes} | {
        node.op_type for node in onnx.load(folder / "model.onnx").graph.node
    }
    assert any("conv" in name for name in operators)
    assert not any("batch" in name.lower() for name in operators)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_convolutions_take_in_the_batch_norm_behind_them(version):
    recipe = USNet(network=MobileNet(version=version, full=0.25, divisor=2))
    plain = recipe.export(calibrated(recipe, Width(0.55)), Width(0.55)).double()
    folded = absorbed(plain)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in plain.modules()), "a copy"
    torch.testing.assert_close(answers(folded, 5), answers(plain, 5), atol=1e-9, rtol=1e-9)


def test_a_norm_that_no_convolution_comes_before_stays():
    """Nor is one that does more, or has no statistics, or stands in a sequence that may run in another order."""

    class Backwards(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](self[1](x))

    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    def pair(norm: nn.Module) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(3, 3, 1), norm

    net = nn.Sequential(nn.BatchNorm2d(3), Backwards(*pair(nn.BatchNorm2d(3))), *pair(Activated(3)))
    net.extend([*pair(nn.BatchNorm2d(3, track_running_stats=False)), *pair(nn.BatchNorm2d(3))])
    folded = absorbed(shaken(net).double())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 4, "the last one alone is gone"
    torch.testing.assert_close(answers(folded, 5), answers(net, 5), atol=1e-9, rtol=1e-9)


@batch_sizes
def test_onnx_file_gives_the_same_logits(trained, folder, number):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images(number).numpy()})
    near(torch.from_numpy(logits), parent(trained, POINT, number))


def test_description_says_what_goes_in_and_comes_out(folder):
    described = json.loads((folder / "model.json").read_text())
    assert described["point"] == "0.75x"
    assert "(batch, 3, 32, 32)" in described["images"]
    assert described["mean"] == [0.4914, 0.4822, 0.4465], "of CIFAR-10, to one unit in the last place"
    assert described["deviation"] == [0.2470, 0.2435, 0.2616]
    assert described["classes"][0] == "airplane"
    assert described["trained"] == "tiny, 2 steps"
    written = {path.name for path in folder.iterdir()}
    assert written == {"model.json", "model.onnx", "model.pt2", "model.safetensors"}


def test_uneven_widths_are_exported_in_the_format_asked_for_to_the_folder_asked_for(trained, run, tmp_path, capsys):
    ratios = ["0.5", "1", "0.8"] * (trained.recipe.network.number_of_groups // 3)
    point = Widths(tuple(map(float, ratios)))
    cli.main(["export", str(run), "--at", "/".join(ratios), "--formats", "safetensors", "--to", str(tmp_path / "here")])
    written = sorted((tmp_path / "here").iterdir())
    assert [path.name for path in written] == ["model.json", "model.safetensors"]
    assert all(str(path) in capsys.readouterr().out for path in written[:1])
    plain = trained.recipe.build(10).skeleton(point.ratios)
    plain.load_state_dict(load_file(written[1]), strict=True)
    torch.testing.assert_close(answers(plain.eval(), 3), parent(trained, point, 3), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "An export is of one point, and 0 were given: write for instance --at 0.5."),
        (["--at", "0.5", "0.75"], "An export is of one point, and 2 were given"),
        (["--at", "0.25"], "Width 0.25 lies outside the trained range"),
        (["--at", "native"], "native is not a width"),
    ],
)
def test_what_cannot_be_exported_is_refused(options, said, run, capsys):
    assert said in refusal(capsys, "export", run, *options)


def test_method_without_widths_has_no_ordinary_network(tmp_path):
    trained = SimpleNamespace(recipe=Plain())
    with pytest.raises(UserError, match="Plain has no ordinary network to export"):
        export(trained, nn.Module(), Width(1.0), tmp_path / "none", ("safetensors",))
    assert not (tmp_path / "none").exists()
