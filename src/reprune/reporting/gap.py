"""The gap: how much more of the error a technique takes away on the text it is fitted to than on held-out text."""

from __future__ import annotations

import pandas as pd

from reprune.reporting.replicates import FREE, IRRELEVANT, arm_names

COLUMNS = ("id", "arm", "technique", "sequences", "calibration", "held_out", "gap")


def gaps(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a finished run, calibration text and held-out text: id, arm, technique, sequences, calibration, held_out, gap.

    gap = [held-out(technique) / held-out(none)] / [calibration(technique) / calibration(none)], of errors of the last
    block on texts that both runs have, so that a text's own difficulty cancels; 1 where the technique does as much for
    both, above 1 where it fits the calibration text. `none` is the run that agrees in all of the config but
    `reconstruction*` and what changes no number: same mask data, same seeds. Runs without such a partner have no row;
    where there are several, the mean of their errors stands for them.
    """
    finished = frame[frame["state"] == "finished"]
    if finished.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    shared = [
        str(column)
        for column in finished
        if str(column).startswith("config/") and not str(column).startswith((*FREE, *IRRELEVANT))
    ]
    calibration, probes = (last_columns(finished, role) for role in ("calibration", "probe"))
    untouched = finished["choice/reconstruction"] == "none"
    about = pd.DataFrame(
        {
            "id": finished["id"],
            "arm": arm_names(finished),
            "technique": finished["choice/reconstruction"],
            "sequences": finished.get("reconstruction_sequences"),
        }
    )
    tables = []
    for held_out, probe in probes.items():
        # Runs may have other probes; this one has to be the same text.
        keys = [*shared, *(c for c in map(str, finished) if c.startswith(f"config/probes.{held_out}."))]
        # As text, since a key that is missing in both agrees, and NaN is not equal to NaN.
        partner = pd.Series(["\0".join(map(str, row)) for row in finished[keys].to_numpy()], finished.index)
        columns = [probe, *calibration.values()]
        errors = finished[columns].astype(float)
        base = errors[untouched].groupby(partner[untouched]).mean().reindex(partner).set_axis(finished.index)
        ratios = (errors / base)[~untouched]
        for text, column in calibration.items():
            gap = (ratios[probe] / ratios[column]).dropna().rename("gap")
            table = about.loc[gap.index].assign(calibration=text, held_out=held_out, gap=gap)
            tables.append(table[list(COLUMNS)])
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(COLUMNS))


def last_columns(frame: pd.DataFrame, role: str) -> dict[str, str]:
    """The columns with the last block's error on texts of a role, by the text's name."""
    prefix = f"reconstruction/{role}/"
    columns = [str(c) for c in frame if str(c).startswith(prefix) and str(c).endswith("/last")]
    return {column.split("/")[2]: column for column in columns}
