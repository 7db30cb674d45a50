"""The masked least-squares solver against its oracle, and the oracle against a generic one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reprune.reconstruction.solvers import Solution, conjugate_gradients, energy, exact
from reprune.sparsity.patterns import Group, KeptOfGroup, Pattern, Unstructured

# By the name of a case: pattern, sparsity, and what a weight is compared with. Over the matrix, rows keep unequal counts.
MASKS: dict[str, tuple[Pattern, float, Group]] = {
    "50": (Unstructured(), 0.5, Group.MATRIX),
    "70": (Unstructured(), 0.7, Group.MATRIX),
    "2to4": (KeptOfGroup(kept=2, group=4), 0.5, Group.ROW),
}


def _inputs(columns: int, seed: int, tokens: int = 300) -> Tensor:
    """Correlated inputs with features of scales from 0.1 to 10 and a common mean: float64 [tokens, columns]."""
    stream = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=stream, dtype=torch.float64) / columns**0.5
    scales = torch.pow(10, 2 * torch.rand(columns, generator=stream, dtype=torch.float64) - 1)
    inputs: Tensor = torch.randn(tokens, columns, generator=stream, dtype=torch.float64) @ mixing + 0.5
    return inputs * scales


def _weight(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64
    )


def _hessian(inputs: Tensor, damp: float = 0.01) -> tuple[Tensor, float]:
    """2/n XᵀX + λI with H_jj = 1 for dead features, float64, and λ."""
    hessian = 2 / len(inputs) * inputs.T @ inputs
    hessian.diagonal()[hessian.diagonal() == 0] = 1
    damping = damp * float(hessian.diagonal().mean())
    hessian.diagonal().add_(damping)
    return hessian, damping


def _mask(case: str, weight: Tensor, hessian: Tensor) -> Tensor:
    pattern, sparsity, within = MASKS[case]
    return pattern.keep(weight.abs() * hessian.diagonal().sqrt(), sparsity, within)


def _solve(hessian: Tensor, rhs: Tensor, keep: Tensor, start: Tensor, **choices: float) -> Solution:
    """The solver as it is used: everything in float32."""
    counts = {name: int(value) for name, value in choices.items() if name != "tolerance"}
    tolerance = choices.get("tolerance", 1e-3)
    return conjugate_gradients(
        hessian.float(), rhs.float(), keep, start.float(), tolerance=tolerance, **counts
    )


def _excess(solved: Tensor, hessian: Tensor, rhs: Tensor, keep: Tensor, start: Tensor) -> float:
    """The share of the recoverable error that is left."""
    best = energy(exact(hessian, rhs, keep), hessian, rhs).sum()
    return float((energy(solved, hessian, rhs).sum() - best) / (energy(start, hessian, rhs).sum() - best))


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_solves_each_row_on_its_own_support(case: str, seed: int) -> None:
    """Catches columns that are mixed up when rows of unequal counts share a chunk; brute force over the rows."""
    weight = _weight(24, 40, seed)
    hessian, _ = _hessian(_inputs(40, seed))
    keep = _mask(case, weight, hessian)
    rhs = weight @ hessian
    found = exact(hessian, rhs, keep)
    assert not found[~keep].any()
    for row, columns in enumerate(keep):
        expected = torch.linalg.solve(hessian[columns][:, columns], rhs[row, columns])
        torch.testing.assert_close(found[row, columns], expected, rtol=1e-8, atol=1e-10)


def test_the_oracle_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that are lost or solved twice at the border of a chunk."""
    weight = _weight(23, 32, 1)
    hessian, _ = _hessian(_inputs(32, 1))
    keep = _mask("70", weight, hessian)
    whole = exact(hessian, weight @ hessian, keep)
    monkeypatch.setattr(
        "reprune.reconstruction.solvers.ORACLE_BYTES", 5 * 3 * 8 * int(keep.sum(dim=1).max()) ** 2
    )
    torch.testing.assert_close(exact(hessian, weight @ hessian, keep), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("columns", [64, 192])
@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradients_reach_the_oracle(case: str, columns: int, seed: int) -> None:
    """Catches a preconditioner, mask or step that is not that of the row: 0.5 % excess at the tolerance, then none."""
    weight = _weight(48, columns, seed)
    hessian, _ = _hessian(_inputs(columns, seed))
    assert torch.linalg.cond(hessian) > 1e3, "the problem is too easy to tell solvers apart"
    keep = _mask(case, weight, hessian)
    rhs, start = weight @ hessian, weight * keep
    solution = _solve(hessian, rhs, keep, start)
    assert 20 <= solution.iterations < 200
    assert solution.excess < 1e-3
    assert solution.weight.dtype == torch.float32
    assert _excess(solution.weight, hessian, rhs, keep, start) < 5e-3
    further = _solve(hessian, rhs, keep, start, tolerance=1e-7, max_iterations=400)
    assert _excess(further.weight, hessian, rhs, keep, start) < 1e-5


def test_the_scale_of_an_input_does_not_matter() -> None:
    """Catches a missing preconditioner: inputs in other units give the same weights in those units, step for step."""
    weight = _weight(24, 64, 3)
    hessian, _ = _hessian(_inputs(64, 3))
    keep = _mask("50", weight, hessian)
    units = torch.pow(2.0, torch.arange(64) % 13 - 6).double()
    found = _solve(hessian, weight @ hessian, keep, weight * keep, max_iterations=10).weight
    scaled, weight = hessian * units * units[:, None], weight / units
    rescaled = _solve(scaled, weight @ scaled, keep, weight * keep, max_iterations=10).weight
    torch.testing.assert_close(rescaled * units.float(), found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("iterations", [6, 12, 20])
def test_the_excess_is_the_share_that_the_last_five_iterations_gained(iterations: int) -> None:
    """Catches an estimate in other units: against the energies of runs that end after so many iterations."""
    weight = _weight(48, 96, 0)
    hessian, _ = _hessian(_inputs(96, 0))
    keep = _mask("50", weight, hessian)
    rhs, start = weight @ hessian, weight * keep

    def after(count: int) -> Solution:
        return _solve(hessian, rhs, keep, start, max_iterations=count)

    def total(solved: Tensor) -> float:
        return float(energy(solved, hessian, rhs).sum())

    last = after(iterations)
    assert last.iterations == iterations
    recent = total(after(iterations - 5).weight) - total(last.weight)
    assert last.excess == pytest.approx(recent / (total(start) - total(last.weight)), rel=0.02)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_it_ends_at_the_first_iteration_below_the_tolerance(tolerance: float) -> None:
    """Catches a stop that ignores the tolerance or the least number of iterations."""
    weight = _weight(48, 192, 2)
    hessian, _ = _hessian(_inputs(192, 2))
    keep = _mask("50", weight, hessian)
    rhs, start = weight @ hessian, weight * keep
    ended = _solve(hessian, rhs, keep, start, min_iterations=1, tolerance=tolerance)
    assert ended.excess < tolerance
    before = _solve(hessian, rhs, keep, start, max_iterations=ended.iterations - 1, tolerance=tolerance)
    assert before.excess >= tolerance
    least = _solve(hessian, rhs, keep, start, min_iterations=60, tolerance=tolerance)
    assert least.iterations == 60


@given(data=st.data(), seed=st.integers(0, 10_000), rows=st.integers(1, 8), columns=st.integers(1, 24))
def test_any_mask(data: st.DataObject, seed: int, rows: int, columns: int) -> None:
    """Masked weights are zero, the error is no higher than the start's, and no kept weight could lower it further."""
    weight = _weight(rows, columns, seed)
    hessian, _ = _hessian(_inputs(columns, seed, tokens=40))
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=rows, max_size=rows))
    noise = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    keep = noise < torch.tensor(shares)[:, None]
    rhs, start = weight @ hessian, weight * keep
    solution = _solve(hessian, rhs, keep, start, tolerance=1e-8)
    assert torch.isfinite(solution.weight).all()
    assert not solution.weight[~keep].any()
    scale = (weight @ hessian * weight).sum(dim=1)
    assert bool((energy(solution.weight, hessian, rhs) <= energy(start, hessian, rhs) + 1e-5 * scale).all())
    gradient = (solution.weight.double() @ hessian - rhs) * keep
    assert float(gradient.norm()) <= 1e-4 * float(rhs.norm())


