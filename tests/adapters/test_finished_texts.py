"""What stands behind a text that is finished, while others of its batch go on, is padding; and caches of fixed size."""

import copy

import pytest
import tiny
import torch
from adapters.test_generation import NEW, dense, prompts
from transformers.generation import EosTokenCriteria

from d2dmoe_pl.adapters._generation import TAIL, _Marking
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.optimization import optimize_

CAUSAL = [kind for kind, task in tiny.TASKS.items() if task == "causal-language-modeling"]
KINDS = CAUSAL + [kind for kind, task in tiny.TASKS.items() if task == "text-to-text"]


def routed(kind, tau=0.4):
    return tiny.route_(dense(kind), tau=tau)


def as_class(model):
    """The same model, which generates as its class does."""
    twin = copy.deepcopy(model)
    for name in ("prepare_inputs_for_generation", "_get_stopping_criteria"):
        delattr(twin, name)
    return twin


def texts(kind):
    """Three texts; those of causal models begin with what is padding's id, and is none there."""
    batch = {key: value for key, value in tiny.batch(kind).items() if key in ("input_ids", "attention_mask")}
    if kind not in CAUSAL:
        return batch
    batch = prompts()
    batch["input_ids"][0, 0] = 0
    return batch


def written(model, batch, **kwargs):
    """Of each row, what the model writes, without a prompt; greedily."""
    start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **kwargs}
    return model.generate(**batch, **settings)[:, start:]


def some_end(model, batch):
    """A token that one row writes before another has ended by it, or the last one of all."""
    free = written(model, batch, eos_token_id=None)
    ends = {int(token): [[*row, token].index(token) for row in free.tolist()] for token in free[:, :-2].flatten()}
    return max(ends, key=lambda token: max(ends[token]) - min(ends[token]))


def routed_tokens(model, batch, **kwargs):
    """How many tokens the last MoE layer, which is the decoder's, sees in each call; and what is written."""
    counts = []
    handle = list(moe_layers(model).values())[-1].watch(lambda mask: counts.append(len(mask)))
    text = written(model, batch, **kwargs)
    handle.remove()
    return counts, text


@pytest.mark.parametrize("kind", KINDS)
class TestFinished:
    @pytest.mark.parametrize("tau", [0.4, 1.0])
    @pytest.mark.parametrize("cached", [True, False])
    def test_the_same_texts_by_fewer_tokens(self, kind, tau, cached):
        model, batch = routed(kind, tau), texts(kind)
        plain, end = as_class(model), some_end(model, batch)
        counts, text = routed_tokens(model, batch, eos_token_id=end, use_cache=cached)
        counts_before, before = routed_tokens(plain, batch, eos_token_id=end, use_cache=cached)
        assert torch.equal(text, before)
        prompt = counts[0]
        assert prompt == counts_before[0] == (int(batch["attention_mask"].sum()) if kind in CAUSAL else 3)
        ended = [[*row, end].index(end) + 1 for row in text.tolist()]
        running = [sum(length >= step for length in ended) for step in range(1, text.shape[1])]
        if cached:
            assert counts == [prompt, *running]
            assert sum(counts) < sum(counts_before) or max(ended) - min(ended) < 2
        else:
            seen = [sum(min(length, step) for length in ended) for step in range(1, text.shape[1])]
            assert counts == [prompt, *(prompt + tokens for tokens in seen)]

    def test_padding_may_be_what_ends_a_text(self, kind):
        model, batch = routed(kind), texts(kind)
        end = some_end(model, batch)
        counts, text = routed_tokens(model, batch, eos_token_id=end, pad_token_id=end)
        assert torch.equal(text, written(as_class(model), batch, eos_token_id=end, pad_token_id=end))
        assert counts == routed_tokens(model, batch, eos_token_id=end)[0]

    def test_beams_and_samples_are_the_same(self, kind):
        model, batch = routed(kind), texts(kind)
        plain, end = as_class(model), some_end(model, batch)
        for settings in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}):
            made = []
            for each in (model, plain):
                torch.manual_seed(1)
                made.append(written(each, batch, eos_token_id=end, **settings))
            assert torch.equal(*made)

    def test_a_cache_of_fixed_size_gives_the_same_texts(self, kind):
        model, batch = routed(kind), texts(kind)
        if not model._can_compile_fullgraph:
            pytest.skip("transformers has no such cache for it")
        end = some_end(model, batch)
        counts, text = routed_tokens(model, batch, eos_token_id=end)
        again, fixed = routed_tokens(model, batch, eos_token_id=end, cache_implementation="static")
        assert torch.equal(fixed, text)
        assert again == counts


def test_an_unfinished_text_may_have_paddings_id():
    model, batch = routed("llama-causal-language-modeling"), prompts()
    written_by_first = int(written(model, batch, eos_token_id=None)[0, 1])
    settings = {"pad_token_id": written_by_first, "eos_token_id": 1}
    counts, text = routed_tokens(model, batch, **settings)
    assert torch.equal(text, written(as_class(model), batch, **settings))
    assert set(counts[1:]) == {3} or 1 in text


def test_texts_that_only_other_criteria_end_are_written_on():
    model, batch = routed("llama-causal-language-modeling"), prompts()

    def first_is_done(input_ids, scores):
        return torch.tensor([True, False, False])

    settings = {"eos_token_id": None, "stopping_criteria": [first_is_done]}
    counts, text = routed_tokens(model, batch, **settings)
    assert counts[1:] == [3] * (NEW - 1)
    assert torch.equal(text, written(as_class(model), batch, **settings))


def test_a_single_text_is_never_marked():
    drafts = ([[1, 2, 5]], [[1, 2, 5, 7]], [[1, 2, 7]])  # one ends, and is taken back
    several = ([[1, 2, 5], [1, 2, 3]], [[1, 2, 5, 0], [1, 2, 3, 4]])
    for steps, tail in ((drafts, None), (several, [1, 0])):
        criteria = _Marking([EosTokenCriteria(5)])
        for step in steps:
            ids = torch.tensor(step)
            criteria(ids, None)
        marked = getattr(ids, TAIL, None)
        assert (None if marked is None else marked.tolist()) == tail


@pytest.mark.parametrize("kind", CAUSAL[:3])
def test_drafts_give_the_same_text(kind):
    model = routed(kind)
    batch = {key: value[1:2] for key, value in texts(kind).items()}
    end = some_end(model, batch)
    plain = written(model, batch, eos_token_id=end)
    assert torch.equal(written(model, batch, eos_token_id=end, prompt_lookup_num_tokens=3), plain)


def test_a_copy_generates_by_itself():
    model, batch = routed("llama-causal-language-modeling"), prompts()
    twin = copy.deepcopy(model)
    before = written(model, batch)
    with torch.no_grad():
        twin.get_input_embeddings().weight.add_(1.0)
    assert torch.equal(written(model, batch), before)
    assert twin.prepare_inputs_for_generation._model is twin


@pytest.mark.thorough
def test_compiled_with_a_cache_of_fixed_size():
    model, batch = routed("llama-causal-language-modeling"), prompts()
    end = some_end(model, batch)
    expected = written(model, batch, eos_token_id=end)
    optimize_(model)
    assert torch.equal(written(model, batch, eos_token_id=end, cache_implementation="static"), expected)
