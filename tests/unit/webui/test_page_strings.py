# SPDX-License-Identifier: Apache-2.0
"""The page's strings: one table for each language, complete and used, and no words anywhere else."""

import json
import re
from pathlib import Path

from acestep_consumer.policy.scoring import KNOWN

PAGE = Path(__file__).parents[3] / "consumer/acestep_consumer/webui/page"
# Chosen by a value: keys that begin so are used by their beginning.
BY_VALUE = ("state.", "stage.", "field.", "error.", "kind_of.", "keys.", "measure.", "title.")
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
