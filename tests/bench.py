#!/usr/bin/env python3
"""Measure mailtracker beside nginx and FastAPI, and print a table.

    python3 tests/bench.py             everything, with 1,000,000 tags; some minutes
    python3 tests/bench.py --quick     100,000 tags, rounds of one second
    python3 tests/bench.py --peer-python VENV/bin/python    where fastapi, uvicorn are

No test depends on it: what is fast here may be slow there. Rates are comparable
only within one run, so the servers take turns, round after round, and each row that
has a bar compares medians of the same run. The other bars are seconds and megabytes.
To read the program, begin with `checks`, which is the table.

It needs Linux, wrk and nginx (Debian packages of these names) and, in some Python,
fastapi and uvicorn (PyPI). It installs nothing; a row whose program is missing says
so and is "not measured", which is not the same as met. All servers listen on
127.0.0.1, and everything is written to a directory that is removed at the end.

Exit status: 0 when every bar was measured and met, else 1; 2 for wrong usage.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import multiprocessing
import os
import platform
import re
import resource
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

HOST = '127.0.0.1'
SCRIPT = Path(__file__).resolve().parent.parent / 'mailtracker.py'
FEW = 1_000                 # tags in the small registers
CONNECTIONS = 16            # of wrk, and threads of the client that counts exactly
IDS_USED = 100_000          # of a larger register, evenly spread over its pages
HALF_OPEN, DRIPS = 1_000, 50
CALM = 0.005                # seconds between hits beside the half-open connections
CROWD_LIMIT = 120           # seconds after which the crowd goes home by itself
COMMAND_LIMIT = 300         # seconds after which a command counts as hanging


class NotMeasured(Exception):
    """Say why something could not be measured; no fault of mailtracker's."""


class Failed(Exception):
    """Say how mailtracker failed while it was being measured."""


###############################################################################
# What a measurement is: a reading, held against a bar.
###############################################################################
class Reading(NamedTuple):
    """Hold what was measured: the value that is judged, and the text shown."""

    value: float
    text: str


class Bar(NamedTuple):
    """Hold what must be reached, in words and as a test."""

    text: str
    is_met: Callable[[float], bool]


def at_least(limit: float) -> Bar:
    """Demand a ratio of at least this."""
    return Bar(f'>= {limit:.1f}', lambda value: value >= limit)


def at_most(limit: int) -> Bar:
    """Demand a number of no more than this."""
    return Bar(f'<= {limit}', lambda value: value <= limit)


def under(limit: float, unit: str) -> Bar:
    """Demand less than this many seconds, megabytes or times."""
    return Bar(f'< {limit:g} {unit}', lambda value: value < limit)


EQUAL = Bar('all equal', lambda wrong: wrong == 0)
WITHIN = Bar('within', lambda outside: outside == 0)
FLAT = under(8, 'MB more')


class Check(NamedTuple):
    """Name one row of the table; without a bar it is for information."""

    what: str
    measure: Callable[[Lab], Reading]
    bar: Bar | None = None


def once(measure: Callable[[Lab], Any]) -> Any:
    """Make a property that is measured a single time, its failure included."""
    outcomes: dict[Lab, tuple[Any, Exception | None]] = {}

    def recall(lab: Lab) -> Any:
        if lab not in outcomes:
            try:
                outcomes[lab] = measure(lab), None
            except (Failed, NotMeasured) as error:
                outcomes[lab] = None, error
        value, failure = outcomes[lab]
        if failure:
            raise failure
        return value

    return property(recall, doc=measure.__doc__)


###############################################################################
# Programs and processes. Only what was started here is ever ended.
###############################################################################
def find_program(name: str) -> str:
    """Return the path of a program, or say which package it comes from."""
    found = shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin:/usr/local/sbin')
    if not found:
        raise NotMeasured(f'{name} is missing (Debian package {name})')
    return found


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def listeners(port: int) -> int:
    """Return how many sockets listen on a port."""
    rows = [line.split() for line in Path('/proc/net/tcp').read_text().splitlines()]
    return sum(row[1].endswith(f':{port:04X}') and row[3] == '0A' for row in rows)


def status(process: subprocess.Popen[bytes], name: str) -> int:
    """Return a number from a process's status: Threads, or VmRSS in kB."""
    text = Path(f'/proc/{process.pid}/status').read_text()
    return int(text.split(f'\n{name}:')[1].split()[0])


def descriptors(process: subprocess.Popen[bytes]) -> int:
    """Return how many files and sockets a process has open."""
    return len(os.listdir(f'/proc/{process.pid}/fd'))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server: politely, and after ten seconds its whole session."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(text: str) -> str:
    """Return the last line of an output, shortened: what a program died of."""
    return (text.strip().splitlines() or ['no message'])[-1][:70]


def run(command: Sequence[str], output: Any = subprocess.DEVNULL) -> float:
    """Run a command of mailtracker to its end; return the seconds it took."""
    start = time.perf_counter()
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, text=True,
                       stderr=subprocess.PIPE, check=True, timeout=COMMAND_LIMIT)
    except subprocess.CalledProcessError as error:
        raise Failed(last_line(error.stderr)) from None
    except subprocess.TimeoutExpired:
        raise Failed(f'still running after {COMMAND_LIMIT} s') from None
    return time.perf_counter() - start


