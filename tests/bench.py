#!/usr/bin/env python3
"""Measure mailtracker against nginx and bare `csv`, and print one table.

    python3 tests/bench.py                 everything, a million tags; some 15 minutes
    python3 tests/bench.py --quick         a tenth of that, under the same bars
    python3 tests/bench.py --only settle   one measurement; may be repeated

What is fast here may be slow there: every time is a ratio of two sides that take turns
in this run, and the median of the rounds' ratios is held against the bar. Only hits
beside a settle are judged by milliseconds. To read on, begin with `BARS`, the table.

Where wrk, nginx or /proc (macOS) is missing, a row says "not measured", which is not
the same as met. Everything listens on 127.0.0.1 and is written to a temporary folder
($TMPDIR), up to 2 GB. Exit status: 0 when every bar was measured and met, else 1.
"""
from __future__ import annotations

import argparse
import csv
import os
import random
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Callable, Iterator, Tuple

HOST = "127.0.0.1"
SCRIPT = Path(__file__).resolve().parent.parent / "mailtracker.py"
FEW = 1_000                 # tags in the small register
CONNECTIONS = 16            # of wrk, in one thread: two would take the server's core
RATE = 500                  # hits a second while a register is settled
AT_REST = 2                 # seconds at that rate before, for comparison
PATIENCE = 300              # seconds after which a program counts as hanging

# --- The table, and how what is measured becomes a row of it ----------------
# The first word of a key names the measurement. Rows without a bar: for information.
BARS: dict[str, tuple[Any, ...]] = {
    "speed": ("hits/s, a connection each, log on, to nginx's", ">=", 1.1, "x"),
    "cpu": ("CPU per hit, a tenth of {tags} tags, to 1,000", "<=", 1.25, "x"),
    "cpu worker": ("    of the settle worker, to the server's",),
    "cpu memory": ("    peak memory of the server after it", "<=", 200, "MB"),
    "million": ("first pixel, {tags} tags, to reading into a dict", "<=", 1.5, "x"),
    "million dump": ("    dump --format csv, to copying them", "<=", 1.6, "x"),
    "million made": ("    newtag --count {tags}, to copying them", "<=", 3, "x"),
    "million one": ("    one newtag beside them, to python3 -c pass", "<=", 3, "x"),
    "settle": ("p99 while {tags} rows are settled, new hits", "<=", 20, "ms"),
    "settle save": ("    after a person's save of them", "<=", 20, "ms"),
    "settle memory": ("    peak memory of the server after it", "<=", 200, "MB"),
    "settle worker": ("    peak memory of its worker",),
    "rejudge": ("rejudge, {tags} events, to reading them", "<=", 4, "x"),
    "rejudge first": ("    the first time, 1 verdict in 20 is old", "<=", 4, "x"),
    "rejudge memory": ("    peak memory, the highest", "<=", 100, "MB"),
    "report": ("report, {tags} tags and 1.35 x lines, to reading these", "<=", 8, "x"),
    "report seconds": ("    seconds", "<=", 8, "s"),
    "report memory": ("    peak memory", "<=", 300, "MB"),
    "mail": ("mails/s through the relay, one recipient", ">=", 150, "/s"),
    "mail relay": ("    of it, to the smarthost itself",),
    "mail send": ("    of send, to the smarthost itself",),
    "mail scan": ("messages/s that scan reads, of an mbox", ">=", 1500, "/s"),
    "exact": ("hits answered in the whole run, in the log", "<=", 0, "off"),
    "exact register": ("    in the register after the stop", "<=", 0, "off"),
}
Reading = Tuple[str, float, str]        # the row, the value to judge, the text to show


def ratio(key: str, unit: str, rounds: int, one: Callable[[], float],
          other: Callable[[], float]) -> Reading:
    """Measure two sides in turns; read the median ratio, show range and medians."""
    pairs = [(other(), one())[::-1] if number % 2 else (one(), other())
             for number in range(rounds)]
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    ours, theirs = (float(f"{median(side):.3g}") for side in zip(*pairs))
    return key, median(ratios), (f"{median(ratios):.2f} ({ratios[0]:.2f} to "
                                 f"{ratios[-1]:.2f}; {ours:,g} to {theirs:,g} {unit})")


