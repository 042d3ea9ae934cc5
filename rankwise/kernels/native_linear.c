/* Linear layers that share an input, in one call: all first factors, then all second ones; see native_linear.py.
 *
 * Weights are bf16, 8 or 4 bits, inputs and results bf16, sums fp32. A layer is a matrix whose results are outputs, or one
 * whose results are kept, in bf16, as inputs of a second one, or both (pivots). A result goes to the column that `to` names.
 */

#include <omp.h>

#include "native_linear.h"
#include "native_scatter.h"

enum { TILE = 16, TOGETHER = 8 }; /* tokens of a tile; panels that stay in the cache while all tiles pass */

static int64_t panels_of(const Matrix *m) { return (m->rows + LANES - 1) / LANES; }

static int64_t panel_bytes(const Matrix *m) { return m->chunks * m->bits * (VECTOR / 4); }

/* Tokens of the tile that begins at t0, filled up to a size for which there is a function. */
static int padded(int64_t tokens) {
    return tokens > 8 ? 16 : tokens > 4 ? 8 : tokens > 2 ? 4 : (int)tokens;
}

/* Where the tile of token t0 begins, in bytes, if a token has so many chunks. */
static int64_t tile_at(int64_t t0, int64_t chunks) { return t0 * chunks * CHUNK_BYTES; }

/* Rows `[tokens, n]` as tiles, filled up with zeros; this thread's share of the chunks. */
static void tile_inputs(const uint16_t *x, int64_t stride, int64_t n, int64_t tokens, char *tiles) {
    int64_t chunks = (n + CHUNK - 1) / CHUNK, id = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int64_t t0 = 0; t0 < tokens; t0 += TILE) {
        int64_t here = tokens - t0 < TILE ? tokens - t0 : TILE, size = padded(here);
        for (int64_t c = chunks * id / threads; c < chunks * (id + 1) / threads; c++)
            for (int64_t t = 0; t < size; t++) {
                char *to = tiles + tile_at(t0, chunks) + (c * size + t) * CHUNK_BYTES;
                int64_t width = t >= here ? 0 : n - c * CHUNK < CHUNK ? n - c * CHUNK : CHUNK;
                if (width == CHUNK) memcpy(to, x + (t0 + t) * stride + c * CHUNK, CHUNK_BYTES);
                else {
                    memset(to, 0, CHUNK_BYTES);
                    if (width) memcpy(to, x + (t0 + t) * stride + c * CHUNK, (size_t)(2 * width));
                }
            }
    }
}

/* Sums of each group of columns, `[groups, size]`. */
static void add_up(const Matrix *m, const char *tile, int size, float *totals) {
    for (int64_t g = 0; g < m->chunks / m->group; g++)
        for (int t = 0; t < size; t++) {
            float lane[CHUNK] = {0}, sum = 0;
            for (int64_t c = g * m->group; c < (g + 1) * m->group; c++)
#pragma omp simd
                for (int i = 0; i < CHUNK; i++) lane[i] += get(tile + (c * size + t) * CHUNK_BYTES, i, 0);
            for (int i = 0; i < CHUNK; i++) sum += lane[i];
            totals[g * size + t] = sum;
        }
}

typedef struct {
    int64_t tokens;
    const char *tiles; /* inputs */
    int64_t width;     /* chunks of a token's inputs */
    char *kept;        /* results that are inputs of the next stage, in tiles */
    int64_t kept_width;
    uint16_t *y;       /* `[tokens, outputs]` */
    int64_t outputs;
} Pass;

/* Results of one panel for the tile of token t0, `sums[t]`, to where they belong. */
static void store(const Matrix *m, const Pass *pass, int64_t panel, int64_t t0, const Floats *sums, int size) {
    int64_t row = panel * LANES, rows = m->rows - row < LANES ? m->rows - row : LANES;
    int64_t tokens = pass->tokens - t0 < size ? pass->tokens - t0 : size;
    Halves results[TILE];
    for (int t = 0; t < size; t++) results[t] = rounded(sums[t]);
    if (m->keep >= 0) {
        char *kept = pass->kept + tile_at(t0, pass->kept_width) + (m->keep + panel * LANES / CHUNK) * size * CHUNK_BYTES;
        for (int t = 0; t < size; t++) {
            Halves whole = results[t];
            for (int64_t i = rows; i < LANES; i++) whole[i] = 0; /* beside infinite inputs a row of zeros gives NaN */
            memcpy(kept + t * CHUNK_BYTES, &whole, CHUNK_BYTES);
            memcpy(kept + (size + t) * CHUNK_BYTES, (char *)&whole + CHUNK_BYTES, CHUNK_BYTES);
        }
    }
    if (m->out < 0) return;
    if (m->bias) {
        Floats bias = {0};
        for (int64_t i = 0; i < rows; i++) bias[i] = get(m->bias, row + i, 0);
        for (int t = 0; t < size; t++) results[t] = rounded(sums[t] + bias);
    }
    uint16_t *y = pass->y + t0 * pass->outputs + m->out;
    if (m->to) scatter(results, m->to + row, rows, y, pass->outputs, tokens);
    else if (rows == LANES)
        for (int64_t t = 0; t < tokens; t++) memcpy(y + t * pass->outputs + row, results + t, sizeof *results);
    else
        for (int64_t t = 0; t < tokens; t++) memcpy(y + t * pass->outputs + row, results + t, (size_t)(2 * rows));
}