@pytest.mark.parametrize("case", MASKS)
def test_a_row_is_solved_as_if_alone(case: str) -> None:
    """Catches scalars of one row that get into another: same rows, other company, the same iterations."""
    weight = _weight(16, 64, 4)
    hessian, _ = _hessian(_inputs(64, 4))
    keep = _mask(case, weight, hessian)
    rhs = weight @ hessian
    together = _solve(hessian, rhs, keep, weight * keep, max_iterations=15).weight
    for row in range(0, 16, 5):
        part = slice(row, row + 1)
        alone = _solve(hessian, rhs[part], keep[part], (weight * keep)[part], max_iterations=15).weight
        torch.testing.assert_close(together[part], alone, rtol=1e-3, atol=1e-3)


def test_a_row_that_has_converged_waits_for_the_others() -> None:
    """Catches NaN from 0/0 in rows that keep nothing, one weight, or are optimal from the start."""
    weight = _weight(5, 32, 5)
    hessian, _ = _hessian(_inputs(32, 5))
    hessian = hessian.float().double()
    keep = _mask("50", weight, hessian)
    keep[0], keep[1], keep[2] = False, False, True
    keep[1, 7] = True
    rhs, start = weight @ hessian, weight * keep
    rhs[3], start[3] = 0, 0
    solved = _solve(hessian, rhs, keep, start, min_iterations=100, max_iterations=100).weight
    assert not solved[0].any()
    assert not solved[3].any()
    torch.testing.assert_close(solved.double(), exact(hessian, rhs, keep), rtol=1e-3, atol=1e-3)


