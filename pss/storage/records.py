"""What a folder of profiles notes of each row: whose it is, what the model said, and a checksum of both."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from torch import Tensor

RECORD = np.dtype(
    [
        ("label", "<i8"),
        ("prediction", "<i8"),
        ("loss", "<f4"),
        ("confidence", "<f4"),  # of the predicted class
        ("true_confidence", "<f4"),
        ("status", "u1"),
        ("checksum", "<u4"),  # CRC-32 of the profile and of this record
    ]
)
PENDING, FINISHED, SKIPPED = range(3)


def empty_rows(count: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and records as they stay where an image is skipped."""
    records = np.zeros(count, RECORD)
    records[:] = (-1, -1, np.nan, np.nan, np.nan, SKIPPED, 0)
    return np.full((count, units), np.nan, np.float32), records


def records_of(outputs: Any, labels: Tensor, losses: Tensor) -> np.ndarray:
    """Records of a batch that was computed, (B,): predictions of logits (B, C), labels where they are classes."""
    _, records = empty_rows(len(labels), 0)
    records["status"], records["loss"] = FINISHED, losses.float().cpu().numpy()
    classes = labels.ndim == 1 and not labels.is_floating_point()
    if classes:
        records["label"] = labels.cpu().numpy()
    if isinstance(outputs, Tensor) and outputs.ndim == 2:  # a classifier
        probabilities = outputs.double().softmax(dim=1)
        confidence, prediction = probabilities.max(dim=1)
        records["prediction"], records["confidence"] = prediction.cpu().numpy(), confidence.cpu().numpy()
        if classes:
            records["true_confidence"] = probabilities.gather(1, labels[:, None].long())[:, 0].cpu().numpy()
    return records


def checksums(rows: np.ndarray, records: np.ndarray) -> np.ndarray:
    """CRC-32 of every row with its record (3 GiB/s here: as fast as a disk, and enough against accidents)."""
    blank = np.array(records)
    blank["checksum"] = 0
    blank = blank.view(np.uint8).reshape(len(blank), -1)
    return np.array([zlib.crc32(b, zlib.crc32(row)) for row, b in zip(rows, blank, strict=True)], np.uint32)


def damaged(rows: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Rows that are neither finished nor skipped, or whose bytes changed since; shape (n,)."""
    return (records["status"] == PENDING) | (checksums(rows, records) != records["checksum"])


def is_done(rows: np.ndarray, records: np.ndarray) -> bool:
    """Whether all these rows are written and whole."""
    return (records["status"] != PENDING).all() and not damaged(rows, records).any()
