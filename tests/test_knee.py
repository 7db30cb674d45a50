"""Essential sparsity: the knee of hand-made curves, and of real tiny runs through to the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import reprune
from helpers import perplexity_on, run_tiny, write_documents
from reprune.reporting import cli, report
from reprune.reporting.drawing import NothingToDrawError, Plot, Runs
from reprune.reporting.knee import AT_FIRST, BETWEEN, NOT_REACHED, curves, knees
from reprune.reporting.plots import essential_sparsity

PERPLEXITY = "eval/{}/perplexity/{}"


def row(sparsity: float | None, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    """A finished run's row; the measured sparsity is a little off what was asked for."""
    return {
        "id": str((sparsity, metrics, more)), "state": "finished", "choice/reconstruction": "none",
        "choice/pruner": "magnitude", "choice/pattern": "unstructured", "choice/model": "m",
        "config/pruner._target_": "Magnitude", "config/sparsity": sparsity, "sparsity": (sparsity or 0.5) + 0.001,
        "config/calibration.set": 0, "config/seed_data": 0, "config/seed_training": 0, **metrics, **more,
    }  # fmt: skip


def at(sparsity: float | None, cost: float, **more: Any) -> dict[str, Any]:
    """A run whose perplexity on one text is `cost` above the dense model's."""
    return row(
        sparsity,
        {PERPLEXITY.format("dense", "web"): 20.0, PERPLEXITY.format("pruned", "web"): 20 * (1 + cost)},
        **more,
    )


def curve_of(costs: Sequence[float], **more: Any) -> list[dict[str, Any]]:
    """A run at 10 %, 20 %, …"""
    return [at((number + 1) / 10, cost, **more) for number, cost in enumerate(costs)]


def knees_of(rows: Sequence[dict[str, Any]], tolerance: float = 0.01) -> pd.DataFrame:
    """The table of these runs."""
    return knees(curves(pd.DataFrame(rows)), tolerance)


@pytest.mark.parametrize(
    ("costs", "knee", "below", "above", "returns"),
    [
        ((-0.001, 0.004, 0.009, 0.012, 0.3), BETWEEN, 0.301, 0.401, False),
        # The first crossing counts, though 40 % costs little again.
        ((0.001, 0.002, 0.011, 0.009, 0.2), BETWEEN, 0.201, 0.301, True),
        ((0.02, 0.03, 0.1), AT_FIRST, None, 0.101, False),
        ((0.02, 0.001, 0.1), AT_FIRST, None, 0.101, True),
        ((-0.01, 0.001, 0.0099), NOT_REACHED, 0.301, None, False),
    ],
)
def test_knee_by_hand(
    costs: Sequence[float], knee: str, below: float | None, above: float | None, returns: bool
) -> None:
    """Catches a value between sparsities nobody measured, the last crossing, a knee where there is none, and an order of rows that counts."""
    for rows in (curve_of(costs), curve_of(costs)[::-1]):
        [found] = knees_of(rows).to_dict("records")
        assert found["knee"] == knee
        for name, expected in (("below", below), ("above", above)):
            assert pd.isna(found[name]) if expected is None else found[name] == pytest.approx(expected)
            cost = None if expected is None else costs[round(expected * 10) - 1]
            told = found[f"cost_{name}"]
            assert pd.isna(told) if cost is None else told == pytest.approx(cost)
        assert found["returns"] is returns
        assert (found["sparsities"], found["sets"], found["sets_agree"]) == (len(costs), 1, 1)
        assert (found["metric"], found["over"], found["tolerance"]) == ("perplexity", "web", 0.01)


def test_tolerance_is_a_parameter() -> None:
    """Catches a threshold that is fixed, and one read in percent."""
    rows = curve_of((0.001, 0.03, 0.06, 0.2))
    assert knees_of(rows, 0.05)["above"].item() == pytest.approx(0.301)
    assert knees_of(rows, 0.0005)["knee"].item() == AT_FIRST
    assert knees_of(rows, 1.0)["knee"].item() == NOT_REACHED


def test_seeds_are_averaged_within_sets_and_sets_within_arms() -> None:
    """Catches replicates that make curves of their own, and seeds that weigh as much as sets."""
    rows = [
        *curve_of((0.0, 0.0, 0.02)),
        *curve_of((0.0, 0.0, 0.04), **{"config/seed_training": 1}),
        # A set that crosses earlier: the mean at 20 % is (0 + 0.018) / 2 with two sets, 0.006 over three runs.
        *curve_of((0.0, 0.018, 0.05), **{"config/calibration.set": 1}),
    ]
    [found] = knees_of(rows).to_dict("records")
    assert (found["below"], found["above"]) == pytest.approx((0.201, 0.301))
    assert (found["cost_below"], found["cost_above"]) == pytest.approx((0.009, (0.03 + 0.05) / 2))
    assert (found["sparsities"], found["sets"], found["sets_agree"]) == (3, 2, 1)


