"""Precompiled kernels: machine code that ships beside the files, and Triton's JIT finding it.

What would break it: a key that Triton does not ask for, so that the code lies there in vain; code
that tells where it was made, so that no two builds are the same; code of another text, card or
Triton in the kernel's place; files that no later build knows for its own.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from building import KERNELS, TABLE, WAYS, Builder, inside, lend_triton, make_package, tree
from convgen import TARGETS, parse
from convgen.planning.choices import text_of
from convgen.project import precompile
from convgen.project.build import check, generate, write
from convgen.project.hooks import generate_into
from convgen.project.precompile import Cubin, Job, jobs, seal_is_intact
from convgen.project.table import read_table
from convgen.tables.targets import ARCHITECTURES
from running import make_project, run, start, worked

pytestmark = pytest.mark.compile

SPEC = "ConvTranspose1d(64, 32, 4, stride=2, padding=1)"
ROW = f'[[tool.convgen.kernel]]\nname = "up"\nspec = "{SPEC}"\n'
ONE = f'output = "kernels"\ntarget = "h100"\nlicense = "MIT"\naot = ["sm_90"]\n{ROW}'
CODE = "up.sm_90.cubin"
FILES = ["manifest.json", "up.py", CODE]
# What Triton and LLVM read in the environment, some of it only in C++.
SAID = ("TRITON_DISABLE_LINE_INFO", "TRITON_DEBUG", "DISABLE_PTXAS_OPT", "DISABLE_LLVM_OPT")


@pytest.fixture(scope="module")
def remember() -> Callable[[list[Job], dict[Path, str]], list[Cubin]]:
    """Compiles what this module's tests have not compiled before, by text and architecture."""
    compiled, codes = precompile._compiled, {}

    def once(wanted: list[Job], texts: dict[Path, str]) -> list[Cubin]:
        keys = [(texts[job.kernel.path], job.arch) for job in wanted]
        if not codes.keys() >= set(keys):
            codes.update(zip(keys, compiled(wanted, texts), strict=True))
        return [codes[key] for key in keys]

    return once


