"""Splice: one element into a message, and every other byte as it was."""
from __future__ import annotations

import email
import quopri
import random
import re
import time
from base64 import encodebytes

import pytest

from mailtracker import (
    decoded_words, edited, field, fields, make_html, part_text, split, wants_no_pixel,
    with_header_lines, with_pixel, without_field)

URL = "https://t.example.org/p/bcdfghjkmnpqrstvwxz23.gif"
TAG = f'<img src="{URL}" width="1" height="1" alt="" style="border:0">'
OLD = "https://t.example.org/old.gif"
PAGE = "<html><body><p>Grüße, a=b</p>\n@</body></html>\n"
HEAD = b"From: ann@x.example\r\nSubject: =?utf-8?q?x?=\r\nX-Odd:no blank  \r\n"
CODINGS = {"7bit": bytes, "8bit": bytes, "binary": bytes, "base64": encodebytes,
           "quoted-printable": quopri.encodestring}


def is_ours(source):
    return source.endswith("/old.gif")


def leaf(kind, text, *more, coding="8bit", charset="utf-8"):
    """Return a part; text may be bytes, as they stand."""
    if isinstance(text, str):
        text = CODINGS[coding](text.encode(charset))
    head = "\n".join([f"Content-Type: {kind}; charset={charset}",
                      f"Content-Transfer-Encoding: {coding}", *more, "\n"])
    return re.sub(b"\r?\n", b"\r\n", head.encode() + text)


def multi(kind, *parts, mark="=_a.b+c(1)?", more=""):
    """Return a multipart with a preamble and an epilogue."""
    head = f'Content-Type: multipart/{kind}; boundary="{mark}"{more}\r\n\r\nsay\r\n'
    line = b"\r\n--" + mark.encode()
    return head.encode() + b"".join(line + b"\r\n" + part for part in parts) \
        + line + b"-- \r\nbye\r\n"


def html(marked=PAGE, *more, **how):
    return leaf("text/html", marked.replace("@", ""), *more, **how)


TEXT = leaf("Text/Plain", "a\n</body>\n")
FILE = leaf("application/pdf", b"%PDF\0\n.\n", "Content-Disposition: attachment")
ATTACHED = html(PAGE, "Content-Disposition: ATTACHMENT")
MAIL = b"Content-Type: message/rfc822\r\n\r\n" + HEAD + html(f'<img src="{OLD}">')


def leaves(raw):
    """Return header, type and bytes of all leaves, as the email package sees them."""
    def of(part):
        if part.get_content_maintype() == "multipart" and part.is_multipart():
            return [leaf for inner in part.get_payload() for leaf in of(inner)]
        data = part.as_bytes() if part.is_multipart() else part.get_payload(decode=True)
        return [(part.items(), part.get_content_type(), data)]
    return of(email.message_from_bytes(raw))


def tight(text):
    """Return a text without blanks, which a tag brings along."""
    return re.sub(r"\s", "", text)


def assert_tagged(raw, marked=PAGE, charset="utf-8"):
    """Fail unless one leaf has the tag at @, and nothing else changed."""
    new, why = with_pixel(raw, TAG, is_ours)
    assert why == ""
    before, after = leaves(raw), leaves(new)
    changed = [n for n, pair in enumerate(zip(before, after)) if pair[0] != pair[1]]
    assert len(before) == len(after) and len(changed) == 1
    assert before[changed[0]][:2] == after[changed[0]][:2]
    assert tight(after[changed[0]][2].decode(charset)) == tight(
        marked.replace("@", TAG))
    part, = [part for part in split(raw) if raw[:part.start] == new[:part.start]
             and new.endswith(raw[part.end:]) and part.type == "text/html"][:1]
    grown = new[part.start:len(new) - len(raw) + part.end].split(b"\r\n")
    old = raw[part.start:part.end].split(b"\r\n")
    assert max(map(len, grown)) <= max(*map(len, old), len(TAG))
    assert b"\n" not in b"".join(grown)
    return new


