"""The README says what the program does: commands, options, files, reasons."""
from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from conftest import register_rows

import mailtracker

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "register.csv.example"
PROGRAM = "mailtracker.py "


def parsers():
    """Return the parser of each command by its name."""
    parser = mailtracker.build_parser()
    actions = [action for action in parser._actions
               if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices


def long_options():
    """Return each long option of each command."""
    return sorted({option for parser in parsers().values()
                   for action in parser._actions for option in action.option_strings
                   if option.startswith("--")})


def code_blocks(text):
    """Return the language and the lines of each fenced code block."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [(language, code.replace("\\\n", "").splitlines())
            for language, code in blocks]


def arguments(line):
    """Return what a shell would give the program; [] for a line without it."""
    words = shlex.shlex(line.partition(PROGRAM)[2], posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found = []
    for word in words:
        if set(word) <= set("|&;<>()"):
            break
        found.append(word)
    return found


def command_lines():
    """Return the command lines of the program in the README's code blocks."""
    lines = [line for language, code in code_blocks(README) for line in code
             if language in ("sh", "ini")
             or language == "console" and line.startswith("$ ")]
    return [line for line in lines if PROGRAM in line and arguments(line)
            and not line.startswith("install ")]


def headings():
    """Return the README's headings as GitHub makes anchors of them."""
    found = re.findall(r"^#+ (.+)$", README, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in found}


@pytest.mark.parametrize("command", sorted(parsers()))
def test_every_command_of_the_help_has_its_own_heading(command):
    assert re.search(rf"^### {command}: ", README, re.M)
    assert any(arguments(line)[0] == command for line in command_lines())


@pytest.mark.parametrize("option", long_options())
def test_every_long_option_is_mentioned(option):
    if option != "--help":
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", README)


def test_no_option_is_mentioned_that_no_program_has():
    known = {*long_options(), "--version", "--help"}
    others = re.compile(r"useradd |python3 tests/|.*systemctl enable --now ")
    ours = "\n".join(line for line in README.splitlines() if not others.match(line))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= known


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_parses(line, capsys):
    words = arguments(line)
    parser = mailtracker.build_parser()
    if "--help" in words:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(words)
        assert ended.value.code == 0
    else:
        options = parser.parse_args(mailtracker.old_style(words))
        mailtracker.check_options(parser, options)
    assert capsys.readouterr().err == ""


def test_a_command_line_that_is_wrong_would_not_parse(capsys):
    with pytest.raises(SystemExit):
        mailtracker.build_parser().parse_args(
            arguments("$ python3 mailtracker.py dump --colour | head"))
    assert "--colour" in capsys.readouterr().err


def test_the_shell_around_a_command_line_is_left_out():
    line = "cd x && sudo python3 /opt/mailtracker.py newtag --name 'a > b' > c.html"
    assert arguments(line) == ["newtag", "--name", "a > b"]


def test_the_readme_shows_enough_command_lines_to_be_worth_testing():
    assert len(command_lines()) > 40
    old = [line for line in command_lines() if arguments(line)[0].startswith("-")]
    assert [arguments(line)[0] for line in old] == ["-server", "-newtag", "-dump"]


@pytest.mark.parametrize("reason", sorted(mailtracker.REASONS))
def test_every_reason_stands_in_the_readme_with_its_words(reason):
    assert f"| `{reason}` | {mailtracker.REASONS[reason]} |" in README


def test_every_column_of_register_and_log_is_explained():
    columns = EXAMPLE.read_text(encoding="utf-8").splitlines()[0].split(",")[:-1]
    for column in [*columns, *mailtracker.EVENT_COLUMNS, "sent"]:
        assert f"| `{column}` | " in README


def test_the_test_command_is_the_one_that_ci_runs():
    block, = [code for _, code in code_blocks(README) if code[0].endswith("/pytest")]
    ours = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert len(block) == 1 and ours.count(block[0]) == 1


def test_every_file_that_the_readme_names_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    named = re.findall(r"\btests/[\w.]+", README)
    assert {"LICENSE", "mailtracker.py", "register.csv.example"} <= set(links)
    assert "tests/bench.py" in named
    assert [name for name in links + named if not (ROOT / name).is_file()] == []


def test_every_link_within_the_readme_leads_to_a_heading():
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings()


def test_the_rows_shown_in_the_readme_are_those_of_the_example():
    rows = register_rows(EXAMPLE)
    shown = re.findall(r"^\| `([a-z0-9]{21})` \| (.*) \|$", README, re.M)
    assert len(shown) == 2
    for tag, cells in shown:
        wanted = [cell.strip() for cell in list(rows[tag].values())[1:]]
        assert [cell.strip() for cell in cells.split("|")] == wanted


@pytest.fixture
def example(tmp_path):
    """Return the path of a copy of the example register."""
    register = tmp_path / "register.csv"
    register.write_bytes(EXAMPLE.read_bytes())
    return register


def test_the_example_register_is_in_the_programs_own_form(example):
    register = mailtracker.Register(str(example), pytest.fail)
    register.open()
    with register:
        found = {tag: register.find(tag.encode()) for tag in register_rows(EXAMPLE)}
        assert len(found) == 5 and all(found.values())
        names = [register.name_of(place) for place in found.values()]
    assert "john" in names and '=HYPERLINK("http://example.org")' in names
    assert example.read_bytes() == EXAMPLE.read_bytes()
    assert not example.with_name("register.csv.bak").exists()


def test_the_example_register_has_the_columns_of_a_new_one(newtags, tmp_path):
    newtags("new.csv")
    new, = register_rows(tmp_path / "new.csv").values()
    *own, note = next(iter(register_rows(EXAMPLE).values()))
    assert (own, note) == (list(new), "note")


def test_the_example_register_goes_on_counting(example, serve, newtags, tracker):
    first = next(iter(register_rows(example)))
    server = serve("--compose-window", 0)
    server.get(f"/{first}.gif")
    newtags("register.csv")
    rows = register_rows(example)
    assert int(rows[first]["hits"]) == int(register_rows(EXAMPLE)[first]["hits"]) + 1
    assert len(rows) == 6 and rows[first]["note"] == "wrote back"
    assert "6 tags" in tracker("dump").stdout
    assert not example.with_name("register.csv.bak").exists()
