"""Synthetic Ads data: a seeded, made-up stand-in for an ads relevance workload, in daily partitions.

Four tasks: ``query_keyword_relevance``, ``query_ad_relevance``, ``ad_landing_page_consistency`` (binary) and
``query_vertical`` (one of eight classes). The label of each record is drawn from a probability that depends only on
words that stand in its texts, and the record carries that probability (``label_probabilities``): so the best score
that any model can reach on a test split is known. The drift knob replaces brands and moves the shares of the verticals
and the label rates over the weeks.

Nothing here is real traffic, and no result on it says anything about a real one.
"""

from __future__ import annotations

import datetime as dt
import gzip
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import PROBABILITIES_FIELD, TaskSpec, write_atomic
from pipeline.synthetic.catalogue import (
    ATTRIBUTES,
    BUYING_TAILS,
    PRODUCTS,
    RESEARCH_TAILS,
    VERTICALS,
    Catalogue,
)
from pipeline.synthetic.config import SyntheticAdsConfig

TASKS = ("query_keyword_relevance", "query_ad_relevance", "ad_landing_page_consistency", "query_vertical")


def synthetic_ads_tasks() -> tuple[TaskSpec, ...]:
    """Return the specs of the four tasks."""
    yes_no = (" no", " yes")
    return (
        TaskSpec(name=TASKS[0], template="Query: {query}\nKeyword: {keyword}\nRelevant:", label_words=yes_no),
        TaskSpec(name=TASKS[1], template="Query: {query}\nAd: {title}. {text}\nRelevant:", label_words=yes_no),
        TaskSpec(name=TASKS[2], template="Ad: {title}. {text}\nPage: {page}\nConsistent:", label_words=yes_no),
        TaskSpec(
            name=TASKS[3],
            kind="multiclass",
            template="Query: {query}\nVertical:",
            label_words=tuple(f" {vertical}" for vertical in VERTICALS),
        ),
    )


@dataclass(frozen=True)
class _Offer:
    """What a text is about: all of it can be read from the text."""

    vertical: str
    product: str
    brand: str
    attribute: str


def generate(config: SyntheticAdsConfig, day: dt.date) -> dict[str, list[dict[str, Any]]]:
    """Return one day's records by task: a pure function of the configuration and the day."""
    makers = (_query_keyword, _query_ad, _ad_page, _query_vertical)
    week = (day - config.start).days / 7
    records: dict[str, list[dict[str, Any]]] = {}
    for place, (task, make) in enumerate(zip(TASKS, makers, strict=True)):
        draw = _Draw(config, week, np.random.default_rng([config.seed, 2, day.toordinal(), place]))
        records[task] = [
            {"id": f"{day:%Y%m%d}-{row:06d}", "date": day.isoformat(), **make(draw)}
            for row in range(config.rows_per_day)
        ]
    return records


def write_partition(config: SyntheticAdsConfig, day: dt.date, root: Path) -> list[Path]:
    """Write one day as ``ROOT/DATE/TASK.jsonl.gz`` and return the files; equal input gives equal bytes."""
    paths = []
    for task, records in generate(config, day).items():
        path = root / day.isoformat() / f"{task}.jsonl.gz"
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=6) as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in records)
        write_atomic(path, buffer.getvalue())
        paths.append(path)
    return paths


