"""Clients that misbehave, and how long /health takes meanwhile: each attack is one way to hold on to a connection."""

import asyncio
import contextlib
import json
import multiprocessing
import resource
import socket
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from benchmarks.load import post_head
from benchmarks.servers import Running

ATTACKERS = 200
IDLE_ATTACKERS = 2_000
ATTACK_SECONDS = 15
"""More than the service's READ_TIMEOUT, which cuts attackers off."""
DRIP_SECONDS = 1.0
PROBE_EVERY_SECONDS = 0.01
PROBE_TIMEOUT_SECONDS = 5.0
SMALL_BUFFER_BYTES = 4_096

HEALTH = b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Attack:
    """Runs until the server has ended the connection."""

    title: str
    attackers: int
    run: Callable[[Running], Awaitable[None]]


async def _connected(target: Running, receive_bytes: int = 0) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", target.port))
    return sock


async def _idle(target: Running) -> None:
    with await _connected(target) as sock:
        await asyncio.get_running_loop().sock_recv(sock, 1)


async def _drip(target: Running, beginning: bytes) -> None:
    """Send the beginning of a request, and then a byte a second."""
    loop = asyncio.get_running_loop()
    with await _connected(target) as sock:
        await loop.sock_sendall(sock, beginning)
        answer = asyncio.ensure_future(loop.sock_recv(sock, 1))
        while not (await asyncio.wait([answer], timeout=DRIP_SECONDS))[0]:
            await loop.sock_sendall(sock, b"a")
        answer.result()  # an answer, the end, or a reset


async def _drip_head(target: Running) -> None:
    await _drip(target, b"POST / HTTP/1.1\r\nHost: a\r\nX-Long: ")


async def _drip_body(target: Running) -> None:
    await _drip(target, post_head(target.server.path, 1_000) + b'{"text": "')


async def _read_slowly(target: Running) -> None:
    """Ask for an answer that does not fit into the sockets' buffers, and read a byte of it a second."""
    loop = asyncio.get_running_loop()
    body = json.dumps(target.server.body).encode()
    with await _connected(target, SMALL_BUFFER_BYTES) as sock:
        await loop.sock_sendall(sock, post_head("/large", len(body)) + body)
        while await loop.sock_recv(sock, 1):
            await asyncio.sleep(DRIP_SECONDS)


async def _never_close(target: Running) -> None:
    """Every second ask for a last answer, and keep the connection."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as kept:
        while True:
            sock = kept.enter_context(await _connected(target))
            await loop.sock_sendall(sock, HEALTH % target.server.health.encode())
            await loop.sock_recv(sock, SMALL_BUFFER_BYTES)
            await asyncio.sleep(DRIP_SECONDS)


ATTACKS = {
    "idle": Attack("that send nothing", IDLE_ATTACKERS, _idle),
    "drip-head": Attack("whose headers drip, a byte a second", ATTACKERS, _drip_head),
    "drip-body": Attack("whose bodies drip", ATTACKERS, _drip_body),
    "read-slowly": Attack("that read an answer of 4 MB, a byte a second", ATTACKERS, _read_slowly),
    "never-close": Attack("that are told to close and do not", ATTACKERS, _never_close),
}


def under(attack: Attack, target: Running) -> dict[str, float]:
    """The latency of /health from the attack's beginning, and how many connections are held at the end.

    It is asked on a new connection each time.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return asyncio.run(_under(attack, target))


async def _under(attack: Attack, target: Running) -> dict[str, float]:
    before = target.descriptors()
    request = HEALTH % target.server.health.encode()
    # Whoever probes has a process of its own: the attackers keep this one busy, above all at the beginning.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as prober:
        prober.submit(_probes, target.port, request, 0.0).result()
        probing = asyncio.wrap_future(prober.submit(_probes, target.port, request, ATTACK_SECONDS))
        attackers = [asyncio.create_task(_persistent(attack, target)) for _ in range(attack.attackers)]
        seconds = await probing
        held = target.descriptors() - before
    for attacker in attackers:
        attacker.cancel()
    await asyncio.gather(*attackers, return_exceptions=True)
    quantiles = statistics.quantiles(seconds, n=100)
    return {
        "health_p50_ms": quantiles[49] * 1000,
        "health_p99_ms": quantiles[98] * 1000,
        "health_longest_ms": max(seconds) * 1000,
        "held": max(0, held),
    }


def _probes(port: int, request: bytes, for_seconds: float) -> list[float]:
    """How many seconds /health takes, asked again and again."""
    ends = time.perf_counter() + for_seconds
    seconds = []
    while (started := time.perf_counter()) < ends:
        try:
            _probe(port, request)
            seconds.append(time.perf_counter() - started)
        except OSError:
            seconds.append(PROBE_TIMEOUT_SECONDS)
        time.sleep(PROBE_EVERY_SECONDS)
    return seconds


def _probe(port: int, request: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), PROBE_TIMEOUT_SECONDS) as sock:
        sock.sendall(request)
        answer = b""
        while piece := sock.recv(SMALL_BUFFER_BYTES):
            answer += piece
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ConnectionError


async def _persistent(attack: Attack, target: Running) -> None:
    with contextlib.suppress(OSError):
        await attack.run(target)
