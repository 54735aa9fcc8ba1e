# SPDX-License-Identifier: Apache-2.0
"""The page as people meet it: in headless Chromium, with mouse, keyboard and a small screen."""

import asyncio
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import aiohttp
import pytest
from playwright.async_api import Locator, Page, expect

from acestep_schemas import examples
from acestep_schemas.events import JobProgress, JobStarted, ModelChoice, Progress
from infra.local.ports import PortClaim
from tests.support.broker import Peer
from tests.support.browser import OpenTab, holds
from tests.support.listening import (
    RUNNING,
    WAITING,
    Listening,
    ListenProcess,
    PageClient,
    ended,
    listening,
    made,
    publish_events,
    record,
    unattended,
)
from tests.support.proxy import Proxy

__all__ = ["listening", "unattended"]

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
pytestmark = pytest.mark.asyncio(loop_scope="session")

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
LIGHT: Literal["light"] = "light"
DARK: Literal["dark"] = "dark"
# Controls without a name.
NAMELESS = """() => [...document.querySelectorAll("button, a, input, select, textarea, progress, [role=group]")]
    .filter((element) => element.checkVisibility())
    .filter((element) => ![
        element.ariaLabel,
        document.getElementById(element.getAttribute("aria-labelledby"))?.textContent,
        [...(element.labels ?? [])].map((label) => label.textContent).join(""),
        /BUTTON|A/.test(element.tagName) && element.textContent,
    ].some((name) => name && name.trim()))
    .map((element) => element.outerHTML)"""
DOUBLE_IDS = """() => [...document.querySelectorAll("[id]")].map(({ id }) => id)
    .filter((id, at, all) => all.indexOf(id) !== at)"""
