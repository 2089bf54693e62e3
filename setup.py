"""What setup.cfg cannot say: the wheel holds the folder configs inside the package. Everything else is there."""
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Puts the recipes into what is built; a clone, also one that is installed as editable, has them where they are."""

    def run(self) -> None:
        """Build, and copy the recipes."""
        super().run()
        if not self.editable_mode:
            self.copy_tree('configs', str(Path(self.build_lib, 'elsa_models', 'configs')))


setup(cmdclass={'build_py': BuildWithRecipes})
