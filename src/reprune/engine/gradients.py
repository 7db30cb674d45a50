"""Gradients of layer weights over sequences: of the whole model's loss block by block, or of one block's output."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from reprune.calibration.source import TextSet
from reprune.engine.activations import Activations, Stores
from reprune.engine.chains import Boundary, Chains
from reprune.files import write_json
from reprune.model.device import DevicePlan
from reprune.model.linears import LinearView
from reprune.model.loading import LoadedModel
from reprune.pruning.contract import GradientStatistics
from reprune.reconstruction.gradient import in_float32
from reprune.reconstruction.objective import next_token_loss
from reprune.tensor_files import write_tensors

DONE = "gradients.json"
Layers = Mapping[str, LinearView]


@dataclass(frozen=True)
class ModelGradients:
    """Gradients of each sequence's mean next-token loss by the dense model's weights, a file a block in `folder`.

    Block-checkpointed: the boundaries between blocks are kept, in memory or on disk as `stores` has it, and each block
    is computed once more on the way back. Beside them no more is alive than one block in float32 with its gradients,
    and one sequence's logits.
    """

    folder: Path

    @property
    def made(self) -> bool:
        """Whether every block's file is there."""
        return (self.folder / DONE).is_file()

    def forget(self) -> None:
        """Remove the files, once every block is pruned."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def of(self, block: int) -> dict[str, GradientStatistics]:
        """Of the layers of a block, by name within it."""
        tensors = load_file(self.folder / f"{block}.safetensors")
        names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
        return {
            name: GradientStatistics(
                tensors[f"{name}/mean"], tensors[f"{name}/mean_square"], int(tensors[f"{name}/count"])
            )
            for name in names
        }

    def make(
        self, model: LoadedModel, texts: Sequence[TextSet], layers: Sequence[Layers], stores: Stores
    ) -> None:
        """Compute and write them; `layers` are those of each block that are wanted, and the model is dense."""
        chains = Chains(model, texts, stores)
        for block in range(len(model.blocks)):
            chains.advance_dense(block)
        behind = _behind_last_block(model, texts, chains.dense[len(model.blocks)], stores)
        # No further back than the first block of which anything is wanted.
        first = next(block for block, wanted in enumerate(layers) if wanted)
        for block in reversed(range(first, len(model.blocks))):
            sums, behind = _through_block(chains, block, texts, layers[block], behind, stores)
            if sums and model.plan.ranks.first:
                self._write(block, sums)
            del chains.dense[block + 1]
        if model.plan.ranks.first:
            write_json(self.folder / DONE, {"blocks": len(model.blocks)})
        model.plan.ranks.wait()

    def _write(self, block: int, found: Mapping[str, GradientStatistics]) -> None:
        tensors = {}
        for name, gradients in found.items():
            tensors[f"{name}/mean"] = gradients.mean
            tensors[f"{name}/mean_square"] = gradients.mean_square
            tensors[f"{name}/count"] = torch.tensor(gradients.num_sequences)
        write_tensors(self.folder / f"{block}.safetensors", tensors)


def block_gradients(
    chains: Chains, block: int, inputs: Boundary, texts: Sequence[TextSet], layers: Layers
) -> dict[str, GradientStatistics]:
    """Gradients of ‖f(x)‖₂ of each sequence, f the block as it is now, by the weights of some of its layers."""
    sums = _Sums(layers, chains.model.plan)
    for sample in _samples(chains.model, block, inputs, texts, layers):
        sums.add(sample.weight_gradients(sample.outputs.norm()))
    return sums.means()


def _behind_last_block(
    model: LoadedModel, texts: Sequence[TextSet], last: Boundary, stores: Stores
) -> Boundary:
    """The loss's gradient by what the last block puts out, sequence by sequence."""
    found: Boundary = {}
    with model.holding(*model.outside_blocks), torch.enable_grad():
        for text in texts:
            source = last[text.key]
            found[text.key] = _float32_like(source, stores)
            for row in model.plan.ranks.share(len(source)):
                where = slice(row, row + 1)
                states = source.read(where, model.plan).requires_grad_(True)
                tokens = text.tokens_NT[where].to(model.plan.device)
                places = source.positions(where)
                loss = next_token_loss(model.logits_behind_blocks(tokens, states, places), tokens, places)
                (gradient,) = torch.autograd.grad(loss, [states])
                found[text.key].write(where, gradient)
    model.plan.ranks.wait()
    return found


