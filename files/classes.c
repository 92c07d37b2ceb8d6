/* classes.c - what a model's classes are called, and which of them the user means.
 *
 * A class is a line of text: a plain name ("food"), or a WordNet synset and all of its names, commas between, as
 * models/imagenet-classes.txt has them ("n01440764 tench, Tinca tinca"). A recipe names such a file with the key
 * imagebart.class_list; from then on the file's text travels with the model as imagebart.classes, so that a converted
 * or trained model needs no second file. The label of a class is its place in the list (SPEC section 10).
 *
 * A model trained on folders has their names as they are, a line each behind the line FOLDERS; older ones have them
 * between commas, in one line.
 *
 * A class is found by its number, its synset, any of its names, or a part of one that no other class has; case does
 * not matter, nor whether an accent is a part of its letter or a character of its own. Words are not names: ImageNet has two cranes, a bird and a machine. What fits several classes is an error
 * that lists them with their numbers.
 *
 * Read: the list; one class's names; finding a class. */
#include "files/files.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The list ---------------------------------------------------------------------------------------------- */

enum { LIST_BYTES = 1 << 24 };

/* The first line of a list of folders. What follows is neither comment nor cut at commas. */
static const char FOLDERS[] = "# folders, one a line\n";
typedef enum { COMMAS, LINES, VERBATIM } ListKind;

Err classes_from_recipe(Config *to, const char *recipe) {
    char path[PATH_BYTES], *text;
    const char *file = config_get(to, "imagebart.", "class_list"), *slash = strrchr(recipe, '/');
    if (!file) return OK;
    int folder = *file == '/' || !slash ? 0 : (int)(slash - recipe) + 1;
    if (path_make(path, "%.*s%s", folder, recipe, file) != OK || file_text(&text, path, LIST_BYTES) != OK) {
        err_in("imagebart.class_list");
        return config_blame(to, "imagebart.", "class_list");
    }
    Err e = config_set(to, "imagebart.classes", "%s", text);
    free(text);
    return e;
}

/* The next class of a list, *length bytes; *list moves on. NULL: no more. Lines (those after # are comments), lines as
 * they are or, in a list without line ends, what stands between commas. */
static const char *next_class(const char **list, size_t *length, ListKind kind) {
    const char *start = *list;
    while (kind == LINES && (*start == '#' || *start == '\n')) {
        start += *start == '#' ? strcspn(start, "\n") : 0;
        start += *start == '\n';
    }
    if (*start == 0) return NULL;
    *length = strcspn(start, kind == COMMAS ? "," : "\n");
    *list = start + *length + (start[*length] != 0);
    while (kind == LINES && *length && isspace((unsigned char)start[*length - 1])) --*length;
    return start;
}

static Err add_class(Classes *c, const char *text, size_t length) {
    TRY(mem_alloc(&c->name[c->n], length + 1, 1, "a class name"));
    memcpy(c->name[c->n++], text, length);
    return OK;
}

Err classes_open(Classes *c, const char *list, size_t most) {
    *c = (Classes){0};
    TRY(mem_alloc(&c->name, most, sizeof *c->name, "class names"));
    if (!list || !*list) {
        char number[24];
        for (size_t i = 0; i < most; i++) {
            snprintf(number, sizeof number, "%zu", i);
            TRY(add_class(c, number, strlen(number)));
        }
        return OK;
    }
    c->verbatim = strncmp(list, FOLDERS, sizeof FOLDERS - 1) == 0;
    if (c->verbatim) list += sizeof FOLDERS - 1;
    const ListKind kind = c->verbatim ? VERBATIM : strchr(list, '\n') ? LINES : COMMAS;
    const char *text;
    for (size_t length, n = 0; (text = next_class(&list, &length, kind)); n++) {
        if (n == most) return err("imagebart.classes names more than the %zu classes that the network knows", most);
        TRY(add_class(c, text, length));
    }
    return c->n ? OK : err("imagebart.classes names no class");
}

