"""What the inner loop learns beside theta: how far it steps. The steps themselves are `limaml.meta.inner_loop`.

of one task's adapted parameters one tensor a name
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limaml.config import MetaConfig
from limaml.models.blocks import FACTORS, Params

Shapes = Mapping[str, torch.Size]


class GradientStep(nn.Module):
    """phi <- phi - rate / (rows + c) * gradient of the rows' summed loss (Finn et al. 2017, algorithm 1).

    Rates and c are exp of what is stored, which keeps them positive: learned, one a parameter (Meta-SGD, Li et al. 2017), or
    fixed, one a tensor, so that a step is a number and not a tensor of each task.
    """

    def __init__(self, shapes: Shapes, cfg: MetaConfig) -> None:
        super().__init__()
        rates = {name: cfg.factor_inner_lr if name == FACTORS else cfg.inner_lr for name in shapes}
        damping = {name: cfg.factor_damping if name == FACTORS else cfg.damping for name in shapes}
        self.shapes, one = dict(shapes), dict.fromkeys(shapes, torch.Size())
        self.log_rates = _logs(shapes if cfg.learn_inner_lr else one, rates, cfg.learn_inner_lr)
        self.log_damping = _logs(shapes if cfg.learn_damping else one, damping, cfg.learn_damping)

    def sizes(self, count: Tensor) -> Params:
        """rate / (rows + c) of one task of `count` support rows, each as its parameter or a number."""
        sizes = {}
        for name, log_rate in self.log_rates.items():
            rows = count + self.log_damping[name].exp()
            # An empty support with c = 0 would divide by 0; its gradient is 0.
            sizes[name] = log_rate.exp() / rows.clamp(min=torch.finfo(rows.dtype).tiny ** 0.5)
        return sizes


class NewtonStep(nn.Module):
    """phi <- phi + rate * (the next Newton step towards the most likely phi, given the rows and a Gaussian prior at theta).

    The prior says how far a parameter tensor may move the logits of rows: by `std`, the same whatever the scale of vectors, the
    label rate and the number of rows. Rates are corrections around 1; both are learned.
    """

    def __init__(self, shapes: Shapes, cfg: MetaConfig) -> None:
        super().__init__()
        self.log_rates = _logs(shapes, dict.fromkeys(shapes, 1.0), cfg.learn_inner_lr)
        self.log_std = _logs(dict.fromkeys(shapes, torch.Size()), dict.fromkeys(shapes, cfg.prior_std), cfg.learn_damping)
        self.shapes, self.names = dict(shapes), tuple(shapes)
        for name in shapes:
            self.register_buffer(f"gain_{name}", torch.ones(()))

    def gain(self, name: str) -> Tensor:
        """() mean over training rows of the squared gradient of a row's logit by this tensor, at theta."""
        gain: Tensor = getattr(self, f"gain_{name}")
        return gain

    def put_gains(self, gains: Mapping[str, Tensor]) -> None:
        """Take what was measured on the training rows, before training; 1 where nothing could be measured."""
        for name in self.names:
            self.gain(name).copy_(torch.where(gains[name] > 0, gains[name], 1.0))

    def widen(self, name: str, by: float) -> None:
        """Multiply the width of a tensor's prior."""
        with torch.no_grad():
            self.log_std[name].add_(math.log(by))

    def scales(self) -> Params:
        """Standard deviation of the prior of each number of a tensor: logits that vary by `std` if all numbers vary alike."""
        tiny = torch.finfo(torch.float32).tiny ** 0.5
        return {name: self.log_std[name].exp() / self.gain(name).clamp(min=tiny).sqrt() for name in self.names}

    def rates(self) -> Params:
        return {name: log_rate.exp() for name, log_rate in self.log_rates.items()}


def _logs(shapes: Shapes, values: Mapping[str, float], learned: bool) -> nn.ParameterDict:
    """Logarithms of a positive number for each place of each shape."""
    return nn.ParameterDict(
        {name: nn.Parameter(torch.full(shape, values[name]).log(), learned) for name, shape in shapes.items()}
    )
