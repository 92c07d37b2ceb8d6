/* terminal.c - pictures in a terminal: Kitty's and iTerm2's graphics, or coloured half blocks in any other. */
#include "sampling/sampling.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int env_has(const char *name, const char *part) {
    const char *value = getenv(name);
    return value && strstr(value, part);
}

static void put_base64(const unsigned char *p, size_t n) {
    static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        unsigned v = (unsigned)p[i] << 16 | (i + 1 < n ? (unsigned)p[i + 1] << 8 : 0) | (i + 2 < n ? p[i + 2] : 0);
        putchar(digit[v >> 18]);
        putchar(digit[v >> 12 & 63]);
        putchar(i + 1 < n ? digit[v >> 6 & 63] : '=');
        putchar(i + 2 < n ? digit[v & 63] : '=');
    }
}

/* Kitty graphics protocol: PNG data (f=100) in chunks of at most 4096 base64 digits. */
static void show_kitty(const uint8_t *png, size_t n) {
    enum { CHUNK = 3072 };
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t size = n - at < CHUNK ? n - at : CHUNK;
        printf("\033_G%sm=%d;", at ? "" : "f=100,a=T,", at + size < n);
        put_base64(png + at, size);
        printf("\033\\");
    }
    printf("\n");
}

static void show_iterm(const uint8_t *png, size_t n) {
    printf("\033]1337;File=inline=1;size=%zu:", n);
    put_base64(png, n);
    printf("\a\n");
}

/* A character shows two pixels: the upper one in the foreground colour of a half block, the lower one behind it. */
static Err show_blocks(const char *path) {
    Image full = {0}, small = {0};
    struct winsize window;
    size_t columns = ioctl(1, TIOCGWINSZ, &window) == 0 && window.ws_col ? window.ws_col : 80;
    TRY(image_read(&full, path));
    size_t W = full.W < columns ? full.W : columns, H = full.H * W / full.W;
    H += H < 2 ? 2 - H : H % 2;
    Err e = image_resize(&small, &full, H, W, FILTER_BICUBIC);
    for (size_t y = 0; e == OK && y < H; y += 2) {
        for (size_t x = 0; x < W; x++) {
            const unsigned char *a = small.rgb + 3 * (y * W + x), *b = a + 3 * W;
            printf("\033[38;2;%d;%d;%dm\033[48;2;%d;%d;%dm\xe2\x96\x80", a[0], a[1], a[2], b[0], b[1], b[2]);
        }
        printf("\033[0m\n");
    }
    image_free(&full);
    image_free(&small);
    return e;
}

Err show_png(const char *path) {
    int kitty = getenv("KITTY_WINDOW_ID") || env_has("TERM", "kitty") || env_has("TERM_PROGRAM", "ghostty");
    int iterm =
        env_has("TERM_PROGRAM", "iTerm") || env_has("LC_TERMINAL", "iTerm2") || env_has("TERM_PROGRAM", "WezTerm");
    if (!kitty && !iterm) return show_blocks(path);
    uint8_t *png = NULL;
    size_t n = 0;
    TRY(file_bytes(&png, &n, path, IMAGE_FILE_BYTES, NULL));
    if (kitty)
        show_kitty(png, n);
    else
        show_iterm(png, n);
    free(png);
    fflush(stdout);
    return OK;
}
