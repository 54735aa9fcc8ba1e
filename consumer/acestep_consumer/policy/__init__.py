# SPDX-License-Identifier: Apache-2.0
"""GPU tiers: their limits, admission of requests, choice of the LM, memory and throughput estimates. Pure."""
