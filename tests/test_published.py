"""Published numbers beside ours, and the report where W&B shows it."""

from __future__ import annotations

import shutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from helpers import make_sweep, plan_of, wandb_records
from reprune import config_files
from reprune.compose import Composed, compose_run
from reprune.config_files import options_of, published_tables
from reprune.errors import ConfigError
from reprune.reporting import cli
from reprune.reporting.frame import results
from reprune.reporting.published import ARM, beside_published, read_published, source_of

METRIC = "reconstruction/calibration/vocabulary/last"
TABLE = f"""# Somebody et al., Table 7
choice/pruner,choice/reconstruction,{METRIC},eval/pruned/perplexity/unheard_of
sparsegpt,none,2.0,7.0
sparsegpt,br_gp,1.5,6.0
wanda,none,9.0,9.0
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """none and br_gp on four calibration sets."""
    return make_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def declared(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same runs, of an experiment that names a published table."""
    (tmp_path / "experiments" / "published").mkdir(parents=True)
    (tmp_path / "experiments" / "published" / "mine.csv").write_text(TABLE, encoding="utf-8")
    monkeypatch.setattr(config_files, "config_root", lambda: tmp_path)
    target = tmp_path / "runs"
    shutil.copytree(runs, target)
    for path in target.glob("*/config.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump({**config, "published": "mine"}), encoding="utf-8")
    return target


def test_ours_beside_theirs(declared: Path) -> None:
    """Catches a number beside one of another arm, a mean over something else than sets, and a difference the wrong way."""
    table = beside_published(results(declared))
    assert list(table["reconstruction"]) == ["none", "br_gp"], "what only they have, or only we, is in no row"
    frame = results(declared)
    for row, published in zip(table.to_dict("records"), (2.0, 1.5), strict=True):
        ours = frame.loc[frame["choice/reconstruction"] == row["reconstruction"], METRIC]
        assert row["metric"] == METRIC
        assert row["ours"] == pytest.approx(ours.mean(), rel=1e-12)
        assert row["std"] == pytest.approx(ours.std(ddof=1), rel=1e-12)
        assert row["sets"] == len(ours) == 4
        assert row["published"] == published
        assert row["difference"] == row["ours"] - published
        assert row["source"] == "Somebody et al., Table 7"


def test_runs_that_name_no_table(runs: Path) -> None:
    """Catches a report that needs one."""
    assert beside_published(results(runs)).empty


def test_in_the_report(declared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison that is computed and shown nowhere."""
    monkeypatch.setattr(sys, "argv", ["reprune-report", str(declared), "--out", str(tmp_path / "out")])
    cli.main()
    told = pd.read_csv(tmp_path / "out" / "published.csv")
    assert list(told["published"]) == [2.0, 1.5]
    for name in ("published.md", "published.tex", "report.html"):
        assert "Somebody et al., Table 7" in (tmp_path / "out" / name).read_text(encoding="utf-8")


def test_arms_by_key(declared: Path, tmp_path: Path) -> None:
    """Catches arms of one technique that only a key of the config tells apart, all beside one published number."""
    text = f"# Somebody\nconfig/targets,choice/reconstruction,{METRIC}\nall,br_gp,1.5\nmlp,br_gp,1.25\nmlp,none,2.5\n"
    (tmp_path / "experiments" / "published" / "mine.csv").write_text(text, encoding="utf-8")
    frame = results(declared)
    frame.loc[frame["choice/reconstruction"] == "none", "config/targets"] = "mlp"
    table = beside_published(frame)
    assert table[["targets", "reconstruction", "published", "sets"]].to_numpy().tolist() == [
        ["all", "br_gp", 1.5, 4],
        ["mlp", "none", 2.5, 4],
    ]


@lru_cache
def _naming_a_table() -> list[Composed]:
    """Every experiment whose runs name a table, also where it takes the name over from another experiment."""
    composed = [compose_run([f"experiments={name}"]) for name in options_of("experiments")]
    return [it for it in composed if it.config["published"] is not None]


def _runs(experiment: Composed, column: str) -> set[str]:
    """What the runs of an experiment have in a column that tells arms apart."""
    kind, _, key = column.partition("/")
    fixed = experiment.choices if kind == "choice" else experiment.config
    return set(str(experiment.hydra["params"].get(key, fixed[key])).split(","))


def _metrics(experiment: Composed) -> set[str]:
    """Names of what the runs of an experiment measure, as far as a published number may stand beside it."""
    config = experiment.config
    texts = config["evaluation"].get("field", {}).get("texts", [])
    tasks = [*config["evaluation"].get("zero_shot", {}).get("tasks", []), "mean"]
    evaluated = [f"perplexity/{text}" for text in texts] + [f"zero_shot/{task}/acc" for task in tasks]
    return {
        *(f"eval/{model}/{metric}" for model in ("dense", "pruned") for metric in evaluated),
        *(f"reconstruction/calibration/{source}/last" for source in _runs(experiment, "choice/calibration")),
        *(
            f"reconstruction/probe/{name}/last"
            for name, probe in config["probes"].items()
            if probe is not None
        ),
    }


@pytest.mark.parametrize("name", sorted(published_tables()))
def test_tables_that_are_shipped(name: str) -> None:
    """Catches a table of arms that no experiment runs, metrics that no run has, percent for shares, and a missing source."""
    table = read_published(name)
    assert source_of(name).startswith(("Shin", "Williams"))
    experiments = [it for it in _naming_a_table() if it.config["published"] == name]
    arms = [column for column in map(str, table) if column.startswith(ARM)]
    metrics = set(table) - set(arms)
    assert metrics
    assert all(metrics <= _metrics(experiment) for experiment in experiments)
    served = set()
    for row in table.to_dict("records"):
        # An experiment of one run is what others share: its run is one of theirs.
        [home] = [
            number
            for number, experiment in enumerate(experiments)
            if experiment.hydra["params"] and all(row[arm] in _runs(experiment, arm) for arm in arms)
        ]
        served.add(home)
    assert len(served) == sum(bool(experiment.hydra["params"]) for experiment in experiments) > 0
    assert not table.duplicated(arms).any()
    shares = table.filter(like="zero_shot/")
    assert ((shares > 0) & (shares < 1)).all().all()
    assert not table.isna().any().any()


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    """Catches a name that is only found wrong when the sweep is over."""
    with pytest.raises(ConfigError, match="study_llama_7b") as refused:
        plan_of(tmp_path, "published=study_lama_7b")
    assert "did you mean" in str(refused.value)


def test_the_table_makes_no_other_run(tmp_path: Path) -> None:
    """Catches a run that is done again because its report compares it with something."""
    assert plan_of(tmp_path).folder.id == plan_of(tmp_path, "published=study_llama_7b").folder.id


def test_report_in_wandb(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Catches a summary run without its tables or figures, or in another project than the runs."""
    monkeypatch.setattr(sys, "argv", ["reprune-report", str(runs), "--out", str(tmp_path / "out"), "--wandb"])
    cli.main()
    assert "wandb sync" in capsys.readouterr().out
    written = str(wandb_records(tmp_path / "out"))
    for name in ("tables/arms", "tables/summary", "figures/error_by_block"):
        assert name in written
    [kept] = (tmp_path / "out" / "wandb").glob(
        "offline-run-*/files/media/images/figures/error_by_block_*.png"
    )
    assert kept.read_bytes() == (tmp_path / "out" / "error_by_block.png").read_bytes()
    tables = list(
        (tmp_path / "out" / "wandb").glob("offline-run-*/files/media/table/tables/arms_*.table.json")
    )
    assert len(tables) == 1
    assert "br_gp" in tables[0].read_text(encoding="utf-8")
