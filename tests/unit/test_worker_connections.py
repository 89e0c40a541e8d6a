"""The open connections by themselves: which one is closed to make room, and which ones are not read from."""

import selectors
import socket
from collections.abc import Iterator
from typing import cast

import pytest

from inference_api.worker.connection import Connection, Phase
from inference_api.worker.connections import (
    MAX_COMPLETE_BYTES,
    MAX_HELD_BYTES,
    MAX_UNREAD_BYTES,
    MIN_BYTES_PER_SECOND,
    MIN_PAUSED_BYTES,
    READ,
    WRITE,
    YOUNG_BYTES_PER_SECOND,
    Connections,
    Unread,
)
from inference_api.worker.http import RequestParser
from tests.unit.exchanges import exchange

NOW = 1000.0


class Opened:
    """Connections and the clients at their other ends."""

    def __init__(self, max_connections: int = 3) -> None:
        self.selector = selectors.DefaultSelector()
        self.connections = Connections(self.selector, max_connections)
        self.clients: dict[Connection, socket.socket] = {}

    def add(self, since: float = 0.0, phase: Phase = Phase.IDLE) -> Connection:
        """One more, in this phase since so many seconds after the first."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        connection = Connection(ours, cast(RequestParser, None), {})
        connection.phase, connection.since = phase, since
        self.connections.add(connection)
        self.clients[connection] = theirs
        return connection

    def write(self, connection: Connection, *pieces: memoryview, now: float = 0.0) -> None:
        """Have these pieces of an answer wait for the client."""
        connection.output = list(pieces)
        self.connections.unread[connection] = Unread(connection, exchange(), now)
        self.connections.give_up(now)

    def evict(self, now: float = NOW) -> Connection | None:
        """Close the one that has been idle for longest, if there is one; it is found however often one asks."""
        idle = self.connections.longest_idle(now)
        assert self.connections.longest_idle(now) is idle
        if idle is not None:
            self.connections.close(idle)
        return idle

    def is_read_from(self, connection: Connection) -> bool:
        """Whether the selector says so when something comes."""
        self.clients[connection].send(b"x")
        return any(key.data is connection and mask & READ for key, mask in self.selector.select(0))

    def close(self) -> None:
        for connection, client in self.clients.items():
            self.connections.close(connection)
            client.close()
        self.selector.close()


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Room for three."""
    opened = Opened()
    yield opened
    opened.close()


def test_there_is_room_up_to_the_bound(opened: Opened) -> None:
    """Nobody is closed for it."""
    for _ in range(3):
        assert opened.connections.has_room
        opened.add(phase=Phase.RUNNING)
    assert len(opened.connections) == 3
    assert not opened.connections.has_room
    assert opened.connections.longest_idle(NOW) is None


def test_the_one_that_has_been_idle_for_longest_makes_room(opened: Opened) -> None:
    """One after the other, until all that are left are busy."""
    newest, oldest = opened.add(since=2.0), opened.add(since=1.0, phase=Phase.LINGERING)
    busy = opened.add(phase=Phase.READING)
    assert opened.evict() is oldest
    assert opened.evict() is newest
    assert set(opened.connections) == {busy}
    assert opened.evict() is None
    assert opened.clients[oldest].recv(1) == b""


def test_one_whose_request_has_come_is_not_idle(opened: Opened) -> None:
    """Whether it is still with the socket or has been read already."""
    unread, buffered, reused = opened.add(), opened.add(since=1.0), opened.add(since=2.0)
    opened.clients[unread].send(b"G")
    buffered.buffer = b"GET"
    assert opened.evict() is reused
    assert set(opened.connections) == {unread, buffered}


def test_one_that_has_been_idle_anew_waits_its_turn(opened: Opened) -> None:
    """What was found when somebody had to go holds only while it is still so."""
    first, second, third = opened.add(since=1.0), opened.add(since=2.0), opened.add(since=3.0)
    assert opened.evict() is first
    second.since = 4.0  # it has been answered a request since
    assert opened.evict() is third
    assert opened.evict() is second


def test_one_of_this_very_turn_is_not_closed(opened: Opened) -> None:
    """Nobody has looked yet whether its request has come."""
    opened.add(since=NOW)
    assert opened.evict() is None


