"""The explorer of the site: what `pss` says of some misclassified images, for a page without a server.

``python -m pss explorer FOLDER`` writes one small file per image and an index, and puts the plotting library (bokeh,
from its Python package) beside them. Each file is JSON inside one call, ``pssExplorer(name, {...})``: as a script it
loads over http and from a folder on disk alike, where a browser refuses to fetch JSON. Everything is computed here;
the page only draws. Values of all units are kept in 8 bits each (`pack`), those of the top units to 4 digits.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from PIL import Image, ImageFilter
from torch import Tensor, nn

import pss
from pss import editing, models, plots
from pss.apps.execution import source_hash
from pss.data.image_set import to_pixels
from pss.reference import Reference
from pss.storage.digests import digest
from pss.storage.places import cache_folder
from pss.storage.tensors import bytes_of
from pss.storage.whole import write_whole
from pss.units import Units

# Rankings of the gradient, and of what a unit contributes to the margin: which to prune, as `pss.rank` says.
METHODS = ("zscore", "pot", "scale_free_pot", "raw", "gain", "layer_matched_random")
COLORS, LABELS = plots.METHOD_COLORS | {"gain": "#009E73"}, plots.METHOD_LABELS | {"gain": "gain of the margin"}
HEIGHTS = METHODS[:5]  # random units are matched to the layers of POT's: its chart stands for both
EDITS = ("finetune", "prune")
K = 25
MAP_UNITS, BOOST = 10, 100.0  # of the input-space map
RARE = 6.0  # -log10 p is drawn up to here: a bounded tail has no probability beyond its end
LEVELS = 255  # the last one says "no value"
_VIEWS = (  # photograph, what was done to it, and how: see _view
    ("clock", "whole", (0, 0, 1, 1)),
    ("clock", "cropped", (0, 0.2, 0.6, 0.8)),
    ("clock", "cropped", (0.25, 0.25, 0.75, 0.75)),
    ("coffee", "cropped", (0.5, 0.5, 1, 1)),
    ("coffee", "blurred", (8,)),
    ("chelsea", "cropped", (0, 0, 0.8, 0.8)),
    ("chelsea", "blurred", (4,)),
    ("camera", "cropped", (0, 0.4, 0.6, 1)),
)


@dataclass(frozen=True)
class Collection:
    """Misclassified images of one network, and what is needed to explain them.

    Attributes
    ----------
    name : str
        First part of every file name.
    images, labels : Tensor, shape (B, C, H, W), (B,)
    ids, views : sequence of B str
        Name of each image, and how it was cut (``whole``, ``cropped``, ``blurred``; empty where it was not).
    plain, scale_free : Reference
    retain : pair of Tensor
        Images that the model has right, and their labels: what an edit breaks is counted there.
    learning_rate : float
        Of the one fine-tuning step.
    elsewhere : sequence of int
        Numbers of edits after which the retain images are read again.
    """

    name: str
    network: models.Network
    units: Units
    images: Tensor
    labels: Tensor
    ids: Sequence[str]
    views: Sequence[str]
    plain: Reference
    scale_free: Reference
    retain: tuple[Tensor, Tensor]
    learning_rate: float = 1e-3
    elsewhere: Sequence[int] = (1, 5, 10, 25)

    @property
    def model(self) -> nn.Module:
        """The network without what belongs to it."""
        return self.network.model

    def pixels(self, image: Tensor) -> np.ndarray:
        """(C, H, W) to (H, W, 3), uint8."""
        return to_pixels(self.network.to_image(image))

    def reference(self, method: str) -> Reference:
        """What a ranking takes as usual."""
        return self.scale_free if method == "scale_free_pot" else self.plain

    def profiles(self, position: int) -> dict[str, Tensor]:
        """What each ranking ranks on an image, (1, U)."""
        of = self.model, self.images[position : position + 1], self.labels[position : position + 1], self.units
        gains = pss.profile(*of, of="gain", signed=True, loss="logit_difference")
        return dict.fromkeys(METHODS, pss.profile(*of)) | {"gain": gains}

    def top(self, profiles: dict[str, Tensor], method: str) -> Tensor:
        """Ids of the first K units, (1, K)."""
        ranking = "raw" if method == "gain" else method
        return pss.rank(profiles[method], self.reference(method), ranking, K, self.units)


def digits(count: int = 24, retain: int = 200) -> Collection:
    """Misclassified digits of the built-in test set, each true class in turn, the image of the tour first."""
    network, data = models.load("digits"), pss.data.digits("test")
    wrong = models.misclassified(network.model, data)
    turn = wrong.groupby("label").cumcount().sort_values(kind="stable").index  # the first of each class, the second, …
    chosen = [658, *turn.drop(658)][:count]
    others = data.subset(np.random.default_rng(0).permutation(len(data))[: 2 * retain]).tensors
    images, labels, ids = data.images[chosen], data.labels[chosen], [str(i) for i in chosen]
    return _collection("digits", network, images, labels, ids, [""] * len(ids), others, retain)


def photographs(count: int = 8, retain: int = 12) -> Collection:
    """Photographs, whole, cropped and blurred, that EfficientNet-Lite0 misreads.

    Its reference is measured on a few hundred crops of photographs: enough to show, too few to trust.
    """
    network = models.load("efficientnet_lite0")
    known = {photo.name: photo for photo in pss.data.photographs()}
    images = torch.stack([network.preprocess(_view(known[name].image, how)) for name, _, how in _VIEWS])
    said = models.predict(network.model, images).argmax(dim=1).tolist()
    fits = {photo.name: (photo.label, *photo.also) for photo in known.values()}
    wrong = [i for i, (name, _, _) in enumerate(_VIEWS) if said[i] not in fits[name]][:count]
    labels = torch.tensor([known[_VIEWS[i][0]].label for i in wrong])
    crops = models.reference_set(network)
    others = torch.stack([crops[i][0] for i in range(3 * retain)]), crops.labels[: 3 * retain]
    ids, views = [f"{_VIEWS[i][0]}-{i}" for i in wrong], [_VIEWS[i][1] for i in wrong]
    return _collection("photographs", network, images[wrong], labels, ids, views, others, retain, elsewhere=(K,))


def _collection(name, network, images, labels, ids, views, others, retain, **more) -> Collection:
    """What is usual for the network, and of the others the first that it has right, beside the images."""
    units, (x, y) = Units.of(network.model), others
    right = (models.predict(network.model, x).argmax(dim=1) == y).nonzero()[:retain, 0]
    plain, free = (models.reference(network, units, scale_free=free, progress=False) for free in (False, True))
    return Collection(name, network, units, images, labels, ids, views, plain, free, (x[right], y[right]), **more)


def _view(picture: Image.Image, how: tuple[float, ...]) -> Image.Image:
    """The photograph cut to a part, (left, top, right, bottom) as shares of its sides, or blurred by (radius,)."""
    if len(how) == 1:
        return picture.filter(ImageFilter.GaussianBlur(how[0]))
    return picture.crop([round(share * side) for share, side in zip(how, picture.size * 2, strict=True)])


def pack(values: np.ndarray) -> dict[str, Any]:
    """Numbers in 8 bits each, evenly spaced from the smallest to the largest; what is not finite is missing.

    ``low + step * level`` is right to within half a step, ``(high - low) / 508``: on a chart 250 pixels high half a
    pixel.
    """
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    step = (high - low) / (LEVELS - 1) or 1.0
    levels = np.full(len(values), LEVELS, np.uint8)
    levels[finite] = np.round((values[finite] - low) / step)
    return {"low": low, "step": step, "data": base64.b64encode(levels.tobytes()).decode()}


def height(profile: Tensor, method: str, reference: Reference) -> np.ndarray:
    """What the chart draws of a profile (1, U): asinh of z or gain, -log10 p (up to `RARE`), log10 of saliency."""
    if method in ("zscore", "gain"):
        return np.arcsinh((reference.zscore(profile) if method == "zscore" else profile)[0].double().numpy())
    if method == "raw":
        return np.log10(profile[0].double().where(profile[0] > 0, torch.nan).numpy())
    return (-reference.log_tail_probability(profile)[0] / math.log(10)).clamp(0, RARE).numpy()


def describe(collection: Collection, position: int) -> dict[str, Any]:
    """All that the page shows of one image, plain numbers and small pictures.

    Returns
    -------
    dict
        ``predicted`` and ``confidence`` (true class, predicted class) before any edit; ``significant``, how many units
        are at a false-discovery rate of 5%; ``picture``; ``heights`` of the chart by method (`pack`); and for each of
        the ``methods`` ``top`` (unit ids), ``z``, ``log10_p`` and ``saliency`` of those, ``map`` (a picture), and for
        each edit ``true`` and ``wrong`` confidence and ``predicted`` for k = 0..25, and ``still_right`` after
        ``elsewhere`` edits.
    """
    c = collection
    image, label = c.images[position : position + 1], c.labels[position : position + 1]
    profiles = c.profiles(position)
    tops = torch.cat([c.top(profiles, method) for method in METHODS])  # (methods, K)
    many = image.expand(len(tops), -1, -1, -1), label.expand(len(tops))
    how = {"lr": c.learning_rate, "progress": False}
    curves = {edit: editing.edit_curves(c.model, *many, tops, c.units, edit, **how) for edit in EDITS}
    steps = editing.unit_steps(c.model, image, label, c.units, tops.unique()[None], lr=c.learning_rate)[0]
    steps = dict(zip(tops.unique().tolist(), steps, strict=True))
    before = models.predict(c.model, image).softmax(dim=1)[0]
    predicted = int(before.argmax())
    found = {
        "name": f"{c.name}-{c.ids[position]}",
        "label": int(label),
        "predicted": predicted,
        "confidence": _short([before[int(label)], before[predicted]]),
        "significant": int(pss.fdr_significant(c.plain.log_tail_probability(profiles["pot"]), c.plain.n).sum()),
        "picture": picture(c.pixels(image[0])),
        "heights": {method: pack(height(profiles[method], method, c.reference(method))) for method in HEIGHTS},
        "methods": {},
    }
    for row, (method, top) in enumerate(zip(METHODS, tops, strict=True)):
        found["methods"][method] = {
            **_table(profiles, method, top, c),
            "map": _map(image, label, method, top, c),
            **{edit: _edited(edit, curve[curve["image"] == row], top, steps, c) for edit, curve in curves.items()},
        }
    return found


def _table(profiles: dict[str, Tensor], method: str, top: Tensor, c: Collection) -> dict[str, list]:
    """The first units by a ranking: z-score and tail probability of their gradient, and what is ranked."""
    gradient, reference = profiles["zscore"], c.reference(method)
    log_p = reference.log_tail_probability(gradient)[0, top] / math.log(10)
    return {
        "top": top.tolist(),
        "z": _short(reference.zscore(gradient)[0, top]),
        "log10_p": [None if math.isinf(p) else p for p in _short(log_p)],  # None: beyond the end of a bounded tail
        "saliency": _short(profiles[method][0, top]),
    }


def _edited(edit: str, curve: pd.DataFrame, top: Tensor, steps: dict[int, Tensor], c: Collection) -> dict[str, list]:
    """What each edit does to the image, and the share of the retain images that stay right after the first edits."""
    shares = []
    for k in c.elsewhere:
        own = [[steps[u] for u in top[:k].tolist()]] if edit == "finetune" else None
        table = editing.side_effects(c.model, c.units, top[None, :k], *c.retain, edit, own, progress=False)
        shares.append(table["still_right"][0])
    return {
        "true": _short(curve["confidence_true"]),
        "wrong": _short(curve["confidence_wrong"]),
        "predicted": curve["predicted"].tolist(),
        "still_right": _short(shares),
    }


def _map(image: Tensor, label: Tensor, method: str, top: Tensor, c: Collection) -> str:
    """The input-space map over the darkened image, coloured as in `pss.plots.overlay`."""
    standard = {"scale_free_pot": "pot", "layer_matched_random": "pot", "gain": "zscore"}.get(method, method)
    which = {"boost": BOOST, "method": standard, "ids": top[:MAP_UNITS]}
    raw = pss.input_saliency(c.model, image, label, c.units, c.reference(method), **which)
    heat = plots.render_map(raw)[0].clamp(0, 1).numpy()
    grey = 0.6 * c.pixels(image[0]).mean(axis=2, keepdims=True) / 255
    alpha = (1.5 * heat).clip(0, 1)[..., None]
    return picture(to_pixels((1 - alpha) * grey + alpha * plt.colormaps["autumn"](heat)[..., :3]))


def picture(pixels: np.ndarray, size: int | None = None) -> str:
    """(H, W, 3) uint8 as a data URI: PNG for what is small, WebP for photographs."""
    image = Image.fromarray(pixels)
    if size is not None and image.width > size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    kind, options = ("png", {"optimize": True}) if image.width <= 64 and size is None else ("webp", {"quality": 80})
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _short(values: Any) -> list[float]:
    """Numbers to 4 digits."""
    return [float(f"{float(v):.4g}") + 0.0 for v in values]


def index(collections: Sequence[Collection], found: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """What the page needs before any image is chosen: the images of each collection, its layers, names and colours."""
    sets = {}
    for c, of_images in zip(collections, found, strict=True):
        predicted = [m[edit]["predicted"] for d in of_images for m in d["methods"].values() for edit in EDITS]
        used = {d["label"] for d in of_images}.union(*predicted)
        colors = {s: plt.matplotlib.colors.to_hex(v) for s, v in plots.stage_colors(c.units.stages).items()}
        sets[c.name] = {
            "layers": [
                [layer.name, stage, c.units.span(number).start]
                for number, (layer, stage) in enumerate(zip(c.units.layers, c.units.layer_stages, strict=True))
            ],
            "colors": colors,
            "units": len(c.units),
            "classes": {i: c.network.classes[i] for i in sorted(used)},
            "reference": c.plain.n,
            "retain": len(c.retain[1]),
            "elsewhere": c.elsewhere,
            "rate": c.learning_rate,
            "images": [
                {
                    "name": d["name"],
                    "label": d["label"],
                    "predicted": d["predicted"],
                    "view": c.views[i],
                    "thumbnail": d["picture"] if len(d["picture"]) < 3000 else picture(c.pixels(x), 64),
                }
                for i, (d, x) in enumerate(zip(of_images, c.images, strict=True))
            ],
        }
    colors = {method: COLORS[method] for method in METHODS}
    options = {"k": K, "map_units": MAP_UNITS, "boost": BOOST, "rare": RARE}
    return {"version": pss.__version__, "methods": colors, **options, "sets": sets}


def write(folder: Path | str, collections: Sequence[Collection] | None = None, jobs: int = 2) -> list[Path]:
    """Write ``data/index.js``, ``data/<image>.js`` and the plotting library below a folder.

    Descriptions are cached by what they are made of (this code, weights, references, images), so that only the first
    run takes its time.

    Parameters
    ----------
    folder : path
        Beside ``explorer.js``.
    collections : sequence of Collection, optional
        `digits` and `photographs` by default.
    jobs : int
        Processes.
    """
    folder = Path(folder)
    collections = [digits(), photographs()] if collections is None else list(collections)
    code = source_hash()
    tasks = [delayed(_cached)(c, i, code) for c in collections for i in range(len(c.images))]
    with warnings.catch_warnings():  # joblib starts a worker anew when its memory has grown
        warnings.filterwarnings("ignore", "A worker stopped", UserWarning)
        results = iter(Parallel(n_jobs=jobs)(tasks))
    found = [[next(results) for _ in c.images] for c in collections]
    content = {d["name"]: d for of_images in found for d in of_images} | {"index": index(collections, found)}
    written = {folder / "data" / f"{name}.js": (name, value) for name, value in content.items()}
    for path, (name, value) in written.items():
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        write_whole(path, f"pssExplorer({json.dumps(name)}, {text});\n")
    return [*written, *_copy_bokeh(folder / "vendor")]


def _cached(collection: Collection, position: int, code: str) -> dict[str, Any]:
    path = cache_folder() / "explorer" / f"{_fingerprint(collection, position, code)}.json"
    if not path.exists():
        write_whole(path, json.dumps(describe(collection, position)))
    return json.loads(path.read_text())


def _fingerprint(c: Collection, position: int, code: str) -> str:
    """Of all that a description depends on."""
    plain = [c.name, c.ids[position], models.fingerprint(c.model), c.units.fingerprint, c.learning_rate, c.elsewhere]
    tensors = [c.images[position], c.labels[position], *c.retain]
    tensors += [t for r in (c.plain, c.scale_free) for t in (r.mean, r.std, r.threshold, r.xi, r.scale)]
    return digest(repr(plain), code, *(bytes_of(tensor) for tensor in tensors))[:24]


def widget(collection: Collection | None = None) -> Any:
    """The explorer inside JupyterLab: controls, and below them the story of the chosen image, computed as one chooses.

    Needs the extra ``lab``. The digits by default.

    Returns
    -------
    ipywidgets.VBox
        With ``image``, ``method``, ``edit`` and ``k``, whose ``value`` can also be set from code, and ``picture`` (PNG)
        and ``text`` (HTML), which follow.
    """
    import ipywidgets

    c = digits() if collection is None else collection
    said = models.predict(c.model, c.images).argmax(dim=1).tolist()
    classes = c.network.classes
    names = [f"{classes[y]}, read as {classes[p]} ({n})" for y, p, n in zip(c.labels, said, c.ids, strict=True)]
    image = ipywidgets.Dropdown(options=list(zip(names, range(len(names)), strict=True)), description="image")
    method = ipywidgets.Dropdown(options=[(LABELS[m], m) for m in METHODS], description="ranking")
    edit = ipywidgets.RadioButtons(options=[("fine-tune", "finetune"), ("prune", "prune")], description="edit")
    k = ipywidgets.IntSlider(10, 1, K, description="filters", continuous_update=False)
    box = ipywidgets.VBox([image, method, edit, k, ipywidgets.HTML(), ipywidgets.Image(format="png")])
    box.image, box.method, box.edit, box.k, box.text, box.picture = box.children

    def show(_: Any = None) -> None:
        box.text.value, box.picture.value = _story(c, image.value, method.value, edit.value, k.value)

    for control in (image, method, edit, k):
        control.observe(show, "value")
    show()
    return box


def _story(c: Collection, position: int, method: str, edit: str, k: int) -> tuple[str, bytes]:
    """What the widget shows: HTML with the table of the edited units, and the picture of `pss.plots.story`."""
    image, label = c.images[position : position + 1], c.labels[position : position + 1]
    profiles = c.profiles(position)
    top = c.top(profiles, method)[0, :k]
    steps = editing.unit_steps(c.model, image, label, c.units, top[None], lr=c.learning_rate)[0]
    before = models.predict(c.model, image).softmax(dim=1)[0]
    with editing.edited(c.model, c.units, top, edit, steps if edit == "finetune" else None):
        after = models.predict(c.model, image).softmax(dim=1)[0]
    y = int(label)
    text = f"<p>confidence in {c.network.classes[y]}: {before[y]:.3f} before, {after[y]:.3f} after</p>"
    table = pd.DataFrame({"filter": [c.units.name(u) for u in top.tolist()], **_table(profiles, method, top, c)})
    unusual = c.plain.zscore(profiles["zscore"])[0]
    figure = plots.story(c.network.to_image(image[0]), unusual, c.units, top, before, after, y)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return text + table.head(10).to_html(index=False), file.getvalue()


def _copy_bokeh(folder: Path) -> list[Path]:
    """The plotting library and its licence, from the Python package."""
    import bokeh

    package = Path(bokeh.__file__).parent
    files = [package / "server" / "static" / "js" / f"{name}.min.js" for name in ("bokeh", "bokeh-api")]
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, folder / file.name)) for file in [*files, *package.glob("LICENSE.txt")]]


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Give the parser the options of ``explorer``."""
    parser.add_argument("folder", help="where explorer.js lies, as site/_static/explorer")
    parser.add_argument("--digits", type=int, default=24, help="how many (24)")
    parser.add_argument("--photographs", type=int, default=8, help="how many (8); 0 leaves them out")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")


def main(options: argparse.Namespace) -> None:
    """Write the explorer, and say how large it is."""
    collections = [digits(options.digits)] + ([photographs(options.photographs)] if options.photographs else [])
    written = write(options.folder, collections, options.jobs)
    size = sum(path.stat().st_size for path in written if path.parent.name == "data")
    print(f"explorer: {len(written)} files, data {size / 1e6:.1f} MB, in {options.folder}")
