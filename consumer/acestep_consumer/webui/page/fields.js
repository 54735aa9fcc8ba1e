// SPDX-License-Identifier: Apache-2.0
// Which fields of a request the form's controls stand for, and which of them belong to what is made.

const WORDS = ["prompt", "lyrics", "audio_duration", "batch_size", "audio_format", "vocal_language", "bpm", "key_scale", "time_signature"];
const PLAN = ["thinking", "use_format", "lm_negative_prompt"];
const SOUND = ["model", "lora", "lora_scale", "inference_steps", "guidance_scale", "loudness_lufs"];
export const MORE = [...SOUND, ...PLAN, "candidates", "keep", "seed", "timestamps"];
export const SOURCE = ["source_task_id", "source_index", "src_audio_path"];
export const BY_ID = ["source_task_id", "source_index"];
// What is made from a song -> its controls, and the fields that say so.
export const KINDS = {
  new: { controls: [], fixed: {} },
  cover: { controls: ["audio_cover_strength"], fixed: { task_type: "cover" } },
  repaint: { controls: ["repainting_start", "repainting_end"], fixed: { task_type: "repaint" } },
  lines: { controls: ["lines_after", "lines_before"], fixed: {} },
  extend: { controls: ["extend_left_s", "extend_right_s"], fixed: {} },
  variation: { controls: ["variation"], fixed: {} },
  stems: { controls: [], fixed: { stems: true } },
};
/** Fields of a request that another control stands for. */
export const SHOWN_BY = { task_type: "kind", stems: "kind", quality: "draft", replace_lines: "lines_after" };
/** These work on a result, and not on audio from elsewhere. */
export const BY_ID_ALONE = ["lines", "variation"];
/** Need no words: they come from the song. */
export const WITHOUT_WORDS = ["stems", "extend", "variation", "repaint", "lines"];
export const FIELDS = [...WORDS, ...MORE, ...SOURCE, ...Object.values(KINDS).flatMap(({ controls }) => controls)];

// Fields that several controls stand for. `show`: the values of these; null: they cannot show it. `read`: the field of
// a request; undefined: it is not given.
const COMPOSED = {
  lora: { controls: ["lora", "lora_scale"], show: showLora, read: readLora },
  replace_lines: { controls: ["lines_before", "lines_after"], show: showLines, read: readLines },
};

const isKind = (kind) => Object.hasOwn(KINDS, kind);

/** What a request makes, as the form has it. */
export function kindOf(request) {
  if (!request.source_task_id && !request.src_audio_path) return "new";
  if (request.stems) return "stems";
  if (request.replace_lines) return "lines";
  if (request.variation) return "variation";
  if (request.extend_left_s || request.extend_right_s) return "extend";
  return isKind(request.task_type) ? request.task_type : "new";
}

/** The controls that count for what is made. */
export const fieldsOf = (kind) => [...WORDS, ...MORE, ...(kind === "new" ? [] : [...SOURCE, ...KINDS[kind].controls])];

/** Splits a request into the values of controls and what has none. */
export function split(request) {
  const values = { ...request };
  const rest = {};
  for (const [name, { controls, show }] of Object.entries(COMPOSED)) {
    if (!(name in values)) continue;
    const parts = show(values[name]);
    if (!parts) rest[name] = values[name];
    delete values[name];
    parts?.forEach((part, index) => (values[controls[index]] = part));
  }
  return { values, rest };
}

/** Puts the values of controls together to fields of a request. */
export function join(values) {
  const body = { ...values };
  for (const [name, { controls, read }] of Object.entries(COMPOSED)) {
    const found = read(...controls.map((each) => values[each]));
    for (const each of controls) delete body[each];
    if (found !== undefined) body[name] = found;
  }
  return body;
}

function showLora(lora) {
  if (typeof lora === "string") return [lora];
  return (lora.alpha ?? null) === null ? [lora.path, lora.scale === 1 ? undefined : lora.scale] : null;
}

function readLora(path, scale) {
  if (!path) return undefined;
  return scale ? { path, scale: Number(scale) } : path;
}

const linesIn = (text = "") => text.split("\n").map((line) => line.trim());

/** Whether there are as many new lines as old ones. */
export const isPaired = (before, after) => linesIn(before).length === linesIn(after).length;

function showLines(lines) {
  const names = Object.keys(lines);
  // Of a section, the new lines are as many as one likes.
  return names.length === 2 && names.every((name) => ["section", "lyrics"].includes(name)) ? null : [names.join("\n"), Object.values(lines).join("\n")];
}

function readLines(before, after) {
  const old = linesIn(before);
  const changed = linesIn(after).map((line, index) => [old[index], line]).filter(([one, other]) => one && one !== other);
  return changed.length ? Object.fromEntries(changed) : undefined;
}
