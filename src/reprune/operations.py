"""What a run comes to before it begins: visits of blocks, Grams, sweeps, products; counted, not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from reprune.calibration.gather import Request
from reprune.engine.windows import windows_over
from reprune.run_plan import RunPlan
from reprune.shapes import Shapes


@dataclass(frozen=True)
class Visits:
    """How many blocks all windows together train, pass the pruned chain through before they prune and to go on.

    `trainings` are how many there are of windows, `fitted` is how often a block that is new is fitted, once or in every round.
    """

    trained: int
    trainings: int
    earlier: int
    frozen: int
    fitted: int

    @staticmethod
    def of(plan: RunPlan) -> Visits:
        """Those of a run."""
        technique = plan.technique
        windows = windows_over(plan.shapes.num_blocks, technique.window, technique.stride)
        fitted = len(plan.steps) if plan.schedule.reconstruct == "each_round" else 1
        frozen = sum(window.frozen - window.first for window in windows)
        if not technique.trains:
            # What a window's last block puts out was computed when it was pruned.
            frozen -= sum(window.new < window.stop == window.frozen for window in windows)
        return Visits(
            trained=sum(
                (window.stop - window.first) * (fitted if window.new < window.stop else 1)
                for window in windows
            ),
            trainings=sum(fitted if window.new < window.stop else 1 for window in windows),
            earlier=sum(window.new - window.first for window in windows if window.new < window.stop),
            frozen=frozen,
            fitted=fitted,
        )


def distinct(requests: Sequence[Request]) -> list[Request]:
    """Each text once."""
    return [
        request
        for place, request in enumerate(requests)
        if not any((it.role, it.source) == (request.role, request.source) for it in requests[:place])
    ]


def solver_reads(plan: RunPlan) -> tuple[int, int]:
    """How often a layer-wise fit passes its text through a block and adds up Grams, beyond what the pruner does."""
    technique, layerwise = plan.technique, plan.technique.layerwise
    assert layerwise is not None
    mask, own = ([it.source for it in plan.requests if it.use == use] for use in ("mask", "reconstruction"))
    shared = technique.statistics_chain == technique.input_chain and mask == own
    # Both chains side by side.
    pairs = layerwise.paired and technique.target_chain == "dense" and not technique.solves_on_dense_inputs(0)
    again = 0 if shared and plan.needs.any else 1
    own_grams = 0 if shared and plan.needs.gram else int(layerwise.reads_gram)
    return again + 2 * pairs, own_grams + pairs


def _targets(shapes: Shapes) -> list[tuple[int, int]]:
    """(d_out, d_in) of the layers that are pruned."""
    return [layer.shape for layer in shapes.target_layers.values()]


def _inputs(shapes: Shapes) -> list[tuple[int, int, bool]]:
    """d_in, how many inputs of that width a block has, whether they are experts'; an entry a block and width.

    Shapes do not tell which layers share an input: about half do, as q, k, v and gate, up.
    """
    found = Counter(
        (name.split(".")[0], layer.shape[1], layer.expert) for name, layer in shapes.target_layers.items()
    )
    return [(width, (count + 1) // 2, expert) for (_, width, expert), count in found.items()]


def grams(shapes: Shapes, tokens: int) -> float:
    """Pairs of inputs that Σ x xᵀ adds up, over `tokens`; all experts of a block together see every token once, or a few times."""
    return sum(tokens * width**2 * (1 if expert else count) for width, count, expert in _inputs(shapes))


def last_weights(shapes: Shapes) -> int:
    """Weights of each block's last layer that is pruned, in all: what it puts out is of no use to statistics."""
    last = {name.split(".")[0]: count for name, count in shapes.num_weights.items()}
    return sum(last.values())


def last_layers(plan: RunPlan, visits: Visits, tokens: int, gram: float) -> float:
    """Operations of the least squares of the last layer after every training, without the passes that they read.

    A Gram takes `gram` of them for each token and pair of inputs. Two halves and the whole are solved, in as many steps as
    are asked for, and each half is tried on the other. The model's last layer stands for all.
    """
    d_out, d_in = list(plan.shapes.linears.values())[-1]
    reading = tokens * (gram * d_in**2 + 2 * d_out * d_in)
    steps = 3 * plan.technique.last_layer_iterations + 2
    return visits.trainings * (reading + steps * 2 * d_out * d_in**2)


def factors(shapes: Shapes) -> float:
    """Σ d_in³ over all Grams, which the operations of their factors are a multiple of."""
    return sum(float(width**3 * count) for width, count, _ in _inputs(shapes))


def products(shapes: Shapes) -> float:
    """Operations of the products of all weights with their Grams."""
    return 2.0 * sum(out * into**2 for out, into in _targets(shapes))


def columns(shapes: Shapes) -> int:
    """Columns of all layers that are pruned."""
    return sum(into for _, into in _targets(shapes))
