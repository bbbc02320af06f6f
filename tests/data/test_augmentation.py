"""Mixed images and labels against naive twins, the crops of small images, and what cannot be."""

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch.nn import functional as F

from d2dmoe_pl.data import Augmentation, Classification
from d2dmoe_pl.errors import ConfigError

LABELS = torch.tensor([0, 1, 2, 0, 1])
IMAGES = torch.arange(1.0, 6.0).view(5, 1, 1, 1).expand(5, 3, 8, 8)  # each of one colour
STRAIGHT = {"hflip": 0.0, "color_jitter": 0.0}
LOOK = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}


def smooth(share):
    return F.one_hot(LABELS, 3) * (1 - share) + share / 3


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_label_counts_as_much_as_its_image(kind):
    np.random.seed(0)  # timm's source of chance
    images, labels = Augmentation(label_smoothing=0.3, **{kind: 1.0}).mix(IMAGES.clone(), LABELS, 3)
    partner = torch.tensor([3, 2, 1, 0, 4])
    own = IMAGES.mean((1, 2, 3))
    kept = (images.mean((1, 2, 3)) - own[partner])[:4] / (own - own[partner])[:4]
    kept = torch.cat([kept, torch.ones(1)]).unsqueeze(1)  # the fifth has no partner
    torch.testing.assert_close(labels, kept * smooth(0.3) + (1 - kept) * smooth(0.3)[partner])
    assert 0 < kept[0] < 1
    assert images[0].unique().numel() == (1 if kind == "mixup" else 2)


def test_unmixed_labels():
    assert torch.equal(Augmentation().mix(IMAGES, LABELS, 3)[1], LABELS)
    torch.testing.assert_close(Augmentation(label_smoothing=0.3).mix(IMAGES, LABELS, 3)[1], smooth(0.3))
    torch.testing.assert_close(Augmentation(mixup=1.0, mix_probability=0.0).mix(IMAGES, LABELS, 3)[1], smooth(0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_labels_in_loss_and_metrics(dtype):
    task, logits = Classification(["a", "b", "c"]), torch.randn(5, 3).to(dtype)
    hard, soft = task.metrics(), task.metrics()
    hard.update(logits, {"labels": LABELS})
    soft.update(logits, {"labels": F.one_hot(LABELS, 3).float()})
    assert {name: float(value) for name, value in soft.compute().items()} == pytest.approx(
        {name: float(value) for name, value in hard.compute().items()}
    )
    expected = F.cross_entropy(logits.float(), LABELS, label_smoothing=0.3)
    torch.testing.assert_close(task.loss(logits, {"labels": smooth(0.3)}), expected)


def test_a_crop_with_a_margin_moves_a_small_image():
    grey = Pillow.new("L", (8, 8))
    grey.putdata(range(64))
    image, original = grey.convert("RGB"), torch.arange(64.0).view(8, 8) / 255
    still = Augmentation(padding=0, **STRAIGHT).transform(8, **LOOK)(image)
    torch.testing.assert_close(still, original.expand(3, 8, 8))
    moved = Augmentation(padding=2, **STRAIGHT).transform(8, **LOOK)
    margin = F.pad(original.view(1, 1, 8, 8), (2,) * 4, mode="reflect")[0, 0]  # (12, 12)
    windows = margin.unfold(0, 8, 1).unfold(1, 8, 1).flatten(0, 1)  # (25, 8, 8)
    seen = {int((windows - moved(image)[0]).abs().amax((1, 2)).argmin()) for _ in range(20)}
    assert all((windows - moved(image)[0]).abs().amax((1, 2)).min() < 1e-6 for _ in range(5))
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"min_scale": 0.0}, r"min_scale=0.0: must lie in \(0, 1\]"),
        ({"padding": -1}, "padding=-1: must not be negative"),
        ({"hflip": 1.5}, r"hflip=1.5: must lie in \[0, 1\]"),
        ({"cutmix": -1.0}, "cutmix=-1.0: must not be negative"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0: must lie in \[0, 1\)"),
    ],
)
def test_numbers_out_of_range(setting, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**setting)


@pytest.mark.parametrize("policy", ["rand-z9", "best"])
def test_an_unknown_policy(policy):
    with pytest.raises(ConfigError, match=f"auto_augment='{policy}': timm has no such policy .*; allowed are e.g."):
        Augmentation(auto_augment=policy).transform(8, **LOOK)
