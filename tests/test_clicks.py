"""Clicks: where a link leads, who followed it, and what of a mail changes for it."""
from __future__ import annotations

import base64
import email
import json
import os
import quopri
import random
import re
import subprocess
import time
from html import unescape
from pathlib import Path

import pytest
from conftest import exchange, get, launch, log_rows, shown, status_of
from smtp_server import FakeSmarthost
from test_relay import BOB, CARL, HEAD, Client, relaying

import mailtracker
from mailtracker import (
    Click, Event, Files, Judge, Links, Request, Tag, destination, link_id, with_pixel)

A, B, C = "bcd" * 7, "fgh" * 7, "jkm" * 7
HOME, OFFICE, CAFE = "81.105.41.164", "198.51.100.7", "203.0.113.9"
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
NOW = 1_800_000_000
AGENT = {"User-Agent": FIREFOX, "Accept-Language": "en"}
LINK = re.compile(r"/(\w{21})~(\w{8})")


# -- where a link leads ---------------------------------------------------------

KEPT = [  # as they are, byte for byte
    "https://x.org", "http://x.org/", "https://x.org/a/b.html", "HTTPS://X.Org/A",
    "https://x.org:8443/a", "http://x.org:1/", "https://x.org:65535", "http://x.org?q",
    "https://x.org/?a=1&b=2", "https://x.org/?a=1&amp;b=2", "https://x.org/?a=%26&b=%",
    "https://x.org/a,b;c=d", "https://x.org/#top", "https://x.org#top", "http://a_b.c/",
    "https://x.org/?u=https://y.org/?v=http://z.org", "https://x.org//y.org",
    "https://x.org/%0d%0aSet-Cookie:a=b", "https://x.org/a%20b", "https://x.org./",
    "https://192.0.2.1/", "https://[2001:db8::1]/", "http://[::1]:8080/x", "http://h/",
    "https://x.org/(a)!*'$+", "https://x.org/~ann/", "https://x.org/a[1]?b[]=2",
    "https://x.org/?mail=ann@y.org", "https://xn--mller-kva.de/", "https://x.org/a:b",
    "https://x.org/../../etc", "https://x.org/?", "https://x.org/a?b?c=/../d",
    f"https://x.org/{'a' * 2034}"]
WRITTEN = {  # in ASCII
    "https://x.org/ä": "https://x.org/%C3%A4", " https://x.org/ ": "https://x.org/",
    "https://müller.de/": "https://xn--mller-kva.de/", "http://例え.jp":
    "http://xn--r8jz45g.jp", "https://x.org/a|b^c": "https://x.org/a%7Cb%5Ec",
    "https://x.org/?{a}": "https://x.org/?%7Ba%7D", "http://ｘ.org/": "http://x.org/",
    "https://x.org/?q=\u202e": "https://x.org/?q=%E2%80%AE"}
REFUSED = [
    "", "x.org", "//x.org/", "/a", "#a", "?a", "mailto:a@x.org", "tel:1", "cid:a@b",
    "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\tscript:alert(1)",
    "data:text/html,x", "data:text/html;base64,PHA+", "vbscript:x", "file:///etc",
    "ftp://x.org/", "ws://x.org", "blob:https://x.org/1", "view-source:https://x.org",
    "about:blank", "intent://x#Intent;end", "https:x.org", "https:/x.org", "https://",
    "https:///x.org", "https://?a", "https://#a", "https://:80/", "http:\\\\x.org",
    "https://x.org\\@y.org/", "https://x.org\\y", "https://ann@x.org/",
    "https://ann:pw@x.org/", "https://@x.org/", "https://x.org:y@z.org/",
    "https://x.org@y.org", "https://x.org:0/", "https://x.org:65536/",
    "https://x.org:99999999/", "https://x.org:80a/", "https://x.org:-1/",
    "https://x.org:/", "https://x..org/", "https://.x.org/", f"https://{'a' * 64}.org/",
    f"https://{'a.' * 127}org/", "https://x.org\r\nLocation: https://y.org",
    "https://x.org/\r\n\r\n<p>", "https://x.org/\n/", "https://x.org/a b",
    "https://x.org/\0", "https://x.org/\x7f", "https://x .org/", "https://x.org%2f/",
    "https://x%00.org/", "https://[::1/", "https://[x]/", "https://::1/",
    'https://x.org/"onclick="', "https://x.org/<script>", "https://x.org/\ufffd",
    "https://x.org/\udcff", "https://straße.de/", f"https://x.org/{'a' * 2040}",
    "https://x.org/" + "ä" * 400, "https://<x>.org/", "https://x.org;y/",
    "https://x.org:8\u0660/", "http\u017f://x.org/", "https://x.org\uff0fy.org/",
    "https://x\u3000.org/", "https://x.org\uff20y.org/", "https://x\uff05.org/"]


@pytest.fixture(scope="module")
def links(tmp_path_factory):
    """Return where links lead, after newtag has made one to each that is taken."""
    folder = tmp_path_factory.mktemp("links")
    wanted = [*KEPT, *WRITTEN]
    done = launch(subprocess.run, "newtag", "--server", "https://t.org", "--format",
                  "url", *(f"--link={url}" for url in wanted), cwd=folder, check=True,
                  capture_output=True, text=True)
    tag, *made = done.stdout.splitlines()
    tag_id = tag[len("https://t.org/"):-len(".gif")]
    assert {url.rpartition("~")[0] for url in made} == {f"https://t.org/{tag_id}"}
    return folder, tag_id, dict(zip([url[-8:] for url in made],
                                    [*KEPT, *WRITTEN.values()]))


