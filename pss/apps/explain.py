"""The steps of notebook 11: one image of a user's own, a user's own model, and what can be said about the two.

Thin pieces that put the rest of `pss` together for one image: which image is meant, which units stand out on it, what
their repair does to it and to others, and whether a patch can be had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pss import data, editing, models
from pss.apps.pages import joined, no_patch, sentence
from pss.apps.reading import Usual, has_built_in, in_memory, pictures
from pss.editing import edit_curve, edited, unit_steps
from pss.engine.state import preserved
from pss.models import predict
from pss.patches import LEVEL, SMALL, Patch, fit_patch
from pss.ranking import RANKINGS, rank
from pss.reference import Reference
from pss.saliency import profile
from pss.statistics import fdr_significant
from pss.units import Units

ENOUGH = 1000  # reference images, for tail probabilities of one in a hundred
MOVED = 0.1  # change of confidence that counts as one
ANSWERED = "classes answered"  # how many classes some images are read as after an edit
OTHERS, OTHERS_MISREAD = "others, read right", "others, misread"  # images that took no part in a patch
_MEASURED = 1000  # images of a folder that a patch is measured on, at most
_FEW = 20  # retain images that are read right, below which others are looked for
MASKED = 0.05  # share of the pixels that the maps are tested with
_COLUMNS = {
    "accuracy_before": "accuracy before",
    "accuracy_after": "accuracy after",
    "still_right": "still right",
    "kl_mean": "mean KL",
    "kl_worst": "worst KL",
    "kl_upper": f"KL at most ({LEVEL:.0%})",
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
        Folder by class that it comes from, or that was named beside it; empty where there is none.
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
    if (text := str(value).lower()) not in ("true", "false"):
        raise ValueError(f"{name} is {value!r}: expected true or false")
    return text == "true"


def take_image(
    network: models.Network,
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
        A tree of folders by class, instead of a built-in set; beside a picture of its own what is like it.
    index : int or str
        Position in the set, or the name that the set has for an image: of a photograph, or a path below the tree, as
        `Case.name` has it.

    Raises
    ------
    ValueError
        If the image or its label is not given, or not among those of the set or the network.
    """
    label, index = (None if given == "" else given for given in (label, index))
    tree = _absolute(Path(data_root) / data_to_use) if data_root else ""
    if image_path:
        if label is None:
            raise ValueError("image_path without label: give the true class, by its name or its number")
        image = network.read(_absolute(image_path))
        return Case(image[None], torch.tensor([network.label(label)]), Path(image_path).name, tree)
    name, read, ids, first = _open(network, data_to_use, tree)
    place = _place(first if index is None else index, ids, name)
    image, own = read(place)
    if label is None and own is None:
        raise ValueError(f"{name}: {ids[place]} shows no class that {network.name} knows: say which label to explain")
    labels = torch.tensor([int(own) if label is None else network.label(label)])
    return Case(image[None], labels, f"{name}: {ids[place]}", tree)


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().absolute())


def _open(network: models.Network, chosen: str, tree: str) -> tuple[str, Callable, list[str], int | str]:
    """A set's name, what gives an image and its label, the names of its images, and the one to begin with."""
    chosen = chosen or {"digits": "digits", "efficientnet_lite0": "photographs"}.get(network.name, "")
    if tree:
        found = models.reference_set(network, tree)
        return Path(tree).name, found.__getitem__, [str(i) for i in found.ids], 0
    if chosen == "photographs":
        own = data.photographs()
        read = lambda place: (network.preprocess(own[place].image), own[place].label)  # noqa: E731
        return chosen, read, [photo.name for photo in own], "clock"
    if chosen in data.SETS:
        found = data.load(chosen, "test")
        names = [str(i) for i in range(len(found))]
        return f"{chosen}/test", found.__getitem__, names, 658 if chosen == "digits" else 0
    if chosen:
        raise ValueError(
            f"data_to_use {chosen!r}: expected photographs, {', '.join(data.SETS)}, or with data_root a folder below it"
        )
    raise ValueError("no image: give image_path and label, or data_root with folders by class, and index")


