"""MoEBERT layers in a model: what they are made of, that they are kept, and that routing holds its contract."""

import copy

import pytest
import tiny
import torch
from torch.nn import functional as F

from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import PhaseRecord, build_structure, load_model, read_artifact, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.find_layers import select_ffns
from d2dmoe_pl.moebert.conversion import convert_to_moebert_, set_hash_table_
from d2dmoe_pl.moebert.layer import MoEBERTConfig, moebert_layers
from d2dmoe_pl.moebert.routing import ROUTINGS, balanced_table, load_balancing_loss, most_probable, random_table
from d2dmoe_pl.structure import describe, stage_of

NAMES = ROUTINGS.names()
LIKE_BERT = ["bert", "roberta", "distilbert", "roberta-question-answering", "distilbert-masked-language-modeling"]


@pytest.mark.parametrize("routing", NAMES)
class TestContract:
    def test_a_sentence_gets_the_same_answer_alone_and_in_a_padded_batch(self, routing):
        model, inputs = tiny.moebert(routing), tiny.batch("bert", size=4)
        together = tiny.logits(model, inputs)
        wide = {
            "input_ids": F.pad(inputs["input_ids"], (0, 3), value=7),
            "attention_mask": F.pad(inputs["attention_mask"], (0, 3)),
        }
        torch.testing.assert_close(tiny.logits(model, wide), together, rtol=1e-4, atol=1e-5)
        for row, length in enumerate(inputs["attention_mask"].sum(dim=1)):
            ids = inputs["input_ids"][row : row + 1, :length]
            for alone in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
                torch.testing.assert_close(tiny.logits(model, alone)[0], together[row], rtol=1e-4, atol=1e-5)

    def test_one_expert_a_token_and_padding_takes_no_part(self, routing):
        model, inputs = tiny.moebert(routing), tiny.batch("bert", size=4)
        masks, losses = [], []
        for layer in moebert_layers(model).values():
            layer.watch(masks.append)
            layer.routing.register_forward_hook(lambda module, args, chosen: losses.append(chosen.balance_loss))
        tiny.logits(model, inputs)
        real = int(inputs["attention_mask"].sum())
        for mask in masks:
            assert mask.shape == (real, 4)
            assert mask.sum(dim=1).tolist() == [1] * real
        tiny.logits(model, {**inputs, "input_ids": inputs["input_ids"] + 3 * (inputs["attention_mask"] == 0)})
        assert all(torch.equal(one, other) for one, other in zip(masks[:2], masks[2:], strict=True))
        if routing.startswith("gate"):
            torch.testing.assert_close(losses[:2], losses[2:])
        else:
            assert losses == [None] * 4

    def test_save_load_run_gives_the_same_bits(self, routing, tmp_path):
        model, inputs = tiny.moebert(routing), tiny.batch("bert")
        if routing.startswith("hash"):
            set_hash_table_(model, torch.arange(40) % 4)
        save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
        loaded = load_model(tmp_path / "artifact")
        assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
        assert describe(loaded) == describe(model)
        artifact = read_artifact(tmp_path / "artifact")
        assert artifact.stage == "routed"
        assert all(parameter.is_meta for parameter in build_structure(artifact).parameters())

    def test_without_padding_every_token_is_routed(self, routing):
        model, inputs = tiny.moebert(routing), tiny.batch("bert", size=2)
        inputs = {"input_ids": inputs["input_ids"].clamp(min=5)}
        masks = []
        next(iter(moebert_layers(model).values())).watch(masks.append)
        tiny.logits(model, inputs)
        assert len(masks[0]) == 14

    def test_a_copied_model_is_one_of_its_own(self, routing):
        model, inputs = tiny.moebert(routing), tiny.batch("bert")
        twin = copy.deepcopy(model)
        expected = tiny.logits(model, inputs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(tiny.logits(twin, inputs), expected)


@pytest.mark.parametrize("kind", LIKE_BERT[1:])
class TestOtherFamilies:
    def test_save_load_run_gives_the_same_bits(self, kind, tmp_path):
        model, inputs = tiny.moebert("gate_token", kind=kind), tiny.batch(kind)
        save_artifact(model, tmp_path / "artifact", [PhaseRecord("Test")])
        loaded = load_model(tmp_path / "artifact")
        assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
        assert describe(loaded) == describe(model)
        assert all(
            parameter.is_meta for parameter in build_structure(read_artifact(tmp_path / "artifact")).parameters()
        )

    def test_no_residual_and_no_norm_are_left_outside(self, kind):
        """A layer's output is its experts', whose norm comes last."""
        model, inputs, got = tiny.moebert("gate_token", kind=kind), tiny.batch(kind), {}
        last = list(moebert_layers(model).values())[-1]
        last.experts.register_forward_hook(lambda module, args, output: got.update(experts=output))
        _, states = adapter_for(model).logits_and_hidden_states(model, inputs)
        torch.testing.assert_close(states[-1][inputs["attention_mask"] == 1], got["experts"], rtol=1e-5, atol=1e-6)

    def test_a_copied_model_is_one_of_its_own(self, kind):
        model, inputs = tiny.moebert("gate_token", kind=kind), tiny.batch(kind)
        twin, expected = copy.deepcopy(model), tiny.logits(model, inputs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(tiny.logits(twin, inputs), expected)


def test_sentences_go_to_one_expert():
    model, inputs = tiny.moebert("gate_sentence"), tiny.batch("bert", size=4)
    masks = []
    layer = next(iter(moebert_layers(model).values()))
    layer.watch(masks.append)
    tiny.logits(model, inputs)
    for sentence in masks[0].split(inputs["attention_mask"].sum(dim=1).tolist()):
        assert sentence.unique(dim=0).shape[0] == 1


def test_gates_by_hand():
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
    expert, scale, _ = most_probable(logits)
    assert expert.tolist() == [1, 0, 0]
    probabilities = logits.softmax(dim=1)
    torch.testing.assert_close(scale.squeeze(1), probabilities[range(3), expert])
    mean = probabilities.mean(dim=0)
    expected = 2 * (mean[0] * 2 / 3 + mean[1] * 1 / 3)
    torch.testing.assert_close(load_balancing_loss(probabilities, expert), expected)
    even = torch.full((4, 4), 0.25)
    assert load_balancing_loss(even, torch.arange(4)).item() == pytest.approx(1)
    one = torch.eye(4)[[2, 2, 2]]
    assert load_balancing_loss(one, torch.tensor([2, 2, 2])).item() == pytest.approx(4)


def test_gradients_reach_the_gate():
    model, inputs = tiny.moebert("gate_token"), tiny.batch("bert")
    tiny.logits(model, inputs).square().sum().backward()
    for layer in moebert_layers(model).values():
        assert layer.routing.gate.weight.grad.abs().sum() > 0


class TestHashTables:
    def test_random_ones_are_seeded_even_and_other_in_each_layer(self):
        tables = [layer.routing.table for layer in moebert_layers(tiny.moebert("hash_random", seed=3)).values()]
        again = [layer.routing.table for layer in moebert_layers(tiny.moebert("hash_random", seed=3)).values()]
        assert all(torch.equal(one, other) for one, other in zip(tables, again, strict=True))
        assert not torch.equal(*tables)
        assert torch.bincount(random_table(40000, 4, 0)).sub(10000).abs().max() < 400

    def test_balanced_by_hand(self):
        counts = torch.tensor([1, 5, 0, 9, 4, 5, 0, 2])
        # 9 -> 0; 5 (id 1) -> 1; 5 (id 5) -> 2; 4 -> 1 (5) or 2 (5): the first; 2 (id 7) -> 2; 1 (id 0) -> 2
        table = balanced_table(counts, 3, 0)
        assert table[[3, 1, 5, 4, 7, 0]].tolist() == [0, 1, 2, 1, 2, 2]
        assert torch.equal(table, balanced_table(counts, 3, 0))
        assert table[[2, 6]].tolist() == random_table(8, 3, 0)[[2, 6]].tolist()

    def test_balanced_loads(self):
        counts = (10000 / torch.arange(1, 2000)).long()  # as words are
        loads = torch.zeros(4, dtype=torch.int64).index_add(0, balanced_table(counts, 4, 0), counts)
        assert loads.max() - loads.min() <= 1 + 0.02 * loads.max()

    def test_a_list_of_another_length(self):
        message = "hash_list_file='x': has 39 entries; must have one for each of the 40 token ids"
        with pytest.raises(ConfigError, match=message):
            set_hash_table_(tiny.moebert("hash_balance"), torch.zeros(39, dtype=torch.int64), "hash_list_file='x'")

    def test_an_entry_that_is_no_expert(self):
        message = r"table: has entries from 0 to 4; must lie in \[0, num_experts\), which is 4"
        with pytest.raises(ConfigError, match=message):
            set_hash_table_(tiny.moebert("hash_balance"), torch.arange(40) % 5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
    def test_entries_that_are_no_integers(self, dtype):
        with pytest.raises(ConfigError, match=rf"^table: has entries of {dtype}; must be integers$"):
            set_hash_table_(tiny.moebert("hash_balance"), torch.zeros(40, dtype=dtype))

    def test_of_a_gated_model(self):
        with pytest.raises(
            ConfigError, match=r"table: .* routes by gate_token; allowed with hash_random and hash_balance"
        ):
            set_hash_table_(tiny.moebert("gate_token"), torch.zeros(40, dtype=torch.int64))

    def test_without_token_ids(self):
        model = tiny.moebert("hash_random")
        with pytest.raises(ValueError, match="input_ids=None: the routing hash_random needs token ids"):
            model(inputs_embeds=torch.randn(2, 3, 24))


class TestConversion:
    def test_experts_hold_the_neurons_of_their_own_layers_importance(self):
        model = tiny.dense("bert")
        importance = {ffn.name: torch.rand(tiny.WIDTH) for ffn in select_ffns(model)}
        dense = copy.deepcopy(model)
        convert_to_moebert_(model, tiny.MOEBERT, importance=importance)
        for ffn in select_ffns(dense):
            best = importance[ffn.name].argmax()
            experts = moebert_layers(model)[ffn.name].experts
            assert torch.equal(experts.up_weight[:, 0], ffn.up.weight[best].expand(4, -1))
            assert torch.equal(experts.down_bias, ffn.down.bias.expand(4, -1))
        assert {ffn.name for ffn in select_ffns(dense)} == set(moebert_layers(model))
        assert stage_of(describe(model)) == "routed"

    @pytest.mark.parametrize("kind", LIKE_BERT)
    def test_one_expert_of_everything_is_the_dense_model(self, kind):
        dense = tiny.dense(kind, "gelu")
        model, inputs = copy.deepcopy(dense), tiny.batch(kind)
        convert_to_moebert_(model, MoEBERTConfig(1, tiny.WIDTH, 0))
        got, expected = (tiny.logits_of_tokens(one, inputs) for one in (model, dense))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def test_too_few_neurons_leave_the_model_as_it_was(self):
        model = tiny.dense("bert")
        names = list(model.state_dict())
        with pytest.raises(ConfigError, match="num_experts=4, expert_dim=14, num_shared=2: need 50 neurons"):
            convert_to_moebert_(model, MoEBERTConfig(4, 14, 2))
        assert list(model.state_dict()) == names

    def test_a_model_without_a_norm_after_the_residual(self):
        with pytest.raises(ConfigError, match=r"blocks.0.mlp: MoEBERT's experts replace an FFN without a gate"):
            convert_to_moebert_(tiny.dense(), MoEBERTConfig(4, 12, 5, "gate_token"))

    @pytest.mark.parametrize(
        ("part", "called"),
        [("intermediate.dense", "up"), ("output.dense", "down"), ("output.LayerNorm", "its LayerNorm")],
    )
    def test_an_ffn_without_biases_leaves_the_model_as_it_was(self, part, called):
        model = tiny.dense("bert")
        model.get_submodule(f"bert.encoder.layer.1.{part}").bias = None
        names = list(model.state_dict())
        with pytest.raises(ConfigError, match=f"layer.1.intermediate: .* of their own; must have some in {called}$"):
            convert_to_moebert_(model, tiny.MOEBERT)
        assert list(model.state_dict()) == names

    def test_token_ids_of_a_model_without(self):
        with pytest.raises(ConfigError, match="routing='hash_random': goes by token ids, which a vit has not"):
            convert_to_moebert_(tiny.dense("vit"), tiny.MOEBERT)

    def test_importance_that_does_not_fit(self):
        model = tiny.dense("bert")
        names = [ffn.name for ffn in select_ffns(model)]
        with pytest.raises(ConfigError, match=r"importance of bert.encoder.layer.1.intermediate: missing; must be one"):
            convert_to_moebert_(model, tiny.MOEBERT, importance={names[0]: torch.rand(48)})
        with pytest.raises(ConfigError, match=r"layer.0.intermediate: \(47,\); must be one score for each of its 48"):
            convert_to_moebert_(model, tiny.MOEBERT, importance={name: torch.rand(47) for name in names})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"num_shared": 13},
                r"num_shared=13: must lie in \[0, expert_dim\], which is 12, the neurons that an expert",
            ),
            ({"num_shared": -1}, "num_shared=-1"),
            ({"num_experts": 0}, "num_experts=0: must be positive"),
            ({"expert_dim": 0}, "expert_dim=0: must be positive"),
            ({"expert_dropout": 1.0}, r"expert_dropout=1.0: must lie in \[0, 1\)"),
            ({"routing": "dice"}, "routing='dice': allowed are gate_sentence, gate_token, hash_balance, hash_random"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            MoEBERTConfig(**{"num_experts": 4, "expert_dim": 12, "num_shared": 5, **settings})