void classes_free(Classes *c) {
    for (size_t i = 0; i < c->n; i++) free(c->name[i]);
    free(c->name);
    *c = (Classes){0};
}

/* ---- One class's names ------------------------------------------------------------------------------------- */

/* The bytes of "n01440764" at the start of a class; 0: it has no synset. */
static size_t synset_length(const char *text) {
    return text[0] == 'n' && strspn(text + 1, "0123456789") == 8 && text[9] == ' ' ? 9 : 0;
}

/* The next of a class's names, *length bytes; *text moves on. NULL: no more. */
static const char *next_name(const char **text, size_t *length) {
    const char *start = *text + strspn(*text, " ,");
    if (*start == 0) return NULL;
    *length = strcspn(start, ",");
    *text = start + *length;
    return start;
}

/* Letters of U+00C0 to U+017F that Unicode also writes as two, a letter and a mark behind it (as macOS does in the names
 * of files): the letter and, in MARKS, which mark, for each */
static const char composed[] = "A`A'A^A~A:Ao  C,E`E'E^E:I`I'I^I:  N~O`O'O^O~O:    U`U'U^U:Y'    "
                               "a`a'a^a~a:ao  c,e`e'e^e:i`i'i^i:  n~o`o'o^o~o:    u`u'u^u:y'  y:"
                               "A-a-AuauA;a;C'c'C^c^C.c.CvcvDvdv    E-e-EueuE.e.E;e;EvevG^g^Gugu"
                               "G.g.G,g,H^h^    I~i~I-i-IuiuI;i;I.      J^j^K,k,  L'l'L,l,Lvlv  "
                               "      N'n'N,n,Nvnv      O-o-OuouO\"o\"    R'r'R,r,RvrvS's'S^s^S,s,"
                               "SvsvT,t,Tvtv    U~u~U-u-UuuuUouoU\"u\"U;u;W^w^Y^y^Y:Z'z'Z.z.Zvzv  ";
#define MARKS "`'^~- u.: o\"v                          ,;" /* from U+0300 on; those between do not occur */

/* The same of small letters of Greek and Cyrillic: the code, the letter's, and the mark's from U+0300 on */
static const unsigned short marked[][3] = {
    {0x3ac, 0x3b1, 1}, {0x3ad, 0x3b5, 1}, {0x3ae, 0x3b7, 1}, {0x3af, 0x3b9, 1}, {0x3cc, 0x3bf, 1}, {0x3cd, 0x3c5, 1},
    {0x3ce, 0x3c9, 1}, {0x3ca, 0x3b9, 8}, {0x3cb, 0x3c5, 8}, {0x439, 0x438, 6}, {0x450, 0x435, 0}, {0x451, 0x435, 8},
    {0x453, 0x433, 1}, {0x457, 0x456, 8}, {0x45c, 0x43a, 1}, {0x45d, 0x438, 0}, {0x45e, 0x443, 6}};

/* A capital letter of Latin, Greek or Cyrillic becomes a small one; the sigma at a word's end is a sigma. */
static unsigned small_letter(unsigned code) {
    if ((code >= 0xc0 && code <= 0xde && code != 0xd7) || (code >= 0x391 && code <= 0x3ab) ||
        (code >= 0x410 && code <= 0x42f))
        return code + 0x20;
    if ((code >= 0x100 && code <= 0x12f) || (code >= 0x132 && code <= 0x137) || (code >= 0x14a && code <= 0x177))
        return code | 1;
    if ((code >= 0x139 && code <= 0x148) || (code >= 0x179 && code <= 0x17e)) return code + (code & 1);
    if (code >= 0x400 && code <= 0x40f) return code + 0x50;
    if (code >= 0x388 && code <= 0x38a) return code + 0x25;
    if (code == 0x38e || code == 0x38f) return code + 0x3f;
    return code == 0x386 ? 0x3ac : code == 0x38c ? 0x3cc : code == 0x3c2 ? 0x3c3 : code;
}

