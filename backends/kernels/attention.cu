// The weights of attention and their gradient. Plain reference, for rows r of n scores j, of which
// the token i = r % n of its matrix sees j <= i if it is causal, else all:
//
//     attention_weights:   p[r, j] = exp(scale s[r, j]) / sum_j' exp(scale s[r, j']), 0 if not seen
//     attention_gradient:  dp[r, j] = dw[r, j] factor[r, j]
//                          ds[r, j] = scale p[r, j] (dp[r, j] - sum_j' dp[r, j'] p[r, j'])
//     both:                w[r, j] = p[r, j] factor[r, j]
//
// A warp takes a row. p is written over s, ds over dw. Without dropout factor and w are null.

constexpr int ROWS = 4;  // a block: one a warp

template <class T>
__global__ void attention_weights(T* s, const T* factor, T* w, T scale, int causal, long long rows,
                                  int n) {
    const int lane = threadIdx.x % WARP;
    const long long r = (long long)blockIdx.x * ROWS + threadIdx.x / WARP, first = r * n;
    if (r >= rows) return;
    const int seen = causal ? r % n + 1 : n;
    T top = -INF, sum = 0;
    for (int j = lane; j < seen; j += WARP) {
        const T score = s[first + j] * scale;
        top = score > top ? score : top;
    }
    top = warp_max(top);
    for (int j = lane; j < seen; j += WARP)
        sum += s[first + j] = exp(s[first + j] * scale - top);
    sum = warp_sum(sum);
    for (int j = lane; j < n; j += WARP) {
        const T p = j < seen ? s[first + j] / sum : 0;
        s[first + j] = p;
        if (w) w[first + j] = p * factor[first + j];
    }
}

template <class T>
__global__ void attention_gradient(T* dw, const T* p, const T* factor, T* w, T scale,
                                   long long rows, int n) {
    const int lane = threadIdx.x % WARP;
    const long long r = (long long)blockIdx.x * ROWS + threadIdx.x / WARP, first = r * n;
    if (r >= rows) return;
    T sum = 0;
    for (int j = lane; j < n; j += WARP) {
        const T dp = dw[first + j] * (w ? factor[first + j] : 1);
        sum += dp * p[first + j];
    }
    sum = warp_sum(sum);
    for (int j = lane; j < n; j += WARP) {
        const T kept = w ? factor[first + j] : 1, weight = p[first + j];
        dw[first + j] = scale * weight * (dw[first + j] * kept - sum);
        if (w) w[first + j] = weight * kept;
    }
}
