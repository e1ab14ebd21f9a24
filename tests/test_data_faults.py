"""A broken image never ends a run: the same other one stands in for it, whoever asks and whenever it broke."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pliant.data import Batch, Feed, open_dataset, thumbnails
from pliant.data.decoding import check
from pliant.data.faults import FEW
from pliant.data.index import Index, scan
from pliant.data.loaders import Request
from pliant.data.loaders.dali import DaliLoader
from pliant.data.loaders.torchvision import TorchvisionLoader
from pliant.data.plan import centre_plan, training_plan
from pliant.errors import UserError, printable
from pliant.experiment import Batching, Data
from pliant.randomness import philox
from tests.runs import Launch, command, finish, only_run

LOADERS = [
    pytest.param("dali", marks=pytest.mark.skipif(find_spec("nvidia") is None, reason="DALI is not installed")),
    "torchvision",
]
BATCHING = Batching(images=12, micro=3)

pytestmark = pytest.mark.usefixtures("own_cache")


def write(path: Path, height: int, width: int) -> None:
    """A JPEG of coloured noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([height, width])
    coarse = generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(path, quality=90)


def make_folder(root: Path) -> Path:
    """Three classes of eight training images and four validation images, all of different sizes."""
    for split, images in (("train", 8), ("val", 4)):
        for number, name in enumerate(("cat", "dog", "newt")):
            for image in range(images):
                write(root / split / name / f"{image}.jpg", 40 + 7 * image + number, 90 - 5 * image)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "jpegs")


def make_feed(root: Path, loader: str, **settings) -> Feed:
    data = Data(root=root, size=16, jitter=0.2, **{"loader": loader, **settings})
    feed = Feed(open_dataset(data, 5), data, BATCHING, seed=5, device="cpu")
    feed.faults.tell = lambda text: None
    return feed


def trained(feed: Feed, steps: range = range(4), micro_batches: tuple[int, ...] = (0, 1, 2, 3)) -> list[Batch]:
    with feed.training(stage=0, first_step=steps.start, last_step=steps.stop, micro_batches=micro_batches) as batches:
        return list(batches)


def evaluated(feed: Feed, batch: int, ranks: int = 1) -> list[Batch]:
    with ExitStack() as stack:
        served = [
            stack.enter_context(feed.evaluation("val", batch=batch, rank=rank, ranks=ranks)) for rank in range(ranks)
        ]
        return [one for batches in served for one in batches]


