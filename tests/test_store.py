"""The store: the event log is the truth, the register is what it comes to."""
from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mailtracker
from conftest import SCRIPT, clean_environment, eventually, save, shown
from mailtracker import Event, Files, TrackerError, append_events, settle

A, B = "bcdfghjkmnpqrstvwxz22", "cdfghjkmnpqrstvwxz233"
OLD = "0123456789abcdef0123456789abcdef01234567"  # an id of the tracker of 2018
T1, T2, T3 = (f"2026-11-2{day}T12:00:00Z" for day in (1, 2, 3))
HEAD = "id,hits,last_hit,opens,last_open,created,name,note\n"


def read(path):
    return Path(path).read_text() if os.path.exists(path) else ""


def event(kind, hits=None, opens=None, time=T1, verdict="", detail="", tag_id=A):
    return Event(time, kind, tag_id, hits, opens, verdict, "", "", detail)


def opened(hits, opens, time=T1, tag_id=A):
    return event("hit", hits, opens, time, "human", "Mozilla", tag_id)


def row(hits, last_hit, opens, last_open, note="", tag_id=A):
    return f"{tag_id},{hits},{last_hit},{opens},{last_open},{T1},ann,{note}\n"


def counts(files, tag_id=A):
    return [shown(files)[tag_id][column] for column in mailtracker.OWN_COLUMNS[1:5]]


def settled_hits(files, tag_id=A):
    """Return what stands in the register's file itself; None for nothing."""
    try:
        table = mailtracker.Register(files.register, files.register)
        return {table.cell(cells, "id"): int(table.cell(cells, "hits"))
                for _, cells in table if cells}.get(tag_id)
    except (OSError, TrackerError):
        return None


# -- lines of the log -------------------------------------------------------------

DETAILS = ["", "Mozilla/5.0 (X11; Linux)", "a,b", '"', '""', '"a"', 'a"b', "'", "'=1",
           "=1+1", "''", "'a'", ",,,", "\\n", " ", "ü \u6771 \U0001f4e8", "x" * 9000]


@pytest.mark.parametrize("detail", DETAILS)
def test_a_line_gives_back_the_event_that_it_was_made_of(detail):
    made = Event(T1, "hit", A, 3, None, "human", "browser", "1.2.3.0", detail)
    assert mailtracker.parse_event(made.line()) == made
    assert made.line().count(b"\n") == 1 and not re.search(rb",[=+@-]", made.line())


@pytest.mark.parametrize("detail", ["a\nb", "\r\n", "\x1b[2J", "\u2028", "\0", "\x85",
                                    "\udcff", "\u202e", "\t=1", "\x0b"])
def test_control_characters_are_escaped_once_and_stay_so(detail):
    once = mailtracker.parse_event(event("hit", detail=detail).line())
    assert once.detail.isprintable() and once.detail.isascii()
    assert mailtracker.parse_event(once.line()) == once


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
    assert counts(files) == ["1", T1, "1", T1]
    append_events(files, [opened(2, 2, T2)])
    assert settle(files) and counts(files) == ["2", T2, "2", T2]


# -- what the events of a tag come to -----------------------------------------------

STORIES = {  # events, then hits, last_hit, opens, last_open
    "made": ([], ["0", "", "0", ""]),
    "opened": ([opened(1, 1), opened(2, 2, T2)], ["2", T2, "2", T2]),
    "machine": ([opened(1, 1), event("hit", 2, 1, T2, "machine")], ["2", T2, "1", T1]),
    "clock set back": ([opened(1, 1, T2), opened(2, 2, T1)], ["2", T2, "2", T2]),
    "lines twice": ([opened(1, 1), opened(2, 2, T2)] * 2, ["2", T2, "2", T2]),
    "older line later": ([opened(2, 2, T2), opened(1, 1)], ["2", T2, "2", T2]),
    "lost lines": ([opened(1, 1), opened(5, 4, T3)], ["5", T3, "4", T3]),
    "judged anew": ([opened(1, 1), event("verdict", 1, 0, T1, "machine")],
                    ["1", T1, "0", ""]),
    "judged anew, with the last open": (
        [opened(1, 1), opened(2, 2, T2), event("verdict", 2, 1, T2, "machine"),
         event("count", 2, 1, T2, detail=T1)], ["2", T2, "1", T1]),
    "judged before another hit": (
        [opened(1, 1), opened(2, 2, T2), event("verdict", 1, 0, T1, "machine")],
        ["2", T2, "2", T2]),
    "counts from elsewhere": ([opened(1, 1), event("count", 9, 4, T3, detail=T2)],
                              ["9", T3, "4", T2]),
    "counts unknown": ([event("hit", None, None, T3, "human")], ["0", "", "0", ""]),
    "another tag's": ([opened(5, 5, T3, B)], ["0", "", "0", ""]),
}


