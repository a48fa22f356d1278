"""Command lines against a client without a cluster: whatever is typed ends in an exit code that is documented."""

import io
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from unittest.mock import patch

from shardkv.cli import session, shell_language
from shardkv.cli.root import shardkv
from tests.cli.fakes import FakeClient

SAFE: Final = frozenset(
    (
        *("get", "put", "del", "scan", "cas", "incr", "delete-range", "status", "nodes", "ranges", "leader", "admin"),
        *("completion", "import", "--help", "--version"),
    )
)
"""Commands that start no process, serve nothing and write no file."""
EXIT_CODES: Final = frozenset((0, 1, 2, 3, 4))
LINES: Final = (
    b"get a --json; put a 1; put a -",
    b"put a b --if-version 7 --base64; del a --json",
    b"cas a 0 v; cas a 99999999999999999999 v; incr n -- -5; incr n 1e3",
    b"scan --prefix a --limit 10 --reverse --keys-only --json; scan a z",
    b"scan --timeout 0.5 --consistency stale a; get --raw a",
    b"delete-range a z --yes; status --json; nodes; ranges --json; leader a",
    b"admin split m; admin transfer 1 2; admin --help; completion bash; --version",
    b"import - --format csv; import - ; get --connect h:1,h:2 a; get --connect : a",
)


class Ended(Exception):
    """With an exit code that says that something was wrong."""


# One for all: click keeps every stream that it has written to.
_OUTPUT: Final = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")


def _invoke(arguments: list[str], typed: bytes) -> int:
    """Its exit code; what it says is thrown away."""
    stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8", errors="surrogateescape")
    with (
        patch.object(sys, "stdin", stdin),
        patch.object(sys, "stdout", _OUTPUT),
        patch.object(sys, "stderr", _OUTPUT),
        patch.dict(os.environ, {"SHARDKV_CONNECT": "127.0.0.1:7001"}),
    ):
        try:
            shardkv.main(arguments, prog_name="shardkv")
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            _OUTPUT.seek(0)
            _OUTPUT.truncate()


def run(data: bytes, chance: random.Random) -> None:
    try:
        typed = shell_language.parse(data.decode("utf-8", "surrogateescape"))
    except shell_language.SyntaxProblem as problem:
        raise Ended("syntax") from problem
    client = FakeClient()
    client.set(b"a", b"1")

    @asynccontextmanager
    async def connect(addresses: str) -> AsyncIterator[FakeClient]:
        yield client

    codes = []
    with patch.object(session, "connect", connect):
        for words in typed[:3]:
            arguments = words if words[0] in SAFE else ["get", *words]
            code = _invoke(arguments, data)
            assert code in EXIT_CODES, (arguments, code)
            codes.append(code)
    if any(codes):
        raise Ended(f"exit code {max(codes)}")
