# SPDX-License-Identifier: Apache-2.0
"""The commands of the CLI, one file or folder each; ``base`` has what they share. Each returns its exit code."""
