"""How fast a model writes, against its dense twin, and what it reads for a token."""

import math

import pytest
import tiny
import torch

from d2dmoe_pl.artifact import save_artifact
from d2dmoe_pl.benchmark import artifact_comparisons as made
from d2dmoe_pl.benchmark.artifact_comparisons import artifact_comparisons
from d2dmoe_pl.benchmark.comparison import Settings, measure
from d2dmoe_pl.benchmark.machine import Machine
from d2dmoe_pl.benchmark.result_rows import as_table, draw_speed_up
from d2dmoe_pl.cli import main
from d2dmoe_pl.data import DatasetSource, LanguageModeling
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.conversion import add_routers_, set_gate_
from d2dmoe_pl.moe.find_layers import moe_layers
from d2dmoe_pl.moe.gating import GateConfig
from d2dmoe_pl.moe.routers import RouterConfig

LLAMA, GPT2 = "llama-causal-language-modeling", "gpt2-causal-language-modeling"
NEW = 5


def comparisons(kind, tmp_path, taus, data=None, make=tiny.routed, **changes):
    model = make(kind)
    if model.can_generate():
        model.generation_config.eos_token_id = list(range(20))  # which end no text here
    save_artifact(model, tmp_path / "artifact")
    given = {"dtype": [torch.float32], "batch_size": [1], "decode": NEW, **changes}
    settings = Settings(
        scope=["model"], backend="grouped", compare=[], rounds=2, device=torch.device("cpu"), scored_samples=8, **given
    )
    return model, artifact_comparisons(str(tmp_path / "artifact"), taus, data, 6, settings)


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("kind", [LLAMA, GPT2])
def test_at_tau_one_the_dense_models_text_is_written(kind, tmp_path):
    _, [whole] = comparisons(kind, tmp_path, [0.2, 1.0], batch_size=[3])
    low, full = whole.ways
    text = whole.dense.call()
    assert text.shape == (3, 6 + NEW)
    with full.contender.setting():
        assert torch.equal(full.contender.call(), text)
    assert full.agreement == 100.0 >= low.agreement
    assert low.share < full.share == 1.0
    assert low.bytes_share < full.bytes_share == 1.0  # where routers have nothing to do
    assert (whole.scope, whole.batch_size, whole.tokens, whole.new_tokens) == ("decode", 3, 18, NEW)


def test_a_models_own_wish_against_repetitions_is_left_out(tmp_path):
    torch.manual_seed(1)
    model = tiny.routed(LLAMA)
    model.generation_config.repetition_penalty = 5.0
    _, [whole] = comparisons(LLAMA, tmp_path, [1.0], make=lambda _: model, decode=20, batch_size=[3])
    assert whole.ways[-1].agreement == 100.0