@pytest.mark.parametrize("url", REFUSED, ids=ascii)
def test_what_no_link_should_lead_to_is_refused(url, tmp_path, run):
    with pytest.raises(ValueError):
        destination(url)
    if "\0" not in url and "\udcff" not in url:
        args = "newtag", "--register", tmp_path / "r.csv", f"--link={url}"
        assert run(*args)[0] == 2 and not [*tmp_path.iterdir()]


def location(answer):
    """Return the status of an answer and its Location, if there is one."""
    head = answer.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    return status_of(answer), [line[10:] for line in head if line[:10] == "Location: "]


HOSTILE = [  # {t} is a tag, {l} a link to https://x.org/?a=1&b=2
    ("/{t}~{l}?url=https://evil.org", 302), ("/{t}~{l}?https://evil.org", 302),
    ("/{t}~{l}?", 302), ("//evil.org/{t}~{l}", 302), ("/https://evil.org/{t}~{l}", 302),
    ("http://evil.org/{t}~{l}", 302), ("HTTPS://evil.org:1/{t}~{l}?x", 302),
    ("/{t}%7E{l}", 302), ("/{t}%7e{l}", 302), ("/a/b/{t}~{l}", 302), ("/~{l}", 302),
    ("/a/~b/{t}~{l}", 302), ("/nobody~{l}", 302), ("/" + B + "~{l}", 302),
    ("/{t}.gif~{l}", 302), ("/%0d%0aLocation:x/{t}~{l}", 302), ("/{t}'~{l}", 302),
    ("/{t}~{l}/", 200), ("/{t}~{l}.gif", 404), ("/{t}~{l}%0d%0aX:y", 404),
    ("/{t}~{l}%00", 404), ("/{t}~{l}%20", 404), ("/{t}~{l}#x", 404), ("/{t}~", 404),
    ("/{t}~x", 404), ("/{t}~bbbbbbbb", 404), ("/{t}~bbbbbbbb~{l}", 302),
    ("/{t}~{l}~bbbbbbbb", 200), ("/{t}~%7E{l}", 302), ("/{t}%257E{l}", 200),
    ("/{t}~https:evil.org", 404), ("/{t}~//evil.org", 200), ("/{t}~https://evil", 200),
    ("/{t}~javascript:alert(1)", 404), ("/{t}~\\evil.org", 404),
    ("/{t}~@evil.org", 404),
    ("/{t}~aHR0cHM6Ly9ldmlsLm9yZw==", 404), ("/{t}~" + "b" * 4000, 404),
    ("/~" + "~" * 4000, 200), ("/{t}~..", 404), ("/{t}~../{l}", 200),
    ("/{t}/~{l}", 302),
    ("/{t}~{l}/x.gif", 200), ("/{t}~LINK,url,created", 404), ("/{t}~{L}", 404),
    ("/~~{l}", 302), ("/{t}~'+{l}", 404), ("/{t}~{l};x", 404), ("/{t}~{l}&x=1", 404),
    ("/%7E%7E%7E", 200), ("/~", 200), ("/~/", 200), ("/%7", 200), ("/%7e", 200),
    ("/u/{t}~{l}", 302), ("/health~{l}", 302), ("/<script>~{l}", 302),
    ("/{t}~<script>", 404), ("/{t}~%{l}", 404), ("/" + "b" * 40 + "~{l}", 302)]


def test_a_location_is_a_stored_address_byte_for_byte_or_there_is_none(links, serve):
    folder, tag, leads = links
    server = serve("--compose-window", 0, cwd=folder)
    assert len(HOSTILE) >= 60 and len(leads) >= 40
    for link, url in leads.items():
        assert location(exchange(server, get(f"/{tag}~{link}".encode()))) == (
            302, [url])
    link, url = next(item for item in leads.items() if item[1].endswith("a=1&b=2"))
    for path, status in HOSTILE:
        for client in tag, B:
            target = path.replace("{t}", client).replace("{l}", link).replace(
                "{L}", link.upper())
            answer = exchange(server, get(
                target.encode(), b"X-Forwarded-Host: evil.org",
                b"Referer: https://evil.org/", b"X-Original-URL: https://evil.org/"))
            assert location(answer) == (status, [url] * (status == 302)), target
            assert b"evil" not in answer and b"script" not in answer
    assert {row["detail"][:8] for row in log_rows(folder / "register.csv")
            if row["event"] == "clicked"} == {*leads}
    server.assert_unharmed()


def test_only_a_get_counts_and_every_answer_is_kept_nowhere(links, serve):
    folder, tag, leads = links
    server, (link, url) = serve("--compose-window", 0, cwd=folder), [*leads.items()][1]
    before = len(log_rows(folder / "register.csv"))
    for method, status in [("HEAD", 302), ("POST", 405), ("PUT", 405), ("DELETE", 405),
                           ("OPTIONS", 405), ("PATCH", 405)]:
        answer = server.request(method, f"/{tag}~{link}")
        assert answer[0] == status, method
        assert answer[1]["Location"] == (url if method == "HEAD" else None)
    for path in f"/{tag}~{link}", f"/{tag}~bbbbbbbb", f"/{tag}.gif":
        _, headers, body = server.request("HEAD", path)
        assert body == b"" and headers["Cache-Control"].startswith("no-store, ")
        assert headers["X-Robots-Tag"] == "noindex" and headers["Connection"] == "close"
        assert headers["Set-Cookie"] is None
    assert len(log_rows(folder / "register.csv")) == before


# -- the file of links ------------------------------------------------------------


def test_one_address_has_one_link_and_two_that_share_letters_have_two(
        files, monkeypatch):
    monkeypatch.setattr(mailtracker, "link_id", lambda url, number=0: (
        "bcdfghjk" if number == 0 else link_id(url, number)))
    first, second = Links(files.links), Links(files.links)
    made = first.add(["https://x.org/1", "https://x.org/2", "https://x.org/1"])
    assert made["https://x.org/1"] == "bcdfghjk" != made["https://x.org/2"]
    text = Path(files.links).read_text()
    assert text.startswith("link,url,created\nbcdfghjk,https://x.org/1,20")
    assert {**second.add(["https://x.org/2"]),
            **second.add(["https://x.org/1"])} == made
    assert Path(files.links).read_text() == text
    assert os.stat(files.links).st_mode & 0o777 == 0o600
    assert second.find(b"bcdfghjk") == b"https://x.org/1"


