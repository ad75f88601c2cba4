"""The same seed gives the same numbers: to the bit in another process, to a stated tolerance with another number of
threads; and every artefact says what made it."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from artefacts import BY_NAME, KINDS, contents
from safetensors import safe_open

import pss
from pss.models.resnet import committed
from pss.patches import fit_patch
from pss.units import Units

# float32 sums in another order differ in the last bits: relative to a unit's own size, and to the largest of its image.
RTOL, ATOL = 1e-4, 1e-6
TIES = 1e-3  # two units may change places where their scores are as close as this, relatively


def small() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A smooth network (a ReLU whose input is zero but for rounding may go either way) and 40 images."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 16, 3), torch.nn.Tanh(), torch.nn.Conv2d(16, 24, 3), torch.nn.Tanh()]
        model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(96, 5))
    images = torch.randn(60, 3, 16, 16, generator=generator)
    with torch.no_grad():
        labels = model.eval()(images).topk(2).indices
    return model, images, torch.where(torch.arange(60) < 8, labels[:, 1], labels[:, 0])  # eight mistakes


def everything(folder: Path) -> dict[str, np.ndarray | pd.DataFrame | str]:
    """Profile, store, reference, rankings, curves, costs, patch, maps and tables, all from seed 0."""
    model, images, labels = small()
    units = Units.of(model)
    data = torch.utils.data.TensorDataset(images, labels)
    store = pss.profile_dataset(model, data, units, folder / "store", progress=False, data_name="small")
    reference = pss.Reference.fit(store, level=0.75)
    s = pss.profile(model, images[:8], labels[:8], units)
    found = {"profile": s.numpy(), "store": np.array(store.profiles)}
    found |= {f"reference {n}": getattr(reference, n).numpy() for n in ("mean", "std", "threshold", "xi", "scale")}
    for method in ("zscore", "pot", "exponential", "raw", "random", "layer_matched_random", "random_last_stage"):
        found[f"ids {method}"] = pss.rank(s, reference, method, 20, units=units).numpy()
        if method in ("zscore", "pot", "exponential", "raw"):
            found[f"score {method}"] = pss.ranking.score(s, reference, method).numpy()
    ids = torch.arange(12).expand(8, 12)  # the same units for every number of threads
    found["curves"] = pss.edit_curves(model, images[:8], labels[:8], ids, units, "finetune", lr=1e-2, progress=False)
    retain, usual = (images[20:], labels[20:]), images[8:20]
    found["costs"] = pss.smallest_correction(
        model, images[:8], labels[:8], units, {"first": ids}, 12, ["gains", "weights"], retain, usual, progress=False
    )
    found["stages"] = pss.stage_shares(ids, units)
    noisy = {"noise_iters": 2, "noise_share": 0.1, "generator": 0}
    found["map"] = pss.input_saliency(model, images[:2], labels[:2], units, reference, k=5, **noisy).numpy()
    patch = fit_patch(model, (images[:1], labels[:1]), retain, units, budget=1e9, progress=False)
    patch.save(folder / "patch.safetensors")
    reference.save(folder / "reference.safetensors")
    found["patch"] = patch.gains.numpy()
    found["evidence"] = patch.evidence
    for name in ("svhn_like", "mnist_m", "noise"):
        found[name] = pss.data.load(name, "test").fingerprint
    return found


def digests(found: dict, folder: Path) -> dict[str, str]:
    """SHA-256 of every result and of every file."""
    parts = {}
    for name, value in found.items():
        value = value.to_csv(float_format="%.17g") if isinstance(value, pd.DataFrame) else value
        parts[name] = value.encode() if isinstance(value, str) else np.ascontiguousarray(value).tobytes()
    parts |= contents(folder)
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("here")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield everything(folder), folder
    torch.set_num_threads(before)


def test_same_bytes_in_another_process_with_other_hashes(here, tmp_path):
    """A fresh process, other string hashes, another directory, other global seeds: the same bits, files too."""
    program = (
        "import json, pathlib, random, sys; sys.path.insert(0, sys.argv[1]); import numpy, torch\n"
        "torch.set_num_threads(1); torch.manual_seed(77); numpy.random.seed(77); random.seed(77)\n"
        "from test_reproducible import digests, everything\n"
        "folder = pathlib.Path(sys.argv[2]); print(json.dumps(digests(everything(folder), folder)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    other, found = json.loads(done.stdout.splitlines()[-1]), digests(*here)
    assert {name for name in found if other.get(name) != found[name]} == set() and other.keys() == found.keys()


def test_two_threads_agree_with_one(here, tmp_path):
    """Numbers within 1e-4 of themselves; unit ids in the same places but for ties; what is drawn is the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other = everything(tmp_path)
    finally:
        torch.set_num_threads(before)
    one, _ = here
    for name, expected in one.items():
        got = other[name]
        if name.startswith("ids "):
            check_order(expected, got, one.get(f"score {name[4:]}"))
        elif isinstance(expected, pd.DataFrame):
            pd.testing.assert_frame_equal(got, expected, rtol=RTOL, atol=ATOL)
        elif isinstance(expected, str):
            assert got == expected, name
        else:
            scale = np.nanmax(np.abs(expected)) if expected.dtype.kind == "f" else 0
            loose = (
                20 if "reference" in name or "score" in name else 1
            )  # a difference of like numbers, or a fit to them
            np.testing.assert_allclose(got, expected, loose * RTOL, ATOL * max(scale, 1e-30) * loose, err_msg=name)


