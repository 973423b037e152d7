"""What doctor finds: proxies, certificates, names, files and mails, each at fault."""
from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import assert_nothing_raw, eventually, launch, servers

import mailtracker

HOST = "t.example.org"
TAG, OTHER = mailtracker.new_ids(bytes(16), 2)
PUBLIC = "93.184.216.34"
BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 "
                         "Firefox/145.0", "Accept-Language": "en"}
CORE = [name for name in mailtracker.Doctor.CHECKS if name not in ("wait", "message")]


def found_by(doctor, *names):
    """Return what checks find: check, level, and what is wrong."""
    findings = list(doctor.findings(names))
    assert all(bool(each.advice) == (each.level in ("error", "warning"))
               for each in findings)
    return [each[:3] for each in findings]


def assert_found(found, *wanted):
    """Fail unless exactly the wanted was found: check and level, part of the words."""
    assert len(found) == len(wanted), found
    for each, (check, level, words) in zip(found, wanted):
        assert each[:2] == (check, level) and words in each[2], found


def doctor_at(files, port, scheme="http", **more):
    """Return a doctor for a tracker at a public name, which lies on a local port."""
    return mailtracker.Doctor(
        files, f"{scheme}://{HOST}/{{id}}.gif", resolve=lambda *_: [PUBLIC],
        connect=lambda *_: mailtracker.connection_to("127.0.0.1", port), **more)


