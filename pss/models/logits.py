"""Networks whose outputs hold the class scores somewhere inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn


def logits_of(model: nn.Module, select: Callable[[Any], Tensor] = attrgetter("logits")) -> nn.Module:
    """The same network with class scores as its output, for every function here that takes a model.

    A network of Hugging Face gives an object with the logits in it, one of segmentation a map for every class. What
    edits, corrects or counts mistakes needs one score for each class, and a loss gets what the network gives::

        model = pss.models.logits_of(network)                                # network(images).logits
        model = pss.models.logits_of(network, lambda out: out["out"].mean((2, 3)))

    Parameters
    ----------
    model : nn.Module
        Left as it was: its own output stays what it is.
    select : callable
        From the output to the logits (B, C); by default its attribute ``logits``.

    Returns
    -------
    nn.Module
        Of the same class, and made of the very layers and parameters of ``model``, by the same names: units, references
        and patches of one are those of the other, and an edit of one edits the other.
    """
    same = copy.copy(model)
    same._forward_hooks = model._forward_hooks.copy()  # otherwise the hook would be the model's too
    same.register_forward_hook(lambda module, inputs, output: select(output))
    return same
