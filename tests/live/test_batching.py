"""Batching in the running service: shared batches, answers that are never someone else's, and failures."""

import contextlib
import itertools
import json
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.live.service import (
    WAIT_SECONDS,
    Answer,
    Service,
    has_no_live_child,
    is_problem,
    next_answer,
    running,
    wait_for,
)

MODELS = r"""
import locale, os, pathlib, resource, threading, time

BATCHES = pathlib.Path(__file__).with_name("batches")

def wait_for(path):
    while not pathlib.Path(path).exists():
        time.sleep(0.01)

class Batching:
    name, version = "batching", "1.0.0"

    def answer(self, text):
        if text.startswith("unfit"):
            raise ValueError(f"refused: {text}")
        if text.startswith("broken"):
            raise RuntimeError("in confidence")
        if text.startswith("nan"):
            return float("nan")
        if text.startswith("wait:"):
            wait_for(text.removeprefix("wait:"))
        if text == "abort":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.abort()
        if text == "fork":
            os.fork()
        if text == "odd":
            print("printed by the model")
            locale.setlocale(locale.LC_ALL, "C")
            if child := os.fork():
                os.waitpid(child, 0)
            else:
                os._exit(0)
        return f"of {text}"

    def predict(self, text: str) -> str | float:
        return self.answer(text)

    def predict_batch(self, inputs):
        with BATCHES.open("a") as file:
            file.write("".join(f"{text} " for text in inputs) + "\n")
        time.sleep(0.002)
        outputs = [self.answer(text) for text in inputs]
        return outputs[1:] if "short" in inputs else outputs

class Crowd:
    name, version = "crowd", "1.0.0"

    def __init__(self):
        self.inside, self.lock = 0, threading.Lock()

    def predict(self, text: str) -> int:
        with self.lock:
            self.inside += 1
        time.sleep(0.2)
        most = self.inside
        with self.lock:
            self.inside -= 1
        return most

class Alone(Crowd):
    name, thread_safe = "alone", False
"""
SERVED = "predict=models:Batching,also=models:Batching,crowd=models:Crowd,alone=models:Alone"
BATCH_SIZE = 8
REQUEST_TIMEOUT = 2
TIMEOUT = 2

CLIENT_THREADS = 16
CLIENTS_PER_THREAD = 20
ROUNDS = 6


def counted(service: Service, name: str) -> float:
    return service.metrics().get(f'{name}{{model="batching"}}', 0.0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("batching"), MODELS, MODELS=SERVED, MAX_BATCH_SIZE=str(BATCH_SIZE)) as service:
        yield service


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Three threads, two seconds."""
    with running(
        tmp_path_factory.mktemp("impatient"),
        MODELS,
        MODELS=SERVED,
        MAX_BATCH_SIZE="4",
        THREADS="3",
        REQUEST_TIMEOUT=str(REQUEST_TIMEOUT),
        TIMEOUT=str(TIMEOUT),
    ) as service:
        yield service


class Client:
    """A keep-alive connection on which requests are sent without waiting for their answers."""

    def __init__(self, service: Service) -> None:
        self._socket = service.connect()
        self._received = b""

    def send(self, body: Any, path: str = "/predict") -> None:
        data = json.dumps(body).encode()
        self._socket.sendall(
            b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(data), data)
        )

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def answer(self) -> Answer:
        while True:
            head, end, rest = self._received.partition(b"\r\n\r\n")
            if end:
                (length,) = [
                    int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")
                ]
                if len(rest) >= length:
                    answer, self._received = next_answer(self._received)
                    return answer
            data = self._socket.recv(65_536)
            assert data, self._received
            self._received += data

    def is_closed(self) -> bool:
        """Waits until the server says something; whether that is its end."""
        with contextlib.suppress(ConnectionResetError):
            return not self._socket.recv(1)
        return True

    def close(self) -> None:
        self._socket.close()


def together(service: Service, bodies: Sequence[Any], path: str = "/predict") -> list[Answer]:
    """The answers to requests that are all there before any of them is answered, as far as the service is slow."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Client(service))) for _ in bodies]
        for client, body in zip(clients, bodies, strict=True):
            client.send(body, path)
        return [client.answer() for client in clients]


@contextlib.contextmanager
def held_up(service: Service, name: str) -> Iterator[Path]:
    """A batch is in the model and stays there until this ends, or the file that is given is made."""
    gate = service.folder / name
    with contextlib.closing(Client(service)) as first:
        first.send({"text": f"wait:{gate}"})
        service.wait_for_metric("requests_in_flight", 1)
        yield gate
        gate.touch()
        first.answer()


def batches(service: Service) -> list[list[str]]:
    """The inputs of every call of predict_batch so far."""
    return [line.split() for line in (service.folder / "batches").read_text().splitlines()]


