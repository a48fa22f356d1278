"""``shardkv demo``: a cluster of real node processes on this machine, with or without a tour of it.

``python -m shardkv.cli.demo`` (``make demo``) takes the tour. The nodes end with this process, however it ends: each
watches a pipe that only this process holds open.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn, TypeVar

import click

from shardkv.cli import exits, text
from shardkv.cli.durable import replace_durably
from shardkv.cli.local_cluster import LocalCluster, NodeFailed
from shardkv.cli.root import Example
from shardkv.cli.table import render

T = TypeVar("T")
WATCH_SECONDS = 0.5
_TERMINATING: Final = (signal.SIGTERM, signal.SIGHUP)


class Terminated(Exception):
    """SIGTERM arrived, or SIGHUP because the terminal was closed: stop the nodes and end cleanly."""


@click.command(
    cls=Example,
    example="""
    shardkv demo
    shardkv demo --nodes 5 --data ./demo --base-port 7001 --no-shell
    """,
)
@click.option("--nodes", type=click.IntRange(1, 16), default=3, show_default=True, help="How many nodes.")
@click.option("--data", type=click.Path(file_okay=False), help="Keep the data here.  [default: a temporary directory]")
@click.option("--base-port", type=click.IntRange(1, 65_520), help="The first node's port.  [default: free ports]")
@click.option("--shell/--no-shell", "with_shell", default=True, help="Open the shell, or run until interrupted.")
@click.option("--tour/--no-tour", "with_tour", default=False, help="Load data, show the cluster, kill a leader.")
@click.pass_context
def demo(
    ctx: click.Context, nodes: int, data: str | None, base_port: int | None, with_shell: bool, with_tour: bool
) -> None:
    """Start a cluster of real nodes on this machine and open the shell on it.

    The nodes end when this command does. With --no-shell it runs until interrupted.
    """
    ctx.exit(run_demo(nodes, data, base_port, with_shell=with_shell, with_tour=with_tour))


def run_demo(nodes: int, data: str | None, base_port: int | None, *, with_shell: bool, with_tour: bool) -> int:
    """The exit code: 1 when the tour found an acknowledged write missing, or a node failed to start; 2 when that was
    for what it was told, such as a port in use."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which is what nohup asks for
        signal.signal(signal.SIGHUP, _terminate)
    try:
        return _run_demo(nodes, data, base_port, with_shell=with_shell, with_tour=with_tour)
    except Terminated:  # wherever it was: the nodes have ended and a temporary directory is gone
        return exits.DONE


def _run_demo(nodes: int, data: str | None, base_port: int | None, *, with_shell: bool, with_tour: bool) -> int:
    with _cluster(data, nodes, base_port, with_tour) as cluster:
        started = time.monotonic()
        try:
            cluster.start()
        except NodeFailed as failure:
            click.echo(f"Error: {failure}".rstrip(), err=True)
            return exits.USAGE if failure.exit_code == exits.USAGE else exits.FAILED
        serving = f"{text.counted(nodes, 'node')} {'serves' if nodes == 1 else 'serve'}"
        click.secho(f"{serving} after {time.monotonic() - started:.1f} s", bold=True)
        rows = [
            [name, cluster.addresses[name], str(cluster.processes[name].pid), str(cluster.processes[name].log)]
            for name in cluster.names
        ]
        sys.stdout.write(render(["node", "address", "pid", "log"], rows))
        click.echo(f"\nconnect from another terminal with  shardkv shell --connect {cluster.connect}")
        return _use(cluster, with_shell, with_tour)


def _use(cluster: LocalCluster, with_shell: bool, with_tour: bool) -> int:
    code = exits.DONE
    if with_tour:
        from shardkv.cli.tour import run_tour

        code = exits.DONE if _run_until_terminated(run_tour, cluster) else exits.FAILED
        if not sys.stdin.isatty():
            return code
    if with_shell:
        from shardkv.cli.shell import serve

        click.echo("\nThe shell: help lists the commands, Ctrl-D leaves and stops the nodes")
        return _run_until_terminated(serve, cluster.connect, None, "") or code
    click.echo("running until interrupted", err=True)
    _watch(cluster)
    return code


