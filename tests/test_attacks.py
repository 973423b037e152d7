"""What strangers, slow terminals and a bad disk do to a server, all of it real.

What a request may not do is always the same: be counted though it was no clean GET of
a pixel, stop the server, leave something behind, write raw into the log. What nobody
may do is keep a pixel from being answered.
"""
from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import (
    PIXEL_START, UNCOMPILED, assert_nothing_raw, break_off, eventually, exchange, get,
    hits_of, in_pieces, linux, occupy, read_all, servers, status_of)
from mailtracker import Files, Lines, Making, add_tags, new_ids

# -- tools ------------------------------------------------------------------


def after_head(data):
    """Return data cut where the first head ends: what follows comes late."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return [piece for piece in (head + end, rest) if piece]


def cpu_seconds(server):
    """Return how long the server has used a processor."""
    stat = Path(f"/proc/{server.process.pid}/stat").read_text()
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# -- one server that takes the whole attack table ------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Start the server that all attacks of the table go to; its tag and hits."""
    folder = tmp_path_factory.mktemp("target")
    register = folder / "register.csv"
    tag, = new_ids(bytes(16))
    add_tags(Files(str(register)), [(tag, "")], Making("2026-11-20T12:00:00Z"))
    with servers(folder, folder) as start:
        yield start(), tag, lambda: hits_of(register, tag)


END = b"\r\n\r\n"
PIXEL = get(b"/TAG.gif")
CHUNKED = b"Transfer-Encoding: chunked"
NO_BODY = b"Content-Length: 0"
ODD_BLANKS = (b"\x0b", b"\x1c", b"\xa0", b"\x85", b"\t", b"  ", b"\r", b"\0", b" \t",
              b"\xc2\xa0")


def with_body(method, *headers, body=PIXEL):
    """Return a request that hides another one in its body."""
    lines = [method + b" /TAG.gif HTTP/1.1", b"Host: t.example.org", *headers]
    return b"\r\n".join(lines) + END + body


