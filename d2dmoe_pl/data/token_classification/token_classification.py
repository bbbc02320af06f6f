"""Texts in words, with a label for each word, from any Hugging Face dataset."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.language_modeling.token_prediction import NOT_PREDICTED
from d2dmoe_pl.data.listed_values import TUPLE_OR_SET, listed, written
from d2dmoe_pl.data.output_names import named_label, plain_name
from d2dmoe_pl.data.sample_names import sample_names
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.data.token_classification.token_tagging import TokenTagging
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import check, some_of


class TokenClassification(TokenizedData):
    """Words and a label for each, as of entities or parts of speech; tokenised once and cached.

    It goes with ``HuggingFaceModel`` of the task ``token-classification``.

    Batches: what the tokenizer gives (``input_ids``, ``attention_mask``, ... ``(B, L)``) and ``labels`` ``(B, L)``: the
    label of a word at its first token, -100 elsewhere.

    Args:
        source: Where the splits are.
        tokenizer: Hub name or folder of a Hugging Face tokenizer; a fast one, which knows where words begin.
        words_column: Column of the words: a list a sample, or a text in which blanks part them.
        labels_column: Column of the labels, as many as words: a list of names or numbers, or a text likewise.
        max_length: Tokens kept of a sample; words behind have no part in training or in metrics.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        group_by_length: Put samples of like length into one batch, which leaves less to pad.

    Raises:
        ConfigError: To load, for a tokenizer that is not there or not fast, samples without words or with more or fewer
            labels, and labels that the training split has not.
    """

    head = "token-classification"
    tokenizer_options: Mapping[str, Any] = {"add_prefix_space": True}  # words come alone

    def __init__(
        self,
        source: DatasetSource,
        tokenizer: str,
        words_column: str = "tokens",
        labels_column: str = "ner_tags",
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        group_by_length: bool = False,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers, group_by_length)
        check(words_column != labels_column, f"labels_column={labels_column!r}: is the words_column; must be another")
        self.source = source
        self.words_column = words_column
        self.labels_column = labels_column

    def load_processor(self) -> None:
        super().load_processor()
        check(
            self.tokenizer.is_fast,
            f"tokenizer={self.tokenizer_name!r}: does not say which word a token is of; must be a fast one, with a "
            "tokenizer.json",
        )

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        splits = self.source.load()
        check_columns(splits, {"words_column": self.words_column, "labels_column": self.labels_column})
        labels = {name: self._labels(split, name) for name, split in splits.items()}
        given = getattr(splits["train"].features[self.labels_column], "feature", None)
        if isinstance(given, ClassLabel):
            names = [plain_name(name) for name in given.names]
        else:
            names = sorted({label for sample in labels["train"] for label in sample})
        index = {name: i for i, name in enumerate(names)}
        tokenised = {}
        for split, dataset in splits.items():
            words = self._words(dataset, split)
            for where, of_words, of_labels in zip(sample_names(dataset, split), words, labels[split], strict=True):
                check(bool(of_words), f"words_column={self.words_column!r}: {where} has no words")
                check(
                    len(of_words) == len(of_labels),
                    f"labels_column={self.labels_column!r}: {where} has {len(of_labels)} labels for {len(of_words)} "
                    "words; must have one for each",
                )
                unseen = [label for label in of_labels if label not in index]
                check(
                    not unseen,
                    f"labels_column={self.labels_column!r}: {where} has the label {unseen[0] if unseen else ''}, "
                    f"unseen in training; allowed are {some_of(names)}",
                )
            if split == "train":
                self.check_known(map(" ".join, words))
            numbers = [[index[label] for label in sample] for sample in labels[split]]
            tokenised[split] = self._in_tokens(Dataset.from_dict({"words": words, "labels": numbers}))
        only = ", ".join(names)
        check(len(names) != 1, f"labels_column={self.labels_column!r}: has one label only, {only}; must have two")
        return tokenised, TokenTagging(names)

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        """Texts in which blanks part words."""
        words = [text.split() for text in inputs]
        return self._in_tokens(Dataset.from_dict({"words": words, "labels": [[0] * len(each) for each in words]}))

    def _words(self, split: Dataset, split_name: str) -> list[list[str]]:
        found = []
        for sample, value in zip(sample_names(split, split_name), split[self.words_column], strict=True):
            where = f"words_column={self.words_column!r}: {sample}"
            # brackets can be words as well: only a list that somebody wrote has quotes at once behind the first
            is_text = isinstance(value, str) and re.match(r"\[(['\"]|\])", value.strip()) is None
            is_text = is_text and not (TUPLE_OR_SET.fullmatch(value.strip()) and isinstance(written(value), tuple))
            words = value.split() if is_text else listed(value, None, where)
            check(None not in words, f"{where} has a word that is missing; must have a text for each")
            found.append([str(word).strip() for word in words])
        return found

    def _labels(self, split: Dataset, split_name: str) -> list[list[str]]:
        column = self.labels_column
        names = getattr(getattr(split.features[column], "feature", None), "names", None)
        found = []
        for sample, value in zip(sample_names(split, split_name), split[column], strict=True):
            where = f"labels_column={column!r}: {sample}"
            named = [named_label(part, names, where) for part in listed(value, None, where)]
            for name in named:
                check(name != "", f"{where} has the label {name!r}, which is none; must be there for each")
                is_parted = not isinstance(value, str) or len(name) == 1 or name[-1] not in ",;"
                check(is_parted, f"{where} has the label {name!r}; must be parted from the next by blanks alone")
            found.append(named)
        return found

    def _in_tokens(self, split: Dataset) -> Dataset:
        self.check_room()
        tokenizer, max_length = self.tokenizer, self.max_length

        def tokenize(batch: Mapping[str, list]) -> Mapping[str, Any]:
            words = told_words(tokenizer, batch["words"])
            found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
            labels = [at_first_tokens(found.word_ids(i), sample) for i, sample in enumerate(batch["labels"])]
            return {**found, "labels": labels}

        return split.map(tokenize, batched=True, remove_columns=["words"], desc="Tokenising")

    def collate(self, samples: Sequence[Mapping[str, Any]], augment: bool) -> dict[str, Tensor]:
        texts = [{key: value for key, value in sample.items() if key != "labels"} for sample in samples]
        labels = [torch.tensor(sample["labels"]) for sample in samples]
        side = self.tokenizer.padding_side
        padded = pad_sequence(labels, batch_first=True, padding_value=NOT_PREDICTED, padding_side=side)  # (B, L)
        return {**super().collate(texts, augment), "labels": padded}


def told_words(tokenizer: Any, texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Texts in words, of which those that a tokenizer makes nothing of, such as blanks of no width, are unknown ones.

    They have labels as all others have, which predictions are told by.

    Args:
        tokenizer: A fast tokenizer.
        texts: The words of each.
    """
    known = sorted({word for text in texts for word in text})
    made = tokenizer([[word] for word in known], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    untold = {word for word, ids in zip(known, made, strict=True) if not ids}
    unknown = tokenizer.unk_token or "?"
    return [[unknown if word in untold else word for word in text] for text in texts]


def at_first_tokens(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """The label of each word at its first token, ``NOT_PREDICTED`` at every other.

    Args:
        word_ids: Of each token, the index of its word; None for tokens that are of none.
        labels: Of each word.

    Example:
        >>> from d2dmoe_pl.data.token_classification.token_classification import at_first_tokens
        >>> at_first_tokens([None, 0, 0, 1, None], [7, 8])
        [-100, 7, -100, 8, -100]
    """
    before = [None, *word_ids[:-1]]
    return [
        NOT_PREDICTED if word is None or word == last else labels[word]
        for word, last in zip(word_ids, before, strict=True)
    ]
