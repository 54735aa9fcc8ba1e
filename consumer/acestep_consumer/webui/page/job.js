// SPDX-License-Identifier: Apache-2.0
// One job in the list: a compact row, with everything else behind its title.

import { another, copyCurl, copyJson, edit } from "./actions.js";
import { announce, copyOf, make, post, setChildren, setLabel, setList, setPairs, setText, shown, tell } from "./dom.js";
import { currentLanguage, localize, said, t, tn } from "./i18n.js";
import { isCurrent, isPlaying, current, play, refresh, toggle } from "./player.js";
import { Song } from "./song.js";
import { isFavourite, songKey, toggleFavourite } from "./store.js";
import { clock, detailed, doing, isEnded, labelled, measureName, measureValue, notesOf, problem, reasonOf, score, songName, spoken, titleOf } from "./text.js";
import { draw, peaksIn, whenSeen } from "./waveform.js";

const NO_PARAMETERS = ["prompt", "lyrics", "model"];

export class Job {
  /** `page`: `isMine(id)`, `isAway()`, `familyOf(id)`, `changed()` after a favourite was added or removed. */
  constructor(card, page) {
    this.page = page;
    this.songs = [];
    this.place = null;
    this.gone = false;
    this.element = localize(copyOf("job-template"));
    this.element.id = `job-${card.task_id}`;
    this.part = (name) => this.element.querySelector(name);
    const id = this.part(".id");
    id.href = `#${card.task_id}`;
    id.textContent = card.task_id;
    this.listen();
  }

  listen() {
    const on = (name, act) => this.part(name).addEventListener("click", act);
    on(".play", () => (isCurrent(this.card.task_id) ? toggle() : play(this.card, 0)));
    on(".open", () => this.open(this.part(".more").hidden));
    on(".star", () => this.star());
    on(".stop", () => this.stop());
    on(".again", () => another(this.card));
    on(".edit", () => edit(this.card));
    on(".copy-json", () => copyJson(this.card));
    on(".copy-curl", () => copyCurl(this.card));
    this.stopPainting = whenSeen(this.part(".small-wave"), () => this.paint());
  }

  get title() {
    return titleOf(this.card);
  }

  get isFavourite() {
    return this.card.songs.some((_, index) => isFavourite(songKey(this.card.task_id, index)));
  }

  star() {
    toggleFavourite(songKey(this.card.task_id, this.chosen));
    this.page.changed();
  }

  /** The number of the song that the row's buttons are about: the one in the player bar, else the first. */
  get chosen() {
    return isCurrent(this.card.task_id) ? current().index : 0;
  }

  open(isOpen) {
    this.part(".more").hidden = !isOpen;
    this.part(".open").setAttribute("aria-expanded", String(isOpen));
    this.element.toggleAttribute("data-open", isOpen);
    tell(this.part(".said"), "", "");
    if (isOpen) this.showMore();
  }

  /** Opens the row at one of its songs. */
  goToSong(index) {
    this.open(true);
    const song = this.songs[index]?.element;
    song?.scrollIntoView({ block: "nearest" });
    song?.focus({ preventScroll: true });
  }

  show(card, heardAt) {
    // A short job has ended before the page hears of it for the first time.
    const before = this.card ?? { state: "waiting", progress: 0 };
    this.card = card;
    this.heardAt = heardAt;
    this.element.dataset.state = card.state;
    if (card.state !== "waiting") this.place = null;
    this.showRow();
    this.showWay();
    setText(this.part(".reason"), reasonOf(card));
    const details = (card.error?.details ?? []).map(detailed);
    setList(this.part(".details"), details.filter((text) => !card.error.message.includes(text)));
    setList(this.part(".notes"), notesOf(card));
    if (!this.part(".more").hidden) this.showMore();
    refresh(card);
    this.tell(before);
  }

  /** Writes everything again, in another language. */
  translate() {
    localize(this.element);
    tell(this.part(".said"), "", "");
    for (const song of this.songs) song.close();
    this.songs = [];
    this.show(this.card, this.heardAt);
  }

