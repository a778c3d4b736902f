"""Package BLPSeg. Detectron2 has no release on PyPI: `make install` brings it, README.md says how to use your own."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"', (root / "blpseg/__init__.py").read_text(), re.M).group(1)

setup(
    name="blpseg",
    version=version,
    description="BLPSeg: semantic segmentation learned from scribbles, on Detectron2",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["blpseg", "blpseg.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.5",  # torch.load(weights_only=True) by default needs 2.6; SDPA and FlexAttention 2.5
        "torchvision>=0.20",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "pycocotools>=2.0.2",
        "opencv-python>=4.8",
        "numpy>=1.24",
        "Pillow>=10",
        "matplotlib>=3.7",
        "scipy>=1.10",
        "PyYAML>=6",
        "tqdm>=4.60",
        "tabulate",
        "tensorboard",
        "setuptools<81",  # detectron2.model_zoo imports pkg_resources
        "defusedxml>=0.7",
        # Detectron2's own imports; its wheel is installed without its dependency list, which pins numpy<2.
        "cloudpickle",
        "hydra-core>=1.1",
        "omegaconf>=2.1,<2.4",
        "packaging",
        "termcolor>=1.1",
        "yacs>=0.1.8",
    ],
    extras_require={
        "crf": ["pydensecrf2==1.1"],
        "medical": ["h5py>=3", "medpy>=0.5"],
        "export": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.1"],
        "dev": ["pytest>=7", "ruff", "h5py>=3", "medpy>=0.5", "onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.1"],
    },
)
