"""Bad input: what is called, the error that it must raise, what the error must say, and what it must leave as it was.

Every row names its call, the exact type of the error, and a pattern: what was wrong, what was expected or what to do.
After each the model is bit-identical with its flags, gradients, modes and hooks, the random generators and threads are
as before, and no file was made or changed.
"""
# ruff: noqa: E501  (a row a line)

import os
import pickle
import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from networks import Small
from PIL import Image
from safetensors.torch import save_file
from state import files_of, state_of, state_of_process, unsettled
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import pss
from pss import data, evt, models, patches, plots, profiles, statistics
from pss import editing as repair
from pss.apps import execution, parameters, sweep
from pss.input_space import gain_map
from pss.reference import Reference
from pss.storage.store import ProfileStore
from pss.units import UnitGroup, Units

NAN, INF, STRATEGIES = float("nan"), float("inf"), ("auto", "vmap", "loop")


class Answers(nn.Module):
    """A model whose answer is something else than logits."""

    def __init__(self, model, answer):
        super().__init__()
        self.model, self.answer = model, answer

    def forward(self, x):
        return self.answer(self.model(x))


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 8, 8), 0


class Items(torch.utils.data.Dataset):
    """A data set of anything."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    """What the calls are made of: a model, images, profiles, a reference, files."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    world = SimpleNamespace(tmp=tmp_path_factory.mktemp("world"))
    world.model, world.other, world.wide = Small().eval(), Small().eval(), Small(6).eval()
    world.units, world.linear, world.meta = Units.of(world.model), nn.Linear(2, 2), Small().to("meta")
    world.x = torch.randn(6, 3, 8, 8, generator=generator)
    with torch.no_grad():
        order = world.model(world.x).argsort(dim=1, descending=True)
    world.right, world.wrong = order[:, 0], order[:, 1]
    world.y = world.wrong
    world.ids = torch.tensor([[0, 5, 3]] * 6)
    world.s = torch.rand(40, 8, generator=generator) + 0.1
    world.plain = Reference.fit(world.s)
    world.set = TensorDataset(
        torch.randn(24, 3, 8, 8, generator=generator), torch.randint(3, (24,), generator=generator)
    )
    world.store = profiles.profile_dataset(world.model, world.set, world.units, world.tmp / "store", progress=False)
    world.reference = Reference.fit(world.store)
    retain = torch.randn(12, 3, 8, 8, generator=generator)
    world.retain = (retain, world.model(retain).argmax(dim=1))
    world.curves = repair.edit_curves(world.model, world.x, world.y, world.ids, world.units, progress=False)
    world.reference.save(world.tmp / "reference.safetensors")
    models.save_weights(world.model, world.tmp / "weights.safetensors")
    save_file({"one.weight": torch.zeros(1)}, world.tmp / "other.safetensors")
    torch.save({"state_dict": {"a": 1}}, world.tmp / "numbers.pth")
    torch.save({"mean": torch.zeros(8)}, world.tmp / "mean.pth")
    (world.tmp / "text.safetensors").write_text("not a file of tensors")
    (world.tmp / "text.pth").write_text("not a file of tensors")
    (world.tmp / "taken").mkdir()
    (world.tmp / "taken" / "letter.txt").write_text("mine")
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), world.tmp / "01_none.ipynb")
    tagged, again = (new_code_cell("factor = 2", metadata={"tags": ["parameters"]}) for _ in range(2))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=[tagged], metadata={"kernelspec": kernel}), world.tmp / "02_one.ipynb")
    nbformat.write(new_notebook(cells=[tagged, again]), world.tmp / "03_two.ipynb")
    (world.tmp / "tag.yaml").write_text(f"model: !!python/object/apply:os.system ['touch {world.tmp}/ran']")
    (world.tmp / "keys.yaml").write_text("model: digits\nweight: published")
    (world.tmp / "list.yaml").write_text("[1, 2]")
    world.digits = models.load("digits")
    pictures(world.tmp / "pictures")
    world.model = unsettled(world.model)
    return world