def test_who_has_only_just_come_goes_last(opened: Opened) -> None:
    """Its request may be on its way; before it goes who lingers, as it has been answered, but has yet to read that."""
    newest, old = opened.add(since=NOW - 0.4), opened.add(since=NOW - 1.5)
    older, lingering = opened.add(since=1.0), opened.add(since=NOW - 0.1, phase=Phase.LINGERING)
    assert [opened.evict() for _ in range(5)] == [older, old, lingering, newest, None]


def test_in_the_way_is_what_comes_or_goes_most_slowly(opened: Opened) -> None:
    """What is fast enough, too young to tell, or waits for its turn is not slow; nor is anything in nobody's way."""
    silent, dripping, fast, young = (opened.add(since=since, phase=Phase.READING) for since in (0.0, 0.0, 0.0, 9.5))
    dripping.buffer = b"x" * 1_000
    fast.buffer = b"x" * MIN_BYTES_PER_SECOND * 10
    stalled, read, waiting = (opened.add(phase=Phase.WRITING) for _ in range(3))
    for connection, count in ((stalled, 500), (read, 20 * MIN_BYTES_PER_SECOND), (waiting, 0)):
        opened.write(connection, memoryview(bytes(count)))
        connection.output = [memoryview(bytes(max(0, count - 10 * MIN_BYTES_PER_SECOND)))]
    opened.connections.writable[waiting] = None
    idle = opened.add()
    opened.connections.lacks_room = True
    assert opened.connections.in_the_way(10.0) == []
    opened.connections.close(idle)
    assert opened.connections.in_the_way(10.0) == []
    opened.connections.lacks_room = True
    assert opened.connections.in_the_way(10.0) == [silent, stalled, dripping]
    assert opened.connections.in_the_way(10.0) == []
    assert young in opened.connections


@pytest.mark.parametrize(("slow", "in_the_way"), [(4, 0), (5, 5)])
def test_a_crowd_has_few_slow_ones_alone(slow: int, in_the_way: int) -> None:
    """To end them would let in nobody for long: those who have come in numbers take the places."""
    opened = Opened(max_connections=10)
    for _ in range(slow):
        opened.add(phase=Phase.READING)
    opened.connections.is_crowded = True
    assert len(opened.connections.in_the_way(10.0)) == in_the_way
    opened.close()


def test_what_is_watched_can_be_changed_and_ended(opened: Opened) -> None:
    """To say the same again, or to close twice, changes nothing."""
    connection = opened.add()
    opened.connections.watch(connection, READ | WRITE)
    opened.connections.watch(connection, READ | WRITE)
    assert [mask for _, mask in opened.selector.select(0)] == [WRITE]
    opened.connections.watch(connection, 0)
    assert not opened.is_read_from(connection)
    opened.connections.watch(connection, READ)
    assert opened.is_read_from(connection)
    opened.connections.close(connection)
    opened.connections.close(connection)
    assert not opened.selector.get_map()


