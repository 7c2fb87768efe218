"""The hatchling plugin: a build hook for `[tool.hatch.build.hooks.convgen]`.

Beside the stages; hatchling finds it by the entry point group `hatch`. Input: the project that
hatchling builds; output: its generated files, and their place in wheel and sdist.
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
        """Generate into the project; ship the files even where version control ignores them.

        Raises:
            SystemExit: the project cannot be generated.
        """
        root = Path(self.root)
        if self.target_name == "wheel":
            # Asked before there are artifacts, which would pass for a choice of files: hatchling
            # says here where it finds no package.
            _ = getattr(self.build_config, "default_file_selection_options", None)
        generated = generate_into(root)
        build_data["artifacts"] += [_pattern(path) for path in generated.files]
        if self.target_name == "sdist":  # which may select folders that do not hold the sources
            build_data["force_include"] |= {
                str(root / path): path.as_posix() for path in generated.sources
            }


def _pattern(path: Path) -> str:
    """Return the pattern, in the language of .gitignore, that matches this one path."""
    return "/" + re.sub(r"([\\*?\[])", r"\\\1", path.as_posix())


@hookimpl
def hatch_register_build_hook() -> type[ConvgenBuildHook]:
    """Return the hook, as hatchling asks its plugins to."""
    return ConvgenBuildHook