def test_whatever_becomes_of_the_file_a_link_leads_to_what_it_holds(files):
    path, ours, theirs = Path(files.links), Links(files.links), Links(files.links)
    a, b, c = (f"https://x.org/{name},{name}" for name in "abc")
    links = theirs.add([a])
    line = path.read_bytes()

    def leads():
        return [ours.find(link.encode()).decode() for link in links.values()]

    assert ours.find(b"bbbbbbbb") == b"" and leads() == [a]
    with path.open("ab") as file:
        file.write(b"hjkhjkhj,https://x.org/to")  # torn
    assert ours.find(b"hjkhjkhj") == b""
    links.update(theirs.add([b]))
    assert leads() == [a, b] and ours.find(b"hjkhjkhj") == b""
    path.unlink()
    assert leads() == [a, b]
    links.update(theirs.add([c]))  # a new file
    assert leads() == ["", "", c]
    path.write_bytes(line)
    assert leads() == [a, "", ""]
    other = line.replace(a.encode(), b"https://y.org/and-longer").replace(
        b"\n", b"\nhjkhjkhj,https://z.org/,2026-11-25T08:00:00Z\n", 1)
    path.write_bytes(other)  # it is the same file, and goes on behind what was read
    assert leads() == ["https://y.org/and-longer", "", ""]
    assert ours.find(b"hjkhjkhj") == b"https://z.org/"
    for odd in (b"", b"\xff\n\0\n", b"bcdfghjk,javascript:x,2026-11-25T08:00:00Z\n",
                b"bcdfghjk,https://x.org/\r,2026-11-25T08:00:00Z\n", b"x" * 100_000):
        path.write_bytes(odd)
        assert leads() == ["", "", ""] and ours.find(b"bcdfghjk") == b""
    path.unlink()
    os.mkfifo(path)
    assert leads() == ["", "", ""]
    with pytest.raises(mailtracker.TrackerError):
        theirs.add(["https://y.org/"])


def test_who_adds_at_the_same_time_gets_the_same_links(files):
    code = ("import sys, json, mailtracker as m; print(json.dumps(m.Links(sys.argv[1])"
            ".add([f'https://x.org/{n}' for n in range(200)])))")
    python = [mailtracker.sys.executable, "-c", code, files.links]
    where = Path(mailtracker.__file__).parent
    adding = [subprocess.Popen(python, cwd=where, stdout=subprocess.PIPE)
              for _ in range(4)]
    answers = [process.communicate()[0] for process in adding]
    assert len({*answers}) == 1 and len(json.loads(answers[0])) == 200
    assert len(Path(files.links).read_text().splitlines()) == 201


def test_strangers_asking_for_unknown_links_cost_a_look_each(files):
    Path(files.links).write_text("link,url,created\n" + "".join(
        f"{link_id(str(n))},https://x.org/{n},2026-11-25T08:00:00Z\n"
        for n in range(100_000)))
    links = Links(files.links)
    assert links.find(link_id("7").encode()) == b"https://x.org/7"
    begun = time.process_time()
    for _ in range(1000):
        assert links.find(b"zzzzzzzz") == b""
    assert time.process_time() - begun < 0.5


# -- who it was ---------------------------------------------------------------------


def clicked(judge, link, address=HOME, when=NOW, tag=A, **more):
    found, overruled = judge.judge(tag, when, Request(FIREFOX, address), click=Click(
        link, **more))
    return f"{found.verdict} {found.reason}", [old.detail[:8] for old in overruled]


@pytest.mark.parametrize("address, agent, age, click, expected", [
    (HOME, FIREFOX, None, Click("b"), "human browser"),
    (HOME, FIREFOX, 5, Click("b"), "machine fast"),
    (HOME, FIREFOX, 29, Click("b"), "machine early"),
    (HOME, FIREFOX, 31, Click("b"), "human browser"),
    (HOME, FIREFOX, 60, Click("b", has_language=False), "unknown no-language"),
    (HOME, FIREFOX, 61, Click("b", has_language=False), "human browser"),
    (HOME, FIREFOX, None, Click("b", has_language=False), "human browser"),
    (HOME, FIREFOX, -1, Click("b", has_language=False), "human browser"),
    (HOME, FIREFOX, 99, Click("b", is_opened=True), "human opened"),
    (HOME, "curl/8", 99, Click("b", is_opened=True), "machine http-library"),
    ("40.107.1.1", FIREFOX, 9999, Click("b"), "machine microsoft-gateway"),
    ("40.94.1.1", FIREFOX, None, Click("b"), "machine safe-links"),
    ("40.97.1.1", FIREFOX, 9999, Click("b"), "machine mail-network"),
    ("40.97.1.1", "curl/8", None, Click("b"), "machine http-library")])
def test_a_click_has_its_verdict_and_reason(address, agent, age, click, expected):
    request = Request(agent, address)
    found = mailtracker.judge_click(request, click, age)
    assert " ".join(found) == expected
    assert Judge().judge(A, NOW, request, age, click=click) == (found, [])


@pytest.mark.parametrize("steps, expected", [
    ([("1", 0), ("2", 0)], ["1"]), ([("1", 0), ("1", 0), ("1", 1), ("1", 2)], []),
    ([("1", 0), ("2", 1)], []), ([("1", 0), ("2", 1), ("3", 2)], ["1", "2"]),
    ([("1", 0), ("2", 2), ("3", 4)], []), ([("1", 0), ("2", 9), ("3", 18)], []),
    ([("1", 0), ("2", 1), ("3", 2), ("4", 3), ("4", 3)], ["1", "2"]),
    ([("1", 2), ("2", 1), ("3", 0)], ["1", "2"])])
