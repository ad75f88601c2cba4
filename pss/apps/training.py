"""The commands ``train`` and ``evaluate``, of the built-in model."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from pss import models


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Give the parser the options of ``train`` or of ``evaluate``."""
    if command == "evaluate":
        parser.add_argument("weights", type=Path, nargs="?", help="a file that train wrote (default: the shipped one)")
        return
    parser.add_argument("--out", required=True, type=Path, help="file to write, .safetensors")
    parser.add_argument("--seed", type=int, default=0)
    width = "64 is torchvision's ResNet-18 (default: %(default)s)"
    parser.add_argument("--width", type=int, default=models.WIDTH, help=width)
    parser.add_argument("--epochs", type=int, default=models.EPOCHS, help="(default: %(default)s)")
    threads = "other weights for another number (default: %(default)s)"
    parser.add_argument("--threads", type=int, default=1, help=threads)


def main(options: argparse.Namespace) -> None:
    """Train and write a model, or print a table of accuracies."""
    if options.command == "evaluate":
        model = models.digits() if options.weights is None else _read(options.weights)
        print(models.evaluate(model).to_string(index=False, float_format="{:.3f}".format))
        return
    if options.out.suffix != ".safetensors":
        options.refuse(f"--out {options.out}: expected a name that ends in .safetensors")
    model, record = models.train(options.seed, options.width, options.epochs, threads=options.threads)
    models.save_weights(model, options.out, record)
    for key, value in {**record, "sha256": models.fingerprint(model), "file": options.out}.items():
        print(f"{key}={value}")


def _read(path: Path) -> nn.Module:
    width = int(models.read_record(path).get("width", models.WIDTH))
    return models.load_weights(models.resnet18(width), path)
