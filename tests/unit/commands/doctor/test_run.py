# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` makes of what it finds: judgements, the table for eyes, and probes that hang or break."""

import asyncio
import io
import json
import re
import shutil
import socket
import struct
import time
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.broker.inspection import MissingPermission, QueueDepth, TopologyDiff
from acestep_consumer.broker.management import QueuePolicy
from acestep_consumer.broker.queue_limit import LimitInForce
from acestep_consumer.broker.topology import (
    CAPACITY,
    DEAD_LETTER,
    GENERATE,
    IDENTIFIED,
    NOTICES,
    UNROUTED,
    topology_with,
)
from acestep_consumer.broker.versions import ack_timeout_warning
from acestep_consumer.commands.doctor import machine
from acestep_consumer.commands.doctor.broker import (
    TierQueueDifference,
    clock,
    judge_acks,
    judge_bindings,
    judge_depths,
    judge_limit,
    judge_permissions,
    judge_tags,
    judge_tiers,
    judge_topology,
    judge_version,
)
from acestep_consumer.commands.doctor.machine import (
    ENOUGH_BYTES,
    LEAST_BYTES,
    Machine,
    check_port,
    check_scratch,
    judge_concurrency,
    judge_encoders,
    judge_gpu,
    judge_tier,
)
from acestep_consumer.commands.doctor.models import judge_lm, judge_model, judge_vllm
from acestep_consumer.commands.doctor.policies import judge_policies
from acestep_consumer.commands.doctor.probe import Probe, run
from acestep_consumer.commands.doctor.report import DoctorReport, Finding, fail, ok, skip, warn
from acestep_consumer.commands.doctor.run import doctor, judge_settings
from acestep_consumer.commands.doctor.storage import judge_clock, judge_condition, judge_delete
from acestep_consumer.commands.doctor.table import show
from acestep_consumer.commands.doctor.torch_build import no_gpu_reason, no_gpu_reason_of
from acestep_consumer.commands.plan import gpu
from acestep_consumer.commands.plan.gpu import DetectedGpu
from acestep_consumer.commands.threads import run_in_thread
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import BrokerSettings, EngineSettings, Settings, WorkerSettings, load
from acestep_consumer.domain.objects import ObjectAddress
from acestep_consumer.engine.planner import vllm_versions
from acestep_consumer.engine.renderer.checkpoints.component_files import faults_of_lm, faults_of_pipeline
from acestep_consumer.policy.benchmarks import lm_size
from acestep_consumer.policy.lm_choice import LmPlan
from acestep_consumer.policy.tiers import BUILT_IN
from acestep_consumer.storage.s3.client import S3Response
from tests.support.broker import broker_settings
from tests.support.waiting import eventually

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
GOLDEN = Path(__file__).parents[3] / "golden/checkpoints"
NO_HUB: dict[str, str] = {"HF_HUB_CACHE": "/nowhere"}


def settings_with(**variables: str) -> Settings:
    return load(variables, env_file=None)


def with_policy(limit: int = 200) -> BrokerSettings:
    return broker_settings("amqp://127.0.0.1/", queue_maxsize=limit, management_url="http://127.0.0.1:15672")


def without_policy(limit: int = 200) -> BrokerSettings:
    return broker_settings("amqp://127.0.0.1/", queue_maxsize=limit)


# The settings


def test_what_a_worker_warns_of_at_its_start_is_a_warning_here_in_the_same_words() -> None:
    url = "amqp://user:secret@host/?cafile=/a.pem&connection_attempts=3"
    settings = settings_with(ACESTEP_AMQP_URL=url)
    found = judge_settings(settings, {})
    assert found.level == "warn"
    assert len(settings.broker.url_warnings) == 2
    assert found.said.splitlines()[1:] == list(settings.broker.url_warnings)
    assert "secret" not in found.said


def test_a_setting_of_ace_steps_own_server_that_does_nothing_here_is_told_and_is_no_warning() -> None:
    found = judge_settings(settings_with(ACESTEP_NO_INIT="true"), {})
    assert (found.level, found.said.splitlines()[1:]) == (
        "ok", ["ACESTEP_NO_INIT has no effect here: models are always loaded at the start"],
    )  # fmt: skip
    assert judge_settings(settings_with(), {}).said.splitlines()[1:] == []


async def test_a_misspelled_parameter_of_the_url_is_an_error_with_the_one_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACESTEP_AMQP_URL", "amqp://host/?hearbeat=30")
    assert await doctor(as_json=True, timeout_s=1) == Exit.UNFIT
    (found, _) = json.loads(capsys.readouterr().out)["findings"]
    assert (found["check"], found["level"]) == ("settings", "fail")
    assert "hearbeat is unknown; did you mean heartbeat?" in found["said"]


