"""Settings: every variable with good and bad values, `.env`, derived defaults, and what is shown of them."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from inference_api import config
from inference_api.config import (
    MAX_WORKERS,
    Settings,
    SettingsError,
    available_cpus,
    quota_cpus,
    read_settings,
    settings_or_exit,
)
from inference_api.model import ModelSpec

PROJECT = Path(__file__).parents[2]
DEFAULTS: dict[str, Any] = {
    "HOST": "0.0.0.0",
    "PORT": 8000,
    "WEB_CONCURRENCY": available_cpus(),
    "THREADS": 0,
    "WORKER_CLASS": "inference_api.worker.Worker",
    "MODELS": (
        ModelSpec("predict", "inference_api.model", "DummyModel"),
        ModelSpec("square_numbers", "inference_api.model", "SquareNumbersModel"),
    ),
    "MAX_BATCH_SIZE": 32,
    "MAX_PENDING": 1024,
    "MAX_CONNECTIONS": 1000,
    "REQUEST_TIMEOUT": 25.0,
    "READ_TIMEOUT": 10.0,
    "KEEP_ALIVE": 75.0,
    "TIMEOUT": 30,
    "DRAIN_SECONDS": 0.0,
    "GRACEFUL_TIMEOUT": 30.0,
    "MAX_REQUESTS": 0,
    "MAX_REQUESTS_JITTER": 0,
    "MAX_BODY_BYTES": 1_048_576,
    "PRELOAD": True,
    "LOG_LEVEL": "INFO",
    "ACCESS_LOG": True,
    "API_KEYS": (),
    "DOCS": True,
    "METRICS": True,
}


def value_of(settings: Settings, variable: str) -> Any:
    return getattr(settings, variable.lower())


def values_of(settings: Settings) -> dict[str, Any]:
    return {field.name.upper(): value_of(settings, field.name) for field in dataclasses.fields(settings)}


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An empty working folder and an environment that sets none of the variables."""
    monkeypatch.chdir(tmp_path)
    for variable in DEFAULTS:
        monkeypatch.delenv(variable, raising=False)
    config._surroundings.cache_clear()
    yield monkeypatch
    config._surroundings.cache_clear()


@pytest.mark.parametrize("text", [None, "", "  "])
def test_nothing_and_nothing_but_space_are_the_default(text: str | None) -> None:
    """`docker run --env-file` and manifests often leave a value empty."""
    environ = {} if text is None else dict.fromkeys(DEFAULTS, text)
    assert values_of(Settings.from_environ(environ)) == DEFAULTS


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("HOST", "127.0.0.1", "127.0.0.1"),
        ("HOST", "::", "::"),
        ("HOST", "my-host.example", "my-host.example"),
        ("PORT", "1", 1),
        ("PORT", " 65535 ", 65_535),
        ("WEB_CONCURRENCY", "3", 3),
        ("THREADS", "1024", 1024),
        ("WORKER_CLASS", "gthread", "gthread"),
        ("WORKER_CLASS", "gunicorn.workers.sync.SyncWorker", "gunicorn.workers.sync.SyncWorker"),
        ("MODELS", "a=b:C", (ModelSpec("a", "b", "C"),)),
        ("MODELS", " a-1=b.c:D , _x=y:Z ", (ModelSpec("a-1", "b.c", "D"), ModelSpec("_x", "y", "Z"))),
        ("MODELS", "Health=b:C", (ModelSpec("Health", "b", "C"),)),
        ("MAX_BATCH_SIZE", "1", 1),
        ("MAX_PENDING", "1", 1),
        ("MAX_CONNECTIONS", "1000000", 1_000_000),
        ("REQUEST_TIMEOUT", "0.01", 0.01),
        ("READ_TIMEOUT", "0.5", 0.5),
        ("KEEP_ALIVE", "5", 5.0),
        ("TIMEOUT", "86400", 86_400),
        ("DRAIN_SECONDS", "5", 5.0),
        ("GRACEFUL_TIMEOUT", "25.000001", 25.000001),
        ("MAX_REQUESTS", "200", 200),
        ("MAX_REQUESTS_JITTER", "20", 20),
        ("MAX_BODY_BYTES", "1", 1),
        ("PRELOAD", "false", False),
        ("PRELOAD", "On", True),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("ACCESS_LOG", "0", False),
        ("ACCESS_LOG", "YES", True),
        ("API_KEYS", "12345678", (b"12345678",)),
        ("API_KEYS", " first-key, ,second=key~! ,", (b"first-key", b"second=key~!")),
        ("DOCS", "off", False),
        ("METRICS", "no", False),
    ],
)
def test_a_good_value_is_taken(variable: str, text: str, value: Any) -> None:
    """It changes its own setting and no other."""
    settings = Settings.from_environ({variable: text})
    assert value_of(settings, variable) == value
    assert values_of(settings) == {**DEFAULTS, variable: value}


