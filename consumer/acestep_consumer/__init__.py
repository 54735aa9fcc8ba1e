# SPDX-License-Identifier: Apache-2.0
"""A worker that renders ACE-Step 1.5 songs for requests from RabbitMQ, and the client for programs that request them.

The folders, in reading order::

    pipeline.py     one message from fetch to ack, a line a stage: start here
    domain/         jobs, errors, outcomes, and the ports that the pipeline needs
    policy/         GPU tiers: what a request may ask for, and what becomes of it; pure functions
    execution/      around one job: attempts, cancellation, deadline, progress, forwarding to a larger tier
    broker/         RabbitMQ: topology, connection, consumer, publisher, dead letters
    storage/        S3: results with their manifests, attempt records, outages
    inputs/         audio and LoRA inputs, from allowed places only
    engine/         child processes for the language model (planner/) and for DiT and VAE (renderer/), supervised
    audio/          encoding of songs, and sandboxed decoding of foreign files
    observability/  metrics, health endpoints, traces
    worker/         life cycle: readiness, prefetch, announcements, signals, reload
    multi_gpu/      ``run --gpus``: one worker process for each GPU
    config/         settings, secrets in files, logs, exit codes
    concurrency/    asyncio locks
    app.py          composition root: builds a worker and runs it
    client/         the Python client of producers and subscribers
    commands/       the commands of ``cli.py``, a folder or a file each
    webui/          the page that ``listen`` serves
    gateway/        ACE-Step's REST API over the queue
"""
