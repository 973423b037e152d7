"""rejudge, forget, settle, and what all commands have in common."""
from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import mailtracker
from conftest import SCRIPT
from conftest import clean_environment, launch
from conftest import register_rows, save
from test_dump import (
    A, B, C, COLUMNS, FIREFOX, LOG, cases, folder, on_terminal, row, write)

__all__ = ["folder"]  # the fixture is for all tests here
DAY = "2026-11-%02dT10:00:00Z"


def log(*events):
    """Write an event log."""
    write(LOG.encode() + b"".join(event.line() for event in events),
          "register.events.csv")


def hit(tag, day, hits, opens, verdict, reason, agent=FIREFOX, address="192.0.2.0"):
    return mailtracker.Event(DAY % day, "hit", tag, hits, opens, verdict, reason,
                             address, agent)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def dumped(run, *args):
    return json.loads(run("dump", "--format", "json", *args)[1])


# -- rejudge ----------------------------------------------------------------------


@pytest.fixture
def misjudged():
    """Make a log in which one hit is judged wrong, and one right."""
    write(f"{COLUMNS}\n{row(A, 'Ann', 2, DAY % 6, 2, DAY % 6)}{row(B, 'Bob')}")
    log(mailtracker.Event(DAY % 1, "made", A, 0, 0, detail="Ann"),
        mailtracker.Event(DAY % 1, "made", B, 0, 0, detail="Bob"),
        hit(A, 5, 1, 1, "human", "browser"),
        hit(A, 6, 2, 2, "human", "browser", agent="curl/7.88.1"))


CHANGES = ("1 hit judged differently\n"
           "         1  machine: a program's HTTP library\n"
           "        -1  open, on 1 tag\n")


def test_rejudge_corrects_register_and_log_and_then_finds_nothing(
        run, misjudged, folder):
    before = {name: read(name) for name in os.listdir(folder)}
    assert run("rejudge", "--dry-run") == (
        0, CHANGES + "nothing was changed: this was a dry run\n", "")
    assert {name: read(name) for name in os.listdir(folder)} == before
    assert run("rejudge") == (0, CHANGES, "")
    assert read("register.events.csv").startswith(before["register.events.csv"])
    ann = dumped(run)[0]
    assert (ann["hits"], ann["opens"], ann["last_open"]) == (2, 1, DAY % 5)
    assert register_rows("register.csv")[A]["opens"] == "1"
    assert run("rejudge") == (0, "0 hits judged differently\n"
                              "        +0  opens, on 0 tags\n", "")
    assert "a program's HTTP library" in run("dump", "--id", A)[1]


def test_rejudge_wants_the_server_stopped_and_says_so_in_one_line(
        run, misjudged, serve):
    server = serve()
    code, out, err = run("rejudge")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.match(f"mailtracker: error: .*server.* {server.process.pid}", err)
    assert run("rejudge", "--dry-run")[0] == 0
    assert server.stop() == 0
    assert run("rejudge")[:2] == (0, CHANGES)


def test_rejudge_without_register_or_log_is_one_clear_line(
        run, misjudged, folder, monkeypatch):
    monkeypatch.setattr(mailtracker, "SAVING", 0.1)  # how long one is waited for
    for missing in ("register.csv", "register.events.csv"):
        os.unlink(missing)
        code, out, err = run("rejudge")
        assert (code, out, err.count("\n")) == (1, "", 1) and missing in err
        assert missing not in os.listdir(folder)
        write(f"{COLUMNS}\n{row(A)}")


# -- forget -----------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["unsubscribed", "bounced"])
def test_who_is_to_get_no_more_mail_is_not_forgotten_by_age(kept, run, folder):
    write(f"{COLUMNS},status\n" + "".join(
        row(tag, name, created="2020-01-01T00:00:00Z").replace("\n", f",{status}\n")
        for tag, name, status in ((A, "Ann", "sent"), (B, "Bob", kept))))
    assert run("forget", "--yes", "--older-than", "365d")[0] == 0
    assert [each["name"] for each in dumped(run)] == ["Bob"]
    assert run("forget", "--yes", "Bob")[0] == 0 and not dumped(run)


