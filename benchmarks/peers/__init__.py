"""One file per library, each a use that somebody who knows the library would write.

prepare(work, steps) converts the batch and compiles what there is to compile, and returns the call that is timed: it gives
the gradient of the outer loss with respect to every weight of the work, by name.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    module: str
    """Exposes `prepare`."""
    distribution: str
    """What it is called in benchmarks/requirements-peers.txt."""
    on_gpu: bool = True


PEERS = {
    "learn2learn": Peer("benchmarks.peers.learn2learn_maml", "learn2learn"),
    "higher": Peer("benchmarks.peers.higher_loop", "higher"),
    "torchopt": Peer("benchmarks.peers.torchopt_maml", "torchopt"),
    "torch_func": Peer("benchmarks.peers.torch_func", "torch"),
    "jax": Peer("benchmarks.peers.jax_vmap", "jax", on_gpu=False),
}
"""By the engine's name in the results."""
