"""The ways to gradients of each sample, and the choice between them.

=========  =====================================================================================================
``fast``   One recorded pass over the batch (`pss.engine.recorder`).
``single`` The same, one sample at a time: no slower than a loop, and it knows nothing of batches. What the recorder
           does not know how to reduce autograd computes in the same pass.
``vmap``   Gradients of whole samples, vectorized over a few.
``loop``   Gradients of whole samples by plain autograd, one after the other.
=========  =====================================================================================================

Each way returns what it could do, and why it left the rest to the next one.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pss.engine.calls import OwnGradients, Unsupported
from pss.engine.checks import shape_of
from pss.engine.folding import ExplicitNormalization
from pss.engine.locating import Locator, close
from pss.engine.recorder import GradientRecorder, Options
from pss.engine.state import is_of_the_layout, preserved

log = logging.getLogger(__name__)
GRADIENT_BYTES = 2**28  # of whole gradients that are held at once
COURSES = 64  # that are remembered of a network
Loss = Callable[[Any, Tensor], Tensor]
Columns = dict[int, Tensor]


@dataclass(frozen=True)
class Task:
    """What to compute for each sample of a batch.

    Attributes
    ----------
    model : nn.Module
    loss : callable
        ``(outputs, labels) -> (B,)``.
    check : callable
        ``(outputs, labels, rows)``: raises ValueError on outputs that the loss cannot take for so many samples.
    rows, whole : tuple of str
        Parameters of which the means of rows are enough, and the others.
    reduce : callable
        Columns of the result by number, from a parameter's name, its (absolute) gradients ``(B, *shape)``, or, for one
        of ``rows``, their means over rows ``(B, O)``, and the quantity: of ``"gain"`` it is weights times gradients.
    names : tuple of str
        Of the columns.
    in_columns : dict of str to int
        Those of ``rows`` of which it is the columns, and their number O: their means are ``(B, 1, O)``.
    options : Options
    kind : hashable
        Tells tasks apart that differ in nothing else of what decides how to compute them.
    """

    model: nn.Module
    loss: Loss
    check: Callable[[Any, Tensor, int], None]
    rows: tuple[str, ...]
    whole: tuple[str, ...]
    reduce: Callable[[str, Tensor, str], Columns] = lambda name, values, of: {}
    names: tuple[str, ...] = ()
    in_columns: dict[str, int] = field(default_factory=dict)
    options: Options = field(default_factory=Options)
    kind: Hashable = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all."""
        return self.rows + self.whole

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by name."""
        return {name: self.model.get_parameter(name) for name in names}

    def columns(self, name: str, gradients: Tensor, sizes: bool = False) -> Columns:
        """Columns of a parameter, from its gradients ``(B, *shape)``; with ``sizes`` of every term the size."""
        found: Columns = {}
        for of in self.options.of:
            if of == "gain":
                values = gradients * self.model.get_parameter(name).detach().conj()
                values = values.real if values.is_complex() else values
            else:
                values = gradients if self.options.signed else gradients.abs()
            found |= self.reduce(name, values.abs() if sizes else values, of)
        return found

    def columns_of_rows(self, name: str, means: tuple[Tensor, ...]) -> Columns:
        """Columns of a parameter, from means over its rows ``(B, O)``, of each quantity."""
        pairs = zip(self.options.of, means, strict=True)
        return {number: column for of, mean in pairs for number, column in self.reduce(name, mean, of).items()}


@dataclass
class Part:
    """Columns of the result that are known, by number; outputs and losses of the pass, if it had them."""

    columns: Columns = field(default_factory=dict)
    outputs: Any = None
    losses: Tensor | None = None

    @classmethod
    def join(cls, parts: list[Part]) -> Part:
        """Parts of a batch, one after the other."""
        whole = all(isinstance(part.outputs, Tensor) for part in parts)
        columns = {i: torch.cat([part.columns[i] for part in parts]) for i in parts[0].columns}
        tensors = (torch.cat([getattr(part, name) for part in parts]) for name in ("outputs", "losses"))
        return cls(columns, *tensors) if whole else cls(columns)


@dataclass
class Known:
    """What was found out about a network on one kind of input."""

    ways: tuple[str, ...]  # in the order in which they are tried
    fold: bool = True
    courses: dict[Hashable, list] = field(default_factory=dict)  # where the batch is in the calls of each
    plain: set[str] = field(default_factory=set)  # parameters that are used in a way the recorder does not know
    verified: bool = False

    def drop(self, way: str) -> None:
        """Do not try a way again."""
        self.ways = tuple(other for other in self.ways if other != way)


_KNOWN: WeakKeyDictionary[nn.Module, dict[Hashable, Known]] = WeakKeyDictionary()


def known_of(task: Task, images: Tensor) -> Known:
    """What is known of the task's model on such images, as long as the model lives."""
    key = (tuple(images.shape[1:]), images.dtype, images.device, task.options, task.kind)
    return _KNOWN.setdefault(task.model, {}).setdefault(key, Known(ways_of(task.options, images.is_cuda)))


