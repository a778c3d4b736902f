"""What pyproject.toml cannot say: the wheel holds tools/, datasets/*.py and configs/ below the package.

    blpseg/tools    tools/*.py      `python -m blpseg.tools.train_net`, and behind the console scripts
    blpseg/prepare  datasets/*.py   `python -m blpseg.prepare.make_synthetic`
    blpseg/configs  configs/        found by name where a path does not exist
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = {"blpseg.tools": "tools", "blpseg.prepare": "datasets", "blpseg.configs": "configs"}


class BuildPy(build_py):
    def find_package_modules(self, package, package_dir):
        """Leave out the tools that import research/, which is not installed."""
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if package not in FOLDERS or "research" not in Path(m[2]).read_text()]


setup(
    packages=find_packages(include=["blpseg", "blpseg.*"]) + list(FOLDERS),
    package_dir=FOLDERS,
    package_data={"blpseg": ["py.typed", "**/*.html", "**/*.js", "**/*.css"], "blpseg.configs": ["*.yaml", "*/*.yaml"]},
    cmdclass={"build_py": BuildPy},
)