def test_otherwise_equal_runs_make_a_curve() -> None:
    """Catches pruners, models or reconstructions in one curve, and what changes no number that splits one."""
    rows = [
        *curve_of((0.0, 0.0, 0.02)),
        *curve_of((0.0, 0.02, 0.03), **{"choice/pruner": "wanda", "config/pruner._target_": "Wanda"}),
        *curve_of((0.02, 0.2, 0.3), **{"config/model.name": "other"}),
    ]
    for number, one in enumerate(rows):
        one["config/output_dir"] = str(number)
    table = knees_of(rows)
    told = dict(zip(table["arm"], table["knee"], strict=True))
    assert told == {
        "magnitude none name=null": BETWEEN,
        "wanda none": BETWEEN,
        "magnitude none name=other": AT_FIRST,
    }
    assert list(table["above"]) == pytest.approx([0.301, 0.201, 0.101])
    assert all("sparsity" not in name for name in table["arm"])


def test_what_makes_no_curve() -> None:
    """Catches a knee of two sparsities, of runs that removed nothing or did not finish, and of models without a dense number."""
    whole = curve_of((0.0, 0.005, 0.02))
    assert len(knees_of(whole)) == 1
    unfinished = [*whole[:2], {**whole[2], "state": "failed"}]
    replicates = [*whole[:2], at(0.2, 0.5, **{"config/calibration.set": 1})]
    removed_nothing = [{**one, "sparsity": 0.0} for one in whole]
    without_dense = [{**one, PERPLEXITY.format("dense", "web"): None} for one in whole]
    never_dense = [
        {key: value for key, value in one.items() if not key.startswith("eval/dense")} for one in whole
    ]
    for rows in (whole[:2], unfinished, replicates, removed_nothing, without_dense, never_dense):
        table = knees_of(rows)
        assert table.empty
        assert {"knee", "below", "above"} <= set(table)
        with pytest.raises(NothingToDrawError):
            essential_sparsity.draw(Runs.of(pd.DataFrame(rows)))


def test_a_run_without_a_number_is_no_point() -> None:
    """Catches a run that failed to evaluate taken for one that costs nothing, or for one that costs all."""
    rows = curve_of((0.0, 0.005, 0.0, 0.02, 0.5))
    rows[2][PERPLEXITY.format("pruned", "web")] = None
    rows[4][PERPLEXITY.format("dense", "web")] = None
    [found] = knees_of(rows).to_dict("records")
    assert (found["below"], found["above"], found["sparsities"]) == (pytest.approx(0.201), pytest.approx(0.401), 3)  # fmt: skip


def test_texts_and_tasks_that_all_runs_have() -> None:
    """Catches a mean over other texts at another sparsity, an arithmetic mean of perplexities, accuracy upside down."""
    rows = []
    for sparsity, factor, lost in ((0.1, 1.0, 0.0), (0.2, 1.02, 0.004), (0.3, 1.5, 0.2)):
        metrics = {PERPLEXITY.format("dense", "a"): 10.0, PERPLEXITY.format("pruned", "a"): 10.0 * factor}
        metrics |= {PERPLEXITY.format("dense", "b"): 1000.0, PERPLEXITY.format("pruned", "b"): 1000.0}
        # Only the pruned model, or only one run, has these.
        metrics |= {PERPLEXITY.format("pruned", "c"): 5.0, "eval/pruned/fidelity/a/kl": 0.1}
        if sparsity == 0.3:
            metrics |= {PERPLEXITY.format("dense", "d"): 1.0, PERPLEXITY.format("pruned", "d"): 50.0}
        for task, dense in (("x", 0.6), ("y", 0.4)):
            metrics |= {f"eval/dense/zero_shot/{task}/acc": dense}
            metrics |= {f"eval/pruned/zero_shot/{task}/acc": dense - lost}
        rows.append(row(sparsity, metrics))
    table = knees_of(rows).set_index("metric")
    assert list(table.index) == ["perplexity", "acc"]
    assert dict(table["over"]) == {"perplexity": "a, b", "acc": "x, y"}
    # √1.02 − 1 is 0.995 %: below 1 %.
    assert table.loc["perplexity", "cost_below"] == pytest.approx(1.02**0.5 - 1)
    assert table.loc["perplexity", "cost_above"] == pytest.approx(1.5**0.5 - 1)
    assert table.loc["acc", "cost_below"] == pytest.approx(1 - 0.992 / 1)
    assert table.loc["acc", "cost_above"] == pytest.approx(1 - 0.6 / 1)
    assert list(table["below"]) == pytest.approx([0.201, 0.201])


