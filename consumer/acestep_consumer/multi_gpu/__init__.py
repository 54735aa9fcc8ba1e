# SPDX-License-Identifier: Apache-2.0
"""``run --gpus``: one worker process for each GPU, all on the same queue. Nothing else coordinates them.

``census`` counts the GPUs, ``gpus`` chooses among them, ``seats`` says what differs from worker to worker, ``fleet``
keeps the workers running, ``output`` labels what they print, ``lifeline`` ends them when the fleet's process is gone.
"""
