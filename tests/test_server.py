"""The pixel server: its answers, whom it believes, TLS, starting, stopping, opens.

Everything is real: a server process, sockets on 127.0.0.1, certificates of openssl.
"""
from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from ipaddress import ip_network

import pytest

from conftest import (
    PIXEL_START, assert_nothing_raw, break_off, eventually, exchange, get, hits_of,
    in_pieces, linux, log_rows, occupy, read_all, status_of)
from mailtracker import network_test, read_headers

CHROME = ("Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 "
          "(KHTML, like Gecko) Chrome/149.0.0.0 Safari/537.36")
THUNDERBIRD = ("Mozilla/5.0 (X11; Linux x86_64; rv:115.0) Gecko/20100101 "
               "Thunderbird/115.8.0")
GMAIL = ("Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 "
         "(via ggpht.com GoogleImageProxy)")
CURL = "curl/8.5.0"
HOME = "81.105.41.164"
HOME6 = "2a00:23c6:1234:5678::9"
OFFICE = "198.51.100.7"


def is_open(server):
    """Tell whether the server takes new connections."""
    try:
        server.connect().close()
    except ConnectionError:
        return False
    return True


# -- answers ----------------------------------------------------------------


def test_known_unknown_and_malformed_ids_get_the_same_answer(tagged):
    server, tag = tagged()
    unknown = tag[:-1] + ("b" if tag[-1] != "b" else "c")
    paths = [f"/{tag}.gif", f"/{unknown}.gif", f"/{'0a' * 20}.png",
             f"/{tag.upper()}.gif", f"/{tag}/{unknown}", "/x.gif", "/",
             "/../../etc/passwd", "/%00", "/" + "b" * 5000, f"/{tag}"]
    requests = [get(path.encode()) for path in paths]
    at_once = {exchange(server, request) for request in requests}
    slowly = {exchange(server, *in_pieces(request)) for request in requests}
    assert len(at_once) == 1
    assert slowly == at_once


def test_the_pixel_may_not_be_cached_and_names_no_software(tagged):
    server, tag = tagged()
    status, headers, body = server.get(f"/{tag}.gif")
    assert status == 200
    assert body[:6] == b"GIF89a" and body[-1:] == b";"
    assert {name.lower(): value for name, value in headers.items()} == {
        "content-type": "image/gif", "content-length": str(len(body)),
        "cache-control": "no-store, no-cache, must-revalidate, max-age=0, private",
        "pragma": "no-cache", "expires": "0", "x-content-type-options": "nosniff",
        "x-robots-tag": "noindex", "connection": "close"}
    whole = exchange(server, get(b"/x.gif"))
    head = exchange(server, b"HEAD /x.gif HTTP/1.1\r\n\r\n")
    assert head == whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    status, headers, body = server.request("DELETE", f"/{tag}.gif")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert b"DELETE" not in body


# -- proxies ---------------------------------------------------------------------

TRUSTED = ("127.0.0.0/8", "10.0.0.1", "2001:db8::/32")


@pytest.mark.parametrize("trusted, headers, address", [
    ((), ["203.0.113.5"], "127.0.0.1"),
    (("10.0.0.0/8",), ["203.0.113.5"], "127.0.0.1"),
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
    (TRUSTED, ["fe80::1%eth0"], "127.0.0.1"),
])
def test_forwarded_addresses_are_believed_from_the_right_and_of_proxies_only(
        trusted, headers, address):
    lines = [b"X: X-Forwarded-For: 9.9.9.9", b"AX-Forwarded-For: 9.9.9.9",
             *(b"x-Forwarded-For: " + header.encode() for header in headers)]
    block = get(b"/", *lines).partition(b"\r\n")[2]
    is_trusted = network_test([ip_network(net) for net in trusted])
    assert read_headers(block, "127.0.0.1", is_trusted).address == address


def test_a_proxy_that_is_not_trusted_is_told_once_and_without_addresses_to_strangers(
        tagged):
    server, tag = tagged()
    for number in range(3):
        server.get("/x.gif", {"X-Forwarded-For": f"203.0.113.{number}"})
    assert server.get("/health")[2] == b"ok\n"
    for number in range(3):
        server.get(f"/{tag}.gif", {"X-Forwarded-For": f"203.0.113.{number}"})
    assert server.get("/health")[::2] == (
        200, b"ok; requests come through a proxy that is not trusted: "
             b"see --trusted-proxy\n")
    assert server.stop() == 0
    assert server.log().count("add --trusted-proxy 127.0.0.1") == 1


