"""Detection of operations that make Python wait for a GPU, on a machine without one."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Records operations that synchronise with a GPU: results read by Python, and numbers copied from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or name in ("_local_scalar_dense", "nonzero", "repeat_interleave", "masked_select", "lift_fresh"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))