def ways_of(options: Options, is_cuda: bool) -> tuple[str, ...]:
    """Ways in the order in which a strategy tries them. Vectorized gradients pay on a GPU only."""
    if "output" in options.of:  # gradients do not say what a unit does
        return {"auto": ("fast", "single"), "fast": ("fast",)}.get(options.strategy, ("single",))
    auto = ("fast", "vmap", "loop") if is_cuda else ("fast", "single", "loop")
    return {"auto": auto, "fast": ("fast",), "vmap": ("vmap", "loop"), "loop": ("loop",)}[options.strategy]


def compute(task: Task, images: Tensor, labels: Tensor, known: Known) -> Part:
    """All columns of as many images as are taken at once: each way does what the one before it has left.

    Raises
    ------
    Unsupported
        If the last way leaves something.
    """
    part, left, queue = Part(), dict.fromkeys(task.parameters, ""), list(known.ways)
    while True:  # the last way returns or raises
        way = queue.pop(0)
        try:
            done, left = WAYS[way](task, images, labels, tuple(left), known)
        except (RuntimeError, NotImplementedError) as error:  # also what an operation says that cannot be intercepted
            if not queue or is_of_the_machine(error) or is_of_the_layout(error, images):
                raise
            done, left = Part(), dict.fromkeys(left, str(error))
            known.drop(way)
            if isinstance(error, OwnGradients):  # vmap would take them wrongly, without a word
                queue, known.ways = ["loop"], ("loop",)
        if not left:
            return Part({**part.columns, **done.columns}, done.outputs, done.losses) if part.columns else done
        part.columns |= done.columns
        name, reason = next(iter(left.items()))
        if not queue:
            raise Unsupported(f"strategy={way!r} cannot do {', '.join(left)}: {reason}; use strategy='auto'")
        log.info("%s for %d parameters (%s …): %s", _TITLES[queue[0]], len(left), name, reason)
        if queue[0] == "single":  # its pass does all at once
            known.drop(way)
            part, left = Part(), dict.fromkeys(task.parameters, "")


# One recorded pass


def _fast(task: Task, images: Tensor, labels: Tensor, names: tuple[str, ...], known: Known):
    left = {name: "its units are not made of rows" for name in names if name in task.whole}
    wanted = task.tensors(name for name in names if name in task.rows)
    if not wanted:
        return Part(), left
    require_gradients(task.model, wanted)
    recorder, part, means, _ = _recorded(task, images, labels, wanted, {}, known)
    for name in wanted:
        if name in means:
            part.columns |= task.columns_of_rows(name, means[name])
        else:
            left[name] = recorder.lost.get(name, "it is used in a way that is not known here")
    return part, left


def _single(task: Task, images: Tensor, labels: Tensor, names: tuple[str, ...], known: Known):
    require_gradients(task.model, task.tensors(names))
    return Part.join([_alone(task, *pair, names, known) for pair in _pairs(images, labels)]), {}