def test_several_links_at_once_are_a_scanner_also_in_retrospect(steps, expected):
    judge, overruled = Judge(), []
    for link, second in steps:
        found, old = clicked(judge, link * 8, when=NOW + second)
        overruled += [each[0] for each in old]
        assert (found == "machine burst") == bool(overruled)
    assert overruled == expected


def test_a_burst_is_of_one_tag_and_one_network():
    judge = Judge()
    for number in range(9):
        link, alone = f"{number:08}", ("human browser", [])
        assert clicked(judge, link, f"81.{number}.1.1") == alone
        assert clicked(judge, link, tag=f"b{number}") == alone
    assert clicked(judge, "x" * 8, "81.3.1.9") == ("machine burst", ["00000003"])


def test_a_reader_in_gmail_who_clicks_at_home_is_two_networks_and_one_person():
    judge = Judge()
    proxy = Request("Mozilla/5.0 (via ggpht.com GoogleImageProxy)", "66.249.84.1")
    assert judge.judge(A, NOW, proxy)[0].verdict == "proxy"
    assert clicked(judge, "b" * 8, when=NOW + 3) == ("human browser", [])


def test_ones_own_clicks_are_ones_own_and_a_damaged_tag_just_before_is_a_probe():
    judge = Judge(lambda address: address == OFFICE)
    assert clicked(judge, "b" * 8, OFFICE)[0] == "self own-network"
    own = judge.judge(A, NOW, Request(FIREFOX, HOME), None, True, Click("b" * 8))
    assert own[0].reason == "composing"
    assert clicked(judge, "b" * 8)[0] == "self sender-client"
    judge.stray(f"{A}%27".encode(), CAFE, NOW)
    assert clicked(judge, "b" * 8, CAFE)[0] == "machine probe"


def test_memory_of_clicks_is_bounded_and_soon_empty(monkeypatch):
    monkeypatch.setattr(Judge, "MOST_TAGS", 100)
    judge = Judge()
    for n in range(1000):
        clicked(judge, "b" * 8, f"81.1.{n % 250}.1", tag=f"b{n}")
        clicked(judge, "b" * 8, f"81.{n % 250}.1.1")
    assert len(judge._clicks) <= 100 and max(map(len, judge._clicks.values())) <= 16
    judge.forget_old(NOW + 61)
    assert not judge._clicks


# -- what becomes of it: register, log, dump --------------------------------------


class Tracked:
    """A server with a tag, links, and readers anywhere."""

    def __init__(self, serve, run, folder, *args, sent=""):
        self.files, self.run = Files(str(folder / "register.csv")), run
        self.urls = [f"https://x.org/{n}" for n in range(4)]
        mailtracker.add_tags(self.files, [(A, "ann"), (B, "bob")], mailtracker.Making(
            "2026-01-01T00:00:00Z", sent, "sending" if sent else ""))
        self.links = [*Links(self.files.links).add(self.urls).values()]
        self.start = lambda: serve("--register", self.files.register, "--trusted-proxy",
                                   "127.0.0.1", *args)
        self.server = self.start()

    def click(self, number, address=HOME, tag=A, **headers):
        """Follow a link; return where it leads."""
        answer = self.server.get(f"/{tag}~{self.links[number]}", {
            **AGENT, "X-Forwarded-For": address, **headers})
        assert answer[0] == 302
        return answer[1]["Location"]

    def hit(self, address=HOME, agent=FIREFOX):
        """Fetch the pixel of the first tag."""
        self.server.get(f"/{A}.gif", {"User-Agent": agent, "X-Forwarded-For": address})

    def events(self):
        """Return what the log says of clicks and verdicts."""
        return [(e.event, e.verdict, e.reason, e.hits, e.opens)
                for e in mailtracker.read_log(self.files.log)
                if e.event in ("hit", "clicked", "verdict")]

    def row(self, tag=A):
        """Return what is known of a tag, by every way to find out."""
        row = shown(self.files)[tag]
        for path in "register", "bak":  # the log alone, then the register as well
            if os.path.exists(getattr(self.files, path)):
                os.unlink(getattr(self.files, path))
        mailtracker.create_register(self.files)  # as a settle does, but in 2 s
        assert self.run("settle", "--register", self.files.register) == (0, "", "")
        assert {**shown(self.files)[tag], "status": ""} == {**row, "status": ""}
        assert self.run("settle", "--register", self.files.register)[0] == 0
        assert [*self.rejudged()] == []
        for tag_id, known in mailtracker.read_register(self.files).tags():
            assert str(known.opens) == shown(self.files)[tag_id]["opens"]
        return row["hits"], row["opens"], row["last_open"] != "", row.get("status", "")

    def rejudged(self):
        """Return what a rejudge of the log would append."""
        tags = dict(mailtracker.read_register(self.files).tags())
        return mailtracker.rejudge(
            lambda word: mailtracker.lines_of_log(self.files.log, word), tags)


@pytest.fixture
def tracked(serve, run, tmp_path):
    """Return what starts a server with a tag and links."""
    return lambda *args, **more: Tracked(serve, run, tmp_path, *args, **more)


def test_a_first_click_is_an_open_and_later_ones_are_not(tracked):
    it = tracked(sent="2026-01-02T00:00:00Z")
    assert it.click(0) == it.urls[0] and it.click(1, OFFICE) == it.urls[1]
    it.hit()
    assert it.click(2, CAFE) == it.urls[2]
    assert it.events() == [
        ("clicked", "human", "browser", 0, 1), ("clicked", "human", "opened", 0, 1),
        ("hit", "human", "browser", 1, 2), ("clicked", "human", "opened", 1, 2)]
    assert it.server.stop() == 0
    assert "1 hit counted" in it.server.log()
    assert it.row() == ("1", "2", True, "sent")


