# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight models in the layout of real checkpoints, for tests and the demo."""
