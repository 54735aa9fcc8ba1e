# SPDX-License-Identifier: Apache-2.0
"""The page as people meet it: in headless Chromium, with mouse, keyboard and a small screen."""

import asyncio
import time
from pathlib import Path

import aiohttp
from playwright.async_api import Locator, Page, expect

from tests.support.broker import Peer
from tests.support.browser import tab
from tests.support.listening import IN_HAND, WAITING, Listening, ListenProcess, Visitor, listening

__all__ = ["listening"]

WITHIN_MS = 30_000
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
expect.set_options(timeout=WITHIN_MS)

# How much of the canvas is painted, and in how many colours.
PAINTED = """canvas => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const colours = new Set();
    let painted = 0;
    for (let at = 0; at < data.length; at += 4) {
        if (data[at + 3] < 255) continue;
        painted++;
        colours.add(`${data[at]},${data[at + 1]},${data[at + 2]}`);
    }
    return { share: painted / (data.length / 4), colours: colours.size };
}"""
WIDER_THAN_THE_SCREEN = """() => [...document.querySelectorAll("body *")]
    .filter((element) => element.getBoundingClientRect().right > innerWidth + 0.5)
    .filter((element) => !element.closest(".unseen, .skip"))
    .map((element) => element.tagName + "." + element.className)"""


async def ask(page: Page, prompt: str, **fields: str) -> None:
    """Fill the form and send it."""
    await page.get_by_label("What should it sound like?").fill(prompt)
    await page.get_by_label("Format").select_option("wav")
    for label, value in fields.items():
        await page.get_by_label(label).fill(value)
    await page.get_by_role("button", name="Make it").click()


async def holds(page: Page, expression: str) -> None:
    """Wait until a JavaScript expression is true. Playwright's own wait would need `eval`, which the page forbids."""
    deadline = time.monotonic() + WITHIN_MS / 1000
    while not await page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        await asyncio.sleep(0.02)


def job(page: Page, title: str) -> Locator:
    return page.locator(".job").filter(has=page.get_by_role("heading", name=title, exact=True))


async def test_the_page_is_there_within_a_second_and_live(listening: Listening) -> None:
    async with tab(listening.url) as browser:
        began = time.monotonic()
        await browser.page.reload(wait_until="load")
        await expect(browser.page.locator("#line")).to_have_text("live")
        assert time.monotonic() - began < 1
        assert await browser.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") < 1000


async def test_a_job_that_is_submitted_shows_its_progress_its_song_and_its_words(listening: Listening) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await ask(page, "late jazz bytes=600000 takes=3", Lyrics="[verse]\nla <b>la</b>", Seconds="9000", Seed="7")
        card = job(page, "late jazz bytes=600000 takes=3")
        bar = card.locator("progress")
        await expect(bar).to_be_visible()
        seen = {await bar.evaluate("bar => bar.value")}
        while await card.get_attribute("data-state") == "running":
            seen.add(await bar.evaluate("bar => bar.value"))
        assert len(seen) > 2
        await expect(card.locator(".state")).to_have_text("Done")
        await expect(card.locator(".notes")).to_contain_text("Seconds: asked for 9000")
        await expect(card.locator(".facts")).to_contain_text("WAV · 48 kHz stereo · 600 kB · seed 7")
        await card.get_by_text("The request's words").click()
        await expect(card.locator(".lyrics")).to_have_text("[verse]\nla <b>la</b>")
        await expect(card.locator(".lyrics b")).to_have_count(0)
        await expect(page.locator("#announce")).to_contain_text("done, 1 song")


async def test_a_waveform_is_drawn_a_song_plays_seeks_pauses_and_can_be_saved(
    listening: Listening, tmp_path: Path
) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await ask(page, "bytes=11520000")
        card = job(page, "bytes=11520000")
        await expect(card.locator("canvas[data-drawn]")).to_be_visible()
        before = await card.locator("canvas").evaluate(PAINTED)
        assert before["share"] > 0.2
        await card.get_by_role("button", name="Play").click()
        await holds(page, "document.querySelector('audio').currentTime > 0.5")
        slider = card.get_by_role("slider", name="Position in the song")
        await slider.focus()
        await page.keyboard.press("End")
        for _ in range(4):  # far from the end, also on a slow machine
            await page.keyboard.press("PageDown")
        await holds(page, "document.querySelector('audio').currentTime > 7")
        assert (await card.locator("canvas").evaluate(PAINTED))["colours"] > before["colours"]
        await card.get_by_role("button", name="Pause").click()
        await expect(card.get_by_role("button", name="Play")).to_be_visible()
        assert " of 1:00" in str(await slider.get_attribute("aria-valuetext"))
        async with page.expect_download() as saving:
            await card.get_by_role("link", name="Download").click()
        saved = await saving.value
        assert saved.suggested_filename.endswith("-0.wav")
        await saved.save_as(tmp_path / "song.wav")
        assert (tmp_path / "song.wav").stat().st_size > 1_890_000


async def test_without_a_mouse_a_song_can_be_ordered_heard_and_stopped(listening: Listening, tmp_path: Path) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the jobs")).to_be_focused()
        await page.keyboard.press("Tab")
        await page.keyboard.type(f"until={tmp_path / 'never'}")
        for _ in range(3):
            await page.keyboard.press("Tab")
        await page.keyboard.type("WAV")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Tab")
        await page.keyboard.type("3")
        await page.keyboard.press("Enter")
        card = job(page, f"until={tmp_path / 'never'}")
        await expect(card).to_have_attribute("data-state", "running")
        stop = card.get_by_role("button", name="Stop")
        for _ in range(20):
            await page.keyboard.press("Tab")
            ring = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert ring == "solid", await page.evaluate("document.activeElement.outerHTML")
            if await stop.evaluate("stop => stop === document.activeElement"):
                break
        await page.keyboard.press("Enter")
        await expect(card.locator(".state")).to_have_text("Cancelled")
        await expect(card).to_be_focused()