  showRow() {
    const { card, title } = this;
    setText(this.part(".state"), t(`state.${card.state}`));
    setText(this.part(".open"), title);
    this.titleShown = title;
    const since = new Date(card.since);
    const time = this.part("time");
    time.dateTime = card.since;
    const today = since.toDateString() === new Date().toDateString();
    setText(time, since.toLocaleString(currentLanguage(), today ? { timeStyle: "short" } : { dateStyle: "short" }));
    time.title = since.toLocaleString(currentLanguage());
    const count = notesOf(card).length;
    this.part(".noted").hidden = !count || card.state !== "completed";
    setText(this.part(".noted"), tn("job.noted", count));
    const [first] = card.songs;
    const length = first ? clock(first.duration_s) : "";
    setText(this.part(".length"), card.songs.length > 1 ? `${card.songs.length} × ${length}` : length);
    this.part(".small-wave").hidden = !first?.peaks;
    this.paint();
    this.showPlayer();
    const stop = this.part(".stop");
    const focused = document.activeElement === stop;
    stop.hidden = isEnded(card);
    stop.disabled = card.stopping;
    setText(stop, card.stopping ? t("action.stopping") : t("action.stop"));
    setLabel(stop, `${stop.textContent}: ${title}`);
    if (focused && (stop.hidden || stop.disabled)) this.element.focus({ preventScroll: true });
  }

  /** Shows whether its song plays, and whether it is a favourite. */
  showPlayer() {
    const { card, title } = this;
    const playing = isCurrent(card.task_id) && isPlaying();
    const button = this.part(".play");
    button.hidden = !card.songs.length;
    button.toggleAttribute("data-playing", playing);
    setLabel(button, playing ? t("song.pause", { name: title }) : t("song.play", { name: title }));
    this.element.toggleAttribute("data-current", isCurrent(card.task_id));
    const star = this.part(".line > .star");
    star.hidden = !card.songs.length;
    star.setAttribute("aria-pressed", String(this.isFavourite));
    setLabel(star, t("song.favourite", { name: title }));
    for (const song of this.songs) song.show();
  }

  paint() {
    const [first] = this.card?.songs ?? [];
    if (first?.peaks) draw(this.part(".small-wave"), peaksIn(first), -1);
  }

  showWay() {
    const { card } = this;
    this.part(".under-way").hidden = isEnded(card);
    const bar = this.part("progress");
    bar.hidden = card.state !== "running";
    bar.value = card.progress;
    setLabel(bar, t("job.progress", { title: this.title }));
    this.tick();
  }

  tick() {
    if (!isEnded(this.card)) setText(this.part(".doing"), doing(this, this.page.isAway()));
  }

  showMore() {
    const { card } = this;
    this.showSongs();
    this.showScores();
    this.showFamily();
    const edited = (edit) => t("note.edit", { field: labelled(edit.field), value: shown(edit.value), because: said(edit.because) });
    setList(this.part(".edits"), card.edits.map(edited));
    this.showWords();
    for (const name of [".again", ".edit", ".copy-json", ".copy-curl"]) {
      this.part(name).hidden = !card.request;
      setLabel(this.part(name), `${this.part(name).textContent}: ${this.title}`);
    }
  }

  showSongs() {
    const { card } = this;
    const key = JSON.stringify(card.songs);
    if (key !== this.songsKey || this.songs.length !== card.songs.length) {
      this.songsKey = key;
      for (const song of this.songs) song.close();
      this.songs = card.songs.map((_, index) => new Song(card, index, () => this.page.changed()));
      this.part(".songs").replaceChildren(...this.songs.map(({ element }) => element));
    }
    for (const song of this.songs) song.show();
  }

