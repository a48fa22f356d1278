"""Questions about the time and their answers: what comes in is of the size that it has, or refused."""

import pytest

from shardkv.errors import ProtocolError
from shardkv.wire.clock_reading import decode_answer, encode_answer, encode_question


@pytest.mark.parametrize("guessed", [False, True])
def test_an_answer_tells_which_question_it_answers(guessed: bool) -> None:
    answer = encode_answer(encode_question(1 << 60), 1_700_000_000_000, guessed=guessed)
    assert decode_answer(answer) == (1 << 60, 1_700_000_000_000, guessed)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_what_is_cut_or_too_long_breaks_the_protocol(change) -> None:  # type: ignore[no-untyped-def]
    question = encode_question(5)
    with pytest.raises(ProtocolError, match="a question about the time"):
        encode_answer(change(question), 1)
    with pytest.raises(ProtocolError, match="an answer about the time"):
        decode_answer(change(encode_answer(question, 1)))
