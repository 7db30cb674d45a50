"""The guess of a run's time: held against what runs really pass through their blocks, and against sums made by hand."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import perplexity_on, plan_of, run_tiny, write_documents
from reprune import arithmetic
from reprune.arithmetic import FLOOR, MEASURED, Pace, guessed_seconds, guessed_stages
from reprune.model.blocks import BlockCall

PASSING = ("dense chain", "pruned chain", "statistics", "measuring", "reconstruction")


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that does an operation a second, and nothing that takes time beside operations."""
    monkeypatch.setattr(arithmetic, "product_rate", lambda *_: 1.0)


BARE = Pace(forward=1, training=1, mixed=1, fitting=1, call=0, step=0, column=0, choosing=0)


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize(
    "choices",
    [
        ["reconstruction=none"],
        ["reconstruction=br"],
        ["reconstruction=br_gp", "reconstruction.epochs=2"],
        ["reconstruction=br_gp_cr"],
        ["reconstruction=window", "model.num_blocks=5", "reconstruction.window=3"],
        ["reconstruction=br_gp_cr", "reconstruction.window=3", "model.num_blocks=4"],
        ["reconstruction=br_gp_cr", "schedule=iterative", "schedule.rounds=2"],
        ["reconstruction=br", "schedule=iterative", "schedule.rounds=2", "schedule.reconstruct=end"],
        ["reconstruction=br", "+calibration@validation.mine=vocabulary", "validation.mine.num_sequences=2", "validation.mine.length=16", "reconstruction.stop_on=mine"],
        ["reconstruction=none", "pruner=magnitude"],
        ["reconstruction=bias_compensation", "pruner=magnitude"],
        ["reconstruction=br_gp", "calibration@reconstruction_data=vocabulary", "reconstruction_data.set=1", "reconstruction_data.num_sequences=4", "reconstruction_data.length=16"],
    ],
)  # fmt: skip
def test_passes_are_those_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choices: list[str]
) -> None:
    """Catches a pass that the guess forgets or counts twice: targets, the pruned chain of a window, what is reused."""
    passed = {False: 0, True: 0}
    run = BlockCall.run

    def counted(self: BlockCall, block: nn.Module, hidden: Tensor, **more: Any) -> Tensor:
        # Of texts: a few tokens tell beforehand which layer is the last one called.
        passed[torch.is_grad_enabled()] += hidden.shape[0] * hidden.shape[1] * (hidden.shape[1] == 16)
        return run(self, block, hidden, **more)

    monkeypatch.setattr(BlockCall, "run", counted)
    plan, _ = run_tiny(tmp_path, "pruner=wanda", *choices)
    weights = plan.shapes.num_block_parameters / plan.shapes.num_blocks
    a_token = 2 * weights + 4 * 16 * plan.shapes.hidden_size
    stages = guessed_stages(plan, BARE)
    assert sum(stages[stage] for stage in PASSING) == pytest.approx(
        a_token * (passed[False] + 3 * passed[True])
    )
    assert stages["pruning"] == 0


@pytest.mark.usefixtures("counting")
def test_what_a_pruner_does_by_hand(tmp_path: Path) -> None:
    """Catches a Gram for each of the layers that share an input, a forgotten factor, sweep, round or solver."""
    plain, gram = (guessed_stages(plan_of(tmp_path, "reconstruction=none", f"pruner={it}"), BARE) for it in ("wanda", "sparsegpt"))  # fmt: skip
    tokens, blocks, hidden, inner, narrow = 3 * 16, 3, 32, 64, 16
    grams = 2 * tokens * (3 * hidden**2 + inner**2)
    factors = 4 / 3 * (3 * hidden**3 + inner**3)
    into_hidden = hidden + narrow + narrow + hidden + inner + inner
    square = into_hidden * hidden**2 + hidden * inner**2
    assert gram["statistics"] - plain["statistics"] == pytest.approx(blocks * grams)
    assert gram["pruning"] - plain["pruning"] == pytest.approx(blocks * (factors + square))
    rounds = ("schedule=iterative", "schedule.rounds=3", "schedule.reconstruct=end")
    thrice = guessed_stages(plan_of(tmp_path, "reconstruction=none", "pruner=sparsegpt", *rounds), BARE)
    assert thrice["pruning"] == pytest.approx(3 * gram["pruning"])
    assert thrice["dense chain"] == pytest.approx(gram["dense chain"])
    few = ("reconstruction=least_squares", "reconstruction.layerwise.max_iterations=30")
    solved = guessed_stages(plan_of(tmp_path, "pruner=sparsegpt", *few), BARE)
    assert solved["pruning"] - gram["pruning"] == pytest.approx(blocks * 2 * 32 * square)
    assert solved["statistics"] == pytest.approx(gram["statistics"]), "the pruner's Grams are the solver's"
    paired = guessed_stages(
        plan_of(tmp_path, "pruner=wanda", *few, "reconstruction.target_chain=dense"), BARE
    )
    assert paired["statistics"] == pytest.approx(3 * plain["statistics"] + 2 * blocks * grams)


