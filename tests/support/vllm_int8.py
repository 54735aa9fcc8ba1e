# SPDX-License-Identifier: Apache-2.0
"""Songs of vLLM with weights in int8, in a process of its own: ``python -m tests.support.vllm_int8 FOLDER``.

Prints, as JSON, the class of each kind of weight and the codes of two songs, of which one is guided.
"""

import json
import sys
from pathlib import Path

import torch

from acestep_consumer.engine.planner.backend import CodeConstraint, Generation, Sampling
from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.engine.planner.vllm_backend import open_vllm
from acestep_consumer.engine.planner.vllm_engine import EngineSize
from acestep_consumer.engine.renderer.quantization import config_json

CODES = 12


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    tokens = LmTokens.load(folder)
    codes = range(tokens.first_code, tokens.first_code + tokens.code_count)
    size = EngineSize(memory_gb=0.5, rows=8, context=512)
    backend = open_vllm(str(folder), None, codes, size, dtype="float32", torchao=config_json())
    core = backend._engine._engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    kinds = {name.split(".")[-2]: type(weight.data).__name__ for name, weight in model.named_parameters()}
    for number, unconditional in enumerate((None, tuple(range(5, 20)))):
        sampling = Sampling(seed=number, cfg_scale=2.0 if unconditional else 1.0, top_p=0.9)
        prompt = tuple(range(5, 40))
        backend.add(
            number,
            Generation(prompt=prompt, unconditional=unconditional, constraint=CodeConstraint(CODES), sampling=sampling),
        )
    written: dict[int, tuple[int, ...]] = {}
    while not backend.idle:
        written |= {news.sequence_id: tokens.codes_of(news.tokens) for news in backend.step() if news.tokens}
    print(json.dumps({"kinds": kinds, "songs": written}))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
