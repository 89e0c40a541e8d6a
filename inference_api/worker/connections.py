"""The open connections of a worker: what the selector watches, how many there may be, and the bytes they hold."""

import fcntl
import logging
import selectors
import socket
import sys
import termios
from contextlib import suppress

from inference_api.worker.connection import Connection, Phase
from inference_api.worker.wsgi import Exchange

MAX_HELD_BYTES = 64 * 1_048_576
"""Bytes of request bodies held in one worker; beyond it, connections that hold much are not read from."""
MAX_COMPLETE_BYTES = MAX_HELD_BYTES // 2
"""Of them, those of requests that wait or run; beyond it, no further one is completed meanwhile."""
MIN_PAUSED_BYTES = 65_536
MAX_UNREAD_BYTES = 256 * 1_048_576
"""Bytes of whole answers, waiting in one worker for their clients to read them; beyond it some are given up."""
MIN_BYTES_PER_SECOND = 65_536
"""A client that takes as much of its answer in each READ_TIMEOUT is not cut off, however long that takes. One that
sends or takes less may be, where nobody else can be let in."""
LOOK_SECONDS = 1.0
"""How fast a request comes, or an answer is read, is looked at for so long: before, nobody can tell."""
YOUNG_BYTES_PER_SECOND = 2.0 * MIN_BYTES_PER_SECOND
"""What is believed until then."""

log = logging.getLogger("inference_api.worker")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

_IDLE_PHASES = (Phase.IDLE, Phase.LINGERING)


class Connections(set[Connection]):
    """Those that are open. The I/O thread alone touches them."""

    def __init__(self, selector: selectors.BaseSelector, max_connections: int) -> None:
        super().__init__()
        self._selector = selector
        self._max_connections = max_connections
        self.lacks_room = False  # somebody could not be let in
        self.is_crowded = False  # somebody was let in at the cost of one who had only just come
        self._idle: list[tuple[Connection, float]] = []  # some that were, since when; who is to be closed first is last
        self._idle_found = 0.0
        self.writable: dict[Connection, None] = {}  # that take more of their answer, in the order of their turns
        self._held_bytes = 0
        self._paused: dict[Connection, None] = {}  # that are not read from, in the order in which they may go on
        self.unread: dict[Connection, Unread] = {}  # their answers, once these are whole, until they have been read

    def add(self, connection: Connection) -> None:
        """Read from a new one."""
        super().add(connection)
        self.watch(connection, READ)

    def close(self, connection: Connection) -> None:
        """Close its socket; to do so again changes nothing."""
        self.watch(connection, 0)
        connection.sock.close()
        connection.forget()
        self.hold(connection, 0)
        self.unread.pop(connection, None)
        self.writable.pop(connection, None)
        self.discard(connection)

    def watch(self, connection: Connection, events: int) -> None:
        """Have the selector watch it for these events."""
        if events == connection.events:
            return
        if not connection.events:
            self._selector.register(connection.sock, events, connection)
        elif not events:
            self._selector.unregister(connection.sock)
        else:
            self._selector.modify(connection.sock, events, connection)
        connection.events = events

    # How many there may be.

    @property
    def has_room(self) -> bool:
        """Whether one more may be opened."""
        return len(self) < self._max_connections

    def longest_idle(self, now: float) -> Connection | None:
        """The one that may be closed so that another can be opened; None if all are busy.

        Of those that have become idle in the last LOOK_SECONDS, who has been answered and lingers goes first.
        """

        def order(connection: Connection) -> tuple[bool, bool, float]:
            is_young = connection.since > now - LOOK_SECONDS
            return is_young, is_young and connection.phase is Phase.IDLE, connection.since

        if now - self._idle_found >= LOOK_SECONDS:
            self._idle.clear()
        for _ in range(2):  # first among those that have been found before
            while self._idle:
                connection, since = self._idle[-1]
                if connection.since == since and self._is_idle(connection):
                    return connection
                self._idle.pop()
            # Not one that was accepted in this very turn: nobody has looked yet whether its request has come.
            idle = [each for each in self if each.phase in _IDLE_PHASES and each.since < now]
            self._idle = [(each, each.since) for each in sorted(idle, key=order, reverse=True)]
            self._idle_found = now
        return None

    def displace(self, idle: Connection, now: float) -> None:
        """Close it, as somebody has come in its place."""
        self.is_crowded |= idle.is_new and now - idle.since < LOOK_SECONDS
        self.close(idle)

    def _is_idle(self, connection: Connection) -> bool:
        if connection.phase not in _IDLE_PHASES or connection.buffer or connection not in self:
            return False
        try:
            return connection.phase is Phase.LINGERING or not connection.sock.recv(1, socket.MSG_PEEK)
        except OSError:  # nothing has come that is not read yet
            return True

    def in_the_way(self, now: float) -> list[Connection]:
        """What is to be ended, the slowest first, so that others can be let in; empty where they have been, of late.

        Requests that come, or answers that are read, at less than MIN_BYTES_PER_SECOND; and where others have been let
        in, but at the cost of some who had only just come, only if half of all connections are so slow.
        """
        lacks_room = self.lacks_room and not self.has_room and self.longest_idle(now) is None
        is_crowded, self.lacks_room, self.is_crowded = self.is_crowded, False, False
        if not (lacks_room or is_crowded):
            return []
        speeds = {
            each: each.unfinished_bytes / (now - each.since)
            for each in self
            if each.phase is Phase.READING and now - each.since >= LOOK_SECONDS
        }
        speeds |= {answer.connection: answer.bytes_per_second(now) for answer in self._stalled()}
        slow = sorted((each for each in speeds if speeds[each] < MIN_BYTES_PER_SECOND), key=speeds.__getitem__)
        return slow if lacks_room or len(slow) >= self._max_connections // 2 else []

    # What they hold.

    def hold(self, connection: Connection, count: int) -> None:
        """Count it with so many bytes from now on; while all hold too much, no more is read where it holds much."""
        self._held_bytes += count - connection.held_bytes
        connection.held_bytes = count
        if not count or connection.phase is not Phase.READING:
            self._paused.pop(connection, None)
        elif count > MIN_PAUSED_BYTES and self._held_bytes > MAX_HELD_BYTES:
            self._paused.setdefault(connection)
            if connection is not self._goes_on():
                connection.was_paused = True
                self.watch(connection, connection.events & ~READ)

    def resume(self) -> None:
        """Read on from paused connections: from all where there is room again, else from the first if need be."""
        has_room = self._held_bytes <= MAX_HELD_BYTES
        for connection in list(self._paused) if has_room else filter(None, [self._goes_on()]):
            if not connection.has_more:
                self.watch(connection, connection.events | READ)
        if has_room:
            self._paused.clear()

    def _goes_on(self) -> Connection | None:
        """Who may send more although all hold too much: one at a time, or no request would ever be complete."""
        complete_bytes = sum(each.held_bytes for each in self if each.phase is Phase.RUNNING)
        return next(iter(self._paused), None) if complete_bytes < MAX_COMPLETE_BYTES else None

    def _stalled(self) -> "list[Unread]":
        """The answers of which nobody takes more now."""
        return [answer for connection, answer in self.unread.items() if connection not in self.writable]

    def give_up(self, now: float) -> None:
        """Where those whose clients take no more of their answers hold too much, close the slowest, but for one."""
        stalled = self._stalled()
        excess = sum(answer.held_bytes for answer in stalled) - MAX_UNREAD_BYTES
        if excess <= 0:
            return
        *slow, _ = sorted(stalled, key=lambda answer: answer.bytes_per_second(now))
        for answer in slow:
            log.warning("an answer is given up: unread ones hold too much memory", extra=answer.exchange.log_fields)
            self.close(answer.connection)
            excess -= answer.held_bytes
            if excess <= 0:
                break


