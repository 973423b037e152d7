"""Tables: a register in any dialect is read, counted in, and left as it was."""
from __future__ import annotations

import os
import re

import pytest

import mailtracker
from conftest import save, shown
from mailtracker import (
    Event, Making, TrackerError, add_tags, append_events, settle)

A, B, C = "bcdfghjkmnpqrstvwxz22", "cdfghjkmnpqrstvwxz233", "dfghjkmnpqrstvwxz2344"
NOON, LATER = "2026-11-20T12:00:00Z", "2026-11-20T20:14:03Z"
# <h> and <t> stand for the counts and times of B, which gets hits; <,> for what its
# row gets with them.
TEXT = (f"id,hits,last_hit,opens,last_open,created,name,note\n"
        f"{A},0,,0,,{NOON},ann,x\n{B},<h>,<t>,<h>,<t>,{NOON},bob,y\n")
MOVED = (f'note,NAME, Hits ,id,last_hit,opens,last_open,created,x,x\n'
         f'"a\n,b\n",ann,0,{A},,0,,{NOON},1,2\nc,bob,<h>,{B},<t>,<h>,<t>,{NOON},3,4\n')
DIALECTS = {
    "comma": TEXT,
    "tab": TEXT.replace(",", "\t"),
    "pipe": TEXT.replace(",", "|"),
    "byte order mark": "\ufeff" + TEXT,
    "CRLF": TEXT.replace("\n", "\r\n"),
    "lone CR": TEXT.replace("\n", "\r"),
    "UTF-16 little endian": ("\ufeff" + TEXT, "utf-16-le"),
    "UTF-16 big endian": ("\ufeff" + TEXT.replace(",", "\t"), "utf-16-be"),
    "UTF-16 without a mark": (TEXT, "utf-16-le"),
    "Windows-1252": (TEXT.replace("y", "M\xfcller \u20ac"), "cp1252"),
    "Windows-1252 in a row of UTF-8": TEXT.replace("x\n", "\udcfc\n").replace("y", "ü"),
    "sep= line": "sep=;\n" + TEXT.replace(",", ";"),
    "empty lines": TEXT.replace("\n", "\n\n"),
    "empty line on top, columns moved": "\n" + MOVED,
    "newlines in a title": TEXT.replace("note", '"no\n\u2028"').replace("id,", '"id",'),
    "VT, NEL and U+2028 in a cell": TEXT.replace("x\n", "\v\x85\u2028\n"),
    "quote that another delimiter would open": TEXT.replace("note", 'no|"te'),
    "quote in the middle of a cell": TEXT.replace("y\n", '5" disk,"\n"\n'),
    "quotes, delimiters and line ends in cells": TEXT.replace(
        "x\n", '"a ""b"", c\r\n;|"\n').replace("bob", '"b,""o""\nb"'),
    "all cells quoted": re.sub(r"[^,\n]+", r'"\g<0>"', TEXT),
    "more cells than titles": TEXT.replace("y\n", 'y,1,"2,3"\n'),
    "fewer cells than titles": TEXT.replace(",x\n", "\n").replace(",y\n", "<,>\n"),
    "NUL": TEXT.replace("ann", '\0a"n').replace("y\n", "\0\n"),
    "NUL before a quote": MOVED.replace('"a', '\0"a').replace("\nc,", '\n\0"c,",'),
    "rows that are none": TEXT + "sum,7,,\udcff,,,\"a\n\",\n,,,\n",
    "no line end at the end": TEXT[:-1] + "<\n>",
    "cell of 17 MB": TEXT.replace("x\n", "x" * 17_000_000 + "\n"),
    "header over 64 KB": TEXT.replace("note", "note" * 20_000),
}


def bytes_of(dialect, hits=0):
    """Return a register of a dialect, in which B has so many hits."""
    text, encoding = dialect if isinstance(dialect, tuple) else (dialect, "utf-8")
    hit = hits > 0
    text = re.sub('"(<.>)"', r"\1" if hit else r"\g<0>", text)
    text = text.replace("<h>", str(hits)).replace("<t>", LATER * hit)
    return re.sub("<([,\n])>", r"\1" * hit, text).encode(encoding, "surrogateescape")


def read(files):
    with open(files.register, "rb") as file:
        return file.read()


def hits_of(files, *tags):
    return [shown(files)[tag]["hits"] for tag in tags]


def log_hit(files, tag_id, hits):
    append_events(files, [Event(LATER, "hit", tag_id, hits, hits, "human")])


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_a_hit_changes_its_own_cells_and_a_newtag_only_the_end(dialect, files):
    save(files.register, bytes_of(dialect))
    assert settle(files)
    assert read(files) == bytes_of(dialect), "nothing has happened yet"
    for hits in 1, 12:
        log_hit(files, B, hits)
        assert hits_of(files, A, B) == ["0", str(hits)]
        assert settle(files) and read(files) == bytes_of(dialect, hits)
        assert hits_of(files, A, B) == ["0", str(hits)]
    save(files.register, bytes_of(dialect))
    add_tags(files, [(C, 'M\xfcller, "x"; |')], Making(NOON))
    assert read(files).startswith(bytes_of(dialect))
    new = shown(files)[C]
    assert (new["name"], new["created"]) == ('M\xfcller, "x"; |', NOON)
    assert hits_of(files, A, B, C) == ["0", "12", "0"]


