"""Text and tags: the pure functions that everything dangerous goes through."""
from __future__ import annotations

import re
from html.parser import HTMLParser
from math import log2
from urllib.parse import urlsplit

import pytest

from mailtracker import ID_ALPHABET
from mailtracker import ID_LENGTH
from mailtracker import ID_LETTERS
from mailtracker import TAG_FORMATS
from mailtracker import TrackerError
from mailtracker import base_url
from mailtracker import clean
from mailtracker import escape_formula
from mailtracker import explain
from mailtracker import ids_in_path
from mailtracker import is_id
from mailtracker import new_id
from mailtracker import plain_text
from mailtracker import tag_text
from mailtracker import unescape_formula
from mailtracker import utc_text

INSTANCE = bytes(range(32))
A = "bcdfghjkmnpqrstvwxz23"
B = "zzzzzzzzzzzzzzzzzzzzz"
OLD = "0123456789abcdef0123456789abcdef01234567"  # of the tracker of 2018


def cases(table):
    """Return a parametrize table and its ids, from a dict by id."""
    return {"argvalues": list(table.values()), "ids": list(table)}


# -- ids ------------------------------------------------------------------------


def test_an_id_is_a_word_that_no_spreadsheet_takes_for_a_number():
    for number in range(1000):
        made = new_id(INSTANCE, now_ns=number)
        assert re.fullmatch("[bcdfghjkmnpqrstvwxz][bcdfghjkmnpqrstvwxz2-9]{20}", made)
        assert is_id(made)


def test_an_id_has_at_least_96_bits():
    assert len(set(ID_LETTERS)) == len(ID_LETTERS)
    assert len(set(ID_ALPHABET)) == len(ID_ALPHABET)
    assert log2(len(ID_LETTERS)) + (ID_LENGTH - 1) * log2(len(ID_ALPHABET)) >= 96


def test_every_letter_comes_at_every_place():
    ids = [new_id(INSTANCE, now_ns=number) for number in range(2000)]
    assert {made[0] for made in ids} == set(ID_LETTERS)
    for place in range(1, ID_LENGTH):
        assert {made[place] for made in ids} == set(ID_ALPHABET)


def test_time_instance_and_number_each_make_another_id():
    same = {new_id(INSTANCE, 1, 1), new_id(INSTANCE, 1, 1)}
    others = {new_id(INSTANCE, 2, 1), new_id(INSTANCE, 1, 2), new_id(INSTANCE, 12, 1),
              new_id(INSTANCE, 1, 12), new_id(INSTANCE[::-1], 1, 1)}
    assert len(same) == 1
    assert len(same | others) == 6


def test_ids_of_one_instance_never_repeat():
    assert len({new_id(INSTANCE, 1, number) for number in range(50_000)}) == 50_000


@pytest.mark.parametrize("text", **cases({
    "new": A, "old": OLD, "shortest": A[:16], "longest": A + A[:19]}))
def test_an_id_is_recognised(text):
    assert is_id(text)


@pytest.mark.parametrize("text", **cases({
    "nothing": "", "too short": A[:15], "too long": A + A[:20], "upper case": A.upper(),
    "digit first": "2" + A, "vowel": "a" + A, "look-alike": A + "l", "one": A + "1",
    "space behind": A + " ", "line end behind": A + "\n", "space in front": " " + A,
    "39 hex digits": OLD[:-1], "41 hex digits": OLD + "0",
    "upper-case hex": OLD.upper(), "full-width": A[:-1] + "２", "NUL": A + "\0"}))
def test_anything_else_is_no_id(text):
    assert not is_id(text)


# -- the way of an id through a URL ------------------------------------------------