WHOLE = "a whole number from {} to {}"
SECONDS = "seconds from {} to 86400"
WORKER = "gthread, or the dotted name of a Gunicorn worker class that can be imported"
SWITCH = "one of 1, true, yes, on, 0, false, no, off"
KEYS = "keys of 8 to 512 printable ASCII characters, separated by commas"
SPECS = "path=module:Class, several separated by commas"


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("HOST", "a b", "a host name or an address to listen on"),
        ("HOST", "unix:/x", "a host name or an address to listen on"),
        ("HOST", "\udcff", "a host name or an address to listen on"),
        ("PORT", "0", WHOLE.format(1, 65535)),
        ("PORT", "65536", WHOLE.format(1, 65535)),
        ("PORT", "8e3", WHOLE.format(1, 65535)),
        ("PORT", "+80", WHOLE.format(1, 65535)),
        ("PORT", "80.0", WHOLE.format(1, 65535)),
        ("PORT", "٣", WHOLE.format(1, 65535)),
        ("PORT", "1_0", WHOLE.format(1, 65535)),
        ("PORT", "http\nX: y", WHOLE.format(1, 65535)),
        ("WEB_CONCURRENCY", "65", WHOLE.format(1, 64)),
        ("WEB_CONCURRENCY", "auto", WHOLE.format(1, 64)),
        ("THREADS", "0", WHOLE.format(1, 1024)),
        ("WORKER_CLASS", "sync", WORKER),
        ("WORKER_CLASS", "a..b", WORKER),
        ("WORKER_CLASS", "no.such.Worker", WORKER),
        ("WORKER_CLASS", "pathlib.Path", WORKER),
        ("MODELS", ",", SPECS),
        ("MODELS", "a=b:C,", SPECS),
        ("MODELS", "a=b", SPECS),
        ("MODELS", "b:C", SPECS),
        ("MODELS", "a=b:C.D", SPECS),
        ("MODELS", "a=b c:D", SPECS),
        ("MODELS", "a=../b:D", SPECS),
        ("MODELS", "a/b=b:C", "a path of letters, digits, _ and - for each model"),
        ("MODELS", "=b:C", "a path of letters, digits, _ and - for each model"),
        ("MODELS", "ä=b:C", "a path of letters, digits, _ and - for each model"),
        ("MODELS", "openapi.json=b:C", "a path of letters, digits, _ and - for each model"),
        ("MODELS", "health=b:C", "paths other than docs, health, metrics, openapi.json"),
        ("MODELS", "x=b:C,metrics=b:C", "paths other than docs, health, metrics, openapi.json"),
        ("MODELS", "docs=b:C", "paths other than docs, health, metrics, openapi.json"),
        ("MODELS", "a=b:C,a=d:E", "each path once"),
        ("MAX_BATCH_SIZE", "0", WHOLE.format(1, 1024)),
        ("MAX_PENDING", "0", WHOLE.format(1, 1000000)),
        ("MAX_CONNECTIONS", "-1", WHOLE.format(1, 1000000)),
        ("REQUEST_TIMEOUT", "0", SECONDS.format("0.01")),
        ("REQUEST_TIMEOUT", "nan", SECONDS.format("0.01")),
        ("READ_TIMEOUT", "10s", SECONDS.format("0.1")),
        ("KEEP_ALIVE", "inf", SECONDS.format("0.1")),
        ("TIMEOUT", "0.5", WHOLE.format(1, 86400)),
        ("DRAIN_SECONDS", "-1", SECONDS.format("0")),
        ("GRACEFUL_TIMEOUT", "86401", SECONDS.format("0.1")),
        ("GRACEFUL_TIMEOUT", "1e3", SECONDS.format("0.1")),
        ("MAX_REQUESTS", "-1", WHOLE.format(0, 2**31)),
        ("MAX_REQUESTS_JITTER", "many", WHOLE.format(0, 2**31)),
        ("MAX_BODY_BYTES", "1MB", WHOLE.format(1, 2**30)),
        ("MAX_BODY_BYTES", "9" * 5000, WHOLE.format(1, 2**30)),
        ("PRELOAD", "2", SWITCH),
        ("LOG_LEVEL", "verbose", "one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
        ("ACCESS_LOG", "-", SWITCH),
        ("DOCS", "truee", SWITCH),
        ("METRICS", "None", SWITCH),
    ],
)
def test_a_bad_value_is_told_in_one_line(variable: str, text: str, allowed: str) -> None:
    """The line names the variable, the value and what is allowed, whatever the value is made of."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({variable: text})
    message = str(caught.value)
    assert message == f"{variable}={text[:200]!r} is not allowed: it must be {allowed}"
    assert message.isprintable()


@pytest.mark.parametrize(
    "text", ["short", "with space", "good-key-1,bad", "schlüssel", "x" * 513, "\udcffsecretsecret", ", ,"]
)
def test_a_bad_key_is_not_told(text: str) -> None:
    """An error message ends up in logs: a key must not stand in it."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({"API_KEYS": text})
    assert str(caught.value) == f"API_KEYS=*** is not allowed: it must be {KEYS}"


