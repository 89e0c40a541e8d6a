"""What is measured; everything returns raw figures, a list with one entry a round."""

import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.attacks import ATTACKS, under
from benchmarks.environments import PROJECT, WORK, program
from benchmarks.load import wrk
from benchmarks.overload import OVERLOADS
from benchmarks.peers.models import CALL_SECONDS
from benchmarks.servers import OURS, Server, attacked_servers, batching_servers, digits_servers, running, service

MAIN_CONNECTIONS = 16
MANY_CONNECTIONS = (1, 16, 64, 256)
CLOSELY_WATCHED = frozenset({"ours", "ours-off", "fastapi", "gthread", "granian"})
BATCH_CONNECTIONS = (1, 16, 64)
WARM_UP_SECONDS = 1
WORKERS = 2
SOAK_REQUESTS = 2_000_000
SOAK_WARM_UP_SECONDS = 5
SOAK_STEP_SECONDS = 10

Rounds = dict[str, dict[str, list[dict[str, float]]]]  # server → connections → rounds


def throughput(
    servers: Iterable[Server], connections: Mapping[str, tuple[int, ...]], rounds: int, seconds: int
) -> Rounds:
    """Closed loops, the servers one after the other in each round, so that all see the same moods of the machine."""
    found: defaultdict[str, defaultdict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for server in servers:
            with running(server) as target:
                wrk(target, MAIN_CONNECTIONS, WARM_UP_SECONDS)
                for clients in connections[server.name]:
                    sample = wrk(target, clients, seconds)
                    found[server.name][str(clients)].append(asdict(sample))
                    print(
                        f"  round {number + 1}: {server.name} x{clients}: {sample.rate:,.0f}/s, "
                        f"p50 {sample.p50_ms:.3f} ms, p99 {sample.p99_ms:.3f} ms",
                        flush=True,
                    )
    return {name: dict(by_connections) for name, by_connections in found.items()}


def hello(servers: list[Server], rounds: int, seconds: int) -> Rounds:
    connections = {s.name: MANY_CONNECTIONS if s.name in CLOSELY_WATCHED else (MAIN_CONNECTIONS,) for s in servers}
    return throughput(servers, connections, rounds, seconds)


def memory(servers: Iterable[Server], seconds: int) -> dict[str, list[float]]:
    """PSS in MB of the server with two workers, after some load."""
    found = {}
    for server in servers:
        with running(server, workers=WORKERS) as target:
            wrk(target, MAIN_CONNECTIONS, seconds)
            found[server.name] = [target.pss_mb()]
    return found


def start(servers: Iterable[Server], rounds: int) -> dict[str, list[float]]:
    """Seconds from the command to the first 200 on /health, two workers, not pinned; the first one warms the caches."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for server in servers:
            with running(server, workers=WORKERS, pinned=False) as target:
                if number:
                    found[server.name].append(target.start_seconds)
    return found


def batching(names: set[str], rounds: int, seconds: int) -> Rounds:
    """A model of 5 ms a call whatever the batch."""
    servers = [server for server in batching_servers() if server.name in names]
    return throughput(servers, {server.name: BATCH_CONNECTIONS for server in servers}, rounds, seconds)


def digits(rounds: int, seconds: int) -> Rounds:
    """examples/digits.py, a random forest of scikit-learn."""
    train = [program("digits"), "-m", "examples.train_digits"]
    WORK.mkdir(exist_ok=True)
    subprocess.run(train, cwd=PROJECT, env={"DIGITS_WEIGHTS": str(WORK / "digits.skops")}, check=True)
    servers = digits_servers()
    return throughput(servers, {server.name: (1, 64) for server in servers}, rounds, seconds)


def lone(rounds: int, seconds: int) -> Rounds:
    """One client and models that batch, batching on and off."""
    models = {"sleeping": "BatchModel", "instant": "InstantBatchModel"}
    servers = [
        service(f"{name}-{size}", "", MODELS=f"predict=benchmarks.peers.models:{model}", MAX_BATCH_SIZE=size)
        for name, model in models.items()
        for size in ("1", "64")
    ]
    return throughput(servers, {server.name: (1,) for server in servers}, rounds, seconds)


def overload(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Overload → rounds; one round for those that take long."""
    found: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for overload in OVERLOADS:
        for _ in range(rounds if overload.is_short else 1):
            found[overload.name].append(overload.measure())
            print(f"  {overload.name}: {found[overload.name][-1]}", flush=True)
    return dict(found)


def attacks(names: set[str]) -> dict[str, dict[str, dict[str, float]]]:
    """server → attack → how /health fares meanwhile; each on a server of its own."""
    found: defaultdict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for name, attack in ATTACKS.items():
        for server in attacked_servers():
            if server.name in names:
                with running(server) as target:
                    found[server.name][name] = under(attack, target)
                print(
                    f"  {server.name}, {attack.attackers} clients {attack.title}: {found[server.name][name]}",
                    flush=True,
                )
    return dict(found)


def soak(requests: int = SOAK_REQUESTS) -> dict[str, Any]:
    """Memory and descriptors of one master and one worker before and after so many requests (row 80 of the faults)."""
    with running(OURS) as target:
        wrk(target, 256, 1)
        wrk(target, MAIN_CONNECTIONS, SOAK_WARM_UP_SECONDS)
        before, descriptors, done = target.pss_mb(), target.descriptors(), 0
        while done < requests:
            done += wrk(target, MAIN_CONNECTIONS, SOAK_STEP_SECONDS).requests
            print(f"  {done:,} requests, {target.pss_mb():.1f} MB, {target.descriptors()} descriptors", flush=True)
        return {
            "requests": done,
            "pss_mb": [before, target.pss_mb()],
            "descriptors": [descriptors, target.descriptors()],
        }


def ideal(clients: int, max_batch_size: int = 64) -> float:
    """Requests a second if every call of the 5 ms model served all clients that a batch holds."""
    return min(clients, max_batch_size) / CALL_SECONDS
