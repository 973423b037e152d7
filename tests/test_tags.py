"""Text and tags: the pure functions that everything dangerous goes through."""
from __future__ import annotations

import re
from html.parser import HTMLParser
from math import log2
from urllib.parse import urlsplit

import pytest

import mailtracker
from mailtracker import (
    ID_ALPHABET, ID_LENGTH, ID_LETTERS, TAG_FORMATS, TrackerError, base_url, clean,
    escape_formula, ids_in_path, is_id, new_ids, plain_text, tag_template,
    unescape_formula)

INSTANCE = bytes(range(32))
A = "bcdfghjkmnpqrstvwxz23"
B = "zzzzzzzzzzzzzzzzzzzzz"
OLD = "0123456789abcdef0123456789abcdef01234567"  # of the tracker of 2018
IDS = new_ids(INSTANCE, 20_000, 1)


# -- ids ------------------------------------------------------------------------


def test_no_guess_is_better_than_one_in_two_to_the_96():
    assert len(set(ID_LETTERS)) == len(ID_LETTERS)
    assert len(set(ID_ALPHABET)) == len(ID_ALPHABET)
    first, others = (max(map(letters.count, letters)) / 256 for letters in
                     (mailtracker._FIRST, mailtracker._OTHERS))
    assert -log2(first) - (ID_LENGTH - 1) * log2(others) >= 96


def test_an_id_is_a_word_and_time_instance_and_number_each_make_another():
    for place, letters in enumerate([ID_LETTERS] + [ID_ALPHABET] * (ID_LENGTH - 1)):
        assert {made[place] for made in IDS} == set(letters)
    assert all(map(is_id, IDS)) and new_ids(INSTANCE, 20_000, 1) == IDS
    assert len({*IDS, *new_ids(INSTANCE, 99, 2), *new_ids(INSTANCE[::-1], 99, 1)}) \
        == len(IDS) + 198


def test_an_id_is_told_from_anything_else():
    assert all(map(is_id, [A, OLD, A[:16], A + A[:19]]))
    no_ids = ["", A[:15], A + A[:20], A.upper(), "2" + A, "a" + A, A + "l", A + "1",
              A + " ", A + "\n", " " + A, OLD[:-1], OLD + "0", OLD.upper(),
              A[:-1] + "２", A + "\0"]
    assert [text for text in no_ids if is_id(text)] == []


# -- the way of an id through a URL ------------------------------------------------


@pytest.mark.parametrize("target, found", [
    (f"/{A}.gif", [A]), (f"/{A}", [A]), (f"/{A}.tar.gz", [A]), (f"/{A}.", [A]),
    (f"/{A}/", [A]), (f"/{A}/any/prefix/logo.gif", [A]), (f"/any/prefix/{A}.png", [A]),
    (f"/{A}.gif?x=1", [A]), (f"/{A}?", [A]), (f"/x.gif?/{A}.gif", []),
    (f"/{OLD}.gif", [OLD]), (f"/{A}/{B}.gif", [B, A]),
    (f"/{A}/{OLD}/{B}/x", [B, OLD, A]), (f"///{A}///logo.gif", [A]),
    (f"/../{A}/..", [A]), ("/", []), ("", []), (A, []), ("*", []), (f"/x-{A}.gif", []),
    (f"/{A}{B}", []), (f"/{A.upper()}.gif", []), (f"/logo.{A}", []), (f"/x;{A}", []),
    (f"/%62{A[1:]}", []), (f"/x%2F{A}", [])])
def test_ids_are_found_in_any_path_the_likeliest_first(target, found):
    assert [i.decode() for i in ids_in_path(target.encode())] == found


def test_a_long_path_is_searched_in_no_time():
    for target in (b"/" * 65_536, b"/" + b"b" * 65_536, b"/bcd" * 16_384):
        assert ids_in_path(target) == []


# -- where a pixel is to be had --------------------------------------------------


@pytest.mark.parametrize("server, port, url", [
    ("t.example.org", None, "http://t.example.org:56789"),
    ("t.example.org", 80, "http://t.example.org:80"),
    ("t.example.org:8080", None, "http://t.example.org:8080"),
    ("h/p", None, "http://h:56789/p"), ("http://h", None, "http://h"),
    ("https://t.example.org", 8443, "https://t.example.org:8443"),
    ("https://h:444", None, "https://h:444"), ("https://h:444", 445, "https://h:445"),
    ("https://h/", None, "https://h"), ("https://h/a/b/", None, "https://h/a/b"),
    ("HTTPS://T.Example.ORG", None, "https://t.example.org"),
    ("192.0.2.1", None, "http://192.0.2.1:56789"),
    ("[2001:db8::1]", None, "http://[2001:db8::1]:56789"),
    ("http://[2001:db8::1]:80", None, "http://[2001:db8::1]:80"),
    ("bücher.example", None, "http://xn--bcher-kva.example:56789"),
    ("my_host", 1, "http://my_host:1"), ("h.org.", 1, "http://h.org.:1")])
def test_a_server_becomes_a_base_url(server, port, url):
    assert base_url(server, port) == url


