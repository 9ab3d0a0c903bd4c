/* The work itself, included by fused.c once for each number type and instruction set. Defines run_<suffix>.

   Shapes, row-major:  T tasks and N support rows of a chunk (N: query rows where said), F features of a support row, of which
   the global block reads the first C; H hidden and D embedding width; G, P widths of the global block's hidden layers.
   Rows are padded to whole cache lines: f, h, d, g, p are these widths padded; padding is 0 and stays 0.

   A chunk is some tasks whose rows stand one after the other without padding, so that products with shared weights are large
   enough, and everything they make stays in the second cache. Every number of a row or task is summed in an order that depends
   on this task alone. One file of 500 lines, because forward and backward read the same arrays in the same order. */

#if DOUBLE
typedef double NAME(real);
#define EXP exp
#define LOG1P log1p
#else
typedef float NAME(real);
#define EXP expf
#define LOG1P log1pf
#endif
typedef NAME(real) NAME(vec) __attribute__((vector_size(VECTOR_BYTES)));
typedef struct NAME(Work) NAME(Work);
#define real NAME(real)
#define vec NAME(vec)
#define Work NAME(Work)
#define LANES ((long)(VECTOR_BYTES / sizeof(real)))
#define UNIT (64 / VECTOR_BYTES) /* vectors in a cache line */
#define STATIC static __attribute__((noinline))

struct Work {
    const Call *call;
    long C, F, H, D, G, P, f, h, d, g, p, T, N, steps, kept; /* kept: whether each step's rows are stored */
    long first;       /* number of the chunk's first task */
    const long *off;  /* (T + 1) where each task's rows begin */
    real *m1, *b1, *m2, *m2t, *b2, *empty, *wx, *we, *wet, *c1, *w2, *w2t, *c2, *w3, *c3;
    real *g_m1, *g_b1, *g_m2, *g_b2, *g_empty, *g_wx, *g_we, *g_c1, *g_w2, *g_c2, *g_w3, *g_c3;
    real *x_NF, *y_N, *kernel, *base_NH, *first_NG, *minus_NH; /* minus: - (sum of the D_k so far) */
    real *hidden_NH, *h1_NG, *h2_NP, *slope_NG, *prob_N;       /* of every step, if kept */
    real *pooled_TH, *e_TD, *u_TG, *g_TD;                      /* of every step */
    real *t_NG, *t_NP, *t_TG, *t_TH, *t_FH, *z_N;              /* of the moment */
    real *by_e_TD, *by_g_TD, *by_pooled_TH, *by_first_NG, *by_z_NH, *t_NH;
};

/* ---- products: c = init + a b, where a is (m, k) with strides ra, ca and b, c have whole cache lines as rows */

static inline __attribute__((always_inline)) void NAME(tile)(const int rows, const int vectors, long k, const real *a, long ra,
                                                             long ca, const real *b, long ldb, const real *init, long ldi,
                                                             real *c, long ldc) {
    vec acc[TILE_ROWS][2 * UNIT], line[2 * UNIT];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            acc[i][j] = init ? *(const vec *)(init + i * ldi + j * LANES) : (vec){0};
    for (long at = 0; at < k; at++, a += ca, b += ldb) {
        for (int j = 0; j < vectors; j++) line[j] = *(const vec *)(b + j * LANES);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++) acc[i][j] += a[i * ra] * line[j];
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) *(vec *)(c + i * ldc + j * LANES) = acc[i][j];
}

#define ROWS_CASE(n) \
    case n: NAME(tile)(n, vectors, k, a, ra, ca, b, ldb, init, ldi, c, ldc); break

static inline __attribute__((always_inline)) void NAME(panel)(const int vectors, long m, long k, const real *a, long ra, long ca,
                                                              const real *b, long ldb, const real *init, long ldi, real *c,
                                                              long ldc) {
    /* Even blocks: nine rows as 5 + 4, since 8 + 1 would wait for one row's additions. */
    for (long blocks = (m + TILE_ROWS - 1) / TILE_ROWS; blocks > 0; blocks--) {
        long rows = (m + blocks - 1) / blocks;
        switch (rows) {
            ROWS_CASE(1);
            ROWS_CASE(2);
#if TILE_ROWS > 2
            ROWS_CASE(3);
            ROWS_CASE(4);
#endif
#if TILE_ROWS > 4
            ROWS_CASE(5);
            ROWS_CASE(6);
#endif
#if TILE_ROWS > 6
            ROWS_CASE(7);
            ROWS_CASE(8);
#endif
        }
        m -= rows, a += rows * ra, c += rows * ldc, init = init ? init + rows * ldi : init;
    }
}

