"""How training images are augmented besides their crop, mirroring and colours: operations by policy, erasing, mixing.

Part of a run's `Data`. Contradictions are refused here, and so is a setting that would have nothing to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pliant.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What training images go through, in this order; calibration images too, but for the mixing."""

    augment: Literal["none", "randaugment", "autoaugment"] = "none"
    """Operations that training images go through after crop and mirroring. randaugment: so many operations drawn of
    fourteen, all of one magnitude. autoaugment: a pair drawn of the twenty-five that a policy lists."""
    augment_ops: int = 2
    """RandAugment's N: operations of each image."""
    augment_magnitude: int = 9
    """RandAugment's M: magnitude of its operations, from 0 to 30."""
    augment_policy: Literal["auto", "imagenet", "cifar10", "svhn"] = "auto"
    """AutoAugment's policy, by the dataset it was found on; auto: that of the source, ImageNet's for image folders."""
    augment_fill: tuple[int, int, int] = (0, 0, 0)
    """Red, green and blue, 0 to 255, of what a shear, shift or rotation uncovers."""
    erasing: float = 0.0
    """Probability that a random rectangle of a training image, 2 % to 33 % of it, is erased."""
    erasing_mode: Literal["const", "rand", "pixel"] = "const"
    """What stands in its place. const: the mean colour. rand: a random colour. pixel: noise."""
    mixup: float = 0.0
    """Alpha of mixup: images and labels are blended in pairs by a share drawn from Beta(alpha, alpha). 0: no mixup."""
    cutmix: float = 0.0
    """Alpha of CutMix: a box of an image that covers 1 - share comes from another, the share drawn as for mixup. 0: no
    CutMix."""
    mix_probability: float = 1.0
    """Share of micro-batches that are mixed."""
    switch_probability: float = 0.5
    """Share of CutMix among them, where mixup and CutMix are both on."""

    def __post_init__(self) -> None:
        self._check_operations()
        self._check_erasing()
        self._check_mixing()

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, and their labels with them."""
        return self.mixup > 0.0 or self.cutmix > 0.0

    def _check_operations(self) -> None:
        if self.augment_ops < 1:
            raise UserError(
                f"RandAugment cannot apply {self.augment_ops} operations: write --data.augment-ops 1 or more, or "
                "--data.augment none."
            )
        if not 0 <= self.augment_magnitude <= 30:
            raise UserError(
                f"RandAugment's magnitude is a whole number from 0 to 30, not {self.augment_magnitude}: write for "
                "instance --data.augment-magnitude 9."
            )
        if not all(0 <= value <= 255 for value in self.augment_fill):
            raise UserError(
                f"The values of a colour lie from 0 to 255: got {self.augment_fill}; write for instance "
                "--data.augment-fill 124 116 104."
            )
        heeded = {"none": (), "randaugment": ("ops", "magnitude", "fill"), "autoaugment": ("policy", "fill")}
        for name in ("ops", "magnitude", "policy", "fill"):
            if name not in heeded[self.augment] and self._is_set(f"augment_{name}"):
                wanted = "autoaugment" if name == "policy" else "randaugment"
                raise UserError(
                    f"--data.augment {self.augment} has no use for --data.augment-{name}: leave it out "
                    f"{self._or_write(f'augment_{name}')} or write --data.augment {wanted}."
                )

    def _check_erasing(self) -> None:
        if not 0.0 <= self.erasing <= 1.0:
            raise UserError(
                f"Images are erased with a probability from 0 to 1, not {self.erasing:g}: write for instance "
                "--data.erasing 0.25."
            )
        if self.erasing == 0.0 and self._is_set("erasing_mode"):
            raise UserError(
                f"No image is erased, so --data.erasing-mode {self.erasing_mode} has nothing to fill: leave it out "
                f"{self._or_write('erasing_mode')} or write for instance --data.erasing 0.25."
            )

    def _check_mixing(self) -> None:
        for name in ("mixup", "cutmix"):
            alpha: float = getattr(self, name)
            if not 0.0 <= alpha < math.inf:
                raise UserError(
                    f"An alpha lies above 0, or is 0 for none, not {alpha:g}: write for instance --data.{name} 0.2."
                )
        if not 0.0 < self.mix_probability <= 1.0:
            raise UserError(
                f"The share of micro-batches that are mixed lies above 0 and is at most 1, not "
                f"{self.mix_probability:g}: write for instance --data.mix-probability 0.5."
            )
        if not 0.0 <= self.switch_probability <= 1.0:
            raise UserError(
                f"The share of CutMix lies from 0 to 1, not {self.switch_probability:g}: write for instance "
                "--data.switch-probability 0.5."
            )
        if not self.mixes and self._is_set("mix_probability"):
            raise UserError(
                f"Nothing is mixed, so --data.mix-probability {self.mix_probability:g} has no use: leave it out "
                f"{self._or_write('mix_probability')} or write for instance --data.mixup 0.2."
            )
        if not (self.mixup and self.cutmix) and self._is_set("switch_probability"):
            raise UserError(
                "--data.switch-probability chooses between mixup and CutMix, and they are not both on: leave it out "
                f"{self._or_write('switch_probability')} or write for instance --data.mixup 0.8 --data.cutmix 1."
            )

    def _is_set(self, name: str) -> bool:
        """Whether a setting has another value than its default."""
        return bool(getattr(self, name) != getattr(type(self), name))

    def _or_write(self, name: str) -> str:
        """What takes a setting back on the command line, where leaving it out does not: its default."""
        default = getattr(type(self), name)
        values = " ".join(map(str, default)) if isinstance(default, tuple) else default
        return f"(where the recipe file sets it, write --data.{name.replace('_', '-')} {values})"
