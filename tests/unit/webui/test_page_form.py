# SPDX-License-Identifier: Apache-2.0
"""The page's form, in headless Chromium: what it sends, what it refuses, and what it does not offer."""

import json
from typing import Any

import pytest
from playwright.async_api import Page, expect

from acestep_schemas import examples
from acestep_schemas.events import LmChoice, Worker, WorkerEvent
from acestep_schemas.request import GenerationRequest
from tests.support.browser import OpenTab
from tests.support.page import sent, served_page

pytestmark = pytest.mark.asyncio(loop_scope="session")

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
# Labels with a Latin word that is wider than its label, so that it goes on in the next line.
BROKEN = """() => [...document.querySelectorAll("#ask label > span:first-child")].filter((label) => {
    if (!label.checkVisibility()) return false;
    const copy = label.cloneNode(true);
    copy.style.cssText = "position: absolute; width: min-content; overflow-wrap: normal";
    label.after(copy);
    const isBroken = copy.offsetWidth > label.parentElement.clientWidth;
    copy.remove();
    return isBroken;
}).map((label) => label.textContent)"""


def worker(**data: Any) -> WorkerEvent:
    announced: Worker = examples.worker().data.model_copy(update={"state": "ready"} | data)
    return WorkerEvent.of(announced)


async def fill(page: Page, **fields: str) -> None:
    for name, value in fields.items():
        await page.locator(f"#ask [name={name}]").fill(value)


