"""Chat templates: from messages to the prompt a model was trained on, as text and as ids.

Templates come with the model, as one or several by name, and run in the sandbox of `sandbox.py`. Text of clients
passes through them as data, and never becomes a control token.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jinja2
import msgspec

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.description import read_json
from tokenllm.checkpoint.gguf import read_gguf
from tokenllm.text.hiding import veiled
from tokenllm.text.sandbox import Jinja
from tokenllm.text.tokenizer import Tokenizer

Message: TypeAlias = dict[str, Any]  # as OpenAI's API has it, with the text parts of its content joined
Tool: TypeAlias = dict[str, Any]
Sources: TypeAlias = dict[str, str]  # of templates, by name

LONGEST_PROMPT = 16_000_000  # characters; four times the largest body
RENDER_S = 2.0  # of a processor
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them free for uses like ours
ROLES = {"system", "developer", "user", "assistant", "tool", "function"}  # the only words a template may complete
DEFAULT, TOOL_USE = "default", "tool_use"
REASONING = ("reasoning_content", "thinking", "reasoning")  # what templates and clients call it
GGUF_TOKENS = {  # the names of special tokens, and what GGUF files call them
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
}
# what a template written for other messages than it got may raise, besides Jinja's own errors
WRONG_DATA = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class TemplateError(ValueError):
    """These messages cannot be rendered; the message is for the client."""


class TemplateOptions(msgspec.Struct, frozen=True):
    """What a client may ask of a template besides the messages and the tools."""

    add_generation_prompt: bool = True  # the assistant's turn is opened
    continue_final_message: bool = False  # the last message stays open, and no turn is opened after it
    variables: Mapping[str, Any] = {}  # what the template does not mention is ignored
    reasoning_effort: str | None = None
    documents: Sequence[dict[str, Any]] = ()


PLAIN = TemplateOptions()


class Prompt(NamedTuple):
    text: str
    unseen: str  # the character that keeps clients' words from becoming control tokens

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        try:
            return tokenizer.encode_with_specials(self.text, self.unseen)
        except ValueError as error:
            raise TemplateError(str(error)) from error


class Dialect(NamedTuple):
    """How a template wants what OpenAI's API says in one way."""

    typed_parts: bool = False  # contents are lists of parts
    argument_text: bool = False  # arguments of tool calls are JSON text, not objects
    null_content: bool = False  # beside tool calls, no content is null, not empty


class ChatTemplate:
    """A model's chat templates, compiled; a model without any can only complete text."""

    def __init__(self, sources: Sources, tokens: dict[str, str], origin: str):
        self._tokens = tokens
        try:
            self._templates = {name: Jinja(source) for name, source in sources.items()}
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{origin}: chat template: {error}") from error
        self._dialects = {name: self._spoken_by(template) for name, template in self._templates.items()}

    @classmethod
    def load(cls, path: Path, override_file: str = "") -> "ChatTemplate":
        """The templates of a .gguf file or a folder, or the one in `override_file` in their place."""
        sources, tokens = _of_gguf(path) if path.suffix == ".gguf" else _of_folder(path)
        if override_file:
            sources = {DEFAULT: _text(Path(override_file))}
        return cls(sources, tokens, override_file or str(path))

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), options: TemplateOptions = PLAIN) -> str:
        """The conversation as the model reads it, up to where its answer begins."""
        return self.render_hidden(messages, tools, options, lambda text, unseen: text).text

    def render_hidden(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        options: TemplateOptions,
        hide: Callable[[str, str], str],
    ) -> "Prompt":
        """The same, with all words of clients hidden."""
        name = TOOL_USE if tools and TOOL_USE in self._templates else DEFAULT
        if not (template := self._templates.get(name)):
            raise TemplateError("this model has no chat template: it completes text, but cannot chat")
        turns = [_in_dialect(message, self.dialect(name)) for message in messages]
        if not template.shows_tools:
            tools = ()
        words = {**options.variables, "documents": list(options.documents), "tools": list(tools)}
        try:
            unseen, mark = _unseen_in([turns, words])
            turns = [_hidden_turn(turn, lambda text: hide(text, unseen)) for turn in turns]
            words = veiled(words, lambda text: hide(text, unseen))
        except RecursionError:  # arguments of tool calls are JSON of which nobody has counted the levels
            raise TemplateError("arguments of tool calls are nested too deeply") from None
        if not options.continue_final_message:
            return Prompt(self._rendered(template, turns, words, options), unseen)
        text, turns[-1] = _left_open(turns[-1], mark)
        return Prompt(_cut(self._rendered(template, turns, words, options), text, mark), unseen)

    def dialect(self, name: str = DEFAULT) -> Dialect:
        """How the template of that name wants what it is told."""
        return self._dialects[name]

    def _rendered(
        self, template: Jinja, turns: Sequence[Message], words: Mapping[str, Any], options: TemplateOptions
    ) -> str:
        asked = {**_effort(options.reasoning_effort), **words}
        given = {
            **{name: value for name, value in asked.items() if name in template.variables},
            **self._tokens,
            "messages": turns,
            "tools": words["tools"] or None,
            "documents": words["documents"] or None,
            "add_generation_prompt": options.add_generation_prompt and not options.continue_final_message,
        }
        pieces: list[str] = []
        room = LONGEST_PROMPT
        try:
            for piece in template.pieces(given, RENDER_S):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise TemplateError(f"the rendered prompt is longer than {LONGEST_PROMPT} characters")
        except TemplateError:
            raise
        except (jinja2.TemplateError, *WRONG_DATA) as error:
            raise TemplateError(f"the chat template refuses these messages: {error}") from error
        return "".join(pieces)

    def _spoken_by(self, template: Jinja) -> Dialect:
        """The first way of speaking in which the template shows all that it is told; the usual one if none does."""
        typed_parts = not self._shows(template, ASKED, Dialect()) and self._shows(template, ASKED, Dialect(True))
        for argument_text, null_content in ((False, False), (False, True), (True, False), (True, True)):
            dialect = Dialect(typed_parts, argument_text, null_content)
            if self._shows(template, CALLED, dialect):
                return dialect
        return Dialect(typed_parts)

    def _shows(self, template: Jinja, messages: Sequence[Message], dialect: Dialect) -> bool:
        turns = [_in_dialect(message, dialect) for message in messages]
        try:
            rendered = self._rendered(template, turns, NOTHING, PLAIN)
        except TemplateError:
            return False
        return "None" not in rendered and all(word in rendered for word in SIGNS[: len(messages)])


