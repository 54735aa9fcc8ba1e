# SPDX-License-Identifier: Apache-2.0
"""Import rules: which folder may import which, where heavy packages may be imported, and names that are used once."""

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "consumer", ROOT / "schemas"
MODULES = sorted(path for source in SOURCES for path in source.rglob("*.py"))

SCHEMAS, PRODUCT = "acestep_schemas", "acestep_consumer"

# Folder or root module of the product -> which others it may import. `app` and `worker` alone see every adapter.
MAY_IMPORT = {
    SCHEMAS: "",
    "config": "",
    "concurrency": "",
    "domain": "schemas",
    "policy": "domain schemas",
    "audio": "concurrency domain",
    "storage": "config domain schemas",
    "broker": "config domain schemas",
    "inputs": "config domain concurrency schemas",
    "execution": "domain policy concurrency schemas",
    "engine": "audio config domain inputs policy concurrency schemas",
    "observability": "domain engine execution schemas",
    "multi_gpu": "config",
    "worker": "broker config domain engine execution multi_gpu observability storage schemas",
    "client": "broker config domain storage schemas",
    "webui": "audio client config domain policy schemas",
    "gateway": "broker client config domain observability webui schemas",
    "commands": "audio broker client config domain engine execution gateway multi_gpu observability policy "
    "storage webui schemas",
    "pipeline": "domain execution observability schemas",
    "app": "broker config domain engine execution inputs observability pipeline policy storage worker",
    "cli": "app audio commands config schemas",
    "__main__": "cli",
    PRODUCT: "",
}

# What runs in an engine process. The consumer process imports none of these, so it starts in a second.
ENGINE_PROCESS = {
    "audio",
    "engine.renderer",
    "engine.testing",
    "engine.planner.guidance",
    "engine.planner.loading",
    "engine.planner.row_cache",
    "engine.planner.row_table",
    "engine.planner.token_masks",
    "engine.planner.tokens",
    "engine.planner.transformers_backend",
    "engine.planner.vllm_backend",
    "engine.planner.vllm_engine",
    "engine.planner.vllm_guidance",
    "engine.planner.vllm_int8",
    "engine.planner.vllm_worker",
}
TORCH = {"accelerate", "av", "diffusers", "lameenc", "numpy", "pywt", "safetensors"}
TORCH |= {"soundfile", "tokenizers", "torchao", "transformers"}
# Third-party package -> where it may be imported.
MAY_NAME = {
    **dict.fromkeys(TORCH, ENGINE_PROCESS),
    "torch": {*ENGINE_PROCESS, "engine.captured_graph", "multi_gpu.device_count"},  # asked in a process of its own
    "aio_pika": {"broker", "client"},
    "aiormq": {"broker", "client"},
    "pamqp": {"broker", "client"},
    "boto3": {"storage.s3"},
    "botocore": {"storage.s3"},
    "opentelemetry": {"observability.tracing"},
    "prometheus_client": {"observability.metrics", "observability.job_stats", "gateway.metrics", "commands.top.report"},
}


def name_of(path: Path) -> str:
    """The dotted name below the package, e.g. `broker.delivery`; the packages themselves keep theirs."""
    source = next(source for source in SOURCES if path.is_relative_to(source))
    return inner(".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"))


def inner(module: str) -> str:
    """`acestep_consumer.broker.delivery` -> `broker.delivery`; other packages' names as they are."""
    return module.removeprefix(f"{PRODUCT}.")


