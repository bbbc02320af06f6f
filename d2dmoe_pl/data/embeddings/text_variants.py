"""Further texts, made of those that there are: a vector to keep needs no label, but many texts."""

import random
from collections.abc import Sequence

from d2dmoe_pl.data.epoch_order import folded

LEFT_OUT = 0.1  # share of words, so that what follows what is not always the same


def text_variants(texts: Sequence[str], seed: int) -> list[str]:
    """A variant of each text: its beginning and another one's end, without some of the words of both.

    It is about as long as the two are, and of their words, so that vectors are learnt where they will be asked for.
    What is written without blanks is taken apart by its characters.

    Args:
        texts: Not blank.
        seed: Of what is drawn; the same gives the same.

    Returns:
        As many texts, none of them blank.

    Example:
        >>> from d2dmoe_pl.data.embeddings.text_variants import text_variants
        >>> text_variants(["the cat sat on the mat", "we went home late last night"], seed=4)
        ['the cat late last night', 'we went home late last cat sat on the mat']
    """
    drawn = random.Random(folded(seed, "variants"))
    return [_crossed(text, texts[drawn.randrange(len(texts))], drawn) for text in texts]


def _crossed(first: str, second: str, drawn: random.Random) -> str:
    units, others = _units(first), _units(second)
    beginning = units[: drawn.randint(1, len(units))]
    end = others[drawn.randint(0, len(others) - 1) :]
    kept = [_but_for_some(part, drawn) for part in (beginning, end)]
    return " ".join(part for part in kept if part) or first


def _units(text: str) -> list[str]:
    """Words with the blanks behind them, or characters."""
    words = text.split()
    return [f"{word} " for word in words] if len(words) > 1 else [*text.strip()]


def _but_for_some(units: Sequence[str], drawn: random.Random) -> str:
    return "".join(unit for unit in units if drawn.random() >= LEFT_OUT).strip()
