// SPDX-License-Identifier: Apache-2.0
// The lyrics of the song in the bar: lines and words light up as they are sung; without times, the plain text.

import { byId, make, setChildren, setText } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { current, onPlayer, position, seek } from "./player.js";
import { load, save } from "./store.js";

const panel = byId("lyrics-panel");
const list = byId("sung");
let active = -1;

const isOpen = () => !panel.hidden;

/** Splits a line into `[text, token]`: its tokens where they stand in its text, and what is between them. */
export function pieces({ text, tokens }) {
  const found = [];
  let at = 0;
  for (const token of tokens) {
    const word = token.text.trim();
    const start = word ? text.indexOf(word, at) : -1;
    if (start < 0) continue;
    if (start > at) found.push([text.slice(at, start), null]);
    found.push([word, token]);
    at = start + word.length;
  }
  if (at < text.length) found.push([text.slice(at), null]);
  return found;
}

/** The line that is sung at a time: the last one that has begun; -1 before the first. `lines` are in order. */
export function lineAt(lines, seconds) {
  let [low, high] = [0, lines.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lines[middle].start_s <= seconds) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function buildLine(line, index) {
  const button = make("button", { type: "button", tabIndex: -1 });
  for (const [text, token] of pieces(line)) {
    const span = make("span", { textContent: text });
    if (token) span.dataset.from = token.start_s;
    button.append(span);
  }
  button.addEventListener("click", () => seek(line.start_s));
  button.addEventListener("focus", () => rove(index));
  return make("li", { dir: "auto" }, button);
}

function show() {
  byId("show-lyrics").setAttribute("aria-pressed", String(isOpen()));
  document.body.classList.toggle("with-lyrics", isOpen());
  if (!isOpen()) return;
  const playing = current();
  const lines = playing?.song.lyrics ?? [];
  const plain = playing ? playing.card.request?.lyrics || playing.card.metas?.lyrics || "" : "";
  list.hidden = !lines.length;
  byId("plain-lyrics").hidden = lines.length > 0 || !plain;
  setText(byId("plain-lyrics"), lines.length ? "" : plain);
  const note = byId("lyrics-note");
  note.hidden = lines.length > 0;
  setText(note, plain ? t("lyrics.untimed") : t("lyrics.none"));
  const code = playing?.card.metas?.language ?? "";
  panel.lang = /^[a-z]{2,3}$/.test(code) ? code : "";
  setChildren(list, lines, () => lines.map(buildLine));
  active = -1;
  rove(0);
  follow();
}

// One of the lines can be reached with Tab, the others from it with the arrow keys.
function rove(index) {
  [...list.children].forEach((line, each) => (line.firstElementChild.tabIndex = each === index ? 0 : -1));
}

function follow() {
  const lines = current()?.song.lyrics;
  if (!isOpen() || !lines?.length) return;
  const at = position();
  const index = lineAt(lines, at);
  if (index !== active) {
    list.children[active]?.removeAttribute("aria-current");
    active = index;
    const line = list.children[index];
    line?.setAttribute("aria-current", "true");
    if (line && !list.contains(document.activeElement)) {
      rove(index);
      scrollTo(line);
    }
  }
  for (const span of list.children[index]?.firstElementChild.children ?? []) {
    if (span.dataset.from) span.classList.toggle("sung", Number(span.dataset.from) <= at);
  }
}

function scrollTo(line) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const top = line.offsetTop - panel.clientHeight / 2 + line.clientHeight / 2;
  panel.scrollTo({ top, behavior: calm ? "instant" : "smooth" });
}

export function toggleLyrics() {
  panel.hidden = !panel.hidden;
  save("lyrics", isOpen());
  show();
}

export function startLyrics() {
  byId("show-lyrics").addEventListener("click", toggleLyrics);
  byId("close-lyrics").addEventListener("click", () => {
    toggleLyrics();
    byId("show-lyrics").focus();
  });
  // On a phone it covers the page. A dialog above it closes first.
  document.addEventListener("keydown", ({ key, target }) => {
    if (key === "Escape" && isOpen() && !target.closest?.("dialog, input[type=search]")) byId("close-lyrics").click();
  });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const lines = [...list.children];
    const at = lines.findIndex((line) => line.contains(document.activeElement));
    if (!step || !lines[at + step]) return;
    event.preventDefault();
    event.stopPropagation();
    lines[at + step].firstElementChild.focus();
  });
  onPlayer((kind) => {
    if (kind === "song") {
      panel.hidden = !load("lyrics", false);
      show();
    } else if (kind === "time") follow();
  });
  onLanguage(show);
}