STATIC void NAME(gemm)(long m, long n, long k, const real *a, long ra, long ca, const real *b, const real *init, long ldi,
                       real *c) {
    long at = 0;
    for (; at + TILE_UNITS * UNIT * LANES <= n; at += TILE_UNITS * UNIT * LANES)
        NAME(panel)(TILE_UNITS * UNIT, m, k, a, ra, ca, b + at, n, init ? init + at : init, ldi, c + at, n);
    for (; at < n; at += UNIT * LANES)
        NAME(panel)(UNIT, m, k, a, ra, ca, b + at, n, init ? init + at : init, ldi, c + at, n);
}

/* c (m, n) = init + a (m, k) b (k, n); init is one row for all, a matrix (ldi = n), or NULL. */
#define PRODUCT(m, n, k, a, lda, b, init, ldi, c) NAME(gemm)(m, n, k, a, lda, 1, b, init, ldi, c)
/* sum (I, n) += x (rows, I)^T y (rows, n) */
#define ADD_OUTER(rows, I, n, x, ldx, y, sum) NAME(gemm)(I, n, rows, x, 1, ldx, y, sum, n, sum)

/* ---- vectors of n numbers, n whole cache lines */

static inline real NAME(dot)(long n, const real *x, const real *y) {
    vec sum[UNIT] = {{0}};
    for (long i = 0; i < n; i += UNIT * LANES)
        for (int j = 0; j < UNIT; j++) sum[j] += *(const vec *)(x + i + j * LANES) * *(const vec *)(y + i + j * LANES);
    real total = 0;
    for (int j = 0; j < UNIT; j++)
        for (int lane = 0; lane < LANES; lane++) total += sum[j][lane];
    return total;
}

static inline void NAME(axpy)(long n, real scale, const real *restrict x, real *restrict y) {
    for (long i = 0; i < n; i++) y[i] += scale * x[i];
}

static inline void NAME(axpy_where_on)(long n, real scale, const real *restrict x, const real *restrict on, real *restrict y) {
    for (long i = 0; i < n; i++) y[i] += on[i] > 0 ? scale * x[i] : 0;
}

static inline void NAME(where_on)(long n, const real *restrict x, const real *restrict on, real *restrict y) {
    for (long i = 0; i < n; i++) y[i] = on[i] > 0 ? x[i] : 0;
}

/* Lets NaN through, as torch's does. */
static inline void NAME(relu)(long n, real *restrict x) {
    for (long i = 0; i < n; i++) x[i] = x[i] < 0 ? 0 : x[i];
}

static inline void NAME(sum_rows)(long rows, long n, const real *restrict x, real *restrict sum) {
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < n; i++) sum[i] += x[r * n + i];
}

#define gemm NAME(gemm)
#define dot NAME(dot)
#define axpy NAME(axpy)
#define axpy_where_on NAME(axpy_where_on)
#define where_on NAME(where_on)
#define relu NAME(relu)
#define sum_rows NAME(sum_rows)
#define ROWS_OF(t) (w->off[(t) + 1] - w->off[t])
#define PER_TASK(name, t) (((const real *)w->call->name)[w->first + (t)])

/* ---- the inner loop */

/* out (S, H) = init + K in, with K = sw1 X X^T + sb1; by K where the task is short, else by X (X^T in). */
static void NAME(times_kernel)(const Work *w, long t, const real *in, const real *init, real *out) {
    long S = ROWS_OF(t), at = w->off[t];
    if (S <= w->F) {
        PRODUCT(S, w->h, S, w->kernel + at * w->f, w->f, in, init, w->h, out);
        return;
    }
    real sw1 = PER_TASK(sw1, t), sb1 = PER_TASK(sb1, t), *sum = w->t_FH + w->F * w->h;
    memset(sum, 0, w->h * sizeof(real));
    sum_rows(S, w->h, in, sum);
    NAME(gemm)(w->F, w->h, S, w->x_NF + at * w->f, 1, w->f, in, NULL, 0, w->t_FH);
    for (long i = 0; i < w->F * w->h; i++) w->t_FH[i] *= sw1;
    PRODUCT(S, w->h, w->F, w->x_NF + at * w->f, w->f, w->t_FH, init, w->h, out);
    for (long r = 0; r < S; r++) axpy(w->h, sb1, sum, out + r * w->h);
}

