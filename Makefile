# make              the programs: ./sample ./train ./inpaint ./serve, for any x86-64 processor
# make MARCH=native the programs for this processor only: a third of the time to compile
# make check LAYER=group_norm  one layer: plain, fast and as a CUDA kernel, in seconds after a first build; without LAYER: their names
# make test         every test; the last line is "N passed, N failed"
# make PLAIN=1      the programs from their plain loops alone, without kernels/, which may be missing; make test PLAIN=1
# make units        the test programs and golden cases alone (CC=clang, MARCH=..., SANITIZE=1); make threads: for races
# make test SANITIZE=1   the same under AddressSanitizer and UndefinedBehaviorSanitizer
# make test-cuda    the CUDA kernels on this machine's GPU; SANITIZER=memcheck: under compute-sanitizer
# make bench-cuda   training, drawing and decoding on a GPU at full size, beside PyTorch, and what was asked for
# make carry        the CUDA programs stripped and packed, build/carried.tar.xz (STATIC=1 CUDA_ARCH=90a MARCH=x86-64-v3), for
# make on-gpu BUILT=build/carried.tar.xz   test-cuda, under memcheck and racecheck, bench-cuda, on a machine that has a GPU but neither
#                   nvcc nor libraries; without BUILT: where there are all; test-cuda and bench-cuda have BUILT=DIR, too
# make test-cuda-emulated   every CUDA kernel, run on the CPU, against its C twin (part of make test)
# make test-cuda-ptx PTXSIM=DIR   nvcc's PTX, run on the CPU by the interpreter in DIR; WHOLE=1: in all orders, for 80, 90, 90a
# make planted PTXSIM=DIR   faults planted in the CUDA code one by one, which these tests must find (test/planted.txt)
# make emulated-debug   the same kernels for a debugger, in build/*/emulated-debug
# make bench        how fast, as fractions of this machine's ceilings and beside PyTorch; also in bench.tsv
# make load SECONDS=120   fifty clients upon ./serve at once (also SANITIZE=1); make load-threads: under the thread sanitizer
# make walkthrough the numbers of doc/walkthrough.md: test/walkthrough 1 ... 8
# make faults       every call for a file of short runs fails or kills, every allocation fails (a sample is in make test)
# make install PREFIX=/usr/local DESTDIR=   one program, imagebart, with models, man pages, completion; make uninstall;
#                   dev/Dockerfile: the same in a container
# make lib          libimagebart.so and .a for other programs: sampling/libimagebart.h; dev/imagebart.py for Python; then
#                   make install installs them too, with the same MARCH and NVCC
# make fuzz FUZZ_SECONDS=60  all that reads files under libFuzzer (needs clang; Debian: clang, libclang-rt-14-dev)
# make ffhq         fetches an official model: also ffhq2 churches bedrooms cats imagenet imagenet4 (models/fetch.sh)
# make lpips       what ./train --vqgan measures likeness with (models/fetch.sh), checksums compared
# make fullsize     the official models at full size, with random weights, against PyTorch (PYTHON=..., MODELS=...)
# make data/emoji   the pictures that the bundled model was trained on
# Variables: NVCC=... (empty: no CUDA), CUDA_ARCH="80 90a", HAVE_WEBP=, HAVE_LMDB=, HAVE_MPI= and HAVE_SERVE= leave these out though they are there,
# PKG_CONFIG=... (which says where libraries are, if it is there), STATIC=1 (the libraries for images linked in, for machines that lack them),
# CC=clang, MARCH=x86-64-v3 (one processor's instructions, for tests too), SANITIZE=1 (each combination builds in its own
# folder), -j1 (default: as many jobs as there are processors),
# MODELS_URL=https://... (where official models come from), PYTHON=... (which has PyTorch, for comparisons).

CC ?= cc
ifeq ($(origin CC),default)
CC := $(if $(shell command -v gcc),gcc,clang)
endif
ONE_MARCH := $(MARCH)
MARCH ?= native
SANITIZE ?= 0
MAKEFLAGS += -j$(or $(shell getconf _NPROCESSORS_ONLN 2>/dev/null),1)

# PLAIN=1: what the root defines, computed as it says there; nothing of kernels/ is read.
PLAIN ?= 0
PLAINLY := $(filter 1,$(PLAIN))

B := build/$(notdir $(CC))-$(MARCH)$(if $(filter 1,$(SANITIZE)),-sanitize)$(if $(PLAINLY),-plain)

# A line for each file that is compiled or linked; V=1: the commands. Nothing under make -s.
say = $(if $(filter 1,$(V))$(findstring s,$(firstword -$(MAKEFLAGS))),,@printf '%-5s%s\n' '$1' '$2';)

comma := ,
hash := \#
space := $(subst ,, )

# nvcc 12 or later makes the programs compute on NVIDIA GPUs too. CUDA_ARCH: the compute capabilities to compile for, e.g.
# "80 90a 100"; the intermediate code of the last without an a, too, which the driver compiles for any later GPU when first run
# (a minute). 90a has what 9.0 alone can (kernels/attention_90a.cu). Each takes nvcc a while. Unless it is given: those of this
# machine's GPUs that nvcc knows; without a GPU 80 and 90a. Under the sanitizers of the host there is only the emulation.
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
ifneq ($(filter 1,$(SANITIZE))$(PLAINLY),)
override NVCC :=
endif
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv$(comma)noheader 2>/dev/null | tr -dc '0-9\n' | awk '$$1 >= 80' | sort -nu)
ifeq ($(origin CUDA_ARCH),undefined)
CUDA_ARCH := $(if $(NVCC),$(patsubst 90,90a,$(or $(patsubst sm_%,%,$(filter $(GPUS:%=sm_%),$(shell $(NVCC) --list-gpu-code 2>/dev/null))),80 90)))
endif
HAVE_NCCL = $(if $(NVCC),$(call compiles,$(hash)include <nccl.h>\nint main(void) { return 0; },-I$(dir $(NVCC))../include))

