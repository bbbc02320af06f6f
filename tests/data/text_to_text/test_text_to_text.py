"""Texts with texts as answers: what is learnt, written and measured."""

import csv

import pytest
import tiny
import torch

from d2dmoe_pl.adapters import HuggingFaceModel, adapter_for
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.callbacks.prediction_file import PredictionFile
from d2dmoe_pl.data import DatasetSource, TextAnswers, TextToText
from d2dmoe_pl.data.text_to_text.text_answers import OF_WRITTEN
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.moe.budgets.budget_path import budget_path
from d2dmoe_pl.phases import BudgetCalibration, ExpertClustering, FineTuning, RouterRegression, SparsityEnforcement

WORDS = ["red", "green", "blue", "name", "the", "colour"]
SPECIAL = ("[PAD]", "[UNK]", "<eos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts that name a colour, which is the answer, and a tokenizer for them."""
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 48), ("validation", 12), ("test", 12)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "target"])
            for i in torch.randint(3, (number,), generator=generator).tolist():
                rows.writerow([f"{'the ' * i}colour {WORDS[i]}", f"{WORDS[i]} colour"])
    tiny.tokenizer(folder / "tokenizer", WORDS, SPECIAL)
    return folder


def data_of(folder, **kwargs):
    settings = {"batch_size": 8, "max_target_length": 5, **kwargs}
    return TextToText(DatasetSource(str(folder)), str(folder / "tokenizer"), **settings)


def source():
    return HuggingFaceModel("text-to-text", config=tiny.CONFIGS["t5"]())


def set_up(folder, **kwargs):
    data = data_of(folder, **kwargs)
    data.setup()
    data.answer_start = 0
    return data


def test_what_the_decoder_sees_is_one_token_behind(folder):
    batch = next(iter(set_up(folder).val_dataloader()))
    labels, seen, mask = (batch[key] for key in ("labels", "decoder_input_ids", "decoder_attention_mask"))
    assert (seen[:, 0] == 0).all()
    assert torch.equal(seen[:, 1:][mask[:, 1:] == 1], labels[:, :-1][mask[:, 1:] == 1])
    assert torch.equal(labels != -100, mask == 1)
    assert {row[row != -100][-1].item() for row in labels} == {2}  # each answer ends


def test_a_long_answer_is_cut_and_still_ends(folder):
    batch = next(iter(set_up(folder, max_target_length=2).val_dataloader()))
    assert batch["labels"].shape[1] == 2
    assert (batch["labels"][:, 1] == 2).all()


