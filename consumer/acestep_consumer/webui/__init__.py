# SPDX-License-Identifier: Apache-2.0
"""The page of ``acestep-consumer listen``: jobs with their progress, players for their songs, a form for new requests.

Reading order: ``job_view`` (one job as the page shows it), ``waiting`` (places of waiting jobs, and the workers),
``job_board`` (the latest jobs, the pages' feeds, and what keeps both up to date), ``origin_check`` (which requests are
allowed), ``audio_proxy`` (audio from S3), ``archive`` (many songs as one file), ``source_upload`` (files of the
reader's own), ``server`` (the routes). ``page/`` is sent to the browser as it is: ES modules without a build step,
nothing from other servers; ``page.js`` starts them.
"""
