// SPDX-License-Identifier: Apache-2.0
// The form for new requests. What it has no control for, such as a LoRA of a request that is edited, is listed and sent.

import { byId, make, post, setPairs, setText, tell } from "./dom.js";
import { localize, onLanguage, t } from "./i18n.js";
import { capitalized, codes, labelled, problem, ruled } from "./text.js";

const WORDS = ["prompt", "lyrics", "audio_duration", "batch_size", "audio_format", "vocal_language", "bpm", "key_scale"];
const MORE = ["inference_steps", "candidates", "keep", "model", "seed", "thinking", "timestamps"];
const SOURCE = ["source_task_id", "source_index"];
// What is made from a song -> its controls, and the fields that say so.
const KINDS = {
  new: { controls: [], fixed: {} },
  cover: { controls: ["audio_cover_strength"], fixed: { task_type: "cover" } },
  repaint: { controls: ["repainting_start", "repainting_end"], fixed: { task_type: "repaint" } },
  extend: { controls: ["extend_left_s", "extend_right_s"], fixed: {} },
  variation: { controls: ["variation"], fixed: {} },
  stems: { controls: [], fixed: { stems: true } },
};
// Fields of a request that another control stands for.
const SHOWN_BY = { task_type: "kind", stems: "kind", quality: "draft" };
const FIELDS = [...WORDS, ...MORE, ...SOURCE, ...Object.values(KINDS).flatMap(({ controls }) => controls)];
const DEFAULTS = { audio_format: "mp3" };
// What a kind begins with where none of its controls has a value: without one there is nothing to make.
const BEGINS_WITH = { variation: { variation: "0.3" }, extend: { extend_right_s: "30" } };
// Needs the words of neither: they come from the song.
const WITHOUT_WORDS = ["stems", "extend", "variation", "repaint"];

const form = byId("ask");
const control = (name) => form.elements[name];
let extra = {};
let inherited = {};
let baseModel = "";
let orderId = "";
let countdown = 0;
let isAway = () => false;
let titleOfSource = () => "";
const asked = [];

// Not randomUUID: that is missing when the page comes over plain HTTP from another machine.
export const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Calls `listener(taskId)` before a request is sent from this page. */
export const onAsked = (listener) => asked.push(listener);

export const startAsked = (taskId) => asked.forEach((listener) => listener(taskId));

const isKind = (kind) => Object.hasOwn(KINDS, kind);

function kindOf(request) {
  if (!request.source_task_id) return "new";
  if (request.stems) return "stems";
  if (request.variation) return "variation";
  if (request.extend_left_s || request.extend_right_s) return "extend";
  return isKind(request.task_type) ? request.task_type : "new";
}

const fieldsOf = (kind) => [...WORDS, ...MORE, ...(kind === "new" ? [] : [...SOURCE, ...KINDS[kind].controls])];

/**
 * Fills the form with a request. `kind`: what is made from its source. `words`: those that the song has anyway, and that
 * are sent only if they are changed.
 */
export function fillForm(request, kind = kindOf(request), words = {}) {
  control("kind").value = kind;
  inherited = words;
  for (const name of FIELDS) {
    const field = control(name);
    if (field.type === "checkbox") field.checked = Boolean(request[name]);
    else field.value = request[name] ?? DEFAULTS[name] ?? "";
  }
  control("draft").checked = request.quality === "draft";
  if (kind !== "new") control("source_index").value = Number(request.source_index ?? 0) + 1;
  // Stems take a base model.
  if (kind === "stems" && !request.model) control("model").value = baseModel;
  // Ogg and Opus are one format; the list has one of them.
  if (request.audio_format === "ogg") control("audio_format").value = "opus";
  const quality = request.quality === "draft" ? ["quality"] : [];
  const shown = [...fieldsOf(kind), ...Object.keys(KINDS[kind].fixed), "task_id", ...quality, ...(kind === "new" ? [] : ["task_type"])];
  extra = Object.fromEntries(Object.entries(request).filter(([name]) => !shown.includes(name)));
  if (MORE.concat("vocal_language", "bpm", "key_scale").some((name) => request[name])) byId("more").open = true;
  orderId = newId();
  mark([]);
  answer("", "");
  showKind();
  showExtra();
  const { controls } = KINDS[kind];
  control(controls.find((name) => control(name).value) ?? controls[0] ?? "prompt").focus();
}

