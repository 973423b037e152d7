"""A smarthost on 127.0.0.1 that is strict, and can fail at every stage.

    python3 tests/smtp_server.py --store FILE [--rate 0.15] [--seed N] [--port 0]

prints its port and runs until stdin ends. In tests: `with FakeSmarthost(script) as h:`.

script(stage, argument) is asked before each answer, in the connection's thread: connect
(""), ehlo, helo (name), auth (mechanism), mail, rcpt (address), data, body, dot
(recipients with commas between), starttls, rset, noop, vrfy and quit. It says
    None            the normal way
    "550 5.1.1 no"  this answer; 4, 5: nothing is done; 2, 3: done, but worded like this
    "close"         nothing is done, the connection is dropped without an answer
    "close-after"   done (at dot: taken and stored), but dropped without an answer
    "hang"          nothing is done, silent for `hang` seconds, then dropped
body comes between the 354 and the text: only close and hang make sense there.
What breaks a rule is refused without asking the script.
"""
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import json
import os
import random
import re
import select
import socket
import socketserver
import ssl
import threading
import time

EXTENSIONS = "SIZE 10240000", "8BITMIME", "PIPELINING", "ENHANCEDSTATUSCODES"
LATER, SENDER = "451 4.3.0 try again later", "550 5.7.1 sender not allowed"
OUTCOMES = {            # what chaos chooses from, evenly, when a stage is to fail
    "connect": ("421 4.3.2 too busy", "close"), "ehlo": ("421 4.3.0 closing", "close"),
    "auth": ("454 4.7.0 cannot check now", "close"), "mail": (LATER, SENDER, "close"),
    "rcpt": ("452 4.2.2 mailbox full", "550 5.1.1 no such user", "close"),
    "data": (LATER, SENDER, "close"),
    "dot": (LATER, SENDER, "552 5.2.2 mailbox full", "close", "close-after")}
ANSWERS = {"EHLO": "250 fake.example", "HELO": "250 fake.example",
           "STARTTLS": "220 2.0.0 begin", "AUTH": "235 2.7.0 ok",
           "MAIL": "250 2.1.0 ok", "RCPT": "250 2.1.5 ok", "DATA": "354 end with a dot",
           "RSET": "250 2.0.0 ok", "NOOP": "250 2.0.0 ok", "VRFY": "252 2.5.0 perhaps",
           "QUIT": "221 2.0.0 bye"}
# The states in which a command can be; all others always can.
WHEN = {"EHLO": "new ready mail rcpt", "HELO": "new ready mail rcpt", "AUTH": "ready",
        "STARTTLS": "ready", "MAIL": "ready", "RCPT": "mail rcpt", "DATA": "rcpt"}
PARAMETERS = {"SIZE": "SIZE", "BODY": "8BITMIME", "SMTPUTF8": "SMTPUTF8",
              "AUTH": "AUTH", "RET": "DSN", "ENVID": "DSN", "NOTIFY": "DSN",
              "ORCPT": "DSN"}
PATH = re.compile(r'(?:MAIL FROM|RCPT TO):<((?:"(?:\\.|[^"\\])*"|[^<>"\s])*)>'
                  r"(?<!TO:<>)((?: \S+)*)", re.I)
# PLAIN: [id] NUL user NUL password. XOAUTH2: user= user ^A auth=Bearer token ^A ^A.
CREDENTIALS = re.compile("(?:[^\0]*\0|user=)([^\0\1]+)(?:\0|\1auth=Bearer )"
                         "([^\0\1]+)(?:\1\1)?")
Message = collections.namedtuple("Message", "sender recipients data")
Login = collections.namedtuple("Login", "mechanism user accepted encrypted")


def chaos(rate, seed, outcomes=OUTCOMES):
    """Return a script that fails at this rate at each stage in a table of outcomes.

    What the n-th time brings that a stage comes with an argument depends on the seed
    and these three only, not on the order in which threads run.
    """
    lock, times = threading.Lock(), collections.Counter()

    def script(stage, argument):
        with lock:
            times[stage, argument] += 1
            count = times[stage, argument]
        draw = random.Random(f"{seed} {stage} {argument} {count}")
        fails = stage in outcomes and draw.random() < rate
        return draw.choice(outcomes[stage]) if fails else None
    return script


def on(stage, *wishes, about=""):
    """Return a script that says these at a stage, one after the other."""
    left = [*wishes]
    return lambda name, argument: left.pop(0) \
        if name == stage and left and about in argument else None


