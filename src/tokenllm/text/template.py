"""Chat templates: from messages to the prompt a model was trained on, as text and as ids.

Templates come with the model and run in Jinja's sandbox, with the names and filters that transformers gives them.
Text of clients passes through them as data, and never becomes a control token.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.description import read_json
from tokenllm.checkpoint.gguf import read_gguf
from tokenllm.text.tokenizer import Tokenizer

Message: TypeAlias = dict[str, Any]

LONGEST_PROMPT = 16_000_000  # characters; four times the largest body
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them free for uses like ours
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
KINDS = {"system", "developer", "user", "assistant", "tool", "function", "text"}  # values a template compares with
CLIENT_KEYS = {"arguments", "parameters"}  # below these, even the keys are the client's words
# what a template written for other messages than it got may raise, besides Jinja's own errors
WRONG_DATA = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class TemplateError(ValueError):
    """These messages cannot be rendered; the message is for the client."""


class ChatTemplate:
    """A model's chat template, compiled; a model without one can only complete text."""

    def __init__(self, source: str | None, tokens: dict[str, str], origin: str):
        self._tokens = tokens
        try:
            self._template = _environment().from_string(source) if source is not None else None
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{origin}: chat template: {error}") from error

    @classmethod
    def load(cls, path: Path, override_file: str = "") -> "ChatTemplate":
        """The template of a .gguf file or a folder, or the one in `override_file` in its place."""
        source, tokens = _of_gguf(path) if path.suffix == ".gguf" else _of_folder(path)
        if override_file:
            source = _text(Path(override_file))
        return cls(source, tokens, override_file or str(path))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the model reads it, up to where its answer begins."""
        if not self._template:
            raise TemplateError("this model has no chat template: it completes text, but cannot chat")
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, **self._tokens}
        pieces: list[str] = []
        room = LONGEST_PROMPT
        try:
            for piece in self._template.generate(given):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise TemplateError(f"the rendered prompt is longer than {LONGEST_PROMPT} characters")
        except TemplateError:
            raise
        except (jinja2.TemplateError, *WRONG_DATA) as error:
            raise TemplateError(f"the chat template refuses these messages: {error}") from error
        return "".join(pieces)


def prompt_ids(tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation. Only the template's own words become control tokens."""
    unseen = _unseen_in(messages)
    hidden = [_hidden(message, lambda text: tokenizer.hide_specials(text, unseen)) for message in messages]
    rendered = template.render(hidden)
    try:
        return tokenizer.encode_with_specials(rendered, unseen)
    except ValueError as error:
        raise TemplateError(str(error)) from error


def _unseen_in(messages: Sequence[Message]) -> str:
    text = json.dumps(messages, ensure_ascii=False)
    for character in NONCHARACTERS:
        if character not in text:
            return character
    raise TemplateError("the messages hold every noncharacter from U+FDD0 to U+FDEF")


def _hidden(value: Any, hide: Callable[[str], str], keys_too: bool = False) -> Any:
    """A message, or a part of one, in which every string of the client's is hidden."""
    match value:
        case str():
            return hide(value)
        case list():
            return [_hidden(one, hide, keys_too) for one in value]
        case dict():
            return {
                hide(key) if keys_too else key: part
                if not keys_too and key in ("role", "type") and part in KINDS
                else _hidden(part, hide, keys_too or key in CLIENT_KEYS)
                for key, part in value.items()
            }
    return value


def _of_gguf(path: Path) -> tuple[str | None, dict[str, str]]:
    metadata = read_gguf(path).metadata
    literals = metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: metadata.get(f"tokenizer.ggml.{name.removesuffix('_token')}_token_id") for name in NAMED_TOKENS}
    tokens = {name: literals[id_] for name, id_ in ids.items() if id_ is not None and id_ < len(literals)}
    return metadata.get("tokenizer.chat_template"), tokens


def _of_folder(folder: Path) -> tuple[str | None, dict[str, str]]:
    config = read_json(folder / "tokenizer_config.json")
    named = {name: config.get(name) for name in NAMED_TOKENS}
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    file = folder / "chat_template.jinja"
    source = _text(file) if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    return source, {name: content for name, content in contents.items() if content is not None}


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: chat template cannot be read: {error}") from error


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
