"""How the settings of one run come about: defaults < file < environment < flags.

Owns that order and the words for a bad value. Which settings exist, with their types and bounds, is the
table in config.py and nothing else.
"""

import ipaddress
import json
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from tokenllm.config import CPU_RUNNING, CUDA_RUNNING, ServeConfig, accepted_keys

ENVIRONMENT_PREFIX = "TOKENLLM_"
RING_BYTES_PER_REQUEST = 1024  # a step of the whole batch, with 20 logprobs each, is half of that at most


class SettingError(Exception):
    """A setting that the server cannot start with. Its text names the setting, where it came from and its value."""


class Given(NamedTuple):
    """A value as somebody wrote it, not yet typed."""

    value: object
    source: str


class Field(NamedTuple):
    """One row of the table in config.py, as its readers here need it."""

    name: str
    help: str
    default: object
    kind: inspect.Type
    secret: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()


def _field(field: inspect.Field) -> Field:
    assert isinstance(field.type, inspect.Metadata), "every setting carries its help text"
    help = (field.type.extra_json_schema or {})["description"]
    return Field(field.name, help, field.default, field.type.type, bool((field.type.extra or {}).get("secret")))


def _table() -> dict[str, Field]:
    struct = inspect.type_info(ServeConfig)
    assert isinstance(struct, inspect.StructType)
    return {field.name: _field(field) for field in struct.fields}


TABLE: Mapping[str, Field] = _table()
_TYPES = typing.get_type_hints(ServeConfig, include_extras=True)


def gather(file: Path | None, environment: Mapping[str, str], flags: Mapping[str, str]) -> dict[str, Given]:
    return (_from_file(file) if file else {}) | _from_environment(environment) | _from_flags(flags)


def _from_file(path: Path) -> dict[str, Given]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"--config {path}: {error}") from error
    for name in document.keys() - TABLE.keys():
        raise SettingError(f"--config {path}: there is no setting named {name!r}")
    return {name: Given(value, str(path)) for name, value in document.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Given]:
    """An empty variable counts as unset: compose files pass such ones along."""
    named = ((field, environment.get(field.variable, "")) for field in TABLE.values())
    return {field.name: Given(value, field.variable) for field, value in named if value}


def _from_flags(flags: Mapping[str, str]) -> dict[str, Given]:
    if flags.get("api_key") == "":
        raise SettingError("api_key must not be empty, but --api-key says ''")
    return {name: Given(value, "MODEL" if name == "model" else TABLE[name].flag) for name, value in flags.items()}


def to_config(given: Mapping[str, Given]) -> ServeConfig:
    return ServeConfig(**{name: _typed(TABLE[name], value) for name, value in given.items()})


def _typed(field: Field, given: Given) -> Any:
    try:
        return msgspec.convert(given.value, _TYPES[field.name], strict=False)
    except msgspec.ValidationError as error:
        value = "***" if field.secret else repr(given.value)
        text = f"{field.name} must be {_expected(field.kind)}, but {given.source} says {value}"
        raise SettingError(text) from error


def _expected(kind: inspect.Type) -> str:
    match kind:
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(map(str, values))
        case inspect.IntType(ge=low, le=high):
            return f"a whole number from {low} to {high}"
        case inspect.FloatType(ge=low, le=high):
            return f"a number from {low} to {high}"
        case inspect.BoolType():
            return "true or false"
        case _:
            return "text"


def check(config: ServeConfig) -> None:
    """What no type can say: files that settings name can be read, and the door is not left open."""
    if config.chat_template and not Path(config.chat_template).is_file():
        raise SettingError(f"chat_template {config.chat_template!r}: no such file")
    running = config.max_running_requests or (CPU_RUNNING if config.device == "cpu" else CUDA_RUNNING)
    if config.ring_bytes < (least := RING_BYTES_PER_REQUEST * running):
        raise SettingError(f"ring_bytes must be at least {least} for max_running_requests {running}")
    _refuse_open_door(config)


def _refuse_open_door(config: ServeConfig) -> None:
    """Only this machine may be served without a key, unless the operator says otherwise in so many words."""
    try:
        keys = accepted_keys(config)
    except (OSError, ValueError) as error:
        raise SettingError(f"api_key_file {config.api_key_file!r}: {error}") from error
    if not (keys or config.allow_no_auth or _is_loopback(config.host)):
        raise SettingError(
            f"host {config.host!r} can be reached from other machines, and there is no key: "
            "set --api-key or --api-key-file, or say --allow-no-auth"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def as_toml(config: ServeConfig, given: Mapping[str, Given]) -> str:
    """The settings as a file for `--config`, each with where it came from; keys are masked."""
    return "".join(_line(field, getattr(config, field.name), given.get(field.name)) for field in TABLE.values())


def _line(field: Field, value: object, given: Given | None) -> str:
    shown = "***" if field.secret and value else value
    return f"{field.name} = {json.dumps(shown, ensure_ascii=False)}  # {given.source if given else 'default'}\n"
