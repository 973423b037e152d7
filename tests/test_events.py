"""The event log, judging hits as they come, privacy, and commands for new opens.

Servers are real ones. They believe X-Forwarded-For from 127.0.0.1, so that a test can
fetch from any network; what depends on time is judged in process, with times given.
"""
from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import stat
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import eventually
from conftest import register_rows

from mailtracker import EVENT_COLUMNS
from mailtracker import MAX_AGENT
from mailtracker import OPENS
from mailtracker import Hit
from mailtracker import Judge
from mailtracker import clean
from mailtracker import events_path
from mailtracker import log_files
from mailtracker import read_log

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

HOME = "81.105.41.164"
OFFICE = "198.51.100.7"
THIRD = "203.0.113.9"
HOME6 = "2a00:23c6:1234:5678::9"
WEBKIT = "AppleWebKit/537.36 (KHTML, like Gecko)"
CHROME = (f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {WEBKIT} "
          "Chrome/149.0.0.0 Safari/537.36")
STALE = f"Mozilla/5.0 (Windows NT 6.1) {WEBKIT} Chrome/57.0.2987.133 Safari/537.36"
THUNDERBIRD = ("Mozilla/5.0 (X11; Linux x86_64; rv:115.0) Gecko/20100101 "
               "Thunderbird/115.8.0")
OUTLOOK = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.17328; Pro)"
GMAIL = ("Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 "
         "(via ggpht.com GoogleImageProxy)")
YAHOO = "YahooMailProxy; https://senders.yahooinc.com/mail-proxy"
CURL = "curl/8.5.0"
HEADER = b"time,event,id,verdict,reason,address,agent\n"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
OLD_COLUMNS = ("id", "hits", "last_hit", "created", "name")


def strict_events(path):
    """Return the events of one file; fail if it is not whole, clean CSV."""
    data = path.read_bytes()
    assert data.startswith(HEADER) and data.endswith(b"\n")
    text = data.decode("utf-8")
    assert all(c.isprintable() or c == "\n" for c in text)
    rows = list(csv.DictReader(text.splitlines(keepends=True), strict=True))
    assert len(rows) == data.count(b"\n") - 1
    for row in rows:
        assert tuple(row) == EVENT_COLUMNS and None not in row.values()
        assert TIME.fullmatch(row["time"]) and row["event"] in ("hit", "verdict")
        assert not row["agent"].startswith(tuple("=+-@"))
    return rows


class Tracked:
    """A register with its log, its tags, and one server of them."""

    def __init__(self, register, tags, start, options):
        self.register, self.tags = register, tags
        self.log = Path(events_path(str(register)))
        self._start = start
        self._options = options
        self.server = start(*options)

    @property
    def tag(self):
        """The first tag."""
        return self.tags[0]

    def another_server(self):
        """Start one more server on the same port."""
        return self._start(*self._options, port=self.server.port)

    def start_elsewhere(self, *options):
        """Start one more server on a port of its own."""
        return self._start(*(options or self._options))

    def restart(self, *options):
        """Stop the server and start another one, with these options or the same."""
        assert self.server.stop() == 0
        self.server = self._start(*(options or self._options))

    def fetch(self, tag="", agent=CHROME, address=HOME, path="/{}.gif", **headers):
        """Fetch a pixel as some client; headers are named with underscores."""
        lines = {"User-Agent": agent, "X-Forwarded-For": address}
        lines.update((name.replace("_", "-"), v) for name, v in headers.items())
        status, _, body = self.server.get(path.format(tag or self.tag), lines)
        assert status == 200 and body.startswith(b"GIF89a")

    def judged(self, *args, **options):
        """Fetch a pixel; return the verdict and reason that stand in the log then."""
        before = len(self.events())
        self.fetch(*args, **options)
        event = self.events()[before]
        return event["verdict"], event["reason"]

    def events(self):
        """Return the events of the newest file of the log."""
        return strict_events(self.log)

    def counts(self, tag=""):
        """Return hits and opens of a tag as they stand in the register."""
        row = register_rows(self.register)[tag or self.tag]
        assert len(row["hits"]) == len(row["opens"]) == 10
        return int(row["hits"]), int(row["opens"])


@pytest.fixture
def tracked(serve, newtags, tmp_path):
    """Start a server that judges as if all mails had been written long ago."""
    def start(*options, n=1, names=(), window=0, **others):
        register = tmp_path / "register.csv"
        tags = newtags(register, n, names=names)
        base = ("--register", register, "--trusted-proxy", "127.0.0.1",
                "--reuse-port", "--compose-window", window)

        def launch(*options, **more):
            return serve(*base, *options, **{**others, **more})
        return Tracked(register, tags, launch, options)
    return start


# ---------------------------------------------------------------------------
# The event log
# ---------------------------------------------------------------------------


def test_a_hit_is_one_whole_line_in_the_log_before_its_pixel_is_answered(tracked):
    it = tracked(n=2)
    assert it.log.read_bytes() == HEADER
    for number in range(50):
        it.fetch(it.tags[number % 2], THUNDERBIRD, f"10.{number}.0.77")
        event = it.events()[-1]
        assert len(it.events()) == number + 1
        assert event == {"time": event["time"], "event": "hit",
                         "id": it.tags[number % 2], "verdict": "human",
                         "reason": "mail-client", "address": f"10.{number}.0.0",
                         "agent": THUNDERBIRD}
    assert stat.S_IMODE(it.log.stat().st_mode) == 0o600
    row = register_rows(it.register)[it.tags[1]]
    assert row["last_hit"] == it.events()[-1]["time"]


