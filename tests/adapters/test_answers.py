"""What encoder-decoders write: at tau 1 the dense model's answers, whatever else is in the batch."""

import copy

import pytest
import tiny
import torch

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers

KINDS = [kind for kind, task in tiny.TASKS.items() if task == "text-to-text"]
NEW = 6


def texts(kind):
    """Texts of different lengths, padded, and each alone."""
    batch = {key: value for key, value in tiny.batch(kind).items() if key in ("input_ids", "attention_mask")}
    alone = [
        {"input_ids": ids[mask == 1][None], "attention_mask": mask[mask == 1][None]}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return batch, alone


def written(model, batch, **kwargs):
    return model.generate(**batch, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tau_one_writes_what_the_dense_model_writes(kind, tmp_path):
    dense = tiny.dense(kind)
    model = tiny.route_(copy.deepcopy(dense), tau=1.0)
    save_artifact(model, tmp_path / "artifact")
    batch, _ = texts(kind)
    expected = written(dense, batch)
    assert torch.equal(written(model, batch), expected)
    assert torch.equal(written(load_model(tmp_path / "artifact"), batch), expected)
    assert torch.equal(written(model, batch, num_beams=2), written(dense, batch, num_beams=2))
    answers = adapter_for(model).write(model, batch, NEW)
    assert torch.equal(answers, adapter_for(dense).write(dense, batch, NEW))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_company_and_cache_make_no_difference_at_a_lower_tau(kind):
    model = tiny.route_(tiny.dense(kind), tau=0.4)
    batch, alone = texts(kind)
    together = written(model, batch)
    assert torch.equal(written(model, batch, use_cache=False), together)
    assert torch.equal(torch.cat([written(model, one) for one in alone]), together)
    low = {key: value.clone() for key, value in tiny.batch(kind).items()}
    before = tiny.logits(model, low)
    set_tau_(model, 0.0)
    assert not torch.equal(tiny.logits(model, low), before)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_stack_routes_its_own_tokens(kind):
    model = tiny.route_(tiny.dense(kind), tau=0.4)
    batch, seen = tiny.batch(kind), {}
    for name, layer in moe_layers(model).items():
        layer.watch(lambda mask, name=name: seen.setdefault(name, len(mask)))
    tiny.logits(model, batch)
    texts_, answers = (int(batch[key].sum()) for key in ("attention_mask", "decoder_attention_mask"))
    assert texts_ != answers
    assert set(seen.values()) == {texts_, answers}
    assert all((count == answers) == ("decoder" in name) for name, count in seen.items())


@pytest.mark.parametrize(
    "wish",
    [
        {"min_length": 20},
        {"suppress_tokens": [3, 4, 5, 6]},
        {"num_beams": 3, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"repetition_penalty": 5.0, "do_sample": True},
        {"max_time": 0.0},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_models_own_wishes_for_what_it_writes_are_left_out(kind, wish):
    model = tiny.route_(tiny.dense(kind), tau=0.4)
    batch, _ = texts(kind)
    expected = adapter_for(model).write(model, batch, NEW)
    own = model.generation_config
    for name, value in wish.items():
        setattr(own, name, value)
    assert torch.equal(adapter_for(model).write(model, batch, NEW), expected)
    assert model.generation_config is own
