"""One of two ranks: trains a small model under each ZeRO stage and compares it with one process on the joint batch.

Run by test_zero.py with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; rank 0 prints one JSON document: for each
case the largest difference of any trainable parameter after two steps of SGD with momentum.
"""

import copy
import json
import os
import sys

import deepspeed
import torch
import torch.distributed as dist

from mtl_lora import MTLLoRAModel, build_adapter
from tests.mtl_lora.conftest import Stack

TASKS = ["a", "b", "c", "d", "never seen"]
SPLITS = {
    "same tasks": [[0, 1, 2, 3], [3, 2, 1, 0]],
    "different tasks": [[0, 0, 1, 1], [2, 2, 3, 3]],
    "one task a rank": [[0, 0, 0, 0], [3, 3, 3, 3]],
}
ROWS = 4


def _model(method: str, checkpointing: str | None) -> MTLLoRAModel:
    torch.manual_seed(0)
    base = Stack(width=8, checkpointing=checkpointing)
    model = build_adapter(
        method, base, TASKS, r=2, num_up_projections=2, lora_dropout=0.0, temperature=0.7, target_modules="all-linear"
    )
    with torch.no_grad():
        for layer in model.adapted_layers().values():
            for parameter in layer.adapter_parameters().values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


def _loss(outputs):
    return outputs.square().mean(dim=(1, 2)).mean()


def _one_process(model, batches, ids):
    optimizer = _optimizer(model)
    for x in batches:
        optimizer.zero_grad()
        _loss(model(x, task_ids=torch.tensor([i for part in ids for i in part]))).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}


def _two_ranks(model, batches, ids, stage, rank):
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = _optimizer(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, optimizer=optimizer, config=config)
    own = torch.tensor(ids[rank])
    for x in batches:
        rows = x[rank * ROWS : (rank + 1) * ROWS]
        engine.backward(_loss(engine(rows, task_ids=own)))
        engine.step()
    adapter = [p for layer in model.adapted_layers().values() for p in layer.adapter_parameters().values()]
    with deepspeed.zero.GatheredParameters(adapter if stage == 3 else []):
        return {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}


def main() -> None:
    """Run all cases on this rank."""
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # serves inference only, and compiles for a minute
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    rank = dist.get_rank()
    cases = [("mtl_lora", split, kind, stage) for stage in range(4) for split in SPLITS for kind in [None]]
    cases += [("mtl_lora", "different tasks", kind, s) for s in range(4) for kind in ("reentrant", "not_reentrant")]
    cases += [("moelora", "different tasks", None, stage) for stage in (1, 2, 3)]
    results = []
    for method, split, kind, stage in cases:
        model = _model(method, kind)
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randn(2 * ROWS, 3, 8, generator=generator).requires_grad_() for _ in range(2)]
        start = {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}
        expected = _one_process(copy.deepcopy(model), batches, SPLITS[split])
        got = _two_ranks(model, batches, SPLITS[split], stage, rank)
        difference = max(float((got[name] - expected[name]).abs().max()) for name in expected)
        moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
        unseen = all(
            torch.equal(got[name][4], start[name][4]) for name in got if name.endswith(("transform", "mixing"))
        )
        results.append([f"{method}, {split}, {kind}, stage {stage}", difference, moved, unseen])
    if rank == 0:
        print(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter's own end now and then aborts: a C++ thread that waits for its lock is unwound by force.
    os._exit(0)


if __name__ == "__main__":
    main()
