# SPDX-License-Identifier: Apache-2.0
"""S3-compatible object storage: the adapter of ``ports.Objects``."""
