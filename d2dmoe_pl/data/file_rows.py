"""Rows of text files, none lost: tables, articles, paragraphs, tagged words; and where a file is at fault."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, dropwhile, islice, takewhile
from typing import Any

import fsspec

from d2dmoe_pl.errors import ConfigError, check

QUOTE = '"'
DELIMITERS = ",;\t"  # of CSV files, the likeliest first
TITLE = re.compile(r" = (?!= )\S(.*\S)?(?<! =) = \s*")  # of an article in WikiText; its sections have = twice or more
TAG = re.compile(r"O|[BIES]-\S+")  # of a word: outside of what is looked for, or which part of it


def rows_of(files: Sequence[str], ending: str, articles: Sequence[bool], **_: Any) -> Iterator[dict[str, Any]]:
    """The rows of several files, one after another, all values as the text that they are.

    Args:
        files: Paths; compressed ones are read as they are.
        ending: Their kind, one of ``READERS``.
        articles: Of each, whether it is read as articles, as :func:`hold_articles` says; one such file goes on with
            what the file before it ended in.

    Raises:
        ConfigError: For a file that is empty, not UTF-8 or malformed; the message names the file and the line.
    """
    at = 0
    while at < len(files):
        end = at + 1
        while articles[at] and end < len(files) and articles[end]:
            end += 1
        file = files[at]
        empty = True
        for row in articles_of(files[at:end]) if articles[at] else READERS[ending](file):
            empty = False
            yield row
        check(not empty, f"{file}: has no rows; must have one at least")
        at = end


def stamps(files: Sequence[str]) -> list[tuple[int, int]]:
    """Size and time of change of each file, by which a cache knows that it is the same."""
    return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]


def comma_separated_rows(file: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV file by the names in its header; RFC 4180, so that quoted values may hold anything.

    Where numbers have commas, spreadsheets put semicolons in their place, and some programs put tabs: what parts the
    header parts the rows.
    """
    header = next((line for line in lines_of(file) if line.strip("\r\n")), "")
    parting = (mark for mark in DELIMITERS if len(next(csv.reader([header], delimiter=mark))) > 1)
    return _named(file, _quoted(file, next(parting, DELIMITERS[0])))


def tab_separated_rows(file: str) -> Iterator[dict[str, str]]:
    """Rows of a TSV file by the names in its header.

    Most programs write tabs between values as they are, and a quote is a letter; some quote as in CSV. A file is of the
    first kind if each of its lines has as many values as the header, and the header is not quoted.
    """
    _check_not_tagged(file)
    header = next((line for line in lines_of(file) if line.strip("\r\n")), "")
    widths = {line.count("\t") for line in lines_of(file) if line.strip("\r\n")}
    if len(widths) > 1 or header.startswith(QUOTE):
        return _named(file, _quoted(file, "\t"))
    plain = ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines_of(file), 1))
    return _named(file, ((number, [_unquoted(value) for value in row]) for number, row in plain if row != [""]))


def paragraphs(file: str) -> Iterator[dict[str, str]]:
    """Paragraphs of a text file, which lines part that hold nothing but blanks; in the column ``text``."""
    _check_not_tagged(file)
    paragraph: list[str] = []
    for line in lines_of(file):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield {"text": "".join(paragraph).rstrip("\r\n")}
            paragraph = []
    if paragraph:
        yield {"text": "".join(paragraph).rstrip("\r\n")}


def hold_articles(files: Sequence[str]) -> list[bool]:
    """Of each text file, whether it holds articles as WikiText's own files do, or goes on with one of a file before.

    It does if the first line that is not blank is the title of an article, `` = Title = `` with a blank line behind.
    """
    found: list[bool] = []
    for file in files:
        found.append(found[-1:] == [True] or next(_titled(lines_of(file), skip_blanks=True), ("", False))[1])
    return found


def articles_of(files: Sequence[str]) -> Iterator[dict[str, str]]:
    """The articles of WikiText's own files, as they stand there; in the column ``text``.

    Each begins with its title, and the last of a file goes on in the next. Joined, they are the text of the files.
    """
    article: list[str] = []
    for line, is_title in chain.from_iterable(_titled(lines_of(file)) for file in files):
        if is_title and any(map(str.strip, article)):
            yield {"text": "".join(article)}
            article = []
        article.append(line)
    if any(map(str.strip, article)):
        yield {"text": "".join(article)}


def _titled(lines: Iterator[str], skip_blanks: bool = False) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is an article's title: blank lines are around it, which equations have not."""
    before, line = "", next(lines, None)
    while line is not None:
        after = next(lines, None)
        is_title = TITLE.fullmatch(line) is not None and not before.strip() and not (after or "").strip()
        if line.strip() or not skip_blanks:
            yield line, is_title
        before, line = line, after


