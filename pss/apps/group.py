"""A folder of mistakes: which units they share, which of them are alike, and what repairs them together.

A cause is seen in many images: a unit that stands out on one mistake may do so by accident, one that stands out on a
hundred does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.utils.data import Dataset

from pss import models
from pss.apps.explain import ANSWERED, OTHERS, Case, how_to_apply, larger_budget, readable, with_evidence
from pss.apps.pages import joined, no_patch, sentence
from pss.apps.reading import Reading, Usual, in_memory, listed, pictures, reading_of, usual
from pss.apps.report import Report
from pss.editing import edited
from pss.models import misclassified, predict
from pss.neighbors import nearest
from pss.patches import Patch, fit_patch
from pss.plots import image_row, plain
from pss.ranking import RANKINGS, rank, rank_together
from pss.reference import Reference
from pss.saliency import profile
from pss.storage.digests import digest
from pss.units import Units

ALIKE = 0.5  # mean cosine similarity of the members of a cluster, at least
WORTH = 0.5  # of the mistakes held out that a patch must repair to be recommended, at least
_LEAST = 3  # images that make a cluster
_MOST = 200  # mistakes that are looked at
_SHEETS = 4  # clusters whose pictures are shown, and that a patch is fitted to
_SHOWN = 8  # pictures of each
_RETAIN = 8  # other images that a patch needs, at least
_REST = 600  # other images, those retained and those that a repair is measured on
_FEW = 100  # of them in the folder, below which those of the reference are taken in
_PRUNED = (1, 2, 5)  # units, and as many as are shown


@dataclass(frozen=True)
class Group:
    """The mistakes of a folder.

    Attributes
    ----------
    table : DataFrame
        One row a mistake: ``id``, ``label``, ``predicted``, ``confidence``, ``cluster`` (from 1, the largest first; 0
        for an image that is like no two others): by what their units add to the margins.
    images : Tensor, shape (M, C, H, W)
    labels : Tensor of int, shape (M,)
    top : Tensor of int, shape (M, k)
        The first units of each.
    gains : Tensor, shape (M, U)
        What each unit adds to the margin by which the image is misread (``of="gain"`` in `pss.profile`).
    rest : (Tensor, Tensor)
        Other images that were read right, and their labels: of the folder, and if these are few of the reference's.
    reading : Reading
        Of the whole folder.
    tree, name : str
        Place and name of the folder.
    known : Usual, optional
        What is usual, if `find` looked for it.
    twins : tuple of str
        Mistakes that are the same picture as one that is read right, by another label.
    """

    table: pd.DataFrame
    images: Tensor
    labels: Tensor
    top: Tensor
    gains: Tensor
    rest: tuple[Tensor, Tensor]
    reading: Reading
    tree: str
    name: str
    known: Usual | None = None
    twins: tuple[str, ...] = ()

    @property
    def example(self) -> int:
        """Row of the mistake that the network is most sure of in the largest cluster."""
        own = self.table[self.table["cluster"] == self.table["cluster"].replace(0, np.inf).min()]
        return int((own if len(own) else self.table)["confidence"].idxmax())

    @property
    def others(self) -> Tensor:
        """The first units of all mistakes but the example."""
        return self.top[torch.arange(len(self.top)) != self.example]

    @property
    def typical(self) -> Case:
        """The example, to be explained."""
        at = [self.example]
        return Case(self.images[at], self.labels[at], f"{self.name}: {self.table['id'][at[0]]}", self.tree)


def find(
    network: models.Network,
    units: Units,
    tree: str | Path,
    reference: str = "",
    count: int | None = None,
    method: str = "zscore",
    k: int = 10,
    allow_chance: bool = False,
    **how: Any,
) -> Group:
    """Look for the mistakes in a folder of pictures per class, and put those together that are alike.

    Parameters
    ----------
    reference, count, allow_chance, **how
        As in `pss.apps.reading.usual`; the misread images are no part of what is usual.
    method : str
        Ranking of the units; one that is not of one number a unit is replaced by the z-score.
    k : int
        First units of each mistake.

    Raises
    ------
    ValueError
        If nothing is misread, or as `pss.apps.reading.usual`.
    """
    tree = str(Path(tree).expanduser().absolute())
    known = usual(network, units, reference, tree, None, count, allow_chance, **how)
    group = gather(network, units, pictures(network, tree), known.reference, method, k, tree, **how)
    if len(group.rest[1]) < _FEW and reference and Path(reference).is_dir():  # a folder of complaints, say
        others = pictures(network, reference, count)
        more, _ = _right(others, misclassified(network.model, others).index, np.random.default_rng(0), group.images)
        mixed = torch.randperm(len(group.rest[1]) + len(more[1]), generator=torch.Generator().manual_seed(0))
        group = replace(group, rest=tuple(torch.cat(pair)[mixed] for pair in zip(group.rest, more, strict=True)))
    return replace(group, known=replace(known, **{"own" if reference else "reading": group.reading}))


def gather(
    network: models.Network,
    units: Units,
    images: Dataset,
    reference: Reference,
    method: str = "zscore",
    k: int = 10,
    tree: str = "",
    **how: Any,
) -> Group:
    """Put those of the mistakes together that are alike, of any images, as `find` does of a folder.

    Parameters
    ----------
    images : Dataset
        Map-style, of (image, label).
    reference : Reference
        Of the same units, loss and sign.

    Raises
    ------
    ValueError
        If nothing is misread.
    """
    every, name = images, str(getattr(images, "name", "images"))
    wrong = misclassified(network.model, every)
    reading = reading_of(network, every, wrong)
    if not len(wrong):
        raise ValueError(f"none of the {len(every)} images of {name} is misread: give index, to explain one anyway")
    rng = np.random.default_rng(0)
    rows = np.sort(rng.permutation(wrong.index)[:_MOST])
    x, y = in_memory(every, rows)
    rest, same = _right(every, wrong.index, rng, x)
    s = profile(network.model, x, y, units, **how)
    gains = profile(network.model, x, y, units, "logit_difference", signed=True, of="gain")
    ranking = method if RANKINGS[method].differentiable else "zscore"
    table = wrong.loc[rows, ["id", "label", "predicted", "confidence"]].reset_index(drop=True)
    table["cluster"] = _clusters(gains)
    top = rank(s, reference, ranking, min(k, len(units)))
    return Group(table, x, y, top, gains, rest, reading, tree, name, twins=tuple(table["id"][same]))


def _right(
    every: Dataset, wrong: Any, rng: np.random.Generator, mistakes: Tensor
) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """At most 600 images that are read right, and their labels, without those that are a mistake; which these are."""
    rows = rng.permutation(np.setdiff1d(np.arange(len(every)), wrong))[:_REST]
    x, y = in_memory(every, rows)
    own, others = ([digest(image.numpy()) for image in images] for images in (mistakes, x))
    left = torch.tensor([content not in own for content in others], dtype=torch.bool)
    return (x[left], y[left]), [i for i, content in enumerate(own) if content in others]


def _clusters(gains: Tensor) -> np.ndarray:
    """Number of the cluster of each mistake, (M,), by average linkage of `pss.nearest`'s similarities.

    Of what the units add to the margins, (M, U): by the size of their gradients all confident mistakes are alike.
    """
    count = len(gains)
    if count < _LEAST:
        return np.zeros(count, int)
    ids, similarity = nearest(gains, method="raw", k=count - 1)
    apart = torch.zeros(count, count, dtype=torch.float64).scatter_(1, ids, 1 - similarity.double())
    apart = ((apart + apart.T) / 2).clamp(min=0).numpy()
    raw = fcluster(linkage(squareform(apart, checks=False), "average"), 1 - ALIKE, "distance")
    sizes = pd.Series(raw).value_counts()
    large = [cluster for cluster, size in sizes.items() if size >= _LEAST]
    return pd.Series(raw).map({cluster: n for n, cluster in enumerate(large, 1)}).fillna(0).astype(int).to_numpy()


def shared(group: Group, units: Units, first: int = 10) -> pd.DataFrame:
    """The units that most mistakes have among their first k.

    Returns
    -------
    DataFrame
        ``unit``, ``name``, ``mistakes`` (how many have it), ``by chance`` (how many would by chance), and a column for
        each of the largest clusters with the share of its images.
    """
    has = torch.zeros(len(group.top), len(units)).scatter_(1, group.top, 1.0)
    order = has.sum(dim=0).argsort(descending=True, stable=True)[:first]
    table = pd.DataFrame({"unit": order.tolist(), "name": [units.name(int(u)) for u in order]})
    table["mistakes"] = has.sum(dim=0)[order].int().tolist()
    table["by chance"] = round(len(group.top) * group.top.shape[1] / len(units), 1)
    for cluster in _numbers(group)[:_SHEETS]:
        inside = torch.from_numpy((group.table["cluster"] == cluster).to_numpy(copy=True))
        table[f"cluster {cluster}"] = has[inside].mean(dim=0)[order].tolist()
    return table


def _numbers(group: Group) -> list[int]:
    return sorted(set(group.table["cluster"]) - {0})


def clusters(group: Group, network: models.Network, units: Units) -> pd.DataFrame:
    """A row a cluster: how many images, their most frequent confusion, and the units that most of them share."""
    rows = []
    for cluster in _numbers(group):
        own = group.table[group.table["cluster"] == cluster]
        ids, often = group.top[torch.from_numpy(own.index.to_numpy(copy=True))].unique(return_counts=True)
        first = ids[often.argsort(descending=True, stable=True)][:3]
        names = ", ".join(units.name(int(u)) for u in first)
        row = {"cluster": cluster, "images": len(own), "most frequent": _most_frequent(own, network.classes)}
        rows.append(row | {"units": names})
    return pd.DataFrame(rows, columns=["cluster", "images", "most frequent", "units"])


def _most_frequent(own: pd.DataFrame, classes: Sequence[str]) -> str:
    """The confusion of most mistakes; where most are read as one class and are of many, that class."""
    pairs, read_as = own[["label", "predicted"]].value_counts(), own["predicted"].value_counts()
    if 2 * pairs.iloc[0] <= len(own) < 2 * read_as.iloc[0]:
        return f"… → {classes[read_as.index[0]]} ({read_as.iloc[0]})"
    label, predicted = pairs.index[0]
    return f"{classes[label]} → {classes[predicted]} ({pairs.iloc[0]})"


def contact_sheet(group: Group, network: models.Network, cluster: int, most: int = _SHOWN) -> Figure:
    """Images from all over a cluster in a row, with their class and what they are read as."""
    own = group.table[group.table["cluster"] == cluster]
    own = own.iloc[np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int)]
    shown = [torch.from_numpy(network.to_image(group.images[i]).copy()).movedim(-1, 0) for i in own.index]
    names = [[plain(network.classes[c], 14) for c in pair] for pair in own[["label", "predicted"]].to_numpy()]
    return image_row(torch.stack(shown), ["\n→ ".join(pair) for pair in names])[0].figure


def repairs(group: Group, network: models.Network, units: Units, shared: Mapping[str, Tensor]) -> pd.DataFrame:
    """What pruning some units does to the mistakes, and to the other images.

    Returns
    -------
    DataFrame
        A row for each name of ``shared``: ``units``, ``k``, ``mistakes read right`` (share), ``rest before`` and ``rest
        after`` (accuracy on at most 600 images that were read right), ``classes answered`` for all of these.
    """
    rows = []
    for name, ids in shared.items():
        with edited(network.model, units, ids):
            x, y = (torch.cat(pair) for pair in zip((group.images, group.labels), group.rest, strict=True))
            answers = predict(network.model, x).argmax(dim=1)
        mistakes, rest = (answers == y).double().split([len(group.images), len(group.rest[0])])
        numbers = {"mistakes read right": float(mistakes.mean()), "rest before": 1.0, "rest after": float(rest.mean())}
        rows.append({"units": name, "k": len(ids), **numbers, ANSWERED: len(answers.unique())})
    return pd.DataFrame(rows)


def _fewest(group: Group, network: models.Network, units: Units, ids: Tensor) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What pruning the first k does, for a few k; and the row after which most is right, the first of equal ones.

    Mistakes count as much as all others together: ten units can be too many where one is to blame.
    """
    ks = [*(k for k in _PRUNED if k < len(ids)), len(ids)]
    tried = pd.concat([repairs(group, network, units, {"gains": ids[:k]}) for k in ks], ignore_index=True)
    right = tried["mistakes read right"] + tried["rest after"].fillna(0)
    return tried, tried.loc[right.idxmax()].to_dict()


