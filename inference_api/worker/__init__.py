"""The Gunicorn worker: an event loop for the connections, threads for the application."""

import gc
import logging
import os
import resource
import signal
import socket
import sys
from dataclasses import replace
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Any

from gunicorn.workers.base import Worker as BaseWorker

from inference_api import __version__
from inference_api.worker.connection import Connection
from inference_api.worker.http import RequestParser
from inference_api.worker.loop import Loop

SWITCH_INTERVAL_SECONDS = 0.0005
"""How long a busy thread may keep the interpreter from the I/O thread: 0.5 ms costs no throughput, 5 ms (Python's own)
shows in the latency of /health."""

YOUNG_OBJECTS = 2_000
"""So many new objects begin a garbage collection, as from Python 3.13 on; a batch of requests makes more than the 700
of earlier ones."""

OTHER_DESCRIPTORS = 24
"""Files that a worker has open besides its connections: its own, and its models'."""

log = logging.getLogger("inference_api.worker")


class Worker(BaseWorker):  # type: ignore[misc] # Gunicorn has no types
    """A worker class for Gunicorn's `worker_class`. The hooks in inference_api/arbiter.py give it its settings."""

    loop: Loop | None = None

    @staticmethod
    def check_config(cfg: Any, _log: Any) -> None:
        """Called by the arbiter at the start; raises RuntimeError for what this worker does not do."""
        if cfg.is_ssl:
            raise RuntimeError("TLS is a proxy's job, or Gunicorn's own workers': set WORKER_CLASS=gthread")

    def run(self) -> None:
        """Serve until told to stop."""
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        if 0 < gc.get_threshold()[0] < YOUNG_OBJECTS:  # 0: a model has turned it off
            gc.set_threshold(YOUNG_OBJECTS)
        cfg = self.cfg
        settings = replace(self.settings, max_connections=_allow_connections(self.settings.max_connections))
        name = self.sockets[0].getsockname()
        host, port = (str(name[0]), str(name[1])) if isinstance(name, tuple) else ("localhost", "")
        base = {
            "SCRIPT_NAME": "",
            "SERVER_NAME": host,
            "SERVER_PORT": port,
            "SERVER_SOFTWARE": f"inference-api/{__version__}",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.input_terminated": True,
            "wsgi.multithread": True,
            "wsgi.multiprocess": cfg.workers > 1,
            "wsgi.run_once": False,
            # Places for what each request adds: a dict that has to grow for them costs more.
            "wsgi.input": None,
            "inference_api.caller": None,
            "inference_api.request_id": None,
            "inference_api.start_response": None,
        }
        parser = RequestParser(
            max_line_bytes=cfg.limit_request_line,
            max_fields=cfg.limit_request_fields,
            max_field_bytes=cfg.limit_request_field_size,
            max_body_bytes=settings.max_body_bytes,
        )
        scheme_fields = [
            (f"HTTP_{name.upper().replace('-', '_')}", value) for name, value in cfg.secure_scheme_headers.items()
        ]
        trusts_all = "*" in cfg.forwarded_allow_ips
        trusted_networks = [ip_network(peers) for peers in cfg.forwarded_allow_ips if peers != "*"]

        @lru_cache
        def is_trusted(address: str) -> bool:  # who comes by a Unix socket is, as in Gunicorn
            return trusts_all or not address or any(ip_address(address) in network for network in trusted_networks)

        def connect(sock: socket.socket, address: str, port: str) -> Connection:
            environ = {**base, "REMOTE_ADDR": address, "REMOTE_PORT": port}
            return Connection(sock, parser, environ, scheme_fields if is_trusted(address) else ())

        self.loop = Loop(
            listeners=self.sockets,
            application=self.wsgi,
            connect=connect,
            settings=settings,
            max_requests=self.max_requests,
            on_max_requests=self.say_worn_out,
            wake_fds=self.PIPE,
            writer=self.log.writer,
            metrics=self.metrics,
            heartbeat=self._heartbeat,
            is_shutdown=lambda: bool(self.shutdown_flag[0]),
        )
        if not self.alive:
            self.loop.request_stop()
        self.loop.serve()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: the service is shut down, or this worker alone is replaced; the master's flag tells which."""
        self.alive = False
        if self.loop is not None:
            self.loop.request_stop()

    def _heartbeat(self) -> None:
        """Tell the arbiter that this worker works; once that has gone, tell all workers that the service ends."""
        self.notify()
        if self.ppid != os.getppid():
            self.ppid: int = os.getppid()
            log.warning("the master has gone")
            self.shutdown_flag[0] = 1

    def handle_abort(self, sig: int, frame: Any) -> None:
        """SIGABRT: the arbiter has waited in vain for a heartbeat."""
        log.critical("aborted by the arbiter: no heartbeat")
        self.log.end()
        os._exit(1)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGQUIT and SIGINT: end at once."""
        self.alive = False
        # Ctrl-C comes from the terminal and then from the master, too.
        for stopping in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(stopping, signal.SIG_IGN)
        sys.exit(0)


def _allow_connections(wanted: int) -> int:
    """How many connections the limit of open files allows, which is raised where it is lower and may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_DESCRIPTORS
    limit = min(needed, hard)  # which is never RLIM_INFINITY: the system has a limit of its own for this one
    if soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    allowed = min(wanted, max(limit - OTHER_DESCRIPTORS, limit // 2))
    if allowed < wanted:
        log.warning(
            "too few files may be open for MAX_CONNECTIONS", extra={"limit": hard, "needed": needed, "allowed": allowed}
        )
    return allowed