def test_a_click_alone_makes_of_a_mail_on_its_way_one_that_was_sent(tracked):
    it = tracked(sent="2026-01-02T00:00:00Z")
    it.click(0)
    it.click(0, **{"User-Agent": "curl/8"}, tag=B)
    it.server.stop()
    assert it.row() == ("0", "1", True, "sent")
    assert it.row(B) == ("0", "0", False, "sending")


def test_a_scanner_that_follows_all_links_has_opened_nothing(tracked):
    it = tracked()
    for number in range(4):
        it.click(number, OFFICE)
    events = it.events()
    assert events[-1][:4] == ("clicked", "machine", "burst", 0)
    assert events.count(("verdict", "machine", "burst", 0, 0)) in (1, 2)
    it.server.stop()
    assert it.row() == ("0", "0", False, "")
    it.server = it.start()
    it.click(0, HOME)
    it.server.kill()
    assert it.row() == ("0", "1", True, "")


def test_what_is_known_survives_restarts_lost_logs_and_goes_with_its_tag(tracked):
    it = tracked("--keep-address", "none", "--keep-agent", "no")
    it.click(0)
    it.click(0, tag=B, DNT="1")
    assert [row["detail"] + row["address"] for row in log_rows(Path(it.files.register))
            if row["event"] == "clicked"] == [it.links[0]] * 2
    it.server.stop()
    os.unlink(it.files.log)
    for start in True, False:
        if start:
            it.server = it.start()
            assert it.click(1) == it.urls[1]
            it.server.stop()
        rows = shown(it.files)
        assert [(rows[t]["hits"], rows[t]["opens"]) for t in (A, B)] == [("0", "1")] * 2
        Path(it.files.bak).unlink(missing_ok=True)
        assert it.run("settle", "--register", it.files.register)[0] == 0
    it.server = it.start()
    assert it.run("forget", "ann", "--yes", "--register", it.files.register)[0] == 0
    before = Path(it.files.log).read_bytes()
    assert it.click(0) == it.urls[0] and A.encode() not in before
    it.server.stop()
    assert A.encode() not in Path(it.files.log).read_bytes()


def test_other_rules_give_and_take_the_open_of_a_click(files):
    """A hit that is none any more leaves its open to the first click by a person."""
    at = [f"2026-11-25T08:0{minute}:00Z" for minute in range(6)]

    def event(minute, kind, verdict, why, agent, hits, opens, tag=A):
        detail = f"{'b' * 8} {agent}" if kind == "clicked" else agent
        return Event(at[minute], kind, tag, hits, opens, verdict, why, HOME, detail)

    events = [event(0, "hit", "human", "browser", "curl/8", 1, 1),
              event(1, "clicked", "human", "opened", FIREFOX, 1, 1),
              event(2, "clicked", "human", "opened", FIREFOX, 1, 1),
              event(3, "clicked", "human", "browser", "curl/8", 0, 1, B),
              event(4, "clicked", "machine", "crawler", FIREFOX, 0, 1, B),
              event(0, "hit", "human", "browser", FIREFOX, 1, 1, C),
              event(3, "hit", "human", "browser", "curl/8", 2, 2, C),
              event(5, "clicked", "human", "opened", FIREFOX, 2, 2, C)]
    tags = {A: Tag(1, at[0], 1, at[0]), B: Tag(0, "", 1, at[3]),
            C: Tag(2, at[3], 2, at[3])}
    found = [*mailtracker.rejudge(lambda word: map(Event.line, events), tags)]
    assert [(e.event, e.time, e.reason or e.detail, e.opens) for e in found] == [
        ("verdict", at[0], "http-library", 0), ("verdict", at[3], "http-library", 1),
        ("verdict", at[3], "http-library", 0), ("verdict", at[4], "opened", 0),
        ("verdict", at[1], "browser", 1), ("verdict", at[4], "browser", 1),
        ("count", at[0], at[1], 1), ("count", at[3], at[0], 1),
        ("count", at[3], at[4], 1)]
    for one in found:
        tags[one.id] = mailtracker.after(tags[one.id], one)
    events += found
    assert [*mailtracker.rejudge(lambda word: map(Event.line, events), tags)] == []


def test_a_random_log_of_hits_and_clicks_needs_no_second_correction():
    rng = random.Random(7)
    verdicts = [("human", "browser"), ("human", "opened"), ("machine", "burst"),
                ("machine", "x"), ("proxy", "gmail-proxy"), ("unknown", "no-language")]
    for _ in range(200):
        second, events = NOW, []
        for _ in range(rng.randrange(40)):
            second += rng.choice((0, 1, 2, 5, 90))
            kind, tag = rng.choice(("hit", "clicked", "clicked")), rng.choice((A, B))
            agent = rng.choice((FIREFOX, "curl/8", ""))
            detail = f"{rng.choice('bcd') * 8} {agent}".strip()
            events.append(Event(
                mailtracker.utc_text(second), kind, tag, 1, 1, *rng.choice(verdicts),
                rng.choice(("192.0.2.0", "198.51.100.0", "")),
                detail if kind == "clicked" else agent))
            if rng.random() < 0.2:
                events.append(rng.choice(events)._replace(
                    event="verdict", verdict="machine", reason="burst"))
        tags = {A: Tag(9, "", 3), B: Tag(0, "", 1)}
        found = [*mailtracker.rejudge(lambda word: map(Event.line, events), tags)]
        for one in found:
            assert mailtracker.parse_event(one.line()) == one and one.opens >= 0
            tags[one.id] = mailtracker.after(tags[one.id], one)
        events += found
        assert [*mailtracker.rejudge(lambda word: map(Event.line, events), tags)] == []


