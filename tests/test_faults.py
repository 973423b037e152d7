"""What mailtracker survives: kills, other programs' saves, damage, a full disk.

Everything happens for real: real processes, real signals, a real spreadsheet.
"""
from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from conftest import SCRIPT
from conftest import Server
from conftest import clean_environment
from conftest import eventually
from conftest import register_rows

from mailtracker import COUNTERS
from mailtracker import PIXEL
from mailtracker import Register
from mailtracker import is_id

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
NEVER = " " * 20


# ---------------------------------------------------------------------------
# Clients that count, and a reader that is strict
# ---------------------------------------------------------------------------


class Load:
    """Threads that fetch pixels and count what they sent and what was answered."""

    def __init__(self, port, tags, threads=4):
        self.tags = list(tags)
        self._port = port
        self._over = threading.Event()
        self._sent = [Counter() for _ in range(threads)]
        self._answered = [Counter() for _ in range(threads)]
        self._threads = [threading.Thread(target=self._run, args=(number,))
                         for number in range(threads)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()

    def sent(self):
        """Return how often each tag was asked for, answered or not."""
        return sum(map(Counter.copy, self._sent), Counter())

    def answered(self):
        """Return how often each tag's pixel came back whole."""
        return sum(map(Counter.copy, self._answered), Counter())

    def wait_for(self, more, seconds=30.0):
        """Wait until so many more pixels have come back."""
        goal = sum(self.answered().values()) + more
        eventually(lambda: sum(self.answered().values()) >= goal, seconds, 0.005)

    def _run(self, number):
        dice = random.Random(number)
        while not self._over.is_set():
            tag = dice.choice(self.tags)
            if fetch(self._port, tag, self._sent[number]):
                self._answered[number][tag] += 1


def fetch(port, tag, sent):
    """Ask for a pixel; count the request when it is sent; tell whether it came."""
    try:
        client = socket.create_connection(("127.0.0.1", port), timeout=20)
    except OSError:
        time.sleep(0.005)  # nobody listens just now: do not burn the processor
        return False
    with client:
        sent[tag] += 1
        received = b""
        with contextlib.suppress(ConnectionError):
            client.sendall(b"GET /%s.gif HTTP/1.1\r\nHost: x\r\n\r\n" % tag.encode())
            block = b"-"
            while block:
                block = client.recv(4096)
                received += block
    return received.startswith(b"HTTP/1.1 200 ") and received.endswith(PIXEL)


def canonical_rows(path):
    """Return the rows by id if every one is whole and in canonical form, else {}."""
    try:
        data = path.read_bytes()
        rows = register_rows(path)
    except Exception:  # missing or half a file: not canonical
        return {}
    if not data.endswith(b"\n") or not rows:
        return {}
    return rows if all(map(is_whole, rows.values())) else {}


def is_whole(row):
    """Tell whether a row has every cell, and counters of their fixed widths."""
    return None not in row and None not in row.values() and is_id(row["id"]) \
        and all(len(row[name]) == width for name, width in COUNTERS.items()) \
        and row["hits"].isdigit()


def hits_of(path):
    """Return the hits of every tag, from the register as it stands."""
    return {tag: int(row["hits"]) for tag, row in register_rows(path).items()
            if is_id(tag)}


def counted(path, expected):
    """Tell whether a canonical register holds exactly these hits of these tags."""
    return {tag: int(row["hits"]) for tag, row in canonical_rows(path).items()} \
        == dict(expected)


def twin_of(register):
    """Return the path of a register's twin."""
    return register.with_name(register.name + ".twin")


def events_of(register):
    """Return the path of a register's event log."""
    return register.with_name(register.stem + ".events.csv")


def logged_hits(register):
    """Return how many hits of each tag the event log holds, read without mercy."""
    with open(events_of(register), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert all(None not in row and None not in row.values() for row in rows)
    return Counter(row["id"] for row in rows if row["event"] == "hit")


def backup_of(register):
    """Return the path of a register's backup."""
    return register.with_name(register.name + ".bak")


def save_by_rename(path, data):
    """Save as LibreOffice and most editors do: a new file in the old one's place."""
    draft = path.with_name("lu123.tmp")
    draft.write_bytes(data)
    os.replace(draft, path)


def save_in_place(path, data):
    """Save as Notepad does: truncate, then write, here in pieces."""
    with open(path, "r+b", buffering=0) as file:
        file.truncate(0)
        for start in range(0, len(data), 3000):
            file.write(data[start:start + 3000])
            time.sleep(0.01)  # a slow program


def save_by_delete(path, data):
    """Save as Excel does: for a moment there is no register at all."""
    draft = path.with_name("A1B2C3D4")
    draft.write_bytes(data)
    path.unlink()
    time.sleep(0.1)  # the moment
    os.rename(draft, path)


SAVES = [save_by_rename, save_in_place, save_by_delete]


@pytest.fixture
def register(tmp_path):
    """Return the path of a register that is still to be made."""
    return tmp_path / "register.csv"


@pytest.fixture
def without_override():
    """Return a command prefix under which even root respects file modes."""
    if os.geteuid():
        return []
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("root may write anywhere, and setpriv (util-linux) does not help")
    return prefix


# ---------------------------------------------------------------------------
# Killed processes
# ---------------------------------------------------------------------------


def newtag_killed(register, dice, folder):
    """Run a newtag and kill it at some moment; return its exit code, whole ids."""
    with open(folder / "newtag.out", "w+b") as out:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "newtag", "--register", str(register),
             "--count", "30", "--server", "127.0.0.1", "--format", "url"],
            stdout=out, stderr=subprocess.DEVNULL, env=clean_environment())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0.02, 0.2))
        process.kill()
        process.wait()
        out.seek(0)
        printed = re.findall(r"/(\w+)\.gif\n", out.read().decode())
    return process.returncode, printed


