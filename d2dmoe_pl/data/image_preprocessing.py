"""How pictures become model input, as timm and Hugging Face transformers write it down; and pictures of any mode."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from d2dmoe_pl.errors import ConfigError, check

# as timm, and as PIL calls them
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
SEEN = ("black", "white", "#f00", "#0f0", "#00f")  # colours that tell what is done to any


@dataclass(frozen=True)
class ImagePreprocessing:
    """What is done to a picture that a model is to see.

    Attributes:
        channels: Of the input.
        size: Height and width of the input, pixels.
        mean: Of each channel, for normalisation, where values lie in [0, 1].
        std: Of each channel, likewise.
        interpolation: How it is resized, one of ``INTERPOLATIONS``.
        crop_pct: Share of the resized picture that is kept, in its middle.
        keeps_ratio: Whether the shorter side is resized to ``size / crop_pct``; both are otherwise.
        largest: What a channel's largest value is in a raw picture.
        order: Which channel of a raw picture each channel of the input is, where some models take blue first.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    keeps_ratio: bool = True
    largest: int = 255
    order: tuple[int, ...] = (0, 1, 2)

    def pretrained_cfg(self) -> dict[str, Any]:
        """As timm's models say it: ``timm.data.resolve_model_data_config`` reads it."""
        return {
            "input_size": [self.channels, self.size, self.size],
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": "center" if self.keeps_ratio else "squash",
        }

    def processor_config(self) -> dict[str, Any]:
        """As Hugging Face image processors say it: ``transformers.AutoImageProcessor`` reads it."""
        resized = int(self.size / self.crop_pct)
        size = {"shortest_edge": resized} if self.keeps_ratio else {"height": resized, "width": resized}
        return {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": self.channels == 3,
            "do_resize": True,
            "size": size,
            "resample": INTERPOLATIONS[self.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / self.largest,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def write(self, folder: Path) -> None:
        """Write ``preprocessor_config.json`` into ``folder``."""
        (folder / "preprocessor_config.json").write_text(json.dumps(self.processor_config(), indent=2) + "\n")


def preprocessing_of(processor: Any, name: str) -> ImagePreprocessing:
    """What a Hugging Face image processor does: to colours as it is seen to, since each has settings of its own.

    Args:
        processor: It takes a list of pictures as ``images``.
        name: What the user calls it, for the error.

    Raises:
        ConfigError: If it gives no square pictures, or does to colours what no mean and standard deviation say.
    """
    try:
        seen = processor(images=[Image.new("RGB", (64, 48), colour) for colour in SEEN], return_tensors="pt")
        made = torch.as_tensor(seen["pixel_values"])
        shape = (1, *made.shape[1:])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"processor={name!r}: makes no pixel_values of a picture ({error})") from error
    check(
        len(shape) == 4 and shape[2] == shape[3],
        f"processor={name!r}: makes pixel_values of {tuple(shape)}; must be (1, channels, size, size)",
    )
    channels, size = int(shape[1]), int(shape[2])
    mean, std, order = _normalisation(made[:, :, size // 2, size // 2].double(), name)
    told = described_by_timm(processor)
    if told is not None:
        ratio = told["crop_mode"] != "squash"
        return ImagePreprocessing(
            channels, size, mean, std, told["interpolation"], told["crop_pct"], ratio, order=order
        )
    resized = dict(processor.size) if getattr(processor, "do_resize", False) else {}
    shortest = resized.get("shortest_edge")
    filters = {number: filter_name for filter_name, number in INTERPOLATIONS.items()}
    resample = getattr(processor, "resample", None)
    return ImagePreprocessing(
        channels,
        size,
        mean,
        std,
        "bilinear" if resample is None else filters.get(int(resample), "bilinear"),
        min(1.0, size / (shortest or resized.get("height", size))),
        shortest is not None,
        order=order,
    )


def described_by_timm(processor: Any) -> dict[str, Any] | None:
    """What timm says that is done to pictures, of the processor that transformers makes of a timm model's folder."""
    return getattr(processor, "data_config", None)


def _normalisation(made: Tensor, name: str) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """Mean and standard deviation of each channel, and which channel of a picture it is.

    Args:
        made: Of a pixel of each colour of ``SEEN``, ``(5, C)``.
        name: Of the processor, for the error.
    """
    black, white = made[:2]
    std = 1 / (white - black)
    parts = (made[2:] - black) * std  # (3, C), of red, green and blue
    order = parts.argmax(dim=0) if len(black) == 3 else torch.arange(3)  # grey has no colours
    only = torch.eye(3, dtype=parts.dtype)[:, order]
    check(
        bool(std.isfinite().all()) and (len(black) != 3 or torch.allclose(parts, only, atol=0.02)),
        f"processor={name!r}: mixes colours; must scale and shift those of each channel",
    )
    mean = [round(value, 6) + 0.0 for value in (-black * std).tolist()]
    return tuple(mean), tuple(round(value, 6) for value in std.tolist()), tuple(order.tolist())


def opened(value: Any, where: str) -> Image.Image:
    """A picture in memory, 8-bit RGB, upright.

    Args:
        value: A picture, or what ``datasets.Image`` keeps of one undecoded: ``bytes`` or a ``path``.
        where: What it is called, for the error.

    Raises:
        ConfigError: If it cannot be read as a picture.
    """
    if isinstance(value, Image.Image):
        return as_rgb(value)
    check(value is not None, f"{where} has no picture")
    content, path = value["bytes"], value["path"]
    where = where if path is None else f"{where} ({path})"
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            return as_rgb(upright(image))
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{where} cannot be read as a picture: {' '.join(str(error).split())}") from error


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its Exif data says, of which nothing else is read: other tags may be broken."""
    image.load()  # in PNG it may stand behind the picture
    turns = {
        **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
        **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
        8: Image.Transpose.ROTATE_90,
    }
    turn = turns.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode and depth as 8-bit RGB.

    Grey levels of 16 bits, whole numbers above 255 and floating-point numbers up to 1 are scaled to 8 bits, where PIL
    would clip them. What is transparent has the colour that it has in the file.
    """
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image).astype(np.float64)
        if image.mode.startswith("I;16") or levels.max(initial=0) > 255:
            levels = levels / 257  # 65,535 is 255
        elif image.mode == "F" and levels.max(initial=0) <= 1:
            levels = levels * 255
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        return ImageCms.applyTransform(image, to_rgb) or image
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
