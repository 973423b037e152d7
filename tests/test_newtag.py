"""newtag: what it prints, what it writes, and what it refuses."""
from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest

import mailtracker
from conftest import SCRIPT
from conftest import clean_environment
from conftest import eventually
from conftest import register_rows

ID = "[bcdfghjkmnpqrstvwxz][bcdfghjkmnpqrstvwxz2-9]{20}"
NEVER = " " * 20
OLD = "0123456789abcdef0123456789abcdef0123456%d"  # ids of the tracker of 2018


def cases(table):
    """Return a parametrize table and its ids, from a dict by id."""
    return {"argvalues": list(table.values()), "ids": list(table)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder of the test's own, without variables that change defaults."""
    monkeypatch.chdir(tmp_path)
    for name in ("REGISTER", "SERVER"):
        monkeypatch.delenv(f"MAILTRACKER_{name}", raising=False)
    return tmp_path


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


class Elements(HTMLParser):
    """What an HTML parser finds in a text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


# -- what is printed --------------------------------------------------------------


def test_only_the_tag_is_on_stdout(newtag):
    out = newtag("--name", "john")
    tag = only_row()["id"]
    assert out == (f'<img src="http://t.example.org:56789/{tag}.gif" width="1" '
                   'height="1" alt="" style="border:0">\n')
    assert re.fullmatch(ID, tag)


def test_a_new_row_has_a_name_a_time_and_no_hits(newtag):
    newtag("--name", "john")
    row = only_row()
    made = row.pop("created")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made)
    assert row.pop("id")
    assert row == {"hits": "0000000000", "last_hit": NEVER, "opens": "0000000000",
                   "last_open": NEVER, "name": "john"}


def test_without_a_server_a_note_says_that_the_tag_works_here_only(run):
    code, out, err = run("newtag")
    assert code == 0
    assert "//localhost:56789/" in out and out.count("\n") == 1
    assert err.startswith("mailtracker: note: ") and err.count("\n") == 1
    assert "only on this machine" in err and "--server" in err


@pytest.mark.parametrize("server, port, url", **cases({
    "host": ("customcrypto.com", None, "http://customcrypto.com:56789"),
    "host, port asked for": ("customcrypto.com", 80, "http://customcrypto.com:80"),
    "host with a port": ("example.org:8080", None, "http://example.org:8080"),
    "https": ("https://t.example.org", None, "https://t.example.org"),
    "https, port": ("https://t.example.org", 8443, "https://t.example.org:8443"),
    "http URL": ("http://t.example.org", None, "http://t.example.org"),
    "URL with a path": ("https://example.org/t/", None, "https://example.org/t"),
    "IPv4": ("192.0.2.1", None, "http://192.0.2.1:56789"),
    "IPv6": ("[2001:db8::1]", None, "http://[2001:db8::1]:56789"),
}))
def test_the_server_may_be_a_host_or_a_url(run, server, port, url):
    more = ["--port", port] if port else []
    code, out, err = run("newtag", "--server", server, "--format", "url", *more)
    assert (code, err) == (0, "")
    assert out == f"{url}/{only_row()['id']}.gif\n"


@pytest.mark.parametrize("server", [
    "ftp://example.org", "two words", "https://",
    "https://user@example.org",
    "a/../b c", "example.org:port", "http://example.org/?q=1", 'x"onload="y',
    "\x1b[31m"])
def test_what_is_no_server_is_one_clear_line_and_makes_nothing(run, folder, server):
    code, out, err = run("newtag", "--server", server)
    if code:
        assert code == 1 and out == "" and os.listdir(folder) == []
        assert re.fullmatch("mailtracker: error: not a host or URL: [ -~]+\n", err)
    else:  # then it is quoted
        assert " " not in Elements(out).found[0][1]["src"]


def test_the_variable_for_the_server_is_the_default_only(run, monkeypatch):
    monkeypatch.setenv("MAILTRACKER_SERVER", "https://env.example.org")
    code, out, err = run("newtag", "--format", "url")
    assert (code, err) == (0, "") and out.startswith("https://env.example.org/")
    _, out, _ = run("newtag", "--format", "url", "--server", "said.example.org")
    assert out.startswith("http://said.example.org:56789/")


@pytest.mark.parametrize("option", ["--register", "--csvfile"])
def test_the_register_may_be_named_in_two_ways(newtag, option, monkeypatch):
    monkeypatch.setenv("MAILTRACKER_REGISTER", "other.csv")
    newtag(option, "mine.csv")
    assert only_row("mine.csv") and not os.path.exists("other.csv")


def test_the_variable_for_the_register_is_the_default(newtag, run, monkeypatch):
    monkeypatch.setenv("MAILTRACKER_REGISTER", "other.csv")
    newtag("--name", "john")
    assert only_row("other.csv")["name"] == "john"
    assert not os.path.exists("register.csv")
    assert run("dump", "--format", "csv")[1].count("john") == 1


@pytest.mark.parametrize("template, path", **cases({
    "a folder": ("/img/{id}/logo.gif", "/img/ID/logo.gif"),
    "no slash": ("{id}.png", "/ID.png"),
    "a query": ("/{id}?size=1&x=2", "/ID?size=1&x=2"),
    "blanks": ("/a b/{id}.gif", "/a%20b/ID.gif"),
}))
def test_a_path_chooses_where_the_pixel_lies(newtag, template, path):
    out = newtag("--path", template, "--format", "url")
    tag = only_row()["id"]
    assert out == f"http://t.example.org:56789{path.replace('ID', tag)}\n"
    parts = urlsplit(out.strip())
    assert mailtracker.ids_in_path(parts.path.encode())[0] == tag.encode()


@pytest.mark.parametrize("template", [
    "/logo.gif", "/x{id}", "/?{id}", "/{id}x.gif", ""])
def test_a_path_without_the_id_is_a_usage_error(run, folder, template):
    code, out, err = run("newtag", "--path", template)
    assert (code, out) == (2, "") and "{id}" in err
    assert os.listdir(folder) == []


@pytest.mark.parametrize("form, pattern", **cases({
    "html": ("html", rf'<img src="(http\S+/{ID}\.gif)" width="1" height="1" alt="" '
             'style="border:0">\n'),
    "url": ("url", rf"(http\S+/{ID}\.gif)\n"),
    "markdown": ("markdown", rf"!\[\]\((http\S+/{ID}\.gif)\)\n"),
}))
def test_a_tag_has_three_forms(newtag, form, pattern):
    assert re.fullmatch(pattern, newtag("--format", form))


def test_html_is_escaped_and_never_hidden(newtag):
    out = newtag("--path", "/{id}.gif?a=1&b='\"<x>")
    (name, attributes), = Elements(out).found
    assert name == "img" and Elements(out).texts == ["\n"]
    assert attributes["src"].endswith("?a=1&b='%22%3Cx%3E")
    assert "display" not in out and "hidden" not in out


def test_count_makes_so_many_tags_each_on_its_line(newtag):
    lines = newtag("--count", 25, "--name", "flyer", "--format", "url").splitlines()
    rows = register_rows("register.csv")
    assert len(lines) == len(set(lines)) == 25
    assert [re.search(rf"({ID})\.gif$", line)[1] for line in lines] == list(rows)
    assert {row["name"] for row in rows.values()} == {"flyer"}


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "many", "1000001", "٣"])
def test_a_count_that_is_none_is_a_usage_error(run, folder, count):
    code, out, _ = run("newtag", "--count", count)
    assert (code, out, os.listdir(folder)) == (2, "", [])


def test_ids_of_many_calls_are_all_different_and_of_one_form(newtag):
    for _ in range(20):
        newtag("--count", 50)
    rows = register_rows("register.csv")
    assert len(rows) == 1000  # by id: two alike would be one
    assert all(re.fullmatch(ID, tag) for tag in rows)
    assert len({tag[:7] for tag in rows}) > 990


# -- names ------------------------------------------------------------------------


HOSTILE = {
    "formula": "=1+1", "hyperlink": '=HYPERLINK("http://x")', "minus": "-5",
    "full-width": "＝1+1", "quotes": "''=x", "commas": 'a,"b";c|d\te',
    "lines": "one\ntwo\r\nthree", "escape": "\x1b[2J\x07", "bidi": "\u202egnp.exe",
    "id-like": OLD % 1, "spaces": "  x  ", "emoji": "👩‍👩‍👧 ok", "header": "id",
    "long": "x" * 5000, "surrogate": "Jos\udce9",
}


@pytest.mark.parametrize("name", **cases(HOSTILE))
def test_a_hostile_name_harms_no_row_and_comes_back(newtag, run, name):
    newtag("--name", "before")
    newtag(f"--name={name}")
    newtag("--name", "after")
    rows = list(register_rows("register.csv").values())
    assert [rows[0]["name"], rows[2]["name"]] == ["before", "after"]
    assert len(rows) == 3 and not rows[1]["name"].startswith(("=", "-", "＝", "\t"))
    shown = json.loads(run("dump", "--format", "json")[1])
    plain = name.replace("\udce9", "\ufffd")
    assert [row["name"] for row in shown] == ["before", plain, "after"]


def test_an_argument_that_is_not_utf_8_makes_a_readable_register(tracker):
    done = tracker("newtag", "--name", b"Jos\xe9".decode("utf-8", "surrogateescape"))
    assert done.returncode == 0
    assert only_row()["name"] in ("Jos\ufffd", "José")


# -- names from a file ------------------------------------------------------------


def write(data, path="names.csv"):
    with open(path, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())


def table(text, delimiter=","):
    return list(csv.reader(io.StringIO(text), delimiter=delimiter))


@pytest.mark.parametrize("text, names", **cases({
    "name": ("email,name\na@b.c,Ann\nd@e.f,Bob\n", ["Ann", "Bob"]),
    "else email": ("no,Email\n1,a@b.c\n2,d@e.f\n", ["a@b.c", "d@e.f"]),
    "else the first": ("who,what\nx,y\nz,w\n", ["x", "z"]),
    "any case": ("x, NAME \n1,Ann\n", ["Ann"]),
    "semicolons": ("email;name\na@b.c;Ann, Ms\n", ["Ann, Ms"]),
    "tabs": ("email\tname\na@b.c\tAnn\n", ["Ann"]),
    "bars": ("email|name\na@b.c|Ann\n", ["Ann"]),
    "BOM and CRLF": ("\ufeffname,x\r\nAnn,1\r\nBob,2\r\n", ["Ann", "Bob"]),
    "quoted lines": ('name,x\n"Ann\nLee",1\n"B ""b""",2\n', ["Ann\nLee", 'B "b"']),
    "empty lines": ("name\nAnn\n\nBob\n\n", ["Ann", "Bob"]),
    "no line end": ("name\nAnn", ["Ann"]),
    "header only": ("name,x\n", []),
    "East Asian": ("name\n李小龙\n", ["李小龙"]),
}))
def test_each_row_of_a_csv_gets_a_tag_in_its_order(newtag, text, names):
    write(text)
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