# What is sent, and TAG stands for the id; by the statuses it may get, 0 for none, and
# how many hits it is. Clean requests, so that a server which refuses everything fails.
ATTACKS = {((200,), 1): [
    PIXEL, PIXEL + PIXEL, b"GET /TAG.gif HTTP/1.0" + END,
    *(get(b"/TAG.gif", header) for header in (
        NO_BODY, b"!#$%: \xff\x01", b"Connection: keep-alive",
        b"Expect: 100-continue")),
    *map(get, (b"/TAG.gif?a=/b&c", b"/TAG/TAG.gif", b"http://t.example.org/TAG.gif",
               b"HTTPS://t.example.org:444/TAG.gif", b"//TAG.gif",
               b"//evil.example/TAG.gif")),
], ((200,), 0): [
    get(b"/health"), get(b"/health") + PIXEL, b"HEAD /TAG.gif HTTP/1.1" + END,
    b"HEAD /TAG.gif HTTP/1.1" + END + PIXEL,
    *map(get, (b"http://TAG.gif/x", b"/x?/TAG.gif", b"/TAGb.gif")),
], ((400,), 0): [
    # A second request in what is, or is not, the body of the first.
    *(with_body(b"GET", *headers) for headers in (
        [b"Content-Length: %d" % len(PIXEL)], [b"tRANSFER-eNCODING: Chunked"],
        [b"Transfer-Encoding: identity"], [b"Transfer-Encoding:"],
        [b"Transfer-Encoding : chunked"], [CHUNKED, NO_BODY],
        [b"X: a\x0b", b"Content-Length: 5"], [NO_BODY, b"Content-Length: 70"],
        [b"Content-Length: 70", NO_BODY], [b"Content-Length: 0, 70"])),
    *(with_body(b"GET", b"Content-Length: " + length) for length in (
        b"+5", b"1_0", b"-1", b"0x10", b"\xd9\xa5", b"5.0", b"", b"+0", b"00000",
        b"0\x0b", b"99999999999999999999")),
    with_body(b"GET", CHUNKED, body=b"0" + END + PIXEL),
    with_body(b"HEAD", b"Content-Length: 70"),
    # Heads that some server or proxy reads differently.
    *(get(b"/TAG.gif", *headers) for headers in (
        [b"Content-Length: 5"], [CHUNKED], [b"X: y", b"cONTENT-lENGTH:5"],
        [b"X: y", b" Content-Length: 5"], [b"X: y\nZ: z"], [b"X: y\rZ: z"], [b"X: \0"],
        [b": x"], [b"Cookie"], [b"X Y: z"])),
    *(b"GET%b/TAG.gif%bHTTP/1.1" % blanks + END for odd in ODD_BLANKS
      for blanks in ((odd, b" "), (b" ", odd), (odd, odd))),
    *(b"GET /TAG.gif " + version + END for version in (
        b"HTTP/2.0", b"HTTP/1.2", b"HTTP/01.1", b"HTTP/1.10", b"HTTP/1", b"http/1.1",
        b"HTTPS/1.1", b"HTTP/1.1x", b"ICY/1.0", b"HTTP/1.1 ", b"/TAG.gif HTTP/1.1")),
    b"GET /TAG.gif\r\n", b"GET /TAG.gif\r\nHost: x" + END,
    b" GET /TAG.gif HTTP/1.1" + END, b"\r\nGET /TAG.gif HTTP/1.1" + END,
    b"GET /TAG.gif HTTP/1.1\nHost: x\n\n", b"GET /TAG.gif HTTP/1.1\r\n X: y" + END,
    *map(get, (b"/\0/TAG.gif", b"/\x1b[2J/TAG.gif", b"/\x7f/TAG.gif",
               "/ü/TAG.gif".encode(), b"#/TAG.gif", b"TAG.gif", b"*",
               b"ftp://t.example.org/TAG.gif", b"http://t.example.org")),
    # Other languages.
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"SSH-2.0-OpenSSH_9.9\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.2 5 80\r\n" + PIXEL, bytes(100), END,
], ((0, 400), 0): [
    b"GET /TAG.gif", b"GET /TAG.gif HTTP/1.1\r\nHost: x\r\n",
    b"GET /TAG.gif HTTP/1.1\r\nHost: x\n\n",
], ((400, 405), 0): [
    *(with_body(b"POST", *headers) for headers in (
        [], [b"Content-Length: 70"], [b"Content-Length: 9999999"],
        [b"Content-Length: 70", b"Expect: 100-continue"])),
    with_body(b"POST", CHUNKED, body=b"0" + END + PIXEL),
    b"OPTIONS * HTTP/1.1" + END,
    *(method + b" /TAG.gif HTTP/1.1\r\nHost: x" + END for method in (
        b"OPTIONS", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"PATCH", b"PROPFIND",
        b"BREW", b"get", b"Get", b"GETT", b"G", b"M-SEARCH", b"__CLASS__", b"A" * 300,
        b"")),
], ((400, 431), 0): [
    get(b"/TAG.gif", b"X: " + b"a" * 70_000), get(b"/TAG.gif?" + b"a" * 65_536),
    get(b"/TAG.gif", *[b"X-%064d: a" % i for i in range(1000)]),
    b"GET /TAG.gif?" + b"a" * 70_000, b"A" * 70_000,
]}


@pytest.mark.parametrize("request_, statuses, hits", [
    pytest.param(request, *expected, id=repr(request[:70])[2:-1])
    for expected, requests in ATTACKS.items() for request in requests])
def test_only_a_clean_get_of_a_pixel_is_a_hit(target, request_, statuses, hits):
    server, tag, count = target
    before = count()
    data = request_.replace(b"TAG", tag.encode())
    cuts = [data], in_pieces(data), after_head(data)
    for answer in [exchange(server, *pieces) for pieces in cuts]:
        assert status_of(answer) in statuses
        assert answer.count(b"HTTP/1.1 ") <= 1
        assert (b"GIF89a" in answer) <= (status_of(answer) == 200)
    server.assert_unharmed()  # also makes sure that nothing is counted late
    assert count() - before == hits * len(cuts)
    assert_nothing_raw(server.log())


