# SPDX-License-Identifier: Apache-2.0
"""The transformers backend on a tiny Qwen3: against plain calls of the model, and many songs against each alone."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from acestep_consumer.concurrency.priority import rank_of
from acestep_consumer.engine.planner.backend import Generation, SequenceOutput
from acestep_consumer.engine.planner.row_cache import RowCache
from acestep_consumer.engine.planner.transformers_backend import TransformersBackend, load
from tests.support.lm_generations import (
    CONTEXT,
    FAULTY,
    WRITTEN_BY_GRAMMAR,
    finish,
    greedy_codes,
    greedy_songs,
    greedy_text,
    mixture,
    sampled_codes,
    song,
    text,
    without_prefix,
    write,
    write_at_odd_times,
)

CODES = 700
ROOM = 64 * 640


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint: random weights, a byte-level tokenizer, code tokens in the middle of the vocabulary."""
    target = tmp_path_factory.mktemp("lm")
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    inner.train_from_iterator(["bpm key major minor caption"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([f"<|audio_code_{n}|>" for n in range(CODES)], special_tokens=True)
    tokenizer.add_tokens(["<|last|>"], special_tokens=True)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 13,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.3,  # large enough that what was written matters for what comes next
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any, range]:
    model, tokenizer = load(str(folder), "cpu", torch.float32), AutoTokenizer.from_pretrained(folder)
    first = tokenizer.convert_tokens_to_ids("<|audio_code_0|>")
    return model, tokenizer, range(first, first + CODES)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The same model as transformers runs it by itself."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def make(loaded: tuple[Any, Any, range]) -> Callable[..., TransformersBackend]:
    def made(cache_tokens: int = ROOM, **options: Any) -> TransformersBackend:
        model, tokenizer, codes = loaded
        return TransformersBackend(model, tokenizer, codes, cache_tokens=cache_tokens, **options)

    return made


@pytest.fixture
def backend(make: Callable[..., TransformersBackend]) -> TransformersBackend:
    return make()


def test_a_file_whose_names_lack_their_prefix_is_the_same_model(folder: Path, plain: Any, tmp_path: Path) -> None:
    model = load(str(without_prefix(folder, tmp_path / "headless")), "cpu", torch.float32)
    weights = plain.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_guided_greedy_codes_are_those_of_plain_calls_of_the_model(
    backend: TransformersBackend, plain: Any, loaded: tuple[Any, Any, range]
) -> None:
    songs = greedy_songs()
    expected = [greedy_codes(plain, each, loaded[2]) for each in songs]
    assert write(backend, *songs) == expected
    assert all(len(set(each)) > 5 for each in expected)  # no song of one note, which any backend would get right


def test_guided_sampled_codes_are_those_of_plain_calls_of_the_model(
    backend: TransformersBackend, plain: Any, loaded: tuple[Any, Any, range]
) -> None:
    generation = song(11, count=25, temperature=0.85, repetition_penalty=1.2)
    assert write(backend, generation) == [sampled_codes(plain, generation, loaded[2])]


def test_guided_greedy_text_is_that_of_plain_calls_of_the_model_under_its_grammar(
    backend: TransformersBackend, plain: Any, loaded: tuple[Any, Any, range]
) -> None:
    generation = text(12, temperature=0)
    assert write(backend, generation) == [greedy_text(plain, loaded[1], generation)]


def test_many_in_flight_write_what_each_writes_alone(make: Callable[..., TransformersBackend]) -> None:
    alone = [write(make(), generation)[0] for generation in mixture()]
    assert None not in alone
    assert write(make(), *mixture()) == alone


def test_joining_and_leaving_at_odd_times_changes_nothing(make: Callable[..., TransformersBackend]) -> None:
    songs = mixture()
    alone = [write(make(), generation)[0] for generation in songs]
    assert write_at_odd_times(make(), songs) == alone


def test_every_step_writes_one_token_of_every_song(backend: TransformersBackend) -> None:
    backend.add(1, song(1, count=3))
    backend.add(2, song(2, count=2, guided=False))
    seen = [[(news.sequence_id, news.count, news.tokens is not None) for news in backend.step()] for _ in range(3)]
    assert seen == [[(1, 1, False), (2, 1, False)], [(1, 2, False), (2, 2, True)], [(1, 3, True)]]
    assert backend.idle
    assert backend.step() == []


def test_codes_are_exactly_as_many_as_were_asked_for_and_nothing_else(
    backend: TransformersBackend, loaded: tuple[Any, Any, range]
) -> None:
    for count, written in zip((1, 7, 50), write(backend, *(song(n, count=n) for n in (1, 7, 50))), strict=True):
        assert written is not None
        assert len(written) == count
        assert all(token in loaded[2] for token in written)


def test_dropped_songs_are_gone_and_the_others_go_on_undisturbed(make: Callable[..., TransformersBackend]) -> None:
    songs = mixture()
    alone = [write(make(), generation)[0] for generation in songs]
    backend = make(prefill_tokens=100)
    for number, generation in enumerate(songs):
        backend.add(number, generation)
    backend.drop(7)  # still waiting
    last = {news.sequence_id: news for _ in range(4) for news in backend.step()}
    for number in (0, 3, 99):  # two that are being written, one that never was there
        backend.drop(number)
    assert not {0, 3} & {news.sequence_id for news in backend.step()}
    last = finish(backend, last)
    assert last[0].tokens is None
    assert 7 not in last
    for number in (1, 2, 4, 5, 6):
        assert last[number].tokens == alone[number]


def test_dropping_everything_leaves_nothing(backend: TransformersBackend) -> None:
    backend.add(1, song(1))
    backend.step()
    backend.add(2, song(2))
    backend.drop(1)
    backend.drop(2)
    assert backend.idle
    assert backend._cache.size == 0
    assert backend.step() == []


def test_memory_stays_within_the_budget_and_new_sequences_wait(make: Callable[..., TransformersBackend]) -> None:
    songs = [song(seed, count=60, length=60) for seed in range(9)]
    alone = [write(make(), generation)[0] for generation in songs]
    budget = RowCache.area(8, 120)
    backend = make(cache_tokens=budget)
    for number, generation in enumerate(songs):
        backend.add(number, generation)
    last: dict[int, SequenceOutput] = {}
    together = 0
    while not backend.idle:
        news = backend.step()
        last.update((each.sequence_id, each) for each in news)
        together = max(together, len(news))
        assert backend._cache.size <= budget
    assert together == 4
    assert [last[number].tokens for number in range(9)] == alone


def test_those_that_wait_for_memory_join_by_rank_and_nobody_who_is_in_leaves(
    make: Callable[..., TransformersBackend],
) -> None:
    """Memory for four at a time: those of priority 9 and 5 pass two of priority 0, which came first."""
    backend = make(cache_tokens=RowCache.area(8, 50))
    priorities = (0, 0, 0, 0, 0, 0, 0, 9, 5, 9)
    for place, priority in enumerate(priorities):
        backend.add(place, replace(song(place), rank=rank_of(priority, 1_000.0 + place)))
        if place == 3:
            backend.step()
    assert backend.waiting == 6
    ended: list[int] = []
    while not backend.idle:
        ended += [output.sequence_id for output in backend.step() if output.tokens is not None]
    assert [set(ended[:4]), set(ended[4:8]), set(ended[8:])] == [{0, 1, 2, 3}, {7, 9, 8, 4}, {5, 6}]


def test_memory_goes_when_songs_go(backend: TransformersBackend) -> None:
    for number in range(12):
        backend.add(number, song(number, count=3 if number else 30))
    backend.step()
    full = backend._cache.size
    for _ in range(2):
        backend.step()
    assert 0 < backend._cache.size < full
    finish(backend)
    assert backend._cache.size == 0


def test_the_tokens_in_memory_are_those_of_songs_in_flight_only(backend: TransformersBackend) -> None:
    """No tensor of a key or value outlives the songs: what the cache says is what there is."""
    write(backend, *mixture())
    gc.collect()
    assert [layer.keys.numel() for layer in backend._cache.layers] == [0, 0]


def test_one_step_reads_no_more_prompt_tokens_than_its_bound(make: Callable[..., TransformersBackend]) -> None:
    backend = make(prefill_tokens=150)
    songs = [song(seed, count=9, length=length) for seed, length in enumerate((30, 30, 30, 200, 10))]
    for number, generation in enumerate(songs):
        backend.add(number, generation)
    joined = [{news.sequence_id for news in backend.step()} for _ in range(4)]
    # Two pairs of 30 make 120; the long one goes alone, since it has to go some time.
    assert joined == [{0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]


@FAULTY
def test_a_faulty_sequence_fails_alone(
    make: Callable[..., TransformersBackend], poison: Generation, words: str
) -> None:
    good = [song(2), text(3), song(4, guided=False)]
    alone = [write(make(), generation)[0] for generation in good]
    backend = make()
    for number, generation in enumerate((good[0], poison, *good[1:])):
        backend.add(number, generation)
    last = finish(backend)
    assert last[1].tokens is None
    assert words in (last[1].error or "")
    assert last[1].too_long == ("context is" in words)
    assert [last[number].tokens for number in (0, 2, 3)] == alone


def test_a_song_larger_than_the_whole_budget_is_refused_and_does_not_block(
    make: Callable[..., TransformersBackend],
) -> None:
    backend = make(cache_tokens=RowCache.area(2, 128))
    backend.add(1, song(1, length=100, count=100))
    backend.add(2, song(2, length=10, count=10))
    last = finish(backend)
    assert "memory is too small" in (last[1].error or "")
    assert last[2].tokens is not None


def test_logits_that_are_no_numbers_fail_their_song_alone_and_leave_nothing_behind(
    make: Callable[..., TransformersBackend], loaded: tuple[Any, Any, range]
) -> None:
    poisoned = 200  # a token that only the second song has
    first, second = (replace(song(n, guided=False), prompt=(10, 20, 30 + n)) for n in (1, 2))
    second = replace(second, prompt=(10,) * 60 + (poisoned,))  # beyond what the third will have written over
    expected = write(make(), first)[0]
    expected_after = write(make(), song(3, guided=False))[0]
    weight = loaded[0].get_input_embeddings().weight
    kept = weight[poisoned].detach().clone()
    with torch.no_grad():
        weight[poisoned] = torch.nan
        try:
            backend = make()
            backend.add(1, first)
            backend.add(2, second)
            last = {news.sequence_id: news for news in backend.step()}
            backend.add(3, song(3, guided=False))  # in the very row that the second had
            last = finish(backend, last)
        finally:
            weight[poisoned] = kept
    assert last[2].error == "the language model gave no probabilities"
    assert last[1].tokens == expected
    assert last[3].tokens == expected_after


@pytest.mark.parametrize("temperature", [0.0, 0.85, 5.0])
def test_the_grammar_holds_at_any_temperature(
    backend: TransformersBackend, loaded: tuple[Any, Any, range], temperature: float
) -> None:
    texts = write(backend, *(text(seed, temperature=temperature, top_p=1.0) for seed in range(12)))
    for written in texts:
        assert written is not None
        assert WRITTEN_BY_GRAMMAR.fullmatch(loaded[1].decode(written))


def test_a_text_that_is_not_at_its_end_in_time_is_an_error(backend: TransformersBackend) -> None:
    backend.add(1, text(1, max_tokens=6))
    last = finish(backend)
    assert last[1].tokens is None
    assert last[1].error == "the text has no end within 6 tokens"


def test_free_text_ends_with_the_end_token_and_stays_in_the_vocabulary(
    backend: TransformersBackend, loaded: tuple[Any, Any, range]
) -> None:
    _, tokenizer, _ = loaded
    for number in range(48):
        backend.add(number, text(number, grammar=None, max_tokens=60, guided=False, temperature=3.0, top_p=1.0))
    last = finish(backend)
    ended = [news.tokens for news in last.values() if news.tokens is not None]
    assert ended
    assert all(tokenizer.eos_token_id not in tokens for tokens in ended)
    assert all(token < len(tokenizer) for tokens in ended for token in tokens)


def test_another_seed_writes_another_song(backend: TransformersBackend) -> None:
    generation = song(1)
    other = replace(generation, sampling=replace(generation.sampling, seed=2))
    first, again, different = write(backend, generation, generation, other)
    assert first == again != different


def test_guidance_of_scale_1_needs_no_second_row(make: Callable[..., TransformersBackend]) -> None:
    generation = song(1, count=3)
    generation = replace(generation, sampling=replace(generation.sampling, cfg_scale=1.0))
    backend = make()
    backend.add(1, generation)
    backend.step()
    assert len(backend._rows) == 1
    assert finish(backend)[1].tokens == write(make(), replace(generation, unconditional=None))[0]


def test_a_model_with_sliding_attention_is_refused(loaded: tuple[Any, Any, range]) -> None:
    config = Qwen3Config(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="layers without full attention"):
        TransformersBackend(Qwen3ForCausalLM(config), loaded[1], range(5), cache_tokens=ROOM)


def test_loading_refuses_weights_that_are_not_all_there(folder: Path, tmp_path: Path) -> None:
    model = Qwen3ForCausalLM.from_pretrained(folder)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="missing"):
        load(str(tmp_path), "cpu", torch.float32)


def test_loading_reads_safetensors_only(folder: Path, tmp_path: Path) -> None:
    model = Qwen3ForCausalLM.from_pretrained(folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(str(tmp_path), "cpu", torch.float32)
