"""``main.py benchmark`` from the command line: files, tables, warnings, Ctrl-C, and one line for what is wrong."""

import csv
import os
import signal

import pages
import pytest
import tiny
import torch
import yaml

from d2dmoe_pl.artifact import PhaseRecord, save_artifact
from d2dmoe_pl.benchmark import command
from d2dmoe_pl.benchmark.machine import Machine
from d2dmoe_pl.benchmark.result_rows import BenchmarkRow, as_table, draw_speed_up
from d2dmoe_pl.cli import main
from d2dmoe_pl.data import Digits, DocstringText, TextClassification

pytestmark = pytest.mark.drawn

SHAPE = ["--d_model", "24", "--d_ff", "96", "--num_experts", "8", "--tokens", "2,5", "--share", "0.5,1"]
LAYERS = [*SHAPE, "--scope", "layer", "--rounds", "2"]
MACHINE = Machine("A CPU", "avx2", 2, "2.9.0")


@pytest.fixture
def artifact(tmp_path):
    save_artifact(tiny.routed(), tmp_path / "artifact", [PhaseRecord("RouterRegression")])
    return str(tmp_path / "artifact")


def read(folder):
    with (folder / "benchmark.csv").open() as opened:
        return list(csv.DictReader(opened))


def benchmark(folder, *more):
    main(["benchmark", "--output_dir", str(folder), "--device", "cpu", *more])
    return read(folder)


def test_a_shape(tmp_path, capsys):
    threads = torch.get_num_threads()
    records = benchmark(tmp_path / "out", *LAYERS, "--compare", "loop", "--threads", "1", "--backend", "reference")
    assert torch.get_num_threads() == threads
    assert [(r["tokens"], r["backend"], r["router"], r["share_percent"]) for r in records] == [
        (tokens, backend, router, share)
        for tokens in ("2", "5")
        for backend, router in (("reference", "False"), ("reference", "True"), ("loop", "False"))
        for share in ("50.0", "100.0")
    ]
    assert {(r["threads"], r["torch"], r["dtype"]) for r in records} == {("1", torch.__version__, "float32")}
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "Measured on" in said
    assert "1 threads" in said
    assert "24 x 96, E=8, float32, 5 tokens" in said
    assert "reference + router" in said


def test_an_artifact_on_the_data_of_a_recipe(artifact, tmp_path, capsys):
    shared = {"data": {"class_path": "Digits"}, "trainer": {"max_epochs": 3}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"shared": shared, "phases": {"fine_tuning": {}}}))
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"tau": [0.2, 1.0], "rounds": 2}))
    config = [f"--config={tmp_path / name}.yaml" for name in ("recipe", "plain")] + ["--artifact", artifact]
    more = ["--batch_size", "4", "--scope", "layer,model", "--scored_samples", "0"]
    records = benchmark(tmp_path / "out", *config, *more)
    assert [(r["scope"], r["name"], r["batch_size"], r["tokens"], r["tau"]) for r in records] == [
        (scope, name, batch, "20", tau)
        for scope, name, batch in (
            ("model", "VisionTransformer", "4"),
            ("layer", "blocks.0.mlp", ""),
            ("layer", "blocks.1.mlp", ""),
        )
        for tau in ("0.2", "1.0")
    ]
    assert [float(r["share_percent"]) == 100 for r in records] == [False, True] * 3
    assert "VisionTransformer, E=8, float32, batch of 4" in capsys.readouterr().out