@contextlib.contextmanager
def listening(serve):
    """Call serve with each connection to a port, and yield the port."""
    def run():
        with contextlib.suppress(OSError):
            while True:
                line, peer = listener.accept()
                line.settimeout(10)
                with contextlib.suppress(OSError), line:
                    serve(line, peer[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


# -- proxies ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trackers(tmp_path_factory):
    """Return the files and ports of servers: trusting, trusting no proxy, keeping none.
    """
    folder = tmp_path_factory.mktemp("trackers")
    arguments = {"trusting": ["--trusted-proxy", "127.0.0.1"], "plain": [],
                 "discreet": ["--keep-address", "none"],
                 "full": ["--keep-address", "full", "--trusted-proxy", "127.0.0.1"]}
    with servers(folder, folder) as serve:
        yield {name: (mailtracker.Files(str(folder / f"{name}.csv")),
                      serve("--register", f"{name}.csv", *more).port)
               for name, more in arguments.items()}


def ask(port, head):
    """Return what a server answers."""
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(head)
        return b"".join(iter(partial(line.recv, 65536), b""))


def forwarded(head, value):
    """Return a head with another X-Forwarded-For; None takes it away."""
    head = re.sub(rb"(?mi)^X-Forwarded-For:.*\n", b"", head)
    return head if value is None else head.replace(
        b"\r\n\r\n", b"\r\nX-Forwarded-For: " + value + b"\r\n\r\n")


def instead(old, new):
    """Return a proxy that passes on an answer with other bytes in it."""
    return lambda head, peer, port: re.sub(
        old, new, ask(port, forwarded(head, peer)), count=1)


def page(answer, body=b""):
    """Return a proxy that answers by itself."""
    return lambda head, peer, port: (
        b"HTTP/1.1 " + answer + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def overwrite(head, peer, port):
    return ask(port, forwarded(head, peer))


def append(head, peer, port):
    before = re.findall(rb"(?mi)^X-Forwarded-For: (.*)\r\n", head)
    return ask(port, forwarded(head, b", ".join([*before, peer])))


def pass_on(head, peer, port):
    return ask(port, head)


def swallow(head, peer, port):
    return ask(port, forwarded(head, None))


def chunked(head, peer, port):
    head, _, body = overwrite(head, peer, port).partition(b"\r\n\r\n")
    return re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head) \
        + b"\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"


FAILED = ("client", "skipped", "did not run, as pixel failed")
NO_HIT = ("client", "error", "no hit came into")
PROXIES = {
    "it overwrites": ("trusting", overwrite),
    "it appends": ("trusting", append),
    "it appends, and all of an address is kept": ("full", append),
    "it answers in chunks": ("trusting", chunked),
    "no address is kept": ("discreet", overwrite,
                           ("client", "skipped", "keeps no addresses")),
    "it passes on a forged header": ("trusting", pass_on,
                                     ("client", "error", "forged X-Forwarded-For")),
    "that, and all of an address is kept": (
        "full", pass_on, ("client", "error", "forged X-Forwarded-For")),
    "it swallows the address": ("trusting", swallow,
                                ("client", "error", "127.0.0.0: that is the proxy")),
    "it is not trusted": ("plain", overwrite,
                          ("client", "error", "127.0.0.0: that is the proxy")),
    "it redirects": ("plain", page(b"302 Found\r\nLocation: https://x.org/in\x1b[2J"),
                     ("pixel", "error", "leads on to another, https://x.org/in"),
                     FAILED),
    "it asks for a log-in": (
        "plain", page(b"200 OK\r\nContent-Type: text/html; charset=utf-8", b"<h1>Hi"),
        ("pixel", "error", "a web page comes instead"), FAILED),
    "it checks the browser": (
        "plain", page(b"503 Unavailable\r\nContent-Type: text/html", b"<h1>Wait"),
        ("pixel", "error", "a web page comes instead"), FAILED),
    "its server is down": ("plain", page(b"502 Bad Gateway"),
                           ("pixel", "error", "answers 502"), FAILED),
    "it counts elsewhere": ("plain", page(
        b"200 OK\r\nContent-Type: image/gif\r\nCache-Control: no-store",
        mailtracker.PIXEL), NO_HIT),
    "it sets a cookie": ("trusting", instead(b"\nPragma", b"\nSet-Cookie: a=b\r\nX"),
                         ("pixel", "warning", "a cookie")),
    "it caches": ("trusting", instead(b"no-store[^\r]*", b"max-age=600"),
                  ("pixel", "error", "kept in a cache")),
    "it optimises pictures": (
        "plain", page(b"200 OK\r\nContent-Type: image/gif\r\nCache-Control: no-store",
                      b"RIFF"), ("pixel", "error", "not the pixel (4 bytes)"), NO_HIT),
    "it takes pictures for files": (
        "trusting", instead(b"image/gif", b"application/octet-stream"),
        ("pixel", "error", "comes as 'application/octet-stream'")),
    "it says nothing": ("plain", lambda *_: b"",
                        ("pixel", "error", "not answer as a web server"), FAILED),
    "it says something else": ("plain", lambda *_: b"220 mail\r\n\x1b[2J",
                               ("pixel", "error", "not answer as a web"), FAILED),
    "it breaks off": ("trusting", instead(rb"(?s);$", b""),
                      ("pixel", "error", "not answer as a web server"), FAILED),
    "its header has no end": ("plain", page(b"200 OK\r\nX: " + 99999 * b"x"),
                              ("pixel", "error", "not answer as a web"), FAILED),
    "it has a thousand headers": ("plain", page(b"200 OK" + 1000 * b"\r\nX: y"),
                                  ("pixel", "error", "not answer as a web"), FAILED),
    "it sends far too much": (
        "plain", lambda *_: b"HTTP/1.0 200 OK\r\nContent-Type: image/gif\r\n"
        b"Cache-Control: no-store\r\n\r\n" + bytes(1 << 22),
        ("pixel", "error", "is not the pixel"), NO_HIT),
}


@pytest.mark.parametrize("name, proxy, wanted",
                         [(name, proxy, wanted)
                          for name, proxy, *wanted in PROXIES.values()], ids=PROXIES)
def test_of_a_proxy_exactly_what_it_does_wrong_is_found(name, proxy, wanted, trackers):
    files, port = trackers[name]

    def serve(line, peer):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            block = line.recv(65536)
            if not block:
                return
            head += block
        line.sendall(proxy(head, peer.encode(), port))

    with listening(serve) as front:
        found = found_by(doctor_at(files, front), "name", "pixel", "client")
    assert_found(found, *wanted)
    assert b",made," not in content(files.log)  # nothing of a probe stays


def content(path):
    """Return the bytes of a file."""
    return Path(path).read_bytes()


@pytest.mark.parametrize("talk", [b"", b"HTTP/1.1 200 OK\r\nX: "],
                         ids=["silent", "slow"])
def test_who_never_comes_to_an_end_is_left_after_a_while(talk, files, monkeypatch):
    monkeypatch.setattr(mailtracker, "FETCH_SECONDS", 0.3)

    def trickle(line, _):
        line.sendall(talk)
        while line.fileno() >= 0:
            line.sendall(talk[-1:])
            if not talk:
                line.recv(9999)
                line.recv(9999)
                return
            time.sleep(0.01)

    with listening(trickle) as port:
        begun = time.monotonic()
        found = found_by(doctor_at(files, port), "pixel")
        assert time.monotonic() - begun < 2
    assert_found(found, ("pixel", "error", "no whole answer within"))
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_slow_pixel_is_told_of(trackers, monkeypatch):
    monkeypatch.setattr(mailtracker, "SLOW", 0.0)
    files, port = trackers["plain"]
    assert_found(found_by(doctor_at(files, port), "pixel"),
                 ("pixel", "warning", "s from 93.184.216.34"))


@pytest.mark.parametrize("address, own, words", [
    ("127.77.77.0", "127.77.77.77", None), ("198.51.100.7", "198.51.100.7", None),
    ("2001:db8:1::", "2001:db8:1::7", None), ("8.8.8.0", "10.0.0.5", None),
    ("8.8.8.0", "", None), ("192.168.1.0", "192.168.1.7", None),
    ("192.0.2.0", "10.0.0.5", "forged"), ("192.0.2.77", "", "forged"),
    ("172.17.0.0", "192.168.1.7", "proxy"), ("127.0.0.0", "", "proxy"),
    ("::", "2a00:1450::5", "proxy"), ("fd00::", "", "proxy"),
    ("8.8.8.0", "9.9.9.9", "proxy"), ("", "10.0.0.5", "keeps no addresses")])
def test_who_is_taken_for_the_reader_tells_what_is_wrong(address, own, words):
    found = list(mailtracker.credited(address, own))
    assert not found if words is None else words in found[0][1]


# -- certificates and names -----------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """Return a folder with chains and keys: of a root, and what is wrong with each."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed; it makes the certificates")
    folder = tmp_path_factory.mktemp("authority")
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=c\n[c]\ndatabase=index\nserial=serial\nnew_certs_dir=.\n"
        "default_md=sha256\npolicy=p\ncopy_extensions=copy\nunique_subject=no\n"
        "x509_extensions=x\n[x]\nsubjectKeyIdentifier=hash\n"
        "authorityKeyIdentifier=keyid\n"
        "[p]\ncommonName=supplied\n")
    (folder / "index").touch()
    (folder / "serial").write_text("01")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    def make(name, signer, host=HOST, start=-9, end=80, extra=()):
        dates = [time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + 86400 * day))
                 for day in (start, end)]
        added = [word for line in extra or [f"subjectAltName=DNS:{host}"]
                 for word in ("-addext", line)]
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr",
                *added)
        how = ["-selfsign"] if signer == name else ["-cert", f"{signer}.pem"]
        openssl("ca", "-batch", "-notext", "-config", "ca.cnf", *how, "-keyfile",
                f"{signer}.key", "-in", f"{name}.csr", "-out", f"{name}.pem",
                "-startdate", dates[0], "-enddate", dates[1])

    for name, signer in (("root", "root"), ("middle", "root"), ("other", "other")):
        make(name, signer, extra=("basicConstraints=critical,CA:TRUE",
                                  "keyUsage=critical,keyCertSign,cRLSign"))
    make("good", "middle")
    make("expired", "middle", end=-1)
    make("early", "middle", start=2)
    make("ending", "middle", start=-60, end=5)
    make("misnamed", "middle", host="x.example.org")
    make("unknown", "other")
    make("selfsigned", "selfsigned")
    read = {name: (folder / f"{name}.pem").read_text()
            for name in ("good", "expired", "early", "ending", "misnamed", "unknown",
                         "selfsigned", "middle", "other")}
    for name, text in read.items():
        whole = "" if name == "selfsigned" else \
            read["other" if name == "unknown" else "middle"]
        (folder / f"{name}.chain").write_text(text + whole)
    shutil.copy(folder / "good.pem", folder / "incomplete.chain")
    shutil.copy(folder / "good.key", folder / "incomplete.key")
    return folder


