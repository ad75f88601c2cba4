"""The steps of notebook 11: one image of a user's own, a user's own model, and what can be said about the two.

Thin pieces that put the rest of `pss` together for one image: which image is meant, which units stand out on it, what
their repair does to it and to others, and whether a patch can be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pss import data
from pss import models as zoo
from pss.apps.pages import sentence
from pss.editing import edit_curve, side_effects, unit_steps
from pss.models import predict
from pss.patches import Patch, fit_patch
from pss.ranking import RANKINGS, fdr_significant
from pss.reference import Reference
from pss.storage.fingerprints import fingerprint
from pss.units import Units

ENOUGH = 1000  # reference images, for tail probabilities of one in a hundred
_COLUMNS = {
    "accuracy_before": "accuracy before",
    "accuracy_after": "accuracy after",
    "still_right": "still right",
    "kl_mean": "mean KL",
    "kl_worst": "worst KL",
}


@dataclass(frozen=True)
class Case:
    """One image and its true class.

    Attributes
    ----------
    image : Tensor, shape (1, C, H, W)
    labels : Tensor of int, shape (1,)
    name : str
        What to call it: the file's name, or the set and the position in it.
    tree : str
        Folder by class that it comes from; empty for one that comes from elsewhere.
    """

    image: Tensor
    labels: Tensor
    name: str
    tree: str = ""

    @property
    def label(self) -> int:
        """The true class."""
        return int(self.labels[0])


def switch(value: Any, name: str) -> bool:
    """Read an option that is on or off; papermill passes ``-p x false`` as text.

    Raises
    ------
    ValueError
        For anything but true and false.
    """
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise ValueError(f"{name} is {value!r}: expected true or false")


def take_image(
    network: zoo.Network,
    image_path: str = "",
    label: int | str | None = None,
    data_to_use: str = "",
    data_root: str = "",
    index: int | str | None = None,
) -> Case:
    """One picture file and its label, or an item of a set.

    Parameters
    ----------
    network : Network
    image_path : path
        A picture; then ``label`` is needed.
    label : int or str
        Number or name of the true class; by default the one that the set gives.
    data_to_use : str
        ``"photographs"``, or a built-in set of digits (its test images); with ``data_root`` a folder below that. By
        default what the network has built in.
    data_root : path
        A tree of folders by class, instead of a built-in set.
    index : int or str
        Position in the set, or the name that the set has for an image: of a photograph, or a path below the tree, as
        `Case.name` has it.

    Raises
    ------
    ValueError
        If the image or its label is not given, or not among those of the set or the network.
    """
    label, index = (None if given == "" else given for given in (label, index))
    if image_path:
        if label is None:
            raise ValueError("image_path without label: give the true class, by its name or its number")
        image = network.read(_absolute(image_path))
        return Case(image[None], torch.tensor([network.label(label)]), Path(image_path).name)
    tree = _absolute(Path(data_root) / data_to_use) if data_root else ""
    name, pictures, ids, first = _open(network, data_to_use, tree)
    place = _place(first if index is None else index, ids, name)
    image, own = pictures[place]
    if label is None and own is None:
        raise ValueError(f"{name}: {ids[place]} shows no class that {network.name} knows: say which label to explain")
    labels = torch.tensor([int(own) if label is None else network.label(label)])
    return Case(image[None], labels, f"{name}: {ids[place]}", tree)


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().absolute())


def _open(network: zoo.Network, chosen: str, tree: str) -> tuple[str, Sequence, list[str], int | str]:
    """A set's name, itself, the names of its images, and the one to begin with."""
    chosen = chosen or {"digits": "digits", "efficientnet_lite0": "photographs"}.get(network.name, "")
    if tree:
        found = zoo.reference_set(network, tree)
        return Path(tree).name, found, [str(i) for i in found.ids], 0
    if chosen == "photographs":
        own = data.photographs()
        pairs = [(partial(network.preprocess, photo.image), photo.label) for photo in own]
        return chosen, _Prepared(pairs), [photo.name for photo in own], "clock"
    if chosen in data.SETS:
        found = data.load(chosen, "test")
        return f"{chosen}/test", found, [str(i) for i in range(len(found))], 658 if chosen == "digits" else 0
    if chosen:
        raise ValueError(
            f"data_to_use {chosen!r}: expected photographs, {', '.join(data.SETS)}, or with data_root a folder below it"
        )
    raise ValueError("no image: give image_path and label, or data_root with folders by class, and index")


