"""Train methods on a simulated device other than the CPU: another_device.py DATA OUT NAMES...

The device computes on the CPU but, like a GPU, refuses what mixes its tensors or random generators with the CPU's.
"""

import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from starseg import load
from starseg.config import TrainConfig
from starseg.contract import check_resume, check_run
from starseg.report.page import render_page

NAME = "other"
aten = torch.ops.aten
_BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default}
_BY_INDICES_ON_EITHER = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
_Generator = torch.Generator


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class Elsewhere(Tensor):
    """A tensor of the device; ``inner`` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        self.inner = inner
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:  # files are read with map_location="cpu"
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on inner tensors; what it gives is on the device that it would be on."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    if func is aten._has_compatible_shallow_copy_type.default:
        return False
    if there and func not in _BETWEEN_DEVICES:
        looked_at = tensors[:1] if func in _BY_INDICES_ON_EITHER and isinstance(args[0], Elsewhere) else tensors
        if any(tensor.dim() and not isinstance(tensor, Elsewhere) for tensor in looked_at):
            raise RuntimeError(f"{func}: on two devices: {[(*t.shape, str(t.device)) for t in tensors]}")
    target, named = kwargs.get("device"), kwargs.get("device") is not None
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    given = func(*args, **kwargs | ({"device": "cpu"} if named else {}))
    if func is aten.copy_.default and not isinstance(tensors[0], Elsewhere):
        return tensors[0]
    if not (_is_there(target) if named else there):
        return given
    changed = {id(tensor.inner): tensor for tensor in there}
    return tree_map(
        lambda x: changed[id(x)] if id(x) in changed else Elsewhere(x) if isinstance(x, Tensor) else x, given
    )


class Operators(TorchDispatchMode):
    """Those that get no tensor of the device, and may make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What operators do not see: where generators are from, and tensors made of Python's numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if generator is not None:
            there = _is_there(device) if device else any(isinstance(x, Elsewhere) for x in (*args, *kwargs.values()))
            if there != isinstance(generator, GeneratorElsewhere):
                raise RuntimeError(f"{func}: a generator of another device")
        if func in (torch.tensor, torch.as_tensor) and _is_there(device):
            return func(*args, **kwargs | {"device": "cpu"}).to(NAME)
        return func(*args, **kwargs)


class GeneratorElsewhere(_Generator):
    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)


def _generator(device: Any = "cpu") -> torch.Generator:
    return GeneratorElsewhere() if _is_there(device) else _Generator(device)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Any will do."""


def _fabric(config: TrainConfig) -> Fabric:
    strategy = SingleDeviceStrategy(device=torch.device(NAME, 0), accelerator=_Accelerator())
    return Fabric(strategy=strategy, precision="32")


def _refuses_mixtures() -> None:
    here, there = torch.ones(2), torch.ones(2, device=NAME)
    for mixed in (lambda: there + here, lambda: torch.rand(2, device=NAME, generator=torch.Generator())):
        with suppress(RuntimeError):
            mixed()
            raise AssertionError("this device takes what a GPU refuses")


def _use(run: Path) -> None:
    model = load(max(run.glob("step_*")), device=NAME)
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    for options in ({}, {"window": True}, {"flip": True, "scales": (0.75, 1.0)}):
        model.predict(image, **options)
    render_page([run])


def main() -> None:
    data, out, *names = sys.argv[1:]
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    with ExitStack() as stack:
        stack.enter_context(patch("torch.Generator", _generator))
        for module in ("engine.setup", "engine.evaluate", "report.testset"):
            stack.enter_context(patch(f"starseg.{module}.make_fabric", _fabric))
        stack.enter_context(Functions())
        stack.enter_context(Operators())
        _refuses_mixtures()
        for name in names:
            folder = Path(out) / name
            check_run(name, Path(data), folder / "run")
            check_resume(name, Path(data), folder)
            _use(folder / "run")


if __name__ == "__main__":
    main()
