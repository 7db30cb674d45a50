"""Layer-wise least squares in the block loop, by hand: whole models in float64, hooks, and one linear system a row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import MakeModel
from helpers import plan_of, run_tiny, write_documents
from reprune.calibration.roles import Texts
from reprune.engine import fitting
from reprune.errors import ConfigError, RunError
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import Pruner
from reprune.pruning.magnitude import Magnitude
from reprune.pruning.sparsegpt import SparseGPT
from reprune.pruning.wanda import Wanda
from reprune.reconstruction.objective import WindowObjective
from reprune.reconstruction.technique import Technique
from reprune.sparsity.iterative import Iterative
from reprune.sparsity.schedule import Schedule
from support import block_loop, changed, preset, random_text, some_texts, state_of

State = dict[str, Tensor]
LAYERWISE = {"_target_": "reprune.reconstruction.least_squares.LeastSquares"}
EXACT = {"_target_": "reprune.reconstruction.least_squares.LeastSquares", "solver": "exact"}
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Layers of a Llama block that are computed at the same moment, in order."""

EVERY_PRUNER = pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda it: type(it).__name__)


@dataclass
class _Solved:
    """A model before and after a run, and what the run says of it."""

    model: LoadedModel
    texts: Texts
    dense: State
    after: State
    rows: list[dict[str, Any]]
    masks: dict[int, dict[str, Tensor]]

    @property
    def path(self) -> str:
        """Where the blocks lie in the model."""
        return next(path for path, module in self.model.model.named_modules() if module is self.model.blocks)

    def weight(self, state: State, block: int, name: str) -> Tensor:
        """[d_out, d_in], float64."""
        view = self.model.linears[block][name]
        return view.orient(state[f"{self.path}.{block}.{name}.weight"]).double()

    def keep(self, block: int, name: str) -> Tensor:
        """The run's mask [d_out, d_in]."""
        return self.model.linears[block][name].orient(self.masks[block][name])

    def mixed(self, block: int, groups: Sequence[Sequence[str]] = ()) -> State:
        """The model at some moment: blocks before `block` are finished, and in it the layers of `groups`."""
        done = [f"{self.path}.{index}." for index in range(block)]
        done += [f"{self.path}.{block}.{name}." for name in self.names(block, groups)]
        return {
            name: self.after[name] if name.startswith(tuple(done)) else tensor
            for name, tensor in self.dense.items()
        }

    def dense_before(self, block: int, groups: Sequence[Sequence[str]]) -> State:
        """The same with dense blocks before `block`."""
        own = f"{self.path}.{block}."
        mixed = self.mixed(block, groups)
        return {name: mixed[name] if name.startswith(own) else dense for name, dense in self.dense.items()}

    def names(self, block: int, groups: Sequence[Sequence[str]]) -> list[str]:
        """Full names of the layers of some groups."""
        last = [name for group in groups for name in group]
        return [name for name in self.model.linears[block] if name.split(".")[-1] in last]

    def inputs(self, state: State, block: int, names: Sequence[str], use: str) -> dict[str, Tensor]:
        """What enters layers of a block in a whole model with these weights: float64 [tokens of a use, d_in]."""
        twin = copy.deepcopy(self.model.model)
        twin.load_state_dict(state)
        twin = twin.double()
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in names:
            seen_of_one = seen[name]
            module = twin.get_submodule(f"{self.path}.{block}.{name}")
            module.register_forward_pre_hook(
                lambda _, given, seen_of_one=seen_of_one: seen_of_one.append(given[0].flatten(0, -2).clone())
            )
        with torch.no_grad():
            for text in getattr(self.texts, use):
                twin(input_ids=text.tokens_NT, use_cache=False)
        return {name: torch.cat(parts) for name, parts in seen.items()}


def _run(
    model: LoadedModel,
    folder: Path,
    *,
    texts: Texts | None = None,
    pruner: Pruner | None = None,
    technique: Technique | None = None,
    schedule: Schedule | None = None,
    **choices: Any,
) -> _Solved:
    texts = texts or some_texts()
    dense = state_of(model.model)
    technique = technique or preset("least_squares", **{"layerwise": EXACT, **choices})
    loop = block_loop(model, folder, texts=texts, pruner=pruner, technique=technique, schedule=schedule)
    rows, masks = loop.run()
    return _Solved(model, texts, dense, state_of(model.model), rows, masks)


