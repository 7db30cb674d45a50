"""Plots and the numbers they show: drawn from real tiny runs and copies of them, checked by hand and by brute force."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

import reprune
from helpers import SWEEP_SETS
from reprune.reporting.downstream import correlations, downstream, rank_correlations, resampled_interval
from reprune.reporting.drawing import MOST_ARMS, NothingToDrawError, Runs, draw_all, save, svg_of
from reprune.reporting.gap import gaps
from reprune.reporting.plots import change_against_none
from reprune.reporting.plots.pareto import pareto_front
from reprune.reporting.plots.sparsity_by_layer import layer_sparsities
from reprune.reporting.replicates import arm_names

CALIBRATION = "reconstruction/calibration/vocabulary/last"
HELD_OUT = "reconstruction/probe/held_out/last"


def test_every_plot_is_drawn_and_written_twice(sweep: Path, tmp_path: Path) -> None:
    """Catches a plot that real run folders cannot make, one without a caption, and a picture that is none."""
    plots = list(draw_all(Runs.of(reprune.results(sweep))))
    assert {plot.name for plot in plots} == {
        "error_by_block", "calibration_and_held_out", "error_and_downstream", "gap_by_samples", "pareto",
        "learning_curves", "sparsity_by_layer", "change_against_none", "essential_sparsity",
    }  # fmt: skip
    for plot in plots:
        if plot.name == "essential_sparsity":
            # Its runs are in test_knee: these have one sparsity.
            assert plot.figure is None
            continue
        assert plot.figure is not None, f"{plot.name}: {plot.reason}"
        assert len(plot.caption) > 20
        save(plot.figure, tmp_path / plot.name)
        assert (tmp_path / f"{plot.name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{plot.name}.pdf").read_bytes().startswith(b"%PDF")
        picture = svg_of(plot.figure, plot.name)
        assert picture.startswith("<svg")
        assert "currentColor" in picture


def test_what_one_run_cannot_show_is_said(sweep: Path) -> None:
    """Catches a report that fails, or leaves a plot out without a word, where there is only one run."""
    frame = reprune.results(sweep)
    [only] = frame.index[(frame["choice/reconstruction"] == "none")][:1]
    plots = {plot.name: plot for plot in draw_all(Runs.of(frame.loc[[only]]))}
    left_out = {name for name, plot in plots.items() if plot.figure is None}
    assert left_out == {
        "calibration_and_held_out",
        "error_and_downstream",
        "gap_by_samples",
        "pareto",
        "learning_curves",
        "change_against_none",
        "essential_sparsity",
    }
    assert all(plots[name].reason and "\n" not in plots[name].reason for name in left_out)


def test_points_of_the_plots_are_the_runs_numbers(sweep: Path) -> None:
    """Catches axes that are exchanged and runs that are not drawn."""
    frame = reprune.results(sweep)
    figure = next(plot.figure for plot in draw_all(Runs.of(frame)) if plot.name == "calibration_and_held_out")
    assert figure is not None
    [axis] = figure.axes
    drawn = np.concatenate([points.get_offsets() for points in axis.collections])
    expected = frame[[CALIBRATION, HELD_OUT]].to_numpy(float)
    assert np.array(sorted(drawn.tolist())) == pytest.approx(np.array(sorted(expected.tolist())))


def run_row(technique: str, set_: int, calibration: float, held_out: float, **more: Any) -> dict[str, Any]:
    """A finished run's row with the columns that gap and correlations read."""
    return {
        "id": f"{technique}{set_}{more}", "state": "finished", "choice/reconstruction": technique,
        "choice/pruner": "wanda", "choice/pattern": "unstructured", "config/reconstruction.epochs": len(technique),
        "config/calibration.set": set_, "config/seed": 0, "config/pruner.x": None, "config/output_dir": technique,
        "reconstruction/calibration/web/last": calibration, "reconstruction/probe/wiki/last": held_out,
        "reconstruction_sequences": 8, **more,
    }  # fmt: skip


def test_gap_by_hand() -> None:
    """Catches a gap upside down, and runs paired across calibration sets, seeds or pruners."""
    rows = [
        run_row("none", 0, 10.0, 20.0),
        run_row("none", 1, 1000.0, 7.0),
        run_row("br", 0, 2.0, 12.0),
        # held-out 6/7 of what it was, calibration a half: 12/7.
        run_row("br", 1, 500.0, 6.0),
        run_row("br", 0, 3.0, 3.0, **{"config/seed": 1}),
        run_row("br", 0, 3.0, 3.0, **{"choice/pruner": "magnitude", "config/pruner.x": 1.0}),
    ]
    found = gaps(pd.DataFrame(rows))
    assert list(found["gap"]) == pytest.approx([(12 / 20) / (2 / 10), (6 / 7) / (500 / 1000)])
    assert set(found["calibration"]) == {"web"}
    assert set(found["held_out"]) == {"wiki"}
    assert list(found["sequences"]) == [8, 8]


