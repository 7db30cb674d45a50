"""Verdicts and summaries over replicates: the unit is the calibration set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from reprune.errors import ConfigError
from reprune.reporting.fitting import fitting
from reprune.reporting.replicates import arms_of, chosen, summarise, value_by_set
from reprune.reporting.verdict_plot import verdict_plot
from reprune.reporting.verdicts import Claim, RankClaim, judge, unmatched, verdict_table

ERROR = "reconstruction/calibration/web/last"
HELD = "reconstruction/probe/held_out/last"
NUMBERS = st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=2, max_size=12)


def runs(values: dict[str, dict[tuple[int, int], float]], metric: str = ERROR, **more: Any) -> pd.DataFrame:
    """A finished run for each technique, set and training seed."""
    rows = [
        {
            "state": "finished",
            "config/reconstruction.name": name,
            "config/calibration.set": number,
            "config/seed": 0,
            "config/seed_data": 0,
            "config/seed_training": seed,
            "config/output_dir": f"out{number}",
            metric: value,
            **more,
        }
        for name, found in values.items()
        for (number, seed), value in found.items()
    ]
    return pd.DataFrame(rows)


def claim(**given: Any) -> Claim:
    """br against none on the last block's error."""
    arms = {"arm": {"config/reconstruction.name": "br"}, "against": {"config/reconstruction.name": "none"}}
    return Claim(**{"name": "it", "metric": ERROR, "side": "below", **arms, **given})


@given(NUMBERS, st.floats(-5, 5), st.sampled_from(["above", "below"]))
def test_rule_is_the_t_interval_against_the_threshold(
    effects: list[float], threshold: float, side: Any
) -> None:
    """Catches an interval of another level or degree, and a verdict that the interval does not give."""
    found = judge(effects, side, threshold)
    mean, spread = np.mean(effects), np.std(effects, ddof=1)
    half = t.ppf(0.975, len(effects) - 1) * spread / len(effects) ** 0.5
    low, high = mean - half, mean + half
    assert found.num_sets == len(effects)
    assert found.effect == pytest.approx(mean, abs=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)
    assert found.low is not None
    assert found.high is not None
    above, below = found.low > threshold, found.high < threshold
    expected = {"above": (above, below), "below": (below, above)}[side]
    assert found.word == ("holds" if expected[0] else "does not hold" if expected[1] else "cannot say")


@pytest.mark.parametrize("effects", [[], [-3.0]])
def test_one_set_says_nothing(effects: list[float]) -> None:
    """Catches a verdict on a single calibration set."""
    found = judge(effects, "below", 0.0)
    assert found.word == "cannot say"
    assert found.low is None
    assert found.num_sets == len(effects)


def test_effects_are_paired_by_set_with_seeds_averaged_first() -> None:
    """Catches seeds counted as sets, sets that only one arm has, and a difference of means."""
    frame = runs(
        {
            "br": {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 5.0, (3, 0): 100.0},
            "none": {(0, 0): 4.0, (1, 0): 20.0, (2, 0): 7.0},
        }
    )
    assert list(claim().effects(frame)) == [2.0 - 4.0, 5.0 - 20.0]
    assert list(claim(measure="reduction").effects(frame)) == [0.5, 0.75]
    assert list(claim(measure="ratio").effects(frame)) == [0.5, 0.25]
    [row] = verdict_table(frame, [claim(measure="reduction", side="above", threshold=0.5)]).to_dict("records")
    assert (row["sets"], row["effect"], row["verdict"], row["threshold"]) == (2, 0.625, "cannot say", "> 0.5")


def test_unfinished_runs_do_not_count() -> None:
    """Catches a run that died counted with what it has."""
    frame = runs({"br": {(0, 0): 1.0, (1, 0): 1.0}, "none": {(0, 0): 2.0, (1, 0): 3.0}})
    frame.loc[0, "state"] = "killed at block 3"
    assert verdict_table(frame, [claim()])["sets"].tolist() == [1]


def test_runs_of_several_arms_are_no_replicates() -> None:
    """Catches two sparsities averaged into one arm."""
    frame = runs({"br": {(0, 0): 1.0}, "none": {(0, 0): 2.0}}, **{"config/sparsity": 0.5})
    other = runs({"br": {(0, 0): 9.0}}, **{"config/sparsity": 0.7})
    with pytest.raises(ConfigError, match=r"(?s)several arms.*config/sparsity"):
        claim().effects(pd.concat([frame, other], ignore_index=True))
    chosen = {"config/reconstruction.name": "br", "config/sparsity": 0.7}
    assert value_by_set(pd.concat([frame, other], ignore_index=True), chosen, ERROR).tolist() == [9.0]


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        (
            {"metric": "reconstruction/calibration/wbe/last"},
            "did you mean 'reconstruction/calibration/web/last'",
        ),
        ({"arm": {"config/reconstruction.nam": "br"}}, "did you mean 'config/reconstruction.name'"),
    ],
)
def test_claims_about_nothing_are_told(given_: dict[str, Any], words: str) -> None:
    """Catches a slip in a claim that reads as 'cannot say'."""
    frame = runs({"br": {(0, 0): 1.0}, "none": {(0, 0): 2.0}})
    with pytest.raises(ConfigError, match=words):
        verdict_table(frame, [claim(**given_)])


