"""Dashboard: who may see what; the page, its actions and the API; a browser at it."""
from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import time
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

import mailtracker
from cdp import Browser, chromium
from conftest import eventually, launch, linux, read_all, read_table, save
from mailtracker import Dashboard, Event, Keys, Lines, Making, utc_text

HOST = "127.0.0.1:56790"
NOW = time.time()
ADA, BOB, CY = "bcdfghjkmnpqrstvwxz22", "cdfghjkmnpqrstvwxz233", "dfghjkmnpqrstvwxz2344"
EVIL = "<img src=x onerror=alert(1)>'\"&{0}</textarea><script>alert(2)</script>\x1b[31m"
HEADERS = {
    "cache-control": "private, no-cache", "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin", "connection": "close"}


def ago(seconds):
    return utc_text(NOW - seconds)


def hit(tag, hits, opens, seconds, verdict="human", reason="browser"):
    return Event(ago(seconds), "hit", tag, hits, opens, verdict, reason, "192.0.2.0",
                 "Mozilla/5.0")


@pytest.fixture
def filled(files):
    """Return files: Ada opened hers, Bob's Apple fetched ahead, Cy's nobody."""
    mailtracker.add_tags(files, [(ADA, "Ada"), (BOB, "Bob"), (CY, "Cy")],
                         Making(ago(7200)))
    mailtracker.append_events(files, [
        hit(BOB, 1, 0, 7000, "machine", "apple-mpp"), hit(ADA, 1, 1, 3600),
        hit(ADA, 2, 1, 3590, "human", "repeat")])
    return files


class Client:
    """The dashboard in this process, and whoever asks it."""

    def __init__(self, files, url=f"http://{HOST}/"):
        self.said = []
        self.keys = Keys(files.key)
        self.lines = Lines()
        self.lines.line = self.said.append
        self.dashboard = Dashboard(files, url, 56790, "https://t.example.org",
                                   self.lines)
        self.session = self.keys.token("session", time.time() + 99)

    def ask(self, path="/", method="GET", body=b"", **headers):
        """Return status, headers in small letters and body of an answer."""
        told = {"Host": HOST, "Cookie": f"mailtracker-56790={self.session}"}
        told.update((name.replace("_", "-"), value) for name, value in headers.items())
        if body:
            told["Content-Length"] = len(body)
        lines = "".join(f"{name}: {value}\r\n" for name, value in told.items()
                        if value is not None)
        return self.raw(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")
                        + body)

    def raw(self, data):
        """Return the parts of the answer to some bytes."""
        head, _, body = self.dashboard.respond(data, "127.0.0.1").partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        return int(first.split()[1]), {
            name.lower(): value for name, value in (x.split(": ", 1) for x in lines)
        }, body.decode()

    def page(self, path="/"):
        status, headers, body = self.ask(path)
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        return body

    def api(self, path, method="GET", told=None, **headers):
        """Return status and value of an answer of the API, asked with the write key."""
        body = b"" if told is None else json.dumps(told).encode()
        headers = {"Authorization": "Bearer " + self.keys.token(
            "write", mailtracker.NEVER), "Cookie": None,
            "Content_Type": "application/json", **headers}
        status, told, body = self.ask(path, method, body, **headers)
        kind = "application/json" if status < 400 else "application/problem+json"
        if status == 204:
            return status, body
        assert told["content-type"] == kind, (told, body)
        return status, json.loads(body)

    def post(self, path, **fields):
        """Send a form; return the status and where to go on."""
        status, headers, _ = self.ask(
            path, "POST", urlencode(fields).encode(), Sec_Fetch_Site="same-origin",
            Content_Type="application/x-www-form-urlencoded")
        return status, headers.get("location")


@pytest.fixture
def client(filled):
    """Return a client of a dashboard with three tags."""
    client = Client(filled)
    with client.dashboard.watch.reader:
        yield client


@pytest.fixture
def impatient(monkeypatch):
    """Have the register read again as soon as it has changed."""
    monkeypatch.setattr(mailtracker, "REREAD_SECONDS", 0.0)
    monkeypatch.setattr(mailtracker, "REREAD_SHARE", 0)


@pytest.fixture
def client_of():
    """Make clients of dashboards of other files."""
    with contextlib.ExitStack() as stack:
        def make(files, *args):
            client = Client(files, *args)
            stack.enter_context(client.dashboard.watch.reader)
            return client
        yield make


# -- who may see what ---------------------------------------------------------


def test_a_link_logs_in_for_ten_minutes_and_the_session_is_a_cookie(client):
    token = client.keys.token("login", time.time() + 600)
    status, headers, body = client.ask(f"/login?token={token}", Cookie=None)
    assert (status, headers["location"], body) == (303, "./", "")
    session, *rest = headers["set-cookie"].split("; ")
    assert rest == ["HttpOnly", "SameSite=Lax", "Max-Age=2592000", "Path=/"]
    assert client.ask("/", Cookie=session)[0] == 200
    assert client.ask("/", Cookie=f"a=b; {session}; c=d")[0] == 200


@pytest.mark.parametrize("bad", [
    "", "x", "9999999999.", "9999999999." + "0" * 64, "ü", "\xff" * 64, "0" * 10_000,
    "٩٩٩٩٩٩٩٩٩٩." + "0" * 64, "9999999999.x" + "0" * 63, "expired", "login", "read",
    "other file", "longer", "later"], ids=repr)
@pytest.mark.parametrize("how", ["cookie", "bearer", "login"])
def test_nothing_but_a_token_for_the_purpose_lets_anybody_in(
        client, tmp_path, bad, how):
    until, purpose = time.time() + 99, {"cookie": "session", "bearer": "write",
                                        "login": "login"}[how]
    token = {
        "expired": client.keys.token(purpose, time.time() - 1),
        "login": client.keys.token("read" if how == "login" else "login", until),
        "read": client.keys.token("session" if how == "bearer" else "write", until),
        "other file": Keys(str(tmp_path / "other.key")).token(purpose, until),
        "longer": client.keys.token(purpose, until) + "0",
        "later": re.sub("^.", "2", client.keys.token(purpose, until))}.get(bad, bad)
    token = quote(token) if how == "login" else token.encode().decode("latin-1")
    status, headers, body = client.ask("/api/tags", **{
        "cookie": {"Cookie": f"mailtracker-56790={token}"},
        "bearer": {"Cookie": None, "Authorization": f"Bearer {token}"},
        "login": {"Cookie": None}}[how]) if how != "login" else client.ask(
            f"/login?token={token}", Cookie=None)
    assert status == (401 if len(token) < 9000 else status)
    assert status in (401, 431) and "Ada" not in body and "set-cookie" not in headers
    assert headers.get("www-authenticate", "Bearer") == "Bearer"
    assert not [line for line in client.said if token and token in line]


