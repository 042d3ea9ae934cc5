/* What decoding does between its products, on a CPU: attention over pages, rotary embedding, RMSNorm, gates.
 *
 * PyTorch needs many small operations for each, and a copy of all keys and values for attention. Numbers are bf16
 * (wide = 0) or fp32 (wide = 1), arithmetic is fp32 and rounds once. What a row gives does not depend on the others.
 * Sizes come as one array; strides count elements. See native.py, which compiles this file.
 */

#include "native.h"

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

/* ---- attention of one token a sequence */

INLINE float sum_of(Floats x) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    union { Floats whole; Eight half[2]; } a = {x};
    union { Eight whole; Four half[2]; } b = {a.half[0] + a.half[1]};
    Four c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* Ask for the next block: its rows are too short and too far apart for the processor to see them coming. */
INLINE void fetch(const void *keys, const void *values, int64_t at, const int64_t *n, int64_t count, int64_t dim,
                  int wide) {
    for (int64_t j = 0; j < (count < n[BLOCK] ? count : n[BLOCK]); j++)
        for (int64_t d = 0, width = wide ? 4 : 2; d < dim; d += 64 / width) {
            __builtin_prefetch((const char *)keys + (at + j * n[PER_SLOT] + d) * width);
            __builtin_prefetch((const char *)values + (at + j * n[PER_SLOT] + d) * width);
        }
}

/* Scores of one key for all heads of a group, STEP vectors at a time. */
INLINE void score(const float *queries, const void *keys, int64_t at, float *scores, int64_t count, int64_t group,
                  int64_t dim, int step, int wide) {
    for (int64_t d = 0; d < dim; d += step * LANES) {
        Floats key[8];
        for (int i = 0; i < step; i++) key[i] = lanes(keys, at + d + i * LANES, wide);
        for (int64_t g = 0; g < group; g++) {
            Floats s = key[0] * lanes(queries, g * dim + d, 1);
            for (int i = 1; i < step; i++) s += key[i] * lanes(queries, g * dim + d + i * LANES, 1);
            scores[g * count] = (d ? scores[g * count] : 0) + sum_of(s);
        }
    }
}

/* sums += Σ p[j] values[j] over `keys` keys of one block. */
INLINE void gather(const float *p, const void *values, int64_t at, int64_t per_slot, float *sums, int64_t keys,
                   int64_t dim, int step, int wide) {
    for (int64_t d = 0; d < dim; d += step * LANES) {
        Floats sum[8];
        for (int i = 0; i < step; i++) sum[i] = lanes(sums, d + i * LANES, 1);
        for (int64_t j = 0; j < keys; j++)
            for (int i = 0; i < step; i++) sum[i] += p[j] * lanes(values, at + j * per_slot + d + i * LANES, wide);
        for (int i = 0; i < step; i++) memcpy(sums + d + i * LANES, &sum[i], sizeof sum[i]);
    }
}

/* Scores to e^(score - largest); the inverse of their sum. */
INLINE float soften(float *scores, int64_t count) {
    float top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < count; j++) top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; j++) {
        scores[j] = power((scores[j] - top) * 1.44269504088896f);
        total += scores[j];
    }
    return 1 / total;
}

/* The heads of one sequence that share one key head. `scratch` holds group * (count + 2 * dim) floats. */
INLINE void attend(const void *q, const void *keys, const void *values, const int32_t *table, int64_t first,
                   int64_t length, void *out, float *scratch, const int64_t *n, float scale, int64_t dim, int step,
                   int wide) {
    int64_t group = n[HEADS] / n[KV_HEADS], count = length - first, block = n[BLOCK];
    float *queries = scratch, *sums = queries + group * dim, *scores = sums + group * dim;
    for (int64_t g = 0; g < group; g++)
        for (int64_t d = 0; d < dim; d++) {
            queries[g * dim + d] = get(q, g * n[Q_HEAD] + d, wide) * scale;
            sums[g * dim + d] = 0;
        }
    for (int64_t key = first, end; key < length; key = end) { /* a block at a time */
        end = (key / block + 1) * block < length ? (key / block + 1) * block : length;
        int64_t at = table[key / block] * n[PER_BLOCK] + key % block * n[PER_SLOT];
        if (end < length) fetch(keys, values, table[end / block] * n[PER_BLOCK], n, length - end, dim, wide);
        for (int64_t j = 0; j < end - key; j++)
            score(queries, keys, at + j * n[PER_SLOT], scores + key - first + j, count, group, dim, step, wide);
    }
    for (int64_t g = 0; g < group; g++) queries[g] = soften(scores + g * count, count); /* queries are done with */
    for (int64_t key = first, end; key < length; key = end) {
        end = (key / block + 1) * block < length ? (key / block + 1) * block : length;
        int64_t at = table[key / block] * n[PER_BLOCK] + key % block * n[PER_SLOT];
        for (int64_t g = 0; g < group; g++)
            gather(scores + g * count + key - first, values, at, n[PER_SLOT], sums + g * dim, end - key, dim, step, wide);
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t d = 0; d < dim; d++) put(out, g * dim + d, sums[g * dim + d] * queries[g], wide);
}

/* 0, or 1 where memory ran out. The dimension is a multiple of LANES. */
int decode(const void *q, const void *keys, const void *values, const int32_t *tables, const int32_t *lengths,
           void *out, const int64_t *n, int64_t seqs, float scale, int wide, int threads) {
    int64_t dim = n[DIM], kv_heads = n[KV_HEADS], group = n[HEADS] / kv_heads, width = wide ? 4 : 2, longest = 0;
    int failed = 0;
    for (int64_t s = 0; s < seqs; s++) longest = lengths[s] > longest ? lengths[s] : longest;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scratch = malloc(sizeof(float) * (size_t)(group * (longest + 2 * dim)));
        failed = !scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < seqs * kv_heads; task++) {
            int64_t s = task / kv_heads, head = task % kv_heads, length = lengths[s];
            int64_t first = n[WINDOW] && length > n[WINDOW] ? length - n[WINDOW] : 0;
            char *to = (char *)out + (s * n[HEADS] + head * group) * dim * width;
            const char *from = (const char *)q + (s * n[Q_SEQ] + head * group * n[Q_HEAD]) * width;
            const char *k = (const char *)keys + head * n[PER_HEAD] * width;
            const char *v = (const char *)values + head * n[PER_HEAD] * width;
            const int32_t *table = tables + s * n[TABLE_ROW];
            if (length <= 0) memset(to, 0, (size_t)(group * dim * width));
            else if (!scratch) continue;
            else if (!wide && dim % (4 * LANES) == 0) attend(from, k, v, table, first, length, to, scratch, n, scale, dim, 4, 0);
            else if (!wide) attend(from, k, v, table, first, length, to, scratch, n, scale, dim, 1, 0);
            else if (dim % (4 * LANES) == 0) attend(from, k, v, table, first, length, to, scratch, n, scale, dim, 4, 1);
            else attend(from, k, v, table, first, length, to, scratch, n, scale, dim, 1, 1);
        }
        free(scratch);
    }
    return failed;
}

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
