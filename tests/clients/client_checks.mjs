// client_checks.py, for the scripts of the clients that run on Node.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";

const [server, apiKey] = process.argv.slice(2);
export const API_KEY = apiKey;
export const BASE_URL = `${server}/v1`;
export const MODEL = "smollm2-135m-instruct";
export const QUESTION = "What is the capital of France?";
export const ANSWER = "The capital of France is Paris.";
export const ENDLESS = "Write a very long story about the sea, with many chapters.";
export const TOO_HOT = [400, "temperature: input should be less than or equal to 2 (got 5"];
export const NO_SUCH_MODEL = [404, "the model 'nobody' does not exist"];
const FREED_WITHIN_MS = 5000;
const RUNNING = "tokenllm_requests_running";
const ACTIVE = "tokenllm_kv_tokens_active";
const ABORTED = 'tokenllm_requests_finished_total{reason="abort"}';

/** One after the other. Those that passed are told by name; one that fails ends the script with its trace. */
export async function run(...checks) {
  for (const check of checks) {
    await check();
    console.log(check.name);
  }
}

/** Soon after the reader of a stream has left, the server has noticed, and nothing is held for anybody. */
export async function aborting(leave) {
  const before = (await metrics())[ABORTED];
  await leave();
  const deadline = performance.now() + FREED_WITHIN_MS;
  for (let now; (now = await metrics())[ABORTED] !== before + 1 || now[RUNNING] || now[ACTIVE]; ) {
    const held = `${now[ABORTED] - before} aborted, ${now[RUNNING]} run, ${now[ACTIVE]} tokens`;
    assert(performance.now() < deadline, held);
    await sleep(20);
  }
}

/** The client throws just this, and tells the server's words. */
export async function refusal(kind, status, words, deed) {
  await assert.rejects(deed, (error) => {
    assert(error instanceof kind, error);
    assert.equal(error.status ?? error.statusCode, status);
    assert(error.message.includes(words), error.message);
    return true;
  });
}

/** All of a stream. */
export async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

/** Whether two vectors are the same, but for rounding. */
export function near(one, other) {
  return one.length === other.length && one.every((x, i) => Math.abs(x - other[i]) < 1e-3);
}

async function metrics() {
  const answer = await fetch(`${server}/metrics`, { headers: { authorization: `Bearer ${API_KEY}` } });
  const lines = (await answer.text()).split("\n").filter((line) => line && !line.startsWith("#"));
  const cut = (line) => [line.slice(0, line.lastIndexOf(" ")), Number(line.slice(line.lastIndexOf(" ")))];
  return Object.fromEntries(lines.map(cut));
}