def _alone(task: Task, image: Tensor, label: Tensor, names: tuple[str, ...], known: Known) -> Part:
    """All columns of one sample: of rows from the recorder, of anything else from autograd, in one pass."""
    while True:
        wanted = task.tensors(name for name in names if name in task.rows and name not in known.plain)
        others = task.tensors(name for name in names if name not in wanted)
        _, part, means, reached = _recorded(task, image, label, wanted, others, known)
        if not (unknown := wanted.keys() & reached.keys()):
            break
        known.plain |= unknown
    for name, mean in means.items():
        part.columns |= task.columns_of_rows(name, mean)
    for name, parameter in others.items():
        gradient = torch.zeros_like(parameter) if name not in reached else reached[name]
        part.columns |= task.columns(name, gradient[None])
    return part


def _recorded(
    task: Task, images: Tensor, labels: Tensor, wanted: dict[str, Tensor], others: dict[str, Tensor], known: Known
) -> tuple[GradientRecorder, Part, dict[str, Tensor], dict[str, Tensor]]:
    """A forward and a backward pass under a recorder; without folding where that cannot be."""
    for fold in (True, False) if task.options.fold and known.fold else (False,):
        recorder = GradientRecorder(wanted, len(images), replace(task.options, fold=fold), others, task.in_columns)
        try:
            outputs = recorder.outputs(task.model, images)
            losses = losses_of(task, outputs, labels)
            if len(images) > 1:
                recorder.place(_batches(task, recorder, images, labels, (outputs, losses), known))
            means, reached = recorder.row_means(losses)
            seen = outputs.detach() if isinstance(outputs, Tensor) else None
            return recorder, Part({}, seen, losses.detach()), means, reached
        except Unsupported:
            if not fold:
                raise
            known.fold = False
        finally:  # what knows the recorder, and all outputs, would stay until Python looks for cycles
            recorder.calls.clear()
            recorder.kept = None
    raise AssertionError("the last pass returns or raises")


def _batches(task: Task, recorder: GradientRecorder, images: Tensor, labels: Tensor, of_batch: tuple, known: Known):
    """Where the batch is in each recorded call, looked for once for each course that the network takes."""
    course = recorder.course()
    if course not in known.courses:
        locator = Locator(recorder)
        alone = recorder.watching(1, locator.alone).outputs(task.model, images[-1:])
        _refuse_company(of_batch, (alone, losses_of(task, alone, labels[-1:])))
        recorder.watching(len(images), locator.shifted).outputs(task.model, images.roll(1, 0))
        if len(known.courses) == COURSES:
            known.courses.clear()
        known.courses[course] = locator.batches()
    return known.courses[course]


def _refuse_company(of_batch: tuple[Any, Tensor], alone: tuple[Any, Tensor]) -> None:
    """Raise where the last sample's outputs in the batch are not those that it has alone."""
    for whole, one in zip(of_batch, alone, strict=True):
        if isinstance(whole, Tensor) and whole.is_floating_point() and not close(whole[-1:], one):
            raise Unsupported("the outputs of an image depend on the others of its batch")


# Gradients of whole samples


def _whole(way: Callable, task: Task, images: Tensor, labels: Tensor, names: tuple[str, ...], known: Known):
    parts = []
    for gradients in way(task, images, labels, names):
        parts.append(Part())
        for name in names:
            parts[-1].columns |= task.columns(name, gradients[name])
    return Part.join(parts), {}


