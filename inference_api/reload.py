"""SIGHUP: new settings and models are rehearsed first, and old workers serve until the new ones are ready."""

import gc
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from select import PIPE_BUF
from typing import Any, NoReturn

from gunicorn.errors import HaltServer

from inference_api.app import Service
from inference_api.config import Settings, SettingsError, read_settings
from inference_api.model import ModelError

LAST_THREAD_SECONDS = 1.0
"""How long a thread that has been joined may still be seen: the kernel ends it a little later."""
PARENT_CHECK_SECONDS = 1.0
RESPAWN_SECONDS = 1.0
DONE = b"\0"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

log = logging.getLogger("inference_api")


class Reload:
    """Takes the place of Gunicorn's reload, which ends the old workers as soon as it has forked the new ones.

    Nothing here waits but for models to be loaded, under PRELOAD: Gunicorn's main loop goes on, and calls
    `manage_workers` at least once a second.
    """

    def __init__(self, arbiter: Any, started: Settings) -> None:
        self._arbiter = arbiter
        self._started = started
        self._replace = arbiter.reload
        self._manage_workers, self._reap_workers = arbiter.manage_workers, arbiter.reap_workers
        self._rehearsal: Rehearsal | None = None
        # While workers of up to this age serve on until there are others that are ready. Gunicorn numbers them by age.
        self._last_old_age: int | None = None
        self._respawns_at = 0.0
        self._is_forking = False
        self._graceful_timeout = 0
        arbiter.reload = self.begin
        arbiter.manage_workers, arbiter.reap_workers = self.manage_workers, self.reap_workers

    def begin(self) -> None:
        """Reload what can be reloaded: otherwise the old workers serve on, and the log says why."""
        gc.unfreeze()
        self.cancel()
        try:
            settings = read_settings()
            if (settings.host, settings.port) != (self._started.host, self._started.port):
                raise SettingsError("HOST and PORT are not allowed to change at a reload: start the service anew")
            service = Service(settings)
            if settings.preload:
                try:
                    for number in STOP_SIGNALS:
                        signal.signal(number, self._interrupt)
                    service.load()
                finally:
                    self._arbiter.init_signals()  # a model may set handlers of its own while it is loaded
                require_one_thread()
            self._rehearsal = Rehearsal(service, self._arbiter.LISTENERS)
        except BaseException as exc:  # a model may raise KeyboardInterrupt, too
            is_ours = isinstance(exc, SettingsError | ModelError)
            _refuse(str(exc), None if is_ours else exc)

    def manage_workers(self) -> None:
        """Go on with a reload; otherwise do as Gunicorn does: have as many workers as there should be."""
        if self._is_forking:  # in Gunicorn's reload, which would now wait for so long until the old workers have gone
            self._graceful_timeout = self._arbiter.cfg.graceful_timeout
            self._arbiter.cfg.set("graceful_timeout", 0)
            return
        rehearsal = self._rehearsal
        outcome = rehearsal.outcome() if rehearsal is not None else None
        if rehearsal is not None and outcome is not None:
            self.cancel()
            if outcome:
                _refuse(outcome)
            else:
                self._fork_workers(rehearsal.service)
        if self._last_old_age is None or self._are_replaced(self._last_old_age):
            self._last_old_age = None
            self._manage_workers()  # which tells those to leave that are too many: the old ones

    def reap_workers(self) -> None:
        """See to workers that have ended; one that cannot serve ends the service only where no other does."""
        arbiter = self._arbiter
        while True:
            before = dict(arbiter.WORKERS)
            try:
                self._reap_workers()
            except HaltServer:
                oldest = min((worker.age for worker in arbiter.WORKERS.values()), default=math.inf)
                if self._last_old_age is None or oldest > self._last_old_age:
                    raise
                log.error("a new worker cannot serve, the old ones serve on")
                for pid in before.keys() - arbiter.WORKERS.keys():  # what Gunicorn has left out
                    before[pid].tmp.close()
                    arbiter.cfg.child_exit(arbiter, before[pid])
            else:
                return

    def _interrupt(self, number: int, frame: Any) -> NoReturn:
        """To be told to stop ends what is being loaded, which may take for ever."""
        self._arbiter.signal(number, frame)
        raise KeyboardInterrupt

    def cancel(self) -> None:
        """End what is rehearsed."""
        if self._rehearsal is not None:
            self._rehearsal.close()
            self._rehearsal = None

    def _fork_workers(self, service: Service) -> None:
        arbiter = self._arbiter
        arbiter.app.callable = service if service.settings.preload else None
        self._last_old_age = arbiter.worker_age
        self._respawns_at = time.monotonic() + RESPAWN_SECONDS
        self._is_forking = True
        self._replace()
        self._is_forking = False
        arbiter.cfg.set("graceful_timeout", self._graceful_timeout)

    def _are_replaced(self, last_old_age: int) -> bool:
        """Whether there are as many new workers as there should be, and all are ready."""
        arbiter = self._arbiter
        new = [worker for worker in arbiter.WORKERS.values() if worker.age > last_old_age]
        if len(new) < arbiter.num_workers:
            if time.monotonic() >= self._respawns_at:
                self._respawns_at = time.monotonic() + RESPAWN_SECONDS
                arbiter.spawn_worker()
            return False
        if not all(worker.is_ready[0] for worker in new):
            return False
        log.info("reloaded", extra=effective(new[0].settings, arbiter.app.callable))
        return True


