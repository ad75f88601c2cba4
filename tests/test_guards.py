"""Tests that can fail: each guard below is taken out of a copy of the project, and its test must then go red.

`make test-faults` runs this. A guard whose text has moved is an error here: write the new one.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

pytestmark = pytest.mark.faults


@dataclass(frozen=True)
class Guard:
    """A text of a module, what to put in its place, and the test that must notice."""

    module: str
    text: str
    instead: str
    test: str


BAD, TRACE, UNTRUSTED = "tests/test_bad_input.py", "tests/test_no_trace.py", "tests/test_untrusted.py"
GUARDS = {
    "images are finite": Guard(
        "saliency", "        if not finite.all():", "        if False:", f"{BAD}::test_is_refused[image with NaN]"
    ),
    "a pass verifies itself": Guard(
        "saliency",
        "            if verify and (",
        "            if False and (",
        "tests/test_verification.py::test_a_broken_guard_is_seen[float64-gains]",
    ),
    "rows follow samples": Guard(
        "engine/locating",
        "x.shape == shifted.shape and close(",
        "True or close(",
        "tests/test_gradients.py::test_a_sorted_batch_whose_last_image_keeps_its_place",
    ),
    "labels are classes": Guard(
        "saliency",
        "    if len(outside):",
        "    if False:",
        f"{BAD}::test_is_refused[label too large]",
    ),
    "modes come back": Guard(
        "engine/state",
        "            module.training = training",
        "            pass",
        f"{TRACE}::test_leaves_no_trace[profile, fast]",
    ),
    "flags come back": Guard(
        "engine/state",
        "            parameter.requires_grad_(requires_grad)",
        "            pass",
        f"{TRACE}::test_leaves_no_trace[profile, loop]",
    ),
    "edits are undone": Guard(
        "editing",
        "            view.copy_(values)",
        "            pass",
        f"{TRACE}::test_leaves_no_trace[edited, prune]",
    ),
    "predictions leave the model alone": Guard(
        "models/builtin",
        "    with preserved(model), torch.no_grad():",
        "    with torch.no_grad():",
        f"{TRACE}::test_leaves_no_trace[predict]",
    ),
    "loaders have a generator of their own": Guard(
        "storage/passes",
        "generator=torch.Generator(),",
        "generator=None,",
        f"{TRACE}::test_leaves_no_trace[profile_dataset]",
    ),
    "patches are whole or not applied": Guard(
        "patches",
        "        except BaseException:  # all units or none",
        "        except ZeroDivisionError:",
        f"{TRACE}::test_leaves_no_trace_wherever_it_is_cut_off[Patch.applied]",
    ),
    "nothing is kept": Guard(
        "saliency",
        "    size = _images_at_once(images)\n",
        "    size = _images_at_once(images)\n    globals().setdefault('_kept', []).append(labels.clone())\n",
        f"{TRACE}::test_memory_is_flat[profile, fast]",
    ),
    "checkpoints hold tensors only": Guard(
        "storage/tensors",
        "weights_only=True)",
        "weights_only=False)",
        f"{UNTRUSTED}::test_no_code_runs[torch.save-checkpoint]",
    ),
    "caches hold numbers only": Guard(
        "data/builtin",
        "allow_pickle=False",
        "allow_pickle=True",
        f"{UNTRUSTED}::test_no_code_runs[npz of objects-cache]",
    ),
    "YAML of networks holds values only": Guard(
        "models/zoo", "yaml.safe_load(", "yaml.unsafe_load(", f"{UNTRUSTED}::test_yaml_takes_values_only"
    ),
    "YAML of sweeps holds values only": Guard(
        "apps/parameters",
        "class _Loader(yaml.SafeLoader):",
        "class _Loader(yaml.UnsafeLoader):",
        f"{UNTRUSTED}::test_yaml_takes_values_only",
    ),
    "unsafe calls are looked for": Guard(
        "ranking",
        "import numpy as np\n",
        "import numpy as np\nimport pickle\nRANKS = pickle.loads(pickle.dumps(1))\n",
        f"{UNTRUSTED}::test_no_source_calls_what_runs_code_from_files",
    ),
    "headers may be deep": Guard(
        "storage/tensors",
        "(SafetensorError, ValueError, RecursionError)",
        "(SafetensorError, ValueError)",
        f"{UNTRUSTED}::test_crafted_headers_are_refused[metadata deep in brackets-patch]",
    ),
    "checksums are compared": Guard(
        "storage/tensors",
        'held.pop("checksum", None) != _checksum(tensors, held)',
        'held.pop("checksum", None) is None',
        "tests/test_patches.py::test_damaged_or_other_files_are_refused",
    ),
    "rows are compared": Guard(
        "storage/folder",
        '(_checksums(rows, records) != records["checksum"])',
        '(records["status"] > 9)',
        "tests/test_profiles.py::test_damage_names_the_row_and_resuming_mends_it",
    ),
    "files are whole or absent": Guard(
        "storage/whole",
        "        unfinished.unlink(missing_ok=True)",
        "        pass",
        "tests/test_patches.py::test_file_is_whole_or_not_there",
    ),
    "pages of sweeps are escaped": Guard(
        "apps/pages",
        "autoescape=True",
        "autoescape=False",
        f"{UNTRUSTED}::test_index_of_a_sweep_escapes_names",
    ),
    "reports are escaped": Guard(
        "apps/pages", "autoescape=True", "autoescape=False", f"{UNTRUSTED}::test_report_escapes_names"
    ),
    "pictures have a cap": Guard(
        "data/builtin",
        "        if width * height > max_pixels:",
        "        if False:",
        f"{BAD}::test_is_refused[too large a picture]",
    ),
    "formats of pictures are limited": Guard(
        "data/builtin", "formats=_FORMATS", "formats=None", f"{BAD}::test_is_refused[PostScript for a picture]"
    ),
    "pictures are turned upright": Guard(
        "data/builtin",
        "ImageOps.exif_transpose(image)",
        "image",
        f"{BAD}::test_odd_picture_shows_the_right_pixels[orientation 6]",
    ),
    "references are of this model": Guard(
        "input_space",
        "        reference.check(units, model=model, loss=loss, signed=signed)",
        "        pass",
        f"{BAD}::test_is_refused[map with a reference of another model]",
    ),
    "patches are for this model": Guard(
        "patches",
        "        if (found := base_fingerprint(model)) != self.model:",
        "        if (found := base_fingerprint(model)) == 0:",
        "tests/test_patches.py::test_another_model_is_refused",
    ),
    "levels are inside": Guard(
        "reference",
        "        if not 0 < level < 1:",
        "        if False:",
        f"{BAD}::test_is_refused[reference at level 1.5]",
    ),
    "ids are units": Guard(
        "editing", "    if outside.size:", "    if False:", f"{BAD}::test_is_refused[edit of a unit beyond]"
    ),
    "NaN predicts no class": Guard(
        "editing",
        ".masked_fill(logits.isnan().any(dim=-1), -1)",
        "",
        f"{BAD}::test_an_edit_that_overflows_predicts_no_class",
    ),
    "dead units come last": Guard(
        "ranking",
        "scores.masked_fill(reference.dead.to(scores.device), -torch.inf)",
        "scores",
        f"{BAD}::test_columns_without_a_tail_are_reported_and_ranked",
    ),
}


def run(folder, tests):
    """Exit status and output of pytest on these tests, in a copy of the project."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory, root):
    """The modules and tests, copied; what they read is linked. Unbroken, all the tests named here pass."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("pss", "tests"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", folder)
    for name in ("data", "bench", "docs", "notebooks", "environment.yml", "constraints.txt"):
        (folder / name).symlink_to(root / name)
    status, said = run(folder, sorted({guard.test for guard in GUARDS.values()}))
    assert status == 0, said[-3000:]
    return folder


@pytest.mark.parametrize("name", GUARDS)
def test_without_the_guard_its_test_goes_red(copy, name, record_property):
    guard = GUARDS[name]
    path = copy / "pss" / f"{guard.module}.py"
    whole = path.read_text("utf-8")
    assert whole.count(guard.text) == 1, f"{guard.module}.py has changed: where is the guard now?"
    try:
        path.write_text(whole.replace(guard.text, guard.instead), "utf-8")
        status, said = run(copy, [guard.test])
    finally:
        path.write_text(whole, "utf-8")
    assert status == 1, said[-3000:]  # a test failed, or what it is made of; 2 and above: none was run
    assert "1 failed" in said or "1 error" in said
    record_property("count guards broken", 1)
