"""Tools that people use on a model, on one whose layers were replaced, and after `restore_layers`.

What would break it: a tool that leaves a layer out without a word, that counts too little, or that
puts another class in its place whose numbers are others. What was found wrong once is tested

* here: initialisers by `isinstance`, `spectral_norm`, quantisation, counts of FLOPs by fvcore, thop
  and ptflops, torchinfo, hooks that stay behind;
* in test_restore.py: undoing, torch.jit.script, subclasses that override nothing;
* in test_replace.py, test_replace_again.py and test_report.py: print, `model.half()` and a second
  call, `cudnn.allow_tf32`, whether kernels ran, `strict=True`;
* in test_saving.py: pickles, `export.save`, `jit.save` and spawned processes;
* in ../emitted: graphs that meet another layout or dtype, ONNX and FlopCounterMode in
  test_fallback.py, an autotuned file in a CUDA graph in test_wrapper.py.
"""

import copy
import functools
import importlib
import logging
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval

import convgen
from real_models import declare_vision

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ImportWarning"
    ),
]
close = functools.partial(torch.allclose, rtol=1e-9, atol=1e-9)


@pytest.fixture
def x(device):
    torch.manual_seed(2)
    return torch.randn(2, 3, 6, 6, device=device, dtype=torch.float64)


def decoder(device):
    """Return a network with a layer between norms, as decoders have it."""
    torch.manual_seed(3)
    layers = (
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.ConvTranspose2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
    )
    return nn.Sequential(*layers).to(device, torch.float64).eval()


@pytest.fixture
def model(device):
    return decoder(device)


@pytest.fixture
def replaced(device):
    """The same network with an emitted layer."""
    model = decoder(device)
    convgen.replace_layers(model)
    return model


@pytest.fixture
def restored(replaced):
    convgen.restore_layers(replaced)
    return replaced


def tool(name):
    """Return a tool's module; what it warns of while it is imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            declare_vision()
        except ModuleNotFoundError as error:
            pytest.skip(f"{error}: pip install 'convgen[test]'")
        return pytest.importorskip(name, reason=f"{name} is missing: pip install 'convgen[test]'")


def ran(model):
    return [layer.kernel_calls for layer in convgen.report(model).layers]


# ---- what asks isinstance ----


def initialised(module):
    """Initialise as nnU-Net and transformers do."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    if isinstance(module, kinds):
        nn.init.constant_(module.weight, 0.25)
        nn.init.zeros_(module.bias)


def test_an_initialiser_finds_the_layer(model, replaced, x):
    for each in (model, replaced):
        each.apply(initialised)
    assert replaced[3].weight.unique().tolist() == [0.25]
    assert close(replaced(x), model(x))


def test_spectral_norm_after_replacing_is_torch_s(model, replaced, x):
    """Of another axis of the weight it would be another number."""
    for each in (model, replaced):
        torch.manual_seed(5)  # of the power iteration
        parametrizations.spectral_norm(each[3])
    assert close(replaced[3].weight, model[3].weight)
    assert close(replaced(x), model(x))
    assert ran(replaced) == [1]


def test_fuse_conv_bn_eval_keeps_the_kernel(model, replaced, x):
    hidden = model[2](model[1](model[0](x)))
    fused = fuse_conv_bn_eval(replaced[3], replaced[4], transpose=True)
    assert isinstance(fused, nn.ConvTranspose2d)
    assert close(fused(hidden), model[4](model[3](hidden)))
    assert ran(fused) == [1]


# ---- what looks up the type ----


def test_quantisation_prepares_a_restored_model(restored, x):
    from torch.ao import quantization

    restored[3].qconfig = quantization.QConfig(
        activation=quantization.default_observer, weight=quantization.default_weight_observer
    )
    prepared = quantization.prepare(restored.float().cpu())
    assert [name for name, _ in prepared[3].named_children()] == ["activation_post_process"]
    prepared(x.float().cpu())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch gives quantised tensors up
        converted = quantization.convert(prepared)
    assert type(converted[3]) is torch.ao.nn.quantized.ConvTranspose2d


def test_modules_of_a_restored_model_are_fused(model, restored, x):
    from torch.ao.quantization import fuse_modules

    fused = fuse_modules(restored, [["0", "1", "2"], ["3", "4"]])
    assert type(fused[3]) is nn.ConvTranspose2d
    assert isinstance(fused[4], nn.Identity)
    assert close(fused(x), model(x))


def test_prepare_fx_observes_the_layer_of_a_restored_model(restored, x):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    restored.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(restored, get_default_qconfig_mapping("qnnpack"), (x.float(),))
    (node,) = (node for node in prepared.graph.nodes if node.target == "3")
    assert (node.op, type(prepared.get_submodule("3"))) == ("call_module", nn.ConvTranspose2d)
    assert "activation_post_process" in next(iter(node.users)).target


# ---- what counts ----


def test_fvcore_counts_a_restored_model(model, restored, x):
    nn_module = tool("fvcore.nn")
    counts = [nn_module.FlopCountAnalysis(each, x).total() for each in (model, restored)]
    assert counts[0] == counts[1] > 0


