"""What nodes ask each other about the time: the payloads of PING and PONG on a connection between two of them.

The question holds the asker's monotonic clock, which means nothing to anybody else, and comes back with the answer, so
that the asker knows how old that is without having to remember what it asked.
"""

from struct import Struct
from typing import Final

from shardkv.errors import ProtocolError

_QUESTION: Final = Struct(">Q")
_ANSWER: Final = Struct(">Qq?")


def encode_question(asked_ns: int) -> bytes:
    return _QUESTION.pack(asked_ns)


def encode_answer(question: bytes, ms: int, *, guessed: bool = False) -> bytes:
    """The answer to ``question``, as it came; ``ms`` is the time, milliseconds since 1970. Raises ProtocolError.

    ``guessed``: nobody has confirmed it to the node that says it.
    """
    if len(question) != _QUESTION.size:
        raise ProtocolError(f"a question about the time has {_QUESTION.size} bytes, not {len(question)}")
    return _ANSWER.pack(_QUESTION.unpack(question)[0], ms, guessed)


def decode_answer(answer: bytes) -> tuple[int, int, bool]:
    """``(asked_ns, ms, guessed)``: when the question was asked, by the asker's clock, and the answer. Raises
    ProtocolError."""
    if len(answer) != _ANSWER.size:
        raise ProtocolError(f"an answer about the time has {_ANSWER.size} bytes, not {len(answer)}")
    asked_ns, ms, guessed = _ANSWER.unpack(answer)
    return asked_ns, ms, guessed