class _Draw:
    """The random draws of one day and task."""

    def __init__(self, config: SyntheticAdsConfig, week: float, rng: np.random.Generator) -> None:
        self.config, self.week, self.rng = config, week, rng
        self.catalogue = Catalogue(config.seed, config.drift)
        self.shares = self.catalogue.vertical_shares(week)
        self.brands = {vertical: self.catalogue.brands(vertical, week) for vertical in VERTICALS}

    def one(self, options: tuple[str, ...]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def offer(self) -> _Offer:
        vertical = VERTICALS[int(self.rng.choice(len(VERTICALS), p=self.shares))]
        return self.offer_in(vertical, self.one(PRODUCTS[vertical]))

    def offer_in(self, vertical: str, product: str) -> _Offer:
        return _Offer(vertical, product, self.one(self.brands[vertical]), self.one(ATTRIBUTES))

    def partner(self, offer: _Offer) -> _Offer:
        """Return an offer to set beside another: of the same product, of the same vertical, or of any other."""
        kind = self.rng.random()
        if kind < 0.5:
            other = self.offer_in(offer.vertical, offer.product)
            return _Offer(other.vertical, other.product, offer.brand, other.attribute) if self.chance(0.5) else other
        if kind < 0.65:
            rest = tuple(p for p in PRODUCTS[offer.vertical] if p != offer.product)
            return self.offer_in(offer.vertical, self.one(rest))
        rest = tuple(v for v in VERTICALS if v != offer.vertical)
        vertical = self.one(rest)
        return self.offer_in(vertical, self.one(PRODUCTS[vertical]))

    def binary(self, logit: float) -> dict[str, Any]:
        """Draw a label of known probability."""
        noise = self.config.label_noise
        clean = 1 / (1 + math.exp(-(logit + self.catalogue.rate_shift(self.week))))
        probability = noise / 2 + (1 - noise) * clean
        return {"label": int(self.chance(probability)), PROBABILITIES_FIELD: [1 - probability, probability]}


def _match_logit(left: _Offer, right: _Offer, *, brands_shown: bool) -> float:
    """Return how well two offers match, in logits, from what both texts show."""
    if left.product == right.product:
        same_brand = brands_shown and left.brand == right.brand
        return 3.5 if same_brand else 2.0
    return -1.5 if left.vertical == right.vertical else -3.5


def _query(draw: _Draw, offer: _Offer) -> tuple[str, bool, bool]:
    """Return a query for an offer's product, whether it names the brand, and whether it wants an offer at all."""
    names_brand, buys = draw.chance(0.5), draw.chance(0.8)
    words = [offer.attribute if draw.chance(0.6) else "", offer.brand.lower() if names_brand else "", offer.product]
    words.append(draw.one(BUYING_TAILS if buys else RESEARCH_TAILS))
    return " ".join(word for word in words if word), names_brand, buys


def _ad(draw: _Draw, offer: _Offer) -> dict[str, str]:
    slogans = ("free shipping", "shop now", "best price", "order today", "20% off")
    return {
        "title": f"{offer.brand} {offer.product}",
        "text": f"{offer.attribute} {offer.product}, {draw.one(slogans)}",
    }


def _query_keyword(draw: _Draw) -> dict[str, Any]:
    offer = draw.offer()
    query, names_brand, buys = _query(draw, offer)
    other = draw.partner(offer)
    shows = draw.chance(0.7)
    keyword = f"{other.brand.lower()} {other.product}" if shows else f"{other.attribute} {other.product}"
    logit = _match_logit(offer, other, brands_shown=names_brand and shows) - (0 if buys else 2.5)
    return {"query": query, "keyword": keyword, **draw.binary(logit)}


def _query_ad(draw: _Draw) -> dict[str, Any]:
    offer = draw.offer()
    query, names_brand, buys = _query(draw, offer)
    other = draw.partner(offer)
    logit = _match_logit(offer, other, brands_shown=names_brand) - (0 if buys else 2.5)
    return {"query": query, **_ad(draw, other), **draw.binary(logit)}


def _ad_page(draw: _Draw) -> dict[str, Any]:
    offer = draw.offer()
    other = draw.partner(offer)
    prices = ("$19", "$39", "$59", "$89", "$129")
    page = f"{other.brand} shop: {other.attribute} {other.product} from {draw.one(prices)}"
    return {**_ad(draw, offer), "page": page, **draw.binary(_match_logit(offer, other, brands_shown=True))}


def _query_vertical(draw: _Draw) -> dict[str, Any]:
    offer = draw.offer()
    query, _, _ = _query(draw, offer)
    if draw.chance(0.5):  # only the brand tells
        tail = draw.one(BUYING_TAILS + RESEARCH_TAILS)
        query = " ".join(word for word in (draw.one(ATTRIBUTES), offer.brand.lower(), tail) if word)
    noise, classes = draw.config.label_noise, len(VERTICALS)
    probabilities = np.full(classes, noise / classes)
    probabilities[VERTICALS.index(offer.vertical)] += 1 - noise
    label = int(draw.rng.choice(classes, p=probabilities))
    return {"query": query, "label": label, PROBABILITIES_FIELD: probabilities.tolist()}