class Session(socketserver.StreamRequestHandler):
    """One connection; a ConnectionError ends it, whoever wants that."""

    timeout, disable_nagle_algorithm = 120, True

    def handle(self):
        """Greet, and obey until the client or the script ends it."""
        with contextlib.suppress(ConnectionError, socket.timeout, ssl.SSLError):
            self.begin(self.server.implicit)
            if self.stage("connect", "", lambda: "220 fake.example ESMTP")[0] != "2":
                self.state = "refused"
            while True:
                self.obey(self.line())

    def begin(self, tls):
        """Forget what came before, and what was read ahead; go on by TLS or without."""
        self.rfile.close()
        if tls:     # the handshake comes with the first byte: a stop can end it then
            self.connection = self.server.tls.wrap_socket(self.request, True, False)
        self.rfile = self.connection.makefile("rb")
        self.tls, self.user, self.state = tls, "", "new"
        self.offered, self.recipients, self.declared = {}, [], []
        self.server.sockets.add(self.connection)
        self.go_on_if(not self.server.stopping.is_set())

    def finish(self):
        """Close the connection, also where TLS has taken its socket."""
        super().finish()
        self.connection.close()
        self.server.sockets.discard(self.connection)

    def go_on_if(self, wanted):
        """End the connection otherwise."""
        if not wanted:
            raise ConnectionAbortedError

    def line(self):
        """Return the next line; note a breach of RFC 5321, 2.3.8 and 4.5.3.1.6."""
        line = self.rfile.readline()
        whole, most = line.endswith(b"\r\n"), 1001 if line.startswith(b".") else 1000
        self.go_on_if(line.endswith(b"\n"))
        strays = {"bare LF": not whole, "bare CR": line.count(b"\r") != whole,
                  "long line": len(line) > most}
        self.server.strays.extend((what, line[:60]) for what in strays if strays[what])
        return line

    def answer(self, text):
        """Send an answer, if there is one, and return it; 221 and 421 are the last."""
        self.connection.sendall(f"{text}\r\n".encode() if text else b"")
        self.go_on_if(text[:3] not in ("221", "421"))
        return text

    def stage(self, stage, argument, act):
        """Do what belongs to a stage as the script says; return what was answered."""
        wish = self.server.script(stage, argument) or ""
        if not re.match(r"[2-5]\d\d[ -].|(close|close-after|hang)?$", wish):
            raise ValueError(f"a script cannot say {wish!r}")
        self.server.stopping.wait(self.server.hang if wish == "hang" else 0)
        self.go_on_if(wish not in ("hang", "close"))
        done = wish if wish[:1] in ("4", "5") else act()
        self.go_on_if(wish != "close-after")
        return self.answer(wish if wish and done[:1] in ("2", "3") else done)

    def obey(self, line):
        """Answer a command, and do what follows DATA and STARTTLS."""
        text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
        verb, _, argument = text.partition(" ")
        verb, path = verb.upper(), PATH.fullmatch(text)
        self.server.log.append((verb, argument))
        about = (path[1] if path else ",".join(self.recipients) if verb == "DATA"
                 else argument.partition(" ")[0])
        done = self.wrong(verb, path, line)
        if done:
            self.answer(done)
        else:
            done = self.stage(verb.lower(), about,
                              lambda: self.act(verb, about, argument))
        if verb == "DATA" and done[0] == "3":
            self.receive(about)
        if verb == "STARTTLS" and done[0] == "2":
            self.begin(tls=True)

    def wrong(self, verb, path, line):
        """Return the answer to a command that breaks a rule; "" to others."""
        words = path[2].upper().split() if path else ()
        declared = words if verb == "MAIL" else self.declared
        needed = {PARAMETERS.get(word.partition("=")[0]) for word in words}
        size = re.search(rb" SIZE=(\d{1,18})\b", line, re.I)
        return next((answer for is_so, answer in (
            (not line.endswith(b"\r\n"), "500 5.5.2 a line ends with CRLF"),
            (verb not in ANSWERS, "500 5.5.2 unknown command"),
            (self.state not in WHEN.get(verb, self.state), "503 5.5.1 not now"),
            (verb in ("AUTH", "STARTTLS") and verb not in self.offered, "502 5.5.1 no"),
            (verb == "AUTH" and self.user, "503 5.5.1 logged in already"),
            (verb == "MAIL" and self.server.users and not self.user, "530 5.7.0 AUTH"),
            (verb in ("MAIL", "RCPT") and not path, "501 5.1.7 bad address"),
            (not needed <= {*self.offered}, "555 5.5.4 parameter not offered"),
            (path and not line.isascii() and "SMTPUTF8" not in declared,
             "553 5.6.7 SMTPUTF8 not declared"),
            (size and path and int(size[1]) > self.most, "552 5.3.4 too big"),
        ) if is_so), "")

    def act(self, verb, about, argument):
        """Do what a command asks; return the answer."""
        if verb == "AUTH":
            return self.log_in(about.upper(), argument.partition(" ")[2])
        if verb == "RCPT":
            self.state, self.recipients = "rcpt", [*self.recipients, about]
        if verb == "MAIL":
            self.state, self.recipients = "mail", []
            self.sender, self.declared = about, argument.upper().split()
        hello = verb in ("EHLO", "HELO")
        if hello or verb == "RSET" and self.state in ("mail", "rcpt"):
            self.state = "ready"
        return self.offer(verb) if hello else ANSWERS[verb]

    def offer(self, verb):
        """Return the answer to EHLO or HELO."""
        server = self.server
        words = [*server.extensions, *["STARTTLS"] * bool(server.tls and not self.tls),
                 *[f"AUTH {server.mechanisms}"] * bool(server.users)]
        self.offered = {word.split()[0]: word for word in words if verb == "EHLO"}
        self.most = int((self.offered.get("SIZE", "").split() + [0, 0])[1]) or 1 << 62
        names = [ANSWERS[verb][4:], *self.offered.values()]
        return "".join(f"250-{name}\r\n" for name in names[:-1]) + f"250 {names[-1]}"

    def receive(self, about):
        """Take a message: only CRLF.CRLF ends it."""
        self.stage("body", about, str)
        lines, fresh = [], True
        while (line := self.line()) != b".\r\n" or not fresh:
            lines.append(line[1:] if fresh and line.startswith(b".") else line)
            fresh = line.endswith(b"\r\n")
        self.server.log.append((".", about))
        data = b"".join(lines)
        if not data.isascii() and "BODY=8BITMIME" not in self.declared:
            self.server.strays.append(("8 bits not declared", data[:60]))
        self.stage("dot", about, lambda: "552 5.3.4 too big" if len(data) > self.most
                   else self.server.take(Message(self.sender, self.recipients, data)))
        self.state = "ready"

    def ask(self, prompt, given=""):
        """Return what the client says, or has said already, from Base64."""
        if not given:
            self.answer("334 " + base64.b64encode(prompt.encode()).decode())
            given = self.line().strip()
        return base64.b64decode(given, validate=True).decode()

    def log_in(self, mechanism, first):
        """Check a name and a password or token; return the answer."""
        if mechanism not in self.offered["AUTH"].split()[1:]:
            return "504 5.5.4 not this mechanism"
        try:
            said = self.ask("Username:" if mechanism == "LOGIN" else "", first)
            if mechanism == "LOGIN":
                said = f"\0{said}\0{self.ask('Password:')}"
            user, password = CREDENTIALS.fullmatch(said).groups()
        except (ValueError, AttributeError):
            return "501 5.5.2 not well formed"
        accepted = self.server.users.get(user) == password
        self.server.logins.append(Login(mechanism, user, accepted, bool(self.tls)))
        if mechanism == "XOAUTH2" and not accepted:
            self.ask('{"status":"401"}')
        self.user = user if accepted else ""
        return ANSWERS["AUTH"] if accepted else "535 5.7.8 wrong name or password"


