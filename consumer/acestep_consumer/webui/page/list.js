// SPDX-License-Identifier: Apache-2.0
// The list of jobs: newest first, filtered, with families, and never moved under the song that plays.

import { byId, make, post, setText } from "./dom.js";
import { showSource } from "./form.js";
import { onLanguage, t, tn } from "./i18n.js";
import { Job } from "./job.js";
import { current, currentKey, isCurrent, onPlayer } from "./player.js";
import { isFavourite, load, onFavouritesElsewhere, save, toggleFavourite } from "./store.js";
import { isEnded, problem, setWordsOf, size, titleOf, wordsIn } from "./text.js";

const KEPT = 150;
const KINDS = ["", "running", "waiting", "completed", "unmade", "favourite"];
const TASK_ID = /^[A-Za-z0-9_-]{1,128}$/;
const LINK = /^#([A-Za-z0-9_-]{1,128})(?:\/(\d{1,3}))?$/;
// Places of the page, which its own links name.
const ANCHORS = ["jobs", "bar"];
// Fields of a request that a filter finds.
const SEARCHED = ["prompt", "lyrics", "sample_query", "model", "key_scale"];

const jobs = new Map();
// What was asked for in this browser: of these a screen reader is told, and not of everybody's.
const mine = new Set([load("asked", [])].flat());
const MAX_ASKED = 1000;
const list = byId("list");
let kind = "";
let wanted = "";
let waitingInAll = 0;
let isAway = () => false;
let board = () => "";

export const titleOfJob = (taskId) => (jobs.has(taskId) ? jobs.get(taskId).title : "");

export function remember(taskId) {
  // Another tab may have asked for some meanwhile.
  for (const each of [load("asked", []), taskId].flat()) mine.add(each);
  save("asked", [...mine].slice(-MAX_ASKED));
}

export const runningCount = () => [...jobs.values()].filter(({ card }) => card.state === "running").length;

const page = { isMine: (taskId) => mine.has(taskId), isAway: () => isAway(), familyOf, changed: () => showPlayers() };

// --- families ---------------------------------------------------------------------------------------------------

// From its end on, a job names its parents; until then its request names the song that it is made from.
function parentsOf({ parents, request }) {
  const named = parents.length ? parents.map((each) => each.task_id) : [request?.source_task_id];
  return [...new Set(named.filter((each) => typeof each === "string" && TASK_ID.test(each)))];
}

function familyOf(card) {
  const children = [...jobs.values()].filter((job) => parentsOf(job.card).includes(card.task_id));
  return {
    parents: parentsOf(card).map((parent) => [parent, titleOfJob(parent) || parent]),
    children: children.map((job) => [job.card.task_id, job.title]),
  };
}

// --- which jobs are shown ---------------------------------------------------------------------------------------

const kindOf = ({ state }) => (["running", "waiting", "completed"].includes(state) ? state : "unmade");

const textOf = ({ card, title }) =>
  [title, card.task_id, card.model?.used, card.metas?.caption, ...SEARCHED.map((name) => card.request?.[name])].join("\n").toLocaleLowerCase();

const isShown = (job) =>
  (!kind || (kind === "favourite" ? job.isFavourite : kindOf(job.card) === kind)) &&
  (!wanted || wanted.split(/\s+/).every((word) => textOf(job).includes(word)));

const buttons = KINDS.map((each) => {
  const button = make("button", { type: "button" });
  button.addEventListener("click", () => showKind(each));
  return { each, button };
});

function showKind(only) {
  kind = only;
  list.dataset.only = only;
  for (const { each, button } of buttons) button.setAttribute("aria-pressed", String(each === only));
  showList();
}

/** Shows the rows that are asked for, their counts, and what of them can be downloaded. */
export function showList() {
  const counts = { "": jobs.size };
  for (const job of jobs.values()) {
    job.element.hidden = !isShown(job);
    counts[kindOf(job.card)] = (counts[kindOf(job.card)] ?? 0) + 1;
    if (job.isFavourite) counts.favourite = (counts.favourite ?? 0) + 1;
  }
  for (const { each, button } of buttons) {
    button.hidden = !counts[each] && each !== kind;
    setText(button, `${t(`kind_of.${each || "all"}`)} ${counts[each] ?? 0}`);
  }
  byId("kinds").hidden = jobs.size < 2;
  const nothing = jobs.size ? (shownJobs().length ? "" : t("jobs.no_match")) : t("jobs.nothing");
  byId("nothing").hidden = !nothing;
  setText(byId("nothing"), nothing);
  showDownload();
  showStop();
}

