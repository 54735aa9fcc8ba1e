# SPDX-License-Identifier: Apache-2.0
"""The engine: the planner and renderer child processes, and their supervisors in the consumer process.

Reading order. In the consumer process: ``interface``, ``adapters`` (the ports), ``engines`` (all processes of a
worker), ``supervisor`` (one of them), ``watchdog``, ``process``, ``process_memory``, ``device_usage``, ``cuda_mps``.
Between the two: ``messages``, ``framing``, ``heartbeat``. In an engine process: ``renderer``, ``planner``,
``library_imports``, ``pending_requests``, ``captured_graph``, and ``testing`` (engines without models). Models on the
disk and the hub: ``published_models``, ``hub_cache``, ``hub_download``, ``torchao_checkpoints``. What the machine can
do: ``compiler``, ``kernel_cache``, ``probe_encoders``.
"""

import logging

# diffusers and transformers import torchao where it is installed, and with it come warnings of kernels for other cards,
# of files that nobody here reads, and of torch's plans for enumerations.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
