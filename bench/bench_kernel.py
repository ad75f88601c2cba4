"""Saliency profiles: `pss.profile` against one image at a time, and against a plain forward and backward pass.

    python -m bench.bench_kernel [--device cuda] [--repeats 5] [--threads 2] [--models resnet50 vgg19 …]

Random weights, random images. Repetitions take turns; times are medians, ratios the medians of those of each round. The
loop over single images is timed on two of the batch and extrapolated, gradients of whole samples, by torch.func and, if
it is installed, by Opacus, on up to eight. First profiles are of a copy of the network, of which nothing is known yet:
they find where the batch is, and one image alone verifies them. On a GPU times are those of `torch.cuda.Event`, and the
fast path is first checked there against the loop, in float64.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pss
from pss.data.vision import torchvision

# Model, kind of units, pixels, batch
CASES = [
    ("resnet50", "filters", 224, 8),
    ("resnet18", "filters", 224, 8),
    ("vgg19", "filters", 224, 8),
    ("densenet121", "filters", 224, 8),
    ("mobilenet_v2", "filters", 224, 8),
    ("vit_b_16", "rows", 224, 8),
    ("vit_b_16", "heads", 224, 8),
    ("resnet18", "filters", 32, 128),
]
OURS = {
    "profile, BatchNorm unfolded": {"fold": False},
    "profile": {},
    "profile, bf16 backward": {"precision": "bf16"},
    "profile, gain": {"of": "gain"},
    "profile, gradient and gain": {"of": ("gradient", "gain")},
    "profile, output": {"of": "output"},
}
FIRST = {"first profile, verify=False": {"verify": False}, "first profile": {}}


def one_by_one(model: nn.Module, images: Tensor, labels: Tensor, units: pss.Units) -> Tensor:
    """Profiles as the papers' code takes them: a prediction, then gradients that could be differentiated again."""
    names = list(dict.fromkeys(layer.parameter for layer in units.layers))
    parameters = [model.get_parameter(name) for name in names]
    rows = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        model(image).argmax(dim=1)
        loss = F.cross_entropy(model(image), label)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        whole = {n: g.detach().abs()[None] for n, g in zip(names, gradients, strict=True) if g is not None}
        whole |= {n: torch.zeros_like(p)[None] for n, p in zip(names, parameters, strict=True) if n not in whole}
        rows.append(units.reduce(whole))
    return torch.cat(rows)


def by_torch_func(model: nn.Module, images: Tensor, labels: Tensor, units: pss.Units) -> Tensor:
    """Profiles from gradients of whole samples, by `torch.func`."""
    parameters = {layer.parameter: model.get_parameter(layer.parameter).detach() for layer in units.layers}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (image[None],)), label[None])

    whole = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, labels)
    return units.reduce({name: gradients.abs_() for name, gradients in whole.items()})


def by_opacus(model: nn.Module, images: Tensor, labels: Tensor, units: pss.Units) -> Tensor:
    """Profiles from gradients of whole samples, by the hooks of Opacus' ``GradSampleModule``."""
    from opacus import GradSampleModule

    model = copy.deepcopy(model).requires_grad_(False)  # which leaves its marks
    for module in model.modules():  # it looks at modules in training mode
        module.training = not isinstance(module, nn.BatchNorm2d)
    weights = {layer.parameter: model.get_parameter(layer.parameter).requires_grad_() for layer in units.layers}
    outputs = GradSampleModule(model, strict=False, loss_reduction="sum")(images)
    F.cross_entropy(outputs, labels, reduction="sum").backward()
    return units.reduce({name: weight.grad_sample.abs_() for name, weight in weights.items()})


