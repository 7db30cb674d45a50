"""Two runs compared example by example: what one had right and the other has not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest, ttest_1samp, ttest_rel

from reprune.errors import ConfigError
from reprune.evaluation.examples import examples_file, paired_rows, read_examples
from reprune.files import read_json

LEVEL = 0.95
COLUMNS = [
    "task",
    "filter",
    "examples",
    "acc_first",
    "acc_second",
    "difference",
    "low",
    "high",
    "lost",
    "gained",
    "p",
]


@dataclass(frozen=True)
class _Held:
    """The examples of one task in one evaluation of a run; `identity` is all that decides what was asked."""

    identity: Mapping[str, Any]
    file: Path


def paired(first: Path, second: Path) -> pd.DataFrame:
    """Paired tests between two run folders, a row a task (and filter, where a task reads answers in several ways).

    Columns: examples (shared by both, by document and content), acc_first, acc_second (shares of them that are right,
    `acc` or `exact_match`), difference (second − first) with its 95 % interval low … high (Student's, of the paired
    differences; null where they are all equal), lost (right in first only), gained (right in second only), and p,
    two-sided, of McNemar's exact test (binomial over the examples that flipped, McNemar 1947).
    Where a run was evaluated several times on a task, the pair with the most shared examples counts.
    ConfigError when the runs share no example, or were asked a task differently (its config, documents, worked
    examples or the harness's version).
    """
    held = [_held(run) for run in (first, second)]
    rows: list[dict[str, Any]] = []
    for task in sorted(held[0].keys() & held[1].keys()):
        same = [
            (one, other) for one in held[0][task] for other in held[1][task] if one.identity == other.identity
        ]
        if not same:
            raise _asked_differently(task, held[0][task][0], held[1][task][0], first, second)
        candidates = [paired_rows(read_examples(one.file), read_examples(other.file)) for one, other in same]
        pairs = max(candidates, key=len)
        rows += [_row(task, str(read), part) for read, part in pairs.groupby("filter")]
    if not rows:
        raise ConfigError(
            "",
            "these runs share no example of a task",
            value=f"{first}: {_words(held[0])}; {second}: {_words(held[1])}",
            hint="evaluate both with the same tasks: evaluation=zero_shot evaluation.zero_shot.tasks=[…]",
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def paired_texts(first: Path, second: Path) -> pd.DataFrame:
    """Perplexities of two run folders on the same windows, a row a text of every evaluation that both have.

    Columns: text, windows (by document: documents), ppl_first, ppl_second, difference of the mean loss in nats a token
    (second − first) with its 95 % interval low … high: Student's, of the paired differences of windows' mean losses,
    each weighted by its tokens; null for a single window. Empty where they share none.
    """
    rows = []
    for result in sorted((first / "evaluations").glob("*.json")):
        other = second / "evaluations" / result.name
        if not other.is_file() or read_json(result)["identity"].get("evaluator") != "perplexity":
            continue
        for file in sorted(result.with_suffix("").glob("windows_*.parquet")):
            twin = other.with_suffix("") / file.name
            if twin.is_file():
                rows.append({"text": file.stem.removeprefix("windows_"), **_losses(file, twin)})
    columns = ["text", "windows", "ppl_first", "ppl_second", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _losses(first: Path, second: Path) -> dict[str, Any]:
    one, other = pd.read_parquet(first), pd.read_parquet(second)
    unit = "document" if "document" in one else "window"
    pairs = one.merge(other, on=[unit, *({"window"} - {unit}), "tokens"], validate="one_to_one")
    assert len(pairs) == len(one), "windows of one evaluation are the same"
    tokens = pairs["tokens"].sum()
    sums = pairs.groupby(unit)[["tokens", "nll_x", "nll_y"]].sum()
    # Weighted, so that their mean is the difference of the token-weighted losses.
    differences = (sums["nll_y"] - sums["nll_x"]) / (tokens / len(sums))
    low = high = None
    if differences.nunique() > 1:
        interval = ttest_1samp(differences, 0.0).confidence_interval(LEVEL)
        low, high = float(interval.low), float(interval.high)
    means = {
        name: float(pairs[column].sum() / tokens)
        for name, column in (("first", "nll_x"), ("second", "nll_y"))
    }
    return {
        "windows": len(sums),
        "ppl_first": math.exp(means["first"]),
        "ppl_second": math.exp(means["second"]),
        "difference": means["second"] - means["first"],
        "low": low,
        "high": high,
    }


def _held(run: Path) -> dict[str, list[_Held]]:
    found: dict[str, list[_Held]] = {}
    for result in sorted((run / "evaluations").glob("*.json")):
        identity = read_json(result)["identity"]
        if identity.get("evaluator") != "zero_shot":
            continue
        common = {name: identity[name] for name in ("harness", "seeds")}
        for task, own in identity["tasks"].items():
            file = examples_file(result.with_suffix(""), task)
            if file.is_file():
                found.setdefault(task, []).append(_Held({**common, **own}, file))
    return found


def _row(task: str, read: str, pairs: pd.DataFrame) -> dict[str, Any]:
    first, second = pairs["first"], pairs["second"]
    lost, gained = int((first & ~second).sum()), int((~first & second).sum())
    differences = second.astype(float) - first.astype(float)
    low = high = None
    if differences.nunique() > 1:
        interval = ttest_rel(second.astype(float), first.astype(float)).confidence_interval(LEVEL)
        low, high = float(interval.low), float(interval.high)
    return {
        "task": task,
        "filter": read,
        "examples": len(pairs),
        "acc_first": float(first.mean()),
        "acc_second": float(second.mean()),
        "difference": float(differences.mean()),
        "low": low,
        "high": high,
        "lost": lost,
        "gained": gained,
        "p": float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0,
    }


def _words(held: Mapping[str, Any]) -> str:
    return ", ".join(sorted(held)) or "no examples"


def _asked_differently(task: str, one: _Held, other: _Held, first: Path, second: Path) -> ConfigError:
    keys = sorted(one.identity.keys() | other.identity.keys())
    differ = [key for key in keys if one.identity.get(key) != other.identity.get(key)]
    if "config" in differ:
        configs = [it.identity["config"] for it in (one, other)]
        within = sorted(configs[0].keys() | configs[1].keys())
        differ += [f"config.{key}" for key in within if configs[0].get(key) != configs[1].get(key)]
        differ.remove("config")
    return ConfigError(
        "",
        f"the runs were asked '{task}' differently, so their examples are no pairs",
        value=f"{first} and {second} differ in {', '.join(differ)}",
        hint="evaluate one of them again as the other was",
    )
