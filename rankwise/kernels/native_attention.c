/* Attention over pages, on a CPU: the heads of each token to the keys of its sequence up to it.
 *
 * Decoding and prompts alike, so a token's result depends on nothing but its own keys: neither on the other tokens of
 * the step nor on how its prompt was cut. Products and sums are fp32, and rounded once. Heads that share keys go
 * together. See native.py for sizes; strides count elements.
 */

#include "native.h"

enum { MANY = 16, HEADS_AT_ONCE = 4 }; /* keys scored together; heads whose sums are in registers */
enum { TASK_BYTES = 1024 };            /* of a key row that one task reads, or a little more */

typedef struct {
    const int32_t *table;
    int64_t first, length; /* visible keys */
    int64_t block, per_block, per_slot, per_head;
    int64_t heads, group, q_head, dim; /* key heads; heads that share each */
    int cold; /* nobody else has read these keys just now */
} Span;

INLINE int64_t place(const Span *s, int64_t key) {
    return s->table[key / s->block] * s->per_block + key % s->block * s->per_slot;
}

/* The end of keys that lie side by side, from one on, MANY at most. */
INLINE int64_t end_of(const Span *s, int64_t key) {
    int64_t end = (key / s->block + 1) * s->block;
    end = end < s->length ? end : s->length;
    return end < key + MANY ? end : key + MANY;
}

INLINE int64_t padded(const Span *s) { return (s->length - s->first + 2 * MANY) / MANY * MANY; }