def test_the_read_key_reads_and_the_write_key_writes_from_anywhere(client):
    read = {"Authorization": "Bearer " + client.keys.token("read", mailtracker.NEVER)}
    assert client.api("/api/tags", **read)[0] == 200
    for method, path in (("DELETE", f"/api/tags/{ADA}"), ("POST", "/api/tags")):
        assert client.api(path, method, {"name": "x"}, **read)[0] == 403
    assert client.api("/api/tags", "POST", {"name": "x"}, Sec_Fetch_Site="cross-site",
                      Origin="https://evil.example")[0] == 201


@pytest.mark.parametrize("headers, status", [
    ({"Sec_Fetch_Site": "same-origin"}, 303), ({"Sec_Fetch_Site": "none"}, 303),
    ({}, 303), ({"Origin": f"http://{HOST}"}, 303),
    ({"Origin": "http://localhost:56790"}, 303),
    ({"Sec_Fetch_Site": "cross-site"}, 403), ({"Sec_Fetch_Site": "same-site"}, 403),
    ({"Sec_Fetch_Site": ""}, 403), ({"Sec_Fetch_Site": "none, cross-site"}, 403),
    ({"Sec_Fetch_Site": "cross-site", "Origin": f"http://{HOST}"}, 403),
    ({"Origin": "null"}, 403), ({"Origin": "http://127.0.0.1:8000"}, 403),
    ({"Origin": f"https://{HOST}"}, 403), ({"Origin": f"http://{HOST}.evil"}, 403),
    ({"Origin": ""}, 403)], ids=str)
@pytest.mark.parametrize("path", ["/new", f"/tag?id={ADA}", f"/forget?id={ADA}"])
def test_another_site_changes_nothing_with_a_good_cookie(client, path, headers, status):
    before = read_table(client.dashboard._files.register)
    got, _, body = client.ask(path, "POST", b"name=x&new name=y", **headers)
    assert got == status, body
    if status == 403:
        assert read_table(client.dashboard._files.register) == before


@pytest.mark.parametrize("host, is_ours", [
    (HOST, True), ("localhost:56790", True), ("[::1]:56790", True),
    ("LOCALHOST:56790", True), ("t.example.org", True), (None, False), ("", False),
    ("127.0.0.1", False), ("localhost", False), ("127.0.0.1:56789", False),
    ("evil.example:56790", False), (f"{HOST}.evil.example", False),
    ("127.0.0.2:56790", False), (f"{HOST}, evil.example", False),
    ("t.example.org:443", False), (f"evil@{HOST}", False), (HOST + ".", False)])
def test_only_its_own_names_reach_it(filled, client_of, host, is_ours):
    client = client_of(filled, "https://t.example.org/mail/")
    for path in ("/", "/login", "/health", "/api/tags", "/nothing"):
        assert (client.ask(path, Host=host)[0] == 421) is not is_ours


@pytest.mark.parametrize("url", [
    "http://t.example.org:80/", "https://t.example.org:443/"])
def test_a_browser_leaves_the_default_port_out(filled, client_of, url):
    client = client_of(filled, url)
    assert client.ask(Host="t.example.org")[0] == 200
    assert client.ask("/new", "POST", Host="t.example.org",
                      Origin=url.rpartition(":")[0])[0] == 303
    assert client.ask(Host="t.example.org:" + "80443"[2 * ("80/" in url):])[0] == 421


def test_behind_a_proxy_its_path_may_be_left_in_or_not(filled, client_of):
    client = client_of(filled, "https://t.example.org/mail/")
    for path in ("/", "/mail/"):
        token = client.keys.token("login", time.time() + 600)
        _, headers, _ = client.ask(f"{path}login?token={token}", Cookie=None)
        assert headers["set-cookie"].endswith("; Path=/mail/; Secure")
        assert "Ada" in client.ask(path, Host="t.example.org")[2]
    assert client.api("/mail/api/tags", "POST", {"name": "x"})[0] == 201
    assert client.ask("/new", "POST", b"name=x", Host="t.example.org",
                      Origin="https://t.example.org")[0] == 303


def test_whose_guesses_come_fast_is_put_off_and_good_tokens_never(client):
    bad = {"Authorization": "Bearer x"}
    found = [client.ask("/", Cookie=None, **bad)[:2] for _ in range(30)]
    assert [status for status, _ in found[:9]] == [401] * 9
    assert found[-1][0] == 429 and found[-1][1]["retry-after"] == "1"
    assert client.ask("/")[0] == 200 and client.ask("/", Cookie=None)[0] == 401
    assert len(client.said) == 1


def test_the_key_is_its_owners_alone_and_without_it_nobody_is_in(client):
    path = client.dashboard._files.key
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert path.endswith("register.key") and client.ask("/")[0] == 200
    os.unlink(path)
    assert client.ask("/")[0] == 401
    assert client.ask("/", Cookie="mailtracker-56790=" + client.keys.token(
        "session", time.time() + 9))[0] == 200
    save(path, "short")
    status, _, body = client.ask("/")
    assert status == 503 and "register.key is no key; delete it" in body
    assert os.path.dirname(path) not in body


def each(status, method, *paths):
    return [(path, method, status) for path in paths]


