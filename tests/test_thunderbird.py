"""Thunderbird sends through the relay, and neither it nor its user notices."""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess

import pytest

from conftest import eventually
from conftest import launch
from smtp_server import FakeSmarthost

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("thunderbird", "Xvfb", "xdotool"))), reason="one of "
    "the Debian packages thunderbird, xvfb and xdotool is not installed")

PREFS = {
    "mail.accountmanager.accounts": "account1",
    "mail.account.account1.server": "server1",
    "mail.account.account1.identities": "id1",
    "mail.server.server1.type": "pop3",
    "mail.server.server1.hostname": "127.0.0.1",
    "mail.server.server1.userName": "ann",
    "mail.identity.id1.useremail": "ann@home.test",
    "mail.smtpservers": "smtp1",
    "mail.smtpserver.smtp1.hostname": "127.0.0.1",
    "mail.warn_on_send_accel_key": False,
    # All but this machine is out of reach.
    "network.proxy.type": 1, "network.proxy.socks": "127.0.0.1",
    "network.proxy.socks_port": 9,
}
PEOPLE = ["a@away.test", "b@away.test", "c@away.test"]
MAIL = f"to='{','.join(PEOPLE)}',subject=Plans,body='<p>Hello <b>you</b></p>',format=1"
IMAGE = re.compile(rb'<img src="http://t\.example\.org[:\d]*/(\w+)\.gif"[^>]*>')


@contextlib.contextmanager
def session(*command, use=subprocess.Popen, **options):
    """Start a program; end it, and then whatever it has left running."""
    with use(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
             start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def host(tmp_path):
    """Start a smarthost, and the relay in front of it: host.relay is its port."""
    log = tmp_path / "relay.log"
    with FakeSmarthost() as host, session(
            "relay", "--smarthost", f"127.0.0.1:{host.port}", "--server",
            "t.example.org", "--port", 0, "--logfile", log, cwd=tmp_path,
            use=lambda command, **more: launch(subprocess.Popen, *command, **more)):
        host.relay = int(eventually(lambda: re.search(
            r" 127\.0\.0\.1:(\d+)", log.exists() and log.read_text() or ""))[1])
        yield host


@pytest.fixture
def press(host, tmp_path):
    """Write a mail in Thunderbird; return what presses a key in one of its windows."""
    prefs = {**PREFS, "mail.smtpserver.smtp1.port": host.relay}
    (tmp_path / "prefs.js").write_text("".join(
        f"user_pref({json.dumps(key)}, {json.dumps(prefs[key])});\n" for key in prefs))
    with session("Xvfb", "-displayfd", "1", "-noreset", "-nolisten", "tcp",
                 stdout=subprocess.PIPE) as screen:
        name = screen.stdout.readline().decode().strip()
        quiet = {"env": {**os.environ, "HOME": str(tmp_path), "DISPLAY": f":{name}"},
                 "stdout": subprocess.DEVNULL}
        with session("thunderbird", "--profile", tmp_path, "-compose", MAIL, **quiet):
            # Window 0 is the one with the focus; others may take no key.
            yield lambda key, title: not subprocess.call(
                ["xdotool", "search", "--name", title, "windowfocus",
                 "key", "--window", "0", key], **quiet)


def send(press, host, count):
    """Press Send, and OK where Thunderbird complains, until the host got so many."""
    eventually(lambda: host.log.count(("DATA", "")) >= count or (
        press("Return", "Send Message Error") or press("ctrl+Return", "Write: Plans")
    ) and False, 40, pause=1)


def sent_copy(folder):
    """Return the copy that Thunderbird keeps, once it is whole."""
    sent = folder / "Mail/127.0.0.1/Sent"
    return eventually(lambda: sent.exists() and re.search(
        rb"(?s)\A.*--\s*\Z", sent.read_bytes()), 20)[0]


def ids_of(messages):
    """Return the id in the one pixel of each message, by its one recipient."""
    found = {recipient: IMAGE.findall(data) for _, (recipient,), data in messages}
    return {recipient: tag.decode() for recipient, (tag,) in sorted(found.items())}


def test_thunderbird_sends_each_recipient_a_pixel_and_keeps_a_copy_without(
        tracker, press, host, tmp_path):
    send(press, host, 3)
    copy, ids = sent_copy(tmp_path), ids_of(host.messages)
    assert [*ids] == PEOPLE and len({*ids.values()}) == len(host.messages) == 3
    message_id, = {*re.findall(rb"\nMessage-ID: .*\r", b"".join(
        message.data for message in host.messages))}
    assert message_id in copy
    assert b"Hello <b>you</b>" in copy and b"<img" not in copy
    dumped = json.loads(tracker("dump", "--format", "json").stdout)
    assert {row["email"]: (row["id"], row["name"], row["status"]) for row in dumped
            } == {email: (tag, "Plans", "sent") for email, tag in ids.items()}


def test_what_failed_for_one_goes_only_to_him_when_thunderbird_sends_again(
        press, host, tmp_path):
    answers = ["452 4.2.2 mailbox full"]
    host.script = lambda stage, about: (
        answers.pop() if answers and (stage, about) == ("dot", PEOPLE[1]) else None)
    send(press, host, 3)
    eventually(lambda: press("Return", "Send Message Error"), 20)
    send(press, host, 4)
    assert sent_copy(tmp_path)
    assert [*ids_of(host.messages)] == PEOPLE and len(host.messages) == 3