def _solution(weight: Tensor, keep: Tensor, student: Tensor, teacher: Tensor, damp: float = 0.01) -> Tensor:
    """ŵ_K = (2/n X̂ᵀX̂ + λI)_KK⁻¹ (2/n X̂ᵀX w + λw)_K for every row, with X̂ `student` and X `teacher` [tokens, d_in].

    A feature that X̂ never has is as good as one of its own with H_jj = 1, whose weight stays.
    """
    hessian = 2 / len(student) * student.T @ student
    cross = 2 / len(student) * student.T @ teacher
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    cross[dead] = torch.eye(len(dead), dtype=torch.float64)[dead]
    damping = damp * hessian.diagonal().mean() * torch.eye(len(dead), dtype=torch.float64)
    solved = torch.zeros_like(weight)
    for row, columns in enumerate(keep):
        target = ((cross + damping) @ weight[row])[columns]
        solved[row, columns] = torch.linalg.solve((hessian + damping)[columns][:, columns], target)
    return solved


def _wanda(weight: Tensor, inputs: Tensor, count: int | None = None) -> Tensor:
    """Keep mask without the `count` lowest |w|·‖x‖ of each row, by default half of them."""
    lowest = (weight.abs() * inputs.norm(dim=0)).argsort(dim=1)[:, : count or weight.shape[1] // 2]
    return torch.ones_like(weight, dtype=torch.bool).scatter(1, lowest, False)


def _differ(one: Tensor, other: Tensor) -> bool:
    """By far more than the tolerance of `_same`."""
    return float((one - other).norm() / other.norm()) > 0.02


def _same(found: Tensor, expected: Tensor, place: str) -> None:
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-3, f"{place}: relative difference {error:.2g}"


@EVERY_PRUNER
@pytest.mark.parametrize("target_chain", ["sparse", "dense"])
def test_together_by_hand(make_model: MakeModel, tmp_path: Path, pruner: Pruner, target_chain: str) -> None:
    """Catches inputs of a dense or unsolved block 0, of the layer's own pruned neighbours, and X̂ in place of X.

    The reconstruction text is the mask text and another, so that statistics of the mask text alone are caught too.
    """
    run = _run(make_model("llama", num_blocks=2), tmp_path, pruner=pruner, target_chain=target_chain)
    for block in range(2):
        names = list(run.model.linears[block])
        students = run.inputs(run.mixed(block), block, names, "reconstruction")
        dense = run.inputs(run.dense, block, names, "reconstruction")
        of_mask = run.inputs(run.mixed(block), block, names, "mask")
        for name in names:
            weight, keep = run.weight(run.dense, block, name), run.keep(block, name)
            teacher = students[name] if target_chain == "sparse" else dense[name]
            expected = _solution(weight, keep, students[name], teacher)
            found = run.weight(run.after, block, name)
            assert torch.equal(found != 0, keep)
            _same(found, expected, f"block {block}, {name}")
            assert _differ(weight * keep, expected)
            assert _differ(_solution(weight, keep, of_mask[name], of_mask[name]), expected)
            if block == 1:
                assert _differ(_solution(weight, keep, dense[name], dense[name]), expected)
            if isinstance(pruner, Wanda):
                assert torch.equal(keep, _wanda(weight, of_mask[name])), f"block {block}, {name}"


@EVERY_PRUNER
@pytest.mark.parametrize("target_chain", ["sparse", "dense"])
def test_sequential_by_hand(make_model: MakeModel, tmp_path: Path, pruner: Pruner, target_chain: str) -> None:
    """Catches a group that is pruned or solved on inputs from before the groups it hangs on were pruned and solved."""
    run = _run(
        make_model("llama", num_blocks=2), tmp_path, pruner=pruner, target_chain=target_chain,
        within_block="sequential",
    )  # fmt: skip
    for block in range(2):
        for number, group in enumerate(GROUPS):
            names = run.names(block, [group])
            now = run.mixed(block, GROUPS[:number])
            students = run.inputs(now, block, names, "reconstruction")
            dense = run.inputs(run.dense, block, names, "reconstruction")
            early = run.inputs(run.mixed(block), block, names, "reconstruction")
            of_mask = run.inputs(now, block, names, "mask")
            for name in names:
                weight, keep = run.weight(run.dense, block, name), run.keep(block, name)
                teacher = students[name] if target_chain == "sparse" else dense[name]
                expected = _solution(weight, keep, students[name], teacher)
                _same(run.weight(run.after, block, name), expected, f"block {block}, {name}")
                if isinstance(pruner, Wanda):
                    assert torch.equal(keep, _wanda(weight, of_mask[name])), f"block {block}, {name}"
                if number:
                    stale = early[name] if target_chain == "sparse" else dense[name]
                    assert _differ(_solution(weight, keep, early[name], stale), expected)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_wanda_in_groups_without_solving(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    """Catches `sequential` that only the solver heeds, and groups in the order of modules: Phi-3 has o before qkv."""
    technique = preset("none", within_block="sequential")
    run = _run(make_model(architecture, num_blocks=2), tmp_path, pruner=Wanda(), technique=technique)
    groups = GROUPS if architecture == "llama" else (("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",))  # fmt: skip
    stale = set()
    for block in range(2):
        for number, group in enumerate(groups):
            names = run.names(block, [group])
            inputs = run.inputs(run.mixed(block, groups[:number]), block, names, "mask")
            early = run.inputs(run.mixed(block), block, names, "mask")
            for name in names:
                weight, keep = run.weight(run.dense, block, name), run.keep(block, name)
                assert torch.equal(keep, _wanda(weight, inputs[name])), f"block {block}, {name}"
                assert torch.equal(run.weight(run.after, block, name), weight * keep)
                stale |= set() if torch.equal(keep, _wanda(weight, early[name])) else {name.split(".")[-1]}
    assert stale == {name for group in groups[1:] for name in group}, "the data do not tell the orders apart"
    assert list(run.masks[0]) == list(run.model.linears[0]), "the record is in the model's order"


@pytest.mark.parametrize("target_chain", ["sparse", "dense"])
def test_inputs_of_the_dense_chain(make_model: MakeModel, tmp_path: Path, target_chain: str) -> None:
    """Catches an `input_chain` that the solver does not heed; masks are still chosen on the pruned chain.

    With all layers of a block together, what enters them is the same in both chains: the targets are one.
    """
    run = _run(
        make_model("llama", num_blocks=2), tmp_path, pruner=Wanda(), target_chain=target_chain,
        input_chain="dense",
    )  # fmt: skip
    names = list(run.model.linears[1])
    dense = run.inputs(run.dense, 1, names, "reconstruction")
    sparse = run.inputs(run.mixed(1), 1, names, "reconstruction")
    of_mask = run.inputs(run.mixed(1), 1, names, "mask")
    for name in names:
        weight, keep = run.weight(run.dense, 1, name), run.keep(1, name)
        expected = _solution(weight, keep, dense[name], dense[name])
        _same(run.weight(run.after, 1, name), expected, name)
        assert _differ(_solution(weight, keep, sparse[name], sparse[name]), expected)
        assert torch.equal(keep, _wanda(weight, of_mask[name]))


@pytest.mark.parametrize("target_chain", ["sparse", "dense"])
def test_inputs_of_the_dense_chain_in_groups(
    make_model: MakeModel, tmp_path: Path, target_chain: str
) -> None:
    """Catches a target that follows the pruned groups: the dense chain's o_proj never saw pruned q, k and v."""
    run = _run(
        make_model("llama", num_blocks=2), tmp_path, pruner=Wanda(), target_chain=target_chain,
        input_chain="dense", within_block="sequential",
    )  # fmt: skip
    for block in range(2):
        for number, group in enumerate(GROUPS):
            names = run.names(block, [group])
            now = run.dense_before(block, GROUPS[:number])
            students = run.inputs(now, block, names, "reconstruction")
            dense = run.inputs(run.dense, block, names, "reconstruction")
            for name in names:
                weight, keep = run.weight(run.dense, block, name), run.keep(block, name)
                teacher = students[name] if target_chain == "sparse" else dense[name]
                expected = _solution(weight, keep, students[name], teacher)
                _same(run.weight(run.after, block, name), expected, f"block {block}, {name}")


@pytest.mark.parametrize("target_chain", ["sparse", "dense"])
@pytest.mark.parametrize("input_chain", ["sparse", "dense"])
def test_rounds_by_hand(make_model: MakeModel, tmp_path: Path, target_chain: str, input_chain: str) -> None:
    """Catches a second round that is fitted to the first one's weights, or solved on the first one's inputs.

    One block, whose own input is the same in both chains: what its later layers see is not, once it is pruned.
    """
    model = make_model("llama", num_blocks=1)
    technique = preset("least_squares", layerwise=EXACT, target_chain=target_chain, input_chain=input_chain)
    schedule = Iterative(rounds=2, shape="linear")
    run = _run(model, tmp_path, pruner=Wanda(), technique=technique, schedule=schedule)
    names = list(model.linears[0])
    state, keeps = dict(run.dense), {}
    dense = run.inputs(run.dense, 0, names, "reconstruction")
    for share in (4, 2):
        of_mask = run.inputs(state, 0, names, "mask")
        students = run.inputs(state, 0, names, "reconstruction")
        for name in names:
            now, weight = run.weight(state, 0, name), run.weight(run.dense, 0, name)
            # What is removed already is zero, and so among the lowest.
            keeps[name] = _wanda(now, of_mask[name], now.shape[1] // share)
            teacher = students[name] if target_chain == "sparse" else dense[name]
            state[f"model.layers.0.{name}.weight"] = _solution(weight, keeps[name], students[name], teacher)
    for name in names:
        assert torch.equal(run.keep(0, name), keeps[name]), name
        _same(run.weight(run.after, 0, name), run.weight(state, 0, name), name)


@pytest.mark.parametrize("statistics_chain", ["sparse", "dense"])
def test_mask_text_is_not_the_text_that_is_solved_on(
    make_model: MakeModel, tmp_path: Path, statistics_chain: str
) -> None:
    """Catches Grams of one text in the other's place, and a `statistics_chain` that reaches the solver."""
    mask, other = random_text("mask"), random_text("other", num_sequences=5)
    texts = Texts(mask=[mask], reconstruction=[other], probes=[random_text("probe", "probe")])
    run = _run(
        make_model("llama", num_blocks=2), tmp_path, texts=texts, pruner=Wanda(),
        statistics_chain=statistics_chain,
    )  # fmt: skip
    told_apart = 0
    for block in range(2):
        names = list(run.model.linears[block])
        solved_on = run.inputs(run.mixed(block), block, names, "reconstruction")
        chains = {
            "sparse": run.inputs(run.mixed(block), block, names, "mask"),
            "dense": run.inputs(run.dense, block, names, "mask"),
        }
        for name in names:
            weight, keep = run.weight(run.dense, block, name), run.keep(block, name)
            assert torch.equal(keep, _wanda(weight, chains[statistics_chain][name])), f"block {block}, {name}"
            _same(
                run.weight(run.after, block, name),
                _solution(weight, keep, solved_on[name], solved_on[name]),
                name,
            )
            told_apart += not torch.equal(*(_wanda(weight, chain[name]) for chain in chains.values()))
    assert told_apart == 7, "in block 0 the chains are one, in block 1 every layer tells them apart"


@pytest.mark.parametrize("chain", ["sparse", "dense"])
def test_statistics_chain_without_solving(make_model: MakeModel, tmp_path: Path, chain: str) -> None:
    """Catches a chain of statistics that only techniques with a solver heed."""
    technique = preset("none", statistics_chain=chain)
    run = _run(make_model("llama", num_blocks=2), tmp_path, pruner=Wanda(), technique=technique)
    names = list(run.model.linears[1])
    inputs = run.inputs(run.dense if chain == "dense" else run.mixed(1), 1, names, "mask")
    for name in names:
        assert torch.equal(run.keep(1, name), _wanda(run.weight(run.dense, 1, name), inputs[name]))


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT()], ids=lambda it: type(it).__name__)
@pytest.mark.parametrize("target_chain", ["sparse", "dense"])
def test_both_solvers_and_what_they_tell(
    make_model: MakeModel, tmp_path: Path, pruner: Pruner, target_chain: str
) -> None:
    """Catches a solver that moves the mask, ends too early or too late, or tells what it did not do.

    In block 0, where the pruner sees what it sees without a solver, and to which both solvers owe the same.
    """
    solvers = {
        "exact": EXACT,
        "conjugate_gradients": {**EXACT, "solver": "conjugate_gradients", "tolerance": 1e-6, "max_iterations": 400},
    }  # fmt: skip
    runs = {
        solver: _run(
            make_model("llama", num_blocks=1), tmp_path / solver, pruner=pruner, layerwise=choices,
            target_chain=target_chain,
        )
        for solver, choices in solvers.items()
    }  # fmt: skip
    untouched = _run(
        make_model("llama", num_blocks=1), tmp_path / "no", pruner=pruner, technique=preset("none")
    )
    for name in untouched.model.linears[0]:
        keep = untouched.keep(0, name)
        exact, found = (runs[solver].weight(runs[solver].after, 0, name) for solver in solvers)
        for run in runs.values():
            assert torch.equal(run.keep(0, name), keep)
            assert torch.equal(run.weight(run.after, 0, name) != 0, keep)
        _same(found, exact, name)
        told = {solver: run.rows[0]["layers"][name]["least_squares"] for solver, run in runs.items()}
        assert told["exact"] == {"solver": "exact"}
        assert told["conjugate_gradients"]["solver"] == "conjugate_gradients"
        assert 20 <= told["conjugate_gradients"]["iterations"] < 400
        assert 0 <= told["conjugate_gradients"]["excess_estimate"] < 1e-6
        assert "least_squares" not in untouched.rows[0]["layers"][name]


@pytest.mark.parametrize("solver", ["exact", "conjugate_gradients"])
def test_solving_lowers_the_error_on_its_own_text(make_model: MakeModel, tmp_path: Path, solver: str) -> None:
    """Catches weights that solve another problem than the one the error is measured by."""
    errors = {}
    for name in ("none", "least_squares"):
        technique = preset("none") if name == "none" else preset(name, layerwise={**EXACT, "solver": solver})
        run = _run(make_model("llama"), tmp_path / name, pruner=Wanda(), technique=technique)
        errors[name] = [row["after"]["calibration"]["mask"]["error"] for row in run.rows]
    pairs = zip(errors["least_squares"], errors["none"], strict=True)
    assert all(solved < 0.9 * pruned for solved, pruned in pairs)


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
@pytest.mark.parametrize("target_chain", ["sparse", "dense"])
def test_biases_and_transposed_storage(
    make_model: MakeModel, tmp_path: Path, architecture: str, target_chain: str
) -> None:
    """Catches a bias that is taken for a part of the output to fit, and Conv1D weights solved the wrong way round."""
    model = make_model(architecture, num_blocks=2)
    run = _run(model, tmp_path, pruner=SparseGPT(), target_chain=target_chain)
    weights = {f"{run.path}.{block}.{view.parameter}" for block in range(2) for view in model.linears[block].values()}  # fmt: skip
    assert {name for name in run.dense if not torch.equal(run.dense[name], run.after[name])} == weights
    biases = [
        tensor for name, tensor in run.dense.items() if name.replace(".bias", ".weight") in weights - {name}
    ]
    assert len(biases) == len(weights)
    assert all(bias.all() for bias in biases)
    for block in range(2):
        names = list(model.linears[block])
        students = run.inputs(run.mixed(block), block, names, "reconstruction")
        dense = run.inputs(run.dense, block, names, "reconstruction")
        for name in names:
            teacher = students[name] if target_chain == "sparse" else dense[name]
            expected = _solution(
                run.weight(run.dense, block, name), run.keep(block, name), students[name], teacher
            )
            _same(run.weight(run.after, block, name), expected, f"block {block}, {name}")


@pytest.mark.parametrize("solver", ["exact", "conjugate_gradients"])
@pytest.mark.parametrize("target_chain", ["sparse", "dense"])
@pytest.mark.parametrize("within_block", ["together", "sequential"])
def test_dead_inputs(
    make_model: MakeModel, tmp_path: Path, solver: str, target_chain: str, within_block: str
) -> None:
    """Catches NaN from inputs that are always zero, and weights drawn to zero where nothing speaks against them.

    Rows of up_proj that are all zero, and rows so small that the pruner empties them: what they feed is dead in the
    pruned chain, and for `sequential` alive in the dense one.
    """
    model = make_model("llama", num_blocks=1)
    model.blocks[0].mlp.up_proj.weight[:3] = 0
    model.blocks[0].mlp.up_proj.weight[3:6] *= 1e-3
    layerwise = {**EXACT, "solver": solver, "tolerance": 1e-6, "max_iterations": 400}
    run = _run(
        model, tmp_path, pruner=Magnitude(), target_chain=target_chain, within_block=within_block,
        layerwise=layerwise,
    )  # fmt: skip
    name = "mlp.down_proj"
    now = run.mixed(0, GROUPS[:3] if within_block == "sequential" else ())
    student = run.inputs(now, 0, [name], "reconstruction")[name]
    teacher = (
        student if target_chain == "sparse" else run.inputs(run.dense, 0, [name], "reconstruction")[name]
    )
    num_dead = 6 if within_block == "sequential" else 3
    assert student.eq(0).all(dim=0).nonzero().flatten().tolist() == list(range(num_dead))
    weight, keep, found = run.weight(run.dense, 0, name), run.keep(0, name), run.weight(run.after, 0, name)
    assert torch.isfinite(found).all()
    assert keep[:, :num_dead].any(dim=0).all()
    torch.testing.assert_close(found[:, :num_dead], (weight * keep)[:, :num_dead], rtol=1e-4, atol=1e-5)
    _same(found, _solution(weight, keep, student, teacher), name)


def test_training_goes_on_from_the_solved_weights(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches training that starts from what the pruner left, or solving that comes after it; block 1 sees both done."""
    seen: list[tuple[State, State]] = []
    real = fitting.train

    def train(objective: WindowObjective, *rest: Any) -> Any:
        before = state_of(objective.model.model)
        course = real(objective, *rest)
        seen.append((before, state_of(objective.model.model)))
        return course

    solved = _run(
        make_model("llama", num_blocks=2), tmp_path / "solved", pruner=Wanda(), target_chain="dense"
    )
    monkeypatch.setattr(fitting, "train", train)
    technique = preset("br_gp", layerwise=EXACT, epochs=2, batch_size=4, learning_rate=1e-3)
    run = _run(make_model("llama", num_blocks=2), tmp_path / "both", pruner=Wanda(), technique=technique)
    (start, trained), (second, _) = seen
    for name in solved.dense:
        if name.startswith("model.layers.0."):
            assert torch.equal(start[name], solved.after[name]), name
            assert not torch.equal(trained[name], start[name])
    assert all("least_squares" in layer for row in run.rows for layer in row["layers"].values())
    assert [len(row["training"]) for row in run.rows] == [1, 1]
    # What block 1 is solved on comes from the trained block 0.
    run.after = second
    names = list(run.model.linears[1])
    students = run.inputs(run.mixed(1), 1, names, "reconstruction")
    dense = run.inputs(run.dense, 1, names, "reconstruction")
    for name in names:
        expected = _solution(run.weight(run.dense, 1, name), run.keep(1, name), students[name], dense[name])
        _same(run.weight(second, 1, name), expected, name)


def _by_expert(run: _Solved, block: int) -> dict[int, Tensor]:
    """The tokens that the router of a block sends to each expert: float64 [tokens, hidden]."""
    twin = copy.deepcopy(run.model.model)
    twin.load_state_dict(run.mixed(block))
    calls: list[tuple[Tensor, Tensor]] = []
    experts = twin.get_submodule(f"{run.path}.{block}.mlp.experts")
    experts.register_forward_pre_hook(lambda _, given: calls.append((given[0].flatten(0, -2), given[1])))
    with torch.no_grad():
        for text in run.texts.reconstruction:
            twin(input_ids=text.tokens_NT, use_cache=False)
    return {
        expert: torch.cat([hidden[(chosen == expert).any(dim=1)] for hidden, chosen in calls]).double()
        for expert in range(4)
    }


def test_fused_experts_are_solved_on_their_own_tokens(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches experts solved on every token, or on another expert's."""
    run = _run(make_model("mixtral", num_blocks=2), tmp_path, pruner=Wanda())
    for block in range(2):
        for expert, inputs in _by_expert(run, block).items():
            assert 8 <= len(inputs) < 108
            whole = f"{run.path}.{block}.mlp.experts.gate_up_proj"
            weight = run.dense[whole][expert].double()
            keep = run.masks[block][f"mlp.experts.gate_up_proj.{expert}"]
            found = run.after[whole][expert].double()
            assert torch.equal(found != 0, keep)
            _same(found, _solution(weight, keep, inputs, inputs), f"block {block}, expert {expert}")


MIXTRAL = (
    "model.architecture=mixtral",
    "+model.config.num_local_experts=4",
    "+model.config.intermediate_size=32",
    "model.num_blocks=2",
    "reconstruction=least_squares",
    "pruner=wanda",
)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models made by a config lie in the test's folder."""
    monkeypatch.setenv("REPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_experts_have_no_pairs_across_chains(tmp_path: Path) -> None:
    """Catches pairs of tokens that two routers sent to different experts, and a refusal of what needs no pairs."""
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", *MIXTRAL, "reconstruction.target_chain=dense")
    assert caught.value.key == "reconstruction.target_chain"
    for word in ("0.mlp.experts.gate_up_proj.0", "different tokens", "sparse", "targets=attention"):
        assert word in caught.value.screen()
    plan_of(tmp_path / "out", *MIXTRAL, "reconstruction.target_chain=dense", "targets=self_attn.*")
    plan_of(tmp_path / "out", *MIXTRAL, "reconstruction.target_chain=dense", "reconstruction.layerwise=null")
    _, result = run_tiny(tmp_path / "out", *MIXTRAL)
    assert result["status"] == "finished"


def test_what_the_refusal_advises(tmp_path: Path, own_cache: None) -> None:
    """Catches advice that fails: attention alone runs against the dense chain."""
    _, result = run_tiny(tmp_path / "out", *MIXTRAL, "reconstruction.target_chain=dense", "targets=attention")
    assert result["sparsity"]["total"] == 0.5


@pytest.mark.usefixtures("own_cache")
def test_what_makes_a_run_another(tmp_path: Path) -> None:
    """Catches settings of a training that does not take place in the hash, and settings of pruning that are not."""

    def folder(*choices: str) -> str:
        return plan_of(tmp_path / "out", *choices).folder.id.rsplit("-", 1)[1]

    none = folder("reconstruction=none")
    idle = ["epochs=3", "learning_rate=1", "batch_size=5", "window=2", "weight_decay=1"]
    chains = ["target_chain=sparse", "input_chain=dense"]
    assert folder("reconstruction=none", *(f"reconstruction.{field}" for field in idle + chains)) == none
    assert folder("reconstruction=br", "reconstruction.epochs=0") == none
    solved = folder("reconstruction=least_squares")
    assert folder("reconstruction=least_squares", *(f"reconstruction.{field}" for field in idle)) == solved
    heeded = [
        folder("reconstruction=none", "reconstruction.statistics_chain=dense"),
        folder("reconstruction=none", "reconstruction.within_block=sequential"),
        folder("reconstruction=least_squares", "reconstruction.target_chain=dense"),
        folder("reconstruction=least_squares", "reconstruction.input_chain=dense"),
        folder("reconstruction=least_squares", "reconstruction.layerwise.damp=0.1"),
        folder("reconstruction=least_squares", "reconstruction.layerwise.solver=exact"),
        folder("reconstruction=least_squares", "reconstruction.within_block=sequential"),
        folder("reconstruction=br"),
        # Rounds go over all blocks that are new in a window.
        folder("reconstruction=none", "schedule=iterative"),
        folder("reconstruction=none", "schedule=iterative", "reconstruction.window=2"),
        folder("reconstruction=none", "schedule=iterative", "schedule.masks=free"),
        folder("reconstruction=least_squares", "schedule=iterative", "schedule.reconstruct=end"),
        folder("reconstruction=least_squares", "schedule=iterative"),
    ]
    assert len({none, solved, *heeded}) == 2 + len(heeded)
    trained = folder("reconstruction=br")
    for unread in (
        "reconstruction.rank=3",
        "reconstruction.patience=7",
        "schedule=iterative schedule.rounds=1",
    ):
        assert folder("reconstruction=br", *unread.split()) == trained
    by_magnitude = folder("reconstruction=br", "pruner=magnitude")
    assert (
        folder("reconstruction=br", "pruner=magnitude", "reconstruction.statistics_chain=dense")
        == by_magnitude
    )


VALIDATION = ("+calibration@validation.choose=vocabulary", "validation.choose.num_sequences=2",
              "validation.choose.length=16")  # fmt: skip


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("stop_on", "more", "words"),
    [
        ("held_out", (), ("a text for probes", "must be validation text", "there is none yet", "+calibration@validation.stop=web")),
        ("held_out", VALIDATION, ("a text for probes", "accepted  choose")),
        ("vocabulary", VALIDATION, ("a text for mask", "accepted  choose")),
        ("chose", VALIDATION, ("no validation text has this name", "accepted  choose")),
        ("nothing", (), ("no validation text has this name", "there is none yet")),
    ],
)  # fmt: skip
def test_stopping_is_on_validation_text(
    tmp_path: Path, stop_on: str, more: Sequence[str], words: Sequence[str]
) -> None:
    """Catches a choice made on a probe, which would then report what it was chosen by."""
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", *more, f"reconstruction.stop_on={stop_on}")
    assert caught.value.key == "reconstruction.stop_on"
    for word in words:
        assert word in caught.value.screen()
    plan_of(tmp_path / "out", *VALIDATION, "reconstruction.stop_on=choose")


@pytest.mark.usefixtures("own_cache")
def test_validation_text_is_no_probe(tmp_path: Path) -> None:
    """Catches a document that choices are made on and that is reported as held out."""
    write_documents(tmp_path / "mine.jsonl", count=60)
    own = ["calibration=domain", f"calibration.domain={tmp_path / 'mine.jsonl'}",
           "+calibration@validation.choose=same", "reconstruction.stop_on=choose"]  # fmt: skip
    plan_of(tmp_path / "out", *own)
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "out", *own, "validation.choose.split=probe")
    assert caught.value.key == "probes.held_out"
    for word in ("is also used as validation text", "validation.choose", "one role each"):
        assert word in caught.value.screen()


def test_a_pair_counts_tokens_that_belong_together() -> None:
    """Catches Σ x x̂ᵀ for Σ x̂ xᵀ, and a batch that replaces the ones before."""
    from reprune.reconstruction.least_squares import PairStatistics

    stream = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, generator=stream)
    pair = PairStatistics()
    for one, other in zip(student, teacher, strict=True):
        pair.add(one, other)
    assert pair.cross is not None
    expected = torch.einsum("bti,btj->ij", student, teacher)
    torch.testing.assert_close(pair.cross, expected)
    assert not torch.allclose(expected, expected.T, atol=0.1)


