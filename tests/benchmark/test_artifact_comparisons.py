"""A converted model against its dense twin, on real inputs and on noise."""

from functools import partial

import pytest
import tiny
import torch

from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.benchmark.artifact_comparisons import artifact_comparisons
from d2dmoe_pl.benchmark.comparison import Settings, measure
from d2dmoe_pl.benchmark.result_rows import as_table
from d2dmoe_pl.benchmark.scoring import first_batches, scoring_of
from d2dmoe_pl.data import DatasetSource, Digits, TextToText
from d2dmoe_pl.data.image_preprocessing import ImagePreprocessing
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.metrics.flops import dense_ffn_flops, pair_flops
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, set_budget_path_
from d2dmoe_pl.moe.conversion import ExpertsConfig, convert_to_moe_, set_gate_, set_tau_
from d2dmoe_pl.moe.cutoffs.cutoffs import CutoffConfig
from d2dmoe_pl.moe.cutoffs.fitting import fit_cutoffs_
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.find_layers import moe_layers

KINDS = ["bert", "bert-question-answering", "gpt2", "vit", "timm_vit"]


def settings(**changes):
    given = {"scope": ["layer", "model"], "dtype": [torch.float32], "batch_size": [3], "backend": "grouped"}
    return Settings(**{**given, "compare": [], "rounds": 2, "device": torch.device("cpu"), **changes})


def saved(model, tmp_path, phase="RouterRegression"):
    save_artifact(model, tmp_path / "artifact", [PhaseRecord(phase)])
    return str(tmp_path / "artifact")


@pytest.mark.parametrize(("kind", "make"), [*((kind, tiny.dense) for kind in KINDS), ("bert", tiny.with_projections)])
@torch.no_grad()
def test_the_dense_twin_is_the_model_at_tau_1_and_has_no_experts(kind, make, tmp_path):
    dense = make(kind)
    model = tiny.route_(make(kind))
    twin = load_model(saved(model, tmp_path))
    merge_to_dense_(twin)
    inputs = tiny.batch(kind)
    set_tau_(model, 1.0)
    torch.testing.assert_close(
        tiny.logits_of_tokens(twin, inputs), tiny.logits_of_tokens(model, inputs), rtol=1e-4, atol=1e-5
    )
    assert not moe_layers(twin)
    assert list(twin.state_dict()) == list(dense.state_dict())


