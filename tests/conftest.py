"""What the tests share: the real program, in processes of its own.

`tracker` runs a command, `serve` starts servers, `newtags` makes tags; a test's
own folder is the current one of them all. `eventually` waits for what takes time.
"""
from __future__ import annotations

import csv
import http.client
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mailtracker

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


def clean_environment(**more):
    """Return an environment in which no MAILTRACKER_ variable changes a default."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith("MAILTRACKER_")}
    return {**kept, **more}


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
            status, _, body = self.get(f"/{tag}.gif")
            assert status == 200 and body.startswith(b"GIF89a")

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


@pytest.fixture
def serve(tmp_path, tmp_path_factory):
    """Start servers on 127.0.0.1, each ready when it is returned."""
    servers, numbers = [], itertools.count(1)
    logs = tmp_path_factory.mktemp("logs")

    def start(*args, port=0, host="127.0.0.1", prefix=(), env=None, wait=True,
              **options):
        log_path = logs / f"server-{next(numbers)}.log"
        command = [*prefix, sys.executable, str(SCRIPT), "server", "--host", host,
                   "--port", str(port), *map(str, args)]
        with open(log_path, "wb") as log:
            options = {"cwd": tmp_path, "stdin": subprocess.DEVNULL,
                       "stdout": subprocess.DEVNULL, "stderr": log, **options}
            process = subprocess.Popen(command, env=clean_environment(**env or {}),
                                       **options)
        server = Server(process, log_path)
        servers.append(server)
        if wait:
            eventually(server.find_port, 20)
        return server

    yield start
    for server in servers:
        server.kill()
        if server.process.stderr:
            server.process.stderr.close()


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
