// SPDX-License-Identifier: Apache-2.0
// The page: news from /events become cards, finished songs become players with a waveform, two forms send orders.
// Whatever comes from outside is written with textContent, so that nothing of it can become markup.

const KEPT = 150;
const BARS = 480;
// Enough for a picture, and a song of ten minutes decodes to a tenth of the memory.
const PICTURE_HZ = 12_000;
const LARGEST_PICTURE_BYTES = 100e6;
const STATES = {
  waiting: "Waiting",
  running: "Running",
  completed: "Done",
  failed: "Failed",
  rejected: "Rejected",
  cancelled: "Cancelled",
  expired: "Expired",
};
const STAGES = { plan: "planning", render: "rendering", encode: "encoding", upload: "storing" };
const LABELS = { audio_duration: "seconds", audio_format: "format", batch_size: "songs", lm_model_path: "language model" };
const NO_WORDS = ["prompt", "lyrics", "model"];
const FIELDS = ["prompt", "lyrics", "audio_duration", "batch_size", "audio_format", "model", "seed", "thinking"];
const KINDS = { "": "All", running: "Running", waiting: "Waiting", completed: "With songs", unmade: "Without songs" };
// A browser keeps six connections to one server for all its tabs: one that nobody looks at gives its own back.
const HIDDEN_MS = 10_000;

const byId = (id) => document.getElementById(id);
const jobs = new Map();
const peaksOf = new Map();
// What was asked for here: of these a screen reader is told, and not of everybody's.
const mine = new Set();
let queueState = null;
let arrived = false;

// --- texts ---------------------------------------------------------------------------------------------------------

const isEnded = (card) => card.state !== "waiting" && card.state !== "running";

function firstLine(text) {
  const letters = [...text.trim().split("\n", 1)[0]];
  return letters.length > 160 ? `${letters.slice(0, 160).join("").trimEnd()}…` : letters.join("");
}

const titleOf = ({ request, metas, task_id }) =>
  firstLine(request?.prompt || metas?.caption || request?.sample_query || "") || `Job ${task_id.slice(0, 24)}`;

function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

function spoken(seconds) {
  const whole = Math.round(seconds);
  if (whole < 90) return `${whole} s`;
  const minutes = Math.round(whole / 60);
  return minutes < 90 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function shown(value) {
  if (value === null || value === undefined) return "nothing";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function doing({ card, heardAt }) {
  if (card.state === "waiting" && card.stopping) return "cancelling when its turn comes";
  if (card.state === "waiting" && card.unsure) return "not known whether the broker accepted it; safe to retry";
  if (card.state === "waiting") return "waits in the queue";
  const parts = [card.stopping ? "stopping" : STAGES[card.stage] ?? (card.stage || "started")];
  if (card.progress > 0) parts.push(`${Math.floor(card.progress * 100)}%`);
  if (card.remaining_s !== null) {
    const left = card.remaining_s - (Date.now() - heardAt) / 1000;
    parts.push(left >= 1 ? `about ${spoken(left)} left` : "done in a moment");
  }
  if (card.attempt > 1) parts.push(`try ${card.attempt}`);
  return parts.join(" · ");
}

const labelled = (field) => LABELS[field] ?? field.replaceAll("_", " ");

// Not names of fields: these are what a program would send.
const startingLarge = (text) => (/^\w+(_| = )/.test(text) ? text : text.charAt(0).toUpperCase() + text.slice(1));

function adjusted({ field, requested, applied, reason }) {
  return startingLarge(`${labelled(field)}: asked for ${shown(requested)}, made with ${shown(applied)} – ${reason}`);
}

function notesOf({ adjustments, warnings, model }) {
  const notes = [...adjustments.map(adjusted), ...warnings.map(startingLarge)];
  if (model?.fallback && !adjustments.some(({ field }) => field === "model")) {
    notes.unshift(`Model: asked for ${shown(model.requested)}, which is not loaded; made with ${model.used}`);
  }
  return notes;
}

function detailed(detail) {
  const { field, value, rule, ...rest } = detail;
  if (field && rule) return `${field} = ${shown(value)}: ${rule}`;
  return Object.entries(field ? detail : rest).map(([name, each]) => `${name}: ${shown(each)}`).join(", ");
}

function reasonOf({ error }) {
  if (!error) return "";
  const tries = error.attempts > 1 ? ` After ${error.attempts} tries.` : "";
  const hope = error.retryable ? " Sending it again may help." : "";
  return `${startingLarge(error.message).replace(/([^.!?])$/, "$1.")}${tries}${hope} (${error.code})`;
}

function announce(text) {
  byId("announce").textContent = text;
}

// --- small helpers for elements --------------------------------------------------------------------------------------

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function setList(list, texts) {
  const key = JSON.stringify(texts);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...texts.map((text) => Object.assign(document.createElement("li"), { dir: "auto", textContent: text })));
}

function setPairs(list, pairs) {
  const items = pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const key = JSON.stringify(items);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(
    ...items.flatMap(([name, value]) => [
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { dir: "auto", textContent: shown(value) }),
    ]),
  );
}

