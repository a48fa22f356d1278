"""No acknowledged write is lost: what a client was told is done, every later read shows, or something newer.

For keys that are put and never deleted. A key's version grows with every write of it (DESIGN 4.4), so a read that was
called after a put had been answered must show that version or a higher one; a version has one value for ever, and a
value, which is put once, one version; and no value comes from nowhere.
"""

from typing import Any

from shardkv.simulation.checkers.violation import Violation


class NoWriteLost:
    name = "no-write-lost"

    def __init__(self) -> None:
        self._highest: dict[Any, int] = {}
        self._values: dict[Any, dict[int, Any]] = {}
        self._versions: dict[Any, dict[Any, int | None]] = {}
        """Of each value that was ever put, the version it was seen with."""

    @property
    def keys(self) -> list[Any]:
        """Every key of which a write was acknowledged."""
        return list(self._highest)

    def floor(self, key: Any) -> int:
        """The version that a read which is called now must not fall short of; 0 if the key may be absent."""
        return self._highest.get(key, 0)

    def called(self, key: Any, value: Any) -> None:
        """A put is about to be sent: of a value that this key is given only once."""
        versions = self._versions.setdefault(key, {})
        assert value not in versions, f"{key!r} is given {value!r} twice"
        versions[value] = None

    def acknowledged(self, key: Any, version: int, value: Any, floor: int) -> None:
        """A put was answered; ``floor`` is what :meth:`floor` said before it was called."""
        if version <= floor:
            raise Violation(self.name, f"{key!r}: a put got version {version}, after {floor} had been acknowledged")
        self._one_value(key, version, value)
        self._highest[key] = max(version, self._highest.get(key, 0))

    def read(self, key: Any, version: int, value: Any, floor: int) -> None:
        """A linearizable read was answered; version 0 is an absent key."""
        if version < floor:
            raise Violation(self.name, f"{key!r}: read version {version}, after {floor} had been acknowledged")
        if version:
            self._one_value(key, version, value)
            self._highest[key] = max(version, self._highest.get(key, 0))

    def _one_value(self, key: Any, version: int, value: Any) -> None:
        known = self._values.setdefault(key, {}).setdefault(version, value)
        if known != value:
            raise Violation(self.name, f"{key!r}: version {version} is both {known!r} and {value!r}")
        versions = self._versions.get(key, {})
        if value not in versions:
            raise Violation(self.name, f"{key!r}: version {version} is {value!r}, which nobody put")
        before = versions[value]
        if before not in (None, version):
            raise Violation(self.name, f"{key!r}: {value!r} was put once, and is version {before} and {version}")
        versions[value] = version

    def check(self) -> None:
        """Nothing is left to judge: the last reads of a run are told as all others."""
