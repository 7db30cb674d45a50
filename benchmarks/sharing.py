"""What runs of a sweep save by sharing: the study's grid of 12 runs with one cache, and each with a cache of its own.

Every point is run twice, one after the other: into the sweep's cache, and into one that is empty but for downloads, so
that dense evaluation, generated text and converted weights are made for it alone. Both come to the same numbers, which
is checked. Timed are whole processes, imports included: seconds by the clock, which other work on the machine lengthens
on both sides, and of the processor. Further arguments are overrides of every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import pandas as pd
from machine import machine

from reprune.cache import cache_root

PRUNERS = ("sparsegpt", "wanda", "magnitude")
TECHNIQUES = ("none", "br", "br_gp", "br_gp_cr")
SMALL = (
    "calibration.num_sequences=4", "calibration.length=128", "probes.held_out.num_sequences=2",
    "probes.wiki.num_sequences=2", "probes.code.num_sequences=2", "+calibration@probes.generated=generated",
    "probes.generated.num_sequences=4", "probes.generated.length=128", "probes.generated.max_new_tokens=128",
    "probes.generated.cross_documents=true", "evaluation.perplexity.num_windows=8", "reconstruction.epochs=1",
    "reconstruction.batch_size=2", "tracking=jsonl",
)  # fmt: skip
DOWNLOADS = ("wheels", "hub")


def main() -> None:
    """Run the pairs, print a row each and the sums."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--csv", type=Path, help="where a row a run is written")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, (pruner, technique) in enumerate(product(PRUNERS, TECHNIQUES)):
            point = [f"pruner={pruner}", f"reconstruction={technique}"]
            point += ["reconstruction.epochs=0"] if technique == "none" else []
            numbers, row = {}, {"pruner": pruner, "technique": technique}
            for how, cache in (("shared", folder / "shared"), ("alone", folder / f"alone{number}")):
                wall, processor, numbers[how] = run(cache, folder / how, [*SMALL, *given.overrides, *point])
                row |= {f"{how}_seconds": wall, f"{how}_processor_seconds": processor}
            assert numbers["shared"] == numbers["alone"], f"{pruner} {technique}: sharing changed a number"
            rows.append(row)
            print(f"{pruner} {technique}", file=sys.stderr, flush=True)
    frame = pd.DataFrame(rows).assign(machine=machine(os.cpu_count() or 1))
    sums = frame.sum(numeric_only=True)
    print(frame.drop(columns="machine").to_string(index=False, float_format="{:.1f}".format))
    for kind in ("seconds", "processor_seconds"):
        shared, alone = sums[f"shared_{kind}"], sums[f"alone_{kind}"]
        print(f"{len(rows)} runs, {kind}: {shared:.1f} of {alone:.1f}, {shared / alone:.0%}")
    print(frame["machine"][0])
    if given.csv is not None:
        frame.to_csv(given.csv, index=False)


def run(cache: Path, output_dir: Path, overrides: list[str]) -> tuple[float, float, dict[str, float]]:
    """Do one run as a process; its seconds by the clock and of the processor, and its metrics."""
    cache.mkdir(exist_ok=True)
    for kind in DOWNLOADS:
        if (cache_root() / kind).is_dir() and not (cache / kind).exists():
            (cache / kind).symlink_to(cache_root() / kind)
    before = set(output_dir.glob("*/result.json"))
    begun, used = time.perf_counter(), _of_children()
    subprocess.run(
        [sys.executable, "-m", "reprune.run", *overrides, f"output_dir={output_dir}"],
        check=True, stdout=subprocess.DEVNULL, env={**os.environ, "REPRUNE_CACHE": str(cache)},
    )  # fmt: skip
    seconds, processor = time.perf_counter() - begun, _of_children() - used
    [made] = set(output_dir.glob("*/result.json")) - before
    metrics: dict[str, float] = json.loads(made.read_text(encoding="utf-8"))["metrics"]
    return seconds, processor, metrics


def _of_children() -> float:
    """Processor seconds of all processes that this one waited for."""
    told = os.times()
    return told.children_user + told.children_system


if __name__ == "__main__":
    main()