@pytest.mark.parametrize(("request_timeout", "graceful_timeout"), [("30", "30"), ("31", "30"), ("30", ""), ("", "25")])
def test_a_shutdown_must_leave_time_for_a_request(request_timeout: str, graceful_timeout: str) -> None:
    """REQUEST_TIMEOUT must be smaller than GRACEFUL_TIMEOUT, the defaults included."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({"REQUEST_TIMEOUT": request_timeout, "GRACEFUL_TIMEOUT": graceful_timeout})
    assert str(caught.value) == (
        f"REQUEST_TIMEOUT={request_timeout or '25'} is not allowed: it must be smaller than "
        f"GRACEFUL_TIMEOUT={graceful_timeout or '30'}, or a shutdown would cut requests off"
    )


def test_settings_cannot_be_changed() -> None:
    """They are read once; nothing can change them after."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings.from_environ({}).port = 1  # type: ignore[misc]


def test_the_environment_is_stronger_than_the_file(environ: pytest.MonkeyPatch) -> None:
    """`.env` gives what the process's environment does not set, and leaves that as it is."""
    Path(".env").write_text(
        "# a comment\nPORT=9001\nexport LOG_LEVEL='debug'\nDOCS=off # why\nHOST=\nAPI_KEYS=a${PORT}bcdef\n"
    )
    environ.setenv("PORT", "9002")
    settings = read_settings()
    assert values_of(settings) == {
        **DEFAULTS,
        "PORT": 9002,
        "LOG_LEVEL": "DEBUG",
        "DOCS": False,
        "API_KEYS": (b"a${PORT}bcdef",),
    }


def test_an_empty_variable_of_the_environment_is_the_default_whatever_the_file_says(
    environ: pytest.MonkeyPatch,
) -> None:
    """The process's environment is stronger, and empty means the default."""
    Path(".env").write_text("PORT=9001\n")
    environ.setenv("PORT", "")
    assert read_settings().port == 8000


def test_there_need_be_no_file(environ: pytest.MonkeyPatch) -> None:
    """A container has no `.env`."""
    assert values_of(read_settings()) == DEFAULTS


def test_a_file_that_is_not_text_stops_the_start_with_one_line(environ: pytest.MonkeyPatch) -> None:
    """The line says which file it is."""
    Path(".env").write_bytes(b"PORT=\xff\n")
    with pytest.raises(SystemExit, match=r"\Ainference_api: \.env cannot be read: [^\n]+\Z"):
        settings_or_exit()


@pytest.mark.parametrize(
    "line", ['API_KEYS="correct-horse', "API_KEYS correct-horse", "PORT: 80", "=80", "API_KEYS", '"broken']
)
def test_a_line_of_the_file_that_sets_nothing_stops_the_start(environ: pytest.MonkeyPatch, line: str) -> None:
    """A slip must not leave the service open to all; the line is named by its number, as it may hold a key."""
    Path(".env").write_text(f"# a comment\n\n{line}\nDOCS=off\n")
    with pytest.raises(SystemExit) as caught:
        settings_or_exit()
    assert caught.value.code == "inference_api: .env: line 3 is not allowed: it must be KEY=value"