SHAPES = {
    "alone": lambda it: it,
    "alternative": lambda it: multi("alternative", TEXT, it),
    "amp": lambda it: multi("alternative", TEXT, leaf("text/x-amp-html", PAGE), it),
    "related": lambda it: multi("related", it, html("<p>2"), FILE),
    "related, start": lambda it: multi(
        "related", html("<p>1"), b"Content-ID: <r@x>\r\n" + it, more='; start="<r@x>"'),
    "alternative, related": lambda it: multi(
        "alternative", TEXT, multi("related", it, FILE, mark="=_a")),
    "mixed, alternative": lambda it: multi(
        "mixed", multi("alternative", TEXT, it, mark="=_a.b+c(1)?2"), FILE, MAIL),
    "related, alternative": lambda it: multi(
        "related", multi("alternative", TEXT, it, mark="m"), html("<p>2")),
    "Apple Mail": lambda it: multi(
        "alternative", TEXT, multi("mixed", it, FILE, html("<p>2"), mark="m")),
    "attached first": lambda it: multi("mixed", ATTACHED, MAIL, it),
    "digest first": lambda it: multi("mixed", multi("digest", html(), mark="m"), it),
    "calendar file": lambda it: multi("mixed", it, leaf("text/calendar", "BEGIN:V")),
    "key file": lambda it: multi("mixed", it, leaf(
        "text/plain", "-----BEGIN PGP P", "Content-Disposition: attachment")),
    "no end": lambda it: multi("mixed", it)[:-len("\r\n--=_a.b+c(1)?-- \r\nbye\r\n")],
    "part without head": lambda it: multi("mixed", b"\r\ntext", it),
    "inline": lambda it: multi("mixed", b"Content-Disposition: inline\r\n" + it),
    "auto-submitted: no": lambda it: b"Auto-Submitted: no (by hand)\r\n" + it,
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_leaf_of_any_shape_gets_the_tag(shape, coding):
    raw = HEAD + shape(html(coding=coding))
    assert_tagged(raw)
    new, _ = with_pixel(raw.replace(b"\r\n", b"\n"), TAG, is_ours)
    assert b"\r" not in new and len(leaves(new)) == len(leaves(raw))


LONG = "<p>" + "x" * 70 + "</p>\n"
PLACES = {
    "upper case": "<P>a@</BODY\n ></HTML>", "empty": "@", "no end": "<p>a@",
    "html only": "<p>a@</html>", "ends in \\xa0": "<p>\u0160à@\n",
    "two ends": "<body>a</body>quoted<body>b@</body></html>",
    "in a comment": "a@</body><!-- </body> -->", "open comment": "a@<!-- </body>",
    "only in comments": "a@<!-- </body> -->", "tags after": "a@</body><p>",
    "odd comments": "<!-->a@</body><!-- </body> -->", "--!": "<!-- a --!>b@</body>",
    "in a condition": "<!--[if mso]><body></body><![endif]-->a@</body>",
    "long": "<html><!-- <body> --><BODY\nid='>'>@" + LONG * 1200 + "</body>",
    "long, no body": "@" + LONG * 1200, "nearly long": LONG * 1100 + "@</body>",
    "long, broken body": "@<body id='" + LONG * 1200,
}


@pytest.mark.parametrize("coding", ["8bit", "base64", "quoted-printable"])
@pytest.mark.parametrize("marked", PLACES.values(), ids=PLACES)
def test_the_tag_stands_where_the_text_ends_or_a_long_one_begins(marked, coding):
    assert_tagged(HEAD + html(marked, coding=coding), marked)


QUOTED = {
    "own": f'<img src="{OLD}">', "other case": f"<IMG SRC='{OLD}'/>",
    "Gmail": f'<img width=1 src="https://ci3.googleusercontent.com/x#{OLD}" class="x">',
    "two lines": f'<img moz-do-not-send="true"\n src="{OLD}" width="1"\n alt="">',
    "bare": f"<img\nsrc={OLD}>", "escaped": f'<img src="{OLD.replace("/", "&#47;")}">',
}


@pytest.mark.parametrize("coding", ["8bit", "base64", "quoted-printable"])
@pytest.mark.parametrize("quoted", QUOTED.values(), ids=QUOTED)
def test_quoted_pixels_of_ours_are_taken_out(quoted, coding):
    kept = '<img data-src="/old.gif" src="cid:1"><img>é'
    raw = html(f"{quoted}{kept}{quoted}</body>", coding=coding)
    assert_tagged(HEAD + multi("mixed", raw, MAIL), f"{kept}@</body>")


@pytest.mark.parametrize("raw, marked", [
    (b"</bo=\r\ndy>", "@</body>"), (b"a=3C/body=3E=\r\n", "a@</body>"),
    (b"a=\r\n=\r\n</body>", "a@</body>"), (b"a=\r\n<=2Fbody>", "a@</body>"),
    (b"caf=C3=A9=", "café@"), (b"=3Cimg src=3D=22/old=\r\n.gif=22=3Eb=\r\n", "b@"),
    (b"x" * 76, "x" * 76 + "@"), (b"", "@"), (b"=", "@"),
    (b"x" * 900 + b"=3Cimg\r\nsrc=/old.gif>" + b"y" * 900, "x" * 900 + "y" * 900 + "@"),
])
def test_quoted_printable_is_cut_where_its_text_says(raw, marked):
    raw = leaf("text/html", raw, coding="quoted-printable")
    assert_tagged(HEAD + raw, marked)
    assert_tagged(HEAD + multi("mixed", raw), marked)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_part_that_ends_with_its_head_gets_a_body(coding):
    raw = HEAD + multi("mixed", html("@", coding=coding)[:-2])
    new = assert_tagged(raw, "@")
    assert coding.encode() + b"\r\n\r\n" in new


@pytest.mark.parametrize("charset, coding", [
    ("utf-16", "base64"), ("utf-32-le", "base64"), ("utf-7", "7bit"),
    ("iso-2022-jp", "7bit"), ("iso-2022-jp", "base64"), ("hz", "7bit"),
    ("shift_jis", "8bit"), ("gb18030", "quoted-printable"), ("koi8-r", "base64")])
def test_charsets_with_another_ascii_are_decoded_first(charset, coding):
    page = "я@</body>" if charset == "koi8-r" else "<body>\u3042 </bodx>@</body>\n"
    assert_tagged(HEAD + html(page, coding=coding, charset=charset), page, charset)


def signed(kind):
    return multi(kind, html(), leaf("application/pgp-signature", "x"), mark="s")


UNTOUCHED = {
    "plain": (TEXT, "plain text"), "no type": (b"\r\n</body>\r\n", "plain text"),
    "nothing": (b"", "plain text"), "no blank line": (b"\r\n", "plain text"),
    "flowed": (leaf("text/plain; format=flowed", "a </body>"), "plain text"),
    "attached only": (ATTACHED, "no HTML"),
    "attached beside": (multi("mixed", TEXT, ATTACHED), "plain text"),
    "file shown": (html(PAGE, "Content-Disposition: inline; filename=a"), "no HTML"),
    "amp only": (leaf("text/x-amp-html", PAGE), "no HTML"),
    "companion": (multi("related", FILE, html()), "no HTML"),
    "empty companion": (multi("related", FILE, html("")[:-2]), "no HTML"),
    "mail": (MAIL, "no HTML"), "mails": (multi("digest", MAIL[32:]), "no HTML"),
    "global": (MAIL.replace(b"rfc822", b"global"), "no HTML"),
    "partial": (MAIL.replace(b"rfc822", b"partial"), "no HTML"),
    "no boundary": (multi("mixed", html()).replace(b"boundary", b"b"), "no HTML"),
    "signed": (signed("signed"), "signed"),
    "signed within": (multi("mixed", html(), signed("SIGNED")), "signed"),
    "encrypted": (multi("mixed", html(), signed("encrypted")), "encrypted"),
    "S/MIME": (multi("mixed", html(), leaf("application/pkcs7-mime", "x")),
               "signed or encrypted"),
    "PGP": (multi("alternative", leaf("text/plain", "-----BEGIN PGP MESSAGE-----",
                  coding="base64"), html()), "signed or encrypted"),
    "PGP in HTML": (html("<pre>-----BEGIN PGP SIG"), "signed or encrypted"),
    "report": (multi("report; x=y", html(), FILE), "a report"),
    "automatic": (b"Auto-Submitted: not-by-hand\r\n" + html(), "sent by a program"),
    **{name: (name.encode() + b" : a;\r\n b\r\n" + html(), "signed") for name in
       ("dkim-signature", "ARC-Seal", "DomainKey-Signature")},
    "invitation": (multi("mixed", html(), leaf("text/calendar; METHOD=REQUEST", "x")),
                   "an invitation"),
    "checksum": (html(PAGE, "Content-MD5: x"), "signed"),
    **{coding: (html(PAGE).replace(b": 8bit", b": " + coding.encode()),
                "unknown transfer encoding")
       for coding in ("8bits", "quoted-printable;", "x-uuencode")},
    "footer in base64": (html(coding="base64") + b"__\r\nlist\r\n", "damaged base64"),
    "cut base64": (html(coding="base64")[:-5], "damaged base64"),
    **{name: (leaf("text/html", data, coding=coding, charset=name),
              "charset that cannot be edited") for name, data, coding in [
        ("iso-2022-jp", b"\x1b$B$\"\x1b(B", "quoted-printable"),
        ("iso-2022-kr", b"\x1b$B$\"\x1b(B\xff", "7bit"), ("iso-2022-cn", b"x", "7bit"),
        ("utf-16", b"/v8APA==", "base64"), ("utf-7", b"+AGE-", "7bit")]},
    "delimiter cut out": (multi("mixed", html("a\n--b</body>--"), mark="b"),
                          "damaged multipart"),
    "too many parts": (multi("mixed", html(), *[b"\r\n"] * 2000), "too many parts"),
}


@pytest.mark.parametrize("raw, why", UNTOUCHED.values(), ids=UNTOUCHED)
def test_what_must_not_change_stays_byte_for_byte(raw, why):
    raw = HEAD * bool(raw) + raw
    assert with_pixel(raw, TAG, is_ours) == (raw, why)


@pytest.mark.parametrize("seed", range(5))
def test_any_nesting_changes_one_leaf_as_the_email_package_sees_it(seed):
    chance = random.Random(seed)

    def some(depth):
        if depth and chance.random() < 0.6:
            return multi(chance.choice(["mixed", "alternative", "x"]), *[
                some(depth - 1) for _ in range(chance.randint(1, 3))], mark="b" * depth)
        return chance.choice([TEXT, FILE, ATTACHED, MAIL, html(
            coding=chance.choice([*CODINGS]))])
    for _ in range(60):
        raw = HEAD + some(4)
        new, why = with_pixel(raw, TAG, is_ours)
        if not why:
            assert_tagged(raw)
        assert [part.type for part in split(raw) if "/html" in part.type] == [
            kind for _, kind, _ in leaves(raw) if "/html" in kind]


HOSTILE = [  # and how what goes before it ends
    ("text/html\n\n", "<img "), ("text/html\n\n", "<!--"), ("text/html\n\n", "</body"),
    ("text/html\n\n" + " " * 90_000, "<body '"), ("text/html\n\n<img ", "src=\""),
    ("text/html\n\n", "<img src=/old.gif>"), ("multipart/x; b=", "\";a="),
    *[("multipart/x; boundary=b\n\n", line) for line in ("--b\n", "--b--\n", "--c\n")],
    ("multipart/x", "\t\n"), ("multipart/x; a=\"", "\\\"; "),
    ("multipart/x\n", "X: =?a?q?\n"),
    ("text/html\nContent-Transfer-Encoding: quoted-printable\n\n<!--", "=\n"),
    ("text/html\nContent-Transfer-Encoding: quoted-printable\n\n", "=3D"),
    ("text/html\nContent-Transfer-Encoding: base64\n\n", "="), ("text/plain\n\n", "> ")]


@pytest.mark.parametrize("start, piece", HOSTILE)
def test_a_megabyte_of_anything_takes_well_under_a_second(start, piece):
    raw = f"Content-Type: {start}{piece * (1_000_000 // len(piece))}".encode()
    begun = time.process_time()
    with_pixel(raw, TAG, is_ours)
    assert time.process_time() - begun < 1
    make_html(raw)
    decoded_words(raw.decode())
    assert time.process_time() - begun < 2


def test_depth_and_big_files_cost_next_to_nothing():
    part = b"\r\n\r\n<p>"
    for depth in range(900):
        part = multi("mixed", part if depth else html(), mark=f"b{depth}")
    big = leaf("application/pdf", b"x" * 20_000_000, "Content-Disposition: attachment")
    raw = HEAD + multi("mixed", part, big, mark="m")
    begun = time.process_time()
    new, why = with_pixel(raw, TAG, is_ours)
    assert time.process_time() - begun < 2
    assert why == "" and len(new) == len(raw) + len(TAG) + 4


# -- what is read, and what else is written ------------------------------------------


@pytest.mark.parametrize("body, kinds", [
    (b"--b\n\nx\n--b--\n", "mb p"), (b"--b\n--b\n\n", "mb p p"), (b"", "mb"),
    (b"--b2\n\n--bb--\n--b \t\n@: a/b\n\n", "mb a/b"), (b"--b--\n--b\n\n", "mb"),
    (b"--b\n@: multipart/d; boundary=b\n\n--b\n\n--b--", "mb multipart/d p"),
    (b"--b\n@: multipart/d; boundary=b--\n\n--b--\n\n--b----\n", "mb multipart/d p"),
    (b"--b\n@: a/b; boundary=c\n\n--c\n\n--b\n\n", "mb a/b p"),
    (b'--b\n@: multipart/d; boundary="c\\:"\n\n--c:\n--c:\n@: a/b\n--b\n\n',
     "mb multipart/d p a/b p"),
    (b"--b\n@: html\n--b\n@:A/B;\n\tx\n--b\n\n", "mb p a/b p"),
    (b"--b\n@: multipart/digest; boundary=c\n\n--c\n\n--c\n@: a/b\n\n--c--\n--c\n--b--",
     "mb multipart/digest message/rfc822 a/b")])
def test_parts_are_found_as_mail_programs_find_them(body, kinds):
    for eol in b"\n", b"\r\n":
        raw = b"@: multipart/x; boundary=b; boundary=c\n\n" + body
        parts = split(raw.replace(b"@", b"Content-Type").replace(b"\n", eol))
        assert [part.type for part in parts] == [
            {"mb": "multipart/x", "p": "text/plain"}.get(kind, kind)
            for kind in kinds.split()]
        assert all(part.parents[:1] == ("multipart/x",) and part.start <= part.end
                   for part in parts[1:])


def test_fields_are_unfolded_and_their_words_decoded():
    head = b"A: 1\r\nb : x\r\n  y\r\nB: \xff\r\nAB: 2\r\n"
    assert fields(head, "B") == ["x  y", "\udcff"] and field(head, "C") == ""
    words = "a =?UTF-8?B?w6k?= =?iso-8859-1*fr?q?=E9_=3C?= b =?x?b?w6k=?= =?u?x?y?"
    assert decoded_words(words) == "a éé < b é=?u?x?y?"
    for charset in "idna", "punycode", "undefined", "rot13", "a" * 10_000, "..":
        assert decoded_words(f"=?{charset}?q?x?=") == "x"


@pytest.mark.parametrize("data, coding, charset, text", [
    (b"w6k", "base64", "utf-8", "é"), (b"w6k=\n--\nfoot", "BASE64", "utf-8", "é"),
    (b"w", "base64", "x", ""), (b"a=E9=", "quoted-printable", "latin-1", "aé"),
    (b"\xe9\xc3\xa9", "8bit", "us-ascii", "\ufffdé"), (b"x", "x-uuencode", "hex", "x"),
    (b"\\d", "7bit", "unicode_escape", "\\d"), (b"x", "7bit", "\0", "x")])
def test_any_text_can_be_read(data, coding, charset, text):
    raw = leaf("text/plain", data, coding=coding, charset=charset)
    assert part_text(raw, split(raw)[0]).replace("\r", "") == text


@pytest.mark.parametrize("coding", CODINGS)
def test_text_is_edited_whatever_it_takes(coding):
    raw = HEAD + multi("alternative", leaf(
        "text/plain; format=flowed", "Hi {x}", "Content-MD5: x", coding=coding),
        html(), FILE)
    part = split(raw)[1]
    assert edited(raw, part, str) is raw
    new = edited(raw, part, lambda text: text.replace("{x}", "é\u3042" * 999))
    before, after = leaves(raw), leaves(new)
    assert after[1:] == before[1:] and new.startswith(raw[:part.at])
    assert after[0][2].decode() == "Hi " + "é\u3042" * 999
    assert max(map(len, new.split(b"\n"))) < 999
    assert [*dict(after[0][0])] == ["Content-Type", "Content-Transfer-Encoding"]
    assert 'format="flowed"' in after[0][0][0][1]


@pytest.mark.parametrize("coding", CODINGS)
def test_plain_text_can_be_shown_as_html(coding):
    raw = HEAD + leaf("text/plain", "a < b\n\n é & c\n", "X-A: b", coding=coding)
    new = make_html(raw)
    assert new.startswith(HEAD + b"X-A: b\r\nMIME-Version: 1.0\r\nContent-Type: multi")
    (_, _, plain), (_, kind, shown) = leaves(new)
    assert plain == leaves(raw)[0][2] and kind == "text/html"
    assert shown.decode().replace("\r", "") == (
        '<div style="white-space:pre-wrap">a &lt; b\n\n é &amp; c\n</div>')
    assert_tagged(new, shown.decode() + "@")


@pytest.mark.parametrize("raw", [
    html(), multi("mixed", TEXT), b"", b"a: b",
    b"X-Mailer: git-send-email 2.39\r\n" + TEXT,
    leaf("text/plain", "x\n> diff --git a/x b/x"), leaf("text/plain", "@@ -1 +1 @@"),
    leaf("text/plain", "-----BEGIN PGP MESSAGE-----"), leaf("text/plain", b"\xff"),
    b"DKIM-Signature: x\r\n" + TEXT, b"Auto-Submitted: auto-replied\r\n" + TEXT,
    leaf("text/plain", "x", "Content-Disposition: attachment")])
def test_what_must_stay_plain_does(raw):
    assert make_html(raw) == raw


def test_a_field_can_say_no_and_is_taken_out():
    raw = HEAD + b"x-mailtracker : No\r\n \r\nTo: b\r\n\r\nX-Mailtracker: no\r\n"
    bare = without_field(raw, "X-Mailtracker")
    assert wants_no_pixel(raw) and not wants_no_pixel(bare)
    assert bare == HEAD + b"To: b\r\n\r\nX-Mailtracker: no\r\n"


def test_header_lines_go_to_the_top():
    assert with_header_lines(b"A: b\r\n\r\nc", ["D: x"]) == b"D: x\r\nA: b\r\n\r\nc"
    assert with_header_lines(b"\nc", ["D: x", "E: y"]) == b"D: x\nE: y\n\nc"
    assert with_header_lines(b"no head\r\n", ["D: x"]) == b"D: x\r\n\r\nno head\r\n"
