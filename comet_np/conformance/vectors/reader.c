/* Reads test vectors of the MLP as FORMAT.md says, and computes each from scratch, in double:
 *     cc -std=c99 -O2 reader.c -o reader -lm && ./reader FOLDER/mlp-*
 * Prints a line a case; exit status 0 if all agree. Memory is left to the system. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define WRONG(...) (*why ? 0 : snprintf(why, sizeof why, __VA_ARGS__))
static char text[1 << 16], why[2048], file[1024], *folder; /* case.json; what is wrong first */
static const char *field(const char *key) { /* what follows "key": in a line of its own, or "" */
    char line[64];
    snprintf(line, sizeof line, "\n\"%s\": ", key);
    const char *found = strstr(text, line);
    return found ? found + strlen(line) : "";
}
static int is(const char *key, const char *value) { /* whether a setting is this text */
    char line[96];
    snprintf(line, sizeof line, "\n\"%s\": \"%s\"", key, value);
    return strstr(text, line) != NULL;
}
static int list(const char *at, int *out, int n) { /* the integers of [1, 2, 3]; how many */
    for (char *end; at && (*at == '[' || *at == ',') && n < 32; at = end)
        out[n++] = (int)strtol(at + 1, &end, 10);
    return n;
}
static double *zeros(int n) { return calloc(n, sizeof(double)); }
/* NAME_l.npy (NAME.npy if l = 0) of shape (rows, columns), of fewer axes where these are 0. */
static double *load(const char *name, int l, int rows, int columns) {
    char head[257] = "", shape[64];
    union { unsigned char bit; float single; long long whole; } raw;
    int n = (rows ? rows : 1) * (columns ? columns : 1), size = 0;
    double *values = zeros(n);
    snprintf(file, sizeof file, l ? "%s/%s_%d.npy" : "%s/%s.npy", folder, name, l);
    snprintf(shape, sizeof shape, columns ? "(%d, %d)" : rows ? "(%d,)" : "()", rows, columns);
    FILE *in = fopen(file, "rb");
    if (!in) return WRONG("%s cannot be read", file), values;
    if (fread(head, 1, 10, in) == 10 && !memcmp(head, "\x93NUMPY\x01", 8)) size = head[8] & 255;
    head[fread(head, 1, size, in)] = 0; /* headers of two axes are shorter than 256 bytes */
    int single = strstr(head, "'<f4'") != NULL, bits = strstr(head, "'|u1'") != NULL;
    if (!strstr(head, shape)) WRONG("%s is not an array of shape %s", file, shape);
    for (int i = 0; i < n && !*why; i++) {
        if (!fread(&raw, single ? 4 : bits ? 1 : 8, 1, in)) WRONG("%s is short", file);
        values[i] = single ? raw.single : bits ? raw.bit : (double)raw.whole;
    }
    return fclose(in), values;
}
/* Say so if the largest difference from what is expected is not small beside the largest number. */
static void compare(const char *name, int l, const double *mine, int rows, int columns) {
    double *E = load(name, l, rows, columns), top = 0, most = 0, d;
    for (int i = 0, n = (rows ? rows : 1) * (columns ? columns : 1); i < n; i++)
        d = fabs(mine[i] - E[i]), top = fmax(top, fabs(E[i])), most = d > most || d != d ? d : most;
    d = *name == 'm' ? 0 : atof(field("tolerance")); /* masks bit for bit */
    if (!(most <= d * (top ? top : 1))) WRONG("%s of layer %d differs by %g", name, l, most);
}
static double act(const char *key, double a, int d) { /* f(a), or with d its derivative */
    double s = 1 / (1 + exp(-a)), soft = log1p(exp(a)), t = tanh(a), root = sqrt(2 / acos(-1)), p;
    double q = is(key, "identity") ? 1 : is(key, "leaky_relu") ? 0.1 : is(key, "relu") ? 0 : -1;
    if (q >= 0) return (a > 0 ? 1 : q) * (d ? 1 : a);
    if (is(key, "tanh")) return d ? 1 - t * t : t;
    if (is(key, "sigmoid")) return d ? s * (1 - s) : s;
    if (is(key, "softplus")) return d ? s : soft;
    if (is(key, "silu")) return d ? s + a * s * (1 - s) : a * s;
    if (is(key, "mish")) return t = tanh(soft), d ? t + a * (1 - t * t) * s : a * t;
    q = is(key, "selu") ? 1.6732632423543772 : 1, p = q > 1 ? 1.0507009873554805 : 1;
    if (p > 1 || is(key, "elu")) return p * (a > 0 ? d ? 1 : a : q * (d ? exp(a) : expm1(a)));
    if (is(key, "gelu")) return t = erfc(-a/sqrt(2)), (d ? t + a * exp(-a*a/2) * root : a * t) / 2;
    t = tanh(root * (a + 0.044715 * a * a * a)), s = root * (1 + 3 * 0.044715 * a * a);
    if (is(key, "gelu_new")) return d ? (1 + t + a * (1 - t * t) * s) / 2 : a * (1 + t) / 2;
    return WRONG("unknown %s", key), 0;
}
static double won(const double *v, int i, int N, int k) { /* eq. (3): is v_i among the k largest? */
    int strict = is("ties", "strict"), before = is("ties", "index");
    for (int j = 0; j < N; j++)
        k -= v[j] > v[i] || (v[j] == v[i] && (strict ? j != i : before && j < i));
    return k > 0;
}
static void on_grid(double *z, int N) { /* exact routing: a row on a grid of its own */
    int E, bits = (int)(fmin(14, 24 - ceil(log2(N))) + 1) / 2;
    double most = 0, limit = ldexp(1, bits) - 1;
    for (int i = 0; i < N; i++) frexp(most = fmax(most, fabs(z[i])), &E);
    for (int i = 0; i < N; i++)
        z[i] = ldexp(fmax(-limit, fmin(limit, rint(ldexp(z[i], bits - E)))), E - bits);
}
/* A B^T (M, N), sums of n products; r and s are how far apart rows and terms lie. */
static double *product(int M, int N, int n, double *A, int r, int s, double *B, int r_B, int s_B) {
    double *y = zeros(M * N);
    for (int i = 0; i < M * N * n; i++)
        y[i / n] += A[i / n / N * r + i % n * s] * B[i / n % N * r_B + i % n * s_B];
    return y;
}
static void mlp(void) {
    int w[32], k[32], B = 0, gate = !is("gate", "none"), comet = is("gate", "comet");
    int L = list(field("widths"), w, 0) - 1, biased = *field("bias") == 't', N = 0, M;
    double *x[32], *a[32], *m[32], *W[32], *b, *c, *z, *da, *dx, *labels, loss = 0;
    list(strstr(field("labels"), "["), &B, 0), list(field("k"), k, 0);
    x[0] = load("x", 0, B, w[0]), z = load("x", 0, B, w[0]), labels = load("labels", 0, B, 0);
    for (int l = 1; l <= L; l++) {
        N = w[l], M = w[l - 1], W[l] = load("W", l, N, M);
        b = biased ? load("b", l, N, 0) : zeros(N);
        a[l] = c = product(B, N, M, x[l - 1], M, 1, W[l], M, 1);
        for (int i = 0; i < B * N; i++) a[l][i] += b[i % N];
        compare("a", l, a[l], B, N);
        if (l == L) break;
        if (gate && !is("gate", "top-k")) {
            for (int i = 0; i < B && *field("exact") == 't'; i++) on_grid(z + i * M, M);
            c = load("V", l, N, M), c = product(B, N, M, comet ? z : x[l - 1], M, 1, c, M, 1);
            compare("c", l, c, B, N);
        }
        x[l] = zeros(B * N), m[l] = zeros(B * N), z = zeros(B * N);
        for (int i = 0; i < B * N; i++) {
            m[l][i] = gate ? won(c + i / N * N, i % N, N, k[l - 1]) : 1;
            z[i] = comet ? m[l][i] * act("g", c[i], 0) : 0;
            x[l][i] = m[l][i] * act("activation", a[l][i], 0);
        }
        if (gate) compare("m", l, m[l], B, N);
        compare("x", l, x[l], B, N);
    }
    da = zeros(B * N); /* of the cross-entropy of softmax, a mean over the batch */
    for (int r = 0; r < B; r++) {
        double sum = 0, *row = a[L] + r * N;
        for (int i = 0; i < N; i++) sum += exp(row[i]);
        for (int i = 0; i < N; i++) da[r * N + i] = (exp(row[i]) / sum - (i == labels[r])) / B;
        loss += (log(sum) - row[(int)labels[r]]) / B;
    }
    compare("loss", 0, &loss, 0, 0), compare("da", L, da, B, N);
    for (int l = L; l; l--, da = dx) {
        N = w[l], M = w[l - 1], b = zeros(N);
        for (int i = 0; i < B * N; i++) b[i % N] += da[i];
        compare("dW", l, product(N, M, B, da, 1, N, x[l - 1], 1, M), N, M);
        if (biased) compare("db", l, b, N, 0);
        dx = product(B, M, N, da, N, 1, W[l], 1, M);
        if (l == 1) compare("dx", 0, dx, B, M);
        for (int i = 0; i < B * M && l > 1; i++)
            dx[i] *= m[l - 1][i] * act("activation", a[l - 1][i], 1);
    }
}
int main(int count, char **folders) {
    int bad = 0;
    for (int i = 1; i < count; i++) {
        folder = folders[i], *why = 0;
        snprintf(file, sizeof file, "%s/case.json", folder);
        FILE *in = fopen(file, "rb");
        text[in ? fread(text, 1, sizeof text - 1, in) : 0] = 0;
        if (strncmp(field("format"), "1,", 2)) WRONG("no case.json of format 1");
        else if (!is("model", "mlp") || !strstr(text, "\"forward\"")) WRONG("no MLP to compute");
        else mlp();
        printf("%s: %s\n", folder, *why ? why : "agrees"), bad |= *why != 0;
    }
    return bad;
}
