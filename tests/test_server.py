"""The pixel server under attack: hostile HTTP, TLS, proxies, signals and limits.

Everything is real: a server process, sockets on 127.0.0.1, certificates of openssl.
What a request may not do is always the same: be counted though it was no clean
GET of a pixel, stop the server, leave something behind, write raw into the log.
"""
from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import pytest

from conftest import SCRIPT
from conftest import Server
from conftest import clean_environment
from conftest import eventually
from conftest import register_rows

linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"),
                           reason="looks into /proc, which only Linux has")
PIXEL_START = b"HTTP/1.1 200 OK\r\nContent-Type: image/gif\r\n"


# -- tools ------------------------------------------------------------------


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


def in_pieces(data):
    """Return data cut into pieces: the server cannot see it whole at first."""
    middle = min(len(data) - 1, max(2, len(data) // 2))
    return data[:1], data[1:middle], data[middle:]


def after_head(data):
    """Return data cut where the first head ends: what follows comes late."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return [piece for piece in (head + end, rest) if piece]


def status_of(answer):
    """Return the status of an answer as a number; 0 for no answer."""
    if not answer:
        return 0
    found = re.match(rb"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z ]+\r\n", answer)
    assert found, f"no status line: {answer[:100]!r}"
    return int(found[1])


def get(target, *headers):
    """Return the bytes of a GET with headers."""
    lines = [b"GET " + target + b" HTTP/1.1", b"Host: t.example.org", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def reset(client):
    """Close a connection so that the other side gets a RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def assert_unharmed(server):
    """Fail unless the server runs, answers, and has logged no traceback."""
    assert server.process.poll() is None, server.log()
    status, _, body = server.get("/nobody.gif")
    assert (status, body[:6]) == (200, b"GIF89a")
    assert "Traceback" not in server.log()


def assert_nothing_raw(text):
    """Fail if a character could move a cursor, break a line or turn text around."""
    raw = [c for c in text if c != "\n" and unicodedata.category(c) in
           ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert raw == []


def hit_address(server, tag):
    """Return the client's address in the last line of a tag's hits."""
    return re.findall(rf"\bhit {tag} \d+ (\S+)", server.log())[-1]


def descriptors(server):
    """Return how many files and sockets the server has open."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def threads(server):
    """Return how many threads the server has."""
    return len(os.listdir(f"/proc/{server.process.pid}/task"))


def cpu_seconds(server):
    """Return how long the server has used a processor."""
    stat = Path(f"/proc/{server.process.pid}/stat").read_text()
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def limit_descriptors(server, most):
    """Set how many files and sockets the running server may have open."""
    import resource

    hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (most, hard))


def leave_no_descriptor(server):
    """Let the server open nothing more than it has open, calm as it is now."""
    server.get("/x.gif")  # those who came before have been accepted
    limit_descriptors(server, min(descriptors(server) for _ in range(100)))


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


def occupy(server, sockets, count):
    """Open connections that have sent the start of a head, and no more."""
    for _ in range(count):
        client = server.connect()
        sockets.append(client)
        with contextlib.suppress(ConnectionError):
            client.sendall(b"G")  # some systems wake nobody before there is a byte


@pytest.fixture
def tagged(serve, newtags, tmp_path):
    """Start a server on a register of one tag; return both."""
    def start(*args, **options):
        register = tmp_path / "register.csv"
        tag, = newtags(register)
        return serve("--register", register, *args, **options), tag
    return start


# -- one server that takes the whole attack table ------------------------------


class Target:
    """A server with one tag, and a count of its hits."""

    def __init__(self, server, register, tag):
        self.server, self.register, self.tag = server, register, tag

    def hits(self):
        """Return how often the tag stands counted in the register."""
        return int(register_rows(self.register)[self.tag]["hits"])


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Start the server that all attacks of the table go to."""
    folder = tmp_path_factory.mktemp("target")
    base = [sys.executable, str(SCRIPT)]
    made = subprocess.run([*base, "newtag", "--format", "url"], cwd=folder, check=True,
                          capture_output=True, text=True, timeout=60,
                          env=clean_environment())
    tag = made.stdout.strip().rpartition("/")[2].partition(".")[0]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*base, "server", "--host", "127.0.0.1", "--port",
                                    "0"], cwd=folder, stderr=log,
                                   env=clean_environment())
    server = Server(process, folder / "log")
    try:
        eventually(server.find_port, 20)
        yield Target(server, folder / "register.csv", tag)
    finally:
        server.kill()


PIXEL = get(b"/TAG.gif")
CHUNKED = b"Transfer-Encoding: chunked"


def with_body(method, *headers, body=PIXEL):
    """Return a request that hides another one in its body."""
    lines = [method + b" /TAG.gif HTTP/1.1", b"Host: t.example.org", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# What is sent (TAG stands for the id), the statuses it may get (0: none), and how
# many hits it is.
ATTACKS = {
    # Clean requests, so that a server which refuses everything fails too.
    "plain GET": (PIXEL, {200}, 1),
    "GET of HTTP/1.0 without headers": (b"GET /TAG.gif HTTP/1.0\r\n\r\n", {200}, 1),
    "GET with an empty body": (get(b"/TAG.gif", b"Content-Length: 0"), {200}, 1),
    "GET with a query": (get(b"/TAG.gif?a=/b&c"), {200}, 1),
    "GET with a strange but legal header": (get(b"/TAG.gif", b"!#$%: \xff\x01"),
                                            {200}, 1),
    "id named twice is one hit": (get(b"/TAG/TAG.gif"), {200}, 1),
    "keep-alive": (get(b"/TAG.gif", b"Connection: keep-alive"), {200}, 1),
    "absolute form": (get(b"http://t.example.org/TAG.gif"), {200}, 1),
    "absolute form of https": (get(b"HTTPS://t.example.org:444/TAG.gif"), {200}, 1),
    "two slashes": (get(b"//TAG.gif"), {200}, 1),
    "two slashes and a host": (get(b"//evil.example/TAG.gif"), {200}, 1),
    "GET expecting 100-continue": (get(b"/TAG.gif", b"Expect: 100-continue"), {200}, 1),
    # Smuggling: a second request in what is, or is not, the body of the first.
    "pipelined": (PIXEL + PIXEL, {200}, 1),
    "pipelined behind health": (get(b"/health") + PIXEL, {200}, 0),
    "pipelined behind HEAD": (b"HEAD /TAG.gif HTTP/1.1\r\n\r\n" + PIXEL, {200}, 0),
    "body of a GET": (with_body(b"GET", b"Content-Length: %d" % len(PIXEL)), {400}, 0),
    "body of a HEAD": (with_body(b"HEAD", b"Content-Length: 70"), {400}, 0),
    "body of a POST": (with_body(b"POST", b"Content-Length: 70"), {405}, 0),
    "unread body of a POST": (with_body(b"POST", b"Content-Length: 9999999"), {405}, 0),
    "POST without a length": (with_body(b"POST"), {405}, 0),
    "POST expecting 100-continue": (
        with_body(b"POST", b"Content-Length: 70", b"Expect: 100-continue"), {405}, 0),
    "chunked GET": (with_body(b"GET", CHUNKED, body=b"0\r\n\r\n" + PIXEL), {400}, 0),
    "chunked POST": (with_body(b"POST", CHUNKED, body=b"0\r\n\r\n" + PIXEL), {405}, 0),
    "chunked in odd case": (with_body(b"GET", b"tRANSFER-eNCODING: Chunked"), {400}, 0),
    "identity encoding": (with_body(b"GET", b"Transfer-Encoding: identity"), {400}, 0),
    "empty encoding": (with_body(b"GET", b"Transfer-Encoding:"), {400}, 0),
    "space before colon": (with_body(b"GET", b"Transfer-Encoding : chunked"), {400}, 0),
    "encoding and length": (with_body(b"GET", CHUNKED, b"Content-Length: 0"), {400}, 0),
    "length behind a VT": (
        with_body(b"GET", b"X: a\x0b", b"Content-Length: 5"), {400}, 0),
    "length without a body": (get(b"/TAG.gif", b"Content-Length: 5"), {400}, 0),
    "chunked without a body": (get(b"/TAG.gif", CHUNKED), {400}, 0),
    "odd case without a body": (get(b"/TAG.gif", b"X: y", b"cONTENT-lENGTH:5"),
                                {400}, 0),
    "two lengths": (
        with_body(b"GET", b"Content-Length: 0", b"Content-Length: 70"), {400}, 0),
    "two lengths, last one 0": (
        with_body(b"GET", b"Content-Length: 70", b"Content-Length: 0"), {400}, 0),
    "two lengths in one": (with_body(b"GET", b"Content-Length: 0, 70"), {400}, 0),
    **{f"length {length!r}": (
        with_body(b"GET", b"Content-Length: " + length), {400}, 0)
        for length in (b"+5", b"1_0", b"-1", b"0x10", b"\xd9\xa5", b"5.0", b"", b"+0",
                       b"00000", b"99999999999999999999")},
    # Heads that some server or proxy reads differently.
    "HTTP/0.9": (b"GET /TAG.gif\r\n", {400}, 0),
    "HTTP/0.9 with headers": (b"GET /TAG.gif\r\nHost: x\r\n\r\n", {400}, 0),
    "HTTP/0.9 without line end": (b"GET /TAG.gif", {0, 400}, 0),
    "half a head": (b"GET /TAG.gif HTTP/1.1\r\nHost: x\r\n", {0, 400}, 0),
    **{f"{place} separator {separator!r}": (
        b"GET%b/TAG.gif%bHTTP/1.1\r\n\r\n" % (
            separator if place != "second" else b" ",
            separator if place != "first" else b" "), {400}, 0)
        for place in ("first", "second", "each")
        for separator in (b"\x0b", b"\x1c", b"\xa0", b"\x85", b"\t", b"  ", b"\r",
                          b"\0", b" \t", b"\xc2\xa0")},
    "space in front": (b" GET /TAG.gif HTTP/1.1\r\n\r\n", {400}, 0),
    "empty line in front": (b"\r\nGET /TAG.gif HTTP/1.1\r\n\r\n", {400}, 0),
    "space behind": (b"GET /TAG.gif HTTP/1.1 \r\n\r\n", {400}, 0),
    "four words": (b"GET /TAG.gif /TAG.gif HTTP/1.1\r\n\r\n", {400}, 0),
    **{f"version {version.decode()}": (
        b"GET /TAG.gif " + version + b"\r\n\r\n", {400}, 0)
        for version in (b"HTTP/2.0", b"HTTP/1.2", b"HTTP/01.1", b"HTTP/1.10", b"HTTP/1",
                        b"http/1.1", b"HTTPS/1.1", b"HTTP/1.1x", b"ICY/1.0")},
    "bare LF": (b"GET /TAG.gif HTTP/1.1\nHost: x\n\n", {400}, 0),
    "bare LF between headers": (get(b"/TAG.gif", b"X: y\nZ: z"), {400}, 0),
    "bare LF at the end": (b"GET /TAG.gif HTTP/1.1\r\nHost: x\n\n", {0, 400}, 0),
    "bare CR between headers": (get(b"/TAG.gif", b"X: y\rZ: z"), {400}, 0),
    "folded header": (get(b"/TAG.gif", b"X: y", b" Content-Length: 5"), {400}, 0),
    "folded first header": (b"GET /TAG.gif HTTP/1.1\r\n X: y\r\n\r\n", {400}, 0),
    "NUL in the path": (get(b"/\0/TAG.gif"), {400}, 0),
    "NUL in a header": (get(b"/TAG.gif", b"X: \0"), {400}, 0),
    "header without a name": (get(b"/TAG.gif", b": x"), {400}, 0),
    "header without a colon": (get(b"/TAG.gif", b"Cookie"), {400}, 0),
    "header name with a space": (get(b"/TAG.gif", b"X Y: z"), {400}, 0),
    "ESC in the path": (get(b"/\x1b[2J/TAG.gif"), {400}, 0),
    "DEL in the path": (get(b"/\x7f/TAG.gif"), {400}, 0),
    "UTF-8 in the path": (get("/ü/TAG.gif".encode()), {400}, 0),
    "fragment hides the path": (get(b"#/TAG.gif"), {400}, 0),
    "target without a slash": (get(b"TAG.gif"), {400}, 0),
    "asterisk": (get(b"*"), {400}, 0),
    "other scheme": (get(b"ftp://t.example.org/TAG.gif"), {400}, 0),
    "absolute form without a path": (get(b"http://t.example.org"), {400}, 0),
    "absolute form with the id as host": (get(b"http://TAG.gif/x"), {200}, 0),
    "id in the query only": (get(b"/x?/TAG.gif"), {200}, 0),
    "id with a letter more": (get(b"/TAGb.gif"), {200}, 0),
    "health": (get(b"/health"), {200}, 0),
    # Methods.
    "HEAD": (b"HEAD /TAG.gif HTTP/1.1\r\n\r\n", {200}, 0),
    **{f"method {method.decode()}": (
        method + b" /TAG.gif HTTP/1.1\r\nHost: x\r\n\r\n", {400, 405}, 0)
        for method in (b"OPTIONS", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"PATCH",
                       b"PROPFIND", b"BREW", b"get", b"Get", b"GETT", b"G", b"M-SEARCH",
                       b"__CLASS__", b"A" * 300, b"")},
    "OPTIONS of everything": (b"OPTIONS * HTTP/1.1\r\n\r\n", {405}, 0),
    # Too much.
    "header of 70 KB": (get(b"/TAG.gif", b"X: " + b"a" * 70_000), {431}, 0),
    "1,000 headers": (get(b"/TAG.gif", *[b"X-%064d: a" % i for i in range(1000)]),
                      {431}, 0),
    "request line of 64 KB": (get(b"/TAG.gif?" + b"a" * 65_536), {414, 431}, 0),
    "70 KB without an end": (b"GET /TAG.gif?" + b"a" * 70_000, {414, 431}, 0),
    "method of 70 KB": (b"A" * 70_000, {400, 431}, 0),
    # Other languages.
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
                  {400}, 0),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}, 0),
    "SSH": (b"SSH-2.0-OpenSSH_9.9\r\n", {400}, 0),
    "PROXY protocol": (b"PROXY TCP4 192.0.2.1 192.0.2.2 5 80\r\n" + PIXEL, {400}, 0),
    "zeros": (bytes(100), {400}, 0),
    "nothing": (b"\r\n\r\n", {400}, 0),
}


