# SPDX-License-Identifier: Apache-2.0
"""Songs that come from songs: real S3, the real stages, torch and diffusers with tiny weights."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import boto3
import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray

from acestep_consumer.config.settings import EngineSettings, StorageSettings, load
from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.domain.errors import InputUnreadable
from acestep_consumer.domain.job import Job, Plan, TokenizedSource
from acestep_consumer.domain.objects import ObjectAddress
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_consumer.domain.ports import Report
from acestep_consumer.domain.tasks import TRACK_CLASSES
from acestep_consumer.engine.adapters import PlannerSupervisor
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.denoising.rng import SeededVae
from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.engine.renderer.lora import Loras
from acestep_consumer.engine.renderer.render_resources import RenderResources
from acestep_consumer.engine.renderer.service import RendererService
from acestep_consumer.engine.renderer.startup import RendererRuntime
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, write
from acestep_consumer.storage.s3.objects import S3Objects
from acestep_schemas.events import Completed, LyricLine, Metas, ParentSong
from infra.local.s3 import SeaweedFS
from tests.support.song_maker import RATE, SongMaker
from tests.support.waiting import WITHIN_S

LYRICS = "[Verse]\nla la la\nshine on me\ncome back home"
TIMES = (("la la la", 0.4, 2.0), ("shine on me", 2.4, 4.0), ("come back home", 4.4, 5.6))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> RendererRuntime:
    """Both tiny models."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    settings = EngineSettings(checkpoint_dir=folder, config_path2=BASE, device="cpu", pack_wait_ms=0)
    return startup.open_runtime(settings)


@pytest.fixture(scope="module")
def resources(runtime: RendererRuntime) -> RenderResources:
    return resources_of(runtime)


def resources_of(runtime: RendererRuntime) -> RenderResources:
    """What the jobs of a renderer with these settings share."""
    return RendererService(runtime, lambda _: None, _device_lost, max_input_s=600)._resources


def _device_lost(error: BaseException) -> NoReturn:
    raise error


@pytest.fixture(scope="module")
def session(s3: SeaweedFS) -> boto3.Session:
    return boto3.Session(aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key, region_name="us-east-1")


@pytest_asyncio.fixture
async def maker(
    resources: RenderResources, s3: SeaweedFS, session: boto3.Session, tmp_path: Path
) -> AsyncIterator[SongMaker]:
    settings = storage_of(s3, tmp_path.name)
    async with S3Objects(settings, session=session, retry_s=10) as objects:
        yield SongMaker(resources, objects, settings)


def storage_of(s3: SeaweedFS, folder: str) -> StorageSettings:
    return StorageSettings.model_validate(
        {"endpoint": s3.endpoint, "bucket": s3.bucket, "prefix": f"songs-from-songs/{folder}"}
    )


class ListeningPlanner:
    """A language model that describes every source alike; it keeps what it was given."""

    def __init__(self) -> None:
        self.heard: list[TokenizedSource] = []

    async def plan_songs(self, _job: Job, source: TokenizedSource | None, _report: Report) -> Plan:
        assert source is not None
        self.heard.append(source)
        return Plan(metas=Metas(caption="slow jazz", bpm=90))


@dataclass
class SharedSong:
    """One song of six seconds, from which tests make others, each under a task id of its own."""

    maker: SongMaker
    song: Completed
    planner: ListeningPlanner

    async def make(self, task_id: str, **fields: Any) -> Completed:
        """Make the songs of a request that names it."""
        return await self.maker.make(task_id, source_task_id="shared", seed=8, inference_steps=1, **fields)


@pytest_asyncio.fixture
async def shared(resources: RenderResources, s3: SeaweedFS, session: boto3.Session) -> AsyncIterator[SharedSong]:
    """The times of its lines are set here: alignment by random weights gives one line the time of all."""
    settings, planner = storage_of(s3, "shared"), ListeningPlanner()
    async with S3Objects(settings, session=session, retry_s=10) as objects:
        maker = SongMaker(resources, objects, settings, cast("PlannerSupervisor", planner))
        record = await maker.store.find("shared")
        if record is None:
            made = await maker.make(
                "first", prompt="jazz", lyrics=LYRICS, seed=7, audio_duration=6, inference_steps=1,
                use_cot_metas=False,
            )  # fmt: skip
            lines = tuple(LyricLine(text=text, start_s=start, end_s=end) for text, start, end in TIMES)
            audios = (made.audios[0].model_copy(update={"lyrics": lines}),)
            record = TerminalRecord(made.model_copy(update={"task_id": "shared", "audios": audios}), "message")
            await maker.store.commit(record)
        assert isinstance(record.ending, Completed)
        yield SharedSong(maker, record.ending, planner)