# ---- what this machine has: each feature is verified by compiling something ----
compiles = $(shell printf '%b\n' '$(1)' | $(CC) -x c - $(2) -o /dev/null 2>/dev/null && echo yes)
HAVE_SIMD := $(call compiles,int main(void) { return 0; },-fopenmp-simd)
HAVE_MARCH := $(call compiles,int main(void) { return 0; },-march=$(MARCH))
# STATIC=1: between $(ARCHIVES) and $(SHARED) libraries are linked in
STATIC ?= 0
ARCHIVES := $(if $(filter 1,$(STATIC)),-Wl$(comma)-Bstatic)
SHARED := $(if $(filter 1,$(STATIC)),-Wl$(comma)-Bdynamic)
# A library is where pkg-config says, and where there is none or it does not know, where the compiler looks by itself.
PKG_CONFIG ?= pkg-config
libs_of = $(or $(filter -L% -l%,$(shell $(PKG_CONFIG) --libs $(1) 2>/dev/null)),$(2))
PNG_LIBS := $(call libs_of,libpng,-lpng)
JPEG_LIBS := $(call libs_of,libjpeg,-ljpeg)
ZLIB_LIBS := $(call libs_of,zlib,-lz)
WEBP_LIBS := $(call libs_of,libwebp,-lwebp)
LMDB_LIBS := $(call libs_of,lmdb,-llmdb)
MICROHTTPD_LIBS := $(call libs_of,libmicrohttpd,-lmicrohttpd)
CJSON_LIBS := $(call libs_of,libcjson,-lcjson)
HEADERS := $(foreach d,$(sort $(patsubst -I%,%,$(filter -I%,$(foreach l,libpng libjpeg zlib libwebp lmdb libmicrohttpd libcjson,$(shell $(PKG_CONFIG) --cflags $l 2>/dev/null))))),-isystem $d)
HAVE_PNG := $(call compiles,$(hash)include <png.h>\nint main(void) { return !png_get_libpng_ver(0); },$(HEADERS) $(ARCHIVES) $(PNG_LIBS) $(ZLIB_LIBS) $(SHARED) -lm)
HAVE_JPEG := $(call compiles,$(hash)include <stdio.h>\n$(hash)include <jpeglib.h>\nint main(void) { return !jpeg_std_error(0); },$(HEADERS) $(ARCHIVES) $(JPEG_LIBS) $(SHARED))
HAVE_WEBP := $(call compiles,$(hash)include <webp/decode.h>\nint main(void) { return !WebPGetDecoderVersion(); },$(HEADERS) $(ARCHIVES) $(WEBP_LIBS) $(SHARED) -lm -lpthread)
HAVE_LMDB := $(call compiles,$(hash)include <lmdb.h>\nint main(void) { return !mdb_version(0$(comma) 0$(comma) 0); },$(HEADERS) $(ARCHIVES) $(LMDB_LIBS) $(SHARED) -lpthread)
# MPI, for ./train alone: what its compiler wrapper would say
MPI := $(shell mpicc -show 2>/dev/null)
MPI_CFLAGS := $(patsubst -I%,-isystem %,$(filter -I%,$(MPI)))
MPI_LIBS := $(filter -L% -l% -Wl$(comma)%,$(MPI))
HAVE_MPI := $(call compiles,$(hash)include <mpi.h>\nint main(void) { return MPI_Finalize(); },$(MPI_CFLAGS) $(MPI_LIBS))
# HTTP and JSON, for ./serve alone
HAVE_MICROHTTPD := $(call compiles,$(hash)include <microhttpd.h>\nint main(void) { return !MHD_get_version(); },$(HEADERS) $(MICROHTTPD_LIBS))
HAVE_CJSON := $(call compiles,$(hash)include <cjson/cJSON.h>\nint main(void) { return !cJSON_Version(); },$(HEADERS) $(CJSON_LIBS))
HAVE_SERVE := $(and $(HAVE_MICROHTTPD),$(HAVE_CJSON))
LEFT_OUT := $(if $(filter 1,$(STATIC)),-static)$(if $(HAVE_WEBP),,-nowebp)$(if $(HAVE_LMDB),,-nolmdb)$(if $(HAVE_MPI),,-nompi)
B := $B$(LEFT_OUT)

# Made elsewhere: nothing is looked for, nothing is compiled.
BUILT ?=
ifneq ($(BUILT),)
ifeq ($(wildcard $(BUILT)),)
$(error BUILT=$(BUILT): it is not there)
endif
B := $(patsubst %/,%,$(BUILT))
endif

