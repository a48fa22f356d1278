"""``shardkv node`` with a stand-in for the server, for tests of what is around it: signals, the ready line, the pipe.

The stand-in serves nothing. It is ready at once and stops when told to, unless its name says otherwise: ``stubborn``
and ``late`` never stop, which ``late`` is given less time for, ``broken`` fails to start, ``brief`` stops at once and
leaves the number of the first file it opened.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import trio

import shardkv.server
from shardkv.config import NodeConfig
from shardkv.errors import DataDirectoryError


async def run_node(
    config: NodeConfig, environment: object, *, ready: Callable[[str, str], None], stop: trio.Event, **_: object
) -> None:
    print(f"starting {config.name}", file=sys.stderr, flush=True)
    if config.name == "broken":
        raise DataDirectoryError(f"{config.data} belongs to another cluster")
    ready(config.name, config.listen)
    if config.name == "brief":
        with (Path(config.data) / "descriptor").open("w") as file:
            file.write(str(file.fileno()))
        return
    await stop.wait()
    print("draining", flush=True)
    if config.name in ("stubborn", "late"):
        await trio.sleep_forever()


if __name__ == "__main__":
    shardkv.server.run_node = run_node  # type: ignore[attr-defined]
    from shardkv.cli import node
    from shardkv.cli.root import main

    node.STOP_SECONDS_MAX = 0.2 if "late" in sys.argv else 3_600.0  # type: ignore[misc]
    node.LAST_WORDS_SECONDS = 3_600.0  # type: ignore[misc]
    main()
