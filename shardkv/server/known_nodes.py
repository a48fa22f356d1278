"""The file of known nodes in the data directory: by it a restart finds the others without anybody's help.

Lives here: reading the file at a start, and keeping it as new as the address book. Does not live here: which address of
a node is the newest, and what the bytes look like (``address_book``). The rule: a node goes on without it; only a
restart misses it.
"""

from typing import Any, Final

import trio

from shardkv.environment import Environment
from shardkv.errors import Corruption, OutOfSpace
from shardkv.server.address_book import AddressBook

FILE_NAME: Final = "peers"
ROOM_RETRY_SECONDS: Final = 30.0
"""After a write that found no room on the disk."""


class KnownNodesFile:
    """Keeps ``address_book`` in the data directory at ``directory_path``. A service once :meth:`run`."""

    def __init__(self, environment: Environment, directory_path: str, log: Any) -> None:
        self._environment = environment
        self.address_book = AddressBook()
        self._log = log
        self._changed = trio.Event()
        self.path = f"{directory_path}/{FILE_NAME}"

    async def load(self) -> None:
        """Fill the address book, if there is a file. Raises Corruption."""
        try:
            stored = await self._environment.workers.run(self._environment.disk.read, self.path)
        except FileNotFoundError:
            return
        try:
            self.address_book.decode(stored)
        except Corruption as error:
            raise Corruption(f"{self.path}: {error}") from error

    async def store(self) -> None:
        """Write the address book, durably. Raises OutOfSpace or StorageError."""
        write = self._environment.disk.write_atomically
        await self._environment.workers.run(write, self.path, self.address_book.encode())

    def changed(self) -> None:
        """The address book has news: write it soon."""
        self._changed.set()

    async def run(self) -> None:
        """Service: write after each change."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            try:
                await self.store()
            except OutOfSpace as error:
                self._log.error("no room to remember the other nodes' addresses", reason=str(error))
                self._changed.set()
                await self._environment.clock.sleep(ROOM_RETRY_SECONDS)
