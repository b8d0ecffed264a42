"""The numbers that the PRORec and CSJ-ID papers print, as data: what our results stand beside.

Source:
    L. Xiao et al., Progressive Collaborative and Semantic Knowledge Fusion for Generative Recommendation, Tables 2-6.
    CSJ-ID: Learning Collaborative-Semantic Joint IDs for Generative Recommendation, sections 4.1-4.3 (Beauty only).
"""

from __future__ import annotations

DATA_SETS = ("beauty", "sports", "toys")
METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")


def _rows(methods: tuple[str, ...], values: list[tuple[float, ...]]) -> dict[str, dict[str, float]]:
    """Columns of a printed table (one tuple a metric, one number a method) -> metrics by method."""
    return {method: {m: row[i] for m, row in zip(METRICS, values, strict=True)} for i, method in enumerate(methods)}


DATA_STATISTICS = {
    "beauty": {"users": 22363, "items": 12101, "interactions": 198360, "density": 0.00073},
    "sports": {"users": 35598, "items": 18357, "interactions": 296175, "density": 0.00045},
    "toys": {"users": 19412, "items": 11924, "interactions": 167526, "density": 0.00073},
}
"""Table 2."""

_METHODS = (
    "GRU4Rec", "Caser", "SASRec", "BERT4Rec", "HGN", "FDSA", "S3-Rec", "RecForest", "TIGER", "EAGER", "PRORec",
)  # fmt: skip

PERFORMANCE = {
    "beauty": _rows(
        _METHODS,
        [
            (0.0283, 0.0347, 0.0605, 0.0347, 0.0512, 0.0407, 0.0647, 0.0664, 0.0617, 0.0836, 0.0939),
            (0.0479, 0.0556, 0.0902, 0.0599, 0.0773, 0.0656, 0.0994, 0.0915, 0.0924, 0.1124, 0.1289),
            (0.0137, 0.0176, 0.0318, 0.0170, 0.0266, 0.0208, 0.0327, 0.0400, 0.0339, 0.0525, 0.0559),
            (0.0187, 0.0229, 0.0394, 0.0233, 0.0332, 0.0270, 0.0414, 0.0464, 0.0417, 0.0599, 0.0646),
        ],
    ),
    "sports": _rows(
        _METHODS,
        [
            (0.0204, 0.0194, 0.0350, 0.0191, 0.0313, 0.0288, 0.0385, 0.0247, 0.0376, 0.0441, 0.0471),
            (0.0333, 0.0314, 0.0507, 0.0315, 0.0477, 0.0463, 0.0607, 0.0375, 0.0577, 0.0659, 0.0710),
            (0.0110, 0.0097, 0.0192, 0.0099, 0.0159, 0.0156, 0.0204, 0.0133, 0.0196, 0.0236, 0.0259),
            (0.0142, 0.0126, 0.0231, 0.0130, 0.0201, 0.0200, 0.0260, 0.0164, 0.0246, 0.0291, 0.0319),
        ],
    ),
    "toys": _rows(
        _METHODS,
        [
            (0.0176, 0.0270, 0.0675, 0.0203, 0.0497, 0.0381, 0.0700, 0.0383, 0.0578, 0.0714, 0.0822),
            (0.0301, 0.0420, 0.0941, 0.0358, 0.0716, 0.0632, 0.1065, 0.0483, 0.0838, 0.1024, 0.1154),
            (0.0084, 0.0141, 0.0374, 0.0099, 0.0277, 0.0189, 0.0376, 0.0285, 0.0321, 0.0505, 0.0489),
            (0.0116, 0.0179, 0.0441, 0.0138, 0.0332, 0.0252, 0.0468, 0.0310, 0.0386, 0.0538, 0.0573),
        ],
    ),
}
"""Table 3. TIGER is the authors' own run; the other baselines are quoted there from EAGER and S3-Rec."""

MODALITY_SIMILARITY = {
    "concat": {"semantic": 0.9733, "collaborative": 0.0267},
    "ours": {"semantic": 0.5989, "collaborative": 0.4011},
}
"""Table 4 (section 4.3 names Beauty)."""

FUSION_VARIANTS = _rows(
    ("semantic only", "collaborative only", "concat", "ours"),
    [
        (0.0810, 0.0803, 0.0807, 0.0939),
        (0.1102, 0.1095, 0.1085, 0.1289),
        (0.0498, 0.0495, 0.0504, 0.0559),
        (0.0571, 0.0569, 0.0574, 0.0646),
    ],
)
"""Table 5, Beauty."""

TASK_VARIANTS = _rows(
    ("neither task", "alignment", "alignment and distillation"),
    [
        (0.0807, 0.0827, 0.0939),
        (0.1085, 0.1122, 0.1289),
        (0.0504, 0.0509, 0.0559),
        (0.0574, 0.0583, 0.0646),
    ],
)
"""Table 6, Beauty."""

CSJ_STATISTICS = {"beauty": {"users": 22363, "items": 12101, "interactions": 198502, "density": 0.00073}}
"""CSJ-ID, section 4.1."""

CSJ_MAIN = {
    "csj_id": {"recall@1": 0.0090, "recall@5": 0.0190, "recall@10": 0.0220, "recall@20": 0.0220},
    "semantic_only": {"recall@1": 0.0055, "recall@5": 0.0065, "recall@10": 0.0090, "recall@20": 0.0095},
}
"""CSJ-ID, section 4.2. No NDCG is printed, and nothing of how many users were evaluated."""

CSJ_PROTOCOL = (
    "neither the order of interactions nor the number of users is stated; all printed values are multiples of 0.0005, "
    "as 2,000 users would give, and there is no interval."
)
"""How far the numbers of section 4.2 can be compared."""

CSJ_IMPROVEMENT = {"recall@1": 0.636, "recall@5": 1.923, "recall@10": 1.444, "recall@20": 1.316}
"""CSJ-ID, section 4.2: of CSJ-ID over semantic-only, as printed."""

CSJ_LAMBDA = {
    0.0: {"semantic": 0.0498, "collaborative": 0.0212, "total": 0.0373},
    0.3: {"semantic": 0.0022, "collaborative": 0.0241, "total": 0.0281},
    0.5: {"semantic": 0.0021, "collaborative": 0.0298, "total": 0.0229},
    0.7: {"semantic": 0.0021, "collaborative": 0.0403, "total": 0.0162},
    1.0: {"semantic": 0.0020, "collaborative": 0.0906, "total": 0.0027},
}
"""CSJ-ID, section 4.3.1: losses by lambda, the weight of the semantic part."""

CSJ_UNIQUE = {
    "csj_id": {"unique_codes": 12000, "coverage": 0.992},
    "semantic_only": {"unique_codes": 11800, "coverage": 0.975},
}
"""CSJ-ID, section 4.3.2; the counts are printed with a tilde."""
