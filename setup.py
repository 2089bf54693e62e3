"""What setup.cfg cannot say: recipes inside the wheel, and a README that a package index can show.

PROJECT_URL is the page of the repository, which releases are built with; a clone does not know its own.
"""
import os
import re
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithRecipes(build_py):
    """Puts the recipes into what is built; a clone, also one that is installed as editable, has them where they are."""

    def run(self) -> None:
        """Build, and copy the recipes."""
        super().run()
        if not self.editable_mode:
            self.copy_tree('configs', str(Path(self.build_lib, 'elsa_models', 'configs')))


def readme(url: str) -> str:
    """README.md, its pictures and links to files of this version with `url` in front of them if there is one."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    if not url:
        return text
    version = runpy.run_path(str(ROOT / 'elsa_models' / '_version.py'))['__version__']

    def with_url(match: 're.Match[str]') -> str:
        kind = 'raw' if match[1] else 'blob'
        return f'{match[1]}[{match[2]}]({url}/{kind}/v{version}/{match[3]})'

    return re.sub(r'(!?)\[([^]]*)\]\(([\w.][\w./-]*)\)', with_url, text)


def project_urls(url: str) -> dict:
    """What an index shows beside the README."""
    pages = {'Source': '', 'Changelog': '/blob/main/CHANGELOG.md', 'Issues': '/issues'}
    return {name: url + page for name, page in pages.items()} if url else {}


URL = os.environ.get('PROJECT_URL', '').rstrip('/')
setup(
    cmdclass={'build_py': BuildWithRecipes},
    long_description=readme(URL),
    long_description_content_type='text/markdown',
    project_urls=project_urls(URL),
)
