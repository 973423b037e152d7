"""Notices: who is told of which opens, once, and by what, whatever dies or moves.

`python tests/test_notify.py 200` kills notify so many times.
"""
from __future__ import annotations

import base64
import collections
import contextlib
import email
import email.policy
import hashlib
import hmac
import http.server
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)] * (__name__ == "__main__")
import mailtracker  # noqa: E402
from conftest import (SCRIPT, clean_environment, eventually, launch,  # noqa: E402
                      linux)
from mailtracker import (Event, Making, Notices, Webhook, add_tags,  # noqa: E402
                         append_events, clean, utc_text)
from smtp_server import FakeSmarthost  # noqa: E402

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
NOW = int(time.time())
DAY = 86400
Request = collections.namedtuple("Request", "path headers body raw")


class Receiver:
    """A web server on 127.0.0.1 that keeps what it is told; answer says with what."""

    def __init__(self, answer=lambda number: (204, {}), certificate=None):
        receiver, self.requests, self.answer = self, [], answer

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                if not raw:
                    return  # notify was killed before it
                receiver.requests.append(Request(
                    self.path, self.headers, json.loads(raw), raw))
                answer = receiver.answer(len(receiver.requests))
                if callable(answer):
                    with contextlib.suppress(OSError):
                        answer(self.connection)
                    return
                self.send_response(answer[0])
                for name, value in answer[1].items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False)
            self._server.handle_error = lambda *_: None
        scheme = "https" if certificate else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def ids(self):
        return [request.headers["webhook-id"] for request in self.requests]

    @property
    def names(self):
        return [[tag["name"] for tag in request.body["data"]["tags"]]
                for request in self.requests]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Be in a folder of its own; restore the signals after it."""
    monkeypatch.chdir(tmp_path)
    kept = {number: signal.getsignal(number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield tmp_path
    signal.set_wakeup_fd(-1)
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def receiver():
    """Run a receiver that takes all."""
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def told(files, receiver, run):
    """Tell the receiver, who knows all until now, what comes then."""
    def once(*options, code=0, url=receiver.url):
        found, _, err = run("notify", "--to", url, "--once", *options)
        assert found == code, err
        return err
    make(files, "Zoe")
    assert "this receiver is new" in once()
    return once


def tag_id(number):
    """Return the id of a tag for tests."""
    return mailtracker.new_ids(bytes(16), 1, number)[0]


def make(files, *names, sent="", status="", created=NOW - 60):
    """Make tags; return their ids."""
    make.count = getattr(make, "count", 0)
    ids = [tag_id(make.count + number) for number in range(len(names))]
    make.count += len(names)
    add_tags(files, list(zip(ids, names)), Making(utc_text(created), sent, status))
    return ids


def hit(tag, opens=1, verdict="human", when=NOW, hits=None, **more):
    """Return a hit, an open where nothing else is said."""
    more = {"reason": "browser", "address": "192.0.2.0", "detail": "Mozilla", **more}
    return Event(utc_text(when), more.pop("event", "hit"), tag,
                 opens if hits is None else hits, opens, verdict, **more)


# -- who is told of what -----------------------------------------------------------

LINK = "bcdfghjk Mozilla"
A_LONG_TIME = NOW - 20 * DAY


def cases(**cases):
    """Return ids and values for parametrize."""
    return {"ids": [name.replace("_", " ") for name in cases],
            "argvalues": cases.values()}


@pytest.mark.parametrize("before, events, options, kinds", **cases(
    a_first_open=([], [dict()], "", "first"),
    by_a_proxy=([], [dict(verdict="proxy", reason="gmail-proxy")], "", "first"),
    a_machine=([], [dict(opens=0, verdict="machine", reason="fast")], "--every", ""),
    oneself=([], [dict(opens=0, verdict="self", reason="composing")], "--every", ""),
    unknown=([], [dict(opens=0, verdict="unknown", hits=1)], "", ""),
    unknown_if_wanted=([], [dict(opens=0, verdict="unknown", hits=1)] * 2,
                       "--unknown", "first"),
    an_open_after_unknown=([dict(opens=0, verdict="unknown", hits=1, when=NOW - 9)],
                           [dict(hits=2)], "--unknown", ""),
    a_second_open=([], [dict(), dict(opens=2, when=NOW + 20)], "", "first"),
    every_open=([dict(when=NOW - 99)], [dict(opens=2), dict(opens=3, when=NOW + 20)],
                "--every", "again again"),
    a_repeat=([], [dict(), dict(hits=2, reason="repeat")], "--every", "first"),
    soon_again=([dict(when=NOW - 13 * DAY)], [dict(opens=2)], "--on revived", ""),
    revived=([dict(when=A_LONG_TIME)], [dict(opens=2), dict(opens=3, when=NOW + 20)],
             "--on revived", "revived"),
    revived_with_every=([dict(when=A_LONG_TIME)], [dict(opens=2)], "--every", "again"),
    not_by_default=([dict(when=A_LONG_TIME)], [dict(opens=2)], "", ""),
    a_click=([], [dict(event="clicked", hits=0, detail=LINK)], "", "first"),
    a_scanners_click=([], [dict(event="clicked", hits=0, opens=0, verdict="machine",
                                detail=LINK)], "--every", ""),
    a_click_after_an_open=([dict()], [dict(event="clicked", detail=LINK)], "", ""),
    a_click_after_all=([dict()], [dict(event="clicked", detail=LINK)], "--every", ""),
    a_click_before_an_open=(
        [], [dict(event="clicked", hits=0, detail=LINK), dict(opens=2, hits=1)], "",
        "first"),
    a_click_after_a_machine=(
        [dict(opens=0, verdict="machine", hits=1)],
        [dict(event="clicked", hits=1, detail=LINK)], "", "first"),
    taken_back=([], [dict(), dict(event="verdict", opens=0, verdict="machine")],
                "--every", ""),
    another_is_taken_back=(
        [], [dict(), dict(opens=2, when=NOW + 5, address="198.51.100.0"),
             dict(event="verdict", hits=2, verdict="machine")], "", "first"),
    a_click_is_taken_back=(
        [], [dict(event="clicked", hits=0, detail=LINK),
             dict(event="verdict", hits=0, opens=0, verdict="machine", detail=LINK)],
        "", ""),
    an_open_judged_as_proxy=([], [dict(), dict(event="verdict", verdict="proxy")], "",
                             "first"),
    opened_again_after_it_was_taken_back=(
        [dict(when=NOW - 9), dict(event="verdict", when=NOW - 9, opens=0,
                                  verdict="machine")], [dict(hits=2)], "", "first"),
    other_events=([], [dict(event="replied", verdict=""), dict(event="sent")], "", ""),
))
def test_a_receiver_is_told_of(before, events, options, kinds, told, files, receiver):
    tag, = make(files, "Ada")
    append_events(files, [hit(tag, **more) for more in before])
    told(*options.split())
    receiver.requests.clear()
    append_events(files, [hit(tag, **more) for more in events])
    told(*options.split())
    told(*options.split())  # and not twice
    found = [tag["kind"] for request in receiver.requests
             for tag in request.body["data"]["tags"]]
    assert found == kinds.split()


def test_all_of_a_minute_is_one_notice_and_names_are_those_of_the_register(
        told, files, receiver):
    tags = make(files, *(f"P{n}" for n in range(19)))
    register = Path(files.register)
    register.write_text(register.read_text().replace(",P0\n", ",Ada\n"))
    append_events(files, [hit(tag) for tag in tags])
    told()
    request, = receiver.requests
    assert request.body["type"] == "open.first"
    assert request.body["data"]["title"] == "Opened: Ada and 18 others"
    assert request.body["data"]["text"].endswith("\nand 11 more")
    assert request.body["data"]["tags"][0] == {
        "kind": "first", "name": "Ada", "time": utc_text(NOW), "event": "hit",
        "id": tags[0], "hits": 1, "opens": 1, "verdict": "human", "reason": "browser"}
    assert b"192.0.2" not in request.raw and b"Mozilla" not in request.raw
    append_events(files, [hit(tag, 2) for tag in tags[:2]])
    told("--every")
    assert receiver.requests[1].body["data"]["title"] == "Opened again: Ada and P1"


def test_very_many_opens_are_several_notices(told, files, receiver, monkeypatch):
    monkeypatch.setattr(Notices, "MOST", 7)
    names = [f"P{n:02}" for n in range(20)]
    append_events(files, [hit(tag) for tag in make(files, *names)])
    told()
    assert receiver.names == [names[:7], names[7:14], names[14:]]


@contextlib.contextmanager
def service(to, *options, silent=subprocess.DEVNULL, ready=True, **constants):
    """Run notify in a process of its own, with other constants of Notices."""
    words = "".join(f"m.Notices.{name} = {value!r}; "
                    for name, value in {"LOOK": 0.02, **constants}.items())
    with subprocess.Popen(
            [sys.executable, "-c", "import sys, mailtracker as m; "
             f"{words}sys.exit(m.main())", "notify", "--to", to, *options],
            env=clean_environment(PYTHONPATH=str(SCRIPT.parent)), stdout=silent,
            stderr=subprocess.DEVNULL) as process:
        try:
            if ready:
                eventually(lambda: state(to))
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                assert process.wait(20) in (0, -signal.SIGTERM)


def state(to):
    """Return what is kept of a receiver, as a list; [] for nothing."""
    path = Path(f"register.csv.{mailtracker.hash_of(to)[:8]}.notify")
    text = path.read_text() if path.exists() else ""
    return json.loads(text) if text else []


def test_opens_gather_and_can_be_taken_back_meanwhile(files, receiver):
    ada, bob, cid = make(files, "Ada", "Bob", "Cid")
    start = int(time.time())
    with service(receiver.url, GATHER=3.0):
        append_events(files, [hit(ada, when=start), hit(bob, when=start)])
        eventually(lambda: time.time() >= start + 1)
        append_events(files, [hit(bob, 0, "machine", start, event="verdict"),
                              hit(cid, when=start + 1)])
        eventually(lambda: receiver.requests)
    assert receiver.names == [["Ada", "Cid"]] and time.time() >= start + 3


# -- what is told, and how ----------------------------------------------------------


@pytest.mark.parametrize("form, path, told_path, body", [
    ("slack", "/services/x?a=b", "/services/x?a=b", {
        "text": "Opened: &lt;!channel&gt; &amp; Ann\n&lt;!channel&gt; &amp; Ann: TEXT, "
                + utc_text(NOW)}),
    ("discord", "/api", "/api", {
        "content": f"Opened: <!channel> & Ann\n<!channel> & Ann: TEXT, {utc_text(NOW)}",
        "allowed_mentions": {"parse": []}}),
    ("ntfy", "/my_topic", "/", {
        "topic": "my_topic", "title": "Opened: <!channel> & Ann",
        "message": f"<!channel> & Ann: TEXT, {utc_text(NOW)}"})])
def test_each_form_is_what_its_service_wants(
        form, path, told_path, body, told, files, receiver):
    url = receiver.url + path
    told("--format", form, url=url)
    tag, = make(files, "<!channel> & Ann")
    append_events(files, [hit(tag)])
    told("--format", form, url=url)
    request, = receiver.requests
    words = mailtracker.REASONS["browser"]
    expected = json.loads(json.dumps(body).replace("TEXT", words))
    assert (request.path, request.body) == (told_path, expected)
    assert request.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("name", [
    "😀" * 5000, "a" + "\u0301" * 5000,
    "\x1b]0;x\x07\u202e", 'a","b', "a\\", "--help", "@everyone"])
@pytest.mark.parametrize("form", ["generic", "slack", "discord", "ntfy"])
def test_no_name_is_too_long_or_leaves_its_place(name, form):
    news = [mailtracker.News("first", hit(tag_id(n)), clean(name)) for n in range(50)]
    notice = mailtracker.Notice("msg_x", news)
    body = mailtracker.PAYLOADS[form](notice, "topic")
    texts = [text for text in body.values() if isinstance(text, str)]
    assert json.loads(json.dumps(body)) == body and all(
        len(text.encode("utf-16-le")) <= 4000 for text in texts)
    assert not re.search("[\0-\x09\x0b-\x1f\x7f\u202e]", "".join(texts))


@pytest.mark.parametrize("how", ["command", "environment"])
def test_what_is_told_is_signed_as_standard_webhooks_says(
        how, told, files, receiver, monkeypatch):
    tag, = make(files, "Ädä")
    append_events(files, [hit(tag)])
    if how == "environment":
        monkeypatch.setenv("MAILTRACKER_SECRET", SECRET)
    told(*["--secret-command", f"echo {SECRET}"] * (how == "command"))
    request, = receiver.requests
    when, notice = (request.headers[f"webhook-{name}"] for name in ("timestamp", "id"))
    signed = hmac.new(bytes(range(32)), f"{notice}.{when}.".encode() + request.raw,
                      hashlib.sha256).digest()
    assert request.headers["webhook-signature"] == \
        "v1," + base64.b64encode(signed).decode()
    assert abs(int(when) - time.time()) < 60
    assert "." not in notice


@pytest.mark.parametrize("secret", [
    "hello", "whsec_c2hvcnQ=", SECRET + "!", SECRET[:-1], SECRET.replace("_", "=")])
def test_a_bad_secret_is_an_error_that_does_not_show_it(
        secret, run, files, monkeypatch):
    make(files, "Ada")
    monkeypatch.setenv("MAILTRACKER_SECRET", secret)
    code, _, err = run("notify", "--to", "http://127.0.0.1:1/", "--once")
    assert code == 1 and "the secret is not whsec_" in err and secret not in err


# -- receivers that fail -------------------------------------------------------------


def says(data, wait=0.0, times=1):
    """Return an answer of raw bytes, slowly and several times, and then none."""
    def answer(connection):
        for _ in range(times):
            connection.sendall(data)
            time.sleep(wait)
        connection.shutdown(socket.SHUT_RDWR)

    def quick(number):
        return answer

    def slow(number):
        return answer
    return slow if wait else quick


TOLD, LATER = "", "; to be told again in "
SILENT = "see what listens there" + LATER
LATE = "no whole answer within 0 s" + LATER


@pytest.mark.parametrize("answer, words, wait", **cases(
    ok=(lambda _: (200, {}), TOLD, 0), accepted=(lambda _: (202, {}), TOLD, 0),
    body_too_long=(says(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 300_000), TOLD, 0),
    head_only=(says(b"HTTP/1.1 204 No Content\r\n"), TOLD, 0),
    broken=(lambda _: (500, {}), "500 Internal Server Error" + LATER, 5),
    bad_request=(lambda _: (400, {}), "400 Bad Request" + LATER, 5),
    redirect=(lambda _: (302, {"Location": "/elsewhere"}), "302 Found" + LATER, 5),
    redirect_for_good=(lambda _: (308, {"Location": "/"}), "308 Permanent", 5),
    later=(lambda _: (503, {"Retry-After": "77"}), "503 Service", 77),
    soon=(lambda _: (429, {"Retry-After": "1"}), "429 Too Many", 5),
    at=(lambda _: (503, {"retry-after": email.utils.formatdate(
        time.time() + 500, usegmt=True)}), "503 Service", 500),
    never=(lambda _: (503, {"Retry-After": "9" * 50}), "503 Service", DAY),
    whenever=(lambda _: (503, {"Retry-After": "Sun, 99 Foo"}), "503 Service", 5),
    garbage=(says(b"\0\xff" * 50), SILENT, 5),
    garbage_for_ever=(says(b"\0\xff" * 9999, 0, 99), SILENT, 5),
    nothing=(says(b""), SILENT, 5),
    control=(says(b"HTTP/1.1 500 \x1b[2J\r\n\r\n"), "500 \\x1b[2J" + LATER, 5),
    hang=(says(b"", 10), LATE, 5), trickle=(says(b"H", 0.1, 99), LATE, 5),
    endless_head=(says(b"HTTP/1.1 200 OK\r\na: b\r\n", 0.1, 99), LATE, 5),
))
def test_a_receiver_that_says(answer, words, wait, told, files, receiver, monkeypatch):
    monkeypatch.setattr(Webhook, "SECONDS", 0.4 if answer.__name__ == "slow" else 10.0)
    tag, = make(files, "Ada")
    append_events(files, [hit(tag)])
    receiver.answer, start = answer, time.time()
    err = told(code=int(words != TOLD))
    assert time.time() - start < 5 and words in err
    *_, notice, tries, due = state(receiver.url)
    if words == TOLD:
        assert (notice, tries) == ("", 0)
    else:
        assert tries == 1 and start + wait - 2 <= due <= time.time() + wait + 1
        told(code=1)  # it is not yet due
    assert len(receiver.requests) == 1 and receiver.requests[0].path == "/"


def test_a_notice_is_told_again_by_the_same_id_until_it_is_taken(
        told, files, receiver, monkeypatch):
    monkeypatch.setattr(Notices, "RETRIES", [0.0] * 9)
    ada, bob = make(files, "Ada", "Bob")
    append_events(files, [hit(ada)])
    kept = []
    receiver.answer = lambda number: kept.append(state(receiver.url)[3]) or (500, {})
    told(code=1)
    assert kept == receiver.ids, "the id must be on the disk before it is first used"
    append_events(files, [hit(bob)])
    told(code=1)
    receiver.answer = lambda number: (200, {})
    told()
    assert len({*receiver.ids[:3]}) == 1 and receiver.ids[3] not in receiver.ids[:3]
    assert receiver.names == [["Ada"]] * 3 + [["Bob"]]


def test_the_schedule_is_that_of_standard_webhooks_and_then_it_goes_on(
        told, files, receiver, monkeypatch):
    ada, bob = make(files, "Ada", "Bob")
    append_events(files, [hit(ada)])
    clock, waits = [time.time()], []
    monkeypatch.setattr(time, "time", lambda: clock[0])
    receiver.answer = lambda number: (500, {})
    for _ in range(9):
        told(code=1)
        waits.append(state(receiver.url)[-1] - clock[0])
        clock[0] += waits[-1] + 1
    assert [*map(round, waits)] == [5, 300, 1800, 7200, 18000, 36000, 50400, 72000,
                                    86400]
    assert "; given up: Opened: Ada" in told()
    receiver.answer = lambda number: (200, {})
    append_events(files, [hit(bob)])
    told()
    assert receiver.names[-1] == ["Bob"] and len(receiver.names) == 11


def test_a_clock_that_is_set_back_does_not_delay_for_years(
        told, files, receiver, monkeypatch):
    append_events(files, [hit(*make(files, "Ada"))])
    receiver.answer = lambda number: (500 if number == 1 else 200, {})
    told(code=1)
    early = time.time() - 3 * 365 * DAY
    monkeypatch.setattr(time, "time", lambda: early)
    told()
    assert len({*receiver.ids}) == 1


def test_a_receiver_that_is_gone_is_never_told_again(told, files, receiver):
    append_events(files, [hit(*make(files, "Ada"))])
    receiver.answer = lambda number: (410, {})
    for _ in range(2):
        err = told(code=1)
        assert "note:" not in err and re.search(
            r"error: .* \(410\); to begin anew, remove .*\.notify\n", err)
    assert len(receiver.requests) == 1
    with service(receiver.url) as process:
        assert process.wait(20) == 1


def test_an_answer_that_takes_too_long_does_not_end_the_program():
    code = ("import contextlib, time, mailtracker as m\n"
            "signals = m.Signals(None)\n"
            "with contextlib.suppress(TimeoutError), m.time_limit(0.05):\n"
            "    time.sleep(9)\n"
            "    raise AssertionError('not limited')\n"
            "print(signals.wait(0), signals.wait(0))\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True,
                          stdout=subprocess.PIPE).stdout == b"False False\n"


def test_nobody_is_told_by_tls_that_cannot_be_verified(
        files, run, certificates, monkeypatch):
    with Receiver(certificate=certificates / "first.pem") as receiver:
        make(files, "Ada")
        run("notify", "--to", receiver.url, "--once")
        append_events(files, [hit(*make(files, "Bob"))])
        code, _, err = run("notify", "--to", receiver.url, "--once")
        assert code == 1 and "CERTIFICATE_VERIFY_FAILED" in err
        assert not receiver.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "first.pem"))
        path, = Path(".").glob("*.notify")
        path.write_text(json.dumps([*json.loads(path.read_text())[:-1], 0.0]))
        assert run("notify", "--to", receiver.url, "--once")[0] == 0
        assert receiver.names == [["Bob"]]


# -- the log is moved, cut, and forgotten ----------------------------------------------


def rename(log, number=[0]):
    number[0] += 1
    os.rename(log, f"{log}.{number[0]}")


def copy_and_truncate(log):
    shutil.copy(log, log + ".1")
    os.truncate(log, 0)


def delete(log):
    os.unlink(log)


def truncate(log):
    os.truncate(log, 0)


def tear(log):
    with open(log, "ab") as file:
        file.write(f"{utc_text(NOW)},hit,bcd".encode())


def litter(log):
    with open(log, "ab") as file:
        file.write(b"\0\xff,,,\n\n,,,,,,,,\n" + b"x" * 100_000 + b"\n"
                   + f"{utc_text(NOW)},hit,,x,y,human,,,\n".encode())


@pytest.mark.parametrize("how", [rename, copy_and_truncate, delete, truncate, tear,
                                 litter])
@pytest.mark.parametrize("is_service", [False, True], ids=["once", "service"])
def test_nothing_is_lost_or_told_twice_when_the_log_is(
        how, is_service, files, receiver, run):
    names = [f"P{number}" for number in range(8)]
    ids = make(files, *names)

    def told(count):
        if is_service:
            eventually(lambda: len(sum(receiver.names, [])) >= count)
        else:
            assert run("notify", "--to", receiver.url, "--once")[0] == 0

    with contextlib.ExitStack() as stack:
        told(0)
        if is_service:
            stack.enter_context(service(receiver.url, GATHER=0.0, ROTATED=0.1))
        for number, tag in enumerate(ids):
            if number in (2, 3, 6):
                how(files.log)
            append_events(files, [hit(tag, when=int(time.time()) + number)])
            if number != 5 or how in (delete, truncate):
                told(number + 1)
        told(8)
    assert sum(receiver.names, []) == names


def test_what_two_rotations_left_behind_is_told(told, files, receiver):
    ids = make(files, "P0", "P1", "P2", "P3")
    for number, tag in enumerate(ids):
        append_events(files, [hit(tag, when=NOW + number)])
        if number < 3:
            rename(files.log)
    told()
    assert receiver.names == [["P0", "P1", "P2", "P3"]]


def test_what_a_server_still_writes_to_a_log_moved_away_is_told(files, receiver):
    ids = make(files, "Ada", "Bob", "Cid")
    with service(receiver.url, GATHER=0.0, ROTATED=0.5):
        append_events(files, [hit(ids[0])])
        eventually(lambda: receiver.requests)
        with open(files.log, "ab") as old:
            rename(files.log)
            append_events(files, [hit(ids[2], when=NOW + 1)])
            soon = time.monotonic() + 0.1
            eventually(lambda: time.monotonic() > soon)  # and it has not told of Cid
            old.write(hit(ids[1]).line())
        eventually(lambda: len(sum(receiver.names, [])) == 3)
    assert sum(receiver.names, []) == ["Ada", "Bob", "Cid"]


def test_a_notice_that_waits_is_the_same_after_a_rotation(
        told, files, receiver, monkeypatch):
    monkeypatch.setattr(Notices, "RETRIES", [0.0] * 9)
    ada, bob = make(files, "Ada", "Bob")
    append_events(files, [hit(ada)])
    receiver.answer = lambda number: (200 if number > 2 else 500, {})
    told(code=1)
    rename(files.log)
    append_events(files, [hit(bob)])
    told(code=1)
    told()
    assert receiver.names == [["Ada"]] * 3 + [["Bob"]] and len({*receiver.ids}) == 2


def test_no_notice_comes_of_a_forgotten_tag(told, files, receiver, run, monkeypatch):
    monkeypatch.setattr(Notices, "RETRIES", [0.0] * 9)
    ada, bob, cid = make(files, "Ada", "Bob", "Cid")
    append_events(files, [hit(ada), hit(bob)])
    receiver.answer = lambda number: (500 if number == 1 else 200, {})
    told(code=1)
    assert run("forget", "--yes", "Ada")[0] == 0
    told()
    append_events(files, [hit(cid)])
    assert run("forget", "--yes", "Cid", "Bob")[0] == 0
    told()
    told()
    assert receiver.names == [["Ada", "Bob"], ["Bob"]]
    files_of_notify = [path.read_text() for path in Path(".").glob("*.notify")]
    assert len(files_of_notify) == 1 and bob not in files_of_notify[0]


def test_a_tag_that_is_being_forgotten_is_not_told(told, files, receiver):
    ada, bob = make(files, "Ada", "Bob")
    append_events(files, [hit(ada), hit(bob), Event(utc_text(NOW), "forget",
                                                    mailtracker.hash_of(ada))])
    told()
    assert receiver.names == [["Bob"]]


def test_a_receiver_has_one_notify_and_each_is_told_by_its_own(files, receiver, run):
    make(files, "Ada")
    with service(receiver.url, GATHER=0.0):
        code, _, err = run("notify", "--to", receiver.url, "--once")
        assert code == 1 and "another notify tells this receiver already" in err
        other = receiver.url + "/other"
        assert run("notify", "--to", other, "--once")[0] == 0
        append_events(files, [hit(*make(files, "Bob"))])
        assert run("notify", "--to", other, "--once")[0] == 0
        eventually(lambda: len(receiver.requests) == 2)
    assert sorted(request.path for request in receiver.requests) == ["/", "/other"]


@pytest.mark.parametrize("content", [
    "x", "[]", "[[1],2,3]", "{}", "[[0,0,0],1]", '[[0,0,0],1,[0,0,0],"",0,0]',
    '[[0,0,0],"",[0,0,0],"",0,"x"]', '[["",0,0],"",[0,0,0],"",0,0]',
    '[[1,1e30,3],"",[0,0,0],"",0,0]', '[[1,-5,3],"",[0,0,0],"",0,0]',
    '[[1,2,3],"",[0,0.5,0],"",0,0]', '[[1,%d,3],"",[0,0,0],"",0,0]' % 10 ** 30,
    '[[0,0,0],"",[0,0,0],"",0.5,0]', '[[0,0,0],"",[0,0,0],"",-2,0]'])
def test_a_damaged_state_is_an_error_and_stays(content, told, run, receiver):
    path, = Path(".").glob("*.notify")
    path.write_text(content)
    code, _, err = run("notify", "--to", receiver.url, "--once")
    assert code == 1 and f"{path.name} is damaged; remove it" in err
    assert path.read_text() == content


def test_a_register_that_cannot_be_read_costs_the_names_only(told, files, receiver):
    tag, = make(files, "Ada")
    append_events(files, [hit(tag)])
    Path(files.register).write_text('id,hits\n"')
    told()
    assert receiver.names == [[tag[:7]]]


# -- reminders -----------------------------------------------------------------------

OLD = utc_text(NOW - 4 * DAY)


def test_mail_of_which_no_open_was_seen_is_told_once(told, files, receiver):
    def old(name, status="sent", **more):
        return make(files, name, sent=OLD, status=status, created=NOW - 5 * DAY)[0]

    wanted, made = old("Ada"), make(files, "Bob", created=NOW - 4 * DAY)[0]
    scanned, ahead, opened = old("Cid"), old("Apple"), old("Opened")
    late = make(files, "Late", sent=utc_text(NOW - 2 * DAY), status="sent")[0]
    for status in ("queued", "sending", "failed", "replied", "bounced", "unsubscribed"):
        old(status, status)
    read, lost, changed = old("Read"), old("Lost"), old("Changed")
    when = NOW - 3 * DAY
    append_events(files, [
        hit(scanned, 0, "machine", when, 1, reason="fast"),
        hit(ahead, 0, "machine", when, 1, reason="apple-mpp"), hit(opened, when=when),
        Event(OLD, "read", read), Event(OLD, "count", lost, 3, 0),
        hit(changed, 0, "machine", when, 1, reason="fast"),
        hit(changed, 0, "machine", when, 1, reason="apple-mpp-agent", event="verdict")])
    told()
    receiver.requests.clear()
    told("--remind", "3d")
    request, = receiver.requests
    assert request.body["type"] == "reminder"
    data = request.body["data"]
    assert [tag["id"] for tag in data["tags"]] == [wanted, made, scanned]
    assert data["title"] == "No open was seen: Ada and 2 others"
    assert data["text"].startswith(
        f"Ada: no open was seen since it was sent, {OLD}\n")
    told("--remind", "3d")
    rename(files.log)
    told("--remind", "3d")
    told("--remind", "3d", url=receiver.url + "/another")
    assert len(receiver.requests) == 1
    told("--remind", "36h")
    assert receiver.names[1:] == [["Late"]] and late


def test_a_reminder_that_fails_comes_again_for_those_who_still_have_not_opened(
        told, files, receiver, monkeypatch):
    monkeypatch.setattr(Notices, "RETRIES", [0.0] * 9)
    ada, bob = make(files, "Ada", "Bob", created=NOW - 4 * DAY)
    receiver.answer = lambda number: (500 if number == 1 else 200, {})
    told("--remind", "3d", code=1)
    append_events(files, [hit(ada)])
    told("--remind", "3d")
    assert receiver.names == [["Ada", "Bob"], ["Bob"], ["Ada"]]
    assert len({*receiver.ids[:2]}) == 1


def test_a_reminder_that_failed_is_none_for_who_wants_no_more_reminders(
        told, files, receiver, monkeypatch):
    monkeypatch.setattr(Notices, "RETRIES", [0.0] * 9)
    make(files, "Ada", created=NOW - 4 * DAY)
    fresh, = make(files, "Fresh")
    receiver.answer = lambda number: (500 if number == 1 else 200, {})
    told("--remind", "3d", code=1)
    append_events(files, [hit(fresh)])
    told()
    assert receiver.names == [["Ada"], ["Fresh"]]


# -- other receivers -------------------------------------------------------------------


@pytest.fixture
def noted(tmp_path):
    """Return a command that notes its MAILTRACKER_ variables, and what it noted."""
    script, out = tmp_path / "note.py", tmp_path / "noted.json"
    script.write_text(
        "import json, os\n"
        "facts = {k[12:].lower(): v for k, v in os.environ.items()"
        " if k[:12] == 'MAILTRACKER_'}\n"
        f"with open({str(out)!r}, 'a') as file:\n"
        "    file.write(json.dumps(facts) + '\\n')\n")

    def read(number):
        eventually(lambda: out.exists() and out.read_text().count("\n") >= number)
        return [json.loads(line) for line in out.read_text().splitlines()]
    return f"exec:'{sys.executable}' '{script}'", read


def test_a_command_is_run_for_each_open_and_finds_it_in_its_environment(
        noted, files, newtags, serve, tmp_path):
    command, read = noted
    tag, = newtags(tmp_path / "register.csv", names=['"Jö ""the boss"", 1"'])
    server = serve("--register", "register.csv", "--compose-window", 0)
    with service(command, "--every"):
        server.get(f"/{tag}.gif", {"User-Agent": "curl/7.88"})
        for n in 128, 140:
            server.get(f"/{tag}.gif", {"User-Agent": f"Mozilla/5.0 (X11; Linux x86_64; "
                                       f"rv:{n}.0) Gecko/20100101 Thunderbird/{n}.0"})
        start = time.monotonic()
        first, second = read(2)
        assert time.monotonic() - start < 1.5
    assert second.pop("notice") != first.pop("notice")
    events = [event for event in mailtracker.read_log(files.log)
              if event.event == "hit" and event.opens]
    for event, kind, facts in zip(events, ("first", "again"), (first, second)):
        assert facts == {"kind": kind, "name": 'Jö "the boss", 1', **{
            name: str(value) for name, value in event._asdict().items()}}


def test_no_name_and_no_agent_is_cut_or_run_in_a_command(noted, files, run, tmp_path):
    command, read = noted
    texts = ["$(touch owned) `touch owned`", "'\"; touch owned; '\"", "| touch owned",
             "--help", "\x1b[2J", "a\u2028b", "a\x0bb\x85c", "日本語", "x" * 200_000]
    make(files, "Zoe")
    run("notify", "--to", command, "--once")
    tags = make(files, *map(mailtracker.one_line, texts))
    append_events(files, [hit(tag, detail=f"M {text}") for tag, text in
                          zip(tags, texts)])
    assert run("notify", "--to", command, "--once")[0] == 0
    facts = read(len(texts))
    assert [fact["name"] for fact in facts] == [
        clean(mailtracker.one_line(text))[:10_000] for text in texts]
    assert all(fact["detail"].startswith("M ") for fact in facts)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("command, code, words", [
    ("exit 3", 0, "the command exits 3\n"), ("exit 75", 1, "to be told again in 5 s"),
    ("no-such-cmd", 0, "the command exits 127\n"),
    ("kill -9 $$", 0, "the command exits -9\n"),
    ("sleep 99 & wait", 0, "the command exits -9\n"),
    ("head -c 300000 /dev/zero; exit 1", 0, "the command exits 1\n")])
def test_a_command_that_fails_is_said_and_run_again_if_it_asks_for_that(
        command, code, words, files, run, monkeypatch):
    monkeypatch.setattr(mailtracker, "COMMAND_SECONDS", 0.5)
    make(files, "Zoe")
    run("notify", "--to", f"exec:{command}", "--once")
    append_events(files, [hit(tag) for tag in make(files, "Ada", "Bob")])
    found, out, err = run("notify", "--to", f"exec:{command}", "--once")
    assert (found, len(out.splitlines())) == (code, 2 * (not code))
    assert err.count(words) == 2 - code


@linux
def test_a_command_that_runs_when_notify_stops_is_ended_and_run_again(files, tmp_path):
    make(files, "Zoe")
    with service("exec:sleep 77 & echo $! >> pid; wait") as process:
        append_events(files, [hit(*make(files, "Ada"))])
        pid = eventually(lambda: (tmp_path / "pid").exists()
                         and (tmp_path / "pid").read_text().strip())
        process.terminate()
        assert process.wait(10) == 0
    eventually(lambda: not Path(f"/proc/{pid}/cmdline").exists()
               or not Path(f"/proc/{pid}/cmdline").read_bytes())
    assert state("exec:sleep 77 & echo $! >> pid; wait")[4] == 1


@pytest.fixture
def ada(files, run):
    """Let a receiver know all until an open by <b>Ada; & Bob</b>; return its once."""
    def open_by(to, *options):
        make(files, "Zoe")
        assert run("notify", "--to", to, "--once", *options)[0] == 0
        append_events(files, [hit(*make(files, "<b>Ada; & Bob</b>"))])
        return run("notify", "--to", to, "--once", *options)
    return open_by


@pytest.mark.parametrize("program, place, text", [
    ("notify-send", 2, "&lt;b&gt;Ada; &amp; Bob&lt;/b&gt;: "),
    ("osascript", 6, "<b>Ada; & Bob</b>: ")])
def test_the_desktop_gets_title_and_text_as_words_of_their_own(
        program, place, text, ada, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / program
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin")
    assert ada("desktop")[0] == 0
    words = (tmp_path / "words").read_text().splitlines()
    assert words[place] == "Opened: <b>Ada; & Bob</b>"
    assert words[place + 1].startswith(text)


def test_without_a_desktop_the_terminal_shows_it_or_it_waits(
        ada, files, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = ada("desktop")
    assert code == 1 and "neither notify-send nor osascript shows it" in err
    path, = Path(".").glob("*.notify")
    path.write_text(json.dumps([*json.loads(path.read_text())[:-1], 0.0]))
    near, far = pty.openpty()
    with launch(subprocess.Popen, "notify", "--to", "desktop", "--once", stderr=far,
                stdout=subprocess.DEVNULL) as process:
        assert process.wait(20) == 0
    os.close(far)
    shown = os.read(near, 9999).decode()
    os.close(near)
    assert re.fullmatch(
        "\x1b]777;notify;Opened: <b>Ada, & Bob</b>;<b>Ada, & Bob</b>: [^;\x1b]*"
        "\x1b\\\\", shown)


@pytest.mark.parametrize("sender", ["", "Më <me@y.org>"])
def test_a_mail_tells_it(sender, ada):
    with FakeSmarthost() as host:
        options = ["--smarthost", f"127.0.0.1:{host.port}"]
        options += ["--from", sender] if sender else []
        assert ada("mailto:ann@x.org", *options)[0] == 0
        message, = host.messages
    assert [*message.recipients] == ["ann@x.org"]
    assert message.sender == ("me@y.org" if sender else "ann@x.org")
    mail = email.message_from_bytes(message.data, policy=email.policy.default)
    assert mail["Subject"] == "Opened: <b>Ada; & Bob</b>"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail.get_content().startswith("<b>Ada; & Bob</b>: ")
    assert mail["Message-ID"].startswith("<msg_") and mail["Date"]


def test_a_mail_that_is_refused_waits(ada):
    with FakeSmarthost(lambda stage, _: "451 4.3.0 later" * (stage == "dot") or None
                       ) as host:
        code, _, err = ada("mailto:ann@x.org", "--smarthost", f"127.0.0.1:{host.port}")
    assert code == 1 and "451 4.3.0 later; to be told again in 5 s" in err


@pytest.mark.parametrize("line, words", [
    ("", "--to: say whom to tell"), ("--to nowhere", "nowhere is not a URL, mailto:"),
    ("--to mailto:x", "not a URL"), ("--to ftp://x.org/", "not a URL"),
    ("--to https://ann:pw@x.org/", "not a URL"), ("--to http://", "not a URL"),
    ("--to http://x:99999/", "not a URL"), ("--to http://x/a\nb", "not a URL"),
    ("--to https://x.org/ --format telegram", "invalid choice"),
    ("--to desktop --format slack", "--format needs --to http:..."),
    ("--to exec:true --secret-command x", "--secret-command needs --to http:..."),
    ("--to mailto:a@x.org", "mailto: needs --smarthost"),
    ("--to desktop --smarthost x", "--smarthost needs --to mailto:..."),
    ("--to desktop --from a@x.org", "--from needs --to mailto:..."),
    ("--to desktop --user x", "--user needs --smarthost"),
    ("--to https://x.org/ --format ntfy", "such as https://ntfy.sh/topic"),
    ("--to https://x.org/a/b --format ntfy", "such as https://ntfy.sh/topic"),
    ("--to desktop --remind soon", "not a time such as 3d"),
    ("--to desktop --on revived --every", "--on goes without --every"),
    ("--to desktop --once --follow", "--once goes without --follow")])
def test_what_would_have_no_effect_or_sense_is_wrong_usage(line, words, run, folder):
    code, out, err = run("notify", *line.split(" ") if line else ())
    assert (code, out) == (2, "") and words in err and os.listdir(folder) == []


def test_a_mistyped_register_is_an_error_and_makes_nothing(run, folder):
    code, _, err = run("notify", "--to", "desktop", "--register", "regster.csv")
    assert code == 1 and "no such register" in err and os.listdir(folder) == []


# -- kills ----------------------------------------------------------------------------


def check_kills(kills, tags, rate):
    """Kill notify at random while a receiver fails at a rate; count what it is told."""
    files, dice = mailtracker.Files("register.csv"), random.Random(1)
    taken = []

    def answer(number):
        if dice.random() < rate:
            return dice.choice([(500, {}), (302, {"Location": "/"}), says(b""),
                                says(b"", 0.2), (503, {"Retry-After": "0"})])
        taken.append(number)  # and the answer may get lost
        return 204, {}

    with Receiver(answer) as receiver:
        fast = {"GATHER": 0.02, "RETRIES": [0.02] * 500, "MOST": 3}
        ids = make(files, *(f"P{n:03}" for n in range(tags)))
        with service(receiver.url, **fast):
            pass
        rest = [*ids]

        def log():
            while rest:
                append_events(files, [hit(rest.pop(0), when=int(time.time()))])
                time.sleep(kills * 0.25 / tags)

        writer = threading.Thread(target=log)
        writer.start()
        for _ in range(kills):
            with service(receiver.url, ready=False, **fast) as process:
                time.sleep(dice.uniform(0.15, 0.4))
                process.kill()
                process.wait()
        writer.join()
        with service(receiver.url, **fast):
            eventually(lambda: {*sum(receiver.names, [])} >= {
                f"P{n:03}" for n in range(tags)}, 60)
            eventually(lambda: state(receiver.url)[3] == "")
    requests = [receiver.requests[number - 1] for number in taken]
    notices = collections.Counter(r.headers["webhook-id"] for r in requests)
    by_name = collections.defaultdict(set)
    for request in requests:
        for tag in request.body["data"]["tags"]:
            by_name[tag["name"]].add(request.headers["webhook-id"])
    doubles = sum(count - 1 for count in notices.values())
    print(f"{len(by_name)} of {tags} told in {len(notices)} notices, {doubles} twice, "
          f"{len(receiver.requests) - len(taken)} of {len(receiver.requests)} failed")
    assert len(by_name) == tags and doubles <= kills
    assert all(len(ids) == 1 for ids in by_name.values())


def test_kills_lose_nothing_and_what_comes_twice_has_one_id():
    check_kills(5, 30, 0.2)


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    check_kills(int(sys.argv[1]), 4 * int(sys.argv[1]), 0.2)
