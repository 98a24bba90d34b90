# Everything below creates .venv on first use. Python: PYTHON=python3.12 make demo
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test cluster-test lint bench bench-gpu clean

demo: .venv/installed  ## pre-train on built-in synthetic people, 2 to 6 minutes on 2 cores, by the processor
	$(BIN)/python jobs/pretrain.py

test: .venv/installed-dev  ## every test but those that need several hosts
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --durations 10 -m "not cluster"

# CLUSTER=short: those that continuous integration runs.
CLUSTER ?= cluster
cluster-test: .venv/installed-dev  ## several hosts in network namespaces: as root, needs the packages named in .ci/run
	$(BIN)/python -m pytest -m $(CLUSTER) tests/cluster

lint: .venv/installed-dev  ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Those of one thread that end in minutes; cluster_scale and stream_million go to millions, and are run by hand.
BENCHMARKS := part_views stream_views distillation_loss evaluate_ranking jaccard rerank synthetic_people

bench: .venv/installed-dev  ## measured speed, as ratios to literal versions in the same run
	for name in $(BENCHMARKS); do echo "== $$name"; OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.pass_step --repeats 3
	$(BIN)/python -m benchmarks.pass_step --repeats 3 --precision bf16
	$(BIN)/python -m benchmarks.render

bench-gpu: .venv/installed-dev  ## the training step on a GPU: ViT-S and ViT-B in bf16, plain and compiled
	for trunk in small base; do for compile in off blocks; do \
		$(BIN)/python -m benchmarks.pass_step --device cuda --precision bf16 --trunk vit_$${trunk}_patch16_224 --batch 128 \
			--compile $$compile --name pass_step_cuda_bf16_$${trunk}_$$compile || exit 1; done; done
	$(BIN)/python -m benchmarks.render

clean:
	rm -rf .venv

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
