"""Is the smarthost of the mail tests right? Asked by smtplib and by raw bytes.

`talk` sends raw bytes after the greeting and returns the codes of all answers.
"""
from __future__ import annotations

import base64
import contextlib
import json
import smtplib
import socket
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import smtp_server
from conftest import read_all
from smtp_server import FakeSmarthost, chaos, on

MAIL = b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\n"
DATA = b"EHLO x\r\n" + MAIL + b"DATA\r\n"


def talk(host, data):
    """Send bytes at once and nothing more; return the codes of the last lines."""
    with socket.create_connection(("127.0.0.1", host.port), timeout=10) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        lines = read_all(client).decode().splitlines()
    return " ".join(line[:3] for line in lines if line[3] == " ")


def send(host, to=("b@x",), data=b"Subject: hi\r\n\r\n.dot\r\n", **options):
    """Send a message with smtplib; return what it refused."""
    with smtplib.SMTP("127.0.0.1", host.port, "x", timeout=10) as client:
        return client.sendmail("a@x", to, data, **options)


@pytest.fixture
def tls(certificates):
    """Return the options for TLS, and what a client needs to verify it."""
    cert, key = certificates / "first.pem", certificates / "first.key"
    return {"cert": cert, "key": key}, ssl.create_default_context(cafile=cert)


def test_what_smtplib_sends_arrives_and_is_stored(tmp_path):
    data = b".\r\n..\r\nh\xc3\xa9\r\n"
    with FakeSmarthost(store=tmp_path / "store") as host:
        assert send(host, ["b@x", "c@x"], data, mail_options=["BODY=8BITMIME"]) == {}
        assert host.messages == [("a@x", ["b@x", "c@x"], data)]
        assert (host.connections, host.strays) == (1, [])
    stored = json.loads((tmp_path / "store").read_text())
    assert [*stored.values()] == ["a@x", ["b@x", "c@x"], data.decode("latin-1")]


@pytest.mark.parametrize("end, stray", [
    (b"\n.\n", "bare LF"), (b"\n.\r\n", "bare LF"), (b"\r\n.\n", "bare LF"),
    (b"\r.\r\n", "bare CR"), (b"\r\n.\r\r\n", "bare CR"), (b"\r.\r", "bare CR")],
    ids=repr)
def test_only_crlf_dot_crlf_ends_a_message(end, stray):
    with FakeSmarthost() as host:
        assert talk(host, DATA + b"a" + end + MAIL + b"\r\n.\r\n") == (
            "220 250 250 250 354 250")
        assert b"MAIL" in host.messages[0].data and len(host.messages) == 1
        assert {what for what, _ in host.strays} == {stray}


def test_a_dot_in_front_does_not_count_for_the_length_of_a_line():
    with FakeSmarthost() as host:
        lines = b".." + b"a" * 997 + b"\r\n" + b"b" * 998 + b"\r\n"
        assert talk(host, DATA + lines + b".\r\n").endswith("354 250")
        assert host.messages[0].data == lines[1:] and not host.strays
        talk(host, DATA + b"c" * 999 + b"\r\n\xff\r\n.\r\n")
        assert [what for what, _ in host.strays] == ["long line", "8 bits not declared"]


@pytest.mark.parametrize("said, codes", [
    (b"MAIL FROM:<a@x>", "503"), (b"FOO", "500"), (b"EHLO x\nNOOP", "500 250"),
    (b"EHLO x\r\nRCPT TO:<a@x>\r\nDATA", "250 503 503"),
    (b"EHLO x\r\nMAIL FROM:<>\r\nDATA\r\nMAIL FROM:<>\r\nRCPT TO:<>",
     "250 250 503 503 501"),
    (b"EHLO x\r\n" + MAIL + b"RSET\r\nDATA\r\nRSET", "250 250 250 250 503 250"),
    (b"HELO x\r\nMAIL FROM:<a> SIZE=1\r\nAUTH PLAIN x\r\nSTARTTLS", "250 555 502 502"),
    (b"EHLO x\r\nMAIL FROM:<a> SMTPUTF8\r\nMAIL FROM:<a> SIZE=10240001\r\nDATA",
     "250 555 552 503"),
    (DATA + b".\r\nDATA\r\nQUIT\r\nNOOP", "250 250 250 354 250 503 221")], ids=repr)
def test_order_is_kept(said, codes):
    with FakeSmarthost() as host:
        assert talk(host, said + b"\r\n") == f"220 {codes}"


def test_addresses_beyond_ascii_must_be_declared():
    said = "EHLO x\r\nMAIL FROM:<é@x>\r\nMAIL FROM:<é@x> SMTPUTF8\r\nRCPT TO:<b@ü>\r\n"
    with FakeSmarthost(extensions=["SMTPUTF8"]) as host:
        assert talk(host, said.encode()) == "220 250 553 250 250"