const shownJobs = () => [...list.children].filter((row) => !row.hidden).map((row) => jobs.get(row.id.slice(4)));

function showDownload() {
  const link = byId("download-all");
  const found = shownJobs().filter(({ card, gone }) => card.songs.length && !gone);
  const songs = found.flatMap(({ card }) => card.songs);
  link.hidden = songs.length < 2;
  const bytes = songs.reduce((sum, song) => sum + song.bytes, 0);
  setText(link, t("jobs.download_all", { number: songs.length, size: size(bytes) }));
  link.href = `/songs.zip?board=${board()}&jobs=${found.map(({ card }) => card.number).join(".")}`;
}

/** All songs in the order of the list, for the player. */
export const songsInOrder = () => shownJobs().flatMap(({ card }) => card.songs.map((_, index) => [card, index]));

function showPlayers() {
  for (const job of jobs.values()) job.showPlayer();
  const star = byId("now-star");
  const key = currentKey();
  star.setAttribute("aria-pressed", String(key !== null && isFavourite(key)));
  if (key) star.setAttribute("aria-label", t("song.favourite", { name: titleOf(current().card) }));
  showList();
}

export function starCurrent() {
  if (!currentKey()) return;
  toggleFavourite(currentKey());
  showPlayers();
}

// --- news -------------------------------------------------------------------------------------------------------

/** Shows an update: changed cards, ids that the server forgot, places of waiting jobs. */
export function receive(update) {
  keepInPlace(() => {
    showCards(update);
    for (const [taskId, job] of jobs) {
      job.place = update.places[taskId] ? { ...update.places[taskId], at: Date.now() } : null;
      if (job.card.state === "waiting") job.tick();
    }
    waitingInAll = update.queue_state?.waiting ?? 0;
    showOthers();
  });
}

function showCards({ now, fresh, cards, gone }) {
  if (!cards.length && !gone.length && !fresh) return;
  // Ages by the server's own clock: this device's may be wrong.
  const here = Date.now() - Date.parse(now);
  const told = new Set(cards.map((card) => card.task_id));
  // Another server process knows nothing of earlier jobs; finished ones can be heard all the same.
  if (fresh) for (const taskId of [...jobs.keys()]) if (!told.has(taskId)) forget(taskId);
  for (const taskId of gone) if (jobs.has(taskId)) forget(taskId);
  for (const card of cards.sort((one, other) => one.number - other.number)) putUp(card, Date.parse(card.received) + here);
  evict();
  // The job that they are called by came or went.
  for (const job of jobs.values()) if (job.titleShown !== job.title) job.show(job.card, job.heardAt);
  for (const job of jobs.values()) if (job.element.hasAttribute("data-open")) job.showFamily();
  showList();
  showSource();
}

// AMQP does not tell what waits: of requests from elsewhere only their number is known.
function showOthers() {
  const own = [...jobs.values()].filter(({ card }) => card.state === "waiting" && !card.sending).length;
  const others = waitingInAll - own;
  byId("others").hidden = others <= 0;
  setText(byId("others"), others > 0 ? tn("jobs.others", others) : "");
}

// What the server forgets of the finished ones, this page may keep a while.
function forget(taskId) {
  const job = jobs.get(taskId);
  if (isEnded(job.card)) job.gone = true;
  else takeDown(taskId);
}

function putUp(card, heardAt) {
  let job = jobs.get(card.task_id);
  const isNew = !job;
  if (isNew) jobs.set(card.task_id, (job = new Job(card, page)));
  const isAgain = !isNew && job.card.number !== card.number && !isEnded(card);
  job.gone = false;
  job.show(card, heardAt);
  if (isNew || isAgain) list.prepend(job.element);
}

function takeDown(taskId) {
  jobs.get(taskId)?.close();
  jobs.delete(taskId);
}

function evict() {
  const spare = [...jobs].filter(([taskId, job]) => isEnded(job.card) && !isCurrent(taskId) && !job.isFavourite);
  const unmade = spare.filter(([, { card }]) => !card.songs.length);
  const made = spare.filter(([, { card }]) => card.songs.length);
  for (const some of [unmade, made]) for (const [taskId] of some.slice(0, Math.max(0, some.length - KEPT))) takeDown(taskId);
}

