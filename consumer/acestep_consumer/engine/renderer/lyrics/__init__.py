# SPDX-License-Identifier: Apache-2.0
"""Lyrics with times: ``alignment_pass`` (attention to the lyrics, on the device), ``lyric_alignment``, ``lyric_files``.

``medians``, with ``median_kernels``, is the step of the alignment that needs the device.
"""