@pytest.mark.parametrize("stage, wish, error, taken", [
    ("connect", "554 no", smtplib.SMTPConnectError, 0),
    ("connect", "close", smtplib.SMTPServerDisconnected, 0),
    ("ehlo", "421 no", smtplib.SMTPServerDisconnected, 0),
    ("mail", "550 5.7.1 no", smtplib.SMTPSenderRefused, 0),
    ("rcpt", "452 4.2.2 full", smtplib.SMTPRecipientsRefused, 0),
    ("data", "451 4.3.0 later", smtplib.SMTPDataError, 0),
    ("body", "close", (smtplib.SMTPServerDisconnected, ConnectionError), 0),
    ("dot", "552 5.2.2 full", smtplib.SMTPDataError, 0),
    ("dot", "close", smtplib.SMTPServerDisconnected, 0),
    ("dot", "hang", smtplib.SMTPServerDisconnected, 0),
    ("dot", "close-after", smtplib.SMTPServerDisconnected, 1),
    ("dot", "250 Ok <0102-abc>", None, 1)])
def test_each_stage_fails_as_the_script_says_and_the_next_try_is_fine(
        stage, wish, error, taken):
    with FakeSmarthost(on(stage, wish), hang=0.05) as host:
        with pytest.raises(error) if error else contextlib.nullcontext():
            send(host)
        assert len(host.messages) == taken
        send(host)
        assert len(host.messages) == taken + 1 and host.connections == 2


def test_one_of_three_recipients_is_refused():
    with FakeSmarthost(lambda _, who: "550 5.1.1 no" if who == "c@x" else None) as host:
        assert send(host, ["b@x", "c@x", "d@x"]) == {"c@x": (550, b"5.1.1 no")}
        assert host.messages[0].recipients == ["b@x", "d@x"]


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "implicit"])
def test_logins_are_checked_under_tls(tls, mechanism, implicit):
    options, context = tls
    with FakeSmarthost(users={"ann": "good"}, mechanisms=mechanism, implicit=implicit,
                       **options) as host:
        new = partial(smtplib.SMTP_SSL, context=context) if implicit else smtplib.SMTP
        with new("127.0.0.1", host.port, "x", timeout=10) as client:
            if not implicit:
                client.starttls(context=context)
            assert client.ehlo()[0] == 250 and not client.has_extn("starttls")
            assert client.mail("a@x")[0] == 530
            with pytest.raises(smtplib.SMTPAuthenticationError):
                client.login("ann", "bad")
            client.login("ann", "good")
            assert client.mail("a@x")[0] == 250
        assert host.logins == [(mechanism, "ann", good, True) for good in (False, True)]


def test_xoauth2_explains_a_wrong_token_before_it_refuses_it():
    def token(word):
        return base64.b64encode(b"user=ann\1auth=Bearer %b\1\1" % word)

    with FakeSmarthost(users={"ann": "good"}) as host:
        said = (b"EHLO x\r\nAUTH XOAUTH2 " + token(b"bad") + b"\r\n\r\nAUTH XOAUTH2\r\n"
                + token(b"good") + b"\r\nAUTH PLAIN ?\r\n")
        assert talk(host, said) == "220 250 334 535 334 235 503"


def test_what_was_sent_along_with_starttls_is_thrown_away(tls):
    with FakeSmarthost(**tls[0]) as host:
        assert talk(host, b"EHLO x\r\nSTARTTLS\r\nNOOP\r\n") == "220 250 220"
        assert [verb for verb, _ in host.log] == ["EHLO", "STARTTLS"]


def test_a_stop_ends_all_connections(tls):
    with FakeSmarthost(**tls[0]) as host:
        clients = [smtplib.SMTP("127.0.0.1", host.port, "x", timeout=10) for _ in "ab"]
        clients[0].starttls(context=tls[1])
    for client in clients:
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.noop()
    with FakeSmarthost(port=host.port) as again:
        assert send(again) == {}


def test_chaos_does_the_same_in_any_order_and_at_its_rate():
    whom = [f"{number % 500}@x" for number in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        one, other = (sorted(pool.map(partial(chaos(0.15, 7), "rcpt"), order), key=str)
                      for order in (whom, whom[::-1]))
    assert one == other and {*one} == {None, *smtp_server.OUTCOMES["rcpt"]}
    assert 220 < 2000 - one.count(None) < 380


def test_as_a_program_it_serves_until_its_stdin_ends(tmp_path):
    command = [sys.executable, smtp_server.__file__, "--store", tmp_path / "store"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        with smtplib.SMTP("127.0.0.1", int(process.stdout.readline()), "x") as client:
            client.sendmail("a@x", "b@x", "hi")
        process.communicate(timeout=10)
    assert process.returncode == 0
    assert json.loads((tmp_path / "store").read_text())["data"] == "hi\r\n"
