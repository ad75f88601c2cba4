"""The same numbers on a GPU as on the CPU; skipped where there is none."""

import copy

import numpy as np
import pytest
import torch

import pss
from pss import evt
from pss.data.vision import torchvision
from pss.input_space import gain_map

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def setting():
    """A small network on both devices in float64, images, labels, and a reference made on the CPU."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).double().eval()
    images = torch.randn(32, 3, 32, 32, dtype=torch.float64)
    labels = torch.randint(10, (32,))
    units = pss.Units.of(model)
    profiles = pss.profile(model, images, labels, units)
    return model, copy.deepcopy(model).cuda(), images, labels, units, profiles, pss.Reference.fit(profiles)


def close(on_gpu: torch.Tensor, on_cpu: torch.Tensor, rtol: float = 1e-8) -> None:
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=rtol, atol=rtol * on_cpu.abs().max().item())


@pytest.mark.parametrize("strategy", ["fast", "vmap", "loop"])
def test_profile(setting, strategy):
    _, model, images, labels, units, profiles, _ = setting
    close(pss.profile(model, images[:6].cuda(), labels[:6].cuda(), units, strategy=strategy), profiles[:6])


def test_bf16_backward_is_near(setting):
    model, _, images, labels, units, profiles, _ = setting
    near = pss.profile(
        copy.deepcopy(model).float().cuda(), images.float().cuda(), labels.cuda(), units, precision="bf16"
    )
    error = (near.cpu() - profiles).abs().sum() / profiles.sum()
    assert 0 < error < 0.02


@pytest.mark.parametrize("of", ["gradient", "gain", "output"])
def test_float32_takes_the_fast_path(of):
    """Convolutions in TensorFloat-32 round to 1e-3, and otherwise in a batch of another size; in the loop as well."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10).eval().cuda()
    images, labels = torch.randn(32, 3, 64, 64).cuda(), torch.randint(10, (32,)).cuda()
    units = pss.Units.of(model)
    exact = pss.profile(copy.deepcopy(model).double(), images.double(), labels, units, of=of)
    off = {
        strategy: float((pss.profile(model, images, labels, units, strategy=strategy, of=of) - exact).norm())
        for strategy in ("fast", "loop")
    }
    assert off["fast"] <= 2 * off["loop"] < 0.3 * float(exact.norm())


@pytest.mark.parametrize("kind", ["rows", "heads"])
def test_transformer(kind):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10).double().eval()
    images, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 4, 9])
    units = pss.Units.of(model, kind=kind)
    on_cpu = pss.profile(model, images, labels, units)
    close(pss.profile(model.cuda(), images.cuda(), labels.cuda(), units), on_cpu)


def test_reference_and_ranking(setting):
    *_, profiles, reference = setting
    close(reference.zscore(profiles.cuda()), reference.zscore(profiles))
    close(reference.tail_score(profiles.cuda()), reference.tail_score(profiles))
    for method in ("zscore", "pot", "raw"):
        on_gpu = pss.rank(profiles.cuda(), reference, method, k=25)
        assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), pss.rank(profiles, reference, method, k=25))


def test_tail_fit():
    generator = torch.Generator().manual_seed(0)
    excesses = torch.rand(200, 300, generator=generator, dtype=torch.float64) ** -0.4 - 1
    on_gpu, on_cpu = evt.fit_gpd(excesses.cuda()), evt.fit_gpd(excesses)
    for name in ("xi", "scale", "log_likelihood", "se_xi"):
        close(getattr(on_gpu, name), getattr(on_cpu, name), rtol=1e-7)


