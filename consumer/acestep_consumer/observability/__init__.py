# SPDX-License-Identifier: Apache-2.0
"""Metrics, health endpoints, traces and job statistics."""
