"""What the service adds to Gunicorn's arbiter (the master process), by Gunicorn's own hooks."""

import gc
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from select import PIPE_BUF
from typing import Any

from gunicorn.errors import HaltServer

from inference_api import __version__
from inference_api.app import APP_LOAD_ERROR, Service
from inference_api.config import Settings, SettingsError, read_settings
from inference_api.metrics import SLOTS, shared_metrics
from inference_api.model import ModelError

HEARTBEAT_SECONDS = 1.0
LAST_THREAD_SECONDS = 1.0
"""How long a thread that has been joined may still be seen: the kernel ends it a little later."""

POLL_SECONDS = 0.02
READY = b"\x01"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

log = logging.getLogger("inference_api")


class Hooks:
    """Gunicorn's server hooks, for these settings; made anew with the configuration at every reload."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_starting(self, arbiter: Any) -> None:
        effective = _effective(self.settings, arbiter.app.callable)
        log.info("starting", extra={"version": __version__, **effective})
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
        arbiter.ready_flags = mmap.mmap(-1, SLOTS)  # one for each worker: it has prepared its models
        _announce_stop(arbiter)
        _guard_reload(arbiter, self.settings)
        _keep_serving(arbiter)

    def pre_fork(self, arbiter: Any, worker: Any) -> None:
        worker.settings = self.settings
        worker.shutdown_flag = arbiter.shutdown_flag
        worker.metrics = shared_metrics(self.settings.model_paths)
        worker.metrics_slot = worker.metrics.take_slot()
        worker.ready_flags = arbiter.ready_flags
        if isinstance(arbiter.app.callable, Service):  # for gthread; the project's own worker asks the service
            worker.cfg.set("threads", arbiter.app.callable.threads)
        # What lives now stays: the collector of the child need not look at it, nor unshare its pages.
        gc.collect()
        gc.freeze()

    def post_fork(self, _arbiter: Any, worker: Any) -> None:
        worker.metrics.attach(worker.metrics_slot)
        worker.log.in_worker(worker.metrics if self.settings.metrics else None)

    def post_worker_init(self, worker: Any) -> None:
        if not isinstance(worker.wsgi, Service):
            worker.ready_flags[worker.metrics_slot] = True
            return
        preparing = worker.wsgi.start_preparing()

        def announce() -> None:
            preparing.join()
            worker.ready_flags[worker.metrics_slot] = True

        threading.Thread(target=announce, name="announce", daemon=True).start()
        # The first workers answer 503 meanwhile; where others serve, requests are better left to them.
        while READY in worker.ready_flags and preparing.is_alive() and worker.alive:
            worker.notify()
            preparing.join(HEARTBEAT_SECONDS)

    def worker_exit(self, _arbiter: Any, worker: Any) -> None:
        worker.log.close()

    def child_exit(self, _arbiter: Any, worker: Any) -> None:
        worker.ready_flags[worker.metrics_slot] = False
        worker.metrics.free_slot(worker.metrics_slot)

    def pre_exec(self, arbiter: Any) -> None:
        arbiter.log.restore_stdout()


def require_one_thread() -> None:
    """What must hold before a fork; raises ModelError."""
    deadline = time.monotonic() + LAST_THREAD_SECONDS
    while (threads := _count_threads()) > 1:
        if time.monotonic() >= deadline:
            raise ModelError(
                f"PRELOAD=true is not allowed: loading the models started threads ({threads - 1}), which do not exist "
                "in a forked worker and would leave it hanging; set PRELOAD=false, or keep the library from starting "
                "them (for many: OMP_NUM_THREADS=1, OPENBLAS_NUM_THREADS=1)"
            )
        time.sleep(0.01)


def _effective(settings: Settings, service: object) -> dict[str, Any]:
    effective = settings.effective()
    if isinstance(service, Service):  # only a service whose models are loaded knows
        effective["THREADS"] = service.threads
    return effective


def _count_threads() -> int:
    # The threads of libraries are not Python's, only the kernel knows all of them.
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


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


def _announce_stop(arbiter: Any) -> None:
    queue_signal, stop = arbiter.signal, arbiter.stop
    arbiter.is_stopping = False  # as soon as the signal is there, which may have to wait for its turn

    def announced_signal(number: int, frame: Any) -> None:
        arbiter.is_stopping |= number in STOP_SIGNALS
        queue_signal(number, frame)

    def announced_stop(graceful: bool = True) -> None:
        arbiter.shutdown_flag[0] = 1
        while True:
            with suppress(HaltServer):  # of one more worker that cannot load, while the first one ends it all
                stop(graceful)
                return

    arbiter.signal, arbiter.stop = announced_signal, announced_stop


def _keep_serving(arbiter: Any) -> None:
    """Let workers that are replaced go only when those in their place are ready."""
    manage_workers = arbiter.manage_workers

    def patient_manage_workers() -> None:
        while len(arbiter.WORKERS) > arbiter.num_workers and not arbiter.is_stopping:
            if all(arbiter.ready_flags[worker.metrics_slot] for worker in arbiter.WORKERS.values()):
                break
            time.sleep(POLL_SECONDS)
            arbiter.reap_workers()
            arbiter.murder_workers()
        manage_workers()

    arbiter.manage_workers = patient_manage_workers


def _rehearse(arbiter: Any, service: Service) -> None:
    """Let a child do what new workers are about to do before they serve; raises ModelError where it fails.

    In a worker that would end the service.
    """
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        _prepare_and_exit(service, writable)
    try:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if arbiter.is_stopping:  # what is rehearsed may never end
                os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        if status := ended[1]:
            os.set_blocking(readable, False)
            with suppress(BlockingIOError):  # it has ended without a word
                raise ModelError(os.read(readable, PIPE_BUF).decode(errors="replace"))
            raise ModelError(f"MODELS: a process that prepared them ended with {os.waitstatus_to_exitcode(status)}")
    finally:
        os.close(readable)
        os.close(writable)


def _prepare_and_exit(service: Service, failure_fd: int) -> None:
    code = APP_LOAD_ERROR
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        service.prepare()
        code = 0
    except ModelError as exc:
        os.write(failure_fd, str(exc).encode(errors="replace")[:PIPE_BUF])
    except BaseException:
        log.exception("preparing the models failed")
    finally:
        os._exit(code)  # without waiting for threads that the models have started


def _guard_reload(arbiter: Any, started: Settings) -> None:
    """Reload (SIGHUP) only what can be reloaded: otherwise the old workers serve on, and the log says why."""
    reload = arbiter.reload

    def guarded_reload() -> None:
        gc.unfreeze()
        try:
            settings = read_settings()
            if (settings.host, settings.port) != (started.host, started.port):
                raise SettingsError("HOST and PORT are not allowed to change at a reload: start the service anew")
            service = Service(settings)
            if settings.preload:
                try:
                    service.load()
                finally:
                    arbiter.init_signals()  # a model may set handlers of its own while it is loaded
                require_one_thread()
            _rehearse(arbiter, service)
        except Exception as exc:
            is_ours = isinstance(exc, SettingsError | ModelError)
            log.exception("reload refused, the old workers serve on: %s", exc, exc_info=None if is_ours else exc)
            return
        arbiter.app.callable = service if settings.preload else None
        reload()
        log.info("reloaded", extra=_effective(settings, arbiter.app.callable))

    arbiter.reload = guarded_reload
