"""An experiment is kept as JSON, compared on resume, and refused where it contradicts itself."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from pliant import record
from pliant.augmentation import Augmentation
from pliant.engine.resuming import RESUME_RULES, changes, differences, rule_on_resume
from pliant.errors import UserError
from pliant.experiment import Batching, Calibration, Data, Experiment, Optimization, Saving
from pliant.methods.s_net import SNet
from pliant.methods.urnet import URNet
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet
from pliant.recipe import Stage
from tests.small_recipes import Plain, TwoStages

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))

UNUSUAL = Experiment(
    name="unusual",
    recipe=USNet(network=MobileNet(version="v1", full=0.5), low=0.3, high=0.9, n=5, hard=0.5, hard_decay=True),
    data=Data(
        root=Path("/images"),
        class_list=Path("list.txt"),
        resize=99,
        scale=(0.3, 0.9),
        held_out=5,
        classes=12,
        augment="randaugment",
        augment_fill=(124, 116, 104),
        erasing=0.25,
        erasing_mode="pixel",
        mixup=0.8,
        cutmix=1.0,
        switch_probability=0.3,
    ),
    batch=Batching(images=96, micro=32),
    optimization=Optimization(steps=7, clip=1.0, ema=0.99, schedule="cosine"),
    calibration=Calibration(images=0, average="moving", augment=True),
    saving=Saving(every_steps=3, keep=4),
    precision="bf16",
    ranks=2,
    seed=2**63 - 1,
    runs=Path("elsewhere"),
    resume="auto",
)

OWN_RECIPE = """
from dataclasses import dataclass
from pliant.experiment import Experiment
from pliant.methods.us_net import USNet

@dataclass(frozen=True, kw_only=True)
class Own(USNet):
    taste: tuple[str, ...] = ("sour",)

