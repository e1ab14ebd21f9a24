"""Blocks that no image has a say in, on CIFAR-10: what a method on depth has to beat (BlockDrop, Table 1).

    accelerate launch recipes/fixed_blocks_cifar10.py --data.root data/cifar10 --recipe.pretrained resnet110.safetensors

The weights are those that blockdrop_cifar10.py begins with. The first 17 of 54 blocks by default; --recipe.rule random,
distribute or given (with --recipe.blocks) chooses others, and --optimization.steps 0 measures them without fine-tuning.
The rate and the batch are ours: the paper names none for its baselines.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.fixed_blocks import FixedBlocks
from pliant.networks.resnet import ResNet

EXPERIMENT = Experiment(
    name="fixed_blocks_cifar10",
    recipe=FixedBlocks(network=ResNet(depth=110, shortcut="pool"), rule="first", keep=17),
    data=Data(source="cifar10", held_out=5000),
    batch=Batching(images=256, micro=256),
    optimization=Optimization(optimizer="adam", lr=1e-3, floor=0.01, schedule="cosine", epochs=2000, weight_decay=0.0),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
