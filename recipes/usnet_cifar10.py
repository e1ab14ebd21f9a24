"""US-MobileNetV2 on CIFAR-10, in its small form for two CPU cores.

    accelerate launch recipes/usnet_cifar10.py --data.root data/cifar10

With a GPU, the form of full resolution: --recipe.network.stem-stride 1 --optimization.epochs 100.
"""

from pliant import cli
from pliant.experiment import Batching, Calibration, Data, Experiment, Optimization, Saving
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet

EXPERIMENT = Experiment(
    name="usnet_cifar10",
    recipe=USNet(
        network=MobileNet(version="v2", full=0.84, stem_stride=2, middle_stride=1, late_stride=1),
        low=0.35,
        high=1.0,
        n=4,
    ),
    data=Data(source="cifar10"),
    batch=Batching(images=128, micro=128),
    optimization=Optimization(lr=0.1, schedule="linear", epochs=11, weight_decay=1e-4, warmup_epochs=0.5),
    calibration=Calibration(images=2048),
    precision="fp32",
    saving=Saving(every_steps=100),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
