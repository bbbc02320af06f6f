"""What the columns of a table tell: which hold texts, labels or files, and what task that is."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from d2dmoe_pl.data.class_labels import as_number
from d2dmoe_pl.data.gguf_files import ENDING
from d2dmoe_pl.data.listed_values import TUPLE_OR_SET, written
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.local_folders import MEDIA
from d2dmoe_pl.errors import check

# of texts with a label each; what reads them
LABELLED = {
    "text-classification": "TextClassification",
    "text-regression": "TextRegression",
    "multi-label-classification": "TextMultiLabel",
    "token-classification": "TokenClassification",
    "text-to-text": "TextToText",
}
# of files with a label each: what reads them, what they are, the setting of their column, and how this is called
FILES = {
    "image-classification": (
        *("ImageClassification", "imagefolder", "image_column"),
        ("image", "img", "picture", "file_name", "path"),
    ),
    "audio-classification": (
        *("AudioClassification", "audiofolder", "audio_column"),
        ("audio", "recording", "sound", "speech"),
    ),
}
# of texts alone, and what is learnt of them
LANGUAGE = {"causal-language-modeling": "causal", "masked-language-modeling": "masked"}
OF_ONE_COLUMN = ("token-classification", "text-to-text")  # of those that have labels
ANSWERED = ("context", "question", "answers")  # the columns of SQuAD
TASKS = (*LABELLED, *FILES, *LANGUAGE, "question-answering", "embeddings")
LABELS = (
    *("label", "labels", "class", "target", "category", "emotion", "sentiment", "fine_label", "coarse_label"),
    *("ner_tags", "tags", "pos_tags", "summary", "answer", "score", "rating", "stars"),
)
TEXTS = (
    *("text", "sentence", "content", "review", "tweet", "document", "question", "query", "title", "comment"),
    *("tokens", "words", "article"),
)
PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text_a", "text_b")),
    *(("sentence_a", "sentence_b"), ("text1", "text2"), ("text", "text_pair"), ("question", "sentence")),
    *(("question", "passage"), ("query", "passage"), ("query", "document")),
)
WRITTEN = re.compile(r"\[\s*(['\"\d].*)?\]", re.DOTALL)  # a list as Python and JSON write it
SAMPLED = 1000  # texts whose lengths are looked at


def task_of(train: Dataset, columns: Mapping[str, Any], model: str | None) -> str:
    """The task that data is for, as its columns tell, and what labels are.

    Args:
        train: The training split.
        columns: ``text_columns``, ``label_column``, ``image_column``, ``audio_column``; each None to go by names.
        model: Folder or hub name of the model; None if it is known by another name alone.

    Raises:
        ConfigError: If nothing tells.
    """
    texts, label = columns["text_columns"], columns["label_column"]
    named = [task for task in FILES if columns[FILES[task][2]] is not None]
    of_files = named or [task for task in FILES if texts is None and column_of_files(train, task, columns)]
    if of_files:
        return of_files[0]
    if label is None and set(ANSWERED) <= set(train.column_names):
        return "question-answering"
    left = [name for name in train.column_names if name not in (texts or [])]
    if label is None and not _named(LABELS, left):
        check(
            _writes_text(model),
            f"label_column=None: none of {', '.join(left or texts)} has a name that tells; say which, or set task "
            f"({', '.join(LANGUAGE)} and embeddings need no labels)",
        )
        return "causal-language-modeling"
    label = label_column_of(train, label, texts or [])
    text = text_columns_of(train, texts, [label])[0]
    some = train.select(range(min(SAMPLED, len(train))))
    labels = [each for each in some[label] if each is not None]
    if _are_lists(labels):
        return "token-classification" if _are_lists(some[text]) else "multi-label-classification"
    are_own = len(set(labels)) > len(labels) / 2  # rather than classes
    # those that are no numbers, or not as they can be read, are told where they are
    if _are_mostly_numbers(labels, model) or (are_own and _are_mostly_numbers([*map(_as_meant, labels)], model)):
        return "text-regression"
    if not _has_words(labels):
        return "text-classification"
    lengths = {len(str(each).split()) for each in labels}
    if (are_own or len(lengths) > 1) and _are_tags(some[text], some[label]):
        return "token-classification"
    return "text-to-text" if are_own else "text-classification"


def column_of_files(train: Dataset, task: str, given: Mapping[str, Any]) -> str | None:
    """The column of files that a task is of: the one that is given, by what is in it, or by its name."""
    _, _, argument, names = FILES[task]
    if given[argument] is not None:
        return str(given[argument])
    columns = train.column_names
    by_value = {each: [name for name in columns if _holds_files(train, name, each)] for each in FILES}
    is_told = any(by_value.values()) or _named(["text"], columns)
    return next(iter(by_value[task] if is_told else _named(names, columns)), None)


def label_column_of(train: Dataset, given: str | None, others: Sequence[str]) -> str:
    """The column of labels: the one that is given, or of those beside ``others`` the first by name, or the only one."""
    if given is not None:
        check(given not in others, f"label_column={given!r}: is the column of what has the labels; must be another")
        return given
    left = [name for name in train.column_names if name not in others]
    check(bool(left), f"text_columns={list(others)}: is all that the data has; must have labels too")
    found = _named(LABELS, left)
    if not found and len(left) == 1 and others:
        return left[0]
    check(bool(found), f"label_column=None: none of {', '.join(left)} has a name that tells; say which")
    return found[0]


def text_columns_of(train: Dataset, given: Sequence[str] | None, others: Sequence[str]) -> list[str]:
    """The columns of texts: those that are given, a pair or the first by name, or the only one with words."""
    if given is not None:
        return list(given)
    names = [name for name in train.column_names if name not in others]
    check(bool(names), f"label_column={', '.join(others)!r}: is all that the data has; must have texts too")
    for pair in PAIRS:
        if len(both := _named(pair, names)) == len(pair):
            return both
    found = _named(TEXTS, names) or (names if len(names) == 1 else [])
    if not found:
        worded = [name for name in names if _has_words(train.select(range(min(SAMPLED, len(train))))[name])]
        found = worded if len(worded) == 1 else []
    check(bool(found), f"text_columns=None: none of {', '.join(names)} has a name that tells; say which")
    return found[:1]


def unread_texts(train: Dataset, read: Sequence[str]) -> list[str]:
    """The columns beside those that are read whose names say that they hold texts."""
    return _named(TEXTS, [name for name in train.column_names if name not in read])


def text_column_of(train: Dataset, given: Sequence[str] | None, others: Sequence[str], task: str) -> str:
    """The column of texts for a task that reads only one."""
    found = text_columns_of(train, given, others)
    check(len(found) == 1, f"text_columns={given}: {task} reads one column; must be one of {', '.join(found)}")
    return found[0]


def check_read(columns: Mapping[str, Any], task: str) -> None:
    """Raise ``ConfigError`` for a column that is given, by its setting, and of a kind that a task does not read."""
    texts = [] if task == "question-answering" else ["text_columns"]
    read = [FILES[task][2], "label_column"] if task in FILES else [*texts, *(["label_column"] * (task in LABELLED))]
    for argument, name in columns.items():
        check(
            name is None or argument in read,
            f"{argument}={name!r}: {task} reads no such column; must be left out, or another task",
        )


def _named(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Those of ``columns`` that are called one of ``names``, in the order of these, in whatever case."""
    return [column for name in names for column in columns if column.strip().lower() == name]


