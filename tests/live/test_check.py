"""`--check` finds what would stop the start, or a fork, without serving."""

from pathlib import Path

from tests.live.service import START_SECONDS, Service

MODELS = """
import threading

class Model:
    name, version = "model", "1.0.0"
    def load(self) -> None:
        threading.Thread(target=threading.Event().wait).start()
    def predict(self, text: str) -> str:
        return text
"""


def check(folder: Path, preload: str) -> tuple[int, str, str]:
    service = Service(
        folder, MODELS, command=("-m", "inference_api", "--check"), MODELS="a=models:Model", PRELOAD=preload
    )
    try:
        return service.process.wait(START_SECONDS), service.stdout, service.stderr
    finally:
        service.process.kill()
        service.process.wait()


def test_threads_that_would_not_survive_a_fork_are_found(tmp_path: Path) -> None:
    """A model that starts threads while loading fails the check as it would fail the start, and the check ends."""
    code, told, error = check(tmp_path, "true")
    assert (code, told) == (1, "")
    assert error.startswith("inference_api: PRELOAD=true is not allowed: loading the models started threads (1)")
    assert error.count("\n") == 1


def test_threads_of_a_worker_s_own_are_fine(tmp_path: Path) -> None:
    """With PRELOAD=false each worker loads for itself: the check is content, and ends although the thread does not."""
    assert check(tmp_path, "false") == (0, "/a: model/1.0.0\nok\n", "")
