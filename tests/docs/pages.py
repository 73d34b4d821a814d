"""The pages that a newcomer reads, taken apart: code blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / page for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:smolcluster|make) [^`]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language (perhaps none) and its text."""

    page: Path
    language: str
    text: str


@dataclass(frozen=True)
class Session:
    """One command of a console block, and what the page says it prints."""

    page: Path
    command: list[str]
    output: str


def name(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks in one of these languages."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(page, language, text) for language, text in found if language in languages]


def sessions(page: Path) -> Iterator[Session]:
    """What stands behind a `$` in console blocks."""
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            yield Session(page, shlex.split(line), output)


def commands(page: Path) -> list[list[str]]:
    """Every command line of ours, in blocks and in the text, that begins with `smolcluster` or `make`."""
    lines = [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    lines += [line for line in _INLINE.findall(prose(page)) if not is_mention(line)]
    words = [shlex.split(line, comments=True) for line in lines] + [session.command for session in sessions(page)]
    found = []
    for line in words:
        for program in ("smolcluster", "make"):  # also behind a launcher: torchrun … smolcluster train …
            if program in line:
                found.append(line[line.index(program) :])
                break
    return found


def mentions(page: Path) -> list[list[str]]:
    """The names of commands in the text, without options: `smolcluster node`."""
    return [line.split() for line in _INLINE.findall(prose(page)) if is_mention(line)]


def is_mention(line: str) -> bool:
    """Whether it only names a command of ours."""
    return line.startswith("smolcluster") and " -" not in line


def prose(page: Path) -> str:
    """The page without its blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub and MkDocs make them."""
    headings = _HEADING.findall(prose(page))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip()) for heading in plain}