/* A text, byte by byte: in lower case, and a letter with its mark as two */
typedef struct {
    const char *at, *end;
    unsigned char rest[4]; /* the last `left` bytes of it are to come */
    int left;
} Letters;

static int next_byte(Letters *l) {
    return l->rest[4 - l->left--];
}

/* Puts a code below U+0800 in front of what is to come. */
static void put_code(Letters *l, unsigned code) {
    if (code >= 0x80) l->rest[4 - ++l->left] = (unsigned char)(0x80 | (code & 63));
    l->rest[4 - ++l->left] = (unsigned char)(code < 0x80 ? code : 0xc0 | code >> 6);
}

/* One of two bytes: its letter, small, and its mark, if it has one */
static void put_letter(Letters *l, unsigned code) {
    const size_t at = 2 * (size_t)(code - 0xc0);
    if (code >= 0xc0 && code < 0x180 && composed[at] != ' ') {
        put_code(l, 0x300 + (unsigned)(strchr(MARKS, composed[at + 1]) - MARKS));
        put_code(l, (unsigned)tolower((unsigned char)composed[at]));
        return;
    }
    code = small_letter(code);
    size_t i = 0;
    while (i < sizeof marked / sizeof *marked && marked[i][0] != code) i++;
    const int whole = i == sizeof marked / sizeof *marked;
    if (!whole) put_code(l, 0x300 + marked[i][2]);
    put_code(l, whole ? code : marked[i][1]);
}

static int next_letter(Letters *l) {
    const unsigned char *p = (const unsigned char *)l->at;
    if (l->left) return next_byte(l);
    if (l->at == l->end) return -1;
    l->at++;
    if (*p < 0xc2 || *p > 0xdf || l->at == l->end || (p[1] & 0xc0) != 0x80) return tolower(*p);
    l->at++;
    put_letter(l, (*p & 31u) << 6 | (p[1] & 63u));
    return next_byte(l);
}

/* Does the text begin as the name does, or with `whole`, is it that? What looks the same is the same. */
static int begins(const char *text, size_t length, const char *name, int whole) {
    Letters a = {.at = text, .end = text + length}, b = {.at = name, .end = name + strlen(name)};
    for (;;) {
        const int wanted = next_letter(&b);
        if (wanted < 0 && !whole) return 1;
        if (next_letter(&a) != wanted) return 0;
        if (wanted < 0) return 1;
    }
}

static int same(const char *text, size_t length, const char *name) {
    return begins(text, length, name, 1);
}

/* Is it exactly the class's line, its synset or one of its names? */
static int is_named(const char *text, const char *name) {
    size_t length = synset_length(text);
    if ((length && same(text, length, name)) || same(text, strlen(text), name)) return 1;
    text += length;
    for (const char *word; (word = next_name(&text, &length));)
        if (same(word, length, name)) return 1;
    return 0;
}

/* Case-insensitively: does one of the class's names hold `part`? */
static int holds(const char *text, const char *part) {
    size_t length;
    text += synset_length(text);
    for (const char *word; (word = next_name(&text, &length));)
        for (; length; word++, length--)
            if (begins(word, length, part, 0)) return 1;
    return 0;
}

const char *class_title(char out[CLASS_TITLE_BYTES], const Classes *c, size_t label) {
    const char *text = c->name[label] + (c->verbatim ? 0 : synset_length(c->name[label]));
    size_t length = strlen(text);
    const char *first = c->verbatim ? text : next_name(&text, &length);
    snprintf(out, CLASS_TITLE_BYTES, "%.*s", (int)min_size(length, CLASS_TITLE_BYTES), first ? first : "");
    return make_printable(out);
}

/* Are the folders the classes of the list, one by one? */
static int folders_fit(const Classes *c, char *const *folder, size_t n) {
    size_t i = 0;
    while (i < n && n == c->n && is_named(c->name[i], folder[i])) i++;
    return i == n;
}

