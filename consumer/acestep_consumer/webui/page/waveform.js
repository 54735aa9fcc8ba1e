// SPDX-License-Identifier: Apache-2.0
// Waveforms: from the peaks in a song's event, else decoded here, one song at a time and only when somebody opens it.

const BARS = 400;
// Enough for a picture, and a song of ten minutes decodes to a tenth of the memory.
const PICTURE_HZ = 12_000;
const LARGEST_BYTES = 100e6;
const BAR_PX = 4;
const decoded = new Map();
const MAX_DECODED = 200;
let decoding = Promise.resolve();

/** The peaks of a song's event, 0 to 1 and scaled to its loudest; null: it has none. */
export function peaksIn(song) {
  if (!song.peaks) return null;
  return scaled(Float32Array.from(atob(song.peaks), (letter) => letter.charCodeAt(0) / 255));
}

/** The peaks of a song whose event has none: its file is fetched and decoded. Null: too large, or not decodable. */
export function decodePeaks(url, song) {
  if (song.bytes > LARGEST_BYTES || navigator.connection?.saveData) return Promise.resolve(null);
  if (!decoded.has(url)) {
    if (decoded.size >= MAX_DECODED) decoded.delete(decoded.keys().next().value);
    decoding = decoding.then(() => fetchPeaks(url)).catch(() => null);
    decoded.set(url, decoding);
  }
  return decoded.get(url);
}

async function fetchPeaks(url) {
  const answer = await fetch(url);
  if (!answer.ok) return null;
  const sound = await new OfflineAudioContext(1, 1, PICTURE_HZ).decodeAudioData(await answer.arrayBuffer());
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
  return scaled(peaks);
}

function scaled(peaks) {
  const top = Math.max(...peaks, 1e-3);
  return peaks.map((peak) => peak / top);
}

/** Draws a waveform. `played`: 0 to 1; below 0: nothing. `marked`: first and last position of a stretch, 0 to 1. */
export function draw(canvas, peaks, played, marked = null) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width) return;
  const scale = devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.toggleAttribute("data-drawn", Boolean(peaks));
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const [rest, done] = [style.getPropertyValue("--wave"), style.getPropertyValue("--accent")];
  if (marked) {
    pen.fillStyle = style.getPropertyValue("--mark");
    pen.fillRect(marked[0] * width, 0, Math.max(2, (marked[1] - marked[0]) * width), height);
  }
  const bars = Math.max(1, Math.floor(width / BAR_PX));
  for (let bar = 0; bar < bars; bar++) {
    const tall = peaks ? Math.max(2, barHeight(peaks, bar, bars) * (height - 4)) : 2;
    pen.fillStyle = (bar + 0.5) / bars <= played ? done : rest;
    pen.beginPath();
    pen.roundRect(bar * BAR_PX + 0.5, (height - tall) / 2, BAR_PX - 1, tall, 1.5);
    pen.fill();
  }
}

function barHeight(peaks, bar, bars) {
  const first = Math.floor((bar * peaks.length) / bars);
  const last = Math.max(first + 1, Math.floor(((bar + 1) * peaks.length) / bars));
  return Math.max(...peaks.subarray(first, last));
}

/** Calls `paint` when a canvas comes into view or changes its size; returns how to stop. */
export function whenSeen(canvas, paint) {
  const resized = new ResizeObserver(paint);
  resized.observe(canvas);
  return () => resized.disconnect();
}
