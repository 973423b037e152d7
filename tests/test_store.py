"""The store: the event log is the truth, the register is what it comes to."""
from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

import mailtracker
from conftest import UNCOMPILED, eventually, register_rows, rest, save, shown
from mailtracker import Event, Files, append_events, settle

A, B = "bcdfghjkmnpqrstvwxz22", "cdfghjkmnpqrstvwxz233"
OLD = "0123456789abcdef0123456789abcdef01234567"  # an id of the tracker of 2018
TIMES = ["", *(f"2026-11-2{day}T12:00:00Z" for day in (1, 2, 3))]
_, T1, T2, T3 = TIMES
HEAD = "id,hits,last_hit,opens,last_open,created,name,note\n"


def read(path):
    return Path(path).read_text() if os.path.exists(path) else ""


def event(kind, hits=None, opens=None, time=T1, verdict="", detail="", tag_id=A):
    return Event(time, kind, tag_id, hits, opens, verdict, "", "", detail)


def opened(hits, opens, time=T1, tag_id=A):
    return event("hit", hits, opens, time, "human", "Mozilla", tag_id)


def row(counts, note="", tag_id=A):
    """Return the row of a tag; counts are as in told()."""
    hits, last_hit, opens, last_open = (
        TIMES[int(digit)] if at % 2 else digit for at, digit in enumerate(counts))
    return f"{tag_id},{hits},{last_hit},{opens},{last_open},{T1},ann,{note}\n"


def hits_of(files, tag_id=A):
    return int(shown(files)[tag_id]["hits"])


def told(files):
    """Return hits, last_hit, opens, last_open in a digit each; 1 is T1, 0 never."""
    cells = [shown(files)[A][column] for column in mailtracker.OWN_COLUMNS[1:5]]
    return "".join(str(TIMES.index(cell)) if at % 2 else cell
                   for at, cell in enumerate(cells))


def settled_hits(files, tag_id=A):
    """Return what stands in the register's file itself; None for nothing."""
    with suppress(OSError, LookupError):
        return int(register_rows(files.register)[tag_id]["hits"])


# -- lines of the log -------------------------------------------------------------

DETAILS = ["", "Mozilla/5.0 (X11; Linux)", "a,b", '"', '""', '"a"', 'a"b', "'", "'=1",
           "=1+1", "''", "'a'", ",,,", "\\n", " ", "ü \u6771 \U0001f4e8", "x" * 9000]
CONTROLS = ["a\nb", "\r\n", "\x1b[2J", "\u2028", "\0", "\x85", "\udcff", "\u202e",
            "\t=1", "\x0b"]


@pytest.mark.parametrize("detail", DETAILS + CONTROLS)
def test_a_line_gives_back_its_event_with_controls_escaped_once(detail):
    made = Event(T1, "hit", A, 3, None, "human", "browser", "1.2.3.0", detail)
    read = mailtracker.parse_event(made.line())
    assert read == made if detail in DETAILS else (
        read.detail.isprintable() and read.detail.isascii())
    assert mailtracker.parse_event(read.line()) == read
    assert made.line().count(b"\n") == 1 and not re.search(rb",[=+@-]", made.line())


def test_a_line_cut_anywhere_is_no_line_and_spoils_no_other(files):
    line = Event(T2, "hit", A, 12, 12, "human", "browser", "1.2.3.0", 'x "y", z').line()
    for cut in range(len(line)):
        Path(files.log).write_bytes(opened(1, 1).line() + line[:cut])
        assert [*mailtracker.read_log(files.log)] == [opened(1, 1)]
        append_events(files, [opened(2, 2)])
        found = [each.hits for each in mailtracker.read_log(files.log)]
        assert found in ([1, 2], [1, 12, 2]), "half a detail may stay, half a count not"


@pytest.mark.parametrize("junk", [
    "", "\n\n", "\0\0\n", "a,b\n", ",,,,,,,,  \n", "\xff\n", "x" * 99_999 + "\n",
    f"{T1},new,{A},9,9,,,,\n", f"{T1},hit,{A},x,9,,,,\n", f"{T1},hit,{A},9,9,human\n"])
def test_a_log_without_its_header_and_with_junk_is_read(junk, files):
    save(files.register, HEAD)
    save(files.log, event("made").line().decode() + junk + opened(1, 1).line().decode()
         + junk)
    assert told(files) == "1111"
    append_events(files, [opened(2, 2, T2)])
    assert settle(files) and told(files) == "2222"


