"""A small US-MobileNetV2 on the generated sample: minutes on two CPU cores. What `make train` runs.

    python data/generate_sample.py sample
    python recipes/usnet_sample.py

The images are rendered, not photographed: data/generate_sample.py says how. Afterwards the spectrum is measured.
"""

from pathlib import Path

from pliant import cli
from pliant.experiment import Batching, Calibration, Data, Experiment, Optimization
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet

EXPERIMENT = Experiment(
    name="usnet_sample",
    recipe=USNet(network=MobileNet(version="v2", full=0.5), low=0.35, high=1.0, n=4, grid=0.065),
    data=Data(root=Path("sample"), size=64, scale=(0.25, 1.0), threads=1),
    batch=Batching(images=64, micro=64),
    optimization=Optimization(lr=0.03, schedule="linear", epochs=12, warmup_epochs=0.5),
    calibration=Calibration(images=512),
    evaluate_epochs=3.0,
    log_steps=31,
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__, show=True)
