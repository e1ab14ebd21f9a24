"""SkipNet on ImageNet (Wang et al. 2018, section 4.1): ResNet-101 with a recurrent gate.

    accelerate launch recipes/skipnet_resnet101.py --data.root /imagenet --recipe.pretrained resnet101.safetensors

ResNet-50 and -34: --recipe.network.depth 50. Supervised pre-training as He et al. (here 120 epochs, a tenth of the rate
at one half and three quarters, where the authors' code has every 30 epochs), then 40 epochs at 1e-4 (a tenth of it
after 30 in their code). alpha is swept from 0 to 4 in Fig. 5b, beta is alpha / N; from the authors' code: gates' logits
are divided by 0.05 in the second stage (theirs divides the weights once), returns weighed by 0.01.
"""

from pliant import cli
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.skipnet import SkipNet
from pliant.networks.resnet import ResNet

EXPERIMENT = Experiment(
    name="skipnet_resnet101",
    recipe=SkipNet(
        network=ResNet(form="imagenet", depth=101),
        gate="rnn",
        sp_share=0.75,
        hrl_rate=1e-3,
        alpha=1.0,
        beta=None,
        rl_weight=0.01,
        temperature=0.05,
    ),
    data=Data(size=224, scale=(0.08, 1.0), threads=8, held_out=10000),
    batch=Batching(images=256, micro=32),
    optimization=Optimization(lr=0.1, nesterov=False, schedule="steps", epochs=160, weight_decay=1e-4, decay="all"),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
