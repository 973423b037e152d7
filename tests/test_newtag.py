"""newtag: what it prints, what it writes, and what it refuses."""
from __future__ import annotations

import csv
import io
import json
import os
import re

import pytest

from conftest import register_rows, rest
from test_dump import folder, write

__all__ = ["folder"]  # the fixture is for all tests here
ID = "[bcdfghjkmnpqrstvwxz][bcdfghjkmnpqrstvwxz2-9]{20}"
OLD = "0123456789abcdef0123456789abcdef0123456%d"  # ids of the tracker of 2018


@pytest.fixture
def newtag(run):
    """Make tags in process, for the server t.example.org; return what is printed."""
    def make(*args):
        code, out, err = run("newtag", "--server", "t.example.org", *args)
        assert (code, err) == (0, "")
        return out
    return make


def only_row(path="register.csv"):
    row, = register_rows(path).values()
    return row


# -- what is printed --------------------------------------------------------------


def test_only_the_tag_is_on_stdout(newtag):
    out = newtag("--name", "john")
    tag = only_row()["id"]
    assert out == (f'<img src="http://t.example.org:56789/{tag}.gif" width="1" '
                   'height="1" alt="" style="border:0">\n')
    assert re.fullmatch(ID, tag)


def test_without_a_server_a_note_says_that_the_tag_works_here_only(run):
    code, out, err = run("newtag")
    assert code == 0
    assert "//localhost:56789/" in out and out.count("\n") == 1
    assert err.startswith("mailtracker: note: ") and err.count("\n") == 1
    assert "only on this machine" in err and "--server" in err


@pytest.mark.parametrize("server", ["ftp://example.org", 'x"onload="y', "\x1b[31m"])
def test_what_is_no_server_is_one_clear_line_and_makes_nothing(run, folder, server):
    code, out, err = run("newtag", "--server", server)
    assert (code, out, os.listdir(folder)) == (1, "", [])
    assert re.fullmatch("mailtracker: error: not a host or URL: [ -~]+\n", err)


def test_the_variable_for_the_server_is_the_default_only(run, monkeypatch):
    monkeypatch.setenv("MAILTRACKER_SERVER", "https://env.example.org")
    for more, start in (([], "https://env.example.org/"),
                        (["--port", 8443], "https://env.example.org:8443/"),
                        (["--server", "h"], "http://h:56789/")):
        code, out, err = run("newtag", "--format", "url", *more)
        assert (code, err) == (0, "") and out.startswith(start)


def test_the_register_is_the_one_named_else_that_of_the_variable(newtag, monkeypatch):
    monkeypatch.setenv("MAILTRACKER_REGISTER", "other.csv")
    for option in ("--register", "--csvfile"):
        newtag(option, f"mine{option}.csv")
        assert only_row(f"mine{option}.csv") and not os.path.exists("other.csv")
    newtag()
    assert only_row("other.csv")


def test_count_makes_so_many_tags_each_on_its_line(newtag):
    lines = newtag("--count", 25, "--name", "flyer", "--format", "url").splitlines()
    rows = register_rows("register.csv")
    assert len(lines) == len(set(lines)) == 25
    assert [re.search(rf"({ID})\.gif$", line)[1] for line in lines] == list(rows)
    assert {row["name"] for row in rows.values()} == {"flyer"}


# -- names ------------------------------------------------------------------------


SAFE = ["=1+1", '=HYPERLINK("http://x")', "-5", "＝1+1", "''=x", 'a,"b";c|d e',
        "\u202egnp.exe", "a\xa0b\u3000c", OLD % 1, "  x  ", "👩‍👩‍👧 ok", "id",
        "x" * 5000]
CUT = {"one\ntwo\r\nthree": "one two three", "a\rb": "a b", "\t=1": " =1",
       "\x1b[2J\x07": " [2J ", "a\u2028b\x0bc\x85d": "a b c d", "a\0b": "a b",
       "Jos\udce9": "Jos\ufffd"}


def test_a_hostile_name_harms_no_row_and_comes_back(newtag, run):
    kept = {**dict(zip(SAFE, SAFE)), **CUT}
    for name in kept:
        newtag(f"--name={name}")
    written = [row["name"] for row in register_rows("register.csv").values()]
    assert len(written) == len(kept)
    assert not [name for name in written if name.startswith(("=", "-", "＝", "\t"))]
    for more, column in (([], "name"), (["--log"], "detail")):
        names = [row[column] for row in
                 json.loads(run("dump", "--format", "json", *more)[1])]
        if more:  # the log has no control characters
            names = [name.replace("\\u202e", "\u202e") for name in names]
        assert names == list(kept.values())


# -- names from a file ------------------------------------------------------------


