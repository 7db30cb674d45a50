"""What runs of a sweep save by sharing: the study's grid of 12 runs with one cache, and each with a cache of its own.

Every point is run twice, one after the other: into the sweep's cache, and into one that is empty but for downloads, so
that dense evaluation, generated text and converted weights are made for it alone. Both come to the same numbers, which
is checked. Timed are whole processes, imports included. Further arguments are overrides of every run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

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
    parser.add_argument("overrides", nargs="*")
    overrides = (*SMALL, *parser.parse_args().overrides)
    sums = {"shared": 0.0, "alone": 0.0}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        print(f"{'pruner':<11}{'technique':<11}{'shared s':>9}{'alone s':>9}")
        for number, (pruner, technique) in enumerate(product(PRUNERS, TECHNIQUES)):
            point = [f"pruner={pruner}", f"reconstruction={technique}"]
            point += ["reconstruction.epochs=0"] if technique == "none" else []
            seconds, numbers = {}, {}
            for how, cache in (("shared", folder / "shared"), ("alone", folder / f"alone{number}")):
                seconds[how], numbers[how] = run(cache, folder / how, [*overrides, *point])
                sums[how] += seconds[how]
            assert numbers["shared"] == numbers["alone"], f"{pruner} {technique}: sharing changed a number"
            print(f"{pruner:<11}{technique:<11}{seconds['shared']:>9.1f}{seconds['alone']:>9.1f}", flush=True)
    print(
        f"{'12 runs':<22}{sums['shared']:>9.1f}{sums['alone']:>9.1f}  shared takes {sums['shared'] / sums['alone']:.0%}"
    )
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} when it ended"
    )


def run(cache: Path, output_dir: Path, overrides: list[str]) -> tuple[float, dict[str, float]]:
    """Do one run as a process; its seconds and its metrics."""
    cache.mkdir(exist_ok=True)
    for kind in DOWNLOADS:
        if (cache_root() / kind).is_dir() and not (cache / kind).exists():
            (cache / kind).symlink_to(cache_root() / kind)
    before = set(output_dir.glob("*/result.json"))
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "reprune.run", *overrides, f"output_dir={output_dir}"],
        check=True, stdout=subprocess.DEVNULL, env={**os.environ, "REPRUNE_CACHE": str(cache)},
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    [made] = set(output_dir.glob("*/result.json")) - before
    metrics: dict[str, float] = json.loads(made.read_text(encoding="utf-8"))["metrics"]
    return seconds, metrics


if __name__ == "__main__":
    main()