def _place(index: int | str, ids: list[str], name: str) -> int:
    text = str(index).removeprefix(f"{name}: ")
    if text in ids and not isinstance(index, int):
        return ids.index(text)
    if text.lstrip("-").isdigit() and 0 <= int(text) < len(ids):
        return int(text)
    raise ValueError(f"index {index!r}: {name} has 0..{len(ids) - 1}, or names such as {', '.join(ids[:8])}")


def unit_table(saliency: Tensor, known: Usual, units: Units, order: Tensor, method: str = "zscore") -> pd.DataFrame:
    """Every unit in the order given, with its layer, stage, saliency, z-score and tail probability.

    Parameters
    ----------
    saliency : Tensor, shape (1, U)
    order : Tensor of int, shape (U,)
        From `pss.rank`, of all units.
    method : str
        ``"exponential"`` takes that tail for p, everything else the generalized Pareto one.

    Returns
    -------
    DataFrame
        ``rank``, ``unit``, ``name``, ``layer``, ``stage``, ``saliency``, ``z``, ``p``, ``significant`` (at a
        false-discovery rate of 5%); the last two are missing where the reference has no tail, and the last where it is
        not calibrated, see `Usual.calibrated`. ``p`` is at least 1 / (n + 1) with n reference images.
    """
    reference = known.reference
    table = units.table()[["unit", "name", "layer", "stage"]]
    table["saliency"] = saliency[0].cpu().numpy()
    table["z"] = reference.zscore(saliency)[0].cpu().numpy()
    if reference.threshold is not None:
        log_p = reference.log_tail_probability(saliency, RANKINGS[method].tail or "gpd")
        table["p"] = log_p.exp().clamp(min=1 / (reference.n + 1))[0].cpu().numpy()
        if known.calibrated():
            table["significant"] = fdr_significant(log_p, reference.n)[0].cpu().numpy()
    table = table.iloc[order.cpu().numpy()].reset_index(drop=True)
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def caution(reference: Reference) -> tuple[str, str]:
    """How far the reference can be trusted: a sentence in English, and in Japanese."""
    if reference.threshold is None:
        return sentence("only mean and deviation")
    kind = "enough images" if reference.n >= ENOUGH else "few images"
    over, rough = int(reference.n_excess.double().median()), int((~reference.fitted & ~reference.dead).sum())
    told = sentence(kind, n=reference.n, over=over, least=1 / (reference.n + 1))
    return joined([told, sentence("rough tails", rough=rough)]) if rough else told


def outcomes(curves: pd.DataFrame) -> pd.DataFrame:
    """How each edit of some units ended: a row for each ``edit`` and ``units`` (top, random) of `edits`.

    Returns
    -------
    DataFrame
        ``edit``, ``units``, ``repaired at`` (the first k with the true class; missing if there is none), ``edited``
        (how many units in the end), and the confidence in the true class before and after all of them.
    """
    rows = []
    for (edit, chosen), own in curves.groupby(["edit", "units"], sort=False):
        first, confidence = own.loc[own["corrected"], "k"].min(), own["confidence_true"]
        numbers = {"edited": int(own["k"].max()), "before": confidence.iloc[0], "after": confidence.iloc[-1]}
        rows.append({"edit": edit, "units": chosen, "repaired at": float(first), **numbers})
    return pd.DataFrame(rows)


def verdict(patch: Patch) -> tuple[str, str]:
    """What `offer_patch` found: a sentence in English, and in Japanese."""
    if not len(patch.gains):
        return no_patch("no patch", patch.reason)
    parts = patch.evidence.set_index("part")
    held_out, fitted = (parts["kl_mean"][part] for part in ("retain held out", "retain"))
    told = [sentence("patch", units=len(patch.gains), size=patch.kilobytes, kl=fitted, held_out=held_out)]
    if OTHERS in parts.index:
        n, kl, still = parts.loc[OTHERS, ["n", "kl_mean", "still_right"]]
        told.append(sentence("patch others", n=int(n), kl=kl, still=still))
    if OTHERS_MISREAD in parts.index:
        n, share = parts.loc[OTHERS_MISREAD, ["n", "accuracy_after"]]
        told.append(sentence("patch others misread", n=int(n), share=share))
    return joined(told)


