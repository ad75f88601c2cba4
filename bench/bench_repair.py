"""Edit curves: one pass that carries every variant, against copying the state dict for each edit.

    python bench/bench_repair.py [--repeats 5] [--threads 2]

Both sides include the gradient that fine-tuning needs. Times are medians of repetitions that take turns.
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn

from pss.data.vision import torchvision
from pss.editing import edit_curves
from pss.units import Units

# name, side of the image, images of one repetition
SETTINGS = (("resnet50", 224, 1), ("resnet18", 32, 1), ("resnet18", 32, 16))


def copying_loop(
    model: nn.Module, image: Tensor, label: Tensor, ids: Tensor, units: Units, edit: str, lr: float
) -> Tensor:
    """Logits (K + 1, C): for each edit copy the whole state dict, edit the copy, load it and run the model."""
    logits = model(image)
    if edit == "finetune":
        names, parameters = zip(*model.named_parameters(), strict=True)
        loss = nn.functional.cross_entropy(logits, label)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    original, results = copy.deepcopy(model.state_dict()), [logits.detach()]
    state = original
    with torch.no_grad():
        for unit in ids.tolist():
            number, j = units.locate(unit)
            layer = units.layers[number]
            state = copy.deepcopy(state)
            view = state[layer.parameter][layer.index(j)]
            view -= lr * gradients[layer.parameter][layer.index(j)] if edit == "finetune" else view.clone()
            model.load_state_dict(state)
            results.append(model(image))
        model.load_state_dict(original)
    return torch.cat(results)


def calibrated(name: str, size: int, seed: int = 0) -> nn.Module:
    """The architecture with random weights, its batch norms having seen random images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(torchvision.models, name)(weights=None)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
            model(torch.randn(8, 3, size, size))
    return model.eval()


def run(repeats: int = 5, edits: int = 25, threads: int | None = None, settings: tuple = SETTINGS) -> pd.DataFrame:
    """Median seconds per image of both, their ratio, and their largest difference.

    The difference is of the true class's log-confidence, over the range of the logits.

    ``random`` units are spread over the network as its filters are; ``last`` are of the last stage alone, where the
    papers' rankings put most.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        rows = [
            _measure(name, size, images, edit, where, repeats, edits)
            for name, size, images in settings
            for edit in ("finetune", "prune")
            for where in ("random", "last")
        ]
    finally:
        torch.set_num_threads(before)
    return pd.DataFrame(rows)


def _measure(name: str, size: int, images: int, edit: str, where: str, repeats: int, edits: int) -> dict:
    model = calibrated(name, size)
    units = Units.of(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, size, size, generator=generator)
    y = torch.randint(1000, (images,), generator=generator)
    pool = torch.arange(len(units))
    if where == "last":
        pool = torch.as_tensor(units.stage_ids == units.stage_ids[-1]).nonzero()[:, 0]
    ids = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:edits]] for _ in x])
    copied, carried = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        logits = copying_loop(model, x[:1], y[:1], ids[0], units, edit, 1e-3)
        copied.append(time.perf_counter() - start)
        start = time.perf_counter()
        curves = edit_curves(model, x, y, ids, units, edit, lr=1e-3, progress=False)
        carried.append((time.perf_counter() - start) / images)
    difference = curves.loc[curves["image"] == 0, "loss"].to_numpy() + logits.log_softmax(1)[:, y[0]].numpy()
    return {
        "model": name,
        "size": size,
        "images": images,
        "edits": edits,
        "edit": edit,
        "units": where,
        "threads": torch.get_num_threads(),
        "copying_s": median(copied),
        "pss_s": median(carried),
        "ratio": median(copied) / median(carried),
        "error": abs(difference).max() / float(logits.max() - logits.min()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(run(options.repeats, threads=options.threads).to_string(index=False, float_format="%.3g"))
