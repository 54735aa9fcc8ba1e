// SPDX-License-Identifier: Apache-2.0
// The player bar: one audio element for all songs. It stays in view whatever happens to the list above it.

import { announce, byId, make, setChildren, setLabel, setText } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { load, save, songKey } from "./store.js";
import { clock, score, songName, titleOf } from "./text.js";
import { decodePeaks, draw, peaksIn, whenSeen } from "./waveform.js";

export const SEEK_S = 5;

const audio = byId("audio");
const slider = byId("position");
const wave = byId("wave");
const listeners = [];
// The song in the bar: its job's card, its number there, and its view; null: none yet.
let now = null;
let peaks = null;
let painted = -1;
let sequence = () => [];

export const audioUrl = (taskId, index) => `/audio/${encodeURIComponent(taskId)}/${index}`;

export const current = () => now;

export const isPlaying = () => now !== null && !audio.paused && !audio.ended;

export const isCurrent = (taskId, index) => now !== null && now.card.task_id === taskId && (index === undefined || now.index === index);

export const position = () => (now ? Number(slider.value) : 0);

/** Calls `listener(kind)` when the song, its state ("state") or its position ("time") changes. */
export const onPlayer = (listener) => listeners.push(listener);

const notify = (kind) => listeners.forEach((listener) => listener(kind));

/** `songs()` returns `[card, index]` of all songs in the order in which they follow each other. */
export function setSequence(songs) {
  sequence = songs;
}

/** Plays a song; the one in the bar goes on where it was. `at`: from this second on. */
export async function play(card, index, at = null) {
  if (!isCurrent(card.task_id, index)) put(card, index, at ?? 0);
  else if (at !== null) audio.currentTime = at;
  if (slider.disabled) return;
  trouble("");
  if (audio.error) audio.load();
  try {
    await audio.play();
  } catch (error) {
    // A pause or another song that came first is no trouble; what else goes wrong is told at "error".
    if (error.name === "NotAllowedError") trouble(t("player.not_allowed"));
  }
}

export function toggle() {
  if (!now) {
    const [first] = sequence();
    if (first) play(...first);
  } else if (isPlaying()) audio.pause();
  else play(now.card, now.index);
}

export function seek(seconds) {
  if (!now || slider.disabled) return;
  audio.currentTime = Math.min(Math.max(0, seconds), now.song.duration_s);
  showTime();
}

/** Plays the song that is `step` places further in the list; stays at its ends. */
export function move(step) {
  const songs = sequence();
  const at = songs.findIndex(([card, index]) => isCurrent(card.task_id, index));
  const next = songs[at < 0 ? 0 : at + step];
  if (next) play(...next);
}

/** Changes to another song of the same job, at the same position. */
export function switchVersion(index) {
  if (!now || !now.card.songs[index] || index === now.index) return;
  const [goesOn, at] = [isPlaying(), position()];
  const { card } = now;
  put(card, index, Math.min(at, card.songs[index].duration_s));
  announce(`${songName(card, index)}: ${titleOf(card)}`);
  if (goesOn) play(card, index);
}

export const nextVersion = () => now && switchVersion((now.index + 1) % now.card.songs.length);

export function toggleLoop() {
  audio.loop = !audio.loop;
  save("loop", audio.loop);
  showSwitches();
}

/** The card of the song in the bar was updated. */
export function refresh(card) {
  if (!isCurrent(card.task_id)) return;
  if (!card.songs[now.index]) return;
  now.card = card;
  now.song = card.songs[now.index];
  showSong();
}

function put(card, index, at) {
  now = { card, index, song: card.songs[index] };
  byId("bar").hidden = byId("skip-player").hidden = false;
  document.body.classList.add("with-bar");
  audio.src = audioUrl(card.task_id, index);
  // Before there is data, this is where playing starts.
  audio.currentTime = at;
  slider.max = now.song.duration_s;
  slider.value = at;
  const playable = Boolean(audio.canPlayType(now.song.content_type));
  slider.disabled = byId("toggle").disabled = !playable;
  trouble(playable ? "" : t("player.no_codec", { format: now.song.format.toUpperCase() }));
  showSong();
  showWave(playable);
  if (navigator.mediaSession) navigator.mediaSession.metadata = new MediaMetadata({ title: titleOf(card) });
  notify("song");
}

async function showWave(playable) {
  const { song, card, index } = now;
  peaks = peaksIn(song);
  paint();
  if (peaks || !playable) return;
  const found = await decodePeaks(audioUrl(card.task_id, index), song);
  if (!isCurrent(card.task_id, index)) return;
  peaks = found;
  paint();
  notify("wave");
}

