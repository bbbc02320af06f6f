"""A report holds what the run's own files say, in one file that needs nothing else."""

import csv
import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import stand_ins
import tiny
import torch
import transformers
import yaml
from recipe import arguments, write_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from d2dmoe_pl.artifact import PhaseRecord, read_artifact, save_artifact
from d2dmoe_pl.benchmark.timing import Timing
from d2dmoe_pl.callbacks.sweep_table import SweepRow
from d2dmoe_pl.cli import main
from d2dmoe_pl.data import DatasetSource, TextClassification
from d2dmoe_pl.moe.budgets.budget_path import BudgetPoint
from d2dmoe_pl.phases import BudgetCalibration
from d2dmoe_pl.report.drawings import as_svg, layers, loads, pictures, shortened
from d2dmoe_pl.report.findings import Findings, PhaseFinding
from d2dmoe_pl.report.page import as_markdown, commands
from d2dmoe_pl.report.single_samples import SampleCompute, expert_loads, patches, single_samples, words_of
from d2dmoe_pl.report.writing import write_report

pytestmark = pytest.mark.drawn


class Balance(HTMLParser):
    """Knows whether every tag is closed."""

    def __init__(self):
        super().__init__()
        self.stack = []

    def handle_starttag(self, tag, attributes):
        if tag not in {"meta", "br", "link"}:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    main(arguments(write_recipe(folder / "recipe.yaml"), folder / "run"))
    return folder / "run"


def test_a_chain_ends_in_a_page_of_its_own_figures(run):
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    Balance().feed(page)
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page)  # nothing is fetched
    with (run / "router_regression" / "tau_sweep.csv").open() as opened:
        rows = [row for row in csv.DictReader(opened) if row["stage"] == "test"]
    for row in rows:
        for shown in (f"{float(row['accuracy']):.2f}", f"{float(row['ffn_flops_percent']):.1f}"):
            assert shown in page
            assert shown in text
    metrics = read_artifact(run / "router_regression" / "artifact").history[-1].metrics
    assert f"{100 * metrics['test/accuracy']:.2f}" in text
    for phase in ("fine_tuning", "sparsity_enforcement", "expert_clustering", "router_regression"):
        assert phase in page
        minutes = json.loads((run / phase / "phase.json").read_text())["seconds"] / 60
        assert minutes > 0
        assert f"| {phase} | {minutes:.1f} |" in text
    assert page.count("<svg") == 4  # curve, layers, loads, pictures; nothing was logged often enough for courses
    assert "Where compute goes" in page