@pytest.mark.parametrize("cut", [lambda data: [data], in_pieces, after_head],
                         ids=["at once", "in pieces", "body late"])
@pytest.mark.parametrize("request_, statuses, hits", list(ATTACKS.values()),
                         ids=list(ATTACKS))
def test_only_a_clean_get_of_a_pixel_is_a_hit(target, request_, statuses, hits, cut):
    data = request_.replace(b"TAG", target.tag.encode())
    before = target.hits()
    answer = exchange(target.server, *cut(data))
    assert_unharmed(target.server)  # also makes sure that nothing is counted late
    assert status_of(answer) in statuses
    assert target.hits() - before == hits
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert (b"GIF89a" in answer) <= (status_of(answer) == 200)
    assert_nothing_raw(target.server.log())


@pytest.mark.parametrize("path", ["/health?probe=1", "/health", "//health", "/health/"])
def test_an_answer_does_not_depend_on_how_the_request_is_cut(target, path):
    request = get(path.encode())
    assert exchange(target.server, request) \
        == exchange(target.server, *in_pieces(request))


def test_known_unknown_and_malformed_ids_get_the_same_answer(target):
    unknown = target.tag[:-1] + ("b" if target.tag[-1] != "b" else "c")
    paths = [f"/{target.tag}.gif", f"/{unknown}.gif", f"/{'0a' * 20}.png",
             f"/{target.tag.upper()}.gif", f"/{target.tag}/{unknown}", "/x.gif", "/",
             "/../../etc/passwd", "/%00", "/" + "b" * 5000, f"/{target.tag}"]
    requests = [get(path.encode()) for path in paths]
    at_once = {exchange(target.server, request) for request in requests}
    slowly = {exchange(target.server, *in_pieces(request)) for request in requests}
    assert len(at_once) == 1
    assert slowly == at_once


