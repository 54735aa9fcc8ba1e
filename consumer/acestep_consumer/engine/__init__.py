# SPDX-License-Identifier: Apache-2.0
"""The engine: the planner and renderer child processes, and their supervisors in the consumer process."""