@pytest.mark.parametrize("edit", ["finetune", "prune"])
def test_edit_curves(setting, edit):
    model, on_gpu, images, labels, units, profiles, reference = setting
    top = pss.rank(profiles[:4], reference, "zscore", k=10)
    expected = pss.edit_curves(model, images[:4], labels[:4], top, units, edit)
    before = {name: tensor.clone() for name, tensor in on_gpu.state_dict().items()}
    found = pss.edit_curves(on_gpu, images[:4].cuda(), labels[:4].cuda(), top.cuda(), units, edit)
    torch.testing.assert_close(
        torch.tensor(found["loss"].to_numpy()), torch.tensor(expected["loss"].to_numpy()), rtol=1e-8, atol=0
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in on_gpu.state_dict().items())


def test_input_saliency(setting):
    model, on_gpu, images, labels, units, _, reference = setting
    on_cpu = pss.input_saliency(model, images[:2], labels[:2], units, reference)
    close(pss.input_saliency(on_gpu, images[:2].cuda(), labels[:2].cuda(), units, reference), on_cpu, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["fast", "vmap", "loop"])
@pytest.mark.parametrize("signed", [True, False])
def test_gain_and_both_at_once(setting, strategy, signed):
    model, on_gpu, images, labels, units, *_ = setting
    x, y, how = images[:4], labels[:4], {"signed": signed, "loss": "logit_difference"}
    gain = pss.profile(model, x, y, units, of="gain", **how)
    close(pss.profile(on_gpu, x.cuda(), y.cuda(), units, of="gain", strategy=strategy, **how), gain)
    both = pss.profile(on_gpu, x.cuda(), y.cuda(), units, of=("gradient", "gain"), strategy=strategy, **how)
    close(both[1], gain)
    close(both[0], pss.profile(model, x, y, units, **how))


def test_output(setting):
    model, on_gpu, images, labels, units, *_ = setting
    x, y = images[:4], labels[:4]
    close(pss.profile(on_gpu, x.cuda(), y.cuda(), units, of="output"), pss.profile(model, x, y, units, of="output"))


def test_gain_map(setting):
    model, on_gpu, images, labels, units, *_ = setting
    x, y = images[:2], labels[:2]
    close(gain_map(on_gpu, x.cuda(), y.cuda(), units), gain_map(model, x, y, units), rtol=1e-6)


@pytest.fixture(scope="module")
def misread(setting):
    """Two images with the second best class as label, and others with the best."""
    model, on_gpu, images, *_ = setting
    with torch.no_grad():
        best, second = model(images).topk(2).indices.unbind(1)
    return model, on_gpu, (images[:2], second[:2]), (images[2:], best[2:])


@pytest.mark.parametrize("through", ["gains", "weights"])
def test_smallest_correction(misread, through):
    model, on_gpu, (x, y), (others, right) = misread
    usual, retain, right = others[:15], others[15:], right[15:]
    how = {"through": through, "progress": False}
    expected = pss.smallest_correction(model, x, y, retain=(retain, right), usual=usual, **how)
    on_device = {"retain": (retain.cuda(), right.cuda()), "usual": usual.cuda()}
    found = pss.smallest_correction(on_gpu, x.cuda(), y.cuda(), **on_device, **how)
    assert expected["corrected"].all() and found["corrected"].all()
    for name in expected.select_dtypes("number").columns:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-9, err_msg=name)


def test_patch(misread, tmp_path):
    model, on_gpu, mistakes, retain = misread
    how = {"budget": 10.0, "margin": 0.05, "progress": False}
    expected = pss.fit_patch(model, mistakes, retain, **how)
    found = pss.fit_patch(on_gpu, *((x.cuda(), y.cuda()) for x, y in (mistakes, retain)), **how)
    torch.testing.assert_close(found.gains.cpu(), expected.gains, rtol=1e-4, atol=1e-6)
    # Made on one device, kept, and put on a model on the other.
    expected.save(tmp_path / "patch")
    patch = pss.Patch.load(tmp_path / "patch")
    with patch.applied(on_gpu), patch.applied(model), torch.no_grad():
        close(on_gpu(mistakes[0].cuda()), model(mistakes[0]))
        assert torch.equal(on_gpu(mistakes[0].cuda()).argmax(1).cpu(), mistakes[1])
