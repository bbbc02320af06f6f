"""Texts, or pairs of texts, with labels, from any Hugging Face dataset."""

from collections.abc import Mapping, Sequence

from datasets import Dataset

from d2dmoe_pl.data.class_labels import encode_labels
from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.sample_names import sample_names
from d2dmoe_pl.data.task import Classification, Task
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import check


class TextClassification(TokenizedData):
    """One or two texts a sample, tokenised once and cached, padded to the longest of each batch.

    Batches: what the tokenizer gives (``input_ids``, ``attention_mask``, ... ``(B, L)``) and ``labels`` ``(B,)``.

    Args:
        source: Where the splits are.
        tokenizer: Hub name or folder of a Hugging Face tokenizer.
        text_columns: One column, or two for sentence pairs.
        label_column: Column of the labels, strings or whole numbers; of ``TextRegression``, any numbers.
        max_length: Tokens kept of a sample; at most what the model has positions for.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        group_by_length: Put samples of like length into one batch, which leaves less to pad.

    Raises:
        ConfigError: For other than one or two text columns, or a ``max_length`` that is not positive; to load, for a
            tokenizer that is not there, and samples without a text or a label.
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
        group_by_length: bool = False,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers, group_by_length)
        check(len(text_columns) in (1, 2), f"text_columns={text_columns}: must be one column or two")
        self.source = source
        self.text_columns = list(text_columns)
        self.label_column = label_column

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        splits = self.source.load()
        columns = {f"text_columns[{i}]": column for i, column in enumerate(self.text_columns)}
        check_columns(splits, {**columns, "label_column": self.label_column})
        for argument, column in columns.items():
            check(column != self.label_column, f"{argument}={column!r}: is the label_column; must be another")
            for name, split in splits.items():
                check_texts(split, column, name)
            self.check_known(splits["train"][column])
        encoded, task = self.encoded(splits)
        return {name: self.tokenized(split, self.text_columns) for name, split in encoded.items()}, task

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        """Texts; of pairs, the two parted by a tab."""
        return self.tokenized(parted_texts(inputs, self.text_columns), self.text_columns)

    def encoded(self, splits: Mapping[str, Dataset]) -> tuple[Mapping[str, Dataset], Task]:
        """The splits with what is to be learnt in the column ``labels``, and the task."""
        encoded, names = encode_labels(splits, self.label_column)
        return encoded, Classification(names)


def parted_texts(inputs: Sequence[str], columns: Sequence[str]) -> Dataset:
    """Texts in columns, from one text for each row, in which tabs part them where there are several columns.

    Raises:
        ConfigError: If there are more texts in a row, or fewer.
    """
    parts = [text.split("\t") for text in inputs]
    for text, part in zip(inputs, parts, strict=True):
        check(len(part) == len(columns), f"text={text!r}: must be {len(columns)} texts, parted by a tab")
    return Dataset.from_dict(dict(zip(columns, map(list, zip(*parts, strict=True)), strict=True)))


def check_texts(
    split: Dataset, column: str, split_name: str, argument: str = "text_columns", may_be_blank: bool = False
) -> None:
    """Raise ``ConfigError`` unless there is a text in each row of ``column``, not only blanks unless it may be so."""
    for sample, text in zip(sample_names(split, split_name), split[column], strict=True):
        where = f"{argument}={column!r}: {sample} has"
        check(text is not None and (may_be_blank or text != ""), f"{where} no text")
        check(isinstance(text, str), f"{where} {text!r}; must be a text")
        check(may_be_blank or text.strip() != "", f"{where} only blanks; must have a text")