# Texts with less contrast than WCAG's 4.5 to 1 against what is painted under them.
PALE = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((each) => each / 255)
        .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4))
        .reduce((sum, each, at) => sum + each * [0.2126, 0.7152, 0.0722][at], 0);
    const paper = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const colour = numbers(getComputedStyle(each).backgroundColor);
            if (colour[3] !== 0) return colour;
        }
    };
    const ratio = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const found = [];
    const check = (element, style, text) => {
        const is = ratio(light(numbers(style.color)), light(paper(element)));
        if (is < 4.5) found.push(`${is.toFixed(2)} ${element.tagName}.${element.className} ${text}`);
    };
    for (const element of document.querySelectorAll("body *")) {
        if (!element.checkVisibility() || element.closest("svg, .unseen, :disabled")) continue;
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (own) check(element, getComputedStyle(element), element.textContent.slice(0, 40));
        if (element.placeholder) check(element, getComputedStyle(element, "::placeholder"), element.placeholder);
    }
    return found;
}"""
# Values of progress bars, at the moments at which they are shown or moved.
WATCH_BARS = """() => {
    const seen = (globalThis.shownBars = new Set());
    const look = () => {
        for (const bar of document.querySelectorAll("progress")) if (bar.checkVisibility()) seen.add(bar.value);
    };
    const list = document.querySelector("#list");
    new MutationObserver(look).observe(list, { subtree: true, childList: true, attributes: true });
}"""
CAN_BE_HIDDEN = "Object.defineProperty(document, 'hidden', { get: () => document.isHiddenNow ?? false });"
HIDE, SHOW = ({"hidden": True}, {"hidden": False})
TURN = "({ hidden }) => { document.isHiddenNow = hidden; document.dispatchEvent(new Event('visibilitychange')); }"


async def ask(page: Page, prompt: str, **fields: str) -> None:
    """Fill the form and send it."""
    await page.get_by_label("What should it sound like?").fill(prompt)
    await page.get_by_label("Format").select_option("wav")
    for name, value in fields.items():
        field = page.locator(f"#ask [name={name}]")
        if not await field.is_visible():
            await page.get_by_text("More settings").click()
        await field.fill(value)
    await page.get_by_role("button", name="Make it", exact=True).click()


async def open_job(card: Locator) -> None:
    """Show everything about a job."""
    await card.locator(".open").click()
    await expect(card.locator(".open")).to_have_attribute("aria-expanded", "true")


def job(page: Page, title: str) -> Locator:
    return page.locator(".job").filter(has=page.get_by_role("heading", name=title, exact=True))


async def test_the_page_is_there_after_a_second_of_work_and_live_also_with_two_hundred_jobs(
    tab: OpenTab, unattended: Listening
) -> None:
    place = f"s3://{unattended.environment['ACESTEP_S3_BUCKET']}/{unattended.environment['ACESTEP_S3_PREFIX']}"
    audio = examples.completed().data.audios[0]
    songs = {f"made-{number}": audio.model_copy(update={"uri": f"{place}/made-{number}/0"}) for number in range(50)}
    running = [examples.started().data.model_copy(update={"task_id": f"runs-{number}"}) for number in range(100)]
    await publish_events(
        unattended,
        *map(JobStarted.of, running),
        *(made(task_id, song) for task_id, song in songs.items()),
        *(ended("failed", f"failed-{number}") for number in range(50)),
    )
    async with tab(unattended.url) as browser:
        page = browser.page
        await expect(page.locator(".job")).to_have_count(200)
        fetched: list[str] = []
        page.on("request", lambda request: fetched.extend([request.url] * ("/audio/" in request.url)))
        assert await work_s(page) < 1
        await expect(page.locator("#line")).to_have_text("live")
        await expect(page.locator("#queue")).to_have_text("no worker takes requests, 100 running, nothing waits")
        await only_shows(page, "Running 100", "running", 100)
        await only_shows(page, "With songs 50", "completed", 50)
        await only_shows(page, "Without songs 50", "failed", 50)
        # One that is hidden is shown when somebody asks for it.
        await page.evaluate("location.hash = 'runs-7'")
        await expect(page.locator("#job-runs-7")).to_be_focused()
        await expect(page.locator("#job-runs-7 h3")).to_be_in_viewport()
        await expect(page.get_by_role("button", name="All 200", exact=True)).to_have_attribute("aria-pressed", "true")
        assert fetched == [], "a song is fetched to be heard"


async def work_s(page: Page) -> float:
    """Load the page again; returns the processor time of its thread until its jobs are shown, whatever else runs."""
    session = await page.context.new_cdp_session(page)
    await session.send("Performance.enable", {"timeDomain": "threadTicks"})

    async def spent() -> float:
        metrics = (await session.send("Performance.getMetrics"))["metrics"]
        return float(next(each["value"] for each in metrics if each["name"] == "TaskDuration"))

    before = await spent()
    await page.reload()
    await expect(page.locator(".job")).to_have_count(200)
    return await spent() - before


async def only_shows(page: Page, button: str, state: str, count: int) -> None:
    await page.get_by_role("button", name=button, exact=True).click()
    await expect(page.locator(".job:visible")).to_have_count(count)
    await expect(page.locator(f'.job[data-state="{state}"]:visible')).to_have_count(count)


async def test_a_job_that_is_submitted_shows_its_progress_its_song_and_its_words(
    tab: OpenTab, listening: Listening
) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await page.evaluate(WATCH_BARS)
        await ask(
            page, "late jazz bytes=600000 takes=4", lyrics="[verse]\nla <b>la</b>", audio_duration="600", seed="7"
        )
        card = job(page, "late jazz bytes=600000 takes=4")
        await expect(card.locator(".state")).to_have_text("Done")
        assert len(await page.evaluate("[...shownBars]")) > 2
        await open_job(card)
        await expect(card.locator(".notes")).to_contain_text("Seconds: asked for 600")
        await expect(card.locator(".facts")).to_contain_text("WAV · 48 kHz stereo · 600 kB · seed 7")
        await expect(card.locator(".lyrics")).to_have_text("[verse]\nla <b>la</b>")
        await expect(card.locator(".lyrics b")).to_have_count(0)
        await expect(page.locator("#announce")).to_contain_text("done, 1 song")


async def test_a_waveform_is_drawn_a_song_plays_seeks_pauses_and_can_be_saved(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await ask(page, "bytes=11520000")
        card = job(page, "bytes=11520000")
        await card.get_by_role("button", name="Play").click()
        wave = page.locator("#wave[data-drawn]")
        await expect(wave).to_be_visible()
        before = await wave.evaluate(PAINTED)
        assert before["share"] > 0.2
        await holds(page, "document.querySelector('audio').currentTime > 0.5")
        slider = page.get_by_role("slider", name="Position in the song: bytes=11520000", exact=True)
        await slider.fill("25")
        await holds(page, "document.querySelector('audio').currentTime > 25")
        await expect(page.locator("#time")).to_contain_text("/ 1:00")
        assert (await wave.evaluate(PAINTED))["colours"] >= before["colours"]
        await page.locator("#bar").get_by_role("button", name="Pause", exact=True).click()
        await expect(page.locator("#bar").get_by_role("button", name="Play", exact=True)).to_be_visible()
        assert " of 1:00" in str(await slider.get_attribute("aria-valuetext"))
        await open_job(card)
        async with page.expect_download() as saving:
            await card.get_by_role("link", name="Download").click()
        saved = await saving.value
        assert saved.suggested_filename.endswith("-0.wav")
        await saved.save_as(tmp_path / "song.wav")
        assert (tmp_path / "song.wav").stat().st_size > 1_890_000


async def test_without_a_mouse_a_song_can_be_ordered_heard_and_stopped(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the jobs", exact=True)).to_be_focused()
        for _ in range(4):  # over the language, the keys and the kind
            await page.keyboard.press("Tab")
        await page.keyboard.type(f"until={tmp_path / 'never'}")
        for _ in range(4):
            await page.keyboard.press("Tab")
        await page.keyboard.type("W")  # of WAV; after a second without a key, an A would choose AAC
        await page.keyboard.press("Control+Enter")
        card = job(page, f"until={tmp_path / 'never'}")
        await expect(card).to_have_attribute("data-state", "running")
        stop = card.get_by_role("button", name="Stop")
        for _ in range(30):
            await page.keyboard.press("Tab")
            ring = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert ring == "solid", await page.evaluate("document.activeElement.outerHTML")
            if await stop.evaluate("stop => stop === document.activeElement"):
                break
        await page.keyboard.press("Enter")
        await expect(card.locator(".state")).to_have_text("Cancelled")
        await expect(card).to_be_focused()


async def test_from_the_form_a_keyboard_leads_to_the_player_and_the_download(
    tab: OpenTab, listening: Listening
) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await page.get_by_label("What should it sound like?").focus()
        await page.keyboard.type("by keyboard bytes=4000000")
        await page.get_by_label("Format").focus()
        await page.keyboard.type("W")
        await page.get_by_role("button", name="Make it", exact=True).focus()
        await page.keyboard.press("Enter")
        await page.get_by_role("link", name="See it", exact=True).focus()
        await page.keyboard.press("Enter")
        card = job(page, "by keyboard bytes=4000000")
        await expect(card).to_be_focused()
        await expect(card).to_have_attribute("data-state", "completed")
        await tab_to(page, card.locator(".play"))
        await page.keyboard.press("Space")
        await holds(page, "document.querySelector('audio').currentTime > 0.2")
        await page.keyboard.press("Space")
        await holds(page, "document.querySelector('audio').paused")
        await tab_to(page, card.locator(".open"))
        await page.keyboard.press("Enter")
        await tab_to(page, card.get_by_role("link", name="Download"))
        async with page.expect_download() as saving:
            await page.keyboard.press("Enter")
        assert (await saving.value).suggested_filename.endswith("-0.wav")


async def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until ``target`` has the focus, a few times at most."""
    for _ in range(6):
        await page.keyboard.press("Tab")
        if await target.evaluate("target => target === document.activeElement"):
            return
    raise AssertionError(await page.evaluate("document.activeElement.outerHTML"))


