#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""Tell which of your e-mails were opened, when and how often.

Make a tag, paste it into a mail, and let the server count its fetches:

    mailtracker.py server                        serve pixels, count hits
    mailtracker.py newtag --name john --server t.example.org
    mailtracker.py dump                          show the register

The words, the same everywhere:

    tag       one thing that is tracked: an id, its row in the register, and the
              <img> element that carries it
    id        the opaque token in the pixel's URL
    pixel     the 1x1 transparent GIF, and its URL
    hit       one fetch of the pixel
    register  the CSV file with one row per tag: register.csv

The files, all beside each other:

    register.csv        the register: counted in place, open it in any spreadsheet
    register.csv.twin   its copy, which no spreadsheet saves over: what a stale save
                        loses is put back from it
    register.csv.bak    the last version of the register that had to be repaired

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
from typing import TYPE_CHECKING
from typing import Any
from typing import Callable
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
from typing import Union

if TYPE_CHECKING:
    import socket
    import ssl

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
_ID_IN_PATH = re.compile(rb"/(%s)(?=[./]|$)" % _ID.encode())

TAG_FORMATS = {
    # display:none would hide it as well, but then Gmail never loads it (mautic#2193).
    "html": '<img src="{}" width="1" height="1" alt="" style="border:0">',
    "url": "{}",
    "markdown": "![]({})",
}
# What RFC 3986 allows stays as the user wrote it, but brackets, which end a Markdown
# link.
URL_SAFE = "/?&=%:@!$'*+,;~"
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?|[0-9a-f.]*:[0-9a-f:.]+")


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
# larger count or the later time also the larger string.
COUNTERS = {"hits": 10, "last_hit": 20}
_OWN_COLUMNS = ("id", *COUNTERS, "created", "name")
_ALIASES = {"clicks": "hits", "lastclick": "last_hit"}  # the tracker of 2018
_LARGEST = 10 ** 10 - 1
_BLANK = tuple("0" * width if width == 10 else NEVER for width in COUNTERS.values())
_COUNTED = sum(COUNTERS.values()) + len(COUNTERS)  # bytes, with their delimiters

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
        fixed = ("id", *COUNTERS)
        return self.headed and self.columns[:len(fixed)] == fixed \
            and set(_OWN_COLUMNS) <= set(self.columns)

    def canonical(self) -> Layout:
        """Return the layout with id and counters first and no own column missing."""
        own = ("id", *COUNTERS)
        rest = [c for c in self.columns if c not in own]
        rest += [c for c in _OWN_COLUMNS if c not in own and c not in rest]
        return self._replace(columns=(*own, *rest), headed=True)

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
        tag = rf"({_ID}){d}({cells}){rest}"
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
        columns.append(name if name in _OWN_COLUMNS and name not in columns else cell)
    known = set(columns).intersection(_OWN_COLUMNS)
    return tuple(columns) if "id" in known and len(known) > 1 else ()


