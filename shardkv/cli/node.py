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
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import trio

from shardkv.cli import exits
from shardkv.cli.log_output import LogOutput
from shardkv.cli.root import Example
from shardkv.config import SETTINGS, Kind, NodeConfig, Setting
from shardkv.config_sources import load_node_config
from shardkv.errors import ConfigError
from shardkv.program import let_go_of, tell

MAIN_SETTINGS: Final = ("name", "data", "listen", "advertise", "admin", "bootstrap", "join", "label", "log_level")
"""Shown first in the help; the rest is tuning."""

STOP_SECONDS_MAX: Final = 9.0
"""From the signal to the end of the process."""
CONNECTIONS_MIN: Final = 16
"""With room for fewer a node does not start: it would be deaf to the other nodes, or to its clients."""
ADDRESS_SPACE_BYTES_MIN: Final = 1024 * 1024 * 1024
"""Beside the engine's cache. An idle node has 600 MiB of addresses, a tenth of it in memory: each thread reserves some.
Where the engine gets no more of them, the process is aborted."""
LAST_WORDS_SECONDS: Final = 1.0
"""A process that is cut short waits no longer for whoever reads its stderr."""

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
_HANGUP: Final = signal.SIGHUP
"""The terminal was closed. It stops a node, too, but is neither a first signal nor a second one: where one comes,
another often does, and the end of a session sends SIGTERM as well, before it or after it (SendSIGHUP= of systemd)."""


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

    Prints `ready NAME ADDRESS` on stdout once it serves; logs go to stderr. SIGTERM, SIGINT or the end of its terminal
    (but under nohup) drains and stops it cleanly; a second SIGTERM or SIGINT ends it at once. Started again on the same
    data it carries on, with or without --bootstrap or --join. Every option can also be given as SHARDKV_<OPTION> in the
    environment or in the TOML file; an option wins over the environment, the environment over the file.
    """
    if parent_pipe is not None:
        _end_with_parent(parent_pipe)
    loaded = _load(flags, config or os.environ.get("SHARDKV_CONFIG"))
    with _log_to_stderr(loaded.log_level) as log:
        _allow_open_files(loaded)
        _require_limits(loaded)
        try:
            trio.run(_run, loaded)
        except BaseException as error:  # said here, for whoever reads stderr may be stuck
            code, words = _last_words(error)
            log.write(words)
            raise click.exceptions.Exit(code) from error


def _last_words(error: BaseException) -> tuple[int, str]:
    """The exit code and what the log says of it: one line, or the traceback of a bug."""
    code = exits.code_of(error)
    if code is None:
        return exits.FAILED, "".join(traceback.format_exception(error))
    return code, f"{exits.message_of(error)}\n"


def _load(flags: dict[str, object], config_file: str | None) -> NodeConfig:
    text = None
    if config_file:
        try:
            text = Path(config_file).read_text(encoding="utf-8-sig")  # without the mark that editors on Windows leave
        except (OSError, UnicodeDecodeError) as problem:
            raise ConfigError(f"the configuration file {config_file} cannot be read: {problem}") from None
    loaded = load_node_config(flags, os.environ, text, config_file or "")
    return replace(loaded, data=_absolute(loaded.data))


def _absolute(data: str) -> str:
    """Relative to where the command was typed, or to a home directory; the node itself knows only absolute paths.

    Not by pathlib, to which ``./~`` is the same as ``~``.
    """
    expanded = os.path.expanduser(data)
    if expanded.startswith("~"):
        raise ConfigError(f"data is {data!r}, but no such home directory is known; give the whole path")
    return str(Path(expanded).absolute())


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
    """SIGTERM, SIGINT and SIGHUP set ``stop``; a second SIGTERM or SIGINT ends the process at once, even if the loop is
    stuck. SIGHUP may be ignored, which is what nohup asks for.

    A stop that takes too long is cut short: on a slow disk the engine's last flush may take minutes, and all that it
    would write is in the log.

    A thread waits for the signals: a handler would run in the loop's thread, and not before a call to the system that
    holds it up returns. A call that keeps the interpreter's lock holds this thread up as well; SIGKILL ends that.
    """
    token = trio.lowlevel.current_trio_token()
    over = threading.Event()
    first = _STOPPING if signal.getsignal(_HANGUP) is signal.SIG_IGN else (*_STOPPING, _HANGUP)

    def wait() -> None:
        number = signal.sigwait(first)
        if over.is_set():
            return
        # Of a hangup and another that both wait the hangup comes first. Left waiting, the other would end a quick stop.
        hung_up = number == _HANGUP and signal.sigtimedwait(_STOPPING, 0) is None
        token.run_sync_soon(stop.set, idempotent=True)
        second = signal.sigtimedwait(_STOPPING, STOP_SECONDS_MAX)
        if hung_up and second is not None and not over.is_set():
            second = signal.sigtimedwait(_STOPPING, STOP_SECONDS_MAX)  # that one was the first
        if over.is_set():
            return
        if second is None:
            _end_in_time()
        os._exit(128 + second.si_signo)

    with _stopping_blocked():
        thread = threading.Thread(target=wait, name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            assert thread.ident is not None
            signal.pthread_kill(thread.ident, signal.SIGTERM)  # to that thread alone: its wait is over
            thread.join()
            # One that came during the stop waits still, and would end the process as if it had not stopped.
            signal.signal(_HANGUP, signal.SIG_IGN)


@contextlib.contextmanager
def _stopping_blocked() -> Iterator[None]:
    """This thread, and those that it starts, leave SIGTERM, SIGINT and SIGHUP to whoever waits for them.

    Of all threads that do not, the system may give a signal to any; so each of a node's is started in here.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*_STOPPING, _HANGUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_in_time() -> NoReturn:
    """End the process, with a word about it where stderr takes one in time."""
    words = f"stopping took {STOP_SECONDS_MAX:g} s: the rest is in the log, and is made up for at the next start"
    try:
        saying = threading.Thread(target=tell, args=(words,), daemon=True)
        saying.start()
        saying.join(LAST_WORDS_SECONDS)
    finally:
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

    with _stopping_blocked():
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _allow_open_files(config: NodeConfig) -> None:
    """Take all open files that the system lets this process have, and say so if they are few.

    The usual soft limit, 1,024, is for programs that call select(). A quarter of the clients that a node takes use
    it up, and then no other node gets in.
    """
    import resource

    import structlog

    from shardkv.environment.real.network import connection_files_max
    from shardkv.server.listener import CONNECTIONS_KEPT_SHARE

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems name a limit that they do not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    room, wanted = connection_files_max(), config.limits.connections_max
    if room < CONNECTIONS_MIN:
        raise ConfigError(
            f"the system lets this process open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} files, too few for a "
            "node's own and its connections: raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd), best to 10,000"
        )
    clients = room - room // CONNECTIONS_KEPT_SHARE  # or fewer, where there are many other nodes
    if clients < wanted:
        structlog.get_logger().warning(
            "few open files",
            node=config.name,
            advice=f"the system lets this process open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} files, enough "
            f"for {clients:,} clients of the {wanted:,} that --connections-max allows: raise the hard limit "
            "(ulimit -Hn, LimitNOFILE= of systemd), or lower the option to hear no more of it",
        )


