"""Devices, precision and processes, through lightning-fabric."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from lightning_fabric.utilities.rank_zero import rank_zero_only
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from starseg.config import TrainConfig
from starseg.errors import UserError
from starseg.models import Segmenter
from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)

logging.getLogger("lightning_fabric.utilities.distributed").setLevel(logging.WARNING)
# Advice, on every GPU that has TF32, to take it for matrix products.
logging.getLogger("lightning_fabric.utilities.rank_zero").addFilter(
    lambda record: "set_float32_matmul_precision" not in record.getMessage()
)
# Its successor, forward_sync_buffers, is not in the older releases of torch that we support.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")


def _auto_precision(cuda: bool) -> str:
    if cuda:
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "32"


def is_leader() -> bool:
    """Whether this is the process that prints and writes."""
    return rank_zero_only.rank in (0, None)  # type: ignore[attr-defined]


def check_world_size(config: TrainConfig) -> None:
    """Compare the processes that torchrun or SLURM started with the configured ones.

    Raises:
        UserError: there are more, which would train past each other, or fewer.
    """
    world = config.devices * config.num_nodes
    for launcher, environment in (("torchrun", TorchElasticEnvironment), ("SLURM", SLURMEnvironment)):
        if environment.detect():
            started = int(os.environ["WORLD_SIZE" if launcher == "torchrun" else "SLURM_NTASKS"])
            if started != world:
                raise UserError(
                    f"{launcher} started {started} processes, but train.devices ({config.devices}) times "
                    f"train.num_nodes ({config.num_nodes}) is {world}; give --devices as many as run on each node, and "
                    "--num-nodes (inside a SLURM job, start them with srun)"
                )
            return


def single_process(config: TrainConfig) -> TrainConfig:
    """Return the configuration for a single process, as needed to inspect a run."""
    return config.model_copy(update={"devices": 1, "num_nodes": 1})


def make_fabric(config: TrainConfig) -> Fabric:
    """Create the Fabric of the configured devices and processes, not launched yet.

    Raises:
        UserError: a GPU is asked for and there is none, or fewer than asked for.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.accelerator == "gpu" and not available:
        raise UserError("train.accelerator: gpu is asked for, but torch sees none; use cpu or auto")
    cuda = config.accelerator != "cpu" and available > 0
    if cuda and config.devices > available:
        raise UserError(f"train.devices: {config.devices} GPUs are asked for, torch sees {available}")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    # What is computed in float32 (evaluation and statistics always) is so in convolutions too.
    torch.backends.cudnn.allow_tf32 = False
    if "SLURM_NTASKS" in os.environ:
        # Fabric refuses `srun --ntasks` without it.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(config.devices))
    precision = _auto_precision(cuda) if config.precision == "auto" else config.precision
    several = config.devices * config.num_nodes > 1
    return Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=config.devices,
        num_nodes=config.num_nodes,
        # Buffers are averaged once, when a step has trained (`average_buffers`).
        strategy=DDPStrategy(broadcast_buffers=False) if several else "auto",
        precision=precision,  # type: ignore[arg-type]
    )


def refuse_without_compiler(device: torch.device) -> None:
    """Refuse `train.compile` without a compiler.

    Raises:
        UserError: torch.compile lacks what it needs for the device.
    """
    needed = "triton" if device.type == "cuda" else os.environ.get("CXX", "g++")
    there = importlib.util.find_spec(needed) if device.type == "cuda" else shutil.which(needed)
    if not there:
        kind = "package" if device.type == "cuda" else "C++ compiler"
        raise UserError(
            f"train.compile: torch.compile needs the {kind} {needed}, which is not installed; "
            "install it, or leave train.compile out"
        )


class _Sum(torch.autograd.Function):
    """Sum over processes, each of which then computes the same loss from it.

    The gradient that reaches a process's own summand is the loss's, times the number of processes, because the
    strategy averages parameter gradients over processes where the sum is meant.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, fabric: Fabric) -> Tensor:
        ctx.world = fabric.world_size
        total = values.detach().clone()
        torch.distributed.all_reduce(total)  # Fabric's own begins with a barrier, which makes a GPU's queue run dry.
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.world, None


def make_all_reduce_sum(fabric: Fabric) -> Callable[[Tensor], Tensor]:
    """Return a differentiable sum over the processes of ``fabric``; see :class:`StepContext`."""
    return lambda values: values if fabric.world_size == 1 else _Sum.apply(values, fabric)


def average_buffers(model: torch.nn.Module, fabric: Fabric) -> None:
    """Average floating-point buffers (statistics of batch norm) over processes."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(fabric.all_reduce(buffer.clone(), reduce_op="mean"))  # type: ignore[arg-type]


def synchronise_norm(model: Segmenter, fabric: Fabric) -> None:
    """Synchronise batch norms in train mode over processes that train on GPUs."""
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, _BatchNorm) and child.training:
                    setattr(parent, name, convert_sync_batchnorm(child))
        model.fuse_batch_norm()
