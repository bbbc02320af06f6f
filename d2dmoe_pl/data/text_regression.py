"""Texts, or pairs of texts, with a number each, from any Hugging Face dataset."""

from collections.abc import Mapping

from datasets import Dataset

from d2dmoe_pl.data.class_labels import encode_numbers
from d2dmoe_pl.data.head import Head
from d2dmoe_pl.data.task import Regression, Task
from d2dmoe_pl.data.text_classification import TextClassification


class TextRegression(TextClassification):
    """As ``TextClassification``, but ``label_column`` holds numbers, which are learnt as they are.

    It goes with ``HuggingFaceModel`` of the task ``text-regression``.

    Batches: what the tokenizer gives (``input_ids``, ``attention_mask``, ... ``(B, L)``) and ``labels`` ``(B,)``.
    """

    head: Head = "regression"

    def encoded(self, splits: Mapping[str, Dataset]) -> tuple[Mapping[str, Dataset], Task]:
        return encode_numbers(splits, self.label_column), Regression(self.label_column)
