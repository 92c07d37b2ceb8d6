# completion.awk: what the programs' -h print becomes bash completion, so that options are written down once.
#     awk -v models="emoji ffhq" -f dev/completion.awk sample.txt train.txt ... (a file for each, named after its command)
# Rows: two spaces, an option, what its value is called; "cpu|cuda" are the values themselves.
FNR == 1 {
    command = FILENAME
    sub(/.*\//, "", command)
    sub(/\.txt$/, "", command)
    order[++n] = command
}
/^  -/ {
    for (i = 1; i <= NF && $i ~ /^-/; i++) {
        option = $i
        sub(/,$/, "", option)
        options[command] = options[command] " " option
    }
    if (i == 2 && substr($0, 3 + length($1), 2) ~ /^ [^ ]/) { # a value, one space behind
        value = $2
        if (value ~ /^[a-z]+(\|[a-z]+)+$/) {
            gsub(/\|/, " ", value)
            values[command] = values[command] "            " $1 ") words=\"" value "\" ;;\n"
        } else if (value ~ /png|FILE|DIR|DATA|PATH|LIST|FOLDER/)
            files[command] = files[command] (files[command] == "" ? "" : " | ") $1
        else
            others[command] = others[command] (others[command] == "" ? "" : " | ") $1
    }
}
END {
    print "# bash completion of imagebart, made by \"make install\" from what its commands print with -h"
    print "_imagebart() {"
    print "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} words= names=\"" models "\""
    print "    COMPREPLY=()"
    print "    if [ \"$COMP_CWORD\" -eq 1 ]; then"
    all = ""
    for (i = 1; i <= n; i++) all = all order[i] " "
    print "        COMPREPLY=($(compgen -W \"" all "help --help --version\" -- \"$word\"))"
    print "        return"
    print "    fi"
    print "    case ${COMP_WORDS[1]} in"
    print "    help) words=\"" all "\" ;;"
    for (i = 1; i <= n; i++) {
        c = order[i]
        print "    " c ")"
        print "        case $before in"
        printf "%s", values[c]
        if (files[c] != "") print "            " files[c] ") return ;; # files"
        if (others[c] != "") print "            " others[c] ") compopt +o default +o bashdefault; return ;; # a value of the user's"
        print "            *) case $word in -*) words=\"" substr(options[c], 2) "\" ;; *) words=$names ;; esac ;;"
        print "        esac"
        print "        ;;"
    }
    print "    esac"
    print "    COMPREPLY=($(compgen -W \"$words\" -- \"$word\"))"
    print "}"
    print "complete -o bashdefault -o default -F _imagebart imagebart"
}