async def test_every_control_has_a_name_every_text_has_contrast_and_every_id_is_one(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    audio, deaf = record(listening, tmp_path, "names", "mp3"), record(listening, tmp_path, "deaf", "mp3")
    events = (
        made("names", audio, audio, prompt="songs", warnings=("something was left out",)),
        made("deaf", deaf.model_copy(update={"format": "x"}), lyrics="[verse]"),
        JobStarted.of(examples.started().data.model_copy(update={"task_id": "names-runs"})),
        *(ended(status, f"names-{status}") for status in ("failed", "rejected", "cancelled", "expired")),
    )
    async with tab(listening.url) as browser:
        page = browser.page
        await publish_events(listening, *events)
        await expect(page.locator("#job-names-expired")).to_be_visible()
        bar = page.locator("#job-names-runs progress")
        await expect(bar).to_have_attribute("aria-label", "Progress of slow jazz, brushed drums, double bass")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await page.locator("#job-names .play").click()
        await page.locator("#show-lyrics").click()
        for opener in await page.locator(".open").all():
            await opener.click()
        for summary in await page.locator("summary:visible").all():
            await summary.evaluate("summary => summary.click()")
        assert await page.evaluate(NAMELESS) == []
        assert await page.evaluate(DOUBLE_IDS) == []
        for scheme in (LIGHT, DARK):
            await page.emulate_media(color_scheme=scheme)
            assert await page.evaluate(PALE) == []


async def test_words_of_strangers_stay_words(tab: OpenTab, listening: Listening, tmp_path: Path) -> None:
    tag = "<img src=x onerror=document.title='taken'>"
    audio = record(listening, tmp_path, "hostile", "mp3")
    policy = examples.started().data.policy
    change = policy.adjustments[0].model_copy(update={"field": tag, "requested": {tag: tag}, "reason": tag})
    hostile = {"worker_id": tag, "warnings": (tag,), "policy": policy.model_copy(update={"adjustments": (change,)})}
    model = ModelChoice(requested=tag, used=tag, fallback=True)
    async with tab(listening.url) as browser:
        page = browser.page
        await publish_events(
            listening,
            made("hostile", audio, prompt=tag, lyrics=tag, model=model, **hostile),
            made(tag, audio.model_copy(update={"format": tag}), prompt="under a strange id"),
            ended(
                "failed", "hostile-end", message=tag, details=({tag: tag}, {"field": tag, "value": tag, "rule": tag})
            ),
            JobProgress.of(
                Progress(task_id="hostile-runs", progress=0.5, stage=tag, sequence=1), attempt=1, worker_id=tag
            ),
        )
        card = page.locator("#job-hostile")
        await expect(card.get_by_role("heading", name=tag, exact=True)).to_be_visible()
        await open_job(card)
        await expect(card.locator(".lyrics")).to_have_text(tag)
        await expect(card.locator(".words dl")).to_contain_text(tag)
        await expect(card.locator(".notes")).to_contain_text(tag)
        await expect(page.locator("#job-hostile-end")).to_contain_text(tag)
        await expect(page.locator("#job-hostile-runs .doing")).to_contain_text(tag)
        await expect(job(page, "under a strange id").locator(".id")).to_have_text(tag)
        assert await page.locator("img").count() == 0
        assert await page.title() != "taken"


async def test_words_run_the_way_they_are_written_and_long_ones_end(tab: OpenTab, listening: Listening) -> None:
    async with tab(listening.url, **PHONE) as browser:
        page = browser.page
        await publish_events(
            listening,
            made("right-to-left", prompt="موسيقى هادئة مع العود", lyrics="[verse] يا ليل"),
            made("japanese", prompt="静かなピアノと弦楽器、雨の夜" * 30, lyrics="雨が降る\n" * 200),
        )
        heading = page.locator("#job-right-to-left h3")
        await expect(heading).to_have_css("direction", "rtl")
        await open_job(page.locator("#job-right-to-left"))
        await expect(page.locator("#job-right-to-left .lyrics")).to_have_css("unicode-bidi", "plaintext")
        japanese = page.locator("#job-japanese")
        await expect(japanese.locator("h3")).to_have_text(re.compile("^.{160}…$"))
        await open_job(japanese)
        box = await japanese.locator(".lyrics").bounding_box()
        assert box is not None
        assert box["height"] < 400
        assert await page.evaluate(WIDER_THAN_THE_SCREEN) == []


async def test_only_jobs_that_were_asked_for_here_are_read_out(tab: OpenTab, listening: Listening) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await ask(page, "mine")
        await expect(page.locator("#announce")).to_contain_text("mine: done")
        await publish_events(
            listening,
            JobStarted.of(examples.started().data.model_copy(update={"task_id": "theirs"})),
            ended("failed", "theirs"),
        )
        await expect(page.locator("#job-theirs .state")).to_have_text("Failed")
        await expect(page.locator("#announce")).to_contain_text("mine: done")


async def test_a_job_that_ends_before_the_page_hears_of_it_is_read_out_too(tab: OpenTab, listening: Listening) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await page.evaluate("import('/list.js').then((list) => list.remember('short'))")
        await publish_events(listening, ended("failed", "short"))
        await expect(page.locator("#announce")).to_contain_text(": failed")


async def test_two_pages_show_the_same_and_one_that_is_hidden_gives_its_connection_back(
    tab: OpenTab, listening: Listening
) -> None:
    async with tab(listening.url, first=CAN_BE_HIDDEN) as browser:
        other = await browser.page.context.new_page()
        await other.clock.install()
        await other.goto(listening.url + "/")
        await expect(other.locator("#line")).to_have_text("live")
        await other.evaluate(TURN, HIDE)
        await other.clock.fast_forward(11_000)
        await expect(other.locator("#line")).to_have_text("paused while hidden")
        await ask(browser.page, "while the other is hidden")
        await expect(job(browser.page, "while the other is hidden")).to_have_attribute("data-state", "completed")
        assert await job(other, "while the other is hidden").count() == 0
        await other.evaluate(TURN, SHOW)
        await expect(job(other, "while the other is hidden")).to_have_attribute("data-state", "completed")
        await expect(other.locator("#line")).to_have_text("live")


async def test_a_broker_that_goes_away_is_said_to_be_and_an_order_goes_through_when_it_is_back(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    url = listening.environment["ACESTEP_AMQP_URL"]
    async with Proxy.for_url(url) as proxy:
        process = ListenProcess(tmp_path, listening.environment | {"ACESTEP_AMQP_URL": proxy.url(url)})
        await asyncio.to_thread(process.__enter__)
        try:
            async with tab(process.url) as browser:
                page = browser.page
                await expect(page.locator("#queue")).to_have_text("1 worker, nothing waits")
                proxy.refuse()
                await expect(page.locator("#line")).to_have_text("broker unreachable, reconnecting")
                await ask(page, "over the gap")
                await expect(page.locator("#answer")).to_contain_text("Broker unreachable.")
                proxy.heal()
                await expect(page.locator("#answer")).to_contain_text("Accepted.")
                await expect(page.locator("#line")).to_have_text("live")
                await expect(job(page, "over the gap")).to_have_attribute("data-state", "completed")
            log = process.log.read_text()
            assert "broker unreachable" in log
            assert "connected to the broker again" in log
        finally:
            await asyncio.to_thread(process.__exit__, None, None, None)


async def test_a_full_queue_is_a_clear_message_with_a_count_and_the_words_stay(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    never = f"until={tmp_path / 'never'}"
    async with aiohttp.ClientSession() as session, tab(listening.url) as browser:
        page, page_client = browser.page, PageClient(listening.url, session)
        running = [await page_client.submit(prompt=never) for _ in range(RUNNING)]
        for task_id in running:
            await page_client.until(task_id, "running")
        waiting = [await page_client.submit(prompt=never) for _ in range(WAITING)]
        await expect(page.locator('.job[data-state="waiting"]')).to_have_count(WAITING)
        await expect(page.locator(f"#job-{waiting[0]} .doing")).to_contain_text("next in the queue")
        await expect(page.locator(f"#job-{waiting[1]} .doing")).to_contain_text("number 2 in the queue")
        await expect(page.locator("#queue")).to_contain_text("2 requests wait")
        now = datetime.now(UTC)
        await page.clock.set_fixed_time(now)  # else the count, of a few seconds, may be over before it is read
        await ask(page, "one too many")
        answer = page.locator("#answer")
        await expect(answer).to_contain_text("The queue is full")
        await expect(answer).to_contain_text("Try again in ")
        first = await answer.inner_text()
        await page.clock.set_fixed_time(now + timedelta(seconds=1))
        await expect(answer).not_to_have_text(first)
        await expect(page.get_by_label("What should it sound like?")).to_have_value("one too many")
        await expect(job(page, "one too many")).to_have_count(0)
        for task_id in (*waiting, *running):
            await page.locator(f"#job-{task_id}").get_by_role("button", name=f"Stop: {never}", exact=True).click()
        await asyncio.gather(*(page_client.until(task_id, "cancelled") for task_id in (*running, *waiting)))
        # The browser itself writes refused requests to the console.
        browser.expected = "503"


async def test_a_wrong_field_is_named_marked_and_focused(tab: OpenTab, listening: Listening) -> None:
    async with tab(listening.url) as browser:
        page = browser.page
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#answer")).to_have_text("Say what it should sound like.")
        await expect(page.get_by_label("What should it sound like?")).to_be_focused()
        await ask(page, "jazz", seed="seven")
        await expect(page.locator("#answer")).to_contain_text("seed: ")
        await expect(page.get_by_label("Seed")).to_be_focused()
        await expect(page.get_by_label("Seed")).to_have_attribute("aria-invalid", "true")
        browser.complaints = [each for each in browser.complaints if "422" not in each]


async def test_failed_and_rejected_jobs_say_why(tab: OpenTab, listening: Listening) -> None:
    async with aiohttp.ClientSession() as session, tab(listening.url) as browser:
        page_client = PageClient(listening.url, session)
        await page_client.submit(prompt="crash now")
        async with Peer(listening.environment["ACESTEP_AMQP_URL"]) as peer:
            await peer.submit(task_id="not-ours", task_type="dance")
        wrong = browser.page.locator("#job-not-ours")
        await expect(wrong.locator(".state")).to_have_text("Rejected")
        await expect(wrong.locator(".reason")).to_contain_text("task_type = dance")
        await expect(wrong.locator(".details")).to_be_hidden()  # it would say the same once more
        card = job(browser.page, "crash now")
        await expect(card.locator(".state")).to_have_text("Failed")
        await expect(card.locator(".reason")).to_contain_text("engine_crashed")
        await open_job(card)
        await card.get_by_role("button", name="Edit in the form").click()
        await expect(browser.page.get_by_label("What should it sound like?")).to_have_value("crash now")


async def test_on_a_phone_nothing_is_wider_than_the_screen(tab: OpenTab, listening: Listening) -> None:
    async with tab(listening.url, **PHONE) as browser:
        page = browser.page
        await ask(page, "averylongwordwithoutanyspace" * 8, audio_duration="600", seed="9223372036854775807")
        card = page.locator(".job").first
        await expect(card).to_have_attribute("data-state", "completed")
        await expect(card).to_be_in_viewport()  # the form fills the screen: the page goes to the job by itself
        await card.locator(".play").tap()
        await expect(page.locator("#wave[data-drawn]")).to_have_count(1)
        await open_job(card)
        assert await page.evaluate(WIDER_THAN_THE_SCREEN) == []
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        for button in await page.locator(".job button:visible, #bar button:visible").all():
            box = await button.bounding_box()
            assert box is not None
            assert box["height"] >= 40


async def test_dark_and_calm_are_respected(tab: OpenTab, listening: Listening) -> None:
    async with tab(listening.url, color_scheme="dark", reduced_motion="reduce") as browser:
        paper = await browser.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) < 120
        moves = "getComputedStyle(document.querySelector('.main')).transitionProperty"
        assert await browser.page.evaluate(moves) in {"none", "all"}
        assert await browser.page.evaluate("document.getAnimations().length") == 0


async def test_a_page_whose_server_went_away_comes_back_by_itself_and_keeps_its_songs(
    tab: OpenTab, listening: Listening, tmp_path: Path
) -> None:
    claim = PortClaim(1)  # of a free one, somebody's connection could take it meanwhile
    port = ("--port", str(claim.ports[0]))
    with ListenProcess(tmp_path, listening.environment, *port) as first:
        async with tab(first.url) as browser:
            page = browser.page
            await ask(page, "before the end")
            await expect(job(page, "before the end")).to_have_attribute("data-state", "completed")
            await asyncio.to_thread(first.process.end, 10)
            await expect(page.locator("#line")).to_contain_text("trying again")
            with ListenProcess(tmp_path, listening.environment, *port):
                await expect(page.locator("#line")).to_have_text("live")
                await ask(page, "after it")
                await expect(job(page, "after it")).to_have_attribute("data-state", "completed")
                await job(page, "before the end").get_by_role("button", name="Play").click()
                await holds(page, "document.querySelector('audio').readyState > 1")
                browser.expected = "ERR_"
    claim.release()