class Use(NamedTuple):
    """Hold what a command used: seconds, and megabytes at its peak."""

    seconds: float
    megabytes: float


# A child inherits its parent's peak until it runs another program, and the bench
# is larger than some of what it measures; hence this small parent. The alarm
# outlives exec.
METER = """
import os, signal, sys, time
start = time.monotonic()
child = os.fork()
if not child:
    signal.alarm(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(child, 0)
print(time.monotonic() - start, usage.ru_maxrss, file=sys.stderr)
sys.exit(status != 0)
"""


def metered(command: Sequence[str]) -> Use:
    """Run a command with its output thrown away; return what it used."""
    meter = [sys.executable, '-ISc', METER, str(COMMAND_LIMIT), *command]
    ended = subprocess.run(meter, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE, text=True)
    message, _, numbers = ended.stderr.strip().rpartition('\n')
    if ended.returncode:
        raise Failed(last_line(message))
    seconds, kilobytes = numbers.split()
    return Use(float(seconds), int(kilobytes) / 1024)


###############################################################################
# Tags, and the account of what was fetched of them.
###############################################################################
@dataclass
class Tags:
    """Keep tags to fetch, and the account that the counters are held against."""

    ids: Path                   # one a line
    register: Path | None = None
    answered: int = 0           # pixels that arrived
    unsure: int = 0             # cut off under way: counted or not, nobody knows


@dataclass
class Target:
    """Name a running server, the tags it serves and the rates it reached."""

    port: int
    tags: Tags
    processes: list[subprocess.Popen[bytes]]
    rates: list[float] = field(default_factory=list)
    errors: int = 0


def fetch(port: int, tag: str, headers: str = '') -> bool:
    """Fetch a pixel on a connection of its own; return whether it all arrived."""
    ask = f'GET /{tag}.gif HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n'
    try:
        with socket.create_connection((HOST, port), timeout=10) as link:
            link.sendall(f'{ask}{headers}\r\n'.encode())
            answer = b''.join(iter(lambda: link.recv(4096), b''))
    except ConnectionRefusedError:
        raise
    except OSError:
        return False
    return bool(re.match(rb'HTTP/1\.[01] 200 (?s:.*)GIF8(?s:.*);\Z', answer))


def fetch_counted(target: Target, tag: str) -> bool:
    """Fetch a pixel and enter it into the account."""
    arrived = fetch(target.port, tag)
    target.tags.answered += arrived
    target.tags.unsure += not arrived
    return arrived


def fetch_all(target: Target, ids: list[str]) -> int:
    """Fetch many pixels at once; return how many arrived."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        arrived = sum(pool.map(lambda tag: fetch(target.port, tag), ids))
    target.tags.answered += arrived
    target.tags.unsure += len(ids) - arrived
    return arrived


def some_ids(tags: Tags, number: int) -> list[str]:
    """Return that many ids, from the beginning again when there are fewer."""
    return list(itertools.islice(itertools.cycle(tags.ids.read_text().split()), number))


def await_pixel(target: Target, log: Path, limit: float = 30) -> None:
    """Wait until a server answers its first pixel."""
    tag = some_ids(target.tags, 1)[0]
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in target.processes):
            raise Failed(f'server ended: {last_line(log.read_text())}')
        with contextlib.suppress(ConnectionRefusedError):
            if fetch_counted(target, tag):
                return
        time.sleep(0.002)
    raise Failed(f'no pixel within {limit:g} s')


###############################################################################
# Load: wrk, which opens a connection for every request. It asks for random tags, as
# clients with these addresses and agents would.
###############################################################################
AGENTS = {
    '203.0.113.7': 'Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Thunderbird/128.4.0',
    '203.0.113.80': 'Mozilla/5.0 (Windows NT 10.0; Win64; x64) Chrome/130.0 Safari',
    '66.249.93.10': 'Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 '
                    '(via ggpht.com GoogleImageProxy)',
    '192.0.2.44': 'YahooMailProxy; https://help.yahoo.com/kb/yahoo-mail-proxy.html',
    '198.51.100.9': 'Mozilla/5.0',
    '198.51.100.30': 'python-requests/2.32.3',
    '2001:db8:5::1': 'Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) '
                     'AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148',
}

LOAD = """
local agents = {%s}
local heads, threads = {}, 0
function setup(thread)
  threads = threads + 1
  thread:set("seed", threads)