def is_answer_to(text: str, answer: Answer) -> bool:
    """Whether a client that sent this text got what is due to it, and nothing of another."""
    if text.startswith("unfit"):
        return is_problem(answer, 422) and answer.json["errors"] == [{"pointer": "", "detail": f"refused: {text}"}]
    if text.startswith(("broken", "nan")):
        return is_problem(answer, 500) and b"confidence" not in answer.body
    return answer.status == 200 and answer.json == {"input": text, "prediction": f"of {text}"}


def due(inputs: list[dict[str, str]]) -> list[dict[str, str]]:
    """What an array of good inputs is answered with."""
    return [{"input": one["text"], "prediction": f"of {one['text']}"} for one in inputs]


def test_hundreds_of_clients_each_get_their_own_answer(service: Service) -> None:
    """320 clients at once, every text sent once, some arrays, some poison, two models: no answer is wrong."""
    numbers = itertools.count()
    calls, inputs = counted(service, "batch_size_count"), counted(service, "predictions_total")

    def text() -> str:
        number = next(numbers)
        kind = {7: "unfit", 11: "broken", 13: "nan", 17: "short"}.get(number % 101, "text")
        return f"{kind}-{number}" if kind != "short" else "short"

    def client(_: int) -> list[tuple[Any, Answer]]:
        found = []
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(contextlib.closing(Client(service))) for _ in range(CLIENTS_PER_THREAD)]
            for _ in range(ROUNDS):
                bodies: list[Any] = [{"text": text()} for _ in clients]
                bodies[0] = [{"text": f"array-{next(numbers)}"} for _ in range(3)]
                for one, body, path in zip(clients, bodies, itertools.cycle(["/predict", "/predict", "/also"])):
                    one.send(body, path)
                found += [(body, one.answer()) for one, body in zip(clients, bodies, strict=True)]
        return found

    with ThreadPoolExecutor(CLIENT_THREADS) as executor:
        found = list(itertools.chain.from_iterable(executor.map(client, range(CLIENT_THREADS))))
    assert len(found) == CLIENT_THREADS * CLIENTS_PER_THREAD * ROUNDS
    for body, answer in found:
        if isinstance(body, list):
            assert answer.json == due(body)
        else:
            assert is_answer_to(body["text"], answer), (body, answer)
    calls, inputs = counted(service, "batch_size_count") - calls, counted(service, "predictions_total") - inputs
    assert calls < inputs / 2


def lines_of(service: Service, answer: Answer) -> list[dict[str, Any]]:
    return [line for line in service.log() if line.get("request_id") == answer.headers["x-request-id"]]


def test_a_poisonous_input_fails_alone(service: Service) -> None:
    """Seven requests share a batch, three of them are bad: 422, 500 and 500; the others get 200."""
    texts = ["good-1", "unfit-2", "good-3", "broken-4", "good-5", "nan-6", "good-7"]
    with held_up(service, "poison") as gate, ThreadPoolExecutor(1) as executor:
        answers = executor.submit(together, service, [{"text": text} for text in texts])
        service.wait_for_metric("requests_in_flight", 8)
        gate.touch()
        assert [answer.status for answer in answers.result(WAIT_SECONDS)] == [200, 422, 200, 500, 200, 500, 200]
    assert all(is_answer_to(text, answer) for text, answer in zip(texts, answers.result(), strict=True))
    assert sorted(texts) in map(sorted, batches(service))
    (broken,) = [a for text, a in zip(texts, answers.result(), strict=True) if text == "broken-4"]
    wait_for(lambda: len(lines_of(service, broken)) == 2, WAIT_SECONDS)
    assert "in confidence" in str(lines_of(service, broken))


def test_the_wrong_number_of_outputs_is_nobodys_answer(service: Service) -> None:
    """`predict_batch` leaves one out: everybody gets what `predict` says."""
    texts = ["before", "short", "after"]
    with held_up(service, "short") as gate, ThreadPoolExecutor(1) as executor:
        answers = executor.submit(together, service, [{"text": text} for text in texts])
        service.wait_for_metric("requests_in_flight", 4)
        gate.touch()
        assert all(is_answer_to(text, a) for text, a in zip(texts, answers.result(WAIT_SECONDS), strict=True))
    assert service.post("/predict", {"text": "short"}).json["prediction"] == "of short"


