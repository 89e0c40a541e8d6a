"""python -m benchmarks [run | render | soak]; PEERS, ROUNDS and SECONDS in the environment make it a quick look."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import measures
from benchmarks.chart import svg
from benchmarks.environments import BENCHMARKS, WORK, NotInstalledError, install, versions
from benchmarks.results import Results, markdown
from benchmarks.servers import CPUS, OURS, SERVERS

RESULTS = BENCHMARKS / "results.json"
ALWAYS = frozenset({"ours", "ours-off"})
BATCHING_ROUNDS = 3
OVERLOAD_ROUNDS = 3


def run(peers: set[str], rounds: int, seconds: int) -> Results:
    """Measure these peers, or all and everything where none is named."""
    everything = not peers
    servers = [s for s in SERVERS if everything or s.name in peers | ALWAYS]
    if unknown := peers - {s.name for s in SERVERS}:
        sys.exit(f"PEERS: there is no {', '.join(sorted(unknown))}, but {', '.join(s.name for s in SERVERS)}")
    left_out: dict[str, str] = {}
    for name in dict.fromkeys([s.environment or s.name for s in servers] + ["digits"] * everything):
        try:
            if name == "nginx":
                _nginx_version()
            else:
                install(name)
        except (NotInstalledError, FileNotFoundError) as exc:
            left_out[name] = str(exc)
    if "service" in left_out or len(CPUS) < 2:
        sys.exit(f"needed: two CPUs, and the service's own requirements. {left_out}")
    servers = [s for s in servers if (s.environment or s.name) not in left_out]
    names = {s.name for s in servers}
    fewer = min(rounds, BATCHING_ROUNDS)
    results: Results = {
        "run": {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "rounds": rounds, "seconds": seconds},
        "machine": {
            "cpu": _cpu(),
            "cpus": len(CPUS),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "versions": {n: versions(n) for n in dict.fromkeys(s.environment for s in servers if s.environment)},
        "left_out": left_out,
        "hello": measures.hello(servers, rounds, seconds),
    }
    if "nginx" in names:
        results["versions"]["nginx"] = {"nginx": _nginx_version()}
    if everything:
        pair = [s for s in servers if s.name in {"ours", "fastapi"}]
        results["start"] = measures.start(pair, rounds)
        results["memory"] = measures.memory(pair, seconds)
        results["batching"] = measures.batching(names, fewer, seconds)
        results["lone"] = measures.lone(fewer, seconds)
        results["overload"] = measures.overload(min(rounds, OVERLOAD_ROUNDS))
        results["attacks"] = measures.attacks(names)
        if "digits" not in left_out:
            results["digits"] = measures.digits(fewer, seconds)
            results["versions"]["digits"] = versions("digits")
    return results


def render(results: Results, folder: Path) -> None:
    table = markdown(results)
    (folder / "RESULTS.md").write_text(table)
    (folder / "chart.svg").write_text(svg(results))
    print(table)


def _cpu() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else platform.machine()


def _nginx_version() -> str:
    path = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if path is None:
        raise FileNotFoundError("it is not installed (Debian's package nginx)")
    return subprocess.run([path, "-v"], capture_output=True, text=True, check=True).stderr.strip().split("/")[-1]


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "run"
    if command == "render":
        render(json.loads(RESULTS.read_text()), BENCHMARKS)
        return
    if shutil.which("wrk") is None or shutil.which("taskset") is None:
        sys.exit("needed: wrk and taskset (Debian's packages wrk and util-linux)")
    if command == "soak":
        install(OURS.environment)
        print(json.dumps(measures.soak()))
    elif command == "run":
        started = time.monotonic()
        peers = {name for name in os.environ.get("PEERS", "").split(",") if name}
        results = run(peers, int(os.environ.get("ROUNDS") or 5), int(os.environ.get("SECONDS") or 3))
        folder = WORK if peers else BENCHMARKS  # a quick look does not replace the results
        folder.mkdir(exist_ok=True)
        (folder / RESULTS.name).write_text(json.dumps(results, indent=1) + "\n")
        render(results, folder)
        print(f"{time.monotonic() - started:.0f} s")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