CERTIFICATES = {
    "good": (),
    "ending": ("certificate", "warning", "the certificate ends in"),
    "expired": ("certificate", "error", "certificate has expired"),
    "early": ("certificate", "error", "certificate is not yet valid"),
    "incomplete": ("certificate", "error", "unable to get local issuer certificate"),
    "misnamed": ("certificate", "error", "Hostname mismatch"),
    "unknown": ("certificate", "error", "self-signed certificate in certificate chain"),
    "selfsigned": ("certificate", "error", "self-signed certificate"),
}


@pytest.mark.parametrize("name, wanted", CERTIFICATES.items(), ids=CERTIFICATES)
def test_of_a_certificate_what_is_wrong_is_found_as_mail_proxies_find_it(
        name, wanted, authority, files, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "root.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / f"{name}.chain", authority / f"{name}.key")

    def serve(line, _):
        with context.wrap_socket(line, server_side=True) as line:
            line.recv(1)

    with listening(serve) as port:
        found = found_by(doctor_at(files, port, "https"), "certificate", "pixel")
    if wanted and wanted[1] == "error":
        assert_found(found, wanted, ("pixel", "skipped", "as certificate failed"))
    else:
        assert_found(found[:-1], *filter(None, [wanted]))


def test_who_speaks_no_tls_is_found_out(files):
    with listening(lambda line, _: line.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")) as port:
        found = found_by(doctor_at(files, port, "https"), "certificate")
    assert_found(found, ("certificate", "error", f"no TLS at {PUBLIC}"))


def refuse(error):
    """Return what fails to connect."""
    def connect(*_):
        raise OSError(error, os.strerror(error))
    return connect


DEAD = refuse(errno.ECONNREFUSED)
NOWHERE = refuse(errno.ENETUNREACH)
V6 = "2a00:1450::8"
NAMES = {
    "all answer": ({PUBLIC: None, V6: None},),
    "one does not": ({PUBLIC: None, V6: DEAD},
                     ("error", f"{V6} of {HOST} does not answer: Connection refused")),
    "to one no way leads": ({PUBLIC: None, V6: NOWHERE}, ("skipped", "no way leads")),
    "none does": ({PUBLIC: DEAD, V6: DEAD},
                  ("error", "nothing answers at t.example.org, port 80: Connec")),
    "it is private": ({"192.168.1.7": None}, ("error", "192.168.1.7 of")),
    "it is shared": ({"100.64.0.9": None}, ("error", "is private")),
    "it is link-local": ({"fe80::1%eth0": None}, ("error", "is private")),
    "it is loopback": ({"127.0.0.1": None, "::1": None},
                       ("warning", "is this machine itself")),
    "half of loopback": ({"127.0.0.1": None, "::1": DEAD},
                         ("warning", "is this machine itself")),
}


@pytest.mark.parametrize("lines, wanted", [(lines, wanted)
                         for lines, *wanted in NAMES.values()], ids=NAMES)
def test_of_a_name_the_addresses_that_readers_cannot_reach_are_found(
        lines, wanted, files):
    def connect(address, port):
        return (lines[address] or (lambda *_: socket.socket()))()

    doctor = mailtracker.Doctor(files, f"http://{HOST}/{{id}}.gif", "",
                                lambda *_: [*lines], connect)
    assert_found(found_by(doctor, "name"), *(("name", *each) for each in wanted))


@pytest.mark.parametrize("words", ["Name or service not known", "Temporary failure"])
def test_a_resolver_that_fails_is_quoted(words, files, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, words)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    doctor = mailtracker.Doctor(files, f"http://{HOST}/{{id}}.gif")
    assert_found(found_by(doctor, "name", "certificate", "pixel"),
                 ("name", "error", f"no address of t.example.org is found: {words}"),
                 ("certificate", "skipped", "as name failed"),
                 ("pixel", "skipped", "as name failed"))


def test_a_name_has_at_most_eight_addresses(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [
        (0, 0, 0, "", (f"10.0.0.{n // 2}", 80)) for n in range(5000)])
    assert mailtracker.addresses_of(HOST, 80) == [f"10.0.0.{n}" for n in range(8)]


# -- files, clock, path ----------------------------------------------------------


@pytest.fixture
def kept(files, monkeypatch, tmp_path):
    """Return the files of a register with a tag, whose server this test is."""
    monkeypatch.setattr(mailtracker, "SAVING", 0.02)
    monkeypatch.setattr(mailtracker, "UNSETTLED", -1.0)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    mailtracker.add_tags(files, [(TAG, "ann")],
                         mailtracker.Making("2026-11-20T10:00:00Z"))
    with mailtracker.server_lock(files):
        yield files


def log_of(*events):
    return lambda files: mailtracker.append_events(files, events)


def mode(name, number):
    """Return what gives a file other permissions, and makes it before."""
    def change(files):
        path = files.register.replace(".csv", name)
        if not os.path.exists(path):
            Path(path).touch()
        os.chmod(path, number)
    return change


def in_lock(text):
    def change(files):
        with open(files.lock, "r+") as file:
            file.write(text)
    return change


def replaced(old, new, is_settled=True):
    def change(files):
        with open(files.register, "r+b") as file:
            data = file.read().replace(old, new)
            file.seek(0)
            file.write(data)
        if is_settled:
            mailtracker.write_marks(files, mailtracker.read_marks(files)._replace(
                register=mailtracker.stamp_of(files.register)))
    return change


LATE = "2999-01-01T00:00:00Z"
SKIPPED = ("clock", "skipped", "did not run, as files failed")
FILES = {
    "all is well": (lambda files: None,),
    "open register": (mode(".csv", 0o644), ("files", "warning", "r.csv is open")),
    "a group may": (mode(".csv", 0o640),),
    "open log": (mode(".events.csv", 0o604), ("files", "warning", "s.csv is open")),
    "open old log": (mode(".events.csv.1", 0o604), ("files", "warning", ".1 is open")),
    "open key": (mode(".key", 0o640), ("files", "warning", "register.key is open")),
    "another owner": (lambda files: os.chown(files.log, 12345, -1),
                      ("files", "error", "have two owners")),
    "no register": (lambda files: [os.unlink(files.register), os.unlink(files.log)],
                    ("files", "error", "no such register"), SKIPPED),
    "no end of a quote": (replaced(b"ann", b'"ann', False),
                          ("files", "error", "never closed"), SKIPPED),
    "another version": (in_lock("77 1.9      "), ("files", "warning", "version")),
    "an older server": (in_lock("77          "), ("files", "warning", "version")),
    "nobody settles": (log_of(mailtracker.Event(
        "2026-11-20T10:00:00Z", "hit", TAG, 1, 0)),
        ("files", "warning", "stays behind its log")),
    "half-way": (lambda files: Path(files.new).touch(),
                 ("files", "warning", "stays behind its log")),
    "a probe is left": (log_of(mailtracker.Event(
        "2026-11-20T10:00:00Z", "made", OTHER, 0, 0,
        detail=mailtracker.PROBE)), ("files", "warning", "probe of a doctor"),
        ("files", "warning", "stays behind its log")),
    "a log of the future": (log_of(mailtracker.Event(LATE, "made", "x")),
                            ("files", "warning", "stays behind its log"),
                            ("clock", "warning", "times to come")),
    "a register of the future": (replaced(b"2026-11-20T10:00:00Z", LATE.encode()),
                                 ("clock", "warning", "times to come")),
}


@pytest.mark.parametrize("change, wanted", [(change, wanted)
                         for change, *wanted in FILES.values()], ids=FILES)
def test_of_the_files_what_is_wrong_is_found(change, wanted, kept):
    if "two owners" in str(wanted) and os.geteuid():
        pytest.skip("only root can give a file to somebody else")
    change(kept)
    before = {path: content(path) for path in (kept.register, kept.log)
              if os.path.exists(path)}
    doctor = mailtracker.Doctor(kept, "http://x")
    assert_found(found_by(doctor, "files", "clock"), *wanted)
    assert before == {path: content(path) for path in before}


def test_a_register_that_nobody_serves_is_told_of(files, tracker):
    tracker("newtag")
    assert_found(found_by(mailtracker.Doctor(files, "http://x"), "files"),
                 ("files", "error", "no server counts in"))


def test_a_disk_that_is_nearly_full_is_told_of(kept, monkeypatch):
    monkeypatch.setattr(mailtracker, "FREE_SPACE", 1 << 60)
    assert_found(found_by(mailtracker.Doctor(kept, "http://x"), "files"),
                 ("files", "error", "of the disk are free"))


@pytest.mark.parametrize("script, wanted", [
    ("echo yes", ()), ("echo no", ("clock", "warning", "follows no time server")),
    ("exit 1", ()), (None, ())])
def test_a_clock_that_follows_no_server_is_told_of(script, wanted, kept, tmp_path):
    if script:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/timedatectl").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin/timedatectl").chmod(0o755)
    assert_found(found_by(mailtracker.Doctor(kept, "http://x"), "clock"),
                 *filter(None, [wanted]))


@pytest.mark.parametrize("url, blocked", [
    ("https://t.example.org/{id}.gif", ""), ("https://x.org/img/{id}/logo.gif", ""),
    ("https://x.org/news/tracking/{id}.gif", ""), ("https://open.x.org/o/{id}.gif", ""),
    ("https://x.org/track/open/{id}.gif", "/track/open/"),
    ("https://x.org/a/Tracking/Pixel/{id}.gif", "/Tracking/Pixel/"),
    ("https://x.org/{id}/p1x1.gif", "/p1x1.gif"),
    ("https://email.x.org/o/{id}.gif", "://email.x.org/o/"),
    ("https://track.email.x.org/{id}.gif", "://track.email.")])
def test_paths_that_lists_block_are_told_of(url, blocked, files):
    assert_found(found_by(mailtracker.Doctor(files, url), "path"), *(
        [("path", "warning", f"block {blocked}")] if blocked else []))


# -- the whole of it --------------------------------------------------------------


def test_a_sound_set_up_is_met_with_silence(authority, serve, files, newtags,
                                            monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "root.pem"))
    newtags(files.register)
    port = serve("--register", files.register, "--tls-cert", authority / "good.chain",
                 "--tls-key", authority / "good.key").port
    monkeypatch.setenv("PATH", str(tmp_path / "no timedatectl here"))
    assert found_by(doctor_at(files, port, "https"), *CORE) == []


