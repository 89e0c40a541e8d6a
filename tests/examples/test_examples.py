"""The models of examples/: by themselves, each in a process with their libraries, and served over HTTP.

Their libraries live in an environment of their own (`make examples`), so nothing of theirs is imported here.
"""

import ast
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.live.service import PROJECT, START_SECONDS, Service, is_problem, running, wait_for

PYTHON = PROJECT / ".venv-examples" / "bin" / "python"
RUN_SECONDS = 120
CLIENTS = 32

MODELS = {
    "sentiment": "examples.sentiment:SentimentModel",
    "language": "examples.language:LanguageModel",
    "digits": "examples.digits:DigitsModel",
    "digits_onnx": "examples.digits_onnx:DigitsOnnxModel",
}
DIGITS = ("digits", "digits_onnx")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

CALLS = """
import importlib, json, sys
module, class_name = sys.argv[1].split(":")
model = getattr(importlib.import_module(module), class_name)()
for line in sys.stdin:
    method, arguments = json.loads(line)
    try:
        answer = {"returned": getattr(model, method)(*arguments)}
    except Exception as exc:
        answer = {"raised": type(exc).__name__, "message": str(exc)}
    print(json.dumps(answer, allow_nan=False), flush=True)
"""

# The images that the classifier has not seen, weights of a single tree, and a file that would make a folder if run.
MATERIAL = """
import functools, json, os, sys
from skops.io import dump
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split
folder = sys.argv[1]
_, images, _, labels = train_test_split(*load_digits(return_X_y=True), random_state=0)
dump(RandomForestClassifier(1, random_state=0).fit(*load_digits(return_X_y=True)), f"{folder}/other.skops")
dump(functools.partial(os.mkdir, f"{folder}/marker"), f"{folder}/forged.skops")
print(json.dumps([images.astype(int).tolist(), labels.tolist()]))
"""

SENTENCES = [
    ("The food was great!", "positive", [0.0, 0.406, 0.594, 0.6588]),
    ("The food was great, but the service was awful.", "negative", [0.295, 0.517, 0.188, -0.3506]),
    ("DON'T BUY THIS. It broke after a day :(", "negative", [0.449, 0.551, 0.0, -0.6908]),
    ("I love you 😍", "positive", [0.0, 0.41, 0.59, 0.802]),
    ("The train leaves at nine.", "neutral", [0.0, 1.0, 0.0, 0.0]),
    (" ", "neutral", [0.0, 0.0, 0.0, 0.0]),
]

TEXTS = [
    ("Wo ist der Bahnhof?", "de"),
    ("Where is the railway station?", "en"),
    ("Où est la gare, s'il vous plaît ?", "fr"),
    ("¿Dónde está la estación de tren?", "es"),
    ("Gdzie jest dworzec kolejowy?", "pl"),
    ("Где находится вокзал?", "ru"),
    ("أين محطة القطار؟", "ar"),
    ("駅はどこですか", "ja"),
    ("火车站在哪里?", "zh"),
]


def environment(**variables: str) -> dict[str, str]:
    keep = {key: os.environ[key] for key in ("PATH", "LANG", "HOME") if key in os.environ}
    return {**keep, "PYTHONPATH": str(PROJECT), **variables}