# The broker


@pytest.mark.parametrize(
    ("version", "level"),
    [("3.10.8", "ok"), ("4.3.6", "ok"), ("3.9.1", "warn"), ("4.4.0", "warn"), ("3.8.2", "fail"), (None, "warn")],
)
def test_versions_are_judged_by_what_was_tested(version: str | None, level: str) -> None:
    assert judge_version(version, "amqp://host/", "classic").level == level


@pytest.mark.parametrize(
    ("version", "said"),
    [("3.10.8", "ignore priorities"), ("4.1.0", "two priorities"), ("4.3.6", "honour priorities")],
)
def test_what_differs_for_quorum_queues_is_said(version: str, said: str) -> None:
    assert said in judge_version(version, "amqp://host/", "quorum").said


def test_a_short_ack_timeout_is_a_warning_with_the_cure() -> None:
    found = judge_acks(ack_timeout_warning("3.10.8", "classic", None, None))
    assert found.level == "warn"
    assert "requeues a message after 1800 s" in found.said
    assert found.fix is not None
    assert found.fix.startswith("Set `consumer_timeout = ")
    assert judge_acks(ack_timeout_warning("4.3.6", "classic", None, None)).level == "ok"


def test_lacking_permissions_are_named_with_the_command_that_gives_them() -> None:
    found = judge_permissions(
        (MissingPermission("write", "acestep.events"), MissingPermission("read", GENERATE)), "music"
    )
    assert found.level == "fail"
    assert "write on acestep.events, read on acestep.generate" in found.said
    assert found.fix is not None
    assert found.fix.startswith("rabbitmqctl set_permissions -p music USER ")
    assert "were not checked" in judge_permissions((MissingPermission("configure", GENERATE),), "/").said
    assert judge_permissions((), "/").level == "ok"


def test_a_limit_as_set_is_fine_wherever_it_stands() -> None:
    assert "set by a policy" in judge_limit(LimitInForce(None, 200, None), with_policy()).said
    assert "set by the queue's argument" in judge_limit(LimitInForce(200, 200, None), without_policy()).said


def test_another_limit_is_an_error_where_no_start_would_change_it() -> None:
    objection = "a policy lets acestep.generate hold only 50\nrabbitmqctl set_policy …"
    found = judge_limit(LimitInForce(None, 50, objection), without_policy())
    assert (found.level, found.fix) == ("fail", "rabbitmqctl set_policy …")


def test_another_limit_is_a_warning_where_the_next_start_sets_the_policy() -> None:
    assert judge_limit(LimitInForce(None, 50, "50, not 200"), with_policy()).level == "warn"
    # A policy only lowers an argument.
    assert judge_limit(LimitInForce(50, 50, "50, not 200\nmake it anew"), with_policy()).level == "fail"


def test_a_queue_that_is_not_there_has_no_limit_yet() -> None:
    found = judge_limit(None, without_policy(1_000))
    assert found.level == "warn"
    assert "its limit will be 1,000 messages" in (found.fix or "")


@pytest.mark.parametrize(
    ("found", "level"),
    [
        (TopologyDiff((), (), ()), "ok"),
        (TopologyDiff(("queue acestep.generate",), (), ()), "warn"),
        (TopologyDiff((), ("inequivalent arg 'x-queue-type'",), ()), "fail"),
        (TopologyDiff((), (), ("queue acestep.generate",)), "fail"),
    ],
)
def test_the_topology_is_compared(found: TopologyDiff, level: str) -> None:
    assert judge_topology(found).level == level


def test_missing_bindings_are_named() -> None:
    wanted = topology_with(without_policy(), 200)
    there = frozenset((each.exchange, each.queue, each.routing_key) for each in wanted.bindings)
    assert judge_bindings(wanted, there).level == "ok"
    found = judge_bindings(wanted, there - {("acestep.requests", GENERATE, "generate.#")})
    assert found.level == "warn"
    assert "acestep.requests → acestep.generate (generate.#)" in found.said


REJECTS = {"x-overflow": "reject-publish", "x-max-length": 200}


