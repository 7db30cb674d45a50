"""Published numbers beside ours, where an experiment names a table of them."""

from __future__ import annotations

import pandas as pd

from reprune.config_files import check_published, published_tables
from reprune.reporting.replicates import summarise

COLUMN = "config/published"
ARM = ("choice/", "config/")


def read_published(name: str) -> pd.DataFrame:
    """A published table: columns `choice/GROUP` and `config/KEY` say which arm a row is of, the others are metrics.

    Metrics have our names, and shares where they print percent.
    Its first line is a comment with the source. ConfigError for a name that is no table.
    """
    check_published(name)
    return pd.read_csv(published_tables()[name], comment="#")


def source_of(name: str) -> str:
    """Where a published table is from."""
    with published_tables()[name].open(encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").strip()


def beside_published(frame: pd.DataFrame) -> pd.DataFrame:
    """A row an arm and metric that the runs' experiment has a published number for, and that the runs have too.

    Columns: the choices and keys of the arm, metric, ours and std (mean and standard deviation over calibration sets), sets,
    published, difference (ours − published), source. Empty where no run names a table.
    """
    if COLUMN not in frame:
        return pd.DataFrame()
    rows = []
    finished = frame[frame["state"] == "finished"]
    for name, runs in finished.groupby(COLUMN):
        table = read_published(str(name))
        arms = [column for column in map(str, table) if column.startswith(ARM)]
        metrics = [column for column in map(str, table) if column not in arms and column in runs]
        for theirs in table.to_dict("records"):
            chosen = {arm.partition("/")[2]: theirs[arm] for arm in arms}
            alike = runs[
                [all(run[arm] == theirs[arm] for arm in arms) for run in runs[arms].to_dict("records")]
            ]
            for ours in summarise(alike, metrics).to_dict("records") if len(alike) else []:
                rows += [
                    {
                        **chosen, "metric": metric,
                        "ours": ours[metric], "std": ours[f"{metric} std"], "sets": ours["sets"],
                        "published": theirs[metric], "difference": ours[metric] - theirs[metric],
                        "source": source_of(str(name)),
                    }
                    for metric in metrics
                    if pd.notna(theirs[metric]) and pd.notna(ours[metric])
                ]  # fmt: skip
    return pd.DataFrame(rows)