def _run_until_terminated(body: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """Run ``body`` in a trio loop. SIGTERM and SIGHUP cancel it: the exception would come out amid the loop's own work.

    Raises Terminated once the loop has ended.
    """
    import trio

    terminated = False

    async def cancel(scope: trio.CancelScope, signals: AsyncIterator[int]) -> None:
        nonlocal terminated
        async for _ in signals:
            terminated = True
            scope.cancel()

    async def run() -> list[T]:
        results = []
        terminating = [number for number in _TERMINATING if signal.getsignal(number) is _terminate]
        # Until the last task has ended: a terminal that is closed often tells so twice.
        with trio.open_signal_receiver(*terminating) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel, nursery.cancel_scope, signals)
                results.append(await body(*arguments))
                nursery.cancel_scope.cancel()
        return results

    try:
        results = trio.run(run)
    except BaseExceptionGroup as group:
        raise exits.leaf(group) from group
    if terminated:
        _terminate(signal.SIGTERM, None)
    return results[0]


def _watch(cluster: LocalCluster) -> None:
    """Wait for a signal; say when a node ends by itself."""
    ended: set[str] = set()
    while True:
        time.sleep(WATCH_SECONDS)
        for name in set(cluster.names) - set(cluster.running) - ended:
            ended.add(name)
            process = cluster.processes[name]
            click.echo(f"node {name} ended with {process.exit_code}; its log is {process.log}", err=True)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    _ignore(*_TERMINATING)
    raise Terminated


def _ignore(*numbers: signal.Signals) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _cluster(data: str | None, nodes: int, base_port: int | None, with_tour: bool) -> Iterator[LocalCluster]:
    """A cluster on the given directory, which stays, or on a temporary one, which does not."""
    from shardkv.storage.directory import IDENTITY_NAME

    if data == "":
        raise click.UsageError("--data is empty; name a directory, or leave --data out for a temporary one")
    if data is not None:
        path = Path(os.path.expanduser(data)).absolute()  # as a node takes it
        if (path / IDENTITY_NAME).exists():
            raise click.UsageError(f"{path} is the data directory of a node; give another --data")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise click.UsageError(f"{path} cannot be made: {problem.strerror}; give another --data") from None
        with _cluster_on(path, nodes, base_port, with_tour) as cluster:
            yield cluster
        return
    with tempfile.TemporaryDirectory(prefix="shardkv-demo-", ignore_cleanup_errors=True) as temporary:
        cluster = _cluster_on(Path(temporary), nodes, base_port, with_tour)
        try:
            yield cluster
        finally:
            # Nobody will read this data: the nodes need not stop cleanly. But one that still writes would leave some.
            _ignore(signal.SIGINT, *_TERMINATING)
            for process in cluster.processes.values():
                process.kill()


def _saved(path: Path) -> dict[str, Any]:
    """Raises a usage error for a file that is not what a demo leaves."""
    with contextlib.suppress(ValueError, IsADirectoryError):
        saved = json.loads(path.read_bytes())
        match saved:
            case {"nodes": int(nodes), "addresses": {**addresses}}:
                names = [f"n{number}" for number in range(1, nodes + 1)]
                if nodes and list(addresses) == names and all(isinstance(it, str) for it in addresses.values()):
                    return dict(saved)
    raise click.UsageError(
        f"{path} is damaged, which knows the nodes' addresses; remove it and give the same --nodes: they keep their"
        " data and get other addresses"
    )


def _cluster_on(directory: Path, nodes: int, base_port: int | None, with_tour: bool) -> LocalCluster:
    """A cluster on the directory. A second start on the same data takes the same ports, which the nodes know."""
    from shardkv.cli.tour import SPLIT_BYTES

    saved_path = directory / "demo.json"
    options = ["--split-bytes", str(SPLIT_BYTES)] if with_tour else []
    if saved_path.exists():
        saved = _saved(saved_path)
        if saved["nodes"] != nodes or (base_port is not None and saved["addresses"]["n1"] != f"127.0.0.1:{base_port}"):
            raise click.UsageError(
                f"{directory} holds a cluster of {saved['nodes']} nodes, the first at {saved['addresses']['n1']};"
                " give the same --nodes and --base-port, or another --data"
            )
        cluster = LocalCluster(directory, nodes=nodes, base_port=base_port, options=options)
        cluster.addresses = saved["addresses"]
        return cluster
    cluster = LocalCluster(directory, nodes=nodes, base_port=base_port, options=options)
    replace_durably(saved_path, json.dumps({"nodes": nodes, "addresses": cluster.addresses}))
    return cluster


if __name__ == "__main__":
    from shardkv.cli.root import main

    main(["demo", "--tour", *sys.argv[1:]])
