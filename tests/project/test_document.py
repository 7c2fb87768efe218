"""The document of a traced model: its names, its comments, and that the parser takes it.

What would break it: a name that a package cannot have, a layer that the comments do not tell of,
and text of a model that leaves its comment.
"""

import pytest
import torch
import torch.nn as nn

import convgen
from convgen import SpecError
from convgen.language.parser import parse_document
from convgen.network.trace import trace_layers
from convgen.project.document import document_of


class Wider(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x)


class Model(nn.Module):
    """Layers by name, and a function that is its forward."""

    def __init__(self, layers, forward=lambda layers, x: [layer(x) for layer in layers]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x):
        return self.function([*self.children()], x)


def document(model, *shape, target=None, opened=None):
    trace = trace_layers(model, [torch.ones(shape)], opened=opened)
    return document_of(trace, "nets:make", "convgen trace nets:make", target)


def test_a_document_tells_what_it_serves():
    """In the order of calls; what is left out is in it too."""
    same = {name: nn.ConvTranspose2d(3, 3, 3, 1, 1) for name in ("last", "same")}
    inner = Model({"up1": nn.ConvTranspose2d(3, 2, 4, 2), **same})
    model = Model(
        {"net": inner, "odd": Wider(3, 2, 2), "spare": nn.ConvTranspose2d(3, 2, 2)},
        lambda layers, x: (layers[0](x), layers[1](x)),
    )
    text = document(model, 1, 3, 4, 5, target="h100").text
    header, _, body = text.partition("target = h100\n")
    assert header.startswith(f"# Traced by convgen {convgen.__version__}: ")
    assert "\n# regenerate: convgen trace nets:make\n" in header
    assert body == (
        "\n# net.up1\n"
        "net_up1 = ConvTranspose2d(3, 2, kernel_size=4, stride=2, input=(1, 3, 4, 5))\n"
        "\n# net.last, net.same\n"
        "net_last = ConvTranspose2d(3, 3, kernel_size=3, stride=1, padding=1, input=(1, 3, 4, 5))\n"
        "\n# left to torch: odd: its class Wider overrides forward\n"
        "# never called: spare\n"
    )


def test_a_document_says_that_an_output_size_became_a_padding():
    model = Model({"up": nn.ConvTranspose1d(1, 1, 2, 2)}, lambda up, x: up[0](x, (9,)))
    assert "# A call gives output_size" in document(model, 1, 1, 4).text
    model = Model({"up": nn.ConvTranspose1d(1, 1, 2, 2)})
    assert "output_size" not in document(model, 1, 1, 4).text


def test_a_layer_at_two_sizes_has_two_names():
    model = Model({"up": nn.ConvTranspose1d(1, 1, 2)}, lambda up, x: up[0](up[0](x)))
    assert document(model, 1, 1, 4).names == ("up", "up_2")


def test_names_are_those_a_package_can_have():
    """A number, a keyword, one in use: each would stop `emit` or `build`."""
    names = ["0", "class", "nn", "FILES", "filter", "relu", "é", "a-b", "a_b", "A_B", "x" * 90]
    layers = {name: nn.ConvTranspose2d(1, 1, n + 1) for n, name in enumerate(names)}
    made = document(Model(layers), 1, 1, 2, 2)
    assert made.names == (
        *("layer_0", "layer_class", "layer_nn", "layer_FILES", "layer_filter", "layer_relu"),
        *("layer", "a_b", "a_b_2", "A_B_3", "x" * 60),
    )
    assert [each.name for each in parse_document(made.text).statements] == [*made.names]


def test_a_name_cannot_leave_its_comment():
    model = Model({"a\nb = ConvTranspose2d(1, 1, 3)": nn.ConvTranspose2d(1, 1, 2)})
    assert len(parse_document(document(model, 1, 1, 2, 2).text).statements) == 1


def test_a_document_of_more_than_a_file_may_have_is_refused():
    model = Model(
        {"up": nn.ConvTranspose1d(1, 1, 2)},
        lambda up, x: [up[0](x[..., : n + 1]) for n in range(900)],
    )
    with pytest.raises(SpecError, match="longer than 64 KB; with sizes left open"):
        document(model, 1, 1, 900)
    assert document(model, 1, 1, 900, opened="all").names == ("up",)
