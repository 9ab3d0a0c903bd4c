"""Texts are aligned stage by stage; what is kept lowers the loss on items that no stage was trained on."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from limaml.config import TuningConfig
from limaml.errors import ConfigError, DataError
from limaml.transfer.adapters import adapted, new_adapters
from limaml.transfer.bert import BertEncoder
from limaml.transfer.tuning import Aligned, _Run, _State, info_nce, tune

WORDS = ["comedy", "drama", "heat", "story", "toy", "war"]
SETTINGS = TuningConfig(template="{title}", layers=2, rank=2, batch_items=16, max_epochs=8, lr=0.02, adapter_lr=0.02)


@pytest.fixture
def encoder(tiny_bert):
    return BertEncoder(tiny_bert)


@pytest.fixture
def aligned(encoder):
    """Every three words in any order; an item's vector is what the encoder with adapters of the drawn kind makes of them."""
    texts = [f"{a} {b} {c}" for a, b, c in permutations(WORDS, 3)]
    draw = torch.Generator().manual_seed(7)
    planted = new_adapters(encoder, [0, 1], 2, draw)
    for _, up in planted.values():
        torch.nn.init.normal_(up, std=2.0, generator=draw)
    vectors = encoder.vectors_by(adapted(encoder, planted), encoder.tokens_of(texts)).detach()[:, :3]
    held = np.arange(len(texts)) % 5 == 0
    return Aligned([str(at) for at in range(len(texts))], texts, np.flatnonzero(held), np.flatnonzero(~held), vectors)


def test_the_loss_is_the_cross_entropy_of_cosines_both_ways():
    draw = torch.Generator().manual_seed(0)
    own, other = torch.randn(4, 3, generator=draw), torch.randn(4, 3, generator=draw)
    cosines = F.cosine_similarity(own[:, None], other[None], dim=2) / 0.5
    right, items = torch.arange(4), torch.arange(4)
    expected = (F.cross_entropy(cosines, right) + F.cross_entropy(cosines.T, right)) / 2
    assert torch.allclose(info_nce(own, other, items, items, 0.5), expected)


def test_the_same_item_is_no_negative_of_itself():
    draw = torch.Generator().manual_seed(0)
    own, other = torch.randn(3, 3, generator=draw), torch.randn(3, 3, generator=draw)
    twice = info_nce(own, other, torch.tensor([5, 5, 6]), torch.tensor([7, 8, 9]), 0.5)
    cosines = F.cosine_similarity(own[:, None], other[None], dim=2) / 0.5
    cosines[0, 1] = cosines[1, 0] = -torch.inf
    right = torch.arange(3)
    assert torch.allclose(twice, (F.cross_entropy(cosines, right) + F.cross_entropy(cosines.T, right)) / 2)


def test_a_stage_is_kept_only_if_it_lowers_the_held_out_items_loss(encoder, aligned):
    found = tune(encoder, aligned, SETTINGS)
    assert list(found.losses) == ["head", "last layer", "all layers"]
    best = float("inf")
    for stage, loss in found.losses.items():
        assert (stage in found.kept) == (loss < best)
        best = min(best, loss)
    assert found.adapters
    assert best < found.losses["head"]


def test_the_same_seed_gives_the_same_adapters(encoder, aligned):
    short = SETTINGS.model_copy(update={"max_epochs": 2})
    first, second = (tune(encoder, aligned, short) for _ in range(2))
    assert first.losses == second.losses
    assert tune(encoder, aligned, short.model_copy(update={"seed": 1})).losses != first.losses


class Recording(BertEncoder):
    """Notes the texts that something is derived from."""

    def vectors_by(self, weights, tokens, drop=None):
        if torch.is_grad_enabled():
            self.trained |= {tuple(ids) for ids in tokens}
        return super().vectors_by(weights, tokens, drop)