def test_beyond_the_bound_all_but_the_first_pause(opened: Opened) -> None:
    """They go on when there is room again, or when it is their turn and not too many others are complete."""
    other = opened.add(phase=Phase.RUNNING)
    opened.connections.hold(other, MAX_COMPLETE_BYTES - 1)
    held = [opened.add(phase=Phase.READING) for _ in range(3)]
    for connection in held:
        opened.connections.hold(connection, MAX_HELD_BYTES // 2 + 2)
    assert [opened.is_read_from(connection) for connection in held] == [True, False, False]
    held[0].phase = Phase.RUNNING  # it is complete
    opened.connections.hold(held[0], 1)
    opened.connections.resume()
    assert not any(opened.is_read_from(connection) for connection in held[1:])
    opened.connections.hold(other, MAX_COMPLETE_BYTES - 2)
    opened.connections.resume()
    assert [opened.is_read_from(connection) for connection in held[1:]] == [True, False]
    opened.connections.close(held[1])
    for connection in (held[0], other):
        opened.connections.hold(connection, 0)
    opened.connections.resume()
    assert opened.is_read_from(held[2])


def test_who_holds_little_never_pauses(opened: Opened) -> None:
    """A small request must not wait for the large ones of others."""
    large, small = opened.add(phase=Phase.READING), opened.add(phase=Phase.READING)
    opened.connections.hold(large, MAX_HELD_BYTES + 1)
    opened.connections.hold(small, MIN_PAUSED_BYTES)
    assert opened.is_read_from(small)


def test_unread_answers_are_given_up_for_others(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    """They may hold so many bytes in all, what has been sent of them included; one always stays."""
    answer = memoryview(bytes(MAX_UNREAD_BYTES // 2))
    oldest, read, newest = (opened.add(phase=Phase.WRITING) for _ in range(3))
    for connection in (oldest, read):
        opened.write(connection, answer[-1:])
    del opened.connections.unread[read]
    opened.write(read, answer[-1:])
    assert set(opened.connections) == {oldest, read, newest}
    opened.write(newest, answer, answer, answer)
    assert set(opened.connections) == {newest}
    assert [opened.clients[connection].recv(1) for connection in (oldest, read)] == [b"", b""]
    assert [(record.__dict__["path"], record.levelname) for record in caplog.records] == [("/", "WARNING")] * 2
    opened.connections.close(newest)
    after = opened.add(phase=Phase.WRITING)
    opened.write(after, answer, answer)
    assert after in opened.connections


def test_given_up_is_what_is_read_most_slowly(opened: Opened) -> None:
    """Since somebody last looked; what only waits for its turn is not, and does not count."""
    answer = memoryview(bytes(MAX_UNREAD_BYTES // 4))
    slow, steady, waiting, stalled = (opened.add(phase=Phase.WRITING) for _ in range(4))
    opened.connections.writable[waiting] = None
    opened.write(waiting, answer, answer, answer, answer, answer)
    for connection, began, count in ((slow, 0.0, 600), (steady, 0.0, 900), (stalled, 5.0, 500)):
        connection.sock.send(bytes(1_000))
        opened.write(connection, answer, now=began)
        opened.clients[connection].recv(count)
    for pieces, given_up in enumerate((slow, steady, stalled), 2):
        before = set(opened.connections)
        new = opened.add(phase=Phase.WRITING)
        new.sock.send(bytes(2_000))
        opened.write(new, *[answer] * pieces, now=9.0)
        opened.clients[new].recv(2_000)
        opened.connections.give_up(10.0)
        assert before - opened.connections == {given_up}
        opened.connections.close(new)
    assert set(opened.connections) == {waiting}


def test_what_is_young_is_not_taken_for_slow(opened: Opened) -> None:
    """Nobody knows yet how fast it is read; and what was read fast at first may be slow of late."""
    answer = memoryview(bytes(MAX_UNREAD_BYTES // 2))
    stalled, young = opened.add(phase=Phase.WRITING), opened.add(phase=Phase.WRITING)
    opened.write(stalled, memoryview(bytes(20_000_000)), now=0.0)
    stalled.output = []
    reading = opened.connections.unread[stalled]
    assert [reading.bytes_per_second(now) for now in (0.5, 10.0, 10.5, 11.0)] == [
        YOUNG_BYTES_PER_SECOND, 2_000_000, 2_000_000, 0.0
    ]  # fmt: skip
    opened.write(young, answer, now=11.5)
    opened.write(opened.add(phase=Phase.WRITING), answer, now=12.0)
    assert stalled not in opened.connections
    assert young in opened.connections


def test_who_is_closed_holds_nothing(opened: Opened) -> None:
    """There may still be references to it, as to one that has been idle before."""
    connection = opened.add(since=-1.0)
    assert opened.evict(0.0) is connection
    closed = opened.add(phase=Phase.WRITING)
    closed.buffer = b"GET"
    opened.write(closed, memoryview(bytes(9)))
    for each in (connection, closed):
        opened.connections.close(each)
        assert (each.output, each.buffer, each.exchange) == ([], b"", None)
    assert not opened.connections.unread


def test_who_is_closed_before_its_turn_has_none(opened: Opened) -> None:
    """Nothing of it is counted among what waits to be written."""
    first, second = opened.add(), opened.add()
    for connection in (first, second):
        opened.connections.writable.setdefault(connection)
    opened.connections.close(first)
    assert list(opened.connections.writable) == [second]