static void NAME(make_kernel)(Work *w, long t) {
    long S = ROWS_OF(t), at = w->off[t], padded = PAD(S), f = w->f;
    const real *x = w->x_NF + at * f;
    real sw1 = PER_TASK(sw1, t), sb1 = PER_TASK(sb1, t), *xt = w->t_FH, *made = xt + w->F * padded, *kernel = w->kernel + at * f;
    if (S > w->F) return;
    for (long i = 0; i < w->F; i++)
        for (long r = 0; r < padded; r++) xt[i * padded + r] = r < S ? x[r * f + i] : 0;
    PRODUCT(S, padded, w->F, x, f, xt, NULL, 0, made);
    for (long r = 0; r < S; r++)
        for (long i = 0; i < S; i++) kernel[r * f + i] = sw1 * made[r * padded + i] + sb1;
}

/* Z_k = A - K sum D, hidden = relu(Z_k), its mean, and e_k by the last layer as the steps moved it. */
STATIC void NAME(embed)(Work *w, long k) {
    long h = w->h, d = w->d;
    real *hidden = w->hidden_NH + k * w->kept * w->N * h, *pooled = w->pooled_TH + k * w->T * h, *e = w->e_TD + k * w->T * d;
    memset(pooled, 0, w->T * h * sizeof(real));
    for (long t = 0; t < w->T; t++) {
        long S = ROWS_OF(t), at = w->off[t] * h;
        if (S == 0) continue;
        if (k == 0)
            memcpy(hidden + at, w->base_NH + at, S * h * sizeof(real));
        else
            NAME(times_kernel)(w, t, w->minus_NH + at, w->base_NH + at, hidden + at);
        relu(S * h, hidden + at);
        sum_rows(S, h, hidden + at, pooled + t * h);
        for (long i = 0; i < h; i++) pooled[t * h + i] /= S;
    }
    PRODUCT(w->T, d, w->H, pooled, h, w->m2, w->b2, 0, e);
    for (long t = 0; t < w->T; t++) {
        if (ROWS_OF(t) == 0) memcpy(e + t * d, w->empty, d * sizeof(real));
        for (long j = 0; j < k && ROWS_OF(t); j++) {
            real share = PER_TASK(sw2, t) * dot(h, pooled + t * h, w->pooled_TH + (j * w->T + t) * h) + PER_TASK(sb2, t);
            axpy(d, -share, w->g_TD + (j * w->T + t) * d, e + t * d);
        }
    }
}

/* Logits of N rows whose first layer is first + shift of their task. */
STATIC void NAME(score)(const Work *w, long N, const long *off, const real *first, const real *shift, real *h1, real *h2,
                        real *z) {
    long g = w->g, p = w->p;
    for (long t = 0; t < w->T; t++)
        for (long r = off[t]; r < off[t + 1]; r++)
            for (long i = 0; i < g; i++) {
                real sum = first[r * g + i] + shift[t * g + i];
                h1[r * g + i] = sum < 0 ? 0 : sum;
            }
    PRODUCT(N, p, w->G, h1, g, w->w2, w->c2, 0, h2);
    relu(N * p, h2);
    for (long r = 0; r < N; r++) z[r] = dot(p, h2 + r * p, w->w3) + w->c3[0];
}

static inline real NAME(sigmoid)(real z) {
    real small = EXP(z < 0 ? z : -z);
    return (z < 0 ? small : 1) / (1 + small);
}

