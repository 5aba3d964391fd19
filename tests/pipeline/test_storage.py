"""A location that cannot be opened says why, and what to do."""

from __future__ import annotations

import re
import sys
from importlib import import_module

import pytest

from pipeline.errors import InputError
from pipeline.schemes import SCHEMES
from pipeline.storage import check_target, filesystem, stamp_of


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_store_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    scheme = SCHEMES[name]
    for module in [module for module in sys.modules if module.split(".")[0] == scheme.package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, scheme.package, None)
    for module in ("pipeline.https_files", "fsspec.implementations.http"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    # What was opened before is remembered, under a name that fsspec's package hides.
    monkeypatch.delitem(import_module("fsspec.registry").__dict__["_registry"], name, raising=False)
    with pytest.raises(InputError, match=re.escape(f"pip install 'mtl-lora[{scheme.extra}]'")) as caught:
        filesystem(f"{name}://bucket/data")
    assert f"{name}://bucket/data" in str(caught.value) and scheme.package in str(caught.value)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_what_can_only_be_read_is_no_target(name: str) -> None:
    url = f"{name}://bucket/data"
    if SCHEMES[name].is_writable:
        assert check_target(url, "shards") == url
        return
    with pytest.raises(InputError, match=f"shards must go to a folder or to a URL of s3://.*{url}.* can only be read"):
        check_target(url, "shards")


def test_the_hub_is_not_asked_while_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="which HF_HUB_OFFLINE refuses"):
        filesystem("hf://datasets/org/name/train.jsonl")


@pytest.mark.parametrize(
    ("info", "stamp"),
    [
        ({"ETag": '"abc"', "LastModified": 1, "size": 5}, "abc"),
        ({"etag": "0x8D", "last_modified": 1, "size": 5}, "0x8D"),
        ({"blob_id": "f00", "size": 5}, "f00"),
        ({"mtime": 1.5, "size": 5}, "1.5"),
        ({"Last-Modified": "Mon", "size": 5}, "Mon"),
        ({"size": 5}, "5"),
        ({"size": 0}, "0"),
    ],
)
def test_a_version_is_the_surest_that_storage_names(info: dict[str, object], stamp: str) -> None:
    assert stamp_of(info) == stamp


def test_azure_without_an_account_is_said_with_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNECTION_STRING", "ACCOUNT_NAME", "ACCOUNT_KEY", "SAS_TOKEN"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    with pytest.raises(InputError, match=r"az:// locations need credentials .* check AZURE_STORAGE_CONNECTION_STRING"):
        filesystem("az://container/data")