function showSong() {
  const { card, index } = now;
  const title = titleOf(card);
  const name = `${songName(card, index)}: ${title}`;
  setText(byId("now"), card.songs.length > 1 ? `${title} · ${songName(card, index)}` : title);
  byId("now").href = `#${card.task_id}`;
  setLabel(slider, t("player.position", { name }));
  showVersions();
  showState();
  showTime();
}

function showVersions() {
  const { card, index } = now;
  const scores = new Map((card.candidates ?? []).filter((each) => each.index !== null).map((each) => [each.index, each.score]));
  const versions = byId("versions");
  versions.hidden = card.songs.length < 2;
  const labels = card.songs.map((song, each) => [song.track || String(each + 1), scores.has(each) ? score(scores.get(each)) : ""]);
  setChildren(versions, [card.task_id, labels, t("player.version", {})], () =>
    labels.map(([name, points], each) => {
      const label = t("player.version", { name: songName(card, each) }) + (points ? `, ${t("song.score", { score: points })}` : "");
      const button = make("button", { type: "button", textContent: points ? `${name} · ${points}` : name });
      setLabel(button, label);
      button.addEventListener("click", () => switchVersion(each));
      return button;
    }),
  );
  [...versions.children].forEach((button, each) => button.setAttribute("aria-pressed", String(each === index)));
}

function showState() {
  const playing = isPlaying();
  byId("toggle").toggleAttribute("data-playing", playing);
  setLabel(byId("toggle"), playing ? t("player.pause") : t("player.play"));
  if (playing) follow();
  notify("state");
}

// `timeupdate` comes four times a second: between two of them the picture moves on by itself.
function follow() {
  if (!isPlaying()) return;
  showTime();
  requestAnimationFrame(follow);
}

function showTime() {
  if (!now) return;
  const at = audio.readyState || audio.currentTime ? audio.currentTime : Number(slider.value);
  slider.value = at;
  const total = clock(now.song.duration_s);
  setText(byId("time"), `${clock(at)} / ${total}`);
  slider.setAttribute("aria-valuetext", t("player.at", { at: clock(at), total }));
  if (Math.round((at / now.song.duration_s) * 1000) !== painted) paint();
  notify("time");
}

function paint() {
  const played = now?.song.duration_s ? position() / now.song.duration_s : 0;
  painted = Math.round(played * 1000);
  draw(wave, peaks, played || -1);
}

function showSwitches() {
  byId("loop").setAttribute("aria-pressed", String(audio.loop));
  byId("advance").setAttribute("aria-pressed", String(load("advance", true)));
}

function trouble(text) {
  byId("trouble").hidden = !text;
  setText(byId("trouble"), text);
}

// An audio element says only that it failed; the server says why.
async function explain() {
  if (!now || slider.disabled) return;
  const { card, index, song } = now;
  const answer = await fetch(audioUrl(card.task_id, index), { headers: { Range: "bytes=0-0" } }).catch(() => null);
  if (!isCurrent(card.task_id, index)) return;
  if (!answer) trouble(t("server.away"));
  else if (answer.ok) trouble(t("player.not_playable", { format: song.format.toUpperCase() }));
  else trouble((await answer.text()).trim());
}

function ended() {
  showState();
  if (load("advance", true)) move(1);
}

export function startPlayer() {
  // Its rows are as many as fit: what stands above it ends where it begins.
  const bar = byId("bar");
  new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`)).observe(bar, { box: "border-box" });
  audio.loop = Boolean(load("loop", false));
  audio.volume = byId("volume").value = Math.min(1, Math.max(0, Number(load("volume", 1)) || 0));
  byId("toggle").addEventListener("click", toggle);
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  byId("loop").addEventListener("click", toggleLoop);
  byId("advance").addEventListener("click", () => {
    save("advance", !load("advance", true));
    showSwitches();
  });
  byId("volume").addEventListener("input", ({ target }) => {
    audio.volume = Number(target.value);
    save("volume", audio.volume);
  });
  slider.addEventListener("input", () => seek(Number(slider.value)));
  for (const name of ["play", "pause"]) audio.addEventListener(name, showState);
  audio.addEventListener("ended", ended);
  for (const name of ["timeupdate", "seeked"]) audio.addEventListener(name, showTime);
  audio.addEventListener("error", explain);
  for (const [action, handler] of [["previoustrack", () => move(-1)], ["nexttrack", () => move(1)]]) {
    navigator.mediaSession?.setActionHandler(action, handler);
  }
  whenSeen(wave, paint);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  showSwitches();
  onLanguage(() => now && showSong());
}

export const currentKey = () => (now ? songKey(now.card.task_id, now.index) : null);
