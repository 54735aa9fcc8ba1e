# SPDX-License-Identifier: Apache-2.0
"""The page's strings: one table for each language, complete and used, and no words anywhere else."""

import json
import re
from pathlib import Path

import pytest

from acestep_consumer.domain.edits import check
from acestep_consumer.domain.errors import ConsumerError, InvalidRequest
from acestep_consumer.domain.outcome import AUDIO_DELETED, OTHER_BODY
from acestep_consumer.policy.scoring import KNOWN
from acestep_schemas.aliases import NO_COUNTERPART
from acestep_schemas.events import ErrorCode
from acestep_schemas.request import RequestInvalid, parse_request
from tests.support.adjustments import causes_of_edits, fields_and_reasons
from tests.support.admission import admitted_job
from tests.support.event_warnings import HOLE, warnings_of_events

PAGE = Path(__file__).parents[3] / "consumer/acestep_consumer/webui/page"
# Chosen by a value: keys that begin so are used by their beginning.
BY_VALUE = ("state.", "stage.", "field.", "error.", "kind_of.", "keys.", "measure.", "title.", "code.", "said.")
# Written alike in both languages.
ALIKE = {"form.lyrics_example"}


def table(language: str) -> dict[str, str]:
    text = (PAGE / f"strings.{language}.js").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text[text.index("{") :].rstrip().removesuffix(";"))
    return found


EN, JA = table("en"), table("ja")
SCRIPTS = {file.name: file.read_text(encoding="utf-8") for file in PAGE.glob("*.js") if "strings." not in file.name}
HTML = (PAGE / "index.html").read_text(encoding="utf-8")


def test_both_tables_have_the_same_strings_in_the_same_order_with_the_same_values_in_them() -> None:
    assert list(EN) == list(JA)
    holes = re.compile(r"\{\w+\}")
    assert [key for key in EN if sorted(holes.findall(EN[key])) != sorted(holes.findall(JA[key]))] == []
    assert [key for key, text in (*EN.items(), *JA.items()) if not text.strip()] == []


def test_each_measure_of_a_score_has_a_name() -> None:
    assert {key.removeprefix("measure.") for key in EN if key.startswith("measure.")} == KNOWN


def test_each_error_code_has_a_name_unless_the_state_says_it() -> None:
    named = {key.removeprefix("code.") for key in EN if key.startswith("code.")}
    assert named == set(ErrorCode) - {ErrorCode.CANCELLED, ErrorCode.EXPIRED}


def is_said(text: str) -> bool:
    """Whether the page has a sentence of a worker, so that it can say it in another language."""
    templates = (re.split(r"\{\w+\}", english) for key, english in EN.items() if key.startswith("said."))
    return any(re.fullmatch("(.*)".join(map(re.escape, parts)), text, re.DOTALL) for parts in templates)


WRONG: tuple[dict[str, object], ...] = (
    {"bpm": "fast"}, {"bpm": 92.5}, {"shift": 0}, {"inference_steps": 0}, {"loudness_lufs": 5},
    {"fade_in_duration": -1}, {"guidance_scale": "nan"}, {"prompt": {}}, {"prompt": "x" * 100_000},
    {"audio_format": "m4a"}, {"task_type": "dance"}, {"key_scale": "D dorian"}, {"time_signature": "5/4"},
    {"src_audio_path": "/etc/passwd"}, {"duration": "long"},
    {"audio_code_string": "la la"}, {"track_classes": ["drums"] * 1_000}, {"lora": {"scale": 1}},
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: next(iter(wrong)))
def test_the_page_has_the_rules_that_requests_break(wrong: dict[str, object]) -> None:
    with pytest.raises(RequestInvalid) as broken:
        parse_request({"prompt": "jazz", **wrong}, strict=True)
    assert [problem.rule for problem in broken.value.problems if not is_said(problem.rule)] == []


@pytest.mark.parametrize(
    "asked",
    [
        {"variation": 0.5},
        {"extend_right_s": 5},
        {"source_task_id": "first", "variation": 0.5, "stems": True},
        {"source_task_id": "first", "extend_right_s": 5, "repainting_start": 3},
        {"source_task_id": "first", "extend_right_s": 5, "task_type": "cover"},
    ],
)
def test_the_page_has_the_rules_that_edits_break(asked: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as broken:
        check(parse_request(asked)[0])
    assert [problem.rule for problem in broken.value.problems if not is_said(problem.rule)] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"audio_duration": 9_999, "on_limit": "reject"},
        {"task_type": "cover"},
        {"task_type": "repaint"},
        {"model": "another", "on_model_unavailable": "fail"},
        {"thinking": True},
    ],
)
def test_the_page_has_what_admission_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(ConsumerError) as refused:
        admitted_job(**fields)
    details = [str(each.get("rule") or each.get("reason")) for each in refused.value.details]
    assert [text for text in details or [str(refused.value)] if not is_said(text)] == []