end
function init(args)
  math.randomseed(seed)
  for id in io.lines(args[1]) do
    wrk.headers["User-Agent"] = agents[#heads % #agents + 1]
    heads[#heads + 1] = wrk.format("GET", "/" .. id .. ".gif")
  end
end
function request()
  return heads[math.random(#heads)]
end
function done(summary)
  local e = summary.errors
  io.write(string.format("bench %d %d %d %d\\n", summary.requests, summary.duration,
    e.status, e.connect + e.read + e.write + e.timeout))
end
""".replace('%s', ', '.join(f'"{agent}"' for agent in AGENTS.values()))


def load(target: Target, options: argparse.Namespace, script: Path) -> float:
    """Load a server with wrk; return its answers a second, errors left out."""
    ended = subprocess.run(
        [find_program('wrk'), '-t', str(options.threads), '-c', str(CONNECTIONS),
         '-d', f'{options.seconds}s', '-H', 'Connection: close', '-s', str(script),
         f'http://{HOST}:{target.port}', '--', str(target.tags.ids)],
        capture_output=True, text=True, timeout=options.seconds + 60)
    summary = re.search(r'^bench (\d+) (\d+) (\d+) (\d+)$', ended.stdout, re.M)
    if not summary:
        raise NotMeasured(f'wrk: {last_line(ended.stdout + ended.stderr)}')
    requests, duration, refused, broken = map(int, summary.groups())
    target.tags.answered += requests - refused
    target.tags.unsure += refused + broken + CONNECTIONS
    target.errors += refused + broken
    return (requests - refused) / (duration / 1e6)


###############################################################################
# The servers that are compared. Each function starts one and waits for a pixel.
###############################################################################
NGINX_CONF = """
daemon off;
worker_processes 2;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen {host}:{port};
        location / {{ empty_gif; }}
    }}
}}
"""

PIXEL_APP = """
import base64
import contextlib
import sqlite3
from datetime import datetime, timezone
from typing import Iterator
from fastapi import Depends, FastAPI, Response

GIF = base64.b64decode('R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7')
HEADERS = {'Cache-Control': 'no-store'}
UPDATE = 'UPDATE tags SET hits = hits + 1, last_hit = ? WHERE id = ?'
app = FastAPI()

def connect() -> sqlite3.Connection:
    db = sqlite3.connect('tags.db', timeout=10, isolation_level=None,
                         check_same_thread=False)
    db.execute('PRAGMA synchronous=NORMAL')     # and WAL, which the file remembers
    return db

def count(db: sqlite3.Connection, tag: str) -> Response:
    now = datetime.now(timezone.utc).isoformat(timespec='seconds')
    db.execute(UPDATE, (now, tag))              # commits: there is no isolation level
    return Response(GIF, media_type='image/gif', headers=HEADERS)
"""

# One connection for each worker, and the update in its event loop: the fastest way
# that was found. A pool of threads with a lock reaches about three quarters of it.
TUNED_APP = PIXEL_APP + """
db = connect()

@app.get('/{tag}.gif')
async def pixel(tag: str) -> Response:
    return count(db, tag)
"""

# A connection for each request, made by a dependency, and a function that runs in
# the pool of threads: the shape of FastAPI's own introduction to databases.
USUAL_APP = PIXEL_APP + """
def get_db() -> Iterator[sqlite3.Connection]:
    with contextlib.closing(connect()) as db:
        yield db

@app.get('/{tag}.gif')
def pixel(tag: str, db: sqlite3.Connection = Depends(get_db)) -> Response:
    return count(db, tag)
"""


def launch(lab: Lab, folder: Path, target: Target, *commands: list[str]) -> Target:
    """Start the processes of a server, to be stopped at the end of the lab."""
    log = folder / 'stderr.txt'
    with open(log, 'ab') as errors:
        for command in commands:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stderr=errors,
                stdout=subprocess.DEVNULL, start_new_session=True)
            lab.stack.callback(stop, process)
            target.processes.append(process)
    await_pixel(target, log)
    return target


def start_nginx(lab: Lab) -> Target:
    """Start nginx with empty_gif, an access log and two workers."""
    program, folder, port = find_program('nginx'), lab.folder('nginx'), free_port()
    conf, errors = folder / 'nginx.conf', folder / 'error.log'
    conf.write_text(NGINX_CONF.format(folder=folder, host=HOST, port=port))
    command = [program, '-e', str(errors), '-p', str(folder), '-c', str(conf)]
    return launch(lab, folder, Target(port, Tags(lab.small.ids), []), command)


def start_fastapi(lab: Lab, name: str, app: str) -> Target:
    """Start a FastAPI pixel with two workers of uvicorn, no access log."""
    folder, port = lab.folder(name), free_port()
    if lab.peer_versions.startswith('no '):
        raise NotMeasured('fastapi or uvicorn is missing (PyPI; see --peer-python)')
    (folder / 'pixel.py').write_text(app)
    fill_database(folder / 'tags.db', some_ids(lab.small, FEW))
    command = [lab.peer_python, '-m', 'uvicorn', 'pixel:app', '--host', HOST,
               '--port', str(port), '--workers', '2', '--no-access-log',
               '--log-level', 'warning']
    return launch(lab, folder, Target(port, Tags(lab.small.ids), []), command)


def fill_database(path: Path, ids: list[str]) -> None:
    """Make the FastAPI pixel's table of tags."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute('PRAGMA journal_mode=WAL')
        db.execute('CREATE TABLE tags (id TEXT PRIMARY KEY, '
                   'hits INTEGER NOT NULL DEFAULT 0, last_hit TEXT)')
        db.executemany('INSERT INTO tags (id) VALUES (?)', ([tag] for tag in ids))
        db.commit()


