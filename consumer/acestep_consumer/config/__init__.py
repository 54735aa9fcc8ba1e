# SPDX-License-Identifier: Apache-2.0
"""Settings from the environment, log set-up and exit codes."""
