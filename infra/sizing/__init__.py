# SPDX-License-Identifier: Apache-2.0
"""Simulates how many workers a stream of requests needs: ``python -m infra.simulate --help``."""
