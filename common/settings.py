"""Settings of a service: one frozen pydantic model, read once from flags and BATON_ variables."""

import argparse
import os
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

ENV_PREFIX = "BATON_"
M = TypeVar("M", bound=BaseModel)


class ServiceSettings(BaseModel):
    """What every service is told. Field names are the flags and the BATON_ variables; a field
    without a description works like the others, but no user is told of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 for all, as in a container"
    )
    port: int = Field(0, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log lines shown"
    )
    otlp_endpoint: str | None = Field(
        None, description="export traces by OTLP/gRPC to this URL; unset: keep them in memory"
    )
    drain_s: float = Field(
        30.0, ge=0, le=3600, description="seconds that requests get to finish after SIGTERM"
    )
    exit_with_parent: bool = Field(False, description="end when the parent process dies (Linux)")


def read_settings(
    model: type[M],
    argv: list[str] | None,
    prog: str,
    description: str = "",
    environ: Mapping[str, str] | None = None,
) -> M:
    """Flags first, then BATON_ variables, then the defaults of the model.

    Field `max_bytes` is the flag `--max-bytes` and the variable `BATON_MAX_BYTES`; an empty
    variable counts as unset. A value that does not fit prints one line and raises SystemExit(2).
    """
    environ = os.environ if environ is None else environ
    parser = _parser(model, prog, description)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    values: dict[str, Any] = {}
    for name in model.model_fields:
        from_env = environ.get(ENV_PREFIX + name.upper())
        if name in given:
            values[name] = given[name]
        elif from_env:
            values[name] = from_env
    try:
        return model.model_validate(values)
    except ValidationError as error:
        _refuse(prog, error)


def _parser(model: type[BaseModel], prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description or (model.__doc__ or "").strip().splitlines()[0],
        epilog="Each flag can also be set by a variable: --some-flag by BATON_SOME_FLAG.",
        allow_abbrev=False,
    )
    for name, info in model.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if _is_bool(info):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, dest=name, action=action, default=None, help=_help(info))
        else:
            metavar = name.rpartition("_")[2].upper()
            parser.add_argument(flag, dest=name, default=None, metavar=metavar, help=_help(info))
    return parser


def _is_bool(info: FieldInfo) -> bool:
    kind = info.annotation
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return bool in typing.get_args(kind)
    return kind is bool


def _help(info: FieldInfo) -> str:
    if info.description is None:
        return argparse.SUPPRESS
    if info.is_required():
        note = " (required)"
    elif info.default in (None, ""):
        note = ""
    else:
        note = f" (default: {info.default})"
    return info.description.replace("%", "%%") + note.replace("%", "%%")


def _refuse(prog: str, error: ValidationError) -> NoReturn:
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        shown = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
        flag = "--" + name.replace("_", "-")
        print(f"{prog}: error: {flag}: {problem['msg']}{shown}", file=sys.stderr)
    raise SystemExit(2)
