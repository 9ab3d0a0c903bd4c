"""Which arm of an experiment a user is in: a salted hash of the id, the same in every process and at every start."""

from bisect import bisect_right
from hashlib import blake2b
from itertools import accumulate

from limaml.config import ArmConfig, ExperimentConfig

_BITS = 64


class Arms:
    """The split that a configuration declares."""

    def __init__(self, cfg: ExperimentConfig) -> None:
        self._arms = cfg.arms
        self._ends = [round(end * 2**_BITS) for end in accumulate(arm.share for arm in cfg.arms)][:-1]
        # A zero byte ends the salt: "a" and "bc" are another split than "ab" and "c".
        self._salted = blake2b(cfg.salt.encode() + b"\0", digest_size=_BITS // 8)

    def of(self, user_id: str) -> ArmConfig | None:
        """The user's arm; None where no arms are declared."""
        if not self._arms:
            return None
        hashed = self._salted.copy()
        hashed.update(user_id.encode(errors="replace"))
        return self._arms[bisect_right(self._ends, int.from_bytes(hashed.digest()))]
