"""`reprune-data show|compare|save|generate`: the calibration text of a config, described and kept without a run.

0 done; 1 it failed; 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import pandas as pd

from reprune.calibration.describe import Description, describe
from reprune.calibration.source import TextSet
from reprune.calibration.tokens import POSITIONS
from reprune.compose import jobs_of
from reprune.data_setting import Models, Setting
from reprune.errors import ConfigError, did_you_mean
from reprune.exit_codes import exit_codes
from reprune.model.loading import LoadedModel
from reprune.reporting.data_tables import print_one, print_rows, samples_of
from reprune.tensor_files import write_tensors
from reprune.tracking.progress import CONSOLE, LOG, configure_logging, quiet_libraries

CALIBRATION = ("mask", "reconstruction")


def main() -> None:
    """Parse, do, exit code."""
    given = _arguments(sys.argv[1:])
    configure_logging()
    quiet_libraries()
    with exit_codes():
        given.do(given)


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reprune-data",
        description="Describe and keep calibration text; overrides are those of `reprune`.",
    )
    commands = parser.add_subparsers(required=True, metavar="show|compare|save|generate")
    for name, do, meaning in (
        ("show", show, "the numbers of a set, its overlap with held-out text, samples"),
        ("compare", compare, "a row for each of several sets, e.g. calibration=web,wiki"),
        ("save", save, "write the token ids to OUT, for calibration=tokens"),
        ("generate", generate, "save for text that the model writes"),
    ):
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.set_defaults(do=do, parser=command)
        if name in ("save", "generate"):
            command.add_argument("out", type=Path, metavar="OUT.safetensors")
            command.add_argument(
                "--sets", metavar="A-B", help="the disjoint sets A to B, a file each: OUT-A …"
            )
            command.add_argument("--force", action="store_true", help="write over files that are there")
        else:
            command.add_argument("--no-overlap", action="store_true", help="leave out the held-out text")
        if name == "show":
            command.add_argument("--samples", type=int, default=2, metavar="N", help="windows printed (2)")
        if name == "compare":
            command.add_argument("--csv", type=Path, metavar="FILE", help="write the whole table")
        command.add_argument("--no-perplexity", action="store_true", help="load no model for it")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given, more = parser.parse_known_args(arguments)
    wrong = [word for word in more if word.startswith("-")]
    if wrong:
        known = [flag for action in given.parser._actions for flag in action.option_strings]
        hint = did_you_mean(wrong[0].split("=")[0], known)
        given.parser.error(f"unknown: {' '.join(wrong)}{f' ({hint})' if hint else ''}")
    given.overrides += more
    return given


def show(given: argparse.Namespace) -> None:
    """Print the numbers, the overlap and samples of every set that the overrides stand for."""
    models: Models = {}
    known: set[str] = set()
    for overrides in jobs_of(["-m", *given.overrides]):
        described, overlap = _described(given, Setting.of(overrides, models))
        for text, found, samples in described:
            if text.key not in known:
                known.add(text.key)
                print_one(text, found, overlap, samples)


def _described(
    given: argparse.Namespace, setting: Setting
) -> tuple[list[tuple[TextSet, Description, list[str]]], dict[str, float]]:
    """Every calibration text with its numbers and samples, and the overlap with each held-out text."""
    uses = CALIBRATION if given.no_overlap else (*CALIBRATION, "validation", "probes")
    texts, model = setting.texts(uses, not given.no_perplexity)
    overlap = {} if given.no_overlap else setting.overlap(texts)
    model = None if given.no_perplexity else model
    samples = getattr(given, "samples", 0)
    described = [
        (text, describe(text, setting.tokenizer, model), samples_of(text, setting.tokenizer, samples))
        for text in texts.calibration
    ]
    return described, overlap


def compare(given: argparse.Namespace) -> None:
    """Print a row for every set that the overrides stand for."""
    models: Models = {}
    jobs = list(jobs_of(["-m", *given.overrides]))
    shared = set(jobs[0]).intersection(*jobs)
    rows = []
    for overrides in jobs:
        described, overlap = _described(given, Setting.of(overrides, models))
        label = " ".join(item.removeprefix("calibration=") for item in overrides if item not in shared)
        for text, found, _ in described:
            name = " ".join([label] * bool(label) + [text.name] * (not label or len(described) > 1))
            worst = {} if given.no_overlap else {"overlap": max(overlap.values(), default=None)}
            rows.append({"set": name, **found, **worst})
            LOG.info("%s: described", name)
    print_rows(rows)
    if given.csv is not None:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(given.csv, index=False)
        CONSOLE.print(f"table  {given.csv}", highlight=False, markup=False)


def generate(given: argparse.Namespace) -> None:
    """As `save`; ConfigError for text that no model writes."""
    save(given, written=True)


def save(given: argparse.Namespace, written: bool = False) -> None:
    """Write the mask data's token ids with source and description, and print the command that uses them.

    One set is the tensor `input_ids`, int64 [sequences, length]; the parts of a mixture are a tensor each.
    """
    jobs = list(jobs_of(given.overrides))
    if len(jobs) > 1:
        raise ConfigError("", "a file holds one set", accepted="overrides without a sweep", hint="--sets A-B")
    if given.out.suffix != ".safetensors":
        raise ConfigError("OUT", "cannot be used by calibration=tokens", value=given.out, accepted="*.safetensors")  # fmt: skip
    places = {given.out: jobs[0]}
    if given.sets is not None:
        places = {
            given.out.with_stem(f"{given.out.stem}-{number}"): [*jobs[0], f"calibration.set={number}"]
            for number in _numbers(given.sets)
        }
    there = [str(place) for place in places if place.exists()]
    if there and not given.force:
        raise ConfigError("OUT", "is there already", value=", ".join(there), hint="--force writes over it")
    models: Models = {}
    for place, overrides in places.items():
        setting = Setting.of(overrides, models)
        sources = [request.source for request in setting.requests if request.use == "mask"]
        if written and not any(source.endless and source.needs_model for source in sources):
            raise ConfigError("calibration", "no model writes this text", value=sources[0].name, hint="reprune-data save")  # fmt: skip
        texts, model = setting.texts(("mask",), not given.no_perplexity)
        _write(place, setting, texts.mask, None if given.no_perplexity else model)
        _tell_use(place, given.overrides, texts.mask)


def _numbers(sets: str) -> range:
    first, _, last = sets.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first)):
        raise ConfigError("--sets", "not a range", value=sets, accepted="A-B with 0 ≤ A ≤ B, e.g. 0-4")
    return range(int(first), int(last or first) + 1)


def _write(place: Path, setting: Setting, texts: list[TextSet], model: LoadedModel | None) -> None:
    names = ["input_ids"] if len(texts) == 1 else [text.name for text in texts]
    kept = {
        name: {
            "source": text.source,
            "sha256": text.key,
            "document_ids": list(text.document_ids),
            "description": describe(text, setting.tokenizer, model),
        }
        for name, text in zip(names, texts, strict=True)
    }
    config = setting.composed.config
    about = {
        "model": setting.source.identity(),
        "seeds": {name: config[name] for name in ("seed", "seed_data")},
        "overrides": list(setting.composed.overrides),
        "texts": kept,
    }
    tensors = {name: text.tokens_NT for name, text in zip(names, texts, strict=True)}
    tensors |= {
        f"{name}{POSITIONS}": text.positions_NT
        for name, text in zip(names, texts, strict=True)
        if text.positions_NT is not None
    }
    write_tensors(place, tensors, {"reprune": json.dumps(about, allow_nan=False)})


def _tell_use(place: Path, overrides: list[str], texts: list[TextSet]) -> None:
    # Another part of exact tokens is not there to be a probe.
    rest = [item for item in overrides if not item.lstrip("+~").startswith(("calibration=", "calibration."))]
    if not any("probes.held_out" in item for item in rest):
        rest.append("probes.held_out=null")
    for text in texts:
        count, length = text.tokens_NT.shape
        tensor = [] if len(texts) == 1 else [f"calibration.tensor={text.name}"]
        use = shlex.join(["reprune", "calibration=tokens", f"calibration.path={place}", *tensor, *rest])
        CONSOLE.print(f"{count} × {length} tokens of {text.name} in {place}; use them with\n  {use}", highlight=False, markup=False)  # fmt: skip


if __name__ == "__main__":
    main()