# -- what the events of a tag come to -----------------------------------------------

STORIES = {  # events, and what is told after them
    "opened": ([opened(1, 1), opened(2, 2, T2)], "2222"),
    "machine": ([opened(1, 1), event("hit", 2, 1, T2, "machine")], "2211"),
    "clock set back": ([opened(1, 1, T2), opened(2, 2, T1)], "2222"),
    "lines twice": ([opened(1, 1), opened(2, 2, T2)] * 2, "2222"),
    "older line later": ([opened(2, 2, T2), opened(1, 1)], "2222"),
    "lost lines": ([opened(1, 1), opened(5, 4, T3)], "5343"),
    "judged anew": ([opened(1, 1), event("verdict", 1, 0, T1, "machine")], "1100"),
    "judged anew, with the last open": (
        [opened(1, 1), opened(2, 2, T2), event("verdict", 2, 1, T2, "machine"),
         event("count", 2, 1, T2, detail=T1)], "2211"),
    "judged before another hit": (
        [opened(1, 1), opened(2, 2, T2), event("verdict", 1, 0, T1, "machine")],
        "2222"),
    "counts from elsewhere": ([opened(1, 1), event("count", 9, 4, T3, detail=T2)],
                              "9342"),
    "counts unknown": ([event("hit", None, None, T3, "human")], "0000"),
    "another tag's": ([opened(5, 5, T3, B)], "0000"),
}


@pytest.mark.parametrize("when", ["in the end", "after each event", "never"])
@pytest.mark.parametrize("events, expected", STORIES.values(), ids=STORIES)
def test_events_come_to_the_same_whenever_they_are_settled(
        when, events, expected, files):
    mailtracker.add_tags(files, [(A, "ann")], mailtracker.Making(T1))
    for each in events:
        assert when != "after each event" or settle(files)
        append_events(files, [each])
    assert when == "never" or settle(files)
    assert told(files) == expected
    assert shown(files)[A]["name"] == "ann" and shown(files)[A]["created"] == T1


THREE = {  # event of the log, counts in the register, in .bak, and what is right
    "the log has most": (opened(3, 3, T3), "2222", "1111", "3333"),
    "the register has most": (opened(1, 1), "4221", "2121", "4221"),
    ".bak has most": (opened(1, 1), "2222", "5311", "5312"),
    "the register's is later": (opened(2, 1), "2222", "", "2222"),
    "the log's is first": (opened(2, 1, T2), "2222", "", "2212"),
    "the register before .bak": (event("made"), "2222", "2212", "2222"),
    "not in the register": (opened(1, 1), "", "2211", "2211"),
    "only in the register": (None, "1111", "", "1111"),
    "only in .bak": (None, "", "1111", "1111"),
}


@pytest.mark.parametrize("logged, mine, older, expected", THREE.values(), ids=THREE)
def test_the_version_with_the_most_hits_is_right(logged, mine, older, expected, files):
    save(files.register, HEAD + (mine and row(mine)))
    save(files.bak, HEAD + (older and row(older, "kept")), age=90)
    append_events(files, [event("made"), logged] if logged else [])
    for _ in range(2):
        assert told(files) == expected
        assert shown(files)[A]["note"] == ("" if mine else "kept")
        assert settle(files)
    save(files.register, HEAD)  # two stale saves
    save(files.bak, HEAD)
    assert told(files)[0] == expected[0], "what only a row knew is in the log now"


FITTING = {  # what happens to the files, and whether the marks fit afterwards
    "nothing": (lambda files: None, True),
    "a newtag": (lambda files: mailtracker.add_tags(
        files, [(B, "b")], mailtracker.Making(T1)), True),
    "the log is moved": (lambda files: os.rename(files.log, files.log + ".1"), True),
    "the register is saved": (lambda files: os.utime(files.register, (1, 1)), False),
    ".bak is saved": (lambda files: os.utime(files.bak, (1, 1)), False),
    "the marks are gone": (lambda files: (os.unlink(files.lock), rest(
        files.register, files.bak)), False),
    "the marks are junk": (lambda files: (save(files.lock, "x" * 300), rest(
        files.register, files.bak)), False),
    "the log is another one": (lambda files: save(
        files.log, read(files.log).replace("detail 19", "detail 20")), False),
}


