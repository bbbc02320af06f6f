"""Raw pictures and texts through the product, and through plain transformers or timm from the artifact: the same."""

import inspect
import json

import numpy as np
import pytest
import timm
import tiny
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from d2dmoe_pl.adapters import HuggingFaceModel, TimmModel
from d2dmoe_pl.callbacks import SaveArtifact
from d2dmoe_pl.data import DatasetSource, ImageClassification, TextClassification
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing
from d2dmoe_pl.phases import FineTuning

SIZES = [(12, 12), (30, 17), (9, 40), (64, 48), (8, 8), (25, 24)]
SETTINGS = {"image_size": 8, "mean": [0.2, 0.3, 0.4], "std": [0.3, 0.2, 0.1]}
WORDS = list("abcdefgh")
PICTURES = [kind for kind in tiny.SOURCES if tiny.TASKS[kind] == "image-classification"]
TEXTS = [kind for kind in tiny.SOURCES if tiny.TASKS[kind] == "text-classification"]
PROCESSORS = {
    "squash": ImagePreprocessing(3, 8, (0.5,) * 3, (0.25,) * 3, "bilinear", keeps_ratio=False),
    "crop": ImagePreprocessing(3, 8, (0.5,) * 3, (0.25,) * 3, "bicubic", crop_pct=0.8),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of pictures of many shapes, smooth as pictures are, in three colours."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i, size in enumerate(SIZES * 3):
        small = generator.integers(0, 255, (3, 4, 3), dtype=np.uint8)
        place = folder / tiny.LABELS[i % 3]
        place.mkdir(exist_ok=True)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(place / f"{i:02}.png")
    return folder


def source_of(kind):
    """A model of ``kind`` that takes pictures in colour."""
    if "timm" in kind:
        given = tiny.SOURCES[kind]()
        return TimmModel(given.architecture, **{**given.model_args, "in_chans": 3})
    config = tiny.CONFIGS[kind]()
    getattr(config, "vision_config", config).num_channels = 3
    return HuggingFaceModel("image-classification", config=config)


def left(trainer, tmp_path, source, data):
    """Train a little, leave an artifact, and predict from it; the logits of the test split as probabilities."""
    phase = FineTuning(source=source)
    trainer(callbacks=[SaveArtifact()], limit_train_batches=2).fit(phase, datamodule=data)
    artifact = tmp_path / "run" / "artifact"
    batches = trainer().predict(FineTuning(init_from=str(artifact)), datamodule=data)
    return artifact, torch.cat([batch["probabilities"] for batch in batches])


def assert_same(found, expected, tolerance):
    assert torch.equal(found.argmax(-1), expected.argmax(-1)) or (found - expected).abs().max() < 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def plain_pictures(artifact, folder):
    """What plain libraries make of the pictures in ``folder``."""
    raw = [Image.open(file).convert("RGB") for file in sorted(folder.rglob("*.png"), key=lambda file: str(file))]
    if "architecture" in json.loads((artifact / "config.json").read_text()):
        model = timm.create_model(f"local-dir:{artifact}", pretrained=True).eval()
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
        return model(torch.stack([transform(picture) for picture in raw])).softmax(-1)
    model = transformers.AutoModelForImageClassification.from_pretrained(artifact).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(artifact)
    return model(**processor(images=raw, return_tensors="pt")).logits.softmax(-1)


@pytest.mark.parametrize(
    ("kind", "processor"),
    [
        # each kind with one of them, each of them with several kinds
        pytest.param(kind, name, marks=() if (i - j) % 3 == 0 else pytest.mark.thorough)
        for i, kind in enumerate(PICTURES)
        for j, name in enumerate([None, *PROCESSORS])
    ],
)
def test_pictures(trainer, tmp_path, pictures, kind, processor):
    where = dict.fromkeys(("train", "validation", "test"), str(pictures))
    settings = {} if processor is not None else {**SETTINGS, "crop_pct": 0.8, "interpolation": "bilinear"}
    if processor is not None:
        (tmp_path / "processor").mkdir()
        PROCESSORS[processor].write(tmp_path / "processor")
        settings["processor"] = str(tmp_path / "processor")
    data = ImageClassification(DatasetSource(**where), batch_size=8, augment=False, **settings)
    artifact, expected = left(trainer, tmp_path, source_of(kind), data)
    is_own = kind.startswith("timm") == (processor is None)
    # where PIL resizes on one side and torch on the other, pixels differ by a few of 255 levels
    assert_same(plain_pictures(artifact, pictures), expected, 1e-5 if is_own else 0.05)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "side"),
    [
        pytest.param(kind, side, marks=() if (i - j) % 2 == 0 else pytest.mark.thorough)
        for i, kind in enumerate(TEXTS)
        for j, side in enumerate(["left", "right"])
    ],
)
def test_texts(trainer, tmp_path, kind, side):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, length)) for length in [1, 3, 14, 2, 9, 25, 4, 6, 12]]
    rows = "".join(f"{text},{tiny.LABELS[i % 3]}\n" for i, text in enumerate(texts))
    (tmp_path / "all.csv").write_text("text,label\n" + rows)
    tokenizer = tiny.tokenizer(tmp_path / "tok", WORDS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>"))
    sided = transformers.AutoTokenizer.from_pretrained(tokenizer, padding_side=side)
    sided.save_pretrained(tokenizer)
    where = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "all.csv"))
    data = TextClassification(DatasetSource(**where), tokenizer, max_length=10, batch_size=4)
    artifact, expected = left(trainer, tmp_path, tiny.SOURCES[kind](), data)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(artifact).eval()
    plain = transformers.AutoTokenizer.from_pretrained(artifact)
    known = inspect.signature(model.forward).parameters
    rows = []
    for text in texts:  # one by one, since what plain models make of padding on the left is their own affair
        inputs = {
            key: value for key, value in plain(text, truncation=True, return_tensors="pt").items() if key in known
        }
        assert inputs["input_ids"].shape[1] <= 10
        rows.append(model(**inputs).logits[0])
    assert_same(torch.stack(rows).softmax(-1), expected, 1e-5)