# What is asked for and cannot be is refused before anything is compiled.
asked = $(filter $1,$(MAKECMDGOALS))
others = $(if $(filter-out $2,$1),$(error no such $3: $(filter-out $2,$1); expected some of: $2))
PTX_ORDERS := plain reverse random eager early clocks
ifneq ($(call asked,planted),)
$(if $(FAULTS),$(foreach no,$(shell test/planted.sh --unknown $(FAULTS)),$(error no such fault: $(no); test/planted.txt lists them)))
endif
ifneq ($(call asked,on-gpu),)
$(call others,$(STEPS),test memcheck racecheck synccheck initcheck bench,step)
endif
ifneq ($(call asked,planted test-cuda-ptx),)
ifneq ($(PTXSIM),)
$(if $(NVCC),,$(error PTXSIM=$(PTXSIM) needs nvcc: NVCC=... names it))
$(if $(wildcard $(PTXSIM)/build.sh),,$(error PTXSIM=$(PTXSIM): there is no build.sh; an interpreter of nvcc's PTX has one))
endif
$(call others,$(CUDA_PTX_ORDERS),$(PTX_ORDERS),order)
endif

# One program for any x86-64 (start.c) where the compiler makes that kind of objects and the linker can join them.
whole = ld -r -o $(1).tmp $(2) && objcopy --redefine-sym $(or $(4),main)=$(3) --keep-global-symbol=$(3) $(1).tmp $(1) && rm $(1).tmp
ifneq ($(filter 1,$(SANITIZE)),)
WHY_ONE := sanitizers
else ifneq ($(PLAINLY),)
WHY_ONE := PLAIN=1
else ifeq ($(ONE_MARCH),)
ifeq ($(findstring x86_64,$(shell $(CC) -dumpmachine 2>/dev/null)),)
WHY_ONE := one program for several kinds of processors is made on x86-64 only
else ifneq ($(shell mkdir -p build && echo 'int main(void) { return 0; }' | $(CC) -x c - -c -o build/try.o && \
    $(call whole,build/whole.o,build/try.o,main_x) && nm build/whole.o | grep -q ' T main_x' && echo yes),yes)
WHY_ONE := ld -r or objcopy is missing or different (Debian: apt-get install binutils)
else
P := build/$(notdir $(CC))-any$(LEFT_OUT)
endif
endif
FLAGS_x86-64 := -march=x86-64
FLAGS_x86-64-v3 := -march=x86-64-v3
FLAGS_x86-64-v4 := -march=x86-64-v4
FLAGS_x86-64-v4-bf16 := -march=x86-64-v4 -mavx512bf16 -mavx512vnni -mavx512vbmi
FLAGS_x86-64-v4-amx := $(FLAGS_x86-64-v4-bf16) -mamx-tile -mamx-bf16 -mamx-int8
# The folder of ./sample, ./train, ./inpaint, ./serve. With CUDA they are for this processor; the others are tested all the same.
SHIPPED := $(if $(NVCC),$B,$(or $P,$B))
LEVELS := $(if $P,$(foreach l,x86-64 x86-64-v3 x86-64-v4 x86-64-v4-bf16 x86-64-v4-amx,$(if $(call compiles,int main(void) { return 0; },$(FLAGS_$l)),$l)))

OFFICIAL := ffhq ffhq2 churches bedrooms cats imagenet imagenet4

ifneq ($(if $(BUILT),,$(filter-out help clean format uninstall $(OFFICIAL) vqgan lsun lpips,$(or $(MAKECMDGOALS),all))),)
ifneq ($(if $(NVCC),$(shell at=$$(command -v $(NVCC)) && [ -f "$$at" ] && [ -x "$$at" ] && echo there),there),there)
$(error NVCC=$(NVCC): no such program; NVCC= leaves CUDA out)
endif
$(info compiler  $(CC)$(if $(filter 1,$(SANITIZE)), with sanitizers))
ifeq ($(HAVE_PNG),)
$(error libpng is missing. Debian: apt-get install libpng-dev; README.md names it for other systems)
endif
ifeq ($(HAVE_JPEG),)
$(error libjpeg is missing. Debian: apt-get install libjpeg-dev; README.md names it for other systems)
endif
ifeq ($(HAVE_MARCH),)
$(if $(ONE_MARCH),$(error $(CC) does not know -march=$(ONE_MARCH)),$(info processor $(CC) does not know -march=native: its default instructions))
endif
$(info processor $(if $(filter $P,$(SHIPPED)),any x86-64; of $(LEVELS) the best that it has; tests: this one,this one only$(if $(ONE_MARCH),: MARCH=$(MARCH),: $(if $(NVCC),NVCC= makes a program for any x86-64,$(WHY_ONE)))))
$(info images    PNG, JPEG)
$(info WebP      $(if $(HAVE_WEBP),yes,left out; libwebp brings it (Debian: apt-get install libwebp-dev)))
$(info LMDB      $(if $(HAVE_LMDB),yes,left out; liblmdb brings it (Debian: apt-get install liblmdb-dev)))
$(info HTTP      $(if $(HAVE_SERVE),yes: ./serve,./serve is left out; libmicrohttpd and libcjson bring it (Debian: apt-get install$(if $(HAVE_MICROHTTPD),, libmicrohttpd-dev)$(if $(HAVE_CJSON),, libcjson-dev))))
$(info MPI       $(if $(HAVE_MPI),yes: mpirun ./train,left out; libopenmpi brings it (Debian: apt-get install libopenmpi-dev openmpi-bin)))
ifneq ($(PLAINLY),)
$(info device    CPU, by plain loops alone: PLAIN=1)
else ifeq ($(NVCC),)
$(info device    CPU ($(if $(filter 1,$(SANITIZE)),sanitizers leave CUDA out,$(if $(filter file,$(origin NVCC)),no nvcc was found$(comma) NVCC=... names it,CUDA is left out by NVCC=)); the CUDA kernels run on the CPU in make test))
else
$(info device    CPU and CUDA ($(NVCC), for sm_$(subst $(space),$(comma) sm_,$(CUDA_ARCH)) and later; NVCC= leaves it out))
$(info NCCL      $(if $(HAVE_NCCL),yes: one GPU for each process,left out; libnccl-dev (NVIDIA) brings it))
endif
endif

# -ffp-contract=fast: a*b+c may become one fused multiply-add, which every kernel here is built on. -fno-math-errno and
# -fno-trapping-math only promise that nobody reads errno or floating-point traps, so that sqrt and selects vectorise.
# No -ffast-math: sums keep their order, NaN stays NaN, except in loops marked "omp simd", whose sums run in lanes
# (-fopenmp-simd: that mark alone, nothing of OpenMP's library).
WARN := -Wall -Wextra -Wshadow -Wno-missing-field-initializers -Werror
ifneq ($(findstring clang,$(shell $(CC) --version 2>/dev/null)),)
WARN += -Wno-pass-failed # "this loop was not vectorised" is a remark about speed, not about the code
endif
OPT := $(if $(filter 1,$(SANITIZE)),-O2 -fsanitize=address$(comma)undefined -fno-sanitize-recover=all -fno-omit-frame-pointer,-O3)
CFLAGS_ANY := -std=c11 -D_GNU_SOURCE -I. $(HEADERS) -g $(OPT) -ffp-contract=fast -fno-math-errno -fno-trapping-math $(WARN) \
              $(if $(HAVE_SIMD),-fopenmp-simd,-Wno-unknown-pragmas) \
              $(if $(HAVE_WEBP),-DHAVE_WEBP) $(if $(HAVE_LMDB),-DHAVE_LMDB) $(if $(PLAINLY),-DPLAIN)
CFLAGS := $(CFLAGS_ANY) $(if $(HAVE_MARCH),-march=$(MARCH))
SHARING := -fPIC -fvisibility=hidden # what may lie in the library
LDLIBS := $(ARCHIVES) $(if $(HAVE_WEBP),$(WEBP_LIBS)) $(if $(HAVE_LMDB),$(LMDB_LIBS)) $(PNG_LIBS) $(JPEG_LIBS) $(ZLIB_LIBS) $(SHARED) -lm -lpthread

# The house from the ground up (test/house.sh checks the order). FILES: their speed is that of files, so that they are
# compiled for the first level only.
BASE := base tiles threads caches params plan compute options own_path version
KERNELS := $(if $(PLAINLY),,fast gemm bf16 stream conv conv_bf16 norm layers attention guess optimizer discriminator perceptual)
FILES := folder layout damage config atomic tensor checkpoint pickle zip ckpt weights names pixels orientation prep resize rows png png_text apng profile jpeg webp images mask lmdb tokens places keys values recipe betas net_config vqgan_config letters classes npy remap
SAMPLING := model bounds draw edit paste options output sheet score region terminal
COMPONENTS := $(BASE:%=base/%) $(KERNELS:%=kernels/%) $(FILES:%=files/%) data vqgan transformer diffusion \
              $(SAMPLING:%=sampling/%) training/discriminator training/perceptual training/restart training/image_loss training/rate training/spike
PROGRAMS := sample train inpaint $(if $(HAVE_SERVE),serve)
LIBRARY_OWN := base/own_path base/options files/places # which know whether they are in a library
COLD := base/params base/options base/own_path base/version $(FILES:%=files/%) data sampling/model sampling/options sampling/terminal
ONCE := base/tiles # which level.o, too, has asked for: no copy for each level
TESTS := base $(if $(PLAINLY),,gemm conv) checkpoint ckpt npy images profile data vqgan discriminator perceptual transformer classes keys schedule diffusion model library fuzz $(if $(PLAINLY),,layers)
TESTS_DOUBLE := $(if $(PLAINLY),,gemm conv) vqgan discriminator perceptual transformer layers

TESTS_TILES := $(if $(PLAINLY),,gemm conv)

OBJ := $(COMPONENTS:%=$B/%.o)
DEVICE_OBJ := $(if $(NVCC),$B/device_f32.o $B/device_bf16.o)
CUDA_LIBS := $(if $(NVCC),-L$(dir $(NVCC))../lib64 -lcudart_static -ldl -lrt $(ARCHIVES) -lstdc++ $(SHARED))
NVCC_FLAGS := -x cu -std=c++17 -I. -O3 -lineinfo $(foreach a,$(CUDA_ARCH),-gencode arch=compute_$a$(comma)code=sm_$a) \
              $(foreach a,$(lastword $(or $(filter-out %a,$(CUDA_ARCH)),$(CUDA_ARCH))),-gencode arch=compute_$a$(comma)code=compute_$a) \
              $(if $(HAVE_NCCL),-DHAVE_NCCL) -Xcompiler -Wall$(comma)-Wextra$(comma)-Wno-missing-field-initializers$(comma)-Werror -Werror all-warnings
OBJ_DOUBLE := $(COMPONENTS:%=$B/double/%.o)
TEST_BIN := $(TESTS:%=$B/test_%) $(TESTS_DOUBLE:%=$B/test_%_double) $(TESTS_TILES:%=$B/test_%_tiles)

all: $(PROGRAMS)

# ./sample, ./train, ./inpaint, ./serve, test/golden and test/bench are copies of the last configuration built.
$(PROGRAMS): %: $(SHIPPED)/%
	@cp -f $< $@
test/golden test/bench test/walkthrough: test/%: $B/%
	@cp -f $< $@
.PHONY: all help test bench fullsize fuzz clean format walkthrough FORCE $(OFFICIAL) vqgan lsun lpips
ifneq ($(or $(BUILT),$(shell cat build/last 2>/dev/null)),$(or $(BUILT),$(SHIPPED)))
$(PROGRAMS) test/golden test/bench test/walkthrough: FORCE
$(shell mkdir -p build && echo $(SHIPPED) >build/last)
endif

# the files of ./train beside train.c and the components
TRAIN := $(addprefix training/,folder memory state bad_batches edited official settings log view report encoded gan \
         codes schedule ahead first_stage second_stage parallel)
# the files of ./sample alone
DRAWING := $(addprefix sampling/,nearest list settings)
$B/training/parallel.o: CFLAGS += $(if $(HAVE_MPI),-DHAVE_MPI $(MPI_CFLAGS))
$B/train $(if $P,$P/train): LDLIBS += $(if $(HAVE_MPI),$(MPI_LIBS))
$B/train: $(TRAIN:%=$B/%.o)
$B/sample: $(DRAWING:%=$B/%.o)
# ./train as it is where there is no MPI: for test_mpi.sh
# the files of ./serve
SERVING := $(addprefix serving/,bytes reply gate http signals page json forms models job events chain ticket work) sampling/library
SERVE_LIBS := $(MICROHTTPD_LIBS) $(CJSON_LIBS)
$B/serve: $(SERVING:%=$B/%.o)
$B/serve $(if $P,$P/serve): LDLIBS += $(SERVE_LIBS)
$B/serving/page.o $(if $P,$P/x86-64/serving/page.o): $(addprefix web/,index.html page.css page.js)
$B/serve_client: LDLIBS += $(SERVE_LIBS)
$B/serve_client $B/load: $B/%: $B/test/%.o $(OBJ)
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$B/train-alone: $B/train.o $(patsubst %,$B/%.o,$(filter-out training/parallel,$(TRAIN))) $B/alone/training/parallel.o $(OBJ)
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$B/alone/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS) -MMD -MP -c -o $@ $<
$(PROGRAMS:%=$B/%): $B/%: $B/%.o $(OBJ) $(DEVICE_OBJ) $B/commit.o
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS) $(CUDA_LIBS)
$B/golden: $B/test/golden.o $(OBJ) $(DEVICE_OBJ)
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS) $(CUDA_LIBS)
$B/bench: $B/test/bench.o $B/test/peaks.o $(OBJ)
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$B/pictures $B/logits $B/lpips $B/codes $B/fullsize $B/walkthrough $B/sizes: $B/%: $B/test/%.o $(OBJ)
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$(filter-out %/test_layers,$(TESTS:%=$B/test_%)): $B/test_%: $B/test/test_%.o $(OBJ)
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$(filter-out %/test_layers_double,$(TESTS_DOUBLE:%=$B/test_%_double)): $B/test_%_double: $B/double/test/test_%.o $(OBJ_DOUBLE)
	$(call say,LINK,$@)$(CC) $(CFLAGS) -DREAL_DOUBLE -o $@ $^ $(LDLIBS)