def start_tracker(lab: Lab, tags: Tags, *options: str, servers: int = 1) -> Target:
    """Start mailtracker on a register, as one process unless more are asked for."""
    port = free_port()
    command = lab.command('server', '--host', HOST, '--port', str(port),
                          '--register', str(tags.register), *options)
    folder = tags.ids.parent
    target = launch(lab, folder, Target(port, tags, []), *[command] * servers)
    if servers > 1:
        await_listeners(port, servers)
    return target


def await_listeners(port: int, number: int) -> None:
    """Wait until so many servers listen on a port."""
    for _ in range(100):
        if listeners(port) == number:
            return
        time.sleep(0.1)
    raise Failed(f'{listeners(port)} of {number} servers listen')


TARGETS: dict[str, Callable[[Lab], Target]] = {
    'fastapi': lambda lab: start_fastapi(lab, 'fastapi', TUNED_APP),
    'usual': lambda lab: start_fastapi(lab, 'usual', USUAL_APP),
    'nginx': start_nginx,
    'few': lambda lab: start_tracker(lab, lab.small, '--quiet'),
    'many': lambda lab: start_tracker(lab, lab.large, '--quiet'),
    'pair': lambda lab: start_tracker(
        lab, lab.make_register('pair', FEW), '--quiet', '--reuse-port', servers=2),
    'spoken': lambda lab: start_tracker(lab, lab.make_register('spoken', FEW)),
}
PEERS = ('fastapi', 'usual', 'nginx')
TRACKERS = ('few', 'many', 'pair', 'spoken')


###############################################################################
# A crowd of clients that never finish asking, in a process of its own.
###############################################################################
class Crowd:
    """Hold connections that stay half-open, and others that drip."""

    TICK = 0.25                 # seconds between two looks at who was dropped
    HEAD = b'GET /pixel.gif HTTP/1.1\r\nHost: localhost\r\nX-Slow: '

    def __init__(self, port: int) -> None:
        self.port = port
        self.selector = selectors.DefaultSelector()
        self.missing = [False] * HALF_OPEN + [True] * DRIPS

    def open(self) -> int:
        """Open what is missing (again); return how many were opened."""
        wanted, self.missing = self.missing, []
        for drips in wanted:
            try:
                link = socket.create_connection((HOST, self.port), timeout=2)
                link.sendall(self.HEAD)
            except OSError:
                self.missing.append(drips)
                continue
            link.setblocking(False)
            self.selector.register(link, selectors.EVENT_READ, drips)
        return len(wanted) - len(self.missing)

    def close_dropped(self) -> None:
        """Close the connections that the server has answered or dropped."""
        for key, _ in self.selector.select(0):
            self.selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
            self.missing.append(key.data)

    def drip(self) -> None:
        """Send one byte on each connection that drips."""
        for key in self.selector.get_map().values():
            if key.data:
                with contextlib.suppress(OSError):
                    key.fileobj.send(b'x')  # type: ignore[union-attr]


def keep_crowd(port: int, ready: Any, enough: Any, reopened: Any) -> None:
    """Keep a crowd on a port until it is enough; the body of a process."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    crowd = Crowd(port)
    crowd.open()
    ready.set()
    for tick in range(int(CROWD_LIMIT / crowd.TICK)):
        if enough.wait(crowd.TICK):
            return
        crowd.close_dropped()
        reopened.value += crowd.open()
        if not tick % 4:
            crowd.drip()


@contextlib.contextmanager
def crowded(port: int) -> Iterator[Any]:
    """Surround a port with a crowd; yield the number of those that came again."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < HALF_OPEN + DRIPS + 50:
        raise NotMeasured('too few descriptors allowed (ulimit -Hn)')
    ready, enough = multiprocessing.Event(), multiprocessing.Event()
    reopened = multiprocessing.Value('i', 0)
    crowd = multiprocessing.Process(target=keep_crowd, daemon=True,
                                    args=(port, ready, enough, reopened))
    crowd.start()
    try:
        if not ready.wait(60):
            raise Failed('the half-open connections were not accepted')
        yield reopened
    finally:
        enough.set()
        crowd.join(10)
        crowd.kill()


class Siege(NamedTuple):
    """Hold what hits met beside a crowd, and what became of the server."""

    seconds: list[float]        # of each hit, sorted
    failures: int
    threads: int                # the most that were seen
    held: int                   # connections of the crowd, most of the time
    reopened: int


def besiege(target: Target, hits: int) -> Siege:
    """Measure hits one after the other while a crowd sits on the server."""
    server, unsure = target.processes[0], target.tags.unsure
    files, seconds, threads, held = descriptors(server), [], [], []
    with crowded(target.port) as reopened:
        for number, tag in enumerate(some_ids(target.tags, hits)):
            start = time.perf_counter()
            fetch_counted(target, tag)
            seconds.append(time.perf_counter() - start)
            if not number % 20:
                threads.append(status(server, 'Threads'))
                held.append(descriptors(server) - files)
            time.sleep(CALM)
        return Siege(sorted(seconds), target.tags.unsure - unsure, max(threads),
                     int(statistics.median(held)), reopened.value)


