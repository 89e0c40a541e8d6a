"""What unit tests share: a request that came on no connection, waiting for what threads do, and a lack of threads."""

import threading
import time
from collections.abc import Callable
from typing import Any, cast

from inference_api.worker.connection import Connection
from inference_api.worker.wsgi import Exchange

LIMIT_SECONDS = 20


def exchange(path: str = "/") -> Exchange:
    """A POST to this path."""
    environ: dict[str, Any] = {"REQUEST_METHOD": "POST", "PATH_INFO": path}
    return Exchange(cast(Connection, None), environ, b"", is_http11=True, keep_alive=True)


def refuse_thread(_: threading.Thread) -> None:
    """In the place of Thread.start(), what that does where no more threads are to be had."""
    raise RuntimeError("can't start new thread")


def wait_for(condition: Callable[[], bool]) -> None:
    """Looks often: that of the live tests would give the threads time to settle in between."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