# Sentences of their own within a sentence.
WITHIN = ("why", "rule", "used", "source", "song")
SAID = {key: re.sub(r"\\{(\w+)\\}", r"(?P<\1>.*?)", re.escape(EN[key])) for key in EN if key.startswith("said.")}


def unsaid(text: str) -> list[str]:
    """Return the parts of a worker's sentence that the page does not have; the first template that fits is its own."""
    found = next(filter(None, (re.fullmatch(pattern, text, re.DOTALL) for pattern in SAID.values())), None)
    if found is None:
        return [text]
    within = [each for name, each in found.groupdict().items() if name in WITHIN and HOLE not in each]
    return [part for each in within for part in unsaid(each)]


def test_the_page_has_the_warnings_of_events() -> None:
    # Some end with a hint, or with nothing.
    told = [re.sub(f"(ignored|false){HOLE}$", r"\1", warning) for warning in warnings_of_events()]
    told += [AUDIO_DELETED, OTHER_BODY]
    assert len(told) > 50
    assert [part for warning in told for part in unsaid(warning)] == []
    assert [reason for reason in NO_COUNTERPART.values() if unsaid(reason)] == []


def test_the_page_has_the_reasons_and_fields_of_adjustments() -> None:
    fields, reasons = (sorted(set(each)) for each in zip(*fields_and_reasons(), strict=True))
    assert len(reasons) >= 12
    assert [part for reason in reasons for part in unsaid(reason)] == []
    assert [field for field in fields if field != HOLE and f"field.{field}" not in EN] == []


def test_the_page_has_why_a_value_follows_from_an_edit() -> None:
    causes = {*causes_of_edits(), "song 0 of first", "'la la', 'oh': sung from 1.00 to 2.50 s"}
    assert len(causes) >= 20
    # Fields as they were sent are alike in every language.
    texts = sorted(text for text in causes if not re.fullmatch(rf"\w+( = {HOLE})?", text))
    assert [part for text in texts for part in unsaid(text)] == []
    assert "said(edit.because)" in SCRIPTS["job.js"]


ODD: tuple[dict[str, object], ...] = (
    {"body": {"prompt": "jazz"}}, {"promt": "jazz"}, {"mood": "calm"}, {"save_dir": "songs"},
    {"instrumental": True, "lyrics": "la la"}, {"use_random_seed": True, "seed": 5},
    {"use_random_seed": False}, {"thinking": "maybe"}, {"lm_backend": "mlx"}, {"caption": "a", "prompt": "b"},
    {"metas": {"bpm": 90}, "keyscale": "C major", "key_scale": "D minor"},
    *(wrong for wrong in WRONG[:-3] if not {"task_type", "src_audio_path"} & set(wrong)),
)  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: next(iter(odd)))
def test_the_page_has_the_warnings_of_requests(odd: dict[str, object]) -> None:
    _, warnings = parse_request({"prompt": "jazz", **odd}, strict=False)
    assert warnings
    assert [part for warning in warnings for part in unsaid(warning)] == []


def test_japanese_strings_are_japanese() -> None:
    japanese = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
    same = {key for key in EN if not japanese.search(JA[key])}
    symbols = {key for key in same if re.fullmatch(r"[^A-Za-z]*", re.sub(r"\{\w+\}", "", JA[key]))}
    assert same - symbols == ALIKE


def test_every_string_is_used_and_every_one_that_is_used_exists() -> None:
    used = set(re.findall(r'data-t(?:-label|-placeholder)?="([^"]+)"', HTML))
    for text in SCRIPTS.values():
        used |= set(re.findall(r"""\bt\(\s*"([^"]+)\"""", text)) | set(
            re.findall(r'"((?:keys|line|form|answer)\.\w+)"', text)
        )
        used |= {f"{key}.{form}" for key in re.findall(r'\btn\(\s*"([^"]+)"', text) for form in ("one", "other")}
        used |= {f"action.{name}" for name in re.findall(r'"(variation|extend|cover|stems|finish)"', text)}
    assert sorted(used - set(EN)) == []
    assert sorted(key for key in EN if key not in used and not key.startswith(BY_VALUE)) == []


def test_no_words_stand_in_the_document_or_the_scripts_themselves() -> None:
    body = re.sub(r"<(title|noscript|script)\b.*?</\1>|<!--.*?-->", "", HTML, flags=re.DOTALL)
    words = re.findall(r">\s*([^<>]*[A-Za-z]{2}[^<>]*?)\s*<", body)
    assert set(words) == {"English", "MP3", "FLAC", "WAV", "Opus", "AAC"}
    for attribute in ("placeholder", "aria-label", "title"):
        own = re.findall(rf'\s{attribute}="([^"]*[A-Za-z]{{2}}[^"]*)"', body)
        assert own in ([], ["F# minor"]), attribute
    sentences = re.compile(r"""["'`]([A-Z][a-z]+ [a-z]+[^"'`\n]*)["'`]""")
    found = {name: sentences.findall(re.sub(r"//.*|/\*.*?\*/", "", text)) for name, text in SCRIPTS.items()}
    assert {name: texts for name, texts in found.items() if texts} == {}
