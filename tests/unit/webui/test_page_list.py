# SPDX-License-Identifier: Apache-2.0
"""The page's list of jobs, in headless Chromium: compact, filtered, with favourites, places and one archive of all."""

import io
import zipfile
from typing import Any

import pytest
from playwright.async_api import Page, expect

from acestep_consumer.client import Unreachable
from acestep_consumer.webui.job_board import QueueState
from acestep_schemas import examples
from acestep_schemas.events import WorkerEvent
from acestep_schemas.request import GenerationRequest
from tests.support.browser import OpenTab
from tests.support.listening import ended
from tests.support.page import ServedPage, row, served_page

pytestmark = pytest.mark.asyncio(loop_scope="session")

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


async def shown(page: Page) -> list[str]:
    """Ids of the rows that are shown, from above."""
    rows = "[...document.querySelectorAll('.job')].filter((row) => row.checkVisibility()).map(({ id }) => id.slice(4))"
    return list(await page.evaluate(rows))


def three(served: ServedPage) -> None:
    served.complete("jazz", served.song("jazz"), request={"prompt": "Slow Jazz", "lyrics": "rain on the avenue"})
    served.complete("folk", served.song("folk"), request={"prompt": "acoustic folk"})
    served.start("synth", prompt="synthwave")


async def test_a_finished_song_takes_one_line_and_the_rest_is_behind_its_title(tab: OpenTab) -> None:
    async with served_page() as served:
        for number in range(30):
            name = f"song-{number}"
            served.complete(name, served.song(name), request={"prompt": "a long description " * 20})
        for context in ({"viewport": {"width": 1280, "height": 800}}, PHONE):
            async with tab(served.url, **context) as browser:
                page = browser.page
                await expect(page.locator(".job")).to_have_count(30)
                box = await row(page, "song-29").bounding_box()
                assert box is not None
                assert box["height"] < 64
                details = row(page, "song-29").locator(".words")
                await expect(details).to_be_hidden()
                await row(page, "song-29").locator(".open").click()
                await expect(details).to_be_visible()
                assert await page.evaluate("document.documentElement.scrollWidth") <= context["viewport"]["width"]