def test_an_exact_match_is_what_greedy_decoding_writes(folder):
    """Without a text being written: each token is the likeliest after those before it."""
    data = set_up(folder, metrics=["exact_match", "chrf"])
    torch.manual_seed(3)
    model = source().build([])
    adapter = adapter_for(model.eval())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    batches = list(data.val_dataloader())
    for _ in range(60):  # so that some are right and some are not
        loss = data.task.loss(adapter.logits(model, batches[0]), batches[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    matches = []
    with torch.no_grad():
        for batch in batches:
            metrics = data.task.metrics()
            written = adapter.write(model, batch, 5)
            metrics.update(adapter.logits(model, batch), {**batch, "written": written})
            texts = [data.decode(ids) for ids in written.tolist()]
            same = [text == data.task.text_of(labels) for text, labels in zip(texts, batch["labels"], strict=True)]
            assert float(metrics.compute()["exact_match"]) == pytest.approx(sum(same) / len(same))
            matches += same
            assert float(metrics.compute()["chrf"]) > 0
    assert any(matches)


def test_chrf_counts_characters_alone():
    """It is chrF, not chrF++, of which words are a part: blanks elsewhere make no difference."""
    metric = OF_WRITTEN["chrf"]()
    metric.update(["abcd efgh"], [["abcde fgh"]])
    assert float(metric.compute()) == pytest.approx(1.0)


@pytest.mark.thorough
def test_through_the_phases_to_a_file(folder, trainer, tmp_path, caplog):
    start, settings = source(), {"metrics": ["exact_match", "chrf"]}
    for phase in (
        FineTuning(source=start, activation="relu"),
        SparsityEnforcement(),
        ExpertClustering(8, num_samples=16),
        RouterRegression(8),
    ):
        if phase.source is None:
            phase.init_from = str(tmp_path / "run" / "artifact")
        sweep = TauSweep([0.0, 1.0]) if isinstance(phase, RouterRegression) else None
        # routers for three epochs, in which their inputs are cached where they can be
        epochs = 3 if isinstance(phase, RouterRegression) else 1
        callbacks = [SaveArtifact(), *([sweep] if sweep else [])]
        given = trainer(callbacks=callbacks, limit_train_batches=1.0 if epochs > 1 else 2, max_epochs=epochs)
        given.fit(phase, datamodule=data_of(folder, **settings))
    [said] = [record.getMessage() for record in caplog.records if "not cached" in record.getMessage()]
    assert said.startswith("router inputs are not cached: layers see different numbers of tokens, ")
    given.test(phase, datamodule=data_of(folder, **settings))
    low, high = sweep.rows["test"]
    assert low.experts_percent < high.experts_percent == 100
    assert high.model_flops_percent > low.model_flops_percent
    file = PredictionFile(str(tmp_path / "answers.csv"))
    trainer(callbacks=[file]).predict(phase, datamodule=data_of(folder, **settings))
    assert len(file.rows) == 12
    assert {row["label"] for row in file.rows} <= {f"{word} colour" for word in WORDS}
    assert all(isinstance(row["prediction"], str) for row in file.rows)
    budgets = BudgetCalibration(num_scored_points=2, init_from=str(tmp_path / "run" / "artifact"))
    trainer(limit_val_batches=1.0).fit(budgets, datamodule=data_of(folder, **settings))
    path = budget_path(budgets.model)
    assert path.samples == 12  # not tokens: what matches is an answer
    assert path.standard_error(50.0) == pytest.approx(50 / 12**0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["rouge"]}, r"metrics=\['rouge'\]: allowed are exact_match, chrf, bleu"),
        ({"metrics": []}, r"metrics=\[\]: allowed are exact_match, chrf, bleu"),
        ({"max_target_length": 1}, "max_target_length=1: must be at least 2"),
        ({"target_column": "text"}, "target_column='text': is the source_column; must be another"),
    ],
)
def test_settings_that_make_no_sense(folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        data_of(folder, **settings)


def test_a_tokenizer_that_ends_no_text(folder, tmp_path):
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", WORDS)
    data = TextToText(DatasetSource(str(folder)), tokenizer)
    with pytest.raises(ConfigError, match="has no token that ends a text, by which answers end; must have one"):
        data.setup()


def test_a_model_that_ends_answers_otherwise(folder, trainer):
    config = tiny.CONFIGS["t5"]()
    config.eos_token_id = 7
    phase = FineTuning(source=HuggingFaceModel("text-to-text", config=config))
    message = "eos_token_id=7 of T5ForConditionalGeneration: must be 2, by which the tokenizer ends texts"
    with pytest.raises(ConfigError, match=message):
        trainer().fit(phase, datamodule=data_of(folder))


def test_the_task_alone():
    task = TextAnswers(["[PAD]", "a", "b"], lambda ids: "".join("_ab"[i] for i in ids), ["exact_match"], 4)
    logits = torch.eye(3)[torch.tensor([[1, 2, 0], [1, 1, 0]])]  # (2, 3, 3)
    batch = {"labels": torch.tensor([[1, 2, -100], [1, 2, -100]])}
    metrics = task.metrics()
    metrics.update(logits, batch)
    assert float(metrics.compute()["exact_match"]) == 0.5
    rows = task.rows({"predictions": torch.tensor([[1, 2]])}, batch["labels"][:1])
    assert rows == [{"label": "ab", "prediction": "ab"}]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (
            {"max_target_length": 9},
            "max_target_length=9: the longest answer of the test split has so many tokens; must",
        ),
        (
            {"max_length": 9},
            "max_length=9: the longest text of the test split has so many tokens; must be at most 8, th",
        ),
    ],
)
def test_texts_and_answers_longer_than_the_model_has_positions(trainer, folder, tmp_path, length, message):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("text,target\nred,blue\nblue,red\n")
    (tmp_path / "test.csv").write_text(f"text,target\n{'the ' * 20},{'the ' * 20}\n")
    config = tiny.CONFIGS["bart"]()
    config.max_position_embeddings = 8
    short = {"max_length": 8, "max_target_length": 8, **length}
    data = TextToText(DatasetSource(str(tmp_path)), str(folder / "tokenizer"), **short)
    with pytest.raises(ConfigError, match=f"^{message}"):
        trainer().fit(FineTuning(source=HuggingFaceModel("text-to-text", config=config)), datamodule=data)


@pytest.mark.parametrize(
    ("prefix", "max_length", "message"),
    [
        (
            "the colour ",
            2,
            r"^max_length=2: must be at least 3, since 'the colour ' and the tokenizer's own .* take 2$",
        ),
        ("the colour ", 3, None),
    ],
)
def test_a_prefix_leaves_something_of_each_text(folder, prefix, max_length, message):
    data = data_of(folder, prefix=prefix, max_length=max_length)
    if message is None:
        data.setup("fit")
        assert len({tuple(ids) for ids in data._splits["train"]["input_ids"]}) > 1
        return
    with pytest.raises(ConfigError, match=message):
        data.setup("fit")


def test_how_many_texts_and_answers_are_as_long_as_is_kept(folder):
    data = set_up(folder, max_length=3, max_target_length=3)
    ids = data._splits["train"]["input_ids"]
    expected = sum(len(each) == 3 for each in ids) / len(ids)
    assert 0 < expected < 1
    assert data.filled_shares() == {("max_length", "texts"): expected, ("max_target_length", "answers"): 1.0}
