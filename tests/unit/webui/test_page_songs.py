# SPDX-License-Identifier: Apache-2.0
"""What the page shows of songs and makes from them, in headless Chromium: lyrics, candidates, stretches, families."""

import json
import shlex
import zipfile
from typing import Any

import pytest
from playwright.async_api import Page, expect

from acestep_schemas import examples
from acestep_schemas.events import JobCompleted, WorkerEvent
from acestep_schemas.request import GenerationRequest
from tests.support.browser import OpenTab, holds
from tests.support.page import row, sent, served_page

pytestmark = pytest.mark.asyncio(loop_scope="session")

WORDS = ["Rain", "on", "the", "avenue"]
LYRICS = [
    {
        "text": "Rain on the avenue",
        "start_s": 1.0,
        "end_s": 4.0,
        "tokens": [{"text": word, "start_s": 1.0 + at / 2, "end_s": 1.5 + at / 2} for at, word in enumerate(WORDS)],
    },
    {"text": "<b>Neon</b> in the glass", "start_s": 5.0, "end_s": 8.0, "tokens": []},
    {"text": "夜の街", "start_s": 9.0, "end_s": 11.0, "tokens": [{"text": "夜", "start_s": 9.0, "end_s": 9.5}]},
]


def child_of(task_id: str, field: str = "source_task_id") -> list[dict[str, Any]]:
    """The parents in the event of a job that was made from another one's first song."""
    return [{"task_id": task_id, "index": 0, "field": field}]


async def opened(page: Page, task_id: str) -> None:
    """Open a job's row."""
    await row(page, task_id).locator(".open").click()
    await expect(row(page, task_id).locator(".open")).to_have_attribute("aria-expanded", "true")