async def test_every_control_is_sent_and_what_is_empty_is_not(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await page.get_by_text("More settings").click()
        given = {
            "prompt": "jazz",
            "lyrics": "la",
            "audio_duration": "90",
            "bpm": "90",
            "key_scale": "F# minor",
            "inference_steps": "20",
            "candidates": "4",
            "keep": "2",
            "model": "turbo",
            "seed": "7, 8",
        }
        await fill(page, **given)
        await page.get_by_label("Vocal language").select_option(label="Japanese")
        await page.get_by_label("Format").select_option("flac")
        await page.get_by_label("Lyrics with times").check()
        await page.get_by_label("Thinking").check()
        published = await sent(page, served)
        more = {"vocal_language": "ja", "audio_format": "flac", "timestamps": True, "thinking": True}
        assert published == given | more
        await page.reload()
        await fill(page, prompt="bare", batch_size="2")
        await page.get_by_text("More settings").click()
        await page.get_by_label("Draft").check()
        assert await sent(page, served) == {
            "prompt": "bare",
            "batch_size": "2",
            "audio_format": "mp3",
            "quality": "draft",
        }


async def test_ctrl_and_enter_send_from_any_field_and_the_field_keeps_the_focus(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await fill(page, prompt="jazz", lyrics="la")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#answer")).to_contain_text("Accepted.")
        await expect(page.locator("#ask [name=lyrics]")).to_be_focused()
        assert served.client.published[0]["prompt"] == "jazz"


async def test_thinking_is_not_offered_while_no_worker_has_a_language_model(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await page.get_by_text("More settings").click()
        thinking = page.get_by_label("Thinking")
        await expect(thinking).to_be_enabled()  # nothing is known yet
        await thinking.check()
        served.board.add_worker(worker(lm=None, models=("turbo", "base")))
        await expect(thinking).to_be_disabled()
        await expect(page.locator("#no-lm")).to_have_text("No worker has a language model loaded.")
        await expect(page.locator("#models option")).to_have_count(2)
        await fill(page, prompt="jazz")
        assert "thinking" not in await sent(page, served)
        served.board.add_worker(worker(lm=LmChoice(model="small", backend="vllm")))
        await expect(thinking).to_be_enabled()
        await expect(page.locator("#no-lm")).to_be_hidden()


async def test_a_cover_needs_its_source_and_no_other_kind_sends_it(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        served.complete("one", served.song("one"), request={"prompt": "the first one"})
        await page.get_by_label("What to make").select_option("cover")
        await fill(page, prompt="as a waltz")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#answer")).to_contain_text("Name the job that the song is from.")
        await expect(page.get_by_label("Job id")).to_be_focused()
        await page.get_by_label("Job id").fill("one")
        await expect(page.locator("#source-title")).to_have_text("the first one")
        await page.get_by_label("Song number").fill("2")
        await page.get_by_label("How close to the source").fill("0.5")
        published = await sent(page, served)
        assert (published["task_type"], published["source_task_id"], published["source_index"]) == ("cover", "one", 1)
        assert published["audio_cover_strength"] == "0.5"
        await page.get_by_label("What to make").select_option("new")
        assert set(await sent(page, served)) == {"prompt", "audio_format"}


async def test_fields_that_requests_do_not_have_are_not_offered(tab: OpenTab) -> None:
    options = json.dumps({"fields": ["prompt", "lyrics", "source_task_id"], "languages": ["en"]})
    answer = f"Promise.resolve(new Response({json.dumps(options)}))"
    asked = f"const ask = fetch; fetch = (url, ...rest) => url === '/options' ? {answer} : ask(url, ...rest);"
    async with served_page() as served:
        served.complete("one", served.song("one"))
        async with tab(served.url, first=asked) as browser:
            page = browser.page
            await page.get_by_text("More settings").click()
            await expect(page.get_by_label("Steps", exact=True)).to_be_visible()
            for label in ("Candidates", "Lyrics with times", "Of them, keep", "Draft"):
                await expect(page.locator("#ask").get_by_label(label)).to_be_hidden()
            await page.locator("#job-one .open").click()
            await expect(page.locator("#job-one .cover")).to_be_visible()
            for name in ("variation", "extend", "stems"):
                await expect(page.locator(f"#job-one .{name}")).to_be_hidden()


async def test_what_the_server_refuses_is_told_at_the_field(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await page.get_by_text("More settings").click()
        await fill(page, prompt="jazz", seed="seven")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#answer")).to_contain_text("seed: ")
        await expect(page.get_by_label("Seed")).to_have_attribute("aria-invalid", "true")
        await expect(page.get_by_label("Seed")).to_be_focused()
        await fill(page, seed="", bpm="9")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.get_by_label("Tempo, bpm")).to_be_focused()
        await expect(page.locator("#answer")).to_contain_text("tempo: ")
        browser.expected = "422"


async def test_an_edit_that_contradicts_itself_is_refused_beside_the_field_and_is_not_sent(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        browser.expected = "422"
        served.complete("one", served.song("one"))
        await page.get_by_label("What to make").select_option("extend")
        await expect(page.get_by_label("Seconds after it")).to_have_value("30")
        await fill(page, source_task_id="one", extend_left_s="5")
        await page.get_by_role("button", name="Make it", exact=True).click()
        after = page.get_by_label("Seconds after it")
        rule = (
            "“seconds before it” is given, too, and a repaint has one part: extend the song on one side, then "
            "the result on the other one"
        )
        await expect(after).to_be_focused()
        await expect(after).to_have_accessible_description(rule)
        await expect(after).to_have_accessible_name("Seconds after it")
        await expect(page.locator("label", has=page.locator("[name=extend_right_s]"))).to_contain_text("is given, too")
        await expect(page.locator("#answer")).to_contain_text(rule)
        await after.fill("")
        await expect(page.locator(".wrong")).to_have_count(0)
        await expect(after).not_to_have_attribute("aria-invalid", "true")
        assert served.client.published == []
        published = await sent(page, served)
        assert (published["extend_left_s"], "extend_right_s" in published) == ("5", False)


async def test_a_field_without_a_control_is_refused_where_it_is_listed(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        browser.expected = "422"
        served.complete("one", served.song("one"))
        request = GenerationRequest(source_task_id="one", replace_lines={"la": "lo"}, lyrics="lo")
        served.board.add_request("mine", request)
        await page.locator("#job-mine .open").click()
        await page.locator("#job-mine .edit").click()
        await page.get_by_label("What to make").select_option("repaint")
        await fill(page, prompt="jazz", lyrics="", repainting_end="9")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.get_by_label("To second").first).to_be_focused()
        await expect(page.get_by_label("To second").first).to_have_accessible_description(
            "“replace lines” sets it: give one of the two"
        )
        await fill(page, source_task_id="one", repainting_end="", lyrics="lo")
        await page.get_by_label("What to make").select_option("extend")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#extra .wrong")).to_contain_text("is given, too")
        assert served.client.published == []


async def test_a_kind_begins_with_what_it_needs(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        served.complete("one", served.song("one"))
        await page.get_by_label("What to make").select_option("variation")
        await fill(page, source_task_id="one")
        assert (await sent(page, served))["variation"] == "0.3"


@pytest.mark.parametrize("locale", ["en-US", "ja-JP"])
@pytest.mark.parametrize("context", [{"viewport": {"width": 1280, "height": 900}}, PHONE], ids=["desk", "phone"])
async def test_an_open_form_covers_nothing_and_breaks_no_word_while_a_song_is_in_the_player(
    tab: OpenTab, context: dict[str, Any], locale: str
) -> None:
    async with served_page() as served:
        served.complete("one", served.song("one"))
        async with tab(served.url, locale=locale, **context) as browser:
            page = browser.page
            await page.locator("#job-one .play").click()
            await page.locator("#more summary").click()
            await expect(page.locator("#models")).to_be_attached()
            overlap = """() => {
                const box = (name) => document.querySelector(name).getBoundingClientRect();
                const [form, jobs] = [box("#ask"), box("#jobs")];
                return form.bottom > jobs.top && form.right > jobs.left;
            }"""
            assert not await page.evaluate(overlap)
            assert await page.evaluate(BROKEN) == []


async def test_every_control_of_every_kind_has_a_label(tab: OpenTab) -> None:
    nameless = (
        "[...document.querySelectorAll('#ask input, #ask select, #ask textarea')].filter((e) => !e.labels.length)"
    )
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await page.get_by_text("More settings").click()
        for kind in ("new", "cover", "repaint", "extend", "variation", "stems"):
            await page.get_by_label("What to make").select_option(kind)
            assert await page.evaluate(f"{nameless}.length") == 0
            rows = await page.locator("#source [data-kind]:visible").evaluate_all(
                "rows => rows.map((r) => r.dataset.kind)"
            )
            assert rows == ([] if kind in {"new", "stems"} else [kind])
            await expect(page.locator("#source")).to_be_visible(visible=kind != "new")
