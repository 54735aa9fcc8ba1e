# SPDX-License-Identifier: Apache-2.0
"""RabbitMQ: connection, topology, consuming and publishing. No exception of aio-pika leaves this package.

Reading order: ``topology`` (exchanges, queues and bindings as data), ``errors``, ``connection`` (kept alive) with
``backoff`` and ``channel_numbers``, ``publisher`` (confirmed, or raises), ``delivery`` (settled once), ``consumer``
and ``prefetch_shares`` (prefetch and drain), ``cancellations``, ``status_requests``, ``duplicate_ids``,
``identified_queue``, ``tier_queues`` (requests forwarded to larger GPUs), ``dead_letter`` (properties),
``dead_letter_notices`` (for workers), ``dead_letter_queue`` (for people), ``queue_limit`` and ``management`` (the
queue's limit), ``inspection`` (read-only, for ``doctor`` and ``status``), ``versions`` (of RabbitMQ),
``lenient_codec`` (odd properties must not close a connection).
"""