def rate_that_moves(network: models.Network, case: Case, ids: Tensor, units: Units, lr: float, loss: str) -> float:
    """The first of 10, 100, …, 1e6 times the rate whose step moves the confidence by a tenth; 0 if none does."""
    for rate in lr * 10.0 ** np.arange(1, 7):
        found = edit_curve(network.model, case.image, case.labels, ids, units, "finetune", lr=float(rate), loss=loss)
        if abs(found["confidence_true"].iloc[-1] - found["confidence_true"].iloc[0]) >= MOVED:
            return float(rate)
    return 0.0


def opening(
    case: Case,
    confidences: Tensor,
    network: models.Network,
    table: pd.DataFrame,
    known: Usual,
    others: Tensor,
    ends: pd.DataFrame,
    harm: pd.DataFrame | None,
    patch: Patch,
) -> list[tuple[str, str]]:
    """Three sentences, English and Japanese: what the network did, which units stand out, and what repairs it.

    Parameters
    ----------
    table : DataFrame
        From `unit_table`.
    others : Tensor, shape (M, k)
        First units of other mistakes, from `tops`.
    ends, harm : DataFrame
        From `outcomes` and `damage`.
    """
    guess = int(confidences.argmax())
    named = {"image": case.name, "guess": network.classes[guess], "label": network.classes[case.label]}
    sure = {"sure": float(confidences[guess]), "own": float(confidences[case.label])}
    did = [sentence("read right" if guess == case.label else "misread", **named, **sure)]
    did.append(known.at_hand.told() if known.at_hand else sentence("accuracy unknown"))
    stands = [stands_out(table, known)]
    if len(others):
        many = {"hits": int((others == int(table["unit"][0])).any(dim=1).sum()), "k": others.shape[1]}
        chance = others.numel() / len(table)
        stands.append(sentence("shared", name=table["name"][0], others=len(others), chance=chance, **many))
    repairs = [sentence("nothing to repair") if guess == case.label else verdict(patch)]
    if guess != case.label and not len(patch.gains):
        repairs.insert(0, _best_edit(ends, harm))
    return [joined(did), joined(stands), joined(repairs)]


def stands_out(table: pd.DataFrame, known: Usual, q: float = 0.05) -> tuple[str, str]:
    """Which unit stands out most, and how many are significant, as far as the reference lets that be said.

    At false-discovery rate q; so many must stand out at once for any to be that, see `pss.statistics.fdr_significant`.
    """
    first, right = table.iloc[0], {"n": len(known.right), "hits": known.alarms()}
    numbers = {"units": len(table), "name": first["name"], "z": first["z"]}
    if known.reference.threshold is None:
        return joined([sentence("stands out", **numbers), sentence("no tail")])
    if "significant" not in table:
        told = [sentence("stands out", **numbers), sentence("not calibrated", folder=known.own.name, **right)]
        if known.reading and known.reading.interval[0] > known.own.interval[1]:
            told.append(sentence("read better", of=known.reading.name, share=known.reading.share, own=known.own.share))
        return joined(told)
    hits, least = int(table["significant"].sum()), math.ceil(len(table) / (q * (known.reference.n + 1)))
    told = [sentence("most significant" if 2 * hits > len(table) else "significant", **numbers, hits=hits)]
    told += [sentence("out of reach", n=known.reference.n, least=least)] if not hits and least > 1 else []
    return joined(told)


