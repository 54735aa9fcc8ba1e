# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer top`: one worker's metrics, refreshed in the terminal."""