def run(*arguments: object, **variables: str) -> str:
    """What a program of the examples' environment prints; it must succeed, without a warning."""
    done = subprocess.run(
        [PYTHON, *map(str, arguments)],
        env=environment(**ONE_THREAD, **variables),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class Child:
    """One example's model in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def answer(self, method: str, *arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([method, arguments]) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def call(self, method: str, *arguments: Any) -> Any:
        answer = self.answer(method, *arguments)
        assert "returned" in answer, answer
        return answer["returned"]


@contextlib.contextmanager
def child(name: str, **variables: str) -> Iterator[Child]:
    process = subprocess.Popen(
        [PYTHON, "-c", CALLS, MODELS[name]],
        env=environment(**ONE_THREAD, **variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Child(process)
    assert process.returncode == 0


def serving(folder: Path, *models: str, **variables: str) -> contextlib.AbstractContextManager[Service]:
    """The service with these models, each at the path of its name."""
    return running(folder, python=PYTHON, MODELS=served(*models), **variables)


def failed_start(folder: Path, *models: str, **variables: Any) -> str:
    """What the service says on stderr where it does not start with these models."""
    service = Service(folder, python=PYTHON, MODELS=served(*models), **variables)
    try:
        assert service.process.wait(START_SECONDS) == 1
    finally:
        service.kill()
    return service.stderr


def served(*models: str) -> str:
    return ",".join(f"{name}={MODELS[name]}" for name in models)


def post(service: Service, path: str, body: Any) -> Any:
    answer = service.post(path, body)
    assert answer.status == 200, answer
    return answer.json


@pytest.fixture(scope="session", autouse=True)
def libraries() -> None:
    """What the examples need is installed: CI must have it, elsewhere these tests are left out."""
    if not PYTHON.exists():
        words = "the examples' libraries are not installed: run make examples"
        if "CI" in os.environ:
            pytest.fail(words)
        pytest.skip(words)


@pytest.fixture(scope="session")
def weights(libraries: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables that say where weights are, made by the two programs that users make them with."""
    folder = tmp_path_factory.mktemp("weights") / "new"
    paths = {"DIGITS_WEIGHTS": str(folder / "digits.skops"), "DIGITS_ONNX": str(folder / "digits.onnx")}
    printed = run("-m", "examples.train_digits", **paths)
    assert printed == f"{folder}/digits.skops: 97.6% of 450 images that it has not seen are read right\n"
    assert run("-m", "examples.export_digits_onnx", **paths) == f"{folder}/digits.onnx\n"
    assert sorted(path.name for path in folder.iterdir()) == ["digits.onnx", "digits.skops"]
    return paths


@pytest.fixture(scope="session")
def material(libraries: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights other than the trained ones, and the images that the classifier has not seen."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "images.json").write_text(run("-c", MATERIAL, folder))
    return folder


@pytest.fixture(scope="session")
def held_out(material: Path) -> tuple[list[list[int]], list[int]]:
    """The images that the classifier was not trained on, and the digits that they show."""
    images, labels = json.loads((material / "images.json").read_text())
    assert len(images) == len(labels) == 450
    return images, labels


@pytest.fixture(scope="session")
def sentiment(libraries: None) -> Iterator[Child]:
    with child("sentiment") as model:
        model.call("load")
        yield model


@pytest.fixture(scope="session")
def language(libraries: None) -> Iterator[Child]:
    with child("language") as model:
        model.call("load")
        yield model


@pytest.fixture(scope="session")
def digits(weights: dict[str, str]) -> Iterator[Child]:
    with child("digits", **weights) as model:
        model.call("load")
        yield model


@pytest.fixture(scope="session")
def digits_onnx(weights: dict[str, str]) -> Iterator[Child]:
    with child("digits_onnx", **weights) as model:
        model.call("load")
        yield model


@pytest.fixture(scope="module")
def service(weights: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """All four in one service, loaded before the fork."""
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, *MODELS, WEB_CONCURRENCY="2", **ONE_THREAD, **weights) as service:
        yield service
    assert {line["level"] for line in service.log()} == {"INFO"}
    assert not service.stderr


# By themselves.


def test_the_locks_fit_together() -> None:
    """What a list asks for is locked with hashes, and every package has one version in all locks and the service's."""
    locks = sorted((PROJECT / "examples" / "requirements").glob("*.txt"))
    assert [lock.stem for lock in locks] == ["digits", "export", "language", "onnx", "sentiment"]
    pinned: dict[str, set[str]] = {}
    for lock in [PROJECT / "requirements.txt", *locks]:
        text = lock.read_text()
        pins = re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:", text, re.MULTILINE)
        assert len(pins) == text.count("==")
        wanted = re.findall(r"^[\w-]+", lock.with_suffix(".in").read_text(), re.MULTILINE)
        assert {name.lower() for name in wanted if name != "-c"} <= {name for name, _ in pins}
        for name, version in pins:
            pinned.setdefault(name, set()).add(version)
    assert not {name: versions for name, versions in pinned.items() if len(versions) > 1}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_needs_nothing_of_this_project(name: str) -> None:
    """It imports its libraries, msgspec for bounds, and the standard library."""
    tree = ast.parse((PROJECT / "examples" / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    packages = {str(module).partition(".")[0] for module in imported} - sys.stdlib_module_names
    assert packages <= {"msgspec", "numpy", "onnxruntime", "py3langid", "skops", "vaderSentiment"}


@pytest.mark.parametrize(("text", "label", "scores"), SENTENCES)
def test_sentiment(sentiment: Child, text: str, label: str, scores: list[float]) -> None:
    """A sentence has a label and the four scores of VADER."""
    names = ("negative", "neutral", "positive", "compound")
    assert sentiment.call("predict", text) == {"label": label, "scores": dict(zip(names, scores, strict=True))}


@settings(deadline=None)
@given(text=st.text(min_size=1, max_size=280))
def test_every_text_has_a_sentiment(sentiment: Child, text: str) -> None:
    """No text makes it fail, its shares are shares, and the label is the compound score's."""
    prediction = sentiment.call("predict", text)
    scores = prediction["scores"]
    compound = scores.pop("compound")
    assert -1 <= compound <= 1
    assert sum(scores.values()) == pytest.approx(1, abs=0.002) or scores == dict.fromkeys(scores, 0.0)
    expected = "positive" if compound >= 0.05 else "negative" if compound <= -0.05 else "neutral"
    assert prediction["label"] == expected


@pytest.mark.parametrize(("text", "label"), TEXTS)
def test_language(language: Child, text: str, label: str) -> None:
    """A sentence is in its language, with a probability far above chance."""
    prediction = language.call("predict", text)
    assert prediction["label"] == label
    assert 0.5 < prediction["probability"] <= 1


@pytest.mark.parametrize("text", ["1234", "?!", " ", "😍", "\x00"])
def test_a_text_without_letters_is_in_no_language(language: Child, text: str) -> None:
    """It is refused as unfit, not called some language."""
    message = "There is no letter in the text, so it is in no language."
    assert language.answer("predict", text) == {"raised": "ValueError", "message": message}


@settings(deadline=None)
@given(text=st.text(min_size=1, max_size=1000).filter(lambda text: any(map(str.isalpha, text))))
def test_every_text_with_letters_has_a_language(language: Child, text: str) -> None:
    """No text makes it fail, and a probability is one."""
    prediction = language.call("predict", text)
    assert prediction["label"].islower()
    assert 0 <= prediction["probability"] <= 1


@pytest.mark.parametrize("name", DIGITS)
def test_digits(name: str, request: pytest.FixtureRequest, held_out: tuple[list[list[int]], list[int]]) -> None:
    """Nineteen in twenty unseen images are read right, alone or in a batch; the label is the most probable digit."""
    model: Child = request.getfixturevalue(name)
    images, labels = held_out
    predictions = model.call("predict_batch", images)
    assert [model.call("predict", image) for image in images[:10]] == predictions[:10]
    read_right = sum(p["label"] == label for p, label in zip(predictions, labels, strict=True))
    assert read_right >= 0.95 * len(labels)
    for prediction in predictions:
        probabilities = prediction["probabilities"]
        assert len(probabilities) == 10
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities[prediction["label"]] == max(probabilities)


def test_onnx_says_what_scikit_learn_says(
    digits: Child, digits_onnx: Child, held_out: tuple[list[list[int]], list[int]]
) -> None:
    """The exported classifier is the same one, to the precision of its 32-bit numbers."""
    images, _ = held_out
    ours, theirs = digits.call("predict_batch", images), digits_onnx.call("predict_batch", images)
    for one, other in zip(ours, theirs, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-6)
        top, second = sorted(one["probabilities"])[:-3:-1]
        assert one["label"] == other["label"] or top - second < 2e-6


def test_weights_of_another_type_are_refused(material: Path, tmp_path: Path) -> None:
    """A weights file that holds a function, or is no skops file, is not loaded; nothing out of it runs."""
    path = tmp_path / "digits.skops"
    shutil.copy(material / "forged.skops", path)
    with child("digits", DIGITS_WEIGHTS=str(path)) as model:
        answer = model.answer("load")
        assert answer["raised"] == "UntrustedTypesFoundException"
        assert "posix.mkdir" in answer["message"]
        path.write_bytes(b"\x80\x04.")
        assert model.answer("load")["raised"] == "BadZipFile"
        path.unlink()
        message = f"{path} is not there: make it with python -m examples.train_digits"
        assert model.answer("load") == {"raised": "FileNotFoundError", "message": message}
    assert not (material / "marker").exists()


# Over HTTP.


def documented() -> Iterator[tuple[str, str, str]]:
    """The name of the model, the body and the answer of each request in examples/README.md."""
    name = ""
    lines = (PROJECT / "examples" / "README.md").read_text().splitlines()
    for line, following in itertools.pairwise(lines):
        if started := re.search(r"MODELS=predict=examples\.(\w+):", line):
            name = started[1]
        elif sent := re.fullmatch(r"\$ curl -s localhost:8000/predict -H '[^']+' -d '(.+)'", line):
            yield name, sent[1], following


@pytest.mark.parametrize(("name", "body", "expected"), list(documented()))
def test_what_the_readme_shows(service: Service, name: str, body: str, expected: str) -> None:
    """Every answer in it is, to the byte, what the service says, but for the request's id."""
    answer = service.post(f"/{name}", body.encode()).body.decode()
    without_id = (re.sub(r'"request_id":"[0-9a-f]{32}"', "", text) for text in (answer, expected))
    assert next(without_id) == next(without_id)


@pytest.mark.parametrize(("text", "label", "scores"), SENTENCES)
def test_sentiment_over_http(service: Service, text: str, label: str, scores: list[float]) -> None:
    """The answer is structured as the annotation says, and names the model."""
    names = ("negative", "neutral", "positive", "compound")
    answer = service.post("/sentiment", {"text": text})
    prediction = {"label": label, "scores": dict(zip(names, scores, strict=True))}
    assert (answer.status, answer.headers["x-model"]) == (200, "vader-sentiment/1.0.0")
    assert answer.json == {"input": text, "prediction": prediction}


def test_languages_over_http(service: Service) -> None:
    """An array of texts is answered in its order."""
    answers = post(service, "/language", [{"text": text} for text, _ in TEXTS])
    assert [(answer["input"], answer["prediction"]["label"]) for answer in answers] == TEXTS


def test_a_text_without_letters_over_http(service: Service) -> None:
    """What the model refuses is the client's fault, in the model's words."""
    answer = service.post("/language", {"text": "1234"})
    assert is_problem(answer, 422)
    message = "There is no letter in the text, so it is in no language."
    assert answer.json["errors"] == [{"pointer": "", "detail": message}]


@pytest.mark.parametrize("name", DIGITS)
def test_digits_over_http(
    name: str, service: Service, request: pytest.FixtureRequest, held_out: tuple[list[list[int]], list[int]]
) -> None:
    """All unseen images in one request get what the model says without HTTP, in their order, echoed as sent."""
    images, _ = held_out
    model: Child = request.getfixturevalue(name)
    predictions = model.call("predict_batch", images)
    expected = [{"input": i, "prediction": p} for i, p in zip(images, predictions, strict=True)]
    assert post(service, f"/{name}", [{"pixels": image} for image in images]) == expected


@pytest.mark.parametrize("name", DIGITS)
def test_each_client_gets_its_own_digit(
    name: str, service: Service, request: pytest.FixtureRequest, held_out: tuple[list[list[int]], list[int]]
) -> None:
    """Many clients at once with an image each get what the model says of theirs, although the model runs batches."""
    images, _ = held_out
    model: Child = request.getfixturevalue(name)
    predictions = model.call("predict_batch", images)
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda image: post(service, f"/{name}", {"pixels": image}), images))
    assert [answer["input"] for answer in answers] == images
    assert [answer["prediction"] for answer in answers] == predictions


@pytest.mark.parametrize("name", DIGITS)
@pytest.mark.parametrize(
    ("pixels", "pointer"),
    [
        ([0] * 63, "/pixels"),
        ([0] * 65, "/pixels"),
        ([], "/pixels"),
        ("0" * 64, "/pixels"),
        ([0] * 63 + [17], "/pixels/63"),
        ([-1] + [0] * 63, "/pixels/0"),
        ([0, 0, 1.5] + [0] * 61, "/pixels/2"),
        ([0, True] + [0] * 62, "/pixels/1"),
        ([None] * 64, "/pixels/0"),
    ],
    ids=str,
)
def test_what_is_no_image(name: str, service: Service, pixels: object, pointer: str) -> None:
    """The bounds of the annotation are the service's: an image is 64 whole numbers from 0 to 16."""
    answer = service.post(f"/{name}", {"pixels": pixels})
    assert is_problem(answer, 422)
    assert [error["pointer"] for error in answer.json["errors"]] == [pointer]


def test_the_document_says_what_the_models_take_and_give(service: Service) -> None:
    """Bounds and structured answers of the annotations stand in the OpenAPI document."""
    schemas = service.get("/openapi.json").json["components"]["schemas"]
    pixels = schemas["digits_input"]["properties"]["pixels"]
    assert (pixels["minItems"], pixels["maxItems"], len(pixels["examples"][0])) == (64, 64, 64)
    assert (pixels["items"]["minimum"], pixels["items"]["maximum"]) == (0, 16)
    assert schemas["Sentiment"]["properties"]["label"]["enum"] == ["negative", "neutral", "positive"]
    assert set(schemas["Scores"]["required"]) == {"negative", "neutral", "positive", "compound"}
    assert schemas["Language"]["properties"]["probability"]["maximum"] == 1


def test_no_weights_no_start(tmp_path: Path) -> None:
    """Without its weights the service does not start, and says in one line which file is missing and how to make it."""
    missing = tmp_path / "missing"
    told = failed_start(tmp_path, "digits_onnx", DIGITS_ONNX=str(missing))
    assert told.split("\n\n") == [
        f"\nError: MODELS: digits_onnx={MODELS['digits_onnx']}: load() failed: FileNotFoundError: "
        f"{missing} is not there: make it with python -m examples.export_digits_onnx",
        "",
    ]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one CPU, libraries start no thread pools")
def test_libraries_that_start_threads_are_not_forked(weights: dict[str, str], tmp_path: Path) -> None:
    """PRELOAD=true refuses a library that starts threads and names what helps; with PRELOAD=false it works."""
    variables = {"OMP_NUM_THREADS": "2", **weights}
    told = failed_start(tmp_path, "digits", **variables)
    assert "PRELOAD=false" in told
    assert "OMP_NUM_THREADS=1" in told
    with serving(tmp_path, "digits", PRELOAD="false", **variables) as service:
        assert len(post(service, "/digits", {"pixels": [0] * 64})["prediction"]["probabilities"]) == 10


def test_new_weights_at_reload(weights: dict[str, str], material: Path, tmp_path: Path) -> None:
    """After SIGHUP the weights that now lie in the file are served, with no request lost on the way."""
    path = tmp_path / "digits.skops"
    shutil.copy(weights["DIGITS_WEIGHTS"], path)
    with serving(tmp_path, "digits", DIGITS_WEIGHTS=str(path), **ONE_THREAD) as service:

        def is_certain() -> bool:
            probabilities = post(service, "/digits", {"pixels": [0] * 64})["prediction"]["probabilities"]
            return bool(max(probabilities) == 1)  # as a single tree is, and a forest of 100 is not about nothing

        assert not any(is_certain() for _ in range(20))
        (material / "other.skops").rename(path)
        assert not any(is_certain() for _ in range(20))
        service.signal(signal.SIGHUP)
        wait_for(lambda: all(is_certain() for _ in range(20)), START_SECONDS)
