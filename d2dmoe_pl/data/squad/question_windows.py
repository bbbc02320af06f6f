"""Contexts that are longer than a model's input: windows over them, and where in a window the answer is."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

NO_ANSWER = 0  # the token, [CLS], that stands for no answer in a window
OUTSIDE = (-1, -1)  # characters of a token that is not of the context


def question_windows(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[Mapping[str, Sequence]],
    max_length: int,
    doc_stride: int,
    max_question_length: int,
) -> dict[str, list[Any]]:
    """Each question with window after window of its context.

    Args:
        tokenizer: A fast tokenizer that puts ``[CLS]`` first.
        questions: Texts.
        contexts: Texts, one a question.
        answers: One a question: ``text`` and ``answer_start``, lists, empty if the context does not answer. The first
            answer is the one to learn.
        max_length: Tokens of a window, question included.
        doc_stride: Tokens that neighbouring windows share.
        max_question_length: Tokens kept of a question.

    Returns:
        One entry a window: what the tokenizer gives; ``offsets``, each token's characters (first, past the last) in the
        context, ``OUTSIDE`` if it is not of the context; ``labels``, the answer's first and last token, ``NO_ANSWER``
        twice if the window does not hold it whole; ``row``, the index of the question.
    """
    encoded = tokenizer(
        cut_questions(tokenizer, questions, max_question_length),
        list(contexts),
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows, mappings = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    offsets, labels = [], []
    for window, (row, mapping) in enumerate(zip(rows, mappings, strict=True)):
        parts = encoded.sequence_ids(window)
        offsets.append([span if part == 1 else OUTSIDE for part, span in zip(parts, mapping, strict=True)])
        labels.append((NO_ANSWER, NO_ANSWER))
        if answers[row]["text"]:
            start = answers[row]["answer_start"][0]
            labels[-1] = answer_tokens(offsets[-1], start, start + len(answers[row]["text"][0])) or labels[-1]
    return {**encoded, "offsets": offsets, "labels": labels, "row": rows}


def cut_questions(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], max_tokens: int) -> list[str]:
    """Questions without leading blanks, which can be longer than a model takes, and without what is past a length.

    Args:
        tokenizer: A fast tokenizer.
        questions: Texts.
        max_tokens: Tokens kept.
    """
    stripped = [question.lstrip() for question in questions]
    encoded = tokenizer(
        stripped, add_special_tokens=False, truncation=True, max_length=max_tokens, return_offsets_mapping=True
    )
    return [
        question[: spans[-1][1]] if spans else question
        for question, spans in zip(stripped, encoded["offset_mapping"], strict=True)
    ]


def answer_tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """First and last token of an answer.

    Args:
        offsets: Each token's characters in the context, ``OUTSIDE`` if it is not of the context.
        start: The answer's first character.
        end: The character past its last.

    Returns:
        Their indices; None if the window does not hold the whole answer.
    """
    context = [token for token, span in enumerate(offsets) if tuple(span) != OUTSIDE]
    if not context or offsets[context[0]][0] > start or offsets[context[-1]][1] < end:
        return None
    touched = [token for token in context if offsets[token][0] < end and offsets[token][1] > start]
    return (touched[0], touched[-1]) if touched else None