@pytest.mark.parametrize("when", ["in the end", "after each event", "never"])
@pytest.mark.parametrize("events, expected", STORIES.values(), ids=STORIES)
def test_events_come_to_the_same_whenever_they_are_settled(
        when, events, expected, files):
    mailtracker.add_tags(files, [(A, "ann")], T1)
    for each in events:
        assert when != "after each event" or settle(files)
        append_events(files, [each])
    assert when == "never" or settle(files)
    assert counts(files) == expected
    assert shown(files)[A]["name"] == "ann" and shown(files)[A]["created"] == T1


THREE = {  # event of the log, row of the register, row of .bak, what is right
    "the log has most": (opened(3, 3, T3), row(2, T2, 2, T2), row(1, T1, 1, T1),
                         ["3", T3, "3", T3]),
    "the register has most": (opened(1, 1), row(4, T2, 2, T1), row(2, T1, 2, T1),
                              ["4", T2, "2", T1]),
    ".bak has most": (opened(1, 1), row(2, T2, 2, T2), row(5, T3, 1, T1),
                      ["5", T3, "1", T2]),
    "the register's is later": (opened(2, 1), row(2, T2, 2, T2), "",
                                ["2", T2, "2", T2]),
    "the log's is first": (opened(2, 1, T2), row(2, T2, 2, T2), "", ["2", T2, "1", T2]),
    "the register before .bak": (event("made"), row(2, T2, 2, T2), row(2, T2, 1, T2),
                                 ["2", T2, "2", T2]),
    "not in the register": (opened(1, 1), "", row(2, T2, 1, T1, "kept"),
                            ["2", T2, "1", T1]),
    "only in the log": (opened(1, 1), "", "", ["1", T1, "1", T1]),
    "only in the register": (None, row(1, T1, 1, T1), "", ["1", T1, "1", T1]),
    "only in .bak": (None, "", row(1, T1, 1, T1, "kept"), ["1", T1, "1", T1]),
}


@pytest.mark.parametrize("logged, mine, older, expected", THREE.values(), ids=THREE)
def test_the_version_with_the_most_hits_is_right(logged, mine, older, expected, files):
    save(files.register, HEAD + mine)
    save(files.bak, HEAD + older, age=90)
    append_events(files, [event("made"), logged] if logged else [])
    for _ in range(2):
        assert counts(files) == expected
        assert shown(files)[A]["note"] == ("kept" if "kept" in older else "")
        assert settle(files)
    save(files.register, HEAD)  # two stale saves
    save(files.bak, HEAD)
    assert counts(files)[0] == expected[0], "what only a row knew is in the log now"


FITTING = {  # what happens to the files, and whether the marks fit afterwards
    "nothing": (lambda files: None, True),
    "a newtag": (lambda files: mailtracker.add_tags(files, [(B, "b")], T1), True),
    "the log is moved": (lambda files: os.rename(files.log, files.log + ".1"), True),
    "the register is saved": (lambda files: os.utime(files.register, (1, 1)), False),
    ".bak is saved": (lambda files: os.utime(files.bak, (1, 1)), False),
    "the marks are gone": (lambda files: os.unlink(files.lock), False),
    "the marks are junk": (lambda files: save(files.lock, "x" * 300), False),
    "the log is another one": (lambda files: save(
        files.log, read(files.log).replace("detail 19", "detail 20")), False),
}


@pytest.mark.parametrize("happens, fits", FITTING.values(), ids=FITTING)
def test_only_where_the_marks_fit_older_lines_are_not_read(happens, fits, files):
    mailtracker.add_tags(files, [(A, "ann")], T1)
    for hits in 1, 2:
        append_events(files, [opened(hits, hits), *[event("x", detail=f"detail {n}")
                                                    for n in range(20)]])
        assert settle(files)
    with open(files.log, "r+b") as file:  # nobody does: it shows what is read
        file.seek(read(files.log).index(f",hit,{A},1,1"))
        file.write(f",hit,{A},7,7".encode())
    happens(files)
    assert counts(files)[0] == ("2" if fits else "7")
    append_events(files, [opened(8, 8)])
    assert counts(files)[0] == "8" and settle(files) and settled_hits(files) == 8


# -- making and forgetting ------------------------------------------------------------