@contextmanager
def encodings() -> Iterator[list[int]]:
    """Record the samples of all source audio that is encoded."""
    found: list[int] = []
    encode = SeededVae.encode

    def recorded(self: SeededVae, samples: torch.Tensor, *options: Any, **named: Any) -> Any:
        found.append(samples.shape[-1])
        return encode(self, samples, *options, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeededVae, "encode", recorded)
        yield found


@contextmanager
def packs(resources: RenderResources, model: str, waiting: int) -> Iterator[list[int]]:
    """Record how many songs are in each step; the first one waits until so many jobs have been submitted."""
    found: list[int] = []
    scheduler = resources.scheduler
    runner = scheduler._runners[model]
    step = runner.step

    def recorded(samples: Sequence[Sample], lora: Loras | None) -> Any:
        found.append(len(samples))
        return step(samples, lora)

    def wait_for_all() -> None:
        until = time.monotonic() + WITHIN_S
        while scheduler._waiting.requests and scheduler.pending < waiting:
            assert time.monotonic() < until, "jobs are submitted one after the other"
            time.sleep(0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "step", recorded)
        patch.setattr(scheduler, "_wait_for_more", wait_for_all)
        yield found


async def test_the_kept_latents_are_those_that_were_decoded(maker: SongMaker, resources: RenderResources) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6, latent_rescale=1.5, latent_shift=0.1)
    latents = await maker.latents(song)
    assert latents.shape == (150, 4)
    scheduler = resources.scheduler
    (decoder,) = {runner.parts.decoder for runner in scheduler._runners.values()}
    (decoded,) = scheduler.run_on_device(lambda: decoder.decode([torch.from_numpy(latents)]))
    heard = decoded.numpy()
    expected = heard / np.abs(heard).max() * 10 ** (-1 / 20)
    assert np.abs(expected - await maker.samples(song)).max() < 2e-3  # float16


async def test_a_song_made_from_kept_latents_is_nearer_to_them_than_one_from_its_file(
    maker: SongMaker, resources: RenderResources
) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6)
    latents = await maker.latents(song)
    encoded = resources.scheduler.encode_audio(
        "acestep-v15-turbo", torch.from_numpy(await maker.samples(song)), 7, tiled=True
    )
    way_of_the_file = np.abs(encoded.numpy() - latents).mean()
    # Conservative: every frame outside the window is the source's in the end.
    window = {"task_type": "repaint", "repainting_start": 2, "repainting_end": 3, "repaint_mode": "conservative"}
    by_id = await maker.make("by-id", source_task_id="song", seed=8, **window)
    by_url = await maker.make("by-url", src_audio_path=song.audios[0].uri, prompt="jazz", seed=8, **window)
    outside = slice(100, 150)
    kept, made_new = [
        np.abs((await maker.latents(each))[outside] - latents[outside]).mean() for each in (by_id, by_url)
    ]
    assert kept < 1e-3
    assert made_new == pytest.approx(way_of_the_file, rel=0.5)
    assert kept < 0.01 * made_new


async def test_a_repaint_of_a_song_keeps_the_samples_of_its_file_to_the_bit(maker: SongMaker) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6)
    made = await maker.make(
        "repainted", source_task_id="song", task_type="repaint", repainting_start=2, repainting_end=3, seed=8
    )
    before, after = await maker.samples(song), await maker.samples(made)
    assert before.shape == after.shape
    edge = round(0.025 * RATE) + 1
    for kept in (slice(0, 2 * RATE - edge), slice(3 * RATE + edge, None)):
        assert np.array_equal(before[:, kept], after[:, kept])
    assert np.abs(before[:, 2 * RATE : 3 * RATE] - after[:, 2 * RATE : 3 * RATE]).max() > 0.05
    assert made.parents == (ParentSong(task_id="song", index=0, field="source_task_id"),)
    assert made.request.src_audio_path is None


