"""The official client against a real gateway process."""

from typing import Any

import openai
import pytest
from fake_generation import MODEL_LEN, MODEL_NAME, GatewayUnderTest, eventually, words

HELLO: Any = [{"role": "user", "content": "hello"}]


def ask(client: openai.OpenAI, **fields: object) -> Any:
    return client.chat.completions.create(**{"model": MODEL_NAME, "messages": HELLO, **fields})


def test_chat(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=5)
    assert answer.object == "chat.completion" and answer.model == MODEL_NAME
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", words(5), None)
    usage = answer.usage
    assert usage and usage.completion_tokens == 5 and usage.total_tokens == usage.prompt_tokens + 5
    assert usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens == 1
    assert usage.completion_tokens_details and usage.completion_tokens_details.reasoning_tokens == 0
    assert answer._request_id


def test_a_chat_stream_has_its_parts_in_order(client: openai.OpenAI) -> None:
    stream = ask(client, max_tokens=5, stream=True, stream_options={"include_usage": True})
    role, *deltas, finish, usage = stream
    assert role.choices[0].delta.role == "assistant" and role.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content for chunk in deltas) == words(5)
    assert all(chunk.choices[0].finish_reason is None for chunk in (role, *deltas))
    assert finish.choices[0].finish_reason == "length" and finish.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage.completion_tokens == 5
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in (role, *deltas, finish))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in (role, *deltas, finish, usage)}) == 1


def test_usage_comes_only_when_asked_for(client: openai.OpenAI) -> None:
    chunks = list(ask(client, max_tokens=2, stream=True))
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_stream_helper(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    manager = client.chat.completions.stream(
        model=MODEL_NAME, messages=HELLO, stop="6", n=2, stream_options=options, logprobs=True
    )
    with manager as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert [choice.message.content for choice in final.choices] == [words(6)] * 2
    assert final.usage and final.usage.completion_tokens == 14  # the stop string was one


def test_choices_are_separate(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    assert gateway.generation
    before = len(gateway.generation.submits)
    answer = ask(client, max_tokens=4, n=3, seed=2**63 - 1)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, words(4)) for i in range(3)]
    assert answer.usage and answer.usage.completion_tokens == 12
    submits = gateway.generation.submits[before:]
    assert len({submit.uid for submit in submits}) == 3
    assert [submit.sampling.seed for submit in submits] == [2**63 - 1, 0, 1]
    assert answer.usage.prompt_tokens == len(submits[0].prompt) // 4


def test_what_is_asked_reaches_the_scheduler(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    assert gateway.generation
    ask(
        client,
        max_completion_tokens=3,
        temperature=0.5,
        top_p=0.25,
        frequency_penalty=-1,
        presence_penalty=2,
        stop=["never", "ever"],
        seed=7,
        extra_body={"top_k": 9, "ignore_eos": True},
    )
    submit = gateway.generation.submits[-1]
    assert (submit.max_tokens, submit.telling.stop, submit.ignore_eos) == (3, ("never", "ever"), True)
    sampling = submit.sampling
    assert (sampling.seed, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.25, 9)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.logprobs) == (-1, 2, None)


