"""Muon for the hidden matrices, AdamW for everything else.

Muon replaces each matrix's momentum by the nearest matrix with equal singular values, so that every direction learns
at the same pace (Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024). `torch.optim.Muon`
does this in bfloat16, which a CPU without such instructions runs an order of magnitude slower; this one works in the
parameter's own precision.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of (m, n), or of a batch of them, towards 1 by a Newton-Schulz iteration (Jordan et
    al., 2024)."""
    a, b, c = QUINTIC
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum 0.95 with Nesterov's look-ahead, orthogonalised; decoupled weight decay."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                looks = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    if p.grad is None:
                        raise ValueError("every matrix given to Muon needs a gradient before a step")
                    momentum = state["momentum"].lerp_(p.grad, 0.05)
                    looks.append(p.grad.lerp(momentum, 0.95))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(looks)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms.

    AdamW's second moment has a long memory, so that a rare token's row does not take full steps away from every context
    between two occurrences.
    """
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    inside = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(hidden, muon_lr, weight_decay=0.05),
        torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.999), weight_decay=0.0),
    ]
