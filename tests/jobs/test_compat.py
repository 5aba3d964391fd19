"""Files as version 0.1.0 wrote them are read with the same values; those that say a later format are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from jobs.config import load_config
from mtl_lora import MTLLoRAModel
from mtl_lora.errors import AdapterFileError
from mtl_lora.files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from mtl_lora.hashes import write_hashes
from pipeline.contracts import Contract, PromotionDecision, ShardManifest
from pipeline.errors import InputError
from pipeline.promotion.entries import champions, check_unedited, read_entry, standing
from tests.mtl_lora.conftest import Stack

FILES = Path(__file__).with_name("compat")
"""Never written anew: a reader that no longer takes them breaks what users have."""


def _is_within(old: Any, new: Any) -> bool:
    """Whether all that was written is there, unchanged; later versions may know more."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(name in new and _is_within(old[name], new[name]) for name in old)
    if isinstance(old, list):
        return isinstance(new, list) and len(old) == len(new) and all(map(_is_within, old, new))
    return bool(old == new)


def test_a_run_s_configuration_says_the_same() -> None:
    old = yaml.safe_load((FILES / "config.yaml").read_text())
    assert _is_within(old, yaml.safe_load(load_config(FILES / "config.yaml").as_yaml()))


@pytest.mark.parametrize(("name", "kind"), [("manifest.json", ShardManifest), ("decision.json", PromotionDecision)])
def test_an_artefact_says_the_same_and_a_later_format_is_refused(
    name: str, kind: type[Contract], tmp_path: Path
) -> None:
    old = json.loads((FILES / name).read_text())
    assert _is_within(old, kind.read(FILES / name).model_dump(mode="json", by_alias=True))
    (tmp_path / name).write_text(json.dumps({**old, "schema": old["schema"] + 1}))
    with pytest.raises(InputError, match=rf"(?s){name} must hold a valid {kind.__name__}: .*schema.*should be 1"):
        kind.read(tmp_path / name)


def test_a_ledger_counts_as_it_did_and_is_unedited() -> None:
    written = json.loads((FILES / "ledger.json").read_text())
    entries = [read_entry(each["number"], each["tags"], each["created_ms"]) for each in written]
    chain = standing(entries)
    check_unedited(entries, chain)
    found = [(each.action, each.version, each.previous, each.anchor) for each in champions(chain)]
    assert found == [("promote", 1, None, 1), ("promote", 2, 1, 2), ("rollback", 1, 2, None)]


def test_an_adapter_is_loaded_whole_and_a_later_format_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MTLLoRAModel.from_pretrained(Stack().to(torch.float64), FILES / "adapter")
    model.save_pretrained(tmp_path)
    old, new = (load_file(folder / WEIGHTS_FILE) for folder in (FILES / "adapter", tmp_path))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    description = json.loads((FILES / "adapter" / CONFIG_FILE).read_text())
    assert _is_within(description, read_adapter(tmp_path)[1])
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**description, "version": 2}))
    write_hashes(tmp_path, CONFIG_FILE)
    with pytest.raises(AdapterFileError, match=re.escape("the adapter's version must be 1, got 2")):
        read_adapter(tmp_path)
