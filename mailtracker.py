#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""Tell which of your e-mails were opened, when, how often, and if by a person.

Make a tag, paste it into a mail, and let the server count its fetches:

    mailtracker.py server                        serve pixels, count hits
    mailtracker.py newtag --name john --server t.example.org
    mailtracker.py dump                          show the register
    mailtracker.py dump --id 7hq2vxw             show one tag with its history
    mailtracker.py rejudge --dry-run             judge old hits by today's rules
    mailtracker.py forget john                   remove all that is known of a tag

The words, the same everywhere:

    tag        one thing that is tracked: an id, its row in the register, and the
               <img> element that carries it
    id         the opaque token in the pixel's URL
    pixel      the 1x1 transparent GIF, and its URL
    hit        one fetch of the pixel: a fact
    verdict    what a hit is judged to be: human, proxy, machine, self or unknown
    open       a hit by a human, or by a proxy on a person's behalf: a judgement
    register   the CSV file with one row per tag
    event log  the CSV file with one row per hit

The files, all beside each other:

    register.csv         the register: counted in place, open it in any spreadsheet
    register.csv.twin    its copy, which no spreadsheet saves over: what a stale save
                         loses is put back from it
    register.csv.bak     the last version of the register that had to be repaired
    register.events.csv  the event log

Exit codes: 0 all went well, 1 it did not and one line says why, 2 wrong usage.
"""
from __future__ import annotations

import argparse
import csv
import errno
import os
import re
import signal
import stat
import sys
import time
from array import array
from bisect import bisect_right
from collections import OrderedDict
from contextlib import ExitStack
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from itertools import islice
from typing import TYPE_CHECKING
from typing import Any
from typing import Callable
from typing import Container
from typing import Deque
from typing import Dict
from typing import Iterable
from typing import Iterator
from typing import List
from typing import NamedTuple
from typing import Optional
from typing import Sequence
from typing import Set
from typing import TextIO
from typing import Tuple
from typing import TypeVar
from typing import Union

if TYPE_CHECKING:
    import socket
    import ssl
    import subprocess

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__version__ = "1.0"

DEFAULT_PORT = 56789
DEFAULT_REGISTER = "register.csv"


class TrackerError(Exception):
    """Say in one line what is wrong and what to do; main prints it and exits 1."""


# ---------------------------------------------------------------------------
# Text: what may reach a terminal, a log or a spreadsheet
# ---------------------------------------------------------------------------
# Pure functions. Whatever came from a network, a file or a command line passes
# through one of them on its way out.

NEVER = " " * 20  # a time that has not come yet, as wide as one that has
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_JOINERS = "\u200c\u200d"  # shape Persian and Indic names and emoji; harmless
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\0", "＝", "＋", "－", "＠")


def utc_text(seconds: float) -> str:
    """Return a time in seconds since 1970 as 20 characters: 2026-11-20T20:14:03Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@lru_cache(maxsize=4096)
def seconds(text: str) -> float:
    """Return the seconds since 1970 of a time as utc_text writes it; NaN for none."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(text[:19] + "+00:00").timestamp()
    except ValueError:
        return float("nan")


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
        c if c.isprintable() or c in _JOINERS else ascii(c)[1:-1] for c in text)


def escape_formula(cell: str) -> str:
    """Return a cell that no spreadsheet runs as a formula (OWASP: CSV injection)."""
    return "'" + cell if is_formula(cell) else cell


def unescape_formula(cell: str) -> str:
    """Return the text that escape_formula was given."""
    return cell[1:] if cell[:1] == "'" and is_formula(cell) else cell


def is_formula(cell: str) -> bool:
    """Tell whether a cell is a formula, or was one before it got its quotes."""
    return cell.lstrip("'").startswith(_FORMULA_STARTS)


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


# ---------------------------------------------------------------------------
# Tags: ids, URLs and <img> elements
# ---------------------------------------------------------------------------
# Pure functions. An id says nothing about whom it belongs to and cannot be
# guessed; another form of tag costs one line in TAG_FORMATS.

# No vowels and no look-alikes: no spreadsheet reads a number, a date or TRUE into
# such an id, nobody misreads it, and no rude word comes out.
ID_LETTERS = "bcdfghjkmnpqrstvwxz"
ID_ALPHABET = ID_LETTERS + "23456789"
ID_LENGTH = 21  # 19 * 27**20 values: 99 bits
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


def new_id(instance: bytes, now_ns: Optional[int] = None, number: int = 0) -> str:
    """Return an id of 21 characters: the keyed hash of time and instance.

    The instance is at least 16 random bytes that are never shown; the number tells
    apart ids of one instance and one nanosecond.
    """
    from hashlib import blake2b

    when = time.time_ns() if now_ns is None else now_ns
    digest = blake2b(b"%d %d" % (when, number), key=instance, digest_size=20)
    value = int.from_bytes(digest.digest(), "big")
    value, first = divmod(value, len(ID_LETTERS))
    letters = [ID_LETTERS[first]]
    while len(letters) < ID_LENGTH:
        value, letter = divmod(value, len(ID_ALPHABET))
        letters.append(ID_ALPHABET[letter])
    return "".join(letters)


def is_id(text: str) -> bool:
    """Tell whether text has the form of an id, known or not."""
    return _WHOLE_ID.fullmatch(text) is not None


def ids_in_path(target: bytes) -> List[bytes]:
    """Return what may be the id in a request target, the likeliest first.

    A path segment counts without its extension; later segments come first. The
    query is ignored.
    """
    return _ID_IN_PATH.findall(target.partition(b"?")[0])[::-1]


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


def tag_text(base: str, path: str, tag_id: str, form: str = "html") -> str:
    """Return the tag of an id, in one of TAG_FORMATS; path is a TEMPLATE."""
    from html import escape
    from urllib.parse import quote

    url = base + quote(path.replace("{id}", tag_id), safe=URL_SAFE)
    return TAG_FORMATS[form].format(escape(url) if form == "html" else url)


# ---------------------------------------------------------------------------
# Register: the CSV file with one row per tag
# ---------------------------------------------------------------------------
# The only code that touches the register. A hit overwrites fixed-width cells in
# place, in the register and in its twin, a byte for byte copy that is ours alone.
# As long as the two agree nobody else wrote; where they do not, somebody saved over
# the register, and both are merged: the user's cells, the larger counts, every tag.
# The twin is also what is locked. A further counter costs one line in COUNTERS.

# The cells that stand right behind the id, and their width. Fixed width makes the
# larger count or the later time also the larger string. Hits are facts, which only
# grow; opens are judgements, which a better rule may take back.
COUNTERS = {"hits": 10, "last_hit": 20, "opens": 10, "last_open": 20}
_FACTS = 2  # so many of them are facts
_FIXED_COLUMNS = ("id", *COUNTERS, "created")
_OWN_COLUMNS = (*_FIXED_COLUMNS, "name")
SENT_COLUMN = "sent"  # behind created, in registers with a tag whose mail is sent
_ALIASES = {"clicks": "hits", "lastclick": "last_hit"}  # the tracker of 2018
DUPLICATE = "dup "  # before the id of a row whose id stands in another one as well
_LARGEST = 10 ** 10 - 1
_BLANK = tuple("0" * width if width == 10 else NEVER for width in COUNTERS.values())
_COUNTED = sum(COUNTERS.values()) + len(COUNTERS) - 1  # bytes, with their delimiters

_BLOCK = 1 << 20
_LONGEST_ROW = 16 << 20
_QUIET = 0.5    # seconds without a change until a save in place is taken for finished
_PATIENCE = 2.0  # seconds a register may be missing: Excel deletes, then renames

_O_BINARY = getattr(os, "O_BINARY", 0)


class Layout(NamedTuple):
    """How a register is written down: what stays as its user has it."""

    columns: Tuple[str, ...] = _OWN_COLUMNS
    delimiter: str = ","
    eol: str = "\n"
    bom: bool = False
    lead: str = ""  # Excel's "sep=;" line
    headed: bool = True

    def head(self) -> bytes:
        """Return the bytes before the first row."""
        text = self.lead + csv_row(self.columns, self)
        return (b"\xef\xbb\xbf" if self.bom else b"") + text.encode()

    def is_canonical(self) -> bool:
        """Tell whether the counters stand where a hit can find them."""
        return self.headed and self.columns == self.canonical().columns

    def fixed(self) -> Tuple[str, ...]:
        """Return the columns of fixed width that every row begins with."""
        has_extra = SENT_COLUMN in self.columns
        return (*_FIXED_COLUMNS, SENT_COLUMN) if has_extra else _FIXED_COLUMNS

    def canonical(self) -> Layout:
        """Return the layout with the fixed columns first and no own one missing."""
        fixed = self.fixed()
        rest = [c for c in self.columns if c not in fixed]
        rest += [c for c in _OWN_COLUMNS if c not in fixed and c not in rest]
        return self._replace(columns=(*fixed, *rest), headed=True)

    def row_pattern(self) -> re.Pattern[bytes]:
        """Return a pattern for one canonical row: 1 is the id, 2 the counters.

        A row that is no tag's, a sum or an empty line of the user's, matches without
        groups; 3 is all from the first byte that is in no canonical row.
        """
        d, eol = re.escape(self.delimiter), re.escape(self.eol)
        times = r"(?:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ| {20})"
        cells = d.join(r"\d{10}" if w == 10 else times for w in COUNTERS.values())
        cell = rf'(?:"[^"\0]*(?:""[^"\0]*)*"|[^"\r\n\0{d}][^\r\n\0{d}]*|)'
        rest = rf'(?:{d}(?:[^"\r\n\0]*|{cell}(?:{d}{cell})*))?{eol}'
        dates = (d + times) * (len(self.fixed()) - len(COUNTERS) - 1)
        tag = rf"({_ID}){d}({cells}){dates}{rest}"
        other = rf'(?!"?(?:{_ID})"?(?:{d}|{eol})){cell}(?:{d}{cell})*{eol}'
        return re.compile(rf"(?:{tag}|{other})|([\s\S]+)".encode())


def csv_row(cells: Iterable[str], layout: Layout) -> str:
    """Return one line of CSV with its line end."""
    line: List[str] = []
    csv.writer(_Lines(line), delimiter=layout.delimiter,
               lineterminator=layout.eol).writerow(cells)
    return line[0]


class _Lines:
    """A list that csv.writer can write to."""

    def __init__(self, lines: List[str]) -> None:
        self.write = lines.append


def read_layout(head: bytes) -> Optional[Layout]:
    """Return the layout of a register that begins with head; None for no register.

    The delimiter is the one among , ; tab | under which known columns appear.
    """
    bom = head.startswith(b"\xef\xbb\xbf")
    text = head[3 * bom:].decode("utf-8", "replace").replace("\0", "")
    lines = text.splitlines(keepends=True) or [""]
    lead = lines.pop(0) if re.match(r"sep=.[\r\n]", text) else ""
    first = (lines or [""])[0]
    eol = first[len(first.rstrip("\r\n")):] or "\n"
    for delimiter in ",;\t|":
        cells = next(csv.reader([first], delimiter=delimiter), [])
        columns = _known_columns(cells)
        if columns:
            return Layout(columns, delimiter, eol, bom, lead)
        columns = _headerless_columns(cells)
        if columns:
            return Layout(columns, delimiter, eol, bom, lead, headed=False)
    return None


def _known_columns(cells: Sequence[str]) -> Tuple[str, ...]:
    """Return a header row with own columns under their names; () for another row."""
    columns: List[str] = []
    for cell in cells:
        name = cell.strip().lower()
        name = _ALIASES.get(name, name)
        own = name in _OWN_COLUMNS or name == SENT_COLUMN
        columns.append(name if own and name not in columns else cell)
    known = set(columns).intersection(_OWN_COLUMNS)
    return tuple(columns) if "id" in known and len(known) > 1 else ()


def _headerless_columns(cells: Sequence[str]) -> Tuple[str, ...]:
    """Return the columns of a first row that is a tag's: its header is missing."""
    if not cells or not is_id(cells[0].strip()) or len(cells) < 3:
        return ()
    if cells[1].strip().isdigit() and not cells[2].strip().isdigit():
        return _OWN_COLUMNS if len(cells) > 5 else _OWN_COLUMNS[:3]
    return ("id", "name", "hits", "last_hit")


def _cp1252(error: UnicodeError) -> Tuple[str, int]:
    """Decode what is not UTF-8 as the code page that Excel saves in."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start:error.end].decode("cp1252", "replace"), error.end


def read_rows(file: int, layout: Layout) -> Iterator[List[str]]:
    """Yield the cells of every row, of any register a spreadsheet can have made.

    Memory is flat. Stray bytes are read as cp1252, NULs are dropped, an unclosed
    quote harms its own line only, a last line cut off in its middle is left out.
    """
    import codecs

    codecs.register_error("mailtracker-cp1252", _cp1252)
    csv.field_size_limit(_LONGEST_ROW)
    with open(os.dup(file), encoding="utf-8-sig", newline="",
              errors="mailtracker-cp1252") as text:
        text.seek(0)
        for _ in range(bool(layout.lead)):
            text.readline()
        records = csv.reader(Records(text, layout), delimiter=layout.delimiter)
        for _ in range(layout.headed):
            next(records, None)
        yield from filter(None, records)  # no empty lines


class Records:
    """The records of a CSV file: lines put together where a quote spans several."""

    def __init__(self, lines: Iterable[str], layout: Layout) -> None:
        from collections import deque

        self._lines = iter(lines)
        self._again: Deque[str] = deque()
        self._layout = layout
        self._whole = record_pattern(layout.delimiter)

    def __iter__(self) -> Iterator[str]:
        """Yield records, but not a last line that was cut off in its middle."""
        line = self._line()
        while line:
            if '"' in line and not self._whole.fullmatch(line):
                yield self._long(line)
            elif self._has_end(line):
                yield line
            line = self._line()

    def _line(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines, "")
        return line.replace("\0", "")

    def _has_end(self, line: str) -> bool:
        """Tell whether a line is whole, by its end or by the number of its cells."""
        return line.endswith(("\n", "\r")) or \
            line.count(self._layout.delimiter) >= len(self._layout.columns) - 1

    def _long(self, first: str) -> str:
        """Return the record that begins with a line whose quote stays open."""
        held, size, quotes = [first], len(first), first.count('"')
        while size < _BLOCK:
            line = self._line()
            if not line:
                break
            held.append(line)
            size, quotes = size + len(line), quotes + line.count('"')
            if '"' in line and not quotes % 2 and self._whole.fullmatch("".join(held)):
                return "".join(held)
        # Never closed: the first line stands alone, the others are read again.
        self._again.extendleft(reversed(held[1:]))
        cells = first.replace('"', "").rstrip("\r\n").split(self._layout.delimiter)
        return csv_row(cells, self._layout)


def record_pattern(delimiter: str) -> re.Pattern[str]:
    """Return a pattern for one record of CSV, with or without its line end."""
    d = re.escape(delimiter)
    cell = rf'(?:"[^"]*(?:""[^"]*)*"|[^"\r\n{d}][^\r\n{d}]*|)'
    return re.compile(rf"{cell}(?:{d}{cell})*(?:\r\n|\r|\n)?")


def counter_cell(text: str, width: int) -> str:
    """Return what a spreadsheet left of a count or a time, at full width."""
    text = text.strip()
    if width == 10:
        number = re.fullmatch(r"(\d{1,15})(?:\.0*)?", text, re.ASCII)
        return "%010d" % min(int(number[1]), _LARGEST) if number else "0" * 10
    when = re.fullmatch(
        r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.\d+)?Z?", text, re.ASCII)
    return f"{when[1]}T{when[2]}Z" if when else NEVER


Cells = TypeVar("Cells", str, bytes)


def merged(saved: Sequence[Cells], twin: Sequence[Cells]) -> List[Cells]:
    """Return the counters of a row from what was saved and what its twin says.

    The larger of each fact; the judgements of whichever counted more hits, and the
    twin's when both counted the same, for nobody else judges.
    """
    cells = list(saved if saved[0] > twin[0] else twin)[:len(COUNTERS)]
    cells[:_FACTS] = [max(pair) for pair in zip(saved[:_FACTS], twin)]
    return cells


class Index:
    """Where the row of each id begins: an open-addressing table, 8 bytes a slot.

    An entry is an offset above 28 bits of the id's hash, so ids are told apart by
    reading their rows. A dict of a million ids would take ten times the memory.
    """

    _HASH = (1 << 28) - 1  # leaves 36 bits for the offset: 64 GB

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def find(self, tag: bytes) -> List[int]:
        """Return the offsets at which the id may stand, nearly always one or none."""
        slots, mark, found = self._slots, hash(tag) & self._HASH, []
        mask = len(slots) - 1
        slot = mark & mask
        entry = slots[slot]
        while entry:
            if entry & self._HASH == mark:
                found.append(entry >> 28)
            slot = (slot + 1) & mask
            entry = slots[slot]
        return found

    def add_rows(self, rows: Sequence[Tuple[bytes, int]]) -> List[Tuple[bytes, int]]:
        """Add ids with their offsets; return those that may have been there before."""
        self.reserve(self._count + len(rows))
        self._count += len(rows)
        slots, bits, mask = self._slots, self._HASH, len(self._slots) - 1
        doubtful = []
        for tag, offset in rows:
            mark = hash(tag) & bits
            slot = mark & mask
            while entry := slots[slot]:
                if entry & bits == mark:
                    doubtful.append((tag, entry >> 28))
                slot = (slot + 1) & mask
            slots[slot] = offset << 28 | mark
        return doubtful

    def reserve(self, rows: int) -> None:
        """Make room for so many ids in all, a third of the slots staying free."""
        while rows > len(self._slots) * 2 // 3:
            if self._count:
                self._slots = self._grown(self._slots)
            else:
                self._slots = array("Q", bytes(16 * len(self._slots)))

    def _grown(self, slots: array[int]) -> array[int]:
        """Return the same entries in twice the slots."""
        larger = array("Q", bytes(16 * len(slots)))
        mask, bits = len(larger) - 1, self._HASH
        for entry in filter(None, slots):
            slot = entry & bits & mask
            while larger[slot]:
                slot = (slot + 1) & mask
            larger[slot] = entry
        return larger


class Astray(TrackerError):
    """The register cannot be used for the moment: hits go to its twin alone."""


def is_utf8(data: bytes) -> bool:
    """Tell whether bytes are text in UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class Scan:
    """Go once through the rows of a canonical file.

    whole tells after the iteration whether it was canonical to its last byte.
    """

    def __init__(self, file: int, layout: Layout, start: int = 0,
                 stop: int = sys.maxsize) -> None:
        self.file, self.layout, self.stop = file, layout, stop
        self.end = start or len(layout.head())
        self.whole = False
        self._pattern = layout.row_pattern()

    def __iter__(self) -> Iterator[Tuple[int, bytes, List[re.Match[bytes]]]]:
        """Yield offset, bytes and rows of one block of whole rows after the other."""
        rest, block = b"", b"-"
        while block and len(rest) < _LONGEST_ROW:
            at = self.end + len(rest)
            block = os.pread(self.file, min(_BLOCK, self.stop - at), at)
            rest += block
            rows, used = self._rows(rest)
            if used and not is_utf8(rest[:used]):
                return
            if used:
                yield self.end, rest[:used], rows
                self.end += used
                rest = rest[used:]
        self.whole = not rest

    def _rows(self, block: bytes) -> Tuple[List[re.Match[bytes]], int]:
        """Return the rows a block begins with, and their length in bytes."""
        rows = list(self._pattern.finditer(block))
        used = rows.pop().start() if rows and rows[-1][3] else len(block)
        return rows, used