@pytest.mark.parametrize("path", ["/health?probe=1", "/health", "//health", "/health/"])
def test_an_answer_does_not_depend_on_how_the_request_is_cut(target, path):
    request = get(path.encode())
    assert exchange(target[0], request) == exchange(target[0], *in_pieces(request))


# -- connections that end badly, or never ------------------------------------


@linux
def test_nothing_is_left_behind_by_clients_that_break_off(tagged, many_sockets):
    server, tag = tagged()
    exchange(server, *in_pieces(get(b"/x.gif")))
    before = eventually(lambda: server.get("/health") and server.descriptors())
    threads = Path(f"/proc/{server.process.pid}/task")
    calm = len(os.listdir(threads))
    starts = [b"", b"G", b"GET /x", b"GET /x HTTP/1.1\r\nHost: x", b"\x16\x03\x01",
              b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc",
              b"GET / HTTP/1.1\r\n\r\n", b"x" * 20_000]
    for start in starts * 10:
        with server.connect() as client, contextlib.suppress(ConnectionError):
            client.sendall(start)
    break_off(server, starts * 10)
    server.hit(tag)
    server.assert_unharmed()
    assert len(os.listdir(threads)) == calm <= 4
    eventually(lambda: server.descriptors() <= before)


@linux
def test_half_open_and_dripping_clients_hold_up_nobody(tagged, many_sockets, tmp_path):
    server, tag = tagged()
    many_sockets.extend(server.connect() for _ in range(200))  # these stay silent
    occupy(server, many_sockets, 1000, b"GET /x.gif HTTP/1.1\r\nHost:")
    drips = [server.connect() for _ in range(50)]
    many_sockets.extend(drips)
    for letter in b"GET /slow.gif HTTP/1.1":
        for drip in drips:
            drip.sendall(bytes([letter]))
        server.hit(tag)
    assert hits_of(tmp_path / "register.csv", tag) == 22
    server.assert_unharmed()


def test_a_client_that_reads_late_still_gets_its_answer(tagged):
    server, tag = tagged()
    with server.connect() as client:
        client.sendall(with_body(b"POST", b"Content-Length: 60000", body=b"x" * 60_000))
        server.hit(tag)
        assert status_of(read_all(client)) == 405


# -- descriptors run out -------------------------------------------------------


@linux
def test_every_way_through_the_server_works_without_a_free_descriptor(
        tagged, many_sockets, tmp_path):
    server, tag = tagged("--trusted-proxy", "127.0.0.1")
    target = f"/{tag}.gif".encode()
    requests = {get(target): 200, get(b"/health"): 200,
                with_body(b"POST", b"Content-Length: 5", body=b"12345"): 405,
                get(target, b"X-Forwarded-For: 192.0.2.1"): 200}
    occupy(server, many_sockets, 3)
    clients = [server.connect() for _ in requests]
    many_sockets.extend(clients)
    for client, request in zip(clients, requests):
        client.sendall(request[:1])
    server.get("/x.gif")  # those who came before have been accepted
    server.limit("RLIMIT_NOFILE", min(server.descriptors() for _ in range(100)))
    for client, (request, status) in zip(clients, requests.items()):
        client.sendall(request[1:])
        assert status_of(read_all(client)) == status
    for _ in range(2):
        occupy(server, many_sockets, 200)
        server.hit(tag, 5)
    assert hits_of(tmp_path / "register.csv", tag) == 12
    server.assert_unharmed()


@linux
def test_no_processor_time_is_burnt_when_nothing_can_be_accepted(tagged):
    server, tag = tagged()
    server.limit("RLIMIT_NOFILE", 3)
    with server.connect() as client:
        client.sendall(get(f"/{tag}.gif".encode()))
        eventually(lambda: "cannot accept" in server.log())
        before = cpu_seconds(server)
        assert not select.select([client], [], [], 1.0)[0]  # the span to be measured
        assert cpu_seconds(server) - before < 0.25
        assert server.log().count("cannot accept") == 1
        server.limit("RLIMIT_NOFILE", 100)
        assert read_all(client).startswith(PIXEL_START)
    server.assert_unharmed()