###############################################################################
# An event log of any length, made from lines that the server itself has written.
###############################################################################
def event_log(register: Path) -> Path:
    """Return where the event log of a register is."""
    return register.with_suffix('.events.csv')


def sample_events(lab: Lab) -> list[str]:
    """Let a server write a hit of each of the clients; return header and lines."""
    tags = lab.make_register('sample', len(AGENTS))
    target = start_tracker(lab, tags, '--quiet', '--trusted-proxy', HOST)
    for tag, (address, agent) in zip(some_ids(tags, len(AGENTS)), AGENTS.items()):
        headers = f'X-Forwarded-For: {address}\r\nUser-Agent: {agent}\r\n'
        fetch(target.port, tag, headers)
    stop(target.processes[0])
    with open(event_log(Path(str(tags.register))), newline='') as log:
        header, *lines = log.readlines()
    if len(lines) < len(AGENTS) or not header.startswith('time,event,id,'):
        raise Failed('the event log has no line per hit')
    return [header, *lines[-len(AGENTS):]]


def write_events(path: Path, sample: list[str], ids: list[str], number: int) -> None:
    """Write a log of so many lines, spread over the month from now."""
    begin, step = datetime.now(timezone.utc), timedelta(days=30) / number
    header, *lines = sample
    rests = [line.split(',', 3)[3] for line in lines]
    with open(path, 'w', newline='') as log:
        log.write(header)
        for row in range(number):
            moment = (begin + row * step).strftime('%Y-%m-%dT%H:%M:%SZ')
            tag, rest = ids[row * 7919 % len(ids)], rests[row % len(rests)]
            log.write(f'{moment},hit,{tag},{rest}')