@pytest.mark.parametrize("happens, fits", FITTING.values(), ids=FITTING)
def test_only_where_the_marks_fit_older_lines_are_not_read(happens, fits, files):
    mailtracker.add_tags(files, [(A, "ann")], mailtracker.Making(T1))
    for hits in 1, 2:
        append_events(files, [opened(hits, hits), *[event("x", detail=f"detail {n}")
                                                    for n in range(20)]])
        assert settle(files)
    with open(files.log, "r+b") as file:  # nobody does: it shows what is read
        file.seek(read(files.log).index(f",hit,{A},1,1"))
        file.write(f",hit,{A},7,7".encode())
    happens(files)
    assert hits_of(files) == (2 if fits else 7)
    append_events(files, [opened(8, 8)])
    assert hits_of(files) == 8 and settle(files) and settled_hits(files) == 8


# -- making and forgetting ------------------------------------------------------------

@pytest.mark.parametrize("longer", ["register", "log"])
def test_a_newtag_that_the_disk_refuses_leaves_nothing(longer, files, tracker, newtags):
    save(files.register, HEAD + row("1111") + "x" * 3900 * (longer == "register"))
    append_events(files, [event("made", detail="x" * 3900 * (longer == "log"))])
    before = read(files.register)
    # 4.5 KB for each file: the rows do not fit in, or not the lines of the log.
    done = tracker("newtag", "--register", files.register, "--count", 20,
                   prefix=["sh", "-c", 'ulimit -f 9; exec "$@"', "sh"], env=UNCOMPILED)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search("(?m)^mailtracker: error: .*[Ff]ile too large$", done.stderr)
    assert read(files.register) == before and [*shown(files)] == [A]
    assert [each.id for each in mailtracker.read_log(files.log)] == [A]
    assert len(newtags(files.register, 20)) == 20 and len(shown(files)) == 21


def test_newtags_and_a_server_beside_each_other_lose_nothing(serve, newtags, files):
    server = serve("--register", files.register, "--quiet")
    with ThreadPoolExecutor(6) as pool:
        made = sum(pool.map(lambda _: newtags(files.register, 40), range(6)), [])
    made += newtags(files.register, 4_000)[-1:]  # not all of them heard yet
    for tag in made[::-9]:
        server.hit(tag)
        assert hits_of(files, tag) == 1, "the very first hit counts"
    assert len({*made}) == 241 and len(shown(files)) == 4_240
    eventually(lambda: all(settled_hits(files, tag) == 1 for tag in made[::-9]))


def test_forgotten_tags_are_nowhere_stay_so_and_hold_up_no_answer(
        serve, newtags, tracker, files):
    save(files.register, f"{OLD},john,2,2018-05-01 10:00:00\n{B},jane,0,\n")
    assert settle(files) and os.path.exists(files.orig)
    append_events(files, [opened(3, 1, T1, OLD)])
    os.rename(files.log, files.log + ".1")
    many = newtags(files.register, 5_000, "john")
    server = serve("--register", files.register, "--quiet")
    server.hit(OLD)
    eventually(lambda: settled_hits(files, OLD) == 4)
    stale, size = read(files.register), os.path.getsize(files.log + ".1")
    done = tracker("forget", "--register", files.register, "john", "--yes")
    assert done.returncode == 0, done.stderr
    for _ in range(30):
        assert server.get(f"/{B}.gif", timeout=1)[0] == 200
    eventually(lambda: (server.hit(OLD), f",hit,{OLD}" not in read(files.log))[1])
    save(files.register, stale)
    eventually(lambda: settled_hits(files, B) == 30 and not settled_hits(files, OLD))
    server.hit(OLD)
    assert server.stop() == 0 and [*shown(files)] == [B]
    left = b"".join(path.read_bytes() for path in Path(files.register).parent.iterdir()
                    if path.is_file())
    assert not [name for name in (OLD, "john", many[0], many[-1])
                if name.encode() in left]
    assert os.path.getsize(files.log + ".1") == size, "nobody's place has moved"


# -- what can happen to the log and the register ------------------------------------

