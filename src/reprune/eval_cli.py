"""`reprune-eval RUN_OR_MODEL evaluation=…`: evaluate a finished run, or any saved model, without pruning.

0 done; 1 something failed; 2 bad input, found before any weight is loaded; 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from rich.table import Table

from reprune.config_files import config_root
from reprune.errors import ConfigError, did_you_mean
from reprune.eval_saved import EvaluatedModel
from reprune.eval_setting import EvaluatedRun, Evaluation, Found
from reprune.exit_codes import BAD_INPUT, FAILED, exit_codes
from reprune.reporting.data_tables import print_whole
from reprune.tracking.progress import CONSOLE, configure_logging, quiet_libraries

FLAGS = ("--dense", "--out", "--help")
STANDARD_ERROR = "_stderr"
NOISE = "_evaluation_noise/"
BY_DEPTH = re.compile(r"/\d+$")
"""A number a block is for the file and for plots."""
EPILOG = """\
A run is evaluated as it ended, against its own dense model; the result lands in RUN/evaluations/ and in
RUN/result.json. Of a run only evaluation=…, evaluation.KEY=… and threads=… can be set.
A model is a folder that transformers saved, or the name of an option in conf/model; its result lands in
MODEL/evaluations/, or below --out. model.KEY=…, device=… and dtype=… can be set, too.
What is there already is printed again without loading anything.

  reprune-eval outputs/smollm2_135m-sparsegpt-br_gp-0123456789ab evaluation=perplexity
  reprune-eval my_pruned_model --dense smollm2_135m evaluation=generation
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Our own words and exit code."""
        print(f"\n{message}\n  to do     reprune-eval --help\n", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def main() -> None:
    """Parse, check, evaluate, print the table, exit code."""
    given = _arguments(sys.argv[1:])
    configure_logging()
    quiet_libraries()
    with exit_codes():
        evaluation = evaluation_of(given.what, given.overrides, given.dense, given.out)
    with exit_codes(working=True, interrupted="the same command evaluates what is missing"):
        if evaluation.there:
            CONSOLE.print("evaluated already: nothing to do", highlight=False)
        else:
            evaluation.evaluate()
        found = evaluation.results()
    show(evaluation, found)
    if any(one.failed for one in found):
        raise SystemExit(FAILED)


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="reprune-eval",
        description="Evaluate a finished run or a saved model, without pruning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "what", metavar="RUN_OR_MODEL", help="a run's folder, a saved model's, or a model's name"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="the evaluation, e.g. evaluation=quick"
    )
    parser.add_argument(
        "--dense", metavar="MODEL", help="the dense model to compare a saved model with: folder or name"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for a model: its result lands in DIR/evaluations/"
    )
    given, more = parser.parse_known_args(arguments)
    for word in more:
        if word.startswith("-"):
            hint = did_you_mean(word.split("=")[0], FLAGS)
            parser.error(f"{word}: unknown" + (f"; {hint}" if hint else ""))
    given.overrides += more
    return given


def evaluation_of(what: str, overrides: list[str], dense: str | None, out: Path | None) -> Evaluation:
    """The checked evaluation of a run, or of a model. Raises ConfigError for what is neither."""
    place = Path(what)
    if place.is_dir() and any((place / name).is_file() for name in ("config.yaml", "status.json")):
        for flag, value in (("--dense", dense), ("--out", out)):
            if value is not None:
                raise ConfigError(
                    flag, "a run has its own dense model and folder", value=value,
                    accepted="a saved model, e.g. RUN/model" if (place / "model").is_dir() else "a saved model",
                )  # fmt: skip
        return EvaluatedRun.of(place, overrides)
    if place.is_dir() and not (place / "config.json").is_file():
        runs = sorted(path.parent.name for path in place.glob("*/result.json"))
        raise ConfigError(
            "RUN_OR_MODEL",
            "neither a run nor a saved model",
            value=place,
            accepted="a folder with config.yaml and result.json, or one with config.json and weights",
            hint=f"it holds runs, e.g. {place / runs[0]}" if runs else None,
        )
    names = sorted(path.stem for path in (config_root() / "conf" / "model").glob("*.yaml"))
    if not place.is_dir() and what not in names:
        raise ConfigError(
            "RUN_OR_MODEL",
            "no such folder, and no model has this name",
            value=what,
            accepted=names,
            hint="the run or the model comes first, then evaluation=…"
            if "=" in what
            else did_you_mean(what, names),
        )
    return EvaluatedModel.of(what, overrides, dense, out)


def show(evaluation: Evaluation, found: list[Found]) -> None:
    """Every metric with its standard error, beside the dense model's; what failed; where the results lie."""
    beside = any(one.dense for one in found)
    table = Table(header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("metric", no_wrap=True)
    for head in [evaluation.title, *(["dense"] if beside else [])]:
        table.add_column(head, justify="right", no_wrap=True)
    for one in found:
        for name in dict.fromkeys([*one.metrics, *one.dense]):
            if not (name.endswith(STANDARD_ERROR) or NOISE in name or BY_DEPTH.search(name)):
                cells = [_cell(name, one.metrics), *([_cell(name, one.dense)] if beside else [])]
                table.add_row(name, *cells)
    if table.row_count:
        print_whole(table)
    for one in found:
        for remark in one.notes:
            CONSOLE.print(f"note    {remark}", highlight=False, markup=False)
        for part, reason in one.failed.items():
            CONSOLE.print(f"failed  {part}: {reason}", highlight=False, markup=False)
        CONSOLE.print(f"result  {one.file}", highlight=False, markup=False)


def _cell(name: str, metrics: Mapping[str, float]) -> str:
    if name not in metrics:
        return "–"
    family, _, rest = name.partition("/")
    places = (f"{name}{STANDARD_ERROR}", f"{family}{NOISE}{rest}", f"{family}{NOISE}{rest}/standard_error")
    error = next((metrics[place] for place in places if place in metrics), None)
    return f"{metrics[name]:.4g}" + (f" ± {error:.2g}" if error is not None else "")


if __name__ == "__main__":
    main()