/* The name travels in metadata, which is UTF-8, as a line. */
static Err check_folder(const char *folder) {
    if (strchr(folder, '\n')) return err("the class folder '%s' has a line break in its name: rename it", folder);
    for (const char *at = folder; *at;) {
        const size_t n = utf8_length(at);
        if (!n) return err("the name of the class folder '%s' is not UTF-8: rename it", folder);
        at += n;
    }
    return OK;
}

Err classes_from_folders(Config *to, char *const *folder, size_t n) {
    const char *list = config_get(to, "imagebart.", "classes");
    Classes known = {0};
    int fits = 0;
    Err e;
    if (list && classes_open(&known, list, 65536) == OK) fits = folders_fit(&known, folder, n);
    classes_free(&known);
    if (fits) return OK;
    char *text, *at;
    size_t bytes = sizeof FOLDERS;
    for (size_t i = 0; i < n; i++) {
        TRY(check_folder(folder[i]));
        bytes += strlen(folder[i]) + 1;
    }
    TRY(mem_alloc(&text, bytes, 1, "class names"));
    at = stpcpy(text, FOLDERS);
    for (size_t i = 0; i < n; i++) {
        at = stpcpy(at, folder[i]);
        *at++ = '\n';
    }
    e = config_set(to, "imagebart.classes", "%s", text);
    free(text);
    return e;
}

/* ---- Finding a class --------------------------------------------------------------------------------------- */

size_t classes_named(const Classes *c, const char *name, int32_t *label) {
    size_t matches = 0;
    for (size_t i = c->n; i-- > 0;) {
        if (!is_named(c->name[i], name)) continue;
        matches++;
        *label = (int32_t)i;
    }
    for (size_t i = 0; matches > 1 && i < c->n; i++)
        if (strcmp(c->name[i], name) == 0) { /* names that differ by case alone, such as folders a and A */
            *label = (int32_t)i;
            return 1;
        }
    return matches;
}

static size_t classes_holding(const Classes *c, const char *part, int32_t *label) {
    size_t matches = 0;
    for (size_t i = 0; i < c->n; i++) {
        if (!holds(c->name[i], part)) continue;
        matches++;
        *label = (int32_t)i;
    }
    return matches;
}

/* The classes that pass, as far as the line has room: "food", or with its number "207 n02099601 golden retriever" */
static Err class_error(const Classes *c, const char *name, const char *why, int (*passes)(const char *, const char *)) {
    char list[640] = "", one[CLASS_TITLE_BYTES + 48], title[CLASS_TITLE_BYTES];
    size_t length = 0;
    for (size_t i = 0; i < c->n; i++) {
        if (passes && !passes(c->name[i], name)) continue;
        class_title(title, c, i);
        if (!c->verbatim && synset_length(c->name[i]))
            snprintf(one, sizeof one, "%zu %.9s %s", i, c->name[i], title);
        else
            snprintf(one, sizeof one, "%s", title);
        if (length + strlen(one) + 8 >= sizeof list) {
            snprintf(list + length, sizeof list - length, ", ...");
            break;
        }
        length += (size_t)snprintf(list + length, sizeof list - length, "%s%s", length ? ", " : "", one);
    }
    return err("class \"%.100s\": %s %s", name, why, list);
}

Err classes_find(const Classes *c, const char *name, int32_t *label) {
    if (*name == 0) return class_error(c, name, "expected one of", NULL);
    size_t matches = classes_named(c, name, label);
    if (matches == 1) return OK;
    if (matches > 1) return class_error(c, name, "is the name of several; give a number or a synset:", is_named);
    if (name[strspn(name, "0123456789")] == 0) {
        unsigned long long number = strtoull(name, NULL, 10);
        if (number >= c->n) return err("class %.100s: expected 0..%zu or a name", name, c->n - 1);
        *label = (int32_t)number;
        return OK;
    }
    matches = classes_holding(c, name, label);
    if (matches == 1) return OK;
    return matches ? class_error(c, name, "could be any of", holds) : class_error(c, name, "expected one of", NULL);
}