function readForm() {
  const kind = control("kind").value;
  const body = { ...extra, ...KINDS[kind].fixed, task_id: orderId };
  if (control("draft").checked) body.quality = "draft";
  for (const name of fieldsOf(kind)) {
    const field = control(name);
    if (field.closest("[data-unavailable]")) continue;
    if (field.type === "checkbox") {
      if (field.checked && !field.disabled) body[name] = true;
    } else if (field.value.trim() && field.value !== inherited[name]) body[name] = field.value.trim();
  }
  if (kind !== "new") body.source_index = Number(control("source_index").value || 1) - 1;
  return body;
}

function showKind() {
  const kind = control("kind").value;
  if (KINDS[kind].controls.every((name) => !control(name).value)) {
    for (const [name, value] of Object.entries(BEGINS_WITH[kind] ?? {})) control(name).value = value;
  }
  byId("source").hidden = kind === "new";
  for (const row of byId("source").querySelectorAll("[data-kind]")) row.hidden = row.dataset.kind !== kind;
  showSource();
}

export function showSource() {
  const title = titleOfSource(control("source_task_id").value.trim());
  byId("source-title").hidden = !title;
  setText(byId("source-title"), title);
}

function showExtra() {
  byId("extra").hidden = !Object.keys(extra).length;
  setPairs(byId("extra").querySelector("dl"), Object.entries(extra).map(([name, value]) => [labelled(name), name === "audio_code_string" ? codes(value) : value]));
}

/** The control that shows a field of the request now; null: none. */
function controlOf(name) {
  const found = SHOWN_BY[name] ?? name;
  if (![...fieldsOf(control("kind").value), "kind", "draft"].includes(found)) return null;
  return control(found).closest("[data-unavailable]") ? null : control(found);
}

/** Writes at each field what is wrong with it: `[[field, sentence], ...]`. The first one gets the focus. */
function mark(problems) {
  for (const field of form.querySelectorAll("[aria-invalid]")) unmark(field);
  for (const each of byId("extra").querySelectorAll(".wrong")) each.remove();
  const wrong = problems.map(([name, text]) => [name, text, controlOf(name)]);
  for (const [name, text, field] of wrong) {
    if (field) markField(field, text);
    else if (Object.hasOwn(extra, name)) byId("extra").querySelector("dl").after(make("p", { className: "wrong", textContent: `${labelled(name)}: ${text}` }));
  }
  const first = wrong.find(([, , field]) => field)?.[2];
  if (byId("more").contains(first ?? null)) byId("more").open = true;
  first?.focus();
}

function markField(field, text) {
  const label = field.closest("label");
  label.querySelector(".wrong")?.remove();
  // Not a part of the label: it is read as the field's description.
  const note = make("span", { className: "wrong", id: `wrong-${field.name}`, ariaHidden: "true", textContent: capitalized(text) });
  label.append(note);
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", `${field.dataset.described ?? ""} ${note.id}`.trim());
}

function unmark(field) {
  field.closest("label")?.querySelector(".wrong")?.remove();
  field.removeAttribute("aria-invalid");
  if (field.dataset.described) field.setAttribute("aria-describedby", field.dataset.described);
  else field.removeAttribute("aria-describedby");
}

function answer(kind, text) {
  clearInterval(countdown);
  tell(byId("answer"), kind, text);
}

// A date in an alert would be read out each second: the line is an alert once, the count is not.
function countDown(seconds, text) {
  const line = byId("answer");
  const until = Date.now() + seconds * 1000;
  answer("wait", "");
  line.hidden = false;
  const count = make("span", { ariaLive: "off" });
  line.append(`${text} `, count);
  const step = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    setText(count, left > 0 ? t("answer.again_in", { seconds: left }) : t("answer.again_now"));
    if (left <= 0) clearInterval(countdown);
  };
  step();
  countdown = setInterval(step, 1000);
}

function refuse(error) {
  if (error.code === "queue_full") countDown(error.retry_after_s, problem(error));
  else if (error.fields) {
    const problems = error.fields.map(({ field, rule }) => [field, ruled(rule)]);
    answer("bad", problems.map(([field, rule]) => `${labelled(field)}: ${rule}`).join("\n"));
    mark(problems);
  } else answer("bad", problem(error));
}

function accept(taskId) {
  answer("good", t("answer.accepted"));
  byId("answer").append(" ", make("a", { href: `#${taskId}`, textContent: t("answer.see") }));
}

