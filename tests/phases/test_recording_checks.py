"""What a feature extractor makes has to be what the model takes."""

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from table_files import write

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.data import AudioClassification, DatasetSource
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import FineTuning
from d2dmoe_pl.phases._model_checks import check_recordings
from d2dmoe_pl.phases._preflight import preflight

RATE = 800


def whisper(bins=4, chunk_length=0.06):
    shape = {"feature_size": bins, "hop_length": 4, "chunk_length": chunk_length, "n_fft": 16}
    return transformers.WhisperFeatureExtractor(sampling_rate=RATE, **shape)


def spectrogram(frames=16, bins=8):
    return transformers.ASTFeatureExtractor(sampling_rate=16000, num_mel_bins=bins, max_length=frames)


def waves():
    return transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE)


def recordings(tmp_path, extractor, seconds=0.1):
    extractor.save_pretrained(tmp_path / "extractor")
    noise = np.random.default_rng(0).standard_normal((6, 100)).tolist()
    file = write(Dataset.from_dict({"audio": noise, "label": ["a", "b", "c"] * 2}), tmp_path / "all.parquet")
    source = DatasetSource(train=file, validation=file, test=file)
    return AudioClassification(source, str(tmp_path / "extractor"), seconds=seconds)


@pytest.mark.parametrize(
    ("kind", "extractor"),
    [("whisper", whisper()), ("any_audio", waves()), ("any_audio-spectrogram", spectrogram())],
)
def test_their_own_fit(tmp_path, kind, extractor):
    data, model = recordings(tmp_path, extractor), tiny.dense(kind, None)
    data.load_processor()
    state = torch.get_rng_state()
    check_recordings(model, data)
    assert torch.equal(torch.get_rng_state(), state)  # what is drawn is none of a training's


@pytest.mark.parametrize(
    ("kind", "extractor", "seconds", "gives", "takes"),
    [
        ("whisper", whisper(bins=5), 0.1, "input_features of 5 x 12", "input_features of 4 x 12"),
        ("whisper", whisper(chunk_length=0.1), 0.1, "input_features of 4 x 20", "input_features of 4 x 12"),
        ("whisper", waves(), 0.1, "input_values of 80", "input_features of 4 x 12"),
        ("any_audio", whisper(), 0.1, "input_features of 4 x 12", "input_values of at least 20"),
        ("any_audio", spectrogram(), 0.1, "input_values of 16 x 8", "input_values of at least 20"),
        ("any_audio", waves(), 0.002, "input_values of 2", "input_values of at least 20"),
        ("any_audio-spectrogram", waves(), 0.1, "input_values of 80", "input_values of 16 x 8"),
        ("any_audio-spectrogram", spectrogram(frames=20), 0.1, "input_values of 20 x 8", "input_values of 16 x 8"),
    ],
)
def test_others_are_one_line(tmp_path, kind, extractor, seconds, gives, takes):
    data = recordings(tmp_path, extractor, seconds)
    phase = FineTuning(source=HuggingFaceModel("audio-classification", config=tiny.CONFIGS[kind]()))
    with pytest.raises(ConfigError) as error:
        preflight([phase], [data])
    of, name = tmp_path / "extractor", type(tiny.dense(kind, None)).__name__
    expected = f"processor={str(of)!r}: makes {gives} of a recording; must make {takes}, which {name} takes"
    assert str(error.value) == expected
