"""Individually trained MobileNetV2 on ImageNet (Yu and Huang 2019, Table 1): error 28.2 / 30.2 / 34.6 / 39.7 %.

    accelerate launch recipes/inet_mbv2.py --data.root /imagenet --recipe.width 0.35

The baseline of one network per width; the paper quotes MobileNetV2's own figures. Here each has the US-Net's schedule
and 480 epochs, the default length of the networks' papers.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.i_net import INet
from pliant.networks.mobilenet import MobileNet

EXPERIMENT = Experiment(
    name="inet_mbv2",
    recipe=INet(network=MobileNet(version="v2"), width=1.0),
    data=Data(size=224, scale=(0.25, 1.0), jitter=0.4, lighting=0.1, threads=8),
    batch=Batching(images=1024, micro=128),
    optimization=Optimization(lr=0.5, schedule="linear", epochs=480, weight_decay=1e-4),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