def _holds_files(train: Dataset, name: str, task: str) -> bool:
    """Whether a column is one of files of a kind, or of paths that end as such do."""
    _, feature, endings = MEDIA[FILES[task][1]]
    if isinstance(train.features[name], feature):
        return True
    if getattr(train.features[name], "dtype", None) not in ("string", "large_string"):
        return False
    paths = [path for path in train.select(range(min(SAMPLED, len(train))))[name] if path is not None]
    return bool(paths) and all(Path(path).suffix.lower() in endings for path in paths)


def _writes_text(model: str | None) -> bool:
    """Whether a model is one of language; not known of one without a config."""
    if model is None:
        return False
    config = load_pretrained(AutoConfig, model, "model")
    if model.endswith(ENDING):  # which has a head for language, and no name of an architecture
        return type(config) in AutoModelForCausalLM._model_mapping
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def _gives_numbers(model: str | None) -> bool:
    """Whether a model has a single output, which is a number's."""
    return model is not None and getattr(load_pretrained(AutoConfig, model, "model"), "num_labels", None) == 1


def _are_lists(values: Sequence[Any]) -> bool:
    """Whether values are lists, or texts that all stand for one."""
    given = [value for value in values if value not in (None, "")]
    are_written = bool(given) and all(isinstance(value, str) and _is_written(value.strip()) for value in given)
    return are_written or any(isinstance(value, list) for value in given)


def _is_written(text: str) -> bool:
    """Whether Python or JSON wrote a list as ``text``, or Python a tuple or a set."""
    is_other = TUPLE_OR_SET.fullmatch(text) is not None and isinstance(written(text), tuple | set)
    return is_other or WRITTEN.fullmatch(text) is not None


def _are_tags(texts: Sequence[Any], labels: Sequence[Any]) -> bool:
    """Whether each text has a label for each word, of few different ones."""
    parts = [str(label).split() for label in labels]
    tags = [tag for sample in parts for tag in sample]
    as_many = all(len(sample) == len(str(text).split()) for text, sample in zip(texts, parts, strict=True))
    return as_many and len(set(tags)) <= len(tags) / 2


def _has_words(values: Sequence[Any]) -> bool:
    """Whether most of them are of several words."""
    return sum(len(value.split()) > 1 for value in values if isinstance(value, str)) > len(values) / 2


def _are_mostly_numbers(labels: Sequence[Any], model: str | None) -> bool:
    """Whether more than half of labels are numbers, and such as no class has, or a model's only output is one."""
    numbers = [number for each in labels if math.isfinite(number := as_number(each))]
    return 2 * len(numbers) > len(labels) and (any(number % 1 for number in numbers) or _gives_numbers(model))


def _as_meant(value: Any) -> str:
    """A number with a point where it has a comma, and without a sign for percent."""
    return str(value).strip(" %").replace(",", ".")
