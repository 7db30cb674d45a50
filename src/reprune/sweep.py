"""A sweep as a whole: what it comes to before the first job, and what is missing after the last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from reprune.arithmetic import guessed_seconds
from reprune.attempts import counter_of
from reprune.errors import ConfigError, require_positive
from reprune.files import is_held, read_json, sha256_of_json, write_json
from reprune.job import done_of, note_of, noted, place_of
from reprune.pipeline import nothing_left
from reprune.run_folder import RunFolder
from reprune.run_plan import RunPlan
from reprune.shapes import existing
from reprune.tracking.progress import CONSOLE
from reprune.waiting import under_way


@dataclass(frozen=True)
class Sweep:
    """The checked points of a grid, without those that a rule left out; a duplicate is in it once."""

    plans: tuple[RunPlan, ...]
    num_duplicates: int
    num_skipped: int
    idle_rules: tuple[str, ...] = ()

    @staticmethod
    def of(plans: Sequence[RunPlan], num_skipped: int, idle_rules: Sequence[str] = ()) -> Sweep:
        """Tell duplicates apart: the same run, evaluated and exported in the same way.

        ConfigError where every point was skipped.
        """
        if not plans:
            raise ConfigError("sweep.skip", "its rules skip every point of the grid", value=num_skipped)
        caps = plans[0].composed.sweep
        require_positive(**{f"sweep.{key}": caps[key] for key in ("max_runs", "max_hours", "jobs")})
        single: dict[tuple[Any, ...], RunPlan] = {}
        for plan in plans:
            suite = sorted(entry.hash for entry in plan.suite)
            single.setdefault((plan.folder.path, *suite, *plan.config["export"].items()), plan)
        return Sweep(tuple(single.values()), len(plans) - len(single), num_skipped, tuple(idle_rules))

    @property
    def dry(self) -> bool:
        """Whether plans are shown and nothing is run."""
        return all(plan.config["dry_run"] for plan in self.plans)

    @cached_property
    def to_do(self) -> list[RunPlan]:
        """What is not finished when the sweep begins."""
        return [plan for plan in self.plans if not _done(plan)]

    def announce(self) -> None:
        """Say what the sweep comes to. ConfigError where that is more than it may be without `sweep.confirm=true`."""
        lines = self.arithmetic()
        caps, too_much = self.plans[0].composed.sweep, self._too_much()
        if too_much and not caps["confirm"] and not self.dry:
            raise ConfigError(
                "sweep.confirm", f"this sweep asks for {' and '.join(too_much)}",
                value="\n            ".join(f"{name:<9}{line}" for name, line in lines.items()),
                hint="sweep.confirm=true, if it is meant",
            )  # fmt: skip
        table = Table.grid(padding=(0, 2))
        for name, line in lines.items():
            table.add_row(name, line)
        CONSOLE.print(table, highlight=False)

    def arithmetic(self) -> dict[str, str]:
        """Runs, time, memory and disk of what is to do, in words."""
        done = len(self.plans) - len(self.to_do)
        parts = [f"{len(self.plans)} runs: {done} finished, {len(self.to_do)} to do"]
        parts += [f"{self.num_duplicates} duplicates, run once"] if self.num_duplicates else []
        parts += [f"{self.num_skipped} points skipped by sweep.skip"] if self.num_skipped else []
        lines = {"sweep": "; ".join(parts)}
        if self.idle_rules:
            lines["unused"] = f"rules of sweep.skip that no point falls under: {'; '.join(self.idle_rules)}"
        if not self.to_do:
            return lines
        unknown = self._seconds.count(None)
        told = (
            f"about {self._hours:.2g} h of one device" if unknown < len(self.to_do) or self._guesses else ""
        )
        missing = ""
        if unknown:
            how = "by arithmetic alone" if self._guesses else "unknown"
            missing = f"{how} for {unknown} runs: no finished run of their model in output_dir"
        lines["time"] = ", ".join(filter(None, [told, missing]))
        lines["memory"] = f"about {max(plan.memory.host for plan in self.to_do) / 2**30:.2f} GiB a run"
        lines["disk"] = f"about {self._disk / 2**30:.2f} GiB in all, {self._free / 2**30:.2f} GiB are free"
        return lines

    def _too_much(self) -> list[str]:
        caps = self.plans[0].composed.sweep
        hours = self._hours
        found = []
        if len(self.to_do) > caps["max_runs"]:
            found.append(f"{len(self.to_do)} runs (sweep.max_runs={caps['max_runs']})")
        if caps["max_hours"] is not None and hours > caps["max_hours"]:
            found.append(f"{hours:.2g} h (sweep.max_hours={caps['max_hours']:g})")
        elif caps["max_hours"] is not None and None in self._seconds and not self._guesses:
            found.append(f"hours that nothing tells (sweep.max_hours={caps['max_hours']:g})")
        if self._disk > self._free:
            found.append("more disk than is free")
        return found

    @cached_property
    def _disk(self) -> int:
        return sum(plan.memory.disk for plan in self.to_do)

    @property
    def _free(self) -> int:
        return shutil.disk_usage(existing(Path(self.plans[0].config["output_dir"]))).free

    @cached_property
    def _seconds(self) -> list[float | None]:
        """Of each run to do: the median time of finished runs of its model, of those most like it where there are any."""
        folders = {Path(plan.config["output_dir"]) for plan in self.plans}
        results = [read_json(path) for folder in folders for path in folder.glob("*/result.json")]
        known = [
            (_alike(result["identity"], result["choices"]), sum(result["seconds"].values()))
            for result in results
        ]
        found: list[float | None] = []
        for plan in self.to_do:
            mine, near = _alike(plan.identity, plan.composed.choices), known
            for depth in range(1, len(mine) + 1):
                nearer = [(other, seconds) for other, seconds in near if other[:depth] == mine[:depth]]
                if not nearer:
                    break
                near = nearer
            seconds = [seconds for other, seconds in near if other[0] == mine[0]]
            found.append(float(np.median(seconds)) if seconds else None)
        return found

    @cached_property
    def _guesses(self) -> list[float]:
        """Of each run that no finished one tells of: its time by arithmetic. None of them where they are done elsewhere."""
        if self.plans[0].composed.sweep["elsewhere"]:
            return []
        return [
            guessed_seconds(plan)
            for plan, seconds in zip(self.to_do, self._seconds, strict=True)
            if seconds is None
        ]

    @property
    def _hours(self) -> float:
        return (sum(run for run in self._seconds if run is not None) + sum(self._guesses)) / 3600

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """While its jobs are launched: every point is tried anew, and whoever asks sees which of them wait."""
        waiting = {plan.composed.key for plan in self.to_do}
        for plan in self.plans:
            counter = counter_of(plan.composed)
            for place in (note_of(plan.composed), done_of(plan.composed), counter):
                # What another sweep is at is counted there.
                if not is_held(counter.with_suffix(".lock")):
                    place.unlink(missing_ok=True)
            if plan.composed.key not in waiting:
                write_json(done_of(plan.composed), {"run": plan.folder.id})
        with under_way(
            self.plans[0].composed.sweep_folder, {plan.composed.key: plan.folder.id for plan in self.to_do}
        ):
            yield

    def show_failures(self) -> int:
        """Print a table of the runs that are not finished, and why; how many they are."""
        missing = [_placed(plan) for plan in self.plans if not _done(plan)]
        if not missing:
            return 0
        table = Table(
            title=f"{len(missing)} of {len(self.plans)} runs are not finished", title_justify="left"
        )
        table.add_column("run", overflow="fold")
        table.add_column("choices", overflow="fold")
        table.add_column("state")
        table.add_column("why", overflow="fold")
        common = set.intersection(*(set(plan.composed.overrides) for plan in self.plans))
        for plan in missing:
            status, why = plan.folder.status(), noted(plan.composed)
            # A run may be finished although an evaluation added to it failed, or was left to who held the run.
            state = "failed" if why is not None else status.state
            words = "an evaluation or export is missing" if state == "finished" else status.words
            own = [override for override in plan.composed.overrides if override not in common]
            table.add_row(plan.folder.id, "\n".join(own), state, why or words)
        CONSOLE.print()
        CONSOLE.print(table, highlight=False, markup=False, soft_wrap=False)
        CONSOLE.print("The same command again runs only these.", highlight=False)
        return len(missing)


def _placed(plan: RunPlan) -> RunPlan:
    """The plan as it was done: a machine with another device makes another run of the same point."""
    place = place_of(plan.composed)
    if plan.folder.facts() or not place.is_file():
        return plan
    told = read_json(place)
    if told["alike"] != plan.alike:
        return plan
    return replace(plan, folder=RunFolder(plan.folder.path.parent / told["run"]))


def _done(plan: RunPlan) -> bool:
    return nothing_left(_placed(plan))


def _alike(identity: Mapping[str, Any], choices: Mapping[str, str]) -> tuple[str, str, str]:
    """What runs of about the same duration have in common: the model, the option of reconstruction, its fields."""
    technique = choices.get("arm") or choices["reconstruction"]
    return sha256_of_json(identity["model"]), technique, sha256_of_json(identity["technique"])
