// SPDX-License-Identifier: Apache-2.0
// What can be made from a job: the same again with another seed, a new request from one of its songs, a copy to paste.

import { announce, byId, post, tell } from "./dom.js";
import { fillForm, newId, startAsked } from "./form.js";
import { t } from "./i18n.js";
import { problem, titleOf } from "./text.js";

// Of the request as it was made, these belong to that one try.
const OF_ONE_TRY = ["task_id", "seed", "use_random_seed", "retake_seed"];
// Made from a song's own words where the request gives no others.
const TAKES_OVER = ["repaint", "extend", "variation"];

// What came of it is said in the job's own row: the form may be out of sight.
function say(card, kind, text) {
  const row = byId(`job-${card.task_id}`);
  if (row) tell(row.querySelector(".said"), kind, text);
  announce(text);
}

const without = (request, names) => Object.fromEntries(Object.entries(request).filter(([name]) => !names.includes(name)));

/** The request of a job, to be made another time: with another seed, and a variation with another difference. */
export function requestAgain({ request, parents, edits }) {
  const again = without(request ?? {}, OF_ONE_TRY);
  const varied = parents.find(({ field }) => field === "variation");
  if (!varied) return again;
  // A variation is asked for anew, with what its own request gave: the rest it takes over from its parent.
  const own = without(again, [...edits.map(({ field }) => field), "retake_variance"]);
  return { ...own, source_task_id: varied.task_id, source_index: varied.index, variation: request.retake_variance };
}

/** Sends the same request with another seed. */
export const another = (card) => send(card, requestAgain(card));

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
export const edit = (card) => fillForm(requestAgain(card));

/** Puts a request into the form that makes something from one of a job's songs. `more`: fields of that kind. */
export function makeFrom(card, index, kind, more = {}) {
  const { prompt, lyrics, vocal_language, audio_format } = card.request ?? {};
  const words = kind === "stems" ? {} : { prompt: prompt || card.metas?.caption, lyrics, vocal_language };
  const source = { source_task_id: card.task_id, source_index: index };
  fillForm({ ...words, audio_format, ...source, ...more }, kind, TAKES_OVER.includes(kind) ? words : {});
}

/** A command that sends the request once more. Each quote in it is escaped, whoever wrote the request. */
export function curlOf(card) {
  const quoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;
  const [origin, body] = [location.origin, JSON.stringify(card.request ?? {})];
  return [
    `curl -X POST ${quoted(`${origin}/jobs`)}`,
    `-H ${quoted(`Origin: ${origin}`)} -H 'Content-Type: application/json'`,
    `-d ${quoted(body)}`,
  ].join(" \\\n  ");
}

async function copy(card, text) {
  try {
    await navigator.clipboard.writeText(text);
    say(card, "good", t("copy.done"));
  } catch {
    // Not allowed, or the page came over plain HTTP: then it can be copied by hand.
    byId("copy-text").value = text;
    byId("copy").showModal();
    byId("copy-text").select();
  }
}

export const copyJson = (card) => copy(card, JSON.stringify(card.request ?? {}, null, 2));

export const copyCurl = (card) => copy(card, curlOf(card));
