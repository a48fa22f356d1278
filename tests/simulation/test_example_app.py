"""The fixture as users meet it: a small application with its own tests, outside of this tree, under several plugins."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

APPLICATION = Path(__file__).parent / "example_app"
ROOT = Path(__file__).parents[2]
PLUGIN = "shardkv.simulation.pytest_plugin"


def run_pytest(
    directory: Path, *arguments: str, plugins: Sequence[str] = (PLUGIN,)
) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))},
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": str(directory),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    chosen = [part for plugin in plugins for part in ("-p", plugin)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "--rootdir", str(directory), *chosen, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_application_outside_of_the_package_is_tested_with_faults(tmp_path: Path) -> None:
    application = tmp_path / "application"
    shutil.copytree(APPLICATION, application, ignore=shutil.ignore_patterns("__pycache__"))
    found = run_pytest(application, "tests", "-p", "no:cacheprovider")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "5 passed" in found.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/simulation.md"])
def test_the_tests_that_a_page_shows_run(tmp_path: Path, page: str) -> None:
    """Without pytest-trio, which neither page asks for."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    shown = [each for each in examples if "shardkv_cluster" in each]
    assert shown, f"{page} shows none"
    shutil.copytree(APPLICATION / "orders", tmp_path / "orders", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "test_it.py").write_text("\n\n".join(["import pytest", *shown]))
    found = run_pytest(tmp_path, "-p", "no:cacheprovider")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{len(shown)} passed" in found.stdout


FAILING = """
async def test_that_fails(shardkv_cluster):
    async with shardkv_cluster.client() as kv:
        await kv.put(b"k", b"v")
    assert shardkv_cluster.now < 0
"""


def test_a_failure_names_its_seed_and_shows_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(FAILING)
    found = run_pytest(tmp_path, "--shardkv-seed", "seventeen")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "--shardkv-seed 'seventeen'" in found.stdout
    assert "AssertionError" in found.stdout


ENDLESS = """
import pytest
import trio


@pytest.mark.shardkv_cluster(virtual_seconds_max=30, nodes=1)
async def test_that_waits_for_nothing(shardkv_cluster):
    await trio.Event().wait()
"""


def test_a_test_that_waits_for_what_never_comes_ends(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(ENDLESS)
    found = run_pytest(tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "the test did not end within 30 s" in found.stdout


MISTAKEN = """
import pytest


@pytest.mark.shardkv_cluster(node=5)
async def test_with_an_option_that_there_is_not(shardkv_cluster):
    pass


@pytest.mark.shardkv_cluster(nodes=0)
async def test_without_nodes(shardkv_cluster):
    pass
"""


def test_a_marker_that_makes_no_cluster_is_told_what_makes_one(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(MISTAKEN)
    found = run_pytest(tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "TypeError: a simulated cluster takes no node; of each node: " in found.stdout
    assert "ValueError: a simulated cluster has at least one node" in found.stdout


@pytest.mark.parametrize("trio_mode", ["true", "false"])
def test_the_fixture_gets_on_with_pytest_trio(tmp_path: Path, trio_mode: str) -> None:
    """In its trio mode that takes every coroutine for its own."""
    (tmp_path / "pytest.ini").write_text(f"[pytest]\ntrio_mode = {trio_mode}\n")
    (tmp_path / "test_it.py").write_text(FAILING.replace("now < 0", "now > 0").replace("_fails", "_passes"))
    found = run_pytest(tmp_path, plugins=("pytest_trio.plugin", PLUGIN))
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_suite_without_the_fixture_loads_nothing_of_it(tmp_path: Path) -> None:
    """Users who have no trio, or no use for a simulation, pay for neither."""
    (tmp_path / "test_it.py").write_text(
        "import sys\n\n\ndef test_it():\n"
        "    heavy = {'trio', 'structlog', 'cbor2', 'shardkv.server', 'shardkv_client'}\n"
        "    assert not heavy & set(sys.modules)\n"
    )
    found = run_pytest(tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_plugin_is_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"shardkv": PLUGIN}