def test_the_tag_of_a_row_is_whole_html(newtag):
    write("name\nAnn\n")
    out = newtag("--names-from", "names.csv")
    assert table(out)[1][2] == mailtracker.tag_text(
        "http://t.example.org:56789", "/{id}.gif", only_row()["id"])


@pytest.mark.parametrize("data, wrong", **cases({
    "too few cells": (b"name,x\nAnn,1\nBob\n", "names.csv, line 3: 1 cells under 2"),
    "too many cells": (b"name,x\nAnn,1,2\n", "names.csv, line 2: 3 cells under 2"),
    "no name": (b"name,x\nAnn,1\n ,2\n", "names.csv, line 3: no name"),
    "behind a quoted line": (b'name,x\n"A\nB",1\n,2\n', "names.csv, line 4: no name"),
    "unclosed quote": (b'name\nAnn\n"Bob\n', "names.csv, line 3"),
    "text behind a quote": (b'name,x\nAnn,1\n"B"b,2\nC,3\n', "names.csv, line 3"),
    "latin-1": (b"name\nAnn\nJos\xe9\nBob\n", "names.csv, line 3"),
    "an id column": (b"name,id\nAnn,1\n", "names.csv has a column id already"),
    "a tag column": (b"tag,name\nx,Ann\n", "names.csv has a column tag already"),
    "empty": (b"", "names.csv has no header row"),
}))
def test_a_bad_row_is_named_by_its_line_and_no_tag_is_made(run, folder, data, wrong):
    write(data)
    code, out, err = run("newtag", "--server", "x", "--names-from", "names.csv")
    assert (code, out) == (1, "")
    assert err.startswith("mailtracker: error: ") and err.count("\n") == 1
    assert wrong in err
    assert os.listdir(folder) == ["names.csv"]


