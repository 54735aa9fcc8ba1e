# SPDX-License-Identifier: Apache-2.0
"""The house's table: which room may import which, and where heavy packages may be named at all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NOUNS = {
    "schemas",
    "acestep_consumer.job",
    "acestep_consumer.errors",
    "acestep_consumer.attempt",
    "acestep_consumer.ending",
}
STORY = {
    *NOUNS,
    "acestep_consumer.ports",
    "acestep_consumer.policy",
    "acestep_consumer.outcome",
    "acestep_consumer.validate",
    "acestep_consumer.case",
}
HELPERS = {
    "acestep_consumer.cancelling",
    "acestep_consumer.chronicle",
    "acestep_consumer.deadline",
    "acestep_consumer.narrator",
    "acestep_consumer.scratch",
    "acestep_consumer.stopwatch",
    "acestep_consumer.tally",
    "acestep_consumer.tracing",
    "acestep_consumer.trials",
    "acestep_consumer.turns",
    "acestep_consumer.witness",
}
# What runs in an engine process. The consumer process imports none of these.
ENGINE_ROOMS = {
    "acestep_consumer.audio",
    "acestep_consumer.decoding",
    "acestep_consumer.engine.renderer",
    "acestep_consumer.engine.tiny_checkpoint",
    "acestep_consumer.engine.tiny_lm",
    "acestep_consumer.engine.planner.loading",
    "acestep_consumer.engine.planner.offloaded",
    "acestep_consumer.engine.planner.guidance",
    "acestep_consumer.engine.planner.replay",
    "acestep_consumer.engine.planner.row_cache",
    "acestep_consumer.engine.planner.row_table",
    "acestep_consumer.engine.planner.token_masks",
    "acestep_consumer.engine.planner.tokens",
    "acestep_consumer.engine.planner.transformers_backend",
    "acestep_consumer.engine.planner.vllm_backend",
    "acestep_consumer.engine.planner.vllm_engine",
    "acestep_consumer.engine.planner.vllm_guidance",
}
TORCH = {"torch", "transformers", "diffusers", "accelerate", "numpy", "soundfile", "av", "tokenizers", "safetensors"}

# Room -> what of ours it may import. The most specific room that holds a module counts.
MAY_IMPORT: dict[str, set[str]] = {
    "schemas": {"schemas"},
    "acestep_consumer.job": {"schemas"},
    "acestep_consumer.errors": {"schemas"},
    "acestep_consumer.settings": {"acestep_consumer.secret_files"},
    "acestep_consumer.secret_files": set(),
    "acestep_consumer.telemetry": set(),
    "acestep_consumer.health": set(),
    "acestep_consumer.metrics": {
        "acestep_consumer.engine.messages",
        "acestep_consumer.engine.usage",
        "acestep_consumer.tally",
        "acestep_consumer.traffic",
    },
    "acestep_consumer.tally": NOUNS,
    "acestep_consumer.traffic": set(),
    "acestep_consumer.throughput": set(),
    "acestep_consumer.concurrency": {"acestep_consumer.throughput"},
    "acestep_consumer.pacer": {"acestep_consumer.throughput", "acestep_consumer.concurrency"},
    "acestep_consumer.attempt": set(),
    "acestep_consumer.ending": {"schemas"},
    "acestep_consumer.ports": NOUNS,
    "acestep_consumer.validate": NOUNS,
    "acestep_consumer.policy": {*NOUNS, "acestep_consumer.policy"},
    "acestep_consumer.policy.capacity": {
        "acestep_consumer.policy",
        "acestep_consumer.engine.renderer.budget",
    },  # both pure
    "acestep_consumer.outcome": NOUNS,
    "acestep_consumer.deadline": {*NOUNS, "acestep_consumer.ports"},
    "acestep_consumer.cancelling": NOUNS,
    "acestep_consumer.case": {*NOUNS, "acestep_consumer.eta", "acestep_consumer.ports", "acestep_consumer.validate"},
    "acestep_consumer.room": set(),
    "acestep_consumer.trials": {*NOUNS, "acestep_consumer.ports", "acestep_consumer.room"},
    "acestep_consumer.scratch": NOUNS,
    "acestep_consumer.disk": {*NOUNS, "acestep_consumer.ports"},
    "acestep_consumer.reload": {"acestep_consumer.settings"},
    "acestep_consumer.hangup": set(),
    "acestep_consumer.turns": set(),
    "acestep_consumer.stopwatch": {*NOUNS, "acestep_consumer.tracing"},
    "acestep_consumer.tracing": STORY,
    "acestep_consumer.eta": NOUNS,
    "acestep_consumer.chronicle": {
        *STORY,
        "acestep_consumer.eta",
        "acestep_consumer.tally",
        "acestep_consumer.tracing",
    },
    "acestep_consumer.narrator": {*STORY, "acestep_consumer.eta"},
    "acestep_consumer.witness": STORY,
    "acestep_consumer.obituary": {*STORY, "acestep_consumer.broker.delivery", "acestep_consumer.broker.notices"},
    "acestep_consumer.control": {"acestep_consumer.broker", "acestep_consumer.settings"},
    "acestep_consumer.pipeline": STORY | HELPERS,
    "acestep_consumer.patience": {*NOUNS, "acestep_consumer.ports"},
    "acestep_consumer.broker": {
        *NOUNS,
        "acestep_consumer.ports",
        "acestep_consumer.settings",
        "acestep_consumer.broker",
    },
    "acestep_consumer.s3": {*NOUNS, "acestep_consumer.settings", "acestep_consumer.traffic"},
    "acestep_consumer.objects": {*NOUNS, "acestep_consumer.s3"},
    "acestep_consumer.storage": {
        *NOUNS,
        "acestep_consumer.settings",
        "acestep_consumer.objects",
        "acestep_consumer.s3",
    },
    "acestep_consumer.addresses": set(),
    "acestep_consumer.inputs": {
        *NOUNS,
        "acestep_consumer.addresses",
        "acestep_consumer.loras",
        "acestep_consumer.objects",
        "acestep_consumer.s3",
        "acestep_consumer.settings",
    },
    "acestep_consumer.attempts": {
        *NOUNS,
        "acestep_consumer.settings",
        "acestep_consumer.objects",
        "acestep_consumer.s3",
        "acestep_consumer.storage",
    },
    "acestep_consumer.loras": {*NOUNS, "acestep_consumer.turns"},
    "acestep_consumer.formats": set(),
    "acestep_consumer.audio": {*NOUNS, "acestep_consumer.decoding", "acestep_consumer.formats"},
    "acestep_consumer.decoding": {*NOUNS, "acestep_consumer.decoding"},
    "acestep_consumer.engine": {
        *NOUNS,
        "acestep_consumer.room",
        "acestep_consumer.ports",
        "acestep_consumer.settings",
        "acestep_consumer.telemetry",
        "acestep_consumer.audio",
        "acestep_consumer.formats",
        "acestep_consumer.loras",
        "acestep_consumer.policy",
        "acestep_consumer.engine",
    },
    "acestep_consumer.fleet": {
        "acestep_consumer.fleet",
        "acestep_consumer.settings",
        "acestep_consumer.commands.exits",
        "acestep_consumer.hangup",
    },
    "acestep_consumer.client": {
        *NOUNS,
        "acestep_consumer.settings",
        "acestep_consumer.objects",
        "acestep_consumer.s3",
        "acestep_consumer.client",
        "acestep_consumer.broker.backoff",  # what it shares with the worker's side of the broker: names and faults
        "acestep_consumer.broker.faults",
        "acestep_consumer.broker.topology",
    },
    "acestep_consumer.listen": {
        "schemas",
        "acestep_consumer.client",
        "acestep_consumer.formats",
        "acestep_consumer.listen",
        "acestep_consumer.settings",
    },
    "acestep_consumer.engine_set": {
        "acestep_consumer.engine.messages",
        "acestep_consumer.engine.supervisor",
        "acestep_consumer.engine.usage",
        "acestep_consumer.policy",
        "acestep_consumer.ports",
    },
    "acestep_consumer.signals": {"acestep_consumer.fleet.lifeline", "acestep_consumer.hangup"},
    "acestep_consumer.observation": {
        "acestep_consumer.broker",
        "acestep_consumer.disk",
        "acestep_consumer.engine_set",
        "acestep_consumer.health",
        "acestep_consumer.metrics",
        "acestep_consumer.patience",
        "acestep_consumer.settings",
        "acestep_consumer.storage",
        "acestep_consumer.tally",
        "acestep_consumer.traffic",
    },
    "acestep_consumer.announcements": {
        *NOUNS,
        "acestep_consumer.broker",
        "acestep_consumer.engine_set",
        "acestep_consumer.eta",
    },
    "acestep_consumer.intake": {
        "acestep_consumer.announcements",
        "acestep_consumer.broker",
        "acestep_consumer.concurrency",
        "acestep_consumer.engine.usage",
        "acestep_consumer.pacer",
        "acestep_consumer.settings",
    },
    "acestep_consumer.commands": {"schemas", "consumer"},
    "acestep_consumer.app": {"schemas", "consumer"},
    "acestep_consumer.cli": {"schemas", "consumer"},
    "consumer": set(),
}
MAY_NAME: dict[str, set[str]] = {
    "aio_pika": {"acestep_consumer.broker", "acestep_consumer.client"},
    "boto3": {"acestep_consumer.objects", "acestep_consumer.s3"},
    "botocore": {"acestep_consumer.objects", "acestep_consumer.s3"},
    "opentelemetry": {"acestep_consumer.tracing"},
    "prometheus_client": {"acestep_consumer.metrics", "acestep_consumer.commands.top_report"},
    **dict.fromkeys(TORCH, ENGINE_ROOMS),
    "torch": {*ENGINE_ROOMS, "acestep_consumer.fleet.census"},  # asked in a process of its own
}
MODULES = sorted((*ROOT.glob("consumer/**/*.py"), *ROOT.glob("schemas/**/*.py")))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_imports_only_what_the_table_allows(path: Path) -> None:
    room = max((room for room in MAY_IMPORT if inside(name_of(path), {room})), key=len)
    ours = {name for name in imports_of(path) if inside(name, {"consumer", "schemas"})}
    assert {name for name in ours if not inside(name, MAY_IMPORT[room] | {room})} == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_heavy_or_foreign_package_is_named_in_its_own_room_only(path: Path) -> None:
    strangers = {
        package
        for package, rooms in MAY_NAME.items()
        if inside_any(imports_of(path), package) and not inside(name_of(path), rooms)
    }
    assert strangers == set()


def inside_any(names: set[str], package: str) -> bool:
    return any(inside(name, {package}) for name in names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_is_longer_than_sixty_lines(path: Path) -> None:
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert {function.name for function in functions if body_lines(function) > 60} == set()


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def test_the_story_fits_on_a_screen() -> None:
    story = (ROOT / "consumer/acestep_consumer/pipeline.py").read_text(encoding="utf-8").split("class Pipeline")[1]
    assert len(story.splitlines()) < 70
