"""A record of named tensors that can be stored in a file and moved between devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance as _Base
else:
    _Base = object

R = TypeVar("R", bound="TensorRecord")


class TensorRecord(_Base):
    """Base class of dataclasses whose fields are tensors."""

    @property
    def nbytes(self) -> int:
        """Size of the stored numbers in bytes."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, as stored in bank.safetensors."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        """Return whether a mapping has all tensors of the record."""
        return all(f.name in state for f in fields(cls))

    @classmethod
    def from_state_dict(cls: type[R], state: Mapping[str, Tensor]) -> R:
        """Return a record with copies of the tensors that :meth:`state_dict` returned."""
        values: dict[str, Any] = {f.name: state[f.name].clone() for f in fields(cls)}
        return cls(**values)

    def to(self: R, device: torch.device) -> R:
        """Return the record on a device."""
        return type(self)(**{name: value.to(device) for name, value in self.state_dict().items()})
