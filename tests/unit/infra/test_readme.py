# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does: tables, links, events, codes and names in it are current."""

import ast
import json
import re
import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import pytest

import acestep_consumer
from acestep_consumer.config.settings import known_variables
from acestep_consumer.config.upstream_settings import RENAMED
from acestep_consumer.domain import edits
from acestep_consumer.domain.errors import ConsumerError
from acestep_schemas import examples as examples_of_messages
from acestep_schemas.aliases import ALIASES
from acestep_schemas.events import Audio, ErrorCode, JobCompleted, JobRejected, parse_event, unfinished_event
from acestep_schemas.request import GenerationRequest, parse_request
from infra import tables
from tests.support.metrics_page import families_of_a_gateway, families_of_a_worker, sample_names
from tests.support.readme import DOCS, PAGES, README, ROOT, events, examples, text_of

LONGEST_README = 220
LARGEST_PICTURE = 200_000
# Also written as files of one's own in examples, or below a folder that the text names.
EVENTS = events()
# What a request asks for; no event has these at its top.
REQUESTED = {"prompt", "source_task_id", "src_audio_path"}
PACKAGE = Path(acestep_consumer.__file__).parent
MAPPED = [PACKAGE / name for name in ("broker", "engine", "gateway", "engine/planner", "engine/renderer")]
MAPPED += [PACKAGE / "engine/renderer" / name for name in ("checkpoints", "decoder", "denoising", "lyrics")]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", tables.PAGES, ids=page_name)
def test_the_tables_are_those_of_the_code(page: Path) -> None:
    """When this fails: ``bash infra/dev fix``."""
    assert tables.with_tables(page) == text_of(page)


