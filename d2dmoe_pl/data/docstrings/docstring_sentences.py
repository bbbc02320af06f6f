"""English sentences from the docstrings of installed packages: real text that is there without a download."""

import ast
import hashlib
import importlib.util
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset

from d2dmoe_pl.data.generated_dataset import generated
from d2dmoe_pl.data.own_data_checks import SPLITS
from d2dmoe_pl.errors import ConfigError

STANDARD_LIBRARY = "python"
SEED = 0
HELD_OUT = {"test": 1 / 8, "validation": 1 / 10}  # shares of a package's sentences; training gets the rest
_NO_PROSE = {"dist-packages", "idlelib", "lib2to3", "site-packages", "test", "testing", "tests", "turtledemo"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def sentence_splits(packages: Sequence[str], num_sentences: int) -> dict[str, Dataset]:
    """Training, validation and test sentences, as rows ``text`` and ``labels``, the index of the package; cached.

    The same as long as the same versions of the packages are installed. A file's sentences are all in one split, in
    their order, and sentences that two packages share are in none.

    Args:
        packages: As for :func:`source_files`.
        num_sentences: Sentences a package, an eighth of them to test and a tenth to validate on.

    Raises:
        ConfigError: If a package is not installed, or has too few sentences.
    """
    versions = tuple(fingerprint(source_files(package)) for package in packages)
    rows = generated(collect, packages=tuple(packages), num_sentences=num_sentences, versions=versions)
    split_of = rows["split"]
    rows = rows.remove_columns("split")
    return {name: rows.select([i for i, split in enumerate(split_of) if split == name]) for name in SPLITS}


def source_files(package: str) -> list[Path]:
    """The Python files of an importable package, tests left out, in order of their paths; nothing is imported.

    Args:
        package: Name to import; ``python`` for the standard library.

    Raises:
        ConfigError: If no such package is installed.
    """
    if package == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"packages={package!r}: is not an installed package")
        root = Path(spec.submodule_search_locations[0])
    return sorted(file for file in root.rglob("*.py") if not _NO_PROSE & set(file.relative_to(root).parts))


def fingerprint(files: list[Path]) -> str:
    """Tells whether another version of the files is installed, from their names and sizes."""
    listing = "\n".join(f"{file} {file.stat().st_size}" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def docstrings_in(source: str) -> Iterator[str]:
    """Every docstring of a module's source text, outermost first; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring


def sentences_in(docstring: str) -> Iterator[str]:
    """The English sentences of a docstring: 8 to 40 words, a capital first, a full stop last, mostly letters."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            words = len(sentence.split())
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if (
                8 <= words <= 40
                and sentence[0].isupper()
                and sentence.endswith(".")
                and letters > 0.85 * len(sentence)
                and "---" not in sentence
            ):
                yield sentence


def sentences_by_file(package: str, wanted: int, seed: int) -> Iterator[list[str]]:
    """Sentences new to the package, file by file, the files in an order drawn by ``seed``.

    Args:
        package: As for :func:`source_files`.
        wanted: Stop once there are so many.
        seed: Decides which files come first.
    """
    files = source_files(package)
    random.Random(seed).shuffle(files)
    seen: set[str] = set()
    for file in files:
        if len(seen) >= wanted:
            return
        found = dict.fromkeys(
            sentence
            for docstring in docstrings_in(file.read_text(encoding="utf-8", errors="replace"))
            for sentence in sentences_in(docstring)
            if sentence not in seen
        )
        seen.update(found)
        if found:
            yield list(found)


def collect(packages: Sequence[str], num_sentences: int, **_: object) -> Iterator[dict[str, object]]:
    """Rows ``text``, ``labels`` (index of the package) and ``split``.

    Raises:
        ConfigError: If a package has too few sentences.
    """
    found = {package: list(sentences_by_file(package, num_sentences * 5 // 4, SEED)) for package in packages}
    packages_with = Counter(sentence for files in found.values() for file in files for sentence in file)
    for label, (package, files) in enumerate(found.items()):
        own = [[sentence for sentence in file if packages_with[sentence] == 1] for file in files]
        for split, sentences in deal(own, num_sentences, package).items():
            yield from ({"text": sentence, "labels": label, "split": split} for sentence in sentences)


def deal(files: Sequence[Sequence[str]], num_sentences: int, package: str) -> dict[str, list[str]]:
    """Sentences by split, no file in two of them: test first, then validation, then training.

    Args:
        files: Sentences by file.
        num_sentences: How many to deal out.
        package: To name in errors.

    Raises:
        ConfigError: If there are too few.
    """
    sizes = {name: round(num_sentences * share) for name, share in HELD_OUT.items()}
    sizes["train"] = num_sentences - sum(sizes.values())
    left = iter(files)
    splits = {}
    for name, size in sizes.items():
        sentences: list[str] = []
        while len(sentences) < size:
            file = next(left, None)
            if file is None:
                raise ConfigError(
                    f"num_sentences={num_sentences}: {package!r} has only {sum(map(len, files))}, too few for its "
                    "share of each split"
                )
            sentences.extend(file)
        splits[name] = sentences[:size]
    return splits
