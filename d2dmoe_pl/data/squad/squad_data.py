"""SQuAD v1.1 (arXiv 1606.05250) and v2.0 (arXiv 1806.03822)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset

from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.squad.given_answers import with_answers
from d2dmoe_pl.data.squad.question_answering import QuestionAnswering
from d2dmoe_pl.data.squad.question_windows import OUTSIDE, question_windows
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.data.text_classification import check_texts, parted_texts
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import check

HUB = {1: "rajpurkar/squad", 2: "rajpurkar/squad_v2"}
COLUMNS = ("context", "question", "answers")
KNOWN = (*COLUMNS, "is_impossible")


class SQuAD(TokenizedData):
    """Questions with texts that answer them (v1.1) or may not (v2.0); long texts in windows that overlap.

    The hub has no test split, so its validation split serves as test too.

    Batches: what the tokenizer gives (``input_ids``, ``attention_mask``, ... ``(B, L)``), one row a window; ``labels``
    ``(B, 2)``, first and last token of the first reference; ``offsets`` ``(B, L, 2)``, each token's characters in the
    context, -1 outside; ``question`` ``(B,)``, the index of the question, whose windows can be in any batch.

    Args:
        tokenizer: Hub name or folder of a fast Hugging Face tokenizer that puts ``[CLS]`` first.
        version: 1 for v1.1; 2 for v2.0, with questions that have no answer.
        source: Where the splits are, with the hub's columns (``context``, ``question`` and ``answers`` with ``text``
            and ``answer_start``), or in the files of SQuAD's authors; the hub's if not given.
        max_length: Tokens of a window, question included; at most what the model has positions for.
        doc_stride: Tokens of the context that neighbouring windows share.
        max_question_length: Tokens kept of a question.
        max_answer_length: Longest answer that is predicted, tokens.
        n_best: Spans of each window among the predictions.
        null_threshold: No answer is predicted where it beats the best span by more than this (v2.0).
        batch_size: Windows a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: For numbers that are not positive; to load, for a tokenizer that is not there or not of that kind,
            or lengths that leave a window no room to move on.
    """

    head = "question-answering"
    cuts_texts = False  # there is a window behind it

    def __init__(
        self,
        tokenizer: str,
        version: Literal[1, 2] = 1,
        source: DatasetSource | None = None,
        max_length: int = 384,
        doc_stride: int = 128,
        max_question_length: int = 64,
        max_answer_length: int = 30,
        n_best: int = 20,
        null_threshold: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers)
        check(version in HUB, f"version={version!r}: allowed are 1 (v1.1) and 2 (v2.0)")
        positive = {
            "max_question_length": max_question_length,
            "max_answer_length": max_answer_length,
            "n_best": n_best,
        }
        for key, value in positive.items():
            check(value > 0, f"{key}={value}: must be positive")
        self.version = version
        self.source = DatasetSource(HUB[version], test="validation") if source is None else source
        self.doc_stride = doc_stride
        self.max_question_length = max_question_length
        self.max_answer_length = max_answer_length
        self.n_best = n_best
        self.null_threshold = null_threshold

    def load_processor(self) -> None:
        super().load_processor()
        first_token = self.tokenizer("a")["input_ids"][:1]
        check(
            self.tokenizer.is_fast
            and first_token == [self.tokenizer.cls_token_id]
            and self.tokenizer.padding_side == "right",
            f"tokenizer={self.tokenizer_name!r}: must be fast, put a [CLS] token first and pad on the right, as BERT's "
            "does",
        )
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        room = self.max_length - self.max_question_length - special
        check(
            room > 0,
            f"max_length={self.max_length}: must be above {self.max_question_length + special}, the tokens of "
            f"max_question_length={self.max_question_length} and {special} special ones",
        )
        check(
            0 <= self.doc_stride < room,
            f"doc_stride={self.doc_stride}: must lie in [0, {room}), below the tokens of the context that max_length="
            f"{self.max_length} and max_question_length={self.max_question_length} leave in a window",
        )

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        splits = self.source.load(together="context")  # questions about a text that was trained on are easier
        check_columns(splits, {f"SQuAD column {i}": column for i, column in enumerate(COLUMNS)})
        own = {name: [each for each in KNOWN if each in split.column_names] for name, split in splits.items()}
        splits = {name: split.select_columns(own[name]) for name, split in splits.items()}
        for name, split in splits.items():
            for column in ("context", "question"):
                check_texts(split, column, name, "column", may_be_blank=True)
        self.check_known(splits["train"]["context"])
        splits = {name: with_answers(split, name).select_columns(list(COLUMNS)) for name, split in splits.items()}
        for name, split in splits.items():
            check(
                self.version == 2 or all(answers["text"] for answers in split["answers"]),
                f"version={self.version}: the {name} split has questions without answers; allowed with version=2 only",
            )
        windows, seen = {}, 0
        for name, split in splits.items():
            windows[name] = self._windows(split, seen)
            seen += len(split)
        examples: Any = ConcatDataset(splits.values())
        answerless = self.version == 2
        task = QuestionAnswering(examples, answerless, self.n_best, self.max_answer_length, self.null_threshold)
        return windows, task

    def collate(self, samples: Sequence[dict[str, Any]], augment: bool) -> dict[str, Tensor]:
        offsets = [torch.tensor(sample["offsets"]).view(-1, 2) for sample in samples]  # (length, 2) each
        rest = [{key: value for key, value in sample.items() if key != "offsets"} for sample in samples]
        batch = super().collate(rest, augment)
        length = batch["input_ids"].shape[1]
        padded = [F.pad(one, (0, 0, 0, length - len(one)), value=OUTSIDE[0]) for one in offsets]
        return {**batch, "offsets": torch.stack(padded)}

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        """Questions, each with the text that may answer it, parted by a tab."""
        task: Any = self.task
        given = parted_texts(inputs, ("question", "context"))
        asked = given.add_column("answers", [{"text": [], "answer_start": []}] * len(given))
        first = len(task.examples)
        task.examples = ConcatDataset([*task.examples.datasets, asked])
        return self._windows(asked, first)

    def _windows(self, split: Dataset, first_question: int) -> Dataset:
        """The split's windows; ``first_question`` is the index of its first question among those of all splits."""
        tokenizer = self.tokenizer
        lengths = (self.max_length, self.doc_stride, self.max_question_length)

        def make(rows: Mapping[str, list], indices: list[int]) -> dict[str, list]:
            made = question_windows(tokenizer, rows["question"], rows["context"], rows["answers"], *lengths)
            questions = [first_question + indices[row] for row in made.pop("row")]
            # one flat list a window: Arrow takes thirty times as long to read nested ones
            offsets = [[character for span in window for character in span] for window in made.pop("offsets")]
            return {**made, "question": questions, "offsets": offsets}

        return split.map(
            make, batched=True, with_indices=True, remove_columns=split.column_names, desc="Making windows"
        )
