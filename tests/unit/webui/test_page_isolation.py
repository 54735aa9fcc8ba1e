# SPDX-License-Identifier: Apache-2.0
"""Tests of the page share a browser: nothing of one reaches the next, not even its crash."""

import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Error

from tests.support.browser import SharedBrowser
from tests.support.page import served_page
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")

LEAVE = """async () => {
    localStorage.setItem("left", "x");
    sessionStorage.setItem("left", "x");
    document.cookie = "left=x; max-age=1000";
    await caches.open("left");
    await new Promise((done) => (indexedDB.open("left").onsuccess = done));
}"""
FIND = """async () => ({
    kept: [localStorage.length, sessionStorage.length, document.cookie],
    stored: [await caches.keys(), await indexedDB.databases()],
    allowed: (await navigator.permissions.query({ name: "clipboard-read" })).state,
})"""


@pytest_asyncio.fixture(loop_scope="session")
async def own_browser() -> AsyncIterator[SharedBrowser]:
    """A browser that nobody else uses, to be killed."""
    browser = SharedBrowser()
    yield browser
    await browser.close()


async def test_a_tab_has_nothing_of_the_one_before_it(shared_browser: SharedBrowser) -> None:
    async with served_page() as served:
        async with shared_browser.tab(served.url, permissions=["clipboard-read"], locale="ja-JP") as first:
            await first.page.evaluate(LEAVE)
            before = await first.page.evaluate(FIND)
        launches = shared_browser.launches
        async with shared_browser.tab(served.url) as second:
            after = await second.page.evaluate(FIND)
            assert await second.page.evaluate("document.documentElement.lang") == "en"
    assert before == {
        "kept": [1, 1, "left=x"],
        "stored": [["left"], [{"name": "left", "version": 1}]],
        "allowed": "granted",
    }
    assert after == {"kept": [0, 0, ""], "stored": [[], []], "allowed": "prompt"}
    assert shared_browser.launches == launches


async def test_a_page_that_crashes_takes_no_other_with_it(own_browser: SharedBrowser) -> None:
    async with served_page() as served:
        async with own_browser.tab(served.url) as browser:
            with pytest.raises(Error, match="crash"):
                await browser.page.goto("chrome://crash")
            browser.expected = "chrome://crash"
        async with own_browser.tab(served.url) as browser:
            assert await browser.page.title() == "Songs · acestep-consumer"
    assert own_browser.launches == 1


async def test_after_a_crash_of_the_browser_the_next_tab_is_in_a_new_one(own_browser: SharedBrowser) -> None:
    async with served_page() as served:
        with pytest.raises(Error, match="closed"):
            await crash(own_browser, served.url)
        async with own_browser.tab(served.url) as browser:
            assert await browser.page.title() == "Songs · acestep-consumer"
    assert own_browser.launches == 2


async def crash(shared: SharedBrowser, url: str) -> None:
    """Kill the browser while a page is open, and go on using the page."""
    async with shared.tab(url) as browser:
        running = browser.page.context.browser
        assert running is not None
        session = await running.new_browser_cdp_session()
        processes = (await session.send("SystemInfo.getProcessInfo"))["processInfo"]
        os.kill(next(each["id"] for each in processes if each["type"] == "browser"), signal.SIGKILL)
        await eventually(lambda: not running.is_connected())
        await browser.page.title()