@pytest.mark.parametrize("data", [b"name\nA\0nn\n", b"name\n\xff\xfeA\0\n"],
                         ids=["NUL", "UTF-16"])
def test_what_is_no_text_is_one_clear_line(run, folder, data):
    write(data)
    code, out, err = run("newtag", "--server", "x", "--names-from", "names.csv")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("mailtracker: error: names.csv")
    assert os.listdir(folder) == ["names.csv"]


@pytest.mark.parametrize("make", [lambda path: None, os.mkdir], ids=["none", "folder"])
def test_a_file_of_names_that_is_none_is_one_clear_line(run, make):
    make("names.csv")
    code, out, err = run("newtag", "--server", "x", "--names-from", "names.csv")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("mailtracker: error: names.csv: ")


@pytest.mark.parametrize("more", [["--name", "x"], ["--count", "2"]], ids=" ".join)
def test_names_from_a_file_go_without_a_name_or_count(run, more):
    write("name\nAnn\n")
    assert run("newtag", "--names-from", "names.csv", *more)[0] == 2


def test_names_may_come_from_standard_input(tracker):
    done = tracker("newtag", "--names-from", "-", "--server", "h", "--format", "url",
                   input="name,n\nÄnn,1\nBob,2\n")
    assert (done.returncode, done.stderr) == (0, "")
    rows = register_rows("register.csv")
    assert table(done.stdout) == [["name", "n", "id", "tag"], *(
        [name, n, tag, f"http://h:56789/{tag}.gif"]
        for (name, n), tag in zip([("Änn", "1"), ("Bob", "2")], rows))]


