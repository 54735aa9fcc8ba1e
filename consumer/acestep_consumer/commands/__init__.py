# SPDX-License-Identifier: Apache-2.0
"""What stands behind each command of the CLI, a file a command. Each returns its exit code."""
