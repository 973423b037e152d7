"""The README says what the program does: commands, options, files, reasons."""
from __future__ import annotations

import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
from conftest import register_rows, rest

import mailtracker

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "register.csv.example"
PROGRAM = "mailtracker.py "


def parsers():
    """Return the parser of each command by its name."""
    return mailtracker.build_parser().get_default("commands")


def long_options():
    """Return each long option that the help of a command shows."""
    return sorted({option for parser in parsers().values()
                   for option in re.findall(r"--[\w-]+", parser.format_help())})


def code_blocks():
    """Return the language and the lines of each fenced code block of the README."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [(language, code.splitlines()) for language, code in blocks]


def arguments(line):
    """Return what a shell would give the program; [] for a line without it."""
    words = shlex.shlex(line.partition(PROGRAM)[2], posix=True, punctuation_chars=True)
    words.whitespace_split = True
    return list(takewhile(lambda word: not set(word) <= set("|&;<>()"), words))


def command_lines():
    """Return the command lines of the program in the README's code blocks."""
    lines = [line for language, code in code_blocks() for line in code
             if language in ("sh", "ini")
             or language == "console" and line.startswith("$ ")]
    return [line for line in lines if PROGRAM in line and arguments(line)
            and not line.startswith("install ")]


def test_every_command_and_every_long_option_is_told_of_and_no_other():
    for command in parsers():
        assert re.search(rf"^### {command}: ", README, re.M)
        assert any(arguments(line)[0] == command for line in command_lines())
    known = {"--version", "--help", *long_options()}
    others = re.compile(r"useradd |.*python3 tests/|systemctl |sqlite3 |mlr ")
    ours = "\n".join(line for line in README.splitlines() if not others.match(line))
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    assert told == known - {"--help"}


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_parses(line, capsys):
    mailtracker.parse(mailtracker.old_style(arguments(line)))
    assert capsys.readouterr().err == ""


def test_a_wrong_line_would_not_parse_and_there_are_enough_of_them(capsys):
    with pytest.raises(SystemExit):
        mailtracker.parse(arguments("$ python3 mailtracker.py dump --colour | head"))
    assert "--colour" in capsys.readouterr().err
    assert len(command_lines()) > 30
    old = [line for line in command_lines() if arguments(line)[0].startswith("-")]
    assert [arguments(line)[0] for line in old] == ["-server", "-newtag", "-dump"]


def test_every_reason_stands_in_the_readme_beside_a_verdict_that_it_can_have():
    rows = re.findall(r"^\| (human|proxy|machine|self|unknown) \|.*\| (.*) \|$",
                      README, re.M)
    listed = [reason for _, cell in rows for reason in re.findall(r"`([\w-]+)`", cell)]
    assert len(rows) == 5
    assert sorted([*listed, "repeat", "opened"]) == sorted(mailtracker.REASONS)


def test_every_column_of_register_and_log_is_explained():
    columns = EXAMPLE.read_text(encoding="utf-8").splitlines()[0].split(",")[:-1]
    for column in [*columns, *mailtracker.EVENT_COLUMNS, "sent"]:
        assert f"| `{column}` | " in README


def test_the_test_command_is_the_one_that_ci_runs():
    block, = [code for _, code in code_blocks() if code[0].endswith("/pytest")]
    ours = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert len(block) == 1 and ours.count(block[0]) == 1


def test_every_file_and_heading_that_the_readme_leads_to_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    named = re.findall(r"\btests/[\w.]+", README)
    assert {"LICENSE", "mailtracker.py", "register.csv.example"} <= set(links)
    assert [name for name in links + named if not (ROOT / name).is_file()] == []
    headings = re.findall(r"^#+ (.+)$", README, re.M)  # anchors as GitHub makes them
    anchors = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-")
               for each in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
    assert len(README.splitlines()) <= 900
    assert README.splitlines().index("## Quick start") < 15


def test_the_rows_shown_in_the_readme_are_those_of_the_example():
    rows = register_rows(EXAMPLE)
    shown = re.findall(r"^\| `([a-z0-9]{21})` \| (.*) \|$", README, re.M)
    assert len(shown) == 2
    for tag, cells in shown:
        wanted = [cell.strip() for cell in list(rows[tag].values())[1:]]
        assert [cell.strip() for cell in cells.split("|")] == wanted


def test_the_example_register_is_in_the_programs_own_form(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "register.csv").write_bytes(EXAMPLE.read_bytes())
    assert run("dump", "--format", "csv") == (0, EXAMPLE.read_text("utf-8"), "")
    assert run("newtag", "--server", "h", "--name", "new")[0] == 0
    rest("register.csv")
    assert run("settle") == (0, "", "")
    rows = register_rows("register.csv")
    new = rows.popitem()[1]
    assert rows == register_rows(EXAMPLE)
    assert [*new] == [*mailtracker.OWN_COLUMNS, "note"] and new["name"] == "new"
    assert not (tmp_path / "register.csv.orig").exists()
