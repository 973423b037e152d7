"""Scan: what bounces, delays, answers and receipts say of which tag.

bounces.mbox holds 35 messages as Postfix, Exim, OpenSMTPD, DMA, Dovecot and
Thunderbird really wrote them; the sender in a From_ line is the message's name here.
"""
from __future__ import annotations

import contextlib
import imaplib
import mailbox
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mailtracker
from conftest import assert_nothing_raw, launch, log_rows, register_rows, save
from mailtracker import Event, Known, Making, add_tags, append_events, read_mail

pytest_plugins = ("imap_server",)
MBOX = Path(__file__).with_name("bounces.mbox")
MADE, NOON = "2026-11-01T00:00:00Z", "2026-11-20T12:00:00Z"
A, B = "bcdfghjkmnpqrstvwxz22", "ccdfghjkmnpqrstvwxz22"
# What a message says: event, id, to whom that was written, how it was refused.
EXPECTED = {name: rest for name, *rest in (line.split(None, 4) for line in """\
dma_bounce_x_01                bounced   bcdfghjkmnpqrstvwxz22    nobody@y.test   hard
dovecot_auto-reply_x_01        autoreply bhnsrpf72m4dqk69r4w9vjr5 vac@y.test
dovecot_rejected-by-mdn_rej_01 bounced   bgzdf6vgc4m5xt2wwcc7cvbm rej@y.test      soft
exim_bounce_full_01            bounced   bk2cm8q766xvbdgj8j74qv2k full@r.test     soft
exim_bounce_gmail_01           bounced   b35hhf43zpvc69vvfgpfmv94 gmail@r.test    hard
exim_bounce_grey_01            bounced   b69rwdrrb8nq6dcfsz646n8b grey@r.test     soft
exim_bounce_nouser4_01         bounced   bxcn67s5fhtstcxdh5gcggr6 nouser4@r.test  hard
exim_bounce_nouser_01          bounced   bb99r4wspkxs8qnww5kph72m nouser@r.test   hard
exim_bounce_pipe_01            bounced   bn9t9bcpfr7rb3tcdczgj2rn pipe@exim.test  soft
exim_bounce_relay_01           bounced   bgwcz4cq945w6qqrrqcpzwjx relay@r.test    policy
exim_bounce_unknown5_01        bounced   bt8c52k78mgpjx5qf9p238jb nouser5@r.test  hard
exim_delayed_grey_02           delayed   b69rwdrrb8nq6dcfsz646n8b grey@r.test
opensmtpd_bounce_nouser_01     bounced   bs6358mp6smnf55mcwqw9gtg nouser@r.test   hard
opensmtpd_bounce_old_01        bounced   b4bw3f2spqbhsmvdd48gz353 old@r.test      hard
opensmtpd_bounce_spam_01       bounced   bznmd27ccbkjjmrgpdqkbdt4 spam@r.test     policy
postfix_bounce_anyone_01       bounced   btpzdftk9qrb4phtkbqbdgrn anyone@slow.test soft
postfix_bounce_bj_01           bounced   ccdfghjkmnpqrstvwxz22    bjö@slow.test   soft
postfix_bounce_full_01         bounced   bnn9xc3436zp9k8v384qpwpx full@y.test     soft
postfix_bounce_full_02         bounced   b8pwjgsctj49kzcf5rfbmx8z full@r.test     soft
postfix_bounce_gfull_01        bounced   bkbzdrhdksbtw77wrnz8cj9s gfull@r.test    soft
postfix_bounce_grey_01         bounced   bphdp56rjwjb85wzn7w5vm9r grey@r.test     soft
postfix_bounce_nobody_01       bounced   bj5cdvshc5hwrf9gvwjrqfcd nobody@y.test   hard
postfix_bounce_nouser2_01      bounced   b4v5jwj7gnh9g6bm6xtb5pcr nouser2@r.test  hard
postfix_bounce_o365_01         bounced   b3683xffrsp2g7dt3fw5gk2q o365@r.test     hard
postfix_bounce_old_01          bounced   bsrkhs6bk35h26w3bpwjpw8g old@r.test      hard
postfix_bounce_policy_01       bounced   b5d3jb2xvdsh7t353t92ktbn policy@r.test   policy
postfix_bounce_relay_01        bounced   bbpv3csmfsk8c6w96tdvhhsq relay@r.test    policy
postfix_bounce_spam_01         bounced   bskbz8rbg9b69d3snpzwp3ds spam@r.test     policy
postfix_bounce_tmp_01          bounced   bgbqg8jn3tk79x99dm56682s tmp@r.test      soft
postfix_bounce_verp_01         bounced   b6tcw3q676dxsps4788hgzqb nouser@r.test   hard
postfix_bounce_yahoo_01        bounced   b9w4f4stqd44xzc4h87whsf5 yahoo@r.test    hard
postfix_delayed_bj_01          delayed   ccdfghjkmnpqrstvwxz22    bjö@slow.test
postfix_delivered_c_01         -         bmkzk5bnv97pw5jvcp5kthcr c@y.test
postfix_delivered_ok_01        -         bsrfc6nppsptrjhnhn8ff2xb ok@r.test
thunderbird_mdn_displayed      read      bmdnmdnmdnmdnmdnmdnmdn23 bob@y.test
""".splitlines())}
MESSAGE_IDS = {A: "<bdmatest234567bcdfghjkmn@x.test>", B: "<utf8test@x.test>"}


