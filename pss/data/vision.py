"""Import torchvision: quickly, and also beside a CPU-only torch whose torchvision build targets CUDA.

On import torchvision asks whether torch's compiler works on a device, and so loads the compiler, which takes longer
than everything else together. PSS compiles nothing: a stand-in answers for it meanwhile, and loads it when asked.

A torchvision built for CUDA cannot load its compiled operators beside a CPU-only torch, and fails on import, because it
registers fake (shape-only) kernels for operators that then do not exist. PSS uses none of them, so declaring the two
missing operator schemas lets models, transforms and data sets load.

Every module of PSS that needs torchvision imports it after this one.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType

import torch

# A Library object must outlive the operators that it declares.
_declared = None


@contextmanager
def _without_compiler() -> Iterator[None]:
    """A stand-in for torch's compiler, unless that is there already."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    package, utilities = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    vars(package).update(__path__=[], utils=utilities)
    vars(utilities).update(is_compile_supported=_is_compile_supported)
    stand_ins = {module.__name__: module for module in (package, utilities)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _is_compile_supported(device: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device)


def _load() -> None:
    with suppress(ImportError, AttributeError), _without_compiler():  # another version may ask the compiler for more
        import_module("torchvision")


try:
    _load()
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _load()

import torchvision  # noqa: E402

__all__ = ["torchvision"]
