"""What all text data shares: a tokenizer, and batches padded to their longest sample."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import pyarrow.compute
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.task_data import TaskData
from d2dmoe_pl.errors import check

LOOKED_AT = 100  # texts that a tokenizer is tried on
CHARACTERS = 1000  # of each


class TokenizedData(TaskData):
    """Texts, tokenised once and cached, padded to the longest of each batch.

    Batches: what the tokenizer gives (``input_ids``, ``attention_mask``, ... ``(B, L)``) and ``labels`` ``(B, ...)``.

    Attributes:
        tokenizer: The tokenizer, once loaded.
        tokenizer_options: With which it is loaded.
        letters: How many letters and digits of training texts were looked at, once set up, and how many are in tokens.
        cuts_texts: Whether what is behind ``max_length`` tokens of a text is left out, and goes in no other sample.

    Args:
        tokenizer: Hub name or folder of a Hugging Face tokenizer, or a GGUF file in one of these
            (``folder/model.gguf``); None where :meth:`load` makes one. One that has no token to pad with pads with the
            one that ends a text, as decoders' do.
        max_length: Tokens kept of a sample; at most what the model has positions for.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        group_by_length: Put samples of like length into one batch, which leaves less to pad. Training batches are then
            a little less random: their lengths go up and down in the course of an epoch.

    Raises:
        ConfigError: For a ``max_length`` that is not positive; to load, for a tokenizer that is not there or cannot
            pad, and a ``max_length`` that leaves nothing of a text.
    """

    tokenizer: PreTrainedTokenizerBase
    tokenizer_options: Mapping[str, Any] = {}
    raw_inputs = "texts"
    letters: tuple[int, int] = (0, 0)
    cuts_texts: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: str | None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        group_by_length: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check(max_length > 0, f"max_length={max_length}: must be positive")
        self.max_length = max_length
        self.group_by_length = group_by_length
        self.tokenizer_name = tokenizer
        self.tokenizer = None  # type: ignore[assignment] # until load_processor

    def load_processor(self) -> None:
        if self.tokenizer is not None or self.tokenizer_name is None:
            return
        tokenizer = load_pretrained(AutoTokenizer, self.tokenizer_name, "tokenizer", **self.tokenizer_options)
        check(
            len(tokenizer) > len(set(tokenizer.all_special_ids)),
            f"tokenizer={self.tokenizer_name!r}: knows no words; its folder must have the tokenizer's files, such as "
            "tokenizer.json",
        )
        if tokenizer.pad_token is None:
            check(
                tokenizer.eos_token is not None,
                f"tokenizer={self.tokenizer_name!r}: has neither a token to pad with nor one that ends a text; must "
                "have one",
            )
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer

    @property
    def num_token_ids(self) -> int | None:
        return None if self.tokenizer is None else len(self.tokenizer)

    def tokenized(self, split: Dataset, columns: Sequence[str], before: str = "") -> Dataset:
        """The split with one text column, or two as pairs, tokenised; of its own columns ``labels`` alone is kept.

        Args:
            split: Of texts.
            columns: Their names.
            before: What is put before each text of the first.
        """
        self.check_room(len(columns), before)
        tokenizer, (first, *others), max_length = self.tokenizer, columns, self.max_length

        def tokenize(batch: Mapping[str, list]) -> Mapping[str, list]:
            texts = [before + text for text in batch[first]]
            return tokenizer(texts, *(batch[column] for column in others), truncation=True, max_length=max_length)

        unused = [column for column in split.column_names if column != "labels"]
        tokens = split.map(tokenize, batched=True, remove_columns=unused, desc="Tokenising")
        if "labels" not in split.column_names:  # texts as they are given, blank ones among them
            without = next((number for number, ids in enumerate(tokens["input_ids"], 1) if len(ids) == 0), None)
            check(
                without is None,
                f"text {without}: has no tokens by tokenizer={self.tokenizer_name!r}, so that a model would be given "
                "nothing; must have a word",
            )
        return tokens

    def check_room(self, num_texts: int = 1, before: str = "") -> None:
        """Raise ``ConfigError`` unless ``max_length`` leaves a token of each text, the first behind ``before``."""
        taken = len(self.tokenizer(before, *[""] * (num_texts - 1))["input_ids"])
        put = f"{before!r} and the tokenizer's own tokens" if before else "the tokenizer's own tokens"
        check(
            self.max_length >= taken + num_texts,
            f"max_length={self.max_length}: must be at least {taken + num_texts}, since {put} take {taken}",
        )

    def check_known(self, texts: Iterable[str | None]) -> None:
        """See how much of the first of these texts is in their tokens; raise ``ConfigError`` if nothing is.

        A tokenizer for other languages, or one that is read as another class than its own, makes unknown tokens of
        words, or none.
        """
        some = [text[:CHARACTERS] for text in islice(filter(None, texts), LOOKED_AT)]
        encoded = self.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"] if some else []
        decoded = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in encoded]
        there, kept = (sum(map(str.isalnum, "".join(each))) for each in (some, decoded))
        self.letters = (self.letters[0] + there, self.letters[1] + kept)
        check(
            kept > 0 or there == 0,
            f"tokenizer={self.tokenizer_name!r}: of the {there} letters and digits looked at in the training split, "
            "none is in its tokens; must be a tokenizer for such texts, of the class that its folder says",
        )

    def ends_of_texts(self, end: int) -> dict[str, list[int]]:
        """How often each text of every split, once set up, holds the token ``end``."""
        return {name: [ids.count(end) for ids in split["input_ids"]] for name, split in self._splits.items()}

    def longest_samples(self) -> dict[tuple[str, str], int]:
        return self.longest_of("input_ids", "max_length", "text")

    def longest_of(self, column: str, argument: str, title: str) -> dict[tuple[str, str], int]:
        """What :meth:`longest_samples` says of a column of token ids, whose length ``argument`` limits."""
        return {
            (argument, f"{title} of the {name} split"): pyarrow.compute.max(each).as_py()
            for name, each in self._lengths_of(column).items()
        }

    def filled_shares(self) -> dict[tuple[str, str], float]:
        """Share of training samples, once set up, of as many tokens as are kept; by the setting and what they are."""
        return self.filled_share_of("input_ids", "max_length", "texts") if self.cuts_texts else {}

    def filled_share_of(self, column: str, argument: str, title: str) -> dict[tuple[str, str], float]:
        """What :meth:`filled_shares` says of a column of token ids, whose length ``argument`` limits."""
        lengths = self._lengths_of(column).get("train")
        if not lengths:
            return {}
        is_full = pyarrow.compute.greater_equal(lengths, getattr(self, argument))
        return {(argument, title): pyarrow.compute.mean(is_full).as_py()}

    def _lengths_of(self, column: str) -> dict[str, Any]:
        """Arrow arrays of the numbers of tokens, of every split that has the column."""
        return {
            name: pyarrow.compute.list_value_length(split.data[column])
            for name, split in self._splits.items()
            if isinstance(split, Dataset) and column in split.column_names
        }

    def collate(self, samples: Sequence[dict[str, Any]], augment: bool) -> dict[str, Tensor]:
        return dict(DataCollatorWithPadding(self.tokenizer)(list(samples)))

    def rearranged(self, dataset: Dataset) -> Dataset:
        if not self.group_by_length:
            return dataset
        lengths = _lengths(dataset)
        return dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__))

    def training_order(self, dataset: Dataset, generator: torch.Generator) -> Sequence[int]:
        if not self.group_by_length:
            return super().training_order(dataset, generator)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        together = self.batch_size * (torch.distributed.get_world_size() if distributed else 1)
        grouped = resolve_name("transformers.trainer_pt_utils:get_length_grouped_indices")  # changes warnings
        order: list[int] = grouped(_lengths(dataset), together, generator=generator)
        return order

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer, so that it cuts texts by itself as they were cut here."""
        saved = copy.deepcopy(self.tokenizer)
        saved.model_max_length = self.max_length
        saved.save_pretrained(folder)


def _lengths(dataset: Dataset) -> list[int]:
    """Tokens of each sample."""
    return [len(ids) for ids in dataset["input_ids"]]
