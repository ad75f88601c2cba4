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
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import pss
from pss import editing as repair
from pss import models
from pss.apps.pages import sentence
from pss.apps.reading import SAVED, Reading, fit_usual, has_built_in, pictures, prepared, read_saved
from pss.data import digits
from pss.engine.checks import check_known, check_positive
from pss.engine.process import thread_count
from pss.models import predict
from pss.ranking import RANKINGS, rank, stage_shares
from pss.reference import Reference
from pss.saliency import Loss, loss_name, profile
from pss.statistics import paired_difference
from pss.storage.digests import digest, key_of
from pss.storage.fingerprints import fingerprint, name_of_data
from pss.storage.whole import write_whole
from pss.units import Units

PUBLISHED = {"baseline": "zscore", "POT": "pot", "conv5": "last_stage_raw", "random": "random"}
BLOCK = 32  # images of a part: at most so much is lost when a run is killed
_RANKING = ("image", "algo", "k", "unit", "layer", "stage")
_RESULTS = ("image", "algo", "edit", "k", "unit", "label", "predicted0", "predicted", "confidence_true")
_RESULTS += ("confidence_wrong", "corrected", "loss")
_TABLES = {"images": (), "ranking": _RANKING, "results": _RESULTS}  # and the columns that they have also without rows
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
    method = PUBLISHED.get(algo, algo)
    if method not in RANKINGS:
        raise ValueError(f"unknown algo {algo!r}: expected one of {', '.join([*PUBLISHED, *RANKINGS])}")
    return method


# --- statistics: made once, reused ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """What is usual, as far as the rankings asked for need it; None for the rest."""

    plain: Reference | None = None
    scale_free: Reference | None = None

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
            return sentence("usual experiment", left=of["n"], out=int(of["left_out"]))
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

    def find(name: str, build: Callable[[Path], None]) -> Path:
        """The file, made if it is not there and may be."""
        file = folder / name
        if not file.is_file():
            if not make:
                raise FileNotFoundError(f"no statistics {name} in {folder}: make them once, with do_stats = True")
            if images is None:
                raise ValueError(f"no statistics {name} in {folder}, and no reference images to make them of")
            build(file)
        return file

    def fit(file: Path, scale_free: bool) -> None:
        how = {"path": folder / "profiles" if str(path) else None, "loss": loss, "progress": progress}
        of_tail = {"level": level, "scale_free": scale_free, "parameter": "reference_images_path"}
        fit_usual(network, units, images, "named", None, allow_chance, misread, **of_tail, **how).reference.save(file)

    kinds = {"plain": ""} | (
        {"scale_free": "-scale-free"} if any("scale_free" in RANKINGS[m].needs for m in methods) else {}
    )
    found: dict[str, Any] = {}
    for kind, ending in kinds.items():
        file = find(f"reference-{level:g}{ending}.safetensors", partial(fit, scale_free=kind == "scale_free"))
        found[kind] = read_saved(network, units, file, _ANOTHER, loss, **provenance)
    return Statistics(**found)


def images_of(network: models.Network, root: str | Path = "") -> Dataset:
    """Give the images of an experiment: a tree of folders by class, or the built-in ones of the network.

    See `pss.models.reference_set`; of the network ``digits`` the built-in ones are those of other writers,
    `pss.data.digits`, that its reference never saw.
    """
    if network.name == "digits" and not str(root):
        return digits("test")
    return pictures(network, str(root), missing="dataset_path, a folder with folders")


def usual_of(
    network: models.Network, root: str | Path = "", count: int | None = None, seed: int = 0, needed: bool = True
) -> Dataset | None:
    """Give the reference images, see `pss.models.reference_set`; None where there are none and none are needed."""
    if not needed and not str(root) and not has_built_in(network):
        return None
    return pictures(
        network, str(root), count, seed, "reference_images_path, a folder, best of its training images, with folders"
    )


# --- the experiment ---------------------------------------------------------------------------------------------------


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
        tables = []
        for name in _TABLES:
            content = (folder / f"{name}.csv").read_bytes()
            if digest(content) != record["sha256"][name]:
                raise ValueError(f"{folder / name}.csv is not as it was written: remove the folder and run it again")
            tables.append(_read_csv(name, content))
        return cls(folder, record, *tables)


