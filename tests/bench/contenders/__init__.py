# SPDX-License-Identifier: Apache-2.0
"""One program per contender: `python -m tests.bench.contenders.NAME PREFETCH MESSAGES`.

Each consumes until it has acked that many messages, prints its lap as a line of JSON, and leaves. Where the servers
are is in the environment.
"""