@pytest.mark.parametrize("path, method, status", [
    *each(200, "GET", "/", f"/tag?id={ADA}", "/health", "/api/tags"),
    *each(200, "HEAD", "/api/stats", "/"),
    *each(404, "GET", "/nothing", "/tag?id=x", "/api/tags/x", "/api/tracksx"),
    *each(405, "PUT", "/"), *each(405, "DELETE", "/api/tags"),
    *each(405, "BREW", "/api/tags"), *each(405, "GET", f"/forget?id={ADA}"),
    *each(415, "POST", "/api/tags"),
    *each(422, "GET", *("/api/tags?" + query for query in (
        "days=", "days=0", "days=x", "days=1.5", "days=%D9%A1", "days=99999",
        "limit=0", "limit=201", "cursor=-1", "cursor=1e9", "cursor=9999999999",
        "state=", "state=open", "x=1", "q=a&q=b", "q=" + "x" * 201, "cursor=1%0A")),
        *("/api/events?cursor=" + cursor for cursor in (
            "-", "1", "x-1", "1-1-1", "", "1-" + "9" * 19, "-1-1")),
        f"/api/tags/{ADA}?x=1", f"/api/tags/{ADA}?id={BOB}", "/api/tags/" + "x" * 41)])
def test_every_answer_has_the_headers_that_keep_a_browser_safe(
        client, path, method, status):
    got, headers, body = client.ask(path, method)
    assert got == status and HEADERS.items() <= headers.items()
    assert int(headers["content-length"]) == len(body.encode()) or method == "HEAD"
    policy = dict(part.split(" ", 1) for part in
                  headers["content-security-policy"].split("; "))
    assert {name: policy[name] for name in policy if "sha256" not in policy[name]} == {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:",
        "form-action": "'self'", "base-uri": "'none'", "frame-ancestors": "'none'"}
    if status == 405:
        assert headers["allow"] in ("GET, HEAD", "GET, POST, HEAD", "POST")
    if status >= 400 and path.startswith("/api/"):
        problem = json.loads(body)
        assert problem["status"] == status and problem["title"]
        assert problem["detail"] or status == 405
    assert "set-cookie" not in headers


