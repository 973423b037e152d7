"""Hits in the light of those before, and what today's rules say of yesterday's."""
from __future__ import annotations

import csv
import random
import time
import tracemalloc

import pytest

import mailtracker
from mailtracker import MANY_NETWORKS, Event, Judge, Request, Tag, rejudge

A, B, C, D = (f"{c}cdfghjkmnpqrstvwxz23" for c in "bdfg")
HOME, OFFICE, CAFE = "81.105.41.164", "198.51.100.7", "203.0.113.9"
WEBKIT = "AppleWebKit/537.36 (KHTML, like Gecko)"
CHROME = (f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {WEBKIT} "
          "Chrome/149.0.0.0 Safari/537.36")
STALE = f"Mozilla/5.0 (Windows NT 6.1) {WEBKIT} Chrome/57.0.2987.133 Safari/537.36"
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
GMAIL = ("Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 "
         "(via ggpht.com GoogleImageProxy)")
CURL = "curl/8.5.0"
NOW = 1_800_000_000


def reason(judge, agent=CHROME, address=HOME, when=NOW, tag=A, **more):
    return judge.judge(tag, when, Request(agent, address), **more)[0].reason


# -- opens, and repeats of them -----------------------------------------------


@pytest.mark.parametrize("agent, address, after, repeated", [
    (CHROME, HOME, 0, True), (CHROME, HOME, 15, True), (CHROME, HOME, 16, False),
    (CHROME, "81.105.41.9", 5, True), (CHROME, "81.105.9.9", 5, False),
    (FIREFOX, HOME, 5, False), (CHROME, HOME, -9, True), (CHROME, HOME, -4000, False)])
def test_the_same_client_again_within_seconds_is_a_repeat(
        agent, address, after, repeated):
    judge = Judge()
    reason(judge)
    assert (reason(judge, agent, address, NOW + after) == "repeat") is repeated


def test_a_repeat_is_told_by_the_last_open_that_counted():
    judge = Judge()
    told = [reason(judge, when=NOW + after) for after in (0, 10, 20, 30, 40)]
    assert told == ["browser", "repeat", "browser", "repeat", "browser"]


