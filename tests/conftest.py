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
import resource
import shutil
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
COMPILED = SCRIPT.parent / ".pytest_cache" / "compiled"
# For who may write short files only: Python would keep half a module, and trust it.
UNCOMPILED = {"PYTHONDONTWRITEBYTECODE": "1"}


def eventually(check, seconds=10.0, pause=0.02):
    """Return the first true value of check(); fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {value!r}"
        time.sleep(pause)
    return value


def read_table(path):
    """Return the delimiter of a CSV file, and its rows as dicts."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = [*file]
    delimiter = max(",;\t|", key=lines[0].count)
    return delimiter, [*csv.DictReader(lines, delimiter=delimiter, strict=True)]


def register_rows(path):
    """Return the rows of a register, as dicts by id."""
    return {row["id"]: row for row in read_table(path)[1]}


def log_rows(register):
    """Return the events in the newest file of a register's log, as dicts."""
    rows = read_table(register.with_name(f"{register.stem}.events.csv"))[1]
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def hits_of(register, tag):
    """Return how many hits of a tag the log of a register tells of."""
    log = mailtracker.Files(str(register)).log
    return len({event.hits for event in mailtracker.read_log(log)
                if event.event == "hit" and event.id == tag})


def rest(*paths, age=60.0):
    """Let files seem saved a while ago: no settle waits until their save is whole."""
    for path in paths:
        os.utime(path, (time.time() - age, time.time() - age))


def save(path, data, age=60.0):
    """Write bytes or Latin-1 text into a file, as if it had been saved a while ago."""
    Path(path).write_bytes(data if isinstance(data, bytes) else data.encode("latin-1"))
    rest(path, age=age)


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
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # to be compiled only once
    return {**kept, "PYTHONPYCACHEPREFIX": str(COMPILED), **more}


def launch(use, *args, prefix=(), env=None, **options):
    """Give a command line of mailtracker.py to subprocess.run or Popen.

    As a module Python keeps it compiled: a thousand starts take a minute less.
    """
    return use([*prefix, sys.executable, "-m", "mailtracker", *map(str, args)],
               env=clean_environment(PYTHONPATH=str(SCRIPT.parent), **env or {}),
               **options)


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
        for data in iter(lambda: client.recv(65536), b""):
            received += data
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


def occupy(server, sockets, count, data=b"G"):
    """Open connections that have sent the start of a head, and no more."""
    for _ in range(count):
        sockets.append(server.connect())
        with contextlib.suppress(ConnectionError):
            sockets[-1].sendall(data)


def break_off(server, starts):
    """Open connections that send something and are reset, also before an accept."""
    for number in signal.SIGCONT, signal.SIGSTOP:
        os.kill(server.process.pid, number)
        for data in starts:
            with server.connect() as client, contextlib.suppress(ConnectionError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                  struct.pack("ii", 1, 0))  # a close sends a RST
                client.sendall(data)
    os.kill(server.process.pid, signal.SIGCONT)


def in_pieces(data):
    """Return data cut into pieces: the server cannot see it whole at first."""
    middle = min(len(data) - 1, max(2, len(data) // 2))
    return data[:1], data[1:middle], data[middle:]


def assert_nothing_raw(text):
    """Fail if a character could move a cursor, break a line or turn text around."""
    assert not [c for c in text if c != "\n" and unicodedata.category(c) in
                ("Cc", "Cf", "Cs", "Zl", "Zp")]


def status_of(answer):
    """Return the status of an answer as a number; 0 for no answer."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z ]+\r\n|\Z", answer)
    assert found, f"no status line: {answer[:100]!r}"
    return int(found[1] or 0)


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
        with contextlib.closing(http.client.HTTPConnection(
                "127.0.0.1", self.port, timeout=timeout)) as connection:
            connection.request(method, path, headers=dict(headers))
            with connection.getresponse() as answer:
                return answer.status, answer.headers, answer.read()

    def get(self, *request, **options):
        """Return status, headers and body of the answer to a GET."""
        return self.request("GET", *request, **options)

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
        which = getattr(resource, resource_name)
        _, hard = resource.prlimit(self.process.pid, which)
        soft = hard if most is None else most
        resource.prlimit(self.process.pid, which, (soft, hard))


@pytest.fixture
def files(tmp_path):
    """Return the files of a register that is still to be made."""
    return mailtracker.Files(str(tmp_path / "register.csv"))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Return a folder: first and second.pem with .key, for 127.0.0.1; locked.key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed; it makes the certificates")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args):
        subprocess.run(["openssl", *args], cwd=folder, check=True, timeout=60,
                       capture_output=True)

    for name in ("first", "second"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
                "-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl("rsa", "-in", "first.key", "-aes256", "-passout", "pass:secret",
            "-out", "locked.key")
    (folder / "garbage.pem").write_text("no certificate\n")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of 256 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can mount a small tmpfs, and not everywhere")
    yield folder
    # Lazily: the servers are stopped after this.
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def many_sockets():
    """Let this process open 2,000 sockets, and return a list that is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 < hard < 2500:  # -1 is infinity
        pytest.skip(f"only {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2500), hard))
    opened = []
    yield opened
    for client in opened:
        client.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def tracker(tmp_path):
    """Run mailtracker.py with arguments; return the CompletedProcess, as text."""
    def run(*args, input="", timeout=120, **options):
        return launch(subprocess.run, *args, cwd=tmp_path, input=input, timeout=timeout,
                      capture_output=True, encoding="utf-8", errors="surrogateescape",
                      **options)
    return run


@contextlib.contextmanager
def servers(folder, logs):
    """Start servers on 127.0.0.1, each ready when it is returned; end them."""
    started = []

    def start(*args, host="127.0.0.1", wait=True, **options):
        where = [] if host is None else ["--host", host, "--port", 0]
        log_path = logs / f"server-{len(started)}.log"
        with open(log_path, "wb") as log:
            options = {"cwd": folder, "stdin": subprocess.DEVNULL,
                       "stdout": subprocess.DEVNULL, "stderr": log, **options}
            process = launch(subprocess.Popen, "server", *where, *args, **options)
        started.append(Server(process, log_path))
        if wait:
            eventually(started[-1].find_port, 20)
        return started[-1]

    try:
        yield start
    finally:
        for server in started:
            with server.process:
                server.kill()


@pytest.fixture
def serve(tmp_path, tmp_path_factory):
    """Start servers in the folder of the test."""
    with servers(tmp_path, tmp_path_factory.mktemp("logs")) as start:
        yield start


@pytest.fixture
def newtags(tracker):
    """Make n tags, or one for each of names, by the real command; return their ids."""
    def make(register, n=1, name="", names=()):
        how = ["--names-from", "-"] if names else ["--count", n, "--name", name]
        done = tracker("newtag", "--register", register, *how, "--server", "127.0.0.1",
                       "--format", "url", input="\n".join(["name", *names, ""]))
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
