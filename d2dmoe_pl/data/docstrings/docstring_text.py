"""Docstring sentences as text to train a language model on. Real English that needs no download."""

from collections.abc import Mapping
from typing import Any, Literal

from datasets import Dataset

from d2dmoe_pl.data.dataset_source import DatasetSource
from d2dmoe_pl.data.docstrings.docstring_sentences import sentence_splits
from d2dmoe_pl.data.docstrings.docstrings import PACKAGES
from d2dmoe_pl.data.docstrings.trained_tokenizer import train_tokenizer
from d2dmoe_pl.data.language_modeling.language_modeling import LanguageModeling
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.errors import check


class DocstringText(LanguageModeling):
    """The sentences of docstrings in installed packages, each a document, packed; own tokenizer.

    Always the same as long as the same versions are installed. A file's sentences are all in one split, in their order.
    Collected and packed once and cached; the tokenizer is trained on the spot.

    Batches: as those of ``LanguageModeling``.

    Args:
        packages: Importable names; ``python`` is the standard library.
        num_sentences: Sentences a package, an eighth of them to test and a tenth to validate on.
        vocabulary_size: Tokens that the tokenizer knows; at most what the model has embeddings for.
        objective: ``causal`` or ``masked``.
        length: Tokens of a block, ``L``; at most what the model has positions for.
        mask_share: Share of a block's tokens to predict, if masked.
        batch_size: Blocks a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: For no packages, one that is not installed or has too few sentences, or numbers out of range.
    """

    def __init__(
        self,
        packages: list[str] = PACKAGES,
        num_sentences: int = 4000,
        vocabulary_size: int = 6000,
        objective: Literal["causal", "masked"] = "causal",
        length: int = 128,
        mask_share: float = 0.15,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        made_later: Any = None
        super().__init__(DatasetSource(), made_later, objective, length, "text", mask_share, batch_size, num_workers)
        check(len(set(packages)) == len(packages) >= 1, f"packages={packages}: must be one or more, each once")
        check(num_sentences >= 16, f"num_sentences={num_sentences}: must be at least 16")
        check(vocabulary_size >= 256, f"vocabulary_size={vocabulary_size}: must be at least 256")
        self.packages = list(packages)
        self.num_sentences = num_sentences
        self.vocabulary_size = vocabulary_size

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        splits = sentence_splits(self.packages, self.num_sentences)
        self.tokenizer = train_tokenizer(splits["train"]["text"], self.vocabulary_size)
        return {name: self.packed(split, name) for name, split in splits.items()}, self.token_prediction()