def test_what_keeps_everything_gets_the_dense_weights_back() -> None:
    """Catches dampening on one side only: from zero, with rhs = W H, the solution is W; from W it is found at once."""
    weight = _weight(12, 48, 6)
    hessian, _ = _hessian(_inputs(48, 6))
    keep = torch.ones_like(weight, dtype=torch.bool)
    rhs = weight @ hessian
    found = _solve(hessian, rhs, keep, torch.zeros_like(weight), tolerance=1e-9, max_iterations=500)
    torch.testing.assert_close(found.weight.double(), weight, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(exact(hessian, rhs, keep), weight, rtol=1e-8, atol=1e-8)
    single = weight.float()
    at_once = conjugate_gradients(hessian.float(), single @ hessian.float(), keep, single)
    assert torch.equal(at_once.weight, single)
    assert (at_once.iterations, at_once.excess) == (20, 0.0)


def test_all_removed() -> None:
    """Catches a division by no progress at all."""
    weight = _weight(3, 8, 7)
    hessian, _ = _hessian(_inputs(8, 7))
    none = torch.zeros_like(weight, dtype=torch.bool)
    solution = _solve(hessian, weight @ hessian, none, weight)
    assert not solution.weight.any()
    assert solution.excess == 0
    assert not exact(hessian, weight @ hessian, none).any()


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("case", MASKS)
def test_other_inputs(case: str, damp: float) -> None:
    """Catches X and X̂ swapped in the right-hand side: brute force on the inputs themselves, a row at a time.

    The least squares of ‖X̂ ŵ − X w‖² · 2/n + λ ‖ŵ − w‖², the dampening as further equations.
    """
    dense_inputs = _inputs(40, 8)
    noise = torch.randn(*dense_inputs.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    pruned_inputs = dense_inputs + 0.3 * noise * dense_inputs.std(dim=0)
    weight = _weight(10, 40, 8)
    hessian, damping = _hessian(pruned_inputs, damp)
    keep = _mask(case, weight, hessian)
    scale = (2 / len(pruned_inputs)) ** 0.5
    cross = scale**2 * dense_inputs.T @ pruned_inputs
    rhs = weight @ cross + damping * weight
    left = torch.cat([scale * pruned_inputs, damping**0.5 * torch.eye(40, dtype=torch.float64)])
    right = torch.cat([scale * dense_inputs @ weight.T, damping**0.5 * weight.T])
    expected = torch.zeros_like(weight)
    for row, columns in enumerate(keep):
        expected[row, columns] = torch.linalg.lstsq(left[:, columns], right[:, row, None]).solution[:, 0]
    torch.testing.assert_close(exact(hessian, rhs, keep), expected, rtol=1e-6, atol=1e-8)
    solution = _solve(hessian, rhs, keep, weight * keep, tolerance=1e-7, max_iterations=400)
    assert _excess(solution.weight, hessian, rhs, keep, weight * keep) < 1e-4
    assert _excess(exact(hessian, weight @ hessian, keep), hessian, rhs, keep, weight * keep) > 1e-2


@pytest.mark.parametrize("case", MASKS)
def test_dead_columns(case: str) -> None:
    """Catches NaN from inputs that are never other than zero; their weights stay, the rest is as without them."""
    inputs = _inputs(32, 9)
    dead = torch.tensor([0, 5, 6, 31])
    inputs[:, dead] = 0
    weight = _weight(10, 32, 9)
    hessian, _ = _hessian(inputs)
    keep = _mask(case, weight, hessian)
    keep[:5, dead], keep[5:, dead] = True, False
    rhs, start = weight @ hessian, weight * keep
    solved = _solve(hessian, rhs, keep, start, tolerance=1e-7, max_iterations=400).weight
    assert torch.isfinite(solved).all()
    torch.testing.assert_close(solved[:, dead].double(), start[:, dead], rtol=1e-4, atol=1e-4)
    alive = torch.ones(32, dtype=torch.bool)
    alive[dead] = False
    expected = exact(hessian[alive][:, alive], rhs[:, alive], keep[:, alive])
    torch.testing.assert_close(exact(hessian, rhs, keep)[:, alive], expected, rtol=1e-8, atol=1e-10)
    assert _excess(solved, hessian, rhs, keep, start) < 1e-4