def test_the_readme_can_be_read_in_ten_minutes() -> None:
    assert len(text_of(README).splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:consumer|schemas|tests|infra)/[\w/.]+)`", text_of(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert [link for link in links_of(page) if not leads_somewhere(page, link)] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            targets = (target_of(page, link)[0] for link in links_of(page))
            waiting += [target for target in targets if target.suffix == ".md"]
    assert set(PAGES) - reached == set()


def test_the_japanese_page_stands_below_the_readmes_title() -> None:
    assert "(infra/docs/operations.ja.md)" in "".join(text_of(README).splitlines()[:4])


def test_the_pictures_are_small() -> None:
    pictures = [*DOCS.glob("*.png")]
    assert pictures
    assert [picture.name for picture in pictures if picture.stat().st_size > LARGEST_PICTURE] == []


def test_the_readme_shows_a_completed_and_a_rejected_event() -> None:
    assert set(EVENTS) == {"completed", "rejected"}


@pytest.mark.parametrize("state", EVENTS)
@pytest.mark.parametrize("document", ["job.{}.schema.json", "event.schema.json"])
def test_an_event_of_the_readme_is_valid(state: str, document: str) -> None:
    schema = json.loads((ROOT / "schemas" / document.format(state)).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(EVENTS[state])


def test_the_events_of_the_readme_have_the_ids_that_a_worker_gives_them() -> None:
    completed, rejected = (parse_event(json.dumps(EVENTS[state]).encode()) for state in ("completed", "rejected"))
    assert isinstance(completed, JobCompleted)
    assert isinstance(rejected, JobRejected)
    assert completed.id == JobCompleted.of(completed.data).id
    assert rejected.id == unfinished_event(rejected.data).id


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_json_block_is_json(page: Path) -> None:
    json_blocks(page)


def test_every_request_and_every_part_of_a_song_in_the_documentation_is_one() -> None:
    blocks = [block for page in PAGES for block in json_blocks(page) if isinstance(block, dict)]
    requests = [block for block in blocks if block.keys() & REQUESTED]
    assert len(requests) >= 10
    for block in requests:
        request, warnings = parse_request(block, strict=True)
        edits.check(request)
        assert warnings == ()
    songs = [block for block in blocks if block.keys() <= Audio.model_fields.keys()]
    assert {"lyrics", "loudness"} <= {name for block in songs for name in block}
    for block in songs:
        Audio.model_validate({**examples_of_messages.completed().data.audios[0].model_dump(), **block})


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_setting_that_a_page_names_is_one(page: Path) -> None:
    named = set(re.findall(r"\b(?:ACESTEP|MAX)_[A-Z0-9_]+", text_of(page)))
    assert named - known_variables() - RENAMED.keys() == set()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
async def test_every_metric_that_a_page_names_exists(page: Path) -> None:
    families = families_of_a_worker() | families_of_a_gateway()
    named = set(re.findall(r"`(acestep_(?!consumer|schemas)\w+)`", text_of(page)))
    assert named - sample_names(families) - set(families) == set()


async def test_every_label_of_the_metrics_table_is_that_of_a_metric() -> None:
    families = families_of_a_worker()
    assert set(tables.LABELS) <= set(families)
    for name, family in families.items():
        for sample in family.samples:
            documented = {label for label in tables.LABELS.get(name, "").split(", ") if label}
            assert set(sample.labels) - {"le"} == documented


def test_every_error_code_is_explained_with_its_state() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+)(, retryable)? \| \w", text_of(DOCS / "producers.md"), re.MULTILINE)
    explained = {code: (state, bool(retryable)) for code, state, retryable in rows if code in set(ErrorCode)}
    assert explained == ends_of_codes()


def test_every_field_of_the_request_that_is_explained_is_one() -> None:
    section = text_of(DOCS / "producers.md").split("## Request fields")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| ", section, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 7
    assert named <= set(GenerationRequest.model_fields) | {alias for names in ALIASES.values() for alias in names}


def test_every_document_of_the_schemas_is_explained() -> None:
    documents = {path.name for path in (ROOT / "schemas").glob("*.json")}
    assert documents == set(re.findall(r"`([\w.]+\.json)`", text_of(ROOT / "schemas/README.md"))) - {"manifest.json"}


def test_the_map_of_the_package_names_every_folder_and_file_of_its_root_in_one_order() -> None:
    documentation = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    mapped = re.findall(r"^    (\S+)  +(\S.*)$", documentation, re.MULTILINE)
    section = text_of(DOCS / "internals.md").split("## Reading the code")[1].split("\n## ")[0]
    explained = re.findall(r"^\| `(\S+)` \| (.*) \|$", section, re.MULTILINE)
    assert [name for name, _ in mapped] == [name for name, _ in explained]
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name, _ in mapped} | {"cli.py"} == folders | files
    assert "``cli.py``" in documentation


@pytest.mark.parametrize("folder", MAPPED, ids=lambda folder: folder.relative_to(PACKAGE).as_posix())
def test_the_map_of_a_large_folder_names_all_that_is_in_it(folder: Path) -> None:
    documentation = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert files | folders <= set(re.findall(r"``(\w+)``", documentation))


def test_every_example_has_its_name_once() -> None:
    names = re.findall(r"<!-- example: ([\w.]+) -->", "".join(map(text_of, PAGES)))
    assert len(names) == len(set(names)) == len(examples())


def json_blocks(page: Path) -> list[Any]:
    """What the JSON blocks of a page hold."""
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text_of(page), re.DOTALL)]


def links_of(page: Path) -> list[str]:
    """The relative links of a page, code left out."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [link for link in found if not link.startswith(("http://", "https://"))]


def target_of(page: Path, link: str) -> tuple[Path, str]:
    """The file that a link leads to, and the heading in it."""
    path, _, heading = link.partition("#")
    return (page.parent / path).resolve() if path else page, unquote(heading)


def leads_somewhere(page: Path, link: str) -> bool:
    target, heading = target_of(page, link)
    return target.exists() and (not heading or heading in headings_of(target))


def headings_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}


def anchor(heading: str) -> str:
    """Letters, digits, hyphens and underscores stay, blanks become hyphens, all else goes."""
    kept = (each for each in heading.strip().lower() if each in " -_" or unicodedata.category(each)[0] in "LMN")
    return "".join(kept).replace(" ", "-")


def ends_of_codes() -> dict[str, tuple[Any, bool]]:
    """State and retryability of every error code, as the errors say."""
    ends: dict[str, tuple[Any, bool]] = {}
    kinds: list[type[ConsumerError]] = [ConsumerError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind.status is not None and "code" in vars(kind):
            ends[kind.code.value] = (kind.status, kind.retryable)
    return ends
