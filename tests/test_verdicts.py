"""Who fetched the pixel: verdicts and their reasons."""
from __future__ import annotations

import ipaddress
import re
import time

import pytest

import mailtracker

HOME = "81.105.41.164"          # a residential address
OFFICE = "198.51.100.7"         # another network, unrelated to it
GMAIL_HOST = "66.249.84.231"
EGRESS = "104.28.31.7"          # Apple's
PROOFPOINT = "148.163.139.74"

GMAIL = ("Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 "
         "(via ggpht.com GoogleImageProxy)")
WEBKIT = "AppleWebKit/537.36 (KHTML, like Gecko)"
CHROME = (f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {WEBKIT} "
          "Chrome/149.0.0.0 Safari/537.36")
STALE = f"Mozilla/5.0 (Windows NT 6.1) {WEBKIT} Chrome/57.0.2987.133 Safari/537.36"
PREFETCH = (f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {WEBKIT} "
            "Chrome/42.0.2311.135 Safari/537.36 Edge/12.246 Mozilla/5.0")
SAFARI = ("Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 "
          "(KHTML, like Gecko) Version/14.0 Safari/605.1.15")
STRIPPED = ("Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 "
            "(KHTML, like Gecko)")
IPHONE = ("Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) "
          "AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 "
          "Mobile/15E148 Safari/604.1")
THUNDERBIRD = ("Mozilla/5.0 (X11; Linux x86_64; rv:115.0) Gecko/20100101 "
               "Thunderbird/115.8.0")
PIXEL = (f"Mozilla/5.0 (Linux; Android 14; Pixel 8) {WEBKIT} Chrome/149.0.0.0 "
         "Mobile Safari/537.36")
OUTLOOK = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.17328; Pro)"
MPP = "Mozilla/5.0"

Request, judge = mailtracker.Request, mailtracker.judge


def seen(address=OFFICE, agent=CHROME, verdict="human", event="hit"):
    return mailtracker.Event("", event, "", None, None, verdict, "", address, agent)


def stray(address):
    return seen(address, "", "", "stray")


def facts(agent="", address="", age=None, purpose="", earlier=()):
    return Request(agent, address, purpose), age, earlier