@linux
def test_a_dropped_client_that_had_just_sent_something_harms_nobody(
        tagged, many_sockets):
    # Of events that arrive together the first, a new connection, may drop the client
    # of the second and take over its descriptor.
    server, tag = tagged(prefix=("sh", "-c", 'ulimit -n 100; exec "$@"', "sh"))
    occupy(server, many_sockets, 100)
    server.hit(tag)
    waiting = many_sockets[:]
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        occupy(server, many_sockets, 4)
        for client in waiting:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"ET")
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    server.hit(tag)
    server.assert_unharmed()


# -- processes and memory run out ------------------------------------------------


@linux
def test_a_server_that_cannot_start_a_thread_says_so_in_one_line(tracker):
    # A thread's stack is as large as the process's may grow: here more than there is.
    limits = 'ulimit -s 8000000; ulimit -v 4000000; exec "$@"'
    done = tracker("server", "--host", "127.0.0.1", "--port", 0, timeout=20,
                   prefix=("sh", "-c", limits, "sh"))
    assert done.returncode == 1
    assert re.fullmatch(r"mailtracker: error: [^\n]*new thread[^\n]*\n", done.stderr)


@linux
def test_a_server_with_little_memory_stays(tagged, many_sockets):
    server, tag = tagged()
    size = int(re.search(r"VmSize:\s+(\d+) kB", Path(
        f"/proc/{server.process.pid}/status").read_text())[1])
    server.limit("RLIMIT_AS", (size + 4096) * 1024)
    occupy(server, many_sockets, 400, b"GET /" + b"x" * 8000)
    server.hit(tag, 20)
    server.limit("RLIMIT_AS", None)
    server.assert_unharmed()


# -- lines for people ------------------------------------------------------------

HOSTILE = [
    "\x1b]0;owned\x07\x1b[2J", "a\r\nhit 0 forged\r\nb", "\n=1+1",
    "\u202egpj.exe\u2066\u200f", "\x9b31m\x7f\x85", "a\u2028b\u2029c", "=1+1", "'",
    "O'Neill, \"Jack\"; and sons", "日本語 é"]


def test_hostile_requests_leave_nothing_raw_in_the_lines(tagged):
    server, tag = tagged("--trusted-proxy", "127.0.0.1")
    for text in [t.encode() for t in HOSTILE] + [b"\x9b31m", b"\xff\0\r"]:
        exchange(server, get(b"/" + text + f"/{tag}.gif".encode()))
        exchange(server, get(f"/{tag}.gif".encode(), b"User-Agent: " + text,
                             b"X-Forwarded-For: " + text))
        exchange(server, get(f"/{tag}.gif".encode(), b"Referer: " + text,
                             b"X-Forwarded-For: fe80::1%" + text))
    server.assert_unharmed()
    assert server.stop() == 0
    assert_nothing_raw(server.log())
    for line in server.log().splitlines()[1:-1]:
        assert re.match(rf"\S+Z hit {tag} \d+ [0-9a-f.:]+ "
                        r"(human|proxy|machine|self|unknown) [a-z-]+( |$)", line)


