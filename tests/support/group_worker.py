"""A process of a group that trains an emitted layer; imported by the processes it is run in."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from convgen.execution.loading import load_module


def step(rank: int, port: int, path: str, results: str) -> None:
    """Take one step of training in a process of a group, on a sample of its own."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    text = Path(path).read_text(encoding="utf-8")
    module = load_module(text, f"of_rank_{rank}", Path(path).parent)
    torch.manual_seed(rank)  # DDP gives all processes the weights of the first
    model = nn.parallel.DistributedDataParallel(module.ModelNew())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(sample(rank)).square().sum().backward()
    optimizer.step()
    torch.save(model.module.state_dict(), f"{results}.{rank}")
    torch.distributed.destroy_process_group()


def sample(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank + 10)
    return torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)
