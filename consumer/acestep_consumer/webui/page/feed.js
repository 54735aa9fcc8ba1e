// SPDX-License-Identifier: Apache-2.0
// Updates from the server, and the line that says whether they come.

import { byId, setText } from "./dom.js";
import { onLanguage, t, tn } from "./i18n.js";
import { runningCount } from "./list.js";

// A browser keeps six connections to one server for all its tabs: one that nobody looks at gives its own back.
const HIDDEN_MS = 10_000;
const AGAIN_MS = 3000;

let source = null;
let seen = "";
let hiding = 0;
let queueState = null;
let line = ["off", "line.connecting"];
let receive = () => {};

export const isAway = () => queueState !== null && !queueState.broker;

/** Names the server's board, which numbers jobs. */
export const board = () => seen.split("-")[0];

function connect() {
  source?.close();
  source = new EventSource(seen ? `/events?since=${seen}` : "/events");
  source.onopen = () => showQueue();
  source.onmessage = ({ data, lastEventId }) => {
    seen = lastEventId;
    const update = JSON.parse(data);
    queueState = update.queue_state;
    receive(update);
    showQueue();
  };
  source.onerror = ({ target }) => {
    showLine("off", "line.lost");
    setText(byId("queue"), "");
    // The browser tries again by itself, but not after an answer such as a proxy's 502.
    if (target.readyState === EventSource.CLOSED) setTimeout(() => target === source && connect(), AGAIN_MS);
  };
}

function pause() {
  source?.close();
  source = null;
  showLine("off", "line.paused");
}

function showQueue() {
  if (isAway()) showLine("away", "line.away");
  else showLine("on", "line.live");
  setText(byId("queue"), queueState?.broker ? queueLine(queueState) : "");
}

function queueLine({ declared, waiting, workers }) {
  if (!declared) return t("queue.none");
  const running = runningCount();
  const parts = workers === null ? [] : [workers ? tn("queue.workers", workers) : t("queue.no_worker")];
  if (running) parts.push(tn("queue.running", running));
  if (waiting !== null) parts.push(waiting ? tn("queue.waiting", waiting) : t("queue.nothing"));
  return parts.join(t("queue.comma"));
}

function showLine(state, key) {
  line = [state, key];
  byId("line").dataset.state = state;
  setText(byId("line"), t(key));
}

/** Connects; `onUpdate(update)` is called with each one. */
export function startFeed(onUpdate) {
  receive = onUpdate;
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hiding);
    if (document.hidden) hiding = setTimeout(pause, HIDDEN_MS);
    else if (!source) connect();
  });
  onLanguage(() => {
    showLine(...line);
    setText(byId("queue"), queueState?.broker && line[0] === "on" ? queueLine(queueState) : "");
  });
  showLine(...line);
  connect();
}
