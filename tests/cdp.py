"""A browser to look through: Debian's chromium over --remote-debugging-pipe.

`Browser` is one process, `page()` a fresh tab without cookies or cache. Nothing but the
standard library; messages are JSON with a NUL behind each (Chrome DevTools Protocol).
"""
from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count

import pytest

CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "chrome"))), None)
chromium = pytest.mark.skipif(
    not CHROMIUM, reason="chromium is not installed (Debian package chromium)")
# It wants descriptors 3 and 4; a shell could not count to where they are.
START = """import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe""".split()


class Gone(AssertionError):
    """A page was left while it was asked something."""


class Browser:
    """One process of chromium; a context in which it runs."""

    def __init__(self, profile):
        (ours, self._in), (self._out, theirs) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (ours, theirs)]
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", START, *map(str, high), CHROMIUM, *FLAGS,
             f"--user-data-dir={profile}"], pass_fds=high, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        for end in (ours, theirs, *high):
            os.close(end)
        self._numbers, self._rest, self._pages = count(1), b"", {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)

    def call(self, method, session=None, seconds=20, **parameters):
        """Return the result of a command; what else is said meanwhile is kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message.update({"sessionId": session} if session else {})
        os.write(self._in, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            for said in self._messages(deadline, method):
                if said.get("id") == number:
                    wrong = said.get("error", {}).get("message", "")
                    if re.search("navigated|context", wrong):
                        raise Gone(wrong)
                    assert "error" not in said, f"{method}: {wrong}"
                    return said["result"]

    def _messages(self, deadline, method):
        ready, _, _ = select.select([self._out], [], [], deadline - time.monotonic())
        assert ready, f"no answer to {method}"
        *messages, self._rest = (self._rest + os.read(self._out, 1 << 20)).split(b"\0")
        for said in map(json.loads, messages):
            page = self._pages.get(said.get("sessionId"))
            if page and "method" in said:
                page.hear(said["method"], said["params"])
            yield said

    def page(self, beside=None):
        """Open a tab; it shares cookies and connections only with those beside it."""
        context = beside.context if beside else self.call(
            "Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", newWindow=True,
                           browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target,
                            flatten=True)["sessionId"]
        self._pages[session] = page = Page(self, session, context)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        return page


class Page:
    """One tab: messages is what its console said, requests the URLs it asked for."""

    def __init__(self, browser, session, context):
        self._browser, self._session, self.context = browser, session, context
        self.messages, self.requests = [], []

    def call(self, method, **parameters):
        """Return the result of a command to this tab."""
        return self._browser.call(method, self._session, **parameters)

    def hear(self, method, told):
        """Note what the console and the network tell."""
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown",
                        "Log.entryAdded", "Page.javascriptDialogOpening"):
            self.messages.append(json.dumps(told))

    def go(self, url):
        """Open a URL, and wait until it and its images are loaded."""
        error = self.call("Page.navigate", url=url).get("errorText")
        assert not error, f"{url}: {error}"
        self.until("document.readyState == 'complete' && location != 'about:blank'")

    def evaluate(self, code):
        """Return the value of some script, of a promise what it comes to."""
        done = self.call("Runtime.evaluate", expression=code, returnByValue=True,
                         awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, code, seconds=10):
        """Return the first true value of some script; fail after so many seconds."""
        deadline, value = time.monotonic() + seconds, None
        while not value:
            assert time.monotonic() < deadline, f"not within {seconds} s: {code}"
            with suppress(Gone):
                value = self.evaluate(code)
            time.sleep(0.03 * (not value))
        return value

    def click(self, selector):
        """Click on something, which may lead elsewhere."""
        with suppress(Gone):
            self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def look(self, width=1100, height=800, dark=False):
        """Have a window of this size, and a wish for dark pages or not."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def picture(self, whole=False):
        """Return a picture of the window, or of the whole page, as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])