AGENTS = {
    "comma": "a,b,c",
    "quote": 'say "hello"',
    "unclosed quote": '"Mozilla',
    "quotes only": '"""',
    "formula": "=HYPERLINK(\"http://evil.example\",\"x\")",
    "formula with at": "@SUM(A1)",
    "apostrophe": "'=1",
    "escape sequence": "\x1b]0;owned\x07\x1b[2J",
    "C1": "\x9b31m\x85",
    "tab": "a\tb",
    "form feed and VT": "a\x0c\x0bb",
    "latin-1": "Zoë",
    "looks like a row": f"{CHROME},\\n2026-11-20T20:14:03Z,hit,forged",
    "header": "time,event,id,verdict,reason,address,agent",
    "nothing": "",
    "longest": "Mozilla/5.0 (" + "x" * (MAX_AGENT - 14) + ")",
}


@pytest.mark.parametrize("agent", list(AGENTS.values()), ids=list(AGENTS))
def test_no_agent_breaks_a_line_of_the_log_and_each_is_read_back(tracked, agent):
    it = tracked()
    it.fetch(agent=agent.encode("latin-1"))
    it.fetch(agent="b")
    assert len(it.events()) == 2
    assert [e.agent for e in read_log(str(it.log))] == [clean(agent).strip(), "b"]


def test_what_is_no_hit_is_no_event(tracked):
    it = tracked()
    for path in ("/x.gif", "/health", "/{}x.gif", "/%0a{}.gif", "/{}%0aa,b.gif",
                 "/x?/{}.gif", "/" + "b" * 21 + ".gif"):
        it.server.get(path.format(it.tag))
    it.server.request("HEAD", f"/{it.tag}.gif")
    it.server.request("POST", f"/{it.tag}.gif")
    assert it.events() == []
    assert it.counts() == (0, 0)


def fetch_by_turns(it, times):
    """Fetch pixels of all tags, from clients of whom each comes once."""
    for number in range(times):
        it.fetch(it.tags[number % len(it.tags)], CURL, f"10.9.{number}.1")


@pytest.mark.parametrize("remove", [False, True], ids=["moved", "deleted"])
def test_a_log_that_goes_away_is_begun_again_by_both_servers(tracked, remove):
    it = tracked(n=3)
    it.another_server()
    fetch_by_turns(it, 30)
    moved = it.log.rename(it.log.with_name("old.csv"))
    old = strict_events(moved)
    if remove:
        moved.unlink()
    fetch_by_turns(it, 30)
    assert len(old) == len(it.events()) == 30
    assert remove or strict_events(moved) == old
    assert stat.S_IMODE(it.log.stat().st_mode) == 0o600
    assert [it.counts(tag)[0] for tag in it.tags] == [20, 20, 20]


def test_a_log_of_some_size_gets_a_number_while_two_servers_go_on(tracked):
    it = tracked("--rotate-events", "2K", n=3)
    it.another_server()
    fetch_by_turns(it, 150)
    files = log_files(str(it.log))
    assert len(files) > 5
    assert files == [f"{it.log}.{n}" for n in range(1, len(files))] + [str(it.log)]
    events = [event for name in files for event in strict_events(Path(name))]
    assert len(events) == 150
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
    for name in files[:-1]:
        assert 2048 <= os.stat(name).st_size < 2048 + 400
        assert stat.S_IMODE(os.stat(name).st_mode) == 0o600
    gone = len(strict_events(Path(files[0])))
    os.unlink(files[0])
    fetch_by_turns(it, 30)
    assert files[0] not in log_files(str(it.log))
    assert len(list(read_log(str(it.log)))) == 180 - gone
    assert [it.counts(tag)[0] for tag in it.tags] == [60, 60, 60]


@pytest.mark.parametrize("torn", [
    b"2026-11-20T20:14:03Z,hit,{}", b'2026-11-20T20:14:03Z,hit,{},human,browser,,"Mo',
    b"2", b"\0\0\0\0"], ids=["in its id", "in a quote", "in its time", "NULs"])
def test_a_torn_last_line_harms_no_other(tracked, torn):
    it = tracked()
    it.fetch(agent=THUNDERBIRD)
    assert it.server.stop() == 0
    with open(it.log, "ab") as file:
        file.write(torn.replace(b"{}", it.tag.encode()))
    it.restart()
    it.fetch(agent=CURL)
    it.fetch(agent=GMAIL)
    assert [e.agent for e in read_log(str(it.log))] == [THUNDERBIRD, CURL, GMAIL]
    assert it.log.read_bytes().count(b"\n") == 5
    it.restart()
    it.fetch(agent=CURL)
    assert it.counts() == (4, 2)


@LINUX
@pytest.mark.parametrize("room", [10, 60, 100, 115, -1], ids="{} bytes".format)
def test_a_line_that_the_disk_cuts_off_is_one_event_in_the_end(tracked, room):
    import resource

    it = tracked(n=2)
    it.fetch(it.tags[1], agent=OUTLOOK)
    pid, size = it.server.process.pid, it.log.stat().st_size
    line = f"2026-11-20T20:14:03Z,hit,{it.tag},human,browser,81.105.41.0,{CHROME}\n"
    room %= len(line)
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + room, most))
    it.fetch()
    assert it.server.get("/health")[0] == 503
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    eventually(lambda: it.server.get("/health")[0] == 200, 5)
    assert [e["agent"] for e in it.events()] == [OUTLOOK, CHROME]
    it.restart()
    it.fetch(agent=CURL)
    assert it.counts() == (2, 1)


def put_directory(path):
    """Put a directory where the log should be."""
    path.mkdir()


