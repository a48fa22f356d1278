"""What the documentation and the code refer to exists: pages, headings, and what both name by number."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from shardkv import errors
from shardkv.cli.reference import commands
from shardkv.config import SETTINGS
from shardkv.errors import ShardKVError
from shardkv.simulation.command import simulation
from shardkv.simulation.faults import KINDS
from shardkv.simulation.workload import WORKLOADS
from shardkv.storage import directory, record
from shardkv_bench.command import bench
from tests.simulation.bugs import ALL

ROOT = Path(__file__).parents[1]
FOLDERS = ("shardkv", "client", "placement", "bench", "tests")
GUIDES = sorted((ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
"""What is true now, unlike a line of the changelog."""
PAGES = sorted((*GUIDES, ROOT / "CHANGELOG.md"))

LINK = re.compile(r"\]\(([^)\s]+)\)")
TRAPS = re.compile(r"\btraps? ([0-9]+(?:(?:, | and )[0-9]+)*)|\btest_trap_([0-9]+)", re.IGNORECASE)
SECTIONS = re.compile(r"\bDESIGN §?([0-9]+(?:\.[0-9]+)?)")
PACKAGES = sorted(each.name for each in (ROOT / "shardkv").iterdir() if (each / "__init__.py").exists())
PATH = re.compile(rf"(?<![\w./])(?:{'|'.join((*FOLDERS, 'docs', *PACKAGES))})/\w[\w./-]*\w")
"""A file or folder; those of the package ``shardkv`` without its name, modules without ``.py``: ``raft/lease``."""
MODULE = re.compile(r"\bpython -m ([\w.]+)")
DOTTED = re.compile(r"(?<![\w./])shardkv(?:_client|_placement|_bench)?(?:\.[A-Za-z_]\w*)+")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*\w")
VARIABLE = re.compile(r"\bSHARDKV_[A-Z_]+")


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


@cache
def code(*folders: str) -> str:
    """Every module, or those of some folders, as one text."""
    return "\n".join(
        path.read_text() for folder in folders or FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))
    )


@cache
def options() -> set[str]:
    """All that the product's commands take."""
    found = {"--help", "--shardkv-seed", *(setting.flag for setting in SETTINGS.values())}
    for command in (*(each for _, each in commands()), simulation, *bench.commands.values()):
        for parameter in command.params:
            found.update(parameter.opts, parameter.secondary_opts)
    return found


def names_something(path: str) -> bool:
    """Whether there is such a file, folder or module, or a name that is defined in a module: ``ranges/split.adopt``."""
    module, _, name = path.rpartition(".")
    for root in (ROOT, ROOT / "shardkv"):
        if (root / path).exists() or (root / f"{path}.py").exists():
            return True
        if (root / f"{module}.py").exists():
            return (
                re.search(rf"^(?:def|class|async def) {name}\b", (root / f"{module}.py").read_text(), re.M) is not None
            )
    return False


def is_importable(dotted: str) -> bool:
    """Whether it is a module, or what is to be had from one."""
    name, rest = dotted, []
    while name:
        try:
            found: object = importlib.import_module(name)
        except ModuleNotFoundError:
            name, _, last = name.rpartition(".")
            rest.insert(0, last)
            continue
        for each in rest:
            found = getattr(found, each, None)
        return found is not None
    return False


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_modules_options_and_variables_that_a_page_names_exist(page: Path) -> None:
    text, source = page.read_text(), code()
    flags = options() | {
        flag for quoted in re.findall(r"\"(--[^\"]*)\"", code("tests")) for flag in OPTION.findall(quoted)
    }
    missing = [path for path in PATH.findall(text) if not names_something(path)]
    missing += [module for module in MODULE.findall(text) if find_spec(module) is None]
    missing += [name for name in DOTTED.findall(text) if not is_importable(name)]
    missing += [option for option in OPTION.findall(text) if option not in flags]
    variables = {setting.variable for setting in SETTINGS.values()}
    missing += [name for name in VARIABLE.findall(text) if name not in variables and f'"{name}"' not in source]
    assert not missing, f"{page.relative_to(ROOT)} names {missing}, which are not there"


@pytest.mark.parametrize("folder", ["shardkv", "client", "placement"])
def test_options_that_a_message_or_a_docstring_names_exist(folder: str) -> None:
    assert set(OPTION.findall(code(folder))) <= options()


def test_what_the_quick_start_says_of_the_log_is_what_nodes_log() -> None:
    rows = re.findall(r"^\| (`.*`) in a node's log \|", (ROOT / "docs/quickstart.md").read_text(), re.MULTILINE)
    phrases = [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]
    assert len(phrases) >= 5
    for phrase in phrases:
        begins = re.split(r"[0-9]", phrase)[0]
        assert re.search(rf'"{re.escape(begins)}', code("shardkv")), f"no node logs {phrase!r}"


