"""The processes that do one run together: who is first, which part of a list is whose, sums over all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from reprune.errors import RunError

FAILED = "failed"
"""Where in the store a process that fails says why."""

_LOOK_EVERY = timedelta(seconds=1)
_LOST = (
    "another process of this run ended without saying why: killed by hand or, more often, for its memory; "
    "the same command goes on from the last finished window, with as many processes as you like"
)


class LeftAloneError(RunError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class Ranks:
    """Process `number` of `count`; the first one writes, speaks and decides. A process of its own has all of everything.

    Every method but `share` is called by all processes, in the same order. `store` is where they leave notes;
    `own_devices` says that each computes on a device of its own kind and number, where tensors are summed then.
    """

    number: int = 0
    count: int = 1
    store: Store | None = None
    own_devices: bool = False

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.number == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def part(self) -> None:
        """No more is exchanged from here on: what the connections hold is given back."""
        if self.several:
            dist.destroy_process_group()

    def share(self, num_items: int) -> range:
        """This process's consecutive part of `num_items` things; parts differ by one at most, later ones are smaller."""
        each, more = divmod(num_items, self.count)
        start = self.number * each + min(self.number, more)
        return range(start, start + each + (self.number < more))

    def wait(self) -> None:
        """Until every process is here: what each wrote before, all can read. LeftAloneError where one does not come."""
        if self.several:
            self._done(dist.all_reduce(torch.zeros(1), async_op=True))

    @torch.no_grad()
    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes in the place of each tensor, to the bit the same everywhere."""
        if self.several:
            self._each(tensors, partial(dist.all_reduce, async_op=True))

    @torch.no_grad()
    def same_(self, tensors: Iterable[Tensor], of: int = 0) -> None:
        """Put the values of process `of` in the place of each tensor."""
        if self.several:
            # As bytes: not every transport knows every dtype.
            self._each(tensors, lambda it: dist.broadcast(it.view(-1).view(torch.uint8), of, async_op=True))

    def tell(self, value: Any) -> Any:
        """The first process's value, as JSON gives it back; what the others hand in does not matter."""
        return self._exchanged(value)[0] if self.several else value

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value, as JSON gives it back."""
        return self._exchanged(value) if self.several else [value]

    def _exchanged(self, value: Any) -> list[Any]:
        mine = bytearray(json.dumps(value).encode())
        sizes = torch.zeros(self.count, dtype=torch.long)
        sizes[self.number] = len(mine)
        self._done(dist.all_reduce(sizes, async_op=True))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(mine)] = torch.frombuffer(mine, dtype=torch.uint8)
        rows = [torch.empty_like(padded) for _ in range(self.count)]
        self._done(dist.all_gather(rows, padded, async_op=True))
        return [
            json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)
        ]

    def _each(self, tensors: Iterable[Tensor], exchange: Any) -> None:
        if self.own_devices:
            # A process that is gone is noticed here, and not in a kernel which nobody can wake.
            self.wait()
        for tensor in tensors:
            there = (tensor if self.own_devices else tensor.cpu()).contiguous()
            if there.is_cuda:
                # Queued on the device. That all of them have come to it is known.
                exchange(there).wait()
            else:
                self._done(exchange(there))
            if there is not tensor:
                tensor.copy_(there)

    def _done(self, work: Any) -> None:
        """Wait for an exchange to be done; in between look whether one of the others has said that it will not come."""
        while True:
            try:
                work.wait(_LOOK_EVERY)
                return
            except RuntimeError as error:
                why = self._why()
                if why is not None:
                    raise LeftAloneError(why) from error
                if work.is_completed():
                    self._check(work)
                    return

    def _check(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise LeftAloneError(_LOST) from error

    def _why(self) -> str | None:
        assert self.store is not None
        try:
            return str(self.store.get(FAILED).decode()) if self.store.check([FAILED]) else None
        except RuntimeError:
            # Whoever keeps the store has ended.
            return _LOST


ALONE = Ranks()


def groups_of(met: Sequence[dict[str, str]]) -> list[list[str]]:
    """Names that belong together, from what each process met: by name, the first name with the same thing behind it.

    Two names are together unless a process met one without the other, or saw them apart.
    """
    names = dict.fromkeys(name for one in met for name in one)
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(one.get(name) for one in met), []).append(name)
    return list(groups.values())