$B/test_fuzz: $B/test/fuzz.o $B/test/fuzz_files.o $B/test/fuzz_sets.o $B/test/fuzz_serving.o $B/test/fuzz_requests.o $(TRAIN:%=$B/%.o) \
              $(if $(HAVE_SERVE),$(SERVING:%=$B/%.o))
$B/test_fuzz: LDLIBS += $(if $(HAVE_MPI),$(MPI_LIBS)) $(if $(HAVE_SERVE),$(SERVE_LIBS))
$B/test_library: $B/sampling/library.o
$B/test/fuzz_serving.o $B/test/fuzz_requests.o: CFLAGS += $(if $(HAVE_SERVE),-DHAVE_SERVE)
# Tests upon the tiles of AMX in plain C, test/tiles_in_c.h, which every machine has
TILED := base/tiles kernels/bf16 kernels/stream kernels/conv_bf16
$B/tiles/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS) -DTILES_IN_C -MMD -MP -c -o $@ $<
$(TESTS_TILES:%=$B/test_%_tiles): $B/test_%_tiles: $B/tiles/test/test_%.o $B/tiles/test/tiles_in_c.o $(TILED:%=$B/tiles/%.o) \
    $(filter-out $(TILED:%=$B/%.o),$(OBJ))
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$B/test_gemm_tiles: $B/base/level.o
# The tiles' product stands for a processor: for this one, without sanitizers, whatever is tested
$B/tiles/test/tiles_in_c.o: CFLAGS := $(filter-out -march=% -fsanitize=% -fno-sanitize%,$(CFLAGS_ANY)) -O3 $(if $(HAVE_MARCH),-march=native)
# test_layers includes transformer.cu, whose layers are its own; it must be compiled quickly.
$B/test_layers: $B/test/test_layers.o $(filter-out %/transformer.o,$(OBJ))
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)
$B/test_layers_double: $B/double/test/test_layers.o $(filter-out %/transformer.o,$(OBJ_DOUBLE))
	$(call say,LINK,$@)$(CC) $(CFLAGS) -DREAL_DOUBLE -o $@ $^ $(LDLIBS)
$B/test/test_layers.o $B/double/test/test_layers.o: CFLAGS += -O1

