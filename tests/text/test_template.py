"""Templates render as transformers renders them, and refuse in words what they cannot render."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tokenllm.checkpoint import CheckpointError
from tokenllm.text import template as template_module
from tokenllm.text.template import ChatTemplate, TemplateError, TemplateOptions, prompt_ids

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "smollm2_reference.json").read_text())["refs"]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message.content + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = """{{- bos_token }}
{%- set ns = namespace(turn=0, last='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% if loop.index > 5 %}
        {% break %}
    {% endif %}
    {%- set ns.turn = ns.turn + 1 %}
    {% generation %}[{{ ns.turn }}:{{ message['role'] | upper }}] {{ message.content | trim }}{% endgeneration %}
  {# a comment #}
{% endfor %}
{{ eos_token if not add_generation_prompt else '' }}"""
JSON = """{% for message in messages %}
{{ message | tojson }} {{ message | tojson(indent=2) }} {{ {'b': '<&é>', 'a': 1} | tojson(sort_keys=True) }}
{{ dict(a=message.role) }}{{ message.items() | list | length }}{% endfor %}{{ strftime_now('%Y') }}{{ missing }}"""
MACRO = """{% macro turn(role, text) %}<{{ role }}>{{ text }}</{{ role }}>
{% endmacro %}
{% for message in messages %}
    {{ turn(message.role, message.content if message.content is string else message.content[0].text) }}
{% endfor %}
{% if messages[-1].role != 'user' %}{{ raise_exception('the user speaks last') }}{% endif %}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": ' Be <b>kind</b> & "short" '}, {"role": "user", "content": "  é 🙂\n{{ x }} "}],
    [{"role": role, "content": f"line {i}\n\n"} for i, role in enumerate(["user", "assistant"] * 3 + ["user"])],
]


@pytest.mark.parametrize("source", [CHATML, BLOCKS, JSON, MACRO], ids=["chatml", "blocks", "json", "macro"])
@pytest.mark.parametrize("chat", CHATS, ids=["one", "odd", "long"])
@pytest.mark.parametrize("prompt", [True, False])
def test_transformers_renders_alike(source: str, chat: list[dict[str, Any]], prompt: bool) -> None:
    expected, _ = render_jinja_template([chat], chat_template=source, add_generation_prompt=prompt, **TOKENS)
    assert template(source).render(chat, options=TemplateOptions(add_generation_prompt=prompt)) == expected[0]


@pytest.mark.parametrize("reference", REFERENCE, ids=[reference["prompt"][:20] for reference in REFERENCE])
def test_the_default_model(default_model: Path, default_pair, reference: dict[str, Any]) -> None:
    model = ChatTemplate.load(default_model)
    messages = [{"role": "user", "content": reference["prompt"]}]
    assert model.render(messages) == reference["rendered"]
    assert prompt_ids(default_pair.ours, model, messages) == reference["prompt_ids"]


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, TOKENS, "test")


def refusal(source: str, messages: list[dict[str, Any]]) -> str:
    with pytest.raises(TemplateError) as caught:
        template(source).render(messages)
    return str(caught.value)


def test_what_cannot_be_rendered_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the user speaks last" in refusal(MACRO, [{"role": "assistant", "content": "x"}])
    assert "no attribute 'content'" in refusal(CHATML, [{"role": "user"}])
    assert '"int"' in refusal(CHATML, [{"role": "user", "content": 5}])
    for wrong in ("{{ 1 // 0 }}", "{{ 'x'.encode('y') }}", "{{ [1][5:].pop() }}", "{{ '%d' % 'x' }}"):
        assert "refuses these messages" in refusal(wrong, CHATS[0])
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate({}, {}, "none").render(CHATS[0])
    monkeypatch.setattr(template_module, "LONGEST_PROMPT", 1000)
    assert "longer than 1000" in refusal("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", CHATS[0])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__call__=1) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ range(10 ** 9) }}",
    ],
)
def test_templates_stay_in_their_sandbox(source: str) -> None:
    assert refusal(source, CHATS[0])


QUADRATIC = "{% for a in messages %}{% for b in messages %}{% if a == b and a.x %}x{% endif %}{% endfor %}{% endfor %}"
ENDLESS = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(64) }}"


@pytest.mark.parametrize("source", [QUADRATIC, ENDLESS])
def test_what_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(template_module, "RENDER_S", 0.05)
    slow = template(source)
    began_s = time.thread_time()
    with pytest.raises(TemplateError, match=r"takes more than 0\.05 s"):
        slow.render([{"role": "user", "content": "x"}] * 10_000)
    assert time.thread_time() - began_s < 1


