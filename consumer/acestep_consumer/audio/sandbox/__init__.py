# SPDX-License-Identifier: Apache-2.0
"""Audio inputs become samples in a process of their own, for the bytes come from strangers and FFmpeg is large.

``process.py`` is our side, ``__main__.py`` the child's, ``landlock.py`` what the child may do, ``verdict.py`` how it
ends. The child gets one file to read and one to write, and nothing else: no path, no network, no secret, no device.
"""
