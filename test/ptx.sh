#!/bin/sh
# ptx.sh BUILD ARCHS ORDERS PARTS: the CUDA code as nvcc compiles it, run on a CPU by an interpreter of nvcc's PTX (make
# test-cuda-ptx, which builds what is run). Every word of the first three lists with every word of the others:
#
#   ARCHS    compute capabilities: 80 90 90a
#   ORDERS   plain, or how the interpreter is to differ: reverse and random (order of warps, blocks, copies), eager (copies
#            land at once), early (a dependent grid begins before the one before it ends), clocks (vector clocks for all)
#   PARTS    test programs without test_ (cuda_f32, vqgan_cuda_bf16 ...), and
#            golden   the golden cases
#            sample_f32, sample_bf16   one picture of the bundled model, in f32 that of the CPU but for rounding
#            train_f32, train_bf16     two steps of a small run: the first stage with a discriminator, a scale of either
#                     kind; in f32 with the losses of the CPU
#
# What the interpreter finds (races, reads of what nobody wrote, misuse of the runtime) is a failure, too. All orders of a
# part must leave the same bits: what test programs say, with a digest of what was computed, the picture's file, the
# trained weights. They lie in BUILD/ptx-ARCH/ORDER. As many run at a time as there are processors, at most 4 (JOBS).
# In f32 the PTX for one capability is that for another, as a rule: where it is, that part is not run again.
#
# ptx.sh --one BUILD ARCH ORDER PART: one of them, whose sums go to BUILD/ptx-ARCH/ORDER/PART.sums
export IMAGEBART_DEVICE=cpu # where nothing else is said

SMS="sms=16" # two clusters of the kernel that decodes: more would only take longer

findings() { # findings FILE: what the interpreter counted there, in all runs; nothing if one left no count
    awk '/^PTXSIM: [0-9]+ findings$/ { n++; sum += $2 } END { if (n) print sum }' "$1"
}

