"""How fast this machine multiplies matrices at this moment: the peak to compare with, and the sign of a busy machine."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

# Large enough to reach the peak (2.1 GFLOP), small enough (5 to 15 ms on two cores) to stand around every timed call.
_SIZE = 1024


_KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mkl": lambda x, w: torch.mm(x, w.T),
    "onednn": lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
}
"""x @ w.T in float32: torch.mm runs through MKL, which some processors run at half of oneDNN's speed."""


class GemmPeak:
    """The best GFLOP/s seen so far, by kernel; `known_gflops` is the best of an earlier process on this machine."""

    def __init__(self, known_gflops: float = 0.0) -> None:
        self._known_gflops = known_gflops
        self._x = torch.randn(_SIZE, _SIZE)
        self.best_gflops = dict.fromkeys(_KERNELS, 0.0)

    def measure(self, repeats: int = 20) -> None:
        """Look for the peak."""
        for _ in range(repeats):
            for name in _KERNELS:
                self._run(name)

    def probe(self) -> float:
        """This moment's speed as a share of the best seen, with the fastest kernel; the better of two runs."""
        name = max(self.best_gflops, key=self.best_gflops.__getitem__)
        now = max(self._run(name) for _ in range(2))
        return now / max(self.best_gflops[name], self._known_gflops)

    def _run(self, name: str) -> float:
        start = time.perf_counter()
        _KERNELS[name](self._x, self._x)
        gflops = 2 * _SIZE**3 / (time.perf_counter() - start) / 1e9
        self.best_gflops[name] = max(self.best_gflops[name], gflops)
        return gflops
