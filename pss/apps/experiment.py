"""A whole experiment: statistics, rankings and repairs for every misread image of a data set, as tidy tables.

What the second paper's program does (Wang and Sato 2023, section 4): statistics of a reference set, made once and
reused; then for each image that the network gets wrong a ranking of its filters by each method, and what the network
says after the first 1, 2, … of them are fine-tuned or pruned. An experiment lives in a folder:

=================  ====================================================================================
``results.json``   what made it: package, network, data, statistics, settings; ``complete`` becomes true last
``parts/``         while it runs, the finished blocks of images: it may be killed, and goes on where it was
``images.csv``     one row for every image looked at
``ranking.csv``    one row for every misread image, ranking and place in it
``results.csv``    one row for every misread image, ranking, edit and number of edited units
``summary.json``   share corrected and change of confidence by every ranking and edit in the end, for a sweep's table
=================  ====================================================================================
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import pss
from pss import editing, models
from pss.apps.pages import joined, sentence
from pss.apps.reading import SAVED, Reading, fit_usual, has_built_in, in_memory, pictures, prepared, read_saved
from pss.engine.checks import check_count, check_known, check_positive
from pss.engine.process import thread_count
from pss.models.predictions import answers, ids_of, predict
from pss.ranking import RANKINGS, rank
from pss.reference import Reference
from pss.saliency import Loss, loss_name, profile
from pss.statistics import paired_difference, stage_shares
from pss.storage.digests import digest, key_of
from pss.storage.fingerprints import fingerprint, name_of_data
from pss.storage.whole import write_whole
from pss.units import Units

PUBLISHED = {"baseline": "zscore", "POT": "pot", "conv5": "last_stage_raw", "random": "random"}
_RECORD = "results.json"
BLOCK = 32  # images of a part: at most so much is lost when a run is killed
_TABLES = {  # and the columns that they have also without rows
    "images": "",
    "ranking": "image algo k unit layer stage",
    "results": "image algo edit k unit label predicted0 predicted confidence_true confidence_wrong corrected loss",
}
_ANOTHER = "give another reference_path, or remove this one and run again with -p reference_images_path FOLDER"
_RANDOM = ("random", "random_last_stage", "layer_matched_random")


def method_of(algo: str) -> str:
    """Our name of a ranking, given ours or the second paper's program's.

    There ``baseline`` is the z-score, ``POT`` peaks over threshold, ``conv5`` raw saliency within the last stage and
    ``random`` any units.

    Raises
    ------
    ValueError
        For any other name.
    """
    check_known("algo", algo, [*PUBLISHED, *RANKINGS])
    return PUBLISHED.get(algo, algo)


# --- statistics: made once, reused ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """What is usual, as far as the rankings asked for need it; None for the rest."""

    plain: Reference | None = None
    scale_free: Reference | None = None

    def of(self, method: str) -> Reference | None:
        """Which of them a ranking takes."""
        return self.scale_free if "scale_free" in RANKINGS[method].needs else self.plain

    @property
    def provenance(self) -> dict[str, Any]:
        """What the references were made of, for the record."""
        both = {"plain": self.plain, "scale_free": self.scale_free}
        return {name: {**r.provenance, "n": r.n, "level": r.level} for name, r in both.items() if r is not None}

    @property
    def told(self) -> tuple[str, str]:
        """How many images they come from, and how many misread ones were left out: in English, and in Japanese."""
        of = next(iter(self.provenance.values()))
        if "left_out" in of:
            told, out = sentence("usual experiment", left=of["n"]), int(of["left_out"])
            return joined([told, sentence("left out misread", n=of["n"] + out, misread=out)]) if out else told
        return sentence("usual saved", name=of.get("source", "reference"), n=of["n"] or "?")


def statistics(
    network: models.Network,
    units: Units,
    path: str | Path = "",
    images: Dataset | None = None,
    make: bool = True,
    algo: Sequence[str] = tuple(PUBLISHED),
    level: float = 0.90,
    loss: str | Loss = "cross_entropy",
    misread: bool = False,
    allow_chance: bool = False,
    progress: bool = True,
) -> Statistics:
    """Statistics that the rankings need: read where they are there and fit, otherwise made and kept.

    Parameters
    ----------
    path : path
        A folder, where they are kept; or a file with a reference, ours (``.safetensors``) or published (``.pth``). By
        default a folder in `pss.models.cache_of`, named by what they are made of.
    images : Dataset, optional
        The reference images, of (image, label). Needed to make statistics; where given, what is found must be of them.
        Those that are misread are left out: what is wrong on them must not count as usual.
    make : bool
        The program's ``do_stats``. False makes nothing: what is needed must be there.
    algo : sequence of str
        The rankings.
    misread : bool
        Keep the misread images, as the program does.
    allow_chance : bool
        Go on where the network reads no better than chance; then they are kept, too.

    Raises
    ------
    FileNotFoundError
        If statistics are missing, and ``make`` is False.
    ValueError
        If those found are of another model, units, data, loss or level; or there are no images to make them of.
    """
    methods = [method_of(name) for name in algo]
    provenance = {}
    if images is not None:
        provenance = {"data": name_of_data(images), "preprocessing": models.preprocessing_of(network, images)}
    if Path(path).suffix in SAVED:
        reference = read_saved(network, units, path, _ANOTHER, loss, **provenance)
        return Statistics(**{"scale_free" if reference.scale_free else "plain": reference})
    provenance["misread"] = "kept" if misread else "left out"
    key = key_of([provenance, fingerprint(network.model), units.fingerprint, loss_name(loss)])
    folder = Path(path) if str(path) else models.cache_of(network) / "statistics" / key

    free = any("scale_free" in RANKINGS[m].needs for m in methods)
    found = []
    for scale_free, ending in [(False, ""), (True, "-scale-free")][: 1 + free]:
        file = folder / f"reference-{level:g}{ending}.safetensors"
        if not file.is_file():
            if not make:
                raise FileNotFoundError(f"no statistics {file.name} in {folder}: make them once, with do_stats = True")
            if images is None:
                raise ValueError(f"no statistics {file.name} in {folder}, and no reference images to make them of")
            place = folder / "profiles" if str(path) else None
            how = {"loss": loss, "progress": progress, "parameter": "reference_images_path"}
            left = (None, allow_chance, misread, level, scale_free)
            fit_usual(network, units, images, "named", *left, path=place, **how).reference.save(file)
        found.append(read_saved(network, units, file, _ANOTHER, loss, **provenance))
    return Statistics(*found)


def images_of(network: models.Network, root: str | Path = "") -> Dataset:
    """Give the images of an experiment: a tree of folders by class, or the built-in ones of the network.

    See `pss.models.reference_set`; of the network ``digits`` the built-in ones are those of other writers,
    `pss.data.digits`, that its reference never saw.
    """
    if network.name == "digits" and not str(root):
        return pss.data.digits("test")
    return pictures(network, str(root), missing="dataset_path, a folder with folders")


def usual_of(
    network: models.Network,
    root: str | Path = "",
    count: int | None = None,
    seed: int = 0,
    needed: bool = True,
    tree: str | Path = "",
) -> Dataset | None:
    """Give the reference images, see `pss.models.reference_set`; None where there are none and none are needed.

    Where none are named and none built in fit, they are those of the ``tree`` that the experiment is made on.
    """
    if not str(root) and not has_built_in(network):
        if not needed:
            return None
        root = tree
    return pictures(network, str(root), count, seed, "reference_images_path, a folder with folders")


# --- the experiment ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is done to every misread image.

    Attributes
    ----------
    algo : sequence of str
        Rankings, by our names or the program's (`method_of`).
    edits : sequence of {"finetune", "prune"}
        The program's ``do_finetuning`` and ``zero_clear``. None: rankings only.
    filters : int
        How many units are edited, one after the other.
    lr, step_norm, loss
        As in `pss.edit_curves`.
    count : int, optional
        Stop after so many misread images; all by default.
    seed : int
        Of the order in which images are taken, and of random rankings.
    """

    algo: Sequence[str] = tuple(PUBLISHED)
    edits: Sequence[editing.Edit] = ("finetune",)
    filters: int = 25
    lr: float = 1e-3
    step_norm: float | None = None
    count: int | None = None
    seed: int = 0
    loss: str | Loss = "cross_entropy"

    @property
    def methods(self) -> dict[str, str]:
        """Our name of each ranking."""
        return {name: method_of(name) for name in self.algo}

    def check(self, units: Units, usual: Statistics) -> None:
        """Refuse what cannot be done with these units and statistics, before anything is computed."""
        if not self.algo or not (self.count is None or self.count >= 1):
            what = "a count of at least 1, or None for all, and at least one ranking"
            raise ValueError(f"count {self.count}, algo {list(self.algo)}: expected {what}")
        check_count("filters", self.filters, len(units), "the number of units")
        for edit in self.edits:
            check_known("edit", edit, editing.EDITS)
        check_positive(lr=self.lr, step_norm=self.step_norm)
        methods = self.methods
        if twice := [name for name in methods if list(methods.values()).count(methods[name]) > 1]:
            raise ValueError(f"algo has {' and '.join(twice)}, which are the same ranking: leave all but one out")
        for name, method in methods.items():
            entry, reference = RANKINGS[method], usual.of(method)
            if reference is None and ("reference" in entry.needs or method == "layer_matched_random"):
                kind = "scale-free" if "scale_free" in entry.needs else "plain"
                raise ValueError(f"algo {name!r} needs {kind} statistics: give a folder, or leave it out")
            if entry.tail and reference.threshold is None:
                what = "these statistics have no tail, only mean and deviation"
                raise ValueError(f"algo {name!r}: {what}: take 'baseline'")
        members = int((units.stage_ids == len(units.stages) - 1).sum())
        if "last_stage_raw" in methods.values() and self.filters > members:
            raise ValueError(f"the last stage, {units.stages[-1]}, has {members} units: give filters of at most that")


