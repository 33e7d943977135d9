// A whole token: its row of the embedding, all layers (steps.c), the last norm, the head, the choice. So a token costs
// one call from Python, and greedy decoding one for many tokens. Compiled together with kernels.c and steps.c.

typedef struct {
    const Layer *layers;
    const Shape *shape;
    Weight embedding, head;
    const float *final_gain, *cosine, *sine;  // of all positions, (max_length, dim)
    float *hidden, *normed, *logits;          // (rows, width), (rows, width), (1, vocab)
} Model;

// Row r of a weight in floats: scale * (code - zero), as `PackedWeight.dequantize`.
static void unpack_row(const Weight *w, int64_t r, float *y) {
    if (w->bits == 32) {
        memcpy(y, (const float *)w->codes + r * w->in, w->in * sizeof(float));
        return;
    }
    int64_t tile = r / ROWS, lane = r % ROWS, groups = (w->padded + w->group - 1) / w->group;
    const uint8_t *codes = w->codes + tile * w->padded * w->bits + 4 * lane;
    for (int64_t k = 0; k < w->in; k++) {
        int64_t in_chunk = k % CHUNK, parameter = (tile * groups + k / w->group) * ROWS + lane;
        uint8_t byte = codes[k / CHUNK * CHUNK * w->bits + in_chunk / 4 % w->bits * 32 + k % 4];
        int code = w->bits == 8 ? byte : in_chunk < 16 ? byte & 15 : byte >> 4;
        y[k] = w->scales[parameter] * ((float)code - (w->zeros ? w->zeros[parameter] : w->bits == 8 ? 128 : 8));
    }
}

// The last norm and the head for some rows of m->hidden from `first` on; logits (rows, vocab).
int64_t head_of(const Model *m, int64_t first, int64_t rows, float *logits, int64_t threads) {
    int64_t width = m->head.in;
    for (int64_t r = 0; r < rows; r++)
        rms_norm(m->hidden + (first + r) * width, m->final_gain, m->normed + r * width, width, m->shape->eps);
    return packed_linear(&m->head, m->normed, logits, rows, threads);
}

// Tokens of one sequence at `position` and behind it; logits after the last `rows` of them. 0, or -1 without memory.
int64_t read_tokens(const Model *m, const int64_t *tokens, int64_t count, const Row *row, int64_t rows, float *logits,
                int64_t threads) {
    int64_t width = m->head.in, at = row->position * m->shape->dim;
    for (int64_t t = 0; t < count; t++) unpack_row(&m->embedding, tokens[t], m->hidden + t * width);
    return decode_layers(m->layers, m->shape, m->hidden, m->cosine + at, m->sine + at, row, count, threads)
         | head_of(m, count - rows, rows, logits, threads);
}

// The largest, the first of them on a tie; the first NaN where there is one, as PyTorch's argmax.
static int64_t argmax(const float *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n && x[best] == x[best]; i++)
        if (!(x[i] <= x[best])) best = i;
    return best;
}

// Greedy decoding: reads tokens[0], writes what follows it to tokens[1], reads that … until `count` are written or one
// is among `stops`. Returns how many were written; -1 without memory.
int64_t decode_greedily(const Model *m, int64_t *tokens, int64_t count, const Row *at, const int64_t *stops,
                        int64_t stop_count, int64_t threads) {
    Row row = *at;
    for (int64_t made = 0; made < count; row.position++) {
        if (read_tokens(m, tokens + made, 1, &row, 1, m->logits, threads)) return -1;
        tokens[++made] = argmax(m->logits, m->head.out);
        for (int64_t i = 0; i < stop_count; i++)
            if (tokens[made] == stops[i]) return made;
    }
    return count;
}
