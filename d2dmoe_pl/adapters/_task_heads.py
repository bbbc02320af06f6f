"""The head that a ``transformers`` model has for each task, and the class that builds it."""

from typing import Any

import transformers

from d2dmoe_pl.adapters._adapter import TaskName
from d2dmoe_pl.data.head import Head

# the head for each task, and what of transformers knows the class that has it, by the type of a model
HEADS: dict[TaskName, tuple[Head, Any]] = {
    "text-classification": ("classification", transformers.AutoModelForSequenceClassification),
    "text-regression": ("regression", transformers.AutoModelForSequenceClassification),
    "multi-label-classification": ("multi-label", transformers.AutoModelForSequenceClassification),
    "token-classification": ("token-classification", transformers.AutoModelForTokenClassification),
    "question-answering": ("question-answering", transformers.AutoModelForQuestionAnswering),
    "causal-language-modeling": ("causal-language-modeling", transformers.AutoModelForCausalLM),
    "masked-language-modeling": ("masked-language-modeling", transformers.AutoModelForMaskedLM),
    "text-to-text": ("text-to-text", transformers.AutoModelForSeq2SeqLM),
    "embeddings": ("embedding", transformers.AutoModel),
    "image-classification": ("classification", transformers.AutoModelForImageClassification),
    "audio-classification": ("classification", transformers.AutoModelForAudioClassification),
}

# of heads for whole texts that share a class, what a config calls them; one for classes need not be called anything
PROBLEM_TYPES: dict[Head, Any] = {"regression": "regression", "multi-label": "multi_label_classification"}
