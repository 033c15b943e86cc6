/* The sweeps of AGD's step over float32 weights. A tensor, a weight or a part of one, is (outer, K,
 * inner) in memory, of K blocks. With inner = 1 it is cut into periods, rows of a multiple of K
 * numbers, else into runs of `inner` numbers of one block. Sums have a fixed order, whatever the
 * number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Vectors as wide as the processor's: compilers make much less of wider ones. */
#if defined(__AVX512F__)
enum { LANES = 8 };
#define WIDENED(g) _mm512_cvtps_pd(_mm256_loadu_ps(g))
#elif defined(__AVX2__)
enum { LANES = 4 };
#define WIDENED(g) _mm256_cvtps_pd(_mm_loadu_ps(g))
#else
enum { LANES = 2 };
#define WIDENED(g) (doubles){(g)[0], (g)[1]}
#endif
enum { WIDEST = 1024, AHEAD = 2048 }; /* numbers of a period at most; of a prefetch */
typedef double doubles __attribute__((vector_size(8 * LANES), may_alias));

/* weight: its place among the addresses; at: where it begins there; first: the place of its first
 * block. */
struct tensor { int64_t weight, at, K, inner, period, first; };
struct chunk { int64_t tensor, start, end, partial; }; /* partial: the place of its K sums */

struct plan {
    const struct tensor *tensors;
    const struct chunk *chunks;
    float *const *targets, *const *directions;
    double *partials, *factors;
    const int64_t *bounds; /* thread i takes chunks bounds[i] to bounds[i + 1] */
    int64_t threads, blocks, updating;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*thread)(void), (*team)(void);
};

/* Squares in double: none over- or underflows, and their sum is exact to float32's precision. A
 * loop that only reads waits for memory, so it asks for what is AHEAD. */
static void squares_of_a_run(const float *g, int64_t n, doubles *sum)
{
    doubles s[32 / LANES] = {*sum};
    if (n >= 4096) { /* four streams, each of which the processor prefetches */
        int64_t m = n / 4 / 32 * 32;
        for (const float *end = g + m; g < end; g += 16)
            for (int i = 0; i < 64 / LANES; i++) {
                doubles x = WIDENED(g + i / (16 / LANES) * m + i % (16 / LANES) * LANES);
                s[i % (32 / LANES)] += x * x;
            }
        g += 3 * m;
        n -= 4 * m;
    }
    for (; n >= 32; n -= 32, g += 32) {
        __builtin_prefetch(g + AHEAD);
        __builtin_prefetch(g + AHEAD + 16);
        for (int i = 0; i < 32 / LANES; i++) {
            doubles x = WIDENED(g + LANES * i);
            s[i] += x * x;
        }
    }
    for (int i = 1; i < 32 / LANES; i++)
        s[0] += s[i];
    for (int i = 0; n > 0; n--, g++, i = (i + 1) % LANES)
        s[0][i] += (double)*g * *g;
    *sum = s[0];
}

static void squares_of_periods(const float *g, int64_t n, int64_t period, double *sum)
{
    for (; n > 0; n -= period, g += period) {
        int64_t m = n < period ? n : period, j = 0;
        for (; j <= m - 16; j += 16) {
            __builtin_prefetch(g + AHEAD + j);
            for (int i = 0; i < 16; i += LANES) {
                doubles x = WIDENED(g + j + i);
                *(doubles *)(sum + j + i) += x * x;
            }
        }
        for (; j < m; j++)
            sum[j] += (double)g[j] * g[j];
    }
}

static int64_t end_of_run(const struct tensor *t, const struct chunk *c, int64_t i)
{
    int64_t end = (i / t->inner + 1) * t->inner;
    return end < c->end ? end : c->end;
}

static void squares(const struct plan *p, const struct chunk *c)
{
    const struct tensor *t = p->tensors + c->tensor;
    const float *g = p->directions[t->weight] + t->at;
    double *out = p->partials + c->partial;
    memset(out, 0, t->K * sizeof *out);
    if (t->K == 1) { /* short ones are many: rows of an embedding */
        doubles sum = {0};
        squares_of_a_run(g + c->start, c->end - c->start, &sum);
        for (int j = 0; j < LANES; j++)
            out[0] += sum[j];
        return;
    }
    if (t->inner == 1) {
        _Alignas(64) double sum[WIDEST] = {0};
        squares_of_periods(g + c->start, c->end - c->start, t->period, sum);
        for (int64_t j = 0; j < t->period; j += t->K)
            for (int64_t k = 0; k < t->K; k++)
                out[k] += sum[j + k];
        return;
    }
    doubles sum[WIDEST];
    memset(sum, 0, t->K * sizeof *sum);
    for (int64_t i = c->start, end; i < c->end; i = end) {
        end = end_of_run(t, c, i);
        squares_of_a_run(g + i, end - i, sum + i / t->inner % t->K);
    }
    for (int64_t k = 0; k < t->K; k++)
        for (int j = 0; j < LANES; j++)
            out[k] += sum[k][j];
}