$B/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS) -MMD -MP -c -o $@ $<
$B/transformer.o: transformer.cu Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS) -MMD -MP -x c -c -o $@ $<
$B/double/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS) -DREAL_DOUBLE -MMD -MP -c -o $@ $<
$B/double/transformer.o: transformer.cu Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS) -DREAL_DOUBLE -MMD -MP -x c -c -o $@ $<

# The commit, for --version of the programs
build/commit.c: FORCE
	@mkdir -p $(@D); commit=$$([ -e .git ] && git describe --always --dirty --abbrev=12 --match= 2>/dev/null || echo unknown); \
	text="extern const char version_commit[]; const char version_commit[] = \"$$commit\";"; \
	[ "$$(cat $@ 2>/dev/null)" = "$$text" ] || echo "$$text" >$@
$B/commit.o $(if $P,$P/commit.o): build/commit.c
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS_ANY) -c -o $@ $<

# The program of an installation, which calls the others
$B/imagebart: $B/dev/command.o $B/base/own_path.o $B/base/base.o
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ -lm
ifneq ($P,)
$P/imagebart: $P/x86-64/dev/command.o $P/x86-64/base/own_path.o $P/x86-64/base/base.o
	$(call say,LINK,$@)$(CC) $(CFLAGS_ANY) -o $@ $^ -lm
endif

# ---- the programs for any x86-64: each is start.o and, for every level, a whole program linked into one object ----
define level
$P/$1/%.o: %.c Makefile
	@mkdir -p $$(@D)
	$$(call say,CC,$$<)$$(CC) $$(CFLAGS_ANY) $$(SHARING) $$(FLAGS_$1) -MMD -MP -c -o $$@ $$<
$P/$1/transformer.o: transformer.cu Makefile
	@mkdir -p $$(@D)
	$$(call say,CC,$$<)$$(CC) $$(CFLAGS_ANY) $$(SHARING) $$(FLAGS_$1) -MMD -MP -x c -c -o $$@ $$<
$P/$1/whole-train.o: $(TRAIN:%=$P/x86-64/%.o)
$P/$1/whole-sample.o: $(DRAWING:%=$P/x86-64/%.o)
$P/$1/whole-serve.o: $(SERVING:%=$P/x86-64/%.o)
$(PROGRAMS:%=$P/$1/whole-%.o): $P/$1/whole-%.o: $P/x86-64/%.o $(patsubst %,$P/x86-64/%.o,$(COLD)) \
    $(patsubst %,$P/$1/%.o,$(filter-out $(COLD) $(ONCE),$(COMPONENTS)))
	$$(call say,LINK,$$@)$$(call whole,$$@,$$^,main_$(subst -,_,$1))
$(PROGRAMS:%=$P/%): $P/%: $P/$1/whole-%.o
$P/$1/whole-library.o: $(patsubst %,$P/library/%.o,sampling/library $(LIBRARY_OWN)) \
    $(patsubst %,$P/x86-64/%.o,$(filter-out $(LIBRARY_OWN),$(COLD))) $(patsubst %,$P/$1/%.o,$(filter-out $(COLD) $(ONCE),$(COMPONENTS)))
	$$(call say,LINK,$$@)$$(call whole,$$@,$$^,library_$(subst -,_,$1),library_calls)
endef
ifneq ($P,)
$P/x86-64/training/parallel.o: CFLAGS_ANY += $(if $(HAVE_MPI),-DHAVE_MPI $(MPI_CFLAGS))
$(foreach l,$(LEVELS),$(eval $(call level,$l)))
$(PROGRAMS:%=$P/%): $P/x86-64/base/start.o $P/x86-64/base/level.o $P/x86-64/base/tiles.o $P/commit.o
	$(call say,LINK,$@)$(CC) $(CFLAGS_ANY) -o $@ $^ $(LDLIBS)
endif

# ---- CUDA: transformer.cu includes every kernel, and is compiled once with floatX = float, once with bf16 ----
# Emulated: by a C++ compiler, with test/cuda_on_cpu.h in the place of CUDA's headers.
CXX := $(if $(findstring clang,$(notdir $(CC))),$(subst clang,clang++,$(CC)),$(subst gcc,g++,$(CC)))
PRECISIONS := f32 bf16
CUDA_TESTS := $(foreach t,cuda vqgan_cuda gan_cuda,$(PRECISIONS:%=test_$(t)_%))
EMULATED_TESTS := $(CUDA_TESTS:%=$B/emulated/%)
EMULATED_FLAGS := -x c++ -std=c++17 -I. -D_GNU_SOURCE -DCUDA_ON_CPU -g -ffp-contract=off $(WARN) -Wno-unknown-pragmas
floatX = $(if $(filter %bf16 %bf16.o,$@),-DFLOATX_BF16)

# the tests and programs of $1, a folder, whose CUDA code $2 compiles by $3; linked with $4
define cuda_folder
$(PRECISIONS:%=$1/device_%.o): transformer.cu Makefile
$(PRECISIONS:%=$1/test_cuda_%.o): test/test_cuda.cu Makefile
$(PRECISIONS:%=$1/test_vqgan_cuda_%.o): test/test_vqgan_cuda.cu Makefile
$(PRECISIONS:%=$1/test_gan_cuda_%.o): test/test_gan_cuda.cu Makefile
$(PRECISIONS:%=$1/device_%.o) $(CUDA_TESTS:%=$1/%.o):
	@mkdir -p $$(@D)
	$$(call say,$2,$$<)$3 $$(floatX) -MMD -MP -MF $$(@:.o=.d) -c -o $$@ $$<
$(CUDA_TESTS:%=$1/%): $1/%: $1/%.o $(OBJ)
	$$(call say,LINK,$$@)$$(CXX) $(OPT) -o $$@ $$^ $$(LDLIBS) $4
$(patsubst %,$1/%,$(filter-out serve,$(PROGRAMS))): $1/%: $B/%.o $(OBJ) $(PRECISIONS:%=$1/device_%.o)
	$$(call say,LINK,$$@)$$(CXX) $(OPT) -o $$@ $$^ $$(LDLIBS) $4
$1/golden $1/bench_cuda: $1/%: $B/test/%.o $(OBJ) $(PRECISIONS:%=$1/device_%.o)
	$$(call say,LINK,$$@)$$(CXX) $(OPT) -o $$@ $$^ $$(LDLIBS) $4
$1/test_layers: $B/test/test_layers.o $(filter-out %/transformer.o,$(OBJ)) $(PRECISIONS:%=$1/device_%.o)
	$$(call say,LINK,$$@)$$(CXX) $(OPT) -o $$@ $$^ $$(LDLIBS) $4
