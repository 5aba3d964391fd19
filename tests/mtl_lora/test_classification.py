"""A task of an encoder as an ordinary classifier: PEFT alone and transformers alone give the model's logits."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from mtl_lora import build_adapter, parameter_groups
from mtl_lora.classification import export_classifier, merge_classifier
from mtl_lora.errors import ExportMismatchError, MTLLoRAError
from tests.mtl_lora.conftest import clone

KINDS = ("bert", "roberta", "xlm-roberta", "camembert")
CLASSES = (2, 3, 1)


def _settings(kind, **more):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoConfig.for_model(kind, **sizes, vocab_size=61, max_position_embeddings=64, **more)


def _adapted(kind, method="mtl_lora", **options):
    torch.manual_seed(0)
    base = AutoModel.from_config(_settings(kind)).eval()
    plain = clone(base)
    options = {"r": 4, "num_up_projections": 2, "lora_dropout": 0.0, "target_modules": ["query", "value"], **options}
    model = build_adapter(method, base, ["a", "b", "c"], head_classes=CLASSES, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.add_(0.2 * torch.randn_like(p))
        for p in model.task_heads.parameters():
            p.normal_()
    return model.eval(), plain


def _inputs():
    ids = torch.randint(5, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _logits(model, task):
    heads, rows = model.task_heads, model.task_heads.rows(model.task_id(task))
    with torch.no_grad():
        states = model(**_inputs(), task_ids=task).last_hidden_state[:, 0]
        return states @ heads.weight[rows].t() + heads.bias[rows]


def _classifier(kind, task):
    return AutoModelForSequenceClassification.from_config(_settings(kind, num_labels=CLASSES["abc".index(task)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["a", "b", "c"])
def test_peft_alone_gives_the_models_logits(kind, task, tmp_path):
    from peft import PeftConfig, PeftModel

    model, plain = _adapted(kind)
    plain.save_pretrained(tmp_path / "base")
    folder = export_classifier(model, task, tmp_path / task, _classifier(kind, task), _inputs(), base_name="owner/base")
    assert PeftConfig.from_pretrained(str(folder)).task_type == "SEQ_CLS"
    labels = CLASSES["abc".index(task)]
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=labels)
    served = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(served(**_inputs()).logits, _logits(model, task), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, "mtl_lora") for kind in KINDS), *(("bert", m) for m in ("lora", "dora", "moelora"))]
)
def test_transformers_alone_gives_the_merged_tasks_logits(kind, method, tmp_path):
    model, _ = _adapted(kind, method)
    expected = _logits(model, "b")
    merge_classifier(model, "b", tmp_path / "merged", _classifier(kind, "b"), _inputs())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**_inputs()).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(_logits(model, "b"), expected) and model.merged_task is None  # left as it was


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["mtl_lora", "lora", "dora", "multilora", "moelora"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "dense"], "rank_pattern": {"query": 2}},
        {"target_modules": ["query", "key"], "layers_to_transform": [1], "use_rslora": True},
    ],
)
def test_every_method_is_exported_on_any_layers(method, options, tmp_path):
    model, _ = _adapted("bert", method, **options)
    export_classifier(model, "b", tmp_path / "b", _classifier("bert", "b"), _inputs())  # compares through PEFT
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    assert not any("pooler" in path for path in written["target_modules"])


def test_a_half_precision_base_is_compared_as_exactly_as_its_type_allows(tmp_path):
    model, _ = _adapted("bert")
    model.base_model.to(torch.bfloat16)
    export_classifier(model, "b", tmp_path / "b", _classifier("bert", "b"), _inputs())
    with torch.no_grad():
        model.task_heads.weight[2:] = float("inf")
    with pytest.raises(ExportMismatchError):
        export_classifier(model, "b", tmp_path / "b", _classifier("bert", "b"), _inputs())


def test_what_a_classifier_cannot_express_is_refused(tmp_path):
    model, _ = _adapted("bert")
    with pytest.raises(MTLLoRAError, match="got pooling 'mean'"):
        export_classifier(model, "a", tmp_path / "a", _classifier("bert", "a"), _inputs(), pooling="mean")
    other = AutoModelForSequenceClassification.from_config(_settings("electra", num_labels=2))
    with pytest.raises(MTLLoRAError, match="ElectraForSequenceClassification is not known"):
        merge_classifier(model, "a", tmp_path / "a", other, _inputs())
    deeper = _settings("bert")
    deeper.num_hidden_layers = 3
    with pytest.raises(MTLLoRAError, match="must be the base's"):
        merge_classifier(model, "a", tmp_path / "a", AutoModelForSequenceClassification.from_config(deeper), _inputs())
    headless = build_adapter("lora", AutoModel.from_config(_settings("bert")), ["a"], target_modules=["query"])
    with pytest.raises(MTLLoRAError, match="needs a task with a head"):
        export_classifier(headless, "a", tmp_path / "a", _classifier("bert", "a"), _inputs())
    assert not (tmp_path / "a").exists()


def test_a_folder_that_does_not_reproduce_the_logits_is_not_put_in_place(tmp_path):
    model, _ = _adapted("bert")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "before").write_text("stands")
    with torch.no_grad():
        model.task_heads.weight[2].fill_(float("nan"))
    with pytest.raises(ExportMismatchError):
        export_classifier(model, "b", tmp_path / "b", _classifier("bert", "b"), _inputs())
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["before"]


@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
@pytest.mark.parametrize(
    ("rates", "of_heads", "of_transforms"),
    [
        ({}, None, None),
        ({"head_learning_rate": 3.0}, 3.0, None),
        ({"task_learning_rate": 2.0}, 2.0, 2.0),
        ({"head_learning_rate": 3.0, "task_learning_rate": 2.0, "mixing_learning_rate": 4.0}, 3.0, 2.0),
    ],
)
def test_heads_take_the_rate_of_their_own_else_that_of_what_a_task_owns(method, rates, of_heads, of_transforms):
    model, _ = _adapted("bert", method)
    groups = parameter_groups(model, 0.1, **rates)
    found = {id(p): group for group in groups for p in group["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(found) == len(trainable)
    for p in model.task_heads.parameters():
        assert (found[id(p)].get("lr"), found[id(p)]["weight_decay"]) == (of_heads, 0.0)
    for layer in model.adapted_layers().values():
        assert found[id(layer.lora_A)].get("lr") is None
        if method == "mtl_lora":
            assert found[id(layer.lora_transform)].get("lr") == of_transforms
            assert found[id(layer.lora_mixing)].get("lr") == rates.get("mixing_learning_rate", of_transforms)
