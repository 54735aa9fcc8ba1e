# SPDX-License-Identifier: Apache-2.0
"""Denoising: one step of the DiT for many songs, and what steers each of them.

Reading order: ``sample`` (one song's state and arithmetic), ``schedule``, ``denoiser`` (the step of many songs),
``pack`` and ``packed_dit`` (their forward pass), ``attention``, ``cuda_graphs`` (its launch). What steers a song:
``guidance``, ``dcw``, ``flow_edit``, ``rng``.
"""
