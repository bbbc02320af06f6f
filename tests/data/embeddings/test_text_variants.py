"""Further texts are of the words of those that there are, drawn by a seed, and never blank."""

import string

from hypothesis import given
from hypothesis import strategies as st

from d2dmoe_pl.data.embeddings.text_variants import text_variants

TEXTS = [f"{letter}1 {letter}2 {letter}3 {letter}4" for letter in string.ascii_lowercase]

texts = st.lists(st.text("ab 猫\n", min_size=1).filter(str.strip), min_size=1)


def test_a_variant_is_a_beginning_and_an_end_but_for_some_words():
    found = text_variants(TEXTS, seed=0)
    assert len(found) == len(TEXTS)
    assert all(variant not in TEXTS for variant in found[:5])
    for text, variant in zip(TEXTS, found, strict=True):
        places = [int(word[1:]) for word in variant.split() if word[0] == text[0]]
        assert places == sorted(places)  # as they stood there
        others = {word[0] for word in variant.split()} - {text[0]}
        assert len(others) <= 1
    ends = [variant[-1] for variant in found]
    assert ends.count("4") > len(ends) / 2


def test_a_seed_draws_the_same_and_another_one_others():
    assert text_variants(TEXTS, seed=1) == text_variants(TEXTS, seed=1)
    assert text_variants(TEXTS, seed=1) != text_variants(TEXTS, seed=2)


@given(texts, st.integers(0, 3))
def test_no_variant_is_blank_or_of_other_characters(given_texts, seed):
    known = set("".join(given_texts)) | {" "}
    for variant in text_variants(given_texts, seed):
        assert variant.strip()
        assert set(variant) <= known


def test_what_has_no_blanks_is_taken_apart_by_its_characters():
    found = text_variants(["猫坐在垫子上"] * 20, seed=0)
    assert len({len(variant) for variant in found}) > 2