@pytest.mark.parametrize("longer", ["register", "log"])
def test_a_newtag_that_the_disk_refuses_leaves_nothing(longer, files, tracker, newtags):
    save(files.register, HEAD + row(1, T1, 1, T1) + "x" * 3900 * (longer == "register"))
    append_events(files, [event("made", detail="x" * 3900 * (longer == "log"))])
    before = read(files.register)
    # 4.5 KB for each file: the rows do not fit in, or not the lines of the log.
    done = tracker("newtag", "--register", files.register, "--count", 20,
                   prefix=["sh", "-c", 'ulimit -f 9; exec "$@"', "sh"])
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search("(?m)^mailtracker: error: .*[Ff]ile too large$", done.stderr)
    assert read(files.register) == before and [*shown(files)] == [A]
    assert [each.id for each in mailtracker.read_log(files.log)] == [A]
    assert len(newtags(files.register, 20)) == 20 and len(shown(files)) == 21


def test_newtags_and_a_server_beside_each_other_lose_nothing(serve, newtags, files):
    server = serve("--register", files.register, "--quiet")
    commands = [subprocess.Popen(
        [sys.executable, str(SCRIPT), "newtag", "--register", files.register, "--count",
         "40", "--format", "url"], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, env=clean_environment()) for _ in range(6)]
    made = [tag for each in commands for tag in re.findall(
        r"/(\w+)\.gif", each.communicate(timeout=60)[0])]
    made += newtags(files.register, 4_000)[-1:]  # not all of them heard yet
    for tag in made[::-9]:
        server.hit(tag)
        assert counts(files, tag)[0] == "1", "the very first hit counts"
    assert len({*made}) == 241 and len(shown(files)) == 4_240
    eventually(lambda: all(settled_hits(files, tag) == 1 for tag in made[::-9]))


def test_a_forgotten_tag_is_nowhere_and_stays_so(serve, tracker, files):
    save(files.register, f"{OLD},john,2,2018-05-01 10:00:00\n{B},jane,0,\n")
    assert settle(files) and os.path.exists(files.orig)
    append_events(files, [opened(3, 1, T1, OLD)])
    os.rename(files.log, files.log + ".1")
    server = serve("--register", files.register, "--quiet")
    server.hit(OLD)
    eventually(lambda: settled_hits(files, OLD) == 4)
    stale, size = read(files.register), os.path.getsize(files.log + ".1")
    done = tracker("forget", "--register", files.register, "john", "--yes")
    assert done.returncode == 0, done.stderr
    eventually(lambda: (server.hit(OLD), f",hit,{OLD}" not in read(files.log))[1])
    server.hit(B)
    save(files.register, stale, 0)
    eventually(lambda: settled_hits(files, B) == 1 and not settled_hits(files, OLD))
    server.hit(OLD)
    assert server.stop() == 0 and [*shown(files)] == [B]
    left = b"".join(path.read_bytes() for path in Path(files.register).parent.iterdir()
                    if path.is_file())
    assert OLD.encode() not in left and b"john" not in left
    assert os.path.getsize(files.log + ".1") == size, "nobody's place has moved"


def test_forgetting_many_tags_holds_up_no_answer(serve, newtags, tracker, files):
    newtags(files.register, 5_000, "old")
    tag, = newtags(files.register, 1, "new")
    server = serve("--register", files.register, "--quiet")
    done = tracker("forget", "--register", files.register, "old", "--yes")
    assert done.returncode == 0, done.stderr
    for _ in range(30):
        assert server.get(f"/{tag}.gif", timeout=1)[0] == 200
    assert counts(files, tag)[0] == "30"


# -- what can happen to the log and the register ------------------------------------

HAND_MADE = HEAD + row(0, "", 0, "", "kept") + row(0, "", 0, "", "too", B)
FATES = {
    "log moved": lambda files: os.rename(files.log, files.log + ".1"),
    "log moved by date": lambda files: os.rename(files.log, files.log + "-20261121"),
    "log deleted": lambda files: os.unlink(files.log),
    "log truncated": lambda files: os.truncate(files.log, 0),
    "log copied and truncated": lambda files: (shutil.copy(files.log, files.log + ".1"),
                                               os.truncate(files.log, 0)),
    "log moved and an empty one made": lambda files: (
        os.rename(files.log, files.log + ".1"), Path(files.log).touch()),
    "half a line in the log": lambda files: Path(files.log).write_text(
        read(files.log) + "2026-1"),
    "register deleted": lambda files: os.unlink(files.register),
    "register emptied": lambda files: os.truncate(files.register, 0),
    "register moved": lambda files: os.rename(files.register, files.register + ".x"),
    "register cut": lambda files: save(
        files.register, read(files.register).partition(B)[0]),
    "register of long ago": lambda files: save(files.register, HAND_MADE),
}


@pytest.fixture
def fated(serve, tmp_path):
    """Start a server with a register and three hits for each of some fates."""
    def start(fates):
        for fate in fates:
            (tmp_path / fate).mkdir()
            files = Files(str(tmp_path / fate / "register.csv"))
            save(files.register, HAND_MADE)
            append_events(files, [event("made"), opened(1, 1)])
            assert settle(files)
            server = serve("--register", files.register, "--quiet")
            server.hit(A, 2)
            yield fate, server, files
    return start


