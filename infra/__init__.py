# SPDX-License-Identifier: Apache-2.0
"""Everything around the product: the command for people and CI, local servers, deployment, sizing."""
