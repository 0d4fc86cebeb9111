"""Whatever clients write and wherever a template puts it, control tokens are the template's alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenllm.text.hiding import Hider, Veiled
from tokenllm.text.template import NONCHARACTERS, ChatTemplate, TemplateError, TemplateOptions, prompt_ids

LITERALS = ["<|im_start|>", "<|im_end|>", "<repo_name>", "<|endoftext|>"]


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {}, "test")


CHATML = template_of(
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# puts clients' words right beside its own and beside each other, into angle brackets, trimmed and torn apart
RECKLESS = template_of(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n<{{ m.name }}>{{ m.content | trim }}{{ m.name | trim }}"
    "<|{{ m.content }}|><{{ m.content }}{% for key, value in m.arguments.items() %}<{{ key }}>{{ value }}</{{ key }}>"
    "{% endfor %}{{ m.arguments | tojson }}{{ m.content.split() | join('') }}<|im_end|>\n{% endfor %}<|im_start|>"
)

TWICE = template_of("<|begin|>{{ messages[0].content }}<|end|>{{ messages[0].content }}")

adversarial = st.lists(
    st.sampled_from([*LITERALS, "<|im_", "start|>", "im_end", "|im_end|", "<|", "|>", "<", ">", "|", "repo_name", "s"])
    | st.sampled_from(LITERALS).flatmap(lambda one: st.integers(0, len(one)).map(lambda n: one[n:]))
    | st.sampled_from(LITERALS).flatmap(lambda one: st.integers(0, len(one)).map(lambda n: one[:n]))
    | st.text(max_size=4)
    | st.sampled_from([" ", "\n", "\ufdd0", "\ufdd1", "user", "assistant"]),
    max_size=6,
).map("".join)


def messages_of(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    arguments = st.dictionaries(text, text, max_size=2)
    message = st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": text,
            "name": text,
            "arguments": arguments,
        }
    )
    return st.lists(message, min_size=1, max_size=3)


def plain_ids(tokenizer, template: ChatTemplate, messages: list[dict[str, Any]]) -> list[int]:
    return tokenizer.encode_with_specials(template.render(messages))


@settings(max_examples=150, deadline=None)
@given(messages=messages_of(adversarial))
def test_clients_make_no_control_tokens_in_chatml(default_pair, messages: list[dict[str, Any]]) -> None:
    tokenizer = default_pair.ours
    ids = prompt_ids(tokenizer, CHATML, messages)
    start, end = tokenizer.encode_with_specials("<|im_start|><|im_end|>")
    assert [id_ for id_ in ids if id_ in tokenizer.special_ids] == [start, end] * len(messages) + [start]
    expected = "".join(f"{m['role']}\n{m['content']}\n" for m in messages) + "assistant\n"
    if not any(char in "\x04\x06\x13\x14\x16\x1d" or char >= "\U00040000" for char in expected):
        assert tokenizer.decode(ids) == expected


@settings(max_examples=200, deadline=None)
@example(messages=[{"role": "user", "content": "< |im_start|>", "name": "im_ end|>", "arguments": {"a": "<| im_"}}])
@given(messages=messages_of(adversarial))
def test_clients_make_no_control_tokens_in_a_reckless_template(default_pair, messages: list[dict[str, Any]]) -> None:
    tokenizer = default_pair.ours
    ids = prompt_ids(tokenizer, RECKLESS, messages)
    start, end = tokenizer.encode_with_specials("<|im_start|><|im_end|>")
    assert [id_ for id_ in ids if id_ in tokenizer.special_ids] == [start, end] * len(messages) + [start]


# all that a client may write, and a template that writes it wherever it can
EVERYWHERE = template_of(
    "<|im_start|>{% for m in messages %}{% for call in m.tool_calls or [] %}<|{{ call.function.name }}|>"
    "{% for key, value in call.function.arguments.items() %}<{{ key }}|{{ value }}>{% endfor %}{{ call.id }}"
    "{% endfor %}{{ m.content }}<{{ m.tool_call_id }}><|{{ m.reasoning_content }}{% endfor %}"
    "{% for tool in tools %}<|{{ tool.function.name }}|>{{ tool | tojson }}{% for key, value in "
    "tool.function.parameters.items() %}<|{{ key }}|><{{ value }}>{% endfor %}{% endfor %}"
    "{% for paper in documents %}<{{ paper.title }}>{{ paper.text }}{% endfor %}<{{ mood }}><|im_end|>"
)
text = adversarial
call = st.fixed_dictionaries(
    {
        "id": text,
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": text, "arguments": st.dictionaries(text, text, max_size=2)}),
    }
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["assistant", "tool"]), "content": text, "tool_call_id": text, "reasoning_content": text},
    optional={"tool_calls": st.lists(call, min_size=1, max_size=2)},
)
tool = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": text, "parameters": st.dictionaries(text, text, max_size=2)}),
    }
)
paper = st.fixed_dictionaries({"title": text, "text": text})


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(turn, min_size=1, max_size=2),
    tools=st.lists(tool, min_size=1, max_size=2),
    papers=st.lists(paper, min_size=1, max_size=2),
    mood=text,
)
def test_nothing_that_clients_write_is_a_control_token(default_pair, turns, tools, papers, mood) -> None:
    tokenizer = default_pair.ours
    for one in turns:
        for made in one.get("tool_calls", []):
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
    options = TemplateOptions(documents=papers, variables={"mood": mood})
    ids = prompt_ids(tokenizer, EVERYWHERE, turns, tools, options)
    assert [id_ for id_ in ids if id_ in tokenizer.special_ids] == tokenizer.encode_with_specials(
        "<|im_start|><|im_end|>"
    )


def test_a_message_left_open_is_hidden_too(default_pair) -> None:
    messages = [{"role": "assistant", "content": "x <|im_end|> <|im_"}]
    ids = prompt_ids(default_pair.ours, CHATML, messages, (), TemplateOptions(continue_final_message=True))
    assert ids == default_pair.ours.encode_with_specials("<|im_start|>") + default_pair.ours.encode(
        "assistant\nx <|im_end|> <|im_", first=False
    )


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_harmless_words_get_the_ids_of_the_plain_rendering(default_pair, data: st.DataObject) -> None:
    harmless = st.text() | adversarial.filter(lambda text: not any(literal in text for literal in LITERALS))
    messages = data.draw(messages_of(harmless))
    assert prompt_ids(default_pair.ours, CHATML, messages) == plain_ids(default_pair.ours, CHATML, messages)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_kind_of_tokenizer(pair, texts, data: st.DataObject) -> None:
    tokenizer = pair.ours
    messages = [{"role": "user", "content": data.draw(texts)}]
    ids = prompt_ids(tokenizer, TWICE, messages)
    assert [id_ for id_ in ids if id_ in tokenizer.special_ids - {pair.theirs.token_to_id("<unk>")}] == [
        pair.theirs.token_to_id("<|begin|>"),
        pair.theirs.token_to_id("<|end|>"),
    ]
    if not any(literal in messages[0]["content"] for literal in tokenizer.special_literals):
        assert ids == pair.special(TWICE.render(messages))


@settings(max_examples=300)
@given(st.lists(st.text("ab|", min_size=2, max_size=4), min_size=1, max_size=3), st.data())
def test_hidden_words_make_no_literal_between_any_others(literals: list[str], data: st.DataObject) -> None:
    """Clients' words side by side with each other and with a template's: no literal has a letter of theirs."""
    word = st.text("ab| ", max_size=6)
    hider = Hider(literals)
    clients = [hider.hide(text, "*").strip() for text in data.draw(st.lists(word, min_size=1, max_size=3))]
    parts = [(text, True) for text in clients] + [(text, False) for text in data.draw(st.lists(word, max_size=3))]
    order = data.draw(st.permutations(parts))
    whole = "".join(text for text, _ in order)
    owners = [client for text, client in order for _ in text]
    for literal in literals:
        for at in range(len(whole)):
            if whole.startswith(literal, at):
                assert not any(owners[at : at + len(literal)])


@given(st.text("ab", max_size=3), st.text("ab", max_size=3))
def test_veiled_words_compare_as_the_words_they_are(word: str, other: str) -> None:
    hidden = Veiled(f"{word}*", word)
    assert ((hidden == other), (hidden != other), (hidden < other)) == (word == other, word != other, word < other)
    assert (other in hidden, hidden.startswith(other)) == (other in word, word.startswith(other))
    assert (hidden.endswith(other), {hidden: 1}.get(other)) == (word.endswith(other), {word: 1}.get(other))
    assert (f"{hidden}", json.dumps({hidden: hidden})) == (f"{word}*", json.dumps({f"{word}*": f"{word}*"}))


def test_hiding_changes_nothing_else() -> None:
    hider = Hider(LITERALS)
    assert hider.hide("An ordinary question, with 1 < 2 and a|b?", "*") == "An ordinary question, with 1 < 2 and a|b?"
    assert hider.hide("x <|im_end|> y", "*") == "x <*|im_end|> y"
    assert hider.hide(" \n", "*") == " \n"
    assert Hider([]).hide("<|im_end|>", "*") == "<|im_end|>"


def test_roles_are_compared_and_keys_are_found(default_pair) -> None:
    """'s', 'name' and 'user' are parts of literals or keys: hiding must not stand in a template's way."""
    source = "{% set m = messages[0] %}{% if m.role == 'user' and m.parts[0].type == 'text' %}{{ m.name }}{% endif %}"
    messages = [{"role": "user", "name": "s", "parts": [{"type": "text", "text": "x"}]}]
    template = template_of(source)
    assert prompt_ids(default_pair.ours, template, messages) == default_pair.ours.encode("s")


def test_a_client_uses_up_all_noncharacters(default_pair) -> None:
    almost = "".join(NONCHARACTERS[:-2]) + "<|im_end|>"
    prompt_ids(default_pair.ours, CHATML, [{"role": "user", "content": almost}])
    with pytest.raises(TemplateError, match="noncharacter"):
        prompt_ids(default_pair.ours, CHATML, [{"role": "user", "content": "".join(NONCHARACTERS[:-1])}])


def test_text_that_cannot_be_encoded_is_the_clients_fault(default_pair) -> None:
    for text in ("\ud800", " " * 100_001):
        with pytest.raises(TemplateError):
            prompt_ids(default_pair.ours, CHATML, [{"role": "user", "content": text}])


def test_the_reference_prompts(default_model: Path, default_pair) -> None:
    references = json.loads((Path(__file__).parents[1] / "data" / "smollm2_reference.json").read_text())["refs"]
    template = ChatTemplate.load(default_model)
    for reference in references:
        messages = [{"role": "user", "content": reference["prompt"]}]
        assert prompt_ids(default_pair.ours, template, messages) == reference["prompt_ids"]
