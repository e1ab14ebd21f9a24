"""US-MobileNetV2 on ImageNet (Yu and Huang 2019, Table 1): error 28.5 / 30.3 / 35.0 / 37.8 % at 1 / .75 / .5 / .35.

    accelerate launch recipes/usnet_mbv2.py --data.root /imagenet

Settings of the paper's section 5.1; what it leaves out is read from the authors' code: crops of at least a quarter of
the image, colour jitter 0.4, PCA lighting 0.1, weight decay 1e-4 on dense kernels alone, no warm-up, 128 images for
each batch-norm statistic (1024 on 8 GPUs), no dropout.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet

EXPERIMENT = Experiment(
    name="usnet_mbv2",
    recipe=USNet(network=MobileNet(version="v2"), low=0.35, high=1.0, n=4, grid=0.025),
    data=Data(size=224, scale=(0.25, 1.0), jitter=0.4, lighting=0.1, threads=8),
    batch=Batching(images=1024, micro=128),
    optimization=Optimization(lr=0.5, schedule="linear", epochs=250, weight_decay=1e-4),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
