# SPDX-License-Identifier: Apache-2.0
"""How many workers a stream of requests needs, by simulation: ``python -m infra.simulate --help``."""
