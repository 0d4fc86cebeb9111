// The AI SDK with its provider for servers that speak as OpenAI's does. It checks every chunk against a schema.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateText, streamText } from "ai";
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

const server = createOpenAICompatible({ name: "tokenllm", baseURL: BASE_URL, apiKey: API_KEY, includeUsage: true });
const asked = { model: server(MODEL), prompt: QUESTION, temperature: 0, maxOutputTokens: 20, maxRetries: 0 };

async function chat() {
  const answer = await generateText(asked);
  assert.equal(answer.text, ANSWER);
  assert.equal(answer.finishReason, "stop");
  assert(answer.usage.outputTokens > 0);
}

async function stream() {
  const answer = streamText(asked);
  assert.equal((await all(answer.textStream)).join(""), ANSWER);
  assert.equal(await answer.finishReason, "stop");
  assert((await answer.usage).outputTokens > 0);
}

async function abort() {
  await aborting(async () => {
    const leaving = new AbortController();
    const endlessly = { ...asked, prompt: ENDLESS, maxOutputTokens: 2000, abortSignal: leaving.signal };
    let seen = 0;
    for await (const _ of streamText(endlessly).textStream) if (++seen === 5) leaving.abort();
    assert(seen >= 5);
  });
}

async function embeddings() {
  const model = server.embeddingModel(MODEL);
  const answer = await embedMany({ model, values: [QUESTION, "Paris is a city.", QUESTION], maxRetries: 0 });
  const [first, other, same] = answer.embeddings;
  assert(near(first, same) && !near(first, other));
}

async function bad_request() {
  await refusal(APICallError, ...TOO_HOT, () => generateText({ ...asked, temperature: 5 }));
  const parts = await all(streamText({ ...asked, temperature: 5, onError: () => {} }).fullStream);
  const [failure] = parts.filter((part) => part.type === "error");
  await refusal(APICallError, ...TOO_HOT, () => Promise.reject(failure.error));
}

async function not_found() {
  await refusal(APICallError, ...NO_SUCH_MODEL, () => generateText({ ...asked, model: server("nobody") }));
}

await run(chat, stream, abort, embeddings, bad_request, not_found);