HAND_MADE = HEAD + row("0000", "kept") + row("0000", "too", B)
FATES = {
    "log moved": lambda files: os.rename(files.log, files.log + ".1"),
    "log moved by date": lambda files: os.rename(files.log, files.log + "-20261121"),
    "log deleted": lambda files: os.unlink(files.log),
    "log copied and truncated": lambda files: (shutil.copy(files.log, files.log + ".1"),
                                               os.truncate(files.log, 0)),
    "log moved and an empty one made": lambda files: (
        os.rename(files.log, files.log + ".1"), Path(files.log).touch()),
    "half a line in the log": lambda files: Path(files.log).write_text(
        read(files.log) + "2026-1"),
    "register deleted": lambda files: os.unlink(files.register),
    "register emptied": lambda files: os.truncate(files.register, 0),
    "register cut": lambda files: save(
        files.register, read(files.register).partition(B)[0]),
    "register of long ago": lambda files: save(files.register, HAND_MADE),
}


def test_hits_stay_and_go_on_whatever_happens_to_the_files(serve, tmp_path):
    def let_happen(some):
        for fate, files, server in some:
            server.hit(A)
            FATES[fate](files)

    def wait_for(hits, some):
        eventually(lambda: not [fate for fate, files, _ in some
                                if settled_hits(files) != hits], 15)

    cases = []
    for folder, fate in product(("at once", "settled"), FATES):
        (tmp_path / folder / fate).mkdir(parents=True)
        files = Files(str(tmp_path / folder / fate / "register.csv"))
        save(files.register, HAND_MADE)
        append_events(files, [event("made"), opened(1, 1)])
        assert settle(files)
        cases.append((fate, files, serve("--register", files.register, "--quiet",
                                         wait=False)))
    for _, _, server in cases:
        eventually(server.find_port, 20)
        server.hit(A, 2)
    let_happen(cases[:len(FATES)])
    wait_for(3, cases[len(FATES):])
    let_happen(cases[len(FATES):])
    wait_for(4, cases)
    for fate, files, server in cases:
        eventually(lambda: read(files.log).startswith("time,event,"))
        server.hit(A, 2)
        server.kill()
        assert [(each["hits"], each["note"]) for each in shown(files).values()] == [
            ("6", "kept"), ("0", "too")], fate
        assert settle(files) and settled_hits(files) == 6, fate


def test_a_log_that_is_long_gets_a_number_and_counting_goes_on(serve, newtags, files):
    tag, = newtags(files.register)
    append_events(files, [event("x", detail="x" * 700)] * 100)
    server = serve("--register", files.register, "--quiet", "--rotate-events", "64K")
    server.hit(tag, 2)
    eventually(lambda: os.path.exists(files.log + ".1"))
    server.hit(tag, 2)
    eventually(lambda: len(read(files.log)) < 1000 and settled_hits(files, tag) == 4)
    server.hit(tag)
    assert hits_of(files, tag) == 5 and read(files.log).startswith("time,event,")


def test_a_register_that_cannot_be_read_is_told_of_and_left_alone(tagged, files):
    server, tag = tagged("--quiet")
    broken = read(files.register)[:-1] + '"\n'
    save(files.register, broken)
    eventually(lambda: server.get("/health")[0] == 503)
    assert server.get("/health")[2].decode().startswith("register.csv, line 2: a quote")
    eventually(lambda: f"{files.register}, line 2: a quote" in server.log())
    server.hit(tag, 2)
    assert read(files.register) == broken
    save(files.register, broken.replace('"', ""))
    eventually(lambda: settled_hits(files, tag) == 2)
    eventually(lambda: server.get("/health")[0] == 200)


