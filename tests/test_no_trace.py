"""Every public function leaves model and process as it found them, also where it is cut off anywhere on its way.

A fault is put into the n-th call of something that the function calls: a module's forward pass, its backward pass, a
hook of the caller's, the loss, an item of the data set, any function of torch. For every n the weights are then
bit-identical, and flags, gradients, modes, hooks, random generators, threads and function modes are as before.
`make test` takes some of the n, `make test-faults` up to 20 of each kind, spread evenly.
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from state import state_of, state_of_process, unsettled
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset

import pss
from pss import editing as repair
from pss import models, plots, statistics
from pss.reference import Reference
from pss.units import Units

IMAGES, CLASSES = 4, 3


class Fault(BaseException):
    """As if the user had pressed Ctrl-C: no broad `except Exception` may swallow it."""


class Trip:
    """Counts calls, and raises at the n-th."""

    def __init__(self, at: int = 0, error: type[BaseException] = Fault):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error(f"fault at call {self.at}")


class _Wire(torch.autograd.Function):
    """The identity, whose passes trip."""

    @staticmethod
    def forward(x, forth, back):
        if forth is not None:
            forth()
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.back = inputs[2]

    @staticmethod
    def backward(ctx, g):
        ctx.back()
        return g.clone(), None, None


class Net(nn.Module):
    """6 filters, batch normalization, dropout; draws random numbers, and trips where it is told to."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
        self.drop, self.head = nn.Dropout(), nn.Linear(3, CLASSES)
        self.forth = self.back = None

    def forward(self, x):
        if self.forth is not None:
            self.forth()
        x = self.two(self.norm(self.one(x + 0 * torch.rand_like(x))).tanh()).tanh()
        if self.back is not None:
            x = _Wire.apply(x, None, self.back)
        return self.head(self.drop(x).mean((2, 3)))


class Items(Dataset):
    """Images with labels; its reading may trip."""

    def __init__(self, images, labels):
        self.images, self.labels, self.trip = images, labels, None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if self.trip is not None:
            self.trip()
        return self.images[index], self.labels[index]


