/* Where results of a panel go if they are no neighbours: a pivot layer's rows have any columns. */

#ifndef RANKWISE_NATIVE_SCATTER_H
#define RANKWISE_NATIVE_SCATTER_H

#include "native_dot.h"

/* The first `rows` of each token's 16 results to the columns `to` of its line in y, lines `outputs` apart.
 *
 * Columns go up as far as native_linear.py can order rows, so those of 16 rows are few steps apart: one permutation and
 * one masked store a token put a stretch of 32 columns in place. Other threads write the columns between. */
INLINE void scatter(const Halves *results, const int32_t *to, int64_t rows, uint16_t *y, int64_t outputs,
                    int64_t tokens) {
#ifdef __AVX512BW__
    enum { WIDE = VECTOR / 2 };
    for (int64_t i = 0; i < rows;) {
        int32_t start = to[i];
        uint32_t there = 0;
        Codes from = {0};
        for (; i < rows && to[i] >= start && to[i] - start < WIDE; i++) {
            from[to[i] - start] = (uint16_t)i;
            there |= 1u << (to[i] - start);
        }
        for (int64_t t = 0; t < tokens; t++) {
            __m512i row = _mm512_castsi256_si512((__m256i)results[t]);
            _mm512_mask_storeu_epi16(y + t * outputs + start, there, _mm512_permutexvar_epi16((__m512i)from, row));
        }
    }
#else
    for (int64_t i = 0; i < rows; i++)
        for (int64_t t = 0; t < tokens; t++) y[t * outputs + to[i]] = results[t][i];
#endif
}

#endif