def test_no_processor_time_is_burnt_until_a_save_is_whole(run, folder, monkeypatch):
    monkeypatch.setattr(mailtracker, "SAVING", 0.5)
    save("register.csv", f"{COLUMNS}\n{row(A, 'Ann')}", 0)
    before = time.process_time()
    assert run("forget", "--yes", "Ann")[0] == 0 and not dumped(run)
    assert time.process_time() - before < 0.3


@pytest.fixture
def known(run):
    """Make a register of three tags with a backup and a rotated log."""
    write(f"{COLUMNS},note\n" + "".join(line.replace("\n", ",mine\n") for line in (
        row(A, "Ann", 1, DAY % 5, 1, DAY % 5, created=DAY % 1), row(B, "Bob"),
        row(C, "Cid", created="2026-11-20T08:00:00Z"))))
    log(hit(A, 5, 1, 1, "human", "browser"), hit(B, 6, 0, 0, "machine", "crawler"))
    os.rename("register.events.csv", "register.events.csv.1")
    log(*(mailtracker.Event(DAY % 7, "sent", tag, 0, 0) for tag in (A, B, C)))
    assert run("settle") == (0, "", "")


def left(folder):
    """Return which of the three tags stand in our files, by their first letters."""
    text = b"".join(read(folder / name) for name in os.listdir(folder)).decode()
    return "".join(tag[0] for tag in (A, B, C) if tag in text)


@pytest.mark.parametrize("words, stay", [
    (A, "df"), (A[:7], "df"), ("Ann", "df"), (f"Ann {B}", "f"),
    (f"--older-than {DAY % 10}", "f"), ("--older-than 2020-01-01", "bdf")])
def test_forget_removes_a_tag_from_every_file(run, known, folder, words, stay):
    code, out, err = run("forget", "--yes", *words.split())
    gone = 3 - len(stay)
    assert (code, err) == (0, "") and os.path.exists("register.csv.orig")
    assert out.splitlines()[-1] == (
        f"forgot {gone} tag{'s' * (gone != 1)}" if gone else "nothing to forget")
    assert left(folder) == stay
    assert "".join(each["id"][0] for each in dumped(run)) == stay
    assert all(each["note"] == "mine" for each in dumped(run))
    assert not gone or (b"Ann" in read("register.csv")) == ("b" in stay)


def test_what_cannot_be_forgotten_is_one_clear_line(run, known, folder, monkeypatch):
    with open(os.devnull, encoding="utf-8") as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        for words, wrong in (
                ("Ann Zoe", "no such tag: Zoe; nothing was forgotten"),
                (A[:6], f"no such tag: {A[:6]}; nothing was forgotten"),
                ("Ann", "there is nobody to ask here: say --yes, or --dry-run first")):
            code, _, err = run("forget", *words.split())
            assert (code, err) == (1, f"mailtracker: error: {wrong}\n")
    assert left(folder) == "bdf"


@pytest.mark.parametrize("answer, stay", [
    ("y\n", "df"), ("n\n", "bdf"), ("\x04", "bdf")], ids=["yes", "no", "end of input"])
def test_forget_shows_what_would_go_and_asks_on_a_terminal(
        run, known, folder, answer, stay):
    code, out, err = run("forget", "--dry-run", "Ann")
    assert (code, err) == (0, "") and "Ann" in out and "Bob" not in out
    shown = out.splitlines()[-3:]
    assert shown == ["1 tag, 1 opened, 1 hit, 1 open",
                     "with 2 events in the log, for good, and in the backup as well",
                     "nothing was changed: this was a dry run"]
    assert left(folder) == "bdf"
    code, out = on_terminal("forget", "Ann", answer=answer)
    assert "\n".join([*shown[:2], "forget them? [y/N] "]) in out
    assert code == (stay != "df") and left(folder) == stay