async def test_lyrics_light_up_as_they_are_sung_and_a_line_is_heard_when_it_is_chosen(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("sung", served.song("sung", lyrics=LYRICS))
        async with tab(served.url) as browser:
            page = browser.page
            await row(page, "sung").get_by_role("button", name="Play sung", exact=True).click()
            await page.locator("#bar").get_by_role("button", name="Lyrics").click()
            lines = page.get_by_role("list", name="Lines").get_by_role("listitem")
            await expect(lines).to_have_text([str(line["text"]) for line in LYRICS])
            current = page.locator("#sung [aria-current]")
            await holds(page, "document.querySelectorAll('#sung [aria-current] .sung').length > 0")
            await page.locator("#audio").evaluate("audio => { audio.pause(); audio.currentTime = 1.6; }")
            await holds(page, "document.querySelectorAll('#sung [aria-current] .sung').length === 2")
            await expect(current).to_have_text("Rain on the avenue")
            await expect(page.locator("#sung [aria-current] .sung").last).to_have_text("on")
            await page.get_by_role("button", name="夜の街", exact=True).click()
            await expect(current).to_have_text("夜の街")
            assert await page.evaluate("document.querySelector('#audio').currentTime") >= 9
            await page.keyboard.press("ArrowUp")
            await page.keyboard.press("Enter")
            await expect(current).to_have_text("<b>Neon</b> in the glass")
            assert await page.locator("#sung b").count() == 0
            await page.get_by_role("button", name="Close", exact=True).click()
            await expect(page.locator("#lyrics-panel")).to_be_hidden()
            await page.locator("#bar").get_by_role("button", name="Lyrics").click()
            await page.keyboard.press("Escape")
            await expect(page.locator("#lyrics-panel")).to_be_hidden()
            await expect(page.locator("#bar").get_by_role("button", name="Lyrics")).to_be_focused()


async def test_without_times_the_plain_lyrics_are_beside_the_player(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("plain", served.song("plain"), request={"lyrics": "[verse]\nla <i>la</i>"})
        served.complete("silent", served.song("silent"))
        async with tab(served.url) as browser:
            page = browser.page
            await row(page, "plain").get_by_role("button", name="Play plain", exact=True).click()
            await page.keyboard.press("y")
            await expect(page.locator("#plain-lyrics")).to_have_text("[verse]\nla <i>la</i>")
            await expect(page.locator("#lyrics-note")).to_contain_text("Without times")
            await row(page, "silent").get_by_role("button", name="Play silent", exact=True).click()
            await expect(page.locator("#lyrics-note")).to_have_text("This song has no lyrics.")
            await expect(page.locator("#plain-lyrics")).to_be_hidden()


async def test_candidates_stand_side_by_side_with_their_scores_and_kept_ones_play(tab: OpenTab) -> None:
    candidates = [
        {"seed": 2**62, "score": 0.91, "kept": True, "index": 0, "measures": {"lyrics": 0.9, "clipping": 0.00123456}},
        {"seed": 8, "score": 0.7, "kept": True, "index": 1, "measures": {"lyrics": 0.6}},
        {"seed": 9, "score": 0.125, "kept": False, "index": None, "measures": {"clipping": 0.0, "noise": -13.40886}},
    ]
    async with served_page() as served:
        served.complete("best", *(served.song("best", each, seconds=30) for each in (0, 1)), candidates=candidates)
        async with tab(served.url) as browser:
            page = browser.page
            await opened(page, "best")
            table = row(page, "best").get_by_role("table", name="Candidates and their scores", exact=True)
            await expect(table.get_by_role("columnheader")).to_have_text(
                ["Song", "Seed", "Score", "lyrics sung", "clipping (share)", "noise (dB)"]
            )
            rows = table.locator("tbody tr")
            await expect(rows.nth(0).get_by_role("cell")).to_have_text(
                ["song 1 of 2", str(2**62), "0.91", "0.9", "0.00123", "–"]
            )
            await expect(rows.nth(2).get_by_role("cell")).to_have_text(["not kept", "9", "0.13", "–", "0", "-13.4"])
            await table.get_by_role("button", name="song 2 of 2", exact=True).click()
            await expect(page.locator("#now")).to_have_text("best · song 2 of 2")
            await expect(page.locator("#versions")).to_contain_text("2 · 0.70")


async def test_a_stretch_that_is_drawn_on_the_waveform_becomes_a_repaint(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("one", served.song("one"), request={"prompt": "jazz", "lyrics": "la", "audio_format": "flac"})
        async with tab(served.url) as browser:
            page = browser.page
            await opened(page, "one")
            await row(page, "one").get_by_text("Repaint a stretch").click()
            canvas = row(page, "one").locator(".marked")
            await canvas.scroll_into_view_if_needed()
            box = await canvas.bounding_box()
            assert box is not None
            await page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 10)
            await page.mouse.down()
            await page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20, steps=4)
            await page.mouse.up()
            start, end = [float(await row(page, "one").locator(each).input_value()) for each in (".from", ".to")]
            assert start == pytest.approx(3, abs=0.1)
            assert end == pytest.approx(6, abs=0.1)
            await row(page, "one").locator(".to").fill("6.5")
            await row(page, "one").get_by_role("button", name="Repaint this stretch").click()
            await expect(page.get_by_label("From second").first).to_be_focused()
            await expect(page.locator("#source-title")).to_have_text("jazz")
            assert await sent(page, served) == {
                "task_type": "repaint",
                "audio_format": "flac",
                "source_task_id": "one",
                "source_index": 0,
                "repainting_start": str(start).removesuffix(".0"),
                "repainting_end": "6.5",
            }, "the song's own words are taken over by the worker"
            await page.locator("#ask [name=lyrics]").fill("lo")
            assert (await sent(page, served))["lyrics"] == "lo"


async def test_a_stretch_can_be_marked_by_keyboard_where_the_song_plays(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("one", served.song("one", seconds=60))
        async with tab(served.url) as browser:
            page = browser.page
            await row(page, "one").locator(".open").focus()
            await page.keyboard.press("Enter")
            await row(page, "one").get_by_role("button", name="Play the song: one", exact=True).focus()
            await page.keyboard.press("Enter")
            await page.keyboard.press("k")
            await holds(page, "document.querySelector('#audio').paused")
            await page.get_by_role("slider", name="Position in").fill("20")
            await row(page, "one").locator("summary").focus()
            await page.keyboard.press("Enter")
            await row(page, "one").get_by_role("button", name="From here").focus()
            await page.keyboard.press("Enter")
            assert await row(page, "one").locator(".from").input_value() == "20"
            assert await row(page, "one").locator(".to").input_value() == "60"


@pytest.mark.parametrize(
    ("action", "label", "made"),
    [
        ("Extend", "Seconds after it", {"extend_right_s": "30"}),
        ("Variation", "Difference", {"variation": "0.3"}),
        ("Cover", "How close to the source", {"task_type": "cover", "prompt": "jazz"}),
        ("Stems", "What should it sound like?", {"stems": True}),
    ],
)
async def test_a_song_is_the_source_of_another(tab: OpenTab, action: str, label: str, made: dict[str, Any]) -> None:
    async with served_page() as served:
        served.complete("two", *(served.song("two", each) for each in (0, 1)), request={"prompt": "jazz"})
        async with tab(served.url) as browser:
            page = browser.page
            await opened(page, "two")
            await row(page, "two").get_by_role("button", name=f"{action}: song 2 of 2: jazz", exact=True).click()
            await expect(page.get_by_label(label)).to_be_focused()
            published = await sent(page, served)
            assert published == made | {"source_task_id": "two", "source_index": 1, "audio_format": "mp3"}


async def test_make_another_sends_everything_but_the_seed_and_a_copy_has_all(tab: OpenTab) -> None:
    request = {"prompt": "it's jazz", "bpm": 90, "guidance_scale": 5.0, "seed": [7], "model": "turbo"}
    async with served_page() as served:
        served.complete("one", served.song("one"), request=request)
        async with tab(served.url, permissions=["clipboard-read", "clipboard-write"]) as browser:
            page = browser.page
            await opened(page, "one")
            await row(page, "one").get_by_role("button", name="Make another").click()
            await expect(row(page, "one").locator(".said")).to_have_text("Sent: it's jazz")
            await expect(row(page, "one").locator(".said")).to_be_in_viewport()
            (published,) = served.client.published
            assert published.pop("task_id") != "one"
            expected = {name: value for name, value in request.items() if name != "seed"}
            assert published == expected
            await row(page, "one").get_by_role("button", name="Copy as JSON").click()
            await expect(row(page, "one").locator(".said")).to_have_text("Copied.")
            copied = json.loads(await page.evaluate("navigator.clipboard.readText()"))
            assert copied == expected | {"seed": "7"}
            await row(page, "one").get_by_role("button", name="Copy as curl").click()
            await holds(page, "navigator.clipboard.readText().then((text) => text.startsWith('curl'))")
            words = shlex.split(await page.evaluate("navigator.clipboard.readText()"))
            assert words[:4] == ["curl", "-X", "POST", f"{served.url}/jobs"]
            assert json.loads(words[words.index("-d") + 1]) == copied


async def test_a_request_is_edited_with_every_field_also_those_without_a_control(tab: OpenTab) -> None:
    request = {"prompt": "jazz", "bpm": 90, "key_scale": "F# minor", "shift": 5.0, "seed": [7]}
    async with served_page() as served:
        served.complete("one", served.song("one"), request=request | {"vocal_language": "ja", "inference_steps": 20})
        async with tab(served.url) as browser:
            page = browser.page
            await opened(page, "one")
            await row(page, "one").get_by_role("button", name="Edit in the form").click()
            await expect(page.get_by_label("Tempo, bpm")).to_have_value("90")
            await expect(page.get_by_label("Seed")).to_have_value("")
            await expect(page.locator("#extra")).to_contain_text("shift")
            await page.get_by_label("What should it sound like?").fill("slow jazz")
            assert await sent(page, served) == {
                "prompt": "slow jazz",
                "bpm": "90",
                "key_scale": "F# minor",
                "vocal_language": "ja",
                "inference_steps": "20",
                "shift": 5,
                "audio_format": "mp3",
            }
            await page.get_by_role("button", name="Leave these out", exact=True).click()
            assert "shift" not in await sent(page, served)


async def test_lyrics_with_times_are_downloaded_beside_a_song_and_in_the_archive_of_all(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("sung", served.song("sung", lyrics=LYRICS, files=served.lyric_files("sung")))
        away = served.song("away", files=served.lyric_files("away", folder="sung/../../private"))
        served.complete("away", away)
        served.complete("bare", served.song("bare"))
        async with tab(served.url) as browser:
            page = browser.page
            for name in ("sung", "away", "bare"):
                await opened(page, name)
            for kind in ("lrc", "vtt"):
                name = f"Lyrics ({kind.upper()}): the song: sung"
                link = row(page, "sung").get_by_role("link", name=name, exact=True)
                async with page.expect_download() as saving:
                    await link.click()
                saved = await saving.value
                assert saved.suggested_filename == f"sung-0.{kind}"
                assert (await saved.path()).read_bytes() == served.results.stored[f"s3://acestep/jobs/sung/0.{kind}"]
                await expect(row(page, "bare").locator(f".{kind}")).to_be_hidden()
            types = {"lrc": "text/plain; charset=utf-8", "vtt": "text/vtt; charset=utf-8"}
            for path, status in (("sung/0/lrc", 200), ("sung/0/vtt", 200), ("away/0/lrc", 403), ("bare/0/vtt", 404)):
                answer = await page.request.get(f"{served.url}/audio/{path}")
                assert answer.status == status, path
                if status == 200:
                    assert answer.headers["content-type"] == types[path[-3:]]
            async with page.expect_download() as saving:
                await page.locator("#download-all").click()
            with zipfile.ZipFile(await (await saving.value).path()) as archive:
                assert archive.testzip() is None
                missing = [f"away-0.{kind}.missing.txt" for kind in ("lrc", "vtt")]
                songs = ["sung-0.wav", "sung-0.lrc", "sung-0.vtt", "away-0.wav", *missing, "bare-0.wav"]
                assert archive.namelist() == songs
                assert archive.read("sung-0.vtt").startswith(b"WEBVTT")


CODES = "<|audio_code_1|><|audio_code_20|><|audio_code_300|>"


async def copied(page: Page, task_id: str) -> Any:
    """Copy a job's request as JSON; returns it."""
    await page.evaluate("navigator.clipboard.writeText('')")
    await row(page, task_id).get_by_role("button", name="Copy as JSON").click()
    await holds(page, "navigator.clipboard.readText()")
    return json.loads(await page.evaluate("navigator.clipboard.readText()"))


async def test_the_link_to_a_song_is_copied_and_opens_that_song(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("two", *(served.song("two", each) for each in (0, 1)))
        for number in range(20):
            served.complete(f"later-{number}", served.song(f"later-{number}", seconds=0.1))
        async with tab(served.url, permissions=["clipboard-read", "clipboard-write"]) as browser:
            page = browser.page
            await opened(page, "two")
            await row(page, "two").get_by_role("button", name="Copy link: song 2 of 2: two", exact=True).click()
            await expect(row(page, "two").locator(".said")).to_have_text("Copied.")
            link = await page.evaluate("navigator.clipboard.readText()")
            assert link == f"{served.url}/#two/2"
            await page.goto("about:blank")
            await page.goto(link)
            song = row(page, "two").locator(".song").nth(1)
            await expect(song).to_be_focused()
            await expect(song).to_be_in_viewport()
            await page.goto(f"{served.url}/#two/9")  # there is no such song: its job is shown
            await expect(row(page, "two")).to_be_in_viewport()


async def test_lines_of_a_song_are_changed_where_they_stand(tab: OpenTab) -> None:
    lyrics = [{"text": "[verse]", "start_s": 0.0, "end_s": 1.0, "tokens": []}, *LYRICS]
    async with served_page() as served:
        served.complete("sung", served.song("sung", lyrics=lyrics))
        served.complete("bare", served.song("bare"))
        async with tab(served.url) as browser:
            page = browser.page
            await opened(page, "bare")
            await expect(row(page, "bare").locator(".lines")).to_be_hidden()
            await opened(page, "sung")
            await row(page, "sung").get_by_role("button", name="Other lines: the song: sung", exact=True).click()
            after = page.get_by_label("New lines")
            await expect(after).to_be_focused()
            await expect(after).to_have_value("Rain on the avenue\n<b>Neon</b> in the glass\n夜の街")
            await page.get_by_role("button", name="Make it", exact=True).click()
            await expect(page.locator("#answer")).to_have_text("Change at least one line.")
            await after.fill("Rain on the avenue\nNeon in the rain")
            await page.get_by_role("button", name="Make it", exact=True).click()
            await expect(page.locator("#answer")).to_have_text("Give as many new lines as old ones.")
            await expect(after).to_be_focused()
            await after.fill("Rain on the avenue\nNeon in the rain\n朝の街")
            assert await sent(page, served) == {
                "source_task_id": "sung",
                "source_index": 0,
                "audio_format": "mp3",
                "replace_lines": {"<b>Neon</b> in the glass": "Neon in the rain", "夜の街": "朝の街"},
            }


async def test_a_song_from_audio_codes_is_copied_edited_and_made_again_with_them(tab: OpenTab) -> None:
    request = {"prompt": "jazz", "audio_code_string": CODES, "seed": [2**63 - 1]}
    async with served_page() as served:
        served.complete("one", served.song("one"), request=request)
        async with tab(served.url, permissions=["clipboard-read", "clipboard-write"]) as browser:
            page = browser.page
            await opened(page, "one")
            await expect(row(page, "one").locator(".words dl")).to_contain_text("audio codes3 codes")
            again = {"prompt": "jazz", "audio_code_string": CODES}
            assert await copied(page, "one") == again | {"seed": str(2**63 - 1)}
            await row(page, "one").get_by_role("button", name="Make another").click()
            await expect(row(page, "one").locator(".said")).to_have_text("Sent: jazz")
            published = {name: value for name, value in served.client.published[0].items() if name != "task_id"}
            assert published == again
            await row(page, "one").get_by_role("button", name="Edit in the form").click()
            await expect(page.locator("#extra dl")).to_have_text("audio codes3 codes")
            assert (await sent(page, served))["audio_code_string"] == CODES
            await page.get_by_label("Language", exact=True).select_option("ja")
            await expect(page.locator("#extra dl")).to_have_text("オーディオコードコード 3 個")


async def test_another_final_song_is_asked_for_as_its_draft_was_and_planned_anew(tab: OpenTab) -> None:
    draft = {"prompt": "jazz", "thinking": True, "quality": "draft", "batch_size": 2, "inference_steps": 4}
    final: dict[str, Any] = {"prompt": "jazz", "quality": "final", "audio_code_string": CODES, "seed": [7]}
    final |= {"use_cot_metas": False, "use_cot_caption": False, "use_cot_language": False}
    taken = ["prompt", "audio_code_string", "seed", "use_cot_metas", "use_cot_caption", "use_cot_language"]
    async with served_page() as served:
        data = examples.completed().data
        kept = data.model_copy(update={"task_id": "draft", "request": GenerationRequest.model_validate(draft)})
        served.results.ends["draft"] = JobCompleted.of(kept)  # long ago: in storage alone
        notes = [{"field": name, "value": None, "because": "of song 0 of draft"} for name in taken]
        parents = child_of("draft", "quality")
        served.complete("final", served.song("final"), request=final, parents=parents, edits=notes)
        async with tab(served.url, permissions=["clipboard-read", "clipboard-write"]) as browser:
            page = browser.page
            await opened(page, "final")
            found = await copied(page, "final")
            assert (found["seed"], found["audio_code_string"], found["use_cot_metas"]) == ("7", CODES, False)
            await row(page, "final").get_by_role("button", name="Make another").click()
            await expect(row(page, "final").locator(".said")).to_have_text("Sent: jazz")
            again = {name: value for name, value in served.client.published[0].items() if name != "task_id"}
            assert again == {"prompt": "jazz", "thinking": True, "quality": "final"}
            await row(page, "final").get_by_role("button", name="Edit in the form").click()
            await expect(page.get_by_label("Thinking")).to_be_checked()
            edited = await sent(page, served)
            assert (edited["quality"], edited["thinking"], "seed" in edited) == ("final", True, False)


async def test_a_request_that_is_not_to_be_had_is_not_copied_as_nothing(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("one", served.song("one"))
        async with tab(served.url, permissions=["clipboard-read", "clipboard-write"]) as browser:
            page = browser.page
            await opened(page, "one")
            served.board._forget("one")  # as when a hundred others have ended since
            browser.expected = "404"
            await page.evaluate("navigator.clipboard.writeText('before')")
            await row(page, "one").get_by_role("button", name="Copy as JSON").click()
            await expect(row(page, "one").locator(".said")).to_contain_text("No such job has ended")
            await row(page, "one").get_by_role("button", name="Make another").click()
            await expect(page.locator("#copy")).to_be_hidden()
            assert await page.evaluate("navigator.clipboard.readText()") == "before"
            assert served.client.published == []


async def test_the_family_of_a_song_is_linked_in_both_directions(tab: OpenTab) -> None:
    async with served_page() as served:
        served.complete("parent", served.song("parent"), request={"prompt": "the first one"})
        served.complete("child", served.song("child"), request={"prompt": "its cover"}, parents=child_of("parent"))
        served.complete("orphan", served.song("orphan"), parents=child_of("long-ago"))
        async with tab(served.url) as browser:
            page = browser.page
            await opened(page, "parent")
            await row(page, "parent").get_by_role("link", name="its cover", exact=True).click()
            await expect(row(page, "child")).to_be_focused()
            await opened(page, "child")
            await expect(row(page, "child").locator(".family")).to_contain_text("Made from: the first one")
            await opened(page, "orphan")
            link = row(page, "orphan").locator(".family a")
            await expect(link).to_have_text("long-ago")
            await expect(link).to_have_attribute("href", "#long-ago")
            served.complete("second", served.song("second"), request={"prompt": "its twin"}, parents=child_of("parent"))
            await expect(row(page, "parent").locator(".family")).to_contain_text("its cover, its twin")


async def test_a_job_without_words_is_called_by_the_job_that_it_is_made_from(tab: OpenTab) -> None:
    silent = examples.completed().data.metas.model_copy(update={"caption": ""})
    stems = {"prompt": "", "task_type": "extract", "stems": True, "source_task_id": "song"}
    async with served_page() as served, tab(served.url) as browser:
        page = browser.page
        served.complete("parts", served.song("parts"), request=stems, parents=child_of("song", "stems"), metas=silent)
        title = row(page, "parts").get_by_role("heading")
        await expect(title).to_have_text("Stems of song")
        served.complete("song", served.song("song"), request={"prompt": "slow jazz"})
        await expect(title).to_have_text("Stems of slow jazz")
        await row(page, "parts").get_by_role("button", name="Play Stems of slow jazz", exact=True).click()
        await expect(page.locator("#now")).to_have_text("Stems of slow jazz")
        longer = GenerationRequest(source_task_id="song", extend_right_s=30)
        served.board.add_request("longer", longer)
        await expect(row(page, "longer").get_by_role("heading")).to_have_text("Longer version of slow jazz")
        served.complete(
            "loop", request=stems | {"source_task_id": "loop"}, parents=child_of("loop", "stems"), metas=silent
        )
        await expect(row(page, "loop").get_by_role("heading")).to_have_text("Stems of loop")
        await page.get_by_label("Language", exact=True).select_option("ja")
        await expect(title).to_contain_text("パート別")


async def test_another_variation_is_asked_for_anew_and_says_what_it_took_over(tab: OpenTab) -> None:
    varied = {
        "prompt": "jazz",
        "retake_variance": 0.25,
        "retake_seed": 5,
        "seed": [7],
        "bpm": 90,
        "audio_format": "flac",
    }
    edits = [{"field": name, "value": varied[name], "because": "of <b>song</b> 0"} for name in ("prompt", "bpm")]
    async with served_page() as served:
        parents = child_of("first", "variation")
        served.complete("varied", served.song("varied"), request=varied, parents=parents, edits=edits)
        served.complete("whole", served.song("whole"))
        async with tab(served.url) as browser:
            page = browser.page
            await opened(page, "varied")
            await expect(row(page, "varied").locator(".edits li")).to_have_text(
                ["prompt: jazz – of <b>song</b> 0", "tempo: 90 – of <b>song</b> 0"]
            )
            await row(page, "varied").get_by_role("button", name="Make another").click()
            await expect(row(page, "varied").locator(".said")).to_have_text("Sent: jazz")
            again = {name: value for name, value in served.client.published[0].items() if name != "task_id"}
            asked = {"source_task_id": "first", "source_index": 0, "variation": 0.25, "audio_format": "flac"}
            assert again == asked
            await opened(page, "whole")
            await expect(row(page, "whole").get_by_role("button", name="Make final", exact=True)).to_be_hidden()


async def test_stems_are_asked_of_a_base_model_where_a_worker_has_one(tab: OpenTab) -> None:
    async with served_page() as served:
        models = ("acestep-v15-turbo", "acestep-v15-base")
        served.board.add_worker(WorkerEvent.of(examples.worker().data.model_copy(update={"models": models})))
        served.complete("one", served.song("one"))
        async with tab(served.url) as browser:
            page = browser.page
            await expect(page.locator("#models option")).to_have_count(2)
            await opened(page, "one")
            await row(page, "one").get_by_role("button", name="Stems: the song: one", exact=True).click()
            published = await sent(page, served)
            assert (published["stems"], published["model"]) == (True, "acestep-v15-base")
