# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium, Debian's own package, driven by Playwright; and a diary of what went wrong in its pages."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.async_api import async_playwright

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import ConsoleMessage, Page

PACKAGE = "chromium"
_NAMES = (PACKAGE, "chromium-browser", "google-chrome")
_INSTALL_TIMEOUT_S = 900
# Root has no sandbox of its own; a container has little shared memory; nobody is there to press a key before a sound.
_FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required")


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


@asynccontextmanager
async def tab(url: str, *, first: str = "", **context: Any) -> AsyncIterator[Tab]:
    """Open ``url`` in a browser of its own, and fail when the page complained of anything.

    ``first`` is JavaScript that runs before the page's own; ``context`` are Playwright's options for a new context.
    """
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=ensure_chromium(), args=list(_FLAGS))
        try:
            opened = await browser.new_context(**context)
            await opened.add_init_script(first)
            found = Tab(await opened.new_page())
            found.watch(url)
            await found.page.goto(url + "/")
            yield found
        finally:
            await browser.close()
    complaints = [each for each in found.complaints if not found.expected or found.expected not in each]
    assert complaints == [], complaints


def ensure_chromium() -> str:
    """Return Chromium's path, having installed Debian's package if it was missing."""
    with (Path(tempfile.gettempdir()) / f"acestep-install-{PACKAGE}-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _found() or _install()


def _found() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


def _install() -> str:
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    script = f"apt-get update -qq; apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 {PACKAGE}"
    done = subprocess.run(
        [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "/bin/sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_INSTALL_TIMEOUT_S,
    )
    path = _found()
    assert path, f"Chromium is missing; sudo apt-get install {PACKAGE}\n{(done.stdout + done.stderr)[-3000:]}"
    return path
