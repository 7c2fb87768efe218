"""The hatchling plugin: a build hook for `[tool.hatch.build.hooks.convgen]`.

Beside the stages; hatchling finds it by the entry point group `hatch`. Input: the project that
hatchling builds; output: its generated files, listed for inclusion in the wheel or sdist.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.plugin import hookimpl

from .hooks import generate_into


class ConvgenBuildHook(BuildHookInterface[BuilderConfig]):
    """Generates before each wheel, editable wheel and sdist."""

    PLUGIN_NAME = "convgen"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the files; have hatchling ship them even if version control ignores them.

        Raises:
            SystemExit: the files cannot be generated.
        """
        root = Path(self.root)
        if self.target_name == "wheel":
            # Evaluated before artifacts are added: hatchling raises here if it finds no package to
            # ship, but would take artifacts for an explicit selection of files and raise nothing.
            _ = getattr(self.build_config, "default_file_selection_options", None)
        generated = generate_into(root)
        build_data["artifacts"] += [_pattern(path) for path in generated.files]
        if self.target_name == "sdist":  # its file selection may leave the sources out
            build_data["force_include"] |= {
                str(root / path): path.as_posix() for path in generated.sources
            }


def _pattern(path: Path) -> str:
    """Return the .gitignore pattern that matches `path` only."""
    return "/" + re.sub(r"([\\*?\[])", r"\\\1", path.as_posix())


@hookimpl
def hatch_register_build_hook() -> type[ConvgenBuildHook]:
    """Return the hook class; hatchling calls this to register the plugin."""
    return ConvgenBuildHook