def put_fifo(path):
    """Put a FIFO that nobody reads where the log should be."""
    os.mkfifo(path)


@pytest.mark.parametrize("put", [put_directory, put_fifo], ids=["directory", "FIFO"])
def test_a_log_that_cannot_be_written_never_stops_the_count(tracked, put):
    it = tracked("--quiet", n=2)
    it.fetch(it.tags[1])
    it.server.stop()
    it.log.unlink()
    put(it.log)
    it.restart()
    for _ in range(150):  # more than a pipe holds
        it.fetch(agent="bot" + "x" * 900)
    assert it.counts() == (150, 0)
    assert it.server.get("/health")[0] == 503
    it.log.rmdir() if put is put_directory else it.log.unlink()
    eventually(lambda: it.server.get("/health")[0] == 200, 5)
    it.fetch(agent=CURL)
    assert it.counts() == (151, 0)
    assert len(it.events()) == 151
    assert "Traceback" not in it.server.log()


def test_a_device_in_place_of_the_log_never_stops_the_count(tracked):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    it = tracked("--events", "/dev/full")
    for number in range(20):
        it.fetch(agent=THUNDERBIRD, address=f"10.{number}.0.1")
    assert it.counts() == (20, 20)
    assert it.server.get("/health")[0] == 503


def test_a_folder_of_the_log_that_goes_away_takes_no_event_with_it(tracked, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    it = tracked("--events", folder / "log.csv")
    it.fetch(agent=CURL)
    away = folder.rename(tmp_path / "away")
    for _ in range(5):
        it.fetch(agent=CURL)
    assert it.counts() == (6, 0)
    away.rename(folder)
    eventually(lambda: it.server.get("/health")[0] == 200, 5)
    it.fetch(agent=CURL)
    assert it.counts() == (7, 0)
    assert len(strict_events(folder / "log.csv")) == 7


@LINUX
def test_a_register_that_cannot_be_written_never_stops_the_log(tracked):
    import resource

    it = tracked(n=1000)
    pid, last = it.server.process.pid, it.tags[-1]
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (20000, most))
    for number in range(5):
        it.fetch(last, agent=THUNDERBIRD, address=f"10.{number}.0.1")
    assert [e["id"] for e in it.events()] == [last] * 5
    assert it.counts(last) == (0, 0)
    assert it.server.get("/health")[0] == 503
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    eventually(lambda: it.server.get("/health")[0] == 200, 5)
    assert it.counts(last) == (5, 5)
    assert len(it.events()) == 5


@pytest.mark.parametrize("rotated", [False, True], ids=["one file", "rotated"])
def test_counts_of_a_register_restored_from_an_older_copy_are_mended(tracked, rotated):
    it = tracked(*(("--rotate-events", "300") if rotated else ()), n=3)
    twin = it.register.with_name("register.csv.twin")
    it.fetch(agent=CURL)
    old = it.register.read_bytes()
    for number, address in enumerate([HOME, OFFICE, THIRD]):
        it.fetch(agent=THUNDERBIRD, address=address)
        it.fetch(it.tags[number], agent=GMAIL, address=address)
    it.fetch(it.tags[1], agent=CURL)
    known = register_rows(it.register)
    assert it.server.stop() == 0
    assert (len(log_files(str(it.log))) > 2) is rotated
    it.register.write_bytes(old)
    twin.write_bytes(old)
    it.restart()
    eventually(lambda: register_rows(it.register) == known, 5)
    assert "counts of 3 tags were mended from the event log" in it.server.log()
    assert it.register.read_bytes() == twin.read_bytes()
    it.fetch(it.tags[2], agent=CURL)
    assert it.counts(it.tags[2]) == (2, 1)


def test_a_log_that_knows_less_than_the_register_takes_nothing_away(tracked):
    it = tracked(n=2)
    for address in (HOME, OFFICE):
        it.fetch(agent=THUNDERBIRD, address=address)
    known = register_rows(it.register)
    it.server.stop()
    first = it.log.read_bytes().splitlines(keepends=True)[:2]
    it.log.write_bytes(b"".join(first))
    it.restart()
    it.fetch(it.tags[1], agent=CURL)
    assert register_rows(it.register)[it.tag] == known[it.tag]
    assert "mended" not in it.server.log()


def test_without_events_hits_and_opens_are_counted_all_the_same(tracked, tmp_path):
    it = tracked("--no-events")
    it.fetch()
    it.fetch(agent=CURL)
    assert it.counts() == (2, 1)
    assert not it.log.exists()


def test_the_log_may_be_elsewhere(tracked, tmp_path, tracker):
    elsewhere = tmp_path / "logs"
    elsewhere.mkdir()
    it = tracked("--events", elsewhere / "mine.csv")
    it.fetch()
    assert [e["id"] for e in strict_events(elsewhere / "mine.csv")] == [it.tag]
    assert not it.log.exists()
    it.restart()
    it.fetch(agent=CURL)
    assert len(strict_events(elsewhere / "mine.csv")) == 2
    shown = tracker("dump", "--events", "--events-file", elsewhere / "mine.csv",
                    "--format", "json")
    assert len(json.loads(shown.stdout)) == 2


# ---------------------------------------------------------------------------
# Judging hits in the light of those before
# ---------------------------------------------------------------------------

TAG = b"bcdfghjkmnpqrstvwxz22"
OTHER_TAG = b"zxwvtsrqpnmkjhgfdcb99"


def at(when, address=HOME, agent=CHROME, tag=TAG, **facts):
    """Return a hit at a time in seconds."""
    return Hit(tag, when, address, agent, **facts)


