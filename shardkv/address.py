"""``host:port`` as users write it: what listens, what dials, options and settings take it apart here and nowhere else.

Pure text; nothing is resolved here. An IPv6 host stands in brackets, as in a URL.
"""

from ipaddress import ip_address
from typing import Final, NamedTuple, cast

from shardkv.errors import ConfigError

HOST_BYTES_MAX: Final = 255
"""The longest name that the domain name system knows (RFC 1035 2.3.4)."""
_EXAMPLE: Final = "write it as HOST:PORT, for example 127.0.0.1:7001 or [::1]:7001"


class Address(NamedTuple):
    """Where a node listens. ``host`` has no brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_wildcard(self) -> bool:
        """Whether it means every interface, so that nobody can connect to it as it stands."""
        try:
            found = ip_address(self.host)
            return (getattr(found, "ipv4_mapped", None) or found).is_unspecified
        except ValueError:
            pass
        try:
            return not any(int(part, 0) for part in self.host.split("."))  # "0", and "0x0", mean it, too
        except ValueError:
            return False


def parse_address(text: str, *, port_zero: bool = False) -> Address:
    """Take ``host:port`` apart.

    Args:
        port_zero: allow port 0, which asks the system for a free one; only a listener may.

    Raises:
        ConfigError: the text is no address; the message shows one.
    """
    host, colon, port_text = text.strip().rpartition(":")
    if not colon:
        raise ConfigError(f"{text!r} has no port; {_EXAMPLE}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise ConfigError(f"the host of {text!r} stands in brackets but is no IPv6 address; {_EXAMPLE}")
    elif ":" in host:
        raise ConfigError(
            f"{text!r} has several colons: an IPv6 host stands in brackets, and several addresses have commas between"
            f" them; {_EXAMPLE}"
        )
    if not host or not host.isprintable() or any(character in host for character in " []/@,"):
        raise ConfigError(f"{text!r} has no valid host; {_EXAMPLE}")
    if len(host.encode()) > HOST_BYTES_MAX:
        raise ConfigError(f"the host of {text[:40]!r}… is longer than {HOST_BYTES_MAX} bytes; {_EXAMPLE}")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise ConfigError(f"{text!r} has no valid host, {error}; {_EXAMPLE}") from error
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5):
        raise ConfigError(f"the port of {text!r} is not a number; {_EXAMPLE}")
    port = int(port_text)
    if port > 65_535 or (port == 0 and not port_zero):
        raise ConfigError(f"the port of {text!r} is not between 1 and 65535; {_EXAMPLE}")
    return Address(host, port)


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Take a list such as ``h1:7001,h2:7001`` apart; repeated ones count once.

    Raises:
        ConfigError: it is no string, it is empty, or one of its parts is no address.
    """
    if not isinstance(cast(object, text), str):  # ``connect`` hands on what its caller gave
        raise ConfigError(f"addresses are one string, not {type(text).__name__}; {_EXAMPLE}, several with commas")
    parts = [part for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"no address given; {_EXAMPLE}, several with commas between them")
    return tuple(dict.fromkeys(parse_address(part) for part in parts))
