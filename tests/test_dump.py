"""dump: the register and the event log as table, CSV and JSON, and as they come."""
from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata

import pytest

import mailtracker
from conftest import SCRIPT
from conftest import clean_environment, save

A, B, C = (f"{c}cdfghjkmnpqrstvwxz23" for c in "bdf")
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
GMAIL = ("Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 "
         "(via ggpht.com GoogleImageProxy)")
COLUMNS = "id,hits,last_hit,opens,last_open,created,name"
LOG = "time,event,id,hits,opens,verdict,reason,address,detail\n"


def cases(table):
    """Return a parametrize table and its ids, from a dict by id."""
    return {"argvalues": list(table.values()), "ids": list(table)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder of the test's own, without variables that change defaults."""
    monkeypatch.chdir(tmp_path)
    for name in ("REGISTER", "SERVER"):
        monkeypatch.delenv(f"MAILTRACKER_{name}", raising=False)
    return tmp_path


@pytest.fixture
def dump(run):
    """Dump in process; return what is printed."""
    def dump(*args):
        code, out, err = run("dump", *args)
        assert (code, err) == (0, "")
        return out
    return dump


def on_terminal(*args, columns=80, answer="", **env):
    """Run the program on a terminal of its own; return exit code and output."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    env = {"PYTHONIOENCODING": "utf-8", **clean_environment(), **env}
    with subprocess.Popen([sys.executable, str(SCRIPT), *args], stdin=theirs, env=env,
                          stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, answer.encode())
        output = b""
        try:
            while chunk := os.read(ours, 65536):
                output += chunk
        except OSError:  # EIO: the other end is closed
            pass
        os.close(ours)
    return process.returncode, output.decode("utf-8", "replace").replace("\r\n", "\n")


def nth(number):
    """Return one of 32768 ids, in the order of their numbers."""
    return "bcdfghjkmnpqrstv" + f"{number:05o}".translate(
        str.maketrans("01234567", "23456789"))


def write(text, path="register.csv"):
    save(path, text if isinstance(text, bytes) else text.encode())


def row(tag, name="", hits=0, last_hit="", opens=0, last_open="",
        created="2026-11-01T08:00:00Z"):
    name = '"' + name.replace('"', '""') + '"' if re.search('[,"\n]', name) else name
    return f"{tag},{hits},{last_hit},{opens},{last_open},{created},{name}\n"


@pytest.fixture
def three():
    """Make a register of three tags: opened, hit only, never hit; and its log."""
    day = "2026-11-%02dT10:00:00Z"
    write(COLUMNS + "\n" + row(A, "John", 12, day % 9, 2, day % 8)
          + row(B, "joan", 3, day % 5) + row(C, "李小龙"))
    write(LOG + "".join(
        f"{day % when},{event},{tag},,,{verdict},{reason},{address},{detail}\n"
        for when, event, tag, verdict, reason, address, detail in [
            (1, "made", A, "", "", "", "John"), (2, "sent", A, "", "", "", ""),
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


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_a_table_has_a_summary_last_and_short_ids_on_a_terminal(dump, three, terminal):
    lines = (on_terminal("dump")[1] if terminal else dump()).splitlines()
    cut = 7 if terminal else 21
    assert lines[0].split() == ["id", "name", "hits", "opens", "last", "hit", "(UTC)",
                                "last", "open", "created"]
    assert lines[1].split() == [A[:cut], "John", "12", "2", "2026-11-09", "10:00",
                                "2026-11-08", "10:00", "2026-11-01"]
    assert lines[3].split() == [C[:cut], "李小龙", "0", "0", "-", "-", "2026-11-01"]
    assert lines[4:] == ["3 tags, 1 opened, 15 hits, 2 opens"]


NAMES = ["plain", "李小龙", "café", "cafe\u0301", "ｆｕｌｌ", "עברית", "x" * 60,
         "龍" * 40, "e\u0301" * 60, "👍", ""]


@pytest.mark.parametrize("columns", [60, 80, 132])
def test_names_of_any_width_are_aligned_and_fit_a_terminal(columns):
    write(COLUMNS + "\n" + "".join(
        row(nth(i), name, 1000 + i) for i, name in enumerate(NAMES)))
    heading, *lines, _ = on_terminal("dump", columns=columns)[1].splitlines()
    assert len(lines) == len(NAMES)
    ends = {width(re.match(r"(.*) 10\d\d ", line)[0]) for line in lines}
    assert len(ends) == 1
    assert max(map(width, [heading, *lines])) <= columns


def test_a_name_that_does_not_fit_is_cut_with_a_sign_but_never_in_a_pipe(dump):
    name = "a rather long name, " * 5 + "x"
    write(COLUMNS + "\n" + row(A, name) + row(B, "\x1b[2J"))
    assert re.search(r"a rather[^\n]*… ", on_terminal("dump")[1])
    for out in (dump(), on_terminal("dump", "--full")[1], dump("--id", A)):
        assert A in out and name in out
    assert "\x1b" not in dump() + on_terminal("dump", "--format", "csv")[1]


@pytest.mark.parametrize("rows, options, summary", [
    ("", "", "0 tags, 0 opened, 0 hits, 0 opens"),
    (row(A, "", 1, "", 1), "", "1 tag, 1 opened, 1 hit, 1 open"),
    (row(A, "", 2) + row(B) + row(C, "", 1), "--hit --limit 1",
     "1 of 2 tags, 0 opened, 2 hits, 0 opens")], ids=["none", "one", "some"])
def test_the_summary_counts_in_good_grammar(dump, rows, options, summary):
    write(COLUMNS + "\n" + rows)
    assert dump(*options.split()).splitlines()[-1] == summary


def test_local_times_are_marked_as_such(tracker, three):
    def local(*args):
        return tracker("dump", "--local", *args, env={"TZ": "IST-5:30"}).stdout
    assert "(IST)" in local() and "2026-11-09 15:30" in local()
    for more in ("--format csv", "--log", f"--id {A}", "--log --format json"):
        assert "2026-11-09T15:30:00+05:30" in local(*more.split())
        assert "2026-11-09T10:00:00Z" not in local(*more.split())


# -- CSV and JSON -----------------------------------------------------------------


EXACT = ["plain", 'a,"b";c', "one\ntwo", "=1+1", "'=1+1", "李小龙", "\x1b[31m",
         " spaced ", "-", "'", "e\u0301", "+49 30"]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_csv_and_json_lose_nothing(dump, form):
    safe = [mailtracker.escape_formula(name) for name in EXACT]
    rows = [f"{row(nth(i), name, i)[:-1]},note {i},\n" for i, name in enumerate(safe)]
    write(f"{COLUMNS},my note,\n" + "".join(rows))
    out, expected = dump("--format", form), EXACT if form == "json" else safe
    listed = json.loads(out) if form == "json" else list(
        csv.DictReader(io.StringIO(out, newline="")))
    got = [(each["name"], each["my note"], int(each["hits"])) for each in listed]
    assert got == [(name, f"note {i}", i) for i, name in enumerate(expected)]


def test_no_cell_of_a_csv_is_a_live_formula_and_none_gets_a_second_quote(dump):
    cells = ["=1", "'=1", "@x", "-5", "+3.5", "-x", "＝1", "2026-11-01", "'t is"]
    write(f"{COLUMNS},note,note,,\n" + "".join(
        f"{row(nth(i))[:-1]},{cell},x,y,z,=more\n" for i, cell in enumerate(cells)))
    shown = [line.split(",")[7:] for line in dump("--format", "csv").splitlines()[1:]]
    assert shown == [[cell, "x", "y", "z", "'=more"] for cell in (
        "'=1", "'=1", "'@x", "-5", "+3.5", "'-x", "'＝1", "2026-11-01", "'t is")]
    values = json.loads(dump("--format", "json"))[0].values()
    assert list(values)[-5:] == ["=1", "x", "y", "z", "=more"]


def test_json_has_numbers_for_counts_and_null_for_never(dump, three):
    first, _, last = json.loads(dump("--format", "json"))
    assert (first["hits"], first["opens"]) == (12, 2)
    assert first["last_hit"] == "2026-11-09T10:00:00Z"
    assert (last["hits"], last["last_hit"], last["last_open"]) == (0, None, None)
    assert last["name"] == "李小龙"
    hit = json.loads(dump("--log", "--format", "json"))[2]
    assert (hit["hits"], hit["opens"], hit["detail"]) == (None, None, "x-bot/1")


def test_a_terminal_of_few_letters_gets_escapes_and_a_pipe_gets_utf_8(tracker, three):
    env = {"PYTHONIOENCODING": "latin-1"}
    code, shown = on_terminal("dump", **env)
    assert code == 0 and r"\u674e\u5c0f\u9f99" in shown
    assert r"\u674e\u5c0f\u9f99" in tracker("dump", env=env).stdout
    dumped = tracker("dump", "--format", "csv", env=env).stdout
    write(dumped, "copy.csv")  # a register again
    assert "李小龙" in dumped
    assert tracker("dump", "copy.csv", "--format", "csv").stdout == dumped


# -- filters ----------------------------------------------------------------------


@pytest.mark.parametrize("options, expected", [
    ("", "bdf"), (f"--id {B[:4]}", "d"), ("--id zz", ""), ("--name jo*", "bd"),
    ("--name JOHN", "b"), ("--name jo?n", "bd"), ("--name oh", ""), ("--name 李*", "f"),
    ("--hit", "bd"), ("--unhit", "f"), ("--opened", "b"), ("--unopened", "df"),
    ("--hit --unopened", "d"), ("--since 2026-11-06", "b"),
    ("--since 2026-11-05T10:00:00Z", "bd"), ("--since 2026-11-05T12:00:01+02:00", "b"),
    ("--since 9999d", "bd"), ("--sort name", "dbf"), ("--sort hits", "fdb"),
    ("--sort last_hit", "fdb"), ("--reverse", "fdb"), ("--sort hits --reverse", "bdf"),
    ("--limit 2", "bd"), ("--reverse --limit 1", "f"),
    ("--hit --sort hits --reverse --limit 1", "b")])
def test_rows_are_chosen_and_put_in_order(dump, three, options, expected):
    assert ids(dump("--format", "csv", *options.split())) == expected
    assert len(json.loads(dump("--format", "json", *options.split()))) == len(expected)


def test_numbers_are_sorted_as_numbers_in_any_column(dump, run):
    write(f"{COLUMNS},age\n" + "".join(
        f"{row(tag, hits=n)[:-1]},{age}\n"
        for tag, n, age in ((A, 9, 10), (B, 10, 9.5), (C, 100, "unknown"))))
    assert ids(dump("--sort", "hits", "--format", "csv")) == "bdf"
    assert ids(dump("--sort", "age", "--format", "csv")) == "dbf"
    assert run("dump", "--sort", "\x1b[31m") == (
        1, "", "mailtracker: error: no column \\x1b[31m; "
        f"there are {COLUMNS.replace(',', ', ')}, age\n")


# -- odd registers ----------------------------------------------------------------


@pytest.mark.parametrize("encode", **cases({
    "UTF-16": lambda text: text.encode("utf-16"),
    "semicolons, CRLF": lambda text: text.replace(",", ";").replace(
        "\n", "\r\n").encode("utf-8-sig"),
    "padded": lambda text: text.replace(",,", f",{' ' * 20},").replace(
        ",12,", ",0000000012,").replace(",0,", ",0000000000,").encode("cp1252"),
}))
def test_a_register_of_any_spreadsheet_is_shown_and_not_changed(run, encode):
    data = encode(COLUMNS + "\n" + row(A, "café", 12) + row(B, "Bob"))
    write(data)
    code, out, err = run("dump", "--format", "json")
    assert (code, err) == (0, "")
    shown = [(r["id"], r["name"], r["hits"], r["last_hit"]) for r in json.loads(out)]
    assert shown == [(A, "café", 12, None), (B, "Bob", 0, None)]
    with open("register.csv", "rb") as file:
        assert file.read() == data
    assert os.listdir(".") == ["register.csv"]


def test_rows_that_are_no_tags_are_counted_with_the_first_line(run):
    write(f"{COLUMNS}\n{row(A)}sum,15,,,,,\n,,,,,,\n\n{row(B)}x,1,,,,,\n")
    code, out, err = run("dump")
    assert code == 0 and out.splitlines()[-1].startswith("2 tags")
    assert err.startswith("mailtracker: note: ") and err.count("\n") == 1
    assert "2 rows" in err and "line 3" in err


@pytest.mark.parametrize("make", **cases({
    "missing": lambda path: None, "a folder": os.mkdir, "a FIFO": os.mkfifo,
    "binary": lambda path: write(bytes(range(256)) * 10, path),
    "a dead link": lambda path: os.symlink("nowhere", path),
    "an open quote": lambda path: write(f'{COLUMNS}\n{row(A)}{B},0,"\n{row(C)}', path),
}))
@pytest.mark.parametrize("more", ["", "--follow", "--format csv"])
def test_what_is_no_register_is_one_clear_line(run, make, more):
    make("register.csv")
    code, _, err = run("dump", *more.split())
    assert (code, err.count("\n")) == (1, 1)
    assert re.match(r"mailtracker: error: .*(register\.csv|nowhere)", err)
    assert make.__name__ != "<lambda>" or "quote" not in err or "line 3" in err


# -- history and event log --------------------------------------------------------


def test_one_tag_is_shown_with_its_history_in_plain_words(dump, three):
    out = dump("--id", A[:3])
    assert f"id        {A}\n" in out and "John" in out
    lines = out.split("\n\n")[1].splitlines()
    assert [line for line in lines if line[:1] == "2"] == [
        "2026-11-01T10:00:00Z  made     the tag was made",
        "2026-11-02T10:00:00Z  sent     its mail was handed over",
        "2026-11-06T10:00:00Z  machine  the same message, elsewhere at the same "
        "minute, was read",
        "2026-11-08T10:00:00Z  proxy    Gmail's image proxy: displayed, place unknown",
        "2026-11-09T10:00:00Z  self     fetched while the message was being written"]
    clients = [line.strip() for line in lines if line[:1] == " "]
    assert clients == [f"192.0.2.0  {FIREFOX}", f"66.249.84.0  {GMAIL}",
                       "(nothing kept of the client)"]
    shown = on_terminal("dump", "--id", A)[1].split("\n\n")[1].splitlines()
    assert max(len(line) for line in shown if line[:1] == " ") <= 80


def test_a_tag_without_events_says_so(dump, three):
    for _ in range(2):
        assert C in dump("--id", C) and "no events of this tag" in dump("--id", C)
        with contextlib.suppress(FileNotFoundError):
            os.unlink("register.events.csv")


def events(text):
    return " ".join(f"{int(e['time'][8:10])}{e['event'][0]}"
                    for e in csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("options, expected", [
    ("", "1m 2s 5h 6h 8h 6v 9h"), (f"--id {B}", "5h"), ("--name x", ""),
    ("--name john", "1m 2s 6h 8h 6v 9h"), ("--since 2026-11-07", "8h 9h"),
    ("--opened", "6h 8h"), ("--limit 2", "1m 2s"), ("--reverse --limit 1", "9h"),
    ("--sort time", "1m 2s 5h 6h 6v 8h 9h"), ("--hit", "5h 6h 8h 9h")])
def test_the_log_is_listed_with_the_same_filters(dump, three, options, expected):
    count = len(expected.split())
    assert events(dump("--log", "--format", "csv", *options.split())) == expected
    listed = json.loads(dump("--log", "--format", "json", *options.split()))
    assert len(listed) == count
    assert len(dump("--log", *options.split()).splitlines()) == 1 + count


def test_a_table_of_the_log_fits_a_terminal_and_is_whole_elsewhere(dump, three):
    event = mailtracker.Event("2026-11-10T10:00:00Z", "hit", C, None, None, "unknown",
                              "unrecognised", "::", '=cmd("x"),\x1b[2J')
    with open("register.events.csv", "ab") as file:
        file.write(event.line())
    shown = on_terminal("dump", "--log")[1].splitlines()
    assert max(map(len, shown)) <= 80 and A[:7] in shown[1] and A not in shown[1]
    for text in (GMAIL, A, "made     the tag was made", "verdict: many-networks"):
        assert text in dump("--log")
    with open("register.events.csv", encoding="utf-8", newline="") as file:
        log = list(csv.DictReader(file))
    assert list(csv.DictReader(io.StringIO(dump("--log", "--format", "csv")))) == log
    listed = json.loads(dump("--log", "--format", "json"))
    assert listed[-1]["detail"] == '=cmd("x"),\\x1b[2J'  # without the quote of a cell
    assert [{**e, "hits": "", "opens": ""} for e in listed[:-1]] == log[:-1]


def test_a_log_is_read_where_it_is_named_and_one_that_is_not_there_is_one_line(
        dump, run, three):
    os.rename("register.events.csv", "elsewhere.csv")
    assert dump("--log", "--events", "elsewhere.csv").count("\n") == 8
    assert "Gmail" in dump("--id", A, "--events", "elsewhere.csv")
    code, out, err = run("dump", "--log")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.match("mailtracker: error: no such event log: .*register.events.csv", err)


# -- as it comes, and into a pipe -------------------------------------------------


@pytest.fixture
def follow(folder):
    """Follow the log in a process of its own; return its output, a file to read."""
    with contextlib.ExitStack() as stack:
        def start(*args):
            process = stack.enter_context(subprocess.Popen(
                [sys.executable, str(SCRIPT), "dump", "--follow", *args], cwd=folder,
                stdout=subprocess.PIPE, encoding="utf-8", env=clean_environment()))
            stack.callback(process.kill)
            return process.stdout
        yield start


def log_hit(tag, when="", agent=FIREFOX, verdict="human", reason="browser"):
    """Append a hit to the log, as a server does."""
    event = mailtracker.Event(when or mailtracker.utc_text(time.time()), "hit", tag,
                              1, 1, verdict, reason, "::", agent)
    with open("register.events.csv", "ab") as file:
        file.write(event.line())


@pytest.fixture
def ann_and_bob():
    write(COLUMNS + "\n" + row(A, "Ann") + row(B, "Bob"))
    write(LOG, "register.events.csv")
    log_hit(A, "2026-11-01T00:00:00Z")
    os.rename("register.events.csv", "register.events.csv.1")
    write(LOG, "register.events.csv")
    log_hit(B, "2026-11-02T00:00:00Z", GMAIL, "proxy", "gmail-proxy")


def test_with_a_time_what_was_before_comes_first_and_then_each_new_event(
        ann_and_bob, follow, newtags):
    lines = follow("--since", "2026-10-01")
    assert lines.readline() == (f"2026-11-01T00:00:00Z  {A}  Ann  human: a browser, or "
                                "a mail app that looks like one  ::\n")
    assert "Bob  proxy: Gmail's image proxy" in lines.readline()
    tag, = newtags("register.csv", name="Cid")
    assert f"{tag}  Cid  made: the tag was made\n" in lines.readline()
    log_hit(tag)
    assert "Cid  human: a browser" in lines.readline()
    os.rename("register.events.csv", "register.events.csv.2")
    write(LOG, "register.events.csv")
    log_hit(B)
    assert "Bob  human: a browser" in lines.readline()


def test_without_a_time_only_what_is_new_is_followed(ann_and_bob, follow):
    lines, over = follow("--name", "a*", "--opened", "--local"), threading.Event()

    def hit():  # until the follower has started
        while not over.wait(0.1):
            for tag, verdict in ((B, "human"), (A, "machine"), (A, "human")):
                log_hit(tag, verdict=verdict)
    thread = threading.Thread(target=hit)
    thread.start()
    first, second = lines.readline(), lines.readline()
    over.set()
    thread.join()
    assert "2026-11-0" not in first and "Ann  human" in first
    assert "Ann  human" in second and re.match(r"\S+[+-]\d\d:\d\d  ", second)


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_a_closed_pipe_ends_it_quietly(folder, form):
    write(COLUMNS + "\n" + "".join(row(nth(i), "x" * 50) for i in range(20000)))
    with subprocess.Popen(
            [sys.executable, str(SCRIPT), "dump", "--format", form], cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=clean_environment()) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0
