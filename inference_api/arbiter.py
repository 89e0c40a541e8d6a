"""What the service adds to Gunicorn's arbiter (the master process), by Gunicorn's own hooks."""

import gc
import logging
import mmap
import os
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

from gunicorn.errors import HaltServer

from inference_api import __version__
from inference_api.app import Service
from inference_api.config import Settings, SettingsError
from inference_api.metrics import shared_metrics
from inference_api.model import ModelError
from inference_api.reload import Reload, effective, require_one_thread

HEARTBEAT_SECONDS = 1.0

log = logging.getLogger("inference_api")


class Hooks:
    """Gunicorn's server hooks, for these settings; made anew with the configuration at every reload."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_starting(self, arbiter: Any) -> None:
        log.info("starting", extra={"version": __version__, **effective(self.settings, arbiter.app.callable)})
        if self.settings.preload:
            try:
                require_one_thread()
            except ModelError as exc:
                print(f"\nError: {exc}", file=sys.stderr, flush=True)  # noqa: T201 - as Gunicorn says it
                os._exit(1)  # a normal end would wait for the very threads
        if arbiter.cfg.is_ssl:  # before Gunicorn looks for the files
            arbiter.worker_class.check_config(arbiter.cfg, arbiter.log)
        _require_address(arbiter.cfg)
        # One byte that master and workers share: a worker gets the same SIGTERM when the service is shut down as
        # when the worker alone is replaced, and has to behave differently.
        arbiter.shutdown_flag = mmap.mmap(-1, 1)
        arbiter.was_ready = mmap.mmap(-1, 1)  # whether any worker has ever been ready
        arbiter.handle_usr2 = _refuse_reexec
        _announce_stop(arbiter, Reload(arbiter, self.settings))

    def pre_fork(self, arbiter: Any, worker: Any) -> None:
        worker.settings = self.settings
        worker.shutdown_flag = arbiter.shutdown_flag
        worker.metrics = shared_metrics(self.settings.model_paths)
        worker.metrics_slot = worker.metrics.take_slot()
        worker.is_ready = mmap.mmap(-1, 1)  # whether it has prepared its models
        worker.are_others_ready = [other.is_ready for other in arbiter.WORKERS.values()]
        worker.was_ready = arbiter.was_ready
        if isinstance(arbiter.app.callable, Service):  # for gthread; the project's own worker asks the service
            worker.cfg.set("threads", arbiter.app.callable.threads)
        # What lives now stays: the collector of the child need not look at it, nor unshare its pages.
        gc.collect()
        gc.freeze()

    def post_fork(self, _arbiter: Any, worker: Any) -> None:
        worker.metrics.attach(worker.metrics_slot)
        worker.log.in_worker(worker.metrics if self.settings.metrics else None)

    def post_worker_init(self, worker: Any) -> None:
        service = worker.wsgi
        if not isinstance(service, Service):
            worker.is_ready[0] = True
            return

        def is_better_left_to_others() -> bool:
            others_serve = any(is_ready[0] for is_ready in worker.are_others_ready)
            return others_serve or (self.settings.preload and worker.was_ready[0] > 0)

        preparing = service.start_preparing(is_serving=not is_better_left_to_others())

        def announce() -> None:
            preparing.join()
            worker.is_ready[0] = worker.was_ready[0] = True

        threading.Thread(target=announce, name="announce", daemon=True).start()
        while is_better_left_to_others() and preparing.is_alive() and worker.alive:
            worker.notify()
            preparing.join(HEARTBEAT_SECONDS)
        if is_better_left_to_others() and not (worker.alive or service.is_ready):
            sys.exit(0)  # told to stop before it could serve

    def worker_exit(self, _arbiter: Any, worker: Any) -> None:
        worker.log.close()

    def child_exit(self, _arbiter: Any, worker: Any) -> None:
        worker.is_ready[0] = False
        worker.metrics.free_slot(worker.metrics_slot)


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


def _announce_stop(arbiter: Any, reload: Reload) -> None:
    stop = arbiter.stop

    def announced_stop(graceful: bool = True) -> None:
        arbiter.shutdown_flag[0] = 1
        reload.cancel()
        while True:
            with suppress(HaltServer):  # of one more worker that cannot load, while the first one ends it all
                stop(graceful)
                return

    arbiter.stop = announced_stop


def _refuse_reexec() -> None:
    log.warning("SIGUSR2 is not supported: start another instance beside this one")