async def test_a_full_queue_is_a_clear_message_with_a_count_and_the_words_stay(
    listening: Listening, tmp_path: Path
) -> None:
    never = f"until={tmp_path / 'never'}"
    async with aiohttp.ClientSession() as session, tab(listening.url) as browser:
        page, visitor = browser.page, Visitor(listening.url, session)
        running = [await visitor.order(prompt=never) for _ in range(IN_HAND)]
        for task_id in running:
            await visitor.until(task_id, "running")
        waiting = [await visitor.order(prompt=never) for _ in range(WAITING)]
        await expect(page.locator('.job[data-state="waiting"]')).to_have_count(WAITING)
        await ask(page, "one too many")
        answer = page.locator("#answer")
        await expect(answer).to_contain_text("The queue is full")
        await expect(answer).to_contain_text("Try again in ")
        first = await answer.inner_text()
        await expect(answer).not_to_have_text(first)
        await expect(page.get_by_label("What should it sound like?")).to_have_value("one too many")
        await expect(job(page, "one too many")).to_have_count(0)
        for task_id in (*waiting, *running):
            await page.locator(f"#job-{task_id}").get_by_role("button", name="Stop").click()
        await asyncio.gather(*(visitor.until(task_id, "cancelled") for task_id in (*running, *waiting)))
        # The browser itself writes refused requests to the console.
        browser.expected = "503"


async def test_a_wrong_field_is_named_marked_and_focused(listening: Listening) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await page.get_by_role("button", name="Make it").click()
        await expect(page.locator("#answer")).to_have_text("Say what it should sound like.")
        await expect(page.get_by_label("What should it sound like?")).to_be_focused()
        await ask(page, "jazz", Seed="seven")
        await expect(page.locator("#answer")).to_contain_text("seed: ")
        await expect(page.get_by_label("Seed")).to_be_focused()
        await expect(page.get_by_label("Seed")).to_have_attribute("aria-invalid", "true")
        browser.complaints = [each for each in browser.complaints if "422" not in each]


async def test_failed_and_rejected_jobs_say_why(listening: Listening) -> None:
    async with aiohttp.ClientSession() as session, tab(listening.url) as browser:
        visitor = Visitor(listening.url, session)
        await visitor.order(prompt="crash now")
        async with Peer(listening.environment["ACESTEP_AMQP_URL"]) as peer:
            await peer.submit(task_id="not-ours", audio_format="midi")
        wrong = browser.page.locator("#job-not-ours")
        await expect(wrong.locator(".state")).to_have_text("Rejected")
        await expect(wrong.locator(".details")).to_contain_text("audio_format")
        card = job(browser.page, "crash now")
        await expect(card.locator(".state")).to_have_text("Failed")
        await expect(card.locator(".reason")).to_contain_text("engine_crashed")
        await card.get_by_role("button", name="Use these words").click()
        await expect(browser.page.get_by_label("What should it sound like?")).to_have_value("crash now")


async def test_on_a_phone_nothing_is_wider_than_the_screen(listening: Listening) -> None:
    async with tab(listening.url, **PHONE) as browser:
        page = browser.page
        await ask(page, "averylongwordwithoutanyspace" * 8, Seconds="5000", Seed="9223372036854775807")
        card = page.locator(".job").first
        await expect(card).to_have_attribute("data-state", "completed")
        await expect(card.locator("canvas[data-drawn]")).to_have_count(0)
        await card.locator("canvas").scroll_into_view_if_needed()
        await expect(card.locator("canvas[data-drawn]")).to_have_count(1)
        await card.get_by_text("The request's words").tap()
        assert await page.evaluate(WIDER_THAN_THE_SCREEN) == []
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        for button in await card.get_by_role("button").all():
            box = await button.bounding_box()
            assert box is not None
            assert box["height"] >= 40


async def test_dark_and_calm_are_respected(listening: Listening) -> None:
    async with tab(listening.url, color_scheme="dark", reduced_motion="reduce") as browser:
        paper = await browser.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) < 120
        moves = "getComputedStyle(document.querySelector('.main')).transitionProperty"
        assert await browser.page.evaluate(moves) in {"none", "all"}
        assert await browser.page.evaluate("document.getAnimations().length") == 0


async def test_a_page_whose_server_went_away_comes_back_by_itself_and_keeps_its_songs(
    listening: Listening, tmp_path: Path
) -> None:
    with ListenProcess(tmp_path, listening.environment) as first:
        async with tab(first.url) as browser:
            page = browser.page
            await ask(page, "before the end")
            await expect(job(page, "before the end")).to_have_attribute("data-state", "completed")
            await asyncio.to_thread(first.process.end, 10)
            await expect(page.locator("#line")).to_contain_text("trying again")
            port = first.url.rpartition(":")[2]
            with ListenProcess(tmp_path, listening.environment, "--port", port):
                await expect(page.locator("#line")).to_have_text("live")
                await ask(page, "after it")
                await expect(job(page, "after it")).to_have_attribute("data-state", "completed")
                await job(page, "before the end").get_by_role("button", name="Play").click()
                await holds(page, "[...document.querySelectorAll('audio')].some((each) => each.readyState > 1)")
                browser.expected = "ERR_"
