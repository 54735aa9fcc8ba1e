// SPDX-License-Identifier: Apache-2.0
// One song in an opened job: its facts, its file, what can be made from it, and the stretch that is marked on it.

import { copyLink, finish, makeFrom } from "./actions.js";
import { copyOf, setLabel, setText } from "./dom.js";
import { localize, t } from "./i18n.js";
import { audioUrl, isCurrent, isPlaying, play, position, toggle } from "./player.js";
import { isFavourite, songKey, toggleFavourite } from "./store.js";
import { factsOf, songName, titleOf } from "./text.js";
import { decodePeaks, draw, peaksIn, whenSeen } from "./waveform.js";

const SHORTEST_S = 0.1;

export class Song {
  constructor(card, index, starred) {
    this.card = card;
    this.index = index;
    this.song = card.songs[index];
    this.url = audioUrl(card.task_id, index);
    this.starred = starred;
    this.element = localize(copyOf("song-template"));
    this.part = (name) => this.element.querySelector(name);
    this.stretch = [0, this.song.duration_s];
    this.peaks = peaksIn(this.song);
    this.listen();
    this.show();
  }

  listen() {
    const { card, index, song } = this;
    const on = (name, act) => this.part(name).addEventListener("click", act);
    on(".pick", () => (isCurrent(card.task_id, index) ? toggle() : play(card, index)));
    on(".star", () => {
      toggleFavourite(songKey(card.task_id, index));
      this.starred();
    });
    on(".copy-link", () => copyLink(card, index));
    on(".variation", () => makeFrom(card, index, "variation"));
    on(".extend", () => makeFrom(card, index, "extend"));
    on(".cover", () => makeFrom(card, index, "cover"));
    on(".lines", () => {
      // Section tags are not sung.
      const sung = song.lyrics.map(({ text }) => text.trim()).filter((text) => text && !/^\[.*\]$/.test(text)).join("\n");
      makeFrom(card, index, "lines", { lines_before: sung, lines_after: sung });
    });
    this.part(".lines").hidden = !song.lyrics.length;
    on(".stems", () => makeFrom(card, index, "stems"));
    on(".finish", () => finish(card, index));
    this.part(".finish").hidden = card.request?.quality !== "draft";
    on(".from-here", () => this.mark([this.here(), Math.max(this.here(), this.stretch[1])]));
    on(".to-here", () => this.mark([Math.min(this.here(), this.stretch[0]), this.here()]));
    on(".repaint", () => {
      const [from, to] = this.stretch;
      makeFrom(card, index, "repaint", { repainting_start: rounded(from), repainting_end: rounded(to) });
    });
    this.part(".from").addEventListener("change", ({ target }) => this.mark([Number(target.value), this.stretch[1]]));
    this.part(".to").addEventListener("change", ({ target }) => this.mark([this.stretch[0], Number(target.value) || song.duration_s]));
    this.part(".stretch").addEventListener("toggle", () => this.open());
    this.drag(this.part(".marked"));
  }

  here() {
    return isCurrent(this.card.task_id, this.index) ? position() : 0;
  }

  /** Marks a stretch while the pointer is drawn over the waveform. */
  drag(canvas) {
    let begun = null;
    const at = (event) => {
      const { left, width } = canvas.getBoundingClientRect();
      return Math.min(1, Math.max(0, (event.clientX - left) / width)) * this.song.duration_s;
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      begun = at(event);
      this.mark([begun, begun]);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (begun !== null) this.mark([Math.min(begun, at(event)), Math.max(begun, at(event))]);
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (begun = null));
  }

  async open() {
    if (!this.part(".stretch").open) return;
    this.stopPainting ??= whenSeen(this.part(".marked"), () => this.paint());
    this.mark(this.stretch);
    this.peaks ??= await decodePeaks(this.url, this.song);
    this.paint();
  }

  mark([from, to]) {
    const end = this.song.duration_s;
    const first = Math.min(Math.max(0, from), end - SHORTEST_S);
    this.stretch = [Math.max(0, first), Math.min(end, Math.max(to, first + SHORTEST_S))];
    this.part(".from").value = rounded(this.stretch[0]);
    this.part(".to").value = rounded(this.stretch[1]);
    this.paint();
  }

  paint() {
    const end = this.song.duration_s || 1;
    draw(this.part(".marked"), this.peaks, -1, this.stretch.map((each) => each / end));
  }

  show() {
    const { card, index, song } = this;
    const name = `${songName(card, index)}: ${titleOf(card)}`;
    const playing = isCurrent(card.task_id, index) && isPlaying();
    setText(this.part(".pick"), `${playing ? "❚❚" : "▶"} ${songName(card, index)}`);
    setLabel(this.part(".pick"), playing ? t("song.pause", { name }) : t("song.play", { name }));
    this.element.toggleAttribute("data-current", isCurrent(card.task_id, index));
    setText(this.part(".facts"), factsOf(song));
    const download = this.part(".download");
    download.href = `${this.url}?download`;
    download.download = song.name;
    setLabel(download, `${t("action.download")}: ${name}`);
    for (const kind of song.lyric_files) {
      const link = this.part(`.${kind}`);
      link.hidden = false;
      link.href = `${this.url}/${kind}`;
      link.download = "";
      setLabel(link, `${t(`action.${kind}`)}: ${name}`);
    }
    const star = this.part(".star");
    star.setAttribute("aria-pressed", String(isFavourite(songKey(card.task_id, index))));
    setLabel(star, t("song.favourite", { name }));
    setLabel(this.part(".copy-link"), `${t("action.copy_link")}: ${name}`);
    for (const action of ["variation", "extend", "cover", "lines", "stems", "finish"]) setLabel(this.part(`.${action}`), `${t(`action.${action}`)}: ${name}`);
  }

  close() {
    this.stopPainting?.();
  }
}

const rounded = (seconds) => Math.round(seconds * 100) / 100;