@dataclass(frozen=True)
class Experiment:
    """A finished experiment: its folder, its record, and its tables (see `run`)."""

    folder: Path
    provenance: dict[str, Any]
    images: pd.DataFrame
    ranking: pd.DataFrame
    results: pd.DataFrame

    @classmethod
    def open(cls, folder: str | Path) -> Experiment:
        """Read a finished experiment.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is none, or it is not finished, or a table is not as it was written.
        """
        folder = Path(folder)
        record = _read_record(folder)
        if record is None:
            raise FileNotFoundError(f"{folder} holds no experiment: run one there with pss.apps.experiment.run")
        if not record["complete"]:
            raise ValueError(f"the experiment in {folder} is not finished: run it again, it goes on where it was")
        texts = {name: (folder / f"{name}.csv").read_text("utf-8") for name in _TABLES}
        for name, text in texts.items():
            if digest(text) != record["sha256"][name]:
                raise ValueError(f"{folder / name}.csv is not as it was written: remove the folder and run it again")
        return cls(folder, record, **_tables(texts))


def run(
    network: models.Network,
    dataset: Dataset,
    units: Units,
    usual: Statistics,
    plan: Plan,
    folder: str | Path = "",
    provenance: dict[str, Any] | None = None,
    progress: bool = True,
) -> Experiment:
    """Rank and edit the units of the misread images of a data set, a block of images at a time; resumable.

    Parameters
    ----------
    dataset : Dataset
        Map-style, of (image, label); ``ids`` name its images if it has them. They are taken in a random order.
    usual : Statistics
        From `statistics`.
    plan : Plan
    folder : path
        Where the experiment lives. One that was begun there with the same settings goes on; a finished one is read. By
        default a folder in `pss.models.cache_of`, named by the settings.
    provenance : dict, optional
        More names to be kept in the record, as that of the images.

    Returns
    -------
    Experiment
        ``images``: ``image`` (id), ``position`` in the data set, ``label``, ``predicted``, ``confidence``,
        ``confidence_true``, ``edited`` (whether the other tables have it). ``ranking``: ``image``, ``algo``, ``k``,
        ``unit``, ``layer``, ``stage``. ``results``: ``image``, ``algo``, ``edit``, ``k`` (from 0, before any edit) and
        the columns of `pss.edit_curves`.

    Raises
    ------
    ValueError
        If the folder holds another experiment (saying what differs), the statistics are of another model, two names
        are the same ranking, or the network misreads no image.
    """
    for reference in filter(None, (usual.plain, usual.scale_free)):
        reference.check(units, model=network.model, loss=plan.loss, signed=False, of="gradient")
    plan.check(units, usual)
    settings: dict[str, Any] = {"network": network.name, "weights": network.weights, "preprocessing": prepared(network)}
    settings |= {**(provenance or {}), "pss": pss.__version__, "model": fingerprint(network.model)}
    settings |= {"units": units.fingerprint, "data": name_of_data(dataset), "statistics": usual.provenance}
    settings |= {**asdict(plan), "loss": loss_name(plan.loss)}
    folder = Path(folder) if str(folder) else models.cache_of(network) / "experiments" / key_of(settings)
    record = _begin(folder, settings)
    if record["complete"]:
        return Experiment.open(folder)
    with thread_count(record["threads"]):
        parts = _fill(folder / "parts", dataset, Job(network.model, units, usual, plan), progress)
    return finish(folder, record, parts)


