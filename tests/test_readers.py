"""Readers: other programs get numbers, times and blanks out of a register."""
from __future__ import annotations

import csv
import json
import shutil
import subprocess

import pytest

import mailtracker
from conftest import shown
from mailtracker import Event, Files

A, B, C = "bcdfghjkmnpqrstvwxz22", "cdfghjkmnpqrstvwxz233", "dfghjkmnpqrstvwxz2344"
NOON, LATER = "2026-11-20T12:00:00Z", "2026-11-20T20:14:03Z"
NAMES = ['ann, "the" first', "=1+1", "m\xfcller"]


@pytest.fixture
def register(files):
    """Return a settled register: 12 hits and an open, one machine's hit, none."""
    mailtracker.add_tags(files, list(zip((A, B, C), NAMES)), mailtracker.Making(NOON))
    mailtracker.append_events(files, [
        Event(LATER, "hit", A, 12, 1, "human", "browser", "", "Mozilla"),
        Event(LATER, "hit", B, 2, 0, "machine", "scanner", "", "curl")])
    assert mailtracker.settle(files)
    return files.register


def output(command, *arguments, **options):
    if not shutil.which(command):
        pytest.skip(f"{command} is not installed")
    return subprocess.run([command, *arguments], check=True, encoding="utf-8",
                          stdout=subprocess.PIPE, **options).stdout


def test_duckdb_sees_numbers_times_and_nulls(register):
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    found = duckdb.sql(
        "select sum(hits), sum(opens), count(last_open), max(last_hit) - max(created) "
        f"from '{register}' where last_hit >= created or last_hit is null").fetchall()
    assert found[0][:3] == (14, 1, 1) and found[0][3].total_seconds() == 29643


def test_sqlite_finds_counts_and_blanks(register):
    found = output("sqlite3", ":memory:", f".import --csv {register} r",
                   "select sum(hits), (select id from r where hits=2), "
                   "(select count(*) from r where last_open=''), "
                   "(select name from r where opens=1), max(strftime('%s', last_hit)) "
                   "- max(strftime('%s', created)) from r")
    assert found == f"14|{B}|2|{NAMES[0]}|29643\n"


def test_miller_sums_and_sorts(register):
    found = json.loads(output(
        "mlr", "--icsv", "--ojson", "sort", "-nr", "hits", "then", "put",
        "$total = $hits + $opens", register))
    assert [row["total"] for row in found] == [13, 2, 0]
    assert [row["last_open"] for row in found] == [LATER, "", ""]


@pytest.mark.parametrize("name, options", [
    ("pandas", {"parse_dates": list(mailtracker.TIMES[:3])}),
    ("polars", {"try_parse_dates": True})])
def test_data_frames_have_numbers_times_and_nothing(name, options, register):
    library = pytest.importorskip(name, reason=f"{name} is not installed")
    table = library.read_csv(register, **options)
    assert [*table["hits"]] == [12, 2, 0]
    assert {str(table[column].dtype).lower() for column in ("hits", "opens")} == {
        "int64"}
    assert all(str(table[column].dtype).lower().startswith("datetime")
               for column in mailtracker.TIMES[:3])
    assert [str(cell) in ("NaT", "None") for cell in table["last_open"]] == [
        False, True, True]


def test_calc_gives_back_what_it_was_given(register, tmp_path):
    done = output("soffice", f"-env:UserInstallation=file://{tmp_path}/profile",
                  "--headless", "--infilter=CSV:44,34,UTF8", "--convert-to",
                  "csv:Text - txt - csv (StarCalc):44,34,76",
                  "--outdir", str(tmp_path / "out"), register, timeout=120)
    assert "out/register.csv" in done
    with open(register, newline="") as mine, open(
            tmp_path / "out" / "register.csv", newline="") as theirs:
        assert [*csv.reader(mine)] == [*csv.reader(theirs)]
    files = Files(str(tmp_path / "out" / "register.csv"))
    assert mailtracker.settle(files)
    assert [(row["hits"], row["last_open"], row["name"])
            for row in shown(files).values()] == [
                ("12", LATER, NAMES[0]), ("2", "", NAMES[1]), ("0", "", NAMES[2])]
