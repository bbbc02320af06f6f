"""Padding is neither routed, nor run, nor counted."""

import copy
import gc
from functools import partial

import pytest
import tiny
import tiny_configs
import torch
import transformers
from torch import nn
from transformers import StaticCache

from d2dmoe_pl.moe.conversion import ExpertsConfig, add_routers_, convert_to_moe_, set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig
from d2dmoe_pl.moe.token_context import real_positions, sentence_numbers, token_index
from d2dmoe_pl.moebert.layer import moebert_layers


def test_token_index():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert token_index(mask).tolist() == [0, 1, 3]
    assert token_index(torch.ones(2, 3)) is None
    assert token_index(None) is None
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1, 3\): must be \(B, L\), which tells padding"):
        token_index(torch.ones(2, 1, 3))
    with pytest.raises(ValueError, match=r"attention_mask of shape dict: must be \(B, L\)"):
        token_index({"full_attention": torch.ones(2, 3)})


def test_a_mask_that_covers_cached_tokens_too():
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    assert token_index(mask, 1) is None
    assert token_index(mask, 2).tolist() == [0, 1, 3, 4, 5]
    assert token_index(mask, 4).tolist() == token_index(mask).tolist()
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 4\): must cover the 5 inputs"):
        token_index(mask, 5)


@pytest.mark.parametrize("past", [3, torch.tensor(3)])
def test_a_mask_that_covers_places_behind_the_tokens_too(past):
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0, 0]])
    assert real_positions(mask, 2, past).tolist() == [True, True, False, True]
    assert real_positions(mask[:, :5], 2, past).tolist() == [True, True, False, True]
    assert real_positions(mask[:, 3:5], 2, past).tolist() == [True, True, False, True]  # of what is new alone
    assert real_positions(mask[:, 2:5], 2, past).tolist() == [True, True, False, True]  # of a window


def test_a_mask_over_a_whole_cache_of_fixed_size():
    model = tiny.routed("llama-causal-language-modeling")
    ids = torch.randint(3, 40, (2, 7))
    mask = torch.zeros(2, 16, dtype=torch.long)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        wanted = model(ids).logits
        for new in (slice(0, 5), slice(5, 6), slice(6, 7)):
            mask[:, new] = 1
            found = model(ids[:, new], attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(found, wanted[:, new])


def test_layers_that_see_other_positions_than_the_mask_has():
    model = tiny.routed("bert")
    layer = next(iter(moe_layers(model).values()))
    batch = {key: value for key, value in tiny.batch("bert").items() if key != "labels"}
    with_more = partial(nn.functional.pad, pad=(0, 0, 0, 3))
    ffn = layer.forward
    layer.forward = lambda x: ffn(with_more(x))[:, :-3]
    positions = batch["attention_mask"].numel()
    message = f"^attention_mask of {positions} positions: must be of as many as reach the MoE layers, which"
    with pytest.raises(ValueError, match=rf"{message} {positions + 9} do; the model adds or drops some inside, and"):
        model(**batch)


def test_ids_and_sentences_of_the_running_tokens_reach_the_layers_with_a_cache():
    model = tiny.routed("gpt2-causal-language-modeling")
    inputs = tiny.batch("gpt2", size=2)
    layer = next(iter(moe_layers(model).values()))
    with torch.no_grad():
        cache = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).past_key_values
    seen = []
    layer.register_forward_pre_hook(lambda layer, args: seen.extend([layer.context.token_ids, layer.context.sentence]))
    ids, new = torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]])
    model(ids, attention_mask=torch.cat([inputs["attention_mask"], new], dim=1), past_key_values=cache)
    assert [value.tolist() for value in seen] == [[5, 6, 7], [0, 0, 1]]


def test_sentence_numbers_have_no_gaps():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]])
    assert sentence_numbers((3, 3), token_index(mask), mask.device).tolist() == [0, 0, 1, 1]
    assert sentence_numbers((2, 3), None, mask.device).tolist() == [0, 0, 0, 1, 1, 1]


