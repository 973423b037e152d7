"""Figures and reports: statistics against others' values, counts against a recount."""
from __future__ import annotations

import csv
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.dom import minidom

import pytest
from conftest import launch, save

import mailtracker
from mailtracker import Event, Files, Figures, Mail, Story, utc_text

NOW = 1_764_000_000
APPLE = "machine", "apple-mpp"
GMAIL = "proxy", "gmail-proxy"
READ = "human", "mail-client"
ROBOT = "machine", "http-library"
JUDGED = (APPLE, GMAIL, READ, ROBOT, ("human", "repeat"), ("self", "composing"),
          ("unknown", "no-agent"))


# -- statistics, with the values of statsmodels 0.14 and lifelines 0.30 -----------

WILSON = [
    (0, 0, 0.0, 1.0),
    (0, 1, 0.0, 0.7934506856227627),
    (1, 1, 0.2065493143772374, 1.0),
    (0, 5, 0.0, 0.43448246478317487),
    (5, 5, 0.5655175352168252, 1.0),
    (1, 10, 0.017876213095072924, 0.40415002679523854),
    (42, 120, 0.27051899590285405, 0.4387867540227571),
    (137, 272, 0.44462191028069664, 0.5626286314201433),
    (999, 1000, 0.9943574414020421, 0.9998234536293739),
    (1, 100000, 1.7652477303783092e-06, 5.664709659040968e-05),
]
NEWCOMBE = [
    (42, 120, 31, 118, -0.029804349820641146, 0.2009862828455549),
    (0, 10, 10, 10, -1.0, -0.6075093504305241),
    (5, 5, 5, 5, -0.43448246478317476, 0.43448246478317476),
    (1, 1, 0, 1, -0.12210872068194178, 1.0),
    (56, 70, 48, 80, 0.05243147240236498, 0.33387265403690614),
    (300, 1000, 250, 1000, 0.0108590303882002, 0.08893920346992558),
    (1, 2, 0, 0, -1.0, 1.0),
]
KAPLAN_MEIER = {
    "all opened": ([3, 1, 2], [], {1: 0.33333333, 2: 0.66666667, 3: 1.0}, 2),
    "one of four": ([5], [9, 1, 2], {5: 0.5}, 5),
    "ties": ([1, 1, 2, 3, 3], [1, 2, 2, 4],
             {1: 0.22222222, 2: 0.35185185, 3: 0.78395062}, 3),
    "interleaved": ([10, 20, 30, 40], [15, 25, 35, 45],
                    {10: 0.125, 20: 0.27083333, 30: 0.453125, 40: 0.7265625}, 40),
    "none opened": ([], [1, 2], {}, None),
    "nobody": ([], [], {}, None),
}


@pytest.mark.parametrize("count, total, low, high", WILSON)
def test_the_interval_of_a_share_is_wilsons(count, total, low, high):
    assert mailtracker.wilson(count, total) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("a, n, b, m, low, high", NEWCOMBE)
def test_the_interval_of_a_difference_is_newcombes(a, n, b, m, low, high):
    assert mailtracker.newcombe(a, n, b, m)[1:] == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("after, waiting, curve, half", KAPLAN_MEIER.values(),
                         ids=KAPLAN_MEIER)
def test_the_share_opened_by_a_time_is_kaplan_and_meiers(after, waiting, curve, half):
    assert dict(mailtracker.kaplan_meier(after, waiting)) == pytest.approx(curve)
    figures = Figures()
    for length in after:
        figures.add(Mail(1, 1, "", "", NOW), Story(first=NOW + length), NOW + 99)
    for length in waiting:
        figures.add(Mail(0, 0, "", "", NOW - length), Story(), NOW)
    assert figures.half_time() == half


def test_as_many_as_are_said_to_be_needed_tell_a_difference_four_times_in_five():
    chance, needed = random.Random(5), mailtracker.enough(0.35, 0.26)
    told = 0
    for _ in range(400):
        a, b = (sum(chance.random() < share for _ in range(needed))
                for share in (0.35, 0.26))
        told += not mailtracker.newcombe(a, needed, b, needed)[1] <= 0
    assert 0.72 < told / 400 < 0.88
    assert mailtracker.enough(0.3, 0.3) is None