def test_a_running_server_forgets_within_a_second_and_writes_nothing_more(
        serve, newtags, run, folder):
    tag, other = newtags("register.csv", names=["Ann", "Bob"])
    server = serve("--compose-window", 0)
    server.hit(tag)
    assert run("forget", "--yes", tag)[0] == 0
    time.sleep(1.0)
    server.hit(tag)
    server.hit(other)
    server.stop()
    assert [(each["id"], each["hits"]) for each in dumped(run)] == [(other, 1)]
    assert not [name for name in os.listdir(folder) if tag.encode() in read(name)]


# -- settle -----------------------------------------------------------------------


def test_settle_brings_up_to_date_or_leaves_what_it_cannot_read(run, known):
    with open("register.events.csv", "ab") as file:
        file.write(hit(B, 9, 4, 2, "human", "browser").line())
    assert register_rows("register.csv")[B]["hits"] == "0"
    assert run("settle") == (0, "", "")
    bob = register_rows("register.csv")[B]
    assert (bob["hits"], bob["last_hit"], bob["opens"]) == ("4", DAY % 9, "2")
    assert bob["note"] == "mine"
    broken = read("register.csv") + b'x,"\n'
    write(broken)
    code, out, err = run("settle")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.match(r"mailtracker: error: .*register.csv, line 5: ", err)
    assert read("register.csv") == broken


# -- the command line -------------------------------------------------------------


def test_there_is_help_on_one_screen_and_for_each_command(run):
    code, out, err = run()
    assert (code, out) == (2, "") and err.startswith("usage: ")
    assert len(err.splitlines()) <= 25
    assert run("help") == run("--help") == (0, err, "")
    for command in mailtracker.build_parser().get_default("commands"):
        assert re.search(rf"^ +{command} ", err, re.M)
        code, out, nothing = run("help", command)
        assert (code, nothing) == (0, "") and max(map(len, out.splitlines())) <= 80
        assert out.startswith(f"usage: mailtracker.py {command} [options]")
        assert run(command, "--help") == run(command, "-h") == (0, out, "")
    version = (0, f"mailtracker {mailtracker.__version__}\n", "")
    assert run("-V") == run("--version") == version


WRONG = """
dmup | COMMAND | no command dmup; did you mean dump?
xyzzy | COMMAND | no command xyzzy
help dmp | COMMAND | no command dmp; did you mean dump?
--register x dump | COMMAND | no command --register
dump --opend | dump | no option --opend; did you mean --opened?
newtag --nmae=x | newtag | no option --nmae; did you mean --name?
dump --unop | dump | no option --unop; did you mean --unopened?
dump --events-file x | dump | no option --events-file; did you mean --events?
forget --count | forget | no option --count
dump a b | dump | one word too many: b
dump --\x1b[2J | dump | no option --\\x1b[2J
server --no-events | server | --no-events is gone: the log is what counts; to keep \
little in it, say --keep-address none --keep-agent no
forget | forget | say which tags: by ID or NAME, or by --older-than
dump --since yesterday | dump | argument --since: yesterday is not a time such as \
2026-11-01, 3d or 12h
dump --limit 0 | dump | argument --limit: 0 is not a number from 1 to 999999999
newtag --count 0 | newtag | argument --count: 0 is not a number from 1 to 1000000
newtag --path /{id}x.gif | newtag | argument --path: /{id}x.gif is not a path with \
{id} as a segment, such as /img/{id}/logo.gif
server --rotate-events 1 | server | argument --rotate-events: 1 is not a size such \
as 100M
server --me x | server | argument --me: x is not an address or network such as \
10.0.0.0/8
"""


@pytest.mark.parametrize("line", WRONG.strip().split("\n"))
def test_a_wrong_command_line_says_what_is_meant(run, line, folder):
    words, command, wrong = line.split(" | ")
    code, out, err = run(*words.split(" "))
    usage, message = err.splitlines()
    assert (code, out) == (2, "")
    assert usage.startswith(f"usage: mailtracker.py {command} [options]")
    assert message == f"mailtracker: error: {wrong}"
    assert os.listdir(folder) == []


