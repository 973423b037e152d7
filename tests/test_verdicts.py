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
OUTLOOK = "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Outlook 16.0.17328; Pro)"
MPP = "Mozilla/5.0"

Facts, Seen, judge = mailtracker.Facts, mailtracker.Seen, mailtracker.judge


def seen(ago, address=OFFICE, agent=CHROME, verdict="human", damaged=False):
    return Seen(ago, address, agent, verdict, "", damaged)


# One case at least for every line of AGENT_RULES; the reason says which kind.
AGENTS = [
    ("gmail-proxy", "proxy", GMAIL),
    ("yahoo-proxy", "proxy", "YahooMailProxy; https://senders.yahooinc.com/mail-proxy"),
    ("seznam-proxy", "proxy", "Mozilla/5.0 SeznamEmailProxy/2.0.163"),
    ("rambler-proxy", "proxy", "RamblerMail/6.0 (incompatible; ImageProxy/6.0)"),
    ("ukrnet-proxy", "proxy", f"Mozilla/5.0 (Windows NT 10.0) {WEBKIT} Chrome/60.0.1.2 "
     "Safari/537.36 (via secureurl.fwdcdn.com - mail.ukr.net proxy)"),
    ("superhuman-proxy", "proxy",
     f"{CHROME} (via SuperhumanProxy; hello@superhuman.com)"),
    ("fastmail-proxy", "proxy", f"{CHROME} FastmailUA/1.0"),
    ("shortwave-proxy", "proxy", "Shortwave Image Fetcher"),
    ("mail-proxy", "proxy", "ExampleMail Image Proxy/1.2"),
    ("no-agent", "machine", ""),
    ("no-agent", "machine", " - "),
    ("apple-mpp-agent", "machine", MPP),
    ("gmail-prefetch", "machine", PREFETCH),
    ("office-probe", "machine", "Microsoft Office Existence Discovery"),
    ("office-probe", "machine", "Microsoft Exchange/15.20 (Windows NT 10.0; Win64)"),
    ("office-probe", "machine", "Office 365 Connectors"),
    ("office-probe", "machine", "iOS/16.5 (20F66) dataaccessd/1.0"),
    ("crawler", "machine", "Mozilla/5.0 (compatible; Examplebot/2.1)"),
    ("crawler", "machine", "Mozilla/5.0 (compatible; Yahoo! Slurp)"),
    ("security-scanner", "machine", "SpamExperts/128741 (Virus Scan)"),
    ("security-scanner", "machine", "Mozilla/4.0 (compatible; MSIE 6.0; Bluecoat)"),
    ("security-scanner", "machine", "SCMGUARD"),
    ("preview", "machine", "Mozilla/5.0 (Windows NT 6.1; WOW64) SkypeUriPreview "
     "Preview/0.5 skype-url-preview@microsoft.com"),
    ("preview", "machine", "facebookexternalhit/1.1"),
    ("preview", "machine", "WhatsApp/2.23.20.0 A"),
    ("crawler", "machine", "Slackbot-LinkExpanding 1.0"),
    ("headless", "machine", f"Mozilla/5.0 (X11; Linux x86_64) {WEBKIT} "
     "HeadlessChrome/124.0.0.0 Safari/537.36"),
    ("monitor", "machine", f"{CHROME} PTST/230601.150719"),
    ("monitor", "machine", f"{CHROME} Chrome-Lighthouse"),
    ("fetcher", "machine", "SomeFeedReader/3.1"),
    ("http-library", "machine", "Apache-HttpClient/4.5.13 (Java/11.0.2)"),
    ("http-library", "machine", "python-requests/2.31.0"),
    ("http-library", "machine", "Go-http-client/1.1"),
    ("http-library", "machine", "curl/8.5.0"),
    ("http-library", "machine", "okhttp/4.12.0"),
    ("contact", "machine", f"{CHROME} (+https://about.example/us)"),
    ("contact", "machine", "Something/1.0 (someone@example.org)"),
    ("mail-client", "human", THUNDERBIRD),
    ("mail-client", "human", "Airmail 1.4 rv:238 (Macintosh; Mac OS X 10.9.2; en_US)"),
    ("mail-client", "human", "Mail/3445.104.11 CFNetwork/976 Darwin/18.2.0"),
    ("mail-client", "human", "ProtonMail/4.0.1 (Android 14)"),
    ("compatible-name", "machine", "Mozilla/5.0 (compatible; Something/1.0)"),
    ("forged", "machine", f"{CHROME}; Helper/1.0"),
    ("app-library", "unknown", "Dalvik/2.1.0 (Linux; U; Android 14; Pixel 8)"),
    ("app-library", "unknown", "SomeApp/12 CFNetwork/1494.0.7 Darwin/23.4.0"),
    ("browser", "human", CHROME),
    ("browser", "human", "Opera/9.80 (Windows NT 6.1; U; en) Presto/2.12 Version/12.1"),
    ("browser", "human", "Mozilla/5.0 (Linux; Android 6.0; CUBOT MAX Build/MRA58K) "
     f"{WEBKIT} Chrome/64.0.3282.137 Mobile Safari/537.36"),
    ("browser", "human", "Mozilla/5.0 (Linux; Android 13; SM-A715F; wv) "
     f"{WEBKIT} Version/4.0 Chrome/111.0.0.0 Mobile Safari/537.36 CamScanner/6.3"),
    ("handset", "human", "UCWEB/2.0 (MIDP-2.0; U; en-US; nokia203) U2/1.0.0 Mobile"),
    ("handset", "human", "Lynx/2.9.0 libwww-FM/2.14"),
    ("unrecognised", "unknown", "Potions/1.0.0"),
]


