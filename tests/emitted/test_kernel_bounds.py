"""No access of an emitted kernel leaves its tensor, and every output is stored exactly once.

Each layer is emitted with each family and span that serves it and run in Triton's interpreter,
which tells the addresses that its loads and stores reach unmasked. The interpreter has to be chosen
before triton is imported, so this file is also the script that does so: the tests run it in a
process of its own.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from convgen import ConvTransposeSpec, emit, parse
from convgen.execution.loading import load_module
from convgen.execution.oracle import reference
from convgen.tables.pointwise import Stage
from drawing import each_form
from interpreting import prepare, skip_where_it_fails

pytestmark = pytest.mark.interpreter

# An idea each that could break an access. Behind a slash: entries of `input` left to run time.
HAND_WRITTEN = {
    "a copy": "ConvTranspose3d(16, 4, (2, 1, 3), 1, (1, 0, 1), input=(2, 16, 3, 5, 7))",
    "a copy of a strided layer": "ConvTranspose2d(72, 8, 3, (1, 2), 1, input=(3, 72, 5, 9))",
    "one tap of one input": "ConvTranspose1d(1, 1, 1, input=(1, 1, 1))",
    "channels past a block": "ConvTranspose2d(5, 17, 3, input=(2, 5, 3, 7))",
    "channels that fill theirs": "ConvTranspose2d(16, 16, 3, input=(1, 16, 4, 8))",
    "a kernel longer than the input": "ConvTranspose1d(3, 2, 9, input=(2, 3, 2))",
    "padding beyond the kernel": "ConvTranspose1d(2, 3, 2, padding=4, input=(2, 2, 12))",
    "phases without taps": "ConvTranspose2d(2, 3, 2, stride=5, input=(1, 2, 4, 3))",
    "outputs between taps": "ConvTranspose1d(2, 3, 3, 4, dilation=6, input=(1, 2, 9))",
    "outputs after the last tap": "ConvTranspose1d(2, 2, 2, 2, 0, 6, dilation=7, input=(1, 2, 5))",
    "phases told by a division": "ConvTranspose1d(1, 2, 9, 8, 3, dilation=15, input=(1, 1, 7))",
    "depthwise": "ConvTranspose2d(6, 6, 3, 2, 1, 1, groups=6, input=(2, 6, 4, 5))",
    "images that share a tile": "ConvTranspose3d(2, 2, 2, 2, input=(9, 2, 2, 1, 3))",
    "padding stays zero": "add(1) | ConvTranspose2d(3, 2, 3, 2, 1, input=(1, 3, 4, 4)) | mul(0.5)",
    "every size of run time": "ConvTranspose2d(3, 4, (3, 2), (2, 3), input=(2, 3, 6, 5)) / 0123",
    "channels of run time": "ConvTranspose2d(34, 18, 2, groups=2, input=(2, 34, 3, 3)) / 1",
    "a padding of run time": "ConvTranspose1d(3, 2, 2, padding=3, input=(3, 3, 6)) / 02",
    "whole groups of inputs": "ConvTranspose2d(3, 5, 3, padding=1, input=(2, 3, 3, 8))",
    "a row that ends in a group": "ConvTranspose2d(3, 5, 3, 1, 1, dilation=3, input=(2, 3, 3, 9))",
    "a group longer than the row": "ConvTranspose1d(2, 3, 4, 2, 1, input=(3, 2, 1))",
    "lanes beyond a group's outputs": "ConvTranspose2d(4, 6, 3, 3, 1, 2, 2, input=(2, 4, 2, 5))",
    "groups of run time": "ConvTranspose2d(3, 17, 5, (2, 5), 2, input=(2, 3, 3, 4)) / 023",
    "groups padded away": "ConvTranspose1d(2, 2, 2, 2, padding=13, input=(2, 2, 16))",
    # Found by the fuzzer, seed 12 number 627: conditions on a whole tile were not printed.
    "one row of whole tiles": "ConvTranspose2d(9, 9, (3, 1), padding=(1, 0), input=(1, 9, 1, 128))",
    "whole tiles, all channels": "ConvTranspose2d(16, 16, 3, 1, 1, input=(1, 16, 1, 128))",
    "few rows": "ConvTranspose2d(9, 7, (3, 1), (3, 1), (10, 0), input=(1, 9, 7, 128))",
    "no other condition": "ConvTranspose2d(16, 16, (3, 1), (3, 1), (10, 0), input=(1, 16, 7, 128))",
}
EXACT_STAGES = (
    Stage("relu"),
    Stage("leaky_relu", (0.5,)),
    Stage("clamp", (-1.0, 2.0)),
    Stage("add", (1.0,)),
    Stage("mul", (-2.0,)),
)
RANDOM_LAYERS = 28
FORMS = {"autotuned", "gather 1", "polyphase 1", "polyphase 2", "polyphase 4"}
COPIES = {"a copy": "gather 1 copy", "a copy of a strided layer": "polyphase 1 copy"}
SHARES = 2  # so that workers of pytest-xdist can divide the work; each starts a process
SUPPORT = Path(__file__).parents[1] / "support"  # what the processes of this file import from


def random_layer(rng):
    """Return a small layer, and which entries of its input are left to run time."""
    rank = rng.choice((1, 2, 2, 3))
    kernel, stride, dilation = ([rng.randint(1, 4) for _ in range(rank)] for _ in range(3))
    padding = [rng.randint(0, 4) for _ in range(rank)]
    groups = rng.choice((1, 1, 1, 2, 3))
    c_in, c_out = (groups * rng.choice((1, 2, 3, 8, 17)) for _ in range(2))
    spatial = [  # one output at least is left
        max(1, 2 + (2 * p - d * (k - 1) - 1) // s) + rng.randint(0, 5)
        for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True)
    ]
    spec = ConvTransposeSpec(
        rank=rank,
        in_channels=c_in,
        out_channels=c_out,
        kernel_size=tuple(kernel),
        stride=tuple(stride),
        padding=tuple(padding),
        output_padding=tuple(
            rng.randrange(max(pair)) for pair in zip(stride, dilation, strict=True)
        ),
        groups=groups,
        bias=rng.random() < 0.5,
        dilation=tuple(dilation),
        input=(rng.randint(1, 3), c_in, *spatial),
        dtype=rng.choice(("float32", "float32", "float16", "float64")),
        layout=rng.choice(("channels_first", "channels_last")) if rank > 1 else "channels_first",
        grid=rng.choice((None, 1, 2, 3)),
        autotune=rng.choice(("none", "none", "blocks", "launch")),
        before=tuple(rng.sample(EXACT_STAGES, rng.choice((0, 0, 1)))),
        after=tuple(rng.sample(EXACT_STAGES, rng.choice((0, 0, 1, 2)))),
    )
    opened = [n for n in range(rank + 2) if rng.random() < 0.5] if rng.random() < 0.3 else []
    return f"{spec} / {''.join(map(str, opened))}"


def layers(share):
    """Return the layers of a share: the hand-written ones are the first."""
    rng = random.Random(20261122)
    texts = [*HAND_WRITTEN.values(), *(random_layer(rng) for _ in range(RANDOM_LAYERS))]
    return texts[share::SHARES]


@pytest.mark.parametrize("name", COPIES)
def test_a_layer_has_the_form_that_it_stands_for(name):
    assert COPIES[name] in each_form(parse(HAND_WRITTEN[name]), 0)


@pytest.mark.parametrize("share", range(SHARES))
def test_every_access_stays_inside_its_tensor(share):
    """Breaks if a mask is missing, an offset is wrong, or tiles overlap or leave a hole."""
    skip_where_it_fails()
    texts = layers(share)
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SUPPORT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    problems = json.loads(done.stdout)
    assert list(problems) == texts
    assert [
        (text, *found) for text, forms in problems.items() for found in forms.items() if found[1]
    ] == []
    assert set().union(*problems.values()) >= FORMS


def test_the_recorder_sees_an_access_that_leaves_its_tensor():
    """Breaks if the test above could not fail: here the weight is one element too short."""
    done = subprocess.run(
        [sys.executable, __file__, "--shorten"],
        input=json.dumps(["ConvTranspose1d(2, 3, 3, input=(1, 2, 4))"]),
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SUPPORT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout).values()
    assert set(found) >= {"gather 1", "polyphase 2", "polyphase 4"}
    assert all(problems == ["a load leaves its tensor"] for problems in found.values())


def record_accesses():
    """Have the interpreter note the addresses of each load and store; return the two lists."""
    from triton.runtime.interpreter import InterpreterBuilder

    loads, stores = [], []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted_load(self, ptrs, mask, *rest, **options):
        loads.append(ptrs.data[mask.data.astype(bool)].astype(np.int64))
        return load(self, ptrs, mask, *rest, **options)

    def noted_store(self, ptrs, value, mask, *rest, **options):
        stores.append(ptrs.data[mask.data.astype(bool)].astype(np.int64))
        return store(self, ptrs, value, mask, *rest, **options)

    InterpreterBuilder.create_masked_load = noted_load
    InterpreterBuilder.create_masked_store = noted_store
    return loads, stores


def elements(addresses, tensor):
    """Return the addresses as offsets in the tensor, None if one lies outside of it."""
    offsets = addresses - tensor.data_ptr()
    inside = (offsets >= 0) & (offsets < tensor.numel() * tensor.element_size())
    return offsets // tensor.element_size() if inside.all() else None


def problems_of(text, *rest):
    """Run each file that serves the layer on integers; return what is wrong with it."""
    layer, _, opened = text.partition(" / ")
    sized = parse(layer)
    sizes = [None if str(n) in opened else size for n, size in enumerate(sized.input)]
    open_channels = {"in_channels": None, "out_channels": None} if sizes[1] is None else {}
    spec = dataclasses.replace(sized, input=tuple(sizes), **open_channels)
    files = {form: source.text for form, source in each_form(spec, text).items()}
    if spec.autotune != "none":
        files["autotuned"] = emit(spec)
    return {form: problems_of_file(sized, form, files[form], *rest) for form in files}


def copies_of(module):
    """Return a list that gets the copies of inputs that a file makes."""
    copies = []
    copied = getattr(module, "_copied", None)
    if copied is not None:
        module._copied = lambda x: copies.append(copied(x)) or copies[-1]
    return copies


def problems_of_file(sized, form, text, loads, stores, folder, shorten):
    """Return what is wrong with a file's accesses and its numbers."""
    import torch

    module = load_module(text, form.replace(" ", "_"), folder)
    rng = np.random.default_rng(0)
    weight_shape = (sized.in_channels, sized.out_channels // sized.groups, *sized.kernel_size)
    x, weight = (rng.integers(-2, 3, shape).astype(float) for shape in (sized.input, weight_shape))
    bias = rng.integers(-2, 3, sized.out_channels).astype(float) if sized.bias else None

    dtype = getattr(torch, sized.dtype)
    given = torch.from_numpy(x).to(dtype)
    if sized.layout == "channels_last":
        dense = {2: torch.channels_last, 3: torch.channels_last_3d}[sized.rank]
        given = given.contiguous(memory_format=dense)
    packed = module.pack_weight(torch.from_numpy(weight).to(dtype))
    given_bias = None if bias is None else torch.from_numpy(bias).to(dtype)
    copies = copies_of(module)
    loads.clear(), stores.clear()
    y = getattr(module, f"conv_transpose{sized.rank}d_packed")(given, packed, given_bias)

    tensors = [given, packed.flatten()[:-1] if shorten else packed]
    tensors += [*copies, *([] if given_bias is None else [given_bias])]
    problems = []
    if not all(any(elements(load, t) is not None for t in tensors) for load in loads):
        problems.append("a load leaves its tensor")
    written = [y, *copies]
    if not all(any(elements(store, t) is not None for t in written) for store in stores):
        problems.append("a store leaves its tensor")
    for tensor in written:
        found = [elements(store, tensor) for store in stores]
        stored = np.concatenate([of for of in found if of is not None])
        if not np.array_equal(np.sort(stored), np.arange(tensor.numel())):
            problems.append("an output is not stored exactly once")
    if not np.array_equal(y.double().numpy(), reference(sized, x, weight, bias)):
        problems.append("the output differs from the oracle's")
    return problems


def main():
    """Read layers from stdin, print what is wrong with each."""
    loads, stores = record_accesses()
    prepare()
    warnings.simplefilter("error")
    found = {}
    for text in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as folder:
            shorten = "--shorten" in sys.argv
            found[text] = problems_of(text, loads, stores, Path(folder), shorten)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