def tag_rows(rows: List[re.Match[bytes]], offset: int) -> List[Tuple[bytes, int]]:
    """Return the ids among the rows of a block, each with its offset in the file."""
    return [(tag, offset + row.start()) for row in rows if (tag := row[1])]


def paired(file: int, offset: int, block: bytes, rows: List[re.Match[bytes]]
           ) -> Optional[List[Tuple[re.Match[bytes], re.Match[bytes]]]]:
    """Return the rows of a block that differ from another file's, with those.

    None when the other file has not got the same ids at the same places.
    """
    theirs = os.pread(file, len(block), offset)
    pairs = []
    for row in rows if theirs != block else ():
        if theirs[row.start():row.end()] != row[0]:
            other = row.re.fullmatch(theirs, row.start(), row.end())
            if not other or other[1] != row[1]:
                return None
            pairs.append((row, other))
    return pairs


def repeated(file: int, doubtful: List[Tuple[bytes, int]], layout: Layout) -> bool:
    """Tell whether one of the ids really stands at the offset as well."""
    d = layout.delimiter.encode()
    return any(os.pread(file, len(tag) + 1, offset) == tag + d
               for tag, offset in doubtful)


class Twin:
    """The rows of a twin that was found, to be merged into what somebody saved."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.layout = read_layout(os.pread(file, 65536, 0)) or Layout()
        self._index = Index()
        if not self.layout.is_canonical():
            self.file, self.layout = modern_copy(file, self.layout)
        for offset, _, rows in Scan(self.file, self.layout):
            self._index.add_rows(tag_rows(rows, offset))
        # One byte for each 32 of the file: no row is shorter.
        self._seen = bytearray(os.fstat(self.file).st_size // 32 + 1)

    def take(self, tag: bytes) -> Optional[Tuple[str, ...]]:
        """Return the fixed cells of an id: () the second time, None for unknown ids."""
        found: Optional[Tuple[str, ...]] = None
        for offset, cells in self._find(tag):
            taken, self._seen[offset // 32] = self._seen[offset // 32], 1
            found = () if taken else cells
        return found

    def cells(self, tag: bytes) -> Optional[Tuple[str, ...]]:
        """Return the fixed cells behind an id; None for an unknown one."""
        return next((cells for _, cells in self._find(tag)), None)

    def _find(self, tag: bytes) -> Iterator[Tuple[int, Tuple[str, ...]]]:
        for offset in self._index.find(tag):
            row = os.pread(self.file, 256, offset).decode("latin-1")
            cells = row.split(self.layout.delimiter)[:len(self.layout.fixed())]
            if cells[0] == tag.decode():
                yield offset, tuple(cells[1:])

    def left(self) -> Iterator[Dict[str, str]]:
        """Yield the rows that were never taken, by column."""
        for offset, _, rows in Scan(self.file, self.layout):
            for row in rows:
                if row[1] and not self._seen[(offset + row.start()) // 32]:
                    cells = next(csv.reader([row[0].decode("utf-8", "replace")],
                                            delimiter=self.layout.delimiter))
                    yield dict(zip(self.layout.columns, cells))


def modern_copy(file: int, layout: Layout) -> Tuple[int, Layout]:
    """Return a copy of a twin that an older version wrote, with today's columns."""
    import tempfile

    with tempfile.TemporaryFile() as copy, tempfile.TemporaryFile() as nothing:
        target = layout.canonical()
        merge = Merge(layout, target, Twin(nothing.fileno()))
        merge.write(copy.fileno(), read_rows(file, layout))
        return os.dup(copy.fileno()), target


