"""Postfix delivers, delays and bounces a mailing: the register knows which is which."""
from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from conftest import eventually
from smtp_server import FakeSmarthost

POSTFIX = shutil.which("postfix", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(
    not POSTFIX or os.geteuid() != 0,
    reason="needs root and Postfix (Debian package postfix)")

# Nothing but loopback: no DNS, all mail to the world goes to one server; home.test
# is delivered here. A mail that waits is tried every second.
MAIN = """compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/log
maillog_file_prefixes = {folder}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
disable_dns_lookups = yes
smtpd_peername_lookup = no
myhostname = mx.home.test
mydestination =
local_recipient_maps =
relayhost = [127.0.0.1]:{remote}
virtual_mailbox_domains = home.test
virtual_mailbox_base = {folder}
virtual_mailbox_maps = static:inbox/
virtual_uid_maps = static:{owner}
virtual_gid_maps = static:{owner}
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 1s
delay_warning_time = 1s
"""
MASTER = """127.0.0.1:{port} inet n - n - - smtpd
postlog unix-dgram n - n - 1 postlogd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
scache unix - - n - 1 scache
smtp unix - - n - - smtp
virtual unix - n n - - virtual
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
error unix - - n - - error
retry unix - - n - - error
"""
ANSWERS = {  # of the server where the recipients are
    ("rcpt", "unknown@away.test"): "550 5.1.1 no such user",
    ("rcpt", "full@away.test"): "552 5.2.2 mailbox full",
    ("rcpt", "grey@away.test"): "450 4.2.0 greylisted, come again",
    ("dot", "policy@away.test"): "550 5.7.1 refused by policy",
}
NAMES = "ok", "unknown", "full", "policy", "grey"
TEMPLATE = "Subject: News for {name}\n\n<html><body><p>Hello {name}</p></body></html>\n"


class Postfix:
    """An own instance of Postfix that hands mail on to a port of this machine."""

    def __init__(self, folder, remote):
        """Write its files; the mailbox belongs to nobody, as root may not have one."""
        owner, self.remote, self.inbox = 65534, remote, folder / "inbox"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.settings, self.log = folder / "etc", folder / "log"
        for path in self.settings, folder / "queue", self.inbox:
            path.mkdir()
        os.chown(self.inbox, owner, owner)
        for name, text in ("main.cf", MAIN), ("master.cf", MASTER):
            (self.settings / name).write_text(text.format(
                folder=folder, remote=remote.port, owner=owner, port=self.port))

    def run(self, *command):
        """Start, stop or reload it."""
        done = subprocess.run([POSTFIX, "-c", self.settings, *command], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout

    def expire(self):
        """Let it give up what waits."""
        with open(self.settings / "main.cf", "a") as file:
            file.write("maximal_queue_lifetime = 1s\nbounce_queue_lifetime = 1s\n")
        self.run("reload")

    def wait(self, count):
        """Wait until so many mails are in the inbox."""
        eventually(lambda: len([*self.inbox.glob("new/*")]) == count, 20)


@pytest.fixture
def postfix():
    """Start Postfix, in a folder that its processes without root reach."""
    with FakeSmarthost(lambda *asked: ANSWERS.get(asked)) as remote, \
            tempfile.TemporaryDirectory(prefix="postfix-") as folder:
        os.chmod(folder, 0o711)
        started = Postfix(Path(folder), remote)
        started.run("start")
        yield started
        started.run("stop")
        print(started.log.read_text())  # shown when the test failed


def test_postfix_bounces_a_mailing_and_each_status_is_right_at_each_stage(
        tracker, postfix, tmp_path):
    (tmp_path / "news.txt").write_text(TEMPLATE)
    (tmp_path / "people.csv").write_text("name,email\n" + "".join(
        f"{name},{name}@away.test\n" for name in NAMES))

    def run(*args):
        done = tracker(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def send(campaign):
        run("send", "news.txt", "people.csv", "--from", "Ann <ann@home.test>", "--yes",
            "--smarthost", f"127.0.0.1:{postfix.port}", "--server", "t.example.org",
            "--campaign", campaign)

    def statuses(campaign="spring"):
        rows = json.loads(run("dump", "--format", "json"))
        return {row["name"]: row["status"] for row in rows
                if row["campaign"] == campaign}

    send("spring")
    assert statuses() == dict.fromkeys(NAMES, "sent")
    postfix.wait(4)             # three bounces, and word that one is late
    run("scan", postfix.inbox)
    late = {**dict.fromkeys(NAMES, "bounced"), "ok": "sent", "grey": "delayed"}
    assert statuses() == late
    postfix.expire()
    postfix.wait(5)
    run("scan", postfix.inbox)
    assert statuses() == {**late, "grey": "bounced"}

    files = [*tmp_path.glob("register*.csv")]
    before = [file.read_bytes() for file in files]
    run("scan", postfix.inbox)
    assert [file.read_bytes() for file in files] == before

    arrived, = postfix.remote.messages
    tag, = re.findall(rb"https?://t\.example\.org\S*/(\w+)\.gif", arrived.data)
    assert b"Message-ID: <%b@home.test>\r\n" % tag in arrived.data
    send("autumn")              # to all but the one who never had a mailbox
    assert {*statuses("autumn")} == {*NAMES} - {"unknown"}
