# make demo   draw a small data set, train on it, evaluate, caption: everything in demo_run/
# make test   lint and tests
# make test-slow   the tests that start browsers, servers and videos, and that kill runs

PYTHON ?= python3
DEMO_EPOCHS ?= 8
PYTEST := .venv/bin/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal
PRETRAINED := pretrained/everyday_efficientnet_lite2.pth.tar

help:
	@sed -n 's/^# //p' Makefile

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@

.venv/test: .venv/demo requirements-app.txt requirements-dev.txt
	.venv/bin/pip install -r requirements-dev.txt
	touch $@

demo: .venv/demo
	.venv/bin/python create_input_files.py --output_folder demo_run --overwrite
	.venv/bin/python train.py --data_folder demo_run --checkpoint_folder demo_run \
	    --encoder tf_efficientnet_lite2 --encoder_weights $(PRETRAINED) --encoder_stride 16 \
	    --decoder_dim 256 --attention_dim 128 --emb_dim 64 --decoder_lr 2e-3 \
	    --batch_size 40 --epochs $(DEMO_EPOCHS) --workers 0 --overwrite
	.venv/bin/python eval.py --data_folder demo_run --checkpoint_folder demo_run --workers 0
	.venv/bin/python caption.py --checkpoint_folder demo_run --out demo_run/overlays \
	    --img demo_run/demo/demo_0189?.png --repeat_words
	@echo "attention overlays are in demo_run/overlays"

test: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PYTEST)

test-slow: .venv/test
	$(PYTEST) -m slow

.PHONY: help demo test test-slow
