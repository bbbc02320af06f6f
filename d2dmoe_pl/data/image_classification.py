"""Images with labels, from any Hugging Face dataset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from PIL.Image import Image as Picture
from PIL.Image import merge
from timm.data import create_transform
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor

from d2dmoe_pl.data.augmentation import STANDARD, Augmentation
from d2dmoe_pl.data.class_labels import encode_labels
from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.image_preprocessing import (
    INTERPOLATIONS,
    ImagePreprocessing,
    described_by_timm,
    opened,
    preprocessing_of,
)
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.local_folders import with_found_files
from d2dmoe_pl.data.sample_names import SAMPLE, sample_names
from d2dmoe_pl.data.task import Classification, Task
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.errors import check

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class ImageClassification(TaskData):
    """Images of any size, resized, augmented for training by timm's transforms, and normalised.

    Batches: ``pixel_values`` ``(B, 3, image_size, image_size)``, ``labels`` ``(B,)``; those of mixed or smoothed
    training images are probabilities ``(B, C)``.

    Args:
        source: Where the splits are.
        image_column: Column of the images, of any mode and depth; or of their bytes, or their paths, relative to the
            working folder or to the file that has the column.
        label_column: Column of the labels, strings or whole numbers.
        processor: Hub name or folder of a Hugging Face image processor, which prepares images to evaluate on, and is
            saved with the model; ``image_size``, ``mean`` and ``std`` of training images are its own.
        image_size: Height and width of the model's input, pixels.
        mean: Of each channel, for normalisation.
        std: Of each channel, for normalisation.
        interpolation: ``nearest``, ``bilinear``, ``bicubic``, ``lanczos``, ``box``, ``hamming``, or ``random`` in
            training, which is ``bilinear`` in evaluation.
        crop_pct: Share of the resized image that evaluation keeps.
        keeps_ratio: Resize the shorter side for evaluation and cut the longer one; resize both to the same otherwise.
        augment: Change training images at random.
        augmentation: How training images are changed.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: For a number out of range or an unknown interpolation; to load, for a ``processor`` that is not
            there; for an image that cannot be read.
    """

    raw_inputs = "pictures"

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
        keeps_ratio: bool = True,
        augment: bool = True,
        augmentation: Augmentation = STANDARD,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check(image_size > 0, f"image_size={image_size}: must be positive")
        check(
            interpolation in (*INTERPOLATIONS, "random"),
            f"interpolation={interpolation!r}: allowed are {', '.join(INTERPOLATIONS)} and random",
        )
        check(0.0 < crop_pct <= 1.0, f"crop_pct={crop_pct}: must lie in (0, 1]")
        check(
            len(mean) == len(std) == 3 and min(std) > 0,
            f"mean={mean}, std={std}: must be three numbers each, those of std positive",
        )
        self.source = source
        self.image_column = image_column
        self.label_column = label_column
        self.processor_name = processor
        self.processor: BaseImageProcessor | None = None
        self.image_size, self.mean, self.std = image_size, list(mean), list(std)
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.keeps_ratio = keeps_ratio
        self.augment = augment
        self.augmentation = augmentation

    @property
    def augmented(self) -> bool:
        return self.augment

    def load_processor(self) -> None:
        if self.processor is None and self.processor_name is not None:
            self.processor = load_pretrained(AutoImageProcessor, self.processor_name, "processor")
            self.preprocessing = preprocessing_of(self.processor, self.processor_name)
            self.image_size = self.preprocessing.size
            self.mean, self.std = list(self.preprocessing.mean), list(self.preprocessing.std)
        look: dict[str, Any] = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        self._training = self.augmentation.transform(self.image_size, **look)
        if self.processor is None:
            interpolation = "bilinear" if self.interpolation == "random" else self.interpolation
            self.preprocessing = ImagePreprocessing(
                3, self.image_size, tuple(self.mean), tuple(self.std), interpolation, self.crop_pct, self.keeps_ratio
            )
            self._evaluation = create_transform(
                (3, self.image_size, self.image_size),
                crop_pct=self.crop_pct,
                crop_mode="center" if self.keeps_ratio else "squash",
                **{**look, "interpolation": interpolation},
            )

    def load(self) -> tuple[Mapping[str, Any], Task]:
        same = f"image_column={self.image_column!r}: is the label_column; must be another"
        check(self.image_column != self.label_column, same)
        splits = self.source.load()
        check_columns(splits, {"image_column": self.image_column, "label_column": self.label_column})
        undecoded = {name: self._undecoded(split, name) for name, split in splits.items()}
        encoded, names = encode_labels(undecoded, self.label_column)
        return encoded, Classification(names)

    def _undecoded(self, split: Dataset, name: str) -> Dataset:
        """The split with pictures as they are in their files, and what each sample is called."""
        split = split.select_columns([self.image_column, self.label_column])
        feature = split.features[self.image_column]
        kind = getattr(feature, "dtype", None)
        check(
            isinstance(feature, Image) or kind in ("string", "large_string", "binary", "large_binary"),
            f"image_column={self.image_column!r}: has {feature} in the {name} split; must be pictures, their paths or "
            "their bytes",
        )
        names = sample_names(split, name)
        if kind in ("string", "large_string"):
            split = with_found_files(split, self.image_column, self.source.folder_of(name), "pictures")
        split = split.cast_column(self.image_column, Image(decode=False))
        return split.add_column(SAMPLE, list(names))

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        """Pictures by their paths."""
        names = list(map(str, inputs))
        paths = Dataset.from_dict({self.image_column: names, SAMPLE: names}).cast_column(
            self.image_column, Image(decode=False)
        )
        return paths.add_column("labels", [0] * len(names))

    def collate(self, samples: Sequence[dict[str, Any]], augment: bool) -> dict[str, Tensor]:
        augment = augment and self.augment
        pictures = [
            opened(sample[self.image_column], f"image_column={self.image_column!r}: {sample[SAMPLE]}")
            for sample in samples
        ]
        if augment:
            assert self.preprocessing is not None  # it is loaded
            ordered = [_in_order(picture, self.preprocessing.order) for picture in pictures]
            images = torch.stack([self._training(picture) for picture in ordered])
        elif self.processor is not None:
            images = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        else:
            images = torch.stack([self._evaluation(picture) for picture in pictures])
        labels = torch.tensor([sample["labels"] for sample in samples])
        if augment:
            assert self.task is not None
            images, labels = self.augmentation.mix(images, labels, self.task.num_outputs)
        return {"pixel_values": images, "labels": labels}

    def save_processor(self, folder: Path) -> None:
        if self.processor is not None and described_by_timm(self.processor) is None:  # whose own is not written
            self.processor.save_pretrained(folder)
        else:
            assert self.preprocessing is not None  # it is loaded
            self.preprocessing.write(folder)


def _in_order(picture: Picture, order: Sequence[int]) -> Picture:
    """A picture with its channels where a model takes them to be."""
    return picture if list(order) == [0, 1, 2] else merge("RGB", [picture.getchannel(index) for index in order])
