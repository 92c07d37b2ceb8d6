#!/bin/sh
# fuzz.sh FOLDER SECONDS TARGET...: FOLDER/fuzz, libFuzzer with all targets, for so long with each. What it finds new in a
# corpus stays in FOLDER/corpus/TARGET and is where the next time begins. The last line says how many inputs were tried
# and how many targets had a finding; exit status 1 if one had, or tried nothing. A finding's input lies in FOLDER/found.
folder=$1 seconds=$2
shift 2
export ASAN_OPTIONS="allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}" IMAGEBART_DEVICE=cpu
all=0 findings=0
mkdir -p "$folder/found"
for target in "$@"; do
    export FUZZ_TARGET="$target"
    mkdir -p "$folder/corpus/$target"
    FUZZ_SEEDS="$folder/corpus/$target" "$folder/fuzz" >"$folder/$target.log" 2>&1 || { cat "$folder/$target.log" && exit 1; }
    "$folder/fuzz" -max_total_time="$seconds" -timeout=120 -max_len=20000 -rss_limit_mb=4096 -print_final_stats=1 \
        -artifact_prefix="$folder/found/$target-" "$folder/corpus/$target" >"$folder/$target.log" 2>&1
    status=$?
    tried=$(sed -n 's/^stat::number_of_executed_units: //p' "$folder/$target.log")
    all=$((all + ${tried:-0}))
    printf '%-12s %12s inputs, %s\n' "$target" "${tried:-0}" "$([ $status -eq 0 ] && echo 'no finding' || echo 'a FINDING')"
    if [ $status -ne 0 ] || [ "${tried:-0}" -eq 0 ]; then
        findings=$((findings + 1))
        grep -aE 'ERROR|SUMMARY|runtime error|^ *#[0-9]+ .* in [a-z_]+ .*(\.c|\.cu|\.h):|Test unit written' "$folder/$target.log" | head -20
    fi
done
echo "$# targets, $all inputs, $findings findings"
[ "$findings" -eq 0 ]
