// SPDX-License-Identifier: Apache-2.0
// Audio of the reader's own as the source of a song: uploaded as soon as it is chosen, and then named by its address.

import { byId, setText, upload } from "./dom.js";
import { t } from "./i18n.js";
import { problem } from "./text.js";

let running = null;
let largest = Infinity;

export function setLargest(bytes) {
  largest = bytes;
}

export const isUploading = () => running !== null;

/** Stops an upload that is going on, and forgets the file that was chosen. */
export function dropUpload() {
  running?.abort();
  byId("source-file").value = "";
  show("", null);
}

/** `text`: about the upload; `share`: of what has been sent, null: nothing is being sent. */
function show(text, share) {
  const shown = byId("upload");
  shown.hidden = !text;
  shown.querySelector("progress").hidden = share === null;
  shown.querySelector("progress").value = share ?? 0;
  setText(shown.querySelector("p"), text);
}

const failed = (file, error) => t("upload.failed", { name: file.name, reason: problem(error) });

async function send(file, take) {
  running?.abort();
  const own = new AbortController();
  running = own;
  show(t("upload.running", { name: file.name }), 0);
  const path = `/uploads?name=${encodeURIComponent(file.name)}`;
  const found = await upload(path, file, (share) => running === own && show(t("upload.running", { name: file.name }), share), own.signal);
  if (running === own) running = null;
  if (found === null) return; // another one is sent in its place, or none
  if (found.error) show(failed(file, found.error), null);
  else {
    show(t("upload.done", { name: file.name }), null);
    take(found.address);
  }
}

function refuse(file) {
  running?.abort();
  show(failed(file, { code: "upload_large" }), null);
}

/** `take(address)`: called with where a file lies that was uploaded. */
export function startUpload(take) {
  byId("source-file").addEventListener("change", ({ target }) => {
    const [file] = target.files;
    if (!file) dropUpload();
    else if (file.size > largest) refuse(file);
    else send(file, take);
  });
}