def first_cells(page: str, heading: str) -> set[str]:
    """What stands in backquotes in the first column of the table that begins with this heading."""
    _, _, after = (ROOT / "docs" / page).read_text().partition(f"\n| {heading} |")
    table = after.partition("\n\n")[0].splitlines()
    return {name for row in table for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def modules_of(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "__main__"}


@pytest.mark.parametrize(
    "page, folder",
    [("internals/raft.md", "shardkv/raft"), ("internals/placement.md", "placement/shardkv_placement")],
)
def test_a_page_about_a_package_has_all_of_its_modules(page: str, folder: str) -> None:
    assert first_cells(page, "module") == modules_of(folder)


@pytest.mark.parametrize(
    "folder",
    [
        *(
            f"shardkv/{name}"
            for name in ("machine", "multiraft", "ranges", "server", "simulation", "transport", "wire")
        ),
        "client/shardkv_client/core",
        "bench/shardkv_bench",
    ],
)
def test_a_package_introduces_all_of_its_modules(folder: str) -> None:
    """Those that do so at all, and nothing that is not there."""
    introduction = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    named = set(re.findall(r"``(\w+)``", introduction))
    packages = {path.parent.name for above in (folder, "shardkv") for path in (ROOT / above).glob("*/__init__.py")}
    assert named - packages | named & modules_of(folder) == modules_of(folder)


def test_the_architecture_has_every_package() -> None:
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    modules = {name.rpartition(".")[2] for layer in layers for name in re.findall(r"[\w.]+", layer)}
    assert {name.rpartition("/")[2] for name in first_cells("architecture.md", "package")} - {"real"} == modules


def test_what_the_simulator_can_do_is_in_its_guide() -> None:
    guide = " ".join((ROOT / "docs/simulation.md").read_text().split())
    workloads, faults = re.findall(
        r"`--workload` \((.*?)\) and `--faults` \(`all`, `none`, or names: `(.*?)`\)", guide
    )[0]
    assert set(re.findall(r"`(\w+)`", workloads)) == set(WORKLOADS)
    assert faults.split(", ") == list(KINDS)
    helpers = {"failing_window", "linearizability", "violation"}
    assert first_cells("simulation.md", "checker") == modules_of("shardkv/simulation/checkers") - helpers


def test_every_deliberate_bug_is_in_the_table_with_the_seed_that_finds_it() -> None:
    page = (ROOT / "docs/internals/simulation.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*?) \| ([0-9]+) \|", page, re.MULTILINE)
    assert {name: (rule, int(seed)) for name, rule, seed in rows} == {
        name: (bug.breaks, bug.seed) for name, bug in ALL.items()
    }


def test_the_formats_on_disk_are_those_of_their_page() -> None:
    page = (ROOT / "docs/internals/storage.md").read_text()
    assert f"| 8 | 4 | format of the whole directory, {directory.FORMAT} |" in page
    assert f"kind (1 byte: {record.RecordKind.TURN} turn, {record.RecordKind.CHECKPOINT} checkpoint)" in page
    assert f"format (1 byte: {record.FORMAT})" in page


def test_the_readme_says_what_the_benchmarks_found() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    found = {}
    for leaders, section in zip(("one", "spread"), re.split(r"^## ", page, flags=re.MULTILINE)[1:], strict=True):
        workload = inflight = ""
        for row in re.findall(r"^\|(.*)\|$", section, re.MULTILINE):
            cells = [cell.strip() for cell in row.split("|")]
            if len(cells) == 10 and cells[2] in ("shardkv", "etcd"):
                workload, inflight = cells[0] or workload, cells[1] or inflight
                found[leaders, workload, inflight, cells[2]] = cells[4], *cells[8:]

    def figure(leaders: str, workload: str, inflight: str, place: int, system: str = "shardkv") -> str:
        return f"{float(found[leaders, workload, inflight, system][place]):.{1 if place else 2}f}"

    gets = sorted(figure("one", "get", inflight, 1) for inflight in ("16", "64", "256"))
    costs = sorted({figure("one", "put", inflight, 2) for inflight in ("64", "256")})
    readme = " ".join((ROOT / "README.md").read_text().split())
    for claim in (
        f"with one range, {figure('one', 'put', '64', 1)} and {figure('one', 'put', '256', 1)} times etcd's puts",
        f"for {' to '.join(costs)} of its server CPU",
        f"{gets[0]} to {gets[-1]} times its linearizable gets from 16 in flight on",
        f"takes {figure('one', 'put', '1', 0)} ms where etcd's takes {figure('one', 'put', '1', 0, 'etcd')}",
        f"come to {figure('spread', 'put', '64', 1)} and {figure('spread', 'put', '256', 1)} times etcd's",
        f"at 16 in flight to {figure('spread', 'put', '16', 1)}",
    ):
        assert claim in readme
