"""What a model predicts, and where it is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pss import data
from pss.engine.checks import check_labels, check_positive
from pss.engine.state import laid_out, preserved


def predict(model: nn.Module, images: torch.Tensor | Dataset, batch_size: int = 256) -> torch.Tensor:
    """Logits of a model in eval mode, without gradients.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    images : Tensor or Dataset
        Images (N, C, H, W), or a map-style data set of (image, label).
    batch_size : int

    Returns
    -------
    Tensor
        Logits, shape (N, classes), on the model's device.

    Raises
    ------
    ValueError
        If there are no images.
    """
    return _outputs(model, images, batch_size)[0]


def _outputs(
    model: nn.Module, images: torch.Tensor | Dataset, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits, and the labels if a data set was given, from one pass over it."""
    if len(images) == 0:
        raise ValueError("no images to predict: expected at least one")
    check_positive(batch_size=batch_size)
    if isinstance(images, torch.Tensor):
        batches = ((batch, None) for batch in images.split(batch_size))
    else:  # with a generator of its own the loader leaves torch's global one alone
        batches = DataLoader(images, batch_size=batch_size, generator=torch.Generator())
    like = next(model.parameters(), torch.empty(0))
    logits, labels = [], []
    with preserved(model), torch.no_grad():
        for batch, label in batches:
            logits.append(laid_out(model, batch.to(like.device, like.dtype), model))
            if not isinstance(logits[-1], torch.Tensor):
                raise ValueError(f"outputs are {type(logits[-1]).__name__}: expected logits (N, classes)")
            labels.append(label)
    return torch.cat(logits), None if isinstance(images, torch.Tensor) else torch.cat(labels)


def misclassified(model: nn.Module, dataset: Dataset) -> pd.DataFrame:
    """The images that a model gets wrong.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    dataset : Dataset
        A map-style data set of (image, label); its ``ids`` are used if it has them.

    Returns
    -------
    DataFrame
        One row per mistake: its index is the position in the data set; ``id``, ``label``, ``predicted``,
        ``confidence`` (the probability of the predicted class) and ``label_confidence`` (that of the label).

    Raises
    ------
    ValueError
        If a label is not the number of a class of the model, or the model gives something else than logits.
    """
    table = answers(*_outputs(model, dataset), ids_of(dataset, range(len(dataset))))
    return table[table["label"] != table["predicted"]]


def answers(logits: torch.Tensor, labels: torch.Tensor, ids: Sequence[str]) -> pd.DataFrame:
    """What a model says of each image: the columns of `misclassified`, which raises alike."""
    logits, labels = logits.cpu(), labels.cpu()
    check_labels(labels, logits)
    probabilities = logits.double().softmax(dim=1)
    bad = ~probabilities.isfinite().all(dim=1)  # one class at minus infinity is none of them
    if bad.any():  # the largest of NaN is a class too, and would count as read rightly or wrongly
        names = ", ".join(ids[i] for i in bad.nonzero()[:10, 0])
        raise ValueError(
            f"the model's outputs for {int(bad.sum())} images ({names}) are NaN or infinite, which is no class: "
            "expected numbers. Mend these images, how they are prepared, or the weights, or leave the images out"
        )
    confidence, predicted = probabilities.max(dim=1)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    columns = {"label": labels, "predicted": predicted, "confidence": confidence, "label_confidence": own}
    return pd.DataFrame({"id": ids, **{name: values.numpy() for name, values in columns.items()}})


def ids_of(dataset: Dataset, positions: Iterable[int]) -> list[str]:
    """Names of images of a data set: its own ``ids``, or else their positions."""
    ids = getattr(dataset, "ids", range(len(dataset)))
    return [str(ids[int(at)]) for at in positions]


def accuracy(model: nn.Module, dataset: Dataset) -> float:
    """Share of a data set's images that the model gets right."""
    return 1 - len(misclassified(model, dataset)) / len(dataset)


def evaluate(model: nn.Module) -> pd.DataFrame:
    """Accuracy of a model of the built-in digits on every built-in set and split."""
    rows = []
    for name, splits in data.SPLITS.items():
        for split in splits:
            dataset = data.load(name, split)
            wrong = len(misclassified(model, dataset))
            rows.append((name, split, len(dataset), wrong, 1 - wrong / len(dataset)))
    return pd.DataFrame(rows, columns=["set", "split", "images", "misclassified", "accuracy"])
