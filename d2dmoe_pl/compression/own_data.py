"""The data of a recipe, from a file, a folder or the name of a dataset: which splits there are, and which columns."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from transformers import AutoConfig, AutoModel, AutoTokenizer

from d2dmoe_pl.auto_classes import MODEL_TYPE
from d2dmoe_pl.chain_status import say
from d2dmoe_pl.compression.told_columns import (
    ANSWERED,
    FILES,
    LABELLED,
    LANGUAGE,
    OF_ONE_COLUMN,
    SAMPLED,
    TASKS,
    check_read,
    column_of_files,
    label_column_of,
    task_of,
    text_column_of,
    text_columns_of,
    unread_texts,
)
from d2dmoe_pl.data.dataset_source import ENDINGS, DatasetSource, local_splits
from d2dmoe_pl.data.file_names import ending_of
from d2dmoe_pl.data.load_pretrained import load_pretrained
from d2dmoe_pl.data.squad.given_answers import with_answers
from d2dmoe_pl.data.text_classification import check_texts
from d2dmoe_pl.data.token_positions import num_token_positions
from d2dmoe_pl.errors import ConfigError, check

LONGEST = 512
WINDOW = 384  # tokens of a question and of a part of the text that answers it
TOKENIZER_FILE = re.compile(r"tokenizer|vocab|\.model$|\.tiktoken$")
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
    told = {**columns, "text_columns": given_texts}
    task = task or task_of(train, told, model)
    check_read(told, task)
    if task in FILES:
        return _of_files(train, task, told, model, picture, {"source": source, "batch_size": batch_size}), task
    tokenizer = _tokenizer_of(tokenizer, model)
    common: dict[str, Any] = {"source": source, "tokenizer": tokenizer, "batch_size": batch_size}
    if task in LANGUAGE:
        common |= {"length": min(BLOCK, _positions(tokenizer, model)), "batch_size": max(1, batch_size // 4)}
        own = {"objective": LANGUAGE[task], "text_column": text_column_of(train, given_texts, [], task)}
        return {"class_path": "LanguageModeling", "init_args": {**common, **own}}, task
    if task == "question-answering":
        return _of_questions(train, common, _positions(tokenizer, model)), task
    common["group_by_length"] = True
    if task == "embeddings":
        text = text_column_of(train, given_texts, [], task)
        longest = _max_length(train, [text], tokenizer, model)
        del common["tokenizer"]  # the model's whose vectors are kept
        arguments = {**common, "model": model or tokenizer, "text_column": text, "max_length": longest}
        return {"class_path": "TextEmbeddings", "init_args": arguments}, task
    label = label_column_of(train, columns["label_column"], given_texts or [])
    texts = text_columns_of(train, given_texts, [label])
    if task in OF_ONE_COLUMN:
        texts = [text_column_of(train, given_texts, [label], task)]
    if given_texts is None and (unread := unread_texts(train, [*texts, label])):
        say(
            f"Of the columns of texts, {' and '.join(texts)} is read, and {', '.join(unread)} is not; --text_columns "
            "says which to read.",
            "yellow",
        )
    named: dict[str, dict[str, Any]] = {
        "multi-label-classification": {"text_columns": texts, "label_columns": [label]},
        "token-classification": {"words_column": texts[0], "labels_column": label},
        "text-to-text": {"source_column": texts[0], "target_column": label},
    }
    by_name = named.get(task, {"text_columns": texts, "label_column": label})
    arguments = {**common, **by_name, "max_length": _max_length(train, texts, tokenizer, model)}
    if task == "text-to-text":
        arguments["max_target_length"] = _max_length(train, [label], tokenizer, model)
    return {"class_path": LABELLED[task], "init_args": arguments}, task


def _tokenizer_of(given: str | None, model: str | None) -> str:
    """The tokenizer's folder or hub name: the one that is given, or the model's own.

    Raises:
        ConfigError: If there is none, or the one that is given numbers tokens otherwise than that beside the model.
    """
    is_folder = model is not None and Path(model).is_dir()
    has_own = is_folder and any(TOKENIZER_FILE.search(file.name) for file in Path(str(model)).iterdir())
    if given is None:
        check(
            model is not None and (has_own or not is_folder),
            "tokenizer=None: must be the folder or hub name of the model's tokenizer",
        )
        return str(model)
    if has_own and Path(given) != Path(str(model)):
        own, other = (load_pretrained(AutoTokenizer, str(name), "tokenizer").get_vocab() for name in (model, given))
        strange = sum(own.get(token) != number for token, number in other.items())
        check(
            2 * strange <= len(other),
            f"tokenizer={given!r}: of its {len(other)} tokens {strange} have other numbers than by the tokenizer of "
            f"{model}, or none; must be one of the same vocabulary",
        )
    return given


def _of_files(
    train: Dataset,
    task: str,
    columns: Mapping[str, Any],
    model: str | None,
    picture: Mapping[str, Any],
    common: Mapping[str, Any],
) -> dict[str, Any]:
    """What a recipe says of pictures or recordings with a label each."""
    reader, _, argument, _ = FILES[task]
    column = column_of_files(train, task, columns)
    there = ", ".join(train.column_names)
    check(column is not None, f"{argument}=None: none of {there} is one of files for {task}; say which")
    assert column is not None
    check(
        len(train.column_names) > 1,
        f"{argument}={column!r}: is all that the data has; must have labels too, by a folder a class or in a column",
    )
    label = label_column_of(train, columns["label_column"], [column])
    is_image = task == "image-classification"
    check(is_image or model is not None, f"task={task!r}: timm's models are for pictures; must be of Hugging Face")
    own = {**picture} if picture and is_image else {"processor": model}
    return {"class_path": reader, "init_args": {**common, argument: column, "label_column": label, **own}}


def _of_questions(train: Dataset, common: Mapping[str, Any], positions: int) -> dict[str, Any]:
    """What a recipe says of questions with texts that answer them, all or some, in the manner of SQuAD."""
    missing = [column for column in ANSWERED if column not in train.column_names]
    there = ", ".join(train.column_names)
    check(not missing, f"task='question-answering': {', '.join(missing)} must be columns too; there are {there}")
    check_texts(train, "context", "train", "column", may_be_blank=True)
    found = with_answers(train.select_columns(list(ANSWERED)), "train")["answers"]
    window = min(WINDOW, positions)
    sizes = {"max_length": window, "doc_stride": window // 3, "max_question_length": window // 6}
    version = 1 if all(answers["text"] for answers in found) else 2
    return {"class_path": "SQuAD", "init_args": {**common, "version": version, **sizes}}


def _positions(tokenizer: str, model: str | None) -> int:
    """Tokens that a text may have by its tokenizer, which need not say it, and by its model; else very many."""
    made: Any = load_pretrained(AutoTokenizer, tokenizer, "tokenizer")
    by_tokenizer = int(made.model_max_length)
    config: Any = None if model is None else load_pretrained(AutoConfig, model, "model")
    if config is None or config.model_type == MODEL_TYPE:  # a converted model, which is refused later
        return by_tokenizer
    with torch.device("meta"):
        without_weights = AutoModel.from_config(config)
    return min(by_tokenizer, num_token_positions(without_weights) or by_tokenizer)


def _max_length(train: Dataset, texts: Sequence[str], tokenizer: str, model: str | None) -> int:
    """Tokens that all but a hundredth of the texts have, rounded up to eights."""
    made: Any = load_pretrained(AutoTokenizer, tokenizer, "tokenizer")
    some = train.select(range(min(SAMPLED, len(train))))
    # verbose warns of texts that are longer than the model takes, which are cut
    encoded = made(*(list(map(_as_text, some[name])) for name in texts), verbose=False)
    lengths = sorted(map(len, encoded["input_ids"]))
    longest = lengths[int(0.99 * (len(lengths) - 1))]
    return min(LONGEST, _positions(tokenizer, model), -(-longest // 8) * 8)


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