def assert_same(ones: list[Batch], others: list[Batch]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def noisy(content: bytes) -> bytes:
    return content[:-200] + np.random.default_rng(0).bytes(100) + content[-100:]


def gif(content: bytes) -> bytes:
    target = io.BytesIO()
    Image.open(io.BytesIO(content)).save(target, "GIF")
    return target.getvalue()


BREAKING: dict[str, Callable[[bytes], bytes]] = {
    "halved": lambda content: content[: len(content) // 2],
    "without its last bytes": lambda content: content[:-20],
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "text": lambda content: b"not an image",
    "header alone": lambda content: content[:300],
    "zeros": lambda content: content[: len(content) // 3] + bytes(len(content) - len(content) // 3),
    "a GIF": gif,
}
LATER = BREAKING | {
    "with other bytes": noisy,
    "longer": lambda content: content + b"0",
    "gone": lambda content: None,  # type: ignore[dict-item, return-value]
}


def damage(file: str, how: Callable[[bytes], bytes]) -> None:
    content = how(Path(file).read_bytes())
    if content is None:
        os.unlink(file)
    else:
        Path(file).write_bytes(content)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", BREAKING)
def test_what_is_broken_when_indexed_is_stood_in_for(kind, loader, folder):
    damage(str(folder / "train" / "dog" / "3.jpg"), BREAKING[kind])  # position 11
    feed = make_feed(folder, loader)
    train = feed.dataset.train
    assert isinstance(train, Index)
    assert train.broken.tolist() == [11]
    batches = trained(feed)
    whole = np.concatenate([batch.positions for batch in batches])
    order = [feed._order.samples(0, step, micro, BATCHING) for step in range(4) for micro in range(4)]
    np.testing.assert_array_equal(whole, np.where(np.concatenate(order) == 11, 12, np.concatenate(order)))
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), train.labels[whole])
    assert feed.faults.found == {}
    (note,) = feed.dataset.notes()
    assert f"1 of the 24 training images is broken, another of its class stands in for each: {train.path(11)}" in note


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", LATER)
def test_what_breaks_later_is_stood_in_for_as_if_it_had_been_known(kind, loader, folder, tmp_path):
    """The windows are those of the stand-in's size: 12 was indexed with another one than 11."""
    known = make_folder(tmp_path / "known")
    damage(str(known / "train" / "dog" / "3.jpg"), BREAKING["halved"])
    feed = make_feed(folder, loader)
    told: list[str] = []
    feed.faults.tell = told.append
    file = str(folder / "train" / "dog" / "3.jpg")
    damage(file, LATER[kind])
    expected = make_feed(known, loader)
    for steps in (range(4), range(4)):
        assert_same(trained(feed, steps), trained(expected, steps))
    assert list(feed.faults.found) == [file]
    assert len(told) == 1
    assert f"the image {file} is broken (" in told[0]
    settings = dict(images=0, batch=6, seed=1)
    for augment in (False, True):
        with feed.calibration(**settings, augment=augment) as ones:
            got = list(ones)
        with expected.calibration(**settings, augment=augment) as others:
            assert_same([batch for _, batch in got], [batch for _, batch in others])


@pytest.mark.parametrize("loader", LOADERS)
def test_a_stand_in_may_be_broken_too(loader, folder):
    feed = make_feed(folder, loader)
    for image in (6, 7, 0):  # the last of its class goes on with the first
        damage(str(folder / "train" / "dog" / f"{image}.jpg"), LATER["gone"])
    positions = torch.cat([batch.positions for batch in trained(feed)])
    assert not {14, 15, 8} & set(positions.tolist())
    order = np.concatenate([feed._order.samples(0, step, micro, BATCHING) for step in range(4) for micro in range(4)])
    np.testing.assert_array_equal(positions, np.where(np.isin(order, [14, 15, 8]), 9, order))
    assert len(feed.faults.found) == 3


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    known=st.sets(st.integers(0, 23), max_size=4),
    late=st.sets(st.integers(0, 23), max_size=4),
    first=st.integers(0, 3),
    micro_batches=st.permutations(range(4)),
    ranks=st.integers(1, 4),
)
@pytest.mark.parametrize("loader", LOADERS)
def test_order_and_crops_do_not_depend_on_rank_loader_or_history(loader, known, late, first, micro_batches, ranks):
    """Beside the pixels, which differ by rounding from loader to loader."""
    with tempfile.TemporaryDirectory() as temporary:
        root = make_folder(Path(temporary))
        paths = [str(root / "train" / name / f"{image}.jpg") for name in ("cat", "dog", "newt") for image in range(8)]
        for position in known:
            damage(paths[position], BREAKING["halved"])
        feeds = [
            make_feed(root, one, threads=threads) for one, threads in ((loader, 2), ("torchvision", 1), (loader, 1))
        ]
        for position in late - known:
            damage(paths[position], LATER["gone"])
        broken = known | late
        feed, reference, resumed = feeds
        whole = trained(feed, range(4))
        for batch, other in zip(whole, trained(reference, range(4)), strict=True):
            assert torch.equal(batch.positions, other.positions)
            assert not broken & set(batch.positions.tolist())
            assert (batch.images - other.images).abs().mean() < 0.01
        for rank in range(ranks):
            own = tuple(micro_batches[rank::ranks])
            expected = [whole[4 * step + micro] for step in range(first, 4) for micro in own]
            assert_same(trained(resumed, range(first, 4), own), expected)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch", [3, 5, 12])
