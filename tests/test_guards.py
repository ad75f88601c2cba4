"""Tests that can fail: in a process of its own each guard below is taken out, and its test must then go red.

`make test-faults` runs this. What is patched is what the code calls, so that a guard may move within its function.
"""

import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jinja2 import Environment
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import pss
from pss.data import read_image
from pss.engine import scaling
from pss.engine.state import preserved
from pss.reference import Reference

pytestmark = pytest.mark.faults
BAD, TRACE, UNTRUSTED = "tests/test_bad_input.py", "tests/test_no_trace.py", "tests/test_untrusted.py"
PATCHES, REPORT = "tests/test_patches.py", "tests/test_report.py"
kept = []


@dataclass(frozen=True)
class Guard:
    """The test that must notice, what is patched (a name in every module of pss that has it), and with what."""

    test: str
    place: Any
    instead: Any


@contextmanager
def spoiled(spoil: Callable, model: torch.nn.Module):
    """`preserved`, but for what is spoiled afterwards."""
    with preserved(model):
        yield model
    spoil(model)


@contextmanager
def never_restored(views):
    yield views


def without(function: Callable, **options) -> Callable:
    """The function, whatever it is told of these options."""
    return lambda *args, **given: function(*args, **{**given, **options})


def only_outside_of_errors(function: Callable) -> Callable:
    return lambda *args: None if sys.exc_info()[0] else function(*args)


GUARDS = {
    "images are finite": Guard(
        f"{BAD}::test_is_refused[image with NaN]", (torch, "isfinite"), lambda x: torch.ones_like(x, dtype=torch.bool)
    ),
    "labels are classes": Guard(f"{BAD}::test_is_refused[label too large]", "check_labels", lambda *given: None),
    "levels are inside": Guard(f"{BAD}::test_is_refused[reference at level 1.5]", "check_share", lambda *given: None),
    "ids are units": Guard(
        f"{BAD}::test_is_refused[edit of a unit beyond]", "check_ids", lambda ids, *given, **more: np.asarray(ids)
    ),
    "NaN predicts no class": Guard(
        f"{BAD}::test_an_edit_that_overflows_predicts_no_class", "predicted", lambda logits: logits.argmax(dim=-1)
    ),
    "dead units come last": Guard(
        f"{BAD}::test_columns_without_a_tail_are_reported_and_ranked",
        "dead_last",
        lambda scores, reference: scores,
    ),
    "references are of this model": Guard(
        f"{BAD}::test_is_refused[map with a reference of another model]",
        (Reference, "check"),
        lambda self, *given, **more: self,
    ),
    "pictures have a cap": Guard(
        f"{BAD}::test_is_refused[too large a picture]", (read_image, "__defaults__"), (sys.maxsize,)
    ),
    "formats of pictures are limited": Guard(
        f"{BAD}::test_is_refused[PostScript for a picture]", (Image, "open"), without(Image.open, formats=None)
    ),
    "pictures are turned upright": Guard(
        f"{BAD}::test_odd_picture_shows_the_right_pixels[orientation 6]",
        (ImageOps, "exif_transpose"),
        lambda image: image,
    ),
    "a pass verifies itself": Guard(
        "tests/test_verification.py::test_a_broken_guard_is_seen[float64-gains]",
        "verified",
        lambda task, images, labels, part, known: part,
    ),
    "rows follow samples": Guard(
        "tests/test_saliency.py::test_a_sorted_batch_whose_last_image_keeps_its_place",
        "keeps_order",
        lambda *given: True,
    ),
    "modes come back": Guard(
        f"{TRACE}::test_leaves_no_trace[profile, fast]", "preserved", lambda model: spoiled(lambda m: m.eval(), model)
    ),
    "flags come back": Guard(
        f"{TRACE}::test_leaves_no_trace[profile, loop]",
        "preserved",
        lambda model: spoiled(lambda m: m.requires_grad_(True), model),
    ),
    "predictions leave the model alone": Guard(f"{TRACE}::test_leaves_no_trace[predict]", "preserved", nullcontext),
    "edits are undone": Guard(f"{TRACE}::test_leaves_no_trace[edited, prune]", "restored", never_restored),
    "loaders have a generator of their own": Guard(
        f"{TRACE}::test_leaves_no_trace[profile_dataset]", "DataLoader", without(DataLoader, generator=None)
    ),
    "patches are whole or not applied": Guard(
        f"{TRACE}::test_leaves_no_trace_wherever_it_is_cut_off[Patch.applied]",
        (scaling, "take_off"),
        only_outside_of_errors(scaling.take_off),
    ),
    "nothing is kept": Guard(
        f"{TRACE}::test_memory_is_flat[profile, fast]",
        "preserved",
        lambda model: kept.append(torch.ones(1 << 20)) or preserved(model),
    ),
    "checkpoints hold tensors only": Guard(
        f"{UNTRUSTED}::test_no_code_runs[torch.save-checkpoint]",
        (torch, "load"),
        without(torch.load, weights_only=False),
    ),
    "YAML of networks holds values only": Guard(
        f"{UNTRUSTED}::test_yaml_takes_values_only", (yaml, "safe_load"), yaml.unsafe_load
    ),
    "YAML of sweeps holds values only": Guard(
        f"{UNTRUSTED}::test_yaml_takes_values_only", (yaml, "load"), lambda text, loader: yaml.unsafe_load(text)
    ),
    "headers may be deep": Guard(
        f"{UNTRUSTED}::test_crafted_headers_are_refused[metadata deep in brackets-patch]",
        "pss.storage.tensors.RecursionError",
        ZeroDivisionError,
    ),
    "pages of sweeps are escaped": Guard(
        f"{UNTRUSTED}::test_index_of_a_sweep_escapes_names", "Environment", without(Environment, autoescape=False)
    ),
    "reports are escaped": Guard(
        f"{REPORT}::test_names_are_text_whatever_they_hold",
        "Environment",
        without(Environment, autoescape=False),
    ),
    "checksums are compared": Guard(
        f"{PATCHES}::test_damaged_or_other_files_are_refused", "pss.storage.tensors.digest", lambda *parts: "as ever"
    ),
    "rows are compared": Guard(
        "tests/test_profiles.py::test_damage_names_the_row_and_resuming_mends_it",
        "pss.storage.records.zlib",
        SimpleNamespace(crc32=lambda *given: 0),
    ),
    "files are whole or absent": Guard(
        f"{PATCHES}::test_file_is_whole_or_not_there", (Path, "unlink"), lambda path, missing_ok=False: None
    ),
    "patches are for this model": Guard(
        f"{PATCHES}::test_another_model_is_refused", "base_fingerprint", lambda model: "any"
    ),
}


