"""The outputs of layers, kept for what is asked of them: what a unit says, or what it gains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pss.engine.calls import LayerCall
from pss.engine.folding import NORMALIZATIONS
from pss.engine.kernels import Convolution

_LAYER_NORMS = {F.group_norm, F.layer_norm, F.rms_norm, torch.group_norm, torch.layer_norm, torch.rms_norm}
_CUTTING = {F.relu, F.relu6, F.hardtanh, F.relu_, F.hardtanh_, torch.relu, torch.relu_, Tensor.relu_}
_ADDING = {Tensor.add_, Tensor.__iadd__}
FOLLOWED = _LAYER_NORMS | NORMALIZATIONS.keys() | _CUTTING | _ADDING


class KeptOutputs:
    """Outputs by the calls that gave them, and by their place in memory; where it ``listens``, what they say."""

    def __init__(self, listens: bool):
        self.listens = listens
        self.calls: dict[int, LayerCall] = {}
        self.heard: dict[LayerCall, Tensor] = {}  # outputs, of convolutions their means over positions

    def keep(self, call: LayerCall, output: Tensor) -> None:
        """Keep an output: no copy, and it sees what is written into it."""
        call.kept, call.version = output.detach(), output._version
        self.calls[output.data_ptr()] = call
        self._hear(call, output)

    def use(self, function, args, kwargs) -> None:
        """Know which outputs are used, but for those that values are cut off or something is added to."""
        own = (*args, *kwargs.values())[:1] if function in _CUTTING | _ADDING else ()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and all(tensor is not t for t in own):
                call = self.calls.get(tensor.data_ptr())
                if call is not None:
                    call.used = True

    def follow(self, function, run, input: Tensor, *args, **kwargs):
        """Run a function, in the form given, and remember what it does to an output that it may have been handed.

        Where values are cut off in place, the gradient is zero, so that they may be, if nothing else used the output
        before. What is added in place is taken off again. After a normalization, also of a view, an output is heard
        instead of before it.
        """
        call = self.calls.get(input.data_ptr())
        if call is None or call.kept._version != call.version:
            return run(input, *args, **kwargs)
        term = _term(call, input, *args, **kwargs) if function in _ADDING and not self.listens else None
        result = run(input, *args, **kwargs)
        if function in _CUTTING and call.kept._version == call.version:
            call.used = True
        elif (function in _CUTTING and not call.used) or term is not None:
            call.added, call.version = term or call.added, call.kept._version
        elif function not in _ADDING | _CUTTING and self.listens and not call.is_normalized:
            self._hear(call, _laid_as(call.kept, input, result))
        return result

    def _hear(self, call: LayerCall, output: Tensor | None) -> None:
        if self.listens and output is not None:
            positions = isinstance(call.layer, Convolution)
            self.heard[call] = output.detach().flatten(2).mean(2) if positions else output.detach().clone()


def _term(call: LayerCall, input: Tensor, other, *options, **more) -> tuple[Tensor, int] | None:
    """What is added, and its version before, which is another one afterwards if it is the output itself."""
    if options or more or not isinstance(other, Tensor) or call.added is not None:
        return None
    alike = len({(t.shape, t.dtype) for t in (call.kept, input, other)}) == 1 and input.stride() == call.kept.stride()
    return (other.detach(), other._version) if alike else None


def _laid_as(output: Tensor, view: Tensor, result: Tensor) -> Tensor | None:
    """What was made of a view of a whole output, with the shape of that output; None where it is another thing."""
    if view.numel() != output.numel() or result.shape != view.shape or 0 in view.stride():
        return None
    laid = torch.empty_strided(output.shape, output.stride(), dtype=result.dtype, device=result.device)
    laid.as_strided(view.shape, view.stride()).copy_(result.detach())
    return laid
