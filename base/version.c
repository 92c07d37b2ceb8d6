/* version.c - what --version says: which commit, which compiler, which copy for which processor, which libraries.
 *
 * Each program links other libraries, and none of them is a matter of base/: the functions that tell their versions are
 * weak here, so that a program has those of the libraries that it links for its work, and no others. So is the commit,
 * which make writes and links into the programs alone: tests need not be linked again after every commit. */
#include "base/version.h"
#include "base/base.h"

#include <stdio.h>
#include <string.h>

#ifdef __ELF__
#define IF_LINKED __attribute__((weak))
extern const char version_commit[] IF_LINKED;
extern const char *png_get_libpng_ver(const void *) IF_LINKED;
extern const char *zlibVersion(void) IF_LINKED;
extern int WebPGetDecoderVersion(void) IF_LINKED;
extern char *mdb_version(int *, int *, int *) IF_LINKED;
extern const char *MHD_get_version(void) IF_LINKED;
extern const char *cJSON_Version(void) IF_LINKED;
extern int MPI_Get_library_version(char *, int *) IF_LINKED;
extern int cudaRuntimeGetVersion(int *) IF_LINKED;
extern const char *gnu_get_libc_version(void) IF_LINKED;
#else /* no weak references, but definitions that give way: what every program links */
__attribute__((weak)) const char version_commit[] = "unknown";
extern const char *png_get_libpng_ver(const void *);
extern const char *zlibVersion(void);
#endif

/* jpeglib.h needs stdio.h before it; libjpeg has no function that tells */
#include <jpeglib.h>
#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)
#ifdef LIBJPEG_TURBO_VERSION
#define JPEG_LIBRARY "libjpeg-turbo " TEXT_OF(LIBJPEG_TURBO_VERSION)
#else
#define JPEG_LIBRARY "libjpeg " TEXT_OF(JPEG_LIB_VERSION)
#endif

#ifdef __clang__
#define COMPILER __VERSION__
#else
#define COMPILER "gcc " __VERSION__
#endif

#ifdef __ELF__
static void print_mpi(void) {
    char text[8192]; /* MPI_MAX_LIBRARY_VERSION_STRING of the usual ones, and more */
    int length = 0;
    memset(text, 0, sizeof text);
    if (MPI_Get_library_version(text, &length) == 0) printf(", %.*s", (int)strcspn(text, ",\n"), text);
}

static void print_optional(void) {
    int number = 0;
    if (WebPGetDecoderVersion) {
        number = WebPGetDecoderVersion();
        printf(", libwebp %d.%d.%d", number >> 16, number >> 8 & 255, number & 255);
    }
    if (mdb_version) {
        int major, minor, patch;
        mdb_version(&major, &minor, &patch);
        printf(", LMDB %d.%d.%d", major, minor, patch);
    }
    if (MHD_get_version) printf(", libmicrohttpd %s", MHD_get_version());
    if (cJSON_Version) printf(", cJSON %s", cJSON_Version());
    if (MPI_Get_library_version) print_mpi();
    if (cudaRuntimeGetVersion && cudaRuntimeGetVersion(&number) == 0)
        printf(", CUDA runtime %d.%d", number / 1000, number % 1000 / 10);
    if (gnu_get_libc_version) printf(", glibc %s", gnu_get_libc_version());
}
#define HAS(symbol) (symbol)
#else
static void print_optional(void) {}
#define HAS(symbol) 1
#endif

const char *version_commit_text(void) {
    return HAS(version_commit) ? version_commit : "unknown";
}

void version_print(const char *program) {
    printf("%s of imagebart.c, commit %s\n", program, version_commit_text());
    printf("compiler: %s\n", COMPILER);
    printf("processor: %s\n", vector_instructions());
    printf("libraries: ");
    if (HAS(png_get_libpng_ver)) printf("libpng %s, ", png_get_libpng_ver(NULL));
    if (HAS(zlibVersion)) printf("zlib %s, ", zlibVersion());
    printf("%s", JPEG_LIBRARY);
    print_optional();
    printf("\n");
}
