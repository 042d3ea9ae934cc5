/* All decoder blocks in one call, for decoding and for prompts: the functions of the other files in turn.
 *
 * With few tokens a block is a dozen calls of a few microseconds, and a call from Python costs as much again.
 * See native_blocks.py; numbers are bf16.
 */

#include "native.h"
#include "native_linear.h"

enum { ALONE = 1 << 15 }; /* numbers that one thread works on alone: waking others takes longer */

typedef struct {
    Group qkv, o, gate_up, down;
    const void *norm_mlp, *norm_next;                          /* after attention, and after the MLP */
    const void *norm_q, *norm_k, *norm_attention, *norm_out;   /* or NULL, each */
    const float *cos, *sin;
    void *keys, *values;
    int64_t window; /* 0: all keys are visible */
} Block;

typedef struct {
    int64_t hidden, heads, kv_heads, dim, half, cos_row, block_size, per_block, per_slot, per_head, table_row, longest, gelu;
    int64_t seqs;
    const int32_t *positions, *slots, *tables, *lengths;
    const int32_t *bounds; /* where each sequence's tokens begin; NULL: it brings one */
} Step;

typedef struct {
    uint16_t *x, *stream, *qkv, *mixed, *delta, *gates, *inner; /* of a step's tokens */
} Room;

static int team(int64_t elements, int threads) { return elements <= ALONE ? 1 : threads; }

static int product(const void *x, void *y, const Group *group, int64_t tokens, int threads) {
    return linears(x, y, group, tokens, group->inputs, team(tokens * group->inputs * group->outputs, threads));
}

/* delta, normed where the model does that, joins the stream; x is the sum's norm. */
static void join(const Room *r, const void *before, const void *weight, int64_t size, int64_t tokens, float eps,
                 float offset, int threads) {
    threads = team(tokens * size, threads);
    if (before) norm(r->delta, NULL, before, r->delta, NULL, tokens, 1, size, size, 0, eps, offset, 0, threads);
    norm(r->delta, r->stream, weight, r->x, r->stream, tokens, 1, size, size, 0, eps, offset, 0, threads);
}

static int mixing(const Block *b, const Step *s, const Room *r, int64_t tokens, float eps, float offset, float scale,
                     int threads) {
    int64_t dim = s->dim, row = (s->heads + 2 * s->kv_heads) * dim;
    uint16_t *q = r->qkv, *k = q + s->heads * dim, *v = k + s->kv_heads * dim;
    int few = team(tokens * row, threads);
    if (b->norm_q) {
        /* a norm's results lie side by side, so every token has its own */
        for (int64_t t = 0; t < tokens; t++) {
            norm(q + t * row, NULL, b->norm_q, q + t * row, NULL, s->heads, 1, dim, dim, 0, eps, offset, 0, 1);
            norm(k + t * row, NULL, b->norm_k, k + t * row, NULL, s->kv_heads, 1, dim, dim, 0, eps, offset, 0, 1);
        }
    }
    int64_t turning[ROTARY_SIZES] = {s->heads, s->kv_heads, dim, s->half, s->block_size, row, dim, row, dim, row, dim,
                                     s->cos_row, s->per_block, s->per_slot, s->per_head};
    rotary(q, k, v, b->keys, b->values, b->cos, b->sin, s->positions, s->slots, turning, tokens, 0, few);
    int64_t sizes[ATTENTION_SIZES] = {s->heads, s->kv_heads, dim, s->block_size, b->window, row, dim,
                                      s->per_block, s->per_slot, s->per_head, s->table_row};
    int many = team(tokens * s->longest * s->kv_heads * dim, threads);
    return attention(q, b->keys, b->values, s->tables, s->lengths, s->bounds, r->mixed, sizes, s->seqs, tokens, scale, 0,
                     many);
}

static int run(const Block *b, const Step *s, const Room *r, int64_t tokens, float eps, float offset, float scale,
               int threads) {
    int failed = product(r->x, r->qkv, &b->qkv, tokens, threads);
    failed |= mixing(b, s, r, tokens, eps, offset, scale, threads);
    failed |= product(r->mixed, r->delta, &b->o, tokens, threads);
    join(r, b->norm_attention, b->norm_mlp, s->hidden, tokens, eps, offset, threads);
    failed |= product(r->x, r->gates, &b->gate_up, tokens, threads);
    int64_t inner = b->down.inputs;
    gated(r->gates, r->gates + inner, r->inner, tokens, inner, 2 * inner, 2 * inner, (int)s->gelu, 0,
          team(tokens * inner, threads));
    failed |= product(r->inner, r->delta, &b->down, tokens, threads);
    join(r, b->norm_out, b->norm_next, s->hidden, tokens, eps, offset, threads);
    return failed;
}

/* x, stream: `[tokens, hidden]`, before the first block and after the last. 0, or 1 where memory ran out. */
int blocks(void *x, void *stream, const Block *list, const Step *step, int64_t count, int64_t tokens, float eps,
           float offset, float scale, int threads) {
    int64_t heads = step->heads * step->dim, row = heads + 2 * step->kv_heads * step->dim, inner = 0;
    for (int64_t i = 0; i < count; i++) inner = list[i].down.inputs > inner ? list[i].down.inputs : inner;
    uint16_t *room = malloc(sizeof *room * (size_t)(tokens * (row + heads + step->hidden + 3 * inner)));
    if (!room) return 1;
    Room r = {.x = x, .stream = stream, .qkv = room};
    r.mixed = r.qkv + tokens * row;
    r.delta = r.mixed + tokens * heads;
    r.gates = r.delta + tokens * step->hidden;
    r.inner = r.gates + 2 * tokens * inner;
    int failed = 0;
    for (int64_t i = 0; i < count && !failed; i++) failed = run(list + i, step, &r, tokens, eps, offset, scale, threads);
    free(room);
    return failed;
}