/* The support's gradient g_k by the embedding, and what step k adds to minus (sum of D). */
STATIC void NAME(step)(Work *w, long k) {
    long T = w->T, N = w->N, h = w->h, d = w->d, g = w->g, p = w->p, row = k * w->kept * N;
    real *h1 = w->h1_NG + row * g, *h2 = w->h2_NP + row * p, *slope = w->slope_NG + row * g, *prob = w->prob_N + row;
    real *u = w->u_TG + k * T * g, *grad = w->g_TD + k * T * d, *v = w->t_TH;
    PRODUCT(T, g, w->D, w->e_TD + k * T * d, d, w->we, NULL, 0, w->t_TG);
    NAME(score)(w, N, w->off, w->first_NG, w->t_TG, h1, h2, w->z_N);
    for (long r = 0; r < N; r++) where_on(p, w->w3, h2 + r * p, w->t_NP + r * p);
    PRODUCT(N, g, w->P, w->t_NP, p, w->w2t, NULL, 0, slope);
    memset(u, 0, T * g * sizeof(real));
    for (long t = 0; t < T; t++)
        for (long r = w->off[t]; r < w->off[t + 1]; r++) {
            real *row_slope = slope + r * g, *row_h1 = h1 + r * g;
            prob[r] = NAME(sigmoid)(w->z_N[r]);
            real residual = prob[r] - w->y_N[r];
            for (long i = 0; i < g; i++) {
                row_slope[i] = row_h1[i] > 0 ? row_slope[i] : 0;
                u[t * g + i] += residual * row_slope[i];
            }
        }
    PRODUCT(T, d, w->G, u, g, w->wet, NULL, 0, grad);
    PRODUCT(T, h, w->D, grad, d, w->m2t, NULL, 0, v);
    for (long t = 0; t < T; t++) {
        for (long j = 0; j < k; j++) {
            real gram = dot(d, grad + t * d, w->g_TD + (j * T + t) * d);
            axpy(h, -PER_TASK(sw2, t) * gram, w->pooled_TH + (j * T + t) * h, v + t * h);
        }
        for (long r = w->off[t]; r < w->off[t + 1]; r++)
            axpy_where_on(h, (real)-1 / ROWS_OF(t), v + t * h, w->hidden_NH + (k * w->kept * N + r) * h, w->minus_NH + r * h);
    }
}

/* ---- the outer gradient, by_x: of the sum over tasks of their mean query loss, by x */

/* Scores Q query rows; with `train`, the gradients by the global block's weights and by_e. */
STATIC void NAME(query)(Work *w, const long *off, const real *x_QF, const real *y_Q, int train, real *loss_T) {
    long T = w->T, Q = off[T], d = w->d, g = w->g, p = w->p;
    real *e = w->e_TD + w->steps * T * d, *h1 = w->h1_NG, *h2 = w->h2_NP, *first = w->by_first_NG, *t2 = w->t_NP, *z = w->z_N;
    /* Steps' rows are needed by what comes after: the query's stand behind them. */
    h1 += w->steps * w->kept * w->N * g, h2 += w->steps * w->kept * w->N * p;
    PRODUCT(T, g, w->D, e, d, w->we, NULL, 0, w->t_TG);
    PRODUCT(Q, g, w->C, x_QF, w->f, w->wx, w->c1, 0, first);
    NAME(score)(w, Q, off, first, w->t_TG, h1, h2, z);
    for (long t = 0; t < T; t++) {
        double sum = 0;
        for (long r = off[t]; r < off[t + 1]; r++) {
            sum += (z[r] > 0 ? z[r] : 0) - y_Q[r] * z[r] + LOG1P(EXP(z[r] < 0 ? z[r] : -z[r]));
            z[r] = (NAME(sigmoid)(z[r]) - y_Q[r]) / (off[t + 1] - off[t]);
        }
        loss_T[t] = off[t + 1] > off[t] ? sum / (off[t + 1] - off[t]) : 0;
    }
    if (!train) return;
    for (long r = 0; r < Q; r++) {
        for (long i = 0; i < p; i++) t2[r * p + i] = h2[r * p + i] > 0 ? z[r] * w->w3[i] : 0;
        axpy(p, z[r], h2 + r * p, w->g_w3);
        w->g_c3[0] += z[r];
    }
    PRODUCT(Q, g, w->P, t2, p, w->w2t, NULL, 0, w->t_NG);
    where_on(Q * g, w->t_NG, h1, first);
    ADD_OUTER(Q, w->G, p, h1, g, t2, w->g_w2);
    sum_rows(Q, p, t2, w->g_c2);
    ADD_OUTER(Q, w->C, g, x_QF, w->f, first, w->g_wx);
    memset(w->t_TG, 0, T * g * sizeof(real));
    for (long t = 0; t < T; t++) {
        sum_rows(off[t + 1] - off[t], g, first + off[t] * g, w->t_TG + t * g);
        axpy(g, 1, w->t_TG + t * g, w->g_c1);
    }
    ADD_OUTER(T, w->D, g, e, d, w->t_TG, w->g_we);
    PRODUCT(T, d, w->G, w->t_TG, g, w->wet, NULL, 0, w->by_e_TD);
}