class NewFile:
    """A file written beside another and put in its place when it is whole."""

    def __init__(self, path: str, like: int) -> None:
        self.path = path
        self._draft = path + ".new"  # one name: whoever writes it holds the lock
        self._like = like

    def __enter__(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | _O_BINARY
        self.file = os.open(self._draft, flags, 0o600)
        return self.file

    def __exit__(self, failed: Optional[type], *_: object) -> None:
        try:
            if not failed:
                keep_owner(self._like, self.file)
                os.fsync(self.file)
        finally:
            os.close(self.file)
        if failed:
            os.unlink(self._draft)
        else:
            os.replace(self._draft, self.path)
            sync_folder(self.path)


def keep_owner(old: int, new: int) -> None:
    """Give a file the mode and, where that is allowed, the owner of another."""
    status = os.fstat(old)
    if hasattr(os, "fchmod"):
        os.fchmod(new, stat.S_IMODE(status.st_mode))
        try:
            os.fchown(new, status.st_uid, status.st_gid)
        except PermissionError:
            pass


def sync_folder(path: str) -> None:
    """Make a file's name in its folder safe from a power cut (POSIX)."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sync_file(path: str) -> None:
    """Bring a file to the disk itself, if it is there."""
    try:
        file = os.open(path, os.O_RDWR | _O_BINARY)
    except FileNotFoundError:
        return
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_whole(file: int, data: bytes, offset: int) -> None:
    """Write all of data at an offset; raise OSError where that is impossible."""
    written = os.pwrite(file, data, offset)
    if written < len(data):  # the disk is full, or the block was a large one
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(file, data[written:], offset + written)


def overwrite(file: int, old: bytes, new: bytes, offset: int) -> None:
    """Write new bytes over old ones; leave the old ones where that is impossible.

    Half a count would be a wrong one.
    """
    if os.pwrite(file, new, offset) < len(new):
        os.pwrite(file, old, offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def copy_bytes(source: int, target: int) -> None:
    """Copy a whole file into an empty one."""
    offset = 0
    block = os.pread(source, _BLOCK, 0)
    while block:
        write_whole(target, block, offset)
        offset += len(block)
        block = os.pread(source, _BLOCK, offset)


def lock_file(file: int) -> None:
    """Wait for the lock of an open file; only one descriptor has it at a time."""
    if sys.platform == "win32":
        while True:
            os.lseek(file, 1 << 62, os.SEEK_SET)  # a byte that nobody reads
            try:
                return msvcrt.locking(file, msvcrt.LK_LOCK, 1)
            except OSError:
                continue
    else:
        # Never lockf: closing any other descriptor drops it, and LibreOffice's own
        # use of it makes its save fail.
        fcntl.flock(file, fcntl.LOCK_EX)


def unlock_file(file: int) -> None:
    """Let go of the lock that lock_file took."""
    if sys.platform == "win32":
        os.lseek(file, 1 << 62, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_UN)


class Tag(NamedTuple):
    """One new row of the register."""

    id: str
    name: str
    created: str
    sent: str = NEVER


class Place(NamedTuple):
    """Where the counters of an id stand, and the fixed cells from there on."""

    offset: int
    row: bytes

    @property
    def hits(self) -> int:
        """How often it was fetched."""
        return int(self.row[:10])

    @property
    def last_hit(self) -> bytes:
        """The time of the last hit; 20 spaces for never."""
        return self.row[11:31]

    @property
    def opens(self) -> int:
        """How many of the hits were opens."""
        return int(self.row[32:42])

    @property
    def last_open(self) -> bytes:
        """The time of the last open; 20 spaces for never."""
        return self.row[43:63]

    @property
    def created(self) -> bytes:
        """The time at which the tag was made; 20 spaces where nobody knows."""
        return self.row[64:84]

    @property
    def sent(self) -> bytes:
        """The time at which its mail was sent; empty or spaces where nobody knows."""
        return self.row[85:105]


class Register:
    """The register file, its twin, and an index of their rows.

    Any number of processes may hold one. What is written is whole at any moment, also
    when the process is killed; notify gets a line about every repair.

    Entering it takes the lock that all processes share: `with register: hit(...)`.
    """

    def __init__(self, path: str, notify: Callable[[str], None] = lambda line: None,
                 sync_each_hit: bool = False) -> None:
        self.path = os.path.realpath(path)
        self.twin_path = self.path + ".twin"
        self.backup_path = self.path + ".bak"
        self.layout = Layout()
        self.trouble = ""  # why hits go to the twin alone, if they do
        self.dirty = False  # something was written and not yet synced
        self._shown = path
        self._is_link = os.path.islink(path)
        self._notify = notify
        self._sync_each_hit = sync_each_hit
        self._file = self._twin = -1
        self._inode = (0, 0)
        self._end = -1  # the size up to which index, register and twin agree
        self._index = Index()
        self._delimiter = b","
        self._fixed = 0  # bytes from the counters to the end of the last fixed column
        self._indexed = 0  # the inode of the twin that the index was made from
        self._next_try = self._missing_since = 0.0

    # -- counting -----------------------------------------------------------

    def __enter__(self) -> Register:
        """Take the lock and catch up with what others did to the register."""
        lock_file(self._twin)
        try:
            self._catch_up()
        except OSError as error:
            self.trouble = explain(error)
        return self

    def _catch_up(self) -> None:
        """See whether both files are as they were left, the lock being held."""
        if self.trouble:
            self._lock()  # nothing else would tell that the twin was replaced
        try:
            status = os.stat(self.path)
        except OSError:
            self._follow(None)
        else:
            if status.st_size != self._end or status.st_ino != self._inode[1]:
                self._follow(status)

    def __exit__(self, *_: object) -> None:
        """Let go of the lock: that of the newest twin, if it was replaced."""
        unlock_file(self._twin)

    def find(self, tag: bytes) -> Optional[Place]:
        """Return where the row of an id is, the lock being held; None: no such id."""
        size = len(tag) + 1 + self._fixed
        for offset in self._index.find(tag):
            row = os.pread(self._twin, size, offset)
            if not self.trouble and os.pread(self._file, size, offset) != row:
                self._try_to_settle()
                return self.find(tag)
            if row.startswith(tag + self._delimiter):
                return Place(offset + len(tag) + 1, row[len(tag) + 1:])
        return None

    def count(self, place: Place, now: bytes, opened: bool = False,
              overruled: int = 0) -> Tuple[int, int]:
        """Count one hit at a time (20 bytes); return the row's hits and opens.

        It may be an open, and take back opens that were counted before.

        The lock has been held since the place was found. The hit is in the file when
        this returns. Raise OSError when it cannot be; then it was not counted at all.
        """
        hits = min(place.hits + 1, _LARGEST)
        opens = min(max(place.opens + opened - overruled, 0), _LARGEST)
        last_open = max(place.last_open, now) if opened else place.last_open
        self._write(place, 0, b"%010d" % hits, max(place.last_hit, now),
                    b"%010d" % opens, last_open)
        return hits, opens

    def hit(self, tag: bytes, now: bytes, opened: bool = False,
            overruled: int = 0) -> int:
        """Count one hit of an id, the lock being held; return its hits, 0: no such id.

        Raise OSError as count does.
        """
        place = self.find(tag)
        return self.count(place, now, opened, overruled)[0] if place else 0

    def correct(self, tag: bytes, opens: int, last_open: str) -> None:
        """Set what is judged of an id anew, the lock being held."""
        place = self.find(tag)
        if place:
            self._write(place, 32, b"%010d" % opens, last_open.encode())

    def add_opens(self, opens: Dict[str, int]) -> None:
        """Add to the opens of ids, the lock being held."""
        for tag, more in opens.items():
            place = self.find(tag.encode())
            if place:
                total = max(0, place.opens + more)
                self.correct(tag.encode(), total, place.last_open.decode())

    def mend(self, tag: bytes, counters: Sequence[bytes]) -> bool:
        """Take counters over from the log, the lock being held; tell if that was done.

        Unless it has fewer hits than the register: then it does not reach back.
        """
        place = self.find(tag)
        if not place or place.hits > int(counters[0]):
            return False
        last_hit = max(place.last_hit, counters[1])
        self._write(place, 0, counters[0], last_hit, *counters[2:])
        return True

    def name_of(self, place: Place) -> str:
        """Return the name in the row of a place."""
        start = max(0, place.offset - 64)
        block = os.pread(self._twin, 1 << 16, start)
        first = block.rfind(self.layout.eol.encode(), 0, place.offset - start)
        text = block[first + len(self.layout.eol):].decode("utf-8", "replace")
        lines = text.splitlines(keepends=True)
        cells = next(csv.reader(lines, delimiter=self.layout.delimiter))
        return unescape_formula(dict(zip(self.layout.columns, cells)).get("name", ""))

    def _write(self, place: Place, at: int, *cells: bytes) -> None:
        """Overwrite cells of a row in both files, from a byte of its counters on."""
        new = self._delimiter.join(cells)
        old = place.row[at:at + len(new)]
        if not self.trouble:
            overwrite(self._file, old, new, place.offset + at)
        try:
            overwrite(self._twin, old, new, place.offset + at)
        except OSError as error:
            if self.trouble:
                raise
            # It stands in the register: counted. The twin catches up later.
            self.trouble = f"{self.twin_path}: {error.strerror}"
        self.dirty = True
        if self._sync_each_hit:
            try:
                self.sync()
            except OSError as error:  # it is written: counted
                self.trouble = explain(error)

    def sync(self) -> None:
        """Bring what was written to the disk itself; safe in a thread of its own."""
        self.dirty = False
        try:
            sync_file(self.path)
            sync_file(self.twin_path)
        except OSError:
            self.dirty = True
            raise

    # -- making tags --------------------------------------------------------

    def may_know(self, tag: bytes) -> bool:
        """Tell from memory whether an id is known; hardly ever wrongly."""
        return bool(self._index.find(tag))

    def add(self, tags: Sequence[Tag]) -> None:
        """Append tags, all or none; they are on the disk when this returns."""
        self.open(index=False)
        self._lock()
        try:
            if not self._in_step():
                self._settle_patiently()
            if any(tag.sent != NEVER for tag in tags):
                self._add_column(SENT_COLUMN)
            text = "".join(csv_row(self._cells(tag), self.layout) for tag in tags)
            self._append(text.encode())
        finally:
            unlock_file(self._twin)

    def _add_column(self, name: str) -> None:
        """Give the register one more column of our own, if it has not got it yet."""
        if name not in self.layout.columns:
            wider = self.layout._replace(columns=(*self.layout.columns, name))
            self._rewrite(wider.canonical())

    def _cells(self, tag: Tag) -> List[str]:
        """Return the cells of a new row in the order of the columns."""
        own = {"id": tag.id, "created": tag.created, "name": escape_formula(tag.name),
               "sent": tag.sent}
        own.update(zip(COUNTERS, _BLANK))
        return [own.get(column, "") for column in self.layout.columns]

    def _append(self, data: bytes) -> None:
        """Append rows to both files and sync them, or leave both as they were."""
        size = os.fstat(self._twin).st_size
        try:
            for file in (self._file, self._twin):
                write_whole(file, data, size)
            for file in (self._file, self._twin):
                os.fsync(file)
        except OSError:
            for file in (self._file, self._twin):
                os.ftruncate(file, size)
            raise

    def _in_step(self) -> bool:
        """Tell whether both files look the same, from their sizes and ends."""
        files = self._file, self._twin
        if not self._names_our_file() or self._end < 0 and not self._read_layout():
            return False
        size, other = (os.fstat(file).st_size for file in files)
        for offset in (0, max(0, size - 65536)):
            mine, theirs = (os.pread(file, 65536, offset) for file in files)
            if mine != theirs:
                return False
        return size == other and mine.endswith(self.layout.eol.encode())

    # -- opening, and agreeing with the twin --------------------------------

    def open(self, index: bool = True) -> None:
        """Open both files; make what is missing; repair what a spreadsheet saved.

        With an index hits can be counted. Raise TrackerError or OSError.
        """
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise TrackerError(f"no such folder: {folder}")
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise TrackerError(f"{self._shown} is not a regular file")
        self._lock()
        try:
            if index or not os.path.exists(self.path) \
                    or not os.fstat(self._twin).st_size:
                self._settle_patiently()
            elif not self._names_our_file():
                self._open_file()
        finally:
            unlock_file(self._twin)

    def tend(self) -> None:
        """Take over what other programs did to the files since the last look."""
        with self:
            if self._is_link and not os.path.islink(self._shown):
                self._mend_link()
            if self.trouble or not os.path.exists(self.twin_path):
                self._try_to_settle()

    def _mend_link(self) -> None:
        """Put a save that replaced the link to the register where the link led."""
        try:
            os.replace(self._shown, self.path)
            os.symlink(self.path, self._shown)
        except FileNotFoundError:
            pass  # just being saved
        except OSError as error:
            self.trouble = explain(error)
        self._follow(None)

    def _lock(self) -> None:
        """Lock the twin, and make sure that it is the one its path names."""
        while True:
            if self._twin >= 0:
                lock_file(self._twin)
                try:
                    twin = os.stat(self.twin_path)
                    if os.path.samestat(os.fstat(self._twin), twin):
                        return
                except FileNotFoundError:
                    pass
            flags = os.O_RDWR | os.O_CREAT | _O_BINARY
            new = os.open(self.twin_path, flags, 0o600)  # the old one if this fails
            if self._twin >= 0:
                os.close(self._twin)
            self._twin, self._end = new, -1

    def _names_our_file(self) -> bool:
        """Tell whether the path still names the file that is open."""
        if self._file < 0:
            return False
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    def _open_file(self) -> None:
        """Open the file that the path names now; the old one stays open till then."""
        file = os.open(self.path, os.O_RDWR | _O_BINARY | getattr(os, "O_NONBLOCK", 0))
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            os.close(file)
            raise TrackerError(f"{self._shown} is not a regular file")
        if self._file >= 0:
            os.close(self._file)
        self._file, self._inode, self._end = file, (status.st_dev, status.st_ino), -1

    def _follow(self, status: Optional[os.stat_result]) -> None:
        """Catch up with a register that is not as we left it, the lock being held."""
        grown = status and not self.trouble and status.st_ino == self._inode[1] \
            and status.st_size > self._end >= 0
        if grown and self._scan(self._end):
            return
        replaced = os.fstat(self._twin).st_ino != self._indexed
        if replaced or not self.trouble or time.monotonic() >= self._next_try:
            self._try_to_settle()

    def _try_to_settle(self) -> None:
        """Make both files agree, or note why hits go to the twin alone."""
        self._next_try = time.monotonic() + 0.1
        layout = self.layout
        try:
            self._lock()
            self._settle()
            self.trouble = ""
        except (TrackerError, OSError) as error:
            self.trouble = explain(error)
            self._use(layout)
            self._index_twin()

    def _index_twin(self) -> None:
        """Index the twin alone, if it is another one than was indexed before."""
        twin = os.fstat(self._twin).st_ino
        layout = read_layout(os.pread(self._twin, 65536, 0))
        if layout and twin != self._indexed:
            self._use(layout)
            self._index, self._indexed = Index(), twin
            for offset, _, rows in Scan(self._twin, layout):
                self._index.add_rows(tag_rows(rows, offset))

    def _settle_patiently(self) -> None:
        """Make both files agree; wait for a save that is under way."""
        deadline = time.monotonic() + 2 * _PATIENCE
        while True:
            try:
                return self._settle()
            except Astray:
                if time.monotonic() > deadline:
                    raise
            unlock_file(self._twin)
            time.sleep(0.05)
            self._lock()

    def _settle(self) -> None:
        """Make both files agree and index them, the lock being held."""
        known = self._inode
        if not self._names_our_file():
            try:
                self._open_file()
            except FileNotFoundError:
                return self._replace_missing()
        self._missing_since = 0.0
        if not os.fstat(self._file).st_size and not os.fstat(self._twin).st_size:
            keep_owner(self._file, self._twin)
            self._append(self.layout.head())
        canonical = self._read_layout()
        if canonical and self._scan():
            return
        self._check_quiet(replaced=known not in ((0, 0), self._inode))
        canonical = canonical and self._index_rows(Index(), self._file)
        if canonical and not os.fstat(self._twin).st_size:
            with NewFile(self.path, self._file) as file:
                copy_bytes(self._file, file)
        else:
            self._merge(odd=not canonical)
        self._renew_twin()
        if not self._scan():
            raise TrackerError(f"{self._shown} cannot be repaired")

    def _replace_missing(self) -> None:
        """Make a register where there is none, once it is surely not being saved."""
        if not os.fstat(self._twin).st_size:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _O_BINARY
            os.close(os.open(self.path, flags, 0o666))
            sync_folder(self.path)
            return self._settle()
        now = time.monotonic()
        self._missing_since = self._missing_since or now
        if now - self._missing_since < _PATIENCE:
            raise Astray(f"{self._shown} is missing")
        with NewFile(self.path, self._twin) as file:
            copy_bytes(self._twin, file)
        self._notify(f"{self._shown} was missing; it was made again from "
                     f"{self._shown}.twin (to start afresh, remove both)")
        self._settle()

    def _check_quiet(self, replaced: bool) -> None:
        """Raise Astray while a program may still be writing into the register."""
        since = time.time() - os.fstat(self._file).st_mtime
        if not replaced and 0 <= since < _QUIET and os.fstat(self._twin).st_size:
            raise Astray(f"{self._shown} is being saved by another program")

    def _read_layout(self) -> bool:
        """Read the header; tell whether it is canonical."""
        head = os.pread(self._file, 65536, 0)
        layout = read_layout(head)
        if layout is None and not head.strip():
            layout = read_layout(os.pread(self._twin, 65536, 0))
        if layout is None:
            raise TrackerError(f"{self._shown} has no header row with an id column; "
                               f"put it back, or remove the file")
        canonical = layout.is_canonical() and head.startswith(layout.head())
        if canonical:
            self._use(layout)
        return canonical

    def _use(self, layout: Layout) -> None:
        """Read rows of this layout from now on."""
        self.layout, self._delimiter = layout, layout.delimiter.encode()
        self._fixed = _COUNTED + 21 * (len(layout.fixed()) - len(COUNTERS) - 1)

    # -- the scan: both files side by side ----------------------------------

    def _scan(self, start: int = 0) -> bool:
        """Index both files from an offset on; heal counters that differ.

        Return False when they cannot be made to agree in place; nothing else has
        changed then.
        """
        head = len(self.layout.head())
        if not start and os.pread(self._file, head, 0) != os.pread(self._twin, head, 0):
            return False
        index = self._index if start else Index()
        size, other = (os.fstat(file).st_size for file in (self._file, self._twin))
        short, long = sorted((size, other))
        if not self._index_rows(index, self._file, start, short, heal=True):
            return False
        if short < long:
            # An append was cut off between both files: the longer one has it all.
            source, target = (self._file, self._twin)[::1 if size > other else -1]
            if not self._index_rows(index, source, short, long):
                return False
            for offset, block, _ in Scan(source, self.layout, short):
                write_whole(target, block, offset)
        self._index, self._end = index, long
        self._indexed = os.fstat(self._twin).st_ino
        self.trouble = ""
        return True

    def _index_rows(self, index: Index, file: int, start: int = 0,
                    stop: int = sys.maxsize, heal: bool = False) -> bool:
        """Add the rows of a file to an index; False if it is not canonical there."""
        scan = Scan(file, self.layout, start, stop)
        size = min(stop, os.fstat(file).st_size) - start
        for offset, block, rows in scan:
            if not start and len(block) < size:  # as many more as it looks
                index.reserve(len(rows) * size // len(block))
                size = 0
            if heal and not self._heal(offset, block, rows):
                return False
            if repeated(file, index.add_rows(tag_rows(rows, offset)), self.layout):
                return False
        return scan.whole

    def _heal(self, offset: int, block: bytes, rows: List[re.Match[bytes]]) -> bool:
        """Give rows that differ from their twin the larger counts, in both files."""
        pairs = paired(self._twin, offset, block, rows)
        for row, other in pairs or ():
            new = bytearray(row[0])
            if row[1]:
                at = len(row[1]) + 1
                new[at:at + len(row[2])] = self._merged(row[2], other[2])
            for file in (self._file, self._twin):
                write_whole(file, bytes(new), offset + row.start())
        return pairs is not None

    def _merged(self, counters: bytes, others: bytes) -> bytes:
        """Return the counters of a row and its twin in one."""
        d = self._delimiter
        return d.join(merged(counters.split(d), others.split(d)))

    # -- the merge: what somebody saved, and what we know better -------------

    def _merge(self, odd: bool) -> None:
        """Write a canonical register from the saved one and the twin, and a new twin.

        The user's cells come from the saved one, counters are the larger ones, rows
        that vanished come back at the end.
        """
        saved = read_layout(os.pread(self._file, 65536, 0)) or self.layout
        merge = Merge(saved, saved.canonical(), Twin(self._twin))
        with NewFile(self.path, self._file) as file:
            merge.write(file, read_rows(self._file, saved))
            if odd and os.fstat(self._file).st_size:
                self._keep_backup()
        self._use(saved.canonical())
        if odd or merge.returned:
            self._notify(merge.summary(self._shown, odd and self.backup_path))

    def _rewrite(self, target: Layout) -> None:
        """Write register and twin anew in another layout."""
        merge = Merge(self.layout, target, Twin(self._twin))
        with NewFile(self.path, self._file) as file:
            merge.write(file, read_rows(self._file, self.layout))
        self._renew_twin()
        self._settle()

    def _renew_twin(self) -> None:
        """Copy a new register to a new twin, and lock that one.

        In this order: a killed process leaves a twin that is merged once more. And
        every new twin goes with a new register, so that a hit need look at one only.
        """
        self._open_file()
        with NewFile(self.twin_path, self._file) as copy:
            copy_bytes(self._file, copy)
        self._lock()

    def forget(self, tags: Container[str]) -> None:
        """Remove ids from register, twin and backup, the lock being held."""
        self._lock()
        self._settle()
        first = self._delimiter.decode()
        with NewFile(self.path, self._file) as file, \
                open(os.dup(file), "wb") as out:
            out.write(self.layout.head())
            for _, _, rows in Scan(self._file, self.layout):
                out.writelines(
                    row[0] for row in rows
                    if row[0].decode().partition(first)[0].removeprefix(DUPLICATE)
                    not in tags)
        self._renew_twin()
        self._settle()
        for leftover in (self.path, self.twin_path, self.backup_path):
            if os.path.exists(leftover + ".new"):
                os.unlink(leftover + ".new")
        if os.path.exists(self.backup_path):
            self._forget_in_backup(tags)

    def _forget_in_backup(self, tags: Container[str]) -> None:
        """Remove ids from the backup; remove it all if nobody can read it."""
        file = os.open(self.backup_path, os.O_RDONLY | _O_BINARY)
        try:
            layout = read_layout(os.pread(file, 65536, 0))
            if layout is None:
                return os.unlink(self.backup_path)
            place = layout.columns.index("id")
            with NewFile(self.backup_path, file) as new, \
                    open(os.dup(new), "w", encoding="utf-8", newline="") as out:
                out.write(layout.head().decode() if layout.headed else "")
                writer = csv.writer(out, delimiter=layout.delimiter,
                                    lineterminator=layout.eol)
                for row in read_rows(file, layout):
                    tag = "".join(row[place:place + 1]).strip()
                    if tag.removeprefix(DUPLICATE) not in tags:
                        writer.writerow(row)
        finally:
            os.close(file)

    def _keep_backup(self) -> None:
        """Keep the register as it stands as .bak, without a moment without register."""
        draft = self.backup_path + ".new"
        try:
            os.unlink(draft)
        except FileNotFoundError:
            pass
        try:
            os.link(self.path, draft)
            os.replace(draft, self.backup_path)
        except OSError:  # no hard links here
            with NewFile(self.backup_path, self._file) as file:
                copy_bytes(self._file, file)


class Merge:
    """The rows of a saved register and those of the twin, one after the other."""

    def __init__(self, saved: Layout, target: Layout, twin: Twin) -> None:
        self.returned = 0
        self._tags = 0
        self._saved, self._target, self._twin = saved, target, twin
        own = target.fixed()
        places = {name: place for place, name in reversed([*enumerate(saved.columns)])}
        others = [i for i, name in enumerate(saved.columns) if name not in own]
        self._places = [places.get(name, -1) for name in own] + others
        self._name = target.columns.index("name")
        self._adopted: Set[str] = set()
        self._larger: Dict[str, Sequence[str]] = {}

    def write(self, file: int, saved: Iterable[List[str]]) -> None:
        """Write the new register into an empty file."""
        with open(os.dup(file), "w", encoding="utf-8", newline="") as text:
            text.write(self._target.head().decode())
            writer = csv.writer(text, delimiter=self._target.delimiter,
                                lineterminator=self._target.eol)
            writer.writerows(self._rows(saved))
        self._correct(file)

    def _rows(self, saved: Iterable[List[str]]) -> Iterator[List[str]]:
        """Yield every row of the new register."""
        width = len(self._target.columns)
        for cells in saved:
            row = [cells[i] if 0 <= i < len(cells) else "" for i in self._places]
            row += [""] * (width - len(row)) + cells[len(self._saved.columns):]
            yield self._tag(row) if is_id(row[0].strip()) else row
        for known in self._twin.left():
            self.returned += 1
            yield [known.get(column, NEVER if column == SENT_COLUMN else "")
                   for column in self._target.columns]

    def _tag(self, row: List[str]) -> List[str]:
        """Return the row of a tag with full counters; mark the second of one id."""
        tag = row[0].strip()
        counters = tuple(map(counter_cell, row[1:], COUNTERS.values()))
        known = self._twin.take(tag.encode())
        if known == () or tag in self._adopted:
            self._larger[tag] = merged(counters, self._larger.get(tag, counters))
            return [DUPLICATE + tag, *row[1:]]
        if known is None:
            self._adopted.add(tag)
            known = counters
        end = 1 + len(counters)
        for place in range(end, len(self._target.fixed())):
            when = counter_cell(row[place], 20)
            mine = known[place - 1] if place <= len(known) else NEVER
            row[place] = mine if when == NEVER else when
        row[:end] = tag, *merged(counters, known)
        row[self._name] = escape_formula(unescape_formula(row[self._name]))
        return row

    def _correct(self, file: int) -> None:
        """Give the first row of each repeated id the largest of its counters."""
        if not self._larger:
            return
        d = self._target.delimiter
        for offset, _, rows in Scan(file, self._target):
            for row in rows:
                tag = (row[1] or b"").decode()
                if tag in self._larger:
                    cells = merged(row[2].decode().split(d), self._larger[tag])
                    write_whole(file, d.join(cells).encode(),
                                offset + row.start() + len(tag) + 1)

    def summary(self, register: str, backup: Union[str, bool]) -> str:
        """Return one line that says what was done to a register."""
        done = ["was changed by another program"]
        if self.returned:
            done.append(f"{self.returned} lost tags were put back")
        if self._larger:
            done.append(f"{len(self._larger)} ids stood there twice, now marked dup")
        if backup:
            done.append(f"that version is kept as {backup}")
        return f"{register} " + "; ".join(done)


# ---------------------------------------------------------------------------
# Event log: the CSV file with one row per event
# ---------------------------------------------------------------------------
# The only code that touches the log. It is appended to with the register's lock held,
# one whole line in one write, so lines of several servers never mix; it may be moved,
# rotated or deleted at any time. Another kind of event is another word in its column.

EVENT_COLUMNS = ("time", "event", "id", "verdict", "reason", "address", "agent")
EVENT_HEADER = ",".join(EVENT_COLUMNS).encode() + b"\n"
MAX_WAITING_LINES = 10000  # held in memory while the disk refuses them


class Event(NamedTuple):
    """One row of the event log.

    event is "hit", or "verdict" where a hit is judged anew in the light of a later
    one: time, id, address and agent are those of the hit it speaks of.
    """

    time: str
    event: str
    id: str
    verdict: str
    reason: str
    address: str
    agent: str

    def line(self) -> bytes:
        """Return the row as one line of CSV."""
        return (f"{self.time},{self.event},{self.id},{self.verdict},{self.reason},"
                f"{self.address},{agent_cell(self.agent)}\n").encode()


@lru_cache(maxsize=4096)
def agent_cell(agent: str) -> str:
    """Return a User-Agent as a cell of CSV without control characters or formulas."""
    cell = escape_formula(clean(agent))
    return '"' + cell.replace('"', '""') + '"' if re.search('[,"]', cell) else cell


def events_path(register: str) -> str:
    """Return where the log of a register is: register.events.csv for register.csv."""
    stem, extension = os.path.splitext(os.path.realpath(register))
    return f"{stem}.events{extension or '.csv'}"


def log_files(path: str) -> List[str]:
    """Return the files of a log, the oldest first and path itself last.

    Numbers do not tell the order: ours grow, those of logrotate are passed on.
    """
    folder, name = os.path.split(path)
    old = [os.path.join(folder, entry) for entry in os.listdir(folder or ".")
           if re.fullmatch(re.escape(name) + r"\.\d{1,9}", entry)]
    return sorted(old, key=_begin) + ([path] if os.path.exists(path) else [])


def _begin(path: str) -> Tuple[str, str]:
    """Return the time of the first event of a file, and its name."""
    with EventFile(path) as events:
        return next((event.time for event in events), ""), path


def parse_event(line: bytes) -> Optional[Event]:
    """Return the event of a line; None for the header and for a broken line."""
    cells = line.decode("utf-8", "replace").rstrip("\r\n").split(",", 6)
    if len(cells) < len(EVENT_COLUMNS) or not is_time(cells[0]):
        return None
    agent = cells[6]  # the only cell that can hold a comma or a quote
    if agent.startswith('"'):
        if len(agent) < 2 or not agent.endswith('"') or agent.count('"') % 2:
            return None  # cut off
        agent = agent[1:-1].replace('""', '"')
    return Event._make([*cells[:6], unescape_formula(agent)])


class EventFile:
    """The events of one file of a log; iterate again for what has come since.

    The file stays open, so it may be moved meanwhile.
    """

    def __init__(self, path: str, offset: int = 0) -> None:
        if os.path.exists(path) and not os.path.isfile(path):
            raise TrackerError(f"{path} is not a regular file")
        self.file = open(path, "rb")
        self.inode = os.fstat(self.file.fileno()).st_ino
        self.offset = offset

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __iter__(self) -> Iterator[Event]:
        """Yield events from the offset on; broken lines are left out."""
        return filter(None, map(parse_event, self.lines()))

    def lines(self) -> Iterator[bytes]:
        """Yield whole lines from the offset on."""
        self.file.seek(self.offset)
        for line in self.file:
            if not line.endswith(b"\n"):
                return
            self.offset += len(line)
            yield line


def read_log(path: str) -> Iterator[Event]:
    """Yield the events of all files of a log, the oldest first."""
    for name in log_files(path):
        try:
            with EventFile(name) as file:
                yield from file
        except FileNotFoundError:
            pass  # rotated just now


def counted_opens(event: Event) -> int:
    """Return what an event adds to the opens of its tag: 1, 0, or -1."""
    if event.event == "verdict":
        return -1
    opened = event.event == "hit" and event.verdict in ("human", "proxy")
    return int(opened and event.reason != "repeat")


class Mending:
    """What the event log knows better than the register.

    Read by a process of its own while the server already serves: a register that was
    restored from an older copy has its counts put right, and senders are known again.
    """

    def __init__(self, register: str, log: str) -> None:
        self.file, there = os.pipe()
        self._received = b""
        self._child = os.fork()
        if not self._child:
            # Port and lock must be free as soon as the server is killed.
            os.closerange(3, there)
            os.closerange(there + 1, 1024)
            try:
                with open(there, "w", encoding="utf-8", newline="") as out:
                    csv.writer(out).writerows(compare_log(register, log))
            finally:
                os._exit(0)
        os.close(there)

    def read(self) -> bool:
        """Read what has come; tell whether there will be more."""
        block = os.read(self.file, 1 << 16)
        self._received += block
        if not block:
            os.close(self.file)
            os.waitpid(self._child, 0)
        return bool(block)

    def rows(self, kind: str) -> Iterator[List[str]]:
        """Yield the counters or the senders; nothing if it was not read to its end."""
        lines = self._received.decode().splitlines(keepends=True)
        if lines and lines[-1] == "end\r\n":
            yield from (row[1:] for row in csv.reader(lines) if row[0] == kind)


def compare_log(register: str, log: str) -> Iterator[List[str]]:
    """Yield counters that the log has more hits in, and senders it has seen."""
    counts: Dict[str, List[Any]] = {}
    for event in read_log(log):
        count = counts.setdefault(event.id, [0, NEVER, 0, NEVER])
        opens = counted_opens(event)
        if event.event == "hit":
            count[:2] = count[0] + 1, max(count[1], event.time)
        if opens:
            count[2:4] = count[2] + opens, max(count[3], event.time)
        sender = ["sender", event.id, event.address, event.agent]
        if event.reason == "composing" and sender not in count \
                and is_personal(event.agent):
            count.append(sender)
            yield sender
    # Read after the log: where both have the same hits, none came in between.
    for row in register_rows(register)[1]:
        count = counts.get(row["id"], [0, NEVER, 0, NEVER])
        hits, opens = int(row["hits"]), int(row["opens"])
        if count[0] > hits or count[0] == hits and opens != max(count[2], 0):
            yield ["counters", row["id"], "%010d" % count[0], count[1],
                   "%010d" % max(count[2], 0), count[3]]
    yield ["end"]


class EventLog:
    """Append events to a log; what the disk refuses waits in bounded memory.

    limit is the size in bytes at which a file gets a number and a new one is begun;
    0 is no limit.
    """

    def __init__(self, path: str, limit: int = 0,
                 sync_each_event: bool = False) -> None:
        self.path = os.path.realpath(path)
        self._sync_each_event = sync_each_event
        self.trouble = ""
        self.dirty = False
        self._limit = limit
        self._file = -1
        self._inode = 0
        self._size = 0  # of the file, at the last look
        self._end = 0  # how far we have written or read it
        self._torn = False  # a process died in the middle of its last line
        self._waiting: List[bytes] = []
        self.lost = 0  # events for which there was no room

    def look(self) -> None:
        """Begin a new file if the old one was moved, deleted or is full."""
        try:
            status = os.stat(self.path)
            if status.st_ino == self._inode:
                self._size = status.st_size
                if not self._limit or status.st_size < self._limit:
                    return
                self._rotate()
        except FileNotFoundError:
            pass
        except OSError as error:
            self.trouble = explain(error)
        self.reopen()

    def news(self) -> Iterable[Event]:
        """Return the events that others have appended since the last look."""
        if self._size <= self._end:
            return ()
        with EventFile(self.path, self._end) as source:
            self._end = self._size
            return list(source)

    def _rotate(self) -> None:
        """Give the file the next number, unless somebody is rewriting the log."""
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
        numbers = [int(name.rpartition(".")[2]) for name in log_files(self.path)[:-1]]
        os.rename(self.path, f"{self.path}.{max(numbers, default=0) + 1}")

    def reopen(self) -> None:
        """Open the file that the path names, and make it if there is none."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _O_BINARY
        try:
            if os.path.exists(self.path) and not os.path.isfile(self.path):
                raise OSError(errno.EINVAL, "not a regular file", self.path)
            file = os.open(self.path, flags, 0o600)
        except OSError as error:
            self.trouble = explain(error)
            file = -1  # what is gone must not be written to
        if self._file >= 0:
            os.close(self._file)
        self._file, self._inode = file, 0
        if file < 0:
            return
        status = os.fstat(file)
        self._inode = status.st_ino
        self._size = self._end = status.st_size
        self._torn = status.st_size > 0 \
            and os.pread(file, 1, status.st_size - 1) != b"\n"
        if not status.st_size:
            self._write(EVENT_HEADER)

    def append(self, line: bytes) -> None:
        """Append one line; keep it in memory if that is impossible."""
        if not self._waiting and self._write(line):
            return
        if len(self._waiting) < MAX_WAITING_LINES:
            self._waiting.append(line)
        else:
            self.lost += 1

    def tend(self, is_known: Callable[[bytes], bool]) -> None:
        """Write what waits, if the disk takes it now and its id is still known."""
        if self.trouble:
            self.trouble = ""
            self.look()
        while self._waiting:
            tag = self._waiting[0].split(b",", 3)[2]
            if is_known(tag) and not self._write(self._waiting[0]):
                return
            del self._waiting[0]

    def _write(self, line: bytes) -> bool:
        """Write a line at once; tell whether it is in the file, whole."""
        data = b"\n" + line if self._torn else line
        try:
            written = os.write(self._file, data)
            if written < len(data):  # the lock is held: the end is ours to cut off
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.trouble = f"event log: {error.strerror}"
            return False
        self._end += written
        self._torn, self.dirty = False, True
        if self._sync_each_event:
            self._sync_now()
        return True

    def _sync_now(self) -> None:
        """Bring a line to the disk itself; it is in the file in any case."""
        try:
            os.fsync(self._file)
        except OSError as error:
            self.trouble = f"event log: {error.strerror}"

    def sync(self) -> None:
        """Bring what was written to the disk itself; safe in a thread of its own."""
        self.dirty = False
        sync_file(self.path)


# ---------------------------------------------------------------------------
# Verdicts: was it a person?
# ---------------------------------------------------------------------------
# Pure functions: the facts of one request in, a verdict and its reason out. No
# socket, no clock, no file; tables are compiled at first use.
#
# The order is from what is certain to what is likely; the first to speak wins:
#   1. the request says that nobody reads (HEAD, prefetch headers);
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
OPENS = (HUMAN, PROXY)

MAX_AGENT = 1000        # characters judged; the longest known of a person: 881
CACHE_SIZE = 4096       # agents, and addresses, whose answer is remembered
PROBE_WINDOW = 60.0     # seconds; in gophish#973 the clean id came within one
COMPANY_WINDOW = 60.0   # seconds in which two networks are hardly one reader
V6 = 1 << 128           # keeps ::1 apart from 0.0.0.1
UNTIMED = float("inf")  # the age of a hit where the time of sending is not known
CERTAIN = 2             # the rank of opens that no other open turns into machine


class Seen(NamedTuple):
    """An earlier request for the same tag."""

    ago: float                      # seconds before the hit being judged
    address: str
    agent: str
    verdict: str
    reason: str
    damaged: bool = False           # a live id with junk appended or changed


class Facts(NamedTuple):
    """What one request tells: the input of judge."""

    agent: str = ""                 # '' when absent
    address: str = ""               # IPv4 or IPv6, perhaps truncated, '' unknown
    method: str = "GET"
    purpose: str = ""               # Sec-Purpose, Purpose, X-Purpose, X-Moz
    age: Optional[float] = None     # seconds since sending, None or < 0: unknown
    earlier: Sequence[Seen] = ()    # the last minutes of this tag, oldest first


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
    "head": "asked only for the head: a link check",
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
    "unrecognised": "an agent that no rule knows",
    "repeat": "the same client again within seconds: no further open",
    "composing": "fetched while the message was being written",
    "sender-client": "the program that fetched it while it was being written",
    "own-network": "one of the sender's own networks",
}