@pytest.fixture(scope="module")
def bounces():
    """Return the real messages by their names."""
    with contextlib.closing(mailbox.mbox(MBOX, create=False)) as box:
        return {message.get_from().split()[0]: box.get_bytes(key)
                for key, message in box.items()}


@pytest.fixture
def box(tmp_path):
    """Return a Maildir."""
    for folder in "cur", "new", "tmp":
        (tmp_path / "box" / folder).mkdir(parents=True)
    return tmp_path / "box"


@pytest.fixture
def mailing(files, monkeypatch):
    """Return files with the tags of all the real messages in the register."""
    monkeypatch.setenv("MAILTRACKER_PASSWORD", "secret")
    tag(files, *{row[1]: (row[1], "Ann", row[2], MESSAGE_IDS.get(row[1], ""))
                 for row in EXPECTED.values()}.values())
    return files


def tag(files, *rows, sent=MADE, status="sent"):
    """Put tags into the register: id, name, address, Message-ID."""
    add_tags(files, rows, Making(sent, sent, status, "250 ok", (
        "id", "name", "email", "message_id")))


def scan(run, files, *args, since="2020-01-01"):
    """Scan a mailbox; return the lines, the last of which is the count."""
    code, out, err = run("scan", "--register", files.register, "--since", since, *args)
    assert (code, err) == (0, "")
    assert_nothing_raw(out)
    return out.splitlines()


def contents(files):
    """Return the bytes of log and register."""
    return Path(files.log).read_bytes(), Path(files.register).read_bytes()


# -- the real messages ---------------------------------------------------------------


def put(place, bounces, request):
    """Put messages where scan can find them; return what it is to be told."""
    if place == "mbox":
        return MBOX
    where = request.getfixturevalue("box" if place == "maildir" else place)
    for number, (name, raw) in enumerate(bounces.items()):
        if place == "imap_server":
            folder = where.folders["INBOX" if number % 3 else "M&APw-ll &- co"]
            folder.append(raw.replace(b"\n", b"\r\n"))
        elif place == "dovecot":
            (where[0] / ("new" if number % 3 else ".Junk/new") / name).write_bytes(raw)
        else:
            file = f"new/{name}" if number % 3 else f"cur/{name}:2,S"
            (where / file).write_bytes(raw)
    return where if place == "maildir" else getattr(where, "url", "") or where[1]