def test_validation_leaves_broken_images_out_and_counts_each_other_once(batch, ranks, loader, folder):
    damage(str(folder / "val" / "cat" / "0.jpg"), BREAKING["empty"])
    feed = make_feed(folder, loader)
    for image in range(1, 4):  # with the first, all of a batch of three
        damage(str(folder / "val" / "cat" / f"{image}.jpg"), LATER["gone"])
    damage(str(folder / "val" / "newt" / "3.jpg"), LATER["halved"])
    expected = make_feed(folder, loader)
    batches = evaluated(feed, batch, ranks)
    assert sorted(torch.cat([one.positions for one in batches]).tolist()) == list(range(4, 11))
    assert all(len(one.images) == len(one.labels) == len(one.positions) > 0 for one in batches)
    val = feed.dataset.split("val")
    for one in batches:
        np.testing.assert_array_equal(one.labels, val.labels[one.positions])
    # Each image is the one at its position.
    whole = {int(k): image for one in evaluated(feed, 12) for k, image in zip(one.positions, one.images, strict=True)}
    again = [image for one in evaluated(expected, 12) for image in one.images]
    for one in batches:
        for position, image in zip(one.positions.tolist(), one.images, strict=True):
            assert torch.equal(image, whole[position])
    assert all(torch.equal(one, other) for one, other in zip(whole.values(), again, strict=True))
    assert len(feed.faults.found) == 4
    (note,) = feed.dataset.notes()
    assert "1 of the 12 validation images is broken, accuracy is over the 11 others" in note


def test_a_broken_image_is_left_out_of_a_picture(folder):
    index = scan(folder / "val", None)
    positions = np.array([7, 2, 0, 11])
    whole, shown = thumbnails(index, positions, 24)
    assert whole.shape == (4, 24, 24, 3)
    assert shown.tolist() == [0, 1, 2, 3]
    damage(index.path(2), LATER["halved"])
    damage(index.path(11), LATER["gone"])
    pictures, shown = thumbnails(index, positions, 24)
    assert shown.tolist() == [0, 2]
    np.testing.assert_array_equal(pictures, whole[[0, 2]])
    nothing, shown = thumbnails(index, np.array([2, 11]), 24)
    assert nothing.shape == (0, 24, 24, 3)
    assert shown.tolist() == []