def _begin(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of this experiment, new or as it was begun; refused if another one lives here."""
    settings = json.loads(json.dumps(settings))  # as it is read again: tuples are lists
    found = _read_record(folder)
    if found is None:
        found = {**settings, "torch": torch.__version__, "threads": torch.get_num_threads(), "complete": False}
        write_whole(folder / _RECORD, found)
    if differ := [key for key in settings if found.get(key) != settings[key]]:
        what = "; ".join(f"{key}: there {found.get(key)!r}, given {settings[key]!r}" for key in differ)
        raise ValueError(f"{folder} holds another experiment ({what}): give a folder of its own, or remove that one")
    return found


def _fill(path: Path, dataset: Dataset, job: Job, progress: bool) -> list[dict[str, pd.DataFrame]]:
    """All parts, those that are there read, the others made."""
    count, order = job.plan.count, np.random.default_rng(job.plan.seed).permutation(len(dataset))
    parts, done = [], 0
    total, what = (len(dataset), "images") if count is None else (count, "misread images")
    with tqdm(total=total, desc=what, unit="image", delay=2, disable=not progress) as bar:
        for number, start in enumerate(range(0, len(order), BLOCK)):
            if done == count:
                break
            file = path / f"{number:05d}.json"
            if (part := read_part(file)) is None:
                left = None if count is None else count - done
                _write_part(file, job.part(dataset, order[start : start + BLOCK], left))
                part = read_part(file)  # the same text gives the same tables, whoever wrote it
            parts.append(part)
            edited = int(part["images"]["edited"].sum())
            done += edited
            bar.update(len(part["images"]) if count is None else edited)
    return parts


def finish(folder: Path, record: dict[str, Any], parts: list[dict[str, pd.DataFrame]]) -> Experiment:
    """Put the parts together, write the tables, and declare the experiment complete."""
    tables = {}
    for name in _TABLES:
        filled = [part[name] for part in parts if len(part[name])]
        tables[name] = pd.concat(filled, ignore_index=True) if filled else parts[0][name]
    looked_at, edited = len(tables["images"]), int(tables["images"]["edited"].sum())
    if not edited:
        raise ValueError(f"the network misreads none of the {looked_at} images: there is nothing to repair")
    texts = {name: _text(table) for name, table in tables.items()}
    for name, text in texts.items():
        write_whole(folder / f"{name}.csv", text)
    write_whole(folder / "summary.json", _summary(record, tables, looked_at, edited))
    hashes = {name: digest(text) for name, text in texts.items()}
    done = {"looked_at": looked_at, "edited": edited, "sha256": hashes, "complete": True}
    write_whole(folder / _RECORD, record | done)
    shutil.rmtree(folder / "parts")
    return Experiment.open(folder)


def _summary(record: dict[str, Any], tables: dict[str, pd.DataFrame], looked_at: int, edited: int) -> dict[str, Any]:
    """Share corrected and change of confidence by every ranking and edit in the end, and the verdict in a sentence."""
    right = int((tables["images"]["label"] == tables["images"]["predicted"]).sum())
    read = Reading("", looked_at, right, looked_at).summary()
    summary = {"looked_at": looked_at, "edited": edited, "preprocessing": record["preprocessing"], **read}
    shares = {}
    for (name, edit), own in tables["results"].groupby(["algo", "edit"], sort=False):
        means = own.groupby("k")[["corrected", "confidence_true"]].mean()
        first, last = means.loc[0], means.loc[record["filters"]]
        shares[f"{name} {edit}"] = summary[f"corrected {name} {edit}"] = float(last["corrected"])
        summary[f"confidence {name} {edit}"] = float(last["confidence_true"] - first["confidence_true"])
    if shares:
        best = max(shares, key=shares.get)
        most = f"most are corrected by {best}, {shares[best]:.0%} after {record['filters']} units"
        summary["verdict"] = f"{edited} misread images edited: {most}; what that does to other images was not measured"
    return summary


@dataclass(frozen=True)
class Job:
    """What is done to every block of images."""

    model: nn.Module
    units: Units
    usual: Statistics
    plan: Plan

    def part(self, dataset: Dataset, positions: np.ndarray, left: int | None) -> dict[str, pd.DataFrame]:
        """The three tables of some images, of which at most ``left`` misread ones are edited."""
        images, labels = in_memory(dataset, positions)
        device = next(self.model.parameters()).device
        images, labels = images.to(device), labels.to(device)
        table = answers(predict(self.model, images), labels, ids_of(dataset, positions))
        table = table.rename(columns={"id": "image", "label_confidence": "confidence_true"})
        table.insert(1, "position", positions)
        wrong = np.flatnonzero(table["label"] != table["predicted"])[:left]
        table["edited"] = np.isin(table.index, wrong)
        none = pd.DataFrame()
        if not len(wrong):
            return {"images": table, "ranking": none, "results": none}
        names, images, labels = table["image"].to_numpy()[wrong], images[wrong], labels[wrong]
        s = profile(self.model, images, labels, self.units, self.plan.loss)
        ranked = {name: self._rank(method, s, positions[wrong]) for name, method in self.plan.methods.items()}
        results = [self._edit(images, labels, names, ranked, edit) for edit in self.plan.edits]
        ranking = self._table_of_ranks(names, ranked)
        return {"images": table, "ranking": ranking, "results": pd.concat(results) if results else none}

    def _rank(self, method: str, s: Tensor, positions: np.ndarray) -> Tensor:
        """The first units of each image, (B, filters)."""
        reference, k = self.usual.of(method), self.plan.filters
        if method not in _RANDOM:
            return rank(s, reference, method, k, self.units)
        match = "zscore" if reference is None or reference.threshold is None else "pot"
        own = []  # of each image alone: it does not matter which others it came with
        for row, at in zip(s, positions, strict=True):
            seed = int(np.random.SeedSequence([self.plan.seed, int(at)]).generate_state(1)[0])
            own.append(rank(row[None], reference, method, k, self.units, seed, match))
        return torch.cat(own)

    def _edit(
        self, images: Tensor, labels: Tensor, names: np.ndarray, ranked: dict, edit: editing.Edit
    ) -> pd.DataFrame:
        """Curves of all rankings, made in one call."""
        times, ids, plan = len(ranked), torch.cat(list(ranked.values())), self.plan
        many = images.repeat(times, *[1] * (images.dim() - 1)), labels.repeat(times)
        how = {"lr": plan.lr, "step_norm": plan.step_norm, "loss": plan.loss, "progress": False}
        curves = editing.edit_curves(self.model, *many, ids, self.units, edit, **how)
        which = curves.pop("image").to_numpy()
        curves.insert(0, "image", names[which % len(names)])
        curves.insert(1, "algo", np.array(list(ranked))[which // len(names)])
        curves.insert(2, "edit", edit)
        return curves

    def _table_of_ranks(self, names: np.ndarray, ranked: dict[str, Tensor]) -> pd.DataFrame:
        ids = np.stack([part.cpu().numpy() for part in ranked.values()])  # (algos, B, k)
        algo, image, k = (axis.ravel() for axis in np.indices(ids.shape))
        columns = {"image": names[image], "algo": np.array(list(ranked))[algo], "k": k + 1, "unit": ids.ravel()}
        return pd.DataFrame(columns).join(self.units.table()[["layer", "stage"]], on="unit")


# --- files ------------------------------------------------------------------------------------------------------------


def _text(table: pd.DataFrame) -> str:
    return table.to_csv(index=False) if len(table) else ""


def _tables(texts: dict[str, str]) -> dict[str, pd.DataFrame]:
    """The tables of an experiment, or of a part, from their texts."""
    kinds = dict.fromkeys(("image", "algo", "edit", "layer", "stage"), str)
    return {
        name: pd.read_csv(io.StringIO(texts[name]), dtype=kinds, keep_default_na=False)
        if texts[name]
        else pd.DataFrame(columns=columns.split())
        for name, columns in _TABLES.items()
    }


def _write_part(file: Path, part: dict[str, pd.DataFrame]) -> None:
    texts = {name: _text(table) for name, table in part.items()}
    write_whole(file, {"sha256": digest(*texts.values()), "tables": texts})


def read_part(file: Path) -> dict[str, pd.DataFrame] | None:
    """Tables of a finished part; None if it is not there, or not whole (its checksum says)."""
    try:
        held = json.loads(file.read_text("utf-8"))
        whole = held["sha256"] == digest(*held["tables"].values())
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return _tables(held["tables"]) if whole else None


def _read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / _RECORD
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): remove the folder to begin anew") from error


# --- what came out ----------------------------------------------------------------------------------------------------


def differences(results: pd.DataFrame, first: str, value: str = "corrected", seed: int = 0) -> pd.DataFrame:
    """A ranking less each other one after all edits, on the same images, with `pss.statistics.paired_difference`.

    Returns
    -------
    DataFrame
        One row an edit and other ranking: ``edit``, ``than``, ``n``, ``mean``, ``low``, ``high``.
    """
    rows = []
    for edit, own in results.groupby("edit", sort=False):
        for other in own["algo"].unique():
            if other != first:
                last = paired_difference(own, first, other, value, "algo", seed=seed).iloc[-1]
                rows.append({"edit": edit, "than": other, **last[["n", "mean", "low", "high"]]})
    return pd.DataFrame(rows, columns=["edit", "than", "n", "mean", "low", "high"])


def published_frames(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """``df_i``, ``df_c`` and ``df_f`` of the second paper's program, from the rows of one ranking and edit.

    Change of the confidence in the incorrect class (the one predicted first), in the correct class, and whether the
    image is read rightly (flipped): a row an image, a column a number of edited units. The program writes columns 1..25
    as 0..24, and leaves out which image a row is.

    Returns
    -------
    df_i, df_c, df_f : DataFrame
        Index: image ids, in order of their names. Columns: k = 0 .. K; ``frame.loc[:, 1:]`` is what the program has.
    """
    if results.duplicated(["image", "k"]).any():
        raise ValueError("several rows for one image and k: give the rows of one algo and one edit")
    table = results.pivot(index="image", columns="k")  # noqa: PD010
    changes = [table[name].sub(table[name][0], axis=0) for name in ("confidence_wrong", "confidence_true")]
    return *changes, table["corrected"].astype(int)


def shares(ranking: pd.DataFrame, units: Units, k: int | None = None) -> pd.DataFrame:
    """Share of each stage among the first k units by each ranking, beside the share of all units that it holds.

    Returns
    -------
    DataFrame
        ``algo``, ``stage``, ``share``, ``error``, ``prior``: see `pss.stage_shares`.
    """
    tables = []
    for name, own in ranking.groupby("algo", sort=False):
        ids = own.pivot(index="image", columns="k", values="unit").to_numpy(copy=True)[:, :k]  # noqa: PD010
        tables.append(stage_shares(torch.from_numpy(ids), units).reset_index().assign(algo=name))
    return pd.concat(tables, ignore_index=True)