# One case at least for every line of AGENT_RULES, by verdict and reason.
AGENTS = {
    "proxy gmail-proxy": [GMAIL, "Firefox/11.0 (via ggpht.com)"],
    "proxy yahoo-proxy": ["YahooMailProxy; https://senders.yahooinc.com/mail-proxy"],
    "proxy seznam-proxy": ["Mozilla/5.0 SeznamEmailProxy/2.0.163"],
    "proxy rambler-proxy": ["RamblerMail/6.0 (incompatible; ImageProxy/6.0)"],
    "proxy ukrnet-proxy": [
        f"Mozilla/5.0 (Windows NT 10.0) {WEBKIT} Chrome/60.0.1.2 "
        "Safari/537.36 (via secureurl.fwdcdn.com - mail.ukr.net proxy)"],
    "proxy superhuman-proxy": [f"{CHROME} (via SuperhumanProxy; hello@superhuman.com)"],
    "proxy fastmail-proxy": [f"{CHROME} FastmailUA/1.0"],
    "proxy shortwave-proxy": ["Shortwave Image Fetcher"],
    "proxy mail-proxy": ["ExampleMail Image Proxy/1.2"],
    "machine no-agent": ["", " - "],
    "machine apple-mpp-agent": [MPP],
    "machine gmail-prefetch": [PREFETCH],
    "machine office-probe": [
        "Microsoft Office Existence Discovery",
        "Microsoft Exchange/15.20 (Windows NT 10.0; Win64)",
        "iOS/16.5 (20F66) dataaccessd/1.0"],
    "machine crawler": ["Mozilla/5.0 (compatible; Examplebot/2.1)"],
    "machine security-scanner": [
        "SpamExperts/128741 (Virus Scan)",
        "Mozilla/4.0 (compatible; MSIE 6.0; Bluecoat)"],
    "machine preview": [
        "Mozilla/5.0 (Windows NT 6.1; WOW64) SkypeUriPreview "
        "Preview/0.5 skype-url-preview@microsoft.com", "WhatsApp/2.23.20.0 A",
        "Slackish/1.0", f"{CHROME} (compatible; Google-Something)"],
    "machine headless": [
        f"Mozilla/5.0 (X11; Linux x86_64) {WEBKIT} "
        "HeadlessChrome/124.0.0.0 Safari/537.36"],
    "machine monitor": [f"{CHROME} PTST/230601.150719", f"{CHROME} Chrome-Lighthouse"],
    "machine fetcher": ["SomeFeedReader/3.1"],
    "machine http-library": [
        "Apache-HttpClient/4.5.13 (Java/11.0.2)",
        "Go-http-client/1.1", "curl/8.5.0"],
    "machine contact": [
        f"{CHROME} (+https://about.example/us)",
        "Something/1.0 (someone@example.org)", f"{CHROME} www.example.org",
        f"{CHROME} (about.example.org)"],
    "human mail-client": [
        THUNDERBIRD, "Mail/3445.104.11 CFNetwork/976 Darwin/18.2.0",
        "ProtonMail/4.0.1 (Android 14)"],
    "machine compatible-name": [
        "Mozilla/5.0 (compatible; Something/1.0)",
        "Mozilla/4.0 (compatible; Something)", "Mozilla/5.0 (examplename/1.0)",
        f"{IPHONE} (compatible; Something)"],
    "unknown foreign": [
        f"{CHROME}; Helper/1.0", f"{CHROME} Something/1.0",
        CHROME.replace("x64)", "x64; Something)"),
        CHROME.replace("Gecko)", "Gecko; Something)"),
        CHROME.replace("(Win", "(Something; Win"), CHROME.replace("10.0", "6.1", 1),
        PIXEL + " some words", PIXEL.replace("Android 14", "Android 6.0.1")],
    "unknown app-library": [
        "Dalvik/2.1.0 (Linux; U; Android 14; Pixel 8)",
        "SomeApp/12 CFNetwork/1494.0.7 Darwin/23.4.0"],
    "human browser": [
        CHROME,
        "Opera/9.80 (Windows NT 6.1; U; en) Presto/2.12 Version/12.1",
        "Mozilla/5.0 (Linux; Android 6.0; CUBOT MAX Build/MRA58K) "
        f"{WEBKIT} Chrome/64.0.3282.137 Mobile Safari/537.36",
        "Mozilla/5.0 (Linux; Android 13; SM-A715F; wv) "
        f"{WEBKIT} Version/4.0 Chrome/111.0.0.0 Mobile Safari/537.36 CamScanner/6.3",
        f"{CHROME} Something/149.0.0.0", f"{CHROME} SomeBrowser/1.0",
        f"{PIXEL} SomeApp/1.0",
        "Mozilla/5.0 (Linux; Android 9; Bot Security Test proxy "
        f"Build/PPR1) {WEBKIT} Chrome/64.0.3282.137 Mobile Safari/537.36",
        "Mozilla/5.0 (X11; U; Linux i686; rv:1.8.0.3) "
        "Gecko/20060523 Ubuntu/dapper-security Firefox/1.5.0.3",
        f"Mozilla/5.0 (Unknown; Linux armv7l) {WEBKIT} Safari/537.36"],
    "human handset": [
        "UCWEB/2.0 (MIDP-2.0; U; en-US; nokia203) U2/1.0.0 Mobile",
        "Lynx/2.9.0 libwww-FM/2.14",
        "Example7520/4.0 Profile/MIDP-2.0 UP.Link/5.1 (Example WAP Proxy/1.0)",
        "Something/4.5 (SomeSystem; de)"],
    "machine forged": [
        f"Something, {CHROME}",
        SAFARI.replace("Macintosh;", "Macintosh:"), CHROME.replace("5.0", "9.9", 1),
        f"{CHROME} Something/1670084315573"],
    "unknown full-build": [CHROME.replace("149.0.0.0", "149.0.7312.58")],
    "unknown unrecognised": ["Potions/1.0.0"],
}


@pytest.mark.parametrize("expected", AGENTS)
def test_an_agent_has_its_verdict_and_reason(expected):
    for agent in AGENTS[expected]:
        assert (agent, *judge(Request(agent, HOME))) == (agent, *expected.split())


