"""Two IMAP servers for tests: a scripted one, and Dovecot where it is installed.

Import the fixtures by name. Both know one user, whose password is secret.
"""
from __future__ import annotations

import base64
import grp
import mailbox
import os
import pwd
import shutil
import signal
import socket
import socketserver
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from conftest import eventually


class Imap(socketserver.StreamRequestHandler):
    """As much of an IMAP server as scan needs, over self.server.messages by folder."""

    disable_nagle_algorithm = True

    def handle(self):
        self.say("* OK hello")
        for line in self.rfile:
            number, verb, *words = line.decode().replace("UID ", "", 1).split()
            self.server.asked.append(" ".join([verb, *words]))
            answer = getattr(self, verb.lower())(*words)
            self.say(f"{number} {answer or 'OK done'}")

    def say(self, line, literal=b"", rest=""):
        self.wfile.write(line.encode() + literal + rest.encode() + b"\r\n")

    def capability(self):
        self.say(f"* CAPABILITY IMAP4rev1 SPECIAL-USE {self.server.offers}")

    def authenticate(self, mechanism):
        self.say("+ ")
        self.server.asked.append(base64.b64decode(self.rfile.readline()).decode())
        return None if "secret" in self.server.asked[-1] else "NO no such \x1b[1muser"

    def login(self, user, password):
        return None if (user, password) == ('"ann@x.test"', '"secret"') else "NO"

    def list(self, *_):
        self.say('* LIST (\\Noselect) "/" all')
        self.say('* LIST (\\HasNoChildren \\Junk) "/" "M&APw-ll &- co"')

    def examine(self, *words):
        name = " ".join(words).strip('"')
        if name not in self.server.folders:
            return "NO no such mailbox"
        self.folder = self.server.folders[name]
        self.say(f"* {len(self.folder)} EXISTS")
        self.say("* OK [UIDVALIDITY 7] ok")

    def search(self, numbers, _, uids, *__):
        low, high = map(int, numbers.split(":"))
        first = min(int(uids.split(":")[0]) - 100, len(self.folder))  # for n:*
        self.say("* SEARCH " + " ".join(
            str(100 + n) for n in range(max(low, first), high + 1)))

    def fetch(self, uids, _, what):
        numbers = [int(uid) - 100 for uid in uids.split(",")]
        if not all(self.folder[n - 1] for n in numbers):
            return "NO one of them is broken"
        for n in numbers:
            data = self.folder[n - 1]
            if "HEADER" in what:
                data = data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            self.say(f"* {n} FETCH (BODY[]<0> {{{len(data)}}}\r\n", data,
                     f" UID {n + 100})")


@pytest.fixture
def imap_server():
    """Return a scripted IMAP server, with its folders and what it was asked."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Imap) as server:
        server.asked, server.folders = [], {"INBOX": [], "M&APw-ll &- co": []}
        server.offers = "AUTH=PLAIN AUTH=XOAUTH2"
        server.url = f"imap://ann%40x.test@127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


DOVECOT = """
protocols = imap
listen = 127.0.0.1
base_dir = {home}/run
state_dir = {home}/run
ssl = no
log_path = {home}/log
default_internal_user = {user}
default_internal_group = {group}
default_login_user = {user}
mail_location = maildir:{home}/Maildir
passdb {{
  driver = static
  args = password=secret
}}
userdb {{
  driver = static
  args = uid={uid} gid={gid} home={home}
}}
namespace inbox {{
  inbox = yes
  mailbox Junk {{
    special_use = \\Junk
  }}
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {port}
  }}
}}
service anvil {{
  chroot =
}}
service stats {{
  chroot =
}}
"""


def answers(port):
    """Tell whether somebody serves a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def dovecot():
    """Start Dovecot on an empty Maildir; return the Maildir and its URL."""
    program = shutil.which("dovecot", path=os.environ["PATH"] + ":/usr/sbin")
    if not program:
        pytest.skip("dovecot is not installed")
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    with tempfile.TemporaryDirectory() as home, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        Path(home, "conf").write_text(DOVECOT.format(
            home=home, port=port, user=user.pw_name, uid=user.pw_uid, gid=user.pw_gid,
            group=grp.getgrgid(user.pw_gid).gr_name))
        mailbox.Maildir(f"{home}/Maildir")
        mailbox.Maildir(f"{home}/Maildir/.Junk")
        for path in [home, *Path(home).rglob("*")]:
            os.chown(path, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} \
            if os.geteuid() == 0 else {}
        with subprocess.Popen([program, "-F", "-c", f"{home}/conf"],
                              start_new_session=True, **as_user) as process:
            try:
                eventually(lambda: answers(port))
                yield Path(home, "Maildir"), f"imap://ann@127.0.0.1:{port}"
            finally:
                os.killpg(process.pid, signal.SIGKILL)