class _Prepared(list):
    """Pairs of how to make an image and its label; made when asked for."""

    def __getitem__(self, place: int) -> tuple[Tensor, int | None]:
        make, label = super().__getitem__(place)
        return make(), label


def _place(index: int | str, ids: list[str], name: str) -> int:
    text = str(index).removeprefix(f"{name}: ")
    if text in ids and not isinstance(index, int):
        return ids.index(text)
    if text.lstrip("-").isdigit() and 0 <= int(text) < len(ids):
        return int(text)
    raise ValueError(f"index {index!r}: {name} has 0..{len(ids) - 1}, or names such as {', '.join(ids[:8])}")


def usual(
    network: zoo.Network,
    case: Case,
    units: Units,
    reference: str = "",
    count: int | None = None,
    loss: str = "cross_entropy",
    signed: bool = False,
) -> Reference:
    """What is usual: a saved reference, or one fitted to a folder of images, the tree of the case, or built-in ones.

    Parameters
    ----------
    reference : path
        As ``source`` of `pss.models.reference`; by default the tree that the image comes from, or what is built in.
    count : int, optional
        How many images; all by default.

    Raises
    ------
    ValueError
        As `pss.models.reference`, or if there are no images to fit it to.
    """
    source = _absolute(reference) if reference else case.tree
    if not source and not has_built_in(network):
        raise ValueError(
            f"no built-in images fit {network.name}, so what is usual for it is not known: give reference, a folder "
            "with a folder of pictures per class (of its training images, if you have them), or data_root"
        )
    try:
        return zoo.reference(network, units, source, count, progress=False, loss=loss, signed=signed)
    except ValueError as error:
        error.add_note(f"reference is {source}: give a folder of pictures per class in its place, to have one made")
        raise


def has_built_in(network: zoo.Network) -> bool:
    """Whether there are images of the package that it can read."""
    try:
        zoo.reference_set(network, count=1)
    except ValueError:
        return False
    return True


def unit_table(
    saliency: Tensor, reference: Reference, units: Units, order: Tensor, method: str = "zscore", q: float = 0.05
) -> pd.DataFrame:
    """Every unit in the order given, with its layer, stage, saliency, z-score and tail probability.

    Parameters
    ----------
    saliency : Tensor, shape (1, U)
    order : Tensor of int, shape (U,)
        From `pss.rank`, of all units.
    method : str
        ``"exponential"`` takes that tail for p, everything else the generalized Pareto one.
    q : float
        False-discovery rate for the column ``significant``.

    Returns
    -------
    DataFrame
        ``rank``, ``unit``, ``name``, ``layer``, ``stage``, ``saliency``, ``z``, ``p``, ``significant``; the last two
        are missing where the reference has no tail. ``p`` is at least 1 / (n + 1) with n reference images.
    """
    table = units.table()[["unit", "name", "layer", "stage"]]
    table["saliency"] = saliency[0].cpu().numpy()
    table["z"] = reference.zscore(saliency)[0].cpu().numpy()
    if reference.threshold is not None:
        log_p = reference.log_tail_probability(saliency, RANKINGS[method].tail or "gpd")
        table["p"] = log_p.exp().clamp(min=1 / (reference.n + 1))[0].cpu().numpy()
        table["significant"] = fdr_significant(log_p, reference.n, q)[0].cpu().numpy()
    table = table.iloc[order.cpu().numpy()].reset_index(drop=True)
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def caution(reference: Reference) -> tuple[str, str]:
    """How far the reference can be trusted: a sentence in English, and in Japanese."""
    if reference.threshold is None:
        return sentence("only mean and deviation")
    kind = "enough images" if reference.n >= ENOUGH else "few images"
    return sentence(kind, n=reference.n, over=int(reference.n_excess.double().median()))


