"""What the service adds to Gunicorn's arbiter (the master process), by Gunicorn's own hooks."""

import gc
import logging
import mmap
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from typing import Any

from inference_api import __version__
from inference_api.app import Service
from inference_api.config import OWN_WORKER_CLASS, Settings, SettingsError
from inference_api.metrics import shared_metrics
from inference_api.model import ModelError
from inference_api.supervisor import IS_READY, IS_WORN_OUT, Supervisor, effective, require_one_thread

HEARTBEAT_SECONDS = 0.5

log = logging.getLogger("inference_api")


class Hooks:
    """Gunicorn's server hooks, for these settings; made anew with the configuration at every reload."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_starting(self, arbiter: Any) -> None:
        """In the master, before it binds: check what would fail later, and take the arbiter over."""
        log.info("starting", extra={"version": __version__, **effective(self.settings, arbiter.app.callable)})
        if self.settings.preload:
            try:
                require_one_thread()
            except ModelError as exc:
                print(f"\nError: {exc}", file=sys.stderr, flush=True)  # noqa: T201 - as Gunicorn says it
                os._exit(1)  # a normal end would wait for the very threads
        if arbiter.cfg.is_ssl and hasattr(arbiter.worker_class, "check_config"):  # before Gunicorn looks for the files
            arbiter.worker_class.check_config(arbiter.cfg, arbiter.log)
        _require_address(arbiter.cfg)
        Supervisor.take_over(arbiter, self.settings)

    def pre_fork(self, arbiter: Any, worker: Any) -> None:
        """In the master, before each fork: what the child is to know, and what both share."""
        worker.settings = self.settings
        worker.shutdown_flag, worker.is_served = arbiter.shutdown_flag, arbiter.is_served
        worker.was_served = arbiter.was_served
        worker.says = mmap.mmap(-1, 2)
        worker.is_leaving, worker.tell_at = False, 0.0
        worker.metrics = shared_metrics(self.settings.model_paths)
        worker.metrics_slot = worker.metrics.take_slot()
        arbiter.forking = worker
        if isinstance(arbiter.app.callable, Service):  # for gthread; the project's own worker asks the service
            worker.cfg.set("threads", arbiter.app.callable.threads)
        # What lives now stays: the collector of the child need not look at it, nor unshare its pages.
        gc.collect()
        gc.freeze()

    def post_fork(self, _arbiter: Any, worker: Any) -> None:
        """In the worker, before it loads the application."""
        os.register_at_fork(after_in_child=partial(_leave_to_parent, worker))
        worker.say_worn_out = partial(_say, worker, IS_WORN_OUT)
        worker.metrics.attach(worker.metrics_slot)
        worker.log.in_worker(worker.metrics if self.settings.metrics else None)
        if worker.app.callable is None:  # without PRELOAD: with the settings of the master, whatever .env says now
            worker.app.callable = Service(self.settings)

    def post_worker_init(self, worker: Any) -> None:
        """In the worker, before it serves: prepare the models, and wait for them where others serve meanwhile."""
        signal.signal(signal.SIGHUP, lambda *_: None)  # the master's, but a terminal tells its whole process group
        service, say_ready = worker.wsgi, partial(_say, worker, IS_READY)
        if not isinstance(service, Service):
            say_ready()
            return
        preparing = service.start_preparing(say_ready)
        # One of Gunicorn's own has ended before its successor is started: rather than by 503, it answers late.
        is_late = self.settings.worker_class != OWN_WORKER_CLASS and self.settings.preload and worker.was_served

        def is_told() -> bool:
            return not worker.alive or worker.shutdown_flag[0] > 0

        while preparing.is_alive() and (worker.is_served[0] or is_late) and not is_told():
            worker.notify()
            preparing.join(HEARTBEAT_SECONDS)
        # A shutdown that finds nobody else serving ends as it does in a worker.
        is_needed = worker.shutdown_flag[0] and not worker.is_served[0]
        if preparing.is_alive() and is_told() and not is_needed:
            sys.exit(0)

    def worker_exit(self, _arbiter: Any, worker: Any) -> None:
        """In the worker, as it ends."""
        worker.log.end()


def _require_address(cfg: Any) -> None:
    """Refuse in one line an address that Gunicorn would try for five seconds and then name in the log alone."""
    if cfg.reuse_port or {"LISTEN_FDS", "GUNICORN_FD"} & os.environ.keys():  # shared or inherited: it may be in use
        return
    for address in cfg.address:
        if not isinstance(address, tuple):
            continue
        host, port = address
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as exc:
                raise SettingsError(
                    f"HOST={host!r} with PORT={port!r} is not allowed: it must be a free address of this machine, "
                    f"but the system says: {exc.strerror}"
                ) from exc


def _say(worker: Any, what: int) -> None:
    """Tell the master, and have it look: a signal as of a child that has ended."""
    worker.says[what] = 1
    with suppress(OSError):  # it has gone
        os.kill(worker.ppid, signal.SIGCHLD)


def _leave_to_parent(worker: Any) -> None:
    """In a process that a model forks: it does not serve, and ends when it is told to."""
    signal.set_wakeup_fd(-1)
    for number in worker.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    for sock in worker.sockets:
        sock.close()