# Hits one after the other, and what each is judged to be; "+1" is what it adds to
# the opens of its tag.
STORIES = {
    "a reload within 15 s": [
        (at(0), "human browser +1"), (at(15), "human repeat +0"),
        (at(16), "human browser +1")],
    "retries do not put off the next open": [
        (at(0), "human browser +1"), (at(10), "human repeat +0"),
        (at(20), "human browser +1"), (at(30), "human repeat +0")],
    "another program of the same person": [
        (at(0), "human browser +1"),
        (at(1, agent=THUNDERBIRD), "human mail-client +1")],
    "another tag": [
        (at(0), "human browser +1"), (at(1, tag=OTHER_TAG), "human browser +1")],
    "a neighbour's address": [
        (at(0), "human browser +1"), (at(1, "81.105.41.9"), "human repeat +0")],
    "Gmail fetches again from elsewhere": [
        (at(0, "66.249.84.231", GMAIL), "proxy gmail-proxy +1"),
        (at(5, "74.125.210.7", GMAIL), "proxy repeat +0"),
        (at(21, "66.249.84.231", GMAIL), "proxy gmail-proxy +1")],
    "a machine is no open however often": [
        (at(0, agent=CURL), "machine http-library +0"),
        (at(60, agent=CURL), "machine http-library +0")],
    "a clock that is set back": [
        (at(1000), "human browser +1"), (at(995), "human repeat +0")],
    "fetched while writing, and later": [
        (at(0, composing=True), "self composing +0"),
        (at(9999), "self sender-client +0"),
        (at(9999, "81.105.41.9"), "human browser +1"),
        (at(10001, agent=THUNDERBIRD), "human mail-client +1"),
        (at(10002, tag=OTHER_TAG), "human browser +1")],
    "a worse candidate comes later": [
        (at(0, HOME), "human browser +1"),
        (at(30, OFFICE, STALE), "machine many-networks +0")],
    "a better candidate comes later": [
        (at(0, OFFICE, STALE), "human browser +1"),
        (at(30, HOME), "human browser +0 turning 0")],
    "an equal candidate comes later": [
        (at(0, OFFICE), "human browser +1"),
        (at(60, HOME), "human browser +0 turning 0"),
        (at(61, OFFICE, STALE), "machine many-networks +0")],
    "equal, but more than a minute later": [
        (at(0, OFFICE), "human browser +1"), (at(61, HOME), "human browser +1")],
    "several at once, then a mail program": [
        (at(0, OFFICE, STALE), "human browser +1"),
        (at(1, THIRD, STALE), "human browser +0 turning 0"),
        (at(2, HOME, THUNDERBIRD), "human mail-client +0 turning 1")],
    "a client that opened twice": [
        (at(0, OFFICE, STALE), "human browser +1"),
        (at(20, OFFICE, STALE), "human browser +1"),
        (at(22, HOME, THUNDERBIRD), "human mail-client -1 turning 0 20")],
    "two devices of one reader": [
        (at(0, OFFICE, OUTLOOK), "human mail-client +1"),
        (at(1, HOME, THUNDERBIRD), "human mail-client +1"),
        (at(2, "66.249.84.231", GMAIL), "proxy gmail-proxy +1")],
    "turned away, then seen again": [
        (at(0, OFFICE, STALE), "human browser +1"),
        (at(1, HOME, THUNDERBIRD), "human mail-client +0 turning 0"),
        (at(5, OFFICE, STALE), "machine many-networks +0")],
}


def told(judgement):
    """Return a judgement as the stories tell it."""
    turned = "".join(f" {hit.time:.0f}" for hit in judgement.overruled)
    return f"{judgement.verdict} {judgement.reason} {judgement.opens:+d}" \
        + (f" turning{turned}" if turned else "")


@pytest.mark.parametrize("story", list(STORIES.values()), ids=list(STORIES))
def test_hits_are_judged_in_the_light_of_those_before(story):
    judge = Judge()
    assert [told(judge.judge(hit)) for hit, _ in story] == [text for _, text in story]


def test_the_sender_s_own_networks_are_self_whatever_fetches():
    judge = Judge(lambda address: address == OFFICE)
    for agent in (CHROME, GMAIL, CURL):
        assert told(judge.judge(at(0, OFFICE, agent))) == "self own-network +0"
        assert judge.judge(at(0, HOME, agent)).reason != "own-network"


DAMAGED = {
    "%27": TAG + b"%27", "capitals": TAG.upper(), "letter appended": TAG + b"x",
    "two letters in front": b"xx" + TAG, "with its extension": TAG + b"_.gif",
    "last letter changed": TAG[:-1] + b"3", "last letter missing": TAG[:-1],
    "letter changed": TAG[:9] + b"x" + TAG[10:],
}


@pytest.mark.parametrize("stray", list(DAMAGED.values()), ids=list(DAMAGED))
def test_the_clean_id_after_a_damaged_one_from_the_same_network_is_a_scanner(stray):
    judge = Judge()
    judge.stray(stray, OFFICE, 0)
    assert told(judge.judge(at(60, OFFICE))) == "machine probe +0"
    judge = Judge()
    judge.stray(stray, OFFICE, 0)
    assert told(judge.judge(at(3, HOME))) == "human browser +1"
    assert told(judge.judge(at(3, OFFICE, tag=OTHER_TAG))) == "human browser +1"
    assert told(judge.judge(at(61, OFFICE, agent=OUTLOOK))).startswith("human ")


@pytest.mark.parametrize("stray", [OTHER_TAG, b"a" * 21, b"favicon.ico.gif",
                                   TAG[:12], TAG[::-1]], ids=str)