@pytest.mark.parametrize("place", ["mbox", "maildir", "imap_server", "dovecot"])
def test_real_messages_say_the_right_thing_of_the_right_tag(
        place, bounces, mailing, run, request):
    source = put(place, bounces, request)
    lines = scan(run, mailing, source)
    events = [row for row in log_rows(Path(mailing.register))
              if row["event"] not in ("made", "sent")]
    how = re.compile("(?:soft: (?=policy))?(hard|soft|policy|)")
    kinds = sorted((row["event"], row["id"], how.match(row["detail"])[1])
                   for row in events)
    assert kinds == sorted((kind, tag_id, "".join(how)) for kind, tag_id, _, *how in
                           EXPECTED.values() if kind != "-")
    assert lines[-1] == "33 new events in 35 messages"
    assert not [row for row in events if "@" in row["detail"]]
    rows = register_rows(mailing.register)
    assert {tag_id: row["status"] for tag_id, row in rows.items()} == {
        row[1]: "bounced" if row[0] in ("bounced", "delayed") else "sent"
        for row in EXPECTED.values()}
    before, source = contents(mailing), put(place, {}, request)
    assert scan(run, mailing, source)[-1][:13] == "0 new events "
    assert contents(mailing) == before
    if place == "dovecot":
        port = int(source.rpartition(":")[2])
        with imaplib.IMAP4("127.0.0.1", port, timeout=10) as imap:
            imap.login("ann", "secret")
            imap.select("INBOX", readonly=True)
            assert b"Seen" not in b"".join(imap.fetch("1:*", "FLAGS")[1])


def test_without_ids_the_newest_tag_to_an_address_is_likely(bounces, files):
    emails = sorted({row[2] for row in EXPECTED.values()})
    for sent, status in ((MADE, "sent"), ("2026-12-01T00:00:00Z", "sent"),
                         ("2026-11-20T22:10:00Z", "queued"),
                         ("2026-11-20T22:00:00Z", "sent")):
        new = dict(zip(emails, mailtracker.new_ids(sent.encode() * 2, len(emails))))
        tag(files, *((new[email], "", email, "") for email in emails), sent=sent,
            status=status)
    known = Known(files)
    for name, (kind, _, email, *_) in EXPECTED.items():
        found = [(event.event, "likely: " in event.detail) for event in
                 read_mail(bounces[name], known) if event.id == new[email]]
        assert found == [(kind, True)] * (kind in ("bounced", "delayed")), name


# -- shapes --------------------------------------------------------------------------


def message(body, *headers):
    """Return a mail from Bob to Ann, but for what headers say."""
    fields = dict(line.split(": ", 1) for line in (
        "From: Bob <bob@y.test>", "To: ann@x.test", "Subject: Re: hello",
        "Date: Fri, 20 Nov 2026 13:00:00 +0100", *headers))
    head = "".join(f"{name}: {value}\n" for name, value in fields.items())
    return f"{head}\n{body}".encode()


def report(*blocks, kind="delivery-status", said="Sorry."):
    """Return the body of a report and the headers it needs."""
    start = f"--b\n\n{said}\n--b\nContent-Type: message/{kind}\n\nReporting-MTA: x"
    return ("\n\n".join([start, *blocks, "--b--"]), "Return-Path: <>",
            "Content-Type: multipart/report; boundary=b", f"References: <{A}@x.test>")