def matches(rule, agent):
    text = mailtracker._texts(agent)[rule.kind]
    several = rule.kind in (mailtracker.PARTS, mailtracker.WORDS)
    return any(re.search(pattern.replace("_", " ") if several else pattern, text)
               for pattern in (rule.pattern.split() if several else [rule.pattern]))


def test_every_agent_rule_decides_at_least_one_case():
    decided = {rule for rule in mailtracker.AGENT_RULES for kind in AGENTS
               if rule.reason == kind.split()[1]
               and any(matches(rule, agent) for agent in AGENTS[kind])}
    assert [rule for rule in mailtracker.AGENT_RULES if rule not in decided] == []


# The mail programs that name themselves, in the forms they really send.
MAIL_PROGRAMS = [
    THUNDERBIRD, OUTLOOK, STRIPPED,
    THUNDERBIRD.replace("Thunder", "Firefox/115.0 Thunder"),
    "Mozilla/4.0 (compatible; ms-office; MSOffice 16)",
    "Mozilla/4.0 (compatible; MSIE 7.0; Windows NT 10.0; Win64; x64; Trident/7.0; "
    "Microsoft Outlook 16.0.5056; ms-office; MSOffice 16)",
    "MacOutlook/16.41.20091302 (Intelx64 Mac OS X 10.14.4 (Build 18E226))",
    f"{CHROME} OneOutlook/1.2024.313.100", f"{IPHONE} Outlook-iOS-Android/1.0",
    "Windows Live Mail 15.4", "WindowsMail/17.5", "Windows-Live-Mail/16.4",
    IPHONE.replace(" Version/17.5", "").replace(" Safari/604.1", ""),
    "Mozilla/5.0 (Windows NT 10.0; WOW64; rv:52.0) Gecko/20100101 PostboxApp/7.0.18",
    f"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) {WEBKIT} SparkDesktop/3.9.1 "
    "Chrome/118.0.5993.159 Electron/27.1.3 Safari/537.36",
    "SparkMail/2.0", "Newton/9.8", "Mailbird/2.9", "eM_Client/9.2", "eM Client 9.2",
    f"{CHROME} Mailspring/1.13", "Foxmail 7.2", "MailMasterPC/5.0", "BlueMail/1.140",
    "ZohoMail-Desktop/1.6", f"{CHROME} ZohoMail/1.0", "tutanota-desktop/3.118",
    "The Bat! 10.5", "Lotus-Notes/5.0 (Windows-NT)", "Kontact/5.22",
    "Evolution/3.44", "Evolution 3.52.3", "Geary/40.0 (Linux; x86_64)", "Nine/4.9.7",
    f"{STRIPPED} Sparrow/1178", "NaverMailApp/2.2.2 (Android 9; SM-G887N)",
    "YahooMobile/1.0 (mail; 6.5.2.1430)", "jp.co.yahoo.android.ymail/4.1",
    "Yahoo%20Mail/49268 CFNetwork/1121", "YahooMobileMessenger/1.0 (Android Mail; 1.8)",
    "Android-Gmail/2024.05.12", "Airmail 1.4 rv:238", "K-9 Mail/6.804", "R2Mail2/2.50",
    "Android/9-email", "Microsoft Office MAPI 16", f"{CHROME} Superhuman/25.1",
    "SomeMail/2.1 (Linux)", "AquaMail/1.16.0-1081 (build: 101600003)",
]


def test_a_mail_program_is_a_person():
    assert [agent for agent in MAIL_PROGRAMS
            if judge(Request(agent, HOME)).verdict != "human"] == []


