"""scikit-learn's handwritten digits: real data that comes with a package."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing
from d2dmoe_pl.data.task import Classification, Task
from d2dmoe_pl.data.task_data import TaskData

SPLIT_SEED = 0
NUM_VALIDATION = 150
NUM_TEST = 400


class Digits(TaskData):
    """1,797 grey images of 8 x 8 pixels, 10 classes: 1,247 to train on, 150 to validate, 400 to test, always the same.

    Batches: ``pixel_values`` ``(B, 1, 8, 8)`` in [0, 1], ``labels`` ``(B,)``.

    Args:
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        augment: Turn, scale and shift training images a little.
    """

    preprocessing = ImagePreprocessing(1, 8, (0.0,), (1.0,), "bilinear", largest=16)

    def __init__(self, batch_size: int = 32, num_workers: int = 0, augment: bool = True) -> None:
        super().__init__(batch_size, num_workers)
        self.augment = augment

    @property
    def augmented(self) -> bool:
        return self.augment

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / digits.images.max()  # (1797, 1, 8, 8)
        dataset = TensorDataset(images, torch.from_numpy(digits.target))
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        test, validation, train = (
            order[:NUM_TEST],
            order[NUM_TEST:][:NUM_VALIDATION],
            order[NUM_TEST + NUM_VALIDATION :],
        )
        splits = {"train": train, "validation": validation, "test": test}
        task = Classification([str(digit) for digit in range(10)])
        return {name: Subset(dataset, indices) for name, indices in splits.items()}, task

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]], augment: bool) -> dict[str, Tensor]:
        images, labels = (torch.stack(column) for column in zip(*samples, strict=True))
        return {"pixel_values": jitter(images) if augment and self.augment else images, "labels": labels}

    def save_processor(self, folder: Path) -> None:
        self.preprocessing.write(folder)


def jitter(images: Tensor, degrees: float = 8.0, scale: float = 0.08, shift: float = 0.1) -> Tensor:
    """Turn, scale and shift each image at random.

    Args:
        images: ``(B, C, H, W)``.
        degrees: Largest rotation either way.
        scale: Largest relative change of size either way.
        shift: Largest shift either way, as a share of half the image.

    Returns:
        ``(B, C, H, W)``.
    """
    batch = images.shape[0]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape) * 2 - 1

    angle = torch.deg2rad(uniform() * degrees)
    size = 1 + uniform() * scale
    cos, sin = angle.cos() * size, angle.sin() * size
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(batch, 2, 2)
    affine = torch.cat([rotation, uniform(2, 1) * shift], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images, grid, align_corners=False)