def test_links_and_modes_stay(tagged, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    register = tmp_path / "register.csv"
    register.symlink_to(tmp_path / "elsewhere" / "mails.csv")
    server, tag = tagged("--quiet")
    os.chmod(register, 0o640)
    server.hit(tag)
    files = Files(str(register))
    eventually(lambda: settled_hits(files, tag) == 1)
    assert register.is_symlink() and os.stat(register).st_mode & 0o777 == 0o640
    assert files.log == str(tmp_path / "elsewhere" / "mails.events.csv")
    assert os.stat(files.log).st_mode & 0o777 == 0o600


# -- disks that refuse, and others at work --------------------------------------------

def test_a_folder_that_cannot_be_written_to_stops_no_counting(tagged, files, tmp_path):
    server, tag = tagged("--quiet")
    lock, free = (["chattr", "+i"], ["chattr", "-i"]) if os.geteuid() == 0 else (
        ["chmod", "a-w"], ["chmod", "u+w"])
    if subprocess.run([*lock, tmp_path], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no way to make a folder read-only here")
    try:
        server.hit(tag, 3)
        assert hits_of(files, tag) == 3
        eventually(lambda: server.get("/health")[0] == 503)
        server.hit(tag, 2)
    finally:
        subprocess.run([*free, tmp_path], check=True)
    eventually(lambda: settled_hits(files, tag) == 5)
    eventually(lambda: server.get("/health")[0] == 200)


def test_a_full_disk_costs_bounded_memory_and_no_count(small_disk):
    files = Files(str(small_disk / "register.csv"))
    mailtracker.add_tags(files, [(A, "ann"), (B, "bob")], mailtracker.Making(T1))
    store = mailtracker.Store(files, notify=lambda line: None)
    store.open()
    for hits in range(1, 60_001):
        for tag_id in A, B:
            store.add(opened(hits, hits, T2, tag_id))
        if not hits % 8:
            store.flush()
        if not hits % 10_000:
            store.tend()
    waiting = re.search(r"(\d+) lines wait for the disk", store.trouble())
    assert "No space left" in store.trouble() and int(waiting[1]) < 20_000
    assert str(small_disk) not in store.trouble(), "strangers can read it"
    assert store.find(A).hits == 60_000, "the count goes on in memory"
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    eventually(lambda: (store.tend(), not store.trouble())[1])
    assert hits_of(files, A) == hits_of(files, B) == 60_000
    store.close()
    assert settled_hits(files, A) == settled_hits(files, B) == 60_000
    assert not [name for name in os.listdir(small_disk)
                if name.endswith((".new", ".old"))]


def test_a_suspended_newtag_that_holds_all_locks_stops_nothing(tagged, files):
    server, tag = tagged("--quiet")
    with open(files.register) as register, open(files.log) as log:
        fcntl.flock(register, fcntl.LOCK_EX)
        fcntl.flock(log, fcntl.LOCK_EX)
        for hits in range(1, 30):
            server.hit(tag)
            assert hits_of(files, tag) == hits
        assert server.stop() == 0
    assert settle(files) and settled_hits(files, tag) == 29


def test_a_register_has_one_server(tagged, serve, files, tmp_path):
    server, tag = tagged("--quiet")
    (tmp_path / "link.csv").symlink_to(files.register)
    (tmp_path / "other").symlink_to(tmp_path)
    paths = "register.csv", "link.csv", "other/register.csv"
    for second in [serve("--register", path, wait=False) for path in paths]:
        assert second.process.wait(10) == 1
        assert re.fullmatch(rf".*process {server.process.pid}\n", second.log())
    server.kill()
    serve("--register", paths[1]).hit(tag)
    assert hits_of(files, tag) == 1


@pytest.mark.parametrize("rest, known", [
    ("cdfghjkmnpqrstvwxz233", True), ("cdfghjkmnpqrstvwxz", False)],
    ids=["a whole id", "half an id"])
def test_a_last_row_that_is_cut_off_is_a_tag_if_its_id_is_whole(files, rest, known):
    save(files.register, HEAD + row("1111") + rest)
    assert [*shown(files)] == [A, *[B] * known]
    assert settle(files)
    assert [*shown(files)] == [A, *[B] * known]
    assert read(files.register).rstrip("\n,0").endswith(rest)


def test_a_tag_made_after_the_log_was_moved_has_its_first_hit_counted(
        tagged, newtags, files):
    server, _ = tagged("--quiet")
    for number in range(5):
        os.rename(files.log, f"{files.log}.{number}")
        tag = newtags(files.register, 1)[0]
        server.hit(tag)
        assert hits_of(files, tag) == 1


@pytest.mark.parametrize("command", ["newtag", "dump", "forget x", "rejudge", "settle"])
def test_no_command_takes_another_file_for_the_log(run, files, command):
    save(files.register, HEAD + row("1111"))
    other = Path(files.register).with_name("people.csv")
    save(other, "name,email\n")
    for log in (files.register, other):
        code, out, error = run(*command.split(), "--register", files.register,
                               "--events", log)
        assert code == 2 and not out and str(log) in error
    assert other.read_text() == "name,email\n"
    assert read(files.register) == HEAD + row("1111")
