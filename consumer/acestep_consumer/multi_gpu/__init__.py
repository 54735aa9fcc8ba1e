# SPDX-License-Identifier: Apache-2.0
"""``run --gpus``: one worker process per GPU, all on the same queue; they need no other coordination.

``device_count`` counts the GPUs, ``selection`` chooses among them, ``placement`` computes what differs from worker to
worker, ``parent`` keeps the workers running, ``output`` labels what they print, ``parent_pipe`` ends them when the
parent process is gone.
"""