def test_ids_typed_with_blanks_count_and_a_copied_row_is_nobodys(files):
    save(files.register, bytes_of(TEXT.replace(B, f" {B} ") + f"{A},7,,,,,copy,z\n"))
    assert settle(files)
    log_hit(files, B, 12)
    assert settle(files) and hits_of(files, A, B) == ["0", "12"]
    assert read(files).endswith(f"{A},7,,,,,copy,z\n".encode())


UNREADABLE = {  # and the line that has to be named
    "open quote in the header": (f'id,hits,"name\n{A},0,ann\n', 1),
    "open quote in a middle row": (
        f'id,hits,name\n{A},0,ann\n\n{B},0,"bob\n{C},0,cy\n', 4),
    "open quote in the last row": (f'id,hits,name\n{A},0,"a\nb"\n{B},0,"bob\n', 4),
    "quote closed in a later row": (f'id,name,hits\n{A},"ann,0\n{B},"bob",0\n', 2),
    "quote closed later, id in the middle": (
        f'name,id,hits\nann,{A},0\n"bob,{B},0\ncy,{C},0\n"dan",x,0\n', 3),
    "no id column": ("hits,name\n1,ann\n", 1),
    "a title above the header": (f"My mails\nid,hits\n{A},0\n", 1),
    "no table": ("\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 1)}


@pytest.mark.parametrize("text, line", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_left_alone_and_its_place_told(text, line, files):
    save(files.register, text)
    for use in settle, shown, lambda files: add_tags(files, [(C, "x")], Making(NOON)):
        with pytest.raises(TrackerError, match=f"^{files.register}, line {line}: "):
            use(files)
    assert read(files) == text.encode("latin-1")
    assert {*os.listdir(os.path.dirname(files.register))} <= {
        "register.csv", "register.csv.lock", "register.events.csv"}


IN_2018 = ["7", "2018-03-01T10:11:12Z", "0", ""]
OLD = {
    "padded": (f"id,hits,last_hit,opens,last_open,created,name\n"
               f"{A},0000000007,{LATER},0000000002,{NOON},{NOON},ann\n"
               f"{B},0000000000,{' ' * 20},0000000000,{' ' * 20},{NOON},=b\n",
               ["7", LATER, "2", NOON], "=b"),
    "2018": (f"{40 * 'a'},ann,7,2018-03-01 10:11:12.123456\n{40 * 'b'},=b,0,\n",
             IN_2018, "=b"),
    "2018, numbers for names": (f"{40 * 'a'},12,7,2018-03-01 10:11:12\n"
                                f"{40 * 'b'},13,0,\n", IN_2018, "13")}


@pytest.mark.parametrize("text, counts, name", OLD.values(), ids=OLD)
def test_registers_of_old_become_plain_and_are_kept(text, counts, name, files):
    save(files.register, text)
    assert settle(files)
    with open(files.orig) as file:
        assert file.read() == text
    first, second = ([row[c] for c in ("hits", "last_hit", "opens", "last_open")]
                     for row in shown(files).values())
    assert (first, second) == (counts, ["0", "", "0", ""])
    assert [*shown(files).values()][1]["name"] == name
    assert b" " not in read(files) and b",00" not in read(files)


NAMES = ["=1+1", "+49 170", "-1", "@x", "\uff1d1", "'=1", "''+1", "'quoted'", "",
         "Doe, John", '"', "{0}", "%s", "m\xfcller", "\u6771\u4eac", "1e5", "a|b;c"]


@pytest.mark.parametrize("header", ["", "id,hits\n"], ids=["new", "without names"])
def test_names_that_look_like_formulas_get_one_apostrophe_and_lose_it(header, files):
    if header:
        save(files.register, header)
    ids = [C[:15] + letter * 3 for letter, _ in zip("bcdfghjkmnpqrstvwxz", NAMES)]
    add_tags(files, list(zip(ids, NAMES)), Making(NOON))
    for hits in 1, 2, 3:
        assert [row["name"] for row in shown(files).values()] == NAMES
        log_hit(files, ids[0], hits)
        save(files.register, read(files))  # by a person, too
        assert settle(files)
    assert not re.findall("[,\"][=+@\uff1d-]", read(files).decode())


REWRITTEN = {
    mailtracker.count_in: [
        ("3", 3), (" 3 ", 3), ("0003", 3), ("3.0", 3), ("3.", 3), ("", 0), ("-3", 0),
        ("3.5", 0), ("1E5", 0), ("x", 0), ("9" * 5000, 0), ("\u0663", 3)],
    mailtracker.time_in: [
        (LATER, LATER), ("2026-11-20 20:14:03", LATER), ("20.11.2026", ""), ("", ""),
        ("2026-11-20 20:14:03.5", LATER), (" 2026-11-20T20:14:03 ", LATER),
        ("never", "")]}


@pytest.mark.parametrize("read_cell", REWRITTEN)
def test_what_a_spreadsheet_rewrote_is_read(read_cell):
    cells = REWRITTEN[read_cell]
    assert [(cell, read_cell(cell)) for cell, _ in cells] == cells
