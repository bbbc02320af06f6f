"""SQuAD from local files, from batches to exact match and F1, and a model fine-tuned on it."""

import json
import random

import pytest
import tiny
import torch
from squad_files import LENGTHS, WORDS, no_answer, question, squad, write
from torch.nn import functional as F

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.artifact import load_model, save_artifact
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.callbacks.prediction_file import PredictionFile
from d2dmoe_pl.data import DatasetSource, QuestionAnswering, SQuAD
from d2dmoe_pl.data.squad.squad_score import SQuADScore, against_all
from d2dmoe_pl.data.symmetric_kl import symmetric_kl
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import ExpertClustering, FineTuning, MoEBERTDistillation, RouterRegression

SIZES = {"num_experts": 4, "expert_dim": 12, "num_shared": 5}


def ideal_logits(batch):
    """What a model that knows the labels would say, with some noise."""
    length = batch["input_ids"].shape[1]
    return 9 * F.one_hot(batch["labels"], length).float() + torch.rand(len(batch["labels"]), 2, length)


class TestData:
    def test_batches(self, tmp_path, tokenizer_path):
        data = squad(tmp_path, tokenizer_path)
        assert data.head == "question-answering"
        data.setup()
        assert data.filled_shares() == {}  # what is behind a window is in the next one
        batches = list(data.val_dataloader())
        assert len(torch.cat([batch["question"] for batch in batches])) > 9
        for batch in batches:
            rows, length = batch["input_ids"].shape
            assert batch["labels"].shape == (rows, 2)
            assert batch["offsets"].shape == (rows, length, 2)
            assert (batch["offsets"][batch["attention_mask"] == 0] == -1).all()
        assert set(torch.cat([batch["question"] for batch in batches]).tolist()) == set(range(30, 39))

    @pytest.mark.parametrize("version", [1, 2])
    def test_a_model_that_knows_is_always_right(self, tmp_path, tokenizer_path, version):
        data = squad(tmp_path, tokenizer_path, version)
        data.setup()
        metrics = data.task.metrics()
        for batch in data.test_dataloader():
            metrics.update(ideal_logits(batch), batch)
        values = {name: float(value) for name, value in metrics.compute().items()}
        assert values["exact_match"] == values["f1"] == 1
        right = {"has_answer_exact_match", "has_answer_f1", "no_answer_accuracy", "best_exact_match", "best_f1"}
        thresholds = {"best_exact_match_threshold", "best_f1_threshold"}
        more = right | thresholds if version == 2 else set()
        assert set(values) == {"loss", "exact_match", "f1"} | more
        assert all(values[name] == 1 for name in right & more)

    def test_no_answer_threshold(self, tmp_path, tokenizer_path):
        values = {}
        for threshold in (-100.0, 100.0):
            data = squad(tmp_path, tokenizer_path, 2, null_threshold=threshold)
            data.setup()
            metrics = data.task.metrics()
            for batch in data.test_dataloader():
                metrics.update(ideal_logits(batch), batch)
            values[threshold] = metrics.compute()
        assert values[-100.0]["exact_match"] == pytest.approx(1 / 7)  # one of the seven has no answer
        assert (values[-100.0]["no_answer_accuracy"], values[-100.0]["has_answer_f1"]) == (1, 0)
        assert (values[100.0]["no_answer_accuracy"], values[100.0]["has_answer_f1"]) == (0, 1)
        assert values[100.0]["best_f1"] == values[-100.0]["best_f1"] == 1

    def test_hub_names(self, tokenizer_path):
        assert SQuAD(tokenizer_path).source == DatasetSource("rajpurkar/squad", test="validation")
        assert SQuAD(tokenizer_path, 2).source == DatasetSource("rajpurkar/squad_v2", test="validation")

    def test_bad_settings(self, tmp_path, tokenizer_path):
        with pytest.raises(ConfigError, match=r"version=3: allowed are 1 \(v1.1\) and 2"):
            SQuAD(tokenizer_path, 3)
        with pytest.raises(ConfigError, match=r"doc_stride=4: must lie in \[0, 4\), below .* max_length=11"):
            SQuAD(tokenizer_path, **{**LENGTHS, "doc_stride": 4}).load_processor()
        with pytest.raises(ConfigError, match="max_length=7: must be above 7, the tokens of max_question_length=4 and"):
            SQuAD(tokenizer_path, **{**LENGTHS, "max_length": 7}).load_processor()
        with pytest.raises(ConfigError, match="n_best=0: must be positive"):
            SQuAD(tokenizer_path, n_best=0)
        plain = tiny.tokenizer(tmp_path / "plain", WORDS)
        with pytest.raises(ConfigError, match=r"tokenizer='.*plain': must be fast, put a \[CLS\] token first"):
            SQuAD(plain).load_processor()

    def test_unanswered_questions_in_version_1(self, tmp_path, tokenizer_path):
        source = write(tmp_path / "data", lambda i: i == 41)
        message = "version=1: the validation split has questions without answers; allowed with version=2 only"
        with pytest.raises(ConfigError, match=message):
            SQuAD(tokenizer_path, 1, source, **LENGTHS).setup()

    def test_a_missing_column(self, tmp_path, tokenizer_path):
        for name in ("train", "validation", "test"):
            (tmp_path / f"{name}.json").write_text(json.dumps([{"context": "cat", "answers": no_answer()}]))
        with pytest.raises(
            ConfigError, match="'question': not a column of the train split, which has context, answers"
        ):
            SQuAD(tokenizer_path, 2, DatasetSource(str(tmp_path)), **LENGTHS).setup()


