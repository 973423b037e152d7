"""Saves and kills: people save while hits come in, processes die; nothing is lost.

python tests/test_saves.py 200 plays 200 rounds of saves, and kills 200 times.
"""
from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)] * (__name__ == "__main__")

import mailtracker  # noqa: E402
from conftest import eventually, launch, read_table  # noqa: E402
from conftest import save, servers, shown  # noqa: E402
from mailtracker import Event, Files  # noqa: E402

NOON = "2026-11-20T12:00:00Z"
HEAD = "id,hits,last_hit,opens,last_open,created,name,note\n"
HOSTILE = ["", "plain", 'q"u"o', "a,b;c\td|e", "two\nlines", "cr\rlf\r\n", "ü \u2028 €",
           "'=x", "=1+1", " blanks ", "0012", "x" * 9000]


def new_ids(number, dice):
    return ["".join(dice.choices("bcdfghjkmnpqrstvwxz", k=21)) for _ in range(number)]


def new_register(folder, number, dice):
    """Return the files of a register in a folder of its own, and its tags."""
    os.makedirs(f"{folder}/mails")
    files, tags = Files(f"{folder}/mails/register.csv"), new_ids(number, dice)
    Path(files.register).write_text(HEAD)
    mailtracker.add_tags(files, [(tag, "=n") for tag in tags], mailtracker.Making(NOON))
    return files, tags


