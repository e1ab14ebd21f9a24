"""What is found on disk, what is kept of it, and what is said where the folder is not as it should be."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pliant.data import Feed, open_dataset
from pliant.data.dataset import held_out_positions
from pliant.data.decoding import Faulty, size_of
from pliant.data.index import scan
from pliant.data.index.split import read
from pliant.errors import UserError
from pliant.experiment import Batching, Data

pytestmark = pytest.mark.usefixtures("own_cache")


def refusal(root: Path | None, **settings) -> str:
    """What `open_dataset` says, which must be one sentence."""
    with pytest.raises(UserError) as caught:
        open_dataset(Data(root=root, **settings), seed=0)
    return one_sentence(str(caught.value))


def one_sentence(text: str) -> str:
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_scan_finds_every_image_with_label_and_size(image_folder):
    (image_folder / "train" / "cat" / "notes.txt").write_text("no image")
    (image_folder / "train" / "cat" / "._0.png").write_text("what macOS leaves behind")
    (image_folder / "train" / "dog" / "more").mkdir()
    Image.new("RGB", (7, 9)).save(image_folder / "train" / "dog" / "more" / "x.JPG")
    index = scan(image_folder / "train", None)
    assert index.classes == ("cat", "dog", "newt")
    assert np.bincount(index.labels).tolist() == [8, 9, 8]
    for position in range(len(index)):
        with Image.open(index.path(position)) as image:
            assert (image.height, image.width) == tuple(index.sizes[position])
    assert index.path(16) == str(image_folder / "train" / "dog" / "more" / "x.JPG")
    part = index.subset(np.array([16, 2]))
    assert [part.path(0), part.path(1)] == [index.path(16), index.path(2)]
    assert part.labels.tolist() == [1, 0]


def test_sizes_are_those_before_an_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 20)).save(tmp_path / name / "x.jpg", exif=exif)
    assert scan(tmp_path, None).sizes.tolist() == [[20, 30], [20, 30]]


@pytest.mark.parametrize(("suffix", "side"), [("png", 1), ("jpg", 1), ("jpg", 7), ("webp", 3)])
def test_the_smallest_images_are_sound(suffix, side, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (side, side)).save(tmp_path / name / f"x.{suffix}")
    index = scan(tmp_path, None)
    assert not len(index.broken)
    assert index.sizes.tolist() == [[side, side]] * 2


def test_stored_bytes_are_those_of_the_file(image_folder):
    index = scan(image_folder / "train", None)
    part = index.subset(np.array([20, 3, 11]))
    for position, whole in enumerate((20, 3, 11)):
        assert part.encoded(position) == index.encoded(whole) == Path(index.path(whole)).read_bytes()


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The files that an indexing opens."""
    files: list[str] = []

    def noting(path: str, offset: int, length: int) -> bytes:
        files.append(path)
        return read(path, offset, length)

    monkeypatch.setattr("pliant.data.index.examine.read", noting)
    return files


def test_cache_serves_until_a_folder_changes(image_folder, opened, draw_image):
    folder = image_folder / "train"
    (folder / "dog" / "more").mkdir()
    draw_image(folder / "dog" / "more" / "z.png", 30, 40)
    before = scan(folder, None)
    assert len(opened) == len(before) == 25

    opened.clear()
    again = scan(folder, ["newt", "cat", "dog"])
    assert not opened
    np.testing.assert_array_equal(again.sizes, before.sizes)
    assert again.classes[again.labels[0]] == "cat"

    for change, images in (
        (lambda: draw_image(folder / "dog" / "more" / "y.png", 11, 13), 26),
        (lambda: (folder / "dog" / "more" / "y.png").unlink(), 25),
        (lambda: (folder / "cat" / "0.png").rename(folder / "cat" / "9.png"), 25),
        (lambda: (folder / "newt").rename(folder / "eft"), 25),
        (lambda: draw_image(folder / "ant" / "0.png", 11, 13), 26),
    ):
        change()
        opened.clear()
        index = scan(folder, None)
        assert len(opened) == len(index) == images
        assert all(Path(index.path(position)).is_file() for position in range(images))
        opened.clear()
        scan(folder, None)
        assert not opened


def test_copies_that_take_turns_at_one_path_are_each_indexed_once(image_folder, opened, tmp_path):
    """As on machines that share a home, each with a copy on a disk of its own."""
    folder, one, other = image_folder / "train", tmp_path / "one", tmp_path / "other"
    shutil.copytree(folder, other)
    for _ in range(2):
        scan(folder, None)
        folder.rename(one)
        other.rename(folder)
        scan(folder, None)
        folder.rename(other)
        one.rename(folder)
    assert len(opened) == 2 * 24


