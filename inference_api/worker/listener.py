"""The listening sockets: connections are let in while there is room, and none is lost when they close."""

import contextlib
import errno
import logging
import math
import selectors
import socket
from collections.abc import Callable, Sequence

from inference_api.worker.connections import Connections

ACCEPTS_PER_TURN = 16
LAST_ACCEPT_SECONDS = 0.5
MOST_HOPS = 255
IP_MINTTL, IPV6_MINHOPCOUNT = 21, 73  # Linux's numbers, which Python does not name

log = logging.getLogger("inference_api.worker")
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Listener:
    """Accepts for the loop, which says what becomes of a new connection."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        selector: selectors.BaseSelector,
        connections: Connections,
        admit: Callable[[socket.socket, str, str], None],
    ) -> None:
        self.is_done = False
        self._sockets = sockets
        self._selector = selector
        self._connections = connections
        self._admit = admit
        self._is_accepting = False
        self._is_short = False  # of descriptors or memory
        self._closes_at = math.inf

    def pause(self) -> None:
        """Let nobody in until the next tick."""
        self._watch(False)

    def leave(self) -> None:
        """Let nobody in any more. Where this worker is replaced, others accept from the same sockets."""
        self.is_done = True
        self._watch(False)

    def serve(self) -> None:
        """Let connections in, from the next tick on."""
        self.is_done = False

    def close(self, now: float) -> None:
        """Close the sockets, but let in first who has knocked before: that takes LAST_ACCEPT_SECONDS."""
        for sock in self._sockets:
            try:
                # A client in the backlog of a socket that closes is reset; one that is ignored tries again.
                _ignore_below(MOST_HOPS, sock)
            except OSError as exc:
                log.warning("new connections cannot be held off while closing: %s", exc.strerror)
        self._closes_at = now + LAST_ACCEPT_SECONDS

    def tick(self, now: float) -> None:
        """Go on after a pause, and end what `close` began."""
        if self.is_done:
            return
        self._watch(True)
        if now >= self._closes_at:
            # No SYN has been let in since: whoever got in before stands in the backlog by now.
            for sock in self._sockets:
                while self.accept(sock, now):
                    pass
            if self._is_accepting:  # it did not have to pause
                self.leave()
                for sock in self._sockets:
                    sock.close()

    def _watch(self, is_accepting: bool) -> None:
        if is_accepting != self._is_accepting:
            self._is_accepting = is_accepting
            for sock in self._sockets:
                if is_accepting:
                    self._selector.register(sock, selectors.EVENT_READ, sock)
                else:
                    self._selector.unregister(sock)

    def accept(self, listening: socket.socket, now: float) -> bool:
        """Accept some connections; returns whether more may be waiting."""
        connections = self._connections
        for number in range(ACCEPTS_PER_TURN):
            idle = None
            if not connections.has_room and (idle := connections.longest_idle(now)) is None:
                if number:  # it is not known whether anybody waits
                    return True
                connections.lacks_room = True
                self.pause()
                return False
            try:
                sock, peer = listening.accept()
            except BlockingIOError:
                return False
            except OSError as exc:
                if exc.errno not in _OUT_OF_RESOURCES:  # that client has gone
                    continue
                if (idle := connections.longest_idle(now)) is not None:
                    connections.close(idle)
                    continue
                if not self._is_short:
                    log.warning("accepting pauses: %s", exc.strerror)
                self._is_short = True
                self.pause()
                return False
            self._is_short = False
            if idle is not None:  # only now that it is known that somebody waited
                connections.displace(idle, now)
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                _ignore_below(0, sock)  # set where another worker is closing its listener
            address, port = (str(peer[0]), str(peer[1])) if isinstance(peer, tuple) else ("", "")
            self._admit(sock, address, port)
        return True


def _ignore_below(hops: int, sock: socket.socket) -> None:
    """Make the kernel ignore packets to this socket with fewer hops left (RFC 5082): with MOST_HOPS nearly all of them.

    On a listener this holds off new connections while handshakes under way go on, whose sockets inherit it. Unlike a
    packet filter, which newer kernels keep for CAP_NET_ADMIN, it needs no privilege.
    """
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT, hops)
    if sock.family in (socket.AF_INET, socket.AF_INET6):  # IPv4 comes to IPv6 sockets, too
        sock.setsockopt(socket.IPPROTO_IP, IP_MINTTL, hops)
