"""Equations 9 and 10 and the naive concatenation on cases that can be worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.decomposition import PCA

from genrec_dist.collaborative.similarity import concat_pca, modality_similarity
from genrec_dist.errors import DataError


def table(num_items: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_items, dim)).astype(np.float32)


def test_three_items_by_hand():
    # Item 0 at angle 0, items 1 and 2 placed so that every cosine is 0, 1 or 1/2; temperature 1.
    half = [0.5, math.sqrt(3) / 2]
    semantic = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]])  # cosines 01: 1, 02: 0, 12: 0
    collaborative = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]])  # cosines 01: 0, 02: 1, 12: 0
    final = np.array([[1, 0, 0], [*half, 0], [0, 0, 1]])  # cosines 01: 1/2, 02: 0, 12: 0

    def divergence(p_gap: float, q_gap: float) -> float:
        """KL of two outcomes whose logits differ by p_gap and q_gap."""
        p, q = (1 / (1 + math.exp(-gap)) for gap in (p_gap, q_gap))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    # Gaps (first other item minus second) of items 0, 1, 2 in each table.
    gaps_s, gaps_c, gaps_e = (1, 1, 0), (-1, 0, 1), (0.5, 0.5, 0)
    kl_s = sum(divergence(s, e) for s, e in zip(gaps_s, gaps_e)) / 3
    kl_c = sum(divergence(c, e) for c, e in zip(gaps_c, gaps_e)) / 3
    result = modality_similarity(semantic, collaborative, final, temperature=1.0)
    assert result["kl_semantic"] == pytest.approx(kl_s, rel=1e-12)
    assert result["kl_collaborative"] == pytest.approx(kl_c, rel=1e-12)
    assert result["semantic"] == pytest.approx(1 - kl_s / (kl_s + kl_c), rel=1e-12)
    assert result["collaborative"] == pytest.approx(1 - kl_c / (kl_s + kl_c), rel=1e-12)


def test_final_equal_to_one_modality():
    s, c = table(60, 8, 0), table(60, 5, 1)
    result = modality_similarity(s, c, s)
    assert (result["semantic"], result["collaborative"], result["kl_semantic"]) == (1.0, 0.0, 0.0)
    result = modality_similarity(s, c, c)
    assert (result["semantic"], result["collaborative"], result["kl_collaborative"]) == (0.0, 1.0, 0.0)


def test_symmetric_mixture_is_half():
    s, c = table(50, 6, 2), table(50, 6, 3)
    unit = [t / np.linalg.norm(t, axis=1, keepdims=True) for t in (s, c)]
    forward = modality_similarity(s, c, np.hstack(unit), temperature=0.2)
    backward = modality_similarity(c, s, np.hstack(unit), temperature=0.2)
    assert forward["semantic"] == pytest.approx(backward["collaborative"], rel=1e-12)
    assert forward["semantic"] == pytest.approx(0.5, abs=0.05)
    same = modality_similarity(s, s.copy(), c)
    assert same["semantic"] == 0.5 == same["collaborative"]


def test_no_divergence_at_all_is_half():
    s = table(20, 4, 4)
    assert modality_similarity(s, 3 * s, 7 * s)["semantic"] == 0.5
    assert modality_similarity(s, s, s)["semantic"] == 0.5


def test_weight_in_the_concatenation_moves_the_share():
    s, c = table(80, 8, 5), table(80, 8, 6)
    shares = [modality_similarity(s, c, np.hstack([w * s, c]))["semantic"] for w in (0.25, 1.0, 4.0)]
    assert shares[0] < 0.35 < shares[1] < 0.65 < shares[2]


def test_blind_to_rotation_and_scale():
    s, c, e = table(40, 6, 7), table(40, 5, 8), table(40, 6, 9)
    rotation = np.linalg.qr(np.random.default_rng(10).normal(size=(6, 6)))[0]
    plain = modality_similarity(s, c, e)
    turned = modality_similarity(s, c, 7 * e @ rotation)
    assert turned["semantic"] == pytest.approx(plain["semantic"], rel=1e-5)


def test_rows_without_an_embedding_are_left_out():
    s, c, e = table(30, 6, 11), table(30, 6, 12), table(30, 6, 13)
    s[4] = 0
    kept = np.delete(np.arange(30), 4)
    assert modality_similarity(s, c, e) == modality_similarity(s[kept], c[kept], e[kept])


def test_sample_is_seeded():
    s, c, e = table(200, 6, 14), table(200, 6, 15), table(200, 6, 16)
    first = modality_similarity(s, c, e, max_items=50, seed=1)
    assert first["items"] == 50
    assert first == modality_similarity(s, c, e, max_items=50, seed=1)
    assert first != modality_similarity(s, c, e, max_items=50, seed=2)


def test_tables_of_different_length_are_refused():
    with pytest.raises(DataError):
        modality_similarity(table(10, 4, 0), table(11, 4, 0), table(10, 4, 0))
    with pytest.raises(DataError):
        concat_pca(table(10, 4, 0), table(11, 4, 0))
    with pytest.raises(DataError):
        modality_similarity(table(2, 4, 0), table(2, 4, 1), table(2, 4, 2))


def test_concat_pca_against_sklearn():
    s, c = table(300, 12, 17) * np.linspace(1, 4, 12, dtype=np.float32), table(300, 5, 18)
    fused = concat_pca(s, c)
    assert fused.shape == (300, 10)
    assert fused.dtype == np.float32
    assert np.array_equal(fused[:, 5:], c)
    expected = PCA(5, svd_solver="full").fit_transform(s.astype(np.float64))
    sign = np.sign((fused[:, :5] * expected).sum(axis=0))
    np.testing.assert_allclose(fused[:, :5], expected * sign, atol=1e-4)


def test_concat_pca_sign_does_not_depend_on_the_solver():
    s, c = table(100, 7, 19), table(100, 7, 20)
    fused = concat_pca(s, c)[:, :7].astype(np.float64)
    loadings = np.linalg.lstsq(fused, s - s.mean(axis=0), rcond=None)[0]  # components, row by row
    assert (loadings[np.arange(7), np.abs(loadings).argmax(axis=1)] > 0).all()
    np.testing.assert_array_equal(concat_pca(s, c), concat_pca(s.copy(), c.copy()))


def test_concat_pca_of_a_narrow_semantic_table_keeps_its_width():
    fused = concat_pca(table(50, 3, 21), table(50, 8, 22))
    assert fused.shape == (50, 3 + 8)