function copyOf(template) {
  return byId(template).content.firstElementChild.cloneNode(true);
}

// --- waveforms ---------------------------------------------------------------------------------------------------------

// One song is decoded at a time, when it comes into view.
let drawing = Promise.resolve();
const inView = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      inView.unobserve(target);
      drawing = drawing.then(() => target.dispatchEvent(new Event("seen")) && target.pending);
    }
  },
  { rootMargin: "200px" },
);

async function peaksFor(url) {
  if (peaksOf.has(url)) return peaksOf.get(url);
  const answer = await fetch(url);
  if (!answer.ok) throw new Error((await answer.text()).trim() || `HTTP ${answer.status}`);
  const decoder = new OfflineAudioContext(1, 1, PICTURE_HZ);
  const peaks = loudest(await decoder.decodeAudioData(await answer.arrayBuffer()));
  peaksOf.set(url, peaks);
  return peaks;
}

function loudest(sound) {
  const peaks = new Float32Array(BARS);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    const samples = sound.getChannelData(channel);
    for (let bar = 0; bar < BARS; bar++) {
      const end = Math.max(Math.ceil(((bar + 1) * samples.length) / BARS), 1);
      for (let at = Math.floor((bar * samples.length) / BARS); at < end; at++) {
        peaks[bar] = Math.max(peaks[bar], Math.abs(samples[at] ?? 0));
      }
    }
  }
  const top = Math.max(...peaks, 1e-3);
  return peaks.map((peak) => peak / top);
}

function draw(canvas, peaks, played) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width) return;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const [rest, done] = [style.getPropertyValue("--wave"), style.getPropertyValue("--accent")];
  const bars = Math.max(1, Math.floor(width / 4));
  for (let bar = 0; bar < bars; bar++) {
    const tall = peaks ? Math.max(2, barHeight(peaks, bar, bars) * (height - 6)) : 2;
    pen.fillStyle = (bar + 0.5) / bars <= played ? done : rest;
    pen.beginPath();
    pen.roundRect(bar * 4 + 0.5, (height - tall) / 2, 3, tall, 1.5);
    pen.fill();
  }
}

function barHeight(peaks, bar, bars) {
  const first = Math.floor((bar * peaks.length) / bars);
  const last = Math.max(first + 1, Math.floor(((bar + 1) * peaks.length) / bars));
  return Math.max(...peaks.subarray(first, last));
}

// --- players -------------------------------------------------------------------------------------------------------------

class Player {
  static playing = null;

  constructor(card, song, index) {
    this.song = song;
    this.url = `/audio/${encodeURIComponent(card.task_id)}/${index}`;
    this.element = copyOf("song-template");
    this.part = (name) => this.element.querySelector(name);
    this.audio = this.part("audio");
    this.slider = this.part("input");
    this.canvas = this.part("canvas");
    this.title = titleOf(card);
    this.name = `${card.songs.length > 1 ? `song ${index + 1} of ${card.songs.length}` : "the song"}: ${this.title}`;
    this.peaks = null;
    this.fill();
    this.listen();
  }

