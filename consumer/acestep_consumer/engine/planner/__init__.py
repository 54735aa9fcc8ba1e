# SPDX-License-Identifier: Apache-2.0
"""What fills in the parts of a song that the request leaves open."""
