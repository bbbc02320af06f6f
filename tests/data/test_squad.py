"""SQuAD from local files, from windows to exact match and F1, against naive twins and by hand."""

import json
import random

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from d2dmoe_pl.adapters import HuggingFaceModel
from d2dmoe_pl.artifact import load_model
from d2dmoe_pl.callbacks import SaveArtifact, TauSweep
from d2dmoe_pl.data import DatasetSource, QuestionAnswering, SQuAD
from d2dmoe_pl.data.squad.answer_spans import best_spans, merge_windows
from d2dmoe_pl.data.squad.question_windows import OUTSIDE, answer_tokens, cut_questions, question_windows
from d2dmoe_pl.data.squad.squad_score import SQuADScore, against_all, best_threshold, exact_match, f1
from d2dmoe_pl.data.task import symmetric_kl
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.phases import ExpertClustering, FineTuning, RouterRegression

WORDS = ["who", "what", "is", "red", "green", "blue", "cat", "dog", "eel", "fox", "gnu", "?"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CONTEXT = "The  red cat, (so) the dog"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tok"), WORDS, SPECIAL)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return tiny.transformers.AutoTokenizer.from_pretrained(tokenizer_path)


def no_answer():
    return {"text": [], "answer_start": []}


class TestWindows:
    def test_by_hand(self, tokenizer):
        answers = {"text": ["cat"], "answer_start": [9]}
        made = question_windows(tokenizer, ["  who ?"], [CONTEXT], [answers], 8, 1, 2)
        # [CLS] who ? [SEP] and [SEP] leave 3 tokens; one is shared
        assert made["row"] == [0] * 4
        words = [[CONTEXT[a:b] for a, b in spans if (a, b) != OUTSIDE] for spans in made["offsets"]]
        assert words == [["The", "red", "cat"], ["cat", ",", "("], ["(", "so", ")"], [")", "the", "dog"]]
        assert made["labels"] == [(6, 6), (4, 4), (0, 0), (0, 0)]
        assert made["offsets"][0][:4] == [OUTSIDE] * 4
        assert made["offsets"][0][7] == OUTSIDE
        assert [ids[:4] for ids in made["input_ids"]] == [[2, 4, 15, 3]] * 4

    def test_no_answer(self, tokenizer):
        made = question_windows(tokenizer, ["who", "who"], [CONTEXT, "red"], [no_answer(), no_answer()], 9, 1, 2)
        assert set(made["labels"]) == {(0, 0)}
        assert made["row"] == sorted(made["row"])
        assert set(made["row"]) == {0, 1}

    def test_answers_that_begin_inside_tokens_or_at_blanks(self):
        offsets = [OUTSIDE, (0, 3), (5, 8), (9, 12), OUTSIDE]
        assert answer_tokens(offsets, 6, 10) == (2, 3)
        assert answer_tokens(offsets, 4, 8) == (2, 2)
        assert answer_tokens(offsets, 0, 12) == (1, 3)
        assert answer_tokens(offsets, 9, 13) is None
        assert answer_tokens(offsets, 4, 4) is None
        assert answer_tokens([OUTSIDE] * 3, 0, 1) is None

    def test_long_questions_are_cut(self, tokenizer):
        assert cut_questions(tokenizer, ["  who is red ?", "", "cat"], 2) == ["who is", "", "cat"]

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_windows_cover_the_context_and_hold_the_answer(self, tokenizer, data):
        words = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30))
        blanks = data.draw(st.lists(st.integers(1, 3), min_size=len(words), max_size=len(words)))
        context = "".join(" " * count + word for count, word in zip(blanks, words, strict=True))
        starts = [sum(blanks[: i + 1]) + sum(map(len, words[:i])) for i in range(len(words))]
        first = data.draw(st.integers(0, len(words) - 1))
        last = data.draw(st.integers(first, len(words) - 1))
        start, end = starts[first], starts[last] + len(words[last])
        room, stride = data.draw(st.integers(2, 12)), data.draw(st.integers(0, 1))
        answers = {"text": [context[start:end]], "answer_start": [start]}
        made = question_windows(tokenizer, ["who"], [context], [answers], room + 4, stride, 1)
        seen = []
        for offsets, (a, b) in zip(made["offsets"], made["labels"], strict=True):
            spans = [span for span in offsets if span != OUTSIDE]
            assert len(spans) <= room
            holds = spans[0][0] <= start and end <= spans[-1][1]
            assert holds == ((a, b) != (0, 0))
            if holds:
                assert (offsets[a][0], offsets[b][1]) == (start, end)
            assert seen[len(seen) - stride :] == spans[:stride] if seen and stride else True
            seen += spans[stride if seen else 0 :]
        assert [context[a:b] for a, b in seen] == words


