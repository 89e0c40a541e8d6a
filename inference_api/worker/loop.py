"""The I/O thread's duties: it owns every socket and decides what becomes of every answer."""

import itertools
import logging
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from inference_api.config import Settings
from inference_api.logs import LineWriter
from inference_api.metrics import Metrics
from inference_api.worker.admission import Admission
from inference_api.worker.connection import MAX_PIPELINED_BYTES, Connection, Phase
from inference_api.worker.connections import READ, WRITE, Connections, Unread
from inference_api.worker.http import Refusal
from inference_api.worker.journal import Journal
from inference_api.worker.lifecycle import Lifecycle
from inference_api.worker.listener import Listener
from inference_api.worker.pool import LARGE_BYTES, Outbox, Pool
from inference_api.worker.role import Role
from inference_api.worker.wsgi import Application, Exchange, problem_answer

READ_BYTES = 65_536
CONNECTIONS_AT_ONCE = 64
"""What has come on so many connections is read before it is understood, which needs as many times READ_BYTES."""
FEW_CONNECTIONS = 2
"""Where more than so many send at once, more are likely to have sent while these were read."""
PIECES_AT_ONCE = 128
MIN_COUNTED_BYTES = 4_096
TICK_SECONDS = 0.1
HEARTBEAT_SECONDS = 0.5
LINGER_SECONDS = 1.0
IDLE_AT_CLOSE_SECONDS = 1.0
LATE_SECONDS = 0.01
MAX_SLOW_AT_ONCE = 64
"""Where nobody can be let in, the slowest is ended, then twice as many at each tick for as long as that lasts."""
STUCK_BATCH_TIMEOUTS = 2
"""A batch that takes so many times REQUEST_TIMEOUT is stuck, and with it the only thread that can run its model."""
RESERVED_PART = 8
"""One of so many connections is not for requests that wait, but for /health and refusals."""
GONE_STATUS = 499
"""The status in the log of a request whose client left before its answer, as in nginx; it is never sent."""

log = logging.getLogger("inference_api.worker")

_IDLE, _READING, _RUNNING, _WRITING, _LINGERING = Phase  # to look one up in its class takes ten times as long

# What is not learnt from: paths that clients make up, which would crowd out those that exist, and 401 and 503, by which
# the application says that it has not called the model.
_NOT_SERVED = (401, 404, 405, 503)
_GET_METHODS = ("GET", "HEAD")
_DETAILS = {
    "pending": "Too many requests are waiting.",
    "deadline": "The answer would come too late.",
    "stuck": "The models of this worker do not answer.",
}


