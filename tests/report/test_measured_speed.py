"""What a model is timed beside, how it runs itself, and what it is timed on."""

import json

import pytest
import tiny
import torch

from d2dmoe_pl import quantize_
from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.benchmark import runtimes
from d2dmoe_pl.benchmark.timing import Timing
from d2dmoe_pl.compression.recipe_for_model import _loaded
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, set_budget_path_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.report import measured_speed
from d2dmoe_pl.report.measured_speed import Running, dense_twin, measured_times, timed_batches


def with_budgets(kind="bert"):
    torch.manual_seed(0)
    model = tiny.routed(kind).eval()
    layers = moe_layers(model)
    costs = ((1.0, 1.0), (0.0, 0.2))
    points = tuple(BudgetPoint((tau,) * len(layers), cost, cost, 0.0, 90.0) for tau, cost in costs)
    rule = next(iter(layers.values())).gate.config.rule
    set_budget_path_(model, BudgetPath(tuple(layers), rule, "accuracy", True, True, 100, points))
    return model


def test_each_runs_as_it_was_said(monkeypatch):
    """The dense model by the runtime, in its own type; the converted one in int8, compiled, at each budget."""
    model = with_budgets()
    dense, batch = dense_twin(model), tiny.batch("bert")
    expected = tiny.logits(dense, batch)
    quantize_(model)
    of_runtime, compiled, taus = [], [], []

    def on_runtime(given, batches):
        assert batches == [batch]
        return lambda each: of_runtime.append(adapter_for(given).logits(given, each))

    def optimized_(given):
        compiled.append(given)

    def predict_by(given):
        return lambda _: taus.append((given is model, next(iter(moe_layers(given).values())).gate.config.tau))

    monkeypatch.setitem(runtimes.RUNTIMES, "onnxruntime-int8", on_runtime)
    monkeypatch.setattr(measured_speed, "optimize_", optimized_)
    monkeypatch.setattr(measured_speed, "predict_by", predict_by)
    running = Running("int8", True, "onnxruntime-int8")
    beside, times = measured_times(model, dense, [batch], [0.2, 1.0], running)
    assert torch.equal(of_runtime[0], expected)
    assert beside.median > 0
    assert list(times) == [0.2, 1.0]
    assert len(compiled) == 1
    assert compiled[0] is not model  # which can still be watched
    assert set(taus) == {(False, 0.0), (False, 1.0)}


@pytest.mark.parametrize(("noisy", "calls"), [([], 1), ([1], 2), ([1, 2, 3], 3)])
def test_what_is_too_noisy_is_measured_again(monkeypatch, noisy, calls):
    model, seen = with_budgets(), []

    def alternate(contenders, *_):
        seen.append(len(seen) + 1)
        return {name: Timing(1.0, 0.2 if seen[-1] in noisy else 0.05) for name in contenders}

    monkeypatch.setattr(measured_speed, "alternate", alternate)
    beside, _ = measured_times(model, dense_twin(model), [tiny.batch("bert")], [0.2], Running())
    assert (len(seen), beside.is_noisy) == (calls, len(noisy) == 3)


@pytest.mark.parametrize(
    ("running", "rival", "options", "said"),
    [
        (Running(), "dense", "", "as it is saved"),
        (Running("int8"), "dense", " --dtype int8", "in int8"),
        (
            Running("bfloat16", True, "openvino"),
            "dense in openvino",
            " --dtype bfloat16 --optimize true --compare openvino",
            "in bfloat16, compiled",
        ),
    ],
)
def test_how_it_runs_is_said(running, rival, options, said):
    assert (running.rival, running.options) == (rival, options)
    threads = torch.get_num_threads()
    batches = [{"input_ids": torch.zeros(3, 5)}]
    assert running.said_of(batches) == f"a batch of 3, {threads} thread{'s' if threads > 1 else ''}, {said}"


@pytest.mark.parametrize("kind", [kind for kind, task in tiny.TASKS.items() if task == "text-to-text"])
def test_what_it_is_timed_on(tmp_path, kind):
    """Answers begin as the model begins them, of which data alone knows nothing; of small batches there are several."""
    model = tiny.dense(kind)
    words = [f"word{number}" for number in range(30)]
    special = ("[PAD]", "[UNK]", "<eos>")  # which has the number 2, as in the model
    pairs = [{"text": "word1 word2", "target": f"word{row} word3"} for row in range(200)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = {"train": str(tmp_path / "all.jsonl"), "validation": None, "test": None}
    arguments = {"source": source, "tokenizer": tiny.tokenizer(tmp_path / "model", words, special)}
    data = _loaded({"class_path": "TextToText", "init_args": arguments})
    batches = timed_batches(model, data, 2)
    start, _ = adapter_for(model).answer_tokens(model)
    assert [batch["decoder_input_ids"][:, 0].tolist() for batch in batches] == [[start, start]] * 4
    assert "labels" not in batches[0]
    assert len(timed_batches(model, data, 16)) == 1
