"""The master's side: as many workers as there should be, each replaced only by one that can serve."""

import gc
import logging
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import FileIO
from operator import attrgetter
from pathlib import Path
from select import PIPE_BUF
from typing import Any, NoReturn

from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from inference_api.app import Service
from inference_api.config import Settings, SettingsError, in_force, read_settings
from inference_api.model import ModelError

LAST_THREAD_SECONDS = 1.0
"""How long a thread that has been joined may still be seen: the kernel ends it a little later."""
PARENT_CHECK_SECONDS = 1.0
RESPAWN_SECONDS = 1.0
"""How long the master waits after a worker that could not be started, or could not serve."""
TELL_AGAIN_SECONDS = 1.0
"""The first SIGTERM may have come before the worker could hear it."""
DONE = b"\0"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

IS_READY, IS_WORN_OUT = range(2)
"""The bytes by which a worker says, in memory that it shares with the master, how it stands."""

log = logging.getLogger("inference_api")


class Supervisor(Arbiter):  # type: ignore[misc] # Gunicorn has no types
    """Gunicorn's arbiter, but for how it sees to its workers.

    Gunicorn ends the old workers at a reload as soon as it has forked the new ones, and has a worker that recycles
    itself leave before its successor is forked. Here both are old workers: they serve until as many new ones are ready
    as there should be. Nothing in the master waits but for models to be loaded, after the same has been rehearsed:
    Gunicorn's main loop goes on, and calls `manage_workers` at least once a second.
    """

    was_served = False  # whether a worker has ever been ready
    _rehearsal: "Rehearsal | None" = None
    _reloading: Settings | None = None  # what is to be in force once the new workers are ready
    _is_loading = _is_stopping = False
    _spawns_at = 0.0

    @classmethod
    def take_over(cls, arbiter: Any, started: Settings) -> None:
        """Make a Supervisor of the arbiter, which Gunicorn has made itself."""
        arbiter.__class__ = cls
        arbiter.started = started
        # A byte each that master and workers share. A worker gets the same SIGTERM when the service is shut down as
        # when the worker alone is replaced, and has to behave differently.
        arbiter.shutdown_flag = mmap.mmap(-1, 1)
        arbiter.is_served = mmap.mmap(-1, 1)  # whether others serve until those that are about to come can

    def signal(self, number: int, frame: Any) -> None:
        """The handler of all signals: to be told to stop ends what is being loaded, which may take for ever."""
        super().signal(number, frame)
        if number in STOP_SIGNALS:
            self._is_stopping = True
            if self._is_loading:
                raise KeyboardInterrupt

    def stop(self, graceful: bool = True) -> None:
        """End all workers, which are told that the service ends."""
        self._is_stopping = True
        self.shutdown_flag[0] = 1
        self._cancel()
        super().stop(graceful)

    def reload(self) -> None:
        """Rehearse what is to be served now; where that cannot be served, the log says why, and nothing changes."""
        self._cancel()
        if self._is_stopping:
            return
        try:
            settings = read_settings()
            before, after = (f"HOST={each.host} with PORT={each.port}" for each in (self.started, settings))
            if after != before:
                raise SettingsError(f"{after} is not allowed at a reload: it must be {before}, as at the start")
            self._rehearsal = Rehearsal(settings, self.LISTENERS)
        except (SettingsError, OSError) as exc:
            _refuse(str(exc))

    def handle_usr2(self) -> None:
        """SIGUSR2: not another master beside this one."""
        log.warning("SIGUSR2 is not supported: start another instance beside this one")

    def manage_workers(self) -> None:
        """Have as many workers as there should be, of these settings, and let those go that they replace."""
        self._go_on_reloading()
        number = self.num_workers
        workers = sorted(self.WORKERS.values(), key=attrgetter("age"))
        leaving = {w for w in workers if w.is_leaving}
        ours = [w for w in workers if w.cfg is self.cfg and w not in leaving]
        fresh = [w for w in ours if not w.says[IS_WORN_OUT]]
        serving = [w for w in ours if w.says[IS_READY]]
        self.is_served[0] = any(w.says[IS_READY] for w in workers if w not in leaving)
        self.was_served = self.was_served or self.is_served[0] > 0
        # Those that are worn out get successors while there are less than twice as many workers as there should be.
        self._spawn(max(number - len(ours), min(number - len(fresh), 2 * number - len(ours) - len(leaving))))

        are_replaced = len(serving) >= number
        leaving |= {w for w in workers if w not in ours and (are_replaced or not w.says[IS_READY])}
        worn_out = [w for w in serving if w not in fresh]
        leaving |= set(worn_out[: max(0, len(serving) - number)])
        surplus = sorted(fresh, key=lambda w: w.says[IS_READY])  # first those that are not ready, then the oldest
        leaving |= set(surplus[: max(0, len(fresh) - number)])
        for worker in leaving:
            worker.is_leaving = True
            if time.monotonic() >= worker.tell_at:
                worker.tell_at = time.monotonic() + TELL_AGAIN_SECONDS
                self.kill_worker(worker.pid, signal.SIGTERM)
        if are_replaced and self._reloading is not None:
            log.info("reloaded", extra=effective(self._reloading, self.app.callable))
            self._reloading = None

    def reap_workers(self) -> None:
        """See to workers that have ended; one that cannot serve ends the service only where no other does."""
        before = set(self.WORKERS.values())
        try:
            super().reap_workers()
        except HaltServer:
            # A model may end its process with the exit code of one that cannot serve.
            (failed,) = (worker for worker in before.difference(self.WORKERS.values()) if _is_open(worker.tmp))
            if not self._is_stopping and not failed.says[IS_READY]:
                if not any(w.says[IS_READY] for w in self.WORKERS.values()):
                    raise
                log.error("a new worker cannot serve, the old ones serve on")
            self.reap_workers()  # the others
        finally:
            for worker in before.difference(self.WORKERS.values()):
                worker.tmp.close()  # which Gunicorn leaves out for one with such an exit code
                worker.metrics.free_slot(worker.metrics_slot)
                if not worker.says[IS_READY] and not worker.is_leaving:
                    self._spawns_at = time.monotonic() + RESPAWN_SECONDS

    def _spawn(self, count: int) -> None:
        try:
            for _ in range(count if time.monotonic() >= self._spawns_at else 0):
                self.forking = None
                self.spawn_worker()
        except (OSError, RuntimeError) as exc:  # no descriptor, process or slot is left
            if self.forking is not None:
                self.forking.metrics.free_slot(self.forking.metrics_slot)
            if not self.WORKERS:
                raise
            log.error("a new worker cannot be started, the old ones serve on: %s", exc)
            self._spawns_at = time.monotonic() + RESPAWN_SECONDS

    def _cancel(self) -> None:
        if self._rehearsal is not None:
            self._rehearsal.close()
            self._rehearsal = None

    def _go_on_reloading(self) -> None:
        if self._rehearsal is None or (outcome := self._rehearsal.outcome()) is None:
            return
        settings, cfg = self._rehearsal.settings, self.app.cfg
        self._cancel()
        gc.unfreeze()
        try:
            if outcome:
                raise ModelError(outcome)
            service = Service(settings)
            if settings.preload:
                self._load(service)
            in_force.set(settings)
            self.app.reload()
        except BaseException as exc:  # a model may raise KeyboardInterrupt, too
            self.app.cfg = cfg
            if not self._is_stopping:
                _refuse(str(exc), None if isinstance(exc, ModelError) else exc)
            return
        finally:
            in_force.set(None)
        self.app.callable = service if settings.preload else None
        self.setup(self.app)
        self._reloading = settings

    def _load(self, service: Service) -> None:
        self._is_loading = True
        try:
            if self._is_stopping:  # it came before it could be heard here
                raise KeyboardInterrupt
            service.load()
        finally:
            self._is_loading = False
            self.init_signals()  # a model may set handlers of its own while it is loaded
        require_one_thread()


