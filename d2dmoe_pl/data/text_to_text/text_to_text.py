"""Texts with a text each to answer with, from any Hugging Face dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.language_modeling.token_prediction import NOT_PREDICTED
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.data.text_classification import check_texts
from d2dmoe_pl.data.text_to_text.text_answers import TextAnswers
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import check


class TextToText(TokenizedData):
    """A source text and a target text a sample, tokenised once and cached, padded to the longest of each batch.

    It goes with ``HuggingFaceModel`` of the task ``text-to-text``. Classes can be learnt so as well: as the words that
    they are called, with ``exact_match`` as accuracy.

    Batches: ``input_ids``, ``attention_mask`` ``(B, L)``; of the targets, ``labels`` ``(B, T)``, -100 for padding,
    ``decoder_input_ids`` ``(B, T)``, one token later, and ``decoder_attention_mask`` ``(B, T)``.

    Args:
        source: Where the splits are.
        tokenizer: Hub name or folder of a Hugging Face tokenizer.
        source_column: Column of the texts to answer.
        target_column: Column of the answers.
        prefix: What stands before each text, as T5 tells tasks apart, e.g. ``"summarize: "``.
        metrics: Of ``exact_match``, ``chrf`` and ``bleu``, the main one first. The last two take longer: the model
            writes a text for each sample, as often as it is evaluated.
        max_length: Tokens kept of a text.
        max_target_length: Tokens kept of an answer, and written at most.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        group_by_length: Put samples of like length into one batch, which leaves less to pad.

    Raises:
        ConfigError: For a length that is not positive, or an unknown metric; to load, for a tokenizer that is not there
            or has no token that ends a text, samples without a text or an answer, and a ``max_length`` that leaves
            nothing of a text behind ``prefix``.
    """

    head = "text-to-text"

    def __init__(
        self,
        source: DatasetSource,
        tokenizer: str,
        source_column: str = "text",
        target_column: str = "target",
        prefix: str = "",
        metrics: list[str] = ["exact_match"],  # noqa: B006 (read only; jsonargparse shows it)
        max_length: int = 128,
        max_target_length: int = 32,
        batch_size: int = 32,
        num_workers: int = 0,
        group_by_length: bool = False,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers, group_by_length)
        check(max_target_length > 1, f"max_target_length={max_target_length}: must be at least 2")
        check(source_column != target_column, f"target_column={target_column!r}: is the source_column; must be another")
        TextAnswers([], str, metrics)  # raises for unknown ones before anything is read
        self.source = source
        self.source_column = source_column
        self.target_column = target_column
        self.prefix = prefix
        self.metrics = list(metrics)
        self.max_target_length = max_target_length

    def load_processor(self) -> None:
        super().load_processor()
        end = self.tokenizer.eos_token_id
        self.answer_end = self.tokenizer.sep_token_id if end is None else end
        check(
            self.answer_end is not None,
            f"tokenizer={self.tokenizer_name!r}: has no token that ends a text, by which answers end; must have one",
        )

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        splits = self.source.load()
        columns = {"source_column": self.source_column, "target_column": self.target_column}
        check_columns(splits, columns)
        for argument, column in columns.items():
            for name, split in splits.items():
                check_texts(split, column, name, argument)
            self.check_known(splits["train"][column])
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        task = TextAnswers(tokens, self.decode, self.metrics, self.max_target_length)
        return {name: self._in_tokens(split) for name, split in splits.items()}, task

    def longest_samples(self) -> dict[tuple[str, str], int]:
        return super().longest_samples() | self.longest_of("labels", "max_target_length", "answer")

    def filled_shares(self) -> dict[tuple[str, str], float]:
        return super().filled_shares() | self.filled_share_of("labels", "max_target_length", "answers")

    def decode(self, ids: list[int]) -> str:
        """The text that token ids are."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        return self._in_tokens(Dataset.from_dict({self.source_column: list(inputs)}))

    def _in_tokens(self, split: Dataset) -> Dataset:
        self.check_room(before=self.prefix)
        tokenizer, prefix, end = self.tokenizer, self.prefix, self.answer_end
        source, target = self.source_column, self.target_column
        most, most_of_target = self.max_length, self.max_target_length

        def tokenize(batch: Mapping[str, list]) -> Mapping[str, Any]:
            found = dict(tokenizer([prefix + text for text in batch[source]], truncation=True, max_length=most))
            if target in batch:
                answers = tokenizer(text_target=batch[target], truncation=True, max_length=most_of_target)["input_ids"]
                found["labels"] = [ids if ids[-1] == end else [*ids[: most_of_target - 1], end] for ids in answers]
            return found

        return split.map(tokenize, batched=True, remove_columns=split.column_names, desc="Tokenising")

    def collate(self, samples: Sequence[Mapping[str, Any]], augment: bool) -> dict[str, Tensor]:
        texts = [{key: value for key, value in sample.items() if key != "labels"} for sample in samples]
        batch = super().collate(texts, augment)
        if "labels" not in samples[0]:
            return batch
        answers = [torch.tensor(sample["labels"]) for sample in samples]
        labels = pad_sequence(answers, batch_first=True, padding_value=NOT_PREDICTED)  # (B, T)
        assert self.answer_start is not None  # since there is a model
        start = torch.full_like(labels[:, :1], self.answer_start)
        before = labels[:, :-1].masked_fill(labels[:, :-1] == NOT_PREDICTED, self.tokenizer.pad_token_id or 0)
        return {
            **batch,
            "labels": labels,
            "decoder_input_ids": torch.cat([start, before], dim=1),
            "decoder_attention_mask": (labels != NOT_PREDICTED).long(),
        }