def test_20_000_names_make_20_000_tags(newtag):
    write("name,email\n" + "".join(f"n{i},{i}@x.org\n" for i in range(20_000)))
    printed = table(newtag("--names-from", "names.csv", "--format", "url"))
    rows = register_rows("register.csv")
    assert len(printed) == 20_001 and len(rows) == 20_000
    assert [row[0] for row in printed[1:]] == [row["name"] for row in rows.values()]
    assert [row[2] for row in printed[1:]] == list(rows)


# -- the register -----------------------------------------------------------------


def test_a_tag_is_on_the_disk_before_it_is_printed(folder):
    here, there = os.pipe()
    command = [sys.executable, str(SCRIPT), "newtag", "--server", "h", "--count", "3",
               "--format", "url"]
    with subprocess.Popen(command, stdout=there, cwd=folder,
                          env=clean_environment()) as process:
        os.close(there)
        with open(here, encoding="utf-8") as out:
            first = out.readline()
            rows = register_rows("register.csv")
            assert re.search(ID, first)[0] in rows and len(rows) == 3
            out.read()
        assert process.wait(20) == 0


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_the_register_is_synced_before_the_tag_is_written(tracker):
    tracker("newtag", "--server", "h")
    traced = tracker("newtag", "--server", "h", prefix=[
        "strace", "-y", "-o", "trace", "-e", "trace=fsync,write"])
    if traced.returncode:
        pytest.skip("strace may not trace here")
    with open("trace", encoding="utf-8") as file:
        calls = file.read().splitlines()
    printed = next(i for i, call in enumerate(calls) if "<img" in call)
    synced = [i for i, call in enumerate(calls) if "fsync" in call
              and "/register.csv>" in call]
    assert synced and synced[0] < printed


