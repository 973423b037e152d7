"""Sending: what a mail becomes, who gets one, and that nobody gets two.

`python tests/test_send.py 100` kills a long mailing so many times.
"""
from __future__ import annotations

import email
import email.policy
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from email.utils import getaddresses
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)] * (__name__ == "__main__")
import mailtracker  # noqa: E402
from conftest import launch, save, shown  # noqa: E402
from mailtracker import Event, append_events, read_log  # noqa: E402
from smtp_server import FakeSmarthost, chaos, on  # noqa: E402

ID = "bcd" * 7
LIST = "email,name,amount\nann@x.org,Ann,1234.5\nbob@x.org,,20\ncid@x.org,Cid,3\n"
HTML = "Subject: Hello {Name|there}\n\n<p>Dear {Name|friend}</p></body>\n"
BASE = ("a.html", "list.csv", "--from", "Me <me@y.org>", "--server", "t.y.org")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Be in a folder with a template and a list; restore the signals after it."""
    monkeypatch.chdir(tmp_path)
    Path("a.html").write_text(HTML)
    Path("list.csv").write_text(LIST)
    kept = {number: signal.getsignal(number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def host():
    """Run a smarthost that takes all."""
    with FakeSmarthost() as server:
        yield server
    assert not server.strays


def takes_all(*_):
    """Be the script of a smarthost that fails nowhere."""


@pytest.fixture
def send(run, host):
    """Run the real command; with --yes where nothing else is said of sending."""
    def send(*args, base=BASE, yes=True):
        return run("send", *base, "--smarthost", f"127.0.0.1:{host.port}", *args,
                   *["--yes"] * yes)
    return send


def mails(*args, template="a.html"):
    """Return the mails for the list as bytes."""
    options = mailtracker.parse(["send", template, *BASE[1:], *args])
    mailing = mailtracker.Mailing(options)
    return [mailing.message(who._replace(id=ID))[0]
            for who in mailtracker.checked_people(mailing, options)]


def parsed(raw):
    """Return a mail as the email package reads it."""
    return email.message_from_bytes(raw, policy=email.policy.default)


def body(raw, kind="plain"):
    """Return the text of a mail."""
    return parsed(raw).get_body((kind,)).get_content().strip()


def statuses(files):
    """Return the statuses in a register by the names in the addresses."""
    return {row["email"][:3]: row["status"] for row in shown(files).values()}


def ids(files):
    """Return the ids in a register by the names in the addresses."""
    return {row["email"][:3]: tag for tag, row in shown(files).items()}


def reached(host):
    """Return how many messages went to whom."""
    return Counter(message.recipients[0][:3] for message in host.messages)


# -- what becomes of a template ------------------------------------------------

CELLS = {"name": "Ann", "first name": "A & <b>", "amount": "1234.5", "none": "",
         "date": "2026-11-24", "text": "one\ntwo"}


@pytest.mark.parametrize("text, expected", [
    ("{Name} {NAME} {{name}} {{ Name }}", "Ann Ann Ann Ann"),
    ("{None|there}{Name|there}{None|}", "thereAnn"), ("{none:,.2f|0}", "0"),
    ("{Amount:,.2f} {Date:%d.%m.%Y}", "1,234.50 24.11.2026"),
    ("{first\n name}", "A &amp; &lt;b&gt;"), ("{Text}", "one<br>\r\ntwo"),
    ("<style>b {color: red}</style>{name}", "<style>b {color: red}</style>Ann"),
    ("{} {1} {{Name}", "{} {1} {Ann"),
])
def test_placeholders_are_replaced(text, expected):
    wrong = []
    assert mailtracker.filled(text, CELLS, mailtracker._as_html, wrong.append) \
        == expected and not wrong


@pytest.mark.parametrize("text, what", [
    ("{Nmae}", "{Nmae}: no such column; did you mean name?"),
    ("{None}", "none is empty: fill it in, or write {None|default}"),
    ("{Name:,.2f}", "{Name:,.2f} wants a number such as 1234.5, or a date"),
    ("{Amount:%d}", "{Amount:%d} wants a number"),
    ("<b>{color: red}</b>", "{color: red}: no such column"),
])
def test_a_placeholder_that_fits_no_cell_is_named(text, what):
    wrong = []
    mailtracker.filled(text, CELLS, str, wrong.append)
    assert len(wrong) == 1 and wrong[0].startswith(what)


@pytest.mark.parametrize("html, text", [
    ("<p>a<p>b", "a\n\nb"), ("a<br>b &amp;&nbsp;c", "a\nb & c"),
    ("<head><title>t</title></head><body>x<style>p{}</style>", "x"),
    ("<ul><li>a</li><li>b</li></ul>c", "- a\n- b\nc"),
    ('<a href="https://x.org">here</a>.', "here <https://x.org>."),
    ('<a href="https://x.org">https://x.org</a>', "https://x.org"),
    ('<a href="mailto:a@x.org">a@x.org</a><a href="#top">up</a>', "a@x.orgup"),
    ('<img src=x alt="Logo"><img src=y>', "Logo"), ("<a href='{Url}'>{Name}", "{Name}"),
    ("a<blockquote>b<br>c<blockquote>d</blockquote></blockquote>e",
     "a\n\n> b\n> c\n> \n> > d\n\ne"),
    ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</table>", "a  b\nc"),
    ("<h1>T</h1>\n<div>a</div>\n\n<div>b</div><!-- x --><![if !mso]>c<![endif]>",
     "T\n\na\nb\nc"), ("<div>a</div><div><br></div><div>b</div>", "a\n\nb"),
])
def test_html_is_readable_as_text(html, text):
    assert mailtracker.plain_text_of(html) == text + "\n"


HOSTILE = {
    "new line": "Ann\r\nBcc: evil@x.org", "bare CR": "Ann\rBcc: evil@x.org",
    "encoded word": "=?utf-8?q?x=0ABcc:_evil?=", "comma": "Müller, Jörg",
    "quotes": 'A "B" \\ <evil@x.org>,', "long": "x" * 300, "very long": "x" * 3000,
    "words": "many words " * 40, "other": "\u3042" * 300, "emoji": "\U0001f600" * 50,
    "bidi": "\u202eann\u2066", "formula": "=cmd|'/C calc'!A0", "blanks": "é  \t é",
    "separator": "a\u2028Bcc: evil@x.org", "colon": "To: x@y;",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_no_cell_makes_a_header_a_recipient_or_a_long_line(name):
    cell = '"%s"' % name.replace('"', '""')
    Path("list.csv").write_bytes(f"email,name\nann@x.org,{cell}\n".encode())
    Path("a.html").write_text("Subject: {Name}\nReply-To: Jörg <j@y.org>\n\n{Name}")
    raw, = mails()
    wanted = re.sub(" +", " ", mailtracker.one_line(name.strip()))
    assert parsed(raw).keys() == [
        "Date", "From", "To", "Message-ID", "References", "Subject", "Reply-To",
        "MIME-Version", "Content-Type", "Content-Transfer-Encoding"]
    to = email.message_from_bytes(raw)["To"]  # 3.9 reads encoded names wrong otherwise
    (shown_name, address), = getaddresses([" ".join(to.split())])
    assert (mailtracker.decoded_words(shown_name), address) == (wanted, "ann@x.org")
    subject = mailtracker.field(raw.partition(b"\r\n\r\n")[0], "Subject")
    assert mailtracker.decoded_words(subject) == wanted
    assert max(map(len, raw.split(b"\r\n"))) <= (998 if "x" * 90 in name else 78)
    assert raw.isascii() and b"\n" not in raw.replace(b"\r\n", b"")


@pytest.mark.parametrize("text", [
    "", "ann", "ann@", "@x.org", "a@b@x.org", "a b@x.org", "ann@x.org\r\nRCPT TO:<b@x>",
    "<ann@x.org>", "a@x.org,b@x.org", "jörg@x.org", "a@[1.2.3.4]", "a@x..org", "a@::1",
    "a\0@x.org", "ann@x.org>", '"a"@x.org'])
def test_what_is_no_address(text):
    assert mailtracker.address_in(" a+b@Bücher.de ") == "a+b@xn--bcher-kva.de"
    with pytest.raises(ValueError):
        mailtracker.address_in(text)


def test_html_gets_a_pixel_a_plain_part_and_what_is_attached():
    Path("für ann.pdf").write_bytes(bytes(range(256)) * 40)
    Path("a.html").write_text(HTML.replace("\n", "\nAttach: für {Name}.pdf\n", 1))
    Path("list.csv").write_text("email,name\nx@x.org,ann\n")
    raw, = mails()
    assert body(raw) == "Dear ann" and body(raw, "html").count("<img") == 1
    assert f"http://t.y.org:56789/{ID}.gif" in body(raw, "html")
    file, = parsed(raw).iter_attachments()
    assert file.get_filename() == "für ann.pdf"
    assert file.get_content() == bytes(range(256)) * 40
    Path("list.csv").write_text("email,name\nx@x.org,../ann\n")
    with pytest.raises(mailtracker.TrackerError):
        mails()


def test_a_saved_mail_changes_in_its_placeholders_and_its_way_only():
    old = email.message.EmailMessage(policy=email.policy.SMTP)
    for line in ("From: Old <old@z.org>", "To: x@z.org", "Cc: y@z.org", "Received: z",
                 "DKIM-Signature: v=1", "Subject: Größe für {Name|alle}",
                 "Message-ID: <1@z>", "Reply-To: r@z.org", "X-Mozilla-Status: 0001"):
        old.__setitem__(*line.split(": ", 1))
    old.set_content("für {Name|alle}\n", charset="iso-8859-1")
    old.add_alternative("<p>{Name|alle} <img src=cid:i></p>", subtype="html")
    old.get_payload()[1].add_related(os.urandom(999), "image", "png", cid="<i>")
    old.add_attachment("{Name} stays\n", filename="x.txt")
    Path("a.eml").write_bytes(old.as_bytes().replace(b"\r\n", b"\n"))
    raw = mails(template="a.eml")[0]
    mail = parsed(raw)
    assert body(raw) == "für Ann" and mail["Subject"] == "Größe für Ann"
    assert "<p>Ann <img src=cid:i></p>" in body(raw, "html")
    assert mail.keys()[:7] == ["Date", "From", "To", "Message-ID", "References",
                               "Subject", "Reply-To"] and len(mail.keys()) == 9
    assert [mail[name] for name in ("From", "To", "Message-ID", "Reply-To")] == [
        "Me <me@y.org>", "Ann <ann@x.org>", f"<{ID}@y.org>", "r@z.org"]
    for part in [*old.walk()][-2:]:
        assert part.as_bytes(policy=email.policy.SMTP) in raw


@pytest.mark.parametrize("server, option, link, one_click", [
    ("t.y.org", None, None, None), ("t.y.org", "mailto:u@y.or", "mailto:u@y.or", None),
    ("https://t.y.org", None, "https://t.y.org/u/ID", "List-Unsubscribe=One-Click"),
    ("https://t.y.org", "http://y.org/?{id}", "http://y.org/?ID", None),
    ("t.y.org", "https://y.org/{id}", "https://y.org/ID", "List-Unsubscribe=One-Click"),
])
def test_there_is_a_way_to_unsubscribe(server, option, link, one_click):
    link = link and link.replace("ID", ID)
    Path("a.html").write_text(
        "Subject: x\n\n<a href={unsubscribe}>out</a>" if link else HTML)
    raw = mails("--server", server, *["--unsubscribe", option] * bool(option))[0]
    assert parsed(raw)["List-Unsubscribe"] == (link and f"<{link}>")
    assert parsed(raw)["List-Unsubscribe-Post"] == one_click
    assert not link or f"href={link}" in body(raw, "html")


# -- what is refused, and what is only shown -------------------------------------


@pytest.mark.parametrize("people, template, options, words", [
    ("email,name\na@x.org,A\nx,B\n\n,C\n", "", [], "row 3: no address: x|row 5: no a"),
    ("email,name\nann@x.org\n", "", [], "row 2: not 2 cells"),
    ("mial,name\na@x.org,b\n", "", [], "no column email; did you mean mial?"),
    (LIST, "", ["--where", "nane=b"], "no column nane; did you mean name?"),
    (LIST, "", ["--where", "name=d*"], "nobody in list.csv"),
    ("email,nom\na@x.org,b\n", "", [], "row 2: {Name|there}: no such column"),
    (LIST, "", ["--bounce-address", "{user}{id}"], "--bounce-address"),
    (LIST, "", ["--from", "nobody"], "--from: nobody is not an address"),
    (LIST, "", ["--rate", "0/min"], "--rate: 0/min is not a rate"),
    (LIST, "", ["--at", "tomorrow"], "--at: tomorrow is not a time"),
    (LIST, "", ["--unsubscribe", "https://x/ y"], "--unsubscribe"),
    (LIST, "", ["--followup-to", "x"], "--followup-to needs --if"),
    (LIST, "", ["--followup-to", "x", "--if", "opened"], "no campaign x"),
    (LIST, "", ["--preview", "x"], "--yes goes without --preview"),
    (LIST, "Hello", [], "no Subject"),
    (LIST, "Subjekt: x\n\ny", [], "did you mean Subject?"),
    (LIST, "Subject: x\nCc: a@x.org\n\ny", [], "no field Cc"),
    (LIST, "Subject: x\n\n\udcff", [], "UTF-8"),
    (LIST, "Subject: x\nAttach: no.pdf\n\ny", [], "rows 2, 3, 4: no such file: no.pdf"),
    (LIST, "Subject: {Nme}\n\n{Name}", [], "rows 2, 3, 4: {Nme}|row 3: name is empty"),
])
def test_what_is_wrong_is_named_and_nothing_happens(people, template, options, words,
                                                    send, host):
    Path("list.csv").write_text(people)
    Path("a.html").write_bytes((template or HTML).encode("utf-8", "surrogateescape"))
    code, out, err = send(*options)
    assert code in (1, 2) and not out and all(word in err for word in words.split("|"))
    assert not host.connections
    assert not [name for name in os.listdir() if "register" in name]


def test_an_attachment_that_vanishes_is_not_left_out_silently(send, host, files):
    Path("b.pdf").write_bytes(b"%PDF")
    Path("a.html").write_text("Subject: x\nAttach: b.pdf\n\n<p>Hello\n")

    def vanish(stage, _):
        if stage == "dot":
            Path("b.pdf").unlink(missing_ok=True)

    host.script = vanish
    code, out, err = send()
    assert code == 1 and "row 3: no such file: b.pdf" in err and len(host.messages) == 1
    assert [*statuses(files).values()] == ["sent", "queued", "queued"]


def test_without_yes_mails_are_shown_or_written_or_one_is_tried(send, host, run):
    code, out, err = send("--rate", "2/min", yes=False)
    assert code == 0 and "3 mails to send" in out and "would take 2 min" in out
    assert out.count("To: ") == 2 and "Dear friend" in out and "with a pixel" in out
    assert send("--preview", "p", yes=False)[0] == 0 and not host.connections
    assert sorted(os.listdir("p")) == ["001.eml", "002.eml", "003.eml"]
    assert send("--test", "me@z.org", yes=False)[0] == 0
    assert [message.recipients for message in host.messages] == [["me@z.org"]]
    assert sorted(os.listdir()) == ["a.html", "list.csv", "p"]
    assert run("send", "--sample")[0] == 0 and run("send", "--sample")[0] == 1
    code, out, _ = send(base=("sample.html", "sample.csv", *BASE[2:]), yes=False)
    assert code == 0 and "1,234.50" in out


# -- who gets one ----------------------------------------------------------------


def test_each_gets_one_and_a_second_run_sends_only_to_new_rows(send, host, files):
    bounces = "--bounce-address", "{user}+{id}@b.{domain}"
    assert send("--limit", "2", *bounces)[:2] == (0, "2 sent, 0 failed, 0 left of 2\n")
    assert {message.sender for message in host.messages} == {
        f"me+{tag}@b.y.org" for tag in shown(files)}
    Path("list.csv").write_text(LIST + "dan@x.org,D,1\nANN@X.org,twice,1\n")
    code, out, err = send()
    assert (code, out) == (0, "2 sent, 0 failed, 0 left of 2\n") and "2 gone" in err
    assert "row 6: the address stands further up" in err
    assert reached(host) == dict.fromkeys(("ann", "bob", "cid", "dan"), 1)
    assert send("--campaign", "other")[1].startswith("4 sent")
    assert [event.event for event in read_log(files.log)][-2:] == ["sending", "sent"]
    assert not [name for name in os.listdir() if name.endswith(".send")]
    assert "@" not in Path(files.log).read_text()


@pytest.mark.parametrize("lost", ["the log", "the column campaign"])
def test_who_got_one_is_known_from_log_or_register(lost, send, host, files):
    assert send()[0] == 0 and mailtracker.settle(files)
    if lost == "the log":
        os.unlink(files.log)
    else:
        save(files.register, Path(files.register).read_text().replace(",a,", ",,"))
    assert send()[1] == "0 sent, 0 failed, 0 left of 0\n" and len(host.messages) == 3


def test_two_templates_share_the_people_the_same_way_each_time(send, host, files):
    Path("b.html").write_text(HTML.replace("Hello", "Good day"))
    Path("list.csv").write_text("email,name\n" + "".join(
        f"p{n:02}@x.org,x\n" for n in range(12)))
    for limit in "5", "12":
        assert send("--limit", limit, base=("a.html,b.html", *BASE[1:]))[0] == 0
    variants = {row["email"]: row["variant"] for row in shown(files).values()}
    assert {*variants.values()} == {"a", "b"} and len(host.messages) == 12
    for message in host.messages:
        assert (b"Good day" in message.data) == (variants[message.recipients[0]] == "b")


@pytest.mark.parametrize("bounce", ["soft: full", "soft: policy: 5.7.1",
                                    "hard, likely: 550"])
def test_who_unsubscribed_or_has_no_mailbox_is_skipped_everywhere(
        bounce, send, host, files):
    assert send()[0] == 0
    tags = ids(files)
    for who, kind, detail in (("ann", "unsubscribed", ""), ("bob", "bounced", "hard:"),
                              ("cid", "bounced", bounce)):
        append_events(files, [Event("2026-11-20T12:00:00Z", kind, tags[who],
                                    detail=detail)])
    for _ in range(2):
        code, _, err = send("--campaign", "next")
        assert code == 0 and "2 skipped" in err
    assert reached(host) == {"ann": 1, "bob": 1, "cid": 2}
    assert sorted((event.id, event.detail) for event in read_log(files.log)
                  if event.event == "skipped") == sorted(
        [(tags["ann"], "next"), (tags["bob"], "next")])


@pytest.mark.parametrize("kind, detail, skipped", [
    ("unsubscribed", "", True), ("bounced", "hard: 550 no", True),
    ("bounced", "soft: 452 full", False), ("replied", "", False)])
@pytest.mark.parametrize("campaign", ["a", "earlier"])
def test_who_unsubscribes_while_a_mailing_runs_gets_no_mail_of_it(
        campaign, kind, detail, skipped, send, host, files):
    if campaign == "earlier":
        send("--campaign", "earlier")

    def tell(stage, _):
        if stage == "dot" and not told:  # the first mail, Ann's, is on its way
            tag = next(tag for tag, row in shown(files).items()
                       if row["campaign"] == campaign and row["email"][:3] == "bob")
            told.append(append_events(files, [
                Event("2026-11-20T12:00:00Z", kind, tag, detail=detail)]))

    told = []
    host.script = tell
    code, out, err = send("--rate", "600/m")
    gone = reached(host)["bob"] - (campaign == "earlier")
    assert (code, gone) == (0, 0 if skipped else 1)
    assert ("1 skipped: no more mail wanted" in out) == skipped
    assert [event.detail for event in read_log(files.log)
            if event.event == "skipped"] == ["a"] * skipped


@pytest.mark.parametrize("condition, expected", [
    ("opened", ["ann", "cid"]), ("unopened", ["bob"]), ("unreplied", ["ann", "bob"])])
def test_a_second_mail_follows_the_first(condition, expected, send, host, files):
    send("--campaign", "first")
    tags = ids(files)
    append_events(files, [
        Event("2099-11-20T12:00:00Z", "hit", tags["ann"], 1, 1, "human", "browser"),
        Event("2099-11-20T12:00:00Z", "replied", tags["cid"])])
    follow = ("--campaign", "second", "--followup-to", "first", "--if", condition)
    assert "0 mails" in send(*follow, "--after", "1h", yes=False)[1]
    assert send(*follow)[0] == 0
    assert [message.recipients[0][:3] for message in host.messages[3:]] == expected
    mail, first = parsed(host.messages[-1].data), f"<{tags[expected[-1]]}@y.org>"
    assert mail["In-Reply-To"] == first and mail["References"].split()[0] == first


def test_a_lost_address_stops_it_and_so_does_another_run(send, host, files):
    send("--limit", "1")
    path = f"{files.register}.{mailtracker.hash_of('a')[:8]}.send"
    with mailtracker.lock_of(0.0, path, flags=os.O_RDWR | os.O_CREAT):
        assert "another send is at" in send()[2]
    register = Path(files.register)
    register.write_text(register.read_text().replace("ann@x.org", ""))
    os.utime(register, (1e9, 1e9))
    code, _, err = send()
    assert code == 1 and "lost addresses" in err and len(host.messages) == 1


# -- what a smarthost may do ------------------------------------------------------


def deliver(host, files, *args, pause=None):
    """Send to a list without waiting; return the delivery, what is left, the waits."""
    options = mailtracker.parse(["send", *BASE, "--yes", "--smarthost",
                                 f"127.0.0.1:{host.port}", *args])
    mailing, waits = mailtracker.Mailing(options), [0.0]
    people = mailtracker.checked_people(mailing, options)
    plan = mailtracker.Plan(files, mailing, people, options)
    plan.commit()
    delivery = mailtracker.Delivery(
        files, mailing, mailtracker.smarthost_of(options), plan.is_barred,
        pause or waits.append, options.rate, clock=lambda: sum(waits))
    left = delivery.run(plan.mails)
    return delivery, left, [round(wait) for wait in waits if wait]


def script(stage, answer, times=99, who=""):
    """Return a script that gives an answer at a stage, so many times."""
    return on(stage, *[answer] * times, about=who)


Q, S, F = "queued", "sent", "failed"
ANSWERS = {  # script, statuses, waits, and what the words say
    "no such user": (script("rcpt", "550 5.1.1 <Bob@x.org> no", who="bob"),
                     (S, F, S), [], ""),
    "mailbox full": (script("dot", "552 5.2.2 full", 1), (F, S, S), [], ""),
    "later": (script("rcpt", "452 4.2.2 grey", 1), (S, S, S), [60], ""),
    "later at the dot": (script("dot", "451 4.3.0 no", 2), (S, S, S), [60], ""),
    "never": (script("dot", "451 no", who="bob"), (S, Q, S), [60, 300, 900], ""),
    "sender refused": (script("mail", "550 5.7.1 who"), (Q, Q, Q), [], "550 5.7.1 who"),
    "sender put off": (script("mail", "451 4.7.1 slow", 1), (S, S, S), [60], ""),
    "a day's limit": (script("dot", "550 5.4.5 no", who="bob"), (S, Q, Q), [], "5.4.5"),
    "refused once": (script("dot", "550 5.7.1 spam", who="bob"), (S, Q, S), [], ""),
    "refused by all": (script("dot", "554 5.7.1 spam"), (Q, Q, Q), [], "554 5.7.1"),
    "no relay": (script("rcpt", "550 relay not permitted"), (Q, Q, Q), [], "relay"),
    "no service": (script("connect", "554 no"), (Q, Q, Q), [], "554 no"),
    "not now": (script("connect", "421 busy"), (Q, Q, Q), [], "421 busy"),
    "breaks off": (script("rcpt", "close", 1, "bob"), (S, S, S), [30, 60], ""),
    "says 421": (script("data", "421 4.3.0 bye", 1, "bob"), (S, S, S), [30, 60], ""),
    "breaks off for good": (script("mail", "close"), (Q, Q, Q), [30, 120, 600], "c"),
    "lost": (script("dot", "close-after", 1), ("sending", S, S), [], ""),
    "too long": (script("dot", "250 " + "x" * 9000, 1), ("sending", S, S), [], ""),
}


@pytest.mark.parametrize("answer, result, waits, words", ANSWERS.values(), ids=ANSWERS)
def test_each_answer_has_its_consequence(answer, result, waits, words, host, files):
    host.script = answer
    delivery, left, waited = deliver(host, files)
    assert tuple(statuses(files).values()) == result
    assert left == result.count(Q) and waited == waits
    assert words in delivery.words and bool(words) == bool(delivery.words)
    host.script = takes_all
    deliver(host, files)  # the same command again: who waits gets it
    assert max(reached(host).values()) == 1
    assert {*statuses(files).values()} <= {S, F, "sending"}
    assert {event.detail for event in read_log(files.log) if event.event in (S, F)} <= {
        "250 2.0.0 taken", "550 5.1.1 <...> no", "552 5.2.2 full"}


@pytest.mark.parametrize("option, code, bob, count", [
    (None, 1, "sending", 1), ("--resend-unknown", 0, S, 2), ("--assume-sent", 0, S, 1)])
def test_what_may_have_gone_can_be_settled(option, code, bob, count, send, host, files):
    host.script = script("dot", "close-after", 1, "bob")
    assert send()[:2] == (
        1, "2 sent, 0 failed, 0 left of 3; 1 may or may not have gone\n")
    found, _, err = send(*filter(None, [option]))
    assert found == code and ("may or may not" in err) == (option is None)
    assert statuses(files)["bob"] == bob and reached(host)["bob"] == count
    assert len({parsed(message.data)["Message-ID"] for message in host.messages}) == 3


def test_the_rate_is_even_and_ctrl_c_ends_it_between_two_mails(host, files):
    assert deliver(host, files, "--rate", "6/min", "--campaign", "x")[2] == [10, 10]

    def slow(stage, _):
        if stage == "dot":
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)

    pipe = subprocess.PIPE
    process = start(host.port, stdout=pipe, stderr=pipe, text=True)
    host.script = slow
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and out == "1 sent, 0 failed, 2 left of 3\n", err
    assert "stopped by a signal; to go on: " in err and "a.html list.csv" in err
    assert Counter(statuses(files).values())[Q] == 2


@pytest.mark.parametrize("auth", ["password", "xoauth2"])
def test_no_password_goes_without_tls_that_can_be_verified(
        auth, certificates, monkeypatch):
    words = ["good"]
    with FakeSmarthost(users={"ann": "good"}) as bare, FakeSmarthost(
            users={"ann": "good"}, cert=certificates / "first.pem",
            key=certificates / "first.key") as host:
        far, near = (mailtracker.Smarthost(
            "127.0.0.1", port, "ann", lambda: words[-1], auth)
            for port in (bare.port, host.port))
        assert "CERTIFICATE_VERIFY_FAILED" in near.open().text
        monkeypatch.setattr(mailtracker, "is_loopback", lambda address: False)
        assert "offers no TLS" in far.open().text
        assert not host.logins + bare.logins
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "first.pem"))
        assert near.deliver("a@x.org", "b@x.org", b"hi\r\n").is_ok
        near.close()
        words.append("bad")
        assert near.open()[::2] == (535, "login")
        assert {login.encrypted for login in host.logins} == {True}


# -- kills ----------------------------------------------------------------------------


def start(port, **options):
    """Start a mailing in a process of its own."""
    return launch(subprocess.Popen, "send", *BASE, "--yes", "--smarthost",
                  f"127.0.0.1:{port}", **options)


def check_mailing(kills, people, rate, silent=subprocess.DEVNULL):
    """Kill a mailing at random, let it end, and fail if it came out wrong."""
    Path("a.html").write_text(HTML)
    Path("list.csv").write_text("email,name\n" + "".join(
        f"p{n:03}@x.org,P{n}\n" for n in range(people)))
    dice, fails, lost = random.Random(1), chaos(rate, 1), []

    def script(stage, who):
        wish = fails(stage, who)
        lost.extend([who] * (stage == "dot" and (wish or "").startswith("close")))
        return wish

    with FakeSmarthost(script) as host:
        for _ in range(kills):
            with start(host.port, stdout=silent, stderr=silent) as process:
                time.sleep(dice.uniform(0.2, 0.5))
                process.kill()
        host.script = takes_all
        with start(host.port, stdout=silent, stderr=silent) as process:
            process.wait(60)
        got = Counter(message.recipients[0] for message in host.messages)
    rows = shown(mailtracker.Files("register.csv")).values()
    count = Counter((row["status"], got[row["email"]]) for row in rows)
    print(f"{count}, {len(lost)} answers lost")
    assert len(rows) == people and {*count} <= {
        ("sent", 1), ("failed", 0), ("sending", 0), ("sending", 1)}
    assert count["sending", 0] + count["sending", 1] <= kills + len(lost)


def test_kills_lose_nobody_and_double_nobody():
    check_mailing(5, 40, 0.05)


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    check_mailing(int(sys.argv[1]), 300, 0.12)
