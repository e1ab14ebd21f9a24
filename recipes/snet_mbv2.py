"""S-MobileNetV2 with four switches on ImageNet (Yu and Huang 2019, Table 1): error 29.5 / 31.1 / 35.6 / 40.3 %.

    accelerate launch recipes/snet_mbv2.py --data.root /imagenet

The baseline that US-Nets are compared with. The authors trained it for 480 epochs with batch 160, learning rate 0.045
falling by 2 % an epoch; here it has the US-Net's own schedule and batch at that length, so that the two compare.
Statistics are private to each switch; --recipe.private makes scale and shift so too (section 6).
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.s_net import SNet
from pliant.networks.mobilenet import MobileNet

EXPERIMENT = Experiment(
    name="snet_mbv2",
    recipe=SNet(network=MobileNet(version="v2"), widths=(1.0, 0.75, 0.5, 0.35)),
    data=Data(size=224, scale=(0.25, 1.0), jitter=0.4, lighting=0.1, threads=8),
    batch=Batching(images=1024, micro=128),
    optimization=Optimization(lr=0.5, schedule="linear", epochs=480, weight_decay=1e-4),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