@pytest.fixture
def remembered(remember: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile a text once, in tests of what is written where."""
    monkeypatch.setattr(precompile, "_compiled", remember)


@pytest.fixture(scope="module")
def built(remember: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its files; tests that change it take a copy."""
    project = make_project(tmp_path_factory.mktemp("built"), ONE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompile, "_compiled", remember)
        write(generate(project))
    return project


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    return copied(built, make_project(tmp_path / "project", ONE))


def copied(built: Path, project: Path) -> Path:
    """Fill a project's folder with the files of another one."""
    (project / "kernels").mkdir()
    for name, content in tree(built / "kernels").items():
        (project / "kernels" / name).write_bytes(content)
    return project


def used(path: Path, capability: int, cache: Path, shape: Sequence[int] = (1, 64, 100)) -> Any:
    """Have the file at `path` offer its code to Triton, and Triton look for it."""
    job = (str(path), capability, str(cache), shape)
    (found,) = worked("precompiled_worker.py", [job])
    return found


def manifest(project: Path) -> dict[str, Any]:
    return json.loads((project / "kernels" / "manifest.json").read_text())


def rewrite_manifest(project: Path, **changes: str) -> None:
    """Write the manifest with other words for the code, and a hash that holds for them."""
    content = manifest(project)
    del content["sha256"]
    row = content["precompiled"][CODE]
    for name, word in changes.items():
        (row if name in row else row["kernels"][0])[name] = word
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    text = json.dumps(content | {"sha256": digest}, indent=2) + "\n"
    (project / "kernels" / "manifest.json").write_text(text)


# ---- what is shipped ----


def test_code_lies_beside_the_file_with_its_row(built: Path) -> None:
    files = tree(built / "kernels")
    assert sorted(files) == FILES
    assert run("list-files", built).stdout.split() == [str(built / "kernels" / n) for n in FILES]
    row = manifest(built)["precompiled"][CODE]
    assert [kernel["kernel"] for kernel in row["kernels"]] == [
        f"conv_transpose1d{purpose}_kernel" for purpose in ("", "_pack")
    ]
    code = files[CODE]
    for kernel in row["kernels"]:
        assert code.startswith(b"\x7fELF")
        code = code[kernel["size"] :]
    assert code.startswith(b"\nconvgen sha256")
    assert row["arch"] == "sm_90"
    assert row["sha256"] == hashlib.sha256(files[CODE]).hexdigest()
    assert row["source_sha256"] == hashlib.sha256(files["up.py"]).hexdigest()


def test_two_builds_are_the_same_and_tell_no_path(built: Path, tmp_path: Path) -> None:
    """The code is made twice, in other folders; whatever the environment says to Triton."""
    other = make_project(tmp_path / "elsewhere", ONE)
    done = subprocess.run(
        [sys.executable, "-m", "convgen", "build", str(other)],
        env=os.environ | dict.fromkeys(SAID, "1") | {"PTXAS_OPTIONS": "-O0"},
        check=False,
    )
    assert done.returncode == 0
    files = tree(other / "kernels")
    assert files == tree(built / "kernels")
    home = str(Path(importlib.util.find_spec("triton").origin).parent)
    for content in files.values():
        for path in (str(built), str(other), str(tmp_path), home):
            assert path.encode() not in content


def test_each_file_is_compiled_for_the_cards_it_may_be_chosen_on(tmp_path: Path) -> None:
    """A file of another target never runs there, so its code would lie there in vain."""
    table = ONE.replace('"h100"', '["a100", "h100", "h200"]').replace("sm_90", 'sm_86", "sm_90')
    names = [path.name for path in generate(make_project(tmp_path, table)).cubins]
    assert names == ["up_a100.sm_86.cubin", "up_h100.sm_90.cubin", "up_h200.sm_90.cubin"]


def test_the_package_chooses_the_files_that_have_code(tmp_path: Path, monkeypatch) -> None:
    """The rule stands in two places: what is compiled, and what `__init__.py` asks a GPU."""
    targets = [target.name for target in TARGETS]
    aot = f"aot = {list(ARCHITECTURES)}"
    table = ONE.replace('"h100"', str(targets)).replace('aot = ["sm_90"]', aot)
    shipped = {job.path.name for job in jobs(read_table(make_project(tmp_path, table)))}
    make_project(tmp_path, table.replace(aot, ""))
    assert run("build", tmp_path).exit_code == 0
    (tmp_path / "kernels").rename(tmp_path / "kernels_of_all")
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("kernels_of_all")
    chosen = set()
    for target in TARGETS:
        major, minor = target.compute_capability
        found = SimpleNamespace(major=major, minor=minor, multi_processor_count=target.sms)
        found.shared_memory_per_block_optin = target.shared_per_block
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, found=found: found)
        stem = package._nearest(package.FILES["up"], SimpleNamespace(type="cuda"))
        chosen.add(f"{stem}.{target.arch}.cubin")
    assert chosen <= shipped
    assert shipped - chosen == {"up_h200.sm_90.cubin"}  # an H100 has as many SMs, and comes first


@pytest.mark.build
def test_a_wheel_ships_the_code_from_an_environment_without_torch(
    tmp_path: Path, builder: Builder
) -> None:
    python = builder.install(tmp_path / "environment", "convgen", "hatchling")
    lend_triton(python, tmp_path / "triton")
    assert builder.run(python, "-c", "import torch").returncode == 1
    spec = 'spec = "ConvTranspose1d(4, 2, 4, stride=2, padding=1, dtype=float64)"'
    table = (TABLE % 'aot = ["sm_80"]').replace(spec, f'spec = "{SPEC}"')
    project = make_package(tmp_path / "project", WAYS["hatchling"], table)
    done = builder.call(python, project, "hatchling.build", "build_wheel", tmp_path)
    assert done.returncode == 0, done.stdout
    code = ["after.sm_80.cubin", "up.sm_80.cubin"]
    (wheel,) = tmp_path.glob("*.whl")
    builder.run(python, "-m", "zipfile", "-e", wheel, tmp_path / "unpacked")
    shipped = inside(tree(tmp_path / "unpacked"), "small_up/_kernels")
    assert [name for name in sorted(shipped) if name.endswith(".cubin")] == code
    assert shipped == tree(project / KERNELS)


