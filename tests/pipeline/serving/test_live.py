"""Live traffic with a challenger beside the champion: who answers, who is logged, and when the challenger goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.serving.batching import Answer, Batcher, Row
from pipeline.serving.live import LiveTexts, LiveTraffic
from pipeline.serving.live_log import read_state
from pipeline.serving.server_config import ServerConfig
from tests.pipeline.serving.null_model import TASKS

ROWS = [{"task": "clicks", "text": "a"}, {"task": "clicks", "text": "b", "id": "b"}]


class Fake:
    """Answers by its name; fails, or takes its time, where it is told."""

    def __init__(self, name: str, score: float = 0.5) -> None:
        self.name, self.score, self.error, self.pause_s = name, score, False, 0.0

    async def __call__(self, requests: list[Sequence[Row]]) -> tuple[str, list[list[Answer] | InputError]]:
        await asyncio.sleep(self.pause_s)
        if self.error:
            raise RuntimeError("lost")
        p = [1 - self.score, self.score]
        return self.name, [[(str(row["task"]), self.score, 0, "no", p) for row in rows] for rows in requests]


def _traffic(log: Path, challenger: Fake, **shares: Any) -> tuple[LiveTraffic, Fake]:
    champion = Fake("models:/m/1")
    config = ServerConfig.model_validate(
        {"model": "models:/m@champion", "log": {"url": str(log), "flush_s": 0.01}, "poll_s": 0.02, **shares}
    )

    async def describe() -> dict[str, Any] | None:
        return {"model": challenger.name} if challenger.name else None

    batchers = [Batcher(one, 2048, 1000) for one in (champion, challenger)]
    return LiveTraffic(config, batchers[0], batchers[1], describe), champion


async def _warm(traffic: LiveTraffic) -> None:
    await traffic.answer("first", None, ROWS, 5)
    await asyncio.sleep(0.1)


def _logged(log: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted(log.glob("scores/*/*.parquet"))])


def test_a_shadow_scores_what_was_answered_and_never_keeps_an_answer_waiting(tmp_path: Path) -> None:
    async def run() -> list[str]:
        shadow = Fake("models:/m/2")
        traffic, _ = _traffic(tmp_path, shadow, shadow={"share": 1.0})
        await _warm(traffic)
        shadow.pause_s = 0.3
        begun = asyncio.get_running_loop().time()
        found = [(await traffic.answer(f"r{i}", "k", ROWS, 5))[0] for i in range(5)]
        assert asyncio.get_running_loop().time() - begun < 0.2
        await asyncio.sleep(1.0)
        shadow.error = True
        found.append((await traffic.answer("failed", None, ROWS, 5))[0])
        await asyncio.sleep(0.6)
        return found

    assert set(asyncio.run(run())) == {"models:/m/1"}
    rows = _logged(tmp_path)
    rows = rows[rows["request"] != "first"]  # asked while the challenger was looked for
    assert set(zip(rows["model"], rows["role"], strict=True)) == {("models:/m/1", "live"), ("models:/m/2", "shadow")}
    assert sorted(rows["request"].unique()) == [f"r{i}" for i in range(5)] and len(rows) == 5 * 2 * 2
    assert set(rows["id"].dropna()) == {"b"} and set(rows["key"]) == {"k"}


def test_a_key_is_answered_by_one_version_and_a_lost_canary_costs_no_answer(tmp_path: Path) -> None:
    async def run() -> list[dict[str, str]]:
        canary = Fake("models:/m/2")
        traffic, _ = _traffic(tmp_path, canary, canary={"share": 0.3})
        await _warm(traffic)
        turns = []
        for turn in range(3):
            canary.error = turn == 2
            turns.append({f"k{i}": (await traffic.answer(f"r{turn}-{i}", f"k{i}", ROWS, 5))[0] for i in range(200)})
        return turns

    first, second, lost = asyncio.run(run())
    assert first == second
    assert 30 < list(first.values()).count("models:/m/2") < 90
    assert set(lost.values()) == {"models:/m/1"}


def test_a_canary_that_fails_is_taken_back_for_good_and_another_one_is_tried(tmp_path: Path) -> None:
    limits = {"share": 0.5, "min_requests": 20}

    async def run() -> tuple[set[str], set[str]]:
        canary = Fake("models:/m/2", score=0.9)
        traffic, _ = _traffic(tmp_path, canary, canary=limits)
        await _warm(traffic)
        for i in range(100):
            await traffic.answer(f"r{i}", None, ROWS, 5)
        await asyncio.sleep(0.2)
        after = {(await traffic.answer(f"s{i}", None, ROWS, 5))[0] for i in range(50)}
        canary.name, canary.score = "models:/m/3", 0.5
        await asyncio.sleep(0.2)
        return after, {(await traffic.answer(f"t{i}", None, ROWS, 5))[0] for i in range(50)}

    after, later = asyncio.run(run())
    assert after == {"models:/m/1"} and later == {"models:/m/1", "models:/m/3"}
    (reason,) = read_state(str(tmp_path))["taken_back"].values()
    assert "its mean score of 'clicks' is 0.9" in reason


def test_without_a_challenger_the_champion_answers_all(tmp_path: Path) -> None:
    async def run() -> set[str]:
        traffic, _ = _traffic(tmp_path, Fake(""), canary={"share": 1.0}, shadow={"share": 1.0})
        await _warm(traffic)
        return {(await traffic.answer(f"r{i}", None, ROWS, 5))[0] for i in range(20)}

    assert asyncio.run(run()) == {"models:/m/1"}


@pytest.mark.parametrize("more", [{}, {"log": {"url": "x"}, "model": "a/folder"}])
def test_a_challenger_needs_a_registered_model_and_a_log(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="shadow and canary need a registered model"):
        ServerConfig.model_validate({"model": "models:/m@champion", "shadow": {"share": 0.1}, **more})


def test_live_texts_unlike_those_of_the_training_are_noticed_once(tmp_path: Path) -> None:
    words = ("alpha", "beta", "gamma", "delta")
    texts = [" ".join(words[(i + j) % 4] for j in range(5 + i % 3)) for i in range(600)]
    rows = [{"id": str(i), "text": f"{text} {i}", "label": i % 2} for i, text in enumerate(texts)]
    (tmp_path / "clicks").mkdir()
    for split in ("train", "test"):
        part = rows[:500] if split == "train" else rows[500:]
        (tmp_path / "clicks" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    prepare(DataConfig(source="records", root=str(tmp_path)), TASKS[:1], tmp_path / "shards", 0)
    live = LiveTexts(str(tmp_path / "shards"))
    live.add([{"task": "clicks", "text": f"{text} {i}"} for i, text in enumerate(texts)])
    assert live.new_drift() is None
    live.add([{"task": "clicks", "text": f"other words altogether {i} " * 40} for i in range(2000)])
    reasons = live.new_drift()
    assert reasons is not None and any("task 'clicks': length_psi" in reason for reason in reasons)
    live.add([{"task": "clicks", "text": f"other words altogether {i} " * 40} for i in range(600)])
    assert live.new_drift() is None
