"""Layers, ranks and scalings are chosen as PEFT chooses them: the same modules, each with the same rank and scaling."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_lora import METHODS, MTLLoRAConfig, MTLLoRAModel, build_adapter, load_adapter
from mtl_lora.errors import ConfigError, TargetError
from mtl_lora.patterns import layer_number, matching_key
from tests.mtl_lora.conftest import clone, randomise

SIZES = {"hidden_size": 32, "vocab_size": 61, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def seeded():
    """Base models are random: whether rounding stays within a tolerance may not hang on the tests that ran before."""
    torch.manual_seed(0)


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2))


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=61, n_positions=32))


def _bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZES, intermediate_size=48))


def _mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    more = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **more))


CHOICES = [
    (_llama, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    (_llama, {"target_modules": ["self_attn.v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    (_llama, {"target_modules": ["gate_proj", "up_proj", "down_proj"], "rank_pattern": {"down_proj": 3}}),
    (
        _llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2, "q_proj": 6, r".*mlp.*": 1},
            "alpha_pattern": {r"model\.layers\.2\..*": 7, "q_proj": 5},
        },
    ),
    (
        _llama,
        {
            "target_modules": r".*\.layers\.(0|2)\..*(q|k)_proj",
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"k_proj": 3},
            "use_rslora": True,
        },
    ),
    (_llama, {"target_modules": "All-Linear", "use_rslora": True}),
    (_gpt2, {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1], "layers_pattern": ["blocks", "h"]}),
    (_gpt2, {"target_modules": "all-linear", "alpha_pattern": {r"attn\.c_proj": 4}, "rank_pattern": {"c_fc": 2}}),
    (_bert, {"target_modules": ["query", "intermediate.dense"], "layers_to_transform": [2], "use_rslora": True}),
    (_bert, {"target_modules": ["dense"], "layers_to_transform": [0, 1], "rank_pattern": {r"output\.dense": 2}}),
    (_mixtral, {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "alpha_pattern": {"o_proj": 2}}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(("make", "options"), CHOICES)
def test_modules_ranks_and_scalings_are_those_of_peft(method, make, options):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(make(), LoraConfig(r=4, lora_alpha=12, **options)).base_model.model
    expected = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }
    model = build_adapter(method, make(), ["a", "b"], r=4, lora_alpha=12, num_up_projections=1, **options)
    if method in ("lora", "dora"):
        found = {path: (m.r["default"], m.scaling["default"]) for path, m in model._layers().items()}
    else:
        found = {path: (m.lora_A.shape[-2], m.scaling) for path, m in model.adapted_layers().items()}
    assert found == expected and found


PARTS = st.lists(st.sampled_from(["model", "layers", "h", "0", "1", "12", "experts", "q_proj", "x"]), min_size=1)


@given(PARTS, st.lists(st.sampled_from(["layers", "h", r"(layers|h)", "experts", r"mo\w+"]), max_size=2))
def test_a_layers_number_is_the_one_that_peft_reads(parts, patterns):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    path = ".".join(parts)
    found = layer_number(path, patterns)
    for number in (0, 1, 12):
        config = LoraConfig(target_modules=[path], layers_to_transform=[number], layers_pattern=patterns or None)
        # PEFT takes a module that is named by its whole path whatever its number: named by its end it asks for it.
        inner = f"base.{path}"
        expected = bool(check_target_module_exists(config, inner))
        assert (layer_number(inner, patterns) == number) == expected
    assert found is None or str(found) in parts


@given(PARTS, st.lists(st.sampled_from(["q_proj", r"layers\.\d+\..*", "x", "0", r"h.*"]), max_size=3))
def test_a_patterns_key_is_the_one_that_peft_takes(parts, keys):
    from peft.utils.other import get_pattern_key

    path = ".".join(parts)
    assert (matching_key(keys, path) or path) == get_pattern_key(keys, path)


MIXED = {
    "r": 4,
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {r"layers\.0\..*q_proj": 2, "down_proj": 3},
    "alpha_pattern": {"q_proj": 6},
    "lora_dropout": 0.0,
    "num_up_projections": 2,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"layers_to_transform": [0, 2]}])
def test_layers_of_different_rank_save_merge_and_export(method, more, tmp_path):
    from peft import PeftModel

    plain = _llama().eval()
    model = build_adapter(method, clone(plain), ["a", "b"], **MIXED, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    ids = torch.randint(61, (2, 7), generator=generator)
    with torch.no_grad():
        expected = model(ids, task_ids="b").logits
        assert not torch.allclose(expected, plain(ids).logits, atol=1e-3)
        model.save_pretrained(tmp_path / "saved")
        loaded = load_adapter(clone(plain), tmp_path / "saved").eval()
        assert torch.equal(loaded(ids, task_ids="b").logits, expected)
        served = PeftModel.from_pretrained(clone(plain), str(model.export_task("b", tmp_path / "b"))).eval()
        torch.testing.assert_close(served(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.merge_and_unload("b")(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_layers_of_different_rank_train_each_their_own_shape():
    config = MTLLoRAConfig(["a", "b"], **MIXED)
    model = MTLLoRAModel(_llama(), config)
    ids = torch.randint(61, (3, 6))
    with torch.no_grad():
        for layer in model.adapted_layers().values():
            layer.lora_B.normal_()
    model(ids, task_ids=[0, 1, 1]).logits.square().mean().backward()
    ranks = {layer.lora_A.shape[0] for layer in model.adapted_layers().values()}
    assert ranks == {2, 3, 4}
    for layer in model.adapted_layers().values():
        assert layer.lora_transform.shape == (2, layer.r, layer.r)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.adapter_parameters().values())


def test_an_export_of_equal_ranks_names_no_pattern(tmp_path):
    import json

    model = randomise(MTLLoRAModel(_llama(), MTLLoRAConfig(["a"], r=4)))
    written = json.loads((model.export_task("a", tmp_path / "a") / "adapter_config.json").read_text())
    assert "rank_pattern" not in written and "layers_to_transform" not in written
    assert written["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "as a list of names"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"layers_to_transform": [-1]}, "integers >= 0"),
        ({"rank_pattern": {"q_proj": 0}}, "integers >= 1, got 0"),
        ({"rank_pattern": {"*q": 2}}, "regular expressions, got '\\*q'"),
        ({"alpha_pattern": {"q_proj": 0.0}}, "numbers > 0, got 0.0"),
    ],
)
def test_contradictory_layers_and_patterns_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        MTLLoRAConfig(["a"], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers_to_transform": [1, 5]}, r"got \[5\]; .* has \[0, 1, 2\]"),
        ({"layers_to_transform": [1], "layers_pattern": "blocks"}, "no numbered layers"),
        ({"rank_pattern": {"down_proj": 2}}, r"key of rank_pattern .* got no match for \['down_proj'\]"),
        ({"alpha_pattern": {"q": 2}}, "key of alpha_pattern"),
    ],
)
def test_layers_and_keys_that_match_nothing_are_refused(options, words):
    with pytest.raises(TargetError, match=words):
        MTLLoRAModel(_llama(), MTLLoRAConfig(["a"], **options))