def tagged_sentences(file: str) -> Iterator[dict[str, list[str]]]:
    """Sentences of a file as those of CoNLL's tasks, in the columns ``tokens`` and ``ner_tags``.

    A line has a word, and behind it, with whatever between them, its tag; blank lines part sentences. Lines
    ``-DOCSTART-`` and comments before a sentence, such as ``# id = 7``, are none of it.
    """
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(chain(lines_of(file), [""]), 1):
        values = _values(line)
        if not values:
            if words:
                yield {"tokens": words, "ner_tags": tags}
            words, tags = [], []
            continue
        is_comment = not words and values[0].startswith("#") and any("=" in value for value in values)
        if is_comment or values[0] == "-DOCSTART-":
            continue
        check(len(values) > 1, f"{file}: line {number}: has one value; must be a word, and its tag behind it")
        check(
            len(values) < 10 or not values[0].isdecimal(),
            f"{file}: line {number}: begins with a word's number, as those of CoNLL-U do; must begin with the word",
        )
        words.append(values[0])
        tags.append(values[-1])


def _values(line: str) -> list[str]:
    """Those of a line that tabs or blanks part."""
    line = line.strip()
    return [value.strip() for value in line.split("\t")] if "\t" in line else line.split()


def _check_not_tagged(file: str) -> None:
    """Raise ``ConfigError`` for words with their tags, which are neither paragraphs nor rows with a header."""
    first = takewhile(str.strip, dropwhile(lambda line: not line.strip(), lines_of(file)))
    rows = [_values(line) for line in islice(first, 100)]
    is_tagged = len(rows) > 1 and all(len(row) > 1 and TAG.fullmatch(row[-1]) for row in rows)
    check(not is_tagged, f"{file}: has a word and its tag in each line; must end in .conll to be read so")


READERS: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {
    ".csv": comma_separated_rows,
    ".tsv": tab_separated_rows,
    ".txt": paragraphs,
    **dict.fromkeys((".conll", ".iob", ".iob2", ".bio"), tagged_sentences),
}


def check_decodable(file: str) -> None:
    """Raise ``ConfigError`` unless a file is UTF-8."""
    with fsspec.open(file, "rb", compression="infer") as opened:
        _check_lines(opened, file)


def json_fault(file: str) -> str | None:
    """What is wrong with a file of JSON, or of JSON lines; None if each line, or the whole, can be read."""
    number = 0
    try:
        for line in lines_of(file):
            number += 1
            if line.strip():
                json.loads(line)
    except json.JSONDecodeError as fault:
        with fsspec.open(file, "rb", compression="infer") as opened:
            try:
                json.load(opened)
            except ValueError:
                return f"{file}: line {number}: not JSON ({fault})"
    except ConfigError as fault:
        return str(fault)
    return None


def _named(file: str, numbered: Iterator[tuple[int, list[str]]]) -> Iterator[dict[str, str]]:
    """Rows by the names in the first of them, after checking that each has as many values."""
    _, header = next(numbered, (0, None))
    check(header is not None, f"{file}: is empty; must begin with a line of column names")
    assert header is not None
    header = [name.strip() for name in header]
    twice = sorted({name for name in header if header.count(name) > 1})
    check(not twice, f"{file}: line 1: the column {', '.join(map(repr, twice))} stands there twice")
    for number, row in numbered:
        check(
            len(row) == len(header),
            f"{file}: line {number}: has {len(row)} values; must be {len(header)}, as in the header "
            f"({', '.join(header)}); a value with the delimiter in it must be quoted",
        )
        yield dict(zip(header, row, strict=True))


def _quoted(file: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of the line that each begins in; blank lines between them are none."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's own limit
    reader = csv.reader(lines_of(file), delimiter=delimiter, strict=True)
    begins = 1
    try:
        for row in reader:
            if row:
                yield begins, row
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{file}: line {begins}: a quote is out of place ({error}); a value with a quote or a line's end in it "
            "must be quoted, and quotes in it doubled"
        ) from error


def _unquoted(value: str) -> str:
    """What a value that is quoted as in CSV says; any other as it is."""
    inside = value[1:-1]
    if len(value) > 1 and value[0] == value[-1] == QUOTE and QUOTE not in inside.replace(QUOTE * 2, ""):
        return inside.replace(QUOTE * 2, QUOTE)
    return value


def lines_of(file: str) -> Iterator[str]:
    """The lines of a file, with their ends; raises ``ConfigError`` where one is not UTF-8."""
    with fsspec.open(file, "rb", compression="infer") as opened:
        try:
            # newline="": a line's end stays as it is, also inside quotes
            yield from io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
        except UnicodeDecodeError:
            check_decodable(file)
            raise


def lines_in(content: bytes, name: str) -> Iterator[str]:
    """The same of what ``name`` gave; the ends of lines are what they are in a file."""
    _check_lines(io.BytesIO(content), name)
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")


def _check_lines(lines: Iterable[bytes], name: str) -> None:
    for number, line in enumerate(lines, 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{name}: line {number}: not UTF-8; save it as UTF-8") from None