@pytest.mark.parametrize(
    ("queue", "kind", "arguments", "policy", "said"),
    [
        (GENERATE, "classic", REJECTS, {"ha-mode": "all"}, None),
        (GENERATE, "classic", REJECTS, {"overflow": "drop-head"}, None),
        (GENERATE, "quorum", REJECTS, {"overflow": "drop-head"}, "drops its oldest request for each new one"),
        (GENERATE, "quorum", REJECTS, {"overflow": "reject-publish-dlx"}, "a full queue rejects runs all the same"),
        (GENERATE, "quorum", REJECTS, {"delivery-limit": 20}, "given up then, whatever ACESTEP_MAX_ATTEMPTS says"),
        (GENERATE, "quorum", REJECTS, {"delivery-limit": -1}, None),
        (GENERATE, "classic", REJECTS, {"message-ttl": 0}, "end as expired that wait longer than 0 s"),
        (GENERATE, "classic", REJECTS, {"max-length": 500}, None),
        (f"{GENERATE}.tier6", "classic", REJECTS, {"max-length": 50}, "max-length = 50: ACESTEP_QUEUE_MAXSIZE is 200"),
        (GENERATE, "classic", {"x-overflow": "reject-publish"}, {}, "no limit is in force"),
        (GENERATE, "classic", REJECTS, {"max-length-bytes": 5}, "it is full before the limit of messages"),
        (GENERATE, "classic", REJECTS, {"message-ttl": 90_000}, "end as expired that wait longer than 90 s"),
        (GENERATE, "classic", REJECTS, {"expires": 60_000}, "deleted with all that waits after 60 s"),
        (IDENTIFIED, "classic", {}, {"max-length": 50}, "requests that were accepted are dropped"),
        (IDENTIFIED, "classic", {}, {"overflow": "drop-head"}, None),
        (NOTICES, "classic", {}, {"message-ttl": 90_000}, "terminal events are lost that wait"),
        (UNROUTED, "classic", {}, {"message-ttl": 90_000}, None),
        (DEAD_LETTER, "classic", {}, {"max-length": 90}, None),
        ("orders", "classic", {}, {"overflow": "drop-head"}, None),
    ],
)
def test_a_policy_that_breaks_a_guarantee_is_named_with_what_it_does(
    queue: str, kind: str, arguments: dict[str, Any], policy: dict[str, Any], said: str | None
) -> None:
    covered = QueuePolicy(name=queue, kind=kind, arguments=arguments, policy=policy, policies=("theirs",))
    found = judge_policies([covered], 200, "/")
    assert found.level == ("ok" if said is None else "warn")
    if said is not None:
        assert said in found.said
        assert found.said.startswith(f"{queue}: ")
        assert "'theirs'" in (found.fix or "")


def test_the_limit_that_a_worker_sets_is_left_to_the_measurement() -> None:
    policy, arguments = {"max-length": 100}, {"x-overflow": "reject-publish"}
    covered = QueuePolicy(name=GENERATE, kind="classic", arguments=arguments, policy=policy, policies=(CAPACITY,))
    assert judge_policies([covered], 200, "/").level == "ok"


def test_only_some_tags_may_set_policies() -> None:
    assert judge_tags(frozenset({"administrator"})).level == "ok"
    assert judge_tags(frozenset({"monitoring", "policymaker"})).level == "ok"
    assert judge_tags(frozenset({"monitoring"})).level == "fail"


@pytest.mark.parametrize(
    ("ready", "consumers", "others", "level", "said"),
    [
        (0, 0, {}, "ok", "0 of 200 waiting"),
        (5, 2, {}, "ok", "5 of 200 waiting; consumers: 2"),
        (5, 0, {}, "warn", "5 of 200"),
        (200, 1, {}, "warn", "further requests are rejected"),
        (0, 1, {DEAD_LETTER: 3}, "warn", "dead letters: 3"),
        (0, 0, {NOTICES: 4}, "warn", "terminal events not published yet: 4"),
        (0, 1, {NOTICES: 4}, "ok", "0 of 200"),
        (0, 1, {UNROUTED: 10_000}, "warn", "is full: 10,000 events"),
    ],
)
def test_what_waits_is_worth_a_line_when_nobody_takes_it(
    ready: int, consumers: int, others: dict[str, int], level: str, said: str
) -> None:
    depths = {GENERATE: QueueDepth(ready, consumers), **{name: QueueDepth(count, 0) for name, count in others.items()}}
    found = judge_depths(depths, 200)
    assert found.level == level
    assert said in found.said


def test_a_busy_worker_that_only_consumes_the_notices_takes_what_waits() -> None:
    found = judge_depths({GENERATE: QueueDepth(3, 0), NOTICES: QueueDepth(0, 1)}, 200)
    assert (found.level, found.said) == ("ok", "3 of 200 waiting; consumers: 1, dead letters: 0")


