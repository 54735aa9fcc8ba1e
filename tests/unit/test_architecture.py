# SPDX-License-Identifier: Apache-2.0
"""The house's table: which room may import which, and where heavy packages may be named at all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NOUNS = {"schemas", "consumer.job", "consumer.errors", "consumer.attempt", "consumer.ending"}
STORY = {*NOUNS, "consumer.ports", "consumer.policy", "consumer.outcome", "consumer.validate", "consumer.case"}
HELPERS = {
    "consumer.cancelling",
    "consumer.chronicle",
    "consumer.deadline",
    "consumer.narrator",
    "consumer.scratch",
    "consumer.stopwatch",
    "consumer.tally",
    "consumer.tracing",
    "consumer.trials",
    "consumer.turns",
    "consumer.witness",
}
# What runs in an engine process. The consumer process imports none of these.
ENGINE_ROOMS = {
    "consumer.audio",
    "consumer.decoding",
    "consumer.engine.renderer",
    "consumer.engine.tiny_checkpoint",
    "consumer.engine.tiny_lm",
    "consumer.engine.planner.loading",
    "consumer.engine.planner.offloaded",
    "consumer.engine.planner.guidance",
    "consumer.engine.planner.replay",
    "consumer.engine.planner.row_cache",
    "consumer.engine.planner.row_table",
    "consumer.engine.planner.token_masks",
    "consumer.engine.planner.tokens",
    "consumer.engine.planner.transformers_backend",
    "consumer.engine.planner.vllm_backend",
    "consumer.engine.planner.vllm_engine",
    "consumer.engine.planner.vllm_guidance",
}
TORCH = {"torch", "transformers", "diffusers", "accelerate", "numpy", "soundfile", "av", "tokenizers", "safetensors"}

# Room -> what of ours it may import. The most specific room that holds a module counts.
MAY_IMPORT: dict[str, set[str]] = {
    "schemas": {"schemas"},
    "consumer.job": {"schemas"},
    "consumer.errors": {"schemas"},
    "consumer.settings": {"consumer.secret_files"},
    "consumer.secret_files": set(),
    "consumer.telemetry": set(),
    "consumer.health": set(),
    "consumer.metrics": {
        "consumer.engine.messages",
        "consumer.engine.usage",
        "consumer.tally",
        "consumer.traffic",
    },
    "consumer.tally": NOUNS,
    "consumer.traffic": set(),
    "consumer.throughput": set(),
    "consumer.concurrency": {"consumer.throughput"},
    "consumer.pacer": {"consumer.throughput", "consumer.concurrency"},
    "consumer.attempt": set(),
    "consumer.ending": {"schemas"},
    "consumer.ports": NOUNS,
    "consumer.validate": NOUNS,
    "consumer.policy": {*NOUNS, "consumer.policy"},
    "consumer.policy.capacity": {"consumer.policy", "consumer.engine.renderer.budget"},  # both pure
    "consumer.outcome": NOUNS,
    "consumer.deadline": {*NOUNS, "consumer.ports"},
    "consumer.cancelling": NOUNS,
    "consumer.case": {*NOUNS, "consumer.eta", "consumer.ports", "consumer.validate"},
    "consumer.room": set(),
    "consumer.trials": {*NOUNS, "consumer.ports", "consumer.room"},
    "consumer.scratch": NOUNS,
    "consumer.disk": {*NOUNS, "consumer.ports"},
    "consumer.reload": {"consumer.settings"},
    "consumer.hangup": set(),
    "consumer.turns": set(),
    "consumer.stopwatch": {*NOUNS, "consumer.tracing"},
    "consumer.tracing": STORY,
    "consumer.eta": NOUNS,
    "consumer.chronicle": {*STORY, "consumer.eta", "consumer.tally", "consumer.tracing"},
    "consumer.narrator": {*STORY, "consumer.eta"},
    "consumer.witness": STORY,
    "consumer.obituary": {*STORY, "consumer.broker.delivery", "consumer.broker.notices"},
    "consumer.control": {"consumer.broker", "consumer.settings"},
    "consumer.pipeline": STORY | HELPERS,
    "consumer.patience": {*NOUNS, "consumer.ports"},
    "consumer.broker": {*NOUNS, "consumer.ports", "consumer.settings", "consumer.broker"},
    "consumer.s3": {*NOUNS, "consumer.settings", "consumer.traffic"},
    "consumer.objects": {*NOUNS, "consumer.s3"},
    "consumer.storage": {*NOUNS, "consumer.settings", "consumer.objects", "consumer.s3"},
    "consumer.addresses": set(),
    "consumer.inputs": {
        *NOUNS,
        "consumer.addresses",
        "consumer.loras",
        "consumer.objects",
        "consumer.s3",
        "consumer.settings",
    },
    "consumer.attempts": {*NOUNS, "consumer.settings", "consumer.objects", "consumer.s3", "consumer.storage"},
    "consumer.loras": {*NOUNS, "consumer.turns"},
    "consumer.formats": set(),
    "consumer.audio": {*NOUNS, "consumer.decoding", "consumer.formats"},
    "consumer.decoding": {*NOUNS, "consumer.decoding"},
    "consumer.engine": {
        *NOUNS,
        "consumer.room",
        "consumer.ports",
        "consumer.settings",
        "consumer.telemetry",
        "consumer.audio",
        "consumer.formats",
        "consumer.loras",
        "consumer.policy",
        "consumer.engine",
    },
    "consumer.fleet": {"consumer.fleet", "consumer.settings", "consumer.commands.exits", "consumer.hangup"},
    "consumer.client": {
        *NOUNS,
        "consumer.settings",
        "consumer.objects",
        "consumer.s3",
        "consumer.client",
        "consumer.broker.backoff",  # what it shares with the worker's side of the broker: names and faults
        "consumer.broker.faults",
        "consumer.broker.topology",
    },
    "consumer.listen": {
        "schemas",
        "consumer.client",
        "consumer.formats",
        "consumer.listen",
        "consumer.settings",
    },
    "consumer.engine_set": {
        "consumer.engine.messages",
        "consumer.engine.supervisor",
        "consumer.engine.usage",
        "consumer.policy",
        "consumer.ports",
    },
    "consumer.signals": {"consumer.fleet.lifeline", "consumer.hangup"},
    "consumer.observation": {
        "consumer.broker",
        "consumer.disk",
        "consumer.engine_set",
        "consumer.health",
        "consumer.metrics",
        "consumer.patience",
        "consumer.settings",
        "consumer.storage",
        "consumer.tally",
        "consumer.traffic",
    },
    "consumer.announcements": {*NOUNS, "consumer.broker", "consumer.engine_set", "consumer.eta"},
    "consumer.intake": {
        "consumer.announcements",
        "consumer.broker",
        "consumer.concurrency",
        "consumer.engine.usage",
        "consumer.pacer",
        "consumer.settings",
    },
    "consumer.commands": {"schemas", "consumer"},
    "consumer.app": {"schemas", "consumer"},
    "consumer.cli": {"schemas", "consumer"},
    "consumer": set(),
}
MAY_NAME: dict[str, set[str]] = {
    "aio_pika": {"consumer.broker", "consumer.client"},
    "boto3": {"consumer.objects", "consumer.s3"},
    "botocore": {"consumer.objects", "consumer.s3"},
    "opentelemetry": {"consumer.tracing"},
    "prometheus_client": {"consumer.metrics", "consumer.commands.top_report"},
    **dict.fromkeys(TORCH, ENGINE_ROOMS),
    "torch": {*ENGINE_ROOMS, "consumer.fleet.census"},  # asked in a process of its own
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
    story = (ROOT / "consumer/pipeline.py").read_text(encoding="utf-8").split("class Pipeline")[1]
    assert len(story.splitlines()) < 70
