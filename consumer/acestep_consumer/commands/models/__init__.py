# SPDX-License-Identifier: Apache-2.0
"""``models``: which models are known and on this disk, downloads, and checks."""
