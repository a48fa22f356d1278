"""Damage: what becomes of valid bytes on a bad wire, a bad disk, or in the hands of an enemy.

Lives here: ways to change bytes, all drawn from one random source. Nothing here knows what the bytes mean, but that
formats have lengths in them, which lie.
"""

import random
from collections.abc import Callable, Sequence
from typing import Final

MUTATIONS_MAX: Final = 4
"""Changes to one input. More would leave nothing that a decoder looks at beyond its first bytes."""
INSERTED_BYTES_MAX: Final = 40
_LENGTHS: Final = (0, 1, 2, 5, 6, 7, 23, 24, 255, 256, 65_535, 65_536, 1 << 24, 1 << 31, (1 << 32) - 1, 1 << 63, -1)
_CBOR_HEADS: Final = tuple(range(256))
_DEEP: Final = (b"\x81", b"\x82\x00", b"\xa1\x61\x61", b"\xc1", b"\xd8\x1c", b"\x9f", b"[", b'{"a":', b"[[", b"a.")


def mutated(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """``data`` after up to MUTATIONS_MAX changes; now and then unchanged, or random from end to end."""
    roll = chance.random()
    if roll < 0.06:
        return data
    if roll < 0.10:
        return chance.randbytes(chance.randrange(80))
    for _ in range(chance.randint(1, MUTATIONS_MAX)):
        data = chance.choice(_MUTATIONS)(chance, data, corpus)
    return data


def _flip(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _byte(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """One byte becomes any other: in CBOR often another type."""
    if not data:
        return data
    at = chance.randrange(len(data))
    return data[:at] + bytes((chance.choice(_CBOR_HEADS),)) + data[at + 1 :]


def _truncate(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    cut = chance.randrange(len(data) + 1)
    return data[:cut] if chance.random() < 0.8 else data[cut:]


def _insert(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.randrange(1, INSERTED_BYTES_MAX)) + data[at:]


def _remove(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start + chance.randrange(1, INSERTED_BYTES_MAX) :]


def _duplicate(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    start = chance.randrange(len(data) + 1)
    end = min(len(data), start + chance.randrange(1, 200))
    return data[:end] + data[start:end] * chance.choice((1, 1, 2, 20)) + data[end:]


def _splice(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """The beginning of one valid input and the end of another."""
    other = chance.choice(corpus)
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]


def _lie(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Some bytes become a number that is a length's edge, in either byte order."""
    size = chance.choice((1, 2, 4, 8))
    if len(data) < size:
        return data
    at = chance.choice((0, chance.randrange(len(data) - size + 1)))
    number = chance.choice(_LENGTHS) + chance.choice((-1, 0, 0, 1))
    lie = (number % (1 << 8 * size)).to_bytes(size, chance.choice(("big", "little")))
    return data[:at] + lie + data[at + size :]


def _claim(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A CBOR item that announces far more than follows."""
    major = chance.randrange(8) << 5
    width = chance.choice((1, 2, 4, 8))
    head = bytes((major | {1: 24, 2: 25, 4: 26, 8: 27}[width],)) + (
        chance.choice(_LENGTHS) % (1 << 8 * width)
    ).to_bytes(width)
    at = chance.randrange(len(data) + 1)
    return data[:at] + head + data[at + chance.choice((0, 1, 1, len(head))) :]


def _deepen(chance: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(_DEEP) * chance.choice((1, 3, 25, 200, 2000)) + data[at:]


_MUTATIONS: Final[tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...]] = (
    *(_flip, _flip, _flip, _byte, _byte, _byte, _truncate, _insert, _remove, _duplicate, _splice, _splice),
    *(_lie, _lie, _claim, _deepen),
)