  fill() {
    const { song, slider } = this;
    this.audio.src = this.url;
    slider.max = song.duration_s;
    slider.step = Math.min(1, song.duration_s / 100) || "any";
    slider.setAttribute("aria-label", `Position in ${this.name}`);
    const download = this.part(".download");
    download.href = `${this.url}?download`;
    download.download = song.name;
    download.setAttribute("aria-label", `Download ${this.name}`);
    const channels = { 1: "mono", 2: "stereo" }[song.channels] ?? `${song.channels} channels`;
    const facts = [song.format.toUpperCase(), `${song.sample_rate / 1000} kHz ${channels}`, size(song.bytes), `seed ${song.seed}`];
    setText(this.part(".facts"), facts.join(" · "));
    this.showState();
    this.showTime();
    this.isPlayable = Boolean(this.audio.canPlayType(song.content_type));
    this.part(".play").disabled = slider.disabled = !this.isPlayable;
    if (!this.isPlayable) this.trouble(`This browser cannot play ${song.format.toUpperCase()}. Download the song to hear it.`);
  }

  listen() {
    const { audio, slider, canvas } = this;
    this.part(".play").addEventListener("click", () => (audio.paused ? this.play() : audio.pause()));
    slider.addEventListener("input", () => {
      audio.currentTime = Number(slider.value);
      this.showTime();
    });
    for (const name of ["play", "pause", "ended"]) audio.addEventListener(name, () => this.showState());
    for (const name of ["timeupdate", "seeked"]) audio.addEventListener(name, () => this.showTime());
    audio.addEventListener("error", () => this.explain());
    canvas.addEventListener("seen", () => (canvas.pending = this.drawWave()));
    this.resized = new ResizeObserver(() => this.paint());
    this.resized.observe(canvas);
    if (!navigator.connection?.saveData) inView.observe(canvas);
  }

  async play() {
    if (Player.playing && Player.playing !== this) Player.playing.audio.pause();
    Player.playing = this;
    this.trouble("");
    if (this.audio.error) this.audio.load();
    if (navigator.mediaSession) navigator.mediaSession.metadata = new MediaMetadata({ title: this.title });
    try {
      await this.audio.play();
    } catch (error) {
      // A pause that came first is no trouble; what else goes wrong is told at "error".
      if (error.name === "NotAllowedError") this.trouble("The browser does not allow sound here.");
    }
  }

  showState() {
    const playing = !this.audio.paused && !this.audio.ended;
    const button = this.part(".play");
    button.toggleAttribute("data-playing", playing);
    button.setAttribute("aria-label", `${playing ? "Pause" : "Play"} ${this.name}`);
    if (playing) this.follow();
  }

  // `timeupdate` comes four times a second: between two of them the picture moves on by itself.
  follow() {
    if (this.audio.paused || this.audio.ended || !this.element.isConnected) return;
    this.showTime();
    requestAnimationFrame(() => this.follow());
  }

  showTime() {
    const at = this.audio.readyState || this.audio.currentTime ? this.audio.currentTime : Number(this.slider.value);
    this.slider.value = at;
    const text = `${clock(at)} / ${clock(this.song.duration_s)}`;
    setText(this.part(".time"), text);
    this.slider.setAttribute("aria-valuetext", `${clock(at)} of ${clock(this.song.duration_s)}`);
    const filled = Math.round((at / this.song.duration_s) * 1000);
    if (filled !== this.filled) this.paint();
  }

  paint() {
    const played = this.song.duration_s ? Number(this.slider.value) / this.song.duration_s : 0;
    this.filled = Math.round(played * 1000);
    draw(this.canvas, this.peaks, played || -1);
  }

  async drawWave() {
    if (!this.isPlayable || this.song.bytes > LARGEST_PICTURE_BYTES || !this.element.isConnected) return;
    try {
      this.peaks = await peaksFor(this.url);
      this.canvas.dataset.drawn = "true";
      this.paint();
    } catch (error) {
      if (error.name !== "EncodingError") this.trouble(error.message);
    }
  }

  // An audio element says only that it failed; the server says why.
  async explain() {
    const answer = await fetch(this.url, { headers: { Range: "bytes=0-0" } }).catch(() => null);
    if (!answer) this.trouble("This page's server does not answer.");
    else if (answer.ok) this.trouble(`This browser cannot play this ${this.song.format.toUpperCase()} file. Download it to hear it elsewhere.`);
    else this.trouble((await answer.text()).trim());
  }

