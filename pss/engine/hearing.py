"""The outputs of layers, kept for what is asked of them: what a unit says, or what it gains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pss.engine.calls import LayerCall
from pss.engine.folding import NORMALIZATIONS
from pss.engine.kernels import Convolution

_LAYER_NORMS = {F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm}
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

    def follow(self, function, run, input: Tensor, *args, **kwargs):
        """Run a function, in the form given, and remember what it does to an output that it may have been handed.

        Where values are cut off in place, the gradient is zero, so that they may be. What is added in place is taken
        off again. After a normalization an output is heard instead of before it.
        """
        call = self.calls.get(input.data_ptr())
        if call is None or call.kept._version != call.version:
            return run(input, *args, **kwargs)
        term = _term(call, input, *args, **kwargs) if function in _ADDING and not self.listens else None
        result = run(input, *args, **kwargs)
        if function in _CUTTING or term is not None:
            call.added, call.version = term or call.added, call.kept._version
        elif function not in _ADDING and call.kept.shape == result.shape and call.scale is None:  # not normalized yet
            self._hear(call, result)
        return result

    def _hear(self, call: LayerCall, output: Tensor) -> None:
        if self.listens:
            positions = isinstance(call.layer, Convolution)
            self.heard[call] = output.detach().flatten(2).mean(2) if positions else output.detach().clone()


def _term(call: LayerCall, input: Tensor, other, *options, **more) -> tuple[Tensor, int] | None:
    """What is added, and its version before, which is another one afterwards if it is the output itself."""
    if options or more or not isinstance(other, Tensor) or call.added is not None:
        return None
    alike = len({(t.shape, t.dtype) for t in (call.kept, input, other)}) == 1 and input.stride() == call.kept.stride()
    return (other.detach(), other._version) if alike else None
