# SPDX-License-Identifier: Apache-2.0
"""The page's form, in headless Chromium: what it sends, what it refuses, and what it does not offer."""

import asyncio
import json
import re
from typing import Any

import pytest
from playwright.async_api import Page, expect

from acestep_consumer.client import Unreachable
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent
from acestep_schemas import examples
from acestep_schemas.events import LmChoice, Worker, WorkerEvent
from acestep_schemas.request import GenerationRequest
from tests.support.browser import OpenTab
from tests.support.gateway import FakeResults
from tests.support.page import MAX_UPLOAD_BYTES, sent, served_page
from tests.support.waiting import eventually

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
            "guidance_scale": "5",
            "loudness_lufs": "-14",
            "lora": "mine",
            "lora_scale": "0.5",
            "lm_negative_prompt": "noise",
        }
        await fill(page, **given)
        await page.get_by_label("Vocal language").select_option(label="Japanese")
        await page.get_by_label("Format").select_option("flac")
        await page.get_by_label("Lyrics with times").check()
        await page.get_by_label("Thinking").check()
        await page.get_by_label("Rewrite the words").check()
        await page.get_by_label("Time signature").select_option("3/4")
        published = await sent(page, served)
        more = {"vocal_language": "ja", "audio_format": "flac", "timestamps": True, "thinking": True}
        assert published.pop("lora") == {"path": "mine", "scale": 0.5}
        del given["lora"], given["lora_scale"]
        assert published == given | more | {"use_format": True, "time_signature": "3"}
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
        request = GenerationRequest(src_audio_path="s3://b/k.wav", track_name="drums", stems=True)
        served.board.add_request("mine", request)
        await page.locator("#job-mine .open").click()
        await page.locator("#job-mine .edit").click()
        await expect(page.get_by_label("What to make")).to_have_value("stems")
        await expect(page.get_by_label("Or the address of audio")).to_have_value("s3://b/k.wav")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#extra .wrong")).to_contain_text("track name: stems sets it: give one of the two")
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
        for kind in ("new", "cover", "repaint", "lines", "extend", "variation", "stems"):
            await page.get_by_label("What to make").select_option(kind)
            assert await page.evaluate(f"{nameless}.length") == 0
            rows = await page.locator("#source [data-kind]:visible").evaluate_all(
                "rows => rows.map((r) => r.dataset.kind).filter((kind) => !kind.includes(' '))"
            )
            assert rows == {"new": [], "stems": [], "lines": ["lines", "lines"]}.get(kind, [kind])
            address = page.get_by_label("Or the address of audio")
            await expect(address).to_be_visible(visible=kind in {"cover", "repaint", "extend", "stems"})
            await expect(page.locator("#source")).to_be_visible(visible=kind != "new")


