# SPDX-License-Identifier: Apache-2.0
"""Locks of asyncio, one holder per key, and shared or exclusive; queues by priority; slots for threads."""