def test_the_pixel_may_not_be_cached_and_names_no_software(target):
    status, headers, body = target.server.get(f"/{target.tag}.gif")
    assert status == 200
    assert body[:6] == b"GIF89a" and body[-1:] == b";"
    assert {name.lower(): value for name, value in headers.items()} == {
        "content-type": "image/gif", "content-length": str(len(body)),
        "cache-control": "no-store, no-cache, must-revalidate, max-age=0, private",
        "pragma": "no-cache", "expires": "0", "x-content-type-options": "nosniff",
        "x-robots-tag": "noindex", "connection": "close"}


def test_head_gets_the_head_of_the_pixel_and_nothing_behind_it(target):
    whole = exchange(target.server, get(b"/x.gif"))
    head = exchange(target.server, b"HEAD /x.gif HTTP/1.1\r\n\r\n")
    assert head == whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def test_other_methods_are_told_which_are_allowed(target):
    status, headers, body = target.server.request("DELETE", f"/{target.tag}.gif")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert b"DELETE" not in body


# -- connections that end badly, or never ------------------------------------


@linux
def test_nothing_is_left_behind_by_clients_that_break_off(tagged, many_sockets):
    server, tag = tagged()
    exchange(server, *in_pieces(get(b"/x.gif")))
    before = eventually(lambda: server.get("/health") and descriptors(server))
    calm = threads(server)
    parts = [b"", b"G", b"GET /x", b"GET /x HTTP/1.1\r\nHost: x", b"\x16\x03\x01",
             b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc",
             b"GET / HTTP/1.1\r\n\r\n", b"x" * 20_000]
    for number in range(200):
        client = server.connect()
        with contextlib.suppress(ConnectionError):
            client.sendall(parts[number % len(parts)])
        (reset if number % 3 else socket.socket.close)(client)
    server.hit(tag)
    assert_unharmed(server)
    assert threads(server) == calm
    eventually(lambda: descriptors(server) <= before)


