# SPDX-License-Identifier: Apache-2.0
"""S3-compatible storage: objects, results with their manifests, attempt records, and what an outage does."""
