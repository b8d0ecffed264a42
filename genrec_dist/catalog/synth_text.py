"""Words of the synthetic catalog: category names, brands, titles and descriptions that reflect the structure."""

from __future__ import annotations

import numpy as np

LEAVES_PER_SUB, SUBS_PER_TOP = 4, 3

TOPS = [
    ("Camping", ["Tents", "Sleeping Bags", "Stoves", "Backpacks", "Lanterns", "Coolers"]),
    ("Kitchen", ["Knives", "Pans", "Mixers", "Kettles", "Toasters", "Bowls"]),
    ("Audio", ["Headphones", "Speakers", "Microphones", "Amplifiers", "Turntables", "Cables"]),
    ("Garden", ["Shovels", "Planters", "Hoses", "Seeds", "Pruners", "Bird Feeders"]),
    ("Beauty", ["Shampoos", "Lipsticks", "Lotions", "Perfumes", "Nail Polishes", "Hair Brushes"]),
    ("Fitness", ["Dumbbells", "Yoga Mats", "Treadmills", "Jump Ropes", "Water Bottles", "Gloves"]),
    ("Office", ["Pens", "Notebooks", "Desk Lamps", "Staplers", "Printers", "Chairs"]),
    ("Toys", ["Puzzles", "Dolls", "Building Blocks", "Board Games", "Toy Trains", "Kites"]),
    ("Pets", ["Dog Beds", "Cat Trees", "Aquariums", "Leashes", "Chew Toys", "Bird Cages"]),
    ("Photography", ["Cameras", "Lenses", "Tripods", "Flashes", "Camera Bags", "Filters"]),
]
QUALIFIERS = [
    "Folding", "Electric", "Travel", "Classic", "Waterproof", "Wooden", "Mini", "Outdoor",
    "Vintage", "Wireless", "Kids", "Stainless Steel", "Ceramic", "Modular", "Silent", "Winter",
    "Solar", "Leather", "Glass", "Magnetic", "Handmade", "Digital", "Soft", "Adjustable",
]  # fmt: skip
FEATURES = [
    "lightweight", "rechargeable", "scented", "insulated", "colorful", "transparent", "stackable", "padded",
    "nonstick", "breathable", "glossy", "matte", "quilted", "striped", "floral", "ergonomic",
    "washable", "compact", "oversized", "reflective", "textured", "polished", "braided", "inflatable",
    "detachable", "hypoallergenic", "fragrance free", "shockproof", "cordless", "slim", "curved", "layered",
    "handheld", "wall mounted", "foldable", "reversible", "ribbed", "tinted", "tapered", "weighted",
]  # fmt: skip
STYLES = [
    ["premium", "luxury", "deluxe", "elegant"],
    ["budget", "value", "economy", "simple"],
    ["organic", "eco friendly", "natural", "recycled"],
    ["professional", "heavy duty", "industrial", "expert"],
]
BRANDS_PER_TOP = 8  # brand slot s has style s % len(STYLES)
FEATURES_PER_LEAF = 4
_SYLLABLES = ["ka", "lo", "mi", "ru", "ten", "vor", "sha", "bel", "dri", "no", "pex", "zu", "gar", "fi", "wen", "tas"]


def invented_word(number: int) -> str:
    """A pronounceable word, another one for each number."""
    parts: list[str] = []
    while not parts or number:
        number, digit = divmod(number, len(_SYLLABLES))
        parts.append(_SYLLABLES[digit])
    return "".join(reversed(parts)).capitalize()


def brand_name(brand: int) -> str:
    """Name of a brand; brand b sells in top category b // BRANDS_PER_TOP."""
    return invented_word(300 + brand * 7)


def leaf_path(leaf: int) -> list[str]:
    """Category path of a leaf: top, sub, leaf."""
    sub, place = divmod(leaf, LEAVES_PER_SUB)
    top, place_in_top = divmod(sub, SUBS_PER_TOP)
    series, kind = divmod(top, len(TOPS))
    name, nouns = TOPS[kind]
    noun = nouns[place_in_top + SUBS_PER_TOP * (series % 2)]
    qualifier = QUALIFIERS[(sub * 5 + place) % len(QUALIFIERS)]
    prefix = f"{invented_word(series)} " if series else ""
    return [f"{prefix}{name}", noun, f"{qualifier} {noun}"]


def leaf_features(rng: np.random.Generator, num_leaves: int) -> np.ndarray:
    """Feature words that items of a leaf share, (num_leaves, FEATURES_PER_LEAF) indices into FEATURES."""
    return rng.integers(len(FEATURES), size=(num_leaves, FEATURES_PER_LEAF))


def item_record(
    asin: str, leaf: int, brand: int, features: np.ndarray, successor: int, rng: np.random.Generator
) -> dict:
    """Metadata of one item as in the 2014 files; brand, description and price are missing now and then.

    Args:
        asin: item id.
        leaf: leaf category.
        brand: brand number.
        features: feature words of the leaf.
        successor: leaf that most often follows this one.
        rng: source of the item's own words.
    """
    kind = leaf_path(leaf)
    style = STYLES[(brand % BRANDS_PER_TOP) % len(STYLES)]
    words = [style[i] for i in rng.permutation(len(style))[:2]]
    first, second = (FEATURES[features[i]] for i in rng.permutation(len(features))[:2])
    has_brand, has_text, has_price = rng.random(3) > (0.05, 0.3, 0.1)
    title = f"{brand_name(brand)} {words[0].title()} {kind[2]}, {first} &amp; {second}, model {rng.integers(1000)}"
    record: dict = {
        "asin": asin,
        "title": title,
        "categories": [kind],
    }
    if has_text:
        record["description"] = (
            f"A {words[1]} choice in {kind[1].lower()} by {brand_name(brand)}: {first}, {second}. "
            f"Goes well with {leaf_path(successor)[2].lower()}."
        )
    if has_price:
        record["price"] = round(float(np.exp(rng.normal(3, 0.6))), 2)
    if has_brand:
        record["brand"] = brand_name(brand)
    return record
