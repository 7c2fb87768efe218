"""What pyproject.toml cannot say: each build of convgen has a folder of its own, gone afterwards.

setuptools packs its folder build/ as it finds it. Left in a checkout, it brought templates that
were deleted since back into every later wheel. Input: setuptools' commands; output: no build/.
"""

import atexit
import shutil
import tempfile

from setuptools import setup
from setuptools.command.build import build


class Build(build):
    """The command `build`, in a temporary folder; bdist_wheel takes its own folder from it."""

    def initialize_options(self) -> None:
        """Put the temporary folder in place of build/, as the default that an option replaces."""
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix="convgen-build-")
        atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)


setup(cmdclass={"build": Build})
