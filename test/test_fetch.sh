#!/bin/sh
# test_fetch.sh: models/fetch.sh against a server of its own, with everything that can go wrong on the way. Small files
# stand for the weights. Needs python3, unzip and curl or wget; what is not there is skipped aloud.
for need in python3 unzip; do
    command -v $need >/dev/null || { echo "skipped: fetching models needs $need here" && exit 0; }
done
command -v curl >/dev/null || command -v wget >/dev/null || { echo "skipped: curl and wget are missing" && exit 0; }
here=$(pwd)
dir=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill $server; umount "$dir/small" 2>/dev/null; rm -rf "$dir"' EXIT
passed=0 failed=0

note() { # note STATUS WHAT
    if [ "$1" -eq 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $tool: $2"
        sed 's/^/     /' "$dir/err" | tail -n 3
    fi
}

ok() { # ok WHAT COMMAND...
    what=$1
    shift
    "$@" >"$dir/out" 2>"$dir/err"
    note $? "$what: $*"
}

holds() { # holds WHAT WORDS: what was said last, on stdout or stderr
    grep -q -- "$2" "$dir/out" "$dir/err"
    note $? "$1: expected \"$2\""
}

refused() { # refused WORDS COMMAND...: exit status 1, the last line says WORDS, nothing half-written is left
    words=$1
    shift
    "$@" >"$dir/out" 2>"$dir/err"
    [ $? -eq 1 ] && tail -n 1 "$dir/err" | grep -q -- "^fetch: .*$words"
    note $? "$*: expected \"$words\""
    ! ls -d models/*.unpacking models/*.log >"$dir/err" 2>&1
    note $? "$*: left files behind"
}

from() { # from KIND MODEL...: models/fetch.sh from the server's folder KIND
    base=http://127.0.0.1:$port/$1
    shift
    PATH=$path MODELS_URL=$base models/fetch.sh "$@"
}

fresh() { rm -rf "$dir/work" && mkdir -p "$dir/work/models" && cp "$here/models/fetch.sh" "$dir/work/models" && cd "$dir/work" || exit 1; }
whole() { cmp "$dir/files/ffhq_4_scales_geometric/scale4.ckpt" models/ffhq_4_scales_geometric/scale4.ckpt && ! ls models/*.zip* 2>/dev/null; }
# The published checksums of LPIPS's weights make way for those of the small files that stand for them.
small_sums() { sed -i "s/397923af[0-9a-f]\{56\}/$sha256/; s/d507d734[0-9a-f]\{24\}/$md5/" models/fetch.sh && grep -q "$sha256" models/fetch.sh && grep -q "$md5" models/fetch.sh; }
asked() { tail -n 1 "$dir/files/log" | grep -q "$1"; } # asked "FIRST BYTES": the last transfer

# ---- what the server has: a model with a folder in its zip, one without, first stages, a damaged zip ----
mkdir -p "$dir/files/ffhq_4_scales_geometric" "$dir/files/vqgan" && cd "$dir/files" || exit 1
for i in 1 2 3 4; do head -c 30000 /dev/urandom >ffhq_4_scales_geometric/scale$i.ckpt; done
cp ffhq_4_scales_geometric/scale1.ckpt vqgan/vqgan-ffhq.ckpt
cp ffhq_4_scales_geometric/scale2.ckpt vgg16-397923af.pth
cp ffhq_4_scales_geometric/scale3.ckpt vgg.pth
sha256=$(sha256sum vgg16-397923af.pth | cut -d ' ' -f 1) md5=$(md5sum vgg.pth | cut -d ' ' -f 1)
python3 - <<'PY'
import os, zipfile
def pack(name, files):
    with zipfile.ZipFile(name, "w") as z:
        for inside, path in files:
            z.write(path, inside)
four = [f"ffhq_4_scales_geometric/scale{i}.ckpt" for i in (1, 2, 3, 4)]
pack("ffhq_4_scales_geometric.zip", [(f, f) for f in four])
pack("cats_3_scales.zip", [(os.path.basename(f), f) for f in four[:3]])
pack("churches_3_scales.zip", [("deep/er/" + os.path.basename(f), f) for f in four[:2]])
pack("ffhq_2_scales_custom.zip", [("readme.txt", four[0])])
pack("vqgan.zip", [("vqgan/vqgan-ffhq.ckpt", four[0])])
os.mkdir("new")
pack("new/ffhq_4_scales_geometric.zip", [(f, four[0]) for f in four])
def entry(z, name, mode, data):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    z.writestr(info, data)
weights = [open(f, "rb").read() for f in four]
with zipfile.ZipFile("cin_5_scales_custom.zip", "w") as z: # what a zip may have besides
    for i in range(5):
        entry(z, f"m/scale{i + 1}.ckpt", 0o104777, weights[i % 4])
    entry(z, "m/config.txt", 0o100644, b"vqgan.model.params.n_embed 1\n")
    entry(z, "m/run \x1b[2J.sh", 0o100755, b"#!/bin/sh\n")
    entry(z, "m/passwd", 0o120777, b"/etc/passwd")
    entry(z, "above.txt", 0o100644, b"x")
for name, inside in ("linked", "scale2.ckpt"), ("linked1", "scale1.ckpt"):
    os.makedirs(name)
    with zipfile.ZipFile(f"{name}/ffhq_2_scales_custom.zip", "w") as z: # a link in the place of a file
        for f in ("scale1.ckpt", "scale2.ckpt"):
            entry(z, f, 0o120777 if f == inside else 0o100644, b"/etc/passwd" if f == inside else weights[0])
data = bytearray(open("ffhq_4_scales_geometric.zip", "rb").read())
data[50000] ^= 1
open("bedrooms_3_scales.zip", "wb").write(data)
open("cin_4_scales_geometric.zip", "wb").write(data[:90000])
PY
size=$(wc -c <ffhq_4_scales_geometric.zip | tr -d ' ')
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 \
    -keyout "$dir/key" -out "$dir/certificate" >/dev/null 2>&1 && cat "$dir/key" "$dir/certificate" >"$dir/pem"
[ -s "$dir/pem" ] && pem=$dir/pem || pem=
python3 "$here/test/fetch_server.py" "$dir/files" "$dir/port" ${pem:+"$pem"} 2>"$dir/server" &
server=$!
tries=0
while [ ! -f "$dir/port" ] && [ $tries -lt 200 ]; do sleep 0.05 && tries=$((tries + 1)); done
port=$(sed -n 1p "$dir/port") secure=$(sed -n 2p "$dir/port")
[ -n "$port" ] || exit 1

# A folder of links to every program there is but the one named
without() { # without FOLDER PROGRAM...
    mkdir "$1"
    for folder in $(echo "$PATH" | tr : ' '); do ln -s "$folder"/* "$1/" 2>/dev/null; done
    (cd "$1" && shift && rm -f "$@")
}
without "$dir/no-curl" curl
without "$dir/no-both" curl wget
without "$dir/no-unzip" unzip

# ---- with curl, then with wget ----
for tool in curl wget; do
    command -v $tool >/dev/null || { echo "skipped: fetching models with $tool, which is not here" && continue; }
    path=$PATH
    [ $tool = curl ] || path=$dir/no-curl
    fresh
    ok "a model and its first stage" from good ffhq vqgan
    holds "what to do next" "^next: ./sample ffhq$"
    ok "in place, no zip left" whole
    ok "the first stage too" cmp "$dir/files/vqgan/vqgan-ffhq.ckpt" models/vqgan/vqgan-ffhq.ckpt
    ok "again" from nowhere ffhq vqgan
    holds "no need to" "is here already"
    rm models/ffhq_4_scales_geometric/scale3.ckpt && echo mine >models/ffhq_4_scales_geometric/scale1.ckpt
    ok "a scale was lost" from good ffhq
    ok "it is back" cmp "$dir/files/ffhq_4_scales_geometric/scale3.ckpt" models/ffhq_4_scales_geometric/scale3.ckpt
    ok "the others are as they were" grep -qx mine models/ffhq_4_scales_geometric/scale1.ckpt
    rm -rf "$dir/elsewhere" && mv models/ffhq_4_scales_geometric "$dir/elsewhere" && ln -s "$dir/elsewhere" models/ffhq_4_scales_geometric
    ok "a link to a folder" from nowhere ffhq
    fresh
    ok "a zip without a folder" from good cats
    ok "gets one" cmp "$dir/files/ffhq_4_scales_geometric/scale3.ckpt" models/cats_3_scales/scale3.ckpt
    fresh
    refused "connection broke; run this again to go on" from cut ffhq
    ok "half of it is kept" test "$(wc -c <models/ffhq_4_scales_geometric.zip.part)" -eq $((size / 2))
    refused "connection broke" from cut ffhq
    ok "from where it stood" asked "ffhq_4_scales_geometric.zip $((size / 2)) "
    ok "then a better line" from good ffhq
    ok "the last quarter" asked "ffhq_4_scales_geometric.zip [1-9]"
    ok "is all that it took" whole
    fresh && head -c 1000 "$dir/files/ffhq_4_scales_geometric.zip" >models/ffhq_4_scales_geometric.zip.part
    ok "a server that cannot resume" from plain ffhq
    ok "sends all of it" asked " 0 $size"
    ok "which is whole" whole
    fresh && head -c 1000 "$dir/files/ffhq_4_scales_geometric.zip" >models/ffhq_4_scales_geometric.zip.part
    ok "one that does not say the size either" from silent ffhq
    ok "sends a whole file" whole
    fresh && cp "$dir/files/ffhq_4_scales_geometric.zip" models/ffhq_4_scales_geometric.zip.part
    ok "all was there before an interruption" from good ffhq
    ok "nothing is fetched" whole
    fresh && cp "$dir/files/ffhq_4_scales_geometric.zip" models/
    ok "a zip from elsewhere" from nowhere ffhq
    ok "is unpacked" whole
    cat "$dir/files/ffhq_4_scales_geometric.zip" >>models/cats_3_scales.zip.part
    refused "not the same file" from good cats
    fresh
    refused "HTML page instead of the file" from html ffhq
    ok "it is not kept" sh -c '! ls models/*.part'
    refused "git-lfs pointer instead of the file" from lfs ffhq
    ok "nor is that" sh -c '! ls models/*.part'
    refused "answers 404" from nowhere ffhq
    head -c 1000 "$dir/files/ffhq_4_scales_geometric.zip" >models/ffhq_4_scales_geometric.zip.part
    refused "answers 404" from nowhere ffhq
    ok "half a file outlives an error" test -s models/ffhq_4_scales_geometric.zip.part
    rm -f models/*.part
    refused "damaged" from good bedrooms
    ok "a zip with a wrong checksum is not kept" sh -c '! ls -d models/bedrooms*'
    refused "truncated or damaged" from silent imagenet4
    fresh
    refused "connection broke" from oldcut ffhq
    ok "the rest of the same file" from old ffhq
    holds "its checksum is said" "^fetch: sha256 of ffhq_4_scales_geometric.zip: $(sha256sum "$dir/files/ffhq_4_scales_geometric.zip" | cut -d ' ' -f 1)$"
    ok "is all that is fetched" asked "ffhq_4_scales_geometric.zip $((size / 2)) "
    ok "and fits" whole
    ok "nothing else is left" sh -c '! ls models/*.tag models/*.part'
    rm models/ffhq_4_scales_geometric/scale3.ckpt
    refused "is another file than the one fetched before (sha256" from new ffhq
    ok "which puts nothing in place" sh -c '! ls models/ffhq_4_scales_geometric/scale3.ckpt'
    rm models/ffhq_4_scales_geometric.zip
    ok "the same file once more" from old ffhq
    holds "known" "^fetch: sha256 of .*, as before$"
    fresh
    refused "connection broke" from oldcut ffhq
    ok "another file than half of which is here" from new ffhq
    holds "which is said" "starting again"
    ok "is fetched whole" cmp "$dir/files/ffhq_4_scales_geometric/scale1.ckpt" models/ffhq_4_scales_geometric/scale4.ckpt
    fresh
    ok "sent elsewhere on the same server" from around ffhq
    ok "all comes" whole
    if [ -n "$secure" ]; then
        printf 'ca_certificate = %s\n' "$dir/certificate" >"$dir/wgetrc"
        safely() { MODELS_URL=https://127.0.0.1:$secure/$1 PATH=$path CURL_CA_BUNDLE=$dir/certificate WGETRC=$dir/wgetrc models/fetch.sh ffhq; }
        fresh
        refused "leads from https to http" safely away
        ok "nothing is fetched" sh -c '! ls models/*.part models/*.zip'
        ok "https to https" safely around
        ok "all comes safely" whole
        fresh
        ok "and without detours" safely good
    else
        echo "SKIP https that leads to http: no openssl to make a certificate"
    fi
    fresh
    refused "lacks scale3.ckpt" from good churches
    refused "holds no scale1.ckpt" from good ffhq2
    MODELS_URL=http://127.0.0.1:1 PATH=$path refused "cannot be reached" models/fetch.sh ffhq
    fresh
    if mkdir -p "$dir/small" && mount -t tmpfs -o size=100k tmpfs "$dir/small" 2>/dev/null; then
        cp models/fetch.sh "$dir/small" && rmdir models 2>/dev/null
        rm -rf models && ln -s "$dir/small" models
        refused "full.*needs" from good ffhq
        refused "full.*has come to" from silent ffhq
        rm -f models/*.part && umount "$dir/small" && mount -t tmpfs -o size=180k tmpfs "$dir/small"
        cp "$here/models/fetch.sh" models/
        refused "full.*does not fit unpacked" from good ffhq
        ok "the zip stays" test -f models/ffhq_4_scales_geometric.zip
        umount "$dir/small"
    else
        echo "SKIP the full disk: mounting a small tmpfs needs root"
    fi
done

# ---- what does not depend on either ----
tool=lpips path=$PATH
fresh
refused "sent another file than the published one (sha256 differs" from good lpips
ok "which is not kept" sh -c '! ls models/lpips/*'
ok "the small files' checksums" small_sums
ok "LPIPS's weights" from good lpips
holds "as published" "^fetch: models/lpips/vgg.pth is the published file (md5 $md5)$"
ok "VGG16" cmp "$dir/files/vgg16-397923af.pth" models/lpips/vgg16-397923af.pth
ok "LPIPS's own" cmp "$dir/files/vgg.pth" models/lpips/vgg.pth
ok "again, without a server" from nowhere lpips
holds "checked again" "vgg16-397923af.pth is the published file"
echo >>models/lpips/vgg.pth
refused "vgg.pth is not the published file (md5 differs" from good lpips
ok "somebody's file stays" test -s models/lpips/vgg.pth
rm models/lpips/vgg.pth
refused "connection broke" from cut lpips
ok "and goes on where it broke" from good lpips
ok "to the whole file" cmp "$dir/files/vgg.pth" models/lpips/vgg.pth
rm models/lpips/vgg.pth
refused "HTML page instead of the file" from html lpips
refused "answers 404" from nowhere lpips
tool=zip
fresh
ok "a zip with more than the model" from good imagenet
holds "what is left out is said" "left out of cin_5_scales_custom.zip.* (4 in all)$"
ok "nothing of it is kept" test "$(ls models/cin_5_scales_custom | tr '\n' ' ')" = "scale1.ckpt scale2.ckpt scale3.ckpt scale4.ckpt scale5.ckpt "
ok "nor its permissions" test "$(stat -c %a models/cin_5_scales_custom/scale3.ckpt)" = 644
for at in linked linked1; do
    fresh && cp "$dir/files/$at/ffhq_2_scales_custom.zip" models/
    refused "$([ $at = linked ] && echo lacks scale2.ckpt || echo holds no scale1.ckpt)" from nowhere ffhq2
    ok "a link is not kept" sh -c '[ -z "$(find models -type l)" ]'
done
fresh && mkdir models/ffhq_2_scales_custom && cp "$dir/files/ffhq_4_scales_geometric/scale1.ckpt" "$dir/mine.ckpt"
for i in 1 2; do ln -s "$dir/mine.ckpt" models/ffhq_2_scales_custom/scale$i.ckpt; done
ok "the user's own links count" from nowhere ffhq2
tool=none path=$PATH
fresh
refused "expected ffhq, ffhq2" from good dragons
refused "which model" from good
path=$dir/no-both
refused "curl is missing. Debian: apt-get install curl" from good ffhq
path=$dir/no-unzip
refused "unzip is missing. Debian: apt-get install unzip" from good ffhq
path=$PATH
cd "$here" || exit 1
for model in ffhq ffhq2 churches bedrooms cats imagenet imagenet4; do
    ok "make $model" sh -c "make -n $model | grep -qx 'models/fetch.sh $model vqgan'"
done

# An interruption: the script and what it started are stopped, and go on where they were.
fresh
setsid sh -c "MODELS_URL=http://127.0.0.1:$port/slow models/fetch.sh ffhq" >/dev/null 2>"$dir/err" &
pid=$!
tries=0
while [ ! -s models/ffhq_4_scales_geometric.zip.part ] && [ $tries -lt 200 ]; do sleep 0.05 && tries=$((tries + 1)); done
kill -TERM -$pid
wait $pid
ok "an interrupted download is kept" test -s models/ffhq_4_scales_geometric.zip.part
ok "and goes on" from good ffhq
ok "from where it was" asked "ffhq_4_scales_geometric.zip [1-9]"
ok "to the end" whole

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