async def test_an_extension_of_a_song_that_fades_out_fades_at_its_new_end_and_not_in_its_middle(
    maker: SongMaker,
) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=4, fade_out_duration=2)
    made = await maker.make("longer", source_task_id="song", extend_right_s=2, seed=8)
    before, after = await maker.samples(song), await maker.samples(made)
    edge = round(0.025 * RATE) + 1
    assert np.array_equal(before[:, : 2 * RATE - edge], after[:, : 2 * RATE - edge])
    ends = [_level_db(audio[:, end - RATE // 4 : end]) for audio, end in ((after, 4 * RATE), (after, 6 * RATE))]
    assert ends[0] > ends[1] + 10
    assert not after[:, -1].any()


async def test_an_aggressive_repaint_from_kept_latents_fades_as_its_song_does(maker: SongMaker) -> None:
    fades = {"fade_in_duration": 1, "fade_out_duration": 2}
    await maker.make("song", prompt="jazz", seed=7, audio_duration=6, **fades)
    window = {"task_type": "repaint", "repainting_start": 2, "repainting_end": 3, "repaint_mode": "aggressive"}
    made = await maker.make("again", source_task_id="song", seed=8, **window)
    after = await maker.samples(made)
    assert not after[:, 0].any()
    assert not after[:, -1].any()
    assert _level_db(after[:, 4 * RATE : 5 * RATE]) > _level_db(after[:, -RATE // 4 :]) + 10
    assert (made.request.fade_in_duration, made.request.fade_out_duration) == (1, 2)


async def test_what_is_made_from_latents_has_the_level_of_the_file_around_it(maker: SongMaker) -> None:
    """The file was scaled to its peak; its latents were not."""
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6, normalization_db=-20)
    # Strength 0 with all steps replaced outside: inside the fade's own ramp both must agree.
    made = await maker.make(
        "again", source_task_id="song", task_type="repaint", repainting_start=2, repainting_end=3, seed=8,
        repaint_mode="conservative", repaint_wav_crossfade_sec=1, enable_normalization=False,
    )  # fmt: skip
    before, after = await maker.samples(song), await maker.samples(made)
    # Half a second beyond the window's ramp of latents (25 frames), the decoded samples are the song's.
    inner = slice(round(3.9 * RATE), round(3.99 * RATE))
    assert np.abs(before[:, inner] - after[:, inner]).max() < 0.05 * np.abs(before[:, inner]).max()
    assert np.abs(after).max() < 0.5


async def test_the_new_part_of_a_song_with_a_loudness_is_as_loud_as_the_song(maker: SongMaker) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6, loudness_lufs=-30)
    made = await maker.make(
        "again", source_task_id="song", task_type="repaint", repainting_start=2, repainting_end=4, seed=8
    )
    new_part = (await maker.samples(made))[:, 2 * RATE : 4 * RATE]
    assert _level_db(new_part) == pytest.approx(_level_db(await maker.samples(song)), abs=4)


def _level_db(samples: NDArray[np.float32]) -> float:
    return 10 * float(np.log10(np.mean(samples.astype(np.float64) ** 2)))


async def test_latents_of_another_vae_and_deleted_ones_give_way_to_the_audio_with_a_warning(maker: SongMaker) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6)
    assert song.audios[0].files is not None
    assert song.audios[0].files.latents is not None
    await maker.objects.delete(ObjectAddress.of(song.audios[0].files.latents.uri))
    cover = await maker.make("cover", source_task_id="song", task_type="cover", prompt="jazz", seed=8)
    url = await maker.make("url", src_audio_path=song.audios[0].uri, task_type="cover", prompt="jazz", seed=8)
    assert "the source's audio was encoded, and its latents were not used: they are not in the storage any more" in (
        cover.warnings
    )
    assert np.array_equal(await maker.samples(cover), await maker.samples(url))


async def test_a_song_whose_audio_was_deleted_says_how_to_get_it_back(maker: SongMaker) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6)
    await maker.objects.delete(ObjectAddress.of(song.audios[0].uri))
    with pytest.raises(InputUnreadable, match="its audio was deleted"):
        await maker.make("cover", source_task_id="song", task_type="cover")


async def test_an_extension_is_longer_and_the_song_is_in_it_unchanged(maker: SongMaker) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6)
    longer = await maker.make("longer", source_task_id="song", extend_right_s=4, seed=8)
    earlier = await maker.make("earlier", source_task_id="longer", extend_left_s=2, seed=9)
    first, second, third = [await maker.samples(each) for each in (song, longer, earlier)]
    assert [each.shape[1] for each in (first, second, third)] == [6 * RATE, 10 * RATE, 12 * RATE]
    edge = 5 * RATE - round(0.025 * RATE) - 1
    assert np.array_equal(first[:, :edge], second[:, :edge])
    edge = round(1.025 * RATE) + 1
    assert np.array_equal(second[:, edge:], third[:, 2 * RATE + edge :])
    assert earlier.request.task_type == "repaint"
    assert (earlier.request.repainting_start, earlier.request.repainting_end) == (-2.0, 1.0)
    assert earlier.request.prompt == "jazz"
    assert not [warning for warning in (*longer.warnings, *earlier.warnings) if "latents" in warning]


