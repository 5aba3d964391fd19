from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.answering import check_base
from pipeline.modeling.base_model import (
    BaseModelConfig,
    fingerprint,
    load_base,
    load_tokenizer,
    resolve_base,
    resolve_dtype,
)
from pipeline.modeling.encoding import Encoder
from tests.pipeline.modeling.tiny import tiny_folder, tiny_model, tiny_tokenizer


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
    with pytest.raises(
        InputError, match=r"must be 'smollm2-135m-instruct', 'minilm-l6' or a local Hugging Face folder.*notes.txt"
    ):
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


@pytest.mark.parametrize(
    ("dtype", "native", "warns"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("auto", False, 0)]
)
def test_emulated_bfloat16_is_said(
    small_base: BaseModelConfig,
    dtype: str,
    native: bool,
    warns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pipeline.modeling.base_model.native_bfloat16", lambda: native)
    load_base(small_base.model_copy(update={"dtype": dtype}))
    assert capsys.readouterr().err.count("model.dtype bfloat16 is emulated") == warns


TASK = TaskSpec(name="t", template="Text: {text}\nAnswer:", label_words=(" no", " yes"))


def _rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"plain weights.*quantised \(gptq\)"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, r"plain weights.*quantised \(fp8\)"),
        ({"model_type": "newest", "auto_map": {"AutoConfig": "c.C"}}, "type 'newest' and brings code of its own"),
        ({"model_type": "newest"}, "of a type that the installed transformers knows.*'newest'"),
        ({"model_type": None}, "names its model_type"),
        ({"model_type": "t5"}, "must hold a causal language model"),
        ({"hidden_size": "wide"}, "a configuration that transformers reads"),
        ({"max_position_embeddings": 32}, r"max_length must be at most 32, the positions.*got 64"),
        ({"vocab_size": 200}, "the tokenizer's tokens must be the model's.*vectors of 200"),
    ],
)
def test_folders_that_cannot_be_a_base_are_refused_before_their_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    _rewrite(tiny_folder(tmp_path, "llama"), **changes)
    config = BaseModelConfig(base=str(tmp_path), max_length=64)
    if changes != {"model_type": "t5"}:
        with pytest.raises(InputError, match=words):
            check_base(config, [TASK])
    with pytest.raises(InputError, match=words):
        load_base(config)


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("open('harmed', 'w')",))


def test_pickled_weights_are_refused_and_never_looked_at_beside_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny_folder(tmp_path / "base", "llama")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    config = BaseModelConfig(base=str(folder), max_length=64)
    assert load_base(config) is not None
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.base must"):
        load_base(config)
    assert not (tmp_path / "harmed").exists()


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path: Path) -> None:
    weights = tiny_folder(tmp_path, "llama", tie_word_embeddings=False) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"with all its weights.*1 weights are missing.*lm_head.weight"):
        load_base(BaseModelConfig(base=str(tmp_path), max_length=64))


def test_prompts_up_to_the_models_positions_are_read_whatever_its_configuration_calls_them(tmp_path: Path) -> None:
    tiny_folder(tmp_path, "roberta", is_decoder=True)  # its first two positions are no tokens'
    load_base(BaseModelConfig(base=str(tmp_path), max_length=126, dtype="float32"))
    with pytest.raises(InputError, match=r"must read prompts of model.max_length = 128"):
        load_base(BaseModelConfig(base=str(tmp_path), max_length=128, dtype="float32"))


def test_a_special_token_without_a_vector_is_refused_only_where_a_text_has_it(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(load_tokenizer(BaseModelConfig(base=str(tmp_path))), [TASK], 64)
    encoder.encode([Sample(key="1", task="t", fields={"text": "red"}, label=0)])
    with pytest.raises(InputError, match=r"sample t/2 has the token '<image>', of which the model has no vector"):
        encoder.encode([Sample(key="2", task="t", fields={"text": "red <image>"}, label=0)])


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama4_text", {"num_hidden_layers": 4}),  # lists of a layer each, and numbers of layers
        ("gemma3_text", {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("jamba", {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),  # a computed list
    ],
)
def test_a_cut_keeps_the_first_layers_of_any_layer_list(tmp_path: Path, kind: str, extra: dict[str, Any]) -> None:
    config = BaseModelConfig(base=str(tiny_folder(tmp_path, kind, **extra)), max_length=64, dtype="float32")
    whole, cut = load_base(config), load_base(config.model_copy(update={"num_layers": 2}))
    parameters = dict(whole.named_parameters())
    kept = dict(cut.named_parameters())
    assert 0 < len(kept) < len(parameters)
    for name, parameter in kept.items():
        torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=0)
    ids = torch.tensor([[9, 8, 7, 6]])
    one, other = (model(ids, output_hidden_states=True).hidden_states[1] for model in (whole, cut))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_cut_that_changes_layers_that_are_kept_is_refused(tmp_path: Path) -> None:
    from pipeline.modeling.architecture import check_cut

    tiny_folder(tmp_path, "llama")
    config = BaseModelConfig(base=str(tmp_path), num_layers=1, max_length=64)
    with pytest.raises(InputError, match=r"cannot cut .*layers.0.self_attn.k_proj.weight of a layer that is kept"):
        check_cut(["model.layers.1.mlp.weight", "model.layers.0.self_attn.k_proj.weight"], config)
    check_cut(["model.layers.1.mlp.weight"], config)
