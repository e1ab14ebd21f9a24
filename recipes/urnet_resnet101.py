"""URNet on ImageNet (Lee et al. 2020, Table 2): one ResNet-101 for every share of blocks.

    accelerate launch recipes/urnet_resnet101.py --data.root /imagenet --recipe.pretrained resnet101.safetensors

The gates alone for 5 epochs, then everything for 15; the rate falls from 1e-3 to 1e-5; p 0.1, beta 4, S from 0.2 to 1,
r 16. The paper names neither optimizer nor batch nor the shape of the fall, nor decay or crops: Adam without decay, 256
images, a cosine and random resized crops are ours.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.urnet import URNet
from pliant.networks.resnet import ResNet

EXPERIMENT = Experiment(
    name="urnet_resnet101",
    recipe=URNet(
        network=ResNet(form="imagenet", depth=101),
        reduction=16,
        p=0.1,
        beta=4.0,
        smallest=0.2,
        largest=1.0,
        gates_share=0.25,
        anneal=0.25,
    ),
    data=Data(size=224, scale=(0.08, 1.0), threads=8, held_out=10000),
    batch=Batching(images=256, micro=32),
    optimization=Optimization(optimizer="adam", lr=1e-3, floor=0.01, schedule="cosine", epochs=20, weight_decay=0.0),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
