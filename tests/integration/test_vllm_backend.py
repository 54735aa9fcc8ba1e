# SPDX-License-Identifier: Apache-2.0
"""The vLLM backend on the real vLLM, with the tiny model in float32 on the CPU.

vLLM pins its own torch, so it lives in an environment of its own, in which ``bash infra/dev test`` runs this file.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `bash infra/dev test` runs this file where it is", allow_module_level=True)

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from acestep_consumer.concurrency.priority import rank_of
from acestep_consumer.engine.planner import vllm_engine
from acestep_consumer.engine.planner.backend import Generation, SequenceOutput
from acestep_consumer.engine.planner.grammar import metadata_grammar
from acestep_consumer.engine.planner.guidance import RowSampling, choose
from acestep_consumer.engine.planner.metadata import Metadata
from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.engine.planner.transformers_backend import TransformersBackend, load
from acestep_consumer.engine.planner.vllm_backend import VllmBackend, open_vllm
from acestep_consumer.engine.planner.vllm_engine import EngineSize
from acestep_consumer.engine.testing import tiny_lm
from acestep_consumer.policy.lm_memory import UNCOUNTED_BYTES
from tests.support.lm_generations import (
    CONTEXT,
    FAULTY,
    WRITTEN_BY_GRAMMAR,
    finish,
    greedy_codes,
    greedy_songs,
    greedy_text,
    mixture,
    prompt,
    sampled_codes,
    song,
    text,
    without_prefix,
    write,
    write_at_odd_times,
)

with warnings.catch_warnings(action="ignore"):  # vLLM and what it imports warn of their own use of torch
    vllm_engine.prepare()
from acestep_consumer.engine.planner import vllm_guidance
from acestep_consumer.engine.planner.vllm_guidance import GuidanceProcessor

pytestmark = pytest.mark.filterwarnings("ignore")


Alone = list[tuple[int, ...] | None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.write(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def tokens(folder: Path) -> LmTokens:
    return LmTokens.load(folder)


@pytest.fixture(scope="module")
def codes(tokens: LmTokens) -> range:
    """Some of the 64,000: drawing from all of them takes a CPU longer than all the rest."""
    return range(tokens.first_code + 100, tokens.first_code + 1100)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The same model as transformers runs it by itself."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def headless(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as some of the published files have it: of a class without head, and names without ``model.``."""
    return without_prefix(folder, tmp_path_factory.mktemp("headless"))