def folder_of(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


@cache
def statements_of(path: Path) -> tuple[ast.AST, ...]:
    return tuple(statements_in(ast.parse(path.read_text(encoding="utf-8"))))


def statements_in(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all statements below it; no expression, of which there are ten times as many."""
    yield node
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for statement in getattr(node, part, ()):
            yield from statements_in(statement)


@cache
def imports_of(path: Path) -> set[str]:
    found = set()
    for node in statements_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def modules_with(found: Callable[[Path], set[Any]]) -> dict[str, set[Any]]:
    """What was found in each module where it was: one test for all, since a case costs more than what it looks for."""
    return {name_of(path): those for path in MODULES if (those := found(path))}


def test_a_folder_imports_only_what_the_table_allows() -> None:
    def forbidden(path: Path) -> set[str]:
        folder = folder_of(name_of(path))
        ours = {folder_of(inner(name)) for name in imports_of(path) if inside(name, {PRODUCT, SCHEMAS})}
        return ours - {word.replace("schemas", SCHEMAS) for word in MAY_IMPORT[folder].split()} - {folder}

    assert modules_with(forbidden) == {}


def test_nothing_is_asserted_in_the_product() -> None:
    """An assert vanishes under ``python -O``, and says nothing to a user: raise an error instead."""
    lines = modules_with(lambda path: {node.lineno for node in statements_of(path) if isinstance(node, ast.Assert)})
    assert lines == {}


def test_the_table_has_no_row_and_no_permission_that_nobody_uses() -> None:
    used = defaultdict(set)
    for path in MODULES:
        for name in imports_of(path):
            if inside(name, {PRODUCT, SCHEMAS}):
                used[folder_of(name_of(path))].add(folder_of(inner(name)).replace(SCHEMAS, "schemas"))
    assert {folder_of(name_of(path)) for path in MODULES} == set(MAY_IMPORT)
    assert {
        room: set(row.split()) - used[room] for room, row in MAY_IMPORT.items() if set(row.split()) - used[room]
    } == {}


def test_a_heavy_or_foreign_package_is_imported_in_its_own_folder_only() -> None:
    def strangers(path: Path) -> set[str]:
        return {
            package
            for package, rooms in MAY_NAME.items()
            if any(inside(name, {package}) for name in imports_of(path)) and not inside(name_of(path), rooms)
        }

    assert modules_with(strangers) == {}


def test_an_adapter_of_the_object_storage_is_named_only_where_it_is_chosen() -> None:
    """All others see `domain.ports.Objects`, so that another storage is one folder more."""
    chosen = {name_of(path) for path in MODULES if any("storage.s3" in name for name in imports_of(path))}
    assert chosen == {"storage.adapter", "commands.doctor.storage", "storage.s3.objects"}


@pytest.mark.parametrize("call", ["ClientSession(", "create_default_context("])
def test_http_sessions_and_certificate_authorities_are_made_in_one_place(call: str) -> None:
    """So that timeouts, headers and trust are the same for every caller."""
    assert {name_of(path) for path in MODULES if call in path.read_text(encoding="utf-8")} == {"config.http"}


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path in MODULES:
        if not path.is_relative_to(ROOT / "consumer"):
            continue
        for node in statements_of(path):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{name_of(path)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_function_is_longer_than_sixty_lines() -> None:
    def long(path: Path) -> set[str]:
        functions = (node for node in statements_of(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        return {function.name for function in functions if body_lines(function) > 60}

    assert modules_with(long) == {}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def test_the_story_fits_on_a_screen_and_has_a_stage_a_line() -> None:
    story = (ROOT / "consumer/acestep_consumer/pipeline.py").read_text(encoding="utf-8").split("class Pipeline")[1]
    assert len(story.splitlines()) < 70
    marks = ("inputs.fetch(", "planner.plan(", "_rendered(ports", "store.put(", "store.commit(", "events.publish(")
    lines = story.splitlines()
    for mark in (*marks, "delivery.settle("):
        assert sum(mark in line for line in lines) == 1, mark
    within = [next(place for place, line in enumerate(lines) if mark in line) for mark in marks[:4]]
    assert within == sorted(within)


@pytest.mark.parametrize(
    ("name", "users"),
    [
        ("cancel_scope.unless_cancelled", set()),
        ("cancel_scope.deadline", set()),
        ("cancel_scope.check_queue_deadline", set()),
        ("stage_limits.JobPlaces", set()),
        ("progress.ProgressReporter", {"execution.context"}),  # which holds it
        ("retries.RetryPolicy", {"app"}),  # which makes it
    ],
)
def test_what_wraps_a_job_is_applied_by_its_runner_alone(name: str, users: set[str]) -> None:
    full = f"{PRODUCT}.execution.{name}"
    assert {name_of(path) for path in MODULES if full in imports_of(path)} == {"execution.runner"} | users


def test_no_job_passes_through_the_composition_root() -> None:
    """It gives its parts methods of each other and values, which a reload replaces, and no function of its own."""
    source = (ROOT / "consumer/acestep_consumer/app.py").read_text(encoding="utf-8")
    functions = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Lambda)}
    assert functions == {"lambda: settings", "lambda: self._stages.wanted"}  # for a reload, and for the prefetch


def test_codes_are_written_as_text_in_one_place() -> None:
    assert {name_of(path) for path in MODULES if "<|audio_code_{" in path.read_text(encoding="utf-8")} == {
        "domain.audio_codes"
    }


def test_what_differs_between_task_types_is_read_from_their_rows() -> None:
    """So that a new one is a name in the schema and a row. Edits alone ask for a task by its name."""
    compared = re.compile(r"\b(?:task_type|task|task\.name) (?:[!=]=|(?:not )?in) \(?\"")
    found = modules_with(lambda path: set(compared.findall(path.read_text("utf-8"))))
    assert set(found) == {"domain.edits", "domain.job", f"{SCHEMAS}.request"}


def test_what_is_logged_is_a_sentence() -> None:
    """Not a name of the code, and not a noun: ``bucket created``, not ``storage.bucket_created``."""
    logged = re.compile(r"\blog\.\w+\(\s*\"([^\"]+)\"")
    in_code = re.compile(r"\w+[._]\w+|(?!(?:ready|\w+ed|\w+ing)$)\w+")
    assert modules_with(lambda path: set(filter(in_code.fullmatch, logged.findall(path.read_text("utf-8"))))) == {}


def test_a_docstring_begins_with_the_term() -> None:
    """The term of the field, not ``What a worker says of itself``."""
    riddle = re.compile(r"(What|How|Where|Who|Why|When|Whatever|It|This|That|There)\b")
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

    def riddles(path: Path) -> set[str]:
        texts = (ast.get_docstring(node) or "" for node in statements_of(path) if isinstance(node, kinds))
        return {text.splitlines()[0] for text in texts if riddle.match(text)}

    assert modules_with(riddles) == {}


def test_tests_of_one_unit_lie_as_the_sources_do() -> None:
    """``tests/unit/<folder>/test_<file>.py``, but for those of several files."""
    tests, product = ROOT / "tests/unit", ROOT / "consumer" / PRODUCT
    files = {path.relative_to(product) for path in MODULES if PRODUCT in path.parts}
    tested = {path.relative_to(tests).with_name(path.name.removeprefix("test_")) for path in tests.rglob("test_*.py")}
    of_ours = {path for path in tested if path.parts[0] not in {"schemas", "infra", "soak"}}
    assert {path.parent for path in of_ours} <= {path.parent for path in files}
    others = {path.as_posix() for path in of_ours - files if not path.name.startswith("page_")}
    assert others == {
        *("architecture.py", "dependencies.py", "main.py", "client/imports.py", "commands/imports.py"),
        *("broker/connecting.py", "engine/renderer/main.py", "gateway/client_sequences.py", "worker/stages.py"),
    }
