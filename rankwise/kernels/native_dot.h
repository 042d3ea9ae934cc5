/* Products of a panel with a tile of inputs, sums kept in registers.
 *
 * A panel is 16 rows of a matrix, 8 columns (a chunk) after another. In bf16 a chunk is four vectors of 16 rows by 2
 * columns; in 4 bits it is one, of 16 words by row and column parity, whose nibbles are the columns 2 j + parity; in 8
 * bits it is two, each of which `numbers8` makes two of those in bf16 of. A tile is T tokens of inputs in bf16, likewise
 * a chunk after another: `[chunks, stride, 8]`, so all addresses are one pointer and constants. Each result is one chain
 * of sums along the columns: it does not depend on T, nor on the other tokens.
 */

#ifndef RANKWISE_NATIVE_DOT_H
#define RANKWISE_NATIVE_DOT_H

#include "native.h"

#ifdef __AVX512BW__
#include <immintrin.h>
#define SUMS 16     /* that registers hold */
#define FOUR_BITS 1 /* codes can be looked up there */
#else
#define SUMS 4
#define FOUR_BITS 0
#endif

enum { MOST = 8, CHUNK = 8, CHUNK_BYTES = 2 * CHUNK, PAIRS = CHUNK / 2, VECTOR = 64 };
enum { AHEAD = 8192 }; /* bytes ahead that are asked for: at 16 tokens the processor itself looks less far */
typedef uint16_t Codes __attribute__((vector_size(VECTOR)));
typedef uint8_t Bytes __attribute__((vector_size(VECTOR)));

/* sum[row] += w[row, 0] x[0] + w[row, 1] x[1] */
INLINE Floats dot2(Floats sum, Words w, uint32_t x) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
    union { uint32_t bits; float value; } low = {x << 16}, high = {x & 0xffff0000u};
    sum += (Floats)(w << 16) * low.value;
    return sum + (Floats)(w & 0xffff0000u) * high.value;
#endif
}

/* Numbers in bf16 by the low four bits of each code; the table says its 16 levels twice. */
INLINE Words look_up(Codes table, Codes codes) {
#ifdef __AVX512BW__
    return (Words)_mm512_permutexvar_epi16((__m512i)codes, (__m512i)table);
#else
    return (Words)(codes & table); /* never called: see FOUR_BITS */
#endif
}

INLINE uint32_t pair_of(const char *tile, int64_t at, int t, int j) {
    uint32_t x;
    memcpy(&x, tile + (at + t) * CHUNK_BYTES + 4 * j, sizeof x);
    return x;
}

/* sums[p, t] of P panels in bf16, `chunks` long each, with T tokens of a tile of `stride`. */
INLINE void dot16(const char *weights, int64_t chunks, const char *tile, int64_t stride, Floats *sums, const int P,
                  const int T) {
    Floats s[SUMS]; /* of a fixed size, or the compiler keeps it in memory */
#pragma GCC unroll 16
    for (int i = 0; i < P * T; i++) s[i] = (Floats){0};
    for (int64_t c = 0; c < chunks; c++) {
#pragma GCC unroll 4
        for (int j = 0; j < PAIRS; j++) {
            Words w[MOST];
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) memcpy(&w[p], weights + ((p * chunks + c) * PAIRS + j) * VECTOR, VECTOR);
            if (T == 16) __builtin_prefetch(weights + (c * PAIRS + j) * VECTOR + AHEAD, 0, 2);
#pragma GCC unroll 16
            for (int t = 0; t < T; t++)
#pragma GCC unroll 8
                for (int p = 0; p < P; p++) s[p * T + t] = dot2(s[p * T + t], w[p], pair_of(tile, c * stride, t, j));
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < P * T; i++) sums[i] = s[i];
}

/* How codes of 4 bits become numbers: level[code] * scale, or (level[code] + shift) * scale. */
typedef struct {
    Codes levels;
    const char *scales;  /* per panel and group 16 words: fp32, or bf16 scale (low half) and shift (high half); or
                            16 halves, scales in bf16 */
    const float *totals; /* per group and token the sum of the inputs, by which shifts are multiplied; or NULL */
    int64_t group;       /* chunks that share a scale */
    int halves;          /* the words are pairs of halves, or */
    int alone;           /* halves without a partner */
} Scaling;

/* Bytes of a panel's scales of one group. */
INLINE int64_t scale_bytes(Scaling how) { return how.alone ? VECTOR / 2 : VECTOR; }

/* Those of a group as words. */
INLINE Words scale_words(Scaling how, int64_t group) {
    Words words;
    Halves alone;
    if (!how.alone) {
        memcpy(&words, how.scales + group * VECTOR, VECTOR);
        return words;
    }
    memcpy(&alone, how.scales + group * VECTOR / 2, VECTOR / 2);
    return __builtin_convertvector(alone, Words);
}

