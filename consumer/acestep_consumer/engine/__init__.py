# SPDX-License-Identifier: Apache-2.0
"""The engine: the planner and renderer child processes, and their supervisors in the consumer process."""

import logging

# diffusers and transformers import torchao where it is installed, and with it come warnings of kernels for other cards,
# of files that nobody here reads, and of torch's plans for enumerations.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
