# SPDX-License-Identifier: Apache-2.0
"""The page's player bar, in headless Chromium: it stays, plays on, loops, and switches between songs of a job."""

from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.support.browser import OpenTab, holds
from tests.support.page import ServedPage, row, served_page

pytestmark = pytest.mark.asyncio(loop_scope="session")

PLAYS = "!document.querySelector('#audio').paused"
# A sixteenth of its speed, for this song and the next: a busy machine has time to look where it is.
SLOWLY = """{
    const audio = document.querySelector("#audio");
    audio.playbackRate = audio.defaultPlaybackRate = 1 / 16;
}"""
SOURCE = "new URL(document.querySelector('#audio').src).pathname"


async def time(page: Page) -> float:
    return float(await page.evaluate("document.querySelector('#audio').currentTime"))


def batch(served: ServedPage) -> None:
    """One job of three songs, two of them with scores, between two jobs of one song."""
    served.complete("first", served.song("first", seconds=2))
    scores: list[dict[str, Any]] = [
        {"seed": 7 + each, "score": 0.9 - each / 5, "kept": True, "index": each, "measures": {}} for each in (0, 1)
    ]
    songs = [served.song("batch", each, seconds=30) for each in range(3)]
    served.complete("batch", *songs, candidates=scores)
    served.complete("last", served.song("last", seconds=2))


async def test_a_song_plays_in_the_bar_whose_keys_and_slider_seek(tab: OpenTab) -> None:
    async with served_page() as served:
        batch(served)
        async with tab(served.url) as browser:
            page = browser.page
            await expect(page.locator("#bar")).to_be_hidden()
            await row(page, "batch").get_by_role("button", name="Play batch", exact=True).click()
            await expect(page.locator("#now")).to_have_text("batch · song 1 of 3")
            await holds(page, f"{PLAYS} && document.querySelector('#audio').currentTime > 0.2")
            await expect(row(page, "batch").get_by_role("button", name="Pause batch", exact=True).first).to_be_visible()
            await page.evaluate(SLOWLY)
            await page.get_by_role("slider", name="Position in song 1 of 3: batch", exact=True).fill("12")
            assert await time(page) >= 12
            await expect(page.locator("#time")).to_contain_text("0:12 / 0:30")
            await page.locator("h1").click()
            await page.keyboard.press("ArrowRight")
            assert await time(page) >= 17
            await page.keyboard.press("ArrowLeft")
            assert await time(page) < 17
            await page.keyboard.press("k")
            await holds(page, "document.querySelector('#audio').paused")
            await expect(page.locator("#bar").get_by_role("button", name="Play", exact=True)).to_be_visible()
            assert await page.evaluate("navigator.mediaSession.metadata.title") == "batch"


async def test_songs_of_a_job_are_one_key_away_at_the_same_position(tab: OpenTab) -> None:
    async with served_page() as served:
        batch(served)
        async with tab(served.url) as browser:
            page = browser.page
            await row(page, "batch").get_by_role("button", name="Play batch", exact=True).click()
            await page.evaluate(SLOWLY)
            await page.get_by_role("slider", name="Position in").fill("10")
            await holds(page, "document.querySelector('#audio').currentTime > 10")
            await page.locator("h1").click()
            await page.keyboard.press("2")
            await expect(page.locator("#now")).to_have_text("batch · song 2 of 3")
            assert await page.evaluate(SOURCE) == "/audio/batch/1"
            await holds(page, f"{PLAYS} && document.querySelector('#audio').currentTime > 10")
            assert await time(page) < 20
            await page.keyboard.press("b")
            await expect(page.locator("#now")).to_have_text("batch · song 3 of 3")
            second = page.get_by_role("button", name="Switch to song 2 of 3, score 0.70", exact=True)
            await expect(second).to_have_text("2 · 0.70")
            await second.click()
            await expect(second).to_have_attribute("aria-pressed", "true")
            assert await page.evaluate(SOURCE) == "/audio/batch/1"
            assert await time(page) >= 10


async def test_the_next_song_follows_by_itself_unless_one_is_looped_or_that_is_turned_off(tab: OpenTab) -> None:
    async with served_page() as served:
        for name in ("third", "second", "first"):
            served.complete(name, served.song(name, seconds=1))
        async with tab(served.url) as browser:
            page = browser.page
            await row(page, "first").get_by_role("button", name="Play first", exact=True).click()
            await holds(page, f"{SOURCE} === '/audio/third/0'")  # after the second one
            await holds(page, "document.querySelector('#audio').ended")
            await page.get_by_role("button", name="Loop", exact=True).click()
            await row(page, "second").get_by_role("button", name="Play second", exact=True).click()
            await holds(page, "document.querySelector('#audio').currentTime > 0.8")
            await holds(page, f"document.querySelector('#audio').currentTime < 0.5 && {SOURCE} === '/audio/second/0'")
            await page.get_by_role("button", name="Play on", exact=True).click()
            await page.get_by_role("button", name="Loop", exact=True).click()
            await holds(page, "document.querySelector('#audio').ended")
            assert await page.evaluate(SOURCE) == "/audio/second/0"
            await page.get_by_role("button", name="Next song", exact=True).click()
            await holds(page, f"{SOURCE} === '/audio/third/0'")
            await page.get_by_role("button", name="Previous song", exact=True).click()
            await holds(page, f"{SOURCE} === '/audio/second/0'")


