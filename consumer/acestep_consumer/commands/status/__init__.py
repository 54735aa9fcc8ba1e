# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer status`: queue depth, workers and throughput."""
