"""Metrics to JSONL always, to Weights & Biases as a mirror."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from helpers import run_tiny, wandb_records
from reprune.records import block_metrics
from reprune.tracking.contract import RunInfo
from reprune.tracking.wandb_tracker import WandbTracking


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


def test_offline_run_reads_back(tmp_path: Path) -> None:
    """Catches a mirror that lacks the summary, the per-block series, their step metric, the group or the config."""
    plan, result = run_tiny(tmp_path, "tracking=wandb", "experiment=the_question")
    records = wandb_records(plan.folder.path)
    [opened] = [record["run"] for record in records if record["type"] == "run" and "config" in record["run"]][
        :1
    ]
    assert opened["run_group"] == "the_question"
    assert opened["display_name"] == plan.folder.id
    config = opened["config"]["update"]
    assert config["reprune_id"] == plan.folder.id
    assert config["pruner"] == plan.config["pruner"]
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert "block/index" in {metric.get("step_metric") for metric in metrics}, metrics
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    series = {int(row["block/index"]): row for row in history if "block/index" in row}
    rows = plan.folder.blocks()
    assert sorted(series) == [row["block"] for row in rows]
    for row in rows:
        for name, value in block_metrics(row).items():
            assert series[row["block"]][name] == pytest.approx(value), name
    assert any(row.get("blocks._type") == "table-file" for row in history), "the table of blocks"
    summary: dict[str, Any] = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    for name, value in result["metrics"].items():
        assert summary[name] == pytest.approx(value), name
    assert summary["sparsity/total"] == pytest.approx(result["sparsity"]["total"])
    assert [record["exit"].get("exit_code", 0) for record in records if record["type"] == "exit"] == [0]


def test_online_without_network_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that is lost because a server cannot be reached."""
    import wandb

    real, modes = wandb.init, []

    def unreachable(**settings: Any) -> Any:
        modes.append(settings["mode"])
        if settings["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return real(**settings)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setattr(logging.getLogger("reprune"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="reprune"):
        plan, result = run_tiny(tmp_path, "tracking=wandb", "tracking.mode=online")
    assert modes == ["online", "offline"]
    assert result["status"] == "finished"
    assert list((plan.folder.path / "wandb").glob("offline-run-*/*.wandb"))
    assert "no route to host" in caplog.text
    assert "wandb sync" in caplog.text


@pytest.mark.parametrize("lost_at", [1, 3])
def test_a_connection_that_is_lost_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lost_at: int
) -> None:
    """Catches a run that fails, or waits, because its mirror went away in the middle."""
    import wandb

    told: list[Any] = []

    class Gone:
        summary: dict[str, Any] = {}  # noqa: RUF012 (stands for W&B's own)

        def __getattr__(self, name: str) -> Any:
            def tell(*_: Any, **__: Any) -> None:
                told.append(name)
                if len(told) > lost_at:
                    raise wandb.errors.UsageError("the service process is not there")

            return tell

    monkeypatch.setattr(wandb, "init", lambda **_: Gone())
    monkeypatch.setattr(logging.getLogger("reprune"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="reprune"):
        plan, result = run_tiny(tmp_path, "tracking=wandb")
    assert len(told) == lost_at + 1, "it is not asked again"
    said = {id(record): record.getMessage() for record in caplog.records}
    assert sum("the service process is not there" in words for words in said.values()) == 1
    assert plan.folder.status().state == "finished"
    lines = [json.loads(line) for line in (plan.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert {name: lines[-1][name] for name in result["metrics"]} == result["metrics"]


def test_disabled_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a W&B that is started, or leaves files, although it is switched off."""
    import wandb

    def forbidden(**_: Any) -> Any:
        raise AssertionError("wandb.init must not be called")

    monkeypatch.setattr(wandb, "init", forbidden)
    for name, choice in {"a": ["tracking=wandb", "tracking.mode=disabled"], "b": ["tracking=jsonl"]}.items():
        plan, _ = run_tiny(tmp_path / name, *choice)
        assert not list(tmp_path.rglob("*.wandb"))
        assert not (plan.folder.path / "wandb").exists()
        assert (plan.folder.path / "metrics.jsonl").is_file()


def test_jsonl_has_a_line_a_block_and_the_summary(tmp_path: Path) -> None:
    """Catches metrics that only W&B has."""
    plan, result = run_tiny(tmp_path)
    lines = [json.loads(line) for line in (plan.folder.path / "metrics.jsonl").read_text().splitlines()]
    rows = plan.folder.blocks()
    assert [line.get("block/index") for line in lines] == [0, 1, 2, None]
    for line, row in zip(lines, rows, strict=False):
        assert {name: line[name] for name in block_metrics(row)} == block_metrics(row)
    assert {name: lines[-1][name] for name in result["metrics"]} == result["metrics"]
    times = [line["unix_time_s"] for line in lines]
    assert times == sorted(times)


def test_failure_closes_the_tracked_run(tmp_path: Path) -> None:
    """Catches a W&B run that stays open, or reads as a success, after an error."""
    import wandb

    info = RunInfo("some-run", tmp_path, "group", {"seed": 0})

    def work() -> None:
        with WandbTracking(mode="offline").start(info) as tracker:
            tracker.log({"block/loss": 1.0}, step={"block/index": 0})
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        work()
    assert wandb.run is None
    exits = [record["exit"] for record in wandb_records(tmp_path) if record["type"] == "exit"]
    assert [end.get("exit_code") for end in exits] == [1]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["block/loss"] == 1.0
