"""dump: the register and the event log as table, CSV and JSON, and as they come."""
from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata

import pytest

import mailtracker
from conftest import SCRIPT
from conftest import clean_environment
from conftest import eventually

A, B, C = (f"{c}cdfghjkmnpqrstvwxz23" for c in "bdf")
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
GMAIL = ("Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 "
         "(via ggpht.com GoogleImageProxy)")
COLUMNS = "id,hits,last_hit,opens,last_open,created,name"
LOG = "time,event,id,verdict,reason,address,agent\n"
NEVER = " " * 20


def cases(table):
    """Return a parametrize table and its ids, from a dict by id."""
    return {"argvalues": list(table.values()), "ids": list(table)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder of the test's own, on a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("MAILTRACKER_REGISTER", raising=False)
    return tmp_path


@pytest.fixture
def dump(run):
    """Dump in process; return what is printed."""
    def dump(*args):
        code, out, err = run("dump", *args)
        assert (code, err) == (0, "")
        return out
    return dump


def nth(number):
    """Return one of 32768 ids, in the order of their numbers."""
    return "bcdfghjkmnpqrstv" + f"{number:05o}".translate(
        str.maketrans("01234567", "23456789"))


def write(text, path="register.csv"):
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def row(tag, name="", hits=0, last_hit=NEVER, opens=0, last_open=NEVER,
        created="2026-11-01T08:00:00Z"):
    name = '"' + name.replace('"', '""') + '"' if re.search('[,"\n]', name) else name
    return f"{tag},{hits:010},{last_hit},{opens:010},{last_open},{created},{name}\n"


@pytest.fixture
def three():
    """Make a register of three tags: opened, hit only, never hit; and its log."""
    day = "2026-11-%02dT10:00:00Z"
    write(COLUMNS + "\n" + row(A, "John", 12, day % 9, 2, day % 8)
          + row(B, "joan", 3, day % 5) + row(C, "李小龙"))
    write(LOG + "".join(
        f"{day % when},{event},{tag},{verdict},{reason},{address},{agent}\n"
        for when, event, tag, verdict, reason, address, agent in [
            (5, "hit", B, "machine", "crawler", "192.0.2.0", "x-bot/1"),
            (6, "hit", A, "human", "browser", "192.0.2.0", FIREFOX),
            (8, "hit", A, "proxy", "gmail-proxy", "66.249.84.0", GMAIL),
            (6, "verdict", A, "machine", "many-networks", "192.0.2.0", FIREFOX),
            (9, "hit", A, "self", "composing", "", "")]), "register.events.csv")


def ids(text):
    """Return the ids of a CSV dump, by their first letters."""
    return "".join(row["id"][0] for row in csv.DictReader(io.StringIO(text)))


def width(text):
    """Return the columns a terminal needs, counted apart from the program."""
    return sum(0 if unicodedata.combining(c) else
               2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# -- the table --------------------------------------------------------------------


def test_a_table_has_short_ids_and_a_summary_last(dump, three):
    lines = dump().splitlines()
    assert lines[0].split() == ["id", "name", "hits", "opens", "last", "hit", "(UTC)",
                                "last", "open", "created"]
    assert lines[1].split() == [A[:7], "John", "12", "2", "2026-11-09", "10:00",
                                "2026-11-08", "10:00", "2026-11-01"]
    assert lines[3].split() == [C[:7], "李小龙", "0", "0", "-", "-", "2026-11-01"]
    assert lines[4:] == ["3 tags, 1 opened, 15 hits, 2 opens"]


def test_full_shows_whole_ids_and_names(dump):
    name = "a rather long name, " * 5
    write(COLUMNS + "\n" + row(A, name.strip()))
    assert A not in dump() and name.strip() not in dump()
    assert A in dump("--full") and name.strip() in dump("--full")


NAMES = ["plain", "李小龙", "café", "cafe\u0301", "ｆｕｌｌ", "עברית", "x" * 60,
         "龍" * 40, "e\u0301" * 60, "👍", ""]


def test_names_of_any_width_are_aligned_and_fit_80_columns(dump):
    write(COLUMNS + "\n" + "".join(
        row(nth(i), name, 1000 + i)
        for i, name in enumerate(NAMES)))
    heading, *lines, _ = dump().splitlines()
    assert len(lines) == len(NAMES)
    ends = {width(re.match(r"(.*) 10\d\d ", line)[0]) for line in lines}
    assert len(ends) == 1
    assert max(map(width, [heading, *lines])) <= 80


def test_a_name_that_does_not_fit_is_cut_with_a_sign(dump):
    write(COLUMNS + "\n" + row(A, "x" * 60))
    assert re.search(r"x{5,}… ", dump().splitlines()[1])


def test_one_tag_is_no_tags_and_none_is_0_tags(dump):
    write(COLUMNS + "\n" + row(A))
    assert dump().splitlines()[-1] == "1 tag, 0 opened, 0 hits, 0 opens"
    write(COLUMNS + "\n")
    assert dump().splitlines()[-1] == "0 tags, 0 opened, 0 hits, 0 opens"


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_an_empty_register_is_shown_in_every_format(dump, form):
    write(COLUMNS + "\n")
    out = dump("--format", form)
    assert form != "csv" or out == COLUMNS + "\n"
    assert form != "json" or json.loads(out) == []


def test_hostile_names_never_reach_a_terminal_raw(dump):
    write(COLUMNS + "\n" + row(A, "evil\x1b[2J\u202e\x9b1m\nline"))
    for line in (dump(), dump("--full"), dump("--id", A)):
        assert line.replace("\n", "").isprintable() and "evil" in line


# -- CSV and JSON -----------------------------------------------------------------


EXACT = ["plain", 'a,"b";c', "one\ntwo", "=1+1", "'=1+1", "李小龙", "\x1b[31m",
         " spaced ", "-", "'", "e\u0301"]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_csv_and_json_lose_nothing(dump, form):
    safe = [mailtracker.escape_formula(name) for name in EXACT]
    rows = [f"{row(nth(i), name, i)[:-1]},note {i},\n"
            for i, name in enumerate(safe)]
    write(f"{COLUMNS},my note,\n" + "".join(rows))
    out = dump("--format", form)
    if form == "json":
        got = [(each["name"], each["my note"], each["hits"])
               for each in json.loads(out)]
        assert got == [(n, f"note {i}", i) for i, n in enumerate(EXACT)]
    else:
        got = [(each["name"], each["my note"], int(each["hits"]))
               for each in csv.DictReader(io.StringIO(out, newline=""))]
        assert got == [(n, f"note {i}", i) for i, n in enumerate(safe)]


def test_columns_of_one_name_and_cells_without_a_column_are_kept(dump):
    write(f"{COLUMNS},note,note,,\n{row(A, 'x')[:-1]},one,two,three,four,five\n")
    for form in ("csv", "json"):
        out = dump("--format", form)
        assert [word in out for word in ("one", "two", "three", "four", "five")] == [
            True] * 5
    values = json.loads(out)[0].values()
    assert list(values)[-5:] == ["one", "two", "three", "four", "five"]


def test_json_has_numbers_for_counts_and_null_for_never(dump, three):
    first, _, last = json.loads(dump("--format", "json"))
    assert (first["hits"], first["opens"]) == (12, 2)
    assert first["last_hit"] == "2026-11-09T10:00:00Z"
    assert (last["hits"], last["last_hit"], last["last_open"]) == (0, None, None)
    assert last["name"] == "李小龙"


def test_a_dump_as_csv_is_a_register_again(dump, three):
    write(dump("--format", "csv"), "copy.csv")
    assert dump("copy.csv", "--format", "json") == dump("--format", "json")


# -- filters ----------------------------------------------------------------------


@pytest.mark.parametrize("options, expected", **cases({
    "none": ("", "bdf"), "id": (f"--id {B[:4]}", "d"), "no such id": ("--id zz", ""),
    "name": ("--name jo*", "bd"), "whole name": ("--name JOHN", "b"),
    "any one letter": ("--name jo?n", "bd"), "not part of a name": ("--name oh", ""),
    "East Asian": ("--name 李*", "f"), "hit": ("--hit", "bd"), "unhit": ("--unhit", "f"),
    "opened": ("--opened", "b"), "unopened": ("--unopened", "df"),
    "hit, unopened": ("--hit --unopened", "d"),
    "since a day": ("--since 2026-11-06", "b"),
    "since a moment": ("--since 2026-11-05T10:00:00Z", "bd"),
    "since a zone": ("--since 2026-11-05T12:00:01+02:00", "b"),
    "since long ago": ("--since 9999d", "bd"),
    "sort by name": ("--sort name", "dbf"), "by hits": ("--sort hits", "fdb"),
    "by last hit": ("--sort last_hit", "fdb"), "reverse": ("--reverse", "fdb"),
    "sort, reverse": ("--sort hits --reverse", "bdf"), "limit": ("--limit 2", "bd"),
    "limit 0": ("--limit 0", ""), "reverse, limit": ("--reverse --limit 1", "f"),
    "all at once": ("--hit --sort hits --reverse --limit 1", "b"),
}))
def test_rows_are_chosen_and_put_in_order(dump, three, options, expected):
    out = dump("--format", "csv", *options.split())
    assert ids(out) == expected
    assert len(json.loads(dump("--format", "json", *options.split()))) == len(expected)


def test_hits_are_sorted_as_numbers(dump):
    write(COLUMNS + "\n" + "".join(
        row(tag, hits=n) for tag, n in ((A, 9), (B, 10), (C, 100))))
    assert ids(dump("--sort", "hits", "--format", "csv")) == "bdf"


def test_a_column_of_the_users_own_sorts_as_well(dump):
    write(f"{COLUMNS},town\n{row(A)[:-1]},Ulm\n{row(B)[:-1]},Bonn\n")
    assert ids(dump("--sort", "town", "--format", "csv")) == "db"


def test_a_column_that_is_not_there_is_one_clear_line(run, three):
    code, out, err = run("dump", "--sort", "\x1b[31m")
    assert (code, out) == (1, "")
    assert err == ("mailtracker: error: no column \\x1b[31m; "
                   f"there are {COLUMNS.replace(',', ', ')}\n")


@pytest.mark.parametrize("option", [
    "--since=yesterday", "--since=3", "--since=2026-13-01", "--since=-1d", "--limit=-1",
    "--limit=x", "--format=xml", "--since=9999-99-99"])
def test_a_bad_value_is_a_usage_error(run, three, option):
    code, out, err = run("dump", option)
    assert (code, out) == (2, "") and "Traceback" not in err


# -- odd registers ----------------------------------------------------------------


@pytest.mark.parametrize("encode", **cases({
    "as it was": lambda text: text.encode(),
    "BOM": lambda text: text.encode("utf-8-sig"),
    "semicolons, CRLF": lambda text: text.replace(",", ";").replace(
        "\n", "\r\n").encode("utf-8-sig"),
    "tabs": lambda text: text.replace(",", "\t").encode(),
    "sep=": lambda text: ("sep=;\n" + text.replace(",", ";")).encode(),
    "unpadded": lambda text: re.sub(r"\b0+(\d+)\b(?=,)", r"\1", text).encode(),
    "latin-1": lambda text: text.encode("cp1252"),
    "capitals": lambda text: text.replace(COLUMNS, COLUMNS.upper()).encode(),
    "empty and foreign rows": lambda text: (text + ",,,,,,\nsum,15,,,,,\n\n").encode(),
    "NULs": lambda text: text.encode() + b"\0\0\0",
    "a torn line": lambda text: text.encode() + A.encode()[:9],
}))
def test_a_register_of_any_spreadsheet_is_shown_and_not_changed(run, encode):
    data = encode(COLUMNS + "\n" + row(A, "café", 12) + row(B, "Bob"))
    write(data)
    code, out, _ = run("dump", "--format", "json")
    assert code == 0
    assert [(r["id"], r["name"], r["hits"]) for r in json.loads(out)] == [
        (A, "café", 12), (B, "Bob", 0)]
    with open("register.csv", "rb") as file:
        assert file.read() == data
    assert os.listdir(".") == ["register.csv"]


def test_moved_and_missing_columns_are_found(dump):
    write(f"name,town,id,hits\nJohn,Ulm,{A},4\n")
    first, = json.loads(dump("--format", "json"))
    assert (first["id"], first["hits"], first["opens"]) == (A, 4, 0)
    assert first["town"] == "Ulm" and first["last_hit"] is None


@pytest.mark.parametrize("make", **cases({
    "missing": lambda path: None, "a folder": os.mkdir, "a FIFO": os.mkfifo,
    "a letter": lambda path: write("Dear John,\nhello\n", path),
    "binary": lambda path: write(bytes(range(256)) * 10, path),
    "a dead link": lambda path: os.symlink("nowhere", path),
}))
@pytest.mark.parametrize("more", [[], ["--follow"], ["--format", "csv"]],
                         ids=["table", "follow", "csv"])
def test_what_is_no_register_is_one_clear_line(run, make, more):
    make("register.csv")
    code, out, err = run("dump", *more)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("mailtracker: error: ") and "register.csv" in err


def test_dump_makes_no_file(run, folder):
    run("dump", "other.csv")
    assert os.listdir(folder) == []


def as_nobody():
    """Return a command prefix that runs a command as another user."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root can become another user, with setpriv (util-linux)")
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def readable_for(prefix, path):
    done = subprocess.run([*prefix, sys.executable, "-c", f"open({str(path)!r})"],
                          check=False, stderr=subprocess.DEVNULL)
    return done.returncode == 0


@pytest.fixture
def opened_folder(folder):
    """Let other users into the folder of the test, and back out."""
    changed = []
    for each in [folder, *list(folder.parents)[:3]]:
        mode = each.stat().st_mode & 0o7777
        if not mode & 0o001:
            changed.append((each, mode))
            each.chmod(mode | 0o055)
    yield folder
    for each, mode in changed:
        each.chmod(mode)


def test_a_register_that_one_may_only_read_is_shown(tracker, three, opened_folder):
    prefix = as_nobody()
    os.chmod("register.csv", 0o444)
    if not readable_for(prefix, SCRIPT):
        pytest.skip("another user cannot read the program here")
    done = tracker("dump", prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "") and "John" in done.stdout


def test_a_register_that_one_may_not_read_is_one_clear_line(
        tracker, three, opened_folder):
    prefix = as_nobody()
    os.chmod("register.csv", 0o600)
    if not readable_for(prefix, SCRIPT):
        pytest.skip("another user cannot read the program here")
    done = tracker("dump", prefix=prefix)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mailtracker: error: register.csv: Permission denied\n"


# -- history and event log --------------------------------------------------------


def test_one_tag_is_shown_with_its_history_in_plain_words(dump, three):
    out = dump("--id", A[:3])
    assert f"id        {A}\n" in out and "John" in out
    lines = out.split("\n\n")[1].splitlines()
    assert lines[0::2] == [
        "2026-11-06T10:00:00Z  machine  the same message, elsewhere at the same "
        "minute, was read",
        "2026-11-08T10:00:00Z  proxy    Gmail's image proxy: displayed, place unknown",
        "2026-11-09T10:00:00Z  self     fetched while the message was being written"]
    assert "192.0.2.0" in lines[1] and "66.249.84.0" in lines[3]
    assert "nothing kept" in lines[5]
    assert max(map(len, lines[1::2])) <= 80


def test_a_tag_without_events_says_so(dump, three):
    assert "no events of this tag" in dump("--id", C)


def test_without_a_log_a_tag_is_shown_all_the_same(dump):
    write(COLUMNS + "\n" + row(A, "John"))
    out = dump("--id", A)
    assert A in out and "no events of this tag" in out


def test_a_prefix_of_several_tags_shows_a_table(dump):
    write(COLUMNS + "\n" + row(A, "one") + row(A[:-1] + "9", "two"))
    assert dump("--id", A[:5]).splitlines()[-1].startswith("2 tags")


def events(text):
    return [(e["time"][8:10], e["event"]) for e in csv.DictReader(io.StringIO(text))]


@pytest.mark.parametrize("options, expected", **cases({
    "all": ("", "5h 6h 8h 6v 9h"), "id": (f"--id {B}", "5h"),
    "name": ("--name john", "6h 8h 6v 9h"), "no such name": ("--name x", ""),
    "since": ("--since 2026-11-07", "8h 9h"), "opened": ("--opened", "6h 8h"),
    "limit": ("--limit 2", "5h 6h"), "reverse": ("--reverse --limit 1", "9h"),
    "sort": ("--sort time", "5h 6h 6v 8h 9h"), "hit": ("--hit", "5h 6h 8h 9h"),
}))
def test_the_log_is_listed_with_the_same_filters(dump, three, options, expected):
    out = dump("--events", "--format", "csv", *options.split())
    assert " ".join(f"{int(d)}{e[0]}" for d, e in events(out)) == expected
    listed = json.loads(dump("--events", "--format", "json", *options.split()))
    assert len(listed) == len(expected.split())
    table = dump("--events", *options.split()).splitlines()
    assert len(table) == 1 + len(expected.split())
    assert max(map(len, table)) <= 80


def test_the_log_as_csv_and_json_loses_nothing(dump, three):
    agent = mailtracker.agent_cell('=cmd("x"),\x1b[2J')
    line = f"2026-11-10T10:00:00Z,hit,{C},unknown,unrecognised,::,{agent}\n"
    with open("register.events.csv", "a", encoding="utf-8") as file:
        file.write(line)
    with open("register.events.csv", encoding="utf-8", newline="") as file:
        log = list(csv.DictReader(file))
    assert list(csv.DictReader(io.StringIO(dump("--events", "--format", "csv")))) == log
    log[-1]["agent"] = log[-1]["agent"][1:]  # the apostrophe is for spreadsheets only
    assert json.loads(dump("--events", "--format", "json")) == log


def test_rotated_files_come_first_and_in_their_order(dump, three):
    for number, tag in ((1, A), (2, B), (10, C)):
        write(f"{LOG}2026-10-01T00:00:{number:02}Z,hit,{tag},human,browser,,x\n",
              f"register.events.csv.{number}")
    listed = json.loads(dump("--events", "--format", "json"))
    assert [e["id"] for e in listed[:4]] == [A, B, C, B]


def test_broken_lines_of_the_log_harm_no_other(dump, three):
    with open("register.events.csv", "ab") as file:
        file.write(b'garbage\n"open quote,hit\n\0\0\n\xff\xfe,hit,x\n'
                   b"2026-11-12T10:00:00Z,hit," + C.encode() + b",human,browser,,ok\n"
                   b"2026-11-13T10:00:00Z,hit," + C.encode() + b",hum")
    listed = json.loads(dump("--events", "--format", "json"))
    assert len(listed) == 6 and listed[-1]["agent"] == "ok"


def test_a_log_elsewhere_is_read_where_it_is_named(dump, three):
    os.rename("register.events.csv", "elsewhere.csv")
    assert dump("--events", "--events-file", "elsewhere.csv").count("\n") == 6
    assert "Gmail" in dump("--id", A, "--events-file", "elsewhere.csv")


def test_a_log_that_is_not_there_is_one_clear_line(run, three):
    os.unlink("register.events.csv")
    code, out, err = run("dump", "--events")
    assert (code, out) == (1, "")
    assert err.startswith("mailtracker: error: no such event log: ")
    assert err.endswith("register.events.csv\n") and err.count("\n") == 1


# -- as it comes, and into a pipe -------------------------------------------------


class Follower:
    """A dump --follow, and the lines that it has printed."""

    def __init__(self, process, path):
        self.process, self.path = process, path

    def lines(self):
        return self.path.read_text("utf-8").splitlines()

    def wait_for(self, count):
        return eventually(lambda: self.lines()[count - 1:] and self.lines())


@pytest.fixture
def follow(folder):
    """Follow the log in a process of its own, from the first line on."""
    processes = []

    def start(*args):
        path = folder / "followed"
        with open(path, "wb") as out:
            processes.append(subprocess.Popen(
                [sys.executable, "-u", str(SCRIPT), "dump", "--follow", *args],
                stdout=out, cwd=folder, env=clean_environment()))
        return Follower(processes[-1], path)

    yield start
    for process in processes:
        process.kill()
        process.wait(20)


def hit_until(server, tag, follower, agent=FIREFOX):
    """Hit a tag until the follower, which has just started, has seen one."""
    def seen():
        server.get(f"/{tag}.gif", {"User-Agent": agent})
        return follower.lines()
    eventually(seen, pause=0.3)


def test_each_new_hit_is_shown_with_its_verdict_and_reason(serve, newtags, follow):
    first, second = newtags("register.csv", names=["Ann", "Bob"])
    server = serve("--compose-window", 0)
    server.get(f"/{first}.gif", {"User-Agent": "before/1"})
    follower = follow()
    hit_until(server, first, follower)
    known = len(follower.lines())
    assert not [line for line in follower.lines() if "before" in line]
    server.get(f"/{second}.gif", {"User-Agent": GMAIL})
    eventually(lambda: [line for line in follower.lines() if "Bob" in line])
    line, = [line for line in follower.lines() if "Bob" in line]
    assert len(follower.lines()) > known and "proxy: Gmail's image proxy" in line
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  \w{7}  Bob  ", line)


def test_a_log_that_is_moved_meanwhile_is_followed_further(
        serve, newtags, follow, folder):
    tags = newtags("register.csv", names=["Ann", "Bob", "Cid"])
    server = serve("--compose-window", 0)
    follower = follow()
    hit_until(server, tags[0], follower)
    for number, (tag, name) in enumerate(zip(tags[1:], ["Bob", "Cid"]), 1):
        os.rename("register.events.csv", f"register.events.csv.{number}")
        server.hit(tag)
        eventually(lambda name=name: [
            line for line in follower.lines() if f"  {name}  " in line])
    assert len([x for x in follower.lines() if "  Bob  " in x or "  Cid  " in x]) == 2


def test_only_what_is_asked_for_is_followed(serve, newtags, follow):
    ann, bob = newtags("register.csv", names=["Ann", "Bob"])
    server = serve("--compose-window", 0)
    follower = follow("--name", "a*")

    def seen():
        server.hit(bob)
        server.hit(ann)
        return follower.lines()
    eventually(seen, pause=0.3)
    server.hit(bob)
    server.hit(ann)
    assert not [line for line in follower.lines() if "Bob" in line]


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_a_closed_pipe_ends_it_quietly(folder, form):
    write(COLUMNS + "\n" + "".join(
        row(nth(i), "x" * 50) for i in range(20000)))
    with subprocess.Popen(
            [sys.executable, str(SCRIPT), "dump", "--format", form], cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=clean_environment()) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0