###############################################################################
# The lab: registers, running servers, and what is measured only once.
###############################################################################
class Lab:
    """Keep everything that one run makes, in one directory, for one script."""

    def __init__(self, options: argparse.Namespace,
                 stack: contextlib.ExitStack) -> None:
        self.options, self.stack = options, stack
        self.peer_python = options.peer_python
        place = tempfile.TemporaryDirectory(prefix='bench-', dir=options.dir)
        self.place = Path(stack.enter_context(place))
        self.targets: dict[str, Target | Exception] = {}

    def folder(self, name: str) -> Path:
        """Make a directory of the lab."""
        (self.place / name).mkdir()
        return self.place / name

    def command(self, *arguments: str) -> list[str]:
        """Return a command line of mailtracker."""
        return [sys.executable, str(self.options.script), *arguments]

    def make_register(self, name: str, number: int) -> Tags:
        """Make a register of that many tags, in one `newtag`."""
        folder = self.folder(name)
        names, made = folder / 'names.csv', folder / 'made.csv'
        tags = Tags(folder / 'ids', folder / 'register.csv')
        with open(names, 'w') as rows:
            rows.write('name\n')
            rows.writelines(f'recipient {row}\n' for row in range(number))
        with open(made, 'wb') as output:
            run(self.newtag(tags, '--names-from', str(names), *self.armed), output)
        every = max(1, number // IDS_USED)
        with open(made, newline='', encoding='utf-8-sig') as rows:
            ids = (row['id'] for row in csv.DictReader(rows))
            tags.ids.write_text('\n'.join(itertools.islice(ids, 0, None, every)) + '\n')
        return tags

    def newtag(self, tags: Tags, *arguments: str) -> list[str]:
        """Return a command that makes a tag."""
        return self.command('newtag', '--register', str(tags.register),
                            '--server', 'http://localhost:56789', *arguments)

    def dump(self, tags: Tags, *arguments: str) -> list[str]:
        """Return a command that dumps a register as CSV."""
        return self.command('dump', str(tags.register), '--format', 'csv', *arguments)

    def sum_hits(self, tags: Tags) -> int:
        """Return the sum of the hits in a register, as `dump` tells it."""
        with subprocess.Popen(self.dump(tags), stdout=subprocess.PIPE,
                              encoding='utf-8-sig') as dump:
            rows = csv.DictReader(dump.stdout or ())
            try:
                total = sum(int(row['hits']) for row in rows)
            except (KeyError, ValueError) as error:
                raise Failed(f'dump is not to be read: {error!r}') from None
        if dump.returncode:
            raise Failed(f'dump ended with status {dump.returncode}')
        return total

    def target(self, name: str) -> Target:
        """Return a running server; start it when it is first asked for."""
        if name not in self.targets:
            try:
                self.targets[name] = TARGETS[name](self)
            except (Failed, NotMeasured) as error:
                peer_failed = name in PEERS and isinstance(error, Failed)
                self.targets[name] = NotMeasured(error) if peer_failed else error
        target = self.targets[name]
        if isinstance(target, Exception):
            raise target
        return target

    def has(self, command: str, option: str) -> bool:
        """Return whether this mailtracker's command knows an option yet."""
        ended = subprocess.run(self.command(command, '--help'), timeout=60,
                               capture_output=True, text=True)
        return option in ended.stdout

    @once
    def armed(self) -> list[str]:
        """Return the option for tags whose first hits are not taken for the sender's.

        The tags are hit within seconds; most of a real mailing's are much older.
        """
        return ['--armed'] if self.has('newtag', '--armed') else []

    @once
    def small(self) -> Tags:
        """Return the register of a thousand tags."""
        return self.make_register('few', FEW)

    @once
    def large(self) -> Tags:
        """Return the register of a million tags."""
        return self.make_register('many', self.options.tags)

    @once
    def peer_versions(self) -> str:
        """Return the versions that the peers' Python has, and its event loop."""
        ask = ('import fastapi, uvicorn; from importlib.util import find_spec; '
               'print("fastapi", fastapi.__version__, "uvicorn", uvicorn.__version__, '
               '"uvloop" if find_spec("uvloop") else "asyncio")')
        try:
            ended = subprocess.run([self.peer_python, '-c', ask], timeout=60,
                                   capture_output=True, text=True)
        except OSError:
            return f'no {self.peer_python}'
        return ended.stdout.strip() or 'no fastapi and uvicorn'

    @once
    def race(self) -> dict[str, Target]:
        """Load all servers in turn: a round to warm up, then those that count."""
        find_program('wrk')
        script = self.place / 'load.lua'
        script.write_text(LOAD)
        running = self.running(TARGETS)
        runners = list(running.values())
        for runner in runners:
            load(runner, self.options, script)
        for number in range(self.options.rounds):
            for runner in runners[::-1] if number % 2 else runners:
                runner.rates.append(load(runner, self.options, script))
        return running

    def running(self, names: Iterable[str]) -> dict[str, Target]:
        """Return the servers that run; the rows of the others will say why not."""
        servers = {}
        for name in names:
            with contextlib.suppress(Failed, NotMeasured):
                servers[name] = self.target(name)
        return servers

    def loaded(self, name: str) -> Target:
        """Return a server after the race; raise what kept it from running."""
        return self.race.get(name) or self.target(name)

    @once
    def starts(self) -> list[float]:
        """Return the seconds to the first pixel of three starts, many tags."""
        tags, seconds = self.large, []
        for _ in range(3):
            start = time.perf_counter()
            target = start_tracker(self, tags, '--quiet')
            seconds.append(time.perf_counter() - start)
            stop(target.processes[0])
        return seconds

    @once
    def siege(self) -> Siege:
        """Besiege the server that has many tags; raise unless it was a siege."""
        siege = besiege(self.target('many'), self.options.hits)
        if siege.failures:
            raise Failed(f'{siege.failures} of {len(siege.seconds)} hits unanswered')
        if siege.held < HALF_OPEN:
            raise NotMeasured(f'held only {siege.held}; try after: ulimit -n 4096')
        return siege

    @once
    def dumped(self) -> tuple[Use, Use]:
        """Return what `dump` used for few tags and for many."""
        return metered(self.dump(self.small)), metered(self.dump(self.large))

    @once
    def history(self) -> list[Tags]:
        """Return a copy of the large register with a short log, one with a long."""
        if not self.has('server', '--no-events'):
            raise NotMeasured('this mailtracker has no event log yet')
        events, ids, copies = sample_events(self), some_ids(self.large, IDS_USED), []
        for lines in (self.options.events // 100, self.options.events):
            register = self.folder(f'log-{lines}') / 'register.csv'
            shutil.copy(self.large.register, register)
            write_events(event_log(register), events, ids, lines)
            copies.append(Tags(self.large.ids, register))
        return copies

    @once
    def events_dumped(self) -> list[Use]:
        """Return what `dump --events` used for the short log and the long one."""
        return [metered(self.dump(tags, '--events')) for tags in self.history]

    @once
    def rejudged(self) -> list[Use]:
        """Return what `rejudge` used for the short log and the long one."""
        return [metered(self.command('rejudge', '--register', str(tags.register)))
                for tags in self.history]


###############################################################################
# The measurements, one function or one maker of functions for each kind of row.
###############################################################################
def rate(name: str) -> Callable[[Lab], Reading]:
    """Measure the answers a second of a server."""
    def measure(lab: Lab) -> Reading:
        target = lab.loaded(name)
        median = statistics.median(target.rates)
        text = f'{median:,.0f} ({min(target.rates):,.0f} to {max(target.rates):,.0f})'
        return Reading(median, text + f', {target.errors} errors' * bool(target.errors))
    return measure


def ratio(name: str, other: str) -> Callable[[Lab], Reading]:
    """Measure how many times the other's answers a second a server gives."""
    def measure(lab: Lab) -> Reading:
        value, others = rate(name)(lab).value, rate(other)(lab).value
        target = lab.target(name)
        if target.errors > target.tags.answered / 1000:
            raise Failed(f'{target.errors:,} requests had no answer')
        if not others:
            raise NotMeasured(f'{other} answered nothing')
        quotient = value / others
        return Reading(quotient, f'{quotient:.2f}')
    return measure


def peak_growth(name: str) -> Callable[[Lab], Reading]:
    """Measure how much more memory a command takes for much than for little."""
    def measure(lab: Lab) -> Reading:
        little, much = getattr(lab, name)
        growth = much.megabytes - little.megabytes
        return Reading(growth, f'{growth:+.1f} MB ({little.megabytes:.1f} to '
                               f'{much.megabytes:.1f})')
    return measure


def duration(name: str) -> Callable[[Lab], Reading]:
    """Measure how long a command takes for much."""
    def measure(lab: Lab) -> Reading:
        seconds = getattr(lab, name)[1].seconds
        return Reading(seconds, f'{seconds:.2f} s')
    return measure


def first_pixel(lab: Lab) -> Reading:
    """Measure the slowest of the starts."""
    worst = max(lab.starts)
    return Reading(worst, f'{worst:.2f} s (slowest of {len(lab.starts)})')


def memory(lab: Lab) -> Reading:
    """Measure the server's resident memory after the load."""
    server = lab.loaded('many').processes[0]
    now, peak = status(server, 'VmRSS') / 1024, status(server, 'VmHWM') / 1024
    return Reading(now, f'{now:.1f} MB (peak {peak:.1f})')


def newtag(lab: Lab) -> Reading:
    """Measure `newtag` beside an interpreter that does nothing, in turns."""
    command, nothing = lab.newtag(lab.large), [sys.executable, '-c', 'pass']
    pairs = [(run(command), run(nothing)) for _ in range(15)]
    ours, empty = (1000 * statistics.median(times) for times in zip(*pairs))
    return Reading(ours / empty, f'{ours / empty:.2f} ({ours:.0f} ms, {empty:.0f} ms)')


def p99(lab: Lab) -> Reading:
    """Measure the hits beside the crowd."""
    siege: Siege = lab.siege
    worst = siege.seconds[-1] * 1000
    value = siege.seconds[int(len(siege.seconds) * 0.99)] * 1000
    return Reading(value, f'{value:.1f} ms (max {worst:.1f}); held {siege.held:,}, '
                          f'reopened {siege.reopened:,}')


def threads(lab: Lab) -> Reading:
    """Measure the threads of the server beside the crowd."""
    return Reading(lab.siege.threads, str(lab.siege.threads))


def exact(name: str) -> Callable[[Lab], Reading]:
    """Measure whether a bounded number of hits is counted to the last one."""
    def measure(lab: Lab) -> Reading:
        target = lab.target(name)
        before = lab.sum_hits(target.tags)
        asked = lab.options.exact
        arrived = fetch_all(target, some_ids(target.tags, asked))
        counted = lab.sum_hits(target.tags) - before
        wrong = asked - arrived + abs(arrived - counted)
        return Reading(wrong, f'{asked:,} asked, {arrived:,} answered, '
                              f'{counted:,} hits')
    return measure


def compared(hits: int, answered: int, unsure: int) -> Reading:
    """Hold the hits of a run against what was answered.

    wrk hangs up on at most one request per connection when its time is over; of
    these nobody knows whether they were counted, so the sum has that much room.
    """
    outside = max(answered - hits, hits - answered - unsure, 0)
    return Reading(outside, f'{hits:,} for {answered:,} and up to {unsure} cut off')


def account(lab: Lab) -> Reading:
    """Measure how far the registers are from all that was answered in this run."""
    every = [lab.loaded(name).tags for name in TRACKERS]
    return compared(sum(lab.sum_hits(tags) for tags in every),
                    sum(tags.answered for tags in every),
                    sum(tags.unsure for tags in every))


def fastapi_account(lab: Lab) -> Reading:
    """Measure the same of the FastAPI pixel, to know that it counts, too."""
    tags = lab.loaded('fastapi').tags
    with contextlib.closing(sqlite3.connect(lab.place / 'fastapi/tags.db')) as db:
        hits = db.execute('SELECT sum(hits) FROM tags').fetchone()[0]
    return compared(hits, tags.answered, tags.unsure)


def checks(many: str, lines: str) -> list[Check]:
    """Return the rows of the table, in the order in which they are measured."""
    return [
        Check(f'first pixel after the start, {many} tags', first_pixel, under(2, 's')),
        Check('hits/s: nginx, empty_gif and access log', rate('nginx')),
        Check('hits/s: FastAPI, uvicorn, SQLite as introduced', rate('usual')),
        Check('hits/s: the same, tuned', rate('fastapi')),
        Check(f'hits/s: mailtracker, {FEW:,} tags', rate('few')),
        Check('    to nginx', ratio('few', 'nginx'), at_least(1)),
        Check('    to FastAPI as it introduces it', ratio('few', 'usual'), at_least(8)),
        Check('    to FastAPI as fast as it can be', ratio('few', 'fastapi')),
        Check(f'hits/s: mailtracker, {many} tags', rate('many')),
        Check(f'    to {FEW:,} tags', ratio('many', 'few'), at_least(0.9)),
        Check('hits/s: two servers (--reuse-port)', rate('pair')),
        Check('hits/s: with a line per hit on stderr', rate('spoken')),
        Check(f'server memory after it, {many} tags', memory, under(64, 'MB')),
        Check(f'newtag to python3 -c pass, {many} tags', newtag, under(3, 'times')),
        Check(f'dump --format csv, {many} tags', duration('dumped'), under(5, 's')),
        Check(f'    memory, {FEW:,} to {many} tags', peak_growth('dumped'), FLAT),
        Check(f'p99 beside {HALF_OPEN:,} half-open, {DRIPS} drips', p99,
              under(50, 'ms')),
        Check('    threads of the server', threads, at_most(32)),
        Check(f'rejudge, {lines} events', duration('rejudged'), under(30, 's')),
        Check('    memory, to a log of a hundredth', peak_growth('rejudged'), FLAT),
        Check(f'dump --events, {lines} events', duration('events_dumped'),
              under(10, 's')),
        Check('    memory, to a log of a hundredth', peak_growth('events_dumped'),
              FLAT),
        Check(f'hits counted, one server, {many} tags', exact('many'), EQUAL),
        Check('hits counted, two servers', exact('pair'), EQUAL),
        Check('hits counted in the whole run', account, WITHIN),
        Check('    by FastAPI', fastapi_account),
    ]


###############################################################################
# The table and the command line.
###############################################################################
class Row(NamedTuple):
    """Hold one line of the table as it is printed."""

    what: str
    measured: str
    bar: str
    met: str


def judge(check: Check, lab: Lab) -> Row:
    """Measure one row; what fails is not met, what is missing is not measured."""
    bar = check.bar.text if check.bar else ''
    try:
        value, text = check.measure(lab)
    except (Failed, OSError) as error:
        return Row(check.what, f'failed: {error}', bar, 'no')
    except (NotMeasured, subprocess.TimeoutExpired) as error:
        return Row(check.what, str(error), bar, 'not measured')
    met = ('yes' if check.bar.is_met(value) else 'no') if check.bar else '-'
    return Row(check.what, text, bar, met)


def print_table(rows: list[Row]) -> None:
    """Print the rows in columns, under a heading."""
    rows = [Row('what', 'measured', 'bar', 'met'), *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, Row(*('-' * width for width in widths)))
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths))
        print('  '.join(cells).rstrip())