def test_a_client_that_leaves_while_it_waits_is_not_put_into_a_batch(service: Service) -> None:
    """Its text never reaches the model; those that waited with it are answered."""
    gone = service.metrics()["requests_gone_total"]
    with held_up(service, "leaves") as gate, contextlib.closing(Client(service)) as stays:
        leaves = Client(service)
        leaves.send({"text": "leaves"})
        stays.send({"text": "stays"})
        service.wait_for_metric("requests_in_flight", 3)
        leaves.close()
        service.wait_for_metric("requests_gone_total", gone + 1)
        gate.touch()
        assert is_answer_to("stays", stays.answer())
    assert ["stays"] in batches(service)
    assert "leaves" not in itertools.chain.from_iterable(batches(service))
    wait_for(lambda: [ln["path"] for ln in service.access_lines() if ln["status"] == 499] == ["/predict"], WAIT_SECONDS)


def test_a_client_that_closes_its_half_is_answered_while_its_batch_runs(service: Service) -> None:
    """It has said all that it has to say, and still listens."""
    gate = service.folder / "half"
    with contextlib.closing(Client(service)) as client:
        client.send({"text": f"wait:{gate}"})
        service.wait_for_metric("requests_in_flight", 1)
        client.half_close()
        gate.touch()
        assert is_answer_to(f"wait:{gate}", client.answer())


def test_arrays_are_cut_up_and_come_back_whole(service: Service) -> None:
    """Far longer than MAX_BATCH_SIZE, from several clients at once, in order; one bad element fails its own array."""
    arrays = [[{"text": f"{name}-{number}"} for number in range(100)] for name in "abc"]
    arrays[1][57] = {"text": "unfit"}
    first, second, third = together(service, arrays)
    assert first.json == due(arrays[0])
    assert third.json == due(arrays[2])
    assert is_problem(second, 422)
    assert second.json["errors"] == [{"pointer": "/57", "detail": "refused: unfit"}]
    assert max(map(len, batches(service))) == BATCH_SIZE
    assert service.post("/predict", []).json == []
    longest = service.post("/predict", [{"text": str(number)} for number in range(1000)])
    assert [one["prediction"] for one in longest.json] == [f"of {number}" for number in range(1000)]


def test_a_batch_holds_up_no_other_model(service: Service) -> None:
    """While one runs and others wait for the next, another model answers; then those that wait are answered."""
    with held_up(service, "others"), contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(contextlib.closing(Client(service))) for _ in range(3)]
        for number, client in enumerate(waiting):
            client.send({"text": f"waits-{number}"})
        service.wait_for_metric("requests_in_flight", 4)
        for path in ("/crowd", "/also"):
            assert [answer.status for answer in together(service, [{"text": "x"}] * 8, path)] == [200] * 8
        (service.folder / "others").touch()
        assert all(is_answer_to(f"waits-{number}", client.answer()) for number, client in enumerate(waiting))


def test_a_batched_answer_has_the_headers_of_any_other(service: Service) -> None:
    """The good one and the refused one."""
    good = service.post("/predict", {"text": "x"}, {"X-Request-ID": "mine"})
    bad = service.post("/predict", {"text": "unfit"}, {"X-Request-ID": "mine"})
    for answer, kind in ((good, "application/json"), (bad, "application/problem+json")):
        named = {name: answer.headers[name] for name in ("content-type", "x-model", "x-request-id", "content-length")}
        length = str(len(answer.body))
        assert named == {
            "content-type": kind,
            "x-model": "batching/1.0.0",
            "x-request-id": "mine",
            "content-length": length,
        }


def test_a_stock_worker_batches_too(tmp_path: Path) -> None:
    """Every client gets its own answer from it, and batches are shared."""
    with running(tmp_path, MODELS, MODELS=SERVED, WORKER_CLASS="gthread") as service:
        texts = [*(f"text-{number}" for number in range(30)), "unfit", "broken", "short"]
        answers = together(service, [{"text": text} for text in texts])
        assert all(is_answer_to(text, answer) for text, answer in zip(texts, answers, strict=True))
        assert max(map(len, batches(service))) > 1


def test_a_model_that_prints_forks_and_changes_the_locale_serves_on(service: Service) -> None:
    """All of that within a batch."""
    answers = together(service, [{"text": "odd"}, {"text": "even"}])
    assert is_answer_to("odd", answers[0])
    assert is_answer_to("even", answers[1])
    wait_for(lambda: "printed by the model" in service.stderr, WAIT_SECONDS)
    service.log()  # is whole


def test_a_child_that_a_model_forks_serves_nobody(service: Service) -> None:
    """Where a model forks within a batch and goes on in both, there is one answer, and the child ends."""
    for _ in range(3):
        assert is_answer_to("fork", service.post("/predict", {"text": "fork"}))
    (worker,) = service.workers()

    wait_for(lambda: has_no_live_child(worker), WAIT_SECONDS)
    assert is_answer_to("next", service.post("/predict", {"text": "next"}))


