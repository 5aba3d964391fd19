"""A location that cannot be opened says why, and what to do."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from pipeline.errors import InputError
from pipeline.storage import filesystem


def test_s3_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # What was opened before is remembered, under a name that fsspec's package hides.
    monkeypatch.delitem(import_module("fsspec.registry").__dict__["_registry"], "s3", raising=False)
    with pytest.raises(InputError, match=r"s3://bucket/data.*pip install 'mtl-lora\[s3\]'"):
        filesystem("s3://bucket/data")
