"""Which package does this docstring sentence come from? Real English text that needs no download."""

from collections.abc import Mapping

from datasets import Dataset

from d2dmoe_pl.data.docstrings.docstring_sentences import sentence_splits
from d2dmoe_pl.data.docstrings.trained_tokenizer import train_tokenizer
from d2dmoe_pl.data.task import Classification, Task
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import check

PACKAGES = ["python", "torch", "transformers", "sklearn", "matplotlib", "pandas"]


class Docstrings(TokenizedData):
    """Sentences of docstrings, to be told apart by the installed package they come from; own tokenizer.

    Equally many sentences a package, always the same as long as the same versions are installed. A file's sentences are
    all in one split, and sentences that two packages share are in none. Collected once and cached; the tokenizer is
    trained on the spot.

    Batches: ``input_ids``, ``attention_mask`` ``(B, L)`` and ``labels`` ``(B,)``.

    Args:
        packages: Importable names; ``python`` is the standard library.
        num_sentences: Sentences a package, an eighth of them to test and a tenth to validate on.
        vocabulary_size: Tokens that the tokenizer knows; at most what the model has embeddings for.
        max_length: Tokens kept of a sample; at most what the model has positions for.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: For fewer than two packages, one that is not installed or has too few sentences, or numbers out of
            range.
    """

    def __init__(
        self,
        packages: list[str] = PACKAGES,
        num_sentences: int = 4000,
        vocabulary_size: int = 6000,
        max_length: int = 64,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(None, max_length, batch_size, num_workers)
        check(len(set(packages)) == len(packages) >= 2, f"packages={packages}: must be two or more, each once")
        check(num_sentences >= 16, f"num_sentences={num_sentences}: must be at least 16")
        check(vocabulary_size >= 256, f"vocabulary_size={vocabulary_size}: must be at least 256")
        self.packages = list(packages)
        self.num_sentences = num_sentences
        self.vocabulary_size = vocabulary_size

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        splits = sentence_splits(self.packages, self.num_sentences)
        self.tokenizer = train_tokenizer(splits["train"]["text"], self.vocabulary_size)
        return {name: self.tokenized(split, ["text"]) for name, split in splits.items()}, Classification(self.packages)