def test_all_hosts_of_an_image_proxy_are_one_client_that_no_other_pushes_out():
    judge = Judge()
    assert reason(judge, GMAIL, "66.249.84.231") == "gmail-proxy"
    assert reason(judge, GMAIL, "74.125.210.5", NOW + 3) == "repeat"
    for number in range(5000):
        reason(judge, FIREFOX, CAFE, NOW + number // 400)
    assert reason(judge, GMAIL, "66.249.84.231", NOW + 12) == "repeat"


# -- many networks, probes ----------------------------------------------------


def test_a_better_candidate_overrules_a_stale_browser_of_the_same_minute():
    judge = Judge()
    judge.judge(A, NOW, Request(STALE, OFFICE))
    found, overruled = judge.judge(A, NOW + 20, Request(GMAIL, "66.249.84.231"))
    assert found.reason == "gmail-proxy"
    assert overruled == [Event(mailtracker.utc_text(NOW), "hit", A, None, None, "human",
                               "browser", OFFICE, STALE)]
    assert reason(judge, STALE, OFFICE, NOW + 25) == "many-networks"


@pytest.mark.parametrize("after, tag", [(61, A), (20, B), (-61, A)])
def test_nothing_is_overruled_from_another_time_or_tag(after, tag):
    judge = Judge()
    judge.judge(A, NOW, Request(STALE, OFFICE))
    assert judge.judge(tag, NOW + after, Request(FIREFOX, HOME))[1] == []


def test_who_asks_not_to_be_tracked_is_overruled_without_address_and_agent():
    judge = Judge()
    judge.judge(A, NOW, Request(STALE, OFFICE, private=True))
    old, = judge.judge(A, NOW + 5, Request(FIREFOX, HOME))[1]
    assert (old.event, old.address, old.detail) == ("hit", "", "")


@pytest.mark.parametrize("segment, address, before, expected", [
    (f"{A}%27", HOME, 5, "probe"), (A.upper(), "81.105.41.9", 60, "probe"),
    (A[:-2] + "zz", HOME, 1, "probe"), (f"{A}=", HOME, 61, "browser"),
    (f"{A}=", OFFICE, 5, "browser"), ("favicon", HOME, 5, "browser"),
    (f"{A}=", "", 5, "browser")])
def test_a_damaged_copy_of_the_id_just_before_is_a_scanners_probe(
        segment, address, before, expected):
    judge = Judge()
    judge.stray(segment.encode(), address, NOW - before)
    assert reason(judge) == expected


# -- the sender ---------------------------------------------------------------


def test_ones_own_network_and_the_composing_of_a_mail_are_self():
    judge = Judge(lambda address: address == OFFICE)
    assert judge.judge(A, NOW, Request(CHROME, OFFICE))[0] == ("self", "own-network")
    assert judge.judge(A, NOW, Request(CHROME, HOME), composing=True)[0] == (
        "self", "composing")
    assert reason(judge, when=NOW + 9999) == "sender-client"
    assert reason(judge, FIREFOX) == reason(judge, address=CAFE) == "browser"
    assert reason(judge, tag=B) == "browser"


@pytest.mark.parametrize("agent, address", [
    (GMAIL, "66.249.84.231"), (CURL, HOME), (FIREFOX, "104.28.31.7"), (CHROME, "")],
    ids=["image proxy", "machine", "private relay", "no address"])
def test_what_is_nobodys_own_program_is_no_sender(agent, address):
    judge = Judge()
    for tag in (A, B, C):
        judge.judge(tag, NOW, Request(agent, address), composing=True)
    for tag in (A, D):
        assert reason(judge, agent, address, NOW + 99, tag) != "sender-client"


def test_who_composed_on_three_tags_is_the_sender_of_all():
    judge = Judge()
    for tag in (A, B, B):
        judge.judge(tag, NOW, Request(CHROME, HOME), composing=True)
    assert reason(judge, tag=D) == "browser"
    judge.judge(C, NOW, Request(CHROME, HOME), composing=True)
    assert reason(judge, tag=D) == "sender-client"
    assert reason(judge, FIREFOX, tag=D) == "browser"


def logged(address, agent, why="composing", kind="hit"):
    return Event("2026-11-01T08:00:00Z", kind, A, 1, 0, "self", why, address, agent)


@pytest.mark.parametrize("event, expected", [
    (logged(HOME, CHROME), "sender-client"), (logged("", CHROME), "browser"),
    (logged("81.105.41.0", CHROME), "sender-client"),
    (logged("81.105.41.0", ""), "browser"),
    (logged(HOME, CHROME, "own-network"), "browser"),
    (logged(HOME, CHROME, kind="verdict"), "browser")])
def test_a_sender_is_known_again_after_a_restart(event, expected):
    judge = Judge()
    judge.learn(event)
    assert reason(judge) == expected


def test_memory_is_bounded_whatever_comes(monkeypatch):
    for name in ("MOST_TAGS", "MOST_SENDERS"):
        monkeypatch.setattr(Judge, name, 100)
    judge = Judge()
    for i in range(1000):
        address, tag = f"81.{i % 250}.{i // 250}.1", f"{A}{i}"
        judge.judge(tag, NOW, Request(CHROME, address))
        judge.judge(tag, NOW, Request(CHROME, address), composing=True)
        judge.judge(A, NOW, Request(f"{CHROME} {i}.Browser", address))
        judge.stray(b"x" * 9999, address, NOW)
        judge.stray(b"x" * 9999, HOME, NOW)
    assert max(map(len, (judge._opens, judge._strays, judge._senders))) <= 100
    assert max(map(len, (*judge._opens.values(), *judge._strays.values()))) <= 16
    judge.forget_old(NOW + 61)
    assert not judge._opens and not judge._strays and judge._senders


# -- rejudge ------------------------------------------------------------------


def at(second):
    return mailtracker.utc_text(NOW + second)


def hit(second, agent, verdict, why, tag=A, address="192.0.2.0", kind="hit"):
    return Event(at(second), kind, tag, None, None, verdict, why, address, agent)


def lines(events):
    return [event.line() for event in events]


def changes(events, **tags):
    """Return what rejudge appends, and check that it then appends nothing more."""
    known = {A: Tag(9, at(900), 3, at(900)), B: Tag(4, at(700), 1, at(60)), **tags}
    found = list(rejudge(lambda word: lines(events), known))
    for event in found:
        known[event.id] = known[event.id]._replace(opens=event.opens)
        if event.event == "count":
            known[event.id] = known[event.id]._replace(last_open=event.detail)
    assert list(rejudge(lambda word: lines([*events, *found]), known)) == []
    return [(e.event, e.id, e.opens, e.reason or e.detail) for e in found]


OLD = [hit(0, CHROME, "human", "browser"), hit(60, CURL, "human", "unrecognised", B),
       hit(120, GMAIL, "machine", "crawler"), hit(180, CURL, "self", "composing"),
       hit(900, CURL, "human", "unrecognised")]


def test_a_correction_names_its_hit_as_the_log_does():
    tags = {B: Tag(4, at(700), 1, at(60))}
    found = next(iter(rejudge(lambda word: lines(OLD[1:2]), tags)))
    assert found == OLD[1]._replace(event="verdict", verdict="machine", hits=4, opens=0,
                                    reason="http-library")


OVERRULED = [hit(0, STALE, "human", "browser", address=OFFICE),
             hit(20, FIREFOX, "human", "browser")]
MANY = hit(0, STALE, *MANY_NETWORKS, address=OFFICE, kind="verdict")
STAYS = {
    "rules agree": [hit(0, CHROME, "human", "browser"),
                    hit(5, CHROME, "human", "repeat")],
    "overruled, and said so": [*OVERRULED, MANY],
    "no agent kept": [hit(0, "", "machine", "crawler")],
    "no address kept": [hit(0, CURL, "human", "browser", address="")],
    "prefetch": [hit(0, CHROME, "machine", "prefetch-header")],
    "probe": [hit(0, CHROME, "machine", "probe")],
    "self": [hit(0, CHROME, "self", "sender-client")],
    "a network that the address kept has lost": [
        hit(0, CHROME, "machine", "security-gateway", address="3.24.133.0")],
    "soon after a sending nobody remembers": [hit(0, CHROME, "machine", "fast")],
    "self, as was found later": [
        hit(0, CHROME, "human", "browser"),
        hit(0, CHROME, "self", "own-network", kind="verdict")],
    "overruled by nobody knows whom": [
        OVERRULED[0], hit(20, "", "human", "browser", address=""), MANY],
    "another kind": [hit(0, CURL, "human", "browser", kind="click")],
    "a tag that is gone": [hit(0, CURL, "human", "browser", C)],
    "a time that is none": [hit(0, CHROME, "human", "browser")._replace(
        time="2026-13-99T10:00:00Z")],
}


@pytest.mark.parametrize("events", STAYS.values(), ids=STAYS)
def test_what_agrees_or_rests_on_what_no_log_holds_stays(events):
    assert changes(events) == []


TWICE = [OLD[0], hit(900, CURL, "human", "browser"), hit(900, CURL, "human", "repeat")]
SENT = Tag(1, at(5), 1, at(5), sent=at(0))


@pytest.mark.parametrize("events, tags, expected", [
    (OLD, {}, [("verdict", B, 0, "http-library"), ("verdict", A, 4, "gmail-proxy"),
               ("verdict", A, 3, "http-library"), ("count", B, 0, ""),
               ("count", A, 3, at(120))]),
    (OVERRULED, {}, [("verdict", A, 2, "many-networks")]),
    ([OVERRULED[0], MANY], {}, [("verdict", A, 4, "browser")]),
    ([hit(5, CHROME, "human", "browser")], {A: SENT},
     [("verdict", A, 0, "fast"), ("count", A, 0, "")]),
    ([hit(0, CURL, "human", "browser")], {}, [("verdict", A, 2, "http-library")]),
    (TWICE, {}, [("verdict", A, 2, "http-library"), ("count", A, 2, at(0))])],
    ids=["outdated", "overruled today", "overruled no longer", "soon after sending",
         "last open in a file that is gone", "twice in a second"])
def test_what_the_rules_say_otherwise_today_is_corrected(events, tags, expected):
    assert changes(events, **tags) == expected


def test_a_random_log_needs_no_second_correction():
    rng = random.Random(5)
    agents, tags = (CHROME, STALE, FIREFOX, GMAIL, CURL, ""), (A, B)
    for _ in range(100):
        second, events = 0, []
        for _ in range(rng.randrange(60)):
            second += rng.choice((0, 1, 5, 20, 90, -2))
            verdict = rng.choice((("human", "browser"), ("human", "repeat"),
                                  ("machine", "x"), ("proxy", "gmail-proxy"),
                                  ("machine", "many-networks")))
            events.append(hit(second, rng.choice(agents), *verdict, rng.choice(tags),
                              rng.choice(("192.0.2.0", "198.51.100.0", ""))))
            if rng.random() < 0.2:
                events.append(rng.choice(events)._replace(
                    event="verdict", verdict="machine", reason="many-networks"))
        changes(events)


def judged_one_by_one(events):
    """Return what rejudge should find, from a Judge that is given every hit."""
    judge, said, found = Judge(), {}, {}
    for event in events:
        key = event.id, event.time, event.address, event.detail
        if event.event == "verdict":
            said[key] = event[5:7]
            continue
        verdict, overruled = judge.judge(
            event.id, int(mailtracker.seconds(event.time)),
            Request(event.detail, event.address))
        if key not in found:
            found[key] = verdict, event[5:7]
        for old in overruled:
            key = old.id, old.time, old.address, old.detail
            found[key] = MANY_NETWORKS, found[key][1]
    return {key: verdict for key, (verdict, own) in found.items()
            if verdict != said.get(key, own)}


@pytest.mark.parametrize("number", [1, 3, 40])
@pytest.mark.parametrize("steps", [(0, 0, 1, 5, 20, 90), (0, 1, 2, -2), (30, 60, 300)],
                         ids=["mixed", "dense", "sparse"])
def test_a_look_at_most_hits_finds_what_judging_each_finds(steps, number):
    rng = random.Random(number)
    agents = CHROME, STALE, FIREFOX, GMAIL, CURL, "Mozilla/5.0", '=a "b", c'
    addresses = "192.0.2.0", "198.51.100.0", "66.249.84.0", "104.28.31.0", "2001:db8::"
    tags = {f"b{i}": Tag(9, at(99), 5, at(99)) for i in range(number)}
    for _ in range(50):
        second, events, share = 0, [], rng.random()
        for _ in range(rng.randrange(150)):
            second += rng.choice(steps)
            agent, address = rng.choice(agents), rng.choice(addresses)
            verdict = mailtracker.judge(Request(agent, address))
            if rng.random() < share:
                verdict = rng.choice((("human", "browser"), ("human", "repeat"),
                                      ("machine", "x"), MANY_NETWORKS))
            events.append(hit(second, agent, *verdict, rng.choice([*tags]), address))
            if rng.random() < 0.1:
                events.append(rng.choice(events)._replace(
                    event="verdict", verdict="machine", reason="many-networks"))
        found = rejudge(lambda word: lines(events), tags)
        assert {(e.id, e.time, e.address, e.detail): (e.verdict, e.reason)
                for e in found if e.event == "verdict"} == judged_one_by_one(events)


def test_a_long_log_takes_little_memory_and_time(tmp_path):
    """The bars for a million events are in the bench; these are 50,000."""
    path = tmp_path / "events.csv"
    agents = [(CHROME, "human", "browser"), (GMAIL, "proxy", "gmail-proxy"),
              (CURL, "machine", "http-library"), (CURL, "human", "browser")]
    with open(path, "wb") as file:
        for i in range(50_000):
            agent, *verdict = agents[i % 60 and i % 3]
            file.write(hit(i // 3, agent, *verdict, f"b{i * 7 % 5000}").line())

    def events():
        with open(path, "rb") as file:
            yield from file

    def read():
        with open(path, newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv.reader(file))

    def seconds(function):
        begun = time.process_time()
        function()
        return time.process_time() - begun

    tags = {f"b{i}": Tag(10, at(99_999), 9, at(99_999)) for i in range(5000)}
    ours = min(seconds(lambda: list(rejudge(lambda word: events(), tags)))
               for _ in range(3))
    assert ours < 10 * min(seconds(read) for _ in range(3))
    tracemalloc.start()
    assert all(event.event for event in rejudge(lambda word: events(), tags))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
