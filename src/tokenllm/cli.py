"""The command line. The flags of `tokenllm serve` are the fields of ServeConfig, read from the table in config.py."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import inspect

import tokenllm
from tokenllm import settings
from tokenllm.settings import SettingError
from tokenllm.simulate import flags as simulation
from tokenllm.supervisor.serve import serve


def main(arguments: Sequence[str] | None = None) -> int:
    namespace = vars(_parser().parse_args(arguments))
    return namespace.pop("command")(namespace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenllm", description=tokenllm.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=tokenllm.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve a model to OpenAI clients", allow_abbrev=False))
    simulator = commands.add_parser("simulate", help="run the router on a trace, without a GPU", allow_abbrev=False)
    simulator.set_defaults(command=_simulate)
    simulation.add_flags(simulator)
    return parser


def _simulate(namespace: dict[str, Any]) -> int:
    from tokenllm.simulate.command import simulate  # numpy and rich, which the parent of a server does without

    return simulate(namespace)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_serve)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings; environment and flags win")
    parser.add_argument("--print-config", action="store_true", help="print the settings as TOML, keys masked, and exit")
    for field in settings.TABLE.values():
        _add_setting(parser, field)


def _add_setting(parser: argparse.ArgumentParser, field: settings.Field) -> None:
    # values stay text here: settings.to_config is the one place that types them, whatever their source
    help = f"{field.help} (default {json.dumps(field.default)}, environment {field.variable})".replace("%", "%%")
    match field:
        case settings.Field(name="model"):
            parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=help)
        case settings.Field(kind=inspect.BoolType()):
            parser.add_argument(field.flag, action="store_const", const="true", default=argparse.SUPPRESS, help=help)
        case _:
            parser.add_argument(field.flag, default=argparse.SUPPRESS, metavar=_metavar(field), help=help)


def _metavar(field: settings.Field) -> str:
    match field.kind:
        case inspect.LiteralType(values=values):
            return "|".join(map(str, values))
        case inspect.IntType() | inspect.FloatType():
            return "N"
        case _:
            return field.name.rpartition("_")[2].upper()


def _serve(namespace: dict[str, Any]) -> int:
    file, print_config = namespace.pop("config"), namespace.pop("print_config")
    try:
        given = settings.gather(file, os.environ, namespace)
        config = settings.to_config(given)
        if print_config:
            print(settings.as_toml(config, given), end="")
            return 0
        settings.check(config)
    except SettingError as error:
        print(f"tokenllm: {error}", file=sys.stderr)
        return 2
    try:
        return serve(config)
    except KeyboardInterrupt:  # before the supervisor takes care of signals, while a model is downloaded
        return 128 + signal.SIGINT
