"""Documents to blocks of tokens that all have one length: nothing is padded, nothing but the last bit cut off."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from d2dmoe_pl.errors import check


@dataclass(frozen=True)
class Packer:
    """Documents one after the other, each with a separator behind it, cut into blocks.

    A block can begin and end within a document, and what follows a separator can see what is before it.

    Attributes:
        tokenizer: Its separator is the token that ends a text, or else the one that parts two. A tokenizer that begins
            texts with a token of its own (``[CLS]``, ``<bos>``) begins every block with it.
        length: Tokens of a block.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int

    def check(self, name: str) -> None:
        """Raise ``ConfigError`` if the tokenizer, which the user calls ``name``, has no separator."""
        check(
            self._separator is not None,
            f"tokenizer={name!r}: has neither a token that ends a text nor one that parts two; must have one",
        )

    @property
    def _separator(self) -> int | None:
        ends = self.tokenizer.eos_token_id
        return self.tokenizer.sep_token_id if ends is None else ends

    @property
    def _beginning(self) -> list[int]:
        first = self.tokenizer("a")["input_ids"][:1]
        return first if set(first) <= {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} else []

    def blocks(self, documents: Iterable[Sequence[str | None]], name: str | None = None) -> Iterator[list[int]]:
        """Every block of ``length`` token ids, in order.

        Args:
            documents: Batches of texts; empty ones are left out.
            name: Of the split, which must then give one block at least.

        Raises:
            ConfigError: At the end, if there were too few tokens for that.
        """
        beginning, separator = self._beginning, self._separator
        assert separator is not None
        size = self.length - len(beginning)
        tokens: list[int] = []
        made = 0
        for texts in documents:
            texts = [text for text in texts if text]
            if not texts:
                continue
            for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                tokens.extend(ids)
                tokens.append(separator)
            whole = len(tokens) // size
            for block in range(whole):
                yield beginning + tokens[block * size : (block + 1) * size]
            made += whole
            del tokens[: whole * size]
        check(made > 0 or name is None or len(tokens) > 0, f"the {name} split: has no texts; must have one at least")
        check(
            made > 0 or name is None,
            f"length={self.length}: the {name} split has {len(tokens)} tokens; must be at most "
            f"{len(tokens) + len(beginning)}, to pack one block, or the split longer",
        )
