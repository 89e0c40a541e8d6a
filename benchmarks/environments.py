"""One virtual environment a peer, at exact versions."""

import hashlib
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
BENCHMARKS = PROJECT / "benchmarks"
PEERS = BENCHMARKS / "peers"
WORK = BENCHMARKS / ".work"
"""Configurations, logs and the results of quick looks; may be deleted."""

SERVICE = [PROJECT / "requirements.txt"]
REQUIREMENTS = {
    "service": SERVICE,
    "granian": [*SERVICE, PEERS / "granian.txt"],
    "fastapi": [PEERS / "fastapi.txt"],
    "litserve": [PEERS / "litserve.txt"],
    "bentoml": [PEERS / "bentoml.txt"],
    "mlserver": [PEERS / "mlserver.txt"],
    "digits": [*SERVICE, PEERS / "fastapi.txt", PROJECT / "examples" / "requirements" / "digits.txt"],
}
PACKAGES = {
    "service": ["gunicorn", "falcon", "msgspec"],
    "granian": ["granian"],
    "fastapi": ["fastapi", "uvicorn", "uvloop", "httptools", "pydantic"],
    "litserve": ["litserve"],
    "bentoml": ["bentoml"],
    "mlserver": ["mlserver"],
    "digits": ["scikit-learn", "numpy"],
}
"""Whose versions are recorded."""


class NotInstalledError(RuntimeError):
    """A peer cannot be installed here; the message says why."""


def folder(name: str) -> Path:
    return BENCHMARKS / ".venvs" / name


def program(name: str, command: str = "python") -> str:
    return str(folder(name) / "bin" / command)


def install(name: str) -> None:
    """Make the environment, unless it is there with these very requirements; raises NotInstalledError."""
    files = REQUIREMENTS[name]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    mark = folder(name) / ".installed"
    if mark.is_file() and mark.read_text() == wanted:
        return
    print(f"installing {name}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder(name)], check=True)
    for path in files:  # one by one: some have hashes, some have not
        done = subprocess.run(
            [program(name), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", path],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise NotInstalledError(done.stderr.strip().splitlines()[-1])
    mark.write_text(wanted)


def versions(name: str) -> dict[str, str]:
    code = "import sys, importlib.metadata as m; print(*(m.version(p) for p in sys.argv[1:]))"
    packages = PACKAGES[name]
    done = subprocess.run([program(name), "-c", code, *packages], capture_output=True, text=True, check=True)
    return dict(zip(packages, done.stdout.split(), strict=True))
