# SPDX-License-Identifier: Apache-2.0
"""The GPU tier's policy: what a card may be asked for, and what a request becomes under it. Pure."""