  trouble(text) {
    const line = this.part(".trouble");
    line.hidden = !text;
    setText(line, text);
  }

  close() {
    this.audio.pause();
    this.audio.removeAttribute("src");
    this.resized.disconnect();
    inView.unobserve(this.canvas);
    if (Player.playing === this) Player.playing = null;
  }
}

// --- jobs ----------------------------------------------------------------------------------------------------------------

class Job {
  constructor(card) {
    this.element = copyOf("job-template");
    this.element.id = `job-${card.task_id}`;
    this.part = (name) => this.element.querySelector(name);
    this.players = [];
    const id = this.part(".id");
    id.href = `#${card.task_id}`;
    id.textContent = id.title = card.task_id;
    this.part(".stop").addEventListener("click", () => this.stop());
    this.part(".again").addEventListener("click", () => fillForm(this.card.request ?? {}));
  }

  show(card, heardAt) {
    const before = this.card;
    this.card = card;
    this.heardAt = heardAt;
    this.element.dataset.state = card.state;
    this.showHead();
    this.showWay();
    setText(this.part(".reason"), reasonOf(card));
    const details = (card.error?.details ?? []).map(detailed);
    setList(this.part(".details"), details.filter((text) => !card.error.message.includes(text)));
    setList(this.part(".notes"), notesOf(card));
    this.showWords();
    this.showSongs();
    this.showButtons();
    if (before) this.tell(before);
  }

  showHead() {
    const { card } = this;
    setText(this.part(".state"), STATES[card.state]);
    setText(this.part("h3"), titleOf(card));
    const since = new Date(card.since);
    const time = this.part("time");
    time.dateTime = card.since;
    const today = since.toDateString() === new Date().toDateString();
    setText(time, today ? since.toLocaleTimeString() : since.toLocaleString());
  }

  showWay() {
    const { card } = this;
    this.part(".under-way").hidden = isEnded(card);
    const bar = this.part("progress");
    bar.hidden = card.state !== "running";
    bar.value = card.progress;
    bar.setAttribute("aria-label", `Progress of ${titleOf(card)}`);
    this.tick();
  }

  tick() {
    if (!isEnded(this.card)) setText(this.part(".doing"), doing(this));
  }

  showWords() {
    const { request, metas, model, lm, timings, worker_id, tier } = this.card;
    this.part(".words").hidden = !request;
    if (!request) return;
    const { prompt = "", lyrics = "" } = request;
    setText(this.part(".prompt"), prompt);
    setText(this.part(".lyrics"), lyrics);
    this.part(".lyrics").lang = /^[a-z]{2,3}$/.test(metas?.language ?? "") ? metas.language : "";
    const parameters = Object.entries(request).filter(([name]) => !NO_WORDS.includes(name));
    setPairs(this.part("dl"), [
      ...parameters.map(([name, value]) => [labelled(name), value]),
      ["model", model?.used ?? request.model],
      ["planned by", lm && `${lm.model} (${lm.backend})`],
      ["caption", metas?.caption === prompt ? "" : metas?.caption],
      ["tempo", metas?.bpm && `${metas.bpm} bpm`],
      ["key", metas?.keyscale],
      ["time signature", metas?.timesignature],
      ["language", metas?.language],
      ["made in", timings?.total && spoken(timings.total)],
      ["worker", worker_id && (tier ? `${worker_id} (${tier})` : worker_id)],
      ["id", this.card.task_id],
    ]);
  }

  // Players stay as they are while their songs do: one may be playing.
  showSongs() {
    const key = JSON.stringify(this.card.songs);
    if (key === this.songs) return;
    this.songs = key;
    for (const player of this.players) player.close();
    this.players = this.card.songs.map((song, index) => new Player(this.card, song, index));
    this.part(".songs").replaceChildren(...this.players.map(({ element }) => element));
  }

