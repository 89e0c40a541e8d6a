"""The open connections of a worker: what the selector watches, how many there may be, and the bytes they hold."""

import logging
import selectors
import socket
from operator import attrgetter, itemgetter

from inference_api.worker.connection import Connection, Phase

MAX_HELD_BYTES = 64 * 1_048_576
"""Bytes of request bodies held in one worker; beyond it, connections that hold much are not read from."""
MIN_PAUSED_BYTES = 65_536
MAX_UNREAD_BYTES = 256 * 1_048_576
"""Bytes of whole answers, waiting in one worker for their clients to read them; beyond it some are given up."""

log = logging.getLogger("inference_api.worker")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

_IDLE_PHASES = (Phase.IDLE, Phase.LINGERING)


class Connections(set[Connection]):
    """Those that are open. The I/O thread alone touches them."""

    def __init__(self, selector: selectors.BaseSelector, max_connections: int) -> None:
        super().__init__()
        self._selector = selector
        self._max_connections = max_connections
        self._evictable: list[tuple[Connection, float]] = []  # that were idle, since when; the longest last
        self.writable: dict[Connection, None] = {}  # that take more of their answer, in the order of their turns
        self._held_bytes = 0
        self._paused: dict[Connection, None] = {}  # that hold much: in the order in which they may go on
        self._unread: dict[Connection, int] = {}  # bytes of their answers
        self._unread_bytes = 0

    def add(self, connection: Connection) -> None:
        """Read from a new one."""
        super().add(connection)
        self.watch(connection, READ)

    def close(self, connection: Connection) -> None:
        """Close its socket; to do so again changes nothing."""
        self.watch(connection, 0)
        connection.sock.close()
        connection.exchange = None  # which refers back to it
        self.hold(connection, 0)
        self.was_read(connection)
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

    def has_room(self, now: float) -> bool:
        """Whether one more may be opened, if need be in the place of one that is idle."""
        return len(self) < self._max_connections or self.evict(now)

    def evict(self, now: float) -> bool:
        """Close the connection that has been idle for longest; returns whether there was one."""
        for _ in range(2):
            while self._evictable:
                connection, since = self._evictable.pop()
                if connection.since == since and self._is_idle(connection):
                    self.close(connection)
                    return True
            # Not one that was accepted in this very turn: nobody has looked yet whether its request has come.
            idle = ((c, c.since) for c in self if c.phase in _IDLE_PHASES and c.since < now)
            self._evictable = sorted(idle, key=itemgetter(1), reverse=True)
        return False

    def _is_idle(self, connection: Connection) -> bool:
        if connection.phase not in _IDLE_PHASES or connection.buffer or connection not in self:
            return False
        try:
            return connection.phase is Phase.LINGERING or not connection.sock.recv(1, socket.MSG_PEEK)
        except OSError:  # nothing has come that is not read yet
            return True

    # What they hold.

    def hold(self, connection: Connection, count: int) -> None:
        """Count it with so many bytes from now on."""
        self._held_bytes += count - connection.held_bytes
        connection.held_bytes = count
        if not count or connection.phase is not Phase.READING:
            self._paused.pop(connection, None)

    def pause_if_full(self, connection: Connection) -> bool:
        """Read no more from a connection that holds much while all hold too much; returns whether that is so."""
        if self._held_bytes <= MAX_HELD_BYTES or connection.held_bytes <= MIN_PAUSED_BYTES:
            return False
        self._paused.setdefault(connection)
        if connection is not next(iter(self._paused)):  # one goes on, or none would ever be complete
            self.watch(connection, connection.events & ~READ)
        return True

    def resume(self) -> None:
        """Read on from paused connections: from all where there is room again, else from the first."""
        has_room = self._held_bytes <= MAX_HELD_BYTES
        for connection in list(self._paused) if has_room else list(self._paused)[:1]:
            if connection.phase is Phase.READING:
                self.watch(connection, connection.events | READ)
        if has_room:
            self._paused.clear()

    def wrote(self, connection: Connection) -> None:
        """Its answer waits for the client, until `was_read`.

        Where all that wait are too large, those are closed that have been read least of late, but none whose client
        waits for its turn.
        """
        # A view keeps the whole of what it shows a part of.
        count = sum(memoryview(piece.obj).nbytes for piece in connection.output)
        self._unread[connection] = count
        self._unread_bytes += count
        while self._unread_bytes > MAX_UNREAD_BYTES:
            others = [each for each in self._unread if each is not connection and each not in self.writable]
            if not others:
                break
            slowest = min(others, key=attrgetter("expires"))
            fields = slowest.unread.log_fields if slowest.unread is not None else {}
            log.warning("an answer is given up: unread ones hold too much memory", extra=fields)
            self.close(slowest)

    def was_read(self, connection: Connection) -> None:
        """Its answer, if there was one, does not wait any more."""
        self._unread_bytes -= self._unread.pop(connection, 0)
        connection.unread = None