class EveryFunction(TorchFunctionMode):
    """Trips on the n-th function of torch that anything calls, but for what undoes: no second fault on top of one."""

    def __init__(self, trip):
        super().__init__()
        self.trip = trip

    def __torch_function__(self, function, types, args=(), kwargs=None):
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name not in ("__exit__", "cut_off"):
            frame = frame.f_back
        if frame is None or frame.f_code.co_name == "cut_off":
            self.trip()
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Net().double().eval()
    x = torch.randn(IMAGES, 1, 6, 6, generator=generator, dtype=torch.float64)
    others = torch.randn(24, 1, 6, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        wrong, right = model(x).argsort(dim=1, descending=True)[:, 1], model(others).argmax(dim=1)
    units = Units.of(model)
    s = pss.profile(model, others, right, units)
    world = SimpleNamespace(model=model, x=x, y=wrong, units=units, retain=(others, right), s=s)
    world.reference = Reference.fit(s, level=0.5)
    world.ids = torch.tensor([[0, 4, 2]] * IMAGES)
    world.steps = repair.unit_steps(model, x, wrong, units, world.ids)
    world.items, world.loss_trip, world.tmp = Items(others, right), None, tmp_path_factory.mktemp("stores")
    world.patch = pss.Patch(models.fingerprint(model), units.layers, torch.linspace(0.5, 1.5, len(units)))

    def loss(outputs, labels):
        if world.loss_trip is not None:
            world.loss_trip()
        return F.cross_entropy(outputs, labels, reduction="none")

    world.loss, world.count = loss, 0
    unsettled(model)
    return world


def patched(w):
    with w.patch.applied(w.model):  # in the caller's mode: a forward pass would be the caller's own doing
        assert w.patch.is_applied(w.model)


def pruned(w, edit="prune", steps=None):
    with pss.edited(w.model, w.units, w.ids[0], edit, steps):
        w.model(w.x)


def stored(w, **options):
    """A new folder each time, so that nothing is reopened."""
    w.count += 1
    batch = {"batch_size": 8, "progress": False, "data_name": "items"}
    return pss.profile_dataset(w.model, w.items, w.units, w.tmp / str(w.count), **batch, **options)


def cost(w, **options):
    options |= {"retain": w.retain, "progress": False, "usual": w.retain[0] + 0.5}
    return pss.smallest_correction(w.model, w.x[:2], w.y[:2], w.units, w.ids[:2], 2, **options)


def fitted(w):
    units = Units.of(w.model, "all")
    return pss.fit_patch(w.model, (w.x[:1], w.y[:1]), w.retain, units, 1e9, 0.1, progress=False)


CALLS: dict[str, Callable] = {
    "profile, fast": lambda w: pss.profile(w.model, w.x, w.y, w.units, w.loss, strategy="fast"),
    "profile, folded not": lambda w: pss.profile(w.model, w.x, w.y, w.units, w.loss, fold=False, signed=True),
    "profile, vmap": lambda w: pss.profile(w.model, w.x, w.y, w.units, w.loss, strategy="vmap"),
    "profile, loop": lambda w: pss.profile(w.model, w.x, w.y, w.units, w.loss, strategy="loop"),
    "profile, own units": lambda w: pss.profile(w.model, w.x, w.y),
    "parameter_saliency": lambda w: pss.parameter_saliency(w.model, w.x, w.y, w.loss),
    "profile_dataset": lambda w: stored(w),
    "input_saliency": lambda w: pss.input_saliency(w.model, w.x[:2], w.y[:2], w.units, w.reference, 2, loss=w.loss),
    "input_saliency, noise": lambda w: pss.input_saliency(
        w.model, w.x[0], w.y[0], w.units, w.reference, 2, method="pot", noise_iters=2, noise_share=0.1
    ),
    "edited, prune": pruned,
    "edited, finetune": lambda w: pruned(w, "finetune", w.steps[0]),
    "unit_steps": lambda w: repair.unit_steps(w.model, w.x, w.y, w.units, w.ids, w.loss),
    "edit_curve": lambda w: pss.edit_curve(w.model, w.x[0], w.y[0], w.ids[0], w.units, loss=w.loss),
    "edit_curves, in place": lambda w: pss.edit_curves(
        w.model, w.x[:2], w.y[:2], w.ids[:2], w.units, loss=w.loss, strategy="in_place", progress=False
    ),
    "edit_curves, prune": lambda w: pss.edit_curves(w.model, w.x, w.y, w.ids, w.units, "prune", progress=False),
    "side_effects": lambda w: repair.side_effects(w.model, w.units, w.ids[:2], *w.retain, progress=False),
    "smallest_correction": lambda w: cost(w),
    "smallest_correction, weights": lambda w: cost(w, through="weights", loss=w.loss),
    "gain_jacobian": lambda w: pss.correction.gain_jacobian(w.model, w.x, w.units),
    "fit_patch": fitted,
    "Patch.applied": patched,
    "Patch.measured": lambda w: w.patch.measured(w.model, {"retain": w.retain}),
    "predict": lambda w: models.predict(w.model, w.x),
    "misclassified": lambda w: models.misclassified(w.model, w.items),
    "accuracy": lambda w: models.accuracy(w.model, w.items),
    "fingerprint": lambda w: models.fingerprint(w.model),
    "Units.of": lambda w: (Units.of(w.model, "all").table(), w.units.view(w.model, 3).detach()),
}
NO_MODEL: dict[str, Callable] = {  # these could touch what is global
    "Reference.fit": lambda w: Reference.fit(w.s, scale_free=True),
    "rank": lambda w: [
        pss.rank(w.s, w.reference, m, 3, w.units)
        for m, entry in pss.RANKINGS.items()
        if "scale_free" not in entry.needs
    ],
    "nearest": lambda w: pss.nearest(w.s, reference=w.reference, k=2),
    "agreement": lambda w: pss.statistics.agreement(w.y, w.y, [[1]] * IMAGES),
    "anderson_darling": lambda w: statistics.anderson_darling(w.s.T, simulations=20),
    "render_map": lambda w: plots.render_map(w.x[:, 0].abs()),
    "built-in sets": lambda w: pss.data.load("noise", "test"),
    "resnet18": lambda w: models.resnet18(4, seed=3),
    "load": lambda w: pss.models.load("digits", "random", seed=1),
}


def seen(w) -> dict:
    images = {"images": (w.x._version, w.x.requires_grad, vars(w.x))}
    return {"model": state_of(w.model), "process": state_of_process(), "images": images}


def cut_off(w, call, kind: str, at: int, error: type[BaseException] = Fault) -> Trip:
    """Run a call with a fault at the at-th event of a kind (0: none), and take the fault out again."""
    trip, handle = Trip(at, error), None
    if kind == "forward":
        w.model.forth = trip
    elif kind == "backward":
        w.model.back = trip
    elif kind == "hook":
        handle = w.model.head.register_forward_hook(lambda *_: trip())
    elif kind == "loss":
        w.loss_trip = trip
    elif kind == "data":
        w.items.trip = trip
    before = seen(w)
    try:
        if kind == "torch":
            with EveryFunction(trip):
                call(w)
        else:
            call(w)
    except (error, ValueError):  # an item that cannot be read is said so in a ValueError
        assert trip.calls >= at > 0
    after = seen(w)
    if handle is not None:
        handle.remove()
    w.model.forth = w.model.back = w.loss_trip = w.items.trip = None
    for part in before:
        for name in before[part]:
            assert after[part][name] == before[part][name], f"{kind} at {at}: {name} changed"
    return trip


def test_state_sees_every_change(w):
    """The retain of this file: each of these must be noticed."""
    model, parameter = w.model, w.model.two.weight
    hooks = []
    changes = {
        "bytes": (lambda: parameter.data[0, 0, 0, 0].mul_(1 + 2**-50), lambda: parameter.data[0, 0, 0, 0].copy_(kept)),
        "requires_grad": (lambda: parameter.requires_grad_(False), lambda: parameter.requires_grad_(flag)),
        "grad": (lambda: setattr(parameter, "grad", parameter.detach()), lambda: setattr(parameter, "grad", None)),
        "training": (lambda: model.drop.train(not mode), lambda: model.drop.train(mode)),
        "hooks": (lambda: hooks.append(model.register_forward_hook(print)), lambda: hooks.pop().remove()),
        "attributes": (lambda: setattr(model.one, "left", 1), lambda: delattr(model.one, "left")),
        "torch": (lambda: torch.rand(1), lambda: torch.set_rng_state(states[0])),
        "threads": (lambda: torch.set_num_threads(threads + 1), lambda: torch.set_num_threads(threads)),
        "gradients": (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)),
    }
    kept, flag, mode = parameter.data[0, 0, 0, 0].clone(), not parameter.requires_grad, model.drop.training
    parameter.requires_grad_(True)
    flag = True
    states, threads = (torch.get_rng_state(),), torch.get_num_threads()
    for name, (change, undo) in changes.items():
        before = seen(w)
        change()
        after = seen(w)
        undo()
        differ = [n for part in before for n in before[part] if before[part][n] != after[part][n]]
        assert differ == [name]
        assert seen(w) == before


