"""Readers: other programs get numbers, times and blanks out of a register."""
from __future__ import annotations

import csv
import json
import shutil
import subprocess

import pytest

import mailtracker
from mailtracker import Event, Files

A, B, C = "bcdfghjkmnpqrstvwxz22", "cdfghjkmnpqrstvwxz233", "dfghjkmnpqrstvwxz2344"
NOON, LATER = "2026-11-20T12:00:00Z", "2026-11-20T20:14:03Z"
NAMES = ['ann, "the" first', "=1+1", "m\xfcller"]


@pytest.fixture
def register(tmp_path):
    """Return a settled register: 12 hits and an open, one machine's hit, none."""
    files = Files(str(tmp_path / "register.csv"))
    mailtracker.add_tags(files, list(zip((A, B, C), NAMES)), NOON)
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
    types = dict(duckdb.sql(f"select column_name, column_type from "
                            f"(describe from '{register}')").fetchall())
    assert types["hits"] == types["opens"] == "BIGINT"
    assert all("TIMESTAMP" in types[name] for name in mailtracker.TIMES[:3])


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
        "$total = $hits + $opens; $seconds = is_empty($last_open) ? 0 : "
        "strptime($last_open, \"%Y-%m-%dT%H:%M:%SZ\")", register))
    assert [row["total"] for row in found] == [13, 2, 0]
    assert [row["last_open"] for row in found] == [LATER, "", ""]
    assert [bool(row["seconds"]) for row in found] == [True, False, False]


def test_pandas_sees_numbers_times_and_nothing(register):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    table = pandas.read_csv(register, parse_dates=list(mailtracker.TIMES[:3]))
    assert [*table.hits] == [12, 2, 0] and table.hits.dtype == table.opens.dtype == int
    assert all(str(table[name].dtype).startswith("datetime64")
               for name in mailtracker.TIMES[:3])
    assert [*table.last_open.isna()] == [False, True, True]


def test_polars_sees_numbers_times_and_nulls(register):
    polars = pytest.importorskip("polars", reason="polars is not installed")
    table = polars.read_csv(register, try_parse_dates=True)
    assert table["hits"].dtype == table["opens"].dtype == polars.Int64
    assert table["hits"].to_list() == [12, 2, 0]
    assert all(isinstance(table[name].dtype, polars.Datetime)
               for name in mailtracker.TIMES[:3])
    assert table["last_open"].is_null().to_list() == [False, True, True]


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
    columns, rows = mailtracker.register_rows(files)
    assert [[row[columns.index(c)] for c in ("hits", "last_open", "name")]
            for row in rows] == [["12", LATER, NAMES[0]], ["2", "", NAMES[1]],
                                 ["0", "", NAMES[2]]]
