"""The ``shardkv`` command: a group that loads each subcommand's module when it is named, and the exit codes.

Exit codes: 0 done, 1 the cluster answered with an error or the key is absent, 2 wrong usage, 3 the cluster could not
be reached in time, 4 outcome unknown, 130 interrupted. Commands raise; only this module turns errors into codes.
"""

import importlib
import io
import re
import sys
from typing import Any, Final

import click

from shardkv.cli import exits, text
from shardkv.cli.standard_files import open_standard_files
from shardkv.program import let_go_of, tell

COMMANDS: Final[dict[str, str]] = {
    "node": "shardkv.cli.node:node",
    "demo": "shardkv.cli.demo:demo",
    "shell": "shardkv.cli.shell:shell",
    "get": "shardkv.cli.data:get",
    "put": "shardkv.cli.data:put",
    "del": "shardkv.cli.data:delete",
    "scan": "shardkv.cli.data:scan",
    "cas": "shardkv.cli.data:cas",
    "incr": "shardkv.cli.data:incr",
    "delete-range": "shardkv.cli.data:delete_range",
    "import": "shardkv.cli.bulk:import_",
    "export": "shardkv.cli.bulk:export",
    "status": "shardkv.cli.cluster:status",
    "nodes": "shardkv.cli.cluster:nodes",
    "ranges": "shardkv.cli.cluster:ranges",
    "leader": "shardkv.cli.cluster:leader",
    "admin": "shardkv.cli.admin:admin",
    "bench": "shardkv.cli.bench:bench",
    "completion": "shardkv.cli.completion:completion",
}
"""Command name to ``module:attribute``, in the order that ``--help`` shows."""


_NEGATIVE_NUMBER: Final = re.compile(r"-([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Example(click.Command):
    """A command whose help ends with an example: ``example=`` holds one or more command lines.

    A negative number is an argument, no option: values, and what is added to them, are often numbers.
    """

    def __init__(self, *args: Any, example: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.example = example

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        self._refuse_unknown(ctx, args)
        ctx.ignore_unknown_options = True  # only numbers are left
        return super().parse_args(ctx, args)

    def _refuse_unknown(self, ctx: click.Context, args: list[str]) -> None:
        options = {
            name: each
            for each in self.get_params(ctx)
            if isinstance(each, click.Option)
            for name in (*each.opts, *each.secondary_opts)
        }
        rest = iter(args)
        for typed in rest:
            if typed == "--":
                return
            if not typed.startswith("-") or typed == "-" or _NEGATIVE_NUMBER.fullmatch(typed):
                continue
            name, given, _ = typed.partition("=")
            option, short = options.get(name), options.get(typed[:2])
            if option is None and short is not None and not short.is_flag:
                continue  # its value stands right behind it
            if option is None:
                hint = "What begins with - and is no option goes behind --."
                raise click.NoSuchOption(name, f"No such option {name!r}. {hint}", options, ctx)
            if not given and not option.is_flag:
                next(rest, None)  # its value

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(self.example if ctx.obj is None else _in_shell(self.example), formatter)


def _in_shell(example: str) -> str:
    """As it is typed in the shell, which is the program, is connected, and redirects nothing."""
    lines = [line for line in example.splitlines() if " < " not in line]
    return re.sub(r"shardkv (admin )?| --connect \S+", "", "\n".join(lines))


def write_example(example: str, formatter: click.HelpFormatter) -> None:
    lines = [line.strip() for line in example.strip().splitlines()]
    if lines:
        with formatter.section("Example" if len(lines) == 1 else "Examples"):
            for line in lines:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class ExampleGroup(click.Group):
    """A group whose help ends with an example."""

    command_class = Example

    def __init__(self, *args: Any, example: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(self.example, formatter)


class Root(ExampleGroup):
    """The outermost group: knows its commands by name only, and is where every error becomes an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), target
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            # What is still buffered may fail to be written, and that is this command's failure. In the shell it also
            # has to come before what the next command writes, be it below the text layer.
            sys.stdout.flush()
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except BaseException as error:
            code = exits.code_of(error)
            if code is None:
                raise
            tell(exits.message_of(error))
            ctx.exit(code)


@click.group(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    example="shardkv demo\nshardkv put --connect 127.0.0.1:7001 greeting hello",
)
@click.version_option(package_name="shardkv", prog_name="shardkv")
def shardkv() -> None:
    """shardkv: a range-sharded, strictly serializable key-value database."""


def main(arguments: list[str] | None = None) -> None:
    """The console script. Ends the process."""
    open_standard_files()
    stdout, stderr = sys.stdout, sys.stderr  # click puts others in their place that do not say that a pipe is broken
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors=text.ESCAPES)
    try:
        shardkv(arguments, prog_name="shardkv")
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    except OSError as error:  # before or after the command itself: the group's own help, the version, the completion
        if not isinstance(error, BrokenPipeError):
            tell(exits.message_of(error))
        sys.exit(exits.FAILED)
    finally:
        let_go_of(stdout)
        let_go_of(stderr)
