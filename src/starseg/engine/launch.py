"""Setup of devices, precision and processes with lightning-fabric."""

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
from starseg.utils.precision import is_bf16_fast

__getattr__ = old_names(__name__)

logging.getLogger("lightning_fabric.utilities.distributed").setLevel(logging.WARNING)
# Suppresses the advice, on every GPU with TF32, to use it for matrix products.
logging.getLogger("lightning_fabric.utilities.rank_zero").addFilter(
    lambda record: "set_float32_matmul_precision" not in record.getMessage()
)
# The replacement, forward_sync_buffers, does not exist in the oldest supported releases of torch.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")


def _auto_precision(cuda: bool) -> str:
    if is_bf16_fast(torch.device("cuda" if cuda else "cpu")):
        return "bf16-mixed"
    return "16-mixed" if cuda else "32"


def is_leader() -> bool:
    """Return whether this is the process that prints and writes files."""
    return rank_zero_only.rank in (0, None)  # type: ignore[attr-defined]


def check_world_size(config: TrainConfig) -> None:
    """Check that torchrun or SLURM, if used, started the configured number of processes.

    Raises:
        UserError: it started more, which would train independently of each other, or fewer.
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
    """Return the configuration for a single process, as used outside training."""
    return config.model_copy(update={"devices": 1, "num_nodes": 1})


def make_fabric(config: TrainConfig) -> Fabric:
    """Create a Fabric for the configured devices and processes, without launching it.

    Raises:
        UserError: fewer GPUs are available than requested.
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
    # Convolutions in float32 (as in every evaluation and in the statistics) must not use TF32.
    torch.backends.cudnn.allow_tf32 = False
    if "SLURM_NTASKS" in os.environ:
        # Fabric rejects `srun --ntasks` without this variable.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(config.devices))
    precision = _auto_precision(cuda) if config.precision == "auto" else config.precision
    several = config.devices * config.num_nodes > 1
    return Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=config.devices,
        num_nodes=config.num_nodes,
        # Buffers are averaged once, after the training of a step (`average_buffers`).
        strategy=DDPStrategy(broadcast_buffers=False) if several else "auto",
        precision=precision,  # type: ignore[arg-type]
    )


def refuse_without_compiler(device: torch.device) -> None:
    """Check that torch.compile can be used on a device.

    Raises:
        UserError: the compiler that torch.compile needs is not installed.
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
    """Differentiable sum over processes, each of which then computes the same loss from the sum.

    The gradient with respect to a process's own summand is multiplied by the number of processes, because the strategy
    averages parameter gradients over processes instead of summing them.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, fabric: Fabric) -> Tensor:
        ctx.world = fabric.world_size
        total = values.detach().clone()
        torch.distributed.all_reduce(total)  # Fabric's all_reduce begins with a barrier, which stalls the GPU.
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.world, None


def make_all_reduce_sum(fabric: Fabric) -> Callable[[Tensor], Tensor]:
    """Return a function that sums a tensor over the processes of ``fabric``, with gradients; see `StepContext`."""
    return lambda values: values if fabric.world_size == 1 else _Sum.apply(values, fabric)


def average_buffers(model: torch.nn.Module, fabric: Fabric) -> None:
    """Average floating-point buffers (batch-norm statistics) over processes, in place."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(fabric.all_reduce(buffer.clone(), reduce_op="mean"))  # type: ignore[arg-type]


def synchronise_norm(model: Segmenter, fabric: Fabric) -> None:
    """Synchronise batch norms in training mode over processes, if these train on GPUs."""
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, _BatchNorm) and child.training:
                    setattr(parent, name, convert_sync_batchnorm(child))
        model.fuse_batch_norm()