@pytest.mark.parametrize("settled", [True, False], ids=["settled", "at once"])
def test_hits_stay_and_go_on_whatever_happens_to_the_files(settled, fated):
    cases = [*fated(FATES)]

    def wait_for(hits):
        eventually(lambda: not [fate for fate, _, files in cases
                                if settled_hits(files) != hits], 15)

    if settled:
        wait_for(3)
    for fate, server, files in cases:
        server.hit(A)
        FATES[fate](files)
    wait_for(4)
    for fate, server, files in cases:
        eventually(lambda: read(files.log).startswith("time,event,"))
        server.hit(A, 2)
        server.kill()
        assert [each["hits"] for each in shown(files).values()] == ["6", "0"], fate
        assert [each["note"] for each in shown(files).values()] == ["kept", "too"], fate
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
    assert counts(files, tag)[0] == "5" and read(files.log).startswith("time,event,")


def test_a_register_that_cannot_be_read_is_told_of_and_left_alone(fated):
    (_, server, files), = fated(["unclosed"])
    broken = read(files.register).replace(",kept", ',"kept')
    save(files.register, broken, 0)
    eventually(lambda: server.get("/health")[0] == 503)
    assert server.get("/health")[2].decode().startswith("register.csv, line 2: a quote")
    eventually(lambda: f"{files.register}, line 2: a quote" in server.log())
    server.hit(A, 2)
    assert read(files.register) == broken
    save(files.register, broken.replace('"', ""), 0)
    eventually(lambda: settled_hits(files) == 5)
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
        assert counts(files, tag)[0] == "3"
        eventually(lambda: server.get("/health")[0] == 503)
        server.hit(tag, 2)
    finally:
        subprocess.run([*free, tmp_path], check=True)
    eventually(lambda: settled_hits(files, tag) == 5)
    eventually(lambda: server.get("/health")[0] == 200)


@pytest.fixture
def small_disk(tmp_path):
    """Return the files of a register on a disk of 256 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small disk takes root")
    yield Files(str(folder / "register.csv"))
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_bounded_memory_and_no_count(small_disk):
    files, folder = small_disk, os.path.dirname(small_disk.register)
    mailtracker.add_tags(files, [(A, "ann"), (B, "bob")], T1)
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
    assert folder not in store.trouble(), "strangers can read it"
    assert store.find(A).hits == 60_000, "the count goes on in memory"
    subprocess.run(["mount", "-o", "remount,size=8m", folder], check=True)
    eventually(lambda: (store.tend(), not store.trouble())[1])
    assert [counts(files, tag_id)[0] for tag_id in (A, B)] == ["60000"] * 2
    store.close()
    assert settled_hits(files, A) == settled_hits(files, B) == 60_000
    assert not [name for name in os.listdir(folder) if name.endswith((".new", ".old"))]


def test_a_server_on_a_full_disk_answers_and_counts_later(small_disk, serve, newtags):
    files, filler = small_disk, Path(small_disk.register).with_name("filler")
    tag, = newtags(files.register)
    server = serve("--register", files.register, "--quiet")
    with open(filler, "wb", 0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 512)
    server.hit(tag, 200)
    eventually(lambda: b"No space left" in server.get("/health")[2])
    assert server.get("/health")[0] == 503
    filler.unlink()
    eventually(lambda: server.get("/health")[0] == 200)
    assert counts(files, tag)[0] == "200"
    eventually(lambda: settled_hits(files, tag) == 200)
    assert len({each.hits for each in mailtracker.read_log(files.log)}) == 201


def test_a_suspended_newtag_that_holds_all_locks_stops_nothing(tagged, files):
    server, tag = tagged("--quiet")
    with open(files.register) as register, open(files.log) as log:
        fcntl.flock(register, fcntl.LOCK_EX)
        fcntl.flock(log, fcntl.LOCK_EX)
        for hits in range(1, 30):
            server.hit(tag)
            assert counts(files, tag)[0] == str(hits)
        assert server.stop() == 0
    assert settle(files) and settled_hits(files, tag) == 29


@pytest.mark.parametrize("path", ["register.csv", "link.csv", "other/register.csv"])
def test_a_register_has_one_server(path, tagged, serve, files, tmp_path):
    server, tag = tagged("--quiet")
    (tmp_path / "link.csv").symlink_to(files.register)
    (tmp_path / "other").symlink_to(tmp_path)
    second = serve("--register", path, wait=False)
    assert second.process.wait(10) == 1
    assert re.fullmatch(rf".*process {server.process.pid}\n", second.log())
    server.kill()
    serve("--register", path).hit(tag)
    assert counts(files, tag)[0] == "1"
