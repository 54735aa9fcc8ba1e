# SPDX-License-Identifier: Apache-2.0
"""What surrounds the product: the one command for people and CI, local servers, containers."""
