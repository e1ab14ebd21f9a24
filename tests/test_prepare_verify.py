"""`pliant data verify` finds every image that is broken, and says what is unusual about others."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pliant import cli
from pliant.data import decoding, open_dataset
from pliant.data.decoding import check, decoded, size_of
from pliant.errors import UserError
from pliant.experiment import Data
from pliant.preparation import verify
from pliant.preparation.examine import examine
from pliant.preparation.listing import of_folder
from tests import archives
from tests.archives import refusal

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(form: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(file, form, **options)
    return file.getvalue()


def rotated(form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(form, exif=exif)


def rotated_at_its_end() -> bytes:
    """A PNG that says so after its pixels, which is allowed."""
    content = rotated("PNG")
    first = content.index(b"eXIf") - 4
    chunk = content[first : first + 12 + int.from_bytes(content[first : first + 4], "big")]
    assert content.index(b"IDAT") > first
    return content.replace(chunk, b"")[:-12] + chunk + content[-12:]


def png16() -> bytes:
    return encoded("PNG", Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000))


ODD = {
    "png_named.JPEG": (encoded("PNG"), "PNG by its contents"),
    "cmyk.jpg": (encoded("JPEG", Image.fromarray(NOISE).convert("CMYK")), "CMYK"),
    "deep.png": (png16(), "more than 8 bits a channel"),
    "turned.jpg": (rotated(), "to be shown turned or mirrored (EXIF)"),
    "turned.png": (rotated("PNG"), "to be shown turned or mirrored (EXIF)"),
    "turned_late.png": (rotated_at_its_end(), "to be shown turned or mirrored (EXIF)"),
    "thin.png": (encoded("PNG", Image.new("RGB", (1, 9))), "1 x 9 pixels"),
    "large.png": (encoded("PNG", Image.new("1", (8000, 5001))), "very large, 8000 x 5001 pixels"),
    "endless.jpg": (encoded("JPEG").removesuffix(b"\xff\xd9") + bytes(20), "without its end marker"),
}
BROKEN = {
    "empty.jpg": (b"", "it is empty"),
    "text.jpg": (b"no image", "its format is none of jpeg, png"),
    "gif_named.JPEG": (encoded("GIF"), "its format is none of"),
    "int.tif": (encoded("TIFF", Image.new("I", (9, 9), 70000)), "mode i in tiff"),
    "float.tif": (encoded("TIFF", Image.new("F", (9, 9), 0.5)), "mode f in tiff"),
    "transparent.tif": (encoded("TIFF", Image.new("LA", (9, 9))), "mode la in tiff"),
    "deep.pgm": (b"P5 9 9 65535\n" + bytes(162), "mode i in ppm"),
    "cut.jpg": (encoded("JPEG")[:-400], "truncated"),
    "cut.png": (encoded("PNG")[:-400], "truncated"),
    "flipped.png": (encoded("PNG")[:900] + b"\0\0" + encoded("PNG")[902:], ""),
    "checksum.png": (encoded("PNG")[:-16] + b"\0\0\0\0" + encoded("PNG")[-12:], "checksum"),
    "header_only.jpg": (encoded("JPEG")[:620], "truncated"),
    "bomb.png": (encoded("PNG", Image.new("1", (20000, 10000))), "decompression bomb"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_unusual_is_said_and_not_called_broken(name):
    content, said = ODD[name]
    assert examine(content, name) == (None, [said])


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found_with_its_reason(name):
    content, said = BROKEN[name]
    reason, odd = examine(content, name)
    assert reason is not None
    assert said in reason.lower()
    assert odd == []


@pytest.mark.parametrize(
    ("form", "suffix"), [("JPEG", ".JPEG"), ("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("PPM", ".ppm")]
)
def test_ordinary_images_have_nothing_said_of_them(form, suffix):
    assert examine(encoded(form), f"x{suffix}") == (None, [])
    assert examine(encoded("JPEG", progressive=True), "x.jpg") == (None, [])
    assert examine(encoded("JPEG", Image.fromarray(NOISE).convert("L")), "x.jpg") == (None, [])


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 0.95])
def test_a_truncated_file_is_found_wherever_it_ends(keep):
    for form in ("JPEG", "PNG", "WEBP"):
        content = encoded(form)
        reason, _ = examine(content[: int(keep * len(content))], "x.jpg")
        assert reason is not None, form


def test_a_run_and_this_command_have_one_judge(tmp_path, own_cache):
    folder = tmp_path / "root" / "a"
    folder.mkdir(parents=True)
    (tmp_path / "root" / "b").mkdir()
    (tmp_path / "root" / "b" / "0.png").write_bytes(encoded("PNG"))
    for kind in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "TGA", "ICO"):
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"):
            with suppress(OSError, KeyError, ValueError):  # no such file can be written
                (folder / f"{kind}_{mode}.png").write_bytes(encoded(kind, Image.new(mode, (16, 16))))
    for name, (content, _) in {**ODD, **BROKEN}.items():
        (folder / f"{name}.png").write_bytes(content)
    index = open_dataset(Data(root=tmp_path / "root", broken_share=1.0), 0).train
    broken = [verify.Finding(index.path(k), index.reason(k)) for k in index.broken]
    assert list(verify.verify("x", of_folder(tmp_path / "root"), 2).broken) == broken
    assert len(BROKEN) + 5 < len(broken) < len(index) - len(ODD) - 20


def test_photographs_are_told_apart_as_their_list_says(shared_data):
    with open(shared_data / "photos_odd" / "odd.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        name = row["file"]
        reason, odd = examine((shared_data / "photos_odd" / name).read_bytes(), name)
        made = " ".join(row.values()).lower()
        assert (reason is not None) == ("truncated" in made), name
        assert ("CMYK" in odd) == ("cmyk" in made and "truncated" not in made), name
        assert ("PNG by its contents" in odd) == ("png" in made), name


def fill(image_folder: Path) -> None:
    for name, (content, _) in {**ODD, **BROKEN}.items():
        (image_folder / "val" / "dog" / name).write_bytes(content)


def test_command_lists_findings_and_ends_with_status_2(image_folder, tmp_path, capsys):
    cli.main(["data", "verify", str(image_folder), "--workers", "2"])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{image_folder / name}: {n} images, 0 broken, 0 unusual" for name, n in (("train", 24), ("val", 9))
    ]
    fill(image_folder)
    report = tmp_path / "report.json"
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "verify", str(image_folder), "--workers", "2", "--json", str(report)])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert f"error: {len(BROKEN)} of {len(ODD) + len(BROKEN) + 33} images in {image_folder} are broken" in said.err
    folder = image_folder / "val" / "dog"
    for kind, cases in (("broken", BROKEN), ("odd", ODD)):
        lines = [line for line in said.out.splitlines() if line.startswith(f"{kind}: ")]
        assert len(lines) == len(cases)
        assert all(any(line.startswith(f"{kind}: {folder / name}: ") for line in lines) for name in cases)
    assert (
        said.out.splitlines()[-1]
        == f"{image_folder / 'val'}: {len(ODD) + len(BROKEN) + 9} images, {len(BROKEN)} broken, {len(ODD)} unusual"
    )
    train, val = json.loads(report.read_text())
    assert (train["images"], train["broken"], train["odd"]) == (24, [], [])
    assert {Path(finding["file"]).name for finding in val["broken"]} == BROKEN.keys()
    assert {Path(finding["file"]).name: finding["reason"] for finding in val["odd"]} == {
        k: v[1] for k, v in ODD.items()
    }
    cli.main(["data", "verify", str(image_folder), "--split", "train", "--workers", "1"])


def test_a_link_that_leads_nowhere_is_a_broken_image(image_folder, capsys):
    (image_folder / "train" / "cat" / "9.png").symlink_to(image_folder / "absent.png")
    assert "1 of 34 images" in refusal(capsys, "verify", image_folder)


def test_names_that_are_not_utf_8_are_spelt_out(image_folder, tmp_path):
    name = os.fsdecode(b"\xe9t\xe9.jpg")  # Latin-1
    (image_folder / "train" / "dog" / name).write_bytes(b"no image")
    report = tmp_path / "report.json"
    code = "from pliant import cli; import sys; cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "data", "verify", str(image_folder), "--workers", "1", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"broken: {image_folder}/train/dog/\\xe9t\\xe9.jpg: " in done.stdout
    assert json.loads(report.read_text())[0]["broken"][0]["file"] == str(image_folder / "train" / "dog" / name)


def test_shards_are_verified_like_the_folder_they_were_made_from(image_folder, tmp_path, capsys):
    fill(image_folder)
    shards = tmp_path / "shards"
    cli.main(["data", "shards", "--root", str(image_folder), "--to", str(shards), "--shard-images", "10"])
    said = refusal(capsys, "verify", shards, "--workers", 2)
    assert f"{len(BROKEN)} of {len(ODD) + len(BROKEN) + 33} images" in said
    with pytest.raises(SystemExit):
        cli.main(["data", "verify", str(shards), "--split", "val", "--workers", "2"])
    lines = capsys.readouterr().out.splitlines()
    reasons = sorted(line.split(": ", 2)[2] for line in lines if line.startswith("broken: "))
    assert reasons == sorted(examine(content, name)[0] for name, (content, _) in BROKEN.items())
    assert all("val-00000" in line for line in lines[:-1])
    for path in (shards / "train").parent.glob("train-*"):
        path.unlink()
    assert "images of train" in refusal(capsys, "verify", shards, "--split", "train")


def test_a_folder_of_classes_and_a_folder_of_tars_are_verified_without_splits(image_folder, tmp_path, capsys):
    cli.main(["data", "verify", str(image_folder / "train"), "--workers", "1"])
    assert "24 images, 0 broken" in capsys.readouterr().out
    (tmp_path / "tars").mkdir()
    archives.tar(tmp_path / "tars" / "x.tar", {"cat/1.jpg": encoded("JPEG"), "cat/2.jpg": b"no"})
    assert "1 of 2 images" in refusal(capsys, "verify", tmp_path / "tars", "--workers", 1)
    assert "is no folder" in refusal(capsys, "verify", tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(capsys, "verify", tmp_path / "empty")
    assert "no folder for" in refusal(capsys, "verify", image_folder, "--json", tmp_path / "gone" / "x.json")
    assert "--workers 1" in refusal(capsys, "verify", image_folder, "--workers", 0)


def test_of_two_layouts_of_shards_those_are_verified_that_a_run_reads(tmp_path, own_cache):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for path, kinds in ((tmp_path / split / "0.tar", "abc"), (tmp_path / f"{split}-0.tar", "ab")):
            archives.tar(path, {f"{kind}/{split}.jpg": encoded("JPEG") for kind in kinds})
    dataset = open_dataset(Data(source="shards", root=tmp_path), 0)
    train, val = verify.listings(tmp_path, "all").values()
    assert [train.span(k).path for k in range(len(train))] == [str(tmp_path / "train" / "0.tar")] * len(dataset.train)
    assert [val.span(k).path for k in range(len(val))] == [str(tmp_path / "val" / "0.tar")] * len(dataset.val)


def test_any_number_of_workers_finds_the_same_in_the_same_order(image_folder, monkeypatch):
    fill(image_folder)
    monkeypatch.setattr(verify, "_CHUNK", 3)
    listing = of_folder(image_folder / "val")
    assert verify.verify("x", listing, 1) == verify.verify("x", listing, 3)


def test_a_decoder_that_dies_takes_one_image_with_it(image_folder, tmp_path, monkeypatch):
    script = tmp_path / "dies.py"
    script.write_text(
        "import json, os, signal, sys\n"
        "from pliant.preparation import examine\n"
        "real = examine.examine\n"
        "def dying(content, name):\n"
        "    if name == 'cat/2.png': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return real(content, name)\n"
        "examine.examine = dying\n"
        "examine.main()\n"
    )
    monkeypatch.setattr(verify, "COMMAND", [sys.executable, str(script)])
    report = verify.verify("x", of_folder(image_folder / "train"), 2)
    assert report.images == 24
    assert [Path(finding.file).name for finding in report.broken] == ["2.png"]
    assert "ended with status -11" in report.broken[0].reason


def test_storage_that_stumbles_breaks_no_image(image_folder, tmp_path, monkeypatch):
    script = tmp_path / "stumbles.py"
    script.write_text(
        "import errno, sys\n"
        "from pliant.data.index import split\n"
        "from pliant.preparation import examine\n"
        "real, met = split._read, set()\n"
        "def stumbling(path, *where):\n"
        "    if path.endswith('2.png') and path not in met:\n"
        "        met.add(path)\n"
        "        open(sys.argv[1], 'a').write(path + '\\n')\n"
        "        raise OSError(errno.ESTALE, 'Stale file handle')\n"
        "    return real(path, *where)\n"
        "split._read = stumbling\n"
        "examine.main()\n"
    )
    monkeypatch.setattr(verify, "COMMAND", [sys.executable, str(script), str(tmp_path / "met")])
    assert verify.verify("x", of_folder(image_folder / "train"), 1).broken == ()
    assert len((tmp_path / "met").read_text().splitlines()) == 3


def test_a_decoder_that_cannot_start_is_no_fault_of_the_images(image_folder, monkeypatch):
    monkeypatch.setattr(verify, "COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match=r"did not start: run .*raise SystemExit"):
        verify.verify("x", of_folder(image_folder / "train"), 2)


@pytest.mark.parametrize("shortage", ["raise MemoryError", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_too_little_memory_is_no_fault_of_the_image(image_folder, tmp_path, monkeypatch, shortage):
    script = tmp_path / "short.py"
    script.write_text(
        "import os, signal\n"
        "from PIL import ImageFile\n"
        "from pliant.preparation import examine\n"
        "def short(image):\n"
        f"    {shortage}\n"
        "ImageFile.ImageFile.load = short\n"
        "examine.main()\n"
    )
    monkeypatch.setattr(verify, "COMMAND", [sys.executable, str(script)])
    with pytest.raises(UserError, match=r"too little memory to decode cat/.*\.png: write a smaller --workers"):
        verify.verify("x", of_folder(image_folder / "train"), 1)


@pytest.mark.parametrize("judge", [check, decoded, lambda content: size_of(io.BytesIO(content))])
def test_a_judge_without_memory_gives_no_verdict(judge, monkeypatch):
    def short(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decoding, "_accepted", short)
    with pytest.raises(MemoryError):
        judge(encoded("JPEG"))


def test_decoders_end_with_whoever_started_them(image_folder):
    for number in range(60):
        shutil.copytree(image_folder / "train" / "cat", image_folder / "train" / f"cat{number}")
    slow = encoded("PNG", Image.new("RGB", (3000, 3000)))
    for path in (image_folder / "train").rglob("*.png"):
        path.write_bytes(slow)
    code = "from pliant.preparation.command import data_command; import sys; data_command(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "verify", str(image_folder), "--workers", "2"], stderr=subprocess.DEVNULL
    )
    while not children(process.pid):
        assert process.poll() is None
        time.sleep(0.01)
    started = children(process.pid)
    process.kill()
    process.wait()
    ends = time.monotonic() + 20
    while time.monotonic() < ends and any(Path(f"/proc/{pid}").exists() for pid in started):
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


@pytest.mark.parametrize(
    "module", ["pliant.preparation.examine", "pliant.data.decoding", "pliant.data.index", "pliant.data.sources.shards"]
)
def test_decoders_and_the_index_import_no_torch(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_there_are_as_many_decoders_as_this_process_may_use_cores():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from pliant.preparation.command import AskVerify; print(AskVerify(root='x').workers)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_a_damaged_shard_is_named(tmp_path, capsys):
    path = archives.tar(tmp_path / "train-000000.tar", {"a.jpg": encoded("JPEG"), "a.cls": b"0"})
    with tarfile.open(path) as shard:
        end = shard.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[:end])
    assert str(path) in refusal(capsys, "verify", tmp_path)