def plain_pass(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward pass over the batch, as training does it: the sum of the gradients."""
    images = images.contiguous(memory_format=torch.channels_last)
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of one call."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(contestants: dict[str, Callable[[], object]], repeats: int, device: str) -> pd.DataFrame:
    """Seconds of each contestant (column) in each round (row), after one round to warm up."""
    rounds = [{name: seconds(work, device) for name, work in contestants.items()} for _ in range(repeats + 1)]
    return pd.DataFrame(rounds[1:])


def make(name: str, kind: str, pixels: int, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Model with random weights, images, labels, units."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        if "vit" in name:  # its classifier starts at zero, and hands back zero gradients
            nn.init.normal_(model.heads.head.weight, std=0.02)
    images = torch.randn(batch, 3, pixels, pixels, generator=generator).to(device, dtype)
    labels = torch.randint(1000, (batch,), generator=generator).to(device)
    return model.to(device, dtype), images, labels, pss.Units.of(model, kind)


def rivals() -> dict[str, Callable[[nn.Module, Tensor, Tensor, pss.Units], Tensor]]:
    """Other ways to gradients of each sample, by name."""
    found = {"torch.func's gradients of whole samples": by_torch_func}
    if importlib.util.find_spec("opacus"):
        return found | {"Opacus' gradients of whole samples": by_opacus}
    print("Opacus is not installed: its row is left out (pip install opacus)")
    return found


def run(device: str = "cpu", repeats: int = 5, models: list[str] | None = None) -> pd.DataFrame:
    """Time `pss.profile`; ratio is the loop over single images / it, "of plain" it / a plain training pass.

    "of gradient" is it / the profile of the gradient. Those of gain and output are of other quantities than the loop's.

    Ratios are taken within each round, and the median is shown: a machine that slows down for a while slows all.
    """
    rows = []
    for name, kind, pixels, batch in CASES:
        if models and name not in models:
            continue
        model, images, labels, units = make(name, kind, pixels, batch, device)
        if device == "cuda" and pixels == 224:
            images, labels = images.repeat(4, 1, 1, 1), labels.repeat(4)
            batch *= 4
        few, several = min(2, batch), min(8, batch)
        contestants = {
            "one image at a time": lambda m=model, x=images[:few], y=labels[:few], u=units: one_by_one(m, x, y, u),
            "forward and backward pass": lambda m=model, x=images, y=labels: plain_pass(m, x, y),
        }
        for label, work in rivals().items() if name.startswith("resnet") else ():
            contestants[label] = lambda m=model, x=images[:several], y=labels[:several], u=units, w=work: w(m, x, y, u)
        for label, options in OURS.items():
            if label != "profile, BatchNorm unfolded" or ("vit" not in name and "vgg" not in name):
                contestants[label] = lambda m=model, x=images, y=labels, u=units, o=options: pss.profile(
                    m, x, y, u, strategy="fast", **o
                )
        for label, options in FIRST.items():
            contestants[label] = lambda m=model, x=images, y=labels, u=units, o=options: pss.profile(
                copy.deepcopy(m), x, y, u, strategy="fast", **o
            )
        times = in_turns(contestants, repeats, device)
        times["one image at a time"] *= batch / few
        times[[label for label in times if label.endswith("of whole samples")]] *= batch / several
        for label in contestants:
            rows.append(
                {
                    "model": f"{name}, {pixels} px, batch {batch}, {len(units)} {kind}",
                    "what": label,
                    "ms an image": 1000 * times[label].median() / batch,
                    "ratio": (times["one image at a time"] / times[label]).median(),
                    "of plain": (times[label] / times["forward and backward pass"]).median(),
                    "of gradient": (times[label] / times["profile"]).median(),
                }
            )
    return pd.DataFrame(rows)


def run_precision(device: str = "cpu", name: str = "resnet50", pixels: int = 224, ranked: int = 16) -> pd.DataFrame:
    """Compare bf16 products with fp32: relative error of the profile, and how many of the top 25 units agree.

    Random weights; 16 images are ranked by z against 48 others, in either precision.
    """
    model, images, labels, units = make(name, "filters", pixels, 4 * ranked, device)
    exact, near = (pss.profile(model, images, labels, units, precision=p) for p in ("fp32", "bf16"))
    known, new = slice(ranked, None), slice(ranked)

    def z(s: Tensor) -> Tensor:
        return (s[new] - s[known].mean(0)) / s[known].std(0).clamp_min(torch.finfo(s.dtype).tiny)

    def overlap(a: Tensor, b: Tensor) -> float:
        tops = [(p.topk(25).indices.tolist(), q.topk(25).indices.tolist()) for p, q in zip(a, b, strict=True)]
        return sum(len(set(p) & set(q)) for p, q in tops) / (25 * len(tops))

    return pd.DataFrame(
        {
            "model": [f"{name}, {pixels} px"],
            "relative error": [float((near - exact).norm() / exact.norm())],
            "top 25 raw": [overlap(exact[new], near[new])],
            "top 25 z": [overlap(z(exact), z(near))],
        }
    )


def run_memory(
    name: str = "resnet50", pixels: int = 224, batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
) -> pd.DataFrame:
    """Measure the peak memory above the loaded model, each batch in a fresh process; large batches go in parts of 8."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        tasks = [(name, pixels, b, what) for b in batches for what in ("plain", "gradient", "gain")]
        peaks = pool.map(_peak_mib, tasks, chunksize=1)
    return pd.DataFrame(
        {
            "model": f"{name}, {pixels} px",
            "batch": batches,
            "MiB, forward and backward pass": peaks[::3],
            "MiB, profile": peaks[1::3],
            "MiB, profile of the gain": peaks[2::3],
        }
    )


def _peak_mib(task: tuple[str, int, int, str]) -> float:
    name, pixels, batch, what = task
    model, images, labels, units = make(name, "filters", pixels, batch)
    pss.profile(model, images[:1, :, :32, :32], labels[:1], units)  # libraries and their scratch space
    before = _peak_kib()
    if what == "plain":
        plain_pass(model, images, labels)
    else:
        pss.profile(model, images, labels, units, strategy="fast", of=what)
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    """Peak resident memory of this process: unlike ``ru_maxrss``, not what its parent had when it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def check(device: str) -> pd.DataFrame:
    """Compare every path with single images in float64: largest error of a layer, relative to its largest value."""
    rows = []
    for name, kind, pixels in [(n, k, max(p // 4, 32)) for n, k, p, _ in CASES if "vit" not in n] + [
        ("vit_b_16", "rows", 224),
        ("vit_b_16", "heads", 224),
        ("convnext_tiny", "all", 64),
        ("resnext50_32x4d", "filters", 64),
    ]:
        model, images, labels, units = make(name, kind, pixels, 3, device, torch.float64)
        expected = one_by_one(model, images, labels, units)
        for options in ({"strategy": "fast"}, {"strategy": "fast", "fold": False}, {"strategy": "vmap"}):
            got = pss.profile(model, images, labels, units, **options)
            spans = [units.span(i) for i in range(len(units.layers))]
            error = max(float((got - expected)[:, s].abs().max() / expected[:, s].abs().max()) for s in spans)
            rows.append({"model": name, "units": kind, "options": str(options), "error": error, "right": error < 1e-9})
    return pd.DataFrame(rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pd.set_option("display.width", 200, "display.max_columns", 20, "display.max_colwidth", 80, "display.max_rows", 200)
    if options.device == "cuda":
        print(torch.cuda.get_device_name(), torch.__version__)
        print(checked := check("cuda"), "\n", flush=True)
        if not checked["right"].all():
            raise SystemExit("the fast path is wrong on this device")
    table = run(options.device, options.repeats, options.models)
    print(table.round(3).to_string(index=False), "\n", flush=True)
    print(run_precision(options.device).round(4).to_string(index=False), "\n", flush=True)
    if options.device == "cpu" and not options.models:
        print(run_memory().round(1).to_string(index=False))


if __name__ == "__main__":
    main()