@pytest.mark.parametrize("reason, verdict, agent", AGENTS,
                         ids=[f"{r}-{i}" for i, (r, _, _) in enumerate(AGENTS)])
def test_an_agent_has_its_verdict_and_reason(reason, verdict, agent):
    assert judge(Facts(agent, HOME)) == (verdict, reason)


def first_rule(agent):
    text = agent.lower().strip()
    for number, rule in enumerate(mailtracker.AGENT_RULES):
        if re.search(rule.pattern, text):
            return number
    return None


def test_every_agent_rule_decides_at_least_one_case():
    decided = {first_rule(agent) for _, _, agent in AGENTS}
    silent = [rule for number, rule in enumerate(mailtracker.AGENT_RULES)
              if number not in decided]
    assert silent == []


# The mail programs that name themselves, in the forms they really send.
MAIL_PROGRAMS = [
    THUNDERBIRD, OUTLOOK, STRIPPED,
    THUNDERBIRD.replace("Thunder", "Firefox/115.0 Thunder"),
    "Mozilla/4.0 (compatible; ms-office; MSOffice 16)",
    "Mozilla/4.0 (compatible; MSIE 7.0; Windows NT 10.0; Win64; x64; Trident/7.0; "
    "Microsoft Outlook 16.0.5056; ms-office; MSOffice 16)",
    "MacOutlook/16.41.20091302 (Intelx64 Mac OS X 10.14.4 (Build 18E226))",
    "Outlook-iOS/709.2226530.prod.iphone (3.24.1)",
    f"{CHROME} OneOutlook/1.2024.313.100", f"{IPHONE} Outlook-iOS-Android/1.0",
    "Outlook-Express/7.0 (MSIE 7.0; Windows NT 5.1; Trident/4.0; TmstmpExt)",
    "Windows Live Mail 15.4", "WindowsMail/17.5",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 "
    "(KHTML, like Gecko) Mobile/15E148",
    "Mozilla/5.0 (Windows NT 10.0; WOW64; rv:52.0) Gecko/20100101 PostboxApp/7.0.18",
    f"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) {WEBKIT} SparkDesktop/3.9.1 "
    "Chrome/118.0.5993.159 Electron/27.1.3 Safari/537.36",
    "SparkMail/2.0", "Newton/9.8", "Mailbird/2.9", "eM_Client/9.2", "eM Client/9.2",
    f"{CHROME} Mailspring/1.13", "Foxmail 7.2", "MailMasterPC/5.0",
    "BlueMail/1.140", "ZohoMail-Desktop/1.6", "tutanota-desktop/3.118",
    "The Bat! 10.5", "Lotus-Notes/5.0 (Windows-NT)", "Evolution/3.44",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/534.34 (KHTML, like Gecko) "
    "kmail2/4.14.2 Safari/534.34", "Kontact/5.22",
    "Mozilla/5.0 (Windows; U; Windows NT 6.1; fr) Gecko/2008072406 Prism "
    "(zdesktop/1.0.4)",
    f"{STRIPPED} Sparrow/1178", "NaverMailApp/2.2.2 (Android 9; SM-G887N)",
    "YahooMobile/1.0 (mail; 6.5.2.1430)", "jp.co.yahoo.android.ymail/4.1",
    "Android-Gmail/2024.05.12", "Airmail 1.4 rv:238",
]


