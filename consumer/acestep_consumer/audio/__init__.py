# SPDX-License-Identifier: Apache-2.0
"""Audio files: formats, encoding, and decoding of foreign files in a sandboxed process."""
