"""The registry always points at a version that loads, has one winner, and remembers."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from pipeline.errors import HeldBack, InputError
from pipeline.promotion.registry import Registry, Version
from tests.pipeline.promotion.conftest import PROMOTE, add_version, copy_version, made_from, promote


def test_promotion_moves_the_aliases_and_writes_the_ledger(registry: Registry, aliases: Any) -> None:
    assert aliases(registry) == {"challenger": 1}
    assert registry.champion() is None
    promote(registry, "challenger")
    assert aliases(registry) == {"champion": 1}
    promote(registry, 2)
    assert aliases(registry) == {"champion": 2, "previous": 1}
    assert registry.champion().number == 2
    assert [(e.action, e.version, e.previous, e.why) for e in registry.ledger.chain()] == [
        ("promote", 1, None, ("better",)),
        ("promote", 2, 1, ("better",)),
    ]


def test_rollback_returns_to_the_previous_or_to_any_version(registry: Registry, aliases: Any) -> None:
    for number in (1, 2):
        promote(registry, number)
    registry.rollback(why="clicks fell")
    assert aliases(registry) == {"champion": 1, "previous": 2}
    registry.rollback(3)
    assert aliases(registry) == {"champion": 3, "previous": 1}
    assert [e.action for e in registry.ledger.chain()] == ["promote", "promote", "rollback", "rollback"]
    assert registry.ledger.chain()[2].why == ("clicks fell",)


def test_a_deposed_champion_is_known_and_does_not_challenge_as_champion(registry: Registry, aliases: Any) -> None:
    for number in (1, 2):
        promote(registry, number)
    assert registry.deposed(3) is None
    registry.rollback(why="clicks fell")
    ended = registry.deposed(2)
    assert ended is not None
    assert (ended.action, ended.version) == ("rollback", 1)
    assert registry.deposed(1) is None  # champion again
    registry.challenge(1)
    assert "challenger" not in aliases(registry)
    registry.challenge(3)
    assert aliases(registry)["challenger"] == 3


def test_rollback_without_a_previous_says_what_to_name(registry: Registry) -> None:
    promote(registry, 1)
    with pytest.raises(InputError, match="has had one only; name a version"):
        registry.rollback()


@pytest.mark.parametrize("verdict", ["HOLD", "REJECT"])
def test_only_a_promote_verdict_moves_the_champion(registry: Registry, aliases: Any, verdict: str) -> None:
    with pytest.raises(HeldBack, match=f"got {verdict}"):
        registry.promote(1, PROMOTE.model_copy(update={"verdict": verdict}))
    assert aliases(registry) == {"challenger": 1}
    assert registry.ledger.chain() == []


def test_an_unknown_version_is_refused_with_those_there_are(registry: Registry) -> None:
    with pytest.raises(InputError, match=r"got '9': \[3, 2, 1\] are registered"):
        promote(registry, 9)


def test_a_version_whose_files_are_gone_does_not_become_champion(store: str, adapter: Path, aliases: Any) -> None:
    registry = Registry("gone", store)
    promote(registry, add_version(registry, adapter))
    second = registry.version(add_version(registry, adapter))
    shutil.rmtree(urlparse(second.source).path)
    with pytest.raises(InputError, match="must have its files"):
        promote(registry, 2)
    assert aliases(registry)["champion"] == 1


def test_a_truncated_adapter_does_not_become_champion(store: str, adapter: Path) -> None:
    registry = Registry("truncated", store)
    number = add_version(registry, adapter)
    weights = next(Path(urlparse(registry.version(number).source).path).rglob("adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors was changed"):
        promote(registry, number)
    registry._client.delete_model_version_tag(registry.name, str(number), "files")  # as an earlier release registered
    registry._client.delete_model_version_tag(registry.name, str(number), "adapter_sha256")
    with pytest.raises(InputError, match="must say which weights were evaluated"):
        promote(registry, number)
    with pytest.raises(InputError, match="must load"):
        registry.rollback(number)
    assert registry.champion() is None


def test_of_two_promotions_written_at_once_the_first_stands(registry: Registry, aliases: Any) -> None:
    promote(registry, 1)
    seen = registry.ledger.chain()[-1].number
    two, three = (registry._client.get_model_version(registry.name, n) for n in "23")
    registry.ledger.append("promote", two, 1, ["first"], seen, decision=PROMOTE)
    with pytest.raises(HeldBack, match="version 2 became champion"):
        registry.ledger.append("promote", three, 1, ["second"], seen, decision=PROMOTE)
    assert registry.champion().number == 2
    assert aliases(registry) == {
        "champion": 2,
        "previous": 1,
    }
    assert len(registry.ledger.entries()) == 3
    promote(registry, 3)
    assert registry.champion().number == 3


def test_threads_that_promote_at_once_end_with_one_winner(registry: Registry, aliases: Any) -> None:
    barrier, results = threading.Barrier(2), {}
    append = registry.ledger.append

    def waiting(*args: Any, **more: Any) -> Any:
        barrier.wait()  # both have read the same ledger before either writes
        return append(*args, **more)

    registry.ledger.append = waiting  # type: ignore[method-assign]

    def promote_in_turn(number: int) -> None:
        try:
            results[number] = promote(registry, number)
        except HeldBack as refusal:
            results[number] = refusal

    threads = [threading.Thread(target=promote_in_turn, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lost = [n for n, r in results.items() if isinstance(r, HeldBack)]
    assert len(lost) == 1
    assert registry.champion().number == 3 - lost[0]
    assert aliases(registry)["champion"] == 3 - lost[0]


class Killed(BaseException):
    pass


class DyingClient:
    """Passes calls on to the registry until the n-th, before which the process is gone."""

    def __init__(self, client: Any, calls: int) -> None:
        self._client, self.left = client, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **more: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return method(*args, **more)

        return call


def test_killed_before_any_call_the_registry_points_at_a_version_that_loads(
    registry: Registry, stored: Version, aliases: Any
) -> None:
    outcomes = set()
    promote(registry, 1)
    for calls in range(40):
        target = copy_version(registry, stored)
        before = registry.champion().number
        dying = Registry(registry.name, registry.uri)
        dying.__dict__["_client"] = DyingClient(registry._client, calls)
        finished = False
        try:
            promote(dying, target)
            finished = True
        except Killed:
            pass
        seen = aliases(registry)["champion"]  # what a server that loads models:/NAME@champion sees at once
        assert seen in (before, target)
        registry.check_loads(seen)
        settled = registry.champion().number
        outcomes.add((seen, settled) != (before, before))
        assert aliases(registry)["champion"] == settled
        assert settled in (before, target)
        if settled == target:
            assert aliases(registry)["previous"] == before
        if finished:
            assert calls > 5
            break
    assert finished
    assert outcomes == {False, True}


def test_registering_again_names_the_champion_as_parent(registry: Registry, adapter: Path) -> None:
    promote(registry, 2)
    number = add_version(registry, adapter, git_commit="abc")
    assert registry.version(number).provenance.parent == 2
    assert registry.version("challenger").number == number


def test_an_adapter_folder_without_its_files_is_refused(store: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold adapter_model\.safetensors"):
        Registry("empty", store).register(tmp_path, run_id="none", provenance=made_from())


def test_a_verdict_against_another_champion_moves_nothing(registry: Registry, aliases: Any) -> None:
    promote(registry, 1)
    with pytest.raises(HeldBack, match="compared with version none and version 1 is champion now"):
        registry.promote(3, PROMOTE)
    assert aliases(registry)["champion"] == 1


def test_an_old_version_may_be_deleted(registry: Registry, aliases: Any) -> None:
    promote(registry, 1)
    promote(registry, 2)
    registry._client.delete_model_version(registry.name, "1")
    assert registry.champion().number == 2
    promote(registry, 3)
    assert registry.champion().number == 3
    assert aliases(registry)["champion"] == 3