/* Back through `embed`, from by_e to by_pooled of this step and of those before, by_g of those before, and by_z. */
STATIC void NAME(embed_back)(Work *w, long k) {
    long T = w->T, h = w->h, d = w->d, second = w->call->second;
    real *pooled = w->pooled_TH + k * T * h, *by_pooled = w->by_pooled_TH + k * T * h;
    for (long t = 0; t < T; t++)
        if (ROWS_OF(t) == 0) {
            axpy(d, 1, w->by_e_TD + t * d, w->g_empty);
            memset(w->by_e_TD + t * d, 0, d * sizeof(real));
        }
    sum_rows(T, d, w->by_e_TD, w->g_b2);
    ADD_OUTER(T, w->H, d, pooled, h, w->by_e_TD, w->g_m2);
    PRODUCT(T, h, w->D, w->by_e_TD, d, w->m2t, by_pooled, h, by_pooled);
    for (long t = 0; t < T; t++) {
        real sw2 = PER_TASK(sw2, t), *by_e = w->by_e_TD + t * d;
        for (long j = 0; j < k && ROWS_OF(t); j++) {
            long before = j * T + t;
            real by_share = -sw2 * dot(d, by_e, w->g_TD + before * d);
            axpy(h, by_share, w->pooled_TH + before * h, by_pooled + t * h);
            if (!second) continue; /* what a step moved is then a constant */
            real share = sw2 * dot(h, pooled + t * h, w->pooled_TH + before * h) + PER_TASK(sb2, t);
            axpy(d, -share, by_e, w->by_g_TD + before * d);
            axpy(h, by_share, pooled + t * h, w->by_pooled_TH + before * h);
        }
        for (long r = w->off[t]; r < w->off[t + 1]; r++)
            axpy_where_on(h, (real)1 / ROWS_OF(t), by_pooled + t * h, w->hidden_NH + (k * w->kept * w->N + r) * h,
                          w->by_z_NH + r * h);
    }
}