class Rehearsal:
    """A child that does what new workers are about to do before they serve: where that fails, it costs no worker."""

    def __init__(self, service: Service, listeners: list[Any]) -> None:
        self.service = service
        self._master_pid = os.getpid()
        self._readable, writable = os.pipe()
        os.set_blocking(self._readable, False)
        self._pid = os.fork()
        if not self._pid:
            self._run(writable, listeners)
        os.close(writable)

    def outcome(self) -> str | None:
        """None until it has ended; then why the models cannot be served, or an empty text."""
        has_ended = self._has_ended()  # asked first: it may tell and end in between
        try:
            told = os.read(self._readable, PIPE_BUF)
        except BlockingIOError:
            told = b""
        if told == DONE:
            return ""
        if told:
            return told.decode(errors="replace")
        return "MODELS: the process that prepared them has died" if has_ended else None

    def close(self) -> None:
        """End it, if it has not ended."""
        os.close(self._readable)
        if not self._has_ended():
            os.kill(self._pid, signal.SIGKILL)

    def _has_ended(self) -> bool:
        try:
            return os.waitpid(self._pid, os.WNOHANG)[0] != 0
        except ChildProcessError:  # Gunicorn has waited for it, as for all children
            return True

    def _run(self, writable: int, listeners: list[Any]) -> NoReturn:
        try:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            for listener in listeners:
                listener.close()
            preparing = threading.Thread(target=self._prepare, args=(writable,), daemon=True)  # as in a worker
            preparing.start()
            while preparing.is_alive() and os.getppid() == self._master_pid:
                preparing.join(PARENT_CHECK_SECONDS)
        finally:
            os._exit(0)  # without waiting for threads that the models have started

    def _prepare(self, writable: int) -> None:
        told = DONE
        try:
            self.service.prepare()
        except BaseException as exc:
            if not isinstance(exc, ModelError):
                log.exception("preparing the models failed")
            told = (str(exc) or type(exc).__name__).encode(errors="replace")[:PIPE_BUF]
        os.write(writable, told)


def effective(settings: Settings, service: object) -> dict[str, Any]:
    """The settings in force as fields of a log line."""
    fields = settings.effective()
    if isinstance(service, Service):  # only a service whose models are loaded knows
        fields["THREADS"] = service.threads
    return fields


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


def _count_threads() -> int:
    # The threads of libraries are not Python's, only the kernel knows all of them.
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def _refuse(reason: str, exc: BaseException | None = None) -> None:
    log.error("reload refused, the old workers serve on: %s", reason, exc_info=exc)