class FakeSmarthost(socketserver.ThreadingTCPServer):
    """A server that runs while it is a context, and keeps what it saw in lists.

    messages: Message; log: (verb, argument), "." for the dot; logins: Login;
    strays: (what, where), for bare LF, bare CR, long line, 8 bits not declared.
    With users, AUTH is offered and MAIL needs it; with a certificate, STARTTLS is
    offered or TLS is implicit. store: a file to which each message is added as a line
    of JSON, on disk before the answer. script, users, hang may change at any time.
    """

    allow_reuse_address, request_queue_size = True, 128

    def __init__(self, script=None, *, port=0, extensions=EXTENSIONS, users=None,
                 mechanisms="PLAIN LOGIN XOAUTH2", cert=None, key=None, implicit=False,
                 store=None, hang=5.0):
        self.script, self.hang = script or (lambda stage, argument: None), hang
        self.extensions, self.mechanisms = extensions, mechanisms
        self.users, self.store = users or {}, store
        self.messages, self.log, self.logins, self.strays = [], [], [], []
        self.connections, self.sockets, self.stopping = 0, set(), threading.Event()
        self.tls, self.implicit = None, implicit
        if cert:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(cert, key)
        super().__init__(("127.0.0.1", port), Session)
        self.port = self.server_address[1]

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.shutdown()
        for connection in [*self.sockets]:
            with contextlib.suppress(OSError):
                # Not the method of an SSLSocket: its thread may be reading.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self.server_close()     # waits for the threads
        self.thread.join()

    def process_request(self, request, client_address):
        """Count a connection and serve it in a thread."""
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        """Let a bug, also one in a script, end its thread: pytest sees that."""
        raise

    def take(self, message):
        """Keep a message; return the answer."""
        if self.store:
            fields = {**message._asdict(), "data": message.data.decode("latin-1")}
            with open(self.store, "ab", buffering=0) as file:
                file.write(json.dumps(fields).encode() + b"\n")
                os.fsync(file.fileno())
        self.messages.append(message)
        return "250 2.0.0 taken"


def main():
    """Serve until stdin ends, but no longer than allowed."""
    parser = argparse.ArgumentParser(description="A smarthost for tests.")
    parser.add_argument("--store", required=True)
    for name, default in ("rate", 0.0), ("seed", 0), ("port", 0), ("seconds", 300.0):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    script = chaos(args.rate, args.seed) if args.rate else None
    with FakeSmarthost(script, port=args.port, store=args.store) as host:
        host.messages = host.log = host.strays = collections.deque(maxlen=0)
        print(host.port, flush=True)
        while select.select([0], [], [], max(0, end - time.monotonic()))[0]:
            if not os.read(0, 4096):
                break


if __name__ == "__main__":
    main()