/* Float32 holds such factors with all digits. Other factors take doubles; 0, infinity and NaN leave
 * every bit: -0 - -0 would be 0. */
static int in_range(double factor) { return factor > 0x1p-100 && factor < 0x1p100; }
static int moves(double factor) { return factor > 0 && factor < INFINITY; }

static inline void update_run(float *restrict w, const float *restrict g, int64_t start,
                              int64_t end, double factor)
{
    float narrow = (float)factor;
    if (in_range(factor))
        for (int64_t j = start; j < end; j++)
            w[j] -= narrow * g[j];
    else if (moves(factor))
        for (int64_t j = start; j < end; j++)
            w[j] = (float)(w[j] - factor * g[j]);
}

static void update(const struct plan *p, const struct chunk *c)
{
    const struct tensor *t = p->tensors + c->tensor;
    const double *factors = p->factors + t->first;
    float *restrict w = p->targets[t->weight] + t->at;
    const float *restrict g = p->directions[t->weight] + t->at;
    if (t->inner > 1) {
        for (int64_t i = c->start, end; i < c->end; i = end) {
            end = end_of_run(t, c, i);
            update_run(w, g, i, end, factors[i / t->inner % t->K]);
        }
        return;
    }
    int fast = 1;
    double wide[WIDEST];
    float narrow[WIDEST];
    for (int64_t k = 0; k < t->K; k++)
        fast &= in_range(factors[k]);
    for (int64_t j = 0; j < t->period; j += t->K)
        for (int64_t k = 0; k < t->K; k++)
            narrow[j + k] = (float)(wide[j + k] = factors[k]);
    for (int64_t i = c->start; i < c->end; i += t->period) {
        int64_t n = c->end - i < t->period ? c->end - i : t->period;
        float *restrict x = w + i;
        const float *restrict y = g + i;
        if (fast)
            for (int64_t j = 0; j < n; j++)
                x[j] -= narrow[j] * y[j];
        else
            for (int64_t j = 0; j < n; j++)
                x[j] = moves(wide[j]) ? (float)(x[j] - wide[j] * y[j]) : x[j];
    }
}

/* The chunks of a thread. A team may be smaller than was asked for. Updates go backwards: what was
 * read last is still in the cache. */
static void share(void *plan)
{
    const struct plan *p = plan;
    int team = p->threads > 1 ? p->team() : 1;
    for (int64_t i = p->threads > 1 ? p->thread() : 0; i < p->threads; i += team)
        for (int64_t c = p->bounds[i], last = p->bounds[i + 1] - 1; c <= last; c++)
            if (p->updating)
                update(p, p->chunks + p->bounds[i] + last - c);
            else
                squares(p, p->chunks + c);
}

static void sweep(struct plan *p, int updating)
{
    p->updating = updating;
    if (p->threads > 1)
        p->parallel(share, p, p->threads, 0);
    else
        share(p);
}

/* Frobenius norms of the blocks of `directions`. */
void norms(struct plan *p, double *out)
{
    sweep(p, 0);
    memset(out, 0, p->blocks * sizeof *out);
    for (const struct chunk *c = p->chunks; c < p->chunks + p->bounds[p->threads]; c++) {
        const struct tensor *t = p->tensors + c->tensor;
        for (int64_t k = 0; k < t->K; k++)
            out[t->first + k] += p->partials[c->partial + k];
    }
    for (int64_t i = 0; i < p->blocks; i++)
        out[i] = sqrt(out[i]);
}

/* targets -= factors * directions */
void subtract(struct plan *p) { sweep(p, 1); }

/* As _middle in agd.py, whose small tensors would take longer. */
void middle(int64_t blocks, const double *scales, const double *norms, double *G, double *eta,
            double *factors)
{
    *G = 0;
    for (int64_t i = 0; i < blocks; i++)
        *G += scales[i] * norms[i];
    *eta = log1p(*G / (sqrt(*G + 0.25) + 0.5));
    for (int64_t i = 0; i < blocks; i++)
        factors[i] = scales[i] * *eta / norms[i];
}
