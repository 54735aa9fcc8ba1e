# SPDX-License-Identifier: Apache-2.0
"""The page in the reader's language, in headless Chromium."""

import re
from itertools import pairwise
from typing import Any

import pytest
from playwright.async_api import expect

from acestep_consumer.webui.job_board import QueueState
from acestep_schemas import examples
from acestep_schemas.events import ErrorCode, WorkerEvent
from acestep_schemas.request import GenerationRequest
from tests.support.browser import OpenTab
from tests.support.listening import ended
from tests.support.page import ServedPage, row, served_page

pytestmark = pytest.mark.asyncio(loop_scope="session")

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
# Text and labels that are seen, of the page itself: what people and workers wrote has a direction of its own, dir=auto.
SEEN = """() => {
    const found = [];
    const own = "[dir=auto], select, option, dd, kbd, .id, .facts, time, .length, #time, #versions, td, .reason";
    for (const element of document.querySelectorAll("body *")) {
        if (!element.checkVisibility() || element.closest("svg, script, style, noscript, " + own)) continue;
        const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
        found.push(...texts.map((node) => node.data.trim()));
        const label = element.getAttribute("aria-label");
        if (label) found.push(label);
    }
    return found;
}"""


def fill(served: ServedPage) -> None:
    """Show a job of every state, with all that a row can have."""
    candidates = [{"seed": 7, "score": 0.9, "kept": True, "index": 0, "measures": {"lyrics": 0.9}}]
    request = {"prompt": "夜のドライブ", "lyrics": "雨が降る", "bpm": 90, "vocal_language": "ja"}
    policy = examples.completed().data.policy
    parents = [{"task_id": "two", "index": 0, "field": "source_task_id"}]
    songs = [served.song("two", each, seconds=60) for each in range(2)]
    served.complete("two", *songs, request=request, candidates=candidates, policy=policy)
    served.complete("child", served.song("child"), request={"prompt": "雨"}, parents=parents)
    served.start("runs", prompt="走る")
    served.board.add_event(ended("failed", "failed"))
    served.board.add_request("waits", GenerationRequest(prompt="待つ"))
    served.board.mark_sent("waits", 2)
    served.board.set_queue_state(QueueState(broker=True, waiting=4, workers=1))
    served.board.add_worker(WorkerEvent.of(examples.worker().data.model_copy(update={"lm": None})))


@pytest.mark.parametrize("context", [{"viewport": {"width": 1280, "height": 900}}, PHONE], ids=["desk", "phone"])
async def test_in_japanese_everything_that_the_page_says_is_japanese(tab: OpenTab, context: dict[str, Any]) -> None:
    async with served_page() as served:
        fill(served)
        async with tab(served.url, locale="ja-JP", **context) as browser:
            page = browser.page
            assert await page.evaluate("document.documentElement.lang") == "ja"
            await expect(page.locator("#queue")).to_have_text("ワーカー 1、実行中 1、待機中 4")
            await expect(row(page, "waits").locator(".doing")).to_contain_text("キューの 2 番目")
            await row(page, "two").locator(".open").click()
            await row(page, "two").locator(".play").click()
            await page.locator("#show-lyrics").click()
            for summary in await page.locator("summary:visible").all():
                await summary.evaluate("summary => summary.click()")
            await page.locator("[name=kind]").select_option("repaint")
            said = await page.evaluate(SEEN)
            english = [text for text in said if re.search(r"[A-Za-z]{3}", plain(text))]
            assert english == []
            assert await page.evaluate("document.documentElement.scrollWidth") <= context["viewport"]["width"]


