"""Prices, costs and dates: hand-computed examples, and rules that hold for any numbers."""

import json
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from labkit import pricing, tokens
from labkit.client.costs import plot_costs
from labkit.errors import DataError, PriceError
from tests.conftest import chats, posts

THEN = "2023-03-01"


@pytest.mark.parametrize(("model", "base", "training", "tuned"), [
    ("ada", 0.40, 0.40, 1.60), ("babbage", 0.50, 0.60, 2.40), ("curie", 2.00, 3.00, 12.00),
    ("davinci", 20.00, 30.00, 120.00)])
def test_gpt3_cost_what_the_slides_quote(model: str, base: float, training: float, tuned: float) -> None:
    assert pricing.price(model, "base input", THEN).usd == base
    assert pricing.price(model, "training", THEN).usd == training
    assert pricing.price(f"{model}:ft-org-2022-01-01-00-00-00", "fine-tuned output", THEN).usd == tuned
    assert pricing.price(model, "base input", "2022-08-31").usd == 2 * training  # before the cut


def test_openais_own_example() -> None:
    assert pricing.training_cost("gpt-3.5-turbo", 100_000, 3, "2023-09-01") == pytest.approx(2.40)
    assert pricing.training_cost("ft:gpt-4o-mini-2024-07-18:org::id", 1_000_000, 2, "2026-11-22") == pytest.approx(6)


def test_a_request_with_cached_input_and_in_a_batch() -> None:
    ask = {"prompt": 2000, "output": 10, "on": "2026-11-22"}
    assert pricing.request_cost("gpt-4o-mini", **ask) == pytest.approx((2000 * 0.15 + 10 * 0.60) / 1e6)
    assert pricing.request_cost("gpt-4o-mini", **ask, cached=1500) == pytest.approx(
        (500 * 0.15 + 1500 * 0.075 + 10 * 0.60) / 1e6)
    assert pricing.request_cost("gpt-4o-mini", **ask, fine_tuned=True, batch=True) == pytest.approx(
        (2000 * 0.15 + 10 * 0.60) / 1e6)
    assert pricing.price("babbage", "training", "2023-10-01").usd == 0.60  # not babbage-002, which lived beside it
    old = pricing.request_cost("ada", 2000, 10, on=THEN)
    assert pricing.request_cost("ada", 2000, 10, cached=2000, on=THEN) == old  # GPT-3 had no cached price
    with pytest.raises(ValueError, match="cached=11"):
        pricing.request_cost("ada", 10, 1, cached=11, on=THEN)


def test_unknown_is_never_zero() -> None:
    for model, kind, on, why in [
        ("gpt-4-0613", "training", "2024-06-01", "not known"),
        ("ada", "training", "2026-11-22", "until 2024-01-04"),
        ("ada", "base input", "2021-09-01", "from 2022-07-03"),
        ("gpt-6-luna", "training", "2026-11-22", "no known training price"),
        ("gpt-9", "training", None, "lists ada"),
        ("ada", "training", "March", "YYYY-MM-DD"),
        ("gpt-3.5-turbo", "base input", "2026-09-01", "name one of gpt-3.5-turbo-1106"),
        ("gpt-4o", "fine-tuned batch input", "2026-11-22", "not known"),
    ]:
        with pytest.raises(PriceError, match=why):
            pricing.price(model, kind, on)
    with pytest.raises(PriceError, match="by the hour"):
        pricing.training_cost("o4-mini", 1000, 1, "2026-01-01")
    assert pricing.training_cost("o4-mini", 1000, 1, "2026-01-01", hours=1.5) == 150


@given(training=st.floats(0, 1e6), before=st.floats(0, 1), after=st.floats(0, 1))
def test_break_even_is_the_first_request_at_which_training_has_paid(
        training: float, before: float, after: float) -> None:
    found = pricing.break_even(training, before, after)
    if found is None:
        assert before - after < 1e-9
    elif before - after > 1e-9:
        saved = before - after
        assert found * saved >= training * (1 - 1e-9) and (found - 1) * saved <= training * (1 + 1e-9)


@given(st.sampled_from(pricing.prices()))
def test_a_row_is_found_on_each_of_its_days_only(row: pricing.Price) -> None:
    def cost(on: date) -> float | None:
        try:
            return pricing.price(row.model, row.kind, on).usd
        except PriceError:
            return None

    last = row.until - timedelta(days=1) if row.until else date(2026, 11, 22)
    assert cost(row.since) == row.usd == cost(last)
    assert row.usd is None or row.usd > 0
    assert row.source and row.confidence in ("high", "medium", "low")


def test_periods_of_a_price_do_not_overlap() -> None:
    periods: dict[tuple[str, str], list[pricing.Price]] = {}
    for row in pricing.prices():
        periods.setdefault((row.model, row.kind), []).append(row)
    for rows in periods.values():
        rows.sort(key=lambda row: row.since)
        assert all(a.until and a.until <= b.since for a, b in zip(rows, rows[1:], strict=False)), rows[0]