$1/sample: $(DRAWING:%=$B/%.o)
$1/train: $(TRAIN:%=$B/%.o)
$1/train: LDLIBS += $(if $(HAVE_MPI),$(MPI_LIBS))
endef
EMULATION_OPT ?= $(if $(filter 1,$(SANITIZE)),$(OPT),-O2)
$(eval $(call cuda_folder,$B/emulated,CXX,$$(CXX) $$(EMULATED_FLAGS) $(EMULATION_OPT)))
$(eval $(call cuda_folder,$B/emulated-debug,CXX,$$(CXX) $$(EMULATED_FLAGS) -O0 $(if $(filter 1,$(SANITIZE)),$(OPT))))
EMULATED_TESTS += $B/emulated/test_layers
EMULATED_BIN := $(EMULATED_TESTS) $(patsubst %,$B/emulated/%,$(filter-out serve,$(PROGRAMS))) $B/emulated/golden $B/emulated/bench_cuda

# The same for a debugger, which steps through kernels: $B/emulated-debug/test_cuda_f32, ./sample ...
.PHONY: emulated-debug check
emulated-debug: $(EMULATED_BIN:$B/emulated/%=$B/emulated-debug/%)

# One layer, plain, fast and as a CUDA kernel: what a changed sign breaks, in seconds
LAYER ?=
check: $B/test_layers_double $(if $(PLAINLY),,$B/test_layers $B/emulated-debug/test_layers)
ifeq ($(LAYER),)
	@echo "make check LAYER=..., one of:"; $B/test_layers_double --list
else
	@$B/test_layers_double --has $(LAYER)
	@for t in $^; do $$t $(LAYER) >$$t.log || failed=yes; sed "s|^|$${t#$B/} |" $$t.log; done; [ -z "$$failed" ]
endif

.PHONY: test-cuda test-cuda-emulated bench-cuda
test-cuda-emulated: $(EMULATED_BIN) $(PROGRAMS:%=$B/%) $B/pictures $B/lpips
	@test/run.sh --cuda $B $B/emulated $(EMULATED_TESTS)

# On a GPU, by nvcc. SANITIZER=memcheck (or racecheck, synccheck, initcheck) runs the layers under compute-sanitizer.
SANITIZER ?=
NVCC_TESTS := $(CUDA_TESTS:%=$B/%)
$(PRECISIONS:%=$B/device_%.o): transformer.cu Makefile
	@mkdir -p $(@D)
	$(call say,NVCC,$<)$(NVCC) $(NVCC_FLAGS) $(floatX) -MMD -MP -MF $(@:.o=.d) -c -o $@ $<
$(PRECISIONS:%=$B/test/test_cuda_%.o): test/test_cuda.cu Makefile
$(PRECISIONS:%=$B/test/test_vqgan_cuda_%.o): test/test_vqgan_cuda.cu Makefile
$(PRECISIONS:%=$B/test/test_gan_cuda_%.o): test/test_gan_cuda.cu Makefile
$(NVCC_TESTS:$B/%=$B/test/%.o):
	@mkdir -p $(@D)
	$(call say,NVCC,$<)$(NVCC) $(NVCC_FLAGS) $(floatX) -MMD -MP -MF $(@:.o=.d) -c -o $@ $<
$(NVCC_TESTS): $B/%: $B/test/%.o $(OBJ)
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS) $(CUDA_LIBS)
NVCC_BIN := $(NVCC_TESTS) $B/golden $B/bench_cuda $(PROGRAMS:%=$B/%) $B/pictures $B/lpips
.PHONY: cuda-programs
cuda-programs: $(if $(NVCC),$(NVCC_BIN)) # for BUILT=
# The same stripped and packed, for on-gpu there: at most 64 MiB
CARRIED_MOST := 67108864
.PHONY: carry on-gpu
carry: $(if $(NVCC),$(NVCC_BIN))
ifeq ($(NVCC),)
	@echo "make carry needs nvcc (NVCC=... names it)"; exit 1