@pytest.mark.parametrize(
    ("fixture", "threads"), [("service", BATCH_SIZE), ("impatient", 3)], ids=["by the model", "by THREADS"]
)
def test_threads_follow_the_batch_size_unless_they_are_set(
    fixture: str, threads: int, request: pytest.FixtureRequest
) -> None:
    """Twelve requests to a model that counts who is in it: as many as there are threads, and no more."""
    answers = together(request.getfixturevalue(fixture), [{"text": "x"}] * 12, "/crowd")
    assert max(answer.json["prediction"] for answer in answers) == threads


def test_a_model_that_is_not_thread_safe_is_called_by_one_thread_at_a_time(service: Service) -> None:
    """There are eight threads, and never two in it."""
    answers = together(service, [{"text": "x"}] * 6, "/alone")
    assert [answer.json["prediction"] for answer in answers] == [1] * 6


def test_a_batch_size_of_one_turns_batching_off(tmp_path: Path) -> None:
    """`predict_batch` is never called, arrays included, and there are two threads, as without it."""
    with running(tmp_path, MODELS, MODELS=SERVED, MAX_BATCH_SIZE="1") as service:
        texts = [f"text-{number}" for number in range(20)]
        answers = together(service, [{"text": text} for text in texts])
        assert all(is_answer_to(text, answer) for text, answer in zip(texts, answers, strict=True))
        assert len(service.post("/predict", [{"text": text} for text in texts]).json) == 20
        assert not (tmp_path / "batches").exists()
        crowd = together(service, [{"text": "x"}] * 6, "/crowd")
        assert max(answer.json["prediction"] for answer in crowd) == 2


def test_what_waits_past_its_deadline_is_not_put_into_a_batch(impatient: Service) -> None:
    """The batch that runs too long, and the one that waits behind it, get 504; the model sees only the first."""
    gate = impatient.folder / "late"
    with contextlib.closing(Client(impatient)) as runs, contextlib.closing(Client(impatient)) as waits:
        runs.send({"text": f"wait:{gate}"})
        impatient.wait_for_metric("requests_in_flight", 1)
        waits.send({"text": "too-late"})
        assert is_problem(runs.answer(), 504)
        assert is_problem(waits.answer(), 504)
        assert impatient.get("/health").status == 200
        gate.touch()
    assert is_answer_to("next", impatient.post("/predict", {"text": "next"}))
    assert "too-late" not in itertools.chain.from_iterable(batches(impatient))


def test_a_batch_that_is_stuck_for_good_costs_its_worker(impatient: Service) -> None:
    """All threads wait for it: 504 for each of their requests, and a new worker answers the next."""
    workers = impatient.workers()
    bodies = [{"text": f"wait:{impatient.folder / 'never'}"}, {"text": "behind-1"}, {"text": "behind-2"}]
    answers = together(impatient, bodies)
    assert all(is_problem(answer, 504) for answer in answers)
    wait_for(lambda: impatient.workers() not in ([], workers), REQUEST_TIMEOUT + TIMEOUT + WAIT_SECONDS)
    impatient.wait_until_ready()
    assert is_answer_to("next", impatient.post("/predict", {"text": "next"}))


def test_a_batch_that_is_stuck_is_noticed_by_one_request(tmp_path: Path) -> None:
    """Its thread is the only one for its model, however few others wait for it."""
    with running(tmp_path, MODELS, MODELS=SERVED, THREADS="8", REQUEST_TIMEOUT="1", TIMEOUT="2") as service:
        workers = service.workers()
        assert is_problem(service.post("/predict", {"text": f"wait:{tmp_path / 'never'}"}), 504)
        wait_for(lambda: service.workers() not in ([], workers), WAIT_SECONDS)
        service.wait_until_ready()
        assert is_answer_to("next", service.post("/predict", {"text": "next"}))
        assert "a batch is stuck" in [line["message"] for line in service.log()]


def test_an_abort_in_a_batch_costs_its_worker_only(impatient: Service) -> None:
    """Whoever is in it gets no answer, which is better than a wrong one; the next is answered by a new worker."""
    gate = impatient.folder / "abort"
    with contextlib.ExitStack() as stack:
        holds_up, *clients = [stack.enter_context(contextlib.closing(Client(impatient))) for _ in range(3)]
        holds_up.send({"text": f"wait:{gate}"})
        impatient.wait_for_metric("requests_in_flight", 1)
        for client, text in zip(clients, ("abort", "with-it"), strict=True):
            client.send({"text": text})
        impatient.wait_for_metric("requests_in_flight", 3)
        gate.touch()
        assert [client.is_closed() for client in clients] == [True, True]
    impatient.wait_until_ready()
    assert is_answer_to("next", impatient.post("/predict", {"text": "next"}))
    assert impatient.process.poll() is None
