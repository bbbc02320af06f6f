"""Texts, or pairs of texts, with labels, from any Hugging Face dataset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding

from d2dmoe_pl.data.base import TaskData
from d2dmoe_pl.data.source import DatasetSource, check_columns, encode_labels
from d2dmoe_pl.data.task import Classification, Task
from d2dmoe_pl.errors import ConfigError, check


class TextClassification(TaskData):
    """One or two texts a sample, tokenised once and cached, padded to the longest of each batch.

    Batches: what the tokenizer gives (``input_ids``, ``attention_mask``, ... ``(B, L)``) and ``labels`` ``(B,)``.

    Args:
        source: Where the splits are.
        tokenizer: Hub name or folder of a Hugging Face tokenizer.
        text_columns: One column, or two for sentence pairs.
        label_column: Column of the labels, strings or integers.
        max_length: Tokens kept of a sample; at most what the model has positions for.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: For other than one or two text columns, a ``max_length`` that is not positive, or a tokenizer that
            is not there.
    """

    def __init__(
        self,
        source: DatasetSource,
        tokenizer: str,
        text_columns: list[str] = ["text"],  # noqa: B006 (read only; jsonargparse shows it)
        label_column: str = "label",
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check(len(text_columns) in (1, 2), f"text_columns={text_columns}: must be one column or two")
        check(max_length > 0, f"max_length={max_length}: must be positive")
        self.source = source
        self.text_columns = list(text_columns)
        self.label_column = label_column
        self.max_length = max_length
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"tokenizer={tokenizer!r}: neither a folder nor a reachable hub name ({reason})"
            ) from error
        self._pad = DataCollatorWithPadding(self.tokenizer)

    def load(self) -> tuple[Mapping[str, Any], Task]:
        splits = self.source.load()
        columns = {f"text_columns[{i}]": column for i, column in enumerate(self.text_columns)}
        check_columns(splits, {**columns, "label_column": self.label_column})
        splits, names = encode_labels(splits, self.label_column)
        return {name: self._tokenized(split) for name, split in splits.items()}, Classification(names)

    def collate(self, samples: Sequence[dict[str, Any]], augment: bool) -> dict[str, Tensor]:
        return dict(self._pad(list(samples)))

    def save_processor(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def _tokenized(self, split: Any) -> Any:
        tokenizer, columns, max_length = self.tokenizer, self.text_columns, self.max_length

        def tokenize(batch: Mapping[str, list]) -> Mapping[str, list]:
            return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)

        unused = [column for column in split.column_names if column != "labels"]
        return split.map(tokenize, batched=True, remove_columns=unused, desc="Tokenising")
