"""Runs inside AdapterHub's own environment; prints seconds a round of one training step, ours and theirs, as JSON.

Both adapt q, k, v of the same small Llama with r = 8, n = 3, a diagonal transform (their full one does not start),
8 tasks mixed, dropout 0.05.
"""

import copy
import json
import sys

import adapters
import torch
import transformers
from adapters import MTLLoRAConfig as TheirConfig
from adapters.composition import MultiTask

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.model import MTLLoRAModel
from tests.benchmarks.rivals import ALPHA, RANK, TASK_NAMES, TASKS, UPS
from tests.benchmarks.timing import interleaved

BATCH, SEQUENCE = 16, 32


def _theirs(base):
    adapters.init(base)
    config = TheirConfig(
        r=RANK, alpha=ALPHA, dropout=0.05, n_up_projection=UPS, weights_sharpness=0.1, attn_matrices=["q", "k", "v"]
    )
    for name in TASK_NAMES:
        base.add_adapter(name, config)
    base.share_parameters(adapter_names=TASK_NAMES)
    base.active_adapters = MultiTask(*TASK_NAMES)
    base.train_adapter(MultiTask(*TASK_NAMES))
    return base


def _step(model, tokens, ids):
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run():
        hidden = model(input_ids=tokens, task_ids=ids, use_cache=False).last_hidden_state
        hidden[:, -1].square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    return run


def main() -> None:
    """Time both and print the result."""
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    base = transformers.LlamaModel(config)
    ours = MTLLoRAModel(
        copy.deepcopy(base),
        MTLLoRAConfig(
            TASK_NAMES, r=RANK, lora_alpha=ALPHA, transform="diagonal", target_modules=["q_proj", "k_proj", "v_proj"]
        ),
    )
    tokens, ids = torch.randint(1000, (BATCH, SEQUENCE)), torch.arange(BATCH) % TASKS
    steps = {"mtl_lora": _step(ours.train(), tokens, ids), "adapterhub": _step(_theirs(base).train(), tokens, ids)}
    seconds = interleaved(steps, rounds=20)
    versions = {"adapters": adapters.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
