# SPDX-License-Identifier: Apache-2.0
"""RabbitMQ as this system needs it: its configuration, and users that may do their part and no more."""