@pytest.mark.parametrize("agent", MAIL_PROGRAMS)
def test_a_mail_program_is_a_person(agent):
    assert judge(Facts(agent, HOME)).verdict == "human"


# Network, headers, time and company: what decides beside the agent.
DAMAGED = (seen(1, "40.107.218.12", STALE, "machine", damaged=True),)
FACTS = [
    ("head", "machine", Facts(CHROME, HOME, "HEAD")),
    ("prefetch-header", "machine", Facts(CHROME, HOME, purpose="prefetch;prerender")),
    ("prefetch-header", "machine", Facts(CHROME, HOME, purpose="Preview")),
    ("probe", "machine", Facts(CHROME, HOME, earlier=(
        seen(2, "81.105.41.9", CHROME, "machine", damaged=True),))),
    ("browser", "human", Facts(CHROME, HOME, earlier=DAMAGED)),
    ("apple-mpp", "machine", Facts(MPP, EGRESS)),
    ("apple-mpp", "machine", Facts(MPP, "2606:54c0:1:2::3", age=40_000)),
    ("apple-mpp-agent", "machine", Facts(MPP, "17.58.97.2")),
    ("private-relay", "human", Facts(IPHONE, EGRESS)),
    ("browser", "human", Facts(IPHONE, "17.58.97.2")),
    ("microsoft-gateway", "machine", Facts(STALE, "40.107.218.12")),
    ("microsoft-gateway", "machine", Facts("", "104.47.1.254")),
    ("microsoft-gateway", "machine", Facts(CHROME, "2a01:111:f403:c102::1")),
    ("microsoft-gateway", "machine", Facts(CHROME, "::ffff:40.107.218.12")),
    ("safe-links", "machine", Facts(CHROME, "40.94.89.23")),
    ("microsoft-mail", "unknown", Facts(CHROME, "40.97.120.10")),
    ("mail-client", "human", Facts(OUTLOOK, "40.97.120.10")),
    ("browser", "human", Facts(CHROME, "20.72.100.79")),
    ("gmail-proxy", "proxy", Facts(GMAIL, GMAIL_HOST)),
    ("gmail-proxy", "proxy", Facts(GMAIL, GMAIL_HOST, age=4)),
    ("gmail-prefetch", "machine", Facts(PREFETCH, GMAIL_HOST)),
    ("google-automation", "machine", Facts(CHROME, GMAIL_HOST)),
    ("google-automation", "machine", Facts(CHROME, "74.125.210.5", age=90_000)),
    ("security-gateway", "machine", Facts(CHROME, PROOFPOINT, age=120)),
    ("security-gateway", "machine", Facts(THUNDERBIRD, "207.211.30.9", age=300)),
    ("browser", "human", Facts(CHROME, PROOFPOINT, age=601)),
    ("vendor-network", "unknown", Facts(CHROME, PROOFPOINT)),
    ("vendor-network", "unknown", Facts(CHROME, PROOFPOINT, age=-3)),
    ("fast", "machine", Facts(CHROME, HOME, age=3)),
    ("fast", "machine", Facts(OUTLOOK, HOME, age=0)),
    ("fast", "machine", Facts("Potions/1.0.0", HOME, age=9)),
    ("early", "machine", Facts(CHROME, HOME, age=28)),
    ("early", "machine", Facts(IPHONE, EGRESS, age=28)),
    ("mail-client", "human", Facts(THUNDERBIRD, HOME, age=28)),
    ("browser", "human", Facts(CHROME, HOME, age=66)),
    ("browser", "human", Facts(CHROME, HOME, age=-2)),
    ("many-networks", "machine", Facts(CHROME, HOME, earlier=(
        seen(30, GMAIL_HOST, GMAIL, "proxy"),))),
    ("many-networks", "machine", Facts(STALE, OFFICE, earlier=(
        seen(30, HOME, CHROME),))),
    ("browser", "human", Facts(CHROME, HOME, earlier=(seen(30, OFFICE, STALE),))),
    ("browser", "human", Facts(STALE, HOME, earlier=(seen(30, "81.105.9.9", CHROME),))),
    ("mail-client", "human", Facts(THUNDERBIRD, HOME, earlier=(
        seen(30, GMAIL_HOST, GMAIL, "proxy"),))),
    ("browser", "human", Facts(STALE, "", earlier=(seen(30, HOME, CHROME),))),
    ("browser", "human", Facts(STALE, OFFICE, earlier=(
        seen(30, HOME, CHROME, "machine"),))),
    ("browser", "human", Facts(CHROME, "not an address")),
]


