"""One process in a group of its own, by NCCL on a GPU: `one_rank.py DEVICE`. Ends with 0 where its gradients are those
without a group."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

import toys
from tetrad.distributed import collectives, watchdog
from tetrad.distributed.device import Device
from tetrad.settings.common import Optim
from tetrad.training.batches import language_micros
from tetrad.training.optimizer import Optimizer
from tetrad.training.step import language_terms, update


def trained(device: Device) -> torch.Tensor:
    model = toys.causal(seed=1).to(device.torch_device)
    optimizer = Optimizer(model, 1e-3, Optim())
    micros = language_micros(toys.documents(9), 64, device)
    stats = [update(model, optimizer, micros, language_terms, device) for _ in range(3)]
    return torch.cat([torch.tensor([s.loss for s in stats]), *(p.detach().flatten().cpu() for p in model.parameters())])


def main(kind: str) -> int:
    torch.use_deterministic_algorithms(True)
    device = Device(torch.device(kind, 0) if kind == "cuda" else torch.device(kind), torch.float32)
    alone = trained(device)
    dog = watchdog.join()
    store = PrefixStore("collectives", dog.store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=store, rank=0, world_size=1)
    collectives.BUCKET_BYTES = 4096
    together = trained(device)
    collectives.barrier()
    collectives.stop()
    return 0 if torch.equal(alone, together) else 1


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main(sys.argv[1]))