async def test_what_happens_without_seconds_is_said_and_more_than_any_tier_allows_is_refused(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        seconds, songs = page.locator("[name=audio_duration]"), page.locator("[name=batch_size]")
        await expect(seconds).to_have_accessible_description(
            "Seconds left empty: a language model decides, else 120; with a source, its length."
        )
        await fill(page, prompt="jazz", audio_duration="9999", batch_size="50")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(seconds).to_have_attribute("aria-invalid", "true")
        await expect(songs).to_have_attribute("aria-invalid", "true")
        await fill(page, audio_duration="5", batch_size="1")  # `submit` sends it, too: the worker says what is wrong
        assert (await sent(page, served))["audio_duration"] == "5"
        await expect(seconds).to_have_accessible_description(
            "Seconds left empty: a language model decides, else 120; with a source, its length."
        )
        assert len(served.client.published) == 1


async def test_audio_from_elsewhere_is_a_source_by_its_address(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        browser.expected = "422"
        await page.get_by_label("What to make").select_option("cover")
        address = page.get_by_label("Or the address of audio")
        await fill(page, prompt="as a waltz", src_audio_path="/etc/passwd")
        await page.get_by_role("button", name="Make it", exact=True).click()
        rule = "Must be s3://bucket/key or https://host/path, not a local path"
        await expect(address).to_have_accessible_description(rule)
        await fill(page, source_task_id="one", src_audio_path="https://songs.example/one.mp3")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#answer")).to_have_text("Give the job or the address, not both.")
        await expect(address).to_be_focused()
        await fill(page, source_task_id="")
        cover = {"task_type": "cover", "src_audio_path": "https://songs.example/one.mp3", "prompt": "as a waltz"}
        assert await sent(page, served) == cover | {"audio_format": "mp3"}
        await page.get_by_label("What to make").select_option("variation")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#answer")).to_have_text("Name the job that the song is from.")
        request = GenerationRequest(prompt="a cover", task_type="cover", src_audio_path="s3://b/k.wav")
        served.board.add_request("mine", request)
        await page.locator("#job-mine .open").click()
        await page.locator("#job-mine .edit").click()
        await expect(page.get_by_label("What to make")).to_have_value("cover")
        await expect(address).to_have_value("s3://b/k.wav")


async def test_any_other_field_is_given_by_its_name_and_checked_by_the_server(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        browser.expected = "422"
        await page.get_by_text("More settings").click()
        await fill(page, prompt="jazz", extra_name="track_classes", extra_value='["drums", "bass"]')
        await page.get_by_role("button", name="Add", exact=True).click()
        await expect(page.locator("#extra dl")).to_contain_text('["drums","bass"]')
        await expect(page.locator("[name=extra_name]")).to_be_focused()
        assert "shift" in await page.locator("#fields option").evaluate_all("all => all.map((each) => each.value)")
        await fill(page, extra_name="shift")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#answer")).to_have_text("Another field needs a name and a value.")
        await expect(page.locator("[name=extra_value]")).to_be_focused()
        await fill(page, extra_value="99")  # it is sent also where Add is not pressed
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#extra .wrong")).to_have_text("shift: must be at most 10")
        await fill(page, extra_name="shift", extra_value="4")
        wanted = {"prompt": "jazz", "audio_format": "mp3", "shift": "4", "track_classes": ["drums", "bass"]}
        assert await sent(page, served) == wanted
        await fill(page, extra_name="no_such_field", extra_value="4")
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#extra .wrong")).to_contain_text("no such field: is not a field of this form")


async def test_a_field_that_the_form_sets_is_not_listed_with_another_value(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await page.get_by_text("More settings").click()
        await fill(page, prompt="jazz", bpm="90")
        for name in ("bpm", "task_id"):
            await fill(page, extra_name=name, extra_value="100")
            for button in ("Add", "Make it"):
                await page.get_by_role("button", name=button, exact=True).click()
                await expect(page.locator("[name=extra_name]")).to_have_attribute("aria-invalid", "true")
            await expect(page.locator("#answer")).to_have_text("The form sets this field already.")
        await expect(page.locator("#extra")).to_be_hidden()
        await fill(page, bpm="", extra_name="bpm")
        await page.get_by_role("button", name="Add", exact=True).click()
        assert await sent(page, served) == {"prompt": "jazz", "bpm": "100", "audio_format": "mp3"}
        assert len(served.client.published) == 1


async def test_a_request_whose_other_fields_are_left_out_is_another_one(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        browser.expected = "502"
        await page.get_by_text("More settings").click()
        await fill(page, prompt="jazz", extra_name="shift", extra_value="4")
        served.client.refusal = Unreachable("no answer")
        tried = []
        page.on("request", lambda each: tried.append(each.post_data_json) if each.method == "POST" else None)
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#answer")).to_contain_text("The broker is unreachable")
        await page.get_by_role("button", name="Leave these out").click()
        served.client.refusal = None
        assert "shift" not in await sent(page, served)
        first, second = tried
        assert first["task_id"] != second["task_id"]


async def test_a_lora_and_a_section_of_new_lines_are_edited_as_they_were_asked_for(tab: OpenTab) -> None:
    section = {"section": "verse 2", "lyrics": "la\nlo"}
    asked: dict[str, Any] = {"source_task_id": "one", "replace_lines": section, "lora": {"path": "mine", "scale": 0.5}}
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        served.board.add_request("first", GenerationRequest(**asked))
        served.board.add_request("second", GenerationRequest(**asked | {"replace_lines": {"la": "lo", "ti": "do"}}))
        served.board.add_request("third", GenerationRequest(prompt="jazz", lora={"path": "mine", "alpha": 8}))
        for name in ("first", "second", "third"):
            await page.locator(f"#job-{name} .open").click()
        await page.locator("#job-first .edit").click()
        await expect(page.get_by_label("What to make")).to_have_value("lines")
        await expect(page.get_by_label("LoRA", exact=True)).to_have_value("mine")
        assert await sent(page, served) == asked | {"source_index": 0, "audio_format": "mp3"}
        await page.locator("#job-second .edit").click()
        await expect(page.get_by_label("New lines")).to_have_value("lo\ndo")
        assert (await sent(page, served))["replace_lines"] == {"la": "lo", "ti": "do"}
        await page.locator("#job-third .edit").click()
        await expect(page.locator("#extra")).to_contain_text("LoRA")
        assert (await sent(page, served))["lora"] == {"path": "mine", "alpha": 8}


async def choose(page: Page, name: str, content: bytes) -> None:
    file: Any = {"name": name, "mimeType": "audio/wav", "buffer": content}
    await page.get_by_label("Or a file of yours").set_input_files(file)


async def test_a_file_of_the_readers_own_is_uploaded_and_becomes_the_source(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await page.get_by_label("What to make").select_option("cover")
        await fill(page, prompt="as jazz", source_task_id="some-job")
        await choose(page, "../my song.WAV", b"RIFF" + bytes(300_000))
        await expect(page.get_by_text("my song.WAV is uploaded.")).to_be_visible()
        published = await sent(page, served)
        ((address, stored),) = served.results.stored.items()
        assert published == {
            "prompt": "as jazz",
            "task_type": "cover",
            "audio_format": "mp3",
            "src_audio_path": address,
        }
        assert re.fullmatch(r"s3://acestep/jobs/uploads/[0-9a-f]{32}/src_audio_path\.wav", address)
        assert stored == b"RIFF" + bytes(300_000)


async def test_a_file_that_is_not_taken_says_why_and_another_one_is(tab: OpenTab) -> None:
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await page.get_by_label("What to make").select_option("cover")
        await choose(page, "long.wav", bytes(MAX_UPLOAD_BYTES + 1))
        await expect(page.get_by_text("long.wav was not uploaded: The file is too large.")).to_be_visible()
        served.results.away, browser.expected = True, "/uploads?name=one.wav"
        await choose(page, "one.wav", b"RIFF")
        await expect(page.get_by_text("one.wav was not uploaded: The storage does not answer.")).to_be_visible()
        served.results.away = False
        await choose(page, "two.wav", b"RIFF")
        await expect(page.get_by_text("two.wav is uploaded.")).to_be_visible()
        assert len(served.results.stored) == 1


def hold_uploads(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Make uploads wait in the storage: returns events that one has arrived there, and that they may go on."""
    arrived, may_go_on = asyncio.Event(), asyncio.Event()
    put = FakeResults.put

    async def slow(results: FakeResults, address: ObjectAddress, content: ObjectContent) -> bool:
        arrived.set()
        await may_go_on.wait()
        return await put(results, address, content)

    monkeypatch.setattr(FakeResults, "put", slow)
    return arrived, may_go_on


async def test_a_request_waits_for_the_end_of_its_upload(tab: OpenTab, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, may_go_on = hold_uploads(monkeypatch)
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await page.get_by_label("What to make").select_option("cover")
        await fill(page, prompt="as jazz")
        await choose(page, "song.wav", b"RIFF")
        await arrived.wait()
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#answer")).to_have_text("Wait until the file is uploaded.")
        assert not served.client.published
        may_go_on.set()
        await expect(page.get_by_text("song.wav is uploaded.")).to_be_visible()
        assert "src_audio_path" in await sent(page, served)


async def begin_upload(page: Page, arrived: asyncio.Event) -> None:
    """Choose the source of a cover, and wait until its upload is held."""
    await page.get_by_label("What to make").select_option("cover")
    await choose(page, "song.wav", b"RIFF")
    await arrived.wait()


async def test_a_file_that_is_too_large_stops_the_upload_of_the_one_before(
    tab: OpenTab, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, may_go_on = hold_uploads(monkeypatch)
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await begin_upload(page, arrived)
        await choose(page, "long.wav", bytes(MAX_UPLOAD_BYTES + 1))
        may_go_on.set()
        await eventually(lambda: bool(served.results.stored))
        await expect(page.get_by_text("long.wav was not uploaded: The file is too large.")).to_be_visible()
        await page.get_by_role("button", name="Make it", exact=True).click()
        await expect(page.locator("#answer")).to_contain_text("Name the job that the song is from.")


async def test_an_upload_neither_delays_nor_changes_a_song_that_is_made_from_a_job_alone(
    tab: OpenTab, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, may_go_on = hold_uploads(monkeypatch)
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        await begin_upload(page, arrived)
        await page.get_by_label("What to make").select_option("variation")
        await fill(page, source_task_id="some-job")
        assert (await sent(page, served))["source_task_id"] == "some-job"
        may_go_on.set()
        address = page.locator("[name=src_audio_path]")
        await expect(address).to_have_value(re.compile("^s3://"))
        await expect(page.locator("[name=source_task_id]")).to_have_value("some-job")
