# SPDX-License-Identifier: Apache-2.0
"""The renderer process: ACE-Step 1.5 through diffusers, from a job and its plan to encoded songs.

Reading order. A job's thread: ``service`` (requests), ``render`` (one job), ``pipeline_arguments``, ``prepare``,
``encode_songs``; ``render_resources`` is what jobs share. The device's thread: ``scheduler`` (continuous batching),
``waiting_queue``, ``batch_request``, ``model_runner`` (one model's forward passes). Inside a forward pass:
``conditioning`` and ``text_encoder`` (encoders), ``sample`` (one song's state), ``denoiser``, ``pack``, ``packed_dit``
and ``attention`` (many songs in one DiT pass), ``vae_decode``, ``lora`` and ``lora_file``. Memory: ``measure``,
``degradation``, ``offload``. Speed: ``cuda_graphs``, ``device_clock``, ``fused_decoder`` and ``decoder_kernels`` (the
VAE decoder on Hopper). Start: ``startup``, ``device``, ``registry``, ``checkpoint``, ``quantization``, ``components``.
"""