class TestTask:
    def batch(self):
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        return {"attention_mask": mask, "labels": torch.tensor([[1, 3], [0, 0]])}

    def test_losses_leave_padding_out(self):
        task, batch = QuestionAnswering([], False), self.batch()
        student, teacher = torch.randn(2, 2, 4, requires_grad=True), torch.randn(2, 2, 4)
        parts = [(student[0], teacher[0], [1, 3]), (student[1, :, :2], teacher[1, :, :2], [0, 0])]
        loss = sum(F.cross_entropy(mine, torch.tensor(labels)) for mine, _, labels in parts) / 2
        torch.testing.assert_close(task.loss(student, batch), loss)
        distance = sum(symmetric_kl(mine, other).mean() for mine, other, _ in parts) / 2
        got = task.prediction_loss(student, teacher, batch)
        torch.testing.assert_close(got, distance)
        got.backward()
        assert torch.isfinite(student.grad).all()
        assert (student.grad[1, :, 2:] == 0).all()
        assert task.prediction_loss(teacher, teacher, batch) == 0

    def test_predictions(self):
        task = QuestionAnswering([], False, n_best=2, max_answer_length=1)
        logits = torch.tensor([[[9.0, 1, 2, 3], [8, 1, 2, 1]]])
        offsets = torch.tensor([[[-1, -1], [0, 2], [3, 5], [-1, -1]]])
        predicted = task.predictions(logits, {"offsets": offsets, "question": torch.tensor([7])})
        assert {key: value.tolist() for key, value in predicted.items()} == {
            "questions": [7],
            "spans": [[[3, 5], [0, 2]]],
            "scores": [[4, 2]],
            "null_scores": [17],
        }


def test_windows_of_a_question_may_be_anywhere(tmp_path, tokenizer_path):
    """In any order, over two instances that are merged, as over processes: always the same."""
    data = squad(tmp_path, tokenizer_path, 2, batch_size=1)
    data.setup()
    windows = [(torch.randn(1, 2, batch["input_ids"].shape[1]), batch) for batch in data.test_dataloader()]
    results = []
    for seed in (None, 0, 1, 2):
        shuffled = windows if seed is None else random.Random(seed).sample(windows, len(windows))
        parts = [SQuADScore(data.task.examples, True, 0.5, 3) for _ in range(2)]
        for part, some in zip(parts, (shuffled[:-3], shuffled[-3:]), strict=True):
            for logits, batch in some:
                part.update(logits, batch)
        assert set(torch.cat(parts[0].questions).tolist()) & set(torch.cat(parts[1].questions).tolist())
        parts[0].merge_state(parts[1])
        results.append({name: float(value) for name, value in parts[0].compute().items()})
    assert all(result == results[0] for result in results)
    assert 0 < results[0]["f1"] < 1