def test_a_recipe_without_data(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("phases: {fine_tuning: {data: {class_path: Digits}}}")
    with pytest.raises(SystemExit):
        main(["benchmark", "--config", str(tmp_path / "recipe.yaml")])
    said = capsys.readouterr().err
    assert said == f"error: config='{tmp_path / 'recipe.yaml'}': is a recipe whose phases share no data\n"


def test_the_same_artifact_on_noise_runs_other_experts(artifact, tmp_path):
    more = ["--artifact", artifact, "--scope", "model", "--tau", "0.2", "--batch_size", "4", "--rounds", "2"]
    [noise] = benchmark(tmp_path / "noise", *more)
    [real] = benchmark(tmp_path / "real", *more, "--data", "Digits", "--scored_samples", "0")
    assert noise["share_percent"] != real["share_percent"]


def test_what_was_measured_before_ctrl_c_is_kept(tmp_path, monkeypatch, capsys):
    measure = command.measure
    done = []

    def interrupted(*args):
        if done:
            os.kill(os.getpid(), signal.SIGINT)
        done.append(True)
        return measure(*args)

    monkeypatch.setattr(command, "measure", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with pytest.raises(SystemExit) as exit_info:
            benchmark(tmp_path / "out", *LAYERS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit_info.value.code == 130
    assert {record["tokens"] for record in read(tmp_path / "out")} == {"2"}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["benchmark.csv", "benchmark.png"]
    assert "Interrupted: 4 rows were measured." in capsys.readouterr().out


def test_a_noisy_machine_is_said(tmp_path, monkeypatch, capsys):
    measure = command.measure

    def noisy(*args):
        rows = measure(*args)
        for i, row in enumerate(rows):
            row.noisy = i == 0
        return rows

    monkeypatch.setattr(command, "measure", noisy)
    benchmark(tmp_path / "out", *LAYERS, "--router_width", "0")
    captured = capsys.readouterr()
    assert captured.out.count("Too noisy to tell.") == 2
    assert "in 2 of 4 rows half the interquartile range of the dense times is above 10% of their m" in captured.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scope", "block"], "scope='block': allowed are layer, model"),
        (["--dtype", "float32,int4"], "dtype='int4': allowed are float32, bfloat16, float16, int8"),
        (["--around", "float16"], "around='float16': allowed are float32, bfloat16"),
        (["--batch_size", "0"], "batch_size=0: must be positive"),
        (["--rounds", "1"], "rounds=1: must be at least 2"),
        (["--threads", "0"], "threads=0: must be positive"),
        (["--device", "tpu"], "device='tpu': allowed are auto, cpu, cuda"),
        (["--num_experts", "7"], "num_experts=7: must divide the FFN width, which is 3072"),
        (["--artifact", "x", "--tau", "0.5,1.5"], "tau=1.5: must lie in [0, 1] (1 runs every expert, the dense layer)"),
        (["--artifact", "x", "--length", "0"], "length=0: must be positive"),
        (["--artifact", "x", "--budget", "25"], "budget=25: must lie in (0, 1]; 25% is 0.25"),
        (["--compare", "loop"], "compare='loop': runs FFNs alone; must go, or --scope layer be there"),
        (["--artifact", "x"], "artifact='x': no such folder; must be the artifact that a phase wrote"),
        (
            ["--architecture", "resnet50d"],
            "architecture='resnet50d': must be a model with embed_dim, ",
        ),
    ],
)
def test_a_wrong_setting_ends_in_one_line(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as exit_info:
        main(["benchmark", "--output_dir", str(tmp_path / "out"), "--device", "cpu", *more])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_backends_are_found_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--output_dir", str(tmp_path / "out"), "--backend", "abacus"])
    assert capsys.readouterr().err.startswith("error: backend='abacus': allowed are ")


def test_a_runtime_for_whole_models_beside_ffns_alone(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", *LAYERS, "--compare", "torch-int8"])
    said = "error: compare='torch-int8': runs whole models; must go, or --scope model be there\n"
    assert capsys.readouterr().err == said


def test_a_runtime_of_the_cpu_beside_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        main(["benchmark", "--artifact", "x", "--compare", "torch-int8"])
    assert (
        capsys.readouterr().err == "error: compare='torch-int8': runs on the CPU; must go, or --device cpu be there\n"
    )


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["benchmark", "--device", "cuda"])
    assert capsys.readouterr().err == "error: device='cuda': PyTorch finds no GPU here; allowed are auto, cpu\n"


def row(**changes):
    given = {
        "scope": "layer",
        "name": "a",
        "backend": "grouped",
        "router": True,
        "dtype": "float32",
        "num_experts": 8,
        "batch_size": None,
        "tokens": 1234,
        "tau": 0.5,
        "share_percent": 25.0,
        "dense_ms": 12.0,
        "dense_spread_ms": 0.25,
        "moe_ms": 4.0,
        "moe_spread_ms": 0.125,
        "dense_throughput": 102833.3,
        "moe_throughput": 308500.0,
        "speed_up": 3.0,
        "ideal": 3.75,
        "rest_percent": None,
        "dense_memory_mib": 8.0,
        "moe_memory_mib": 2.0,
        "noisy": False,
    }
    return BenchmarkRow(**{**given, **changes})


def test_the_table_holds_the_numbers():
    table = as_table([row(), row(tau=None, router=False)])
    assert table.title == "a, E=8, float32, 1,234 tokens"
    assert table.caption is None
    assert [list(column.cells) for column in table.columns] == [
        ["dense", "grouped + router", "grouped"],
        ["float32", "float32", "float32"],
        ["", "0.5", ""],
        ["", "25.0", "25.0"],
        ["12.0 ± 0.2", "4.000 ± 0.125", "4.000 ± 0.125"],
        ["102,833", "308,500", "308,500"],
        ["1.00x", "3.00x", "3.00x"],
        ["", "3.75x", "3.75x"],
        ["8.0", "2.0", "2.0"],
    ]
    model = as_table([row(scope="model", batch_size=8, rest_percent=40.0, noisy=True)])
    assert model.columns[5].header == "samples/s"
    assert model.caption == (
        "Attention and all else outside the FFNs take 40% of the dense model's time.\nToo noisy to tell."
    )


def test_the_picture_shows_medians_over_layers_against_tau_or_share():
    rows = [
        row(name=name, tau=tau, speed_up=speed_up, ideal=4.0)
        for tau in (0.9, 0.5)
        for name, speed_up in (("a", 1.0), ("b", 2.0), ("c", 6.0))
    ]
    model, narrow, few = row(scope="model", batch_size=8), row(dtype="bfloat16"), row(tau=None, num_experts=4)
    figure = draw_speed_up([*rows, model, narrow, few], MACHINE)
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == [
        "FFN alone, E=8, float32",
        "whole model, E=8, float32",
        "FFN alone, E=8, bfloat16",
        "FFN alone, E=4, float32",
    ]
    assert figure.get_suptitle() == "A CPU (avx2), 2 threads, torch 2.9.0"
    axes = figure.axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.5, 2.0], [0.9, 2.0]]
    assert axes.lines[1].get_xydata().tolist() == [[0.5, 4.0], [0.9, 4.0]]
    assert [axes.get_xlabel() for axes in figure.axes] == ["tau", "tau", "tau", "experts run, %"]
    assert [text.get_text() for text in axes.get_legend().texts] == ["1,234 tokens", "grouped + router", "ideal"]


