// SPDX-License-Identifier: Apache-2.0
// Shortcuts: one key each, off while a field has the focus, and for whoever turns them off.

import { byId, make } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { starCurrent } from "./list.js";
import { toggleLyrics } from "./lyrics.js";
import { current, move, nextVersion, position, seek, SEEK_S, switchVersion, toggle, toggleLoop } from "./player.js";
import { load, save } from "./store.js";

// Key -> the string that says what it does, and the act.
const KEYS = {
  k: ["keys.toggle", toggle],
  " ": ["keys.toggle", toggle],
  ArrowLeft: ["keys.back", () => seek(position() - SEEK_S)],
  ArrowRight: ["keys.forward", () => seek(position() + SEEK_S)],
  n: ["keys.next", () => move(1)],
  p: ["keys.previous", () => move(-1)],
  b: ["keys.version", nextVersion],
  l: ["keys.loop", toggleLoop],
  y: ["keys.lyrics", toggleLyrics],
  f: ["keys.favourite", starCurrent],
  "?": ["keys.help", () => byId("help").showModal()],
};
const LABELS = { " ": "Space", ArrowLeft: "←", ArrowRight: "→" };
// These have keys of their own.
const TAKES_TEXT = "input, select, textarea, dialog, [contenteditable]";
const TAKES_SPACE = "button, a, summary, [tabindex='0']";

function act(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || !load("shortcuts", true)) return;
  const { key, target } = event;
  if (target.closest?.(TAKES_TEXT) || (key === " " && target.closest?.(TAKES_SPACE))) return;
  if (/^[1-9]$/.test(key) && current()) switchVersion(Number(key) - 1);
  else if (KEYS[key]) KEYS[key][1]();
  else return;
  event.preventDefault();
}

function showKeys() {
  const rows = [...Object.entries(KEYS).map(([key, [text]]) => [LABELS[key] ?? key, text]), ["1 – 9", "keys.number"], ["Ctrl+Enter", "keys.send"]];
  byId("keys").replaceChildren(
    ...rows.flatMap(([key, text]) => [make("dt", {}, make("kbd", { textContent: key })), make("dd", { textContent: t(text) })]),
  );
}

export function startKeys() {
  document.addEventListener("keydown", act);
  byId("open-help").addEventListener("click", () => byId("help").showModal());
  const box = byId("shortcuts");
  box.checked = load("shortcuts", true);
  box.addEventListener("change", () => save("shortcuts", box.checked));
  showKeys();
  onLanguage(showKeys);
}