def whole_gradients(task: Task, images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of whole samples, vectorized where that can be."""
    try:
        return list(vectorized(task, images, labels, task.parameters))
    except (RuntimeError, NotImplementedError) as error:
        if is_of_the_machine(error) or is_of_the_layout(error, images):
            raise
        log.info("gradients of one sample at a time: %s", error)
        return list(one_by_one(task, images, labels, task.parameters))


def vectorized(task: Task, images: Tensor, labels: Tensor, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Gradients of whole samples, ``{name: (b, *shape)}`` for a few samples after the other."""
    parameters = task.tensors(names)

    def total(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        losses = task.loss(torch.func.functional_call(task.model, parameters, (image[None],)), label[None])
        check_losses(losses, label[None], values=False)
        return losses.sum(), losses

    numbers = sum(p.numel() for p in parameters.values())
    at_once = max(1, min(len(images), GRADIENT_BYTES // (numbers * images.element_size())))
    with ExplicitNormalization():
        task.check(task.model(images[:1]), labels, 1)
    require_gradients(task.model, parameters)
    detached = {name: p.detach() for name, p in parameters.items()}
    per_sample = torch.func.vmap(torch.func.grad(total, has_aux=True), in_dims=(None, 0, 0))
    for some, theirs in zip(images.split(at_once), labels.split(at_once), strict=True):
        with warnings.catch_warnings(), ExplicitNormalization():
            # Of operations that vmap runs one after the other: slow is what this way is.
            warnings.filterwarnings("ignore", "There is a performance drop")
            gradients, losses = per_sample(detached, some, theirs)
        if losses.requires_grad:  # by the parameters themselves, not those that were put in their place
            raise RuntimeError("the model also holds a parameter outside of its modules' parameters")
        check_losses(losses[:, 0], theirs)
        yield gradients


def one_by_one(task: Task, images: Tensor, labels: Tensor, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Gradients of whole samples, ``{name: (1, *shape)}`` for one after the other, by plain autograd."""
    parameters = task.tensors(names)
    require_gradients(task.model, parameters)
    for image, label in _pairs(images, labels):
        with ExplicitNormalization():
            losses = losses_of(task, task.model(image), label)
        found = gradients_to(list(parameters.values()), losses.sum())
        yield {name: gradient[None] for name, gradient in zip(parameters, found, strict=True)}


def gradients_to(inputs: Sequence[Tensor], value: Tensor) -> Sequence[Tensor]:
    """Gradients of a value to tensors: zero to what takes no part in it, to all of them if need be."""
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return torch.autograd.grad(value, inputs, materialize_grads=True)


WAYS = {"fast": _fast, "single": _single, "vmap": partial(_whole, vectorized), "loop": partial(_whole, one_by_one)}
_TITLES = {
    "single": "one image at a time",
    "vmap": "gradients of whole samples",
    "loop": "gradients of one sample at a time",
}


# What surrounds them


@contextmanager
def ready(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Gradients on, whatever the caller has set, nothing compiled, and the model preserved."""
    without_autocast = torch.autocast(images.device.type, enabled=False)
    # Compiled code would be made anew under a recorder, and every recorder is another one.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), without_autocast, eager, preserved(model):
        yield


def require_gradients(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    """Of the wanted parameters, and of no other."""
    ids = {id(p) for p in wanted.values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in ids)


def losses_of(task: Task, outputs: Any, labels: Tensor) -> Tensor:
    """One finite loss for each sample."""
    task.check(outputs, labels, len(labels))
    losses = task.loss(outputs, labels)
    check_losses(losses, labels)
    return losses


def check_losses(losses: Any, labels: Tensor, values: bool = True) -> None:
    """Whether there is one finite loss per sample; ``values=False`` looks at the shape alone, as under vmap."""
    if not isinstance(losses, Tensor) or losses.shape != (len(labels),):
        shape, n = shape_of(losses), len(labels)
        raise ValueError(f"the loss returned {shape} for {n} samples: expected ({n},), one value each")
    if values and not torch.isfinite(losses).all():
        bad = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
        raise ValueError(f"the loss is not finite for samples {bad} of the batch")


def is_of_the_machine(error: Exception) -> bool:
    """Out of memory, or a loader's worker that died: no reason to take another way."""
    words = ("DataLoader worker", "allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def _pairs(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.split(1), labels.split(1), strict=True)