@pytest.mark.parametrize("opened, sent, days, rated", [
    (1, 1, 1, 66), (14, 20, 1, 74), (0, 0, 1e9, 30)])
def test_a_recipient_is_rated_by_many_mails_rather_than_by_one(opened, sent, days,
                                                               rated):
    assert mailtracker.score(opened, sent, 0.4, days) == pytest.approx(rated, abs=0.5)


# -- random registers and logs, and an independent recount -------------------------

def history(tag, chance):
    """Return random events of one tag, with counts as their writers give them."""
    sent, hits, opens = NOW + chance.randint(-9999, 9999), 0, 0
    told = [Event(utc_text(sent), "made", tag, 0, 0, detail="Ann, of \u2028 x")]
    told += [Event(utc_text(sent), kind, tag) for kind in chance.sample(
        ("queued", "sending", "sent", "failed", "delayed"), 2)]
    for number in range(chance.randint(0, 6)):
        event = Event(utc_text(sent + 60 + number),
                      chance.choice(("hit", "hit", "hit", "clicked", "replied",
                                     "bounced")), tag, address="192.0.2.0",
                      detail=f"agent {number}")
        if event.event in ("hit", "clicked"):
            judged = chance.choice(JUDGED)
            hits += event.event == "hit"
            if event.event == "clicked" and opens and judged[0] in mailtracker.OPENS:
                judged = judged[0], "opened"
            opens += mailtracker.is_open(*judged)
            event = event._replace(hits=hits, opens=opens, verdict=judged[0],
                                   reason=judged[1])
        told.append(event)
        if event.hits is not None and chance.random() < 0.2:  # is judged anew
            new = chance.choice((APPLE, ROBOT, READ))
            if event.event == "clicked" and new == READ:
                continue
            opens += mailtracker.is_open(*new) - mailtracker.is_open(*judged)
            told.append(event._replace(event="verdict", opens=opens, verdict=new[0],
                                       reason=new[1]))
    return told


