"""Tests of async code that run in the simulator's time, and so the same way each time."""

from collections.abc import Awaitable, Callable

import trio

from shardkv.simulation import run_deterministically


def simulated(test: Callable[[trio.Nursery], Awaitable[None]]) -> Callable[[], None]:
    """Run a test in virtual time, in a nursery that is cancelled at its end."""

    def run() -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                await test(nursery)
                nursery.cancel_scope.cancel()

        run_deterministically(main, seed=7)

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run
