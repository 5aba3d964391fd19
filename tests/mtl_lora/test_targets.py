"""What is adapted answers as PEFT's LoRA there does; what cannot be adapted is refused or warned of, at build."""

import warnings

import pytest
import torch
from torch import nn

from mtl_lora import MTLLoRAConfig, MTLLoRAModel, build_adapter
from mtl_lora.errors import ConfigError, FrozenExpertsWarning, TargetError
from mtl_lora.targets import expert_parameters, is_adaptable
from tests.mtl_lora.conftest import clone, randomise

SIZES = {"hidden_size": 32, "vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4}


def _falcon():
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    return FalconForCausalLM(FalconConfig(**SIZES, bias=True)).eval()


def _mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    more = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **more)).eval()


def _llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


class Overridden(nn.Linear):
    """The same map in other words."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    """A linear map that knows one number more."""

    factor = 2.0

    def forward(self, x):
        return super().forward(x) * self.factor


class Unbiased(nn.Linear):
    """A map that leaves its bias out."""

    def forward(self, x):
        return x @ self.weight.T


class Pair(nn.Linear):
    """A router that returns two values."""

    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y


class Needy(nn.Linear):
    """A map that needs more than weight and bias."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.mask = torch.ones(1)

    def forward(self, x):
        return super().forward(x * self.mask)


@pytest.mark.parametrize("kind", [nn.Linear, Overridden])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_map_is_adaptable_whatever_its_class(kind, device):
    assert is_adaptable(kind(3, 4, device=device))


@pytest.mark.parametrize("kind", [Scaled, Unbiased, Pair, Needy])
def test_a_subclass_that_maps_otherwise_is_refused_by_name(kind):
    assert not is_adaptable(kind(3, 4))
    base = nn.Sequential(kind(3, 4), nn.Linear(4, 2))
    with pytest.raises(TargetError, match=rf"0 \({kind.__name__}\)"):
        MTLLoRAModel(base, MTLLoRAConfig(["a"], target_modules=["0"]))
    assert list(MTLLoRAModel(base, MTLLoRAConfig(["a"], target_modules="all-linear")).adapted_layers()) == ["1"]


def test_telling_linear_maps_draws_nothing_from_the_global_generator():
    class Fresh(Overridden):  # not asked of before
        def forward(self, x):
            return super().forward(x)

    layer, state = Fresh(3, 4), torch.get_rng_state()
    assert is_adaptable(layer)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_projection_that_attention_reads_without_calling_is_refused():
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "last": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="called as such"):
        MTLLoRAModel(base, MTLLoRAConfig(["a"], target_modules=["out_proj"]))
    model = MTLLoRAModel(base, MTLLoRAConfig(["a"], target_modules="all-linear"))
    assert list(model.adapted_layers()) == ["last"]