def test_changes_against_none_by_hand() -> None:
    """Catches a change against another set's or another pruner's `none`, and rows in an order that says nothing."""
    rows = [
        run_row("none", 0, 10.0, 20.0),
        run_row("none", 1, 100.0, 10.0),
        run_row("br_gp", 0, 2.0, 12.0),
        run_row("br_gp", 1, 30.0, 11.0),
        run_row("br", 0, 5.0, 21.0),
        run_row("br", 1, 50.0, 10.0),
        # Without a `none` of its own pruner.
        run_row("br", 0, 3.0, 3.0, **{"choice/pruner": "magnitude", "config/pruner.x": 1.0}),
    ]
    figure = change_against_none.draw(Runs.of(pd.DataFrame(rows)))
    calibration, held_out = figure.axes
    assert [label.get_text() for label in calibration.get_yticklabels()] == ["wanda br", "wanda br_gp"]
    drawn = [sorted(points.get_offsets()[:, 0].tolist()) for points in calibration.collections]
    assert drawn == [pytest.approx([-50, -50]), pytest.approx([-80, -70])]
    drawn = [sorted(points.get_offsets()[:, 0].tolist()) for points in held_out.collections]
    assert drawn == [pytest.approx([0, 5]), pytest.approx([-40, 10])]
    with pytest.raises(NothingToDrawError):
        change_against_none.draw(Runs.of(pd.DataFrame(rows[2:])))


def test_gap_needs_the_same_probe() -> None:
    """Catches errors on two different texts of one name that are divided by each other."""
    rows = [
        run_row("none", 0, 10.0, 20.0, **{"config/probes.wiki.length": 64}),
        run_row("br", 0, 2.0, 12.0, **{"config/probes.wiki.length": 128}),
    ]
    assert gaps(pd.DataFrame(rows)).empty
    rows[1]["config/probes.wiki.length"] = 64
    rows[1]["config/probes.code.length"] = 128
    assert list(gaps(pd.DataFrame(rows))["gap"]) == pytest.approx([3.0])


def test_correlations_are_scipys_and_their_interval_draws_whole_sets() -> None:
    """Catches ranks of the wrong column, and an interval that treats runs of one set as independent."""
    stream = np.random.default_rng(3)
    rows = []
    for set_ in range(6):
        # What a set does to all of its runs is more than what the technique does.
        shift = stream.normal(scale=3)
        for technique in ("none", "br", "br_gp"):
            error = float(np.exp(shift + stream.normal()))
            row = run_row(
                technique,
                set_,
                error,
                error * 2,
                **{"eval/pruned/perplexity/a": error ** stream.uniform(0, 1)},
            )
            rows.append(row)
    frame = pd.DataFrame(rows)
    found = correlations(frame).set_index(["error", "technique"])
    x, y = frame["reconstruction/calibration/web/last"], frame["eval/pruned/perplexity/a"]
    pooled = found.loc[("calibration", "pooled")]
    assert pooled["rho"] == pytest.approx(spearmanr(x, y).statistic)
    br = frame["choice/reconstruction"] == "br"
    assert found.loc[("held-out", "br"), "rho"] == pytest.approx(spearmanr(x[br], y[br]).statistic)
    assert (pooled["runs"], pooled["sets"]) == (18, 6)
    brute = []
    for _ in range(1000):
        drawn = np.concatenate(
            [np.flatnonzero(frame["config/calibration.set"] == s) for s in stream.integers(6, size=6)]
        )
        brute.append(spearmanr(x[drawn], y[drawn]).statistic)
    assert (pooled["low"], pooled["high"]) == pytest.approx(
        tuple(np.nanquantile(brute, [0.025, 0.975])), abs=0.06
    )
    assert correlations(frame).equals(correlations(frame))


