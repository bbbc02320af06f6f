"""What setup.cfg cannot say: the recipes of ``configs/`` lie in the installed package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["d2dmoe_pl*"]), "d2dmoe_pl.configs"],
    package_dir={"d2dmoe_pl.configs": "configs"},
)