class Rehearsal:
    """A child that does all that is to be done before new workers serve: where that fails, it costs no worker."""

    def __init__(self, settings: Settings, listeners: Sequence[Any]) -> None:
        self.settings = settings
        self._master_pid = os.getpid()
        readable, writable = os.pipe()
        os.set_blocking(readable, False)
        self._told = FileIO(readable)
        with FileIO(writable, "w") as tell:
            self._pid = os.fork()
            if not self._pid:
                self._run(tell, listeners)
        with suppress(OSError):  # it does the same itself: whoever is first
            os.setpgid(self._pid, self._pid)

    def outcome(self) -> str | None:
        """None until it has ended; then why the models cannot be served, or an empty text."""
        has_ended = self._has_ended()  # asked first: it may tell and end in between
        if told := self._told.read(PIPE_BUF):  # None where there is nothing yet
            return told.removeprefix(DONE).decode(errors="replace")
        return "MODELS: the process that prepared them has died" if has_ended else None

    def close(self) -> None:
        """End it, and whatever the models have started in it."""
        self._told.close()
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    def _has_ended(self) -> bool:
        try:
            return os.waitpid(self._pid, os.WNOHANG)[0] != 0
        except ChildProcessError:  # Gunicorn has waited for it, as for all children
            return True

    def _run(self, tell: FileIO, listeners: Sequence[Any]) -> NoReturn:
        try:
            os.setpgid(0, 0)
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            for listener in listeners:
                listener.close()
            service = Service(self.settings)
            failure = _failure_of(service.load, require_one_thread) if self.settings.preload else b""
            if failure:
                tell.write(failure)
            else:
                self._prepare(service, tell)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(os.getpid(), signal.SIGKILL)  # with all that the models have started
            os._exit(1)

    def _prepare(self, service: Service, tell: FileIO) -> None:
        preparing = threading.Thread(  # as in a worker
            target=lambda: tell.write(_failure_of(service.prepare) or DONE), daemon=True
        )
        preparing.start()
        while preparing.is_alive() and os.getppid() == self._master_pid:
            preparing.join(PARENT_CHECK_SECONDS)


def _failure_of(*steps: Callable[[], None]) -> bytes:
    """The words of what the first of these steps to fail raises, as many as one write to a pipe takes."""
    try:
        for step in steps:
            step()
    except BaseException as exc:  # a model may raise KeyboardInterrupt, too
        if not isinstance(exc, ModelError):
            log.exception("preparing the models failed")
        return (str(exc) or type(exc).__name__).encode(errors="replace")[:PIPE_BUF]
    return b""


def _is_open(heartbeat_file: Any) -> bool:
    try:
        heartbeat_file.fileno()
    except ValueError:
        return False
    return True


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
