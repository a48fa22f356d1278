"""The command reference, made from the commands' own help.

``python -m shardkv.cli.reference > docs/reference/commands.md`` writes it.
A test compares the page with what this makes, so that the page cannot fall behind.
"""

from collections.abc import Iterator
from typing import Final

import click

from shardkv.cli.root import shardkv

WIDTH: Final = 100
INTRODUCTION: Final = r"""# Commands

Made from the commands' own help; `shardkv COMMAND --help` shows the same.

**Where the cluster is.** `--connect` takes any node's address, or several with commas, and falls back to the
environment variable `SHARDKV_CONNECT`.

**Keys and values** are UTF-8 with two escapes, `\xNN` for a byte and `\\` for a backslash, or base64 with `--base64`.
What is printed can be typed back in, behind `--` if it begins with `-` and is no number.

**JSON.** With `--json` a command prints one document on stdout; progress and logs go to stderr. Versions are decimal
strings, for they exceed 2⁵³. A field that is not UTF-8 is renamed with `_base64`. An unbounded end is null.

**Exit codes.**

| code | means |
| --- | --- |
| 0 | done |
| 1 | the cluster answered with an error, the key is absent, or something else failed |
| 2 | wrong usage |
| 3 | the cluster could not be reached in time; a write was certainly not applied |
| 4 | the outcome of a write is unknown |
| 130 | interrupted |

**Comparing with etcd** is a module of its own: `python -m shardkv_bench compare --help`.
"""


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with the words that name it, groups before what they hold."""
    context = click.Context(shardkv, info_name="shardkv")
    yield "shardkv", shardkv
    for name in shardkv.list_commands(context):
        command = shardkv.get_command(context, name)
        assert command is not None, name
        yield f"shardkv {name}", command
        if isinstance(command, click.Group):
            for inner, each in command.commands.items():
                yield f"shardkv {name} {inner}", each


def help_of(name: str, command: click.Command) -> str:
    """What ``--help`` shows, at a fixed width."""
    context = click.Context(
        command,
        info_name=name,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )
    return command.get_help(context)


def page() -> str:
    """The whole page, as Markdown."""
    parts = [f"\n## {name}\n\n```text\n{help_of(name, command)}\n```\n" for name, command in commands()]
    return INTRODUCTION + "".join(parts)


if __name__ == "__main__":
    click.echo(page(), nl=False)
