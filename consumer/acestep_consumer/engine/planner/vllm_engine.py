# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine in this process: settings, memory, imports. What depends on the version is here.

The engine is stepped by its caller, in its caller's thread. Both requests of a guidance pair can then be submitted
between the same two steps, which an engine in a process of its own cannot guarantee.
"""

import importlib
import math
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from acestep_consumer.engine.planner.sequence import TokenSequence
from acestep_consumer.engine.planner.vllm_sequence import KvBudget, request_tags
from acestep_consumer.engine.planner.vllm_versions import version_fault
from acestep_consumer.engine.torchao_checkpoints import quantized_by_torchao
from acestep_consumer.policy.lm_memory import CONTEXT, PROCESSOR_BYTES, ROWS, rows_for

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs here
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the V1 runner calls the batch-wide logits processors
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # its sampler is not needed; do not compile it
    "VLLM_CONFIGURE_LOGGING": "0",  # it logs where this process logs
    "VLLM_NO_USAGE_STATS": "1",  # no usage statistics
    "VLLM_HOST_IP": "127.0.0.1",  # no search for an address of this machine
}

_MODULES = ("vllm", "vllm.v1.engine.llm_engine", "vllm.v1.sample.logits_processor")
"""Imported before anything is loaded. The first imports hardly anything, and no kernels."""

_LM = "AceStepLM"
"""The name of our model class in vLLM's registry."""

_GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Batch sizes with a CUDA graph; others are padded, which costs little: an added row has no keys and values to read."""

_OWN_MEMORY = "acestep_consumer.engine.planner.vllm_worker.OwnMemoryWorker"
"""vLLM imports its worker by name, once it is set up."""

_BF16 = 2


class VllmUnavailable(Exception):
    """vLLM cannot be used here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSize:
    """Size of the engine.

    ``memory_gb``: on a GPU weights, activations and key-value cache together, in 10⁹ bytes; on a CPU the cache alone.
    ``rows``: concurrent requests; a guided sequence is two. ``context``: tokens of one request.
    """

    memory_gb: float
    rows: int = ROWS
    context: int = CONTEXT

    @classmethod
    def on_gpu(cls, memory_gb: float, config: Any) -> Self:
        """Return the size for a model with this transformers config: more rows where long songs can fill them."""
        width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return cls(memory_gb=memory_gb, rows=rows_for(memory_gb * 1e9, 2 * width * _BF16))


def prepare() -> None:
    """Check the version, set vLLM's environment variables, some of which it reads while it is imported, and import it.

    That takes as long as loading the weights, and needs no device.

    Raises:
        VllmUnavailable: vLLM is missing, of another version, or cannot be imported.
    """
    if (fault := version_fault()) is not None:
        raise VllmUnavailable(fault)
    os.environ.update(_ENVIRONMENT)
    try:
        for name in _MODULES:
            importlib.import_module(name)
    except Exception as error:  # its kernels beside another torch than theirs: whatever their absence leads to
        raise VllmUnavailable(f"vLLM cannot be imported: {error}") from error


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Output of a finished request; ``stopped``: its last token is an end token."""

    tokens: tuple[int, ...]
    stopped: bool


class VllmEngine:
    """An ``LLMEngine`` with a request for each prompt of a sequence, all greedy.

    Make it with ``start``. ``vocabulary``: the number of logits. ``ahead``: steps that vLLM begins before it has the
    tokens of the last one.
    """

    def __init__(self, engine: Any) -> None:
        config = engine.vllm_config
        self._engine = engine
        self.context: int = config.model_config.max_model_len
        self.vocabulary: int = config.model_config.get_vocab_size()
        self.ahead = 1 if config.scheduler_config.async_scheduling else 0
        self._config = config

    def kv_budget(self) -> KvBudget:
        """Return the budget of the whole engine, with nothing reserved."""
        return KvBudget(
            rows=self._config.scheduler_config.max_num_seqs,
            blocks=self._config.cache_config.num_gpu_blocks - 1,  # vLLM reserves one for itself
            block=self._config.cache_config.block_size,
            step=self._config.scheduler_config.max_num_batched_tokens,
        )

    def submit(self, sequence: TokenSequence, ends: Collection[int]) -> None:
        """Submit a sequence's requests; they join together at the next step. A text ends with one of ``ends``.

        Raises:
            ValueError: vLLM refuses a request; none of the sequence is left then.
        """
        try:
            for branch, prompt in enumerate(sequence.prompts):
                inputs = {"type": "token", "prompt_token_ids": list(prompt)}
                self._engine.add_request(_name(sequence, branch), inputs, _parameters(sequence, branch, ends))
        except ValueError:
            self.abort(sequence)
            raise

    def abort(self, sequence: TokenSequence) -> None:
        """Abort the sequence's requests that are still running."""
        self._engine.abort_request([_name(sequence, branch) for branch in range(len(sequence.prompts))])

    def step(self) -> dict[int, list[EngineOutput]]:
        """Generate the next token of every request. Returns the outputs of finished requests by sequence id."""
        finished: dict[int, list[EngineOutput]] = {}
        for request in self._engine.step():
            if request.finished:
                output = request.outputs[0]
                found = EngineOutput(tuple(output.token_ids), output.finish_reason == "stop")
                finished.setdefault(int(request.request_id.partition(".")[0]), []).append(found)
        return finished

    def close(self) -> None:
        """Free the memory; the engine cannot be used afterwards."""
        self._engine.engine_core.shutdown()


