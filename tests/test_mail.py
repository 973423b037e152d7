"""What mail leaves behind: statuses, addresses, unsubscribing; where people see it."""
from __future__ import annotations

import pytest

import mailtracker
from conftest import exchange, get, register_rows, rest, save, shown
from mailtracker import Event, Making, append_events, settle

A, B, C = (letter + "cdfghjkmnpqrstvwxz22" for letter in "bcd")
NOON, LATER = "2026-11-20T12:00:00Z", "2026-11-20T12:05:00Z"
MAIL = ("id", "name", "email", "campaign", "variant")
QUEUED = Making(NOON, "", "queued", "spring", MAIL)


def queue(files, *tags):
    mailtracker.add_tags(files, [
        (tag, "Ann", f"ann{n}@x.org", "spring", "") for n, tag in enumerate(tags)],
        QUEUED)


def say(files, *kinds, tag=A):
    """Append events, each with a detail, a minute after the other."""
    append_events(files, [Event(f"2026-11-20T12:{n:02}:00Z", kind, tag, detail="250 ok")
                          for n, kind in enumerate(kinds, 1)])


# -- what becomes of a mail --------------------------------------------------------

STATUSES = {  # events after queued, and the status they come to
    "sent": ("sending sent", "sent"),
    "refused for now": ("sending queued", "queued"),
    "refused for now, then sent": ("sending queued sending sent", "sent"),
    "lost after the dot": ("sending", "sending"),
    "failed": ("failed", "failed"),
    "delayed": ("sending sent delayed", "delayed"),
    "replied late, after a bounce": ("sending sent bounced replied", "bounced"),
    "replied before a delay": ("sending sent replied delayed", "replied"),
    "unsubscribed": ("sending sent unsubscribed bounced", "unsubscribed"),
    "in the wrong order": ("sending replied sent queued", "replied"),
    "signs without a status": ("sending sent autoreply read skipped answered", "sent"),
}


@pytest.mark.parametrize("when", ["in the end", "after each event", "never"])
@pytest.mark.parametrize("kinds, expected", STATUSES.values(), ids=STATUSES)
def test_a_status_moves_forward_only_whenever_it_is_settled(
        when, kinds, expected, files):
    queue(files, A, B)
    for number, kind in enumerate(kinds.split(), 1):
        assert when != "after each event" or settle(files)
        append_events(files, [Event(f"2026-11-20T12:{number:02}:00Z", kind, A,
                                    detail="250 ok")])
    assert when == "never" or settle(files)
    assert [shown(files)[tag]["status"] for tag in (A, B)] == [expected, "queued"]
    if when != "never":
        assert register_rows(files.register)[A]["status"] == expected


def test_a_mail_that_was_fetched_was_sent_whatever_its_sender_knows(files):
    queue(files, A)
    say(files, "sending")
    append_events(files, [Event(LATER, "hit", A, 1, 0, "machine", "crawler")])
    assert shown(files)[A]["status"] == "sent"
    assert settle(files) and register_rows(files.register)[A]["status"] == "sent"


def test_an_armed_tag_has_no_status_and_no_mail_column_appears(run, files):
    run("newtag", "--armed", "--name", "x", "--register", files.register)
    rest(files.register)
    assert settle(files)
    assert set(register_rows(files.register).popitem()[1]) == {
        *mailtracker.OWN_COLUMNS, "sent"}


OWN = ",".join(mailtracker.OWN_COLUMNS)
OLD = [  # registers that mail finds, and what of them must stay
    pytest.param(None, "", id="none"),
    pytest.param(f"{OWN}\n{B},3,,0,,,Bob\n", "Bob", id="without mail"),
    pytest.param(f"note;id;Email;hits\n=k;{B};own@x.org;2\n", "=k", id="a user's"),
    pytest.param(f"{B},Bob,7,2018-01-01 10:00:00\n", "Bob", id="of 2018"),
]


@pytest.mark.parametrize("register, kept", OLD)
def test_columns_that_mail_needs_are_added_before_the_first_row(register, kept, files):
    if register:
        save(files.register, register)
    queue(files, A)
    with open(files.register) as file:
        text = file.read()
    assert kept in text and text.count("ann0@x.org") == 1
    for _ in range(2):
        rows = shown(files)
        row = {name.lower(): cell for name, cell in rows[A].items()}
        assert [row[c] for c in ("email", "campaign", "status")] == [
            "ann0@x.org", "spring", "queued"]
        assert settle(files)
    assert not register or int(rows[B]["hits"]) > 1