else
	@rm -rf build/carried && mkdir -p build/carried && for p in $(NVCC_BIN); do strip -s -o build/carried/$${p##*/} $$p || exit 1; done
	@tar -C build -cf - carried | xz -9 >build/carried.tar.xz
	@bytes=$$(wc -c <build/carried.tar.xz); echo "build/carried.tar.xz: $$bytes bytes"; \
	[ $$bytes -le $(CARRIED_MOST) ] || { echo "expected $(CARRIED_MOST) or less: CUDA_ARCH with one GPU's capability"; exit 1; }
endif
on-gpu:
	+@test/on_gpu.sh $(BUILT)
test-cuda: $(if $(BUILT),,$(if $(NVCC),$(NVCC_BIN)))
ifeq ($(NVCC)$(BUILT),)
	@echo "make test-cuda needs nvcc (NVCC=... names it), or BUILT=DIR, which was built elsewhere"; exit 1
else ifneq ($(SANITIZER),)
	@failed=; for t in $(NVCC_TESTS); do compute-sanitizer --tool $(SANITIZER) --error-exitcode 1 $$t || failed="$$failed $$t"; done; \
	[ -z "$$failed" ] || { echo "compute-sanitizer --tool $(SANITIZER) is not content with$$failed"; exit 1; }
else
	@test/run.sh --cuda $B $B $(NVCC_TESTS)
endif

# nvcc's PTX on the CPU: PTXSIM=DIR is an interpreter, whose build.sh makes a library that stands in for CUDA's runtime.
PTXSIM ?=
CUDA_PTX_ARCH ?= $(if $(filter 1,$(WHOLE)),80 90 90a,80)
CUDA_PTX_ORDERS ?= $(if $(filter 1,$(WHOLE)),$(PTX_ORDERS),plain)
PTX_PARTS := sample_f32 sample_bf16 $(CUDA_TESTS:test_%=%) golden train_f32 train_bf16
CUDA_PTX_PARTS ?= $(PTX_PARTS)
$(if $(call asked,test-cuda-ptx),$(call others,$(CUDA_PTX_PARTS),$(PTX_PARTS),part))
.PHONY: test-cuda-ptx
ifeq ($(and $(NVCC),$(PTXSIM)),)
test-cuda-ptx:
	@echo "make test-cuda-ptx needs nvcc (NVCC=... names it) and PTXSIM=DIR, an interpreter of its PTX"; exit 1
else
$B/ptxsim/libptxsim.so: $(wildcard $(PTXSIM)/*.cpp $(PTXSIM)/*.h)
	@mkdir -p $(@D)
	$(call say,PTX,$(PTXSIM))CUDA_HOME=$(dir $(NVCC)).. $(PTXSIM)/build.sh $(@D) >/dev/null
$B/ptxsim/more.o: test/ptxsim_more.c
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) -I$(dir $(NVCC))../include -c -o $@ $<
PTX_FLAGS := -x cu -std=c++17 -I. -O3 -lineinfo --no-compress
PTX_LIBS := $B/ptxsim/more.o -L$B/ptxsim -lptxsim -Wl$(comma)-rpath$(comma)$(CURDIR)/$B/ptxsim -ldl
$(foreach a,$(CUDA_PTX_ARCH),$(eval $(call cuda_folder,$B/ptx-$a,NVCC,$$(NVCC) $$(PTX_FLAGS) -gencode arch=compute_$a$$(comma)code=compute_$a,$$(PTX_LIBS))))
PTX_BIN := $(foreach a,$(CUDA_PTX_ARCH),$(patsubst %,$B/ptx-$a/%,$(CUDA_TESTS) golden sample train))
$(PTX_BIN): | $B/ptxsim/libptxsim.so $B/ptxsim/more.o
test-cuda-ptx: $(PTX_BIN) $B/pictures
	@test/ptx.sh $B "$(CUDA_PTX_ARCH)" "$(CUDA_PTX_ORDERS)" "$(CUDA_PTX_PARTS)"
planted: $B/ptxsim/libptxsim.so $B/ptxsim/more.o
endif

# Faults of test/planted.txt, or those that FAULTS names; without PTXSIM those that the emulation finds
.PHONY: planted
planted: $(OBJ)
	@OBJECTS="$(OBJ)" LIBRARIES="$(LDLIBS)" EMULATION="$(CXX) $(EMULATED_FLAGS) -O1 -g0 -w" \
	    $(if $(PTX_FLAGS),PTX="$(NVCC) $(PTX_FLAGS) -gencode arch=compute_90a$(comma)code=compute_90a" PTX_LIBRARIES="$(PTX_LIBS)") \
	    test/planted.sh $B $(FAULTS)

# At full FFHQ size on a GPU, beside PyTorch where PYTHON has it.
$B/bench_cuda: $B/test/bench_cuda.o $(OBJ) $(DEVICE_OBJ)
	$(call say,LINK,$@)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS) $(CUDA_LIBS)
bench-cuda: $(if $(BUILT),,$(if $(NVCC),$B/bench_cuda))
ifeq ($(NVCC)$(BUILT),)
	@echo "make bench-cuda needs nvcc (NVCC=... names it), or BUILT=DIR, which was built elsewhere"; exit 1
else
	@if $(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then \
	    $(PYTHON) test/bench_cuda_torch.py -o bench_cuda.tsv; $B/bench_cuda --beside bench_cuda.tsv; \
	else echo "skipped: comparison with PyTorch on the GPU, which $(PYTHON) does not have (PYTHON=... chooses another)"; \
	    $B/bench_cuda; fi
endif

ifneq ($(PLAINLY),)
test: $(TEST_BIN) $B/golden $B/pictures $B/lpips $B/codes $(PROGRAMS:%=$B/%)
	@test/run.sh --plain $B $(TEST_BIN)
else
test: $(TEST_BIN) $(EMULATED_BIN) $B/golden $B/imagebart $(if $(filter 1,$(SANITIZE)),,$B/libimagebart.so $B/libimagebart.a) $B/pictures $B/logits $B/lpips $B/codes $B/walkthrough $B/sizes $(PROGRAMS:%=$B/%) $B/train-alone $(if $(HAVE_SERVE),$B/serve_client $B/load) $(if $P,$(PROGRAMS:%=$P/%) $P/libimagebart.so $P/libimagebart.a)
	@test/run.sh $B "$P" $(TEST_BIN) $(EMULATED_TESTS)
endif

# Test programs and golden cases alone, without the programs' checks: for other compilers, instructions, sanitizers. What
# is compiled in double, for gradients, is no part of a program and the same loops: it is tested by make test.
# Every call for a file and every allocation of short runs fails once: test/test_faults.sh
.PHONY: faults
faults: $B/pictures $(PROGRAMS:%=$B/%)
	@test/test_faults.sh $B all

.PHONY: units threads objects list-objects list-libraries list-folder
units: $(TESTS:%=$B/test_%) $(TESTS_TILES:%=$B/test_%_tiles) $B/golden
	@test/run.sh --units $B $(TESTS_TILES:%=$B/test_%_tiles) $(TESTS:%=$B/test_%)

# What threads share, under the thread sanitizer
THREADS_TESTS := library vqgan transformer data base
THREADS_FLAGS := -std=c11 -D_GNU_SOURCE -I. $(HEADERS) -g -O1 -fsanitize=thread -Wno-unknown-pragmas -Wno-tsan -MMD -MP
build/threads/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(THREADS_FLAGS) -c -o $@ $<
build/threads/transformer.o: transformer.cu Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(THREADS_FLAGS) -x c -c -o $@ $<
$(THREADS_TESTS:%=build/threads/test_%): build/threads/%: build/threads/test/%.o $(COMPONENTS:%=build/threads/%.o)
	$(call say,LINK,$@)$(CC) $(THREADS_FLAGS) -o $@ $^ $(PNG_LIBS) $(JPEG_LIBS) $(ZLIB_LIBS) -lm -lpthread
build/threads/test_library: build/threads/sampling/library.o
build/threads/serving/page.o: $(addprefix web/,index.html page.css page.js)
build/threads/load: build/threads/test/load.o $(COMPONENTS:%=build/threads/%.o)
	$(call say,LINK,$@)$(CC) $(THREADS_FLAGS) -o $@ $^ $(PNG_LIBS) $(JPEG_LIBS) $(ZLIB_LIBS) -lm -lpthread
build/threads/serve: $(addprefix build/threads/,serve.o $(SERVING:%=%.o) $(COMPONENTS:%=%.o)) $B/commit.o
	$(call say,LINK,$@)$(CC) $(THREADS_FLAGS) -o $@ $^ $(PNG_LIBS) $(JPEG_LIBS) $(ZLIB_LIBS) -lm -lpthread $(SERVE_LIBS)
threads: $(THREADS_TESTS:%=build/threads/test_%)
	@TSAN_OPTIONS=allocator_may_return_null=1 test/run.sh --threads build/threads $^

# Fifty clients upon ./serve at once; load-threads: under the thread sanitizer. The address sanitizer keeps what was freed, 256 MB
# as a rule, which looks like a leak until they are full.
.PHONY: load load-threads
SECONDS ?= 120
load: $B/load $B/serve
	@ASAN_OPTIONS=quarantine_size_mb=16 $B/load $B/serve $(SECONDS)
load-threads: build/threads/load build/threads/serve
	@build/threads/load build/threads/serve $(SECONDS)

# For scripts in test/
objects: $(OBJ)
list-objects:
	@echo $(OBJ)
list-libraries:
	@echo $(LDLIBS)
list-folder:
	@echo $B

# The official model in PyTorch beside ours, where PYTHON has PyTorch.
PYTHON ?= python3
bench: test/bench $(if $(NVCC),$B/bench_cuda)
	test/bench -o bench.tsv
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) test/bench_torch.py bench.tsv; \
	else echo "skipped: comparison with PyTorch, which $(PYTHON) does not have (PYTHON=... chooses another)"; fi
ifneq ($(NVCC),)
	@if $B/bench_cuda gpu; then $(MAKE) bench-cuda; else echo "skipped: bench-cuda, for there is no GPU"; fi
else
	@echo "skipped: bench-cuda, for there is no nvcc"
endif
	@test/neon_row.sh -o bench.tsv $(filter-out -march=%,$(CFLAGS_ANY))

walkthrough: test/walkthrough

# Not part of `make test`: it writes 10 GiB at a time under build/fullsize and takes half an hour.
fullsize: $B/fullsize $B/sample
	@PYTHON=$(PYTHON) test/fullsize.sh $B build/fullsize $(MODELS)

# What reads files, under libFuzzer and the sanitizers: FUZZ_SECONDS for each target, FUZZ names some of them. A finding
# ends it; its input stays in build/fuzz/found. The plain loops compute, for none of them reads files.
FUZZ := zip pickle legacy safetensors npy pictures masks tokens recipes classes schedules $(if $(HAVE_LMDB),lmdb) lists trees logs states $(if $(HAVE_SERVE),jobs settings requests)
FUZZ_SECONDS ?= 600
FUZZ_CC ?= clang
FUZZ_SOURCES := $(filter-out kernels/% transformer,$(COMPONENTS)) $(TRAIN) test/fuzz test/fuzz_files test/fuzz_sets test/fuzz_serving test/fuzz_requests \
                $(if $(HAVE_SERVE),$(SERVING))
FUZZ_FLAGS := -std=c11 -D_GNU_SOURCE -DFUZZ -DPLAIN -I. $(HEADERS) -g -O1 -Wno-unknown-pragmas -MMD -MP -fno-sanitize-recover=all \
              -fsanitize=fuzzer$(comma)address$(comma)undefined $(if $(HAVE_WEBP),-DHAVE_WEBP) $(if $(HAVE_LMDB),-DHAVE_LMDB) \
              $(if $(HAVE_SERVE),-DHAVE_SERVE)
build/fuzz/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(FUZZ_CC) $(FUZZ_FLAGS) -c -o $@ $<
build/fuzz/transformer.o: transformer.cu Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(FUZZ_CC) $(FUZZ_FLAGS) -x c -c -o $@ $<
build/fuzz/fuzz: $(FUZZ_SOURCES:%=build/fuzz/%.o) build/fuzz/transformer.o
	$(call say,LINK,$@)$(FUZZ_CC) $(FUZZ_FLAGS) -o $@ $^ $(LDLIBS) $(if $(HAVE_SERVE),$(SERVE_LIBS))
fuzz: build/fuzz/fuzz
	@test/fuzz.sh build/fuzz $(FUZZ_SECONDS) $(FUZZ)

$(OFFICIAL):
	@models/fetch.sh $@ vqgan
vqgan lsun lpips:
	@models/fetch.sh $@

data/emoji:
	/usr/bin/python3 dev/emoji.py --out $@

# The library: sampling/libimagebart.h is all that others see of it. As the programs it is for any x86-64 or, with MARCH or
# CUDA, for one kind of processor.
$B/lib/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS) $(SHARING) -DLIBRARY -MMD -MP -c -o $@ $<
$B/lib/transformer.o: transformer.cu Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS) $(SHARING) -DLIBRARY -MMD -MP -x c -c -o $@ $<
$(PRECISIONS:%=$B/lib/device_%.o): transformer.cu Makefile
	@mkdir -p $(@D)
	$(call say,NVCC,$<)$(NVCC) $(NVCC_FLAGS) $(SHARING:%=-Xcompiler %) $(floatX) -MMD -MP -MF $(@:.o=.d) -c -o $@ $<
$B/libimagebart.so $B/libimagebart.a: $(COMPONENTS:%=$B/lib/%.o) $B/lib/sampling/library.o $(DEVICE_OBJ:$B/%=$B/lib/%)
ifneq ($P,)
$P/library/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC,$<)$(CC) $(CFLAGS_ANY) $(SHARING) $(FLAGS_x86-64) -DLIBRARY -DLIBRARY_LEVELS -MMD -MP -c -o $@ $<
$P/libimagebart.so $P/libimagebart.a: $P/library/sampling/levels.o $P/x86-64/base/level.o $P/x86-64/base/tiles.o $(LEVELS:%=$P/%/whole-library.o)
endif
MACOS := $(filter %darwin %macos,$(shell $(CC) -dumpmachine 2>/dev/null | tr -d 0-9.))
SO_FLAGS := -Wl,$(if $(MACOS),-install_name$(comma)@rpath/libimagebart.so.1,-soname$(comma)libimagebart.so.1$(comma)-z$(comma)nodelete$(comma)--exclude-libs$(comma)ALL)
%/libimagebart.so:
	$(call say,LINK,$@)$(CC) $(CFLAGS) -shared $(SO_FLAGS) -o $@ $^ $(LDLIBS) \
	    $(if $(filter $B/%,$@),$(CUDA_LIBS)) -ldl
	@ln -sf libimagebart.so $@.1 # what linked programs look for
%/libimagebart.a:
	$(call say,LINK,$@)ld -r -o $@.o $^ && objcopy -w --keep-global-symbol='imagebart_*' $@.o && rm -f $@ && $(AR) rc $@ $@.o && rm $@.o
.PHONY: lib
lib: $(SHIPPED)/libimagebart.so $(SHIPPED)/libimagebart.a
	@echo "$^"

# Under PREFIX, packed under DESTDIR; BUILT=DIR: what was built elsewhere. dev/install.sh says what goes where.
PREFIX ?= /usr/local
DESTDIR ?=
.PHONY: install uninstall
LIBRARY_NEEDS := $(filter -L% -l%,$(LDLIBS) $(CUDA_LIBS)) -ldl
export PREFIX DESTDIR LIBRARY_NEEDS
install: $(if $(BUILT),,$(PROGRAMS) $(SHIPPED)/imagebart)
	@dev/install.sh install $(if $(BUILT),$B,$(SHIPPED))
uninstall:
	@dev/install.sh uninstall

format:
	clang-format -i $(foreach d,. base kernels files sampling serving training dev test,$(wildcard $d/*.c $d/*.cu $d/*.h))

clean:
	rm -rf build $(PROGRAMS) serve test/golden test/bench test/walkthrough

# What can be made, as the top of this file says it
help:
	@awk '!/^#/ { exit } { sub(/^# ?/, ""); print }' $(firstword $(MAKEFILE_LIST))

FORCE:
-include $(shell find $B $(if $P,$P) build/threads build/fuzz -name '*.d' 2>/dev/null)