def test_queues_of_tiers_that_are_missing_are_named_and_what_waits_in_them_is_counted() -> None:
    settings = without_policy()
    found = judge_tiers({"acestep.generate.tier1": QueueDepth(0, 0), "acestep.generate.tier2": None}, [], settings)
    assert (found.level, found.said) == ("warn", "missing: acestep.generate.tier2")
    assert "declares them when it starts" in (found.fix or "")
    depths = {"acestep.generate.tier1": QueueDepth(0, 0), "acestep.generate.tier2": QueueDepth(3, 1)}
    found = judge_tiers(depths, [None, None], settings)
    assert (found.level, found.said) == ("ok", "all 2 exist; forwarded requests waiting: 3")


@pytest.mark.parametrize(
    ("limit", "settings", "said"),
    [
        (20, without_policy(), "for 20 messages"),
        (300, without_policy(), "for 300 messages"),
        (None, without_policy(), "without a limit"),
        (20, with_policy(), "for 20 messages"),
        (300, with_policy(), None),
        (None, with_policy(), None),
    ],
)
def test_a_queue_of_a_tier_with_another_limit_is_told_unless_the_policy_of_each_start_sets_it(
    limit: int | None, settings: BrokerSettings, said: str | None
) -> None:
    found = judge_tiers(
        {"acestep.generate.tier2": QueueDepth(0, 0)},
        [TierQueueDifference("acestep.generate.tier2", limit)],
        settings,
    )
    assert found.level == ("warn" if said else "ok")
    assert (f"tier2 was declared {said}, and ACESTEP_QUEUE_MAXSIZE is 200" in found.said) == bool(said)
    assert ("rabbitmqctl delete_queue -p / acestep.generate.tier2 --if-empty" in (found.fix or "")) == bool(said)


# Clocks and storage


@pytest.mark.parametrize(("ahead_s", "level"), [(0, "ok"), (4, "ok"), (-6, "warn"), (60, "warn"), (-1_000, "fail")])
def test_a_clock_that_is_off_is_told_by_how_much(ahead_s: int, level: str) -> None:
    found = clock("storage clock", NOON, NOON + timedelta(seconds=ahead_s))
    assert found.level == level
    if level != "ok":
        assert f"{abs(ahead_s):,} s {'ahead' if ahead_s > 0 else 'behind'}" in found.said


def test_the_storages_date_header_is_read_and_may_be_missing() -> None:
    assert judge_clock("Mon, 23 Nov 2026 12:00:00 GMT", NOON + timedelta(seconds=30)).level == "warn"
    assert judge_clock(None, NOON).level == "skip"


@pytest.mark.parametrize(("status", "level"), [(412, "ok"), (200, "warn"), (501, "warn"), (403, "fail")])
def test_conditional_writes_are_judged_by_the_answer(status: int, level: str) -> None:
    assert judge_condition(S3Response(status, {}, b"")).level == level


def test_keys_that_may_not_delete_are_good_enough() -> None:
    found = judge_delete(ObjectAddress("b", "k"), S3Response(403, {}, b"<Error><Code>AccessDenied</Code></Error>"))
    assert found.level == "warn"
    assert "AccessDenied; s3://b/k is left behind" in found.said


# This machine


def test_a_card_is_told_with_its_source_and_a_cpu_build_beside_one_is_an_error() -> None:
    card = DetectedGpu("NVIDIA L40S", 45.0, "nvidia-smi")
    assert judge_gpu(card, EngineSettings(), torch="2.13.0+cu130").level == "ok"
    assert judge_gpu(card, EngineSettings(), torch="2.13.0+cpu").level == "fail"
    assert "MAX_CUDA_VRAM" in judge_gpu(card, EngineSettings(max_vram_gb=8), torch=None).said


def test_no_card_is_a_warning_unless_the_cpu_is_meant() -> None:
    none = DetectedGpu("no GPU", 0, "none", "there is no nvidia-smi, and torch sees no GPU")
    assert judge_gpu(none, EngineSettings(), torch=None).level == "warn"
    assert judge_gpu(none, EngineSettings(device="cpu"), torch=None).level == "ok"


@pytest.mark.parametrize(
    ("build", "platform", "driver", "why"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda = None\nhip = None\nxpu = None", "linux", "c", "a CPU-only build"),
        ("cuda = '13.0'\nhip = None\nxpu = None", "linux", "libnowhere.so.1", "no NVIDIA driver (libnowhere.so.1)"),
        ("cuda = '13.0'", "linux", "libc.so.6", None),
        ("cuda = '13.0'", "win32", "libnowhere.so.1", None),
        ("cuda = None\nhip = '6.4'", "linux", "libnowhere.so.1", None),
        ("cuda = None\nxpu = '20250101'", "linux", "libnowhere.so.1", None),
        ("cuda = None", "darwin", "libnowhere.so.1", None),
        ("import nothing_of_that_name", "linux", "libnowhere.so.1", None),
    ],
)
def test_a_torch_that_cannot_see_a_gpu_is_known_by_its_build(
    tmp_path: Path, build: str, platform: str, driver: str, why: str | None
) -> None:
    (tmp_path / "version.py").write_text(build)
    found = no_gpu_reason_of(tmp_path, platform, driver)
    assert found is None if why is None else why in (found or "")


