# SPDX-License-Identifier: Apache-2.0
"""Encoding of songs in processes of their own, so that it takes no time of the renderer's interpreter.

``pool.py`` is the renderer's side: it starts the processes and gives each one song at a time in shared memory.
``__main__.py`` is such a process, ``encode.py`` writes a file, ``lame.py`` an MP3 file. They measure songs as well.
"""
