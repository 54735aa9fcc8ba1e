# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: where a model's files are, whether they are whole, and their weights in diffusers' classes.

Reading order: ``registry`` (a name to a folder), ``checkpoint_check`` and ``component_files`` (before anything
loads), ``checkpoint`` (loads, each weight once). Files: ``tensor_files`` (headers). ACE-Step's own layout:
``original_layout``, ``original_config``, ``original_weights``.
"""
