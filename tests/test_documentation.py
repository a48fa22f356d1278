"""What the documentation and the code refer to exists: pages, headings, and what both name by number."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkv import errors
from shardkv.errors import ShardKVError

ROOT = Path(__file__).parents[1]
FOLDERS = ("shardkv", "client", "placement", "bench", "tests")
PAGES = sorted((ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")))

LINK = re.compile(r"\]\(([^)\s]+)\)")
TRAPS = re.compile(r"\btraps? ([0-9]+(?:(?:, | and )[0-9]+)*)|\btest_trap_([0-9]+)", re.IGNORECASE)
SECTIONS = re.compile(r"\bDESIGN §?([0-9]+(?:\.[0-9]+)?)")


def anchors(page: Path) -> set[str]:
    """What a link may name of a page after ``#``: its headings, as they are written there."""
    headings = [line.lstrip("#").strip() for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def texts() -> Iterator[tuple[Path, str]]:
    """Every page and every module, ours and the tests'."""
    for path in (*PAGES, *(each for folder in FOLDERS for each in sorted((ROOT / folder).rglob("*.py")))):
        yield path.relative_to(ROOT), path.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)} links to {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)} links to {link}: no such heading"


def test_every_trap_that_is_named_by_number_is_explained() -> None:
    known = set(re.findall(r"^\| ([0-9]+) \|", (ROOT / "docs/traps.md").read_text(), re.MULTILINE))
    for path, text in texts():
        for several, one in TRAPS.findall(text):
            for number in re.findall(r"[0-9]+", several or one):
                assert str(int(number)) in known, f"{path} names trap {number}, which docs/traps.md does not know"


def test_every_error_stands_on_its_page_with_its_code() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| ([0-9, –]+) \|", (ROOT / "docs/reference/errors.md").read_text(), re.MULTILINE)
    found: dict[str, int] = {}
    for names, codes in rows:
        first, dash, last = codes.partition("–")
        numbers = list(range(int(first), int(last) + 1)) if dash else [int(code) for code in codes.split(",")]
        found |= zip(re.findall(r"`(\w+)`", names), numbers, strict=True)
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, ShardKVError)]
    assert found == {each.__name__: each.code for each in classes}


def test_every_section_of_the_design_that_is_named_exists() -> None:
    known = set(re.findall(r"^#+ ([0-9]+(?:\.[0-9]+)?)", (ROOT / "docs/design.md").read_text(), re.MULTILINE))
    for path, text in texts():
        for number in SECTIONS.findall(text):
            assert number in known, f"{path} names DESIGN {number}, which docs/design.md does not have"
