# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights in the layout of real checkpoints, for tests and the demo."""