/* Back through `step`: from by_z of the later steps and by_g to by_e of step k, and the gradients by weights. */
STATIC void NAME(step_back)(Work *w, long k) {
    long T = w->T, N = w->N, h = w->h, d = w->d, g = w->g, p = w->p;
    real *h1 = w->h1_NG + k * N * g, *h2 = w->h2_NP + k * N * p, *slope = w->slope_NG + k * N * g, *prob = w->prob_N + k * N;
    real *grad = w->g_TD + k * T * d, *by_g = w->by_g_TD + k * T * d, *by_v = w->t_TH, *by_u = w->t_TG;
    memset(by_v, 0, T * h * sizeof(real));
    for (long t = 0; t < T; t++) {
        long S = ROWS_OF(t), at = w->off[t] * h;
        if (S == 0) continue;
        NAME(times_kernel)(w, t, w->by_z_NH + at, NULL, w->t_NH);
        for (long r = 0; r < S; r++)
            axpy_where_on(h, (real)-1 / S, w->t_NH + r * h, w->hidden_NH + k * N * h + at + r * h, by_v + t * h);
    }
    ADD_OUTER(T, w->H, d, by_v, h, grad, w->g_m2);
    PRODUCT(T, d, w->H, by_v, h, w->m2, by_g, d, by_g);
    for (long t = 0; t < T; t++)
        for (long j = 0; j < k; j++) {
            long before = j * T + t;
            real sw2 = PER_TASK(sw2, t), by_gram = -sw2 * dot(h, by_v + t * h, w->pooled_TH + before * h);
            axpy(d, by_gram, w->g_TD + before * d, by_g + t * d);
            axpy(d, by_gram, grad + t * d, w->by_g_TD + before * d);
            axpy(h, -sw2 * dot(d, grad + t * d, w->g_TD + before * d), by_v + t * h, w->by_pooled_TH + before * h);
        }
    ADD_OUTER(T, w->D, g, by_g, d, w->u_TG + k * T * g, w->g_we);
    PRODUCT(T, g, w->D, by_g, d, w->we, NULL, 0, by_u);
    for (long t = 0; t < T; t++) {
        for (long r = w->off[t]; r < w->off[t + 1]; r++) {
            real residual = prob[r] - w->y_N[r];
            real by_z = w->z_N[r] = dot(g, slope + r * g, by_u + t * g) * prob[r] * (1 - prob[r]);
            const real *restrict row_h1 = h1 + r * g, *restrict row_by_u = by_u + t * g;
            real *restrict rising = w->t_NG + r * g;
            for (long i = 0; i < g; i++) rising[i] = row_h1[i] > 0 ? residual * row_by_u[i] : 0;
            axpy(g, by_z, slope + r * g, w->by_first_NG + r * g);
        }
    }
    PRODUCT(N, p, w->G, w->t_NG, g, w->w2, NULL, 0, w->t_NP);
    for (long r = 0; r < N; r++) {
        real *rising = w->t_NP + r * p, *row_h2 = h2 + r * p, by_z = w->z_N[r];
        axpy_where_on(p, 1, rising, row_h2, w->g_w3);
        axpy(p, by_z, row_h2, w->g_w3);
        w->g_c3[0] += by_z;
        where_on(p, w->w3, row_h2, rising);
        axpy(p, by_z, rising, w->g_c2);
        axpy(g, by_z, h1 + r * g, w->t_NG + r * g);
    }
    ADD_OUTER(N, w->G, p, w->t_NG, g, w->t_NP, w->g_w2);
    memset(w->t_TG, 0, T * g * sizeof(real));
    for (long t = 0; t < T; t++)
        for (long r = w->off[t]; r < w->off[t + 1]; r++) axpy(g, w->z_N[r], slope + r * g, w->t_TG + t * g);
    ADD_OUTER(T, w->D, g, w->e_TD + k * T * d, d, w->t_TG, w->g_we);
    PRODUCT(T, d, w->G, w->t_TG, g, w->wet, NULL, 0, w->by_e_TD);
}

/* ---- one chunk, and all of a thread's */

STATIC void NAME(chunk)(Work *w, const long *query_off, const real *x_QF, const real *y_Q) {
    const Call *call = w->call;
    long T = w->T, N = w->N, task = w->first, back = call->second ? w->steps : 0;
    for (long t = 0; t < T && w->steps; t++) NAME(make_kernel)(w, t);
    PRODUCT(N, w->h, w->F, w->x_NF, w->f, w->m1, w->b1, 0, w->base_NH);
    if (w->steps) PRODUCT(N, w->g, w->C, w->x_NF, w->f, w->wx, w->c1, 0, w->first_NG);
    memset(w->minus_NH, 0, N * w->h * sizeof(real));
    for (long k = 0; k < w->steps; k++) {
        NAME(embed)(w, k);
        NAME(step)(w, k);
    }
    NAME(embed)(w, w->steps);
    for (long t = 0; t < T; t++)
        memcpy((real *)call->embedding_TD + (task + t) * w->D, w->e_TD + (w->steps * T + t) * w->d, w->D * sizeof(real));
    if (!call->query_len) return;
    NAME(query)(w, query_off, x_QF, y_Q, call->train, (real *)call->loss_T + task);
    if (!call->train) return;
    memset(w->by_g_TD, 0, w->steps * T * w->d * sizeof(real));
    memset(w->by_pooled_TH, 0, (w->steps + 1) * T * w->h * sizeof(real));
    memset(w->by_z_NH, 0, N * w->h * sizeof(real));
    memset(w->by_first_NG, 0, N * w->g * sizeof(real));
    NAME(embed_back)(w, w->steps);
    for (long k = back - 1; k >= 0; k--) {
        NAME(step_back)(w, k);
        NAME(embed_back)(w, k);
    }
    ADD_OUTER(N, w->F, w->h, w->x_NF, w->f, w->by_z_NH, w->g_m1);
    sum_rows(N, w->h, w->by_z_NH, w->g_b1);
    if (!back) return;
    ADD_OUTER(N, w->C, w->g, w->x_NF, w->f, w->by_first_NG, w->g_wx);
    sum_rows(N, w->g, w->by_first_NG, w->g_c1);
}