def _best_edit(ends: pd.DataFrame, harm: pd.DataFrame | None) -> tuple[str, str]:
    """The edit of the fewest units, top ones or by gain, that repairs the image, and what it breaks."""
    random = ends["units"] == "random"
    chosen = ends[~random]
    if chosen["repaired at"].isna().all():
        return sentence("no edit repairs", edited=int(chosen["edited"].max()))
    best = chosen.loc[chosen["repaired at"].idxmin()]
    other = ends.loc[random & (ends["edit"] == best["edit"]), "repaired at"].iloc[0]
    told = [sentence(f"{best['edit']} {best['units']} repairs", first=int(best["repaired at"]))]
    told.append(sentence("random fails") if np.isnan(other) else sentence("random repairs", first=int(other)))
    if harm is not None and harm["still right"].notna().all():
        own = harm[(harm["edit"] == best["edit"]) & (harm["units"] == best["units"])].iloc[0]
        numbers = {"before": own["accuracy before"], "after": own["accuracy after"], "still": own["still right"]}
        told.append(sentence("costs", **numbers))
        if own[ANSWERED] == 1 < harm[ANSWERED].max():
            told.append(sentence("costs all"))
        elif own["still right"] < 0.5:
            told.append(sentence("costs most"))
    return joined(told)


def how_to_apply(network: models.Network, patch: Path) -> list[tuple[str, str] | str]:
    """How a written patch is applied: a sentence in English and Japanese, and lines to paste."""
    lines = ["import pss", "", f"model = {network.loaded_by}.model"]
    lines += [f"patch = pss.Patch.load({str(patch.absolute())!r})", "model = patch.apply(model)"]
    return [sentence("next apply", file=patch.name), "\n".join(lines)]


def larger_budget(patch: Patch) -> float:
    """The budget by which a patch would correct most that is a small change; 0 where none is known to correct more."""
    parts = patch.evidence.set_index("part") if len(patch.evidence) else patch.evidence
    if not len(patch.gains) and OTHERS in parts.index:  # it corrects, but broke the budget there
        upper = parts["kl_upper"][OTHERS]
    else:
        done = parts["n"]["mistakes"] * parts["accuracy_after"]["mistakes"] if len(patch.gains) else 0
        tried = patch.tried.reindex(columns=["corrected", "kl_upper"])
        more = tried[(tried["corrected"] > done + 0.5) & (tried["kl_upper"] <= SMALL)]
        upper = more["kl_upper"][more["corrected"] == more["corrected"].max()].min()
    return 1.05 * float(upper) if upper <= SMALL else 0.0


def what_next(
    network: models.Network,
    case: Case,
    guess: int,
    table: pd.DataFrame,
    found: Usual,
    patch: Patch,
    to_apply: Sequence[tuple[str, str] | str],
    rate: float,
    lr: float,
    group: Sequence[tuple[str, str] | str] | None = None,
) -> list[tuple[str, str] | str]:
    """What to do after this outcome, in English and Japanese, most useful first; and lines to paste.

    Parameters
    ----------
    to_apply : sequence
        From `how_to_apply`; empty if the patch was not written.
    rate : float
        From `rate_that_moves`; 0 where the step moved something, or none does.
    group : sequence, optional
        What to do about all mistakes of a folder, of which this one is the example: then this comes in place of what to
        do about the image.
    """
    told = [sentence("next chance")] if found.reading and found.reading.near_chance else []
    if not told and found.own and found.own.guessed:
        told.append(sentence("next labels", folder=found.own.name))
    unlike = "p" in table and "significant" not in table
    told += [sentence("next held out")] if unlike else []
    more = sentence("next more" if found.undrawn else "next images", n=found.reference.n or "?", more=found.undrawn)
    few = [] if unlike or found.reference.n >= ENOUGH else [more]
    told += [sentence("next preprocessing")] if network.preprocess == models.Preprocessing() else []
    if group is not None:
        return [*told, *group, *to_apply, *few]
    told += [sentence("next misread")] if guess == case.label else []
    if len(patch.gains):
        told += to_apply or [sentence("next write")]
    elif budget := larger_budget(patch):
        told.append(sentence("next budget one", budget=budget))
    elif len(patch.tried):
        told.append(sentence("next no budget", most=SMALL))
    told += few
    told += [sentence("next rate", rate=rate, lr=lr)] if rate else []
    share = table["significant"].mean() if "significant" in table and guess != case.label else 0.5
    return told + [sentence("next group")] * bool(share > 0.5 or not share)


