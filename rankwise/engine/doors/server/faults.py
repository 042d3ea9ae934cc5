"""Errors as OpenAI's API shapes them: `{"error": {"message", "type", "param", "code"}}`."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from rankwise.errors import RankwiseError

SHOWN = 300  # characters of a message; what a client sent is not sent back to it at any length
NO_NAME = re.compile(r"\W")  # pydantic's names for members of a union: list[int], constrained-str …
UNION = ("str", "int", "float", "bool")
PARTS = {"message": "string", "type": "string", "param": ["string", "null"], "code": ["string", "null"]}
SHAPE = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": list(PARTS),
            "properties": {name: {"type": kind} for name, kind in PARTS.items()},
        }
    },
}  # a JSON schema of what `Fault.body` gives


class Fault(Exception):
    """Why a request got no answer.

    Args:
        status: of HTTP.
        message: for people.
        kind: OpenAI's `type`.
        param: the field that is at fault, if one is.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message[:SHOWN], kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """As a whole answer. Escaped to ASCII, so that a client's broken characters cannot break it."""
        return Response(json.dumps(self.body()), self.status, self.headers, media_type="application/json")


def of_engine(error: Exception) -> Fault:
    """The engine failed; whoever runs the server finds the trace in its log."""
    message = f"the engine failed ({type(error).__name__}); the server's log says more"
    return Fault(500, message, kind="server_error", code="engine_failed")


def unavailable(message: str, code: str) -> Fault:
    """The server takes no requests, now or any more."""
    return Fault(503, message, kind="service_unavailable_error", code=code)


def timed_out(seconds: float) -> Fault:
    """A request took longer than it may."""
    return Fault(504, f"the request took longer than {seconds:g} s", kind="timeout_error", code="request_timeout")


def of_input(error: RankwiseError) -> Fault:
    """What the library refused."""
    return Fault(400, str(error), param=error.field, code="invalid_value")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Fault:
    """One of pydantic's complaints about a body: of a union's the one that its right member has, else the first."""
    same = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    first = next((error for error in same if not error["type"].endswith("_type")), errors[0])
    named = first.get("ctx", {}).get("param")
    param = _path([*first["loc"][1:], *([named] if named else [])])
    kind = first["type"]
    if kind in ("json_invalid", "model_attributes_type", "model_type", "dict_type") and not param:
        return Fault(400, "the body must be one JSON object, sent as application/json", code="invalid_json")
    if kind == "extra_forbidden":
        return Fault(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if kind == "missing":
        code = "missing_required_parameter" if param else "invalid_json"
        return Fault(400, f"{param or 'body'}: missing", param=param, code=code)
    return Fault(400, f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value")


def _path(parts: Sequence[str | int]) -> str | None:
    """`messages[0].content` from `("messages", 0, "content", "str")`."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]" if path else ""
        elif not path or not (part in UNION or NO_NAME.search(part)):
            path += f".{part}" if path else part
    return path[:SHOWN] or None