async def test_why_a_request_was_rejected_is_said_in_japanese_and_in_english_where_there_is_no_other_text(
    tab: OpenTab,
) -> None:
    problems = (
        {"field": "bpm", "value": "5", "rule": "must be at least 30 (written as tempo)"},
        {"field": "quality", "value": "best", "rule": "must be 'draft' or 'final'"},
    )
    own = {"field": "lyrics", "value": "la", "rule": "must be sung by a choir"}
    limit = {"field": "batch_size", "requested": 8, "applied": 1, "reason": "this worker allows 1 to 1 songs a request"}
    over = {"code": ErrorCode.LIMIT_EXCEEDED, "message": "batch_size = 8: …", "details": (limit,)}
    async with served_page() as served:
        served.board.add_event(ended("rejected", "fields", message="bpm = 5: …", details=problems))
        served.board.add_event(ended("rejected", "own", message="lyrics = la: …", details=(own,)))
        served.board.add_event(ended("rejected", "over", **over))
        async with tab(served.url, locale="ja-JP") as browser:
            reasons = {job: row(browser.page, job).locator(".reason") for job in ("fields", "own", "over")}
            for job, texts in {
                "fields": ["リクエストに誤りがあります", "テンポ = 5", "30 以上にしてください", "tempo として指定",
                           "品質 = best", "'draft' or 'final' のどれかにしてください。 (invalid_request)"],
                "own": ["リクエストに誤りがあります", "歌詞 = la", "must be sung by a choir。"],
                "over": ["上限を超えています", "曲数 = 8", "このワーカーで 1 回に作れるのは"],
            }.items():  # fmt: skip
                for text in texts:
                    await expect(reasons[job]).to_contain_text(text)


async def test_warnings_that_workers_write_are_said_in_japanese(tab: OpenTab) -> None:
    key = "'key_scale' = 'D': must be a key: A to G, then # or b if any, then major or minor; the default is used"
    warnings = ("thinking has no effect: audio_code_string was given", key, "the choir sang flat")
    async with served_page() as served:
        served.complete("one", served.song("one"), warnings=warnings)
        async with tab(served.url, locale="ja-JP") as browser:
            await row(browser.page, "one").locator(".open").click()
            notes = row(browser.page, "one").locator(".notes li")
            await expect(notes).to_have_count(3)
            thinking, replaced, other = await notes.all()
            for note, texts in {
                thinking: ("効果がありません", "audio_code_string が指定されています"),
                replaced: ("'key_scale' = 'D'", "キーにしてください", "既定値を使います"),
                other: ("The choir sang flat",),
            }.items():
                for text in texts:
                    await expect(note).to_contain_text(text)


async def test_why_workers_changed_or_chose_values_is_said_in_japanese(tab: OpenTab) -> None:
    policy = examples.completed().data.policy
    edits = [
        {"field": "bpm", "value": 90, "because": "of song 0 of first"},
        {"field": "repainting_start", "value": -5, "because": "extend_left_s = 5, and 1 s of the song to go on from"},
        {"field": "retake_variance", "value": 0.5, "because": "variation = 0.5"},
    ]
    async with served_page() as served:
        served.complete("one", served.song("one"), policy=policy, edits=edits)
        async with tab(served.url, locale="ja-JP") as browser:
            await row(browser.page, "one").locator(".open").click()
            more = row(browser.page, "one")
            await expect(more.locator(".notes li")).to_contain_text(["秒の曲です"])
            await expect(more.locator(".edits li")).to_contain_text(
                ["ジョブ first の曲番号 0 から引き継ぎ", "曲の 1 秒からつなげます", "variation = 0.5"]
            )


def plain(text: str) -> str:
    """Return a text without what is no English: names of jobs and formats, fields without a name, codes."""
    return re.sub(r"Job \w+|BPM|JSON|curl|WAV|LoRA|LUFS|https|Thinking", "", text)


async def test_the_language_is_switched_in_place_and_remembered(tab: OpenTab) -> None:
    async with served_page() as served:
        fill(served)
        async with tab(served.url) as browser:
            page = browser.page
            await row(page, "two").locator(".play").click()
            await page.get_by_label("Language", exact=True).select_option("ja")
            await expect(page.locator("#ask-title")).to_have_text("曲をリクエスト")
            await expect(row(page, "runs").locator(".state")).to_have_text("実行中")
            await expect(row(page, "failed").locator(".reason")).to_contain_text(
                "もう一度送ると成功することがあります。"
            )
            await expect(page.locator("#now")).to_have_text("夜のドライブ · 2 曲中 1 曲目")
            assert await page.title() == "曲 · acestep-consumer"
            await page.reload()
            await expect(page.locator("#ask-title")).to_have_text("曲をリクエスト")
            await page.get_by_label("言語", exact=True).select_option("en")
            await expect(page.locator("#ask-title")).to_have_text("Ask for a song")
            await expect(row(page, "runs").locator(".state")).to_have_text("Running")
            names = await page.locator("[name=vocal_language] option").all_text_contents()
            assert names[0] == "the default"
            assert all(one.casefold() <= other.casefold() for one, other in pairwise(names[1:]))