def test_the_prompt_is_the_template_of_the_messages(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    assert gateway.generation
    parts = [{"type": "text", "text": "two <|im_start|>"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    ask(client, messages=messages, max_tokens=1)
    submit = gateway.generation.submits[-1]
    text = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ntwo <|im_start|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert gateway.generation.prompt(submit) == text
    ids = [int.from_bytes(submit.prompt[i : i + 4], "little") for i in range(0, len(submit.prompt), 4)]
    assert ids.count(1) == 3, "the client's own <|im_start|> is plain text"


def test_a_stop_string_ends_the_text_and_the_work(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    assert gateway.generation
    answer = ask(client, stop=["3"], max_tokens=100)
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", words(3))
    uid = gateway.generation.submits[-1].uid
    eventually(lambda: gateway.generation and uid in gateway.generation.aborts)


def test_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=2, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and logprobs.refusal is None
    assert [(one.token, one.bytes, one.logprob) for one in logprobs.content] == [
        ("0 ", [48, 32], -9999.0),
        ("1 ", [49, 32], -0.5),
    ]
    assert [(top.token, top.bytes, top.logprob) for top in logprobs.content[1].top_logprobs] == [
        ("t0", [240], -1.0),
        ("t1", [240], -2.0),
    ]
    streamed = [c.choices[0].logprobs for c in ask(client, max_tokens=2, logprobs=True, top_logprobs=2, stream=True)]
    assert [one for part in streamed if part for one in part.content] == logprobs.content


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL_NAME, prompt=["a", "b"], n=2, max_tokens=3, logprobs=1)
    assert answer.object == "text_completion"
    assert [(choice.index, choice.text) for choice in answer.choices] == [(i, words(3)) for i in range(4)]
    logprobs = answer.choices[3].logprobs
    assert logprobs and logprobs.tokens == ["0 ", "1 ", "2 "] and logprobs.text_offset == [0, 2, 4]
    assert logprobs.token_logprobs == [-9999.0, -0.5, -0.5] and logprobs.top_logprobs == [{"t0": -1.0}] * 3
    assert answer.usage and answer.usage.completion_tokens == 12 and answer.usage.prompt_tokens == 2


def test_completions_of_token_ids(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    assert gateway.generation
    before = len(gateway.generation.submits)
    client.completions.create(model=MODEL_NAME, prompt=[[5, 6], [7]], max_tokens=1)
    client.completions.create(model=MODEL_NAME, prompt=[8, 9])
    submits = gateway.generation.submits[before:]
    assert [submit.prompt for submit in submits] == [b"\5\0\0\0\6\0\0\0", b"\7\0\0\0", b"\x08\0\0\0\x09\0\0\0"]
    assert submits[-1].max_tokens == 16


def test_a_stream_of_completions(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL_NAME, prompt=["a", "b"], max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    *chunks, usage = stream
    for index in (0, 1):
        its = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in its) == words(4)
        assert [choice.finish_reason for choice in its][-2:] == [None, "length"]
    assert usage.choices == [] and usage.usage and usage.usage.completion_tokens == 8


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL_NAME, "model", "tokenllm")
    assert client.models.retrieve(MODEL_NAME) == model
    assert model.max_model_len == MODEL_LEN  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("some-org/other")
    assert caught.value.code == "model_not_found"


def test_the_context_is_a_limit(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    assert gateway.generation
    prompt = [5] * (MODEL_LEN - 2)
    assert client.completions.create(model=MODEL_NAME, prompt=prompt, max_tokens=50).choices[0].text == words(2)
    for too_long in ([5] * MODEL_LEN, [5] * (MODEL_LEN + 1)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL_NAME, prompt=too_long)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
        assert str(MODEL_LEN) in caught.value.message and str(len(too_long)) in caught.value.message
    answer = ask(client)  # without a limit: what the context has room for
    assert answer.usage and answer.usage.total_tokens == MODEL_LEN


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 5}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"n": 9}, openai.BadRequestError, "unsupported_parameter", "n"),
        (
            {"response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "unsupported_parameter",
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "REFUSE"}]}, openai.RateLimitError, "queue_full", None),
        ({"messages": [{"role": "user", "content": "FAIL"}]}, openai.InternalServerError, "engine_error", None),
    ],
)
def test_errors_are_the_sdks_own(
    client: openai.OpenAI, fields: dict, kind: type[openai.APIStatusError], code: str, param: str | None
) -> None:
    for stream in (False,) if code == "engine_error" else (False, True):  # that one comes in the middle of a stream
        with pytest.raises(kind) as caught:
            ask(client, stream=stream, **fields)
        error = caught.value
        assert (error.code, error.param) == (code, param)
        assert error.request_id == error.response.headers["x-request-id"]
        assert (error.status_code == 429) == ("retry-after" in error.response.headers)


def test_a_failure_in_the_middle_of_a_stream(client: openai.OpenAI) -> None:
    text = ""
    with pytest.raises(openai.APIError, match="failed") as caught:
        for chunk in ask(client, messages=[{"role": "user", "content": "FAIL"}], stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "so far "
    assert caught.value.body == {
        "message": "the model failed on this request",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }


def test_token_ids_beyond_the_vocabulary_are_refused(client: openai.OpenAI) -> None:
    for prompt in ([1, 49152], [[1], [2**31 - 1]]):
        with pytest.raises(openai.BadRequestError, match="vocabulary") as caught:
            client.completions.create(model=MODEL_NAME, prompt=prompt)
        assert caught.value.param == "prompt"


async def _one_of_many(client: openai.AsyncOpenAI, number: int) -> str:
    stream = await client.chat.completions.create(model=MODEL_NAME, messages=HELLO, max_tokens=10 + number, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_many_streams_at_once(gateway: GatewayUnderTest) -> None:
    import asyncio

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(_one_of_many(client, number) for number in range(32)))

    assert asyncio.run(all_of_them()) == [words(10 + number) for number in range(32)]
