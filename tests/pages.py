"""The pages, README.md and what is in docs/ above all, as the tests read them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The file.
        language: What the fence says.
        line: The number of its first line.
        text: Its lines.
    """

    page: Path
    language: str
    line: int
    text: str

    @property
    def file(self) -> str | None:
        """The path that its first line, a comment, names; None if it names none."""
        named = re.match(r"# ([\w/]+\.\w+)\n", self.text)
        return named[1] if named else None


def name_of(page: Path) -> str:
    """A page's path from the root of the project."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of one language, first to last."""
    text = page.read_text()
    return [
        Block(page, language, text[: found.start(2)].count("\n") + 1, found[2])
        for found in _FENCED.finditer(text)
        if found[1] == language
    ]


def write_files(page: Path, folder: Path) -> None:
    """Write the blocks whose first line names a file where they say, in ``folder``."""
    for language in ("python", "yaml"):
        for block in blocks(page, language):
            if block.file is not None:
                (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
                (folder / block.file).write_text(block.text)


def commands(page: Path) -> list[list[str]]:
    """The words of each line in the page's blocks of shell commands."""
    lines = (line for block in blocks(page, "bash") for line in block.text.replace("\\\n", "").splitlines())
    return [shlex.split(line) for line in lines]


def arguments(page: Path) -> list[list[str]]:
    """What follows ``python main.py`` in each command that begins so."""
    return [words[2:] for words in commands(page) if words[:2] == ["python", "main.py"]]


def prose(page: Path) -> str:
    """A page's text without its fenced blocks."""
    return _FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What a link can have behind ``#``: the headings, as forges name them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return set(found)


def links(page: Path) -> list[str]:
    """Where the page's links and pictures lead, those to other sites left out."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in found if not re.match(r"[a-z]+:", link)]
