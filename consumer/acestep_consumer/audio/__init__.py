# SPDX-License-Identifier: Apache-2.0
"""Audio files: formats, encoding, and decoding of untrusted files in a sandboxed process."""