/* sum + a b, by lanes: of 16 numbers in fp32, of 32 in bf16 */
INLINE Floats products(Floats sum, Words a, Words b, int wide) {
    if (wide) return sum + (Floats)a * (Floats)b;
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (Floats)(a << 16) * (Floats)(b << 16);
    return sum + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

INLINE Floats merged(Floats a, Floats b, Words some, Words others) {
    return __builtin_shuffle(a, b, some) + __builtin_shuffle(a, b, others);
}

/* Lane j: the sum of v[j]. Each level halves the number of vectors. */
INLINE Floats sums_of(Floats *v) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v[i] = merged(v[2 * i], v[2 * i + 1], (Words){0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29},
                      (Words){2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        v[i] = merged(v[2 * i], v[2 * i + 1], (Words){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                      (Words){2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
    for (int i = 0; i < 2; i++)
        v[i] = merged(v[2 * i], v[2 * i + 1], (Words){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                      (Words){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    return merged(v[0], v[1], (Words){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27},
                  (Words){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
}

/* Dot products of a head with MANY keys. */
INLINE Floats score(const char *q, const char *const *keys, int64_t dim, int wide) {
    Floats v[MANY] = {{0}};
    int64_t bytes = dim * (wide ? 4 : 2), at = 0;
    for (; at + (int64_t)sizeof(Words) <= bytes; at += sizeof(Words)) {
        Words a, b;
        memcpy(&a, q + at, sizeof a);
#pragma GCC unroll 16
        for (int j = 0; j < MANY; j++) {
            memcpy(&b, keys[j] + at, sizeof b);
            v[j] = products(v[j], a, b, wide);
        }
    }
    for (int j = 0; at < bytes && j < MANY; j++) { /* 16 numbers in bf16 are left */
        Words a = {0}, b = {0};
        memcpy(&a, q + at, sizeof(Halves));
        memcpy(&b, keys[j] + at, sizeof(Halves));
        v[j] = products(v[j], a, b, wide);
    }
    return sums_of(v);
}

/* Ask for the next keys and values: pages lie anywhere, so the processor does not see them coming. */
INLINE void fetch(const Span *s, const char *keys, const char *values, int64_t key, int wide) {
    int64_t width = wide ? 4 : 2, at = place(s, key) * width, end = end_of(s, key);
    for (; key < end; key++, at += s->per_slot * width)
        for (int64_t h = 0; h < s->heads; h++)
            for (int64_t d = 0, from = at + h * s->per_head * width; d < s->dim * width; d += 64) {
                __builtin_prefetch(keys + from + d);
                __builtin_prefetch(values + from + d, 0, 2);
            }
}

/* Scores to 2^(factor (score - largest)); the inverse of their sum. */
INLINE float soften(float *scores, int64_t count, float factor) {
    float top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < count; j++) top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; j++) {
        scores[j] = power((scores[j] - top) * factor);
        total += scores[j];
    }
    return 1 / total;
}

/* STEP vectors of the output of some heads, from dimension d on. */
INLINE void gather(const Span *s, const char *values, const float *p, const float *inverse, char *out, int64_t d,
                   const int heads, const int step, int wide) {
    Floats sums[4 * HEADS_AT_ONCE];
    int64_t row = padded(s);
#pragma GCC unroll 16
    for (int i = 0; i < heads * step; i++) sums[i] = (Floats){0};
    for (int64_t key = s->first, end; key < s->length; key = end) {
        end = end_of(s, key);
        int64_t at = place(s, key) + d;
        for (int64_t j = key - s->first; j < end - s->first; j++, at += s->per_slot) {
            Floats value[4];
#pragma GCC unroll 4
            for (int i = 0; i < step; i++) value[i] = lanes(values, at + i * LANES, wide);
#pragma GCC unroll 4
            for (int g = 0; g < heads; g++)
#pragma GCC unroll 4
                for (int i = 0; i < step; i++) sums[g * step + i] += p[g * row + j] * value[i];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < heads * step; i++) {
        Floats whole = sums[i] * inverse[i / step];
        Halves half = rounded(whole);
        int64_t at = i / step * s->dim + d + i % step * LANES;
        if (wide) memcpy((float *)out + at, &whole, sizeof whole);
        else memcpy((uint16_t *)out + at, &half, sizeof half);
    }
}

/* Scores of all heads, `[heads * group, padded]`. */
INLINE void score_all(const Span *s, const char *q, const char *keys, const char *values, float *scores, int wide) {
    int64_t width = wide ? 4 : 2;
    for (int64_t key = s->first, end; key < s->length; key = end) {
        end = end_of(s, key);
        if (s->cold && end < s->length) fetch(s, keys, values, end, wide);
        for (int64_t h = 0; h < s->heads; h++) {
            const char *from = keys + (place(s, key) + h * s->per_head) * width, *rows[MANY];
            for (int64_t j = 0; j < MANY; j++) /* past the end the last one once more */
                rows[j] = from + (j < end - key ? j : end - key - 1) * s->per_slot * width;
            for (int64_t g = h * s->group; g < (h + 1) * s->group; g++) {
                Floats found = score(q + g * s->q_head * width, rows, s->dim, wide);
                memcpy(scores + g * padded(s) + key - s->first, &found, sizeof found);
            }
        }
    }
}

/* Some key heads of one token. `scratch`: heads * group * (padded + 1) floats. */
INLINE void attend(const Span *s, const char *q, const char *keys, const char *values, char *out, float *scratch,
                   float factor, const int step, int wide) {
    int64_t width = wide ? 4 : 2, row = padded(s), all = s->heads * s->group;
    float *inverse = scratch, *scores = scratch + all;
    score_all(s, q, keys, values, scores, wide);
    for (int64_t g = 0; g < all; g++) inverse[g] = soften(scores + g * row, s->length - s->first, factor);
    for (int64_t g = 0, some; g < all; g += some) {
        int64_t head = g / s->group, left = (head + 1) * s->group - g;
        const char *from = values + head * s->per_head * width;
        some = left < HEADS_AT_ONCE ? left : HEADS_AT_ONCE;
        char *to = out + g * s->dim * width;
        for (int64_t d = 0; d < s->dim; d += step * LANES) {
#define CASE(N) if (some == N) gather(s, from, scores + g * row, inverse + g, to, d, N, step, wide);
            CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
        }
    }
}

/* The sequence of a token, and in `length` its keys; -1 for padding. */
static int64_t owner(int64_t token, const int32_t *bounds, const int32_t *lengths, int64_t seqs, int64_t *length) {
    int64_t low = 0, high = seqs;
    *length = bounds ? 0 : lengths[token];
    if (!bounds) return token;
    if (token >= bounds[seqs] || token < bounds[0]) return -1;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (bounds[middle] <= token) low = middle;
        else high = middle;
    }
    *length = lengths[low] - (bounds[low + 1] - 1 - token);
    return low;
}

/* bounds: `[seqs + 1]`, where each sequence's tokens begin, its last ones; NULL: it brings one. The dimension is a
 * multiple of LANES. 0, or 1 where memory ran out. */
int attention(const void *q, const void *keys, const void *values, const int32_t *tables, const int32_t *lengths,
              const int32_t *bounds, void *out, const int64_t *n, int64_t seqs, int64_t tokens, float scale, int wide,
              int threads) {
    int64_t dim = n[DIM], kv_heads = n[KV_HEADS], group = n[HEADS] / kv_heads, width = wide ? 4 : 2, longest = 0;
    int64_t most = tokens < threads ? 1 : 1 + (TASK_BYTES - 1) / (dim * width), tasks = (kv_heads + most - 1) / most;
    int failed = 0;
    for (int64_t s = 0; s < seqs; s++) longest = lengths[s] > longest ? lengths[s] : longest;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scratch = malloc(sizeof(float) * (size_t)(most * group * (longest + 2 * MANY + 1)));
        failed = !scratch;
#pragma omp for schedule(dynamic, bounds ? 8 : 1)
        for (int64_t task = 0; task < tokens * tasks; task++) {
            int64_t token = task / tasks, head = task % tasks * most, length;
            int64_t s = owner(token, bounds, lengths, seqs, &length);
            int64_t heads = kv_heads - head < most ? kv_heads - head : most, first = token * n[HEADS] + head * group;
            char *to = (char *)out + first * dim * width;
            const char *from = (const char *)q + (token * n[Q_SEQ] + head * group * n[Q_HEAD]) * width;
            const char *k = (const char *)keys + head * n[PER_HEAD] * width;
            const char *v = (const char *)values + head * n[PER_HEAD] * width;
            Span span = {tables + s * n[TABLE_ROW], n[WINDOW] && length > n[WINDOW] ? length - n[WINDOW] : 0, length,
                         n[BLOCK], n[PER_BLOCK], n[PER_SLOT], n[PER_HEAD], heads, group, n[Q_HEAD], dim, !bounds};
            if (length <= 0) memset(to, 0, (size_t)(heads * group * dim * width));
            else if (!scratch) continue;
            else if (!wide && dim % (4 * LANES) == 0) attend(&span, from, k, v, to, scratch, scale * LOG2E, 4, 0);
            else if (!wide) attend(&span, from, k, v, to, scratch, scale * LOG2E, 1, 0);
            else if (dim % (4 * LANES) == 0) attend(&span, from, k, v, to, scratch, scale * LOG2E, 4, 1);
            else attend(&span, from, k, v, to, scratch, scale * LOG2E, 1, 1);
        }
        free(scratch);
    }
    return failed;
}