@pytest.mark.usefixtures("counting")
def test_evaluation_and_calls(tmp_path: Path) -> None:
    """Catches an evaluation of one model alone, and calls and steps that are free."""
    write_documents(tmp_path / "mine.jsonl")
    texts = perplexity_on(mine=tmp_path / "mine.jsonl")
    plan = plan_of(tmp_path, "reconstruction=br_gp", "reconstruction.epochs=2", *texts)
    plain = guessed_stages(plan, BARE)
    assert plain["evaluation"] == plain["dense evaluation"] == 2 * plan.shapes.num_parameters * 3 * 16
    more = guessed_stages(plan, replace(BARE, step=10))
    # Two epochs of two batches of at most 2 of 3 sequences, in each of three blocks.
    assert more["reconstruction"] - plain["reconstruction"] == pytest.approx(2 * 2 * 3 * 10)
    assert guessed_stages(plan, replace(BARE, call=10))["dense chain"] - plain[
        "dense chain"
    ] == pytest.approx(2 * 3 * 10)


@pytest.mark.usefixtures("counting")
def test_the_last_layer_and_steps_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pass, a Gram or an iteration that is free, and steps that are guessed at float32's rate."""
    given = ("reconstruction=br_gp_cr", "reconstruction.epochs=2", "pruner=magnitude")
    plain, solved, faster = (
        guessed_stages(plan_of(tmp_path, *given, *more), BARE)["reconstruction"]
        for more in (
            (),
            ("reconstruction.last_layer_iterations=3",),
            ("reconstruction.training_dtype=bfloat16",),
        )
    )
    shapes, tokens = plan_of(tmp_path).shapes, 3 * 16
    windows, trained, hidden, inner = 4, 6, 32, 64
    a_block = (2 * shapes.num_block_parameters / shapes.num_blocks + 4 * 16 * hidden) * tokens
    reading = tokens * (2 * inner**2 + 2 * hidden * inner)
    added = trained * a_block + windows * (reading + (3 * 3 + 2) * 2 * hidden * inner**2)
    assert solved - plain == pytest.approx(added)
    assert faster == plain
    monkeypatch.setattr(arithmetic, "product_rate", lambda _, dtype, threads: 2.0 if dtype == torch.bfloat16 else 1.0)  # fmt: skip
    again = guessed_stages(plan_of(tmp_path, *given, "reconstruction.training_dtype=bfloat16"), BARE)
    assert again["reconstruction"] == pytest.approx(plain / 2)


@pytest.mark.usefixtures("counting")
def test_gradients_that_a_method_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gradients that cost nothing, a whole model's that are counted in every round or on text they are not taken on."""
    float32 = 4.0
    monkeypatch.setattr(
        arithmetic, "product_rate", lambda _, dtype, threads: float32 if dtype == torch.float32 else 1.0
    )

    def seconds(*more: str) -> float:
        given = ("reconstruction=none", "dtype=bfloat16", *more)
        return guessed_stages(plan_of(tmp_path, *given), BARE)["gradients"]

    shapes = plan_of(tmp_path).shapes
    tokens, rounds = 3 * 16, ("schedule=iterative", "schedule.rounds=3")
    blocks = (2 * shapes.num_block_parameters + 3 * 4 * 16 * shapes.hidden_size) * tokens
    outside = 2 * (shapes.num_parameters - shapes.num_block_parameters) * tokens
    assert outside > 0
    model = blocks + 3 * (blocks + outside) / float32
    assert seconds("pruner=wanda") == 0
    for pruner in ("fisher", "gblm", "d_pruner"):
        assert seconds(f"pruner={pruner}") == pytest.approx(model)
        assert seconds(f"pruner={pruner}", *rounds) == pytest.approx(model)
    assert seconds("pruner=wanda_plus_plus") == pytest.approx(3 * blocks / float32)
    assert seconds("pruner=wanda_plus_plus", *rounds) == pytest.approx(3 * 3 * blocks / float32)
    parts = ["calibration=mixture", "calibration.num_sequences=null", "calibration.length=null"]
    parts += ["calibration.parts.web=null", "calibration.parts.generated=null"]
    for name, count in (("general", 5), ("law", 2)):
        place = f"calibration.parts.{name}"
        parts += [f"+calibration@{place}=vocabulary", f"{place}.num_sequences={count}", f"{place}.length=16"]
    assert seconds("pruner=d_pruner", "pruner.domain=law", *parts) == pytest.approx(model * 2 / 3)
    assert seconds("pruner=d_pruner", *parts) == pytest.approx(model * 7 / 3)


