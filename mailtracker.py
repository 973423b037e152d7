#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""Tell which of your e-mails were opened, when, how often, and if by a person.

Make a tag, paste it into a mail, and let the server count its fetches:

    mailtracker.py server                        serve pixels, count hits
    mailtracker.py newtag --name john --server t.example.org
    mailtracker.py send news.html people.csv     send a mail with a pixel to each
    mailtracker.py relay --smarthost smtp.x.org  put pixels into any program's mail
    mailtracker.py dashboard --open              look at them in a browser
    mailtracker.py dump                          show the register
    mailtracker.py dump --id 7hq2vxw             show one tag with its history
    mailtracker.py report --by campaign          what was opened, what is unknown
    mailtracker.py notify --to desktop           tell me of opens as they come
    mailtracker.py scan ~/Maildir                find bounces, answers, receipts
    mailtracker.py doctor                        find what is wrong with a set-up
    mailtracker.py rejudge --dry-run             judge old hits by today's rules
    mailtracker.py forget john                   remove all that is known of a tag
    mailtracker.py settle                        bring the register up to date

The words, the same everywhere:

    tag        one thing that is tracked: an id, its row in the register, and the
               <img> element that carries it
    id         the opaque token in the pixel's URL
    pixel      the 1x1 transparent GIF, and its URL
    hit        one fetch of the pixel: a fact
    verdict    what a hit is judged to be: human, proxy, machine, self or unknown
    open       a hit by a human, or by a proxy on a person's behalf: a judgement
    click      a link was followed; a person's first is an open if there was none
    event      one thing that happened to a tag: made, sent, hit, verdict...
    event log  the CSV file with one row per event: the journal, what is believed
    register   the CSV file with one row per tag: what the journal comes to

The files, all beside each other:

    register.csv         the register: open it in any spreadsheet, edit, save
    register.csv.bak     the version of it that was replaced last
    register.csv.lock    held by the server; says up to where the log is settled
    register.csv.*.send  held by a mailing
    register.csv.*.notify  how far a receiver of notices has been told
    register.csv.orig    the first register that was not in this program's form
    register.key         the dashboard's secret; without it nobody is logged in
    register.events.csv  the event log
    register.links.csv   where links lead that count clicks

Exit codes: 0 all went well, 1 it did not and one line says why, 2 wrong usage.
"""
from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is being read: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import errno
import os
import re
import select
import stat
import sys
import time
from binascii import a2b_base64, a2b_qp, b2a_base64, b2a_qp, crc32
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from itertools import chain, groupby, islice, starmap, takewhile
from operator import itemgetter, methodcaller
from types import SimpleNamespace
from typing import (
    TYPE_CHECKING, Any, Callable, Collection, Deque, Dict, FrozenSet, Iterable,
    Iterator, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Set, TextIO,
    Tuple, TypeVar)

if TYPE_CHECKING:
    import socket
    import ssl

if sys.platform != "win32":
    import fcntl

__version__ = "2.0"

DEFAULT_PORT = 56789
DEFAULT_REGISTER = "register.csv"


class TrackerError(Exception):
    """Say in one line what is wrong and what to do; main prints it and exits 1."""


# ---------------------------------------------------------------------------
# Text: what may reach a terminal, a log or a spreadsheet
# ---------------------------------------------------------------------------
# Whatever came from a network, a file or a command line passes through one of these
# on its way out. All are pure, but note and progress, which speak to people.

Item = TypeVar("Item")

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
# What no terminal, spreadsheet or CSV reader takes for anything else; most names.
_PLAIN = re.compile(r"(?:\w[\w .:@+-]*)?", re.ASCII)
# Not printable to Python, and harmless: joiners, which shape Persian and Indic names
# and emoji, and spaces that are wide or do not break.
_HARMLESS = "\u200c\u200d\u00a0\u202f\u3000"
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\0", "＝", "＋", "－", "＠")
DAY = 86400.0   # seconds
PATIENCE = 2.0  # seconds that people wait before they want to see progress


def utc_text(seconds: float) -> str:
    """Return a time in seconds since 1970 as 20 characters: 2026-11-20T20:14:03Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def seconds(text: str) -> float:
    """Return the seconds since 1970 of a time as utc_text writes it; NaN for none."""
    try:
        return _minute(text[:16]) + int(text[17:19])
    except ValueError:
        return float("nan")


@lru_cache(maxsize=4096)
def _minute(text: str) -> float:
    """Return the seconds since 1970 of a minute; raise ValueError for none."""
    from datetime import datetime

    return datetime.fromisoformat(text + ":00+00:00").timestamp()


def is_time(text: str) -> bool:
    """Tell whether text is a time as utc_text writes it."""
    return _TIME.fullmatch(text) is not None and seconds(text) > 0


def clean(text: str) -> str:
    r"""Return text with every control character escaped, as in \x1b or \u202e.

    That covers C0, C1, line separators, bidirectional controls and lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in _HARMLESS else ascii(c)[1:-1] for c in text)


def escape_formula(cell: str) -> str:
    """Return a cell that no spreadsheet runs as a formula (OWASP: CSV injection)."""
    return "'" + cell if is_formula(cell) else cell


def unescape_formula(cell: str) -> str:
    """Return the text that escape_formula was given."""
    return cell[1:] if cell[:1] == "'" and is_formula(cell) else cell


def is_formula(cell: str) -> bool:
    """Tell whether a cell is a formula, or was one before it got its quotes."""
    return cell.lstrip("'").startswith(_FORMULA_STARTS)


def form_text(text: str) -> str:
    """Return text as a browser's form shows it, and sends it back."""
    return re.sub(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", " ",
                  re.sub("\r\n?", "\n", text))


def plain_text(text: str) -> str:
    """Return text that UTF-8 can hold: stray bytes of an argument become U+FFFD."""
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def explain(error: Exception) -> str:
    """Return an error in one line: for the system's own, which file and what."""
    if not isinstance(error, OSError):
        return str(error)
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: 1 hit, 2 hits."""
    return f"{number} {noun}{'s' * (number != 1)}"


def note(text: str) -> None:
    """Tell the user something beside the result."""
    print(f"mailtracker: note: {clean(text)}", file=sys.stderr)


def progress(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Pass items on; on a terminal, show how many once that takes a while."""
    if not sys.stderr or not sys.stderr.isatty():
        yield from items
        return
    due, shown = time.monotonic() + PATIENCE, False
    for number, item in enumerate(items):
        if not number % 1024 and time.monotonic() >= due:
            due, shown = time.monotonic() + 0.2, True
            print(f"\r{what}: {number:,}", end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print(f"\r{' ' * (len(what) + 16)}\r", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------
# Tags: ids, URLs and <img> elements
# ---------------------------------------------------------------------------
# Pure functions. An id says nothing about whom it belongs to and cannot be
# guessed; another form of tag costs one line in TAG_FORMATS.

# No vowels and no look-alikes: no spreadsheet reads a number, a date or TRUE into
# such an id, nobody misreads it, and no rude word comes out.
ID_LETTERS = "bcdfghjkmnpqrstvwxz"
ID_ALPHABET = ID_LETTERS + "23456789"
ID_LENGTH = 21
# Ids of this program, or the 40 hex digits of its forerunner of 2018.
_ID = "[%s][%s]{15,39}|[0-9a-f]{40}" % (ID_LETTERS, ID_LETTERS + "2-9")
_WHOLE_ID = re.compile(_ID)
_ID_IN_PATH = re.compile(rb"/(%s)(?:\.[\w-]*)*(?=/|$)" % _ID.encode())

TAG_FORMATS = {
    # display:none would hide it as well, but then Gmail never loads it (mautic#2193).
    "html": '<img src="{}" width="1" height="1" alt="" style="border:0">',
    "url": "{}",
    "markdown": "![]({})",
}
# What RFC 3986 allows stays as the user wrote it, but brackets, which end a Markdown
# link.
URL_SAFE = "/?&=%:@!$'*+,;~"
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?"
                   r"|[0-9a-f.]*:[0-9a-f:.]+")

LINK_LENGTH = 8      # letters of 27: 38 bits; whoever stores links sees two that agree
MAX_DESTINATION = 2048  # characters; some mail filters and browsers take no more
# No user and no backslash, which make one host look like another, and no letters that
# are others to browsers than to Python's IDNA.
_DESTINATION = re.compile(
    r"(https?://)([^\s/?#@:\\[\]ß\u1e9eς\u200c\u200d]+|\[[\da-f:.]+\])(:[1-9]\d{0,4})?"
    r'((?:[/?#][^\0- \x7f"<>\\\ufffd]*)?)', re.A | re.I)

# 256 is no multiple of 27, so some letters come a little more often: 97.8 bits of
# min-entropy are left of 99.3.
_FIRST = (ID_LETTERS * 14)[:256].encode()
_OTHERS = (ID_ALPHABET * 10)[:256].encode()


def new_ids(instance: bytes, count: int = 1, now_ns: Optional[int] = None
            ) -> List[str]:
    """Return ids of 21 characters: each the keyed hash of time and instance.

    The instance is at least 16 random bytes that are never shown; a number tells
    apart ids of one instance and one nanosecond.
    """
    from hashlib import blake2b

    when = time.time_ns() if now_ns is None else now_ns
    digests = (blake2b(b"%d %d" % (when, number), key=instance,
                       digest_size=ID_LENGTH).digest() for number in range(count))
    return [(digest[:1].translate(_FIRST) + digest[1:].translate(_OTHERS)).decode()
            for digest in digests]


def is_id(text: str) -> bool:
    """Tell whether text has the form of an id, known or not."""
    return _WHOLE_ID.fullmatch(text) is not None


def ids_in_path(target: bytes) -> List[bytes]:
    """Return what may be the id in a request target, the likeliest first.

    A path segment counts without its extension; later segments come first. The
    query is ignored.
    """
    return _ID_IN_PATH.findall(target.partition(b"?")[0])[::-1]


def is_pixel(base: str, url: str) -> bool:
    """Tell whether a URL is that of a pixel below a base URL."""
    path = url[len(base):].encode("utf-8", "replace")
    return url.startswith(base + "/") and bool(ids_in_path(path))


def destination(url: str) -> str:
    """Return a web address in printable ASCII, as it may stand in a Location header.

    What is ASCII stays as it is. Raise ValueError for what no link should lead to.
    """
    from urllib.parse import quote

    found = _DESTINATION.fullmatch(url.strip(" \t\r\n\f"))
    if not found:
        raise ValueError
    scheme, host, port, rest = found.groups("")
    if not host.isascii():
        host = host.encode("idna").decode()
    url = scheme + host + port + quote(rest, safe=URL_SAFE + "#[]()")
    if not _HOST.fullmatch(host.lower().strip("[]")) or int(port[1:] or 1) > 65535 \
            or len(url) > MAX_DESTINATION:
        raise ValueError
    return url


def link_id(url: str, number: int = 0) -> str:
    """Return the letters that stand for a destination; other ones for each number."""
    from hashlib import blake2b

    return blake2b(f"{number} {url}".encode(), digest_size=LINK_LENGTH
                   ).digest().translate(_OTHERS).decode()


def base_url(server: str, port: Optional[int] = None) -> str:
    """Return the URL a pixel's path is appended to, without a slash at its end.

    A bare host gets http and the default port; a URL keeps its own scheme, port and
    path, and gets a port only when one is asked for.
    """
    from urllib.parse import quote, urlsplit

    url = server if "://" in server else "http://" + server
    try:
        parts = urlsplit(url)
        own_port, host = parts.port, parts.hostname or ""
        if not host.isascii():
            host = host.encode("idna").decode()
    except ValueError as error:
        raise TrackerError(f"not a host or URL: {clean(server)} ({error})") from None
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) \
            or parts.username or parts.query or parts.fragment:
        raise TrackerError(f"not a host or URL: {clean(server)}; "
                           "say for example t.example.org or https://t.example.org")
    if "://" not in server:
        own_port = own_port or port or DEFAULT_PORT
    number = port or own_port
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}" + (f":{number}" if number else "") \
        + quote(parts.path.rstrip("/"), safe=URL_SAFE)


def tag_template(base: str, path: str, form: str = "html") -> str:
    """Return a tag with {id} in the place of its id, in one of TAG_FORMATS.

    The path is a template with {id} as well.
    """
    from html import escape
    from urllib.parse import quote

    url = base + quote(path, safe=URL_SAFE).replace("%7Bid%7D", "{id}")
    return TAG_FORMATS[form].format(escape(url) if form == "html" else url)


# ---------------------------------------------------------------------------
# Tables: CSV files in whatever dialect they stand
# ---------------------------------------------------------------------------
# Reads what a spreadsheet or a person made of a CSV file, and says how to write more
# of the same. Knows nothing of tags but the names of their columns: another column
# of the program's own is one more word in OWN_COLUMNS or LATER_COLUMNS.

OWN_COLUMNS = ("id", "hits", "last_hit", "opens", "last_open", "created", "name")
LATER_COLUMNS = (  # only in registers that need them
    "sent", "email", "campaign", "variant", "status", "message_id")
TEXTS = ("name", "email", "campaign", "variant", "message_id")  # as somebody wrote them
COUNTS = ("hits", "opens")
TIMES = ("last_hit", "last_open", "created", "sent")
_ALIASES = {"clicks": "hits", "lastclick": "last_hit"}  # the tracker of 2018
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"),
         (b"\xfe\xff", "utf-16-be"))
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)
_LONGEST_HEADER = 1000  # lines
UNCLOSED = "a quote that is never closed; close it, or take it out"


class Table:
    """A CSV file as it stands: how it is written, then its records one by one.

    Iterate once: each record comes as the text that stands in the file and as its
    cells; line is the number of its first line. The file is closed behind the last.
    Raise TrackerError, with file and line, for what cannot be read as a table.
    """

    def __init__(self, source: Any, name: str, strict: bool = False) -> None:
        csv.field_size_limit(1 << 30)
        self.name, self.line = name, 1
        self.is_cp1252 = False  # so far; what is not UTF-8 is Excel's code page
        self._strict = strict
        self._text, self.encoding, self.bom = _open_text(source)
        self._tape: List[str] = []
        self._reader: Any = None
        try:
            self._read_head(self._taped(self._text))
        except (csv.Error, UnicodeError, StopIteration) as error:
            self.close()
            raise self.error(str(error) or UNCLOSED) from None

    def _read_head(self, lines: Iterator[str]) -> None:
        """Find out the delimiter, the columns and the line end.

        The delimiter is the one under which the most known columns appear, else the
        one that gives the most cells.
        """
        self.lead, first = "", next(lines, "")
        while first and (not first.strip() or re.match(r"sep=.[\r\n]", first)):
            self.lead, first = self.lead + first, next(lines, "")
        held = [first]
        heads = [(_header(held, lines, d), d) for d in ",;\t|"]
        (size, cells), self.delimiter = max(
            heads, key=lambda head: (
                len({*own_titles(head[0][1])} & {*OWN_COLUMNS}), len(head[0][1])))
        if first and not size:
            raise StopIteration
        self.header = "".join(held[:size])
        self.eol = first[len(first.rstrip("\r\n")):] or "\n"
        self.columns = own_titles(cells)
        self.is_headed = not (cells and is_id(cells[0].strip()))
        if not self.is_headed:
            self._name_columns(cells)
            size, self.header = 0, ""
        self._rest = chain(held[size:], self._text)
        self._tape.clear()
        self.line += size + self.lead.count("\n")

    def _name_columns(self, cells: List[str]) -> None:
        """Name the columns of a file whose first row is a tag's already."""
        order: Sequence[str] = OWN_COLUMNS
        is_count = [cell.strip().isdigit() for cell in cells[1:3]]
        if is_count != [True, False] and len(cells) > 2:
            order = ("id", "name", "hits", "last_hit")  # the tracker of 2018
        self.columns = [*order[:len(cells)], *("" for _ in cells[len(order):])]

    def _taped(self, lines: Iterable[str]) -> Iterator[str]:
        """Yield lines as csv wants them, and keep them as they are."""
        for line in lines:
            self._tape.append(line)
            if not line.isascii() and not self.is_cp1252:
                self.is_cp1252 = line != cell_text(line)
            yield line.replace("\0", "") if "\0" in line else line

    def __iter__(self) -> Iterator[Tuple[str, List[str]]]:
        """Yield the records behind the header, blank lines among them."""
        tape, raw, line = self._tape, "", 0
        reader = csv.reader(self._taped(self._rest), delimiter=self.delimiter,
                            strict=self._strict)
        try:
            for cells in reader:
                raw = tape[0] if len(tape) == 1 else "".join(tape)
                if len(tape) > 1:
                    self._check_lines(cells)
                yield raw, cells
                line, self.line = self.line, self.line + len(tape)
                tape.clear()
            if _is_open(raw, self.delimiter):
                self.line = line
                raise self.error(UNCLOSED)
        except (csv.Error, UnicodeError) as error:
            raise self.error(UNCLOSED if "end of data" in str(error) else str(error)
                             ) from None
        finally:
            self.close()

    def rows(self) -> Iterator[List[str]]:
        """Yield the cells alone, of a file that is known to be whole: twice as fast."""
        self._reader = csv.reader(map(methodcaller("replace", "\0", ""), self._rest),
                                  delimiter=self.delimiter)
        with self._text:
            yield from self._reader

    def current_line(self) -> int:
        """Return the number of the line that was read last."""
        return self.line + (self._reader.line_num - 1 if self._reader else 0)

    def _check_lines(self, cells: Sequence[str]) -> None:
        """Refuse a record of many lines with a cell that has swallowed rows."""
        d = re.escape(self.delimiter)
        for cell in cells:
            if re.search(rf"(?:^|[\r\n])(?:[^\r\n]*{d})?(?:{_ID})(?:{d}|[\r\n])", cell):
                raise self.error(UNCLOSED)

    def error(self, what: str) -> TrackerError:
        """Return an error that names the file and the line."""
        return TrackerError(f"{self.name}, line {self.line}: {what}")

    def close(self) -> None:
        """Close the file."""
        self._text.close()

    def __del__(self) -> None:
        if hasattr(self, "_text"):
            self.close()

    def record(self, cells: Iterable[str]) -> str:
        """Return cells as one more record of this file."""
        return csv_row(map(self.storable, cells), self.delimiter, self.eol)

    def storable(self, text: str) -> str:
        """Return text as it can stand in this file's charset."""
        text = cell_text(text)
        if not self.is_cp1252:
            return text
        return text.encode("cp1252", "replace").decode("utf-8", "surrogateescape")

    def quoted(self, cell: str) -> str:
        """Return a cell as it stands in a record."""
        if _PLAIN.fullmatch(cell):
            return cell
        return self.record(["", cell])[1:-len(self.eol)]

    def changed(self, raw: str, width: int, changes: Mapping[int, str]) -> str:
        """Return a record with other cells at some places, the others as they stand.

        It gets as many cells as width says, should it have fewer.
        """
        body, d = raw.rstrip("\r\n"), self.delimiter
        cells = body.split(d) if '"' not in body else _raw_cells(d).findall(d + body)
        cells += [""] * (width - len(cells))
        for place, cell in changes.items():
            cells[place] = self.quoted(cell)
        return d.join(cells) + (raw[len(body):] or self.eol)


def _open_text(source: Any) -> Tuple[TextIO, str, str]:
    """Open a path or descriptor; return its text, encoding and byte order mark.

    Bytes that are not of that encoding come as lone surrogates and go back as they
    came.
    """
    import io

    file = open(source, "rb")
    head = file.peek(4)
    bom, encoding = next((b for b in _BOMS if head.startswith(b[0])), (b"", "utf-8"))
    file.read(len(bom))
    if not bom and b"\0" in head[:2]:
        encoding = "utf-16-be" if head.startswith(b"\0") else "utf-16-le"
    text = io.TextIOWrapper(file, encoding, "surrogateescape", newline="")
    return text, encoding, "\ufeff" if bom else ""


def _header(held: List[str], lines: Iterator[str], delimiter: str
            ) -> Tuple[int, List[str]]:
    """Return of how many lines a header is, and its cells; 0 for one without end.

    Lines that are read to find its end are added to those held.
    """
    for size in range(1, _LONGEST_HEADER):
        if len(held) < size:
            held.append(next(lines, ""))
        if not _is_open("".join(held[:size]), delimiter):
            return size, next(csv.reader(held[:size], delimiter=delimiter), [])
    return 0, []


def _is_open(raw: str, delimiter: str) -> bool:
    """Tell whether a record ends inside a quoted cell."""
    if '"' not in raw:
        return False
    try:
        list(csv.reader([raw.replace("\0", "")], delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "end of data" in str(error)
    return False


def own_titles(cells: Sequence[str]) -> List[str]:
    """Return titles with the program's own under their names, the others as they are.

    Where a name stands twice, the second one is the user's.
    """
    columns: List[str] = []
    for cell in cells:
        name = cell.strip().lower()
        name = _ALIASES.get(name, name)
        own = name in OWN_COLUMNS or name in LATER_COLUMNS
        columns.append(name if own and name not in columns else cell)
    return columns


def distinct(columns: Sequence[str]) -> List[str]:
    """Return the names of columns, with a number where one is empty or used again."""
    names: List[str] = []
    for number, column in enumerate(columns, 1):
        is_new = column.strip() and column not in names
        names.append(column if is_new else f"{column} ({number})".strip())
    return names


@lru_cache(maxsize=8)
def _raw_cells(delimiter: str) -> re.Pattern[str]:
    """Return a pattern for the cells of a record, each with a delimiter before it."""
    d = re.escape(delimiter)
    return re.compile(rf'{d}((?:\0*"[^"]*(?:""[^"]*)*")?[^{d}]*)')


def is_utf8(path: str) -> bool:
    """Tell whether a file is UTF-8, with a tenth of the work of reading its rows."""
    from codecs import getincrementaldecoder

    decoder = getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 18), b""):
                if not block.isascii() or decoder.getstate()[0]:
                    decoder.decode(block)
        return not decoder.getstate()[0]
    except UnicodeDecodeError:
        return False


def csv_row(cells: Iterable[str], delimiter: str = ",", eol: str = "\n") -> str:
    """Return one line of CSV with its line end."""
    out: Any = SimpleNamespace(write=str)  # writerow returns what write does
    # csv leaves a lone CR bare where lines end with LF (3.11).
    row = csv.writer(out, delimiter=delimiter, lineterminator="\r\n").writerow(cells)
    return str(row)[:-2] + eol


def cell_text(cell: str) -> str:
    """Return a cell with what is not UTF-8 read as Excel's code page."""
    if cell.isascii():
        return cell
    try:
        cell.encode()
        return cell
    except UnicodeEncodeError:
        return cell.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def count_in(cell: str) -> int:
    """Return the number that a spreadsheet left of a count; 0 for none."""
    if cell.isdecimal() and len(cell) < 16:
        return int(cell)
    number = re.fullmatch(r"\s*(\d{1,15})(?:\.0*)?\s*", cell, re.ASCII)
    return int(number[1]) if number else 0


def text_in(cell: str) -> str:
    """Return the text that somebody wrote, of a cell of TEXTS."""
    if cell[:1] != "'" and cell.isascii():
        return cell
    return unescape_formula(cell_text(cell))


def time_in(cell: str) -> str:
    """Return the time that a spreadsheet left of a time; "" for none."""
    if not cell or _TIME.fullmatch(cell):
        return cell
    when = re.fullmatch(
        r"\s*(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.\d+)?Z?\s*", cell, re.ASCII)
    return f"{when[1]}T{when[2]}Z" if when else ""


# ---------------------------------------------------------------------------
# Store: the event log, and the register it comes to
# ---------------------------------------------------------------------------
# The only code that touches the log, the register, its .bak and its lock file. What
# happens to a tag is one appended line; settle writes the register anew from what
# stands there and from the lines since the last time. Another kind of event costs
# one row in EVENTS.

EVENT_COLUMNS = ("time", "event", "id", "hits", "opens", "verdict", "reason",
                 "address", "detail")
EVENT_HEADER = ",".join(EVENT_COLUMNS).encode() + b"\n"
LINKS_HEADER = b"link,url,created\n"
JUDGED = ("hit", "clicked")  # events with a verdict
OPENS = ("human", "proxy")  # verdicts on hits that are opens, but for these reasons:
NO_OPENS = ("repeat", "opened")

SAVING = 2.0        # seconds without a change until a person's save is complete
LOOK_EVERY = 1.0    # seconds between two settles, or more where one costs more:
SETTLE_SHARE = 0.03  # it may take this share of the time, by its own CPU seconds
COPY = "copy of "   # before the id of a row that stands twice
WATCHED = 8         # replaced versions that someone may still be writing into
LOCK_SECONDS = 10.0  # that a command waits for another one
UNSETTLED = 600.0   # seconds after which a hit is in the register for sure
HEARING = 0.008     # seconds at once in which others' lines are taken
MAX_WAITING = 10000  # lines held in memory while the disk refuses them
NEWS_BLOCK = 1 << 16  # bytes of others' lines taken at once: 1 ms


class Event(NamedTuple):
    """One thing that happened to a tag: a line of the event log.

    hits and opens are the tag's own counts after it, None where the writer does not
    know them. A "verdict" judges anew the hit or click with its time, address and
    detail.
    """

    time: str
    event: str                      # a key of EVENTS
    id: str                         # of a forgotten tag its hash
    hits: Optional[int] = None
    opens: Optional[int] = None
    verdict: str = ""
    reason: str = ""
    address: str = ""
    detail: str = ""                # User-Agent of a hit; see EVENTS

    def line(self) -> bytes:
        """Return the event as one line of CSV."""
        when, event, tag_id, hits, opens, verdict, reason, address, detail = self
        if not _PLAIN.fullmatch(detail):
            detail = _detail_cell(detail)
        return (f"{when},{event},{tag_id},{'' if hits is None else hits},"
                f"{'' if opens is None else opens},{verdict},{reason},{address},"
                f"{detail}\n").encode()


class Tag(NamedTuple):
    """What is known of a tag: the program's own cells of its row."""

    hits: int = 0
    last_hit: str = ""
    opens: int = 0
    last_open: str = ""
    created: str = ""
    sent: str = ""
    status: str = ""  # of its mail, one of STATUSES
    name: str = ""


@lru_cache(maxsize=4096)
def _detail_cell(text: str) -> str:
    """Return text as a cell of CSV without control characters or formulas."""
    cell = escape_formula(clean(text))
    return '"' + cell.replace('"', '""') + '"' if re.search('[,"]', cell) else cell


@lru_cache(maxsize=1024)
def _detail_text(cell: str) -> Optional[str]:
    """Return the text of what _detail_cell returned; None where it is cut off."""
    if cell[:1] == '"':
        if cell.count('"') % 2 or cell[-1] != '"':
            return None
        cell = cell[1:-1].replace('""', '"')
    return unescape_formula(cell) if cell[:1] == "'" else cell


def event_cells(line: bytes) -> List[str]:
    """Return the texts of a line; none for the header and for most broken lines."""
    cells = line.decode("utf-8", "replace").rstrip("\r\n").split(",", 8)
    if len(cells) != len(EVENT_COLUMNS) or not _TIME.fullmatch(cells[0]):
        return []
    if cells[8][:1] in ('"', "'"):  # the only cell that can hold a comma or a quote
        detail = _detail_text(cells[8])
        if detail is None:
            return []
        cells[8] = detail
    return cells


def parse_event(line: bytes) -> Optional[Event]:
    """Return the event of a line; None for the header and for a broken line."""
    cells = event_cells(line)
    if not cells:
        return None
    when, event, tag_id, hits, opens, verdict, reason, address, detail = cells
    try:
        return Event(when, event, tag_id, int(hits) if hits else None,
                     int(opens) if opens else None, verdict, reason, address, detail)
    except ValueError:
        return None


def is_open(verdict: str, reason: str) -> bool:
    """Tell whether a hit or click that is so judged is a new open."""
    return verdict in OPENS and reason not in NO_OPENS


def click_detail(link: str, agent: str) -> str:
    """Return the detail of a click."""
    return f"{link} {agent}".rstrip()


def agent_of(event: Event) -> str:
    """Return the User-Agent in the detail of a hit or click."""
    return event.detail[LINK_LENGTH + 1:] if event.event == "clicked" else event.detail


EVENTS = {
    "made": "the tag was made; the detail is its name",
    "queued": "its mail waits to be sent; the detail is the campaign",
    "sending": "its mail is being handed over: it may have gone or not",
    "sent": "its mail was handed over; the detail is the mail server's answer",
    "answered": "a mail program was told that its mail went out to all",
    "failed": "its mail was refused; the detail is the mail server's answer",
    "delayed": "a mail server is still trying to deliver its mail",
    "bounced": "its mail came back",
    "replied": "a person has answered its mail",
    "autoreply": "a machine has answered its mail",
    "read": "a receipt says that its mail was shown to somebody",
    "unsubscribed": "its recipient wants no more mail",
    "skipped": "its recipient was left out of a mailing; the detail is the campaign",
    "hit": "its pixel was fetched; the detail is the User-Agent",
    "clicked": "a link was followed; the detail is the link and the User-Agent",
    "verdict": "an earlier hit is judged anew",
    "reminder": "a notice has said that no open of its mail was seen",
    "count": "counts from elsewhere; time and detail are the last hit and open",
    "forget": "all that was known of it is removed",
}


# The states of a mail, each later than those before it.
STATUSES = ("queued", "sending", "failed", "sent", "delayed", "replied", "bounced",
            "unsubscribed")
_RANKS = {status: rank for rank, status in enumerate(STATUSES, 1)}


def advanced(status: str, new: str) -> str:
    """Return the later status; only what was being sent may wait again."""
    is_back = (status, new) == ("sending", "queued")
    return new if is_back or _RANKS.get(new, 0) > _RANKS.get(status, 0) else status


def after(tag: Tag, event: Event) -> Tag:
    """Return what an event makes of a tag; an older one changes no counts.

    A sent without an answer is a claim of newtag --armed: nothing was handed over.
    """
    hits, last_hit, opens, last_open, created, sent, status, name = tag
    kind = event.event
    if kind == "made":
        created, name = event.time, event.detail
    elif kind in _RANKS:
        sent = event.time if kind in ("sending", "sent") else sent
        status = status if kind == "sent" and not event.detail else advanced(
            status, kind)
    elif event.hits is not None and event.opens is not None and event.hits >= hits:
        hits, opens = event.hits, event.opens
        if kind in JUDGED:
            last_hit = max(last_hit, event.time) if kind == "hit" else last_hit
            if is_open(event.verdict, event.reason):
                last_open = max(last_open, event.time)
        elif kind == "count":
            last_hit, last_open = event.time if hits else "", time_in(event.detail)
    return Tag(hits, last_hit, opens, last_open, created, sent, status, name)


# -- the files ----------------------------------------------------------------

class Files:
    """Where all that belongs to one register lies; symbolic links are followed.

    The log of register.csv is register.events.csv where no other is named.
    """

    def __init__(self, register: str, log: str = "") -> None:
        path = self.register = os.path.realpath(register)
        stem, extension = os.path.splitext(path)
        self.log = os.path.realpath(log or f"{stem}.events{extension or '.csv'}")
        self.links = f"{stem}.links{extension or '.csv'}"  # where clicks lead
        self.bak = path + ".bak"    # the version that was replaced last
        self.old = path + ".old"    # the register while it is being exchanged
        self.new = path + ".new"    # the register that is being written
        self.versions = path, self.old, self.bak  # the newest first
        self.lock = path + ".lock"  # of the one server; carries the marks
        self.orig = path + ".orig"  # the first one not in this program's form
        self.key = stem + ".key"    # the dashboard's secret

    def shown(self, text: str) -> str:
        """Return text without the folders of these files: strangers may read it."""
        for path in (self.register, self.log):
            folder = os.path.dirname(path)
            text = text.replace(folder.rstrip("/") + "/", "").replace(folder, "folder")
        return text


class Stamp(NamedTuple):
    """Which version of a file this is; an empty one is of no file."""

    inode: int = 0
    size: int = 0
    mtime: int = 0  # nanoseconds


class Place(NamedTuple):
    """Up to where the log has been read: a byte of one of its files."""

    inode: int = 0
    offset: int = 0
    check: int = 0  # of the bytes before it: a file cut and grown again differs


class Marks(NamedTuple):
    """Which versions of register and .bak hold the log up to which place."""

    register: Stamp = Stamp()
    bak: Stamp = Stamp()
    log: Place = Place()


def stamp_of(file: Any) -> Stamp:
    """Return the stamp of a path or descriptor."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return Stamp()
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


_MARKS_AT = 32  # in the lock file, behind the server's process and version


def read_marks(files: Files) -> Marks:
    """Return the marks; empty ones where there are none."""
    try:
        with open(files.lock, "rb") as file:
            file.seek(_MARKS_AT)
            numbers = [int(word) for word in file.readline().split()]
    except (FileNotFoundError, PermissionError, ValueError):
        numbers = []
    return Marks(Stamp(*numbers[:3]), Stamp(*numbers[3:6]), Place(*numbers[6:9]))


def write_marks(files: Files, marks: Marks) -> None:
    """Put down the marks, in one write; the register's lock is held."""
    line = " ".join(str(number) for part in marks for number in part)
    with _opened(files.lock, os.O_RDWR | os.O_CREAT) as file:
        os.pwrite(file, f"{line:<191}\n".encode(), _MARKS_AT)


@contextmanager
def server_lock(files: Files) -> Iterator[None]:
    """Be the one server of a register, or raise TrackerError."""
    with _opened(files.lock, os.O_RDWR | os.O_CREAT) as file:
        if not _has_lock(file):
            number = (os.pread(file, _MARKS_AT, 0).decode().split() or "?")[0]
            raise TrackerError(f"a server uses this register already: process {number}")
        os.pwrite(file, f"{f'{os.getpid()} {__version__}':31}\n".encode(), 0)
        yield


def server_of(files: Files) -> List[str]:
    """Return the process and the version of a register's server; none if none runs."""
    with suppress(FileNotFoundError), _opened(files.lock) as file:
        if not _has_lock(file):
            return os.pread(file, _MARKS_AT, 0).decode().split()
    return []


@contextmanager
def lock_of(patience: float, *paths: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Hold the lock of the first of some files that is there, and have it open.

    It is the flock of the file's inode, so after waiting the name is looked at again.
    Never lockf: closing any other descriptor drops it, and LibreOffice's save fails.
    -1 comes where it was not to be had.
    """
    deadline = time.monotonic() + patience
    while True:
        with ExitStack() as stack:
            file, is_held = -1, False
            with suppress(FileNotFoundError):  # just being exchanged
                path = next(filter(os.path.exists, paths), paths[0])
                file = stack.enter_context(_opened(path, flags))
                is_held = _has_lock(file) and stamp_of(file)[0] == stamp_of(path)[0]
            if is_held or time.monotonic() >= deadline:
                yield file if is_held else -1
                return
        time.sleep(0.02)


def _has_lock(file: int) -> bool:
    """Take the lock of an open file, if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


@contextmanager
def _opened(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a regular file for some work."""
    file = os.open(path, flags | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise TrackerError(f"{path} is not a regular file")
        yield file
    finally:
        os.close(file)


def sync_data(file: int) -> None:
    """Bring the contents of an open file to the disk itself."""
    getattr(os, "fdatasync", os.fsync)(file)


def sync_folder(path: str) -> None:
    """Bring the names in a folder to the disk."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_whole(file: int, data: bytes) -> None:
    """Write all of data; raise OSError where that is impossible."""
    while data:
        data = data[os.write(file, data):]


# -- reading and appending to the log -------------------------------------------

def log_files(path: str) -> List[str]:
    """Return the files of a log, the oldest first and path itself last.

    Numbers do not tell the order: ours grow, those of logrotate are passed on.
    """
    folder, name = os.path.split(path)
    pattern = re.compile(re.escape(name) + r"[.-]\d{1,9}")
    old = [os.path.join(folder, entry) for entry in os.listdir(folder or ".")
           if pattern.fullmatch(entry)]
    old.sort(key=lambda name: stamp_of(name).mtime)
    return old + [path] * os.path.exists(path)


def _lines_in(path: str, start: int = 0) -> Iterator[Tuple[int, bytes]]:
    """Yield the whole lines of a file from an offset on, each with its own."""
    with _opened(path) as number:
        yield from _lines_of(number, start)


def _lines_of(number: int, start: int) -> Iterator[Tuple[int, bytes]]:
    """Yield the lines of an open file, as _lines_in does."""
    with open(os.dup(number), "rb") as file:
        file.seek(start)
        for line in file:
            if line.endswith(b"\n"):
                yield start, line
                start += len(line)


def lines_of_log(path: str, word: bytes = b"") -> Iterator[bytes]:
    """Yield the whole lines with a word of a log's files, the oldest first."""
    for name in log_files(path):
        rest = b""
        with suppress(FileNotFoundError), _opened(name) as file:  # rotated just now
            for block in iter(lambda: os.read(file, 1 << 18), b""):
                lines, _, rest = (rest + block).rpartition(b"\n")
                if word in lines:
                    yield from [line for line in lines.split(b"\n") if word in line]


def read_log(path: str, word: bytes = b"") -> Iterator[Event]:
    """Yield the events of all files of a log whose lines have a word."""
    return filter(None, map(parse_event, lines_of_log(path, word)))


def append_events(files: Files, events: Iterable[Event], settled: Place = Place()
                  ) -> Place:
    """Append events in whole lines and bring them to the disk.

    Return settled, and for what the register holds already the place behind them, if
    settled was the log's end before. Raise OSError when it is impossible; some of
    them may then be in the log.
    """
    return append_lines(files, map(Event.line, events), settled)


def append_lines(files: Files, lines: Iterator[bytes], settled: Place) -> Place:
    """Append whole lines, as append_events does."""
    block = b"".join(islice(lines, 5000))
    if not block:
        return settled
    with _log_to_append(files.log) as file:
        log = stamp_of(file)
        end, block = log.size, _before_next(file) + block
        while block:
            write_whole(file, block)
            end += len(block)
            block = b"".join(islice(lines, 5000))
        sync_data(file)
        if settled[:2] in ((log.inode, log.size), (0, log.size)) \
                and end == os.fstat(file).st_size:
            return place_at(file, end)  # nobody else has written
    return settled


@contextmanager
def _log_to_append(path: str) -> Iterator[int]:
    """Open the log for a command, and no other command at it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    with lock_of(LOCK_SECONDS, path, flags=flags) as file:
        if file < 0:
            raise TrackerError(f"another command holds {path}; end it, or try again")
        yield file


def _before_next(file: int, header: bytes = EVENT_HEADER) -> bytes:
    """Return what must stand between the end of a log and its next line."""
    size = os.fstat(file).st_size
    if not size:
        return header
    return b"" if os.pread(file, 1, size - 1) == b"\n" else b"\n"


class Journal:
    """What the log says, from a place on: tags, and the hashes of forgotten ones.

    Where that place is no longer in the log, all of it is read and is_whole is true.
    """

    def __init__(self, path: str, place: Place = Place()) -> None:
        self.tags: Dict[str, Tag] = {}
        self.forgotten: Set[str] = set()
        self.exact: Set[str] = set()  # tags whose last open was put right
        self.place, self.is_whole = Place(), True
        names: List[str] = []
        while names != log_files(path):  # rotated meanwhile: once more
            names = log_files(path)
            with suppress(FileNotFoundError):
                self._read_all(names, place)

    def _read_all(self, names: Sequence[str], place: Place) -> None:
        """Read the files of the log, from a place on if it is in one of them."""
        known = [n for n, name in enumerate(names) if _has(name, place)]
        start = place.offset if known else 0
        self.is_whole = not start
        for name in names[known[0] if known else 0:]:
            self._read(name, start)
            start = 0

    def _read(self, name: str, start: int) -> None:
        """Read one file from an offset on."""
        for start, line in _lines_in(name, start):
            event = parse_event(line)
            start += len(line)
            if event and event.event == "forget":
                self.forgotten.add(event.id)
            elif event and event.event in EVENTS:
                self.tags[event.id] = after(self.tags.get(event.id) or Tag(), event)
                if event.event == "count":
                    self.exact.add(event.id)
        with _opened(name) as file:
            self.place = place_at(file, start)


def place_at(file: int, offset: int) -> Place:
    """Return the place at an offset of an open log."""
    start = max(0, offset - 256)
    check = crc32(os.pread(file, offset - start, start))
    return Place(os.fstat(file).st_ino, offset, check)


def end_of_log(path: str) -> Place:
    """Return the place behind all that a log says by now."""
    with suppress(FileNotFoundError), _opened(path) as file:
        return place_at(file, os.fstat(file).st_size)
    return Place()


def _has(name: str, place: Place) -> bool:
    """Tell whether a place is in a file of the log."""
    with _opened(name) as file:
        return place_at(file, place.offset) == place


def events_behind(path: str, place: Place, since: str
                  ) -> Iterator[Tuple[int, int, Event]]:
    """Yield the events of a log behind a place, with open file and offset behind each.

    The place may be in a copy of its file. Where forget has changed the bytes before
    it, or it is in no file any more, since tells what is new: the time of the last hit.
    """
    with ExitStack() as stack:
        files = _log_from(path, place, stack)
        is_known = bool(files) and _is_at(files[0], place)
        for file in files:
            stamp = stamp_of(file)
            is_same = stamp.inode == place.inode and stamp.size >= place.offset
            first = place.offset if is_known and file == files[0] else 0
            for start, line in _lines_of(file, first):
                event = parse_event(line)
                if event and (is_known or event.time > since or (
                        start >= place.offset if is_same else event.time == since)):
                    yield file, start + len(line), event


def _log_from(path: str, place: Place, stack: ExitStack) -> List[int]:
    """Open the files of a log from a place on, the oldest first, between rotations."""
    while True:
        files: List[int] = []
        with suppress(FileNotFoundError):  # rotated just now
            for name in reversed(log_files(path)):
                files.insert(0, stack.enter_context(_opened(name)))
                if _is_at(files[0], place):
                    break
            if [stamp_of(file).inode for file in files] == [
                    stamp_of(name).inode for name in log_files(path)[-len(files):]]:
                return files


def _is_at(file: int, place: Place) -> bool:
    """Tell whether a place is in an open file, or was copied there."""
    found = place_at(file, place.offset)
    return found == place or found[1:] == place[1:] \
        and place.offset > len(EVENT_HEADER)  # which all files have


@lru_cache(maxsize=4096)
def hash_of(tag_id: str) -> str:
    """Return what stays of the id of a forgotten tag."""
    from hashlib import blake2b

    return blake2b(tag_id.encode(), digest_size=12).hexdigest()


# -- the register as it should stand --------------------------------------------

class Making(NamedTuple):
    """How tags are made: when, and what each has in which columns, its id first."""

    created: str
    sent: str = ""
    status: str = ""  # "" where there is no mail
    detail: str = ""  # of the event that says so
    columns: Sequence[str] = ("id", "name")

    def needed(self) -> List[str]:
        """Return which of LATER_COLUMNS a register must have for them."""
        return [c for c in LATER_COLUMNS if c in self.columns
                or self.status and c in ("sent", "status")]

    def lines(self, tags: Iterable[Sequence[str]]) -> Iterator[bytes]:
        """Yield the lines with which tags begin in the log."""
        name_at = self.columns.index("name")
        line = Event(self.created, "made", "{0}", 0, 0, detail="{1}").line().decode()
        if self.sent or self.status:
            line += Event(self.sent or self.created, self.status or "sent", "{0}", 0, 0,
                          detail=self.detail).line().decode()
        for tag in tags:
            name = tag[name_at]
            detail = name if _PLAIN.fullmatch(name) else _detail_cell(name)
            yield line.format(tag[0], detail).encode()


class Register(Table):
    """A register as it stands: a table with the program's own columns."""

    def __init__(self, source: Any, name: str) -> None:
        super().__init__(source, name)
        self.is_empty = not self.columns
        if self.is_empty:
            self.columns, self.is_headed = list(OWN_COLUMNS), False
        self.at = {column: self.columns.index(column)
                   for column in (*OWN_COLUMNS, *LATER_COLUMNS)
                   if column in self.columns}
        self._own = [self.at.get(column, -1) for column in Tag._fields]
        self._records: Optional[Dict[str, str]] = None
        if "id" not in self.at or len(self.at) < 2 or "event" in self.columns[:2]:
            self.close()
            raise TrackerError(f"{name}, line 1: no header row with an id column; "
                               "put it back")

    def cell(self, cells: Sequence[str], column: str) -> str:
        """Return the cell of a column; "" where there is none."""
        at = self.at.get(column, len(cells))
        return cells[at] if at < len(cells) else ""

    def tag(self, cells: Sequence[str]) -> Tag:
        """Return what a row says of its tag."""
        width = len(cells)
        hits, last_hit, opens, last_open, created, sent, status, name = [
            cells[at] if 0 <= at < width else "" for at in self._own]
        return Tag(count_in(hits), time_in(last_hit), count_in(opens),
                   time_in(last_open), time_in(created), time_in(sent), status,
                   text_in(name))

    def is_row(self, tag_id: str, cells: Sequence[str]) -> bool:
        """Tell whether cells are a tag's.

        A row that lacks some may have been cut off, and its id may be half of one.
        """
        return is_id(tag_id) and (len(cells) >= len(self.columns)
                                  or len(tag_id) in (ID_LENGTH, 40))

    def filled(self, cells: List[str], width: int) -> List[str]:
        """Return so many cells; those of no tag's row without their id."""
        tag_id = self.cell(cells, "id")
        is_row = self.is_row(tag_id, cells)
        cells = cells + [""] * (width - len(cells))
        cells[self.at["id"]] = tag_id if is_row else ""
        return cells

    def new_rows(self, making: Making, tags: Iterable[Sequence[str]]) -> str:
        """Return the rows of new tags."""
        places = {c: "{%d}" % n for n, c in enumerate(making.columns)}
        blank = {"hits": "0", "opens": "0", "created": making.created,
                 "sent": making.sent, "status": making.status, **places}
        row = self.delimiter.join(blank.get(c, "") for c in self.columns) + self.eol
        is_plain, fill = _PLAIN.fullmatch, row.format
        return "".join([fill(*[
            text if is_plain(text) else self.quoted(escape_formula(text))
            for text in tag]) for tag in tags])

    def cells(self, raw: str) -> List[str]:
        """Return the cells of one record."""
        return next(csv.reader([raw.replace("\0", "")], delimiter=self.delimiter), [])

    def by_id(self) -> Dict[str, str]:
        """Return the records of tags, once more when asked again."""
        if self._records is None:
            self._records = {}
            for raw, cells in self:
                tag_id = bare_id(self.cell(cells, "id"))
                if is_id(tag_id):
                    self._records.setdefault(tag_id, raw)
        return self._records


def bare_id(cell: str) -> str:
    """Return the id in a cell, also of a row that stands twice."""
    cell = cell.strip()
    return cell[len(COPY):] if cell.startswith(COPY) else cell


def newest(versions: Sequence[Optional[Tag]], is_exact: bool = False) -> Tag:
    """Return what is right where several versions speak of one tag.

    The one with the most hits, then with the latest of them, then the first; one that
    does not know when that was is the newest. Times never go back, unless the first
    version has put the last open right.
    """
    known = [tag for tag in versions if tag]
    best = max(known, key=lambda tag: (tag.hits, tag.last_hit or "unknown"))
    last_open = best.last_open if is_exact and best is versions[0] else max(
        tag.last_open for tag in known)
    created = sent = status = name = ""
    for tag in known:
        created, sent = created or tag.created, sent or tag.sent
        name = name or tag.name
    for tag in reversed(known):  # the log has the last word
        status = advanced(status, tag.status) if status else tag.status
    if status == "sending" and (best.hits or best.opens):
        status = "sent"  # as it was fetched
    return Tag(best.hits, max(tag.last_hit for tag in known) if best.hits else "",
               best.opens, last_open if best.opens else "", created, sent, status, name)


class Merger:
    """The records of a register as they should stand, in one pass.

    Where the journal goes on from the register, only its own tags are looked at; else
    all are, and another version of the register is asked as well. After the
    iteration, changed tells whether anything differs from what stands there, dropped
    whether forgotten tags were in it, unheard what the log does not know.
    """

    def __init__(self, source: Register, journal: Journal, fits: bool,
                 other: Optional[Register] = None, wanted: Collection[str] = ()
                 ) -> None:
        self.source, self._journal, self._fits = source, journal, fits
        self.place = journal.place
        self._other, self._others_rows = other, other.by_id() if other else {}
        self._seen: Set[str] = set()
        added = [c for c in OWN_COLUMNS if c not in source.at]
        wanted = {*wanted, *(other.at if other else ()), *(
            c for tag in journal.tags.values() for c in ("sent", "status")
            if getattr(tag, c))}
        added += [c for c in LATER_COLUMNS if c in wanted and c not in source.at]
        self.columns = [*source.columns, *added]
        self.at = {**source.at, **{c: self.columns.index(c) for c in added}}
        self._own = itemgetter(*(self.at[column] for column in OWN_COLUMNS[:-1]))
        self._later = [self.at.get(column, -1) for column in ("sent", "status")]
        self.changed = bool(added) or not source.is_headed
        self.dropped = False
        self.unheard: List[Event] = []

    def rows(self) -> Iterator[List[str]]:
        """Yield the cells of each record, straight from the file if all is settled."""
        if self._is_quick() and not self._journal.tags:
            return self.source.rows()
        return (cells for _, cells in self)

    def _is_quick(self) -> bool:
        """Tell whether only what is new has to be looked at."""
        return self._fits and not self.changed and not self._journal.forgotten

    def head(self) -> str:
        """Return what stands before the first row."""
        source, width = self.source, len(self.columns)
        if not source.is_headed:
            return source.lead + source.record(self.columns)
        titles = source.cells(source.header)
        changes = {place: column for place, column in enumerate(self.columns)
                   if place >= len(titles) or titles[place].strip().lower() in _ALIASES}
        return source.lead + source.changed(source.header, width, changes)

    def __iter__(self) -> Iterator[Tuple[str, List[str]]]:
        """Yield the text and the cells of each record behind the header."""
        at, news, raw = self.source.at["id"], self._journal.tags, ""
        is_quick = self._is_quick()
        for raw, cells in self.source:
            tag_id = cells[at] if len(cells) > at else ""
            if is_quick and tag_id not in news:
                yield raw, cells
            else:
                yield from self._row(tag_id.strip(), raw, cells)
        for tag_id in list(dict.fromkeys(chain(news, self._others_rows))):
            if is_id(tag_id) and not self._is_forgotten(tag_id):
                if raw and not raw.endswith(("\n", "\r")):
                    yield self.source.eol, []
                raw = ""
                yield self._restored(tag_id)

    def _row(self, tag_id: str, raw: str, cells: List[str]
             ) -> Iterator[Tuple[str, List[str]]]:
        """Yield a record with what is known of its tag, or nothing."""
        if self._is_forgotten(bare_id(tag_id)):
            self.changed = self.dropped = True
        elif not self.source.is_row(tag_id, cells):
            yield raw, cells
        elif tag_id in self._seen:
            yield self._written(raw, cells, {"id": COPY + tag_id})
        else:
            self._seen.add(tag_id)
            yield self._merged(tag_id, raw, cells)

    def _is_forgotten(self, tag_id: str) -> bool:
        forgotten = self._journal.forgotten
        return bool(forgotten) and hash_of(tag_id) in forgotten

    def _merged(self, tag_id: str, raw: str, cells: List[str]
                ) -> Tuple[str, List[str]]:
        """Return a record with the newest counts of its tag."""
        log = self._journal.tags.pop(tag_id, None)
        old = self._others_rows.pop(tag_id, "")
        if log and old in ("", raw) and self._says(tag_id, cells, log):
            return raw, cells
        row = self.source.tag(cells)
        others = self._other.cells(old) if self._other and old else []
        other = self._other.tag(others) if self._other and old else None
        tag = newest([log, row, other], tag_id in self._journal.exact)
        if not self._fits:
            self._tell(tag_id, tag, log)
        wanted = self._cells(tag_id, tag)
        if self._other:  # whose columns may be missing here
            wanted.update((c, self._other.cell(others, c)) for c in self._other.at
                          if c not in (*self.source.at, *wanted))
        return self._written(raw, cells, wanted)

    def _says(self, tag_id: str, cells: List[str], log: Tag) -> bool:
        """Tell at a glance that a row says what the log says, as most do."""
        hits, last_hit, opens, last_open, created, sent, status, _ = log
        return len(cells) == len(self.columns) and self._own(cells) == (
            tag_id, str(hits), last_hit, str(opens), last_open,
            created or cells[self.at["created"]]) and [sent, status] == [
                cells[at] if at >= 0 else "" for at in self._later]

    def _tell(self, tag_id: str, tag: Tag, log: Optional[Tag]) -> None:
        """Note what the log does not know: ids and counts from elsewhere."""
        now = utc_text(time.time())
        if not log:
            self.unheard.append(Event(tag.created or now, "made", tag_id,
                                      detail=tag.name))
        if tag.hits > (log.hits if log else 0) or tag.opens and not log:
            self.unheard.append(Event(tag.last_hit or now, "count", tag_id,
                                      tag.hits, tag.opens, detail=tag.last_open))

    def _cells(self, tag_id: str, tag: Tag) -> Dict[str, str]:
        """Return the program's own cells for a tag, by column."""
        cells = {"id": tag_id, "hits": str(tag.hits), "last_hit": tag.last_hit,
                 "opens": str(tag.opens), "last_open": tag.last_open, "sent": tag.sent,
                 **{c: getattr(tag, c) for c in ("created", "status")
                    if getattr(tag, c)}}
        if "name" not in self.source.at:
            cells["name"] = escape_formula(tag.name)
        return cells

    def _written(self, raw: str, cells: List[str], wanted: Mapping[str, str]
                 ) -> Tuple[str, List[str]]:
        """Return a record with some cells; as it is, where it has them."""
        width = len(self.columns)
        if len(cells) < width:
            cells = cells + [""] * (width - len(cells))
        changes = {self.at[column]: text for column, text in wanted.items()
                   if column in self.at and cells[self.at[column]] != text}
        if not changes and width == len(self.source.columns):
            return raw, cells
        self.changed = True
        for place, text in changes.items():
            cells[place] = text
        return self.source.changed(raw, width, changes), cells

    def _restored(self, tag_id: str) -> Tuple[str, List[str]]:
        """Return the record of a tag from the other version, else from the log."""
        self.changed = True
        cells, old = dict.fromkeys(distinct(self.columns), ""), ""
        if self._other:
            old = self._others_rows.get(tag_id, "")
            cells.update((column, cell) for column, cell in zip(
                distinct(self._other.columns), self._other.cells(old))
                if column in cells)
        log = self._journal.tags.get(tag_id)
        cells["name"] = cells["name"] or escape_formula(log.name if log else "")
        row = list(cells.values())
        return self._merged(tag_id, self.source.record(row), row)

    def tags(self) -> Iterator[Tuple[str, Tag]]:
        """Yield ids and tags; the many that were never hit share their objects."""
        width = len(self.columns)
        blanks: Dict[Tuple[str, str, str], Tag] = {}
        for cells in self.rows():
            if len(cells) < width:
                cells = self.source.filled(cells, width)
            tag_id, hits, last_hit, opens, last_open, created = self._own(cells)
            if not is_id(tag_id):
                continue
            sent, status = [cells[at] if at >= 0 else "" for at in self._later]
            is_blank = hits == opens == "0"
            tag = blanks.get((created, sent, status)) if is_blank else None
            if not tag:
                same = last_open == last_hit
                tag = Tag(count_in(hits), last_hit, count_in(opens),
                          last_hit if same else last_open, created, sent, status)
                if is_blank:
                    blanks[created, sent, status] = tag
            yield tag_id, tag


def read_register(files: Files) -> Merger:
    """Return the register as it should stand, changing nothing; raise TrackerError."""
    while True:
        path = register_path(files)
        with suppress(FileNotFoundError), _opened(path) as file:
            marks = read_marks(files)
            fits = (stamp_of(file), stamp_of(files.bak)) == marks[:2]
            return merged(files, file, marks.log if fits else None,
                          files.bak if path != files.bak else "")


def register_path(files: Files) -> str:
    """Return where the register is now: for a moment it may have no name of its own.

    Raise TrackerError when there is none.
    """
    deadline = time.monotonic() + SAVING
    paths = files.register, files.old, files.bak
    while time.monotonic() < deadline and not any(map(os.path.exists, paths[:2])) \
            and any(map(os.path.exists, (files.bak, files.log))):
        time.sleep(0.01)
    for path in filter(os.path.exists, paths):
        return path
    maker = "settle" if os.path.exists(files.log) else "newtag"
    raise TrackerError(f"no such register: {files.register}; {maker} makes one")


def merged(files: Files, source: Any, place: Optional[Place], other: str,
           wanted: Collection[str] = ()) -> Merger:
    """Return the merger of a version with the log from a place on.

    None is for a version in no mark: then the whole log and another version count.
    Wanted are columns that it should have.
    """
    journal = Journal(files.log, place or Place())
    if place and place.inode and journal.is_whole:
        place = None  # that part of the log is gone
    if isinstance(source, int):
        source = os.dup(source)
        os.lseek(source, 0, os.SEEK_SET)
    register = Register(source, files.register)
    old = _readable(other) if place is None else None
    merger = Merger(register, journal, place is not None, old, wanted)
    if register.is_empty and old:  # a save that died after its first step
        merger = Merger(Register(other, other), journal, False, None, wanted)
        merger.changed = True
    return merger


def _readable(path: str) -> Optional[Register]:
    """Return an older version of the register, if it is one that helps."""
    try:
        register = Register(path, path)
        register.by_id()
        return register
    except (OSError, TrackerError):
        return None


def register_rows(files: Files, say: Callable[[str], None] = note
                  ) -> Tuple[List[str], Iterator[List[str]]]:
    """Return the columns of a register, and the cells of its tags as they are now.

    Counts are plain, times "" for never, names as they were given, every other cell
    as it stands. Nothing is changed. Raise TrackerError.
    """
    merger = read_register(files)
    return distinct(merger.columns), _tag_rows(merger, say)


def _tag_rows(merger: Merger, say: Callable[[str], None]) -> Iterator[List[str]]:
    """Yield the cells of tags, and tell people what is left out."""
    id_at, width = merger.at["id"], len(merger.columns)
    texts = [merger.at[column] for column in TEXTS if column in merger.at]
    left_out = line = 0
    has_id = _WHOLE_ID.fullmatch  # a million times, so not by is_id
    for cells in merger.rows():
        if len(cells) < width:
            cells = merger.source.filled(cells, width)
        if has_id(cells[id_at]):
            for at in texts:
                cell = cells[at]
                if cell[:1] == "'" or not cell.isascii():
                    cells[at] = text_in(cell)
            yield cells
        elif any(cells) and not cells[id_at].startswith(COPY):
            left_out, line = left_out + 1, line or merger.source.current_line()
    if left_out:
        say(f"{merger.source.name}: {plural(left_out, 'row')} left out, "
            f"the first in line {line}: no id")


def names_of(files: Files) -> Dict[str, str]:
    """Return the names of all tags by their ids."""
    columns, rows = register_rows(files)
    return dict(map(itemgetter(columns.index("id"), columns.index("name")),
                    progress(rows, "reading rows")))


# -- settling: the register anew ------------------------------------------------

def records(merger: Merger) -> Iterator[str]:
    """Yield the records of a register as they should stand."""
    return (raw for raw, _ in merger)


class Settler:
    """Write the register anew from the files alone; it may die at any step.

    It keeps the last versions that it replaced open: what somebody goes on writing
    into one of them is the newest.
    """

    def __init__(self, files: Files, columns: Collection[str] = ()) -> None:
        self.files = files
        self._columns = columns  # that the register should have as well
        self._kept: Dict[int, Stamp] = {}
        self._missing_since = 0.0

    def __del__(self) -> None:
        for file in self._kept:
            os.close(file)

    def settle(self, force: bool = False, patience: float = 0.0,
               edit: Callable[[Merger], Iterable[str]] = records) -> bool:
        """Bring register and log into step; False: not now, come again.

        What makes its records of a merger may change some, when forced. Raise
        TrackerError for a register that cannot be read, and OSError.
        """
        if os.path.exists(self.files.register):
            self._missing_since = 0.0
        elif not self._bring_back():
            return False
        with lock_of(patience, *self.files.versions) as file:
            return file >= 0 and self._settle(force, edit)

    def _bring_back(self) -> bool:
        """Wait for a register that is being saved, then put .bak in its place."""
        files, now = self.files, time.monotonic()
        if os.path.exists(files.old):
            return True
        self._missing_since = self._missing_since or now
        if now - self._missing_since < SAVING:
            return False
        try:
            os.link(files.bak, files.register)
            os.unlink(files.bak)
        except FileExistsError:
            pass  # it has just come back
        except FileNotFoundError:
            create_register(files)
        return True

    def _settle(self, force: bool, edit: Callable[[Merger], Iterable[str]] = records
                ) -> bool:
        """Settle, the lock being held."""
        import shutil

        files = self.files
        self._finish_exchange()
        marks, stamp, bak = read_marks(files), *map(stamp_of, (files.register,
                                                               files.bak))
        fits = (stamp, bak) == marks[:2]
        saved = self._saved(marks, stamp, bak)
        if fits and not saved and not force and not self._columns \
                and self._is_log_settled(marks.log):
            return True
        if any(abs(time.time() - version.mtime / 1e9) < SAVING for version in saved):
            return False
        version = max(saved, key=lambda save: save.mtime, default=stamp)
        source = saved.get(version, files.register)
        merger = merged(files, source, marks.log if fits and not saved else None,
                        files.bak if source == files.register else files.register,
                        self._columns)
        try:
            new = write_register(files.new, source, merger.source, chain(
                [merger.head()], edit(merger)))
            if stamp_of(source) != version:
                return False
            if merger.changed or force or source != files.register:
                if not marks.register.inode and not os.path.exists(files.orig):
                    shutil.copy2(files.register, files.orig)
                if not self._exchange(stamp):
                    return False
                stamp, bak = new, stamp
        finally:
            _remove(files.new)
        place = append_events(files, merger.unheard, merger.place)
        write_marks(files, Marks(stamp, bak, place))
        self._kept.update((file, version) for version, file in saved.items()
                          if isinstance(file, int))
        return not merger.dropped or self._settle(force=True)

    def _saved(self, marks: Marks, register: Stamp, bak: Stamp) -> Dict[Stamp, Any]:
        """Return the versions that somebody else has written, and where they are."""
        versions = {register: self.files.register, bak: self.files.bak}
        saved: Dict[Stamp, Any] = {
            stamp: path for stamp, path in versions.items()
            if stamp.inode and stamp not in marks[:2]}
        # What is older than .bak was overtaken by a save that is merged already.
        saved.update((stamp_of(file), file) for file, stamp in self._kept.items()
                     if stamp_of(file) != stamp and stamp_of(file).mtime > bak.mtime)
        return saved

    def _is_log_settled(self, place: Place) -> bool:
        """Tell whether the log ends at a place; one that is absent does."""
        log = stamp_of(self.files.log)
        return not log.inode or (log.inode, log.size) == place[:2]

    def _exchange(self, stamp: Stamp) -> bool:
        """Put the new register in the place of the old one, if that is this version.

        Never over what somebody else saves at this moment.
        """
        files = self.files
        os.rename(files.register, files.old)
        try:
            if stamp_of(files.old) != stamp:
                return False
            os.link(files.new, files.register)
            self._watch(files.old, stamp)
        except FileExistsError:
            return False
        finally:
            self._finish_exchange()
        with suppress(OSError):  # the names in the folder, safe from a power cut
            sync_folder(os.path.dirname(files.register))
        return True

    def _finish_exchange(self) -> None:
        """Leave the register and one older version, wherever an exchange has ended."""
        files = self.files
        try:
            os.link(files.old, files.register)
        except FileNotFoundError:
            pass  # nothing was begun
        except FileExistsError:
            if not os.path.samefile(files.old, files.register):  # else it stays double
                os.rename(files.old, files.bak)
        _remove(files.old)
        _remove(files.new)

    def _watch(self, path: str, stamp: Stamp) -> None:
        """Keep an eye on a version that somebody may still be writing into."""
        self._kept[os.open(path, os.O_RDONLY)] = stamp
        if len(self._kept) > WATCHED:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            os.close(oldest)


def write_register(path: str, like: Any, register: Register,
                   records: Iterable[str]) -> Stamp:
    """Write records to a new file, in another register's charset and for its owner.

    Return the new file's stamp.
    """
    status = os.stat(like)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(file, "w", encoding=register.encoding, errors="surrogateescape",
              newline="") as out:
        out.write(register.bom)
        out.writelines(records)
        out.flush()
        os.fchmod(file, stat.S_IMODE(status.st_mode))
        with suppress(PermissionError):
            os.fchown(file, status.st_uid, status.st_gid)
        # A second ago, so that whoever saves now leaves another time.
        os.utime(file, ns=(time.time_ns() - 10 ** 9,) * 2)
        os.fsync(file)
        return stamp_of(file)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def settle(files: Files, settler: Optional[Settler] = None) -> bool:
    """Bring the register up to date with the log; False where others are at it.

    Raise TrackerError or OSError.
    """
    settler, deadline = settler or Settler(files), time.monotonic() + 3 * SAVING
    while not settler.settle(patience=0.5):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def worker(files: Files, rotate: int = 0) -> None:
    """Settle whenever it is due, until standard input ends: a server's own process.

    A line on standard output says what is wrong, an empty one that all is well. What
    ends the server's group of processes leaves it the time for a last settle.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    settler, said, due = Settler(files), "", 0.0
    while not select.select([0], [], [], LOOK_EVERY)[0]:
        if time.monotonic() >= due:
            started = time.process_time()
            wrong = _try_to_settle(settler, rotate)
            spent = time.process_time() - started
            due = time.monotonic() + max(LOOK_EVERY, spent / SETTLE_SHARE)
            if wrong != said:
                os.write(1, (clean(wrong) + "\n").encode())
                said = wrong
    settle(files, settler)


def _try_to_settle(settler: Settler, rotate: int) -> str:
    """Settle once; return what is wrong, "" for nothing."""
    try:
        if settler.settle() and rotate and stamp_of(settler.files.log).size >= rotate:
            rotate_log(settler.files.log)
        return ""
    except (TrackerError, OSError, UnicodeError) as error:
        return explain(error)


def rotate_log(path: str) -> None:
    """Give the log the next number; the server begins a new one."""
    with _log_to_append(path) as file:
        sync_data(file)
        numbers = [int(re.split("[.-]", name)[-1]) for name in log_files(path)[:-1]]
        os.rename(path, f"{path}.{max(numbers, default=0) + 1}")


# -- making and forgetting tags -------------------------------------------------

def create_register(files: Files, columns: Collection[str] = ()) -> None:
    """Make an empty register, unless there is one; some columns are extra."""
    try:
        file = os.open(files.register, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with open(file, "w", encoding="utf-8") as out:
        out.write(csv_row([*OWN_COLUMNS, *columns]))
        out.flush()
        os.fsync(file)
        write_marks(files, Marks(stamp_of(file)))


def _ensure_register(files: Files, columns: Collection[str] = ()) -> None:
    """Make a register where none ever was; bring back one that is missing.

    A new one has some extra columns.
    """
    folder = os.path.dirname(files.register)
    if not os.path.isdir(folder):
        raise TrackerError(f"no such folder: {folder}")
    if not any(map(os.path.exists, (files.register, files.old, files.bak, files.log))):
        create_register(files, columns)
    elif not os.path.exists(files.register):
        settle(files)


def ensure_columns(files: Files, columns: Collection[str]) -> None:
    """Have a register, and in it some columns of LATER_COLUMNS if that can be now."""
    _ensure_register(files, columns)
    register = Register(files.register, files.register)
    register.close()
    if not register.at.keys() >= {*columns}:
        settle(files, Settler(files, columns))


def add_tags(files: Files, tags: Sequence[Sequence[str]], making: Making) -> None:
    """Append tags, each with its texts for the columns of their making: all or none.

    They are on the disk when this returns. Raise TrackerError or OSError.
    """
    needed = making.needed()
    _ensure_register(files, needed)
    if not (_added(files, tags, making) or settle(files, Settler(files, needed))
            and _added(files, tags, making)):
        raise TrackerError(f"{files.register} is being saved; try again")


def _added(files: Files, tags: Sequence[Sequence[str]], making: Making) -> bool:
    """Append tags; False where the register has not the columns for them."""
    with lock_of(LOCK_SECONDS, *files.versions) as locked:
        if locked < 0:
            raise TrackerError(f"another command holds {files.register}; "
                               "end it, or try again")
        marks = read_marks(files)
        register = _register_to_append(files, tags, marks)
        if not register.at.keys() >= {*making.needed()}:
            return False
        with _opened(files.register, os.O_RDWR | os.O_APPEND) as file:
            size, settled = os.fstat(file).st_size, stamp_of(file) == marks.register
            try:
                _append_rows(file, register, making, tags)
                place = append_lines(files, making.lines(tags), marks.log)
            except (OSError, TrackerError):
                os.ftruncate(file, size)
                erase(files.log, {tag[0] for tag in tags}.__contains__)
                raise
            if settled and (not making.sent or "sent" in register.at):
                write_marks(files, marks._replace(register=stamp_of(file), log=place))
    return True


def _register_to_append(files: Files, tags: Iterable[Sequence[str]], marks: Marks
                        ) -> Register:
    """Return the register, read to its end where that may be broken or in cp1252."""
    register = Register(files.register, files.register)
    if stamp_of(files.register) != marks.register:
        for _ in register:
            pass
    elif not all(text.isascii() for tag in tags for text in tag):
        register.is_cp1252 = register.encoding == "utf-8" \
            and not is_utf8(files.register)
    register.close()
    return register


def _append_rows(file: int, register: Register, making: Making,
                 tags: Sequence[Sequence[str]]) -> None:
    """Append the rows of tags to an open register, and sync it."""
    width = 1 if register.encoding == "utf-8" else 2
    size = os.fstat(file).st_size
    text = register.eol
    if not size:
        text = csv_row(OWN_COLUMNS)
    elif os.pread(file, width, size - width).strip(b"\0") in (b"\n", b"\r"):
        text = ""
    for first in range(0, len(tags), 10000):
        text += register.new_rows(making, tags[first:first + 10000])
        write_whole(file, text.encode(register.encoding, "surrogateescape"))
        text = ""
    os.fsync(file)


def edit_tag(settler: Settler, tag_id: str, texts: Mapping[str, str],
             shown: Mapping[str, str]) -> None:
    """Give the row of a tag another name, or other texts in columns of the user's.

    Columns are named as in register_rows, in form_text; every other byte of the
    register stays. To the log the tag was made by that name. Raise TrackerError, also
    where a text is no longer what was shown of it, or OSError.
    """
    found: List[Tuple[str, str]] = []

    def edited(merger: Merger) -> Iterator[str]:
        columns = [form_text(cell_text(name)) for name in distinct(merger.columns)]
        ours = {*OWN_COLUMNS, *LATER_COLUMNS} - {"name"}
        for column in {*texts} - ({*columns} - ours):
            raise TrackerError(f"no column {column} to edit")
        changes = {columns.index(column): text if column != "name"
                   and _NUMBER.fullmatch(text) else escape_formula(text)
                   for column, text in texts.items()}
        for raw, cells in merger:
            if [tag_id] == cells[merger.at["id"]:][:1]:
                _check_texts(dict(zip(columns, cells)), shown)
                found[:] = [(cells[merger.at["created"]], tag_id)]
                raw = merger.source.changed(raw, len(columns), changes)
            yield raw

    deadline = time.monotonic() + LOCK_SECONDS
    while not settler.settle(force=True, patience=1.0, edit=edited):
        if time.monotonic() >= deadline:
            raise TrackerError(f"{settler.files.register} is in use; try again")
        time.sleep(0.05)
    if not found:
        raise TrackerError(f"no such tag: {tag_id}")
    append_events(settler.files, [Event(created, "made", tag_id, detail=texts["name"])
                                  for created, _ in found
                                  if "name" in texts and is_time(created)])


def _check_texts(cells: Mapping[str, str], shown: Mapping[str, str]) -> None:
    """Raise TrackerError for a cell that is no longer what was shown of it."""
    for column, text in shown.items():
        if form_text(text_in(cells.get(column, ""))) != text:
            raise TrackerError(f"{column} was changed meanwhile; go back, copy what "
                               "you wrote, and reload the page")


def forget_tags(files: Files, ids: Collection[str]) -> None:
    """Take tags out of the register, its older versions and the log.

    A line with the hash of each id stays, so that no stale save brings it back.
    Raise TrackerError or OSError.
    """
    gone = frozenset(ids)
    now = utc_text(time.time())
    append_events(files, (Event(now, "forget", hash_of(tag_id)) for tag_id in gone))
    erase(files.log, gone.__contains__)
    settler, deadline = Settler(files), time.monotonic() + LOCK_SECONDS
    while _holds(files, gone) and time.monotonic() < deadline:
        if not settler.settle(force=True, patience=1.0):
            time.sleep(0.1)  # somebody is saving
    erase(files.log, gone.__contains__)
    if _holds(files, gone):
        raise TrackerError(f"{files.register} is in use: its rows go with the next "
                           "settle; close it elsewhere")
    _remove(files.register + ".twin")  # of the first version
    if os.path.exists(files.orig):
        new, old = files.orig + ".new", Register(files.orig, files.orig)
        _remove(new)
        write_register(new, files.orig, old, chain([old.lead + old.header], (
            raw for raw, cells in old if old.cell(cells, "id").strip() not in gone)))
        os.replace(new, files.orig)


def _holds(files: Files, gone: FrozenSet[str]) -> bool:
    """Tell whether the register or its last version still has one of some tags."""
    versions = map(_readable, (files.register, files.bak))
    return any(not gone.isdisjoint(version.by_id()) for version in versions if version)


def erase(path: str, is_gone: Callable[[str], bool], start: int = 0) -> None:
    """Overwrite the lines of some tags in a log with empty ones of the same length.

    So nobody who follows it loses the place. From start on only path itself is looked
    at, else all files of the log.
    """
    for name in [path] if start else log_files(path):
        with _opened(name, os.O_RDWR) as file:
            times = os.fstat(file)
            for offset, line in _lines_in(name, start):
                cells = line.split(b",", 3)
                if len(cells) > 3 and is_gone(cells[2].decode("utf-8", "replace")):
                    os.pwrite(file, b"%b%*b\n" % (b"," * 8, len(line) - 9, b""), offset)
            if name != path:  # whose age puts it in order
                os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


# -- the server's view ----------------------------------------------------------

class LogWriter:
    """The server's end of the log: appends lines, and hears what others append.

    The log may be moved, truncated or deleted at any time, and not be there yet.
    """

    def __init__(self, path: str, place: Place = Place(), sync_each_write: bool = False
                 ) -> None:
        self.path, self._place, self._sync_each_write = path, place, sync_each_write
        self._file = -1
        self.end = 0  # what stands before is known
        self.is_cut = False  # lines that were written may be in no file any more
        self.is_mixed = False  # what is not yet known has lines of our own in it
        self._torn = False  # the last write was cut short
        self._dirty = False  # something is not yet synced

    def look(self) -> None:
        """Go on with the file that the path names, once the old one is read.

        Raise OSError.
        """
        status = stamp_of(self.path)
        if self._file >= 0 and status.inode == stamp_of(self._file).inode:
            if status.size < self.end:
                self._restart()
        elif not self._unheard():
            self._open()

    def _open(self) -> None:
        self.is_cut = self.is_cut or self._file >= 0 \
            and not os.fstat(self._file).st_nlink
        with _opened(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as number:
            file = os.dup(number)
        if self._file >= 0:
            os.close(self._file)
        self._file = file
        is_known = place_at(file, self._place.offset) == self._place
        self.end = self._place.offset if is_known else 0
        self._torn = False
        before = _before_next(self._file)
        if before:
            self.write([before])

    def _restart(self) -> None:
        """Begin again with a log that was truncated, and give it its header."""
        self.end, self.is_cut = 0, True
        found = os.pread(self._file, len(EVENT_HEADER), 0)
        if not found:
            self.write([EVENT_HEADER])
        elif found != EVENT_HEADER and os.fstat(self._file).st_size < 1 << 20 \
                and _has_lock(self._file):
            with open(self.path, "rb") as file, open(self.path + ".new", "wb") as new:
                os.fchmod(new.fileno(), 0o600)
                new.write(EVENT_HEADER + file.read())
            os.replace(self.path + ".new", self.path)
            self._open()

    def _unheard(self) -> bytes:
        """Return the next whole lines, but not very many."""
        if self._file < 0 or os.fstat(self._file).st_size <= self.end:
            return b""
        block = os.pread(self._file, NEWS_BLOCK, self.end)
        is_junk = len(block) == NEWS_BLOCK and b"\n" not in block
        return block if is_junk else block[:block.rfind(b"\n") + 1]

    def news(self) -> Iterator[Tuple[int, Event]]:
        """Yield the next events, but not very many, and where their lines begin."""
        for line in self._unheard().splitlines(keepends=True):
            event = parse_event(line)
            self.end += len(line)
            if event:
                yield self.end - len(line), event

    def write(self, lines: List[bytes]) -> int:
        """Append lines with one write; return how many are in the log, whole.

        Raise OSError when that is impossible.
        """
        data = b"".join([b"\n", *lines] if self._torn else lines)
        written = os.write(self._file, data)
        self._dirty = True
        if self._sync_each_write:
            sync_data(self._file)
        if written < len(data):
            whole = data[:written].count(b"\n") - self._torn
            self._torn = data[written - 1:written] != b"\n"
            return max(whole, 0)
        self._torn = False
        # Where a write ends tells, without a look at the file, if we are alone.
        start = os.lseek(self._file, 0, os.SEEK_CUR) - written
        self.is_mixed = start != self.end
        if start == self.end:
            self.end += written
        elif start < self.end:
            self._restart()
        elif start and os.pread(self._file, 1, start - 1) != b"\n":
            os.write(self._file, b"\n" + lines[0])  # it hangs on a torn line
        return len(lines)

    def find(self, words: bytes) -> Optional[Event]:
        """Return the first event not yet heard whose line has some words."""
        for start in range(self.end, os.fstat(self._file).st_size, 1 << 20):
            block = os.pread(self._file, (1 << 20) + 4096, start)
            at = block.find(words)
            if at >= 0:
                line = block[block.rfind(b"\n", 0, at) + 1:]
                return parse_event(line[:line.find(b"\n") + 1])
        return None

    def sync(self) -> None:
        """Bring what was written to the disk; safe in a thread of its own."""
        if self._dirty:
            self._dirty = False
            with _opened(self.path) as file:
                sync_data(file)


class Links:
    """The destinations of links: what a file holds to which lines are only added.

    While it is missing they lead where they led; a file in its place counts alone.
    """

    _LINE = re.compile(
        rb'([%b]{%d}),"?((?i:https?)://[!#-~]{1,%d})"?,[\dTZ:-]{20}\r?\n' % (
            ID_ALPHABET.encode(), LINK_LENGTH, MAX_DESTINATION - 7))

    def __init__(self, path: str) -> None:
        self._path, self._urls = path, {}  # type: str, Dict[bytes, bytes]
        self._stamp, self._place = Stamp(), Place()  # of what was read, and up to where

    def hear(self) -> None:
        """Take in what is new; raise TrackerError or OSError."""
        stamp = stamp_of(self._path)
        if stamp in (self._stamp, Stamp()):
            return
        with _opened(self._path) as file:
            end = self._place.offset
            if stamp.size <= end or place_at(file, end) != self._place:
                self._urls, end = {}, 0
            for start, line in _lines_of(file, end):
                found = self._LINE.fullmatch(line)
                if found:
                    self._urls[found[1]] = found[2]
                end = start + len(line)
            self._place = place_at(file, end)
        self._stamp = stamp

    def find(self, link: bytes) -> bytes:
        """Return where a link leads; b"" for one that is not known."""
        with suppress(OSError, TrackerError):
            self.hear()
        return self._urls.get(link, b"")

    def add(self, urls: Iterable[str]) -> Dict[str, str]:
        """Return the links to some destinations; they are on the disk by then.

        A destination has the first that leads nowhere else. Raise TrackerError or
        OSError.
        """
        links, now = {}, utc_text(time.time())
        with _log_to_append(self._path) as file:
            for url in urls:
                self.hear()
                links[url] = link = next(
                    link for link in map(partial(link_id, url), range(999))
                    if self._urls.get(link.encode(), b"") in (b"", url.encode()))
                if link.encode() not in self._urls:
                    write_whole(file, _before_next(file, LINKS_HEADER)
                                + csv_row((link, url, now)).encode())
            sync_data(file)
        return links


class Store:
    """The server's view: the tags in memory, and the log that tells of them.

    Nothing here waits for anybody but open and close. A line that the disk refuses
    waits, within bounds; beyond them the counts are kept and only the line is lost.
    """

    def __init__(self, files: Files, notify: Callable[[str], None] = note,
                 sync_each_write: bool = False, rotate: int = 0) -> None:
        self.files, self.links = files, Links(files.links)
        self.tags: Dict[str, Tag] = {}
        self._notify, self._sync_each_write = notify, sync_each_write
        self._log: LogWriter  # once it is open
        self._lines: List[bytes] = []
        self._owed: Dict[str, None] = {}  # tags whose last line found no room
        self._forgotten: Set[str] = set()
        self._beside: Set[str] = set()  # tags with lines of ours among unheard ones
        self._refused = ""  # why the log cannot be written
        self._worker = Worker(files, rotate)
        self._lock = ExitStack()

    def open(self) -> None:
        """Be the one server, know all tags, open the log. Raise TrackerError."""
        if os.path.exists(self.files.register):
            with _opened(self.files.register):
                pass  # a regular file, or nothing is begun
        self._lock.enter_context(server_lock(self.files))
        _ensure_register(self.files)
        self._load()
        self.links.find(b"")  # read before anybody waits
        self.tend()
        self._worker.start()

    def _load(self) -> None:
        """Read what is known of all tags; without the register if need be."""
        import gc

        gc.disable()
        try:
            place = self._read_tags()
        except TrackerError as error:
            self._notify(str(error))
            journal = Journal(self.files.log)
            self.tags, place = journal.tags, journal.place
        self._log = LogWriter(self.files.log, place, self._sync_each_write)
        gc.enable()
        gc.freeze()  # a million tags need not be looked at again

    def _read_tags(self) -> Place:
        """Read the register, once more if somebody saves it meanwhile."""
        for _ in range(3):
            stamp = stamp_of(self.files.register)
            merger = read_register(self.files)
            self.tags = dict(progress(merger.tags(), "reading tags"))
            if stamp == stamp_of(self.files.register):
                break
        return merger.place

    def close(self) -> None:
        """Write what waits, let the worker settle a last time, be no server more."""
        self.tend()
        self._worker.stop()
        self._lock.close()

    def find(self, tag_id: str) -> Optional[Tag]:
        """Return what is known of a tag, also of one that was made just now."""
        if tag_id not in self.tags:
            with suppress(OSError, TrackerError):
                self._hear()
                self._log.look()  # it may just have been moved
                self._hear()
            if tag_id not in self.tags:
                event = self._log.find(b",made," + tag_id.encode())
                if event:
                    self._take(event)
        elif self._forgotten and hash_of(tag_id) in self._forgotten:
            del self.tags[tag_id]
        return self.tags.get(tag_id)

    def add(self, event: Event) -> None:
        """Give a tag its new state at once; its line waits for flush."""
        tag = self.tags.get(event.id)
        if tag is None:
            return
        self.tags[event.id] = after(tag, event)
        if len(self._lines) < MAX_WAITING:
            self._lines.append(event.line())
        else:
            self._owed[event.id] = None

    def flush(self) -> None:
        """Append the lines that wait, with one write; keep what the disk refuses."""
        if self._lines and not self._refused:
            try:
                written = self._log.write(self._lines)
            except OSError as error:
                return self._refuse(error)
            if self._log.is_mixed:
                self._beside.update(map(_id_in, self._lines[:written]))
            del self._lines[:written]

    def _refuse(self, error: OSError) -> None:
        """Stop writing until the next tick, and tell why."""
        self._refused = error.strerror or str(error)
        self._notify(f"{self.files.log}: {self._refused}")

    def tend(self) -> bool:
        """Do what is due each second; tell whether it should be done again at once.

        That is to see what others did, and to write what waits.
        """
        self._refused, is_behind = "", False
        try:
            is_behind = self._hear_more()
            self._log.look()
        except OSError as error:
            self._refuse(error)
        except TrackerError as error:
            self._refused = self.files.shown(str(error))
        if self._log.is_cut:
            self._log.is_cut = False
            since = utc_text(time.time() - UNSETTLED)
            self._owed.update((tag_id, None) for tag_id, tag in self.tags.items()
                              if max(tag.last_hit, tag.last_open) >= since)
        self.flush()
        if not self._lines and self._owed:
            self._pay()
        for line in self._worker.news():
            self._notify(line)
        return is_behind

    def _hear_more(self) -> bool:
        """Hear others for a few milliseconds; tell whether there is more."""
        enough = time.monotonic() + HEARING
        while self._hear():
            if time.monotonic() >= enough:
                return True
        self._beside.clear()
        return False

    def _pay(self) -> None:
        """Log the counts of tags whose lines found no room, some at a time."""
        for tag_id in list(islice(self._owed, MAX_WAITING // 2)):
            del self._owed[tag_id]
            tag = self.tags.get(tag_id)
            if tag:
                self.add(Event(tag.last_hit or tag.last_open, "count", tag_id,
                               tag.hits, tag.opens, detail=tag.last_open))
        self.flush()

    def _hear(self) -> bool:
        """Take some of what others have appended; tell whether there was anything."""
        before = self._log.end
        gone: Dict[str, int] = {}
        for offset, event in self._log.news():
            self._take(event)
            if event.event == "forget":
                gone.setdefault(event.id, offset)
        if gone:
            self._obey(gone.keys(), min(gone.values()))
        return self._log.end != before

    def _take(self, event: Event) -> None:
        """Take one event of others; our own say nothing new."""
        tag = self.tags.get(event.id)
        is_new = event.event == "made" or event.event in _RANKS \
            or tag and (event.hits or 0) > tag.hits
        if is_new and event.event in EVENTS:
            tag = after(tag or Tag(), event)
            self.tags[event.id] = tag._replace(name="")

    def _obey(self, gone: Collection[str], offset: int) -> None:
        """Know some tags no more, and wipe out what was written of them meanwhile."""
        self._forgotten.update(gone)
        self._lines = [line for line in self._lines
                       if hash_of(_id_in(line)) not in gone]
        if any(hash_of(tag_id) in gone for tag_id in self._beside):
            erase(self.files.log, lambda tag_id: hash_of(tag_id) in gone, offset)

    def trouble(self) -> str:
        """Return what is wrong in words for everybody; "" when all is well."""
        waiting = len(self._lines) + len(self._owed)
        wrong = [f"event log: {self._refused}" if self._refused else "",
                 f"{plural(waiting, 'line')} wait for the disk" if waiting else "",
                 self.files.shown(self._worker.trouble)]
        return "; ".join(filter(None, wrong))

    def sync(self) -> None:
        """Bring the log to the disk; for a thread of its own. Raise OSError."""
        self._log.sync()


def _id_in(line: bytes) -> str:
    """Return the id in a line of the log."""
    return line.split(b",", 3)[2].decode()


class Worker:
    """The process that settles for a server; its words come as lines."""

    RESTART = 2.0  # seconds at least between two starts

    def __init__(self, files: Files, rotate: int) -> None:
        self.trouble = ""
        self._files, self._started = files, 0.0
        self._command = [sys.executable, "-IS", os.path.abspath(__file__), "settle",
                         "--worker", "--register", files.register, "--events",
                         files.log, *(["--rotate-events", str(rotate)] * bool(rotate))]
        self._process: Any = None

    def start(self) -> None:
        """Start it; raise OSError."""
        from subprocess import DEVNULL, PIPE, Popen

        self._started = time.monotonic()
        self._process = Popen(self._command, bufsize=0, stdin=PIPE, stdout=PIPE,
                              stderr=DEVNULL)
        os.set_blocking(self._process.stdout.fileno(), False)

    def news(self) -> List[str]:
        """Return what it has said; start another one where it has died."""
        said = self._process and self._process.stdout.read(1 << 16)
        if said:
            lines = said.decode("utf-8", "replace").splitlines()
            self.trouble = lines[-1]
            return list(filter(None, lines))
        if said == b"" and time.monotonic() - self._started >= self.RESTART:
            self.stop()
            self.start()
        return []

    def stop(self) -> None:
        """Let it settle a last time, and wait for that."""
        from subprocess import TimeoutExpired

        process = self._process
        if process:
            has_died = process.poll() is not None
            process.stdin.close()
            with suppress(TimeoutExpired):
                process.wait(60)
            process.stdout.close()
            if has_died:
                settle(self._files)


# ---------------------------------------------------------------------------
# Verdicts: was it a person?
# ---------------------------------------------------------------------------
# Pure functions: what one request says in, a verdict and its reason out. No socket,
# no clock, no file; tables are compiled at first use.
#
# The order is from what is certain to what is likely; the first to speak wins:
#   1. the request says that nobody reads (prefetch headers);
#   2. a damaged id came just before from the same network: a scanner's probe;
#   3. a mail provider's image proxy, by its agent, before any network, since
#      Google's crawlers and Gmail's proxy share addresses;
#   4. the network, where it decides alone or together with the agent;
#   5. the agent: AGENT_RULES, machines before mail clients before browsers;
#   6. too soon after sending for a person (only where that time is known);
#   7. better candidates from unrelated networks within the same minute.
#
# To add a rule, add one line to AGENT_RULES, NETWORKS, NETWORK_RULES or
# TIME_RULES and one case to its test; a new reason also needs words in REASONS.
# Sure: A = vendor's page or two independent logs, B = one log or a careful
# project's fixture, C = likely, never seen first hand. Limits: an ordinary
# browser's agent from a hosting network cannot be told from a person.

HUMAN, PROXY, MACHINE = "human", "proxy", "machine"
SELF, UNKNOWN = "self", "unknown"

MAX_AGENT = 1000        # characters of an agent that are kept
MAX_FORM = 500          # of those judged; of 5,371 people one has more
MAX_PARTS = 160         # of those searched for what makes a lesser-known browser
MAX_WORDS = 200         # of unfamiliar words; the longest of a person: 147
CACHE_SIZE = 4096       # agents, and addresses, whose answer is remembered
V6 = 1 << 128           # keeps ::1 apart from 0.0.0.1
UNTIMED = float("inf")  # the age of a hit where the time of sending is not known
CERTAIN = 2             # the rank of opens that no other open turns into machine


class Request(NamedTuple):
    """What one request for a pixel says of its client: the input of judge."""

    agent: str = ""                 # '' when absent
    address: str = ""               # IPv4 or IPv6, perhaps truncated, '' unknown
    purpose: str = ""               # Sec-Purpose, Purpose, X-Purpose, X-Moz
    private: bool = False           # asks not to be tracked: Sec-GPC, DNT


class Click(NamedTuple):
    """What a click is, beside the request; its tag may have an open already."""

    link: str
    has_language: bool = True       # the request has an Accept-Language
    is_opened: bool = False


class Verdict(NamedTuple):
    """What a hit is judged to be, and the code of the rule that said so."""

    verdict: str                    # human, proxy, machine, self or unknown
    reason: str                     # a key of REASONS


REASONS: Dict[str, str] = {
    "gmail-proxy": "Gmail's image proxy: displayed, place unknown",
    "yahoo-proxy": "Yahoo's and AOL's image proxy: displayed, place unknown",
    "seznam-proxy": "Seznam's image proxy: displayed, place unknown",
    "rambler-proxy": "Rambler's image proxy: displayed, place unknown",
    "ukrnet-proxy": "ukr.net's image proxy: displayed, place unknown",
    "superhuman-proxy": "Superhuman's image proxy: displayed, place unknown",
    "fastmail-proxy": "Fastmail's image proxy: displayed, place unknown",
    "shortwave-proxy": "Shortwave's image proxy: displayed, place unknown",
    "mail-proxy": "a mail service's image proxy: displayed, place unknown",
    "mail-client": "a mail program",
    "browser": "a browser, or a mail app that looks like one",
    "handset": "a phone's or a lesser-known browser, by its own form of name",
    "private-relay": "a browser behind iCloud Private Relay: place unknown",
    "prefetch-header": "the request itself says prefetch or preview",
    "probe": "came just after a damaged copy of the same link: a scanner",
    "gmail-prefetch": "Gmail fetching ahead: nobody need have read it",
    "apple-mpp": "Apple Mail fetching ahead (Mail Privacy Protection)",
    "apple-mpp-agent": "looks like Apple Mail fetching ahead, from elsewhere",
    "no-agent": "does not say what it is, as scanners do",
    "microsoft-gateway": "Microsoft's mail filter (Exchange Online Protection)",
    "safe-links": "Microsoft's Safe Links scanner, by its network",
    "google-automation": "a browser in Google's network that is not Gmail's proxy",
    "security-gateway": "a mail security vendor, within minutes of sending",
    "office-probe": "Microsoft Office looking a link up, not a reader",
    "security-scanner": "a security scanner by its own name",
    "crawler": "a crawler or robot by its own name",
    "preview": "a link preview for a chat or a social network",
    "monitor": "a monitoring, testing or checking service",
    "headless": "a browser run by a program",
    "fetcher": "a feed reader or another fetching service",
    "http-library": "a program's HTTP library",
    "contact": "carries a web or mail address for complaints, as robots do",
    "compatible-name": "names itself where browsers name theirs, and is none",
    "forged": "claims to be a browser in a form that no browser sends",
    "fast": "within seconds of sending, sooner than people read",
    "early": "a browser within half a minute of sending: most likely a scan",
    "many-networks": "the same message, elsewhere at the same minute, was read",
    "vendor-network": "a mail security vendor: its scanner, or a reader behind it",
    "microsoft-mail": "Microsoft's mail servers: a reader's proxy, or a scan",
    "app-library": "an app's network library: a mail app, or any other",
    "foreign": "a browser's form with something in it that browsers do not say",
    "full-build": "a desktop browser that tells its build, as only programs still do",
    "unrecognised": "an agent that no rule knows",
    "mail-network": "a click from Microsoft's mail servers, where nobody sits",
    "burst": "several links of a mail at once: a scanner",
    "no-language": "a click within a minute of sending that asks for no language",
    "opened": "it had been opened before: no further open",
    "repeat": "the same client again within seconds: no further open",
    "composing": "fetched while the message was being written",
    "sender-client": "the program that fetched it while it was being written",
    "own-network": "one of the sender's own networks",
}


class AgentRule(NamedTuple):
    """One line of AGENT_RULES: an agent that matches has the verdict."""

    reason: str
    verdict: str
    kind: str                       # what is searched, and how: see below
    pattern: str                    # of regular expressions
    sure: str
    source: str


# FORM: one pattern, in the agent in lower case. PARTS: several, in its beginning.
# WORDS: several, in the words of the agent in lower case, each once, with a blank on
# either side, without versions, a phone's model and what is FAMILIAR; so most
# people's agents have none. BOTH: one pattern, in the form, a line end, and the
# words. Several patterns stand apart by blanks, and _ stands for a blank.
FORM, PARTS, WORDS, BOTH = "form", "parts", "words", "both"

# What the agents of people's browsers are made of.
FAMILIAR = frozenset("""
    mozilla applewebkit khtml like gecko safari chrome chromium firefox version mobile
    opera opr presto trident msie edge edg edga edgios crios fxios goanna iemobile
    windows nt win64 wow64 x64 win macintosh mac os intel ppc linux x86 i686 i586 i386
    amd64 x11 cros arm armv7l armv8l aarch64 ubuntu debian fedora suse gentoo freebsd
    openbsd netbsd fuchsia android iphone ipad ipod cpu wv tablet touch phone xbox one
    compatible rv en us gb de fr es it ja jp ko kr pt br ru pl nl zh cn tw cs sv da fi
    tr se ca sv1 net clr net4 slcc1 slcc2 media center pc infopath ms rtc lm mddr mdds
    tabletpc zune wp7 office gtb7 funwebproducts electron qtwebengine vivaldi brave iron
    maxthon yabrowser yowser whale samsungbrowser ucbrowser miuibrowser huaweibrowser
    silk puffin qupzilla epiphany konqueror seamonkey palemoon waterfox camino galeon
    falkon otter midori librewolf floorp icedragon comodo dragon iridium ddg duckduckgo
    avast avg avira ccleaner norton coc coccoc qihu 360se 360ee sogou metasr lbbrowser
    qqbrowser mqqbrowser quark sputnik midp cldc profile configuration symbian symbianos
    series60 nokia build browser up link smart tv smarttv web0s webos tizen quest tesla
    cubot camscanner
""".split())

# Read from the top; the first pattern found decides, and of neighbours that search
# the same WORDS the one found first in the agent. Proxies stand first, as they quote
# a browser; then what says itself to be a machine; mail programs before the forms
# that only lack a browser's; browsers last, since everything imitates them. Kinds
# rather than names: what robots call themselves, what a browser looks like.
AGENT_RULES = (
    AgentRule("no-agent", MACHINE, FORM, r"^\W*$", "B",
              "laravel-passwordless-login#79"),
    AgentRule("apple-mpp-agent", MACHINE, FORM, r"^mozilla/5\.0$", "A", "uap-core#509"),
    AgentRule("gmail-prefetch", MACHINE, FORM, r"edge/12\.246 mozilla/5\.0$", "A",
              "mautic#10245, bird.com"),
    AgentRule("office-probe", MACHINE, FORM,
              r"^microsoft (?:office|exchange)(?!.*(?:outlook|mapi))|^office 365", "B",
              "GMass's list"),
    AgentRule("gmail-proxy", PROXY, WORDS, r"googleimageproxy _ggpht\.com_", "A",
              "gophish#1390"),
    AgentRule("yahoo-proxy", PROXY, WORDS, r"yahoomailproxy", "A", "uap-core tests"),
    AgentRule("seznam-proxy", PROXY, WORDS, r"seznamemailproxy", "A", "browscap"),
    AgentRule("rambler-proxy", PROXY, WORDS, r"ramblermail_", "B", "device-detector"),
    AgentRule("ukrnet-proxy", PROXY, WORDS, r"fwdcdn\.com mail\.ukr\.net_proxy",
              "B", "device-detector"),
    AgentRule("superhuman-proxy", PROXY, WORDS, r"superhumanproxy", "A", "YAUAA"),
    AgentRule("fastmail-proxy", PROXY, WORDS, r"fastmailua_", "A", "Fastmail help"),
    AgentRule("shortwave-proxy", PROXY, WORDS, r"_shortwave_image", "B",
              "monperrus's list"),
    AgentRule("mail-proxy", PROXY, WORDS, r"mail(?:_?\w{0,9})_?proxy_", "C",
              "form of the above"),
    AgentRule("crawler", MACHINE, WORDS, r"""
        bot crawl spider slurp scrap[eiy] archiv larbin nutch heritrix index(?:er|ing)
        harvest sampling search_?engine sitemap httrack research(?!_in_) wayback
        mediapartners grabber classif copier leech walker stripper collector sucker
        convert(?!ible) extract bookmark survey statist rank_ ranker finder visit
        traffic lookup tracker hunter domain cdn_
        """, "A", "crawler-user-agents"),
    AgentRule("security-scanner", MACHINE, WORDS, r"""
        scan(?!ia) virus malware vulnerab security(?!pay|install) safe_?links
        safe_?browsing bluecoat trend_?micro trendwinhttp sophos barracuda spamexperts
        scmguard sqlmap nuclei nikto nmap nessus qualys censys shodan acunetix openvas
        pentest owasp netcraft detectify arachni rapid7 tenable netsparker zgrab masscan
        """, "B", "browscap"),
    AgentRule("preview", MACHINE, WORDS, r"""
        preview facebookexternal meta_external unfurl embedly snap_url _user_(?!agent)
        google(?<!\.google)(?!_(?:earth|wap|tv|ios|app|maps|pixel)|_$|app|tv|wv)
        """, "A", "the vendors' pages"),
    AgentRule("office-probe", MACHINE, WORDS, r"dataaccessd_", "B", "GMass's list"),
    AgentRule("headless", MACHINE, WORDS, r"""
        headless phantomjs casperjs slimerjs puppeteer playwright selenium webdriver
        jsdom htmlunit wkhtml html2 2(?:png|pdf|image)_ render(?:er|tron) devtools
        screenshot thumbnail snapshot snapkit shots_ capture image_ cypress_
        """, "A", "isbot's fixtures"),
    AgentRule("monitor", MACHINE, WORDS, r"""
        monitor uptime pingdom ptst_ lighthouse gtmetrix synthetic dareboost gomez
        site24 catchpoint datadog ruxit relic neustar diagnos prob(?:e|ing)_
        check(?:er|ing)?_ linkcheck validat verif audit analy[sz] sniff benchmark
        _test(?:er|ing)?_(?!keys) insight observatory _seo(?!ul) page_?speed
        speed_?curve inspect siteimprove grader measure _?status(?:cake)?_ siege_ zabbix
        nagios dynatrace alertsite apica yottaa rigor_ splunk browserstack testcafe
        applitools hubspot builtwith wappalyzer whatcms keynote
        """, "B", "isbot's fixtures"),
    AgentRule("fetcher", MACHINE, WORDS, r"""
        feed _rss rss_ fetch favicon downloader resolver aggregat podcast
        news(?:read|wire|gator) parser proxy_(?<!wap_proxy_) agent_ transcod translat
        """, "B", "isbot's fixtures"),
    AgentRule("http-library", MACHINE, WORDS, r"""
        http_?(?:client|lib|request|get|kit|rb|java) urllib libwww_perl requests_ curl_
        winhttp powershell _node\.js_
        """, "A", "isbot's fixtures"),
    AgentRule("contact", MACHINE, FORM, r"https?:/(?!/bsalsa)", "B",
              "robots' custom; bsalsa is a part of browsers"),
    AgentRule("contact", MACHINE, FORM, r"www\.", "B", "robots' custom"),
    AgentRule("contact", MACHINE, FORM, r"@[\w-]+\.[a-z]{2}", "B", "robots' custom"),
    AgentRule("contact", MACHINE, FORM,
              r"\.(?<!google\.)(?:com|net|org|io|de|ly)(?:\)|/[a-z]|$)", "B",
              "robots' custom"),
    AgentRule("preview", MACHINE, FORM,
              r"^(?:whatsapp|slack|viber|discord|skype|telegram|iframely)", "A",
              "the vendors' pages; at the start, since in-app browsers end so"),
    AgentRule("http-library", MACHINE, FORM,
              r"^(?:\w{0,20}http\w{0,20}/|(?:java|python|perl|ruby|php|go|node|curl"
              r"|wget|okhttp|axios|got|undici|guzzle|faraday|jetty|jersey|ahc|aiohttp"
              r"|lwp|pycurl|lua|rust|dart|scala|deno|bun|dotnet|reqwest|postman"
              r"|insomnia)(?![a-z]))", "A", "isbot's fixtures"),
    AgentRule("mail-client", HUMAN, WORDS, r"""
        thunderbird betterbird _msoffice _ms_office outlook airmail postbox
        sparkdesktop mailbird mailspring foxmail mailmaster tutanota _the_bat_
        lotus_notes _kmail kontact_ _evolution_ zdesktop zimbra _sparrow_ navermail
        yahoomobile ymail android_gmail _newton_ barca windows_?live superhuman
        _em_client _geary_ _nine_ _lark_ mail_(?<!_email_)(?<!hotmail_)
        """, "A", "uap-core, device-detector"),
    AgentRule("mail-client", HUMAN, FORM,
              r"^(?:microsoft office|[^( ]{1,20}-e?mail\b"
              r"|[^(]{0,40}mail(?!\.ru)[^(/]{0,20}/\d)", "B", "the form of the above"),
    AgentRule("compatible-name", MACHINE, FORM,
              r"^mozilla/[\d.]{1,4} ?\( ?compatible;(?![^)]{0,200}(?:windows|linux|x11"
              r"|android|mac_|macintosh|symbian|blackberry|nokia|os/2|haiku|bsd|sunos"
              r"|amiga|brew|risc os|syllable))(?! ?(?:u;|msie|konqueror|omniweb|icab"
              r"|dillo|opera|mmef|netfront|webtv|links|lynx|netsurf|mozilla"
              r"|[^;)]{0,40}browser))", "A", "crawler-user-agents"),
    AgentRule("compatible-name", MACHINE, FORM,
              r"^mozilla/5\.0 \((?:[\w/.]+\)$"
              r"|[^()]*\)(?:[^()]*\([^()]*\)){0,2}[^()]*\( ?compatible;)", "A",
              "crawler-user-agents"),
    AgentRule("forged", MACHINE, FORM,
              r"^mozilla[,!]|^[^(]{1,30}, ?mozilla/|^mozilla/(?:6\.[1-9]|[7-9])"
              r"|^mozilla/\d\.\d \((?:\w+: |linux; (?:u; )?android 0[;)])"
              r"|^[^)]*\) applewebkit/ ", "C", "no browser writes so"),
    AgentRule("forged", MACHINE, PARTS,
              r"msie_or \{\} /1[5-9]\d{11}(?!\d)", "C",
              "as above; the last is a time in ms"),
    AgentRule("app-library", UNKNOWN, FORM,
              r"^dalvik/|^[^(]* cfnetwork/|^[^(]*\([^)]*gzip\)$", "C", "any app"),
    AgentRule("foreign", UNKNOWN, BOTH,
              r"^mozilla/5\.0 \((?:windows nt|macintosh|x11)[^)]*\) "
              r"(?:applewebkit/[\d.]+ \(khtml, like gecko\)|gecko/\d+) "
              r"(?:\w+/[\d.]+ )?(?:(?:chrome|firefox)/(?=1\d\d)|version/(?=1[5-9]|2\d))"
              r"(\d+)\.(?![^\n]*(?:browser| edg/| opr/|electron/| vr | [a-z]+/\1\.))"
              r"[^\n]*\n \w",
              "C", "people's names for modern desktop browsers are known"),
    AgentRule("foreign", UNKNOWN, FORM, r"\(khtml, like gecko[;,](?! ?safari)", "B",
              "robots"),
    AgentRule("foreign", UNKNOWN, FORM,
              r"^mozilla/5\.0 \([^)]*\) applewebkit/[\d.]+ \(khtml, like gecko\) "
              r"(?:version/[\d.]+ )?chrome/1\d\d[\d.]+ (?:mobile )?safari/[\d.]+"
              r" [a-z]+ [a-z]+(?: |$)", "C", "words without a version: no product"),
    AgentRule("foreign", UNKNOWN, FORM,
              r"^mozilla/5\.0 \((?:"
              r"linux; (?:u; )?android [1-7]\.[^)]*\).* chrome/1[2-9]"
              r"|windows nt (?:5|6\.[0-3])[^)]*\).* (?:chrome/1[1-9]|firefox/1[2-9]))"
              r"\d\.", "C", "systems that Chrome and Firefox do not run on any more"),
    AgentRule("foreign", UNKNOWN, FORM,
              r"^mozilla/5\.0 \((?!compat|windows|x11|[un];|mobile)[^;()]+; windows nt",
              "B", "one log"),
    AgentRule("full-build", UNKNOWN, FORM,
              r"^mozilla/5\.0 \((?:windows nt|macintosh|x11; linux)[^()]*\) applewebkit"
              r"/537\.36 \(khtml, like gecko\) chrome/1[2-9]\d\.0\.[1-9]\d+\.\d+"
              r" safari/537\.36(?: edg/[\d.]+)?$", "A",
              "chromium.org/updates/ua-reduction"),
    AgentRule("browser", HUMAN, FORM,
              r"^(?:mozilla|opera) ?/ ?\d.{0,30}?(?:\(|x11|linux|windows|macintosh)",
              "A", "every browser since 1994"),
    AgentRule("handset", HUMAN, PARTS, r"""
        midp browser explorer ucweb obigo netfront polaris opera[/_]\w webkit
        mozilla/\d\.\d_?\( iphone \(ios ipad[;,\d] fbav/ [_(;]android[_/]\d -android-
        for_android macintosh \(x11 \(windows; windows_ce windows_phone symbian maui
        \(gui\) mosaic nintendo playstation amiga hbbtv smart-?tv ;_u[;)] \[[a-z]{2}\]
        \d{3}x\d{3}
        """, "B", "YAUAA, WhichBrowser"),
    AgentRule("handset", HUMAN, FORM,
              r"^(?:[a-z]{1,20}/\d[\d.]{1,20} \((?!compat)[^)]*; |e?links|opr/|roku"
              r"|lynx|w3m|icab|netsurf|dillo|midori|uzbl|galeon|dolphin|sleipnir|itunes"
              r"|quicktime|hotjava|amaya|nokia|sec-|samsung|lg[-/e]|sie-|sonyericsson"
              r"|mot-|blackberry|docomo|kddi|softbank|vodafone|j-phone|htc|huawei|zte"
              r"|alcatel|benq|sagem|sharp|panasonic|philips|pantech|palm|motorola)",
              "B", "YAUAA, WhichBrowser"),
)


class Network(NamedTuple):
    """One line of NETWORKS: the published or announced prefixes of one owner."""

    name: str
    sure: str
    source: str
    prefixes: str                   # CIDR, apart by spaces; none overlap


# As of August 2026. Apple's list changes weekly, inside these same prefixes;
# 17.0.0.0/8 is Apple too, but not where Mail fetches. Parts of Microsoft that
# only send mail or only scan are here, Azure and its desktops are not.
NETWORKS = (
    Network("apple", "A", "mask-api.icloud.com/egress-ip-ranges.csv", (
        "104.28.0.0/17 104.28.128.0/19 140.248.0.0/18 146.75.128.0/17 "
        "172.224.224.0/19 172.225.0.0/16 172.226.0.0/16 2606:54c0::/32 "
        "2606:54c3::/32 2a02:26f7::/32 2a04:4e41::/32 2a09:bac2::/31")),
    Network("google", "B", "google-proxy-* PTRs, Google's published ranges", (
        "64.233.160.0/19 66.102.0.0/20 66.249.64.0/19 72.14.192.0/18 74.125.0.0/16 "
        "209.85.128.0/17")),
    Network("yahoo", "B", "AS36647, AS26101", (
        "66.196.80.0/21 66.218.80.0/20 67.195.0.0/17 67.195.128.0/20 "
        "67.195.144.0/21 67.195.160.0/19 67.195.192.0/19 68.180.192.0/18 "
        "69.147.96.0/19 72.30.0.0/18 74.6.32.0/19 74.6.96.0/19 74.6.128.0/20 "
        "74.6.160.0/19 74.6.192.0/19 98.136.128.0/19 98.136.192.0/18 98.137.0.0/18 "
        "98.137.64.0/20 98.137.96.0/19 98.137.160.0/19 98.137.192.0/21 "
        "98.137.224.0/19 98.139.128.0/17 206.190.32.0/20")),
    Network("seznam", "B", "AS43037", "77.75.72.0/21"),
    Network("microsoft-gateway", "A", "Microsoft 365 endpoint sets 9 and 10", (
        "40.92.0.0/15 40.107.0.0/16 52.100.0.0/14 52.238.78.88/32 104.47.0.0/17 "
        "2a01:111:f400::/48 2a01:111:f403::/48")),
    Network("safe-links", "B", "gophish#2646, opencollective#3656", "40.94.0.0/16"),
    Network("microsoft-mail", "C", "warmbly#412", "40.96.0.0/13"),
    Network("proofpoint", "B", "AS22843, AS26211, AS52129", (
        "66.159.227.0/24 66.159.228.0/23 66.159.232.0/24 66.159.238.0/23 "
        "66.159.240.0/23 67.231.144.0/20 91.207.212.0/23 91.209.104.0/24 "
        "143.55.144.0/22 143.55.148.0/23 148.163.132.0/22 148.163.136.0/21 "
        "148.163.144.0/20 185.132.180.0/22 185.183.28.0/22 205.220.160.0/20 "
        "205.220.176.0/21 205.220.184.0/22 205.220.190.0/23 208.83.137.0/24 "
        "208.83.138.0/23 208.84.64.0/22 208.86.200.0/22")),
    Network("mimecast", "B", "AS30031, AS42427, AS39588, AS60492", (
        "41.74.203.0/24 51.163.158.0/23 62.140.7.0/24 62.140.10.0/24 "
        "63.128.21.0/24 91.220.42.0/24 147.28.34.0/23 147.28.36.0/24 "
        "170.10.128.0/22 170.10.132.0/23 170.10.140.0/23 170.10.142.0/24 "
        "170.10.150.0/23 170.10.152.0/23 170.10.156.0/23 185.58.84.0/22 "
        "193.7.204.0/22 194.104.108.0/22 195.130.217.0/24 205.139.110.0/23 "
        "207.82.80.0/24 207.211.30.0/24 213.167.75.0/24 213.167.81.0/24 "
        "216.145.218.0/23 216.145.222.0/24 216.205.24.0/24")),
    Network("barracuda", "B", "AS15324, Barracuda's documentation", (
        "3.24.133.128/25 13.200.136.128/25 15.222.16.128/25 18.133.136.96/27 "
        "18.133.136.128/26 18.184.203.224/27 18.185.115.192/26 35.157.190.224/27 "
        "35.176.92.96/27 64.235.150.0/23 64.235.155.0/24 198.35.20.0/22 "
        "209.222.81.0/24 209.222.82.0/23")),
    Network("cisco", "B", "AS16417", (
        "23.90.96.0/22 23.90.100.0/23 23.90.103.0/24 23.90.112.0/23 23.90.121.0/24 "
        "23.90.124.0/22 63.251.108.0/24 68.232.128.0/22 68.232.134.0/23 "
        "68.232.136.0/23 68.232.140.0/22 68.232.144.0/22 68.232.148.0/23 "
        "68.232.153.0/24 68.232.154.0/23 68.232.157.0/24 68.232.158.0/24 "
        "72.5.10.0/23 74.201.90.0/23 74.201.116.0/24 139.138.24.0/22 "
        "139.138.32.0/22 139.138.38.0/23 139.138.40.0/23 139.138.46.0/23 "
        "139.138.56.0/22 184.94.240.0/23 184.94.248.0/22 184.94.254.0/24 "
        "194.165.195.0/24 207.54.73.0/24 207.54.74.0/24 207.54.80.0/23 "
        "207.54.82.0/24 207.54.84.0/22 207.54.92.0/22 208.90.56.0/23 "
        "208.90.58.0/24 208.90.60.0/24 208.90.62.0/23 216.71.128.0/21 "
        "216.71.137.0/24 216.71.138.0/24 216.71.140.0/22 216.71.144.0/22 "
        "216.71.148.0/23 216.71.150.0/24 216.71.152.0/22")),
    Network("trend-micro", "C", "AS16880", (
        "150.70.0.0/20 150.70.176.0/20 150.70.224.0/20 216.104.16.0/20")),
)

VENDORS = ("proofpoint", "mimecast", "barracuda", "cisco", "trend-micro")
ANY_AGENT: Tuple[str, ...] = ()
ANYWHERE: Tuple[str, ...] = ()
BROWSERS = ("browser", "handset", "full-build", "foreign")


class NetworkRule(NamedTuple):
    """One line of NETWORK_RULES: who fetched, by network, agent and time."""

    networks: Tuple[str, ...]
    agents: Tuple[str, ...]         # reasons of AGENT_RULES, or ANY_AGENT
    after: float                    # seconds since sending, where an unknown age
    within: float                   # is UNTIMED: 0 to UNTIMED is at any time
    verdict: str
    reason: str
    sure: str
    source: str


# The first line that fits speaks. A vendor's network at an unknown time is unknown,
# for browser isolation carries people, too; long after sending it is a person.
NETWORK_RULES = (
    NetworkRule(("apple",), ("apple-mpp-agent",), 0, UNTIMED, MACHINE, "apple-mpp",
                "A", "Mailgun docs, ClickDimensions"),
    NetworkRule(("apple",), BROWSERS, 0, UNTIMED, HUMAN, "private-relay",
                "B", "wordtothewise.com, 2021-09"),
    NetworkRule(("microsoft-gateway",), ANY_AGENT, 0, UNTIMED, MACHINE,
                "microsoft-gateway", "A", "gophish#973"),
    NetworkRule(("safe-links",), ANY_AGENT, 0, UNTIMED, MACHINE, "safe-links",
                "B", "gophish#2646"),
    NetworkRule(("google",), BROWSERS, 0, UNTIMED, MACHINE, "google-automation",
                "B", "one log; readers come through GoogleImageProxy"),
    NetworkRule(VENDORS, ANY_AGENT, 0, 600, MACHINE, "security-gateway",
                "B", "warmbly#412"),
    NetworkRule(VENDORS, BROWSERS, UNTIMED, UNTIMED, UNKNOWN, "vendor-network",
                "C", "browser isolation carries people"),
    NetworkRule(("microsoft-mail",), BROWSERS, 0, UNTIMED, UNKNOWN, "microsoft-mail",
                "C", "warmbly#412"),
)


# Of 836 scans 61 % came within 10 s and 84 % within 20 s; the soonest genuine
# open that is documented came after 66 s. No scanner claims to be a mail program.
TIME_RULES = (
    NetworkRule(ANYWHERE, ANY_AGENT, 0, 10, MACHINE, "fast", "A",
                "craft-campaign#546"),
    NetworkRule(ANYWHERE, (*BROWSERS, "private-relay"), 0, 30, MACHINE, "early", "B",
                "craft-campaign#546"),
)

MANY_NETWORKS = Verdict(MACHINE, "many-networks")
_AHEAD = re.compile("prefetch|preview|prerender")

_WORD = re.compile(r"[a-z][a-z\d.]+")
_VERSION = re.compile(r"/[^\s;,()]*")  # names nothing
_MODEL = re.compile(r"android [\d.]+;[^;()]*")
# What of a regular expression must stay together when its beginning is shared.
_UNIT = re.compile(r"(?:\\.|\[[^]]*\]|\(\?(?:[^()]|\([^()]*\))*\)|.)"
                   r"(?:[?*+]|\{[\d,]+\})?")


class _Step(NamedTuple):
    """A line of AGENT_RULES, or neighbours that search WORDS, compiled."""

    kind: str
    search: Callable[[str], Optional[re.Match[str]]]
    verdicts: Mapping[Optional[str], Verdict]  # by the match's lastgroup


@lru_cache(maxsize=1)
def _steps() -> List[_Step]:
    """Compile AGENT_RULES, at first use: what judges nothing does not pay for it."""
    steps = []
    for kind, rules in groupby(AGENT_RULES, lambda rule: rule.kind):
        if kind in (PARTS, WORDS):
            steps.append(_joined(kind, rules))
        else:
            steps += [_Step(kind, re.compile(rule.pattern).search,
                            {None: Verdict(rule.verdict, rule.reason)})
                      for rule in rules]
    return steps


def _joined(kind: str, rules: Iterable[AgentRule]) -> _Step:
    """Compile many patterns to one in which equal beginnings stand once.

    An empty group at its end says which was found. re tries alternatives one by one,
    so this takes a fifth of the time.
    """
    tree: Dict[str, Any] = {}
    verdicts: Dict[Optional[str], Verdict] = {}
    for rule in rules:
        for pattern in rule.pattern.split():
            branch = tree
            for unit in _UNIT.findall(pattern.replace("_", " ")):
                branch = branch.setdefault(unit, {})
            branch[f"(?P<g{len(verdicts)}>)"] = {}
            verdicts[f"g{len(verdicts)}"] = Verdict(rule.verdict, rule.reason)
    return _Step(kind, re.compile(_branches(tree)).search, verdicts)


def _branches(tree: Dict[str, Any]) -> str:
    parts = [unit + _branches(branch) for unit, branch in tree.items()]
    return f"(?:{'|'.join(parts)})" if parts else ""


def _texts(agent: str) -> Dict[str, str]:
    """Return what the rules search of an agent, by their kind."""
    form = agent.strip()[:MAX_FORM].lower()
    named = _VERSION.sub(" ", _MODEL.sub("android ", form, 1))
    found = dict.fromkeys(_WORD.findall(named))
    names = " ".join(word for word in found if word not in FAMILIAR)
    words = f" {names[:MAX_WORDS]} " if names else ""
    return {FORM: form, PARTS: form[:MAX_PARTS], WORDS: words,
            BOTH: f"{form}\n{words}"}


@lru_cache(maxsize=CACHE_SIZE)
def read_agent(agent: str) -> Verdict:
    """Judge a User-Agent by AGENT_RULES alone, by its first MAX_FORM characters.

    The caller cuts it to MAX_AGENT, so that hostile agents cost 4 MB at most.
    """
    texts = _texts(agent)
    for kind, search, verdicts in _steps():
        match = search(texts[kind])
        if match:
            return verdicts[match.lastgroup]
    return Verdict(UNKNOWN, "unrecognised")


def _number(address: str) -> Optional[int]:
    """Read an address as an integer, IPv6 above V6, mapped IPv4 as IPv4; None: none."""
    import socket

    text = address.partition("%")[0]
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        number = int.from_bytes(socket.inet_pton(family, text), "big")
    except (OSError, ValueError):
        return None
    if number >> 32 == 0xFFFF:
        return number & 0xFFFFFFFF
    return number + V6 if family == socket.AF_INET6 else number


@lru_cache(maxsize=1)
def _ranges() -> List[Tuple[int, int, str]]:
    """Return first address, last address and owner of all prefixes, in order."""
    from ipaddress import ip_network

    nets = [(ip_network(prefix), line.name)
            for line in NETWORKS for prefix in line.prefixes.split()]
    return sorted((_number(str(net[0])) or 0, _number(str(net[-1])) or 0, name)
                  for net, name in nets)


@lru_cache(maxsize=CACHE_SIZE)
def owner(address: str) -> str:
    """Name the line of NETWORKS that an address falls in, '' for none.

    A truncated address (203.0.113.0) can miss the few prefixes longer than /24.
    """
    number = _number(address)
    if number is None:
        return ""
    first, last, name = _ranges()[bisect_right(_ranges(), (number, 2 * V6)) - 1]
    return name if first <= number <= last else ""


def _prefix(address: str, v4_bits: int, v6_bits: int) -> str:
    import socket

    number = _number(address)
    if number is None:
        return ""
    size, bits, family = 32, v4_bits, socket.AF_INET
    if number >= V6:
        size, bits, family = 128, v6_bits, socket.AF_INET6
    kept = number % V6 >> size - bits << size - bits
    return f"{socket.inet_ntop(family, kept.to_bytes(size // 8, 'big'))}/{bits}"


@lru_cache(maxsize=CACHE_SIZE)
def network(address: str) -> str:
    """Name the /24 or /48 of an address, '203.0.113.0/24'; '' for none."""
    return _prefix(address, 24, 48)


def kept_address(address: str, how: str) -> str:
    """Return what is kept of an address: "full", "none", or "truncate": /24 or /48."""
    if how == "truncate":
        return network(address).partition("/")[0]
    return address if how == "full" else ""


@lru_cache(maxsize=CACHE_SIZE)
def _neighbourhood(address: str) -> str:
    return owner(address) or _prefix(address, 16, 32)


def related(a: str, b: str) -> bool:
    """Tell whether two addresses may well be one client or one owner's machines.

    True in the same /16 or IPv6 /32, or both in the same line of NETWORKS.
    An unknown address is related to nothing.
    """
    near = _neighbourhood(a)
    return near != "" and near == _neighbourhood(b)


def _corrected(found: Verdict, name: str, age: float) -> Verdict:
    """Let NETWORK_RULES correct what the agent was read as, then TIME_RULES.

    An image proxy stays one: Gmail's shares its addresses with Google's robots, and
    in 9.8 billion opens it fetched on display (bird.com), against three reports of
    fetches on delivery (gophish#1390).
    """
    for rules in (NETWORK_RULES, TIME_RULES):
        if found.verdict == PROXY or rules is TIME_RULES and found.verdict == MACHINE:
            break
        found = next((Verdict(rule.verdict, rule.reason) for rule in rules
                      if (not rule.networks or name in rule.networks)
                      and rule.after <= age <= rule.within
                      and (not rule.agents or found.reason in rule.agents)), found)
    return found


def _rank(verdict: str, agent: str) -> int:
    """Rate an open: 2 proxy or mail program, 1 browser, 0 browser before 2022."""
    if verdict == PROXY or read_agent(agent).reason == "mail-client":
        return CERTAIN
    return 0 if re.search(r"(?:Chrome|Firefox)/\d\d?\.|MSIE", agent) else 1


def _rivals(request: Request, event: Event) -> bool:
    """Tell whether an earlier open cannot be the same reader as this request.

    One client may change from IPv6 to IPv4 between two requests.
    """
    if (event.verdict not in OPENS or not network(event.address)
            or not network(request.address)):
        return False
    other_family = (":" in event.address) != (":" in request.address)
    if other_family and event.detail == request.agent:
        return False
    return not related(event.address, request.address)


def _by_company(request: Request, found: Verdict, earlier: Sequence[Event]) -> Verdict:
    """Turn an open into machine where a better one came from another network."""
    if found.verdict not in OPENS:
        return found
    rank = _rank(found.verdict, request.agent)
    if rank < CERTAIN and any(_rivals(request, event)
                              and _rank(event.verdict, event.detail) > rank
                              for event in earlier):
        return MANY_NETWORKS
    return found


@lru_cache(maxsize=CACHE_SIZE)
def judge_client(agent: str, address: str) -> Verdict:
    """Judge a request by its client alone, where nothing else is known."""
    return judge(Request(agent, address))


def outranks(request: Request, found: Verdict, event: Event) -> bool:
    """Tell whether an open just judged turns an earlier one into machine.

    For every event of the last minute for which this is true, the caller corrects
    that one to MANY_NETWORKS. Of two that are alike the later stays, since scanners
    come before readers. Image proxies and mail programs are never turned: both
    devices of one reader may be real. Never true for an open that judge turned away
    itself, so one always stays.
    """
    if found.verdict not in OPENS or not _rivals(request, event):
        return False
    rank = _rank(event.verdict, event.detail)
    return rank < CERTAIN and rank <= _rank(found.verdict, request.agent)


def judge(request: Request, age: Optional[float] = None,
          earlier: Sequence[Event] = ()) -> Verdict:
    """Judge one request: who fetched the pixel, and which rule says so.

    age is in seconds since sending; rules that need it are silent where it is None
    or negative. earlier is what others did with this tag within the last minute:
    opens, and "stray" for a damaged copy of its id. Pure, and quick (2 us for an
    agent and address seen before). 'self' and repeats are the caller's to find:
    they depend on more than the request.
    """
    if request.purpose and _AHEAD.search(request.purpose.lower()):
        return Verdict(MACHINE, "prefetch-header")
    for event in earlier:
        if event.event == "stray" and related(event.address, request.address):
            return Verdict(MACHINE, "probe")
    found, name = read_agent(request.agent), owner(request.address)
    age = UNTIMED if age is None or age < 0 else age
    if name or age < UNTIMED:
        found = _corrected(found, name, age)
    return _by_company(request, found, earlier) if earlier else found


def judge_click(request: Request, click: Click, age: Optional[float] = None,
                earlier: Sequence[Event] = ()) -> Verdict:
    """Judge one click: who followed the link, and which rule says so.

    As judge, but that mail servers follow links for nobody (warmbly#412), and that
    every browser asks for a language.
    """
    found = judge(request, age, earlier)
    if found.verdict != MACHINE and owner(request.address) == "microsoft-mail":
        return Verdict(MACHINE, "mail-network")
    if found.verdict not in OPENS:
        return found
    if not click.has_language and age is not None and 0 <= age <= 60:
        return Verdict(UNKNOWN, "no-language")
    return Verdict(found.verdict, "opened") if click.is_opened else found


# ---------------------------------------------------------------------------
# Judge: hits in the light of those before
# ---------------------------------------------------------------------------
# What judge cannot know from one request: who writes the mails, what a client did
# seconds ago, which opens a later one overrules. Bounded in memory, no files. The
# same hits in the same order come to the same verdicts: so rejudge has only the log.

Open = Tuple[int, Request, Verdict]  # when, by whom, why
NOBODY = Request()                   # who a private request may be logged as
COMPOSING = Verdict(SELF, "composing")
SENDER_CLIENT = Verdict(SELF, "sender-client")
OWN_NETWORK = Verdict(SELF, "own-network")
SCANNED = Verdict(MACHINE, "burst")
OVERRULING = {"hit": MANY_NETWORKS, "clicked": SCANNED}  # what overrules earlier ones

# Verdicts that rest on what no log keeps stay as they are; so do those that rest on
# the time of sending where it is not known any more.
UNREPEATABLE = ("prefetch-header", "probe", "no-language")
BY_NETWORK = ("mail-network", *(rule.reason for rule in NETWORK_RULES))
BY_TIME = ("fast", "early", "security-gateway")


class Judge:
    """Judge hits in the light of those just before.

    It remembers the opens of each tag in the last minute, with address and agent, and
    who fetched pixels while their mail was being written.
    """

    REPEAT = 15        # seconds in which the same client's fetches are one open
    MINUTE = 60        # seconds in which two networks are hardly one reader; a
    #                    scanner's clean id came that soon after (gophish#973)
    AT_ONCE = 2        # seconds in which nobody follows three links, nor two in one
    MOST_TAGS = 8192   # with opens in the last minute
    MOST_OPENS = 16    # of a tag; one client has at most five
    MOST_STRAYS = 4    # of a network
    MOST_SENDERS = 65536
    SENDS_MANY = 3     # tags after which a composer is taken for the sender of all

    def __init__(self, is_me: Callable[[str], bool] = lambda address: False) -> None:
        self._is_me = is_me
        # What was put last stands last: see _put.
        self._opens: Dict[str, List[Open]] = {}
        self._clicks: Dict[Tuple[str, str], List[Tuple[int, Event]]] = {}
        self._strays: Dict[str, List[Tuple[int, bytes]]] = {}
        self._senders: Dict[int, Tuple[str, ...]] = {}

    def judge(self, tag_id: str, when: int, request: Request,
              age: Optional[float] = None, composing: bool = False,
              click: Optional[Click] = None) -> Tuple[Verdict, List[Event]]:
        """Return the verdict on a hit or click, and the earlier ones it overrules.

        Those are OVERRULING from now on; hits were opens until now. The reason of an
        open that was counted already is "repeat". when and age are in seconds, since
        1970 and since sending; composing: the mail is still being written.
        """
        if self._is_me(request.address):
            return OWN_NETWORK, []
        if composing:
            self._learn_sender(tag_id, request.address, request.agent)
            return COMPOSING, []
        if self._senders and self._is_sender(tag_id, request):
            return SENDER_CLIENT, []
        if click:
            return self._judge_click(tag_id, when, request, age, click)
        opens = self._opens.get(tag_id)
        if opens and abs(when - opens[-1][0]) <= self.MINUTE or self._strays:
            return self._judge_beside(tag_id, when, request, age, opens or [])
        found = judge(request, age) if request.purpose or age is not None \
            else judge_client(request.agent, request.address)
        if found.verdict in OPENS:
            _put(self._opens, tag_id, [(when, request, found)], self.MOST_TAGS)
        return found, []

    def _judge_beside(self, tag_id: str, when: int, request: Request,
                      age: Optional[float], opens: List[Open]
                      ) -> Tuple[Verdict, List[Event]]:
        """Judge a hit beside what is remembered."""
        if len(opens) == 1 and not self._strays:  # most are by the same client again
            before, client, found = opens[0]
            if client == request and abs(when - before) <= self.REPEAT:
                return Verdict(found.verdict, "repeat"), []
        opens = [each for each in opens if abs(when - each[0]) <= self.MINUTE]
        others = [each for each in opens if each[1].address != request.address]
        earlier = [_event(tag_id, *each) for each in others]
        found = judge(request, age, earlier + self._probes(tag_id, when, request))
        if found.verdict not in OPENS:
            return found, []
        overruled = [each for each, event in zip(others, earlier)
                     if outranks(request, found, event)]
        opens = [each for each in opens if each not in overruled]
        if any(abs(when - before) <= self.REPEAT
               and is_same_client(request, found, client, judged)
               for before, client, judged in opens):
            found = Verdict(found.verdict, "repeat")
        else:
            opens.append((when, request, found))
        _put(self._opens, tag_id, opens[-self.MOST_OPENS:], self.MOST_TAGS)
        return found, [_event(tag_id, before, NOBODY if client.private else client, was)
                       for before, client, was in overruled]

    def _judge_click(self, tag_id: str, when: int, request: Request,
                     age: Optional[float], click: Click
                     ) -> Tuple[Verdict, List[Event]]:
        """Judge a click beside those that came just before from its network."""
        key = tag_id, network(request.address)
        clicks = [each for each in self._clicks.get(key, ())
                  if abs(when - each[0]) <= self.AT_ONCE]
        links = {event.detail[:LINK_LENGTH]: before for before, event in clicks}
        links[click.link] = when
        found = judge_click(request, click, age, self._probes(tag_id, when, request))
        overruled: List[Event] = []
        if len(links) > 2 or [*links.values()].count(when) > 1:
            found = SCANNED
            overruled = [event for _, event in clicks if event.verdict != MACHINE]
            clicks = [(before, event._replace(verdict=MACHINE))
                      for before, event in clicks]
        client = NOBODY if request.private else request
        clicks.append((when, _event(tag_id, when, client, found)._replace(
            event="clicked", detail=click_detail(click.link, client.agent))))
        _put(self._clicks, key, clicks[-self.MOST_OPENS:], self.MOST_TAGS)
        return found, overruled

    def _probes(self, tag_id: str, when: int, request: Request) -> List[Event]:
        """Return a damaged copy of an id that came from the network of a request."""
        strays = self._strays.get(network(request.address), ())
        if any(abs(when - before) <= self.MINUTE and is_damaged(stray, tag_id.encode())
               for before, stray in strays):
            return [Event("", "stray", tag_id, None, None, address=request.address)]
        return []

    def stray(self, segment: bytes, address: str, when: int) -> None:
        """Remember part of a path that looks like an id and is none."""
        near = network(address)
        if near:
            strays = [*self._strays.get(near, ()), (when, segment[:80])]
            _put(self._strays, near, strays[-self.MOST_STRAYS:], self.MOST_TAGS)

    def learn(self, event: Event) -> None:
        """Learn from a logged hit who sends, to know it after a restart."""
        agent = agent_of(event)
        if event.event in JUDGED and event.reason == "composing" and agent:
            self._learn_sender(event.id, event.address, agent)

    def _learn_sender(self, tag_id: str, address: str, agent: str) -> None:
        if is_personal(address, agent):
            client = hash((address, agent))
            tags = self._senders.get(client, ())
            if tag_id not in tags and len(tags) < self.SENDS_MANY:
                tags = *tags, tag_id
            _put(self._senders, client, tags, self.MOST_SENDERS)

    def _is_sender(self, tag_id: str, request: Request) -> bool:
        """Tell whether a mail's sender looks at it; a log may know only the network."""
        address, agent = request.address, request.agent
        for known in (address, kept_address(address, "truncate")):
            tags = self._senders.get(hash((known, agent)), ())
            if tag_id in tags or len(tags) == self.SENDS_MANY:
                return True
        return False

    def forget_old(self, now: int) -> None:
        """Forget what is older than a minute, or from a future that never came."""
        memories: Any = self._opens, self._clicks, self._strays
        for memory in memories:
            for key in list(takewhile(
                    lambda key: abs(now - memory[key][-1][0]) > self.MINUTE, memory)):
                del memory[key]


def _put(memory: Dict[Any, Any], key: object, value: object, most: int) -> None:
    """Put an entry at the end; where there are too many, forget the older half."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > most:
        for old in list(islice(memory, most // 2)):
            del memory[old]


def _event(tag_id: str, when: int, client: Request, judged: Verdict) -> Event:
    return Event(utc_text(when), "hit", tag_id, None, None, *judged,
                 client.address, client.agent)


def is_same_client(request: Request, found: Verdict, other: Request, judged: Verdict
                   ) -> bool:
    """Tell whether two opens were fetched by one client.

    Two addresses of an image proxy are one client, and so are two of a network.
    """
    return request.agent == other.agent and (
        request.address == other.address or found == judged and found.verdict == PROXY
        or network(request.address) == network(other.address))


def is_personal(address: str, agent: str) -> bool:
    """Tell whether a client may be one person's own program.

    Whoever writes in Gmail fetches through the same proxy as whoever reads there.
    """
    return (address != "" and owner(address) == ""
            and read_agent(agent).verdict not in (PROXY, MACHINE))


def is_damaged(stray: bytes, tag_id: bytes) -> bool:
    """Tell whether a stray is the id with something appended or a little changed.

    Seen as %27, a wrong last letter, capitals (gophish#973, emdash#3298).
    """
    if stray == tag_id:
        return False
    stray = stray.lower()
    if tag_id in stray:
        return True
    same = sum(a == b for a, b in zip(stray, tag_id))
    return abs(len(stray) - len(tag_id)) <= 3 and same >= len(tag_id) - 3


def rejudge(lines: Callable[[bytes], Iterable[bytes]], tags: Mapping[str, Tag]
            ) -> Iterator[Event]:
    """Judge hits and clicks of a log by today's rules; yield what to append to it.

    Those are "verdict" events with the tag's own counts after each, and a "count"
    event for each tag whose last open is another one then. Called with a word, lines
    gives the log's lines with that word; tags is what is known by now. Appended, they
    leave nothing for a second time. Memory is for two minutes of hits, for the
    verdicts in the log and for the tags with opens.
    """
    review = _Review(lines(b",verdict,"), tags)
    for kind in JUDGED:
        yield from review.verdicts(lines(b",%b," % kind.encode()), kind)
    yield from review.counts()


class _Review:
    """Compare what a log says of its hits with what it should say.

    Most are rightly judged and for minutes the only ones of their tags: these cost only
    a look. A later hit may overrule one for a minute, so what differs is held so long.
    Of two by one client in one second, which no verdict tells apart, the first stands
    for both.
    """

    def __init__(self, verdicts: Iterable[bytes], tags: Mapping[str, Tag]) -> None:
        shared: Dict[Tuple[str, str], Tuple[str, str]] = {}
        self._said = {_key(event): shared.setdefault(event[5:7], event[5:7])
                      for event in map(parse_event, verdicts)
                      if event and event.event == "verdict"}
        self._tags = tags
        self._sent = {tag_id: tag.sent for tag_id, tag in tags.items() if tag.sent}
        self._judge = Judge()
        self._held: Dict[int, Tuple[float, Event, Tuple[str, str]]] = {}
        # Of two minutes: of each tag hit its only line, or b"" where the Judge knows
        # all of them, and the keys of the hits that were weighed.
        self._minutes = "", ""
        self._newer: Dict[object, bytes] = {}
        self._older: Dict[object, bytes] = {}
        self._opens: Dict[str, int] = {}  # of the tags that are corrected
        self._last_opens: Dict[str, str] = {}
        # Of each tag the first click by a person that is no open.
        self._spare: Dict[str, Tuple[Event, Tuple[str, str]]] = {}
        self._ended: Set[str] = set()     # tags whose last open is taken back
        self._hidden: Set[str] = set()    # tags with a hit by nobody knows whom

    def verdicts(self, lines: Iterable[bytes], kind: str) -> Iterator[Event]:
        """Judge the hits in some lines; yield verdicts when nothing overrules them."""
        for line in lines:
            cells = event_cells(line)
            if not cells or cells[1] != kind:
                continue
            minute, is_full = cells[0][:16], len(self._newer) > Judge.MOST_TAGS
            if minute != self._minutes[0] or is_full:
                if not is_time(cells[0]):
                    continue
                if minute != self._minutes[1] or is_full:  # the clock may step back
                    self._newer, self._older = {}, self._newer
                self._minutes = minute, self._minutes[0]
                yield from self._released(seconds(cells[0]))
            if kind == "hit":
                self._take(line, cells)
            else:
                self._weigh(line, self._judge)
        yield from self._released(float("inf"))

    def _take(self, line: bytes, cells: Sequence[str]) -> None:
        """Look at a hit, and weigh it if need be."""
        when, _, tag_id, _, _, verdict, reason, address, agent = cells
        said = verdict, reason
        if self._said:
            said = self._said.get(hash((tag_id, when, address, agent)), said)
        first = self._newer.get(tag_id, self._older.get(tag_id))
        self._newer[tag_id] = line if first is None else b""
        if first is not None:
            for each in filter(None, (first, line)):
                self._weigh(each, self._judge)
        elif not address or said != self._alone(when, tag_id, address, agent):
            self._weigh(line, Judge())
        elif is_open(*said):
            self._last_opens[tag_id] = when

    def _alone(self, when: str, tag_id: str, address: str, agent: str) -> Verdict:
        """Judge a hit by itself."""
        sent = self._sent.get(tag_id)
        if sent:
            return judge(Request(agent, address), seconds(when) - seconds(sent))
        return judge_client(agent, address) if owner(address) else read_agent(agent)

    def _weigh(self, line: bytes, judge: Judge) -> None:
        """Judge a hit beside those that a Judge knows; hold what differs."""
        event = parse_event(line)
        if not event or event.id not in self._tags:
            return
        tag, key, when = self._tags[event.id], _key(event), seconds(event.time)
        said = found = self._said.get(key, event[5:7])
        if not self._stays(event, *said, tag):
            found, overruled = judge.judge(
                event.id, int(when), Request(agent_of(event), event.address),
                when - seconds(tag.sent) if tag.sent else None, click=Click(
                    event.detail[:LINK_LENGTH]) if event.event == "clicked" else None)
            for old in overruled:
                _, old, _ = self._held.get(_key(old), (0, old, found))
                self._held[_key(old)] = when, old, OVERRULING[old.event]
        if key in self._newer or key in self._older:
            return
        self._newer[key] = b""
        if found != said:
            self._held.setdefault(key, (when, event, found))
        if is_open(*found) and (found == said or event.event == "hit"):
            self._last_opens[event.id] = max(
                event.time, self._last_opens.get(event.id, ""))

    def _released(self, now: float) -> Iterator[Event]:
        """Yield the verdicts that differ from what the log says, a minute later."""
        for key, (when, event, found) in list(self._held.items()):
            if abs(now - when) <= Judge.MINUTE:
                break
            del self._held[key]
            tag, said = self._tags[event.id], self._said.get(key, event[5:7])
            if event.event == "clicked" and is_open(*found) and not is_open(*said):
                self._spare.setdefault(event.id, (event, found))
                found = Verdict(found[0], "opened")
            if found != said and not (said in OVERRULING.values()
                                      and event.id in self._hidden):
                opens = self._opens.get(event.id, tag.opens) + is_open(*found)
                self._opens[event.id] = opens = max(0, opens - is_open(*said))
                if event.time == tag.last_open and not is_open(*found):
                    self._ended.add(event.id)
                yield event._replace(event="verdict", hits=tag.hits, opens=opens,
                                     verdict=found[0], reason=found[1])

    def counts(self) -> Iterator[Event]:
        """Let a click be the open of a tag without one; yield last opens that changed.

        One that was not taken back may be known from older files of the log.
        """
        for tag_id, (event, found) in self._spare.items():
            if not self._opens.get(tag_id, self._tags[tag_id].opens):
                self._opens[tag_id], self._last_opens[tag_id] = 1, event.time
                yield event._replace(event="verdict", hits=self._tags[tag_id].hits,
                                     opens=1, verdict=found[0], reason=found[1])
        for tag_id, opens in self._opens.items():
            tag, last_open = self._tags[tag_id], self._last_opens.get(tag_id, "")
            if tag_id not in self._ended:
                last_open = max(last_open, tag.last_open)
            last_open = last_open if opens else ""
            if last_open != tag.last_open and (last_open or not opens):
                yield Event(tag.last_hit or tag.last_open or last_open, "count",
                            tag_id, tag.hits, opens, detail=last_open)

    def _stays(self, event: Event, verdict: str, reason: str, tag: Tag) -> bool:
        """Tell whether a verdict rests on what the log does not hold."""
        if not event.address or not agent_of(event) and reason != "no-agent":
            self._hidden.add(event.id)
            return True
        return (verdict == SELF or reason in UNREPEATABLE
                # A truncated address can fall out of a network smaller than a /24.
                or reason in BY_NETWORK and not owner(event.address)
                or reason in BY_TIME and not tag.sent)


def _key(event: Event) -> int:
    """Return what tells the hits of a log apart, and finds that of a verdict."""
    return hash((event.id, event.time, event.address, event.detail))


# ---------------------------------------------------------------------------
# Pixel server
# ---------------------------------------------------------------------------
# Strangers reach this. One thread waits for everybody and never for anybody: a
# request head that is whole is judged, logged and answered at once; one that trickles
# in waits in a selector, 8 KB and 5 seconds in total. Whatever may take its time, the
# lines for people, fsync, commands for opens, has a thread of its own.

# The smallest transparent GIF that every decoder accepts: 1x1, one LZW code, its end.
PIXEL = (b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff"
         b"!\xf9\x04\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00"
         b"\x02\x02D\x01\x00;")

# Gmail's proxy asks again when told no-cache (wordtothewise.com, 2014-03).
_HEAD = (b"HTTP/1.1 %d %b\r\n"
         b"Content-Type: %b\r\n"
         b"Content-Length: %d\r\n"
         b"Cache-Control: no-store, no-cache, must-revalidate, max-age=0, private\r\n"
         b"Pragma: no-cache\r\n"
         b"Expires: 0\r\n"
         b"X-Content-Type-Options: nosniff\r\n"
         b"X-Robots-Tag: noindex\r\n"
         b"%b"
         b"Connection: close\r\n"
         b"\r\n")
_PAGE = ("<!doctype html><html lang=en><meta charset=utf-8>"
         "<meta name=viewport content='width=device-width'><title>Unsubscribe</title>"
         "<style>body{{font:1.2em sans-serif;max-width:30em;margin:4em auto;"
         "padding:0 1em}}button{{font:inherit;padding:.5em 1em}}</style><p>{}\n")
_ASKING = _PAGE.format("Do you want no more of these mails?<form method=post>"
                       "<button>Unsubscribe</button></form>").encode()
_GRANTED = _PAGE.format("You are unsubscribed: no more of these mails.").encode()
PIXEL_ANSWER = _HEAD % (200, b"OK", b"image/gif", len(PIXEL), b"") + PIXEL

_STATUS = {200: b"OK", 302: b"Found", 400: b"Bad Request", 404: b"Not Found",
           405: b"Method Not Allowed", 431: b"Request Header Fields Too Large",
           503: b"Service Unavailable"}

# RFC 9112, strictly: one space, a visible target, CRLF, no folding, no NUL.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"%b ([!-~]+) HTTP/1\.[01]\r\n" % _TOKEN)
_PLAIN_GET = re.compile(rb"GET (/[!-~]*) HTTP/1\.[01]\r\n([^\0]*)")
_HEADERS = re.compile(rb"(?:%b:[^\r\n\0]*\r\n)*\r\n" % _TOKEN)
_METHOD_START = re.compile(rb"[A-Z]{1,20}(?: |$)")
# The headers that tell of a body, who fetches, and whether it wants to be known.
_TELLING_HEADER = re.compile(
    rb"^(content-length|transfer-encoding|user-agent|x-forwarded-for|dnt|sec-gpc"
    rb"|(?:sec-|x-)?purpose|x-moz):[ \t]*([^\r]*)", re.I | re.M)
# All but the first are added by proxies in front of a server, not by a reader's.
_PROXY_HEADER = re.compile(rb"^x-(?:forwarded-(for|proto|host|port)|real-ip):",
                           re.I | re.M)
_PRIVATE = re.compile(r"127\.|10\.|172\.(?:1[6-9]|2\d|3[01])\.|192\.168\.|169\.254\."
                      r"|::1$|f[cd]|fe[89ab]", re.I)
FORGED = b"192.0.2.77"  # nobody's (RFC 5737): doctor claims it, to see who is believed
# EAGAIN, and what OpenSSL says for it: want read, want write.
_NOT_YET = (errno.EAGAIN, 2, 3)
# Where recipients unsubscribe; with an extension behind it, it is a pixel.
_UNSUBSCRIBING = re.compile(rb"/u/(%s)$" % _ID.encode())
_CLICK = re.compile(rb"/([^/]*)(?:~|%7[Ee])([^/]*)$")  # both are ~ (RFC 3986, 2.3)
_LANGUAGE = re.compile(rb"^accept-language:[ \t]*[^ \t\r]", re.I | re.M)
_STRAY = re.compile(rb"[^/]{15,80}")  # a path segment that may be a damaged id

MAX_HEAD = 8192      # bytes of a request head; browsers send under 2,000
HEAD_SECONDS = 5.0   # for the whole head and the TLS handshake before it
LINGER_SECONDS = 1.0  # for reading what a client still sends behind our answer
LINGER_BYTES = 65536
DRAIN_SECONDS = 5.0  # for what is under way when the server is stopped
BACKLOG = 4096       # the stock 5 loses clients in a stall of 0.3 s
BURST = 4            # requests per write to the log; with more, clients idle meanwhile
MAX_CONNECTIONS = 4096  # that wait
TICK_SECONDS = 1.0


def answer(status: int, body: bytes = b"", kind: bytes = b"text/plain",
           location: bytes = b"") -> bytes:
    """Return a whole response; nothing of the request is repeated."""
    body = body or _STATUS[status] + b"\n"
    more = b"Location: %b\r\n" % location if location else \
        b"Allow: GET, HEAD\r\n" if status == 405 else b""
    return _HEAD % (status, _STATUS[status], kind, len(body), more) + body


def plain_address(address: str) -> str:
    """Return an IPv4 address that came as ::ffff:192.0.2.1 in its own form."""
    return address[7:] if address[:7].lower() == "::ffff:" else address


def client_address(peer: str, forwarded: str, is_trusted: Callable[[str], bool]) -> str:
    """Return who asked: the peer, or who a trusted proxy says it was.

    X-Forwarded-For is read from the right, past the trusted proxies: what stands to
    the left of the first stranger was written by that stranger.
    """
    client = peer
    for hop in reversed(forwarded.split(",")):
        hop = plain_address(hop.strip())
        if not is_trusted(client) or "%" in hop or _number(hop) is None:
            break
        client = hop
    return client


def network_test(networks: Sequence[Any]) -> Callable[[str], bool]:
    """Return a test whether an address lies in one of some networks."""
    from ipaddress import ip_address

    @lru_cache(maxsize=4096)
    def is_inside(address: str) -> bool:
        return any(ip_address(address) in net for net in networks)
    return is_inside if networks else lambda address: False


def read_headers(headers: bytes, peer: str,
                 is_trusted: Callable[[str], bool]) -> Optional[Request]:
    """Return what a block of header lines says of its client.

    None is for a block that is not clean, or that has a body behind it.
    """
    told: Dict[bytes, List[str]] = {}
    for name, value in _TELLING_HEADER.findall(headers):
        text = value.rstrip(b" \t").decode("latin-1")
        told.setdefault(name.lower(), []).append(text)
    if not _HEADERS.fullmatch(headers) or b"transfer-encoding" in told \
            or told.pop(b"content-length", ["0"]) != ["0"]:
        return None
    agents = told.pop(b"user-agent", [""])
    forwarded = told.pop(b"x-forwarded-for", [])
    private = "1" in told.pop(b"sec-gpc", []) + told.pop(b"dnt", [])
    return Request(agents[-1][:MAX_AGENT],
                   client_address(peer, ",".join(forwarded), is_trusted),
                   " ".join(chain(*told.values())), private)


class Background:
    """A bounded queue, and the thread that works it off; who fills it never waits.

    With a period, there is work that often in any case, and once more at the end.
    """

    MOST = 1000  # that wait

    def __init__(self, work: Callable[[], None], say: Callable[[str], None],
                 period: Optional[float] = None, rest: float = 1.0) -> None:
        from threading import Event

        self.waiting: Deque[Any] = deque()
        self.over = False
        self._work, self._say, self._period = work, say, period
        self._rest = rest  # seconds for what is left when the server stops
        self._news = Event()

    def __enter__(self) -> Any:
        from threading import Thread

        # Made here: 3.13 takes a thread that was made before a fork for ended.
        self._thread = Thread(target=self._run, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise TrackerError(
                f"{error}: too many processes, or too little memory") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self._news.set()
        self._thread.join(self._rest)

    def put(self, item: Any) -> bool:
        """Give the thread something to do; tell whether there was room for it."""
        if len(self.waiting) >= self.MOST:
            return False
        self.waiting.append(item)
        if not self._news.is_set():
            self._news.set()
        return True

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._news.wait(self._period)
            self._news.clear()
            is_last = self.over
            try:
                self._work()
            except (TrackerError, OSError) as error:
                self._say(explain(error))


class Lines(Background):
    """Lines for people, on stderr or in a file.

    What a frozen terminal, a full pipe or a full disk does not take is dropped and
    counted.
    """

    MOST = 5000
    GATHER = 0.05  # seconds in which lines come together for one write

    def __init__(self, path: str = "") -> None:
        super().__init__(self._write, self.rarely)
        self._path = path
        self._file = os.dup(2) if path else 2
        self._dropped = 0
        self._quiet_until: Dict[str, float] = {}
        self.reopen()

    def reopen(self) -> None:
        """Open the file, or open it again: it may have been moved away."""
        if self._path:
            new = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND
                          | os.O_NONBLOCK, 0o640)
            os.dup2(new, self._file, inheritable=False)
            os.close(new)

    def line(self, text: str) -> None:
        """Say something, with the time in front."""
        if not self.put(f"{utc_text(time.time())} {clean(text)}\n"):
            self._dropped += 1

    def rarely(self, text: str) -> None:
        """Say something unless it was said within the last minute."""
        now = time.monotonic()
        if self._quiet_until.get(text, 0.0) <= now:
            self._quiet_until[text] = now + 60
            self.line(text)

    def _write(self) -> None:
        if not self.over:
            time.sleep(self.GATHER)
        lines = [self.waiting.popleft() for _ in range(len(self.waiting))]
        before, self._dropped = self._dropped, 0
        said = f"{utc_text(time.time())} {plural(before, 'line')} dropped\n"
        rest = "".join([*lines, said * bool(before)]).encode()
        try:
            while rest:
                select.select([], [self._file], [], self._rest)
                rest = rest[os.write(self._file, rest):]
        except OSError:
            self._dropped += before + len(lines)


@lru_cache(maxsize=1)
def _times(now: int, window: int) -> Tuple[str, str, str]:
    """Return a time, and from when to when tags were made that are in their window."""
    return utc_text(now), utc_text(now - window), utc_text(now + min(5, window))


class Settings(NamedTuple):
    """How a server judges, and what it keeps and tells."""

    quiet: bool = False  # no line for each hit
    trusted_proxy: Sequence[Any] = ()  # networks
    me: Sequence[Any] = ()  # the sender's own networks
    compose_window: int = 120  # seconds
    keep_address: str = "truncate"
    keep_agent: str = "yes"


class Client(NamedTuple):
    """Who asks, and as much of it as is kept."""

    request: Request
    address: str
    agent: str
    proxied: bool  # by a proxy that is not trusted, as it seems


class Tracker:
    """Answer requests; judge, log and tell the hits among them."""

    def __init__(self, store: Store, lines: Lines, settings: Settings = Settings()
                 ) -> None:
        self.hits = 0
        self._store, self._lines, self._settings = store, lines, settings
        self._judge = Judge(network_test(settings.me))
        self._is_trusted = network_test(settings.trusted_proxy)
        self._proxied = False
        seconds(utc_text(0))  # what it imports might later find no descriptor
        self._handler = handler_class()
        # Clients repeat their headers, as proxies repeat those of all their readers.
        self._client = lru_cache(maxsize=1024)(self._read_client)

    def learn(self, path: str) -> None:
        """Learn from an event log who sends the mails, to know it after a restart."""
        with suppress(OSError, TrackerError):
            for event in read_log(path, b",composing,"):
                self._judge.learn(event)

    def respond(self, received: bytes, peer: str) -> bytes:
        """Return the answer to what a client has sent; b"" while more is to come.

        It may be sent after the next flush.
        """
        head, end, _ = received.partition(b"\r\n\r\n")
        if end and len(head) <= MAX_HEAD:
            return self._answer(head + end, peer)
        if len(received) > MAX_HEAD:
            return answer(431)
        line, end, _ = head.partition(b"\n")
        if not _METHOD_START.match(line) or \
                end and not _REQUEST_LINE.fullmatch(line + end):
            return answer(400)
        return b""

    def _answer(self, head: bytes, peer: str) -> bytes:
        plain = _PLAIN_GET.fullmatch(head)
        if plain and plain[1] != b"/health":
            return self.get(plain[1], plain[2], peer)
        if not _REQUEST_LINE.match(head):
            return answer(400)  # http.server takes more for a request than RFC 9112
        return bytes(self._handler(head, (peer, 0), self).reply)

    def get(self, target: bytes, headers: bytes, peer: str, is_hit: bool = True
            ) -> bytes:
        """Return the answer to a GET, or to what is like one but never a hit."""
        client = self._client(headers, peer)
        if not client or target[:1] != b"/":
            return answer(400)
        path = target.partition(b"?")[0]
        if path == b"/health":
            return self._health()
        if b"/u/" in path and _UNSUBSCRIBING.search(path):
            return answer(200, _ASKING, b"text/html")  # and nothing has changed
        if b"~" in path or b"%7" in path:
            reply = self._follow(path, headers, client, is_hit)
            if reply:
                return reply
        if is_hit:
            self._record(path, client)
        return PIXEL_ANSWER

    def _follow(self, path: bytes, headers: bytes, client: Client, is_hit: bool
                ) -> bytes:
        """Return the answer that leads where a link does; b"" where the path is none.

        Whose link it is does not matter; a click is counted where its tag is known.
        """
        found = _CLICK.search(path)
        url = self._store.links.find(found[2]) if found else b""
        if not found or not url:
            is_ours = found and is_id(found[1].decode("latin-1"))
            return answer(404) if is_ours else b""
        if is_hit:
            self._record(path[:found.end(1)], client, Click(
                found[2].decode(), bool(_LANGUAGE.search(headers))))
        return answer(302, location=url)

    def post(self, target: bytes) -> bytes:
        """Return the answer to a POST: unsubscribe a recipient (RFC 8058).

        It is the same for every id, known or not.
        """
        found = _UNSUBSCRIBING.search(target.partition(b"?")[0])
        if not found:
            return answer(405)
        tag_id = found[1].decode()
        tag = self._store.find(tag_id)
        if tag and tag.status != "unsubscribed":
            self._store.add(Event(utc_text(time.time()), "unsubscribed", tag_id))
        return answer(200, _GRANTED, b"text/html")

    def _read_client(self, headers: bytes, peer: str) -> Optional[Client]:
        """Return who sent a block of header lines; None: not clean, or with a body."""
        request = read_headers(headers, peer, self._is_trusted)
        if not request:
            return None
        address, agent = self._kept(request.address, request.agent)
        if request.private:
            address = agent = ""
        added = {name.lower() for name in _PROXY_HEADER.findall(headers)}
        return Client(request, address, agent,
                      b"for" in added and not self._is_trusted(peer)
                      and FORGED not in headers
                      and (len(added) > 1 or bool(_PRIVATE.match(peer))))

    def _kept(self, address: str, agent: str) -> Tuple[str, str]:
        """Return as much of an address and an agent as is wanted in the log."""
        return (kept_address(address, self._settings.keep_address),
                agent if self._settings.keep_agent == "yes" else "")

    def _record(self, path: bytes, client: Client, click: Optional[Click] = None
                ) -> None:
        try:
            now = int(time.time())
            for name in ids_in_path(path):
                tag = self._store.find(name.decode())
                if tag:
                    return self._hit(name.decode(), tag, client, now, click)
            for segment in _STRAY.findall(path)[-1:]:
                self._judge.stray(segment.partition(b".")[0], client.request.address,
                                  now)
        except Exception as error:  # the pixel is sent whatever happens here
            self._lines.rarely(f"cannot count: {explain(error) or repr(error)}")

    def _hit(self, tag_id: str, tag: Tag, client: Client, now: int,
             click: Optional[Click]) -> None:
        """Judge and log a hit or click, and those that it overrules."""
        now_text, earliest, latest = _times(now, self._settings.compose_window)
        verdict, overruled = self._judge.judge(
            tag_id, now, client.request, now - seconds(tag.sent) if tag.sent else None,
            not tag.sent and earliest < tag.created <= latest,
            click and click._replace(is_opened=tag.opens > 0))
        event = Event(now_text, "hit", tag_id, tag.hits + 1, tag.opens,
                      *verdict, client.address, client.agent)
        if click:
            event = event._replace(event="clicked", hits=tag.hits,
                                   detail=click_detail(click.link, client.agent))
        if is_open(*verdict):
            event = event._replace(opens=tag.opens + 1)
        self._store.add(event)
        self.hits += not click
        opens = event.opens or 0
        for old in overruled:
            opens -= is_open(old.verdict, old.reason)
            address, agent = self._kept(old.address, agent_of(old))
            detail = click_detail(old.detail[:LINK_LENGTH], agent) if click else agent
            self._store.add(Event(
                old.time, "verdict", tag_id, event.hits, opens, *OVERRULING[old.event],
                address, detail))
        if not self._settings.quiet:
            self._lines.line(
                f"{event.event} {tag_id} {event.hits} {event.address or '-'} "
                f"{event.verdict} {event.reason} {event.detail}".rstrip())
        if client.proxied and not self._proxied:
            self._proxied = True
            peer = client.request.address
            self._lines.line(f"requests come through {peer}, a proxy that is not "
                             "trusted, so all its readers look like one: "
                             f"add --trusted-proxy {peer}")

    def _health(self) -> bytes:
        self.flush()  # what has just been counted does not wait for the disk
        trouble = self._store.trouble()
        if trouble:
            return answer(503, clean(trouble).encode() + b"\n")
        return answer(200, b"ok; requests come through a proxy that is not trusted: "
                      b"see --trusted-proxy\n" if self._proxied else b"ok\n")

    def flush(self) -> None:
        """Write what was counted to the log."""
        self._store.flush()

    def tend(self) -> bool:
        """Do what is due every second; tell whether it should be done again at once."""
        self._judge.forget_old(int(time.time()))
        return self._store.tend()


def handler_class() -> Any:
    """Return http.server's handler for all that is not the plain GET of a pixel."""
    import io
    from http.server import BaseHTTPRequestHandler

    class PixelHandler(BaseHTTPRequestHandler):
        """Turn one whole request head into the bytes of its answer: reply."""

        server: Any  # the Tracker
        raw_requestline: bytes
        reply = answer(400)

        def setup(self) -> None:
            self.rfile, self.wfile = io.BytesIO(self.request), io.BytesIO()

        def send_error(self, code: int, *_: Any, **__: Any) -> None:
            """Tell no more than the status: what is wrong is the client's to see."""
            self.reply = answer(405 if code == 501 else 400)

        def _target(self) -> bytes:
            # Not self.path, which some versions change (gh-87389).
            return re.sub(rb"^https?://[^/?#]*", b"", self.raw_requestline.split()[1],
                          flags=re.I)

        def do_GET(self) -> None:
            """Count a hit, tell the server's health, or ask whether to unsubscribe."""
            headers = self.request.partition(b"\r\n")[2]
            self.reply = self.server.get(self._target(), headers,
                                         self.client_address[0], self.command == "GET")

        def do_POST(self) -> None:
            """Unsubscribe somebody; the body, always the same, is not waited for."""
            self.reply = self.server.post(self._target())

        def do_HEAD(self) -> None:
            """Return the head of what GET would get; never a hit."""
            self.do_GET()
            self.reply = b"".join(self.reply.partition(b"\r\n\r\n")[:2])

    return PixelHandler


class Connection:
    """One whose head is not here yet, or whose rest is being read."""

    def __init__(self, new: socket.SocketType, peer: str, received: bytes) -> None:
        self.socket, self.file = new, new.fileno()
        self.peer, self.received = peer, received
        self.deadline = time.monotonic() + HEAD_SECONDS
        self.room = LINGER_BYTES  # for what it may still send
        self.answered = False
        self.rest = b""  # of the answer


class PixelServer:
    """Serve whoever connects to a listener; only sockets are dealt with here."""

    def __init__(self, listener: socket.socket, tracker: Any, lines: Lines,
                 certificate: Optional[Certificate] = None) -> None:
        import resource
        import selectors
        import socket

        self._listener, self._tracker, self._lines = listener, tracker, lines
        self._certificate = certificate
        self._socket_type = socket.socket if certificate else socket.SocketType
        self._socket_kind = int(listener.family), int(listener.type), listener.proto
        self._no_wait = int(socket.MSG_DONTWAIT)
        # Linux then sends the answer and the end of the connection in one segment.
        self._and_close = self._no_wait | getattr(socket, "MSG_MORE", 0)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            # Linux then wakes us when the request is here: a quarter less work.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT,
                                int(HEAD_SECONDS))
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._connections: Dict[int, Connection] = {}  # the oldest first
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: no limit
        self._most = min(MAX_CONNECTIONS, files * 3 // 4 % (1 << 31))
        self._pixels: List[socket.SocketType] = []  # new ones that get a pixel
        self._replies: List[Tuple[Connection, bytes]] = []
        self._next_tick = 0.0

    def serve(self, signals: Signals) -> None:
        """Answer until a signal asks to stop, then finish what is under way."""
        self._selector.register(signals.file, 1, signals.obey)
        self._selector.register(self._listener, 1, self._accept)
        while not signals.stopping:
            self._turn()
        self._accept(most=BACKLOG)
        self._reply()
        self._selector.unregister(self._listener)
        self._listener.close()
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._connections and time.monotonic() < deadline:
            self._turn()
        while self._connections:
            self._drop()

    def _turn(self) -> None:
        for key, _ in self._selector.select(max(0, self._next_tick - time.monotonic())):
            try:
                key.data(key.fd)
            except (MemoryError, OSError) as error:
                self._lines.rarely(explain(error) or "not enough memory for a request")
            if len(self._replies) >= BURST:
                self._reply()
        self._reply()
        if time.monotonic() >= self._next_tick:
            self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections.values()):
            if connection.deadline <= now:
                self._drop(connection)
        again = 100 if self._tracker.tend() else 10 if self._connections else 1
        self._next_tick = time.monotonic() + TICK_SECONDS / again

    def _accept(self, _: int = 0, most: int = BURST) -> None:
        for _ in range(most):
            try:
                # What socket.accept() wraps: its enums are a sixth of a hit's work.
                file, address = self._listener._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, ConnectionError):
                break
            except OSError as error:  # descriptors or memory have run out
                self._lines.rarely(f"cannot accept: {error.strerror}")
                if self._connections:
                    return self._drop()
                self._reply()
                return time.sleep(0.1)  # nobody can be served, rather than spin
            self._greet(self._socket_type(*self._socket_kind, file),
                        plain_address(address[0]))

    def _greet(self, new: socket.SocketType, peer: str) -> None:
        """Answer a new client whose request is here; let others wait."""
        received = b""
        try:
            if self._certificate:
                new = self._certificate.wrap(new)
            else:
                received = new.recv(MAX_HEAD + 1, self._no_wait)
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            return new.close()
        reply = self._tracker.respond(received, peer) if received else b""
        if reply is PIXEL_ANSWER:
            return self._pixels.append(new)
        if len(self._connections) >= self._most:
            self._drop()
        new.setblocking(False)
        connection = Connection(new, peer, received)
        self._connections[connection.file] = connection
        self._selector.register(new, 1, self._continue)
        if reply:
            self._replies.append((connection, reply))

    def _drop(self, connection: Optional[Connection] = None) -> None:
        """Close a connection and forget it: some one, or the oldest."""
        connection = connection or next(iter(self._connections.values()))
        if self._connections.get(connection.file) is connection:
            del self._connections[connection.file]
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _continue(self, file: int) -> None:
        connection = self._connections.get(file)
        if not connection:
            return
        data = b""
        try:
            data = connection.socket.recv(MAX_HEAD + 1)  # TLS shakes hands in here
        except (OSError, ValueError) as error:
            if getattr(error, "errno", 0) in _NOT_YET:
                return
        connection.room -= len(data)
        if not data or connection.room < 0:
            self._drop(connection)
        elif not connection.answered:
            connection.received += data
            reply = self._tracker.respond(connection.received, connection.peer)
            if reply:
                self._replies.append((connection, reply))

    def _reply(self) -> None:
        """Answer everybody whose request has been read, once it is in the log."""
        if not self._pixels and not self._replies:
            return
        self._tracker.flush()
        for new in self._pixels:
            try:
                new.send(PIXEL_ANSWER, self._and_close)
            except OSError:
                pass  # counted, but nobody is there any more
            new.close()
        for connection, reply in self._replies:
            self._finish(connection, reply)
        self._pixels.clear()
        self._replies.clear()

    def _finish(self, connection: Connection, reply: bytes) -> None:
        """Send the answer, then read on for a moment.

        Closing a socket with unread bytes would reset the connection and could take
        the answer with it.
        """
        try:
            sent = connection.socket.send(reply)
            if sent < len(reply):  # the rest, as soon as there is room
                connection.answered, connection.rest = True, reply[sent:]
                self._selector.modify(connection.socket, 2, self._send_rest)
                return
            if connection.rest:
                self._selector.modify(connection.socket, 1, self._continue)
            if self._certificate:
                with suppress(OSError):  # it has not said farewell yet
                    connection.socket.unwrap()  # type: ignore[attr-defined]
            connection.socket.shutdown(1)
        except (OSError, ValueError):
            return self._drop(connection)
        connection.answered = True
        connection.deadline = time.monotonic() + LINGER_SECONDS

    def _send_rest(self, file: int) -> None:
        connection = self._connections.get(file)
        if connection:
            self._finish(connection, connection.rest)


class Certificate:
    """A TLS certificate and its key, read again whenever their files change."""

    def __init__(self, cert_file: str, key_file: str) -> None:
        self._files = cert_file, key_file
        self._stamp: List[int] = []
        self.renew()

    def renew(self) -> None:
        """Read the files if they have changed; raise TrackerError, and stay, if bad."""
        import ssl

        try:
            stamp = [os.stat(file).st_mtime_ns for file in self._files]
            if stamp == self._stamp:
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(*self._files, password=lambda: "")
        except (OSError, ValueError) as error:
            raise TrackerError(
                f"no usable certificate and key in {' and '.join(self._files)}: "
                f"{error.args[-1]}") from None
        self._context, self._stamp = context, stamp

    def wrap(self, connection: Any) -> ssl.SSLSocket:
        """Return a TLS connection whose handshake is still to come."""
        connection.setblocking(False)
        return self._context.wrap_socket(connection, server_side=True,
                                         do_handshake_on_connect=False)


def make_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket; host "" means all addresses, IPv4 and IPv6.

    Raise TrackerError for a busy or forbidden port and an address that is not ours.
    """
    import socket

    dual = not host and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if dual or ":" in host
            else socket.AF_INET, backlog=BACKLOG, dualstack_ipv6=dual)
    except (OSError, TypeError, UnicodeError) as error:
        words = {
            errno.EADDRINUSE: f"port {port} is in use; stop the other program, or "
                              "choose another --port",
            errno.EACCES: f"port {port} is reserved for root; choose one above 1023",
            errno.EADDRNOTAVAIL: f"{host} is not an address of this machine"}
        raise TrackerError(words.get(
            getattr(error, "errno", 0),
            f"cannot listen on {host}, port {port}: {explain(error)}")) from None


def is_socket_passed() -> bool:
    """Tell whether systemd passes a listening socket, as in sd_listen_fds(3)."""
    return os.environ.get("LISTEN_PID") == str(os.getpid()) \
        and os.environ.get("LISTEN_FDS", "0") != "0"


def passed_listener() -> socket.socket:
    """Return the one listening socket that systemd passes."""
    import socket

    with suppress(OSError):
        listener = socket.socket(fileno=3)
        if os.environ["LISTEN_FDS"] == "1" and listener.family != socket.AF_UNIX \
                and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return listener
    raise TrackerError("systemd must pass one listening TCP socket, such as "
                       f"ListenStream={DEFAULT_PORT}")


def detach() -> Callable[[], None]:
    """Go on as a daemon; the process that was started waits until it is ready.

    Return what is to be called then: it lets go of terminal and starter.
    """
    waiting, telling = os.pipe()
    if os.fork():
        os.close(telling)
        os._exit(not os.read(waiting, 1))
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(waiting)

    def ready() -> None:
        with open(os.devnull, "r+b", 0) as nowhere, open(telling, "wb") as starter:
            for standard in (0, 1, 2):
                os.dup2(nowhere.fileno(), standard)
            starter.write(b"!")
    return ready


@contextmanager
def pid_file(path: str) -> Iterator[None]:
    """Keep the number of this process in a file while it runs, if one is wanted."""
    mine = b"%d\n" % os.getpid()
    if path:
        with open(path, "wb") as file:
            file.write(mine)
    try:
        yield
    finally:
        with suppress(OSError), open(path, "rb") as file:  # it may be gone
            if file.read(99) == mine:
                os.unlink(path)


class Signals:
    """What signals ask of this process: to stop, the second time at once.

    SIGHUP is for on_hangup; without one it stops as well: the terminal was closed.
    """

    def __init__(self, on_hangup: Optional[Callable[[], None]]) -> None:
        self.stopping = False
        self._on_hangup = on_hangup
        self.file, waking = os.pipe()  # readable when there is something to obey
        os.set_blocking(waking, False)
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._warn)
        signal.signal(signal.SIGINT, self._warn)
        if on_hangup or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, lambda *_: None)

    def _warn(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wait(self, length: float) -> bool:
        """Wait, but not when there is something to obey; return whether to stop."""
        if not self.stopping and select.select([self.file], [], [], length)[0]:
            self.obey()
        return self.stopping

    def obey(self, _: int = 0) -> None:
        """Do what no handler may do, for it could wait for a lock of its own thread."""
        told = os.read(self.file, 4096)
        told = told.replace(b"%c" % signal.SIGALRM, b"")  # which is time_limit's
        hangups = told.count(signal.SIGHUP) if self._on_hangup else 0
        self.stopping = self.stopping or len(told) > hangups
        if hangups and self._on_hangup:
            self._on_hangup()


# ---------------------------------------------------------------------------
# Dump: rows and events to text
# ---------------------------------------------------------------------------
# Reads only, needs no lock and no server. Rows are lists of cells that go through
# one by one; only sorting gathers them. What does not go to a terminal is never
# shortened: a screen of 0 columns stands for that.

Row = List[str]

TIME_COLUMNS = (*TIMES, "time")  # of registers and logs
PLAIN_COLUMNS = frozenset(("id", "event", *COUNTS, *TIME_COLUMNS))
TABLE_COLUMNS = ("id", "name", "hits", "opens", "last_hit", "last_open")
FILTERS = ("id", "name", "hit", "unhit", "opened", "unopened", "since", "campaign",
           "status")

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SUSPECT = frozenset((*_FORMULA_STARTS, "'"))


def is_read(opens: str, status: str) -> bool:
    """Tell whether somebody has read a mail; an answer proves it as an open does."""
    return opens != "0" or status == "replied"


def wants(options: argparse.Namespace, tag_id: str, name: str, hit: bool, opened: bool,
          when: str) -> bool:
    """Tell whether a tag or event is wanted; when is its last hit, or its time."""
    if not tag_id.startswith(options.id) or when < (options.since or "") \
            or (options.unhit if hit else options.hit) \
            or (options.unopened if opened else options.opened):
        return False
    from fnmatch import fnmatchcase

    return not options.name or fnmatchcase(name.lower(), options.name.lower())


def wanted_rows(columns: Sequence[str], rows: Iterable[Row],
                options: argparse.Namespace) -> Iterable[Row]:
    """Return the rows of a register that are wanted."""
    if not any(getattr(options, option) for option in FILTERS):
        return rows
    tag_id, name, hits, opens, last_hit = map(
        columns.index, ("id", "name", "hits", "opens", "last_hit"))
    campaign, status = cell_of(columns, "campaign"), cell_of(columns, "status")
    return (row for row in rows if wants(
        options, row[tag_id], row[name], row[hits] != "0",
        is_read(row[opens], status(row)), row[last_hit])
        and options.campaign in ("", campaign(row))
        and options.status in ("", status(row)))


def cell_of(columns: Sequence[str], column: str) -> Callable[[Row], str]:
    """Return a getter for the cell of a column; "" where a register has none."""
    return itemgetter(columns.index(column)) if column in columns else lambda _: ""


def wanted_events(events: Iterable[Event], names: Mapping[str, str],
                  options: argparse.Namespace) -> Iterator[Event]:
    """Return the events that are wanted; names are those of the tags by now."""
    return (event for event in events if wants(
        options, event.id, names.get(event.id, ""), event.event == "hit",
        event.event in JUDGED and is_open(event.verdict, event.reason), event.time))


def moment(text: str) -> str:
    """Return the UTC time that 3d, 12h, 2026-11-01 or 2026-11-01T20:14Z means.

    A date without a zone is UTC's, as all times here. Raise ValueError.
    """
    from datetime import datetime, timezone

    with suppress(ValueError):
        return utc_text(max(0.0, time.time() - span(text)))
    when = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    return utc_text((when if when.tzinfo else
                     when.replace(tzinfo=timezone.utc)).timestamp())


def span(text: str) -> float:
    """Return the seconds that 3d or 12h means; raise ValueError."""
    found = matching(r"(\d{1,9})([smhdw])", text)
    return float(found[1]) * _UNITS[found[2]]


def local_time(text: str) -> str:
    """Return a UTC time in this machine's zone: 2026-11-20T21:14:03+01:00."""
    from datetime import datetime

    with suppress(ValueError, OverflowError):  # as in the year 9999
        if is_time(text):
            return datetime.fromtimestamp(seconds(text)).astimezone().isoformat()
    return text


def in_order(columns: Sequence[str], rows: Iterable[Row],
             options: argparse.Namespace) -> Iterable[Row]:
    """Return rows sorted, turned round and in the zone that the options want.

    Cells are sorted by their numbers, and those without one behind them.
    """
    def key(row: Row) -> Tuple[bool, float, str]:
        is_number = _NUMBER.fullmatch(row[place])
        return (False, float(row[place]), "") if is_number else (
            True, 0.0, row[place].casefold())

    if options.sort:
        if options.sort not in columns:
            raise TrackerError(
                f"no column {options.sort}; there are {', '.join(columns)}")
        place = columns.index(options.sort)
        rows = sorted(rows, key=key)
    if options.reverse:
        rows = reversed(list(rows))
    if options.local:
        times = {n for n, column in enumerate(columns) if column in TIME_COLUMNS}
        rows = ([local_time(cell) if n in times else cell
                 for n, cell in enumerate(row)] for row in rows)
    return rows


def screen_width(full: bool = False) -> int:
    """Return the columns of the terminal; 0 where nothing need be shortened."""
    import shutil

    return 0 if full or not sys.stdout.isatty() else shutil.get_terminal_size().columns


def text_width(text: str) -> int:
    """Return how many terminal columns a text takes (UAX #11)."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(0 if category(c) in ("Mn", "Me", "Cf") else
               2 if east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, width: int) -> str:
    """Return text that takes at most so many terminal columns; 0 is no limit."""
    if not width or text_width(text) <= width:
        return text
    text = text[:width - 1]
    while text_width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def short(tag_id: str, screen: int) -> str:
    """Return as much of an id as tells it from a million others, for a screen."""
    return tag_id[:7] if screen else tag_id


def table_lines(heading: Row, rows: Iterable[Row], elastic: int, screen: int,
                right: Collection[str] = COUNTS) -> Iterator[str]:
    """Yield rows in columns, some on the right; one column gives way to the screen.

    The first thousand rows say how wide the columns must be.
    """
    rows = iter(rows)
    first = [heading, *islice(rows, 1000)]
    widths = [max(map(text_width, column)) for column in zip(*first)]
    too_wide = sum(widths) + 2 * (len(widths) - 1) - screen
    if screen and too_wide > 0:
        widths[elastic] = max(8, widths[elastic] - too_wide)
    for cells in chain(first, rows):
        cells[elastic] = cut(cells[elastic], screen and widths[elastic])
        spaces = [" " * (width - text_width(cell))
                  for cell, width in zip(cells, widths)]
        yield cut("  ".join(
            space + cell if column in right else cell + space
            for column, cell, space in zip(heading, cells, spaces)).rstrip(), screen)


def tag_lines(columns: Sequence[str], rows: Iterable[Row], limit: Optional[int],
              screen: int, zone: str = "UTC") -> Iterator[str]:
    """Yield a table of at most limit tags, and last what they come to."""
    rows, tags, opened, hits, opens = iter(rows), 0, 0, 0, 0
    own_cells = itemgetter(*map(columns.index, TABLE_COLUMNS))
    status, created, email = (
        cell_of(columns, column) for column in ("status", "created", "email"))
    has_mail, states = "status" in columns, dict.fromkeys(STATUSES, 0)
    heading = ["id", "name", "hits", "opens", *(
        [f"last open ({zone})", "status"] if has_mail else
        [f"last hit ({zone})", "last open", "created"])]

    def shown() -> Iterator[Row]:
        nonlocal tags, opened, hits, opens
        for row in islice(rows, limit):
            cells, state = own_cells(row), status(row)
            states[state] = states.get(state, 0) + 1
            tags, opened = tags + 1, opened + is_read(cells[3], state)
            hits, opens = hits + int(cells[2]), opens + int(cells[3])
            last_hit, last_open = (cell[:16].replace("T", " ") for cell in cells[4:6])
            rest = [last_open, state] if has_mail else [
                last_hit, last_open, created(row)[:10]]
            yield [short(cells[0], screen),
                   clean(", ".join(filter(None, (cells[1], email(row))))), *cells[2:4],
                   *(clean(cell) or "-" for cell in rest)]

    yield from table_lines(heading, shown(), 1, screen)
    left = sum(1 for _ in rows)
    yield f"{f'{tags} of ' * bool(left)}{plural(tags + left, 'tag')}, " \
        f"{opened} opened, {plural(hits, 'hit')}, {plural(opens, 'open')}" + "".join(
            f", {states[state]} {state}" for state in STATUSES if states[state])


def words(event: Event, reasons: Mapping[str, str] = {}) -> Tuple[str, str]:
    """Return a verdict and its reason; of another kind of event what it is, and why.

    What is judged says so, unless it is a hit.
    """
    about, _, _ = EVENTS.get(event.event, "").partition(";")
    kind = f"{event.event}: " if event.event in ("clicked", "verdict") else ""
    return event.verdict or event.event, kind + reasons.get(
        event.reason, event.reason or about)


def log_lines(events: Iterable[Event], screen: int) -> Iterator[str]:
    """Yield a table of events."""
    rows = ([event.time, short(event.id, screen), *map(clean, words(event)),
             clean(f"{event.address} {event.detail}".strip())] for event in events)
    heading = ["time", "id", "verdict", "reason", "address and agent"]
    return table_lines(heading, rows, 4, screen)


def as_judged(events: Sequence[Event], leads: Callable[[bytes], bytes]
              ) -> Iterator[Event]:
    """Yield events, each hit with the last verdict on it, and without those verdicts.

    A click comes with where it leads.
    """
    client = itemgetter(*map(EVENT_COLUMNS.index, ("time", "address", "detail")))
    last = {client(event): event[5:7] for event in events if event.event == "verdict"}
    hits = {client(event) for event in events if event.event in JUDGED}
    for event in events:
        if event.event in JUDGED:
            event = Event(*event[:5], *last.get(client(event), event[5:7]), *event[7:])
        if event.event == "clicked":
            link = event.detail[:LINK_LENGTH]
            event = event._replace(detail=event.detail.replace(
                link, leads(link.encode()).decode() or link, 1))
        if event.event != "verdict" or client(event) not in hits:
            yield event


def history_lines(columns: Sequence[str], row: Row, events: Sequence[Event],
                  options: argparse.Namespace, leads: Callable[[bytes], bytes]
                  ) -> Iterator[str]:
    """Yield a tag with its events, as judged by now, in words."""
    shown_time = local_time if options.local else str
    for column, cell in zip(columns, row):
        yield f"{clean(column):9} {clean(cell) or '-'}"
    yield "" if events else "\nno events of this tag are in the log"
    for event in as_judged(events, leads):
        when = shown_time(event.time)
        what, why = words(event, REASONS)
        yield clean(f"{when}  {what:7}  {why}")
        about = clean(f"{event.address}  {event.detail}".strip())
        if event.verdict or about and event.event not in ("made", "count", "sending"):
            yield cut(" " * (len(when) + 11)
                      + (about or "(nothing kept of the client)"), screen_width())


def defused(columns: Sequence[str], rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows with a quote before each text that is a live formula.

    A name or agent gets the quote that it has in a register or log. A user's own
    cell comes as it stands there: one with a quote has it already.
    """
    width = len(columns)
    ours = [n for n, column in enumerate(columns) if column in (*TEXTS, "detail")]
    texts = [n for n, column in enumerate(columns) if column not in PLAIN_COLUMNS]
    for row in rows:
        for n in chain(texts, range(width, len(row))) if len(row) > width else texts:
            cell = row[n]
            if cell[:1] in _SUSPECT and (
                    n in ours or cell[0] != "'" and not _NUMBER.fullmatch(cell)):
                row[n] = escape_formula(cell)
        yield row


def json_lines(columns: Sequence[str], rows: Iterable[Row]) -> Iterator[str]:
    """Yield a JSON array, an object a line: counts as numbers, no time as null."""
    import json

    before, names = "[", list(columns)
    for row in rows:  # which may have cells under no column
        names += [f"({n + 1})" for n in range(len(names), len(row))]
        values = {name: json_value(name, cell) for name, cell in zip(names, row)}
        yield f"{before}\n{json.dumps(values)}"
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"


def json_value(column: str, cell: str) -> Any:
    """Return what a cell is in JSON."""
    if column in COUNTS:
        return int(cell) if cell else None
    return cell or None if column in TIME_COLUMNS else cell


# ---------------------------------------------------------------------------
# Mail: pixels into messages, messages out, and what comes back
# ---------------------------------------------------------------------------
# Everything here is hostile until it is checked: messages, mailboxes, mail servers,
# and cells of a recipient list. Bytes of a message that need not change do not; what
# happens to a mail is an event in the log before the next step is taken.


# -- splice: a pixel and links into a message, all other bytes as they were ------
# Not parsed and written anew, which alters one mail in four, but cut and joined. It is
# as strangers wrote it: no claim raises, none is recursed into or scanned repeatedly.

OPT_OUT = "X-Mailtracker"
MOST_PARTS = 1000  # of a message; what comes after them stays in the last
CLIPPED = 90_000  # bytes of HTML; Gmail shows the first 102 KB or so
MOST_HTML = 4_000_000  # bytes; finding the place takes up to 40 times as much memory

# The first line that belongs to no header field; all of it, if it is blank.
_HEAD_END = re.compile(rb"^(?!From |(?!--)[!-9;-~]+[ \t]*:|[ \t])(?:\r?\n)?", re.M)
_FIELD = rb"(?im)^(?:%s)[ \t]*:(.*(?:\n[ \t].*)*)\n?"
_MEDIA_TYPE = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+", re.ASCII)
_PARAMETER = re.compile(
    r';\s*([^\s=;"]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\s]*))', re.DOTALL)
_ENCODED_WORD = re.compile(  # RFC 2047, with the blanks between two of them
    r"=\?([\w.:+-]+)(?:\*[\w-]*)?\?([bq])\?([^?]*)\?=(?:\s+(?==\?))?", re.ASCII | re.I)
_DELIMITER = re.compile(rb"\n--([^\r\n]*)")
_QUOTED = re.compile(rb"=(?:([0-9A-Fa-f]{2})|\r?\n)")
_NOT_BASE64 = re.sub(rb"[A-Za-z0-9+/]", b"", bytes(range(256)))
_ENCODINGS = ("7bit", "8bit", "binary", "quoted-printable", "base64")
# Charsets in which the byte of an ASCII character may mean something else.
_STATEFUL = re.compile(r"(cs)?(utf-?(16|32|7)|iso-?2022|hz|ucs|unicode)")
_NO_CHARSET = re.compile("idna|punycode|escape|undefined|ascii$")

_SEALS = ("DKIM-Signature", "ARC-Seal", "DomainKey-Signature")
_SEALED_TYPES = {
    "multipart/signed": "signed",
    "multipart/encrypted": "encrypted",
    "application/pgp-encrypted": "encrypted",
    "application/pkcs7-mime": "signed or encrypted",
    "application/x-pkcs7-mime": "signed or encrypted",
    "multipart/report": "a report",
}
_BODIES = ("multipart/alternative", "multipart/mixed", "multipart/related")
_DIFF = re.compile(r"^[> ]*(?:diff -|@@ -\d|\*\*\* \d)", re.M)

# As in HTML5: <!--> is a whole comment, and one that never ends hides the rest.
_COMMENT = re.compile(r"<!--(?:-?>|.*?(?:--!?>|\Z))", re.DOTALL)
_BODY = re.compile(r"<body\b", re.I | re.ASCII)
_TAG_END = re.compile(r"""[^>"']*(?:(?:"[^"]*"|'[^']*')[^>"']*)*>""")
_ENDS = re.compile(r"</(body|html)\b", re.I | re.ASCII)
_IMAGE = re.compile(r"<img\b[^<>]*>", re.I | re.ASCII)
_SOURCE = re.compile(
    r"""(?<![\w-])src\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>]+))""", re.I | re.ASCII)
# What ends in each form also ends with the text, so nothing is read twice: html.parser
# needs 5 s for 8,000 times "<a ".
_MARKUP = re.compile(
    _COMMENT.pattern + r"|<[!?][^>]*|</(?![a-z])[^>]*|<(script|style|title|textarea|xmp"
    r"|iframe|noembed|noframes)(?=[\s/>]).*?(?:</\1(?=[\s/>])|\Z)|<(/?[a-z][^\s/>]*)",
    re.I | re.A | re.DOTALL)
_ATTRIBUTE = re.compile(
    r"""[\s/]*([^\s/>][^\s/>=]*)(?:\s*=\s*"""
    r"""(?:"([^"]*)(?:"|\Z)|'([^']*)(?:'|\Z)|([^\s"'>][^\s>]*)))?""", re.A)
_ENTITY = re.compile(r"&(?:#x[\da-f]+;?|#\d+;?|\w+;)", re.I | re.A)
# A text in which people see an address: mail programs warn where it leads elsewhere.
_SHOWS_ADDRESS = re.compile(
    r"\bhttps?://|\bwww\.|^\s*(?:[^\s/@:.]+\.)+[^\s\d/@:.]{2,}(?:[:/?#]\S*)?\s*$",
    re.I)
MOST_LINKS = 1000  # of a message that are changed
MAX_LINE = 998     # bytes (RFC 5322, 2.1.1)

Hrefs = Callable[[Collection[str]], Mapping[str, str]]


class Part(NamedTuple):
    """One part of a message, and where in its bytes it stands."""

    head: bytes  # the header block as it stands, without the blank line
    start: int  # of the body
    end: int
    type: str  # such as text/html, in lower case
    parents: Tuple[str, ...]  # the types of the multiparts around it, outermost first
    at: int  # where the head begins


def split(raw: bytes) -> List[Part]:
    """Return the parts of a message in document order, multiparts before their parts.

    There is at least one, and at most MOST_PARTS; message/* is not looked into.
    """
    parts = [_part_at(raw, 0)]
    path = [0]  # the numbers of the parts that are open, outermost first
    levels = _boundary(parts[0], 0)  # where in the path the owner of a boundary is
    for line in _DELIMITER.finditer(raw) if levels else ():
        name = line[1].rstrip(b" \t")
        is_last = name not in levels and name.endswith(b"--")
        level = levels.get(name[:-2] if is_last else name)
        if level is None:
            continue
        end = line.start() - (raw[line.start() - 1:line.start()] == b"\r")
        for number in path[level + 1:]:  # the delimiter may own what ended a head
            start = min(parts[number].start, end)
            parts[number] = parts[number]._replace(start=start, end=end)
        del path[level + 1:]
        levels = {b: own for b, own in levels.items() if own < level + 1 - is_last}
        if len(parts) == MOST_PARTS:
            break
        if not is_last:
            path.append(len(parts))
            parts.append(_part_at(raw, raw.find(b"\n", line.end()) + 1 or len(raw),
                                  parts[path[level]]))
            levels.update(_boundary(parts[-1], level + 1))
    return parts


def _part_at(raw: bytes, at: int, outer: Optional[Part] = None) -> Part:
    """Return the part whose head begins there, as if it went on to the end."""
    found = _HEAD_END.search(raw, at)
    stop, start = found.span() if found else (len(raw), len(raw))
    kind = _MEDIA_TYPE.match(field(raw[at:stop], "Content-Type"))
    is_mail = outer is not None and outer.type == "multipart/digest"
    return Part(raw[at:stop], start, len(raw), kind[0].lower() if kind else
                "message/rfc822" if is_mail else "text/plain",
                (*outer.parents, outer.type) if outer else (), at)


def _boundary(part: Part, level: int) -> Dict[bytes, int]:
    """Return the boundary of a multipart, with its level; nothing for other parts."""
    text = _type_parameters(part).get("boundary", "").rstrip()
    if not text or not part.type.startswith("multipart/"):
        return {}
    return {text.encode("utf-8", "surrogateescape"): level}


def fields(head: bytes, name: str) -> List[str]:
    """Return the values of a header field, unfolded."""
    return [re.sub(rb"\r?\n", b"", value).decode("utf-8", "surrogateescape").strip()
            for value in re.findall(_FIELD % name.encode(), head)]


def field(head: bytes, name: str) -> str:
    """Return the first value of a header field; empty for none."""
    return next(iter(fields(head, name)), "")


def parameters(value: str) -> Dict[str, str]:
    """Return the parameters of a header field such as Content-Type; lower-case names.

    The first of a name counts.
    """
    return {name.lower(): re.sub(r"\\(.)", r"\1", quoted) or bare.strip('"')
            for name, quoted, bare in reversed(_PARAMETER.findall(value))}


def _type_parameters(part: Part) -> Dict[str, str]:
    """Return the parameters of a part's type."""
    return parameters(field(part.head, "Content-Type"))


def decoded_words(value: str) -> str:
    """Return the value of a header field with its encoded words (RFC 2047) decoded."""
    def decoded(word: re.Match[str]) -> str:
        charset, form, text = word.groups()
        coding = "base64" if form in "bB" else "quoted-printable"
        data = text.replace("_", " ").encode("utf-8", "surrogateescape")
        return _payload(data, coding).decode(_codec(charset.lower()), "replace")
    return _ENCODED_WORD.sub(decoded, value)


def is_attachment(part: Part) -> bool:
    """Tell whether a part is a file rather than text of the message."""
    value = field(part.head, "Content-Disposition")
    return value.partition(";")[0].strip().lower() not in ("", "inline") \
        or any(name.startswith("filename") for name in parameters(value))


def part_text(raw: bytes, part: Part) -> str:
    """Return the text of a leaf; what cannot be decoded is replaced."""
    coding, charset = _coding(part)
    return _payload(raw[part.start:part.end], coding).decode(_codec(charset), "replace")


def _coding(part: Part) -> Tuple[str, str]:
    """Return the transfer encoding and the charset that a part says it has."""
    charset = _type_parameters(part).get("charset", "us-ascii")
    return field(part.head, "Content-Transfer-Encoding").lower() or "7bit", \
        charset.strip().lower()


def _codec(charset: str) -> str:
    """Return a charset if Python knows it; else, and for ASCII, UTF-8."""
    with suppress(LookupError, ValueError):
        if not _NO_CHARSET.search(charset):
            "".encode(charset)
            return charset
    return "utf-8"


def _payload(data: bytes, coding: str) -> bytes:
    """Return a body without its transfer encoding, as far as that can be undone."""
    if coding != "base64":
        return a2b_qp(data) if coding == "quoted-printable" else data
    letters = data.partition(b"=")[0].translate(None, _NOT_BASE64)
    return a2b_base64(letters[:len(letters) - (len(letters) % 4 == 1)] + b"==")


def _transferred(data: bytes, coding: str, eol: bytes) -> bytes:
    """Return a body in a transfer encoding."""
    from base64 import encodebytes

    if coding not in ("base64", "quoted-printable"):
        return data
    encoded = encodebytes(data) if coding == "base64" else b2a_qp(data)
    return re.sub(rb"\r?\n", eol, encoded)


def _eol(raw: bytes) -> bytes:
    """Return the line end of a message."""
    return b"\n" if re.match(rb"[^\r\n]*\n", raw) else b"\r\n"


def edited(raw: bytes, part: Part, edit: Callable[[str], str]) -> bytes:
    """Return a message with the text of a leaf edited, all else as it was.

    The leaf, if it changes, becomes UTF-8 in quoted-printable, which hold any text.
    Edit the last one first: the parts before it stay where they are.
    """
    old, eol = part_text(raw, part), _eol(raw)
    text = edit(old)
    if text == old:
        return raw
    kind = {**_type_parameters(part), "charset": "utf-8"}
    value = "; ".join([part.type, *(f'{name}="{kind[name]}"' for name in kind)])
    head = without_field(part.head, "Content-(?:Type|Transfer-Encoding|MD5)")
    head += eol.join([
        b"Content-Type: " + value.encode("utf-8", "surrogateescape"),
        b"Content-Transfer-Encoding: quoted-printable", b"", b""])
    return raw[:part.at] + head + _transferred(
        text.encode("utf-8", "replace"), "quoted-printable", eol) + raw[part.end:]


def with_pixel(raw: bytes, tag: str, is_ours: Callable[[str], bool],
               hrefs: Optional[Hrefs] = None) -> Tuple[bytes, str]:
    """Return a message with a tag in its HTML; or the very same, and why, in words.

    The tag is an <img> element in ASCII. Images whose src is ours are taken out: they
    came with the mail that is quoted. hrefs is given where links lead, and returns
    what shall stand there instead, for those that change.
    """
    parts = split(raw)
    part = _html_part(parts)
    why = _sealed(raw, parts) or (
        _unfit(raw, part) if part else
        "plain text" if "text/plain" in {found.type for found in parts} else "no HTML")
    if why or not part:
        return raw, why
    body, eol = raw[part.start:part.end], _eol(raw)
    gap = b"" if body else eol  # the blank line before it may be the delimiter's
    named = "".join(fields(parts[0].head, "List-Unsubscribe"))
    body = _tagged(body, _coding(part), tag, is_ours, eol, hrefs and (
        lambda urls: hrefs([url for url in urls if f"<{url}>" not in named])))
    new = raw[:part.start] + gap + body + raw[part.end:]
    # A line that was cut may have become a delimiter.
    if split(new)[parts.index(part)].end - len(new) != part.end - len(raw):
        return raw, "damaged multipart"
    return new, ""


def _html_part(parts: Sequence[Part]) -> Optional[Part]:
    """Return the first HTML that is no file and no companion of another part."""
    barred: List[Tuple[int, int]] = []
    for part in parts:
        if any(start <= part.at < end for start, end in barred):
            continue
        is_strange = part.type.startswith("multipart/") and part.type not in _BODIES
        if is_strange or is_attachment(part):
            barred.append((part.at, part.end))
        elif part.type == "multipart/related":
            root = _root(part, parts)
            barred += [(part.at, root.at), (root.end, part.end)]
        elif part.type == "text/html":
            return part
    return None


def _root(related: Part, parts: Iterable[Part]) -> Part:
    """Return the part of a multipart/related that its others serve (RFC 2387)."""
    inner = [part for part in parts if related.at < part.at < related.end
             and len(part.parents) == len(related.parents) + 1]
    start = _type_parameters(related).get("start")
    named = [part for part in inner if field(part.head, "Content-ID") == start]
    return [*named, *inner, related][0]


def _sealed(raw: bytes, parts: Sequence[Part]) -> str:
    """Return why no byte of a message may change; empty if one may."""
    head = parts[0].head
    if any(fields(head, name) for name in _SEALS):
        return "signed"
    if not re.match(r"(no\b|\Z)", field(head, "Auto-Submitted"), re.I):
        return "sent by a program"
    if len(parts) == MOST_PARTS:
        return "too many parts"
    return next(filter(None, (_seal(raw, part) for part in parts)), "")


def _seal(raw: bytes, part: Part) -> str:
    """Return why a part forbids any change in its message; empty if it does not."""
    if part.type == "text/calendar" and "method" in _type_parameters(part):
        return "an invitation"
    if part.type.startswith("text/") and not is_attachment(part) and b"-----BEGIN PGP" \
            in _payload(raw[part.start:part.end], _coding(part)[0]):
        return "signed or encrypted"
    return _SEALED_TYPES.get(part.type, "")


def _unfit(raw: bytes, part: Part) -> str:
    """Return why a leaf cannot be changed without harm; empty if it can."""
    if part.end - part.start > MOST_HTML:
        return "very long"
    (coding, charset), body = _coding(part), raw[part.start:part.end]
    data, codec = _payload(body, coding), _byte_codec(charset)
    if fields(part.head, "Content-MD5"):
        return "signed"
    if coding not in _ENCODINGS:
        return "unknown transfer encoding"
    if coding == "base64" and b2a_base64(data, newline=False) != b"".join(body.split()):
        return "damaged base64"
    with suppress(LookupError, ValueError):
        if codec == "latin-1" or coding != "quoted-printable" and (
                data.decode(codec).encode(codec) == data):
            return ""
    return "charset that cannot be edited"


def _byte_codec(charset: str) -> str:
    """Return a codec that keeps all bytes, and in which ASCII is ASCII."""
    return charset if _STATEFUL.match(charset) else "latin-1"


def _tagged(body: bytes, coding: Tuple[str, str], tag: str,
            is_ours: Callable[[str], bool], eol: bytes, hrefs: Optional[Hrefs]
            ) -> bytes:
    """Return the body of an HTML part with a tag in it and no images of ours.

    Links stay where a line would be longer with them than a line may be.
    """
    (transfer, charset), end = coding, eol.decode()
    codec = _byte_codec(charset)
    edits = partial(_edits, tag=tag, is_ours=is_ours, hrefs=hrefs, shown=lambda text:
                    text.encode(codec).decode(_codec(charset), "replace"))
    if transfer != "quoted-printable":
        html = _payload(body, transfer).decode(codec)
        new = _spliced(html, edits(html), end, end)
        if hrefs and transfer != "base64" and max(map(len, new.split("\n"))) > max(
                MAX_LINE, *map(len, html.split("\n"))):
            return _tagged(body, coding, tag, is_ours, eol, None)
        return _transferred(new.encode(codec), transfer, eol)
    data, origin = _unquoted(body)
    moved = [(origin(start), origin(stop),
              _transferred(new.encode(), transfer, eol).decode())
             for start, stop, new in edits(data.decode(codec))]
    return _spliced(body.decode(codec), moved, end, "=" + end).encode(codec)


def _unquoted(data: bytes) -> Tuple[bytes, Callable[[int], int]]:
    """Return quoted-printable decoded, and where in it a decoded byte comes from."""
    pieces, at, size = [], [0], [0]
    for code in _QUOTED.finditer(data):
        pieces += [data[at[-1]:code.start()], bytes.fromhex((code[1] or b"").decode())]
        size.append(size[-1] + len(pieces[-2]) + len(pieces[-1]))
        at.append(code.end())

    def origin(place: int) -> int:
        number = bisect_right(size, place) - 1
        return at[number] + place - size[number]
    return b"".join([*pieces, data[at[-1]:]]), origin


def _edits(html: str, tag: str, is_ours: Callable[[str], bool],
           hrefs: Optional[Hrefs], shown: Callable[[str], str]
           ) -> List[Tuple[int, int, str]]:
    """Return what to change in HTML: from, up to, and what stands there instead."""
    from html import escape, unescape

    place = _place(html)
    edits = [(place, place, tag)]
    for image in _IMAGE.finditer(html):
        source = _SOURCE.search(image[0])
        if source and is_ours(unescape(source[source.lastindex or 0])):
            edits.append((*image.span(), ""))
    links = list(islice(_links(html, shown), MOST_LINKS)) if hrefs else []
    new = hrefs({url for _, _, url in links}) if hrefs and links else {}
    edits += [(start, stop, escape(new[url]))
              for start, stop, url in links if url in new]
    return sorted(edits)


def _links(html: str, shown: Callable[[str], str]) -> Iterator[Tuple[int, int, str]]:
    """Yield where in HTML the addresses of links stand, and where these lead.

    Left out is what leads to no web page, unsubscribes, has data-notrack, or shows an
    address. What the bytes of HTML say is shown.
    """
    from html import unescape

    for (start, stop), text, values in _anchors(html):
        href = _ENTITY.sub(lambda found: unescape(found[0]), shown(html[start:stop]))
        if "data-notrack" not in values and "unsubscribe" not in href.lower() \
                and not _SHOWS_ADDRESS.search(unescape(shown(text))):
            with suppress(ValueError):
                yield start, stop, destination(href)


def _anchors(html: str) -> Iterator[Tuple[Tuple[int, int], str, Collection[str]]]:
    """Yield links in HTML: where the address stands, the text, and all attributes."""
    tags = [tag for tag in _tags(html) if tag[0] in ("a", "/a", "area")]
    ends = [start for _, start, _, _ in tags[1:]] + [len(html)]
    for (name, _, begin, values), end in zip(tags, ends):
        if name != "/a":
            yield values.get("href", (0, 0)), re.sub(
                "<[^<>]*>", "", html[begin:end]) if name == "a" else "", values


def _tags(html: str
          ) -> Iterator[Tuple[str, int, int, Dict[str, Tuple[int, int]]]]:
    """Yield the whole tags in HTML: name, from, up to, and where each value stands.

    As HTML5 reads it; nothing in comments, scripts and the like.
    """
    at = 0
    while found := _MARKUP.search(html, at):
        at = found.end()
        values: Dict[str, Tuple[int, int]] = {}
        if not found[2]:
            continue
        while attribute := _ATTRIBUTE.match(html, at):
            at = attribute.end()
            values.setdefault(attribute[1].lower(),
                              attribute.span(attribute.lastindex or 0))
        at = html.find(">", at) + 1
        if not at:
            return  # it never ends, and nothing behind it is shown
        yield found[2].lower(), found.start(), at, values


def _place(html: str) -> int:
    """Return where a tag belongs: where the text ends; where it begins if it is long.

    The end is before the last </body>, or else </html>, that is in no comment.
    """
    shown = _COMMENT.sub(lambda comment: " " * len(comment[0]), html)
    if len(html) > CLIPPED:
        body = _BODY.search(shown)
        begun = _TAG_END.match(shown, body.end()) if body else None
        return begun.end() if begun else 0
    ends = {end[1].lower(): end.start() for end in _ENDS.finditer(shown)}
    return ends.get("body", ends.get("html", len(shown.rstrip(" \t\r\n\f"))))


def _spliced(text: str, edits: Iterable[Tuple[int, int, str]], eol: str, soft: str
             ) -> str:
    """Return a text with edits made, and no line longer than it was.

    What goes in gets lines of its own, by soft line breaks where something follows;
    what replaces something only by those.
    """
    pieces, done = [], 0
    for start, stop, new in edits:
        if new and start < stop:  # in a value, where only soft breaks may stand
            new = new if soft == eol else soft + new + soft
        elif new:
            new = (soft if text[start:start + 1].strip() else eol) + new + soft
        elif "\n" in text[start:stop]:
            new = soft
        pieces += [text[done:start], new]
        done = stop
    return "".join([*pieces, text[done:]])


def _text_part(kind: str, text: str) -> bytes:
    return b"Content-Type: text/%b; charset=utf-8\r\n" \
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\n%b" % (
            kind.encode(), _transferred(_LINE_END.sub("\r\n", text).encode(),
                                        "quoted-printable", b"\r\n"))


def _multipart(kind: str, parts: Sequence[bytes], own: str = "") -> bytes:
    # Neither base64 nor quoted-printable has =_; what else has needs a mark of its own.
    mark = b"--=_" + (own or kind).encode()
    return b'Content-Type: multipart/%b; boundary="%b"\r\n\r\n%b\r\n%b--\r\n' % (
        kind.encode(), mark[2:], b"\r\n".join(
            mark + b"\r\n" + part for part in parts), mark)


def make_html(raw: bytes) -> bytes:
    """Return a message that is plain text with the same as HTML beside it.

    Its lines end with CRLF. It is the very same if it is anything else, signed, a patch
    or sent by a program.
    """
    from hashlib import blake2b
    from html import escape

    parts = split(raw)
    part, text = parts[0], part_text(raw, parts[0])
    if part.type != "text/plain" or not part.head.endswith(b"\n") \
            or is_attachment(part) or "\ufffd" in text \
            or field(part.head, "X-Mailer").startswith("git-send-email") \
            or _DIFF.search(text) or _sealed(raw, parts) or _unfit(raw, part):
        return raw
    html = f'<div style="white-space:pre-wrap">{escape(text)}</div>'
    plain = without_field(part.head, "(?!Content-)[!-9;-~]+") + b"\r\n" \
        + raw[part.start:part.end]
    return without_field(part.head, "MIME-Version|Content-[!-9;-~]+") \
        + b"MIME-Version: 1.0\r\n" + _multipart("alternative", [
            plain, _text_part("html", html)], blake2b(raw, digest_size=16).hexdigest())


def hrefs_of(links: Links, base: str, path: str, tag_id: str, urls: Collection[str]
             ) -> Dict[str, str]:
    """Return what destinations become in a tag's mail, stored by then.

    The path is the template of its pixel. What leads to the tracker itself stays, but
    links of another tag, in a mail that is quoted, become this one's. Raise
    TrackerError or OSError.
    """
    own = re.compile(rf"https?{re.escape(base[base.index(':'):])}(?![^/?#])", re.I)
    start = tag_template(base, path, "url").partition("{id}")[0] + tag_id
    made = {url: url.rpartition("~")[2] for url in urls if own.match(url)}
    made = {url: link for url, link in made.items() if links.find(link.encode())}
    made.update(links.add([url for url in urls if not own.match(url)]))
    return {url: f"{start}~{link}" for url, link in made.items()}


def wants_no_pixel(raw: bytes) -> bool:
    """Tell whether the sender asked for no pixel: X-Mailtracker: no."""
    return field(_part_at(raw, 0).head, OPT_OUT).lower() == "no"


def without_field(raw: bytes, name: str) -> bytes:
    """Return a message without the header fields whose name matches a pattern."""
    head = _part_at(raw, 0).head
    return re.sub(_FIELD % name.encode(), b"", head) + raw[len(head):]


def with_header_lines(raw: bytes, lines: Iterable[str]) -> bytes:
    """Return a message with lines, given without their ends, before its header."""
    eol = _eol(raw)
    gap = b"" if _part_at(raw, 0).start else eol  # else text would become header
    return b"".join(line.encode("utf-8", "surrogateescape") + eol for line in lines) \
        + gap + raw


# -- the smarthost: a mail server that takes our mail ---------------------------

CONNECT_SECONDS = 30.0
REPLY_SECONDS = 60.0
DOT_SECONDS = 600.0   # RFC 5321, 4.5.3.2.6: the server may need them to deliver
PER_CONNECTION = 50   # messages; providers end longer connections


class Reply(NamedTuple):
    """A mail server's answer in one line; its code is 0 where there was none."""

    code: int
    text: str
    stage: str  # connect, login, mail, rcpt, data or dot: what was asked

    @property
    def is_ok(self) -> bool:
        """Tell whether it went on."""
        return 200 <= self.code < 400

    @property
    def is_lost(self) -> bool:
        """Tell whether the message may have gone: no answer came to its end."""
        return self.stage == "dot" and not self.code

    def __str__(self) -> str:
        return f"{self.code} {self.text}" if self.code else self.text

    def masked(self, addresses: Iterable[str]) -> str:
        """Return it without some addresses: they stand in the register only."""
        return re.sub("|".join(map(re.escape, addresses)), "...", str(self),
                      flags=re.I)


class Smarthost:
    """A mail server that takes our mail, and one connection to it.

    Nothing is raised for what goes wrong there: the reply says so. TLS is verified,
    and no password goes without it but to this machine. The password is asked for at
    each login, since tokens age.
    """

    def __init__(self, host: str, port: int, user: str = "",
                 password: Callable[[], str] = str, auth: str = "password") -> None:
        self.host, self.port = host, port
        self.login: Tuple[str, Callable[[], str], str] = user, password, auth
        self._smtp: Any = None
        self._handed = 0  # messages on this connection

    @property
    def extensions(self) -> Mapping[str, str]:
        """The extensions it offers, in lower case, with their parameters."""
        return self._smtp.esmtp_features if self._smtp else {}

    def open(self) -> Reply:
        """Connect, encrypt and log in, unless that is done."""
        if self._smtp:
            return Reply(220, "open", "connect")
        return self._asked("connect", self._connect)

    def _connect(self) -> Tuple[int, bytes]:
        import smtplib
        import socket
        import ssl

        # Our real name may be slow to find, or private.
        where, user = (self.host, self.port, "[127.0.0.1]"), self.login[0]
        smtp: Any
        if self.port == 465:
            smtp = smtplib.SMTP_SSL(*where, timeout=CONNECT_SECONDS,
                                    context=ssl.create_default_context())
        else:
            smtp = smtplib.SMTP(*where, timeout=CONNECT_SECONDS)
        self._smtp, self._handed = smtp, 0
        smtp.sock.settimeout(REPLY_SECONDS)
        # Else the dot waits 40 ms for the server to confirm what stands before it.
        smtp.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        smtp.command_encoding = "utf-8"  # for addresses of SMTPUTF8
        smtp.ehlo_or_helo_if_needed()
        is_near = is_loopback(smtp.sock.getpeername()[0])
        if self.port != 465 and smtp.has_extn("starttls") and (user or not is_near):
            code, text = smtp.starttls(context=ssl.create_default_context())
            if code != 220:
                raise smtplib.SMTPResponseException(code, text)
            smtp.ehlo()
        elif user and not is_near and self.port != 465:
            raise smtplib.SMTPNotSupportedError(
                "offers no TLS, and no password goes without it")
        return self._log_in() if user else (220, b"open")

    def _log_in(self) -> Tuple[int, bytes]:
        import smtplib

        user, password, auth = self.login
        secret = password()
        if auth != "xoauth2" and (user + secret).isascii():
            self._smtp.login(user, secret)
            return 235, b"logged in"
        # Not smtp.auth(), which fails on the error's continuation (3.9), and shows a
        # letter of a password that is not ASCII.
        how, token = ("XOAUTH2", f"user={user}\1auth=Bearer {secret}\1\1") \
            if auth == "xoauth2" else ("PLAIN", f"\0{user}\0{secret}")
        code, text = self._smtp.docmd("AUTH", f"{how} " + b2a_base64(
            token.encode("utf-8", "surrogateescape"), newline=False).decode())
        if code == 334:
            code, text = self._smtp.docmd("")
        if code != 235:
            raise smtplib.SMTPAuthenticationError(code, text)
        return code, text

    def _asked(self, stage: str, ask: Callable[[], Tuple[int, bytes]]) -> Reply:
        """Return what it says to something; without an answer, the connection goes."""
        import smtplib

        try:
            code, text = ask()
        except (OSError, ValueError, TrackerError) as error:  # smtplib's are OSErrors
            # Behind the dot smtplib's own code, for a long line, is no answer.
            code = getattr(error, "smtp_code", 0) if stage != "dot" else 0
            text = getattr(error, "smtp_error", explain(error).encode())
            if isinstance(error, (smtplib.SMTPAuthenticationError, TrackerError)):
                stage = "login"  # a wrong password, or none to be had
            self.close()
        if code == 421:
            self.close()
        words = text if isinstance(text, bytes) else str(text).encode()
        line = " ".join(words.decode("utf-8", "replace").split())
        return Reply(max(code, 0), clean(line) or "no answer", stage)

    def _command(self, stage: str, words: str) -> Reply:
        return self._asked(stage, lambda: self._smtp.docmd(words)) if self._smtp \
            else Reply(0, "not connected", stage)

    def mail(self, sender: str, options: str = "") -> Reply:
        """Begin a message; connect for it, once more where the connection has ended."""
        if self._handed >= PER_CONNECTION:
            self.close()
        was_open, reply = bool(self._smtp), self.open()
        if reply.is_ok:
            reply = self._command(
                "mail", f"MAIL FROM:<{sender}>{options and ' ' + options}")
        if was_open and not self._smtp:  # it had been closed meanwhile
            return self.mail(sender, options)
        return reply

    def rcpt(self, recipient: str, options: str = "") -> Reply:
        """Name a recipient of the message."""
        words = f"RCPT TO:<{recipient}>{options and ' ' + options}"
        return self._command("rcpt", words)

    def data(self, message: bytes, before_dot: Callable[[], object] = int) -> Reply:
        """Hand over a message with CRLF line ends; call before_dot before its end.

        What that raises is raised, and the message has not gone then.
        """
        reply = self._command("data", "DATA")
        if reply.code != 354:
            return reply._replace(code=reply.code if reply.code >= 400 else 0)
        stuffed = message.replace(b"\n.", b"\n..")
        stuffed = b"." + stuffed if stuffed[:1] == b"." else stuffed
        end = b".\r\n" if stuffed.endswith(b"\r\n") else b"\r\n.\r\n"
        try:
            for start in range(0, len(stuffed), 1 << 16):  # each with a timeout
                self._smtp.sock.sendall(stuffed[start:start + (1 << 16)])
        except OSError as error:
            self.close()
            return Reply(0, str(error), "data")
        try:
            before_dot()
        except (TrackerError, OSError):
            self.close()
            raise
        self._handed += 1
        self._smtp.sock.settimeout(DOT_SECONDS)
        reply = self._asked("dot", lambda: (
            self._smtp.sock.sendall(end), self._smtp.getreply())[1])
        if self._smtp:
            self._smtp.sock.settimeout(REPLY_SECONDS)
        return reply

    def deliver(self, sender: str, recipient: str, message: bytes,
                before_dot: Callable[[], object] = int, options: str = "",
                rcpt_options: str = "") -> Reply:
        """Hand one message to one recipient; the reply's stage says how far it got."""
        reply = self.mail(sender, options)
        reply = self.rcpt(recipient, rcpt_options) if reply.is_ok else reply
        reply = self.data(message, before_dot) if reply.is_ok else reply
        if not reply.is_ok and reply.stage != "dot":
            self.reset()
        return reply

    def reset(self) -> None:
        """Give up the message that was begun."""
        self._command("rset", "RSET")

    def close(self) -> None:
        """End the connection; it need not be there any more."""
        smtp, self._smtp = self._smtp, None
        if smtp:
            with suppress(OSError, AttributeError):  # no socket any more
                smtp.sock.settimeout(1.0)
                smtp.sock.sendall(b"QUIT\r\n")  # whose answer says nothing new
            smtp.close()


def is_loopback(address: str) -> bool:
    """Tell whether an address is this machine's own."""
    from ipaddress import ip_address

    try:
        return ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return address.lower() == "localhost"


def password_from(command: str, what: str = "password") -> str:
    """Return the first line that a command prints, else $MAILTRACKER_PASSWORD.

    So with other secrets, by their names. Raise TrackerError for a command that fails;
    nothing of what it says is shown.
    """
    from subprocess import DEVNULL, PIPE, run

    if not command:
        return os.environ.get(f"MAILTRACKER_{what.upper()}", "")
    done = run(command, shell=True, stdout=PIPE, stderr=DEVNULL, check=False)
    password = done.stdout.decode("utf-8", "replace").partition("\n")[0].rstrip("\r")
    if done.returncode or not password:
        raise TrackerError(f"--{what}-command exits "
                           f"{done.returncode}{'' if password else ' without a word'}")
    return password


def matching(pattern: str, text: str) -> re.Match[str]:
    """Return how an ASCII pattern matches the whole of a text, or raise ValueError."""
    found = re.fullmatch(pattern, text.strip(), re.ASCII)
    if not found:
        raise ValueError
    return found


def _host_and_port(text: str) -> Tuple[str, int]:
    """Return what HOST[:PORT] means; 587 is the port for handing in mail."""
    found = matching(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?", text)
    if not 0 < int(found[2] or 587) < 65536:
        raise ValueError
    return found[1].strip("[]"), int(found[2] or 587)


def smarthost_of(options: argparse.Namespace) -> Smarthost:
    """Return the smarthost that a command's options name."""
    host, port = options.smarthost
    return Smarthost(host, port, options.user,
                     lambda: password_from(options.password_command), options.auth)


# -- send: a mail of its own for each person of a list --------------------------

EMAIL_TITLES = ("email", "e-mail", "mail", "address")  # the first that is there
TEMPLATE_FIELDS = ("Subject", "From", "Reply-To", "Attach")
RETRIES = (60.0, 300.0, 900.0)  # seconds until a mail that was put off is due again
TROUBLE = (30.0, 120.0, 600.0)  # seconds of rest after a connection that broke
MOST_REFUSED = 3                # mails in a row; then it must be us that is refused

_ADDRESS = r"([\w.!#$%&'*+/=?^`{|}~-]{1,64})@([^@:]{1,253})"
_PLACEHOLDER = re.compile(
    r"(?is:<style\b.*?</style\s*>)|"
    r"\{(?:(\{)\s*)?([^\W\d_][\w\s.-]*?)\s*(?::([^{}|]*))?(?:\|([^{}]*))?\}(?(1)\})")
_LINE_END = re.compile(r"\r\n?|\n")
# What goes of a saved mail's header, as most of it tells of the way that it went.
_DROPPED = r"(?!(?:Reply-To|Importance|(?:X-)?Priority|Organization" \
    r"|Disposition-Notification-To)[ \t]*:)[!-9;-~]+"

Problems = Dict[str, List[int]]  # what is wrong, and in which rows of the list


def address_in(text: str) -> str:
    """Return a mail address with an ASCII domain; raise ValueError for anything else.

    What stands before the @ is ASCII as well: few servers take more (RFC 6531).
    """
    user, domain = matching(_ADDRESS, text).groups()
    host = domain.encode("idna").decode().lower()
    return f"{user}@{matching(_HOST.pattern, host)[0]}"


def mailbox_in(text: str) -> Tuple[str, str]:
    """Return name and address of 'Ann <ann@x.org>'; raise ValueError for neither."""
    found = matching(r'"?([^"<>]*?)"?\s*<([^<>]*)>|\S*', text)
    return found[1] or "", address_in(found[2] or found[0])


# The email package encodes long ids, drops the quotes around names, and makes new
# fields of some values (CVE-2024-6923): so these four write the header.


def header(name: str, value: str) -> str:
    """Return a header field, folded, of an ASCII value; none for an empty one."""
    from textwrap import fill

    return fill(value, 78, initial_indent=f"{name}: ", subsequent_indent=" ",
                break_long_words=False, break_on_hyphens=False
                ).replace("\n", "\r\n") + "\r\n" * bool(value)


def header_text(text: str) -> str:
    """Return text as the value of a header field, in encoded words where it must."""
    words = filter(None, one_line(text).split(" "))
    return " ".join(_encoded(" ".join(run)) if is_odd else " ".join(run)
                    for is_odd, run in groupby(words, _is_odd))


def header_mailbox(name: str, address: str) -> str:
    """Return a name and an address as the value of a header field."""
    name = " ".join(filter(None, one_line(name).split(" ")))
    quoted = '"%s"' % re.sub(r'([\\"])', r"\\\1", name)
    return f"{_encoded(name) if _is_odd(name) else quoted} <{address}>" if name \
        else address


def _is_odd(word: str) -> bool:
    return not word.isascii() or "=?" in word or len(word) > 200


def _encoded(text: str) -> str:
    return " ".join("=?utf-8?b?%s?=" % b2a_base64(
        piece.encode(), newline=False).decode()
        for piece in re.findall(".{1,10}", text))  # 40 bytes, 56 letters at most


def filled(text: str, cells: Mapping[str, str], escaped: Callable[[str], str],
           wrong: Callable[[str], object] = len) -> str:
    """Return text with placeholders replaced: {Name}, {{Name}}, {Name|default}.

    A format follows a colon, for a number or a date: {Amount:,.2f}, {Date:%d.%m.%Y}.
    Cells are by their titles in lower case. What is wrong is told.
    """
    def value(found: re.Match[str]) -> str:
        _, name, form, default = found.groups()
        if not name:
            return found[0]
        title = " ".join(name.lower().split())
        cell = cells.get(title, "").strip()
        if title not in cells:
            wrong(f"{found[0]}: no such column{nearest(title, cells)}")
        elif not cell and default is None:
            wrong(f"{title} is empty: fill it in, or write {{{name}|default}}")
        elif cell and form:
            try:
                cell = _formatted(cell, form)
            except (ValueError, ArithmeticError):
                wrong(f"{found[0]} wants a number such as 1234.5, or a date such as "
                      "2026-11-24")
        return escaped(_LINE_END.sub("\r\n", cell)) if cell else default or ""
    return _PLACEHOLDER.sub(value, text)


def _formatted(cell: str, form: str) -> str:
    from datetime import datetime
    from decimal import Decimal

    return datetime.fromisoformat(cell).strftime(form) \
        if re.search("%[A-Za-z]", form) else format(Decimal(cell), form)


def _as_html(text: str) -> str:
    from html import escape

    return escape(text).replace("\r\n", "<br>\r\n")


def _as_file_name(text: str) -> str:
    return re.sub(r"[/\0]|\.\.", "_", text)  # a cell must not lead out of the folder


_SILENT = ("style", "script", "head", "title")
_BREAKS = {"br": "\n", "li": "\v- ", "td": "\t", "th": "\t", "blockquote": "\n\n\1",
           **dict.fromkeys(("div", "tr", "ul", "ol", "table"), "\v"),
           **dict.fromkeys(("p", "h1", "h2", "h3", "h4", "h5", "h6", "hr"), "\n\n")}


def plain_text_of(html: str) -> str:
    """Return what HTML says to people whose mail program shows only text."""
    from html.parser import HTMLParser

    class Reader(HTMLParser):
        """Gather pieces of text; 1 and 2 stand around quotations."""

        silence, link = 0, ("", 0)

        def __init__(self) -> None:
            super().__init__()
            self.pieces: List[str] = []

        def handle_starttag(self, tag: str, attrs: List[Any]) -> None:
            self.silence = 0 if tag == "body" else self.silence + (tag in _SILENT)
            self.pieces += [_BREAKS.get(tag, ""), dict(attrs).get("alt") or ""]
            if tag == "a":
                self.link = dict(attrs).get("href") or "", len(self.pieces)

        def handle_endtag(self, tag: str) -> None:
            self.silence = max(0, self.silence - (tag in _SILENT))
            (link, start), end = self.link, _BREAKS.get(tag, "")
            said = "".join(self.pieces[start:]).strip()
            if tag == "a" and link[:1] not in ("", "#") \
                    and said not in (link, link[len("mailto:"):]):
                self.pieces.append(f" <{link}>")
            self.pieces.append("\2\n\n" if tag == "blockquote" else
                               end if not end.strip("\n\v") else "")

        def handle_data(self, data: str) -> None:
            self.pieces.append("" if self.silence else re.sub(r"[\s\xa0]+", " ", data))

    reader, lines, depth = Reader(), [], 0
    reader.feed(re.sub(r"(?s)<!\[.*?>", "", html))  # <![if !mso]>
    reader.close()
    text = re.sub(r"\s+(?=\x02)|(?<=\x01)\s+", "", "".join(reader.pieces).strip())
    text = re.sub(r"\s*[\n\v]\s*", lambda run: "\n" * min(
        2, run[0].count("\n") + ("\v" in run[0])), text)
    for line in text.replace("\t", "  ").split("\n"):
        depth += line.count("\1")
        lines.append("> " * depth + line.strip("\1\2 "))
        depth -= line.count("\2")
    return "\n".join(lines) + "\n"


class Recipient(NamedTuple):
    """A person of the list, and the mail that is for them."""

    row: int
    name: str
    address: str
    cells: Dict[str, str]  # by title in lower case
    id: str = ""           # of its tag, as soon as there is one
    earlier: str = ""      # the Message-ID of the mail that it follows

    @property
    def key(self) -> str:
        """What is the same for all ways to write the address."""
        return self.address.casefold()


class Template:
    """A mail with placeholders: text behind a few header lines, or a saved .eml."""

    def __init__(self, path: str) -> None:
        self._path, self._attached = path, []  # type: str, List[str]
        self.name = os.path.splitext(os.path.basename(path))[0]
        with open(path, "rb") as file:
            raw = re.sub(rb"\A(?:\xef\xbb\xbf|From .*\n)", b"", file.read())
        raw = re.sub(rb"\r\n?|\n", b"\r\n", raw)
        head = split(raw)[0].head
        self._subject, self.sender = (
            decoded_words(field(head, name)) for name in ("Subject", "From"))
        if not path.lower().endswith(".eml"):
            self._attached = fields(head, "Attach")
            raw = self._mail(head, raw)
        if not self._subject:
            raise TrackerError(f"{path}: no Subject; it begins so: Subject: Hello, "
                               "a blank line, the text")
        self._raw, self._leaves = raw, [
            part for part in split(raw) if not is_attachment(part)
            and part.type in ("text/plain", "text/html")]
        self.has_html = any(part.type == "text/html" for part in self._leaves)

    def _mail(self, head: bytes, raw: bytes) -> bytes:
        """Return a mail with the text of a template, and as text what is HTML."""
        for name in re.findall(r"(?m)^([!-9;-~]+)[ \t]*:", head.decode("latin-1")):
            if name.title() not in TEMPLATE_FIELDS:
                raise TrackerError(f"{self._path}: no field {name} in a template"
                                   f"{nearest(name.title(), TEMPLATE_FIELDS)}")
        try:
            text = raw[len(head):].decode().strip() + "\r\n"
        except UnicodeDecodeError:
            raise TrackerError(f"{self._path} is not UTF-8; save it so") from None
        reply_to = header("Reply-To", header_text(field(head, "Reply-To"))).encode()
        return reply_to + (_multipart("alternative", [
            _text_part("plain", plain_text_of(text)), _text_part("html", text)])
            if text[0] == "<" else _text_part("plain", text))

    def message(self, lines: str, cells: Mapping[str, str],
                wrong: Callable[[str], object]) -> bytes:
        """Return a mail that begins with some header lines; tell what is wrong."""
        raw, files = self._raw, []
        for part in reversed(self._leaves):
            escaped = _as_html if part.type == "text/html" else str
            raw = edited(raw, part, lambda text: filled(text, cells, escaped, wrong))
        for name in self._attached:
            files.append(os.path.join(os.path.dirname(self._path), filled(
                name, cells, _as_file_name, wrong)))
            if not os.path.isfile(files[-1]):
                wrong(f"no such file: {files.pop()}")
        head, start = split(raw)[0][:2]
        content = without_field(head, "(?!Content-)[!-9;-~]+") + b"\r\n" + raw[start:]
        subject = header("Subject", header_text(filled(
            self._subject, cells, str, wrong)))
        kept = without_field(head, _DROPPED)
        return b"".join((lines.encode(), subject.encode(), kept,
                         b"MIME-Version: 1.0\r\n", _multipart("mixed", [
                             content, *map(_file_part, files)]) if files else content))


@lru_cache(maxsize=8)
def _file_part(path: str) -> bytes:
    """Return a file as a part of a mail."""
    from mimetypes import guess_type
    from urllib.parse import quote

    kind, packed = guess_type(path)
    if not kind or packed or kind.startswith("message/"):  # which is never in base64
        kind = "application/octet-stream"
    name = quote(os.fsencode(os.path.basename(path)), safe="")
    with open(path, "rb") as file:
        return (f"Content-Type: {kind}\r\nContent-Transfer-Encoding: base64\r\n"
                f"Content-Disposition: attachment;\r\n filename*=utf-8''{name}\r\n\r\n"
                ).encode() + _transferred(file.read(), "base64", b"\r\n")


def mail_lines(raw: bytes) -> Iterator[str]:
    """Yield a mail as a person would read it, and what else is in it."""
    parts = split(raw)
    for name in ("From", "To", "Subject", "List-Unsubscribe"):
        yield f"{name}: {decoded_words(field(parts[0].head, name)) or '-'}"
    texts = {part.type: part_text(raw, part) for part in reversed(parts)}
    yield from ("", *_LINE_END.split(texts.get("text/plain") or plain_text_of(
        texts.get("text/html", ""))))
    yield from (f"[{part.type}, {part.end - part.start} bytes]" for part in parts
                if not part.type.startswith("multipart/"))


def recipients(path: str, where: Sequence[Tuple[str, str]], problems: Problems
               ) -> List[Recipient]:
    """Return the people of a CSV file for whom column = glob holds, each once."""
    from fnmatch import fnmatchcase

    source, path = (0, "standard input") if path == "-" else (path, path)
    table = Table(source, path, strict=True)
    titles = [" ".join(title.lower().split()) for title in table.columns]
    at = next((title for title in EMAIL_TITLES if title in titles), "email")
    for title in {at, *(title for title, _ in where)}.difference(titles):
        raise TrackerError(f"{path} has no column {title}{nearest(title, titles)}")
    found: Dict[str, Recipient] = {}
    twice = []
    for row, (_, texts) in enumerate(table, 2):
        cells = dict(zip(titles, map(text_in, texts)))
        if len(texts) != len(titles) and any(texts):
            problems.setdefault(f"not {plural(len(titles), 'cell')}", []).append(row)
        elif any(texts) and all(fnmatchcase(cells[title].lower(), glob)
                                for title, glob in where):
            try:
                who = Recipient(row, one_line(cells.get("name", "").strip()),
                                address_in(cells[at]), cells)
                twice += [row] * (found.setdefault(who.key, who) is not who)
            except ValueError:
                problems.setdefault(f"no address: {cells[at]}", []).append(row)
    if twice:
        note(f"{plural(len(twice), 'row')} left out, the first is row {twice[0]}: "
             "the address stands further up as well")
    return list(found.values())


def bounce_address(template: str, user: str, domain: str, tag_id: str) -> str:
    """Return the address to which a mail of user@domain with a tag bounces."""
    words = {"user": user, "domain": domain, "id": tag_id}
    return re.sub(r"\{(user|domain|id)\}", lambda word: words[word[1]], template)


class Mailing:
    """What makes the mails: templates, the sender, and where pixels are served."""

    def __init__(self, options: argparse.Namespace) -> None:
        text = options.template
        self._templates = [Template(path) for path in (
            [text] if os.path.exists(text) else text.split(","))]
        name = options.campaign or "+".join(one.name for one in self._templates)
        self.campaign = clean(one_line(name).strip())
        self.columns = ("id", "name", "email", "campaign", "variant")[
            :5 if self._templates[1:] else 4]
        has_html = any(one.has_html for one in self._templates)
        if not options.server and has_html:
            raise TrackerError("say --server HOST: where mail programs fetch the pixel")
        if options.clicks and not has_html:
            raise TrackerError("--clicks: links count only in HTML; there is none")
        self._links = Links(Files(options.register, options.events).links) \
            if options.clicks else None
        self._base = base_url(options.server) if options.server else ""
        self._link = options.unsubscribe or (
            self._base + "/u/{id}" if self._base.startswith("https:") else "")
        self._bounces = options.bounce_address or "{user}@{domain}"
        try:
            self._sender = options.sender or mailbox_in(self._templates[0].sender)
            self._user, self.domain = str(self._sender[1]).split("@")
            address_in(self.envelope("b" * ID_LENGTH))
        except ValueError:
            raise TrackerError("say --from 'Ann <ann@x.org>', and for --bounce-address "
                               "an address such as '{user}+{id}@{domain}'") from None

    def _template(self, who: Recipient) -> Template:
        return self._templates[int(hash_of(who.key), 16) % len(self._templates)]

    def row(self, who: Recipient) -> Sequence[str]:
        """Return the texts of a mail's tag, for the columns."""
        return (who.id, who.name, who.address, self.campaign,
                self._template(who).name)[:len(self.columns)]

    def envelope(self, tag_id: str) -> str:
        """Return the address to which a mail bounces."""
        return bounce_address(self._bounces, self._user, self.domain, tag_id)

    def message(self, who: Recipient, wrong: Callable[[str], object] = len,
                is_final: bool = False) -> Tuple[bytes, str]:
        """Return a mail, and "" or why it has no pixel; tell what is wrong with it.

        Only in a final one links are changed, which have to be stored for that.
        """
        from email.utils import formatdate

        own, link = f"<{who.id}@{self.domain}>", self._link.replace("{id}", who.id)
        lines = "".join(header(name, value) for name, value in (
            ("Date", formatdate(localtime=True)),
            ("From", header_mailbox(*self._sender)),
            ("To", header_mailbox(who.name, who.address)),
            ("Message-ID", own), ("In-Reply-To", who.earlier),
            # Some servers change the id: scan finds it here.
            ("References", f"{who.earlier} {own}".strip()),
            ("List-Unsubscribe", link and f"<{link}>"),
            ("List-Unsubscribe-Post",
             "List-Unsubscribe=One-Click" if link.startswith("https:") else "")))
        cells = {"unsubscribe": link, **who.cells} if link else who.cells
        raw = self._template(who).message(lines, cells, wrong)
        path = "/{id}.gif"
        tag = tag_template(self._base, path).replace("{id}", who.id)
        hrefs = partial(hrefs_of, self._links, self._base, path, who.id) \
            if self._links and is_final else None
        return with_pixel(raw, tag, partial(is_pixel, self._base), hrefs) \
            if self._base else (raw, "no --server")

    def hand_over(self, smarthost: Smarthost, who: Recipient,
                  before_dot: Callable[[], object] = int) -> Reply:
        """Hand one mail to a smarthost; see its deliver."""
        def wrong(what: str) -> None:  # a file has gone since all was checked
            raise TrackerError(f"row {who.row}: {what}; this mail and those behind it "
                               "wait: the same command goes on")

        message, reply = self.message(who, wrong, True)[0], smarthost.open()
        is_8bit = "8bitmime" in smarthost.extensions and not message.isascii()
        return smarthost.deliver(self.envelope(who.id), who.address, message,
                                 before_dot, "BODY=8BITMIME" * is_8bit) \
            if reply.is_ok else reply


class Plan:
    """Whom a run sends to and whom not, as register and log know of earlier mails."""

    def __init__(self, files: Files, mailing: Mailing, people: Iterable[Recipient],
                 options: argparse.Namespace) -> None:
        self._files, self._mailing, self._options = files, mailing, options
        self._place, self._began = end_of_log(files.log), utc_text(time.time())
        is_new = not any(map(os.path.exists, (*files.versions, files.log)))
        columns, rows = ([], iter(())) if is_new else register_rows(files)
        mails = (dict(zip(columns, row)) for row in rows)
        self._mails = {mail["id"]: mail for mail in mails if mail.get("email")}
        known = self._campaign(mailing.campaign)
        barred = self._barred = self._all_barred()
        followed = self._followed() if options.followup_to else None
        self.mails: List[Recipient] = []  # to be sent
        self.done: List[str] = []         # ids of those that went before
        self.skipped: List[str] = []      # ids of earlier mails, which say why
        self.unknown: Dict[str, Recipient] = {}  # by id: they may have gone
        for who in people:
            tag_id = known.get(who.key, "")
            status = self._mails[tag_id].get("status") if tag_id else "queued"
            if followed is not None and who.key not in followed:
                continue
            if status not in ("queued", "sending"):
                self.done.append(tag_id)
            elif who.key in barred:
                self.skipped.append(barred[who.key])
            elif status == "queued" or options.resend_unknown:
                earlier = followed[who.key] if followed else ""
                self.mails.append(who._replace(id=tag_id or who.id, earlier=earlier))
            else:
                self.unknown[tag_id] = who
        self.mails = self.mails[:options.limit]
        self._keys = {tag_id: key for key, tag_id in self._by_key(self._mails).items()}
        self._keys.update((who.id, who.key) for who in self.mails)

    def _events(self, kind: str) -> Set[Tuple[str, str]]:
        """Return id and detail of all events of a kind."""
        return {(event.id, event.detail) for event in read_log(
            self._files.log, b",%b," % kind.encode()) if event.event == kind}

    def _by_key(self, ids: Iterable[str]) -> Dict[str, str]:
        """Return ids of mails by the keys of their recipients."""
        return {self._mails[tag_id]["email"].strip().casefold(): tag_id
                for tag_id in ids}

    def _campaign(self, name: str) -> Dict[str, str]:
        """Return the ids of a campaign's mails by key, as log or register tell."""
        ids = {tag_id for tag_id, detail in self._events("queued") if detail == name}
        ids.update(tag_id for tag_id, mail in self._mails.items()
                   if mail.get("campaign") == name)
        if not ids <= self._mails.keys():
            raise TrackerError(
                f"the register has lost addresses of the campaign {name}, so nobody "
                "knows who has got it; put its column email back")
        return self._by_key(ids)

    def _all_barred(self) -> Dict[str, str]:
        """Return by key an id of who unsubscribed or has no such mailbox.

        A bounce that is only likely bars nobody: it may be forged.
        """
        bounces = self._events("bounced")
        hard = {tag_id for tag_id, detail in bounces if detail.startswith("hard:")}
        others = {tag_id for tag_id, _ in bounces} - hard
        return self._by_key(
            tag_id for tag_id, mail in self._mails.items()
            if mail.get("status") == "unsubscribed"
            or mail.get("status") == "bounced" and tag_id not in others)

    def is_barred(self, who: Recipient) -> bool:
        """Tell whether somebody has unsubscribed, or no such mailbox, by now."""
        for file, offset, event in events_behind(
                self._files.log, self._place, self._began):
            self._place = place_at(file, offset)
            if event.id in self._keys and (
                    event.event == "unsubscribed" or event.event == "bounced"
                    and event.detail.startswith("hard:")):
                self._barred[self._keys[event.id]] = event.id
        return who.key in self._barred

    def _followed(self) -> Dict[str, str]:
        """Return by key the Message-IDs of the mails that are to be followed."""
        options, found = self._options, {}
        ids = self._campaign(options.followup_to)
        if not ids:
            raise TrackerError(f"no campaign {options.followup_to}")
        replied, read = ({tag_id for tag_id, _ in self._events(kind)}
                         for kind in ("replied", "read"))
        for key, tag_id in ids.items():
            mail = self._mails[tag_id]
            is_opened = mail["opens"] != "0" or tag_id in replied | read
            is_so = {"opened": is_opened, "unopened": not is_opened,
                     "unreplied": tag_id not in replied}[getattr(options, "if")]
            if is_so and mail.get("status") in STATUSES[3:] \
                    and mail["sent"] <= (options.after or mail["sent"]):
                found[key] = mail.get("message_id") \
                    or f"<{tag_id}@{self._mailing.domain}>"
        return found

    def words(self) -> Iterator[str]:
        """Yield what people should know of it."""
        yield f"campaign {self._mailing.campaign}: {plural(len(self.mails), 'mail')} " \
            f"to send, {len(self.done)} gone before, {len(self.skipped)} skipped: " \
            "unsubscribed, or no such mailbox"
        if self.unknown:
            names = ", ".join(who.name or who.address for who in self.unknown.values())
            yield f"{plural(len(self.unknown), 'message')} may or may not have gone: " \
                f"{names}; --resend-unknown sends it again with the same Message-ID, " \
                "--assume-sent closes it"

    def commit(self) -> None:
        """Bring to the disk what is to be done, a tag for each mail included."""
        now, campaign = utc_text(time.time()), self._mailing.campaign
        told, assumed = self._events("skipped"), []
        if self._options.assume_sent:
            assumed, self.unknown = [*self.unknown], {}
        append_events(self._files, [
            *(Event(now, "skipped", tag_id, detail=campaign) for tag_id in self.skipped
              if (tag_id, campaign) not in told),
            *(Event(now, "sent", tag_id, detail="assumed") for tag_id in assumed)])
        new = [who for who in self.mails if who.id not in self._mails]
        if new:
            add_tags(self._files, list(map(self._mailing.row, new)), Making(
                now, "", "queued", campaign, self._mailing.columns))


def judged(reply: Reply) -> str:
    """Return what a smarthost's reply means for a mail.

    sent; failed, for good; later; refused, perhaps for what we are; stop, as that is
    certain; trouble with the connection; unknown, as it may have gone.
    """
    status = (re.match(r"5\.\d{1,3}\.\d{1,3}", reply.text) or [""])[0]
    is_login = reply.stage in ("connect", "login")
    if reply.is_ok or reply.is_lost:
        return "sent" if reply.is_ok else "unknown"
    if reply.code in (0, 421) or is_login and reply.code < 500:
        return "trouble"
    if reply.code < 500:
        return "later"
    if is_login or reply.stage == "mail" or status == "5.4.5":
        return "stop"
    is_theirs = status.startswith(("5.1.", "5.2.")) or reply.stage == "rcpt"
    is_ours = status.startswith("5.7.") or status in ("5.1.7", "5.1.8") \
        or "relay" in reply.text.lower()
    return "failed" if is_theirs and not is_ours else "refused"


class Delivery:
    """Hand the mails of a mailing to a smarthost, one after the other.

    is_barred tells who is to be left out by now; pause waits so many seconds and tells
    whether to stop; period is the time from one mail to the next. words say what made
    it end early.
    """

    def __init__(self, files: Files, mailing: Mailing, smarthost: Smarthost,
                 is_barred: Callable[[Recipient], bool],
                 pause: Callable[[float], bool], period: float = 0.0,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._mailing, self._smarthost = files, mailing, smarthost
        self._is_barred = is_barred
        self._pause, self._period, self._clock = pause, period, clock
        self._began = self._told = clock()
        self._has_worked, self._trouble, self._refused = False, 0, 0
        self.words = ""
        self.count = {"sent": 0, "failed": 0, "unknown": 0, "skipped": 0}

    def run(self, mails: Sequence[Recipient]) -> int:
        """Send what can be sent; return how many mails are left."""
        from heapq import heappop, heappush

        queue, due_next = [(0.0, number, 0) for number in range(len(mails))], 0.0
        try:
            while queue and not self._rests(max(queue[0][0], due_next) - self._clock()):
                _, number, tries = heappop(queue)
                due_next = self._clock() + self._period
                outcome = self._send(mails[number])
                if outcome in ("later", "trouble") and tries < len(RETRIES):
                    heappush(queue, (self._clock() + RETRIES[tries], number, tries + 1))
                self._tell(len(mails), queue)
        finally:
            self._show("")
            self._smarthost.close()
        return len(mails) - sum(self.count.values())

    def _rests(self, length: float) -> bool:
        """Wait; tell whether it is over."""
        if not self.words and self._pause(max(0.0, length)):
            self.words = "stopped by a signal"
        return bool(self.words)

    def _send(self, who: Recipient) -> str:
        """Try to send a mail; return what judged makes of the answer."""
        def log(kind: str, detail: str = "") -> None:
            now = utc_text(time.time())
            append_events(self._files, [Event(now, kind, who.id, detail=detail)])

        if self._is_barred(who):
            log("skipped", self._mailing.campaign)
            self.count["skipped"] += 1
            return "skipped"
        reply = self._mailing.hand_over(self._smarthost, who, lambda: log("sending"))
        outcome = judged(reply)
        if outcome in ("sent", "failed"):
            log(outcome, reply.masked([who.address]))
        elif outcome != "unknown" and reply.stage == "dot":
            log("queued", self._mailing.campaign)
        if outcome in self.count:
            self.count[outcome] += 1
        if outcome != "sent":
            self._show("")
            note(f"row {who.row}, {who.address}: {outcome}: {reply}")
        self._heed(outcome, reply)
        return outcome

    def _heed(self, outcome: str, reply: Reply) -> None:
        """Rest after trouble; stop where all mails would fare alike."""
        self._has_worked |= reply.stage not in ("connect", "login")
        self._refused = self._refused + 1 if outcome == "refused" else 0
        self._trouble = self._trouble + 1 if outcome == "trouble" else 0
        is_hopeless = self._trouble > len(TROUBLE) or not self._has_worked
        if outcome == "stop" or self._refused == MOST_REFUSED \
                or self._trouble and is_hopeless:
            self.words = f"the smarthost says: {reply}"
        elif self._trouble:
            self._rests(TROUBLE[self._trouble - 1])

    def _tell(self, total: int, queue: Iterable[Tuple[float, int, int]]) -> None:
        """Show how far it is: on a terminal at once, else once a minute."""
        now, done = self._clock(), sum(self.count.values())
        if now - self._told < (0.2 if sys.stderr.isatty() else 60.0):
            return
        self._told, per_mail = now, (now - self._began) / max(done, 1)
        self._show(f"{self.count['sent']}/{total} sent  {self.count['failed']} failed  "
                   f"{sum(tries > 0 for _, _, tries in queue)} deferred  "
                   f"{60 / per_mail:.0f}/min  "
                   f"{lasting((total - done) * per_mail)} left")

    @staticmethod
    def _show(text: str) -> None:
        """Show a line, which the next one replaces on a terminal."""
        is_terminal = sys.stderr.isatty()
        if text or is_terminal:
            print(f"{text:<78}" if is_terminal else text, file=sys.stderr,
                  end="\r" if is_terminal else "\n", flush=True)


def lasting(length: float) -> str:
    """Return a time in seconds as people say it."""
    return f"{length:.0f} s" if length < 90 else f"{length / 60:.0f} min" \
        if length < 7200 else f"{length / 3600:.1f} h" \
        if length < 172800 else f"{length / 86400:.1f} d"


# -- scan: what came back, and of which tag -------------------------------------

MOST_READ = 100_000  # bytes of a message; what tells of a tag stands in them

_ID_IN_TEXT = re.compile(r"(?<![A-Za-z\d])(?:%s)(?![A-Za-z\d])" % _ID)
_MESSAGE_ID = re.compile(r"<([^<>\s]+)>")
_ANY_ADDRESS = re.compile(  # begun only where a word begins, so linear
    r"""(?<![^\s<>()[\],;:"'])[^\s<>()[\],;:"'@]+@[^\s<>()[\],;:"'@]*[^\W_]""")
_UNSPACED = re.compile(r"""<?[^\s<>()[\],;:"']+>?""")
_RETURNED_ID = re.compile(
    r"\n(?:Original-|X-Microsoft-Original-)?Message-ID:(.*(?:\n[ \t].*)*)", re.I)
_COPY = re.compile(  # where a mail server has ended, and the returned mail begins
    r"^(?:Received:|Return-Path:|Message-ID:|---.*(?:original|copy|header)"
    r"|message headers follow)", re.M | re.I)
# Fields of a head that tell what a message is (RFC 3834, and older customs).
_MARKS = re.compile(r"""^(?:
    (?P<automatic>Auto-Submitted:(?!\s*no\b) | X-Autore(?:ply|spond): |
        Precedence:\s*auto.?reply | Subject:\s*(?:auto(?:matic|mated)?[ -]?re(?:ply|s)
        |out[ ]of[ ](?:the[ ])?office|abwesen|automatische?[ ]ant|réponse[ ]auto
        |risposta[ ]auto|respuesta[ ]auto|resposta[ ]auto|autosvar|自動)) |
    (?P<daemon>From:.*(?:mailer-?daemon|postmaster|mail[ ]deliver|microsoftexchange)) |
    (?P<null>Return-Path:\s*<>) | (?P<failed>X-Failed-Recipients:) |
    (?P<late>Subject:.*(?:delay|warning|still|not[ ]yet|verzög)) |
    (?P<forward>X-Forwarded-Message-Id: | Subject:\s*(?:fwd?|wg|tr|rv)\s*:) |
    (?P<reply>In-Reply-To:) | (?P<report>Content-Type:\s*multipart/report))""",
                    re.M | re.I | re.X | re.A)
_TELLING = {"automatic", "daemon", "null", "failed", "reply", "report"}
_ENHANCED = re.compile(r"(?<![\d.])[245]\.\d{1,3}\.\d{1,3}(?![\d.])")  # RFC 3463
_REFUSAL = re.compile(r"(?<![\d.])[45](?:\d\d[ -]|\.\d\.\d)|undeliver|fail|unknown"
                      r"|not be (?:sent|deliver)|reject|no such", re.I)
_NOBODY = re.compile(
    r"(?:user|recipient|mailbox|account|address) (?:was )?(?:unknown|not found)"
    r"|(?:unknown|no such|invalid) (?:user|recipient|mailbox|address)"
    r"|does(?:n't| not) (?:exist|have an? \S+ account)|unrouteable address", re.I)
_HARD = re.compile(r"5\.1\.(?![78]$)|5\.2\.1$")  # 5.1.7 and 5.1.8: the sender's address
_ACTIONS = {"failed": "bounced", "failure": "bounced", "error": "bounced",
            "delayed": "delayed", "5": "bounced", "4": "delayed"}


class Known:
    """What is known of our own mail, and by which names it may come back."""

    def __init__(self, files: Files) -> None:
        columns, rows = register_rows(files)
        columns = [column.lower() for column in columns]
        cells = [cell_of(columns, column) for column in (
            "id", "name", "email", "sent", "created", "message_id", "status")]
        self.names: Dict[str, str] = {}
        self.emails: Dict[str, str] = {}
        self.times: Dict[str, str] = {}  # when each was sent, or else made
        self._by_message: Dict[str, List[str]] = {}  # a relay gives one to several
        self._by_email: Dict[str, List[str]] = {}
        for row in progress(rows, "reading rows"):
            tag_id, name, email, sent, created, message, status = (
                cell(row) for cell in cells)
            self.names[tag_id], self.times[tag_id] = name, sent or created
            self.emails[tag_id] = email = email.strip().casefold()
            if message:
                self._by_message.setdefault(message.strip("<> "), []).append(tag_id)
            if email and status != "queued":
                self._by_email.setdefault(email, []).append(tag_id)
        for event in read_log(files.log, b"250 Ok "):  # SES makes it the Message-ID
            given = re.fullmatch(r"250 Ok ([\w.-]{20,})", event.detail)
            if given and event.id in self.names:
                self._by_message.setdefault(given[1], []).append(event.id)

    def matters(self, raw: bytes) -> bool:
        """Tell from its head whether a message can speak of a tag."""
        head = _readable_head(_part_at(raw, 0).head)
        return not (_TELLING.isdisjoint(_marks(head)) and self.names.keys().isdisjoint(
            _ID_IN_TEXT.findall(head)))

    def ids(self, name: str) -> List[str]:
        """Return the tags that an id or a Message-ID stands for."""
        local = name.partition("@")[0]
        return [local] if local in self.names else self._by_message.get(
            name) or self._by_message.get(local, [])

    def newest(self, addresses: Iterable[str], when: str) -> List[str]:
        """Return for each known address the last tag sent to it before a time."""
        sent = ([(self.times[tag_id], tag_id) for tag_id in self._by_email.get(a, ())
                 if self.times[tag_id] <= when] for a in addresses)
        return [max(some)[1] for some in sent if some]


class Sign(NamedTuple):
    """What a message says of the mail to some addresses."""

    event: str  # "" where all is well
    addresses: FrozenSet[str]
    how: str = ""  # of a bounce: hard, the address takes no mail; or soft
    words: str = ""


class Answer:
    """A message that may speak of a tag: what stands where in it."""

    def __init__(self, raw: bytes) -> None:
        raw = raw[:MOST_READ].replace(b"\r\n", b"\n")
        parts = split(raw)
        self.head = parts[0].head
        self.marks = _marks(_readable_head(self.head))
        self.own = _addresses(self.head, "To|Delivered-To")
        self.leaves = [(part.type, part_text(raw, part)) for part in parts
                       if part.type.startswith(("text/", "message/"))]
        said = "\n".join(text for _, text in takewhile(
            lambda leaf: leaf[0].startswith("text/"), self.leaves))
        self.said = _COPY.split(said, 1)[0]  # by who wrote it, not what is returned
        self._ends: Dict[str, int] = {}  # where addresses end in that

    def words_about(self, addresses: Iterable[str]) -> str:
        """Return what is said behind one of some addresses, or else of a refusal."""
        if not self._ends:
            self._ends = {found[0].casefold(): found.end() for found in
                          reversed([*_ANY_ADDRESS.finditer(self.said)])}
        refusal = _REFUSAL.search(self.said)
        start = next((self._ends[a] for a in addresses if a in self._ends),
                     refusal.start() if refusal else len(self.said))
        words = self.said[start:start + 500].lstrip(">:.) \n")
        return words.partition("\n\n")[0]

    def time(self) -> str:
        """Return when it was written, or else received; "9" where it does not say."""
        from email.utils import mktime_tz, parsedate_tz

        for name in "Date", "Received":
            value = field(self.head, name).rpartition(";")[2]
            with suppress(ValueError, IndexError, OverflowError, OSError):
                parsed = parsedate_tz(value[:100])
                when = utc_text(mktime_tz(parsed)) if parsed else ""
                if is_time(when):
                    return when
        return "9"

    def text(self) -> str:
        """Return all that it says and returns, no word cut by quoted-printable."""
        return "\n".join(["", *(text for _, text in self.leaves)]).replace("=\n", "")

    def named(self) -> Iterator[str]:
        """Yield what may name the tag: ids and Message-IDs, the surest first."""
        for name in "Delivered-To", "X-Original-To", "To":
            yield from _found(_ID_IN_TEXT, self.head, name)
        for name in "In-Reply-To", "References":
            yield from reversed(_found(_MESSAGE_ID, self.head, name))
        text = self.text()
        returned = " ".join(_RETURNED_ID.findall(text))
        yield from _MESSAGE_ID.findall(decoded_words(returned))
        yield from _ID_IN_TEXT.findall(text)


def _readable_head(head: bytes) -> str:
    """Return a head unfolded, with its encoded words decoded."""
    return decoded_words(re.sub(r"\r?\n[ \t]+", " ", head.decode("utf-8", "replace")))


def _marks(head: str) -> Set[Optional[str]]:
    return {found.lastgroup for found in _MARKS.finditer(head)}


def _found(pattern: re.Pattern[str], head: bytes, name: str) -> List[str]:
    """Return what matches a pattern in the fields of a head with such a name."""
    return pattern.findall(decoded_words("\n".join(fields(head, name))))


def _addresses(head: bytes, name: str) -> FrozenSet[str]:
    return frozenset(map(str.casefold, _found(_ANY_ADDRESS, head, name)))


def read_mail(raw: bytes, known: Known) -> List[Event]:
    """Return what a message says of which tags, at most one event of each.

    Nothing comes of our own mail, of forwards, and of reports that all is well.
    """
    mail = Answer(raw)
    own_ids = _found(
        _MESSAGE_ID, mail.head, "(?:X-Microsoft-Original-)?Message-ID")
    signs = _signs(mail)
    if any(map(known.ids, own_ids)) or not any(sign.event for sign in signs):
        return []
    addresses, when = frozenset(chain(*(s.addresses for s in signs))), mail.time()
    ids = _meant(mail, known, addresses)
    is_likely = not ids and bool(mail.marks & {"daemon", "null"}) and any(
        sign.event in ("bounced", "delayed") for sign in signs)
    if is_likely:
        others = {*_ANY_ADDRESS.findall(mail.text().casefold())} - mail.own
        only = known.newest(others, when)
        ids = known.newest(addresses, when) or only * (len(only) == 1)
    events = []
    for tag_id in ids:
        mine = [sign for sign in signs if known.emails[tag_id] in sign.addresses]
        event, _, how, words = min(mine or signs, key=lambda sign: (  # what is sure
            sign.event == "bounced", sign.how == "hard", sign.event))
        if is_likely:  # it may be forged, so it does not begin with hard:
            how = "hard, likely" if how == "hard" else f"{how}: likely".lstrip(": ")
        events.append(Event(
            when if is_time(when) else known.times[tag_id], event, tag_id,
            detail=": ".join(filter(None, (how, words)))[:200]))
    return [event for event in events if event.event and is_time(event.time)]


def _meant(mail: Answer, known: Known, addresses: Collection[str]) -> List[str]:
    """Return the tags that a message names, of several only those of addresses."""
    for ids in map(known.ids, mail.named()):
        near = {known.emails[tag_id]: tag_id for tag_id in ids
                if known.emails[tag_id] in addresses}
        if near or len(ids) == 1:
            return [*near.values()] or ids
    return []


def _signs(mail: Answer) -> List[Sign]:
    """Return what a message says, to whichever tags that applies."""
    marks, sender = mail.marks, _addresses(mail.head, "From")
    for kind, text in mail.leaves:
        if kind in ("message/delivery-status", "message/global-delivery-status"):
            return _reported(mail, text)
        if kind == "message/disposition-notification":
            return _receipt(mail, text.encode("utf-8", "replace"))
    is_from_server = "reply" not in marks and (
        "daemon" in marks or marks & {"null", "automatic"} == {"null"})
    if "failed" in marks or is_from_server and _REFUSAL.search(mail.said):
        addresses = _addresses(mail.head, "X-Failed-Recipients") or {
            *_ANY_ADDRESS.findall(mail.said.casefold())} - mail.own
        event = "delayed" if "late" in marks else "bounced"
        return [_refusal(event, {address} - {""}, "", mail.words_about([address]))
                for address in addresses or [""]]
    if "daemon" in marks and is_from_server or (
            sender & _addresses(mail.head, "Delivered-To")):
        return []
    if marks & {"automatic", "null"}:
        return [Sign("autoreply", sender)]
    is_reply = marks & {"reply", "forward"} == {"reply"}
    return [Sign("replied", sender)] if is_reply else []


def _reported(mail: Answer, report: str) -> List[Sign]:
    """Return what a delivery report says (RFC 3464), block by block."""
    signs = []
    for block in re.split(rb"\n[ \t]*\n", report.encode("utf-8", "replace")):
        addresses = _addresses(block, "(?:Final|Original)-Recipient")
        status, action = ((field(block, name).lower().split() or [""])[0]
                          for name in ("Status", "Action"))
        if addresses or action:
            words = field(block, "Diagnostic-Code").partition(";")[2]
            signs.append(_refusal(_ACTIONS.get(action or status[:1], ""), addresses,
                                  status, words or mail.words_about(addresses)))
    if len(signs) == 1:  # Exim names what an alias stands for
        more = _addresses(mail.head, "X-Failed-Recipients")
        signs = [signs[0]._replace(addresses=signs[0].addresses | more)]
    return signs


def _receipt(mail: Answer, report: bytes) -> List[Sign]:
    """Return what a receipt says (RFC 8098); a filter may refuse by one (RFC 5429)."""
    addresses = _addresses(report, "Final-Recipient")
    mode, _, kind = field(report, "Disposition").lower().partition(";")
    if "displayed" in kind:
        return [Sign("read", addresses)]
    words = field(mail.head, "Auto-Submitted") + mail.said
    if "automatic" in mail.marks and mode.startswith("automatic") and (
            "deleted" in kind and re.search("reject|refuse", words, re.I)):
        return [Sign("bounced", addresses, "soft", "refused by a filter")]
    return []


def _refusal(event: str, addresses: Collection[str], status: str, words: str) -> Sign:
    """Return a refusal in words without addresses; 5.7 is about us, so it is soft."""
    code = next((code for code in (status, *_ENHANCED.findall(words))
                 if _ENHANCED.fullmatch(code) and not code.endswith(".0.0")), "")
    words = " ".join(_UNSPACED.sub(
        lambda word: "<...>" if "@" in word[0] else word[0], words or status).split())
    is_hard = _HARD.match(code) or _NOBODY.search(words) and not (
        re.match(r"[24]\.|5\.[27]\.", code) or re.search(r"\b4\d\d\b", words))
    how = "hard" if is_hard else "soft: policy" if code[:4] == "5.7." else "soft"
    words = words if code in words else f"{code} {words}"
    return Sign(event, frozenset(addresses), how * (event == "bounced"), clean(words))


# -- scan: mailboxes, none of which is ever changed ------------------------------

AT_ONCE = 50         # messages that an IMAP server is asked for
SEARCHED = 50_000    # of which it may name all in one line; imaplib takes 1 MB
IMAP_SECONDS = 60.0  # until it must have answered

_IMAP_URL = re.compile(r"(imaps?)://([^/:]+)@([\w.-]+|\[[\da-fA-F:.]+\])"
                       r"(?::(\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}))?(?:/(.*))?", re.ASCII)


def messages_in(options: argparse.Namespace, matters: Callable[[bytes], bool],
                seen: Set[Any]) -> Iterator[Optional[bytes]]:
    """Yield the start of each message in a mailbox, None for one that is unreadable.

    What was seen is left out and remembered; of what does not matter, the head will
    do. Raise TrackerError or OSError.
    """
    path = options.mailbox
    if "://" in path:
        yield from imap_messages(options, matters, seen)
    elif os.path.isdir(path):
        for folder in options.folder or [""]:
            places = [os.path.join(path, name) for name in (
                folder, "." + folder.replace("/", "."))]  # as in Maildir++
            found = [p for p in places if os.path.isdir(os.path.join(p, "cur"))]
            if not found:
                raise FileNotFoundError(errno.ENOENT, "no Maildir", places[0])
            yield from maildir_messages(found[0], seconds(options.since), seen)
    elif options.folder and (path == "-" or os.path.exists(path)):
        raise TrackerError(f"{path} is a file: it has no folders")
    elif path == "-" or stamp_of(path) not in seen:
        seen.add(stamp_of(path))
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            yield from mbox_messages(file)


def maildir_messages(folder: str, since: float, seen: Set[Any]
                     ) -> Iterator[Optional[bytes]]:
    """Yield the messages of a Maildir that came since then."""
    for place in "new", "cur", "cur":  # twice: a flag renames a file meanwhile
        for entry in os.scandir(os.path.join(folder, place)):
            name = folder, entry.name.partition(":")[0]
            if name in seen or not entry.is_file():
                continue
            try:
                if entry.stat().st_mtime >= since:
                    with open(entry.path, "rb") as file:
                        yield file.read(MOST_READ)
            except FileNotFoundError:
                continue
            except OSError:
                yield None
            seen.add(name)


def mbox_messages(file: Any) -> Iterator[bytes]:
    """Yield the messages of an mbox, or a single one."""
    message, is_blank = bytearray(), True
    for line in iter(lambda: file.readline(MOST_READ), b""):
        if is_blank and line.startswith(b"From "):
            if message:
                yield bytes(message)
            message.clear()
        elif len(message) < MOST_READ:
            message += line
        is_blank = line in (b"\n", b"\r\n")
    if message:
        yield bytes(message)


def imap_messages(options: argparse.Namespace, matters: Callable[[bytes], bool],
                  seen: Set[Any]) -> Iterator[Optional[bytes]]:
    """Yield the messages of IMAP folders that came since then; no flag changes."""
    with _logged_in(options) as (imap, folder):
        wanted = [*map(folder_name, filter(None, [folder, *options.folder]))]
        for name in wanted or [b"INBOX", *_junk_folders(imap)]:
            status, count = imap.select(name, readonly=True)
            if status != "OK":
                raise TrackerError(f"no such folder: {name.decode('utf-8', 'replace')}")
            version = name, *imap.response("UIDVALIDITY")[1]
            last = max((uid for known, uid in seen if known == version), default=0)
            uids = _new_uids(imap, int(count[0] or 0), last, options.since)
            for some in (uids[at:at + AT_ONCE] for at in range(0, len(uids), AT_ONCE)):
                heads = _fetched(imap, some, "HEADER")
                found = {**heads, **_fetched(
                    imap, [uid for uid in heads if matters(heads[uid])])}
                yield from map(found.get, some)
                seen.update((version, uid) for uid in some)


def _new_uids(imap: Any, count: int, last: int, since: str) -> List[int]:
    """Return which messages of a folder are behind the last one, and young enough."""
    from imaplib import Time2Internaldate

    uids: List[int] = []
    date = Time2Internaldate(seconds(since) - 86400)[1:12]  # of whichever zone
    for start in range(1, count + 1, SEARCHED):
        _, found = imap.uid("SEARCH", f"{start}:{min(count, start + SEARCHED - 1)} "
                            f"UID {last + 1}:* SINCE {date}")
        uids += map(int, b" ".join(filter(None, found)).split())
    return [uid for uid in uids if uid > last]  # "9:*" is the last one at least


def _fetched(imap: Any, uids: Sequence[int], section: str = "") -> Dict[int, bytes]:
    """Return the starts of messages, or of their heads, by UID, as far as it can."""
    if not uids:
        return {}
    status, found = imap.uid("FETCH", ",".join(map(str, uids)),
                             f"(UID BODY.PEEK[{section}]<0.{MOST_READ}>)")
    if status != "OK" and len(uids) > 1:  # one of them is broken
        return dict(chain(*(_fetched(imap, [uid], section).items() for uid in uids)))
    bodies = {}
    for item, rest in zip(found, [*found[1:], b""]):
        if isinstance(item, tuple):  # the UID stands before or behind the literal
            behind = rest if isinstance(rest, bytes) else b""
            uid = re.search(rb"UID (\d+)", item[0] + behind)
            bodies.update({int(uid[1]): item[1]} if uid else {})
    return bodies


def _junk_folders(imap: Any) -> List[bytes]:
    """Return the names of folders for junk, as the server writes them (RFC 6154)."""
    has_uses = b"SPECIAL-USE" in b" ".join(filter(None, imap.capability()[1]))
    lines = imap.list('""', "* RETURN (SPECIAL-USE)" if has_uses else "*")[1]
    return re.findall(rb'^\([^)]*\\junk\b[^)]*\) (?:NIL|"\\?.") (.+)', b"\n".join(
        line for line in lines if isinstance(line, bytes)), re.M | re.I)


def folder_name(name: str) -> bytes:
    """Return the name of an IMAP folder in quotes and UTF-7 (RFC 3501, 5.1.3)."""
    def encoded(text: re.Match[str]) -> str:
        data = b2a_base64(text[0].encode("utf-16-be", "surrogatepass"), newline=False)
        return "&" + data.decode().rstrip("=").replace("/", ",") + "-"
    name = re.sub("[^ -~]+", encoded, name.replace("&", "&-"))
    return b'"' + re.sub(r'(["\\])', r"\\\1", name).encode() + b'"'


@contextmanager
def _logged_in(options: argparse.Namespace) -> Iterator[Tuple[Any, str]]:
    """Connect to an IMAP server, TLS verified; pass that on with the URL's folder.

    Only this machine is spoken to without TLS. Raise TrackerError.
    """
    import imaplib
    import ssl
    from urllib.parse import unquote

    url = _IMAP_URL.fullmatch(options.mailbox)
    if not url or not unquote(url[2]).isprintable():
        raise TrackerError("a mailbox is imaps://user@host[:port][/folder], and its "
                           "password comes from --password-command")
    user, host, password = unquote(url[2]), url[3].strip("[]"), password_from(
        options.password_command)
    mechanism, secret = ("XOAUTH2", f"user={user}\1auth=Bearer {password}\1\1") \
        if options.auth == "xoauth2" else ("PLAIN", f"\0{user}\0{password}")
    context, port = ssl.create_default_context(), int(url[4] or 0)
    with ExitStack() as stack:
        try:
            imap: Any = imaplib.IMAP4(host, port or 143, IMAP_SECONDS) \
                if url[1] == "imap" else imaplib.IMAP4_SSL(
                    host, port or 993, ssl_context=context, timeout=IMAP_SECONDS)
            stack.callback(imap.shutdown)
            if url[1] == "imap" and not is_loopback(imap.sock.getpeername()[0]):
                imap.starttls(context)
            if "AUTH=" + mechanism in imap.capabilities:
                imap.authenticate(mechanism, lambda _: secret.encode())
            else:
                imap.login(folder_name(user).decode(), password)
            yield imap, unquote(url[5] or "")
        except (imaplib.IMAP4.error, OSError, ValueError) as error:
            words = error.args[0] if isinstance(error, imaplib.IMAP4.error) else ""
            if isinstance(words, bytes):
                words = words.decode("utf-8", "replace")
            if isinstance(error, UnicodeError):  # which would show a letter of it
                words = "user and password must be ASCII here: it has no AUTH=PLAIN"
            raise TrackerError(f"{host}: {words or explain(error)}") from None


# -- relay: a mail server for one's own mail programs ---------------------------

RELAY_PORT = 2525
MAX_SESSIONS = 32
MAX_RECIPIENTS = 100      # RFC 5321, 4.5.3.1.8
MAX_ERRORS = 20
MAX_COMMAND = 2048        # bytes; 512 in RFC 5321, and parameters
IDLE_SECONDS = 300.0      # RFC 5321, 4.5.3.2.7
DATA_SECONDS = 3600.0     # for one message to come in
ANSWER_SECONDS = 80.0     # after the dot; Thunderbird gives up after 100
LEDGER_SECONDS = 86400.0  # in which a letter that failed is sent again
DRAIN_MAIL = 10.0         # seconds for messages under way when the relay is stopped
SPOOLED = 1 << 19         # bytes of a message beyond which it waits in a file
HELD = 24 << 20           # bytes of messages that are worked on at once
DEFAULT_SIZE = 50 << 20   # of a message, where the smarthost names none
MOST_IMAGES = 50          # of a message, looked up in the log
OWN_HEADER = 2000         # bytes that a message may grow by
TAG_COLUMNS = ("id", "name", "email", "message_id")
NO_HTTP = "421 4.7.0 this is a mail server"
TOO_BIG = "552 5.3.4 message too big"
STORED = Reply(250, "2.0.0 stored", "dot")
BEFORE = Reply(250, "2.0.0 sent before", "dot")

# What a client may begin with: a web page can make a browser say all but these.
_OPENERS = ("EHLO", "HELO", "NOOP", "RSET", "QUIT")
_PATHS = {verb: re.compile(
    word + r':\s*<(?:@[^:<>]*:)?((?:"(?:[^"\\]|\\.)*"|[^<>"\\\s])*)>((?: +\S+)*) *',
    re.I)
    for verb, word in (("MAIL", "FROM"), ("RCPT", "TO"))}
_ANSWERS = {"NOOP": "250 2.0.0 ok", "VRFY": "252 2.5.2 send it, and see",
            **dict.fromkeys(("EXPN", "ETRN", "HELP"), "502 5.5.1 not here")}
# Named groups: what is passed on, to a smarthost with that extension.
_OPTIONS = {verb: re.compile(words, re.I) for verb, words in (
    ("MAIL", r"SIZE=(?:\d{1,15})|BODY=(?:7BIT|8BITMIME)|AUTH=\S+|"
             r"(?P<smtputf8>SMTPUTF8)|(?P<dsn>(?:RET|ENVID)=\S+)"),
    ("RCPT", r"(?P<dsn>(?:NOTIFY|ORCPT)=\S+)"))}


class Refusal(Exception):
    """The answer to a command that is not obeyed."""


class Envelope(NamedTuple):
    """Whom a message is from and for; the options are those of MAIL and of RCPT."""

    sender: str
    options: str
    recipients: Dict[str, str]


def message_blocks(file: Any) -> Iterator[bytes]:
    """Yield the blocks of a message as it comes; the last ends with its final dot.

    Only CRLF.CRLF is an end: what other servers take for one could smuggle in a
    second message. What is behind it stays in the file.
    """
    end, tail = -1, b"\r\n"
    while end < 0:
        block = file.peek(1)
        if not block:
            raise ConnectionAbortedError
        end = (tail + block).find(b"\r\n.\r\n")
        block = file.read(len(block) if end < 0 else end + 5 - len(tail))
        tail = (tail + block)[-4:]
        yield block


def spooled(blocks: Iterable[bytes], spool: Any, limit: int) -> int:
    """Put a message into a file and return its size; raise Refusal at its end."""
    size, wrong = -3, ""
    for block in blocks:
        size += len(block)
        wrong = wrong or TOO_BIG * (size > limit)
        try:
            if not wrong:
                spool.write(block)
        except OSError as error:
            wrong = f"452 4.3.1 {explain(error)}"
    if wrong:
        raise Refusal(wrong)
    spool.seek(0)
    return size


def received(raw: bytes) -> bytes:
    """Return a message without the dots of SMTP, all its lines ended by CRLF."""
    raw = raw.replace(b"\r\n.", b"\r\n")
    raw = raw[1:] if raw[:1] == b"." else raw
    if raw.count(b"\n") == raw.count(b"\r") == raw.count(b"\r\n"):
        return raw
    raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return raw.replace(b"\n", b"\r\n")


def stamped(raw: bytes, token: str, new: str) -> bytes:
    """Return a message with a line that tells loops, and with what must not be missing.

    A Message-ID that a later server makes up, we would never learn. What was said
    to us is taken out.
    """
    from email.utils import formatdate

    head, now = _part_at(raw, 0).head, formatdate()
    domain = author_of(head).rpartition("@")[2] or "localhost"
    lines = [f"Received: by localhost with ESMTP id {token}; {now}"]
    if not field(head, "Message-ID"):
        lines.append(f"Message-ID: <{new}@{domain}>")
    if not field(head, "Date"):
        lines.append(f"Date: {now}")
    if wants_no_pixel(raw):
        raw = without_field(raw, OPT_OUT)
    return with_header_lines(raw, lines)


def author_of(head: bytes) -> str:
    """Return the address in From; empty for none."""
    return str(["", *_ANY_ADDRESS.findall(field(head, "From"))][-1])


def letter_of(sender: str, raw: bytes) -> str:
    """Return what stays of a letter when a mail program sends it once more.

    That may renew Message-ID, Date, boundaries and Content-IDs; the user may take out
    a recipient.
    """
    from hashlib import blake2b

    parts = split(raw)
    head = parts[0].head
    digest = blake2b("\n".join([sender, field(head, "From"), field(head, "Subject")]
                               ).encode("utf-8", "surrogateescape"), digest_size=8)
    for part in parts:
        body: Any = memoryview(raw)[part.start:part.end]
        if part.type == "text/html":
            body = re.sub(rb"cid:[^\"'>\s]+", b"", bytes(body).replace(b"=\r\n", b""))
        if not part.type.startswith("multipart/"):
            digest.update(body)
    return digest.hexdigest()


class Letter:
    """Whom a letter has reached whose sender was not told yet that all have it."""

    def __init__(self) -> None:
        self.reached: Dict[str, str] = {}  # recipients, and when
        self.busy: Set[str] = set()  # recipients to whom it is being sent
        self.users = 0
        self.tag = ""  # one that the log has of it
        self.is_kept = False


class Ledger:
    """What keeps a letter that is sent again from those who have it already.

    A letter to several may reach some only, and all that a mail program can do then
    is to send it again, to all. The log tells the next relay of letters to several.
    """

    def __init__(self, path: str) -> None:
        from threading import Condition

        self._letters: Dict[str, Letter] = {}
        self._change = Condition()
        known, since = {}, utc_text(time.time() - LEDGER_SECONDS)
        for event in read_log(path, b",sending,"):
            if " " in event.detail and event.time >= since:
                known[event.id] = event.detail.split(" ", 1)
        for event in read_log(path, b",sent,"):
            if event.id in known:
                name, recipient = known[event.id]
                letter = self._letters.setdefault(name, Letter())
                letter.reached[recipient], letter.tag = event.time, event.id
        for event in read_log(path, b",answered,"):
            if event.detail in self._letters and event.time >= max(
                    self._letters[event.detail].reached.values()):
                del self._letters[event.detail]

    @contextmanager
    def opened(self, name: str, recipients: Collection[str]) -> Iterator[Letter]:
        """Have a letter, as soon as nobody else is sending it to one of the same."""
        since = utc_text(time.time() - LEDGER_SECONDS)
        with self._change:
            for old, known in list(self._letters.items()):  # those retried no more
                if not known.users and max(known.reached.values(), default="") < since:
                    del self._letters[old]
            letter = self._letters.setdefault(name, Letter())
            letter.users += 1
            self._change.wait_for(lambda: letter.busy.isdisjoint(recipients))
            letter.busy.update(recipients)
        try:
            yield letter
        finally:
            with self._change:
                letter.busy.difference_update(recipients)
                letter.users -= 1
                self._change.notify_all()


class Maildrop:
    """A Maildir that mail is put into, up to a size."""

    def __init__(self, path: str, most: int) -> None:
        import mailbox
        from threading import Lock

        for name in ("tmp", "new", "cur"):
            os.makedirs(os.path.join(path, name), 0o700, exist_ok=True)
        self._path, self._most = path, most
        self._maildir, self._lock = mailbox.Maildir(path), Lock()
        self._used = self._measured()

    def _measured(self) -> int:
        """Return the size of all mail in it; some may be going just now."""
        size = 0
        for name in ("new", "cur"):
            for entry in os.scandir(os.path.join(self._path, name)):
                with suppress(FileNotFoundError):
                    size += entry.stat().st_size
        return size

    def has_room(self, size: int) -> bool:
        """Tell whether so much more fits in."""
        if self._used + size > self._most:
            self._used = self._measured()  # some may have been read and removed
        return self._used + size <= self._most

    def put(self, message: bytes) -> Reply:
        """Store a message; it is on the disk, whole, or not there at all."""
        with self._lock:
            if not self.has_room(len(message)):
                return Reply(452, "4.2.2 mailbox full", "dot")
            try:
                self._maildir.add(message.replace(b"\r\n", b"\n"))
                sync_folder(os.path.join(self._path, "new"))
            except OSError as error:
                return Reply(452, f"4.3.1 {error.strerror}", "dot")
            self._used += len(message)
            return STORED


def relay_answer(reply: Reply) -> str:
    """Return what a client is told where the smarthost said this."""
    words = {"connect": "451 4.4.1 smarthost cannot be reached:",
             "login": "454 4.7.0 smarthost:"}.get(reply.stage, "")
    code = 451 if reply.code == 421 else reply.code  # we do not end the connection
    return f"{words or code or '451 4.4.2 smarthost:'} {reply.text}"[:500]


def final_answer(replies: Mapping[str, Reply]) -> str:
    """Return what a client is told of its message, which its user may get to read."""
    bad = {address: reply for address, reply in replies.items() if not reply.is_ok}
    lost = [address for address, reply in bad.items() if reply.is_lost]
    first = next(iter((bad or replies).values()))
    done = len(replies) - len(bad)
    if not lost and (not done or all(reply is first for reply in replies.values())):
        return relay_answer(first)
    if not bad:
        return f"250 2.0.0 handed on to {done}"
    refused = [f"{address} ({reply})" for address, reply in bad.items()
               if not reply.is_lost]
    code = "554 5.3.0" if all(reply.code >= 500 for reply in bad.values()) \
        else "451 4.3.0"
    words = [f"sent to {done} of {len(replies)}"] * bool(done)
    words += [f"may have been sent to {', '.join(lost)}"] * bool(lost)
    words += [f"NOT to {', '.join(refused)}"] * bool(refused)
    words += ["send again to reach only the rest"] * bool(done)
    return f"{code} {'; '.join(words)}"[:500]


class Passage:
    """One message on its way, and what became of it for each recipient."""

    def __init__(self, relay: Relay, smarthost: Smarthost, envelope: Envelope,
                 raw: bytes) -> None:
        self._relay, self._smarthost = relay, smarthost
        self._sender, self._options, self._recipients = envelope
        self.letter = letter_of(self._sender, raw)
        self.keys = {a: hash_of(f"{self.letter} {a.lower()}")[:8]  # no address, as
                     for a in self._recipients}                    # the log has them
        self.replies: Dict[str, Reply] = {}
        self.tags: List[str] = []
        head = _part_at(raw, 0).head
        self.is_loop = any(relay.token in line for line in fields(head, "Received"))
        self._senders = self._sender.lower(), author_of(head).lower()
        self._why = "no sender" if not self._sender else \
            "not wanted" if wants_no_pixel(raw) else ""  # there is no pixel in it
        self._ids = new_ids(os.urandom(32), len(self.keys))
        self._made: Optional[Tuple[str, bytes]] = None  # with a pixel, not sent yet
        self._images: Dict[str, bool] = {}  # which are pixels of ours
        self._raw = stamped(raw, relay.token, self._ids[0])
        self._name = one_line(decoded_words(field(head, "Subject")))[:200]
        self._message_id = one_line(
            field(_part_at(self._raw, 0).head, "Message-ID")).strip("<>")[:998]

    def run(self, letter: Letter, is_late: Callable[[], bool]) -> None:
        """Send the message to all who do not have it, until it is late."""
        self._is_listed = len(self.keys) > 1 or bool(letter.reached)
        asked = [a for a in self.keys if not self._relay.maildrop(a)]
        todo = [a for a, key in self.keys.items() if key not in letter.reached]
        away = [a for a in asked if a in todo]
        self.replies = {a: BEFORE for a in self.keys if a not in todo}
        tagged = self._tagged_of(away)
        is_open = away == asked and (not tagged or len(away) == 1
                                     and not self._relay.options.bounce_address)
        if away and is_open:
            self._send(letter, away, bool(tagged), self._smarthost.data)
            if self.replies[away[0]].stage == "data":  # it still waits for one
                self._smarthost.reset()
        else:
            self._smarthost.reset()
            for address in takewhile(lambda _: not is_late(), away):
                self._send(letter, [address], address in tagged)
        for address in (a for a in todo if a not in asked):
            self._send(letter, [address], False, partial(self._store, address))
        self._report(letter)

    def close(self, letter: Letter) -> None:
        """Forget whom the letter reached: its sender was told that all have it."""
        for key in self.keys.values():
            letter.reached.pop(key, None)
        if letter.tag:
            self._log("answered", letter.tag, self.letter)
            letter.tag = ""

    def _tagged_of(self, addresses: Sequence[str]) -> List[str]:
        """Return those of some recipients whose copies get a pixel."""
        tagged = [a for a in addresses if a.lower() not in self._senders]
        self._why = self._why if tagged else "nobody to track"
        if not self._why:
            if self._relay.options.make_html:
                self._raw = make_html(self._raw)
            self._made = self._with_pixel()
        return [] if self._why else tagged

    def _with_pixel(self) -> Tuple[str, bytes]:
        """Return the id of a new tag, and the message with it."""
        made, self._made = self._made, None
        if made:
            return made
        tag_id = self._ids.pop(0)
        tag = self._relay.template.replace("{id}", tag_id)
        message, self._why = with_pixel(self._raw, tag, self._is_ours, partial(
            self._relay.hrefs, tag_id) if self._relay.options.clicks else None)
        return tag_id, message

    def _is_ours(self, source: str) -> bool:
        """Ask the relay once for each image, and for few: each may cost a whole log."""
        if source not in self._images and len(self._images) < MOST_IMAGES:
            self._images[source] = self._relay.is_ours(source)
        return self._images.get(source, False)

    def _send(self, letter: Letter, addresses: Sequence[str], is_tagged: bool,
              hand: Optional[Callable[[bytes, Callable[[], Any]], Reply]] = None
              ) -> None:
        """Hand the message over for some recipients, or one with a pixel.

        Without hand, that is a transaction of its own.
        """
        def deliver(message: bytes, before_dot: Callable[[], Any]) -> Reply:
            return self._smarthost.deliver(
                self._envelope_sender(tag_id), addresses[0], message, before_dot,
                self._options, self._recipients[addresses[0]])

        tag_id, message = self._with_pixel() if is_tagged else ("", self._raw)
        try:
            reply = (hand or deliver)(message,
                                      lambda: self._record(tag_id, addresses[0]))
        except (TrackerError, OSError) as error:
            self._relay.lines.rarely(f"no row for a message: {explain(error)}")
            reply = Reply(452, f"4.3.1 no room to note it: {explain(error)}", "data")
            if self._relay.options.untracked_when_broken:
                tag_id = ""
                reply = deliver(self._raw, int)
        self.replies.update(dict.fromkeys(addresses, reply))
        if tag_id and reply.stage == "dot" and reply.code:
            self._log("sent" if reply.is_ok else "failed", tag_id,
                      reply.masked(addresses))
        if reply.is_ok:
            now = utc_text(time.time())
            letter.reached.update({self.keys[a]: now for a in addresses})
            self.tags += [tag_id] * bool(tag_id)
            if tag_id and self._is_listed:
                letter.tag = tag_id

    def _envelope_sender(self, tag_id: str) -> str:
        template, (user, _, domain) = (self._relay.options.bounce_address,
                                       self._sender.rpartition("@"))
        return bounce_address(template, user, domain, tag_id) if template and tag_id \
            else self._sender

    def _record(self, tag_id: str, address: str) -> None:
        """Note that a tag is being sent; it may have gone from now on."""
        if tag_id:
            now, place = utc_text(time.time()), f"{self.letter} {self.keys[address]}"
            message_id = self._message_id * (not self._message_id.startswith(tag_id))
            self._relay.write(
                add_tags, [(tag_id, self._name, address, message_id)], Making(
                    now, now, "sending", place * self._is_listed, TAG_COLUMNS))

    def _log(self, kind: str, tag_id: str, detail: str) -> None:
        event = Event(utc_text(time.time()), kind, tag_id, detail=detail)
        try:
            self._relay.write(append_events, [event])
        except (TrackerError, OSError) as error:
            self._relay.lines.rarely(explain(error))

    def _store(self, address: str, message: bytes, _: Callable[[], object]) -> Reply:
        """Put a message into the Maildir of its recipient."""
        reply: Reply = self._relay.maildrop(address).put(with_header_lines(message, [
            f"Return-Path: <{self._sender}>", f"Delivered-To: {address}"]))
        return reply

    def _report(self, letter: Letter) -> None:
        """Keep a copy, and say what became of the message, without addresses."""
        relay, have = self._relay, [a for a in self.replies if self.replies[a].is_ok]
        done = [a for a in have if self.replies[a] is not BEFORE]
        bad = {reply for reply in self.replies.values() if not reply.is_ok}
        if relay.keep and not letter.is_kept and not all(map(relay.maildrop, have)):
            letter.is_kept = True
            bad |= {relay.keep.put(self._raw)} - {STORED}
        if done and not relay.options.quiet:
            how = "tracked" if self.tags else f"not tracked: {self._why}"
            relay.lines.line(f"relayed {','.join(self.tags) or 'a mail'} to "
                             f"{plural(len(done), 'recipient')}, {how}")
        for reply in bad:
            relay.lines.line(f"not relayed: {reply.masked(self.keys)}")


class Session:
    """One client, served in a thread of its own; a do_ method obeys a command."""

    def __init__(self, relay: Relay, connection: Any, peer: str) -> None:
        from threading import Lock

        self.is_busy = False  # with a message
        self._is_waiting = False  # for others: nothing is read from the client
        self._relay, self._smarthost = relay, smarthost_of(relay.options)
        self._is_near = is_loopback(plain_address(peer))
        self._is_encrypted = self._is_over = False
        self._is_new, self._errors = True, 0
        self._speaking = Lock()
        self._use(connection)

    def _use(self, connection: Any) -> None:
        """Speak over a connection; what came over another one is forgotten."""
        connection.settimeout(IDLE_SECONDS)
        self._connection, self._file = connection, connection.makefile("rb", 1 << 16)
        self._is_greeted = False
        self._is_trusted = self._is_near and not self._relay.auth
        self._envelope: Optional[Envelope] = None
        self._limit(IDLE_SECONDS)

    # -- what the thread that accepts connections may call ----------------------

    def _limit(self, seconds: float, words: str = "421 4.4.2 too slow") -> None:
        """Expire with some words in so many seconds."""
        self._due, self._last_words = time.monotonic() + seconds, words

    def expire(self, now: float, words: str = "") -> None:
        """End the session if it is time, or with words now; its thread may go on."""
        import socket

        if not words and now < self._due:
            return
        line = (words or self._last_words).encode() + b"\r\n"
        if self._speaking.acquire(blocking=False):
            if not self._is_over and (self._is_waiting or not self._is_encrypted):
                with suppress(OSError):
                    self._connection.settimeout(0)
                    self._connection.sendall(line)
            self._is_over = True
            self._speaking.release()
        with suppress(OSError):  # not the method of SSLSocket: it may be reading
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    # -- lines --------------------------------------------------------------------

    def run(self) -> None:
        """Serve the client until one of both has enough."""
        self._relay.sessions.add(self)
        try:
            self._say("220 mailtracker ESMTP")
            if not self._file.peek(1)[:1].isalpha():  # TLS, say
                self._end(NO_HTTP)
            while not self._is_over:
                self._obey()
        except OSError:
            pass  # it has gone, or was sent away
        finally:
            self._relay.sessions.discard(self)
            for part in (self._smarthost, self._file, self._connection):
                part.close()

    def _say(self, line: str) -> bool:
        """Say something, unless the session is over; tell whether that was possible."""
        with self._speaking:
            try:
                if not self._is_over:
                    self._connection.sendall(line.encode("ascii", "replace") + b"\r\n")
            except OSError:
                self._is_over = True
            return not self._is_over

    def _end(self, line: str) -> str:
        self._say(line)
        self._is_over = True
        return ""

    def _is_gone(self) -> bool:
        """Tell whether the client has closed the connection, and said nothing more."""
        try:
            return bool(select.select([self._connection], [], [], 0)[0]) \
                and not self._file.peek(1)
        except OSError:
            return True

    def _line(self) -> str:
        """Return the next command or answer of the client."""
        self._limit(IDLE_SECONDS)
        line = self._file.readline(MAX_COMMAND)
        is_short = line.endswith(b"\n")
        while not line.endswith(b"\n"):
            line = self._file.readline(MAX_COMMAND)
            if not line:
                raise ConnectionAbortedError
        text = str(line, "utf-8", "surrogateescape").rstrip("\r\n")
        if not is_short or not text.isprintable():
            raise Refusal("500 5.5.2 a line too long, or with strange characters")
        return text

    def _obey(self) -> None:
        """Obey a command, and answer."""
        try:
            verb, _, rest = self._line().partition(" ")
            verb, is_first, self._is_new = verb.upper(), self._is_new, False
            answer, obey = _ANSWERS.get(verb, ""), getattr(self, f"do_{verb}", None)
            if is_first and verb not in _OPENERS:
                self._end(NO_HTTP)
            elif obey:
                answer = obey(rest.strip())
            elif not answer:
                raise Refusal("500 5.5.2 unknown command")
        except Refusal as refusal:
            self._errors += 1
            answer = str(refusal)
        if self._errors >= MAX_ERRORS:
            self._end("421 4.7.0 too many errors")
        elif answer:
            self._say(answer)

    # -- commands -----------------------------------------------------------------

    def do_EHLO(self, rest: str) -> str:
        """Greet, and say what is possible."""
        words = [self.do_HELO(rest)[4:], *self._relay.offers]
        words += ["STARTTLS"] * bool(self._relay.certificate and not self._is_encrypted)
        words += ["AUTH PLAIN LOGIN"] * self._may_log_in()
        return "".join(f"250-{word}\r\n" for word in words[:-1]) + f"250 {words[-1]}"

    def do_HELO(self, rest: str) -> str:
        """Greet a client of old."""
        if not rest:
            raise Refusal("501 5.5.4 say who you are")
        self.do_RSET()
        self._is_greeted = True
        return "250 mailtracker"

    def do_RSET(self, _: str = "") -> str:
        """Forget the message that was begun."""
        if self._envelope and self._is_trusted:
            self._smarthost.reset()
        self._envelope = None
        return "250 2.0.0 ok"

    def do_QUIT(self, _: str) -> str:
        """Say goodbye."""
        return self._end("221 2.0.0 bye")

    def do_STARTTLS(self, _: str) -> str:
        """Go on encrypted; what was sent ahead of that is thrown away."""
        if not self._relay.certificate or self._is_encrypted:
            raise Refusal("502 5.5.1 no TLS here, or already")
        self._say("220 2.0.0 go ahead")
        self.do_RSET()
        self._file.close()
        self._is_encrypted = True
        self._use(self._relay.certificate.wrap(self._connection))
        self._connection.do_handshake()
        return ""

    def _may_log_in(self) -> bool:
        is_safe = self._is_near or self._is_encrypted
        return self._relay.auth and is_safe and not self._is_trusted

    def do_AUTH(self, rest: str) -> str:
        """Let a client log in: with a password of its own, or at the smarthost."""
        if not self._may_log_in() or self._envelope:
            raise Refusal("503 5.5.1 not here, or not now")
        try:
            user, password = self._credentials(*rest.partition(" ")[::2])
        except ValueError:
            raise Refusal("501 5.5.2 that is no login") from None
        reply = self._log_in(user, password)
        self._is_trusted = reply.is_ok
        if not reply.is_ok:
            raise Refusal(relay_answer(reply))
        return "235 2.7.0 welcome"

    def _log_in(self, user: str, password: str) -> Reply:
        """Return what the smarthost says to a login, or we."""
        from hmac import compare_digest

        if not user or not password:  # without a user, nobody is asked
            return Reply(535, "5.7.8 wrong user or password", "auth")
        if self._relay.options.auth == "pass":
            self._smarthost.login = user, lambda: password, "password"
            reply = self._smarthost.open()
            is_wrong = reply.stage == "login" and reply.code >= 500
            return reply._replace(stage="auth") if is_wrong else reply
        if compare_digest(self._relay.login, f"{user}\0{password}".encode()):
            return Reply(235, "", "auth")
        time.sleep(1)  # against guessing
        return Reply(535, "5.7.8 wrong user or password", "auth")

    def _credentials(self, mechanism: str, first: str) -> Tuple[str, str]:
        """Return the user and password that a client says; raise ValueError."""
        if mechanism.upper() == "PLAIN":
            _, user, password = (decoded(first) if first else self._ask("")).split("\0")
            return user, password
        if mechanism.upper() != "LOGIN":
            raise Refusal("504 5.5.4 PLAIN or LOGIN")
        user = decoded(first) if first else self._ask("VXNlcm5hbWU6")
        return user, self._ask("UGFzc3dvcmQ6")

    def _ask(self, prompt: str) -> str:
        self._say(f"334 {prompt}")
        return decoded(self._line())

    def do_MAIL(self, rest: str) -> str:
        """Begin a message."""
        relay = self._relay
        if not self._is_greeted or self._envelope:
            raise Refusal("503 5.5.1 EHLO first, and one message at a time")
        if not self._is_trusted and not relay.maildrops:
            raise Refusal("530 5.7.0 log in first")
        sender, options = self._path("MAIL", rest)
        size = re.search(r" SIZE=(\d+)", rest, re.I)
        if size and int(size[1]) > relay.limit:
            raise Refusal(TOO_BIG)
        options += " BODY=8BITMIME" * ("8bitmime" in relay.extensions)
        reply = self._smarthost.mail(sender, options.strip()) if self._is_trusted \
            else Reply(250, "2.1.0 ok", "mail")
        if reply.is_ok:
            self._envelope = Envelope(sender, options.strip(), {})
        return relay_answer(reply)

    def do_RCPT(self, rest: str) -> str:
        """Take a recipient, if the smarthost does, or if we keep its mail."""
        if not self._envelope:
            raise Refusal("503 5.5.1 MAIL first")
        address, options = self._path("RCPT", rest)
        maildrop, reply = self._relay.maildrop(address), Reply(250, "2.1.5 ok", "rcpt")
        for wrong, words in (
                (not address, "501 5.1.3 nobody"),
                (not maildrop and not self._is_trusted, "550 5.7.1 no relaying"),
                (len(self._envelope.recipients) >= MAX_RECIPIENTS,
                 "452 4.5.3 too many recipients"),
                (maildrop and not maildrop.has_room(1), "452 4.2.2 mailbox full")):
            if wrong:
                raise Refusal(words)
        if not maildrop and address not in self._envelope.recipients:
            reply = self._smarthost.rcpt(address, options)
        if reply.is_ok:
            self._envelope.recipients[address] = options
        return relay_answer(reply)

    def _path(self, verb: str, rest: str) -> Tuple[str, str]:
        """Return the address of MAIL or RCPT, and the parameters to pass on."""
        found = _PATHS[verb].fullmatch(rest)
        if not found or len(found[1]) > 254:  # 256 with its brackets
            raise Refusal("501 5.1.7 no address in <>")
        words = [_OPTIONS[verb].fullmatch(word) for word in found[2].split()]
        for word in words:
            if not word or not {word.lastgroup} <= {None, *self._relay.extensions}:
                raise Refusal("555 5.5.4 unknown parameter")
        return found[1], " ".join(word[0] for word in words if word and word.lastgroup)

    def do_DATA(self, _: str) -> str:
        """Take a message, and send it on."""
        envelope = self._envelope
        if not envelope or not envelope.recipients:
            raise Refusal("503 5.5.1 RCPT first")
        self._envelope, self.is_busy = None, True
        try:
            self._say("354 end with a dot")
            self._receive(envelope)
        except Refusal:
            self._smarthost.reset()
            raise
        finally:
            self.is_busy = self._is_waiting = False
        return ""

    def _receive(self, envelope: Envelope) -> None:
        """Read a message, on the disk if it is long, and send it when there is room."""
        from tempfile import SpooledTemporaryFile

        relay = self._relay
        self._limit(DATA_SECONDS)
        with SpooledTemporaryFile(SPOOLED) as spool:
            size = spooled(message_blocks(self._file), spool, relay.limit)
            self._limit(ANSWER_SECONDS, "451 4.4.7 the smarthost is still at it; "
                        "send again later to reach only the rest")
            self._is_waiting = True
            with relay.room(size):
                self._send(Passage(relay, self._smarthost, envelope,
                                   received(spool.read(size))))

    def _send(self, passage: Passage) -> None:
        """Send a message on, and answer."""
        if passage.is_loop:
            raise Refusal("554 5.4.6 this message was here before")
        with self._relay.ledger.opened(
                passage.letter, passage.keys.values()) as letter:
            if not self._is_over:
                passage.run(letter, lambda: self._is_over)
            if not self._is_over:
                answer = final_answer(passage.replies)
                if not self._is_gone() and self._say(answer) and answer[0] == "2":
                    passage.close(letter)


def decoded(text: str) -> str:
    """Return what a client says in Base64; raise ValueError."""
    from base64 import b64decode

    return "" if text == "=" else str(b64decode(text, validate=True), "utf-8")


def keep_little_memory() -> None:
    """Let glibc give back what big messages took; it keeps 64 MB per thread else."""
    from ctypes import CDLL

    with suppress(AttributeError, OSError):  # another libc
        CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, fixed


class Relay:
    """What the sessions share, and the loop that accepts them."""

    TICK = 0.5  # seconds between two looks at what is due

    def __init__(self, options: argparse.Namespace, files: Files, lines: Lines,
                 certificate: Optional[Certificate]) -> None:
        from threading import Condition, Lock

        self.options, self.lines, self.certificate = options, lines, certificate
        self.auth = options.auth in ("pass", "own")
        self._base = base_url(options.server)
        self.template = tag_template(self._base, options.path)
        self.token = new_ids(os.urandom(32))[0]
        self.maildrops = {domain: Maildrop(path, options.quota)
                          for domain, path in options.local}
        self.keep = Maildrop(options.keep, 1 << 62) if options.keep else None
        self._files, self._links, self._writing = files, Links(files.links), Lock()
        self._held, self._room = 0, Condition()
        self.sessions: Set[Session] = set()
        smarthost = smarthost_of(options)
        reply = smarthost.open()
        if not reply.is_ok:
            raise TrackerError(f"smarthost {smarthost.host}: {reply}")
        self.extensions = dict(smarthost.extensions)
        smarthost.close()
        ensure_columns(files, Making("", status="sending", columns=TAG_COLUMNS
                                     ).needed())
        self.ledger = Ledger(files.log)
        user, password, _ = smarthost.login
        self.login = f"{user}\0{password()}".encode() if options.auth == "own" else b""
        size = self.extensions.get("size", "")
        self.limit = int(size) if size.isdecimal() and int(size) else DEFAULT_SIZE
        self.limit -= OWN_HEADER
        self.offers = [f"SIZE {self.limit}", "8BITMIME", "PIPELINING",
                       "ENHANCEDSTATUSCODES", *(e for e in ("SMTPUTF8", "DSN")
                                                if e.lower() in self.extensions)]

    def maildrop(self, address: str) -> Any:
        """Return the Maildrop of an address; None for one that is elsewhere."""
        return self.maildrops.get(address.rpartition("@")[2].lower())

    def hrefs(self, tag_id: str, urls: Collection[str]) -> Dict[str, str]:
        """Return what links become in a tag's mail; none changes if that is impossible.
        """
        try:
            with self._writing:
                return hrefs_of(self._links, self._base, self.options.path, tag_id,
                                urls)
        except (TrackerError, OSError) as error:
            self.lines.rarely(f"links stay as they are: {explain(error)}")
            return {}

    def is_ours(self, source: str) -> bool:
        """Tell whether an image in a message is a pixel of ours."""
        return is_pixel(self._base, source) or any(
            any(lines_of_log(self._files.log, b",%b," % tag_id))
            for tag_id in ids_in_path(source.encode("utf-8", "replace")))

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Take some of the memory as soon as there is as much, or all of it."""
        with self._room:
            self._room.wait_for(lambda: not self._held or self._held + size <= HELD)
            self._held += size
        try:
            yield
        finally:
            with self._room:
                self._held -= size
                self._room.notify_all()

    def write(self, how: Callable[..., object], *what: Any) -> None:
        """Write to register and log; one session at a time waits for their locks."""
        with self._writing:
            how(self._files, *what)

    def serve(self, listener: socket.socket, signals: Signals) -> None:
        """Serve until a signal asks to stop; what is under way then gets its time."""
        worker, due = Worker(self._files, 0), 0.0
        awaited: List[Any] = [listener, signals.file]
        worker.start()
        listener.setblocking(False)
        while not signals.stopping:
            ready, _, _ = select.select(awaited, [], [], self.TICK)
            if signals.file in ready:
                signals.obey()
            if listener in ready:
                self._accept(listener)
            if time.monotonic() >= due:
                due = time.monotonic() + self.TICK
                self._tick(worker)
        listener.close()
        deadline = time.monotonic() + DRAIN_MAIL
        while self.sessions and time.monotonic() < deadline:
            for session in list(self.sessions):
                if not session.is_busy:
                    session.expire(0, "421 4.3.2 stopped")
            time.sleep(0.02)
        worker.stop()

    def _tick(self, worker: Worker) -> None:
        for session in list(self.sessions):
            session.expire(time.monotonic())
        for line in worker.news():
            self.lines.rarely(line)
        try:
            if self.certificate:
                self.certificate.renew()
        except TrackerError as error:
            self.lines.rarely(str(error))

    def _accept(self, listener: socket.socket) -> None:
        import socket
        from threading import Thread

        try:
            connection, peer = listener.accept()
            if len(self.sessions) >= MAX_SESSIONS:
                with connection:
                    connection.send(b"421 4.3.2 too many connections\r\n")
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            Thread(target=Session(self, connection, peer[0]).run, daemon=True).start()
        except BlockingIOError:
            pass  # it has gone
        except (OSError, RuntimeError) as error:  # no file or thread to be had
            self.lines.rarely(str(error))
            time.sleep(self.TICK)


# ---------------------------------------------------------------------------
# Eyes: what it comes to, told to people
# ---------------------------------------------------------------------------
# Figures of register and log, with what they cannot tell; a report, a page and notices
# of them, and what is wrong with a set-up. Reads, like dump; what a page or a notice
# has to change goes the way of every command, rows under the lock, lines to the log.


# -- figures: of sent mail, what was opened, and what cannot be known ------------

# Apple Mail fetches ahead, whether or not anybody reads (Mail Privacy Protection).
AHEAD = ("apple-mpp", "apple-mpp-agent")
ASIDE = ("machine", "self", "unknown", "repeat")  # hits that are no opens, and why
_STORY_LINE, _VERDICT_LINE = (re.compile(
    rf"^({_TIME.pattern}),({kinds}),([^,\n]*),\d*,\d*,([^,\n]*),([^,\n]*),(.*)$", re.M)
    for kinds in ("hit|clicked|replied|bounced", "verdict"))
NO_HITS = (0,) * len(ASIDE)
UNSENT = ("queued", "sending", "failed")
STATES = ("opened", "hidden", "no hit")  # of a mail that was sent
Z = 1.9599639845400543  # standard normal quantile of 97.5 %: intervals of 95 %
POWER = 0.8416212335729143  # of 80 %: a difference is told four times in five


class Story(NamedTuple):
    """What the log tells of a tag that its row does not; times are since 1970."""

    first: float = 0.0       # open, click or answer; 0 for none
    clicked: float = 0.0     # by a person; 0 for never
    by_click: bool = False   # one of its opens is a click
    is_ahead: bool = False   # it was fetched ahead
    replied: bool = False
    bounced: bool = False
    aside: Tuple[int, ...] = NO_HITS  # hits that are no opens, as in ASIDE


NO_STORY = Story()


class Stories:
    """Follow a log: what it tells of each tag, and of each hour.

    hours are as in 2026-11-20T20, each with its hits that are no opens, and its opens.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._files: List[Tuple[str, Stamp]] = []
        self._begin()

    def _begin(self) -> None:
        """Know nothing yet but which hits were judged anew."""
        self.hours: Dict[str, List[int]] = {}
        # Apart, by id: most tags have a first open and nothing else, a million of them.
        self._first: Dict[str, float] = {}
        self._clicked: Dict[str, float] = {}
        self._aside: Dict[str, Tuple[int, ...]] = {}
        self._by_click: Set[str] = set()
        self._ahead: Set[str] = set()
        self._told: Dict[str, Set[str]] = {"replied": set(), "bounced": set()}
        self._places: Dict[int, Place] = {}  # of each file, by inode
        self._verdicts: Dict[Tuple[str, ...], Tuple[str, str]] = {}
        for line in lines_of_log(self._path, b",verdict,"):
            for when, _, tag_id, verdict, reason, client in _VERDICT_LINE.findall(
                    line.decode("utf-8", "replace")):
                self._verdicts[when, tag_id, client] = verdict, reason

    def look(self) -> bool:
        """Take in what is new in the log; tell whether there was anything.

        A verdict on an earlier hit, a tag forgotten, or a file that is no longer what
        it was, makes it begin again.
        """
        files = [(name, stamp_of(name)) for name in log_files(self._path)]
        if files == self._files:
            return False
        self._files = files
        if not self._places or not self._read_on((b",verdict,", b",forget,")):
            self._begin()
            self._read_on()
        return True

    def _read_on(self, halt: Sequence[bytes] = ()) -> bool:
        """Read what is new; return False at certain words, or at a file that changed.
        """
        if not self._places.keys() <= {stamp.inode for _, stamp in self._files}:
            return False
        for name, _ in self._files:
            with suppress(FileNotFoundError), _opened(name) as file:  # just rotated
                inode = os.fstat(file).st_ino
                place = self._places.get(inode, Place(inode))
                if place_at(file, place.offset) != place:
                    return False
                end = place.offset
                for block in iter(lambda: os.pread(file, 1 << 18, end), b""):
                    block = block[:block.rfind(b"\n") + 1] or block
                    if any(word in block for word in halt):
                        return False
                    if block[-1:] != b"\n" and len(block) < 1 << 18:
                        break  # a line that is still being written
                    for line in _STORY_LINE.findall(block.decode("utf-8", "replace")):
                        self._take(line)
                    end += len(block)
                self._places[inode] = place_at(file, end)
        return True

    def _take(self, line: Sequence[str]) -> None:
        """Take in the cells of a line that tells something."""
        when, kind, tag_id, verdict, reason, client = line
        if self._verdicts:
            verdict, reason = self._verdicts.pop(  # of its like only the first has one
                (when, tag_id, client), (verdict, reason))
        by_person = verdict in OPENS
        is_new = by_person and reason not in NO_OPENS  # as is_open
        if kind == "hit":
            self.hours.setdefault(when[:13], [0, 0])[is_new] += 1
            by_person = is_new
            if not is_new:
                self._set_aside(tag_id, verdict, reason)
        elif kind == "clicked" and by_person:
            self._clicked[tag_id] = self._clicked.get(tag_id) or seconds(when)
            if is_new:
                self._by_click.add(tag_id)
        elif kind in self._told:
            self._told[kind].add(tag_id)
            by_person = kind == "replied"
        if by_person and tag_id not in self._first:
            self._first[tag_id] = seconds(when)

    def _set_aside(self, tag_id: str, verdict: str, reason: str) -> None:
        """Take in a hit that is no open."""
        why = "repeat" if verdict in OPENS else verdict
        self._aside[tag_id] = _one_more(self._aside.get(tag_id, NO_HITS), why)
        if reason in AHEAD:
            self._ahead.add(tag_id)

    def of(self, tag_id: str) -> Story:
        """Return what the log tells of a tag."""
        return Story(self._first.get(tag_id, 0.0), self._clicked.get(tag_id, 0.0),
                     tag_id in self._by_click, tag_id in self._ahead,
                     tag_id in self._told["replied"], tag_id in self._told["bounced"],
                     self._aside.get(tag_id, NO_HITS))


@lru_cache(maxsize=4096)
def _one_more(counts: Tuple[int, ...], why: str) -> Tuple[int, ...]:
    """Return the counts of hits set aside with one more; few differ, so one of each."""
    return tuple(n + (why == each) for n, each in zip(counts, ASIDE))


class Mail(NamedTuple):
    """What the figures need of a row."""

    hits: int
    opens: int
    last_open: str
    status: str
    since: float  # when it was sent, as far as is known when its tag was made; or NaN

    def state(self, story: Story) -> str:
        """Return one of STATES; "bounced" or "unsent" for what nobody got."""
        if self.status == "bounced" or story.bounced:
            return "bounced"
        if self.opens or self.status == "replied" or story.first:
            return "opened"
        return "unsent" if self.status in UNSENT else \
            "hidden" if story.is_ahead else "no hit"


def mail_of(columns: Sequence[str]) -> Callable[[Row], Mail]:
    """Return what makes a Mail of a row with some columns."""
    hits, opens, last_open, created = map(
        columns.index, ("hits", "opens", "last_open", "created"))
    status, sent = cell_of(columns, "status"), cell_of(columns, "sent")

    def mail(row: Row) -> Mail:
        return Mail(int(row[hits]), int(row[opens]), row[last_open], status(row),
                    seconds(sent(row) or row[created]))
    return mail


class Figures:
    """What some tags come to, each added once.

    sent = opened + hidden + no hit; hits + opens by click = opens + set aside.
    """

    def __init__(self) -> None:
        from array import array

        self.states = dict.fromkeys((*STATES, "bounced", "unsent"), 0)
        self.hits = self.opens = self.by_click = self.clicked = self.replied = 0
        self.aside = [0] * len(ASIDE)
        self.last_open = ""
        self._after = array("d")    # seconds until the first open of what was opened
        self._waiting = array("d")  # and until now of what was not
        self.firsts = array("d")    # when those were

    def add(self, mail: Mail, story: Story, now: float) -> str:
        """Count a tag, and return its state."""
        state = mail.state(story)
        self.states[state] += 1
        self.hits, self.opens = self.hits + mail.hits, self.opens + mail.opens
        self.by_click += story.by_click
        if story.aside is not NO_HITS:
            self.aside = [a + b for a, b in zip(self.aside, story.aside)]
        if state in STATES:
            self.clicked += story.clicked > 0
            self.replied += story.replied or mail.status == "replied"
        if state == "opened":
            # Without the log's word the last open stands for it: late, never early.
            first = story.first or seconds(mail.last_open)
            self.last_open = max(self.last_open, mail.last_open)
            if first > 0:  # not NaN
                self.firsts.append(first)
            if first > 0 and mail.since == mail.since:
                self._after.append(max(0.0, first - mail.since))
        elif state == "no hit" and mail.since == mail.since:
            self._waiting.append(max(0.0, now - mail.since))
        return state

    @property
    def sent(self) -> int:
        """How many were sent, and did not bounce."""
        return sum(self.states[state] for state in STATES)

    @property
    def known(self) -> int:
        """How many of them do not hide whether they were opened."""
        return self.sent - self.states["hidden"]

    @property
    def set_aside(self) -> int:
        """How many hits are no opens."""
        return self.hits + self.by_click - self.opens

    def rates(self) -> Tuple[float, float, float, float, float]:
        """Return what share was opened at least, by estimate, and at most.

        In the middle stand the estimate and its interval; it supposes that those whose
        opens are hidden read as the others do. Of none all is open: 0 to 1.
        """
        opened, hidden, *_ = self.states.values()
        sent, known = self.sent, self.known
        return (opened / sent if sent else 0.0, opened / known if known else 0.0,
                *wilson(opened, known), (opened + hidden) / sent if sent else 1.0)

    def curve(self) -> Iterator[Tuple[float, float]]:
        """Yield what share had opened after how many seconds; hidden ones left out."""
        return kaplan_meier(self._after, self._waiting)

    def half_time(self) -> Optional[float]:
        """Return after how many seconds half had opened; None if not yet."""
        return next((when for when, share in self.curve() if share > 0.5 - 1e-9), None)

    def as_json(self) -> Dict[str, Any]:
        """Return the figures by name; shares as fractions, None for what is unknown."""
        floor, estimate, low, high, ceiling = self.rates()
        sent, known = self.sent, self.known
        opened, hidden, no_hit, bounced, unsent = self.states.values()
        return {
            "sent": sent, "opened": opened, "cannot_be_known": hidden,
            "no_hit": no_hit, "clicked": self.clicked, "replied": self.replied,
            "bounced": bounced, "not_sent": unsent,
            "rate": {"at_least": floor if sent else None,
                     "estimated": estimate if known else None, "low": low, "high": high,
                     "at_most": ceiling if sent else None},
            "half_opened_after": self.half_time(),
            "last_open": self.last_open or None,
            "hits": self.hits, "opens": self.opens, "opens_by_click": self.by_click,
            "set_aside": self.set_aside, **dict(zip(
                ("machines", "own", "unclear", "repeats"), self.aside))}


def wilson(count: int, total: int) -> Tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927); of none, 0 to 1."""
    if not total:
        return 0.0, 1.0
    share, extra = count / total, Z * Z / total
    middle = (share + extra / 2) / (1 + extra)
    half = (extra * (share * (1 - share) + extra / 4)) ** 0.5 / (1 + extra)
    return (middle - half if count else 0.0), (middle + half if count < total else 1.0)


def newcombe(count: int, total: int, other: int, others: int
             ) -> Tuple[float, float, float]:
    """Return the difference of two shares, and its 95 % interval.

    Newcombe, 1998, method 10. Of none the interval is -1 to 1.
    """
    if not total or not others:
        return 0.0, -1.0, 1.0
    a, b = count / total, other / others
    (low_a, high_a), (low_b, high_b) = wilson(count, total), wilson(other, others)
    return (a - b, a - b - ((a - low_a) ** 2 + (high_b - b) ** 2) ** 0.5,
            a - b + ((high_a - a) ** 2 + (b - low_b) ** 2) ** 0.5)


def enough(a: float, b: float) -> Optional[int]:
    """Return how many of each tell such shares apart, four times in five (Fleiss)."""
    if a == b:
        return None
    mean = (a + b) / 2
    root = Z * (2 * mean * (1 - mean)) ** 0.5 \
        + POWER * (a * (1 - a) + b * (1 - b)) ** 0.5
    return int((root / (a - b)) ** 2) + 1


def kaplan_meier(after: Sequence[float], waiting: Sequence[float]
                 ) -> Iterator[Tuple[float, float]]:
    """Yield times, and what share of all had opened by then.

    after are the times of those that were opened, waiting how long the others have not
    been by now (Kaplan and Meier, 1958).
    """
    open_at, unopened, left = sorted(after), sorted(waiting), 1.0
    total, opened = len(open_at) + len(unopened), 0
    for when, group in groupby(open_at):
        count = sum(1 for _ in group)
        left *= 1 - count / (total - opened - bisect_left(unopened, when))
        opened += count
        yield when, 1 - left


def score(opened: int, sent: int, usual: float, days: float) -> float:
    """Rate a recipient, 0 to 100, for sorting: how much is opened, and how lately.

    usual is everybody's share opened: it weighs as three mails do.
    """
    lately: float = 0.5 ** (days / 30)
    return 75 * (opened + 3 * usual) / (sent + 3) + 25 * lately


# -- in words, and as HTML and SVG, without a script or a style attribute ------

FEW = 5  # mails; of fewer a rate says nothing, only its interval does
TIME_AXIS = '<div class="axis time"><span>' + "</span><span>".join(  # placed by STYLE
    ("1 min", "10 min", "1 h", "6 h", "1 d", "7 d", "30 d")) + "</span></div>"
CAUTION = ("What no hit means: nobody read it, or images were off. What an open cannot "
           "tell: who looked. The estimate supposes that those whose opens Apple hides "
           "read as the others do; its interval covers chance, not that.")
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1d2430;--dim:#5b6472;--line:#d9dee6;
--card:#f6f7f9;--link:#1a56b0;--opened:#2f6fd0;--hidden:#c08a2e;--none:#c3cad4}
@media(prefers-color-scheme:dark){:root{--bg:#14171c;--fg:#e4e8ee;--dim:#9aa4b2;
--line:#2e3540;--card:#1c2128;--link:#7fb0ff;--opened:#5b95ee;--hidden:#d9a64a;
--none:#4a5361}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1rem 1.25rem 3rem;background:var(--bg);
color:var(--fg);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.35rem;margin:.4rem 0}h2{font-size:1.05rem;margin:1.8rem 0 .5rem}
p{margin:.4rem 0}a{color:var(--link)}:focus-visible{outline:2px solid var(--link);
outline-offset:2px}.dim,caption,th,dt,figcaption,.axis{color:var(--dim)}
.note,caption,dt,figcaption,.axis{font-size:.83rem}
dl{display:grid;grid-template-columns:repeat(4,1fr);gap:.6rem;margin:1rem 0}
dl div{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:.6rem .8rem}dd{margin:0}.value{font-size:1.35rem;font-weight:600}
figure{margin:1rem 0}svg{display:block;width:100%}.bar{height:14px}.chart{height:90px}
.opened{fill:var(--opened)}.hidden{fill:var(--hidden)}.none{fill:var(--none)}
.line{fill:none;stroke:var(--opened);stroke-width:2;vector-effect:non-scaling-stroke}
.half{stroke:var(--dim);stroke-dasharray:4;vector-effect:non-scaling-stroke}
.key{display:inline-block;width:.75rem;height:.75rem;margin:0 .35rem -.05rem 0}
figcaption span{margin-right:1rem;white-space:nowrap}
.axis{display:flex;justify-content:space-between}.time{display:block;position:relative;
height:1.3rem}.time span{position:absolute;
white-space:nowrap;transform:translateX(-50%)}
.time :nth-child(1){transform:none}.time :nth-child(2){left:21.6%}
.time :nth-child(3){left:38.4%}.time :nth-child(4){left:55.1%}
.time :nth-child(5){left:68.1%}.time :nth-child(6){left:86.4%}
.time :nth-child(7){left:100%;transform:translateX(-100%)}
table{border-collapse:collapse;width:100%}caption{text-align:left;padding:.3rem 0}
th,td{text-align:left;padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--line);
vertical-align:top}th{font-weight:500}tbody th{color:inherit;overflow-wrap:anywhere;
min-width:8rem}.scroll{overflow-x:auto}
.n{text-align:right;font-variant-numeric:tabular-nums}
header{display:flex;gap:1rem;justify-content:space-between;padding-bottom:.6rem;
margin-bottom:.8rem;border-bottom:1px solid var(--line)}header a{color:inherit;
font-weight:600;text-decoration:none}footer{margin-top:2rem}
form{display:flex;flex-wrap:wrap;gap:.6rem;align-items:end;margin:.8rem 0}
form a{align-self:center}label{flex:1 1 12rem;color:var(--dim);font-size:.83rem}
input,select,textarea,button{font:inherit;color:var(--fg);background:var(--bg);
padding:.35rem .6rem;border:1px solid var(--dim);border-radius:5px}
input,select,textarea{display:block;width:100%;min-height:2.4rem}
summary{color:var(--link);cursor:pointer}pre{background:var(--card);padding:.6rem .8rem;
white-space:pre-wrap}.state.opened{color:var(--opened)}h1,p,.text{overflow-wrap:anywhere}
[data-live] td:not(.text){white-space:nowrap}
@media(max-width:40rem){dl{grid-template-columns:1fr 1fr}.wide{display:none}
[data-live] td:not(.text):not(.n){white-space:normal}}
@media print{body{max-width:none;padding:0}dl div,figure,tr{break-inside:avoid}}
"""


def percent(share: float) -> str:
    """Return a share in percent; a small one with a decimal, so that it is not 0."""
    return f"{100 * share:.{int(0 < share < 0.01)}f}"


def rate_words(figures: Figures) -> str:
    """Return what share was opened, in words."""
    floor, estimate, low, high, ceiling = figures.rates()
    between = f"{percent(low)} to {percent(high)}"
    if not figures.sent:
        return "nothing was sent"
    if not figures.known:
        return "cannot be known: Apple fetched all of it ahead"
    if figures.sent < FEW:
        return f"{between} % estimated, of {figures.sent} only"
    return f"{percent(floor)} % at least, {percent(estimate)} % estimated ({between})" \
        f", {percent(ceiling)} % at most"


def cards(figures: Figures) -> Iterator[Tuple[str, str, str]]:
    """Yield the eight figures: what each is, its value, and a remark on it."""
    floor, estimate, low, high, ceiling = figures.rates()
    opened, hidden, no_hit, bounced, unsent = figures.states.values()
    is_many = figures.sent >= FEW
    half = figures.half_time()

    def listed(*counts: Tuple[int, str]) -> str:
        return ", ".join(f"{count:,} {word}" for count, word in counts if count)

    yield "Sent", f"{figures.sent:,}", listed(
        (bounced, "bounced"), (unsent, "not sent"))
    yield "Opened, at least", f"{opened:,}", f"{percent(floor)} % of sent"
    yield ("Open rate, estimated",
           f"{percent(estimate)} %" if figures.known and is_many else "-",
           f"95 %: {percent(low)} to {percent(high)} %" + f"; at most "
           f"{percent(ceiling)} %" * is_many if figures.known else "unknown")
    yield "Cannot be known", f"{hidden:,}", "Apple fetches ahead"
    yield "No hit by a person", f"{no_hit:,}", "or images are off"
    yield ("Half had opened by", "not yet" if half is None else lasting(half),
           "of those that can be known" if hidden else "of all sent")
    yield "Clicked", f"{figures.clicked:,}", listed((figures.replied, "replied"))
    yield "Hits set aside", f"{figures.set_aside:,}", listed(*zip(
        figures.aside, ("by machines", "your own", "unclear", "repeated")))


def escaped(text: str) -> str:
    """Return text as it can stand in HTML, in attributes as well."""
    from html import escape

    return escape(clean(text))


def page_html(title: str, body: str, head: str = "") -> str:
    """Return a whole page; body and head are HTML."""
    return (f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n{head}"
            f"<body>\n{body}</body>\n</html>\n")


def cards_html(figures: Figures) -> str:
    """Return the eight figures."""
    return "<dl>\n" + "".join(
        f'<div><dt>{what}</dt><dd class="value">{value}</dd>'
        f'<dd class="note dim">{escaped(why)}</dd></div>\n'
        for what, value, why in cards(figures)) + "</dl>\n"


def figure_html(shape: str, height: int, drawing: str, about: str, caption: str = "",
                below: str = "") -> str:
    """Return a chart that is 1,000 wide; about says what is to be seen there."""
    return (f'<figure>{f"<figcaption>{caption}</figcaption>" * bool(caption)}'
            f'<svg class="{shape}" viewBox="0 0 1000 {height}" role="img" '
            f'preserveAspectRatio="none" aria-label="{escaped(about)}">{drawing}</svg>'
            f"{below}</figure>\n")


def share_chart(figures: Figures) -> str:
    """Return one bar of what was opened, what cannot be known, and what was not hit."""
    at, drawing, legend = 0.0, "", []
    for kind, words, count in zip(
            ("opened", "hidden", "none"),
            ("opened", "cannot be known", "no hit by a person"),
            figures.states.values()):
        width = 1000 * count / (figures.sent or 1)
        box = f'<rect class="{kind}" x="%g" width="%g" height="14"/>'
        drawing += box % (round(at, 1), round(width, 1))
        legend.append((f'<svg class="key" viewBox="0 0 14 14">{box % (0, 14)}</svg>',
                       f"{words} {count:,}"))
        at += width
    return figure_html("bar", 14, drawing, "; ".join(words for _, words in legend),
                       below="<figcaption>" + "".join(
                           f"<span>{key}{words}</span>" for key, words in legend)
                       + "</figcaption>")


def columns_chart(columns: Sequence[Tuple[str, int, int]], caption: str,
                  other: str = "") -> str:
    """Return columns with labels: how many opens each, and how many more on top."""
    most = max((a + b for _, a, b in columns), default=0) or 1
    step, drawing = 1000 / max(len(columns), 1), ""
    for n, (label, opens, others) in enumerate(columns):
        title = f"{label}: {plural(opens, 'open')}" \
            + f", {others} {other}" * bool(other)
        drawing += f"<g><title>{escaped(title)}</title>"
        for kind, low, high in ("none", opens, opens + others), ("opened", 0, opens):
            drawing += (f'<rect class="{kind}" x="{n * step + step / 10:.1f}" '
                        f'width="{step * 0.8:.1f}" y="{90 - 90 * high / most:.1f}" '
                        f'height="{90 * (high - low) / most:.1f}"/>') * (high > low)
        drawing += "</g>"
    shown = [label for label, _, _ in columns]
    shown = shown if len(shown) <= 7 else [shown[0], shown[len(shown) // 2], shown[-1]]
    return figure_html(
        "chart", 90, drawing, f"{caption}; the highest column stands for {most}",
        escaped(caption), '<div class="axis">' + "".join(
            f"<span>{escaped(label)}</span>" for label in shown) + "</div>")


def time_place(after: float) -> float:
    """Return where a time after sending stands from 1 min, 0, to 30 d, 1."""
    from math import log

    return min(1.0, max(0.0, log(max(after, 1) / 60) / log(43200)))


def curve_chart(figures: Figures) -> str:
    """Return what share of the mails had been opened by when, on an axis of time."""
    path, drawn, share = "M0 90", -1.0, 0.0
    for after, share in figures.curve():
        x = round(1000 * time_place(after), 1)
        path += f"H{x:g}" * (x > drawn) + f"V{90 - 90 * share:.1f}"
        drawn = x
    return figure_html(
        "chart", 90, '<line class="half" x1="0" x2="1000" y1="45" y2="45"/>'
        f'<path class="line" d="{path}H1000"/>',
        f"Share opened after a time; {percent(share)} % in the end, dashed: half",
        "Share opened by a time after sending (dashed: half)", TIME_AXIS)


def strip_chart(dots: Iterable[Tuple[float, str, str]]) -> str:
    """Return what happened to one mail, on an axis of time.

    A dot has its seconds after sending, its class and its words.
    """
    marks = "".join(
        f'<g><title>{escaped(words)}</title><rect class="{kind}" '
        f'x="{990 * time_place(after):.1f}" y="3" width="6" height="24"/></g>'
        for after, kind, words in dots)
    return figure_html("strip", 30, '<line class="half" x1="0" x2="1000" y1="15" '
                       f'y2="15"/>{marks}', "What happened when after sending",
                       below=TIME_AXIS)


# -- report: the figures by groups, as text and as a page ------------------------

FUNNEL = ("clicked", "replied", "bounced")
COUNTED = ("sent", "opened", *FUNNEL)  # columns of numbers, which stand on the right


class Report:
    """The figures of the mails that are wanted, and of groups of them."""

    TIMES = {"day": "%Y-%m-%d", "hour": "%H", "weekday": "%u %a"}  # of sending

    def __init__(self, files: Files, options: argparse.Namespace) -> None:
        self.by, self.total = options.by, Figures()
        self.groups: Dict[str, Figures] = {}
        self.clock = time.localtime if options.local else time.gmtime
        self.zone = "/".join(time.tzname) if options.local else "UTC"
        stories, now = Stories(files.log), time.time()
        stories.look()
        columns, rows = register_rows(files)
        mail_in, campaign = mail_of(columns), cell_of(columns, "campaign")
        tag_id, group = itemgetter(columns.index("id")), self._grouping(columns)
        since = seconds(options.since or "")
        for row in progress(rows, "reading rows"):
            mail = mail_in(row)
            if (not options.since or mail.since >= since) \
                    and options.campaign in ("", campaign(row)):
                story = stories.of(tag_id(row))
                self.total.add(mail, story, now)
                if self.by:
                    name = group(row, mail) or "(none)"
                    if name not in self.groups:
                        self.groups[name] = Figures()
                    self.groups[name].add(mail, story, now)

    def _grouping(self, columns: Sequence[str]) -> Callable[[Row, Mail], str]:
        """Return what names the group of a row; raise TrackerError."""
        if self.by in columns or not self.by:
            cell = cell_of(columns, self.by)
            read = str if self.by in TEXTS else text_in  # those are read already
            return lambda row, mail: read(cell(row))
        if self.by not in self.TIMES:
            raise TrackerError(f"no column {self.by}; there are "
                               f"{', '.join([*columns, *self.TIMES])}")
        return lambda row, mail: time.strftime(
            self.TIMES[self.by], self.clock(mail.since)) if mail.since > 0 else ""

    def in_order(self) -> List[Tuple[str, Figures]]:
        """Return the groups by time, recipients by their score, others by size."""
        def key(group: Tuple[str, Figures]) -> Tuple[float, str]:
            name, figures = group
            if self.by == "email":
                rating = self.score(figures)
                return 1.0 if rating is None else -rating, name
            return 0 if self.by in self.TIMES else -figures.sent, name
        return sorted(self.groups.items(), key=key)

    def score(self, figures: Figures) -> Optional[float]:
        """Rate a recipient from 0 to 100; None where nothing can be known."""
        days = (time.time() - seconds(figures.last_open or utc_text(0))) / DAY
        return score(figures.states["opened"], figures.known, self.total.rates()[1],
                     days) if figures.known else None

    def heading(self) -> Tuple[str, ...]:
        """Return what stands over the cells of a group."""
        if self.by == "email":
            return "email", "sent", "opened", "clicked", "replied", "last open"
        return (self.by, "sent", "opened at least", "estimated", "half by",
                *FUNNEL * (self.by not in self.TIMES))

    def cells(self, name: str, figures: Figures) -> List[str]:
        """Return what is shown of a group, as texts."""
        floor, estimate, low, high, _ = figures.rates()
        sent, half = figures.sent, figures.half_time()
        if self.by == "email":
            return [name, str(sent), str(figures.states["opened"]),
                    str(figures.clicked), str(figures.replied),
                    figures.last_open[:16].replace("T", " ") or "-"]
        shown = f"{percent(estimate)} % ({percent(low)} to {percent(high)})" \
            if sent >= FEW and figures.known else f"{percent(low)} to {percent(high)} %"
        funnel = figures.clicked, figures.replied, figures.states["bounced"]
        return [name, str(sent), f"{percent(floor):>3} %", shown,
                "-" if half is None else lasting(half),
                *map(str, funnel * (self.by not in self.TIMES))]

    def chosen(self, names: Sequence[str]) -> List[Tuple[str, Figures]]:
        """Return two groups by their names; raise TrackerError for one of none."""
        for name in names:
            if name not in self.groups:
                known = ", ".join(each for each, _ in self.in_order()[:20])
                raise TrackerError(f"no {self.by} {clean(name)}; there are "
                                   f"{clean(known) or 'none'}")
        return [(name, self.groups[name]) for name in names]


class Comparison(NamedTuple):
    """Whether two groups differ in a share, as far as can be told."""

    what: str
    shares: Tuple[float, float]
    totals: Tuple[int, int]
    difference: float
    low: float
    high: float
    is_told: bool  # chance alone would hardly make such a difference
    more_needed: Optional[int]  # in each group, to tell one as large; None: unknown

    def lines(self, a: str, b: str) -> Iterator[str]:
        """Yield in words what can be told of two groups with names."""
        shares = [f"{name} {percent(share)} % of {total:,}" for name, share, total
                  in zip((a, b), self.shares, self.totals)]
        yield f"{self.what}: {', '.join(shares)}"
        winner = a if self.difference > 0 else b
        yield f"  difference {100 * self.difference:+.0f} points " \
            f"({100 * self.low:+.0f} to {100 * self.high:+.0f}): " + (
                f"{winner} has more" if self.is_told else "no difference can be told")
        if self.more_needed:
            yield f"  one as large would be told with about {self.more_needed:,} " \
                "more each"


def compared(groups: Sequence[Tuple[str, Figures]]) -> Iterator[Comparison]:
    """Yield what can be told of two groups: by clicks first, then by opens."""
    (_, a), (_, b) = groups
    for what, counts in (
            ("clicked", (a.clicked, a.sent, b.clicked, b.sent)),
            ("opened, estimated", (a.states["opened"], a.known,
                                   b.states["opened"], b.known))):
        count, total, other, others = counts
        shares = count / max(total, 1), other / max(others, 1)
        difference, low, high = newcombe(*counts)
        is_told, fewest = not low <= 0 <= high, min(total, others)
        needed = None if is_told or not fewest else enough(*shares)
        yield Comparison(what, shares, (total, others), difference, low, high, is_told,
                         None if needed is None else max(1, needed - fewest))


def report_lines(report: Report, names: Sequence[str], screen: int) -> Iterator[str]:
    """Yield a report as text; names are those of two groups to compare."""
    def cells(name: str, figures: Figures) -> List[str]:
        texts = [*map(clean, report.cells(name, figures))]
        if report.by != "email":
            texts[2] += " " + state_bar(figures, 10)
        return texts

    if names:
        for comparison in compared(report.chosen(names)):
            yield from map(clean, comparison.lines(*names))
        yield "whoever looks again and again until a difference shows will find one"
    elif report.by:
        yield from table_lines([*report.heading()], starmap(cells, report.in_order()),
                               0, screen, COUNTED)
        yield f"\nall: {rate_words(report.total)}"
    else:
        yield rate_words(report.total)
        yield f"{state_bar(report.total, min(screen or 78, 78))}\n"
        for what, value, why in cards(report.total):
            yield f"{what:21}{value:>9}  {why}".rstrip()


def state_bar(figures: Figures, width: int) -> str:
    """Return one line of what was opened, cannot be known, and was not hit."""
    ends = [round(width * sum(list(figures.states.values())[:n]) / (figures.sent or 1))
            for n in range(4)]
    return "".join(letter * (end - start) for letter, start, end in zip(
        "█▒░", ends, ends[1:]))


def group_values(report: Report, names: Sequence[str]) -> Iterator[Dict[str, Any]]:
    """Yield groups for JSON; there may be as many as tags."""
    for name, figures in report.chosen(names) if names else report.in_order():
        yield {"group": name, **figures.as_json(), **(
            {"score": report.score(figures)} if report.by == "email" else {})}


def report_values(report: Report, names: Sequence[str]) -> Dict[str, Any]:
    """Return a report for JSON; shares are fractions, None is unknown."""
    values: Dict[str, Any] = {"all": report.total.as_json()}
    if report.by:
        values["groups"] = [*group_values(report, names)]
    if names:
        values["compared"] = [
            each._asdict() for each in compared(report.chosen(names))]
    return values


def report_rows(report: Report, names: Sequence[str]) -> Iterator[Row]:
    """Yield a report as rows of a CSV file, the heading first."""
    groups = group_values(report, names) if report.by \
        else iter([report.total.as_json()])
    none = {"group": "", **Figures().as_json()}
    for number, group in enumerate(chain([next(groups, none)], groups)):
        group.update((f"rate_{name}", rate) for name, rate in group.pop("rate").items())
        if not number:
            yield [*group]
        if group is not none:
            yield ["" if value is None else str(value) for value in group.values()]


def report_page(report: Report, names: Sequence[str]) -> str:
    """Return a report as one page that asks nobody for anything."""
    total, zone = report.total, report.zone
    body = f"<h1>Mail report</h1>\n<p>{rate_words(total)}</p>\n" + share_chart(total) \
        + cards_html(total) + curve_chart(total)
    times = [first for first in total.firsts if first > 0]
    firsts, latest = [*map(report.clock, times)], max(times, default=0.0)
    # Two days have every hour, also where the clock is set forward.
    for by, step, count in ("day", DAY, 30), ("hour", 3600, 48), ("weekday", DAY, 7):
        form = report.TIMES[by]
        labels = sorted({time.strftime(form, report.clock(latest - step * n))
                         for n in range(count)}) if firsts else []
        counts = Counter(time.strftime(form, first) for first in firsts)
        body += columns_chart([(label, counts[label], 0) for label in labels],
                              f"First opens by {by} ({zone})")
    if report.by:
        by = f"By {escaped(report.by)}"
        body += f'<div class="scroll" tabindex="0" role="region" aria-label="{by}">' \
            + table_html(by, {escaped(title): "n" * (title in COUNTED)
                              for title in report.heading()}, (
                map(escaped, report.cells(*group)) for group in report.in_order())
            ) + "</div>\n"
    if names:
        body += "<h2>Compared</h2>\n" + "".join(
            f"<p>{escaped(line)}</p>\n" for line in report_lines(report, names, 0))
    body += f'<p class="note dim">{CAUTION} Opens follow sending: no best hour to ' \
            f"send can be read off here. Made {utc_text(time.time())}.</p>\n"
    return page_html("Mail report", body)


def table_html(caption: str, columns: Mapping[str, str], rows: Iterable[Iterable[str]]
               ) -> str:
    """Return a table of HTML; columns are titles and their classes.

    The first cell of a row is what it tells of.
    """
    kinds = [f' class="{kind}"' * bool(kind) for kind in columns.values()]

    def line(cells: Iterable[str]) -> str:
        first, *rest = map("{}>{}".format, kinds, cells)
        return f'<tr><th scope="row"{first}</th>' + "".join(
            f"<td{cell}</td>" for cell in rest) + "</tr>\n"

    titles = "".join(f'<th scope="col"{title}</th>'
                     for title in map("{}>{}".format, kinds, columns))
    return (f"<table><caption>{caption}</caption>\n<thead><tr>{titles}</tr></thead>\n"
            f"<tbody>\n{''.join(map(line, rows))}</tbody></table>\n")


# -- dashboard: a page to look at, and its API -----------------------------------

DASHBOARD_PORT = 56790
LOGIN_SECONDS = 600.0          # in which a link to log in must be used
SESSION_SECONDS = 30 * 86400.0
NEVER = 9999999999.0           # when keys of the API expire
MOST_HEAD = 16_000             # bytes; the cookies of all ports of this machine come
MOST_BODY = 45_000
REREAD_SECONDS = 2.0           # at least from one reading of the register to the next,
REREAD_SHARE = 20              # and so many times the CPU seconds that it takes
TOGETHER = 256                 # rows in one string: a million take 80 MB, not 500
LOG_BLOCK = 4 << 20
_ROW_END, _CELL_END = "\x1e", "\x1f"


class Keys:
    """The dashboard's secret, and the tokens that are signed with it.

    Of who is logged in nothing else is kept: delete the file, and nobody is.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def _secret(self) -> bytes:
        with suppress(FileExistsError), open(
                self._path, "xb", opener=partial(os.open, mode=0o600)) as out:
            out.write(os.urandom(32).hex().encode())
        with _opened(self._path) as file:
            secret = os.read(file, 64)
        if len(secret) < 64:
            raise TrackerError(f"{self._path} is no key; delete it")
        return secret

    def token(self, purpose: str, until: float) -> str:
        """Return what lets its bearer do something until then."""
        import hmac

        text = f"{purpose}.{until:.0f}"
        digest = hmac.new(self._secret(), text.encode(), "sha256").hexdigest()
        return f"{until:.0f}.{digest}"

    def link(self, url: str) -> str:
        """Return a link that lets its reader in, for some minutes."""
        return f"{url}login?token={self.token('login', time.time() + LOGIN_SECONDS)}"

    def allows(self, token: str, purpose: str) -> bool:
        """Tell whether a token is for a purpose, and not expired."""
        from hmac import compare_digest

        return bool(re.fullmatch("[1-9][0-9]{9}[.][0-9a-f]{64}", token)
                    and int(token[:10]) > time.time()
                    and compare_digest(token, self.token(purpose, int(token[:10]))))


class Problem(Exception):
    """What is wrong with a request: a status, words for who sent it, headers."""


class Ask(NamedTuple):
    """A request to the dashboard."""

    method: str
    path: str
    query: Sequence[Tuple[str, str]]
    headers: Mapping[str, str]  # names in small letters
    body: str


def read_ask(received: bytes) -> Optional[Ask]:
    """Return a request if all of it is there, else None; raise Problem (RFC 9112)."""
    from urllib.parse import parse_qsl

    head, end, body = received.partition(b"\r\n\r\n")
    if len(head) > MOST_HEAD:
        raise Problem(431)
    if not end:
        return None
    found = re.fullmatch(rb"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.[01]\r\n(%b)"
                         % _HEADERS.pattern, head + end)
    if not found:
        raise Problem(400)
    method, target, lines = (part.decode("latin-1") for part in found.groups())
    headers: Dict[str, str] = {}
    for name, text in re.findall(r"([^:\n]+):([^\r]*)\r\n", lines):
        key, text = name.lower(), text.strip(" \t")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not re.fullmatch("[0-9]{1,9}", length):
        raise Problem(400)
    if int(length) > MOST_BODY:
        raise Problem(413)
    path, _, query = target.partition("?")
    return Ask(method, path, parse_qsl(query, True), headers, body[:int(length)].decode(
        "utf-8", "replace")) if len(body) >= int(length) else None


class View:
    """The tags as they were at one time, those with the newest activity first.

    A row is a piece of text, many of them in one string; by number stand its state and
    when it was sent.
    """

    def __init__(self, columns: List[str], rows: Iterator[Row], stories: Stories
                 ) -> None:
        from array import array

        self.began, self.now, self.problem = time.monotonic(), time.time(), ""
        self.stamps: Sequence[Stamp] = ()
        self.columns, self.stories = list(map(cell_text, columns)), stories
        self.states, self.since, latest = bytearray(), array("d"), array("d")
        self._mail, self._id_at = mail_of(columns), columns.index("id")
        self._blocks: List[str] = []
        self._figures = {("", "", 0): Figures()}
        count, now = self._figures["", "", 0].add, self.now
        states = {state: number for number, state in enumerate(Figures().states)}
        last_hit = columns.index("last_hit")
        for block in iter(lambda: list(islice(rows, TOGETHER)), []):
            for row in block:
                mail, story = self._read(row)
                self.states.append(states[count(mail, story, now)])
                self.since.append(mail.since)
                when = seconds(row[last_hit]) if mail.hits else mail.since
                latest.append(when if when == when else 0.0)
            self._blocks.append(joined(block))
        self._order = array("I", sorted(range(len(latest)), key=latest.__getitem__,
                                        reverse=True))

    def _read(self, row: Row) -> Tuple[Mail, Story]:
        """Return what figures need; most rows have no story, so none is looked for."""
        mail = self._mail(row)
        return mail, self.stories.of(row[self._id_at]) \
            if mail.hits or mail.opens or mail.status else NO_STORY

    def rows(self, numbers: Iterable[int]) -> Iterator[Tuple[int, Row]]:
        """Yield numbers with the cells of these rows."""
        for at, group in groupby(numbers, lambda number: number // TOGETHER):
            block = self._blocks[at].split(_ROW_END)
            for number in group:
                yield number, block[number % TOGETHER].split(_CELL_END)

    def find(self, tag_id: str) -> Tuple[int, Row]:
        """Return the number and the cells of a tag's row; raise Problem."""
        for number, row in self.rows(self._with(tag_id)):
            if row[self._id_at] == tag_id:
                return number, row
        raise Problem(404, "no such tag")

    def _with(self, text: str) -> Iterator[int]:
        """Yield the numbers of rows with a text, in any case."""
        for at, block in enumerate(map(str.casefold, self._blocks)):
            if text in block:
                yield from (at * TOGETHER + n for n, row in enumerate(
                    block.split(_ROW_END)) if text in row)

    def chosen(self, q: str, state: str, days: int) -> Sequence[int]:
        """Return the numbers of rows with a text, in a state, sent in so many days."""
        from array import array

        found = set(self._with(re.sub("[\x1e\x1f]", " ", q.casefold()))) if q else ()
        wanted, first = [*KINDS, ""].index(state), self.now - days * DAY
        return array("I", (
            n for n in self._order if (not q or n in found)
            and (not days or self.since[n] >= first)
            and (not state or self.states[n] == wanted))) if q or days or state \
            else self._order

    def figures(self, q: str, state: str, days: int) -> Figures:
        """Return what those rows come to."""
        key = q, state, days
        if key not in self._figures:
            if len(self._figures) > 20:
                self._figures.clear()
            found = self._figures[key] = Figures()
            for _, row in self.rows(sorted(self.chosen(*key))):
                found.add(*self._read(row), self.now)
        return self._figures[key]


def joined(rows: Sequence[Row]) -> str:
    """Return rows as one text; in their cells is no mark that parts them."""
    text = _ROW_END.join(map(_CELL_END.join, rows))
    if text.count(_ROW_END) + text.count(_CELL_END) < sum(map(len, rows)):
        return text
    return joined([[re.sub("[\x1e\x1f]", " ", cell) for cell in row] for row in rows])


def stamps_of(files: Files) -> Sequence[Stamp]:
    """Return which versions of register and log are there."""
    return stamp_of(files.register), stamp_of(files.log)


class Watch:
    """Keep a View; when it is looked at, and old, another thread reads a newer one."""

    def __init__(self, files: Files, say: Callable[[str], None]) -> None:
        self._files, self._stories, self._due = files, Stories(files.log), 0.0
        self._say = say
        self._view = View([*OWN_COLUMNS], iter(()), self._stories)
        self.reader = Background(self._read, say)
        self._read()

    def _read(self) -> None:
        self.reader.waiting.clear()
        files, view, problem = self._files, self._view, ""
        began, spent, stamps = time.monotonic(), time.thread_time(), stamps_of(files)
        try:
            self._stories.look()
            if any(map(os.path.exists, (*files.versions, files.log))):
                view = View(*register_rows(files, self._say), self._stories)
        except (TrackerError, OSError, UnicodeError) as error:
            problem = files.shown(explain(error))
        view.began, view.stamps, view.problem = began, stamps, problem
        self._view, spent = view, time.thread_time() - spent
        self._due = time.monotonic() + max(REREAD_SECONDS, REREAD_SHARE * spent)

    def view(self, since: float = 0.0) -> View:
        """Return the view, as new as half a second allows.

        One that was begun before a monotonic time is waited out, for ten.
        """
        began, now = self._view.began, time.monotonic()
        is_old = began < since or self._view.stamps != stamps_of(self._files)
        if is_old and (since or now >= self._due):
            self._due = float("inf")
            self.reader.put(None)
            while self._view.began <= max(began, since) \
                    and time.monotonic() < now + (10 if since else 0.5):
                time.sleep(0.005)
        return self._view


def log_page(path: str, cursor: str, limit: int, verdict: str
             ) -> Tuple[List[Event], str]:
    """Return the next events of a log behind a cursor, and the cursor behind those.

    A cursor is an inode and an offset, so it outlives the file's name. Where there is
    no such file the log is begun anew; not more is read at once than LOG_BLOCK.
    """
    inode, offset = map(int, cursor.split("-")) if "-" in cursor else (0, 0)
    events: List[Event] = []
    names = log_files(path)
    inodes = [stamp_of(name).inode for name in names]
    for name in names[inodes.index(inode) if inode in inodes else 0:]:
        with suppress(FileNotFoundError), _opened(name) as file:
            status = stamp_of(file)
            if status.inode != inode or offset > status.size:
                inode, offset = status.inode, 0
            block = os.pread(file, LOG_BLOCK, offset)
            for line in block.split(b"\n")[:-1]:  # where it begins amid one, no event
                event = parse_event(line)
                if event and verdict in ("", event.verdict):
                    if len(events) == limit:
                        return events, f"{inode}-{offset}"
                    events.append(event)
                offset += len(line) + 1
            if len(block) == LOG_BLOCK or time.time() < status.mtime / 1e9 + SAVING:
                break  # there is more, or may be: not all may know its new name
    return events, f"{inode}-{offset}" if inode else "0"


# The states of tags, in the order of Figures: for the API, and for the page, where a
# sign tells them apart as well.
KINDS = {
    "opened": ("●", "Opened"),
    "cannot_be_known": ("◌", "Cannot be known"),
    "no_hit": ("○", "No hit"),
    "bounced": ("✕", "Bounced"),
    "not_sent": ("·", "Not sent"),
}

_TEXT = {"type": ["string", "null"]}
_MOMENT = {**_TEXT, "format": "date-time"}
_WHICH = {"id": {"type": "string", "maxLength": 40}}
_FILTER: Dict[str, Any] = {
    "q": {"type": "string", "maxLength": 200},
    "state": {"type": "string", "enum": [*KINDS]},
    "days": {"type": "integer", "minimum": 1, "maximum": 36500}}
_LIST: Dict[str, Any] = {
    **_FILTER,
    "limit": {"type": "integer", "minimum": 1, "maximum": 200, "default": 50},
    "cursor": {"type": "string", "pattern": "^[0-9]{1,9}$", "default": "0"}}
_LOG = {
    "verdict": {"type": "string", "enum": [*OPENS, MACHINE, SELF, UNKNOWN]},
    "limit": {"type": "integer", "minimum": 1, "maximum": 500, "default": 100},
    "cursor": {"type": "string", "pattern": "^(0|[0-9]{1,20}-[0-9]{1,18})$",
               "default": "0"}}
_TAG = {
    "id": _TEXT, "name": _TEXT, "state": _FILTER["state"], "status": _TEXT,
    **dict.fromkeys(COUNTS, {"type": "integer", "minimum": 0}),
    **dict.fromkeys((*TIMES, "first_open", "clicked"), _MOMENT),
    **dict.fromkeys(("email", "campaign", "variant", "tag", "url"), _TEXT),
    "columns": {"type": "object", "additionalProperties": {"type": "string"}}}
_EVENT = {
    **dict.fromkeys(EVENT_COLUMNS, _TEXT), "time": _MOMENT,
    **dict.fromkeys(COUNTS, {"type": ["integer", "null"]})}


def _object(**properties: Any) -> Dict[str, Any]:
    """Return the schema of an object that has these properties and no others."""
    return {"type": "object", "properties": properties, "required": [*properties],
            "additionalProperties": False}


def _array(properties: Mapping[str, Any]) -> Dict[str, Any]:
    return {"type": "array", "items": _object(**properties)}


class Route(NamedTuple):
    """What is answered where, by which method of Dashboard."""

    method: str
    path: str                       # with {id} for the id of a tag
    run: str
    schema: Mapping[str, Any] = {}  # of the answer; none for a page
    given: Mapping[str, Any] = {}   # schemas of id, parameters, parts of a body


ROUTES = (
    Route("GET", "/api/tags", "api_tags", _object(
        data=_array(_TAG), next_cursor=_TEXT, total={"type": "integer"}), _LIST),
    Route("POST", "/api/tags", "api_make", _object(**_TAG), {
        "name": {"type": "string", "maxLength": 1000}}),
    Route("GET", "/api/tags/{id}", "api_tag", _object(
        **_TAG, events=_array(_EVENT)), _WHICH),
    Route("DELETE", "/api/tags/{id}", "api_forget", {"type": "null"}, _WHICH),
    Route("GET", "/api/events", "api_events", _object(
        data=_array(_EVENT), next_cursor={"type": "string"}), _LOG),
    Route("GET", "/api/stats", "api_stats", {"type": "object"}, _FILTER),
    Route("GET", "/api/openapi.json", "api_description", {"type": "object"}),
    Route("GET", "/health", "health", _object(status={"const": "ok"})),
    Route("GET", "/login", "log_in"),
    Route("GET", "/", "list_page"),
    Route("POST", "/new", "make"),
    Route("GET", "/tag", "tag_page"),
    Route("POST", "/tag", "edit"),
    Route("POST", "/forget", "forget"),
)
ALIASES = {"/api/tracks": "/api/tags", "/api/opens/recent": "/api/events"}
SUCCESS = {"GET": "200", "POST": "201", "DELETE": "204"}


def checked(pairs: Iterable[Tuple[str, Any]], schemas: Mapping[str, Any]
            ) -> Dict[str, Any]:
    """Return values by the very schemas that are published for them.

    Raise Problem for a bad one, one that is not known, and one that comes twice.
    """
    values: Dict[str, Any] = {}
    for name, value in pairs:
        if name not in schemas or name in values:
            raise Problem(422, f"no parameter {clean(name)}, or no second one")
        values[name] = by_schema(name, value, schemas[name])
    return {**{name: schema.get("default", 0 if "minimum" in schema else "")
               for name, schema in schemas.items()}, **values}


def by_schema(name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """Return a value, numbers as such; raise Problem if it does not fit."""
    most = schema.get("maximum")
    form = schema.get("pattern", "[0-9]{1,9}" if most else "(?s:.*)")
    if isinstance(value, str) and len(value) <= schema.get("maxLength", 99) \
            and value in schema.get("enum", [value]) and re.fullmatch(form, value):
        if not most:
            return value
        if schema["minimum"] <= int(value) <= most:
            return int(value)
    raise Problem(422, f"{name} is not " + ", ".join(
        f"{key} {told}" for key, told in schema.items()))


class Dashboard:
    """Answer requests for the page and the API, as Tracker does for pixels."""

    def __init__(self, files: Files, url: str, port: int, server: str, lines: Lines
                 ) -> None:
        from urllib.parse import urlsplit

        self._files, self._url, self._lines, parts = files, url, lines, urlsplit(url)
        self._keys, self.watch = Keys(files.key), Watch(files, lines.rarely)
        self._base, self._cookie = parts.path.rstrip("/"), f"mailtracker-{port}"
        self._path = f"{self._base}/{'; Secure' * (parts.scheme == 'https')}"
        self._origins = {f"{parts.scheme}://{parts.netloc}", *(
            f"http://{host}:{port}" for host in ("localhost", "127.0.0.1", "[::1]"))}
        self._origins |= {  # as browsers say them
            re.sub(r"^(http:.*):80$|^(https:.*):443$", r"\1\2", origin)
            for origin in self._origins}
        self._hosts = {origin.partition("://")[2] for origin in self._origins}
        self._template = partial(tag_template, base_url(server or "localhost"),
                                 "/{id}.gif")
        self._settler, self._born = Settler(files), os.urandom(8)
        self._links = Links(files.links)
        self._refused = deque([0.0] * 10, 10)  # when tokens were, the last times

    def respond(self, received: bytes, _: str) -> bytes:
        """Return the answer to what a client has sent; b"" while more is to come."""
        ask = None
        try:
            ask = read_ask(received)
            if not ask:
                return b""
            reply = self._answer(ask)
        except Problem as problem:
            reply = self._problem(ask, *problem.args)
        except (TrackerError, OSError) as error:
            reply = self._problem(ask, 503, self._files.shown(explain(error)))
        except Exception as error:  # whatever it is, the others are answered
            self._lines.rarely(f"cannot answer: {error!r}")
            reply = self._problem(ask, 500)
        is_head = ask is not None and ask.method == "HEAD"
        return b"".join(reply.partition(b"\r\n\r\n")[:2]) if is_head else reply

    def flush(self) -> bool:
        """Do nothing: a change is made before it is answered."""
        return False

    tend = flush

    def _answer(self, ask: Ask) -> bytes:
        """Return the answer to a request; raise Problem."""
        if ask.headers.get("host", "").lower() not in self._hosts:
            raise Problem(421, "by this name it is not reached; see --admin-url")
        path = ask.path
        if self._base and path.startswith(self._base + "/"):
            path = path[len(self._base):]  # which a proxy may take away or not
        for alias, name in ALIASES.items():
            path = re.sub(f"^{alias}(?=/|$)", name, path)
        right = "read" if path in ("/health", "/login") else self._right(ask)
        route, which = self._route(ask.method, path)
        if right == "read" and route.method != "GET":
            raise Problem(403, "this key may only read")
        etag = self._etag(path, ask.query)
        # With W/ before it, it has come through nginx's gzip.
        known = re.split("[, ]+|W/", ask.headers.get("if-none-match", ""))
        if route.method == "GET" and etag in known:
            return http_answer(304, "", {"ETag": etag})
        answer = getattr(self, route.run)(self._given(route, ask, which))
        status, body, headers = answer if isinstance(answer, tuple) else (
            200, answer, {"ETag": etag})
        return http_answer(status, body, headers)

    def _route(self, method: str, path: str) -> Tuple[Route, Mapping[str, str]]:
        """Return who answers, and the id in the path; raise Problem."""
        found = {}
        for route in ROUTES:
            match = re.fullmatch(route.path.replace("{id}", "(?P<id>[^/]*)"), path)
            if match:
                found[route.method] = route, match.groupdict()
        if not found:
            raise Problem(404, "there is nothing here")
        if "GET" in found:
            found["HEAD"] = found["GET"]
        if method not in found:
            raise Problem(405, "", {"Allow": ", ".join(found)})
        return found[method]

    def _given(self, route: Route, ask: Ask, which: Mapping[str, str]
               ) -> Dict[str, Any]:
        """Return what a request says: checked for the API, as it comes for a page."""
        import json
        from urllib.parse import parse_qsl

        if not route.schema:
            return dict((*parse_qsl(ask.body, True), *ask.query))
        pairs: List[Tuple[str, Any]] = [*which.items(), *ask.query]
        if route.method == "POST":
            kind = ask.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Problem(415, "send application/json")
            try:
                told = json.loads(ask.body)
            except (ValueError, RecursionError):
                told = None
            if not isinstance(told, dict) or {*route.given} - {*told}:
                raise Problem(422, f"send an object with {', '.join(route.given)}")
            pairs += told.items()
        return checked(pairs, route.given)

    def _etag(self, path: str, query: Sequence[Tuple[str, str]]) -> str:
        """Return what changes when the answer may: pages tell times by the minute."""
        from hashlib import sha256

        view = self.watch.view()
        is_lasting = path.startswith("/api/") and not dict(query).get("days")
        waiting = [  # as log_page does
            name for name in log_files(self._files.log)[:-1]
            if time.time() < stamp_of(name).mtime / 1e9 + SAVING
        ] if path == "/api/events" else []
        told = (self._born, view.began, view.problem, stamps_of(self._files), waiting,
                0 if is_lasting else int(time.time()) // 60)
        return f'"{sha256(repr(told).encode()).hexdigest()[:24]}"'

    # who may do what

    def _right(self, ask: Ask) -> str:
        """Return what the sender of a request may do, "read" or "write"."""
        how, _, token = ask.headers.get("authorization", "").partition(" ")
        right = ""
        if how.lower() == "bearer":
            right = next((right for right in ("write", "read")
                          if self._keys.allows(token.strip(), right)), "")
        else:
            found = re.search(rf"(?:^|[;,\s]){self._cookie}=([^;,\s]*)",
                              ask.headers.get("cookie", ""))
            token = found[1] if found else ""
            right = "write" * self._keys.allows(token, "session")
            # As in Go's http.CrossOriginProtection; what tells neither is no browser.
            site = ask.headers.get("sec-fetch-site", "none" if ask.headers.get(
                "origin") in (None, *self._origins) else "")
            if right and ask.method not in ("GET", "HEAD") \
                    and site not in ("none", "same-origin"):
                raise Problem(403, "this came from another site")
        return right or self._shut_out(token)

    def log_in(self, given: Dict[str, Any]) -> Any:
        """Let in whoever has followed a link."""
        if not self._keys.allows(given.get("token", ""), "login"):
            self._shut_out(given.get("token", ""))
        session = self._keys.token("session", time.time() + SESSION_SECONDS)
        return 303, "", {"Location": "./", "Set-Cookie": (
            f"{self._cookie}={session}; HttpOnly; SameSite=Lax; "
            f"Max-Age={SESSION_SECONDS:.0f}; Path={self._path}")}

    def _shut_out(self, token: str) -> str:
        """Raise Problem; who guesses is heard ten times a second, and once a minute."""
        if token:
            self._lines.rarely("somebody has come with a token that is not good")
            self._refused.append(time.monotonic())
            if self._refused[0] > time.monotonic() - 1:
                raise Problem(429, "too many of these", {"Retry-After": "1"})
        raise Problem(401, "not logged in", {"WWW-Authenticate": "Bearer"})

    def _problem(self, ask: Optional[Ask], status: int, detail: str = "",
                 headers: Mapping[str, str] = {}) -> bytes:
        """Return the answer that says what is wrong: as JSON (RFC 9457), or a page."""
        from http import HTTPStatus

        title = "Log in" if status == 401 else HTTPStatus(status).phrase
        if not ask or re.search("/api/|/health$", ask.path):
            return http_answer(status, {"type": "about:blank", "title": title,
                                        "status": status, "detail": detail}, headers)
        words = LOGIN_HELP if status == 401 else escaped(detail)
        return http_answer(status, html_page(title, f"<h1>{title}</h1><p>{words}"),
                           headers)

    # the API

    def api_tags(self, given: Dict[str, Any]) -> Any:
        """Tags, those with the newest activity first."""
        view, first = self.watch.view(), int(given["cursor"])
        numbers = view.chosen(*(given[name] for name in _FILTER))
        last = first + given["limit"]
        return {"data": [self._told(view, *found)
                         for found in view.rows(numbers[first:last])],
                "next_cursor": str(last) if last < len(numbers) else None,
                "total": len(numbers)}

    def _told(self, view: View, number: int, row: Row) -> Dict[str, Any]:
        """Return what the API tells of a tag."""
        cells = dict(zip(view.columns, map(cell_text, row)))
        story = view.stories.of(cells["id"])
        cells.update({column: time_in(cells.get(column, "")) for column in TIMES},
                     first_open=utc_text(story.first) if story.first else "",
                     clicked=utc_text(story.clicked) if story.clicked else "",
                     state=[*KINDS][view.states[number]], **{
                         key: self._template(form).replace("{id}", cells["id"])
                         for key, form in (("tag", "html"), ("url", "url"))})
        return {**{key: cells.get(key) or None for key in _TAG},
                **{column: int(cells[column]) for column in COUNTS},
                "columns": {column: cells[column] for column in view.columns
                            if column not in (*OWN_COLUMNS, *LATER_COLUMNS)}}

    def api_tag(self, given: Dict[str, Any]) -> Any:
        """A tag with its last events, the newest first, hits as judged by now."""
        told = self._tag(given)
        return {**told, "events": list(map(event_json, self._events(told["id"])))}

    def _tag(self, given: Mapping[str, str]) -> Dict[str, Any]:
        """Return what the API tells of one tag; raise Problem."""
        view = self.watch.view()
        return self._told(view, *view.find(given.get("id", "")))

    def _events(self, tag_id: str) -> List[Event]:
        """Return the last events of a tag, the newest first."""
        events = [event for event in read_log(self._files.log, tag_id.encode())
                  if event.id == tag_id]
        return [*as_judged(events, self._links.find)][:-501:-1]

    def api_events(self, given: Dict[str, Any]) -> Any:
        """Events of all tags, the oldest first."""
        events, cursor = log_page(self._files.log, **given)
        return {"data": list(map(event_json, events)), "next_cursor": cursor}

    def api_stats(self, given: Dict[str, Any]) -> Any:
        """What tags come to; rates are fractions, half_opened_after is in seconds."""
        return self.watch.view().figures(**given).as_json()

    def api_description(self, _: Dict[str, Any]) -> Any:
        """This description, by OpenAPI 3.1."""
        def content(schema: Mapping[str, Any], kind: str = "json") -> Dict[str, Any]:
            return {"content": {f"application/{kind}": {"schema": schema}}} \
                if schema["type"] != "null" else {}

        problem = {"description": "what is wrong (RFC 9457)", **content(
            {"type": "object", "required": ["type", "title", "status", "detail"]},
            "problem+json")}
        paths: Dict[str, Any] = {}
        for method, path, run, schema, given in ROUTES:
            if not schema:
                continue
            about = getattr(self, run).__doc__.rstrip(".")
            told: Dict[str, Any] = {"summary": about, "responses": {
                "default": problem, SUCCESS[method]: {
                    "description": about, **content(schema)}}}
            paths.setdefault(path, {})[method.lower()] = told
            if method == "POST":
                told["requestBody"] = {"required": True, **content(_object(**given))}
            else:
                told["parameters"] = [
                    {"name": name, "in": "path" if name == "id" else "query",
                     "required": name == "id", "schema": given[name]} for name in given]
            if path == "/health":
                told["security"] = []
        return {"openapi": "3.1.0",
                "info": {"title": "mailtracker", "version": __version__},
                "servers": [{"url": self._url.rstrip("/")}], "paths": paths,
                "security": [{"key": []}], "components": {"securitySchemes": {
                    "key": {"type": "http", "scheme": "bearer"}}}}

    def health(self, _: Dict[str, Any]) -> Any:
        """Whether register and log can be read."""
        problem = self.watch.view().problem
        if problem:
            raise Problem(503, problem)
        return {"status": "ok"}

    def api_make(self, given: Dict[str, Any]) -> Any:
        """Make a tag."""
        (tag_id,), name = new_ids(os.urandom(32)), one_line(given["name"])
        now = utc_text(time.time())
        self._change(add_tags, self._files, [(tag_id, name)], Making(now))
        try:
            told = self._tag({"id": tag_id})
        except Problem:  # so many tags are there that the new one is not yet read
            row = [tag_id, "0", "", "0", "", now, name]
            stories = self.watch.view().stories
            told = self._told(View([*OWN_COLUMNS], iter([row]), stories), 0, row)
        return 201, told, {
            "Location": f"{self._base}/api/tags/{tag_id}"}

    def api_forget(self, given: Dict[str, Any]) -> Any:
        """Forget a tag, with all that is known of it."""
        self.watch.view().find(given["id"])
        self._change(forget_tags, self._files, {given["id"]})
        return 204, "", {}

    def _change(self, how: Callable[..., object], *what: Any) -> None:
        """Change register and log, and see what they are then."""
        how(*what)
        self.watch.view(since=time.monotonic())

    # the pages

    def list_page(self, given: Dict[str, Any]) -> Any:
        """Show figures, and the tags that a filter leaves: lenient, unlike the API."""
        from urllib.parse import urlencode

        view, wanted = self.watch.view(), checked((), _LIST)
        for name in {*given}.intersection(_LIST):
            with suppress(Problem):
                wanted[name] = by_schema(name, given[name], _LIST[name])
        if "days" not in given:
            wanted["days"] = 30 if len(view.chosen("", "", 30)) else 0
        q, state, days, _, cursor = wanted.values()
        figures, told = view.figures(q, "", days), self.api_tags(wanted)
        first, last = int(cursor) + 1, int(cursor) + len(told["data"])
        tags = table_html(
            f"{first} to {last} of {plural(told['total'], 'tag')}, newest activity "
            "first", LIST_COLUMNS, (tag_cells(tag, view.now) for tag in told["data"]))
        if told["next_cursor"]:
            older = urlencode({**wanted, "cursor": told["next_cursor"]})
            tags += f'<p><a id=older href="./?{escaped(older)}">Older &rsaquo;</a>'
        spans = {n: f"{n} days" for n in sorted({7, 30, 90, 365, days} - {0})}
        return html_page(f"{figures.states['opened']} opened", LIST_HTML.format(
            news=self._news(view), q=escaped(q), figures="".join(
                (share_chart(figures), cards_html(figures), days_chart(view)))
            if view.states else "",
            days=options_html(days, {**spans, 0: "all time"}),
            states=options_html(state, {"": "All states", **{
                state: words for state, (_, words) in KINDS.items()}}),
            tags=tags if told["data"] else NO_MATCH * bool(view.states)),
            self._foot(view))

    def _news(self, view: View) -> str:
        """Return in a sentence what is new, or wrong."""
        recent = sum(hits_in(view, hour)[1] for hour in range(24))
        newest = view.figures("", "", 0).last_open
        if view.problem:
            return f"<h1>{escaped(view.problem)}</h1><p>This is from {clock(view.now)}."
        if not view.states:
            return NO_TAG
        more = f"The newest {time_html(newest, view.now)}." if newest else NO_HIT
        if not log_files(self._files.log):
            more = "There is no event log, so these are counts only."
        elif view.stamps != stamps_of(self._files) and time.time() > view.now + 10:
            more += f" As of {clock(view.now)}."
        return f"<h1>{plural(recent, 'open')} in the last 24 hours</h1><p>{more}"

    def _foot(self, view: View) -> str:
        return (f"<p>{CAUTION}<p>{escaped(os.path.basename(self._files.register))}, "
                f"{plural(len(view.states), 'tag')}. Times are in this machine's zone, "
                f"{time.strftime('%Z')}; point at one for UTC.")

    def tag_page(self, given: Dict[str, Any]) -> Any:
        """Show one tag with its history."""
        view, told = self.watch.view(), self._tag(given)
        events = self._events(told["id"])
        fields = fields_html({"name": told["name"] or "", **told["columns"]})
        return html_page(called(told)[:80], TAG_HTML.format(
            called=escaped(called(told)[:1000]), story=story_html(told, view.now),
            id=escaped(told["id"]), tag=escaped(told["tag"]), hits=told["hits"],
            strip=strip_html(told, events), history=table_html(
                "What happened, the newest first", STORY_COLUMNS,
                map(told_cells, events)) if events else NO_EVENT,
            fields=fields, made=", ".join(
                f"{word} {time_html(told[key])}" for word, key in (
                    ("Made", "created"), ("sent", "sent")) if told[key])),
            self._foot(view))

    def make(self, given: Dict[str, Any]) -> Any:
        """Make a tag, and show it."""
        _, told, _ = self.api_make({"name": given.get("name", "")[:1000]})
        return 303, "", {"Location": f"tag?id={told['id']}"}

    def edit(self, given: Dict[str, Any]) -> Any:
        """Change those texts of a tag that are no longer what the form had."""
        sent = {form_text(field): form_text(text) for field, text in given.items()}
        texts = {field[4:]: text for field, text in sent.items() if field[:4] == "new "
                 and text != sent.get(f"was {field[4:]}")}
        shown = {column: sent[f"was {column}"] for column in texts
                 if f"was {column}" in sent}
        if "name" in texts:
            texts["name"] = one_line(texts["name"])
        try:
            if texts:
                self._change(edit_tag, self._settler, given.get("id", ""), texts, shown)
        except TrackerError as error:
            raise Problem(409, self._files.shown(str(error))) from None
        return 303, "", {"Location": f"tag?id={escaped(given.get('id', ''))}"}

    def forget(self, given: Dict[str, Any]) -> Any:
        """Forget a tag."""
        self.api_forget({"id": given.get("id", "")})
        return 303, "", {"Location": "./"}


def event_json(event: Event) -> Dict[str, Any]:
    """Return what the API tells of an event."""
    return {column: None if value == "" else value
            for column, value in event._asdict().items()}


def http_answer(status: int, body: Any, headers: Mapping[str, str]) -> bytes:
    """Return a whole response; what is no text is told as JSON.

    No script or style but ours may ever run.
    """
    import json
    from hashlib import sha256
    from http import HTTPStatus

    kind = "text/html; charset=utf-8" if isinstance(body, str) else \
        "application/json" if status < 400 else "application/problem+json"
    data = (body if isinstance(body, str) else json.dumps(body)).encode(
        "utf-8", "replace")
    script, style = (b2a_base64(sha256(text.encode()).digest(), newline=False).decode()
                     for text in (SCRIPT, STYLE))
    about = {} if status in (204, 304) else {  # RFC 9110, 8.6
        "Content-Type": kind, "Content-Length": len(data)}
    head = HTTP_HEAD.format(HTTPStatus(status), script, style) + "".join(
        f"{name}: {value}\r\n" for name, value in {**about, **headers}.items())
    return (head + "\r\n").encode("latin-1", "replace") + data


def html_page(title: str, main: str, foot: str = "") -> str:
    """Return a page of the dashboard; main and foot are HTML."""
    return page_html(f"{title} - Mail tracker", PAGE_HTML.format(
        main=main, foot=foot, script=SCRIPT), ICON)


def clock(when: float, form: str = "%H:%M:%S") -> str:
    """Return a time in this machine's zone."""
    return escaped(time.strftime(form, time.localtime(when)))


def time_html(text: Optional[str], now: float = 0.0) -> str:
    """Return a time, or how long ago that was; UTC is seen on pointing at it."""
    when = seconds(text or "")
    if when != when:
        return ""
    words = clock(when, "%d %b %Y" if now else "%d %b %Y %H:%M")
    if now < when + 30 * 86400 and now:
        words = f"{lasting(now - when)} ago" if now > when + 60 else "just now"
    return f'<time datetime="{text}" title="{clock(when, "%d %b %Y %X %Z")}, {text}">' \
        f"{words}</time>"


def called(told: Mapping[str, Any]) -> str:
    """Return what a person knows a tag by."""
    names = told["name"], told["email"]
    return ", ".join(filter(None, names)) or short(told["id"], 1)


def options_html(chosen: object, choices: Mapping[Any, str]) -> str:
    """Return the choices of a form, one of them chosen."""
    return "".join(f'<option value="{value}"{" selected" * (value == chosen)}>{words}'
                   for value, words in choices.items())


def hits_in(view: View, hours_ago: int) -> Sequence[int]:
    """Return the hits that are no opens, and the opens, of an hour."""
    hour = utc_text(view.now - 3600 * hours_ago)[:13]
    return view.stories.hours.get(hour, (0, 0))


def days_chart(view: View) -> str:
    """Return a column for each of the last 30 days: its opens before all its hits."""
    days: Dict[str, Tuple[int, int]] = {}
    for hour in reversed(range(30 * 24)):
        others, opens = hits_in(view, hour)
        day = clock(view.now - 3600 * hour, "%d %b")
        before = days.get(day, (0, 0))
        days[day] = before[0] + opens, before[1] + others
    return columns_chart([(day, *hits) for day, hits in days.items()],
                         "Opens of all tags by day, below other hits", "other hits")


def state_html(told: Mapping[str, Any]) -> str:
    """Return the state of a tag as a sign and words."""
    state, status = told["state"], told["status"] or ""
    sign, words = KINDS[state]
    words += " by a person" * (state == "no_hit" and told["hits"] > 0)
    if status not in ("", "sent", state):
        words = status.capitalize() if state == "not_sent" else f"{words}, {status}"
    return f'<span class="state {state}">{sign}</span> {escaped(words)}'


def tag_cells(told: Mapping[str, Any], now: float) -> Iterator[str]:
    """Yield the cells of LIST_COLUMNS for a tag."""
    name, tag_id = escaped(cut(called(told), 120)), escaped(told["id"])
    yield f'<a id="t-{tag_id}" href="tag?id={tag_id}">{name}</a>'
    yield state_html(told)
    yield str(told["opens"])
    yield time_html(told["last_open"], now)
    yield time_html(told["sent"] or told["created"], now)


def story_html(told: Mapping[str, Any], now: float) -> str:
    """Return in a sentence what is known of a tag."""
    first, sent = seconds(told["first_open"] or ""), told["sent"] or told["created"]
    after = first - seconds(sent or "")
    facts = [plural(told["opens"], "open") * (told["opens"] > 0),
             f"first {lasting(after)} after it was {'sent' if told['sent'] else 'made'}"
             if after >= 0 else "",
             *(f"{word} {time_html(told[key], now)}" for word, key in (
                 ("last", "last_open"), ("clicked", "clicked")) if told[key]),
             f"{plural(told['hits'], 'hit')} in all" * (told["hits"] > 0)]
    return ": ".join(filter(None, (state_html(told), ", ".join(filter(None, facts)))))


def strip_html(told: Mapping[str, Any], events: Sequence[Event]) -> str:
    """Return the hits of a tag on an axis of time since sending."""
    since = seconds(told["sent"] or told["created"] or "")
    hits = [(seconds(event.time) - since, event.verdict)
            for event in events[:200] if event.event in JUDGED]
    return strip_chart((age, "opened" if verdict in OPENS else "none",
                        f"{verdict}, after {lasting(age)}")
                       for age, verdict in hits if age == age) if hits else ""


def fields_html(texts: Mapping[str, str]) -> str:
    """Return the parts of a form that change texts; what would not fit cannot be."""
    from html import escape
    from urllib.parse import urlencode

    fields, room = "", MOST_BODY
    for column, text in texts.items():
        name, text = form_text(column), form_text(text_in(text))
        sent = text.replace("\n", "\r\n")
        size = len(urlencode({f"was {name}": sent, f"new {name}": sent})) + 1
        off = size > room
        room -= size * (not off)
        fields += FIELD_HTML.format(
            title=escaped(column) + ", too long to be changed here" * off,
            off=" disabled" * off, column=escape(name), text=escape(text),
            rows=1 + min(5, text.count("\n") + len(text) // 80))
    return fields


def told_cells(event: Event) -> Iterator[str]:
    """Yield the cells of STORY_COLUMNS for an event."""
    _, why = words(event, REASONS)
    yield time_html(event.time)
    yield from map(escaped, (f"{event.event} {event.verdict}",
                             why.partition("clicked: ")[2] or why, event.address,
                             cut(event.detail, 200)))


HTTP_HEAD = """HTTP/1.1 {0.value} {0.phrase}\r
Content-Security-Policy: default-src 'none'; script-src 'sha256-{1}'; style-src \
'sha256-{2}'; connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; \
frame-ancestors 'none'\r
Cache-Control: private, no-cache\r
X-Content-Type-Options: nosniff\r
Referrer-Policy: no-referrer\r
Cross-Origin-Resource-Policy: same-origin\r
Cross-Origin-Opener-Policy: same-origin\r
Connection: close\r
"""
ICON = """<link rel=icon href="data:image/svg+xml,%3Csvg
xmlns='http://www.w3.org/2000/svg'%3E%3Ccircle cx='50%25' cy='50%25' r='45%25'
fill='%232f6fd0'/%3E%3C/svg%3E">"""
PAGE_HTML = """<header><a href="./">Mail tracker</a> <span id=line role=status></span>
</header><main>{main}</main><footer class="note dim">{foot}</footer><script>{script}\
</script>"""
LOGIN_HELP = """This prints a link that lets you in, on the machine with the register:
<pre>python3 mailtracker.py dashboard --link</pre>"""
LIST_HTML = """<div id=news data-live>{news}</div><div id=figures data-live>{figures}
</div><form><label>Name, id or any other cell <input type=search name=q
value="{q}"></label><label>State <select name=state>{states}</select></label><label>Sent
within <select name=days>{days}</select></label><button>Show</button></form><div id=tags
data-live>{tags}</div><details><summary>New tag</summary><form method=post
action=new><label>What you will know it by <input name=name maxlength=1000
autocomplete=off></label><button>Make it</button></form></details>"""
NO_TAG = """<h1>No tag yet</h1><p>Make one below, or on the machine with the register:
<pre>python3 mailtracker.py newtag --name john --server t.example.org</pre><p>This page
shows it without being reloaded."""
NO_MATCH = '<p>No tag is like that. <a href="./?days=0">Show all tags</a>'
NO_HIT = """Nothing has opened any of them; <code>mailtracker.py doctor</code> tells
whether anything could."""
LIST_COLUMNS = {"Name": "", "State": "", "Opens": "n", "Last open": "wide",
                "Sent": "wide"}
TAG_HTML = """<p><a href="./">&lsaquo; All tags</a><h1>{called}</h1><div id=tag
data-live><p>{story}<p class=dim>{made}. Id <code>{id}</code>{strip}{history}</div>
<form><label>Tag, to paste into a mail <input readonly value="{tag}"></label><button
type=button class=copy hidden>Copy</button></form><details><summary>Edit</summary><form
method=post action="tag?id={id}">{fields}<button>Save</button></form><p class=dim>A
column that you add to the register appears here.</details><details><summary>Forget
</summary><p>Its row, its hits ({hits}) and all else that is known of it go for good,
from the backup and the log as well. Its pixel is still answered, but nothing is counted
any more.<form method=post action="forget?id={id}"><button>Forget it</button></form>
</details>"""
FIELD_HTML = """<input type=hidden name="was {column}" value="{text}"{off}><label>
{title}<textarea name="new {column}" rows={rows}{off}>\n{text}</textarea></label>"""
STORY_COLUMNS = {"When": "", "What": "", "Why": "text", "Network": "wide",
                 "Detail": "wide text"}
NO_EVENT = "<p>Nothing of this tag is in the event log."

SCRIPT = """
const line = document.getElementById('line'), live = '[data-live]';
let known = null, lost = '', timer = 0;
function show(page) {
  const focus = document.activeElement.id;
  for (const old of document.querySelectorAll(live)) {
    const fresh = page.getElementById(old.id);
    if (fresh && fresh.innerHTML != old.innerHTML)
      old.replaceChildren(...fresh.childNodes);
  }
  if (focus) document.getElementById(focus)?.focus({preventScroll: true});
  document.title = page.title;
}
async function look() {
  clearTimeout(timer);
  try {
    const answer = await fetch(location.href), etag = answer.headers.get('ETag');
    if (answer.status == 401) throw 'Logged out: reload this page';
    if (answer.status == 404) throw 'This page is no longer there';
    if (!answer.ok) throw answer.statusText;
    if (etag != known && getSelection().type != 'Range') {
      show(new DOMParser().parseFromString(await answer.text(), 'text/html'));
      known = etag;
    }
    if (lost) line.textContent = lost = '';
  } catch (wrong) {
    if (!lost) line.textContent = lost = wrong instanceof TypeError ?
      'Connection lost at ' + new Date().toLocaleTimeString() : wrong;
  }
  timer = setTimeout(look, document.hidden ? 30000 : 2000);
}
if (document.querySelector(live)) {
  timer = setTimeout(look, 2000);
  document.addEventListener('visibilitychange', () => document.hidden || look());
}
for (const button of document.querySelectorAll('.copy')) {
  const text = button.form.querySelector('input').value;
  button.hidden = false;
  button.onclick = async () => {
    const as = type => new Blob([text], {type});
    await navigator.clipboard.write([new ClipboardItem(
      {'text/html': as('text/html'), 'text/plain': as('text/plain')})]);
    line.textContent = 'Copied';
  };
}
"""


# -- notices: the log is their queue ---------------------------------------------

MOST_LINES, NAME_LENGTH = 8, 50  # of a notice for people; Discord takes 2,000 letters
COMMAND_SECONDS = 30.0
LONGEST_FACT = 10_000  # characters for a command; Linux takes 128 KB


class Progress(NamedTuple):
    """How far a receiver has been told, and which notice is under way."""

    begin: Place = Place()
    since: str = ""       # the time of the last hit before it
    end: Place = Place()  # of the notice; without one it is a reminder
    id: str = ""          # of the notice; "" where none is under way
    tries: int = 0        # -1: the receiver wants no more
    due: float = 0.0      # seconds since 1970


class News(NamedTuple):
    """What is told of one tag."""

    kind: str  # of open: first, again or revived; or reminder
    event: Event
    name: str = ""

    def whom(self) -> str:
        """Return as much of the name as people are told."""
        return cut(self.name[:NAME_LENGTH + 1], NAME_LENGTH)

    def line(self) -> str:
        """Return it in words."""
        reason = self.event.reason
        what = "no open was seen since it was sent" if self.kind == "reminder" else \
            "a link was followed: " * (self.event.event == "clicked") \
            + REASONS.get(reason, reason)
        return clean(f"{self.whom()}: {what}, {self.event.time}")


class Notice(NamedTuple):
    """What a receiver is told at once; it is told again by the same id."""

    id: str
    news: Sequence[News]

    def title(self) -> str:
        """Return what has happened to whom: Opened: Ada and 18 others."""
        what = {"first": "Opened", "reminder": "No open was seen"}.get(
            self.news[0].kind, "Opened again")
        names = list(dict.fromkeys(map(News.whom, self.news)))
        return f"{what}: {' and '.join(names)}" if len(names) < 3 else \
            f"{what}: {names[0]} and {len(names) - 1} others"

    def text(self) -> str:
        """Return the news, one a line, but not very many."""
        more = len(self.news) - MOST_LINES
        return "\n".join([*map(News.line, self.news[:MOST_LINES]),
                          *[f"and {more} more"] * (more > 0)])


class Gathering:
    """The opens in a stretch of the log, and which of them are news."""

    REVIVED = 14 * DAY  # since the last open

    def __init__(self, options: argparse.Namespace) -> None:
        self._unknown, self._is_exact = options.unknown, options.unknown or options.on
        self._kinds = {"first", options.on, *["again", "revived"] * options.every}
        self._began: Dict[str, Event] = {}  # the first open here of each tag
        self.opens: Dict[Tuple[str, ...], Event] = {}
        self.since = ""

    def take(self, event: Event) -> None:
        """Take an event; a verdict may take back an open."""
        client = event.id, event.time, event.address, event.detail
        if event.event in JUDGED:
            self.since = max(self.since, event.time)
            if self._is_open(event):
                self._began.setdefault(event.id, event)
                self.opens.setdefault(client, event)
        elif event.event == "verdict" and not self._is_open(event):
            self.opens.pop(client, None)
        elif event.event == "forget":
            self.opens = {client: old for client, old in self.opens.items()
                          if hash_of(old.id) != event.id}

    def _is_open(self, event: Event) -> bool:
        return is_open(event.verdict, event.reason) \
            or self._unknown and event.verdict == "unknown"

    def news(self, path: str) -> Iterator[News]:
        """Yield what is to be told; path is that of the log."""
        last = {tag_id: self._last_open(event, path)
                for tag_id, event in self._began.items()}
        for event in self.opens.values():
            before, last[event.id] = last[event.id], event.time
            kind = "first" if not before else "" if event.event == "clicked" else \
                "again" if seconds(event.time) - seconds(before) < self.REVIVED \
                else "revived"
            if kind in self._kinds:
                yield News(kind, event)

    def _last_open(self, first: Event, path: str) -> str:
        """Return when a tag was opened before its first open here; "" for never.

        A click's line does not tell whether it was an open: then the log is asked.
        """
        if not self._is_exact and first.event == "hit":
            return first.time if first.opens != 1 else ""
        last = ""
        for event in takewhile(first.__ne__, read_log(path, first.id.encode())):
            if event.id == first.id and event.event != "verdict":
                last = event.time if self._is_open(event) else last
            elif event.id == first.id and event.opens == 0:
                last = ""
        return last


def unopened(files: Files, before: float) -> Iterator[News]:
    """Yield mails sent before some time of which no open was seen, if one could be.

    Each comes once: then its reminder is in the log.
    """
    columns, rows = register_rows(files)
    tag_id, mail_in = cell_of(columns, "id"), mail_of(columns)
    stories = Stories(files.log)
    stories.look()
    done = {event.id for word in (b",reminder,", b",read,")
            for event in read_log(files.log, word)}
    for row in rows:
        mail, story = mail_in(row), stories.of(tag_id(row))
        if mail.since < before and mail.status != "unsubscribed" \
                and tag_id(row) not in done and mail.state(story) == "no hit" \
                and (not mail.hits or any(story.aside)):  # else who knows
            yield News("reminder", Event(utc_text(mail.since), "reminder", tag_id(row)))


def unmarked(text: str) -> str:
    """Return text without marks of Slack and desktops: <!channel> would ring all."""
    from html import escape

    return escape(text, quote=False)


# What is told to a URL. Slack's form serves Mattermost as well.
PAYLOADS: Dict[str, Callable[[Notice, str], Dict[str, Any]]] = {
    "generic": lambda notice, _: {
        "type": "reminder" if notice.news[0].kind == "reminder" else "open.first"
        if {each.kind for each in notice.news} == {"first"} else "open",
        "timestamp": max(each.event.time for each in notice.news),
        "data": {"title": notice.title(), "text": notice.text(), "tags": [
            {"kind": kind, "name": name, **dict(zip(Event._fields[:7], event))}
            for kind, event, name in notice.news]}},
    "slack": lambda notice, _: {
        "text": unmarked(notice.title() + "\n" + notice.text())},
    "discord": lambda notice, _: {"content": notice.title() + "\n" + notice.text(),
                                  "allowed_mentions": {"parse": []}},
    "ntfy": lambda notice, topic: {
        "topic": topic, "title": notice.title(), "message": notice.text()},
}


class Outcome(NamedTuple):
    """What came of an attempt to tell; words say why it failed, "" that it did not."""

    words: str = ""
    wait: float = 0.0  # seconds that the receiver asks for
    is_gone: bool = False


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in whatever takes longer, however it trickles in."""
    def end(*_: object) -> NoReturn:
        raise TimeoutError(errno.ETIMEDOUT, f"no whole answer within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def answer_of(connection: Any, *request: Any, most: int = 0) -> Tuple[Any, bytes]:
    """Return the answer to a request, and no more bytes of its body than wanted.

    Raise OSError, or TrackerError where something else than HTTP comes.
    """
    from http.client import HTTPException

    try:
        connection.request(*request)
        answer = connection.getresponse()
        body = answer.read(most) if most else b""
        if len(body) < most and answer.length:  # it breaks off
            raise HTTPException
        return answer, body
    except HTTPException:
        raise TrackerError("it does not answer as a web server does; see what "
                           "listens there") from None
    finally:
        connection.close()


class Webhook:
    """A URL that is told by POST, as Standard Webhooks 1.0.0 says."""

    SECONDS = 15.0  # in total

    def __init__(self, url: str, form: str, secret: str) -> None:
        from urllib.parse import urlsplit

        self._url, self._payload, self._key = urlsplit(url), PAYLOADS[form], b""
        target = self._url._replace(scheme="", netloc="", fragment="").geturl() or "/"
        self._topic, self._target = (target[1:], "/") if form == "ntfy" \
            else ("", target)
        try:
            if secret:
                self._key = a2b_base64(matching(
                    "whsec_([A-Za-z0-9+/=]{32,88})", secret)[1])
        except ValueError:
            raise TrackerError("the secret is not whsec_ and 24 to 64 bytes in base64"
                               ) from None

    def tell(self, notice: Notice) -> Outcome:
        """Tell it something; a redirect is not followed. Raise OSError, TrackerError.
        """
        import json
        from http.client import HTTPConnection, HTTPSConnection

        body = json.dumps(self._payload(notice, self._topic)).encode()
        kind = HTTPConnection if self._url.scheme == "http" else HTTPSConnection
        connection = kind(self._url.hostname or "", self._url.port,
                          timeout=self.SECONDS)
        with time_limit(self.SECONDS):
            answer, _ = answer_of(connection, "POST", self._target, body,
                                  self._head(notice.id, body))
        status = f"{answer.status} {answer.reason}"[:99]
        return Outcome("" if 200 <= answer.status < 300 else status, retry_after(
            answer.getheader("Retry-After") or ""), answer.status == 410)

    def _head(self, notice_id: str, body: bytes) -> Dict[str, str]:
        """Return the header of a request, which names and signs a notice."""
        import hmac

        when = f"{time.time():.0f}"
        signed = hmac.new(self._key, f"{notice_id}.{when}.".encode() + body, "sha256")
        return {"Content-Type": "application/json", "Connection": "close",
                "User-Agent": f"mailtracker/{__version__}", "webhook-id": notice_id,
                "webhook-timestamp": when, **({"webhook-signature": "v1," + b2a_base64(
                    signed.digest(), newline=False).decode()} if self._key else {})}


def retry_after(text: str) -> float:
    """Return the seconds that a header Retry-After means; 0 for what is none."""
    from email.utils import parsedate_to_datetime

    with suppress(ValueError, TypeError, OverflowError):
        return float(text) if text.strip().isdecimal() else \
            parsedate_to_datetime(text).timestamp() - time.time()
    return 0.0


def run_command(command: str, pause: Callable[[float], bool], notice: Notice
                ) -> Outcome:
    """Run a shell command for an open; only EX_TEMPFAIL (sysexits.h) asks for another.

    The open's line of the event log and the name of its tag are in the environment,
    where no shell takes them for commands. pause is that of Signals.
    """
    from subprocess import DEVNULL, Popen

    (kind, event, name), = notice.news
    facts = {**event._asdict(), "name": name, "kind": kind, "notice": notice.id}
    process = Popen(command, shell=True, start_new_session=True, stdin=DEVNULL,
                    stdout=DEVNULL, stderr=DEVNULL, env={**os.environb, **{
                        f"MAILTRACKER_{fact.upper()}".encode(): clean(
                            str("" if value is None else value)[:LONGEST_FACT]).encode()
                        for fact, value in facts.items()}})
    deadline, is_stopped = time.monotonic() + COMMAND_SECONDS, False
    while process.poll() is None and time.monotonic() < deadline and not is_stopped:
        is_stopped = pause(0.02)
    if process.poll() is None:  # it ends with all that it has started
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    if code:
        note(f"the command exits {code}")
    return Outcome("stopped" if is_stopped else
                   "the command asks for it" * (code == os.EX_TEMPFAIL))


def show_on_desktop(notice: Notice) -> Outcome:
    """Show a notice by notify-send or osascript, else by the terminal."""
    from subprocess import DEVNULL, SubprocessError, run

    title, text = notice.title(), notice.text()
    for command in (
            ["notify-send", "--app-name=mailtracker", "--", title, unmarked(text)],
            ["osascript", "-e", "on run argv", "-e", "display notification (item 2 of "
             "argv) with title (item 1 of argv)", "-e", "end run", title, text]):
        with suppress(OSError, SubprocessError):
            run(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL,
                timeout=Webhook.SECONDS, check=True)
            return Outcome()
    if not sys.stderr.isatty():
        return Outcome("neither notify-send nor osascript shows it")
    title, text = (part.replace("\n", ", ").replace(";", ",") for part in (title, text))
    print(f"\033]777;notify;{title};{text}\033\\", end="", file=sys.stderr, flush=True)
    return Outcome()


def tell_by_mail(smarthost: Smarthost, sender: Tuple[str, str], to: str, notice: Notice
                 ) -> Outcome:
    """Hand a notice over as a mail."""
    from email.utils import formatdate

    lines = "".join(header(name, value) for name, value in (
        ("Date", formatdate(localtime=True)), ("From", header_mailbox(*sender)),
        ("To", to), ("Message-ID", f"<{notice.id}@{sender[1].partition('@')[2]}>"),
        ("Subject", header_text(notice.title())),
        ("Auto-Submitted", "auto-generated"), ("MIME-Version", "1.0")))
    reply = smarthost.deliver(sender[1], to, lines.encode() + _text_part(
        "plain", notice.text() + "\n"))
    smarthost.close()
    return Outcome("" if reply.is_ok else str(reply))


def teller_of(options: argparse.Namespace, pause: Callable[[float], bool]
              ) -> Callable[[Notice], Outcome]:
    """Return what tells the receiver that a command's options name."""
    kind, _, rest = options.to.partition(":")
    if kind == "exec":
        return partial(run_command, rest, pause)
    if kind == "mailto":
        return partial(tell_by_mail, smarthost_of(options),
                       options.sender or ("", rest), rest)
    return show_on_desktop if kind == "desktop" else Webhook(
        options.to, options.format or "generic",
        password_from(options.secret_command, "secret")).tell


class Notices:
    """Tell one receiver what the log says, from where it was told last: at least once.

    A notice has its id before it is first tried, and the progress goes on once it was
    told. file holds that, locked.
    """

    LOOK = 0.25      # seconds between two looks at the log
    GATHER = 60.0    # seconds in which opens become one notice, or are taken back
    MOST = 200       # opens in one notice
    REMIND = 3600.0  # seconds between two looks for mail that is to be reminded of
    RENAME = 60.0    # seconds after which a name in the register is read again
    ROTATED = 2.0    # seconds in which a server may write to a log moved away
    RETRIES: Sequence[float] = (  # as Standard Webhooks has them
        5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)

    def __init__(self, files: Files, options: argparse.Namespace, file: int,
                 tell: Callable[[Notice], Outcome]) -> None:
        self._files, self._options, self._file, self._tell = files, options, file, tell
        is_each = options.to.startswith("exec:")  # with an environment of its own
        self._gather, self._most = (0.0, 1) if is_each else (self.GATHER, self.MOST)
        self._names: Dict[str, str] = {}
        self._renamed = self._reminded = -DAY  # when, by the monotonic clock
        self._ripe, self._stamp = 0.0, stamp_of(files.log)  # when it was read last
        self.state = self._load()

    def _load(self) -> Progress:
        """Return what the file says; a new receiver is told what comes from now on."""
        import json

        saved = os.pread(self._file, 512, 0)
        if not saved:
            note("this receiver is new: it is told what happens from now on")
            self._save(Progress(end_of_log(self._files.log), utc_text(time.time())))
            return self.state
        try:
            begin, since, end, *rest = json.loads(saved)
            state = Progress(Place(*begin), since, Place(*end), *rest)
            sum([*state.begin, *state.end, state.tries, state.due])  # or TypeError
            if not all(isinstance(number, int) and 0 <= number < 1 << 63 for number in (
                    state.begin.offset, state.end.offset, state.tries + 1)):
                raise ValueError
            return state._replace(since=since + "", id=state.id + "")
        except (ValueError, TypeError):
            raise TrackerError(f"{self._options.state} is damaged; remove it, to be "
                               "told what happens from now on") from None

    def _save(self, state: Progress) -> None:
        """Put down how far it is, in one write of one sector."""
        import json

        self.state = state
        os.pwrite(self._file, f"{json.dumps(state):<511}\n".encode(), 0)
        sync_data(self._file)

    def check(self) -> None:
        """Raise TrackerError where the receiver wants no more."""
        if self.state.tries < 0:
            raise TrackerError("the receiver is gone for good, it says (410); to begin "
                               f"anew, remove {self._options.state}")

    def look(self, at_once: bool = False) -> bool:
        """Tell what is due; return whether more may be. Raise OSError, TrackerError."""
        is_begun = self.state.id or self._begin(at_once)
        if not is_begun or 0 < self.state.due - time.time() <= DAY:  # not if clocks err
            return False
        news, reached = self._news()
        notice = Notice(self.state.id, self._with_names(news))
        outcome = self._told(notice) if news else Outcome()
        tries, why = self.state.tries, outcome.words
        if why and (outcome.is_gone or tries < len(self.RETRIES)):
            wait = min(max(self.RETRIES[tries], outcome.wait), DAY)
            self._save(self.state._replace(
                tries=-1 if outcome.is_gone else tries + 1, due=time.time() + wait))
            if not outcome.is_gone:
                note(f"{why}; to be told again in {lasting(wait)}")
            return False
        self._save(reached._replace(end=Place(), id="", tries=0, due=0.0))
        self._ripe = 0.0
        if why:
            note(f"{why}; given up: {notice.title()}")
        elif news:
            print(f"{utc_text(time.time())}  {notice.title()}", flush=True)
        return True

    def _begin(self, at_once: bool) -> bool:
        """Begin a notice where there is something to tell; return whether there is."""
        now, stamp, old = time.monotonic(), stamp_of(self._files.log), self._stamp
        is_idle = self._ripe == float("inf")
        if at_once or now >= self._ripe or is_idle and stamp != old:
            self._stamp, self._ripe = stamp, float("inf")
            if 0 != old.inode != stamp.inode and not at_once:
                self._ripe = now + self.ROTATED
            else:
                self._gather_opens(at_once)
        if not self.state.id and self._options.remind \
                and (at_once or now - self._reminded >= self.REMIND):
            self._reminded = now
            if self._reminders():
                self._give_id(Place())
        return self.state.id != ""

    def _gather_opens(self, at_once: bool) -> None:
        """Pass over what is no news, and begin a notice once all of it is gathered."""
        old, (news, reached) = self.state, self._news()
        while not news and reached != self.state:
            self.state = reached
            news, reached = self._news()
        if news:
            rest = self._gather - abs(time.time() - seconds(news[0].event.time))
            self._ripe = time.monotonic() + rest
            if at_once or rest <= 0 or len(news) >= self._most:
                self._give_id(reached.begin)
        elif self.state != old:
            self._save(self.state)

    def _give_id(self, end: Place) -> None:
        """Begin a notice that ends somewhere in the log."""
        notice_id = "msg_" + new_ids(os.urandom(16))[0]
        self._save(self.state._replace(end=end, id=notice_id))

    def _news(self) -> Tuple[List[News], Progress]:
        """Return what a notice tells, and how far the receiver then is."""
        state, gathering = self.state, Gathering(self._options)
        if state.id and state.end == Place():  # none are wanted any more, perhaps
            return self._reminders() if self._options.remind else [], state
        place = state.begin
        for file, offset, event in events_behind(self._files.log, place, state.since):
            gathering.take(event)
            place = place_at(file, offset)
            if os.fstat(file).st_size < offset:  # it was cut just now
                return [], state
            if len(gathering.opens) >= self._most or state.id \
                    and place.inode == state.end.inode and offset >= state.end.offset:
                break
        return list(gathering.news(self._files.log)), state._replace(
            begin=place, since=max(state.since, gathering.since))

    def _reminders(self) -> List[News]:
        """Return the next mails of which no open was seen for long enough."""
        before = time.time() - self._options.remind
        return list(islice(unopened(self._files, before), self._most))

    def _with_names(self, news: Sequence[News]) -> List[News]:
        """Return news with the names that their tags have by now."""
        now, ids = time.monotonic(), {each.event.id for each in news}
        if now - self._renamed >= self.RENAME or not ids <= self._names.keys():
            with suppress(OSError, TrackerError):  # a register may be damaged
                self._names = names_of(self._files)
            self._renamed = now
        return [each._replace(name=clean(self._names.get(each.event.id, ""))
                              or short(each.event.id, 80)) for each in news]

    def _told(self, notice: Notice) -> Outcome:
        """Tell it, and log reminders."""
        try:
            outcome = self._tell(notice)
            if notice.news[0].kind == "reminder" and not outcome.words:
                now = utc_text(time.time())
                append_events(self._files, [Event(now, "reminder", each.event.id)
                                            for each in notice.news])
            return outcome
        except (OSError, TrackerError, ValueError, RuntimeError) as error:
            return Outcome(explain(error))  # of a host's name, or of threads


# -- doctor: what is wrong with a set-up, and what to do --------------------------
# A check yields level, what is wrong and what to do; what ends it, and those that need
# it, it raises. Only the tracker's own URL and the resolver are asked, in bounded time
# and bytes, and what they answer is not trusted.

Found = Tuple[str, str, str]

PROBE = "mailtracker doctor: a probe"  # the name of a tag that is forgotten at once
REACH_SECONDS = 5.0
FETCH_SECONDS = 10.0
WAIT_SECONDS = 300.0    # for a hit from elsewhere
SLOW = 2.0              # seconds for a pixel, after which some readers have gone on
MOST_ADDRESSES = 8      # of a name
MOST_ANSWER = 1 << 16   # bytes
MOST_MAIL = 64 << 20    # bytes
GMAIL_CLIPS = 102 << 10  # bytes of HTML
FREE_SPACE = 50 << 20   # bytes

# Paths that EasyPrivacy (easylist.to, November 2026) blocks on any host.
_BLOCKED = (
    r"(?i)/(?:track/open|mailings/opened|(?:mail|view)-tracking|tracking_?pixel|webbug"
    r"|(?:_|api/|app/|v[12]/)tracking|tracking/(?:pixel|events|views)|emimp"
    r"|newsletter/log|(?:notifications|analytics)/beacons?)/|/track(?:ing)?pixel\."
    r"|/p1x1\.gif|://(?:track\.email\.|email\.[^/]*/o/)")
_CERTIFICATES = {  # by OpenSSL's codes (x509_vfy.h); 20 and 21 are of one cause
    9: "set this machine's clock, or wait until it begins",
    10: "renew it, and let the proxy read it again",
    62: "get one for this name, or give newtag the name that it is for",
    **dict.fromkeys((20, 21), "serve the whole chain (fullchain.pem): browsers fetch "
                    "what is missing, mail proxies do not")}
_AUTHENTICATIONS = {
    "spf": "let the SPF record of the envelope's domain name the server that sends",
    "dkim": "let the server that sends sign for {}, and publish its key",
    "dmarc": "publish a DMARC record for {} (v=DMARC1; p=none will do), and let SPF or "
             "DKIM pass for that domain"}
_URL_HOST = r"(?i)(?=https?://|www\.)(?:https?://)?(?:www\.)?([^/?#:\s]*)\S*"


class Finding(NamedTuple):
    """What a check says: an error, a warning, a note, or that it was skipped."""

    check: str
    level: str
    what: str
    advice: str = ""

    def text(self) -> str:
        """Return it in one line, and what to do in another."""
        advice = f"\n  to do: {clean(self.advice)}" if self.advice else ""
        return f"{self.level}: {self.check}: {clean(self.what)}{advice}"


def told(*cases: Tuple[object, str, str, str]) -> List[Found]:
    """Return of some cases those that are so: whether, level, what, what to do."""
    return [case[1:] for case in cases if case[0]]


@contextmanager
def probe(files: Files) -> Iterator[str]:
    """Lend a tag that is forgotten afterwards, whatever happens but kill -9.

    It stands in the log alone, as made a day ago: so no hit is taken for its sender's
    or for a scanner's.
    """
    def put(handler: Any) -> List[Any]:
        return [signal.signal(number, handler) for number in ending]

    ending = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    tag_id, = new_ids(os.urandom(32))
    made = Event(utc_text(time.time() - DAY), "made", tag_id, 0, 0, detail=PROBE)
    before = put(signal.default_int_handler)
    try:
        append_events(files, [made])
        yield tag_id
    finally:
        put(signal.SIG_IGN)
        try:
            forget_tags(files, [tag_id])
        finally:
            for number, handler in zip(ending, before):
                signal.signal(number, handler)


def hits_on(files: Files, tag_id: str) -> List[Event]:
    """Return the hits of a tag."""
    return [event for event in read_log(files.log, tag_id.encode())
            if event.event == "hit" and event.id == tag_id]


def addresses_of(host: str, port: int) -> List[str]:
    """Return the addresses of a host; raise TrackerError for none."""
    import socket

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TrackerError(f"no address of {host} is found: {error.strerror}; see that "
                           "its DNS has one, and that this machine asks it") from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))[:MOST_ADDRESSES]


def connection_to(address: str, port: int) -> socket.socket:
    """Connect to an address; raise OSError.

    To this machine itself from an address where no proxy is, if it has such a one.
    """
    import socket

    if address.startswith("127."):
        with suppress(OSError):
            return socket.create_connection((address, port), REACH_SECONDS,
                                            ("127.77.77.77", 0))
    return socket.create_connection((address, port), REACH_SECONDS)


def is_public(address: str) -> bool:
    """Tell whether everybody can reach an address."""
    from ipaddress import ip_address

    try:
        return ip_address(address.partition("%")[0]).is_global
    except ValueError:
        return False


def credited(address: str, own: str) -> Iterator[Found]:
    """Yield what is wrong with whom a server took for the client, as it is logged.

    own is who asked, as far as is known, and said that it was FORGED.
    """
    def is_of(client: str) -> bool:
        return address in (client, kept_address(client, "truncate"))

    is_own, is_forged = is_of(own), is_of(FORGED.decode())
    yield from told(
        (not address, "skipped", "the server keeps no addresses, so whom it takes for "
         "the reader cannot be told", ""),
        (address and is_forged and not is_own, "error",
         "a forged X-Forwarded-For is believed", "let the proxy overwrite that header, "
         "not pass it on, and --trusted-proxy name the proxy only"),
        (address and not (is_own or is_forged)
         and (is_public(own) or not is_public(address)), "error",
         f"every reader seems to come from {address}: that is the proxy",
         "name it with --trusted-proxy, and let it send X-Forwarded-For"))


def modes(files: Files) -> Iterator[Found]:
    """Yield which files others can read, or somebody else owns."""
    owner = os.stat(files.register).st_uid
    for path in (*files.versions, files.lock, *log_files(files.log), files.key,
                 files.links):
        others, mask = ("go", 0o077) if path == files.key else ("o", 0o007)
        with suppress(FileNotFoundError):
            mode, _, _, _, user, *_ = os.stat(path)
            yield from told(
                (user != owner, "error", f"{path} and {files.register} have two owners",
                 "give both to the user of the server, with chown"),
                (mode & mask, "warning", f"{path} is open to others",
                 f"chmod {others}= {path}"))


def answer_faults(reply: Any, body: bytes) -> Iterator[Found]:
    """Yield what is wrong with an answer to the GET of a pixel; raise if it is none."""
    kind = cut(reply.getheader("Content-Type", ""), 80)
    if 300 <= reply.status < 400:
        raise TrackerError(
            "the pixel's URL leads on to another, "
            f"{cut(reply.getheader('Location', '?'), 80)}; give newtag that one")
    if "html" in kind.lower():
        raise TrackerError("a web page comes instead of the pixel; let its path pass "
                           "whatever asks for a log-in, or checks browsers")
    if reply.status != 200:
        raise TrackerError(f"the pixel's URL answers {reply.status}; see whether the "
                           "server runs, and the proxy hands all of the path on to it")
    yield from told(
        (body != PIXEL, "error", f"what comes is not the pixel ({len(body)} bytes)",
         "switch off what changes pictures on the way"),
        (kind.lower() != "image/gif", "error", f"the pixel comes as '{kind}'",
         "let the proxy leave Content-Type as it is: image/gif"),
        ("no-store" not in reply.getheader("Cache-Control", "").lower(), "error",
         "the pixel may be kept in a cache: later opens will be missing",
         "let the proxy leave Cache-Control as it is, and keep nothing"),
        (reply.getheader("Set-Cookie"), "warning", "a cookie comes with the pixel",
         "let the proxy set none there: nobody has agreed to it"))


def authentication_faults(head: bytes) -> Iterator[Found]:
    """Yield what a receiver, by its topmost word (RFC 8601), held against a message."""
    results = [re.sub(r"\([^()]*\)", "", value).lower()
               for value in fields(head, "Authentication-Results")]
    if not results:
        yield ("warning", "no receiver says what it thinks of it",
               "save it in the mailbox that got it, as source or original")
        return
    judge = results[0].partition(";")[0].strip()
    sender = "".join(_found(_ANY_ADDRESS, head, "From")[:1]).rpartition("@")[2].lower()
    said: Dict[str, List[str]] = {}
    for value in results:
        if value.partition(";")[0].strip() == judge:
            for method, result in re.findall(
                    r";\s*(spf|dkim|dmarc)\s*=\s*(\w+)", value):
                said.setdefault(method, []).append(result)
    for method, found in said.items():
        yield from told((
            "pass" not in found, "error" if "fail" in found else "warning",
            f"{judge} says {method}={found[0]}",
            _AUTHENTICATIONS[method].format(sender)))
    signers = re.findall(r"(?:^|[;\n])[ \t]*d[ \t]*=[ \t]*([\w.-]+)", "\n".join(
        fields(head, "DKIM-Signature")).lower())
    if "pass" not in said.get("dmarc", []) and not any(
            f".{a}".endswith(f".{b}") for each in signers
            for a, b in ((each, sender), (sender, each))):
        yield ("warning", f"it is from {sender}, and signed by {', '.join(signers)}"
               if signers else "it is not signed (DKIM)",
               _AUTHENTICATIONS["dkim"].format(sender))


def masked_links(html: str) -> Iterator[Found]:
    """Yield links that show one URL and lead to another."""
    from html import unescape

    for (start, stop), text, _ in _anchors(html):
        target = re.match(_URL_HOST, unescape(html[start:stop]))
        shown = re.fullmatch(_URL_HOST, unescape(text).strip())
        if target and shown and target[1].lower() != shown[1].lower():
            yield ("warning", f"a link shows {cut(shown[0], 60)} and leads to "
                   f"{cut(target[0], 60)}", "mail programs warn of such links "
                   "as fraud: let it show words")


def pixels_in(html: str) -> Iterator[Tuple[str, str, int, str]]:
    """Yield id, URL, place and element of pictures in HTML that may be pixels."""
    from html import unescape

    for name, start, stop, values in _tags(html):
        url = unescape(html[slice(*values.get("src", (0, 0)))]) if name == "img" else ""
        for tag_id in ids_in_path(url.encode("utf-8", "replace"))[:1]:
            yield tag_id.decode(), url, start, html[start:stop]


class Doctor:
    """Examine a set-up; every check is a method, and what it is for its first line."""

    # In the order in which they are done, with those that each needs.
    CHECKS = {"files": "", "clock": "files", "path": "", "name": "",
              "certificate": "name", "pixel": "name certificate",
              "client": "files pixel", "wait": "files", "message": ""}
    UPON_REQUEST = ("wait", "message")

    def __init__(self, files: Files, url: str, message: str = "",
                 resolve: Callable[[str, int], List[str]] = addresses_of,
                 connect: Callable[[str, int], socket.socket] = connection_to) -> None:
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        self._files, self._url, self._message = files, url, message
        self._host, self._is_tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._resolve, self._connect = resolve, connect
        self._failed: Set[str] = set()

    def findings(self, names: Collection[str]) -> Iterator[Finding]:
        """Yield what some checks find."""
        for name, needed in self.CHECKS.items():
            if name in names:
                causes = [need for need in needed.split() if need in self._failed]
                yield from dict.fromkeys(self._done(name, causes))

    def _done(self, name: str, causes: Sequence[str]) -> Iterator[Finding]:
        """Do a check, unless others say that it is in vain."""
        if causes:
            self._failed.add(name)
            yield Finding(name, "skipped", f"did not run, as {causes[0]} failed")
            return
        try:
            for found in getattr(self, name)():
                yield Finding(name, *found)
        except (OSError, TrackerError) as error:
            self._failed.add(name)
            what, _, advice = explain(error).partition("; ")
            yield Finding(name, "error", what, advice or (
                "do it where the server's files are, and as its user"
                if getattr(error, "filename", None) else
                "see what the server and its proxy say"))

    @lru_cache(maxsize=1)
    def _latest(self) -> str:
        """Return the latest time in the register."""
        columns, rows = register_rows(self._files)
        cells = [cell_of(columns, column) for column in TIMES]
        return max((cell(row) for row in rows for cell in cells), default="")

    def files(self) -> Iterator[Found]:
        """Are register and log whole, in step, served, and yours alone?"""
        files, server = self._files, server_of(self._files)
        self._latest()
        space = os.statvfs(os.path.dirname(files.register))
        free = space.f_bavail * space.f_frsize
        left = [event.event for event in read_log(files.log, PROBE.encode())
                if event.detail == PROBE]
        yield from modes(files)
        yield from told(
            (free < max(FREE_SPACE, 3 * os.path.getsize(files.register)), "error",
             f"only {free >> 20} MB of the disk are free", "make room"),
            ("made" in left, "warning", "there is the probe of a doctor that runs, "
             "or was killed", f"in that case: mailtracker.py forget '{PROBE}'"),
            (not server, "error", f"no server counts in {files.register}",
             "start it: mailtracker.py server, with this --register"),
            (server and server[1:] != [__version__], "warning",
             f"this is version {__version__}, and the server is another",
             "start the server again"),
            (server and self._lags(), "warning",
             f"{files.register} stays behind its log",
             "see what the server says, on stderr and at /health"))

    def _lags(self) -> bool:
        """Tell whether the register has waited too long for what the log says now."""
        files, log = self._files, stamp_of(self._files.log)

        def is_behind() -> bool:
            register, bak, place = read_marks(files)
            return (register, bak) != (stamp_of(files.register), stamp_of(files.bak)) \
                or log.size > 0 and (log.inode != place.inode
                                     or log.size > place.offset) \
                or any(map(os.path.exists, (files.old, files.new)))

        deadline = time.monotonic() + 5 * SAVING
        while time.time() - os.stat(files.lock).st_mtime > UNSETTLED and is_behind():
            if time.monotonic() >= deadline:
                return True
            time.sleep(0.05)
        return False

    def clock(self) -> Iterator[Found]:
        """Is this machine's time right, as far as can be told?"""
        from subprocess import DEVNULL, PIPE, SubprocessError, run

        now = utc_text(time.time() + 60)
        if self._latest() > now or any(now.encode() < line < b":"
                                       for line in lines_of_log(self._files.log)):
            yield ("warning", "register or log tells of times to come",
                   "set this machine's clock, or correct those times")
        with suppress(OSError, SubprocessError):
            said = run(["timedatectl", "show", "-p", "NTPSynchronized", "--value"],
                       stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, timeout=5,
                       check=False).stdout
            if said.strip() == b"no":
                yield ("warning", "this machine's clock follows no time server",
                       "timedatectl set-ntp true")

    def path(self) -> Iterator[Found]:
        """Do blockers of trackers let the pixel's URL pass?"""
        for found in re.finditer(_BLOCKED, self._url):
            yield ("warning", f"lists such as EasyPrivacy block {found[0]}",
                   "choose another --path for newtag, or another name")

    def name(self) -> Iterator[Found]:
        """Does every address of the server's name answer, and to everybody?"""
        self._reached()
        for address, error in self._addresses().items():
            if is_loopback(address):
                yield ("warning", f"{self._host} is this machine itself, for trying",
                       "for mail to others, name a --server that they can reach")
                continue
            is_far = error and error.errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL)
            yield from told(
                (not is_public(address), "error", f"{address} of {self._host} is "
                 "private: nobody outside can reach it", "let its DNS name a public "
                 "address; if it does, but not here, --wait will tell"),
                (is_far, "skipped", f"{address}: no way leads there from here", ""),
                (error and not is_far, "error", f"{address} of {self._host} does not "
                 f"answer: {explain(error) if error else ''}", "let the server or its "
                 "proxy listen there, or take it out of the DNS: who gets this address "
                 "sees no pixel"))

    @lru_cache(maxsize=1)
    def _addresses(self) -> Dict[str, Optional[OSError]]:
        """Return the addresses of the name, each with what is wrong with it."""
        found: Dict[str, Optional[OSError]] = {}
        for address in self._resolve(self._host, self._port):
            found[address] = None
            try:
                self._connect(address, self._port).close()
            except OSError as error:
                found[address] = error
        return found

    def _reached(self) -> List[str]:
        """Return the addresses that answer; raise TrackerError for none."""
        found = self._addresses()
        if all(found.values()):
            errors = {explain(error): None for error in found.values() if error}
            raise TrackerError(
                f"nothing answers at {self._host}, port {self._port}: "
                f"{', '.join(errors)}; start the server, or open the way to it")
        return [address for address, error in found.items() if not error]

    def _line(self, address: str) -> socket.socket:
        """Return a connection to an address, and where it is TLS a verified one."""
        line = self._connect(address, self._port)
        line.settimeout(FETCH_SECONDS)
        if not self._is_tls:
            return line
        import ssl

        try:
            return ssl.create_default_context().wrap_socket(
                line, server_hostname=self._host)
        except ssl.SSLCertVerificationError as error:
            advice = _CERTIFICATES.get(
                error.verify_code, "get one that everybody trusts: Let's Encrypt's")
            raise TrackerError(f"no mail proxy trusts the certificate at {address}: "
                               f"{error.verify_message}; {advice}") from None
        except ssl.SSLError as error:
            raise TrackerError(f"no TLS at {address}: {error.reason}; let it speak TLS "
                               f"on port {self._port}, or say http://") from None

    def certificate(self) -> Iterator[Found]:
        """Do mail proxies trust the certificate, and will they next week?"""
        if not self._is_tls:
            return
        from ssl import cert_time_to_seconds

        for address in self._reached():
            with time_limit(FETCH_SECONDS), self._line(address) as line:
                shown = line.getpeercert()  # type: ignore[attr-defined]
            start, end = (cert_time_to_seconds(shown[name])
                          for name in ("notBefore", "notAfter"))
            left = end - time.time()
            yield from told((left < min(14 * DAY, (end - start) / 5), "warning",
                             f"the certificate ends in {lasting(left)}",
                             "renew it, and see why nothing does so by itself"))

    def _fetch(self, address: str, tag_id: str, **more: str) -> Tuple[Any, bytes, str]:
        """Return the answer to the GET of a pixel, its body, and who asked."""
        from http.client import HTTPConnection
        from urllib.parse import urlsplit

        url = urlsplit(self._url.replace("{id}", tag_id))
        header = {"Host": url.netloc, "User-Agent": "mailtracker-doctor",
                  "Connection": "close"}
        connection = HTTPConnection(self._host)
        with time_limit(FETCH_SECONDS), self._line(address) as connection.sock:
            own = plain_address(connection.sock.getsockname()[0])
            return *answer_of(
                connection, "GET", url._replace(scheme="", netloc="").geturl(), None,
                {**header, **more}, most=MOST_ANSWER), own

    def pixel(self) -> Iterator[Found]:
        """Does the pixel come from every address, as it is, at once?"""
        tag_id, = new_ids(os.urandom(32))
        for address in self._reached():
            begun = time.monotonic()
            reply, body, _ = self._fetch(address, tag_id)
            took = time.monotonic() - begun
            yield from answer_faults(reply, body)
            yield from told((took > SLOW, "warning",
                             f"the pixel took {took:.1f} s from {address}",
                             "see what holds it up: some readers do not wait"))

    def client(self) -> Iterator[Found]:
        """Does the server know readers from its proxy, and from what they claim?"""
        with probe(self._files) as tag_id:
            _, _, own = self._fetch(self._reached()[0], tag_id,
                                    **{"X-Forwarded-For": FORGED.decode()})
            hits = hits_on(self._files, tag_id)
        if not hits:
            raise TrackerError(f"a pixel was fetched, but no hit came into "
                               f"{self._files.log}; name the server's own --register, "
                               "and its own --server")
        yield from credited(hits[-1].address, own)

    def wait(self) -> Iterator[Found]:
        """Does a hit from elsewhere arrive? (--wait)"""
        hits: List[Event] = []
        deadline = time.monotonic() + WAIT_SECONDS
        with probe(self._files) as tag_id:
            note(f"open this on a phone, Wi-Fi off, within {WAIT_SECONDS / 60:.0f} "
                 f"minutes; Ctrl-C ends it: {self._url.replace('{id}', tag_id)}")
            while time.monotonic() < deadline \
                    and all(hit.verdict == "machine" for hit in hits):
                time.sleep(0.2)
                hits = hits_on(self._files, tag_id)
        if not hits:
            raise TrackerError("nothing came; see that the name, the router and the "
                               "firewall lead from outside to the server")
        for hit in hits[-9:]:
            yield ("note", f"a hit came from {hit.address or 'an address not kept'}: "
                   f"{hit.verdict}, {REASONS.get(hit.reason, hit.reason)}", "")
            if hit.address and not is_loopback(self._host):
                yield from credited(hit.address, "")

    def message(self) -> Iterator[Found]:
        """Did a mail arrive with its pixel, and in honour? (--message FILE)"""
        with open(self._message, "rb") as file:
            raw = file.read(MOST_MAIL)
        parts = split(raw)
        part = _html_part(parts)
        html = part_text(raw, part) if part else ""
        if not fields(parts[0].head, "Received"):
            is_tagged = any(True for _ in pixels_in(html))
            yield ("warning", "nobody received this: it is your own copy, with"
                   f"{'' if is_tagged else 'out'} a pixel", "your own looks at it are "
                   "hits: keep one without, as relay does" if is_tagged else
                   "rightly so; to have the mail judged, save it where it arrived")
            return
        yield from authentication_faults(parts[0].head)
        yield from masked_links(html)
        yield from self._pixel_in(html)

    def _pixel_in(self, html: str) -> Iterator[Found]:
        """Yield what is wrong with the pixel in the HTML of a mail."""
        found = list(pixels_in(html))
        known = names_of(self._files) if found else {}
        ours = [pixel for pixel in found if pixel[0] in known]
        if not ours:
            raise TrackerError(
                f"its tag {found[0][0]} is not in {self._files.register}; name the "
                "--register that has it" if found else
                "there is no pixel in it; send it as HTML, with a tag")
        _, url, at, element = ours[0]
        yield from told(
            (not url.startswith("https:"), "warning", "its pixel comes by http",
             "serve it by https: some programs load nothing else"),
            (re.search(r"(?i)display\s*:\s*none|visibility\s*:\s*hidden", element),
             "error", "its pixel is hidden by its style",
             "leave that out: Gmail, for one, never loads what is hidden"),
            (len(html[:at].encode("utf-8", "replace")) > GMAIL_CLIPS, "error",
             "its pixel comes after 102 KB of HTML, where Gmail cuts a mail off",
             "put it at the beginning, or write less"))


# ---------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------
# A command is one cmd_ function, which prints results and nothing else, and one add_
# function with its options. What is wrong is raised; main says it.


def cmd_newtag(options: argparse.Namespace) -> int:
    """Make tags and print them."""
    if not options.server:
        note("this tag works only on this machine; "
             "say --server HOST for one that others can reach")
    base = base_url(options.server or "localhost", options.port)
    template = tag_template(base, options.path, options.format)
    people = People(options.names_from) if options.names_from else None
    names = people.names if people else [options.name] * options.count
    ids, now = new_ids(os.urandom(32), len(names)), utc_text(time.time())
    files, templates = Files(options.register, options.events), [template]
    if options.link:
        _ensure_register(files)
        links = hrefs_of(Links(files.links), base, options.path, "{id}", options.link)
        templates += [links.get(url, url) for url in options.link]
    if ids:
        add_tags(files, list(zip(ids, map(one_line, names))),
                 Making(now, now if options.armed else ""))
    form = "\n".join(templates)
    texts = [form.replace("{id}", tag_id) for tag_id in ids]
    print_lines(people.with_tags(ids, texts) if people else texts)
    if options.copy:
        copy_to_clipboard("\n".join(texts), options.format)
    return 0


def one_line(name: str) -> str:
    """Return a name as it can stand in a row and in a line of the log."""
    return name if name.isprintable() else re.sub(
        r"[\0-\x1f\x7f-\x9f\u2028\u2029]+", " ", plain_text(name))


class People:
    """A CSV file with a row for each person who gets a tag; "-" is standard input.

    Raise TrackerError for a file or row that cannot be used.
    """

    def __init__(self, path: str) -> None:
        source, name = (0, "standard input") if path == "-" else (path, path)
        table = self._table = Table(source, name, strict=True)
        titles = [column.strip().lower() for column in table.columns]
        for taken in {"id", "tag"}.intersection(titles):
            raise TrackerError(f"{name} has a column {taken} already")
        if not titles:
            raise TrackerError(f"{name} has no header row")
        place = next((titles.index(title) for title in ("name", "email")
                      if title in titles), 0)
        self._rows: List[str] = []
        self.names: List[str] = []
        for raw, cells in progress(table, "reading rows"):
            if not cells:
                continue
            if "\0" in raw:
                raise table.error("not text")
            if len(cells) != len(titles):
                raise table.error(f"{plural(len(cells), 'cell')} "
                                  f"under {plural(len(titles), 'column')}")
            if not cells[place].strip():
                raise table.error(f"no {table.columns[place].strip()}")
            self._rows.append(cell_text(raw).rstrip("\r\n"))
            self.names.append(cell_text(cells[place]))

    def with_tags(self, ids: Iterable[str], tags: Sequence[str]) -> Iterator[str]:
        """Yield the lines of the file as they stand, with ids and tags added.

        A tag has its links in further lines; they get columns of their own.
        """
        set_stdout("utf-8")
        show = clean if sys.stdout.isatty() else str
        head, d = cell_text(self._table.header).rstrip("\r\n"), self._table.delimiter
        links = distinct(["link"] * tags[0].count("\n")) if tags else []
        added = chain([("id", "tag", *links)], (
            (tag_id, *tag.split("\n")) for tag_id, tag in zip(ids, tags)))
        for row, cells in zip([head, *self._rows], added):
            yield show(row) + d + csv_row(cells, d, self._table.eol.rstrip("\n"))


def set_stdout(encoding: Optional[str] = None) -> None:
    """Let stdout escape what it cannot show; give it an encoding, if it is no terminal.

    PYTHONUNBUFFERED must not make a write of each cell.
    """
    from io import TextIOWrapper

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else encoding,
                               errors="backslashreplace", write_through=False)


# Which tool can put what on the clipboard: the variable that says it is of use here,
# the command, and what it needs for HTML, if it can.
CLIPBOARDS = (("WAYLAND_DISPLAY", "wl-copy", "--type text/html"),
              ("DISPLAY", "xclip -selection clipboard", "-t text/html"),
              ("PATH", "pbcopy", ""))


def copy_to_clipboard(text: str, form: str) -> None:
    """Put text on the clipboard, as HTML where form and tool allow it."""
    from shutil import which
    from subprocess import DEVNULL, run

    for variable, command, for_html in CLIPBOARDS:
        tool, *words = f"{command} {for_html if form == 'html' else ''}".split()
        if os.environ.get(variable) and which(tool):
            if run([tool, *words], input=text.encode(), check=False,
                   stdout=DEVNULL, stderr=DEVNULL).returncode:
                raise TrackerError(
                    f"{tool} could not copy the tag; take it from the screen")
            return note("copied as HTML" if form == "html" and for_html
                        else "copied as plain text")
    raise TrackerError("no clipboard here: install wl-copy or xclip, "
                       "or take the tag from the screen")


SAMPLES = {"sample.html": """\
Subject: News for {Name|you}

<p>Dear {Name|friend},</p>
<p>your balance is {Amount:,.2f}. More is on <a href="https://example.org">our
page</a>.</p>
""", "sample.csv": """\
email,name,amount
ann@example.org,Ann,1234.5
bob@example.org,,20
"""}


def cmd_send(options: argparse.Namespace) -> int:
    """Send each person of a list one mail, with a pixel of its own."""
    if options.sample:
        return write_samples()
    if not options.recipients:
        options.parser.error("say which TEMPLATE and which RECIPIENTS.csv; "
                             "--sample makes both to begin with")
    mailing = Mailing(options)
    people = checked_people(mailing, options)
    if options.preview:
        return write_mails(options.preview, mailing, people)
    if options.test:
        return send_test(mailing, people[0], options)
    files = Files(options.register, options.events)
    if not options.yes:
        return show_plan(Plan(files, mailing, people, options), mailing, options)
    return send_all(files, mailing, people, options)


def write_samples() -> int:
    """Write a template and a list to begin with, where there are none."""
    for name, text in SAMPLES.items():
        try:
            with open(name, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise TrackerError(f"{name} is there already") from None
    print("wrote sample.html and sample.csv; see what they make: mailtracker.py send "
          "sample.html sample.csv --from you@example.org --server t.example.org")
    return 0


def checked_people(mailing: Mailing, options: argparse.Namespace) -> List[Recipient]:
    """Return the people of a list; raise TrackerError if one's mail cannot be made."""
    problems: Problems = {}
    people = recipients(options.recipients, options.where, problems)
    for who in progress(people, "checking rows"):
        mailing.message(who, lambda what: problems.setdefault(what, []).append(who.row))
    for what, rows in problems.items():
        rows = sorted({*rows})
        more = f" and {len(rows) - 20} more" if len(rows) > 20 else ""
        numbers = ", ".join(map(str, rows[:20]))
        note(f"row{'s' * (len(rows) > 1)} {numbers}{more}: {what}")
    if problems or not people:
        why = f"{plural(len(problems), 'problem')}, see above," if problems \
            else "nobody"
        raise TrackerError(f"nothing was sent: {why} in {options.recipients}")
    # Until they have tags, their pixels have ids that no register knows.
    return [who._replace(id=tag_id) for who, tag_id in zip(
        people, new_ids(os.urandom(32), len(people)))]


def write_mails(folder: str, mailing: Mailing, people: Sequence[Recipient]) -> int:
    """Write the mails into a folder."""
    os.makedirs(folder, exist_ok=True)
    for number, who in enumerate(people, 1):
        with open(os.path.join(folder, f"{number:03}.eml"), "wb") as file:
            file.write(mailing.message(who, is_final=True)[0])
    print(f"wrote {plural(len(people), 'mail')} to {folder}; their pixels do not count")
    return 0


def send_test(mailing: Mailing, who: Recipient, options: argparse.Namespace) -> int:
    """Send one person's mail to another address."""
    smarthost = smarthost_of(options)
    reply = mailing.hand_over(smarthost, who._replace(address=options.test))
    smarthost.close()
    if not reply.is_ok:
        raise TrackerError(f"the smarthost says: {reply}")
    print(f"sent the mail of row {who.row} to {options.test}; its pixel does not count")
    return 0


def show_plan(plan: Plan, mailing: Mailing, options: argparse.Namespace) -> int:
    """Show what would be sent, and change nothing."""
    emptiest = sorted(plan.mails, key=lambda who: sum(map(bool, who.cells.values())))
    for who in {who.row: who for who in plan.mails[:1] + emptiest[:1]}.values():
        raw, why = mailing.message(who)
        print(f"-- row {who.row} ".ljust(78, "-"))
        print_lines(map(clean, mail_lines(raw)))
        print(f"[{f'no pixel: {why}' if why else 'with a pixel'}]\n")
    print_lines(map(clean, plan.words()))
    length = lasting(len(plan.mails) * options.rate) if options.rate \
        else "as long as the smarthost needs"
    print(f"it would take {length}; nothing was sent: say --yes to send")
    return 0


def send_all(files: Files, mailing: Mailing, people: Sequence[Recipient],
             options: argparse.Namespace) -> int:
    """Send what is to be sent, when it is to be sent; say what became of it."""
    pause = Signals(None).wait
    if time.time() < options.at:
        note(f"waiting until {time.ctime(options.at)}; Ctrl-C ends that")
    while time.time() < options.at:  # the clock may be set meanwhile
        if pause(min(60.0, max(0.0, options.at - time.time()))):
            raise TrackerError("stopped before the first mail")
    path = f"{files.register}.{hash_of(mailing.campaign)[:8]}.send"
    with lock_of(0.0, path, flags=os.O_RDWR | os.O_CREAT) as held:
        if held < 0:
            raise TrackerError(f"another send is at the campaign {mailing.campaign}")
        try:
            plan = Plan(files, mailing, people, options)
            return carry_out(plan, Delivery(
                files, mailing, smarthost_of(options), plan.is_barred, pause,
                options.rate), files)
        finally:
            os.unlink(path)


def carry_out(plan: Plan, delivery: Delivery, files: Files) -> int:
    """Send what is planned, and say what became of it."""
    from shlex import join

    plan.commit()
    for words in plan.words():
        note(words)
    worker = Worker(files, 0)  # a mailing may take hours
    worker.start()
    try:
        left = delivery.run(plan.mails)
    finally:
        worker.stop()
    sent, failed, unknown, skipped = delivery.count.values()
    print(f"{sent} sent, {failed} failed, {left} left of {len(plan.mails)}"
          + f"; {unknown} may or may not have gone" * bool(unknown)
          + f"; {skipped} skipped: no more mail wanted, or no mailbox" * bool(skipped))
    if left:
        note(f"{delivery.words or 'the smarthost has put them off'}; "
             f"to go on: {join(sys.argv)}")
    return int(left + unknown + len(plan.unknown) > 0)


def cmd_dump(options: argparse.Namespace) -> int:
    """Show the register, one tag with its history, or the event log."""
    files = Files(options.file or options.register, options.events)
    if options.follow:
        return follow(files, options)
    if options.log:
        return dump_log(files, options)
    columns, rows = register_rows(files)
    chosen = in_order(columns, wanted_rows(
        columns, watched(rows, "reading rows", options), options), options)
    if options.id and options.format == "table":
        chosen = list(chosen)
        if len(chosen) == 1:
            log = progress(read_log(files.log), "reading the log")
            tag_id = chosen[0][columns.index("id")]
            return print_lines(history_lines(columns, chosen[0], [
                event for event in log if event.id == tag_id], options,
                Links(files.links).find))
    zone = "/".join(dict.fromkeys(time.tzname)) if options.local else "UTC"
    return print_rows(columns, chosen, options, tag_lines(
        columns, chosen, options.limit, screen_width(options.full), zone))


def dump_log(files: Files, options: argparse.Namespace) -> int:
    """Show the event log."""
    if not log_files(files.log):
        raise TrackerError(f"no such event log: {files.log}")
    events = wanted_events(watched(read_log(files.log), "reading the log", options),
                           names_of(files) if options.name else {}, options)
    cells = (["" if cell is None else str(cell) for cell in event] for event in events)
    rows = in_order(EVENT_COLUMNS, cells, options)
    return print_rows(EVENT_COLUMNS, rows, options, log_lines(
        map(Event._make, islice(rows, options.limit)), screen_width()))


def follow(files: Files, options: argparse.Namespace) -> int:
    """Print each event as it comes, for ever; with a time, those since then first."""
    options.since = options.since or utc_text(time.time())
    names, screen = names_of(files), screen_width()
    shown_time = local_time if options.local else str
    for news in events_as_they_come(files.log):
        if news.event == "made":
            names[news.id] = news.detail
        for event in wanted_events([news], names, options):
            print(clean("  ".join((
                shown_time(event.time), short(event.id, screen),
                names.get(event.id, ""), ": ".join(words(event, REASONS)),
                event.address)).rstrip()), flush=True)
    return 0


def events_as_they_come(path: str) -> Iterator[Event]:
    """Yield the events of a log, and those to come, for ever."""
    place, since = Place(), ""
    while True:
        known = place
        for file, offset, event in events_behind(path, place, since):
            yield event
            place, since = place_at(file, offset), max(since, event.time)
        if place == known:
            time.sleep(0.2)


def watched(items: Iterable[Item], what: str, options: argparse.Namespace
            ) -> Iterable[Item]:
    """Show progress on items, unless they go straight to a terminal themselves."""
    are_shown = sys.stdout.isatty() and not (
        options.sort or options.reverse or options.id)
    return items if are_shown else progress(items, what)


def print_lines(lines: Iterable[str]) -> int:
    """Print lines as they come; return the exit code of a command that only does so."""
    sys.stdout.writelines(line + "\n" for line in lines)
    return 0


def print_rows(columns: Sequence[str], rows: Iterable[Row],
               options: argparse.Namespace, table: Iterable[str]) -> int:
    """Print the table, or its rows as CSV or JSON."""
    if options.format == "table":
        return print_lines(table)
    set_stdout("utf-8")
    rows = islice(rows, options.limit)
    if options.format == "json":
        sys.stdout.writelines(json_lines(columns, rows))
    else:
        rows = defused(columns, chain([[*columns]], rows))
        csv.writer(sys.stdout, lineterminator="\n").writerows(
            (map(clean, row) for row in rows) if sys.stdout.isatty() else rows)
    return 0


def cmd_report(options: argparse.Namespace) -> int:
    """Say how much of the mail was opened, and how much cannot be known."""
    if options.compare and not options.by:
        options.by = "variant" if options.campaign else "campaign"
    report = Report(Files(options.register, options.events), options)
    if options.format == "json":
        import json

        sys.stdout.writelines(chain(json.JSONEncoder(indent=1).iterencode(
            report_values(report, options.compare)), "\n"))
    elif options.format == "csv":
        set_stdout("utf-8")
        csv.writer(sys.stdout, lineterminator="\n").writerows(
            map(clean, map(escape_formula, row))
            for row in report_rows(report, options.compare))
    elif options.format == "html":
        set_stdout("utf-8")
        print(report_page(report, options.compare), end="")
    else:
        print_lines(report_lines(report, options.compare, screen_width()))
    return 0


def cmd_scan(options: argparse.Namespace) -> int:
    """Find in a mailbox which mail bounced or was answered."""
    files = Files(options.register, options.events)
    register_path(files)
    if not options.follow:
        return print_lines(scan_lines(files, options, set()))
    if options.mailbox == "-":
        options.parser.error("--follow needs a mailbox; - is read once")
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        follow_mailbox(files, options)
    return 0


def follow_mailbox(files: Files, options: argparse.Namespace,
                   pause: Callable[[float], object] = time.sleep) -> None:
    """Scan a mailbox again and again; a Maildir, which is near, each second.

    What is wrong is raised the first time, but a mailbox that is not there yet is
    waited for; later on it is noted, once until it changes.
    """
    seen: Set[Any] = set()
    is_begun, said = False, ""
    while True:
        try:
            by_now = {*seen}
            *lines, _ = scan_lines(files, options, by_now)
            seen = by_now  # only now: what was found is in the log
            is_begun, said = True, ""
        except (TrackerError, OSError) as error:
            if not is_begun and not isinstance(error, FileNotFoundError):
                raise
            lines, before = [], said
            said = explain(error) + "; waiting for it" * (not is_begun)
            if said != before:
                note(said)
        for line in lines:
            print(line, flush=True)
        is_far = "://" in options.mailbox or os.path.isfile(options.mailbox)
        pause(60.0 if is_far else 1.0)


def scan_lines(files: Files, options: argparse.Namespace, seen: Set[Any]
               ) -> Iterator[str]:
    """Log what a mailbox newly says of tags; yield that in words, and what was read."""
    @lru_cache(maxsize=None)
    def known() -> Known:
        return Known(files)

    found: Dict[Tuple[Any, ...], Event] = {}
    counts = {True: 0, False: 0}  # messages that could be read, and others
    oldest = options.since if os.path.isfile(options.mailbox) else ""
    messages = messages_in(options, lambda raw: known().matters(raw), seen)
    for raw in progress(messages, "reading messages"):
        counts[raw is not None] += 1
        if raw and known().matters(raw):
            found.update((event[:3], event) for event in read_mail(raw, known())
                         if event.time >= oldest)
    for kind in {event.event for event in found.values()}:
        for event in read_log(files.log, f",{kind},".encode()):
            found.pop(event[:3], None)
    if found and not options.dry_run:
        append_events(files, sorted(found.values()))
        settle(files)
    for event in sorted(found.values()):
        yield clean("  ".join((
            event.time, short(event.id, screen_width()), known().names[event.id],
            f"{event.event}: {event.detail or words(event)[1]}")))
    yield f"{plural(len(found), 'new event')} in {plural(counts[True], 'message')}" + (
        f", {counts[False]} could not be read" * bool(counts[False])
        + "; nothing was changed: this was a dry run" * options.dry_run)


def cmd_rejudge(options: argparse.Namespace) -> int:
    """Judge the hits again by today's rules, and correct the opens."""
    files = Files(options.register, options.events)
    if not log_files(files.log):
        raise TrackerError(f"no such event log: {files.log}")
    if options.dry_run:
        print_lines(corrections_of(files, lambda found: sum(1 for _ in found)))
        print("nothing was changed: this was a dry run")
        return 0
    register_path(files)
    with server_lock(files):
        print_lines(corrections_of(files, lambda found: append_events(files, found)))
        settle(files)
    return 0


def corrections_of(files: Files, use: Callable[[Iterable[Event]], object]
                   ) -> Iterator[str]:
    """Let corrections of the log be used; yield in words what they come to."""
    tags = dict(progress(read_register(files).tags(), "reading rows"))
    changed: Dict[Tuple[str, str], int] = {}
    opens: Dict[str, int] = {}

    def counted() -> Iterator[Event]:
        for event in rejudge(
                lambda word: progress(lines_of_log(files.log, word), "judging"), tags):
            opens[event.id] = event.opens or 0
            if event.event == "verdict":
                what = event.verdict, event.reason
                changed[what] = changed.get(what, 0) + 1
            yield event

    use(counted())
    yield f"{plural(sum(changed.values()), 'hit')} judged differently"
    for (verdict, reason), count in sorted(changed.items(), key=lambda item: -item[1]):
        yield f"{count:10}  {verdict}: {REASONS.get(reason, reason)}"
    more = sum(count - tags[tag_id].opens for tag_id, count in opens.items())
    yield f"{more:+10}  {'open' if abs(more) == 1 else 'opens'}, " \
        f"on {plural(len(opens), 'tag')}"


def cmd_forget(options: argparse.Namespace) -> int:
    """Remove tags with everything that is known about them."""
    files = Files(options.register, options.events)
    columns, rows = register_rows(files)
    chosen = list(chosen_rows(columns, progress(rows, "reading rows"), options))
    ids = {row[columns.index("id")] for row in chosen}
    if not ids:
        print("nothing to forget")
        return 0
    events = sum(event.id in ids
                 for event in progress(read_log(files.log), "reading the log"))
    print_lines(tag_lines(columns, chosen, None, screen_width()))
    print(f"with {plural(events, 'event')} in the log, for good, "
          "and in the backup as well")
    if options.dry_run:
        print("nothing was changed: this was a dry run")
        return 0
    if not options.yes and not confirmed("forget them? [y/N] "):
        raise TrackerError("nothing was forgotten")
    forget_tags(files, ids)
    print(f"forgot {plural(len(ids), 'tag')}")
    return 0


def confirmed(question: str) -> bool:
    """Ask a person; raise TrackerError where there is none."""
    if not sys.stdin or not sys.stdin.isatty():
        raise TrackerError("there is nobody to ask here: say --yes, or --dry-run first")
    print(question, end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def chosen_rows(columns: Sequence[str], rows: Iterable[Row],
                options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows to forget; raise TrackerError for a word that means no tag."""
    tag_id, name, created, last_hit = map(
        columns.index, ("id", "name", "created", "last_hit"))
    words, found = set(options.tags), set()
    status = cell_of(columns, "status")
    for row in rows:
        meant = {row[tag_id], row[name] or row[tag_id]} & words
        meant.update(word for word in words
                     if len(word) >= 7 and row[tag_id].startswith(word))
        found |= meant
        is_kept = status(row) in ("bounced", "unsubscribed")  # send needs that
        made = "" if is_kept else row[created] or row[last_hit]
        if meant or made and made < (options.older_than or ""):
            yield row
    if words - found:
        raise TrackerError(f"no such tag: {clean(min(words - found))}; "
                           "nothing was forgotten")


def cmd_settle(options: argparse.Namespace) -> int:
    """Bring the register up to date with the log."""
    files = Files(options.register, options.events)
    if options.worker:
        worker(files, options.rotate_events)
        return 0
    if not os.path.exists(files.log):
        register_path(files)  # or it is a name that somebody mistyped
    if not settle(files):
        raise TrackerError(f"somebody else is at {options.register}; try again")
    return 0


def refuse(options: argparse.Namespace, *cases: Tuple[object, str]) -> None:
    """Exit with usage and words in the first case that is so."""
    for wrong, words in cases:
        if wrong:
            options.parser.error(words)


def argument(read: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    """Return an argparse type: what read makes of a text, or an error in words."""
    def value(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, OverflowError, OSError):
            raise argparse.ArgumentTypeError(f"{text} is not {what}") from None
    return value


def number_in(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers of a range."""
    def number(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError
        return int(text)
    return argument(number, f"a number from {low} to {high}")


def _size(text: str) -> int:
    size = matching(r"(?i:(\d{1,9})([KMG])B?)", text)
    return int(size[1]) << {"K": 10, "M": 20, "G": 30}[size[2].upper()]


def _network(text: str) -> Any:
    import ipaddress

    return ipaddress.ip_network(text, strict=False)


def _template(text: str) -> str:
    path, sample = text if text.startswith("/") else "/" + text, new_ids(bytes(16))[0]
    whole = path.replace("{id}", sample).encode()
    if sample.encode() not in ids_in_path(whole) or _UNSUBSCRIBING.search(whole):
        raise ValueError
    return path


def _rate(text: str) -> float:
    found = matching(r"([1-9]\d{0,5})/(s|m|h|d)\w*", text)
    return _UNITS[found[2]] / int(found[1])


def _condition(text: str) -> Tuple[str, str]:
    found = matching(r"([^=]+)=((?s:.*))", text.lower())
    return " ".join(found[1].split()), found[2]


size_argument = argument(_size, "a size such as 100M")
network_argument = argument(_network, "an address or network such as 10.0.0.0/8")
smarthost_argument = argument(_host_and_port, "a mail server such as smtp.x.org:587")
moment_argument = argument(moment, "a time such as 2026-11-01, 3d or 12h")
rate_argument = argument(_rate, "a rate such as 20/min, 300/h or 2/s")
local_argument = argument(
    lambda text: time.mktime(time.strptime(text, "%Y-%m-%d %H:%M")),
    "a time such as '2026-11-24 09:00'")
condition_argument = argument(_condition, "a condition such as city=B*")
link_argument = argument(
    lambda text: matching("(?:https?://|mailto:)[!-;=?-~]{1,900}", text)[0],
    "a link that begins with https:// or mailto:")
check_argument = argument(
    lambda text: matching("|".join(Doctor.CHECKS), text)[0],
    "a check: doctor --list-checks names them")
address_argument = argument(address_in, "a mail address")
mailbox_argument = argument(mailbox_in, "an address such as 'Ann <ann@x.org>'")
template_argument = argument(
    _template, "a path with {id} as a segment, such as /img/{id}/logo.gif")


class Parser(argparse.ArgumentParser):
    """A parser that shows short usage before an error, and fits 80 columns.

    Looking for the real width of the screen costs a short command 6 ms.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=lambda prog:
                         argparse.HelpFormatter(prog, width=78), **settings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with a command line, and exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"mailtracker: error: {clean(message)}\n")


def add_command(commands: Any, run: Callable[[argparse.Namespace], int], example: str,
                operands: str = "") -> argparse.ArgumentParser:
    """Add the parser of a command; what it does is its first docstring line."""
    name = run.__name__.partition("_")[2]
    about = (run.__doc__ or "").partition("\n")[0]
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about[:1].lower() + about[1:].rstrip("."), description=about,
        usage=f"mailtracker.py {name} [options] {operands}".rstrip(),
        epilog=f"example: mailtracker.py {name} {example}")
    parser.add_argument(
        "--register", "--csvfile", metavar="FILE",
        default=os.environ.get("MAILTRACKER_REGISTER") or DEFAULT_REGISTER,
        help="the register (default: $MAILTRACKER_REGISTER, else register.csv)")
    parser.add_argument(
        "--events", metavar="FILE", default="",
        help="the event log (default: register.events.csv beside the register)")
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_newtag(commands: Any) -> None:
    """Add the options of newtag."""
    add = add_command(commands, cmd_newtag,
                      "--name john --server https://t.example.org").add_argument
    add("--name", default="", help="what you will know the tag by")
    add_pixels(add)
    add("--port", type=number_in(1, 65535),
        help=f"the port in the URL (default: {DEFAULT_PORT} for a bare host)")
    add("--format", choices=list(TAG_FORMATS), default="html",
        help="what to print (default: %(default)s)")
    add("--count", metavar="N", type=number_in(1, 1000000), default=1,
        help="make so many tags")
    add("--names-from", metavar="FILE",
        help="make a tag for each row of a CSV file, by its column name, email, or "
        "else the first; print the file with id and tag added; - reads stdin")
    add("--armed", action="store_true",
        help="the mail goes straight out: no hit is taken for your own while writing")
    add("--link", metavar="URL", action="append", default=[],
        type=argument(destination, "a web address such as https://x.org/page"),
        help="print a link to there that counts clicks as well; may be repeated")
    add("--copy", action="store_true", help="put the tag on the clipboard as well")


def add_send(commands: Any) -> None:
    """Add the options of send."""
    add = add_command(
        commands, cmd_send, "news.html people.csv --from 'Ann <ann@x.org>' "
        "--server t.x.org --smarthost smtp.x.org --user ann --yes",
        "TEMPLATE RECIPIENTS.csv").add_argument
    add("template", metavar="TEMPLATE", nargs="?", default="", help="Subject: ..., a "
        "blank line and the text, HTML if it begins with <; or a mail saved as .eml; "
        "a.html,b.html: each for half of the people")
    add("recipients", metavar="RECIPIENTS", nargs="?", default="",
        help="a CSV file with a column email; - reads stdin")
    add("--sample", action="store_true", help="write sample.html and sample.csv")
    add("--yes", action="store_true", help="send; without it only show what would be")
    add("--test", metavar="ADDRESS", type=address_argument,
        help="send the first mail there, and no other")
    add("--preview", metavar="FOLDER", default="", help="write the mails there as .eml")
    add_smarthost(add)
    add("--from", metavar="ADDRESS", dest="sender", type=mailbox_argument,
        help="'Ann <ann@x.org>' (default: the From of the template)")
    add_pixels(add, has_path=False, has_clicks=True)
    add("--campaign", metavar="NAME", default="", help="who got a mail of this name "
        "gets no other (default: the file name of the template)")
    add("--where", metavar="COLUMN=GLOB", type=condition_argument, action="append",
        default=[], help="only rows like this: 'city=B*'; may be repeated")
    add("--limit", metavar="N", type=number_in(1, 10 ** 9 - 1),
        help="at most so many mails")
    add("--rate", metavar="N/UNIT", type=rate_argument, default=0.0,
        help="so many mails at most, evenly: 20/min, 300/h, 2/s")
    add("--at", metavar="WHEN", type=local_argument, default=0.0,
        help="wait until then, in this machine's zone: '2026-11-24 09:00'")
    add("--followup-to", metavar="CAMPAIGN", default="",
        help="only to people who got a mail of that campaign, as an answer to it")
    add("--if", choices=("unopened", "unreplied", "opened"), default="",
        help="only where that one is so")
    add("--after", metavar="TIME", type=moment_argument,
        help="only where that one went so long ago: 3d, 12h")
    add("--unsubscribe", metavar="URL", type=link_argument,
        help="https:// or mailto:, with {id} if you like (default: the server's own "
        "page, if it has https)")
    add("--bounce-address", metavar="TEMPLATE", default="",
        help="where bounces go, such as '{user}+{id}@{domain}'")
    add("--resend-unknown", action="store_true",
        help="send again what may or may not have gone")
    add("--assume-sent", action="store_true", help="take it that it has gone")


def add_dump(commands: Any) -> None:
    """Add the options of dump."""
    add = add_command(commands, cmd_dump, "--hit --since 3d --sort hits --reverse",
                      "[FILE]").add_argument
    add("file", metavar="FILE", nargs="?", help="the register, as --register")
    add("--id", metavar="PREFIX", default="",
        help="only ids that begin so; a single tag is shown with its history")
    add("--name", metavar="GLOB", default="", help="only names like this: 'jo*'")
    add("--hit", action="store_true", help="only tags with a hit")
    add("--unhit", action="store_true", help="only tags without a hit")
    add("--opened", action="store_true", help="only tags with an open")
    add("--unopened", action="store_true", help="only tags without an open")
    add("--campaign", metavar="NAME", default="", help="only tags of this mailing")
    add("--status", choices=STATUSES, default="", help="only tags with this status")
    add("--since", metavar="WHEN", type=moment_argument,
        help="only tags hit since then: 2026-11-01, 3d, 12h")
    add("--sort", metavar="COLUMN", default="", help="in the order of a column")
    add("--reverse", action="store_true", help="the other way round")
    add("--limit", metavar="N", type=number_in(1, 10 ** 9 - 1),
        help="at most so many rows")
    add("--full", action="store_true", help="whole ids and names on a terminal, too")
    add("--local", action="store_true", help="times of this machine's zone, not UTC")
    add("--format", choices=("table", "csv", "json"), default="table",
        help="how to show them (default: %(default)s)")
    add("--log", action="store_true", help="show the event log, with these filters")
    add("--follow", action="store_true",
        help="print each event as it comes; with --since those before as well")


def add_report(commands: Any) -> None:
    """Add the options of report."""
    add = add_command(commands, cmd_report, "--by campaign --since 30d").add_argument
    add("--by", metavar="COLUMN", default="", help="a line for each value of a column: "
        "name, email, campaign, one of your own; or by day, hour, weekday of sending")
    add("--since", metavar="WHEN", type=moment_argument,
        help="only mail sent since then: 2026-11-01, 3d, 12h")
    add("--campaign", metavar="NAME", default="", help="only mail of this mailing")
    add("--compare", metavar=("A", "B"), nargs=2, default=[],
        help="tell whether two of these differ (default: of --by campaign; with "
        "--campaign, of --by variant)")
    add("--local", action="store_true",
        help="days and hours of this machine's zone, not UTC")
    add("--format", choices=("text", "csv", "json", "html"), default="text",
        help="how to show it (default: %(default)s); html is a page in one file")


def add_scan(commands: Any) -> None:
    """Add the options of scan."""
    add = add_command(commands, cmd_scan,
                      "imaps://ann@imap.x.org --password-command 'pass ann'",
                      "MAILBOX").add_argument
    add("mailbox", metavar="MAILBOX",
        help="imaps://user@host[:port][/folder], a Maildir, an mbox file, or - for a "
        "message or an mbox on stdin; nothing in it is changed")
    add_login(add)
    add("--folder", metavar="NAME", action="append", default=[],
        help="look into this folder; may be repeated (default: INBOX and junk)")
    add("--since", metavar="WHEN", type=moment_argument, default="30d",
        help="only mail since then (default: %(default)s)")
    add("--dry-run", action="store_true", help="only say what would be logged")
    add("--follow", action="store_true", help="look again, each minute or sooner")


def add_others(commands: Any) -> None:
    """Add rejudge, forget and settle, with the few options that they have."""
    add = add_command(commands, cmd_rejudge, "--dry-run").add_argument
    add("--dry-run", action="store_true", help="only say what would change")
    add = add_command(commands, cmd_forget, "john", "[ID|NAME ...]").add_argument
    add("tags", metavar="ID|NAME", nargs="*",
        help="an id, its first 7 characters or more, or a whole name")
    add("--older-than", metavar="WHEN", type=moment_argument, help="all tags made "
        "before then, but of who unsubscribed and mail that bounced: 365d, 2025-01-01")
    add("--yes", action="store_true", help="do not ask")
    add("--dry-run", action="store_true", help="only show what would go")
    add = add_command(commands, cmd_settle, "").add_argument
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--rotate-events", type=number_in(0, 10 ** 9), default=0,
        help=argparse.SUPPRESS)


def add_pixels(add: Any, has_path: bool = True, has_clicks: bool = False) -> None:
    """Add the options that say where pixels are fetched, and what counts beside."""
    add("--server", metavar="HOST|URL",
        default=os.environ.get("MAILTRACKER_SERVER", ""),
        help="where the pixel server can be reached (default: $MAILTRACKER_SERVER)")
    if has_path:
        add("--path", metavar="TEMPLATE", type=template_argument, default="/{id}.gif",
            help="where the pixel seems to lie (default: %(default)s)")
    if has_clicks:
        add("--clicks", action="store_true", help="let links in HTML count clicks")


def add_service(add: Any, line: str) -> None:
    """Add the options of what runs for long, and says a line for each of something."""
    file: Any = {"metavar": "FILE", "default": ""}
    add("--tls-cert", **file, help="encrypt with this certificate chain")
    add("--tls-key", **file, help="the key of the certificate")
    add("--daemon", action="store_true",
        help="go on in the background; without --logfile it is silent")
    add("--pidfile", **file, help="write the process id here")
    add("--logfile", **file,
        help="write lines here, not to stderr; SIGHUP opens it again")
    add("--quiet", action="store_true", help=f"no line for each {line}")


def add_smarthost(add: Any, required: bool = False, **login: Any) -> None:
    """Add the options that say which mail server takes our mail."""
    add("--smarthost", metavar="HOST[:PORT]", type=smarthost_argument,
        required=required,
        help="the mail server that takes the mail (default port: 587; 465 is TLS from "
        "the start)")
    add("--user", default="", help="log in there as this user")
    add_login(add, **login)


def add_login(add: Any, auth: Sequence[str] = ("password", "xoauth2"),
              how: str = "how to log in") -> None:
    """Add the options that say how to log in."""
    add("--password-command", metavar="COMMAND", default="",
        help="a command that prints the password (default: $MAILTRACKER_PASSWORD)")
    add("--auth", choices=auth, default=auth[0], help=how + " (default: %(default)s)")


def cmd_relay(options: argparse.Namespace) -> int:
    """Put pixels into the mail of any mail program, and send it on."""
    files = Files(options.register, options.events)
    certificate = Certificate(options.tls_cert, options.tls_key) \
        if options.tls_cert else None
    listener = passed_listener() if is_socket_passed() else make_listener(
        options.host, options.port)
    with listener, ExitStack() as stack:
        check_relay(options, listener)
        keep_little_memory()
        lines, signals, ready = begin(options)
        stack.enter_context(lines)
        relay = Relay(options, files, lines, certificate)
        stack.enter_context(pid_file(options.pidfile))
        ready()
        greet(listener, lines, "relaying mail at ")
        relay.serve(listener, signals)
    return 0


def check_relay(options: argparse.Namespace, listener: socket.socket) -> None:
    """Refuse a relay that all could use, that mails itself, or with useless options."""
    check_quiet(options)
    host, port = listener.getsockname()[:2]
    is_safe = options.auth in ("pass", "own") and options.tls_cert
    to, at = options.smarthost
    refuse(options,
           (not options.server, "--server: say where recipients find the pixels"),
           (options.auth == "own" and not options.user, "--auth own needs --user"),
           (options.auth == "pass" and (options.user or options.password_command),
            "--auth pass goes without --user and --password-command"),
           (at == port and (is_loopback(to) or to in (host, options.host)),
            "--smarthost: that is this relay"),
           (not is_loopback(host) and not is_safe and not options.local,
            f"--host {host}: all could send as you; it needs --tls-cert, "
            "and --auth pass or own"))


def _bounces(text: str) -> str:
    address_in(bounce_address(text, "ann", "x.org", new_ids(bytes(16))[0]))
    return text


def _local(text: str) -> Tuple[str, str]:
    found = matching("([^=]+)=((?s:.+))", text)
    return found[1].lower(), found[2]


def add_relay(commands: Any) -> None:
    """Add the options of the relay."""
    add = add_command(commands, cmd_relay, "--smarthost smtp.x.org --user ann "
                      "--server https://t.x.org").add_argument
    add_smarthost(add, True, auth=("password", "xoauth2", "pass", "own"), how="how to "
                  "log in there; pass: as each mail program does here; own: with a "
                  "password that mail programs must know as well")
    add_pixels(add, has_clicks=True)
    add("--host", metavar="ADDRESS", default="127.0.0.1",
        help="listen on this address (default: %(default)s)")
    add("--port", type=number_in(0, 65535), default=RELAY_PORT,
        help="listen on this port (default: %(default)s; 0 takes a free one)")
    add_service(add, "mail")
    add("--bounce-address", metavar="TEMPLATE",
        type=argument(_bounces, "an address such as '{user}+{id}@{domain}'"),
        help="where mail with a pixel bounces to: '{user}+{id}@{domain}'")
    add("--make-html", action="store_true",
        help="make HTML of plain text, which can hold no pixel")
    add("--untracked-when-broken", action="store_true", help="where a row cannot be "
        "written, send the mail without a pixel rather than not at all")
    add("--keep", metavar="MAILDIR", default="",
        help="keep a copy without pixel of each mail here")
    add("--local", metavar="DOMAIN=MAILDIR", action="append", default=[],
        type=argument(_local, "a domain, = and a folder"),
        help="put mail for this domain here, whoever sends it; may be repeated")
    add("--quota", metavar="SIZE", type=size_argument, default=1 << 30,
        help="how much mail each of these takes (default: 1G)")


def cmd_doctor(options: argparse.Namespace) -> int:
    """Find what is wrong with a set-up, and say what to do."""
    if options.list_checks:
        return print_lines(f"{name:12} {getattr(Doctor, name).__doc__}"
                           for name in Doctor.CHECKS)
    url = tag_template(base_url(options.server or "localhost"), options.path, "url")
    doctor = Doctor(Files(options.register, options.events), url, options.message)
    wanted = {*(options.checks or set(Doctor.CHECKS) - {*Doctor.UPON_REQUEST}), *(
        name for name in Doctor.UPON_REQUEST if getattr(options, name))}
    refuse(options, ("message" in wanted and not options.message,
                     "message: say which mail, by --message FILE"))
    findings = list(doctor.findings(wanted))
    if options.json:
        sys.stdout.writelines(json_lines(Finding._fields, map(list, findings)))
    else:
        print_lines(map(Finding.text, findings))
    return int(any(finding.level == "error" for finding in findings))


def add_doctor(commands: Any) -> None:
    """Add the options of doctor."""
    add = add_command(commands, cmd_doctor, "--server https://t.example.org --wait",
                      "[CHECK ...]").add_argument
    add("checks", metavar="CHECK", nargs="*", type=check_argument,
        help="do this check only (default: all, without wait and message)")
    add_pixels(add)
    add("--wait", action="store_true", help="wait for a hit from elsewhere as well")
    add("--message", metavar="FILE", default="",
        help="judge a mail as well, saved as .eml in the mailbox that got it")
    add("--list-checks", action="store_true", help="say what is checked")
    add("--json", action="store_true", help="print what is found as JSON")


def cmd_notify(options: argparse.Namespace) -> int:
    """Tell somebody of opens, soon after they come."""
    files = Files(options.register, options.events)
    check_notify(options)
    register_path(files)
    signals, length = Signals(None), 0.0
    options.state = f"{files.register}.{hash_of(options.to)[:8]}.notify"
    with lock_of(0.0, options.state, flags=os.O_RDWR | os.O_CREAT) as file:
        if file < 0:
            raise TrackerError("another notify tells this receiver already")
        notices = Notices(files, options, file, teller_of(options, signals.wait))
        notices.check()
        while not signals.wait(length):
            try:
                is_over = not notices.look(options.once)
                length = notices.LOOK * is_over
            except (OSError, TrackerError) as error:
                if options.once:
                    raise
                note(explain(error))
                length = 60.0
            notices.check()
            if options.once and is_over:
                break
    if options.once and notices.state.id:
        raise TrackerError("not yet told: run it again after "
                           f"{utc_text(notices.state.due)}")
    return 0


def check_notify(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect on this receiver."""
    kind = options.to.partition(":")[0].replace("https", "http")
    refuse(options, (not options.to, "--to: say whom to tell"), *(
        (value and kind != needed, f"{option} needs --to {needed}:...")
        for option, value, needed in (
            ("--format", options.format, "http"),
            ("--secret-command", options.secret_command, "http"),
            ("--smarthost", options.smarthost, "mailto"),
            ("--from", options.sender, "mailto"))),
        (kind == "mailto" and not options.smarthost, "mailto: needs --smarthost"),
        (options.format == "ntfy" and not re.fullmatch(
            r"https?://[^/]+/[\w-]{1,64}", options.to, re.ASCII),
         "--format ntfy needs a URL such as https://ntfy.sh/topic"))


def _receiver(text: str) -> str:
    from urllib.parse import urlsplit

    text = text.strip()
    kind, _, rest = text.partition(":")
    if kind == "mailto":
        address_in(rest)
    elif kind != "exec" and text not in ("", "desktop"):
        url = urlsplit(matching("https?://[!-~]{1,2000}", text)[0])
        if url.username or not matching(_HOST.pattern, url.hostname or "") \
                or url.port == 0:
            raise ValueError
    return text


def add_notify(commands: Any) -> None:
    """Add the options of notify."""
    add = add_command(commands, cmd_notify, "--to https://ntfy.sh/topic --format ntfy"
                      ).add_argument
    add("--to", metavar="RECEIVER", default=os.environ.get("MAILTRACKER_TO", ""),
        type=argument(_receiver, "a URL, mailto:ME@x.org, desktop or exec:COMMAND"),
        help="a URL, mailto:ME@x.org, desktop, or exec: and a shell command, which "
        "finds $MAILTRACKER_NAME and others (default: $MAILTRACKER_TO)")
    add("--format", choices=list(PAYLOADS),
        help="what a URL is told (default: generic, as Standard Webhooks has it)")
    add("--secret-command", metavar="COMMAND", default="",
        help="a command that prints a secret, whsec_..., to sign with what a URL is "
        "told (default: $MAILTRACKER_SECRET)")
    add("--every", action="store_true", help="of every open, not only a tag's first")
    add("--on", choices=("revived",),
        help="also of the first open after two weeks without")
    add("--unknown", action="store_true", help="also of hits that may be opens")
    add("--remind", metavar="TIME", type=argument(span, "a time such as 3d or 12h"),
        default=0.0, help="also of mail sent so long ago of which no open was seen")
    add("--once", action="store_true", help="tell what there is, and end; for cron")
    add("--follow", action="store_true", help="go on until Ctrl-C (as without --once)")
    add_smarthost(add)
    add("--from", metavar="ADDRESS", dest="sender", type=mailbox_argument,
        help="who the mail is from (default: whom it is to)")


def cmd_dashboard(options: argparse.Namespace) -> int:
    """Show register and log as a page in a browser, and as JSON."""
    files, port = Files(options.register, options.events), options.port
    keys = Keys(files.key)
    if options.keys:
        return print_lines(f"{right:5} {keys.token(right, NEVER)}"
                           for right in ("read", "write"))
    if options.link and not port:
        options.parser.error("--link: say at which --port")
    if options.link:
        return print_lines([keys.link(dashboard_url(options, port))])
    with make_listener(options.host, port) as listener, ExitStack() as stack:
        lines, signals, _ = begin(options)
        stack.enter_context(lines)
        port = listener.getsockname()[1]
        url = dashboard_url(options, port)
        dashboard = Dashboard(files, url, port, options.server, lines)
        stack.enter_context(dashboard.watch.reader)
        server = PixelServer(listener, dashboard, lines)
        greet(listener, lines, f"showing {options.register} on http://",
              "; dashboard --link prints a link that lets you in")
        link = keys.link(url) if options.open or sys.stdout.isatty() else ""
        if sys.stdout.isatty():
            print(link, flush=True)
        if options.open:
            stack.enter_context(opened_in_browser(os.path.dirname(files.key), link))
        server.serve(signals)
    return 0


def dashboard_url(options: argparse.Namespace, port: int) -> str:
    """Return where a browser finds the dashboard."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    return str(options.admin_url or f"http://{host}:{port}/")


@contextmanager
def opened_in_browser(folder: str, link: str) -> Iterator[None]:
    """Open a link by way of a file: on a command line all could read its token."""
    import webbrowser
    from tempfile import NamedTemporaryFile
    from urllib.parse import quote

    with NamedTemporaryFile("w", dir=folder, suffix=".html") as file:
        file.write(f'<meta http-equiv="refresh" content="0;url={link}">')
        file.flush()
        webbrowser.open(f"file://{quote(os.fsencode(file.name))}")
        yield


def _loopback(text: str) -> str:
    if not is_loopback(text):
        raise ValueError
    return text


def _admin_url(text: str) -> str:
    return base_url(matching("https?://.*", text)[0]) + "/"


def add_dashboard(commands: Any) -> None:
    """Add the options of the dashboard."""
    parser = add_command(commands, cmd_dashboard, "--open")
    parser.set_defaults(logfile="", daemon=False)
    add = parser.add_argument
    add("--host", metavar="ADDRESS", default="127.0.0.1", type=argument(
        _loopback, "an address of this machine alone, such as 127.0.0.1; from "
        "elsewhere come by ssh -L or a proxy"),
        help="listen on this address of this machine's own (default: %(default)s)")
    add("--port", type=number_in(0, 65535), default=DASHBOARD_PORT,
        help="listen on this port (default: %(default)s; 0 takes a free one)")
    add("--admin-url", metavar="URL", type=argument(
        _admin_url, "a URL such as https://t.example.org/mail/"),
        help="where a proxy in front of it can be reached")
    add_pixels(add, has_path=False)
    add("--open", action="store_true", help="open it in a browser")
    add("--link", action="store_true", help="print a link that lets you in, and end")
    add("--keys", action="store_true", help="print the keys of the API, and end")


def cmd_server(options: argparse.Namespace) -> int:
    """Serve pixels and count their hits."""
    files = Files(options.register, options.events)
    check_server(options, files)
    certificate = Certificate(options.tls_cert, options.tls_key) \
        if options.tls_cert else None
    listener = passed_listener() if is_socket_passed() else make_listener(
        options.host or "", DEFAULT_PORT if options.port is None else options.port)
    with listener, ExitStack() as stack:
        lines, signals, ready = begin(options)
        stack.enter_context(lines)
        store = Store(files, lines.rarely, options.fsync == "always",
                      options.rotate_events)
        store.open()
        stack.enter_context(pid_file(options.pidfile))
        stack.callback(store.close)
        tracker = Tracker(store, lines, Settings(
            **{name: getattr(options, name) for name in Settings._fields}))
        tracker.learn(files.log)
        server = PixelServer(listener, tracker, lines, certificate)
        tasks = [store.sync] * (options.fsync == "second")
        tasks += [certificate.renew] if certificate else []
        for task in tasks:  # a disk that hangs must not hold up the end
            stack.enter_context(Background(task, lines.rarely, period=1.0, rest=5.0))
        ready()
        greet(listener, lines, f"serving pixels on http{'s' * bool(certificate)}://",
              f", counting in {options.register}")
        server.serve(signals)
        lines.line(f"{plural(tracker.hits, 'hit')} counted")
    return 0


def begin(options: argparse.Namespace) -> Tuple[Lines, Signals, Callable[[], Any]]:
    """Return the lines and signals of a server, and what to call when it is ready."""
    lines = Lines(options.logfile)
    has_terminal = not options.daemon and (os.isatty(0) or os.isatty(2))
    signals = Signals(None if has_terminal and not options.logfile else lines.reopen)
    return lines, signals, detach() if options.daemon else int


def greet(listener: socket.socket, lines: Lines, what: str, why: str = "") -> None:
    """Say that a server is ready, and where; tell systemd, as in sd_notify(3)."""
    import socket

    host, port = listener.getsockname()[:2]
    lines.line(f"{what}{f'[{host}]' if ':' in host else host}:{port}{why}")
    path = os.environ.get("NOTIFY_SOCKET", "")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, suppress(OSError):
        notify.sendto(b"READY=1", re.sub("^@", "\0", path))  # a courtesy


def check_server(options: argparse.Namespace, files: Files) -> None:
    """Refuse options that would have no effect, and files that are others already."""
    check_quiet(options)
    refuse(options,
           (0 < options.rotate_events < 1 << 16, "--rotate-events: 64K or more"),
           (is_socket_passed() and (options.host, options.port) != (None, None),
            "systemd passes the socket: leave out --host and --port"))


def check_quiet(options: argparse.Namespace) -> None:
    """Keep a server quiet of which nobody would hear."""
    is_silent = options.daemon and not options.logfile
    refuse(options, (options.quiet and is_silent,
                     "--quiet: a daemon without --logfile is silent anyway"))
    options.quiet |= is_silent


def check_paths(options: argparse.Namespace) -> None:
    """Refuse a file that is another one already, or holds what is not ours."""
    files = Files(getattr(options, "file", "") or options.register, options.events)
    tls_cert, tls_key, logfile, pidfile = (
        getattr(options, name, "") for name in ("tls_cert", "tls_key", "logfile",
                                                "pidfile"))
    taken = [*files.versions, files.new, files.lock, files.orig, files.key, files.links,
             tls_cert, tls_key]
    for option, path, ours in (("--events", files.log, rb"(time|[\d,\s\0]).*"),
                               ("--logfile", logfile, rb"\d{4}-\d\d-.*"),
                               ("--pidfile", pidfile, rb"\d+\s*")):
        if path and identity(path) in map(identity, taken):
            options.parser.error(f"{option} {path} is another file of the server's")
        if os.path.isfile(path) and os.path.getsize(path):
            with open(path, "rb") as file:
                if not re.fullmatch(ours, file.readline(100), re.DOTALL):
                    options.parser.error(f"{option} {path} holds something else")
        taken.append(path)


def identity(path: str) -> object:
    """Return what is the same for all paths to a file, be it there or not."""
    with suppress(OSError):
        return os.stat(path)[1:3]  # inode and device
    return os.path.realpath(path)


def add_server(commands: Any) -> None:
    """Add the options of the server."""
    add = add_command(commands, cmd_server,
                      "--port 56789 --register register.csv").add_argument
    networks: Any = {"metavar": "NET", "type": network_argument, "action": "append",
                     "default": []}
    add("--host", metavar="ADDRESS",
        help="listen on this address only (default: all, IPv4 and IPv6)")
    add("--port", type=number_in(0, 65535),
        help=f"listen on this port (default: {DEFAULT_PORT}; 0 takes a free one)")
    add("--trusted-proxy", **networks, help="believe X-Forwarded-For from this address "
        "or network; may be repeated")
    add_service(add, "hit")
    add("--fsync", choices=("second", "always", "never"), default="second",
        help="how soon a hit must survive a power cut (default: %(default)s)")
    add("--rotate-events", metavar="SIZE", type=size_argument, default=0,
        help="begin a new log file at this size, such as 100M; old ones get a number")
    add("--compose-window", metavar="SECONDS", type=number_in(0, 10 ** 9 - 1),
        default=120, help="a hit so soon after newtag is your own mail program's, "
        "while you write (default: %(default)s; 0: no hit is)")
    add("--me", **networks,
        help="an address or network of your own: its hits are yours; may be repeated")
    add("--keep-address", choices=("truncate", "full", "none"), default="truncate",
        help="how much of a client's address is logged (default: %(default)s, to /24 "
        "or /48)")
    add("--keep-agent", choices=("yes", "no"), default="yes",
        help="whether a client's User-Agent is logged (default: %(default)s)")


# ---------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------
# From a command line to an exit code; only here errors are printed. A new command is
# one more call in an add_ function; what its options exclude, a line in RULES.

# Where an option would have no effect: command, option, relation, other options.
RULES = (
    ("server", "--tls-cert", "needs", "--tls-key"),
    ("server", "--tls-key", "needs", "--tls-cert"),
    ("relay", "--tls-cert", "needs", "--tls-key"),
    ("relay", "--tls-key", "needs", "--tls-cert"),
    ("relay", "--quota", "needs", "--local"),
    ("newtag", "--names-from", "goes without", "--name --count"),
    ("send", "--sample", "goes without", "TEMPLATE"),
    ("send", "--yes", "needs", "--smarthost"),
    ("send", "--yes", "goes without", "--test --preview"),
    ("send", "--test", "needs", "--smarthost"),
    ("send", "--test", "goes without", "--preview"),
    ("send", "--user", "needs", "--smarthost"),
    ("send", "--followup-to", "needs", "--if"),
    ("send", "--if", "needs", "--followup-to"),
    ("send", "--after", "needs", "--followup-to"),
    ("send", "--resend-unknown", "goes without", "--assume-sent"),
    ("dump", "FILE", "goes without", "--register"),
    ("dump", "--follow", "goes without",
     "--log --format --sort --reverse --limit --full --unhit --unopened --campaign"
     " --status"),
    ("dump", "--log", "goes without", "--full --unhit --unopened --campaign --status"),
    ("dump", "--full", "goes without", "--format"),
    ("dump", "--unhit", "goes without", "--hit --opened --since"),
    ("dump", "--unopened", "goes without", "--opened"),
    ("scan", "--follow", "goes without", "--dry-run"),
    ("doctor", "--list-checks", "goes without", "CHECKS --wait --message --json"),
    ("notify", "--on", "goes without", "--every"),
    ("notify", "--once", "goes without", "--follow"),
    ("notify", "--user", "needs", "--smarthost"),
    ("forget", "--older-than", "goes without", "TAGS"),
    ("forget", "--yes", "goes without", "--dry-run"),
    ("settle", "--rotate-events", "needs", "--worker"),
    ("dashboard", "--link", "goes without", "--keys --open --server"),
    ("dashboard", "--keys", "goes without", "--open --server --admin-url"),
)
GONE = {
    "--no-events": "the log is what counts; to keep little in it, "
                   "say --keep-address none --keep-agent no",
    "--on-open": "it is a command of its own now, that loses no open: "
                 "notify --every --to 'exec:COMMAND'",
    "--on-open-first": "it is a command of its own now, that loses no open: "
                       "notify --to 'exec:COMMAND'",
    "--reuse-port": "a register has one server; the README says what to do for more",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="mailtracker.py", usage="mailtracker.py COMMAND [options]",
        description=(__doc__ or "").partition("\n")[0]
        + " Each command has its own help: mailtracker.py help newtag")
    parser.add_argument("-V", "--version", action="version",
                        version=f"mailtracker {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add in (add_server, add_newtag, add_send, add_relay, add_dump, add_report,
                add_dashboard, add_notify, add_scan, add_doctor, add_others):
        add(commands)
    parser.set_defaults(commands=commands.choices)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line, or exit as argparse does."""
    parser, words = build_parser(), list(argv)
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if words[0] == "help":
        words = [*words[1:2], "--help"]
    commands = parser.get_default("commands")
    if words[0] not in (*commands, "-h", "--help", "-V", "--version"):
        parser.error(f"no command {words[0]}{nearest(words[0], commands)}")
    options, rest = parser.parse_known_args(words)
    for word in rest:
        option, is_option = word.partition("=")[0], word.startswith("-")
        known = re.findall(r"--[\w-]+", options.parser.format_help())
        options.parser.error(
            f"{option} is gone: {GONE[option]}" if option in GONE else
            f"no option {option}{nearest(option, known)}" if is_option else
            f"one word too many: {word}")
    check_options(options)
    check_paths(options)
    return options


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question that names the known word most like another; "" for none."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    def is_given(option: str) -> bool:
        name = option.lstrip("-").replace("-", "_").lower()
        return getattr(options, name) not in (options.parser.get_default(name), [])

    for command, option, relation, others in RULES:
        if command == options.command and is_given(option):
            for other in others.split():
                if is_given(other) != (relation == "needs"):
                    options.parser.error(f"{option} {relation} {other}")
    if options.command == "forget" and not options.tags and not options.older_than:
        options.parser.error("say which tags: by ID or NAME, or by --older-than")


def old_style(argv: Sequence[str]) -> List[str]:
    """Translate a command line of the 2018 tracker: -dump register.csv."""
    if not argv or argv[0] not in ("-server", "-newtag", "-dump"):
        return list(argv)
    options = ("-port", "-csvfile", "-name", "-server")
    return [argv[0][1:], *("-" + a if a in options else a for a in argv[1:])]


def open_streams() -> None:
    """Open standard streams that a shell has closed: no other file may become one."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    set_stdout()


def close_output() -> None:
    """Print what waits; where that is impossible, keep Python from complaining."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command, and say what went wrong; return the exit code."""
    open_streams()
    try:
        if sys.platform == "win32":
            raise TrackerError("not on Windows: run it in WSL, as on Linux")
        options = parse(old_style(sys.argv[1:] if argv is None else argv))
        if not sys.stdout and options.command not in ("server", "settle"):
            raise TrackerError("stdout is closed: there is nowhere to print to")
        code: int = options.run(options)
        print(end="", flush=True)
        return code
    except BrokenPipeError:
        return 0  # somebody has read enough: dump | head
    except KeyboardInterrupt:
        return 130
    except (TrackerError, OSError, MemoryError) as error:
        what = clean(explain(error)) or "not enough memory"
        print(f"mailtracker: error: {what}", file=sys.stderr)
        return 1
    finally:
        close_output()


if __name__ == "__main__":
    raise SystemExit(main())