def take_out(guard: Guard) -> None:
    """Patch, for as long as this process lives."""
    if isinstance(guard.place, tuple):
        places = [guard.place]
    elif "." in guard.place:
        places = [(import_module(guard.place.rpartition(".")[0]), guard.place.rpartition(".")[2])]
    else:
        names = [found.name for found in walk_packages(pss.__path__, "pss.") if "__main__" not in found.name]
        modules = [import_module(name) for name in names]
        places = [(module, guard.place) for module in modules if guard.place in vars(module)]
    assert places, f"nothing in pss is called {guard.place}: where is the guard now?"
    for owner, name in places:
        setattr(owner, name, guard.instead)


def run(root, tests: list[str], first: str = "") -> tuple[int, str]:
    """Exit status and output of pytest on these tests, in a process that did something first."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "", *tests]
    code = f"import sys; sys.path[:0] = ['tests', '.']\nimport pytest, test_guards\n{first}\n"
    code += f"sys.exit(pytest.main({options}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_with_their_guards_the_tests_are_green(root):
    status, said = run(root, sorted({guard.test for guard in GUARDS.values()}))
    assert status == 0, said[-3000:]


@pytest.mark.parametrize("name", GUARDS)
def test_without_the_guard_its_test_goes_red(root, name, record_property):
    status, said = run(root, [GUARDS[name].test], f"test_guards.take_out(test_guards.GUARDS[{name!r}])")
    assert status == 1, said[-3000:]  # a test failed, or what it is made of; 2 and above: none was run
    assert "1 failed" in said or "1 error" in said
    record_property("count guards broken", 1)
