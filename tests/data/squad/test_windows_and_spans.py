"""SQuAD's windows, spans and scores, against naive twins and by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squad_files import CONTEXT, WORDS, no_answer

from d2dmoe_pl.data.squad.answer_spans import best_spans, merge_windows
from d2dmoe_pl.data.squad.question_windows import OUTSIDE, answer_tokens, cut_questions, question_windows
from d2dmoe_pl.data.squad.squad_score import SQuADScore, against_all, best_threshold, exact_match, f1


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

    def test_an_answer_that_is_normalised_to_nothing_is_no_missing_answer(self):
        examples = [{"context": "the cat", "answers": {"text": ["the"]}}, {"context": "a dog", "answers": {"text": []}}]
        score = SQuADScore(examples, answerless=True, null_threshold=0.0, max_answer_length=3)
        offsets = torch.tensor([[OUTSIDE, (0, 3)], [OUTSIDE, (0, 1)]])
        logits = torch.tensor([[[9.0, 0.0]] * 2] * 2)  # no answer is found to either
        score.update(logits, {"offsets": offsets, "question": torch.arange(2)})
        found = score.compute()
        assert (found["has_answer_exact_match"], found["has_answer_f1"], found["no_answer_accuracy"]) == (0, 0, 1)

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