/* sums[p, t] of `count` panels with a tile of `size` tokens. */
static void dot(const Matrix *m, int64_t panel, int count, Scaling how, const char *tile, int size, Floats *sums) {
    int64_t chunks = m->chunks;
    const char *w = m->weights + panel * panel_bytes(m);
    how.scales += m->levels ? panel * (chunks / how.group) * scale_bytes(how) : 0;
#define WITH(P, T)                                                                                                     \
    if (FOUR_BITS && m->bits == 4) dot4(w, chunks, how, tile + t * CHUNK_BYTES, size, sums + t, P, T);                 \
    else if (m->bits == 8) dot8(w, chunks, m->levels, how.scales, tile + t * CHUNK_BYTES, size, sums + t, P, T);       \
    else dot16(w, chunks, tile + t * CHUNK_BYTES, size, sums + t, P, T);
#define CASE(P, T)                                                                                                     \
    if (count == P && tokens == T) { WITH(P, T) }
    int tokens = size < SUMS ? size : SUMS;
    if (m->bits == 4 && tokens > SUMS / 2) tokens = SUMS / 2; /* sums of a group are in registers, too */
    for (int t = 0; t < size; t += tokens, how.totals += how.totals ? tokens : 0) {
        CASE(4, 1) CASE(2, 1) CASE(1, 1) CASE(2, 2) CASE(1, 2) CASE(1, 4)
#if SUMS > 4
        CASE(8, 1) CASE(4, 2) CASE(2, 4) CASE(1, 8)
        if (tokens == 16 && m->bits == 16) dot16(w, chunks, tile, size, sums, 1, 16);
        if (tokens == 16 && m->bits == 8) dot8(w, chunks, m->levels, how.scales, tile, size, sums, 1, 16);
#endif
    }
#undef CASE
#undef WITH
}

/* Panels lo..hi of a matrix, for all tokens. */
static void multiply(const Matrix *m, const Pass *pass, int64_t lo, int64_t hi, float *totals) {
    Scaling how = {.scales = m->scales, .totals = m->shifted ? totals : NULL, .group = m->group, .halves = (int)m->halves};
    how.alone = m->halves && !m->shifted;
    if (m->bits == 4) memcpy(&how.levels, m->levels, sizeof how.levels);
    for (int64_t first = lo; first < hi; first += TOGETHER)
        for (int64_t t0 = 0; t0 < pass->tokens; t0 += TILE) {
            int size = padded(pass->tokens - t0), count = size < SUMS / 2 ? SUMS / 2 / size : 1;
            const char *tile = pass->tiles + tile_at(t0, pass->width) + m->from * size * CHUNK_BYTES;
            if (m->shifted && (first == lo || pass->tokens > TILE)) add_up(m, tile, size, totals);
            for (int64_t panel = first, end = hi - first < TOGETHER ? hi : first + TOGETHER; panel < end; panel += count) {
                Floats sums[TILE];
                while (count > end - panel) count /= 2;
                dot(m, panel, count, how, tile, size, sums);
                for (int p = 0; p < count; p++) store(m, pass, panel + p, t0, sums + p * size, size);
            }
        }
}

/* This thread's share of some matrices, by bytes: the panels that begin in its part of them all. */
static void stage(const Matrix *m, int64_t count, const Pass *pass, float *totals) {
    int64_t id = omp_get_thread_num(), threads = omp_get_num_threads(), all = 0;
    for (int64_t i = 0; i < count; i++) all += panels_of(m + i) * panel_bytes(m + i);
    int64_t from = all * id / threads, to = all * (id + 1) / threads;
    for (int64_t i = 0; i < count; i++) {
        int64_t each = panel_bytes(m + i), panels = panels_of(m + i);
        int64_t lo = from <= 0 ? 0 : (from + each - 1) / each, hi = to <= 0 ? 0 : (to + each - 1) / each;
        multiply(m + i, pass, lo < panels ? lo : panels, hi < panels ? hi : panels, totals);
        from -= panels * each, to -= panels * each;
    }
}

static size_t round_up(size_t bytes) { return (bytes + VECTOR - 1) / VECTOR * VECTOR; }

int linears(const void *x, void *y, const Group *group, int64_t tokens, int64_t stride, int threads) {
    int64_t n = group->inputs, outputs = group->outputs, kept = group->kept, firsts = group->firsts;
    int64_t width = (n + CHUNK - 1) / CHUNK, rows = (tokens + TILE - 1) / TILE * TILE;
    const Matrix *matrices = group->matrices;
    int ready = tokens == 1 && n % CHUNK == 0; /* as it lies */
    size_t inputs = ready ? 0 : round_up((size_t)(rows * width * CHUNK_BYTES)), middle = round_up((size_t)(rows * kept * CHUNK_BYTES));
    size_t each = round_up(sizeof(float) * (size_t)(group->totals * TILE));
    char *scratch = malloc(inputs + middle + each * (size_t)threads + VECTOR);
    if (!scratch) return 1;
    char *first = (char *)round_up((size_t)scratch), *between = first + inputs;
    Pass one = {tokens, ready ? x : first, width, between, kept, y, outputs}, two = {tokens, between, kept, between, kept, y, outputs};
#pragma omp parallel num_threads(threads)
    {
        float *totals = (float *)(between + middle + each * (size_t)omp_get_thread_num());
        if (!ready) {
            tile_inputs(x, stride, n, tokens, first);
#pragma omp barrier
        }
        stage(matrices, firsts, &one, totals);
        if (group->seconds) {
#pragma omp barrier
            stage(matrices + firsts, group->seconds, &two, totals);
        }
    }
    free(scratch);
    return 0;
}

/* Whether matrices in 4 bits can be had. */
int has_four_bits(void) { return FOUR_BITS; }