NO_EFFECT = [
    *(f"dump --follow {more}" for more in (
        "--format csv", "--sort name", "--log", "--reverse", "--limit 3", "--full",
        "--unhit", "--unopened")),
    *(f"dump --log {more}" for more in ("--full", "--unhit", "--unopened")),
    "dump --full --format json", "dump --full --format csv", "dump --hit --unhit",
    "dump --opened --unopened", "dump --opened --unhit", "dump --unhit --since 3d",
    "dump a.csv --register b.csv", "newtag --names-from x --name y",
    "newtag --names-from x --count 2", "forget Ann --older-than 3d",
    "forget Ann --yes --dry-run", "server --tls-cert x", "server --tls-key x",
    "settle --rotate-events 3",
]


@pytest.mark.parametrize("line", NO_EFFECT)
def test_an_option_without_effect_is_a_usage_error(run, line, folder):
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert re.search("mailtracker: error: .+ (goes without|needs) .+\n", err)
    assert os.listdir(folder) == []


# -- streams and signals ----------------------------------------------------------


@pytest.mark.parametrize("command", [
    "dump", "dump --format csv", "newtag --server h", "newtag", "help", "rejudge",
    "forget --yes Ann", "dump --nonsense"])
@pytest.mark.parametrize("shell", **cases({
    "stdout closed": "{} >&-", "stderr closed": "{} 2>&-",
    "all closed": "{} <&- >&- 2>&-", "stdout full": "{} > /dev/full",
    "nobody reads": "{} | true"}))
def test_a_stream_that_is_closed_or_full_is_no_traceback(known, folder, shell, command):
    line = shell.format(f'"$@" {command}')
    done = launch(subprocess.run, prefix=("sh", "-c", line, "sh"), cwd=folder,
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                  timeout=60)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) <= 1
    if command == "dump" and ("full" in shell or " >&-" in shell):
        assert done.returncode == 1
    text = read("register.csv").decode()
    assert "usage" not in text and "mailtracker" not in text  # no file became stdout
    assert " >&-" not in shell or text.count("\n") == 4  # no tag that nobody sees


@pytest.mark.parametrize("command", [
    "dump --follow", "newtag --count 100000 --server h", "dump --sort name"])
@pytest.mark.parametrize("after", [0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_is_no_traceback_at_any_moment(known, folder, command, after):
    with subprocess.Popen(
            [sys.executable, str(SCRIPT), *command.split()], cwd=folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
            env=clean_environment(), start_new_session=True) as process:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
        err = process.stderr.read()
        code = process.wait(20)
    # No program can help what interrupts Python's start, compiling it included.
    assert not re.search(r'mailtracker\.py", line \d{3}', err)
    assert err or code in (0, 130, -signal.SIGINT)


def test_long_work_shows_its_progress_on_a_terminal_and_wipes_it(monkeypatch):
    numbers = "import mailtracker, sys, time\nmailtracker.PATIENCE = 0\n" \
        "for n in mailtracker.progress(range(5000), 'reading rows'): pass"
    folder = str(SCRIPT.parent)
    ours, theirs = os.openpty()
    with subprocess.Popen([sys.executable, "-c", numbers], stderr=theirs,
                          env=clean_environment(PYTHONPATH=folder)) as process:
        process.wait(20)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert re.match(r"\r.*reading rows.* [\d,]+", shown)
    assert re.search(r"\r +\r$", shown)


def test_no_name_of_the_module_is_given_to_two_things():
    """A constant of a later part must not change what an earlier one waits for."""
    names = [name.id for statement in ast.parse(SCRIPT.read_text("utf-8")).body
             if isinstance(statement, ast.Assign)
             for target in statement.targets for name in ast.walk(target)
             if isinstance(name, ast.Name)]
    assert len(names) == len(set(names)) > 100