# -- TLS ----------------------------------------------------------------------------


class Secure:
    """A server whose certificate can be exchanged."""

    def __init__(self, certificates, files):
        self.certificates, self.files = certificates, files
        self.put("first.pem", 0)
        self.put("first.key", 1)

    def put(self, name, place):
        """Put a certificate (place 0) or key (1) where the server looks for it."""
        shutil.copy(self.certificates / name, self.files[place])

    def connect(self, name="first"):
        """Return a TLS connection that trusts one certificate only."""
        context = ssl.create_default_context(cafile=self.certificates / f"{name}.pem")
        return context.wrap_socket(self.server.connect(), server_hostname="127.0.0.1")

    def shows(self, name):
        """Tell whether the server shows a certificate."""
        with contextlib.suppress(ssl.SSLCertVerificationError), self.connect(name):
            return True

    def fetch(self, *pieces):
        """Send the pieces of a request; return the answer."""
        with self.connect() as client:
            for piece in pieces:
                client.sendall(piece)
            return read_all(client)


@pytest.fixture
def secure(certificates, tagged, tmp_path):
    """Start a server of https with one tag."""
    it = Secure(certificates, [tmp_path / "cert.pem", tmp_path / "key.pem"])
    it.server, tag = tagged("--tls-cert", it.files[0], "--tls-key", it.files[1])
    it.pixel = get(f"/{tag}.gif".encode())
    it.hits = lambda: hits_of(tmp_path / "register.csv", tag)
    yield it
    assert it.server.process.poll() is None and "Traceback" not in it.server.log()


def test_pixels_are_served_over_tls(secure):
    assert "serving pixels on https://" in secure.server.log()
    for pieces in [secure.pixel], in_pieces(secure.pixel), [secure.pixel * 2]:
        answer = secure.fetch(*pieces)
        assert answer.startswith(PIXEL_START) and answer.endswith(b";")
    assert secure.hits() == 3
    assert status_of(secure.fetch(get(b"/x", b"X: " + b"x" * 20_000))) == 431


@linux
def test_tls_clients_that_break_off_or_say_nothing_harm_nobody(secure, many_sockets):
    secure.fetch(secure.pixel)
    server, before = secure.server, secure.server.descriptors()
    starts = b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01", get(b"/x.gif")
    break_off(server, starts * 10)
    assert b"HTTP/1.1 200" not in exchange(server, get(b"/x.gif"))
    eventually(lambda: server.descriptors() <= before)
    for start in starts[:3]:
        occupy(server, many_sockets, 20, start)
    assert secure.fetch(secure.pixel).startswith(PIXEL_START)


def test_a_renewed_certificate_is_picked_up_without_a_restart(secure):
    assert secure.shows("first")
    secure.put("second.pem", 0)  # its key comes later, as some tools do it
    eventually(lambda: "no usable certificate" in secure.server.log())
    assert secure.shows("first")
    secure.put("second.key", 1)
    eventually(lambda: secure.shows("second"))


@pytest.mark.parametrize("cert, key", [
    ("missing.pem", "first.key"), ("first.pem", "missing.key"),
    ("garbage.pem", "first.key"), ("first.pem", "garbage.pem"),
    ("first.pem", "second.key"), ("first.pem", "locked.key"), (".", "first.key")])
def test_a_bad_certificate_is_one_clear_line(run, certificates, cert, key):
    assert_one_error(run("server", "--port", 0, "--host", "127.0.0.1",
                         "--tls-cert", certificates / cert,
                         "--tls-key", certificates / key), "certificate")


# -- starting ----------------------------------------------------------------------


def assert_one_error(done, words):
    """Fail unless a command ended with one line for its user, and exit code 1."""
    if isinstance(done, subprocess.CompletedProcess):
        done = done.returncode, done.stdout, done.stderr
    assert done[:2] == (1, ""), done
    assert re.fullmatch(r"mailtracker: error: [^\n]+\n", done[2])
    assert re.search(words, done[2]), done
    assert_nothing_raw(done[2])


# CPython leaves the socket open for which an international host is too odd.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("host", [
    "no.such.host.invalid", "192.0.2.1", "300.1.1.1", "2001:db8::1", ".", "a..b",
    "x" * 70, "ä..b", "\x1b[31m", "[::1]:80"], ids=ascii)