def test_a_star_is_a_geometric_mean_over_texts() -> None:
    """Catches texts of large numbers that rule the mean, a noise column taken for a text, and half a mean."""
    frame = runs({"br": {(0, 0): 2.0}, "none": {(0, 0): 8.0}}, metric="eval/pruned/perplexity/web")
    frame["eval/pruned/perplexity/wiki"] = [8.0, 50.0]
    frame["eval/pruned/perplexity/web/std"] = 1000.0
    frame["eval/pruned/perplexity_noise/web"] = 1000.0
    asked = claim(metric="eval/pruned/perplexity/*", measure="ratio")
    assert asked.effects(frame).tolist() == pytest.approx([4.0 / 20.0])
    frame.loc[0, "eval/pruned/perplexity/wiki"] = np.nan
    assert asked.effects(frame).empty


def test_runs_are_chosen_by_lists_and_by_what_they_lack() -> None:
    """Catches a list compared as a value, and None that matches nothing."""
    frame = runs({name: {(0, 0): 1.0} for name in ("none", "br", "br_gp")})
    frame["config/extra"] = [None, 8.0, 16.0]
    name = "config/reconstruction.name"
    assert chosen(frame, {name: ["none", "br"]})[name].tolist() == ["none", "br"]
    assert chosen(frame, {"config/extra": None})[name].tolist() == ["none"]
    assert chosen(frame, {"config/extra": [8, 16]})[name].tolist() == ["br", "br_gp"]


def test_how_far_values_of_a_column_are_apart() -> None:
    """Catches a spread that falls because the errors do, and sets in which one of the values is missing."""
    near = runs(
        {"br": {(0, 0): 1.0, (1, 0): 1.0}, "none": {(0, 0): 10.0, (1, 0): 10.0}}, **{"choice/pruner": "a"}
    )
    far = runs({"br": {(0, 0): 2.0, (1, 0): 3.0}, "none": {(0, 0): 80.0}}, **{"choice/pruner": "b"})
    frame = pd.concat([near, far], ignore_index=True)
    asked = claim(between="choice/pruner", measure="ratio")
    assert asked.effects(frame).tolist() == pytest.approx([np.log(2) / np.log(8)])
    assert claim(between="choice/pruner").effects(near).empty
    with pytest.raises(ConfigError, match="did you mean 'choice/pruner'"):
        claim(between="choice/prunner").effects(frame)
    third = runs({"none": {(0, 0): 800.0}}, **{"choice/pruner": "c"})
    assert asked.effects(pd.concat([frame, third], ignore_index=True)).empty, "no spread of two against three"


def test_sets_that_lack_an_arm_are_not_ranked() -> None:
    """Catches a set in the middle of a sweep whose rank correlation is of fewer arms."""
    values = {f"t{arm}": {(0, 0): arm, (1, 0): arm} for arm in range(4)}
    frame = runs(values).assign(**{"choice/pattern": "p", "choice/pruner": "p"})
    frame["choice/reconstruction"] = frame["config/reconstruction.name"]
    asked = RankClaim(name="it", metric=ERROR, ranks_as=ERROR, among={}, side="above")
    assert len(asked.effects(frame)) == 2
    assert len(asked.effects(frame[:-1])) == 1


def test_claims_on_runs_that_are_not_there_are_told() -> None:
    """Catches a slip in a value, which reads as 'cannot say' of a sweep that is not through."""
    frame = runs({"br": {(0, 0): 1.0}, "none": {(0, 0): 2.0}})
    assert unmatched(frame, [claim()]) == []
    [told] = unmatched(frame, [claim(arm={"config/reconstruction.name": "brr"})])
    assert "it: no finished run has config/reconstruction.name=brr" in told


