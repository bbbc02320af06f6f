"""Recordings: what is read, how they are prepared, what is refused; and a whole chain on them."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import Audio, Dataset
from table_files import first, write

from d2dmoe_pl.adapters import HuggingFaceModel, adapter_for
from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data import AudioClassification, DatasetSource
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RouterRegression

RATE = 800


@pytest.fixture
def processor(tmp_path):
    """A feature extractor for 12 frames of 4 bins, 0.06 seconds."""
    folder = tmp_path / "extractor"
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=4, sampling_rate=RATE, hop_length=4, chunk_length=0.06, n_fft=16
    )
    extractor.save_pretrained(folder)
    return str(folder)


def source(tmp_path, rows=12, **columns):
    """High and low notes, in every split."""
    time = np.arange(48) / RATE
    notes = [np.sin(2 * np.pi * (60 if row % 2 else 250) * time + row).tolist() for row in range(rows)]
    made = {"audio": notes, "label": ["low" if row % 2 else "high" for row in range(rows)], **columns}
    splits = ("train", "validation", "test")
    return DatasetSource(**{n: write(Dataset.from_dict(made), tmp_path / f"{n}.parquet") for n in splits})


def test_numbers_become_features(tmp_path, processor):
    where = source(tmp_path)
    data = AudioClassification(where, processor, batch_size=5)
    data.setup()
    assert data.task.label_names == ["high", "low"]
    batch = first(data.val_dataloader())
    assert batch["input_features"].shape == (5, 4, 12)
    assert batch["labels"].tolist() == [0, 1, 0, 1, 0]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(processor)
    numbers = np.asarray(where.load()["validation"][0]["audio"], dtype=np.float32)
    expected = extractor([numbers], sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(batch["input_features"][:1], expected)


def test_other_columns_may_be_called_anything(tmp_path, processor):
    where = source(tmp_path, sample=list(range(12)))
    columns = DatasetSource(train=where.train, validation=where.validation, test=where.test)
    data = AudioClassification(columns, processor, batch_size=5)
    data.setup()
    assert first(data.val_dataloader())["labels"].tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("kind", ["whisper", "any_audio"])
def test_a_chain_on_recordings_and_what_it_leaves(trainer, tmp_path, processor, kind):
    dense, clustered, routed = (tmp_path / name for name in ("dense", "clustered", "routed"))
    if kind == "any_audio":
        transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(processor)
    data = AudioClassification(source(tmp_path), processor, batch_size=4, seconds=0.1)
    model = HuggingFaceModel("audio-classification", config=tiny.CONFIGS[kind]())
    sweep = TauSweep([0.5, 1.0])
    for folder, phase, callbacks in (
        (dense, FineTuning(activation="relu", source=model), []),
        (clustered, ExpertClustering(8, init_from=str(dense / "artifact")), []),
        (routed, RouterRegression(8, init_from=str(clustered / "artifact")), [sweep]),
    ):
        run = trainer(default_root_dir=folder, logger=False, callbacks=[SaveArtifact(), *callbacks])
        run.fit(phase, datamodule=data)
    model, dense = (load_model(folder / "artifact") for folder in (routed, dense))
    assert len(moe_layers(model)) == 2
    assert sweep.rows["validation"][0].model_flops_percent < sweep.rows["validation"][1].model_flops_percent <= 100
    transformers.AutoFeatureExtractor.from_pretrained(routed / "artifact")
    batch = first(data.test_dataloader())
    set_tau_(model, 1.0)
    torch.testing.assert_close(tiny.logits(model, batch), tiny.logits(dense, batch), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_whole_whisper_writes_what_it_wrote():
    """Only its encoder is converted; the mask that goes with recordings is of frames, which are no tokens."""
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(tiny.CONFIGS["whisper"]()).eval()
    assert [ffn.name for ffn in adapter_for(model).ffns(model)] == [f"model.encoder.layers.{i}.fc1" for i in range(2)]
    features, mask = torch.randn(3, 4, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 5:] = 0

    def written():
        return model.generate(input_features=features, attention_mask=mask, max_new_tokens=6, do_sample=False)

    expected = written()
    tiny.route_(model, tau=1.0)
    assert torch.equal(written(), expected)
    counts = []
    handles = [layer.watch(lambda chosen: counts.append(len(chosen))) for layer in moe_layers(model).values()]
    written()
    assert counts == [18, 18]  # 3 recordings of 6 tokens, once
    assert len(handles) == 2


def set_up(data):
    data.setup()
    first(data.val_dataloader())


def test_a_file_that_cannot_be_read_is_told_by_its_sample(tmp_path, processor, monkeypatch):
    def decode_example(self, value):
        assert self.sampling_rate == RATE
        if value["bytes"] == b"broken":
            raise RuntimeError("Could not open input file\nin two lines")
        return {"array": np.full(48, float(value["bytes"]), dtype=np.float32)}

    monkeypatch.setattr(Audio, "decode_example", decode_example)
    monkeypatch.setattr("d2dmoe_pl.data.local_folders.find_spec", lambda name: name)
    audio = [{"bytes": str(row / 12).encode(), "path": None} for row in range(12)]
    where = source(tmp_path, audio=[*audio[:-1], {"bytes": b"broken", "path": None}])
    splits = {name: split.cast_column("audio", Audio(decode=False)) for name, split in where.load().items()}
    data = AudioClassification(where, processor, batch_size=11)
    monkeypatch.setattr(DatasetSource, "load", lambda self: splits)
    data.setup()
    batches = iter(data.val_dataloader())
    assert next(batches)["input_features"].shape == (11, 4, 12)
    message = r"audio_column='audio': sample 12 of the validation split cannot be read \(Could .* file in two lines\)$"
    with pytest.raises(ConfigError, match=message):
        next(batches)


def test_paths_lead_from_where_they_stand(tmp_path, processor, monkeypatch):
    def decode_example(self, value):
        return {"array": np.full(48, float(Path(value["path"]).read_text()), dtype=np.float32)}

    monkeypatch.setattr(Audio, "decode_example", decode_example)
    monkeypatch.setattr("d2dmoe_pl.data.local_folders.find_spec", lambda name: name)
    (tmp_path / "sounds").mkdir()
    for row in range(12):
        (tmp_path / "sounds" / f"{row}.wav").write_text(f"{row / 12}")
    data = AudioClassification(source(tmp_path, audio=[f"sounds/{row}.wav" for row in range(12)]), processor)
    data.setup()
    features = first(data.test_dataloader())["input_features"]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(processor)
    flat = [np.full(48, row / 12, dtype=np.float32) for row in range(12)]
    assert torch.equal(features, extractor(flat, sampling_rate=RATE, return_tensors="pt")["input_features"])
    (given,) = data._loader_of(data.raw_samples([str(tmp_path / "sounds" / "3.wav")]), False, None)
    assert torch.equal(given["input_features"], features[3:4])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"audio": [3] * 12},
            "audio_column='audio': has .* in the .* split; must be recordings, their paths",
        ),
        (
            {"audio": [[]] * 3 + [[0.5]] * 9},
            r"audio_column='audio': sample 1 of the validation split has the shape \(0,\)",
        ),
        ({"audio": [None] + [[0.5]] * 11}, "audio_column='audio': sample 1 of the validation split has no recording$"),
        (
            {"audio": [[float("nan")]] + [[0.5]] * 11},
            "sample 1 of the validation split has numbers that are not finite",
        ),
    ],
)
def test_what_is_no_recording(tmp_path, processor, columns, message):
    data = AudioClassification(source(tmp_path, **columns), processor)
    with pytest.raises(ConfigError, match=message):
        set_up(data)


def test_a_processor_of_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.Wav2Vec2FeatureExtractor, "model_input_names", ["audio_values"])
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "other")
    data = AudioClassification(source(tmp_path), str(tmp_path / "other"))
    message = r"processor='.*other': makes audio_values; must make input_features or input_values of recordings"
    with pytest.raises(ConfigError, match=message):
        data.load_processor()


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize(("seconds", "kept"), [(0.05, 40), (0.1, 48)])
def test_waves_are_of_one_length(tmp_path, tells, seconds, kept, caplog):
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=tells)
    extractor.save_pretrained(tmp_path / "waves")
    where = source(tmp_path)
    data = AudioClassification(where, str(tmp_path / "waves"), seconds=seconds, batch_size=5)
    data.setup()
    batch = first(data.val_dataloader())
    assert batch["input_values"].shape == (5, seconds * RATE)
    wave = torch.tensor(where.load()["validation"][0]["audio"])[:kept]
    whole = wave if tells else torch.nn.functional.pad(wave, [0, round(seconds * RATE) - kept])
    expected = (wave - whole.mean()) / (whole.var(unbiased=False) + 1e-7).sqrt()
    torch.testing.assert_close(batch["input_values"][0, :kept], expected, rtol=1e-3, atol=1e-3)
    assert ("recorded" in batch) == tells
    first(data.val_dataloader())
    said = f"seconds={seconds}: a recording has 0.1; what lies behind is left out."
    assert caplog.messages.count(said) == (kept == 40)  # once, of 0.06
    if tells:
        assert batch["recorded"].sum(dim=1).tolist() == [kept] * 5


def test_spectrograms_of_frames(tmp_path):
    transformers.ASTFeatureExtractor(num_mel_bins=8, max_length=16, sampling_rate=16000).save_pretrained(
        tmp_path / "ast"
    )
    data = AudioClassification(
        source(tmp_path, audio=[np.ones(900).tolist()] * 12), str(tmp_path / "ast"), batch_size=5
    )
    data.setup()
    assert first(data.val_dataloader())["input_values"].shape == (5, 16, 8)


def test_seconds_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"seconds=0: must be positive"):
        AudioClassification(source(tmp_path), "-", seconds=0)
