# `make demo` and `make test` set up .venv on their own; nothing needs to be installed before.
PYTHON ?= python3
# Where Detectron2 comes from if the environment lacks it: index (third_party/detectron2) or git.
DETECTRON2 ?= index
BIN := .venv/bin
DEMO := output/demo
DEMO_CONFIG := projects/dset/configs/dset_r18_roadside.py

READY := .venv/ready-$(DETECTRON2)

.PHONY: demo test oldest lint bench bench-vit bench-deploy clean

demo: $(READY)
	$(BIN)/python -m dset_d2.tools.make_roadside --output $(DEMO)/datasets --train 480
	DETECTRON2_DATASETS=$(DEMO)/datasets $(BIN)/python -m dset_d2.tools.lazyconfig_train_net \
		--config-file $(DEMO_CONFIG) \
		$(if $(wildcard $(DEMO)/last_checkpoint),--resume,--overwrite) train.output_dir=$(DEMO)
	DETECTRON2_DATASETS=$(DEMO)/datasets $(BIN)/python -m dset_d2.tools.visualize \
		--config-file $(DEMO_CONFIG) \
		--weights $(DEMO)/model_best.pth --output $(DEMO)/detections --num-images 12
	@echo "pictures: $(DEMO)/detections  report: $(DEMO)/report.md  weights: $(DEMO)/model_best.pth"

# A process for each core, up to four for their memory, with one thread each: more would wait for
# each other. Files stay whole, for what their tests share, and in order, which has whole runs early.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

OLDEST := .venv-oldest/bin/python
# The oldest versions that setup.py allows, with the oldest Python: make oldest PYTHON=python3.10
# What Detectron2 needs beside the package's own requirements, which are taken at their lower bounds.
DETECTRON2_NEEDS := cloudpickle iopath packaging tensorboard termcolor wheel yacs 'setuptools<81'
# Without the comparison with transformers, which follows the names of a newer one.
oldest:
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install $(DETECTRON2_NEEDS) pytest hypothesis transformers==4.52.1 \
		$$(sed -n '/extras_require/q; s/^ *"\([A-Za-z0-9-]*\)>=\([0-9][^",]*\).*/\1==\2/p' setup.py) \
		$$(sed -n 's/.*"\(opencv-python\)>=\([^"]*\)".*/\1-headless==\2/p' setup.py)
	$(OLDEST) third_party/detectron2/install.py
	OMP_NUM_THREADS=1 PYTHONPATH=. $(OLDEST) -m pytest tests/modeling tests/data tests/checkpoint \
		tests/test_configs.py --ignore tests/modeling/test_transformers.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

RAMP := model.encoder.pruning.end_step=120
# Small-scale evidence: DSET and its ablations with equal budget and two seeds, side by side.
bench: $(READY)
	$(BIN)/python -m dset_d2.tools.make_roadside --output $(DEMO)/datasets --train 480
	DETECTRON2_DATASETS=$(DEMO)/datasets $(BIN)/python -m dset_d2.tools.ablation \
		--config-file $(DEMO_CONFIG) --output output/ablation --seeds 0 1 \
		--variant "RT-DETR: configs/rtdetr/rtdetrv2_r18_roadside.py" \
		--variant "MoE-RTDETR: model.encoder.pruning=null model.encoder.moe=null" \
		--variant "patch-MoE: model.encoder.pruning=null model.decoder.moe=null" \
		--variant "pruning: model.encoder.moe=null model.decoder.moe=null $(RAMP)" \
		--variant "DSET: $(RAMP)" \
		--variant "DSET-zero: $(RAMP) model.encoder.pruning.restore=zero" \
		train.max_iter=240 train.eval_period=80

VIT := output/ablation_vit
PLACE := model.backbone.pruning
JOBS ?= 2
# Sparse ViTs beside their static controls: AP against time, two seeds.
bench-vit: $(READY)
	$(BIN)/python -m dset_d2.tools.make_roadside --output $(VIT)/datasets --train 480 --val 120
	DETECTRON2_DATASETS=$(VIT)/datasets $(BIN)/python -m dset_d2.tools.ablation \
		--config-file projects/dset/configs/dset_dinov3_roadside.py --output $(VIT) \
		--jobs $(JOBS) --seeds 0 1 --keep-ratios 1 0.7 0.5 0.3 --scorers learned attention \
		--variant "dense: $(PLACE)=[]" \
		--variant "pruned 0.7: $(PLACE).0.keep_ratio=0.7" \
		--variant "pruned 0.5:" \
		--variant "pruned 0.3: $(PLACE).0.keep_ratio=0.3" \
		--variant "random: $(PLACE).0.keep_ratio=0.3 $(PLACE).0.random_ratio=true" \
		--variant "windows: $(PLACE)=[] model.backbone.windows.global_blocks=[3,7]" \
		--variant "scale 0.8: $(PLACE)=[] model.backbone.scale=0.8" \
		--variant "input 224: $(PLACE)=[] dataloader.image_size=[224,384]"

# Deployed speed: every form of five models, and the AP of each form of the demo's.
bench-deploy: demo
	DETECTRON2_DATASETS=$(DEMO)/datasets $(BIN)/python -m dset_d2.tools.deployment \
		--output output/deployment --trained $(DEMO_CONFIG) $(DEMO)/model_best.pth \
		--config-file configs/rtdetr/rtdetrv2_r18_coco.py configs/dfine/dfine_s_coco.py \
		projects/dset/configs/dset_s_dair_v2x.py \
		projects/dfine_dinov3/configs/dfine_dinov3_s_coco.py \
		projects/dset/configs/dset_dinov3_s_coco.py

clean:
	rm -rf .venv .venv-oldest output build *.egg-info

$(READY): requirements.txt setup.py third_party/detectron2/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON must be 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
ifeq ($(DETECTRON2),git)
	$(BIN)/python -m pip uninstall --yes detectron2
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation \
		'git+https://github.com/facebookresearch/detectron2.git'
else
	$(BIN)/python third_party/detectron2/install.py
endif
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
