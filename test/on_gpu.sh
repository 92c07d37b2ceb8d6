#!/bin/sh
# on_gpu.sh [BUILT]: all that a machine with a GPU is to be asked, in this order: make test-cuda, the same under memcheck and
# racecheck, make bench-cuda. BUILT: what make carry packed elsewhere, or a folder; without it this machine's nvcc compiles. Each
# step's output goes to build/on-gpu (or LOGS), its last lines are shown, and the next runs whatever it says. STEPS="..."
# chooses some of them; none lasts longer than LIMIT seconds (3600). The last line is "N passed, N failed", of steps.
built=$1 logs=${LOGS:-build/on-gpu} passed=0 failed=0
steps=${STEPS:-test memcheck racecheck bench}
for step in $steps; do
    case $step in
    test | memcheck | racecheck | synccheck | initcheck | bench) ;;
    *) echo "no such step: $step; expected some of: test memcheck racecheck synccheck initcheck bench" >&2 && exit 2 ;;
    esac
done
[ -z "$built" ] || [ -e "$built" ] || { echo "BUILT=$built: it is not there" >&2 && exit 2; }
case $built in
*.tar.xz)
    # python's where there is no xz
    tar -C build -xJf "$built" 2>/dev/null || python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall("build")' "$built" 2>/dev/null ||
        { echo "BUILT=$built: cannot be unpacked; expected what make carry packed" >&2 && exit 1; }
    built=build/carried
    ;;
esac
# cuBLAS that pip brought stands where no loader looks, and is taken if there is no other.
pip=$(python3 -c 'import glob, nvidia; print(":".join(sorted(d for p in nvidia.__path__ for d in glob.glob(p + "/*/lib"))))' 2>/dev/null)
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64${pip:+:$pip}"
mkdir -p "$logs"
nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader 2>&1
for step in $steps; do
    case $step in
    test) command="test-cuda" ;;
    bench) command="bench-cuda" ;;
    *) command="test-cuda SANITIZER=$step" ;;
    esac
    started=$(date +%s)
    # shellcheck disable=SC2086
    timeout "${LIMIT:-3600}" make $command ${built:+BUILT="$built"} >"$logs/$step.log" 2>&1
    status=$?
    echo "==== $step: make $command: exit status $status, $(($(date +%s) - started)) s; $logs/$step.log ends:"
    tail -n "$([ "$step" = bench ] && echo 25 || echo 8)" "$logs/$step.log"
    if [ $status -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
