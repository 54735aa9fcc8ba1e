# SPDX-License-Identifier: Apache-2.0
"""Storage: results with their manifests, attempt records, outages and the scratch disk; the S3 adapter in ``s3``."""