def start(  # noqa: PLR0913 - the last two have defaults that most callers use
    model: str,
    processor: type,
    size: EngineSize,
    wanted: Callable[[], range] | None = None,
    *,
    torchao: str | None = None,
    beside: bool = False,
    **options: Any,
) -> VllmEngine:
    """Load a model from a folder, after ``prepare``.

    ``processor`` is the class of the logits processor. ``wanted`` returns the tokens that it will choose from at this
    step; None: all. ``torchao``: quantize the weights as this configuration of torchao says, in JSON; vLLM's own int8
    is for mixtures of experts. ``beside``: other processes may be allocating memory on the device. ``options`` are
    vLLM's ``EngineArgs`` and override those set here.

    Raises:
        VllmUnavailable: there is too little memory.
    """
    from vllm import ModelRegistry  # noqa: PLC0415 - vLLM reads the environment while it is imported
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415 - as above
    from vllm.v1.engine.llm_engine import LLMEngine  # noqa: PLC0415 - as above

    if torchao is not None or quantized_by_torchao(Path(model)):
        from acestep_consumer.engine.planner.vllm_int8 import use_plain_tensors  # noqa: PLC0415 - as above

        use_plain_tensors()
    ModelRegistry.register_model(_LM, _lm_class(wanted))
    arguments = {
        "model": model,
        # Some files were saved without their head, as another class, which vLLM would take for an embedding model.
        "hf_overrides": {"architectures": [_LM], **_quantized(torchao)},
        "quantization": None if torchao is None else "torchao",
        "runner": "generate",
        "skip_tokenizer_init": True,  # prompts are tokens, and texts are decoded by us
        "generation_config": "vllm",  # not the checkpoint's: every request sets all parameters
        "max_model_len": size.context,
        "max_num_seqs": size.rows,
        # Both prompts of any pair fit into one step beside a token of every row, so that no pair waits for ever.
        "max_num_batched_tokens": 2 * size.context + size.rows,
        "enable_prefix_caching": True,  # the songs of a job share their prompts
        "logits_processors": [processor],
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **_memory(size),
        **({"worker_cls": _OWN_MEMORY} if beside else {}),
        **options,
    }
    return VllmEngine(LLMEngine.from_engine_args(EngineArgs(**arguments)))


def _quantized(torchao: str | None) -> dict[str, str]:
    """Return what vLLM reads a quantization from that is made while it loads the weights."""
    return {} if torchao is None else {"quantization_config_dict_json": torchao}


def _lm_class(wanted: Callable[[], range] | None) -> type:
    """Return vLLM's Qwen3, which also loads files whose tensors lack the prefix ``model.``.

    It computes the logits of the ``wanted`` tokens. Of the 1.7B model's weights the head is a quarter, and the part of
    the codes a fourteenth: for one song alone, reading the weights is most of a step.
    """
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM  # noqa: PLC0415 - as above

    class Qwen3OfAnyFile(Qwen3ForCausalLM):  # type: ignore[misc]  # vLLM is not installed where types are checked
        """Qwen3 whose weights are named with their prefix or without."""

        _kept: torch.Tensor | None = None

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            """Load the weights; returns the names of those that were loaded."""
            loaded: set[str] = super().load_weights((with_prefix(name), tensor) for name, tensor in weights)
            return loaded

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
            """Return the logits [rows, vocabulary] of the last hidden states; -inf where they are not wanted."""
            ids = wanted() if wanted is not None else None
            if ids is None or len(ids) >= self.config.vocab_size:
                logits: torch.Tensor | None = super().compute_logits(hidden_states)
                return logits
            logits = self._masked_logits(hidden_states)
            logits[:, ids.start : ids.stop] = hidden_states @ self.lm_head.weight[ids.start : ids.stop].T
            return logits

        def _masked_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            """Return the same memory at each step, -inf wherever no step has written."""
            if self._kept is None or len(self._kept) < len(hidden_states):
                self._kept = hidden_states.new_full((len(hidden_states), self.config.vocab_size), -math.inf)
            return self._kept[: len(hidden_states)]

    return Qwen3OfAnyFile


def with_prefix(name: str) -> str:
    """Return the name of a tensor as a language model with a head has it."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _memory(size: EngineSize) -> dict[str, Any]:
    """Return the arguments for memory; on a GPU also the batch sizes with a CUDA graph, on a CPU no compilation."""
    if not torch.cuda.is_available():
        return {"kv_cache_memory_bytes": int(size.memory_gb * 1e9), "enforce_eager": True}
    free, total = torch.cuda.mem_get_info()
    if size.memory_gb * 1e9 > free:
        raise VllmUnavailable(f"the language model needs {size.memory_gb:g} GB; {free / 1e9:.1f} GB are free")
    graphs = [rows for rows in _GRAPH_ROWS if rows <= size.rows] or [size.rows]
    share = (size.memory_gb * 1e9 - size.rows * PROCESSOR_BYTES) / total
    # Only steps of decoding are recorded: one that reads prompts has more tokens than any graph.
    compilation = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": graphs}
    return {"gpu_memory_utilization": share, "compilation_config": compilation}


def _name(sequence: TokenSequence, branch: int) -> str:
    return f"{sequence.sequence_id}.{branch}"


def _parameters(sequence: TokenSequence, branch: int, ends: Collection[int]) -> Any:
    """Return parameters for greedy sampling, since the processor has chosen already, with a final output only."""
    from vllm import SamplingParams  # noqa: PLC0415 - as above
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415 - as above

    return SamplingParams(
        temperature=0,
        max_tokens=sequence.max_tokens,
        ignore_eos=True,  # texts have ``stop_token_ids``; codes have none
        stop_token_ids=[] if sequence.text is None else sorted(ends),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=request_tags(sequence.sequence_id, branch),
    )
