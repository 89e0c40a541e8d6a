"""Problem details, and which request ids are taken over."""

import json
import re
from http import HTTPStatus
from typing import Any

import pytest

from inference_api import problems


def test_a_problem_is_exactly_this() -> None:
    """The members and their order are part of the contract."""
    assert problems.problem(404, "There is nothing here.", "abc") == (
        b'{"type":"about:blank","title":"Not Found","status":404,"detail":"There is nothing here.","request_id":"abc"}'
    )


def test_errors_stand_at_the_end() -> None:
    """Bad input is told by pointer, and by words."""
    body = problems.problem(422, "No.", "abc", problems.FieldError("/numbers/1", "Expected `int`"))
    assert body.endswith(b',"request_id":"abc","errors":[{"pointer":"/numbers/1","detail":"Expected `int`"}]}')
    assert list(json.loads(body)) == ["type", "title", "status", "detail", "request_id", "errors"]


@pytest.mark.parametrize(
    ("status", "title"),
    [
        (400, "Bad Request"),
        (408, "Request Timeout"),
        (413, "Content Too Large"),
        (414, "URI Too Long"),
        (415, "Unsupported Media Type"),
        (422, "Unprocessable Content"),
        (431, "Request Header Fields Too Large"),
        (503, "Service Unavailable"),
        (504, "Gateway Timeout"),
    ],
)
def test_titles_are_those_of_rfc_9110(status: int, title: str) -> None:
    """Python's phrases are partly those of earlier RFCs."""
    assert problems.title(status) == title


def test_every_error_status_has_a_title() -> None:
    """No status can break the answer that tells of it."""
    assert all(problems.title(status) for status in HTTPStatus if status >= 400)


@pytest.mark.parametrize("sent", ["a", "A-Z_09.z", "x" * 64, "1", "..", "-"])
def test_a_fit_request_id_is_taken_over(sent: str) -> None:
    """1 to 64 letters, digits, dots, underscores and hyphens come back as sent."""
    assert problems.request_id({"HTTP_X_REQUEST_ID": sent}) == sent


@pytest.mark.parametrize(
    "sent",
    [None, "", "x" * 65, "x" * 8192, "a b", "a\n", "a\r\nb", "\x1b[31m", "a\x85", "é", "a,b", "a/b", 'a"', "\ud800"],
)
def test_an_unfit_request_id_is_replaced(sent: str | None) -> None:
    """What could break a header or a log line never gets there."""
    made = problems.request_id({} if sent is None else {"HTTP_X_REQUEST_ID": sent})
    assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_made_request_ids_differ() -> None:
    """Each request gets an id of its own."""
    assert len({problems.request_id({}) for _ in range(1000)}) == 1000


def test_a_request_keeps_its_id() -> None:
    """The same one each time it is asked for, and the server's where it has given one."""
    environ: dict[str, Any] = {}
    made = problems.request_id(environ)
    assert problems.request_id(environ) == made == environ["inference_api.request_id"]
    assert problems.request_id({"HTTP_X_REQUEST_ID": "sent", "inference_api.request_id": "given"}) == "given"