def table(text, delimiter=","):
    return list(csv.reader(io.StringIO(text), delimiter=delimiter))


@pytest.mark.parametrize("text, names", [
    ("email,name\na@b.c,Ann\nd@e.f,Bob\n", ["Ann", "Bob"]),
    ("no,Email\n1,a@b.c\n2,d@e.f\n", ["a@b.c", "d@e.f"]),
    ("who,what\nx,y\nz,w\n", ["x", "z"]), ("x, NAME \n1,Ann\n", ["Ann"]),
    ("email;name\na@b.c;Ann, Ms\n", ["Ann, Ms"]), ("name\n李小龙\n", ["李小龙"]),
    ("email\tname\na@b.c\tAnn\n", ["Ann"]), ("email|name\na@b.c|Ann\n", ["Ann"]),
    ("\ufeffname,x\r\nAnn,1\r\nBob,2\r\n", ["Ann", "Bob"]),
    ('name,x\n"Ann\nLee",1\n"B ""b""",2\n', ["Ann Lee", 'B "b"']),
    ('"full\nname",name\nx,Ann\n', ["Ann"]), ("name,x\n", []),
    ("name\nAnn\n\nBob\n\n", ["Ann", "Bob"]), ("name\nAnn", ["Ann"])], ids=ascii)
def test_each_row_of_a_csv_gets_a_tag_in_its_order(newtag, text, names):
    write(text, "names.csv")
    out = newtag("--names-from", "names.csv", "--format", "url")
    delimiter = next((d for d in ";\t|" if d in text), ",")
    printed, given = table(out, delimiter), table(text.lstrip("\ufeff"), delimiter)
    assert [row[:-2] for row in printed] == [row for row in given if row]
    assert printed[0][-2:] == ["id", "tag"]
    rows = register_rows("register.csv") if names else {}
    assert [row[-2] for row in printed[1:]] == list(rows)
    assert [row["name"] for row in rows.values()] == names
    for row in printed[1:]:
        assert row[-1] == f"http://t.example.org:56789/{row[-2]}.gif"


@pytest.mark.parametrize("data, wrong", [
    (b"name,x\nAnn,1\nBob\n", ", line 3: 1 cell under 2"),
    (b"name,x\nAnn,1,2\n", ", line 2: 3 cells under 2"),
    (b"name,x\nAnn,1\n ,2\n", ", line 3: no name"),
    (b'name,x\n"A\nB",1\n,2\n', ", line 4: no name"),
    (b'name\nAnn\n"Bob\n', ", line 3"), (b'name,x\nAnn,1\n"B"b,2\nC,3\n', ", line 3"),
    (b"name\nA\0nn\n", ", line 2: not text"),
    (b"name,id\nAnn,1\n", " has a column id already"),
    (b"tag,name\nx,Ann\n", " has a column tag already"), (b"", " has no header row")])
def test_a_bad_row_is_named_by_its_line_and_no_tag_is_made(run, folder, data, wrong):
    write(data, "names.csv")
    code, out, err = run("newtag", "--server", "x", "--names-from", "names.csv")
    assert (code, out) == (1, "")
    assert err.startswith("mailtracker: error: ") and err.count("\n") == 1
    assert f"names.csv{wrong}" in err
    assert os.listdir(folder) == ["names.csv"]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_a_file_in_another_charset_is_read_and_printed_in_utf_8(tracker, encoding):
    write("name;x\r\nJosé;1\r\n".encode(encoding), "names.csv")
    done = tracker("newtag", "--server", "h", "--names-from", "names.csv", "--format",
                   "url", env={"PYTHONIOENCODING": "ascii"})
    tag = only_row()["id"]
    assert (only_row()["name"], done.returncode, done.stderr) == ("José", 0, "")
    assert done.stdout.splitlines() == [
        "name;x;id;tag", f"José;1;{tag};http://h:56789/{tag}.gif"]


def test_a_file_of_names_that_is_none_is_one_clear_line(run):
    for _ in range(2):
        code, out, err = run("newtag", "--server", "x", "--names-from", "names.csv")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("mailtracker: error: names.csv: ")
        os.makedirs("names.csv", exist_ok=True)


def test_names_may_come_from_standard_input(tracker):
    done = tracker("newtag", "--names-from", "-", "--server", "h", "--format", "url",
                   input="name,n\nÄnn,1\nBob,2\n")
    ann, bob = register_rows("register.csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("name,n,id,tag\n" f"Änn,1,{ann},http://h:56789/{ann}.gif\n"
                           f"Bob,2,{bob},http://h:56789/{bob}.gif\n")


# -- the register -----------------------------------------------------------------