  showButtons() {
    const { card } = this;
    const stop = this.part(".stop");
    const focused = document.activeElement === stop;
    stop.hidden = isEnded(card);
    stop.disabled = card.stopping;
    setText(stop, card.stopping ? "Stopping" : "Stop");
    stop.setAttribute("aria-label", `${stop.textContent}: ${titleOf(card)}`);
    if (focused && (stop.hidden || stop.disabled)) this.element.focus({ preventScroll: true });
    this.part(".again").hidden = !card.request;
    this.part(".foot").hidden = !card.request && stop.hidden;
    this.part(".again").setAttribute("aria-label", `Use these words: ${titleOf(card)}`);
  }

  // Not every step is worth a word of a screen reader: changes of state, and each quarter.
  tell(before) {
    const { card } = this;
    if (!mine.has(card.task_id)) return;
    const quarter = Math.floor(card.progress * 4);
    if (card.state !== before.state) {
      const songs = card.songs.length ? `, ${card.songs.length} song${card.songs.length > 1 ? "s" : ""}` : "";
      announce(`${titleOf(card)}: ${STATES[card.state].toLowerCase()}${songs}`);
    } else if (card.state === "running" && quarter > Math.floor(before.progress * 4)) {
      announce(`${titleOf(card)}: ${quarter * 25}%`);
    }
  }

  async stop() {
    mine.add(this.card.task_id);
    const { error } = await post(`/jobs/${this.card.task_id}/cancel`);
    if (!error) return;
    setText(this.part(".doing"), error.message);
    announce(error.message);
  }

  close() {
    for (const player of this.players) player.close();
    this.element.remove();
  }
}

function putUp(card, heardAt) {
  let job = jobs.get(card.task_id);
  const isNew = !job;
  if (isNew) jobs.set(card.task_id, (job = new Job(card)));
  const isAgain = !isNew && job.card.number !== card.number && !isEnded(card);
  job.show(card, heardAt);
  if (isNew || isAgain) byId("list").prepend(job.element);
}

function takeDown(taskId) {
  jobs.get(taskId)?.close();
  jobs.delete(taskId);
}

function showModels() {
  const names = new Set([...jobs.values()].map(({ card }) => card.model?.used).filter(Boolean));
  const known = [...byId("models").options].map(({ value }) => value);
  for (const name of names) {
    if (!known.includes(name)) byId("models").append(Object.assign(document.createElement("option"), { value: name }));
  }
}

// --- which jobs are shown ------------------------------------------------------------------------------------------------

const kindOf = ({ state }) => (state in KINDS ? state : "unmade");

const kinds = Object.keys(KINDS).map((kind) => {
  const button = Object.assign(document.createElement("button"), { type: "button" });
  button.addEventListener("click", () => showKind(kind));
  return { kind, button };
});
byId("kinds").append(...kinds.map(({ button }) => button));

function showKind(only) {
  byId("list").dataset.only = only;
  for (const { kind, button } of kinds) button.setAttribute("aria-pressed", String(kind === only));
  count();
}

function count() {
  const only = byId("list").dataset.only;
  const counts = {};
  for (const { card } of jobs.values()) counts[kindOf(card)] = (counts[kindOf(card)] ?? 0) + 1;
  counts[""] = jobs.size;
  for (const { kind, button } of kinds) {
    button.hidden = !counts[kind] && kind !== only;
    setText(button, `${KINDS[kind]} ${counts[kind] ?? 0}`);
  }
  byId("kinds").hidden = jobs.size < 2;
  byId("nothing").hidden = jobs.size > 0;
}

showKind("");

// --- news ------------------------------------------------------------------------------------------------------------------

function receive({ now, fresh, queue_state: state, cards, gone }) {
  // Ages by the server's own clock: this device's may be wrong.
  const here = Date.now() - Date.parse(now);
  const told = new Set(cards.map((card) => card.task_id));
  if (fresh) {
    // Another server process knows nothing of earlier jobs; finished ones can be heard all the same.
    for (const [taskId, { card }] of jobs) if (!told.has(taskId) && !isEnded(card)) takeDown(taskId);
  }
  // What the server forgets of the finished ones, this page may keep a while.
  for (const taskId of gone) if (jobs.has(taskId) && !isEnded(jobs.get(taskId).card)) takeDown(taskId);
  for (const card of cards.sort((one, other) => one.number - other.number)) putUp(card, Date.parse(card.received) + here);
  const spare = [...jobs].filter(([, { card, players }]) => isEnded(card) && !players.includes(Player.playing));
  for (const [taskId] of spare.slice(0, Math.max(0, spare.length - KEPT))) takeDown(taskId);
  count();
  showModels();
  showQueueState(state);
  if (fresh && !arrived) goTo(location.hash);
  if (!arrived) performance.mark("jobs");
  arrived = true;
}