@linux
def test_a_connection_that_was_reset_before_it_was_accepted_harms_nobody(tagged):
    server, tag = tagged()
    os.kill(server.process.pid, signal.SIGSTOP)
    for data in (b"", b"GET", get(b"/x.gif")):
        client = server.connect()
        client.sendall(data)
        reset(client)
    os.kill(server.process.pid, signal.SIGCONT)
    server.hit(tag)
    assert_unharmed(server)


@linux
def test_half_open_and_dripping_clients_hold_up_nobody(tagged, many_sockets, tmp_path):
    server, tag = tagged()
    many_sockets.extend(server.connect() for _ in range(200))  # these stay silent
    for _ in range(1000):
        many_sockets.append(server.connect())
        many_sockets[-1].sendall(b"GET /x.gif HTTP/1.1\r\nHost:")
    drips = [server.connect() for _ in range(50)]
    many_sockets.extend(drips)
    for letter in b"GET /slow.gif HTTP/1.1":
        for drip in drips:
            drip.sendall(bytes([letter]))
        server.hit(tag)
        assert threads(server) <= 32
    assert register_rows(tmp_path / "register.csv")[tag]["hits"] == "0000000022"
    assert_unharmed(server)


def test_heads_that_trickle_in_are_dropped_after_five_seconds(tagged, tmp_path):
    server, tag = tagged()
    head = iter(get(f"/{tag}.gif".encode(), b"X: " + b"x" * 200))
    with server.connect() as drip, server.connect() as still:
        still.sendall(b"GET /x.gif HTTP/1.1\r\n")
        for _ in range(48):  # 12 s, far less than the head takes
            if select.select([drip], [], [], 0.25)[0]:
                break
            with contextlib.suppress(ConnectionError):
                drip.sendall(bytes([next(head)]))
        else:
            pytest.fail("the server waits for the head for ever")
        assert status_of(read_all(drip)) in (0, 408)
        assert status_of(read_all(still)) in (0, 408)
    assert_unharmed(server)
    assert int(register_rows(tmp_path / "register.csv")[tag]["hits"]) == 0


def test_a_client_that_reads_late_still_gets_its_answer(tagged):
    server, tag = tagged()
    with server.connect() as client:
        client.sendall(with_body(b"POST", b"Content-Length: 60000", body=b"x" * 60_000))
        server.hit(tag)
        assert status_of(read_all(client)) == 405


# -- descriptors run out -------------------------------------------------------


@linux
def test_a_normal_client_is_served_while_descriptors_are_exhausted(
        tagged, many_sockets, tmp_path):
    server, tag = tagged()
    limit_descriptors(server, descriptors(server) + 20)
    occupy(server, many_sockets, 200)
    server.hit(tag, 5)
    occupy(server, many_sockets, 100)
    server.hit(tag, 5)
    assert int(register_rows(tmp_path / "register.csv")[tag]["hits"]) == 10
    assert_unharmed(server)


