"""A converted language model under EleutherAI's harness, on a task that lies in a local folder."""

import json
import sys

import pytest
import tiny

from d2dmoe_pl import harness
from d2dmoe_pl.artifact import PhaseRecord, load_model, save_artifact
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.budgets.budget_path import BudgetPath, BudgetPoint, set_budget_path_
from d2dmoe_pl.moe.conversion import set_tau_
from d2dmoe_pl.moe.experts.merging import merge_to_dense_
from d2dmoe_pl.moe.find_layers import moe_layers

KIND = "llama-causal-language-modeling"
WORDS = ["red", "green", "blue", "cat", "dog", "eel"]
TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [red, green, blue]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""

WRITING = """\
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "red"
generation_kwargs: {until: ["cat"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def artifact(tmp_path):
    """A tiny model with a tokenizer and budgets."""
    model = tiny.routed(KIND)
    points = tuple(BudgetPoint((tau,) * 2, cost, cost, 0.0, 50.0) for tau, cost in ((1.0, 1.1), (0.5, 0.6), (0.0, 0.2)))
    set_budget_path_(model, BudgetPath(tuple(moe_layers(model)), "dynk_max", "accuracy", True, True, 8, points))
    folder = tmp_path / "artifact"
    save_artifact(
        model,
        folder,
        [PhaseRecord("BudgetCalibration")],
        save_processor=lambda aside: tiny.tokenizer(aside, WORDS, ("[PAD]", "[UNK]", "<eos>")),
    )
    return folder


@pytest.fixture
def task(tmp_path):
    """A folder with a task of multiple choice."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{WORDS[3 + i % 3]} {WORDS[i % 3]}", "answer": i % 3} for i in range(6)]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(TASK.replace("FILE", str(folder / "rows.json")))
    (folder / "written.yaml").write_text(WRITING.replace("FILE", str(folder / "rows.json")))
    return folder


def installed():
    return pytest.importorskip("lm_eval", reason='lm_eval is not installed; pip install -e ".[evaluation]"')


def test_the_line_of_the_docs(artifact, task, tmp_path, monkeypatch):
    installed()
    monkeypatch.setattr(sys, "argv", ["pytest"])
    out = tmp_path / "out"
    line = ["--model_args", f"pretrained={artifact},tau=0.3", "--tasks", "colours", "--include_path", str(task)]
    harness.main([*line, "--device", "cpu", "--output_path", str(out)])
    harness.main([*line, "--tasks", "written", "--batch_size", "3", "--device", "cpu"])
    [file] = out.rglob("results*.json")
    results = json.loads(file.read_text())
    assert 0 <= results["results"]["colours"]["acc,none"] <= 1
    assert results["n-samples"]["colours"]["effective"] == 6
    assert sys.argv == ["pytest"]


def test_tau_and_budgets_are_set(artifact):
    installed()
    taus = {}
    for name, settings in {"tau": {"tau": 0.3}, "budget": {"budget": 0.6}, "saved": {}}.items():
        model = harness.evaluated_model(str(artifact), **settings).model
        taus[name] = [layer.get_gate().config.tau for layer in moe_layers(model).values()]
    assert taus == {"tau": [0.3, 0.3], "budget": [0.5, 0.5], "saved": [0.5, 0.5]}
    with pytest.raises(ConfigError, match=r"^tau=0.3, budget=0.6: must be one of them$"):
        harness.evaluated_model(str(artifact), tau=0.3, budget=0.6)


@pytest.fixture
def given(monkeypatch):
    """What lm_eval's model is given, whether that is installed or not."""
    found = []

    def hflm(pretrained, tokenizer=None, revision="main", batch_size=1, **kwargs):
        found.append({"tokenizer": tokenizer, "revision": revision, "batch_size": batch_size})

    monkeypatch.setattr(harness, "_harness", lambda name: hflm)
    return found


def test_the_tokenizer_is_of_the_revision_that_the_weights_are_of(artifact, given, monkeypatch):
    loaded, tokenizers = [], []
    monkeypatch.setattr(harness, "load_model", lambda *args: loaded.append(args) or load_model(artifact))
    monkeypatch.setattr(harness, "load_pretrained", lambda *args, revision: tokenizers.append((args[1], revision)))
    harness.evaluated_model("me/model", revision=2, batch_size=3)  # as lm_eval reads revision=2
    harness.evaluated_model("me/model")
    assert [args[:2] for args in loaded] == tokenizers == [("me/model", "2"), ("me/model", None)]
    assert [(each["tokenizer"], each["revision"]) for each in given] == [("me/model", "2"), ("me/model", "main")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taus": 0.2}, r"taus=0.2: no such setting; allowed are tau, budget, dtype, optimize, .*batch_size$"),
        ({"budget": "30%"}, r"budget='30%': must be a share, such as 0.3$"),
        ({"optimize": "maybe"}, r"optimize='maybe': must be true or false$"),
        ({"tokenizer": "/nowhere"}, r"tokenizer='/nowhere': neither a folder nor a reachable hub name"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(artifact, given, settings, message):
    """The harness takes whatever it does not know for a setting of loading a model, which is loaded here."""
    with pytest.raises(ConfigError, match=rf"^{message}"):
        harness.evaluated_model(str(artifact), **settings)
    assert not given


def test_what_writes_no_text_is_refused(tmp_path, given):
    save_artifact(tiny.routed("bert"), tmp_path / "artifact")
    with pytest.raises(ConfigError, match=r"^pretrained='.*': a BertForSequenceClassification writes no text; must be"):
        harness.evaluated_model(str(tmp_path / "artifact"))


def test_without_a_model_the_command_says_so(monkeypatch):
    monkeypatch.setattr(harness, "_harness", lambda name: object)
    with pytest.raises(ConfigError, match=r"^pretrained=None: must be given in --model_args, the folder of an artif"):
        harness._evaluated_class.__wrapped__()(tau=0.3)


def test_at_tau_one_the_harness_finds_what_it_finds_of_the_dense_model(artifact, task):
    lm_eval = installed()
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 (optional)
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    dense = load_model(artifact)
    set_tau_(dense, 1.0)
    merge_to_dense_(dense)
    found = []
    for model in (HFLM(pretrained=dense, tokenizer=str(artifact)), harness.evaluated_model(str(artifact), tau=1.0)):
        manager = TaskManager(include_path=str(task))
        results = lm_eval.simple_evaluate(model, tasks=["colours"], task_manager=manager, bootstrap_iters=0)
        samples = results["samples"]["colours"]
        found.append([[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples])
    assert found[0] == [pytest.approx(row, rel=1e-4) for row in found[1]]


def test_without_the_package_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.models.huggingface", raising=False)
    with pytest.raises(SystemExit) as exit_info:
        harness.main(["--model_args", "pretrained=nowhere"])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: lm_eval: the package lm_eval")
    assert said.endswith('is not installed; pip install -e ".[evaluation]" brings it\n')
