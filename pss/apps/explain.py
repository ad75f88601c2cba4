"""The steps of notebook 11: one image of a user's own, a user's own model, and what can be said about the two.

Thin pieces that put the rest of `pss` together for one image: which image is meant, which units stand out on it, what
their repair does to it and to others, and whether a patch can be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pss import data
from pss.editing import edit_curve, side_effects, unit_steps
from pss.models import zoo
from pss.models.builtin import predict
from pss.patches import Patch, fit_patch
from pss.ranking import fdr_significant, rank
from pss.reference import Reference
from pss.storage.fingerprints import fingerprint
from pss.units import Units

_MAPPED = ("zscore", "abs_zscore", "pot", "exponential", "raw")  # what input-space saliency can differentiate
ENOUGH = 1000  # reference images, for tail probabilities of one in a hundred
_COLUMNS = {
    "accuracy_before": "accuracy before",
    "accuracy_after": "accuracy after",
    "still_right": "still right",
    "kl_mean": "mean KL",
    "kl_worst": "worst KL",
}
_TAILS = {"pot": "gpd", "exponential": "exponential"}


@dataclass(frozen=True)
class Case:
    """One image and its true class.

    Attributes
    ----------
    image : Tensor, shape (1, C, H, W)
    labels : Tensor of int, shape (1,)
    name : str
        What to call it: the file's name, or the set and the position in it.
    """

    image: Tensor
    labels: Tensor
    name: str

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


def locate(path: str, folder: str | Path, what: str = "file") -> str:
    """Give the absolute path of a file or folder that is named from ``folder``; an empty name stays empty.

    Raises
    ------
    FileNotFoundError
        Saying which folder it was looked for in.
    """
    if not path:
        return ""
    found = Path(folder).absolute() / Path(path).expanduser()
    if not found.exists():
        where = "" if Path(path).is_absolute() else f" in {Path(folder).absolute()}, the folder that this runs in"
        raise FileNotFoundError(f"no {what} {path!r}{where}: give a path from there, or an absolute one")
    return str(found)


def settle(folder: str | Path, **given: str) -> SimpleNamespace:
    """Parameters that may name files or folders, as absolute paths where they do; `locate` says what is missing.

    Parameters
    ----------
    folder : path
        Where relative paths start.
    **given
        ``model``, ``weights``, ``image_path``, ``data_to_use``, ``data_root``, ``reference``.

    Returns
    -------
    SimpleNamespace
        The same names; ``data_root`` is the whole path of the tree, ``data_to_use`` a built-in set or empty.
    """
    found = SimpleNamespace(**{name: str(value) for name, value in given.items()})
    if found.model.endswith((".yaml", ".yml")):
        found.model = locate(found.model, folder, "model description")
    if found.weights.endswith((".safetensors", ".pth", ".pt")):
        found.weights = locate(found.weights, folder, "weights")
    found.image_path = locate(found.image_path, folder, "picture")
    found.reference = locate(found.reference, folder, "reference")
    if found.data_root or found.data_to_use not in ("", "photographs", *data.SETS):
        tree = Path(found.data_root) / found.data_to_use
        found.data_root, found.data_to_use = locate(str(tree), folder, "folder of images"), ""
    return found


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
        ``"photographs"``, or a built-in set of digits (its test images). By default what the network has built in.
    data_root : path
        A tree of folders by class, instead of a built-in set.
    index : int or str
        Position in the set, or the name that the set has for an image: of a photograph, or a path below the tree.

    Raises
    ------
    ValueError
        If the image or its label is not given, or not among those of the set or the network.
    """
    label, index = (None if given == "" else given for given in (label, index))
    if image_path:
        if label is None:
            raise ValueError("image_path without label: give the true class, by its name or its number")
        image = network.read(image_path)
        return Case(image[None], torch.tensor([network.label(label)]), Path(image_path).name)
    name, pictures, ids, first = _open(network, data_to_use, data_root)
    place = _place(first if index is None else index, ids, name)
    image, own = pictures[place]
    if label is None and own is None:
        raise ValueError(f"{name}: {ids[place]} shows no class that {network.name} knows: say which label to explain")
    labels = torch.tensor([int(own) if label is None else network.label(label)])
    return Case(image[None], labels, f"{name}: {ids[place]}")