async def test_on_a_phone_a_title_has_half_of_its_row(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("batch", *(served.song("batch", each, seconds=95) for each in range(4)))
        served.start("runs", prompt="slow jazz, brushed drums, double bass")
        served.board.add_event(ended("failed", "fails"))
        served.board.add_request("waits", GenerationRequest(prompt="acoustic folk"))
        async with tab(served.url, **PHONE) as browser:
            page = browser.page
            await expect(page.locator(".job")).to_have_count(4)
            shares = await page.locator(".job").evaluate_all(
                "rows => rows.map((row) => row.querySelector('h3').offsetWidth / row.offsetWidth)"
            )
            assert min(shares) > 0.5
            assert await page.evaluate("document.documentElement.scrollWidth") <= 360
            await expect(row(page, "runs").get_by_role("button", name="Stop")).to_be_visible()


async def test_other_producers_jobs_have_their_words_while_they_run(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        served.start("theirs", prompt="<i>night</i> drive", lyrics="[verse] go")
        await expect(row(page, "theirs").get_by_role("heading")).to_have_text("<i>night</i> drive")
        await row(page, "theirs").locator(".open").click()
        await expect(row(page, "theirs").locator(".lyrics")).to_have_text("[verse] go")
        await expect(page.locator("#queue")).to_have_text("1 worker, 1 running, nothing waits")


async def test_the_list_is_filtered_by_words_and_by_favourites_which_are_remembered(tab: OpenTab) -> None:
    async with served_page() as served:
        three(served)
        async with tab(served.url) as browser:
            page = browser.page
            await expect(page.locator(".job")).to_have_count(3)
            await page.get_by_label("Filter by words").fill("AVENUE jazz")
            assert await shown(page) == ["jazz"]
            await page.get_by_label("Filter by words").fill("polka")
            await expect(page.locator("#nothing")).to_have_text("No job matches.")
            await page.get_by_label("Filter by words").fill("")
            await row(page, "folk").get_by_role("button", name="Favourite: acoustic folk", exact=True).click()
            await page.get_by_role("button", name="Favourites 1", exact=True).click()
            assert await shown(page) == ["folk"]
            await page.reload()
            await page.get_by_role("button", name="Favourites 1", exact=True).click()
            assert await shown(page) == ["folk"]
            star = row(page, "folk").get_by_role("button", name="Favourite: acoustic folk", exact=True)
            await expect(star).to_have_attribute("aria-pressed", "true")
            await star.click()
            await expect(page.locator("#nothing")).to_have_text("No job matches.")


async def test_all_songs_that_are_shown_come_as_one_archive_without_those_that_are_gone(tab: OpenTab) -> None:
    async with served_page() as served:
        songs = [served.song("batch", each) for each in range(2)]
        served.complete("batch", *songs)
        served.complete("other", served.song("other"))
        stolen = served.song("elsewhere").model_copy(update={"uri": "s3://acestep/jobs/other/0.wav"})
        served.complete("elsewhere", stolen)
        served.start("none")
        async with tab(served.url) as browser:
            page = browser.page
            link = page.get_by_role("link", name="Download all 4 songs")
            async with page.expect_download() as saving:
                await link.click()
            download = await saving.value
            assert download.suggested_filename == "songs.zip"
            with zipfile.ZipFile(io.BytesIO((await download.path()).read_bytes())) as archive:
                assert archive.testzip() is None
                assert archive.namelist() == [
                    *("batch-0.wav", "batch-1.wav", "other-0.wav", "elsewhere-0.wav.missing.txt")
                ]
                assert archive.read("batch-1.wav") == served.results.stored[songs[1].uri]
                assert b"outside of this job's folder" in archive.read("elsewhere-0.wav.missing.txt")
            await page.get_by_label("Filter by words").fill("batch")
            await expect(page.locator("#download-all")).to_contain_text("Download all 2 songs")
        async with tab(served.url) as browser:
            for query, status in (("board=x&jobs=1", 404), ("jobs=../etc", 400), ("", 400), (f"jobs={'9' * 40}", 400)):
                answer = await browser.page.request.get(f"{served.url}/songs.zip?{query}")
                assert answer.status == status, query


async def test_all_that_wait_of_this_browser_are_stopped_at_once_after_a_question(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        stop = page.locator("#stop-waiting")
        served.board.add_request("theirs", GenerationRequest(prompt="of somebody else"))
        for number in range(3):
            await page.get_by_label("What should it sound like?").fill(f"mine {number}")
            await page.get_by_role("button", name="Make it", exact=True).click()
            await expect(page.locator("#answer")).to_contain_text("Accepted.")
            await expect(page.get_by_role("heading", name=f"mine {number}")).to_be_visible()
        ids = [each["task_id"] for each in served.client.published]
        served.start(ids[0])
        await page.reload()
        await expect(stop).to_have_text("Stop all waiting jobs (2)")
        await stop.click()
        await page.get_by_role("button", name="Let them wait", exact=True).click()
        await expect(page.locator("#confirm")).to_be_hidden()
        await expect(stop).to_be_focused()
        await stop.click()
        await expect(page.locator("#confirm-text")).to_contain_text("Stop the 2 waiting jobs")
        await page.get_by_role("button", name="Stop them", exact=True).click()
        for task_id in ids[1:]:
            await expect(row(page, task_id).locator(".doing")).to_have_text("cancelling when its turn comes")
        await expect(stop).to_be_hidden()
        assert sorted(served.client.cancelled) == sorted(ids[1:])


async def test_what_another_tab_of_this_browser_sent_stays_its_own(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        other = await browser.page.context.new_page()
        await other.goto(served.url)
        for page in (browser.page, other):
            await page.get_by_label("What should it sound like?").fill("jazz")
            await page.get_by_role("button", name="Make it", exact=True).click()
            await expect(page.locator("#answer")).to_contain_text("Accepted.")
        await browser.page.reload()
        await expect(browser.page.locator("#stop-waiting")).to_have_text("Stop all waiting jobs (2)")
        await other.close()


async def test_a_waiting_job_says_its_place_and_the_time_until_its_songs(tab: OpenTab) -> None:
    async with served_page() as served:
        worker = examples.worker().data.model_copy(
            update={"state": "ready", "prefetch": 1, "in_hand": 1, "seconds_per_job": 60.0, "remaining_s": (60.0,)}
        )
        served.board.add_worker(WorkerEvent.of(worker))
        served.client.ready = 3
        async with tab(served.url) as browser:
            page = browser.page
            await page.get_by_label("What should it sound like?").fill("mine")
            await page.get_by_role("button", name="Make it", exact=True).click()
            doing = page.locator(".job .doing")
            await expect(doing).to_have_text("number 3 in the queue · ready in about 4 min")
            served.start("theirs")
            served.start("theirs-too")
            await expect(doing.last).to_have_text("next in the queue · ready in about 2 min")
            served.board.set_queue_state(QueueState(broker=True, waiting=5, workers=1))
            await expect(page.locator("#others")).to_contain_text("4 more requests wait")


async def test_what_the_broker_has_not_got_is_not_said_to_wait(tab: OpenTab) -> None:
    async with served_page() as served:
        served.board.set_queue_state(QueueState(broker=False))
        served.board.add_request("mine", GenerationRequest(prompt="mine"))
        async with tab(served.url) as browser:
            page = browser.page
            await expect(page.locator("#line")).to_have_text("broker unreachable, reconnecting")
            await expect(row(page, "mine").locator(".doing")).to_have_text("not sent yet: the broker is unreachable")
            served.board.mark_unsure("mine")
            await expect(row(page, "mine").locator(".doing")).to_contain_text(
                "not known whether the broker accepted it"
            )
            served.client.refusal = Unreachable("the broker is out of reach")
            await page.get_by_label("What should it sound like?").fill("another")
            await page.get_by_role("button", name="Make it", exact=True).click()
            await expect(page.locator("#answer")).to_contain_text("sending it again is safe")
            browser.expected = "502"


async def test_a_song_that_plays_and_favourites_outlast_many_later_ones(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("loved", served.song("loved"))
        served.complete("heard", served.song("heard", seconds=60))
        served.complete("neither", served.song("neither"))
        async with tab(served.url) as browser:
            page = browser.page
            await row(page, "loved").get_by_role("button", name="Favourite: loved", exact=True).click()
            await row(page, "heard").get_by_role("button", name="Play heard", exact=True).click()
            for number in range(160):
                served.complete(f"later-{number}", served.song(f"later-{number}", seconds=0.1))
                if number % 80 == 79:  # the board holds a hundred, and the page reads them in time
                    await expect(row(page, f"later-{number}")).to_be_attached()
            await expect(row(page, "neither")).not_to_be_attached()
            await expect(row(page, "loved")).to_be_attached()
            await expect(row(page, "heard")).to_be_attached()
            assert served.board.get("heard") is None


@pytest.mark.parametrize("context", [{"viewport": {"width": 1280, "height": 800}}, PHONE])
async def test_every_row_can_be_opened_played_and_starred_by_keyboard(tab: OpenTab, context: dict[str, Any]) -> None:
    async with served_page() as served:
        three(served)
        async with tab(served.url, **context) as browser:
            page = browser.page
            await row(page, "folk").focus()
            order = []
            for _ in range(3):
                await page.keyboard.press("Tab")
                order.append(await page.evaluate("document.activeElement.className"))
                assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            assert order == ["play", "open", "icon star"]
            await page.keyboard.press("Space")
            await expect(row(page, "folk").locator(".star").first).to_have_attribute("aria-pressed", "true")
            await page.keyboard.press("Shift+Tab")
            await page.keyboard.press("Enter")
            await expect(row(page, "folk").locator(".more")).to_be_visible()