@pytest.mark.parametrize("template, path", [
    ("{id}.gif", "/ID.gif"), ("/img/{id}/logo.gif", "/img/ID/logo.gif"),
    ("/a b/{id}?x={id}&y", "/a%20b/ID?x=ID&y")])
def test_a_tag_counts_on_its_first_hit_in_a_running_server(
        serve, newtag, run, template, path):
    server = serve()
    url = newtag("--path", template, "--format", "url").strip()
    path = path.replace("ID", only_row()["id"])
    assert url == f"http://t.example.org:56789{path}"
    status, _, body = server.get(path)
    assert status == 200 and body.startswith(b"GIF89a")
    assert json.loads(run("dump", "--format", "json")[1])[0]["hits"] == 1


def test_a_register_that_is_none_is_one_clear_line_and_stays(run):
    write("a letter\nto John\n", "register.csv")
    code, out, err = run("newtag", "--server", "h")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert open_text("register.csv") == "a letter\nto John\n"
    code, out, err = run("newtag", "--server", "h", "--register", "no/register.csv")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(r"\bno(/register\.csv)?(:|$)", err, re.M)


def open_text(path):
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def test_armed_adds_a_column_to_an_old_register_and_harms_no_cell(newtag, run):
    newtag("--name", "old")
    text = open_text("register.csv").replace("name\n", "name,note\n")
    write(text.replace("old\n", "old,my note\n"), "register.csv")
    newtag("--armed", "--name", "new")
    newtag("--name", "third")  # not armed: it has the column, and nothing in it
    old, new, third = json.loads(run("dump", "--format", "json")[1])
    assert (old["name"], old["note"], old["sent"]) == ("old", "my note", None)
    assert new["sent"] == new["created"] and new["name"] == "new"
    assert (third["name"], third["sent"]) == ("third", None)
    assert open_text("register.csv").startswith(text.replace("old\n", "old,my note\n"))


# -- the tracker of 2018 ----------------------------------------------------------


def test_its_newtag_runs_word_for_word(run):
    code, out, err = run(*"-newtag -name john -server customcrypto.com -port 56789 "
                         "-csvfile register.csv".split())
    assert (code, err) == (0, "")
    row = only_row()
    assert row["name"] == "john"
    assert f'src="http://customcrypto.com:56789/{row["id"]}.gif"' in out


def test_its_register_is_taken_over_with_its_counts(run, newtag):
    old = ("ID,name,clicks,lastclick\r\n"
           f"{OLD % 1},john,3,2018-05-01 10:00:00\r\n"
           f'{OLD % 2},"Doe, Jane",0,\r\n{OLD % 3},,12,2018-06-01 11:12:13\r\n')
    write(old, "register.csv")
    expected = [[OLD % 1, "john", 3, "2018-05-01T10:00:00Z"],
                [OLD % 2, "Doe, Jane", 0, None],
                [OLD % 3, "", 12, "2018-06-01T11:12:13Z"]]

    def shown():
        return [[row[key] for key in ("id", "name", "hits", "last_hit")]
                for row in json.loads(run("dump", "--format", "json")[1])]
    assert shown() == expected
    assert open_text("register.csv") == old  # dump only reads
    newtag("--name", "new")
    rest("register.csv")
    assert run("settle") == (0, "", "")
    assert shown()[:3] == expected and len(shown()) == 4
    assert ",12,2018-06-01T11:12:13Z" in open_text("register.csv")
    assert open_text("register.csv.orig").startswith(old)


# -- the clipboard ----------------------------------------------------------------


@pytest.mark.parametrize("form, code, wanted, said", [
    ("html", 0, "-selection clipboard -t text/html\n", "note: copied as HTML"),
    ("url", 0, "-selection clipboard\n", "note: copied as plain text"),
    ("html", 3, "-selection clipboard -t text/html\n",
     "error: xclip could not copy the tag; take it from the screen")])
def test_a_tag_is_copied_in_the_flavour_of_its_form(
        run, folder, monkeypatch, form, code, wanted, said):
    tool = folder / "xclip"
    tool.write_text(f"#!/bin/sh\necho $* > how\ncat > copied\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    done = run("newtag", "--server", "h", "--format", form, "--copy")
    assert done == (bool(code), open_text("copied") + "\n", f"mailtracker: {said}\n")
    assert open_text("how") == wanted and only_row()["id"] in open_text("copied")


def test_without_a_clipboard_the_tag_is_printed_and_one_line_says_so(
        run, monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder))
    code, out, err = run("newtag", "--server", "h", "--copy")
    assert code == 1 and only_row()["id"] in out
    assert re.fullmatch("mailtracker: error: no clipboard here.* xclip.*\n", err)