let source = null;
let seen = "";

function connect() {
  source?.close();
  source = new EventSource(seen ? `/events?since=${seen}` : "/events");
  source.onopen = () => showQueueState(queueState);
  source.onmessage = ({ data, lastEventId }) => {
    seen = lastEventId;
    receive(JSON.parse(data));
  };
  source.onerror = ({ target }) => {
    showLine("off", "no connection, trying again");
    setText(byId("queue"), "");
    // The browser tries again by itself, but not after an answer such as a proxy's 502.
    if (target.readyState === EventSource.CLOSED) setTimeout(() => target === source && connect(), 3000);
  };
}

let hiding = 0;

function pause() {
  source?.close();
  source = null;
  showLine("off", "paused while hidden");
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(pause, HIDDEN_MS);
  else if (!source) connect();
});

const counted = (number, one, many) => `${number} ${number === 1 ? one : many}`;

function showQueueState(state) {
  queueState = state;
  if (state && !state.broker) showLine("away", "broker unreachable, reconnecting");
  else showLine("on", "live");
  setText(byId("queue"), state?.broker ? queueLine(state) : "");
}

function queueLine({ declared, waiting, workers }) {
  if (!declared) return "there is no queue: start a worker";
  if (workers === null) return "";
  const wait = waiting ? counted(waiting, "request waits", "requests wait") : "nothing waits";
  return workers ? `${counted(workers, "worker", "workers")}, ${wait}` : `no worker takes requests, ${wait}`;
}

function showLine(state, text) {
  const line = byId("line");
  line.dataset.state = state;
  setText(line, text);
}

// --- forms -----------------------------------------------------------------------------------------------------------------

async function post(path, body = {}) {
  try {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    const text = await answer.text();
    if (answer.ok) return JSON.parse(text);
    const isJson = answer.headers.get("Content-Type")?.startsWith("application/json");
    return isJson ? JSON.parse(text) : { error: { code: "http", message: text.trim() || `HTTP ${answer.status}` } };
  } catch {
    return { error: { code: "away", message: "This page's server does not answer. Is `acestep-consumer listen` running?" } };
  }
}

// Not randomUUID: that is missing when the page comes over plain HTTP from another machine.
const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

const form = byId("ask");
let orderId = newId();
let countdown = 0;

function answer(line, kind, text) {
  if (line === byId("answer")) clearInterval(countdown);
  line.hidden = !text;
  line.dataset.kind = kind;
  setText(line, text);
}

function readForm() {
  const body = { task_id: orderId };
  for (const name of FIELDS) {
    const field = form.elements[name];
    if (field.type === "checkbox") body[name] = field.checked;
    else if (field.value.trim()) body[name] = field.value;
  }
  return body;
}

function fillForm(request) {
  for (const name of FIELDS) {
    const field = form.elements[name];
    if (field.type === "checkbox") field.checked = Boolean(request[name]);
    else field.value = request[name] ?? (name === "audio_format" ? "mp3" : "");
  }
  // Ogg and Opus are one format; the list has one of them.
  if (request.audio_format === "ogg") form.elements.audio_format.value = "opus";
  if (request.model || request.seed || request.thinking) byId("more").open = true;
  orderId = newId();
  mark([]);
  answer(byId("answer"), "", "");
  form.elements.prompt.focus();
}

function mark(names) {
  for (const name of FIELDS) form.elements[name].setAttribute("aria-invalid", String(names.includes(name)));
  const first = form.elements[names[0]];
  if (byId("more").contains(first)) byId("more").open = true;
  first?.focus();
}