DAMAGED = (stray("40.107.218.12"),)
BY_GMAIL = (seen(GMAIL_HOST, GMAIL, "proxy"),)
FACTS = {
    "machine prefetch-header": [facts(CHROME, HOME, purpose="prefetch;prerender"),
                                facts(CHROME, HOME, purpose="Preview")],
    "machine probe": [facts(CHROME, HOME, earlier=(stray("81.105.41.9"),))],
    "machine apple-mpp": [facts(MPP, EGRESS), facts(MPP, "2606:54c0:1::"),
                          facts(MPP, "2606:54c0:1:2::3", age=40_000)],
    "machine apple-mpp-agent": [facts(MPP, "17.58.97.2")],
    "machine microsoft-gateway": [
        facts(STALE, "40.107.218.12"), facts("", "104.47.1.254"),
        facts(CHROME, "2a01:111:f403:c102::1"), facts(CHROME, "::ffff:40.107.218.12"),
        facts(STALE, "40.107.218.0")],
    "machine safe-links": [facts(CHROME, "40.94.89.23")],
    "unknown microsoft-mail": [facts(CHROME, "40.97.120.10")],
    "proxy gmail-proxy": [facts(GMAIL, GMAIL_HOST), facts(GMAIL, GMAIL_HOST, age=4)],
    "machine gmail-prefetch": [facts(PREFETCH, GMAIL_HOST)],
    "machine google-automation": [facts(CHROME, GMAIL_HOST),
                                  facts(CHROME, "74.125.210.5", age=90_000)],
    "machine security-gateway": [facts(CHROME, PROOFPOINT, age=120),
                                 facts(THUNDERBIRD, "207.211.30.9", age=300)],
    "unknown vendor-network": [facts(CHROME, PROOFPOINT),
                               facts(CHROME, PROOFPOINT, age=-3)],
    "machine fast": [facts(CHROME, HOME, age=3), facts(OUTLOOK, HOME, age=0),
                     facts("Potions/1.0.0", HOME, age=9)],
    "machine early": [facts(CHROME, HOME, age=28), facts(IPHONE, EGRESS, age=28)],
    "machine many-networks": [
        facts(CHROME, HOME, earlier=BY_GMAIL),
        facts(STALE, OFFICE, earlier=(seen(HOME, CHROME),))],
    "human private-relay": [facts(IPHONE, EGRESS)],
    "human mail-client": [
        facts(OUTLOOK, "40.97.120.10"), facts(THUNDERBIRD, HOME, age=28),
        facts(THUNDERBIRD, HOME, earlier=BY_GMAIL)],
    "human browser": [
        facts(CHROME, HOME, earlier=DAMAGED), facts(IPHONE, "17.58.97.2"),
        facts(CHROME, "20.72.100.79"), facts(CHROME, PROOFPOINT, age=601),
        facts(CHROME, HOME, age=66), facts(CHROME, HOME, age=-2),
        facts(CHROME, HOME, earlier=(seen(OFFICE, STALE),)),
        facts(STALE, HOME, earlier=(seen("81.105.9.9", CHROME),)),
        facts(STALE, "", earlier=(seen(HOME, CHROME),)),
        facts(STALE, OFFICE, earlier=(seen(HOME, CHROME, "machine"),)),
        facts(CHROME, "not an address"),
        facts(CHROME + " " * mailtracker.MAX_FORM + "bot" * 2000, HOME)],
}


CLICKS = "mail-network", "burst", "no-language", "opened"


@pytest.mark.parametrize("expected", FACTS)
def test_a_request_has_its_verdict_and_reason(expected):
    assert {" ".join(judge(*request)) for request in FACTS[expected]} == {expected}


def test_every_reason_has_plain_words_and_a_rule_and_a_case():
    by_the_judge = {"composing", "sender-client", "own-network", "repeat",
                    *CLICKS}  # see test_clicks
    cases = {expected.split()[1] for expected in (*AGENTS, *FACTS)}
    assert cases | by_the_judge == set(mailtracker.REASONS)
    rules = {rule.reason for table in (mailtracker.AGENT_RULES, mailtracker.TIME_RULES,
                                       mailtracker.NETWORK_RULES) for rule in table}
    by_code = {"prefetch-header", "probe", "many-networks", "unrecognised"}
    assert rules | by_code | by_the_judge == set(mailtracker.REASONS)
    assert all(words.strip() for words in mailtracker.REASONS.values())


@pytest.mark.parametrize("agent", [STALE, CHROME, GMAIL, THUNDERBIRD])
@pytest.mark.parametrize("earlier", [STALE, CHROME, GMAIL, THUNDERBIRD])
def test_of_two_networks_at_least_one_open_stays(agent, earlier):
    old = seen(OFFICE, earlier, judge(Request(earlier, OFFICE)).verdict)
    request = Request(agent, HOME)
    found = judge(request, None, (old,))
    overruled = mailtracker.outranks(request, found, old)
    assert found.verdict in mailtracker.OPENS or not overruled
    assert overruled or (agent, earlier) != (GMAIL, STALE)


