"""The manifests: valid by Kubernetes' own schemas, of one piece, and true to the service's variables and paths."""

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from inference_api.config import Settings
from tests.live.service import WAIT_SECONDS, needed

DEPLOY = Path(__file__).parents[2] / "deploy"
FOLDER = DEPLOY / "kubernetes"
KINDS = [
    "ConfigMap",
    "Deployment",
    "Service",
    "HorizontalPodAutoscaler",
    "PodDisruptionBudget",
    "NetworkPolicy",
]
OLDEST, NEWEST = "1.25", kubernetes_validate.latest_version()
NAME = {"app.kubernetes.io/name": "inference-api"}
# Where pods differ from .env.example.
CHANGED = {"DRAIN_SECONDS": "10"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def manifest(kind: str) -> Any:
    found = read(FOLDER / f"{kind.lower()}.yaml")
    assert found["kind"] == kind
    return found


def container() -> Any:
    (only,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    return only


def settings() -> Settings:
    return Settings.from_environ(manifest("ConfigMap")["data"])


def defaults() -> dict[str, str]:
    lines = (DEPLOY.parent / ".env.example").read_text().splitlines()
    return {name: value for name, _, value in (ln.partition("=") for ln in lines if ln and not ln.startswith("#"))}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_is_valid(kind: str, version: str) -> None:
    """By the strict schema, which knows no field that Kubernetes would ignore, of an old and of the newest version."""
    kubernetes_validate.validate(manifest(kind), version, strict=True)


def test_the_kustomization_has_every_manifest() -> None:
    """No file lies in the folder that `kubectl apply -k` would leave out."""
    resources = read(FOLDER / "kustomization.yaml")["resources"]
    assert resources == [f"{kind.lower()}.yaml" for kind in KINDS]
    assert {path.name for path in FOLDER.iterdir()} == {*resources, "kustomization.yaml"}


def test_kustomize_builds_what_the_manifests_say() -> None:
    """`kubectl kustomize` gives the manifests themselves; only the image has its registry's name."""
    done = subprocess.run(
        [needed("kubectl", "kubernetes-client"), "kustomize", FOLDER],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    built = {resource["kind"]: resource for resource in yaml.safe_load_all(done.stdout)}
    (only,) = built["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert only["image"] == "registry.example.com/inference-api:1.0.0"
    only["image"] = container()["image"]
    assert built == {kind: manifest(kind) for kind in KINDS}


def test_one_name_holds_the_manifests_together() -> None:
    """Every selector finds the pods, by the label that all carry."""
    deployment = manifest("Deployment")["spec"]
    pod = deployment["template"]
    assert [manifest(kind)["metadata"]["labels"] for kind in KINDS] == [NAME] * len(KINDS)
    assert pod["metadata"]["labels"] == deployment["selector"]["matchLabels"] == NAME
    assert manifest("Service")["spec"]["selector"] == NAME
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == NAME
    assert manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == NAME
    spread = pod["spec"]["topologySpreadConstraints"]
    assert [constraint["labelSelector"]["matchLabels"] for constraint in spread] == [NAME] * 2
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "inference-api"}
    assert container()["envFrom"] == [{"configMapRef": {"name": manifest("ConfigMap")["metadata"]["name"]}}]


def test_the_variables_are_those_of_the_service() -> None:
    """The ConfigMap has each of .env.example with its default, but for what differs in pods; a Secret has the keys."""
    data = manifest("ConfigMap")["data"]
    (from_secret,) = container()["env"]
    assert from_secret["name"] == from_secret["valueFrom"]["secretKeyRef"]["key"] == "API_KEYS"
    assert {**data, "API_KEYS": ""} == {**defaults(), **CHANGED}
    assert settings().drain_seconds == 10


def test_the_port_is_the_one_that_is_listened_on() -> None:
    """PORT, the container's, and the name by which the Service, the probes and the policy mean it."""
    assert container()["ports"] == [{"name": "http", "containerPort": settings().port}]
    assert manifest("Service")["spec"]["ports"] == [{"name": "http", "port": 80, "targetPort": "http"}]
    assert manifest("NetworkPolicy")["spec"]["ingress"][0]["ports"] == [{"port": "http"}]


def test_the_probes_ask_what_the_service_answers() -> None:
    """Ready and started by /health, alive by /health/live."""
    probes = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert probes == {
        "startup": {"path": "/health", "port": "http"},
        "readiness": {"path": "/health", "port": "http"},
        "liveness": {"path": "/health/live", "port": "http"},
    }


def test_the_times_fit_together() -> None:
    """Draining is noticed while it lasts; nothing is killed that still finishes, or that the master would replace."""
    now = settings()
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    # Gunicorn itself kills a second after the two.
    assert pod["terminationGracePeriodSeconds"] > now.drain_seconds + now.graceful_timeout + 1
    assert seconds("readiness") < now.drain_seconds
    assert seconds("liveness") > now.timeout
    assert "lifecycle" not in container()


def seconds(probe: str) -> float:
    """How long it may fail until Kubernetes acts."""
    found = container()[f"{probe}Probe"]
    return float(found["periodSeconds"] * found["failureThreshold"] + found["timeoutSeconds"])


def test_an_update_never_serves_with_less() -> None:
    """A new pod is ready before an old one goes, and a drained node takes one pod at a time."""
    deployment = manifest("Deployment")["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert "replicas" not in deployment
    assert (
        manifest("HorizontalPodAutoscaler")["spec"]["minReplicas"]
        > manifest("PodDisruptionBudget")["spec"]["maxUnavailable"]
    )


def test_a_pod_may_do_nothing_that_it_need_not() -> None:
    """The restricted Pod Security Standard, a read-only root, no token, and whole CPUs for the workers."""
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
    assert manifest("NetworkPolicy")["spec"]["egress"] == []
    resources = container()["resources"]
    assert resources["requests"] == resources["limits"]
    assert int(resources["limits"]["cpu"]) >= 1
    assert f"USER {pod['securityContext']['runAsUser']}:" in (DEPLOY.parent / "Dockerfile").read_text()
