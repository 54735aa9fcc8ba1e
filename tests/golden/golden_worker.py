# SPDX-License-Identifier: Apache-2.0
"""A worker in this process, without a broker: a golden case's body in, latents, audio and prompts out.

The body takes the worker's own path: it is parsed, admitted, translated into the renderer's arguments, rendered in
float32 on the CPU and encoded as 32-bit WAV.

What many cases have in common is computed once: each source and reference is read and goes through the VAE's encoder
once.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from diffusers import AutoencoderOobleck

from acestep_consumer.audio import codec
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import Job, Plan, Rendering, Sources
from acestep_consumer.domain.parse import RequestRules, parse
from acestep_consumer.engine.messages import Render
from acestep_consumer.engine.renderer.batch_request import BatchRequest
from acestep_consumer.engine.renderer.checkpoints.checkpoint import load_models
from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.decoder.vae_decode import TileDecoder
from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.engine.renderer.device import DeviceReport
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.prepare import RequestPreparer, TokenizedText
from acestep_consumer.engine.renderer.render import render
from acestep_consumer.engine.renderer.render_resources import RenderResources
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.policy.admit import Limits, admit
from acestep_consumer.policy.memory_budget import MemoryBudget
from acestep_consumer.policy.tiers import BUILT_IN
from acestep_schemas.events import Metas
from tests.golden.golden_data import GoldenCase, need
from tests.support.admission import FORMATS

_CPU = torch.device("cpu")
_PLACE = "s3://golden/"


@dataclass(slots=True)
class Made:
    """What this worker made of a case.

    ``latents`` and ``context``: [frames, channels] of each song; the context is that of the first pass.
    ``passes``: [flow time, branches of all songs] of each forward pass.
    ``texts``: prompt and lyrics of each text condition, as strings.
    """

    latents: list[torch.Tensor] = field(default_factory=list)
    context: list[torch.Tensor] = field(default_factory=list)
    passes: list[tuple[float, int]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    audio: list[torch.Tensor] = field(default_factory=list)
    job: Job | None = None
    rendering: Rendering | None = None


class GoldenWorker:
    """Renders golden cases. Each model is loaded at its first case, and kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._schedulers: dict[str, Scheduler] = {}

    def make(self, case: GoldenCase) -> Made:
        """Render one case."""
        resources = self.resources(case.model)
        job = admitted(case, resources)
        with shared_inputs(), recorded() as made:
            made.job = job
            made.rendering = render(
                resources,
                Render(
                    request_id=1,
                    job=job,
                    plan=Plan(metas=Metas()),
                    sources=sources_of(case),
                    folder=self._folder,
                ),
                lambda _fraction, _stage: None,
                lambda: False,
            )
        files = [soundfile.read(track.path, dtype="float32")[0] for track in made.rendering.tracks]
        made.audio = [torch.from_numpy(samples.T) for samples in files]
        return made

    def resources(self, model: str) -> RenderResources:
        """Return what the renderer needs for the model, loaded at the first call."""
        return RenderResources(self._scheduler(model))

    def _scheduler(self, model: str) -> Scheduler:
        if model not in self._schedulers:
            settings = EngineSettings(checkpoint_dir=need(f"checkpoints/{model}").parent, config_path=model)
            (handle,) = load_models(settings, DeviceReport(device="cpu", name="CPU", vram_gb=0), lambda _: None)
            parts = Components(handle, _CPU, TileDecoder(handle.pipeline.vae))
            self._schedulers[model] = Scheduler({model: ModelRunner(parts)}, _CPU, MemoryBudget())
        return self._schedulers[model]


def body_of(case: GoldenCase) -> dict[str, Any]:
    """Return the case's body as a producer would send it here: inputs in S3, and every option as a field."""
    body = {**case.facts["body"], **case.facts.get("python_parameters", {}), "audio_format": "wav32"}
    for name in ("src_audio_path", "reference_audio_path"):
        if body.get(name):
            body[name] = _PLACE + body[name]
    if lora := case.facts.get("lora"):
        suffix = "" if lora.endswith(".safetensors") else "/"
        body["lora"] = {"path": _PLACE + lora + suffix, "scale": case.facts["lora_scale"]}
    return body


def admitted(case: GoldenCase, resources: RenderResources) -> Job:
    """Parse and admit the case's body, on a worker of the largest tier that has the case's model and no LM."""
    request = parse(json.dumps(body_of(case)).encode(), "golden", RequestRules(max_bytes=1 << 20))
    limits = Limits(
        tier=BUILT_IN.tier_of(80),
        table_version=BUILT_IN.version,
        vram_gb=80,
        models=(resources.scheduler.models[case.model],),
        formats=FORMATS,
    )
    return admit(request, limits)


def sources_of(case: GoldenCase) -> Sources:
    """Return the case's inputs on this machine."""
    body, lora = case.facts["body"], case.facts.get("lora")
    source, reference = body.get("src_audio_path"), body.get("reference_audio_path")
    weights = need(lora) if lora else None
    if weights is not None and weights.is_dir():
        weights /= "adapter_model.safetensors"
    return Sources(
        source=need(source) if source else None,
        reference=need(reference) if reference else None,
        loras=(weights,) if weights else (),
    )


_read = cache(codec.decode)
_encode = AutoencoderOobleck.encode
_posteriors: defaultdict[bytes, list[tuple[torch.Tensor, Any]]] = defaultdict(list)


@cache
def _weights(encoder: torch.nn.Module) -> bytes:
    return b"".join(each.numpy().tobytes() for each in encoder.state_dict().values())


@contextmanager
def shared_inputs() -> Iterator[None]:
    """Read each audio file once, and encode it once: most models have the same VAE."""

    def encode(vae: Any, audio: torch.Tensor) -> Any:
        known = _posteriors[_weights(vae.encoder)]
        for other, posterior in known:
            if torch.equal(audio, other):
                return posterior
        known.append((audio.clone(), _encode(vae, audio)))
        return known[-1][1]

    def read(path: Path, *, stopped: Any, **more: Any) -> codec.Samples:
        return _read(path, **more).copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderOobleck, "encode", encode)
        patch.setattr(codec, "decode", read)
        yield


@contextmanager
def recorded() -> Iterator[Made]:
    """Record what one job passes between the stages of the renderer."""
    made, contexts = Made(), dict[int, torch.Tensor]()
    step, deliver, tokenized = ModelRunner.step, BatchRequest.deliver, RequestPreparer._tokenized

    def recorded_step(self: ModelRunner, samples: Sequence[Sample], lora: Any) -> Any:
        for sample in samples:
            contexts.setdefault(id(sample), sample.context.clone())
        made.passes.append((samples[0].time, sum(len(sample.branches()) for sample in samples)))
        return step(self, samples, lora)

    def recorded_delivery(self: BatchRequest, sample: Sample, audio: torch.Tensor) -> None:
        made.latents.append(sample.latents.clone())
        made.context.append(contexts[id(sample)])
        deliver(self, sample, audio)

    def recorded_texts(self: RequestPreparer, text: str, lyrics: str) -> tuple[TokenizedText, tuple[str, ...]]:
        made.texts.append((text, lyrics))
        return tokenized(self, text, lyrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "step", recorded_step)
        patch.setattr(BatchRequest, "deliver", recorded_delivery)
        patch.setattr(RequestPreparer, "_tokenized", recorded_texts)
        yield made