def check_order(expected: np.ndarray, got: np.ndarray, scores: np.ndarray | None) -> None:
    """Equal, or where two ids changed places their scores differ by less than TIES."""
    if scores is None:  # drawn at random: nothing to be rounded
        np.testing.assert_array_equal(got, expected)
        return
    for a, b, score in zip(expected, got, scores, strict=True):
        np.testing.assert_allclose(score[b], score[a], rtol=TIES, atol=TIES * np.abs(score).mean())
        assert len(set(a[:5]) & set(b[:5])) >= 4


def test_batches_give_the_rows_of_single_images():
    """Profiles in one batch, in many and one by one: the same to the stated tolerance."""
    model, images, labels = small()
    whole = pss.profile(model, images, labels)
    for size in (1, 7):
        parts = [pss.profile(model, x, y) for x, y in zip(images.split(size), labels.split(size), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=RTOL, atol=ATOL * float(whole.max()))


def test_seeds_matter_and_are_the_only_source_of_chance():
    model, images, labels = small()
    units, s = Units.of(model), pss.profile(model, images[:4], labels[:4])
    draw = lambda seed: pss.rank(s, None, "random", units=units, generator=seed)  # noqa: E731
    torch.manual_seed(1)
    first = draw(3)
    torch.manual_seed(2)
    assert torch.equal(draw(3), first) and not torch.equal(draw(4), first)


TORCH = r"torch\.(rand\w*|randn\w*|normal|bernoulli|multinomial|manual_seed|seed)"
IN_PLACE = r".*\.(normal_|uniform_|exponential_|bernoulli_|random_)"
NUMPY = r"(np|numpy)\.random\.(?!default_rng|Generator|SeedSequence)\w+|random\.\w+"


def test_no_function_draws_from_a_global_generator(root):
    """Every draw in `pss` names its generator; the one seed of torch is set inside `fork_rng`, which restores it."""
    wrong, forked = [], []
    for path in sorted((root / "pss").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        for block in (node for node in ast.walk(tree) if isinstance(node, ast.With)):
            if any("fork_rng" in ast.unparse(item) for item in block.items):
                forked += [id(node) for node in ast.walk(block)]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, own = ast.unparse(call.func), "generator" in {keyword.arg for keyword in call.keywords}
            draws = re.fullmatch(f"{TORCH}|{IN_PLACE}|(.*\\.)?DataLoader", name) and not own
            if (draws or re.fullmatch(NUMPY, name)) and id(call) not in forked:
                wrong.append(f"{path.name}:{call.lineno} {ast.unparse(call)[:60]}")
    assert wrong == [] and forked


# --- artefacts say what made them -------------------------------------------------------------------------------------


def header(path: Path) -> dict:
    """What a safetensors file says of itself."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_store_reference_and_patch_say_what_made_them(here):
    model, folder = small()[0], here[1]
    made = {"pss": pss.__version__, "model": pss.models.fingerprint(model), "units": Units.of(model).fingerprint}
    manifest = json.loads((folder / "store" / "manifest.json").read_text())
    how = {"data": "small", "loss": "cross_entropy", "signed": False}
    assert (
        manifest["provenance"].items() >= (made | how).items()
        and manifest["computed_with"]["torch"] == torch.__version__
    )
    assert {"batch_size", "threads", "checksum"} <= manifest.keys()
    reference = json.loads(header(folder / "reference.safetensors")["pss"])
    assert reference["provenance"].items() >= (made | {"data": "small", "loss": "cross_entropy"}).items()
    assert reference.items() >= {"n": 60, "level": 0.75, "scale_free": False}.items() and "checksum" in reference
    patch = json.loads(header(folder / "patch.safetensors")["patch"])
    about = patch["about"] | {"model": patch["model"]}
    assert about.items() >= (made | {"budget": "1000000000.0", "seed": "0"}).items()
    assert len(about["mistakes"]) == len(about["retain"]) == 64 and about["mistakes"] != about["retain"]


def test_weights_and_the_shipped_model_say_what_made_them(tmp_path):
    BY_NAME["weights"].write(tmp_path, 0)
    record = pss.models.read_record(tmp_path / "weights.safetensors")
    assert record["pss"] == pss.__version__ and record["seed"] == "0" and len(record["sha256"]) == 64
    shipped = pss.models.read_record(committed())
    assert {"seed", "width", "epochs", "threads", "torch", "train_set", "sha256"} <= shipped.keys()


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_written_twice_the_bytes_are_the_same(kind, tmp_path):
    """No times, no addresses, no order by chance in what is written."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        kind.write(tmp_path / place, 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != {}
