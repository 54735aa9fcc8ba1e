# SPDX-License-Identifier: Apache-2.0
"""The worker: music requests come from RabbitMQ, ACE-Step 1.5 renders them, songs go to S3, events tell about it.

Start reading at ``pipeline.py``, the story of one message.
"""