@pytest.mark.parametrize("name", [*CALLS, *NO_MODEL])
def test_leaves_no_trace(w, name):
    call = (CALLS | NO_MODEL)[name]
    before = seen(w)
    call(w)
    assert seen(w) == before
    with torch.no_grad():
        before = seen(w)
        call(w)
        assert seen(w) == before


def test_every_public_function_is_here():
    """What `pss` offers at its top is called above."""
    called = " ".join([*CALLS, *NO_MODEL])
    no_model = "Units ProfileStore RANKINGS fdr_significant stage_shares Patch Reference rank_together"
    offered = {n for n in pss.__all__ if not isinstance(getattr(pss, n), ModuleType)}
    assert {n for n in offered if n not in called} <= set(no_model.split())


KINDS = ("forward", "backward", "hook", "loss", "data", "torch")
SOME = {"forward": 3, "backward": 2, "hook": 1, "loss": 2, "data": 2, "torch": 4}


def positions(count: int, some: int | None) -> list[int]:
    """Numbers of the calls to cut off at: all of them, or some, spread evenly with the first and the last."""
    if some is None or count <= some:
        return list(range(1, count + 1))
    return sorted({round(1 + i * (count - 1) / max(1, some - 1)) for i in range(some)})


def faults(w, name: str, some: dict[str, int] | None) -> int:
    """Cut a call off at its events of every kind, in two ways; how many faults that made."""
    made = 0
    for kind in KINDS:
        count = cut_off(w, CALLS[name], kind, 0).calls
        for at in positions(count, some and some[kind]):
            cut_off(w, CALLS[name], kind, at)
            made += 1
            if kind in ("forward", "loss"):  # an error that a function may take for a model's, and go another way
                cut_off(w, CALLS[name], kind, at, RuntimeError)
                made += 1
    return made


