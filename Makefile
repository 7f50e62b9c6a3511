# make quickstart   environment, installation and the whole chain on handwritten digits of MNIST
# make test         the tests that take seconds each
# make test-slow    the tests that kill, resume and install for real
# make test-gpu     those that need a GPU
# make lint         ruff and mypy
# make docs         the documentation as a site, in docs/_build/html; warnings are errors
# make bench        side by side with other programs, into benchmarks/RESULTS.md: CIFAR10=folder of the data set's parquet files;
#                   NANOGPT= and LLAMAGEN= checkouts of those repositories, without which the benchmarks against them are left out;
#                   TOKENS= run folder of the recipe cifar10 with tokenizer and tokens, for those of the prior's quality

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: quickstart test test-slow test-gpu lint docs bench install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"vqmosaic needs Python 3.11 or newer; this is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	@started=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) && \
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet -c constraints.txt torch --index-url $(TORCH_INDEX) &&) \
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]' && \
	echo $$(( $$(date +%s) - started )) > $(VENV)/installed && \
	echo "installed into $(VENV) in $$(cat $(VENV)/installed) s"

quickstart: install
	@started=$$(date +%s); \
	$(BIN)/vqmosaic run mnist --run_dir $(RUN); code=$$?; \
	echo "    installation took $$(cat $(VENV)/installed) s (once), the chain $$(( $$(date +%s) - started )) s"; \
	exit $$code

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu"

bench: install
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.quickstart --seeds 3 --record
	$(BIN)/python -m benchmarks.quantizer --record
	$(BIN)/python -m benchmarks.kernels --record
	$(BIN)/python -m benchmarks.tokenizer_step --record
	$(BIN)/python -m benchmarks.tokenizer_quality --record
	$(BIN)/python -m benchmarks.preprocess_cost --record
	$(BIN)/python -m benchmarks.shards --record
	$(if $(NANOGPT),$(BIN)/python -m benchmarks.prior_step --nanogpt $(NANOGPT) --record)
	$(if $(NANOGPT),$(BIN)/python -m benchmarks.prior_quality --nanogpt $(NANOGPT) $(if $(TOKENS),--tokens $(TOKENS)) --record)
	$(if $(NANOGPT),$(BIN)/python -m benchmarks.image_folder --nanogpt $(NANOGPT) --images 3000 --size 32 --minutes 4 --record)
	$(if $(NANOGPT),$(BIN)/python -m benchmarks.image_folder --nanogpt $(NANOGPT) --images 20000 --size 64 --minutes 4 --record)
	$(BIN)/python -m benchmarks.image_folder --images 3000 --size 64 --minutes 15 --only new before --record
	$(BIN)/python -m benchmarks.small_folder_prior --record
	$(if $(TOKENS),$(BIN)/python -m benchmarks.prior_architectures --tokens $(TOKENS) --record)
	$(BIN)/python -m benchmarks.parallel_sampling quality --run runs/parallel_sampling --record
	$(BIN)/python -m benchmarks.parallel_sampling layouts --run runs/parallel_sampling --record
	$(BIN)/python -m benchmarks.conditions superres --run runs/parallel_sampling --record
	$(BIN)/python -m benchmarks.conditions edges --run runs/parallel_sampling --record
	$(BIN)/python -m benchmarks.conditions captions --run runs/parallel_sampling --record
	$(BIN)/python -m benchmarks.two_levels --record
	$(BIN)/python -m benchmarks.restoration --run runs/parallel_sampling --record
	$(BIN)/python -m benchmarks.inpainting --run runs/parallel_sampling --record
	$(BIN)/python -m benchmarks.augmentation --run runs/parallel_sampling --record
	$(BIN)/python -m benchmarks.parallel_sampling speed $(if $(LLAMAGEN),--llamagen $(LLAMAGEN)) --record
	$(BIN)/python -m benchmarks.sampling $(if $(LLAMAGEN),--llamagen $(LLAMAGEN)) --record

test-gpu: install
	$(BIN)/python -m pytest -m gpu

docs: install
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build docs/_build docs/recipe_reference.md docs/benchmarks.md *.egg-info