class Unread:
    """An answer that its client has not taken all of yet."""

    def __init__(self, connection: Connection, exchange: Exchange, now: float) -> None:
        self.connection = connection
        self.exchange = exchange
        # A view keeps the whole of what it shows a part of.
        self.held_bytes = sum(memoryview(piece.obj).nbytes for piece in connection.output)
        self._bytes_at_check = self._bytes_at_look = _untaken_bytes(connection)
        self._looked = now
        self._bytes_per_second = YOUNG_BYTES_PER_SECOND

    def bytes_per_second(self, now: float) -> float:
        """How fast it has been read of late."""
        seconds = now - self._looked
        if seconds >= LOOK_SECONDS:
            before, self._bytes_at_look = self._bytes_at_look, _untaken_bytes(self.connection)
            self._bytes_per_second = (before - self._bytes_at_look) / seconds
            self._looked = now
        return self._bytes_per_second

    def is_read(self, seconds: float) -> bool:
        """Whether enough of it has been read in the seconds since this was last called."""
        before, self._bytes_at_check = self._bytes_at_check, _untaken_bytes(self.connection)
        return before - self._bytes_at_check >= MIN_BYTES_PER_SECOND * seconds


def _untaken_bytes(connection: Connection) -> int:
    """How much has been written of what its client's side has not confirmed."""
    count = sum(map(len, connection.output))
    with suppress(OSError):  # the socket takes megabytes, and much of them is gone before it takes more
        count += int.from_bytes(fcntl.ioctl(connection.sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return count