def test_the_bytes_of_one_text_are_those_of_the_experts_that_run_and_of_all_else(tmp_path):
    model, [whole] = comparisons(LLAMA, tmp_path, [0.3])
    [way] = whole.ways
    layers = moe_layers(model).values()
    experts = size(p for layer in layers for name, p in layer.experts.named_parameters() if name != "down_bias")
    routers = size(p for layer in layers for p in layer.router.parameters())
    everything = size(model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = 0 if embedding is head else size([embedding])
    dense = everything - routers - unread
    assert way.bytes_share == pytest.approx((dense + routers - (1 - way.share) * experts) / dense)


def test_an_oracle_reads_all_first_weights(tmp_path):
    def oracle(kind):
        model = tiny.routed(kind)
        add_routers_(model, RouterConfig(kind="ground_truth"))
        set_gate_(model, GateConfig("dynk_max", 0.3))
        return model

    model, [whole] = comparisons(LLAMA, tmp_path, [0.3], make=oracle)
    [way] = whole.ways
    layers = moe_layers(model).values()
    second = size(layer.experts.down_weight for layer in layers)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    dense = size(model.parameters()) - (0 if embedding is head else size([embedding]))
    assert way.bytes_share == pytest.approx((dense - (1 - way.share) * second) / dense)


def test_an_expert_is_read_once_for_all_texts_of_a_batch(tmp_path):
    _, [alone, together] = comparisons(LLAMA, tmp_path, [0.3], batch_size=[1, 8])
    assert together.ways[0].bytes_share > alone.ways[0].bytes_share


def test_bfloat16_around_int8(tmp_path):
    _, [whole] = comparisons(LLAMA, tmp_path, [0.3], dtype=[torch.int8], around=torch.bfloat16)
    rows = measure(whole, 2, torch.device("cpu"))
    assert [(row.dtype, row.is_dense) for row in rows] == [("int8 in bfloat16", True), ("int8 in bfloat16", False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_what_is_timed_has_exact_rotary_positions(dtype, tmp_path, monkeypatch):
    placed, place = [], made._place_
    monkeypatch.setattr(made, "_place_", lambda model, *where: placed.append(model) or place(model, *where))
    _, [_] = comparisons(LLAMA, tmp_path, [0.3], dtype=[dtype], around=torch.bfloat16)
    assert len(placed) == 2  # the dense one, and the one with experts
    assert {model.model.rotary_emb.inv_freq.dtype for model in placed} == {torch.float32}
    assert {model.model.norm.weight.dtype for model in placed if moe_layers(model)} == {torch.bfloat16}


def test_types_beside_each_other_and_rows(tmp_path):
    _, [whole] = comparisons(LLAMA, tmp_path, [0.3], dtype=[torch.float32, torch.bfloat16, torch.int8])
    rows = measure(whole, 2, torch.device("cpu"))
    assert [(row.dtype, row.is_dense) for row in rows] == [
        ("float32", False),
        ("bfloat16", True),
        ("bfloat16", False),
        ("int8", True),
        ("int8", False),
    ]
    for row in rows:
        assert row.ideal == pytest.approx(100 / row.bytes_percent)
        assert row.moe_throughput == pytest.approx(1000 / row.moe_ms)
        assert math.isnan(row.moe_memory_mib)
    assert rows[1].bytes_percent == pytest.approx(50.0)
    assert 25 < rows[3].bytes_percent < 50 > rows[4].bytes_percent
    table = as_table(rows)
    assert f"batch of 1, {NEW} tokens written" in table.title
    headers = [column.header for column in table.columns]
    assert headers[4:] == ["bytes read %", "ms", "tokens/s", "speed-up", "ideal", "agreed %"]
    assert all(len(list(column.cells)) == len(rows) + 1 for column in table.columns)
    draw_speed_up(rows, Machine("A CPU", "avx2", 2, "2.9.0"))


def test_prompts_are_the_beginnings_of_test_blocks(tmp_path):
    words = [chr(ord("a") + i) for i in range(26)]
    tokenizer = tiny.tokenizer(tmp_path / "tok", words, ("[PAD]", "[UNK]", "<eos>"))
    (tmp_path / "texts.txt").write_text("\n\n".join(" ".join(words[i % 20 : i % 20 + 6]) for i in range(200)))
    source = DatasetSource(train=str(tmp_path / "texts.txt"), validation=None, test=None)
    data = LanguageModeling(source, tokenizer, "causal", 12, batch_size=8)
    _, [whole] = comparisons(GPT2, tmp_path, [1.0], data, batch_size=[2])
    text = whole.dense.call()
    blocks = next(iter(data.predict_dataloader()))["input_ids"]
    assert text.shape[1] == 12 + NEW
    assert torch.equal(text[:, :12], blocks[:2])
    assert whole.dense_score > 1
    assert whole.ways[0].score == pytest.approx(whole.dense_score, rel=1e-3)


def test_a_model_that_writes_no_text(tmp_path):
    with pytest.raises(ConfigError, match=r"^decode=5: a BertForSeq.* writes no text; must be 0, or the artifact one"):
        list(comparisons("bert", tmp_path, [0.5])[1])


def test_more_tokens_than_positions(tmp_path):
    positions = tiny.dense(GPT2).config.max_position_embeddings
    with pytest.raises(ConfigError, match=rf"^decode={positions}: must be less than {positions}, the positions of the"):
        list(comparisons(GPT2, tmp_path, [0.5], decode=positions)[1])
    _, [most] = comparisons(GPT2, tmp_path, [0.5], decode=positions - 1)
    assert most.tokens == 1


def test_from_the_command_line(tmp_path, capsys):
    save_artifact(tiny.routed(LLAMA), tmp_path / "artifact")
    more = ["--artifact", str(tmp_path / "artifact"), "--decode", "4", "--tau", "0.5", "--length", "6"]
    main(["benchmark", "--output_dir", str(tmp_path / "out"), "--device", "cpu", "--rounds", "2", *more])
    said = capsys.readouterr().out
    assert "batch of 8, 4 tokens written" in said
    assert "Times are of a token; the ideal is by bytes of weights that are read." in said
    assert (tmp_path / "out" / "benchmark.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--artifact", "x", "--decode", "1"], "decode=1: must be at least 2, or 0 for none"),
        (["--decode", "4"], "decode=4: only with --artifact; must be 0"),
        (
            ["--artifact", "x", "--decode", "4", "--optimize", "ahead_of_time"],
            "optimize='ahead_of_time': reads texts, and writes none; must go, or --decode 0",
        ),
        (["--optimize", "ahead_of_time"], "optimize='ahead_of_time': only with --artifact; must be true or false"),
        (
            ["--artifact", "x", "--decode", "4", "--scope", "model,layer"],
            "decode=4: only of whole models; leave --scope layer out",
        ),
        (
            ["--artifact", "x", "--decode", "4", "--compare", "torch-int8"],
            "compare='torch-int8': reads texts, and writes none; must go, or --decode 0",
        ),
    ],
)
def test_a_wrong_setting_ends_in_one_line(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        main(["benchmark", "--output_dir", str(tmp_path / "out"), "--device", "cpu", *more])
    assert capsys.readouterr().err == f"error: {message}\n"
