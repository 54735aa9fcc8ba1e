# SPDX-License-Identifier: Apache-2.0
"""Drafts into songs: texts, source and reference audio become what the DiT hears. In batches, on the device.

Each song comes out as ``AceStepPipeline`` would prepare it alone. What is cheaper here, and equal up to rounding:
texts of several jobs are encoded together; "no reference audio" is encoded once for good; the empty condition of
guidance, one vector repeated for each token, is one token, since attending to equal tokens gives the same as to one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.errors import is_out_of_memory
from acestep_consumer.engine.renderer.packed_dit import Condition, PackedDit
from acestep_consumer.engine.renderer.prepare import PreparedRequest, RequestPreparer, TokenizedText
from acestep_consumer.engine.renderer.rng import generators_for
from acestep_consumer.engine.renderer.sample import CoverBlend, Guidance, Sample
from acestep_consumer.engine.renderer.text_encoder import States, TextEncoder

_REFERENCE_S = 30
_NO_GUIDANCE = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _EncodedRequest:
    """A draft on the device.

    ``context``: [songs, frames, 2 * channels]; ``noise``: [songs, frames, channels]; ``states``: for each of the
    draft's words, one for all songs or one for each, [tokens, width].
    """

    draft: PreparedRequest
    context: torch.Tensor
    noise: torch.Tensor
    generators: tuple[torch.Generator, ...]
    states: tuple[tuple[torch.Tensor, ...], ...]

    @property
    def guided(self) -> bool:
        scale: float = self.draft.given["guidance_scale"]
        return scale > _NO_GUIDANCE


class Conditioner:
    """Prepares songs of one model.

    Args:
        parts: the model.
        drafting: draws the noise where only the source audio tells how much.
        texts: encodes texts.
    """

    def __init__(self, parts: Components, drafting: RequestPreparer, texts: TextEncoder) -> None:
        self._parts = parts
        self._pipeline = parts.pipeline
        self._drafting = drafting
        self._texts = texts
        self._silence: torch.Tensor | None = None

    def songs(self, drafts: Sequence[PreparedRequest], dit: PackedDit) -> list[tuple[Sample, ...] | Exception]:
        """Prepare the songs of each draft, or say why there are none. Raises when memory runs out."""
        states = self._texts.encode([words for draft in drafts for words in draft.words])
        hints = self._hints([codes for draft in drafts for codes in draft.codes])
        found = [
            self._score(draft, list(islice(states, len(draft.words))), list(islice(hints, len(draft.codes))))
            for draft in drafts
        ]
        conditions = self._conditions([score for score in found if isinstance(score, _EncodedRequest)], dit)
        return [score if isinstance(score, Exception) else tuple(self._cast(score, conditions)) for score in found]

    def warm(self) -> None:
        """Encode once what every song needs, and run the encoders."""
        self._silent_timbre()
        for _ in self._texts.encode([TokenizedText([0] * 64, [0] * 64)]):
            pass

    def _hints(self, codes: Sequence[list[int]]) -> Iterator[torch.Tensor]:
        """Yield what each song's audio codes sound like: latents, [frames, channels].

        A code becomes its frames without a look at its neighbours, so that all songs' codes can be one sequence.
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

    def _score(
        self, draft: PreparedRequest, encoded: Sequence[States], hints: Sequence[torch.Tensor]
    ) -> _EncodedRequest | Exception:
        try:
            context, timbres = self._material(draft, hints)
            noise, generators = draft.noise, draft.generators
            if noise is None:
                # Fresh ones: when memory runs out, a draft is prepared a second time.
                generators = tuple(generators_for(draft.arguments.seeds))
                noise = self._drafting.noise(list(generators), context.shape[1])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return error
        states = tuple(tuple(torch.cat([lyrics, timbre, text]) for timbre in timbres) for text, lyrics in encoded)
        return _EncodedRequest(draft, context, noise.to(self._parts.device, non_blocking=True), generators, states)

    def _conditions(self, scores: Sequence[_EncodedRequest], dit: PackedDit) -> dict[int, Condition]:
        """Return the condition of each state by the state's identity; 0 is the empty condition."""
        if not scores:
            return {}
        states = {id(state): state for score in scores for some in score.states for state in some}
        if any(score.guided for score in scores):
            encoder = self._pipeline.condition_encoder
            states[0] = encoder.null_condition_emb[0].to(self._parts.device, self._parts.dtype)
        self._parts.use(dit.dit)
        return dict(zip(states, dit.conditions(list(states.values())), strict=True))

    def _cast(self, score: _EncodedRequest, conditions: dict[int, Condition]) -> Iterator[Sample]:
        draft, given = score.draft, score.draft.given
        for index, generator in enumerate(score.generators):
            own, *others = (conditions[id(some[index % len(some)])] for some in score.states)
            interval = (given["cfg_interval_start"], given["cfg_interval_end"])
            yield Sample(
                latents=score.noise[index],
                context=score.context[index],
                condition=own,
                scheduler=self._parts.scheduler(generator, given, stochastic=draft.arguments.method == "sde"),
                guidance=Guidance(given["guidance_scale"], interval, conditions[0]) if score.guided else None,
                blend=CoverBlend(given["audio_cover_strength"], others[0]) if others else None,
            )

    def _material(
        self, draft: PreparedRequest, hints: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the songs' context, [songs, frames, 2 * channels], and one timbre for all or one for each."""
        given, songs = draft.given, len(draft.generators)
        where: dict[str, Any] = {"device": self._parts.device, "dtype": self._parts.dtype, "batch_size": songs}
        vae, source = self._parts.vae, given.get("src_audio")
        # Source and reference draw their points from the songs' seeds, one after the other.
        vae.generators, vae.use_tiling = generators_for(draft.arguments.seeds), draft.arguments.tiled
        latents, frames = (
            (torch.stack(list(hints)), draft.frames)
            if hints
            else self._pipeline.prepare_src_latents(
                **where, src_audio=source, latent_length=draft.frames, task_type=draft.task
            )
        )
        timbres = self._timbres(given["reference_audio"], songs)
        mask = self._pipeline._build_chunk_mask(  # noqa: SLF001 - the pipeline's mask, not a copy of it
            task_type=draft.task,
            latent_length=frames,
            acoustic_dim=latents.shape[-1],
            repainting_start=given.get("repainting_start"),
            repainting_end=given.get("repainting_end"),
            has_src_audio=source is not None,
            **where,
        )
        if draft.task == "repaint" and source is not None:
            silence, _ = self._pipeline.prepare_src_latents(**where, latent_length=frames)
            latents = torch.where(mask.bool(), silence, latents)
        return torch.cat([latents, mask], dim=-1), timbres

    def _timbres(self, reference: torch.Tensor | None, songs: int) -> tuple[torch.Tensor, ...]:
        """Return timbres, [1, width] each."""
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
