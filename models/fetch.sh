#!/bin/sh
# fetch.sh MODEL...: official weights into this folder, ready for ./sample. "make ffhq" calls it with "ffhq vqgan".
#
#     ffhq ffhq2 churches bedrooms cats imagenet imagenet4   -> models/FOLDER/scale1.ckpt ...
#     vqgan                                                  -> models/vqgan/vqgan-ffhq.ckpt ..., the first stages
#     lsun                                                   -> models/lsun, lists of training and validation pictures
#     lpips                                                  -> models/lpips, what ./train --vqgan measures likeness with
#
# lpips is two files with published checksums. Each other one is a zip file, of which none is published: downloaded as
# NAME.zip.part (run it again to go on after an interruption), unpacked into a folder of its own, where unzip compares the
# zip's own checksums; then the files that the model has, and nothing else, are moved to their place. The SHA-256 of
# what came is said and kept in fetched.sha256: another fetch that brings another file is refused. What is there already
# is left alone. MODELS_URL is where the files come from; curl or wget fetches them, and never goes from https to http.
url=${MODELS_URL:-https://ommer-lab.com/files}
here=$(cd "$(dirname "$0")" && pwd) || exit 1
cd "$here" || exit 1

die() {
    echo "fetch: $*" >&2
    exit 1
}

folder_of() { # folder_of MODEL: the name of its zip and of its folder
    case $1 in
        ffhq) echo ffhq_4_scales_geometric ;;
        ffhq2) echo ffhq_2_scales_custom ;;
        churches | bedrooms | cats) echo "$1_3_scales" ;;
        imagenet) echo cin_5_scales_custom ;;
        imagenet4) echo cin_4_scales_geometric ;;
        vqgan | lsun | lpips) echo "$1" ;;
        *) die "$1: expected ffhq, ffhq2, churches, bedrooms, cats, imagenet, imagenet4, vqgan, lsun or lpips" ;;
    esac
}

files_of() { # files_of MODEL: what its folder has when it is complete
    case $1 in
        ffhq2) echo scale1.ckpt scale2.ckpt ;;
        churches | bedrooms | cats) echo scale1.ckpt scale2.ckpt scale3.ckpt ;;
        ffhq | imagenet4) echo scale1.ckpt scale2.ckpt scale3.ckpt scale4.ckpt ;;
        imagenet) echo scale1.ckpt scale2.ckpt scale3.ckpt scale4.ckpt scale5.ckpt ;;
        vqgan) echo 'vqgan-*.ckpt' ;;
        lsun) echo '*.txt' ;;
    esac
}

missing() { # missing FOLDER MODEL: the first file that is not there; nothing if all are
    set -f # '*' is for find
    for file in $(files_of "$2"); do
        [ -n "$(find -L "$1/" -maxdepth 1 -name "$file" -type f -size +0 2>/dev/null)" ] || { echo "$file" && break; }
    done
    set +f
}

size_of() { # bytes of a file, 0 if there is none
    if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi
}

protocols() { # protocols URL: what may be used on the way to it
    case $1 in https:*) echo '=https' ;; *) echo '=http,https' ;; esac
}

follow() { # follow URL: where the server sends wget, which has no option against going from https to http
    at=$1 hops=0
    while [ $hops -lt 10 ]; do
        to=$(wget --spider -S --max-redirect=0 "$at" 2>&1 | tr -d '\r' | awk 'tolower($1) == "location:" { print $2; exit }')
        case $to in
            '') break ;;
            https://*) ;;
            http://*) case $at in https:*) return 1 ;; esac ;;
            //*) to=${at%%:*}:$to ;;
            /*) to=$(echo "$at" | sed 's|^\([a-z]*://[^/]*\).*|\1|')$to ;;
            *) to=${at%/*}/$to ;;
        esac
        at=$to hops=$((hops + 1))
    done
    echo "$at"
}

# ask URL: sets $want to the Content-Length that the server announces, $tag to what tells this file from a later one (a
# strong ETag, else the date); nothing where it does not say.
ask() {
    heads=$(if [ "$tool" = curl ]; then
        curl --proto "$(protocols "$1")" --proto-redir "$(protocols "$1")" -sfIL "$1"
    else
        wget --spider -S --max-redirect=0 "$1" 2>&1
    fi | tr -d '\r' | awk '
        $1 ~ /^HTTP\// { n = etag = date = ""; ok = $2 == 200 } # of the last answer, behind any redirections
        tolower($1) == "content-length:" { n = $2 }
        tolower($1) == "etag:" && $2 ~ /^"/ { etag = $2 }
        tolower($1) == "last-modified:" { date = $0; sub(/^ *[^ ]* */, "", date) }
        END { if (ok && n ~ /^[0-9]+$/) print n; else print ""; if (ok) print etag ? etag : date }')
    want=$(echo "$heads" | sed -n 1p) tag=$(echo "$heads" | sed -n 2p)
}