async def test_a_variation_is_the_song_again_with_other_noise(maker: SongMaker) -> None:
    song = await maker.make("song", prompt="jazz", lyrics="la", bpm=90, seed="7,8", batch_size=2, audio_duration=6)
    same = await maker.make("same", source_task_id="song", source_index=1, variation=0)
    some = await maker.make("some", source_task_id="song", source_index=1, variation=0.4, retake_seed=3)
    direct = await maker.make(
        "direct", prompt="jazz", lyrics="la", bpm=90, seed=8, audio_duration=6, retake_variance=0.4, retake_seed=3
    )
    original, again, varied, expected = (
        await maker.samples(song, 1), await maker.samples(same), await maker.samples(some), await maker.samples(direct)
    )  # fmt: skip
    assert np.abs(original - again).max() < 1e-5
    assert np.abs(varied - expected).max() < 1e-5
    assert np.abs(varied - original).max() > 0.05
    assert some.parents == (ParentSong(task_id="song", index=1, field="variation"),)
    noted = {edit.field: edit.value for edit in some.edits}
    assert (noted["retake_variance"], noted["seed"], noted["bpm"]) == (0.4, [8], 90)


async def test_a_final_song_has_the_seed_the_codes_and_the_texts_of_its_draft(maker: SongMaker) -> None:
    codes = "".join(f"<|audio_code_{61 * index}|>" for index in range(30))
    given = {"prompt": "jazz", "lyrics": "la la", "bpm": 90, "key_scale": "A minor", "shift": 2.0}
    draft = await maker.make("draft", quality="draft", audio_code_string=codes, seed=5, **given)
    final = await maker.make("final", quality="final", source_task_id="draft")
    direct = await maker.make("direct", inference_steps=8, audio_code_string=codes, seed=5, **given)
    assert (draft.request.inference_steps, final.request.inference_steps) == (4, 8)
    assert (final.audios[0].seed, final.audio_codes, final.metas) == (5, draft.audio_codes, draft.metas)
    made, expected = await maker.samples(final), await maker.samples(direct)
    assert np.abs(made - expected).max() < 1e-5
    assert np.abs(made - await maker.samples(draft)).max() > 1e-3
    assert final.parents == (ParentSong(task_id="draft", index=0, field="quality"),)


async def test_the_request_of_an_event_sent_again_makes_the_same_song(maker: SongMaker) -> None:
    await maker.make("song", prompt="jazz", seed=7, audio_duration=6)
    for task_id, field, value in (("longer", "extend_right_s", 3), ("varied", "variation", 0.5)):
        made = await maker.make(task_id, source_task_id="song", **{field: value})
        body = {**made.request.model_dump(mode="json", exclude={"task_id"}), "strict": True}
        again = await maker.make(f"{task_id}-again", **body)
        assert again.warnings == ()
        assert np.array_equal(await maker.samples(made), await maker.samples(again))


async def test_a_variation_of_a_repaint_repaints_the_first_song_again(maker: SongMaker) -> None:
    await maker.make("song", prompt="jazz", seed=7, audio_duration=6)
    window = {"task_type": "repaint", "repainting_start": 2, "repainting_end": 3, "seed": 8}
    repainted = await maker.make("repainted", source_task_id="song", **window)
    same = await maker.make("same", source_task_id="repainted", variation=0)
    assert np.array_equal(await maker.samples(repainted), await maker.samples(same))
    assert [(parent.task_id, parent.field) for parent in same.parents] == [
        ("repainted", "variation"),
        ("song", "source_task_id"),
    ]