def test_singular_least_squares_are_damped_and_told(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches fewer tokens than inputs without dampening: weights that blow up, recorded as if they were a result."""
    texts = Texts(mask=[random_text("mask", num_sequences=1, length=8)])
    texts.reconstruction = texts.mask
    errors = {}
    for solver in ("conjugate_gradients", "exact"):
        technique = preset("least_squares", layerwise={**LAYERWISE, "damp": 0.0, "solver": solver})
        rows, _ = block_loop(
            make_model("llama", num_blocks=1),
            tmp_path / solver,
            texts=texts,
            pruner=Wanda(),
            technique=technique,
        ).run()
        told = rows[0]["layers"]["mlp.down_proj"]["least_squares"]["notes"]
        assert "singular" in told[0]
        errors[solver] = rows[0]["after"]["calibration"]["mask"]["error"]
    assert errors["exact"] == pytest.approx(errors["conjugate_gradients"], rel=1e-2)


@pytest.mark.parametrize("reconstruct", ["end", "each_round"])
def test_rounds_are_solved_when_the_schedule_says(
    make_model: MakeModel, tmp_path: Path, reconstruct: str
) -> None:
    """Catches `reconstruct=end` that solves in every round, so that later masks are chosen on solved weights."""
    model = make_model("llama", num_blocks=1)
    schedule = Iterative(rounds=3, shape="linear", reconstruct=reconstruct)  # type: ignore[arg-type]
    loop = block_loop(model, tmp_path, pruner=Wanda(), technique=preset("least_squares"), schedule=schedule)
    _, masks = loop.run()
    plain = make_model("llama", num_blocks=1)
    _, chosen = block_loop(plain, tmp_path / "plain", pruner=Wanda(), schedule=schedule).run()
    same = all(torch.equal(masks[0][name], chosen[0][name]) for name in masks[0])
    assert same == (reconstruct == "end")


def test_a_layer_that_loses_nothing_is_not_solved(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches rounding written into a dense model."""
    for number, choices in enumerate(
        ({"target_chain": "dense"}, {"layerwise": {**LAYERWISE, "solver": "exact"}})
    ):
        model = make_model("llama")
        before = state_of(model.model)
        technique = preset("least_squares", **choices)
        block_loop(model, tmp_path / str(number), sparsity=0.0, technique=technique).run()
        assert changed(before, model.model) == set()


def test_remarks_of_every_round_are_kept(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a factorisation that failed in the first round and is forgotten by the second."""
    plain = Magnitude.prune

    def remark(self: Magnitude, layer: Any, pattern: Any, sparsity: float) -> Any:
        return replace(plain(self, layer, pattern, sparsity), notes=[f"at {sparsity:g}"])

    monkeypatch.setattr(Magnitude, "prune", remark)
    schedule = Iterative(rounds=2, shape="linear")
    rows, _ = block_loop(make_model("llama"), tmp_path, schedule=schedule).run()
    assert rows[0]["layers"]["mlp.up_proj"]["notes"] == ["round 1: at 0.25", "round 2: at 0.5"]


@pytest.mark.parametrize("within_block", ["together", "sequential"])
def test_a_layer_that_is_never_called_is_named(
    make_model: MakeModel, tmp_path: Path, within_block: str
) -> None:
    """Catches a bare StopIteration."""
    model = make_model("llama", num_blocks=1)
    model.blocks[0].mlp.extra = torch.nn.Linear(32, 32)
    technique = preset("none", within_block=within_block)
    with pytest.raises(RunError, match=r"mlp\.extra: it was not called"):
        block_loop(model, tmp_path, pruner=Wanda(), technique=technique).run()
