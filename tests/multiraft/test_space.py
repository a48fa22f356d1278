"""What a node takes on by the room that its disk has left. DESIGN 4.11."""

from dataclasses import replace

import pytest

from shardkv.errors import OutOfSpace
from shardkv.multiraft.space import Space
from shardkv.raft.messages import Entry, EntryType, Message, MessageType

MIB = 1024 * 1024


def states(space: Space, *free: int) -> list[tuple[bool, bool]]:
    found = []
    for mib in free:
        space.measured(mib * MIB)
        space.check()
        found.append((space.low, space.full))
    return found


def test_a_node_is_low_below_the_bound_and_full_below_half_and_leaves_both_a_quarter_above() -> None:
    space = Space(100 * MIB)
    room, low, full = (False, False), (True, False), (True, True)
    assert states(space, 100, 99, 100, 124, 125, 124) == [room, low, low, low, room, room]
    assert states(space, 49, 50, 62, 63, 124, 125) == [full, full, full, low, low, room]


def test_a_node_is_short_of_room_before_it_refuses_anything() -> None:
    space = Space(100 * MIB)
    found = []
    for free in (150, 149, 150, 299, 300, 99, 125, 299, 300):
        states(space, free)
        found.append(space.short)
    assert found == [False, True, True, True, False, True, True, True, False]
    found_fullness = []
    for free in (150, 149, 99, 49, 62, 63, 125, 300):
        states(space, free)
        found_fullness.append(space.fullness)
    assert found_fullness == [0, 1, 2, 3, 3, 2, 1, 0]


def test_a_call_that_failed_counts_until_it_succeeds_however_much_is_free() -> None:
    """A quota fills up while the disk has room."""
    space = Space(100 * MIB)
    space.failed("log", OutOfSpace("no space left while trying to write /d/wal/7"))
    space.failed("spare", OutOfSpace("no space left"))
    assert states(space, 1000) == [(True, True)]
    assert "/d/wal/7" in str(space.refusal())
    space.succeeded("log")
    assert space.full
    space.succeeded("spare")
    space.succeeded("spare")
    space.check()
    assert not space.low


def test_a_refusal_says_how_much_is_missing_where_and_what_is_still_served() -> None:
    space = Space(100 * MIB, "/data")
    space.measured(60 * MIB)
    assert "60 MiB left at /data and needs 125 MiB" in str(space.refusal())
    assert "reads and deletes are served" in str(space.refusal())
    space.measured(6 * MIB)
    assert "reads are served" in str(space.refusal())
    assert space.refusal() is not space.refusal()


DATA = Entry(3, 8, EntryType.NORMAL, b"data")
MEMBER = Entry(3, 7, EntryType.CONF_CHANGE_V2, b"a member")


@pytest.mark.parametrize(
    "message",
    [
        Message(MessageType.HEARTBEAT, 1, 2, 3),
        Message(MessageType.VOTE, 1, 2, 3),
        Message(MessageType.APP, 1, 2, 3),
        Message(MessageType.APP, 1, 2, 3, entries=(Entry(3, 7),)),
        Message(MessageType.APP, 1, 2, 3, entries=(MEMBER,)),
    ],
)
def test_a_full_node_takes_everything_of_raft_but_client_data(message: Message) -> None:
    """It votes, hears heartbeats, and lets a new leader begin its term; others go on without it."""
    assert Space().taken(message) is message


def test_of_an_append_a_full_node_takes_what_stands_before_the_first_client_data() -> None:
    """A leader that was slow to be heard sends the entry that begins its term together with those that follow it."""
    append = Message(MessageType.APP, 1, 2, 3, log_term=2, index=6, entries=(Entry(3, 7), DATA, Entry(3, 9)), commit=5)
    assert Space().taken(append) == replace(append, entries=(Entry(3, 7),))
    assert Space().taken(replace(append, index=7, entries=(DATA, Entry(3, 9)))) is None


def test_of_an_append_that_holds_the_begin_of_its_term_a_full_node_takes_all_that_stands_before_it() -> None:
    """That is one message a term; of data for which the term has begun already it takes none."""
    begin = Entry(4, 9)
    append = Message(MessageType.APP, 1, 2, 4, log_term=3, index=7, entries=(DATA, begin, Entry(4, 10, data=b"new")))
    assert Space().taken(append) == replace(append, entries=(DATA, begin))
    assert Space().taken(replace(append, entries=(DATA, begin))) == replace(append, entries=(DATA, begin))
    assert Space().taken(replace(append, entries=(DATA,))) is None
