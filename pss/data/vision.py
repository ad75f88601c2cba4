"""Import torchvision, also beside a CPU-only torch whose torchvision build targets CUDA.

Such a torchvision cannot load its compiled operators and fails on import, because it registers
fake (shape-only) kernels for operators that then do not exist. PSS uses none of them, so declaring the two
missing operator schemas lets models, transforms and data sets load. Every module of PSS that needs
torchvision imports it after this one.
"""

import torch

# A Library object must outlive the operators that it declares.
_declared = None

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