def _headerless_columns(cells: Sequence[str]) -> Tuple[str, ...]:
    """Return the columns of a first row that is a tag's: its header is missing."""
    if not cells or not is_id(cells[0].strip()) or len(cells) < 3:
        return ()
    if cells[1].strip().isdigit() and not cells[2].strip().isdigit():
        return _OWN_COLUMNS
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
        yield from (cells for cells in records if cells)


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

    def add_rows(self, rows: Iterable[Tuple[bytes, int]]) -> List[Tuple[bytes, int]]:
        """Add ids with their offsets; return those that may have been there before."""
        slots, bits, count = self._slots, self._HASH, self._count
        limit, mask, doubtful = len(slots) * 2 // 3, len(slots) - 1, []
        for tag, offset in rows:
            mark = hash(tag) & bits
            slot = mark & mask
            entry = slots[slot]
            while entry:
                if entry & bits == mark:
                    doubtful.append((tag, entry >> 28))
                slot = (slot + 1) & mask
                entry = slots[slot]
            slots[slot] = offset << 28 | mark
            count += 1
            if count > limit:
                slots = self._slots = self._grown(slots)
                limit, mask = len(slots) * 2 // 3, len(slots) - 1
        self._count = count
        return doubtful

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
    return [(row[1], offset + row.start()) for row in rows if row[1]]


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
        for offset, _, rows in Scan(file, self.layout):
            self._index.add_rows(tag_rows(rows, offset))
        # One byte for each 32 of the file: no row is shorter.
        self._seen = bytearray(os.fstat(file).st_size // 32 + 1)

    def take(self, tag: bytes) -> Optional[Tuple[str, ...]]:
        """Return the counters of an id, () the second time; None for an unknown one."""
        found: Optional[Tuple[str, ...]] = None
        for offset in self._index.find(tag):
            row = os.pread(self.file, len(tag) + _COUNTED, offset).decode()
            cells = row.split(self.layout.delimiter)
            if cells[0] == tag.decode():
                taken, self._seen[offset // 32] = self._seen[offset // 32], 1
                found = () if taken else tuple(cells[1:])
        return found

    def left(self) -> Iterator[Dict[str, str]]:
        """Yield the rows that were never taken, by column."""
        for offset, _, rows in Scan(self.file, self.layout):
            for row in rows:
                if row[1] and not self._seen[(offset + row.start()) // 32]:
                    cells = next(csv.reader([row[0].decode("utf-8", "replace")],
                                            delimiter=self.layout.delimiter))
                    yield dict(zip(self.layout.columns, cells))


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
        self._notify = notify
        self._sync_each_hit = sync_each_hit
        self._file = self._twin = -1
        self._inode = (0, 0)
        self._end = -1  # the size up to which index, register and twin agree
        self._index = Index()
        self._indexed = 0  # the inode of the twin that the index was made from
        self._next_try = self._missing_since = 0.0

    # -- counting -----------------------------------------------------------

    def __enter__(self) -> Register:
        """Take the lock and catch up with what others did to the register."""
        lock_file(self._twin)
        try:
            if self.trouble:
                self._lock()  # nothing else would tell that the twin was replaced
            status = os.stat(self.path)
            same = status.st_size == self._end and status.st_ino == self._inode[1]
        except OSError:
            status, same = None, False
        if not same:
            self._follow(status)
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the lock: that of the newest twin, if it was replaced."""
        unlock_file(self._twin)

    def hit(self, tag: bytes, now: bytes) -> int:
        """Count one hit of an id at a time (20 bytes) and return its hits; 0: unknown.

        The lock is held. The hit is in the file when this returns. Raise OSError when
        it cannot be; then it was not counted at all.
        """
        size = len(tag) + _COUNTED
        for offset in self._index.find(tag):
            row = os.pread(self._twin, size, offset)
            if not self.trouble and os.pread(self._file, size, offset) != row:
                self._try_to_settle()
                return self.hit(tag, now)
            if row.startswith(tag + self.layout.delimiter.encode()):
                return self._write_counters(row, len(tag) + 1, offset, now)
        return 0

    def _write_counters(self, row: bytes, at: int, offset: int, now: bytes) -> int:
        """Write the counters of one more hit; return the hits."""
        hits = min(int(row[at:at + 10]) + 1, _LARGEST)
        new = b"%010d%b%b" % (hits, row[at + 10:at + 11], max(row[at + 11:], now))
        if not self.trouble:
            write_whole(self._file, new, offset + at)
        try:
            write_whole(self._twin, new, offset + at)
        except OSError as error:
            if self.trouble:
                raise
            # It stands in the register: counted. The twin catches up later.
            self.trouble = f"{self.twin_path}: {error.strerror}"
        self.dirty = True
        if self._sync_each_hit:
            self.sync()
        return hits

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

    def add(self, tags: Iterable[Tag]) -> None:
        """Append tags, all or none; they are on the disk when this returns."""
        self.open(index=False)
        self._lock()
        try:
            if not self._in_step():
                self._settle_patiently()
            text = "".join(csv_row(self._cells(tag), self.layout) for tag in tags)
            self._append(text.encode())
        finally:
            unlock_file(self._twin)

    def _cells(self, tag: Tag) -> List[str]:
        """Return the cells of a new row in the order of the columns."""
        own = {"id": tag.id, "created": tag.created, "name": escape_formula(tag.name)}
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
            twin_is_ours = os.path.exists(self.twin_path)
            if self.trouble or not twin_is_ours:
                self._try_to_settle()

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
            self.layout = layout
            self._index_twin()

    def _index_twin(self) -> None:
        """Index the twin alone, if it is another one than was indexed before."""
        twin = os.fstat(self._twin).st_ino
        layout = read_layout(os.pread(self._twin, 65536, 0))
        if layout and twin != self._indexed:
            self.layout, self._index, self._indexed = layout, Index(), twin
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
            self.layout = layout
        return canonical

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
        for offset, block, rows in scan:
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
                new[at:at + len(row[2])] = self._larger(row[2], other[2])
            for file in (self._file, self._twin):
                write_whole(file, bytes(new), offset + row.start())
        return pairs is not None

    def _larger(self, counters: bytes, others: bytes) -> bytes:
        """Return the larger of each counter."""
        d = self.layout.delimiter.encode()
        return d.join(map(max, counters.split(d), others.split(d)))

    # -- the merge: what somebody saved, and what we know better -------------

    def _merge(self, odd: bool) -> None:
        """Write a canonical register from the saved one and the twin, and a new twin.

        The user's cells come from the saved one, counters are the larger ones, rows
        that vanished come back at the end.
        """
        saved = read_layout(os.pread(self._file, 65536, 0)) or self.layout
        target = saved.canonical()
        twin = Twin(self._twin)
        merge = Merge(saved, target, twin)
        with NewFile(self.path, self._file) as file:
            with open(os.dup(file), "w", encoding="utf-8", newline="") as text:
                text.write(target.head().decode())
                writer = csv.writer(text, delimiter=target.delimiter,
                                    lineterminator=target.eol)
                writer.writerows(merge.rows(read_rows(self._file, saved)))
            merge.correct(file)
            if odd and os.fstat(self._file).st_size:
                self._keep_backup()
        self.layout = target
        if odd or merge.returned:
            self._notify(merge.summary(self._shown, odd and self.backup_path))

    def _renew_twin(self) -> None:
        """Copy a new register to a new twin, and lock that one.

        In this order: a killed process leaves a twin that is merged once more. And
        every new twin goes with a new register, so that a hit need look at one only.
        """
        self._open_file()
        with NewFile(self.twin_path, self._file) as copy:
            copy_bytes(self._file, copy)
        self._lock()

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
        self.repeated: List[str] = []
        self._tags = 0
        self._saved, self._target, self._twin = saved, target, twin
        own = ["id", *COUNTERS]
        places = {name: place for place, name in reversed([*enumerate(saved.columns)])}
        others = [i for i, name in enumerate(saved.columns) if name not in own]
        self._places = [places.get(name, -1) for name in own] + others
        self._name = target.columns.index("name")
        self._adopted: Set[str] = set()
        self._larger: Dict[str, Tuple[str, ...]] = {}

    def rows(self, saved: Iterable[List[str]]) -> Iterator[List[str]]:
        """Yield every row of the new register."""
        width = len(self._target.columns)
        for cells in saved:
            row = [cells[i] if 0 <= i < len(cells) else "" for i in self._places]
            row += [""] * (width - len(row)) + cells[len(self._saved.columns):]
            yield self._tag(row) if is_id(row[0].strip()) else row
        for known in self._twin.left():
            self.returned += 1
            yield [known.get(column, "") for column in self._target.columns]

    def _tag(self, row: List[str]) -> List[str]:
        """Return the row of a tag with full counters; mark the second of one id."""
        tag = row[0].strip()
        counters = tuple(map(counter_cell, row[1:], COUNTERS.values()))
        known = self._twin.take(tag.encode())
        if known == () or tag in self._adopted:
            self._larger[tag] = tuple(map(
                max, counters, self._larger.get(tag, counters)))
            return ["dup " + tag, *row[1:]]
        if known is None:
            self._adopted.add(tag)
            known = counters
        row[:1 + len(counters)] = tag, *map(max, counters, known)
        row[self._name] = escape_formula(unescape_formula(row[self._name]))
        return row

    def correct(self, file: int) -> None:
        """Give the first row of each repeated id the largest of its counters."""
        if not self._larger:
            return
        d = self._target.delimiter
        for offset, _, rows in Scan(file, self._target):
            for row in rows:
                tag = (row[1] or b"").decode()
                if tag in self._larger:
                    cells = map(max, row[2].decode().split(d), self._larger[tag])
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
           408: b"Request Timeout", 431: b"Request Header Fields Too Large",
           503: b"Service Unavailable"}

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# RFC 9112, strictly: one space, a visible target, CRLF, no folding, no NUL.
_HEADERS = rb"((?:%b:[^\r\n\0]*\r\n)*)\r\n" % _TOKEN
_CLEAN_HEAD = re.compile(rb"%b [!-~]+ HTTP/1\.[01]\r\n%b" % (_TOKEN, _HEADERS))
_CLEAN_GET = re.compile(rb"GET (/[!-~]*) HTTP/1\.[01]\r\n" + _HEADERS)
_BODY_HEADER = re.compile(rb"^(?:content-length|transfer-encoding)[ \t]*:", re.I | re.M)
_FORWARDED = re.compile(rb"^x-forwarded-for:([^\r\n]*)", re.I | re.M)
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
    return address[7:] if address.startswith("::ffff:") else address


def client_address(peer: str, forwarded: str, trusted: Sequence[Any]) -> str:
    """Return who asked: the peer, or who a trusted proxy says it was.

    X-Forwarded-For is read from the right, past the trusted proxies: what stands to
    the left of the first stranger was written by that stranger.
    """
    import ipaddress

    client = peer
    for hop in reversed(forwarded.split(",")):
        if not any(ipaddress.ip_address(client) in net for net in trusted):
            break
        try:
            hop = plain_address(hop.strip())
            if "%" in hop:  # a scope id may hold any text
                break
            client = str(ipaddress.ip_address(hop))
        except ValueError:
            break
    return client


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


class PixelServer:
    """Serve pixels and count their hits until stop() is called.

    The register counts; say and report write a line, for every event and for every
    hit. Nothing but parse, count, answer is done for a hit.
    """

    def __init__(self, register: Register, listener: socket.socket, log: LogFile,
                 quiet: bool = False, trusted: Sequence[Any] = (),
                 certificate: Optional[Certificate] = None) -> None:
        import selectors
        import socket

        self.register = register
        self.stopping = False
        self._listener = listener
        self._socket_type = socket.SocketType
        self._socket_kind = int(listener.family), int(listener.type), listener.proto
        self._no_wait = getattr(socket, "MSG_DONTWAIT", 0)
        self._log = log
        self._quiet = quiet
        self._trusted = trusted
        self._certificate = certificate
        self._selector = selectors.DefaultSelector()
        self._clients: Dict[int, Client] = {}
        limit = open_file_limit()
        self._most = min(MAX_WAITING, limit - min(64, limit // 2))
        self._held: Dict[bytes, List[Any]] = {}
        self._lost = 0
        self._now = (0, b"")
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
            lost = self._lost + sum(hits for hits, _ in self._held.values())
            self._log.line(f"{lost} hits are lost: {self.health()}")

    def stop(self) -> None:
        """Make serve() return soon; safe in a signal handler."""
        self.stopping = True

    def wake_on(self, file: int) -> None:
        """Turn at once when a byte arrives at a descriptor, as at a signal."""
        self._selector.register(file, 1, file)

    def _turn(self) -> None:
        """Wait for somebody and serve everybody who is ready."""
        for key, _ in self._selector.select(self._patience()):
            if key.data is None:
                self._accept(BURST)
            elif isinstance(key.data, int):
                os.read(key.data, 4096)
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
        hits = [(ids_in_path(request[1]), request[2], peer)
                for _, request, peer in plain]
        self.count([hit for hit in hits if hit[0]])
        for connection, _, _ in plain:
            try:
                connection.send(PIXEL_ANSWER, self._no_wait)
            except OSError:
                pass  # counted, but nobody is there any more
            connection.close()

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
            tags = ids_in_path(path.encode("latin-1"))
            self.count([(tags, request.request, request.client_address[0])])
        return PIXEL_ANSWER

    def count(self, hits: Sequence[Tuple[List[bytes], bytes, str]]) -> None:
        """Count hits: the ids each may mean, its request's headers, its peer."""
        if not hits:
            return
        now = self._time()
        with self.register:
            for tags, headers, peer in hits:
                for tag in tags:
                    number = self._hit(tag, now)
                    if number:
                        self._report(tag, number, headers, peer)
                        break

    def _report(self, tag: bytes, number: int, headers: bytes, peer: str) -> None:
        """Write the line of a hit."""
        if not self._quiet:
            client = self._client(headers, peer)
            self._log.line(f"hit {tag.decode()} {number} {client}")

    def _client(self, headers: bytes, peer: str) -> str:
        """Return the address of the client, behind trusted proxies too."""
        if not self._trusted:
            return peer
        forwarded = b",".join(_FORWARDED.findall(headers)).decode("latin-1")
        return client_address(peer, forwarded, self._trusted)

    def _hit(self, tag: bytes, now: bytes) -> int:
        """Count in the register; hold the hit while the disk refuses it."""
        try:
            return self.register.hit(tag, now)
        except Exception as error:  # the pixel is sent whatever happens here
            self._log.rarely(f"cannot count: {error}")
            if not self.register.may_know(tag):
                return 0
            if tag in self._held or len(self._held) < MAX_HELD:
                hits, _ = self._held.get(tag, (0, b""))
                self._held[tag] = [hits + 1, now]
            else:
                self._lost += 1
            return 1

    def _tend(self) -> None:
        """Count what was held, and see what others did to the register."""
        self.register.tend()
        try:
            with self.register:
                for tag, (hits, when) in list(self._held.items()):
                    for _ in range(hits):
                        self.register.hit(tag, when)
                        self._held[tag][0] -= 1
                    del self._held[tag]
        except OSError as error:
            self._log.rarely(f"cannot count: {explain(error)}")
        if self.register.trouble:
            self._log.rarely(f"register: {self.register.trouble}")

    def health(self) -> str:
        """Return what is wrong; "" when all is well."""
        held = sum(hits for hits, _ in self._held.values())
        wrong = [self.register.trouble,
                 f"{held} hits wait for the disk" if held else "",
                 f"{self._lost} hits found no room in memory" if self._lost else ""]
        return "; ".join(filter(None, wrong))

    def _time(self) -> bytes:
        """Return the time as the register writes it."""
        now = int(time.time())
        if now != self._now[0]:
            self._now = now, utc_text(now).encode()
        return self._now[1]


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
    since: str = ""  # last hit at this time or later, as utc_text writes it

    def takes(self, row: Row) -> bool:
        """Tell whether a row is wanted."""
        from fnmatch import fnmatchcase

        return row["id"].startswith(self.id_prefix) \
            and (not self.name or fnmatchcase(row["name"].lower(), self.name.lower())) \
            and (self.hit is None or self.hit == (row["hits"] != "0")) \
            and row["last_hit"] >= self.since


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
    target = layout.canonical()
    return list(target.columns), _plain_rows(file, layout, target)


def _plain_rows(file: int, layout: Layout, target: Layout) -> Iterator[Row]:
    """Yield the rows of tags, with every column of the target layout."""
    missing = dict.fromkeys(target.columns, "")
    is_complete = len(layout.columns) == len(missing)
    for cells in read_rows(file, layout):
        row = dict(zip(layout.columns, cells))
        if not is_complete or len(cells) < len(missing):
            row = {**missing, **row}
        row["id"] = row["id"].strip()
        if not is_id(row["id"]):
            continue
        for column, width in COUNTERS.items():
            cell = row[column]
            if len(cell) != width:
                cell = counter_cell(cell, width)
            row[column] = cell.strip() if width > 10 else cell.lstrip("0") or "0"
        row["name"] = unescape_formula(row["name"])
        yield row


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
    if text_width(text) > width:
        while text_width(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - text_width(text))


def table_lines(rows: Iterable[Row], full: bool = False,
                screen: int = 80) -> Iterator[str]:
    """Yield a table, a summary last; it fits the screen's width unless full."""
    from itertools import chain, islice

    source = iter(rows)
    first = list(islice(source, 1000))  # enough to see how wide the columns must be
    id_width = max((len(r["id"]) for r in first), default=7) if full else 7
    hit_width = max([4, *(len(r["hits"]) for r in first)])
    longest = max([4, *(text_width(clean(r["name"])) for r in first)])
    room = screen - id_width - hit_width - 2 * 20 - 4 * 2
    name_width = longest if full else max(8, min(longest, room))
    tags = hit_tags = hits = 0
    yield f"{'id':{id_width}}  {'name':{name_width}}  {'hits':>{hit_width}}  " \
          f"{'last hit':20}  created"
    for row in chain(first, source):
        tags, hits = tags + 1, hits + int(row["hits"])
        hit_tags += row["hits"] != "0"
        yield f"{row['id'][:id_width]:{id_width}}  " \
              f"{fit(clean(row['name']), name_width)}  {row['hits']:>{hit_width}}  " \
              f"{row['last_hit'] or '-':20}  {clean(row['created']) or '-'}"
    yield f"{tags} tag{'s' * (tags != 1)}, {hit_tags} hit, {hits} hits in all"


def write_csv(out: TextIO, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write CSV that loses nothing; no name in it is a live formula."""
    from operator import itemgetter

    writer = csv.writer(out, lineterminator="\n")
    safe = clean if out.isatty() else str
    writer.writerow(map(safe, columns))
    cells = itemgetter(*columns)
    for row in rows:
        row["name"] = escape_formula(row["name"])
        writer.writerow(map(safe, cells(row)) if safe is clean else cells(row))


def json_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Yield a JSON array, an object a line: counts as numbers, no time as null."""
    import json

    before = "["
    for row in rows:
        values: Dict[str, Any] = dict(row)
        for column, width in COUNTERS.items():
            values[column] = int(row[column]) if width == 10 else row[column] or None
        yield f"{before}\n{json.dumps(values)}"
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"


def follow(path: str, selection: Selection) -> Iterator[str]:
    """Yield a line for each new hit as it comes, for ever."""
    known = {row["id"]: int(row["hits"]) for row in register_rows(path)[1]
             if row["hits"] != "0"}
    seen: Tuple[int, int] = (0, 0)
    while True:
        time.sleep(0.2)
        try:
            status = os.stat(path)
            stamp = status.st_mtime_ns, status.st_ino
            rows = register_rows(path)[1] if stamp != seen else iter(())
        except (TrackerError, FileNotFoundError):
            continue  # being saved; it comes back
        seen = stamp
        for row in rows:
            hits, before = int(row["hits"]), known.get(row["id"], 0)
            if hits > before:
                known[row["id"]] = hits
                if selection.takes(row):
                    yield f"{row['last_hit']}  {row['id'][:7]}  {row['hits']:>4} " \
                          f" {clean(row['name'])}"


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------
# A new command is one cmd_ function and one block in a parser. Only main prints
# errors; only the commands print results.


def cmd_server(options: argparse.Namespace) -> int:
    """Serve pixels and count their hits."""
    import contextlib

    for name in ("register", "logfile", "tls_cert", "tls_key"):
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
            with PidFile(options.pidfile), contextlib.ExitStack() as stack:
                server = PixelServer(register, listener, log, options.quiet,
                                     options.trusted_proxy, certificate)
                stack.enter_context(signals_for(server, log))
                if options.fsync == "second":
                    stack.enter_context(SyncEverySecond(register, log))
                greet_user(options, listener, log)
                if tell >= 0:
                    os.write(tell, b"ready")
                tell_systemd("READY=1")
                server.serve()
        except OSError as error:
            if tell >= 0:
                os.write(tell, explain(error).encode())
            raise
    return 0


def greet_user(options: argparse.Namespace, listener: socket.socket,
               log: LogFile) -> None:
    """Say where the server listens, and how to make a first tag."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if options.tls_cert else "http"
    where = f"[{host}]" if ":" in host else host
    log.line(f"serving pixels on {scheme}://{where}:{port}, "
             f"counting in {options.register}")


def signals_for(server: PixelServer, log: LogFile) -> Any:
    """Return a context in which signals stop the server and reopen its log."""
    import contextlib
    import socket

    @contextlib.contextmanager
    def handled() -> Iterator[None]:
        here, there = socket.socketpair()
        there.setblocking(False)
        signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        server.wake_on(here.fileno())
        with here, there:
            yield

    def on_stop(number: int, frame: object) -> None:
        if server.stopping:
            os._exit(128 + number)
        server.stop()

    def on_hangup(number: int, frame: object) -> None:
        try:
            log.reopen()
        except OSError as error:
            log.line(explain(error))

    signal.signal(signal.SIGTERM, on_stop)
    signal.signal(signal.SIGINT, on_stop)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, on_hangup)
    return handled()


class SyncEverySecond:
    """A thread that brings the register to the disk once a second, if it changed."""

    def __init__(self, register: Register, log: LogFile) -> None:
        import threading

        self._register, self._log = register, log
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
        try:
            if self._register.dirty:
                self._register.sync()
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
    tags = make_tags(names)
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


def make_tags(names: Sequence[str]) -> List[Tag]:
    """Return a new tag for each name."""
    instance = os.urandom(32)
    now = utc_text(time.time())
    return [Tag(new_id(instance, number=number), name, now)
            for number, name in enumerate(names)]


def read_names(path: str) -> Tuple[List[str], List[List[str]], str]:
    """Return header, rows and delimiter of a CSV of names; "-" is standard input.

    Raise TrackerError with the line of the first row that cannot be used.
    """
    source = sys.stdin.fileno() if path == "-" else path
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            delimiter = max(",;\t|", key=first.count)
            reader = csv.reader(_chain(first, file), delimiter=delimiter, strict=True)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise TrackerError(f"{path}: not a CSV file in UTF-8: {error}") from None
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
    return header, [row for _, row in rows], delimiter


def _chain(first: str, file: TextIO) -> Iterator[str]:
    """Yield the first line again, then the others."""
    yield first
    yield from file


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
    """Show the register."""
    path = options.file or options.register
    selection = Selection(options.id, options.name, options.hit,
                          options.since or "")
    if options.follow:
        for line in follow(path, selection):
            print(line, flush=True)
    columns, rows = register_rows(path)
    rows = filter(selection.takes, rows)
    if options.sort:
        if options.sort not in columns:
            raise TrackerError(f"no column {options.sort}; "
                               f"there are {', '.join(map(clean, columns))}")
        rows = iter(sorted(rows, key=sort_key(options.sort)))
    if options.reverse:
        rows = reversed(list(rows))
    if options.limit is not None:
        from itertools import islice

        rows = islice(rows, options.limit)
    print_rows(columns, rows, options)
    return 0


def print_rows(columns: Sequence[str], rows: Iterable[Row],
               options: argparse.Namespace) -> None:
    """Print rows in the format that the options ask for."""
    import shutil

    out = sys.stdout
    if options.format == "csv":
        write_csv(out, columns, rows)
    elif options.format == "json":
        out.writelines(json_lines(rows))
    else:
        screen = shutil.get_terminal_size((80, 24)).columns
        for line in table_lines(rows, options.full, screen):
            print(line)


def number_in(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers of a range."""
    def number(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.A) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is not a number from {low} to {high}")
        return int(text)
    return number


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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="mailtracker.py", description=(__doc__ or "").partition("\n")[0],
        epilog="Each command has its own help: mailtracker.py newtag --help")
    parser.add_argument("--version", action="version",
                        version=f"mailtracker {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     prog=parser.prog)
    for add in (add_server, add_newtag, add_dump):
        add(commands)
    return parser


def add_command(commands: Any, run: Callable[[argparse.Namespace], int],
                example: str) -> argparse.ArgumentParser:
    """Add the parser of a command; what it does is its first docstring line."""
    name = run.__name__.partition("_")[2]
    about = (run.__doc__ or "").strip()
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about[:1].lower() + about[1:].rstrip("."), description=about,
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
    add("--copy", action="store_true", help="put the tag on the clipboard as well")


def add_dump(commands: Any) -> None:
    """Add the options of dump."""
    add = add_command(commands, cmd_dump,
                      "--hit --since 3d --sort hits --reverse").add_argument
    add("file", metavar="FILE", nargs="?", help="the register, as --register")
    add("--id", metavar="PREFIX", default="", help="only ids that begin so")
    add("--name", metavar="GLOB", default="", help="only names like this: 'jo*'")
    add("--hit", action="store_true", default=None, help="only tags with a hit")
    add("--unhit", dest="hit", action="store_false", help="only tags without a hit")
    add("--since", metavar="WHEN", type=moment_argument,
        help="only tags hit since then: 2026-11-01, 3d, 12h")
    add("--sort", metavar="COLUMN", default="", help="in the order of a column")
    add("--reverse", action="store_true", help="the other way round")
    add("--limit", metavar="N", type=number_in(0, 10 ** 9 - 1),
        help="at most so many rows")
    add("--full", action="store_true", help="whole ids and names")
    add("--format", choices=("table", "csv", "json"), default="table",
        help="how to show them (default: %(default)s)")
    add("--follow", action="store_true", help="print each new hit as it comes")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if options.command == "server" and bool(options.tls_cert) != bool(options.tls_key):
        parser.error("--tls-cert and --tls-key go together")
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