@pytest.mark.parametrize("target, found", **cases({
    "plain": (f"/{A}.gif", [A]),
    "without extension": (f"/{A}", [A]),
    "two extensions": (f"/{A}.tar.gz", [A]),
    "dot behind": (f"/{A}.", [A]),
    "slash behind": (f"/{A}/", [A]),
    "second to last": (f"/{A}/logo.gif", [A]),
    "far in front": (f"/{A}/any/prefix/logo.gif", [A]),
    "behind a prefix": (f"/any/prefix/{A}.png", [A]),
    "query": (f"/{A}.gif?x=1", [A]),
    "query with a slash": (f"/x.gif?/{A}.gif", []),
    "query without a path": (f"/{A}?", [A]),
    "old": (f"/{OLD}.gif", [OLD]),
    "last one first": (f"/{A}/{B}.gif", [B, A]),
    "all of three": (f"/{A}/{OLD}/{B}/x", [B, OLD, A]),
    "two slashes": (f"//{A}.gif", [A]),
    "many slashes": (f"///{A}///logo.gif", [A]),
    "dots": (f"/../{A}/..", [A]),
    "root": ("/", []),
    "nothing": ("", []),
    "no slash": (A, []),
    "asterisk": ("*", []),
    "part of a segment": (f"/x-{A}.gif", []),
    "a letter more": (f"/{A}{B}", []),
    "upper case": (f"/{A.upper()}.gif", []),
    "id as an extension": (f"/logo.{A}", []),
    "parameter": (f"/x;{A}", []),
    "percent": (f"/%62{A[1:]}", []),
    "encoded slash": (f"/x%2F{A}", []),
}))
def test_ids_are_found_in_any_path_the_likeliest_first(target, found):
    assert [i.decode() for i in ids_in_path(target.encode())] == found


def test_a_long_path_is_searched_in_no_time():
    for target in (b"/" * 65_536, b"/" + b"b" * 65_536, b"/bcd" * 16_384):
        assert ids_in_path(target) == []


@pytest.mark.parametrize("path", ["/{id}.gif", "/{id}", "/img/{id}/logo.gif",
                                  "/a b/{id}.png?x=/y", "/ü/{id}/"])
@pytest.mark.parametrize("base", ["http://h:1", "https://t.example.org/p"])
def test_the_id_is_found_again_in_the_url_of_its_tag(base, path):
    url = urlsplit(tag_text(base, path, A, "url"))
    target = url.path + ("?" + url.query if url.query else "")
    assert [i.decode() for i in ids_in_path(target.encode("ascii"))] == [A]


# -- where a pixel is to be had --------------------------------------------------


@pytest.mark.parametrize("server, port, url", **cases({
    "bare host": ("t.example.org", None, "http://t.example.org:56789"),
    "bare host and port": ("t.example.org", 80, "http://t.example.org:80"),
    "host:port": ("t.example.org:8080", None, "http://t.example.org:8080"),
    "bare host with a path": ("h/p", None, "http://h:56789/p"),
    "https": ("https://t.example.org", None, "https://t.example.org"),
    "https and port": ("https://t.example.org", 8443, "https://t.example.org:8443"),
    "http": ("http://t.example.org", None, "http://t.example.org"),
    "URL with a port": ("https://h:444", None, "https://h:444"),
    "the port asked for wins": ("https://h:444", 445, "https://h:445"),
    "slash behind": ("https://h/", None, "https://h"),
    "path": ("https://h/a/b/", None, "https://h/a/b"),
    "upper case": ("HTTPS://T.Example.ORG", None, "https://t.example.org"),
    "address": ("192.0.2.1", None, "http://192.0.2.1:56789"),
    "IPv6": ("[2001:db8::1]", None, "http://[2001:db8::1]:56789"),
    "IPv6 URL": ("http://[2001:db8::1]:80", None, "http://[2001:db8::1]:80"),
    "international": ("bücher.example", None, "http://xn--bcher-kva.example:56789"),
    "underscore": ("my_host", 1, "http://my_host:1"),
    "root dot": ("t.example.org.", 1, "http://t.example.org.:1"),
}))
def test_a_server_becomes_a_base_url(server, port, url):
    assert base_url(server, port) == url


