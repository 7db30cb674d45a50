"""`profile=true`: where the time went."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import plan_of, run_tiny


def test_profile_shows_stages_and_traces_one_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a trace of the whole run or of none, stages that are not in it, and a profiled run that is another one."""
    monkeypatch.setenv("COLUMNS", "200")
    plan, result = run_tiny(tmp_path, "profile=true")
    assert plan.folder.id == plan_of(tmp_path).folder.id
    events = json.loads((plan.folder.path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    spans = [event for event in events if event.get("cat") == "user_annotation"]
    named = [event["name"] for event in spans]
    assert {"pruning", "reconstruction", "measuring", "writing"} <= set(named)
    assert named.count("reconstruction") == 1
    traced = sum(event["dur"] for event in spans if event["name"] == "reconstruction") / 1e6
    assert 0 < traced < result["seconds"]["reconstruction"] + 1e-3
    assert any(event["name"].startswith("aten::") for event in events)
    said = capsys.readouterr().out
    rows = {line.rsplit(maxsplit=3)[0]: line.split()[-3:] for line in said.splitlines() if "%" in line}
    assert set(rows) == set(result["seconds"])
    assert sum(float(share.rstrip("%")) for _, share, _ in rows.values()) == pytest.approx(100, abs=1)


def test_without_it_nothing_is_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a tracer that is always on."""
    plan, _ = run_tiny(tmp_path)
    assert not (plan.folder.path / "trace.json").exists()
    assert "whole run" not in capsys.readouterr().out
