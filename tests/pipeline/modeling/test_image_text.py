"""Every family of image-text models answers about images as its own forward does, or is refused with the reason."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.evaluation.parity import own_probabilities
from pipeline.images import decoded, png_of
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import check_base, class_scorer, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_processor, save_text_side
from pipeline.modeling.packing import pack
from pipeline.modeling.predictor import Predictor, PredictorSpec
from pipeline.modeling.scoring import LabelScorer, Scorer, label_loss
from tests.pipeline.modeling.tiny import tiny_folder
from tests.pipeline.modeling.tiny_image_text import FAMILIES

SEEN = TaskSpec(name="seen", kind="multiclass", template="{text} is:", label_words=(" no", " yes", " maybe"),
                image_field="image")  # fmt: skip
SAID = TaskSpec(name="said", kind="generation", template="{text}:", image_field="image",
                generation={"max_new_tokens": 4})  # fmt: skip
READ = TaskSpec(name="read", template="{text} is:", label_words=(" no", " yes"))
PACKED = ("llava", "fast_vlm", "idefics3", "smolvlm")


def picture(seed: int, size: tuple[int, int] = (40, 60)) -> bytes:
    return png_of(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def samples(task: TaskSpec = SEEN) -> list[Sample]:
    asked = [("it", picture(0)), ("it", picture(1)), ("one thing", picture(0)), ("it", picture(2, (80, 30)))]
    shown = [image if task.image_field else None for _, image in asked]
    answers = ("red",) if task.kind == "generation" else ()
    return [
        Sample(key=f"{task.name}{i}", task=task.name, fields={"text": text}, label=0, image=image, answers=answers)
        for i, ((text, _), image) in enumerate(zip(asked, shown, strict=True))
    ]


def _own_probabilities(model: Any, processor: Any, encoder: Any, sample: Sample) -> np.ndarray:
    """Ask a model about one sample as its processor makes it, each word alone."""
    made = dict(
        processor(text=f"{encoder.mark}{sample.fields['text']} is:", images=decoded(sample.image or b""),
                  return_tensors="pt")
    )  # fmt: skip
    ids, found = made.pop("input_ids"), []
    made.pop("labels", None)
    is_token, kinds = made.pop("attention_mask"), [n for n, x in made.items() if x.shape == ids.shape]
    for word in encoder.label_tokens("seen"):
        more = torch.tensor([word])
        later = int(not any(made[name].any() for name in kinds))  # PaliGemma's answers are 1, others' images are
        grown = {n: torch.cat([made[n], torch.full_like(more, later)], 1) for n in kinds}
        with torch.inference_mode():
            logits = model(input_ids=torch.cat([ids, more], 1), attention_mask=torch.ones(1, ids.shape[1] + len(word)),
                           **{**made, **grown}).logits[0].double().log_softmax(-1)  # fmt: skip
        found.append(sum(float(logits[ids.shape[1] - 1 + i, token]) for i, token in enumerate(word)))
    assert int(is_token.sum()) == ids.shape[1]
    p = np.exp(np.array(found) - max(found))
    return p / p.sum()


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_of_images_are_the_models_own(folders: dict[str, BaseModelConfig], kind: str) -> None:
    config = folders[kind]
    base: Any = load_base(config)
    assert base.packs_images is (kind in PACKED)
    tasks = [SEEN] if kind == "paligemma" else [SEEN, READ]
    encoder: Any = sample_encoder(config, tasks)
    asked = samples() + (samples(READ) if len(tasks) > 1 else [])
    together = Scorer(LabelScorer(base), encoder).probabilities(asked)
    plain = AutoModelForImageTextToText.from_pretrained(config.base, dtype=torch.float32, attn_implementation="eager")
    for sample, found in zip(asked[:4], together, strict=False):
        own = _own_probabilities(plain.eval(), load_processor(config), encoder, sample)
        np.testing.assert_allclose(found, own, atol=2e-4)
        np.testing.assert_allclose(
            own_probabilities(plain, encoder, [sample])[0], own, atol=2e-4
        )  # exports are held so
    assert max(abs(together[0] - together[1])) > 1e-3  # the picture counts
    alone = [Scorer(LabelScorer(base), encoder).probabilities([sample])[0] for sample in asked]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_5_vl", "gemma3", "paligemma"])
def test_mixed_batches_write_about_images_what_the_model_writes_alone(
    folders: dict[str, BaseModelConfig], kind: str
) -> None:
    config = folders[kind]
    encoder: Any = sample_encoder(config, [SAID])
    together = Scorer(LabelScorer(load_base(config)), encoder).texts(samples(SAID))
    plain: Any = AutoModelForImageTextToText.from_pretrained(config.base, dtype=torch.float32).eval()
    processor, end = load_processor(config), encoder.tokenizer.eos_token_id
    for sample, found in zip(samples(SAID), together, strict=True):
        made = processor(
            text=f"{encoder.mark}{sample.fields['text']}:", images=decoded(sample.image or b""), return_tensors="pt"
        )
        made.pop("labels", None)
        row = plain.generate(**made, do_sample=False, max_new_tokens=4, eos_token_id=end, pad_token_id=end)
        assert found == encoder.tokenizer.decode(row[0, made["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_a_picture_stands_once_for_all_questions_and_words_about_it(folders: dict[str, BaseModelConfig]) -> None:
    encoder: Any = sample_encoder(folders["llava"], [SEEN])
    first, other, again, _ = encoder.encode(samples())
    pixels = first.image.end
    assert len(pack([first]).images) == 1
    both = pack([first, again])
    assert len(both.images) == 1
    assert len(both.input_ids) == len(pack([first]).input_ids) + len(pack([again]).input_ids) - pixels
    apart = pack([first, other])
    assert len(apart.images) == 2
    assert len(apart.input_ids) == len(pack([first]).input_ids) + len(pack([other]).input_ids)


def test_an_adapter_learns_images_and_texts_and_leaves_the_vision_tower(folders: dict[str, BaseModelConfig]) -> None:
    for kind in ("llava", "fast_vlm", "qwen3_vl"):
        config = folders[kind]
        base: Any = load_base(config)
        adapted = build_adapter(AdapterConfig(r=2), base, ["seen", "read"])
        assert all(".language_model." in f".{path}" for path in adapted.adapted_layers())
        before = {name: t.clone() for name, t in base.state_dict().items() if "vision" in name or "visual" in name}
        encoder = sample_encoder(config, [SEEN, READ])
        batch = pack(encoder.encode(samples() + samples(READ)))
        scorer = class_scorer(adapted)
        adapted.train()
        label_loss(scorer(batch), batch).sum().backward()
        assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert any(p.grad is not None and bool(p.grad.any()) for p in trained)


def test_an_adapter_outside_of_what_reads_text_is_refused(folders: dict[str, BaseModelConfig]) -> None:
    outside = AdapterConfig(r=2, target_modules=r"model\.vision_tower\..*\.v_proj")
    with pytest.raises(InputError, match=r"in adapter\.parts and nowhere else, got vision for language"):
        build_adapter(outside, load_base(folders["llava"]), ["seen"])
    extras = AdapterConfig(r=2, bias="all", train_layer_norms=True)
    found = build_adapter(extras, load_base(folders["llava"]), ["seen"]).extra_parameter_names
    assert found and all(name.startswith("model.language_model.") for name in found)


def test_a_task_with_images_on_a_base_of_texts_is_refused_before_anything_else(
    tmp_path: Path, folders: dict[str, BaseModelConfig]
) -> None:
    config = BaseModelConfig(base=str(tiny_folder(tmp_path / "llama", "llama")), max_length=64)
    with pytest.raises(InputError, match="needs an image-text model with its processor as model"):
        check_base(config, [READ, SEEN])
    with pytest.raises(InputError, match="reads prompts both ways, got the task 'read'"):
        check_base(folders["paligemma"], [READ, SEEN])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "has an image, sample seen/seen0 has none"),
        ({"image": b"\x89PNG"}, "sample seen/seen0 image cannot be decoded; run prepare again"),
        ({"fields": {"text": "see <image> there"}}, "must not hold the mark of an image, '<image>'"),
    ],
)
def test_a_sample_that_cannot_be_shown_is_refused(
    folders: dict[str, BaseModelConfig], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sample_encoder(folders["llava"], [SEEN]).encode([samples()[0].model_copy(update=change)])


def test_a_long_question_loses_its_end_and_never_the_picture(folders: dict[str, BaseModelConfig]) -> None:
    config = folders["llava"].model_copy(update={"max_length": 40})
    long = samples()[0].model_copy(update={"fields": {"text": "word " * 50}})
    (example,) = sample_encoder(config, [SEEN]).encode([long])
    assert example.num_tokens <= 40
    (short,) = sample_encoder(config, [SEEN]).encode(samples()[:1])
    assert example.image is not None  # type: ignore[union-attr]
    assert example.image.end == short.image.end  # type: ignore[union-attr]


def test_the_image_stands_where_the_template_has_its_mark(folders: dict[str, BaseModelConfig]) -> None:
    task = SEEN.model_copy(update={"template": "look: <image> {text} is:"})
    (example,) = sample_encoder(folders["llava"], [task]).encode(samples()[:1])
    first = sample_encoder(folders["llava"], [SEEN]).encode(samples()[:1])[0].image.end  # type: ignore[union-attr]
    assert example.image.end > first  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_base_that_is_saved_anew_keeps_its_processor(
    tmp_path: Path, folders: dict[str, BaseModelConfig], kind: str
) -> None:
    config = folders[kind]
    load_base(config).save_pretrained(tmp_path)  # type: ignore[operator]
    save_text_side(config, tmp_path)
    moved = config.model_copy(update={"base": str(tmp_path)})
    one, other = (Scorer(LabelScorer(load_base(c)), sample_encoder(c, [SEEN])) for c in (config, moved))
    np.testing.assert_allclose(one.probabilities(samples()), other.probabilities(samples()), atol=1e-6)


def test_rows_of_a_table_bring_their_images_as_bytes_or_base64(folders: dict[str, BaseModelConfig]) -> None:
    import base64

    config = folders["llava"]
    scorer = Scorer(LabelScorer(load_base(config)), sample_encoder(config, [SEEN, READ]))
    predictor = Predictor(PredictorSpec(tasks=(SEEN, READ), base=config), scorer)
    image = picture(0)
    coded = base64.b64encode(image).decode()
    rows = [
        {"task": "seen", "text": "it", "image": given} for given in (image, coded, f"data:image/png;base64,{coded}")
    ]
    found = predictor.predict(pd.DataFrame([*rows, {"task": "read", "text": "it"}]))
    np.testing.assert_allclose(found.probabilities[0], scorer.probabilities(samples()[:1])[0])
    assert list(found.probabilities[0]) == list(found.probabilities[1]) == list(found.probabilities[2])
    for bad, reason in ((None, "image 'image' is missing"), ("a/b.png", "neither bytes nor base64"),
                        (image[:60], "cannot be decoded")):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            predictor.predict(pd.DataFrame([{"task": "seen", "text": "it", "image": bad}]))


def test_a_jpeg_turned_by_exif_is_read_as_it_is_seen(folders: dict[str, BaseModelConfig]) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 8
    upright = decoded(picture(3))
    upright.rotate(-90, expand=True).save(buffer, "PNG", exif=exif)
    encoder = sample_encoder(folders["llava"], [SEEN])
    one, other = encoder.encode(
        [samples()[0].model_copy(update={"image": data}) for data in (picture(3), buffer.getvalue())]
    )
    assert torch.equal(one.image.tensors["pixel_values"], other.image.tensors["pixel_values"])  # type: ignore[union-attr]
