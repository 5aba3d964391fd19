"""The made-up catalogue behind the *synthetic Ads data*: verticals, products, brands and their drift over the weeks.

Brand names are invented, so that nothing about them can be known from pretraining: which vertical a brand belongs to
must be learnt from the data, and new brands that arrive with drift must be learnt anew.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

PRODUCTS: dict[str, tuple[str, ...]] = {
    "shoes": ("running shoes", "sandals", "hiking boots", "sneakers", "loafers", "slippers"),
    "phones": ("smartphone", "phone case", "charger", "screen protector", "headset", "power bank"),
    "furniture": ("sofa", "dining table", "bookshelf", "office chair", "wardrobe", "bed frame"),
    "garden": ("lawn mower", "flower pots", "hedge trimmer", "garden hose", "rose seeds", "greenhouse"),
    "kitchen": ("frying pan", "coffee maker", "blender", "knife set", "toaster", "kettle"),
    "beauty": ("lipstick", "shampoo", "face cream", "perfume", "nail polish", "sunscreen"),
    "pets": ("dog food", "cat litter", "aquarium", "bird cage", "dog leash", "cat toys"),
    "travel": ("beach hotel", "city tour", "car rental", "ski trip", "cruise", "flight tickets"),
}
"""Vertical → its products. Each vertical is one token of common vocabularies, and no product stands in two."""
VERTICALS = tuple(PRODUCTS)
ATTRIBUTES = ("cheap", "premium", "small", "large", "red", "blue", "black", "white", "compact", "modern")
BUYING_TAILS = (
    "online",
    "sale",
    "near me",
    "under 50",
    "under 90",
    "with delivery",
    "in berlin",
    "in paris",
    "deals",
    "",
)
RESEARCH_TAILS = ("repair", "manual", "history", "pictures", "meaning", "for free")
"""Words of a query that wants no offer: they lower its relevance to any keyword or ad."""
ACTIVE_BRANDS = 5
"""Brands a vertical has at a time."""
_ONSETS = (
    "Nor",
    "Vel",
    "Tam",
    "Kri",
    "Bel",
    "Dro",
    "Fen",
    "Gal",
    "Hux",
    "Jor",
    "Lum",
    "Mar",
    "Pex",
    "Qua",
    "Ril",
    "Sol",
)
_CODAS = ("vex", "tano", "dell", "mira", "zon", "berg", "lia", "pero", "wick", "sta", "gro", "nex", "qui", "rado")


class Catalogue:
    """The catalogue of one seed; every method is a pure function of the seed, the drift and the week."""

    def __init__(self, seed: int, drift: float) -> None:
        self.drift = drift
        names = [onset + coda for onset, coda in itertools.product(_ONSETS, _CODAS)]
        order = np.random.default_rng([seed, 1]).permutation(len(names))
        self._names = [names[i] for i in order]

    def brands(self, vertical: str, week: float) -> tuple[str, ...]:
        """Return the vertical's brands of a week; with drift 1 one of them is replaced every week."""
        first = math.floor(self.drift * week)
        place = VERTICALS.index(vertical)
        return tuple(
            self._names[((first + k) * len(VERTICALS) + place) % len(self._names)] for k in range(ACTIVE_BRANDS)
        )

    def vertical_shares(self, week: float) -> np.ndarray:
        """Return the share of each vertical in a week's queries; it swings over eight weeks with the drift."""
        phase = 2 * math.pi * (week / 8 + np.arange(len(VERTICALS)) / len(VERTICALS))
        weights = np.exp(0.5 * self.drift * np.sin(phase))
        return np.asarray(weights / weights.sum())

    def rate_shift(self, week: float) -> float:
        """Return how far a week's label rates lie from the first week's, in logits."""
        return 0.5 * self.drift * math.sin(2 * math.pi * week / 8)