def test_a_tag_counts_on_its_first_hit_in_a_running_server(serve, newtag):
    server = serve()
    for number in range(5):
        url = newtag("--name", f"n{number}", "--format", "url").strip()
        tag = re.search(rf"({ID})\.gif", url)[1]
        server.hit(tag)
        assert register_rows("register.csv")[tag]["hits"] == "0000000001"


@pytest.mark.parametrize("template", [
    "/img/{id}/logo.gif", "/a%20b/{id}", "/{id}?x={id}"])
def test_the_pixel_is_counted_where_the_path_put_it(serve, newtag, template):
    url = urlsplit(newtag("--path", template, "--format", "url").strip())
    status, _, body = serve().get(f"{url.path}?{url.query}")
    assert status == 200 and body.startswith(b"GIF89a")
    assert only_row()["hits"] == "0000000001"


def test_a_register_that_is_none_is_refused_and_stays(run):
    write("a letter\nto John\n", "register.csv")
    code, out, err = run("newtag", "--server", "h")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert open_text("register.csv") == "a letter\nto John\n"


def test_a_folder_that_is_not_there_is_one_clear_line(run):
    code, out, err = run("newtag", "--server", "h", "--register", "no/register.csv")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(r"\bno(/register\.csv)?(:|$)", err, re.M)


def open_text(path):
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def test_armed_adds_a_column_to_an_old_register_and_harms_no_cell(newtag):
    newtag("--name", "old")
    old = only_row()
    text = open_text("register.csv").replace("name\n", "name,note\n")
    write(text.replace("old\n", "old,my note\n"), "register.csv")
    code = mailtracker.main(["newtag", "--server", "h", "--armed", "--name", "new"])
    assert code == 0
    first, second = register_rows("register.csv").values()
    assert first == {**old, "sent": NEVER, "note": "my note"}
    assert second["sent"] == second["created"] != NEVER and second["name"] == "new"
    newtag("--name", "third")  # not armed: it has the column, and nothing in it
    assert list(register_rows("register.csv").values())[2]["sent"] == NEVER


def test_without_armed_the_register_gets_no_further_column(newtag):
    newtag()
    assert "sent" not in only_row()


# -- the tracker of 2018 ----------------------------------------------------------


def test_its_newtag_runs_word_for_word(run):
    code, out, err = run(*"-newtag -name john -server customcrypto.com -port 56789 "
                         "-csvfile register.csv".split())
    assert (code, err) == (0, "")
    row = only_row()
    assert row["name"] == "john"
    assert f'src="http://customcrypto.com:56789/{row["id"]}.gif"' in out


def test_its_dump_runs_word_for_word(newtag, run):
    newtag("--name", "john")
    code, out, err = run("-dump", "register.csv")
    assert (code, err) == (0, "") and "john" in out


def test_its_server_runs_word_for_word(newtag, folder):
    newtag("--name", "john")
    tag = only_row()["id"]
    command = [sys.executable, str(SCRIPT), *"-server -port 0 -csvfile "
               "register.csv".split()]
    with open("server.log", "wb") as log, subprocess.Popen(
            command, stderr=log, cwd=folder, env=clean_environment()) as process:
        try:
            text = eventually(lambda: re.search(
                r"serving pixels on http://\S+:(\d+)", open_text("server.log")))
            url = f"http://127.0.0.1:{text[1]}/{tag}.gif"
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert answer.read().startswith(b"GIF89a")
        finally:
            process.terminate()
            assert process.wait(20) == 0
    assert only_row()["hits"] == "0000000001"


