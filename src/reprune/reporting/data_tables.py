"""What `reprune-data` prints: a set's numbers with their meaning, several sets in a row each, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from reprune.tracking.progress import CONSOLE

if TYPE_CHECKING:
    # They import transformers, which a report needs not wait for.
    from reprune.calibration.describe import Description
    from reprune.calibration.source import TextSet

SAMPLE_LINES, SAMPLE_CHARACTERS = 5, 500
MEASURES = {
    "windows": ("windows", "{:,.0f}", "windows"),
    "length": ("length", "{:,.0f}", "tokens a window"),
    "tokens": ("tokens", "{:,.0f}", "tokens, special ones left out"),
    "documents": ("docs", "{:,.0f}", "documents"),
    "documents_per_window": ("docs/win", "{:.2f}", "documents over windows"),
    "types": ("types", "{:,.0f}", "different tokens"),
    "vocabulary_coverage": ("vocab %", "{:.1%}", "of the vocabulary occurs"),
    "repetition": ("rep-4 %", "{:.1%}", "of the 4-grams occurred earlier in their window"),
    "distinct_1": ("dist-1", "{:.3f}", "different tokens over tokens"),
    "distinct_2": ("dist-2", "{:.3f}", "different 2-grams over 2-grams"),
    "distinct_3": ("dist-3", "{:.3f}", "different 3-grams over 3-grams"),
    "distinct_4": ("dist-4", "{:.3f}", "different 4-grams over 4-grams"),
    "zipf_exponent": ("Zipf", "{:.2f}", "Zipf exponent"),
    "duplicates": ("dup %", "{:.1%}", "of the windows equal another one"),
    "near_duplicates": ("near %", "{:.1%}", "of the windows repeat a run of another one"),
    "english": ("English %", "{:.1%}", "of the windows are English"),
    "perplexity": ("ppl", "{:.2f}", "perplexity under the dense model"),
    "perplexity_min": ("ppl min", "{:.2f}", "the lowest of a window"),
    "perplexity_q25": ("ppl 25 %", "{:.2f}", "a quarter of the windows lie below"),
    "perplexity_median": ("ppl 50 %", "{:.2f}", "half of the windows lie below"),
    "perplexity_q75": ("ppl 75 %", "{:.2f}", "three quarters of the windows lie below"),
    "perplexity_max": ("ppl max", "{:.2f}", "the highest of a window"),
    "overlap": ("overlap %", "{:.1%}", "of the windows repeat the held-out text they repeat most"),
}
"""By name: head of a column, format, meaning."""
COMPARED = (
    "windows", "length", "documents", "types", "vocabulary_coverage", "repetition", "distinct_1", "distinct_2",
    "distinct_3", "zipf_exponent", "near_duplicates", "english", "perplexity", "perplexity_q25",
    "perplexity_q75", "overlap",
)  # fmt: skip


def _cell(measure: str, value: float | None) -> str:
    return "–" if value is None else MEASURES[measure][1].format(value)


def samples_of(text: TextSet, tokenizer: Any, count: int) -> list[str]:
    """The first windows as text, cut to a few lines, special tokens shown."""
    samples = []
    for row in text.tokens_NT[: max(0, count)]:
        lines = tokenizer.decode(row)[:SAMPLE_CHARACTERS].splitlines()
        lines = [line for line in lines if line.strip()]
        samples.append("\n".join([*lines[:SAMPLE_LINES], "…"]))
    return samples


def print_one(
    text: TextSet, found: Description, overlap: Mapping[str, float], samples: Sequence[str]
) -> None:
    """A set's numbers, a line each, its overlap with every held-out text, and samples."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for measure, value in found.items():
        table.add_row(_cell(measure, value), MEASURES[measure][2])
    for key, share in overlap.items():
        refused = "; a run refuses it unless max_overlap is as much, or allow_overlap=true" if share else ""
        table.add_row(f"{share:.1%}", f"of the windows repeat {key}{refused}")
    source = ", ".join(
        f"{name} {str(value)[:16]}" for name, value in text.source.items() if value is not None
    )
    CONSOLE.print(f"\n{text.name}  ({source})", highlight=False, markup=False)
    print_whole(table)
    for number, sample in enumerate(samples):
        CONSOLE.print(f"\nwindow {number}", highlight=False)
        CONSOLE.print(sample, highlight=False, markup=False)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A row a set; columns that no set has are left out."""
    columns = [measure for measure in COMPARED if any(measure in row for row in rows)]
    table = Table(header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("set", no_wrap=True)
    for measure in columns:
        table.add_column(MEASURES[measure][0], justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["set"], *[_cell(measure, row.get(measure)) for measure in columns])
    print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table as wide as it is."""
    # A narrow pipe or log must not fold numbers.
    width = max(CONSOLE.width, Console(width=1000).measure(table).maximum)
    Console(width=width, soft_wrap=True).print(table, highlight=False)
