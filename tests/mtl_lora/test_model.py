"""The model as a whole: sizes from the paper, PEFT as a special case, targets, types, merging."""

import pytest
import torch
from torch import nn

from mtl_lora import MTLLoRAConfig, MTLLoRAModel
from mtl_lora.errors import MTLLoRAError, RoutingError, TargetError
from tests.mtl_lora.conftest import Stack, clone, make_model, randomise


@pytest.mark.parametrize(("transform", "count"), [("full", 16_845_824), ("diagonal", 16_788_480)])
def test_llama2_7b_has_the_papers_number_of_trainable_parameters(transform, count, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig())
        model = MTLLoRAModel(base, MTLLoRAConfig([f"t{i}" for i in range(8)], transform=transform))
    assert model.count_parameters()[0] == count
    model.print_trainable_parameters()
    assert f"trainable params: {count:,}" in capsys.readouterr().out


def test_one_task_one_up_projection_and_the_identity_is_peft_lora(tiny_llama):
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "v_proj", "down_proj"]
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": names}
    theirs = get_peft_model(clone(tiny_llama).double(), LoraConfig(**options), autocast_adapter_dtype=False)
    ours = MTLLoRAModel(tiny_llama.double(), MTLLoRAConfig(["only"], num_up_projections=1, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for path, layer in ours.adapted_layers().items():
            peft_layer = theirs.base_model.model.get_submodule(path)
            layer.lora_B.copy_(torch.randn_like(layer.lora_B))
            peft_layer.lora_A["default"].weight.copy_(layer.lora_A)
            peft_layer.lora_B["default"].weight.copy_(layer.lora_B[0])
    ids = torch.randint(61, (2, 5))
    out_theirs, out_ours = theirs(ids, labels=ids), ours(ids, labels=ids)
    torch.testing.assert_close(out_ours.logits, out_theirs.logits, rtol=1e-10, atol=1e-10)
    out_theirs.loss.backward()
    out_ours.loss.backward()
    for path, layer in ours.adapted_layers().items():
        peft_layer = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(layer.lora_A.grad, peft_layer.lora_A["default"].weight.grad, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(layer.lora_B.grad[0], peft_layer.lora_B["default"].weight.grad)
    assert sum(p.requires_grad for p in theirs.parameters()) == 2 * len(ours.adapted_layers())


def test_a_new_adapter_starts_as_the_base():
    base = Stack().double()
    model = MTLLoRAModel(clone(base), MTLLoRAConfig(["a", "b"], target_modules=["first", "second"]))
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    assert torch.equal(model(x, task_ids=[0, 1, 0]), base(x))
    layer = model.base_model.blocks[0].first
    assert torch.equal(layer.lora_transform, torch.eye(8, dtype=torch.float64).expand(2, 8, 8))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["first"], {"blocks.0.first", "blocks.1.first"}),
        (["blocks.1.first", "head"], {"blocks.1.first", "head"}),
        (r"blocks\.0\..*(first|second)", {"blocks.0.first", "blocks.0.second"}),
        ("all-linear", {f"blocks.{i}.{n}" for i in (0, 1) for n in ("first", "second")} | {"head"}),
    ],
)
def test_targets_by_name_expression_or_all(targets, found):
    assert set(MTLLoRAModel(Stack(), MTLLoRAConfig(["a"], target_modules=targets)).adapted_layers()) == found


def test_all_linear_leaves_the_output_head(tiny_llama):
    layers = MTLLoRAModel(tiny_llama, MTLLoRAConfig(["a"], target_modules="all-linear")).adapted_layers()
    assert len(layers) == 14 and "lm_head" not in layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["frist"]}, r"no match for \['frist'\]; near names: \['first'"),
        ({"target_modules": r"nothing.*"}, "no match"),
        ({"target_modules": ["norm"]}, r"blocks.0.norm \(LayerNorm\)"),
        ({"target_modules": ["first"], "modules_to_save": ["haed"]}, r"near names: \['head'"),
        (
            {"target_modules": ["first"], "bias": "all", "extras_within": ["blocks.9"]},
            r"extras_within .* got \[.blocks.9",
        ),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_near_names(options, message):
    with pytest.raises(TargetError, match=message):
        MTLLoRAModel(Stack(), MTLLoRAConfig(["a"], **options))