@linux
def test_the_first_slow_client_is_served_with_the_last_descriptor(tagged, many_sockets):
    server, tag = tagged()
    occupy(server, many_sockets, 8)
    leave_no_descriptor(server)
    many_sockets[0].sendall(get(f"/{tag}.gif".encode())[1:])
    assert read_all(many_sockets[0]).startswith(PIXEL_START)
    assert_unharmed(server)


@linux
@pytest.mark.parametrize("request_, status", [
    (with_body(b"POST", b"Content-Length: 5", body=b"12345"), 405),
    (get(b"/x.gif", b"X-Forwarded-For: 192.0.2.1"), 200),
    (get(b"/health"), 200),
], ids=["body", "forwarded", "health"])
def test_every_way_through_the_server_works_without_a_free_descriptor(
        tagged, many_sockets, request_, status):
    server, tag = tagged("--trusted-proxy", "127.0.0.1")
    occupy(server, many_sockets, 3)
    many_sockets.append(server.connect())
    many_sockets[-1].sendall(request_[:1])
    leave_no_descriptor(server)
    many_sockets[-1].sendall(request_[1:].replace(b"/x", f"/{tag}".encode()))
    assert status_of(read_all(many_sockets[-1])) == status
    assert_unharmed(server)


@linux
def test_a_save_while_descriptors_are_exhausted_loses_no_hit(
        tagged, many_sockets, tmp_path):
    register = tmp_path / "register.csv"
    server, tag = tagged()
    server.hit(tag)
    many_sockets.extend(server.connect() for _ in range(8))
    for client in many_sockets:
        client.sendall(get(f"/{tag}.gif".encode())[:-2])
    leave_no_descriptor(server)
    shutil.copy(register, tmp_path / "copy.csv")
    os.replace(tmp_path / "copy.csv", register)
    for client in many_sockets[:4]:
        client.sendall(b"\r\n")
        assert read_all(client).startswith(PIXEL_START)
    limit_descriptors(server, 200)
    for client in many_sockets[4:]:
        client.sendall(b"\r\n")
        assert read_all(client).startswith(PIXEL_START)
    eventually(lambda: server.get("/health")[0] == 200)
    assert int(register_rows(register)[tag]["hits"]) == 9
    assert_unharmed(server)


@linux
def test_no_processor_time_is_burnt_when_nothing_can_be_accepted(tagged):
    server, tag = tagged()
    limit_descriptors(server, 3)
    with server.connect() as client:
        client.sendall(get(f"/{tag}.gif".encode()))
        eventually(lambda: "cannot accept" in server.log())
        before = cpu_seconds(server)
        quiet = select.select([client], [], [], 2.0)[0]  # the span that is measured
        assert quiet == []
        assert cpu_seconds(server) - before < 0.5
        assert server.log().count("cannot accept") == 1
        limit_descriptors(server, 100)
        assert read_all(client).startswith(PIXEL_START)
    assert_unharmed(server)


@linux
def test_the_server_stops_cleanly_when_nothing_can_be_accepted(tagged):
    server, _ = tagged()
    limit_descriptors(server, 3)
    with server.connect() as client:
        client.sendall(b"G")
        eventually(lambda: "cannot accept" in server.log())
        assert server.stop() == 0
    assert "Traceback" not in server.log()


@linux
@pytest.mark.parametrize("most", [24, 64, 70])
def test_a_server_with_few_descriptors_serves_all_the_same(tagged, many_sockets, most):
    server, tag = tagged(prefix=("sh", "-c", f'ulimit -n {most}; exec "$@"', "sh"))
    occupy(server, many_sockets, 100)
    server.hit(tag, 3)
    assert_unharmed(server)


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
    assert_unharmed(server)


# -- the register's folder ------------------------------------------------------


@linux
def test_a_folder_that_goes_away_stops_no_pixel_and_is_counted_when_it_is_back(
        serve, newtags, tmp_path):
    folder, away = tmp_path / "data", tmp_path / "away"
    folder.mkdir()
    tag, = newtags(folder / "register.csv")
    server = serve("--register", folder / "register.csv")
    server.hit(tag)
    folder.rename(away)
    server.hit(tag)
    eventually(lambda: server.get("/health")[0] == 503)
    server.hit(tag)
    away.rename(folder)
    eventually(lambda: server.get("/health")[0] == 200)
    server.hit(tag)
    assert int(register_rows(folder / "register.csv")[tag]["hits"]) == 4
    assert_unharmed(server)


# -- hostile text --------------------------------------------------------------

HOSTILE = {
    "escape sequence": "\x1b]0;owned\x07\x1b[2J",
    "CR and LF": "a\r\nhit 0 forged\r\nb",
    "line feed first": "\n=1+1",
    "bidi marks": "\u202egpj.exe\u2066\u200f",
    "C1 and DEL": "\x9b31m\x7f\x85",
    "line separators": "a\u2028b\u2029c",
    "formula": "=HYPERLINK(\"http://evil.example\";\"x\")",
    "formula with plus": "+1+cmd|' /C calc'!A0",
    "formula with minus": "-1",
    "formula with at": "@SUM(A1)",
    "formula behind a tab": "\t=1",
    "full-width formula": "＝1+1",
    "quoted formula": "'=1+1",
    "twice quoted formula": "''=1+1",
    "an apostrophe": "'",
    "an Irish name": "O'Neill, \"Jack\"; and sons",
    "not a formula": "'tis",
    "wide": "日本語 👩‍👩‍👧 é",
    "spaces": "  x  ",
}


