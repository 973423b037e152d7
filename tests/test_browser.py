"""A real browser shows an HTML mail that holds a tag: counted once, and invisible."""
from __future__ import annotations

import json

import pytest

from cdp import Browser, chromium
from conftest import eventually
from conftest import hits_of

pytestmark = chromium

MAIL = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>mail</title></head>
<body style="margin:20px; background:{background}; color:{colour}; font:16px serif">
<p>Dear John,</p><p>this is our newsletter.</p>{tag}<p>Yours sincerely</p>
</body></html>
"""
# Something else of the same size, and one that can be seen, to prove that the
# comparison of two pictures notices one pixel.
EMPTY = '<span style="display:inline-block;width:1px;height:1px"></span>'
VISIBLE = EMPTY.replace("1px\"", "1px;background:#f00\"")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a browser."""
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


@pytest.fixture
def show(browser, tmp_path):
    """Open an HTML mail in a fresh tab; return the picture of it, as PNG."""
    def run(name, tag, background="#fff", colour="#000"):
        mail, page = tmp_path / f"{name}.html", browser.page()
        mail.write_text(MAIL.format(background=background, colour=colour, tag=tag))
        page.look(400, 300)
        page.go(mail.as_uri())
        return page.picture()
    return run


@pytest.mark.parametrize("colours", [
    ("#121212", "#eee"), ("#ffffff", "#111"), ("#2a7f3f", "#fff")],
    ids=["dark", "light", "coloured"])
def test_a_mail_with_a_tag_looks_like_one_without_and_each_opening_is_a_hit(
        tracker, tagged, show, tmp_path, colours):
    server, other = tagged("--compose-window", 0)
    made = tracker("newtag", "--name", "john", "--server", "127.0.0.1", "--port",
                   server.port, "--path", "/img/{id}/logo.gif").stdout.strip()
    tag = made.split("/")[4]
    with_tag = show("tag", made, *colours)
    assert with_tag == show("empty", EMPTY, *colours)
    assert with_tag != show("visible", VISIBLE, *colours)
    eventually(lambda: hits_of(tmp_path / "register.csv", tag) == 1)
    assert show("again", made, *colours) == with_tag
    eventually(lambda: hits_of(tmp_path / "register.csv", tag) == 2)
    dumped = json.loads(tracker("dump", "--format", "json").stdout)
    assert {row["id"]: (row["name"], row["hits"]) for row in dumped} == {
        tag: ("john", 2), other: ("", 0)}
