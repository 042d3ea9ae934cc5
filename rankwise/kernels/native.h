/* What the files of this library share: numbers in bf16 (wide = 0) or fp32 (wide = 1), and vectors of 16 lanes. */

#ifndef RANKWISE_NATIVE_H
#define RANKWISE_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 };
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

INLINE float get(const void *p, int64_t i, int wide) {
    if (wide) return ((const float *)p)[i];
    union { uint32_t bits; float value; } x = {(uint32_t)((const uint16_t *)p)[i] << 16};
    return x.value;
}

INLINE void put(void *p, int64_t i, float value, int wide) {
    if (wide) {
        ((float *)p)[i] = value;
        return;
    }
    union { float value; uint32_t bits; } x = {value};
    uint32_t nearest = (x.bits + 0x7fff + (x.bits >> 16 & 1)) >> 16; /* ties to even */
    ((uint16_t *)p)[i] = (uint16_t)(value != value ? 0x7fc0 : nearest);
}

/* To bf16, as `put` does it; processors that have an operation for it take numbers below 2^-126 for 0. */
INLINE Halves rounded(Floats x) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    Words bits = (Words)x, nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    Words odd = (Words)(x != x); /* all ones for NaN */
    return __builtin_convertvector((nearest & ~odd) | (odd & 0x7fc0), Halves);
#endif
}

INLINE Floats lanes(const void *p, int64_t i, int wide) {
    Floats whole;
    Halves half;
    if (wide) {
        memcpy(&whole, (const float *)p + i, sizeof whole);
        return whole;
    }
    memcpy(&half, (const uint16_t *)p + i, sizeof half);
    return (Floats)(__builtin_convertvector(half, Words) << 16);
}

/* 2^x to fp32's precision, x taken into [-126, 126]: Taylor's series of 2^f, |f| <= 1/2, times a power of two. */
INLINE float power(float x) {
    x = x < -126.0f ? -126.0f : x > 126.0f ? 126.0f : x;
    float whole = rintf(x), t = (x - whole) * 0.693147180559945f;
    float y = 1.0f / 5040.0f;
    y = y * t + 1.0f / 720.0f;
    y = y * t + 1.0f / 120.0f;
    y = y * t + 1.0f / 24.0f;
    y = y * t + 1.0f / 6.0f;
    y = y * t + 0.5f;
    y = y * t + 1.0f;
    y = y * t + 1.0f;
    union { uint32_t bits; float value; } scale = {(uint32_t)((int32_t)whole + 127) << 23};
    return y * scale.value;
}

#define LOG2E 1.44269504088896f

/* The functions of native.c and native_attention.c. */

enum { HEADS, KV_HEADS, DIM, BLOCK, WINDOW, Q_SEQ, Q_HEAD, PER_BLOCK, PER_SLOT, PER_HEAD, TABLE_ROW, ATTENTION_SIZES };
enum { R_HEADS, R_KV, R_DIM, R_HALF, R_BLOCK, R_Q, R_Q_HEAD, R_K, R_K_HEAD, R_V, R_V_HEAD, R_COS,
       R_PER_BLOCK, R_PER_SLOT, R_PER_HEAD, ROTARY_SIZES };

int attention(const void *q, const void *keys, const void *values, const int32_t *tables, const int32_t *lengths,
              const int32_t *bounds, void *out, const int64_t *n, int64_t seqs, int64_t tokens, float scale, int wide,
              int threads);
void rotary(void *q, const void *k, const void *v, void *keys, void *values, const float *cos, const float *sin,
            const int32_t *positions, const int32_t *slots, const int64_t *n, int64_t tokens, int wide, int threads);
void norm(const void *x, const void *residual, const void *weight, void *out, void *summed, int64_t rows, int64_t inner,
          int64_t size, int64_t per_outer, int64_t per_inner, float eps, float offset, int wide, int threads);
void gated(const void *gate, const void *up, void *out, int64_t rows, int64_t size, int64_t per_gate, int64_t per_up,
           int gelu, int wide, int threads);

#endif