SES = "0100018c5e5f4a4b-000000"
ANSWER = f"In-Reply-To: <{A}@x.test>"
FROM_DAEMON = "Return-Path: <>", "From: MAILER-DAEMON@x.test"
FAILED = "Final-Recipient: rfc822;bob@y.test\nAction: failed\n"
CUT_ID = f"> <img src=3D\"http://t.x/{A[:9]}=\n{A[9:]}.gif\">"
SHAPES = {
    "reply": ("replied", "yes", ANSWER),
    "reply by References": ("replied", "", "In-Reply-To: <x@y>",
                            f"References: <q@y> <{A}@x.test>\n <z@y>"),
    "reply in a thread": ("replied", "", "In-Reply-To: <x@y>",
                          f"References: <{B}@x.test> <{A}@x.test> <x@y>"),
    "reply, encoded": ("replied", "", f"In-Reply-To: \n =?utf-8?q?=3C{A}=40x=3E?="),
    "reply that quotes the pixel": ("replied", CUT_ID, "In-Reply-To: <made@outlook>"),
    "reply to what SES named": ("replied", "", f"In-Reply-To: <{SES}@ses>"),
    "reply to a shared Message-ID": ("replied", "", "In-Reply-To: <shared@x.test>"),
    "reply to it of a stranger": ("", "", "In-Reply-To: <shared@x.test>", "From: e@z"),
    "reply by Exchange": ("replied", "", ANSWER, "X-Auto-Response-Suppress: All",
                          "Auto-Submitted: no"),
    "own mail": ("", "", f"Message-ID: <{A}@x.test>", ANSWER),
    "own answer": ("", "", ANSWER, "Delivered-To: bob@y.test"),
    "forward": ("", "see", ANSWER, f"X-Forwarded-Message-Id: <{A}@x.test>"),
    "forward by Outlook": ("", "see", ANSWER, "Subject: WG: hello"),
    "unknown": ("", "", "In-Reply-To: <bhnsrpf72m4dqk69r4w9vjr5@x.test>"),
    "vacation to the id's address": ("autoreply", "", f"Delivered-To: ann+{A}@x.test",
                                     "Auto-Submitted: auto-replied"),
    "vacation in its subject": ("autoreply", "", ANSWER,
                                "Subject: =?utf-8?q?R=C3=A9ponse_automatique?= : x"),
    "X-Autoreply": ("autoreply", "", ANSWER, "X-Autoreply: yes"),
    "vacation without a sender": ("autoreply", "unknown", ANSWER, "Return-Path: <>"),
    "qmail": ("bounced hard: 192.0.2.1 did not. Remote host said: 550 no such user",
              "<bob@y.test>:\n192.0.2.1 did not.\nRemote host said: 550 no such user\n"
              f"\n--- Below is a copy.\n\nMessage-ID: <{A}@x.test>", *FROM_DAEMON),
    "sendmail's warning": ("delayed 451 4.4.1 reply: read error", "<bob@y.test>... 451 "
                           f"4.4.1 reply: read error\n\n{A}", *FROM_DAEMON,
                           "Subject: Warning: could not send message for past 4 hours"),
    "success in words": ("", f"Your mail {A} has arrived", *FROM_DAEMON),
    "forged": ("", "bob@y.test: user unknown, failed"),
    "two recipients": ("bounced soft: 5.2.2 full", *report(
        FAILED.replace("bob", "eve") + "Status: 5.1.1", FAILED + "Status: 5.2.2\n"
        "Diagnostic-Code: smtp; full")),
    "recipients, none of them known": ("bounced soft: 5.2.2", *report(*(
        FAILED.replace("bob", name) + f"Status: 5.{n}" for name, n in
        (("eve", "1.1"), ("al", "2.2"))))),
    "one delivered, one not": ("", *report(FAILED.replace("failed", "delivered"),
                                           FAILED.replace("bob", "eve"))),
    "Action: error": ("bounced hard: 5.1.1", *report(
        FAILED.replace("failed", "error (no comment)") + "Status: 5.1.1")),
    "no Action": ("delayed 4.4.1", *report("Final-Recipient: rfc822;bob@y.test\n"
                                           "Status: 4.4.1")),
    "bad sender": ("bounced soft: 5.1.8", *report(FAILED + "Status: 5.1.8")),
    "refused by a policy": ("bounced soft: policy: 550 5.7.1 user unknown", *report(
        FAILED + "Status: 5.0.0\nDiagnostic-Code: smtp; 550 5.7.1 user unknown")),
    "refused for now": ("bounced soft: 450 user unknown", *report(
        FAILED + "Status: 5.0.0\nDiagnostic-Code: smtp; 450 user unknown")),
    "an alias": ("bounced hard: 5.1.1", *report(
        FAILED.replace("bob", "target") + "Status: 5.1.1"),
                 "X-Failed-Recipients: bob@y.test", "References: <shared@x.test>"),
    "no id, one address": ("bounced soft: likely: failed", "<bob@y.test> failed\n\n--- "
                           "A copy:\n\nCc: carl@y.test", *FROM_DAEMON),
    "no id, an alias": ("bounced hard, likely: 5.1.1", *report(
        FAILED.replace("bob", "target") + "Status: 5.1.1", "To: bob@y.test"),
                        "References: <q@y>"),
    "no id, any of two": ("", *report(
        FAILED.replace("bob", "target"), "To: bob@y.test, carl@y.test"),
                          "References: <q@y>"),
    "read": ("read", *report(
        "Disposition: manual-action/MDN-sent-manually;displayed",
        kind="disposition-notification")),
    "deleted unread": ("", *report(
        "Disposition: automatic-action/MDN-sent-automatically; deleted",
        kind="disposition-notification", said="\"Reject no refuse\" was deleted.")),
    "an absurd date": ("replied", "", ANSWER, "Date: 20 Nov 2026 99999999999999:00:00",
                       "Received: by x; Fri, 20 Nov 2026 12:00:00 +0000"),
    "an absurd zone": ("replied", "", ANSWER, "Date: 20 Nov 2026 12:00:00 +" + "9" * 20,
                       "Received: by x; Fri, 20 Nov 2026 12:00:00 +0000"),
    "no date, but received": ("replied", "", ANSWER, "Date: nonsense",
                              "Received: by x; Fri, 20 Nov 2026 12:00:00 +0000"),
}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Return what is known of two tags with one Message-ID."""
    files = mailtracker.Files(str(tmp_path_factory.mktemp("known") / "register.csv"))
    tag(files, (A, "", "Bob@y.test", "<shared@x.test>"),
        (B, "", "carl@y.test", "<shared@x.test>"))
    append_events(files, [Event(MADE, "sent", A, detail=f"250 Ok {SES}")])
    return Known(files)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_message_says(shape, known):
    expected, body, *headers = SHAPES[shape]
    raw = message(body, *headers)
    for raw in raw, raw.replace(b"\n", b"\r\n"):
        events = read_mail(raw, known)
        assert [(event.time, event.id) for event in events] == [(NOON, A)] * len(events)
        assert [f"{event.event} {event.detail}".strip() for event in events] == [
            expected] * bool(expected)
        assert not expected or known.matters(raw)


HOSTILE = {
    "nothing": b"", "no head": b"\n\n", "words": b"=?utf-8?q?" * 9999,
    "<": b"<" * 99999, "one word": b"a" * 99999, "@": b"a@" * 49999,
    "ids": (A + " ").encode() * 4000,
    "folds": b"In-Reply-To:" + b"\n <" * 33000, "dashes": b"-" * 99999,
    "addresses": b"a@b " * 24000, "fields": b"To: a\n" * 16000,
    "lines": b"\n--" * 33000,
    "bomb": b"".join(b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n" % (n, n)
                     for n in range(2000)),
    "blocks": message(*report(*["Final-Recipient: rfc822;a@b\nAction: failed"] * 2000)),
    "dates": b"Date: " + b"1" * 9999 + b"\nReceived: ; Fri, 99 Nov 99999 99:99 +9999",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_cost_little_and_end_nothing(name, known):
    for head in b"", b"From: MAILER-DAEMON\nReturn-Path: <>\nSubject: x\n\nfailed ":
        started = time.process_time()
        known.matters(head + HOSTILE[name])
        assert {event.id for event in read_mail(head + HOSTILE[name], known)} <= {A, B}
        assert time.process_time() - started < 1.5


def test_control_characters_reach_neither_terminal_nor_log(run, files, tmp_path):
    tag(files, (A, "Bob\u202e", "bob@y.test", ""))
    evil = "=1\x1b[2J\x9b\u202e,\"\x07 a@b.c " + "x" * 999
    save(tmp_path / "evil", message(*report(FAILED + f"Diagnostic-Code: smtp; {evil}")))
    line, _ = scan(run, files, tmp_path / "evil")
    log = Path(files.log).read_text("utf-8")
    assert_nothing_raw(log)
    assert "=1\\x1b[2J" in line and "@" not in log and len(log.splitlines()[-1]) < 300


def test_names_of_folders_are_written_as_imap_wants_them():
    assert mailtracker.folder_name('a "b\\" & ~peter/日本語/\u00ff\u7fff\r\n') == (
        rb'"a \"b\\\" &- ~peter/&ZeVnLIqe-/&AP9,,wANAAo-"')


# -- mailboxes -----------------------------------------------------------------------


def test_only_the_start_of_a_huge_message_is_read(files, box):
    tag(files, (A, "", "bob@y.test", ""))
    huge = box / "new" / "0"
    huge.write_bytes(message("", ANSWER))
    os.truncate(huge, 2 ** 28)  # a hole
    limit = [sys.executable, "-c", "import os, resource as r, sys; r.setrlimit("
             "r.RLIMIT_AS, (2 ** 28, 2 ** 28)); os.execv(sys.argv[1], sys.argv[1:])"]
    for source, count in (box, b"1 new"), (huge, b"0 new"), ("-", b"0 new"):
        with open(huge, "rb") as stdin:
            done = launch(subprocess.run, "scan", source, "--register", files.register,
                          "--since", "9999d", capture_output=True, prefix=limit,
                          stdin=stdin)
        assert (done.returncode, done.stderr) == (0, b"")
        assert re.search(b"%b.* in 1 message$" % count, done.stdout)


def test_since_folders_dry_run_and_what_cannot_be_read(
        bounces, mailing, run, imap_server, request, tmp_path, monkeypatch):
    monkeypatch.setattr(mailtracker, "SEARCHED", 10)
    before, box = contents(mailing), put("maildir", bounces, request)
    dry = "; nothing was changed: this was a dry run"
    assert scan(run, mailing, MBOX, "--dry-run", since="2026-11-20T22:38:00Z")[1:] == [
        "1 new event in 35 messages" + dry]
    os.utime(box / "new" / "dovecot_auto-reply_x_01", (0, 0))
    box.rename(tmp_path / ".a.b")
    assert scan(run, mailing, tmp_path, "--folder", "a/b", "--dry-run")[-1] == (
        "32 new events in 34 messages" + dry)
    url = put("imap_server", {**bounces, "broken": b""}, request)
    url, options = url + "/M%C3%BCll%20%26%20co", ("--dry-run", "--auth", "xoauth2")
    assert scan(run, mailing, url, "--folder", "INBOX", *options)[-1] == (
        "33 new events in 35 messages, 1 could not be read" + dry)
    imap_server.offers = ""  # so LOGIN
    assert scan(run, mailing, url, "--dry-run")[-1] == (
        "11 new events in 12 messages" + dry)
    asked = "".join(imap_server.asked)
    assert "auth=Bearer secret" in asked and "PEEK[HEADER]<0.100000>" in asked
    assert not re.search(r"SELECT|STORE|BODY\[|DELETE", asked)
    assert contents(mailing) == before


WRONG = [
    (["imaps://x.test"], "a mailbox is imaps://user@host[:port][/folder]"),
    (["imaps://ann:pw@x.test"], "its password comes from --password-command"),
    (["imap://a%0db@x.test"], "a mailbox is imaps://"),
    (["URL/Nope"], "no such folder: \"Nope\""),
    (["URL", "--password-command", "echo wrong"], "127.0.0.1: no such \\x1b[1muser"),
    (["URL", "--password-command", "false"], "--password-command exits 1"),
    (["imap://ann@127.0.0.1:1"], "127.0.0.1: Connection refused"),
    (["nowhere"], "nowhere: No such file"), (["."], "./: no Maildir"),
    ([MBOX, "--folder", "x"], "it has no folders"),
    (["-", "--folder", "x"], "it has no folders"),
    (["nowhere", "--folder", "x"], "nowhere: No such file"),
    (["-", "--follow"], "--follow needs a mailbox"),
    (["--follow", "--dry-run", "x"], "--follow goes without --dry-run"),
]


@pytest.mark.parametrize("words, expected", WRONG)
def test_what_is_wrong_is_said_in_one_line(words, expected, run, files, imap_server):
    tag(files, (A, "", "", ""))
    words = [str(word).replace("URL", imap_server.url) for word in words]
    code, out, err = run("scan", "--register", files.register, "--password-command",
                         "echo secret", *words)
    assert code in (1, 2) and out == "" and expected in err.splitlines()[-1]
    assert "secret" not in err and "pw" not in err
    assert_nothing_raw(err)


def test_no_letter_of_a_password_beyond_ascii_is_shown(run, files, imap_server):
    tag(files, (A, "", "", ""))
    args = ("scan", imap_server.url, "--register", files.register,
            "--password-command", "echo secretß")
    assert run(*args) == (0, "0 new events in 0 messages\n", "")
    imap_server.offers = ""  # so LOGIN, which imaplib writes in ASCII
    code, out, err = run(*args)
    assert (code, out) == (1, "") and "must be ASCII here: it has no AUTH=PLAIN" in err
    assert "ß" not in err and "\\xdf" not in err and "secret" not in err


def test_imaps_needs_a_certificate_that_can_be_verified(
        mailing, run, imap_server, certificates, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "first.pem", certificates / "first.key")
    imap_server.socket = context.wrap_socket(imap_server.socket, server_side=True)
    url = imap_server.url.replace("imap:", "imaps:")
    args = "scan", url, "--register", mailing.register
    assert "CERTIFICATE_VERIFY_FAILED" in run(*args)[2]
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "first.pem"))
    assert run(*args) == (0, "0 new events in 0 messages\n", "")


def test_no_password_goes_without_tls_but_to_this_machine(
        mailing, run, imap_server, monkeypatch):
    monkeypatch.setattr(mailtracker, "is_loopback", lambda address: False)
    _, _, err = run("scan", imap_server.url, "--register", mailing.register)
    assert "TLS not supported" in err and "secret" not in "".join(imap_server.asked)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_maildir_is_followed_until_a_signal(number, files, box):
    tag(files, (A, "", "bob@y.test", ""))
    with launch(subprocess.Popen, "scan", box, "--register", files.register, "--follow",
                stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        (box / "tmp" / "1").write_bytes(message("", ANSWER))
        (box / "tmp" / "1").rename(box / "new" / "1")
        assert b"replied: a person has answered its mail" in process.stdout.readline()
        (box / "new" / "1").rename(box / "cur" / "1:2,S")
        process.send_signal(number)
        assert process.communicate(timeout=20) == (b"", b"") and process.returncode == 0
    assert register_rows(files.register)[A]["status"] == "replied"


def test_a_maildir_that_is_not_there_yet_is_waited_for(files, tmp_path, capsys):
    tag(files, (A, "", "bob@y.test", ""))
    box = tmp_path / "box"
    options = mailtracker.parse(["scan", str(box), "--follow"])
    steps = [str, box.mkdir, str,
             lambda: [(box / name).mkdir() for name in ("tmp", "new", "cur")],
             lambda: (box / "new" / "1").write_bytes(message("", ANSWER)),
             lambda: (box / "new").rename(box / "old"), str, str]
    lengths = []

    def pause(length):
        lengths.append(length)
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()

    with pytest.raises(KeyboardInterrupt):
        mailtracker.follow_mailbox(files, options, pause)
    out, err = capsys.readouterr()
    assert out.count("replied: ") == out.count("\n") == 1 and {*lengths} == {1.0}
    assert err == "".join(f"mailtracker: note: {what}\n" for what in (
        f"{box}: No such file or directory; waiting for it",
        f"{box}/: no Maildir; waiting for it", f"{box}/new: No such file or directory"))


def test_follow_reads_each_message_once_and_outlives_a_failure(
        bounces, mailing, imap_server, capsys):
    options = mailtracker.parse(["scan", imap_server.url, "--follow", "--since", MADE])
    folders, (junk,) = imap_server.folders, imap_server.folders.keys() - {"INBOX"}
    inbox = [raw.replace(b"\n", b"\r\n") for raw in bounces.values()][:3]
    steps = [folders.clear, lambda: folders.update(INBOX=inbox),
             lambda: folders.update({junk: []}), imap_server.asked.clear]

    def pause(_):
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()

    with pytest.raises(KeyboardInterrupt):
        mailtracker.follow_mailbox(mailing, options, pause)
    out, err = capsys.readouterr()
    assert out.count("\n") == 3 and "folder: \"M&APw-ll" in err.splitlines()[1]
    assert err.splitlines()[:1] == ["mailtracker: note: no such folder: INBOX"]
    asked = " ".join(imap_server.asked)
    assert "UID 104:*" in asked and "FETCH" not in asked
