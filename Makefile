# make              the three programs: ./sample ./train ./inpaint
# make test         every test; the last line is "N passed, N failed"
# make test SANITIZE=1   the same under AddressSanitizer and UndefinedBehaviorSanitizer
# make bench        how fast, as fractions of this machine's ceilings and beside PyTorch; also in bench.tsv
# make fuzz SECONDS=60  the readers of checkpoints under libFuzzer (needs clang; Debian: clang, libclang-rt-14-dev)
# make ffhq         fetches an official model: also ffhq2 churches bedrooms cats imagenet imagenet4 (models/fetch.sh)
# make fullsize     the official models at full size, with random weights, against PyTorch (PYTHON=..., MODELS=...)
# make data/emoji   the pictures that the bundled model was trained on
# Variables: HAVE_WEBP= and HAVE_LMDB= leave these out though they are there; CC=clang, MARCH=x86-64-v3 (default native), SANITIZE=1 (each combination builds in its own folder),
# MODELS_URL=https://... (where official models come from), PYTHON=... (which has PyTorch, for comparisons).

CC ?= cc
ifeq ($(origin CC),default)
CC := $(if $(shell command -v gcc),gcc,clang)
endif
MARCH ?= native
SANITIZE ?= 0

B := build/$(notdir $(CC))-$(MARCH)$(if $(filter 1,$(SANITIZE)),-sanitize)

comma := ,