def test_a_chain_that_ends_in_budgets_says_what_it_is_set_to(run):
    recipe = yaml.safe_load((run.parent / "recipe.yaml").read_text())
    calibration = {"ffn_flops": 0.6, "num_samples": 64, "num_scored_points": 4, "keep": 0.5}
    sweep = [{"class_path": "TauSweep", "init_args": {"budgets": [0.6, 0.8]}}]
    recipe["phases"]["budgets"] = {
        "model": {"class_path": "BudgetCalibration", "init_args": calibration},
        "trainer": {"callbacks": sweep},
    }
    (run.parent / "budgets.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    shutil.copytree(run, run.parent / "budgets")
    main(arguments(str(run.parent / "budgets.yaml"), run.parent / "budgets"))
    text = (run.parent / "budgets" / "report.md").read_text()
    with (run.parent / "budgets" / "budgets" / "tau_sweep.csv").open() as opened:
        (row,) = [row for row in csv.DictReader(opened) if row["stage"] == "test" and row["budget"] == "0.6"]
    assert text.startswith("# 60.0% of the FFNs' FLOPs, ")
    assert f": {float(row['accuracy']):.2f} ± " in text.splitlines()[0]
    assert "Asked for: **ffn_flops=60%**." in text
    assert "promised, by validation" in text
    assert f'model = load_model("{run.parent / "budgets" / "budgets" / "artifact"}")' in text


@pytest.mark.parametrize(
    ("spread", "said", "of"),
    [(0.0005, "0.50x", "as fast as dense"), (0.004, "too noisy to tell", "how fast beside dense")],
)
def test_a_speed_is_not_told_where_something_else_ran(tmp_path, spread, said, of):
    point = BudgetPoint((0.5,), 0.2, 0.5, 0.1, 90.0)
    times = {None: Timing(0.01, spread), 0.2: Timing(0.02, 0.001)}
    phases = [PhaseFinding("budget_calibration", "BudgetCalibration", 1.0, {})]
    text = as_markdown(Findings(tmp_path, "speed=2x", "accuracy", phases, (), promised=point, times=times, timed="1"))
    assert f"- **{said}** {of}, 1" in text
    assert re.search(rf"20%.*{said}", text)


def told(commands, option):
    """What shells take for the values of an option in the commands that have it."""
    words = [shlex.split(line) for line in commands.splitlines() if line.startswith("python ")]
    return [line[line.index(option) + 1] for line in words if option in line]


def test_its_commands_are_of_what_is_there(tmp_path):
    folder = tmp_path / "mine & the cat's"
    (folder / "last" / "artifact").mkdir(parents=True)
    point = BudgetPoint((0.5,), 0.33041, 0.5, 0.1, 90.0)
    found = Findings(folder, "drop=1", "accuracy", [PhaseFinding("last", "RouterRegression", 1.0, {})], ())
    assert told(commands(found), "--run") == [str(folder / "last")] * 2
    assert told(commands(found), "--config") == ["RECIPE"] * 2
    assert f'load_model("{folder / "last" / "artifact"}")' in commands(found)
    history = [PhaseRecord("FineTuning"), PhaseRecord("RouterRegression")]
    save_artifact(tiny.routed("bert"), folder / "last" / "artifact", history)
    save_artifact(tiny.routed("bert"), folder / "model", history[:1])  # of an earlier run
    assert told(commands(found), "--run") == [str(folder / "last")] * 2
    save_artifact(tiny.routed("bert"), folder / "model", history)
    (folder / "recipe.yaml").touch()
    said = commands(replace(found, promised=point))
    assert told(said, "--run") == [str(folder)] * 2
    assert told(said, "--config") == [str(folder / "recipe.yaml")] * 2
    assert "ffn_flops=0.331)" in said  # no less than the least
    assert told(said, "--budget") == ["0.331"] * 2  # as it was wished for, to time and to compile
    assert told(said, "--output_dir") == [f"{folder}_compiled", f"{folder}_again"]
    said = commands(replace(found, predicts=False))
    assert "predict" not in said
    assert told(said, "--run") == [str(folder)]


def test_run_again_with_nothing_to_do_it_stays(run):
    before = (run / "report.html").read_bytes()
    main(arguments(str(run.parent / "recipe.yaml"), run))
    assert (run / "report.html").read_bytes() == before


def test_a_report_that_was_broken_off_is_written_by_the_next_call(run):
    swept, text = (run / "router_regression" / "tau_sweep.csv").read_bytes(), (run / "report.md").read_text()
    files = sorted(run.rglob("*"))
    (run / "report.html").unlink()
    main(arguments(str(run.parent / "recipe.yaml"), run))
    assert (run / "report.html").is_file()
    assert (run / "report.md").read_text() == text
    assert (run / "router_regression" / "tau_sweep.csv").read_bytes() == swept
    assert sorted(run.rglob("*")) == files


def test_a_launched_process_leaves_a_report_that_was_broken_off(run, monkeypatch):
    copy = run.parent / "launched"
    shutil.copytree(run, copy)
    (copy / "report.html").unlink()
    launched = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "2"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    several = ("--set", "trainer.devices=2", "trainer.strategy=ddp")
    main(arguments(str(run.parent / "recipe.yaml"), copy, *several))
    assert not (copy / "report.html").exists()


CONVBERT = {"embedding_size": 24, "vocab_size": 40, **tiny.SHAPE}
MODELS = {
    "bert": lambda **labels: transformers.BertForSequenceClassification(tiny.bert_config(**labels)),
    "one that has no mask": lambda **labels: transformers.FNetForSequenceClassification(
        transformers.FNetConfig(vocab_size=40, tpu_short_seq_length=12, **tiny.SHAPE, **labels)
    ),
    "one that reads padding": lambda **labels: transformers.ConvBertForSequenceClassification(
        transformers.ConvBertConfig(**CONVBERT, **labels)
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_words_of_texts_and_their_loads(trainer, tmp_path, kind, monkeypatch):
    stand_ins.write_emotion(tmp_path / "texts")
    rows = [f"{' '.join(stand_ins.WORDS[:length])},{stand_ins.ANIMALS[length]}\n" for length in (1, 4, 2, 3)]
    (tmp_path / "texts" / "test.csv").write_text("".join(["text,label\n", *rows]))
    tiny.tokenizer(tmp_path / "words", stand_ins.WORDS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    labels = {"id2label": dict(enumerate(stand_ins.ANIMALS[:5])), "hidden_act": "relu"}
    model = MODELS[kind](**labels).eval()
    tiny._spread(model)
    save_artifact(tiny.route_(model), tmp_path / "routed", [PhaseRecord("RouterRegression")])
    data = TextClassification(DatasetSource(dataset=str(tmp_path / "texts")), str(tmp_path / "words"), max_length=12)
    phase = BudgetCalibration(init_from=str(tmp_path / "routed"))
    trainer().test(phase, datamodule=data, verbose=False)
    samples = single_samples(phase, 4)
    assert len(samples) == 4
    for sample in samples:
        assert len(sample.words) == len(sample.shares)
        assert (sample.words[0], sample.words[-1]) == ("[CLS]", "[SEP]")
        assert all(1 / 8 <= share <= 1 for share in sample.shares)
        assert "(label: " in sample.said
    shares = expert_loads(phase, 8)
    runs = []
    monkeypatch.setattr("d2dmoe_pl.report.single_samples.ENOUGH_TOKENS", 1)
    monkeypatch.setattr(phase, "run_layers", lambda batch: runs.append(phase.logits(batch)))
    assert expert_loads(phase, 96).keys() == shares.keys()
    assert len(runs) == 1  # batch
    assert all(len(own) == 8 and 1 <= sum(own) <= 8 for own in shares.values())
    assert "<svg" in as_svg(loads(shares))


def test_no_predictions_are_promised_of_what_writes_none(trainer, tmp_path, monkeypatch):
    save_artifact(tiny.routed("bert"), tmp_path / "last" / "artifact", [PhaseRecord("RouterRegression")])
    phase = BudgetCalibration(init_from=str(tmp_path / "last" / "artifact"))
    trainer().test(phase, datamodule=tiny.TextData(8), verbose=False)
    for writes in (True, False):
        monkeypatch.setattr(type(phase.task), "writes_rows", writes)
        write_report(tmp_path, {"last": 1.0}, phase)
        assert ("main.py predict" in (tmp_path / "report.md").read_text()) == writes


def test_tokens_of_bytes_are_shown_as_text():
    """A character of several tokens stands with the last of them; other tokenizers' tokens are as they were."""
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    words = words_of(tokenizer, tokenizer("a f\u00fcr \u65e5")["input_ids"])
    assert words == ["a", " ", "f", "\u00b7", "\u00fc", "r", " ", "\u00b7", "\u00b7", "\u65e5"]
    broken = tokenizer("\u65e5\u65e5")["input_ids"][1:]  # begins in the middle of a character
    assert len(words_of(tokenizer, broken)) == 5


def test_tokens_of_words_are_shown_as_they_are(tmp_path):
    tiny.tokenizer(tmp_path, stand_ins.WORDS, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert words_of(tokenizer, tokenizer("who is it")["input_ids"])[:4] == ["[CLS]", "who", "is", "it"]


def test_patches_come_last():
    assert patches(torch.arange(5.0), 8, 8).tolist() == [[1, 2], [3, 4]]
    assert patches(torch.arange(18.0), 16, 16).shape == (4, 4)
    assert patches(torch.arange(9.0), 8, 8).tolist() == [[5, 6], [7, 8]]  # behind a class and four registers
    assert patches(torch.arange(33.0), 16, 32).tolist() == torch.arange(1.0, 33).view(4, 8).tolist()
    assert patches(torch.arange(40.0), 7, 11) is None


@pytest.mark.parametrize("said", ["#$ & up (label: $x)", "1{ and $", "a\\x $1 $2"])
def test_labels_may_have_signs_that_mean_something_to_who_draws(said):
    sample = SampleCompute([], torch.rand(4, 4), [[0.1, 0.2], [0.3, 0.4]], said)
    assert as_svg(pictures([sample])).startswith("<svg")


def test_pictures_are_the_same_for_the_same_figures():
    rows = [SweepRow("test", 0.5, 0.1, "accuracy", 97.5, True, True, 12.0, 16.0, 2e6, 44.0, {"a": 12.0, "b" * 40: 3.0})]
    assert as_svg(layers(rows)) == as_svg(layers(rows))
    assert shortened("b" * 40) == "…" + "b" * 21
    assert rows[0].standard_error is None