@pytest.mark.parametrize("old", [
    seen("81.105.200.1"), seen(""), seen(OFFICE, verdict="machine"),
    seen("2001:db8::1", CHROME)],
    ids=["same /16", "no address", "not an open", "same client over IPv6"])
def test_an_earlier_open_that_may_be_the_same_reader_stays(old):
    request = Request(CHROME, HOME)
    found = judge(request, None, (old,))
    assert found.verdict == "human"
    assert not mailtracker.outranks(request, found, old)


def test_the_network_of_an_address_is_its_24_or_48():
    for address, key in (
            ("203.0.113.77", "203.0.113.0/24"), ("2001:db8:1:2::3", "2001:db8:1::/48"),
            ("::ffff:203.0.113.77", "203.0.113.0/24"), ("fe80::1%eth0", "fe80::/48"),
            ("", ""), ("unknown", ""), ("1.2.3.4\0", ""), ("\u0661.2.3.4", "")):
        assert mailtracker.network(address) == key


def test_addresses_are_related_by_prefix_or_by_owner():
    for a, b, expected in (
            ("203.0.113.77", "203.0.5.1", True), ("203.0.113.77", "203.1.5.1", False),
            ("2001:db8:1::1", "2001:db8:ffff::1", True), ("", "", False),
            ("2001:db8::1", "2001:db9::1", False), ("104.28.1.1", "2606:54c0::1", True),
            ("66.249.84.1", "74.125.210.1", True),
            ("203.0.113.77", "2001:db8::1", False)):
        assert mailtracker.related(a, b) is expected


def test_networks_are_apart_and_addresses_looked_up_to_their_edges():
    prefixes = [(ipaddress.ip_network(prefix), line.name)
                for line in mailtracker.NETWORKS for prefix in line.prefixes.split()]
    rows = sorted((net.version, int(net[0]), int(net[-1])) for net, _ in prefixes)
    assert all(a[0] != b[0] or a[2] < b[1] for a, b in zip(rows, rows[1:]))
    names = {"", *(name for _, name in prefixes)}
    for net, name in prefixes:
        assert mailtracker.owner(str(net[0])) == mailtracker.owner(str(net[-1])) == name
        assert mailtracker.owner(str(net[0] - 1)) in names
    assert mailtracker.owner(HOME) == mailtracker.owner("17.0.0.1") == ""


STARTS = ["", "mail", "http", "dalvik", "opera/9 ", "microsoft office ", "mozilla/5.0 ",
          "mozilla/5.0 (", "mozilla/5.0 (compatible;", "mozilla/5.0 (windows nt 10.0; ",
          CHROME + " "]


def fragments():
    """Return all beginnings of all literals in the patterns of the rules."""
    found = {" ", "(", "/1", "a.", "a@b-", "; ", "1"}
    for rule in mailtracker.AGENT_RULES:
        plain = re.sub(r"\\.|\(\?[:=!<]+", "|", rule.pattern).replace("_", " ")
        for literal in re.findall(r"[a-z0-9/ .;,:@-]{2,}", plain):
            literal = " ".join(literal.split())
            found.update(literal[:end] for end in range(2, len(literal) + 1))
    return sorted(found)


def seconds(function, *args, repeat=1):
    def once():
        begun = time.perf_counter()
        function(*args)
        return time.perf_counter() - begun
    return min(once() for _ in range(repeat))


def plain_loop():
    number = 0
    for _ in range(mailtracker.MAX_AGENT):
        number += 1


def test_the_worst_agent_for_every_pattern_takes_no_longer_than_a_few_plain_loops():
    judge_afresh = mailtracker.read_agent.__wrapped__
    agents = [(start + piece * 500)[:mailtracker.MAX_AGENT]
              for start in STARTS for piece in fragments()]
    slow = sorted(agents, key=lambda agent: -seconds(judge_afresh, agent))[:40]
    worst = max(seconds(judge_afresh, agent, repeat=15) for agent in slow)
    assert worst < 5 * seconds(plain_loop, repeat=15)  # 60 us
