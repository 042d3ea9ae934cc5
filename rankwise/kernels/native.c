/* What decoding does between its products, on a CPU: rotary embedding, RMSNorm, gates.
 *
 * PyTorch needs many small operations for each. Numbers are bf16 (wide = 0) or fp32 (wide = 1), arithmetic is fp32 and
 * rounds once. What a row gives does not depend on the others.
 * Sizes come as one array; strides count elements. See native.py, which compiles this file.
 */

#include "native.h"

/* ---- rotary embedding of queries in place, and of keys on their way into pages; values go there as they are */

INLINE void turn(const void *from, int64_t at, void *to, int64_t there, const float *cos, const float *sin,
                 int64_t half, int64_t dim, int wide) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = get(from, at + i, wide), b = get(from, at + half + i, wide);
        put(to, there + i, a * cos[i] - b * sin[i], wide);
        put(to, there + half + i, b * cos[i] + a * sin[i], wide);
    }
    for (int64_t i = 2 * half; i < dim; i++) put(to, there + i, get(from, at + i, wide), wide);
}

INLINE void turn_token(void *q, const void *k, const void *v, void *keys, void *values, const float *cos,
                       const float *sin, int64_t t, int64_t slot, const int64_t *n, int wide) {
    for (int64_t h = 0; h < n[R_HEADS]; h++) {
        int64_t at = t * n[R_Q] + h * n[R_Q_HEAD];
        turn(q, at, q, at, cos, sin, n[R_HALF], n[R_DIM], wide);
    }
    int64_t page = slot / n[R_BLOCK] * n[R_PER_BLOCK] + slot % n[R_BLOCK] * n[R_PER_SLOT];
    for (int64_t h = 0; slot >= 0 && h < n[R_KV]; h++) {
        int64_t there = page + h * n[R_PER_HEAD], width = wide ? 4 : 2;
        turn(k, t * n[R_K] + h * n[R_K_HEAD], keys, there, cos, sin, n[R_HALF], n[R_DIM], wide);
        const char *from = (const char *)v + (t * n[R_V] + h * n[R_V_HEAD]) * width;
        memcpy((char *)values + there * width, from, (size_t)(n[R_DIM] * width));
    }
}

void rotary(void *q, const void *k, const void *v, void *keys, void *values, const float *cos, const float *sin,
            const int32_t *positions, const int32_t *slots, const int64_t *n, int64_t tokens, int wide, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + positions[t] * n[R_COS], *s = sin + positions[t] * n[R_COS];
        if (wide) turn_token(q, k, v, keys, values, c, s, t, slots[t], n, 1);
        else turn_token(q, k, v, keys, values, c, s, t, slots[t], n, 0);
    }
}

/* ---- RMSNorm of rows [outer, inner, size], with a sum before it where there is a residual */

INLINE void norm_row(const void *x, int64_t from, const void *residual, const void *weight, void *out, void *summed,
                     int64_t at, int64_t size, float eps, float offset, int wide) {
    const void *y = x;
    float squares = 0;
    if (residual) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            put(summed, at + i, get(x, from + i, wide) + get(residual, at + i, wide), wide);
        y = summed;
        from = at;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++) squares += get(y, from + i, wide) * get(y, from + i, wide);
    float scale = 1 / sqrtf(squares / (float)size + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; i++)
        put(out, at + i, get(y, from + i, wide) * scale * (get(weight, i, wide) + offset), wide);
}

void norm(const void *x, const void *residual, const void *weight, void *out, void *summed, int64_t rows, int64_t inner,
          int64_t size, int64_t per_outer, int64_t per_inner, float eps, float offset, int wide, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        int64_t from = row / inner * per_outer + row % inner * per_inner;
        if (wide) norm_row(x, from, residual, weight, out, summed, row * size, size, eps, offset, 1);
        else norm_row(x, from, residual, weight, out, summed, row * size, size, eps, offset, 0);
    }
}

/* ---- silu(gate) * up, or the tanh form of gelu(gate) * up: x (1 + tanh t) / 2 = x sigmoid(2 t) */

INLINE void gate_row(const void *gate, int64_t g, const void *up, int64_t u, void *out, int64_t at, int64_t size,
                     int gelu, int wide) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        float x = get(gate, g + i, wide), z = gelu ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
        put(out, at + i, x / (1 + power(z * -1.44269504088896f)) * get(up, u + i, wide), wide);
    }
}

void gated(const void *gate, const void *up, void *out, int64_t rows, int64_t size, int64_t per_gate, int64_t per_up,
           int gelu, int wide, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        int64_t g = row * per_gate, u = row * per_up, at = row * size;
        if (gelu && wide) gate_row(gate, g, up, u, out, at, size, 1, 1);
        else if (gelu) gate_row(gate, g, up, u, out, at, size, 1, 0);
        else if (wide) gate_row(gate, g, up, u, out, at, size, 0, 1);
        else gate_row(gate, g, up, u, out, at, size, 0, 0);
    }
}
