"""A real browser shows an HTML mail that holds a tag: counted once, and invisible."""
from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess

import pytest

from conftest import eventually
from conftest import register_rows

CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="chromium is not installed (Debian package chromium)")

MAIL = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>mail</title></head>
<body style="margin:20px; background:{background}; color:{colour}; font:16px serif">
<p>Dear John,</p><p>this is our newsletter.</p>{tag}<p>Yours sincerely</p>
</body></html>
"""
# Something else of the same size, and one that can be seen, to prove that the
# comparison of two pictures notices one pixel.
EMPTY = '<span style="display:inline-block;width:1px;height:1px"></span>'
VISIBLE = ('<span style="display:inline-block;width:1px;height:1px;'
           'background:#f00"></span>')
BACKGROUNDS = {"dark": ("#121212", "#eee"), "light": ("#ffffff", "#111"),
               "coloured": ("#2a7f3f", "#fff")}


@pytest.fixture
def show(tmp_path):
    """Open an HTML mail in a new browser; return the picture of it, as PNG."""
    def run(name, html):
        mail, picture = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        mail.write_text(html, encoding="utf-8")
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / ('profile-' + name)}",
            "--window-size=400,300", f"--screenshot={picture}", mail.as_uri()]
        with open(tmp_path / f"{name}.log", "wb") as log:
            browser = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log,
                                       stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                assert browser.wait(60) == 0, (tmp_path / f"{name}.log").read_text()
            finally:
                end_group(browser)
        png = picture.read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        return png
    return run


def end_group(process):
    """End a process that has a session of its own, and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(20)


@pytest.mark.parametrize("background, colour", list(BACKGROUNDS.values()),
                         ids=list(BACKGROUNDS))
def test_a_mail_with_a_tag_looks_like_one_without_and_is_counted_once(
        tracker, serve, show, tmp_path, background, colour):
    register = tmp_path / "register.csv"
    server = serve("--register", register)
    made = tracker("newtag", "--register", register, "--name", "john",
                   "--server", "127.0.0.1", "--port", server.port)
    tag, = register_rows(register)

    def mail(element):
        return MAIL.format(background=background, colour=colour, tag=element)

    with_tag = show("tag", mail(made.stdout.strip()))
    assert int(register_rows(register)[tag]["hits"]) == 1
    assert tag in server.log()
    assert with_tag == show("empty", mail(EMPTY))
    assert with_tag != show("visible", mail(VISIBLE))
    assert int(register_rows(register)[tag]["hits"]) == 1


def test_each_opening_of_the_mail_is_a_hit_that_dump_shows(
        tracker, serve, show, tmp_path):
    register = tmp_path / "register.csv"
    server = serve("--register", register)
    tags = [tracker("newtag", "--register", register, "--name", name,
                    "--server", "127.0.0.1", "--port", server.port,
                    "--path", path).stdout
            for name, path in (("john", "/img/{id}/logo.gif"), ("mary", "/{id}.gif"))]
    for number in (1, 2):
        show(f"mail{number}",
             MAIL.format(background="#fff", colour="#000", tag=tags[0]))
        eventually(lambda: server.log().count("hit ") >= number)
    dumped = tracker("dump", register, "--format", "csv").stdout
    hits = {row["name"]: row["hits"] for row in csv.DictReader(dumped.splitlines())}
    assert hits == {"john": "2", "mary": "0"}
    assert re.search(r"^\w{7}  john +2 ", tracker("dump", register).stdout, re.M)
