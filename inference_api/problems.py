"""Problem details (RFC 9457): the body of every error, from the application and from the server below it."""

import random
import re
from http import HTTPStatus
from typing import Any

import msgspec

MEDIA_TYPE = "application/problem+json"

# Where Python's phrases are those of an earlier RFC than 9110.
_TITLES = {413: "Content Too Large", 414: "URI Too Long", 422: "Unprocessable Content"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def title(status: int) -> str:
    """The reason phrase of a status code (RFC 9110 §15)."""
    return _TITLES.get(status) or HTTPStatus(status).phrase


class FieldError(msgspec.Struct):
    """What is wrong with one place of a request's body."""

    pointer: str  # RFC 6901
    detail: str


class Problem(msgspec.Struct):
    """Problem details (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[FieldError] | msgspec.UnsetType = msgspec.UNSET


def problem(status: int, detail: str, request_id: str, *errors: FieldError) -> bytes:
    """A problem+json body."""
    members = Problem("about:blank", title(status), status, detail, request_id, list(errors) or msgspec.UNSET)
    return msgspec.json.encode(members)


def request_id(environ: dict[str, Any]) -> str:
    """The id of a WSGI request, the same one each time.

    It is the client's X-Request-ID where that is fit to be logged and echoed, else a new one of 32 hexadecimal digits.
    """
    known: str | None = environ.get("inference_api.request_id")
    if known is None:
        known = environ.get("HTTP_X_REQUEST_ID")
        if known is None or not _REQUEST_ID.fullmatch(known):
            known = random.getrandbits(128).to_bytes(16, "big").hex()
        environ["inference_api.request_id"] = known
    return known
