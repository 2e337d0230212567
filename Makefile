# make all: learn how images move, train a VAE, look at its latent space, make hybrids, train a
# CNN on them, compare.
# make help lists the rest. Every recipe is a command that can be typed by hand: make -n all.

DATASET ?= glyphs
DATA    ?= data
# One spelling of a path: the stamps hold it. There may be blanks above this folder.
override DATASET := $(if $(wildcard $(DATASET)),$(subst \
                    $(CURDIR)/,,$(abspath $(DATASET))),$(DATASET))
# The last part of the path, whole; a file without its ending.
RUN     := $(patsubst %.npz,%,$(lastword $(subst /, ,$(abspath $(DATASET)))))
OUT     ?= runs/$(RUN)
SIZES   ?=
# The demonstration trains no longer than it must: "fewer steps" in assets/trials.json.
ifeq ($(DATASET),glyphs)
SEEDS   ?= 3
VAE_STEPS     := --steps 1000
CNN_STEPS     := --steps 300
COMPARE_STEPS := --steps 150 --vae-steps 300
endif
SEEDS   ?= 5
STEPS   ?=
IMAGE_SIZE ?= 32
IMAGES  ?=
LABELS  ?=
SEED    ?=
# For photographs: a network of torchvision.models by name, or a file with a class Backbone.
BACKBONE ?=
# What a person has written down, if there is something.
LABELS_FROM ?= $(wildcard $(OUT)/labels.csv)
DEVICE  ?= auto
PIP_ARGS ?=
# What a shell or make would take apart.
ODD     := & ( ) ' " ;
$(foreach path,DATASET DATA OUT BACKBONE LABELS_FROM,\
  $(if $(strip $(word 2,$($(path))) $(foreach letter,$(ODD),$(findstring $(letter),$($(path))))),\
  $(error $(path)=$($(path)): make cannot handle blanks and $(ODD) in a path; rename it, or \
  type the commands)))

# PYTHON counts from the command line only; else a virtual environment is made and used.
ifneq ($(origin PYTHON),command line)
PYTHON := .venv/bin/python
READY  := .venv/ready
TESTED := .venv/ready-test
endif

WHICH  := --dataset $(DATASET) --data-dir $(DATA) --image-size $(IMAGE_SIZE) --device $(DEVICE) \
          $(if $(LABELS),--labels $(LABELS)) $(if $(LABELS_FROM),--labels-from $(LABELS_FROM)) \
          $(if $(SEED),--seed $(SEED)) $(if $(BACKBONE),--backbone $(BACKBONE))
# The first step says which images; the others take them from its file.
FIRST  := $(WHICH) $(if $(IMAGES),--images $(IMAGES)) -o $(OUT)
LATER  := -o $(OUT) --device $(DEVICE)
# Features do not move: with them the VAE comes first.
ifeq ($(BACKBONE),)
MOVES  := $(OUT)/deform.pt
endif
ENOUGH := $(if $(SIZES),--sizes $(SIZES))
MAIN   := real mixup augment elastic mixup+cutmix deform deform+mixup deform+cutmix real+hybrid \
          'undeformed hybrid' augment+mixup augment+hybrid
CHECKS := real mixup cutmix mixup+cutmix deform 'deformed images' 'undeformed hybrid' \
          'cross-faded hybrid' real+hybrid 'weight labels' 'density labels' 'no residual' \
          'hybrid only' 'prior hybrid' reconstructions 'latent posterior'
FEW    := real mixup deform 'latent posterior' pseudo-labels augment+pseudo 'deformed images' \
          real+hybrid
STEP   := $(if $(STEPS),--steps $(STEPS))

# What each step depends on besides its files; a stamp is rewritten only when this changes.
deform_settings  := $(FIRST)
vae_settings     := $(if $(MOVES),$(LATER),$(FIRST)) $(or $(STEP),$(VAE_STEPS)) $(VAE_FLAGS)
latent_settings  := $(LATER) --review
hybrids_settings := $(LATER) $(HYBRID_FLAGS)
cnn_settings     := $(LATER) $(or $(STEP),$(CNN_STEPS))
compare_settings := $(LATER) $(if $(SIZES),--sizes $(SIZES)) --seeds $(SEEDS) \
                    $(or $(STEP),$(COMPARE_STEPS)) $(COMPARE_FLAGS)

# The scripts write these whole, as the last thing: nothing that happens later makes them worse.
.PRECIOUS: $(addprefix $(OUT)/,deform.pt vae.pt latent.pt hybrids.pt cnn.pt compare.json)
.PHONY: all quick test test-slow bench clean help evidence pictures FORCE

# glibc keeps what is freed for the next step: fewer page faults, a tenth faster.
export MALLOC_TRIM_THRESHOLD_ := 536870912
export MALLOC_MMAP_THRESHOLD_ := 33554432

all: $(OUT)/compare.json

$(OUT)/deform.pt: deform.py $(OUT)/.deform.stamp $(wildcard $(LABELS_FROM)) | $(READY)
	$(PYTHON) deform.py $(deform_settings) $(ENOUGH)

$(OUT)/vae.pt: vae.py $(MOVES) $(OUT)/.vae.stamp $(wildcard $(LABELS_FROM)) | $(READY)
	$(PYTHON) vae.py $(vae_settings) $(ENOUGH) --resume