def test_what_clients_may_set() -> None:
    source = "{{ bos_token }}|{{ tools }}|{{ documents }}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ budget }}"
    both = template(source)
    given = {"bos_token": "no", "messages": [], "tools": "no", "documents": "no", "budget": 7, "range": "no"}
    assert both.render(CHATS[0]) == "<s>|None|None|||"
    assert both.render(CHATS[0], options=TemplateOptions(variables=given)) == "<s>|None|None|||7"
    assert both.render(CHATS[0], options=TemplateOptions(reasoning_effort="high")) == "<s>|None|None|True|high|"
    counting = template("{{ range(2) | list }}")
    assert counting.render(CHATS[0], options=TemplateOptions(variables=given)) == "[0, 1]"
    silent = TemplateOptions(reasoning_effort="none", variables={"reasoning_effort": "low"})
    assert both.render(CHATS[0], options=silent) == "<s>|None|None|False|low|"
    assert both.render(CHATS[0], [{"a": 1}], TemplateOptions(documents=[{"b": 2}])) == "<s>|[{'a': 1}]|[{'b': 2}]|||"


def test_calls_and_contents_in_the_templates_own_way() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    objects = template("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
                       "{{ c.function.arguments.items() | list }}{% endfor %}{% endfor %}")  # fmt: skip
    assert objects.render(messages) == "[('a', 1)]"
    texts = template("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
                     "{{ '!' + c.function.arguments }}{% endfor %}{% endfor %}")  # fmt: skip
    assert texts.render(messages) == '!{"a": 1}'
    parts = template("{% for m in messages %}{% for part in m.content %}{{ part.text }}.{% endfor %}{% endfor %}")
    assert parts.render(CHATS[0]) == "Hi."
    broken = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a'}}]}]
    assert template("{{ messages[0].tool_calls[0].function.arguments }}").render(broken) == '{"a'


@pytest.mark.parametrize("levels", [100, 300, 500, 900, 5000])
def test_arguments_of_any_depth_are_shown_or_refused(levels: int) -> None:
    arguments = '{"a":' + "[" * levels + "]" * levels + "}"
    chat = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    try:
        assert "[[[" in template("{{ messages[0].tool_calls[0].function.arguments | tojson }}").render(chat)
    except TemplateError as error:
        assert levels > 100 and "nested too deeply" in str(error)


def test_reasoning_by_any_name() -> None:
    source = template("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}")
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert source.render([{"role": "assistant", "content": "", name: "why"}]) == "whywhy"


def test_a_message_that_cannot_be_continued() -> None:
    def refused(source: str, content: Any) -> str:
        with pytest.raises(TemplateError) as caught:
            template(source).render([{"role": "assistant", "content": content}], (), TemplateOptions(True, True))
        return str(caught.value)

    assert "no text to continue" in refused(CHATML, "")
    assert "does not show" in refused("{{ messages | length }}", "x")
    assert "does not show" in refused("{{ messages[0].content | upper }}", "x")


def folder(path: Path, config: dict[str, Any], jinja: str = "") -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja:
        (path / "chat_template.jinja").write_text(jinja)
    return path


def test_where_templates_lie(tmp_path: Path) -> None:
    def rendered(override: str = "") -> str:
        return ChatTemplate.load(tmp_path, override).render([])

    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    folder(tmp_path, tokens | {"chat_template": "{{ bos_token }}config{{ eos_token }}{{ pad_token }}"})
    assert rendered() == "<s>config</s>"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    folder(tmp_path, {"chat_template": named})
    assert rendered() == "named"
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("tools {{ tools | length }}")
    assert rendered() == "named"
    assert ChatTemplate.load(tmp_path).render([], [{}]) == "tools 1"
    folder(tmp_path, {"chat_template": "config"}, "file {{ bos_token }}")
    assert rendered() == "file "
    (tmp_path / "mine.jinja").write_text("mine")
    assert rendered(str(tmp_path / "mine.jinja")) == "mine"
    with pytest.raises(CheckpointError, match=r"none\.jinja: chat template cannot be read"):
        rendered(str(tmp_path / "none.jinja"))
    (tmp_path / "mine.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match=r"mine\.jinja: chat template: "):
        rendered(str(tmp_path / "mine.jinja"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate.load(empty).render(CHATS[0])
