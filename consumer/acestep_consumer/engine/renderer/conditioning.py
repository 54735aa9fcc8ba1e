# SPDX-License-Identifier: Apache-2.0
"""Conditioning: prepared requests become samples. Texts, source and reference audio are encoded on the device.

Each sample is as ``AceStepPipeline`` would prepare it alone. Cheaper here, and equal up to rounding: the texts of
several jobs are encoded together; "no reference audio" is encoded once for good; guidance's empty condition, one vector
repeated for each token, is a single token, since attending to equal tokens gives the same as attending to one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from acestep_consumer.engine.renderer.code_latents import CodeLatents
from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.denoising.flow_edit import FlowEdit, FlowEditRequest
from acestep_consumer.engine.renderer.denoising.guidance import Guidance, VelocityFilter
from acestep_consumer.engine.renderer.denoising.pack import on_device
from acestep_consumer.engine.renderer.denoising.packed_dit import Condition, PackedDit
from acestep_consumer.engine.renderer.denoising.rng import generators_for
from acestep_consumer.engine.renderer.denoising.sample import Sample, TextSwitch
from acestep_consumer.engine.renderer.denoising.schedule import flow_times, started_from_source
from acestep_consumer.engine.renderer.errors import is_out_of_memory
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.prepare import PreparedRequest, RequestPreparer, TokenizedText
from acestep_consumer.engine.renderer.source import SourceContext, SourceEncoder
from acestep_consumer.engine.renderer.text_encoder import States, TextEncoder
from acestep_consumer.engine.renderer.window import KeptLatents

_REFERENCE_S = 30
_GPUS = ("cuda", "xpu")


@dataclass(frozen=True, slots=True, eq=False)
class _EncodedRequest:
    """A prepared request, encoded on the device.

    ``noise``: [songs, frames, channels]; ``states``: for each of the request's texts, one condition for all songs or
    one for each, [tokens, width].
    """

    prepared: PreparedRequest
    source: SourceContext
    noise: torch.Tensor
    generators: tuple[torch.Generator, ...]
    states: tuple[tuple[torch.Tensor, ...], ...]


class Conditioner:
    """Encodes requests of one model into samples.

    Args:
        parts: the model's components.
        preparer: draws the noise where the source audio decides its length.
        text_encoder: encodes prompts and lyrics.
    """

    def __init__(self, parts: Components, preparer: RequestPreparer, text_encoder: TextEncoder) -> None:
        self._parts = parts
        self._pipeline = parts.pipeline
        self._preparer = preparer
        self._text_encoder = text_encoder
        self._sources = SourceEncoder(parts)
        self._codes = CodeLatents(parts, tabulated=parts.device.type in _GPUS)
        self._silence: torch.Tensor | None = None

    def samples(self, requests: Sequence[PreparedRequest], dit: PackedDit) -> list[tuple[Sample, ...] | Exception]:
        """Return each request's samples, or the error that it alone caused. Raises when memory runs out."""
        states = self._text_encoder.encode([text for request in requests for text in request.texts])
        latents = self._codes.of([codes for request in requests for codes in request.codes])
        found = [
            self._encode(request, list(islice(states, len(request.texts))), list(islice(latents, len(request.codes))))
            for request in requests
        ]
        conditions = self._conditions([each for each in found if isinstance(each, _EncodedRequest)], dit)
        return [each if isinstance(each, Exception) else tuple(self._samples_of(each, conditions)) for each in found]

    def warm_up(self) -> None:
        """Run the text encoders and the timbre encoder once; keep the timbre of silence and all codes' latents."""
        self._silent_timbre()
        self._codes.warm_up()
        for _ in self._text_encoder.encode([TokenizedText([0] * 64, [0] * 64)]):
            pass

    def _encode(
        self, request: PreparedRequest, texts: Sequence[States], code_latents: Sequence[torch.Tensor]
    ) -> _EncodedRequest | Exception:
        try:
            source, timbres = self._source_and_timbres(request, code_latents)
            noise, generators = request.noise, request.generators
            if noise is None:
                # Fresh ones: when memory runs out, a request is encoded a second time.
                device = self._parts.device if request.arguments.device_noise else "cpu"
                generators = tuple(generators_for(request.arguments.seeds, device))
                noise = self._preparer.noise(request.arguments, generators, source.context.shape[1])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return error
        states = tuple(tuple(torch.cat([lyrics, timbre, text]) for timbre in timbres) for text, lyrics in texts)
        return _EncodedRequest(request, source, on_device(noise, self._parts.device), generators, states)

    def _conditions(self, requests: Sequence[_EncodedRequest], dit: PackedDit) -> dict[int, Condition]:
        """Return the condition of each state by the state's identity; 0 is the empty condition."""
        if not requests:
            return {}
        states = {id(state): state for request in requests for some in request.states for state in some}
        if any(request.prepared.arguments.guided for request in requests):
            encoder = self._pipeline.condition_encoder
            states[0] = encoder.null_condition_emb[0].to(self._parts.device, self._parts.dtype)
        self._parts.use(dit.dit)
        return dict(zip(states, dit.conditions(list(states.values())), strict=True))

    def _samples_of(self, request: _EncodedRequest, conditions: dict[int, Condition]) -> Iterator[Sample]:
        arguments, source = request.prepared.arguments, request.source
        times = flow_times(arguments.num_inference_steps, arguments.shift, arguments.timesteps)
        noise = request.noise
        if arguments.cover_noise_strength:
            times = started_from_source(times, arguments.cover_noise_strength)
            noise = times[0] * noise + (1.0 - times[0]) * source.latents
        text_only = self._sources.without_source(source.context) if arguments.switches else None
        for index, generator in enumerate(request.generators):
            guidance = self._guidance(arguments, conditions)
            velocity_filter = VelocityFilter(arguments.sampler.velocity_limit, arguments.sampler.velocity_smoothing)
            own, *others = (conditions[id(some[index % len(some)])] for some in request.states)
            context = source.context[index]
            sample = Sample(
                latents=noise[index],
                context=context,
                condition=own,
                times=times,
                generator=generator,
                options=arguments.sampler,
                guidance=guidance,
                velocity_filter=velocity_filter,
                switch=None if text_only is None else _switch(arguments, times, others[0], text_only[index]),
                kept=self._kept(request, index),
                heard_frames=source.frames,
                level=arguments.level(self._pipeline.sample_rate),
                peak=None if arguments.kept_samples(self._pipeline.sample_rate) else arguments.output.peak,
                alignment=request.prepared.alignment,
            )
            if arguments.flow_edit is not None:
                sample.start_edit(self._edit(arguments.flow_edit, request, index, sample, others[-1]))
            yield sample

    @staticmethod
    def _guidance(arguments: PipelineArguments, conditions: dict[int, Condition]) -> Guidance | None:
        if not arguments.guided:
            return None
        interval = (arguments.cfg_interval_start, arguments.cfg_interval_end)
        return Guidance(arguments.guidance_scale, interval, conditions[0], by_angle=arguments.use_adg)

    @staticmethod
    def _edit(asked: FlowEditRequest, request: _EncodedRequest, index: int, sample: Sample, own: Condition) -> FlowEdit:
        """Return the flow edit of one song, whose source has the texts of ``own``."""
        arguments = request.prepared.arguments
        seeds = arguments.retake_seeds if arguments.retake_variance else arguments.seeds
        (generator,) = generators_for(seeds[index : index + 1], sample.generator.device)
        return FlowEdit(
            source=request.source.latents[index],
            context=sample.context,
            source_condition=own,
            condition=sample.condition,
            generator=generator,
            guidance=sample.guidance,
            velocity_filter=sample.velocity_filter,
            first=int(sample.steps * asked.start),
            end=int(sample.steps * asked.end),
            averages=asked.averages,
        )

    @staticmethod
    def _kept(request: _EncodedRequest, index: int) -> KeptLatents | None:
        source = request.source
        if source.kept is None:
            return None
        rules = request.prepared.arguments.keep
        return KeptLatents(source.window, rules, source.kept[index], request.noise[index])

    def _source_and_timbres(
        self, request: PreparedRequest, code_latents: Sequence[torch.Tensor]
    ) -> tuple[SourceContext, tuple[torch.Tensor, ...]]:
        """Return the songs' source, and one timbre for all or one for each."""
        arguments, vae = request.arguments, self._parts.vae
        # The posteriors of source and reference are sampled with the songs' seeds, one after the other.
        vae.generators, vae.use_tiling = generators_for(arguments.seeds), arguments.tiled
        source = self._sources.encode(arguments, code_latents, request.frames)
        return source, self._timbres(arguments.reference_audio, len(request.generators))

    def _timbres(self, reference: torch.Tensor | None, songs: int) -> tuple[torch.Tensor, ...]:
        """Return timbre embeddings, [1, width] each."""
        if reference is None:
            return (self._silent_timbre(),)
        device, dtype = self._parts.device, self._parts.dtype
        latents, _ = self._pipeline.prepare_reference_audio_latents(reference, songs, device, dtype)
        return self._encoded_timbres(latents)

    def _silent_timbre(self) -> torch.Tensor:
        if self._silence is None:
            frames = round(_REFERENCE_S * self._pipeline.latents_per_second)
            silence = self._pipeline.condition_encoder.silence_latent[:, :frames]
            (self._silence,) = self._encoded_timbres(silence.to(self._parts.device, self._parts.dtype))
        return self._silence

    def _encoded_timbres(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoder = self._parts.use(self._pipeline.condition_encoder).timbre_encoder
        with _leading_token(encoder) if self._parts.model.wide else nullcontext():
            embedded, _ = encoder(latents, torch.arange(len(latents), device=latents.device))
        return tuple(embedded)


@contextmanager
def _leading_token(encoder: Any) -> Iterator[None]:
    """Let the timbre encoder read its learned token before the reference, as the XL models were trained.

    The encoder's result is its state at the first place. diffusers loads the token and does not use it.
    """

    def prepend(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        return torch.cat([encoder.special_token.expand(len(embedded), -1, -1).to(embedded), embedded], dim=1)

    hook = encoder.embed_tokens.register_forward_hook(prepend)
    try:
        yield
    finally:
        hook.remove()


def _switch(
    arguments: PipelineArguments, times: tuple[float, ...], condition: Condition, context: torch.Tensor
) -> TextSwitch:
    """Return where the text alone takes over: after the part of the steps that ``audio_cover_strength`` says."""
    return TextSwitch(int((len(times) - 1) * arguments.audio_cover_strength), condition, context)
