"""Former names of modules, classes and functions, which keep working for one version with a DeprecationWarning.

Imports of a module that no longer exists are handled by :class:`_OldModules`, a finder that Python consults only after
every other one has failed. A module that still exists but has lost a name contains the line
``__getattr__ = old_names(__name__)``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "app": ("inference.app",),
    "bce": ("ops.upsampled_bce",),
    "bench_data": ("bench.data",),
    "bench_dense": ("bench.reference",),
    "bench_eval": ("bench.evaluation",),
    "bench_step": ("bench.step",),
    "bilinear": ("ops.bilinear",),
    "cli_help": ("cli.help",),
    "compare": ("experiments.compare",),
    "contract.rehearsal": ("contract.harness",),
    "data.ade20k": ("data.datasets.ade20k",),
    "data.check": ("report.data_check",),
    "data.classlist": ("data.annotations.classlist",),
    "data.coco": ("data.annotations.coco",),
    "data.dataset": ("data.datasets", "data.datasets.base"),
    "data.files": ("data.images",),
    "data.folder": ("data.datasets.folder", "data.annotations.photos"),
    "data.labelme": ("data.annotations.labelme",),
    "data.loading": ("data.loader",),
    "data.step": ("data.samples", "data.selection"),
    "data.voc": ("data.datasets.voc",),
    "demo": ("experiments.demo",),
    "distill": ("losses.distillation",),
    "engine.clock": ("utils.clock",),
    "engine.data": ("engine.run_data",),
    "engine.progress": ("utils.progress",),
    "engine.resume": ("engine.state", "engine.guard"),
    "export": ("inference.onnx",),
    "hub": ("inference.hub",),
    "learn": ("finetuning.run",),
    "lesson": ("finetuning.prepare",),
    "machine": ("utils.machine",),
    "methods.base": ("methods.protocol", "methods.sigmoid", "methods.legacy"),
    "models.backbones": ("models.encoders",),
    "models.heads": ("models.classifiers",),
    "models.lean": ("ops.fused_layers",),
    "predict": ("inference.predictor",),
    "predict_files": ("inference.files",),
    "pseudo": ("losses.pseudo_labels",),
    "report.learning": ("finetuning.preview",),
    "schedule": ("finetuning.defaults",),
}
"""Modules that no longer exist, and the modules that now contain their names; all relative to ``starseg``."""

RENAMED: dict[str, dict[str, str]] = {
    "bench": {
        "bench": "bench.suite:bench",
        **{name: f"bench.run:{name}" for name in ("LossPath", "loss_cases", "measure_loss")},
        **{name: f"bench.timing:{name}" for name in ("alternate", "peak_bytes")},
    },
    "bench_dense": {"literal": "bench.reference:unfused"},
    "bilinear": {
        "split_classes": "ops.bilinear:channel_chunks",
        "thin": "ops.bilinear:subsample_to_support",
        "resize_thin": "ops.bilinear:resize_at_support",
        "lines_looked_at": "ops.bilinear:support_indices",
    },
    "contract": {"Rehearsal": "contract.harness:MethodHarness"},
    "contract.rehearsal": {"Rehearsal": "contract.harness:MethodHarness"},
    "data.folder": {"refuse_twins": "data.annotations.photos:check_unique_stems"},
    "data.index": {"count_ids": "data.index:pixels_per_id"},
    "data.loading": {"Loading": "data.loader:PersistentLoader", "Pass": "data.loader:LoaderEpoch"},
    "data.step": {"Request": "data.samples:SampleRequest", "saliency_map": "data.samples:extra_map"},
    "data.transforms": {"test_transform": "data.transforms:eval_transform"},
    "engine.checkpoint": {name: f"utils.files:{name}" for name in ("read_json", "write_atomic", "write_json")},
    "engine.data": {"Data": "engine.run_data:RunData"},
    "engine.resume": {"every_process": "engine.state:process_states"},
    "engine.launch": {
        "adder": "engine.launch:make_all_reduce_sum",
        "refuse_other_number": "engine.launch:check_world_size",
    },
    "lesson": {
        "Lesson": "finetuning.prepare:PreparedStep",
        "Request": "finetuning.prepare:LearnRequest",
        "Source": "finetuning.prepare:SourceStep",
        "open_source": "finetuning.prepare:open_source_step",
        "read_lesson": "finetuning.prepare:prepare_step",
    },
    "losses": {
        "AddUp": "losses.reduction:AllReduceSum",
        "alone": "losses.reduction:identity",
        **{name: f"losses.star:{name}" for name in ("mix", "mixed_bce", "ocfm", "sad", "uncertainty", "top_two")},
        "background_cells": "losses.star:background_cells",
    },
    "methods.base": {"Phase": "methods.recipes:StepSchedule"},
    "models.backbones": {
        "make_backbone": "models.encoders:make_encoder",
        "load_backbone_weights": "models.encoders:load_encoder_weights",
    },
    "methods.softmax": {"Softmax": "methods.softmax:SoftmaxMethod"},
    "models.lean": {"lighten": "ops.fused_layers:fuse_batch_norm"},
    "models.segmenter": {
        "Aspp": "models.decoders:Aspp",
        "LargestLogit": "models.prediction:LargestLogit",
        "predict_upsampled": "models.prediction:predict_upsampled",
    },
    "predict": {"Source": "inference.predictor:ImageSource"},
    "replay.statistics": {
        "on_grid": "replay.statistics:sample_at_stride",
        "see_old": "replay.statistics:old_model_labels",
    },
    "schedule": {"Phase": "finetuning.defaults:FolderSchedule"},
}
"""Renamed or moved names by former module, and their new places ``module:name``; all relative to ``starseg``."""

_PACKAGE = "starseg."


def install() -> None:
    """Make the former modules importable; their replacements are loaded only when a name is requested."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def old_names(module: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module from which names were moved, or in which names were changed.

    Args:
        module: full name of the module, ``__name__``.
    """
    table = RENAMED[module.removeprefix(_PACKAGE)]

    def __getattr__(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return _renamed(module, name, table[name])

    return __getattr__


def _renamed(module: str, name: str, place: str) -> Any:
    home, new = place.split(":")
    warnings.warn(f"{module}.{name} is now {_PACKAGE}{home}.{new}", DeprecationWarning, stacklevel=3)
    return getattr(import_module(_PACKAGE + home), new)


class _OldModules(MetaPathFinder, Loader):
    """Finder and loader of the modules in :data:`MOVED`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        known = name.startswith(_PACKAGE) and name.removeprefix(_PACKAGE) in MOVED
        return ModuleSpec(name, self) if known else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module a ``__getattr__`` that looks up names in their new places."""
        full = module.__name__
        old = full.removeprefix(_PACKAGE)
        homes, table = [_PACKAGE + home for home in MOVED[old]], RENAMED.get(old, {})
        warnings.warn(f"{full} is now {', '.join(homes)}", DeprecationWarning, stacklevel=2)

        def __getattr__(name: str) -> Any:
            if name in table:
                return _renamed(full, name, table[name])
            if not name.startswith("__"):
                for home in map(import_module, homes):
                    if hasattr(home, name):
                        return getattr(home, name)
            raise AttributeError(f"module {full!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = __getattr__