def results(
    table: pd.DataFrame, ends: pd.DataFrame, harm: pd.DataFrame | None, patch: Patch, known: Usual
) -> dict[str, Any]:
    """Outcomes for ``summary.json``, the columns of a sweep: what stands out, what repairs it at which k and cost."""
    found: dict[str, Any] = {"top_unit": str(table["name"].iloc[0]), "z": float(table["z"].iloc[0])}
    found["significant"] = int(table["significant"].sum()) if "significant" in table else None
    found["confidence_before"] = float(ends["before"].iloc[0])
    for row in ends.to_dict("records"):
        name = _column(row)
        found[f"{name}_repaired_at"] = None if np.isnan(row["repaired at"]) else int(row["repaired at"])
        found[f"{name}_confidence_after"] = float(row["after"])
    for row in [] if harm is None else harm.to_dict("records"):
        found[f"{_column(row)}_kl"] = None if np.isnan(row["mean KL"]) else float(row["mean KL"])
    found["patch_units"] = len(patch.gains)
    if len(patch.gains):
        kl = patch.evidence.set_index("part")["kl_mean"]
        held_out = float(kl.get(OTHERS, kl["retain held out"]))  # most of the images that took no part
        found |= {"patch_kb": round(patch.kilobytes, 1), "patch_kl_held_out": held_out}
    return found | (known.at_hand.summary() if known.at_hand else {})


def _column(row: Mapping[str, Any]) -> str:
    return row["edit"] if row["units"] == "top" else f"{row['edit']}_{row['units']}"


def by_gain(network: models.Network, case: Case, units: Units, k: int) -> Tensor:
    """Ids of the k units that add most to the margin by which the image is misread, (k,): candidates for pruning."""
    gains = profile(network.model, case.image, case.labels, units, "logit_difference", signed=True, of="gain")
    return rank(gains, None, "raw", k)[0]


def tops(known: Usual, method: str, k: int) -> Tensor:
    """The first k units of each of the other mistakes, (M, k)."""
    if not len(known.mistakes):
        return torch.empty(0, k, dtype=torch.int64)
    return rank(known.mistakes, known.reference, method if RANKINGS[method].differentiable else "zscore", k)


def masking_test(
    network: models.Network, case: Case, maps: Mapping[str, Tensor], top: Tensor, units: Units, loss: str, signed: bool
) -> pd.DataFrame:
    """What is left of the mistake without the pixels of a map: the brightest twentieth takes the image's mean colour.

    Parameters
    ----------
    maps : mapping of str to Tensor, shape (H, W)

    Returns
    -------
    DataFrame
        ``map``; ``lost``, the share of the top units' saliency that is lost, negative where it grows; ``true class``,
        the confidence in it.
    """
    image, pixels = case.image, max(1, round(MASKED * case.image[0, 0].numel()))
    hidden = []
    for heat in maps.values():
        mask = torch.zeros(heat.numel(), dtype=torch.bool)
        mask[heat.flatten().topk(pixels).indices] = True
        hidden.append(torch.where(mask.reshape(heat.shape), image[0].mean(dim=(1, 2), keepdim=True), image[0]))
    every = torch.stack([image[0], *hidden])
    s = profile(network.model, every, case.labels.expand(len(every)), units, loss, signed)[:, top].abs().mean(dim=1)
    sure = predict(network.model, every[1:]).double().softmax(dim=1)[:, case.label]
    lost = 1 - s[1:] / s[0].clamp(min=torch.finfo(s.dtype).tiny)
    return pd.DataFrame({"map": list(maps), "lost": lost.tolist(), "true class": sure.tolist()})