/** Changes the list; the row of the song in the player bar stays where it is on the screen, if it is there. */
function keepInPlace(change) {
  const row = current() && jobs.get(current().card.task_id)?.element;
  const before = row?.getBoundingClientRect();
  const isSeen = before && before.height > 0 && before.bottom > 0 && before.top < innerHeight;
  change();
  if (!isSeen) return;
  const moved = row.getBoundingClientRect().top - before.top;
  if (moved) scrollBy({ top: moved, behavior: "instant" });
}

/** Shows a job, also one that ended long ago; resolves to why it cannot be shown, or an empty text. */
export async function showJob(taskId) {
  if (!jobs.has(taskId)) {
    const { error } = await post(`/jobs/${encodeURIComponent(taskId)}/show`);
    if (error) return problem(error);
    for (let tries = 0; tries < 50 && !jobs.has(taskId); tries++) await new Promise((done) => setTimeout(done, 100));
  }
  const job = jobs.get(taskId);
  if (job && !isShown(job)) {
    wanted = byId("filter").value = "";
    showKind("");
  }
  // Twice: on the way there, jobs above it get the height that they really have.
  for (let times = 0; job && times < 2; times++) {
    job.element.scrollIntoView({ block: "start" });
    await new Promise((done) => setTimeout(done, 50));
  }
  job?.element.focus({ preventScroll: true });
  return "";
}

async function find(taskId) {
  const line = byId("found");
  const text = TASK_ID.test(taskId) ? await showJob(taskId) : t("jobs.find_bad");
  line.hidden = !text;
  line.dataset.kind = "bad";
  setText(line, text);
  return text;
}

/** Shows the job that the address names after its #, and the song of it that is named after a slash. */
export async function goTo(hash) {
  const [, taskId, number] = LINK.exec(hash) ?? [];
  if (!taskId || ANCHORS.includes(taskId)) return;
  if (await find(taskId)) byId("earlier").open = true;
  else if (number) jobs.get(taskId)?.goToSong(number - 1);
}

// --- stopping all that wait -------------------------------------------------------------------------------------

// Others may have the page of this server open, too: theirs go on.
const stoppable = () => [...jobs.values()].filter(({ card }) => card.state === "waiting" && !card.stopping && mine.has(card.task_id));

function showStop() {
  const number = stoppable().length;
  byId("stop-waiting").hidden = number < 2;
  setText(byId("stop-waiting"), t("stop_waiting.all", { number }));
}

function askToStop() {
  const asked = stoppable();
  setText(byId("confirm-text"), t("stop_waiting.ask", { number: asked.length }));
  const dialog = byId("confirm");
  dialog.returnValue = "";
  dialog.onclose = () => {
    if (dialog.returnValue !== "stop") return;
    // What a worker has begun meanwhile does not wait.
    for (const job of asked) if (job.card.state === "waiting") job.stop();
    byId("jobs").focus({ preventScroll: true });
  };
  dialog.showModal();
}

/** `around`: `isAway()`, and `board()`, which names the server's board. */
export function startList(around) {
  ({ isAway, board } = around);
  setWordsOf((taskId) => (jobs.has(taskId) ? wordsIn(jobs.get(taskId).card) : ""));
  byId("kinds").append(...buttons.map(({ button }) => button));
  showKind("");
  byId("filter").addEventListener("input", ({ target }) => {
    wanted = target.value.trim().toLocaleLowerCase();
    showList();
  });
  byId("find").addEventListener("submit", (event) => {
    event.preventDefault();
    find(event.target.elements.task_id.value.trim());
  });
  byId("stop-waiting").addEventListener("click", askToStop);
  byId("now-star").addEventListener("click", starCurrent);
  onPlayer((each) => (each === "song" || each === "state") && showPlayers());
  onFavouritesElsewhere(showPlayers);
  onLanguage(() => {
    for (const job of jobs.values()) job.translate();
    showPlayers();
    showOthers();
  });
  addEventListener("hashchange", () => goTo(location.hash));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const job of jobs.values()) job.paint();
  });
  setInterval(() => {
    for (const job of jobs.values()) job.tick();
  }, 1000);
}