EXPERIMENT = Experiment(name="own", recipe=Own(taste=("sweet", "salty"), low=0.5))
"""


def kept(folder: Path, experiment: Experiment) -> Path:
    (folder / "experiment.json").write_text(record.dump(experiment))
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_read_back_as_it_was_kept(path, tmp_path):
    experiment = record.load_recipe_file(path).EXPERIMENT
    assert record.load(kept(tmp_path, experiment)) == experiment


@pytest.mark.parametrize("experiment", [UNUSUAL, Experiment(name="stages", recipe=TwoStages())])
def test_every_setting_is_read_back(experiment, tmp_path):
    assert record.load(kept(tmp_path, experiment)) == experiment


def test_run_kept_before_augmentation_was_a_setting_is_read_as_one_without(tmp_path):
    plain = json.loads(record.dump(Experiment(name="old", recipe=Plain())))
    for item in dataclasses.fields(Augmentation):
        del plain["data"][item.name]
    (tmp_path / "experiment.json").write_text(json.dumps(plain))
    assert differences(record.load(tmp_path), Experiment(name="old", recipe=Plain())) == {}


def test_recipe_class_of_a_recipe_file_is_read_back_from_the_run_s_copy_of_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN_RECIPE)
    experiment = record.load_recipe_file(path).EXPERIMENT
    assert json.loads(record.dump(experiment))["recipe"]["type"] == "recipe.py:Own"
    path.rename(tmp_path / "recipe.py")
    loaded = record.load(kept(tmp_path, experiment))
    assert loaded.recipe.taste == ("sweet", "salty")
    assert differences(experiment, loaded) == {}
    (tmp_path / "recipe.py").unlink()
    with pytest.raises(UserError, match=r"There is no recipe file .*recipe\.py"):
        record.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"later": 1},
        {"precision": "fp8"},
        {"seed": "many"},
        {"data": {"source": "tape"}},
        {"batch": {"images": 8, "micro": 8, "macro": 8}},
        {"recipe": {"type": "pliant.methods.us_net:Gone"}},
        {"recipe": {"type": "pliant.methods.gone:Gone"}},
        {"recipe": {"type": "pliant.methods.us_net:USNet", "bread": 1}},
        {"recipe": None},
    ],
    ids=str,
)
def test_experiment_of_another_version_is_refused_by_name(change, tmp_path):
    plain = json.loads(record.dump(UNUSUAL))
    (tmp_path / "experiment.json").write_text(json.dumps(plain | change))
    with pytest.raises(UserError, match=r"experiment\.json was written by another version"):
        record.load(tmp_path)


def test_damaged_experiment_is_refused_by_name(tmp_path):
    text = record.dump(UNUSUAL)
    for content in (text[: len(text) // 2].encode(), b"", b"\xff\xfe"):
        (tmp_path / "experiment.json").write_bytes(content)
        with pytest.raises(UserError, match=r"experiment\.json is damaged"):
            record.load(tmp_path)


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run: it has no"):
        record.load(tmp_path)


def changed(**changes: object) -> Experiment:
    return dataclasses.replace(UNUSUAL, **changes)


def test_differences_are_named_as_on_the_command_line():
    assert differences(UNUSUAL, UNUSUAL) == {}
    assert differences(UNUSUAL, changed(seed=1)) == {"seed": (UNUSUAL.seed, 1)}
    micro = dataclasses.replace(UNUSUAL.batch, micro=16)
    network = dataclasses.replace(UNUSUAL.recipe.network, divisor=4)
    recipe = dataclasses.replace(UNUSUAL.recipe, network=network)
    assert differences(UNUSUAL, changed(batch=micro, recipe=recipe)) == {
        "batch.micro": (32, 16),
        "recipe.network.divisor": (8, 4),
    }


def test_another_method_is_a_difference_even_with_equal_settings():
    @dataclass(frozen=True, kw_only=True)
    class Renamed(Plain):
        pass

    before, after = Experiment(name="a", recipe=Plain()), Experiment(name="a", recipe=Renamed())
    assert differences(before, after) == {"recipe.type": ("Plain", "Renamed")}
    assert "recipe.widths" in differences(UNUSUAL, changed(recipe=SNet()))


def test_whatever_changes_the_training_is_fixed_on_resume():
    free = {
        "ranks",
        "runs",
        "resume",
        "verify_gradients",
        "timeout_minutes",
        "evaluate_epochs",
        "log_steps",
        "threads",
        "data.broken_share",
        "data.threads",
        "data.prefetch",
    }
    free |= {f"calibration.{item.name}" for item in dataclasses.fields(Calibration)}
    free |= {f"saving.{item.name}" for item in dataclasses.fields(Saving)}
    warned = {"data.root", "data.loader", "data.check", "compile", "backend", "deepspeed_config"}
    for name in names_of(UNUSUAL):
        expected = "free" if name in free else "warned" if name in warned else "fixed"
        assert rule_on_resume(name) == expected, name
    assert rule_on_resume("recipe.type") == "fixed"


def test_weights_that_a_run_began_with_may_lie_elsewhere_when_it_is_resumed(tmp_path):
    """It has long read them. A run that began with none is another run."""
    begun, moved, none = (
        dataclasses.replace(UNUSUAL, recipe=URNet(pretrained=path)) for path in (Path("a"), Path("b"), None)
    )
    assert changes(begun, moved, tmp_path) == []
    with pytest.raises(UserError, match=r"recipe\.pretrained was a and is None"):
        changes(begun, none, tmp_path)


def test_every_rule_on_resume_names_a_setting():
    """A slip of the pen would fix a setting that should be free."""
    names = names_of(UNUSUAL)
    for rule in RESUME_RULES:
        assert any(name == rule or name.startswith(rule + ".") for name in names), rule


@pytest.mark.parametrize(("source", "side"), [("folder", 96), ("shards", 96), ("cifar10", 32), ("svhn", 32)])
def test_images_of_files_have_the_size_asked_for(source, side):
    assert Data(source=source, size=96).side == side


def names_of(value: object, prefix: str = "") -> list[str]:
    if not dataclasses.is_dataclass(value):
        return [prefix[:-1]]
    items = dataclasses.fields(value)
    return [name for item in items for name in names_of(getattr(value, item.name), f"{prefix}{item.name}.")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_of_the_project_has_an_idle_setting(path):
    record.load_recipe_file(path).EXPERIMENT.data.refuse_idle()


@pytest.mark.parametrize("source", ["folder", "shards", "cifar10", "cifar100", "svhn"])
@pytest.mark.parametrize(
    "setting",
    [
        dict(loader="torchvision"),
        dict(size=32),
        dict(resize=40),
        dict(scale=(0.25, 1.0)),
        dict(jitter=0.4),
        dict(lighting=0.1),
        dict(class_list=Path("list.txt")),
        dict(check="header"),
        dict(broken_share=0.5),
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_files_are_refused_for_images_in_memory(setting, source):
    data = Data(source=source, **setting)  # a run that was kept with it is read back
    if source in ("folder", "shards"):
        data.refuse_idle()
        return
    name = next(iter(setting)).replace("_", "-")
    with pytest.raises(UserError, match=f"^--data.source {source} has no use for --data.{name}, .*: leave it out.$"):
        data.refuse_idle()


@dataclass(frozen=True, kw_only=True)
class Lopsided(Plain):
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(name="first", share=0.5), Stage(name="second", share=0.4))


@dataclass(frozen=True, kw_only=True)
class Staged(Plain):
    rate: float = 1.0
    batch: int = 1

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(name="all", learning_rate=self.rate, batch=self.batch),)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: Batching(images=100, micro=64), "100 images is no whole number of micro-batches of 64"),
    (lambda: Batching(images=64, micro=0), "no whole number of micro-batches of 0"),
    (lambda: Data(scale=(0.5, 0.2)), "cannot cover 0.5 to 0.2"),
    (lambda: Data(scale=(0.0, 1.0)), "cannot cover 0 to 1"),
    (lambda: Data(jitter=1.5), "between 0 and 1, not 1.5"),
    (lambda: Data(lighting=-0.1), "write 0 or more"),
    (lambda: Data(lighting=math.nan), "write 0 or more"),
    (lambda: Optimization(lr=math.nan), "lies above 0, not nan"),
    (lambda: Optimization(epochs=math.inf), "A run of inf epochs"),
    (lambda: Optimization(weight_decay=math.inf), "cannot decay by inf"),
    (lambda: Optimization(floor=1.0), "A share of the peak lies in [0, 1), not 1"),
    (lambda: Saving(every_minutes=0.0), "Checkpoints are some time apart"),
    (lambda: Experiment(name="a", recipe=Plain(), threads=0), "at least one thread"),
    (lambda: Experiment(name="a", recipe=Plain(), evaluate_epochs=1e-7), "Validations cannot be 1e-07 epochs apart"),
    (lambda: Experiment(name="a", recipe=Plain(), evaluate_epochs=-1.0), "Validations cannot be -1 epochs apart"),
    (lambda: Experiment(name="a", recipe=Plain(), evaluate_epochs=math.nan), "Validations cannot be nan epochs apart"),
    (lambda: Experiment(name="a", recipe=Staged(rate=-1.0)), "cannot learn at -1 times the learning rate"),
    (lambda: Experiment(name="a", recipe=Staged(batch=0)), "cannot take 0 times --batch.images"),
    (lambda: Data(size=0), "--data.size cannot be 0"),
    (lambda: Data(held_out=-1), "--data.held-out cannot be -1"),
    (lambda: Data(classes=1), "--data.classes cannot be 1"),
    (lambda: Data(threads=0), "--data.threads cannot be 0"),
    (lambda: Data(augment="randaugment", augment_ops=0), "cannot apply 0 operations"),
    (lambda: Data(augment="randaugment", augment_magnitude=31), "from 0 to 30, not 31"),
    (lambda: Data(augment="randaugment", augment_magnitude=-1), "from 0 to 30, not -1"),
    (lambda: Data(augment="autoaugment", augment_fill=(0, 256, 0)), "lie from 0 to 255: got (0, 256, 0)"),
    (lambda: Data(augment_ops=3), "--data.augment none has no use for --data.augment-ops"),
    (lambda: Data(augment_fill=(1, 1, 1)), "--data.augment none has no use for --data.augment-fill"),
    (lambda: Data(augment="autoaugment", augment_magnitude=5), "no use for --data.augment-magnitude"),
    (lambda: Data(augment="randaugment", augment_policy="svhn"), "no use for --data.augment-policy"),
    (lambda: Data(erasing=1.5), "with a probability from 0 to 1, not 1.5"),
    (lambda: Data(erasing_mode="pixel"), "--data.erasing-mode pixel has nothing to fill"),
    (lambda: Data(mixup=-0.2), "not -0.2: write for instance --data.mixup 0.2"),
    (lambda: Data(cutmix=float("inf")), "not inf: write for instance --data.cutmix 0.2"),
    (lambda: Data(cutmix=float("nan")), "not nan"),
    (lambda: Data(mixup=0.2, mix_probability=0.0), "above 0 and is at most 1, not 0"),
    (lambda: Data(mixup=0.2, cutmix=1.0, switch_probability=1.1), "lies from 0 to 1, not 1.1"),
    (lambda: Data(mix_probability=0.5), "Nothing is mixed, so --data.mix-probability 0.5"),
    (lambda: Data(mixup=0.2, switch_probability=0.1), "they are not both on"),
    (lambda: Optimization(steps=-1), "cannot be"),
    (lambda: Optimization(epochs=0), "trains nothing"),
    (lambda: Optimization(lr=-0.1), "A learning rate lies above 0, not -0.1"),
    (lambda: Optimization(momentum=1.0), "Momentum lies in [0, 1), not 1"),
    (lambda: Optimization(weight_decay=-1e-4), "Weights cannot decay by -0.0001"),
    (lambda: Optimization(warmup_epochs=-1), "A warm-up cannot last -1 epochs"),
    (lambda: Optimization(ema=1.0), "between 0 and 1, not 1"),
    (lambda: Optimization(clip=0.0), "above 0"),
    (lambda: Calibration(images=-1), "no variance with --calibration.images -1"),
    (lambda: Calibration(batch=1), "no variance over 1 images"),
    (lambda: Batching(images=4, micro=1), "no variance over a single image"),
    (lambda: Saving(keep=1), "at least two"),
    (lambda: Saving(every_steps=0), "at least one step apart"),
    (lambda: Experiment(name="a", recipe=Plain(), seed=-1), "not -1"),
    (lambda: Experiment(name="a", recipe=Plain(), seed=2**63), "lies in"),
    (lambda: Experiment(name="a", recipe=Plain(), log_steps=0), "at least one step apart"),
    (lambda: Experiment(name="a", recipe=Lopsided()), "add up to 1: got first 0.5, second 0.4"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_contradiction_is_refused_in_a_sentence(make, said):
    with pytest.raises(UserError) as caught:
        make()
    text = str(caught.value)
    assert said in text
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("set_in_file", "asked"),
    [
        (dict(augment="randaugment", augment_ops=3), ["--data.augment", "none"]),
        (dict(augment="randaugment", augment_magnitude=12), ["--data.augment", "autoaugment"]),
        (dict(augment="randaugment", augment_fill=(124, 116, 104)), ["--data.augment", "none"]),
        (dict(augment="autoaugment", augment_policy="svhn"), ["--data.augment", "randaugment"]),
        (dict(erasing=0.25, erasing_mode="pixel"), ["--data.erasing", "0"]),
        (dict(mixup=0.2, mix_probability=0.5), ["--data.mixup", "0"]),
        (dict(mixup=0.2, cutmix=1.0, switch_probability=0.7), ["--data.cutmix", "0"]),
    ],
)
def test_what_the_recipe_file_sets_is_taken_back_by_what_the_refusal_says_to_write(set_in_file, asked):
    default = Experiment(name="a", recipe=UNUSUAL.recipe, data=Data(**set_in_file))
    with pytest.raises(UserError) as caught:
        tyro.cli(Experiment, default=default, args=asked)
    said = re.search(r"where the recipe file sets it, write (--data[^)]*)\)", str(caught.value))
    assert said is not None
    assert tyro.cli(Experiment, default=default, args=[*asked, *said[1].split()]).data != default.data
