// SPDX-License-Identifier: Apache-2.0
// The language of the page: a table of strings each, chosen by the reader, else by the browser.

import { load, save } from "./store.js";
import en from "./strings.en.js";
import ja from "./strings.ja.js";

const TABLES = { en, ja };
const ATTRIBUTES = { tLabel: "aria-label", tPlaceholder: "placeholder" };
const listeners = [];
let language = "en";

export const currentLanguage = () => language;

/** Returns a string of the table; `{name}` in it is replaced with the value of that name. */
export function t(key, values = {}) {
  return TABLES[language][key].replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}

/** As `t`, by number: `key.one` or `key.other`. */
export function tn(key, number, values = {}) {
  const form = new Intl.PluralRules(language).select(number) === "one" ? "one" : "other";
  return t(`${key}.${form}`, { number, ...values });
}

/** Returns the string, or null where the table has none: for words that come from a worker. */
export const known = (key, values) => (Object.hasOwn(TABLES[language], key) ? t(key, values) : null);

// The English strings that workers and the server write, each with what varies in it.
const SAID = Object.entries(en).filter(([key]) => key.startsWith("said.")).map(([key, text]) => {
  const fixed = text.split(/\{\w+\}/).map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const names = [...text.matchAll(/\{(\w+)\}/g)].map(([, name]) => name);
  return { key, names, pattern: new RegExp(`^${fixed.join("(.*?)")}$`, "s") };
});

/** A sentence of a worker or of the server, which is English, in the reader's language where the tables have it. */
export function said(text) {
  if (language === "en") return text;
  for (const { key, names, pattern } of SAID) {
    const found = pattern.exec(text);
    if (found) return t(key, Object.fromEntries(names.map((name, index) => [name, said(found[index + 1])])));
  }
  return text;
}

/** Writes the strings of an element and of what is in it. */
export function localize(root) {
  for (const element of [root, ...root.querySelectorAll("*")]) {
    const { t: key } = element.dataset;
    if (key) element.textContent = t(key);
    for (const [name, attribute] of Object.entries(ATTRIBUTES)) {
      if (element.dataset[name]) element.setAttribute(attribute, t(element.dataset[name]));
    }
  }
  return root;
}

/** Calls `listener` after each change of the language. */
export const onLanguage = (listener) => listeners.push(listener);

function use(wanted) {
  language = wanted;
  document.documentElement.lang = wanted;
  document.title = `${t("title")} · acestep-consumer`;
  localize(document.body);
  for (const listener of listeners) listener();
}

/** Starts with the reader's language and follows the select element. */
export function startLanguage(select) {
  const wished = [load("language", ""), ...navigator.languages.map((each) => each.slice(0, 2))];
  const first = wished.find((each) => Object.hasOwn(TABLES, each)) ?? "en";
  select.value = first;
  select.addEventListener("change", () => {
    save("language", select.value);
    use(select.value);
  });
  use(first);
}
