"""How training images are changed at random: each by itself, and two with each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import RandomCrop

from d2dmoe_pl.errors import ConfigError, check
from d2dmoe_pl.typed_settings import check_types_

_SHARES = ("hflip", "random_erasing", "mix_probability", "cutmix_share")


@dataclass(frozen=True)
class Augmentation:
    """What timm does to training images, and to their labels.

    Attributes:
        min_scale: Smallest share of an image's area that a crop, which is then resized, keeps.
        padding: Crop otherwise: after resizing, from the image with a reflected margin of so many pixels; for small
            images, e.g. 4 of 32.
        hflip: Chance of a horizontal flip.
        auto_augment: timm's policy string, e.g. ``rand-m9-mstd0.5`` (RandAugment) or ``3a`` (DeiT III).
        color_jitter: Strength of colour jitter; there is none with an ``auto_augment`` other than ``3a``.
        random_erasing: Chance that a part of an image is erased.
        mixup: ``alpha`` of the Beta distribution of how much each of two images counts in their mean; 0 for no mixup.
        cutmix: ``alpha`` of that of how much of an image a part of another does not cover; 0 for no cutmix.
        mix_probability: Chance that a batch is mixed.
        cutmix_share: Share of the mixed batches that are cutmix, where both are on.
        label_smoothing: Share of each label that is spread evenly over all classes.

    Raises:
        ConfigError: For numbers out of range.
    """

    min_scale: float = 0.08
    padding: int | None = None
    hflip: float = 0.5
    auto_augment: str | None = None
    color_jitter: float = 0.4
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    cutmix_share: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_types_(self)
        check(0.0 < self.min_scale <= 1.0, f"min_scale={self.min_scale}: must lie in (0, 1]")
        check(self.padding is None or self.padding >= 0, f"padding={self.padding}: must not be negative")
        for name in _SHARES:
            check(0.0 <= getattr(self, name) <= 1.0, f"{name}={getattr(self, name)}: must lie in [0, 1]")
        for name in ("color_jitter", "mixup", "cutmix"):
            check(getattr(self, name) >= 0.0, f"{name}={getattr(self, name)}: must not be negative")
        check(0.0 <= self.label_smoothing < 1.0, f"label_smoothing={self.label_smoothing}: must lie in [0, 1)")

    def transform(
        self, image_size: int, mean: Sequence[float], std: Sequence[float], interpolation: str
    ) -> Callable[[Any], Tensor]:
        """What makes an RGB image of any size a normalised ``(3, image_size, image_size)``.

        Raises:
            ConfigError: If timm does not know the policy.
        """
        try:
            whole = create_transform(
                (3, image_size, image_size),
                is_training=True,
                scale=(self.min_scale, 1.0),
                hflip=self.hflip,
                auto_augment=self.auto_augment,
                color_jitter=self.color_jitter,
                re_prob=self.random_erasing,
                interpolation=interpolation,
                mean=tuple(mean),
                std=tuple(std),
            )
        except AssertionError as error:  # timm's own way to refuse a policy
            raise ConfigError(
                f"auto_augment={self.auto_augment!r}: timm has no such policy ({error}); allowed are e.g. "
                "rand-m9-mstd0.5, augmix-m5-w4-d2, original and 3a"
            ) from error
        if self.padding is not None:  # instead of timm's crop, which comes first
            resize = ResizeKeepRatio(image_size, longest=0.0, interpolation=interpolation)
            whole.transforms[:1] = [resize, RandomCrop(image_size, padding=self.padding, padding_mode="reflect")]
        return whole

    def mix(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Mix each image with that at the other end of the batch, and the labels alike.

        Of a batch of odd length, the last image stays as it is.

        Args:
            images: ``(B, C, H, W)``.
            labels: ``(B,)``.
            num_classes: Of the labels.

        Returns:
            The images, and a probability for every class of each, ``(B, num_classes)``; the labels as they were if
            there is neither mixup nor cutmix nor smoothing.
        """
        if not (self.mixup or self.cutmix):
            if not self.label_smoothing:
                return images, labels
            return images, mixup_target(labels, num_classes, smoothing=self.label_smoothing)
        mixup = Mixup(
            self.mixup,
            self.cutmix,
            prob=self.mix_probability,
            switch_prob=self.cutmix_share,
            label_smoothing=self.label_smoothing,
            num_classes=num_classes,
        )
        even = len(images) // 2 * 2
        mixed, targets = mixup(images[:even], labels[:even])
        rest = mixup_target(labels[even:], num_classes, smoothing=self.label_smoothing)
        return torch.cat([mixed, images[even:]]), torch.cat([targets, rest])


STANDARD = Augmentation()