# A child inherits its parent's peak until it runs another program, and the bench is
# larger than what it measures; hence this small parent. The alarm outlives exec.
METER = """
import resource, signal, subprocess, sys, time
start = time.monotonic()
code = subprocess.call(sys.argv[2:], stdout=subprocess.DEVNULL,
                       preexec_fn=lambda: signal.alarm(int(sys.argv[1])))
seconds, usage = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(seconds, usage.ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10))
sys.exit(code)
"""
# What the program is held against, each in a Python of its own.
CSV = "import csv, sys; rows = csv.reader(open(sys.argv[1], newline=''))\n"
INTO_DICT = CSV + "tags = {row[0]: row for row in rows}"
READ = CSV + "for row in rows: pass"
COPY = CSV + "csv.writer(open(sys.argv[2], 'w'), lineterminator='\\n').writerows(rows)"
# And what a person does with it in a spreadsheet: new notes, saved elsewhere.
EDIT = COPY.replace("(rows)", "([*row[:-1], row[-1] or 'called'] for row in rows)")


def metered(*command: Any) -> list[float]:
    """Run a program without its output; return seconds, and megabytes at its peak."""
    ended = subprocess.run([sys.executable, "-Ic", METER, str(PATIENCE), *command],
                           stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{command[2]} ... {ended.stderr[-90:]!r}")
    return [float(number) for number in ended.stdout.split()]


def python(code: str, *arguments: Any) -> float:
    """Run some Python in an interpreter of its own; return its seconds."""
    return metered(sys.executable, "-c", code, *arguments)[0]


# --- Registers with their logs, and the account of what was fetched ---------
# Verdict, reason, address, agent, as logged (if rules change, the first rejudge slows).
CLIENTS = [line.split("|") for line in """\
human|mail-client|203.0.113.0|Mozilla/5.0 (X11; Linux x86_64) Thunderbird/128.4.0
proxy|gmail-proxy|66.249.93.0|Mozilla/5.0 Firefox/11.0 (via ggpht.com GoogleImageProxy)
proxy|yahoo-proxy|192.0.2.0|YahooMailProxy; https://help.yahoo.com/kb/yahoo-mail.html
machine|http-library|198.51.100.0|python-requests/2.32.3""".splitlines()]
NAMES = "john.smith mary.garcia ahmed.chen sofia.rossi lukas.novak".split()
ALPHABET = "bcdfghjkmnpqrstvwxz23456789"        # of ids, which begin with a letter


class Tags:
    """Keep a register, the ids to fetch, and the account of its hits."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.register = folder, folder / "register.csv"
        self.log = folder / "register.events.csv"
        self.ids: list[str] = []    # to fetch
        self.before = 0             # hits in the log before a server ran
        self.answered = self.unsure = 0     # and since; cut off: counted, or not

    def fill(self, number: int, events: int) -> None:
        """Write a register as its owner has it, and a log that knows more."""
        def utc(days: float) -> str:
            return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(made + days * 86400))

        made = time.time() - 40 * 86400     # and hit in the last 30 of these days
        chance, state = random.Random(7), {}
        ids = ["t" + "".join(chance.choices(ALPHABET, k=20)) for _ in range(number)]
        hit = chance.sample(ids, number if events > number else number // 10)
        with open(self.register, "w") as register, open(self.log, "w") as log:
            row, line = (csv.writer(file, lineterminator="\n").writerow
                         for file in (register, log))
            row("id,hits,last_hit,opens,last_open,created,name,note".split(","))
            line("time,event,id,hits,opens,verdict,reason,address,detail".split(","))
            for tag in ids:
                name = f"{chance.choice(NAMES)}{chance.randrange(100)}@example.org"
                note = "met in Lyon, phone back" if chance.random() < 0.05 else ""
                row([tag, 0, "", 0, "", utc(0), name, note])
                line([utc(0), "made", tag, 0, 0, "", "", "", name])
            for event in range(events):
                tag, client = hit[event % len(hit)], CLIENTS[event % len(CLIENTS)]
                judged = CLIENTS[(event + (event % 20 == 7)) % len(CLIENTS)]    # or old
                hits, opens = state.get(tag, (0, 0))
                state[tag] = hits + 1, opens + (judged[0] != "machine")
                line([utc(10 + 29.9 * event / events), "hit", tag, *state[tag],
                      *judged[:2], *client[2:]])
        os.utime(self.register, (made, made))
        self.before = events
        self.ids = ids if number <= FEW else chance.sample(ids, number // 10)


# --- Servers and clients; only what was started here is ever ended ----------
class Server:
    """Run a server, and look at what it and its settle worker use."""

    def __init__(self, tags: Tags, port: int, *command: Any) -> None:
        self.tags, self.port, self.said = tags, port, tags.folder / "stderr.txt"
        with open(self.said, "wb") as said:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                            stdout=subprocess.DEVNULL, stderr=said)

    def until(self, is_so: Callable[[], Any]) -> None:
        """Wait for something to come true while the server runs."""
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"server: ... {self.said.read_text()[-90:]!r}")
            time.sleep(0.002)

    def is_serving(self) -> bool:
        """Tell whether it says that it serves, and learn the port; or does."""
        said = re.search(rf"pixels on http://{HOST}:(\d+)", self.said.read_text())
        self.port = int(said.group(1)) if said else self.port
        return bool(said or self.port and fetch(self.port, "nobody"))

    def cpu(self) -> tuple[float, float]:
        """Return the CPU seconds of the server, and of its workers, also ended ones."""
        stats, second = {}, os.sysconf("SC_CLK_TCK")
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(FileNotFoundError, ProcessLookupError):
                text = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2]
                stats[int(name)] = [0, *map(int, text.split()[1:])]     # from the state
        own = stats.get(self.process.pid, [0] * 50)
        self.workers = [pid for pid in stats if stats[pid][1] == self.process.pid]
        ticks = sum(own[13:15]) + sum(sum(stats[pid][11:15]) for pid in self.workers)
        return sum(own[11:13]) / second, ticks / second

    def is_settling(self, seconds: float) -> bool:
        """Watch for so long whether its worker works."""
        before = self.cpu()[1]
        time.sleep(seconds)
        return self.cpu()[1] > before


@contextmanager
def running(*arguments: Any) -> Iterator[Server]:
    """Run a server while the block does, and let it settle at the end."""
    server = Server(*arguments)
    try:
        server.until(server.is_serving)
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(PATIENCE)
        finally:
            server.process.kill()


def memory(key: str, *pids: int) -> Reading:
    """Read the memory of processes: judged by the peak, with what is left of it."""
    text = "".join(Path(f"/proc/{pid}/status").read_text() for pid in pids)
    peak, now = (sum(map(int, re.findall(rf"{name}:\s+(\d+)", text))) / 1024
                 for name in ("VmHWM", "VmRSS"))
    return key, peak, f"{peak:.0f} MB ({now:.0f} now)"


def fetch(port: int, tag: str) -> bool:
    """Fetch a pixel on a connection of its own; tell whether all of it arrived."""
    ask = f"GET /{tag}.gif HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with suppress(OSError), socket.create_connection((HOST, port), 30) as link:
        link.sendall(ask.encode())
        answer = b"".join(iter(lambda: link.recv(4096), b""))
        return bool(re.match(rb"HTTP/1\.1 200 (?s:.*)GIF8(?s:.*);\Z", answer))
    return False


def steady(port: int, ids: list[str], begin: float, enough: Path) -> list[Any]:
    """Fetch steadily until a file appears; return of each: due, arrived, done when."""
    with ThreadPoolExecutor(2 * CONNECTIONS) as pool:
        hits = []
        for number in range(RATE * PATIENCE):
            due = begin - AT_REST + number / RATE   # from here its time is taken
            time.sleep(max(0, due - time.monotonic()))
            if enough.exists():
                break
            tag = "nobody" if due < begin else ids[number % len(ids)]
            hits.append(pool.submit(
                lambda *hit: (hit[0], fetch(port, hit[1]), time.monotonic()), due, tag))
        return [hit.result() for hit in hits]


LOAD = """
local agents, heads = {%s}, {}
function init(args)
  math.randomseed(os.time())
  for id in io.lines(args[1]) do
    wrk.headers["User-Agent"] = agents[#heads %% #agents + 1]
    heads[#heads + 1] = wrk.format("GET", "/" .. id .. ".gif")
  end
end
function request() return heads[math.random(#heads)] end
""" % ", ".join(f'"{agent}"' for *_, agent in CLIENTS)


def load(server: Server, seconds: int) -> tuple[int, float]:
    """Have wrk ask for random ids; return the hits answered, in all and a second."""
    tags, script = server.tags, server.tags.folder / "load.lua"
    (tags.folder / "ids").write_text("\n".join(tags.ids) + "\n")
    script.write_text(LOAD)
    said = subprocess.run(
        ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", script,
         "-HConnection: close", f"http://{HOST}:{server.port}", "--",
         tags.folder / "ids"], capture_output=True, text=True, timeout=PATIENCE).stdout
    done = re.search(r"(\d+) requests in .*Requests/sec: +([\d.]+)", said, re.DOTALL)
    lost = sum(map(int, re.findall(r"(?:connect|read|write|out|ses:) (\d+)", said)))
    hits, rate = (int(done[1]), float(done[2])) if done else (0, 0.0)
    tags.answered += max(0, hits - lost)
    tags.unsure += lost + CONNECTIONS       # wrk hangs up on what is under way
    if lost >= hits / 1000:
        raise RuntimeError(f"{lost:,} of {hits:,} requests of wrk had no answer")
    return hits, rate


NGINX = """
daemon off; worker_processes 2; pid pid; error_log stderr; events {}
http { access_log access.log; client_body_temp_path 1; proxy_temp_path 2;
       fastcgi_temp_path 3; uwsgi_temp_path 4; scgi_temp_path 5;
       server { listen %s:%d; location / { empty_gif; } } }
"""


class Lab:
    """Make registers, and commands and servers for them."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.place, self.size = options, place, options.tags
        self.settled: list[Tags] = []

    def tags(self, number: int, events: int) -> Tags:
        """Return a register with so many tags and logged hits, after a settle."""
        tags = Tags(self.place / f"{number}-{events}")
        tags.fill(number, events)
        with self.serving(tags):
            self.settled.append(tags)
        return tags

    few = cached_property(lambda lab: lab.tags(FEW, FEW // 5))
    many = cached_property(lambda lab: lab.tags(lab.size, lab.size // 5))

    def command(self, name: str, tags: Tags, *options: Any) -> list[Any]:
        """Return a command line of mailtracker."""
        return [sys.executable, self.options.script, name, "--register", tags.register,
                *map(str, options)]

    def against(self, key: str, ours: Callable[[], float], *peer: Any) -> Reading:
        """Compare seconds with those of Python code, in rounds that may be long."""
        return ratio(key, "s", min(self.options.rounds, 5), ours, lambda: python(*peer))

    def serving(self, tags: Tags) -> Any:
        """Return a server of a register."""
        options = "--host", HOST, "--port", 0, "--quiet", "--compose-window", 0
        return running(tags, 0, *self.command("server", tags, *options))

    def nginx(self, ids: list[str]) -> Any:
        """Return nginx with `empty_gif`, an access log and two workers."""
        tags = Tags(self.place / "nginx")
        with socket.create_server((HOST, 0)) as free:
            tags.ids, port = ids, free.getsockname()[1]
        (tags.folder / "conf").write_text(NGINX % (HOST, port))
        return running(tags, port, "nginx", "-e", "stderr", "-p", tags.folder, "-cconf")


# --- The measurements: each yields the readings of its rows -----------------
def measure_speed(lab: Lab) -> Iterator[Reading]:
    """Race against nginx, over the same few ids."""
    rounds, seconds = lab.options.rounds, lab.options.seconds
    with lab.serving(lab.few) as ours, lab.nginx(lab.few.ids) as nginx:
        load(ours, 1), load(nginx, 1)           # to warm up
        yield ratio("speed", "hits/s", rounds, lambda: load(ours, seconds)[1],
                    lambda: load(nginx, seconds)[1])


def measure_cpu(lab: Lab) -> Iterator[Reading]:
    """Weigh a hit among many tags against one among few, by the kernel's account."""
    def weigh(server: Server) -> float:
        before = server.cpu()[0]
        hits, _ = load(server, lab.options.seconds)
        used = server.cpu()[0] - before
        any(not server.is_settling(0.5) for _ in range(60))     # else go on without
        return 1e6 * used / hits

    with lab.serving(lab.many) as many, lab.serving(lab.few) as few:
        weigh(many), weigh(few)                 # to warm up
        before = many.cpu()
        yield ratio("cpu", "µs", lab.options.rounds, lambda: weigh(many),
                    lambda: weigh(few))
        own, worker = (end - start for end, start in zip(many.cpu(), before))
        yield "cpu worker", worker / own, f"{worker / own:.2f} ({worker:.1f} s in all)"
        yield memory("cpu memory", many.process.pid)


def measure_million(lab: Lab) -> Iterator[Reading]:
    """Time what costs by the number of tags; what would be printed goes nowhere."""
    many, made = lab.many, lab.place / "made"

    def start() -> float:
        begin = time.monotonic()
        with lab.serving(many) as server:
            server.until(lambda: fetch(server.port, many.ids[0]))
            many.answered += 1
            return time.monotonic() - begin

    def make() -> float:
        shutil.rmtree(made, ignore_errors=True)
        return metered(*lab.command("newtag", Tags(made), *url, "--count", lab.size))[0]

    url = "--server", "http://x"
    dump = lab.command("dump", many, "--format", "csv")
    one = lab.command("newtag", many, *url)
    yield lab.against("million", start, INTO_DICT, many.register)
    yield lab.against("million dump", lambda: metered(*dump)[0], COPY, many.register,
                      os.devnull)
    yield lab.against("million made", make, COPY, made / "register.csv", made / "copy")
    yield ratio("million one", "s", 3 * lab.options.rounds, lambda: metered(*one)[0],
                lambda: python("pass"))


def measure_settle(lab: Lab) -> Iterator[Reading]:
    """Time the hits that meet the worker at work: all are new; and a person saved."""
    tags, saved = lab.many, lab.many.folder / "saved.csv"

    def is_settled() -> bool:
        start, worked = time.monotonic(), server.is_settling(0.05)
        work.extend([(start, time.monotonic())] * worked)
        with suppress(FileNotFoundError):       # while it is exchanged
            return os.stat(tags.register).st_ino != version
        return False

    for key in ("settle", "settle save"):
        python(EDIT, tags.register, saved)
        work, enough = [], tags.folder / key
        with lab.serving(tags) as server, ProcessPoolExecutor(1) as pool:
            begin = time.monotonic() + AT_REST + 0.5
            client = pool.submit(steady, server.port, tags.ids, begin, enough)
            time.sleep(begin - 0.02 - time.monotonic())
            try:
                if key == "settle save":
                    os.utime(saved)
                    os.replace(saved, tags.register)
                version = os.stat(tags.register).st_ino
                server.until(is_settled)
            finally:
                enough.touch()
                hits = client.result()
                known = [arrived for due, arrived, _ in hits if due >= begin]
                tags.answered += sum(known)
                tags.unsure += len(known) - sum(known)
            met = [done - due for due, _, done in hits if due >= begin
                   and any(due < end and done > start for start, end in work)]
            calm = [done - due for due, _, done in hits if due < begin]
            if not all(known) or len(met) < 2:
                raise RuntimeError(f"of {len(known)} hits {sum(known)} were answered, "
                                   f"{len(met)} met the worker at work")
            p99, rest = (1000 * quantiles(times, n=100, method="inclusive")[98]
                         for times in (met, calm))
            yield key, p99, (f"{p99:.1f} ms (worst {1000 * max(met):.0f}, at rest "
                             f"{rest:.1f}; {len(met):,} at {RATE}/s)")
            yield memory("settle memory", server.process.pid)
            yield memory("settle worker", *server.workers)


def measure_rejudge(lab: Lab) -> Iterator[Reading]:
    """Time `rejudge` against reading the log, which it may have made longer."""
    tags, used = lab.tags(lab.size // 10, lab.size), []

    def rejudge() -> float:
        used.append(metered(*lab.command("rejudge", tags)))
        return used[-1][0]

    yield ratio("rejudge first", "s", 1, rejudge, lambda: python(READ, tags.log))
    yield lab.against("rejudge", rejudge, READ, tags.log)
    peak = max(megabytes for _, megabytes in used)
    yield "rejudge memory", peak, f"{peak:.0f} MB"


def measure_report(lab: Lab) -> Iterator[Reading]:
    """Time `report` over all tags, settled, against reading its log."""
    tags, used = lab.tags(lab.size, lab.size * 7 // 20), []  # and a line for each made

    def report() -> float:
        used.append(metered(*lab.command("report", tags)))
        return used[-1][0]

    yield lab.against("report", report, READ, tags.log)
    seconds, peak = median(each[0] for each in used), max(
        each[1] for each in used)
    yield "report seconds", seconds, f"{seconds:.1f} s"
    yield "report memory", peak, f"{peak:.0f} MB"


MAIL = (b"From: Ann <ann@x.org>\r\nTo: bob@y.org\r\nSubject: Hello\r\n"
        b"Message-ID: <%d@x.org>\r\nContent-Type: text/html\r\n\r\n"
        b"<p>Dear Bob,</p>\r\n")
# A mailbox is mostly of mail that tells of no tag: three in five here.
MAILBOX = (MAIL, MAIL, MAIL, b"In-Reply-To: <other@x.org>\r\n" + MAIL,
           b"Return-Path: <>\r\nAuto-Submitted: auto-replied\r\n" + MAIL)


@contextmanager
def listening(*command: Any) -> Iterator[int]:
    """Run a mail server that says its port in its first line, until stdin ends."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        try:
            yield int(re.split(rb"[ :]", process.stdout.readline().strip())[-1])
        finally:
            process.terminate()
            process.stdin.close()


def hand_in(port: int, number: int) -> float:
    """Hand in so many mails over 4 connections; return how many a second that was."""
    def one(share: int) -> None:
        with smtplib.SMTP(HOST, port, local_hostname="x") as smtp:
            for mail in range(share, number, 4):
                smtp.sendmail("ann@x.org", ["bob@y.org"], MAIL % mail)

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    return number / (time.monotonic() - began)


def measure_mail(lab: Lab) -> Iterator[Reading]:
    """Send mail through the relay, and by send; read a mailbox."""
    number, place = lab.size // 2500, lab.place / "mail"
    place.mkdir()
    register, mbox = Tags(place / "r"), place / "mbox"
    smarthost = sys.executable, SCRIPT.parent / "tests/smtp_server.py", "--store"
    with listening(*smarthost, place / "store") as port, listening(*lab.command(
            "relay", register, "--port", 0, "--quiet", "--server", HOST, "--smarthost",
            f"{HOST}:{port}")) as relay:
        pairs = [(hand_in(relay, number), hand_in(port, number))
                 for _ in range(lab.options.rounds)]
        rates = sorted(ours for ours, _ in pairs)
        yield "mail", median(rates), f"{median(rates):.0f} ({rates[0]:.0f} to " \
            f"{rates[-1]:.0f}), 4 connections"
        share = median(ours / theirs for ours, theirs in pairs)
        yield "mail relay", share, f"{share:.2f} of {median(r for _, r in pairs):,.0f}"
        (place / "a.html").write_text("Subject: Hello\n\n<p>Dear {name},</p>\n")
        (place / "list.csv").write_text("email,name\n" + "".join(
            f"p{n}@y.org,P\n" for n in range(number)))
        seconds = metered(*lab.command(
            "send", register, place / "a.html", place / "list.csv", "--yes", "--from",
            "ann@x.org", "--server", HOST, "--smarthost", f"{HOST}:{port}"))[0]
        share = number / seconds / median(r for _, r in pairs)
        yield "mail send", share, f"{share:.2f}, {number / seconds:.0f}/s"
    mails = lab.size // 100
    mbox.write_bytes(b"".join(
        b"From x\n%b\n\n" % (MAILBOX[n % 5] % n + (b"x" * 60 + b"\r\n") * 80)
        for n in range(mails)))
    rate = mails / metered(*lab.command("scan", register, mbox, "--since", "9999d"))[0]
    yield "mail scan", rate, f"{rate:,.0f}, of {mails:,}"


def measure_exact(lab: Lab) -> Iterator[Reading]:
    """Count some more hits one by one; then hold the whole run to its account."""
    with lab.serving(lab.few) as server, ThreadPoolExecutor(CONNECTIONS) as pool:
        arrived = list(pool.map(lambda tag: fetch(server.port, tag), 5 * lab.few.ids))
    lab.few.answered += sum(arrived)
    lab.few.unsure += len(arrived) - sum(arrived)
    answered, unsure = 0, 0
    logged = counted = -sum(tags.before for tags in lab.settled)
    for tags in lab.settled:
        with open(tags.log, newline="") as log, open(tags.register, newline="") as rows:
            logged += sum(row["event"] == "hit" for row in csv.DictReader(log))
            counted += sum(int(row["hits"]) for row in csv.DictReader(rows))
        answered, unsure = answered + tags.answered, unsure + tags.unsure
    yield "exact", max(answered - logged, logged - answered - unsure, 0), (
        f"{logged:,} for {answered:,}, and up to {unsure:,} cut off")
    yield "exact register", abs(counted - logged), f"{counted:,} for {logged:,}"


MEASURES = {key: globals()[f"measure_{key}"] for key in BARS if " " not in key}


def rows_of(name: str, lab: Lab) -> Iterator[tuple[str, ...]]:
    """Measure; yield rows. What fails is not met, what is missing not measured."""
    found, fault = {}, ("", "")
    try:
        for key, value, text in MEASURES[name](lab):
            sign, limit = BARS[key][1:3] or ("<=", value)
            met = value == limit or (value > limit) == (sign == ">=")
            found[key] = text, "yes" if met else "no"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        fault = f"failed: {error}", "no"
        if getattr(error, "filename", "") in ("wrk", "nginx", "/proc"):
            fault = f"{error.filename} is missing", "not measured"
    for key, (what, *bar) in BARS.items():
        if key.split()[0] == name:
            text, met = found.get(key, fault)
            yield (what.format(tags=f"{lab.size:,}"), text,
                   " ".join(map(str, bar)), met if bar else "-")


def main() -> int:
    """Measure, telling on stderr what; print the table and judge it."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--only", action="append", choices=MEASURES, help="only this")
    parser.add_argument("--rounds", type=int, default=7, help="of each (long ones: 5)")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="what to measure")
    options = parser.parse_args()
    options.seconds, options.tags = (1, 100_000) if options.quick else (2, 1_000_000)
    os.environ["PATH"] += ":/usr/sbin:/usr/local/sbin"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f} before, {options.rounds} rounds\n", flush=True)
    rows = [("what", "measured", "bar", "met")]
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        lab = Lab(options, Path(place))
        for name in options.only or MEASURES:
            print(f"measuring {name} ...", file=sys.stderr)
            rows += rows_of(name, lab)
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    yes, no, unknown = map(list(zip(*rows))[3].count, ("yes", "no", "not measured"))
    print(f"\n{yes} met, {no} not met, {unknown} not measured")
    return int(bool(no or unknown))


if __name__ == "__main__":
    raise SystemExit(main())
