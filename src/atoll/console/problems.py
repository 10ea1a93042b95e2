"""What the API answers instead of what was asked for, as its document (/openapi.json) says it of every route."""

from typing import Any

from atoll.spec.document import Document


class Fault(Document):
    """An error in its own words: its class in `atoll.errors`, a sentence, and what the command line ends with."""

    type: str
    message: str
    exit_code: int


class Problem(Document):
    error: Fault


_WORDS = {
    400: "The request cannot be read.",
    401: "The token is missing, wrong or over.",
    403: "A rule, a token's scope or the Host header refuses it.",
    404: "A name that nothing answers to.",
    411: "The body's length is not stated.",
    413: "The body is too long.",
    422: "A field is wrong; the message names it.",
    500: "What was asked for has failed, as a task or a file did.",
    503: "It cannot be done now; try again.",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": words} for status, words in _WORDS.items()
}