@pytest.mark.parametrize("reason, verdict, facts", FACTS,
                         ids=[f"{r}-{i}" for i, (r, _, _) in enumerate(FACTS)])
def test_a_request_has_its_verdict_and_reason(reason, verdict, facts):
    assert judge(facts) == (verdict, reason)


def test_every_reason_has_plain_words_and_a_case():
    by_the_caller = {"composing", "sender-client", "own-network", "repeat"}
    cases = {reason for reason, _, _ in AGENTS} | {reason for reason, _, _ in FACTS}
    assert cases | by_the_caller == set(mailtracker.REASONS)
    assert all(words.strip() for words in mailtracker.REASONS.values())


def test_every_network_rule_decides_at_least_one_case():
    reasons = {reason for reason, _, _ in FACTS}
    assert {rule.reason for rule in mailtracker.NETWORK_RULES} <= reasons
    assert {rule.reason for rule in mailtracker.TIME_RULES} <= reasons


# 26 requests observed in the wild: what they are, the facts their reports give,
# the verdict, and, where they cannot be told, why.
AZURE = "20.72.100.79"
OBSERVED = [
    ("Gmail's proxy, a web log", Facts(GMAIL, "66.249.93.55"), "proxy", ""),
    ("Gmail's proxy, Mailjet event", Facts(GMAIL, GMAIL_HOST), "proxy", ""),
    ("Gmail's proxy, support form", Facts(GMAIL, "66.249.84.213"), "proxy", ""),
    ("Gmail's proxy on delivery", Facts(GMAIL, age=4), "proxy", ""),
    ("Gmail's prefetch", Facts(PREFETCH, GMAIL_HOST, age=5), "machine", ""),
    ("Apple MPP", Facts(MPP, EGRESS), "machine", ""),
    ("Proofpoint gateway", Facts("", PROOFPOINT), "machine", ""),
    ("unnamed scanner, LeaseWeb", Facts(CHROME, "108.59.15.73"), "human",
     "a current browser from a hosting network, no time of sending"),
    ("unnamed scanner, M247", Facts(CHROME, "38.202.3.126"), "human", "as above"),
    ("unnamed scanner, AWS", Facts(CHROME, "100.63.237.33"), "human", "as above"),
    ("gateway scan after 28 s", Facts(
        f"Mozilla/5.0 (X11; Linux x86_64) {WEBKIT} Chrome/124.0.0.0 Safari/537.36",
        age=28), "machine", ""),
    ("Safe Links, gophish#973", Facts(STALE, "40.107.218.12", earlier=DAMAGED),
     "machine", ""),
    ("Microsoft 365 before delivery", Facts(
        CHROME.replace("149.0.0.0", "80.0.3987.132"), age=-5), "human",
     "an old browser that people still use; no address, no usable time"),
    ("Safe Links detonation", Facts(CHROME, "40.94.89.23", age=4), "machine", ""),
    ("Safe Links, opencollective#3656", Facts(STALE, "40.94.16.7"), "machine", ""),
    ("Safe Links in Azure", Facts(CHROME, AZURE), "human",
     "Azure carries virtual desktops too and is not listed"),
    ("EOP, blank agent", Facts("", "104.47.1.254"), "machine", ""),
    ("headless Chrome after a damaged id", Facts(
        f"Mozilla/5.0 (X11; Linux x86_64) {WEBKIT} HeadlessChrome/131.0 Safari/537.36",
        AZURE, age=22, earlier=(seen(1, AZURE, damaged=True, verdict="machine"),)),
     "machine", ""),
    ("new Outlook for Windows", Facts(f"{CHROME} OneOutlook/1.2023.927.100"),
     "human", ""),
    ("corporate gateway", Facts("", "", "HEAD"), "machine", ""),
    ("Safe Links in Azure, no agent", Facts("", "172.176.117.104"), "machine", ""),
    ("Microsoft, two agents, one address", Facts(CHROME, AZURE), "human",
     "two browsers behind one address are also an office"),
    ("link scanner after 12 s", Facts(
        CHROME.replace("149", "146"), "168.90.91.133", age=12), "machine", ""),
    ("Outlook user loading images", Facts(STRIPPED, age=1440), "human", ""),
    ("genuine open after 66 s", Facts(CHROME, age=66), "human", ""),
    ("reader 68 s after Gmail's proxy", Facts(SAFARI, HOME, earlier=(
        seen(68, "66.249.93.55", GMAIL, "proxy"),)), "human", ""),
]