  showScores() {
    const { card } = this;
    const candidates = card.candidates ?? [];
    this.part(".scores").hidden = !candidates.length;
    const measures = [...new Set(candidates.flatMap((each) => Object.keys(each.measures)))];
    const columns = [t("candidate.song"), t("candidate.seed"), t("candidate.score"), ...measures.map(measureName)];
    setChildren(this.part("thead"), columns, () => [make("tr", {}, ...columns.map((textContent) => make("th", { scope: "col", textContent })))]);
    setChildren(this.part("tbody"), [candidates, columns], () => candidates.map((each) => this.scoreRow(each, measures)));
  }

  scoreRow(candidate, measures) {
    const { card } = this;
    const name = make("td");
    if (candidate.index !== null && card.songs[candidate.index]) {
      const button = make("button", { type: "button", textContent: songName(card, candidate.index) });
      button.addEventListener("click", () => play(this.card, candidate.index));
      name.append(button);
    } else name.textContent = candidate.kept ? "" : t("candidate.dropped");
    const values = [candidate.seed, score(candidate.score), ...measures.map((each) => measureValue(candidate.measures[each]))];
    return make("tr", {}, name, ...values.map((textContent) => make("td", { textContent })));
  }

  showFamily() {
    const { parents, children } = this.page.familyOf(this.card);
    const line = this.part(".family");
    line.hidden = !parents.length && !children.length;
    setChildren(line, [parents, children, currentLanguage()], () => [
      ...linked(t("family.from"), parents),
      ...linked(t("family.into"), children),
    ]);
  }

  showWords() {
    const { request, codes, metas, model, lm, timings, worker_id, tier } = this.card;
    const { prompt = "", lyrics = "" } = request ?? {};
    setText(this.part(".prompt"), prompt);
    setText(this.part(".lyrics"), lyrics);
    this.part(".lyrics").lang = /^[a-z]{2,3}$/.test(metas?.language ?? "") ? metas.language : "";
    const parameters = Object.entries(request ?? {}).filter(([name]) => !NO_PARAMETERS.includes(name));
    setPairs(this.part("dl"), [
      ...parameters.map(([name, value]) => [labelled(name), value]),
      [labelled("audio_code_string"), codes ? tn("fact.codes", codes) : ""],
      [labelled("model"), model?.used ?? request?.model],
      [t("fact.planned_by"), lm && `${lm.model} (${lm.backend})`],
      [t("fact.caption"), metas?.caption === prompt ? "" : metas?.caption],
      [t("fact.tempo"), metas?.bpm && `${metas.bpm} bpm`],
      [t("fact.key"), metas?.keyscale],
      [t("fact.time_signature"), metas?.timesignature],
      [t("fact.language"), metas?.language],
      [t("fact.made_in"), timings?.total && spoken(timings.total)],
      [t("fact.worker"), worker_id && (tier ? `${worker_id} (${tier})` : worker_id)],
    ]);
  }

  // Not every step is worth a word of a screen reader: changes of state, and each quarter.
  tell(before) {
    const { card } = this;
    if (!this.page.isMine(card.task_id)) return;
    const quarter = Math.floor(card.progress * 4);
    if (card.state !== before.state) {
      const songs = card.songs.length ? `, ${tn("job.count", card.songs.length)}` : "";
      announce(`${this.title}: ${t(`state.${card.state}`).toLowerCase()}${songs}`);
    } else if (card.state === "running" && quarter > Math.floor(before.progress * 4)) {
      announce(`${this.title}: ${quarter * 25}%`);
    }
  }

  async stop() {
    const { error } = await post(`/jobs/${this.card.task_id}/cancel`);
    if (!error) return;
    setText(this.part(".doing"), problem(error));
    announce(problem(error));
  }

  close() {
    this.stopPainting();
    for (const song of this.songs) song.close();
    this.element.remove();
  }
}

function linked(label, relatives) {
  if (!relatives.length) return [];
  const links = relatives.map(([taskId, title]) => make("a", { href: `#${taskId}`, textContent: title, dir: "auto" }));
  return [`${label} `, ...links.flatMap((link, at) => (at ? [", ", link] : [link])), " "];
}
