"""What `reprune-report DIR…` writes: the frame, tables, plots, the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pandas.api.types import infer_dtype

from reprune.reporting.downstream import correlations
from reprune.reporting.drawing import Plot, Runs, draw_all, save
from reprune.reporting.fitting import fitting
from reprune.reporting.gap import gaps
from reprune.reporting.knee import TOLERANCE, curves, knees
from reprune.reporting.page import Section, write_page
from reprune.reporting.published import beside_published
from reprune.reporting.replicates import arm_names, arms_of, summarise
from reprune.reporting.verdict_plot import verdict_plot
from reprune.reporting.verdicts import AnyClaim, verdict_table

FAMILIES = ("eval/pruned/", "reconstruction/", "reconstruction_relative/")


@dataclass(frozen=True)
class Report:
    """What was reported: the tables that have rows, and the plots, drawn or not."""

    sections: list[Section]
    plots: list[Plot]


def write_report(
    frame: pd.DataFrame,
    arms: pd.DataFrame,
    out: Path,
    places: Sequence[Path],
    claims: Sequence[AnyClaim],
    tolerance: float = TOLERANCE,
) -> Report:
    """Write every file of the report on `frame` (`results`) into `out`; `arms` is its `arm_table`, `tolerance` of `knees`.

    runs.csv|parquet, and where a run is finished arms.csv, summary.csv|md|tex, blocks.csv, gap.csv, fitting.csv, correlations.csv,
    essential_sparsity.csv, verdicts.csv|md|tex (with claims), published.csv|md|tex (where runs name a published table), a PNG and a PDF a plot,
    report.html. ConfigError where a run names a published table that is not there.
    """
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "runs.csv", index=False)
    _of_one_type(frame).to_parquet(out / "runs.parquet", index=False)
    unfinished = frame.loc[frame["state"] != "finished", ["id", "state"]]
    plots: list[Plot] = []
    tables = [
        Section("unfinished", "Not finished", "Runs that failed, were killed, or still run.", unfinished)
    ]
    if len(arms):
        runs = Runs.of(frame, tolerance)
        arms.to_csv(out / "arms.csv", index=False)
        summary = _write_summary(runs.frame, out)
        runs.blocks.to_csv(out / "blocks.csv", index=False)
        found = {
            "gap": gaps(runs.frame),
            "fitting": fitting(runs.frame),
            "correlations": correlations(runs.frame),
            "essential_sparsity": knees(curves(runs.frame), tolerance),
        }
        verdicts = verdict_table(frame, claims)
        published = beside_published(runs.frame)
        if len(published):
            write_table(published, out / "published")
        if claims:
            write_table(verdicts, out / "verdicts")
        for name, table in found.items():
            table.to_csv(out / f"{name}.csv", index=False)
        tables = [
            Section("verdicts", "Verdicts", "The effect over calibration sets and its 95 % interval (Student's t) against the claim's threshold.", verdicts),
            Section("arms", "Runs", "A row a finished run. Errors are the last block's, per element and relative per token; then what the whole model can do.", arms),
            Section("summary", "Arms", "Means over calibration sets; std: standard deviation over sets (n − 1), missing for a single set.", _short(summary)),
            Section("published", "Published numbers beside ours", "Ours: mean over calibration sets; difference: ours − published.", published),
            Section("knees", "Essential sparsity", f"Where pruning first costs more than {100 * tolerance:.3g} % of the dense model's perplexity or accuracy: between the sparsities below and above, measured shares of the pruned layers' weights; means over calibration sets. returns: a higher sparsity costs no more than that again.", found["essential_sparsity"]),
            Section("correlations", "Error and what the model can do", "Spearman's ρ of the last block's error and a metric; low and high hold 95 % of it over draws of calibration sets.", found["correlations"]),
            Section("gap", "Gap", "[held-out ÷ held-out of none] ÷ [calibration ÷ calibration of none], errors of the last block.", found["gap"]),
            Section("fitting", "What fits the calibration text", "Changes of the last block's error against another technique on the same mask data, as shares, over calibration sets; flagged where the whole 95 % interval falls on the calibration text and rises on held-out text.", found["fitting"]),
            *tables,
        ]  # fmt: skip
        plots = [*([verdict_plot(verdicts)] if claims else []), *draw_all(runs)]
        for plot in plots:
            if plot.figure is not None:
                save(plot.figure, out / plot.name)
    finished = len(frame) - len(unfinished)
    about = f"{finished} finished, {len(unfinished)} not finished, below {', '.join(map(str, places))}"
    report = Report([section for section in tables if len(section.table)], plots)
    title = f"reprune: {', '.join(place.resolve().name for place in places)}"
    write_page(out / "report.html", title, about, report.sections, plots)
    return report


def _of_one_type(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns that hold words and numbers, or numbers and truths, as words: Parquet has one type a column."""
    mixed = [name for name in frame if infer_dtype(frame[name], skipna=True).startswith("mixed")]
    return frame.assign(**{str(name): frame[name].map(str, na_action="ignore") for name in mixed})


def write_table(table: pd.DataFrame, stem: Path) -> None:
    """`STEM.csv`, `STEM.md` and `STEM.tex`."""
    table.to_csv(stem.with_suffix(".csv"), index=False)
    stem.with_suffix(".md").write_text(table.to_markdown(index=False, floatfmt=".4g"), encoding="utf-8")
    latex = table.to_latex(index=False, float_format="%.4g", escape=True)
    stem.with_suffix(".tex").write_text(latex, encoding="utf-8")


def _write_summary(finished: pd.DataFrame, out: Path) -> pd.DataFrame:
    """A row an arm, mean and standard deviation over calibration sets, as CSV, Markdown and LaTeX."""
    metrics = [c for c in map(str, finished) if c.startswith(FAMILIES) and "_evaluation_noise/" not in c]
    summary = summarise(finished, metrics)
    # Both in the order in which arms first occur.
    firsts = finished.drop_duplicates(arms_of(finished)) if arms_of(finished) else finished[:1]
    summary.insert(0, "arm", arm_names(finished)[firsts.index].to_list())
    write_table(summary, out / "summary")
    return summary


def _short(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary for the page: arms by name alone, errors of the last block, heads broken into lines."""
    shown = {
        column: column.removeprefix("eval/pruned/").replace("/last", "").replace("/", "|")
        for column in map(str, summary)
        if column in ("arm", "runs", "sets") or column.startswith("eval/") or "/last" in column
    }
    return summary[list(shown)].rename(columns=shown)