def test_an_unrelated_path_before_is_no_probe(stray):
    judge = Judge()
    judge.stray(stray, OFFICE, 0)
    assert told(judge.judge(at(1, OFFICE))) == "human browser +1"


def test_a_client_that_comes_back_is_not_forgotten_with_an_older_one():
    judge = Judge()
    judge.judge(at(0, HOME, THUNDERBIRD))
    judge.judge(at(1, OFFICE, OUTLOOK))
    assert told(judge.judge(at(55, HOME, THUNDERBIRD))) == "human mail-client +1"
    judge.forget_old(62)
    assert told(judge.judge(at(62, HOME, THUNDERBIRD))) == "human repeat +0"


@pytest.mark.parametrize("seed", range(30))
def test_opens_are_never_negative_and_some_open_always_stays(seed):
    dice, judge, now, total = random.Random(seed), Judge(), 0.0, 0
    standing = Counter()
    for _ in range(60):
        now += dice.choice([0, 1, 1, 5, 20, 70])
        hit = at(now, dice.choice([HOME, OFFICE, THIRD, HOME6]),
                 dice.choice([CHROME, STALE, THUNDERBIRD, CURL, GMAIL]))
        found = judge.judge(hit)
        for old in found.overruled:
            standing[old.time, old.address, old.agent] -= 1
        if found.verdict in OPENS and found.reason != "repeat":
            standing[hit.time, hit.address, hit.agent] += 1
        total += found.opens
        assert total == sum(standing.values())
        assert min(standing.values(), default=0) >= 0
        assert total > 0 or not any(standing) and found.verdict not in OPENS
        if dice.random() < 0.3:
            judge.forget_old(now)


def test_the_memory_of_many_tags_and_networks_is_bounded():
    import tracemalloc

    judge = Judge()
    sizes = []
    tracemalloc.start()
    for number in range(2 * judge.MOST_TAGS):
        judge.judge(at(0, HOME, tag=b"%021d" % number))
        judge.stray(b"%021d" % number, f"10.{number >> 8}.{number & 255}.1", 0)
        if number % judge.MOST_TAGS == judge.MOST_TAGS - 1:
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] < sizes[0] * 1.2
    judge.forget_old(61)
    assert told(judge.judge(at(62, tag=b"%021d" % number))) == "human browser +1"


# ---------------------------------------------------------------------------
# Judging through the server
# ---------------------------------------------------------------------------


def test_a_reload_through_the_server_is_a_hit_and_no_open(tracked):
    it = tracked()
    assert it.judged(agent=THUNDERBIRD) == ("human", "mail-client")
    assert it.judged(agent=THUNDERBIRD) == ("human", "repeat")
    assert it.judged(agent=GMAIL, address="66.249.84.231") == ("proxy", "gmail-proxy")
    assert it.judged(agent=YAHOO, address="66.218.84.1") == ("proxy", "yahoo-proxy")
    assert it.judged(agent=CURL) == ("machine", "http-library")
    assert it.judged(tag="", Sec_Purpose="prefetch;prerender") == (
        "machine", "prefetch-header")
    assert it.counts() == (6, 3)
    reasons = re.findall(r" hit \w+ \d+ \S+ (\w+ [\w-]+)", it.server.log())
    assert reasons == [f"{e['verdict']} {e['reason']}" for e in it.events()]


@pytest.mark.parametrize("keep", ["truncate", "full"])
def test_the_sender_is_known_by_what_was_fetched_while_writing_also_after_a_restart(
        tracked, keep):
    it = tracked("--keep-address", keep, window=120)
    assert it.judged() == ("self", "composing")
    assert it.judged(agent=THUNDERBIRD, address=HOME6) == ("self", "composing")
    later = ("--compose-window", "0", "--keep-address", keep)
    it.restart(*later)
    eventually(lambda: it.judged() == ("self", "sender-client"), 5, 0.1)
    assert it.judged(agent=THUNDERBIRD, address=HOME6) == ("self", "sender-client")
    assert it.judged(agent=THUNDERBIRD, address=OFFICE) == ("human", "mail-client")
    hits, opens = it.counts()
    assert opens == sum(e["verdict"] == "human" and e["reason"] != "repeat"
                        for e in it.events())


def test_two_servers_judge_as_one(tracked):
    it = tracked(n=2)
    one, two = it.server, it.start_elsewhere()
    assert it.judged(agent=THUNDERBIRD) == ("human", "mail-client")
    it.server = two
    assert it.judged(agent=THUNDERBIRD) == ("human", "repeat")
    assert it.judged(it.tags[1], agent=STALE, address=OFFICE) == ("human", "browser")
    it.server = one
    assert it.judged(it.tags[1]) == ("human", "browser")
    assert [e["event"] for e in it.events()] == ["hit"] * 4 + ["verdict"]
    assert (it.counts(), it.counts(it.tags[1])) == ((2, 1), (2, 1))
    it.server = two
    assert it.judged(it.tags[1], address="81.105.41.2") == ("human", "repeat")


def test_what_one_server_saw_while_writing_another_one_knows_at_once(tracked):
    it = tracked(window=120)
    one, two = it.server, it.start_elsewhere("--compose-window", "0")
    assert it.judged() == ("self", "composing")
    it.server = two
    assert it.judged() == ("self", "sender-client")
    assert it.judged(agent=THUNDERBIRD) == ("human", "mail-client")
    assert one.process.poll() is None


