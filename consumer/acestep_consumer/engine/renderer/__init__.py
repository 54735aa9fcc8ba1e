# SPDX-License-Identifier: Apache-2.0
"""The renderer process: ACE-Step 1.5 through diffusers, from a job and its plan to encoded songs.

Reading order. A job's thread: ``service`` (requests), ``render`` (one job), ``pipeline_arguments``, ``prepare``,
``encode_songs`` with ``output``, ``latents`` (as a file), ``song_tags`` and ``loudness_report``; ``render_resources``
is what jobs share. The device's thread: ``scheduler`` (continuous batching), ``waiting_queue``, ``batch_request``,
``model_runner`` (one model's forward passes). Before the steps: ``conditioning``, ``text_encoder``, ``source``,
``window``, ``code_latents``. The forward passes: ``denoising``, ``decoder``, ``lyrics``; ``lora`` and ``lora_file``
change their weights. Memory: ``measure``, ``degradation``, ``offload``, ``errors``. Start: ``startup``, ``device``,
``probe_device``, ``checkpoints``, ``quantization``, ``components``, ``quiet_imports``. ``device_clock`` measures.
"""
