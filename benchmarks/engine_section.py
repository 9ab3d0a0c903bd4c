"""What `make bench` measures of the engine alone: long-tailed tasks, and how the cost grows."""

import torch

from benchmarks import long_tail, scaling
from benchmarks.engine_peers import THREADS
from benchmarks.options import Options
from benchmarks.results import Results
from limaml.allocator import keep_freed_memory


def measure(options: Options) -> Results:
    """`long_tail_ratio` and `scaling`; on a CPU only."""
    if options.device != "cpu":
        return {}
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    options.say("long-tailed tasks")
    tail = long_tail.measure(options)
    options.say("growth in tasks, rows and steps")
    return tail | scaling.measure(options)