# ---- what is used ----


def test_triton_finds_the_code_and_compiles_nothing(project: Path, tmp_path: Path) -> None:
    """For any size: one kernel serves all of them. The folder and its name do not matter."""
    size = manifest(project)["precompiled"][CODE]["kernels"][0]["size"]
    wanted = hashlib.sha256((project / "kernels" / CODE).read_bytes()[:size]).hexdigest()
    (project / "kernels").rename(tmp_path / "installed")
    for shape in ((1, 64, 100), (3, 64, 7)):
        found = used(tmp_path / "installed" / "up.py", 90, tmp_path / "cache", shape)
        assert found["found"] == [True, True]  # the layer's, and what packs the weight
        assert found["sha256"] == wanted


def test_two_dimensions_and_halves_are_found_too(tmp_path: Path) -> None:
    layers = (
        ("ConvTranspose2d(64, 64, 3, input=(1, 64, 16, 16))", (1, 64, 16, 16)),
        ("relu | ConvTranspose3d(16, 8, 3) | tanh", (1, 16, 4, 5, 6)),
        ("ConvTranspose2d(16, 8, 3, rungs=((1, 16, 6, 7),), layout=any)", (1, 16, 6, 7)),
    )
    table = ONE.replace('"h100"', '"rtx4090"').replace("sm_90", "sm_89").replace(ROW, "")
    for number, (spec, _) in enumerate(layers):
        table += ROW.replace('"up"', f'"up{number}"').replace(SPEC, spec)
    project = make_project(tmp_path, table)
    write(generate(project))
    for number, (_, shape) in enumerate(layers):
        cache = tmp_path / f"cache{number}"
        path = project / "kernels" / f"up{number}.py"
        assert set(used(path, 89, cache, shape)["found"]) == {True}


