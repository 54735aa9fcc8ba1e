# SPDX-License-Identifier: Apache-2.0
"""Songs of vLLM with weights in int8, in a process of its own: ``python -m tests.support.vllm_int8 FOLDER``.

The model is compiled as on a GPU. Prints, as JSON, the precision of each layer's weights, the codes of two songs, of
which one is guided, and how many compiled models were saved and loaded.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch

from acestep_consumer.engine.planner import vllm_engine
from acestep_consumer.engine.planner.backend import CodeConstraint, Generation, Sampling
from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.engine.planner.vllm_backend import open_vllm
from acestep_consumer.engine.planner.vllm_engine import EngineSize
from acestep_consumer.engine.renderer.quantization import config_json

CODES = 12


def compile_as_on_a_gpu() -> None:
    """Let vLLM for CPUs compile in pieces, and save them; by itself it has torch compile the whole."""
    vllm_engine.prepare()
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass  # noqa: PLC0415 - wants `prepare`
    from vllm.platforms import current_platform  # noqa: PLC0415 - as above

    set_up = current_platform.check_and_update_config

    def kept(vllm_config: Any) -> None:
        config = vllm_config.compilation_config
        before = {name: copy.copy(getattr(config, name)) for name in ("mode", "backend", "inductor_compile_config")}
        set_up(vllm_config)
        for name, value in {**before, "compile_sizes": []}.items():
            setattr(config, name, value)

    current_platform.check_and_update_config = kept
    FixFunctionalizationPass.__call__ = lambda *_: None  # it names operations that are not in this build


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    tokens = LmTokens.load(folder)
    codes = range(tokens.first_code, tokens.first_code + tokens.code_count)
    size = EngineSize(memory_gb=0.5, rows=8, context=512)
    compile_as_on_a_gpu()
    options: dict[str, Any] = {"dtype": "bfloat16", "torchao": config_json(), "enforce_eager": False}
    backend = open_vllm(str(folder), None, codes, size, **options)
    from vllm.compilation.counter import compilation_counter  # noqa: PLC0415 - as above

    core = backend._engine._engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    kinds = {
        name.split(".")[-2]: f"{type(weight.data).__name__} {weight.dtype}"
        for name, weight in model.named_parameters()
        if name.endswith(".weight")
    }
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
    counts = {
        "saved": compilation_counter.num_aot_artifacts_saved,
        "loaded": compilation_counter.num_aot_artifacts_loaded,
    }
    print(json.dumps({"kinds": kinds, "songs": written, **counts}))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
