// SPDX-License-Identifier: Apache-2.0
// Helpers for elements and requests. Whatever comes from outside is written with textContent: nothing becomes markup.

import { t } from "./i18n.js";

export const byId = (id) => document.getElementById(id);

export const copyOf = (template) => byId(template).content.firstElementChild.cloneNode(true);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const setLabel = (element, text) => element.setAttribute("aria-label", text);

/** Runs `build` and replaces the children with what it returns, unless `value` is what it was the last time. */
export function setChildren(element, value, build) {
  const key = JSON.stringify(value);
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  element.replaceChildren(...build());
}

export const setList = (list, texts) =>
  setChildren(list, texts, () => texts.map((textContent) => make("li", { dir: "auto", textContent })));

export function setPairs(list, pairs) {
  const items = pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined);
  setChildren(list, items, () =>
    items.flatMap(([name, value]) => [
      make("dt", { textContent: name }),
      make("dd", { dir: "auto", textContent: shown(value) }),
    ]),
  );
}

export function shown(value) {
  if (value === null || value === undefined) return t("nothing");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

export function announce(text) {
  byId("announce").textContent = text;
}

/** Shows an answer below a form. An empty text hides the line. */
export function tell(line, kind, text) {
  line.hidden = !text;
  line.dataset.kind = kind;
  setText(line, text);
}

/** Sends a request to this page's server. Resolves to its JSON, or to `{error: {code, message}}`; never rejects. */
export const post = (path, body = {}) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** As `post`, for a file. `onProgress(share)`: called as it is sent. `signal`: aborts it, which resolves to null. */
export function upload(path, file, onProgress, signal) {
  return new Promise((resolve) => {
    const request = new XMLHttpRequest(); // fetch tells nothing of what has been sent
    request.open("POST", path);
    request.responseType = "json";
    request.upload.addEventListener("progress", ({ loaded, total }) => onProgress(total ? loaded / total : 0));
    request.addEventListener("load", () => resolve(request.response ?? { error: { code: "http", message: `HTTP ${request.status}` } }));
    request.addEventListener("error", () => resolve({ error: { code: "away", message: t("server.away") } }));
    request.addEventListener("abort", () => resolve(null));
    signal.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}

/** As `post`, for what only reads. */
export const read = (path) => ask(path, {});

async function ask(path, options) {
  try {
    const answer = await fetch(path, options);
    const text = await answer.text();
    const isJson = answer.headers.get("Content-Type")?.startsWith("application/json");
    if (isJson) {
      const found = JSON.parse(text);
      return answer.ok || found.error ? found : { error: { code: "http", message: text.trim() } };
    }
    return { error: { code: "http", message: text.trim() || `HTTP ${answer.status}` } };
  } catch {
    return { error: { code: "away", message: t("server.away") } };
  }
}
