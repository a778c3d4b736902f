"""What pyproject.toml cannot say: a wheel holds tools/, datasets/*.py and configs/ inside the package.

tools/*.py become blpseg.tools, datasets/*.py blpseg.prepare, and configs/ stands beside them. In a clone the packages
look into tools/ and datasets/ (blpseg/tools/__init__.py), so that an editable install needs nothing of this.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = {"blpseg.tools": "tools", "blpseg.prepare": "datasets"}


class BuildPy(build_py):
    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package in FOLDERS and not self.editable_mode:
            files = sorted(Path(FOLDERS[package]).glob("*.py"))
            # research/ is not installed, and what imports it would not run.
            modules += [(package, file.stem, str(file)) for file in files if "research" not in file.read_text()]
        return modules

    def run(self):
        super().run()
        if not self.editable_mode:
            for file in Path("configs").rglob("*.yaml"):
                target = Path(self.build_lib, "blpseg", file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(
    packages=find_packages(include=["blpseg", "blpseg.*"]),
    package_data={"blpseg": ["py.typed", "annotate/static/*"]},
    cmdclass={"build_py": BuildPy},
)
