"""Networks from transformers, torchvision, MONAI and others, in training, with emitted layers.

What would break it: a layer that is fed as its author never tested, a gradient that is lost on the
way, a layer whose kernel does not run. The reference is the same network in float64, with torch's
layers.
"""

import contextlib
import importlib.util
import re
from collections import Counter

import pytest
import torch
import torch.nn as nn

import convgen
from real_models import NETWORKS, made

pytestmark = pytest.mark.interpreter

KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# None that packs or copies; of a ladder, in either layout.
LAYER_KERNEL = re.compile(r"conv_transpose[123]d(_small|_large)?(_last)?_kernel")
NAMED = [(package, make) for package, makers in NETWORKS.items() for make in makers]


@contextlib.contextmanager
def launches(device, monkeypatch):
    """Give the counts of kernels by name, filled when the block ends."""
    found = Counter()
    if device == "cuda":
        from torch.profiler import ProfilerActivity, profile

        # Without acc_events torch 2.11 warns of cycles.
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
            yield found
            torch.cuda.synchronize()
        found.update({event.key: event.count for event in profiled.key_averages()})
        return
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def counted(executor, *arguments, **options):
        found[executor.fn.__name__] += 1
        return run(executor, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        yield found


def layers_run(found):
    return sum(count for name, count in found.items() if LAYER_KERNEL.fullmatch(name))


def hooked(model):
    """Return a list that gets an item at each call of a transposed convolution."""
    calls = []
    for layer in model.modules():
        if isinstance(layer, KINDS):
            layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def close(got, want, least=0.0):
    """Whether all values are near those of the reference, or both nearly nothing."""
    off = (got.double() - want).abs().max().item()
    return off <= 1e-3 * want.abs().max().item() + least


def stepped(network, x, rate=None):
    """Train one step; return the output, the gradients and the rate of learning."""
    output = network.call(network.model, x)
    output.square().sum().backward()
    parameters = [each for each in network.model.parameters() if each.grad is not None]
    gradients = [each.grad.clone() for each in parameters]
    if rate is None:  # moves the weights by a hundredth of their size
        lengths = (
            torch.stack([t.square().sum() for t in each]) for each in (parameters, gradients)
        )
        sizes, slopes = (each.sum().sqrt().item() for each in lengths)
        rate = 0.01 * sizes / slopes
    torch.optim.SGD(parameters, lr=rate, momentum=0.9).step()
    return output.detach(), gradients, rate


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("package", "make"), NAMED, ids=[f"{package}-{make.__name__}" for package, make in NAMED]
)
def test_a_network_trains_as_in_float64(package, make, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'convgen[test]'")
    network, reference = made(package, make), made(package, make)
    network.model.to(device)
    reference.model.to(device).double()
    x = torch.randn(network.shape, generator=torch.Generator().manual_seed(4)).to(device)
    calls = hooked(reference.model)
    want, slopes, rate = stepped(reference, x.double())
    assert calls

    convgen.replace_layers(network.model, strict=True)
    with launches(device, monkeypatch) as found:
        got, gradients, _ = stepped(network, x, rate)
    assert layers_run(found) == len(calls)
    assert close(got, want)
    least = 1e-6 * max(slope.abs().max().item() for slope in slopes)
    assert len(gradients) == len(slopes)
    assert all(close(*pair, least) for pair in zip(gradients, slopes, strict=True))

    with torch.no_grad(), launches(device, monkeypatch) as found:
        got, want = network.call(network.model, x), reference.call(reference.model, x.double())
    assert layers_run(found) == len(calls) / 2
    assert close(got, want)