async def test_volume_loop_and_what_follows_are_remembered(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("one", served.song("one"))
        async with tab(served.url) as browser:
            page = browser.page
            await row(page, "one").get_by_role("button", name="Play one", exact=True).click()
            await page.get_by_role("slider", name="Volume", exact=True).fill("0.3")
            await page.get_by_role("button", name="Loop", exact=True).click()
            await page.get_by_role("button", name="Play on", exact=True).click()
            await page.reload()
            await row(page, "one").get_by_role("button", name="Play one", exact=True).click()
            assert await page.evaluate("document.querySelector('#audio').volume") == pytest.approx(0.3)
            assert await page.evaluate("document.querySelector('#audio').loop")
            await expect(page.get_by_role("button", name="Play on", exact=True)).to_have_attribute(
                "aria-pressed", "false"
            )


async def test_jobs_that_come_do_not_move_the_song_that_plays(tab: OpenTab) -> None:
    async with served_page() as served:
        for number in range(40):
            served.complete(f"old-{number}", served.song(f"old-{number}", seconds=30))
        async with tab(served.url, viewport={"width": 1200, "height": 700}) as browser:
            page = browser.page
            playing = row(page, "old-36")
            await playing.get_by_role("button", name="Play old-36", exact=True).click()
            await holds(page, PLAYS)
            before = await playing.bounding_box()
            assert before is not None
            for number in range(8):
                served.start(f"new-{number}")
                await expect(row(page, f"new-{number}")).to_be_attached()
                after = await playing.bounding_box()
                assert after is not None
                assert after["y"] == pytest.approx(before["y"], abs=2)
            await page.mouse.wheel(0, 3000)
            await expect(playing).not_to_be_in_viewport()
            await expect(page.locator("#now")).to_be_in_viewport()
            await page.locator("#now").click()
            await expect(playing).to_be_in_viewport()


async def test_a_waveform_comes_from_the_event_and_a_song_is_fetched_only_to_be_heard(tab: OpenTab) -> None:
    async with served_page() as served:
        for number in range(20):
            served.complete(f"song-{number}", served.song(f"song-{number}"))
        served.complete("bare", served.song("bare", peaks=None))
        async with tab(served.url) as browser:
            page = browser.page
            fetched: list[str] = []
            page.on("request", lambda request: fetched.extend([request.url] * ("/audio/" in request.url)))
            await expect(row(page, "song-19").locator(".small-wave[data-drawn]")).to_be_visible()
            await page.mouse.wheel(0, 2000)
            await expect(row(page, "song-0").locator(".small-wave[data-drawn]")).to_be_visible()
            assert fetched == []
            await expect(row(page, "bare").locator(".small-wave")).to_be_hidden()
            await row(page, "bare").get_by_role("button", name="Play bare", exact=True).click()
            await expect(page.locator("#wave[data-drawn]")).to_be_visible()  # decoded here
            assert {url.rpartition("/audio/")[2] for url in fetched} == {"bare/0"}


async def test_shortcuts_are_listed_and_can_be_turned_off_and_fields_keep_their_keys(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("one", served.song("one", seconds=30))
        async with tab(served.url) as browser:
            page = browser.page
            await expect(row(page, "one")).to_be_visible()
            await page.get_by_label("What should it sound like?").click()
            await page.keyboard.type("k n l")
            await expect(page.locator("#bar")).to_be_hidden()
            await page.locator("h1").click()
            await page.keyboard.press("?")
            await expect(page.get_by_role("dialog", name="Keys", exact=True)).to_contain_text("Play or pause")
            await page.get_by_label("Use these keys").uncheck()
            await page.keyboard.press("Escape")
            await page.keyboard.press("k")
            await expect(page.locator("#bar")).to_be_hidden()
            await page.get_by_role("button", name="Keys", exact=True).click()
            await page.get_by_label("Use these keys").check()
            await page.get_by_role("dialog").get_by_role("button", name="Close", exact=True).click()
            await page.locator("h1").click()
            await page.keyboard.press("k")
            await holds(page, PLAYS)


async def test_a_song_that_cannot_be_heard_says_why_in_the_bar(tab: OpenTab) -> None:
    async with served_page() as served:
        deleted = served.song("deleted")
        del served.results.stored[deleted.uri]
        served.complete("deleted", deleted)
        served.complete("strange", served.song("strange", format="x"))
        async with tab(served.url) as browser:
            page = browser.page
            browser.expected = "404"
            await row(page, "deleted").get_by_role("button", name="Play deleted", exact=True).click()
            await expect(page.locator("#trouble")).to_contain_text("was deleted")
            await row(page, "strange").get_by_role("button", name="Play strange", exact=True).click()
            await expect(page.locator("#trouble")).to_contain_text("This browser cannot play X. Download the song")
            await expect(page.locator("#toggle")).to_be_disabled()


async def test_a_keyboard_reaches_the_bar_at_once_and_no_focus_is_under_it(tab: OpenTab) -> None:
    async with served_page() as served:
        for number in range(30):
            served.complete(f"song-{number}", served.song(f"song-{number}"))
        async with tab(served.url, viewport={"width": 1200, "height": 600}) as browser:
            page = browser.page
            await row(page, "song-29").get_by_role("button", name="Play song-29", exact=True).click()
            await page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            await row(page, "song-25").locator(".play").focus()
            for _ in range(20):
                await page.keyboard.press("Tab")
                bar = "document.querySelector('#bar').getBoundingClientRect().top"
                assert await page.evaluate(f"document.activeElement.getBoundingClientRect().bottom <= {bar}")
            skip = page.get_by_role("link", name="Skip to the player", exact=True)
            await skip.focus()
            await page.keyboard.press("Enter")
            await page.keyboard.press("Tab")
            await expect(page.get_by_role("button", name="Previous song", exact=True)).to_be_focused()