# receive PART URL: appends what is missing, if the file is still the one of $tag. Sets $got to: whole, cut, full (the
# disk), norange, refused, http, or an exit status.
receive() {
    [ -s "$1" ] && [ -n "$tag" ] && only="If-Range: $tag" || only=
    if [ "$tool" = curl ]; then
        [ -t 2 ] && meter=--show-error || meter=-s # a terminal sees how it goes on
        code=$(curl "$meter" --proto "$(protocols "$2")" --proto-redir "$(protocols "$2")" ${only:+-H "$only"} -fL \
            --connect-timeout 30 --speed-time 60 --speed-limit 1 -C - -o "$1" -w '%{http_code}' "$2")
        status=$?
    else
        [ -t 2 ] && meter=--show-progress || meter=-nv
        wget -nv "$meter" -o "$1.log" -S -c --tries=1 --timeout=60 --max-redirect=0 ${only:+--header="$only"} -O "$1" "$2"
        status=$? code=$(awk '$1 ~ /^HTTP\// { code = $2 } END { print code }' "$1.log")
        rm -f "$1.log"
    fi
    case $tool$status in
        curl1) got=http ;;
        curl0 | wget0) got=whole ;;
        curl18 | curl28 | curl52 | curl55 | curl56 | curl92 | wget4) got='cut' ;;
        curl23 | wget3) got=full ;;
        curl33) got=norange ;;
        curl22 | wget8) got=refused ;;
        *) got=$status ;;
    esac
    [ "$code" != 416 ] || got=whole # nothing is left to send
}

check_content() { # check_content PART URL: is it a file of its kind at all? What is not is removed, so that nothing is added to it.
    case $(head -c 200 "$1" | tr -d '\000' | tr '\n' ' ') in
        PK*) return ;;
        *'<'[hH!?]*) what="an HTML page instead of the file: open $2 in a browser to see what it says" ;;
        'version https://git-lfs'*) what="a git-lfs pointer instead of the file: whoever runs ${2%/*} has to put the file there" ;;
        *)
            [ "${1%.zip.part}" != "$1" ] || return 0
            what="something that is not a zip file"
            ;;
    esac
    rm -f "$1" "$1.tag"
    die "$2 sent $what"
}

free_kib() {
    df -Pk . | awk 'NR == 2 { print $4 }'
}

no_room() { # no_room WHY
    die "the disk of $here is full ($(free_kib) KiB left): $1; make room and run this again"
}

no_http() { # no_http URL
    die "$1: the server leads from https to http, where anybody on the way can change the file; nothing was fetched"
}

download() { # download FILE URL
    part=$1.part
    if [ "$tool" = wget ]; then
        asked=$2 && set -- "$1" "$(follow "$2")"
        [ -n "$2" ] || no_http "$asked"
    fi
    ask "$2"
    have=$(size_of "$part")
    if [ "$have" -gt 0 ] && [ -s "$part.tag" ] && [ "$(cat "$part.tag")" != "$tag" ]; then
        echo "fetch: the server's $1 is not the file any more of which $part is the beginning; starting again" >&2
        rm -f "$part" && have=0
    fi
    [ "$have" -eq 0 ] && from= || from=", going on at $have"
    [ "$have" -ne 0 ] || printf '%s' "$tag" >"$part.tag"
    echo "fetch: $2${want:+, $want bytes}$from" >&2
    [ "$have" -le "${want:-$have}" ] ||
        die "$part has $have bytes, the server's file only $want: not the same file? Remove $here/$part to start again"
    [ $(((${want:-0} - have) / 1024)) -le "$(free_kib)" ] || no_room "$1 needs $((want - have)) bytes"
    got=whole
    [ "$have" -eq "${want:--1}" ] || receive "$part" "$2"
    if [ "$got" = norange ]; then
        echo "fetch: the server cannot go on in the middle of a file; starting again" >&2
        rm -f "$part"
        receive "$part" "$2"
    fi
    [ -s "$part" ] || rm -f "$part.tag"
    [ ! -s "$part" ] || check_content "$part" "$2"
    have=$(size_of "$part")
    [ "$got" != whole ] || [ "$have" -eq "${want:-$have}" ] || got='cut'
    [ "$got" != 'cut' ] || [ "$have" -gt 0 ] || got=$status
    case $got in
        whole) mv "$part" "$1" && rm -f "$part.tag" ;;
        http) no_http "$2" ;;
        full) no_room "$1 has come to $have of ${want:-?} bytes" ;;
        refused) die "$2: the server answers ${code:-with an error}; is the address right?" ;;
        cut) die "$1 ends after $have of ${want:-?} bytes: the connection broke; run this again to go on" ;;
        *) die "$2 cannot be reached ($tool: exit status $got)" ;;
    esac
}