@pytest.mark.parametrize("facts, verdict, why", [row[1:] for row in OBSERVED],
                         ids=[row[0] for row in OBSERVED])
def test_an_observed_request_is_judged_rightly_or_to_the_lesser_harm(
        facts, verdict, why):
    assert judge(facts).verdict == verdict


def test_all_26_observed_requests_are_judged():
    assert len(OBSERVED) == 26
    assert sum(1 for row in OBSERVED if row[3]) == 6


def test_the_best_candidate_turns_an_earlier_stale_browser_into_machine():
    stale = seen(20, OFFICE, STALE)
    facts = Facts(GMAIL, GMAIL_HOST, earlier=(stale,))
    assert mailtracker.outranks(facts, judge(facts), stale)


def test_of_two_browsers_alike_the_later_stays():
    first = seen(20, OFFICE, CHROME)
    facts = Facts(SAFARI, HOME, earlier=(first,))
    assert judge(facts).verdict == "human"
    assert mailtracker.outranks(facts, judge(facts), first)


@pytest.mark.parametrize("agent", [STALE, CHROME, GMAIL, THUNDERBIRD])
@pytest.mark.parametrize("earlier", [STALE, CHROME, GMAIL, THUNDERBIRD])
def test_of_two_networks_at_least_one_open_stays(agent, earlier):
    old = seen(20, OFFICE, earlier, judge(Facts(earlier, OFFICE)).verdict)
    facts = Facts(agent, HOME, earlier=(old,))
    verdict = judge(facts)
    stays = verdict.verdict in mailtracker.OPENS
    assert stays or not mailtracker.outranks(facts, verdict, old)


