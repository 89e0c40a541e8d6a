"""The I/O thread: owns every socket and decides what becomes of every answer; other threads run the application."""

import array
import errno
import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from inference_api import logs
from inference_api.logs import LineWriter, access_line, timestamp
from inference_api.metrics import Metrics
from inference_api.worker.admission import Admission
from inference_api.worker.connection import MAX_PIPELINED_BYTES, Connection, Phase
from inference_api.worker.http import Refusal, RequestParser
from inference_api.worker.pool import Pool, is_quick
from inference_api.worker.wsgi import Application, Exchange, fields_of, problem_answer, run

READ_BYTES = 65_536
MAX_HELD_BYTES = 64 * 1_048_576
"""Bytes of request bodies held in one worker; beyond it, connections that hold much are not read from."""
MIN_PAUSED_BYTES = 65_536
MIN_COUNTED_BYTES = 4_096
ACCEPTS_PER_TURN = 16
TICK_SECONDS = 0.1
HEARTBEAT_SECONDS = 1.0
LINGER_SECONDS = 1.0
IDLE_AT_CLOSE_SECONDS = 1.0
LAST_ACCEPT_SECONDS = 0.5
DECIDE_SECONDS = 0.2
"""A process group's SIGTERM may reach a worker before the master has said that it means the whole service."""
REST_SECONDS = 0.001
GONE_STATUS = 499
"""The status in the log of a request whose client left before its answer, as in nginx; it is never sent."""

SO_ATTACH_FILTER = 26
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

log = logging.getLogger("inference_api.worker")