OTHERS = {  # files of that name that others have
    "a list": b"[]",
    "not text": b"\xff",
    "no rows": b'{"precompiled": null}',
    "half a row": b'{"precompiled": {"up.sm_90.cubin": {"triton": "3.7.1"}}}',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize(
    "what",
    ["another card", "edited code", "edited row", "another Triton", "another kernel", *OTHERS],
)
def test_triton_compiles_where_the_code_does_not_match(
    project: Path, tmp_path: Path, what: str
) -> None:
    """Wrong machine code is the worst that could ship: it must never run."""
    code = project / "kernels" / CODE
    if what == "edited code":
        code.write_bytes(code.read_bytes().replace(b"ELF", b"FLE"))
    elif what == "edited row":
        path = project / "kernels" / "manifest.json"
        path.write_text(path.read_text().replace('"num_warps"', '"warps"'))
    elif what == "another Triton":
        rewrite_manifest(project, triton="3.0.0")
    elif what == "another kernel":
        rewrite_manifest(project, kernel="../escaped")
    elif what in OTHERS:
        (project / "kernels" / "manifest.json").write_bytes(OTHERS[what])
    capability, cache = 80 if what == "another card" else 90, tmp_path / "cache"
    found = used(project / "kernels" / "up.py", capability, cache)["found"]
    assert found == [False, False]
    assert list(tmp_path.rglob("*escaped*")) == []  # nothing outside the kernel's folder


def test_a_key_of_another_kernel_is_never_asked_for(project: Path, tmp_path: Path) -> None:
    """As a manifest of another text has it: the cache holds it, and nothing reads it."""
    rewrite_manifest(project, key="0" * 64)
    assert used(project / "kernels" / "up.py", 90, tmp_path)["found"] == [False, True]


# ---- later builds ----


def swap_code(project: Path) -> None:
    """Change machine code as somebody does who knows all of the hashes, none of which has a key."""
    path, row = project / "kernels" / CODE, manifest(project)["precompiled"][CODE]
    code = bytearray(path.read_bytes()[: sum(kernel["size"] for kernel in row["kernels"])])
    code[0x800:0x810] = bytes(16)
    code += f"\nconvgen sha256 {hashlib.sha256(code).hexdigest()}\n".encode()
    assert seal_is_intact(bytes(code))
    path.write_bytes(code)
    rewrite_manifest(project, sha256=hashlib.sha256(code).hexdigest())


@pytest.mark.usefixtures("remembered")
def test_swapped_code_is_found_and_replaced(project: Path) -> None:
    """It would run on every user's GPU, and stay in Triton's cache after the package is gone."""
    before = tree(project / "kernels")
    swap_code(project)
    swapped = tree(project / "kernels")
    assert swapped[CODE] != before[CODE]
    done = run("build", "--check", project)
    assert done.exit_code == 1
    words = [line.rpartition("/")[2] for line in done.stderr.splitlines()]
    assert words == [CODE, "manifest.json", "3 files, 2 differ"]
    assert tree(project / "kernels") == swapped
    generate_into(project)  # as every build hook does
    assert tree(project / "kernels") == before


@pytest.mark.usefixtures("remembered")
def test_a_row_of_another_kernel_is_found(project: Path) -> None:
    rewrite_manifest(project, kernel="../escaped")
    done = run("build", "--check", project)
    assert done.exit_code == 1
    assert f"changed {project / 'kernels' / 'manifest.json'}" in done.stderr


def test_the_code_is_checked_in_ten_seconds_a_file(built: Path) -> None:
    """Seconds of the processor: the cores may have other work."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert start("build", "--check", built).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


@pytest.mark.usefixtures("remembered")
def test_a_killed_build_does_not_stop_the_next_one(project: Path) -> None:
    """It may have written the code and not the manifest; nobody has edited anything."""
    before = tree(project / "kernels")
    make_project(project, ONE.replace("stride=2", "stride=1"))
    (project / "kernels" / CODE).write_bytes(generate(project).cubins[project / "kernels" / CODE])
    make_project(project, ONE)
    assert run("build", project).exit_code == 0
    assert tree(project / "kernels") == before


@pytest.mark.usefixtures("remembered")
def test_code_that_no_manifest_lists_is_removed(project: Path) -> None:
    """A wheel would ship it for ever."""
    stale = project / "kernels" / "up.sm_80.cubin"
    stale.write_bytes((project / "kernels" / CODE).read_bytes())
    (project / "kernels" / "mine.sm_80.cubin").write_bytes(b"mine")
    assert run("build", project).exit_code == 0
    assert sorted(tree(project / "kernels")) == ["manifest.json", "mine.sm_80.cubin", "up.py", CODE]


@pytest.mark.usefixtures("remembered")
def test_a_new_spec_replaces_the_code(project: Path) -> None:
    make_project(project, ONE.replace("stride=2", "stride=1"))
    drift = check(generate(project))
    assert [path.name for path in drift.changed] == [CODE, "up.py", "manifest.json"]
    before = (project / "kernels" / CODE).read_bytes()
    assert run("build", project).exit_code == 0
    assert (project / "kernels" / CODE).read_bytes() != before
    assert not check(generate(project))


def test_code_that_no_row_asks_for_is_removed(project: Path) -> None:
    make_project(project, ONE.replace('aot = ["sm_90"]\n', ""))
    assert f"extra {project / 'kernels' / CODE}" in run("build", "--check", project).stderr
    assert run("build", project).exit_code == 0
    assert sorted(tree(project / "kernels")) == ["manifest.json", "up.py"]


@pytest.mark.usefixtures("remembered")
def test_edited_code_is_reported_and_kept(project: Path) -> None:
    code = project / "kernels" / CODE
    edited = code.read_bytes().replace(b"ELF", b"FLE")
    code.write_bytes(edited)
    done = run("build", project)
    assert done.exit_code == 1
    assert f"{code} was not generated, or was edited since" in done.stderr
    assert code.read_bytes() == edited
    assert f"machine code differs: {code}" in run("build", "--diff", project).stdout
    make_project(project, ONE.replace('aot = ["sm_90"]\n', ""))
    assert f"no kernel names it) {code}" in run("build", project).stderr
    assert code.read_bytes() == edited


def test_code_that_was_cut_short_is_reported_when_no_row_asks_for_it(project: Path) -> None:
    """It has lost the end by which a build knows its own; the manifest still names it."""
    code = project / "kernels" / CODE
    code.write_bytes(code.read_bytes()[:-10])
    make_project(project, ONE.replace('aot = ["sm_90"]\n', ""))
    assert run("build", "--check", project).exit_code == 1
    assert f"no kernel names it) {code}" in run("build", project).stderr


@pytest.mark.usefixtures("remembered")
def test_a_file_of_that_name_that_is_not_ours_stays(tmp_path: Path) -> None:
    project = make_project(tmp_path, ONE)
    (project / "kernels").mkdir()
    (project / "kernels" / CODE).write_bytes(b"mine")
    assert run("build", project).exit_code == 1
    assert tree(project / "kernels") == {CODE: b"mine"}


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("aot", "message"),
    [
        ('["sm90"]', "aot of [tool.convgen] must list some of sm_80, "),
        ('["sm_9"]', "did you mean sm_90"),
        ('["h100"]', "got 'h100', which is sm_90"),
        ('[["sm_90"]]', "got ['sm_90']"),
        ("[90]", "got 90"),
        ('["sm_90", "sm_90"]', "names sm_90 twice"),
        ('"sm_90"', "must be a list"),
    ],
)
def test_wrong_architectures_are_told(tmp_path: Path, aot: str, message: str) -> None:
    done = run("build", make_project(tmp_path, ONE.replace('["sm_90"]', aot)))
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize("spec", [True, False])
def test_without_triton_the_message_says_where_to_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: bool
) -> None:
    (tmp_path / "site" / "triton").mkdir(parents=True)  # a mere folder is none
    found = importlib.machinery.PathFinder.find_spec("triton", [str(tmp_path / "site")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found if spec else None)
    for words in (["build"], ["build", "--check"]):
        done = run(*words, make_project(tmp_path, ONE))
        assert done.exit_code == 2
        assert "cannot make or check the machine code" in done.stderr
        assert "needs triton" in done.stderr
        assert "requires of [build-system]" in done.stderr


def test_an_autotuned_kernel_cannot_be_precompiled(tmp_path: Path) -> None:
    done = run("build", make_project(tmp_path, ONE.replace("padding=1)", "autotune=launch)")))
    assert done.exit_code == 2
    assert "aot cannot precompile up: autotune=launch" in done.stderr


def test_code_that_the_card_has_no_shared_memory_for_is_refused(tmp_path: Path) -> None:
    """It could not be launched, and compiling at run time would fail as well."""
    tile = {"block_m": 128, "block_n": 128, "block_k": 32, "num_warps": 8, "num_stages": 6}
    tile |= {"family": "gather", "span": 1}
    spec = "ConvTranspose2d(256, 256, 1, bias=False, input=(16, 256, 64, 64))"
    row = {"spec": str(parse(spec)), "tile": tile, "ms": 1.0, "tried": 1}
    measured = dict.fromkeys(("device", "torch", "triton", "date"), "none")
    (tmp_path / "tiles.json").write_text(text_of("h100", measured, [row]))
    table = ONE.replace(SPEC, spec).replace("aot", 'choices = "tiles.json"\naot')
    for arch, status in (("sm_90", 0), ("sm_89", 2)):
        project = make_project(tmp_path, table.replace("sm_90", arch))
        done = run("build", project)
        assert done.exit_code == status, done.stderr
    assert "takes 163840 bytes of shared memory and sm_89 has 101376" in done.stderr
