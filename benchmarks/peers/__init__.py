"""One file per library, each a use that somebody who knows the library would write; see `PEERS` for what they expose.

prepare(work, steps) converts the batch and compiles what there is to compile, and returns the call that is timed: it gives
the gradient of the outer loss with respect to every weight of the work, by name.
"""

PEERS = {
    "learn2learn": "benchmarks.peers.learn2learn_maml",
    "higher": "benchmarks.peers.higher_loop",
    "torchopt": "benchmarks.peers.torchopt_maml",
    "torch_func": "benchmarks.peers.torch_func",
    "jax": "benchmarks.peers.jax_vmap",
}
"""Engine's name in the results -> the module that exposes `prepare`."""

CPU_ONLY = {"jax": "the pinned jaxlib is the CPU build"}
"""Peers that do not run on a GPU, and why."""