def _open(network: zoo.Network, chosen: str, root: str) -> tuple[str, Sequence, list[str], int | str]:
    """A set's name, itself, the names of its images, and the one to begin with."""
    built_in = {"digits": "digits", "efficientnet_lite0": "photographs"}
    chosen = chosen or ("" if root else built_in.get(network.name, ""))
    if root and not chosen:
        tree = zoo.reference_set(network, root)
        return Path(root).name, tree, [str(i) for i in tree.ids], 0
    if chosen == "photographs":
        own = data.photographs()
        return chosen, _Photographs(network, own), [photo.name for photo in own], "clock"
    if chosen in data.SETS:
        found = data.load(chosen, "test")
        return f"{chosen}/test", found, [str(i) for i in range(len(found))], 658 if chosen == "digits" else 0
    raise ValueError("no image: give image_path and label, or data_root with folders by class, and index")


@dataclass(frozen=True)
class _Photographs(Sequence):
    """Prepared for a network when asked for; (image, label), the label None where no class fits."""

    network: zoo.Network
    photographs: Sequence[data.Photograph]

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, place: int) -> tuple[Tensor, int | None]:
        photo = self.photographs[place]
        return self.network.preprocess(photo.image), photo.label


def _place(index: int | str, ids: list[str], name: str) -> int:
    if str(index) in ids and not isinstance(index, int):
        return ids.index(str(index))
    if str(index).lstrip("-").isdigit() and 0 <= int(index) < len(ids):
        return int(index)
    raise ValueError(f"index {index!r}: {name} has 0..{len(ids) - 1}, or names such as {', '.join(ids[:8])}")


def ranked(saliency: Tensor, reference: Reference | None, method: str, units: Units, seed: int = 0) -> Tensor:
    """All units, most anomalous first, (U,); as `pss.rank`, but says at once what a method would need here."""
    if method == "fisher":
        raise ValueError(
            "method 'fisher' ranks by gradients and Fisher information, which explaining one image does not make: take "
            "'zscore', which comes close to it, or pss.fisher_scores as notebook 10 does"
        )
    if method in _TAILS and reference is not None and reference.threshold is None:
        raise ValueError(
            f"method {method!r} needs tail probabilities, and this reference has mean and deviation only: take "
            "'zscore', or give a folder of images to fit a reference to"
        )
    return rank(saliency, reference, method, units=units, generator=seed)[0]


def unit_table(
    saliency: Tensor, reference: Reference, units: Units, order: Tensor, method: str = "zscore", q: float = 0.05
) -> pd.DataFrame:
    """Every unit in the order given, with its layer, stage, saliency, z-score and tail probability.

    Parameters
    ----------
    saliency : Tensor, shape (1, U)
    order : Tensor of int, shape (U,)
        From `ranked`.
    method : str
        ``"exponential"`` takes that tail for p, everything else the generalized Pareto one.
    q : float
        False-discovery rate for the column ``significant``.

    Returns
    -------
    DataFrame
        ``rank``, ``unit``, ``name``, ``layer``, ``stage``, ``saliency``, ``z``, ``p``, ``significant``; the last two
        are missing where the reference has no tail.
    """
    table = units.table()[["unit", "name", "layer", "stage"]]
    table["saliency"] = saliency[0].cpu().numpy()
    table["z"] = reference.zscore(saliency)[0].cpu().numpy()
    if reference.threshold is not None:
        log_p = reference.log_tail_probability(saliency, _TAILS.get(method, "gpd"))
        table["p"] = log_p.exp()[0].cpu().numpy()
        table["significant"] = fdr_significant(log_p, q)[0].cpu().numpy()
    table = table.iloc[order.cpu().numpy()].reset_index(drop=True)
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def caution(reference: Reference) -> tuple[str, str]:
    """How far the reference can be trusted: a sentence in English, and in Japanese."""
    if reference.threshold is None:
        return (
            "The reference has means and deviations only: z-scores can be had, tail probabilities and their false "
            "discoveries cannot.",
            "基準統計量は平均と標準偏差のみである．z得点は求まるが，裾確率とそれに基づく有意性の判定は得られない．",
        )
    n, over = reference.n, int(reference.n_excess.double().median())
    if n >= ENOUGH:
        return f"The reference is made of {n:,} images.", f"基準統計量は{n:,}枚の画像から求めた．"
    return (
        f"The reference is made of {n} images, of which {over} lie above the threshold of a typical unit: enough to "
        "show how this works, too few to trust. The p-values reach far beyond the images and are not calibrated.",
        f"基準統計量の元になった画像はわずか{n}枚で，典型的なユニットで閾値を超えるのはそのうち{over}枚である．手順を示すには足りるが，"
        "結論を信頼するには少なすぎる．p値は，画像のある範囲を大きく超えた外挿であり，較正されていない．",
    )


