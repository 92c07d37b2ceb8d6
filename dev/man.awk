# man.awk: what "imagebart NAME -h" prints becomes a man page, so that options are written down once, in the programs.
#     imagebart sample -h | awk -v name=imagebart-sample -f dev/man.awk
# A usage of indented lines, paragraphs, headings, and rows: two spaces, an option, its help from column 27 on.
function escaped(text) {
    gsub(/\\/, "\\e", text)
    gsub(/-/, "\\-", text)
    sub(/^[.']/, "\\\\\\&&", text)
    return text
}
function say(text) { print escaped(text) }
function literal(on) { # lines as they are
    if (on != is_literal) print on ? ".nf" : ".fi"
    is_literal = on
}
function short(text) { # the first sentence, or its beginning
    sub(/[.:;(].*/, "", text)
    sub(/ +$/, "", text)
    return tolower(substr(text, 1, 1)) substr(text, 2)
}
{ line[++n] = $0 }
END {
    for (i = 1; i <= n && line[i] != ""; i++) usage[++lines] = line[i]
    sub(/^usage: /, "", usage[1])
    for (k = i + 1; k <= n && line[k] != ""; k++) first = first (first == "" ? "" : " ") line[k]
    print ".TH " toupper(name) " 1 \"\" \"imagebart.c\" \"User Commands\""
    print ".SH NAME"
    print escaped(name) " \\- " escaped(short(first))
    print ".SH SYNOPSIS\n.nf"
    for (k = 1; k <= lines; k++) say(usage[k])
    print ".fi\n.SH DESCRIPTION"
    for (; i <= n; i++) {
        text = line[i]
        if (text == "") {
            if (!rows) literal(0)
            heading = line[i + 1] != "" && line[i + 2] ~ /^  [^ ]/ && i > lines + 1 && line[i + 1] !~ /[.]$|^ /
            if (heading) {
                literal(0)
                print ".SH " toupper(escaped(line[++i]))
                rows = 1
            } else {
                print ".PP"
                rows = 0
            }
        } else if (rows && text ~ /^  [^ ]/) {
            option = substr(text, 3)
            help = ""
            if (match(option, /   *[^ ]/) && RSTART <= 25) {
                help = substr(option, RSTART + RLENGTH - 1)
                option = substr(option, 1, RSTART - 1)
            } else if (length(option) > 24) {
                help = substr(option, 25)
                option = substr(option, 1, 24)
            }
            sub(/ +$/, "", option)
            print ".TP\n.B \"" escaped(option) "\""
            if (help != "") say(help)
        } else {
            if (!rows) literal(text ~ /^ /)
            if (rows) sub(/^ +/, "", text)
            say(text)
        }
    }
    literal(0)
    print ".SH SEE ALSO"
    print see
}