@pytest.mark.parametrize("data, status", [
    (b"GET  / HTTP/1.1\r\n\r\n", 400), (b"get / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\n\r\n", 400), (b"GET http://x/ HTTP/1.1\r\n\r\n", 400),
    (b"GET /\xff HTTP/1.1\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\n y\r\n\r\n", 400),
    (b"GET / HTTP/1.1\nHost: x\r\n\r\n", 400),
    (b"POST /new HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"POST /new HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST /new HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    (b"POST /new HTTP/1.1\r\nContent-Length: 99999\r\n\r\n", 413),
    (b"GET / HTTP/1.1\r\nX: " + b"x" * 20000, 431)], ids=lambda x: str(x)[:40])
def test_what_is_no_clean_request_is_refused(client, data, status):
    assert client.raw(data)[0] == status


def test_a_request_is_waited_for_until_its_body_is_there(client):
    whole = (f"POST /new HTTP/1.1\r\nHost: {HOST}\r\nCookie: mailtracker-56790="
             f"{client.session}\r\nContent-Length: 9\r\n\r\nname=John").encode()
    for size in range(0, len(whole), 7):
        assert client.dashboard.respond(whole[:size], "") == b""
    assert client.raw(whole)[0] == 303


# -- the API ------------------------------------------------------------------


def test_tags_are_listed_newest_activity_first_with_null_for_what_is_unknown(client):
    status, told = client.api("/api/tags")
    assert (status, told["total"], told["next_cursor"]) == (200, 3, None)
    ada, bob, cy = told["data"]
    assert [tag["name"] for tag in told["data"]] == ["Ada", "Bob", "Cy"]
    assert [tag["state"] for tag in (ada, bob, cy)] == [
        "opened", "cannot_be_known", "no_hit"]
    assert ada == {
        "id": ADA, "name": "Ada", "state": "opened", "status": None, "hits": 2,
        "opens": 1, "last_hit": ago(3590), "last_open": ago(3600), "sent": None,
        "created": ago(7200), "first_open": ago(3600), "clicked": None, "email": None,
        "campaign": None, "variant": None, "columns": {},
        "url": f"https://t.example.org/{ADA}.gif",
        "tag": f'<img src="https://t.example.org/{ADA}.gif" width="1" height="1" '
               'alt="" style="border:0">'}
    assert (cy["hits"], cy["last_hit"], cy["first_open"]) == (0, None, None)


@pytest.mark.parametrize("query, names", [
    ("q=AD", ["Ada"]), (f"q={BOB[-5:]}", ["Bob"]), ("q=%C3%BC", []), ("q=%1f", []),
    ("state=no_hit", ["Cy"]), ("state=opened&q=bob", []),
    ("days=1", ["Ada", "Bob", "Cy"]),
    ("limit=2", ["Ada", "Bob"]), ("limit=2&cursor=2", ["Cy"]), ("cursor=99", [])])
def test_tags_are_filtered_and_come_in_pages(client, query, names):
    status, told = client.api(f"/api/tags?{query}")
    assert status == 200 and [tag["name"] for tag in told["data"]] == names
    assert (told["next_cursor"] == "2") is (query == "limit=2")


def test_a_tag_is_told_with_its_events_the_newest_first(client):
    status, told = client.api(f"/api/tags/{ADA}")
    assert status == 200 and told["state"] == "opened"
    assert [event["event"] for event in told["events"]] == ["hit", "hit", "made"]
    assert told["events"][0] == {
        "time": ago(3590), "event": "hit", "id": ADA, "hits": 2, "opens": 1,
        "verdict": "human", "reason": "repeat", "address": "192.0.2.0",
        "detail": "Mozilla/5.0"}
    assert told["events"][2]["verdict"] is None


def test_a_hit_is_told_as_it_is_judged_by_now(client):
    mailtracker.append_events(client.dashboard._files, [hit(
        ADA, 2, 0, 3600, "machine", "many-networks")._replace(event="verdict")])
    told = client.api(f"/api/tags/{ADA}")[1]["events"]
    assert [(event["event"], event["reason"]) for event in told] == [
        ("hit", "repeat"), ("hit", "many-networks"), ("made", None)]
    assert "hit machine" in client.page(f"/tag?id={ADA}")


def test_figures_add_up_and_rates_are_fractions(client):
    status, told = client.api("/api/stats")
    assert status == 200 and told["sent"] == 3
    assert told["opened"] + told["cannot_be_known"] + told["no_hit"] == told["sent"]
    assert told["rate"]["at_least"] == pytest.approx(1 / 3)
    assert told["hits"] == told["opens"] + told["set_aside"] == 3
    assert client.api("/api/stats?state=no_hit")[1]["sent"] == 1


def test_tags_are_made_and_forgotten(client):
    status, told = client.api("/api/tags", "POST", {"name": "Dora\r\n=1+1"})
    assert status == 201 and told["name"] == "Dora =1+1"
    assert client.api(f"/api/tags/{told['id']}")[1]["created"] == told["created"]
    assert client.api(f"/api/tags/{told['id']}", "DELETE") == (204, "")
    assert client.api(f"/api/tags/{told['id']}", "DELETE")[0] == 404
    assert told["id"] not in Path(client.dashboard._files.log).read_text()


def test_a_tag_is_told_as_made_also_while_the_register_is_still_read(
        client, monkeypatch):
    old = client.dashboard.watch.view()
    monkeypatch.setattr(client.dashboard.watch, "view", lambda since=0.0: old)
    status, told = client.api("/api/tags", "POST", {"name": "Eve"})
    assert (status, told["name"], told["state"], told["hits"]) == (
        201, "Eve", "no_hit", 0)
    assert told["created"] and told["id"] in told["tag"]


@pytest.mark.parametrize("told", [
    {}, [], None, 1, "x", {"name": 1}, {"name": None}, {"name": "x" * 1001},
    {"name": "x", "id": "y"}], ids=repr)
def test_what_is_not_the_making_of_a_tag_is_refused(client, told):
    status, problem = client.api("/api/tags", "POST", told)
    assert status == 422 and problem["detail"]
    assert client.api("/api/tags", "POST", {"name": "x"}, Content_Type="text/plain"
                      )[0] == 415


def test_the_old_names_of_the_api_lead_to_the_same(client):
    for old, new in (("/api/tracks", "/api/tags"), ("/api/opens/recent", "/api/events"),
                     (f"/api/tracks/{ADA}", f"/api/tags/{ADA}")):
        assert client.api(old) == client.api(new)


def test_the_description_tells_of_every_route_and_the_answers_keep_to_it(client):
    told = client.api("/api/openapi.json")[1]
    assert set(told["paths"]) == {
        "/api/tags", "/api/tags/{id}", "/api/events", "/api/stats", "/health",
        "/api/openapi.json"}
    tags = told["paths"]["/api/tags"]
    schema = tags["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    tag = schema["properties"]["data"]["items"]
    for found in client.api("/api/tags")[1]["data"]:
        assert sorted(found) == sorted(tag["required"]) == sorted(tag["properties"])
    assert all("summary" in each for path in told["paths"].values()
               for each in path.values())
    json.dumps(told)


def everything(client, query="", cursor="0"):
    """Return the details of all events of the API behind a cursor, and the last one."""
    details = []
    while True:
        status, told = client.api(f"/api/events?limit=7&cursor={cursor}{query}")
        assert status == 200
        if not told["data"]:
            return details, told["next_cursor"]
        details += [event["detail"] for event in told["data"]]
        cursor = told["next_cursor"]


def test_a_cursor_of_events_outlives_rotation_torn_lines_and_truncation(client):
    files = client.dashboard._files
    before, cursor = everything(client)
    assert len(before) == 6
    assert everything(client, cursor=cursor) == ([], cursor)
    assert everything(client, "&verdict=machine")[0] == ["Mozilla/5.0"]

    def log(*details):
        mailtracker.append_events(files, [hit(ADA, 9, 9, 9)._replace(detail=detail)
                                          for detail in details])
    log("a", "b")
    with open(files.log, "ab") as file:
        file.write(b"2026-11-20T20:14:03Z,hit," + ADA.encode())
    assert everything(client, cursor=cursor)[0] == ["a", "b"]
    os.rename(files.log, files.log + ".1")
    os.utime(files.log + ".1", (NOW - 60, NOW - 60))
    log(*map(str, range(20)))
    found, last = everything(client, cursor=cursor)
    assert found == ["a", "b", *map(str, range(20))]
    os.truncate(files.log, 0)
    log("new")
    assert everything(client, cursor=last)[0] == ["new"]
    inode, offset = cursor.split("-")
    os.unlink(files.log + ".1")
    for odd in ("1-1", f"{inode}-{offset}", f"{os.stat(files.log).st_ino}-" + "9" * 17):
        assert everything(client, cursor=odd)[0] == ["new"]
    for number in range(os.stat(files.log).st_size):
        assert everything(client, cursor=f"{os.stat(files.log).st_ino}-{number}"
                          )[0] in (["new"], [])
    for path in mailtracker.log_files(files.log):
        os.unlink(path)
    assert everything(client) == ([], "0")


def test_events_behind_a_rotation_are_not_hidden_by_an_etag(impatient, client):
    path, cursor = "/api/events?cursor=", everything(client)[1]
    log = client.dashboard._files.log
    os.rename(log, log + ".1")
    mailtracker.append_events(client.dashboard._files, [hit(CY, 1, 1, 1)])
    client.dashboard.watch.view(time.monotonic())
    os.utime(log + ".1")
    _, headers, body = client.ask(path + cursor)
    assert json.loads(body)["data"] == []  # the old file may still be written to
    os.utime(log + ".1", (NOW - 60,) * 2)
    status, _, body = client.ask(path + cursor, If_None_Match=headers["etag"])
    assert (status, json.loads(body)["data"][0]["id"]) == (200, CY)


def test_what_has_not_changed_is_not_sent_again_also_through_nginx(
        impatient, client):
    for path in ("/api/tags", "/", f"/tag?id={ADA}"):
        etag = client.ask(path)[1]["etag"]
        for known in (etag, f"W/{etag}", f'"x", W/{etag}', f'{etag},"y"'):
            status, headers, body = client.ask(path, If_None_Match=known)
            assert (status, headers["etag"], body) == (304, etag, "")
            assert "content-length" not in headers  # it would be that of a 200
        assert client.ask(path, If_None_Match='"x"')[0] == 200
    etag = client.ask("/api/tags")[1]["etag"]
    mailtracker.append_events(client.dashboard._files, [hit(CY, 1, 1, 1)])

    def is_new():
        status, _, body = client.ask("/api/tags", If_None_Match=etag)
        return status == 200 and json.loads(body)["data"][0]["name"] == "Cy"
    eventually(is_new, 5)


def test_health_tells_what_is_wrong_and_the_page_shows_the_last_figures(
        impatient, client):
    files = client.dashboard._files
    assert client.ask("/health", Cookie=None)[::2] == (200, '{"status": "ok"}')
    with open(files.register, "a") as file:
        file.write('x,"\n')
    os.utime(files.register, (NOW - 60, NOW - 60))
    status, _, body = eventually(lambda: (client.ask("/health")[0] == 503)
                                 and client.ask("/health"), 5)
    assert "a quote that is never closed" in body
    assert os.path.dirname(files.register) not in body
    page = client.page()
    assert "a quote that is never closed" in page and "Ada" in page


# -- the page -----------------------------------------------------------------


class Texts(HTMLParser):
    """What a page shows, and which elements and attributes it is made of."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.text += " " * (tag in ("dt", "dd", "td", "th", "span", "p"))
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_data(self, data):
        self.text += data


def test_the_list_shows_figures_filters_and_tags_without_any_script(client):
    page = Texts(client.page())
    text = " ".join(page.text.split())
    for words in ("1 open in the last 24 hours", "Opened, at least 1 33 % of sent",
                  "Cannot be known 1", "No hit by a person 1", "1 to 3 of 3 tags",
                  "● Opened", "◌ Cannot be known", "○ No hit", "register.csv, 3 tags"):
        assert words in text
    links = [value for tag, name, value in page.attributes
             if (tag, name) == ("a", "href")]
    assert [f"tag?id={tag}" for tag in (ADA, BOB, CY)] == links[1:]
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] == "style"]
    assert len(client.page("/?q=bob&state=&days=").split("<tr>")) == 3


@pytest.mark.parametrize("query, words", [
    ("?q=nobody", "No tag is like that"), ("?q=&state=&days=", "1 to 3 of 3"),
    ("?days=x&state=x&cursor=x&other=1", "1 to 3 of 3"),
    ("?cursor=99", "Show all tags"),
    ("?days=" + "9" * 9, "1 to 3"), ("?q=" + "%00%F0" * 99, "No tag is like")])
def test_the_page_takes_any_query(client, query, words):
    assert words in client.page(f"/{query}")


def test_more_tags_than_a_page_of_40_kilobytes_holds_are_linked_to(files, client_of):
    tags = mailtracker.new_ids(bytes(16), 120)
    mailtracker.add_tags(files, [(tag, "n" * 10_000) for tag in tags], Making(ago(60)))
    client = client_of(files)
    found, path = set(), "/?q=n"
    for _ in range(3):
        page = client.page(path)
        assert len(page) < 40_000
        found |= set(re.findall(r"tag\?id=(\w+)", page))
        path = "/" + "".join(re.findall(r'href="\./(\S+)">Older', page)).replace(
            "&amp;", "&")
    assert found == set(tags) and path == "/" and "101 to 120 of 120" in page


def test_empty_states_say_what_to_do(files, client_of, impatient):
    client = client_of(files)
    assert "newtag --name john" in client.page()
    assert not os.path.exists(files.register)
    mailtracker.add_tags(files, [(ADA, "Ada")], Making(ago(60)))
    assert "doctor" in eventually(lambda: "Ada" in client.page() and client.page())
    os.unlink(files.log)
    eventually(lambda: "no event log" in client.page())
    status, _, page = client.ask("/", Cookie=None)
    assert status == 401 and "dashboard --link" in page


def test_a_tag_is_shown_with_its_history_and_what_to_paste(client):
    page = Texts(client.page(f"/tag?id={ADA}"))
    text = " ".join(page.text.split())
    assert re.search(r"● Opened: 1 open, first 60 min after it was made, last \d+ min "
                     "ago, 2 hits in all", text)
    for words in ("a browser, or a mail app that looks like one",
                  "192.0.2.0", "Mozilla/5.0", "hit human", "the tag was made",
                  "Forget it", "What no hit means"):
        assert words in text
    tag = client.api(f"/api/tags/{ADA}")[1]["tag"]
    assert ("input", "value", tag) in page.attributes
    assert "Nothing of this tag" not in text
    assert page.text.count("human, after 60 min") == 2


def test_names_and_cells_from_anybody_are_shown_and_harmless(files, client_of):
    name = EVIL.replace('"', '""')
    save(files.register, "id,hits,last_hit,opens,last_open,created,name,<b>note\n"
         f'{ADA},0,,0,,{ago(9)},"{name}","{EVIL[:9]}\n,x"\n'
         f"{BOB},0,,0,,{ago(9)},{'x' * 10_000},{'y' * 10_000}\n")
    mailtracker.append_events(files, [hit(ADA, 1, 1, 5)._replace(
        detail=EVIL, address="<b>", reason="<i>")])
    client = client_of(files)
    plain = set(Texts(client.page("/?q=nobody")).tags)
    for path in ("/", f"/?q={quote(EVIL)}", f"/tag?id={ADA}", f"/tag?id={BOB}"):
        page = client.page(path)
        shown = Texts(page)
        assert "\x1b" not in page
        assert set(shown.tags) <= plain | {
            "table", "textarea", "code", "time", "line", "caption", "thead", "tbody",
            "tr", "th", "td"}
        assert shown.tags.count("script") == shown.tags.count("style") == 1
        assert not [a for a in shown.attributes if a[1].startswith("on")]
        assert len(client.page("/")) < 40_000
    assert "<img src=x onerror" in Texts(client.page()).text


# -- its actions --------------------------------------------------------------


def test_a_tag_is_made_by_a_form_and_shown(client):
    status, where = client.post("/new", name="Eve <x>")
    assert status == 303 and where.startswith("tag?id=")
    assert "<h1>Eve &lt;x&gt;</h1>" in client.page("/" + where)
    assert client.post("/new")[0] == 303


REGISTER = (
    'note;id;hits;last_hit;opens;last_open;created;NAME;pin\r\n'
    '"a ""b"";\r\nc";{};1;{};1;{};{};ann;\r\n'
    ' x ;{};0;;0;;{};"bob";007\r\n').format(
        ADA, ago(50), ago(50), ago(99), BOB, ago(99))


@pytest.mark.parametrize("charset", ["utf-8-sig", "cp1252", "utf-16"])
def test_an_edit_changes_that_cell_and_no_other_byte(files, client_of, charset):
    save(files.register, REGISTER.replace("007", "ü").encode(charset))
    client = client_of(files)
    client.page(f"/tag?id={ADA}")
    assert client.post(f"/tag?id={BOB}", **{
        "new name": "Robert", "was name": "bob", "new note": "x\r\ny",
        "was note": " x ", "new pin": "ü", "was pin": "ü"}) == (303, f"tag?id={BOB}")
    assert Path(files.register).read_bytes().decode(charset) == REGISTER.replace(
        '"bob"', "Robert").replace(" x ", '"x\ny"').replace("007", "ü")
    page = client.page(f"/tag?id={BOB}")
    assert "<h1>Robert</h1>" in page and "x\ny</textarea>" in page
    assert [event.detail for event in mailtracker.read_log(files.log)
            if (event.event, event.id) == ("made", BOB)] == ["bob", "Robert"]
    assert client.api(f"/api/tags/{BOB}")[1]["created"] == ago(99)
    assert mailtracker.settle(files)
    assert "Robert" in client.page(f"/tag?id={BOB}")


@pytest.fixture
def noted(files, client_of):
    """Return a client of a register with columns of a person's own."""
    save(files.register, REGISTER)
    return client_of(files)


def test_a_form_that_was_not_changed_changes_nothing(files, noted):
    page = Texts(noted.page(f"/tag?id={ADA}"))
    assert [value for tag, name, value in page.attributes if (tag, name) == (
        "input", "name") and value.startswith("was ")] == [
            "was name", "was note", "was pin"]
    texts = {"name": "ann", "note": 'a "b";\r\nc', "pin": ""}
    noted.post(f"/tag?id={ADA}", **{f"{how} {column}": text for how in ("was", "new")
                                    for column, text in texts.items()})
    assert Path(files.register).read_bytes().decode() == REGISTER


@pytest.mark.parametrize("column, text, status, cell", [
    ("pin", "=1+1", 303, "'=1+1"), ("pin", "-5", 303, "-5"),
    ("pin", "-5+1", 303, "'-5+1"), ("pin", "@x", 303, "'@x"),
    ("pin", "'=x", 303, "''=x"), ("pin", "\x00\x1b", 303, "  "), ("pin", "", 303, ""),
    *[(column, "7", 409, "007") for column in (
        "hits", "id", "created", "status", "nothing", "")]])
def test_a_text_from_the_page_is_no_formula_and_no_count(
        files, noted, column, text, status, cell):
    assert noted.post(f"/tag?id={BOB}", **{f"new {column}": text})[0] == status
    assert Path(files.register).read_bytes().decode() == REGISTER.replace("007", cell)
    shown = escape(text).replace("\x00\x1b", "  ") if status == 303 else "007"
    assert f"rows=1>\n{shown}</textarea>" in noted.page(f"/tag?id={BOB}")


def test_an_edit_keeps_what_a_person_saves_at_the_same_time(
        files, noted, monkeypatch):
    monkeypatch.setattr(mailtracker, "SAVING", 0.6)
    text = REGISTER.replace("ann", "anna")
    save(files.register, text, age=0)  # just now: the edit waits until that is over
    began = time.process_time()
    noted.post(f"/tag?id={BOB}", **{"new pin": "8", "was pin": "007"})
    assert time.process_time() - began < 0.4  # of 0.6: it does not spin
    rows = read_table(files.register)[1]
    assert [(row["NAME"], row["pin"]) for row in rows] == [("anna", ""), ("bob", "8")]


def test_an_edit_does_not_overwrite_what_was_changed_meanwhile(files, client_of):
    save(files.register, REGISTER)
    client = client_of(files)
    assert client.post(f"/tag?id={BOB}", **{"new note": "n", "was note": "x"})[0] == 409
    assert Path(files.register).read_bytes() == REGISTER.encode()
    multiline = {"new note": "n", "was note": 'a "b";\r\nc'}
    assert client.post(f"/tag?id={ADA}", **multiline)[0] == 303
    assert client.post(f"/tag?id={ADA}", **multiline)[0] == 409
    rows = read_table(files.register)[1]
    assert [row["note"] for row in rows] == ["n", " x "]


@pytest.mark.parametrize("column", [
    "two\r\nlines", "two\nlines", "a\tb", "\u202ea", "\u200b", "\x07", "<b>&\"'",
    "new name"])
def test_a_column_is_edited_whatever_its_name(files, client_of, column):
    save(files.register, 'id,name,"{}"\n{},Ada,old\n'.format(
        column.replace('"', '""'), ADA).encode())
    client = client_of(files)
    page = Texts(client.page(f"/tag?id={ADA}"))
    name = [value for tag, name, value in page.attributes
            if (tag, name) == ("textarea", "name")][1]
    assert client.post(f"/tag?id={ADA}", **{
        name.replace("\n", "\r\n"): "7", f"was {name[4:]}": "old"})[0] == 303
    assert client.api(f"/api/tags/{ADA}")[1]["columns"] == {column: "7"}


def test_a_tag_is_forgotten_while_a_person_saves_without_spinning(client):
    save(client.dashboard._files.register, Path(
        client.dashboard._files.register).read_text().replace("Bob", "Rob"), age=0)
    began = time.process_time()
    assert client.post(f"/forget?id={ADA}") == (303, "./")
    assert time.process_time() - began < 1  # of two seconds
    assert [row["name"] for row in read_table(client.dashboard._files.register)[1]
            ] == ["Rob", "Cy"]


def test_a_text_that_is_too_long_leaves_the_others_to_be_edited(files, client_of):
    texts = {"a": "é" * 10_000, "b": "x" * 9_000, "c": "y" * 9_000, "d": "z" * 9_000}
    save(files.register, "id,name,{},pin\n{},Ada,{},7\n".format(
        ",".join(texts), ADA, ",".join(texts.values())).encode())
    client = client_of(files)
    page = client.page(f"/tag?id={ADA}")
    assert re.findall("(.), too long to be changed here", page) == ["a", "d"]
    assert page.count(" disabled>") == 4  # so that a browser leaves them out
    sent = {f"{how} {column}": texts[column]
            for column in "bc" for how in ("was", "new")}
    assert client.post(f"/tag?id={ADA}", **sent, **{"new pin": "8", "was pin": "7"}
                       )[0] == 303
    row, = read_table(files.register)[1]
    assert row["pin"] == "8" and texts.items() <= row.items()


def test_a_tag_is_forgotten_after_a_question(client):
    assert "Its row, its hits (2)" in client.page(f"/tag?id={ADA}")
    assert ADA in client.page()
    assert client.post(f"/forget?id={ADA}") == (303, "./")
    assert ADA not in client.page() and client.ask(f"/tag?id={ADA}")[0] == 404
    assert client.post(f"/forget?id={ADA}")[0] == 404


# -- the process --------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """Start dashboards in the folder of the test; return their processes and ports."""
    with contextlib.ExitStack() as stack:
        def run(*args, stdout=subprocess.PIPE, **options):
            process = stack.enter_context(launch(
                subprocess.Popen, "dashboard", "--port", 0, *args, cwd=tmp_path,
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
                text=True, **options))
            stack.callback(process.kill)
            line = process.stderr.readline()
            found = re.search(r"register.csv on http://127\.0\.0\.1:(\d+);", line)
            assert found, line + process.stderr.read()
            return process, int(found[1])
        yield run


def fetch(port, path, *headers):
    """Return the bytes of the answer to a GET."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall("\r\n".join((f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}",
                                    *headers, "", "")).encode())
        return read_all(client)


def cookie_of(files, port):
    """Return the header with which a browser comes that is logged in."""
    session = Keys(files.key).token("session", time.time() + 99)
    return f"Cookie: mailtracker-{port}={session}"


def test_it_runs_on_this_machine_only_and_ends_when_asked(filled, start, tracker):
    process, port = start()
    url = tracker("dashboard", "--link", "--port", port).stdout.strip()
    answer = fetch(port, url[url.index("/login"):]).decode()
    cookie = re.search(f"Set-(Cookie: mailtracker-{port}=[^;]+)", answer)[1]
    assert b"Ada" in fetch(port, "/", cookie)
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(socket.gethostname())
        if not host.startswith("127."):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, port), timeout=5)
    process.terminate()
    assert process.wait(10) == 0
    said = process.stdout.read() + process.stderr.read()
    assert said == "" and cookie.partition("=")[2] not in said


def test_a_link_is_shown_on_a_terminal_and_opened_by_way_of_a_file_of_ones_own(
        filled, start, tmp_path):
    script, seen = tmp_path / "browser", tmp_path / "seen"
    script.write_text(f'#!/bin/sh\nls -l "${{1#file://}}" | cut -c 1-10 > {seen}.new\n'
                      f'cat "${{1#file://}}" >> {seen}.new\nmv {seen}.new {seen}\n')
    script.chmod(0o700)
    ours, theirs = os.openpty()
    process, port = start("--open", stdout=theirs, env={"BROWSER": f"{script} %s"})
    shown = os.read(ours, 999).decode().strip()
    eventually(seen.exists)
    assert seen.read_text() == \
        f'-rw-------\n<meta http-equiv="refresh" content="0;url={shown}">'
    assert b" 303 See Other" in fetch(port, shown[shown.index("/login"):])
    process.terminate()
    assert process.wait(10) == 0
    assert not list(tmp_path.glob("*.html"))
    os.close(ours), os.close(theirs)


def test_a_browser_finds_that_file_whatever_its_folder_is_called(tmp_path, monkeypatch):
    urls = []
    monkeypatch.setattr("webbrowser.open", urls.append)
    folder = tmp_path / "50% ü #1?"
    folder.mkdir()
    with mailtracker.opened_in_browser(str(folder), "http://x/"):
        assert urls == [path.as_uri() for path in folder.iterdir()] and urls


def test_keys_and_links_are_printed_and_are_good(filled, tracker, client):
    done = tracker("dashboard", "--keys")
    read, write = (line.split()[1] for line in done.stdout.splitlines())
    assert client.api("/api/tags", Authorization=f"Bearer {read}")[0] == 200
    assert client.api("/api/tags", "POST", {"name": "x"},
                      Authorization=f"Bearer {write}")[0] == 201
    done = tracker("dashboard", "--link", "--admin-url", "https://t.example.org/mail")
    assert done.stdout.startswith("https://t.example.org/mail/login?token=")


@pytest.mark.parametrize("args", [
    ("--host", "0.0.0.0"), ("--host", "192.0.2.1"), ("--host", "::"), ("--host", ""),
    ("--host", "t.example.org"), ("--admin-url", "t.example.org"), ("--admin-url", ""),
    ("--link", "--port", "0"), ("--keys", "--link"), ("--keys", "--open"),
    ("--link", "--server", "x.org"), ("--keys", "--admin-url", "https://x.org"),
    ("--port", "65536")], ids=" ".join)
def test_what_would_open_it_to_others_or_do_nothing_is_refused(run, tmp_path, args):
    code, out, said = run("dashboard", "--register", tmp_path / "register.csv", *args)
    assert (code, out) == (2, "") and "error: " in said
    assert os.listdir(tmp_path) == []


@linux
def test_idle_slow_and_vanishing_clients_hold_nobody_up(filled, start):
    process, port = start()
    cookie = cookie_of(filled, port)
    with contextlib.ExitStack() as stack:
        for number in range(100):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall([b"", b"G", b"GET / HTTP/1.1\r\n", b"POST /new HTTP/1.1\r\n"
                            b"Content-Length: 9\r\n\r\n"][number % 4])
        began = time.monotonic()
        for _ in range(20):
            assert b"Ada" in fetch(port, "/api/tags", cookie)
        assert time.monotonic() - began < 2
        assert len(os.listdir(f"/proc/{process.pid}/task")) <= 16


def test_a_big_answer_arrives_whole_by_a_slow_way(files, start):
    mailtracker.add_tags(files, [(tag, "n" * 9000) for tag in mailtracker.new_ids(
        bytes(16), 400)], Making(ago(60)))
    _, port = start()
    cookie = cookie_of(files, port)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET /api/tags?limit=200 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                       f"{cookie}\r\n\r\n".encode())
        other = fetch(port, "/api/tags?limit=200", cookie)
        assert read_all(client) == other and len(other) > 1_800_000


def test_the_pixel_port_shows_nothing_new(tagged, tracker):
    server, tag = tagged()
    pixel = server.get("/nobody.gif")[1:]
    for path in ("/", "/login?token=x", "/api/tags", "/tag?id=" + tag,
                 "/api/openapi.json"):
        status, headers, body = server.get(path)
        assert (status, body) == (200, pixel[1]) and headers.items() == pixel[0].items()


# -- a browser ----------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a browser."""
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


@pytest.fixture
def watching(browser, start, files):
    """Return a function that opens tabs which are logged in, and the URL they show."""
    _, port = start()
    token = Keys(files.key).token("login", time.time() + 600)

    def tab(beside=None):
        page = browser.page(beside)
        page.go(f"http://127.0.0.1:{port}/" + f"login?token={token}" * (not beside))
        page.until("!!document.querySelector('main')")
        return page
    return tab, f"http://127.0.0.1:{port}/"


def row(tag):
    return f"document.getElementById('t-{tag}').closest('tr').innerText"


@chromium
def test_a_hit_shows_within_five_seconds_without_reload_in_eight_tabs(
        filled, watching):
    tab, url = watching
    pages = [tab()]
    pages += [tab(pages[0]) for _ in range(7)]  # a browser opens six connections
    for page in pages:
        page.look(1100, 300)
        assert "No hit" in page.evaluate(row(CY))
        page.evaluate(f"mark = 1; document.getElementById('t-{CY}').focus();"
                      "scrollTo(0, 200)")
    mailtracker.append_events(filled, [hit(CY, 1, 1, 1)])
    deadline = time.monotonic() + 5
    for page in pages:
        page.until(f"{row(CY)}.includes('Opened')", deadline - time.monotonic())
        assert page.evaluate(f"mark == 1 && document.activeElement.id == 't-{CY}'"
                             " && scrollY == 200")
        assert page.evaluate("document.title").startswith("2 opened")
        assert page.messages == []
        assert all(asked.startswith((url, "data:")) for asked in page.requests)


@pytest.fixture
def hostile(files):
    """Have tags with names that nobody should have."""
    mailtracker.add_tags(files, [(ADA, EVIL), (BOB, "x" * 10_000)], Making(ago(60)))
    mailtracker.append_events(files, [hit(ADA, 1, 1, 5)._replace(detail=EVIL)])


@chromium
def test_the_link_to_older_tags_keeps_the_focus(filled, watching):
    ids = mailtracker.new_ids(b"x" * 16, 60)
    mailtracker.add_tags(filled, [(tag, "x") for tag in ids], Making(ago(7300)))
    page, older = watching[0](), "[...document.links].find(a => a.innerText[0] == 'O')"
    page.until(f"!!{older}")
    page.evaluate(f"{older}.focus()")
    mailtracker.append_events(filled, [hit(CY, 1, 1, 1)])
    page.until(f"{row(CY)}.includes('Opened')")
    assert page.evaluate(f"document.activeElement == {older}")


@chromium
def test_what_others_wrote_does_nothing_in_a_browser(hostile, watching):
    tab, url = watching
    page = tab()
    for path in ("", f"tag?id={ADA}", f"tag?id={BOB}", "?q=" + quote(EVIL)):
        page.look(390, 700)
        page.go(url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.messages == []
    page.evaluate("const s = document.createElement('script');"
                  "s.textContent = 'evil=1';"
                  "document.body.append(s); document.body.innerHTML +="
                  "'<img src=x onerror=evil=1><b style=color:red>'")
    assert page.evaluate("typeof evil") == "undefined"
    assert all(asked.startswith((url, "data:")) for asked in page.requests)


@chromium
def test_without_script_a_tag_is_made_edited_and_forgotten_by_forms(filled, watching):
    tab, url = watching
    page = tab()
    page.call("Emulation.setScriptExecutionDisabled", value=True)

    page.go(url)
    page.evaluate("document.querySelector('[name=name]').value = 'Eve'")
    page.click("[action=new] button")
    page.until("document.querySelector('h1')?.innerText == 'Eve'")
    tag = page.evaluate("new URLSearchParams(location.search).get('id')")
    page.evaluate("document.querySelector('textarea').value = 'Eva'")
    page.click("[action^=tag] button")
    page.until("document.querySelector('h1')?.innerText == 'Eva'")
    assert page.evaluate("document.querySelector('[readonly]').value") == \
        f'<img src="http://localhost:56789/{tag}.gif" width="1" height="1" alt="" ' \
        'style="border:0">'
    page.click("details:last-of-type summary")
    page.click("[action^=forget] button")
    page.until("location.pathname == '/' && document.readyState == 'complete'")
    assert "Eva" not in page.evaluate("document.body.innerText")
    assert page.messages == []


@chromium
def test_a_lost_session_is_said_and_the_last_figures_stay(filled, watching):
    tab, url = watching
    page = tab()
    key = Path(filled.key).read_bytes()
    os.truncate(filled.key, 0)
    page.until("document.getElementById('line').innerText == 'Service Unavailable'")
    Path(filled.key).write_bytes(key)
    page.until("document.getElementById('line').innerText == ''")
    os.unlink(filled.key)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.until("document.getElementById('line').innerText.startsWith('Logged out')")
    assert "Ada" in page.evaluate("document.body.innerText")