def test_the_build_tells_the_same_as_torch_itself() -> None:
    """Of the torch that is installed here, whichever it is."""
    import torch  # noqa: PLC0415 - the other tests of this file do without

    if no_gpu_reason() is not None:
        assert not torch.cuda.is_available()
        assert not torch.xpu.is_available()


def test_torch_is_not_asked_where_its_build_tells_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "no_gpu_reason", lambda: "torch is a CPU-only build")
    monkeypatch.setattr(gpu, "_ask_torch", lambda *_: pytest.fail("importing torch takes seconds"))
    found = gpu.find("auto", {"PATH": str(tmp_path)})
    assert (found.vram_gb, found.by) == (0, "none")
    assert found.why == "there is no nvidia-smi, and torch is a CPU-only build"


def test_torch_is_asked_for_a_device_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses with what it sees instead, which its build does not tell."""
    monkeypatch.setattr(gpu, "no_gpu_reason", lambda: "torch is a CPU-only build")
    monkeypatch.setattr(gpu, "_ask_torch", lambda *_: DetectedGpu("asked", 0, "torch"))
    assert gpu.find("cuda:1", {"PATH": str(tmp_path)}).name == "asked"


@pytest.mark.parametrize(("missing", "level"), [("torchao", "fail"), ("nothing", "ok")])
async def test_int8_without_torchao_is_told_with_what_to_install(
    missing: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == missing else name)
    (found,) = [each async for each in Machine(settings_with(ACESTEP_QUANTIZATION="int8"), {}).packages()]
    assert found.level == level
    assert (missing == "nothing") or found.fix == machine.INSTALL_INT8


def test_models_that_do_not_fit_the_card_are_told() -> None:
    crowded = settings_with(ACESTEP_INIT_LLM="true", ACESTEP_LM_MODEL_PATH="acestep-5Hz-lm-4B")
    assert judge_tier(DetectedGpu("some card", 16, "nvidia-smi"), BUILT_IN, crowded).level == "warn"
    found = judge_tier(DetectedGpu("some card", 48, "nvidia-smi"), BUILT_IN, settings_with())
    assert found.level == "ok"
    assert found.said.startswith("unlimited of acestep-1.5-2026-02: songs of at most 600 s")


def test_one_job_at_a_time_on_a_gpu_that_does_many_is_told() -> None:
    found = judge_concurrency(DetectedGpu("some card", 24, "nvidia-smi"), BUILT_IN, settings_with())
    assert found is not None
    assert (found.level, found.fix) == ("warn", "set ACESTEP_QUEUE_WORKERS=auto, or a number: acestep-consumer plan")
    for vram_gb, workers in ((24, "auto"), (24, "2"), (0, "1")):
        settings = settings_with(ACESTEP_QUEUE_WORKERS=workers)
        assert judge_concurrency(DetectedGpu("some card", vram_gb, "none"), BUILT_IN, settings) is None


def test_encoders_are_read_from_what_the_process_printed() -> None:
    whole = json.dumps({"formats": list(FORMATS), "decoder": None})
    assert [found.level for found in judge_encoders(0, whole, "")] == ["ok", "ok"]
    some = json.dumps({"formats": ["wav", "flac"], "decoder": "no process can be started"})
    lame, deaf = judge_encoders(0, some, "")
    assert (lame.level, deaf.level) == ("warn", "fail")
    assert "aac, mp3, ogg, opus, wav32" in lame.said
    (broken,) = judge_encoders(1, "", "warning: x\nav is missing: pip install …")
    assert (broken.level, broken.said) == ("fail", "check failed: av is missing: pip install …")


def test_a_scratch_folder_that_is_not_there_yet_is_tried_above(tmp_path: Path) -> None:
    found = check_scratch(tmp_path / "work" / "files")
    assert found.level in {"ok", "warn"}
    assert not (tmp_path / "work").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "level"), [(ENOUGH_BYTES, "ok"), (ENOUGH_BYTES - 1, "warn"), (LEAST_BYTES - 1, "fail")]
)
def test_little_room_for_work_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert check_scratch(tmp_path).level == level


def test_a_scratch_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert check_scratch(file).level == "fail"


async def test_a_port_is_free_or_taken_by_a_stranger() -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        taken = await check_port(WorkerSettings(http_port=port))
    assert taken.level == "fail"
    assert f"cannot listen on 127.0.0.1:{port}" in taken.said
    assert (await check_port(WorkerSettings(http_port=port))).level == "ok"
    assert (await check_port(WorkerSettings(http_port=0))).level == "ok"


async def test_an_address_that_is_not_ours_cannot_be_bound() -> None:
    found = await check_port(WorkerSettings(http_host="192.0.2.1"))
    assert found.level == "fail"
    assert "ACESTEP_HTTP_HOST" in (found.fix or "")


# Models


def weights(path: Path, *, missing: int = 0) -> None:
    """A safetensors file of two tensors, ``missing`` bytes short."""
    tensors = {"a": [0, 40], "b": [40, 100]}
    described: dict[str, Any] = {
        name: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        for name, (start, end) in tensors.items()
    }
    header = json.dumps({**described, "__metadata__": {"format": "pt"}}).encode()
    path.write_bytes((struct.pack("<Q", len(header)) + header + b"\0" * 100)[: None if not missing else -missing])


def checkpoint(folder: Path) -> Path:
    """A folder in diffusers' format with one part of each kind."""
    parts = {
        "vae": ["diffusers", "AutoencoderOobleck"],
        "audio_tokenizer": ["ace_step", "AceStepAudioTokenizer"],
        "tokenizer": ["transformers", "TokenizersBackend"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "nothing": [None, None],
    }
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "AceStepPipeline", **parts}))
    for part in ("vae", "audio_tokenizer"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
        weights(folder / part / "model.safetensors")
    for part, file in (("tokenizer", "tokenizer.json"), ("scheduler", "scheduler_config.json")):
        (folder / part).mkdir()
        (folder / part / file).write_text("{}")
    return folder


def test_a_whole_checkpoint_has_no_faults(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    assert list(faults_of_pipeline(folder)) == []
    assert judge_model("m", tmp_path, NO_HUB) == ok("model m", f"{folder} is complete")


def test_a_download_that_broke_off_is_seen_by_its_size(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    weights(folder / "vae" / "model.safetensors", missing=10)
    (fault,) = faults_of_pipeline(folder)
    assert fault.startswith("vae: model.safetensors has ")
    weights(folder / "vae" / "model.safetensors", missing=150)
    (fault,) = faults_of_pipeline(folder)
    assert fault == "vae: model.safetensors is not a safetensors file, or was cut off"


def test_missing_parts_are_named_one_by_one(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / "vae" / "model.safetensors").unlink()
    (folder / "audio_tokenizer" / "config.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler").rmdir()
    assert list(faults_of_pipeline(folder)) == [
        "vae: no weights (*.safetensors)",
        "audio_tokenizer: config.json is missing",
        "tokenizer: no tokenizer",
        "scheduler: the folder is missing",
    ]
    found = judge_model("m", tmp_path, NO_HUB)
    assert found.level == "fail"
    assert "scheduler: the folder is missing" in found.said


def test_shards_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    shards = {"x": "model-1-of-2.safetensors", "y": "model-2-of-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    weights(folder / "model-1-of-2.safetensors")
    assert list(faults_of_lm(folder)) == ["model-2-of-2.safetensors missing"]
    weights(folder / "model-2-of-2.safetensors")
    assert list(faults_of_lm(folder)) == []


def test_a_model_that_is_nowhere_fails_with_the_way_to_get_it(tmp_path: Path) -> None:
    found = judge_model("acestep-v15-turbo", tmp_path, NO_HUB)
    assert found.level == "fail"
    assert "was not found" in found.said
    assert f"acestep-consumer models pull acestep-v15-turbo --checkpoints {tmp_path}" in (found.fix or "")


def test_a_model_in_ace_steps_layout_is_checked_with_what_lies_beside_it(tmp_path: Path) -> None:
    for name in ("acestep-v15-turbo", "vae", "Qwen3-Embedding-0.6B"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    assert judge_model("acestep-v15-turbo", tmp_path, NO_HUB).level == "ok"
    shutil.rmtree(tmp_path / "vae")
    found = judge_model("acestep-v15-turbo", tmp_path, NO_HUB)
    assert found.level == "fail"
    assert f"acestep-consumer models pull vae --checkpoints {tmp_path}" in (found.fix or "")


def test_a_model_in_the_original_layout_is_judged_as_run_does(tmp_path: Path) -> None:
    folder = tmp_path / "acestep-v15-turbo"
    folder.mkdir()
    weights(folder / "model.safetensors")
    found = judge_model("acestep-v15-turbo", tmp_path, NO_HUB)
    assert (found.level, found.said) == ("fail", f"{folder} lacks config.json")
    assert (found.fix or "").startswith("download")
    (folder / "config.json").write_text('{"model_type": "acestep"}')
    assert "config.json has no field hidden_size" in judge_model("acestep-v15-turbo", tmp_path, NO_HUB).said


def test_a_model_on_the_hub_is_a_warning_and_offline_an_error(tmp_path: Path) -> None:
    cache, hub_id = {"HF_HUB_CACHE": str(tmp_path / "hub")}, "ACE-Step/acestep-v15-xl-turbo-diffusers"
    assert judge_model(hub_id, None, cache).level == "warn"
    assert judge_model(hub_id, None, {**cache, "HF_HUB_OFFLINE": "1"}).level == "fail"
    assert "models pull acestep-v15-xl-turbo" in (judge_model("acestep-v15-xl-turbo", None, cache).fix or "")
    copies = tmp_path / "hub" / "models--ACE-Step--acestep-v15-xl-turbo-diffusers" / "snapshots"
    copies.mkdir(parents=True)
    checkpoint(copies / "0abc")
    for named in (hub_id, "acestep-v15-xl-turbo"):
        assert judge_model(named, None, {**cache, "HF_HUB_OFFLINE": "1"}).level == "ok"


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HF_HUB_CACHE": "{}/a"}, "a"),
        ({"HF_HOME": "{}/b"}, "b/hub"),
        ({"XDG_CACHE_HOME": "{}/c"}, "c/huggingface/hub"),
    ],
)
def test_the_hubs_cache_is_where_its_client_looks(tmp_path: Path, variables: Mapping[str, str], folder: str) -> None:
    environ = {name: value.format(tmp_path) for name, value in variables.items()}
    copies = tmp_path / folder / "models--ours--model" / "snapshots"
    copies.mkdir(parents=True)
    checkpoint(copies / "1")
    assert judge_model("ours/model", None, environ).level == "ok"


def lm_plan(model: str, *, required: bool) -> LmPlan:
    return LmPlan(model=model, backend=None, memory_gb=3, size=lm_size(model), required=required)


def test_a_language_model_that_is_missing_stops_only_who_insists_on_it(tmp_path: Path) -> None:
    assert judge_lm(lm_plan("acestep-5Hz-lm-1.7B", required=True), tmp_path, NO_HUB).level == "fail"
    assert judge_lm(lm_plan("acestep-5Hz-lm-1.7B", required=False), tmp_path, NO_HUB).level == "warn"
    hub = judge_lm(lm_plan("acestep-5Hz-lm-0.6B", required=True), tmp_path, NO_HUB)
    assert hub.level == "warn"
    assert "ACE-Step/acestep-5Hz-lm-0.6B is not on this disk yet" in hub.said


@pytest.mark.parametrize(
    ("settings", "vram_gb", "found", "level"),
    [
        ({}, 24, "0.24.0", None),
        ({}, 24, "0.34.0", "warn"),
        ({}, 24, None, "warn"),
        ({}, 0, None, None),
        ({"ACESTEP_LM_OFFLOAD_TO_CPU": "true"}, 24, None, None),
        ({"ACESTEP_LM_BACKEND": "pt"}, 24, None, None),
        ({"ACESTEP_LM_BACKEND": "vllm"}, 0, None, "fail"),
        ({"ACESTEP_LM_BACKEND": "vllm"}, 24, "0.19.1", "fail"),
        ({"ACESTEP_LM_BACKEND": "vllm"}, 24, "0.33.0", None),
    ],
)
def test_a_vllm_that_a_worker_could_not_use_is_told(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], vram_gb: float, found: str | None, level: str | None
) -> None:
    monkeypatch.setattr(vllm_versions, "installed_version", lambda: found and f"vllm {found}")
    finding = judge_vllm(load(settings, env_file=None).engine, vram_gb)
    assert (finding and finding.level) == level
    if finding is not None:
        said = "vLLM is not installed" if found is None else f"vllm {found} is installed"
        assert f"{said}; this backend works with vllm 0.20 to 0.33" in finding.said
        assert str(finding.fix).startswith("pip install 'acestep-consumer[vllm]', or ")


# Probes and the report


async def test_a_probe_that_hangs_keeps_what_it_found_and_costs_the_others_nothing() -> None:
    async def hangs() -> AsyncGenerator[Finding]:
        yield ok("first", "there")
        await asyncio.Event().wait()

    async def breaks() -> AsyncGenerator[Finding]:
        yield ok("second", "there")
        raise ZeroDivisionError("nobody foresaw this")

    async def works() -> AsyncGenerator[Finding]:
        yield warn("third", "there", "do something")

    probes = (
        Probe(check="slow", run=hangs, late="warn", fix="wait"),
        Probe(check="odd", run=breaks),
        Probe(check="fine", run=works),
    )
    began = time.monotonic()
    found = await run(probes, timeout_s=0.5)
    assert time.monotonic() - began < 20
    assert [(each.check, each.level) for each in found] == [
        ("first", "ok"),
        ("slow", "warn"),
        ("second", "ok"),
        ("odd", "fail"),
        ("third", "warn"),
    ]
    assert found[1].said == "no answer within 0.5 s"
    assert "ZeroDivisionError: nobody foresaw this" in found[3].said


async def test_an_interrupted_probe_comes_to_its_end() -> None:
    ended: list[str] = []

    async def waits() -> AsyncGenerator[Finding]:
        await asyncio.Event().wait()
        yield ok("never", "there")

    async def ends_a_process() -> AsyncGenerator[Finding]:
        try:
            await asyncio.Event().wait()
            yield ok("never", "there")
        finally:
            await asyncio.sleep(0.1)
            ended.append("process")

    probes = (Probe(check="process", run=ends_a_process), Probe(check="other", run=waits))
    slow: list[str] = []
    task = asyncio.create_task(run(probes, timeout_s=60, slow_s=0.05, on_slow=slow.append))
    await eventually(lambda: slow)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (ended, slow) == (["process"], ["process, other"])


async def test_a_slow_answer_is_a_warning_and_no_failure() -> None:
    async def slow() -> AsyncGenerator[Finding]:
        yield ok("server", "connected")
        await asyncio.sleep(1.1)
        yield ok("queue", "there")

    async def quick() -> AsyncGenerator[Finding]:
        yield ok("port", "free")

    probes = (Probe(check="server", run=slow, fix="start it"), Probe(check="port", run=quick))
    found = await run(probes, timeout_s=60, slow_s=1)
    assert [(each.check, each.level) for each in found] == [
        ("server", "ok"),
        ("queue", "ok"),
        ("port", "ok"),
        ("speed", "warn"),
    ]
    assert re.fullmatch(r"slow to answer: server \(\d s\)", found[3].said)


async def test_a_call_in_a_thread_gives_its_result_or_its_error() -> None:
    assert await run_in_thread(lambda: 7) == 7
    with pytest.raises(FileNotFoundError):
        await run_in_thread(Path("/nowhere/at/all").stat)


def printed(report: DoctorReport) -> str:
    text = io.StringIO()
    show(report, Console(file=text, width=40, highlight=False))
    return text.getvalue()


def test_the_table_is_never_cut_or_wrapped_and_has_no_colours_off_a_terminal() -> None:
    command = "rabbitmqctl set_policy " + "x" * 100
    report = DoctorReport(
        findings=(ok("a", "fine"), fail("check", "bad\nvery bad", f"run this:\n{command}")), took_s=1.25
    )
    assert printed(report).splitlines() == [
        "ok    a      fine",
        "fail  check  bad",
        "             very bad",
        "      → run this:",
        f"        {command}",
        "1 ok, 1 fail in 1.2 s: a worker cannot start here",
    ]


def test_on_a_terminal_results_are_wrapped_at_words_below_themselves_and_fixes_are_not() -> None:
    command = "rabbitmqctl set_policy " + "x" * 40
    report = DoctorReport(findings=(warn("check", "several words that do not fit in here", command),), took_s=1)
    text = io.StringIO()
    show(report, Console(file=text, width=40, highlight=False, force_terminal=True, color_system=None))
    assert [line.rstrip() for line in text.getvalue().splitlines()] == [
        "warn  check  several words that do not",
        "             fit in here",
        f"      → {command}",
        "1 warn in 1.0 s: a worker can start here",
    ]


def test_a_report_without_failures_is_fit_whatever_was_skipped() -> None:
    report = DoctorReport(findings=(ok("a", "x"), warn("b", "y"), skip("c", "z")), took_s=0.1)
    assert report.fit
    assert printed(report).splitlines()[-1] == "1 ok, 1 warn, 1 skip in 0.1 s: a worker can start here"
    told = json.loads(report.model_dump_json())
    assert told["fit"] is True
    assert told["findings"][2] == {"check": "c", "level": "skip", "said": "not checked: z", "fix": None}


async def test_a_score_table_that_cannot_be_read_is_found() -> None:
    settings = load({"ACESTEP_SCORE_TABLE": "/nowhere.toml", "ACESTEP_DEVICE": "cpu"}, env_file=None)
    first, *_ = [found async for found in Machine(settings, {}).device()]
    assert (first.check, first.level) == ("score table", "fail")
    assert "ACESTEP_SCORE_TABLE: /nowhere.toml cannot be read: No such file" in first.said
