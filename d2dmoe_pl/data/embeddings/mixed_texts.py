"""New texts from those that there are, for what needs no labels."""

import random
from collections.abc import Sequence

NEAR = 20  # characters, within which a word ends


def mixed_texts(texts: Sequence[str], number: int, seed: int = 0) -> list[str]:
    """Texts that each have the beginning of one and, from the same share of its length on, the end of another.

    They are cut between words where these are parted by blanks, and are as long as ``texts`` are.

    Args:
        texts: At least one with more than blanks.
        number: How many to make.
        seed: Decides which are joined, and where.

    Example:
        >>> from d2dmoe_pl.data.embeddings.mixed_texts import mixed_texts
        >>> mixed_texts(["a red cat sat down", "we like the sun"], 3, seed=2)
        ['a red cat sat down', 'a red the sun', 'a red cat sat down']
    """
    draw = random.Random(seed)
    mixed: list[str] = []
    while len(mixed) < number:
        first, second, share = draw.choice(texts), draw.choice(texts), draw.random()
        text = (first[: _cut(first, share)] + second[_cut(second, share) :]).strip()
        if text:
            mixed.append(text)
    return mixed


def _cut(text: str, share: float) -> int:
    place = round(share * len(text))
    if " " not in text and text.lower() == text.upper():  # of a script without blanks, not a single word
        return place
    blank = text.find(" ", place)
    end = len(text) if blank < 0 else blank
    return end if end - place <= NEAR else place