@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
def test_falcons_fused_projections_train_export_and_unload(tmp_path, method):
    from peft import PeftModel

    plain = _falcon()
    options = {"r": 4, "lora_dropout": 0.0, "target_modules": ["query_key_value", "dense"]}
    model = build_adapter(method, clone(plain), ["a", "b"], **options)
    ids = torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = plain(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids, task_ids=[0, 1, 1]).logits, expected, rtol=1e-4, atol=1e-5)
    model(ids, task_ids=[0, 1, 1]).logits.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        adapted = model.eval()(ids, task_ids="b").logits
        assert not torch.allclose(adapted, expected, atol=1e-3)
        served = PeftModel.from_pretrained(clone(plain), str(model.export_task("b", tmp_path / "b"))).eval()
        torch.testing.assert_close(served(ids).logits, adapted, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload("b")
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    attention = "transformer.h.0.self_attention.dense"
    assert type(merged.get_submodule(attention)) is type(plain.get_submodule(attention))


def test_an_output_head_of_its_own_is_adapted_a_row_as_any_layer(tmp_path):
    from peft import PeftModel

    plain = _llama(tied=False)
    config = MTLLoRAConfig(["a", "b"], r=4, lora_dropout=0.0, target_modules=["q_proj", "lm_head"])
    model = randomise(MTLLoRAModel(clone(plain), config)).eval()
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed = model(ids, task_ids=["a", "b"]).logits
        for row, task in enumerate(["a", "b"]):
            served = PeftModel.from_pretrained(clone(plain), str(model.export_task(task, tmp_path / task))).eval()
            torch.testing.assert_close(served(ids).logits[row], mixed[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.merge_and_unload("a")(ids).logits[0], mixed[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
@pytest.mark.parametrize("targets", [["lm_head"], r".*(q_proj|lm_head)"])
def test_a_head_tied_to_the_input_embedding_is_refused(method, targets):
    with pytest.raises(TargetError, match=r"'lm_head', tied to 'model.embed_tokens'"):
        build_adapter(method, _llama(tied=True), ["a"], target_modules=targets)


def test_all_linear_leaves_a_classifier_to_itself():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)
    model = MTLLoRAModel(LlamaForSequenceClassification(config), MTLLoRAConfig(["a"], target_modules="all-linear"))
    assert len(model.adapted_layers()) == 14 and "score" not in model.adapted_layers()


def test_merging_one_of_two_tied_layers_leaves_the_other():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = base[0].weight
    model = randomise(MTLLoRAModel(base, MTLLoRAConfig(["a", "b"], lora_dropout=0.0, target_modules="all-linear")))
    x, tied = torch.randn(5, 4), model.base_model[0].weight
    expected = model.eval()(x, task_ids="b")
    model.merge("b")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge()
    assert model.base_model[0].weight is model.base_model[1].weight is tied


@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
def test_experts_that_stay_frozen_are_told_with_their_number_and_names(method):
    base = _mixtral()
    experts = expert_parameters(base)
    assert {name.rpartition(".")[2] for name in experts} == {"gate_up_proj", "down_proj"} and len(experts) == 4
    count = sum(p.numel() for p in experts.values())
    with pytest.warns(FrozenExpertsWarning) as told:
        build_adapter(method, base, ["a"], target_modules="all-linear")
    (message,) = (str(w.message) for w in told if w.category is FrozenExpertsWarning)
    assert message.startswith(f"4 parameters of experts with {count:,} values")
    assert "model.layers.0.mlp.experts.gate_up_proj" in message


def test_a_target_that_names_experts_is_refused_with_the_reason():
    with pytest.raises(TargetError, match=r"parameters of experts, such as .*gate_up_proj, cannot be adapted"):
        MTLLoRAModel(_mixtral(), MTLLoRAConfig(["a"], target_modules=["q_proj", "gate_up_proj"]))


def test_bases_without_stacked_experts_and_experts_that_train_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrozenExpertsWarning)
        base = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4), nn.BatchNorm1d(4))
        MTLLoRAModel(base, MTLLoRAConfig(["a"], target_modules=["1"]))
        MTLLoRAModel(_llama(tied=True), MTLLoRAConfig(["a"]))
        MTLLoRAModel(_mixtral(), MTLLoRAConfig(["a"], modules_to_save=["experts"]))


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="regular expression, got '\\*_proj'"):
        MTLLoRAConfig(["a"], target_modules="*_proj")


def test_a_bare_name_is_an_expression_on_the_full_path_as_in_peft(tiny_llama):
    with pytest.raises(TargetError, match=r"names stand in a list, \['q_proj'\]"):
        MTLLoRAModel(tiny_llama, MTLLoRAConfig(["a"], target_modules="q_proj"))


def _blocks(kind):
    """A model of two blocks, and what its attention's and its feed-forward's layers are called in one."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    attention = [f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
    gated = [f"self_attn.{name}_proj" for name in "qkvo"], [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    if kind == "llama":
        return _llama(tied=True), "model.layers", *gated
    if kind == "bert":
        model = BertModel(BertConfig(**SIZES, intermediate_size=48))
        return model, "encoder.layer", attention, ["intermediate.dense", "output.dense"]
    if kind == "modernbert":
        model = ModernBertModel(ModernBertConfig(**SIZES, intermediate_size=48, pad_token_id=0))
        return model, "layers", ["attn.Wqkv", "attn.Wo"], ["mlp.Wi", "mlp.Wo"]
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61))
    return model, "transformer.h", ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
@pytest.mark.parametrize("kind", ["llama", "bert", "modernbert", "gpt2"])
def test_feed_forward_and_whole_blocks_are_targets_by_one_word(kind, method):
    found = {}
    for targets in ("ffn", "all-linear"):
        base, blocks, attention, ffn = _blocks(kind)
        model = build_adapter(method, base, ["a"], r=2, target_modules=targets)
        found[targets] = {path for path in model.plain_layers() if not path.startswith("pooler")}
        if targets == "ffn" and method == "lora":
            layers = model.plain_layers().values()
            sizes = [sum(layer.weight.shape) for layer in layers]
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * sum(sizes)
    expected = {f"{blocks}.{number}.{name}" for number in (0, 1) for name in ffn}
    assert found["ffn"] == expected
    assert found["all-linear"] == expected | {f"{blocks}.{number}.{name}" for number in (0, 1) for name in attention}
