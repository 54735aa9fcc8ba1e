# SPDX-License-Identifier: Apache-2.0
"""The worker's life cycle: signals, readiness, prefetch, announcements, reload."""
