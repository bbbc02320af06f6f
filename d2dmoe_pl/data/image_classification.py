"""Images with labels, from any Hugging Face dataset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor

from d2dmoe_pl.data.augmentation import STANDARD, Augmentation
from d2dmoe_pl.data.class_labels import encode_labels
from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.preprocessor_config import write_preprocessor_config
from d2dmoe_pl.data.task import Classification, Task
from d2dmoe_pl.data.task_data import TaskData

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class ImageClassification(TaskData):
    """Images of any size, resized, augmented for training by timm's transforms, and normalised.

    Batches: ``pixel_values`` ``(B, 3, image_size, image_size)``, ``labels`` ``(B,)``; those of mixed or smoothed
    training images are probabilities ``(B, C)``.

    Args:
        source: Where the splits are.
        image_column: Column of the images.
        label_column: Column of the labels, strings or integers.
        processor: Hub name or folder of a Hugging Face image processor, from which ``image_size``, ``mean`` and
            ``std`` are taken, and which is saved with the model.
        image_size: Height and width of the model's input, pixels.
        mean: Of each channel, for normalisation.
        std: Of each channel, for normalisation.
        interpolation: ``bilinear``, ``bicubic`` or ``random`` (for training).
        crop_pct: Share of the resized image that evaluation keeps.
        augment: Change training images at random.
        augmentation: How training images are changed.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: To load, for a ``processor`` that is not there.
    """

    def __init__(
        self,
        source: DatasetSource,
        image_column: str = "image",
        label_column: str = "label",
        processor: str | None = None,
        image_size: int = 224,
        mean: list[float] = IMAGENET_MEAN,
        std: list[float] = IMAGENET_STD,
        interpolation: str = "bicubic",
        crop_pct: float = 0.9,
        augment: bool = True,
        augmentation: Augmentation = STANDARD,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.source = source
        self.image_column = image_column
        self.label_column = label_column
        self.processor_name = processor
        self.processor: BaseImageProcessor | None = None
        self.image_size, self.mean, self.std = image_size, list(mean), list(std)
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.augment = augment
        self.augmentation = augmentation

    @property
    def augmented(self) -> bool:
        return self.augment

    def load_processor(self) -> None:
        if self.processor is None and self.processor_name is not None:
            self.processor = load_pretrained(AutoImageProcessor, self.processor_name, "processor")
            processor: Any = self.processor
            size = dict(processor.size)
            self.image_size = size.get("height") or size["shortest_edge"]
            self.mean, self.std = list(processor.image_mean), list(processor.image_std)

        look: dict[str, Any] = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        self._evaluation = create_transform((3, self.image_size, self.image_size), crop_pct=self.crop_pct, **look)
        self._training = self.augmentation.transform(self.image_size, **look)

    def load(self) -> tuple[Mapping[str, Any], Task]:
        splits = self.source.load()
        check_columns(splits, {"image_column": self.image_column, "label_column": self.label_column})
        splits, names = encode_labels(splits, self.label_column)
        return splits, Classification(names)

    def collate(self, samples: Sequence[dict[str, Any]], augment: bool) -> dict[str, Tensor]:
        augment = augment and self.augment
        transform = self._training if augment else self._evaluation
        images = torch.stack([transform(sample[self.image_column].convert("RGB")) for sample in samples])
        labels = torch.tensor([sample["labels"] for sample in samples])
        if augment:
            assert self.task is not None
            images, labels = self.augmentation.mix(images, labels, self.task.num_outputs)
        return {"pixel_values": images, "labels": labels}

    def save_processor(self, folder: Path) -> None:
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        else:
            write_preprocessor_config(folder, self.image_size, self.mean, self.std, rescale_factor=1 / 255)
