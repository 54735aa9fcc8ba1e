// SPDX-License-Identifier: Apache-2.0
// Starts the page. `feed` receives updates, `list` and `job` show them, `player` plays, `form` sends requests.

import { byId } from "./dom.js";
import { board, isAway, startFeed } from "./feed.js";
import { onAsked, showWorkers, startForm } from "./form.js";
import { startLanguage } from "./i18n.js";
import { startKeys } from "./keys.js";
import { goTo, receive, remember, showJob, songsInOrder, startList, titleOfJob } from "./list.js";
import { startLyrics } from "./lyrics.js";
import { setSequence, startPlayer } from "./player.js";

let arrived = false;

startLanguage(byId("language"));
startPlayer();
startLyrics();
startList({ isAway, board });
startKeys();
setSequence(songsInOrder);
onAsked(remember);
await startForm({ isAway, showJob, titleOf: titleOfJob });
startFeed((update) => {
  receive(update);
  showWorkers(update.workers);
  if (!arrived) {
    goTo(location.hash);
    performance.mark("jobs");
  }
  arrived = true;
});