def test_a_bad_host_is_one_clear_line(run, host):
    assert_one_error(run("server", "--host", host, "--port", 0),
                     "cannot listen on|not an address")


def test_the_default_host_serves_both_families(tagged):
    server, tag = tagged("--keep-address", "full", host="")
    try:
        client = socket.create_connection(("::1", server.port), timeout=10)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with client:
        client.sendall(get(f"/{tag}.gif".encode()))
        assert read_all(client).startswith(PIXEL_START)
    server.hit(tag)
    eventually(lambda: re.findall(rf" hit {tag} \d (\S+)", server.log())
               == ["::1", "127.0.0.1"])


# Puts standard input where systemd would put a listening socket, as its own process.
PASS_ON = (sys.executable, "-c", "import os, sys; os.dup2(0, 3); "
           "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
           "os.execv(sys.argv[1], sys.argv[1:])")


@linux
def test_systemd_may_pass_a_socket_that_outlives_the_server_and_hears_when_it_is_ready(
        serve, newtags, tmp_path):
    register = tmp_path / "register.csv"
    tag, = newtags(register)
    for path in tmp_path / "notify", "\0mailtracker-test-%d" % os.getpid():
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(path))
            notify.settimeout(20)
            server = serve("--register", register, host=None, prefix=PASS_ON,
                           stdin=listener, wait=False,
                           env={"NOTIFY_SOCKET": str(path).replace("\0", "@")})
            assert b"READY=1" in notify.recv(4096).split(b"\n")
            assert eventually(server.find_port) == listener.getsockname()[1]
            server.hit(tag)
            assert server.stop() == 0
            assert is_open(server)
    assert hits_of(register, tag) == 2


def test_a_socket_from_systemd_must_listen_and_needs_no_port(tracker):
    done = tracker("server", "--port", "80", prefix=PASS_ON)
    assert done.returncode == 2 and "systemd passes the socket" in done.stderr
    assert_one_error(tracker("server", prefix=PASS_ON), "one listening TCP socket")


@pytest.mark.parametrize("options, words", [
    (["--reuse-port"], "--reuse-port"), (["--on-open", "x"], "notify --every --to"),
    (["--on-open-first"], "notify --to 'exec:COMMAND'"),
    (["--trusted-proxy", "example.org"], "not an address or network"),
    (["--no-events"], "--keep-address none --keep-agent no"),
    (["--tls-key", "x"], "needs --tls-cert"), (["--rotate-events", "1K"], "64K"),
    (["--rotate-events", "1"], "rotate"), (["--daemon", "--quiet"], "--quiet"),
    (["--tls-cert", "x", "--tls-key", "x", "--pidfile", "./x"], "--pidfile ./x is"),
    (["--logfile", "r.csv"], "--logfile r.csv is"),
    (["--pidfile", "r.csv"], "--pidfile r.csv is"),
    (["--events", "./r.csv"], "--events"), (["--events", "link"], "--events"),
    (["--pidfile", "hard"], "--pidfile hard is"),
    (["--logfile", "r.csv.bak"], "r.csv.bak is"),
    (["--logfile", "r.csv.lock"], "r.csv.lock is"),
    (["--pidfile", "r.events.csv"], "r.events.csv is"),
    (["--logfile", "x", "--pidfile", "./x"], "--pidfile ./x is"),
    (["--pidfile", "notes"], "--pidfile notes holds something else"),
    (["--logfile", "notes"], "--logfile notes holds something else"),
    (["--events", "notes"], "notes holds something else"),
    (["--events", "hard"], "hard is another file")],
    ids=" ".join)
def test_options_without_effect_or_that_destroy_a_file_are_usage_errors(
        run, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    for name in ("r.csv", "r.csv.bak", "notes"):
        (tmp_path / name).write_text("id,name\n")
    (tmp_path / "r.events.csv").write_text("time,event\n")
    (tmp_path / "link").symlink_to("r.csv")
    os.link(tmp_path / "r.csv", tmp_path / "hard")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, error = run("server", "--register", "r.csv", "--port", 0, *options)
    assert (code, out) == (2, "") and words in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- stopping ---------------------------------------------------------------------


def test_a_request_under_way_is_finished_before_the_server_stops(tagged, tmp_path):
    server, tag = tagged()
    with server.connect() as client:
        client.sendall(f"GET /{tag}.gif HTTP/1.1\r\nHo".encode())
        server.get("/health")  # the first half has been read
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: not is_open(server))
        client.sendall(b"st: x\r\n\r\n")
        assert read_all(client).startswith(PIXEL_START)
    assert server.process.wait(20) == 0
    assert hits_of(tmp_path / "register.csv", tag) == 1
    assert server.log().endswith("Z 1 hit counted\n")