@pytest.mark.parametrize("server", **cases({
    "nothing": "", "scheme only": "https://", "other scheme": "ftp://h",
    "script": "javascript://h/%0aalert(1)", "file": "file:///etc/passwd",
    "space": "a b", "quote": 'h"onload="x', "less than": "h<b>", "user": "u@h",
    "user and password": "https://u:p@h", "query": "https://h?x", "hash": "https://h#x",
    "port is no number": "h:http", "port too large": "h:65536",
    "negative port": "h:-1", "open bracket": "http://[::1", "two dots": "a..b",
    "dot in front": ".example.org", "dots": "..", "long label": "a" * 64 + ".org",
    "long name": "a." * 200 + "org", "emoji": "💩\u202e.example", "NUL": "h\0",
    "escape": "h\x1b[31m", "backslash": "h\\x", "percent": "h%00",
    "lone surrogate": "h\udcff", "space in the path": "https://h/a b",
    "quote in the path": 'https://h/a"b', "angle in the path": "https://h/<b>",
    "escape in the path": "https://h/\x1b[31m", "umlaut in the path": "https://h/ü",
}))
def test_what_is_no_server_is_refused_in_one_line_or_quoted(server):
    try:
        url = base_url(server)
    except TrackerError as error:
        assert "\n" not in str(error)
        assert str(error).isprintable()
    else:  # a path may be mended; nothing else
        assert re.fullmatch(r"https://h/[\w/%.~-]+", url, re.A)


# -- the tag -----------------------------------------------------------------------


