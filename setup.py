"""What setup.cfg cannot say: the wheel holds the folder configs inside the package. Everything else is there."""
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=['elsa_models*']), 'elsa_models.configs'],
    package_dir={'elsa_models.configs': 'configs'},
)