def start_newtag(files, number):
    return launch(subprocess.Popen, "newtag", "--register", files.register, "--count",
                  number, "--name", "new", "--server", "127.0.0.1", "--format", "url",
                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def printed(newtag):
    """Return the tags that a newtag has printed before its end."""
    return re.findall(r"/(\w+)\.gif\n", newtag.communicate(timeout=30)[0])


class Load(threading.Thread):
    """Hits on some tags, counted when their pixels have come."""

    def __init__(self, tags, serve, dice):
        super().__init__(daemon=True)
        self.tags, self.serve, self.server = tags, serve, serve()
        self.sent, self.answered = Counter(), Counter()
        self._dice, self._end = random.Random(dice.random()), threading.Event()
        self.start()

    def run(self):
        while not self._end.wait(self._dice.uniform(0, 0.03)):
            tag = self._dice.choice(self.tags)
            self.sent[tag] += 1
            try:
                self.server.hit(tag)
            except (AssertionError, OSError, ValueError):
                continue  # killed
            self.answered[tag] += 1

    def end(self):
        self._end.set()
        self.join()


@contextlib.contextmanager
def under_load(number, dice):
    """Make a register with so many tags; return its files, and a load on its server."""
    with tempfile.TemporaryDirectory() as folder:
        files, tags = new_register(folder, number, dice)
        with servers(folder, Path(folder)) as start:
            load = Load(tags, lambda: start("--register", files.register, "--quiet"),
                        dice)
            try:
                yield files, load
            finally:
                load.end()


# -- people who save ------------------------------------------------------------

SAVES = {  # how the file is opened; seconds before, and after each of six pieces
    "by rename": ("", 0, 0), "in place": ("wb", 0, 0), "in pieces": ("wb", 0, 0.6),
    "in pieces over the old": ("r+b", 0, 0.6), "deleted first": ("xb", 0.8, 0),
    "opened before and written after": ("r+b", 5, 0.1)}


def write(path, data, how, dice):
    """Write a file in the way of some program."""
    mode, wait, pause = SAVES[how]
    if mode == "xb":
        os.unlink(path)
        time.sleep(dice.uniform(0, wait))
    with open(path if mode else path + "~", mode or "wb", 0) as file:
        if mode == "r+b":
            time.sleep(dice.uniform(wait / 2, wait))
        for part in range(6):
            file.write(data[len(data) * part // 6:len(data) * (part + 1) // 6])
            time.sleep(pause)
        file.truncate()
    if not mode:
        os.replace(path + "~", path)


class Person:
    """Somebody with the register in a spreadsheet; knows what they typed."""

    def __init__(self, path, dice):
        self.path, self.dice, self.typed = path, dice, {}
        self.read()

    def read(self):
        self.delimiter, self.rows = eventually(self.table)
        self.titles = list(self.rows[0])

    def table(self):
        with contextlib.suppress(FileNotFoundError):  # missing for a moment
            return read_table(self.path)

    def edit(self):
        dice, titles, rows = self.dice, self.titles, self.rows
        for row in dice.sample(rows, 3):
            row[dice.choice(["name", "note"])] = dice.choice(HOSTILE)
        for change in (
                lambda: (dice.shuffle(titles), dice.shuffle(rows)),
                lambda: rows.remove(dice.choice([r for r in rows if r.get("hits")])),
                lambda: titles.insert(dice.randrange(9), f"col {len(titles)}"),
                lambda: rows.append({"id": new_ids(1, dice)[0], "name": "by hand"})):
            if dice.random() < 0.3:
                change()

    def save(self, how):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(
            out, self.titles, "", lineterminator=self.dice.choice(["\n", "\r\n"]),
            delimiter=self.dice.choice([self.delimiter, *",;\t|"]))
        writer.writeheader()
        writer.writerows(self.rows)
        write(self.path, (self.dice.choice(["", "\ufeff"]) + out.getvalue()).encode(),
              how, self.dice)
        self.typed = {tag: {"id": tag} for tag in self.typed}  # a deleted row returns
        self.typed.update((row["id"], {
            title: row.get(title, "") for title in self.titles
            if title not in mailtracker.OWN_COLUMNS[1:-1]}) for row in self.rows)


def wrong(person, answered):
    """Return what is not as it must be in the end; "" when all is well."""
    now = Person(person.path, person.dice)
    rows = {row["id"]: row for row in now.rows}
    lines = [f"{tag}: {rows.get(tag)}, typed {typed}, answered {answered[tag]}"
             for tag, typed in person.typed.items()
             if not rows.get(tag, {}).items() >= {
                 **typed, "hits": str(answered[tag])}.items()]
    lines += ["a row twice"] * (len(rows) < len(now.rows))
    return "\n".join(lines + debris(Files(person.path)))


def debris(files):
    """Return what should not be in the folder of a register."""
    folder = os.path.dirname(files.register)
    return [f"{name}: left, or double" for name in os.listdir(folder)
            if not re.fullmatch(r"register\.csv(\.bak|\.lock|\.orig)?|"
                                r"register\.events\.csv(\.\d)?", name)
            or os.stat(f"{folder}/{name}").st_nlink > 1]


def play(how, seed):
    """Play one round: a person saves in one way, perhaps in a second one."""
    dice = random.Random(f"{how} {seed}")
    with under_load(12, dice) as (files, load):
        person = Person(files.register, dice)
        for way in [how, *dice.sample([*SAVES], dice.randrange(2))]:
            time.sleep(dice.uniform(0, 1.5))
            if dice.random() < 0.5:
                person.read()
            person.edit()
            time.sleep(dice.choice([0, 0, 3]))
            newtag = start_newtag(files, 1)
            person.save(way)
            for tag in printed(newtag):
                person.typed.setdefault(tag, {"id": tag, "name": "new"})
        time.sleep(dice.uniform(0, 0.5))
        load.end()
        for tag in person.typed.keys() - {*load.tags}:  # new, or typed by hand
            eventually(lambda: f",made,{tag}" in Path(files.log).read_text())
            load.server.hit(tag)
            load.answered[tag] += 1
        with contextlib.suppress(AssertionError):
            eventually(lambda: not wrong(person, load.answered), 15, 0.2)
        fault = wrong(person, load.answered)
        assert not fault, f"{how} {seed}: {fault}\n{load.server.log()}"
        assert load.server.stop() == newtag.returncode == 0
    return sum(load.answered.values())


# -- kill -9 before each system call --------------------------------------------

CALLS = ("open", "os.rename", "os.link", "os.remove", "os.chmod", "os.chown",
         "os.utime", "fcntl.flock", "shutil.copyfile")


def count_calls(fatal):
    """Count the system calls to come; kill this process before one of them."""
    calls = []

    def step():
        calls.append(1)
        if len(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(call):
        return lambda *args: (step(), call(*args))[1]

    sys.addaudithook(lambda event, _: step() if event in CALLS else None)
    for name in {"write", "pwrite", "fsync", "fdatasync", "ftruncate"} & {*dir(os)}:
        setattr(os, name, after_step(getattr(os, name)))
    return calls


class Scene:
    """A register with four tags, settled but for the last hit, and a save to come."""

    def __init__(self, folder):
        self.files, self.tags = new_register(folder, 4, random.Random(1))
        self.hits, self.edited = Counter(), f"{folder}/edited.csv"
        for place in 0, 1, 2, 1, 2:
            self.hit(self.tags[place])
        self.settle()
        self.hit(self.tags[2])
        text = Path(self.files.register).read_text()
        save(self.edited, text.replace(",'=n,", ",'=n,typed"))

    def hit(self, tag):
        self.hits[tag] += 1
        mailtracker.append_events(self.files, [Event(
            NOON, "hit", tag, self.hits[tag], self.hits[tag], "human", "browser")])

    def save(self):
        if os.path.exists(self.edited):
            os.replace(self.edited, self.files.register)

    def settle(self):
        assert mailtracker.settle(self.files)

    def forget(self):
        mailtracker.forget_tags(self.files, {self.tags[0]})

    def saved_before(self, event, name):
        """Settle, while somebody saves just before a call for some file."""
        sys.addaudithook(lambda found, arguments: self.save() if (
            found, arguments[:1]) == (event, (getattr(self.files, name),)) else None)
        self.settle()
        assert not os.path.exists(self.edited)

    def check(self, tags):
        """Look whether a dump says what is known, before a settle and after it."""
        note = "" if os.path.exists(self.edited) else "typed"
        for settled in range(3):
            assert {tag: (row["hits"], row["note"])
                    for tag, row in shown(self.files).items() if row["name"] == "=n"
                    } == {tag: (str(self.hits[tag]), note) for tag in tags}
            before = settled and Path(self.files.register).read_bytes()
            self.settle()
        assert Path(self.files.register).read_bytes() == before
        assert not debris(self.files)


SCENES = {
    "a save": lambda scene: (scene.save(), scene.settle()),
    "no register": lambda scene: (os.unlink(scene.files.register), scene.settle()),
    "newtag": lambda scene: mailtracker.add_tags(
        scene.files, [(tag, "new") for tag in new_ids(2, random.Random(2))],
        mailtracker.Making(NOON)),
    "forget": Scene.forget,
    "rotate": lambda scene: (scene.settle(), mailtracker.rotate_log(scene.files.log)),
    "a save within the exchange": lambda scene: scene.saved_before("os.link", "new"),
    "a save before the exchange": lambda scene: scene.saved_before(
        "os.rename", "register")}


def in_child(work, *arguments):
    """Do some work in a forked process; return its number."""
    child = os.fork()
    if not child:
        try:
            os._exit(work(*arguments) or 0)
        except BaseException:
            os.write(2, traceback.format_exc(-3).encode())
            os._exit(255)
    return child


def play_kill(folder, name, fatal):
    """Kill a work before one of its calls, and look what is left."""
    scene, work = Scene(f"{folder}/{fatal}"), SCENES[name]

    def counted():
        calls = count_calls(fatal)
        work(scene)
        return len(calls)
    end = os.waitpid(in_child(counted), 0)[1]
    if not fatal:
        return os.WEXITSTATUS(end)
    assert end == signal.SIGKILL
    if name == "forget":
        scene.forget()
    scene.check(scene.tags[name == "forget":])
    return 0


def kill_everywhere(name, _):
    """Kill before each call of a scene; return how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        calls = play_kill(folder, name, 0)
        children = [in_child(play_kill, folder, name, fatal)
                    for fatal in range(1, calls + 1)]
        failed = [fatal for fatal, child in enumerate(children, 1)
                  if os.waitpid(child, 0)[1]]
        assert 10 < calls < 100 and not failed, f"of {calls} calls: {failed}"
    return calls


# -- kill -9 at random ------------------------------------------------------------

def kill_at_random(kills, seed):
    """Kill again and again, then look; return how many hits were answered."""
    dice = random.Random(seed)
    with under_load(30, dice) as (files, load):
        known = {*load.tags}

        def look():
            hits = {tag: int(row["hits"]) for tag, row in shown(files).items()}
            assert known <= hits.keys()
            assert all(answered[tag] <= hits[tag] <= load.sent[tag]
                       for tag in load.tags)

        for _ in range(kills):
            time.sleep(dice.uniform(0, 0.5))
            victim = dice.choice(["server", "worker", "newtag"])
            if victim == "server":
                load.server.kill()
            elif victim == "worker":
                subprocess.run(["pkill", "-9", "-P", str(load.server.process.pid)])
            else:
                newtag = start_newtag(files, 50)
                time.sleep(dice.uniform(0.05, 0.2))
                newtag.kill()
                known.update(printed(newtag))
            answered = load.answered.copy()
            look()
            if victim == "server":
                load.server = load.serve()
        load.end()
        load.server.stop()
        assert mailtracker.settle(files) and not debris(files)
        os.unlink(files.log)  # it is all in the register
        look()
    return sum(load.answered.values())


# -- the tests, and all of it many times ----------------------------------------

KILLS = [(kill_everywhere, name, "anywhere") for name in SCENES]


def test_an_older_save_into_a_replaced_version_gives_way_to_a_newer_one(tmp_path):
    files, tag = Files(f"{tmp_path}/register.csv"), "bcdfghjkmnpqrstvwxz22"
    mailtracker.add_tags(files, [(tag, "=n")], mailtracker.Making(NOON))
    worker = mailtracker.Settler(files)
    with open(files.register, "r+b", 0) as held:
        before = held.read()
        mailtracker.append_events(files, [Event(NOON, "hit", tag, 1, 1, "human", "x")])
        assert worker.settle()
        held.seek(0)
        held.truncate()
        held.write(before.replace(b"'=n", b"older"))
        os.utime(files.bak, (time.time() - 60,) * 2)
        save(files.register, before.replace(b"'=n", b"newer"), 30)
        assert mailtracker.settle(files)  # by another process
        assert worker.settle()
    assert shown(files)[tag]["name"] == "newer"


CASES = [*KILLS, *[(play, how, seed) for seed in range(2) for how in SAVES],
         *[(kill_at_random, 6, seed) for seed in range(2)]]


@pytest.fixture(scope="module")
def results():
    """Play what waits for something at the same time, and two of what does not."""
    with ProcessPoolExecutor(16, get_context("spawn")) as pool:
        yield {case: pool.submit(*case) for case in CASES[::-1]}


@pytest.mark.parametrize("case", CASES, ids="{0[0].__name__} {0[1]} {0[2]}".format)
def test_neither_saves_nor_kills_lose_hits_or_what_was_typed(case, results):
    assert results[case].result() > 10


if __name__ == "__main__":
    number = int(sys.argv[1])
    cases = [(play, [*SAVES][n % len(SAVES)], 100 + n) for n in range(number)]
    cases += KILLS + [(kill_at_random, number // 4, seed) for seed in range(4)]
    with ProcessPoolExecutor(10, get_context("spawn")) as pool:
        for case, result in [(case, pool.submit(*case)) for case in cases]:
            print(*case[1:], result.exception() or result.result(), flush=True)