def test_the_window_begins_with_each_tag_and_may_be_none(tracked, newtags):
    it = tracked(window=120)
    text = it.register.read_text()
    created = register_rows(it.register)[it.tag]["created"]
    it.server.stop()
    it.register.write_text(text.replace(created, "2026-01-01T00:00:00Z"))
    it.register.with_name("register.csv.twin").unlink()
    it.restart()
    young, = newtags(it.register)
    assert it.judged() == ("human", "browser")
    assert it.judged(young) == ("self", "composing")
    it.restart("--compose-window", "0")
    assert it.judged(young, address=OFFICE) == ("human", "browser")


def test_one_s_own_networks_are_self_and_judged_by_the_whole_address(tracked):
    it = tracked("--me", "203.0.113.5", "--me", "2a00:23c6::/32", "--me", "10.0.0.0/8")
    for address in ("203.0.113.5", HOME6, "10.9.8.7", "::ffff:10.1.2.3"):
        assert it.judged(address=address) == ("self", "own-network")
    assert it.judged(address="203.0.113.6") == ("human", "browser")
    assert {e["address"] for e in it.events()} == {
        "203.0.113.0", "2a00:23c6:1234::", "10.9.8.0", "10.1.2.0"}
    assert it.counts() == (5, 1)


def test_an_armed_tag_has_no_window_and_is_judged_from_the_time_of_sending(
        tracked, tracker):
    it = tracked(window=120)
    done = tracker("newtag", "--armed", "--register", it.register, "--format", "url",
                   "--server", "x.example")
    armed = re.search(r"/(\w+)\.gif", done.stdout)[1]
    assert it.judged() == ("self", "composing")
    assert it.judged(armed, agent=GMAIL, address=OFFICE) == ("proxy", "gmail-proxy")
    assert it.judged(armed) == ("machine", "fast")
    assert (it.counts(), it.counts(armed)) == ((1, 0), (2, 1))
    assert register_rows(it.register)[armed]["sent"].endswith("Z")


@pytest.mark.parametrize("damaged", ["/{}%27.gif", "/{}x.gif", "/img/{}333.png?a=/b"],
                         ids=["quote", "letter", "in a folder"])
def test_a_damaged_link_before_the_clean_one_is_a_scanner_s_probe(tracked, damaged):
    it = tracked(n=2)
    it.fetch(address=OFFICE, path=damaged)
    assert it.judged(address=OFFICE) == ("machine", "probe")
    assert it.judged(address=HOME) == ("human", "browser")
    assert it.judged(it.tags[1], address=OFFICE) == ("human", "browser")
    assert it.counts() == (2, 1)


def test_a_damaged_last_letter_is_a_scanner_s_probe(tracked):
    it = tracked()
    other = it.tag[:-1] + ("3" if it.tag[-1] != "3" else "4")
    it.fetch(other, address=OFFICE)
    assert it.judged(address=OFFICE) == ("machine", "probe")


def test_of_many_networks_the_best_open_stays_and_the_log_corrects_the_other(tracked):
    it = tracked()
    it.fetch(agent=STALE, address=OFFICE)
    assert it.counts() == (1, 1)
    it.fetch(agent=CHROME, address=HOME)
    assert it.counts() == (2, 1)
    first, second, verdict = it.events()
    assert (second["verdict"], second["reason"]) == ("human", "browser")
    assert verdict == {**first, "event": "verdict", "verdict": "machine",
                       "reason": "many-networks"}
    assert it.judged(agent=STALE, address=THIRD) == ("machine", "many-networks")
    known = it.counts()
    it.server.stop()
    assert known == (3, 1)
    empty = re.sub(r",\d{10},[^,]{20},\d{10},[^,]{20},",
                   f",{0:010},{'':20},{0:010},{'':20},", it.register.read_text())
    it.register.write_text(empty)
    it.register.with_name("register.csv.twin").write_text(empty)
    it.restart()
    eventually(lambda: it.counts() == known, 5)


def test_the_last_open_is_the_one_that_stays_of_many_networks(tracked):
    it = tracked()
    it.fetch(agent=STALE, address=OFFICE)
    first = register_rows(it.register)[it.tag]["last_open"]
    eventually(lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) > first, 5)
    it.fetch(agent=CHROME, address=HOME)
    row = register_rows(it.register)[it.tag]
    assert row["last_open"] == row["last_hit"] > first


# ---------------------------------------------------------------------------
# Privacy
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep, kept", [
    ((), ["81.105.41.0", "2a00:23c6:1234::"]),
    (("--keep-address", "truncate"), ["81.105.41.0", "2a00:23c6:1234::"]),
    (("--keep-address", "full"), [HOME, HOME6]),
    (("--keep-address", "none"), ["", ""]),
], ids=["default", "truncate", "full", "none"])
def test_no_more_of_an_address_is_kept_than_is_wanted(tracked, tmp_path, keep, kept):
    it = tracked(*keep)
    for address in (HOME, HOME6):
        it.fetch(address=address, agent=THUNDERBIRD)
    assert [e["address"] for e in it.events()] == kept
    assert re.findall(r" hit \w+ \d+ (\S+)", it.server.log()) == [
        address or "-" for address in kept]
    if HOME not in kept:
        everything = b"".join(p.read_bytes() for p in tmp_path.iterdir()).decode()
        assert HOME not in everything + it.server.log()
        assert HOME6 not in everything + it.server.log()


def test_an_agent_need_not_be_kept_to_be_judged(tracked):
    it = tracked("--keep-agent", "no")
    assert it.judged(agent=GMAIL) == ("proxy", "gmail-proxy")
    assert it.judged(agent=CURL) == ("machine", "http-library")
    assert [e["agent"] for e in it.events()] == ["", ""]
    assert "GoogleImageProxy" not in it.server.log()
    assert it.counts() == (2, 1)