/* The same of panels in 4 bits. */
INLINE void dot4(const char *weights, int64_t chunks, Scaling how, const char *tile, int64_t stride, Floats *sums,
                 const int P, const int T) {
    Floats s[SUMS]; /* of a fixed size, or the compiler keeps it in memory */
#pragma GCC unroll 16
    for (int i = 0; i < P * T; i++) s[i] = (Floats){0};
    for (int64_t g = 0, groups = chunks / how.group; g < groups; g++) {
        Floats part[SUMS];
#pragma GCC unroll 16
        for (int i = 0; i < P * T; i++) part[i] = (Floats){0};
        for (int64_t c = g * how.group; c < (g + 1) * how.group; c++) {
            Codes codes[MOST];
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) memcpy(&codes[p], weights + (p * chunks + c) * VECTOR, VECTOR);
#pragma GCC unroll 4
            for (int j = 0; j < PAIRS; j++)
#pragma GCC unroll 8
                for (int p = 0; p < P; p++) {
                    Words w = look_up(how.levels, codes[p] >> 4 * j);
#pragma GCC unroll 16
                    for (int t = 0; t < T; t++)
                        part[p * T + t] = dot2(part[p * T + t], w, pair_of(tile, c * stride, t, j));
                }
        }
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            Words word = scale_words(how, p * groups + g);
            Floats scale = (Floats)(how.halves ? word << 16 : word), shift = (Floats)(word & 0xffff0000u);
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) {
                if (how.totals) part[p * T + t] += shift * how.totals[g * stride + t];
                s[p * T + t] += scale * part[p * T + t];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < P * T; i++) sums[i] = s[i];
}

/* What magnitudes 0..127 are in bf16: their low bytes and their high ones. */
typedef struct {
    Bytes low[2], high[2];
} Magnitudes;

/* Two vectors in bf16, of 16 rows by 2 columns, of codes of 8 bits: sign and magnitude. A code's place is that of its
 * number where the low halves of all pieces of 16 codes come first: the bytes of numbers are made, and interleaved. */
INLINE void numbers8(const Magnitudes *known, Bytes codes, Words *pairs) {
#ifdef __AVX512VBMI__
    __m512i low = _mm512_permutex2var_epi8((__m512i)known->low[0], (__m512i)codes, (__m512i)known->low[1]);
    __m512i high = _mm512_permutex2var_epi8((__m512i)known->high[0], (__m512i)codes, (__m512i)known->high[1]);
    high = _mm512_ternarylogic_epi64(high, (__m512i)codes, _mm512_set1_epi8(-128), 0xf8); /* high | (codes & sign) */
    pairs[0] = (Words)_mm512_unpacklo_epi8(low, high);
    pairs[1] = (Words)_mm512_unpackhi_epi8(low, high);
#else
    typedef int32_t Numbers __attribute__((vector_size(4 * LANES)));
    (void)known;
    for (int half = 0; half < 2; half++) {
        Words both;
        for (int i = 0; i < LANES; i++) {
            int at = i / 4 * 16 + half * 8 + i % 4 * 2;
            both[i] = (uint32_t)codes[at] | (uint32_t)codes[at + 1] << 16;
        }
        Words even = (Words)__builtin_convertvector((Numbers)(both & 127), Floats) | (both & 128) << 24;
        Words odd = (Words)__builtin_convertvector((Numbers)(both >> 16 & 127), Floats) | (both & 128 << 16) << 8;
        pairs[half] = even >> 16 | odd;
    }
#endif
}

/* The same of panels in 8 bits, whose rows have one scale each. */
INLINE void dot8(const char *weights, int64_t chunks, const char *magnitudes, const char *scales, const char *tile,
                 int64_t stride, Floats *sums, const int P, const int T) {
    Magnitudes known;
    memcpy(&known, magnitudes, sizeof known);
    Floats s[SUMS]; /* of a fixed size, or the compiler keeps it in memory */
#pragma GCC unroll 16
    for (int i = 0; i < P * T; i++) s[i] = (Floats){0};
    for (int64_t c = 0; c < chunks; c++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) {
                Bytes codes;
                Words w[2];
                memcpy(&codes, weights + ((p * chunks + c) * 2 + half) * VECTOR, VECTOR);
                numbers8(&known, codes, w);
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++)
#pragma GCC unroll 16
                    for (int t = 0; t < T; t++)
                        s[p * T + t] = dot2(s[p * T + t], w[j], pair_of(tile, c * stride, t, 2 * half + j));
            }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
        Floats scale;
        memcpy(&scale, scales + p * VECTOR, VECTOR);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[p * T + t] = scale * s[p * T + t];
    }
}

#endif
