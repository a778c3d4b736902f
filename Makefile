# `make demo` and `make test` set up what is missing first. GNU make, Python >= 3.10.
#
#   make install DETECTRON2=<pip requirement or path>   use that Detectron2 instead of the pinned wheel
#   make install PYTHON=python3.12                      use that interpreter

PYTHON ?= python3
# The choice of Detectron2 is remembered, so that a later `make test` does not undo it.
DETECTRON2 ?= $(shell cat .venv/detectron2-source 2>/dev/null)

BIN := .venv/bin
UV := $(BIN)/uv pip install --python $(BIN)/python
DATASETS := $(or $(DETECTRON2_DATASETS),datasets)
INSTALLED := .venv/installed-$(shell printf '%s' '$(DETECTRON2)' | cksum | cut -d ' ' -f 1)
DEMO_CONFIG := configs/Synthetic-Scribble/blpseg_lite.yaml
PHOTOS := $(DATASETS)/photos

.PHONY: install demo annotate test test-slow coverage lint docs dist clean

install: $(INSTALLED)
	@cat $<

$(INSTALLED): requirements.lock requirements-crf.txt requirements-detectron2.txt setup.py pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try make install PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@rm -f .venv/installed-*
	$(UV) --require-hashes -r requirements.lock
	@$(UV) --require-hashes -r requirements-crf.txt || \
		echo "Not built: pydensecrf2, for want of a C++ compiler? Only the dense CRF (TEST.CRF.ENABLED) is missing; $(UV) -r requirements-crf.txt adds it."
ifeq ($(strip $(DETECTRON2)),)
	site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	rm -rf "$$site/detectron2" "$$site"/detectron2-* && \
	$(UV) --target "$$site" --python-version 3.10 --only-binary :all: --no-deps --require-hashes --reinstall \
		-r requirements-detectron2.txt && \
	rm -rf "$$site/tools"  # the wheel's stray top-level package would shadow ours
else
	site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	rm -rf "$$site/detectron2" "$$site"/sal_detectron2-*
	$(UV) --no-build-isolation '$(DETECTRON2)'
endif
	$(UV) --no-deps --editable .
	@printf '%s' '$(DETECTRON2)' > .venv/detectron2-source
	@echo "checking the imports (the first takes half a minute) ..."
	@$(BIN)/python -W ignore -c 'import detectron2, torch, torchvision, blpseg; print("detectron2", detectron2.__version__, "| torch", torch.__version__, "| torchvision", torchvision.__version__, "| blpseg", blpseg.__version__)' > $@.part
	@mv $@.part $@

demo: $(INSTALLED)
	$(BIN)/python datasets/make_synthetic.py
	$(BIN)/python tools/train_net.py --config-file $(DEMO_CONFIG) --resume OUTPUT_DIR output/demo/model
	$(BIN)/python tools/demo.py --config-file $(DEMO_CONFIG) --dataset synthetic_scribble_train synthetic_val --panels \
		--limit 6 --output output/demo --opts MODEL.WEIGHTS output/demo/model/model_final.pth
	$(BIN)/python datasets/make_photos.py
	$(BIN)/python tools/train_net.py --config-file $(PHOTOS)/config.yaml --resume OUTPUT_DIR output/demo/photos_model \
		SOLVER.MAX_ITER 120 SOLVER.IMS_PER_BATCH 4
	$(BIN)/python tools/demo.py --config-file $(PHOTOS)/config.yaml --dataset photos_train --panels \
		--output output/demo/photos --opts MODEL.WEIGHTS output/demo/photos_model/model_final.pth
	@echo "Wrote output/demo/photos/*_panels.png: four photographs, the strokes on them, annotation probability, prediction;"
	@echo "      output/demo/*_panels.png: generated scenes with their truth; output/demo/model: checkpoints, results.json,"
	@echo "      metrics.json, TensorBoard events. The data lie in $(DATASETS)/photos and $(DATASETS)/synthetic."
	@echo "Next: draw more strokes on the photographs, or a project of your own photos (docs/GETTING_STARTED.md):"
	@echo "      $(BIN)/python tools/annotate.py $(PHOTOS) --open"

annotate: $(INSTALLED)
	$(BIN)/python datasets/make_photos.py
	$(BIN)/python tools/annotate.py $(PHOTOS) --open

# One thread a process: on a busy machine two threads wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: $(INSTALLED)
	$(PYTEST) -m 'not slow'

# The rest: the wheel, the site, the page in a browser, longer documents, kills and resumes.
test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# The share of the package's lines that the fast tests run; fails below the floor in pyproject.toml.
coverage: $(INSTALLED)
	$(PYTEST) -m 'not slow' --cov=blpseg

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check blpseg
	$(BIN)/codespell
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

dist: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -W ignore -c 'import setuptools.build_meta as b; b.build_wheel("dist"); b.build_sdist("dist")'

clean:
	rm -rf .venv build dist site *.egg-info output/demo .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
