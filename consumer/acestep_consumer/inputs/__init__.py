# SPDX-License-Identifier: Apache-2.0
"""Audio inputs and LoRAs of requests, fetched from allowed places only."""
