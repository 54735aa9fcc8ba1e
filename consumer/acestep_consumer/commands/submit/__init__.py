# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer submit`: builds, checks and publishes one request; waits for its songs on demand."""
