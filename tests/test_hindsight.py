"""rejudge and forget, and what main promises for every command."""
from __future__ import annotations

import csv
import http.client
import io
import os
import re
import subprocess
import sys
import threading

import pytest

import mailtracker
from conftest import SCRIPT
from conftest import clean_environment
from conftest import eventually
from conftest import register_rows

A, B, C = (f"{c}cdfghjkmnpqrstvwxz23" for c in "bdf")
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
GMAIL = ("Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 "
         "(via ggpht.com GoogleImageProxy)")
CURL = "curl/8.5.0"
COLUMNS = "id,hits,last_hit,opens,last_open,created,name\n"
LOG = "time,event,id,verdict,reason,address,agent\n"
EVENTS = "register.events.csv"
NEVER = " " * 20
CREATED = "2026-11-01T08:00:00Z"


def cases(table):
    """Return a parametrize table and its ids, from a dict by id."""
    return {"argvalues": list(table.values()), "ids": list(table)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAILTRACKER_REGISTER", raising=False)
    return tmp_path


def write(text, path="register.csv"):
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def at(day, second=0):
    return f"2026-11-{day:02}T10:00:{second:02}Z"


def row(tag, name="", hits=0, last_hit=NEVER, opens=0, last_open=NEVER,
        created=CREATED):
    return f"{tag},{hits:010},{last_hit},{opens:010},{last_open},{created},{name}\n"


def hit(when, tag, verdict, reason, agent=FIREFOX, address="192.0.2.0", event="hit"):
    return mailtracker.Event(when, event, tag, verdict, reason, address, agent)


def write_log(*events, path=EVENTS):
    write(LOG + "".join(event.line().decode() for event in events), path)


def logged(path=EVENTS):
    """Return day, kind, verdict and reason of every event of a file of the log."""
    with mailtracker.EventFile(path) as file:
        return [(int(e.time[8:10]), e.event, e.verdict, e.reason) for e in file]


def contents(folder):
    """Return the bytes of every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def opens(tag, path="register.csv"):
    found = register_rows(path)[tag]
    return int(found["opens"]), found["last_open"]


# -- rejudge ----------------------------------------------------------------------


@pytest.fixture
def outdated(run):
    """Make a log whose verdicts are those of worse rules, and its register."""
    write(COLUMNS + row(A, "Ann", 4, at(9), 3, at(9)) + row(B, "Bob", 2, at(7)))
    write_log(hit(at(5), A, "human", "browser"),
              hit(at(6), A, "human", "unrecognised", CURL),
              hit(at(7), B, "machine", "crawler", GMAIL),
              hit(at(8), A, "self", "composing", CURL),
              hit(at(9), A, "human", "unrecognised", CURL),
              hit(at(10), B, "human", "browser", "", ""))
    assert run("dump")[0] == 0


def test_outdated_verdicts_and_opens_are_corrected_and_it_says_so(run, outdated):
    code, out, err = run("rejudge")
    assert (code, err) == (0, "")
    assert logged() == [(5, "hit", "human", "browser"),
                        (6, "hit", "machine", "http-library"),
                        (7, "hit", "proxy", "gmail-proxy"),
                        (8, "hit", "self", "composing"),
                        (9, "hit", "machine", "http-library"),
                        (10, "hit", "human", "browser")]
    assert opens(A) == (1, at(5))
    assert opens(B)[0] == 1
    assert out.splitlines()[0] == "6 hits judged again, 3 differently"
    assert re.search(r"\b2  human \(unrecognised\) -> machine \(http-library\)", out)
    assert re.search(r"\b1  machine \(crawler\) -> proxy \(gmail-proxy\)", out)
    assert re.search(r"-1  opens, on 2 tags", out)


def test_hits_are_facts_that_judging_anew_leaves_alone(run, outdated):
    before = register_rows("register.csv")
    run("rejudge")
    for tag, after in register_rows("register.csv").items():
        for column in ("hits", "last_hit", "created", "name"):
            assert after[column] == before[tag][column]


def test_a_dry_run_says_the_same_and_changes_nothing(run, outdated, folder):
    before = contents(folder)
    code, dry, _ = run("rejudge", "--dry-run")
    assert code == 0 and contents(folder) == before
    assert dry.endswith("nothing was changed: this was a dry run\n")
    assert run("rejudge")[1] == "".join(dry.splitlines(keepends=True)[:-1])
    assert contents(folder) != before


def test_judging_twice_changes_nothing_more(run, outdated, folder):
    run("rejudge")
    first = contents(folder)
    code, out, _ = run("rejudge")
    assert code == 0 and "6 hits judged again, 0 differently" in out
    assert contents(folder) == first


def test_what_servers_wrote_is_judged_the_same_again(serve, newtags, run):
    tag, = newtags("register.csv")
    server = serve("--compose-window", 0)
    for agent in (FIREFOX, GMAIL, CURL, "", '=cmd|"x",\'', "a\tb", "\\x1b[31m",
                  "é" * 9):
        agent = agent.encode("utf-8").decode("latin-1")  # as http.client wants it
        server.get(f"/{tag}.gif", {"User-Agent": agent})
    server.stop()
    with open(EVENTS, "rb") as file:
        before = file.read()
    known = register_rows("register.csv")
    assert ", 0 differently" in run("rejudge")[1]
    with open(EVENTS, "rb") as file:
        assert file.read() == before
    assert register_rows("register.csv") == known
    assert os.stat(EVENTS).st_mode & 0o777 == 0o600


def test_rotated_files_are_judged_again_too(run):
    write(COLUMNS + row(A, "Ann", 3, at(7), 3, at(7)))
    for day, path in ((5, EVENTS + ".1"), (6, EVENTS + ".2"), (7, EVENTS)):
        write_log(hit(at(day), A, "human", "browser", FIREFOX if day == 5 else CURL),
                  path=path)
    assert run("rejudge")[0] == 0
    assert [logged(path)[0][2] for path in (EVENTS + ".1", EVENTS + ".2", EVENTS)] == [
        "human", "machine", "machine"]
    assert opens(A) == (1, at(5))


STALE = ("Mozilla/5.0 (Windows NT 6.1) AppleWebKit/537.36 (KHTML, like Gecko) "
         "Chrome/57.0.2987.133 Safari/537.36")


def test_an_old_verdict_line_that_is_no_longer_true_goes(run):
    write(COLUMNS + row(A, "Ann", 1, at(5)))
    write_log(hit(at(5), A, "human", "browser"),
              hit(at(5), A, "machine", "many-networks", event="verdict"))
    assert run("rejudge")[0] == 0
    assert logged() == [(5, "hit", "human", "browser")]
    assert opens(A) == (1, at(5))


def test_a_verdict_line_that_is_still_true_is_found_again_once(serve, newtags, run):
    tag, = newtags("register.csv")
    server = serve("--compose-window", 0, "--trusted-proxy", "127.0.0.1",
                   "--keep-address", "full")
    for address, agent in (("198.51.100.7", STALE), ("81.105.41.164", GMAIL)):
        server.get(f"/{tag}.gif", {"User-Agent": agent, "X-Forwarded-For": address})
    server.stop()
    before = logged()
    assert [kind for _, kind, _, _ in before].count("verdict") == 1
    run("rejudge")
    assert logged() == before and opens(tag)[0] == 1


def test_events_of_another_kind_and_of_tags_that_are_gone_stay(run):
    write(COLUMNS + row(A, "Ann"))
    write_log(hit(at(5), A, "", "", "", "", "click"),
              hit(at(6), B, "human", "unrecognised", CURL))
    code, out, _ = run("rejudge")
    assert code == 0
    assert logged() == [(5, "click", "", ""), (6, "hit", "machine", "http-library")]
    assert list(register_rows("register.csv")) == [A]


@pytest.mark.parametrize("bad", [
    f"garbage,hit,{A},human,browser,192.0.2.0,x",
    f"2026-13-99T10:00:00Z,hit,{A},human,browser,192.0.2.0,x",
    f"{at(6)},hit,{A},unknown,unrecognised,no address,x", f"{at(6)},hit,\x00,a,b,c,d",
    f'{at(6)},hit,{A},human,browser,,"open', "too,few", ",,,,,,"],
    ids=["time", "no such day", "address", "NUL", "quote", "cells", "empty"])
def test_a_damaged_line_harms_no_other(run, outdated, bad):
    with open(EVENTS, "a", encoding="utf-8") as file:
        file.write(f"{bad}\n" + hit(at(11), A, "x", "y", GMAIL).line().decode())
    code, _, err = run("rejudge")
    assert (code, err) == (0, "")
    assert logged()[-1] == (11, "hit", "proxy", "gmail-proxy")
    assert opens(A) == (2, at(11))


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["for good", "dry run"])
def test_without_a_log_it_is_one_clear_line(run, more):
    write(COLUMNS + row(A))
    code, out, err = run("rejudge", *more)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("mailtracker: error: no such event log: ")


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["for good", "dry run"])
def test_without_a_register_it_makes_none(run, folder, more):
    write_log(hit(at(5), A, "human", "unrecognised", CURL))
    before = contents(folder)
    code, _, err = run("rejudge", *more)
    assert code == 1 and err.startswith("mailtracker: error: no such register")
    assert contents(folder) == before


class Load:
    """Hit a tag again and again, in a thread, until told to stop."""

    def __init__(self, server, tag):
        self.server, self.tag, self.answered = server, tag, 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.over.is_set() and self.answered < 20000:
            client = http.client.HTTPConnection("127.0.0.1", self.server.port,
                                                timeout=10)
            client.request("GET", f"/{self.tag}.gif", headers={"User-Agent": GMAIL})
            assert client.getresponse().read().startswith(b"GIF89a")
            client.close()
            self.answered += 1

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


@pytest.mark.parametrize("rotation", [0, 20_000], ids=["one file", "rotating"])
@pytest.mark.parametrize("command", ["rejudge", "forget"])
def test_hits_while_the_log_is_written_anew_are_lost_nowhere(
        serve, newtags, tracker, folder, rotation, command):
    tag, other = newtags("register.csv", names=["hit", "other"])
    write_log(*(hit(at(1 + i // 60 % 28, i % 60), other, "human", "unrecognised", CURL)
                for i in range(15_000)))
    size = os.path.getsize(EVENTS)
    more = ["--rotate-events", size + rotation] if rotation else []
    server = serve("--compose-window", 0, "--quiet", *more)
    server.hit(tag)
    with Load(server, tag) as load:
        eventually(lambda: load.answered > 20)
        for _ in range(3 if command == "rejudge" else 1):
            done = tracker(*command.split(), *(
                [] if command == "rejudge" else ["other", "--yes"]))
            assert done.returncode == 0, done.stderr
        seen = load.answered
        eventually(lambda: load.answered > seen + 20)
    server.stop()
    found = [e for e in mailtracker.read_log(str(folder / EVENTS)) if e.event == "hit"]
    rows = register_rows("register.csv")
    assert sum(e.id == tag for e in found) == load.answered + 1
    assert int(rows[tag]["hits"]) == load.answered + 1
    if command == "rejudge":
        assert sum(e.id == other for e in found) == 15_000
        assert {e.verdict for e in found if e.id == other} == {"machine"}
    else:
        assert other not in rows and not any(e.id == other for e in found)


# -- forget -----------------------------------------------------------------------


NAME = "Ann Onym"


@pytest.fixture
def remembered(run):
    """Make every kind of file that knows of Ann: register, twin, log, backup."""
    write("\ufeff" + (COLUMNS + f"{A},3,{at(9)},1,{at(9)},{CREATED},{NAME}\n"
                      f"{B},2,{at(7)},0,,{CREATED},Bob\n"
                      f"{C},0,,0,,2020-01-01T00:00:00Z,Cid\n"
                      "sum,5,,,,,\n").replace(",", ";").replace("\n", "\r\n"))
    write_log(hit(at(5), A, "human", "browser", "ann's/1"), hit(at(6), B, "human", "b"),
              path=EVENTS + ".1")
    write_log(hit(at(7), B, "human", "browser"), hit(at(9), A, "human", "b", "ann's/2"))
    assert run("newtag", "--server", "h", "--name", "new")[0] == 0
    assert os.path.exists("register.csv.bak")


def knows(folder, *words):
    """Return the files in which one of some words stands."""
    return sorted(name for name, data in contents(folder).items()
                  if any(word.encode() in data for word in words))


@pytest.mark.parametrize("word", [NAME, A, A[:7], A[:12]],
                         ids=["name", "id", "7 characters", "12 characters"])
def test_a_tag_is_removed_from_every_file(run, remembered, folder, word):
    assert len(knows(folder, A, NAME, "ann's")) == 5
    code, out, err = run("forget", word, "--yes")
    assert (code, err) == (0, "")
    assert A[:7] in out and NAME in out and "with 2 events" in out
    assert out.endswith("forgot 1 tag\n")
    assert knows(folder, A, NAME, "ann's") == []
    assert not [name for name in contents(folder) if name.endswith(".new")]


def test_nobody_elses_row_cell_or_event_is_harmed(run, remembered):
    def others():
        with open("register.csv", encoding="utf-8", newline="") as file:
            kept = [line for line in file if A not in line]
        return kept, [e for e in mailtracker.read_log(EVENTS) if e.id != A]
    before = others()
    assert any("sum;5" in line for line in before[0]) and len(before[1]) == 2
    run("forget", A, "--yes")
    assert others() == before
    with open("register.csv.bak", encoding="utf-8", newline="") as file:
        backup = file.read()
    assert f"{B};2;" in backup and "sum;5;" in backup and backup.startswith("\ufeff")


def test_a_dry_run_shows_what_would_go_and_changes_nothing(run, remembered, folder):
    before = contents(folder)
    code, out, _ = run("forget", NAME, "--dry-run")
    assert code == 0 and NAME in out and "Bob" not in out
    assert "nothing was changed" in out and contents(folder) == before


def test_where_there_is_nobody_to_ask_it_refuses(tracker, remembered, folder):
    before = contents(folder)
    done = tracker("forget", NAME)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("mailtracker: error: ") and "--yes" in done.stderr
    assert contents(folder) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
@pytest.mark.parametrize("reply, code", [(b"y\n", 0), (b"n\n", 1), (b"\n", 1)],
                         ids=["yes", "no", "nothing"])
def test_a_person_is_asked_first(folder, remembered, reply, code):
    import pty
    ours, theirs = pty.openpty()
    os.write(ours, reply)
    done = subprocess.run([sys.executable, str(SCRIPT), "forget", NAME], cwd=folder,
                          stdin=theirs, stdout=subprocess.PIPE, timeout=60, check=False,
                          stderr=subprocess.PIPE, env=clean_environment())
    os.close(ours)
    os.close(theirs)
    assert done.returncode == code
    assert (knows(folder, A) == []) == (code == 0)


@pytest.mark.parametrize("words", [["nobody"], [NAME, "nobody"], [A[:6]], ["Ann*"],
                                   [""], ["dup"]],
                         ids=["unknown", "one of two", "too short", "a pattern",
                              "nothing", "dup"])
def test_a_word_that_means_no_tag_is_an_error_and_nothing_goes(
        run, remembered, folder, words):
    before = contents(folder)
    code, _, err = run("forget", *words, "--yes")
    assert code in (1, 2) and "error: " in err
    assert contents(folder) == before


def test_an_empty_word_does_not_mean_all_tags_without_a_name(run, folder):
    write(COLUMNS + row(A) + row(B, "Bob"))
    before = contents(folder)
    code, _, err = run("forget", "", "--yes")
    assert code in (1, 2) and "error: " in err
    assert contents(folder) == before


@pytest.mark.parametrize("options", [[], [A, "--older-than", "1d"]],
                         ids=["neither", "both"])
def test_it_must_be_said_which_tags(run, remembered, options):
    assert run("forget", *options)[0] == 2


def test_several_words_and_tags_of_one_name_go_together(run, folder):
    write(COLUMNS + row(A, "x") + row(B, "x") + row(C, "keep"))
    assert run("forget", "x", A, "--yes")[1].endswith("forgot 2 tags\n")
    assert list(register_rows("register.csv")) == [C]


def test_old_tags_go_by_their_age(run, remembered, folder):
    code, out, _ = run("forget", "--older-than", "2021-01-01", "--yes")
    assert code == 0 and out.endswith("forgot 1 tag\n")
    assert knows(folder, C) == [] and A in register_rows_of_any("register.csv")


def register_rows_of_any(path):
    return [found["id"] for found in mailtracker.register_rows(path)[1]]


def test_nothing_old_is_nothing_to_forget(run, remembered, folder):
    before = contents(folder)
    code, out, _ = run("forget", "--older-than", "2001-01-01", "--yes")
    assert (code, out) == (0, "nothing to forget\n") and contents(folder) == before


@pytest.mark.parametrize("created", ["20.11.2026 10:00", "11/20/2026", "yesterday", ""])
def test_a_time_that_cannot_be_read_is_not_taken_for_old(run, created):
    write(f"id,hits,last_hit,created,name\n{A},3,,{created},Ann\n")
    code, out, _ = run("forget", "--older-than", "365d", "--yes")
    assert (code, out) == (0, "nothing to forget\n")


def test_rows_marked_as_duplicates_go_with_their_tag(run, folder):
    write(COLUMNS + row(A, "Ann", 3) + row(A, "Ann", 4) + row(B, "Bob"))
    run("newtag", "--server", "h")  # makes it canonical
    assert f"dup {A}" in knows_text("register.csv")
    assert run("forget", A, "--yes")[0] == 0
    assert knows(folder, A, "Ann") == []


def knows_text(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def test_a_running_server_goes_on_and_answers_like_any_other(serve, newtags, tracker):
    ann, bob = newtags("register.csv", names=["Ann", "Bob"])
    server = serve("--compose-window", 0)

    def answer(tag):
        client = server.connect()
        client.sendall(f"GET /{tag}.gif HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        with client, client.makefile("rb") as file:
            return file.read()
    known = answer(ann), answer(bob)
    done = tracker("forget", "Ann", "--yes")
    assert done.returncode == 0, done.stderr
    assert answer(ann) == known[0] == known[1] == answer(bob) == answer(C)
    server.hit(bob)
    rows = register_rows("register.csv")
    assert list(rows) == [bob] and rows[bob]["hits"] == "0000000003"
    events = list(mailtracker.read_log(EVENTS))
    assert [e.id for e in events] == [bob] * 3
    assert server.get("/health")[0] == 200
    server.stop()
    serve().hit(ann)  # nor after a restart
    assert list(register_rows("register.csv")) == [bob]
    assert ann not in knows_text(EVENTS)


def test_without_a_log_or_backup_it_makes_none(run, folder):
    write(COLUMNS + row(A, "Ann") + row(B, "Bob"))
    assert run("forget", "Ann", "--yes")[0] == 0
    assert sorted(contents(folder)) == ["register.csv", "register.csv.twin"]


def test_a_register_that_is_not_there_is_one_clear_line_and_not_made(run, folder):
    code, out, err = run("forget", "Ann", "--yes")
    assert (code, out) == (1, "") and contents(folder) == {}
    assert err == "mailtracker: error: no such register: register.csv\n"


def test_only_a_stale_save_of_its_user_brings_a_forgotten_tag_back(
        run, remembered, folder):
    with open("register.csv", "rb") as file:
        stale = file.read()
    run("forget", A, "--yes")
    (folder / "saved").write_bytes(stale)
    os.replace("saved", "register.csv")
    assert run("newtag", "--server", "h", "--name", "next")[0] == 0
    rows = register_rows_of_any("register.csv")
    assert rows[:3] == [A, B, C] and len(rows) == 5  # and new, next
    assert [e.id for e in mailtracker.read_log(EVENTS)] == [B, B]


def test_the_mode_of_every_file_stays(run, remembered, folder):
    os.chmod("register.csv", 0o640)
    os.chmod("register.csv.bak", 0o600)
    before = {path.name: path.stat().st_mode for path in folder.iterdir()}
    run("forget", A, "--yes")
    after = {path.name: path.stat().st_mode for path in folder.iterdir()}
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed <= {"register.csv.twin"}


# -- what main promises -----------------------------------------------------------


COMMANDS = ["server", "newtag", "dump", "rejudge", "forget"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_that_parses(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    example = re.search(r"example: mailtracker\.py (.*)", " ".join(out.split()))[1]
    options = mailtracker.build_parser().parse_args(example.split())
    assert options.command == command


def test_the_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert set(re.findall(r"^    (\w+) ", out, re.M)) >= set(COMMANDS)


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"mailtracker {mailtracker.__version__}\n", "")


@pytest.mark.parametrize("args", [[], ["nosuch"], ["dump", "--nosuch"], ["-nosuch"],
                                  ["dump", "a", "b"], ["server", "--port", "70000"],
                                  ["dump", "--format"], ["server", "--tls-cert", "x"]],
                         ids=lambda args: " ".join(args) or "nothing")
def test_wrong_usage_exits_2_and_makes_nothing(run, folder, args):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("usage: ") and "error: " in err
    assert contents(folder) == {}


@pytest.mark.parametrize("args", [["dump"], ["rejudge"], ["forget", "x"],
                                  ["newtag", "--server", "h", "--names-from", "no"]],
                         ids=lambda args: args[0])
def test_what_goes_wrong_exits_1_with_one_line(tracker, folder, args):
    done = tracker(*args)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"mailtracker: error: [^\n]+\n", done.stderr)
    assert contents(folder) == {}


def test_a_name_from_the_command_line_is_never_raw_in_an_error(run):
    code, _, err = run("dump", "\x1b[2J\n.csv")
    assert code == 1 and err.count("\n") == 1 and "\x1b" not in err


def test_what_goes_well_exits_0_as_a_process_too(tracker):
    assert tracker("newtag", "--server", "h").returncode == 0
    done = tracker("dump", "--format", "csv")
    assert done.returncode == 0 and done.stderr == ""
    assert len(list(csv.DictReader(io.StringIO(done.stdout)))) == 1