def test_what_trains_is_what_the_configuration_says():
    options = {"modules_to_save": ["head"], "bias": "lora_only", "train_layer_norms": True, "targets": ["first"]}
    model = make_model(**options)
    trainable = {name.removeprefix("base_model.") for name, p in model.named_parameters() if p.requires_grad}
    extras = {"head.weight", "head.bias"}
    for i in (0, 1):
        extras |= {f"blocks.{i}.norm.weight", f"blocks.{i}.norm.bias", f"blocks.{i}.first.bias"}
    assert model.extra_parameter_names == extras
    assert trainable - extras == {name for name in trainable if "lora_" in name}
    model(torch.randn(2, 3, 6, dtype=torch.float64), task_ids=[0, 1]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_keeps_outputs_and_unmerging_restores_bits(dtype):
    model = make_model(dtype=dtype)
    x = torch.randn(3, 2, 6).to(dtype)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x, task_ids="b")
    model.merge("b")
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(RoutingError, match="serves only its task 'b'"):
        model(x, task_ids=[0, 1, 1])
    with pytest.raises(MTLLoRAError, match="unmerge"):
        model.merge("a")
    model.unmerge()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_merge_and_unload_gives_back_an_ordinary_model():
    base = Stack().double()
    model = randomise(MTLLoRAModel(clone(base), MTLLoRAConfig(["a", "b"], lora_dropout=0.0, target_modules=["first"])))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = model(x, task_ids="b")
    plain = model.merge_and_unload("b")
    torch.testing.assert_close(plain(x), expected, rtol=1e-10, atol=1e-10)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert type(plain.blocks[0].first) is nn.Linear


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_bases_take_either_adapter_type(adapter_dtype):
    torch.manual_seed(0)
    config = MTLLoRAConfig(["a", "b"], r=2, lora_dropout=0.0, target_modules=["first", "second"])
    base = Stack()
    exact = randomise(MTLLoRAModel(clone(base).double(), config))
    model = MTLLoRAModel(base.bfloat16(), config, adapter_dtype)
    model.load_adapter_state_dict(exact.adapter_state_dict())
    x = torch.randn(4, 3, 6)
    y = model(x.bfloat16(), task_ids=[0, 1, 1, 0])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact(x.double(), task_ids=[0, 1, 1, 0]), rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert {g.dtype for g in grads} == {adapter_dtype} and all(torch.isfinite(g).all() for g in grads)


def test_autocast_runs_the_low_rank_path_in_its_type():
    model = make_model(dtype=torch.float32)
    x = torch.randn(4, 3, 6)
    exact = model(x, task_ids=[0, 1, 2, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x, task_ids=[0, 1, 2, 0])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_generate_decodes_each_row_with_its_task(tiny_llama):
    model = randomise(MTLLoRAModel(tiny_llama, MTLLoRAConfig(["a", "b"], temperature=0.7, r=4)))
    ids = torch.randint(61, (2, 4))
    both = model.generate(ids, task_ids=[1, 0], max_new_tokens=5, do_sample=False, pad_token_id=0)
    for row, task in enumerate([1, 0]):
        plain = clone(model).merge_and_unload(task)
        alone = plain.generate(ids[row : row + 1], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(both[row, : alone.shape[1]], alone[0])
    with pytest.raises(RoutingError, match="one task id a prompt"):
        model.generate(ids, task_ids=torch.zeros(2, 4, dtype=torch.int64))


def test_generation_sees_weights_that_changed_since_the_last_one(tiny_llama):
    model = randomise(MTLLoRAModel(tiny_llama, MTLLoRAConfig(["a", "b"], temperature=0.7, r=4)))
    ids = torch.randint(61, (1, 4))
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    before = model.generate(ids, task_ids=0, **options).logits[0]
    for layer in model.adapted_layers().values():
        layer.lora_B.data.mul_(-1)
    after = model.generate(ids, task_ids=0, **options).logits[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(ids, task_ids=0).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_attributes_of_the_base_are_at_hand(tiny_llama):
    model = MTLLoRAModel(tiny_llama, MTLLoRAConfig(["a"]))
    assert model.config is tiny_llama.config
    with pytest.raises(AttributeError, match="nowhere"):
        _ = model.nowhere


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_hugging_faces_checkpointing_gives_the_same_gradients(tiny_llama, use_reentrant):
    model = randomise(MTLLoRAModel(tiny_llama.double(), MTLLoRAConfig(["a", "b"], lora_dropout=0.0, r=2)))
    ids = torch.randint(61, (2, 5))
    model.train()

    def gradients():
        model.zero_grad()
        model(ids, task_ids=[1, 0], labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
