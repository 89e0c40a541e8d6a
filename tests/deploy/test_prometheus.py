"""What operators give to Prometheus: checked by its own tool, and by a Prometheus that scrapes two instances."""

import contextlib
import http.client
import json
import re
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from inference_api.metrics import Metrics
from tests.live.service import PROJECT, WAIT_SECONDS, Service, free_port, needed, running, wait_for

FOLDER = PROJECT / "deploy" / "prometheus"
ADDRESSES = ("10.0.0.11:8000", "10.0.0.12:8000")
ANSWERED = 'inference_api_requests_total{route="/predict",status="200"}'


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def alerts() -> list[str]:
    return [rule["alert"] for group in read("rules.yml")["groups"] for rule in group["rules"] if "alert" in rule]


def promtool(*arguments: str | Path) -> str:
    """What promtool says; it must be content."""
    done = subprocess.run(
        [needed("promtool", "prometheus"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WAIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_rules_are_valid() -> None:
    """`promtool check rules` finds no fault."""
    assert "SUCCESS" in promtool("check", "rules", FOLDER / "rules.yml")


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    """`promtool test rules` runs them over made-up series; no alert is without a case of either kind."""
    assert "SUCCESS" in promtool("test", "rules", FOLDER / "rules_test.yml")
    firing: set[str] = set()
    silent: set[str] = set()
    for case in (case for test in read("rules_test.yml")["tests"] for case in test["alert_rule_test"]):
        (firing if case["exp_alerts"] else silent).add(case["alertname"])
    assert firing == silent == set(alerts())


def test_rules_and_runbook_speak_of_metrics_that_there_are() -> None:
    """Every name in the rules and on the page is one that /metrics shows, and every alert is in the runbook."""
    page = (PROJECT / "deploy" / "README.md").read_text()
    metrics = Metrics(["/predict"])
    metrics.batched("/predict", 1)
    shown = set(re.findall(r"^(inference_api_\w+)", metrics.render({"/predict": ("m", "1")}).decode(), re.MULTILINE))
    said = set(re.findall(r"(?<!:)\binference_api_[a-z_]+\b(?!:)", (FOLDER / "rules.yml").read_text() + page))
    assert said <= shown
    assert set(alerts()) == set(re.findall(r"`(InferenceAPI\w+)`", page))


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-kubernetes.yml"])
def test_a_configuration_is_valid(name: str, tmp_path: Path) -> None:
    """`promtool check config` finds no fault. (Debian's cannot discover pods: that part is replaced.)"""
    configuration = read(name)
    for job in configuration["scrape_configs"]:
        if job.pop("kubernetes_sd_configs", None):
            job["static_configs"] = [{"targets": ["pod:8000"]}]
    (tmp_path / "rules.yml").write_text((FOLDER / "rules.yml").read_text())
    (tmp_path / name).write_text(yaml.safe_dump(configuration))
    assert "SUCCESS" in promtool("check", "config", tmp_path / name)


class Prometheus:
    """A Prometheus with the configuration of deploy/, but for the addresses and a scrape every second."""

    def __init__(self, folder: Path, targets: list[Service]) -> None:
        configuration = (FOLDER / "prometheus.yml").read_text().replace(": 15s", ": 1s")
        for address, target in zip(ADDRESSES, targets, strict=True):
            configuration = configuration.replace(address, f"127.0.0.1:{target.port}")
        (folder / "prometheus.yml").write_text(configuration)
        (folder / "rules.yml").write_text((FOLDER / "rules.yml").read_text())
        self.port = free_port()
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    needed("prometheus", "prometheus"),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer of its HTTP API; None while it starts."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", f"/api/v1/{path}?{urllib.parse.urlencode(query)}")
            response = connection.getresponse()
            if response.status == 200:
                return json.load(response)["data"]
        return None

    def query(self, expression: str) -> list[float]:
        found = self.get("query", query=expression) or {"result": []}
        return sorted(float(result["value"][1]) for result in found["result"])

    def rules(self) -> dict[str, str]:
        """The name of each rule → whether it could be evaluated."""
        groups = self.get("rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    def wait_for(self, expression: str, expected: list[float]) -> None:
        wait_for(lambda: self.query(expression) == expected, WAIT_SECONDS, lambda: (expression, self.query(expression)))


@pytest.fixture
def instances(tmp_path: Path) -> Iterator[list[Service]]:
    with (
        running(tmp_path / "one", WEB_CONCURRENCY="2", MAX_REQUESTS="100") as one,
        running(tmp_path / "two", WEB_CONCURRENCY="2") as two,
    ):
        yield [one, two]


def test_prometheus_shows_what_was_sent_to_two_instances(instances: list[Service], tmp_path: Path) -> None:
    """The sums are the requests sent, over workers and their recycling, and every rule can be evaluated."""
    folder = tmp_path / "prometheus"
    folder.mkdir()
    prometheus = Prometheus(folder, instances)
    try:
        wait_for(lambda: prometheus.query("up") == [1.0, 1.0], WAIT_SECONDS, prometheus.log.read_text)
        for count, instance in zip((250, 50), instances, strict=True):
            assert {instance.post("/predict", {"text": "Hello"}).status for _ in range(count)} == {200}
        prometheus.wait_for(ANSWERED, [50.0, 250.0])
        prometheus.wait_for("sum(inference_api_request_duration_seconds_count{route='/predict'})", [300.0])
        prometheus.wait_for("sum(inference_api_predictions_total{model='dummy'})", [300.0])
        prometheus.wait_for(f"sum(resets({ANSWERED}[5m]))", [0.0])
        prometheus.wait_for("sum(inference_api_worker_starts_total) > bool 4", [1.0])
        prometheus.wait_for("job:inference_api_error_ratio:rate5m", [0.0])
        wait_for(lambda: set(prometheus.rules().values()) == {"ok"}, WAIT_SECONDS, prometheus.rules)
        firing = [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]
        assert firing == []
    finally:
        prometheus.process.terminate()
        prometheus.process.wait(WAIT_SECONDS)