def map_verdict(lost: pd.DataFrame, mine: str, others: Sequence[str]) -> tuple[str, str]:
    """Whether the first map says more than that of random units, and which map says most."""
    changed = -lost.set_index("map")["lost"]
    best = changed.idxmin()
    numbers = {"share": MASKED, "map": mine, "mine": changed[mine], "best": best, "most": changed[best]}
    told = [sentence("masked best" if best == mine else "masked", **numbers)]
    if beside := [name for name in others if name in changed]:
        first = min(beside, key=changed.__getitem__)
        kind = "map better" if changed[mine] < changed[first] else "map no better"
        told.append(sentence(kind, beside=first, random=changed[first]))
    return joined(told)


def integrated_gradients(network: models.Network, case: Case) -> Tensor | None:
    """Integrated gradients of the class that is predicted, (H, W), by captum; None where that is not installed."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        return None
    with preserved(network.model):
        network.model.eval()
        guess = int(predict(network.model, case.image).argmax())
        how = {"target": guess, "n_steps": 20, "internal_batch_size": 4}
        found = IntegratedGradients(network.model).attribute(case.image, **how)
    return found[0].sum(dim=0).abs().detach().float()


def map_options(method: str, order: Tensor, k: int) -> dict[str, Any]:
    """How to ask `pss.input_saliency` for the units of a ranking: rankings that it does not know are given by ids."""
    return {"method": method} if RANKINGS[method].differentiable else {"method": "zscore", "ids": order[:k]}


def edits(
    network: models.Network, case: Case, chosen: Mapping[str, Tensor], units: Units, lr: float, loss: str
) -> pd.DataFrame:
    """Both edits of some units, k = 0 .. K, one after the other: `pss.edit_curve` with columns ``edit``, ``units``.

    ``chosen`` holds ids by the name of who they are, as top and random.
    """
    frames = []
    for (name, ids), edit in product(chosen.items(), ("prune", "finetune")):
        curve = edit_curve(network.model, case.image, case.labels, ids, units, edit, lr=lr, loss=loss)
        frames.append(curve.assign(edit=edit, units=name))
    return pd.concat(frames, ignore_index=True)


def retain_images(
    network: models.Network, case: Case, reference: str = "", count: int | None = None, seed: int = 1
) -> tuple[Tensor, Tensor] | None:
    """Images that a repair should leave alone, (G, C, H, W) and (G,); None where there are none to be had.

    At most ``count``, by default 100 of a folder or 24 built-in ones, drawn from the tree that the image comes from;
    where there is none, or fewer than 20 of them are read right, from the folder of the reference; else from what the
    network has built in. The image itself is left out.
    """
    trees = [_absolute(tree) for tree in (case.tree, reference) if tree and Path(tree).expanduser().is_dir()]
    images, labels = case.image[:0], case.labels[:0]
    for tree in trees or ([""] if has_built_in(network) else []):
        images, labels = in_memory(pictures(network, tree, count or (100 if tree else 24), seed))
        others = (images != case.image).flatten(1).any(dim=1)
        images, labels = images[others], labels[others]
        if [tree] == trees[-1:] or (predict(network.model, images).argmax(dim=1) == labels).sum() >= _FEW:
            break
    return (images, labels) if len(images) > 1 else None


def damage(
    network: models.Network,
    case: Case,
    retain: tuple[Tensor, Tensor],
    chosen: Mapping[str, Tensor],
    ends: pd.DataFrame,
    k: int,
    units: Units,
    lr: float,
    loss: str,
) -> pd.DataFrame:
    """What editing these units for the image does to the retain images: a row for each edit of those of each name.

    As many of them are edited as repair the image, see `outcomes`; where none do, or it is read right, k.
    """
    log_p, rows = lambda: predict(network.model, retain[0]).double().log_softmax(dim=1), []
    before = log_p()
    for edit, name, first in ends[["edit", "units", "repaired at"]].itertuples(index=False):
        ids = chosen[name][None, : int(first) if first > 0 else k]
        steps = None if edit == "prune" else unit_steps(network.model, case.image, case.labels, units, ids, loss, lr)[0]
        with edited(network.model, units, ids[0], edit, steps):
            after = log_p()
        own = {"edit": edit, "units": name, "k": ids.shape[1], ANSWERED: len(after.argmax(dim=1).unique())}
        rows.append(own | editing.damage(before, after, retain[1]))
    return readable(pd.DataFrame(rows).filter(items=["edit", "units", "k", *_COLUMNS, ANSWERED]))


def readable(damages: pd.DataFrame) -> pd.DataFrame:
    """The columns of `damage`, and of a patch's evidence, in words."""
    return damages.rename(columns=_COLUMNS)


