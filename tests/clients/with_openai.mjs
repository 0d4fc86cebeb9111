// The OpenAI SDK for Node: its plain calls and its typed helpers, for chats and for responses.

import assert from "node:assert/strict";
import OpenAI from "openai";
import {
  all,
  aborting,
  ANSWER,
  API_KEY,
  BASE_URL,
  ENDLESS,
  MODEL,
  near,
  NO_SUCH_MODEL,
  QUESTION,
  refusal,
  run,
  TOO_HOT,
} from "./client_checks.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0, timeout: 60_000 });
const asked = { model: MODEL, messages: [{ role: "user", content: QUESTION }], temperature: 0, max_tokens: 20 };
const endlessly = { model: MODEL, messages: [{ role: "user", content: ENDLESS }], max_tokens: 2000, stream: true };
const respond = { model: MODEL, input: QUESTION, temperature: 0, max_output_tokens: 20 };

async function chat() {
  const answer = await client.chat.completions.create(asked);
  assert.equal(answer.choices[0].message.content, ANSWER);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
}

async function stream() {
  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = await all(await client.chat.completions.create({ ...asked, ...options }));
  assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), ANSWER);
  assert(chunks.at(-1).usage.completion_tokens > 0);
}

async function stream_helper() {
  const stream = client.chat.completions.stream(asked);
  const deltas = [];
  stream.on("content", (delta) => deltas.push(delta));
  const final = await stream.finalChatCompletion();
  assert.equal(deltas.join(""), ANSWER);
  assert.equal(final.choices[0].message.content, ANSWER);
}

async function abort() {
  await aborting(async () => {
    let seen = 0;
    for await (const _ of await client.chat.completions.create(endlessly)) if (++seen === 5) break;
  });
  await aborting(async () => {
    const stream = await client.chat.completions.create(endlessly);
    let seen = 0;
    for await (const _ of stream) if (++seen === 5) stream.controller.abort();
  });
}

async function response() {
  const first = await client.responses.create(respond);
  assert.equal(first.output_text, ANSWER);
  const second = await client.responses.create({ ...respond, previous_response_id: first.id });
  assert(second.usage.input_tokens > first.usage.input_tokens);
}

async function response_stream_helper() {
  const events = client.responses.stream(respond);
  const deltas = (await all(events)).filter((event) => event.type === "response.output_text.delta");
  assert.equal(deltas.map((event) => event.delta).join(""), ANSWER);
  assert.equal((await events.finalResponse()).output_text, ANSWER);
}

async function response_abort() {
  await aborting(async () => {
    const asked = { model: MODEL, input: ENDLESS, max_output_tokens: 2000, stream: true };
    for await (const event of await client.responses.create(asked))
      if (event.type === "response.output_text.delta") break;
  });
}

async function models() {
  const [model, ...others] = await all(client.models.list());
  assert.deepEqual(others, []);
  assert.deepEqual(await client.models.retrieve(MODEL), model);
}

async function embeddings() {
  const input = [QUESTION, "Paris is a city.", QUESTION];
  const [first, other, same] = (await client.embeddings.create({ model: MODEL, input })).data;
  assert(near(first.embedding, same.embedding) && !near(first.embedding, other.embedding));
}

async function bad_request() {
  for (const more of [{}, { stream: true }])
    await refusal(OpenAI.BadRequestError, ...TOO_HOT, () =>
      client.chat.completions.create({ ...asked, ...more, temperature: 5 }),
    );
  await refusal(OpenAI.BadRequestError, ...TOO_HOT, () => client.responses.create({ ...respond, temperature: 5 }));
}

async function not_found() {
  const elsewhere = { ...asked, model: "nobody" };
  await refusal(OpenAI.NotFoundError, ...NO_SUCH_MODEL, () => client.chat.completions.create(elsewhere));
  await refusal(OpenAI.NotFoundError, ...NO_SUCH_MODEL, () => client.models.retrieve("nobody"));
}

await run(
  chat,
  stream,
  stream_helper,
  abort,
  response,
  response_stream_helper,
  response_abort,
  models,
  embeddings,
  bad_request,
  not_found,
);
