"""What users would run instead gives the dense model's logits, and the closing line says what to take."""

import importlib

import pytest
import tiny
import torch

from d2dmoe_pl import ConfigError, GateConfig, merge_to_dense_, quantize_, save_artifact, set_backend_, set_gate_
from d2dmoe_pl.adapters import adapter_for
from d2dmoe_pl.artifact import PhaseRecord
from d2dmoe_pl.benchmark.artifact_comparisons import artifact_comparisons
from d2dmoe_pl.benchmark.comparison import Settings, measure
from d2dmoe_pl.benchmark.result_rows import BenchmarkRow, as_table, verdict
from d2dmoe_pl.benchmark.runtimes import RUNTIMES, check_runtimes, export_onnx
from d2dmoe_pl.benchmark.scoring import Scoring
from d2dmoe_pl.data import Classification
from d2dmoe_pl.moe.quantization.int8_layers import quantized_names

TOLERANCE = {"onnxruntime": 1e-4, "openvino": 0.05, "compile": 0.05}
EXACT_PARTS = {"openvino": ["onnx", "onnxscript", "openvino"], "onnxruntime": ["onnx", "onnxscript", "onnxruntime"]}


def needs(*packages):
    for package in packages:
        pytest.importorskip(package, reason="pip install -e '.[benchmark]' brings it")