@pytest.mark.parametrize("name", list(HOSTILE.values()), ids=list(HOSTILE))
def test_hostile_names_are_never_raw_in_a_table_and_never_lost_in_csv(
        tracker, newtags, tmp_path, name):
    register = tmp_path / "register.csv"
    tag, = newtags(register, name=name)
    table = tracker("dump", register)
    joiners = str.maketrans("", "", "\u200c\u200d")  # they shape letters, no more
    assert_nothing_raw(table.stdout.translate(joiners))
    assert len(table.stdout.splitlines()) == 3
    with open(tmp_path / "dump.csv", "wb") as saved:
        done = tracker("dump", register, "--format", "csv", stdout=saved)
    assert done.returncode == 0
    text = (tmp_path / "dump.csv").read_bytes().decode()
    row, = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    cell = row["name"]
    assert not cell.startswith(tuple("=+-@\t\r\n＝＋－＠"))
    quoted = re.match("'+[=+\\-@\t\r\n＝＋－＠]", cell)
    assert (cell[1:] if quoted else cell) == name
    assert row["id"] == tag


def test_hostile_requests_leave_nothing_raw_in_the_log(tagged):
    server, tag = tagged("--trusted-proxy", "127.0.0.1")
    texts = [t.encode("utf-8") for t in HOSTILE.values()] + [b"\x9b31m", b"\xff\0\r"]
    for text in texts:
        exchange(server, get(b"/" + text + f"/{tag}.gif".encode()))
        exchange(server, get(f"/{tag}.gif".encode(), b"User-Agent: " + text,
                             b"X-Forwarded-For: " + text))
        exchange(server, get(f"/{tag}.gif".encode(), b"Referer: " + text,
                             b"X-Forwarded-For: fe80::1%" + text))
    assert_unharmed(server)
    assert_nothing_raw(server.log())
    for line in server.log().splitlines()[1:]:
        assert re.match(rf"\S+Z hit {tag} \d+ [0-9a-f.:]+ "
                        r"(human|proxy|machine|self|unknown) [a-z-]+( |$)", line)


# -- proxies ---------------------------------------------------------------------

TRUSTED = ("--trusted-proxy", "127.0.0.0/8", "--trusted-proxy", "10.0.0.1",
           "--trusted-proxy", "2001:db8::/32")


@pytest.mark.parametrize("trusted, headers, address", [
    ((), ["203.0.113.5"], "127.0.0.1"),
    (("--trusted-proxy", "10.0.0.0/8"), ["203.0.113.5"], "127.0.0.1"),
    (TRUSTED, [], "127.0.0.1"),
    (TRUSTED, ["203.0.113.5"], "203.0.113.5"),
    (TRUSTED, ["1.1.1.1, 203.0.113.5"], "203.0.113.5"),
    (TRUSTED, ["1.1.1.1, 203.0.113.5, 10.0.0.1"], "203.0.113.5"),
    (TRUSTED, ["1.1.1.1, 203.0.113.5,2001:db8::7 ,  10.0.0.1"], "203.0.113.5"),
    (TRUSTED, ["1.1.1.1", "203.0.113.5"], "203.0.113.5"),
    (TRUSTED, ["203.0.113.5", "10.0.0.1"], "203.0.113.5"),
    (TRUSTED, ["2001:4860::1"], "2001:4860::1"),
    (TRUSTED, ["::ffff:203.0.113.5"], "203.0.113.5"),
    (TRUSTED, ["203.0.113.5, ::ffff:10.0.0.1"], "203.0.113.5"),
    (TRUSTED, ["203.0.113.5, nonsense"], "127.0.0.1"),
    (TRUSTED, ["203.0.113.5, nonsense, 10.0.0.1"], "10.0.0.1"),
    (TRUSTED, ["", "10.0.0.1"], "10.0.0.1"),
    (TRUSTED, [","], "127.0.0.1"),
], ids=["nobody trusted", "other network", "no header", "one", "spoofed left",
        "chain", "chain of both families", "spoofed header", "two headers", "IPv6",
        "mapped", "mapped proxy", "nonsense", "nonsense behind a proxy", "empty",
        "comma"])
def test_forwarded_addresses_are_believed_from_the_right_and_of_proxies_only(
        tagged, trusted, headers, address):
    server, tag = tagged("--keep-address", "full", *trusted)
    lines = [b"X-Forwarded-For: " + header.encode() for header in headers]
    request = get(f"/{tag}.gif".encode(), *lines)
    for pieces in ([request], in_pieces(request)):
        exchange(server, *pieces)
        assert hit_address(server, tag) == address


def test_a_header_that_only_looks_forwarded_is_not_believed(tagged):
    server, tag = tagged("--trusted-proxy", "127.0.0.1", "--keep-address", "full")
    exchange(server, get(f"/{tag}.gif?X-Forwarded-For:1.1.1.1".encode(),
                         b"X: X-Forwarded-For: 1.1.1.1", b"AX-Forwarded-For: 1.1.1.1",
                         b"X-Forwarded-Forx: 1.1.1.1"))
    assert hit_address(server, tag) == "127.0.0.1"


