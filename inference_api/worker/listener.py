"""The listening sockets: connections are let in while there is room, and none is lost when they close."""

import array
import errno
import logging
import selectors
import socket
import struct
from collections.abc import Callable, Sequence

ACCEPTS_PER_TURN = 16
PAUSE_SECONDS = 0.1
LAST_ACCEPT_SECONDS = 0.5
SO_ATTACH_FILTER = 26

log = logging.getLogger("inference_api.worker")

_DROP_LONE_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte of TCP flags
        (0x54, 0, 0, 0x12),  # keep SYN and ACK
        (0x15, 0, 1, 0x02),  # SYN alone?
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # pass
    )
)
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Listener:
    """Accepts for the loop, which says how to make room for a connection and what becomes of a new one."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        selector: selectors.BaseSelector,
        has_room: Callable[[], bool],
        make_room: Callable[[], bool],
        admit: Callable[[socket.socket, str, str], None],
    ) -> None:
        self.is_done = False
        self._sockets = sockets
        self._selector = selector
        self._has_room = has_room
        self._make_room = make_room
        self._admit = admit
        self._is_accepting = False
        self._again_at = 0.0  # where it pauses, when it goes on
        self._is_short = False  # of descriptors or memory
        self._closes_at: float | None = None

    def pause(self, now: float) -> None:
        """Let nobody in for a moment: until a tick after PAUSE_SECONDS."""
        self._again_at = now + PAUSE_SECONDS
        self._watch(False)

    def leave(self) -> None:
        """Let nobody in any more; others accept from the same sockets."""
        self.is_done = True
        self._watch(False)

    def serve(self) -> None:
        """Let connections in, from the next tick on."""
        self.is_done = False

    def close(self, now: float) -> None:
        """Close the sockets, but let in first who has knocked before: that takes LAST_ACCEPT_SECONDS."""
        for sock in self._sockets:
            _drop_new_connections(sock)
        self._closes_at = now + LAST_ACCEPT_SECONDS

    def tick(self, now: float) -> None:
        """Go on after a pause, and end what `close` began."""
        if self.is_done:
            return
        if now >= self._again_at:
            self._watch(True)
        if self._closes_at is not None and now >= self._closes_at and self._is_accepting:
            # No SYN has been let in since: whoever got in before stands in the backlog by now.
            for sock in self._sockets:
                while self.accept(sock, now):
                    pass
            if self._is_accepting:  # it did not have to pause
                self._watch(False)
                for sock in self._sockets:
                    sock.close()
                self.is_done = True

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
        for _ in range(ACCEPTS_PER_TURN):
            if not self._has_room():
                self.pause(now)
                return False
            try:
                sock, peer = listening.accept()
            except BlockingIOError:
                return False
            except OSError as exc:
                if exc.errno not in _OUT_OF_RESOURCES:  # that client has gone
                    continue
                if self._make_room():
                    continue
                if not self._is_short:
                    log.warning("accepting pauses: %s", exc.strerror)
                self._is_short = True
                self.pause(now)
                return False
            self._is_short = False
            sock.setblocking(False)
            address, port = (str(peer[0]), str(peer[1])) if isinstance(peer, tuple) else ("", "")
            self._admit(sock, address, port)
        return True


def _drop_new_connections(listener: socket.socket) -> None:
    """Make the kernel ignore new connections, so that none is in the backlog when the listener is closed.

    Their clients' kernels try again; a closed listener would have reset them. A classic BPF program (Linux socket(7),
    SO_ATTACH_FILTER): drop segments with SYN and without ACK, let pass what belongs to handshakes under way.
    """
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return
    kept = array.array("B", _DROP_LONE_SYN)  # the kernel is given its address: it must live until the call has returned
    address, length = kept.buffer_info()
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", length // 8, address))
    except OSError as exc:
        log.warning("new connections cannot be held off while closing: %s", exc.strerror)
