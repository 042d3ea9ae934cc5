/* What native_linear.py hands over: arrays of numbers of 64 bits, pointers among them. */

#ifndef RANKWISE_NATIVE_LINEAR_H
#define RANKWISE_NATIVE_LINEAR_H

#include <stdint.h>

typedef struct {
    const char *weights;
    const char *levels;  /* of codes of 4 bits 32 numbers in bf16, of 8 bits `Magnitudes`; NULL: the weights are bf16 */
    const char *scales;  /* of codes */
    const uint16_t *bias; /* by row, or NULL */
    const int32_t *to;    /* place of each row among the layer's outputs; NULL: in order */
    int64_t out;          /* the layer's first column; -1: no outputs */
    int64_t rows, chunks;
    int64_t group;       /* chunks that share a scale */
    int64_t halves, shifted; /* see Scaling */
    int64_t from;        /* its first chunk among the inputs */
    int64_t keep;        /* where its results begin among what is kept, in chunks; -1: nowhere */
    int64_t bits;        /* of a weight: 16, 8 or 4 */
} Matrix;

/* Layers that share an input: `firsts` matrices that read it, then `seconds` that read what those keep. */
typedef struct {
    const Matrix *matrices;
    int64_t inputs, outputs; /* numbers a token */
    int64_t firsts, seconds;
    int64_t kept;            /* chunks a token */
    int64_t totals;          /* the most groups of columns that a matrix with zero points has */
} Group;

/* x: rows `stride` apart. y: `[tokens, outputs]`. 0, or 1 where memory ran out. */
int linears(const void *x, void *y, const Group *group, int64_t tokens, int64_t stride, int threads);

#endif
