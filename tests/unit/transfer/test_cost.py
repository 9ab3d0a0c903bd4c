"""What a text costs is measured on one thread, and a budget of milliseconds refuses what takes longer."""

import time

import pytest
import torch

from limaml.errors import ConfigError
from limaml.transfer.bert import BertEncoder
from limaml.transfer.cost import TimeBudget, ms_per_item

TEXTS = ["toy story", "heat", "the war of the story. drama"]
SLOW_S = 0.03


class Slow(BertEncoder):
    """Takes `SLOW_S` a batch, and notes on how many threads."""

    def vectors_by(self, weights, tokens):
        self.threads = torch.get_num_threads()
        time.sleep(SLOW_S)
        return super().vectors_by(weights, tokens)


def test_it_is_the_time_of_a_text_on_one_thread(tiny_bert):
    encoder, before = Slow(tiny_bert), torch.get_num_threads()
    taken = ms_per_item(encoder, encoder.weights, TEXTS)
    assert 1000 * SLOW_S / len(TEXTS) <= taken < 1000 * 10 * SLOW_S
    assert (encoder.threads, torch.get_num_threads()) == (1, before)


def test_what_takes_longer_is_refused_with_the_figure(tiny_bert):
    encoder = Slow(tiny_bert)
    wide = TimeBudget(10_000.0, TEXTS)
    wide.require(encoder, encoder.weights, "before tuning")
    assert 1000 * SLOW_S / len(TEXTS) <= wide.spent["before tuning"] < 10_000
    with pytest.raises(ConfigError, match=r"must hold what tiny .* takes after tuning, \d.* ms .* got 0.1; name"):
        TimeBudget(0.1, TEXTS).require(encoder, encoder.weights, "after tuning")
