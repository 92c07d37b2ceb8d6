/* inside.h - what files/ has that only tests and benchmarks call. */
#ifndef INSIDE_H
#define INSIDE_H

#include "files/files.h"

/* params_load of tensors named ema_prefix + the name without its dots, as the official EMA calls them (SPEC section
 * 6). */
Err params_load_ema(Params *p, const Checkpoint *ck, char which, const char *ema_prefix);
/* Packs the matrices of a table that has values, which stay, and sets p->format. */
Err params_pack(Params *p, WeightFormat format);
/* Writes a token file of x at once. */
Err tokens_write(const char *path, const Tokens *x);

#endif