def test_dump_shows_where_a_click_led_and_only_those_that_opened(tracked):
    it = tracked()
    it.click(0)
    it.click(1, OFFICE)
    it.server.stop()
    args = "dump", "--register", it.files.register
    code, text, _ = it.run(*args, "--id", A)
    assert re.search(
        rf"human +clicked: a browser.*\n +81\.105\.41\.0  {it.urls[0]} Moz", text)
    assert it.urls[1] in text
    _, text, _ = it.run(*args, "--log", "--opened")
    assert re.search(rf"human +clicked: browser +81\.105\.41\.0 {it.links[0]} M", text)
    assert it.links[1] not in text
    assert it.run(*args, "--log", "--hit", "--format", "json")[1] == "[]\n"
    assert it.run(*args)[1].endswith("2 tags, 1 opened, 0 hits, 1 open\n")


# -- what of a mail changes --------------------------------------------------------

BASE = "https://t.org/p"
URL = "https://x.org/a?b=1&c=2"
TRAPS = [  # ‹...› changes, and nothing else
    '<a href="‹https://x.org/›">x</a>', "<a href='‹https://x.org/›'>x</a>",
    "<a href=‹https://x.org/›>x</a>", "<A HREF=\"‹HTTPS://X.ORG/›\">x</A>",
    '<a\r\n  class="a"\r\n  href = "‹https://x.org/›"\r\n>x</a>',
    '<a href="‹https://x.org/?a=1&amp;b=2›">x</a>',
    '<a href="‹https://x.org/?a=1&b=2&copy=3&lt=4›">x</a>',
    '<a href="‹https://x.org/?a=&#x26;b=&#39;›">x</a>', '<a href="‹ https://x.org ›">x',
    '<a title="href=https://x.org/" href="‹https://y.org/›">x</a>',
    "<a title='<a href=\"https://x.org/\">' href='‹https://y.org/›'>x</a>",
    '<a data-href="https://x.org/" href="‹https://y.org/›">x</a>',
    '<a href="‹https://x.org/1›" href="https://x.org/2">x</a>',
    '<a href="https://x.org/" data-notrack>x</a>',
    "<a data-NoTrack='' href=http://x.y>x",
    '<a href="mailto:a@x.org">x</a><a href="tel:1">x</a><a href="#a">x</a>',
    '<a href="javascript:x()">x</a><a href="data:text/html,x">x</a><a href="cid:a">',
    '<a href="/a">x</a><a href="a">x</a><a href="//x.org">x</a><a href=""><a href>',
    '<a href="https://ann:pw@x.org/">x</a>', '<a href="https://x.org:0/">x</a>',
    f'<a href="{BASE}/u/{A}">x</a><a href="{BASE}">x</a><a href="{BASE.upper()}?">',
    '<a href="‹https://t.org/page›">x</a>', '<a href="‹https://t.org/pages›">x</a>',
    '<a href="https://x.org/Unsubscribe?1">x</a>', '<a href="https://x.org/bye">x</a>',
    '<a href="https://x.org/">https://x.org/</a>', '<a href="https://x.org/">x.org</a>',
    '<a href="https://x.org/"><b>www.</b><i>X</i>.org/a</a>',
    "<a href=http://x.yz>x.yz/z",
    '<a href="https://x.org/">see http://x.org now</a>',
    '<a href="https://x.org/">&#104;ttps://x.org</a>',
    '<a href="‹https://x.org/›">3.14</a>', '<a href="‹https://x.org/›">a. b. c</a>',
    '<a href="‹https://x.org/›">ann@x.org</a>', '<a href="‹https://x.org/›">Read…</a>',
    '<a href="‹https://x.org/›"><img src="https://x.org/a.png" alt="x.org"></a>',
    '<a href="‹https://x.org/1›">x<a href="‹https://x.org/2›">y</a> https://x.org/',
    '<link href="https://x.org/"><base href="https://x.org/"><img src="http://x.y">',
    '<form action="https://x.org/"><button href="https://x.org/">x</button></form>',
    '<map><area href="‹https://x.org/›" alt="x"></map>www.x.org',
    '<abbr href="https://x.org/">x</abbr><a-b href="https://x.org/">x</a-b>',
    '<!-- <a href="https://x.org/">x</a> --><a href="‹https://y.org/›">x</a>',
    '<!--[if mso]><v:roundrect href="https://x.org/"><![endif]--><![if !mso]>'
    '<a href="‹https://y.org/›">x</a><![endif]>',
    '<!--><a href="‹https://y.org/›">x</a>',
    '<!DOCTYPE html><a href="‹https://y.org/›">x</a>',
    '<style>a{b:"<a href=https://x.org/>"}</style><a href="‹https://y.org/›">x</a>',
    '<script>"<a href=\'https://x.org/\'>x</a>"</script ><a href="‹https://y.org/›">x',
    '<title><a href="https://x.org/">x</a></title><a href="‹https://y.org/›">x</a>',
    '<textarea><a href="https://x.org/">x</textarea><a href="‹https://y.org/›">x</a>',
    '<style-x><a href="‹https://y.org/›">x</a></style-x>',
    '<!-- <a href="https://x.org/">',
    '<p title="<a href=https://x.org/>"><a href="‹https://y.org/›">x</a>',
    "<p title=it's><a href='‹https://y.org/›'>it's</a>",
    '1 < 2 <a href=‹https://x.org/›>x',
    '<a href="https://x.org/', "<a href='https://x.org/", '<a href="https://x.org/"',
    '<a href="https://x.org/a b">x</a>', '<a href="https://x.org/\r\n a">x</a>',
    '<a href="https://x.org/<img src=https://t.org/p/old.gif>">x</a>',
    '<a/href="‹https://x.org/›"/>x</a>', '<a x=1href="https://x.org/">x</a>',
    '<a href==https://x.org/>x</a>',
    '</a href="https://x.org/"><a href="‹http://y.z›">x',
    '<a href="‹https://x.org/ä›" title="Grüße">Grüße</a>',
    "<a\thref\t=\t‹http://x.y›\t>x",
    '<a href="‹https://müller.de/›">x</a>', '<a href="https://x.org/">grüße.de</a>',
    "<table>" + '<tr><td><a href="‹https://x.org/›">x</a></td></tr>' * 3 + "</table>",
    "= =3D &amp; <a href=\"‹https://x.org/?a=b=3Dc›\">=</a> =\r\n.\r\n"]
