"""A request's body to JSON, with every way in which bytes can fail to be it answered by a 400."""

import json
import re
from typing import Any, NoReturn

from common.errors import InvalidRequest

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises InvalidRequest for bytes that are not UTF-8, broken JSON, NaN and Infinity, numbers of
    thousands of digits, nesting beyond the parser's limit, anything but an object, and strings
    with lone surrogates (which are no text).
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _broken(f"byte {error.start} is not valid UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise _broken(f"{error.msg} at {where}") from error
    except ValueError as error:
        raise _broken(str(error)) from error
    except RecursionError as error:
        raise _broken("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise _broken("it must be an object")
    if _SURROGATE_ESCAPE.search(body):
        _check_surrogates(value)
    return value


def _broken(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"the request body is not valid JSON: {what}", field="body", code="invalid_json"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_surrogates(root: dict[str, Any]) -> None:
    """Raises InvalidRequest naming the first field whose text has half a surrogate pair."""
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, list):
            stack.extend((f"{path}[{index}]", item) for index, item in enumerate(value))
        elif isinstance(value, dict):
            for key, item in value.items():
                _check_text(f"a key of {path or 'body'}", key)
                stack.append((f"{path}.{key}" if path else key, item))


def _check_text(path: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{path} holds a lone surrogate (\\u{ord(text[error.start]):04x}) at character "
            f"{error.start}; it is not Unicode text",
            field=path,
        ) from error