def test_sets_of_different_sizes_and_too_few_sets() -> None:
    """Catches draws that are cut to one length, and an interval from two sets."""
    x, y = np.arange(7.0), np.array([0.0, 2, 1, 3, 5, 4, 6])
    low, high = resampled_interval(x, y, np.array([0, 0, 0, 1, 2, 2, 2]))
    assert low is not None
    assert high is not None
    assert 0.2 < low < high <= 1
    assert resampled_interval(x, y, np.array([0, 0, 0, 1, 1, 1, 1])) == (None, None)
    drawn = np.random.default_rng(0).integers(7, size=(5, 7))
    expected = [spearmanr(x[rows], y[rows]).statistic for rows in drawn]
    assert rank_correlations(x[drawn], y[drawn]) == pytest.approx(expected)


def test_downstream_compares_what_all_runs_have() -> None:
    """Catches a mean over texts that only some runs were evaluated on."""
    rows = [
        {"eval/pruned/perplexity/a": 4.0, "eval/pruned/perplexity/b": 9.0, "eval/pruned/perplexity/c": 100.0},
        {"eval/pruned/perplexity/a": 1.0, "eval/pruned/perplexity/b": 16.0},
        {"eval/pruned/zero_shot/t/acc": 0.5},
    ]
    found = downstream(pd.DataFrame(rows))
    assert list(found["perplexity"][:2]) == pytest.approx([6.0, 4.0])
    assert np.isnan(found["perplexity"][2])
    assert found["acc"][2] == 0.5


def test_pareto_front_by_brute_force() -> None:
    """Catches a front with a beaten arm, or without an unbeaten one."""
    points = pd.DataFrame(np.random.default_rng(1).integers(0, 8, size=(30, 2)), columns=["cost", "quality"])
    front = set(map(tuple, pareto_front(points.drop_duplicates()).to_numpy().tolist()))
    every = set(map(tuple, points.to_numpy().tolist()))
    unbeaten = {p for p in every if not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in every)}
    assert front == unbeaten


def test_sparsity_of_experts_is_weighted() -> None:
    """Catches a mean of shares where layers have different sizes."""
    layers = {"experts.0.up": {"weights": 10, "removed": 10}, "experts.1.up": {"weights": 30, "removed": 0}}
    table = layer_sparsities([{"block": 2, "layers": layers}])
    assert table.loc["experts.*.up", 2] == 0.25


def test_arms_are_named_apart(sweep: Path) -> None:
    """Catches two arms under one name, replicates under two, and an arm without a key that another has under none."""
    frame = reprune.results(sweep)
    assert set(arm_names(frame)) == {"none", "br_gp"}
    for value in (0.95, "some", True):
        other = frame.assign(**{"config/allocation.at_most": [value, *[None] * (len(frame) - 1)]})
        names = arm_names(other)
        assert names[0].endswith(f" at_most={value}")
        assert names.notna().all()
        assert names.nunique() == 3
    frame.loc[0, "config/reconstruction.learning_rate"] = 0.125
    assert arm_names(frame).nunique() == 3
    assert arm_names(frame)[0].endswith(" learning_rate=0.125")
    many = pd.concat([frame] * 3, ignore_index=True)
    many["config/pruner.damp"] = np.arange(len(many))
    assert arm_names(many).nunique() == len(many) > MOST_ARMS
    assert set(Runs.of(many).arms) == {"none", "br_gp"}


def test_the_transform_is_named_where_runs_differ_in_it(tmp_path: Path) -> None:
    """Catches two models under one name, `none` as a word, and a word for what all runs share."""
    chosen = ["block_drop", "none", None, "vocabulary"]
    rows = [
        {**run_row("br", 0, 1.0, 1.0), "id": f"run{n}", "config_hash": f"{n}0000hash", "choice/transform": option,
         "config/transform.count": 2.0 if option == "block_drop" else None}
        for n, option in enumerate(chosen)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    assert arm_names(frame).tolist() == ["block_drop br", "br", "br", "vocabulary br"]
    frame.to_csv(tmp_path / "kept.csv", index=False)
    labels = reprune.results(tmp_path / "kept.csv")["label"]
    assert labels.tolist() == ["block_drop br", "br 10000", "br 20000", "vocabulary br"]
    for option in ("none", "vocabulary"):
        assert set(arm_names(frame.assign(**{"choice/transform": option, "config/transform.count": 1}))) == {
            "br"
        }


def test_results_from_python(sweep: Path) -> None:
    """Catches `import reprune` that drags pandas in, and a name that is not there passing silently."""
    told = "import reprune, sys; print('pandas' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]  # fmt: skip
    assert len(reprune.results(sweep)) == 2 * SWEEP_SETS
    with pytest.raises(AttributeError):
        reprune.no_such_name  # noqa: B018
