# SPDX-License-Identifier: Apache-2.0
"""What runs inside the renderer process: ACE-Step 1.5 through diffusers, from a job and its plan to encoded songs.

Reading order. A job's way: ``service`` (a thread for each), ``render``, ``arguments``, ``draft``. The device's thread:
``batcher`` (the loop), ``line`` (who is next), ``take``, ``booth`` (one model at work). What a booth does:
``conditioning`` and ``texts`` (drafts to songs), ``song`` (a song's step), ``denoiser``, ``pack``, ``packed_dit`` and
``attention`` (many songs in one pass), ``tiles`` and ``decode`` (sound), ``lora``. Memory: ``measure``, ``budget``,
``means``, ``offload``. Speed: ``compiling``, ``graphs``, ``clock``. Start: ``studio``, ``device``, ``registry``,
``checkpoint``, ``parts``.
"""
