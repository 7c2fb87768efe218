"""Train a model with torch's transposed convolutions, then with convgen's, and compare the losses.

    python examples/train.py [--model dcgan|unet] [--steps N] [--amp float16] [--json FILE]

`dcgan` is the generator and discriminator of Radford et al. 2016 (arXiv 1511.06434): a 4x4 layer
from 100 latent numbers, then 4x4 layers of stride 2 with batch normalisation, up to 3 colours.
`unet` is the network of Ronneberger et al. 2015 (arXiv 1505.04597) with 2x2 up-convolutions of
stride 2, but with padded 3x3 convolutions and trained by Adam. Both train on synthetic images.

Three runs start from the same seed: "torch"; "perturbed", torch with the weights of its transposed
convolutions changed by one rounding (by a factor of 1 + or - 2**-11 if products are rounded to TF32
or float16, 2**-24 in ieee); and "convgen". Even two correct runs differ: they sum in different
orders, so they round differently, and training amplifies small differences with every step until
the losses are unrelated. The difference between "torch" and "perturbed" shows how fast this
happens: it is the noise that the difference between "torch" and "convgen" is compared with.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import convgen

Options = argparse.Namespace
LATENT = 100
WIDTHS = {"dcgan": 128, "unet": 64}  # as published
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDING = {"tf32": -11, "ieee": -24, "float16": -11, "bfloat16": -8, "float64": -53}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


# ---- the models ----


def generator(width: int, image: int) -> nn.Sequential:
    """Return the network [N, 100, 1, 1] -> [N, 3, image, image], `width` channels at the end."""
    channels = [width << level for level in reversed(range(int(math.log2(image)) - 2))]
    layers: list[nn.Module] = [nn.ConvTranspose2d(LATENT, channels[0], 4, bias=False)]
    for c_in, c_out in itertools.pairwise(channels):
        layers += [nn.BatchNorm2d(c_in), nn.ReLU()]
        layers += [nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1), nn.Tanh())


def discriminator(width: int, image: int) -> nn.Sequential:
    """Return the network [N, 3, image, image] -> [N, 1, 1, 1], the mirror of the generator."""
    channels = [width << level for level in range(int(math.log2(image)) - 2)]
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for c_in, c_out in itertools.pairwise(channels):
        layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4))


class UNet(nn.Module):
    """[N, 1, image, image] -> [N, 3, image, image]: logits of background, disc and rectangle."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        channels = [width << level for level in range(levels + 1)]
        pairs = list(itertools.pairwise(channels))
        self.first = block(1, width)
        self.down = nn.ModuleList(block(c_in, c_out) for c_in, c_out in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, half, 2, 2) for half, c in reversed(pairs))
        self.join = nn.ModuleList(block(c, half) for half, c in reversed(pairs))
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [self.first(x)]
        for down in self.down:
            kept.append(down(F.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], dim=1))
        return self.last(x)


def block(c_in: int, c_out: int) -> nn.Sequential:
    first, second = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def build(options: Options) -> nn.ModuleDict:
    """Return the networks of a model, initialised from the seed as in its paper."""
    torch.manual_seed(options.seed)
    if options.model == "unet":
        made = nn.ModuleDict({"unet": UNet(options.width, options.levels)})
        for layer in made.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    else:
        size = (options.width, options.image)
        made = nn.ModuleDict({"generator": generator(*size), "discriminator": discriminator(*size)})
        for layer in made.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(layer.weight, 0.0, 0.02)
    dtype = torch.float64 if options.precision == "float64" else torch.float32
    return made.to(options.device, dtype)


# ---- the images ----


def blobs(options: Options, random: torch.Generator) -> torch.Tensor:
    """Return [N, 3, image, image] in -1..1: a Gaussian at a random place in each colour."""
    centre = torch.rand(options.batch, 3, 2, 1, 1, generator=random) * 0.6 + 0.2
    line = torch.linspace(0, 1, options.image)
    across = torch.stack(torch.meshgrid(line, line, indexing="ij"))
    return 2 * torch.exp(-20 * (across - centre).square().sum(dim=2)) - 1