def test_held_out_items_are_trained_on_in_no_stage(tiny_bert, aligned):
    encoder = Recording(tiny_bert)
    encoder.trained = set()
    tune(encoder, aligned, SETTINGS.model_copy(update={"max_epochs": 1}))
    tokens = encoder.tokens_of(aligned.texts)
    assert encoder.trained == {tuple(tokens[at]) for at in aligned.trained_I}


DOMAIN = ["war war", "toy toy", "heat heat", "war war"]


def test_a_stage_on_texts_alone_comes_after_the_head(tiny_bert, aligned):
    encoder, cfg = Recording(tiny_bert), SETTINGS.model_copy(update={"max_epochs": 2, "domain_epochs": 3})
    encoder.trained = set()
    first = tune(encoder, replace(aligned, domain=DOMAIN), cfg)
    assert list(first.losses) == ["head", "domain", "last layer", "all layers"]
    assert list(first.stages) == list(first.losses)
    assert first.stages["domain"], "what it found is there, kept or not"
    tokens = [encoder.tokens_of(aligned.texts)[at] for at in aligned.trained_I] + encoder.tokens_of(DOMAIN)
    assert encoder.trained == {tuple(each) for each in tokens}
    assert ("domain" in first.kept) == (first.losses["domain"] < first.losses["head"])
    assert first.losses["domain"] != first.losses["head"]
    assert tune(encoder, replace(aligned, domain=DOMAIN), cfg).losses == first.losses


def test_texts_alone_adapt_the_encoder_to_tell_them_apart_under_dropout(encoder, aligned):
    cfg = SETTINGS.model_copy(update={"max_epochs": 1, "domain_epochs": 20, "patience": 20})
    run = _Run(encoder, replace(aligned, domain=aligned.texts), cfg, torch.Generator().manual_seed(0))
    state = _State(torch.ones(3, 12).requires_grad_(), new_adapters(encoder, [0, 1], 2, torch.Generator().manual_seed(0)))

    def contrast(state):
        run._generator.manual_seed(1)
        return float(run._contrast(state, np.arange(len(aligned.texts))).detach())

    before = contrast(state)
    run.domain(state)
    assert contrast(state) < before - 0.1


def test_texts_alone_need_texts(encoder, aligned):
    with pytest.raises(DataError, match=r"domain_epochs needs at least 2 texts .* got 1; set it to 0"):
        tune(encoder, replace(aligned, domain=["war", "war"]), SETTINGS.model_copy(update={"domain_epochs": 1}))


def test_pairs_stay_on_their_side(aligned):
    everyone = replace(aligned, partners=[np.arange(len(aligned.texts))] * len(aligned.texts))
    for items in (aligned.trained_I, aligned.held_out_I):
        side = everyone.side(items)
        assert all(set(found) == set(items) for found in side.partners)


def test_items_are_aligned_with_their_partners(encoder, aligned):
    """Items that share their first word pair; vectors say nothing."""
    first = np.array([text.split()[0] for text in aligned.texts])
    partners = [np.flatnonzero((first == word) & (np.arange(len(first)) != at)) for at, word in enumerate(first)]
    pairs = replace(aligned, partners=partners, held_out_I=np.arange(0, 120, 2), trained_I=np.arange(1, 120, 2))
    found = tune(encoder, pairs, SETTINGS)
    assert min(found.losses.values()) < np.log(60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_parameters": 100}, r"max_parameters must hold the head's and the adapters' 228, got 100; lower"),
        ({"layers": 3}, "layers must be <= the encoder's 2, got 3; lower it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(encoder, aligned, change, message):
    with pytest.raises(ConfigError, match=message):
        tune(encoder, aligned, SETTINGS.model_copy(update=change))


def test_too_few_held_out_items_are_refused(encoder, aligned):
    with pytest.raises(DataError, match=r"at least 2 held-out items .* got 1; lower"):
        tune(encoder, replace(aligned, held_out_I=aligned.held_out_I[:1]), SETTINGS)
