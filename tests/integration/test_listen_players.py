# SPDX-License-Identifier: Apache-2.0
"""The page's players in headless Chromium: songs as workers encode them, and what is said when one cannot be heard."""

from pathlib import Path

import pytest
from playwright.async_api import Locator, Page, expect

from acestep_consumer.audio.formats import FORMATS
from tests.support.browser import OpenTab, holds
from tests.support.listening import Listening, ListenProcess, keep, listening, made, publish_events, record

__all__ = ["listening"]

SECONDS = 12.0
AUDIO = "document.querySelector('#audio')"
pytestmark = pytest.mark.asyncio(loop_scope="session")

# A browser that was built without AAC.
WITHOUT_AAC = """
    const can = HTMLMediaElement.prototype.canPlayType;
    HTMLMediaElement.prototype.canPlayType = function (type) {
        return type.includes("aac") ? "" : can.call(this, type);
    };
"""


def job(page: Page, task_id: str) -> Locator:
    return page.locator(f"#job-{task_id}")


async def reaches(page: Page, at_least: float) -> None:
    """Wait until the song that plays is so far, in seconds."""
    await holds(page, f"{AUDIO}.currentTime >= {at_least}")


async def test_songs_of_every_format_that_workers_make_are_drawn_play_and_seek(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    songs = {name: record(listening, tmp_path, f"in-{name}", name, SECONDS) for name in FORMATS}
    await publish_events(listening, *(made(f"in-{name}", song) for name, song in songs.items()))
    async with tab(listening.url) as browser:
        ranges: list[str | None] = []
        browser.page.on("response", lambda answer: ranges.append(answer.headers.get("content-range")))
        page = browser.page
        for name in FORMATS:
            await job(page, f"in-{name}").get_by_role("button", name="Play").click()
            await expect(page.locator("#now")).to_have_text(f"in-{name}")
            await reaches(page, 0.2)
            await expect(page.locator("#wave[data-drawn]")).to_be_visible()
            if name != "aac":  # ADTS does not say how long it is: browsers guess, and the page goes by the event
                duration = await page.locator("#audio").evaluate("audio => audio.duration")
                assert duration == pytest.approx(SECONDS, abs=0.1)
            await expect(page.locator("#time")).to_contain_text("/ 0:12")
            await page.get_by_role("slider", name="Position in").fill("9")
            # In one step: at its end, the next song would begin.
            await holds(page, f"{AUDIO}.currentTime >= 9.2 && ({AUDIO}.pause(), true)")
            await expect(page.locator("#trouble")).to_be_hidden()
        assert any(ranges), "players ask for parts"


async def test_of_several_songs_each_has_its_name_and_one_plays_at_a_time(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    audio = record(listening, tmp_path, "several", "mp3")
    await publish_events(listening, made("several", audio, audio, audio, prompt="three takes"))
    async with tab(listening.url) as browser:
        page = browser.page
        await job(page, "several").locator(".open").click()
        songs = job(page, "several").locator(".song")
        await expect(songs).to_have_count(3)
        for number in (1, 2):
            await (
                songs.nth(number)
                .get_by_role("button", name=f"Play song {number + 1} of 3: three takes", exact=True)
                .click()
            )
            await expect(page.locator("#now")).to_have_text(f"three takes · song {number + 1} of 3")
            await reaches(page, 0.1)
        await expect(
            songs.nth(1).get_by_role("button", name="Play song 2 of 3: three takes", exact=True)
        ).to_be_visible()
        title = await browser.page.evaluate("navigator.mediaSession.metadata.title")
        assert title == "three takes"


async def test_a_browser_without_the_codec_is_told_so_at_once_and_offered_the_file(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    await publish_events(listening, made("no-codec", record(listening, tmp_path, "no-codec", "aac")))
    async with tab(listening.url, first=WITHOUT_AAC) as browser:
        page = browser.page
        await job(page, "no-codec").get_by_role("button", name="Play").click()
        await expect(page.locator("#trouble")).to_contain_text("This browser cannot play AAC. Download the song")
        await expect(page.locator("#toggle")).to_be_disabled()
        await expect(page.locator("#position")).to_be_disabled()
        assert await saved_size(page, job(page, "no-codec")) > 0


async def test_a_file_that_does_not_play_is_said_to_be_so_and_can_be_saved(tab: OpenTab, listening: Listening) -> None:
    broken = keep(listening, "broken/0.flac", b"no music" * 1000, format="flac", duration_s=SECONDS)
    await publish_events(listening, made("broken", broken))
    async with tab(listening.url) as browser:
        song = job(browser.page, "broken")
        await song.get_by_role("button", name="Play").click()
        await expect(browser.page.locator("#trouble")).to_contain_text("cannot play this FLAC file")
        assert await saved_size(browser.page, song) == broken.bytes


async def test_without_access_to_storage_jobs_are_shown_and_songs_say_why_they_are_silent(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    audio = record(listening, tmp_path, "stored", "mp3")
    wrong = listening.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    with ListenProcess(tmp_path, wrong) as page:
        async with tab(page.url) as browser:
            await publish_events(listening, made("stored", audio))
            song = job(browser.page, "stored")
            await expect(song.locator(".state")).to_have_text("Done")
            await song.get_by_role("button", name="Play").click()
            await expect(browser.page.locator("#trouble")).to_contain_text("storage refuses")
            assert "X-Amz" not in await browser.page.locator("body").inner_html()
            browser.expected = "502"


async def saved_size(page: Page, song: Locator) -> int:
    """Click on Download; the file's size in bytes."""
    await song.locator(".open").click()
    async with page.expect_download() as saving:
        await song.get_by_role("link", name="Download").click()
    return (await (await saving.value).path()).stat().st_size
