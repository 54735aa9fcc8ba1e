// SPDX-License-Identifier: Apache-2.0
// Texts about jobs: titles, times, sizes, progress, adjustments and errors.

import { shown } from "./dom.js";
import { currentLanguage, known, said, t, tn } from "./i18n.js";

const TITLE_LETTERS = 160;

export const isEnded = (card) => card.state !== "waiting" && card.state !== "running";

function firstLine(text) {
  const letters = [...text.trim().split("\n", 1)[0]];
  return letters.length > TITLE_LETTERS ? `${letters.slice(0, TITLE_LETTERS).join("").trimEnd()}…` : letters.join("");
}

/** What a job is called by its own words; an empty text: it has none. */
export const wordsIn = ({ request, metas }) => firstLine(request?.prompt || metas?.caption || request?.sample_query || "");

export const titleOf = (card) => wordsIn(card) || titleByParent(card) || t("job.untitled", { id: shortId(card.task_id) });

const shortId = (taskId) => taskId.slice(0, 24);

let wordsOf = () => "";

/** `lookup(taskId)` returns the words of a job that is shown, or an empty text. */
export function setWordsOf(lookup) {
  wordsOf = lookup;
}

// Field that makes something from a song -> what is made. What has no field of its own is named by its task.
const MADE_BY = { stems: "stems", variation: "variation", extend_left_s: "extend", extend_right_s: "extend", replace_lines: "repaint" };

// A job without words, such as stems, is called by the job that it is made from: one step, since ids may run in a circle.
function titleByParent({ parents, request }) {
  const [parent] = parents;
  const taskId = parent?.task_id ?? request?.source_task_id;
  if (typeof taskId !== "string") return "";
  const title = wordsOf(taskId) || shortId(taskId);
  const made = MADE_BY[parent?.field] ?? MADE_BY[Object.keys(MADE_BY).find((name) => request?.[name])] ?? request?.task_type;
  return known(`title.${made}`, { title }) ?? t("title.other", { title });
}

export const songName = (card, index) => {
  const track = card.songs[index]?.track;
  if (track) return track;
  return card.songs.length > 1 ? t("song.of", { number: index + 1, count: card.songs.length }) : t("song.only");
};

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

export function spoken(seconds) {
  const whole = Math.round(seconds);
  if (whole < 90) return t("time.s", { number: whole });
  const minutes = Math.round(whole / 60);
  return minutes < 90 ? t("time.min", { number: minutes }) : t("time.h", { number: (minutes / 60).toFixed(1) });
}

export function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export const score = (value) => (typeof value === "number" ? value.toFixed(2) : "–");

export function factsOf(song) {
  const channels = { 1: t("song.mono"), 2: t("song.stereo") }[song.channels] ?? tn("song.channels", song.channels);
  return [
    song.format.toUpperCase(),
    `${song.sample_rate / 1000} kHz ${channels}`,
    size(song.bytes),
    t("song.seed", { seed: song.seed }),
    ...(song.lyric_score === null || song.lyric_score === undefined ? [] : [t("song.lyric_score", { score: score(song.lyric_score) })]),
  ].join(" · ");
}

/** What a waiting or running job does now. `isAway`: the broker is out of reach. */
export function doing({ card, heardAt, place }, isAway) {
  if (card.state === "waiting") return waiting(card, place, isAway);
  const parts = [card.stopping ? t("doing.stopping") : (known(`stage.${card.stage}`) ?? (card.stage || t("stage.started")))];
  if (card.progress > 0) parts.push(`${Math.floor(card.progress * 100)}%`);
  if (card.remaining_s !== null) {
    const left = card.remaining_s - (Date.now() - heardAt) / 1000;
    parts.push(left >= 1 ? t("doing.left", { time: spoken(left) }) : t("doing.soon"));
  }
  if (card.attempt > 1) parts.push(t("doing.try", { number: card.attempt }));
  return parts.join(" · ");
}

function waiting(card, place, isAway) {
  if (card.stopping) return t("waiting.cancelling");
  if (card.sending) return isAway ? t("waiting.unsent") : t("waiting.sending");
  if (card.unsure) return t("waiting.unsure");
  if (!place) return t("waiting.queued");
  const parts = [place.place > 1 ? t("waiting.place", { number: place.place }) : t("waiting.next")];
  if (place.expected_s !== null) {
    const left = Math.max(1, place.expected_s - (Date.now() - place.at) / 1000);
    parts.push(t("waiting.ready_in", { time: spoken(left) }));
  }
  return parts.join(" · ");
}

/** A measure of a score, with its unit: an operator's table may have others. */
export const measureName = (name) => known(`measure.${name}`) ?? labelled(name);

/** The value of a measure: some are shares of a thousandth, others tens of dB. */
export const measureValue = (value) => (typeof value === "number" ? String(Number(value.toPrecision(3))) : "–");

export const labelled = (field) => known(`field.${field}`) ?? field.replaceAll("_", " ");

/** A rule of the server as a sentence for a person: fields by the names that they have on the page. */
export const ruled = (rule) => said(rule).replace(/\b[a-z]+(?:_[a-z]+)+\b/g, (field) => t("quoted", { text: labelled(field) }));

// Not names of fields: these are what a program would send.
export const capitalized = (text) => (/^\w+(_| = )/.test(text) ? text : text.charAt(0).toUpperCase() + text.slice(1));

/** What is shown of audio codes: how many there are. */
export const codes = (text) => tn("fact.codes", text.match(/audio_code_\d/g)?.length ?? 0);

function adjusted({ field, requested, applied, reason }) {
  const values = { field: labelled(field), requested: shown(requested), applied: shown(applied), reason: said(reason) };
  return capitalized(t("note.adjusted", values));
}

export function notesOf({ adjustments, warnings, model }) {
  const notes = [...adjustments.map(adjusted), ...warnings.map((warning) => capitalized(said(warning)))];
  if (model?.fallback && !adjustments.some(({ field }) => field === "model")) {
    notes.unshift(t("note.model", { requested: shown(model.requested), used: model.used }));
  }
  return notes;
}

export function detailed(detail) {
  const { field, value, rule, ...rest } = detail;
  if (field && rule) return `${field} = ${shown(value)}: ${rule}`;
  return Object.entries(field ? detail : rest).map(([name, each]) => `${name}: ${shown(each)}`).join(", ");
}

// What is wrong, in the reader's language as far as the tables have it; in English as the worker says it.
function wrong({ details, message }) {
  const listed = currentLanguage() !== "en" && details.length > 0 && details.every(({ field, rule, reason }) => field && (rule || reason));
  if (!listed) return said(message);
  const sentence = ({ field, value, requested, rule, reason }) =>
    t("reason.field", { field: labelled(field), value: shown(value ?? requested), rule: said(rule ?? reason) });
  return details.map(sentence).join(t("queue.comma"));
}

export function reasonOf({ error }) {
  if (!error) return "";
  const name = known(`code.${error.code}`);
  const reason = capitalized(wrong(error));
  const sentence = (name ? t("reason.coded", { name, reason }) : reason).replace(/([^.!?。])$/, `$1${t("reason.end")}`);
  const tries = error.attempts > 1 ? ` ${tn("reason.tries", error.attempts)}` : "";
  const hope = error.retryable ? ` ${t("reason.retry")}` : "";
  return `${sentence}${tries}${hope} (${error.code})`;
}

/** The text for an error of this page's server, in the reader's language where its code is known. */
export function problem(error) {
  return known(`error.${error.code}`) ?? capitalized(said(error.message));
}