$(OUT)/latent.pt: latent.py $(OUT)/vae.pt $(OUT)/.latent.stamp | $(READY)
	$(PYTHON) latent.py $(latent_settings)

$(OUT)/hybrids.pt: hybrids.py $(OUT)/latent.pt $(OUT)/.hybrids.stamp | $(READY)
	$(PYTHON) hybrids.py $(hybrids_settings)

$(OUT)/cnn.pt: cnn.py $(OUT)/hybrids.pt $(OUT)/.cnn.stamp | $(READY)
	$(PYTHON) cnn.py $(cnn_settings) --resume

# After cnn.pt, so that the grid has the cores to itself under make -j.
$(OUT)/compare.json: compare.py $(OUT)/cnn.pt $(OUT)/.compare.stamp | $(READY)
	$(PYTHON) compare.py $(compare_settings)

# One make at a time works in a folder. The file holds its number; one that has ended is no bar,
# though its entry may stay (Z).
$(OUT)/.make: FORCE
	@mkdir -p $(OUT)
	@if ps -o stat= -o comm= -p "`cat $@ 2>&1`" 2>&1 | grep -q '^[^Z].*make$$'; then \
	  echo 'another make works in $(OUT); wait for it' >&2; exit 1; fi; \
	rm -f $@; echo $$PPID > $@

$(OUT)/.%.stamp: FORCE | $(OUT)/.make
	@echo '$($*_settings)' | cmp -s - $@ || echo '$($*_settings)' > $@

quick:
	@$(MAKE) --no-print-directory all OUT=$(if $(filter runs/$(RUN),$(OUT)),runs/quick,$(OUT)) \
	  SIZES='$(or $(SIZES),10)' SEEDS=2 STEPS=$(or $(STEPS),20) IMAGES=$(or $(IMAGES),100) \
	  HYBRID_FLAGS='--count 200' COMPARE_FLAGS='--vae-steps 20'

test: $(TESTED)
	$(PYTHON) -m pytest -q test_all.py

# Minutes more: a worker that is killed, two ranks of a comparison.
test-slow: $(TESTED)
	SLOW=1 $(PYTHON) -m pytest -q test_all.py

# Seconds and what they buy on MNIST, beside two recipes, into assets/bench.json.
bench: $(TESTED)
	$(PYTHON) assets/bench.py

# Hours: the main arms on 10 subsets, the controls on 6, the regime of few labels and many images.
# It goes on where it stopped.
evidence: $(READY)
	$(PYTHON) compare.py $(WHICH) -o $(OUT)/evidence --sizes 50 100 300 1000 --seeds 10 --arms $(MAIN)
	$(PYTHON) compare.py $(WHICH) -o $(OUT)/controls --sizes 100 1000 --seeds 6 --arms $(CHECKS)
	$(PYTHON) compare.py $(WHICH) -o $(OUT)/all --sizes 50 100 --seeds 6 --unlabelled \
	  --arms $(FEW)

# The pictures of the pages, in minutes; DATA has cifar10-10k.npz and cats-and-dogs, see EVIDENCE.
NETWORK ?= lite0.py
pictures: $(READY)
	$(MAKE) runs/mnist/hybrids.pt DATASET=mnist
	$(MAKE) runs/cifar10-10k/hybrids.pt DATASET=$(DATA)/cifar10-10k.npz
	$(MAKE) runs/cats-and-dogs/latent.pt DATASET=$(DATA)/cats-and-dogs LABELS=20 BACKBONE=$(NETWORK)
	cp runs/mnist/hybrids.png runs/mnist/latent.png assets/
	cp runs/cifar10-10k/hybrids.png assets/cifar10-hybrids.png
	cp runs/cats-and-dogs/latent.png assets/photographs.png
	$(PYTHON) assets/evidence.py --draw

.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q $(PIP_ARGS) -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready
	.venv/bin/python -m pip install -q $(PIP_ARGS) pytest
	touch $@

# A person's labels stay.
clean:
	@mkdir -p runs
	find runs -mindepth 1 ! -type d ! -name labels.csv -delete
	find runs -mindepth 1 -type d -empty -delete

help:
	@echo 'make all       the whole chain into $(OUT)'
	@echo 'make quick     the same in a minute, smallest sizes, into runs/quick'
	@echo 'make test      the tests; make test-slow: those of minutes, too'
	@echo 'make bench     time it, on MNIST'
	@echo 'make evidence  the large comparison (hours; goes on where it stopped)'
	@echo 'make clean     remove everything below runs/ but labels.csv'
	@echo 'Variables: DATASET=$(DATASET) DATA=$(DATA) OUT=$(OUT) SIZES="$(SIZES)" SEEDS=$(SEEDS)'
	@echo '           IMAGES=$(IMAGES) LABELS=$(LABELS) LABELS_FROM=$(LABELS_FROM) SEED=$(SEED)'
	@echo '           BACKBONE=$(BACKBONE) (for photographs: see README)'
	@echo '           STEPS=$(STEPS) IMAGE_SIZE=$(IMAGE_SIZE) DEVICE=$(DEVICE)'
	@echo '           PYTHON=$(PYTHON) PIP_ARGS=$(PIP_ARGS)'
	@echo '           VAE_FLAGS HYBRID_FLAGS COMPARE_FLAGS: any flags of those scripts'
	@echo 'Example:   make all DATASET=mnist SIZES="100 1000" SEEDS=10'
