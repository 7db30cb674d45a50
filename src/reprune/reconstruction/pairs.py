"""Two chains side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.ranks import Ranks


@dataclass
class PairStatistics:
    """Σ x̂ xᵀ [d_in, d_in], float32, over tokens that a layer saw as x in the dense chain and as x̂ in the pruned one."""

    cross: Tensor | None = None

    @torch.no_grad()
    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Add the tokens of two tensors [..., d_in] that belong together."""
        student_ND = student.reshape(-1, student.shape[-1]).float()
        teacher_ND = teacher.reshape(-1, teacher.shape[-1]).float()
        if self.cross is None:
            self.cross = torch.zeros(student_ND.shape[1], student_ND.shape[1], device=student_ND.device)
        self.cross.addmm_(student_ND.T, teacher_ND)

    def sum_over(self, ranks: Ranks, num_features: int, device: torch.device) -> None:
        """Make it the sum over all processes; one that saw no token has zeros to add."""
        if self.cross is None:
            self.cross = torch.zeros(num_features, num_features, device=device)
        ranks.sum_([self.cross])