def offer_patch(
    network: models.Network, case: Case, retain: tuple[Tensor, Tensor] | None, units: Units, budget: float = 0.01
) -> Patch:
    """`pss.fit_patch` for one image; where it cannot be asked, a patch without gains that says why."""
    none = Patch(models.fingerprint(network.model))
    if int(predict(network.model, case.image).argmax()) == case.label:
        return replace(none, reason="the image is read correctly: there is nothing to repair")
    if retain is None:
        return replace(none, reason="there are no retain images to measure the damage on: give data_root or reference")
    right = predict(network.model, retain[0]).argmax(dim=1) == retain[1]
    if int(right.sum()) < 4:
        return replace(none, reason=f"only {int(right.sum())} of {len(right)} retain images are read correctly")
    return fit_patch(network.model, (case.image, case.labels), retain, units, budget, progress=False)


def measured(network: models.Network, case: Case, patch: Patch, retain: tuple[Tensor, Tensor] | None) -> Patch:
    """The patch with more evidence: on the folder that the image comes from, and what its gains do to random units.

    The folder is all of it, or 1,000 images drawn, but for the image itself and the retain images; ``shuffled`` is
    the same gains dealt to other units.
    """
    if not len(patch.gains):
        return patch
    used = [case.image[0], *([] if retain is None else retain[0])]
    parts = {"mistakes": (case.image, case.labels)}
    images, labels = in_memory(pictures(network, case.tree, _MEASURED)) if case.tree else (case.image, case.labels)
    left = [not any(torch.equal(image, other) for other in used) for image in images]
    if any(left):
        images, labels = images[left], labels[left]
        right = predict(network.model, images).argmax(dim=1) == labels
        named = {OTHERS: right, OTHERS_MISREAD: ~right}
        parts |= {name: (images[which], labels[which]) for name, which in named.items() if which.any()}
    return with_evidence(network, patch, parts)


def with_evidence(network: models.Network, patch: Patch, parts: Mapping[str, tuple[Tensor, Tensor]]) -> Patch:
    """The patch with more rows of evidence: for each part, the gains as they are, and dealt to other units.

    One that breaks its budget on others that are read right is taken back, with the reason.
    """
    dealt = torch.randperm(len(patch.gains), generator=torch.Generator().manual_seed(0))
    shuffled = replace(patch, gains=patch.gains[dealt]).measured(network.model, parts).evidence
    shuffled["part"] = shuffled["part"] + ", shuffled"
    more = patch.measured(network.model, parts).evidence
    more = more[~more["part"].isin(patch.evidence["part"])]
    found = replace(patch, evidence=pd.concat([patch.evidence, more, shuffled], ignore_index=True))
    rest, budget = more[more["part"] == OTHERS].to_dict("records"), float(patch.about["budget"])
    if not rest or rest[0]["kl_mean"] <= budget:
        return found
    kl, upper = (f"{rest[0][name]:.2g}" for name in ("kl_mean", "kl_upper"))
    on = f"on {rest[0]['n']} other images that are read right its KL is {kl}, up to {upper} at {LEVEL:.0%}"
    return replace(found, gains=patch.gains[:0], reason=f"{on} confidence, more than the budget of {budget:g}")
