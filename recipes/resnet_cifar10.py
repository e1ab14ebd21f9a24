"""A residual network on CIFAR-10 (He et al. 2016): what the methods on depth begin with.

    accelerate launch recipes/resnet_cifar10.py --data.root data/cifar10 --recipe.network.depth 110
    pliant export runs/resnet_cifar10/TIME --at native --formats safetensors

He et al.'s settings, section 4.2: 64,000 steps of 128 images, a tenth of the rate after 32,000 and 48,000; depth 110
begins with a smaller one for 400 steps, here a warm-up. The shortcut is theirs too; with SkipNet's it is written
--recipe.network.shortcut conv, with BlockDrop's pool.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.depth import Plain
from pliant.networks.resnet import ResNet

EXPERIMENT = Experiment(
    name="resnet_cifar10",
    recipe=Plain(network=ResNet(depth=32)),
    data=Data(source="cifar10"),
    batch=Batching(images=128, micro=128),
    optimization=Optimization(
        lr=0.1, nesterov=False, schedule="steps", epochs=164, weight_decay=1e-4, decay="all", warmup_epochs=1
    ),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
