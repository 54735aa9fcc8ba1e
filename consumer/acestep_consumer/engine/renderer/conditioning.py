# SPDX-License-Identifier: Apache-2.0
"""Conditioning: prepared requests become samples. Texts, source and reference audio are encoded on the device.

Each sample is as ``AceStepPipeline`` would prepare it alone. Cheaper here, and equal up to rounding: the texts of
several jobs are encoded together; "no reference audio" is encoded once for good; guidance's empty condition, one vector
repeated for each token, is a single token, since attending to equal tokens gives the same as attending to one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.errors import is_out_of_memory
from acestep_consumer.engine.renderer.packed_dit import Condition, PackedDit
from acestep_consumer.engine.renderer.prepare import PreparedRequest, RequestPreparer, TokenizedText
from acestep_consumer.engine.renderer.rng import generators_for
from acestep_consumer.engine.renderer.sample import CoverBlend, Guidance, Sample
from acestep_consumer.engine.renderer.source import SourceContext, SourceEncoder
from acestep_consumer.engine.renderer.text_encoder import States, TextEncoder
from acestep_consumer.engine.renderer.window import KeptLatents

_REFERENCE_S = 30


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
        self._silence: torch.Tensor | None = None

    def samples(self, requests: Sequence[PreparedRequest], dit: PackedDit) -> list[tuple[Sample, ...] | Exception]:
        """Return each request's samples, or the error that it alone caused. Raises when memory runs out."""
        states = self._text_encoder.encode([text for request in requests for text in request.texts])
        latents = self._code_latents([codes for request in requests for codes in request.codes])
        found = [
            self._encode(request, list(islice(states, len(request.texts))), list(islice(latents, len(request.codes))))
            for request in requests
        ]
        conditions = self._conditions([each for each in found if isinstance(each, _EncodedRequest)], dit)
        return [each if isinstance(each, Exception) else tuple(self._samples_of(each, conditions)) for each in found]

    def warm_up(self) -> None:
        """Run the text encoders and the timbre encoder once, and keep the timbre of silence."""
        self._silent_timbre()
        for _ in self._text_encoder.encode([TokenizedText([0] * 64, [0] * 64)]):
            pass

    def _code_latents(self, codes: Sequence[list[int]]) -> Iterator[torch.Tensor]:
        """Yield the latents that each song's audio codes stand for, [frames, channels].

        The detokenizer treats each code by itself, so that all songs' codes can be one sequence.
        """
        if not codes:
            return
        tokenizer, detokenizer = self._pipeline.audio_tokenizer, self._pipeline.audio_token_detokenizer
        joined = torch.tensor([code for some in codes for code in some]).to(self._parts.device, non_blocking=True)
        quantizer = self._parts.use(tokenizer).quantizer
        quantized = quantizer.get_output_from_indices(joined[None, :, None]).to(self._parts.dtype)
        latents = self._parts.use(detokenizer)(quantized)[0].to(self._parts.dtype)
        frames = detokenizer.pool_window_size
        yield from torch.split(latents, [frames * len(some) for some in codes])

    def _encode(
        self, request: PreparedRequest, texts: Sequence[States], code_latents: Sequence[torch.Tensor]
    ) -> _EncodedRequest | Exception:
        try:
            source, timbres = self._source_and_timbres(request, code_latents)
            noise, generators = request.noise, request.generators
            if noise is None:
                # Fresh ones: when memory runs out, a request is encoded a second time.
                generators = tuple(generators_for(request.arguments.seeds))
                noise = self._preparer.noise(list(generators), source.context.shape[1])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return error
        states = tuple(tuple(torch.cat([lyrics, timbre, text]) for timbre in timbres) for text, lyrics in texts)
        return _EncodedRequest(request, source, noise.to(self._parts.device, non_blocking=True), generators, states)

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
        arguments = request.prepared.arguments
        interval = (arguments.cfg_interval_start, arguments.cfg_interval_end)
        for index, generator in enumerate(request.generators):
            own, *others = (conditions[id(some[index % len(some)])] for some in request.states)
            yield Sample(
                latents=request.noise[index],
                context=request.source.context[index],
                condition=own,
                noise_scheduler=self._parts.noise_scheduler(arguments, generator),
                guidance=Guidance(arguments.guidance_scale, interval, conditions[0]) if arguments.guided else None,
                blend=CoverBlend(arguments.audio_cover_strength, others[0]) if others else None,
                kept=self._kept(request, index),
                heard_frames=request.source.frames,
                peak=None if arguments.kept_samples(self._pipeline.sample_rate) else arguments.output.peak,
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
        embedded, _ = encoder(latents, torch.arange(len(latents), device=latents.device))
        return tuple(embedded)
