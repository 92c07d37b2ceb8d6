/* fuzz_serve.c - what strangers send to ./serve, under libFuzzer: JSON, forms, base64, the texts in a PNG. The first byte
 * says which. */
#include "serving/serving.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void form(const char *bytes, size_t size) {
    FormPart part[FORM_PARTS];
    Fault f;
    size_t parts;
    const size_t line = strcspn(bytes, "\n");
    if (line >= size) return;
    char *type = strndup(bytes, line);
    const Request r = {.type = type, .body = (const uint8_t *)bytes + line + 1, .size = size - line - 1};
    if (form_read(&f, part, &parts, &r))
        for (size_t i = 0; i < parts; i++)
            if (part[i].bytes < r.body || part[i].bytes + part[i].size > r.body + r.size) abort();
    free(type);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
    char *copy = malloc(size); /* the bytes behind the first, and a zero */
    memcpy(copy, data + 1, size - 1);
    copy[size - 1] = 0;
    Fault f;
    Config text = {0};
    uint8_t *bytes;
    size_t n;
    switch (*data % 4) {
    case 0: cJSON_Delete(json_read(&f, (const uint8_t *)copy, size - 1)); break;
    case 1: form(copy, size - 1); break;
    case 2:
        if (base64_decode(&bytes, &n, copy) == OK) free(bytes);
        break;
    default:
        if (png_read_texts(&text, (const uint8_t *)copy, size - 1) != OK) {}
        config_free(&text);
    }
    free(copy);
    return 0;
}