/* to (rows, pad(columns)) = from, whose entry (i, j) stands at i ri + j rj; or, with `out`, the other way. */
static void NAME(lay)(long rows, long columns, real *to, real *from, long ri, long rj, int out) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++)
            if (out)
                from[i * ri + j * rj] = to[i * PAD(columns) + j];
            else
                to[i * PAD(columns) + j] = from[i * ri + j * rj];
}

static void NAME(lay_weights)(Work *w, real *const *from, real *const *to, int out) {
    long F = w->F, C = w->C, H = w->H, D = w->D, G = w->G, P = w->P;
    NAME(lay)(F, H, to[0], from[0], H, 1, out);
    NAME(lay)(1, H, to[1], from[1], 0, 1, out);
    NAME(lay)(H, D, to[2], from[2], D, 1, out);
    NAME(lay)(1, D, to[3], from[3], 0, 1, out);
    NAME(lay)(1, D, to[4], from[4], 0, 1, out);
    NAME(lay)(C, G, to[5], from[5], 1, C + D, out); /* torch's layers are stored (out, in) */
    NAME(lay)(D, G, to[6], from[5] + C, 1, C + D, out);
    NAME(lay)(1, G, to[7], from[6], 0, 1, out);
    NAME(lay)(G, P, to[8], from[7], 1, G, out);
    NAME(lay)(1, P, to[9], from[8], 0, 1, out);
    NAME(lay)(1, P, to[10], from[9], 0, 1, out);
    NAME(lay)(1, 1, to[11], from[10], 0, 1, out);
    if (out) return;
    NAME(lay)(D, H, w->m2t, from[2], 1, D, 0);
    NAME(lay)(G, D, w->wet, from[5] + C, C + D, 1, 0);
    NAME(lay)(P, G, w->w2t, from[7], G, 1, 0);
}

/* Memory is handed out in two passes: the first, from NULL, only counts. */
static real *NAME(take)(char **at, long numbers) {
    real *got = (real *)*at;
    *at += PAD(numbers) * sizeof(real);
    return got;
}
#define TAKE(numbers) NAME(take)(&at, numbers)

static char *NAME(place)(Work *w, const Shape *most, real **x_QF, real **y_Q, char *at) {
    long F = w->F, f = w->f, h = w->h, d = w->d, g = w->g, p = w->p, N = most->support, Q = most->query, T = most->tasks;
    long rows = N > Q ? N : Q, kept = w->kept ? w->steps : 1, K = w->steps + 1, gram = F < N ? F : N;
    real **weights[] = {&w->m1, &w->b1, &w->m2, &w->b2, &w->empty, &w->wx, &w->we, &w->c1, &w->w2, &w->c2, &w->w3, &w->c3};
    real **grads[] = {&w->g_m1, &w->g_b1, &w->g_m2, &w->g_b2, &w->g_empty, &w->g_wx, &w->g_we, &w->g_c1,
                      &w->g_w2, &w->g_c2, &w->g_w3, &w->g_c3};
    long size[] = {F * h, h, w->H * d, d, d, w->C * g, w->D * g, g, w->G * p, p, p, 1};
    for (int i = 0; i < 12; i++) *weights[i] = TAKE(size[i]);
    w->m2t = TAKE(w->D * h), w->wet = TAKE(w->G * d), w->w2t = TAKE(w->P * g);
    for (int i = 0; i < 12; i++) *grads[i] = TAKE(size[i]);
    w->x_NF = TAKE(N * f), w->y_N = TAKE(N), *x_QF = TAKE(Q * f), *y_Q = TAKE(Q);
    w->kernel = TAKE(N * f), w->base_NH = TAKE(N * h), w->first_NG = TAKE(N * g), w->minus_NH = TAKE(N * h);
    w->hidden_NH = TAKE((w->kept ? K : 1) * N * h), w->prob_N = TAKE(kept * N), w->slope_NG = TAKE(kept * N * g);
    w->h1_NG = TAKE((kept * N + rows) * g), w->h2_NP = TAKE((kept * N + rows) * p);
    w->pooled_TH = TAKE(K * T * h), w->e_TD = TAKE(K * T * d), w->u_TG = TAKE(K * T * g), w->g_TD = TAKE(K * T * d);
    w->t_NG = TAKE(rows * g), w->t_NP = TAKE(rows * p), w->t_TG = TAKE(T * g), w->t_TH = TAKE(T * h), w->z_N = TAKE(rows);
    w->t_FH = TAKE((F + 1) * h > 2 * F * PAD(gram) ? (F + 1) * h : 2 * F * PAD(gram)), w->t_NH = TAKE(N * h);
    w->by_e_TD = TAKE(T * d), w->by_g_TD = TAKE(K * T * d), w->by_pooled_TH = TAKE(K * T * h);
    w->by_first_NG = TAKE(rows * g), w->by_z_NH = TAKE(N * h);
    return at;
}

