"""The page about troubleshooting has every message, and no other."""

import re
from functools import cache

import messages
import pages

PAGE = pages.ROOT / "docs" / "troubleshooting.md"


def quotes():
    """What the first column of each table quotes."""
    rows = re.findall(r"^\| (.*?) \| ", PAGE.read_text(), flags=re.MULTILINE)
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row.partition(" (behind")[0])]


@cache
def pattern(quote):
    return re.compile(".+?".join(re.escape(part) for part in quote.split(messages.ANY)), flags=re.DOTALL)


def begins(quote, text):
    """Whether ``text`` can begin as a quote does, in which … stands for anything."""
    return pattern(quote).match(text) is not None


def test_a_quote_is_the_beginning_of_a_text():
    assert begins("…=…: must be positive", "batch_size=…: must be positive")
    assert begins("k=…: must be", "k=…: must be at least 1")
    assert not begins("k=…: must be", "…=…: must be positive")
    assert not begins("must be positive", "batch_size=…: must be positive")


def test_what_is_quoted_is_said():
    texts = messages.texts()
    assert not [quote for quote in quotes() if not any(begins(quote, text) for text in texts)]


def test_what_is_said_is_on_the_page():
    found = quotes()
    assert not [message for message in messages.messages() if not any(begins(quote, message) for quote in found)]
