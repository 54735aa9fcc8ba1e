# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer dead`: lists, shows, requeues and purges dead-lettered messages."""
