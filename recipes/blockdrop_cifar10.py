"""BlockDrop on CIFAR-10 (Wu et al. 2018, section 4.1): a ResNet-8 that says which of 54 blocks to run.

    accelerate launch recipes/blockdrop_cifar10.py --data.root data/cifar10 --recipe.pretrained resnet110.safetensors

The weights are those of resnet_cifar10.py with --recipe.network.depth 110 --recipe.network.shortcut pool, which is the
shortcut of the authors' code. 5,000 epochs of curriculum, the last blocks first and one more each epoch, then 2,000 of
joint fine-tuning; Adam at 1e-4 without decay, alpha 0.8; 2,048 images a step in the curriculum, then 256. From the
authors' code, where the paper is silent: gamma 1, then 10. Not taken from it: a tenth of the rate after 1,600 epochs of
fine-tuning, an entropy bonus of 0.1 (--recipe.entropy 0.1), which the paper does not have, images that are not
normalised, and the 1e-3 of its README.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.blockdrop import BlockDrop
from pliant.networks.resnet import ResNet

EXPERIMENT = Experiment(
    name="blockdrop_cifar10",
    recipe=BlockDrop(
        network=ResNet(depth=110, shortcut="pool"),
        gamma=1.0,
        joint_gamma=10.0,
        alpha=0.8,
        curriculum_share=5 / 7,
        grow=54 / 5000,
        curriculum_batch=8,
    ),
    data=Data(source="cifar10", held_out=5000),
    batch=Batching(images=256, micro=256),
    optimization=Optimization(optimizer="adam", lr=1e-4, schedule="constant", epochs=7000, weight_decay=0.0),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
