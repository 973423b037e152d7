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
from conftest import SCRIPT, Server, clean_environment  # noqa: E402
from conftest import eventually, save, shown  # noqa: E402
from mailtracker import Event, Files  # noqa: E402

NOON = "2026-11-20T12:00:00Z"
HEAD = "id,hits,last_hit,opens,last_open,created,name,note\n"
HOSTILE = ["", "plain", 'q"u"o', "a,b;c\td|e", "two\nlines", "cr\rlf\r\n", "ü \u2028 €",
           "'=x", "=1+1", " blanks ", "0012", "x" * 9000]


def new_ids(number, dice):
    return ["".join(dice.choices("bcdfghjkmnpqrstvwxz", k=21)) for _ in range(number)]


def new_files(folder):
    """Return the files of a register in a folder of its own."""
    os.mkdir(f"{folder}/mails")
    return Files(f"{folder}/mails/register.csv")


def start(command, files, *options):
    """Start a command; return it as the Server that it may be."""
    path = Path(files.register).parent.parent / f"{time.monotonic_ns()}.log"
    with open(path, "wb") as log:
        return Server(subprocess.Popen(
            [sys.executable, str(SCRIPT), command, "--register", files.register,
             *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=clean_environment()), path)


def start_server(files):
    server = start("server", files, "--host", "127.0.0.1", "--port", "0", "--quiet")
    eventually(server.find_port, 20)
    return server


def start_newtag(files, number):
    return start("newtag", files, "--count", str(number), "--name", "new", "--server",
                 "127.0.0.1", "--format", "url")


def printed(newtag):
    return re.findall(r"/(\w+)\.gif\n", newtag.log())


class Load(threading.Thread):
    """Hits on some tags, counted when their pixels have come."""

    def __init__(self, tags, server, dice):
        super().__init__(daemon=True)
        self.tags, self.server = tags, server
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


# -- people who save ------------------------------------------------------------

def by_rename(path, data, dice):
    Path(path + "~").write_bytes(data)
    os.replace(path + "~", path)


def in_place(path, data, dice):
    Path(path).write_bytes(data)


def in_pieces(path, data, dice):
    with open(path, dice.choice(["wb", "r+b"]), 0) as file:
        for part in range(6):
            file.write(data[len(data) * part // 6:len(data) * (part + 1) // 6])
            time.sleep(0.6)
        file.truncate()


def delete_then_write(path, data, dice):
    os.unlink(path)
    time.sleep(dice.uniform(0, 0.8))
    with open(path, "xb") as file:
        file.write(data)


def twice(path, data, dice):
    dice.choice([by_rename, in_place])(path, data.replace(b"plain", b"first"), dice)
    time.sleep(dice.uniform(0, 0.5))
    dice.choice([by_rename, in_place, delete_then_write])(path, data, dice)


def stale(path, data, dice):
    time.sleep(dice.uniform(2, 5))
    by_rename(path, data, dice)


def opened_before_and_written_after(path, data, dice):
    with open(path, "r+b", 0) as file:
        time.sleep(dice.uniform(2, 5))
        file.truncate(0)
        for part in data[:len(data) // 2], data[len(data) // 2:]:
            file.write(part)
            time.sleep(dice.uniform(0, 1))


SAVES = {save.__name__: save for save in (
    by_rename, in_place, in_pieces, delete_then_write, twice, stale,
    opened_before_and_written_after)}


def opened(path):
    """Open a file, unless it is missing for a moment."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None


class Person:
    """Somebody with the register in a spreadsheet; knows what they typed."""

    def __init__(self, path, dice):
        self.path, self.dice, self.typed = path, dice, {}
        self.read()

    def read(self):
        with eventually(lambda: opened(self.path)) as file:
            text = file.read().decode("utf-8-sig")
        self.delimiter = max(",;\t|", key=text.partition("\n")[0].count)
        self.rows = list(csv.DictReader(io.StringIO(text, newline=""),
                                        delimiter=self.delimiter, strict=True))
        self.titles = list(self.rows[0])

    def edit(self):
        dice = self.dice
        for row in dice.sample(self.rows, 3):
            row[dice.choice(["name", "note"])] = dice.choice(HOSTILE)
        if dice.random() < 0.3:
            dice.shuffle(self.titles)
            dice.shuffle(self.rows)
        if dice.random() < 0.3:
            self.rows.remove(dice.choice([row for row in self.rows if row.get("hits")]))
        if dice.random() < 0.3:
            self.delimiter = dice.choice(",;\t|")
        if dice.random() < 0.3:
            self.titles.insert(dice.randrange(len(self.titles)),
                               f"col {len(self.titles)}")
        if dice.random() < 0.3:
            self.rows.append({"id": new_ids(1, dice)[0], "name": "by hand"})

    def save(self, how):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, self.titles, "", delimiter=self.delimiter,
                                lineterminator=self.dice.choice(["\n", "\r\n"]))
        writer.writeheader()
        writer.writerows(self.rows)
        how(self.path, self.dice.choice(["", "\ufeff"]).encode()
            + out.getvalue().encode(), self.dice)
        self.typed = {tag: {"id": tag} for tag in self.typed}  # a deleted row returns
        self.typed.update((row["id"], {
            title: row.get(title, "") for title in self.titles
            if title not in mailtracker.OWN_COLUMNS[1:-1]}) for row in self.rows)


def wrong(person, answered):
    """Return what is not as it must be in the end; "" when all is well."""
    try:
        now = Person(person.path, person.dice)
    except (csv.Error, IndexError, UnicodeError) as error:
        return f"broken: {error!r}"
    rows = {row["id"]: row for row in now.rows}
    lines = [f"{tag}: {rows.get(tag)}, typed {typed}, answered {answered[tag]}"
             for tag, typed in person.typed.items()
             if not (rows.get(tag) or {}).items() >= {
                 **typed, "hits": str(answered[tag])}.items()]
    lines += ["a row twice"] * (len(rows) < len(now.rows))
    lines += [f"titles: {now.titles}"] * (
        now.titles[:len(person.titles)] != person.titles)
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
    with tempfile.TemporaryDirectory() as folder:
        files, tags = new_files(folder), new_ids(12, dice)
        Path(files.register).write_text(HEAD)
        mailtracker.add_tags(files, [(tag, f"n {tag}") for tag in tags], NOON)
        server = start_server(files)
        load, person = Load(tags, server, dice), Person(files.register, dice)
        try:
            for way in [how, *dice.sample([*SAVES], dice.randrange(2))]:
                time.sleep(dice.uniform(0, 1.5))
                if dice.random() < 0.5:
                    person.read()
                person.edit()
                newtag = start_newtag(files, 1)
                person.save(SAVES[way])
                assert newtag.process.wait(30) == 0, newtag.log()
                for tag in printed(newtag):
                    person.typed.setdefault(tag, {"id": tag, "name": "new"})
            time.sleep(dice.uniform(0, 0.5))
            load.end()
            for tag in person.typed.keys() - {*tags}:  # new, or typed by hand
                eventually(lambda: f",made,{tag}" in Path(files.log).read_text())
                server.hit(tag)
                load.answered[tag] += 1
            eventually(lambda: not wrong(person, load.answered), 15, 0.2)
        except AssertionError as error:
            raise AssertionError(f"{how} {seed}: {wrong(person, load.answered)}\n"
                                 f"{error} {server.log()}") from None
        finally:
            load.end()
            server.stop()
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
    """A register with four tags, settled but for the last hit, and a settle to come."""

    def __init__(self, folder, arrange):
        os.mkdir(folder)
        self.files = new_files(folder)
        self.tags = new_ids(4, random.Random(1))
        self.hits, self.gone, self.note, self.waits = [0] * 4, "", "", ""
        mailtracker.add_tags(self.files, [(tag, "=n") for tag in self.tags], NOON)
        self.work = self.settle
        for place in 0, 1, 2, 1, 2:
            self.hit(place)
        self.settle()
        self.hit(2)
        arrange(self)

    def save(self):
        save(self.files.register, self.edited())
        self.note = "typed"

    def hit(self, place):
        hits = self.hits[place] = self.hits[place] + 1
        mailtracker.append_events(self.files, [Event(
            NOON, "hit", self.tags[place], hits, hits, "human", "browser", "", "x")])

    def settle(self):
        assert mailtracker.settle(self.files)

    def edited(self):
        return Path(self.files.register).read_text().replace(
            ",'=n", ",'=n,typed").replace(",name", ",name,note")

    def check(self):
        """Look whether a dump says all that is known."""
        rows = shown(self.files)
        note = "typed" if self.waits and not os.path.exists(self.waits) else self.note
        for tag, hits in zip(self.tags, self.hits):
            row = rows.get(tag, {})
            said = [row.get(each, "") for each in ("hits", "name", "note")]
            assert said == ([""] * 3 if tag == self.gone else [str(hits), "=n", note])

    def check_settled(self):
        """Look whether another settle makes all good, and a third one nothing."""
        self.settle()
        self.check()
        before = Path(self.files.register).read_bytes()
        self.settle()
        assert Path(self.files.register).read_bytes() == before
        assert not debris(self.files)


def lose_a_row(scene):
    scene.save()
    for place in 1, 1:
        scene.settle()
        scene.hit(place)
    text = Path(scene.files.register).read_text()
    save(scene.files.register, re.sub(f"{scene.tags[1]}.*\n", "", text))


def lose_the_marks(scene):
    os.unlink(scene.files.lock)
    os.utime(scene.files.bak, (1, 1))
    os.utime(scene.files.register, (2, 2))


def come_from_2018(scene):
    for path in scene.files.bak, scene.files.lock:
        os.unlink(path)
    save(scene.files.register, "".join(
        f"{tag},=n,{hits},\n" for tag, hits in zip(scene.tags, scene.hits)))


def make(scene):
    new = [(tag, "new") for tag in new_ids(2, random.Random(2))]
    scene.work = lambda: mailtracker.add_tags(scene.files, new, NOON)


def forget(scene):
    scene.gone = scene.tags[0]
    scene.work = lambda: mailtracker.forget_tags(scene.files, {scene.gone})


def rotate(scene):
    scene.work = lambda: (scene.settle(), mailtracker.rotate_log(scene.files.log))


def saved_before(event, name):
    """Return a scene in which somebody saves just before a call for some file."""
    def arrange(scene):
        scene.waits = os.path.dirname(scene.files.register) + "-edited.csv"
        save(scene.waits, scene.edited())

        def hook(found, arguments):
            if os.path.exists(scene.waits) and found == event \
                    and arguments[0] == getattr(scene.files, name):
                os.spawnlp(os.P_WAIT, "mv", "mv", scene.waits, scene.files.register)

        scene.work = lambda: (sys.addaudithook(hook), scene.settle())
    return arrange


SCENES = {
    "settle hits": lambda scene: None, "settle a save": lambda scene: scene.save(),
    "settle without a register": lambda scene: os.unlink(scene.files.register),
    "settle a lost row": lose_a_row, "settle without marks": lose_the_marks,
    "settle one of 2018": come_from_2018, "newtag": make, "forget": forget,
    "rotate": rotate, "saved within the exchange": saved_before("os.link", "new"),
    "saved before the exchange": saved_before("os.rename", "register"),
    "saved before all": saved_before("os.link", "old")}


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
    scene = Scene(f"{folder}/{fatal}", SCENES[name])

    def work():
        calls = count_calls(fatal)
        scene.work()
        return len(calls)
    end = os.waitpid(in_child(work), 0)[1]
    if not fatal:
        return os.WEXITSTATUS(end)
    assert end == signal.SIGKILL
    if scene.gone:
        mailtracker.forget_tags(scene.files, {scene.gone})
    scene.check()
    scene.check_settled()
    return 0


def kill_everywhere(name, _=0):
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

def children_of(pid):
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], check=True,
                            stdout=subprocess.PIPE).stdout.split()
    return [int(child) for child, parent in zip(listed[::2], listed[1::2])
            if int(parent) == pid]


def kill_one(server, files, dice):
    """Kill a server, its worker or a newtag; return the tags that this has printed."""
    victim = dice.choice(["server", "worker", "newtag"])
    if victim == "newtag":
        newtag = start_newtag(files, 50)
        time.sleep(dice.uniform(0.05, 0.2))
        newtag.kill()
        return printed(newtag)
    if victim == "server":
        server.kill()
    for child in children_of(server.process.pid) if victim == "worker" else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return []


def kill_at_random(kills, seed):
    """Kill again and again, then look; return how many hits were answered."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        files, tags = new_files(folder), new_ids(30, dice)
        mailtracker.add_tags(files, [(tag, "n") for tag in tags], NOON)
        load, known = Load(tags, start_server(files), dice), {*tags}

        def look():
            hits = {tag: int(row["hits"]) for tag, row in shown(files).items()}
            assert known <= hits.keys()
            assert all(answered[tag] <= hits[tag] <= load.sent[tag] for tag in tags)

        for _ in range(kills):
            time.sleep(dice.uniform(0, 0.5))
            known.update(kill_one(load.server, files, dice))
            answered = load.answered.copy()
            look()
            if load.server.process.poll() is not None:
                load.server = start_server(files)
        load.end()
        load.server.stop()
        assert mailtracker.settle(files) and not debris(files)
        os.unlink(files.log)  # it is all in the register
        look()
    return sum(load.answered.values())


# -- the tests, and all of it many times ----------------------------------------

ROUNDS = [(play, how, seed) for seed in range(2) for how in SAVES]
KILLS = [(kill_everywhere, name, 0) for name in SCENES]
RANDOM = [(kill_at_random, 6, seed) for seed in range(2)]


def name_of(case):
    return f"{case[1]} {case[2]}".replace("_", " ")


@pytest.fixture(scope="module")
def results():
    """Play all cases at the same time, as most of them wait for something."""
    with ProcessPoolExecutor(10, get_context("spawn")) as pool:
        yield {case: pool.submit(*case) for case in ROUNDS + RANDOM + KILLS}


@pytest.mark.parametrize("case", ROUNDS, ids=name_of)
def test_a_save_loses_neither_hits_nor_what_was_typed(case, results):
    assert results[case].result() > 20


@pytest.mark.parametrize("case", KILLS, ids=name_of)
def test_a_kill_before_any_call_loses_nothing_and_leaves_no_debris(case, results):
    assert results[case].result() > 10


@pytest.mark.parametrize("case", RANDOM, ids=name_of)
def test_kills_at_random_lose_no_answered_hit(case, results):
    assert results[case].result() > 20


if __name__ == "__main__":
    number = int(sys.argv[1])
    cases = [(play, [*SAVES][n % len(SAVES)], 100 + n) for n in range(number)]
    cases += KILLS + [(kill_at_random, number // 4, seed) for seed in range(4)]
    with ProcessPoolExecutor(10, get_context("spawn")) as pool:
        for case, result in [(case, pool.submit(*case)) for case in cases]:
            print(name_of(case), result.exception() or result.result(), flush=True)
