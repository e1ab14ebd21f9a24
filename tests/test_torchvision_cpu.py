"""torchvision and timm can be imported on every build of torch, by a process that has not done so before."""

import subprocess
import sys

import pytest
import torch

without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")


def run_fresh(code: str) -> str:
    """What the code prints in a new interpreter, where nothing has been imported."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_and_timm_import():
    assert run_fresh("""
from pliant.torchvision_cpu import make_importable
make_importable()
import timm, torch, torchvision
with torch.inference_mode():
    print(*torchvision.models.mobilenet_v2().eval()(torch.zeros(1, 3, 32, 32)).shape)
    print(*timm.create_model("mobilenetv2_035").eval()(torch.zeros(1, 3, 32, 32)).shape)
""").splitlines() == ["1 1000", "1 1000"]


@without_cuda
def test_both_operators_are_known_to_torch():
    assert run_fresh("""
import torch
from pliant.torchvision_cpu import make_importable
make_importable()
print(torch.ops.torchvision.nms.default._schema, torch.ops.torchvision.qnms.default._schema, sep="\\n")
""").splitlines() == [
        "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ]


def test_calling_again_is_harmless_before_and_after_the_import():
    assert (
        run_fresh("""
from pliant.torchvision_cpu import make_importable
make_importable()
make_importable()
import torchvision
make_importable()
print("fine")
""")
        == "fine"
    )


@without_cuda
def test_operators_that_exist_are_left_alone():
    """A torchvision built for this torch brings its own, which torch lets nobody declare twice."""
    assert (
        run_fresh("""
import torch
theirs = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    theirs.define(name + "(Tensor dets, Tensor scores, float iou_threshold, int theirs=1) -> Tensor")
from pliant.torchvision_cpu import make_importable
make_importable()
import torchvision
print("theirs" in str(torch.ops.torchvision.nms.default._schema))
""")
        == "True"
    )
