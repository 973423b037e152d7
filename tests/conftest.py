"""What the tests share: the real program, in processes of its own.

`tracker` runs a command, `serve` starts servers, `newtags` makes tags, `tagged` does
both; a test's own folder is the current one of them all. `eventually` waits for what
takes time, `exchange` sends raw bytes to a server.
"""
from __future__ import annotations

import contextlib
import csv
import http.client
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

import mailtracker

PIXEL_START = b"HTTP/1.1 200 OK\r\nContent-Type: image/gif\r\n"
linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"),
                           reason="looks into /proc, which only Linux has")
SCRIPT = Path(__file__).resolve().parent.parent / "mailtracker.py"


def eventually(check, seconds=10.0, pause=0.02):
    """Return the first true value of check(); fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: last was {value!r}")
        time.sleep(pause)


def register_rows(path):
    """Return the rows of a register in the program's own form, as dicts by id."""
    csv.field_size_limit(1 << 24)
    with open(path, encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        delimiter = max(",;\t|", key=first.count)
        file.seek(0)
        rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
    return {row["id"]: row for row in rows}


def log_rows(register):
    """Return the events in the newest file of a register's log, as dicts."""
    path = register.with_name(f"{register.stem}.events{register.suffix}")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def hits_of(register, tag):
    """Return how many hits of a tag the log of a register tells of.

    A line that a bad disk cut off may stand there twice, but not with another count.
    """
    log = mailtracker.Files(str(register)).log
    return len({event.hits for event in mailtracker.read_log(log)
                if event.event == "hit" and event.id == tag})


def save(path, data, age=60.0):
    """Write bytes or Latin-1 text into a file, as if it had been saved a while ago."""
    Path(path).write_bytes(data if isinstance(data, bytes) else data.encode("latin-1"))
    os.utime(path, (time.time() - age, time.time() - age))


def shown(files):
    """Return what dump shows of a register, as dicts by id."""
    columns, rows = mailtracker.register_rows(files)
    found = [dict(zip(columns, row)) for row in rows]
    tags = {row["id"]: row for row in found}
    assert len(tags) == len(found), "a tag is shown twice"
    return tags


def clean_environment(**more):
    """Return an environment in which no variable changes what a command does."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("MAILTRACKER_", "LISTEN_", "NOTIFY_"))}
    return {**kept, **more}


# -- raw requests -------------------------------------------------------------


def get(target, *headers):
    """Return the bytes of a GET with headers."""
    lines = [b"GET " + target + b" HTTP/1.1", b"Host: t.example.org", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def read_all(client):
    """Return all that the server sends until it closes; fail after 15 s."""
    client.settimeout(15)
    received = b""
    with contextlib.suppress(ConnectionError):
        data = client.recv(65536)
        while data:
            received += data
            data = client.recv(65536)
    return received


def exchange(server, *pieces):
    """Send pieces, each after the server took the one before; return the answer."""
    with server.connect() as client:
        with contextlib.suppress(OSError):  # answered and closed before the end
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number, piece in enumerate(pieces):
                if number:
                    server.get("/health")  # served in order: the piece has been read
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        return read_all(client)


def reset(client):
    """Close a connection so that the other side gets a RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def occupy(server, sockets, count, data=b"G"):
    """Open connections that have sent the start of a head, and no more."""
    for _ in range(count):
        sockets.append(server.connect())
        with contextlib.suppress(ConnectionError):
            sockets[-1].sendall(data)


def break_off(server, starts):
    """Open connections that send something and are reset, also before an accept."""
    for stop in False, True:
        if stop:
            os.kill(server.process.pid, signal.SIGSTOP)
        for data in starts:
            client = server.connect()
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
            reset(client)
    os.kill(server.process.pid, signal.SIGCONT)


def in_pieces(data):
    """Return data cut into pieces: the server cannot see it whole at first."""
    middle = min(len(data) - 1, max(2, len(data) // 2))
    return data[:1], data[1:middle], data[middle:]


def assert_nothing_raw(text):
    """Fail if a character could move a cursor, break a line or turn text around."""
    raw = [c for c in text if c != "\n" and unicodedata.category(c) in
           ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert raw == []


def status_of(answer):
    """Return the status of an answer as a number; 0 for no answer."""
    if not answer:
        return 0
    found = re.match(rb"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z ]+\r\n", answer)
    assert found, f"no status line: {answer[:100]!r}"
    return int(found[1])


class Server:
    """One server process, and a client of it."""

    def __init__(self, process, log_path):
        self.process = process
        self.log_path = log_path
        self.port = 0

    def log(self):
        """Return what the server has written to stderr up to now."""
        return self.log_path.read_text("utf-8", "replace")

    def find_port(self):
        """Return the port that it says it serves on; 0 for not yet."""
        assert self.process.poll() is None, f"the server ended: {self.log()}"
        found = re.search(r"serving pixels on https?://\S+:(\d+)", self.log())
        self.port = int(found[1]) if found else 0
        return self.port

    def request(self, method, path, headers=(), timeout=10):
        """Return status, headers and body of the answer to a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port,
                                                timeout=timeout)
        try:
            connection.request(method, path, headers=dict(headers))
            with connection.getresponse() as answer:
                return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def get(self, path, headers=(), timeout=10):
        """Return status, headers and body of the answer to a GET."""
        return self.request("GET", path, headers, timeout)

    def hit(self, tag, times=1):
        """Fetch the pixel of a tag so many times."""
        for _ in range(times):
            with self.connect() as client:
                client.sendall(get(f"/{tag}.gif".encode()))
                assert read_all(client).startswith(PIXEL_START)

    def connect(self):
        """Return a socket that is connected to the server."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def kill(self, number=signal.SIGKILL):
        """Send a signal and wait for the end; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)

    def stop(self):
        """Stop it as a service manager would; return the exit code."""
        return self.kill(signal.SIGTERM)

    def assert_unharmed(self):
        """Fail unless it runs, answers, and has logged no traceback."""
        assert self.process.poll() is None, self.log()
        status, _, body = self.get("/nobody.gif")
        assert (status, body[:6]) == (200, b"GIF89a")
        assert "Traceback" not in self.log()

    def descriptors(self):
        """Return how many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def limit(self, resource_name, most):
        """Set a soft limit of the running process; None: as much as is allowed."""
        import resource

        which = getattr(resource, resource_name)
        _, hard = resource.prlimit(self.process.pid, which)
        soft = hard if most is None else most
        resource.prlimit(self.process.pid, which, (soft, hard))


@pytest.fixture
def files(tmp_path):
    """Return the files of a register that is still to be made."""
    return mailtracker.Files(str(tmp_path / "register.csv"))


@pytest.fixture
def many_sockets():
    """Let this process open 2,000 sockets, and return a list that is closed."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, 2500)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"only {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    opened = []
    yield opened
    for client in opened:
        client.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def tracker(tmp_path):
    """Run mailtracker.py with arguments; return the CompletedProcess, as text."""
    def run(*args, prefix=(), timeout=120, env=None, **options):
        options = {"cwd": tmp_path, "stdin": subprocess.DEVNULL,
                   "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        if "input" in options:
            del options["stdin"]
        command = [*prefix, sys.executable, str(SCRIPT), *map(str, args)]
        return subprocess.run(command, encoding="utf-8", errors="surrogateescape",
                              timeout=timeout, check=False,
                              env=clean_environment(**env or {}), **options)
    return run


@contextlib.contextmanager
def servers(folder, logs):
    """Start servers on 127.0.0.1, each ready when it is returned; end them."""
    started = []

    def start(*args, port=0, host="127.0.0.1", prefix=(), env=None, wait=True,
              **options):
        log_path = logs / f"server-{len(started)}.log"
        where = ["--host", host, "--port", str(port)] if host is not None else []
        command = [*prefix, sys.executable, str(SCRIPT), "server", *where,
                   *map(str, args)]
        with open(log_path, "wb") as log:
            options = {"cwd": folder, "stdin": subprocess.DEVNULL,
                       "stdout": subprocess.DEVNULL, "stderr": log, **options}
            process = subprocess.Popen(command, env=clean_environment(**env or {}),
                                       **options)
        server = Server(process, log_path)
        started.append(server)
        if wait:
            eventually(server.find_port, 20)
        return server

    try:
        yield start
    finally:
        for server in started:
            server.kill()
            if server.process.stderr:
                server.process.stderr.close()


@pytest.fixture
def serve(tmp_path, tmp_path_factory):
    """Start servers in the folder of the test."""
    with servers(tmp_path, tmp_path_factory.mktemp("logs")) as start:
        yield start


@pytest.fixture
def newtags(tracker):
    """Make n tags, or one for each of names, by the real command; return their ids."""
    def make(register, n=1, name="", names=(), **options):
        how = ["--names-from", "-"] if names else ["--count", n, "--name", name]
        if names:
            options["input"] = "".join(f"{each}\n" for each in ["name", *names])
        done = tracker("newtag", "--register", register, *how, "--server", "127.0.0.1",
                       "--format", "url", **options)
        assert done.returncode == 0, done.stderr
        tags = re.findall(r"/([^/]+)\.gif$", done.stdout, re.M)
        assert len(tags) == (len(names) or n)
        return tags
    return make


@pytest.fixture
def tagged(serve, newtags, tmp_path):
    """Start a server on register.csv with one tag; return both."""
    def start(*args, **options):
        register = tmp_path / "register.csv"
        tag, = newtags(register)
        return serve("--register", register, *args, **options), tag
    return start


@pytest.fixture
def run(capsys):
    """Run a command in process; return exit code, stdout and stderr."""
    def run(*args):
        capsys.readouterr()
        try:
            code = mailtracker.main([str(arg) for arg in args])
        except SystemExit as ended:
            code = ended.code
        return (code, *capsys.readouterr())
    return run