@pytest.mark.parametrize("has_row", [True, False])
def test_a_stale_save_from_before_the_mailing_loses_no_address_and_no_status(
        has_row, files):
    queue(files, A)
    say(files, "sending", "sent")
    assert settle(files)
    save(files.register, OWN + "\n" + f"{A},0,,0,,{NOON},Ann\n" * has_row)
    for _ in range(2):
        row = shown(files)[A]
        assert [row[c] for c in ("email", "campaign", "status")] == [
            "ann0@x.org", "spring", "sent"]
        assert settle(files)


def test_cells_that_could_be_formulas_are_none_and_come_back_as_they_were(files, run):
    texts = "=Ann", "+49@x.org", "@spring", "-b"
    mailtracker.add_tags(files, [(A, *texts)], QUEUED)
    row = shown(files)[A]
    assert tuple(row[column] for column in MAIL[1:]) == texts
    with open(files.register) as file:
        stored = file.read()
    for text in stored, run("dump", files.register, "--format", "csv")[1]:
        assert all(f"'{cell}," in text for cell in texts)


def test_a_row_costs_one_look_at_the_register(files, monkeypatch):
    queue(files, A)
    looks, register = [], mailtracker.Register
    monkeypatch.setattr(mailtracker, "Register",
                        lambda *source: looks.append(source) or register(*source))
    queue(files, B)
    assert len(looks) == 1


def test_the_log_holds_no_address(files):
    queue(files, A)
    with open(files.log) as file:
        assert "@" not in file.read()


# -- where people see it -----------------------------------------------------------


def test_dump_shows_statuses_and_counts_a_reply_as_read(files, run):
    queue(files, A, B)
    mailtracker.add_tags(files, [(C, "", "c@x.org", "spring", "")], QUEUED)
    say(files, "sending", "sent", "replied")
    say(files, "failed", tag=B)
    lines = run("dump", files.register)[1].splitlines()
    assert lines[0].split()[-1] == "status"
    assert [line.split()[-1] for line in lines[1:4]] == ["replied", "failed", "queued"]
    assert [line[23:40].strip() for line in lines[1:4]] == [
        "Ann, ann0@x.org", "Ann, ann1@x.org", "c@x.org"]
    assert lines[-1] == ("3 tags, 1 opened, 0 hits, 0 opens, "
                         "1 queued, 1 failed, 1 replied")


@pytest.mark.parametrize("options, expected", [
    (["--status", "failed"], [B]), (["--opened"], [A]), (["--unopened"], [B, C]),
    (["--campaign", "spring"], [A, B, C]), (["--campaign", "autumn"], []),
    (["--campaign", "spring", "--status", "queued"], [C]),
])
def test_tags_are_chosen_by_what_became_of_their_mail(options, expected, files, run):
    queue(files, A, B, C)
    say(files, "sending", "sent", "replied")
    say(files, "failed", tag=B)
    out = run("dump", files.register, "--format", "csv", *options)[1]
    assert [line[:21] for line in out.splitlines()[1:]] == expected


def test_the_history_has_the_words_of_mail_servers(files, run):
    queue(files, A)
    append_events(files, [Event(LATER, "bounced", A, detail="hard: 550 no\x1b such")])
    out = run("dump", files.register, "--id", A)[1]
    assert f"{LATER}  bounced  its mail came back\n" in out
    assert r"hard: 550 no\x1b such" in out and "spring" in out


# -- unsubscribing ------------------------------------------------------------------


def test_a_page_asks_and_only_its_button_unsubscribes_the_same_for_every_id(
        serve, newtags, files):
    tag, = newtags(files.register)
    server = serve("--register", files.register)
    page = exchange(server, get(f"/u/{tag}".encode()))
    assert page.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n")
    assert b"<button>" in page and tag.encode() not in page
    assert exchange(server, get(f"/any/u/{B}?x=1".encode())) == page
    assert server.request("HEAD", f"/u/{tag}")[0] == 200
    assert (shown(files)[tag]["hits"], "status" in shown(files)[tag]) == ("0", False)
    one_click = (b"POST /u/%b HTTP/1.1\r\nContent-Type: application/"
                 b"x-www-form-urlencoded\r\nContent-Length: 26\r\n\r\n"
                 b"List-Unsubscribe=One-Click")
    answers = {exchange(server, one_click % which) for which in (
        tag.encode(), tag.encode(), B.encode())}
    assert len(answers) == 1 and b"unsubscribed" in answers.pop()
    assert exchange(server, one_click % b"x")[:12] == b"HTTP/1.1 405"
    assert shown(files)[tag]["status"] == "unsubscribed"
    assert server.stop() == 0
    with open(files.log) as file:
        assert file.read().count(",unsubscribed,") == 1


def test_a_pixel_cannot_lie_where_recipients_unsubscribe(run):
    assert "is not a path" in run("newtag", "--path", "/u/{id}")[2]
