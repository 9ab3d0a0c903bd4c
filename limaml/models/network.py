"""The two blocks joined, with everything the inner loop learns: rates, damping, prior.

T tasks, S support rows, R rows, D embedding width
"""

import torch
from torch import Tensor, nn

from limaml.config import Config, MetaConfig
from limaml.errors import ConfigError
from limaml.features.encoder import EncoderDims
from limaml.models.adapted import Params
from limaml.models.global_block import GlobalBlock
from limaml.models.meta_blocks import FACTORS, MetaBlock, build_meta_block
from limaml.tasks.rows import Rows


class LiMAML(nn.Module):
    """Meta block and global block; `kind` is the task kind whose block is adapted.

    Rates are exp(log_rates): one per adapted parameter and, as Meta-SGD (Li et al. 2017), learned if so configured; damping
    is exp(log_damping). The logarithm keeps both positive.
    """

    def __init__(self, cfg: Config, dims: EncoderDims) -> None:
        super().__init__()
        if len(cfg.task_kinds) > 1:
            kinds = [kind.name for kind in cfg.task_kinds]
            raise ConfigError(f"task_kinds must hold one kind for now, got {kinds}; keep the one that is to be adapted")
        self.dims = dims
        self.meta_config: MetaConfig = cfg.meta
        self.kind = cfg.task_kind.name
        self.embedding_dim = cfg.model.embedding_dim
        block = build_meta_block(cfg.model, dims)
        self.meta: MetaBlock = block
        self.global_block = GlobalBlock(cfg.model, dims, [self.kind])
        shapes = block.rates()
        self.log_rates = _per_parameter(shapes, cfg.meta.inner_lr, cfg.meta.factor_inner_lr, cfg.meta.learn_inner_lr)
        self.log_damping = _per_parameter(shapes, cfg.meta.damping, cfg.meta.factor_damping, cfg.meta.learn_damping)

    def rates(self) -> Params:
        """Inner rate of every adapted parameter, of one task's shape."""
        return {name: log_rate.exp() for name, log_rate in self.log_rates.items()}

    def damping(self) -> Params:
        """c of every adapted parameter, of one task's shape."""
        return {name: log_damping.exp() for name, log_damping in self.log_damping.items()}

    def prior(self) -> Tensor:
        """(D,) embedding of an empty support."""
        return self.meta.prior()

    def is_adapted(self, count_T: Tensor) -> Tensor:
        """Whether a task of so many support rows is adapted; of any shape."""
        return count_T >= self.meta_config.min_support_rows

    def step_sizes(self, count_T: Tensor) -> Params:
        """rate / (rows + c) of every adapted parameter, for tasks of `count_T` support rows: leading dimension T.

        0 for a task that is not adapted. Where neither rate nor c is learned and all of a parameter's are equal, of shape
        (T, 1, ...): the inner loop has a cheaper form.
        """
        learned = self.meta_config.learn_inner_lr or self.meta_config.learn_damping
        sizes = {}
        for name, log_rate in self.log_rates.items():
            logs = log_rate, self.log_damping[name]
            rate, damping = (log.exp() if learned else _one_if_equal(log).exp() for log in logs)
            count = count_T.view(-1, *[1] * rate.ndim)
            rows = count + damping
            # An empty support with c = 0 would divide by 0; its gradient is 0.
            size = rate / rows.clamp(min=torch.finfo(rows.dtype).tiny ** 0.5)
            sizes[name] = size * self.is_adapted(count)
        return sizes

    def forward(self, rows: Rows, embedding_TD: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (T, R) of rows scored with their tasks' embeddings; dropout only where a generator is given."""
        keep = self.global_block.draw_dropout(rows, generator)
        logits_TR: Tensor = self.global_block(rows, {self.kind: embedding_TD}, keep)
        return logits_TR


def _one_if_equal(values: Tensor) -> Tensor:
    first = values.flatten()[:1].view([1] * values.ndim)
    return first if bool((values == first).all()) else values


def build_network(cfg: Config, dims: EncoderDims, seed: int = 0) -> LiMAML:
    """A network whose initial weights are a function of (cfg, dims, seed) alone; the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LiMAML(cfg, dims)


def _per_parameter(shapes: dict[str, torch.Size], value: float, factor_value: float, learned: bool) -> nn.ParameterDict:
    """Logarithms of one positive number per adapted parameter; a task vector's factors start apart from its level."""
    logs = nn.ParameterDict()
    for name, shape in shapes.items():
        start = torch.full(shape, value)
        if name == FACTORS:
            start[:-1] = factor_value
        logs[name] = nn.Parameter(start.log(), learned)
    return logs
