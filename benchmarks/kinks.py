"""How near a task of the reference model comes to a ReLU's kink, where equal engines need not agree in float32.

A hidden unit's input within rounding of 0 is positive in one order of summation and negative in another, and a row's whole
gradient through that unit comes or goes: one such unit of two million moved a tensor's gradient by 7e-4.

    T tasks, R rows, F features
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 1e-5
"""Ten times what float32 rounding moves a hidden unit's input (of size 1) by after five steps."""
STEPS = 5
"""Inner steps that are looked at: the most that the benchmark takes."""


def smallest_hidden(
    weights: dict[str, Tensor], inner_lr: float, support_TRF: Tensor, label_TR: Tensor, query_TRF: Tensor
) -> Tensor:
    """(T,) smallest absolute input of a ReLU that each task meets on its rows before and after each of STEPS steps; float64."""
    x_TRF, query_TRF, label_TR = support_TRF.double(), query_TRF.double(), label_TR.double()
    weights = {name: weight.double() for name, weight in weights.items()}
    names = [name for name in weights if name.startswith("meta.")]
    phi = {name: weights[name].expand(len(x_TRF), *weights[name].shape).clone().requires_grad_() for name in names}
    smallest_T = torch.full((len(x_TRF),), torch.inf, dtype=torch.float64)

    def relu(z_TRH: Tensor) -> Tensor:
        nonlocal smallest_T
        smallest_T = torch.minimum(smallest_T, z_TRH.detach().abs().amin(dim=(1, 2)))
        return F.relu(z_TRH)

    def logits(rows_TRF: Tensor, embedding_TD: Tensor) -> Tensor:
        x = torch.cat([rows_TRF, embedding_TD.unsqueeze(1).expand(-1, rows_TRF.shape[1], -1)], dim=2)
        for layer in range(2):
            x = relu(x @ weights[f"global.weight{layer}"] + weights[f"global.bias{layer}"])
        return (x @ weights["global.weight2"] + weights["global.bias2"]).squeeze(-1)

    for step in range(STEPS + 1):
        hidden_TRH = relu(x_TRF @ phi["meta.weight0"] + phi["meta.bias0"].unsqueeze(1))
        embedding_TD = (hidden_TRH @ phi["meta.weight1"] + phi["meta.bias1"].unsqueeze(1)).mean(dim=1)
        logits(query_TRF, embedding_TD.detach())
        loss_TR = F.binary_cross_entropy_with_logits(logits(x_TRF, embedding_TD), label_TR, reduction="none")
        if step < STEPS:
            gradients = torch.autograd.grad(loss_TR.mean(dim=1).sum(), list(phi.values()))
            phi = {
                name: (p - inner_lr * g).detach().requires_grad_() for (name, p), g in zip(phi.items(), gradients, strict=True)
            }
    return smallest_T