// A date in an alert would be read out each second: the line is an alert once, the count is not.
function countDown(seconds, text) {
  const line = byId("answer");
  const until = Date.now() + seconds * 1000;
  const step = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    setText(line.lastElementChild, left > 0 ? `Try again in ${left} s.` : "Try again now.");
    if (left <= 0) clearInterval(countdown);
  };
  answer(line, "wait", "");
  line.hidden = false;
  line.append(`${startingLarge(text)} `, Object.assign(document.createElement("span"), { ariaLive: "off" }));
  step();
  countdown = setInterval(step, 1000);
}

function refuse(error) {
  const line = byId("answer");
  if (error.code === "queue_full") {
    countDown(error.retry_after_s, `${error.message.replace(/; try again in .*$/, "")}.`);
  } else if (error.fields) {
    answer(line, "bad", error.fields.map(({ field, rule }) => `${field}: ${rule}`).join("\n"));
    mark(error.fields.map(({ field }) => field).filter((field) => FIELDS.includes(field)));
  } else {
    answer(line, "bad", startingLarge(error.message));
  }
}

function accept(taskId) {
  const line = byId("answer");
  answer(line, "good", "Accepted.");
  line.append(" ", Object.assign(document.createElement("a"), { href: `#${taskId}`, textContent: "See it" }));
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const wrong = FIELDS.filter((name) => !form.elements[name].checkValidity());
  mark(wrong);
  if (wrong.length) {
    const words = wrong.map((name) => form.elements[name].validationMessage);
    answer(byId("answer"), "bad", wrong[0] === "prompt" ? "Say what it should sound like." : words.join("\n"));
    return;
  }
  const button = form.querySelector("button");
  button.disabled = true;
  mine.add(orderId);
  if (queueState && !queueState.broker) answer(byId("answer"), "wait", "Broker unreachable. Trying for half a minute.");
  const { error, task_id: taskId } = await post("/jobs", readForm());
  button.disabled = false;
  button.focus();
  if (error) {
    refuse(error);
    return;
  }
  orderId = newId();
  accept(taskId);
  // In one column, the job is far below the form.
  if (getComputedStyle(document.querySelector("main")).gridTemplateColumns.split(" ").length < 2) showJob(taskId);
});

// Other words are another job. The same words sent again, after an answer that was lost, are the same.
form.addEventListener("input", () => (orderId = newId()));

async function showJob(taskId) {
  if (!jobs.has(taskId)) {
    const { error } = await post(`/jobs/${encodeURIComponent(taskId)}/show`);
    if (error) return startingLarge(error.message);
    for (let tries = 0; tries < 50 && !jobs.has(taskId); tries++) await new Promise((done) => setTimeout(done, 100));
  }
  const job = jobs.get(taskId);
  const only = byId("list").dataset.only;
  if (job && only && only !== kindOf(job.card)) showKind("");
  const element = job?.element;
  // Twice: on the way there, jobs above it get the height that they really have.
  for (let times = 0; element && times < 2; times++) {
    element.scrollIntoView({ block: "start" });
    await new Promise((done) => setTimeout(done, 50));
  }
  element?.focus({ preventScroll: true });
  return "";
}

byId("find").addEventListener("submit", async (event) => {
  event.preventDefault();
  const taskId = event.target.elements.task_id.value.trim();
  if (!/^[A-Za-z0-9_-]{1,128}$/.test(taskId)) {
    answer(byId("found"), "bad", "An id has letters, digits, - and _.");
    return;
  }
  const trouble = await showJob(taskId);
  answer(byId("found"), "bad", trouble);
});

async function goTo(hash) {
  const taskId = hash.slice(1);
  if (!/^[A-Za-z0-9_-]{1,128}$/.test(taskId) || taskId === "jobs") return;
  const trouble = await showJob(taskId);
  if (trouble) byId("earlier").open = true;
  answer(byId("found"), "bad", trouble);
}

window.addEventListener("hashchange", () => goTo(location.hash));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const { players } of jobs.values()) for (const player of players) player.paint();
});
setInterval(() => {
  for (const job of jobs.values()) job.tick();
}, 1000);
connect();