def outcome(curves: pd.DataFrame) -> tuple[str, str]:
    """After how many edits the true class is predicted, from `edits`: sentences in English, and in Japanese."""
    told = []
    for edit, own in curves.groupby("edit", sort=False):
        right, confidence = own.loc[own["corrected"], "k"], own["confidence_true"]
        numbers = {"first": right.min(), "last": own["k"].max(), "change": confidence.iloc[-1] - confidence.iloc[0]}
        told.append(sentence(f"{edit} {'fails' if right.empty else 'corrects'}", **numbers))
    english, japanese = zip(*told, strict=True)
    return " ".join(english), "".join(japanese)


def verdict(patch: Patch) -> tuple[str, str]:
    """What `offer_patch` found: a sentence in English, and in Japanese."""
    if not len(patch.gains):
        return sentence("no patch", reason=patch.reason)
    held_out, fitted = (patch.evidence.set_index("part")["kl_mean"][part] for part in ("retain held out", "retain"))
    return sentence("patch", units=len(patch.gains), size=patch.kilobytes, kl=fitted, held_out=held_out)


def map_options(method: str, order: Tensor, k: int) -> dict[str, Any]:
    """How to ask `pss.input_saliency` for the units of a ranking: rankings that it does not know are given by ids."""
    return {"method": method} if RANKINGS[method].differentiable else {"method": "zscore", "ids": order[:k]}


def edits(network: zoo.Network, case: Case, ids: Tensor, units: Units, lr: float, loss: str) -> pd.DataFrame:
    """Both edits of the first k units, k = 0 .. K, one after the other: `pss.edit_curve` with a column ``edit``."""
    frames = [
        edit_curve(network.model, case.image, case.labels, ids, units, edit, lr=lr, loss=loss).assign(edit=edit)
        for edit in ("prune", "finetune")
    ]
    return pd.concat(frames, ignore_index=True)


def retain_images(
    network: zoo.Network, case: Case, reference: str = "", count: int = 40, seed: int = 1
) -> tuple[Tensor, Tensor] | None:
    """Images that a repair should leave alone, (G, C, H, W) and (G,); None where there are none to be had.

    Drawn from the tree that the image comes from, or the folder of the reference, or from what the network has built
    in; the image itself is left out.
    """
    tree = case.tree or (_absolute(reference) if reference and Path(reference).is_dir() else "")
    if not tree and not has_built_in(network):
        return None
    pictures = zoo.reference_set(network, tree, count, seed)
    items = [pictures[i] for i in range(len(pictures))]
    kept = [(x, int(y)) for x, y in items if not torch.equal(x, case.image[0])]
    if len(kept) < 2:
        return None
    return torch.stack([x for x, _ in kept]), torch.tensor([y for _, y in kept])


def damage(
    network: zoo.Network, case: Case, retain: tuple[Tensor, Tensor], ids: Tensor, units: Units, lr: float, loss: str
) -> pd.DataFrame:
    """What pruning and fine-tuning these units for the image does to the retain images: a row for each edit."""
    steps = unit_steps(network.model, case.image, case.labels, units, ids[None], lr=lr, loss=loss)
    rows = []
    for edit in ("prune", "finetune"):
        of_edit = steps if edit == "finetune" else None
        found = side_effects(network.model, units, ids[None], *retain, edit, of_edit, progress=False)
        rows.append(found.assign(edit=edit))
    return readable(pd.concat(rows, ignore_index=True)[["edit", "k", *_COLUMNS]])


def readable(damages: pd.DataFrame) -> pd.DataFrame:
    """The columns of `damage`, and of a patch's evidence, in words."""
    return damages.rename(columns=_COLUMNS)


def offer_patch(
    network: zoo.Network,
    case: Case,
    retain: tuple[Tensor, Tensor] | None,
    units: Units,
    budget: float = 0.01,
) -> Patch:
    """`pss.fit_patch` for one image; where it cannot be asked, a patch without gains that says why."""
    none = partial(Patch, fingerprint(network.model))
    if int(predict(network.model, case.image).argmax()) == case.label:
        return none(reason="the image is read correctly: there is nothing to repair")
    if retain is None:
        return none(reason="there are no retain images to measure the damage on: give data_root or reference")
    right = predict(network.model, retain[0]).argmax(dim=1) == retain[1]
    if int(right.sum()) < 4:
        return none(reason=f"only {int(right.sum())} of {len(right)} retain images are read correctly")
    return fit_patch(network.model, (case.image, case.labels), retain, units, budget, progress=False)