def test_nobody_is_waited_for_longer_than_five_seconds(
        secure, serve, newtags, tmp_path):
    stopping = serve("--register", "stopping.csv")
    server = serve("--register", "slow.csv")
    tag, = newtags(tmp_path / "slow.csv")
    with contextlib.ExitStack() as stack:
        drip, still, silent, unfinished = clients = [
            stack.enter_context(each.connect())
            for each in (server, server, secure.server, stopping)]
        still.sendall(b"GET /x.gif HTTP/1.1\r\n")
        silent.sendall(b"\x16")
        unfinished.sendall(b"GET /x")
        stopping.get("/health")
        start = time.monotonic()
        stopping.process.send_signal(signal.SIGTERM)
        for byte in get(f"/{tag}.gif".encode(), b"X: " + b"x" * 200):
            if select.select([drip], [], [], 0.25)[0]:
                break
            with contextlib.suppress(ConnectionError):
                drip.sendall(bytes([byte]))
        assert [read_all(client) for client in clients] == [b""] * 4
        assert stopping.process.wait(20) == 0
        assert 4 < time.monotonic() - start < 8
    assert hits_of(tmp_path / "slow.csv", tag) == 0
    server.assert_unharmed()


@linux
def test_requests_that_are_ready_together_are_answered_also_when_the_server_stops(
        tagged, tmp_path):
    server, tag = tagged("--quiet")
    for number in signal.SIGCONT, signal.SIGINT:
        os.kill(server.process.pid, signal.SIGSTOP)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.connect()) for _ in range(60)]
            for place, client in enumerate(clients):
                client.sendall(get([f"/{tag}.gif".encode(), b"/x.gif",
                                    b"/health"][place % 3]))
            server.process.send_signal(number)
            os.kill(server.process.pid, signal.SIGCONT)
            answers = [read_all(client) for client in clients]
        assert [status_of(answer) for answer in answers] == [200] * 60
        assert sum(answer.startswith(PIXEL_START) for answer in answers) == 40
    assert server.process.wait(20) == 0
    assert hits_of(tmp_path / "register.csv", tag) == 40
    assert server.log().endswith("Z 40 hits counted\n") and tag not in server.log()


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
    assert hits_of(tmp_path / "register.csv", tag) == 1
    assert "Traceback" not in server.log()


def test_a_hangup_stops_a_server_whose_terminal_was_closed(serve):
    import pty

    master, terminal = pty.openpty()
    server = serve(stdin=terminal)
    os.close(terminal)
    for _ in range(2):  # the shell sends one, too
        server.process.send_signal(signal.SIGHUP)
    assert server.process.wait(20) == 0
    os.close(master)


def test_a_daemon_detaches_opens_its_log_again_and_leaves_nothing_behind(
        tracker, newtags, tmp_path):
    register, pidfile, log = (tmp_path / name for name in ("r.csv", "pid", "log"))
    tag, = newtags(register)
    command = ("server", "--daemon", "--host", "127.0.0.1", "--port", 0, "--register",
               "r.csv", "--pidfile", "pid", "--logfile", "log")
    done = tracker(*command, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(pidfile.read_text())
    try:
        assert os.getsid(pid) not in (os.getsid(0), pid)
        port = eventually(lambda: re.search(r"127\.0\.0\.1:(\d+)", log.read_text()))[1]
        second = tracker(*command[:-4], "--port", port, timeout=20)
        assert_one_error(second, f"port {port} is in use")
        assert_one_error(tracker(*command[:-4], timeout=20), f"process {pid}")
        log.rename(tmp_path / "log.1")
        os.kill(pid, signal.SIGHUP)
        eventually(log.exists)
        with socket.create_connection(("127.0.0.1", int(port))) as client:
            client.sendall(get(f"/{tag}.gif".encode()))
            assert read_all(client).startswith(PIXEL_START)
        eventually(lambda: f"hit {tag} 1 " in log.read_text())
    finally:
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not pidfile.exists())
    eventually(lambda: log.read_text().endswith("1 hit counted\n"))