def run(
    network: models.Network,
    dataset: Dataset,
    units: Units,
    usual: Statistics,
    folder: str | Path = "",
    algo: Sequence[str] = tuple(PUBLISHED),
    edits: Sequence[repair.Edit] = ("finetune",),
    filters: int = 25,
    lr: float = 1e-3,
    step_norm: float | None = None,
    count: int | None = None,
    seed: int = 0,
    loss: str | Loss = "cross_entropy",
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
    folder : path
        Where the experiment lives. One that was begun there with the same settings goes on; a finished one is read. By
        default a folder in `pss.models.cache_of`, named by the settings.
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
    if not len(dataset) or not algo or not (count is None or count >= 1):
        raise ValueError(
            f"{len(dataset)} images, count {count}, algo {list(algo)}: expected images, a count of at "
            "least 1, or None for all, and at least one ranking"
        )
    if not 1 <= filters <= len(units):
        raise ValueError(f"filters = {filters} is outside 1..{len(units)}, the number of units")
    for edit in edits:
        check_known("edit", edit, repair.EDITS)
    check_positive(lr=lr, step_norm=step_norm)
    methods = {name: method_of(name) for name in algo}
    if twice := [name for name in methods if list(methods.values()).count(methods[name]) > 1]:
        raise ValueError(f"algo has {' and '.join(twice)}, which are the same ranking: leave all but one out")
    _check_statistics(usual, methods, network.model, units)
    if "last_stage_raw" in methods.values():
        _check_last_stage(units, filters)
    model = network.model
    settings = {
        **{"network": network.name, "weights": network.weights, "preprocessing": prepared(network)},
        **(provenance or {}),
        "pss": pss.__version__,
        "model": fingerprint(model),
        "units": units.fingerprint,
        "data": name_of_data(dataset),
        "statistics": usual.provenance,
        "algo": list(algo),
        "edits": list(edits),
        "filters": filters,
        "lr": lr,
        "step_norm": step_norm,
        "count": count,
        "seed": seed,
        "loss": loss_name(loss),
    }
    folder = Path(folder) if str(folder) else models.cache_of(network) / "experiments" / key_of(settings)
    record = _begin(folder, settings)
    if record["complete"]:
        return Experiment.open(folder)
    job = _Job(
        model, units, usual, methods, tuple(edits), filters, {"lr": lr, "step_norm": step_norm, "loss": loss}, seed
    )
    with thread_count(record["threads"]):
        parts = _fill(folder / "parts", dataset, job, count, progress)
    return _finish(folder, record, parts)


def _check_statistics(usual: Statistics, methods: dict[str, str], model: nn.Module, units: Units) -> None:
    """Refuse statistics of something else, and rankings that they do not suffice for."""
    for reference in (usual.plain, usual.scale_free):
        if reference is not None:
            reference.check(units, model=fingerprint(model))
    for name, method in methods.items():
        needs = {*RANKINGS[method].needs, *(("reference",) if method == "layer_matched_random" else ())}
        kind = "scale_free" if "scale_free" in needs else "plain"
        if "reference" in needs and getattr(usual, kind) is None:
            raise ValueError(f"algo {name!r} needs {kind.replace('_', '-')} statistics: give a folder, or leave it out")
        if kind == "plain" and RANKINGS[method].tail and usual.plain.threshold is None:
            raise ValueError(f"algo {name!r}: these statistics have no tail, only mean and deviation: take 'baseline'")


def _begin(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of this experiment, new or as it was begun; refused if another one lives here."""
    settings = json.loads(json.dumps(settings))  # as it is read again: tuples are lists
    found = _read_record(folder)
    if found is None:
        found = {**settings, "torch": torch.__version__, "threads": torch.get_num_threads(), "complete": False}
        _write_record(folder, found)
    if differ := [key for key in settings if found.get(key) != settings[key]]:
        what = "; ".join(f"{key}: there {found.get(key)!r}, given {settings[key]!r}" for key in differ)
        raise ValueError(f"{folder} holds another experiment ({what}): give a folder of its own, or remove that one")
    return found


def _finish(folder: Path, record: dict[str, Any], parts: list[dict[str, pd.DataFrame]]) -> Experiment:
    """Put the parts together, write the tables, and declare the experiment complete."""
    tables = {}
    for name in _TABLES:
        filled = [part[name] for part in parts if len(part[name])]
        tables[name] = pd.concat(filled, ignore_index=True) if filled else parts[0][name]
    looked_at, edited = len(tables["images"]), int(tables["images"]["edited"].sum())
    if not edited:
        raise ValueError(f"the network misreads none of the {looked_at} images: there is nothing to repair")
    hashes = {}
    for name, table in tables.items():
        content = table.to_csv(index=False).encode() if len(table) else b""
        write_whole(folder / f"{name}.csv", content)
        hashes[name] = digest(content)
    last = tables["results"][tables["results"]["k"] == record["filters"]]
    right = int((tables["images"]["label"] == tables["images"]["predicted"]).sum())
    read = Reading("", looked_at, right, looked_at).summary()
    summary = {"looked_at": looked_at, "edited": edited, "preprocessing": record["preprocessing"], **read}
    for (name, edit), own in last.groupby(["algo", "edit"], sort=False):
        summary[f"corrected {name} {edit}"] = float(own["corrected"].mean())
        before = tables["results"].query("algo == @name and edit == @edit and k == 0")["confidence_true"]
        summary[f"confidence {name} {edit}"] = float(own["confidence_true"].mean() - before.mean())
    shares = {name.removeprefix("corrected "): share for name, share in summary.items() if "corrected" in name}
    if shares:
        best, share = max(shares.items(), key=lambda pair: pair[1])
        most = f"most are corrected by {best}, {share:.0%} after {record['filters']} units"
        summary["verdict"] = f"{edited} misread images edited: {most}"
    _write_json(folder / "summary.json", summary)
    _write_record(folder, {**record, "looked_at": looked_at, "edited": edited, "sha256": hashes, "complete": True})
    shutil.rmtree(folder / "parts")
    return Experiment.open(folder)


def _fill(path: Path, dataset: Dataset, job: _Job, count: int | None, progress: bool) -> list[dict[str, pd.DataFrame]]:
    """All parts, those that are there read, the others made."""
    order = np.random.default_rng(job.seed).permutation(len(dataset))
    parts, done = [], 0
    total = len(dataset) if count is None else count
    what = "images" if count is None else "misread images"
    with tqdm(total=total, desc=what, unit="image", delay=2, disable=not progress) as bar:
        for number, start in enumerate(range(0, len(order), BLOCK)):
            if done == count:
                break
            file = path / f"{number:05d}.zip"
            part = _read_part(file)
            if part is None:
                left = None if count is None else count - done
                part = job.part(dataset, order[start : start + BLOCK], left)
                _write_part(file, part)
                part = _read_part(file)  # the same text gives the same tables, whoever wrote it
            parts.append(part)
            edited = int(part["images"]["edited"].sum())
            done += edited
            bar.update(len(part["images"]) if count is None else edited)
    return parts


@dataclass(frozen=True)
class _Job:
    """What is done to every block of images."""

    model: nn.Module
    units: Units
    usual: Statistics
    methods: dict[str, str]
    edits: tuple[repair.Edit, ...]
    filters: int
    how: dict[str, Any]  # of edit_curves
    seed: int

    def part(self, dataset: Dataset, positions: np.ndarray, left: int | None) -> dict[str, pd.DataFrame]:
        """The three tables of some images, of which at most ``left`` misread ones are edited."""
        images, labels = _read_images(dataset, positions)
        device = next(self.model.parameters()).device
        images, labels = images.to(device), labels.to(device)
        logits = predict(self.model, images)
        if len(outside := labels[(labels < 0) | (labels >= logits.shape[1])]):
            raise ValueError(f"label {int(outside[0])} is outside 0..{logits.shape[1] - 1} of this model")
        _refuse_no_class(dataset, positions, logits)
        wrong = (logits.argmax(dim=1) != labels).nonzero()[:left, 0]
        table = _table_of_images(dataset, positions, labels, logits, wrong)
        at = wrong.cpu().numpy()  # of one element too, which as a tensor NumPy takes for a plain number
        names = table["image"].to_numpy()[at]
        if not len(wrong):
            return {"images": table, "ranking": pd.DataFrame(), "results": pd.DataFrame()}
        ranked = self._rank(images[wrong], labels[wrong], positions[at])
        results = [self._edit(images[wrong], labels[wrong], names, ranked, edit) for edit in self.edits]
        ranking = self._table_of_ranks(names, ranked)
        return {"images": table, "ranking": ranking, "results": pd.concat(results) if results else pd.DataFrame()}

    def _rank(self, images: Tensor, labels: Tensor, positions: np.ndarray) -> dict[str, Tensor]:
        """The first units of each image by every ranking, (B, filters)."""
        s = profile(self.model, images, labels, self.units, self.how["loss"])
        return {name: self._rank_by(method, s, positions) for name, method in self.methods.items()}

    def _rank_by(self, method: str, s: Tensor, positions: np.ndarray) -> Tensor:
        plain, k = self.usual.plain, self.filters
        if "scale_free" in RANKINGS[method].needs:
            return rank(s, self.usual.scale_free, method, k)
        if method in _RANDOM:  # of each image alone: it does not matter which others it came with
            match = "pot" if plain is not None and plain.threshold is not None else "zscore"
            seeds = [np.random.SeedSequence([self.seed, int(at)]).generate_state(1)[0] for at in positions]
            own = [
                rank(row[None], plain, method, k, self.units, int(seed), match)
                for row, seed in zip(s, seeds, strict=True)
            ]
            return torch.cat(own)
        return rank(s, plain, method, k, self.units)

    def _edit(self, images: Tensor, labels: Tensor, names: np.ndarray, ranked: dict, edit: repair.Edit) -> pd.DataFrame:
        """Curves of all rankings, made in one call."""
        times, ids = len(ranked), torch.cat(list(ranked.values()))
        many = images.repeat(times, *[1] * (images.dim() - 1)), labels.repeat(times)
        curves = repair.edit_curves(self.model, *many, ids, self.units, edit, **self.how, progress=False)
        which = curves.pop("image").to_numpy()
        curves.insert(0, "image", names[which % len(names)])
        curves.insert(1, "algo", np.array(list(ranked))[which // len(names)])
        curves.insert(2, "edit", edit)
        return curves

    def _table_of_ranks(self, names: np.ndarray, ranked: dict[str, Tensor]) -> pd.DataFrame:
        ids = np.stack([part.cpu().numpy() for part in ranked.values()])  # (algos, B, k)
        algo, image, k = (axis.ravel() for axis in np.indices(ids.shape))
        layers = np.array([layer.name for layer in self.units.layers])
        return pd.DataFrame(
            {
                "image": names[image],
                "algo": np.array(list(ranked))[algo],
                "k": k + 1,
                "unit": ids.ravel(),
                "layer": layers[self.units.layer_ids[ids.ravel()]],
                "stage": np.array(self.units.stages)[self.units.stage_ids[ids.ravel()]],
            }
        )


def _check_last_stage(units: Units, k: int) -> None:
    """Refuse more than the units of the last stage, before anything is computed."""
    members = int((units.stage_ids == len(units.stages) - 1).sum())
    if k > members:
        raise ValueError(f"the last stage, {units.stages[-1]}, has {members} units: give filters of at most that")


def _read_images(dataset: Dataset, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for at in positions:
        try:
            image, label = dataset[int(at)][:2]
        except Exception as error:
            error.add_note(f"this happened while reading image {_name(dataset, at)} of the data set")
            raise
        images.append(image)
        labels.append(int(label))
    return torch.stack(images), torch.tensor(labels)


def _refuse_no_class(dataset: Dataset, positions: np.ndarray, logits: Tensor) -> None:
    """Refuse outputs that say no class: the largest of NaN is one too, and would count as read rightly or wrongly."""
    bad = ~logits.softmax(dim=1).isfinite().all(dim=1)  # one class at minus infinity is none of them
    if bad.any():
        names = [_name(dataset, at) for at in positions[bad.cpu().numpy()][:10]]
        raise ValueError(
            f"the network's outputs for {int(bad.sum())} images ({', '.join(names)}) are NaN or infinite, which is no "
            "class: expected numbers. Mend these images, how they are prepared, or the weights, or leave the images out"
        )


def _name(dataset: Dataset, at: int) -> str:
    return str(getattr(dataset, "ids", range(len(dataset)))[int(at)])


def _table_of_images(dataset, positions: np.ndarray, labels: Tensor, logits: Tensor, edited: Tensor) -> pd.DataFrame:
    probabilities = logits.double().softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    chosen = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    chosen[edited] = True
    columns = {
        "label": labels,
        "predicted": predicted,
        "confidence": confidence,
        "confidence_true": probabilities.gather(1, labels[:, None])[:, 0],
        "edited": chosen,
    }
    names = [_name(dataset, at) for at in positions]
    plain = {name: values.cpu().numpy() for name, values in columns.items()}
    return pd.DataFrame({"image": names, "position": positions, **plain})


# --- files ------------------------------------------------------------------------------------------------------------


def _read_csv(name: str, content: bytes) -> pd.DataFrame:
    if not content.strip():
        return pd.DataFrame(columns=_TABLES[name])
    return pd.read_csv(
        io.BytesIO(content),
        dtype=dict.fromkeys(("image", "algo", "edit", "layer", "stage"), str),
        keep_default_na=False,
    )


def _write_part(file: Path, part: dict[str, pd.DataFrame]) -> None:
    def write(opened) -> None:
        with zipfile.ZipFile(opened, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, table in part.items():
                archive.writestr(f"{name}.csv", table.to_csv(index=False) if len(table) else "")

    write_whole(file, write)


def _read_part(file: Path) -> dict[str, pd.DataFrame] | None:
    """Tables of a finished part; None if it is not there, or not whole (its checksums say)."""
    try:
        with zipfile.ZipFile(file) as archive:
            return {name: _read_csv(name, archive.read(f"{name}.csv")) for name in _TABLES}
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception:  # a damaged file can fail anywhere in zipfile's parser and in the decompressor
        return None


def _read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / "results.json"
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): remove the folder to begin anew") from error


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    _write_json(folder / "results.json", record)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, text)


# --- what came out ----------------------------------------------------------------------------------------------------


def differences(
    results: pd.DataFrame, first: str, value: str = "corrected", level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
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
                last = paired_difference(own, first, other, value, "algo", level, seed=seed).iloc[-1]
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
