"""Texts, and the vectors that a model gives them, from any Hugging Face dataset."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import normalizers
from torch import Tensor
from transformers import AutoModel

from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.embeddings.keeping_vectors import KeepingVectors
from d2dmoe_pl.data.embeddings.mixed_texts import mixed_texts
from d2dmoe_pl.data.embeddings.pooling import (
    Pooling,
    check_modules,
    default_prompt,
    has_lower_case,
    normalizes,
    pooled,
    pooling_of,
    write_modules,
)
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.data.text_classification import check_texts
from d2dmoe_pl.data.token_positions import num_token_positions
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import check


class TextEmbeddings(TokenizedData):
    """Texts without labels: to be learnt is the vector that ``model`` gives each, so that a cheaper one keeps it.

    It goes with ``HuggingFaceModel`` of the task ``embeddings``, whose ``name`` is most often ``model`` again. Vectors
    are computed once and cached.

    Batches: what the tokenizer gives (``input_ids``, ``attention_mask``, ... ``(B, L)``) and ``labels`` ``(B, d)``.

    Args:
        source: Where the splits are; any texts like those that are to get vectors.
        model: Hub name or folder of the model whose vectors are kept, with its tokenizer; one of sentence-transformers
            says how it pools and what it puts before each text, others take the mean over tokens.
        text_column: Column of the texts.
        max_length: Tokens kept of a text.
        batch_size: Samples a batch and process.
        num_workers: Loader processes.
        group_by_length: Put samples of like length into one batch, which leaves less to pad.
        mixed_texts: Training texts more for each that there is, of the beginning of one and the end of another
            (:func:`~d2dmoe_pl.data.embeddings.mixed_texts.mixed_texts`): of few texts a model that is trained for long
            learns the vectors by heart.

    Raises:
        ConfigError: If ``mixed_texts`` is negative; to load, for a model that is not there or has more layers behind
            its pooling, and samples without a text, or with more tokens than that model has positions for.
    """

    head = "embedding"

    def __init__(
        self,
        source: DatasetSource,
        model: str,
        text_column: str = "text",
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        group_by_length: bool = False,
        mixed_texts: int = 0,
    ) -> None:
        super().__init__(model, max_length, batch_size, num_workers, group_by_length)
        check(mixed_texts >= 0, f"mixed_texts={mixed_texts}: must not be negative")
        self.mixed_texts = mixed_texts
        self.source = source
        self.model = model
        self.text_column = text_column
        self.width = 0  # once loaded

    @property
    def pooling(self) -> Pooling:
        """How ``model`` pools."""
        return pooling_of(self.model) or "mean"

    def load_processor(self) -> None:
        if self.tokenizer is not None:
            return
        super().load_processor()
        if has_lower_case(self.model):
            core: Any = self.tokenizer.backend_tokenizer  # as all of transformers 5 have it
            before = [] if core.normalizer is None else [core.normalizer]
            core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        splits = self.source.load()
        check_columns(splits, {"text_column": self.text_column})
        check_modules(self.model)
        for name, split in splits.items():
            check_texts(split, self.text_column, name, "text_column")
        texts = splits["train"][self.text_column]
        self.check_known(texts)
        if self.mixed_texts > 0:
            more = mixed_texts(texts, self.mixed_texts * len(texts))
            splits["train"] = Dataset.from_dict({self.text_column: [*texts, *more]})
        found = {name: self._with_vectors(split) for name, split in splits.items()}
        self.width = len(found["train"][0]["labels"])
        return found, KeepingVectors(self.width, normalizes(self.model))

    def raw_samples(self, inputs: Sequence[str]) -> Dataset:
        return self._in_tokens(Dataset.from_dict({self.text_column: list(inputs)}))

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer, and what makes the folder one of sentence-transformers."""
        super().save_processor(folder)
        write_modules(folder, self.pooling, self.width, self.model)

    def collate(self, samples: Sequence[dict[str, Any]], augment: bool) -> dict[str, Tensor]:
        texts = [{key: value for key, value in sample.items() if key != "labels"} for sample in samples]
        batch = super().collate(texts, augment)
        if "labels" not in samples[0]:
            return batch
        return {**batch, "labels": torch.tensor([sample["labels"] for sample in samples])}  # (B, d)

    def _in_tokens(self, split: Dataset) -> Dataset:
        return self.tokenized(split, [self.text_column], before=default_prompt(self.model))

    def _with_vectors(self, split: Dataset) -> Dataset:
        tokens = self._in_tokens(split)
        # by length, since the model computes what is padded too
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]["input_ids"]))
        place = sorted(range(len(order)), key=order.__getitem__)
        settings = {"model": self.model, "stamp": _stamp(self.model), "pooling": self.pooling}
        pad = self.tokenizer.pad_token_id or 0
        self._check_positions(tokens)
        mapped = tokens.select(order).map(
            add_vectors, batched=True, batch_size=64, fn_kwargs={**settings, "pad": pad}, desc="Computing vectors"
        )
        return mapped.select(place)

    def _check_positions(self, tokens: Dataset) -> None:
        """As phases do for the model that is trained; this one runs before there is another."""
        has = num_token_positions(_dense(self.model, _stamp(self.model)))
        longest = max(map(len, tokens["input_ids"]))
        check(
            has is None or longest <= has,
            f"max_length={self.max_length}: the longest text has {longest} tokens; must be at most {has}, which "
            f"model={self.model!r} has positions for",
        )


@torch.no_grad()
def add_vectors(batch: Mapping[str, Any], model: str, stamp: str, pooling: Pooling, pad: int) -> dict[str, Any]:
    """Rows with their vectors in the column ``labels``, and no other new one.

    Args:
        batch: With ``input_ids`` and what else the tokenizer gave.
        model: Hub name or folder.
        stamp: Of the folder's files, so that what is cached is not of other weights.
        pooling: How the model pools.
        pad: Id of padding.
    """
    dense: Any = _dense(model, stamp)
    longest = max(map(len, batch["input_ids"]))
    device = next(dense.parameters()).device

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)

    mask = padded([[1] * len(row) for row in batch["input_ids"]], 0)
    states = dense(input_ids=padded(batch["input_ids"], pad), attention_mask=mask).last_hidden_state  # (B, L, d)
    return {"labels": pooled(states, mask, pooling).float().cpu().tolist()}


@lru_cache(maxsize=1)
def _dense(model: str, stamp: str) -> Any:
    loaded: Any = load_pretrained(AutoModel, model, "model")
    return loaded.float().eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _stamp(model: str) -> str:
    """Names, sizes and times of a folder's files of weights, settings and code; nothing for a name on the hub."""
    files = [file for kind in ("safetensors", "bin", "json", "py") for file in sorted(Path(model).glob(f"*.{kind}"))]
    return ", ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