def naive_spans(start, end, offsets, longest):
    found = []
    for i in range(len(start)):
        for j in range(i, min(i + longest, len(start))):
            if offsets[i][0] >= 0 and offsets[j][0] >= 0:
                found.append((start[i] + end[j], (offsets[i][0], offsets[j][1])))
    return sorted(found, reverse=True)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 14), longest=st.integers(1, 20), n_best=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_best_spans_are_the_best_of_all(length, longest, n_best, seed):
    torch.manual_seed(seed)
    logits = torch.randn(3, 2, length)
    context = torch.randint(1, length + 1, (3,))  # tokens before it are of the question; after, padding
    offsets = torch.stack([torch.arange(length) * 4, torch.arange(length) * 4 + 3], dim=-1).repeat(3, 1, 1)
    for row, begin in enumerate(context):
        offsets[row, :begin] = -1
        offsets[row, length - 1 :] = -1
    scores, spans = best_spans(logits, offsets, n_best, longest)
    for row in range(3):
        expected = naive_spans(*logits[row].tolist(), offsets[row].tolist(), longest)[:n_best]
        assert scores[row, : len(expected)].tolist() == pytest.approx([score for score, _ in expected], rel=1e-5)
        assert [tuple(span) for span in spans[row, : len(expected)].tolist()] == [span for _, span in expected]
        assert scores[row, len(expected) :].isneginf().all()
        assert (spans[row, len(expected) :] == -1).all()


def test_merged_windows_by_hand():
    merged = merge_windows([5, 3, 5, 5], [1.0, 2.0, 4.0, 4.0], [(0, 1), (2, 3), (4, 5), (6, 7)], [0.5, 9.0, 2.0, 0.1])
    assert list(merged) == [3, 5]
    assert (merged[5].score, merged[5].span, merged[5].null_score) == (4.0, (6, 7), 0.1)
    assert merged[3].null_margin == 7
    assert merged[3].text("abcdef") == "c"
    assert merge_windows([0], [float("-inf")], [OUTSIDE], [0.0])[0].text("abc") == ""


class TestScores:
    def test_exact_match_forgives_case_articles_punctuation_and_blanks(self):
        assert exact_match("The  Eiffel-Tower!", "an eiffeltower") == 1
        assert exact_match("theatre", "atre") == 0

    def test_f1(self):
        assert f1("the red cat", "Red cat sat.") == pytest.approx(2 * 2 / (2 + 3))
        assert f1("cat cat dog", "cat") == pytest.approx(2 * 1 / (3 + 1))
        assert (f1("", ""), f1("the", ""), f1("cat", ""), f1("cat", "dog")) == (1, 1, 0, 0)

    def test_the_best_reference_counts_for_each(self):
        assert against_all("red cat", ["the red cat", "red"]) == (1, 1)
        assert against_all("red cat", ["red dog", "red cat sat down"]) == (0, pytest.approx(2 / 3))
        assert against_all("", []) == (1, 1)
        assert against_all("cat", []) == (0, 0)

    @settings(max_examples=60, deadline=None)
    @given(count=st.integers(1, 12), seed=st.integers(0, 10**6))
    def test_best_threshold(self, count, seed):
        torch.manual_seed(seed)
        answered, unanswered = torch.rand(count), torch.randint(0, 2, (count,)).float()
        margins = torch.randint(-4, 4, (count,)).float()  # some are equal

        def mean(threshold):
            return float(torch.where(margins > threshold, unanswered, answered).mean())

        best, threshold = best_threshold(answered, unanswered, margins)
        assert best == pytest.approx(max(mean(at) for at in range(-6, 6)), abs=1e-5)
        assert mean(threshold) == pytest.approx(best, abs=1e-5)


def question(i, answerless=False):
    """A question whose answer is the one animal among colours."""
    colours, animals = ["red", "green", "blue"], ["cat", "dog", "eel", "fox", "gnu"]
    words = [colours[(i + j) % 3] for j in range(5)]
    words.insert(i % 6, animals[i % 5])
    context, answer = " ".join(words), animals[i % 5]
    start = context.index(answer)
    answers = no_answer() if answerless else {"text": [answer, f"the {answer}"], "answer_start": [start, start]}
    return {"id": str(i), "title": "t", "context": context, "question": "who is it ?", "answers": answers}


def write(folder, answerless=lambda i: False):
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": range(30), "validation": range(40, 49), "test": range(50, 57)}
    files = {}
    for name, numbers in parts.items():
        rows = [question(i, answerless(i)) for i in numbers]
        files[name] = str(folder / f"{name}.jsonl")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetSource(**files)


LENGTHS = {"max_length": 11, "doc_stride": 2, "max_question_length": 4, "max_answer_length": 3}


def squad(tmp_path, tokenizer_path, version=1, **kwargs):
    answerless = (lambda i: i % 4 == 1) if version == 2 else (lambda i: False)
    source = write(tmp_path / str(version), answerless)
    return SQuAD(tokenizer_path, version, source, **{"batch_size": 5, **LENGTHS, **kwargs})


def ideal_logits(batch):
    """What a model that knows the labels would say, with some noise."""
    length = batch["input_ids"].shape[1]
    return 9 * F.one_hot(batch["labels"], length).float() + torch.rand(len(batch["labels"]), 2, length)


class TestData:
    def test_batches(self, tmp_path, tokenizer_path):
        data = squad(tmp_path, tokenizer_path)
        assert data.head == "question-answering"
        data.setup()
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