@pytest.mark.parametrize("header", ["", "ID,name,clicks,lastclick\n"],
                         ids=["headerless", "with a header"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_its_register_is_taken_over_with_its_counts(run, header, end, serve):
    old = header + (f"{OLD % 1},john,3,2018-05-01 10:00:00\n"
                    f'{OLD % 2},"Doe, Jane",0,\n{OLD % 3},,12,2018-06-01 11:12:13\n')
    write(old.replace("\n", end), "register.csv")
    before = table(run("dump", "--format", "csv")[1])
    assert [row[0:2] for row in before[1:]] == [
        [OLD % 1, "3"], [OLD % 2, "0"], [OLD % 3, "12"]]
    assert open_text("register.csv") == old.replace("\n", end)  # dump only reads
    server = serve("--compose-window", 0)
    server.hit(OLD % 1)
    server.hit(OLD % 2)
    rows = register_rows("register.csv")
    assert [(row["name"], row["hits"]) for row in rows.values()] == [
        ("john", "0000000004"), ("Doe, Jane", "0000000001"), ("", "0000000012")]
    assert rows[OLD % 3]["last_hit"] == "2018-06-01T11:12:13Z"
    assert open_text("register.csv.bak") == old.replace("\n", end)


# -- the clipboard ----------------------------------------------------------------


@pytest.fixture
def display(folder):
    """Start an X server of its own on a free display; return its name."""
    if not shutil.which("Xvfb") or not shutil.which("xclip"):
        pytest.skip("Xvfb or xclip is not installed (Debian: xvfb, xclip)")
    here, there = os.pipe()
    with open("xvfb.log", "wb") as log, subprocess.Popen(
            ["Xvfb", "-displayfd", str(there), "-nolisten", "tcp", "-screen", "0",
             "64x64x8"], pass_fds=[there], stderr=log) as process:
        os.close(there)
        with open(here, encoding="ascii") as pipe:
            number = pipe.readline().strip()
            if not number:
                process.wait(20)
                pytest.skip(f"Xvfb does not start: {open_text('xvfb.log')}")
            yield f":{number}"
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("form, kind, target", **cases({
    "html": ("html", "HTML", "text/html"),
    "url": ("url", "plain text", "UTF8_STRING"),
    "markdown": ("markdown", "plain text", "UTF8_STRING"),
}))
def test_a_tag_is_copied_in_the_flavour_of_its_form(
        tracker, display, form, kind, target):
    env = {"DISPLAY": display, "WAYLAND_DISPLAY": ""}
    done = tracker("newtag", "--server", "h", "--format", form, "--copy", env=env)
    assert done.returncode == 0
    assert done.stderr == f"mailtracker: note: copied as {kind}\n"
    read = subprocess.run(
        ["xclip", "-selection", "clipboard", "-o", "-t", target], timeout=20,
        env=clean_environment(**env), stdout=subprocess.PIPE, check=True)
    assert read.stdout.decode() == done.stdout.rstrip("\n")


def test_without_a_clipboard_the_tag_is_printed_and_one_line_says_so(
        run, monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder))
    code, out, err = run("newtag", "--server", "h", "--copy")
    assert code == 1 and re.search(ID, out)[0] == only_row()["id"]
    assert err.startswith("mailtracker: error: no clipboard here")
    assert "xclip" in err and err.count("\n") == 1


def test_a_clipboard_tool_that_fails_is_named(run, monkeypatch, folder):
    tool = folder / "xclip"
    tool.write_text("#!/bin/sh\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    code, out, err = run("newtag", "--server", "h", "--copy")
    assert code == 1 and only_row()["id"] in out
    assert err == "mailtracker: error: xclip could not copy the tag; " \
        "take it from the screen\n"