def test_200_kills_of_servers_and_newtags_lose_no_answered_hit(
        serve, newtags, register, tmp_path_factory):
    folder, dice = tmp_path_factory.mktemp("kills"), random.Random(2018)
    options = ("--register", register, "--reuse-port", "--quiet")
    tags = newtags(register, 40)
    servers = [serve(*options)]
    port = servers[0].port
    servers.append(serve(*options, port=port))
    printed, kills = list(tags), 0

    def holds(answered):
        rows = canonical_rows(register)
        logged = Counter(re.findall(r",hit,(\w+),", events_of(register).read_text()))
        return rows and set(printed) <= set(rows) and all(
            logged[tag] >= hits and int(rows[tag]["hits"]) >= hits
            for tag, hits in answered.items())

    with Load(port, tags) as load:
        while kills < 200:
            load.wait_for(25)
            if kills % 3:
                servers.pop(dice.randrange(2)).kill()
                kills += 1
            else:
                code, ids = newtag_killed(register, dice, folder)
                kills += code == -signal.SIGKILL
                printed += ids
            answered = load.answered()
            eventually(lambda: holds(answered), 5)
            if len(servers) < 2:
                servers.append(serve(*options, port=port, wait=False))
        sum_at_the_end = load.answered()
    for server in servers:
        server.kill()
    hits, answered, sent = hits_of(register), load.answered(), load.sent()
    logged = logged_hits(register)
    assert sum(sum_at_the_end.values()) > 5000
    assert set(printed) <= set(hits)
    for tag, count in hits.items():  # the log is written first
        assert answered[tag] <= count <= logged[tag] <= sent[tag]
    assert sum(logged.values()) - sum(hits.values()) <= 200  # one for each kill
    again = serve(*options)
    eventually(lambda: counted(register, {tag: logged[tag] for tag in hits}), 10)
    for tag in tags:
        again.hit(tag)
    assert counted(register, {tag: logged[tag] + (tag in tags) for tag in hits})
    assert logged_hits(register) == {tag: logged[tag] + 1 for tag in tags}
    assert register.read_bytes() == twin_of(register).read_bytes()


def test_a_newtag_killed_while_it_writes_leaves_whole_rows_after_a_repair(
        serve, newtags, register):
    known = newtags(register, 3)
    server = serve("--register", register)
    dice = random.Random(5)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "newtag", "--register", str(register),
             "--count", "5000", "--server", "127.0.0.1", "--format", "url"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=clean_environment())
        size = register.stat().st_size
        deadline = time.monotonic() + 20
        while register.stat().st_size == size and process.poll() is None:
            assert time.monotonic() < deadline
        time.sleep(dice.uniform(0, 0.002))
        process.kill()
        process.wait()
        server.hit(known[0])
        eventually(lambda: canonical_rows(register)
                   and register.read_bytes() == twin_of(register).read_bytes())
    hits = hits_of(register)
    assert [hits.pop(tag) for tag in known] == [3, 0, 0]
    assert not any(hits.values())


@pytest.mark.parametrize("behind", ["register", "twin"])
def test_after_a_crash_between_the_two_writes_the_larger_count_wins(
        serve, newtags, register, behind):
    tags = newtags(register, 3)
    server = serve("--register", register)
    server.hit(tags[1], 3)
    server.stop()
    ahead = twin_of(register) if behind == "register" else register
    row = f"{tags[1]},0000000003"
    data = ahead.read_text()
    assert row in data
    ahead.write_text(data.replace(row, row[:-1] + "7"))
    server = serve("--register", register)
    server.hit(tags[0])
    assert counted(register, {tags[0]: 1, tags[1]: 7, tags[2]: 0})
    assert twin_of(register).read_bytes() == register.read_bytes()
    assert not backup_of(register).exists()


def test_a_crash_between_the_two_appends_keeps_the_tag(
        serve, newtags, tracker, register):
    newtags(register, 3)
    short = twin_of(register).read_bytes()
    tags = newtags(register, 2)
    twin_of(register).write_bytes(short)
    server = serve("--register", register)
    server.hit(tags[1])
    assert hits_of(register)[tags[1]] == 1
    assert twin_of(register).read_bytes() == register.read_bytes()


# ---------------------------------------------------------------------------
# Other programs that save the register
# ---------------------------------------------------------------------------