@pytest.mark.parametrize("loader", LOADERS)
def test_too_many_broken_images_end_the_run(loader, folder):
    for image in range(FEW // 2):
        for name in ("cat", "dog"):
            damage(str(folder / "train" / name / f"{image}.jpg"), BREAKING["halved"])
    feed = make_feed(folder, loader)
    trained(feed)  # as many as are put up with
    damage(str(folder / "train" / "newt" / "7.jpg"), LATER["gone"])
    words = r"11 of the 24 images in .* are broken, more than 10, for instance .*newt/7\.jpg \(No such file"
    with pytest.raises(UserError, match=words):
        trained(feed)
    damage(str(folder / "train" / "newt" / "6.jpg"), BREAKING["halved"])
    (folder / "train" / "newt").touch()
    with pytest.raises(UserError, match=r"write a larger --data\.broken-share than 0\.01"):
        make_feed(folder, loader)
    trained(make_feed(folder, loader, broken_share=0.5))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_split_without_a_sound_image_ends_the_run_however_small(loader, folder):
    for name in ("dog", "newt"):
        shutil.rmtree(folder / "val" / name)
    files = sorted((folder / "val" / "cat").iterdir())
    feed = make_feed(folder, loader, broken_share=1.0)
    for file in files[:3]:
        damage(str(file), LATER["halved"])
    assert [len(batch.positions) for batch in evaluated(feed, 2)] == [1]
    damage(str(files[3]), LATER["halved"])
    words = r"None of the 4 images in .*val that are asked for can be read, for instance .*3\.jpg \("
    with pytest.raises(UserError, match=words):
        evaluated(feed, 2)
    (folder / "val" / "cat").touch()
    with pytest.raises(UserError, match=words.replace("3", "0")):
        make_feed(folder, loader, broken_share=1.0)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_class_without_a_sound_image_ends_the_run(loader, folder):
    feed = make_feed(folder, loader)
    for image in range(8):
        damage(str(folder / "train" / "dog" / f"{image}.jpg"), LATER["halved"])
    with pytest.raises(UserError, match=r"No image of the class dog can be read, for instance .*dog"):
        trained(feed)
    (folder / "train" / "dog").touch()
    with pytest.raises(UserError, match=r"No image of the class dog can be read, for instance .*dog"):
        make_feed(folder, loader)


@pytest.mark.parametrize("loader", LOADERS)
def test_broken_images_are_found_in_training_where_only_headers_were_read(loader, folder):
    """Windows over the whole image: from others a decoder may not see it."""
    damage(str(folder / "train" / "dog" / "3.jpg"), BREAKING["halved"])
    feed = make_feed(folder, loader, check="header")
    assert not len(feed.dataset.train.broken)  # type: ignore[union-attr]
    for known in (feed, make_feed(folder, loader)):
        with known.calibration(images=0, batch=6, seed=1, augment=False) as batches:
            served = [batch for _, batch in batches]
        if known is feed:
            first = served
    assert_same(first, served)
    assert list(feed.faults.found) == [str(folder / "train" / "dog" / "3.jpg")]


@pytest.mark.parametrize("loader", LOADERS)
def test_an_image_of_another_size_is_found_without_a_checksum(loader, folder):
    """Of the same length in bytes, so that only the decoder can tell."""
    feed = make_feed(folder, loader, check="header")
    file = folder / "train" / "dog" / "3.jpg"
    length = file.stat().st_size
    write(file, 20, 20)
    file.write_bytes(file.read_bytes() + bytes(length - file.stat().st_size))
    with feed.calibration(images=0, batch=6, seed=1, augment=False) as batches:
        positions = torch.cat([batch.positions for _, batch in batches])
    assert np.bincount(positions, minlength=24).tolist() == [*[1] * 11, 0, 2, *[1] * 11]
    assert list(feed.faults.found) == [str(file)]


def test_what_dali_alone_cannot_decode_pillow_does(folder):
    pytest.importorskip("nvidia.dali")
    Image.fromarray(np.eye(64, dtype=np.bool_)).save(folder / "train" / "dog" / "3.tif")
    feed, other = make_feed(folder, "dali"), make_feed(folder, "torchvision")
    told: list[str] = []
    feed.faults.tell = told.append
    ones, others = trained(feed), trained(other)
    assert 12 in torch.cat([one.positions for one in ones])
    for one, reference in zip(ones, others, strict=True):
        assert torch.equal(one.positions, reference.positions)
        assert (one.images - reference.images).abs().mean() < 0.01
    assert feed.faults.found == {}
    assert len(told) == 1
    assert "DALI cannot decode" in told[0]


def test_where_dali_fails_for_good_the_run_ends_instead_of_crawling(folder):
    """DALI decodes no image of one bit; a batch that it decodes begins the count anew."""
    pytest.importorskip("nvidia.dali")
    for number in range(2):
        (folder / "train" / "cat" / f"{number}.jpg").unlink()
    write(folder / "train" / "cat" / "0.jpg", 64, 64)
    Image.fromarray(np.eye(64, dtype=np.bool_)).save(folder / "train" / "cat" / "1.tif")
    index = scan(folder / "train", None)
    plan = centre_plan(index.sizes[:1], Data(size=16))
    served: list[int] = []

    def serve(order: list[int]) -> None:
        loader = DaliLoader(index, 2, torch.device("cpu"))
        for request, _ in loader.stream([Request(np.array([position]), plan) for position in order]):
            served.extend(request.positions.tolist())

    serve([*[1] * 7, 0, *[1] * 7])
    assert served == [*[1] * 7, 0, *[1] * 7]
    with pytest.raises(UserError, match=r"cannot decode 8 batches in a row .*: write --data\.loader torchvision\.$"):
        serve([0, *[1] * 12])
    assert served[15:] == [0, *[1] * 7]


def odd_images(root: Path) -> dict[str, Path]:
    """What decodes, however unusual: by kind."""
    generator = np.random.default_rng(1)
    coarse = generator.integers(0, 256, (14, 18, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((130, 100), Image.Resampling.BILINEAR)
    grey = (np.asarray(picture.convert("L"), np.uint16) << 8) | 0x33
    exif = Image.Exif()
    exif[0x0112] = 6
    images: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "png": (picture, "PNG", {}),
        "cmyk": (picture.convert("CMYK"), "JPEG", {}),
        "grey": (picture.convert("L"), "JPEG", {}),
        "sixteen": (Image.fromarray(grey), "PNG", {}),
        "exif": (picture, "JPEG", {"exif": exif}),
        "progressive": (picture, "JPEG", {"progressive": True}),
        "palette": (picture.convert("P"), "PNG", {}),
        "alpha": (picture.convert("RGBA"), "PNG", {}),
        "tiny": (picture.resize((1, 1)), "JPEG", {}),
        "wide": (picture.resize((20_000, 40)), "JPEG", {}),
        "high": (picture.resize((3, 20_000)), "PNG", {}),
    }
    for kind, (image, form, options) in images.items():
        (root / kind).mkdir(parents=True)
        image.save(root / kind / "x.JPEG", form, **options)
    return {kind: root / kind / "x.JPEG" for kind in images}


def test_unusual_images_are_no_faults_and_loaders_agree_on_them(tmp_path):
    pytest.importorskip("nvidia.dali")
    kinds = sorted(odd_images(tmp_path / "odd"))
    index = scan(tmp_path / "odd", None)
    assert not len(index.broken)
    assert index.sizes[kinds.index("exif")].tolist() == [100, 130]
    positions = np.repeat(np.arange(len(index)), 6)
    cropped = training_plan(index.sizes[positions], Data(size=64), lambda purpose: philox(3, purpose))
    for plan in (cropped, centre_plan(index.sizes[positions], Data(size=64))):
        parts = [slice(first, first + 6) for first in range(0, len(positions), 6)]
        requests = [Request(positions[part], plan.part(part)) for part in parts]
        served = [
            [images for _, images in loader(index, 2, torch.device("cpu")).stream(requests)]
            for loader in (DaliLoader, TorchvisionLoader)
        ]
        for kind, one, other in zip(kinds, *served, strict=True):
            assert (one.float() - other).abs().mean(dim=(1, 2, 3)).max() <= 0.3, kind
            assert one.float().std() > 5 or kind == "tiny", kind


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ppm", b"P6 2 2 100\n" + bytes(12), "the highest of its colours is 100 in PPM"),
        ("pgm", b"P5 2 2 1\n" + bytes(4), "the highest of its colours is 1 in PPM"),
        ("tif", None, "it is a TIFF of orientation 3"),
    ],
)
def test_what_loaders_read_unlike_is_a_fault(tmp_path, name, content, said):
    """DALI and torchvision would serve other pixels of them, without a word."""
    for place in (tmp_path / "images" / "a", tmp_path / "images" / "b"):
        place.mkdir(parents=True)
        Image.new("RGB", (4, 6)).save(place / "0.png")
        file = place / f"1.{name}"
        if content is None:
            exif = Image.Exif()
            exif[0x0112] = 3
            Image.new("RGB", (4, 6)).save(file, exif=exif)
        else:
            file.write_bytes(content)
    index = scan(tmp_path / "images", None)
    assert index.broken.tolist() == [1, 3]
    assert said in index.reason(1)
    assert scan(tmp_path / "images", None, strict=False).broken.tolist() == [1, 3]


