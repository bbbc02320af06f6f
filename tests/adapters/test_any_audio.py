"""Models of recordings that no family describes: waves of any length, spectrograms of one."""

import pytest
import tiny
import torch
import transformers
from torch.testing import assert_close

from d2dmoe_pl import ConfigError, ExpertsConfig, convert_to_moe_, load_model, merge_to_dense_, save_artifact
from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.adapters.any_audio import RECORDED
from d2dmoe_pl.metrics.flops import flops_outside_ffns, sample_inputs, sample_sizes
from d2dmoe_pl.moe.find_layers import moe_layers

WAVES = tiny.CONFIGS["any_audio"]().to_diff_dict()
MAKES = {
    "hubert": transformers.HubertConfig,
    "wavlm": transformers.WavLMConfig,
    "unispeech": transformers.UniSpeechConfig,
    "unispeech_sat": transformers.UniSpeechSatConfig,
    "data2vec_audio": transformers.Data2VecAudioConfig,
}


def classifier(make, **kwargs):
    torch.manual_seed(0)
    config = make(**{key: value for key, value in WAVES.items() if key not in ("model_type", "transformers_version")})
    for name, value in kwargs.items():
        setattr(config, name, value)
    return transformers.AutoModelForAudioClassification.from_config(config).eval()


@pytest.mark.parametrize("name", list(MAKES))
@torch.no_grad()
def test_relatives_convert_are_saved_and_go_back(name, tmp_path):
    model = classifier(MAKES[name])
    inputs = adapter_for(model).random_inputs(model, 2, 6)
    dense = tiny.logits(model, inputs)
    convert_to_moe_(model, ExpertsConfig(4))
    assert len(moe_layers(model)) == 2
    assert_close(tiny.logits(model, inputs), dense)
    save_artifact(model, tmp_path)
    assert torch.equal(tiny.logits(load_model(tmp_path), inputs), tiny.logits(model, inputs))
    merge_to_dense_(model)
    assert_close(tiny.logits(model, inputs), dense)


@pytest.mark.parametrize("norm", ["group", "layer"])
@torch.no_grad()
def test_what_is_filled_up_is_told_to_the_model(norm):
    model = classifier(transformers.Wav2Vec2Config, feat_extract_norm=norm)
    waves, recorded = torch.randn(2, 140), torch.ones(2, 140, dtype=torch.long)
    recorded[1, 80:] = 0
    dense = model(input_values=waves, attention_mask=recorded).logits
    assert not torch.equal(dense, model(input_values=waves).logits)
    convert_to_moe_(model, ExpertsConfig(4))
    batch = {"input_values": waves, RECORDED: recorded}
    assert_close(tiny.logits(model, batch), dense)
    assert flops_outside_ffns(model, sample_inputs(batch, sample_sizes(batch)[0])) > 0


def test_gradients_are_those_of_the_dense_model():
    model, dense = (classifier(transformers.Wav2Vec2Config) for _ in range(2))
    convert_to_moe_(model, ExpertsConfig(4))
    waves = torch.randn(2, 140)
    for each in (model, dense):
        tiny.logits(each, {"input_values": waves}).square().sum().backward()
    assert_close(model.projector.weight.grad, dense.projector.weight.grad)


def test_waves_that_its_config_says_nothing_of(monkeypatch):
    model = classifier(transformers.Wav2Vec2Config)
    monkeypatch.delattr(model.config, "conv_kernel")
    monkeypatch.delattr(transformers.Wav2Vec2Config, "conv_kernel", raising=False)
    with pytest.raises(ConfigError, match="its config has neither num_mel_bins and max_length nor conv_kernel and"):
        convert_to_moe_(model, ExpertsConfig(4))
