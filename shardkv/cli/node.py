"""``shardkv node``: one node in the foreground.

Here: flags, variables and the file become a configuration; signals; logging; the watch on a parent process. What a
node is and does lives in ``shardkv.server``.
"""

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click
import trio

from shardkv.cli import exits
from shardkv.cli.root import Example
from shardkv.config import SETTINGS, Kind, NodeConfig, Setting, load_node_config
from shardkv.errors import ConfigError
from shardkv.program import let_go_of, tell

MAIN_SETTINGS: Final = ("name", "data", "listen", "advertise", "admin", "bootstrap", "join", "label", "log_level")
"""Shown first in the help; the rest is tuning."""

STOP_SECONDS_MAX: Final = 9.0
"""From the signal to the end of the process."""


def _option(setting: Setting) -> Callable[[Any], Any]:
    default = "" if setting.default in (None, ()) or not isinstance(setting.default, int | str) else setting.default
    shown = f"  [default: {default}]" if default not in ("", False) else ""
    if setting.kind is Kind.SWITCH:
        return click.option(setting.flag, setting.name, is_flag=True, default=None, help=setting.help)
    metavar = setting.metavar or ("|".join(setting.choices) if setting.choices else setting.kind.value.upper())
    return click.option(
        setting.flag,
        setting.name,
        multiple=setting.kind in (Kind.ADDRESSES, Kind.LABELS),
        metavar=metavar,
        help=setting.help + shown,
    )


def _options(command: Callable[..., None]) -> Callable[..., None]:
    ordered = [*MAIN_SETTINGS, *(name for name in SETTINGS if name not in MAIN_SETTINGS)]
    for name in reversed(ordered):
        command = _option(SETTINGS[name])(command)
    return command


@click.command(
    cls=Example,
    example="""
    shardkv node --name n1 --data ./n1 --listen 127.0.0.1:7001 --bootstrap
    shardkv node --name n2 --data ./n2 --listen 127.0.0.1:7002 --join 127.0.0.1:7001
    SHARDKV_NAME=n3 SHARDKV_JOIN=127.0.0.1:7001 shardkv node --config n3.toml
    """,
)
@_options
@click.option("--config", metavar="FILE.toml", help="A TOML file with these settings; docs/quickstart.md shows one.")
@click.option("--parent-pipe", type=int, hidden=True, help="End at once when this inherited pipe is closed.")
def node(config: str | None, parent_pipe: int | None, **flags: Any) -> None:
    """Run one node in the foreground.

    Prints `ready NAME ADDRESS` on stdout once it serves; logs go to stderr. SIGTERM or SIGINT drains and stops it
    cleanly, a second one ends it at once. Started again on the same data it carries on, with or without --bootstrap
    or --join. Every option can also be given as SHARDKV_<OPTION> in the environment or in the TOML file; an option
    wins over the environment, the environment over the file.
    """
    if parent_pipe is not None:
        _end_with_parent(parent_pipe)
    loaded = _load(flags, config or os.environ.get("SHARDKV_CONFIG"))
    with _log_to_stderr(loaded.log_level):
        _allow_open_files()
        trio.run(_run, loaded)


def _load(flags: dict[str, object], config_file: str | None) -> NodeConfig:
    text = None
    if config_file:
        try:
            text = Path(config_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise ConfigError(f"the configuration file {config_file} cannot be read: {problem}") from None
    loaded = load_node_config(flags, os.environ, text, config_file or "")
    # Relative to where the command was typed; the node itself knows only absolute paths.
    return replace(loaded, data=str(Path(loaded.data).absolute()))


async def _run(config: NodeConfig) -> None:
    # This process is the node and nothing else, so the node decides when garbage is collected. What is loaded and put
    # together until it serves stays: to look for garbage in it takes time and finds none.
    gc.disable()
    from shardkv.environment.real import real_environment
    from shardkv.server import run_node

    stop = trio.Event()
    with _signals(stop):
        await run_node(config, real_environment(), ready=_print_ready, stop=stop, collector=gc)


def _print_ready(name: str, address: str) -> None:
    """Say so on stdout. Where nobody can hear it, the node serves all the same."""
    with contextlib.suppress(OSError):
        sys.stdout.write(f"ready {name} {address}\n")
    let_go_of(sys.stdout)


@contextlib.contextmanager
def _signals(stop: trio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set ``stop``; a second one ends the process at once, even if the loop is stuck.

    A stop that takes too long is cut short: on a slow disk the engine's last flush may take minutes, and all that it
    would write is in the log.
    """
    token = trio.lowlevel.current_trio_token()
    received = 0
    watch = threading.Timer(STOP_SECONDS_MAX, _end_in_time)
    watch.daemon = True

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received > 1:
            os._exit(128 + number)
        watch.start()
        token.run_sync_soon(stop.set, idempotent=True)

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        watch.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_in_time() -> None:
    tell(f"stopping took {STOP_SECONDS_MAX:g} s: the rest is in the log, and is made up for at the next start")
    os._exit(exits.DONE)


def _end_with_parent(pipe: int) -> None:
    """End this process at once when the other end of ``pipe`` closes, which a parent's death does, however it dies.

    A thread, because the loop may be busy; not PR_SET_PDEATHSIG, which fires when the starting *thread* ends.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(pipe, 1):
                pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _allow_open_files() -> None:
    """Take all open files that the system lets this process have.

    The usual soft limit, 1,024, is for programs that call select(). A quarter of the clients that a node takes use
    it up; then no other node gets in, and the log cannot begin its next file, which ends the node.
    """
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems name a limit that they do not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def _log_to_stderr(level: str) -> Iterator[None]:
    """All logs go to stderr, without waiting for it; what was logged in the context is written when it ends."""
    import logging

    import structlog

    from shardkv.cli.log_output import LogOutput

    numeric = logging.getLevelName(level.upper())
    output = LogOutput(sys.stderr.fileno(), sys.stderr.encoding)
    file: Any = output  # of a text file it has what the loggers use
    logging.basicConfig(stream=file, level=max(numeric, logging.WARNING), format="%(levelname)s %(name)s %(message)s")
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=terminal)
            if terminal
            else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.WriteLoggerFactory(file=file),
        cache_logger_on_first_use=True,
    )
    try:
        yield
    finally:
        output.close()
