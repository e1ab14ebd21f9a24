"""SkipNet on CIFAR-10 (Wang et al. 2018, section 4): a recurrent gate between the blocks of ResNet-110.

    accelerate launch recipes/skipnet_cifar10.py --data.root data/cifar10 --recipe.pretrained resnet110.safetensors

The weights are those of resnet_cifar10.py with --recipe.network.depth 110 --recipe.network.shortcut conv. Supervised
pre-training with He et al.'s settings (64,000 steps of 128 images), then 10,000 steps of hybrid reinforcement learning
at 1e-4. From the authors' code, where the paper is silent: everything decays; returns are weighed by 0.01 (there as a
sum over 128 images, hence 1.28 here, where it is a mean). The paper's SVHN: --data.source svhn --data.no-padded-crop.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.skipnet import SkipNet
from pliant.networks.resnet import ResNet

EXPERIMENT = Experiment(
    name="skipnet_cifar10",
    recipe=SkipNet(
        network=ResNet(depth=110, shortcut="conv"),
        gate="rnn",
        sp_share=64 / 74,
        hrl_rate=1e-3,
        alpha=1.0,
        beta=1.0,
        rl_weight=1.28,
    ),
    data=Data(source="cifar10", held_out=5000),
    batch=Batching(images=128, micro=128),
    optimization=Optimization(lr=0.1, nesterov=False, schedule="steps", epochs=211, weight_decay=1e-4, decay="all"),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