def test_a_file_changed_in_its_place_is_noticed_when_it_is_read(image_folder, opened, draw_image):
    folder = image_folder / "train"
    files = [Path(scan(folder, None).path(position)) for position in range(3)]
    longer, changed, shorter = (file.read_bytes() for file in files)
    middle = len(changed) // 2
    longer, changed, shorter = longer + b"0", changed[:middle] + bytes(9) + changed[middle + 9 :], shorter[:-9]
    for file, content in zip(files, (longer, changed, shorter), strict=True):
        file.write_bytes(content)
    opened.clear()
    index = scan(folder, None)
    assert not opened
    for position, words in (
        (0, f"more than {len(longer) - 1} b"),
        (1, "but others"),
        (2, f" {len(shorter)} bytes, not"),
    ):
        with pytest.raises(Faulty, match=words):
            index.encoded(position)
    folder.joinpath("cat").touch()  # to have it indexed anew
    index = scan(folder, None)
    assert index.encoded(0) == longer  # bytes after an image's end do no harm
    assert index.broken.tolist() == [1, 2]


def test_a_broken_file_that_is_mended_in_its_place_is_noticed(image_folder, draw_image):
    folder = image_folder / "train"
    file = folder / "dog" / "0.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:-60])
    assert scan(folder, None).broken.tolist() == [8]
    file.write_bytes(whole)
    assert scan(folder, None).broken.tolist() == []