def shapes(options: Options, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy images [N, 1, image, image] of a disc in front of a rectangle, and classes.

    The classes are [N, image, image]: 0 background, 1 disc, 2 rectangle.
    """
    centre = torch.rand(2, options.batch, 2, 1, 1, generator=random) * 0.8 + 0.1
    half = torch.rand(2, options.batch, 1, 1, 1, generator=random) * 0.15 + 0.1
    line = torch.linspace(0, 1, options.image)
    away = torch.stack(torch.meshgrid(line, line, indexing="ij")) - centre
    disc = (away[0].square().sum(dim=1, keepdim=True) < half[0].square()).squeeze(1)
    rectangle = (away[1].abs() < half[1]).all(dim=1)
    classes = torch.where(disc, 1, torch.where(rectangle, 2, 0))
    noise = torch.randn(classes.shape, generator=random) * 0.3
    return (classes * 0.5 + noise).unsqueeze(1), classes


# ---- training ----

Step = Callable[[], dict[str, float]]


def train(model: nn.ModuleDict, options: Options) -> list[dict[str, float]]:
    """Return the losses of each step."""
    step = dcgan_step(model, options) if options.model == "dcgan" else unet_step(model, options)
    losses = []
    for number in range(options.steps):
        losses.append(step())
        if not all(map(math.isfinite, losses[-1].values())):
            raise FloatingPointError(f"the losses of step {number} are {losses[-1]}")
    return losses


class Trainer:
    """Adam for one network; scales the loss in float16 so that gradients do not underflow."""

    def __init__(self, network: nn.Module, options: Options, **settings: object) -> None:
        self.optimizer = torch.optim.Adam(network.parameters(), **settings)
        kind = torch.device(options.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=options.amp == "float16")

    def descend(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


def autocast(options: Options) -> torch.autocast:
    dtype = DTYPES.get(options.amp, torch.bfloat16)
    kind = torch.device(options.device).type
    return torch.autocast(kind, dtype, enabled=options.amp is not None)


def unet_step(model: nn.ModuleDict, options: Options) -> Step:
    network, random = model["unet"], torch.Generator().manual_seed(options.seed)
    trainer = Trainer(network, options, lr=1e-3)
    dtype = next(network.parameters()).dtype

    def step() -> dict[str, float]:
        x, classes = shapes(options, random)
        with autocast(options):
            logits = network(x.to(options.device, dtype))
        found = F.cross_entropy(logits.to(dtype), classes.to(options.device))
        return {"loss": trainer.descend(found)}

    return step


def dcgan_step(model: nn.ModuleDict, options: Options) -> Step:
    maker, judge = model["generator"], model["discriminator"]
    random = torch.Generator().manual_seed(options.seed)
    settings = {"lr": 2e-4, "betas": (0.5, 0.999)}
    trainers = [Trainer(network, options, **settings) for network in (judge, maker)]
    dtype = next(maker.parameters()).dtype

    def verdict(images: torch.Tensor, real: bool) -> torch.Tensor:
        with autocast(options):
            logits = judge(images).to(dtype)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))

    def step() -> dict[str, float]:
        real = blobs(options, random).to(options.device, dtype)
        latent = torch.randn(options.batch, LATENT, 1, 1, generator=random)
        with autocast(options):
            made = maker(latent.to(options.device, dtype))
        judged = verdict(real, True) + verdict(made.detach(), False)
        losses = {"discriminator": trainers[0].descend(judged)}
        return losses | {"generator": trainers[1].descend(verdict(made, True))}

    return step


# ---- the comparison ----


@torch.no_grad()
def perturb(model: nn.Module, exponent: int) -> None:
    """Multiply each weight of the transposed convolutions by 1 + or - 2**exponent, at random.

    If the dtype cannot represent this change, the weight moves by one unit in the last place.
    """
    random = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, TRANSPOSED):
            weight = layer.weight
            up = torch.rand(weight.shape, generator=random).to(weight.device) < 0.5
            moved = weight * torch.where(up, 1 + 2.0**exponent, 1 - 2.0**exponent).to(weight)
            ends = torch.where(up, math.inf, -math.inf).to(weight)
            weight.copy_(torch.where(moved == weight, torch.nextafter(weight, ends), moved))


def apart(one: list[dict[str, float]], other: list[dict[str, float]]) -> list[float]:
    """Return for each step the largest relative difference of its losses."""
    return [
        max(abs(a[name] - b[name]) / (max(abs(a[name]), abs(b[name])) or 1.0) for name in a)
        for a, b in zip(one, other, strict=True)
    ]


def exchange(plain: nn.Module, replaced: nn.Module) -> None:
    """Load each model's state_dict into the other; raises AssertionError if any value differs."""
    states = [copy.deepcopy(model.state_dict()) for model in (plain, replaced)]
    plain.load_state_dict(states[1])
    replaced.load_state_dict(states[0])
    for model, state in ((plain, states[1]), (replaced, states[0])):
        arrived = model.state_dict()
        if [*arrived] != [*state] or not all(torch.equal(arrived[k], state[k]) for k in state):
            raise AssertionError("a state_dict changed when it was loaded")


def compare(options: Options) -> dict[str, Any]:
    """Train three times; return the losses and their differences, as `lines` prints them."""
    exponent = ROUNDING[options.amp or options.precision]
    plain, perturbed, replaced = (build(options) for _ in range(3))
    perturb(perturbed, exponent)
    precision = None if options.amp or options.precision == "float64" else options.precision
    specs = convgen.replace_layers(replaced, precision=precision, dtype=options.amp)
    models = {"torch": plain, "perturbed": perturbed, "convgen": replaced}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=options.precision == "tf32"):
        losses = {name: train(model, options) for name, model in models.items()}
    exchange(plain, replaced)
    return {
        "model": options.model,
        "layers": specs,
        "rounding": f"2**{exponent}",
        "losses": losses,
        "difference": apart(losses["torch"], losses["convgen"]),
        "noise": apart(losses["torch"], losses["perturbed"]),
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines to print for a result of `compare`."""
    for name, text in result["layers"].items():
        yield f"{name}: {text}"
    losses = result["losses"]
    yield f"{'step':>4}  {'loss':13} {'torch':>9} {'convgen':>9} {'difference':>11} {'noise':>8}"
    for number, plain in enumerate(losses["torch"]):
        ends = f" {result['difference'][number]:11.1e} {result['noise'][number]:8.1e}"
        for name, loss in plain.items():
            yield f"{number:4}  {name:13} {loss:9.6f} {losses['convgen'][number][name]:9.6f}{ends}"
            ends = ""  # a step's differences are printed once, with its first loss
    yield "state_dict: loaded both ways"
    difference, noise = max(result["difference"]), max(result["noise"])
    yield f"largest relative difference {difference:.1e}; between two runs of torch whose"
    yield f"transposed weights differ by {result['rounding']}: {noise:.1e}"


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=WIDTHS, default="dcgan")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--image", type=int, default=64, help="a power of two, at least 8")
    parser.add_argument("--width", type=positive, help="channels at full size; else as published")
    parser.add_argument("--levels", type=positive, default=4, help="depth of the U-Net")
    parser.add_argument("--precision", choices=("tf32", "ieee", "float64"), default="tf32")
    parser.add_argument("--amp", choices=tuple(DTYPES), help="train under autocast in this dtype")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.image < 8 or options.image & (options.image - 1):
        parser.error(f"--image must be a power of two of at least 8, got {options.image}")
    if options.model == "unet" and options.image >> options.levels < 1:
        parser.error(f"--image must be at least 2**levels, got {options.image}")
    options.width = options.width or WIDTHS[options.model]
    result = compare(options)
    print("\n".join(lines(result)))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