def scenario(folder, chance):
    """Write a random register with its log; return its files."""
    files, events = Files(str(folder / "register.csv")), []
    ids = mailtracker.new_ids(b"k" * 16, chance.randint(1, 12), chance.getrandbits(40))
    tags = [history(tag, chance) for tag in ids]
    while any(tags):  # events of all tags as they happen
        events.append(chance.choice([told for told in tags if told]).pop(0))
    cut = chance.choice((0, len(events) // 2))
    for path, part in ((files.log + ".1", events[:cut]), (files.log, events[cut:])):
        if part:
            save(path, mailtracker.EVENT_HEADER + b"".join(e.line() for e in part)
                 + b"2026-11-2" * (path == files.log))
    save(files.register, "id,hits,last_hit,opens,last_open,created,name,sent,status\n"
         + "".join(f"{tag},0,,0,,,,,\n" for tag in ids))
    if chance.random() < 0.1:
        mailtracker.settle(files)
    return files


def recount(files):
    """Return the figures of a register and its log, counted in the simplest way."""
    columns, rows = mailtracker.register_rows(files)
    log = [event for event in mailtracker.read_log(files.log)]
    client = lambda event: (event.id, event.time, event.address, event.detail)  # noqa
    anew = {client(event): event[5:7] for event in log if event.event == "verdict"}
    found = dict.fromkeys(("sent", "opened", "cannot_be_known", "no_hit", "bounced",
                           "not_sent", "clicked", "replied", "hits", "opens",
                           "opens_by_click", "machines", "own", "unclear",
                           "repeats"), 0)
    for row in (dict(zip(columns, row)) for row in rows):
        mine = [event._replace(**dict(zip(("verdict", "reason"),
                                          anew.get(client(event), event[5:7]))))
                for event in log if event.id == row["id"]]
        kinds = {event.event for event in mine}
        hits = [event for event in mine if event.event == "hit"]
        opens = [event for event in hits if mailtracker.is_open(*event[5:7])]
        clicks = [event for event in mine if event.event == "clicked"
                  and event.verdict in mailtracker.OPENS]
        found["hits"] += int(row["hits"])
        found["opens"] += int(row["opens"])
        found["opens_by_click"] += any(
            event.reason not in ("opened", "repeat") for event in clicks)
        for event in hits:
            word = "repeats" if event.reason == "repeat" else {
                "machine": "machines", "self": "own", "unknown": "unclear"}.get(
                    event.verdict)
            found[word or "hits"] += word is not None
        is_opened = bool(int(row["opens"]) or opens or clicks or "replied" in kinds)
        if "bounced" in kinds or row.get("status") == "bounced":
            found["bounced"] += 1
            continue
        if not is_opened and row.get("status") in ("queued", "sending", "failed"):
            found["not_sent"] += 1
            continue
        found["sent"] += 1
        found["clicked"] += bool(clicks)
        found["replied"] += "replied" in kinds
        is_ahead = any("apple-mpp" in event.reason for event in hits)
        found["opened" if is_opened else
              "cannot_be_known" if is_ahead else "no_hit"] += 1
    return found


def options_of(*argv):
    """Return the options of a report."""
    return mailtracker.parse(["report", *argv])


@pytest.mark.parametrize("seed", range(10))
def test_random_registers_and_logs_come_to_what_a_recount_says(tmp_path, seed):
    chance = random.Random(seed)
    for number in range(50):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = scenario(folder, chance)
        total = mailtracker.Report(files, options_of()).total
        found, said = recount(files), total.as_json()
        assert {name: said[name] for name in found} == found
        assert said["sent"] == found["opened"] + found["cannot_be_known"] \
            + found["no_hit"]
        assert sum(total.aside) == said["set_aside"]
        opens = said["opens"] - said["opens_by_click"]
        assert said["hits"] == opens + said["set_aside"]


def test_a_verdict_is_on_the_first_of_hits_that_are_alike(tmp_path):
    files, tag_id = Files(str(tmp_path / "r.csv")), "bcd" * 7
    when = utc_text(NOW)
    alike = [Event(when, "hit", tag_id, number, 0, *ROBOT, "192.0.2.0", "agent")
             for number in (1, 2)]
    save(files.register, "id,hits,last_hit,opens,last_open,created,name\n"
         f"{tag_id},0,,0,,,n\n")
    save(files.log, mailtracker.EVENT_HEADER + b"".join(
        event.line() for event in [*alike, alike[1]._replace(
            event="verdict", opens=1, verdict="human", reason="mail-client")]))
    figures = mailtracker.Report(files, options_of("--register", files.register)).total
    assert (figures.hits, figures.opens, figures.set_aside) == (2, 1, 1)
    assert figures.aside == [1, 0, 0, 0]


def test_a_log_is_followed_as_it_would_be_read_anew(tmp_path):
    chance = random.Random(1)
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = scenario(folder, chance)
        lines = list(mailtracker.lines_of_log(files.log))
        live = Files(str(tmp_path / "live.csv"))
        stories, follower = None, mailtracker.Stories(live.log)
        for start in range(0, len(lines), 7):
            with open(live.log, "ab") as log:
                log.write(b"\n".join(lines[start:start + 7]) + b"\n" + b"2026-" * (
                    chance.random() < 0.2))
            if chance.random() < 0.1:
                mailtracker.rotate_log(live.log)
            assert follower.look()
            stories = mailtracker.Stories(live.log)
            stories.look()
            assert not follower.look()
            for name in {line.split(b",")[2].decode() for line in lines
                         if line.count(b",") > 3}:
                assert follower.of(name) == stories.of(name)
            assert follower.hours == stories.hours
        for path in mailtracker.log_files(live.log):
            (tmp_path / path).unlink()


# -- the command -----------------------------------------------------------------

@pytest.fixture
def mailed(tmp_path, monkeypatch):
    """A register of three mailings: 40 mails, half of them opened; its folder."""
    monkeypatch.chdir(tmp_path)
    files, lines, rows = Files("register.csv"), [], []
    ids = mailtracker.new_ids(b"m" * 16, 43)
    for number, tag in enumerate(ids):
        made, campaign = time.time() - 5 * 86400, "=A" if number < 20 else "B, b"
        campaign = campaign if number < 40 else "\x1b[31m<img onerror>"
        rows.append(f'{tag},0,,0,,{utc_text(made)},n{number},"{campaign}",'
                    f"{number % 7}@x.org\n")
        judged = ROBOT if number > 39 else READ if number % 2 else APPLE
        opens = int(judged == READ)
        lines.append(Event(utc_text(made + 60), "hit", tag, 1, opens,
                           *judged, "192.0.2.0", "agent").line())
    save("register.csv", "id,hits,last_hit,opens,last_open,created,name,campaign,"
         "email\n" + "".join(rows))
    save("register.events.csv", mailtracker.EVENT_HEADER + b"".join(lines))
    mailtracker.settle(files)
    return tmp_path


def report(capsys, *argv):
    assert mailtracker.main(["report", *argv]) == 0
    return capsys.readouterr().out


def test_a_report_says_what_is_known_and_what_is_not(mailed, capsys):
    lines = report(capsys).splitlines()
    assert lines[0] == "47 % at least, 87 % estimated (68 to 95), 93 % at most"
    assert re.fullmatch("█+▒+░+", lines[1]) and len(lines[1]) == 78
    assert "Cannot be known             20  Apple fetches ahead" in lines
    assert "Half had opened by        60 s  of those that can be known" in lines


def test_groups_stand_by_size_and_few_mails_have_no_rate(mailed, capsys):
    lines = report(capsys, "--by", "campaign").splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "=A", "B, b", r"\x1b[31m<img onerror>"]
    assert "50 % █████▒▒▒▒▒  100 % (72 to 100)" in lines[1]
    assert "0 to 56 %" in lines[3]


@pytest.mark.parametrize("by, group", [
    ("day", r"\d{4}-\d\d-\d\d"), ("hour", r"\d\d"), ("weekday", r"[1-7] [A-Z][a-z]+"),
    ("name", r"n\d+"), ("email", r"\d@x.org")])
def test_mails_are_grouped_by_anything(mailed, capsys, by, group):
    for form in ([], ["--local"]):
        heading, *rows = report(capsys, "--by", by, *form).split("\n\n")[0].splitlines()
        assert rows and all(re.match(group + " ", row) for row in rows)
    assert sum(int(row.split()[2 if by == "weekday" else 1]) for row in rows) == 43


def test_two_groups_differ_only_where_chance_would_hardly_do_it(mailed, capsys):
    text = report(capsys, "--compare", "=A", "B, b")
    assert text.count("no difference can be told") == 2
    text = report(capsys, "--compare", "=A", "\x1b[31m<img onerror>")
    assert "difference +100 points (+37 to +100): =A has more" in text
    assert "whoever looks again and again" in text


def test_json_and_csv_hold_the_same(mailed, capsys):
    by = "--by", "campaign"
    found = json.loads(report(capsys, *by, "--format", "json"))
    rows = list(csv.DictReader(report(capsys, *by, "--format", "csv").splitlines()))
    for group, row in zip(found["groups"], rows):
        assert row["group"].lstrip("'") == mailtracker.clean(group["group"])
        assert (row["sent"], float(row["rate_low"])) == (
            str(group["sent"]), group["rate"]["low"])
    assert rows[0]["group"] == "'=A"
    rows = json.loads(report(capsys, "--by", "opens", "--format", "json"))["groups"]
    assert [(row["group"], row["opens"]) for row in rows] == [("0", 0), ("1", 20)]
    assert found["all"]["sent"] == 43 and found["all"]["rate"]["at_most"] == 40 / 43
    compared = json.loads(report(capsys, "--format", "json", "--compare", "=A", "B, b"))
    assert [each["is_told"] for each in compared["compared"]] == [False, False]


def test_a_page_has_no_script_asks_nobody_and_is_sound(mailed, capsys):
    page = report(capsys, "--by", "campaign", "--format", "html")
    assert "<img" not in page and "&lt;img onerror&gt;" in page
    assert not re.search(r"<script|\bon\w+=|style=|url\(|@import|(?:href|src)=", page)
    assert not re.search("https?://", page) and len(page) < 40_000
    for picture in re.findall("<svg.*?</svg>", page):
        minidom.parseString(picture)
        assert "aria-label=" in picture or 'class="key"' in picture


def test_an_empty_register_and_a_narrow_choice_are_reported(mailed, capsys):
    assert report(capsys, "--campaign", "C").startswith("nothing was sent\n")
    assert report(capsys, "--since", "1h").startswith("nothing was sent\n")
    assert "nothing was sent" in report(capsys, "--since", "1h", "--format", "html")
    assert '"at_least": null' in report(capsys, "--since", "1h", "--format", "json")


HEAD = "id,hits,last_hit,opens,last_open,created,name\n"
ID = "bcdfghjkmnpqrstvwxz22"
HIT = f"2026-11-20T10:00:00Z,hit,{ID},1,1,human,browser"
ODD = {  # register, log, and how a report begins
    "a column named as a time": (
        f"id;hits;opens;last_open;created;day;name;last_hit\n{ID};3;1;;;x;y;\n", "",
        "21 to 100 % estimated, of 1 only"),
    "of 2018": (f"{ID},joe,3,1600000000\n", "", "0 to 79 % estimated, of 1 only"),
    "empty": ("", "", "nothing was sent"), "no rows": (HEAD, "", "nothing was sent"),
    "no such times": (f"{HEAD}{ID},99999999999999,9999-99-99,5,,2026-13-45T99:99:99Z,"
                      + "x" * 9999, "", "21 to 100 % estimated, of 1 only"),
    "far times": (f"{HEAD}{ID},1,9999-12-31T23:59:59Z,1,9999-12-31T23:59:59Z,"
                  "0001-01-01T00:00:00Z,n\n", "", "21 to 100 % estimated, of 1 only"),
    "a torn log": (f"{HEAD}{ID},1,,1,,2026-11-20T09:00:00Z,n\n",
                   f"\0\0\n2026-11-20T10:00:00Z,verdict,x\n,verdict,\n{HIT},,\xff\"\n"
                   f"{HIT[:-9]}\n{'x' * 300_000}\n{HIT}", "21 to 100 % estimated"),
}


@pytest.mark.parametrize("form", ["text", "html", "json", "csv"])
@pytest.mark.parametrize("register, log, words", ODD.values(), ids=ODD)
def test_odd_registers_and_logs_are_reported(register, log, words, form, tmp_path,
                                             monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("register.csv", register)
    save("register.events.csv", mailtracker.EVENT_HEADER.decode() + log)
    assert report(capsys).startswith(words)
    for by in ("day", "hour", "weekday", "name"):
        assert report(capsys, "--by", by, "--local", "--format", form)


@pytest.mark.parametrize("argv, words", [
    (["--by", "colour"], "no column colour; there are id, .*, day, hour, weekday"),
    (["--compare", "=A", "C"], "no campaign C; there are "),
    (["--register", "none.csv"], "no such register")])
def test_what_is_not_there_is_said(mailed, capsys, argv, words):
    assert mailtracker.main(["report", *argv]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_a_reader_that_ends_early_ends_a_report_quietly(mailed):
    ended = launch(subprocess.run, "report", "--by", "name", capture_output=True,
                   cwd=mailed, prefix=())
    assert ended.returncode == 0 and not ended.stderr


@pytest.mark.parametrize("form, most", [("csv", 2000), ("json", 4000)])
def test_a_report_by_very_many_groups_holds_little_of_each(form, most, tmp_path):
    register, count = tmp_path / "r.csv", 2000
    save(register, "id,hits,last_hit,opens,last_open,created,name\n" + "".join(
        f"{tag_id},0,,0,,2026-11-01T08:00:00Z,{tag_id}@x.org\n"
        for tag_id in mailtracker.new_ids(b"m" * 16, count)))
    code = ("import sys, tracemalloc, mailtracker as m; tracemalloc.start(); "
            "m.main(['report', *sys.argv[1:]]); "
            "print(tracemalloc.get_traced_memory()[1], file=sys.stderr)")
    done = subprocess.run(
        [sys.executable, "-c", code, "--register", register, "--by", "name",
         "--format", form], capture_output=True, text=True, check=True,
        cwd=Path(mailtracker.__file__).parent)
    assert done.stdout.count("@x.org") == count
    assert int(done.stderr) < most * count
