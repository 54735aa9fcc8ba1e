# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer plan`: what fits on a GPU, and how many songs a minute to expect."""