@pytest.mark.usefixtures("counting")
def test_the_floor_by_hand(tmp_path: Path) -> None:
    """Catches a floor with whole Grams, attention to later positions a factor's inverse or the last layer, and one above what is guessed."""
    plan = plan_of(tmp_path, "reconstruction=br_gp", "pruner=sparsegpt")
    floor, measured = guessed_stages(plan, FLOOR), guessed_stages(plan, MEASURED)
    tokens, blocks, hidden, inner, narrow = 3 * 16, 3, 32, 64, 16
    weights = plan.shapes.num_block_parameters / plan.shapes.num_blocks
    forward = tokens * (2 * weights + 2 * 16 * hidden)
    into_hidden = hidden + narrow + narrow + hidden + inner + inner
    observed = forward - tokens * 2 * hidden * inner
    assert floor["statistics"] == pytest.approx(blocks * (observed + tokens * (3 * hidden**2 + inner**2)))
    square = into_hidden * hidden**2 + hidden * inner**2
    assert floor["pruning"] == pytest.approx(blocks * ((3 * hidden**3 + inner**3) / 3 + square))
    assert floor["reconstruction"] == pytest.approx(blocks * plan.technique.epochs * 3 * forward)
    assert all(floor[stage] <= measured[stage] for stage in floor)


def test_the_rate_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rate of another dtype or number of threads, one measured again for every plan, and threads that stay changed."""
    asked = []
    rate = arithmetic.product_rate

    def noted(device: torch.device, dtype: torch.dtype, threads: int) -> float:
        asked.append((device.type, dtype, threads))
        return rate(device, dtype, threads)

    monkeypatch.setattr(arithmetic, "product_rate", noted)
    threads = torch.get_num_threads()
    assert guessed_seconds(plan_of(tmp_path)) > 0
    assert set(asked) == {("cpu", torch.float32, 1)}
    assert torch.get_num_threads() == threads
    measured = rate(torch.device("cpu"), torch.float32, 1)
    assert 1e6 < measured < 1e15
    assert rate(torch.device("cpu"), torch.float32, 1) == measured


def test_a_run_tells_how_far_off_the_guess_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a guess that is not recorded, told twice, or replaced when a finished run is evaluated anew."""
    caplog.set_level(logging.INFO, "reprune")
    logging.getLogger("reprune").addHandler(caplog.handler)
    try:
        plan, result = run_tiny(tmp_path)
        told = [it.getMessage() for it in caplog.records if "guessed" in it.getMessage()]
        caplog.clear()
        write_documents(tmp_path / "mine.jsonl")
        again, later = run_tiny(tmp_path, *perplexity_on(mine=tmp_path / "mine.jsonl"))
        assert not [it for it in caplog.records if "guessed" in it.getMessage()]
    finally:
        logging.getLogger("reprune").removeHandler(caplog.handler)
    assert again.folder.path == plan.folder.path
    took, guessed = sum(result["seconds"].values()), result["guessed_seconds"]
    assert guessed == pytest.approx(guessed_seconds(plan), abs=1e-3)
    assert later["guessed_seconds"] == guessed
    assert len(set(told)) == 1
    assert told[0].startswith(f"took {took:,.1f} s, ")
    times = float(told[0].split(", ")[1].split()[0])
    # Two digits are told, and three decimals of either are kept.
    assert times == pytest.approx(took / guessed, rel=0.1)
