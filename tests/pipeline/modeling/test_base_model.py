from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.modeling.base_model import BaseModelConfig, fingerprint, load_base, resolve_base, resolve_dtype


def test_embedded_model_is_plain_after_conversion(small_base: BaseModelConfig) -> None:
    model = load_base(small_base)
    assert model.config.num_hidden_layers == 2
    assert getattr(model.config, "quantization_config", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_cut_model_equals_first_layers_of_the_whole(small_base: BaseModelConfig) -> None:
    whole = load_base(small_base.model_copy(update={"num_layers": None}))
    cut = load_base(small_base)
    ids = torch.tensor([[5, 6, 7]])
    whole_states = whole.model(ids, output_hidden_states=True).hidden_states
    cut_states = cut.model(ids, output_hidden_states=True).hidden_states
    # The last hidden state is normalised, so the one before it is compared.
    torch.testing.assert_close(cut_states[1], whole_states[1], rtol=0, atol=0)
    assert len(whole_states) == 31


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(InputError, match=r"must be 'smollm2-135m-instruct' or a local Hugging Face folder.*notes.txt"):
        resolve_base(BaseModelConfig(base=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="must hold a tokenizer and safetensors weights"):
        resolve_base(BaseModelConfig(base=str(tmp_path)))
    with pytest.raises(InputError, match="no such folder"):
        resolve_base(BaseModelConfig(base=str(tmp_path / "missing")))


def test_more_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"num_layers must be at most 30.*got 31"):
        load_base(BaseModelConfig(num_layers=31))


def test_fingerprint_tells_cuts_apart(small_base: BaseModelConfig) -> None:
    assert fingerprint(small_base) == fingerprint(small_base)
    assert fingerprint(small_base) != fingerprint(small_base.model_copy(update={"num_layers": 3}))


def test_auto_dtype_is_bfloat16_only_where_it_is_native() -> None:
    from pipeline.modeling.base_model import native_bfloat16

    assert resolve_dtype("auto") is (torch.bfloat16 if native_bfloat16() else torch.float32)
    assert resolve_dtype("bfloat16") is torch.bfloat16
