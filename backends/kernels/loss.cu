// Softmax cross-entropy. Plain reference, for a row z of C logits with the label y:
//
//     softmax_cross_entropy:  q[i] = exp(z[i]) / sum_j exp(z[j]),   loss = -log q[y]
//     gradient:               dz[i] = scale (q[i] - (i == y))
//
// and loss = 0, dz[i] = 0 for a label that is ignored. A warp takes a row, or WARPS warps that make
// up a block. One pass over z finds its largest element and, lessened by it so that nothing
// overflows, the sum; a second one writes q, which may be z itself: each thread writes what it alone
// has read. A label that is neither ignored nor in 0..C-1 is noted in `error`, and makes the row's
// loss NaN.

constexpr int ROWS = 4;             // a block: one a warp
constexpr float LOWEST = -3.4e38f;  // below any logit, but finite: -INF - -INF is NaN

template <class T, int WARPS>
__global__ void
__launch_bounds__((WARPS > 1 ? WARPS : ROWS) * WARP, 1)
softmax_cross_entropy(const T* logits, const long long* labels, T* q, T* losses, long long rows,
                      int C, int ignores, long long ignored, Place* error) {
    constexpr int STEP = WARPS * WARP;
    const int first = threadIdx.x % STEP;
    const long long r =
        WARPS > 1 ? blockIdx.x : (long long)blockIdx.x * ROWS + threadIdx.x / WARP;
    if (r >= rows) return;  // the whole group leaves together
    const T* z = logits + r * C;
    const long long label = labels[r];
    T top = LOWEST, sum = 0, of_label = NOT_A_NUMBER;
    for (int i = first; i < C; i += STEP) {
        const T value = z[i];
        if (value > top) {
            sum *= exp(top - value);
            top = value;
        }
        sum += exp(value - top);
        if (i == label) of_label = value;
    }
    const T mine = top;
    top = group_max<WARPS>(top);
    const T log_sum = log(group_sum<WARPS>(sum * exp(mine - top), 0));
    for (int i = first; i < C; i += STEP) q[r * C + i] = exp(z[i] - top - log_sum);
    const bool fits = 0 <= label && label < C, counts = !(ignores && label == ignored);
    if (first != (fits ? label % STEP : 0)) return;  // the one that has met the label
    losses[r] = counts ? log_sum - (of_label - top) : 0;
    if (counts && !fits) note_error(error, r, label);
}

template <class T>
__global__ void softmax_cross_entropy_gradient(const T* q, const long long* labels, T* dlogits,
                                               const double* scale_at, double scale,
                                               long long rows, int C, int ignores,
                                               long long ignored) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= C) return;
    const T factor = number(scale_at, scale);
    for (long long r = blockIdx.y * blockDim.y + threadIdx.y; r < rows;
         r += gridDim.y * blockDim.y) {
        const long long label = labels[r];
        const T value = q[r * C + i] * factor - (i == label ? factor : 0);
        dlogits[r * C + i] = ignores && label == ignored ? 0 : value;
    }
}