def test_plain_bitmaps_have_no_highest_colour():
    assert check(b"P1\n2 2\n1 0 0 1\n") == (2, 2)


def test_the_truncated_photograph_is_a_fault(shared_data, tmp_path):
    (truncated,) = (shared_data / "photos_odd").glob("*truncated*")
    whole = next((shared_data / "photos" / truncated.name[:9]).glob("*"))
    for name, file in (("0.JPEG", truncated), ("1.JPEG", whole)):
        for place in ("a", "b"):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / name).write_bytes(file.read_bytes())
    index = scan(tmp_path, None)
    assert index.broken.tolist() == [0, 2]
    assert index.replaced(np.arange(4)).tolist() == [1, 1, 3, 3]
    assert "truncated" in index.reason(2)


def short_run(folder: Path, runs: Path) -> list[str]:
    """The command line of three steps that take each training image once, and a validation."""
    asked: dict[str, object] = {
        "data.root": folder,
        "data.size": 32,
        "runs": runs,
        "recipe.network.full": 0.25,
        "batch.images": 8,
        "batch.micro": 4,
        "optimization.steps": 3,
        "optimization.warmup-epochs": 0,
        "calibration.images": 8,
        "calibration.batch": 4,
        "log-steps": 1,
    }
    return [text for name, value in asked.items() for text in (f"--{name}", str(value))]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_what_any_rank_meets_stands_in_the_log(folder, tmp_path):
    broken = {str(folder / "train" / name / f"{image}.jpg") for name in ("cat", "dog", "newt") for image in (1, 5)}
    broken.add(str(folder / "val" / "dog" / "1.jpg"))
    for file in broken:
        damage(file, BREAKING["halved"])
    given = [*short_run(folder, tmp_path / "runs"), "--data.check", "header", "--data.loader", "torchvision"]
    for status, said in Launch(command(*given, recipe="usnet_sample")).start().finish():
        assert status == 0, said
    log = events(only_run(tmp_path / "runs"))
    elsewhere = {event["image"]: event["reason"] for event in log if event["event"] == "broken"}
    assert 0 < len(elsewhere) < len(broken)
    assert all("truncated" in reason for reason in elsewhere.values())
    warnings = " ".join(event["text"] for event in log if event["event"] == "warning")
    assert {file for file in broken if f"the image {file} is broken" in warnings} == broken - elsewhere.keys()
    assert f"{len(elsewhere)} more image" in warnings
    (end,) = [event for event in log if event["event"] == "end"]
    assert (end["broken"], end["broken_known"]) == (len(broken), 0)


