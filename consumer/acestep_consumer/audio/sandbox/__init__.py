# SPDX-License-Identifier: Apache-2.0
"""Sandbox for decoding audio inputs: a process of its own, since the bytes are untrusted and FFmpeg is large.

``process.py`` is the parent's side, ``__main__.py`` the child's, ``landlock.py`` restricts the child, ``exit_codes.py``
is its answer. The child gets one file to read and one to write, and nothing else: no path, network, secret or device.
"""