SIGNS = ("sign-of-a-question", "sign-of-an-argument")
NOTHING: Mapping[str, Any] = {"tools": [], "documents": []}
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": f'{{"a": "{SIGNS[1]}"}}'}}
ASKED: list[Message] = [{"role": "user", "content": SIGNS[0]}]
CALLED: list[Message] = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "content": "done"},
]


def prompt_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    options: TemplateOptions = PLAIN,
) -> list[int]:
    """The ids of a conversation. Only the template's own words become control tokens."""
    return template.render_hidden(messages, tools, options, tokenizer.hide_specials).ids(tokenizer)


def _unseen_in(value: Any) -> tuple[str, str]:
    """Two characters that are nowhere in it."""
    text = json.dumps(value, ensure_ascii=False)
    unseen = [character for character in NONCHARACTERS if character not in text]
    if len(unseen) < 2:
        raise TemplateError("the messages hold every noncharacter from U+FDD0 to U+FDEF, or all but one")
    return unseen[0], unseen[1]


def _hidden_turn(turn: Message, hide: Callable[[str], str]) -> Message:
    hidden = veiled(turn, hide)
    return hidden | {"role": turn["role"]} if turn.get("role") in ROLES else hidden


def _in_dialect(message: Message, dialect: Dialect) -> Message:
    turn = dict(message)
    if "content" in turn and turn["content"] is None and not (turn.get("tool_calls") and dialect.null_content):
        turn["content"] = ""
    if dialect.typed_parts and isinstance(text := turn.get("content"), str):
        turn["content"] = [{"type": "text", "text": text}]
    if (calls := turn.get("tool_calls")) and not dialect.argument_text:
        turn["tool_calls"] = [_with_object(call) for call in calls]
    thoughts = [turn[name] for name in REASONING if turn.get(name) is not None]
    return {"thinking": thoughts[0], **turn, "reasoning_content": thoughts[0]} if thoughts else turn


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object; text that is none stays as the model once wrote it."""
    function = call["function"]
    if not isinstance(text := function["arguments"], str):
        return call
    try:
        arguments = msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}}


def _left_open(turn: Message, mark: str) -> tuple[str, Message]:
    """The text at the end of a turn, and the turn with a mark after it. White space shows whether it is trimmed."""
    match turn.get("content"):
        case str(text) if text:
            return text, turn | {"content": f"{text}{mark} "}
        case [*parts, {"text": str(text)} as last] if text:
            return text, turn | {"content": [*parts, last | {"text": f"{text}{mark} "}]}
    raise TemplateError("continue_final_message: the last message has no text to continue")


def _cut(rendered: str, text: str, mark: str) -> str:
    """The prompt up to where a text ends that the template may have trimmed."""
    before, found, after = rendered.rpartition(mark)
    if not found or text.strip() not in before:
        raise TemplateError("continue_final_message: the chat template does not show the last message as it is")
    return before if after.startswith(" ") else before.rstrip()


def _effort(effort: str | None) -> dict[str, Any]:
    """What templates call the effort that a request asks for."""
    thinks = effort != "none"
    return {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks} if effort else {}


def _of_gguf(path: Path) -> tuple[Sources, dict[str, str]]:
    metadata = read_gguf(path).metadata
    literals = metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in GGUF_TOKENS.items()}
    tokens = {name: literals[id_] for name, id_ in ids.items() if id_ is not None and id_ < len(literals)}
    keys = {DEFAULT: "tokenizer.chat_template", TOOL_USE: f"tokenizer.chat_template.{TOOL_USE}"}
    return {name: metadata[key] for name, key in keys.items() if key in metadata}, tokens


def _of_folder(folder: Path) -> tuple[Sources, dict[str, str]]:
    config = read_json(folder / "tokenizer_config.json")
    contents = {
        key: token["content"] if isinstance(token, dict) else token
        for key, token in config.items()
        if key.endswith("_token")
    }
    tokens = {key: content for key, content in contents.items() if isinstance(content, str)}
    named = config.get("chat_template")
    sources: Sources = {}
    if isinstance(named, str):
        sources = {DEFAULT: named}
    elif named:
        sources = {one["name"]: one["template"] for one in named}
    files = {DEFAULT: folder / "chat_template.jinja", TOOL_USE: folder / "additional_chat_templates" / "tool_use.jinja"}
    return sources | {name: _text(file) for name, file in files.items() if file.is_file()}, tokens


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: chat template cannot be read: {error}") from error
