// Softmax cross-entropy. Plain reference, for a row z of C logits with the label y:
//
//     softmax_cross_entropy:  q[i] = exp(z[i]) / sum_j exp(z[j]),   loss = -log q[y]
//     gradient:               dz[i] = scale (q[i] - (i == y))
//
// A warp takes a row; z is lessened by its largest element first, so that nothing overflows. A
// label outside 0..C-1 is noted in `error`, and makes the row's loss NaN.

constexpr int ROWS = 4;  // a block: one a warp

template <class T>
__global__ void softmax_cross_entropy(const T* logits, const long long* labels, T* q, T* losses,
                                      long long rows, int C, Place* error) {
    const int lane = threadIdx.x % WARP;
    const long long r = (long long)blockIdx.x * ROWS + threadIdx.x / WARP;
    if (r >= rows) return;
    const T* z = logits + r * C;
    T top = -INF, sum = 0;
    for (int i = lane; i < C; i += WARP) top = z[i] > top ? z[i] : top;
    top = warp_max(top);
    for (int i = lane; i < C; i += WARP) sum += exp(z[i] - top);
    const T log_sum = log(warp_sum(sum));
    for (int i = lane; i < C; i += WARP) q[r * C + i] = exp(z[i] - top - log_sum);
    if (lane > 0) return;
    const long long label = labels[r];
    const bool fits = 0 <= label && label < C;
    losses[r] = fits ? log_sum - (z[label] - top) : (T)NOT_A_NUMBER;
    if (!fits) note_error(error, r, label);
}

template <class T>
__global__ void softmax_cross_entropy_gradient(const T* q, const long long* labels, T* dlogits,
                                               const double* scale_at, double scale,
                                               long long rows, int C) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= C) return;
    const T factor = number(scale_at, scale);
    for (long long r = blockIdx.y * blockDim.y + threadIdx.y; r < rows; r += gridDim.y * blockDim.y)
        dlogits[r * C + i] = q[r * C + i] * factor - (i == labels[r] ? factor : 0);
}