def test_a_proxy_that_is_no_address_is_a_usage_error(tracker):
    done = tracker("server", "--trusted-proxy", "example.org")
    assert done.returncode == 2
    assert "not an address or network" in done.stderr


# -- TLS ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Return (certificate, key) of two self-signed pairs, and an encrypted key."""
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


class SecureServer:
    """A server that was started with a certificate which can be exchanged."""

    def __init__(self, folder, certificates):
        self.files = [folder / "cert.pem", folder / "key.pem"]
        self._certificates = certificates
        self.options = ("--tls-cert", self.files[0], "--tls-key", self.files[1])
        self.put("first.pem", 0)
        self.put("first.key", 1)

    def put(self, name, place):
        """Put a certificate (place 0) or key (1) where the server looks for it."""
        draft = self.files[place].with_suffix(".new")
        shutil.copy(self._certificates / name, draft)
        os.replace(draft, self.files[place])

    def connect(self, server, name):
        """Return a TLS connection that trusts one certificate only."""
        context = ssl.create_default_context(cafile=self._certificates / f"{name}.pem")
        return context.wrap_socket(server.connect(), server_hostname="127.0.0.1")

    def shows(self, server, name):
        """Tell whether the server shows a certificate."""
        try:
            with self.connect(server, name):
                return True
        except ssl.SSLCertVerificationError:
            return False


@pytest.fixture
def secure(certificates, tmp_path):
    return SecureServer(tmp_path, certificates)


def test_pixels_are_served_over_tls(tagged, secure, tmp_path):
    server, tag = tagged(*secure.options)
    assert "serving pixels on https://" in server.log()
    request = get(f"/{tag}.gif".encode())
    for pieces in ([request], in_pieces(request), [request + request]):
        with secure.connect(server, "first") as client:
            for piece in pieces:
                client.sendall(piece)
            answer = read_all(client)
            assert answer.startswith(PIXEL_START) and answer.endswith(b";")
    assert int(register_rows(tmp_path / "register.csv")[tag]["hits"]) == 3
    with secure.connect(server, "first") as client:
        client.sendall(get(b"/x", b"X: " + b"x" * 20_000))
        assert status_of(read_all(client)) == 431


def test_a_silent_tls_client_holds_up_nobody(tagged, secure, many_sockets):
    server, tag = tagged(*secure.options)
    for start in (b"", b"\x16", b"\x16\x03\x01\x02\x00\x01") * 20:
        many_sockets.append(server.connect())
        many_sockets[-1].sendall(start)
    with secure.connect(server, "first") as client:
        client.sendall(get(f"/{tag}.gif".encode()))
        assert read_all(client).startswith(PIXEL_START)
    assert read_all(many_sockets[1]) == b""  # dropped, after 5 seconds
    assert "Traceback" not in server.log()


@linux
@pytest.mark.parametrize("data", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"],
                         ids=["nothing", "hello", "plain text"])
def test_a_tls_client_that_breaks_off_harms_nobody(tagged, secure, data):
    server, tag = tagged(*secure.options)
    with secure.connect(server, "first") as client:
        client.sendall(get(b"/x.gif"))
        read_all(client)
    before = descriptors(server)
    for _ in range(20):
        client = server.connect()
        client.sendall(data)
        reset(client)
    os.kill(server.process.pid, signal.SIGSTOP)  # reset before it is accepted
    for _ in range(3):
        client = server.connect()
        client.sendall(data)
        reset(client)
    os.kill(server.process.pid, signal.SIGCONT)
    with server.connect() as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert b"HTTP/1.1 200" not in read_all(client)
    with secure.connect(server, "first") as client:
        client.sendall(get(f"/{tag}.gif".encode()))
        assert read_all(client).startswith(PIXEL_START)
    assert server.process.poll() is None
    assert "Traceback" not in server.log()
    eventually(lambda: descriptors(server) <= before)


def test_a_renewed_certificate_is_picked_up_without_a_restart(tagged, secure):
    server, _ = tagged(*secure.options)
    assert secure.shows(server, "first")
    secure.put("second.pem", 0)  # its key comes later, as some tools do it
    eventually(lambda: "not renewed" in server.log())
    assert secure.shows(server, "first")
    secure.put("second.key", 1)
    eventually(lambda: secure.shows(server, "second"))
    assert server.process.poll() is None
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("cert, key", [
    ("missing.pem", "first.key"), ("first.pem", "missing.key"),
    ("garbage.pem", "first.key"), ("first.pem", "garbage.pem"),
    ("first.pem", "second.key"), ("first.pem", "locked.key"), (".", "first.key"),
], ids=["no certificate", "no key", "garbage", "garbage key", "another's key",
        "locked key", "folder"])
def test_a_bad_certificate_is_one_clear_line(tracker, certificates, cert, key):
    done = tracker("server", "--port", 0, "--host", "127.0.0.1", timeout=20,
                   *("--tls-cert", certificates / cert),
                   *("--tls-key", certificates / key))
    assert_one_error(done, "certificate")


def test_a_certificate_without_its_key_is_a_usage_error(tracker, certificates):
    done = tracker("server", "--tls-cert", certificates / "first.pem")
    assert done.returncode == 2