def test_on_this_machine_one_word_is_said_and_all_is_well(tagged, run, monkeypatch,
                                                          tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    server, tag = tagged()
    url = f"http://127.0.0.1:{server.port}"
    code, out, err = run("doctor", "--server", url)
    assert (code, err) == (0, "") and out == (
        "warning: name: 127.0.0.1 is this machine itself, for trying\n"
        "  to do: for mail to others, name a --server that they can reach\n")
    assert run("doctor", "--server", url, "files", "clock", "path", "certificate",
               "pixel", "client") == (0, "", "")
    assert server.get("/health")[2] == b"ok\n"  # it takes doctor for no proxy
    code, out, err = run("doctor", "--server", url, "--json", "name")
    assert (code, err) == (0, "") and [each["level"] for each in json.loads(out)] == [
        "warning"]
    assert run("doctor", "--server", url, "--json", "pixel") == (0, "[]\n", "")


def test_where_nothing_is_a_check_says_why_it_did_not_run(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    code, out, err = run("doctor", "--server", f"https://127.0.0.1:{port}")
    assert (code, err) == (1, "")
    levels = dict(re.findall(r"^(?:error|skipped): (\w+): (.*)$", out, re.M))
    assert [*levels] == ["files", "clock", "name", "certificate", "pixel", "client"]
    assert levels["client"] == "did not run, as files failed"
    assert levels["pixel"] == "did not run, as name failed"
    assert os.listdir(tmp_path) == []


def test_the_checks_are_listed_and_a_wrong_one_is_no_check(run):
    code, out, err = run("doctor", "--list-checks")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == [
        *mailtracker.Doctor.CHECKS]
    code, _, err = run("doctor", "pixle")
    assert code == 2 and "pixle is not a check" in err
    assert run("doctor", "--list-checks", "pixel")[0] == 2
    code, _, err = run("doctor", "message")
    assert code == 2 and "message: say which mail, by --message FILE" in err


# -- --wait ------------------------------------------------------------------------


def waiting(tmp_path, server):
    """Start doctor --wait; return the process and the id of its tag."""
    process = launch(subprocess.Popen, "doctor", "wait", "--server",
                     f"http://127.0.0.1:{server.port}", cwd=tmp_path, encoding="utf-8",
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = process.stderr.readline()
    return process, re.search(r"http://127.0.0.1:\d+/(\w+)\.gif$", line)[1]


def holds(folder, text):
    """Return the files of a folder in which a text stands."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # as a settle goes on
            found += [path.name] * (text.encode() in content(path))
    return found


def test_a_hit_from_elsewhere_is_shown_and_a_scanner_ends_no_waiting(tagged, tmp_path):
    server, _ = tagged()
    process, tag = waiting(tmp_path, server)
    with process:
        server.get(f"/{tag}.gif")
        server.get(f"/{tag}.gif", BROWSER)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert re.search(r"(?m)^note: wait: a hit came from 127\.0\.0\.0: machine, ", out)
    assert re.search(r"(?m)^note: wait: a hit came from 127\.0\.0\.0: human, a browser",
                     out)
    eventually(lambda: not holds(tmp_path, tag))


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 130)])
def test_a_doctor_that_is_ended_forgets_its_tag(number, code, tagged, tmp_path):
    server, _ = tagged()
    process, tag = waiting(tmp_path, server)
    with process:
        try:
            if number == signal.SIGINT:  # it is settled
                eventually(lambda: "register.csv" in holds(tmp_path, tag))
        finally:
            process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, "", "")
    eventually(lambda: not holds(tmp_path, tag))
    server.assert_unharmed()


def test_where_nothing_comes_it_says_so_and_forgets_the_tag(kept, monkeypatch):
    monkeypatch.setattr(mailtracker, "WAIT_SECONDS", 0.05)
    assert_found(found_by(mailtracker.Doctor(kept, "http://x/{id}"), "wait"),
                 ("wait", "error", "nothing came"))
    assert mailtracker.PROBE.encode() not in content(kept.log)


# -- --message -----------------------------------------------------------------------

MAIL = """\
Received: from smtp.example.org by mx.example.net; Fri, 20 Nov 2026 10:00:00 +0000
Authentication-Results: mx.example.net; spf=pass (a; comment; dkim=fail)
 smtp.mailfrom=ann@example.org; dkim=pass header.d=example.org; dmarc=pass
DKIM-Signature: v=1; a=rsa-sha256; d=example.org; s=s1; b=abc
From: Ann <ann@example.org>
To: bob@example.net
Subject: Hello
Content-Type: text/html; charset=utf-8

<html><body><p>Hello, <a href="https://example.org/">our page</a>,
<a href="https://www.example.org/a">https://example.org/b</a></p>
<img src="https://t.example.org/{id}.gif" width="1" height="1" alt="" style="border:0">
</body></html>
"""
MAILS = {
    "all is well": ("", ""),
    "SPF": ("spf=pass", "spf=softfail", ("warning", "example.net says spf=softfail")),
    "SPF fails": ("spf=pass", "spf=fail", ("error", "mx.example.net says spf=fail")),
    "DKIM": ("; dkim=pass", "; dkim=fail", ("error", "mx.example.net says dkim=fail")),
    "DMARC": ("dmarc=pass", "dmarc=none", ("warning", "says dmarc=none")),
    "signed by another": ("dmarc=pass\nDKIM-Signature: v=1; a=rsa-sha256; d=example",
                          "dmarc=none\nDKIM-Signature: v=1; a=x; d=sendgrid",
                          ("warning", "says dmarc=none"),
                          ("warning", "from example.org, and signed by sendgrid.org")),
    "signed by the one above": (
        "dmarc=pass\nDKIM-Signature: v=1; a=rsa-sha256; d=example.org",
        "x=y\nDKIM-Signature: v=1; a=x; d=mail.example.org"),
    "not signed": ("; dkim=pass header.d=example.org; dmarc=pass\nDKIM-Signature",
                   "\nX-No-Signature", ("warning", "not signed")),
    "a forged verdict below": (
        "DKIM-Signature", "Authentication-Results: x.org; spf=fail\nDKIM-Signature"),
    "one of the same below": (
        "DKIM-Signature", "Authentication-Results: mx.example.net; dkim=fail\n"
        "DKIM-Signature"),
    "no verdict": ("Authentication-Results", "X-Results", ("warning", "no receiver")),
    "http": ("https://t.ex", "http://t.ex", ("warning", "comes by http")),
    "hidden": ("border:0", "display : none", ("error", "hidden by its style")),
    "clipped": ("<img", "<p>" + 20000 * "words " + "<img", ("error", "102 KB")),
    "plain text": ("text/html", "text/plain", ("error", "no pixel in it")),
    "no pixel": ("{id}", "logo", ("error", "no pixel in it")),
    "another register's": ("{id}", OTHER,
                           ("error", "is not in /")),
    "masked link": ('href="https://www.example.org/a"', 'href="https://evil.example/"',
                    ("warning", "shows https://example.org/b and leads to https://ev")),
    "own copy": ("Received", "X-Received", ("warning", "your own copy, with a pixel")),
    "own copy without": (MAIL[:MAIL.index("\n")], "X-Header: this",
                         ("warning", "your own copy, without a pixel")),
}


@pytest.mark.parametrize("old, new, wanted", [(old, new, wanted)
                         for old, new, *wanted in MAILS.values()], ids=MAILS)
def test_of_a_mail_what_is_wrong_is_found(old, new, wanted, kept, tmp_path):
    assert old in MAIL
    text = MAIL.replace(old, new, 1).replace(
        "{id}", "logo" if "without" in str(wanted) else TAG)
    for eol in "\n", "\r\n":
        (tmp_path / "mail.eml").write_bytes(text.replace("\n", eol).encode())
        doctor = mailtracker.Doctor(kept, "http://x", str(tmp_path / "mail.eml"))
        assert_found(found_by(doctor, "message"), *(("message", *x) for x in wanted))


def test_only_the_mail_is_judged_where_only_that_is_asked(kept, tmp_path, run):
    (tmp_path / "mail.eml").write_text(MAIL.replace("{id}", TAG))
    assert run("doctor", "message", "--message", tmp_path / "mail.eml", "--register",
               kept.register) == (0, "", "")


@pytest.mark.parametrize("mail", [
    b"", b"\n", bytes(range(256)) * 50, b"Received: x\n\n", b"Received: x\n" * 5000,
    b"Received: x\nAuthentication-Results: \x1b[2J; spf=fail; dmarc=\xe2\x80\xae\n\n",
    b"Received: x\nAuthentication-Results: " + b"(" * 50000 + b"\n\n",
    b"Received: x\nAuthentication-Results: " + b";" * 50000 + b"spf\n\n",
    b"Received: x\nDKIM-Signature: " + b" " * 50000 + b"\nFrom: " + b"@" * 9999,
    b"Received: x\n" + 9999 * b"Authentication-Results: x; dkim=no\nDKIM-Signature:\n",
    b"Received: x\nContent-Type: text/html\n\n" + b"<img src='/" * 5000,
    b"Received: x\nContent-Type: text/html\n\n" + b"<a href='http://\x1b'>http://x\x07",
    *[b"Received: x\nContent-Type: text/html\n\n" + 90000 * junk for junk in (
        b"<a ", b"<a href='", b"<a>", b"<a>http://", b"<", b"http://", b"<a href=")]])
def test_a_hostile_mail_is_only_a_mail(mail, kept, tmp_path, run):
    (tmp_path / "mail.eml").write_bytes(mail)
    begun = time.monotonic()
    _, out, err = run("doctor", "message", "--message", tmp_path / "mail.eml",
                      "--register", kept.register)
    assert err == "" and time.monotonic() - begun < 3
    assert_nothing_raw(out)