@pytest.mark.parametrize("kind", ["bert", pytest.param("timm_vit", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8", "torch-int8"])
@torch.no_grad()
def test_a_runtime_gives_the_logits(name, kind):
    needs(*EXACT_PARTS.get(name.partition("-")[0], []), *(["nncf"] if name == "openvino-int8" else []))
    torch.manual_seed(0)
    model, batch = tiny.dense(kind).eval(), tiny.batch(kind)
    expected = tiny.logits(model, batch)
    predict = RUNTIMES[name](model, [batch])
    got = predict(batch)
    assert (got - expected).norm() < TOLERANCE.get(name, 0.2) * expected.norm()
    half = {key: value[:2] for key, value in batch.items()}
    assert predict(half).shape == (2, expected.shape[1])  # any number of samples


@torch.no_grad()
def test_a_batch_of_one_is_enough_to_export(tmp_path):
    """It is what a benchmark begins with, and scores are those of more samples."""
    needs("onnx", "onnxscript", "onnxruntime")
    torch.manual_seed(0)
    model = tiny.routed("any_timm").eval()
    merge_to_dense_(model)
    predict = RUNTIMES["onnxruntime"](model, [tiny.batch("any_timm", 1)])
    batch = tiny.batch("any_timm", 5)
    torch.testing.assert_close(predict(batch), tiny.logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind", ["bert", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("timm_vit", "gpt2"))]
)
@pytest.mark.parametrize("in_int8", [pytest.param(False, marks=pytest.mark.thorough), True])
@torch.no_grad()
def test_a_converted_model_in_onnx(kind, in_int8, tmp_path, recwarn):
    needs("onnx", "onnxscript", "onnxruntime")
    runtime = importlib.import_module("onnxruntime")
    torch.manual_seed(0)
    # in int8, scores that nearly tie may decide otherwise where products are of whole numbers
    model, batch = tiny.routed(kind, tau=1.0 if in_int8 else 0.5).eval(), tiny.batch(kind)
    if in_int8:
        quantize_(model)
    names = export_onnx(model, batch, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {name: batch[name].numpy() for name in names})[0]
    expected = adapter_for(model).traced_logits(model, batch)
    assert (torch.from_numpy(got) - expected).norm() < (0.1 if in_int8 else 1e-4) * expected.norm()


@torch.no_grad()
def test_onnx_says_that_it_saves_no_time():
    needs("onnx", "onnxscript")
    from d2dmoe_pl.moe.execution import auto  # noqa: PLC0415 (its cache is cleared)

    auto._warn.cache_clear()
    model = tiny.routed("timm_vit").eval()
    with pytest.warns(UserWarning, match="exported to ONNX, every expert is computed and masked, which saves no time"):
        torch.onnx.export(model, (tiny.batch()["pixel_values"],), dynamo=True, verbose=False)
    set_backend_(model, "auto")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, "onnxruntime", None)
    said = r"^compare='onnxruntime(-int8)?': the package onnx\w* is not installed; pip install -e \"\.\[benchmark\]\""
    with pytest.raises(ConfigError, match=said):
        check_runtimes(["onnxruntime-int8"])


@pytest.mark.parametrize(("around", "optimize"), [(torch.float32, False), (torch.bfloat16, True)])
def test_one_table_for_all_types_and_runtimes_with_scores(around, optimize, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # which takes a minute
    save_artifact(tiny.routed("bert"), tmp_path / "artifact", [PhaseRecord("RouterRegression")])
    settings = Settings(
        scope=["model"],
        dtype=[torch.bfloat16, torch.int8],
        batch_size=[2],
        backend="auto",
        compare=["torch-int8"],
        rounds=2,
        device=torch.device("cpu"),
        scored_samples=40,
        optimize=optimize,
        around=around,
    )
    data = tiny.TextData()
    [comparison] = artifact_comparisons(str(tmp_path / "artifact"), [0.3, 1.0], data, 6, settings)
    rows = measure(comparison, 2, torch.device("cpu"))
    int8 = {torch.float32: "int8", torch.bfloat16: "int8 in bfloat16"}[around]
    assert [(row.backend, row.dtype, row.tau, row.is_dense) for row in rows] == [
        ("torch-int8", "float32", None, True),
        ("PyTorch", "bfloat16", None, True),
        ("auto", "bfloat16", 0.3, False),
        ("auto", "bfloat16", 1.0, False),
        ("auto", int8, 0.3, False),
        ("auto", int8, 1.0, False),
    ]
    assert all(row.dense_dtype == "float32" and 0 <= row.score <= 100 for row in rows)
    assert len(as_table(rows).rows) == 7
    assert verdict(rows).startswith("batch of 2: fastest within 0.5 of the dense")


@pytest.mark.thorough
def test_models_that_are_compiled_ahead_of_time_run_by_their_programs(tmp_path, caplog):
    model = tiny.routed("bert")
    set_gate_(model, GateConfig("topk", k=2))  # in the place of which each choice sets a tau
    save_artifact(model, tmp_path / "artifact", [PhaseRecord("RouterRegression")])
    given = {"scope": ["model"], "batch_size": [1, 3], "backend": "auto", "compare": [], "rounds": 2}
    settings = Settings(dtype=[torch.float32], optimize="ahead_of_time", device=torch.device("cpu"), **given)
    rows = []
    for comparison in artifact_comparisons(str(tmp_path / "artifact"), [0.3, 1.0], tiny.TextData(), 6, settings):
        rows += measure(comparison, 2, torch.device("cpu"))
    assert [(row.batch_size, row.tau) for row in rows] == [(1, 0.3), (1, 1.0), (3, 0.3), (3, 1.0)]
    said = [record.getMessage() for record in caplog.records if "not compiled" in record.getMessage()]
    assert all("input_ids [1, 1]" in line for line in said)  # texts of one token, which have none


def test_bfloat16_around_int8_has_the_dense_model_in_that_type_beside_it(tmp_path):
    save_artifact(tiny.routed("bert"), tmp_path / "artifact", [PhaseRecord("RouterRegression")])
    given = {"scope": ["model"], "batch_size": [2], "backend": "auto", "compare": [], "rounds": 2}
    settings = Settings(dtype=[torch.int8], around=torch.bfloat16, device=torch.device("cpu"), **given)
    [comparison] = artifact_comparisons(str(tmp_path / "artifact"), [1.0], None, 6, settings)
    rows = measure(comparison, 2, torch.device("cpu"))
    assert [(row.dtype, row.is_dense) for row in rows] == [("bfloat16", True), ("int8 in bfloat16", False)]


def test_an_artifact_in_int8_has_no_dense_twin(tmp_path):
    model = tiny.routed("bert")
    quantize_(model)
    assert quantized_names(model)
    save_artifact(model, tmp_path / "artifact", [PhaseRecord("RouterRegression")])
    settings = Settings(["model"], [torch.float32], [1], "auto", [], 2, torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"is in int8, which has no dense twin; must be the artifact that it was made"
    ):
        list(artifact_comparisons(str(tmp_path / "artifact"), [0.3], None, 6, settings))


def test_a_score_is_the_tasks_own():
    task = Classification(["a", "b"])
    batch = {"labels": torch.tensor([0, 1, 1, 1])}
    scoring = Scoring([batch], task)
    assert scoring.score(lambda batch: torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2)) == pytest.approx(75.0)
    assert scoring.loss(75.0, 80.0) == 5.0


def row(**changes):
    given = {"scope": "model", "name": "a", "backend": "auto", "router": True, "dtype": "int8", "num_experts": 8}
    given |= {"batch_size": 4, "tokens": 9, "tau": 0.5, "share_percent": 25.0, "dense_ms": 12.0, "dense_spread_ms": 0.1}
    given |= {"moe_ms": 4.0, "moe_spread_ms": 0.1, "dense_throughput": 1.0, "moe_throughput": 3.0, "speed_up": 3.0}
    given |= {"ideal": 4.0, "rest_percent": 40.0, "dense_memory_mib": 1.0, "moe_memory_mib": 1.0, "noisy": False}
    return BenchmarkRow(**{**given, "dense_score": 90.0, "score": 89.8, "score_loss": 0.2, **changes})


def dense(**changes):
    return row(**{"backend": "openvino", "is_dense": True, "tau": None, "moe_ms": 6.0, **changes})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [dense(), row()],
            "fastest within 0.5 of the dense 90.00: experts in int8 at tau 0.5 (4.00 ms, score 89.80), 1.50x as fast "
            "as dense, openvino (6.00 ms)",
        ),
        (
            [dense(moe_ms=2.0), row()],
            "fastest within 0.5 of the dense 90.00: dense, openvino (2.00 ms), 2.00x as fast as experts in int8 at tau "
            "0.5 (4.00 ms, score 89.80)",
        ),
        (
            [dense(moe_ms=2.0, score_loss=0.6), row(), row(moe_ms=1.0, tau=0.1, score_loss=3.0)],
            "fastest within 0.5 of the dense 90.00: experts in int8 at tau 0.5 (4.00 ms, score 89.80), 3.00x as fast "
            "as dense PyTorch (12.00 ms)",
        ),
        (
            [dense(moe_ms=2.0, backend="llama.cpp", score=None, score_loss=None), row()],
            "fastest within 0.5 of the dense 90.00: dense, llama.cpp, not judged (2.00 ms), 2.00x as fast as experts "
            "in int8 at tau 0.5 (4.00 ms, score 89.80)",
        ),
        (
            [row(score_loss=0.9)],
            "no tau is within 0.5 of the dense 90.00; take dense PyTorch, 12.00 ms, or train on",
        ),
        (
            [row(dense_score=None, score=None, score_loss=None)],
            "fastest: experts in int8 at tau 0.5 (4.00 ms), 3.00x as fast as dense PyTorch (12.00 ms)",
        ),
    ],
)
def test_the_closing_line(rows, said):
    assert verdict(rows) == f"batch of 4: {said}"
    assert verdict([row(batch_size=None)]) is None