run() { # run WHAT COMMAND...: exit status 0 and no finding
    what=$1
    shift
    PTXSIM="$order $SMS" "$@" >"$dir/out" 2>"$dir/err"
    status=$?
    cat "$dir/out" "$dir/err" >>"$out/$part.said"
    if [ $status -eq 0 ] && [ "$(findings "$dir/err")" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $what: $*: exit status $status, $(findings "$dir/err") findings" && head -5 "$dir/err"
    fi
}

sample() { # sample PRECISION. Beside the CPU's: another token moves colours by tens, rounding by one of the 255 steps
    draw() { "$programs/sample" models/emoji -n 1 --seed 5 --best-of 1 --chain-length 1 "$@"; }
    run "sample in $1" draw -o "$out/$1.png" --device cuda --weights "$1"
    if [ "$1" = f32 ]; then
        ok "sample on the CPU" draw -o "$dir/cpu.png" --device cpu
        ok "the same picture" "$build/pictures" near "$dir/cpu.png" "$out/f32.png" 1
    fi
    cksum <"$out/$1.png" >"$out/$part.bits"
}

train() { # train PRECISION. A scale stands on the first stage that the CPU has trained.
    {
        cat test/tiny.txt
        printf 'vqgan.model.params.lossconfig.params.%s\n' 'disc_start 0' 'disc_num_layers 2' 'disc_ndf 8'
        echo "vqgan.train.disc_warm_up 1"
    } >"$dir/config.txt"
    ok "pictures" "$build/pictures" make "$dir/data" 40 20
    step() { # step RUN ARGUMENTS...
        name=$1
        shift
        "$programs/train" --config "$dir/config.txt" --data "$dir/data" --run "$dir/$name" --steps 2 --eval-every 2 "$@"
    }
    for where in cpu "$1"; do
        case $where in
        cpu) check=ok on="--device cpu" ;;
        *) check=run on="--device cuda --precision $where" ;;
        esac
        # shellcheck disable=SC2086
        $check "vqgan, $where" step $where $on --vqgan --perceptual none
        [ "$where" = cpu ] || cp "$dir/cpu/vqgan.safetensors" "$dir/$where"
        # shellcheck disable=SC2086
        for scale in 2 3; do $check "scale $scale, $where" step $where $on --scale $scale; done
    done
    cat "$dir/$1"/*.state.safetensors | cksum >"$out/$part.bits"
    [ "$1" = f32 ] || return
    ok "losses of f32" awk 'function off(a, b) { return (a > b ? a - b : b - a) > 1e-3 * (b > 0 ? b : -b) }
        FNR == 1 { next } NR == FNR { want[$1, $2] = $3; next }
        { n++; if (!(($1, $2) in want) || off($3, want[$1, $2])) { print $1, $2, $3, "expected", want[$1, $2] >"/dev/stderr"; bad = 1 } }
        END { exit bad || n < 6 }' "$dir/cpu/log.tsv" "$dir/f32/log.tsv"
}

if [ "$1" = --one ]; then
    build=$2 arch=$3 order=$4 part=$5
    programs=$build/ptx-$arch out=$build/ptx-$arch/$order
    started=$(date +%s)
    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
    . test/lib.sh
    mkdir -p "$out"
    : >"$out/$part.said"
    rm -f "$out/$part.bits"
    case $part in
    sample_* | train_*) "${part%_*}" "${part#*_}" >"$out/$part.log" 2>&1 ;;
    *)
        case $part in
        golden) PTXSIM="$order $SMS" "$programs/golden" --device cuda test/golden-cases ;;
        *) PTXSIM="$order $SMS" "$programs/test_$part" ;;
        esac >"$out/$part.log" 2>"$out/$part.said"
        status=$?
        line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$out/$part.log" | tail -n 1)
        passed=$(expr "$line" : '\([0-9]*\)') failed=$(expr "$line" : '.*, \([0-9]*\)')
        cp "$out/$part.log" "$out/$part.bits"
        if [ "${passed:-0}" -eq 0 ] || { [ $status -ne 0 ] && [ "$failed" -eq 0 ]; }; then
            passed=${passed:-0} failed=$((${failed:-0} + 1))
            echo "FAIL exit status $status, last line: $line" >>"$out/$part.log"
        fi
        ;;
    esac
    found=$(findings "$out/$part.said")
    {
        grep -h -A 5 FAIL "$out/$part.log" | head -40
        [ "$found" = 0 ] || head -10 "$out/$part.said"
        printf '%-30s %6s passed, %s failed, %s findings, %s s\n' "$arch $order $part" "$passed" "$failed" \
            "${found:-no count of}" $(($(date +%s) - started))
    } >"$out/$part.report"
    cat "$out/$part.report" # at once, so that lines of two do not mix
    echo "$passed $((failed + ${found:-1}))" >"$out/$part.sums"
    exit 0
fi

ptx_of() { # ptx_of OBJECT: a sum of the PTX in it, but for what it says it is for and from, and what is for debuggers
    tr '\0' '\n' <"$1" | LC_ALL=C awk -v object="$1" '
        /^\.version/ { on = n = 1 }
        /^[^ -~\t]/ { on = 0 }
        /^[ \t]*($|\.(target|loc|file|b8))/ { next }
        on
        END { if (!n) print object }' | cksum
}

build=$1 archs=$2 orders=$3 parts=$4 passed=0 failed=0
again() { # again ARCH PART: is it what is run for the first of them?
    case $2 in
    golden | sample_f32 | train_f32) object=device_f32.o ;;
    *_f32) object=test_$2.o ;;
    *) return 1 ;;
    esac
    [ "$1" != "${archs%% *}" ] && [ "$(ptx_of "$build/ptx-$1/$object")" = "$(ptx_of "$build/ptx-${archs%% *}/$object")" ]
}
for arch in $archs; do
    for part in $parts; do
        if again "$arch" "$part"; then echo "$arch $part: its PTX is that for ${archs%% *}" >&2; else echo "$arch $part"; fi
    done
done >"$build/ptx-parts"
jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1) first=${orders%% *}
while read -r arch part; do
    for order in $orders; do
        rm -f "$build/ptx-$arch/$order/$part.sums"
        echo "$build $arch $order $part"
    done
done <"$build/ptx-parts" | xargs -P "${JOBS:-$((jobs < 4 ? jobs : 4))}" -L 1 test/ptx.sh --one
while read -r arch part; do
    for order in $orders; do
        here=$build/ptx-$arch/$order/$part
        read -r p f 2>/dev/null <"$here.sums" || { p=0 f=1 && echo "FAIL $arch $order $part: it left no sums"; }
        if [ "$order" != "$first" ]; then
            if cmp -s "$build/ptx-$arch/$first/$part.bits" "$here.bits"; then
                p=$((p + 1))
            else
                f=$((f + 1)) && echo "FAIL $arch $order $part: other bits than in order $first (*.bits in $build/ptx-$arch)"
            fi
        fi
        passed=$((passed + p)) failed=$((failed + f))
    done
done <"$build/ptx-parts"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
