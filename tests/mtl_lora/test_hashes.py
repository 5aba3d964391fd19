"""Damage to what was written is told by the file's name, whichever byte it is."""

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtl_lora import MTLLoRAConfig, MTLLoRAError, MTLLoRAModel
from mtl_lora.errors import AdapterFileError
from mtl_lora.files import CONFIG_FILE, WEIGHTS_FILE, read_adapter, read_tensors
from mtl_lora.hashes import HASHES_FILE, check_hashes, write_hashes
from tests.mtl_lora.conftest import randomise

FILES = (CONFIG_FILE, WEIGHTS_FILE, HASHES_FILE)
DAMAGE = {
    "name": st.sampled_from(FILES),
    "position": st.floats(0, 1, exclude_max=True),
    "flip": st.one_of(st.sampled_from([1 << bit for bit in range(8)]), st.integers(1, 255)),
}


def _base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2))


def _model():
    return randomise(MTLLoRAModel(_base(), MTLLoRAConfig(["a", "b"], r=1, target_modules=["0"])))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    _model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return _model().export_task("b", tmp_path_factory.mktemp("exported") / "b")


def _flipped(path, position, flip):
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= flip
    path.write_bytes(data)


def _same(folder, other):
    (ours, said), (theirs, told) = read_adapter(folder), read_adapter(other)
    return said == told and ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@settings(max_examples=100, deadline=None)
@given(**DAMAGE)
def test_any_flipped_byte_of_an_adapter_is_refused_by_name_of_file(adapter, name, position, flip):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        _flipped(Path(folder) / name, position, flip)
        with pytest.raises(AdapterFileError) as told:
            MTLLoRAModel.from_pretrained(_base(), folder)
        assert any(file in str(told.value) for file in FILES)


@settings(max_examples=100, deadline=None)
@given(**DAMAGE | {"name": st.sampled_from([CONFIG_FILE, WEIGHTS_FILE])})
def test_a_damaged_folder_from_before_there_were_hashes_gives_typed_errors_alone(adapter, name, position, flip):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        (Path(folder) / HASHES_FILE).unlink()
        assert _same(folder, adapter)
        _flipped(Path(folder) / name, position, flip)
        with contextlib.suppress(MTLLoRAError):
            MTLLoRAModel.from_pretrained(_base(), folder)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from([WEIGHTS_FILE, "adapter_config.json", "README.md", HASHES_FILE]),
    position=DAMAGE["position"],
    flip=DAMAGE["flip"],
)
def test_any_flipped_byte_of_an_exported_task_is_told(exported, name, position, flip):
    check_hashes(exported)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        _flipped(Path(folder) / name, position, flip)
        with pytest.raises(AdapterFileError, match=r"adapter_config|adapter_model|README|SHA256SUMS"):
            check_hashes(folder)


def test_the_list_is_what_sha256sum_reads(exported):
    listed = subprocess.run(["sha256sum", "-c", HASHES_FILE], cwd=exported, capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == [f"{n}: OK" for n in ("README.md", "adapter_config.json", WEIGHTS_FILE)]


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\xff\xfe", b'{"version": 1}', b"\x08" + 15 * b"\0"])
def test_other_content_is_refused_with_and_without_hashes(adapter, tmp_path, name, content):
    folder = shutil.copytree(adapter, tmp_path / "copy")
    (folder / name).write_bytes(content)
    for _ in range(2):
        with pytest.raises(AdapterFileError, match=name):
            MTLLoRAModel.from_pretrained(_base(), folder)
        (folder / HASHES_FILE).unlink(missing_ok=True)


def test_writing_again_lists_the_new_files_and_keeps_those_of_others(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "copy")
    (folder / "note.txt").write_text("mine")
    write_hashes(folder, "note.txt")
    model = _model()
    with torch.no_grad():
        model.base_model[0].lora_A.add_(1)
    model.save_pretrained(folder)
    check_hashes(folder)
    assert not _same(folder, adapter)
    (folder / "note.txt").write_text("others")
    read_tensors(folder)  # what is not read is not checked
    with pytest.raises(AdapterFileError, match=r"note.txt must be as it was written"):
        check_hashes(folder)
    (folder / "note.txt").unlink()
    with pytest.raises(AdapterFileError, match=r"note.txt must be there"):
        read_tensors(folder)


def test_a_damaged_list_is_replaced_by_saving_again(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "copy")
    (folder / HASHES_FILE).write_bytes(b"\xff")
    _model().save_pretrained(folder)
    assert _same(folder, adapter)
