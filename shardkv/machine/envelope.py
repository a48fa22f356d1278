"""What the engine keeps for a user key: one byte of format and flags, the version, the value.

    1 byte    format (low four bits; 1) and flags (high four bits)
    8 bytes   version, big-endian
    the rest  the value

The flags are reserved: expiry, compression, encryption, and one spare. A flag that this code does not know changes
what the bytes mean, so it is refused as Corruption rather than ignored.
"""

from struct import Struct, error
from typing import Final

from shardkv.errors import Corruption

FORMAT: Final = 1
FLAG_EXPIRY: Final = 0x10
FLAG_COMPRESSED: Final = 0x20
FLAG_ENCRYPTED: Final = 0x40

HEAD: Final = Struct(">BQ")
HEAD_BYTES: Final = HEAD.size
pack_head: Final = HEAD.pack
unpack_head: Final = HEAD.unpack_from


def pack(version: int, value: bytes) -> bytes:
    return pack_head(FORMAT, version) + value


def unpack(envelope: bytes) -> tuple[int, bytes]:
    """Version and value. Raises Corruption for another format or unknown flags."""
    return version_of(envelope), envelope[HEAD_BYTES:]


def version_of(envelope: bytes) -> int:
    """Raises Corruption for another format or unknown flags."""
    try:
        head, version = unpack_head(envelope)
    except error:
        raise unreadable(envelope) from None
    if head != FORMAT:
        raise unreadable(envelope)
    found: int = version
    return found


def unreadable(envelope: bytes) -> Corruption:
    return Corruption(
        f"a value has the unknown format {envelope[:HEAD_BYTES].hex()}; "
        "it is damaged or was written by a newer version: do not start this one on its data"
    )
