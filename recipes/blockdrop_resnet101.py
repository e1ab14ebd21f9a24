"""BlockDrop on ImageNet (Wu et al. 2018, section 4.1): a ResNet-10 on 112 px that says which of 33 blocks to run.

    accelerate launch recipes/blockdrop_resnet101.py --data.root /imagenet --recipe.pretrained resnet101.safetensors

Adam at 1e-4, and 1e-5 in joint fine-tuning; alpha 0.8. From the authors' code, where the paper is silent: 45 epochs of
curriculum and 10 of fine-tuning, gamma 1, then 5. Not taken from it: its crops of 224 px from images resized to 256,
where these are random resized crops, and its policy network, which begins with weights of a trained ResNet-18. The
paper's batches are of 2,048 images, then 320; here of 1,920, six times 320.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.blockdrop import BlockDrop
from pliant.networks.resnet import ResNet

EXPERIMENT = Experiment(
    name="blockdrop_resnet101",
    recipe=BlockDrop(
        network=ResNet(form="imagenet", depth=101),
        gamma=1.0,
        joint_gamma=5.0,
        alpha=0.8,
        curriculum_share=45 / 55,
        grow=33 / 45,
        curriculum_batch=6,
        joint_rate=0.1,
    ),
    data=Data(size=224, scale=(0.08, 1.0), threads=8, held_out=10000),
    batch=Batching(images=320, micro=40),
    optimization=Optimization(optimizer="adam", lr=1e-4, schedule="constant", epochs=55, weight_decay=0.0),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
