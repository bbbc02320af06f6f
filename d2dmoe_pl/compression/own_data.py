"""The data of a recipe, from a file, a folder or the name of a dataset: which splits there are, and which columns."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from d2dmoe_pl.data.dataset_source import ENDINGS, DatasetSource, ending_of, local_splits
from d2dmoe_pl.data.gguf_files import ENDING
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.local_folders import MEDIA
from d2dmoe_pl.errors import ConfigError, check

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
TASKS = (*LABELLED, *FILES, "causal-language-modeling", "embeddings")
LABELS = (
    *("label", "labels", "class", "target", "category", "emotion", "sentiment", "fine_label", "coarse_label"),
    *("ner_tags", "tags", "pos_tags", "summary", "answer", "score", "rating", "stars"),
)
TEXTS = (
    *("text", "sentence", "content", "review", "tweet", "document", "question", "query", "title", "comment"),
    *("tokens", "words", "article"),
)
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text_a", "text_b"))
WRITTEN = re.compile(r"\[\s*(['\"\d].*)?\]", re.DOTALL)  # a list as Python and JSON write it
SAMPLED = 1000  # texts whose lengths are looked at
LONGEST = 512
BLOCK = 256  # tokens of a language model's samples


def source_of(data: str) -> dict[str, Any]:
    """The splits of ``data``, as :class:`d2dmoe_pl.data.DatasetSource` takes them; those not there are held out.

    Args:
        data: A file, a folder, or the name of a dataset on the hub.

    Raises:
        ConfigError: If there is no such thing, or no training split in it.
    """
    path = Path(data)
    if path.is_file():
        check(ending_of(str(path)) in ENDINGS, f"data={data!r}: the ending must be one of {', '.join(ENDINGS)}")
        return {"train": str(path if path.parent != Path() else Path(".") / path), "validation": None, "test": None}
    looks_local = data.startswith((".", "/", "~")) or data.count("/") > 1 or ending_of(str(path)) in ENDINGS
    check(path.is_dir() or not looks_local, f"data={data!r}: no such file or folder")
    try:
        splits = list(local_splits(path)) if path.is_dir() else []
        if not splits:
            builder = load_dataset_builder(data)
            splits = list(builder.config.data_files or builder.info.splits or {})
    except (OSError, ValueError, DatasetsError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"data={data!r}: no file, no folder, and no dataset that can be loaded: {first}") from error
    check("train" in splits, f"data={data!r}: has no training split; there are {', '.join(map(str, splits))}")
    return {"dataset": data, **{name: None for name in ("validation", "test") if name not in splits}}


def data_config(
    data: str,
    task: str | None,
    model: str | None,
    tokenizer: str | None,
    columns: Mapping[str, Any],
    picture: Mapping[str, Any],
    batch_size: int,
) -> tuple[dict[str, Any], str]:
    """What a recipe says of its data, and the task.

    Args:
        data: A file, a folder, or the name of a dataset on the hub.
        task: One of ``TASKS``; None to go by the columns, and by what labels are.
        model: Folder or hub name that a tokenizer or another processor comes from; None if it has none.
        tokenizer: The same for the tokenizer, instead.
        columns: ``text_columns``, ``label_column``, ``image_column``, ``audio_column``; each None to go by names.
        picture: What is known of a model's pictures, for a model that has no image processor.
        batch_size: Samples a batch.

    Raises:
        ConfigError: If a column cannot be told, or the text has no tokenizer.
    """
    check(task is None or task in TASKS, f"task={task!r}: allowed are {', '.join(TASKS)}")
    source = source_of(data)
    train = DatasetSource(**source).load()["train"]
    given_texts = [columns["text_columns"]] if isinstance(columns["text_columns"], str) else columns["text_columns"]
    for argument, names in {**columns, "text_columns": given_texts}.items():
        for name in [names] if isinstance(names, str) else names or []:
            there = ", ".join(train.column_names)
            check(name in train.column_names, f"{argument}={name!r}: no such column in {data}; there are {there}")
    if task is None:
        are_files = (each for each in FILES if _column_of_files(train, each, columns))
        task = next(are_files, None) or _task_of(train, given_texts, columns["label_column"], model)
    if task in FILES:
        reader, _, argument, _ = FILES[task]
        column = _column_of_files(train, task, columns)
        there = ", ".join(train.column_names)
        check(column is not None, f"{argument}=None: none of {there} is one of files for {task}; say which")
        assert column is not None
        label = _label_column(train, columns["label_column"], [column])
        is_image = task == "image-classification"
        check(is_image or model is not None, f"task={task!r}: timm's models are for pictures; must be of Hugging Face")
        own = {**picture} if picture and is_image else {"processor": model}
        arguments = {"source": source, argument: column, "label_column": label, "batch_size": batch_size, **own}
        return {"class_path": reader, "init_args": arguments}, task
    tokenizer = tokenizer or model
    check(tokenizer is not None, "tokenizer=None: must be the folder or hub name of the model's tokenizer")
    assert tokenizer is not None
    if task == "causal-language-modeling":
        arguments = {
            "source": source,
            "tokenizer": tokenizer,
            "text_column": _text_columns(train, given_texts, [])[0],
        }
        arguments |= {"length": BLOCK, "batch_size": max(1, batch_size // 4)}
        return {"class_path": "LanguageModeling", "init_args": arguments}, task
    common: dict[str, Any] = {"source": source, "batch_size": batch_size, "group_by_length": True}
    if task == "embeddings":
        (text,) = _text_columns(train, given_texts, [])[:1]
        longest = _max_length(train, [text], tokenizer)
        arguments = {**common, "model": model or tokenizer, "text_column": text, "max_length": longest}
        return {"class_path": "TextEmbeddings", "init_args": arguments}, task
    label = _label_column(train, columns["label_column"], given_texts or [])
    texts = _text_columns(train, given_texts, [label])
    named: dict[str, dict[str, Any]] = {
        "multi-label-classification": {"text_columns": texts, "label_columns": [label]},
        "token-classification": {"words_column": texts[0], "labels_column": label},
        "text-to-text": {"source_column": texts[0], "target_column": label},
    }
    by_name = named.get(task, {"text_columns": texts, "label_column": label})
    arguments = {**common, "tokenizer": tokenizer, **by_name, "max_length": _max_length(train, texts, tokenizer)}
    if task == "text-to-text":
        arguments["max_target_length"] = _max_length(train, [label], tokenizer)
    return {"class_path": LABELLED[task], "init_args": arguments}, task


def _task_of(train: Dataset, texts: Sequence[str] | None, label: str | None, model: str | None) -> str:
    """The task that there is such a column of labels for; that of a language model where there is none."""
    if label is None and not _named(LABELS, train.column_names):
        check(
            _writes_text(model),
            f"label_column=None: none of {', '.join(train.column_names)} has a name that tells; say which, or set task "
            "(causal-language-modeling and embeddings need no labels)",
        )
        return "causal-language-modeling"
    label = _label_column(train, label, texts or [])
    text = _text_columns(train, texts, [label])[0]
    some = train.select(range(min(SAMPLED, len(train))))
    labels = [each for each in some[label] if each is not None]
    if _are_lists(labels):
        return "token-classification" if _are_lists(some[text]) else "multi-label-classification"
    numbers = [_number(each) for each in labels]
    if all(map(math.isfinite, numbers)) and (any(number % 1 for number in numbers) or _gives_numbers(model)):
        return "text-regression"
    if not (_has_words(labels) and len(set(labels)) > len(labels) / 2):
        return "text-classification"
    return "token-classification" if _are_tags(some[text], some[label]) else "text-to-text"


def _number(value: Any) -> float:
    """The number that a value is, or says; not a number if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _are_lists(values: Sequence[Any]) -> bool:
    """Whether values are lists, or texts that all stand for one."""
    given = [value for value in values if value not in (None, "")]
    are_written = bool(given) and all(isinstance(value, str) and WRITTEN.fullmatch(value.strip()) for value in given)
    return are_written or any(isinstance(value, list) for value in given)