_NOT_RUN = b""
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_DETAILS = {
    "pending": "Too many requests are waiting.",
    "deadline": "The answer would come too late.",
    "stuck": "The models of this worker do not answer.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one worker; times are in seconds."""

    max_connections: int
    max_pending: int
    max_requests: int
    threads: int
    max_body_bytes: int
    request_timeout: float
    read_timeout: float
    keep_alive: float
    drain: float
    graceful: float


class Loop:
    """Accepts, reads, hands over, writes, and keeps the time, for all connections of one worker.

    Invariants: an exchange is answered once, by the I/O thread; a connection has at most one exchange, so that answers
    keep the order of their requests; an exchange that was handed over comes back exactly once as a last delivery.
    """

    def __init__(
        self,
        *,
        listeners: Sequence[socket.socket],
        application: Application,
        parser: RequestParser,
        limits: Limits,
        environ: dict[str, Any],
        trusted_peers: frozenset[str] | None,
        scheme_fields: Sequence[tuple[str, str]],
        wake_fds: tuple[int, int],
        writer: LineWriter,
        metrics: Metrics | None,
        access_log: bool,
        heartbeat: Callable[[], bool],
        is_shutdown: Callable[[], bool],
    ) -> None:
        self.closing = False  # answers say `Connection: close`
        self.state = "healthy"
        self._application = application
        self._parser = parser
        self._limits = limits
        self._environ = environ
        self._trusted_peers = trusted_peers
        self._scheme_fields = scheme_fields
        self._writer = writer
        self._metrics = metrics
        self._access_log = access_log
        self._heartbeat = heartbeat
        self._is_shutdown = is_shutdown
        self._admission = Admission(limits.max_pending, limits.request_timeout)
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self._listeners = list(listeners)
        self._is_accepting = False
        self._accept_again = 0.0
        self._evictable: list[tuple[float, int, Connection]] = []
        self._wake_fds = wake_fds
        self._selector.register(wake_fds[0], READ)
        self._is_asleep = False
        self._finished: deque[tuple[Exchange, bytes | None, bool]] = deque()
        self._is_awaiting = False  # the I/O thread waits for a thread to come to rest
        self._rest = threading.Lock()
        self._rest.acquire()
        self._pool = Pool("wsgi", self._run, self._skip, self._rested)
        self._get_pool = Pool("wsgi-get", self._run, self._skip, self._rested)
        self._get_pool.grow(1)
        self._handed = 0  # exchanges with the application threads, waiting or running
        self._dead = 0  # of those, the abandoned ones that still stand in the queue
        self._overdue: set[Exchange] = set()  # of those, the ones that run past their deadline
        self._requests = 0
        self._held_bytes = 0
        self._paused: set[Connection] = set()
        self._lines: list[bytes] = []
        self._ready: deque[Connection] = deque()  # that have more requests in their buffer
        self._stop_requested = False
        self._leave_at: float | None = None
        self._now = time.monotonic()
        self._next_tick = self._next_heartbeat = 0.0
        self._drain_ends: float | None = None
        self._last_accept: float | None = None
        self._grace_ends: float | None = None

    # Called in application threads.

    def _run(self, exchange: Exchange) -> None:
        run(self._application, exchange, self)

    def _skip(self, exchange: Exchange) -> None:
        self.deliver(exchange, _NOT_RUN, True)

    def deliver(self, exchange: Exchange, data: bytes | None, is_last: bool) -> None:
        """Hand a piece of an answer to the I/O thread."""
        if is_last:
            exchange.ended = time.monotonic()
        self._finished.append((exchange, data, is_last))
        # Answers of quick requests are collected together, when the thread rests.
        if self._is_asleep and not (self._pool.jobs and is_quick(exchange)):
            self._is_asleep = False
            self.wake()

    def _rested(self) -> None:
        if self._is_awaiting:
            self._is_awaiting = False
            with suppress(RuntimeError):  # two threads came to rest at once
                self._rest.release()
        elif self._finished and self._is_asleep:
            self._is_asleep = False
            self.wake()

    def wake(self) -> None:
        """End the I/O thread's sleep in the selector."""
        with suppress(BlockingIOError):  # it is full of reasons to wake
            os.write(self._wake_fds[1], b".")

    # One turn of the loop.

    def run(self) -> None:
        """Serve until the worker has left: after `shut_down` or `leave`, and what was begun is finished."""
        self._pool.grow(getattr(self._application, "threads", self._limits.threads))
        self._accept_on()
        while not self._has_left():
            self._is_asleep = True
            is_due = self._finished or self._ready or self._stop_requested
            timeout = 0.0 if is_due else max(0.0, self._next_tick - time.monotonic())
            events = self._selector.select(timeout)
            self._is_asleep = False
            self._now = time.monotonic()
            for key, mask in events:
                self._handle(key, mask)
            for _ in range(len(self._ready)):
                connection = self._ready.popleft()
                if connection in self._connections and connection.phase is Phase.IDLE:
                    self._advance(connection, b"")
            self._hand_over()
            self._collect()
            if self._stop_requested:
                self._stop_requested = False
                self._leave_at = self._now + DECIDE_SECONDS
                self._next_tick = self._now
            if self._now >= self._next_tick:
                self._tick()
            if self._lines:
                self._writer.write(self._lines)
                self._lines.clear()

    def _hand_over(self) -> None:
        """Let the threads begin with what has come in this turn.

        Requests that are quick are waited for: while they run, this thread could only compete with them for the
        interpreter, at the price of two context switches for each system call.
        """
        self._get_pool.wake()
        jobs = self._pool.jobs
        if jobs:
            self._is_awaiting = is_quick(jobs[-1])
            if self._pool.wake() and self._is_awaiting:
                self._rest.acquire(timeout=REST_SECONDS)
            self._is_awaiting = False

    def _handle(self, key: selectors.SelectorKey, mask: int) -> None:
        target = key.data
        if type(target) is Connection:
            if mask & READ and target in self._connections:
                self._read(target)
            if mask & WRITE and target in self._connections:
                self._write(target)
        elif target is not None:
            self._accept(target, ACCEPTS_PER_TURN)
        else:
            os.read(self._wake_fds[0], READ_BYTES)

    def _collect(self) -> None:
        finished = self._finished
        while finished:
            exchange, data, is_last = finished.popleft()
            if is_last:
                self._take_back(exchange)
            if exchange.abandoned:
                continue
            connection = exchange.connection
            if data is _NOT_RUN:
                self._shed(connection, exchange, "deadline")
            elif data is None:
                self._record(exchange)
                self._close(connection)
            else:
                if self._send(connection, data) and is_last:
                    self._answered(connection, exchange)

    def _take_back(self, exchange: Exchange) -> None:
        if exchange.is_get:
            return
        self._handed -= 1
        self._overdue.discard(exchange)
        self._settle(exchange)
        if exchange.is_dead:
            self._dead -= 1
        if exchange.is_done:
            self._admission.observe(exchange.path, exchange.ended - exchange.started)

    def _settle(self, exchange: Exchange) -> None:
        """It is no longer among the work to be done."""
        self._admission.backlog_seconds -= exchange.cost
        exchange.cost = 0.0

    # Reading.

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._lost(connection)
            return
        phase = connection.phase
        if not data:
            self._client_ended(connection)
        elif phase is Phase.IDLE or phase is Phase.READING:
            self._advance(connection, data)
        elif phase is not Phase.LINGERING:
            connection.buffer += data
            if len(connection.buffer) > MAX_PIPELINED_BYTES:
                self._watch(connection, connection.events & ~READ)

    def _advance(self, connection: Connection, data: bytes) -> None:
        try:
            exchange = connection.next_request(data)
        except Refusal as refusal:
            self._refuse(connection, refusal.status, refusal.detail)
            return
        if exchange is not None:
            self._dispatch(connection, exchange)
            return
        if connection.phase is Phase.IDLE and connection.is_within_request:
            connection.phase = Phase.READING
            connection.expires = self._now + self._limits.read_timeout
        if connection.wants_continue:
            connection.wants_continue = False
            if not self._send(connection, b"HTTP/1.1 100 Continue\r\n\r\n"):
                return
        self._hold(connection, connection.unfinished_bytes)
        if self._held_bytes > MAX_HELD_BYTES and connection.held_bytes > MIN_PAUSED_BYTES:
            self._paused.add(connection)
            self._watch(connection, connection.events & ~READ)
        elif connection.has_ended:
            self._client_ended(connection)

    def _hold(self, connection: Connection, count: int) -> None:
        self._held_bytes += count - connection.held_bytes
        connection.held_bytes = count

    def _dispatch(self, connection: Connection, exchange: Exchange) -> None:
        limits = self._limits
        self._requests += 1
        connection.exchange = exchange
        connection.phase = Phase.RUNNING
        exchange.arrived = self._now
        exchange.deadline = connection.expires = self._now + limits.request_timeout
        if connection.held_bytes or exchange.body_bytes > MIN_COUNTED_BYTES:
            self._hold(connection, exchange.body_bytes)
        if exchange.method in ("GET", "HEAD"):  # health never waits behind predictions
            exchange.is_get = True
            exchange.environ["inference_api.state"] = self.state
            if len(self._get_pool.jobs) < limits.max_pending:
                self._get_pool.jobs.append(exchange)
            else:
                self._shed(connection, exchange, "pending")
            return
        admission = self._admission
        threads = self._pool.size - len(self._overdue)
        must_wait = self._handed - self._dead - len(self._overdue) >= threads
        reason = admission.refusal(exchange.path, self._pending(), threads, must_wait=must_wait)
        if reason is not None:
            self._shed(connection, exchange, reason)
            return
        exchange.cost = admission.service_seconds(exchange.path)
        admission.backlog_seconds += exchange.cost
        self._handed += 1
        self._pool.jobs.append(exchange)

    def _pending(self) -> int:
        return max(0, len(self._pool.jobs) - self._dead)

    def _client_ended(self, connection: Connection) -> None:
        """The client sends no more: it has left, or has only closed its half (a FIN tells not which)."""
        connection.has_ended = True
        self._watch(connection, connection.events & ~READ)
        phase, exchange = connection.phase, connection.exchange
        if phase is Phase.READING and connection.is_within_request:
            self._refuse(connection, 400, "The request is not complete.")
        elif phase in (Phase.IDLE, Phase.READING, Phase.LINGERING):
            self._close(connection)
        elif phase is Phase.RUNNING and exchange is not None and not exchange.is_get:
            is_about_to_run = exchange.started or self._handed - self._dead <= self._pool.size
            if exchange.is_waiting or not is_about_to_run:  # what waits is not run for nobody, as in nginx
                self._lost(connection)

    # Answering.

    def _send(self, connection: Connection, data: bytes) -> bool:
        """Write what the socket takes now, keep the rest; returns whether the connection still is."""
        if connection.output:
            connection.output.append(memoryview(data))
            return True
        try:
            sent = connection.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lost(connection)
            return False
        if (exchange := connection.exchange) is not None and exchange.room is not None:
            exchange.sent_bytes += sent
            exchange.room.set()
        if sent < len(data):
            connection.output.append(memoryview(data)[sent:])
            self._watch(connection, connection.events | WRITE)
        return True

    def _write(self, connection: Connection) -> None:
        output = connection.output
        exchange = connection.exchange
        try:
            while output:
                sent = connection.sock.send(output[0])
                if exchange is not None and exchange.room is not None:
                    exchange.sent_bytes += sent
                    exchange.room.set()
                if sent < len(output[0]):
                    output[0] = output[0][sent:]
                    return
                del output[0]
        except BlockingIOError:
            return
        except OSError:
            self._lost(connection)
            return
        self._watch(connection, connection.events & ~WRITE)
        if connection.phase is Phase.WRITING:
            self._next(connection)

    def _answered(self, connection: Connection, exchange: Exchange) -> None:
        """The last byte of an answer is with the socket, or in `output`."""
        self._record(exchange)
        connection.must_close = not exchange.keep_alive
        if connection.output:
            connection.phase = Phase.WRITING
            connection.expires = self._now + self._limits.read_timeout
        else:
            self._next(connection)

    def _next(self, connection: Connection) -> None:
        """An answer is out: turn to the next request, or end the connection."""
        connection.exchange = None
        if connection.held_bytes:
            self._hold(connection, 0)
        if connection.must_close:
            self._linger(connection)
            return
        connection.phase = Phase.IDLE
        connection.since = self._now
        connection.expires = self._now + (IDLE_AT_CLOSE_SECONDS if self._grace_ends else self._limits.keep_alive)
        if connection.buffer:
            if not connection.events & READ and not connection.has_ended:
                self._watch(connection, connection.events | READ)
            self._ready.append(connection)
        elif connection.has_ended:
            self._close(connection)

    def _refuse(self, connection: Connection, status: int, detail: str) -> None:
        """Answer what is not a request, and end the connection: what follows in it cannot be understood."""
        exchange = connection.refused()
        exchange.arrived = self._now
        connection.buffer = b""
        self._answer(connection, exchange, status, detail)

    def _shed(self, connection: Connection, exchange: Exchange, reason: str) -> None:
        if self._metrics is not None:
            self._metrics.shed(reason)
        seconds = self._admission.retry_after_seconds(self._pool.size - len(self._overdue))
        self._answer(connection, exchange, 503, _DETAILS[reason], [("Retry-After", str(seconds))])

    def _answer(
        self,
        connection: Connection,
        exchange: Exchange,
        status: int,
        detail: str,
        more: list[tuple[str, str]] | None = None,
    ) -> None:
        """The server's own answer to a request: from now on the application's is not wanted."""
        exchange.abandoned = True
        if self.closing:
            exchange.keep_alive = False
        if self._send(connection, problem_answer(exchange, status, detail, more)):
            self._answered(connection, exchange)

    def _record(self, exchange: Exchange) -> None:
        """One access line and one count for each request."""
        now = self._now
        started = exchange.started
        wait = started - exchange.arrived if started else None
        environ = exchange.environ
        if self._metrics is not None:
            self._metrics.record(exchange.path, exchange.method, exchange.status, now - exchange.arrived, wait)
        if self._access_log:
            traceparent = environ.get("HTTP_TRACEPARENT")
            self._lines.append(
                access_line(
                    timestamp(time.time()),
                    exchange.request_id,
                    exchange.method or None,
                    exchange.path,
                    exchange.status,
                    now - exchange.arrived,
                    wait,
                    exchange.model,
                    logs.trace_id(traceparent) if traceparent is not None else None,
                )
            )
        exchange.environ = _NO_ENVIRON  # which refers back to the exchange

    # The ends of connections.

    def _lost(self, connection: Connection) -> None:
        """The client has gone; what it still waits for is not worth doing."""
        exchange = connection.exchange
        if exchange is not None and not exchange.abandoned:
            self._abandon(exchange)
            if connection.phase is Phase.RUNNING:
                exchange.status = GONE_STATUS
                if self._metrics is not None:
                    self._metrics.gone()
                self._record(exchange)
        self._close(connection)

    def _abandon(self, exchange: Exchange) -> None:
        exchange.abandoned = True
        if exchange.room is not None:
            exchange.room.set()
        if not exchange.is_get:
            self._settle(exchange)
            if not exchange.started:
                exchange.is_dead = True
                self._dead += 1

    def _linger(self, connection: Connection) -> None:
        """Close our half and wait for the client's: a reset would destroy an answer that is still under way."""
        if connection.has_ended:
            self._close(connection)
            return
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
            return
        connection.phase = Phase.LINGERING
        connection.buffer = b""
        connection.since = self._now
        connection.expires = self._now + LINGER_SECONDS
        self._watch(connection, READ)

    def _close(self, connection: Connection) -> None:
        if connection.events:
            self._selector.unregister(connection.sock)
            connection.events = 0
        connection.sock.close()
        self._hold(connection, 0)
        self._paused.discard(connection)
        self._connections.discard(connection)
        exchange, connection.exchange = connection.exchange, None
        if exchange is not None and not exchange.abandoned and exchange.room is not None:
            exchange.abandoned = True
            exchange.room.set()

    def _watch(self, connection: Connection, events: int) -> None:
        if events == connection.events:
            return
        if not connection.events:
            self._selector.register(connection.sock, events, connection)
        elif not events:
            self._selector.unregister(connection.sock)
        else:
            self._selector.modify(connection.sock, events, connection)
        connection.events = events

    # Accepting.

    def _accept_on(self) -> None:
        if not self._is_accepting:
            for listener in self._listeners:
                self._selector.register(listener, READ, listener)
            self._is_accepting = True

    def _accept_off(self, seconds: float) -> None:
        if self._is_accepting:
            for listener in self._listeners:
                self._selector.unregister(listener)
            self._is_accepting = False
        self._accept_again = self._now + seconds

    def _accept(self, listener: socket.socket, most: int) -> bool:
        """Accept up to `most` connections; returns whether more may be waiting."""
        for _ in range(most):
            if len(self._connections) >= self._limits.max_connections and not self._evict():
                self._accept_off(TICK_SECONDS)
                return False
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                return False
            except OSError as exc:
                if exc.errno in _OUT_OF_RESOURCES and not self._evict():
                    log.warning("accepting pauses: %s", exc.strerror)
                    self._accept_off(TICK_SECONDS)
                    return False
                continue
            sock.setblocking(False)
            address, port = (str(peer[0]), str(peer[1])) if isinstance(peer, tuple) else ("", "")
            is_trusted = self._trusted_peers is None or address in self._trusted_peers
            connection = Connection(
                sock,
                self._parser,
                {**self._environ, "REMOTE_ADDR": address, "REMOTE_PORT": port},
                self._limits.max_body_bytes,
                self._scheme_fields if is_trusted else (),
            )
            connection.since = self._now
            idle_seconds = IDLE_AT_CLOSE_SECONDS if self._grace_ends else self._limits.keep_alive
            connection.expires = self._now + idle_seconds
            self._connections.add(connection)
            self._watch(connection, READ)
            self._next_tick = min(self._next_tick, self._now + TICK_SECONDS)
        return True

    def _evict(self) -> bool:
        """Close the connection that has been idle for longest; returns whether there was one."""
        for is_fresh in (False, True):
            if is_fresh:
                self._evictable = sorted(
                    ((c.since, id(c), c) for c in self._connections if c.phase in (Phase.IDLE, Phase.LINGERING)),
                    reverse=True,
                )
            while self._evictable:
                since, _, connection = self._evictable.pop()
                is_idle = connection.phase in (Phase.IDLE, Phase.LINGERING) and connection in self._connections
                if is_idle and connection.since == since:
                    self._close(connection)
                    return True
        return False

    # Time.

    def _tick(self) -> None:
        now = self._now
        for connection in [c for c in self._connections if c.expires <= now]:
            self._expire(connection)
        if self._held_bytes <= MAX_HELD_BYTES and self._paused:
            for connection in self._paused:
                self._watch(connection, connection.events | READ)
            self._paused.clear()
        self._shed_hopeless()
        self._advance_shutdown()
        is_stuck = 0 < self._pool.size <= len(self._overdue)
        if is_stuck != (self.state == "stuck"):
            self.state = "stuck" if is_stuck else "draining" if self._drain_ends is not None else "healthy"
            if is_stuck:
                log.error("all threads are stuck", extra={"threads": self._pool.size})
            else:
                log.warning("threads are free again")
        if is_stuck:
            self._accept_off(TICK_SECONDS)
        elif not self._is_accepting and now >= self._accept_again and (self._grace_ends is None or self._last_accept):
            self._accept_on()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_SECONDS
            self._pool.grow(getattr(self._application, "threads", self._limits.threads))
            if not is_stuck and not self._heartbeat():
                self.leave()
        if 0 < self._limits.max_requests <= self._requests and self._grace_ends is None:
            log.info("leaving after MAX_REQUESTS requests", extra={"requests": self._requests})
            self.leave()
        if self._metrics is not None:
            self._publish(self._metrics)
        busy = self._connections or self._grace_ends or self._drain_ends
        self._next_tick = now + TICK_SECONDS if busy else self._next_heartbeat

    def _publish(self, metrics: Metrics) -> None:
        pending = self._pending()
        metrics.gauges(
            in_flight=max(0, self._handed - self._dead - pending),
            pending=pending,
            connections=len(self._connections),
            threads_stuck=len(self._overdue),
        )
        metrics.log_lines_dropped(self._writer.take_dropped())

    def _expire(self, connection: Connection) -> None:
        """A connection has been in its phase for too long."""
        exchange = connection.exchange
        if connection.phase is Phase.READING:
            self._refuse(connection, 408, f"The request took longer than {self._limits.read_timeout:g} seconds.")
        elif connection.phase is Phase.RUNNING and exchange is not None:
            self._abandon(exchange)
            if exchange.started and not exchange.is_get:
                self._overdue.add(exchange)
            if self._metrics is not None:
                self._metrics.timed_out()
            log.warning("deadline passed", extra={**fields_of(exchange), "started": bool(exchange.started)})
            if exchange.room is not None:  # part of the answer is out
                self._record(exchange)
                self._close(connection)
            else:
                detail = f"The answer took longer than {self._limits.request_timeout:g} seconds."
                self._answer(connection, exchange, 504, detail)
        else:
            self._close(connection)

    def _shed_hopeless(self) -> None:
        """Refuse at once what waits and, by what has been learnt since, cannot be answered in time."""
        admission, now = self._admission, self._now
        threads = self._pool.size - len(self._overdue)
        if not self._pending() or threads <= 0:
            return
        exchanges = [c.exchange for c in self._connections if c.phase is Phase.RUNNING and c.exchange is not None]
        wait_seconds = 0.0
        for exchange in sorted((e for e in exchanges if not e.is_get), key=lambda e: e.arrived):
            if exchange.started:
                admission.at_least(exchange.path, now - exchange.started)
                continue
            self._settle(exchange)
            exchange.cost = admission.service_seconds(exchange.path)
            admission.backlog_seconds += exchange.cost
            if wait_seconds and now + wait_seconds + exchange.cost > exchange.deadline:
                self._abandon(exchange)
                self._shed(exchange.connection, exchange, "deadline")
            else:
                wait_seconds += exchange.cost / threads

    # The end of the worker.

    def request_stop(self) -> None:
        """Called in a signal handler: `shut_down` or `leave` soon."""
        self._stop_requested = True

    def shut_down(self) -> None:
        """The service ends: serve on as a lame duck, /health saying so, then let nobody in and finish."""
        if self._drain_ends is None and self._grace_ends is None:
            log.info("draining", extra={"seconds": self._limits.drain})
            self.closing = True
            self._drain_ends = self._now + self._limits.drain
            self.state = "draining"
            self._next_tick = self._now

    def leave(self) -> None:
        """This worker is replaced: accept no more, finish, and go. Others serve on, so that /health does not change."""
        if self._drain_ends is None and self._grace_ends is None:
            self._accept_off(0.0)
            self._begin_grace()

    def _begin_grace(self) -> None:
        self.closing = True
        self._grace_ends = self._now + self._limits.graceful
        self._next_tick = self._now
        for connection in self._connections:
            if connection.phase is Phase.IDLE:
                connection.expires = min(connection.expires, self._now + IDLE_AT_CLOSE_SECONDS)

    def _advance_shutdown(self) -> None:
        now = self._now
        if self._drain_ends is None and (self._leave_at is not None or self._grace_ends is not None):
            if self._is_shutdown():
                self._grace_ends = None
                self.shut_down()
            elif self._leave_at is not None and now >= self._leave_at:
                self.leave()
        if self._drain_ends is not None and self._grace_ends is None and now >= self._drain_ends:
            for listener in self._listeners:
                _drop_new_connections(listener)
            self._last_accept = now + LAST_ACCEPT_SECONDS
            self._begin_grace()
        if self._last_accept is not None and now >= self._last_accept and self._is_accepting:
            # No SYN has been let in since: whoever got in before stands in the backlog by now.
            for listener in self._listeners:
                while self._accept(listener, ACCEPTS_PER_TURN):
                    pass
            if self._is_accepting:
                self._last_accept = None
                self._accept_off(0.0)
                for listener in self._listeners:
                    listener.close()
                self._listeners.clear()
        if self._grace_ends is not None and now >= self._grace_ends:
            unanswered = [c.exchange for c in self._connections if c.phase is Phase.RUNNING and c.exchange]
            if unanswered:
                log.error("grace period over, requests lost", extra={"lost": len(unanswered)})
            for connection in list(self._connections):
                self._lost(connection)

    def _has_left(self) -> bool:
        return self._grace_ends is not None and not self._connections and not self._last_accept


_NO_ENVIRON: dict[str, Any] = {}


def _drop_new_connections(listener: socket.socket) -> None:
    """Make the kernel ignore new connections, so that none is in the backlog when the listener is closed.

    Their clients' kernels try again; a closed listener would have reset them. A classic BPF program (Linux socket(7),
    SO_ATTACH_FILTER): drop segments with SYN and without ACK, let pass what belongs to handshakes under way.
    """
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (0x30, 0, 0, 13),  # load the byte of TCP flags
            (0x54, 0, 0, 0x12),  # keep SYN and ACK
            (0x15, 0, 1, 0x02),  # SYN alone?
            (0x06, 0, 0, 0),  # drop
            (0x06, 0, 0, 0xFFFFFFFF),  # pass
        )
    )
    kept = array.array("B", program)  # the kernel is given its address: it must live until the call has returned
    address, length = kept.buffer_info()
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", length // 8, address))
    except OSError as exc:
        log.warning("new connections cannot be held off while closing: %s", exc.strerror)