static void NAME(gather)(long tasks, const long *off, long rows, long width, long padded, const real *x, const real *y, real *to_x,
                         real *to_y) {
    for (long t = 0; t < tasks; t++)
        for (long r = off[t]; r < off[t + 1]; r++) {
            long from = t * rows + r - off[t];
            memcpy(to_x + r * padded, x + from * width, width * sizeof(real));
            to_y[r] = y[from];
        }
}

/* Tasks first to last - 1; their gradients' sum is written to `gradients`, as torch stores the weights. 1: no memory. */
int NAME(run)(const Call *call, long first, long last, void *const *gradients) {
    Shape most = largest_chunk(call, first, last);
    Work work = {.call = call, .C = call->features, .F = call->width, .H = call->hidden, .D = call->dim, .G = call->wide};
    Work *w = &work;
    real *x_QF, *y_Q;
    w->P = call->narrow, w->steps = call->steps, w->kept = call->train && call->second;
    w->f = PAD(w->F), w->h = PAD(w->H), w->d = PAD(w->D), w->g = PAD(w->G), w->p = PAD(w->P);
    long bytes = (long)NAME(place)(w, &most, &x_QF, &y_Q, NULL), *off = malloc(2 * (most.tasks + 1) * sizeof(long));
    char *memory = aligned_alloc(64, bytes);
    if (!memory || !off) return free(memory), free(off), 1;
    NAME(place)(w, &most, &x_QF, &y_Q, memory);
    memset(memory, 0, (char *)w->x_NF - memory); /* weights' padding, and all gradients */
    real *to[] = {w->m1, w->b1, w->m2, w->b2, w->empty, w->wx, w->we, w->c1, w->w2, w->c2, w->w3, w->c3};
    real *sums[] = {w->g_m1, w->g_b1, w->g_m2, w->g_b2, w->g_empty, w->g_wx, w->g_we, w->g_c1, w->g_w2, w->g_c2, w->g_w3, w->g_c3};
    NAME(lay_weights)(w, (real *const *)call->weights, to, 0);
    w->off = off;
    for (long *query_off = off + most.tasks + 1; first < last; first += w->T) {
        w->first = first, w->T = next_chunk(call, first, last, off, query_off), w->N = off[w->T];
        NAME(gather)(w->T, off, call->support_rows, w->F, w->f, (const real *)call->support_x + first * call->support_rows * w->F,
                     (const real *)call->support_y + first * call->support_rows, w->x_NF, w->y_N);
        if (call->query_len)
            NAME(gather)(w->T, query_off, call->query_rows, w->C, w->f, (const real *)call->query_x + first * call->query_rows * w->C,
                         (const real *)call->query_y + first * call->query_rows, x_QF, y_Q);
        NAME(chunk)(w, query_off, x_QF, y_Q);
    }
    if (call->train) NAME(lay_weights)(w, (real *const *)gradients, sums, 1);
    free(memory), free(off);
    return 0;
}

#undef DOUBLE
#undef NAME
#undef EXP
#undef LOG1P
#undef real
#undef vec
#undef Work
#undef LANES
#undef UNIT
#undef STATIC
#undef gemm
#undef dot
#undef axpy
#undef axpy_where_on
#undef where_on
#undef relu
#undef sum_rows
#undef ROWS_CASE
#undef PRODUCT
#undef ADD_OUTER
#undef ROWS_OF
#undef PER_TASK
#undef TAKE