def test_help_and_yaml(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Whose test samples are run." in said
    assert "comma-separated" in said
    (tmp_path / "b.yaml").write_text("tokens: [3, 4]\nshare: 0.5\nnum_experts: '1,2'\n")
    given = command.benchmark_parser().parse_args(["--config", str(tmp_path / "b.yaml")])
    assert (given.tokens, given.share, given.num_experts) == ([3, 4], [0.5], [1, 2])


def test_the_pages_commands_can_be_run(monkeypatch):
    monkeypatch.chdir(pages.ROOT)
    found = {
        pages.name_of(page): [
            command.benchmark_parser().parse_args(words)
            for name, *words in pages.arguments(page)
            if name == "benchmark"
        ]
        for page in pages.PAGES
    }
    [of_readme] = found["README.md"]
    on_digits, on_writing, on_shapes = found["docs/speed.md"]
    [on_texts] = found["docs/results.md"]
    assert of_readme == on_digits
    assert on_texts.data.class_path.endswith(TextClassification.__name__)
    assert (on_texts.scope, on_texts.batch_size) == (["model"], [1, 32])
    assert on_digits.data.class_path.endswith(Digits.__name__)
    assert on_writing.data.class_path.endswith(DocstringText.__name__)
    assert (on_writing.decode, on_writing.dtype) == (64, ["float32", "bfloat16", "int8"])
    assert on_shapes.num_experts == [96, 128]
