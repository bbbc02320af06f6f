"""A converted causal language model generates as ``transformers`` models do: cached, batched, padded on the left."""

import copy

import pytest
import tiny
import torch

from d2dmoe_pl.adapters import adapter_named
from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.moe.conversion import set_backend_, set_tau_
from d2dmoe_pl.moe.find_layers import moe_layers

KINDS = [kind for kind, task in tiny.TASKS.items() if task == "causal-language-modeling"]
NEW = 8


def dense(kind, make=tiny.dense):
    """A model whose text depends on its FFNs: of random ones, many only repeat the last token."""
    model = make(kind)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.02)
    return model


def with_projections(kind):
    """The same with MLPs in the place of its attention projections."""
    skip_without_projections(kind)
    return dense(kind, tiny.with_projections)


def skip_without_projections(kind):
    if adapter_named(tiny.family_of(kind)).attention is None:
        pytest.skip("its adapter names no projections")


def generate(model, inputs, **kwargs):
    """Greedy, ``NEW`` tokens whatever they are: ``(B, NEW)``."""
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, **kwargs)[:, length:]


def prompts():
    """Three texts, padded on the left to the same length."""
    length, lengths = 6, torch.tensor([6, 2, 4])
    mask = (torch.arange(length) >= length - lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 40, (3, length)) * mask, "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
class TestGenerate:
    @pytest.mark.parametrize("made", [dense, with_projections])
    def test_tau_one_gives_the_dense_models_text(self, kind, made, tmp_path):
        original = made(kind)
        model = tiny.route_(copy.deepcopy(original), tau=1.0)
        save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
        loaded = load_model(tmp_path / "artifact")
        batch = prompts()
        alone = {key: value[:1] for key, value in batch.items()}
        for inputs in (batch, alone, {"input_ids": alone["input_ids"]}):
            expected = generate(original, inputs)
            assert torch.equal(generate(model, inputs), expected)
            assert torch.equal(generate(loaded, inputs), expected)
            assert len(expected.unique()) > 1 or made is with_projections or kind.startswith("any_")  # attend to little

    @pytest.mark.parametrize(
        ("made", "backend"), [(dense, "reference"), (dense, "grouped"), (with_projections, "grouped")]
    )
    def test_lower_tau_gives_the_same_text_cached_or_not_padded_or_alone(self, kind, made, backend):
        model = tiny.route_(made(kind), tau=0.4)
        set_backend_(model, backend)
        batch = prompts()
        together = generate(model, batch)
        assert torch.equal(generate(model, batch, use_cache=False), together)
        for row, length in enumerate(batch["attention_mask"].sum(dim=1)):
            alone = {key: value[row : row + 1, -length:] for key, value in batch.items()}
            assert torch.equal(generate(model, alone)[0], together[row])
        set_tau_(model, 1.0)
        assert not torch.equal(generate(model, batch), together)

    def test_padding_is_not_routed_and_every_new_token_is(self, kind):
        skip_without_projections(kind)
        model = tiny.route_(tiny.with_projections(kind))
        layer = next(iter(moe_layers(model).values()))
        assert "att" in next(iter(moe_layers(model)))
        seen = []
        layer.watch(lambda mask: seen.append(len(mask)))
        batch = prompts()
        generate(model, batch)
        assert seen == [int(batch["attention_mask"].sum())] + [3] * (NEW - 1)  # the last one is not run
        assert layer.context.token_index is None

    def test_the_same_text_from_embeddings(self, kind):
        model, batch = tiny.route_(dense(kind), tau=0.4), prompts()
        expected = generate(model, batch)
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        lengths = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}
        got = model.generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **lengths)
        assert torch.equal(got, expected)

    def test_how_it_generates_by_default_is_kept(self, kind, tmp_path):
        model = tiny.routed(kind)
        model.generation_config.eos_token_id = [2, 7]
        model.generation_config.max_new_tokens = 3
        save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
        loaded = load_model(tmp_path / "artifact")
        assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