def first_line(server, file):
    """Take the greeting from where a server's lines go, and the port from it."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(file, 1)
    server.port = int(re.search(rb"127\.0\.0\.1:(\d+)", line)[1])


@pytest.fixture(params=["terminal", "pipe"])
def reader(request):
    """Return the two ends of a terminal or pipe that a test reads as it likes."""
    import pty

    reading, writing = pty.openpty() if request.param == "terminal" else os.pipe()
    yield reading, writing
    for file in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(file)


def test_a_terminal_or_pipe_that_nobody_reads_holds_up_no_pixel_and_no_end(
        tagged, reader, tmp_path):
    reading, writing = reader
    server, tag = tagged(stderr=writing, wait=False)
    first_line(server, reading)
    server.hit(tag, 1500)
    assert hits_of(tmp_path / "register.csv", tag) == 1500
    start = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - start < 6


def test_lines_that_nobody_reads_are_dropped_and_counted(reader, monkeypatch):
    reading, writing = reader
    os.set_blocking(reading, False)
    monkeypatch.setattr(Lines, "MOST", 2000)
    lines = Lines()
    lines._file = writing
    text = b""

    def dropped():
        nonlocal text
        with contextlib.suppress(BlockingIOError):
            text += os.read(reading, 1 << 16)
        return re.search(rb"Z (\d+) lines dropped", text)

    with lines:
        for _ in range(6000):
            lines.line("a hit")
        assert int(eventually(dropped)[1]) + text.count(b"Z a hit") == 6000


def test_stderr_that_is_closed_stops_no_pixel(serve, newtags, tmp_path):
    tag, = newtags(tmp_path / "register.csv")
    server = serve(stderr=subprocess.PIPE, wait=False)
    first_line(server, server.process.stderr.fileno())
    server.process.stderr.close()
    server.hit(tag, 20)
    assert server.stop() == 0
    server = serve("--logfile", "log", wait=False,
                   prefix=("sh", "-c", 'exec "$@" 2>&-', "sh"))
    server.log_path = tmp_path / "log"
    eventually(lambda: server.log_path.exists() and server.find_port())
    server.hit(tag, 20)
    assert hits_of(tmp_path / "register.csv", tag) == 40
    assert server.stop() == 0


# -- a disk that refuses -----------------------------------------------------------


def health(server):
    """Return the status of /health and its text; fail if that tells of paths."""
    status, _, text = server.get("/health")
    assert b"/" not in text
    return status, text.decode()


def test_a_full_disk_is_told_and_takes_no_hit(serve, newtags, small_disk):
    register = small_disk / "register.csv"
    tags = newtags(register, 20)
    server = serve("--register", register, "--quiet")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    for tag in tags:
        server.hit(tag, 20)
    status, text = eventually(lambda: health(server)[0] == 503 and health(server))
    assert "event log: No space left on device" in text
    assert str(small_disk) in server.log()
    filler.unlink()
    eventually(lambda: health(server) == (200, "ok\n"))
    server.hit(tags[0])
    assert [hits_of(register, tag) for tag in tags] == [21] + [20] * 19


@linux
def test_writes_that_fail_again_and_again_lose_and_double_nothing(tagged, tmp_path):
    register = tmp_path / "register.csv"
    server, tag = tagged("--quiet", env=UNCOMPILED)
    log = tmp_path / "register.events.csv"
    for room in (0, 10, 60, 200, None) * 3:
        size = log.stat().st_size
        server.limit("RLIMIT_FSIZE", None if room is None else size + room)
        server.hit(tag, 10)
        if room is not None:
            eventually(lambda: health(server)[0] == 503)
    eventually(lambda: health(server)[0] == 200)
    assert hits_of(register, tag) == 150
    assert server.stop() == 0
    assert "Traceback" not in server.log()


def test_a_log_that_cannot_be_written_is_told_and_its_hits_wait(
        serve, newtags, tmp_path):
    places = []
    for name in ("directory", "FIFO", "gone"):
        folder = tmp_path / name
        folder.mkdir()
        tag, = newtags(folder / "register.csv")
        server = serve("--register", folder / "register.csv", "--quiet")
        server.hit(tag)
        places.append((server, tag, folder, folder / "register.events.csv"))
    for server, tag, folder, log in places:
        if folder.name == "gone":
            folder.rename(tmp_path / "away")
        else:
            log.unlink()
            (os.mkdir if folder.name == "directory" else os.mkfifo)(log)
        server.hit(tag)
    for server, tag, folder, log in places:
        eventually(lambda: health(server)[0] == 503)
        server.hit(tag, 150)
    (tmp_path / "away").rename(tmp_path / "gone")
    places[0][3].rmdir()
    places[1][3].unlink()
    for server, tag, folder, log in places:
        eventually(lambda: health(server)[0] == 200)
        server.hit(tag)
        # The first ones may have gone to the log that was deleted.
        lost = 153 - hits_of(folder / "register.csv", tag)
        assert 0 <= lost <= 2 * (folder.name != "gone")
        server.assert_unharmed()