@torch.no_grad()
def test_a_dense_layer_left_dense_is_in_the_twin_as_it_is(tmp_path):
    model = tiny.dense()
    expected = tiny.logits(model, inputs := tiny.batch())
    convert_to_moe_(model, ExpertsConfig(8), lambda ffn, name: name == "blocks.1.mlp")
    twin = load_model(saved(model, tmp_path))
    merge_to_dense_(twin)
    torch.testing.assert_close(tiny.logits(twin, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_comparisons_over_noise(kind, tmp_path):
    model = tiny.routed(kind).eval()
    path = saved(model, tmp_path)
    whole, *layers = artifact_comparisons(path, [0.3, 1.0], None, 6, settings())
    tokens = 3 * (6 if "vit" not in kind else 5)
    assert (whole.scope, whole.batch_size, whole.tokens) == ("model", 3, tokens)
    assert [layer.name for layer in layers] == list(moe_layers(model))
    for comparison in (whole, *layers):
        assert [(way.name, way.router, way.tau) for way in comparison.ways] == [
            ("grouped", True, 0.3),
            ("grouped", True, 1.0),
        ]
        some, every = comparison.ways
        assert some.share < every.share == 1.0
        experts = next(iter(moe_layers(model).values())).experts
        router = next(iter(moe_layers(model).values())).flops_beside_experts(1, 1) / dense_ffn_flops(experts)
        assert pair_flops(experts) * experts.num_experts == dense_ffn_flops(experts)
        assert some.cost == pytest.approx(some.share + router)
        with every.contender.setting():
            torch.testing.assert_close(every.contender.call(), comparison.dense.call(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_share_is_that_of_the_model_run_as_ever(tmp_path):
    model = tiny.routed("bert").eval()
    path = saved(model, tmp_path)
    [whole] = artifact_comparisons(path, [0.4], tiny.TextData(), 6, settings(scope=["model"], batch_size=[8]))
    set_tau_(model, 0.4)
    batch, *_ = first_batches(model, tiny.TextData(), 8)
    masks = []
    for layer in moe_layers(model).values():
        layer.watch(masks.append)
    expected = tiny.logits(model, batch)
    [way] = whole.ways
    assert way.share == pytest.approx(sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks))
    assert whole.tokens == int(batch["attention_mask"].sum())
    # the dense model computes padding as well
    padding = batch["attention_mask"].numel() / whole.tokens
    layer = next(iter(moe_layers(model).values()))
    router = layer.flops_beside_experts(1, 1) / dense_ffn_flops(layer.experts)
    assert way.cost == pytest.approx((way.share + router) / padding)
    with way.contender.setting():
        torch.testing.assert_close(way.contender.call(), expected, rtol=1e-4, atol=1e-5)


def test_the_models_own_rule_is_used_and_its_gates_are_put_back(tmp_path):
    path = saved(tiny.routed(rule="topk"), tmp_path)
    compare = settings(compare=["loop"], dtype=[torch.bfloat16])
    whole, *layers = artifact_comparisons(path, [0.25, 0.5], Digits(), 6, compare)
    assert [way.share for way in whole.ways] == [0.25, 0.5]
    assert [(way.name, way.share) for way in layers[0].ways] == [
        ("grouped", 0.25),
        ("grouped", 0.5),
        ("loop", 0.25),
        ("loop", 0.5),
    ]
    assert whole.dense.call().dtype is torch.bfloat16


def test_what_a_layer_leaves_out_costs_nothing_and_is_computed_by_what_runs_in_its_place(tmp_path):
    model = tiny.routed()
    fit_cutoffs_(model, CutoffConfig(0.5, 0.5), run=partial(tiny.logits, model, tiny.batch()))
    compare = settings(scope=["layer"], compare=["loop", "reference"])
    layer = next(iter(moe_layers(model).values()))
    router = layer.flops_beside_experts(1, 1) / dense_ffn_flops(layer.experts)
    for comparison in artifact_comparisons(saved(model, tmp_path), [0.5], Digits(), 6, compare):
        own, *others = comparison.ways
        assert own.cost < 0.8 * own.share + router
        assert [way.cost for way in others] == pytest.approx([own.share + router] * 2)


def test_more_samples_than_there_are():
    with pytest.raises(ConfigError, match=r"^batch_size=500: must be at most 400, the samples of the test split$"):
        first_batches(tiny.dense(), Digits(), 500)


def test_data_for_another_head():
    with pytest.raises(ConfigError, match=r"^head='regression' of Bert.*: the data needs a model with head 'classifi"):
        first_batches(tiny.dense("bert-regression"), Digits(), 5)


class _ColourDigits(Digits):
    preprocessing = ImagePreprocessing(3, 8, (0.0,) * 3, (1.0,) * 3)


def test_data_that_the_model_cannot_take(tmp_path):
    path = saved(tiny.routed(), tmp_path)
    wanted = settings(scope=["model"])
    with pytest.raises(ConfigError, match=r"^pixel_values: the data gives 3 x 8 x 8 .*; must be 1 x 8 x 8, which"):
        list(artifact_comparisons(path, [0.5], _ColourDigits(), 6, wanted))


def without_gates(kind="timm_vit"):
    model = tiny.routed(kind)
    set_gate_(model, None)
    return model


@pytest.mark.parametrize(
    ("make", "phase", "stage"),
    [
        (tiny.dense, "FineTuning", "dense"),
        (without_gates, "RouterRegression", "routed"),
        (tiny.moebert, "MoEBERTDistillation", "routed"),
    ],
)
def test_artifacts_without_a_tau(make, phase, stage, tmp_path):
    path = saved(make(), tmp_path, phase)
    with pytest.raises(ConfigError) as error:
        list(artifact_comparisons(path, [0.5], None, 6, settings()))
    assert str(error.value) == (
        f"artifact={path!r}: is the work of {phase}, at stage {stage!r}; must have MoE layers with routers and a tau, "
        "which RouterRegression makes"
    )


def test_no_artifact_at_all():
    with pytest.raises(ConfigError, match=r"^artifact='nowhere': no such folder; must be the artifact that a phase wr"):
        list(artifact_comparisons("nowhere", [0.5], None, 6, settings()))


def test_more_tokens_than_positions(tmp_path):
    path = saved(tiny.routed("bert"), tmp_path)
    with pytest.raises(ConfigError, match=r"^length=17: must be at most 16, the positions of the model$"):
        list(artifact_comparisons(path, [0.5], None, 17, settings()))


def test_budgets_of_a_whole_model(tmp_path):
    model = tiny.routed("bert")
    names = tuple(moe_layers(model))
    points = tuple(BudgetPoint((tau,) * 2, cost, cost, 0.0, 50.0) for tau, cost in ((1.0, 1.1), (0.5, 0.6), (0.0, 0.2)))
    set_budget_path_(model, BudgetPath(names, "dynk_max", "accuracy", True, True, 8, points))
    save_artifact(model, tmp_path / "calibrated", [PhaseRecord("BudgetCalibration")])
    path, wanted = str(tmp_path / "calibrated"), settings(scope=["model"], batch_size=[4], budgets=[0.6, 0.2])
    [whole] = artifact_comparisons(path, [0.9], tiny.TextData(), 6, wanted)
    ways = [way for way in whole.ways if not way.is_dense]
    assert [(way.tau, way.budget) for way in ways] == [(None, 0.6), (None, 0.2)]
    [at_half] = artifact_comparisons(path, [0.5], tiny.TextData(), 6, settings(scope=["model"], batch_size=[4]))
    assert ways[0].share == next(way.share for way in at_half.ways if not way.is_dense)
    rows = measure(whole, 2, torch.device("cpu"))
    assert "budget" in [column.header for column in as_table(rows).columns]
    with pytest.raises(ConfigError, match=r"ffn_flops=0.1: less than this model can do"):
        list(artifact_comparisons(path, [0.9], None, 6, settings(scope=["model"], budgets=[0.1])))
    with pytest.raises(ConfigError, match="budget: only of whole models; leave --scope layer out"):
        list(artifact_comparisons(path, [0.9], None, 6, settings(scope=["model", "layer"], budgets=[0.6])))
    save_artifact(tiny.routed("bert"), tmp_path / "routed", [PhaseRecord("RouterRegression")])
    with pytest.raises(ConfigError, match="knows no budgets; must be what BudgetCalibration left, or have taus"):
        list(artifact_comparisons(str(tmp_path / "routed"), [0.9], None, 6, settings(scope=["model"], budgets=[0.6])))


@pytest.mark.parametrize("dtypes", [["int8"], ["int8", "float32"], ["bfloat16", "float32"]])
@torch.no_grad()
def test_what_is_outside_ffns_is_timed_in_the_type_of_the_dense_model(dtypes, tmp_path):
    path = saved(tiny.routed("bert").eval(), tmp_path)
    given = settings(scope=["model"], dtype=[getattr(torch, name) for name in dtypes])
    [whole] = artifact_comparisons(path, [0.3], None, 6, given)
    with whole.rest.setting():
        got = whole.rest.call()
    assert got.dtype == whole.dtype == torch.float32
    with whole.rest.setting():
        assert torch.equal(got, whole.rest.call())
    assert not torch.allclose(got, whole.dense.call(), atol=1e-4)


def test_as_many_samples_are_scored_as_were_asked_for(tmp_path):
    model = tiny.routed("bert").eval()
    for number in (3, 5):
        scoring = scoring_of(model, tiny.TextData(), number)
        assert sum(len(batch["labels"]) for batch in scoring.batches) == number


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_what_is_measured_of_written_texts_is_not_scored(tmp_path, metric):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("text,target\n" + "a b,b a\n" * 4)
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", "ab", ("[PAD]", "[UNK]", "<eos>"))
    model = tiny.routed("t5-text-to-text").eval()

    def data(*metrics):
        return TextToText(DatasetSource(str(tmp_path)), tokenizer, metrics=list(metrics))

    with pytest.raises(ConfigError, match=rf"scored_samples=3: must be 0 .* as {metric}; or measure exact_match"):
        scoring_of(model, data(metric), 3)
    assert scoring_of(model, data(metric), 0) is None
    assert scoring_of(model, data("exact_match"), 3).task.main_metric == "exact_match"