async def test_stems_are_every_track_of_the_source_in_one_pack_each_as_if_extracted_alone(
    maker: SongMaker, resources: RenderResources
) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6, model=BASE)
    with encodings() as encoded, packs(resources, BASE, waiting=len(TRACK_CLASSES)) as found:
        stems = await maker.make("stems", source_task_id="song", stems=True, model=BASE, inference_steps=2, seed=3)
    assert (found, encoded) == ([len(TRACK_CLASSES)] * 2, [])
    assert tuple(audio.track for audio in stems.audios) == TRACK_CLASSES
    alone = await maker.make(
        "alone", source_task_id="song", task_type="extract", track_name="drums", model=BASE, inference_steps=2, seed=3
    )
    drums = TRACK_CLASSES.index("drums")
    assert np.abs(await maker.samples(stems, drums) - await maker.samples(alone)).max() < 1e-5
    # Two tracks of audio by its address: it is encoded, once.
    with encodings() as encoded, packs(resources, BASE, waiting=2) as found:
        by_url = await maker.make(
            "two", src_audio_path=song.audios[0].uri, stems=True, track_classes="bass, drums", model=BASE,
            inference_steps=2, seed=3,
        )  # fmt: skip
    assert (found, encoded) == ([2, 2], [6 * RATE])
    url_alone = await maker.make(
        "url-alone", src_audio_path=song.audios[0].uri, task_type="extract", track_name="bass", model=BASE,
        inference_steps=2, seed=3,
    )  # fmt: skip
    assert [audio.track for audio in (*by_url.audios, *alone.audios)] == ["bass", "drums", "drums"]
    assert np.abs(await maker.samples(by_url) - await maker.samples(url_alone)).max() < 1e-5


async def test_what_is_made_of_a_stem_says_which_track_it_is(maker: SongMaker) -> None:
    await maker.make("song", prompt="jazz", seed=7, audio_duration=6)
    await maker.make("stems", source_task_id="song", stems=True, track_classes="bass, drums", model=BASE, seed=3)
    longer = await maker.make("longer", source_task_id="stems", source_index=1, extend_right_s=2)
    varied = await maker.make("varied", source_task_id="stems", source_index=1, variation=0.2)
    again = await maker.make("again", source_task_id="longer", variation=0)
    assert [made.audios[0].track for made in (longer, varied, again)] == ["drums"] * 3
    assert {made.model.used for made in (longer, varied, again)} == {BASE}


async def test_an_extension_of_a_song_with_times_and_a_loudness_has_them_too(maker: SongMaker) -> None:
    lyrics = "[Verse]\nla la la\nshine on me"
    asked = {"timestamps": True, "loudness_lufs": -30}
    await maker.make("song", prompt="jazz", lyrics=lyrics, seed=7, audio_duration=6, **asked)
    longer = await maker.make("longer", source_task_id="song", extend_right_s=4, seed=8)
    (audio,) = longer.audios
    assert [line.text for line in audio.lyrics] == lyrics.split("\n")
    assert audio.lyrics[-1].end_s > 6
    assert audio.loudness is not None
    assert audio.loudness.lufs == pytest.approx(-30, abs=0.1)
    noted = {edit.field: edit.value for edit in longer.edits}
    assert {name: noted[name] for name in asked} == asked
    without = await maker.make("without", source_task_id="longer", extend_left_s=1, timestamps=False, loudness_lufs=0)
    assert (without.audios[0].lyrics, without.audios[0].loudness) == ((), None)


