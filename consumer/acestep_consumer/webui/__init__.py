# SPDX-License-Identifier: Apache-2.0
"""A page to hear the songs: what is under way, what came of it, and a form to ask for more.

Reading order: ``card`` (one job as the page shows it), ``pulse`` (whether broker and workers are there), ``board`` (the
last jobs, and who looks at them), ``orders`` (what the form may send), ``guard`` (who may ask at all), ``songs`` (sound
out of S3), ``server`` (the routes), ``reporter`` (events and pulse onto the board). ``page/`` is what the browser gets,
as it is: no build step, nothing from other servers.
"""