@pytest.mark.parametrize("headers, hidden", [
    ({"Sec_GPC": "1"}, True), ({"DNT": "1"}, True), ({"sec_gpc": "1"}, True),
    ({"DNT": "0", "Sec_GPC": "1"}, True), ({"DNT": "0"}, False),
    ({"Sec_GPC": "?0"}, False), ({"X_DNT": "1"}, False)],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_who_asks_not_to_be_tracked_is_counted_without_address_and_agent(
        tracked, headers, hidden):
    it = tracked("--keep-address", "full")
    assert it.judged(agent=STALE, address=OFFICE, **headers) == ("human", "browser")
    event, = it.events()
    assert (event["address"], event["agent"]) == \
        (("", "") if hidden else (OFFICE, STALE))
    assert ("Windows NT" in it.server.log()) is not hidden
    it.fetch(address=HOME)
    turned = it.events()[2]
    assert turned["event"] == "verdict"
    assert (turned["address"], turned["agent"]) == (event["address"], event["agent"])
    assert it.counts() == (2, 1)


# ---------------------------------------------------------------------------
# Commands for new opens
# ---------------------------------------------------------------------------


@pytest.fixture
def noted(tmp_path):
    """Return a command that notes its MAILTRACKER_ variables, and what it noted."""
    script, out = tmp_path / "note.py", tmp_path / "noted.json"
    script.write_text(
        "import json, os\n"
        "facts = {k: v for k, v in os.environ.items() if k[:12] == 'MAILTRACKER_'}\n"
        f"with open({str(out)!r}, 'a') as file:\n"
        "    file.write(json.dumps(facts) + '\\n')\n")

    def read(number):
        text = eventually(lambda: out.exists() and out.read_text().count("\n") >= number
                          and out.read_text())
        return [{name[12:].lower(): value for name, value in json.loads(line).items()}
                for line in text.splitlines()]
    return f"'{sys.executable}' '{script}'", read


def test_a_command_is_run_for_every_new_open_and_told_which(tracked, noted):
    command, read = noted
    it = tracked("--on-open", command, names=['"Jö ""the boss"", 1"', "other"])
    it.fetch(agent=CURL)
    it.fetch()
    it.fetch()  # a reload
    it.fetch(it.tags[1], agent=GMAIL, address=OFFICE)
    it.fetch(agent=THUNDERBIRD)
    first, second, third = read(3)
    event = it.events()[1]
    assert first == {"id": it.tag, "name": 'Jö "the boss", 1', "hits": "2",
                     "opens": "1", "time": event["time"], "verdict": "human",
                     "reason": "browser", "address": "81.105.41.0", "agent": CHROME}
    assert (second["id"], second["name"], second["verdict"]) == (
        it.tags[1], "other", "proxy")
    assert (third["id"], third["hits"], third["opens"]) == (it.tag, "4", "2")
    assert it.server.stop() == 0
    assert len(read(3)) == 3


def test_a_command_may_be_run_for_the_first_open_of_each_tag_only(tracked, noted):
    command, read = noted
    it = tracked("--on-open", command, "--on-open-first", n=2)
    for tag in it.tags:
        it.fetch(tag, agent=THUNDERBIRD, address=HOME)
        it.fetch(tag, agent=OUTLOOK, address=OFFICE)
    assert [(facts["id"], facts["opens"]) for facts in read(2)] == [
        (tag, "1") for tag in it.tags]
    assert it.server.stop() == 0
    assert len(read(2)) == 2


INJECTIONS = {
    "command substitution": "$(touch owned) `touch owned`",
    "end of the command": "; touch owned; #",
    "quotes": "'\"; touch owned; '\"",
    "pipe and newline": "| touch owned",
    "an option": "--help",
    "escape sequence": "\x1b[2J",
}


@pytest.mark.parametrize("text", list(INJECTIONS.values()), ids=list(INJECTIONS))
def test_no_name_and_no_agent_can_inject_anything_into_a_command(
        tracked, noted, newtags, tmp_path, text):
    command, read = noted
    it = tracked("--on-open", command)
    quoted = text.replace('"', '""')
    tag, = newtags(it.register, names=[f'"{quoted}"'])
    it.fetch(tag, agent=f"{THUNDERBIRD} {text}")
    facts, = read(1)
    assert facts["name"] == clean(text)
    assert facts["agent"] == f"{THUNDERBIRD} {clean(text)}"
    assert not (tmp_path / "owned").exists()


def test_commands_run_one_at_a_time(tracked, tmp_path):
    it = tracked("--on-open", "mkdir lock || touch clash; sleep 0.05; rmdir lock; "
                 "echo $MAILTRACKER_ID >> done", n=8)
    for tag in it.tags:
        it.fetch(tag)
    eventually(lambda: (tmp_path / "done").exists()
               and (tmp_path / "done").read_text().split() == it.tags)
    assert not (tmp_path / "clash").exists()


def test_a_slow_command_slows_neither_pixels_nor_counting(tracked, tmp_path):
    flag = tmp_path / "hold"
    flag.touch()
    it = tracked("--quiet", "--on-open",
                 "while [ -e hold ]; do sleep 0.02; done; echo x >> done", n=200)
    start = time.monotonic()
    for tag in it.tags:
        it.fetch(tag)
    assert time.monotonic() - start < 10
    assert [it.counts(tag) for tag in it.tags] == [(1, 1)] * 200
    assert it.server.get("/health")[0] == 200
    eventually(lambda: "the command is too slow" in it.server.log())
    assert not (tmp_path / "done").exists()
    flag.unlink()
    done = eventually(lambda: (tmp_path / "done").exists()
                      and len((tmp_path / "done").read_text().split()) > 99
                      and (tmp_path / "done").read_text().split())
    assert 100 <= len(done) <= 101
    assert it.server.stop() == 0


@pytest.mark.parametrize("command, words", [
    ("exit 3", "the command exits 3"), ("no-such-command-xyz", "the command exits 127"),
    ("kill -9 $$", "the command exits -9"), ("yes; exit 1", "ended|exits")],
    ids=["fails", "is not there", "is killed", "writes for ever"])
def test_a_command_that_fails_is_said_in_the_log_and_harms_nothing(
        tracked, tmp_path, command, words):
    if command.startswith("yes"):
        command = "head -c 300000 /dev/zero; exit 1"
    it = tracked("--on-open", command)
    it.fetch()
    eventually(lambda: re.search(words, it.server.log()))
    it.fetch(agent=THUNDERBIRD)
    assert it.counts() == (2, 2)
    assert "Traceback" not in it.server.log()
    assert it.server.stop() == 0


# ---------------------------------------------------------------------------
# Opens in the register
# ---------------------------------------------------------------------------


def save_by_rename(path, data):
    """Save a register as a spreadsheet does."""
    draft = path.with_name("draft.tmp")
    draft.write_bytes(data)
    os.replace(draft, path)


def edited(data, **cells):
    """Return a register as saved by a spreadsheet: no padding, cells changed."""
    rows = list(csv.DictReader(data.decode().splitlines()))
    lines = [";".join(rows[0])]
    for row in rows:
        row.update(hits=str(int(row["hits"])), opens=str(int(row["opens"])))
        lines.append(";".join({**row, **cells}.values()))
    return "\r\n".join([*lines, ""]).encode()


@pytest.mark.parametrize("save", [
    lambda old, new: old, lambda old, new: edited(old),
    lambda old, new: edited(new, opens="0", last_open=""),
    lambda old, new: edited(new, opens="99"),
    lambda old, new: re.sub(rb"(?m)^(\w+(,[^,\n]*){2})(,[^,\n]*){2}", rb"\1", new)],
    ids=["stale", "stale and unpadded", "opens cleared", "opens invented",
         "columns removed"])
def test_opens_survive_what_a_spreadsheet_saves(tracked, save):
    it = tracked(n=3)
    it.fetch()
    old = it.register.read_bytes()
    for agent in (THUNDERBIRD, OUTLOOK, CURL, OUTLOOK):
        it.fetch(agent=agent)
    it.fetch(it.tags[1], agent=GMAIL)
    known = register_rows(it.register)
    new = it.register.read_bytes()
    save_by_rename(it.register, save(old, new))
    it.fetch(it.tags[2], agent=CURL)
    eventually(lambda: set(known[it.tag]) <= set(register_rows(it.register)[it.tag]), 5)
    rows = register_rows(it.register)
    for tag in it.tags[:2]:
        assert rows[tag] == known[tag]
    assert [it.counts(tag) for tag in it.tags] == [(5, 3), (1, 1), (1, 0)]
    assert it.register.read_bytes() == \
        it.register.with_name("register.csv.twin").read_bytes()


def as_older_version(data):
    """Return a register as the version without opens wrote it."""
    rows = list(csv.DictReader(data.decode().splitlines()))
    lines = [",".join(row[name] for name in OLD_COLUMNS) for row in rows]
    return "".join(f"{line}\n" for line in [",".join(OLD_COLUMNS), *lines]).encode()


@pytest.mark.parametrize("files", [("", ".twin"), ("",), (".twin",)],
                         ids=["with its twin", "without a twin", "twin only"])
@pytest.mark.parametrize("first", ["server", "newtag"])
def test_an_older_register_and_its_twin_gain_opens_with_their_counts_kept(
        tracked, newtags, tmp_path, files, first):
    it = tracked(names=["Jö", "second", "third"])
    for number, tag in enumerate(it.tags):
        for _ in range(number):
            it.fetch(tag, agent=CURL)
    known = register_rows(it.register)
    assert it.server.stop() == 0
    it.log.unlink()
    old = as_older_version(it.register.read_bytes())
    for suffix in ("", ".twin"):
        (tmp_path / f"register.csv{suffix}").unlink()
    for suffix in files:
        (tmp_path / f"register.csv{suffix}").write_bytes(old)
    more = newtags(it.register) if first == "newtag" else []
    it.restart()
    it.fetch(it.tags[2], agent=THUNDERBIRD)
    rows = register_rows(it.register)
    assert list(rows) == it.tags + more
    assert list(rows[it.tag])[:7] == [
        "id", "hits", "last_hit", "opens", "last_open", "created", "name"]
    assert [it.counts(tag) for tag in it.tags] == [(0, 0), (1, 0), (3, 1)]
    assert rows[it.tags[1]] == known[it.tags[1]]
    assert rows[it.tag]["name"] == "Jö"
    assert it.register.read_bytes() == (tmp_path / "register.csv.twin").read_bytes()


def test_an_older_register_that_is_saved_over_while_serving_keeps_its_opens(tracked):
    it = tracked(n=2)
    it.fetch(agent=THUNDERBIRD)
    save_by_rename(it.register, as_older_version(it.register.read_bytes()))
    it.fetch(agent=OUTLOOK)
    eventually(lambda: it.counts() == (2, 2), 5)
    shutil.copy(it.register, it.register.with_name("copy"))
    it.fetch(it.tags[1], agent=OUTLOOK)
    assert it.counts(it.tags[1]) == (1, 1)
