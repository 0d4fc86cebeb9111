"""Jinja as chat templates know it: the names, filters and tags that transformers gives them, in Jinja's sandbox.

A compiled template runs for so long and no longer: every turn of a loop and every macro looks at the clock. It is
the model's, and the model is the operator's choice; the clock is there for what clients give it to chew on.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

LOOK = "0look"  # the clock's name in a template, which none can write: it begins with a digit


class Jinja:
    """A compiled template. It may be rendered by many threads at once."""

    def __init__(self, source: str):
        environment = _environment()
        tree = environment.parse(source)
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))  # what it expects to be given
        self.shows_tools = "tools" in self.variables
        for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
            node.body.insert(0, _look(node.lineno))
        tree.set_environment(environment)
        self._template = environment.from_string(tree)

    def pieces(self, given: Mapping[str, Any], limit_s: float) -> Iterator[str]:
        """The rendered text, in pieces. Whatever a template raises comes out here."""
        return self._template.generate({**given, LOOK: _clock(limit_s)})


def _look(line: int) -> jinja2.nodes.ExprStmt:
    name = jinja2.nodes.Name(LOOK, "load", lineno=line)
    return jinja2.nodes.ExprStmt(jinja2.nodes.Call(name, [], [], None, None, lineno=line), lineno=line)


def _clock(limit_s: float) -> Callable[[], None]:
    """Raises once this thread has computed for so long."""
    end_s = time.thread_time() + limit_s

    def look() -> None:
        if time.thread_time() > end_s:
            raise jinja2.TemplateError(f"it takes more than {limit_s:g} s")

    return look


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "namespace": _Namespace,
    }
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; here it only stands around them."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's own, closed to the underscored names by which a template could reach Python's insides."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
