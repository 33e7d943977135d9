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

// The embedding's rows of some tokens; hidden (count, width).
void embed(const Model *m, const int64_t *tokens, int64_t count, float *hidden) {
    for (int64_t t = 0; t < count; t++) unpack_row(&m->embedding, tokens[t], hidden + t * m->head.in);
}

// Tokens of one sequence at `position` and behind it; logits after the last `rows` of them. 0, or -1 without memory.
int64_t read_tokens(const Model *m, const int64_t *tokens, int64_t count, const Row *row, int64_t rows, float *logits,
                int64_t threads) {
    int64_t at = row->position * m->shape->dim;
    embed(m, tokens, count, m->hidden);
    return decode_layers(m->layers, m->shape, m->hidden, m->cosine + at, m->sine + at, row, count, threads)
         | head_of(m, count - rows, rows, logits, threads);
}

// The largest, the first of them on a tie; the first NaN where there is one, as PyTorch's argmax. Eight at a time: most
// eights hold nothing larger.
static int64_t argmax(const float *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 0; i < n; i += 8) {
        f32x8 v = load8(x + i, n - i, -INFINITY);
        i32x8 candidates = ~(v <= x[best]);
        int32_t any = 0;
        for (int j = 0; j < 8; j++) any |= candidates[j];
        for (int j = 0; any && j < 8 && i + j < n && x[best] == x[best]; j++)
            if (!(v[j] <= x[best])) best = i + j;
    }
    return best;
}

// ---- a token by chance: sampling.py's `Sampler` in C ---------------------------------------------------------------

typedef struct {
    double temperature, top_p;  // 1: everything
    int64_t top_k;              // the number of tokens: everything
    const double *uniforms;     // of [0, 1), one a token
} Sampling;

// How many of x reach `least`, and their sum.
static double sum_from(const float *x, int64_t n, float least, int64_t *count) {
    double sum = 0;
    *count = 0;
    for (int64_t i = 0; i < n; i += 8) {
        f32x8 v = load8(x + i, n - i, -1);
        i32x8 reach = v >= least;
        float eight = sum8((f32x8)((i32x8)v & reach));
        for (int j = 0; j < 8; j++) *count -= reach[j];
        sum += eight;
    }
    return sum;
}

// The largest `least` from which on there are `top_k` numbers or more, and `mass` or more. Floats that are not negative sort
// as integers do, so 30 halvings find it among all floats from 0 to 1.
static float find_least(const float *x, int64_t n, int64_t top_k, double mass) {
    union { int32_t i; float f; } low = {0}, high = {.f = 1}, middle;
    for (high.i++; high.i - low.i > 1;) {  // the float behind 1: none reaches it
        int64_t count;
        middle.i = low.i + (high.i - low.i) / 2;
        double sum = sum_from(x, n, middle.f, &count);
        if (count >= top_k && sum >= mass) low = middle;
        else high = middle;
    }
    return low.f;
}

// Turns logits into e^((logit - largest) / temperature), keeps the top k, of these the top p, and takes the first token up to
// which `uniform` of their sum is reached. -1 where a logit is NaN or all are -infinity.
static int64_t draw(float *x, int64_t n, const Sampling *s, double uniform) {
    float largest = x[argmax(x, n)], least = 0;
    if (!(fabsf(largest) < INFINITY)) return -1;
    for (int64_t i = 0; i < n; i += LANES)
        store(x + i, exponential((load(x + i, n - i, -INFINITY) - largest) / (float)s->temperature), n - i);
    int64_t count = n, token = 0;
    if (s->top_k < n) least = find_least(x, n, s->top_k, 0);
    double sum = sum_from(x, n, least, &count);
    if (s->top_p < 1) {
        least = fmaxf(least, find_least(x, n, 1, s->top_p * sum));
        sum = sum_from(x, n, least, &count);
    }
    double wanted = uniform * sum, before = 0;
    for (; token + 64 < n; token += 64) {  // 64 at a time as long as they lie before it
        double more = sum_from(x + token, 64, least, &count);
        if (before + more > wanted) break;
        before += more;
    }
    int64_t last = token;
    for (; token < n; token++)
        if (x[token] >= least && x[token] > 0) {
            last = token;
            if ((before += x[token]) > wanted) break;
        }
    return last;
}

// Decoding: reads tokens[0], writes what is chosen after it to tokens[1], reads that … until `count` are written or one is
// among `stops`; without `s` the likeliest. Returns how many were written, the last -1 where nothing can be drawn; -1 without
// memory.
int64_t decode_tokens(const Model *m, int64_t *tokens, int64_t count, const Row *at, const int64_t *stops,
                      int64_t stop_count, const Sampling *s, int64_t threads) {
    Row row = *at;
    for (int64_t made = 0; made < count; row.position++) {
        if (read_tokens(m, tokens + made, 1, &row, 1, m->logits, threads)) return -1;
        int64_t token = s ? draw(m->logits, m->head.out, s, s->uniforms[made]) : argmax(m->logits, m->head.out);
        tokens[++made] = token;
        if (token < 0) return made;
        for (int64_t i = 0; i < stop_count; i++)
            if (token == stops[i]) return made;
    }
    return count;
}
