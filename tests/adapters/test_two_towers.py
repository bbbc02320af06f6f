"""A model of pictures and texts: padding is of the texts, whatever numbers of positions coincide."""

import copy

import pytest
import torch
import transformers

from d2dmoe_pl import ExpertsConfig, convert_to_moe_
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import moe_layers

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PICTURES = {**SMALL, "image_size": 32, "patch_size": 8}
TEXTS = {**SMALL, "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2}
KINDS = {
    "clip": (transformers.CLIPModel, transformers.CLIPConfig),
    "siglip": (transformers.SiglipModel, transformers.SiglipConfig),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("texts", "length", "images"), [(4, 4, 1), (2, 16, 2), (2, 17, 2), (3, 5, 1)])
@torch.no_grad()
def test_each_tower_has_its_own_padding(kind, texts, length, images):
    torch.manual_seed(0)
    model_class, config_class = KINDS[kind]
    model = model_class(config_class(text_config=TEXTS, vision_config=PICTURES)).eval()
    dense = copy.deepcopy(model)
    convert_to_moe_(model, ExpertsConfig(num_experts=8))
    assert len(moe_layers(model)) == 4
    mask = (torch.arange(length) < torch.arange(length, length - texts, -1).unsqueeze(1)).long()  # (B, L)
    ids = torch.randint(3, 60, (texts, length)) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(images, 3, 32, 32)}
    expected, got = dense(**batch), model(**batch)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=1e-5)


def test_one_that_nobody_describes_ends_in_a_line():
    texts = {**TEXTS, "encoder_hidden_size": 32}
    config = transformers.BlipConfig(text_config=texts, vision_config=PICTURES, projection_dim=16)
    model = transformers.BlipForConditionalGeneration(config)
    with pytest.raises(ConfigError, match=r"^BlipForConditionalGeneration: no adapter knows it, and "):
        convert_to_moe_(model, ExpertsConfig(num_experts=8))