@pytest.mark.parametrize("name", CALLS)
def test_leaves_no_trace_where_it_is_cut_off(w, name, record_property):
    record_property("count faults in calls", made := faults(w, name, SOME))
    assert made > 0 or name in ("fingerprint", "Units.of")


@pytest.mark.faults
@pytest.mark.parametrize("name", CALLS)
def test_leaves_no_trace_wherever_it_is_cut_off(w, name, record_property):
    record_property("count faults in calls", faults(w, name, dict.fromkeys(KINDS, 20)))


# --- memory -----------------------------------------------------------------------------------------------------------

REPEATED = ("profile, fast",)
OTHERS = {  # how often each is called
    **dict.fromkeys(["edited, prune", "edit_curve", "predict", "nearest"], 1000),
    **dict.fromkeys(["side_effects", "input_saliency"], 200),
    **dict.fromkeys(["parameter_saliency", "profile, vmap"], 100),
}
TENSORS, MEGABYTES = 0, 0.5  # what may be left after 1,000 calls


def live_tensors(collect: bool = True) -> int:
    if collect:
        gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("of", ["gradient", "gain", "output", ("gradient", "gain")])
def test_no_tensor_waits_for_the_collector_of_cycles(w, of):
    pss.profile(w.model, w.x, w.y, of=of)
    before = live_tensors()
    gc.disable()
    try:
        pss.profile(w.model, w.x, w.y, of=of)
        assert live_tensors(collect=False) == before
    finally:
        gc.enable()


class _Heap(ctypes.Structure):
    """What glibc's ``mallinfo2`` gives."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


def held() -> float:
    """Memory that this process has taken and not given back, MB: unlike its size, without what lies free in between."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Heap
    heap = ask()
    return (heap.uordblks + heap.hblkhd) / 1e6


def growth(call: Callable[[], object], calls: int, warm: int = 100) -> tuple[int, float]:
    """Tensors and MB that so many calls leave behind, after some that fill the caches."""
    for _ in range(warm):
        call()
    tensors, size = live_tensors(), held()
    for _ in range(calls):
        call()
    return live_tensors() - tensors, held() - size


needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="memory is asked of glibc 2.33")


@needs_glibc
@pytest.mark.parametrize("name", REPEATED)
def test_memory_is_flat(w, name):
    tensors, size = growth(lambda: CALLS[name](w), 1000)
    assert tensors <= TENSORS
    assert size < MEGABYTES


@needs_glibc
@pytest.mark.faults
@pytest.mark.parametrize("name", OTHERS)
def test_memory_is_flat_whatever_is_called(w, name):
    tensors, size = growth(lambda: (CALLS | NO_MODEL)[name](w), OTHERS[name], warm=50)
    assert tensors <= TENSORS
    assert size < MEGABYTES


@needs_glibc
def test_a_leak_is_seen(w):
    """The retain of the two tests before: what is kept shows, as tensors or as memory."""
    kept = []
    tensors, _ = growth(lambda: kept.append(pss.profile(w.model, w.x, w.y, w.units)), 100, warm=1)
    assert tensors >= 100 > TENSORS
    kept.clear()
    _, size = growth(lambda: kept.append(bytes(bytearray(100_000))), 1000, warm=1)
    assert size > MEGABYTES
    kept.clear()
    graph = [torch.zeros(10_000, requires_grad=True)]

    def holds_a_graph():  # tensors that only autograd holds
        graph[0] = graph[0] * graph[0].detach().exp()

    _, size = growth(holds_a_graph, 1000, warm=1)
    assert size > MEGABYTES
