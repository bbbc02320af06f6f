"""A tokenizer for the questions."""

import pytest
import tiny
from squad_files import SPECIAL, WORDS


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tok"), WORDS, SPECIAL)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return tiny.transformers.AutoTokenizer.from_pretrained(tokenizer_path)