def test_token_ids_of_real_tokens_reach_the_layers():
    model, inputs = tiny.moebert(), tiny.batch("bert")
    layer = next(iter(moebert_layers(model).values()))
    seen = []
    layer.register_forward_pre_hook(lambda layer, args: seen.extend([layer.context.token_ids, layer.context.sentence]))
    tiny.logits(model, inputs)
    assert torch.equal(seen[0], inputs["input_ids"][inputs["attention_mask"] == 1])
    assert seen[1].tolist() == [0] * 7 + [1] * 4 + [2] * 2
    assert (layer.context.token_ids, layer.context.sentence) == (None, None)


def test_routers_and_gates_see_real_tokens_only():
    model = tiny.routed("bert")
    inputs = tiny.batch("bert")
    seen = []
    for layer in moe_layers(model).values():
        layer.router.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        layer.gate.register_forward_hook(lambda module, args, mask: seen.append(len(mask)))
    tiny.logits(model, inputs)
    assert seen == [int(inputs["attention_mask"].sum())] * 4


def test_answers_do_not_depend_on_padding():
    model = tiny.routed("bert", tau=0.3)
    inputs = tiny.batch("bert", size=4)
    together = tiny.logits(model, inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1)):
        alone = {key: value[row : row + 1, :length] for key, value in inputs.items() if key != "labels"}
        torch.testing.assert_close(tiny.logits(model, alone)[0], together[row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_choice_is_a_text_of_its_own():
    model = transformers.BertForMultipleChoice(tiny_configs.bert_config()).eval()
    tiny._spread(model)
    ids = torch.randint(1, 40, (2, 3, 7))
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = mask[1, :, 5:] = 0
    dense = model(ids, attention_mask=mask).logits  # (B, C)
    convert_to_moe_(model, ExpertsConfig(8))
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, dense)
    add_routers_(model, RouterConfig(8))
    set_gate_(model, GateConfig(tau=0.5))
    seen = []
    next(iter(moe_layers(model).values())).watch(lambda chosen: seen.append(len(chosen)))
    together = model(ids, attention_mask=mask).logits
    assert seen == [int(mask.sum())]
    alone = torch.stack([model(ids[1:, choice : choice + 1, :5]).logits[0, 0] for choice in range(3)])
    torch.testing.assert_close(together[1], alone)


def test_the_mask_is_found_by_position_and_forgotten_afterwards():
    model = tiny.routed("bert")
    inputs = tiny.batch("bert")
    context = next(iter(moe_layers(model).values())).context
    by_position = model(inputs["input_ids"], inputs["attention_mask"]).logits
    assert torch.equal(by_position, tiny.logits(model, inputs))
    assert context.token_index is None
    with pytest.raises(IndexError):
        model(inputs["input_ids"] + 1000, inputs["attention_mask"])
    assert context.token_index is None


def test_a_copied_model_has_a_context_of_its_own():
    model = tiny.routed("bert")
    twin = copy.deepcopy(model)
    contexts = {id(layer.context) for layer in moe_layers(twin).values()}
    assert len(contexts) == 1
    assert contexts.isdisjoint(id(layer.context) for layer in moe_layers(model).values())
    inputs = tiny.batch("bert")
    assert torch.equal(tiny.logits(twin, inputs), tiny.logits(model, inputs))


def test_a_part_of_a_model_that_is_gone_can_be_copied_and_saved(tmp_path):
    model = tiny.routed("bert")
    part, inputs = model.bert, {key: value for key, value in tiny.batch("bert").items() if key != "labels"}
    with torch.no_grad():
        expected = part(**inputs).last_hidden_state
    del model
    gc.collect()
    torch.save(copy.deepcopy(part), tmp_path / "part.pt")
    again = torch.load(tmp_path / "part.pt", weights_only=False)
    for each in (part, copy.deepcopy(copy.deepcopy(part)), again):
        without_padding = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        with torch.no_grad():
            assert each(**without_padding).last_hidden_state.shape == expected.shape