# ---- what this machine has: each feature is verified by compiling something ----
compiles = $(shell printf '%b\n' '$(1)' | $(CC) -x c - $(2) -o /dev/null 2>/dev/null && echo yes)
HAVE_SIMD := $(call compiles,int main(void) { return 0; },-fopenmp-simd)
HAVE_MARCH := $(call compiles,int main(void) { return 0; },-march=$(MARCH))
HAVE_PNG := $(call compiles,#include <png.h>\nint main(void) { return !png_get_libpng_ver(0); },-lpng)
HAVE_JPEG := $(call compiles,#include <stdio.h>\n#include <jpeglib.h>\nint main(void) { return !jpeg_std_error(0); },-ljpeg)
HAVE_WEBP := $(call compiles,#include <webp/decode.h>\nint main(void) { return !WebPGetDecoderVersion(); },-lwebp)
HAVE_LMDB := $(call compiles,#include <lmdb.h>\nint main(void) { return !mdb_version(0$(comma) 0$(comma) 0); },-llmdb)
B := $B$(if $(HAVE_WEBP),,-nowebp)$(if $(HAVE_LMDB),,-nolmdb)

OFFICIAL := ffhq ffhq2 churches bedrooms cats imagenet imagenet4

ifneq ($(filter-out clean format $(OFFICIAL) vqgan lsun,$(or $(MAKECMDGOALS),all)),)
$(info compiler  $(CC) -march=$(MARCH)$(if $(filter 1,$(SANITIZE)), with sanitizers))
ifeq ($(HAVE_PNG),)
$(error libpng is missing. Debian: apt-get install libpng-dev)
endif
ifeq ($(HAVE_JPEG),)
$(error libjpeg is missing. Debian: apt-get install libjpeg-dev)
endif
$(info images    PNG, JPEG)
$(info WebP      $(if $(HAVE_WEBP),yes,left out; libwebp brings it (Debian: apt-get install libwebp-dev)))
$(info LMDB      $(if $(HAVE_LMDB),yes,left out; liblmdb brings it (Debian: apt-get install liblmdb-dev)))
$(info device    CPU (the CUDA path is not part of this version))
endif

# -ffp-contract=fast: a*b+c may become one fused multiply-add, which every kernel here is built on. -fno-math-errno and
# -fno-trapping-math only promise that nobody reads errno or floating-point traps, so that sqrt and selects vectorise.
# No -ffast-math: sums keep their order, NaN stays NaN, except in loops marked "omp simd", whose sums run in lanes
# (-fopenmp-simd: that mark alone, nothing of OpenMP's library).
WARN := -Wall -Wextra -Wshadow -Werror
ifneq ($(findstring clang,$(shell $(CC) --version 2>/dev/null)),)
WARN += -Wno-pass-failed # "this loop was not vectorised" is a remark about speed, not about the code
endif
OPT := $(if $(filter 1,$(SANITIZE)),-O2 -fsanitize=address$(comma)undefined -fno-sanitize-recover=all -fno-omit-frame-pointer,-O3)
CFLAGS := -std=c11 -D_GNU_SOURCE -g $(OPT) $(if $(HAVE_MARCH),-march=$(MARCH)) -ffp-contract=fast -fno-math-errno \
          -fno-trapping-math $(WARN) $(if $(HAVE_SIMD),-fopenmp-simd,-Wno-unknown-pragmas) \
          $(if $(HAVE_WEBP),-DHAVE_WEBP) $(if $(HAVE_LMDB),-DHAVE_LMDB)
LDLIBS := $(if $(HAVE_WEBP),-lwebp) $(if $(HAVE_LMDB),-llmdb) -lpng -ljpeg -lz -lm -lpthread

COMPONENTS := base gemm stream conv checkpoint ckpt params images lmdb data tokens vqgan layers attention transformer decode optimizer classes diffusion
PROGRAMS := sample train inpaint
TESTS := base gemm conv checkpoint ckpt images data vqgan transformer classes diffusion
TESTS_DOUBLE := gemm conv vqgan transformer

OBJ := $(COMPONENTS:%=$B/%.o)
OBJ_DOUBLE := $(COMPONENTS:%=$B/double/%.o)
TEST_BIN := $(TESTS:%=$B/test_%) $(TESTS_DOUBLE:%=$B/test_%_double)

all: $(PROGRAMS)

# ./sample, ./train, ./inpaint, test/golden and test/bench are copies of the last configuration built.
$(PROGRAMS): %: $B/%
	@cp -f $< $@
test/golden test/bench: test/%: $B/%
	@cp -f $< $@
.PHONY: all test bench fullsize fuzz clean format FORCE $(OFFICIAL) vqgan lsun
ifneq ($(shell cat build/last 2>/dev/null),$B)
$(PROGRAMS) test/golden test/bench: FORCE
$(shell mkdir -p build && echo $B >build/last)
endif

$(PROGRAMS:%=$B/%): $B/%: $B/%.o $B/cli.o $(OBJ)
	$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$B/golden $B/bench: $B/%: $B/test/%.o $(OBJ)
	$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$B/pictures $B/logits $B/fullsize: $B/%: $B/test/%.o $(OBJ)
	$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$(TESTS:%=$B/test_%): $B/test_%: $B/test/test_%.o $(OBJ)
	$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$(TESTS_DOUBLE:%=$B/test_%_double): $B/test_%_double: $B/double/test/test_%.o $(OBJ_DOUBLE)
	$(CC) $(CFLAGS) -DREAL_DOUBLE -o $@ $^ $(LDLIBS)

$B/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -MMD -MP -c -o $@ $<
$B/%.o: %.cu Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -MMD -MP -x c -c -o $@ $<
$B/double/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -DREAL_DOUBLE -MMD -MP -c -o $@ $<
$B/double/%.o: %.cu Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -DREAL_DOUBLE -MMD -MP -x c -c -o $@ $<

test: $(TEST_BIN) $B/golden $B/pictures $B/logits $(PROGRAMS:%=$B/%)
	@test/run.sh $B $(TEST_BIN)

# The official model in PyTorch beside ours, where PYTHON has PyTorch.
PYTHON ?= python3
bench: test/bench
	test/bench -o bench.tsv
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) test/bench_torch.py bench.tsv; \
	else echo "skipped: comparison with PyTorch, which $(PYTHON) does not have (PYTHON=... chooses another)"; fi

# Not part of `make test`: it writes 10 GiB at a time under build/fullsize and takes half an hour.
fullsize: $B/fullsize $B/sample
	@PYTHON=$(PYTHON) test/fullsize.sh $B build/fullsize $(MODELS)

FUZZ := zip pickle legacy safetensors
SECONDS ?= 60
fuzz: $B/test_ckpt
	@for f in $(FUZZ); do mkdir -p build/fuzz/$$f && clang -std=c11 -D_GNU_SOURCE -g -O1 -Wno-unknown-pragmas \
	    -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -o build/fuzz_$$f test/fuzz_$$f.c base.c \
	    checkpoint.c ckpt.c -lz -lm -lpthread || exit 1; done
	@$B/test_ckpt --seeds build/fuzz
	@cp test/golden-cases/ckpt_formats/model_half_legacy.ckpt build/fuzz/legacy
	@cp test/golden-cases/ckpt_formats/model_half.ckpt build/fuzz/zip
	@cp test/golden-cases/ckpt_formats/io.safetensors build/fuzz/safetensors
	@for f in $(FUZZ); do echo "fuzz_$$f, $(SECONDS) s"; build/fuzz_$$f -max_total_time=$(SECONDS) -timeout=10 -max_len=20000 \
	    -rss_limit_mb=4096 -print_final_stats=1 build/fuzz/$$f >build/fuzz_$$f.log 2>&1 || { tail -30 build/fuzz_$$f.log; exit 1; }; done

$(OFFICIAL):
	@models/fetch.sh $@ vqgan
vqgan lsun:
	@models/fetch.sh $@

data/emoji:
	/usr/bin/python3 dev/emoji.py --out $@

format:
	clang-format -i *.c *.cu *.h test/*.c test/*.h

clean:
	rm -rf build $(PROGRAMS) test/golden test/bench

FORCE:
-include $(wildcard $B/*.d $B/test/*.d $B/double/*.d $B/double/test/*.d)
