# SPDX-License-Identifier: Apache-2.0
"""Audio and LoRA inputs of a request: fetched from allowed places only."""
