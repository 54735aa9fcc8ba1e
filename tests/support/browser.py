# SPDX-License-Identifier: Apache-2.0
"""One headless Chromium for each process of pytest, driven by Playwright; each test has a context of its own in it.

Tests that use ``tab`` run in the session's event loop, to which the browser belongs, and so say
``pytestmark = pytest.mark.asyncio(loop_scope="session")``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page

# Chromium without what only a window needs: a page takes a third of the processor's time.
SHELL: Final = "chromium-headless-shell"
_NAMES: Final = (SHELL, "chromium", "chromium-browser", "google-chrome")
_INSTALL_TIMEOUT_S: Final = 900
WITHIN_MS: Final = 30_000
# Root has no sandbox of its own; a container has little shared memory; nobody is there to press a key before a sound.
_FLAGS: Final = ("--no-sandbox", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required")


@dataclass
class Tab:
    """A page, and what it complained of: console errors, exceptions, violations of its policy, requests elsewhere."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    expected: str = ""
    """Complaints with this text in them are the browser's own words for what the test does to it."""

    def watch(self, origin: str) -> None:
        """Write complaints down from now on; ``origin`` is the only server that it may talk to."""
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._check(request.url, origin))

    def _check(self, url: str, origin: str) -> None:
        if not url.startswith(origin):
            self.complaints.append(f"foreign: {url}")

    def _hear(self, message: ConsoleMessage) -> None:
        # Tests read the canvas back; the page does not.
        if message.type in {"error", "warning"} and "readback" not in message.text:
            where = message.location.get("url", "")
            self.complaints.append(f"{message.type}: {message.text} {where}".rstrip())


class OpenTab(Protocol):
    """Opens a page in a context of its own: nothing is in its storage, its cache or its cookies, nothing is allowed."""

    def __call__(self, url: str, *, first: str = "", **context: Any) -> AbstractAsyncContextManager[Tab]:
        """Open ``url``; at the end, close it and fail when the page complained of anything.

        ``first`` is JavaScript that runs before the page's own; ``context`` are Playwright's options for a new context.
        """


class SharedBrowser:
    """A browser that is started when it is first needed, and anew when it has died. ``launches`` counts both."""

    def __init__(self) -> None:
        self.launches = 0
        self._running = AsyncExitStack()
        self._browser: Browser | None = None

    @asynccontextmanager
    async def tab(self, url: str, *, first: str = "", **context: Any) -> AsyncIterator[Tab]:
        """See ``OpenTab``."""
        async with await self._context(**context) as opened:
            await opened.add_init_script(first)
            found = Tab(await opened.new_page())
            found.watch(url)
            await found.page.goto(url + "/")
            yield found
        complaints = [each for each in found.complaints if not found.expected or found.expected not in each]
        assert complaints == [], complaints

    async def close(self) -> None:
        """End the browser and its driver."""
        self._browser = None
        await self._running.aclose()

    async def _context(self, **options: Any) -> BrowserContext:
        if self._browser is None or not self._browser.is_connected():
            await self.close()
            self._browser = await self._launch()
        return await self._browser.new_context(**options)

    async def _launch(self) -> Browser:
        from playwright.async_api import async_playwright, expect  # noqa: PLC0415 - most processes open no page

        expect.set_options(timeout=WITHIN_MS)
        self.launches += 1
        driver = await self._running.enter_async_context(async_playwright())
        browser = await driver.chromium.launch(executable_path=ensure_chromium(), args=list(_FLAGS))
        return await self._running.enter_async_context(browser)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_browser() -> AsyncIterator[SharedBrowser]:
    """The process's browser."""
    browser = SharedBrowser()
    yield browser
    await browser.close()


@pytest.fixture
def tab(shared_browser: SharedBrowser) -> OpenTab:
    """Opens pages, each as if in a browser of its own."""
    return shared_browser.tab


async def holds(page: Page, expression: str) -> None:
    """Wait until a JavaScript expression is true. Playwright's own wait would need `eval`, which the page forbids."""
    found = await page.evaluate(
        f"""async () => {{
            for (const until = performance.now() + {WITHIN_MS}; performance.now() < until; ) {{
                if (await ({expression})) return true;
                await new Promise((done) => setTimeout(done, 10));
            }}
            return false;
        }}"""
    )
    assert found, expression


def ensure_chromium() -> str:
    """Return Chromium's path, having installed Debian's package if it was missing."""
    with (Path(tempfile.gettempdir()) / f"acestep-install-chromium-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path := shutil.which(SHELL)) is not None:
            return path
        said = _install(SHELL)
        # Older systems do not have the shell as a package.
        if not any(map(shutil.which, _NAMES)):
            said = _install("chromium")
        found = next(filter(None, map(shutil.which, _NAMES)), None)
        assert found, f"Chromium is missing; sudo apt-get install {SHELL}\n{said[-3000:]}"
        return found


def _install(package: str) -> str:
    """Install a package of the system where that is possible; returns what was printed."""
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    script = f"apt-get update -qq; apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 {package}"
    done = subprocess.run(
        [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "/bin/sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_INSTALL_TIMEOUT_S,
    )
    return done.stdout + done.stderr