async def test_audio_from_an_address_is_made_longer_by_the_length_that_it_has(maker: SongMaker) -> None:
    song = await maker.make("song", prompt="jazz", seed=7, audio_duration=6)
    uri = song.audios[0].uri
    longer = await maker.make("longer", prompt="jazz", src_audio_path=uri, extend_right_s=2, seed=8)
    before, after = await maker.samples(song), await maker.samples(longer)
    assert (before.shape[1], after.shape[1]) == (6 * RATE, 8 * RATE)
    kept = 5 * RATE - round(0.025 * RATE) - 1
    assert np.array_equal(before[:, :kept], after[:, :kept])
    assert (longer.request.repainting_start, longer.request.repainting_end) == (5.0, 8.0)
    assert longer.request.extend_right_s is None
    assert [edit.field for edit in longer.edits] == ["task_type", "repainting_start", "repainting_end"]
    again = await maker.make("again", **longer.request.model_dump(mode="json", exclude={"task_id"}))
    assert np.array_equal(after, await maker.samples(again))


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"task_type": "lego", "track_name": "drums", "model": BASE}, id="lego"),
        pytest.param({"task_type": "complete", "track_classes": "drums, bass", "model": BASE}, id="complete"),
        pytest.param({"task_type": "cover-nofsq"}, id="cover-nofsq"),
        pytest.param({"flow_edit_morph": True, "flow_edit_source_caption": "funk", "model": BASE}, id="flow-edit"),
    ],
)
async def test_every_task_with_a_source_works_on_a_song_by_its_id_and_encodes_nothing(
    shared: SharedSong, asked: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    with encodings() as encoded:
        made = await shared.make(request.node.callspec.id, prompt="jazz", use_cot_metas=False, **asked)
    # Without a source it would have 120 seconds.
    assert [audio.duration_s for audio in made.audios] == [6]
    assert (encoded, made.warnings) == ([], ())
    assert np.abs(await shared.maker.samples(made)).max() > 0.05
    assert made.parents == (ParentSong(task_id="shared", index=0, field="source_task_id"),)
    assert made.request.src_audio_path is None


async def test_a_song_by_its_id_is_tokenized_as_its_file_is_and_analysed_from_these_codes(shared: SharedSong) -> None:
    codes = await shared.make("codes", extract_codes_only=True)
    by_url = await shared.maker.make("url", src_audio_path=shared.song.audios[0].uri, seed=8, extract_codes_only=True)
    analysis = await shared.make("analysis", full_analysis_only=True)
    assert len(codes.audio_codes[0]) == 30
    assert codes.audio_codes == by_url.audio_codes
    assert shared.planner.heard == [TokenizedSource(codes=format_codes(codes.audio_codes[0]), source_s=6)]
    assert (analysis.metas.caption, analysis.metas.bpm) == ("slow jazz", 90)
    for made in (codes, analysis):
        assert (made.audios, made.warnings) == ((), ())
        assert made.parents == (ParentSong(task_id="shared", index=0, field="source_task_id"),)


async def test_a_line_is_sung_anew_and_what_is_around_it_stays_the_song_to_the_bit(shared: SharedSong) -> None:
    made = await shared.make("other-line", replace_lines={"Shine on me": "shine on them"})
    before, after = await shared.maker.samples(shared.song), await shared.maker.samples(made)
    start, end, edge = round(2.2 * RATE), round(4.2 * RATE), round(0.025 * RATE) + 1
    assert (made.request.repainting_start, made.request.repainting_end) == (2.2, 4.2)
    assert before.shape == after.shape
    for kept in (slice(0, start - edge), slice(end + edge, None)):
        assert np.array_equal(before[:, kept], after[:, kept])
    assert np.abs(before[:, start:end] - after[:, start:end]).max() > 0.05
    assert made.request.lyrics == LYRICS.replace("shine on me", "shine on them")
    assert made.warnings == ()


@pytest.mark.parametrize("kept", [True, False])
async def test_latents_are_stored_and_named_in_the_event_unless_the_setting_says_no(
    runtime: RendererRuntime, s3: SeaweedFS, session: boto3.Session, tmp_path: Path, *, kept: bool
) -> None:
    engine = load({"ACESTEP_KEEP_LATENTS": str(kept).lower()}, env_file=None).engine
    settings = storage_of(s3, tmp_path.name)
    async with S3Objects(settings, session=session, retry_s=10) as objects:
        maker = SongMaker(resources_of(replace(runtime, settings=engine)), objects, settings)
        song = await maker.make("song", prompt="jazz", seed=7, audio_duration=2, inference_steps=1)
        folder = ObjectAddress(settings.bucket, f"{settings.prefix}/song/")
        stored = {each.key.removeprefix(folder.key): str(each) async for each in objects.list(folder)}
    latents = "0.latents.safetensors"
    assert sorted(stored) == [*([latents] if kept else []), "0.wav", "manifest.json"]
    files = song.audios[0].files
    listed = None if files is None or files.latents is None else files.latents.uri
    assert listed == stored.get(latents)
