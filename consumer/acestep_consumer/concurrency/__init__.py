# SPDX-License-Identifier: Apache-2.0
"""Asyncio locks: one holder per key, and shared or exclusive."""
