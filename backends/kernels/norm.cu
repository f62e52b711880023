// Layer norm. Plain reference, for rows r of n columns i, with means over i:
//
//     norm_forward:   inverse[r] = 1 / sqrt(mean (x[r, i] - mean x[r])^2 + eps)
//                     normed[r, i] = (x[r, i] - mean x[r]) inverse[r]
//                     y[r, i] = normed[r, i] gain[i] + bias[i]
//     norm_backward:  dn[r, i] = dy[r, i] gain[i]
//                     dx[r, i] = inverse[r] (dn[r, i] - mean dn[r] - normed[r, i] mean (dn normed)[r])
//     norm_sums:      sums[b, 0, i] = sum_r dy[r, i] normed[r, i],   sums[b, 1, i] = sum_r dy[r, i]
//     norm_totals:    dgain[i] += sum_b sums[b, 0, i],   dbias[i] += sum_b sums[b, 1, i]
//
// A warp takes a row. A block b of norm_sums takes every gridDim.y-th group of rows, as wide as a warp.

constexpr int ROWS = 4;        // a block of the first two: one a warp
constexpr int BLOCK_ROWS = 8;  // a block of norm_sums

template <class T>
__global__ void norm_forward(const T* x, const T* gain, const T* bias, T eps, T* y, T* normed,
                             T* inverse, long long rows, int n) {
    const int lane = threadIdx.x % WARP;
    const long long r = (long long)blockIdx.x * ROWS + threadIdx.x / WARP, first = r * n;
    if (r >= rows) return;
    T sum = 0, squares = 0;
    for (int i = lane; i < n; i += WARP) sum += x[first + i];
    const T mean = warp_sum(sum) / n;
    for (int i = lane; i < n; i += WARP) {
        const T centred = x[first + i] - mean;
        squares += centred * centred;
    }
    const T scale = 1 / sqrt(warp_sum(squares) / n + eps);
    for (int i = lane; i < n; i += WARP) {
        const T value = (x[first + i] - mean) * scale;
        normed[first + i] = value;
        y[first + i] = value * gain[i] + bias[i];
    }
    if (lane == 0) inverse[r] = scale;
}

template <class T>
__global__ void norm_backward(const T* dy, const T* normed, const T* inverse, const T* gain, T* dx,
                              long long rows, int n) {
    const int lane = threadIdx.x % WARP;
    const long long r = (long long)blockIdx.x * ROWS + threadIdx.x / WARP, first = r * n;
    if (r >= rows) return;
    T sum = 0, along = 0;
    for (int i = lane; i < n; i += WARP) {
        const T dn = dy[first + i] * gain[i];
        sum += dn;
        along += dn * normed[first + i];
    }
    const T mean = warp_sum(sum) / n, mean_along = warp_sum(along) / n, scale = inverse[r];
    for (int i = lane; i < n; i += WARP)
        dx[first + i] =
            scale * (dy[first + i] * gain[i] - mean - normed[first + i] * mean_along);
}

template <class T>
__global__ void norm_sums(const T* dy, const T* normed, T* sums, long long rows, int n) {
    __shared__ T gains[BLOCK_ROWS][WARP], biases[BLOCK_ROWS][WARP];
    const int i = blockIdx.x * WARP + threadIdx.x;
    const long long step = (long long)gridDim.y * BLOCK_ROWS;
    T gain = 0, bias = 0;
    for (long long r = (long long)blockIdx.y * BLOCK_ROWS + threadIdx.y; i < n && r < rows;
         r += step) {
        gain += dy[r * n + i] * normed[r * n + i];
        bias += dy[r * n + i];
    }
    gains[threadIdx.y][threadIdx.x] = gain;
    biases[threadIdx.y][threadIdx.x] = bias;
    __syncthreads();
    if (threadIdx.y > 0 || i >= n) return;
    for (int y = 1; y < BLOCK_ROWS; ++y) {
        gain += gains[y][threadIdx.x];
        bias += biases[y][threadIdx.x];
    }
    sums += (long long)blockIdx.y * 2 * n;
    sums[i] = gain;
    sums[n + i] = bias;
}

template <class T>
__global__ void norm_totals(const T* sums, T* dgain, T* dbias, int blocks, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= 2 * n) return;
    T sum = 0;
    for (int b = 0; b < blocks; ++b) sum += sums[(long long)b * 2 * n + i];
    T* total = i < n ? dgain + i : dbias + (i - n);
    *total += sum;
}