def test_storage_that_stumbles_is_asked_again(image_folder, monkeypatch):
    index = scan(image_folder / "train", None)
    whole, asked = index.encoded(3), []

    def stumbling(path: str, flags: int) -> int:
        asked.append(path)
        if len(asked) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return opening(path, flags)

    opening = os.open
    monkeypatch.setattr("pliant.data.index.split._PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr("pliant.data.index.split.os.open", stumbling)
    assert index.encoded(3) == whole
    assert asked == [index.path(3)] * 3


def failing_at(file: Path, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Whoever asks for this file meets the error, whichever call it makes; all others are served."""

    def failing(call: Callable[..., object]) -> Callable[..., object]:
        def instead(path: object, *given: object, **more: object) -> object:
            if path == str(file):
                raise error
            return call(path, *given, **more)

        return instead

    patch.setattr("pliant.data.index.split._PAUSES_S", (0.0, 0.0))
    patch.setattr("pliant.data.index.split.os.open", failing(os.open))
    patch.setattr("pliant.data.index.examine.size_of", failing(size_of))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("failure", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.EREMOTEIO])
def test_storage_that_fails_while_indexing_breaks_no_image_for_good(failure, strict, image_folder, opened):
    folder = image_folder / "train"
    file = folder / "dog" / "3.png"
    with pytest.MonkeyPatch.context() as patch:
        failing_at(file, OSError(failure, os.strerror(failure)), patch)
        with pytest.raises(UserError) as caught:
            scan(folder, None, strict=strict)
    said = one_sentence(str(caught.value))
    assert f"{file} could not be read while it was indexed ({os.strerror(failure)})" in said
    assert not len(scan(folder, None, strict=strict).broken)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fault", [errno.ENOENT, errno.EACCES, errno.ELOOP])
def test_a_file_that_is_not_ours_to_read_or_leads_nowhere_is_broken(fault, strict, image_folder):
    folder = image_folder / "train"
    with pytest.MonkeyPatch.context() as patch:
        failing_at(folder / "dog" / "3.png", OSError(fault, os.strerror(fault)), patch)
        index = scan(folder, None, strict=strict)
    assert index.broken.tolist() == [11]
    assert index.reason(11) == os.strerror(fault)


def test_too_little_memory_while_indexing_breaks_no_image_for_good(image_folder, monkeypatch):
    folder = image_folder / "train"

    def exhausted(encoded: bytes) -> tuple[int, int]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("pliant.data.index.examine.check", exhausted)
        with pytest.raises(UserError, match=r"too little memory to index .*\.png: start where there is more"):
            scan(folder, None)
    assert not len(scan(folder, None).broken)


@pytest.mark.parametrize("shortage", [errno.EMFILE, errno.ENOMEM])
def test_a_shortage_of_the_process_breaks_no_image(shortage, image_folder, monkeypatch):
    index = scan(image_folder / "train", None)

    def failing(*_: object) -> int:
        raise OSError(shortage, os.strerror(shortage))

    with monkeypatch.context() as patch:
        patch.setattr("pliant.data.index.split.os.open", failing)
        with pytest.raises(OSError, match=os.strerror(shortage)):
            index.encoded(3)


def test_headers_alone_serve_where_no_more_is_asked(image_folder, opened):
    folder = image_folder / "train"
    file = folder / "dog" / "0.png"
    file.write_bytes(file.read_bytes()[:-60])
    quick = scan(folder, None, strict=False)
    assert not opened
    assert not len(quick.broken)
    assert quick.encoded(8) == file.read_bytes()
    strict = scan(folder, None)
    assert len(opened) == 24
    assert strict.broken.tolist() == [8]
    np.testing.assert_array_equal(np.delete(strict.sizes, 8, 0), np.delete(quick.sizes, 8, 0))
    assert scan(folder, None, strict=False).broken.tolist() == [8]  # what is known better is kept
    assert len(opened) == 24


@pytest.mark.parametrize("length", [0, 5, 100, 600, -1])
def test_a_damaged_cache_is_read_past(image_folder, own_cache, length):
    before = scan(image_folder / "train", None)
    (file,) = (own_cache / "pliant").glob("*.safetensors")
    content = file.read_bytes()
    file.unlink()  # `before` is mapped from it
    file.write_bytes(content[:length])
    after = scan(image_folder / "train", None)
    np.testing.assert_array_equal(after.sizes, before.sizes)
    assert after.path(23) == before.path(23)


def test_an_unwritable_cache_is_done_without(image_folder, own_cache, monkeypatch):
    before = scan(image_folder / "train", None)
    blocker = own_cache / "blocker"
    blocker.write_text("a file where the cache folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    np.testing.assert_array_equal(scan(image_folder / "train", None).sizes, before.sizes)


def test_where_nothing_can_be_locked_the_index_is_built_and_kept_all_the_same(image_folder, own_cache, monkeypatch):
    """No file stands for a lock there: it would outlive a machine that is gone, and hold up every later start."""

    def flock(*given: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    before = scan(image_folder / "train", None)
    (kept,) = (own_cache / "pliant").glob("*.safetensors")
    written = kept.stat().st_mtime_ns
    np.testing.assert_array_equal(scan(image_folder / "train", None).sizes, before.sizes)
    assert kept.stat().st_mtime_ns == written, "the second start reads it"
    assert [path.name for path in (own_cache / "pliant").glob("*.lock") if path.stat().st_size] == []


def test_classes_come_from_a_list_where_not_all_are_present(image_folder, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("zebra\nnewt\n\ncat\ndog\n")
    dataset = open_dataset(Data(root=image_folder, class_list=names), seed=0)
    assert dataset.classes == ("zebra", "newt", "cat", "dog")
    assert dataset.num_classes == 4
    assert np.bincount(dataset.train.labels).tolist() == [0, 8, 8, 8]
    assert dataset.val is not None
    assert dataset.val.labels.max() == 3


def test_class_folders_alone_are_training_images(image_folder):
    dataset = open_dataset(Data(root=image_folder / "train", classes=10), seed=0)
    assert len(dataset.train) == 24
    assert dataset.val is None
    assert dataset.num_classes == 10
    with pytest.raises(UserError, match="no validation images"):
        dataset.split("val")
    with pytest.raises(UserError, match=r"--data\.held-out 1000"):
        dataset.split("held_out")


def test_generated_images_are_known_as_such(image_folder):
    assert not open_dataset(Data(root=image_folder), seed=0).generated
    (image_folder / "sample.json").write_text("{}")
    assert open_dataset(Data(root=image_folder), seed=0).generated


def test_roots_that_hold_no_dataset(tmp_path):
    assert "--data.root /path/to/imagenet" in refusal(None)
    assert "train/CLASS/FILE.JPEG" in refusal(None)
    assert str(tmp_path / "absent") in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "is empty" in refusal(tmp_path / "empty")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "x.jpg").write_text("")
    assert "neither a folder train nor class folders" in refusal(tmp_path / "loose")


def test_layouts_that_are_incomplete(image_folder, tmp_path):
    (image_folder / "train").rename(tmp_path / "kept")
    assert "val but no folder train" in refusal(image_folder)
    (image_folder / "train").mkdir()
    assert f"{image_folder / 'train'} holds no class folders" in refusal(image_folder)
    (tmp_path / "kept" / "cat").rename(image_folder / "train" / "cat")
    assert "one class folder only, cat" in refusal(image_folder)
    (tmp_path / "kept" / "dog").rename(image_folder / "train" / "dog")
    assert str(image_folder / "val" / "newt") in refusal(image_folder)
    (image_folder / "train" / "newt").mkdir()
    assert f"{image_folder / 'train' / 'newt'} holds no image" in refusal(image_folder)


def test_validation_images_that_are_not_sorted_into_classes(image_folder):
    for name in ("cat", "dog", "newt"):
        (image_folder / "val" / name).rename(image_folder / name)
    assert f"{image_folder / 'val'} holds no class folders" in refusal(image_folder)


def test_a_folder_named_like_an_image_keeps_its_images(image_folder, draw_image):
    folder = image_folder / "train" / "dog"
    draw_image(folder / "holiday.jpg" / "a.png", 9, 9)
    (folder / "linked.png").symlink_to(folder / "holiday.jpg")
    (folder / "nowhere.png").symlink_to(folder / "nowhere.png")
    index = scan(image_folder / "train", None)
    names = [index.path(position).removeprefix(f"{folder}/") for position in range(8, len(index) - 8)]
    assert names == [*(f"{number}.png" for number in range(8)), "holiday.jpg/a.png", "linked.png/a.png", "nowhere.png"]
    assert index.broken.tolist() == [8 + 10]


@pytest.mark.parametrize("target", ["..", "../../dog/more", "again", "../../newt"])
def test_a_link_that_leads_back_is_named(target, image_folder):
    (image_folder / "train" / "dog" / "more").mkdir()
    link = image_folder / "train" / "dog" / "more" / "again"
    link.symlink_to(target)
    if "newt" in target:
        (image_folder / "train" / "newt" / "back").symlink_to("../dog")
        link = image_folder / "train" / "dog" / "more" / "again" / "back"
    said = refusal(image_folder)
    assert re.fullmatch(f"The link {link} leads back to itself: remove it.", said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(image_folder):
    folder = image_folder / "train" / "dog"
    folder.chmod(0)
    try:
        assert str(folder) in refusal(image_folder)
    finally:
        folder.chmod(0o755)


def test_class_lists_that_do_not_fit(image_folder, tmp_path):
    names = tmp_path / "classes.txt"
    assert str(names) in refusal(image_folder, class_list=names)
    names.write_text("\n")
    assert "is empty" in refusal(image_folder, class_list=names)
    names.write_text("cat\ndog\ncat\n")
    assert "cat twice" in refusal(image_folder, class_list=names)
    names.write_text("cat\ndog\n")
    assert str(image_folder / "train" / "newt") in refusal(image_folder, class_list=names)


def test_numbers_that_do_not_fit_the_dataset(image_folder):
    assert "--data.classes 3" in refusal(image_folder, classes=2)
    assert "--data.held-out 2" in refusal(image_folder, held_out=24)
    data = Data(root=image_folder)
    with pytest.raises(UserError) as caught:
        Feed(open_dataset(data, 0), data, Batching(images=32, micro=8), seed=0, device="cpu")
    assert "32 images but there are only 24" in one_sentence(str(caught.value))
    data = Data(root=image_folder, tail="wrap")
    feed = Feed(open_dataset(data, 0), data, Batching(images=32, micro=8), seed=0, device="cpu")
    assert feed.steps_per_epoch == 1


@pytest.mark.parametrize(
    "settings",
    [
        dict(scale=(0.5, 0.1)),
        dict(jitter=1.5),
        dict(lighting=-1.0),
        dict(size=0),
        dict(classes=1),
        dict(threads=0),
        dict(broken_share=2.0),
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(UserError) as caught:
        Data(**settings)
    assert re.search("write|lies between", one_sentence(str(caught.value)))


def test_held_out_images_are_balanced_and_leave_training(image_folder):
    dataset = open_dataset(Data(root=image_folder, held_out=7), seed=1)
    assert dataset.held_out is not None
    assert sorted(np.bincount(dataset.held_out.labels).tolist()) == [2, 2, 3]
    kept = {dataset.train.path(position) for position in range(17)}
    back = {dataset.held_out.path(position) for position in range(7)}
    assert len(kept | back) == 24
    again = open_dataset(Data(root=image_folder, held_out=7), seed=1)
    assert again.held_out is not None
    assert back == {again.held_out.path(position) for position in range(7)}


def test_held_out_images_of_scarce_classes():
    labels = np.array([0] * 50 + [1] * 2 + [4] * 50, np.int32)
    assert np.bincount(labels[held_out_positions(labels, 22, 0)], minlength=5).tolist() == [10, 2, 0, 0, 10]
    assert not np.array_equal(held_out_positions(labels, 22, 0), held_out_positions(labels, 22, 1))