@pytest.fixture(scope="module")
def opened(headless: Path, tokens: LmTokens, codes: range) -> Iterator[VllmBackend]:
    """One engine for all tests: it takes a while to start. Its memory holds 6 pairs of the context's length.

    One thread: on two busy cores, threads that wait for each other cost more than they bring.
    """
    torch.set_num_threads(1)
    size = EngineSize(memory_gb=0.1, rows=16, context=CONTEXT)
    blocks: dict[str, Any] = {"block_size": 32, "num_gpu_blocks_override": 6 * 2 * CONTEXT // 32 + 1}
    backend = open_vllm(str(headless), tokens.tokenizer, codes, size, dtype="float32", **blocks)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def alone(opened: VllmBackend) -> Alone:
    """What each song of the mixture writes with nobody beside it."""
    return [write(opened, generation)[0] for generation in mixture()]


@pytest.fixture
def backend(opened: VllmBackend) -> Iterator[VllmBackend]:
    """The engine, which every test leaves as empty as it found it."""
    assert opened.idle
    yield opened
    assert opened.idle
    assert opened._budget.empty
    assert not opened._engine._engine.has_unfinished_requests()


def test_guided_greedy_codes_are_those_of_plain_calls_of_the_model(
    backend: VllmBackend, plain: Any, codes: range
) -> None:
    songs = greedy_songs()
    expected = [greedy_codes(plain, each, codes) for each in songs]
    assert write(backend, *songs) == expected
    assert all(len(set(each)) > 5 for each in expected)  # no song of one note, which any backend would get right


def test_guided_sampled_codes_are_those_of_plain_calls_of_the_model(
    backend: VllmBackend, plain: Any, codes: range
) -> None:
    generation = song(11, count=25, temperature=0.85, repetition_penalty=1.2)
    assert write(backend, generation) == [sampled_codes(plain, generation, codes)]


def test_guided_greedy_text_is_that_of_plain_calls_of_the_model_under_its_grammar(
    backend: VllmBackend, plain: Any, tokens: LmTokens
) -> None:
    generation = text(12, temperature=0)
    assert write(backend, generation) == [greedy_text(plain, tokens.tokenizer, generation)]


def test_both_backends_write_the_same(folder: Path, tokens: LmTokens, codes: range, alone: Alone) -> None:
    model = load(str(folder), "cpu", torch.float32)
    other = TransformersBackend(model, tokens.tokenizer, codes, cache_tokens=64 * 640)
    for number, generation in enumerate(mixture()):
        other.add(number, generation)
    last: dict[int, SequenceOutput] = {}
    while not other.idle:
        last.update((news.sequence_id, news) for news in other.step())
    assert [last[number].tokens for number in range(len(mixture()))] == alone


def test_many_in_flight_write_what_each_writes_alone(backend: VllmBackend, alone: Alone) -> None:
    assert None not in alone
    assert write(backend, *mixture()) == alone


def test_joining_and_leaving_at_odd_times_changes_nothing(backend: VllmBackend, alone: Alone) -> None:
    assert write_at_odd_times(backend, mixture()) == alone


def test_songs_for_which_a_recorded_choice_is_replayed_write_the_same(
    backend: VllmBackend, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it is a CUDA graph: of the same rows' tensors, with a copy of each step's logits."""
    replays: list[int] = []

    def recorded(group: vllm_guidance.GuidanceGroup, logits: Tensor) -> Any:
        kept = logits.clone()

        def replay(given: Tensor) -> Tensor:
            replays.append(len(given))
            return group._next(kept.copy_(given))

        return replay

    monkeypatch.setattr(vllm_guidance, "_worth_a_graph", lambda _device, sequences: sequences <= 2)
    monkeypatch.setattr(vllm_guidance, "_GRAPH_AFTER", 2)
    monkeypatch.setattr(vllm_guidance.GuidanceGroup, "_captured", recorded)
    assert [write(backend, generation)[0] for generation in mixture()] == alone
    one_after_the_other = len(replays)
    assert one_after_the_other > len(mixture())
    assert write(backend, *mixture()) == alone
    assert len(replays) > one_after_the_other, "with the songs that are left at the end"


def test_a_choice_that_cannot_be_recorded_is_made_step_by_step(
    backend: VllmBackend, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def refused(_group: vllm_guidance.GuidanceGroup, logits: Tensor) -> Any:
        tries.append(len(logits))
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(vllm_guidance, "_worth_a_graph", lambda *_: True)
    monkeypatch.setattr(vllm_guidance, "_GRAPH_AFTER", 2)
    monkeypatch.setattr(vllm_guidance.GuidanceGroup, "_captured", refused)
    monkeypatch.setattr(vllm_guidance.GuidanceGroup, "_capturable", True)
    assert [write(backend, generation)[0] for generation in mixture()] == alone
    assert len(tries) == 1


def test_both_requests_of_every_pair_write_the_same_tokens_to_the_last(backend: VllmBackend) -> None:
    outputs: dict[str, tuple[int, ...]] = {}
    step = backend._engine._engine.step

    def watched() -> list[Any]:
        requests: list[Any] = step()
        outputs.update((request.request_id, tuple(request.outputs[0].token_ids)) for request in requests)
        return requests

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend._engine._engine, "step", watched)
        written = write(backend, *(song(seed, count=60 + seed, length=9 + 20 * seed) for seed in range(8)))
    assert len(outputs) == 16
    for number in range(8):
        assert outputs[f"{number}.0"] == outputs[f"{number}.1"] == written[number]


def late(backend: VllmBackend, patch: pytest.MonkeyPatch, request: str, steps: int) -> None:
    """Have vLLM get one request some steps after its pair."""
    engine = backend._engine._engine
    add, step, held = engine.add_request, engine.step, [steps]
    kept: list[Any] = []

    def add_late(name: str, *arguments: Any) -> None:
        if name == request and not kept:
            kept.extend((name, *arguments))
        else:
            add(name, *arguments)

    def step_then_add() -> Any:
        news = step()
        held[0] -= 1
        if held[0] == 0:
            add(*kept)
        return news

    patch.setattr(engine, "add_request", add_late)
    patch.setattr(engine, "step", step_then_add)


@pytest.mark.parametrize("request_name", ["7.0", "7.1"], ids=["the conditional", "the unconditional"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_pair_that_is_out_of_step_is_detected_void_and_can_be_generated_again(
    backend: VllmBackend, request_name: str, steps: int
) -> None:
    alone = [write(backend, song(seed))[0] for seed in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        late(backend, patch, request_name, steps)
        backend.add(7, song(1))
        backend.add(8, song(2))
        last = finish(backend)
    assert last[7].out_of_step
    assert last[7].tokens is None
    assert last[8].tokens == alone[1]  # the other sequence is not affected
    assert write(backend, song(1)) == [alone[0]]


def test_a_pair_whose_rows_were_given_different_tokens_is_void(backend: VllmBackend) -> None:
    """Whatever the reason may be: what counts is that both rows have the same tokens."""
    backend.add(1, song(1))
    backend.step()
    processor = processor_of(backend)
    next(row for row in processor._rows.values() if row.branch == 1).output[-1] += 1
    assert finish(backend)[1].out_of_step


def processor_of(backend: VllmBackend) -> GuidanceProcessor:
    """The processor that vLLM has made."""
    runner = backend._engine._engine.model_executor.driver_worker.worker.model_runner
    found: list[GuidanceProcessor] = [
        processor for processor in runner.input_batch.logitsprocs.all if isinstance(processor, GuidanceProcessor)
    ]
    return found[0]


def test_more_songs_than_fit_wait_and_no_pair_is_torn(backend: VllmBackend) -> None:
    """Prompts that do not fit into one step, more rows than there are, and more text than the memory holds."""
    songs = [replace(song(n, count=40 + n, length=400), unconditional=prompt(400, 100 + n)) for n in range(9)]
    for number, generation in enumerate(songs):
        backend.add(number, generation)
    most: int = 0
    last: dict[int, SequenceOutput] = {}
    while not backend.idle:
        last.update((news.sequence_id, news) for news in backend.step())
        most = max(most, len(backend._running))
    assert most == 6
    assert all(news.tokens is not None for news in last.values())
    assert last[5].tokens == write(backend, songs[5])[0]


def test_codes_are_exactly_as_many_as_were_asked_for_and_nothing_else(backend: VllmBackend, codes: range) -> None:
    for count, written in zip((1, 7, 50), write(backend, *(song(n, count=n) for n in (1, 7, 50))), strict=True):
        assert written is not None
        assert len(written) == count
        assert all(token in codes for token in written)


def test_progress_is_reported_from_the_first_token_on_and_only_grows(backend: VllmBackend) -> None:
    backend.add(1, song(1, count=40))
    counts = []
    while not backend.idle:
        counts += [news.count for news in backend.step()]
    assert counts == [1, 9, 17, 25, 33, 40]


def test_dropped_songs_are_gone_and_the_others_go_on_undisturbed(backend: VllmBackend, alone: Alone) -> None:
    for number, generation in enumerate(mixture()):
        backend.add(number, generation)
    backend.drop(7)  # still waiting
    last = {news.sequence_id: news for _ in range(4) for news in backend.step()}
    for number in (0, 3, 99):  # two that are being written, one that never was there
        backend.drop(number)
    news = backend.step()
    assert not {0, 3} & {each.sequence_id for each in news}
    last = finish(backend, last | {each.sequence_id: each for each in news})
    assert last[0].tokens is None
    assert 7 not in last
    for number in (1, 2, 4, 5, 6):
        assert last[number].tokens == alone[number]


def test_dropping_everything_leaves_nothing(backend: VllmBackend) -> None:
    backend.add(1, song(1))
    backend.step()
    backend.add(2, song(2))
    backend.add(3, song(3, count=0))
    for number in (1, 2, 3):
        backend.drop(number)
    assert backend.idle
    assert backend.step() == []


@FAULTY
def test_a_faulty_sequence_fails_alone(backend: VllmBackend, alone: Alone, poison: Generation, words: str) -> None:
    good = mixture()
    for number, generation in ((1, good[1]), (50, poison), (7, good[7])):
        backend.add(number, generation)
    last = finish(backend)
    assert last[50].tokens is None
    assert words in (last[50].error or "")
    assert last[50].too_long == ("context is" in words)
    assert [last[number].tokens for number in (1, 7)] == [alone[1], alone[7]]


def test_a_song_that_vllm_itself_refuses_fails_alone_and_leaves_no_half_behind(backend: VllmBackend) -> None:
    engine = backend._engine._engine
    add = engine.add_request

    def add_unless_second(name: str, *arguments: Any) -> None:
        if name == "1.1":
            raise ValueError("not this one")
        add(name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "add_request", add_unless_second)
        backend.add(1, song(1))
        backend.add(2, song(2))
        last = finish(backend)
    assert last[1].error == "the language model refused the request: not this one"
    assert last[2].tokens is not None


def test_logits_that_are_no_numbers_fail_their_song(backend: VllmBackend) -> None:
    apply = GuidanceProcessor.apply

    def poisoned(processor: GuidanceProcessor, logits: Tensor) -> Tensor:
        rows = [index for index, row in processor._rows.items() if row.state.sequence.sequence_id in (1, 2)]
        logits[rows] = torch.nan
        return apply(processor, logits)

    expected = write(backend, song(3), text(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidanceProcessor, "apply", poisoned)
        for number, generation in enumerate((song(1), text(2), song(3), text(4)), start=1):
            backend.add(number, generation)
        last = finish(backend)
    assert last[1].error == last[2].error == "the language model gave no probabilities"
    assert [last[3].tokens, last[4].tokens] == expected


def test_what_vllm_raises_comes_out_of_step(backend: VllmBackend) -> None:
    """A broken engine is for the supervisor: its process is replaced."""
    backend.add(1, song(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidanceProcessor, "apply", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backend.step()
    backend.drop(1)


@pytest.mark.parametrize("temperature", [0.0, 0.85, 5.0])
def test_the_grammar_holds_at_any_temperature(backend: VllmBackend, tokens: LmTokens, temperature: float) -> None:
    for written in write(backend, *(text(seed, temperature=temperature, top_p=1.0) for seed in range(12))):
        assert written is not None
        assert WRITTEN_BY_GRAMMAR.fullmatch(tokens.decode(written))


def test_the_grammar_of_the_metadata_phase_holds(backend: VllmBackend, tokens: LmTokens) -> None:
    known = Metadata(bpm=120, caption="a slow song")
    grammar = metadata_grammar(known)
    (written,) = write(backend, text(5, grammar=grammar, max_tokens=120, temperature=2.0))
    assert written is not None
    said = tokens.decode(written)
    assert said.startswith("<think>\nbpm: 120\ncaption: a slow song\nduration: ")
    assert said.endswith("\n</think>")


def test_a_text_that_is_not_at_its_end_in_time_is_an_error(backend: VllmBackend) -> None:
    backend.add(1, text(1, max_tokens=6))
    last = finish(backend)
    assert last[1].tokens is None
    assert last[1].error == "the text has no end within 6 tokens"


def test_free_text_ends_with_the_end_token_and_stays_in_the_vocabulary(backend: VllmBackend, tokens: LmTokens) -> None:
    bare = [text(n, grammar=None, guided=False, temperature=0.01, top_p=1.0) for n in range(6)]
    end = tokens.end_of_turn

    def biased(logits: Tensor, rows: RowSampling, step: Tensor, *rest: Any) -> Tensor:
        logits[step == 9, end] = 1e6  # a random model would seldom find the one token of 64,000 that ends a text
        return choose(logits, rows, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_guidance, "choose", biased)
        texts = write(backend, *bare)
    assert all(written is not None and len(written) == 9 and end not in written for written in texts)


def test_another_seed_writes_another_song(backend: VllmBackend) -> None:
    generation = song(1)
    other = replace(generation, sampling=replace(generation.sampling, seed=2))
    first, again, different = write(backend, generation, generation, other)
    assert first == again != different


def test_guidance_of_scale_1_needs_no_second_request(backend: VllmBackend) -> None:
    generation = song(1, count=3)
    generation = replace(generation, sampling=replace(generation.sampling, cfg_scale=1.0))
    backend.add(1, generation)
    backend.step()
    assert len(processor_of(backend)._rows) == 1
    assert finish(backend)[1].tokens == write(backend, replace(generation, unconditional=None))[0]


def test_the_head_computes_the_codes_alone_unless_a_text_is_generated(
    backend: VllmBackend, codes: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = backend._engine._engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    columns: list[int] = []

    def counting(hidden_states: Tensor) -> Tensor:
        logits: Tensor = compute(hidden_states)
        columns.append(int(logits[0].isfinite().sum()))
        return logits

    compute = model.compute_logits
    monkeypatch.setattr(model, "compute_logits", counting)
    write(backend, song(1, count=3))
    assert set(columns) == {len(codes)}
    columns.clear()
    write(backend, song(1, count=90), text(2))
    assert {len(codes), backend._engine.vocabulary} == set(columns)


def test_those_that_wait_for_rows_join_by_rank_and_nobody_who_is_in_leaves(backend: VllmBackend) -> None:
    """Rows for eight songs at a time, one of which ends after the other."""
    joined: list[int] = []

    def step() -> None:
        backend.step()
        joined.extend(number for number in backend._running if number not in joined)

    for place in range(8):
        backend.add(place, replace(song(place, count=6 + 3 * place), rank=rank_of(0, 1_000.0 + place)))
    step()
    for place, priority in enumerate((0, 0, 9, 5, 9), start=8):
        backend.add(place, replace(song(place, count=40), rank=rank_of(priority, 1_000.0 + place)))
    assert backend.waiting == 5
    while not backend.idle:
        step()
    assert joined == [*range(8), 10, 12, 11, 8, 9]


def test_beside_another_engine_the_cache_is_what_this_process_leaves_of_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """VLLM makes its trial pass without measuring, and whatever it was told for that does not stay."""
    from acestep_consumer.engine.planner.vllm_worker import OwnMemoryWorker  # noqa: PLC0415 - it imports vLLM

    gigabyte, told = 10**9, list[int | None]()

    def trial(worker: Any) -> int:
        told.append(worker.cache_config.kv_cache_memory_bytes)
        return 0

    monkeypatch.setattr(OwnMemoryWorker.__mro__[1], "determine_available_memory", trial)
    for name, value in (
        ("reset_peak_memory_stats", None),
        ("synchronize", None),
        ("max_memory_allocated", 6 * gigabyte),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    worker = object.__new__(OwnMemoryWorker)
    worker.device, worker.requested_memory = torch.device("cpu"), 55 * gigabyte
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=None)
    assert worker.determine_available_memory() == 49 * gigabyte - UNCOUNTED_BYTES
    assert told[0]
    assert worker.cache_config.kv_cache_memory_bytes is None
    worker.requested_memory = 7 * gigabyte
    with pytest.raises(ValueError, match="no room for keys and values"):
        worker.determine_available_memory()


def test_a_second_start_in_int8_loads_what_the_first_has_compiled(folder: Path, tmp_path: Path) -> None:
    """In processes of their own: vLLM has one engine a process. Without the compiler's optimizations, for speed."""
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path), "TORCHINDUCTOR_DEBUG_COMPILE": "1"}
    command = [sys.executable, "-m", "tests.support.vllm_int8", str(folder)]
    starts: list[dict[str, Any]] = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        starts.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert [(start["saved"], start["loaded"]) for start in starts] == [(1, 0), (0, 1)]
    quantized = {name for name, kind in starts[0]["kinds"].items() if kind == "Tensor torch.int8"}
    assert quantized == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert [len(codes) for codes in starts[0]["songs"].values()] == [12, 12]
    assert starts[0]["songs"] == starts[1]["songs"]
