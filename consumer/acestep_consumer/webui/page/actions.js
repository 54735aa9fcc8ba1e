// SPDX-License-Identifier: Apache-2.0
// What can be made from a job: the same again with another seed, a new request from one of its songs, a copy to paste.

import { announce, byId, post, read, tell } from "./dom.js";
import { fillForm, newId, startAsked } from "./form.js";
import { t } from "./i18n.js";
import { problem, titleOf } from "./text.js";

// Made from a song's own words where the request gives no others.
const TAKES_OVER = ["repaint", "extend", "variation"];

// What came of it is said in the job's own row: the form may be out of sight.
function say(card, kind, text) {
  const row = byId(`job-${card.task_id}`);
  if (row) tell(row.querySelector(".said"), kind, text);
  announce(text);
}

/**
 * The request of a job as this page's server has it: the row shows a part of it. `another`: the one that makes another
 * song, with another seed. Resolves to null where it is not to be had, which is said.
 */
async function requestOf(card, another) {
  const { error, request } = await read(`/jobs/${encodeURIComponent(card.task_id)}/request${another ? "?another" : ""}`);
  if (error) say(card, "bad", problem(error));
  return error ? null : request;
}

/** Sends the same request with another seed. */
export async function another(card) {
  const request = await requestOf(card, true);
  if (request) await send(card, request);
}

/** Makes a draft's song well, from its seed and its codes. */
export const finish = (card, index) => send(card, { source_task_id: card.task_id, source_index: index, quality: "final" });

async function send(card, request) {
  const body = { ...request, task_id: newId() };
  startAsked(body.task_id);
  const { error } = await post("/jobs", body);
  if (error) say(card, "bad", problem(error));
  else say(card, "good", t("action.sent", { title: titleOf(card) }));
}

/** Puts a job's request into the form, all of it but the seed. */
export async function edit(card) {
  const request = await requestOf(card, true);
  if (request) fillForm(request);
}

/** Puts a request into the form that makes something from one of a job's songs. `more`: fields of that kind. */
export function makeFrom(card, index, kind, more = {}) {
  const { prompt, lyrics, vocal_language, audio_format } = card.request ?? {};
  const words = ["stems", "lines"].includes(kind) ? {} : { prompt: prompt || card.metas?.caption, lyrics, vocal_language };
  const source = { source_task_id: card.task_id, source_index: index };
  fillForm({ ...words, audio_format, ...source, ...more }, kind, TAKES_OVER.includes(kind) ? words : {});
}

/** A command that sends a request. Each quote in it is escaped, whoever wrote the request. */
export function curlOf(request) {
  const quoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;
  const [origin, body] = [location.origin, JSON.stringify(request)];
  return [
    `curl -X POST ${quoted(`${origin}/jobs`)}`,
    `-H ${quoted(`Origin: ${origin}`)} -H 'Content-Type: application/json'`,
    `-d ${quoted(body)}`,
  ].join(" \\\n  ");
}

/** Copies a text that is promised; null: there is none, which was said. */
async function copy(card, text) {
  // Some browsers allow it only at the click itself, before the text has come: they take a promise of it.
  const blob = async () => new Blob([(await text) ?? (await Promise.reject(new Error("no text")))], { type: "text/plain" });
  try {
    await navigator.clipboard.write([new ClipboardItem({ "text/plain": blob() })]);
    say(card, "good", t("copy.done"));
  } catch {
    // Not allowed, or the page came over plain HTTP: then it can be copied by hand.
    const found = await text;
    if (!found) return;
    byId("copy-text").value = found;
    byId("copy").showModal();
    byId("copy-text").select();
  }
}

const copyRequest = (card, write) => copy(card, requestOf(card, false).then((request) => request && write(request)));

export const copyJson = (card) => copyRequest(card, (request) => JSON.stringify(request, null, 2));

export const copyCurl = (card) => copyRequest(card, curlOf);

/** Copies the address of a song on this page; its number counts from 1. */
export const copyLink = (card, index) => copy(card, Promise.resolve(`${location.origin}/#${card.task_id}/${index + 1}`));
