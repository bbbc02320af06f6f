"""Pictures of any mode and depth give what their 8-bit RGB twin gives; what is no picture is told by its name."""

import io
import struct

import numpy as np
import pytest
import timm
import torch
import transformers
from datasets import Dataset
from PIL import Image, ImageCms, ImageOps

from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.data import Augmentation, DatasetSource, ImageClassification
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing, as_rgb, opened, preprocessing_of
from d2dmoe_pl.errors import ConfigError

GREY = np.arange(0, 240, 4, dtype=np.uint8).reshape(6, 10)
COLOUR = np.stack([GREY, GREY[::-1], np.flip(GREY, 1)], axis=-1)


def grey(mode):
    if mode == "F":
        return Image.fromarray((GREY / 255).astype(np.float32))
    if mode == "I;16B":
        return Image.frombytes("I;16B", GREY.shape[::-1], (GREY.astype(">u2") * 257).tobytes())
    if mode == "I;16":
        return Image.fromarray(GREY.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(GREY.astype(np.int32) * 257)
    return Image.fromarray(GREY).convert(mode)


class TestModes:
    @pytest.mark.parametrize("mode", ["L", "LA", "I", "I;16", "I;16B", "F", "P", "PA"])
    def test_grey(self, mode):
        found = np.asarray(as_rgb(grey(mode)))
        assert found.shape == (6, 10, 3)
        assert np.array_equal(found, np.stack([GREY] * 3, axis=-1))

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
    def test_colour(self, mode):
        found = np.asarray(as_rgb(Image.fromarray(COLOUR).convert(mode))).astype(int)
        assert np.abs(found - COLOUR).max() <= (8 if mode in ("YCbCr", "HSV") else 0)

    def test_lab(self):
        image = Image.fromarray(COLOUR)
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        lab = ImageCms.applyTransform(image, to_lab)
        assert lab.mode == "LAB"
        assert np.abs(np.asarray(as_rgb(lab)).astype(int) - COLOUR).mean() < 6

    def test_black_and_white(self):
        assert set(np.asarray(as_rgb(Image.fromarray(GREY > 100))).ravel()) == {0, 255}

    @pytest.mark.parametrize("ending", ["png", "tiff"])
    def test_files_of_sixteen_bits(self, tmp_path, ending):
        Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / f"a.{ending}")
        found = opened({"bytes": None, "path": str(tmp_path / f"a.{ending}")}, "a")
        assert np.array_equal(np.asarray(found)[..., 0], GREY)

    def test_a_palette_with_something_transparent(self):
        image = Image.fromarray(COLOUR).quantize(16)
        plain = np.asarray(as_rgb(image))
        image.info["transparency"] = 3
        assert np.array_equal(np.asarray(as_rgb(image)), plain)

    def test_upright(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif)
        assert opened({"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, "a").size == (6, 10)

    @pytest.mark.parametrize("orientation", range(10))
    def test_upright_by_every_orientation(self, tmp_path, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(opened({"bytes": None, "path": str(tmp_path / "a.png")}, "a"), expected)

    def test_upright_where_other_tags_are_broken(self, tmp_path):
        # little-endian TIFF: orientation 6, and a resolution unit (SHORT) whose type says SLONG, and is -5
        tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHIi", 0x0128, 9, 1, -5)
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
        Image.fromarray(COLOUR).save(tmp_path / "a.jpg", exif=exif)
        with Image.open(tmp_path / "a.jpg") as image, pytest.raises(struct.error):
            ImageOps.exif_transpose(image)
        assert opened({"bytes": None, "path": str(tmp_path / "a.jpg")}, "a").size == (6, 10)


def png(i):
    content = io.BytesIO()
    Image.new("RGB", (12, 12), [(200, 0, 0), (0, 0, 200)][i % 2]).save(content, "png")
    return content.getvalue()


def source(tmp_path, column, name="a.parquet"):
    rows = {"image": column, "label": ["red", "blue"] * (len(column) // 2)}
    dataset = Dataset.from_dict(rows)
    (dataset.to_csv if name.endswith("csv") else dataset.to_parquet)(tmp_path / name)
    return DatasetSource(**dict.fromkeys(("train", "validation", "test"), str(tmp_path / name)))


class TestColumns:
    def pixels(self, where):
        data = ImageClassification(where, image_size=8, batch_size=4, augment=False)
        data.setup()
        return next(iter(data.test_dataloader()))["pixel_values"]

    def test_paths_and_bytes_give_the_same(self, tmp_path, monkeypatch):
        for i in range(4):
            (tmp_path / f"{i}.png").write_bytes(png(i))
        expected = self.pixels(source(tmp_path, [png(i) for i in range(4)]))
        assert expected[0, 0].mean() > expected[1, 0].mean()
        for paths in ([f"{i}.png" for i in range(4)], [str(tmp_path / f"{i}.png") for i in range(4)]):
            for name in ("b.csv", "b.parquet"):
                assert torch.equal(self.pixels(source(tmp_path, paths, name)), expected)

    @pytest.mark.parametrize("content", [b"nothing", b"", png(0)[:40]])
    def test_what_is_no_picture_is_named(self, tmp_path, content):
        where = source(tmp_path, [png(0), png(1), content, png(1)])
        message = "image_column='image': sample 3 of the test split cannot be read as a picture: "
        with pytest.raises(ConfigError, match=message):
            self.pixels(where)

    def test_a_file_that_is_not_there_is_named(self, tmp_path):
        (tmp_path / "0.png").write_bytes(png(0))
        where = source(tmp_path, ["0.png", "nowhere.png"], "a.csv")
        with pytest.raises(ConfigError, match=r"sample 2 of the test split \(nowhere.png\) cannot be read"):
            self.pixels(where)

    def test_a_column_of_something_else(self, tmp_path):
        with pytest.raises(ConfigError, match=r"image_column='image': has Value\('int64'\) in the train split"):
            self.pixels(source(tmp_path, [1, 2]))

    def test_a_picture_that_is_missing(self, tmp_path):
        with pytest.raises(ConfigError, match="image_column='image': sample 2 of the test split has no picture"):
            self.pixels(source(tmp_path, [png(0), None]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation='cubic': allowed are nearest, lanczos, bilinear, bicubic"),
        ({"crop_pct": 1.2}, r"crop_pct=1.2: must lie in \(0, 1\]"),
        ({"image_size": 0}, "image_size=0: must be positive"),
        (
            {"std": [1.0, 1.0, 0.0]},
            r"mean=.*, std=\[1.0, 1.0, 0.0\]: must be three numbers each, those of std positive",
        ),
        ({"mean": [0.5]}, r"mean=\[0.5\], std=.*: must be three numbers each"),
    ],
)
def test_bad_settings(tmp_path, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        ImageClassification(DatasetSource(), **kwargs)


@pytest.mark.parametrize("keeps_ratio", [True, False])
def test_a_processor_says_what_it_does(tmp_path, keeps_ratio):
    made = ImagePreprocessing(3, 8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "bilinear", 0.8, keeps_ratio)
    made.write(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert preprocessing_of(processor, "it") == made


def test_a_processor_of_something_else():
    with pytest.raises(ConfigError, match="processor='it': makes no pixel_values of a picture"):
        preprocessing_of(lambda images, return_tensors: {"input_features": None}, "it")


PROCESSORS = {
    "blue first": lambda: transformers.MobileViTImageProcessor(size={"height": 12, "width": 12}, do_center_crop=False),
    "scaled otherwise": lambda: transformers.ViTImageProcessor(
        size={"height": 12, "width": 12}, rescale_factor=1 / 127.5, do_normalize=False
    ),
    "not scaled": lambda: transformers.ViTImageProcessor(
        size={"height": 12, "width": 12}, do_rescale=False, image_mean=[127.5] * 3, image_std=[60, 70, 80]
    ),
}


@pytest.mark.parametrize("kind", list(PROCESSORS))
def test_training_and_evaluation_see_the_same_colours(tmp_path, kind):
    PROCESSORS[kind]().save_pretrained(tmp_path)
    where = source(tmp_path, [png(0), png(0)])
    plain = Augmentation(min_scale=1.0, hflip=0.0, color_jitter=0.0)
    data = ImageClassification(where, processor=str(tmp_path), augmentation=plain)
    data.setup()
    assert data.augmented
    trained, evaluated = (
        next(iter(loader))["pixel_values"] for loader in (data.train_dataloader(), data.val_dataloader())
    )
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-4)


def test_a_processor_that_mixes_colours():
    def grey(images, return_tensors):
        made = [torch.tensor(np.asarray(image.resize((8, 8)).convert("L").convert("RGB"))) for image in images]
        return {"pixel_values": torch.stack(made).permute(0, 3, 1, 2)}

    with pytest.raises(ConfigError, match=r"processor='it': mixes colours; must scale and shift"):
        preprocessing_of(grey, "it")


def test_the_processor_of_a_timm_folder(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    model.model_args = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "squash"}
    save_artifact(model, tmp_path / "timm")
    data = ImageClassification(source(tmp_path, [png(0), png(1)]), processor=str(tmp_path / "timm"))
    data.load_processor()
    expected = ImagePreprocessing(3, 8, (0.5,) * 3, (0.5,) * 3, "bilinear", 0.8, keeps_ratio=False)
    assert data.preprocessing == expected
    (tmp_path / "saved").mkdir()
    data.save_processor(tmp_path / "saved")
    saved = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert preprocessing_of(saved, "it") == expected


def test_a_picture_that_its_library_breaks_off_on(monkeypatch):
    def broken(content):
        raise RuntimeError("Conversion from YUV failed")  # as libavif does

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ConfigError, match=r"it cannot be read as a picture: Conversion from YUV failed"):
        opened({"bytes": b"", "path": None}, "it")
