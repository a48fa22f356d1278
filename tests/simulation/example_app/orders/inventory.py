"""An inventory: how much there is of each article, and who bought it. Whatever fails, nothing is sold twice."""

from shardkv.errors import OutcomeUnknown, VersionMismatch
from shardkv_client import Client


class SoldOut(Exception):
    """There is not enough left of an article."""


class Inventory:
    """Sells articles. ``kv`` is an open client; it is the caller's to close."""

    def __init__(self, kv: Client) -> None:
        self._kv = kv

    async def stock(self, article: str, count: int) -> None:
        await self._kv.put(f"stock/{article}".encode(), b"%d:" % count)

    async def sell(self, article: str, buyer: str) -> int:
        """Sell one to ``buyer``, and never a second to the same; what is left then. Raises SoldOut."""
        key = f"stock/{article}".encode()
        while True:
            entry = await self._kv.get(key)
            if entry is None:
                raise SoldOut(article)
            count, buyers = _parse(entry.value)
            if buyer in buyers:
                return count  # an earlier attempt got through
            if not count:
                raise SoldOut(article)
            try:
                await self._kv.put(key, _format(count - 1, [*buyers, buyer]), if_version=entry.version)
            except (VersionMismatch, OutcomeUnknown):
                continue
            return count - 1

    async def buyers(self, article: str) -> list[str]:
        entry = await self._kv.get(f"stock/{article}".encode())
        return [] if entry is None else _parse(entry.value)[1]


def _parse(value: bytes) -> tuple[int, list[str]]:
    count, _, buyers = value.decode().partition(":")
    return int(count), buyers.split(",") if buyers else []


def _format(count: int, buyers: list[str]) -> bytes:
    return f"{count}:{','.join(buyers)}".encode()
