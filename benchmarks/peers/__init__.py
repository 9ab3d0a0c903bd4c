"""One file per library, each a use that somebody who knows the library would write.

prepare(work, steps) converts the batch and compiles what there is to compile, and returns two calls that give the gradient of
the outer loss by every trained weight, by name: one with the work's dropout masks, one that draws its own, which is timed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    module: str
    """Exposes `prepare`."""
    distribution: str
    """What it is called in benchmarks/requirements-peers.txt."""


PEERS = {
    "learn2learn": Peer("benchmarks.peers.learn2learn_meta", "learn2learn"),
    "torch_func": Peer("benchmarks.peers.torch_func", "torch"),
    "jax": Peer("benchmarks.peers.jax_vmap", "jax"),
}
"""By the engine's name in the results."""