CODINGS = {
    "7bit": bytes, "8bit": bytes, "binary": bytes, "base64": base64.encodebytes,
    "quoted-printable": quopri.encodestring,
    "quoted-printable, all": lambda data: b"=\n".join(
        b"=%02X" % byte if byte != 10 else b"\n" for byte in data)}


def hrefs(tag, made):
    """Return what gives links their new addresses, and notes where they lead."""
    def new(urls):
        links = dict(zip(urls, (link_id(url) for url in urls)))
        made.update({f"{BASE}/{tag}~{link}": url for url, link in links.items()})
        return {url: f"{BASE}/{tag}~{link}" for url, link in links.items()
                if not url.lower().startswith((f"{BASE}/", f"{BASE}?"))
                and url.lower() != BASE}
    return new


def part(text, coding, charset):
    """Return a message with HTML, and an address where to unsubscribe."""
    how = coding.partition(",")[0]
    head = (f"List-Unsubscribe: <https://x.org/bye>\nContent-Type: text/html; "
            f"charset={charset}\nContent-Transfer-Encoding: {how}\n\n").encode()
    body = CODINGS[coding](text.replace("\r\n", "\n").encode(
        charset, "xmlcharrefreplace"))
    return re.sub(rb"\r?\n", b"\r\n", head + body)


def decoded(raw):
    return email.message_from_bytes(raw).get_payload(decode=True)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1", "windows-1252", "utf-16"])
def test_links_change_and_every_other_byte_stays(coding, charset):
    if charset == "utf-16" and coding != "base64":
        charset = "us-ascii"
    assert len(TRAPS) >= 60
    for trap in TRAPS:
        made = {}
        raw = part(re.sub("[‹›]", "", trap), coding, charset)
        new, why = with_pixel(raw, "", lambda source: False, hrefs(A, made))
        assert why == ""
        text = decoded(new).decode(charset).replace("\r", "")
        for address, url in made.items():
            assert destination(url) == url and address not in trap
        kept = [re.escape(each.replace("\r", "").encode(
            charset, "xmlcharrefreplace").decode(charset))
                for each in re.split("‹.*?›", trap, flags=re.S)]
        found = re.fullmatch(r"(https://t\.org/p/\w{21}~\w{8})".join(kept), text)
        assert found, (trap, text)
        told = [re.sub("&(#.*?|amp);", lambda e: unescape(e[0]), each).strip()
                for each in re.findall("‹(.*?)›", trap, re.S)]
        assert [made[new] for new in found.groups()] == [*map(destination, told)]


def test_nothing_but_the_links_changes_in_the_bytes_of_a_message():
    rng = random.Random(3)
    for _ in range(300):
        text = "\r\n".join(rng.choices(TRAPS, k=rng.randrange(1, 8)))
        coding = rng.choice([*CODINGS])
        raw, made = part(re.sub("[‹›]", "", text), coding, "utf-8"), {}
        new, _ = with_pixel(raw, "", lambda source: False, hrefs(A, made))
        if coding == "base64":
            assert max(map(len, new.split(b"\r\n"))) <= 76
            continue
        if "quoted" in coding:
            assert max(map(len, new.split(b"\r\n"))) <= 76
        gap = rb"(?:=\r\n)*" if "quoted" in coding else b""
        pieces = re.split(gap + rb"https://t\.org/p/(?:\w|=\r\n){21,24}~"
                          rb"(?:\w|=\r\n){8,11}" + gap, new)
        at = 0
        for piece in pieces:
            at = raw.index(piece, at) + len(piece)
        assert raw.startswith(pieces[0]) and raw.endswith(pieces[-1])


def test_a_line_does_not_grow_beyond_what_a_mail_may_have():
    short = '<a href="http://x.y/">x</a>' * 30
    for coding, changes in ("7bit", False), ("base64", True), (
            "quoted-printable", True):
        new, why = with_pixel(part(short, coding, "utf-8"), "<img>", bool, hrefs(A, {}))
        assert why == "" and (b"~" in decoded(new)) == changes
        assert max(map(len, new.split(b"\r\n"))) <= 998


@pytest.mark.parametrize("text", [
    "<a " * 500_000, '<a href="' * 200_000, "<a x='" * 200_000, "<!" * 500_000,
    "<![" * 500_000, "<!--" * 300_000, "</" * 500_000, "<style>" * 200_000,
    "<" * 10 ** 6,
    "<a" + " " * 10 ** 6, "<a " + "a=" * 500_000,
    "<a href='&" + "&amp" * 300_000 + "'>x",
    "<a href=http://x.y>" + "<b>." * 300_000, "<a href=http://x.y>" + "a." * 500_000,
    "<a href=http://x.y>" * 60_000, "<a href=" + "http://x.y/" * 90_000 + ">"],
    ids=lambda text: text[:12])