def test_fvcore_says_which_operator_it_left_out(replaced, x, caplog):
    """It knows its own operators only, and is not silent about others."""
    nn_module = tool("fvcore.nn")
    analysis = nn_module.FlopCountAnalysis(replaced.requires_grad_(False), x)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("ignore")  # that the trace could not be saved
        analysis.total()
        (name,) = (name for name in analysis.unsupported_ops() if "conv_transpose2d" in name)
    assert f"Unsupported operator {name} encountered 1 time(s)" in caplog.text


def by_thop(model, x):
    return tool("thop").profile(model, (x,), verbose=False)[0]


def by_ptflops(model, x):
    count = tool("ptflops").get_model_complexity_info
    found = count(
        *(model.float(), tuple(x.shape[1:])),
        **{"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"},
    )
    return found[0]


@pytest.mark.parametrize("count", [by_thop, by_ptflops])
def test_counts_by_type_are_those_of_a_restored_model(count, model, restored, x):
    without = count(model[:3], x)
    assert count(restored, x) == count(model, x) > without


def test_torchinfo_prints_torch_s_layer(model, replaced, x):
    summaries = [
        tool("torchinfo").summary(each, input_data=x, verbose=0) for each in (model, replaced)
    ]
    assert "ConvTranspose2d" in str(summaries[1])
    assert str(summaries[0]) == str(summaries[1])


# ---- what compiles ahead ----


def test_aotinductor_calls_the_kernel(model, replaced, x, tmp_path):
    """Without the file a package says which operator it has not; exporting said what to do."""
    want = model(x)
    with pytest.warns(UserWarning, match="restore_layers"):
        program = torch.export.export(replaced.requires_grad_(False), (x,))
    package = str(tmp_path / "model.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its headers are for one file here.
        settings = {"aot_inductor.precompile_headers": False}
        torch._inductor.aoti_compile_and_package(
            program, package_path=package, inductor_configs=settings
        )
        assert close(torch._inductor.aoti_load_package(package)(x), want)
    elsewhere = (
        "import sys, torch\n"
        "try: torch._inductor.aoti_load_package(sys.argv[1])\n"
        "except RuntimeError as error: print(error)"
    )
    command = [sys.executable, "-c", elsewhere, package]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    namespace = vars(sys.modules[type(replaced[3]).__module__])["NAMESPACE"]
    assert f"Could not find schema for {namespace}::conv_transpose2d" in done.stdout


# ---- what stays behind ----


def test_other_weights_leave_no_hook(replaced, x):
    layer, hidden = replaced[3], torch.randn(2, 4, 4, 4, device=x.device, dtype=x.dtype)
    other = {"weight": layer.weight.detach() * 2, "bias": layer.bias}
    for _ in range(3):
        layer(hidden)
        torch.func.functional_call(layer, other, hidden)
        copy.copy(layer)(hidden).sum().backward()
    weight = layer.weight
    assert not weight._backward_hooks
    assert not weight._post_accumulate_grad_hooks
    assert weight.grad_fn is None


# ---- what trains ----


def trained(model, x):
    """Return a model's weight after a step of its own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    return model[3].weight


def test_accelerate_trains_the_kernel(model, replaced, x, device):
    accelerator = tool("accelerate").Accelerator(cpu=device == "cpu")
    optimizer = torch.optim.SGD(replaced.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(replaced, optimizer)
    accelerator.backward(prepared(x).square().mean())
    optimizer.step()
    assert ran(prepared) == [1]
    assert close(replaced[3].weight, trained(model, x))


def test_lightning_trains_the_kernel(model, replaced, x, tmp_path, device):
    lightning = tool("lightning")

    class Trained(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = replaced

        def training_step(self, batch, index):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator=device, default_root_dir=tmp_path, **dict.fromkeys(quiet, False)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a loader has one process
        trainer.fit(Trained(), torch.utils.data.DataLoader(list(x.cpu()), batch_size=len(x)))
    assert ran(replaced) == [1]
    assert close(replaced[3].weight.to(device), trained(model, x))


def test_peft_trains_a_copy_that_runs_the_kernel(model, replaced, x):
    peft = tool("peft")
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["3"])
    adapted = peft.get_peft_model(replaced, config)
    output = adapted(x)
    assert close(output, model(x))
    output.sum().backward()
    calls = {layer.name: layer.kernel_calls for layer in convgen.report(adapted).layers}
    (kept,) = (name for name in calls if "modules_to_save" in name)
    assert calls[kept] == 1
    assert adapted.get_submodule(kept).weight.grad is not None


def test_fsdp2_shards_what_runs_the_kernel(model, replaced, x, tmp_path, device):
    """Replaced before it is sharded; afterwards its weight is another tensor type."""
    fsdp = importlib.import_module("torch.distributed.fsdp")
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        mesh = dist.device_mesh.init_device_mesh(device, (1,))
        for each in (replaced[3], replaced):
            fsdp.fully_shard(each, mesh=mesh)
        output = replaced(x)
        output.square().mean().backward()
        assert ran(replaced) == [1]
        assert close(output, model(x))
        model(x).square().mean().backward()
        assert close(replaced[3].weight.grad.full_tensor(), model[3].weight.grad)
        for each in (model[3], model):
            fsdp.fully_shard(each, mesh=mesh)
        with pytest.warns(UserWarning, match="^left as they are: 3: its class FSDP|3: its weight"):
            assert convgen.replace_layers(model) == {}
    finally:
        dist.destroy_process_group()