def test_null_is_the_sparsity_that_was_measured() -> None:
    """Catches a run at the pattern's own sparsity that is no point, or one of its own beside that of the same number."""
    other = {"config/calibration.set": 1}
    rows = [*curve_of((0.0, 0.004)), *curve_of((0.0, 0.004), **other), at(None, 0.03), at(0.5, 0.05, **other)]
    rows[4]["sparsity"], rows[5]["sparsity"] = 0.50004, 0.5
    [found] = knees_of(rows).to_dict("records")
    assert (found["sparsities"], found["above"], found["cost_above"]) == pytest.approx((3, 0.50002, 0.04))


def test_sets_that_lack_a_sparsity_are_no_part_of_the_curve() -> None:
    """Catches a knee that is only another mix of sets at one point, in a sweep that is not finished."""
    other = {"config/calibration.set": 1}
    rows = [*curve_of((0.001, 0.002, 0.02)), at(0.1, 0.5, **other)]
    assert knees_of(rows).to_dict("records")[0]["above"] == pytest.approx(0.301)


def test_plot_shows_the_measured_points() -> None:
    """Catches exchanged axes, the sparsity that was asked for, and an interval that is not the table's."""
    rows = [*curve_of((0.001, 0.002, 0.02)), *curve_of((0.003, 0.004, 0.04), **{"config/seed_data": 1})]
    [axis] = essential_sparsity.draw(Runs.of(pd.DataFrame(rows))).axes
    mean, tolerance = axis.lines
    assert mean.get_xdata() == pytest.approx([10.1, 20.1, 30.1])
    assert mean.get_ydata() == pytest.approx([0.2, 0.3, 3])
    assert set(tolerance.get_ydata()) == {1.0}
    [points] = axis.collections
    assert sorted(points.get_offsets()[:, 1]) == pytest.approx([0.1, 0.2, 0.3, 0.4, 2, 4])
    [span] = axis.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == pytest.approx((20.1, 30.1))
    [axis] = essential_sparsity.draw(Runs.of(pd.DataFrame(rows), tolerance=0.0025)).axes
    assert axis.patches[0].get_x() == pytest.approx(10.1)
    [axis] = essential_sparsity.draw(Runs.of(pd.DataFrame(rows), tolerance=1.0)).axes
    assert not axis.patches


def test_from_runs_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches names of metrics that runs do not give, a report without the table or its picture, a tolerance that is not passed on."""
    write_documents(tmp_path / "text.jsonl")
    choices = ["pruner=magnitude", "allocation=global_magnitude", "reconstruction=none", "reconstruction.epochs=0"]  # fmt: skip
    expected = {}
    for sparsity in (0.1, 0.5, 0.9):
        given = [*choices, f"sparsity={sparsity}", *perplexity_on(mine=tmp_path / "text.jsonl")]
        _, result = run_tiny(tmp_path / "runs", *given)
        metrics = result["metrics"]
        cost = metrics["eval/pruned/perplexity/mine"] / metrics["eval/dense/perplexity/mine"] - 1
        expected[result["sparsity"]["total"]] = cost
    found = curves(reprune.results(tmp_path / "runs"))
    assert dict(zip(found["sparsity"], found["cost"], strict=True)) == pytest.approx(expected)
    # The other plots of a report take seconds.
    plot = lambda runs: [Plot("essential_sparsity", "what it shows", essential_sparsity.draw(runs))]  # noqa: E731
    monkeypatch.setattr(report, "draw_all", plot)
    out = tmp_path / "out"
    arguments = ["reprune-report", str(tmp_path / "runs"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*arguments, "--tolerance", "1e9"])
    cli.main()
    table = pd.read_csv(out / "essential_sparsity.csv")
    assert (table["knee"].item(), table["below"].item()) == (NOT_REACHED, pytest.approx(max(expected)))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="knees"' in page
    assert 'id="essential_sparsity"' in page
    assert (out / "essential_sparsity.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", [*arguments, "--tolerance", "0"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
