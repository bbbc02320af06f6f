"""Any text to train a language model on, causal or masked."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from d2dmoe_pl.data.dataset_source import DatasetSource, check_columns
from d2dmoe_pl.data.generated_dataset import generated
from d2dmoe_pl.data.language_modeling.packing import Packer
from d2dmoe_pl.data.language_modeling.token_labels import generator_of, masked_tokens, next_tokens
from d2dmoe_pl.data.language_modeling.token_prediction import TokenPrediction
from d2dmoe_pl.data.sample_names import sample_names
from d2dmoe_pl.data.task import Task
from d2dmoe_pl.data.tokenized import TokenizedData
from d2dmoe_pl.errors import check

DOCUMENTS_AT_ONCE = 1000  # tokenised in one call


class LanguageModeling(TokenizedData):
    """Documents packed into blocks of one length, tokenised once and cached; the metric is perplexity.

    Documents stand one after the other with the tokenizer's end-of-text token, or else its separator, behind each.
    A block begins with what the tokenizer begins texts with (``[CLS]``, ``<bos>``), if it does.

    Masked tokens are drawn anew whenever a block is trained on; in evaluation they depend on the block alone.

    Batches: ``input_ids`` ``(B, L)`` and ``labels`` ``(B, L)``, the token that each position is to tell: the next one
    (causal), or the one behind the mask (masked), -100 where there is none.

    Args:
        source: Where the splits are.
        tokenizer: Hub name or folder of a Hugging Face tokenizer.
        objective: ``causal`` or ``masked``.
        length: Tokens of a block, ``L``; at most what the model has positions for.
        text_column: Column of the documents; of text files, ``text``.
        mask_share: Share of a block's tokens to predict, if masked.
        batch_size: Blocks a batch and process.
        num_workers: Loader processes.

    Raises:
        ConfigError: For a ``length`` under 2 or a ``mask_share`` outside (0, 1); to load, for a tokenizer that is not
            there or lacks a token that is needed, or a split shorter than a block.
    """

    cuts_texts = False  # they are packed

    def __init__(
        self,
        source: DatasetSource,
        tokenizer: str,
        objective: Literal["causal", "masked"] = "causal",
        length: int = 512,
        text_column: str = "text",
        mask_share: float = 0.15,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        check(length > 1, f"length={length}: must be at least 2")
        check(objective in ("causal", "masked"), f"objective={objective!r}: allowed are causal and masked")
        check(0.0 < mask_share < 1.0, f"mask_share={mask_share}: must lie in (0, 1)")
        super().__init__(tokenizer, length, batch_size, num_workers)
        self.source = source
        self.objective = objective
        self.length = self.sample_length = length
        self.text_column = text_column
        self.mask_share = mask_share
        self.head = "causal-language-modeling" if objective == "causal" else "masked-language-modeling"

    def load_processor(self) -> None:
        super().load_processor()
        if self.tokenizer is None:
            return
        self.packer.check(str(self.tokenizer_name))
        check(
            self.objective == "causal" or self.tokenizer.mask_token_id is not None,
            f"tokenizer={self.tokenizer_name!r}: has no mask token; allowed with objective='causal' only",
        )

    @property
    def augmented(self) -> bool:
        return self.objective == "masked"  # other tokens each time

    @property
    def packer(self) -> Packer:
        """What makes blocks, once the tokenizer is loaded."""
        return Packer(self.tokenizer, self.length)

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer as it is: no text has been cut."""
        self.tokenizer.save_pretrained(folder)

    def load(self) -> tuple[Mapping[str, Dataset], Task]:
        splits = self.source.load()
        check_columns(splits, {"text_column": self.text_column})
        return {name: self.packed(split, name) for name, split in splits.items()}, self.token_prediction()

    def packed(self, split: Dataset, name: str) -> Dataset:
        """The blocks of a split, one a row, in the column ``input_ids``; cached.

        Raises:
            ConfigError: If the split's column holds no texts, or a row has none.
        """
        feature = split.features[self.text_column]
        check(
            getattr(feature, "dtype", None) in ("string", "large_string"),
            f"text_column={self.text_column!r}: has {feature} in the {name} split; must be texts",
        )
        if name == "train":
            self.check_known(split[self.text_column])
        features = Features({"input_ids": ListOf(Value("int32"), length=self.length)})
        blocks = generated(
            packed_rows, features, split=split.select_columns(self.text_column), packer=self.packer, name=name
        )
        return blocks.with_format("torch")

    def token_prediction(self) -> TokenPrediction:
        """The task, once the tokenizer is loaded."""
        return TokenPrediction(self.head, self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer)))))

    def collate(self, samples: Sequence[Mapping[str, Tensor]], augment: bool) -> dict[str, Tensor]:
        blocks = torch.stack([sample["input_ids"] for sample in samples]).long()  # (B, L)
        if self.objective == "causal":
            return {"input_ids": blocks, "labels": next_tokens(blocks)}
        if augment:
            inputs, labels = self._masked(blocks, None)
        else:
            rows = [self._masked(block.unsqueeze(0), generator_of(block)) for block in blocks]
            inputs, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return {"input_ids": inputs, "labels": labels}

    def _masked(self, blocks: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        maskable = torch.isin(blocks, torch.tensor(self.tokenizer.all_special_ids), invert=True)
        mask_id, num_token_ids = self.tokenizer.mask_token_id, len(self.tokenizer)
        return masked_tokens(blocks, maskable, self.mask_share, mask_id, num_token_ids, generator)


def packed_rows(split: Dataset, packer: Packer, name: str, **_: Any) -> Iterator[dict[str, list[int]]]:
    """Rows ``input_ids``, one a block, of a dataset with one column of documents."""
    (column,) = split.column_names
    named = iter(sample_names(split, name))

    def documents() -> Iterator[list[str]]:
        for batch in split.iter(DOCUMENTS_AT_ONCE):
            for text, sample in zip(batch[column], named, strict=False):  # of names there are more to come
                check(text is not None, f"text_column={column!r}: {sample} has no text")
            yield batch[column]

    for block in packer.blocks(documents(), name):
        yield {"input_ids": block}