class AgentRule(NamedTuple):
    """One line of AGENT_RULES: an agent that matches pattern has the verdict."""

    reason: str
    verdict: str
    pattern: str                    # searched in the agent in lower case
    sure: str
    source: str


# Read from the top; the first pattern found decides. Proxies stand first, as they
# quote a browser; then what says itself to be a machine; mail programs before the
# forms that only lack a browser's; browsers last, since everything imitates them.
# Kinds rather than names: what robots call themselves, what a browser looks like.
# Alternatives begin with a letter where they can: that makes re three times as
# fast. Cubot is a make of phone, CamScanner an app.
AGENT_RULES = (
    AgentRule("gmail-proxy", PROXY, r"googleimageproxy", "A", "gophish#1390"),
    AgentRule("yahoo-proxy", PROXY, r"yahoomailproxy", "A", "uap-core tests"),
    AgentRule("seznam-proxy", PROXY, r"seznamemailproxy", "A", "browscap"),
    AgentRule("rambler-proxy", PROXY, r"ramblermail/", "B", "device-detector"),
    AgentRule("ukrnet-proxy", PROXY, r"mail\.ukr\.net proxy", "B", "device-detector"),
    AgentRule("superhuman-proxy", PROXY, r"superhumanproxy", "A", "YAUAA"),
    AgentRule("fastmail-proxy", PROXY, r"fastmailua/", "A", "Fastmail help"),
    AgentRule("shortwave-proxy", PROXY, r"^shortwave image", "B", "monperrus's list"),
    AgentRule("mail-proxy", PROXY, r"mail.{0,20}proxy", "C", "form of the above"),
    AgentRule("no-agent", MACHINE, r"^\W*$", "B", "laravel-passwordless-login#79"),
    AgentRule("apple-mpp-agent", MACHINE, r"^mozilla/5\.0$", "A", "uap-core#509"),
    AgentRule("gmail-prefetch", MACHINE, r"edge/12\.246 mozilla/5\.0$", "A",
              "mautic#10245, bird.com"),
    AgentRule("office-probe", MACHINE,
              r"^microsoft (?:office|exchange)(?!.*outlook)|^office 365|dataaccessd/",
              "B", "GMass's list"),
    AgentRule("crawler", MACHINE,
              r"bot(?<!cubot)|crawl|spider|slurp|scrap(?:e|y|ing)|archiv|larbin|nutch"
              r"|heritrix|index(?:er|ing)|harvest|search ?engine|sitemap|httrack"
              r"|research(?! in)|wayback|mediapartners|copier|grabber|leech|walker"
              r"|stripper", "A", "crawler-user-agents"),
    AgentRule("security-scanner", MACHINE,
              r"scan(?<!camscan)(?!ia)|virus|malware|vulnerab|security|safe-?links"
              r"|safe-?browsing|bluecoat|trend ?micro|trendwinhttp|sophos|barracuda"
              r"|spamexperts|scmguard|sqlmap|nuclei|nikto|nmap|nessus|qualys|censys"
              r"|shodan|acunetix", "B", "browscap"),
    AgentRule("preview", MACHINE,
              r"preview|facebookexternal|meta-external|-google|unfurl|embedly|snap url"
              r"|google(?:-|other|ad|messages| web| fav| page| wire)|-user/\d", "A",
              "the vendors' pages"),
    AgentRule("preview", MACHINE,
              r"^(?:whatsapp|slack|viber|discord|skype|telegram|iframely)", "A",
              "the vendors' pages; at the start, since in-app browsers end so"),
    AgentRule("headless", MACHINE,
              r"headless|phantomjs|casperjs|slimerjs|puppeteer|playwright|selenium"
              r"|webdriver|jsdom|htmlunit|wkhtml|html2|render(?:er|tron)|splash\b"
              r"|screenshot|thumbnail|snapshot|capture|cypress/|\(unknown; linux",
              "A", "isbot's fixtures"),
    AgentRule("monitor", MACHINE,
              r"monitor|uptime|pingdom|ptst\b|lighthouse|gtmetrix|synthetic|dareboost"
              r"|gomez|site24|catchpoint|datadog|ruxit|relic|neustar|diagnos|keynote"
              r"|prob(?:e|ing)\b|check(?:er|ing)?\b|link ?check|validat|verif|audit"
              r"|analy[sz]|statist|survey|sniff|benchmark| test(?:er|ing)?\b|insight"
              r"|observatory|seo(?!ul)|page ?speed|speed ?curve|transcod|inspect"
              r"|siteimprove", "B", "isbot's fixtures"),
    AgentRule("fetcher", MACHINE,
              r"feed|rss|fetch|favicon|downloader|resolver|aggregat|podcast"
              r"|newsread|bookmark|sucker|collector|parser|proxy\b|convert|translat"
              r"|extract|agent(?:/|\b(?!-))", "B", "isbot's fixtures"),
    AgentRule("http-library", MACHINE,
              r"http[-_.: ]?/?(?:client|lib|request|get|kit|rb|java)|urllib|libwww-perl"
              r"|requests/|curl/|winhttp", "A", "isbot's fixtures"),
    AgentRule("http-library", MACHINE,
              r"^(?:[\w.]*http[\w.]*/|(?:java|python|perl|ruby|php|go|node|curl|wget"
              r"|okhttp|axios|got|undici|guzzle|faraday|jetty|jersey|ahc|aiohttp|lwp"
              r"|pycurl|lua|rust|dart|scala|deno|bun|dotnet|reqwest|postman|insomnia)"
              r"(?![a-z]))", "A", "isbot's fixtures"),
    AgentRule("contact", MACHINE,
              r"https?:/(?!/bsalsa)|www\.|@[\w-]+\.[a-z]{2}| at .{2,40} dot "
              r"|\.(?:com|net|org|io|de)(?:\)|/[a-z]|$)|\.ly/", "B",
              "robots' custom; bsalsa is a part of browsers"),
    AgentRule("mail-client", HUMAN,
              r"thunderbird|ms-?office|outlook|airmail|postbox|sparkdesktop|sparkmail"
              r"|mailbird|mailspring|foxmail|mailmaster|bluemail|zohomail"
              r"|tutanota|the bat!|lotus-notes|kmail|kontact/|evolution/|zdesktop"
              r"|zimbra|sparrow/|navermail|yahoomobile.{0,9}mail|ymail|android-gmail"
              r"|newton/|barca|windows ?(?:live)?.?mail|mail\w*app\b", "A",
              "uap-core, device-detector"),
    AgentRule("mail-client", HUMAN,
              r"^(?:mail/\d.*cfnetwork|em[ _]?client"
              r"|[a-z]*(?:mail|bird)(?:app|pro|desktop)?[/ ]v?\d)", "B",
              "Apple's Mail, eM Client; the form of the above"),
    AgentRule("compatible-name", MACHINE,
              r"\(compatible;(?!.*(?:windows|linux|x11|android|mac_|macintosh|symbian"
              r"|blackberry|nokia|os/2|haiku|syllable|bsd|sunos|amiga|brew))(?! ?(?:u;"
              r"|msie \d|konqueror|omniweb|icab|dillo|opera|mmef|netfront|webtv|links"
              r"|lynx|netsurf|mozilla|[^;)]*browser))|^mozilla/5\.0 \([\w/.]+\)$",
              "A", "crawler-user-agents"),
    AgentRule("forged", MACHINE,
              r"^mozilla[,!]|safari/[\d.]+; ?[^ /]+(?:/1\.0|;)|msie or|\{\}"
              r"|chrome/[\d.]+(?!mobile)[a-z]+/|/1[5-9]\d{11}\b", "C",
              "no browser writes so; the last is a time in ms"),
    AgentRule("app-library", UNKNOWN,
              r"^dalvik/|^[^(]* cfnetwork/|^[^(]*\([^)]*gzip\)$", "C", "any app"),
    AgentRule("browser", HUMAN,
              r"^(?:mozilla|opera) ?/ ?\d.{0,30}?(?:\(|x11|linux|windows|macintosh)",
              "A", "every browser since 1994"),
    AgentRule("handset", HUMAN,
              r"midp|up\.browser|browser?/\w|ucweb|ucbrowser|obigo|netfront|polaris"
              r"|opera[/ ]\w|webkit|mozilla/\d\.\d ?\(|iphone|\(ios|ipad[;,\d]|fbav/"
              r"|[ (;]android[ /]\d|for android|macintosh|\(x11|\(windows;|windows ce"
              r"|windows phone|symbian|maui|\(gui\)|mosaic|nintendo|playstation|amiga"
              r"|hbbtv|smart-?tv", "B", "YAUAA, WhichBrowser"),
    AgentRule("handset", HUMAN,
              r"^(?:e?links|lynx|w3m|icab|netsurf|dillo|midori|uzbl|galeon|dolphin"
              r"|sleipnir|quicktime|itunes|hotjava|amaya|nokia|sec-|samsung|lg[-/e]"
              r"|sie-|sonyericsson|mot-|blackberry|docomo|kddi|softbank|vodafone"
              r"|j-phone|htc|huawei|zte|alcatel|benq|sagem|sharp|panasonic|philips"
              r"|pantech|palm|motorola|portalmmm)", "B", "YAUAA, WhichBrowser"),
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
BROWSERS = ("browser", "handset")


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


class TimeRule(NamedTuple):
    """One line of TIME_RULES: an agent that comes sooner than it can be a person."""

    within: float                   # seconds since sending
    agents: Tuple[str, ...]         # reasons found so far, or ANY_AGENT
    reason: str
    sure: str
    source: str


# Of 836 scans 61 % came within 10 s and 84 % within 20 s; the soonest genuine
# open that is documented came after 66 s. No scanner claims to be a mail program.
TIME_RULES = (
    TimeRule(10.0, ANY_AGENT, "fast", "A", "craft-campaign#546"),
    TimeRule(30.0, (*BROWSERS, "private-relay"), "early", "B", "craft-campaign#546"),
)


@lru_cache(maxsize=1)
def _agent_patterns() -> Tuple[Tuple[re.Pattern[str], Verdict], ...]:
    """Compile AGENT_RULES, at first use: what judges nothing does not pay for it."""

    return tuple((re.compile(rule.pattern), Verdict(rule.verdict, rule.reason))
                 for rule in AGENT_RULES)


@lru_cache(maxsize=CACHE_SIZE)
def _read_cut(agent: str) -> Verdict:
    text = agent.lower().strip()
    for pattern, verdict in _agent_patterns():
        if pattern.search(text):
            return verdict
    return Verdict(UNKNOWN, "unrecognised")


def _read_agent(agent: str) -> Verdict:
    """Judge a User-Agent by AGENT_RULES alone, by its first MAX_AGENT characters.

    Cut before it is remembered, so that hostile agents cost 4 MB at most.
    """
    return _read_cut(agent[:MAX_AGENT])


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


class _Ranges(NamedTuple):
    """NETWORKS as three parallel lists, sorted by the first address."""

    firsts: List[int]
    lasts: List[int]
    names: List[str]


@lru_cache(maxsize=1)
def _ranges() -> _Ranges:
    rows = []
    for line in NETWORKS:
        for prefix in line.prefixes.split():
            address, _, length = prefix.partition("/")
            bits = (128 if ":" in address else 32) - int(length)
            first = _number(address) or 0
            rows.append((first, first + (1 << bits) - 1, line.name))
    rows.sort()
    return _Ranges([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])


@lru_cache(maxsize=CACHE_SIZE)
def _owner(address: str) -> str:
    """Name the line of NETWORKS that an address falls in, '' for none.

    A truncated address (203.0.113.0) can miss the few prefixes longer than /24.
    """
    number = _number(address)
    if number is None:
        return ""
    ranges = _ranges()
    at = bisect_right(ranges.firsts, number) - 1
    return ranges.names[at] if at >= 0 and number <= ranges.lasts[at] else ""


def _prefix(address: str, v4_bits: int, v6_bits: int) -> str:
    import socket

    number = _number(address)
    if number is None:
        return ""
    if number >= V6:
        number -= V6
        size, bits, family = 128, v6_bits, socket.AF_INET6
    else:
        size, bits, family = 32, v4_bits, socket.AF_INET
    kept = number >> (size - bits) << (size - bits)
    return f"{socket.inet_ntop(family, kept.to_bytes(size // 8, 'big'))}/{bits}"


@lru_cache(maxsize=CACHE_SIZE)
def network(address: str) -> str:
    """Name the /24 or /48 of an address, '203.0.113.0/24'; '' for none."""

    return _prefix(address, 24, 48)


@lru_cache(maxsize=CACHE_SIZE)
def _neighbourhood(address: str) -> str:
    return _owner(address) or _prefix(address, 16, 32)


def related(a: str, b: str) -> bool:
    """Tell whether two addresses may well be one client or one owner's machines.

    True in the same /16 or IPv6 /32, or both in the same line of NETWORKS.
    An unknown address is related to nothing.
    """
    near = _neighbourhood(a)
    return near != "" and near == _neighbourhood(b)


def _by_request(facts: Facts) -> Optional[Verdict]:
    if facts.method == "HEAD":
        return Verdict(MACHINE, "head")
    purpose = facts.purpose.lower()
    if "prefetch" in purpose or "preview" in purpose or "prerender" in purpose:
        return Verdict(MACHINE, "prefetch-header")
    return None


def _by_probe(facts: Facts) -> Optional[Verdict]:
    for seen in facts.earlier:
        if (seen.damaged and seen.ago <= PROBE_WINDOW
                and related(seen.address, facts.address)):
            return Verdict(MACHINE, "probe")
    return None


def _age(facts: Facts) -> float:
    return facts.age if facts.age is not None and facts.age >= 0 else UNTIMED


def _by_network(facts: Facts, found: Verdict) -> Verdict:
    """Let NETWORK_RULES correct what the agent alone was read as.

    An image proxy stays one: Gmail's shares its addresses with Google's robots.
    """
    owner = _owner(facts.address)
    if not owner or found.verdict == PROXY:
        return found
    age = _age(facts)
    for rule in NETWORK_RULES:
        if (owner in rule.networks and rule.after <= age <= rule.within
                and (not rule.agents or found.reason in rule.agents)):
            return Verdict(rule.verdict, rule.reason)
    return found


def _by_time(facts: Facts, found: Verdict) -> Verdict:
    """Let TIME_RULES turn what came too soon into machine.

    An image proxy is left alone: in 9.8 billion opens it fetched on display
    (bird.com), against three reports of fetches on delivery (gophish#1390).
    """
    age = _age(facts)
    if found.verdict in (PROXY, MACHINE) or age == UNTIMED:
        return found
    for rule in TIME_RULES:
        if age <= rule.within and (not rule.agents or found.reason in rule.agents):
            return Verdict(MACHINE, rule.reason)
    return found


def _rank(verdict: str, agent: str) -> int:
    """Rate an open: 2 proxy or mail program, 1 browser, 0 browser before 2022."""

    if verdict == PROXY or _read_agent(agent).reason == "mail-client":
        return CERTAIN
    return 0 if re.search(r"(?:Chrome|Firefox)/\d\d?\.|MSIE", agent) else 1


def _rivals(facts: Facts, seen: Seen) -> bool:
    """Tell whether an earlier open cannot be the same reader as this request.

    One client may change from IPv6 to IPv4 between two requests.
    """
    if (seen.verdict not in OPENS or seen.ago > COMPANY_WINDOW
            or not network(seen.address) or not network(facts.address)):
        return False
    other_family = (":" in seen.address) != (":" in facts.address)
    if other_family and seen.agent == facts.agent:
        return False
    return not related(seen.address, facts.address)


def _by_company(facts: Facts, found: Verdict) -> Verdict:
    """Turn an open into machine where a better one came from another network."""

    if found.verdict not in OPENS or not facts.earlier:
        return found
    rank = _rank(found.verdict, facts.agent)
    if rank < CERTAIN and any(_rivals(facts, seen)
                              and _rank(seen.verdict, seen.agent) > rank
                              for seen in facts.earlier):
        return Verdict(MACHINE, "many-networks")
    return found


def outranks(facts: Facts, verdict: Verdict, seen: Seen) -> bool:
    """Tell whether an open just judged turns an earlier one into machine.

    For every seen in facts.earlier for which this is true, the caller corrects
    that one to Verdict('machine', 'many-networks'). Of two that are alike the
    later stays, since scanners come before readers. Image proxies and mail
    programs are never turned: both devices of one reader may be real. Never
    true for an open that judge turned away itself, so one always stays.
    """
    if verdict.verdict not in OPENS or not _rivals(facts, seen):
        return False
    rank = _rank(seen.verdict, seen.agent)
    return rank < CERTAIN and rank <= _rank(verdict.verdict, facts.agent)


@lru_cache(maxsize=CACHE_SIZE)
def judge_client(agent: str, address: str, purpose: str) -> Verdict:
    """Judge a GET by its client alone, where nothing else is known of it."""
    return judge(Facts(agent, address, "GET", purpose))


def judge(facts: Facts) -> Verdict:
    """Judge one request: who fetched the pixel, and which rule says so.

    Pure and quick (2 us for an agent and address seen before). Rules that need
    the time of sending are silent where facts.age is None or negative. 'self'
    is the caller's to find, before or after: it depends on the sender, not on
    the request; so is whether an open repeats the one before.
    """
    certain = _by_request(facts) or _by_probe(facts)
    if certain:
        return certain
    found = _by_network(facts, _read_agent(facts.agent))
    return _by_company(facts, _by_time(facts, found))


MANY_NETWORKS = Verdict(MACHINE, "many-networks")


class Hit(NamedTuple):
    """One fetch of a known pixel, as the server saw it or the log kept it."""

    id: bytes
    time: float  # seconds since 1970
    address: str
    agent: str
    purpose: str = ""
    composing: bool = False  # within the window after the tag was made
    age: Optional[float] = None  # seconds since the mail was sent, where known
    private: bool = False  # the client asked not to be tracked


class Judgement(NamedTuple):
    """A verdict, what it adds to the opens of its tag, and what it overrules."""

    verdict: str
    reason: str
    opened: bool = False  # the hit itself is a new open
    overruled: Sequence[Hit] = ()  # opens that turn out to be a machine's

    @property
    def opens(self) -> int:
        """What the hit adds to the opens of its tag, or takes away."""
        return self.opened - len(self.overruled)


class Memory:
    """What is remembered of one client of one tag."""

    __slots__ = ("time", "address", "agent", "verdict", "reason", "opens", "private")

    def __init__(self, hit: Hit, verdict: str, reason: str) -> None:
        self.time, self.address, self.agent = hit.time, hit.address, hit.agent
        self.verdict, self.reason, self.private = verdict, reason, hit.private
        self.opens: List[float] = []  # when an open of this client was counted

    def as_hit(self, tag: bytes, when: float) -> Hit:
        """Return the hit at a time that this is the memory of."""
        return Hit(tag, when, self.address, self.agent, private=self.private)


class Judge:
    """Judge hits in the light of those just before; bounded in memory.

    Its state is the last minute of each tag and who fetched pixels while their mail
    was being written. A log read from its beginning brings the same state about.
    """

    REPEAT = 15.0      # seconds in which the same client's fetches are one open
    MINUTE = 60.0      # seconds that anything is remembered
    MOST_TAGS = 8192   # with a memory
    MOST_SENDERS = 65536

    def __init__(self, is_me: Callable[[str], bool] = lambda address: False) -> None:
        self._is_me = is_me
        # Ordered, for only an OrderedDict finds its oldest entry at once.
        self._tags: OrderedDict[bytes, List[Memory]] = OrderedDict()
        self._strays: OrderedDict[str, List[Tuple[float, str, bytes]]] = OrderedDict()
        self._senders: OrderedDict[int, None] = OrderedDict()

    def judge(self, hit: Hit) -> Judgement:
        """Return the judgement of one hit, and remember it."""
        memories = self._remembered(hit)
        if self._is_me(hit.address):
            return Judgement(SELF, "own-network")
        if hit.composing:
            if is_personal(hit.agent):
                self.learn_sender(hit.id, hit.address, hit.agent)
            return Judgement(SELF, "composing")
        if self._senders and self._is_sender(hit):
            return Judgement(SELF, "sender-client")
        others = [memory for memory in memories if memory.address != hit.address]
        earlier = self._earlier(hit, others)
        beaten: List[Memory] = []
        if earlier or hit.age is not None:
            facts = Facts(hit.agent, hit.address, "GET", hit.purpose, hit.age, earlier)
            found = judge(facts)
            beaten = [other for other, seen in zip(others, earlier)
                      if outranks(facts, found, seen)]
        else:
            found = judge_client(hit.agent, hit.address, hit.purpose)
        mine = self._memory(hit, found, memories)
        if found.verdict not in OPENS:
            return Judgement(*found)
        overruled = self._overrule(hit, beaten) if beaten else []
        if mine.opens and abs(hit.time - mine.opens[-1]) <= self.REPEAT:
            return Judgement(found.verdict, "repeat", False, overruled)
        mine.opens = [*mine.opens[-3:], hit.time]
        return Judgement(*found, True, overruled)

    def _overrule(self, hit: Hit, memories: List[Memory]) -> List[Hit]:
        """Turn what clients opened within the minute into a machine's; return it."""
        overruled = []
        for memory in memories:
            memory.verdict, memory.reason = MANY_NETWORKS
            overruled += [memory.as_hit(hit.id, when) for when in memory.opens
                          if abs(hit.time - when) <= self.MINUTE]
            memory.opens = []
        return overruled

    def _remembered(self, hit: Hit) -> List[Memory]:
        """Return what the last minute knows of a tag."""
        memories = self._tags.pop(hit.id, [])
        if memories and hit.time - memories[0].time > self.MINUTE:
            memories = [memory for memory in memories
                        if abs(hit.time - memory.time) <= self.MINUTE]
        self._tags[hit.id] = memories  # last, for the first is the first to go
        if len(self._tags) > self.MOST_TAGS:
            self._tags.popitem(last=False)
        return memories

    def _memory(self, hit: Hit, found: Verdict, memories: List[Memory]) -> Memory:
        """Return the memory of the client that fetched, made or brought up to date.

        Two addresses of an image proxy are one client, and so are two of a network.
        """
        for memory in memories:
            if memory.agent == hit.agent and (
                    found.verdict == PROXY and memory.reason == found.reason
                    or memory.address == hit.address
                    or network(memory.address) == network(hit.address)):
                memory.time, memory.verdict = hit.time, found.verdict
                memories.remove(memory)  # to the end: the first is the oldest
                memories.append(memory)
                return memory
        memories.append(Memory(hit, *found))
        del memories[:-8]
        return memories[-1]

    def _earlier(self, hit: Hit, memories: List[Memory]) -> List[Seen]:
        """Return what was seen for a tag, its damaged copies last."""
        seen = [Seen(hit.time - m.time, m.address, m.agent, m.verdict, m.reason)
                for m in memories]
        if self._strays:
            for when, address, stray in self._strays.get(network(hit.address), ()):
                if hit.time - when <= self.MINUTE and is_damaged(stray, hit.id):
                    seen.append(Seen(hit.time - when, address, "", "", "", True))
        return seen

    def stray(self, segment: bytes, address: str, when: float) -> None:
        """Remember part of a path that looks like an id and is none."""
        strays = self._strays.setdefault(network(address), [])
        strays[:] = [*strays[-3:], (when, address, segment[:80])]
        if len(self._strays) > self.MOST_TAGS:
            self._strays.popitem(last=False)

    def forget_old(self, now: float) -> None:
        """Forget what is older than a minute."""
        for tag in [tag for tag, memories in self._tags.items()
                    if not memories or abs(now - memories[-1].time) > self.MINUTE]:
            del self._tags[tag]
        for key in [key for key, strays in self._strays.items()
                    if now - strays[-1][0] > self.MINUTE]:
            del self._strays[key]

    def learn(self, event: Event) -> None:
        """Remember a hit that another server has judged."""
        tag = event.id.encode()
        hit = Hit(tag, seconds(event.time), event.address, event.agent)
        if event.reason == "composing" and is_personal(event.agent):
            self.learn_sender(tag, event.address, event.agent)
        elif event.event == "verdict":
            self._overrule(hit, [memory for memory in self._remembered(hit)
                                 if memory.agent == event.agent
                                 and network(memory.address) == network(hit.address)])
        elif event.event == "hit" and event.address:
            memory = self._memory(hit, Verdict(event.verdict, event.reason),
                                  self._remembered(hit))
            if counted_opens(event):
                memory.opens.append(hit.time)

    def learn_sender(self, tag: bytes, address: str, agent: str) -> None:
        """Remember who fetched a pixel while its mail was being written."""
        self._senders[hash((tag, address, agent))] = None
        if len(self._senders) > self.MOST_SENDERS:
            self._senders.popitem(last=False)

    def _is_sender(self, hit: Hit) -> bool:
        """Tell whether the hit is by its mail's sender; a log may know the network."""
        whole = hash((hit.id, hit.address, hit.agent))
        kept = hash((hit.id, kept_address(hit.address, "truncate"), hit.agent))
        return whole in self._senders or kept in self._senders


def is_personal(agent: str) -> bool:
    """Tell whether an agent may be one person's own program.

    Whoever writes in Gmail fetches through the same proxy as whoever reads there.
    """
    return _read_agent(agent).verdict not in (PROXY, MACHINE)


def is_damaged(stray: bytes, tag: bytes) -> bool:
    """Tell whether a stray is the id with something appended or a little changed.

    Seen as %27, a wrong last letter, capitals (gophish#973, emdash#3298).
    """
    stray = stray.lower()
    if tag in stray:
        return True
    same = sum(a == b for a, b in zip(stray, tag))
    return abs(len(stray) - len(tag)) <= 3 and same >= len(tag) - 3


@lru_cache(maxsize=4096)
def kept_address(address: str, how: str) -> str:
    """Return what is kept of an address: "full", "none", or "truncate": /24 or /48."""
    if how == "truncate":
        return network(address).partition("/")[0]
    return address if how == "full" else ""


# ---------------------------------------------------------------------------
# Hindsight: judging anew, and forgetting
# ---------------------------------------------------------------------------
# Both write the log anew, event by event, while servers go on: only what they add at
# the end, and the register, is changed under the lock.

# Verdicts that rest on what no log keeps stay as they are.
UNREPEATABLE = ("prefetch-header", "head", "probe")


def rewrite_log(path: str, change: Callable[[Event], Iterable[Event]],
                register: Register, finish: Callable[[], None]) -> None:
    """Put what change makes of each event in its place, in all files of a log.

    finish is called last, with the register's lock held since the last event was read.
    """
    path = os.path.realpath(path)
    with locked_log(path), ExitStack() as drafts:
        folder = os.path.dirname(path)
        for entry in os.listdir(folder):  # what a killed rewriting left
            if entry.startswith(os.path.basename(path)) and entry.endswith(".new"):
                os.unlink(os.path.join(folder, entry))
        for name in log_files(path):  # of which path is the last
            source = drafts.enter_context(EventFile(name))
            new = drafts.enter_context(NewFile(name, source.file.fileno()))
            out = drafts.enter_context(open(os.dup(new), "wb"))
            out.writelines(changed_lines(source, change))
        with register:
            if source.inode != os.stat(path).st_ino:
                raise TrackerError(f"{path} was moved meanwhile; run this once more")
            out.writelines(changed_lines(source, change))
            drafts.close()  # puts all of them in place
            finish()


def changed_lines(source: EventFile, change: Callable[[Event], Iterable[Event]]
                  ) -> Iterator[bytes]:
    """Yield what change makes of each line; what is no event stays as it is."""
    for line in source.lines():
        event = parse_event(line)
        if event:
            yield from (new.line() for new in change(event))
        else:
            yield line


@contextmanager
def locked_log(path: str) -> Iterator[None]:
    """Keep others from rewriting a log; servers may append to it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | _O_BINARY, 0o600)
        try:
            lock_file(file)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                yield
                return
        finally:
            os.close(file)


class Rejudging:
    """Today's verdicts for yesterday's hits: called with one event after the other.

    opens tells, by id, what has to be added to the opens of the register; changed
    counts what differs by old and new verdict and reason.
    """

    def __init__(self, age: Callable[[Event], Optional[float]]) -> None:
        self.hits = 0
        self.opens: Dict[str, int] = {}
        self.changed: Dict[Tuple[str, str, str, str], int] = {}
        self._age = age
        self._judge = Judge()

    def __call__(self, event: Event) -> List[Event]:
        """Return what an event becomes: itself, judged anew, and what it overrules."""
        if event.event == "verdict" and not is_settled(event):
            self._add(event.id, 1)  # it is found again, or no longer true
            return []
        if event.event != "hit":
            return [event]
        self.hits += 1
        if is_settled(event):
            return [event]
        found = self._judge.judge(Hit(event.id.encode(), seconds(event.time),
                                      event.address, event.agent,
                                      age=self._age(event)))
        self._add(event.id, found.opens - counted_opens(event))
        new = event._replace(verdict=found.verdict, reason=found.reason)
        if new != event:
            key = event.verdict, event.reason, new.verdict, new.reason
            self.changed[key] = self.changed.get(key, 0) + 1
        return [new, *(Event(utc_text(old.time), "verdict", event.id, *MANY_NETWORKS,
                             old.address, old.agent) for old in found.overruled)]

    def _add(self, tag: str, opens: int) -> None:
        """Add to the opens of an id; only what differs takes memory."""
        total = self.opens.get(tag, 0) + opens
        if total:
            self.opens[tag] = total
        else:
            self.opens.pop(tag, None)


def is_settled(event: Event) -> bool:
    """Tell whether a verdict rests on what the log does not hold."""
    hidden = not event.agent and event.reason != "no-agent"
    # A truncated address can fall out of a network smaller than a /24.
    by_network = any(event.reason == rule.reason for rule in NETWORK_RULES)
    return hidden or not event.address or event.verdict == SELF \
        or event.reason in UNREPEATABLE or by_network and not _owner(event.address)


def correct_register(register: Register, path: str, opens: Dict[str, int]) -> None:
    """Find the last open of some ids again, after their opens have changed."""
    times: Dict[str, Set[str]] = {tag: set() for tag in opens}
    newest = ""
    for event in read_log(path) if opens else ():
        newest = max(newest, event.time)
        if event.id in opens and counted_opens(event) > 0:
            times[event.id].add(event.time)
        elif event.id in opens and event.event == "verdict":
            times[event.id].discard(event.time)
    with register:
        for tag in opens:
            place = register.find(tag.encode())
            if place and place.last_open.decode() <= newest:
                known = max(times[tag], default=place.last_open.decode())
                register.correct(tag.encode(), place.opens,
                                 known if place.opens else NEVER)


# ---------------------------------------------------------------------------
# Pixel server
# ---------------------------------------------------------------------------
# Strangers reach this. One thread waits for everybody and never for anybody: a
# request head that is whole and clean is answered at once; one that trickles in
# waits in a selector, 8 KB and 5 seconds in total. Whatever is not the plain GET of
# a pixel goes through http.server's handler, its bytes already here.

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
PIXEL_HEAD = _HEAD % (200, b"OK", b"image/gif", len(PIXEL), b"")
PIXEL_ANSWER = PIXEL_HEAD + PIXEL

_STATUS = {200: b"OK", 400: b"Bad Request", 405: b"Method Not Allowed",
           431: b"Request Header Fields Too Large",
           503: b"Service Unavailable"}

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# RFC 9112, strictly: one space, a visible target, CRLF, no folding, no NUL.
_HEADERS = rb"((?:%b:[^\r\n\0]*\r\n)*)\r\n" % _TOKEN
_CLEAN_HEAD = re.compile(rb"%b [!-~]+ HTTP/1\.[01]\r\n%b" % (_TOKEN, _HEADERS))
_CLEAN_GET = re.compile(rb"GET (/[!-~]*) HTTP/1\.[01]\r\n" + _HEADERS)
_BODY_HEADER = re.compile(rb"^(?:content-length|transfer-encoding)[ \t]*:", re.I | re.M)
# The headers that tell who fetches, and whether it wants to be known.
_TELLING_HEADER = re.compile(
    rb"^(user-agent|x-forwarded-for|(?:sec-|x-)?purpose|x-moz|sec-gpc|dnt)"
    rb":[ \t]*([^\r\n]*)", re.I | re.M)
_STRAY = re.compile(rb"[^/]{15,80}")  # a path segment that may be a damaged id
_METHOD_START = re.compile(rb"[A-Z]{1,20}(?: |$)")

MAX_HEAD = 8192      # bytes of a request head; browsers send under 2,000
HEAD_SECONDS = 5.0   # for the whole head and the TLS handshake before it
LINGER_SECONDS = 1.0  # for reading what a client still sends behind our answer
LINGER_BYTES = 65536
DRAIN_SECONDS = 5.0  # for what is under way when the server is stopped
BACKLOG = 4096       # the stock 5 loses clients in a stall of 0.3 s
BURST = 8            # connections accepted before others get their turn
MAX_WAITING = 4096   # connections
MAX_HELD = 65536     # ids with hits held in memory while the disk refuses them
TICK_SECONDS = 1.0


def answer(status: int, body: bytes = b"", kind: bytes = b"text/plain") -> bytes:
    """Return a whole response; nothing of the request is repeated in it."""
    body = body or _STATUS[status] + b"\n"
    allow = b"Allow: GET, HEAD\r\n" if status == 405 else b""
    return _HEAD % (status, _STATUS[status], kind, len(body), allow) + body


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
        if not is_trusted(client) or not is_address(hop):
            break
        client = hop
    return client


def is_address(text: str) -> bool:
    """Tell whether text is an IPv4 or IPv6 address without a scope."""
    return "%" not in text and _number(text) is not None


def network_test(networks: Sequence[Any]) -> Callable[[str], bool]:
    """Return a test whether an address lies in one of some networks."""
    if not networks:
        return lambda address: False

    @lru_cache(maxsize=4096)
    def is_inside(address: str) -> bool:
        import ipaddress

        return any(ipaddress.ip_address(address) in net for net in networks)
    return is_inside


class Request(NamedTuple):
    """What the headers of a request tell about its client."""

    agent: str = ""
    forwarded: str = ""
    purpose: str = ""
    private: bool = False  # Sec-GPC: 1 or DNT: 1


@lru_cache(maxsize=1024)
def read_headers(headers: bytes) -> Request:
    """Return what a block of header lines tells; clients repeat theirs, so cached."""
    agent, forwarded, purpose, private = "", [], [], False
    for name, value in _TELLING_HEADER.findall(headers):
        name, text = name.lower(), value.rstrip().decode("latin-1")
        if name == b"user-agent":
            agent = text[:MAX_AGENT]
        elif name == b"x-forwarded-for":
            forwarded.append(text)
        elif name in (b"sec-gpc", b"dnt"):
            private = private or text == "1"
        else:
            purpose.append(text)
    return Request(agent, ",".join(forwarded), " ".join(purpose), private)


class LogFile:
    """Lines for people, on stderr or in a file, that never hold anybody up.

    A line that a pipe or terminal does not take at once is dropped.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        self._file = 2
        self._quiet_until: Dict[str, float] = {}
        self.reopen()

    def reopen(self) -> None:
        """Open the file again: it may have been moved away."""
        if self.path:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND \
                | getattr(os, "O_NONBLOCK", 0)
            file = os.open(self.path, flags, 0o640)
            if self._file > 2:
                os.dup2(file, self._file)
                os.close(file)
            else:
                self._file = file
        self._waits = hasattr(os, "O_NONBLOCK") \
            and not stat.S_ISREG(os.fstat(self._file).st_mode)

    def line(self, text: str) -> None:
        """Write a line with the time in front."""
        import select

        line = f"{utc_text(time.time())} {clean(text)}\n".encode()
        try:
            if not self._waits or select.select([], [self._file], [], 0)[1]:
                os.write(self._file, line)
        except (OSError, ValueError):
            pass  # a log that cannot be written must not stop the counting

    def rarely(self, text: str) -> None:
        """Write a line unless the same was written within the last minute."""
        now = time.monotonic()
        if self._quiet_until.get(text, 0.0) <= now:
            self._quiet_until = {t: until for t, until in self._quiet_until.items()
                                 if until > now}
            self._quiet_until[text] = now + 60
            self.line(text)


class Client:
    """One connection whose head is not here yet, or whose rest is being read."""

    __slots__ = ("socket", "address", "received", "deadline", "shaken", "lingering")

    def __init__(self, connection: socket.SocketType, address: str,
                 shaken: bool) -> None:
        self.socket = connection
        self.address = address
        self.received = b""
        self.deadline = time.monotonic() + HEAD_SECONDS
        self.shaken = shaken  # the TLS handshake is done, or none is needed
        self.lingering = -1  # bytes read behind the answer; -1: not answered yet


class Open(NamedTuple):
    """A new open: its event as it is kept, and its tag's name and counts."""

    event: Event
    name: str
    hits: int
    opens: int


class OpenCommand:
    """Run a command for new opens, one at a time, in a thread of its own.

    Calling it returns at once. What does not fit into the queue is dropped, what takes
    longer than the limit is ended, and both are said in the log.
    """

    QUEUE = 100
    LIMIT = 30.0  # seconds

    def __init__(self, command: str, first_only: bool, log: LogFile) -> None:
        import queue
        import threading

        self._command, self._first_only, self._log = command, first_only, log
        self._queue: queue.Queue[Open] = queue.Queue(self.QUEUE)
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> OpenCommand:
        if self._command:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let what is queued run on for a moment, then end what still runs."""
        self._stopping = True
        if not self._command:
            return
        self._thread.join(0 if self._queue.empty() and not self._process else 2.0)
        if self._process:
            self._end(self._process)

    def __call__(self, opened: Open) -> None:
        import queue

        if opened.opens > 1 and self._first_only:
            return
        try:
            self._queue.put_nowait(opened)
        except queue.Full:
            self._log.rarely("on-open: the command is too slow; opens were left out")

    def _run(self) -> None:
        while not (self._stopping and self._queue.empty()):
            opened = self._queue.get()
            try:
                self._start(opened)
            except (OSError, ValueError) as error:
                self._log.rarely(f"on-open: {error}")

    def _start(self, opened: Open) -> None:
        """Run the command for one open; its facts are in the environment only."""
        import subprocess

        facts = {**opened.event._asdict(), **opened._asdict()}
        environment = {"MAILTRACKER_" + name.upper(): clean(str(value))
                       for name, value in facts.items() if name != "event"}
        process = self._process = subprocess.Popen(
            self._command, shell=True, env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait(self.LIMIT)
            if code:
                self._log.rarely(f"on-open: the command exits {code}")
        except subprocess.TimeoutExpired:
            self._log.rarely(f"on-open: ended after {self.LIMIT:.0f} s")
            self._end(process)
        finally:
            self._process = None

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End a command and all that it has started."""
        if hasattr(os, "killpg"):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.kill()
        process.wait()


class Settings(NamedTuple):
    """How a server judges, and what it keeps and tells."""

    quiet: bool = False  # no line for each hit
    trusted: Sequence[Any] = ()  # networks of proxies
    me: Sequence[Any] = ()  # the sender's own networks
    compose_window: float = 120.0  # seconds
    keep_address: str = "truncate"
    keep_agent: bool = True


class PixelServer:
    """Serve pixels and count their hits until stop() is called.

    Nothing but parse, judge, count and answer is done for a hit. on_open is called
    with each new open when its pixel has been sent, and must return at once.
    """

    def __init__(self, register: Register, listener: socket.socket, log: LogFile,
                 settings: Settings = Settings(), events: Optional[EventLog] = None,
                 certificate: Optional[Certificate] = None,
                 on_open: Optional[Callable[[Open], None]] = None) -> None:
        import selectors
        import socket

        self.register = register
        self.stopping = False
        self._listener = listener
        self._socket_type = socket.SocketType
        self._socket_kind = int(listener.family), int(listener.type), listener.proto
        self._no_wait = getattr(socket, "MSG_DONTWAIT", 0)
        # Linux then sends the answer and the end of the connection in one segment.
        self._and_close = self._no_wait | getattr(socket, "MSG_MORE", 0)
        self._log = log
        self._settings = settings
        self._events = events
        self._on_open = on_open
        self._opened: List[Open] = []
        self._judge = Judge(network_test(settings.me))
        self._is_trusted = network_test(settings.trusted)
        self._certificate = certificate
        self._selector = selectors.DefaultSelector()
        self._clients: Dict[int, Client] = {}
        limit = open_file_limit()
        self._most = min(MAX_WAITING, limit - min(64, limit // 2))
        self._held: Dict[bytes, List[Tuple[bytes, bool, int]]] = {}
        self._lost = 0
        self._now = 0
        self._now_text = self._window_start = self._soon = b""
        self._next_tick = 0.0
        self._handler = handler_class()

    # -- the loop -----------------------------------------------------------

    def serve(self) -> None:
        """Answer until stop() is called, then finish what is under way."""
        import selectors

        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        while not self.stopping:
            self._turn()
        self._accept(BACKLOG)
        self._listen(False)
        self._listener.close()
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._clients and time.monotonic() < deadline:
            self._turn()
        for client in list(self._clients.values()):
            self._drop(client)
        self._tend()
        if self._held or self._lost:
            lost = self._lost + sum(map(len, self._held.values()))
            self._log.line(f"{lost} hits are lost: {self.health()}")

    def stop(self) -> None:
        """Make serve() return soon; safe in a signal handler."""
        self.stopping = True

    def call_on(self, file: int, work: Callable[[], object]) -> None:
        """Do some work whenever there is something to read from a descriptor."""
        self._selector.register(file, 1, work)

    def learn_from(self, mending: Mending) -> None:
        """Take over what the log knows better, as soon as it has been read."""
        self.call_on(mending.file, lambda: self._learn(mending))

    def _learn(self, mending: Mending) -> None:
        if mending.read():
            return
        self._selector.unregister(mending.file)
        mended = 0
        with self.register:
            for tag, *counters in mending.rows("counters"):
                mended += self.register.mend(
                    tag.encode(), [cell.encode() for cell in counters])
        for tag, address, agent in mending.rows("sender"):
            self._judge.learn_sender(tag.encode(), address, agent)
        if mended:
            self._log.line(f"counts of {mended} tags were mended from the event log")

    def _turn(self) -> None:
        """Wait for somebody and serve everybody who is ready."""
        for key, _ in self._selector.select(self._patience()):
            if key.data is None:
                self._accept(BURST)
            elif callable(key.data):
                key.data()
            elif key.fd in self._clients and self._clients[key.fd] is key.data:
                self._continue(key.data)
        if time.monotonic() >= self._next_tick:
            self._tick()

    def _patience(self) -> float:
        """Return how many seconds nothing else has to be done."""
        return max(0.0, self._next_tick - time.monotonic())

    def _tick(self) -> None:
        """Do what is due now and then: deadlines, repairs, certificates."""
        now = time.monotonic()
        for client in [c for c in self._clients.values() if c.deadline <= now]:
            self._drop(client)
        self._tend()
        self._judge.forget_old(time.time())
        if self._certificate:
            self._certificate.renew(self._log)
        if not self.stopping:
            self._listen(True)
        busy = self._clients or self._held or self.register.trouble
        self._next_tick = now + TICK_SECONDS / (10 if busy else 1)

    # -- connections --------------------------------------------------------

    def _listen(self, wanted: bool) -> None:
        """Accept connections, or leave them in the backlog for a while."""
        listening = self._listener in self._selector.get_map()
        if wanted and not listening:
            self._selector.register(self._listener, 1, None)
        elif listening and not wanted:
            self._selector.unregister(self._listener)

    def _accept(self, most: int) -> None:
        """Take up to so many connections; answer those whose head is here."""
        plain: List[Tuple[socket.SocketType, re.Match[bytes], str]] = []
        for _ in range(most):
            try:
                # What socket.accept() wraps: its enums are a sixth of a hit's work.
                file, address = self._listener._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, ConnectionError):
                break
            except OSError as error:
                self._make_room(error)
                break
            connection = self._socket_type(*self._socket_kind, file)
            peer = plain_address(address[0])
            request = self._greet(connection, peer)
            if request:
                plain.append((connection, request, peer))
        self._serve(plain)

    def _make_room(self, error: OSError) -> None:
        """Let go of the oldest client when descriptors or memory run out."""
        self._log.rarely(f"cannot accept: {error.strerror}")
        if self._clients:
            self._drop(next(iter(self._clients.values())))
        else:
            self._listen(False)  # until the next tick, rather than spin

    def _greet(self, connection: socket.SocketType,
               peer: str) -> Optional[re.Match[bytes]]:
        """Return the plain GET of a pixel that a client sent; let others wait."""
        try:
            if self._certificate:
                self._wait_for(self._certificate.wrap(connection), peer, shaken=False)
                return None
            head = connection.recv(MAX_HEAD + 1, self._no_wait)
        except BlockingIOError:
            self._wait_for(connection, peer)
            return None
        except (OSError, ValueError):
            connection.close()
            return None
        request = _CLEAN_GET.fullmatch(head)
        if request and not request[1].startswith(b"/health") \
                and not _BODY_HEADER.search(request[2]):
            return request
        client = self._wait_for(connection, peer)
        client.received = head
        self._examine(client)
        return None

    def _serve(self, plain: List[Tuple[socket.SocketType, re.Match[bytes],
                                       str]]) -> None:
        """Count plain GETs, under one lock, and then answer them."""
        self.count([(request[1], request[2], peer) for _, request, peer in plain])
        for connection, _, _ in plain:
            try:
                connection.send(PIXEL_ANSWER, self._and_close)
            except OSError:
                pass  # counted, but nobody is there any more
            connection.close()
        self._announce()

    def _announce(self) -> None:
        """Hand the opens of pixels that have been sent to whoever wants them."""
        if self._on_open:
            for opened in self._opened:
                self._on_open(opened)
            self._opened.clear()

    def _wait_for(self, connection: socket.SocketType, address: str,
                  shaken: bool = True) -> Client:
        """Let a client wait in the selector, in place of the oldest if need be."""
        if len(self._clients) >= self._most:
            self._drop(next(iter(self._clients.values())))
        connection.setblocking(False)
        client = Client(connection, address, shaken)
        self._clients[connection.fileno()] = client
        self._selector.register(connection, 1, client)
        return client

    def _drop(self, client: Client) -> None:
        """Close a connection and forget it."""
        del self._clients[client.socket.fileno()]
        self._selector.unregister(client.socket)
        client.socket.close()

    def _continue(self, client: Client) -> None:
        """Go on with a client that has sent something."""
        import ssl

        try:
            if not client.shaken:
                client.socket.do_handshake()  # type: ignore[attr-defined]
                client.shaken = True
            data = client.socket.recv(MAX_HEAD + 1)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except (OSError, ValueError):
            return self._drop(client)
        if client.lingering >= 0:
            client.lingering += len(data)
            if not data or client.lingering > LINGER_BYTES:
                self._drop(client)
        elif data:
            client.received += data
            self._examine(client)
        else:
            self._drop(client)

    def _examine(self, client: Client) -> None:
        """Answer a client as soon as what it sent allows."""
        head, end, _ = client.received.partition(b"\r\n\r\n")
        line, line_end, _ = client.received.partition(b"\n")
        if end and len(head) <= MAX_HEAD:
            self._finish(client, self.respond(head + end, client.address))
        elif len(client.received) > MAX_HEAD:
            self._finish(client, answer(431))
        elif not _METHOD_START.match(line) or line_end and \
                not _CLEAN_HEAD.match(line + b"\n\r\n"):
            self._finish(client, answer(400))

    def _finish(self, client: Client, reply: bytes) -> None:
        """Send the answer, then read on for a moment.

        Closing a socket with unread bytes would reset the connection and could take
        the answer with it.
        """
        try:
            client.socket.send(reply)
            if self._certificate:
                self._certificate.say_goodbye(client.socket)
            client.socket.shutdown(1)
        except (OSError, ValueError):
            return self._drop(client)
        finally:
            self._announce()
        client.lingering = 0
        client.deadline = time.monotonic() + LINGER_SECONDS

    # -- requests -----------------------------------------------------------

    def respond(self, head: bytes, peer: str) -> bytes:
        """Return the answer to any request, its whole head given."""
        if not _CLEAN_HEAD.fullmatch(head):
            return answer(400)
        return bytes(self._handler(head, (peer, 0), self).reply)

    def get(self, request: Any) -> bytes:
        """Return the answer to a GET or HEAD that http.server has parsed."""
        # Not request.path, which some versions change (gh-87389).
        target = request.raw_requestline.split()[1].decode("latin-1")
        path = re.sub(r"^https?://[^/?#]*", "", target, flags=re.I)
        if has_body(request.headers) or path[:1] != "/":
            return answer(400)
        if path.partition("?")[0] == "/health":
            wrong = clean(self.health())
            return answer(503, wrong.encode() + b"\n") if wrong else answer(200)
        if request.command == "GET":
            headers = request.request.partition(b"\r\n")[2]
            peer = request.client_address[0]
            self.count([(path.encode("latin-1"), headers, peer)])
        return PIXEL_ANSWER

    def count(self, requests: Sequence[Tuple[bytes, bytes, str]]) -> None:
        """Count the hits among some GETs: target, header lines and peer of each."""
        meant = [ids_in_path(target) for target, _, _ in requests]
        if any(meant):
            now = self._time()
            with self.register:
                if self._events:
                    self._events.look()
                    for event in self._events.news():
                        self._judge.learn(event)
                for tags, asked in zip(meant, requests):
                    self._count_one(tags, asked, now)
        else:
            for asked in requests:
                self._note_stray(*asked)

    def _count_one(self, tags: List[bytes], asked: Tuple[bytes, bytes, str],
                   now: bytes) -> None:
        """Count one hit of the first of some ids that is known."""
        _, headers, peer = asked
        request = read_headers(headers)
        if self._settings.trusted:
            peer = client_address(peer, request.forwarded, self._is_trusted)
        for tag in tags:
            if self._hit(tag, now, request, peer):
                return
        self._note_stray(*asked)

    def _hit(self, tag: bytes, now: bytes, request: Request, address: str) -> bool:
        """Judge a hit, log it and count it; tell whether there is such a tag."""
        try:
            place = self.register.find(tag)
            if not place:
                return False
            sent = place.sent.strip()
            hit = Hit(tag, self._now, address, request.agent, request.purpose,
                      not sent and self._window_start < place.created <= self._soon,
                      self._now - seconds(sent.decode()) if sent else None,
                      request.private)
            found = self._judge.judge(hit)
        except Exception as error:  # the pixel is sent whatever happens here
            self._log.rarely(f"cannot judge: {explain(error)}")
            return self._hold(tag, (now, False, 0))
        event = self._kept(hit, found, now)
        self._log_event(event, found)
        try:
            hits, opens = self.register.count(
                place, now, found.opened, len(found.overruled))
        except OSError as error:
            self._log.rarely(f"cannot count: {explain(error)}")
            return self._hold(tag, (now, found.opened, len(found.overruled)))
        if not self._settings.quiet:
            self._log.line(f"hit {event.id} {hits} {event.address or '-'} "
                           f"{event.verdict} {event.reason} {event.agent}".rstrip())
        if self._on_open and found.opened:
            name = self.register.name_of(place)
            self._opened.append(Open(event, name, hits, opens))
        return True

    def _kept(self, hit: Hit, found: Judgement, now: bytes) -> Event:
        """Return a hit as it is kept: with no more about the client than is wanted."""
        keep, hidden = self._settings, hit.private
        return Event(
            now.decode(), "hit", hit.id.decode(), found.verdict, found.reason,
            "" if hidden else kept_address(hit.address, keep.keep_address),
            hit.agent if keep.keep_agent and not hidden else "")

    def _log_event(self, event: Event, found: Judgement) -> None:
        """Log a hit, and what it overrules."""
        if self._events:
            self._events.append(event.line())
            for old in found.overruled:
                when = utc_text(old.time).encode()
                again = self._kept(old, Judgement(*MANY_NETWORKS), when)
                self._events.append(again._replace(event="verdict").line())

    def _hold(self, tag: bytes, hit: Tuple[bytes, bool, int]) -> bool:
        """Keep a hit in memory until the disk takes it; False: no such tag."""
        if not self.register.may_know(tag):
            return False
        if tag in self._held or len(self._held) < MAX_HELD:
            self._held.setdefault(tag, []).append(hit)
        else:
            self._lost += 1
        return True

    def _note_stray(self, target: bytes, headers: bytes, peer: str) -> None:
        """Remember a path that may hold a damaged id: a scanner's probe."""
        stray = _STRAY.findall(target.partition(b"?")[0])
        if stray:
            request = read_headers(headers)
            address = client_address(peer, request.forwarded, self._is_trusted)
            self._judge.stray(stray[-1].partition(b".")[0], address, time.time())

    def _tend(self) -> None:
        """Write what was held, and see what others did to the files."""
        try:
            self.register.tend()
            with self.register:
                if self._events:
                    self._events.tend(self.register.may_know)
                for tag, hits in list(self._held.items()):
                    while hits:
                        self.register.hit(tag, *hits[0])
                        del hits[0]
                    del self._held[tag]
        except OSError as error:
            self._log.rarely(f"cannot count: {explain(error)}")
        trouble = self.health()
        if trouble:
            self._log.rarely(f"not well: {trouble}")

    def health(self) -> str:
        """Return what is wrong; "" when all is well."""
        held = sum(map(len, self._held.values()))
        wrong = [self.register.trouble,
                 self._events.trouble if self._events else "",
                 f"{held} hits wait for the disk" if held else "",
                 self._losses()]
        return "; ".join(filter(None, wrong))

    def _losses(self) -> str:
        """Return what was lost while the disk refuses to take it; "" otherwise."""
        lost = self._lost + (self._events.lost if self._events else 0)
        waiting = self._held or self._events and self._events.trouble
        return f"{lost} hits or events found no room in memory" \
            if lost and waiting else ""

    def _time(self) -> bytes:
        """Return the time as the register writes it."""
        now = int(time.time())
        if now != self._now:
            self._now, self._now_text = now, utc_text(now).encode()
            window = self._settings.compose_window
            self._window_start = utc_text(now - window).encode()
            self._soon = utc_text(now + 5).encode()
        return self._now_text


def handler_class() -> Any:
    """Return the http.server handler; only a server pays for that import."""
    import io
    from http.server import BaseHTTPRequestHandler

    class PixelHandler(BaseHTTPRequestHandler):
        """Turn one whole request head into the bytes of its answer: reply."""

        server: Any  # the PixelServer
        reply = answer(400)

        def setup(self) -> None:
            self.rfile = io.BytesIO(self.request)

        def handle(self) -> None:
            self.raw_requestline = self.rfile.readline()
            if self.parse_request():
                method = getattr(self, "do_" + self.command, lambda: answer(405))
                self.reply = method()

        def finish(self) -> None:
            """Leave the sending to the server."""

        def send_error(self, *_: Any, **__: Any) -> None:
            """Leave the reply at 400: what is wrong is the client's to find out."""

        def do_GET(self) -> bytes:
            """Count a hit, or tell the server's health."""
            return bytes(self.server.get(self))

        def do_HEAD(self) -> bytes:
            """Return the head of what GET would get; never a hit."""
            head, end, _ = self.do_GET().partition(b"\r\n\r\n")
            return head + end

    return PixelHandler


def has_body(headers: Any) -> bool:
    """Tell whether more belongs to a request, or could be smuggled in behind it."""
    lengths = headers.get_all("Content-Length", [])
    return "Transfer-Encoding" in headers or lengths not in ([], ["0"])


class Certificate:
    """A TLS certificate and its key, read again whenever their files change."""

    def __init__(self, cert_file: str, key_file: str) -> None:
        self._files = cert_file, key_file
        self._context, self._stamp = self._load(), self._changed()

    def _load(self) -> ssl.SSLContext:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(*self._files, password=lambda: "")
        except (OSError, ValueError) as error:
            files = " and ".join(self._files)
            raise TrackerError(f"no usable certificate and key in {files}: "
                               f"{error.args[-1]}") from None
        return context

    def _changed(self) -> List[int]:
        return [os.stat(file).st_mtime_ns for file in self._files]

    def renew(self, log: LogFile) -> None:
        """Load a renewed certificate; keep the old one while the new one is bad."""
        try:
            stamp = self._changed()
            if stamp != self._stamp:
                self._context, self._stamp = self._load(), stamp
                log.line("certificate renewed")
        except (TrackerError, OSError) as error:
            log.rarely(f"certificate not renewed: {error}")

    def wrap(self, connection: socket.SocketType) -> ssl.SSLSocket:
        """Return a TLS connection whose handshake is still to come."""
        import socket

        connection = socket.socket(fileno=connection.detach())
        connection.setblocking(False)
        return self._context.wrap_socket(connection, server_side=True,
                                         do_handshake_on_connect=False)

    def say_goodbye(self, connection: Any) -> None:
        """Send the TLS close_notify without waiting for the client's."""
        import ssl

        try:
            connection.unwrap()
        except (ssl.SSLError, OSError):
            pass


def open_file_limit() -> int:
    """Return how many descriptors the process may have open."""
    if sys.platform == "win32":
        return 512
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


def make_listener(host: str, port: int, reuse_port: bool = False) -> socket.socket:
    """Return a listening socket; host "" means all addresses, IPv4 and IPv6.

    Raise TrackerError for a busy or forbidden port and an address that is not ours.
    """
    import socket

    dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    try:
        listener = socket.create_server(
            (host, port), family=family, backlog=BACKLOG, reuse_port=reuse_port,
            dualstack_ipv6=dual)
    except PermissionError:
        raise TrackerError(f"port {port} is reserved for root; "
                           "choose one above 1023") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise TrackerError(
                f"port {port} is in use; stop the other program, choose "
                "another --port, or share it with --reuse-port") from None
        raise TrackerError(f"cannot listen on {host or 'all addresses'}, port {port}: "
                           f"{error.strerror or error}") from None
    except (TypeError, UnicodeError):
        raise TrackerError(f"not an address: {host}") from None
    except ValueError:
        raise TrackerError("this system cannot share a port: "
                           "leave out --reuse-port") from None
    if hasattr(socket, "TCP_DEFER_ACCEPT"):
        # Linux then wakes us when the request is here: a quarter less work for a hit.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT,
                            int(HEAD_SECONDS))
    return listener


def tell_systemd(state: str) -> None:
    """Tell systemd's notify socket, if there is one, as in sd_notify(3)."""
    import socket

    path = os.environ.get("NOTIFY_SOCKET", "")
    if path and hasattr(socket, "AF_UNIX"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            try:
                notify.sendto(state.encode(), path.replace("@", "\0", 1)
                              if path.startswith("@") else path)
            except OSError:
                pass  # readiness is a courtesy


def detach() -> int:
    """Go on as a daemon; the process that was started waits for its word.

    Return a descriptor: what is written there is "ready", or else why it failed.
    """
    if sys.platform == "win32":
        raise TrackerError("--daemon needs a POSIX system; "
                           "run the server as a service instead")
    ready, tell = os.pipe()
    if os.fork():
        os.close(tell)
        told = os.read(ready, 4096).decode()
        if told != "ready":
            print(f"mailtracker: error: {told or 'the server died'}", file=sys.stderr)
        os._exit(told != "ready")
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(ready)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    return tell


class PidFile:
    """The number of this process in a file, for as long as it runs."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path) if path else ""

    def __enter__(self) -> None:
        if self._path:
            with open(self._path, "w", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")

    def __exit__(self, *_: object) -> None:
        try:
            if self._path:
                with open(self._path, encoding="ascii") as file:
                    mine = file.read().strip() == str(os.getpid())
                if mine:
                    os.unlink(self._path)
        except OSError:
            pass  # somebody tidied up before us


# ---------------------------------------------------------------------------
# Dump: rows to text
# ---------------------------------------------------------------------------
# Reads only, needs no lock and no server, and takes any register a spreadsheet can
# have made. Rows go through one by one; only sorting gathers them.

Row = Dict[str, str]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Selection(NamedTuple):
    """Which rows of the register are wanted."""

    id_prefix: str = ""
    name: str = ""  # a pattern as of a shell, in any case
    hit: Optional[bool] = None
    opened: Optional[bool] = None
    since: str = ""  # last hit at this time or later, as utc_text writes it

    def takes(self, row: Row) -> bool:
        """Tell whether a row is wanted."""
        from fnmatch import fnmatchcase

        return row["id"].startswith(self.id_prefix) \
            and (not self.name or fnmatchcase(row["name"].lower(), self.name.lower())) \
            and (self.hit is None or self.hit == (row["hits"] != "0")) \
            and (self.opened is None or self.opened == (row["opens"] != "0")) \
            and row["last_hit"] >= self.since

    def takes_event(self, event: Event, names: Optional[Container[str]]) -> bool:
        """Tell whether an event is wanted, given the ids that have the name."""
        opened = counted_opens(event) > 0
        return event.id.startswith(self.id_prefix) \
            and (names is None or event.id in names) \
            and (self.hit is None or self.hit == (event.event == "hit")) \
            and (self.opened is None or self.opened == opened) \
            and event.time >= self.since

    def named_ids(self, path: str) -> Optional[Set[str]]:
        """Return the ids whose tags have the name; None if any will do."""
        if not self.name:
            return None
        return {row["id"] for row in register_rows(path)[1]
                if Selection(name=self.name).takes(row)}


def moment(text: str, now: Optional[float] = None) -> str:
    """Return the UTC time that 3d, 12h, 2026-11-01 or 2026-11-01T20:14Z means.

    A date without a zone is UTC's, as all times here. Raise ValueError.
    """
    from datetime import datetime, timezone

    ago = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if ago:
        now = time.time() if now is None else now
        return utc_text(max(0.0, now - int(ago[1]) * _UNITS[ago[2]]))
    when = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    return utc_text((when if when.tzinfo else
                     when.replace(tzinfo=timezone.utc)).timestamp())


def open_register(path: str) -> Tuple[int, Layout]:
    """Open a register for reading; wait a moment for one that is being replaced."""
    deadline = time.monotonic() + (1.0 if os.path.exists(path + ".twin") else 0.0)
    while True:
        try:
            file = os.open(path, os.O_RDONLY | _O_BINARY | getattr(os, "O_NONBLOCK", 0))
            break
        except FileNotFoundError:
            if time.monotonic() >= deadline:
                raise TrackerError(f"no such register: {path}") from None
            time.sleep(0.02)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise TrackerError(f"{path} is not a regular file")
    layout = read_layout(os.pread(file, 65536, 0))
    if layout is None and os.fstat(file).st_size:
        raise TrackerError(f"{path} has no header row with an id column")
    return file, layout or Layout()


def register_rows(path: str) -> Tuple[List[str], Iterator[Row]]:
    """Return the columns of a register and its tags, one by one.

    Counts come without padding, times that have not come as "", names as they were
    given; every other cell as it stands.
    """
    file, layout = open_register(path)
    layout = layout._replace(columns=tuple(distinct(layout.columns)))
    target = layout.canonical()
    return list(target.columns), _plain_rows(file, layout, target)


def distinct(columns: Sequence[str]) -> Iterator[str]:
    """Yield the names of columns, with a number where one is empty or used again."""
    seen: Set[str] = set()
    for number, column in enumerate(columns, 1):
        name = column if column and column not in seen else f"{column} ({number})"
        seen.add(name)
        yield name.strip()


def closing(file: int, rows: Iterator[List[str]]) -> Iterator[List[str]]:
    """Yield rows, and close their file behind them."""
    try:
        yield from rows
    finally:
        os.close(file)


def _plain_rows(file: int, layout: Layout, target: Layout) -> Iterator[Row]:
    """Yield the rows of tags, with every column of the target layout."""
    columns, missing = layout.columns, dict.fromkeys(target.columns, "")
    width, is_complete = len(columns), len(columns) == len(missing)
    times = target.fixed()[1 + len(COUNTERS):]
    for cells in closing(file, read_rows(file, layout)):
        row = dict(zip(columns, cells))
        if len(cells) > width:
            row.update((f"({n})", cell) for n, cell in enumerate(cells, 1) if n > width)
        elif len(cells) < width or not is_complete:
            row = {**missing, **row}
        row["id"] = row["id"].strip()
        if not is_id(row["id"]):
            continue
        for column in COUNTERS:
            cell = row[column]
            row[column] = _PLAIN[cell] if cell in _PLAIN else plain_cell(column, cell)
        for column in times:
            row[column] = row[column].strip()
        row["name"] = unescape_formula(row["name"])
        yield row


_PLAIN = {"0" * 10: "0", NEVER: ""}  # by far the most counters are these


def plain_cell(column: str, cell: str) -> str:
    """Return a count without its zeros, a time that has not come as nothing."""
    cell = counter_cell(cell, COUNTERS[column])
    return cell.strip() if COUNTERS[column] > 10 else cell.lstrip("0") or "0"


def sort_key(column: str) -> Callable[[Row], Any]:
    """Return the key that puts rows in the order of a column."""
    if COUNTERS.get(column) == 10:
        return lambda row: int(row[column])
    return lambda row: row[column].casefold()


def text_width(text: str) -> int:
    """Return how many terminal columns a text takes (UAX #11)."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(0 if category(c) in ("Mn", "Me", "Cf") else
               2 if east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, width: int) -> str:
    """Return text cut or padded to a number of terminal columns."""
    if text.isascii():
        return text.ljust(width) if len(text) <= width else text[:width - 1] + "…"
    if text_width(text) > width:
        text = text[:width - 1]
        while text_width(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - text_width(text))


def minute(when: str) -> str:
    """Return a time without its seconds, "-" for one that has not come."""
    return when[:16].replace("T", " ") or "-"


def table_lines(rows: Iterable[Row], full: bool = False,
                screen: int = 80) -> Iterator[str]:
    """Yield a table, a summary last; it fits the screen's width unless full."""
    source = iter(rows)
    first = list(islice(source, 1000))  # enough to see how wide the columns must be
    id_width = max((len(r["id"]) for r in first), default=7) if full else 7
    wide = max([4, *(len(r["hits"]) for r in first)])
    longest = max([4, *(text_width(clean(r["name"])) for r in first)])
    room = screen - id_width - wide - 5 - 2 * 16 - 10 - 6 * 2
    width = longest if full else max(8, min(longest, room))
    tags = hits = opened = opens = 0
    yield f"{'id':{id_width}}  {'name':{width}}  {'hits':>{wide}}  opens  " \
          f"{'last hit (UTC)':16}  {'last open':16}  created"
    for row in chain(first, source):
        tags, hits, opens = tags + 1, hits + int(row["hits"]), opens + int(row["opens"])
        opened += row["opens"] != "0"
        yield f"{row['id'][:id_width]:{id_width}}  {fit(clean(row['name']), width)}  " \
              f"{row['hits']:>{wide}}  {row['opens']:>5}  " \
              f"{minute(row['last_hit']):16}  {minute(row['last_open']):16}  " \
              f"{clean(row['created'][:10].strip()) or '-'}"
    yield f"{plural(tags, 'tag')}, {opened} opened, " \
          f"{plural(hits, 'hit')}, {plural(opens, 'open')}"


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: 1 hit, 2 hits."""
    return f"{number} {noun}{'s' * (number != 1)}"


def event_line(event: Event, screen: int = 80) -> str:
    """Return an event as a line of a table that fits the screen's width."""
    again = "" if event.event == "hit" else f"{event.event}: "
    line = f"{event.time:20}  {event.id[:7]:7}  {event.verdict:7}  " \
           f"{again + event.reason:17}  {event.address} {event.agent}"
    return fit(clean(line), screen).rstrip()


EVENT_HEADING = f"{'time':20}  {'id':7}  {'verdict':7}  {'reason':17}  " \
    "address and agent"


def history_lines(row: Row, log: str, screen: int = 80) -> Iterator[str]:
    """Yield one tag with all that the log knows of it, reasons in plain words."""
    for column, value in row.items():
        yield f"{clean(column):10}{clean(value) or '-'}"
    events: List[Event] = []
    for event in read_log(log):
        if event.id == row["id"]:
            mended = [i for i, old in enumerate(events) if event.event == "verdict"
                      and (old.time, old.address, old.agent)
                      == (event.time, event.address, event.agent)]
            for i in mended:
                events[i] = events[i]._replace(
                    verdict=event.verdict, reason=event.reason)
            events += [] if mended else [event]
    yield ""
    for event in events:
        why = REASONS.get(event.reason, event.reason)
        yield f"{event.time:20}  {clean(event.verdict):7}  {clean(why)}"
        client = clean(f"{event.address}  {event.agent}".strip())
        client = client or "(nothing kept of the client)"
        yield fit(" " * 31 + client, screen).rstrip()
    if not events:
        yield "no events of this tag are in the log"


def write_csv(out: TextIO, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write CSV that loses nothing; no name in it is a live formula."""
    from operator import itemgetter

    writer = csv.writer(out, lineterminator="\n")
    safe = clean if out.isatty() else str
    writer.writerow(map(safe, columns))
    cells = itemgetter(*columns)
    text = "name" if "name" in columns else "agent"
    for row in rows:
        row[text] = escape_formula(row[text])
        line = cells(row)
        if len(row) > len(columns):  # cells under no column
            line = (*line, *list(row.values())[len(columns):])
        writer.writerow(map(safe, line) if safe is clean else line)


def json_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Yield a JSON array, an object a line: counts as numbers, no time as null."""
    import json

    before = "["
    for row in rows:
        values: Dict[str, Any] = dict(row)
        for column, width in COUNTERS.items() if "hits" in row else ():
            values[column] = int(row[column]) if width == 10 else row[column] or None
        yield f"{before}\n{json.dumps(values)}"
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"


def follow(path: str, log: str, selection: Selection) -> Iterator[str]:
    """Yield a line for each new event as it comes, for ever; the log may be moved."""
    latest = utc_text(time.time())
    source = EventFile(log, os.stat(log).st_size) if os.path.exists(log) else None
    while True:
        for event in source or ():
            latest = max(latest, event.time)
            row = find_row(path, event.id)
            if selection._replace(name="").takes_event(event, None) and \
                    selection._replace(since="", opened=None).takes(row):
                why = REASONS.get(event.reason, event.reason)
                yield clean(f"{event.time}  {event.id[:7]}  {row['name']}  "
                            f"{event.verdict}: {why}  {event.address}").rstrip()
        time.sleep(0.2)
        if os.path.exists(log) and (not source or os.stat(log).st_ino != source.inode):
            if source:
                source.file.close()
            # What was written anew is no news.
            selection = selection._replace(since=max(selection.since, latest))
            source = EventFile(log)


@lru_cache(maxsize=1024)
def find_row(path: str, tag: str) -> Row:
    """Return the row of an id, and an empty one for an id that is not there."""
    for row in register_rows(path)[1]:
        if row["id"] == tag:
            return row
    return {**dict.fromkeys(_OWN_COLUMNS, ""), "id": tag, "hits": "0", "opens": "0"}


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------
# A new command is one cmd_ function and one block in a parser. Only main prints
# errors; only the commands print results.


def cmd_server(options: argparse.Namespace) -> int:
    """Serve pixels and count their hits."""
    for name in ("register", "events", "logfile", "tls_cert", "tls_key"):
        path = getattr(options, name)
        if options.daemon and path:
            setattr(options, name, os.path.abspath(path))
    log = LogFile(options.logfile)
    register = Register(options.register, log.line, options.fsync == "always")
    certificate = Certificate(options.tls_cert, options.tls_key) \
        if options.tls_cert else None
    with make_listener(options.host, options.port, options.reuse_port) as listener:
        register.open()
        tell = detach() if options.daemon else -1
        try:
            with PidFile(options.pidfile):
                events, mending = open_log(options)
                on_open = OpenCommand(options.on_open, options.on_open_first, log)
                server = PixelServer(register, listener, log, settings_of(options),
                                     events, certificate,
                                     on_open if options.on_open else None)
                if mending:
                    server.learn_from(mending)
                files = [file for file in (register, events) if file]
                with on_open, signals_for(server, log), \
                        SyncEverySecond(files, log, options.fsync == "second"):
                    greet_user(options, listener, log, tell)
                    server.serve()
        except OSError as error:
            if tell >= 0:
                os.write(tell, explain(error).encode())
            raise
    return 0


def open_log(options: argparse.Namespace
             ) -> Tuple[Optional[EventLog], Optional[Mending]]:
    """Return the server's event log, and what is to be learnt from an old one."""
    if options.no_events:
        return None, None
    path = options.events or events_path(options.register)
    old = log_files(os.path.realpath(path)) and hasattr(os, "fork")
    mending = Mending(options.register, path) if old else None
    events = EventLog(path, options.rotate_events, options.fsync == "always")
    events.look()
    return events, mending


def settings_of(options: argparse.Namespace) -> Settings:
    """Return a server's settings from its options."""
    return Settings(
        quiet=options.quiet, trusted=options.trusted_proxy, me=options.me,
        compose_window=options.compose_window, keep_address=options.keep_address,
        keep_agent=options.keep_agent == "yes")


def greet_user(options: argparse.Namespace, listener: socket.socket,
               log: LogFile, tell: int) -> None:
    """Say that the server is ready, and where: in its log, to systemd, and to tell."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if options.tls_cert else "http"
    where = f"[{host}]" if ":" in host else host
    log.line(f"serving pixels on {scheme}://{where}:{port}, "
             f"counting in {options.register}")
    if tell >= 0:
        os.write(tell, b"ready")
    tell_systemd("READY=1")


@contextmanager
def signals_for(server: PixelServer, log: LogFile) -> Iterator[None]:
    """Let signals stop the server, and SIGHUP open its log file again."""
    import socket

    def on_stop(number: int, frame: object) -> None:
        if server.stopping:
            os._exit(128 + number)
        server.stop()

    def on_hangup(number: int, frame: object) -> None:
        try:
            log.reopen()
        except OSError as error:
            log.line(explain(error))
        # The event log looks for a moved file by itself, at every hit.

    here, there = socket.socketpair()
    there.setblocking(False)
    with here, there:
        server.call_on(here.fileno(), lambda: here.recv(4096))
        signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, on_stop)
        signal.signal(signal.SIGINT, on_stop)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, on_hangup)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)


class SyncEverySecond:
    """A thread that brings files to the disk once a second, where they changed."""

    def __init__(self, files: Sequence[Union[Register, EventLog]], log: LogFile,
                 wanted: bool) -> None:
        import threading

        self._files, self._log = files if wanted else (), log
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sync()

    def _run(self) -> None:
        while not self._over.wait(1.0):
            self._sync()

    def _sync(self) -> None:
        for file in self._files:
            try:
                if file.dirty:
                    file.sync()
            except OSError as error:
                self._log.rarely(f"cannot sync: {explain(error)}")


def cmd_newtag(options: argparse.Namespace) -> int:
    """Make tags and print them."""
    server = options.server or os.environ.get("MAILTRACKER_SERVER", "")
    if not server:
        note("this tag works only on this machine; "
             "say --server HOST for one that others can reach")
    base = base_url(server or "localhost", options.port)
    tag_text(base, options.path, "")  # a bad template must not cost a row
    if options.names_from:
        header, rows, delimiter = read_names(options.names_from)
        names = [row[name_column(header)] for row in rows]
    else:
        names = [plain_text(options.name)] * options.count
    tags = make_tags(names, options.armed)
    Register(options.register, note).add(tags)
    texts = [tag_text(base, options.path, tag.id, options.format) for tag in tags]
    if options.names_from:
        writer = csv.writer(sys.stdout, delimiter=delimiter, lineterminator="\n")
        writer.writerow([*header, "id", "tag"])
        writer.writerows([*row, tag.id, text]
                         for row, tag, text in zip(rows, tags, texts))
    else:
        print(*texts, sep="\n")
    if options.copy:
        copy_to_clipboard("\n".join(texts), options.format)
    return 0


def note(text: str) -> None:
    """Tell the user something beside the result."""
    print(f"mailtracker: note: {clean(text)}", file=sys.stderr)


def make_tags(names: Sequence[str], armed: bool = False) -> List[Tag]:
    """Return a new tag for each name; the mail of an armed one counts as sent now."""
    instance = os.urandom(32)
    now = utc_text(time.time())
    return [Tag(new_id(instance, number=number), name, now, now if armed else NEVER)
            for number, name in enumerate(names)]


def read_names(path: str) -> Tuple[List[str], List[List[str]], str]:
    """Return header, rows and delimiter of a CSV of names; "-" is standard input.

    Raise TrackerError with the line of the first row that cannot be used.
    """
    source = sys.stdin.fileno() if path == "-" else path
    try:
        with open(source, encoding="utf-8-sig", errors="surrogateescape",
                  newline="") as file:
            first = file.readline()
            delimiter = max(",;\t|", key=first.count)
            reader = csv.reader(chain([first], file), delimiter=delimiter, strict=True)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise TrackerError(f"{path}, line {reader.line_num}: {error}") from None
    taken = {"id", "tag"}.intersection(header)
    if not header or taken:
        wrong = f"a column {taken.pop()} already" if taken else "no header row"
        raise TrackerError(f"{path} has {wrong}")
    column = name_column(header)
    for number, row in rows:
        if len(row) != len(header):
            raise TrackerError(f"{path}, line {number}: {len(row)} cells "
                               f"under {len(header)} columns")
        if not row[column].strip() or "\0" in row[column]:
            raise TrackerError(f"{path}, line {number}: no {header[column]}")
        if any(plain_text(cell) != cell for cell in row):
            raise TrackerError(f"{path}, line {number}: not in UTF-8")
    return header, [row for _, row in rows], delimiter


def name_column(header: Sequence[str]) -> int:
    """Return which column names a recipient: name, else email, else the first."""
    lowered = [cell.strip().lower() for cell in header]
    return next((lowered.index(n) for n in ("name", "email") if n in lowered), 0)


# Which tool can put what on the clipboard: the variable that says it is of use here,
# the command for HTML, the command for plain text.
CLIPBOARDS: Tuple[Tuple[str, List[str], List[str]], ...] = (
    ("WAYLAND_DISPLAY", ["wl-copy", "--type", "text/html"], ["wl-copy"]),
    ("DISPLAY", ["xclip", "-selection", "clipboard", "-t", "text/html"],
     ["xclip", "-selection", "clipboard"]),
    ("", [], ["pbcopy"]),
    ("", [], ["clip.exe"]),
)


def copy_to_clipboard(text: str, form: str) -> None:
    """Put text on the clipboard, as HTML where form and tool allow it."""
    import shutil
    import subprocess

    for variable, html, plain in CLIPBOARDS:
        if shutil.which(plain[0]) and (not variable or os.environ.get(variable)):
            command = html if html and form == "html" else plain
            done = subprocess.run(command, input=text.encode(), check=False,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if done.returncode:
                raise TrackerError(f"{command[0]} could not copy the tag; "
                                   "take it from the screen")
            kind = "HTML" if command is html else "plain text"
            return note(f"copied as {kind}")
    raise TrackerError("no clipboard here: install wl-copy or xclip, "
                       "or take the tag from the screen")


def cmd_dump(options: argparse.Namespace) -> int:
    """Show the register, one tag with its history, or the event log."""
    path = options.file or options.register
    log = options.events_file or events_path(path)
    wanted = Selection(options.id, options.name, options.hit, options.opened,
                       options.since or "")
    if options.follow:
        open_register(path)
        for line in follow(path, log, wanted):
            print(line, flush=True)
    if options.events:
        return dump_events(path, log, wanted, options)
    columns, rows = register_rows(path)
    if wanted != Selection():
        rows = filter(wanted.takes, rows)
    if options.id and options.format == "table":
        first = list(islice(rows, 2))
        if len(first) == 1:
            print(*history_lines(first[0], log, screen_width()), sep="\n")
            return 0
        rows = chain(first, rows)
    print_rows(columns, in_order(rows, columns, options), options)
    return 0


def dump_events(path: str, log: str, wanted: Selection,
                options: argparse.Namespace) -> int:
    """Show the event log."""
    if not log_files(log):
        raise TrackerError(f"no such event log: {log}")
    names = wanted.named_ids(path)
    events = (event for event in read_log(log) if wanted.takes_event(event, names))
    if options.format == "table":
        rows = in_order((e._asdict() for e in events), EVENT_COLUMNS, options)
        print(EVENT_HEADING)
        screen = screen_width()
        for row in rows:
            print(event_line(Event(**row), screen))
    else:
        rows = in_order((e._asdict() for e in events), EVENT_COLUMNS, options)
        print_rows(EVENT_COLUMNS, rows, options)
    return 0


def in_order(rows: Iterable[Row], columns: Sequence[str],
             options: argparse.Namespace) -> Iterable[Row]:
    """Return rows sorted, turned round and cut off as the options want it."""
    if options.sort:
        if options.sort not in columns:
            raise TrackerError(f"no column {options.sort}; "
                               f"there are {', '.join(map(clean, columns))}")
        rows = sorted(rows, key=sort_key(options.sort))
    if options.reverse:
        rows = reversed(list(rows))
    return islice(rows, options.limit)


def screen_width() -> int:
    """Return how many columns the terminal has; 80 where there is none."""
    import shutil

    return shutil.get_terminal_size((80, 24)).columns


def print_rows(columns: Sequence[str], rows: Iterable[Row],
               options: argparse.Namespace) -> None:
    """Print rows in the format that the options ask for."""
    out = sys.stdout
    if options.format == "csv":
        write_csv(out, columns, rows)
    elif options.format == "json":
        out.writelines(json_lines(rows))
    else:
        for line in table_lines(rows, options.full, screen_width()):
            print(line)


def cmd_rejudge(options: argparse.Namespace) -> int:
    """Judge the hits of the log again, by today's rules, and correct the opens."""
    log = options.events or events_path(options.register)
    if not log_files(log):
        raise TrackerError(f"no such event log: {log}")
    again = Rejudging(sending_times(options.register))
    if options.dry_run:
        for event in read_log(log):
            again(event)
    else:
        register = Register(options.register, note)
        register.open()
        rewrite_log(log, again, register, lambda: register.add_opens(again.opens))
        correct_register(register, log, again.opens)
    print_changes(again, options.dry_run)
    return 0


def sending_times(path: str) -> Callable[[Event], Optional[float]]:
    """Return a function that tells how long after its sending an event came.

    In seconds, and None where the register does not know. Raise TrackerError.
    """
    file, layout = open_register(path)
    rows = Twin(file)
    if SENT_COLUMN not in layout.columns:
        return lambda event: None

    def age(event: Event) -> Optional[float]:
        cells = rows.cells(event.id.encode())
        sent = cells[-1].strip() if cells else ""
        return seconds(event.time) - seconds(sent) if sent else None
    return age


def print_changes(again: Rejudging, dry_run: bool) -> None:
    """Print what judging anew changed."""
    print(f"{plural(again.hits, 'hit')} judged again, "
          f"{sum(again.changed.values())} differently")
    for (old, why, new, because), count in sorted(
            again.changed.items(), key=lambda item: -item[1]):
        print(f"{count:10}  {old} ({why}) -> {new} ({because})")
    print(f"{sum(again.opens.values()):+10}  opens, "
          f"on {plural(len(again.opens), 'tag')}")
    if dry_run:
        print("nothing was changed: this was a dry run")


def cmd_forget(options: argparse.Namespace) -> int:
    """Remove tags with everything that is known about them."""
    log = options.events or events_path(options.register)
    rows = {row["id"]: row for row in chosen_tags(options)}
    if not rows:
        print("nothing to forget")
        return 0
    events = sum(event.id in rows for event in read_log(log))
    for line in table_lines(rows.values(), screen=screen_width()):
        print(line)
    print(f"with {plural(events, 'event')} in the log, for good, "
          "and in the backup as well")
    if options.dry_run:
        print("nothing was changed: this was a dry run")
        return 0
    if not options.yes and not confirmed("forget them? [y/N] "):
        raise TrackerError("nothing was forgotten")
    register = Register(options.register, note)
    register.open()
    if log_files(log):
        rewrite_log(log, lambda event: () if event.id in rows else (event,), register,
                    lambda: register.forget(rows))
    else:
        with register:
            register.forget(rows)
    print(f"forgot {plural(len(rows), 'tag')}")
    return 0


def confirmed(question: str) -> bool:
    """Ask a person; raise TrackerError where there is none."""
    if not sys.stdin.isatty():
        raise TrackerError("there is nobody to ask here: say --yes, or --dry-run first")
    return input(question).strip().lower() in ("y", "yes")


def chosen_tags(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows to forget; raise TrackerError for a word that means no tag."""
    words = set(options.tags)
    found: Set[str] = set()
    for row in register_rows(options.register)[1]:
        meant = {row["id"], row["name"] or row["id"]} & words
        meant.update(word for word in words
                     if len(word) >= 7 and row["id"].startswith(word))
        found |= meant
        made = counter_cell(row["created"], 20).strip() or row["last_hit"]
        if meant or options.older_than and made and made < options.older_than:
            yield row
    if words - found:
        raise TrackerError(f"no such tag: {clean(min(words - found))}; "
                           "nothing was forgotten")


def number_in(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers of a range."""
    def number(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.A) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is not a number from {low} to {high}")
        return int(text)
    return number


def size_argument(text: str) -> int:
    """Return the bytes that 500K, 100M or 2G mean, for argparse."""
    size = re.fullmatch(r"(\d{1,9})([KMG]?)B?", text, re.IGNORECASE | re.ASCII)
    if not size:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 100M")
    return int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2].upper()]


def network_argument(text: str) -> Any:
    """Return the network an argument names, for argparse."""
    import ipaddress

    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is not an address or network such as 10.0.0.0/8") from None


def moment_argument(text: str) -> str:
    """Return the time an argument means, for argparse."""
    try:
        return moment(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text} is not a time such as 2026-11-01, 3d or 12h") from None


def template_argument(text: str) -> str:
    """Return a path template that holds {id} as a segment, for argparse."""
    path = text if text.startswith("/") else "/" + text
    sample = new_id(bytes(16))
    if sample.encode() not in ids_in_path(path.replace("{id}", sample).encode()):
        raise argparse.ArgumentTypeError(
            "the path must contain {id} as a segment, such as /img/{id}/logo.gif")
    return path


class Help(argparse.HelpFormatter):
    """Help for 80 columns; looking for the real width costs a short command 6 ms."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=78)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="mailtracker.py", formatter_class=Help,
        description=(__doc__ or "").partition("\n")[0],
        epilog="Each command has its own help: mailtracker.py newtag --help")
    parser.add_argument("--version", action="version",
                        version=f"mailtracker {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     prog=parser.prog)
    for add in (add_server, add_newtag, add_dump, add_rejudge, add_forget):
        add(commands)
    return parser


def add_command(commands: Any, run: Callable[[argparse.Namespace], int],
                example: str) -> argparse.ArgumentParser:
    """Add the parser of a command; what it does is its first docstring line."""
    name = run.__name__.partition("_")[2]
    about = (run.__doc__ or "").strip()
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about[:1].lower() + about[1:].rstrip("."), description=about,
        formatter_class=Help,
        epilog=f"example: mailtracker.py {name} {example}")
    parser.add_argument(
        "--register", "--csvfile", metavar="FILE",
        default=os.environ.get("MAILTRACKER_REGISTER") or DEFAULT_REGISTER,
        help="the register (default: $MAILTRACKER_REGISTER, else register.csv)")
    parser.set_defaults(run=run)
    return parser


def add_server(commands: Any) -> None:
    """Add the options of the server."""
    add = add_command(commands, cmd_server,
                      "--port 56789 --register register.csv").add_argument
    add("--host", metavar="ADDRESS", default="",
        help="listen on this address only (default: all, IPv4 and IPv6)")
    add("--port", type=number_in(0, 65535), default=DEFAULT_PORT,
        help="listen on this port (default: %(default)s; 0 takes a free one)")
    add("--trusted-proxy", metavar="NET", type=network_argument, action="append",
        default=[], help="believe X-Forwarded-For from this address or network; "
        "may be repeated")
    add("--tls-cert", metavar="FILE", default="",
        help="serve https with this certificate chain")
    add("--tls-key", metavar="FILE", default="", help="the key of the certificate")
    add("--fsync", choices=("second", "always", "never"), default="second",
        help="how soon a hit must survive a power cut (default: %(default)s)")
    add("--reuse-port", action="store_true",
        help="share the port with other servers of the same register")
    add("--daemon", action="store_true",
        help="go on in the background; without --logfile it is silent")
    add("--pidfile", metavar="FILE", default="", help="write the process id here")
    add("--logfile", metavar="FILE", default="",
        help="write lines here, not to stderr; SIGHUP opens it again")
    add("--quiet", action="store_true", help="no line for each hit")
    add_judging(add)


def add_judging(add: Callable[..., Any]) -> None:
    """Add the server's options for its log, its verdicts and what it keeps."""
    add("--events", metavar="FILE", default="",
        help="log every hit here (default: register.events.csv beside the register)")
    add("--no-events", action="store_true", help="keep no event log")
    add("--rotate-events", metavar="SIZE", type=size_argument, default=0,
        help="begin a new log file at this size, such as 100M; old ones get a number")
    add("--compose-window", metavar="SECONDS", type=number_in(0, 10 ** 9 - 1),
        default=120, help="a hit so soon after newtag is your own mail program's, "
        "while you write (default: %(default)s; 0: no hit is)")
    add("--me", metavar="NET", type=network_argument, action="append", default=[],
        help="an address or network of your own: its hits are yours; may be repeated")
    add("--keep-address", choices=("truncate", "full", "none"), default="truncate",
        help="how much of a client's address is logged (default: %(default)s, to /24 "
        "or /48)")
    add("--keep-agent", choices=("yes", "no"), default="yes",
        help="whether a client's User-Agent is logged (default: %(default)s)")
    add("--on-open", metavar="COMMAND", default="",
        help="run a shell command for every new open; $MAILTRACKER_NAME and others "
        "tell which")
    add("--on-open-first", action="store_true",
        help="only for the first open of each tag")


def add_newtag(commands: Any) -> None:
    """Add the options of newtag."""
    add = add_command(commands, cmd_newtag,
                      "--name john --server https://t.example.org").add_argument
    add("--name", default="", help="what you will know the tag by")
    add("--server", metavar="HOST|URL", default="",
        help="where the server can be reached (default: $MAILTRACKER_SERVER)")
    add("--port", type=number_in(1, 65535),
        help=f"the port in the URL (default: {DEFAULT_PORT} for a bare host)")
    add("--path", metavar="TEMPLATE", type=template_argument, default="/{id}.gif",
        help="where the pixel seems to lie (default: %(default)s)")
    add("--format", choices=list(TAG_FORMATS), default="html",
        help="what to print (default: %(default)s)")
    add("--count", metavar="N", type=number_in(1, 1000000), default=1,
        help="make so many tags")
    add("--names-from", metavar="FILE",
        help="make a tag for each row of a CSV file, by its column name, email, or "
        "else the first; print the file with id and tag added; - reads stdin")
    add("--armed", action="store_true",
        help="the mail goes straight out: no hit is taken for your own while writing")
    add("--copy", action="store_true", help="put the tag on the clipboard as well")


def add_dump(commands: Any) -> None:
    """Add the options of dump."""
    add = add_command(commands, cmd_dump,
                      "--hit --since 3d --sort hits --reverse").add_argument
    add("file", metavar="FILE", nargs="?", help="the register, as --register")
    add("--id", metavar="PREFIX", default="",
        help="only ids that begin so; a single tag is shown with its history")
    add("--name", metavar="GLOB", default="", help="only names like this: 'jo*'")
    add("--hit", action="store_true", default=None, help="only tags with a hit")
    add("--unhit", dest="hit", action="store_false", help="only tags without a hit")
    add("--opened", action="store_true", default=None, help="only tags with an open")
    add("--unopened", dest="opened", action="store_false",
        help="only tags without an open")
    add("--since", metavar="WHEN", type=moment_argument,
        help="only tags hit since then: 2026-11-01, 3d, 12h")
    add("--sort", metavar="COLUMN", default="", help="in the order of a column")
    add("--reverse", action="store_true", help="the other way round")
    add("--limit", metavar="N", type=number_in(0, 10 ** 9 - 1),
        help="at most so many rows")
    add("--full", action="store_true", help="whole ids and names")
    add("--format", choices=("table", "csv", "json"), default="table",
        help="how to show them (default: %(default)s)")
    add("--events", action="store_true", help="show the event log, with these filters")
    add("--events-file", metavar="FILE", default="",
        help="the event log (default: beside the register)")
    add("--follow", action="store_true",
        help="print each new hit as it comes into the event log")


def add_rejudge(commands: Any) -> None:
    """Add the options of rejudge."""
    add = add_command(commands, cmd_rejudge, "--dry-run").add_argument
    add("--events", metavar="FILE", default="", help="the event log")
    add("--dry-run", action="store_true", help="only say what would change")


def add_forget(commands: Any) -> None:
    """Add the options of forget."""
    add = add_command(commands, cmd_forget, "john").add_argument
    add("tags", metavar="ID|NAME", nargs="*",
        help="an id, its first 7 characters or more, or a whole name")
    add("--older-than", metavar="WHEN", type=moment_argument,
        help="all tags made before then: 365d, 2025-01-01")
    add("--events", metavar="FILE", default="", help="the event log")
    add("--yes", action="store_true", help="do not ask")
    add("--dry-run", action="store_true", help="only show what would go")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if options.command == "server" and bool(options.tls_cert) != bool(options.tls_key):
        parser.error("--tls-cert and --tls-key go together")
    if options.command == "forget" and bool(options.tags) == bool(options.older_than):
        parser.error("say which tags: by ID or NAME, or by --older-than")
    if options.command == "newtag" and options.names_from and (
            options.name or options.count > 1):
        parser.error("--names-from goes without --name and --count")


def old_style(argv: Sequence[str]) -> List[str]:
    """Translate a command line of the 2018 tracker: -dump register.csv."""
    if not argv or argv[0] not in ("-server", "-newtag", "-dump"):
        return list(argv)
    options = ("-port", "-csvfile", "-name", "-server")
    return [argv[0][1:], *("-" + a if a in options else a for a in argv[1:])]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; return the exit code."""
    parser = build_parser()
    options = parser.parse_args(old_style(sys.argv[1:] if argv is None else argv))
    check_options(parser, options)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Somebody has read enough: `dump | head`. Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (TrackerError, OSError) as error:
        print(f"mailtracker: error: {clean(explain(error))}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