def test_a_bad_value_in_the_file_stops_the_start_with_one_line(environ: pytest.MonkeyPatch) -> None:
    """A value is checked wherever it comes from."""
    Path(".env").write_text("PORT=http\n")
    with pytest.raises(SystemExit) as caught:
        settings_or_exit()
    line = "inference_api: PORT='http' is not allowed: it must be a whole number from 1 to 65535"
    assert caught.value.code == line


def cgroup(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, MAX_WORKERS),
        ({"cpu.max": "max 100000\n"}, MAX_WORKERS),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "\n"}, MAX_WORKERS),
        ({"cpu.max": "100000\n"}, MAX_WORKERS),
        ({"cpu.max": "100000 0\n"}, MAX_WORKERS),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, MAX_WORKERS),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, MAX_WORKERS),
        ({"cpu.max": "200000 100000", "cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, 2.0),
    ],
)
def test_the_quota_of_the_cgroup_is_read(tmp_path: Path, files: Mapping[str, str], cpus: float) -> None:
    """Version 2 or 1 of the cgroup files; what cannot be read sets no bound."""
    assert quota_cpus(cgroup(tmp_path, files)) == cpus


@pytest.mark.parametrize(
    ("affinity", "quota", "cpus"),
    [(1, "800000", 1), (4, "max", 4), (4, "150000", 2), (4, "10000", 1), (4, "400001", 4), (1000, "max", MAX_WORKERS)],
)
def test_workers_are_as_many_as_the_cpus_that_may_be_used(tmp_path: Path, affinity: int, quota: str, cpus: int) -> None:
    """The affinity, cut by the quota, of which a part counts as a whole; at least one."""
    assert available_cpus(affinity, cgroup(tmp_path, {"cpu.max": f"{quota} 100000"})) == cpus


def test_what_is_in_force_is_shown_with_secrets_masked() -> None:
    """The line at the start shows every variable, and no key."""
    settings = Settings.from_environ({"API_KEYS": "topsecret-1,topsecret-2", "PORT": "9000"})
    shown = settings.effective()
    assert list(shown) == list(DEFAULTS)
    assert shown["API_KEYS"] == "***"
    assert shown["PORT"] == 9000
    models = "predict=inference_api.model:DummyModel,square_numbers=inference_api.model:SquareNumbersModel"
    assert shown["MODELS"] == models
    assert "topsecret" not in repr(shown)
    assert Settings.from_environ({}).effective()["API_KEYS"] == ""


def test_keys_do_not_stand_in_a_settings_repr() -> None:
    """A traceback or a debugger's line with the settings in it must not tell the keys."""
    assert "topsecret" not in repr(Settings.from_environ({"API_KEYS": "topsecret-1"}))


def test_the_models_say_their_paths() -> None:
    """Metrics and routes are made from these."""
    assert Settings.from_environ({"MODELS": "a=b:C,d=e:F"}).model_paths == ("/a", "/d")


def test_the_example_file_holds_every_variable_with_its_default() -> None:
    """Plain KEY=value lines, so that docker reads them too, in the order of the settings."""
    lines = (PROJECT / ".env.example").read_text().splitlines()
    assert all(re.fullmatch(r"|#.*|[A-Z_]+=\S*", line) for line in lines)
    pairs = [tuple(line.split("=", 1)) for line in lines if line and not line.startswith("#")]
    assert pairs == [(name, default) for name, default, _ in Settings.variables()]


def test_the_example_file_says_what_each_variable_means() -> None:
    """Its comments are the settings' own words."""
    text = (PROJECT / ".env.example").read_text()
    for name, default, meaning in Settings.variables():
        assert f"# {meaning}\n{name}={default}\n" in text


def test_the_readme_holds_every_variable_with_its_default() -> None:
    """Its table is in the order of the settings, too; † marks what holds on the project's own worker only."""
    text = (PROJECT / "README.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)`(?: †)? \|(?: `([^`]+)`)? \| \S", text, re.MULTILINE)
    assert rows == [(name, default) for name, default, _ in Settings.variables()]
