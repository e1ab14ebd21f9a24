"""URNet on CIFAR-10 (Lee et al. 2020, Table 1): one ResNet-110 for every share of blocks that a user may ask for.

    accelerate launch recipes/urnet_cifar10.py --data.root data/cifar10 --recipe.pretrained resnet110.safetensors
    pliant spectrum runs/urnet_cifar10/TIME --at S0.2 S0.4 S0.6 S0.8 S1

The weights are those of resnet_cifar10.py with --recipe.network.depth 110. The gates alone for 100 epochs, then
everything for 400; the rate falls from 1e-3 to 1e-5; p 0.1, beta 2, S from 0.2 to 1, r 2. The paper names neither
optimizer nor batch nor the shape of the fall, nor decay, crops or the shortcut: Adam without decay, 128 images, a
cosine, padding by 4 pixels and the shortcut of He et al. are ours.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.urnet import URNet
from pliant.networks.resnet import ResNet

EXPERIMENT = Experiment(
    name="urnet_cifar10",
    recipe=URNet(network=ResNet(depth=110), reduction=2, p=0.1, beta=2.0, smallest=0.2, largest=1.0, gates_share=0.2),
    data=Data(source="cifar10", held_out=5000),
    batch=Batching(images=128, micro=128),
    optimization=Optimization(optimizer="adam", lr=1e-3, floor=0.01, schedule="cosine", epochs=500, weight_decay=0.0),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