class Images(HTMLParser):
    """The attributes of every element of some HTML."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.found.append(("text", data))


def test_the_tag_is_one_image_of_one_pixel():
    text = tag_text("http://customcrypto.com:56789", "/{id}.gif", A)
    (name, attributes), = Images(text).found
    assert text.startswith(f'<img src="http://customcrypto.com:56789/{A}.gif" '
                           'width="1" height="1" alt="" ')
    assert name == "img"
    assert attributes["src"] == f"http://customcrypto.com:56789/{A}.gif"
    assert (attributes["width"], attributes["height"]) == ("1", "1")
    assert attributes["alt"] == ""


def test_the_tag_is_not_hidden_from_gmail():
    text = tag_text("http://h", "/{id}.gif", A)
    assert not re.search("display|visibility|hidden|loading", text)


@pytest.mark.parametrize("form, text", **cases({
    "html": ("html", f'<img src="http://h/{A}.gif" width="1" height="1" alt="" '
                     'style="border:0">'),
    "url": ("url", f"http://h/{A}.gif"),
    "markdown": ("markdown", f"![](http://h/{A}.gif)")}))
def test_a_tag_has_three_forms(form, text):
    assert tag_text("http://h", "/{id}.gif", A, form) == text


def test_no_other_form_is_left_untested():
    assert set(TAG_FORMATS) == {"html", "url", "markdown"}


@pytest.mark.parametrize("path", **cases({
    "quotes": "/\"'/{id}.gif", "angles": "/<b>/{id}.gif", "ampersand": "/{id}?a=1&b=2",
    "space": "/a b/{id}.gif", "line end": "/a\r\n/{id}.gif", "escape": "/\x1b[2J/{id}",
    "umlaut": "/ü/{id}.gif", "wide": "/日本/{id}", "braces": "/{}/{0}/{id}.gif",
    "backslash": "/\\/{id}.gif", "NUL": "/\0/{id}", "bidi": "/\u202e/{id}",
    "lone surrogate": "/\udcff/{id}", "hash": "/#/{id}.gif"}))
@pytest.mark.parametrize("form", list(TAG_FORMATS))
def test_a_path_cannot_break_out_of_its_tag(form, path):
    try:
        text = tag_text("http://h", path, A, form)
    except (TrackerError, UnicodeEncodeError):
        return
    url = {"html": lambda: Images(text).found[0][1]["src"], "url": lambda: text,
           "markdown": lambda: text[4:-1]}[form]()
    assert re.fullmatch(r"http://h/[!-~]+", url)
    assert not re.search(r"[<>\"#\\^`{}|]", url)
    assert A in url
    assert form != "html" or len(Images(text).found) == 1


def test_what_is_percent_encoded_already_stays():
    assert tag_text("http://h", "/a%20b/{id}?x=%C3%BC", A, "url") \
        == f"http://h/a%20b/{A}?x=%C3%BC"


def test_brackets_do_not_end_a_markdown_tag():
    text = tag_text("http://h", "/a)b(/{id}.gif", A, "markdown")
    assert re.fullmatch(r"!\[\]\(http://h/[^()\s]+\)", text)


# -- text -------------------------------------------------------------------------


@pytest.mark.parametrize("text, cleaned", **cases({
    "nothing": ("", ""), "plain": ("john", "john"), "space": ("a b", "a b"),
    "umlaut": ("Jürgen", "Jürgen"), "wide": ("日本語", "日本語"),
    "joined emoji": ("👩\u200d👧", "👩\u200d👧"),
    "Persian": ("می\u200cخواهم", "می\u200cخواهم"),
    "escape": ("\x1b[31m", r"\x1b[31m"), "line end": ("a\r\nb", r"a\r\nb"),
    "tab": ("a\tb", r"a\tb"), "NUL": ("\0", r"\x00"), "DEL": ("\x7f", r"\x7f"),
    "C1": ("\x9b31m", r"\x9b31m"), "NEL": ("\x85", r"\x85"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "bidi override": ("\u202egpj", r"\u202egpj"), "isolate": ("\u2066", r"\u2066"),
    "mark": ("\u200f", r"\u200f"), "BOM": ("\ufeffx", r"\ufeffx"),
    "tag character": ("\U000e0041", r"\U000e0041"),
    "lone surrogate": ("\udcff", r"\udcff"), "no-break space": ("a\xa0b", r"a\xa0b"),
}))
def test_control_characters_are_escaped(text, cleaned):
    assert clean(text) == cleaned


def test_cleaned_text_has_no_control_character_whatever_it_was():
    everything = "".join(map(chr, range(0x110000)))
    text = clean(everything)
    assert text.replace("\u200c", "").replace("\u200d", "").isprintable()
    assert clean(text) == text
    text.encode()  # also has no lone surrogate


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\0=1", "＝1", "＋1",
            "－1", "＠x", "=", "-"]


@pytest.mark.parametrize("cell", FORMULAS, ids=ascii)
def test_a_formula_is_written_with_an_apostrophe(cell):
    assert escape_formula(cell) == "'" + cell


@pytest.mark.parametrize("cell", ["", "john", "'", "''", "'tis", "a=1", " =1", "1-1",
                                  "日本", "O'Neill"], ids=ascii)
def test_what_is_no_formula_stays_as_it_is(cell):
    assert escape_formula(cell) == cell
    assert unescape_formula(cell) == cell


@pytest.mark.parametrize("cell", [
    prefix + cell for cell in FORMULAS for prefix in ("", "'", "''", "'''")]
    + ["", "'", "''", "'a", "''a", "a'=1", "' =1"], ids=ascii)
def test_every_cell_is_read_back_as_it_was_given(cell):
    written = escape_formula(cell)
    assert unescape_formula(written) == cell
    assert not written.startswith(tuple(formula[0] for formula in FORMULAS))


def test_an_apostrophe_does_not_pile_up():
    cell = "=1"
    for _ in range(3):
        cell = escape_formula(unescape_formula(cell))
    assert cell == "'=1"


@pytest.mark.parametrize("text, plain", **cases({
    "plain": ("Jürgen 日本", "Jürgen 日本"), "stray byte": ("a\udcffb", "a\ufffdb"),
    "stray bytes of one letter": ("\udcc3\udcbc", "ü")}))
def test_text_of_the_command_line_becomes_utf_8(text, plain):
    assert plain_text(text) == plain


def test_a_lone_surrogate_of_any_kind_becomes_a_replacement():
    assert "\ufffd" in plain_text("a\ud800b")


@pytest.mark.parametrize("seconds, text", **cases({
    "start": (0, "1970-01-01T00:00:00Z"), "fraction": (0.999, "1970-01-01T00:00:00Z"),
    "now": (1795205643, "2026-11-20T20:14:03Z"),
    "leap day": (1709164800, "2024-02-29T00:00:00Z")}))
def test_times_are_utc_of_20_characters(seconds, text):
    assert utc_text(seconds) == text
    assert len(text) == 20


@pytest.mark.parametrize("error, text", **cases({
    "own": (TrackerError("no such register: x"), "no such register: x"),
    "of a file": (OSError(28, "No space left on device", "r.csv"),
                  "r.csv: No space left on device"),
    "of the system": (OSError(28, "No space left on device"),
                      "No space left on device"),
    "bare": (OSError("odd"), "odd")}))
def test_an_error_is_explained_in_one_line(error, text):
    assert explain(error) == text
