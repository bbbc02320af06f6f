"""The heads that a model can have, by what the data asks of it."""

from typing import Literal

Head = Literal[
    "classification",
    "regression",
    "multi-label",
    "token-classification",
    "question-answering",
    "causal-language-modeling",
    "masked-language-modeling",
    "text-to-text",
    "embedding",
]
# their outputs are the vocabulary, which the model brings; labels name those of the others
VOCABULARY_HEADS: tuple[Head, ...] = ("causal-language-modeling", "masked-language-modeling", "text-to-text")
# their outputs stand for labels that have names
LABELLED_HEADS: tuple[Head, ...] = ("classification", "multi-label", "token-classification")