function wrongFields() {
  const kind = control("kind").value;
  const wrong = fieldsOf(kind).filter((name) => !control(name).checkValidity());
  if (!WITHOUT_WORDS.includes(kind) && !control("prompt").value.trim() && !extra.sample_query) wrong.unshift("prompt");
  if (kind !== "new" && !control("source_task_id").value.trim()) wrong.unshift("source_task_id");
  return wrong;
}

const OWN_RULES = { prompt: "answer.no_prompt", source_task_id: "answer.no_source" };

const ruleOf = (name) => (OWN_RULES[name] ? t(OWN_RULES[name]) : control(name).validationMessage);

async function send(event, showJob) {
  event.preventDefault();
  const wrong = wrongFields();
  mark(wrong.map((name) => [name, ruleOf(name)]));
  if (wrong.length) {
    answer("bad", wrong.map((name) => (OWN_RULES[name] ? ruleOf(name) : `${labelled(name)}: ${ruleOf(name)}`)).join("\n"));
    return;
  }
  const button = form.querySelector(".main");
  const focused = document.activeElement;
  button.disabled = true;
  startAsked(orderId);
  if (isAway()) answer("wait", t("answer.away"));
  const { error, task_id: taskId } = await post("/jobs", readForm());
  button.disabled = false;
  if (focused === button) button.focus();
  if (error) {
    refuse(error);
    return;
  }
  orderId = newId();
  accept(taskId);
  // In one column, the job is far below the form.
  if (getComputedStyle(document.querySelector("main")).gridTemplateColumns.split(" ").length < 2) showJob(taskId);
}

/** Thinking needs a language model: `hasLm` is false where no worker has one, and null where that is not known. */
export function showWorkers({ lm, models }) {
  baseModel = models.find((name) => name.includes("base")) ?? "";
  control("thinking").disabled = lm === false;
  byId("no-lm").hidden = lm !== false;
  const listed = [...byId("models").options].map(({ value }) => value);
  for (const value of models) if (!listed.includes(value)) byId("models").append(make("option", { value }));
}

function showLanguages(codes) {
  const select = control("vocal_language");
  const chosen = select.value;
  const names = new Intl.DisplayNames([document.documentElement.lang], { type: "language", fallback: "code" });
  const named = codes.filter((code) => code !== "unknown").map((code) => [code, names.of(code)]);
  named.sort(([, one], [, other]) => one.localeCompare(other));
  const first = make("option", { value: "" });
  first.dataset.t = "form.language_default";
  select.replaceChildren(localize(first), ...named.map(([value, textContent]) => make("option", { value, textContent })));
  select.value = chosen;
}

/** Hides the controls of fields that requests of the server's version do not have. */
async function readOptions() {
  const found = await fetch("/options").then((answer) => answer.json()).catch(() => null);
  if (!found) return;
  const present = new Set(found.fields);
  for (const element of document.querySelectorAll("[data-field]")) hideUnless(present, element);
  for (const { content } of document.querySelectorAll("template")) {
    for (const element of content.querySelectorAll("[data-field]")) hideUnless(present, element);
  }
  showLanguages(found.languages);
  onLanguage(() => showLanguages(found.languages));
}

function hideUnless(fields, element) {
  element.toggleAttribute("data-unavailable", !fields.has(element.dataset.field));
  if (element.tagName === "OPTION") element.hidden = element.disabled = !fields.has(element.dataset.field);
}

/** Resolves when it is known which controls there are. `page`: `isAway()`, `showJob(id)`, `titleOf(id)`. */
export async function startForm(page) {
  isAway = page.isAway;
  titleOfSource = page.titleOf;
  orderId = newId();
  form.addEventListener("submit", (event) => send(event, page.showJob));
  // Other words are another job. The same words sent again, after an answer that was lost, are the same.
  form.addEventListener("input", ({ target }) => {
    orderId = newId();
    unmark(target);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  control("kind").addEventListener("change", () => {
    inherited = {};
    mark([]);
    showKind();
  });
  control("source_task_id").addEventListener("input", showSource);
  byId("extra").querySelector("button").addEventListener("click", () => {
    extra = {};
    showExtra();
    control("prompt").focus();
  });
  onLanguage(() => {
    showExtra();
    answer("", "");
    mark([]);
  });
  showKind();
  await readOptions();
}