@pytest.mark.parametrize("old", [
    seen(61, OFFICE), seen(20, "81.105.200.1"), seen(20, ""),
    seen(20, OFFICE, verdict="machine"), seen(20, "2001:db8::1", CHROME)],
    ids=["long ago", "same /16", "no address", "not an open", "same client over IPv6"])
def test_an_earlier_open_that_may_be_the_same_reader_stays(old):
    facts = Facts(CHROME, HOME, earlier=(old,))
    assert judge(facts).verdict == "human"
    assert not mailtracker.outranks(facts, judge(facts), old)


@pytest.mark.parametrize("address, key", [
    ("203.0.113.77", "203.0.113.0/24"), ("::ffff:203.0.113.77", "203.0.113.0/24"),
    ("2001:db8:1:2::3", "2001:db8:1::/48"), ("fe80::1%eth0", "fe80::/48"),
    ("", ""), ("unknown", ""), ("1.2.3.4\0", ""), ("\u0661.2.3.4", "")])
def test_the_network_of_an_address_is_its_24_or_48(address, key):
    assert mailtracker.network(address) == key


@pytest.mark.parametrize("a, b, expected", [
    ("203.0.113.77", "203.0.5.1", True), ("203.0.113.77", "203.1.5.1", False),
    ("2001:db8:1::1", "2001:db8:ffff::1", True), ("2001:db8::1", "2001:db9::1", False),
    ("66.249.84.1", "74.125.210.1", True), ("104.28.1.1", "2606:54c0::1", True),
    ("203.0.113.77", "2001:db8::1", False), ("", "", False)])
def test_addresses_are_related_by_prefix_or_by_owner(a, b, expected):
    assert mailtracker.related(a, b) is expected


def prefixes():
    for line in mailtracker.NETWORKS:
        for prefix in line.prefixes.split():
            yield line.name, ipaddress.ip_network(prefix)


def test_networks_are_apart():
    rows = sorted((net.version, int(net[0]), int(net[-1])) for _, net in prefixes())
    assert all(a[0] != b[0] or a[2] < b[1] for a, b in zip(rows, rows[1:]))


def test_an_address_is_looked_up_to_the_edges_of_its_prefix():
    for name, net in prefixes():
        assert mailtracker._owner(str(net[0])) == name
        assert mailtracker._owner(str(net[-1])) == name
        assert mailtracker._owner(str(net[0] - 1)) in ("", *dict(prefixes()))
    assert mailtracker._owner(HOME) == mailtracker._owner("17.0.0.1") == ""


def test_a_truncated_address_is_judged_like_the_whole_one():
    assert judge(Facts(STALE, "40.107.218.0")).reason == "microsoft-gateway"
    assert judge(Facts(MPP, "2606:54c0:1::")).reason == "apple-mpp"


HOSTILE = ["a", " ", "(", "mail ", " at x", "a.", "a@b-", "http", "(compatible;",
           "mozilla/5 (", "microsoft office ", "chrome/1", "safari/1;", "\u0130", "/1"]


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("start", ["", "Mozilla/5.0 ", "Mail/1 ", "dalvik"])
def test_a_hostile_agent_of_8_kb_takes_no_time(start, piece):
    agent = start + piece * (8192 // len(piece))
    begun = time.perf_counter()
    judge(Facts(agent, HOME))
    assert time.perf_counter() - begun < 0.1


def test_only_the_first_thousand_characters_of_an_agent_count():
    padding = " " * mailtracker.MAX_AGENT
    assert judge(Facts(CHROME + padding + "bot", HOME)).verdict == "human"