unpack() { # unpack NAME MODEL: NAME.zip, whose files may lie in a folder, -> NAME/
    rm -rf "$1.unpacking"
    echo "fetch: unpacking $1.zip" >&2
    unzip -q -o "$1.zip" -d "$1.unpacking" >"$1.log" 2>&1
    status=$? said=$(grep -iE 'error|cannot|bad|missing|not find' "$1.log" | head -n 1 | sed 's/^ *//')
    rm -f "$1.log"
    if [ $status -eq 50 ]; then
        rm -rf "$1.unpacking"
        no_room "$1.zip is here but does not fit unpacked"
    elif [ $status -gt 1 ]; then
        rm -rf "$1.unpacking" "$1.zip"
        die "$1.zip was truncated or damaged (unzip: $said) and is removed; run this again to fetch it anew"
    fi
    set -- "$1" "$2" "$(files_of "$2" | cut -d ' ' -f 1)"
    found=$(find "$1.unpacking" -name "$3" -type f | sort | head -n 1)
    if [ -z "$found" ]; then
        rm -rf "$1.unpacking"
        die "$here/$1.zip holds no $3; unzip -l lists what it holds"
    fi
    mkdir -p "$1"
    set -f
    for file in $(files_of "$2"); do # no links, no names that a zip invents; what is there already stays
        find "${found%/*}" -maxdepth 1 -type f -name "$file" ! -name '*[!A-Za-z0-9._-]*' -exec chmod 644 {} \; -exec mv -n {} "$1/" \;
    done
    set +f
    left=$(cd "$1.unpacking" && find . ! -type d | LC_ALL=C tr -c 'A-Za-z0-9._/\n-' '?' | sed 's|^\./||')
    [ -z "$left" ] || echo "fetch: left out of $1.zip, as no part of the model: $(echo "$left" | head -n 3 | tr '\n' ' ')($(echo "$left" | wc -l | tr -d ' ') in all)" >&2
    rm -rf "$1.unpacking"
    gap=$(missing "$1" "$2")
    [ -z "$gap" ] || die "$here/$1.zip lacks $gap; unzip -l lists what it holds"
    rm "$1.zip"
}

sha256_of() { # nothing where no program computes it
    if command -v sha256sum >/dev/null; then
        sha256sum "$1"
    elif command -v shasum >/dev/null; then
        shasum -a 256 "$1"
    fi | cut -d ' ' -f 1
}

fetch() { # fetch MODEL
    name=$(folder_of "$1")
    if [ -z "$(missing "$name" "$1")" ]; then
        echo "fetch: models/$name is here already" >&2
        return
    fi
    [ -f "$name.zip" ] || download "$name.zip" "$url/$name.zip"
    sum=$(sha256_of "$name.zip")
    before=$(awk -v f="$name.zip" '$2 == f { s = $1 } END { print s }' fetched.sha256 2>/dev/null)
    [ -z "$sum" ] || [ "${before:-$sum}" = "$sum" ] ||
        die "$here/$name.zip is another file than the one fetched before (sha256 $sum, then $before); if it was replaced on purpose, remove its line from $here/fetched.sha256"
    unpack "$name" "$1"
    [ -z "$sum" ] || echo "fetch: sha256 of $name.zip: $sum${before:+, as before}" >&2
    [ -z "$sum" ] || [ -n "$before" ] || echo "$sum  $name.zip" >>fetched.sha256
    echo "fetch: models/$name is here" >&2
}

fetch_checked() { # fetch_checked FILE URL sha256|md5 SUM: what is there already is checked too
    fetched=
    [ -z "${MODELS_URL:-}" ] || set -- "$1" "$url/${1##*/}" "$3" "$4"
    [ -f "$1" ] || { download "$1" "$2" && fetched=1; }
    if echo "$4  $1" | "$3sum" -c - >/dev/null 2>&1; then
        echo "fetch: models/$1 is the published file ($3 $4)" >&2
    elif [ -n "$fetched" ]; then
        rm "$1"
        die "$2 sent another file than the published one ($3 differs from $4); it is removed"
    else
        die "$here/$1 is not the published file ($3 differs from $4); remove it to fetch that"
    fi
}

fetch_lpips() { # torchvision's VGG16 and the weights that LPIPS puts on its channels
    mkdir -p lpips
    fetch_checked lpips/vgg16-397923af.pth https://download.pytorch.org/models/vgg16-397923af.pth \
        sha256 397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0
    fetch_checked lpips/vgg.pth 'https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1' \
        md5 d507d7349b931f0638a25a48a722f98a
}

[ $# -gt 0 ] || die "which model? ffhq, ffhq2, churches, bedrooms, cats, imagenet, imagenet4, vqgan, lsun or lpips"
for model in "$@"; do folder_of "$model" >/dev/null || exit 1; done
tool=
for try in wget curl; do command -v $try >/dev/null && tool=$try; done
[ -n "$tool" ] || die "curl is missing. Debian: apt-get install curl"
command -v unzip >/dev/null || die "unzip is missing. Debian: apt-get install unzip"
trap 'rm -rf ./*.unpacking; echo "fetch: interrupted; run this again to go on" >&2; exit 130' HUP INT TERM
if command -v flock >/dev/null; then # two at a time would write into the same files
    exec 9>.fetch.lock
    flock -n 9 || { echo "fetch: waiting for another fetch" >&2 && flock 9; }
fi
for model in "$@"; do
    case $model in lpips) fetch_lpips ;; *) fetch "$model" ;; esac
done
for model in "$@"; do
    case $model in vqgan | lsun | lpips) ;; *) echo "next: ./sample $model" ;; esac
done
