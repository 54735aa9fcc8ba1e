// SPDX-License-Identifier: Apache-2.0
// OpenAI's own client against the gateway: models, a chat, a streamed chat, and a wrong key. Prints what it got as JSON.
import OpenAI from "openai";

const baseURL = `${process.env.GATEWAY}/v1`;
const client = new OpenAI({ baseURL, apiKey: process.env.KEY, maxRetries: 0 });
const wanted = {
  model: "acestep/acestep-v15-turbo",
  messages: [{ role: "user", content: "<prompt>slow jazz</prompt><lyrics>la la</lyrics>" }],
  audio_config: { format: "wav", duration: 30 },
};

const models = [];
for await (const model of await client.models.list()) models.push(model.id);

const chat = await client.chat.completions.create(wanted);

let text = "";
let song = "";
let finish = null;
for await (const chunk of await client.chat.completions.create({ ...wanted, stream: true })) {
  const [{ delta, finish_reason: reason }] = chunk.choices;
  text += delta.content ?? "";
  song += delta.audio?.[0].audio_url.url ?? "";
  finish = reason ?? finish;
}

const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
const refused = await stranger.models.list().catch((error) => error);

console.log(
  JSON.stringify({
    models,
    chat: { id: chat.id, song: chat.choices[0].message.audio[0].audio_url.url.slice(0, 30), finish: chat.choices[0].finish_reason },
    stream: { text, song: song.slice(0, 30), finish },
    refused: refused.status,
  }),
);