def test_a_run_goes_on_and_says_so(folder, tmp_path):
    """From the command line to the spectrum, one of the broken images with a name that is no UTF-8."""
    broken = [folder / "train" / "cat" / "2.jpg", folder / "val" / "dog" / os.fsdecode(b"\xff.jpg")]
    (folder / "val" / "dog" / "1.jpg").rename(broken[1])
    for file in broken:
        damage(str(file), BREAKING["halved"])
    given = short_run(folder, tmp_path / "runs")
    done = finish(command(*given, recipe="usnet_sample"))
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "runs")
    log = events(run)
    warnings = [event["text"] for event in log if event["event"] == "warning"]
    expected = ("1 of the 24 training images is broken, another", "1 of the 12 validation images is broken, acc")
    for file, words in zip(broken, expected, strict=True):
        assert [words in warning and printable(str(file)) in warning for warning in warnings].count(True) == 1
        assert words in done.stdout.replace("\n", " ")
    assert log[-1]["event"] == "end"
    assert (log[-1]["broken"], log[-1]["broken_known"]) == (0, 2)
    assert {line["images"] for line in json.loads((run / "spectrum.json").read_text())["lines"]} == {11}
    assert "top-1 on 11 images" in done.stdout


@pytest.mark.parametrize("loader", LOADERS)
def test_an_image_whose_name_is_no_text_is_served_and_named_as_a_terminal_shows_it(loader, folder):
    names = [folder / "train" / "dog" / os.fsdecode(name) for name in (b"\xe9t\xe9.jpg", b"\xff.jpg")]
    for number, name in enumerate(names):
        (folder / "train" / "dog" / f"{number}.jpg").rename(name)
    feed = make_feed(folder, loader)
    damage(str(names[1]), LATER["gone"])
    told: list[str] = []
    feed.faults.tell = told.append
    positions = torch.cat([batch.positions for batch in trained(feed)]).tolist()
    assert 14 in positions
    assert feed.faults.found.keys() == {str(names[1])}
    assert [r"train/dog/\xff.jpg is broken" in text for text in told] == [True]
    "".join(told).encode()  # raises where it cannot be printed
