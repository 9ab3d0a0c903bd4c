"""A static encoder is the mean of its tokens' vectors, each the teacher's of the token alone, in fewer dimensions, weighed."""

import numpy as np
import pytest

from limaml.errors import ConfigError
from limaml.transfer import static
from limaml.transfer.bert import BertEncoder
from limaml.transfer.static import StaticEncoder, distil, principal


@pytest.fixture
def student(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(static, "WIDTH", 5)
    distil(BertEncoder(tiny_bert), tmp_path / "made" / "student")
    return StaticEncoder(tmp_path / "made" / "student")


def test_a_text_is_the_normalised_mean_of_its_tokens(student):
    vectors, ids = student._vectors, {word: student._tokenizer.token_to_id(word) for word in ("toy", "story", ".")}
    mean = np.mean([vectors[ids[word]] for word in ("toy", "story", ".")], axis=0)
    found = student.encode(["Toy unheard Story.", "unheard", ""])
    assert np.allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert not found[1:].any()


def test_tokens_are_the_teachers_in_their_principal_components_and_frequent_ones_weigh_less(student, tiny_bert):
    teacher = BertEncoder(tiny_bert)
    words = [student._tokenizer.id_to_token(token) for token in range(6, 17)]
    theirs = np.concatenate([teacher.encode([word]) for word in words])
    sizes = student._tokenizer.get_vocab_size()
    rank = 1.0 / np.arange(2, sizes + 2)
    weights = (1e-4 / (1e-4 + rank / rank.sum()))[6:17]
    ours = student._vectors[6:17] / weights[:, None].astype(np.float32)
    # Distances in all dimensions bound those in five of them; the largest five hold most.
    far = np.linalg.norm(theirs[:, None] - theirs[None], axis=2)
    near = np.linalg.norm(ours[:, None] - ours[None], axis=2)
    assert (near <= far + 1e-5).all()
    assert np.corrcoef(far.ravel(), near.ravel())[0, 1] > 0.9
    assert (np.diff(weights) > 0).all()


def test_components_hold_what_a_singular_value_decomposition_holds():
    vectors = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    found = principal(vectors, 3)
    left, strengths, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    assert np.allclose(np.abs(found), np.abs(left[:, :3] * strengths[:3]), atol=1e-4)


def test_it_says_what_it_was_made_of(student, tiny_bert):
    origin = student.origin
    assert (origin.name, origin.width, origin.licence) == ("tiny-static", 5, "mit")
    assert origin.version == BertEncoder(tiny_bert).origin.version
    assert "distilled from tiny" in origin.attribution


def test_distilled_again_it_is_the_same(student, tiny_bert, tmp_path):
    assert distil(BertEncoder(tiny_bert), tmp_path / "again") == student.origin


def test_a_folder_of_another_kind_is_refused(tiny_bert):
    with pytest.raises(ConfigError, match="must hold one tensor, embeddings, got bert"):
        StaticEncoder(tiny_bert)