# -- starting ----------------------------------------------------------------------


def assert_one_error(done, words):
    """Fail unless a command ended with one line for its user, and exit code 1."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"mailtracker: error: [^\n]+\n", done.stderr)
    assert re.search(words, done.stderr), done.stderr


def test_a_busy_port_is_one_clear_line(tracker, serve):
    server = serve()
    done = tracker("server", "--host", "127.0.0.1", "--port", server.port, timeout=20)
    assert_one_error(done, f"port {server.port} is in use")


def test_a_privileged_port_is_one_clear_line(tracker):
    first = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if not first.exists() or int(first.read_text()) <= 81:
        pytest.skip("everybody may use every port here")
    prefix = ()
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may use every port, and there is no setpriv to forbid it")
        prefix = ("setpriv", "--bounding-set", "-net_bind_service")
    done = tracker("server", "--host", "127.0.0.1", "--port", 81, timeout=20,
                   prefix=prefix)
    assert_one_error(done, "port 81")


@pytest.mark.parametrize("host", [
    "no.such.host.invalid", "192.0.2.1", "300.1.1.1", "2001:db8::1", ".", "a..b",
    "x" * 70, "ä..b", "\x1b[31m", "[::1]:80"],
    ids=["unknown", "not ours", "no address", "not ours, IPv6", "dot", "two dots",
         "too long", "international", "escape", "URL"])
def test_a_bad_host_is_one_clear_line(tracker, host):
    done = tracker("server", "--host", host, "--port", 0, timeout=20)
    assert_one_error(done, "cannot listen on|not an address")
    assert_nothing_raw(done.stderr)


def test_the_default_host_serves_both_families(tagged):
    server, tag = tagged("--keep-address", "full", host="")
    try:
        client = socket.create_connection(("::1", server.port), timeout=10)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with client:
        client.sendall(get(f"/{tag}.gif".encode()))
        assert read_all(client).startswith(PIXEL_START)
    assert hit_address(server, tag) == "::1"
    server.hit(tag)
    assert hit_address(server, tag) == "127.0.0.1"


@pytest.mark.parametrize("abstract", [
    False, pytest.param(True, marks=linux)], ids=["path", "abstract"])
def test_systemd_hears_that_the_server_is_ready(serve, abstract):
    with tempfile.TemporaryDirectory() as folder, \
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        path = f"{folder}/notify"
        notify.bind("\0" + path if abstract else path)
        notify.settimeout(20)
        server = serve(wait=False,
                       env={"NOTIFY_SOCKET": "@" + path if abstract else path})
        assert b"READY=1" in notify.recv(4096).split(b"\n")
        assert server.find_port()  # it listened before it said so
        assert_unharmed(server)


def test_a_notify_socket_that_is_gone_stops_nobody(serve, tmp_path):
    assert_unharmed(serve(env={"NOTIFY_SOCKET": str(tmp_path / "gone")}))


def test_quiet_writes_no_line_for_a_hit(tagged):
    server, tag = tagged("--quiet")
    server.hit(tag)
    assert tag not in server.log()


# -- stopping ---------------------------------------------------------------------


def is_open(server):
    """Tell whether the server takes new connections."""
    try:
        server.connect().close()
    except ConnectionError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT],
                         ids=["SIGTERM", "SIGINT"])
def test_a_request_under_way_is_finished_before_the_server_stops(
        tagged, tmp_path, number):
    server, tag = tagged()
    with server.connect() as client:
        client.sendall(f"GET /{tag}.gif HTTP/1.1\r\nHo".encode())
        server.get("/health")  # the first half has been read
        server.process.send_signal(number)
        eventually(lambda: not is_open(server))
        client.sendall(b"st: x\r\n\r\n")
        assert read_all(client).startswith(PIXEL_START)
    assert server.process.wait(20) == 0
    assert int(register_rows(tmp_path / "register.csv")[tag]["hits"]) == 1
    assert "Traceback" not in server.log()


@linux
def test_what_waits_in_the_backlog_is_answered_before_the_server_stops(
        tagged, tmp_path):
    server, tag = tagged()
    os.kill(server.process.pid, signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(40)]
        for client in clients:
            client.sendall(get(f"/{tag}.gif".encode()))
        server.process.send_signal(signal.SIGTERM)
        os.kill(server.process.pid, signal.SIGCONT)
        for client in clients:
            assert read_all(client).startswith(PIXEL_START)
    assert server.process.wait(20) == 0
    assert int(register_rows(tmp_path / "register.csv")[tag]["hits"]) == 40


def test_a_client_that_never_finishes_holds_the_end_up_for_5_seconds_at_most(tagged):
    server, _ = tagged()
    with server.connect() as client:
        client.sendall(b"GET /x")
        server.get("/health")
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 7
        assert read_all(client) == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT],
                         ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_server_at_once(tagged, tmp_path, number):
    server, tag = tagged()
    with server.connect() as client:
        client.sendall(f"GET /{tag}.gif HTTP/1.1\r\n".encode())
        server.hit(tag)
        server.process.send_signal(number)
        eventually(lambda: not is_open(server))
        start = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(20) in (128 + number, -number)
        assert time.monotonic() - start < 2
    assert int(register_rows(tmp_path / "register.csv")[tag]["hits"]) == 1
    assert "Traceback" not in server.log()
