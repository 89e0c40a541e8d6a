"""The image that the Dockerfile makes, run as operators run it. Needs the Dockerfile's base image in local storage."""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.live.service import PROJECT, START_SECONDS, STOP_SECONDS, WAIT_SECONDS, free_port, needed, wait_for

BASE_IMAGE = "docker.io/library/python:3.11-slim"
BASE_IMAGE_SCRIPT = PROJECT.parent / "shared" / "container" / "base-image"
BUILD_SECONDS = 600
MAX_ADDED_MEGABYTES = 40
USER = 10001
CLIENTS = 16
NOT_A_PROXY = "http://127.0.0.1:1"

# For a machine without systemd, and without a file system that containers can stack.
ENVIRONMENT = {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"} | dict(os.environ)
PODMAN = ("podman", "--cgroup-manager=cgroupfs", "--runtime=runc")
RUN = ("--network=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", "--log-driver=k8s-file")
HARDENED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges")

SEE_INSIDE = """
import importlib.metadata, importlib.util, json, os, pathlib
files = [path for folder in ("/app", "/venv") for path in pathlib.Path(folder).rglob("*")]
print(json.dumps({
    "app": sorted(os.listdir("/app")),
    "packages": sorted(
        f"{it.metadata['Name'].lower().replace('_', '-')}=={it.version}" for it in importlib.metadata.distributions()
    ),
    "writable": [str(path) for path in files if os.access(path, os.W_OK)],
    "without bytecode": [
        str(path)
        for path in files
        if path.suffixes == [".py"] and not os.path.exists(importlib.util.cache_from_source(path))
    ],
    "users": sorted({path.stat().st_uid for path in pathlib.Path("/proc").glob("[0-9]*")}),
}))
"""


def call(*command: str, seconds: float = WAIT_SECONDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=PROJECT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
    )


def podman(*arguments: str, seconds: float = WAIT_SECONDS) -> str:
    """What podman says; it must succeed."""
    done = call(*PODMAN, *arguments, seconds=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Container:
    """A running container, reached from outside by its port."""

    def __init__(self, image: str, *options: str, command: tuple[str, ...] = ()) -> None:
        self.name = f"inference-api-test-{uuid.uuid4().hex}"
        self.port = free_port()
        given = ("--name", self.name, "--env", f"PORT={self.port}", *options)
        podman("run", "--detach", *RUN, *given, image, *command, seconds=START_SECONDS)

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert podman("inspect", "--format={{.State.Status}}", self.name) == "running", self.logs()
            with contextlib.suppress(OSError):
                return self.request("GET", "/health")[0] == 200
            return False

        wait_for(is_ready, START_SECONDS, self.logs)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        with contextlib.closing(connection):
            named = {"Content-Type": "application/json", "X-Request-ID": "from-outside"}
            connection.request(method, path, None if body is None else json.dumps(body), named)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def is_healthy(self) -> bool:
        """What the image's own health check finds."""
        done = call(*PODMAN, "healthcheck", "run", self.name)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode == 0

    def logs(self) -> str:
        """What it wrote to stdout."""
        return podman("logs", self.name)

    def exit_code(self) -> int:
        """Waits for its end."""
        return int(podman("wait", self.name, seconds=STOP_SECONDS))


@contextlib.contextmanager
def running(image: str, *options: str, command: tuple[str, ...] = ()) -> Iterator[Container]:
    container = Container(image, *options, command=command)
    try:
        yield container
    finally:
        podman("rm", "--force", "--time=0", container.name)


@contextlib.contextmanager
def built(*options: str, context: Path = PROJECT) -> Iterator[str]:
    """An image, by its name."""
    tag = f"localhost/inference-api-test:{uuid.uuid4().hex}"
    always = ("--format=docker", "--pull-never", "--network=host", f"--tag={tag}")
    done = call("buildah", "build", *always, *options, str(context), seconds=BUILD_SECONDS)
    assert done.returncode == 0, done.stderr
    try:
        yield tag
    finally:
        podman("rmi", "--force", tag)


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The Dockerfile, built as it stands."""
    needed("podman", "podman")
    needed("buildah", "buildah")
    if call(*PODMAN, "image", "exists", BASE_IMAGE).returncode != 0:
        words = f"{BASE_IMAGE} is not in local storage"
        if "CI" in os.environ and BASE_IMAGE_SCRIPT.exists():
            pytest.fail(words)
        pytest.skip(words)
    with built() as tag:
        yield tag


def test_the_image_is_small(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It adds at most 40 MB to its base."""
    whole, base = (int(podman("image", "inspect", "--format={{.Size}}", name)) for name in (image, BASE_IMAGE))
    megabytes = (whole - base) / 1e6
    with capsys.disabled():
        sys.stdout.write(f"\nThe image adds {megabytes:.1f} MB to its base of {base / 1e6:.1f} MB.\n")
    assert 0 < megabytes <= MAX_ADDED_MEGABYTES


def test_the_image_says_how_it_is_run(image: str) -> None:
    """As nobody, on port 8000, ended by SIGTERM, and with time for a balancer to notice."""
    config = json.loads(podman("image", "inspect", "--format={{json .Config}}", image))
    assert config["User"] == f"{USER}:{USER}"
    assert config["ExposedPorts"] == {"8000/tcp": {}}
    assert config["Cmd"] == ["python", "-m", "inference_api"]
    assert config["StopSignal"] == "SIGTERM"
    assert "DRAIN_SECONDS=5" in config["Env"]


def test_it_serves_hardened_and_ends_gracefully(image: str) -> None:
    """Without root, capabilities and anything to write to, it predicts; its health check follows it through its end."""
    options = (f"--env=http_proxy={NOT_A_PROXY}", "--env=DRAIN_SECONDS=10")  # long enough for a busy machine
    with running(image, *HARDENED, *options) as container:
        container.wait_until_ready()
        expected = {"input": "Hello", "prediction": "predicted(Hello)"}
        assert container.request("POST", "/predict", {"text": "Hello"}) == (200, expected)
        assert container.is_healthy()

        podman("kill", "--signal=TERM", container.name)
        wait_for(lambda: container.request("GET", "/health") == (503, {"status": "draining"}), WAIT_SECONDS)
        assert not container.is_healthy()
        assert container.request("POST", "/predict", {"text": "Hello"}) == (200, expected)
        assert container.exit_code() == 0

        lines = [json.loads(line) for line in container.logs().splitlines()]
    access = [line for line in lines if line.get("request_id") == "from-outside" and line["path"] == "/predict"]
    assert [(line["logger"], line["method"], line["status"]) for line in access] == [
        ("inference_api.access", "POST", 200)
    ] * 2
    assert {line["level"] for line in lines} == {"INFO"}


def test_it_loses_no_connection_at_its_end(image: str) -> None:
    """Without a privilege and a balancer, whoever was let in is answered: others find the port closed."""
    with running(image, *HARDENED, "--env=DRAIN_SECONDS=0") as container:
        container.wait_until_ready()
        answered: list[int] = []

        def post_until_refused() -> None:
            while True:
                try:
                    status, _ = container.request("POST", "/predict", {"text": "Hello"})
                except ConnectionRefusedError:
                    return
                answered.append(status)

        with ThreadPoolExecutor(CLIENTS) as clients:
            posting = [clients.submit(post_until_refused) for _ in range(CLIENTS)]
            wait_for(lambda: len(answered) >= 10 * CLIENTS, WAIT_SECONDS)
            podman("kill", "--signal=TERM", container.name)
            for client in posting:
                client.result(STOP_SECONDS)
        assert set(answered) == {200}
        assert container.exit_code() == 0


def test_it_takes_the_example_of_all_variables(image: str) -> None:
    """--env-file .env.example sets what is the default anyway, and podman stop ends it with exit code 0."""
    with running(image, "--env-file=.env.example") as container:
        container.wait_until_ready()
        body = [{"numbers": [1, 2, 3]}]
        assert container.request("POST", "/square_numbers", body) == (
            200,
            [{"input": [1, 2, 3], "prediction": [1, 4, 9]}],
        )
        podman("stop", f"--time={STOP_SECONDS}", container.name, seconds=2 * STOP_SECONDS)
        assert container.exit_code() == 0
        assert json.loads(container.logs().splitlines()[-1])["message"] == "Shutting down: Master"


def test_a_model_is_a_file_and_a_variable(image: str, tmp_path: Path) -> None:
    """A model without libraries needs no image of its own: it is mounted."""
    (tmp_path / "shout.py").write_text(
        "class Shout:\n"
        "    name, version = 'shout', '2.0'\n"
        "    def predict(self, text: str) -> str:\n"
        "        return text.upper()\n"
    )
    options = (f"--volume={tmp_path}/shout.py:/app/shout.py:ro", "--env=MODELS=shout=shout:Shout")
    with running(image, *HARDENED, *options) as container:
        container.wait_until_ready()
        assert container.request("POST", "/shout", {"text": "hello"}) == (
            200,
            {"input": "hello", "prediction": "HELLO"},
        )


def test_a_real_model_is_an_image_on_top(image: str) -> None:
    """examples/Dockerfile adds a model and its libraries, and the rest stays as it is."""
    options = (f"--build-arg=SERVICE={image}", "--file=examples/Dockerfile")
    with built(*options) as tag, running(tag, *HARDENED) as container:
        container.wait_until_ready()
        assert container.is_healthy()
        status, answer = container.request("POST", "/sentiment", {"text": "The food was great!"})
        assert (status, answer["prediction"]["label"]) == (200, "positive")


def test_it_holds_the_service_and_nothing_else(image: str) -> None:
    """No tests, no tools, no pip, nothing to compile, nothing that its user may write, no process of root."""
    with running(image) as container:
        container.wait_until_ready()
        inside = json.loads(podman("exec", container.name, "python", "-c", SEE_INSIDE))
    pinned = re.findall(r"^[\w.-]+==\S+", (PROJECT / "requirements.txt").read_text(), re.MULTILINE)
    assert inside == {
        "app": ["gunicorn.conf.py", "inference_api"],
        "packages": sorted(pinned),
        "writable": [],
        "without bytecode": [],
        "users": [USER],
    }


def test_its_health_check_fails_where_nothing_listens(image: str) -> None:
    """A container whose service is not there is not healthy."""
    with running(image, command=("sleep", "600")) as container:
        assert not container.is_healthy()


def test_the_build_sees_no_secrets_and_no_litter(image: str, tmp_path: Path) -> None:
    """Of a folder in use, .dockerignore lets through what an image may hold."""
    project, seen = tmp_path / "project", tmp_path / "seen"
    wanted = ["inference_api/app.py", "examples/weights/digits.onnx", "requirements.txt"]
    unwanted = [".git/config", ".env", ".env.production", ".venv/bin/python", ".venv-examples/bin/python", "all.log"]
    unwanted += ["inference_api/__pycache__/app.pyc", "logs/today.log", ".mypy_cache/3", ".pytest_cache/README.md"]
    unwanted += [".ruff_cache/0", ".hypothesis/examples", "tests/unit/test_app.py", "benchmarks/.venvs/fastapi"]
    for name in wanted + unwanted:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    (project / ".dockerignore").write_text((PROJECT / ".dockerignore").read_text())
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    with built(f"--file={tmp_path}/Dockerfile", f"--output=type=local,dest={seen}", context=project):
        pass
    assert sorted(str(path.relative_to(seen)) for path in seen.rglob("*") if path.is_file()) == sorted(wanted)