def patches(group: Group, network: models.Network, units: Units, budget: float = 0.01) -> dict[int, Patch]:
    """One patch for each of the largest clusters, by its number: fitted to a half, and measured on the other.

    Two thirds of the other images are retained; those left are the part `OTHERS`.
    """
    found, (x, y) = {}, group.rest
    kept, rng = 2 * len(x) // 3, np.random.default_rng(0)
    for cluster in _numbers(group)[:_SHEETS] if kept >= _RETAIN else []:
        rows = torch.from_numpy(rng.permutation(group.table.index[group.table["cluster"] == cluster]))
        fit, held_out = rows[: (len(rows) + 1) // 2], rows[(len(rows) + 1) // 2 :]
        mistakes = (group.images[fit], group.labels[fit])
        patch = fit_patch(network.model, mistakes, (x[:kept], y[:kept]), units, budget, progress=False)
        if len(patch.gains):
            parts = {"mistakes": mistakes, "mistakes held out": (group.images[held_out], group.labels[held_out])}
            patch = with_evidence(network, patch, parts | {OTHERS: (x[kept:], y[kept:])})
        found[cluster] = patch
    return found


def _held_out(patch: Patch) -> tuple[float, float]:
    """Share of the mistakes held out that the patch repairs, and with its gains dealt to random units."""
    of = patch.evidence.set_index("part")["accuracy_after"]
    return float(of["mistakes held out"]), float(of["mistakes held out, shuffled"])


def _told(patch: Patch, what: Mapping[str, Any]) -> tuple[str, str]:
    """What came of the patch of a cluster: ``cluster``, how many ``images``, and ``most``, what these are read as."""
    if not len(patch.gains):
        return no_patch("no cluster patch", patch.reason, **what)
    of = patch.evidence.set_index("part")
    held_out, rest, (share, shuffled) = of.loc["mistakes held out"], of.loc[OTHERS], _held_out(patch)
    numbers = {"share": share, "n": int(held_out["n"]), "kl": rest["kl_mean"], "rest": int(rest["n"])}
    numbers |= {"shuffled": shuffled}
    told = sentence("cluster patch", **what, units=len(patch.gains), size=patch.kilobytes, **numbers)
    return told if share > shuffled else joined([told, sentence("cluster patch no better")])


def tell(
    group: Group, network: models.Network, units: Units, report: Report, budget: float = 0.01, name: str = ""
) -> dict[str, Any]:
    """Put the group on the page: shared units, clusters with their pictures and patches, what pruning does to it.

    The patch that repairs most mistakes is written under the name, too, if one is given.

    Returns
    -------
    dict
        For ``summary.json``; with sentences in English and Japanese, ``opening`` and what to do ``next``, and one of
        them as the ``verdict``.
    """
    together, found = shared(group, units), clusters(group, network, units)
    ids = torch.tensor(together.pop("unit").tolist())
    random = torch.randperm(len(units), generator=torch.Generator().manual_seed(0))[: len(ids)]
    adds = rank_together(group.gains, None, "raw", len(ids), units)[["unit", "name", "score"]].head(len(ids))
    gains = torch.tensor(adds.pop("unit").tolist())
    tried, best = _fewest(group, network, units, gains)
    others = repairs(group, network, units, {"shared": ids[: best["k"]], "random": random[: best["k"]]})
    ends = pd.concat([pd.DataFrame([best]), others], ignore_index=True)
    edit = {row["units"]: row for row in ends.to_dict("records")}
    verdict, first, count = sentence("group repair", **edit), together.iloc[0], len(group.table)
    right = ends.set_index("units")["mistakes read right"]
    both = right + ends.set_index("units")["rest after"]
    if any(share[["shared", "gains"]].max() <= share["random"] for share in (right, both)):
        verdict = joined([verdict, sentence("group repair no better")])
    if (constant := int((ends[ANSWERED] == 1).sum())) and len(group.labels.unique()) > 1:
        verdict = joined([verdict, sentence("group repair costs all", n=constant)])
    wrong = group.reading.n - group.reading.right
    numbers = {"name": group.name, "n": count, "k": group.top.shape[1], "unit": first["name"]}
    numbers |= {"count": int(first["mistakes"]), "chance": first["by chance"], "clusters": len(found)}
    numbers |= {"hits": int((together["mistakes"] > count / 2).sum()), "inside": int(found["images"].sum())}
    said = [sentence("group", **numbers), sentence("group alike" if len(found) else "group unlike", **numbers)]
    said += [sentence("drawn", wrong=wrong)] if count < wrong else []
    said += [sentence("twins", n=len(group.twins), names=listed(group.twins))] if group.twins else []
    report.heading("The mistakes of the folder", "フォルダ内の誤分類画像")
    report.say(*group.reading.told())
    report.say(*joined(said))
    k = numbers["k"]
    report.table(
        together, f"Units that most mistakes have among their first {k}", f"多くの誤分類画像で上位{k}個に入るユニット"
    )
    report.table(adds, "Units that add most to the margins of the mistakes", "誤りのマージンへの寄与が大きいユニット")
    if len(found):
        report.table(found, "Mistakes that are alike to the units", "ユニットから見て似ている誤分類画像")
    for cluster, images in found[["cluster", "images"]].head(_SHEETS).itertuples(index=False):
        told = sentence("cluster sheet", cluster=cluster, images=images, n=min(images, _SHOWN))
        report.say(*told)
        report.show(contact_sheet(group, network, cluster), f"cluster_{cluster}", *told)
    report.say(*verdict)
    every = pd.concat([tried, others], ignore_index=True)
    report.table(every, "What pruning the first k of these units does", "これらのユニットの先頭k個の枝刈りの効果")
    report.keep("mistakes.csv", group.table.to_csv(index=False))
    summary = {"mistakes": wrong, "clusters": len(found), "shared_unit": first["name"]}
    summary |= {"shared_by": int(first["mistakes"]), "mistakes_repaired": float(right["gains"]), "verdict": verdict}
    summary |= {"rest_after": edit["gains"]["rest after"]}
    offer = _offer(patches(group, network, units, budget), found, network, report, name)
    opening = [group.reading.told(), joined(said), verdict, *offer.pop("opening")]
    advice = [sentence("next look" if len(found) else "next alike"), *offer.pop("next")]
    return summary | offer | {"opening": opening, "next": advice}


def _offer(
    made: Mapping[int, Patch], found: pd.DataFrame, network: models.Network, report: Report, name: str
) -> dict[str, Any]:
    """Put the patches of the clusters on the page, and write those that are better than chance; as `tell`."""
    opening, advice, most, summary = [], [], 0.0, {}
    named = [sentence("named no patch", name=name)] if name else []
    for cluster, patch in made.items():
        kind = found.set_index("cluster").loc[cluster]
        told = _told(patch, {"cluster": cluster, "images": int(kind["images"]), "most": kind["most frequent"]})
        report.say(*told)
        opening.append(told)
        if len(patch.evidence):
            en, ja = f"Before and after the patch of cluster {cluster}", f"クラスタ{cluster}のパッチの適用前と適用後"
            report.table(readable(patch.evidence), en, ja)
        share, shuffled = _held_out(patch) if len(patch.gains) else (0.0, 0.0)
        if share > shuffled:
            patch.save(file := report.folder / f"cluster_{cluster}.safetensors")
            summary[f"patch_{cluster}_units"] = len(patch.gains)
        if share > shuffled and share >= WORTH:
            advice += how_to_apply(network, file)
            if share * kind["images"] > most:
                most, summary["verdict"] = share * kind["images"], told
                if name:
                    patch.save(report.folder / name)
                    named = [sentence("named patch", name=name, cluster=cluster)]
        elif (share > shuffled or not len(patch.gains)) and (needed := larger_budget(patch)):
            advice.append(sentence("next budget", cluster=cluster, budget=needed))
    for told in named:
        report.say(*told)
    return summary | {"opening": [*opening, *named], "next": advice}