class Spreadsheet:
    """A person with a spreadsheet: opens a register, edits it, saves it much later."""

    def __init__(self, path):
        self.path = path
        self.rows = eventually(lambda: canonical_rows(path), 5)

    def edit(self, number):
        """Add a column, edit a name, sort the rows."""
        for tag, row in self.rows.items():
            row["note"] = f'{number} "quoted"; {tag[:3]}\nsecond line'
            row["hits"] = str(int(row["hits"]))
        random.Random(number).choice(list(self.rows.values()))["name"] = \
            f"edited = {number}"

    def data(self):
        """Return the rows as a spreadsheet in Germany writes them."""
        order = ["note", "name", "created", "hits", "id", "last_hit"]
        first = next(iter(self.rows.values()))
        columns = order + [name for name in first if name not in order]
        rows = sorted(self.rows.values(), key=lambda row: (row["hits"], row["id"]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, delimiter=";", lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
        return b"\xef\xbb\xbf" + text.getvalue().encode()

    def is_kept(self):
        """Tell whether the register holds this person's cells."""
        rows = canonical_rows(self.path)
        return set(self.rows) <= set(rows) and all(
            rows[tag].get(name) == row[name]
            for tag, row in self.rows.items() for name in ("name", "note"))


def start_newtags(register, number):
    """Start so many newtag processes at once."""
    return [subprocess.Popen(
        [sys.executable, str(SCRIPT), "newtag", "--register", str(register),
         "--name", f"parallel {n}", "--server", "127.0.0.1", "--format", "url"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=clean_environment()) for n in range(number)]


def finish_newtags(processes):
    """Wait for newtag processes; return their ids."""
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [(p.returncode, err) for p, (_, err) in zip(processes, outputs)
            if p.returncode] == []
    return [re.search(r"/(\w+)\.gif\n$", out)[1] for out, _ in outputs]


def test_servers_newtags_dumps_and_a_person_with_a_spreadsheet_share_a_register(
        serve, newtags, tracker, register):
    tags = newtags(register, 60, name="a name; with ; and ümlaut")
    options = ("--register", register, "--reuse-port", "--quiet")
    port = serve(*options).port
    serve(*options, port=port)
    over, dumps = threading.Event(), []

    def dump_for_ever():
        while not over.is_set():
            dumps.append(tracker("dump", register, "--format", "csv"))

    watcher = threading.Thread(target=dump_for_ever)
    with Load(port, tags) as load:
        watcher.start()
        try:
            processes = start_newtags(register, 100)
            sheets = []
            for number in range(9):
                sheets.append(Spreadsheet(register))
                sheets[-1].edit(number)
                load.wait_for(100)
                SAVES[number % 3](register, sheets[-1].data())
                eventually(sheets[-1].is_kept, 10)
            made = finish_newtags(processes)
        finally:
            over.set()
            watcher.join()
    answered = load.answered()
    assert load.sent() == answered
    eventually(lambda: counted(
        register, {tag: answered[tag] for tag in tags + made}), 3)
    assert sheets[-1].is_kept()
    assert len(dumps) > 2
    assert {done.returncode for done in dumps} == {0}
    first_line = register.read_bytes().partition(b"\n")[0]
    assert first_line.startswith(b"\xef\xbb\xbfid;hits;last_hit;")
    assert first_line.endswith(b"\r")
    eventually(lambda: register.read_bytes() == twin_of(register).read_bytes(), 3)


def lines_of(data):
    """Return header and rows of a register of one-line rows."""
    first, *rows = data.splitlines(keepends=True)
    return first, rows


STALE = {
    "as it was": lambda rows: rows,
    "without its last rows": lambda rows: rows[:-3],
    "without its first row": lambda rows: rows[1:],
    "without a row in the middle": lambda rows: rows[:4] + rows[5:],
    "without any row": lambda rows: [],
    "sorted": sorted,
    "turned round": lambda rows: rows[::-1],
    "its first row twice": lambda rows: [rows[0], *rows],
}


@pytest.mark.parametrize("serving, same_width", [
    (True, True), (True, False), (False, False)],
    ids=["serving, one width", "serving, other widths", "no server, other widths"])
@pytest.mark.parametrize("how", STALE)
def test_a_stale_save_loses_neither_counts_nor_tags(
        serve, newtags, register, how, serving, same_width):
    tags = newtags(register, names=["n" * (5 if same_width else n + 1)
                                    for n in range(8)])
    old = register.read_bytes()
    tags += newtags(register, 2)
    server = serve("--register", register)
    expected = dict.fromkeys(tags, 0)
    for number, tag in enumerate(tags):
        server.hit(tag, number % 3)
        expected[tag] = number % 3
    if not serving:
        assert server.stop() == 0
    before = register_rows(register)
    first, rows = lines_of(old)
    save_by_rename(register, b"".join([first, *STALE[how](rows)]))
    if not serving:
        server = serve("--register", register)
    server.hit(tags[3])
    expected[tags[3]] += 1
    if "twice" not in how:
        eventually(lambda: counted(register, expected), 3)
        after = register_rows(register)
        assert [after[tag]["name"] for tag in tags] == \
            [before[tag]["name"] for tag in tags]
    else:
        eventually(lambda: {**hits_of(register), **expected} == hits_of(register), 3)
        assert len(register_rows(register)) == len(tags) + 1
    assert register.read_bytes() == twin_of(register).read_bytes()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("how", ["without its last rows", "turned round",
                                 "without a row in the middle"])
def test_a_stale_save_under_load_keeps_every_sum(
        serve, newtags, register, save, how):
    tags = newtags(register, 300)
    first, rows = lines_of(register.read_bytes())
    data = b"".join([first, *STALE[how](rows)])
    port = serve("--register", register, "--quiet").port
    with Load(port, tags) as load:
        load.wait_for(200)
        save(register, data)
        load.wait_for(200)
    assert load.sent() == load.answered()
    expected = {tag: load.answered()[tag] for tag in tags}
    eventually(lambda: counted(register, expected), 3)


def test_a_twin_that_its_user_deletes_is_made_anew_and_both_servers_go_on(
        serve, newtags, register):
    tag, other = newtags(register, 2)
    options = ("--register", register, "--reuse-port")
    one = serve(*options)
    two = serve(*options, port=one.port)
    one.hit(tag, 10)
    twin_of(register).unlink()
    eventually(twin_of(register).exists, 5)
    one.hit(tag, 20)
    eventually(lambda: counted(register, {tag: 30, other: 0}), 3)
    assert min(server.log().count(f"hit {tag}") for server in (one, two)) > 0
    eventually(lambda: register.read_bytes() == twin_of(register).read_bytes(), 3)
    save_by_rename(register, register.read_bytes().replace(b"0000000030", b"7"))
    one.hit(tag, 20)
    eventually(lambda: counted(register, {tag: 50, other: 0}), 3)
    assert (one.stop(), two.stop()) == (0, 0)


def test_a_register_that_vanishes_comes_back_with_its_tags(serve, newtags, register):
    tag, other = newtags(register, 2)
    server = serve("--register", register)
    server.hit(tag, 2)
    register.unlink()
    server.hit(tag, 2)
    eventually(lambda: counted(register, {tag: 4, other: 0}), 8)
    server.hit(tag)
    assert counted(register, {tag: 5, other: 0})
    assert "made again" in server.log()


def test_a_newtag_waits_for_a_register_that_is_missing_while_it_is_saved(
        newtags, register):
    tags = newtags(register, 2)
    away = register.with_name("away")
    register.rename(away)
    back = threading.Timer(0.7, away.rename, [register])
    back.start()
    try:
        tags += newtags(register, 1)
    finally:
        back.join()
    assert list(register_rows(register)) == tags


@pytest.fixture
def calc(tmp_path_factory):
    """Return a function that opens a CSV in LibreOffice Calc and saves it."""
    if not shutil.which("soffice"):
        pytest.skip("LibreOffice Calc is missing (Debian package libreoffice-calc)")
    profile, out = (tmp_path_factory.mktemp(name) for name in ("office", "saved"))
    as_csv = "Text - txt - csv (StarCalc)"

    def save(path):
        done = subprocess.run(
            ["soffice", "--headless", "--norestore",
             f"-env:UserInstallation={profile.as_uri()}",
             f"--infilter={as_csv}:44,34,76,1",
             "--convert-to", f"csv:{as_csv}:44,34,76,1,,0,false,true",
             "--outdir", str(out), str(path)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
            check=False, env=clean_environment(HOME=str(profile)))
        saved = out / path.name
        assert saved.exists(), done.stdout + done.stderr
        save_by_rename(path, saved.read_bytes())  # --convert-to refuses to do this
    return save


def test_libreoffice_opens_and_saves_a_register_while_its_tags_are_hit(
        serve, newtags, register, calc):
    tags = newtags(register, 1000, name="Zoë, 1/2")
    server = serve("--register", register)
    for tag in tags[:50]:
        server.hit(tag, 2)
    before = register_rows(register)
    with Load(server.port, tags[:20]) as load:
        calc(register)
        load.wait_for(50)
    assert load.sent() == load.answered()
    hits = {tag: 2 * (tag in tags[:50]) + load.answered()[tag] for tag in tags}
    eventually(lambda: counted(register, hits), 3)
    assert f"\n{tags[20]},2," in backup_of(register).read_text()  # Calc's: no zeros
    after = register_rows(register)
    assert list(after) == tags
    for tag in tags:
        assert after[tag]["created"] == before[tag]["created"]
        assert after[tag]["name"] == before[tag]["name"]
        if tag not in tags[:20]:
            assert after[tag]["last_hit"] == before[tag]["last_hit"]
    server.hit(tags[999])
    assert hits_of(register)[tags[999]] == 1


# ---------------------------------------------------------------------------
# Damaged registers
# ---------------------------------------------------------------------------


def with_row(change):
    """Return a damage that changes row 3 alone."""
    def damage(data):
        first, rows = lines_of(data)
        rows[3] = change(rows[3])
        return b"".join([first, *rows])
    return damage


def with_name(name):
    """Return a damage that gives row 3 another name."""
    return with_row(lambda row: row[:row.rindex(b",") + 1] + name + b"\n")


# What is done to the bytes of a register of ten tags, and how many of them cannot be
# got back without the twin: those that the damage itself removed.
DAMAGES = {
    "last line torn in its id": (lambda data: data[:data.rindex(b"\n", 0, -1) + 9], 1),
    "last line torn in its hits": (
        lambda data: data[:data.rindex(b"\n", 0, -1) + 28], 1),
    "last line torn in its name": (lambda data: data[:-2], 0),
    "last line end missing": (lambda data: data[:-1], 0),
    "unclosed quote": (with_name(b'"Jo'), 0),
    "quote in the middle": (with_name(b'Jo"e'), 0),
    "NUL in a name": (with_name(b"J\0o"), 0),
    "NUL in an id": (with_row(lambda row: row[:5] + b"\0" + row[5:]), 0),
    "a block of NULs behind": (lambda data: data + bytes(4096), 0),
    "a cell of 200 KB": (with_name(b"x" * 200000), 0),
    "latin-1 bytes": (with_name(b"Zo\xeb"), 0),
    "hits are no number": (
        with_row(lambda row: re.sub(rb"\d{10}", b"many", row, count=1)), 0),
    "hits negative": (
        with_row(lambda row: re.sub(rb"\d{10}", b"-000000003", row, count=1)), 0),
    "too few cells": (with_row(lambda row: row[:row.index(b",")] + b"\n"), 0),
    "too many cells": (with_row(lambda row: row[:-1] + b",more,and more\n"), 0),
    "an empty line": (with_row(lambda row: b"\n" + row), 0),
    "a line of commas": (with_row(lambda row: b",,,,,,\n" + row), 0),
    "a line of text": (with_row(lambda row: b"Sum of all,33\n" + row), 0),
    "line ends mixed": (with_row(lambda row: row[:-1] + b"\r\n"), 0),
    "a lone CR": (with_row(lambda row: row[:-1] + b"\r"), 0),
    "an id twice, with fewer hits": (lambda data: data + re.sub(
        rb",\d{10}", b",0000000001", lines_of(data)[1][3], count=1), 0),
    "an id twice, with more hits": (lambda data: re.sub(
        rb"\n(\w+),\d{10}", rb"\n\1,0000000000", data) + lines_of(data)[1][3], None),
    "binary rubbish behind": (lambda data: data + bytes(range(256)) * 8, 0),
    "an empty file": (lambda data: b"", 10),
    "a header only": (lambda data: lines_of(data)[0], 10),
}
# Whose count without the twin is not what was damaged, but what is left of it.
UNREADABLE_HITS = {"hits are no number", "hits negative", "too few cells"}


@pytest.fixture(scope="module")
def ten_tags_made(tmp_path_factory):
    """Return a folder with a register of ten tags that was served and stopped."""
    folder = tmp_path_factory.mktemp("ten")
    names = "".join(f"Number {n}\n" for n in range(10))
    subprocess.run([sys.executable, str(SCRIPT), "newtag", "--names-from", "-"],
                   cwd=folder, input=f"name\n{names}", text=True, check=True,
                   capture_output=True, timeout=60, env=clean_environment())
    with open(folder / "log", "wb") as log:
        server = Server(subprocess.Popen(
            [sys.executable, str(SCRIPT), "server", "--host", "127.0.0.1", "--port",
             "0"], cwd=folder, stderr=log, env=clean_environment()), folder / "log")
    try:
        eventually(server.find_port, 20)
        for number, tag in enumerate(register_rows(folder / "register.csv")):
            server.hit(tag, number)
        assert server.stop() == 0
    finally:
        server.kill()
    return folder


@pytest.fixture
def ten_tags(ten_tags_made, register):
    """Return the hits of ten tags in a register that was served and stopped."""
    for path in ten_tags_made.glob("register*"):
        shutil.copy2(path, register.with_name(path.name))
    assert events_of(register).exists() and twin_of(register).exists()
    return {tag: number for number, tag in enumerate(register_rows(register))}


def harmed(register, expected):
    """Return the ids whose hits are not what is expected, or that are not there."""
    hits = hits_of(register)
    return [tag for tag in expected if hits.get(tag) != expected[tag]]


@pytest.mark.parametrize("serving", [False, True], ids=["before a start", "serving"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_harms_no_row_as_there_is_a_twin(
        serve, register, ten_tags, name, serving):
    bad = DAMAGES[name][0](register.read_bytes())
    if serving:
        server = serve("--register", register)
        save_by_rename(register, bad)
    else:
        save_by_rename(register, bad)
        server = serve("--register", register)
    tags = list(ten_tags)
    for tag in tags:
        server.hit(tag)
        ten_tags[tag] += 1
    eventually(lambda: is_sound(register) and not harmed(register, ten_tags), 3)
    assert "Traceback" not in server.log()
    if backup_of(register).exists():
        assert without_counts(backup_of(register).read_bytes()) == without_counts(bad)
    assert server.get("/health")[0] == 200
    assert server.stop() == 0
    assert register.read_bytes() == twin_of(register).read_bytes()


def without_counts(data):
    """Return a register without hits and times: these may have gone on in place."""
    return re.sub(rb",\d{10},(?: {20}|[-0-9T:]{19}Z)", b",", data)


def is_sound(register):
    """Tell whether all tags' rows are whole; other lines are the user's own."""
    data = register.read_bytes()
    return data.endswith(b"\n") and b"\0" not in data and all(
        len(row["hits"]) == 10 for tag, row in register_rows(register).items()
        if is_id(tag))


@pytest.mark.parametrize("name", DAMAGES)
def test_without_a_twin_a_damage_harms_its_own_row_at_most(
        serve, tracker, register, ten_tags, name):
    damage, lost = DAMAGES[name]
    bad = damage(register.read_bytes())
    register.write_bytes(bad)
    twin_of(register).unlink()
    events_of(register).unlink()
    tags = list(ten_tags)
    if lost is None:
        ten_tags = {tag: 3 * (tag == tags[3]) for tag in tags}
    shown = tracker("dump", register, "--format", "csv", "--full")
    assert shown.returncode == 0, shown.stderr
    server = serve("--register", register)
    others = {tag: hits for tag, hits in ten_tags.items() if tag != tags[3]}
    if lost:
        for tag in tags[-lost:]:
            others.pop(tag, None)
        assert len(register_rows(register)) <= 10 - lost
    assert harmed(register, others) == []
    for tag in others:
        assert tag in shown.stdout
    if not lost:
        assert tags[3] in shown.stdout
        mine = hits_of(register)[tags[3]]
        assert mine == (0 if name in UNREADABLE_HITS else 3)
        server.hit(tags[3])
        assert hits_of(register)[tags[3]] == mine + 1
    assert is_sound(register)
    assert "Traceback" not in server.log()
    assert server.stop() == 0
    assert register.read_bytes() == twin_of(register).read_bytes()


@pytest.mark.parametrize("name", [*sorted(UNREADABLE_HITS),
                                  "an id twice, with more hits"])
def test_without_a_twin_the_event_log_mends_what_a_damage_made_of_the_counts(
        serve, register, ten_tags, name):
    register.write_bytes(DAMAGES[name][0](register.read_bytes()))
    twin_of(register).unlink()
    server = serve("--register", register)
    eventually(lambda: not harmed(register, ten_tags), 5)
    assert "mended from the event log" in server.log()
    tag = list(ten_tags)[3]
    server.hit(tag)
    assert harmed(register, {**ten_tags, tag: 4}) == []
    assert is_sound(register)
    assert server.stop() == 0
    assert register.read_bytes() == twin_of(register).read_bytes()


def test_an_odd_register_is_kept_as_bak_with_its_mode(serve, register, ten_tags):
    bad = DAMAGES["unclosed quote"][0](register.read_bytes())
    save_by_rename(register, bad)
    register.chmod(0o640)
    serve("--register", register)
    assert backup_of(register).read_bytes() == bad
    assert stat.S_IMODE(register.stat().st_mode) == 0o640
    assert stat.S_IMODE(twin_of(register).stat().st_mode) == 0o640


def test_an_unclosed_quote_in_a_large_register_does_not_hold_up_the_pixels(
        serve, newtags, register):
    tags = newtags(register, 20000)
    server = serve("--register", register, "--quiet")
    bad = re.sub(rb"\n(\w+,[^\n]*,)\n", rb'\n\1"Jo\n', register.read_bytes(),
                 count=1)
    assert b'"Jo' in bad
    save_by_rename(register, bad)
    start = time.monotonic()
    server.hit(tags[5])
    eventually(lambda: canonical_rows(register), 5)
    assert time.monotonic() - start < 5
    assert hits_of(register) == {tag: int(tag == tags[5]) for tag in tags}


@pytest.mark.parametrize("data", [
    b" \n\n", b"first,second\n1,2\n", b"%PDF-1.7\n\0\xff",
    b"Identifier,hits\nbcdfghjkmnpqrstvwxz22,3\n"],
                         ids=["blank", "another table", "PDF", "header renamed"])
@pytest.mark.parametrize("command", [
    ["server", "--port", "0", "--host", "127.0.0.1"], ["newtag", "--server", "x.org"],
    ["dump"]], ids=lambda command: command[0])
def test_what_is_no_register_is_named_and_stays_as_it_is(
        tracker, register, command, data):
    register.write_bytes(data)
    done = tracker(*command, "--register", register, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"mailtracker: error: {register} has no header row")
    assert done.stderr.count("\n") == 1
    assert register.read_bytes() == data


def test_while_the_header_is_broken_hits_are_counted_and_come_back_with_it(
        serve, register, ten_tags):
    server = serve("--register", register)
    data, tag = register.read_bytes(), list(ten_tags)[2]
    bad = data.replace(b"id,hits", b"ident,clicked")
    save_by_rename(register, bad)
    server.hit(tag, 4)
    eventually(lambda: server.get("/health")[0] == 503, 5)
    assert register.read_bytes() == bad
    save_by_rename(register, data)
    eventually(lambda: server.get("/health")[0] == 200, 5)
    ten_tags[tag] += 4
    assert counted(register, ten_tags)


def make_directory(path):
    """Put a directory in a file's place."""
    path.mkdir()


def make_fifo(path):
    """Put a FIFO in a file's place."""
    os.mkfifo(path)


NO_FILES = [make_directory, make_fifo]


@pytest.mark.parametrize("make", NO_FILES, ids=["directory", "FIFO"])
@pytest.mark.parametrize("command", [
    ["server", "--port", "0", "--host", "127.0.0.1"], ["newtag"], ["dump"]],
    ids=lambda command: command[0])
def test_what_is_no_file_is_refused_in_one_line(tracker, register, make, command):
    make(register)
    done = tracker(*command, "--register", register, timeout=20)
    assert done.returncode == 1
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if "note:" not in line]
    assert len(errors) == 1
    assert errors[0].startswith("mailtracker: error: ") and str(register) in errors[0]
    assert not stat.S_ISREG(register.lstat().st_mode)


@pytest.mark.parametrize("make", NO_FILES, ids=["directory", "FIFO"])
@pytest.mark.parametrize("what", ["register", "twin"])
def test_a_directory_or_fifo_in_its_place_stops_no_pixel_and_no_counting(
        serve, register, ten_tags, make, what):
    server = serve("--register", register)
    tag, other = list(ten_tags)[:2]
    path = register if what == "register" else twin_of(register)
    path.unlink()
    make(path)
    server.hit(tag, 5)
    if what == "register":
        eventually(lambda: server.get("/health")[0] == 503, 5)
    server.hit(other, 5)
    path.rmdir() if path.is_dir() else path.unlink()
    eventually(path.exists, 8)
    eventually(lambda: server.get("/health")[0] == 200, 8)
    server.hit(tag, 2)
    ten_tags[tag] += 7
    ten_tags[other] += 5
    eventually(lambda: counted(register, ten_tags), 3)
    assert "Traceback" not in server.log()
    assert register.read_bytes() == twin_of(register).read_bytes()


def test_a_symlink_stays_one_and_its_file_is_counted(
        serve, newtags, tmp_path, register):
    real = tmp_path / "elsewhere" / "real.csv"
    real.parent.mkdir()
    register.symlink_to(real)
    tag, other = newtags(register, 2)
    server = serve("--register", register)
    server.hit(tag, 2)
    save_by_rename(real, b"id;name;hits\r\n%s;J\xc3\xb6;1\r\n" % tag.encode())
    server.hit(tag)
    eventually(lambda: counted(real, {tag: 3, other: 0}), 3)
    assert register_rows(real)[tag]["name"] == "Jö"
    assert register.is_symlink()
    assert twin_of(real).exists() and not twin_of(register).exists()


# ---------------------------------------------------------------------------
# A disk that refuses
# ---------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of 256 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(
            command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can mount a small tmpfs, and not everywhere")
    yield folder
    # Lazily: the servers are stopped after this.
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(folder):
    """Write a file until the disk is full; return it."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))
    return filler


def whole_lines(register):
    """Return how many whole lines the event log of a full disk holds."""
    return events_of(register).read_bytes().count(b",hit,")


def test_a_full_disk_stops_no_hit_and_a_newtag_leaves_all_as_it_was(
        serve, newtags, tracker, small_disk):
    register = small_disk / "register.csv"
    tags = newtags(register, 100)
    server = serve("--register", register, "--quiet")
    filler = fill_up(small_disk)
    before = register.read_bytes()
    done = tracker("newtag", "--register", register, "--count", 500,
                   "--server", "x.org")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr
    assert register.read_bytes() == before == twin_of(register).read_bytes()
    for tag in tags:
        server.hit(tag, 2)
    assert counted(register, dict.fromkeys(tags, 2))
    status, _, why = server.get("/health")
    assert status == 503 and b"event log: No space left" in why
    assert whole_lines(register) < 200
    filler.unlink()
    eventually(lambda: server.get("/health")[0] == 200, 5)
    assert logged_hits(register) == dict.fromkeys(tags, 2)
    more = newtags(register, 10)
    server.hit(more[0])
    assert counted(register, {**dict.fromkeys(tags, 2), **dict.fromkeys(more, 0),
                              more[0]: 1})
    assert logged_hits(register) == {**dict.fromkeys(tags, 2), more[0]: 1}


def test_a_save_that_a_full_disk_keeps_from_being_merged_loses_nothing(
        serve, newtags, small_disk):
    register = small_disk / "register.csv"
    tags = newtags(register, 200)
    first, rows = lines_of(register.read_bytes())
    server = serve("--register", register)
    for tag in tags[:20]:
        server.hit(tag, 2)
    filler = fill_up(small_disk)
    with open(register, "r+b") as file:
        file.write((first + b"".join(rows[:150])).replace(b",", b";"))
        file.truncate()
        os.fsync(file.fileno())
    with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    for tag in tags[:20]:
        server.hit(tag)
    eventually(lambda: b"No space left" in server.get("/health")[2], 5)
    assert server.get("/health")[0] == 503
    for tag in tags[10:20] + tags[190:]:
        server.hit(tag)
    filler.unlink()
    eventually(lambda: server.get("/health")[0] == 200, 5)
    expected = {**dict.fromkeys(tags, 0), **dict.fromkeys(tags[:10], 3),
                **dict.fromkeys(tags[10:20], 4), **dict.fromkeys(tags[190:], 1)}
    assert counted(register, expected)
    assert logged_hits(register) == +Counter(expected)
    assert register.read_bytes() == twin_of(register).read_bytes()


@LINUX
def test_hits_wait_in_memory_while_writes_fail_and_are_counted_afterwards(
        serve, newtags, register):
    import resource

    tags = newtags(register, 20)
    server = serve("--register", register)
    server.hit(tags[0])
    before = register.read_bytes()
    _, most = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, most))
    for tag in tags:
        server.hit(tag, 3)
    status, _, body = server.get("/health")
    assert status == 503 and body.strip()
    assert register.read_bytes() == before == twin_of(register).read_bytes()
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, most))
    eventually(lambda: server.get("/health")[0] == 200, 5)
    assert counted(register, {**dict.fromkeys(tags, 3), tags[0]: 4})
    server.hit(tags[0])
    assert counted(register, {**dict.fromkeys(tags, 3), tags[0]: 5})
    assert logged_hits(register) == {**dict.fromkeys(tags, 3), tags[0]: 5}
    assert register.read_bytes() == twin_of(register).read_bytes()


@LINUX
def test_writes_that_fail_under_load_keep_the_sums_of_two_servers_exact(
        serve, newtags, register):
    import resource

    tags = newtags(register, 30)
    options = ("--register", register, "--reuse-port", "--quiet")
    one = serve(*options)
    two = serve(*options, port=one.port)
    _, most = resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE)
    with Load(one.port, tags) as load:
        for server in (one, two, one):
            for limit in (0, register.stat().st_size // 2,
                          events_of(register).stat().st_size + 50, most):
                resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE,
                                 (limit, most))
                load.wait_for(300)
    assert load.sent() == load.answered()
    expected = {tag: load.answered()[tag] for tag in tags}
    eventually(lambda: counted(register, expected), 5)
    eventually(lambda: logged_hits(register) == +Counter(expected), 5)
    eventually(lambda: register.read_bytes() == twin_of(register).read_bytes(), 3)


@LINUX
@pytest.mark.parametrize("room", [10, 100, 1000])
def test_a_newtag_whose_write_is_cut_off_takes_it_back(
        newtags, tracker, serve, register, room):
    tags = newtags(register, 5)
    before = register.read_bytes()
    limit = (f"import os, resource, sys; size = {len(before) + room}; "
             "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); "
             "os.execv(sys.argv[1], sys.argv[1:])")
    done = tracker("newtag", "--register", register, "--count", 50,
                   "--server", "x.org", prefix=[sys.executable, "-c", limit])
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("mailtracker: error: ")
    assert register.read_bytes() == before == twin_of(register).read_bytes()
    server = serve("--register", register)
    server.hit(tags[0])
    assert counted(register, {**dict.fromkeys(tags, 0), tags[0]: 1})


def test_in_a_read_only_folder_counting_goes_on_and_a_save_is_merged_later(
        serve, newtags, tmp_path, without_override):
    folder = tmp_path / "folder"
    folder.mkdir()
    register = folder / "register.csv"
    tags = newtags(register, 10)
    server = serve("--register", register, prefix=without_override)
    folder.chmod(0o500)
    try:
        server.hit(tags[0], 3)
        assert hits_of(register)[tags[0]] == 3
        assert server.get("/health")[0] == 200
        data = register.read_bytes().replace(b",", b";").replace(b"0000000003", b"2")
        save_in_place(register, data)
        server.hit(tags[0])
        eventually(lambda: b"ermission denied" in server.get("/health")[2], 5)
        server.hit(tags[1])
        assert register.read_bytes() == data
    finally:
        folder.chmod(0o700)
    eventually(lambda: server.get("/health")[0] == 200, 5)
    assert counted(register, {**dict.fromkeys(tags, 0), tags[0]: 4, tags[1]: 1})
    assert logged_hits(register) == {tags[0]: 4, tags[1]: 1}
    assert register.read_bytes().startswith(b"id;hits;")


@pytest.mark.parametrize("command", [["server", "--port", "0", "--host", "127.0.0.1"],
                                     ["newtag", "--server", "x.org"]],
                         ids=lambda command: command[0])
@pytest.mark.parametrize("what", ["folder", "register", "twin"])
def test_what_nobody_may_write_is_one_clear_line(
        tracker, newtags, tmp_path, without_override, command, what):
    folder = tmp_path / "folder"
    folder.mkdir()
    register = folder / "register.csv"
    if what == "folder":
        folder.chmod(0o500)
    else:
        newtags(register, 1)
        (register if what == "register" else twin_of(register)).chmod(0o400)
    done = tracker(*command, "--register", register, prefix=without_override,
                   timeout=20)
    folder.chmod(0o700)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("mailtracker: error: ")
    assert done.stderr.count("\n") == 1
    assert "ermission denied" in done.stderr and str(register) in done.stderr


def test_dump_reads_a_register_that_nobody_may_write(
        tracker, newtags, tmp_path, without_override):
    folder = tmp_path / "folder"
    folder.mkdir()
    tag, = newtags(folder / "register.csv", 1)
    (folder / "register.csv").chmod(0o400)
    folder.chmod(0o500)
    done = tracker("dump", folder / "register.csv", "--full", prefix=without_override)
    folder.chmod(0o700)
    assert done.returncode == 0 and tag in done.stdout


# ---------------------------------------------------------------------------
# The clock
# ---------------------------------------------------------------------------


def test_a_clock_set_back_does_not_take_last_hit_back(newtags, register):
    tag, = newtags(register)
    book = Register(str(register))
    book.open()
    for now in (b"2026-11-20T10:00:00Z", b"2026-11-20T09:59:59Z",
                b"1999-12-31T23:59:59Z"):
        with book:
            book.hit(tag.encode(), now)
    row = register_rows(register)[tag]
    assert (row["hits"], row["last_hit"]) == ("0000000003", "2026-11-20T10:00:00Z")
    with book:
        book.hit(tag.encode(), b"2026-11-20T10:00:01Z")
    assert register_rows(register)[tag]["last_hit"] == "2026-11-20T10:00:01Z"


def test_a_stale_save_does_not_take_last_hit_back(newtags, register):
    tag, other = newtags(register, 2)
    book = Register(str(register))
    book.open()
    with book:
        book.hit(tag.encode(), b"2026-11-20T10:00:00Z")
    save_by_rename(register, (f"id,last_hit,hits\n{tag},2026-11-01 08:00:00,1\n"
                              f"{other},2026-11-21T08:00:00Z,5\n").encode())
    with book:
        book.hit(tag.encode(), b"2026-11-20T09:00:00Z")
    rows = canonical_rows(register)
    assert rows[tag]["last_hit"] == "2026-11-20T10:00:00Z"
    assert rows[other]["last_hit"] == "2026-11-21T08:00:00Z"
    assert counted(register, {tag: 2, other: 5})


# ---------------------------------------------------------------------------
# Lines that nobody reads, and the daemon
# ---------------------------------------------------------------------------


def test_stderr_that_nobody_reads_never_blocks_the_pixels(serve, newtags, register):
    tag, = newtags(register)
    server = serve("--register", register, stderr=subprocess.PIPE, wait=False)
    line = server.process.stderr.readline().decode()
    server.port = int(re.search(r"127\.0\.0\.1:(\d+)", line)[1])
    server.hit(tag, 3000)  # of 60 bytes each: a pipe holds 65536
    assert hits_of(register)[tag] == 3000
    assert server.stop() == 0


def test_stderr_that_was_closed_never_stops_the_pixels(serve, newtags, register):
    tag, = newtags(register)
    server = serve("--register", register, stderr=subprocess.PIPE, wait=False)
    line = server.process.stderr.readline().decode()
    server.port = int(re.search(r"127\.0\.0\.1:(\d+)", line)[1])
    server.process.stderr.close()
    server.hit(tag, 20)
    assert hits_of(register)[tag] == 20
    assert server.stop() == 0


class Daemon:
    """A daemon, known by its pidfile, that looks like a Server."""

    def __init__(self, folder):
        self.pidfile, self.logfile = folder / "tracker.pid", folder / "tracker.log"
        self.pid = self.port = 0

    def look(self):
        """Read pid and port from its files."""
        self.pid = int(self.pidfile.read_text())
        self.port = int(re.search(r"http://127\.0\.0\.1:(\d+)",
                                  self.logfile.read_text())[1])

    def is_gone(self):
        """Tell whether the process has ended: it is no child of ours."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
        return False


@pytest.fixture
def daemon(tmp_path):
    """Return a Daemon to be started; end it in any case."""
    process = Daemon(tmp_path)
    yield process
    if process.pid and not process.is_gone():
        os.kill(process.pid, signal.SIGKILL)


def start_daemon(tracker, daemon, register, *options):
    """Start a daemon with relative paths; return how the command ended."""
    done = tracker("server", "--daemon", "--host", "127.0.0.1", "--port", "0",
                   "--register", register.name, "--pidfile", daemon.pidfile.name,
                   "--logfile", daemon.logfile.name, *options, timeout=20)
    if done.returncode == 0:
        daemon.look()
    return done


def test_a_daemon_detaches_logs_reopens_its_log_and_ends_with_0(
        tracker, newtags, serve, register, daemon):
    tag, = newtags(register)
    done = start_daemon(tracker, daemon, register)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.getsid(daemon.pid) not in (os.getsid(0), daemon.pid)
    assert daemon.pid != os.getpid() and not daemon.is_gone()
    assert fetch(daemon.port, tag, Counter())
    assert f"hit {tag} 1 127.0.0.0 self composing" in daemon.logfile.read_text()
    moved = daemon.logfile.rename(daemon.logfile.with_suffix(".1"))
    os.kill(daemon.pid, signal.SIGHUP)
    eventually(daemon.logfile.exists, 5)
    assert fetch(daemon.port, tag, Counter())
    assert f"hit {tag} 2 127.0.0.0 self composing" in daemon.logfile.read_text()
    assert f"hit {tag} 2" not in moved.read_text()
    assert hits_of(register)[tag] == 2
    os.kill(daemon.pid, signal.SIGTERM)
    eventually(daemon.is_gone, 8)
    assert not daemon.pidfile.exists()


def test_a_daemon_that_cannot_start_says_so_before_it_detaches(
        tracker, serve, newtags, register, daemon):
    newtags(register)
    other = serve("--register", register)
    busy = start_daemon(tracker, daemon, register, "--port", other.port)
    assert busy.returncode == 1
    assert f"port {other.port} is in use" in busy.stderr
    daemon.pidfile.mkdir()
    no_pidfile = start_daemon(tracker, daemon, register)
    assert no_pidfile.returncode == 1
    assert no_pidfile.stderr.count("\n") == 1
    assert no_pidfile.stderr.startswith("mailtracker: error: ")
    assert str(daemon.pidfile) in no_pidfile.stderr
