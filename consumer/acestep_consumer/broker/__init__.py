# SPDX-License-Identifier: Apache-2.0
"""Everything that knows AMQP. No exception of the client library leaves this package.

Reading order: `topology` (what stands on the broker, as data), `faults` (what can go wrong, mapped once),
`connection` (one link, kept alive), `publisher` (confirmed, or raises), `delivery` (settled once),
`consumer` (prefetch, drain), `cancellations` (what nobody wants any more), `notices` (what the broker gave up itself),
`lenient` (odd properties must not end a connection).
"""
