// The official Node SDK against the service. tests/service/test_node.py starts both and sets OPENAI_BASE_URL and
// OPENAI_API_KEY, the only two things that differ from code written for OpenAI. Each test uses what those before made.
import assert from "node:assert/strict";
import test from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ maxRetries: 0, timeout: 30_000 });
const base = process.env.BASE_NAME;
const messages = [{ role: "user", content: "hello there" }];
const greedy = { model: base, temperature: 0, seed: 1 };

function jsonl(rows) {
  return Buffer.from(rows.map((row) => JSON.stringify(row)).join("\n"));
}

async function all(page) {
  const found = [];
  for await (const item of page) found.push(item);
  return found;
}

async function until(ask, ended) {
  for (const end = Date.now() + 60_000; Date.now() < end; await sleep(50)) {
    const found = await ask();
    if (ended.includes(found.status)) return found;
  }
  assert.fail(`none of ${ended} within a minute`);
}

const examples = jsonl(
  Array.from({ length: 40 }, (_, i) => ({
    prompt: `post ${i} about the ${["bat", "ice"][i % 2]}\n\n###\n\n`,
    completion: [" baseball", " hockey"][i % 2],
  })),
);
let training, job;

test("files: create, retrieve, content, list by pages", async () => {
  training = await client.files.create({ file: await toFile(examples, "train.jsonl"), purpose: "fine-tune" });
  assert.deepEqual([training.object, training.filename, training.bytes], ["file", "train.jsonl", examples.length]);
  assert.deepEqual(await client.files.retrieve(training.id), training);
  assert.equal(await (await client.files.content(training.id)).text(), examples.toString());
  const second = await client.files.create({ file: await toFile(examples, "ö – 2.jsonl"), purpose: "fine-tune" });
  assert.equal(second.filename, "ö – 2.jsonl");
  const listed = await all(client.files.list({ limit: 1, purpose: "fine-tune" })); // one file a page
  assert.deepEqual(listed.map((file) => file.id).slice(0, 2), [second.id, training.id]);
});

test("fine-tuning: create, wait, events, checkpoints, result file", async () => {
  const hyperparameters = { n_epochs: 3, batch_size: 8, learning_rate_multiplier: 10 };
  job = await client.fineTuning.jobs.create({
    model: base, training_file: training.id, suffix: "node", seed: 3, metadata: { from: "node" },
    method: { type: "supervised", supervised: { hyperparameters } },
  });
  assert.deepEqual([job.object, job.fine_tuned_model, job.seed], ["fine_tuning.job", null, 3]);
  job = await until(() => client.fineTuning.jobs.retrieve(job.id), ["succeeded", "failed", "cancelled"]);
  assert.equal(job.status, "succeeded", JSON.stringify(job.error));
  assert.match(job.fine_tuned_model, new RegExp(`^ft:${base}:local:node:\\w{8}$`));
  assert.deepEqual(job.method.supervised.hyperparameters, hyperparameters);

  const events = await all(client.fineTuning.jobs.listEvents(job.id, { limit: 4 }));
  assert.equal(events.at(-1).message, `Created fine-tuning job: ${job.id}`); // the newest come first
  const steps = events.filter((event) => event.type === "metrics").map((event) => event.data.step);
  assert.deepEqual(steps, Array.from({ length: 15 }, (_, i) => 15 - i));

  const checkpoints = await all(client.fineTuning.jobs.checkpoints.list(job.id));
  assert.deepEqual(checkpoints.map((checkpoint) => checkpoint.step_number), [15, 10, 5]);
  const results = await (await client.files.content(job.result_files[0])).text();
  assert.equal(results.trim().split("\n").length, 1 + 15); // a heading and the steps
  assert.ok((await all(client.fineTuning.jobs.list({ limit: 1 }))).some((listed) => listed.id === job.id));
});

test("models: list, retrieve", async () => {
  const names = (await all(client.models.list())).map((model) => model.id);
  assert.ok(names.includes(base) && names.includes(job.fine_tuned_model));
  assert.equal((await client.models.retrieve(job.fine_tuned_model)).object, "model");
});

