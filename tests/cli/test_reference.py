"""The command reference keeps up with the commands."""

from pathlib import Path

from shardkv.cli.reference import commands, page

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "commands.md"


def test_the_command_reference_is_what_the_commands_say() -> None:
    """Make it anew with: python -m shardkv.cli.reference > docs/reference/commands.md"""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_command_of_the_contract_is_in_the_reference() -> None:
    """DESIGN 2.2."""
    names = {name.removeprefix("shardkv ") for name, _ in commands()}
    assert names >= {
        *("node", "demo", "shell", "get", "put", "del", "scan", "cas", "incr", "delete-range", "import", "export"),
        *("status", "nodes", "ranges", "leader", "admin split", "admin transfer", "admin snapshot", "bench run"),
        "completion",
    }