def fine_tuned(trainer, data, epochs):
    source = HuggingFaceModel("question-answering", config=tiny.bert_config())
    phase = FineTuning(source=source, activation="relu", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    limits = {"limit_train_batches": 1.0, "limit_val_batches": 1.0}
    run = trainer(callbacks=[SaveArtifact()], max_epochs=epochs, **limits)
    run.fit(phase, datamodule=data)
    return run, phase


def test_fine_tuning_to_a_routed_model(trainer, tokenizer_path, tmp_path):
    data = squad(tmp_path, tokenizer_path)
    run, phase = fine_tuned(trainer, data, 8)
    run.test(phase, datamodule=data, verbose=False)
    assert run.callback_metrics["test/f1"] > 0.8
    batch = next(iter(data.test_dataloader()))
    path = tmp_path / "run" / "artifact"
    assert torch.equal(tiny.logits(load_model(path), batch), tiny.logits(phase.model.eval(), batch))
    dense = float(run.callback_metrics["test/f1"])
    for phase in (ExpertClustering(8, num_samples=20), RouterRegression(8)):
        phase.init_from = str(path)
        trainer(callbacks=[SaveArtifact()]).fit(phase, datamodule=data)
    sweep = TauSweep([0.5, 1.0])
    phase = RouterRegression(8, init_from=str(path))
    swept = trainer(callbacks=[sweep])
    swept.test(phase, datamodule=data, verbose=False)
    assert sweep.rows["test"][-1].metric == "f1"
    assert sweep.rows["test"][-1].score == pytest.approx(100 * dense)
    assert len(swept.predict(phase, datamodule=data)) > 0


def test_fine_tuning_on_version_2(trainer, tokenizer_path, tmp_path):
    run, _ = fine_tuned(trainer, squad(tmp_path, tokenizer_path, 2), 2)
    assert {"validation/exact_match", "validation/f1", "validation/best_f1", "validation/loss"} <= set(
        run.callback_metrics
    )


@pytest.mark.parametrize("threshold", [-1000.0, 0.0, 1000.0])
def test_predictions_are_a_row_a_question_and_are_what_is_scored(trainer, tokenizer_path, tmp_path, threshold):
    data = squad(tmp_path, tokenizer_path, 2, null_threshold=threshold)
    save_artifact(tiny.moebert("hash_random", kind="bert-question-answering"), tmp_path / "artifact")
    phase = MoEBERTDistillation(**SIZES, init_from=str(tmp_path / "artifact"))
    file = PredictionFile(str(tmp_path / "a.csv"))
    trainer(callbacks=[file]).predict(phase, datamodule=data, return_predictions=False)
    asked = [question(i, i % 4 == 1) for i in range(50, 57)]
    assert [row["sample"] for row in file.rows] == list(range(1, 8))
    windows = [batch["question"] for batch in data.test_dataloader()]
    assert len(torch.cat(windows)) > 7
    scores = [against_all(row["prediction"], one["answers"]["text"]) for row, one in zip(file.rows, asked, strict=True)]
    run = trainer()
    run.test(phase, datamodule=data, verbose=False)
    assert run.callback_metrics["test/f1"] == pytest.approx(sum(score[1] for score in scores) / 7)
    assert all((row["prediction"] == "") == (row["margin"] < -threshold) for row in file.rows)
    assert all(row["experts_percent"] == pytest.approx(25) for row in file.rows)
    assert {bool(row["prediction"]) for row in file.rows} <= {threshold > 0} or threshold == 0


def test_questions_and_texts_to_predict_for(trainer, tokenizer_path, tmp_path):
    data = squad(tmp_path, tokenizer_path)
    save_artifact(tiny.moebert("hash_random", kind="bert-question-answering"), tmp_path / "artifact")
    texts = ["red green blue red green blue cat red", "dog"]
    inputs = [f"who is it ?\t{text}" for text in texts]
    data.predict_for(inputs)
    file = PredictionFile(str(tmp_path / "a.csv"), inputs)
    phase = MoEBERTDistillation(**SIZES, init_from=str(tmp_path / "artifact"))
    trainer(callbacks=[file]).predict(phase, datamodule=data, return_predictions=False)
    assert [list(row)[:4] for row in file.rows] == [["input", "sample", "question", "prediction"]] * 2
    assert [row["input"] for row in file.rows] == inputs
    assert all(row["prediction"] and row["prediction"] in text for row, text in zip(file.rows, texts, strict=True))
    with pytest.raises(ConfigError, match=r"^text='who': must be 2 texts, parted by a tab$"):
        data.raw_samples(["who"])