def test_who_can_start_a_job_and_until_when() -> None:
    def who(on: str) -> str | None:
        found = pricing.availability("gpt-4o-mini", on)
        return found and found.who

    assert who("2026-05-06") == "anyone" and "had run" in str(who("2026-05-07"))
    assert "60 days" in str(who("2026-07-02")) and who("2027-01-06") is None
    found = pricing.availability("gpt-4o-mini", "2026-11-22")
    assert found and found.until == date(2027, 1, 6) and found.base_off == date(2027, 1, 14)


def test_no_dated_fact_is_past_its_review_date() -> None:
    """When this fails: look the facts up, mend their rows in data/, and set a new review date."""
    assert pricing.overdue() == []


def test_facts_that_still_change_have_a_review_date() -> None:
    rows = [*pricing.prices(), *pricing.availabilities()]
    lasting = [row for row in rows if row.until is None or row.until > date(2026, 11, 22)]
    assert lasting and all(row.review for row in lasting)
    assert pricing.overdue("2027-03-01")  # and then they are told


def test_the_local_estimate_is_that_of_the_lab() -> None:
    """957 posts of 245,000 tokens, 4 epochs: the lab took 220 s at about 500 GFLOPS."""
    seconds = pricing.local_seconds(pricing.FileTokens(957, 245_000, 255, 1), 4, 500e9)
    assert 110 < seconds < 440
    assert pricing.local_cost(3600, watts=1000, usd_per_kwh=0.2) == pytest.approx(0.2)


def test_compare_agrees_with_the_single_costs(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(chats(40))
    counted = pricing.measure(file, "gpt-4o-mini")
    table = pricing.compare(file, ["gpt-4o-mini", "gpt-6-luna"], "2026-11-22", requests=1000).set_index(
        ["model", "approach"])
    assert "fine-tuned" not in table.loc["gpt-6-luna"].index
    tuned, few = table.loc["gpt-4o-mini", "fine-tuned"], table.loc["gpt-4o-mini", "few-shot"]
    assert tuned.training_usd == pricing.training_cost("gpt-4o-mini", counted.tokens, 3, "2026-11-22")
    assert tuned.usd_per_1000 == pytest.approx(1000 * pricing.request_cost(
        "gpt-4o-mini", counted.prompt, counted.completion, fine_tuned=True, on="2026-11-22"))
    assert few.prompt_tokens == pytest.approx(counted.prompt * 5 + counted.completion * 4)
    assert tuned.total_usd == pytest.approx(tuned.training_usd + tuned.usd_per_1000)
    n = tuned.break_even
    assert tuned.training_usd + n * tuned.usd_per_1000 / 1000 <= n * few.usd_per_1000 / 1000
    assert "60 days" in tuned.who and tuned.base_off == date(2027, 1, 14)


def test_an_unknown_price_is_missing_in_the_table_and_named_in_the_figure(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(chats())
    table = pricing.compare(file, ["gpt-4-0613", "gpt-3.5-turbo-1106"], "2024-06-01")
    row = table[(table.model == "gpt-4-0613") & (table.approach == "fine-tuned")].iloc[0]
    assert row[["training_usd", "usd_per_1000", "total_usd", "break_even"]].isna().all() and "not known" in row.note
    axes = Figure().subplots()
    plot_costs(table, axes)
    assert "gpt-4-0613, fine-tuned" in axes.get_xlabel()
    assert [line.get_linestyle() for line in axes.lines[:2]] == [":", "--"]
    assert any(line.get_marker() == "x" for line in axes.lines) and "USD" in axes.get_ylabel()


def test_a_file_that_cannot_be_trained_on_has_no_price() -> None:
    with pytest.raises(DataError, match="minimum is 10"):
        pricing.measure(posts(3), "gpt-4o")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "labkit", "cost", *arguments], capture_output=True, text=True,
                          timeout=120)


def test_the_command_prints_a_table_or_json_alone(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(chats())
    told = run(str(file), "--date", "2026-11-22", "--requests", "5000", "--json")
    report = json.loads(told.stdout)
    assert told.returncode == 0 and report["local"]["usd"] > 0 and report["local"]["watts"] == pricing.WATTS
    assert {row["model"] for row in report["rows"]} == {*pricing.tunable("2026-11-22"), "gpt-6-luna"}
    shown = run(str(file), "--model", "gpt-4o", "--date", "2026-11-22")
    assert shown.returncode == 0 and "unknown" in shown.stdout and "a job can be started by" in shown.stdout
    for wrong in ((str(file), "--model", "gpt-9"), ("nowhere.jsonl",), (str(file), "--date", "today")):
        failed = run(*wrong)
        assert failed.returncode == 1 and failed.stderr.startswith("labkit cost:") and not failed.stdout


def test_the_default_models_have_an_encoding() -> None:
    assert all(tokens.encoding_of(row.model) for row in pricing.prices() if "/" not in row.model)