def outcome(curves: pd.DataFrame) -> tuple[str, str]:
    """After how many edits the true class is predicted, from `edits`: a sentence in English, and in Japanese."""
    names = {"prune": ("Pruning", "枝刈り"), "finetune": ("One-step fine-tuning", "1ステップのファインチューニング")}
    english, japanese = [], []
    for edit, own in curves.groupby("edit", sort=False):
        right, last = own.loc[own["corrected"], "k"], own["k"].max()
        change = f"{own['confidence_true'].iloc[-1] - own['confidence_true'].iloc[0]:+.3f}"
        told = f"the true class is predicted from k = {right.min()}"
        told_ja = f"k = {right.min()}から正解クラスが予測される"
        if right.empty:
            told, told_ja = f"not the true class up to k = {last}", f"k = {last}までに正解クラスは予測されない"
        english.append(f"{names[edit][0]}: {told}; change of confidence in it {change}.")
        japanese.append(f"{names[edit][1]}：{told_ja}（その確信度の変化は{change}）．")
    return " ".join(english), "".join(japanese)


def verdict(patch: Patch) -> tuple[str, str]:
    """What `offer_patch` found: a sentence in English, and in Japanese."""
    if not patch.units:
        return f"No patch: {patch.reason}.", f"パッチは得られない：{patch.reason}．"
    tried, rows = patch.tried.iloc[-1], patch.evidence.set_index("part")
    kl, held = f"{tried['kl']:.2g}", f"{rows['kl_mean'].get('retain held out', np.nan):.2g}"
    size = f"{patch.kilobytes:.0f} kB"
    return (
        f"A patch of {len(patch.units)} units ({size}) corrects the image, at a mean KL of {kl} on the retain images "
        f"that chose it and {held} on those held out.",
        f"{len(patch.units)}個のユニットを変えるパッチ（{size}）で予測は正解に転じる．KLの平均は，選択に使った保持画像で{kl}，"
        f"取り分けておいた画像で{held}である．",
    )


def map_options(method: str, order: Tensor, k: int) -> dict[str, Any]:
    """How to ask `pss.input_saliency` for the units of a ranking: rankings that it does not know are given by ids."""
    return {"method": method} if method in _MAPPED else {"method": "zscore", "ids": order[:k]}


def edits(network: zoo.Network, case: Case, ids: Tensor, units: Units, lr: float, loss: str) -> pd.DataFrame:
    """Both edits of the first k units, k = 0 .. K, one after the other: `pss.edit_curve` with a column ``edit``."""
    frames = [
        edit_curve(network.model, case.image, case.labels, ids, units, edit, lr=lr, loss=loss).assign(edit=edit)
        for edit in ("prune", "finetune")
    ]
    return pd.concat(frames, ignore_index=True)


def retain_images(
    network: zoo.Network, case: Case, root: str = "", count: int = 40, seed: int = 1
) -> tuple[Tensor, Tensor] | None:
    """Images that a repair should leave alone, (G, C, H, W) and (G,); None where there are none to be had.

    Drawn from the folder, or from what the network has built in; the image itself is left out.
    """
    try:
        pictures: Dataset = zoo.reference_set(network, root, count, seed)
    except ValueError:
        if root:
            raise
        return None
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
    reference: Reference,
    budget: float = 0.01,
    method: str = "zscore",
    loss: str = "cross_entropy",
    ks: Sequence[int] = (10, 100),
) -> Patch:
    """`pss.fit_patch` for one image; where it cannot be asked, a patch without units that says why.

    Through the top units of the ranking, first of those in ``ks``, in one straight step each; a ranking that is not
    of one number a unit is replaced by the z-score.
    """
    none = partial(Patch, fingerprint(network.model))
    if int(predict(network.model, case.image).argmax()) == case.label:
        return none(reason="the image is read correctly: there is nothing to repair")
    if retain is None:
        return none(reason="there are no retain images to measure the damage on: give data_root or reference")
    right = predict(network.model, retain[0]).argmax(dim=1) == retain[1]
    if int(right.sum()) < 2:
        return none(reason=f"only {int(right.sum())} of {len(right)} retain images are read correctly")
    known = ("zscore", "abs_zscore", "ratio", "pot", "exponential", "raw")
    ranking = method if method in known else "zscore"
    options = {"budget": budget, "method": ranking, "loss": loss, "rounds": 1, "progress": False}
    options["ks"] = sorted({k for k in ks if k <= len(units)}) or [len(units)]
    return fit_patch(network.model, (case.image, case.labels), retain, units, reference, **options)
