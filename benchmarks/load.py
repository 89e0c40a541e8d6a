"""The load: wrk for closed loops, a small asyncio client for a given rate."""

import asyncio
import contextlib
import json
import subprocess
import time
from dataclasses import dataclass, field

from benchmarks.servers import LOAD_CPU, Running

SCRIPT = """
wrk.method, wrk.body = "POST", [==[{body}]==]
wrk.headers["Content-Type"] = "application/json"
function done(summary, latency)
    local e = summary.errors
    print(string.format('RESULT {{"requests": %d, "us": %d, "p50": %f, "p99": %f, "errors": %d}}', summary.requests,
        summary.duration, latency:percentile(50), latency:percentile(99),
        e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class Sample:
    """One round of wrk."""

    rate: float  # requests a second
    p50_ms: float
    p99_ms: float
    requests: int = 0


def wrk(target: Running, connections: int, seconds: int) -> Sample:
    """Keep-alive connections that ask again as soon as they are answered; raises RuntimeError for any error."""
    script = target.folder / "request.lua"
    script.write_text(SCRIPT.format(body=json.dumps(target.server.body)))
    url = f"http://127.0.0.1:{target.port}{target.server.path}"
    command = [*("taskset", "--cpu-list", str(LOAD_CPU), "wrk", "--threads", "1", "--timeout", "20s")]
    command += [*("--connections", str(connections), "--duration", f"{seconds}s", "--script", str(script), url)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    if result["errors"] or "Non-2xx" in output or not result["requests"]:
        raise RuntimeError(f"{target.server.name} at {connections} connections:\n{output}")
    rate = result["requests"] / result["us"] * 1e6
    return Sample(rate, result["p50"] / 1000, result["p99"] / 1000, result["requests"])


@dataclass
class Seen:
    """What came of a given rate: when good answers came, how long it took to be refused, and to ask /health."""

    good_at: list[float] = field(default_factory=list)  # seconds after the start
    refused_ms: list[float] = field(default_factory=list)  # how long it took to hear it
    failed: int = 0
    health_ms: list[float] = field(default_factory=list)


HEALTH_EVERY_SECONDS = 0.01


def post_head(path: str, length: int) -> bytes:
    """The head of a POST whose body has so many bytes."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


class _Client:
    def __init__(self, port: int, request: bytes) -> None:
        self.port, self.request = port, request
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self) -> int:
        """One request on an idle connection, or on a new one; returns the status."""
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(self.request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        if b"connection: close" in head:
            writer.close()
        else:
            self.idle.append((reader, writer))
        return int(head[9:12])


def at_rate(target: Running, rate: float, seconds: float) -> Seen:
    """Send so many requests a second, answered or not, while another connection polls /health."""
    return asyncio.run(_at_rate(target, rate, seconds))


async def _at_rate(target: Running, rate: float, seconds: float) -> Seen:
    body = json.dumps(target.server.body).encode()
    client = _Client(target.port, post_head(target.server.path, len(body)) + body)
    prober = _Client(target.port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    seen, started = Seen(), time.perf_counter()

    async def one() -> None:
        asked = time.perf_counter()
        try:
            status = await client.ask()
        except (OSError, asyncio.IncompleteReadError):
            seen.failed += 1
            return
        if status == 200:
            seen.good_at.append(time.perf_counter() - started)
        elif status == 503:
            seen.refused_ms.append((time.perf_counter() - asked) * 1000)
        else:
            seen.failed += 1

    async def probe() -> None:
        while True:
            asked = time.perf_counter()
            if await prober.ask() != 200:
                seen.failed += 1
            seen.health_ms.append((time.perf_counter() - asked) * 1000)
            await asyncio.sleep(HEALTH_EVERY_SECONDS)

    probing = asyncio.create_task(probe())
    sent: set[asyncio.Task[None]] = set()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
        task = asyncio.create_task(one())
        sent.add(task)
        task.add_done_callback(sent.discard)
    await asyncio.wait_for(asyncio.gather(*sent), 60)
    probing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await probing
    return seen
