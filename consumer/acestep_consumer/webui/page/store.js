// SPDX-License-Identifier: Apache-2.0
// What this browser remembers: favourites and the reader's choices. A browser may forbid storing: then until it closes.

const PREFIX = "acestep.";
const MAX_FAVOURITES = 5000;
const memory = new Map();

export function load(name, otherwise) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? (memory.get(name) ?? otherwise) : JSON.parse(text);
  } catch {
    return memory.get(name) ?? otherwise;
  }
}

export function save(name, value) {
  memory.set(name, value);
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Full or forbidden: `memory` has it.
  }
}

const read = () => {
  const found = load("favourites", []);
  return new Set(Array.isArray(found) ? found.filter((each) => typeof each === "string") : []);
};

let favourites = read();

export const songKey = (taskId, index) => `${taskId}/${index}`;

export const isFavourite = (key) => favourites.has(key);

/** Adds a song to the favourites or removes it. Another tab may have changed them: they are read before. */
export function toggleFavourite(key) {
  favourites = read();
  if (!favourites.delete(key)) favourites.add(key);
  save("favourites", [...favourites].slice(-MAX_FAVOURITES));
}

/** Calls `listener` when another tab of this browser changed the favourites. */
export function onFavouritesElsewhere(listener) {
  addEventListener("storage", ({ key }) => {
    if (key !== `${PREFIX}favourites`) return;
    favourites = read();
    listener();
  });
}