def version(program: str, option: str) -> str:
    """Return a program's name and version, as it tells them itself."""
    with contextlib.suppress(NotMeasured):
        ended = subprocess.run([find_program(program), option], timeout=10, text=True,
                               capture_output=True)
        number = re.search(r'\d+\.[\d.]+', ended.stdout + ended.stderr)
        return f'{program} {number.group() if number else "?"}'
    return f'no {program}'


def surroundings(lab: Lab) -> str:
    """Return what the numbers depend on, in two lines."""
    options = lab.options
    return (f'Python {platform.python_version()}, {os.cpu_count()} cores (load '
            f'{os.getloadavg()[0]:.1f} before), '
            f'{version("wrk", "-v")}, {version("nginx", "-v")}, {lab.peer_versions}\n'
            f'{options.rounds} rounds of {options.seconds} s in turns, median (lowest '
            f'to highest), {CONNECTIONS} connections, new for every request, '
            f'{options.threads} of wrk\'s threads')


def whole(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'expected 1 or more, got {text!r}')
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    description = str(__doc__).split('\n', 1)[0]
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add('--quick', action='store_true', help='100,000 tags and events, 1 s rounds')
    add('--rounds', type=whole, default=3, help='rounds of load (default: 3)')
    add('--seconds', type=whole, help='seconds per round (default: 3; 1 with --quick)')
    add('--threads', type=whole, default=1, help='threads of wrk (default: 1; with '
        'more the load takes the cores from one server, and nginx has two)')
    add('--script', type=Path, default=SCRIPT, help='the mailtracker.py to measure')
    add('--peer-python', default=sys.executable, metavar='PATH',
        help='a Python that has fastapi and uvicorn (default: this one)')
    add('--dir', type=Path, help='where to write (default: the system\'s; a disk in '
        'memory makes the numbers better than they are)')
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options, and add the sizes that follow from --quick."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not options.script.is_file():
        parser.error(f'no such script: {options.script}')
    if not Path('/proc/self/status').exists():
        parser.error('needs Linux: memory and threads are read from /proc')
    if options.dir and not options.dir.is_dir():
        parser.error(f'no such directory: {options.dir}')
    options.script = options.script.resolve()
    options.dir = options.dir and options.dir.resolve()
    peer = shutil.which(options.peer_python) or options.peer_python
    options.peer_python = os.path.abspath(peer)     # unresolved: a venv is its link
    options.seconds = options.seconds or (1 if options.quick else 3)
    options.tags = options.events = 100_000 if options.quick else 1_000_000
    options.hits, options.exact = (1_000, 4_000) if options.quick else (2_000, 8_000)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every row, telling on stderr which; print the table; judge it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse(argv)
    rows = []
    with contextlib.ExitStack() as stack:
        lab = Lab(options, stack)
        print(surroundings(lab), flush=True)
        for check in checks(f'{options.tags:,}', f'{options.events:,}'):
            print(f'{check.what.strip()} ... ', end='', file=sys.stderr, flush=True)
            rows.append(judge(check, lab))
            print(rows[-1].measured, file=sys.stderr)
    print()
    print_table(rows)
    verdicts = [row.met for row in rows]
    yes, no, open_ = map(verdicts.count, ('yes', 'no', 'not measured'))
    print(f'\n{yes} met, {no} not met, {open_} not measured')
    return int(bool(no or open_))


if __name__ == '__main__':
    raise SystemExit(main())