# -- judging, and what is kept ---------------------------------------------------


class Tracked:
    """A server that believes 127.0.0.1, and the events of its log."""

    def __init__(self, server, tag, register):
        self.server, self.tag, self.register = server, tag, register

    def fetch(self, agent=CHROME, address=HOME, tag="", **headers):
        """Fetch a pixel as some client; return the events it brought about."""
        before = len(log_rows(self.register))
        lines = {"User-Agent": agent, "X-Forwarded-For": address}
        lines.update((name.replace("_", "-"), v) for name, v in headers.items())
        status, _, body = self.server.get(f"/{tag or self.tag}.gif", lines)
        assert status == 200 and body.startswith(b"GIF89a")
        return log_rows(self.register)[before:]

    def judged(self, *args, **options):
        """Fetch a pixel; return the verdict and reason that stand in the log then."""
        event = self.fetch(*args, **options)[0]
        return event["verdict"], event["reason"]


@pytest.fixture
def tracked(tagged, tmp_path):
    """Start a server that judges as if all mails had been written long ago."""
    def start(*options, window=0):
        server, tag = tagged("--trusted-proxy", "127.0.0.1", "--compose-window", window,
                             *options)
        return Tracked(server, tag, tmp_path / "register.csv")
    return start


def test_hits_are_judged_in_the_light_of_those_before(tracked):
    it = tracked("--me", "203.0.113.0/24")
    assert it.judged(THUNDERBIRD) == ("human", "mail-client")
    assert it.judged(THUNDERBIRD) == ("human", "repeat")
    assert it.judged(GMAIL, "66.249.84.231") == ("proxy", "gmail-proxy")
    assert it.judged(CURL) == ("machine", "http-library")
    assert it.judged(address="203.0.113.6") == ("self", "own-network")
    assert it.judged(Sec_Purpose="prefetch") == ("machine", "prefetch-header")
    rows = log_rows(it.register)[1:]
    assert [(row["hits"], row["opens"]) for row in rows] == [
        ("1", "1"), ("2", "1"), ("3", "2"), ("4", "2"), ("5", "2"), ("6", "2")]


def test_the_sender_is_known_by_what_was_fetched_while_writing(
        tracked, serve, newtags):
    it = tracked(window=120)
    for address in (HOME, HOME6):
        assert it.judged(address=address) == ("self", "composing")
    assert it.server.stop() == 0
    it.server = serve("--register", it.register, "--trusted-proxy", "127.0.0.1",
                      "--compose-window", "0")
    assert it.judged() == ("self", "sender-client")
    assert it.judged(address=HOME6) == ("self", "sender-client")
    assert it.judged(address=OFFICE, tag=newtags(it.register)[0]) == (
        "human", "browser")


@pytest.mark.parametrize("private", [{}, {"DNT": "1"}, {"Sec_GPC": "1"}],
                         ids=["known", "DNT", "GPC"])
def test_an_open_that_is_overruled_is_logged_as_it_was_kept(tracked, private):
    stale = CHROME.replace("149.0.0.0", "57.0.2987.133").replace("10.0", "6.1")
    it = tracked("--keep-address", "full")
    first, = it.fetch(stale, OFFICE, **private)
    assert (first["address"], first["detail"]) == \
        (("", "") if private else (OFFICE, stale))
    second, verdict = it.fetch()
    assert (second["verdict"], second["hits"], second["opens"]) == ("human", "2", "2")
    assert verdict == {**first, "event": "verdict", "verdict": "machine",
                       "reason": "many-networks", "hits": "2", "opens": "1"}


@pytest.mark.parametrize("options, kept", [
    ((), {("81.105.41.0", CURL), ("2a00:23c6:1234::", CURL)}),
    (("--keep-address", "full"), {(HOME, CURL), (HOME6, CURL)}),
    (("--keep-address", "none", "--keep-agent", "no"), {("", "")})],
    ids=["default", "full", "none"])
def test_no_more_of_a_client_is_kept_than_is_wanted(tracked, options, kept):
    it = tracked(*options)
    events = it.fetch(CURL, HOME) + it.fetch(CURL, HOME6)
    assert {(event["address"], event["detail"]) for event in events} == kept
    assert it.server.stop() == 0
    said = set(re.findall(r" hit \w+ \d (\S+) machine \S+ ?(.*)", it.server.log()))
    assert said == {(address or "-", agent) for address, agent in kept}
