# SPDX-License-Identifier: Apache-2.0
"""ACE-Step's REST API over the queue, which ``acestep-consumer gateway`` serves: a request becomes a message.

It stores nothing, so that there may be any number of replicas, and none is missed when it ends.

Reading order: ``server`` (all routes), ``task_routes`` with ``bodies``, ``uploads`` and ``messages`` (from a request
to the message), ``submission`` and ``broker_session`` (publishing), ``tasks``, ``task_items`` and ``task_ids`` (what
has become of it) with ``result_folder``, ``audio_routes``, ``job_routes``, ``model_routes`` with ``worker_list``,
``sample_routes``, ``chat_routes`` with ``chat_request``, ``page``; ``auth``, ``origins``, ``rate_limit`` and
``answers`` are around every route, ``openapi`` documents them, ``metrics`` and ``spans`` measure them.
"""