def _through_block(
    chains: Chains,
    block: int,
    texts: Sequence[TextSet],
    layers: Layers,
    behind: Boundary,
    stores: Stores,
) -> tuple[dict[str, GradientStatistics], Boundary]:
    """Of a block's weights, and the loss's gradient by what enters the block."""
    sums = _Sums(layers, chains.model.plan)
    before = {text.key: _float32_like(chains.dense[block][text.key], stores) for text in texts}
    for sample in _samples(chains.model, block, chains.dense[block], texts, layers):
        arriving = behind[sample.key].read(sample.where, chains.model.plan)
        weights, entering = sample.gradients(arriving)
        sums.add(weights)
        before[sample.key].write(sample.where, entering)
    chains.ranks.wait()
    return sums.means(), before


def _float32_like(store: Activations, stores: Stores) -> Activations:
    # A loss's gradients lie below what half precision can hold.
    return stores.new(len(store), store.length, store.positions_NT, dtype=torch.float32)


@dataclass(frozen=True)
class _Sample:
    """One sequence that went through a block in float32, with gradients."""

    key: str
    where: slice
    states: Tensor
    outputs: Tensor
    parameters: Mapping[str, Tensor]
    layers: Layers

    def gradients(self, arriving: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Of every layer [d_out, d_in], and of what entered, for the gradient of what was put out."""
        wanted = [*self.parameters.values(), self.states]
        *found, entering = torch.autograd.grad(self.outputs, wanted, arriving, allow_unused=True)
        assert entering is not None
        return self._by_layer(found), entering

    def weight_gradients(self, value: Tensor) -> dict[str, Tensor]:
        """Of every layer [d_out, d_in], for a scalar made of the output."""
        return self._by_layer(torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True))

    def _by_layer(self, found: Sequence[Tensor | None]) -> dict[str, Tensor]:
        by_parameter = dict(zip(self.parameters, found, strict=True))
        gradients = {}
        for name, view in self.layers.items():
            whole = by_parameter[view.parameter]
            # No token of this sequence was routed to an expert.
            gradients[name] = (
                torch.zeros(view.shape, device=self.states.device)
                if whole is None
                else view.orient(view.of(whole))
            )
        return gradients


def _samples(
    model: LoadedModel, block: int, inputs: Boundary, texts: Sequence[TextSet], layers: Layers
) -> Iterator[_Sample]:
    """Each of this process's sequences through the block, alone: the squares of its gradient are its own."""
    module = model.blocks[block]
    paths = list(dict.fromkeys(view.parameter for view in layers.values()))
    with in_float32(model, [module]), torch.enable_grad():
        parameters = {path: module.get_parameter(path).requires_grad_(True) for path in paths}
        for text in texts:
            store = inputs[text.key]
            for row in model.plan.ranks.share(len(store)):
                where = slice(row, row + 1)
                states = store.read(where, model.plan).float().requires_grad_(True)
                call = model.call(block, 1, store.length, store.positions(where)).in_float32()
                yield _Sample(text.key, where, states, call.run(module, states), parameters, layers)


class _Sums:
    """Σ g and Σ g² of some layers."""

    def __init__(self, layers: Layers, plan: DevicePlan) -> None:
        self.layers = layers
        self.plan = plan
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, gradients: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, gradient in gradients.items():
            self._begin(name)
            self.sums[name] += gradient
            self.squares[name].addcmul_(gradient, gradient)

    def _begin(self, name: str) -> None:
        if name not in self.sums:
            self.sums[name], self.squares[name] = (
                torch.zeros(self.layers[name].shape, device=self.plan.device) for _ in range(2)
            )

    def means(self) -> dict[str, GradientStatistics]:
        """They take the place of the sums, which are those of all processes."""
        for name in self.layers:
            # A process may have had no sequence.
            self._begin(name)
        self.plan.ranks.sum_([*self.sums.values(), *self.squares.values()])
        self.count = sum(self.plan.ranks.gathered(self.count))
        return {
            name: GradientStatistics(
                self.sums[name].div_(self.count), self.squares[name].div_(self.count), self.count
            )
            for name in self.sums
        }