class Loop:
    """Reads, hands over, writes, and keeps the time, for all connections of one worker.

    Invariants: an exchange is answered once, by the I/O thread; a connection has at most one exchange, so that answers
    keep the order of their requests; an exchange that a thread has taken comes back exactly once as a last delivery.
    """

    def __init__(
        self,
        *,
        listeners: Sequence[socket.socket],
        application: Application,
        connect: Callable[[socket.socket, str, str], Connection],
        settings: Settings,
        max_requests: int,
        on_max_requests: Callable[[], None],
        wake_fds: tuple[int, int],
        writer: LineWriter,
        metrics: Metrics,
        heartbeat: Callable[[], None],
        is_shutdown: Callable[[], bool],
    ) -> None:
        self._application = application
        self._connect = connect
        self._settings = settings
        self._writer = writer
        self._metrics = metrics
        self._journal = Journal(settings, writer, metrics)
        self._heartbeat = heartbeat
        self._selector = selectors.DefaultSelector()
        self._connections = Connections(self._selector, settings.max_connections)
        self._listener = Listener(listeners, self._selector, self._connections, self._admit)
        self._ready: list[Connection] = []  # that have more than they have been asked for
        self._wake_fd = wake_fds[0]
        self._selector.register(self._wake_fd, READ)
        self._outbox = Outbox(wake_fds[1])
        self._pool = Pool("wsgi", self._run)
        self._get_pool = Pool("wsgi-get", self._run)
        # Were every connection taken by a request that waits, nobody could be told that it waits in vain.
        max_waiting = settings.max_connections - settings.max_connections // RESERVED_PART
        self._admission = Admission(self._pool, min(settings.max_pending, max_waiting), settings.request_timeout)
        self._role = Role(self, self._pool, self._outbox.resumed, self._admission)
        self._lifecycle = Lifecycle(settings, self._listener, self._outbox, is_shutdown)
        self._has_forked = False
        self._requests = 0
        self._slow_at_once = 1
        self._max_requests = max_requests
        self._on_max_requests = on_max_requests
        self._now = time.monotonic()
        self._next_tick = self._next_heartbeat = 0.0

    def _run(self, exchange: Exchange) -> None:
        """Called in application threads."""
        environ = exchange.environ  # which is taken away once it is abandoned
        started = exchange.started
        # One that has waited too long to be finished in time is not started. What has begun is ended.
        is_late = started - exchange.arrived > LATE_SECONDS and started + exchange.cost > exchange.deadline
        if exchange.later is None and (exchange.abandoned or is_late):
            self._outbox.deliver(exchange, None, True)
        else:
            exchange.run(self._application, environ, self._outbox)
        if self._has_forked:  # in the model: the child must not serve its parent's connections
            os._exit(0)

    def _forked(self) -> None:
        self._has_forked = True
        for connection in self._connections:  # or their clients would not see that the parent has closed them
            connection.sock.close()

    def serve(self) -> None:
        """Serve until the worker has left: after `request_stop`, and what was begun is finished."""
        os.register_at_fork(after_in_child=self._forked)
        try:
            self._role.serve()
        finally:
            self._journal.write()

    def request_stop(self) -> None:
        """Shut down or leave soon; called in a signal handler."""
        self._lifecycle.stop(time.monotonic())
        self._next_tick = 0.0
        self._outbox.wake()  # the signal has, but perhaps before this

    # One turn of the loop, see role.py.

    def is_over(self) -> bool:
        """Whether the worker has finished what it has to before it leaves."""
        return self._lifecycle.is_in_grace and not self._connections and self._listener.is_done

    def receive(self, *, may_wait: bool) -> None:
        """Read what has come, submit the requests that are complete, write on where there is room, and accept."""
        outbox = self._outbox
        self._get_pool.wake()  # for what its thread has left while too many answers waited to be sent
        outbox.is_asleep = True
        is_due = outbox.pieces or outbox.resumed or self._ready or not may_wait
        may_sleep = not is_due and not self._journal.entries
        events = self._selector.select(max(0.0, self._next_tick - time.monotonic()) if may_sleep else 0.0)
        outbox.is_asleep = False
        self._now = time.monotonic()
        if not events and not is_due:
            self._journal.write()
        knocked: list[socket.socket] = []
        for first in range(0, len(events), CONNECTIONS_AT_ONCE):
            knocked += self._read(events[first : first + CONNECTIONS_AT_ONCE])
        if FEW_CONNECTIONS < len(events) < min(len(self._connections), CONNECTIONS_AT_ONCE):
            # The others of those that were answered together.
            knocked += self._read(self._selector.select(0.0))
        self._write_on()
        ready, self._ready = self._ready, []
        for connection in ready:
            if connection.phase is _IDLE or connection.phase is _READING:  # it has not been refused meanwhile
                self._guarded(self._advance, connection)
        for listening in knocked:  # last: to let somebody in may close a connection that looks idle until it is read
            self._listener.accept(listening, self._now)
        self._get_pool.wake()

    def respond(self) -> None:
        """Send the answers that are there, and do what its time has come for."""
        self._send_answers()
        if self._now >= self._next_tick:
            self._tick()
        if self._requests >= self._max_requests:
            self._wear_out()
        self._journal.write_after_turn()

    def _wear_out(self) -> None:
        # One that is not ready yet has answered 503 only, and its successor would not be ready, either.
        if not self._outbox.closing and getattr(self._application, "is_ready", True):
            log.info("worn out by MAX_REQUESTS, to be replaced", extra={"requests": self._requests})
            self._max_requests = sys.maxsize
            self._on_max_requests()

    def _guarded(self, step: Callable[[Connection], None], connection: Connection) -> None:
        try:
            if connection in self._connections:
                step(connection)
        except Exception:
            self._failed(connection)

    def _failed(self, connection: Connection) -> None:
        """A bug costs one connection, not the worker."""
        log.exception("a connection failed")
        with suppress(Exception):
            self._lost(connection)
        self._connections.close(connection)

    def _send_answers(self) -> None:
        """Send what has been made, and then see to what it ends."""
        pieces, pool, admission = self._outbox.pieces, self._pool, self._admission
        ended = []
        for _ in range(min(len(pieces), PIECES_AT_ONCE)):  # a thread may make more as fast as they are sent
            exchange, data, is_last = pieces.popleft()
            if is_last:
                ended.append(exchange)
            if exchange.abandoned:
                continue
            connection = exchange.connection
            try:
                if is_last and not exchange.ended:  # it was not run
                    self._shed(exchange, "deadline")
                elif data is None:
                    self._journal.record(exchange, self._now)
                    self._connections.close(connection)
                else:
                    self._send(connection, data)
            except Exception:
                self._failed(connection)
        for exchange in ended:
            if exchange.pool is self._get_pool:
                body = self._get_pool.take_back(exchange)
            else:
                body = pool.take_back(exchange)
                admission.leave(exchange)
                if exchange.ended and exchange.status not in _NOT_SERVED:
                    admission.observe(exchange, exchange.ended - exchange.started)
            connection = exchange.connection
            if connection.exchange is exchange:  # its answer has been sent
                try:
                    if body is not None:
                        self._send(connection, body)
                    self._answered(exchange)
                except Exception:
                    self._failed(connection)

    # Reading.

    def _read(self, events: Sequence[tuple[selectors.SelectorKey, int]]) -> list[socket.socket]:
        """Read from these connections, then take what has come; returns the listeners among them."""
        arrived: list[tuple[Connection, bytes | None]] = []  # None where the connection is lost
        knocked: list[socket.socket] = []
        for key, mask in events:
            target = key.data
            if type(target) is Connection:
                if mask & READ:
                    try:
                        arrived.append((target, target.sock.recv(READ_BYTES)))
                    except BlockingIOError:
                        pass
                    except (OSError, MemoryError):
                        arrived.append((target, None))
                if mask & WRITE:
                    self._connections.writable.setdefault(target)
            elif target is not None:
                knocked.append(target)
            else:
                os.read(self._wake_fd, READ_BYTES)
        for connection, data in arrived:
            try:  # not by `_guarded`, nor below: a call more for each request
                self._take(connection, data)
            except Exception:
                self._failed(connection)
        return knocked

    def _take(self, connection: Connection, data: bytes | None) -> None:
        phase = connection.phase
        if data and (phase is _READING or (phase is _IDLE and not connection.buffer)):
            self._advance(connection, data)
        elif data is None:
            self._lost(connection)
        elif not data:
            self._client_ended(connection)
        elif phase is _LINGERING:  # it reads its answer when it has sent all, which is thrown away
            latest = connection.since + self._settings.read_timeout
            connection.expires = min(self._now + LINGER_SECONDS, latest)
        else:  # it comes after what is being answered, or waits for its turn to be understood
            connection.buffer += data
            if len(connection.buffer) > MAX_PIPELINED_BYTES:
                self._connections.watch(connection, connection.events & ~READ)

    def _advance(self, connection: Connection, data: bytes = b"") -> None:
        try:
            exchange = connection.next_request(data)
        except Refusal as refusal:
            self._refuse(connection, refusal.status, str(refusal))
            return
        if exchange is not None:
            self._dispatch(connection, exchange)
            return
        if connection.phase is _IDLE and connection.is_within_request:
            connection.phase = _READING
            connection.since = self._now
            connection.expires = self._now + self._settings.read_timeout
            connection.was_paused = False
        if connection.wants_continue:
            connection.wants_continue = False
            if not self._send(connection, b"HTTP/1.1 100 Continue\r\n\r\n"):
                return
        if connection.has_more:
            self._connections.watch(connection, connection.events & ~READ)
            self._ready.append(connection)
            return
        if not connection.has_ended:
            self._connections.watch(connection, connection.events | READ)
        self._connections.hold(connection, connection.unfinished_bytes)
        if connection.has_ended:
            self._client_ended(connection)

    def _dispatch(self, connection: Connection, exchange: Exchange) -> None:
        self._requests += 1
        connection.exchange = exchange
        connection.phase = _RUNNING
        exchange.arrived = self._now
        exchange.deadline = connection.expires = self._now + self._settings.request_timeout
        if connection.held_bytes or exchange.body_bytes > MIN_COUNTED_BYTES:
            self._connections.hold(connection, exchange.body_bytes)
        if not connection.events & READ and _is_reset(connection):
            self._lost(connection)
        elif exchange.method in _GET_METHODS:  # health never waits behind predictions, nor is it refused
            self._journal.write()  # whoever asks for the metrics finds there what has been answered before
            exchange.environ["inference_api.asked"] = time.monotonic()
            exchange.environ["inference_api.state"] = self._lifecycle.state
            self._get_pool.submit(exchange)
        elif (reason := self._admission.enter(exchange)) is None:
            self._pool.submit(exchange)
        else:
            self._shed(exchange, reason)

    def _client_ended(self, connection: Connection) -> None:
        """The client sends no more: it has left, or has only closed its half (a FIN tells not which)."""
        connection.has_ended = True
        self._connections.watch(connection, connection.events & ~READ)
        phase, exchange = connection.phase, connection.exchange
        if exchange is not None:
            is_about_to_run = exchange.started or len(self._pool.taken) <= self._pool.size
            # What waits is not run for nobody, as in nginx.
            if exchange.pool is self._pool and (exchange.is_waiting or not is_about_to_run):
                self._lost(connection)
        elif phase is _READING and connection.is_within_request:
            self._refuse(connection, 400, "The request is not complete.")
        elif phase is not _WRITING and not connection.buffer:  # else it has sent more, whose turn is yet to come
            self._connections.close(connection)

    # Answering.

    def _send(self, connection: Connection, data: bytes) -> bool:
        """Write what the socket takes now, and keep the rest; returns whether the connection still is."""
        sent = 0
        if not connection.output and len(data) <= LARGE_BYTES:  # else it waits for its turn
            try:
                sent = connection.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._lost(connection)
                return False
        exchange = connection.exchange
        if exchange is not None and exchange.room is not None:  # a call less for most
            exchange.was_sent(sent, is_whole=sent == len(data))
        if sent < len(data):
            connection.output.append(memoryview(data)[sent:])
            self._connections.watch(connection, connection.events | WRITE)
        return True

    def _write_on(self) -> None:
        """Go on with what waits for its turn: LARGE_BYTES of it in all, and to whoever has waited for longest."""
        if self._now >= self._next_tick:  # here, where it has just been asked who takes more
            self._connections.give_up(self._now)
        writable, left = self._connections.writable, LARGE_BYTES
        while writable and left:
            connection = next(iter(writable))
            del writable[connection]
            try:
                left = self._write(connection, left)
            except Exception:
                self._failed(connection)
        # Have no more answers made than can be sent; those that are made piece by piece wait by themselves.
        self._pool.unsent_bytes = self._get_pool.unsent_bytes = 0
        for connection in itertools.islice(writable, 1, None):  # behind the one whose turn is next
            answer = self._connections.unread.get(connection)
            if answer is not None and answer.exchange.pool is not None:
                answer.exchange.pool.unsent_bytes += answer.held_bytes

    def _write(self, connection: Connection, left: int) -> int:
        """Write at most so many bytes of what its socket has not taken; returns how many of them are left."""
        output = connection.output
        exchange = connection.exchange
        try:
            while output and left:
                sent = connection.sock.send(output[0][:left])
                left -= sent
                is_whole = sent == len(output[0])
                if exchange is not None:
                    exchange.was_sent(sent, is_whole=is_whole)
                if not is_whole:
                    output[0] = output[0][sent:]
                    return left
                del output[0]
        except BlockingIOError:
            return left
        except OSError:
            self._lost(connection)
            return left
        if not output:
            self._connections.watch(connection, connection.events & ~WRITE)
            if connection.phase is _WRITING:
                del self._connections.unread[connection]
                self._next(connection)
        return left

    def _answered(self, exchange: Exchange) -> None:
        """The last byte of an answer is with the socket, or in `output`."""
        connection = exchange.connection
        self._journal.record(exchange, self._now)
        connection.exchange = None
        connection.must_close = not exchange.keep_alive  # what an abandoned application still does changes nothing
        if connection.held_bytes:
            self._connections.hold(connection, 0)
        if connection.output:
            connection.phase = _WRITING
            connection.expires = self._now + self._settings.read_timeout
            self._connections.unread[connection] = Unread(connection, exchange, self._now)
        else:
            self._next(connection)

    def _next(self, connection: Connection) -> None:
        """An answer is out: turn to the next request, or end the connection."""
        if connection.must_close:
            self._linger(connection)
            return
        self._idle(connection)
        if connection.buffer:
            self._ready.append(connection)
        elif connection.has_ended:
            self._connections.close(connection)
            return
        if not connection.events & READ and not connection.has_ended and len(connection.buffer) <= MAX_PIPELINED_BYTES:
            self._connections.watch(connection, connection.events | READ)

    def _refuse(self, connection: Connection, status: int, detail: str) -> None:
        """Answer what is not a request, and end the connection: what follows in it cannot be understood."""
        self._answer(connection.refused(self._now), status, detail)

    def _refuse_late(self, connection: Connection, detail: str) -> None:
        """Answer what has not come in time; where it was not read on, that is not its client's fault."""
        if connection.was_paused:
            self._shed(connection.refused(self._now), "pending")
        else:
            self._refuse(connection, 408, detail)

    def _shed(self, exchange: Exchange, reason: str) -> None:
        self._metrics.shed(reason)
        retry_after = ("Retry-After", str(self._admission.retry_after_seconds()))
        self._answer(exchange, 503, _DETAILS[reason], retry_after)

    def _answer(self, exchange: Exchange, status: int, detail: str, *more: tuple[str, str]) -> None:
        """The server's own answer to a request: from now on the application's is not wanted."""
        self._abandon(exchange)
        if self._outbox.closing:
            exchange.keep_alive = False
        is_connected = self._send(exchange.connection, problem_answer(exchange, status, detail, *more))
        exchange.status = status  # the application may have set its own meanwhile
        if is_connected:
            self._answered(exchange)
        else:
            self._journal.record(exchange, self._now)

    # The beginning and the end of connections.

    def _admit(self, sock: socket.socket, address: str, port: str) -> None:
        connection = self._connect(sock, address, port)
        self._idle(connection)
        self._connections.add(connection)

    def _idle(self, connection: Connection) -> None:
        connection.phase = _IDLE
        connection.since = self._now
        connection.expires = self._now + self._settings.keep_alive

    def _lost(self, connection: Connection) -> None:
        """The client has gone; what it still waits for is not worth doing."""
        exchange = connection.exchange
        if exchange is not None and not exchange.abandoned:
            self._abandon(exchange)
            exchange.status = GONE_STATUS
            self._metrics.count("requests_gone")
            self._journal.record(exchange, self._now)
        self._connections.close(connection)

    def _check_client(self, connection: Connection) -> None:
        if _is_reset(connection):
            self._lost(connection)

    def _abandon(self, exchange: Exchange) -> None:
        exchange.abandoned = True
        if exchange.room is not None:
            exchange.room.set()
        if not exchange.started and exchange.pool is not None and exchange.pool.withdraw(exchange):
            self._admission.leave(exchange)

    def _linger(self, connection: Connection) -> None:
        """Close our half and wait for the client's: a reset would destroy an answer that is still under way."""
        with suppress(OSError):  # it has gone, which the selector tells, as it does again that it sends no more
            connection.sock.shutdown(socket.SHUT_WR)
        connection.phase = _LINGERING
        connection.buffer = b""
        connection.since = self._now
        connection.expires = self._now + LINGER_SECONDS
        self._connections.watch(connection, READ)

    # Time.

    def _tick(self) -> None:
        now, pool, connections = self._now, self._pool, self._connections
        self._next_tick = now + TICK_SECONDS  # first: a signal handler may have it come at once
        self._journal.write()
        for connection in [c for c in connections if c.expires <= now]:
            self._guarded(self._expire, connection)
        self._make_room()
        connections.resume()
        self._listener.tick(now)
        self._check_threads()
        if pool.jobs:
            waiting = [each.connection for each in pool.taken if not (each.started or each.abandoned)]
            for connection in [c for c in waiting if not c.events & READ]:
                self._guarded(self._check_client, connection)
            for exchange in self._admission.hopeless(now):
                self._shed(exchange, "deadline")
        self._admission.forget(now)
        self._advance_end()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_SECONDS
            pool.grow(getattr(self._application, "threads", self._settings.threads or 1))
            self._get_pool.grow(1)
            if not self._lifecycle.is_stuck:
                self._heartbeat()
        pending = len(pool.jobs)
        self._metrics.gauges(
            in_flight=len(pool.taken) - pending,
            pending=pending,
            connections=len(connections),
            threads_stuck=len(pool.overdue),
        )
        self._metrics.count("log_lines_dropped", self._writer.take_dropped())

    def _expire(self, connection: Connection) -> None:
        """A connection has been in its phase for too long."""
        exchange, answer = connection.exchange, self._connections.unread.get(connection)
        if connection.phase is _READING:
            self._refuse_late(connection, f"The request took longer than {self._settings.read_timeout:g} seconds.")
        elif exchange is not None:
            self._metrics.count("requests_timed_out")
            log.warning("deadline passed", extra={**exchange.log_fields, "started": bool(exchange.started)})
            if exchange.room is not None:  # part of the answer is out
                self._abandon(exchange)
                self._journal.record(exchange, self._now)
                self._connections.close(connection)
            else:
                self._answer(exchange, 504, f"The answer took longer than {self._settings.request_timeout:g} seconds.")
        elif answer is None:
            self._connections.close(connection)
        elif connection in self._connections.writable or answer.is_read(self._settings.read_timeout):
            connection.expires = self._now + self._settings.read_timeout
        else:
            log.warning("an answer was not read in time", extra=answer.exchange.log_fields)
            self._connections.close(connection)

    def _make_room(self) -> None:
        """End what comes or goes most slowly, where others cannot be let in; its connections can be closed then."""
        slow = self._connections.in_the_way(self._now)
        for connection in slow[: self._slow_at_once]:
            self._guarded(self._end_slow, connection)
        self._slow_at_once = min(2 * self._slow_at_once, MAX_SLOW_AT_ONCE) if slow else 1

    def _end_slow(self, connection: Connection) -> None:
        answer = self._connections.unread.get(connection)
        if answer is None:
            self._refuse_late(connection, "The request came slowly, and others were waiting.")
        else:
            log.warning("an answer is given up: others were waiting", extra=answer.exchange.log_fields)
            self._connections.close(connection)

    def _check_threads(self) -> None:
        """A worker whose threads are all stuck lets nobody in, and its heartbeat ends, so that it is replaced."""
        pool = self._pool
        pool.overdue = {exchange for exchange in pool.taken if exchange.started and exchange.deadline <= self._now}
        for exchange in pool.overdue:  # which are not counted on any more, until they come back
            self._admission.leave(exchange)
        latest = self._now - STUCK_BATCH_TIMEOUTS * self._settings.request_timeout
        has_stuck_batch = any(exchange.batch_began <= latest for exchange in pool.overdue)
        is_stuck = has_stuck_batch or 0 < pool.size <= len(pool.overdue)
        if is_stuck and not self._lifecycle.is_in_grace:
            self._listener.pause()
        if is_stuck != self._lifecycle.is_stuck:
            self._lifecycle.is_stuck = is_stuck
            if is_stuck:
                what = "a batch is stuck" if has_stuck_batch else "all threads are stuck"
                log.error(what, extra={"threads": len(pool.overdue)})
            else:
                log.warning("nothing is stuck any more")

    def _advance_end(self) -> None:
        self._lifecycle.advance(self._now)
        if self._lifecycle.is_in_grace:
            for connection in self._connections:
                if connection.phase is _IDLE:
                    connection.expires = min(connection.expires, self._now + IDLE_AT_CLOSE_SECONDS)
        if self._now >= self._lifecycle.grace_ends:
            unanswered = [c for c in self._connections if c.exchange is not None or c.output]
            if unanswered:
                log.error("grace period over, requests lost", extra={"lost": len(unanswered)})
            for connection in list(self._connections):
                self._lost(connection)
            self._listener.leave()


def _is_reset(connection: Connection) -> bool:
    """Whether a client that is not listened to has left: a FIN does not tell, the fate of its last answer does."""
    return bool(connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