test("completions: the fine-tuned model, log-probabilities, a stream", async () => {
  const prompt = "post 1 about the ice\n\n###\n\n";
  const asked = { ...greedy, model: job.fine_tuned_model, prompt, max_tokens: 4 };
  const whole = await client.completions.create({ ...asked, logprobs: 2 });
  const { text, logprobs, finish_reason } = whole.choices[0];
  assert.ok(logprobs.token_logprobs.every((value) => value <= 0) && logprobs.tokens.join("") === text);
  assert.ok(["stop", "length"].includes(finish_reason));
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  let streamed = "";
  for await (const chunk of await client.completions.create({ ...asked, stream: true })) {
    streamed += chunk.choices[0].text;
  }
  assert.equal(streamed, text);
});

test("chat: whole, streamed, and with the SDK's own stream helper", async () => {
  const asked = { ...greedy, messages, max_completion_tokens: 8 };
  const whole = await client.chat.completions.create(asked);
  assert.equal(whole.choices[0].message.role, "assistant");
  const stream = await client.chat.completions.create({
    ...asked, stream: true, stream_options: { include_usage: true },
  });
  const chunks = await all(stream);
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(chunks.at(-1).usage.total_tokens, whole.usage.total_tokens);
  assert.equal(await client.chat.completions.stream(asked).finalContent(), text);
});

test("responses: whole and streamed", async () => {
  const asked = { model: base, temperature: 0, input: "hello there", max_output_tokens: 8 };
  const whole = await client.responses.create(asked);
  assert.ok(whole.output_text.length > 0 && whole.usage.output_tokens > 0);
  const events = await all(await client.responses.create({ ...asked, stream: true }));
  const deltas = events.filter((event) => event.type === "response.output_text.delta");
  assert.equal(deltas.map((event) => event.delta).join(""), whole.output_text);
});

test("embeddings: floats, and base64 that the SDK decodes", async () => {
  const asked = { model: base, input: ["a bat", "the ice"] };
  const decoded = await client.embeddings.create(asked); // the SDK asks for base64 by itself
  const floats = await client.embeddings.create({ ...asked, encoding_format: "float" });
  for (const [i, { embedding }] of decoded.data.entries()) {
    assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-4);
    assert.ok(embedding.every((value, k) => Math.abs(value - floats.data[i].embedding[k]) < 1e-5));
  }
});

test("batches: create, wait, read the output", async () => {
  const lines = jsonl(["a", "b"].map((id) => ({
    custom_id: id, method: "POST", url: "/v1/chat/completions", body: { ...greedy, messages, max_tokens: 2 },
  })));
  const file = await client.files.create({ file: await toFile(lines, "batch.jsonl"), purpose: "batch" });
  const made = await client.batches.create({
    input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h",
  });
  const ended = ["completed", "failed", "expired", "cancelled"];
  const batch = await until(() => client.batches.retrieve(made.id), ended);
  assert.deepEqual([batch.status, batch.request_counts.completed], ["completed", 2]);
  const output = (await (await client.files.content(batch.output_file_id)).text()).trim().split("\n").map(JSON.parse);
  assert.deepEqual(output.map((line) => line.custom_id).sort(), ["a", "b"]);
  assert.ok(output.every((line) => line.response.status_code === 200));
});

test("errors: the SDK's classes with OpenAI's codes", async () => {
  const { NotFoundError, BadRequestError, AuthenticationError } = OpenAI;
  const stranger = new OpenAI({ apiKey: "wrong", maxRetries: 0 });
  const cases = [
    [() => client.files.retrieve("file-unknown"), NotFoundError, 404, null],
    [() => client.chat.completions.create({ ...greedy, model: "unknown", messages }), NotFoundError, 404,
      "model_not_found"],
    [() => client.completions.create({ ...greedy, prompt: "x", max_tokens: -1 }), BadRequestError, 400, "invalid_value"],
    [() => client.chat.completions.create({ ...greedy, messages, stream: true, tools: [{}] }), BadRequestError, 400,
      "unsupported_parameter"],
    [() => stranger.models.list(), AuthenticationError, 401, "invalid_api_key"],
  ];
  for (const [call, kind, status, code] of cases) {
    await assert.rejects(async () => call(), (error) => {
      assert.ok(error instanceof kind, `${error}`);
      assert.deepEqual([error.status, error.type], [status, "invalid_request_error"]);
      if (code) assert.equal(error.code, code);
      return error.message.length > 20 && Boolean(error.requestID);
    });
  }
});

test("deleting: a model and files", async () => {
  assert.equal((await client.models.delete(job.fine_tuned_model)).deleted, true);
  assert.deepEqual(await client.files.delete(training.id), { id: training.id, object: "file", deleted: true });
  await assert.rejects(async () => client.files.retrieve(training.id), OpenAI.NotFoundError);
});
