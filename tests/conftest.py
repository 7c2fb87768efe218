"""Where emitted kernels run in the tests: on a GPU if there is one, else in Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, so it is set here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from building import Builder, download, once
from convgen.execution.workers import SAFE
from interpreting import name_callers_alone, prepare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    prepare()
    # Inductor's own code for this CPU is not what is tested: without vectors it need not find out,
    # in each process with an empty cache, by a program for each instruction set, which ones work.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
else:
    name_callers_alone()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes the texts of expected/ anew."""
    parser.addoption(
        "--update-expected", action="store_true", help="write the files of expected/ folders anew"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    if DEVICE == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def workers_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts workers says in the environment what they may import, for one test each."""
    monkeypatch.setenv(SAFE, "")


@pytest.fixture(scope="session")
def device() -> str:
    """The device that emitted kernels run on."""
    return DEVICE


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).parent.parent


@pytest.fixture
def expect(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """The function that compares a text with the file of that name in expected/ beside the test.

    With --update-expected it writes the file instead: `git diff` shows what changed, for somebody
    to read and to commit with the change that causes it.
    """

    def compare(name: str, text: str) -> None:
        path = request.path.parent / "expected" / name
        if request.config.getoption("--update-expected"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        expected = path.read_text("utf-8") if path.exists() else ""
        again = f"if it should: pytest --update-expected {request.path}"
        assert text == expected, f"{path.name} differs; {again}"

    return compare


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of a run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def builder(root: Path, shared: Path) -> Builder:
    """What builds packages offline."""
    return Builder(once(shared, "wheels", lambda folder: download(root, folder)))


@pytest.fixture(scope="session")
def build_python(builder: Builder, shared: Path) -> Path:
    """An interpreter that has convgen and the backends, as the environment of a build has."""

    def make(folder: Path) -> None:
        builder.install(folder, "convgen", "hatchling", "setuptools", "flit-core")

    return once(shared, "environment", make) / "bin" / "python"