def test_seeds_of_one_draw_are_one_set() -> None:
    """Catches training seeds that pass for calibration sets, and sets of a mixture's parts that pass for one."""
    frame = runs(
        {"br": {(0, seed): 1.0 + seed for seed in range(3)}, "none": {(0, seed): 2.0 for seed in range(3)}}
    )
    frame["config/seed"] = frame["config/seed_training"]
    assert len(claim().effects(frame)) == 1
    frame["config/calibration.parts.web.set"] = frame["config/seed_training"]
    assert len(claim().effects(frame)) == 3


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=7))
def test_ranks_are_held_against_another_computation(values: list[tuple[int, int, int]]) -> None:
    """Catches ranks over sets instead of within them, and ties ranked by their order."""
    table = pd.DataFrame(values, columns=["x", "y", "z"]).astype(float)
    rows = [
        {"state": "finished", "choice/reconstruction": f"t{arm}", "choice/pattern": "p", "choice/pruner": "p", "config/reconstruction.name": f"t{arm}",
         "config/calibration.set": number, "x": row["x"], "y": row["y"] + 100 * number, "z": row["z"]}
        for number in (0, 1) for arm, row in table.iterrows()
    ]  # fmt: skip
    asked = {"name": "it", "metric": "x", "ranks_as": "y", "among": {}, "side": "above"}
    frame = pd.DataFrame(rows)
    ranks = table.rank()
    expected = {(a, b): ranks[a].corr(ranks[b]) for a, b in (("x", "y"), ("z", "y"))}
    plain = RankClaim(**asked).effects(frame)
    assert plain.tolist() == pytest.approx([r for r in [expected["x", "y"]] * 2 if not np.isnan(r)])
    gain = expected["x", "y"] - expected["z", "y"]
    rather = RankClaim(**asked, rather_than="z").effects(frame)
    assert rather.tolist() == pytest.approx([g for g in [gain] * 2 if not np.isnan(g)])
    [row] = verdict_table(frame, [RankClaim(**asked)]).to_dict("records")
    assert (row["metric"], row["measure"]) == ("x ~ y", "rank correlation")


def test_fit_to_the_calibration_text_is_flagged_only_beyond_noise() -> None:
    """Catches a flag where both errors fall, one that noise raises, pairs the wrong way, and other sets paired."""

    def told(held: list[float]) -> dict[str, Any]:
        sets = range(4)
        frame = runs({"br": {(n, 0): 1.0 + n / 100 for n in sets}, "none": {(n, 0): 2.0 for n in sets}})
        frame["choice/reconstruction"] = frame["config/reconstruction.name"]
        frame["choice/pruner"] = frame["choice/pattern"] = "any"
        frame[HELD] = [*held, *([3.0] * 4)]
        # The order of runs pairs nothing.
        table = fitting(frame.sample(frac=1, random_state=0))
        assert len(table) == 1
        [row] = table.to_dict("records")
        assert (row["arm"], row["against"], row["sets"]) == ("br", "none", 4)
        assert row["calibration_change"] == pytest.approx(1.015 / 2 - 1)
        assert row["held_out_change"] == pytest.approx(sum(held) / 4 / 3 - 1)
        return row

    assert told([4.0, 4.1, 3.9, 4.2])["verdict"] == "fits the calibration text"
    assert told([2.0, 2.1, 1.9, 2.2])["verdict"] == "does not"
    assert told([4.0, 2.1, 3.9, 2.2])["verdict"] == "cannot say"


def test_verdicts_are_drawn() -> None:
    """Catches claims that fall out of the figure, effects of several measures on one scale, and a figure of nothing."""
    frame = runs({"br": {(0, 0): 1.0, (1, 0): 1.5}, "none": {(0, 0): 2.0, (1, 0): 4.0}})
    asked = [claim(), claim(name="other", measure="reduction"), claim(name="none", arm={"config/seed": 7})]
    plot = verdict_plot(verdict_table(frame, asked))
    assert plot.figure is not None
    assert [[label.get_text() for label in axis.get_yticklabels()] for axis in plot.figure.axes] == [
        ["it"],
        ["other"],
    ]
    intervals = [line for axis in plot.figure.axes for line in axis.lines if len(line.get_xdata()) == 2]
    table = verdict_table(frame, asked).dropna(subset="low")
    assert [tuple(line.get_xdata()) for line in intervals] == list(
        zip(table["low"], table["high"], strict=True)
    )
    assert verdict_plot(verdict_table(frame, asked[2:])).figure is None


def test_sets_of_a_mixtures_parts_make_no_arm() -> None:
    """Catches replicates that fall apart because each has other text of the same kind beside it."""
    frame = runs({"br": {(0, 0): 1.0, (1, 0): 2.0}})
    frame["config/reconstruction_data.parts.other.set"] = [5, 6]
    frame["config/reconstruction_data.parts.other.num_sequences"] = [8, 8]
    assert arms_of(frame) == []
    frame["config/reconstruction_data.parts.other.num_sequences"] = [8, 16]
    assert arms_of(frame) == ["config/reconstruction_data.parts.other.num_sequences"]


def test_summary_is_over_sets() -> None:
    """Catches a spread over all runs, a spread of one, and columns that make no other arm."""
    frame = runs({"br": {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 4.0}, "none": {(0, 0): 7.0}})
    assert arms_of(frame) == ["config/reconstruction.name"]
    table = summarise(frame, [ERROR]).set_index("config/reconstruction.name")
    assert table.loc["br", ["runs", "sets", ERROR]].tolist() == [3, 2, 3.0]
    assert table.loc["br", f"{ERROR} std"] == pytest.approx(2**0.5)
    assert table.loc["none", ["runs", "sets", ERROR]].tolist() == [1, 1, 7.0]
    assert pd.isna(table.loc["none", f"{ERROR} std"])