def _require_limits(config: NodeConfig) -> None:
    """Raise ConfigError where the system's limits would end the node as soon as it serves, or before it can say why."""
    import resource

    from shardkv.storage.wal import WalSettings

    storage = config.storage
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    needed = max(storage.segment_bytes, WalSettings().reserve_bytes)
    if most != resource.RLIM_INFINITY and most < needed:
        lower = ", or lower --segment-bytes" if most >= WalSettings().reserve_bytes else ""
        raise ConfigError(
            f"the system lets this process write files of {most:,} bytes, and one of the log takes {needed:,}: raise "
            f"the limit (ulimit -f, LimitFSIZE= of systemd){lower}"
        )
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed = ADDRESS_SPACE_BYTES_MIN + (storage.cache_bytes if storage.engine == "rocksdb" else 0)
    if most != resource.RLIM_INFINITY and most < needed:
        raise ConfigError(
            f"the system lets this process have {most:,} bytes of addresses, and a node takes up to {needed:,}, most "
            "of them never used: lift the limit (ulimit -v, LimitAS= of systemd)"
        )


@contextlib.contextmanager
def _log_to_stderr(level: str) -> Iterator[LogOutput]:
    """All logs go to stderr, without waiting for it; what was logged in the context is written when it ends, as far as
    it is read in time."""
    import logging

    import structlog

    numeric = logging.getLevelName(level.upper())
    with _stopping_blocked():
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
        yield output
    finally:
        output.close()
