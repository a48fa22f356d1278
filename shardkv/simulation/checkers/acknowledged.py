"""No acknowledged write is lost: what a client was told is done, every later read shows, or something newer.

For keys that are put and never deleted. A key's version grows with every write of it (DESIGN 4.4), so a read that was
called after a put had been answered must show that version or a higher one; a version has one value for ever, and a
value, which is put once, one version; and no value comes from nowhere. A put of unknown outcome is settled by an
answered one of the same client that began after all that were out together with the doubtful one had ended: it came
before that, or never will. What a client has out together is one *turn* of it; turns come one after the other.
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
        self._doubtful: dict[tuple[Any, Any], list[tuple[int, Any]]] = {}
        """Of a key and a client: the turns and values of its puts of unknown outcome."""
        self._settled: dict[Any, dict[Any, int]] = {}
        """Of such values: the version of the put that settled them."""

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

    def unknown(self, key: Any, value: Any, client: Any, turn: int) -> None:
        """A put may have happened, or may yet."""
        self._doubtful.setdefault((key, client), []).append((turn, value))

    def acknowledged(self, key: Any, version: int, value: Any, floor: int, client: Any = None, turn: int = 0) -> None:
        """A put was answered; ``floor`` is what :meth:`floor` said before it was called."""
        doubtful = self._doubtful.pop((key, client), [])
        together = [each for each in doubtful if each[0] >= turn]
        if together:
            self._doubtful[key, client] = together
        for began, earlier in doubtful:
            if began < turn:
                self._settled.setdefault(key, {})[earlier] = version
                self._check_settled(key, earlier, self._versions[key][earlier] or 0)
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
        self._check_settled(key, value, version)

    def _check_settled(self, key: Any, value: Any, version: int) -> None:
        by = self._settled.get(key, {}).get(value, version)
        if version > by:
            raise Violation(self.name, f"{key!r}: {value!r} was settled by version {by}, and is version {version}")

    def check(self) -> None:
        """Nothing is left to judge: the last reads of a run are told as all others."""
