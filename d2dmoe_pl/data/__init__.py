"""LightningDataModules that give dict batches and a task. One config serves every phase; no knowledge of models."""

from d2dmoe_pl.data.augmentation import Augmentation
from d2dmoe_pl.data.base import TaskData
from d2dmoe_pl.data.digits import Digits
from d2dmoe_pl.data.docstring_text import DocstringText
from d2dmoe_pl.data.docstrings import Docstrings
from d2dmoe_pl.data.glue import GLUE
from d2dmoe_pl.data.image_classification import ImageClassification
from d2dmoe_pl.data.language_modeling import LanguageModeling
from d2dmoe_pl.data.question_answering import QuestionAnswering
from d2dmoe_pl.data.source import DatasetSource
from d2dmoe_pl.data.squad import SQuAD
from d2dmoe_pl.data.streamed_language_modeling import StreamedLanguageModeling
from d2dmoe_pl.data.task import Classification, Regression, Task
from d2dmoe_pl.data.text_classification import TextClassification

__all__ = [
    "GLUE",
    "Augmentation",
    "Classification",
    "DatasetSource",
    "Digits",
    "DocstringText",
    "Docstrings",
    "ImageClassification",
    "LanguageModeling",
    "QuestionAnswering",
    "Regression",
    "SQuAD",
    "StreamedLanguageModeling",
    "Task",
    "TaskData",
    "TextClassification",
]