def _are_tags(texts: Sequence[Any], labels: Sequence[Any]) -> bool:
    """Whether each text has a label for each word, of few different ones."""
    parts = [str(label).split() for label in labels]
    tags = [tag for sample in parts for tag in sample]
    as_many = all(len(sample) == len(str(text).split()) for text, sample in zip(texts, parts, strict=True))
    return as_many and len(set(tags)) <= len(tags) / 2


def _gives_numbers(model: str | None) -> bool:
    """Whether a model has a single output, which is a number's."""
    return model is not None and getattr(load_pretrained(AutoConfig, model, "model"), "num_labels", None) == 1


def _writes_text(model: str | None) -> bool:
    """Whether a model is one of language; not known of one without a config."""
    if model is None:
        return False
    config = load_pretrained(AutoConfig, model, "model")
    if model.endswith(ENDING):  # which has a head for language, and no name of an architecture
        return type(config) in AutoModelForCausalLM._model_mapping
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def _named(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Those of ``columns`` that are called one of ``names``, in the order of these, in whatever case."""
    return [column for name in names for column in columns if column.strip().lower() == name]


def _column_of_files(train: Dataset, task: str, given: Mapping[str, Any]) -> str | None:
    """The column of files that a task is of: the one that is given, by what is in it, or by its name."""
    _, _, argument, names = FILES[task]
    if given[argument] is not None:
        return str(given[argument])
    columns = train.column_names
    by_name = [] if _named(["text"], columns) else _named(names, columns)
    of_others = {name for name in by_name for other in FILES if other != task and _holds_files(train, name, other)}
    by_value = [name for name in columns if _holds_files(train, name, task)]
    return next((name for name in (*by_value, *by_name) if name not in of_others), None)


def _holds_files(train: Dataset, name: str, task: str) -> bool:
    """Whether a column is one of files of a kind, or of paths that end as such do."""
    _, feature, endings = MEDIA[FILES[task][1]]
    if isinstance(train.features[name], feature):
        return True
    if getattr(train.features[name], "dtype", None) not in ("string", "large_string"):
        return False
    paths = [path for path in train.select(range(min(SAMPLED, len(train))))[name] if path is not None]
    return bool(paths) and all(Path(path).suffix.lower() in endings for path in paths)


def _label_column(train: Dataset, given: str | None, others: Sequence[str]) -> str:
    if given is not None:
        return given
    found = _named(LABELS, train.column_names)
    left = [name for name in train.column_names if name not in others]
    if not found and len(left) == 1 and others:
        return left[0]
    check(bool(found), f"label_column=None: none of {', '.join(train.column_names)} has a name that tells; say which")
    return found[0]


def _text_columns(train: Dataset, given: Sequence[str] | None, others: Sequence[str]) -> list[str]:
    if given is not None:
        return list(given)
    names = [name for name in train.column_names if name not in others]
    for pair in PAIRS:
        if len(both := _named(pair, names)) == len(pair):
            return both
    found = _named(TEXTS, names) or (names if len(names) == 1 else [])
    if not found:
        worded = [name for name in names if _has_words(train.select(range(min(SAMPLED, len(train))))[name])]
        found = worded if len(worded) == 1 else []
    check(bool(found), f"text_columns=None: none of {', '.join(names)} has a name that tells; say which")
    return found[:1]


def _has_words(values: Sequence[Any]) -> bool:
    """Whether most of them are of several words."""
    return sum(len(value.split()) > 1 for value in values if isinstance(value, str)) > len(values) / 2


def _max_length(train: Dataset, texts: Sequence[str], tokenizer: str) -> int:
    """Tokens that all but a hundredth of the texts have, rounded up to eights."""
    made: Any = load_pretrained(AutoTokenizer, tokenizer, "tokenizer")
    some = train.select(range(min(SAMPLED, len(train))))
    # verbose warns of texts that are longer than the model takes, which are cut
    encoded = made(*(list(map(_as_text, some[name])) for name in texts), verbose=False)
    lengths = sorted(map(len, encoded["input_ids"]))
    longest = lengths[int(0.99 * (len(lengths) - 1))]
    return min(LONGEST, int(made.model_max_length), -(-longest // 8) * 8)


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