@pytest.mark.parametrize("server", [
    "", "https://", "ftp://h", "javascript://h/%0aalert(1)", "file:///etc/passwd",
    "a b", 'h"onload="x', "h<b>", "u@h", "https://u:p@h", "https://h?x", "https://h#x",
    "h:http", "h:65536", "h:-1", "http://[::1", "a..b", ".example.org", "..",
    "a" * 64 + ".org", "a." * 200 + "org", "💩\u202e.example", "h\0", "h\x1b[31m",
    "h\\x", "h%00", "h\udcff", "https://h/a b", 'https://h/a"b', "https://h/<b>",
    "https://h/\x1b[31m", "https://h/ü"], ids=ascii)
def test_what_is_no_server_is_refused_in_one_line_or_quoted(server):
    try:
        url = base_url(server)
    except TrackerError as error:
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


def test_a_tag_has_three_forms_and_none_that_gmail_never_loads():
    url = "http://customcrypto.com:56789/{id}.gif"
    assert {form: tag_template("http://customcrypto.com:56789", "/{id}.gif", form)
            for form in TAG_FORMATS} == {
        "html": f'<img src="{url}" width="1" height="1" alt="" style="border:0">',
        "url": url, "markdown": f"![]({url})"}


@pytest.mark.parametrize("path", [
    "/{id}", "/img/{id}/logo.gif", "/a b/{id}.png?x=/y", "/\"'/{id}.gif",
    "/<b>/{id}.gif", "/{id}?a=1&b=2", "/a\r\n/{id}.gif", "/\x1b[2J/{id}", "/ü/{id}/",
    "/日本/{id}", "/{}/{0}/{id}.gif", "/\\/{id}.gif", "/\0/{id}", "/\u202e/{id}",
    "/#/{id}.gif", "/a)b(/{id}.gif", "/a%20b/{id}?x=%C3%BC"], ids=ascii)
@pytest.mark.parametrize("form", TAG_FORMATS)
def test_a_path_cannot_break_out_of_its_tag_and_its_id_is_found_again(form, path):
    text = tag_template("https://h/p", path, form).replace("{id}", A)
    (name, attributes), = Images(text).found if form == "html" else [(
        "img", {"src": text if form == "url" else text[4:-1]})]
    url = urlsplit(attributes["src"])
    assert name == "img" and re.fullmatch(r"https://h/p/[!-~]+", attributes["src"])
    assert not re.search(r"[<>\"#\\^`{}|()]", attributes["src"])
    assert ids_in_path(url.path.encode()) == [A.encode()]
    assert "%25" not in url.geturl()  # what is encoded already stays


# -- text -------------------------------------------------------------------------


@pytest.mark.parametrize("text, cleaned", [
    ("", ""), ("a b", "a b"), ("Jürgen", "Jürgen"), ("日本語", "日本語"),
    ("👩\u200d👧", "👩\u200d👧"), ("می\u200cخواهم", "می\u200cخواهم"), ("a\xa0b", "a\xa0b"),
    ("\x1b[31m", r"\x1b[31m"), ("a\r\nb", r"a\r\nb"), ("a\tb", r"a\tb"),
    ("\0", r"\x00"), ("\x7f", r"\x7f"), ("\x9b31m", r"\x9b31m"), ("\x85", r"\x85"),
    ("a\u2028b", r"a\u2028b"), ("\u202egpj", r"\u202egpj"), ("\u2066", r"\u2066"),
    ("\u200f", r"\u200f"), ("\ufeffx", r"\ufeffx"), ("\U000e0041", r"\U000e0041"),
    ("\udcff", r"\udcff")], ids=ascii)
def test_control_characters_are_escaped(text, cleaned):
    assert clean(text) == cleaned


def test_cleaned_text_has_no_control_character_whatever_it_was():
    text = clean("".join(map(chr, range(0x110000))))
    assert re.sub("[\u200c\u200d\u00a0\u202f\u3000]", "", text).isprintable()
    assert clean(text) == text
    text.encode()  # also has no lone surrogate


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\0=1", "＝1", "＋1",
            "－1", "＠x", "=", "-"]
HARMLESS = ["", "john", "'", "''", "'tis", "a=1", " =1", "1-1", "日本", "O'Neill",
            "''a", "a'=1", "' =1"]


@pytest.mark.parametrize("quotes", ["", "'", "''", "'''"], ids=len)
def test_a_formula_gets_an_apostrophe_and_every_cell_is_read_back(quotes):
    for cell in (quotes + formula for formula in FORMULAS):
        assert escape_formula(cell) == "'" + cell
        assert unescape_formula("'" + cell) == cell
    for cell in HARMLESS:
        assert escape_formula(cell) == unescape_formula(cell) == cell


def test_text_of_the_command_line_becomes_utf_8():
    given = ["Jürgen 日本", "a\udcffb", "\udcc3\udcbc", "a\ud800b"]
    assert [plain_text(text) for text in given] == [
        "Jürgen 日本", "a\ufffdb", "ü", "a\ufffdb"]


def test_times_are_utc_of_20_characters():
    assert [mailtracker.utc_text(when) for when in (0.999, 1795205643, 1709164800)] == [
        "1970-01-01T00:00:00Z", "2026-11-20T20:14:03Z", "2024-02-29T00:00:00Z"]


def test_an_error_is_explained_in_one_line():
    full = (28, "No space left on device")
    errors = [TrackerError("no such register: x"), OSError(*full, "r.csv"),
              OSError(*full), OSError("odd")]
    assert [mailtracker.explain(error) for error in errors] == [
        "no such register: x", "r.csv: No space left on device",
        "No space left on device", "odd"]
