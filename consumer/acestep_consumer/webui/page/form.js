// SPDX-License-Identifier: Apache-2.0
// The form for new requests. What it has no control for, such as a field of a request that is edited, is listed and sent.

import { byId, make, post, setPairs, setText, tell } from "./dom.js";
import { BY_ID, BY_ID_ALONE, FIELDS, fieldsOf, isPaired, join, KINDS, kindOf, MORE, SHOWN_BY, split, WITHOUT_WORDS } from "./fields.js";
import { localize, onLanguage, t } from "./i18n.js";
import { capitalized, codes, labelled, problem, ruled } from "./text.js";
import { dropUpload, isUploading, setLargest, startUpload } from "./upload.js";

const DEFAULTS = { audio_format: "mp3" };
// What a kind begins with where none of its controls has a value: without one there is nothing to make.
const BEGINS_WITH = { variation: { variation: "0.3" }, extend: { extend_right_s: "30" } };

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

/**
 * Fills the form with a request. `kind`: what is made from its source. `words`: those that the song has anyway, and that
 * are sent only if they are changed.
 */
export function fillForm(request, kind = kindOf(request), words = {}) {
  const { values, rest } = split(request);
  control("kind").value = kind;
  inherited = words;
  for (const name of FIELDS) {
    const field = control(name);
    if (field.type === "checkbox") field.checked = Boolean(values[name]);
    else field.value = values[name] ?? DEFAULTS[name] ?? "";
  }
  control("draft").checked = values.quality === "draft";
  if (kind !== "new") control("source_index").value = Number(values.source_index ?? 0) + 1;
  // Stems take a base model.
  if (kind === "stems" && !values.model) control("model").value = baseModel;
  // Ogg and Opus are one format; the list has one of them.
  if (values.audio_format === "ogg") control("audio_format").value = "opus";
  const quality = values.quality === "draft" ? ["quality"] : [];
  const shown = [...fieldsOf(kind), ...Object.keys(KINDS[kind].fixed), "task_id", ...quality, ...(kind === "new" ? [] : ["task_type"])];
  extra = { ...rest, ...Object.fromEntries(Object.entries(values).filter(([name]) => !shown.includes(name))) };
  if (MORE.concat("vocal_language", "bpm", "key_scale", "time_signature").some((name) => values[name])) byId("more").open = true;
  orderId = newId();
  mark([]);
  answer("", "");
  dropUpload();
  showKind();
  showExtra();
  const { controls } = KINDS[kind];
  control(controls.find((name) => control(name).value) ?? controls[0] ?? "prompt").focus();
}

const readForm = () => ({ ...extra, ...readControls(), task_id: orderId });

/** The fields that the controls give. */
function readControls() {
  const kind = control("kind").value;
  const given = {};
  for (const name of fieldsOf(kind)) {
    const field = control(name);
    if (field.closest("[data-unavailable]")) continue;
    if (field.type === "checkbox") {
      if (field.checked && !field.disabled) given[name] = true;
    } else if (field.value.trim() && field.value !== inherited[name]) given[name] = field.value.trim();
  }
  if (BY_ID_ALONE.includes(kind) || given.source_task_id) delete given.src_audio_path;
  if (given.source_task_id) given.source_index = Number(control("source_index").value || 1) - 1;
  else for (const name of BY_ID) delete given[name];
  const quality = control("draft").checked ? { quality: "draft" } : {};
  return { ...KINDS[kind].fixed, ...quality, ...join(given) };
}

/** The song is made from a file that was uploaded, and not from what was named before it. */
function takeUpload(address) {
  // The kind may be another one by now, which takes no file.
  if (!BY_ID_ALONE.includes(control("kind").value)) for (const name of BY_ID) control(name).value = "";
  control("src_audio_path").value = address;
  orderId = newId();
  mark([]);
  showSource();
}

/** Adds the field that is named by hand to those that are sent. */
function addField() {
  const [name, value] = ["extra_name", "extra_value"].map((each) => control(each).value.trim());
  if (!name || !value) return;
  extra = { ...extra, [name]: structured(value) };
  for (const each of ["extra_name", "extra_value"]) control(each).value = "";
  showExtra();
}