def test_a_hostile_text_takes_no_longer_than_its_length(text):
    begun = time.process_time()
    with_pixel(part(text, "8bit", "utf-8"), "<img>", bool, hrefs(A, {}))
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("head, body", [
    (b"Content-Type: text/plain\r\n\r\n", b"see https://x.org/"),
    (b"DKIM-Signature: v=1\r\nContent-Type: text/html\r\n\r\n",
     b"<a href=http://x.y>x"),
    (b"Content-Type: multipart/signed; boundary=b\r\n\r\n",
     b"--b\r\nContent-Type: text/html\r\n\r\n<a href=http://x.y>x</a>\r\n--b--\r\n")])
def test_text_and_signed_mail_stay_as_they_are(head, body):
    raw = head + body
    assert with_pixel(raw, "<img>", bool, hrefs(A, {}))[0] == raw


# -- through relay and send ---------------------------------------------------------

MAIL = HEAD % 1 + (b"Content-Type: text/html\r\n\r\n<p>Hello <a href='%s'>you</a>"
                   b" <a href=mailto:a@b.c>me</a></p>\r\n" % URL.encode())


def test_every_recipient_of_the_relay_has_links_of_his_own_that_count(
        tmp_path, serve):
    server = serve("--register", tmp_path / "register.csv")
    with FakeSmarthost() as host, relaying(tmp_path, host, "--clicks", "--path",
                                           "/img/{id}/logo.gif") as relay:
        with Client(relay.port) as client:
            client.send(MAIL, (BOB, CARL, "ann@x.org"))
        bob, carl, ann = (message.data.decode() for message in host.messages)
        (tag, link), (other, same) = LINK.findall(bob)[0], LINK.findall(carl)[0]
        assert f"<a href='http://t.x.org/img/{tag}~{link}'>you</a> <a href=mai" in bob
        assert f"/img/{tag}/logo.gif" in bob and tag != other and link == same
        assert URL in ann and URL not in bob + carl
        quote = MAIL.replace(URL.encode(), f"http://t.x.org/img/{tag}~{link}".encode())
        with Client(relay.port) as client:
            client.send(quote.replace(b"<1@", b"<2@"), (CARL,))
        (third, again), = LINK.findall(host.messages[-1].data.decode())
        assert again == link and third not in (tag, other)
    status, headers, _ = server.get(f"/img/{tag}~{link}", AGENT)
    assert (status, headers["Location"]) == (302, URL)
    assert [row["detail"][:8] for row in log_rows(tmp_path / "register.csv")
            if (row["event"], row["id"]) == ("clicked", tag)] == [link]


def test_where_links_cannot_be_stored_they_stay_and_the_mail_goes(tmp_path):
    (tmp_path / "register.links.csv").mkdir()
    with FakeSmarthost() as host, relaying(tmp_path, host, "--clicks") as relay:
        with Client(relay.port) as client:
            assert client.send(MAIL)[:3] == "250"
        text = host.messages[0].data.decode()
        assert URL in text and "<img src" in text and "~" not in text
    assert "links stay as they are: " in (tmp_path / "lines").read_text()


def test_a_mailing_has_links_that_count_once_it_is_sent_and_no_sooner(
        tmp_path, run, serve, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.html").write_text(
        f"Subject: Hi\n\n<p><a href='{URL}&n={{Name}}'>Look</a> https://x.org"
        "<a href='{unsubscribe}'>no more</a>\n")
    Path("list.csv").write_text("email,name\nann@y.org,Ann\nbob@y.org,B&ob\n")
    with FakeSmarthost() as host:
        send = ("send", "a.html", "list.csv", "--from", "me@x.org", "--server",
                "https://t.org", "--clicks", "--smarthost", f"127.0.0.1:{host.port}")
        assert run(*send)[0] == 0 and not os.path.exists("register.links.csv")
        assert run(*send, "--test", "me@x.org")[0] == 0
        assert run(*send, "--yes")[0] == 0
        mails = [email.message_from_bytes(message.data).get_payload(1).get_payload(
            decode=True).decode() for message in host.messages]
    found = [LINK.findall(text) for text in mails]
    assert [len(each) for each in found] == [1, 1, 1]
    (_, test), (tag, link), (_, other) = (each[0] for each in found)
    assert test == link != other and f"https://t.org/u/{tag}" in mails[1]
    server = serve()
    for each, name in (link, "Ann"), (other, "B&ob"):
        assert server.get(f"/{tag}~{each}", AGENT)[1]["Location"] == f"{URL}&n={name}"
    server.stop()
    row = shown(Files("register.csv"))[tag]
    assert (row["hits"], row["opens"], row["status"]) == ("0", "0", "sent")  # too fast


def test_links_without_html_are_refused(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("Subject: Hi\n\nHi https://x.org\n")
    Path("l.csv").write_text("email\na@y.org\n")
    code, _, error = run("send", "a.txt", "l.csv", "--from", "me@x.org", "--clicks",
                         "--server", "t.org")
    assert code == 1 and "--clicks" in error


def test_newtag_prints_links_beside_each_tag_also_into_a_list(tmp_path, run):
    register, people = tmp_path / "register.csv", tmp_path / "people.csv"
    args = ("newtag", "--register", register, "--server", "https://t.org", "--path",
            "/a/{id}/b.gif", "--format", "url", "--link", URL, "--link", "http://y.z")
    code, text, _ = run(*args, "--count", 2)
    lines = text.splitlines()
    assert code == 0 and len(lines) == 6
    for first, *links in lines[:3], lines[3:]:
        tag = first.split("/")[-2]
        assert [link[:-8] for link in links] == [f"https://t.org/a/{tag}~"] * 2
    people.write_text("name;city\nAnn;Rome\nBob;Bonn\n")
    _, text, _ = run(*args, "--names-from", people)
    assert re.fullmatch(r"name;city;id;tag;link;link \(2\)\n"
                        r"(?:\w+;\w+(?:;[^;\n]+){4}\n){2}", text)
    assert len((tmp_path / "register.links.csv").read_text().splitlines()) == 3
