# SPDX-License-Identifier: Apache-2.0
"""The engine: child processes that plan and render, and the supervisor that keeps them alive."""