// As `submit --set` reads it: text, or a JSON object or list.
function structured(value) {
  if (!/^[[{]/.test(value)) return value;
  try {
    return JSON.parse(value);
  } catch {
    return value; // such as lyrics, which begin with [verse]
  }
}

function showKind() {
  const kind = control("kind").value;
  if (KINDS[kind].controls.every((name) => !control(name).value)) {
    for (const [name, value] of Object.entries(BEGINS_WITH[kind] ?? {})) control(name).value = value;
  }
  byId("source").hidden = kind === "new";
  for (const row of byId("source").querySelectorAll("[data-kind]")) row.hidden = !row.dataset.kind.split(" ").includes(kind);
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
  if (![...fieldsOf(control("kind").value), "kind", "draft", "extra_name", "extra_value"].includes(found)) return null;
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

// Controls, and the string that says what is wrong with them beside what the browser knows.
function ownProblems(kind) {
  const given = (name) => control(name).value.trim();
  const found = {};
  const takesAudio = kind !== "new" && !BY_ID_ALONE.includes(kind);
  const byAddress = takesAudio && given("src_audio_path");
  if (takesAudio && isUploading()) found.src_audio_path = "answer.uploading";
  else if (kind !== "new" && !given("source_task_id") && !byAddress) found.source_task_id = "answer.no_source";
  else if (kind !== "new" && given("source_task_id") && byAddress) found.src_audio_path = "answer.two_sources";
  if (!WITHOUT_WORDS.includes(kind) && !given("prompt") && !extra.sample_query) found.prompt = "answer.no_prompt";
  if (kind === "lines" && !isPaired(control("lines_before").value, control("lines_after").value)) found.lines_after = "answer.unpaired";
  else if (kind === "lines" && !extra.replace_lines && !readForm().replace_lines) found.lines_after = "answer.no_lines";
  return { ...found, ...namedProblem() };
}

/** What is wrong with the field that is named by hand. */
function namedProblem() {
  const [name, value] = ["extra_name", "extra_value"].map((each) => control(each).value.trim());
  if (Boolean(name) !== Boolean(value)) return { [name ? "extra_value" : "extra_name"]: "answer.half_field" };
  // It would be listed, and the form's own value sent.
  const isSet = name === "task_id" || Object.hasOwn(readControls(), name);
  return isSet ? { extra_name: "answer.set_already" } : {};
}

/** `[[name, sentence, whether it stands alone], ...]` of the controls that are wrong. */
function wrongFields() {
  const kind = control("kind").value;
  const own = ownProblems(kind);
  const invalid = fieldsOf(kind).filter((name) => !own[name] && !control(name).checkValidity());
  return [...Object.entries(own).map(([name, key]) => [name, t(key), true]), ...invalid.map((name) => [name, control(name).validationMessage, false])];
}

async function send(event, showJob) {
  event.preventDefault();
  const wrong = wrongFields();
  mark(wrong);
  if (wrong.length) {
    answer("bad", wrong.map(([name, rule, alone]) => (alone ? rule : `${labelled(name)}: ${rule}`)).join("\n"));
    return;
  }
  addField();
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
  for (const name of ["thinking", "use_format"]) control(name).disabled = lm === false;
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
  setLargest(found.upload_bytes ?? Infinity);
  const present = new Set(found.fields);
  for (const element of document.querySelectorAll("[data-field]")) hideUnless(present, element);
  for (const { content } of document.querySelectorAll("template")) {
    for (const element of content.querySelectorAll("[data-field]")) hideUnless(present, element);
  }
  byId("fields").replaceChildren(...found.fields.map((value) => make("option", { value })));
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
  startUpload(takeUpload);
  byId("extra-add").addEventListener("click", () => {
    const wrong = Object.entries(namedProblem());
    mark(wrong.map(([name, key]) => [name, t(key)]));
    if (wrong.length) return;
    orderId = newId();
    addField();
    control("extra_name").focus();
  });
  byId("extra").querySelector("button").addEventListener("click", () => {
    orderId = newId();
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