def pictures(folder):
    """Files that are no pictures, or not whole, or enormous; folders without pictures."""
    (folder / "empty").mkdir(parents=True)
    (folder / "classes" / "cat").mkdir(parents=True)
    (folder / "classes" / "cat" / "notes.txt").write_text("no picture")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    for kind in ("png", "jpg", "gif", "tif", "webp", "bmp"):
        picture.save(folder / f"whole.{kind}")
        content = (folder / f"whole.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(content[: len(content) * 2 // 3])
    content = bytearray((folder / "whole.png").read_bytes())
    content[60] ^= 0xFF
    (folder / "flipped.png").write_bytes(content)
    (folder / "text.png").write_text("not a picture")
    (folder / "nothing.png").write_bytes(b"")
    (folder / "vector.png").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    (folder / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    Image.fromarray(np.ones((9, 9), np.float32)).save(folder / "floats.tif")
    picture.resize((1, 400)).save(folder / "line.png")
    (folder / "bomb.png").write_bytes(png(60_000, 60_000))
    (folder / "large.png").write_bytes(png(9_000, 9_000))
    (folder / "code.png").write_bytes(pickle.dumps({"weights": 1}))
    (folder / "self").symlink_to(folder / "self")


def png(width, height, rows=b""):
    """A PNG whose header names a size, whatever it holds: 60,000 by 60,000 pixels in 100 bytes."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def look(w, name, **options):
    return data.read_image(w.tmp / "pictures" / name, **options)


def with_(tensor, at, value):
    changed = tensor.clone()
    changed[at] = value
    return changed


def saliency(w, **given):
    """`pss.profile`, with some arguments bad."""
    given = {"model": w.model, "images": w.x, "labels": w.y, "units": w.units} | given
    return pss.profile(**given)


def heat(w, **given):
    given = {"model": w.model, "images": w.x, "labels": w.y, "units": w.units, "reference": w.reference, "k": 3} | given
    return pss.input_saliency(**given)


def curves(w, **given):
    given = {"model": w.model, "images": w.x, "labels": w.y, "ids": w.ids, "units": w.units, "progress": False} | given
    return pss.edit_curves(**given)


def side_effects(w, **given):
    given = {"model": w.model, "units": w.units, "ids": w.ids, "images": w.x, "labels": w.y, "progress": False} | given
    return repair.side_effects(**given)


def cost(w, **given):
    given = {"model": w.model, "images": w.x, "labels": w.wrong, "units": w.units, "rankings": w.ids, "k": 2} | given
    return pss.smallest_correction(**{"retain": w.retain, "through": "weights", "progress": False} | given)


def patch(w, **given):
    given = {"model": w.model, "mistakes": (w.x[:1], w.wrong[:1]), "retain": w.retain, "units": w.units} | given
    return pss.fit_patch(**{"progress": False} | given)


def dataset(w, dataset=None, path="new", **given):
    given = {"units": w.units, "progress": False} | given
    model = given.pop("model", w.model)
    return pss.profile_dataset(model, w.set if dataset is None else dataset, path=w.tmp / path, **given)


def edits(w, ids, *args):
    with pss.edited(w.model, w.units, ids, *args):
        raise AssertionError("was edited")


# fmt: off
# name: (call, type of the error, what it says)
CASES = {
    # --- units
    "unknown kind of unit": (lambda w: Units.of(w.model, "filter"), ValueError, r"unknown kind of unit 'filter': expected one of .*filters"),
    "no filters in the model": (lambda w: Units.of(w.linear), ValueError, r"Linear has no unit of kind 'filters': try another"),
    "no heads in the model": (lambda w: Units.of(w.model, "heads"), ValueError, r"Small has no unit of kind 'heads': try another"),
    "units of a name": (lambda w: Units.of("resnet18"), TypeError, r"model is a str: expected a torch.nn.Module"),
    "no layers": (lambda w: Units([], []), ValueError, r"no units: give at least one layer"),
    "layers without stages": (lambda w: Units(w.units.layers, ["a"]), ValueError, r"2 layers but 1 stages: give one stage per layer"),
    "duplicate units": (lambda w: Units(w.units.layers[:1] * 2, "ab"), ValueError, r"units overlap: one.weight is listed twice"),
    "own units of no parameter": (lambda w: Units.of(w.model, lambda m: [UnitGroup("x", (1, 1), 1)]), ValueError, r"not of this model: they have 'x' of shape \(1, 1\), the model has None"),
    "own units of another shape": (lambda w: Units.of(w.model, lambda m: [UnitGroup("one.weight", (9, 1), 1)]), ValueError, r"one.weight.*the model has \(4, 3, 3, 3\)"),
    "own units beyond their parameter": (lambda w: Units.of(w.model, lambda m: [UnitGroup("one.weight", (4, 3, 3, 3), 5)]), ValueError, r"'one.weight' is listed with 5 units of 1 slices from 0 on, but has 4"),
    "unit beyond the last": (lambda w: w.units.name(8), IndexError, r"unit 8 is outside 0\.\.7"),
    "negative unit": (lambda w: w.units.view(w.model, -1), IndexError, r"unit -1 is outside 0\.\.7"),
    "unit of 1.7": (lambda w: w.units.locate(1.7), TypeError, r"unit 1.7 is a float: expected an int"),
    # --- profiles of a batch: labels
    "label too large": (lambda w: saliency(w, labels=with_(w.y, 2, 3)), ValueError, r"label 3 is outside 0\.\.2 of this model"),
    "label negative": (lambda w: saliency(w, labels=with_(w.y, 0, -1)), ValueError, r"label -1 is outside 0\.\.2 of this model"),
    "label of -100": (lambda w: saliency(w, labels=with_(w.y, 0, -100), strategy="loop"), ValueError, r"label -100 is outside 0\.\.2"),
    "labels float": (lambda w: saliency(w, labels=w.y.float()), ValueError, r"labels are torch.float32 .*expected class numbers, int64"),
    "labels int32": (lambda w: saliency(w, labels=w.y.int()), ValueError, r"labels are torch.int32 .*expected class numbers, int64"),
    "labels one-hot": (lambda w: saliency(w, labels=torch.eye(3)[w.y].long()), ValueError, r"labels are torch.int64 of shape \(6, 3\): expected class numbers"),
    "labels too few": (lambda w: saliency(w, labels=w.y[:5]), ValueError, r"labels are \(5,\) for images \(6, 3, 8, 8\): expected .*one label per image"),
    "labels a list": (lambda w: saliency(w, labels=[0] * 6), ValueError, r"labels are list .*expected a tensor"),
    "label a number": (lambda w: saliency(w, labels=torch.tensor(1)), ValueError, r"labels are \(\) .*one label per image"),
    "no labels": (lambda w: saliency(w, labels=None), ValueError, r"labels are NoneType .*expected a tensor"),
    # --- images
    "image without a batch": (lambda w: saliency(w, images=w.x[0], labels=w.y[:1]), ValueError, r"labels are \(1,\) for images \(3, 8, 8\): .*of one image images\[None\]"),
    "images a vector": (lambda w: saliency(w, images=w.x[0, 0, 0], labels=w.y), ValueError, r"images are \(8,\): expected a tensor of shape \(B, \.\.\.\)"),
    "images of other channels": (lambda w: saliency(w, images=w.x[:, :2]), RuntimeError, r"expected input\[1, 2, 8, 8\] to have 3 channels, but got 2"),
    "images too small": (lambda w: saliency(w, images=w.x[..., :2, :2]), RuntimeError, r"Kernel size can't be greater than actual input size"),
    "images NumPy": (lambda w: saliency(w, images=w.x.numpy()), ValueError, r"images are ndarray: expected a tensor"),
    "images float64": (lambda w: saliency(w, images=w.x.double()), ValueError, r"images are torch.float64, the model torch.float32: convert"),
    "images uint8": (lambda w: saliency(w, images=w.x.byte()), ValueError, r"images are torch.uint8, the model torch.float32: convert"),
    "images on another device": (lambda w: saliency(w, images=w.x.to("meta")), ValueError, r"images are on meta, the model on cpu: move"),
    "labels on another device": (lambda w: saliency(w, labels=w.y.to("meta")), ValueError, r"labels are on meta, the model on cpu: move"),
    "model on another device": (lambda w: saliency(w, model=w.meta), ValueError, r"images are on cpu, the model on meta: move"),
    "image with NaN": (lambda w: saliency(w, images=with_(w.x, (2, 0, 0, 0), NAN)), ValueError, r"images \[2\] hold NaN or infinite values"),
    "image with infinity": (lambda w: saliency(w, images=with_(w.x, (5, 0, 0, 0), -INF)), ValueError, r"images \[5\] hold NaN or infinite values"),
    "no images": (lambda w: saliency(w, images=w.x[:0], labels=w.y[:0]), ValueError, r"images are \(0, 3, 8, 8\): .*B >= 1"),
    "images without pixels": (lambda w: saliency(w, images=w.x[:, :, :0]), ValueError, r"images are \(6, 3, 0, 8\): expected"),
    # --- models, losses, units
    "model that gives a tuple": (lambda w: saliency(w, model=Answers(w.model, lambda z: (z, z)), units=None), ValueError, r"outputs are tuple: expected logits \(B, C\).*a loss"),
    "model that gives a dictionary": (lambda w: saliency(w, model=Answers(w.model, lambda z: {"logits": z}), units=None), ValueError, r"outputs are dict: expected logits"),
    "model that gives one number": (lambda w: saliency(w, model=Answers(w.model, lambda z: z[:, 0]), units=None), ValueError, r"outputs are \(6,\): expected logits \(B, C\) with C >= 2"),
    "model that gives one class": (lambda w: saliency(w, model=Answers(w.model, lambda z: z[:, :1]), units=None), ValueError, r"outputs are \(6, 1\): expected logits \(B, C\) with C >= 2"),
    "model that gives maps": (lambda w: saliency(w, model=Answers(w.model, lambda z: z[..., None]), units=None), ValueError, r"outputs are \(6, 3, 1\): expected logits"),
    "model that gives other rows": (lambda w: saliency(w, model=Answers(w.model, lambda z: z[:4]), units=None), ValueError, r"outputs are \(4, 3\) for 6 images"),
    "model that gives NaN": (lambda w: saliency(w, model=Answers(w.model, lambda z: z * NAN), units=None), ValueError, r"the loss is not finite for samples \[0, 1, 2, 3, 4, 5\]"),
    "model that is a function": (lambda w: saliency(w, model=torch.sin), TypeError, r"model is a builtin_function_or_method: expected a torch.nn.Module"),
    "model without parameters": (lambda w: saliency(w, model=nn.ReLU()), ValueError, r"ReLU has no unit of kind|the model has None"),
    "units of another model": (lambda w: saliency(w, model=w.wide), ValueError, r"the units are not of this model: .*one.weight.*\(6, 3, 3, 3\); make them with Units.of"),
    "units a name": (lambda w: saliency(w, units="filters"), TypeError, r"units are a str: expected Units, as Units.of\(model\)"),
    "unknown loss": (lambda w: saliency(w, loss="mse"), ValueError, r"unknown loss 'mse': expected one of .*cross_entropy.* or a callable"),
    **{
        f"loss of the batch, {s}": (lambda w, s=s: saliency(w, strategy=s, loss=lambda z, y: z.mean()), ValueError, r"the loss returned \(\) for (6|1) samples: expected \((6|1),\), one value each")
        for s in STRATEGIES
    },
    **{
        f"loss of many numbers, {s}": (lambda w, s=s: saliency(w, strategy=s, loss=lambda z, y: z), ValueError, r"the loss returned \((6|1), 3\) for (6|1) samples: expected")
        for s in STRATEGIES
    },
    **{
        f"loss of NaN, {s}": (lambda w, s=s: saliency(w, strategy=s, loss=lambda z, y: z[:, 0] * NAN), ValueError, r"the loss is not finite for samples \[0")
        for s in STRATEGIES
    },
    "loss of nothing": (lambda w: saliency(w, loss=lambda z, y: None), ValueError, r"the loss returned NoneType for 6 samples"),
    "unknown path": (lambda w: saliency(w, strategy="slow"), ValueError, r"unknown option 'slow': expected one of .*'fast'"),
    "unknown precision": (lambda w: saliency(w, precision="fp16"), ValueError, r"unknown option 'fp16': expected one of .*'bf16'"),
    "parameter saliency of a wrong label": (lambda w: pss.parameter_saliency(w.model, w.x, w.y + 3), ValueError, r"label \d is outside 0\.\.2"),
    # --- profiles of a data set
    "profiles, unknown on_error": (lambda w: dataset(w, on_error="ignore"), ValueError, r"unknown on_error 'ignore': expected one of raise, skip"),
    "profiles, batch of 0": (lambda w: dataset(w, batch_size=0), ValueError, r"batch_size 0 must be at least 1"),
    "profiles of an empty set": (lambda w: dataset(w, Items()), ValueError, r"the data set has no items"),
    "profiles of an endless set": (lambda w: dataset(w, Endless()), ValueError, r"no length.*expected a map-style data set"),
    "profiles, model without parameters": (lambda w: dataset(w, model=nn.ReLU()), ValueError, r"the units are not of this model"),
    "profiles of images of two shapes": (lambda w: dataset(w, [(w.x[0], 0), (w.x[0, :, :7], 0)], data_name="x"), ValueError, r"images differ in shape.*\(3, 8, 8\).*or under preprocessing in the network's YAML file"),
    "profiles of no tensors": (lambda w: dataset(w, [("a.png", 0)]), ValueError, r"none of the 1 images can be read"),
    "profiles of a named empty set": (lambda w: dataset(w, [], data_name="x"), ValueError, r"the data set has no items"),
    "profiles, a lambda as the loss": (lambda w: dataset(w, loss=lambda z, y: z[:, 0]), ValueError, r"a lambda has no name.*write it as a function"),
    "profiles, units of another model": (lambda w: dataset(w, model=w.wide), ValueError, r"the units are not of this model"),
    "profiles into a folder in use": (lambda w: dataset(w, path="taken"), FileExistsError, r"taken holds other files \(letter.txt"),
    "no store": (lambda w: ProfileStore.open(w.tmp / "absent"), FileNotFoundError, r"absent holds no profiles: make them with profile_dataset"),
    "store that is a file": (lambda w: ProfileStore.open(w.tmp / "text.pth"), FileNotFoundError, r"text.pth holds no profiles"),
    # --- reference
    **{
        f"reference at level {level}": (lambda w, level=level: Reference.fit(w.s, level), ValueError, r"level .* is outside \(0, 1\): .*as 0\.90")
        for level in (0, 1, -0.1, 1.5, NAN)
    },
    "reference of 19 images": (lambda w: Reference.fit(w.s[:19]), ValueError, r"needs at least 20 images, here are 19: profile more"),
    "reference of no images": (lambda w: Reference.fit(w.s[:0]), ValueError, r"needs at least 20 images, here are 0"),
    "reference of a vector": (lambda w: Reference.fit(w.s[:, 0]), ValueError, r"profiles of shape \(40,\): expected \(N, U\)"),
    "reference of no units": (lambda w: Reference.fit(w.s[:, :0]), ValueError, r"profiles of shape \(40, 0\): expected \(N, U\)"),
    "reference of a list": (lambda w: Reference.fit(w.s.tolist()), TypeError, r"profiles are a list: expected"),
    "reference of NaN": (lambda w: Reference.fit(with_(w.s, (3, 1), NAN)), ValueError, r"profiles of images \[3\] are not finite: leave them out"),
    "reference of infinities": (lambda w: Reference.fit(with_(w.s, (7, 1), INF)), ValueError, r"profiles of images \[7\] are not finite"),
    "reference of signed profiles without scale": (lambda w: Reference.fit(-w.s, scale_free=True), ValueError, r"scale_free .*mean .*negative for some image: .*signed=False"),
    "reference of one column's memory": (lambda w: Reference.fit(w.s, max_bytes=0), ValueError, r"max_bytes 0 must be positive"),
    "reference for other units": (lambda w: w.reference.check(Units.of(w.wide)), ValueError, r"the reference has 8 units, the model 12"),
    "reference for another model": (lambda w: w.reference.check(w.units, model="0" * 8), ValueError, r"fitted with something else \(model: reference \w+, given 00000000\): fit one"),
    "reference for another data set": (lambda w: w.reference.check(w.units, data="mine"), ValueError, r"\(data: reference .*, given mine\)"),
    "reference for another loss": (lambda w: w.reference.check(w.units, loss="logit"), ValueError, r"\(loss: reference cross_entropy, given logit\)"),
    "reference for another version": (lambda w: w.reference.check(w.units, pss="9.9"), ValueError, r"\(pss: reference .*, given 9.9\)"),
    "reference file of another loss": (lambda w: Reference.load(w.tmp / "reference.safetensors", w.units, loss="logit"), ValueError, r"loss: reference cross_entropy, given logit"),
    "reference file of another model": (lambda w: Reference.load(w.tmp / "reference.safetensors", w.units, model=models.fingerprint(w.other)), ValueError, r"model: reference"),
    "reference of nothing": (lambda w: Reference.load(w.tmp / "absent.pth"), FileNotFoundError, r"no reference at .*absent.pth: make one with Reference.fit"),
    "reference of text": (lambda w: Reference.load(w.tmp / "text.safetensors"), ValueError, r"text.safetensors is damaged, or not a safetensors file"),
    "published of text": (lambda w: Reference.load(w.tmp / "text.pth"), ValueError, r"text.pth is damaged, or holds more than tensors"),
    "published without deviation": (lambda w: Reference.load(w.tmp / "mean.pth"), ValueError, r"mean.pth holds no published statistics: expected a dict with 'mean' and 'std'"),
    "reference of weights": (lambda w: Reference.load(w.tmp / "weights.safetensors"), ValueError, r"weights.safetensors is no reference of pss"),
    "z-scores of other units": (lambda w: w.reference.zscore(w.s[:, :7]), ValueError, r"\(40, 7\) do not fit this reference of 8 units: .*same units"),
    "z-scores of integers": (lambda w: w.reference.zscore(w.s.int()), ValueError, r"profiles are torch.int32: expected floating-point"),
    "unknown tail": (lambda w: w.reference.tail_score(w.s, "normal"), ValueError, r"unknown tail 'normal': expected one of gpd, exponential"),
    # --- ranking
    **{
        f"rank {k}": (lambda w, k=k: pss.rank(w.s, w.plain, k=k), ValueError, rf"k = {k} is outside 1\.\.8, the number of units")
        for k in (0, -1, 9)
    },
    "rank 2.5": (lambda w: pss.rank(w.s, w.plain, k=2.5), TypeError, r"k = 2\.5 is a float: expected an int"),
    "rank of one profile": (lambda w: pss.rank(w.s[0], w.plain), ValueError, r"profiles of shape \(8,\): expected \(B, U\); of one image profile\[None\]"),
    "rank of a list": (lambda w: pss.rank(w.s.tolist(), w.plain), TypeError, r"profiles are a list: expected a tensor"),
    "rank by an unknown method": (lambda w: pss.rank(w.s, w.plain, "gradient"), ValueError, r"unknown method 'gradient': expected one of zscore"),
    "rank without a reference": (lambda w: pss.rank(w.s, None, "pot"), ValueError, r"method 'pot' needs a reference: pss.Reference.fit"),
    "rank with another reference": (lambda w: pss.rank(w.s[:, :5], w.plain), ValueError, r"profiles have 5 units, the reference has 8: they are of different models"),
    "rank of raw with another reference": (lambda w: pss.rank(w.s[:, :5], w.plain, "raw"), ValueError, r"profiles have 5 units, the reference has 8: they are of different models"),
    "rank without units": (lambda w: pss.rank(w.s, w.plain, "random_last_stage"), ValueError, r"method 'random_last_stage' needs units=: pass the Units"),
    "rank with other units": (lambda w: pss.rank(w.s, w.plain, "random_last_stage", units=Units.of(w.wide)), ValueError, r"profiles have 8 units, units= has 12: they are of different models"),
    "rank by a plain reference": (lambda w: pss.rank(w.s, w.plain, "scale_free_pot"), ValueError, r"needs a reference fitted with scale_free=True"),
    "rank beyond the stage": (lambda w: pss.rank(w.s, None, "random_last_stage", 5, w.units), ValueError, r"k = 5 is more than the 4 units that 'random_last_stage' ranks"),
    "rank of NaN": (lambda w: pss.rank(with_(w.s, (1, 0), NAN), w.plain), ValueError, r"profiles \[1\] are not finite: leave them out"),
    "rank by an unfitted tail": (lambda w: pss.rank(w.s, Reference(torch.ones(8), torch.ones(8)), "pot"), ValueError, r"this reference has no tail, only mean and deviation: rank by 'zscore'"),
    "significant at 0": (lambda w: pss.fdr_significant(-w.s, 40, 0), ValueError, r"q = 0 is outside \(0, 1\): .*as 0\.05"),
    "significant at 1": (lambda w: pss.fdr_significant(-w.s, 40, 1), ValueError, r"q = 1 is outside \(0, 1\)"),
    "significant of NaN": (lambda w: pss.fdr_significant(w.s * NAN, 40), ValueError, r"log_p has NaN entries: leave the images out"),
    "significant of probabilities": (lambda w: pss.fdr_significant(w.s, 40), ValueError, r"log_p has positive entries: expected logarithms"),
    "significant of no images": (lambda w: pss.fdr_significant(-w.s, 0), ValueError, r"n = 0 is outside .* the number of reference images"),
    "significant at q for n": (lambda w: pss.fdr_significant(-w.s, 0.05), TypeError, r"n = 0\.05 is a float: expected an int"),
    "shares of a negative unit": (lambda w: pss.stage_shares(torch.tensor([[-1]]), w.units), ValueError, r"unit -1 is outside 0\.\.7"),
    "shares of unknown units": (lambda w: pss.stage_shares(torch.tensor([[8]]), w.units), ValueError, r"unit 8 is outside 0\.\.7"),
    "shares of one ranking": (lambda w: pss.stage_shares(torch.tensor([1, 2]), w.units), ValueError, r"ids have shape \(2,\): expected \(B, k\)"),
    # --- extreme values
    "fit with two excesses": (lambda w: evt.fit_gpd(w.s, 2), ValueError, r"min_excesses is 2; .*at least 3"),
    "fit of nothing": (lambda w: evt.fit_gpd(w.s[:0]), ValueError, r"shape \(0, 8\); expected \(rows, excesses\).*not empty"),
    "fit of a cube": (lambda w: evt.fit_gpd(w.s[None]), ValueError, r"shape \(1, 40, 8\); expected \(rows, excesses\)"),
    "stability at level 1": (lambda w: statistics.threshold_stability(w.s, [0.5, 1]), ValueError, r"level = 1 is outside \(0, 1\)"),
    "hill of too many": (lambda w: statistics.hill(w.s, 8), ValueError, r"k is 8; expected 1\.\.7 for 8 values"),
    "unknown distribution": (lambda w: statistics.qq(w.s, "gumbel"), ValueError, r"dist is 'gumbel'; expected 'normal'"),
    "calibration of nothing": (lambda w: statistics.calibration(w.s * NAN), ValueError, r"log_p has no entry that is not NaN; expected"),
    # --- edits
    "edit of a unit beyond": (lambda w: edits(w, [8]), ValueError, r"unit 8 is outside 0\.\.7"),
    "edit of a negative unit": (lambda w: edits(w, [-1]), ValueError, r"unit -1 is outside 0\.\.7"),
    "edit of a unit twice": (lambda w: edits(w, [1, 2, 1]), ValueError, r"unit 1 is given twice.*edited once"),
    "edit of half a unit": (lambda w: edits(w, [0.5]), ValueError, r"ids are float64: expected integers"),
    "edit of a batch": (lambda w: edits(w, [[1]]), ValueError, r"ids have shape \(1, 1\): expected \(K,\)"),
    "unknown edit": (lambda w: edits(w, [1], "erase"), ValueError, r"unknown edit 'erase': expected one of finetune, prune"),
    "fine-tuning without steps": (lambda w: edits(w, [1], "finetune"), ValueError, r"steps go with edit='finetune'"),
    "pruning with steps": (lambda w: edits(w, [1], "prune", [torch.zeros(1, 3, 3, 3)]), ValueError, r"edit='prune' needs none"),
    "fewer steps than units": (lambda w: edits(w, [1, 2], "finetune", [torch.zeros(1, 3, 3, 3)]), ValueError, r"1 steps for 2 units: give one step per unit"),
    "steps of another shape": (lambda w: edits(w, [1, 2], "finetune", [torch.zeros(1, 3, 3, 3), torch.zeros(2)]), ValueError, r"a step of shape \(2,\) for a unit of shape \(1, 3, 3, 3\)"),
    "edit in another model": (lambda w: [0 for _ in [pss.edited(w.wide, w.units, [1]).__enter__()]], ValueError, r"the units are not of this model"),
    "curves of no unit": (lambda w: curves(w, ids=w.ids[:, :0]), ValueError, r"no unit to edit: give at least one id"),
    "curves of a unit beyond": (lambda w: curves(w, ids=with_(w.ids, (2, 0), 99)), ValueError, r"unit 99 is outside 0\.\.7"),
    "curves of a negative unit": (lambda w: curves(w, ids=-w.ids, edit="prune"), ValueError, r"unit -\d is outside 0\.\.7"),
    "curves of a unit twice": (lambda w: curves(w, ids=w.ids[:, [0, 1, 0]]), ValueError, r"unit 0 is given twice"),
    "curves of half a unit": (lambda w: curves(w, ids=w.ids / 2), ValueError, r"ids are float32: expected integers"),
    "curves of one ranking": (lambda w: curves(w, ids=w.ids[0]), ValueError, r"ids have shape \(3,\): expected \(B, K\)"),
    "curves of an unknown edit": (lambda w: curves(w, edit="erase"), ValueError, r"unknown edit 'erase'"),
    "curves of an unknown loss": (lambda w: curves(w, loss="mse"), ValueError, r"unknown loss 'mse'"),
    "curves at a rate of NaN": (lambda w: curves(w, lr=NAN, edit="prune"), ValueError, r"lr must be positive and finite, not nan"),
    "curves of fewer ids": (lambda w: curves(w, ids=w.ids[:5]), ValueError, r"6 images, 6 labels and 5 rows of ids: give as many"),
    "curves of no images": (lambda w: curves(w, images=w.x[:0], labels=w.y[:0], ids=w.ids[:0]), ValueError, r"0 images.*at least one"),
    "curves of a wrong label": (lambda w: curves(w, labels=with_(w.y, 1, 3)), ValueError, r"label 3 is outside 0\.\.2 of this model"),
    "curves of a negative label": (lambda w: curves(w, labels=with_(w.y, 1, -1), edit="prune"), ValueError, r"label -1 is outside 0\.\.2 of this model"),
    "curves of float labels": (lambda w: curves(w, labels=w.y.float()), ValueError, r"labels are torch.float32.*expected class numbers, int64"),
    "curves of NaN": (lambda w: curves(w, images=with_(w.x, (3, 0, 0, 0), NAN)), ValueError, r"images \[3\] hold NaN or infinite values"),
    "curves of a NaN model": (lambda w: curves(w, model=Answers(w.model, lambda z: z * NAN), units=Units.of(Answers(w.model, None))), ValueError, r"outputs of the unedited model are NaN for images \[0"),
    "curves of float64": (lambda w: curves(w, images=w.x.double()), ValueError, r"images are torch.float64, the model torch.float32: convert"),
    "curves at rate 0": (lambda w: curves(w, lr=0), ValueError, r"lr must be positive and finite, not 0"),
    "curves at an infinite norm": (lambda w: curves(w, step_norm=INF), ValueError, r"step_norm must be positive and finite, not inf"),
    "curves on an unknown path": (lambda w: curves(w, strategy="fast"), ValueError, r"unknown strategy 'fast': expected 'auto', 'variants' or 'in_place'"),
    "curves with ids twice": (lambda w: curves(w, image_ids=[1] * 6), ValueError, r"image_ids must be 6 different ids"),
    "curves with other units": (lambda w: curves(w, model=w.wide), ValueError, r"the units are not of this model"),
    "one curve of two images": (lambda w: pss.edit_curve(w.model, w.x[:2], w.y[:2], [1], w.units), ValueError, r"2 images, 2 labels and 1 rows of ids"),
    "one curve of a wrong label": (lambda w: pss.edit_curve(w.model, w.x[0], 7, [1], w.units), ValueError, r"label 7 is outside 0\.\.2"),
    "steps of a negative rate": (lambda w: repair.unit_steps(w.model, w.x, w.y, w.units, w.ids, lr=-1), ValueError, r"lr must be positive and finite, not -1"),
    "side_effects without steps": (lambda w: side_effects(w, edit="finetune"), ValueError, r"steps go with edit='finetune'"),
    "side_effects of no retain": (lambda w: side_effects(w, images=w.x[:0], labels=w.y[:0]), ValueError, r"0 retain images and 0 labels: .*at least one"),
    "side_effects of fewer labels": (lambda w: side_effects(w, labels=w.y[:2]), ValueError, r"6 retain images and 2 labels"),
    "side_effects of a wrong label": (lambda w: side_effects(w, labels=w.y + 3), ValueError, r"label \d is outside 0\.\.2"),
    "side_effects of a NaN image": (lambda w: side_effects(w, images=w.x * NAN), ValueError, r"retain images \[0, 1, .*hold NaN"),
    "side_effects of other steps": (lambda w: side_effects(w, edit="finetune", steps=[[]]), ValueError, r"steps of 1 images for ids of 6"),
    "summary at level 1": (lambda w: pss.statistics.summarize(w.curves, level=1), ValueError, r"level = 1 is outside \(0, 1\)"),
    "summary of other columns": (lambda w: pss.statistics.summarize(w.curves.drop(columns="k")), ValueError, r"the curves have no column 'k': they have"),
    "summary of doubles": (lambda w: pss.statistics.summarize(pd.concat([w.curves] * 2)), ValueError, r"two rows for .*name what tells them apart"),
    "difference of unknown methods": (lambda w: pss.statistics.paired_difference(w.curves.assign(method="a"), "a", "b"), ValueError, r"no rows with method = 'b': there are \['a'\]"),
    "difference without resamples": (lambda w: pss.statistics.paired_difference(w.curves.assign(method="a"), "a", "a", resamples=0), ValueError, r"resamples must be at least 1"),
    # --- cost, patches
    "cost of what is right": (lambda w: cost(w, labels=w.right), ValueError, r"are classified correctly: there is nothing to correct"),
    "cost without a retain": (lambda w: cost(w, retain=None), ValueError, r"no retain images: give retain=\(images, labels\)"),
    "cost on the mistakes": (lambda w: cost(w, retain=(w.x, w.right)), ValueError, r"6 of the retain images are among the mistakes: .*take them out"),
    "cost of 0 units": (lambda w: cost(w, k=0), ValueError, r"k = 0 is outside 1\.\.3"),
    "cost of more units": (lambda w: cost(w, k=4), ValueError, r"k = 4 is outside 1\.\.3, the ids given, and is not 8"),
    "cost through walls": (lambda w: cost(w, through="walls"), ValueError, r"unknown through 'walls': expected one of gains, weights"),
    "cost without usual images": (lambda w: cost(w, through="gains"), ValueError, r"through='gains' needs usual="),
    "cost at cap 0": (lambda w: cost(w, max_relative_step=0), ValueError, r"max_relative_step must be positive and finite, not 0"),
    "cost of a wrong label": (lambda w: cost(w, labels=w.wrong + 3), ValueError, r"label \d is outside 0\.\.2"),
    "cost of NaN guards": (lambda w: cost(w, retain=(w.retain[0] * NAN, w.retain[1])), ValueError, r"retain images \[0, 1, .*hold NaN"),
    "cost of NaN": (lambda w: cost(w, images=w.x * NAN), ValueError, r"images \[0, 1, 2, 3, 4, 5\] hold NaN"),
    "cost at a tolerance of NaN": (lambda w: cost(w, tolerance=NAN), ValueError, r"tolerance must be positive and finite, not nan"),
    "cost with ids twice": (lambda w: cost(w, image_ids="aabcde"), ValueError, r"image_ids must be 6 different ids"),
    "cost with other units": (lambda w: cost(w, model=w.wide, retain=(w.retain[0], w.wide(w.retain[0]).argmax(1))), ValueError, r"the units are not of this model"),
    "cost of fewer retain labels": (lambda w: cost(w, retain=(w.retain[0], w.retain[1][:3])), ValueError, r"labels are \(3,\) for retain images \(12, 3, 8, 8\)"),
    "patch of what is right": (lambda w: patch(w, mistakes=(w.x, w.right)), ValueError, r"are classified correctly: there is nothing to correct"),
    "patch of nothing": (lambda w: patch(w, mistakes=(w.x[:0], w.y[:0])), ValueError, r"mistakes are \(0, 3, 8, 8\): expected .* B >= 1"),
    "patch with one retain": (lambda w: patch(w, retain=(w.retain[0][:1], w.retain[1][:1])), ValueError, r"1 of 1 retain images are read correctly: give at least four"),
    "patch with a negative budget": (lambda w: patch(w, budget=-1), ValueError, r"budget must be positive and finite, not -1"),
    "patch with a margin of NaN": (lambda w: patch(w, margin=NAN), ValueError, r"margin must be positive and finite, not nan"),
    "patch that holds all out": (lambda w: patch(w, held_out=1), ValueError, r"held_out = 1 is outside"),
    "patch from weights": (lambda w: patches.Patch.load(w.tmp / "weights.safetensors"), ValueError, r"weights.safetensors is no patch of this version of pss"),
    "patch from text": (lambda w: patches.Patch.load(w.tmp / "text.safetensors"), ValueError, r"text.safetensors is damaged, or not a safetensors file"),
    "patch from nowhere": (lambda w: patches.Patch.load(w.tmp / "absent"), FileNotFoundError, r"no patch at"),
    "patch of no units": (lambda w: patches.Patch("0", reason="nothing helped").apply(w.model), ValueError, r"this patch holds no gains: nothing helped"),
    # --- input-space saliency
    **{
        f"map of {k} units": (lambda w, k=k: heat(w, k=k), ValueError, rf"k = {k} is outside 1\.\.8") for k in (0, -2, 9)
    },
    "map by an unknown method": (lambda w: heat(w, method="random"), ValueError, r"unknown method 'random': expected one of zscore"),
    "map in an unknown order": (lambda w: heat(w, order="max"), ValueError, r"unknown order 'max': expected one of absolute_first"),
    "map without a reference": (lambda w: heat(w, reference=None), ValueError, r"method 'zscore' needs a reference"),
    "map with boost 0": (lambda w: heat(w, boost=0), ValueError, r"boost must be positive and finite, not 0"),
    "map with boost NaN": (lambda w: heat(w, boost=NAN), ValueError, r"boost must be positive and finite, not nan"),
    "map with boost infinite": (lambda w: heat(w, boost=INF), ValueError, r"boost must be positive and finite, not inf"),
    "map of unknown ids": (lambda w: heat(w, ids=[8]), ValueError, r"unit 8 is outside 0\.\.7"),
    "map of float ids": (lambda w: heat(w, ids=[0.5]), ValueError, r"ids are float32: expected integers"),
    "map of ids twice": (lambda w: heat(w, ids=[1, 1]), ValueError, r"unit 1 is given twice"),
    "map of fewer ids": (lambda w: heat(w, ids=[[0], [1]]), ValueError, r"ids have 2 rows for 6 images"),
    "map of an infinite similarity": (lambda w: heat(w, similarity=lambda a, b: (a * b).sum(1) * INF), ValueError, r"not finite"),
    "map of ids and random": (lambda w: heat(w, ids=[1], random=True), ValueError, r"both say which units to boost: give one"),
    "map of too much noise": (lambda w: heat(w, noise_share=2), ValueError, r"noise_share = 2: expected at least 1, and a share in 0\.\.1"),
    "map of no copies": (lambda w: heat(w, noise_iters=0), ValueError, r"noise_iters = 0.*expected at least 1"),
    "map of a list": (lambda w: heat(w, images=w.x.tolist()), ValueError, r"images are list: expected a tensor \(B, C, H, W\)"),
    "gain map with other units": (lambda w: gain_map(w.wide, w.x, w.y, w.units), ValueError, r"the units are not of this model"),
    "map of a matrix": (lambda w: heat(w, images=w.x[0, 0]), ValueError, r"images are \(8, 8\): expected a tensor \(B, C, H, W\), or one image"),
    "map of one image with two labels": (lambda w: heat(w, images=w.x[0], labels=[0, 1]), ValueError, r"labels are \(2,\) for images \(1, 3, 8, 8\)"),
    "map of fewer labels": (lambda w: heat(w, labels=w.y[:2]), ValueError, r"labels are \(2,\) for images \(6, 3, 8, 8\)"),
    "map of a wrong label": (lambda w: heat(w, images=w.x[0], labels=9), ValueError, r"label 9 is outside 0\.\.2"),
    "map of a wrong label by ids": (lambda w: heat(w, labels=w.y + 3, ids=[1]), ValueError, r"label \d is outside 0\.\.2"),
    "map of a NaN": (lambda w: heat(w, images=with_(w.x, (0, 0, 0, 0), NAN)), ValueError, r"images \[0\] hold NaN or infinite"),
    "map with other units": (lambda w: heat(w, model=w.wide), ValueError, r"the units are not of this model"),
    "map with a reference of another model": (lambda w: heat(w, model=w.other), ValueError, r"fitted with something else \(model: reference \w+, given \w+\): fit one"),
    "map with a reference of another loss": (lambda w: heat(w, loss="logit"), ValueError, r"\(loss: reference cross_entropy, given logit\)"),
    "map with a reference of another sign": (lambda w: heat(w, signed=True), ValueError, r"\(signed: reference False, given True\)"),
    "map with a reference of other units": (lambda w: heat(w, model=w.wide, units=Units.of(w.wide)), ValueError, r"the reference has 8 units, the model 12"),
    "picture of a vector": (lambda w: plots.render_map(w.s[0]), ValueError, r"raw maps are \(8,\): expected \(B, H, W\) or \(H, W\)"),
    "picture between 99 and 90": (lambda w: plots.render_map(w.s, 99, 90), ValueError, r"percentiles 99 and 90: expected 0 <= low < high <= 100"),
    "picture of NaN": (lambda w: plots.render_map(w.s * NAN), ValueError, r"raw maps hold NaN or infinities"),
    # --- neighbours
    "no neighbours": (lambda w: pss.nearest(w.s, reference=w.plain, k=0), ValueError, r"k = 0 is outside 1\.\.39"),
    "neighbours of one": (lambda w: pss.nearest(w.s[0], reference=w.plain), ValueError, r"profiles \(8,\) and among \(8,\) do not fit: expected \(Q, U\)"),
    "neighbours among other units": (lambda w: pss.nearest(w.s, w.s[:, :5], w.plain), ValueError, r"do not fit: expected \(Q, U\) and \(N, U\)"),
    "neighbours of NaN": (lambda w: pss.nearest(with_(w.s, (4, 0), NAN), reference=w.plain), ValueError, r"profiles \[4\] are not finite"),
    "neighbours by an unknown method": (lambda w: pss.nearest(w.s, method="random"), ValueError, r"unknown method 'random': expected one of zscore"),
    "neighbours without a reference": (lambda w: pss.nearest(w.s), ValueError, r"method 'zscore' needs a reference"),
    "neighbours in an unknown stage": (lambda w: pss.nearest(w.s, reference=w.plain, units=w.units, stage="x"), ValueError, r"unknown stage 'x': expected one of one, two"),
    "neighbours that exclude 40": (lambda w: pss.nearest(w.s, reference=w.plain, exclude=torch.arange(1, 41)), ValueError, r"exclude must hold one id for each of the 40 queries, in 0\.\.39"),
    "neighbours of a stage without units": (lambda w: pss.nearest(w.s, method="raw", stage="one"), ValueError, r"stage= needs units=, the 8 units"),
    "neighbours that exclude too few": (lambda w: pss.nearest(w.s, method="raw", exclude=[0] * 39), ValueError, r"exclude must hold one id for each of the 40 queries"),
    "agreement of other queries": (lambda w: pss.statistics.agreement(w.y, w.y, [[1]]), ValueError, r"do not fit 6 queries"),
    "agreement with half the classes": (lambda w: pss.statistics.agreement(w.y, w.y, [[1]] * 6, w.y), ValueError, r"give both among_labels and among_predicted"),
    "agreement of other lengths": (lambda w: pss.statistics.agreement(w.y, w.y[:2], [[1]] * 6), ValueError, r"labels of shape \(6,\) and predicted of shape \(2,\)"),
    "agreement with unknown ids": (lambda w: pss.statistics.agreement(w.y, w.y, [[6]] * 6), ValueError, r"neighbor ids must be 0\.\.5"),
    "agreement of matrices": (lambda w: pss.statistics.agreement([[0, 1]], [[1, 0]], [[0]]), ValueError, r"expected \(N,\) both"),
    "agreement at level 2": (lambda w: pss.statistics.agreement(w.y, w.y, [[1]] * 6, level=2), ValueError, r"level = 2 is outside \(0, 1\)"),
    # --- models
    "width 0": (lambda w: models.resnet18(0), ValueError, r"width must be positive and finite, not 0"),
    "no checkpoint": (lambda w: models.load_weights(w.model, w.tmp / "absent.pth"), FileNotFoundError, r"no checkpoint at .*absent.pth"),
    "checkpoint of text": (lambda w: models.load_weights(w.model, w.tmp / "text.pth"), ValueError, r"text.pth is damaged, or holds more than tensors.*state_dict\(\) or a safetensors"),
    "safetensors of text": (lambda w: models.load_weights(w.model, w.tmp / "text.safetensors"), ValueError, r"text.safetensors is damaged, or not a safetensors file"),
    "checkpoint of numbers": (lambda w: models.load_weights(w.model, w.tmp / "numbers.pth"), ValueError, r"numbers.pth holds no state dict: expected names and tensors"),
    "checkpoint of another model": (lambda w: models.load_weights(w.wide, w.tmp / "weights.safetensors"), ValueError, r"does not fit Small: one.weight is \(4, 3, 3, 3\), in the model \(6, 3, 3, 3\)"),
    "checkpoint of other names": (lambda w: models.load_weights(w.model, w.tmp / "other.safetensors"), ValueError, r"does not fit Small: one.weight is \(1,\), in the model \(4, 3, 3, 3\); one.bias is missing, in the model \(4,\).* and 1 more"),
    "prediction of nothing": (lambda w: models.predict(w.model, w.x[:0]), ValueError, r"no images to predict: expected at least one"),
    "prediction in batches of 0": (lambda w: models.predict(w.model, w.x, 0), ValueError, r"batch_size must be positive and finite, not 0"),
    "mistakes of wrong labels": (lambda w: models.misclassified(w.model, TensorDataset(w.x, w.y + 3)), ValueError, r"label \d is outside 0\.\.2"),
    "mistakes of a NaN model": (lambda w: models.misclassified(Answers(w.model, lambda z: z * NAN), w.set), ValueError, r"outputs for \d+ images \(.*\) are NaN.*which is no class"),
    "mistakes of a model of tuples": (lambda w: models.misclassified(Answers(w.model, lambda z: (z, z)), w.set), ValueError, r"outputs are tuple: expected logits"),
    "accuracy of nothing": (lambda w: models.accuracy(w.model, TensorDataset(w.x[:0], w.y[:0])), ValueError, r"no images to predict"),
    # --- data
    "unknown set": (lambda w: data.load("cifar"), ValueError, r"unknown set 'cifar': expected one of mnist"),
    "unknown split": (lambda w: data.load("digits", "train"), ValueError, r"unknown split of digits 'train': expected one of reference"),
    "set of wrong labels": (lambda w: data.ImageSet(w.x, w.y + 3, name="a", split="b", classes="abc"), ValueError, r"label \d is outside 0\.\.2: give one name in classes per class"),
    "set of float labels": (lambda w: data.ImageSet(w.x, w.y + 0.5, name="a", split="b", classes="abc"), ValueError, r"labels are torch.float32: expected class numbers, ints"),
    "set of other lengths": (lambda w: data.ImageSet(w.x, w.y[:2], name="a", split="b", classes="abc"), ValueError, r"expected images \(N, C, H, W\) and N labels, got \(6, 3, 8, 8\) and \(2,\)"),
    "set of fewer ids": (lambda w: data.ImageSet(w.x, w.y, name="a", split="b", classes="abc", ids=["one"]), ValueError, r"6 images, but 1 ids and 6 sources"),
    "no folder": (lambda w: data.folder(w.tmp / "absent"), FileNotFoundError, r"absent is not a folder: expected one with a folder of pictures per class"),
    "folder without classes": (lambda w: data.folder(w.tmp / "pictures" / "empty"), FileNotFoundError, r"empty"),
    "folder without pictures": (lambda w: data.folder(w.tmp / "pictures" / "classes"), FileNotFoundError, r"cat"),
    "folder of other classes": (lambda w: data.folder(w.tmp / "pictures" / "classes", classes=["dog"]), ValueError, r"folders that are not in classes: cat"),
    "folder as a split": (lambda w: data.open_set("x", "half", root=w.tmp), ValueError, r"unknown split 'half': expected one of train"),
    "MNIST that is not there": (lambda w: data.torchvision_set("MNIST", w.tmp), FileNotFoundError, r"MNIST's test files are not in .*PSS downloads nothing"),
    "SVHN that is not there": (lambda w: data.torchvision_set("SVHN", w.tmp), FileNotFoundError, r"SVHN's test files are not in .*PSS downloads nothing"),
    "unknown split of MNIST": (lambda w: data.torchvision_set("MNIST", w.tmp, "extra"), ValueError, r"unknown split of MNIST 'extra': expected one of train, test"),
    "unknown full set": (lambda w: data.torchvision_set("mnist", w.tmp), ValueError, r"unknown set 'mnist': expected one of MNIST, SVHN"),
    # --- pictures
    **{
        f"cut picture, {kind}": (lambda w, kind=kind: look(w, f"cut.{kind}"), ValueError, rf"cut.{kind} is (damaged, cut off|not a picture that can be read)")
        for kind in ("png", "jpg", "gif", "tif", "webp", "bmp")
    },
    "picture with a flipped bit": (lambda w: look(w, "flipped.png"), ValueError, r"flipped.png is damaged, cut off"),
    "text for a picture": (lambda w: look(w, "text.png"), ValueError, r"text.png is not a picture that can be read .*: expected one of BMP, GIF, JPEG, PNG"),
    "empty picture": (lambda w: look(w, "nothing.png"), ValueError, r"nothing.png is not a picture that can be read"),
    "SVG for a picture": (lambda w: look(w, "vector.png"), ValueError, r"vector.png is not a picture that can be read"),
    "PostScript for a picture": (lambda w: look(w, "program.eps"), ValueError, r"program.eps is not a picture that can be read"),
    "pickle for a picture": (lambda w: look(w, "code.png"), ValueError, r"code.png is not a picture that can be read"),
    "picture of floats": (lambda w: look(w, "floats.tif"), ValueError, r"floats.tif .*floating-point numbers: save it with 8 or 16 bits"),
    "picture of 1 by 400": (lambda w: look(w, "line.png"), ValueError, r"line.png has 1 x 400 pixels: at most 100 times as long as wide"),
    "decompression bomb": (lambda w: look(w, "bomb.png"), ValueError, r"bomb.png has too many pixels .*at most 67,108,864 are read"),
    "too large a picture": (lambda w: look(w, "large.png"), ValueError, r"large.png has 9000 x 9000 pixels: at most 67,108,864 are read; make it smaller"),
    "picture over its own cap": (lambda w: look(w, "whole.png", max_pixels=1000), ValueError, r"whole.png has 30 x 40 pixels: at most 1,000 are read"),
    "no picture": (lambda w: look(w, "absent.png"), FileNotFoundError, r"absent.png is not there: expected a picture file"),
    "folder for a picture": (lambda w: look(w, "empty"), FileNotFoundError, r"empty is a folder: expected a picture file"),
    "picture that links to itself": (lambda w: look(w, "self"), FileNotFoundError, r"self is not there: expected a picture file"),
    # --- networks by name
    "weights of no such name": (lambda w: models.load("squeezenet1_1", "absent.pth"), FileNotFoundError, r"expected published or random or IMAGENET1K_V1, or a checkpoint"),
    "unknown network": (lambda w: models.load("resnet51"), ValueError, r"unknown model 'resnet51': did you mean 'resnet50'"),
    "network of no module": (lambda w: models.load("no.such.module:thing"), ValueError, r"is not found \(No module named 'no'\): .*; install its package, or put its folder on PYTHONPATH"),
    "network of no callable": (lambda w: models.load("pss.models:resnet19"), ValueError, r"is not found .*no attribute 'resnet19'.*expected package.module:callable"),
    "network that is none": (lambda w: models.load("builtins:dict"), ValueError, r"builtins:dict gave a dict: expected a callable that gives a torch.nn.Module"),
    "network without its weights": (lambda w: models.load("digits", w.tmp / "absent.pth"), FileNotFoundError, r"absent.pth.*no such file"),
    "network with other weights": (lambda w: models.load("digits", w.tmp / "weights.safetensors"), ValueError, r"weights.safetensors does not fit"),
    "no description": (lambda w: models.load(str(w.tmp / "absent.yaml")), FileNotFoundError, r"no model description at .*absent.yaml"),
    "description with a tag": (lambda w: models.load(str(w.tmp / "tag.yaml")), ValueError, r"tag.yaml cannot be read as YAML: could not determine a constructor for the tag .*python/object/apply"),
    "description with unknown keys": (lambda w: models.load(str(w.tmp / "keys.yaml")), ValueError, r"keys.yaml has unknown keys weight: expected some of model"),
    "description of a list": (lambda w: models.load(str(w.tmp / "list.yaml")), ValueError, r"list.yaml is \[1, 2\]: expected keys and values"),
    "label of no class": (lambda w: w.digits.label("eleven"), ValueError, r"eleven"),
    "label beyond the classes": (lambda w: w.digits.label(10), ValueError, r"10.*0\.\.9"),
    "reference images of no folder": (lambda w: models.reference_set(w.digits, w.tmp / "absent"), FileNotFoundError, r"absent is not a folder"),
    "more reference images than there are": (lambda w: models.reference_set(w.digits, count=10_000), ValueError, r"count = 10000 is outside 1..1000, the number of images"),
    "reference images of other classes": (lambda w: models.reference_set(w.digits, w.tmp / "pictures" / "classes"), ValueError, r"Expected folders named by classes of digits"),
    "reference of another network": (lambda w: models.reference(w.digits, Units.of(w.digits.model), w.tmp / "reference.safetensors"), ValueError, r"the reference has 8 units, the model 1200"),
    # --- notebooks and YAML
    "notebook without parameters": (lambda w: parameters.parameters_of(w.tmp / "01_none.ipynb"), ValueError, r"01_none.ipynb has 0 cells tagged 'parameters': expected one"),
    "notebook with two parameter cells": (lambda w: parameters.parameters_of(w.tmp / "03_two.ipynb"), ValueError, r"03_two.ipynb has 2 cells tagged 'parameters': expected one"),
    "notebook without this parameter": (lambda w: execution.run_notebook(w.tmp / "02_one.ipynb", w.tmp / "out", {"facto": 1}), ValueError, r"02_one.ipynb has no parameter facto: it has factor"),
    "no notebooks": (lambda w: sweep.find_notebooks([w.tmp / "taken"]), ValueError, r"no notebook NN_\*.ipynb in .*taken"),
    "neither notebook nor folder": (lambda w: sweep.find_notebooks([w.tmp / "text.pth"]), ValueError, r"text.pth is neither a notebook nor a folder"),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_is_refused(w, name, record_property):
    call, kind, message = CASES[name]
    before = state_of(w.model), state_of_process(), files_of(w.tmp)
    with pytest.raises(kind) as caught:
        call(w)
    assert type(caught.value) is kind, caught.value
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert (state_of(w.model), state_of_process(), files_of(w.tmp)) == before
    record_property("count bad inputs", 1)


def test_enough_cases():
    assert len(CASES) >= 300


# --- pictures that are odd, but good: the right pixels, worked out from what was put in ---------------------------------

RNG = np.random.default_rng(3)
COLOURS = RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (12, 9), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (12, 9, 1), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (12, 9)).astype(np.uint16)
INK = RNG.integers(0, 256, (12, 9, 4), dtype=np.uint8)
PALETTE = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
INDEX = RNG.integers(0, 16, (12, 9), dtype=np.uint8)
TURNED = {  # what each orientation asks for, by the EXIF standard: where the first row and column of the file go
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def on_white(colours, alpha):
    share = alpha / 255.0
    return colours * share + 255 * (1 - share)


def three(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def with_palette(**options):
    image = Image.fromarray(INDEX).convert("P")
    image.putdata(INDEX.ravel().tolist())
    image.putpalette(PALETTE.ravel().tolist())
    return image, "png", options


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return {"exif": tags}


# name: (picture to be saved, format, options), the pixels that it shows
PICTURES = {
    "RGB": ((Image.fromarray(COLOURS), "png", {}), COLOURS),
    "grey": ((Image.fromarray(GREY), "png", {}), three(GREY)),
    "grey, BMP": ((Image.fromarray(GREY), "bmp", {}), three(GREY)),
    "RGB, PPM": ((Image.fromarray(COLOURS), "ppm", {}), COLOURS),
    "black and white": ((Image.fromarray(GREY > 99), "png", {}), three(255 * (GREY > 99))),
    "alpha": ((Image.fromarray(np.dstack([COLOURS, ALPHA])), "png", {}), on_white(COLOURS, ALPHA)),
    "grey with alpha": ((Image.fromarray(np.dstack([GREY, ALPHA])), "png", {}), on_white(three(GREY), ALPHA)),
    "palette": (with_palette(), PALETTE[INDEX]),
    "palette with a hole": (with_palette(transparency=5), np.where((INDEX == 5)[..., None], 255, PALETTE[INDEX])),
    "16 bits": ((Image.fromarray(DEEP), "png", {}), three(DEEP / 257)),
    "16 bits, TIFF": ((Image.fromarray(DEEP), "tiff", {}), three(DEEP / 257)),
    "CMYK": (
        (Image.frombytes("CMYK", (9, 12), INK.tobytes()), "tiff", {}),
        (255.0 - INK[..., :3]) * (255.0 - INK[..., 3:]) / 255,
    ),
    "CMYK JPEG": (
        (Image.new("CMYK", (16, 16), (10, 200, 90, 30)), "jpeg", {"quality": 100}),
        np.broadcast_to((255.0 - np.array([10, 200, 90])) * 225 / 255, (16, 16, 3)),
    ),
    "one pixel": ((Image.new("RGB", (1, 1), (1, 2, 3)), "png", {}), np.array([[[1, 2, 3]]])),
    "animation": (
        (Image.fromarray(GREY), "gif", {"save_all": True, "append_images": [Image.fromarray(255 - GREY)]}),
        three(GREY),
    ),
    **{f"orientation {n}": ((Image.fromarray(COLOURS), "png", exif(n)), turn(COLOURS)) for n, turn in TURNED.items()},
    "orientation of nonsense": ((Image.fromarray(COLOURS), "png", exif(99)), COLOURS),
}


@pytest.mark.parametrize("name", PICTURES)
def test_odd_picture_shows_the_right_pixels(tmp_path, name, record_property):
    (image, kind, options), expected = PICTURES[name]
    path = tmp_path / "picture.jpg"  # the content counts, not the name
    image.save(path, format=kind, **options)
    shown = data.read_image(path)
    assert shown.mode == "RGB"
    assert np.asarray(shown).shape == expected.shape
    slack = 2 if name == "CMYK JPEG" else 1 if expected.dtype.kind == "f" else 0  # rounding
    assert np.abs(np.asarray(shown, float) - expected).max() <= slack
    record_property("count odd pictures", 1)


NAMES = ("plain.png", "with space.png", "日本語.png", "quo'te\".png", "é\n.PNG", "-rf.png", "a;b$(c)%20&.png")
NAMES += ("<img src=x onerror=alert(1)>.png",)


def test_strange_names_are_read(tmp_path):
    folder = tmp_path / "クラス 一" / "0 <b>"
    folder.mkdir(parents=True)
    for name in NAMES:
        Image.fromarray(COLOURS).save(folder / name, format="png")
    (folder / "link.png").symlink_to(folder / "plain.png")
    (tmp_path / "クラス 一" / "1 linked").symlink_to(folder)
    tree = data.folder(tmp_path / "クラス 一")
    assert len(tree) == 2 * (len(NAMES) + 1) and tree.classes == ["0 <b>", "1 linked"]
    assert {Path(i).name for i in tree.ids} == {*NAMES, "link.png"}
    first = data.preprocess(Image.fromarray(COLOURS))
    assert all(torch.equal(image, first) for image, _ in tree)


def test_unreadable_picture_is_an_error_or_skipped(w, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("0.png", "1.png", "2.png"):
        Image.fromarray(COLOURS).save(tmp_path / "a" / name)
    locked = tmp_path / "a" / "1.png"
    locked.chmod(0)
    if os.access(locked, os.R_OK):  # the superuser reads everything
        plain = Path.open

        def refuses(self, *args, **kwargs):
            if self == locked:
                raise PermissionError(13, "Permission denied", str(self))
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(PermissionError, match=r"1\.png"):
        data.read_image(locked)
    tree = data.folder(tmp_path)
    with pytest.raises(
        ValueError, match=r"item 1 of the data set could not be read \(PermissionError.*1\.png.*on_error='skip'"
    ):
        pss.profile_dataset(w.other, tree, path=tmp_path / "s", progress=False)
    store = pss.profile_dataset(w.other, tree, path=tmp_path / "t", progress=False, on_error="skip")
    assert store.finished.tolist() == [True, False, True] and "PermissionError" in store.skipped[1]


# --- columns without a tail ----------------------------------------------------------------------------------------------

COLUMNS = {  # a column of 40 reference saliencies, whether it is dead, and whether a tail can be fitted
    "constant": (np.full(40, 0.3), True, False),
    "zero": (np.zeros(40), True, False),
    "one value but for one": (np.r_[np.zeros(39), 1.0], False, False),
    "tied": (np.repeat([0.1, 0.2, 0.3, 0.4], 10), False, False),
    "two values": (np.tile([1e-9, 1e-3], 20), False, False),
    "far apart": (np.r_[np.full(20, 1e-3), 10.0 ** np.linspace(-3, 30, 20)], False, False),
    "heavy": (-(np.log((np.arange(40) + 0.5) / 40) ** 3), False, True),
}


def test_columns_without_a_tail_are_reported_and_ranked():
    columns = np.stack([values for values, *_ in COLUMNS.values()], axis=1)
    kept = columns.copy()
    reference = Reference.fit(columns, level=0.6)
    assert np.array_equal(columns, kept)  # never written to
    assert reference.dead.tolist() == [dead for _, dead, _ in COLUMNS.values()]
    assert reference.fitted.tolist() == [fitted for _, _, fitted in COLUMNS.values()]
    new = torch.from_numpy(np.stack([kept.max(axis=0) * 3 + 1e-6, kept.min(axis=0)]))
    for method in pss.RANKINGS:
        if not {"units", "scale_free"} & set(pss.RANKINGS[method].needs):
            ids = pss.rank(new, reference, method)
            assert (ids.sort(dim=1).values == torch.arange(len(COLUMNS))).all(), method
            assert set(ids[0, -2:].tolist()) == {0, 1}, method  # the dead ones last
    for values in (reference.zscore(new), reference.tail_score(new), reference.ratio(new)):
        assert values.isfinite().all()


def test_an_edit_that_overflows_predicts_no_class(w):
    """NaN is larger than every number for argmax: the first class would be "predicted"."""
    logits = torch.tensor([[0.1, 0.2, 0.3], [NAN, NAN, NAN], [0.0, NAN, 1.0]])
    assert repair.predicted(logits).tolist() == [2, -1, -1]
    zeros, step = torch.zeros(6, dtype=torch.int64), torch.full((1, 4, 3, 3), NAN)
    table = repair.side_effects(w.other, w.units, [[5]], w.x, zeros, "finetune", [[step]], progress=False)
    assert table["accuracy_after"].item() == 0
    curves = pss.edit_curve(w.other, w.x[0], 0, [5], w.units, loss=_steep, lr=1e30)
    assert curves["predicted"].tolist()[1:] == [-1] and not curves["corrected"].iloc[1]


def _steep(outputs, labels):
    return 1e30 * outputs.sum(dim=1)


def test_agreement_takes_tensors_that_require_gradients(w):
    """As it takes those of another device: through the CPU, detached."""
    ids = torch.tensor([[1], [0], [1], [0], [1], [0]])
    table = pss.statistics.agreement(w.y, w.y, ids)
    pd.testing.assert_frame_equal(table, pss.statistics.agreement(w.y.numpy(), w.y.numpy(), ids.numpy()))
