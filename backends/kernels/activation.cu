// Bias, activation and mask of a layer, their gradient, and column sums. Plain reference, for
// matrices of n columns, any number of rows r, and masks m of 0 and 1:
//
//     forward:     a[r, i] += b[i],   h[r, i] = m[r, i] f(a[r, i])
//     gradient:    da[r, i] = dh[r, i] f'(a[r, i]) m[r, i],   db[i] += sum_r da[r, i]
//     column_sum:  db[i] += sum_r dy[r, i]
//
// f and f' are those of comet_np.functional.activations, with the same care for large |a|. A block
// is 32 columns wide and 8 rows high: a warp reads 32 neighbours of a row, and each thread keeps to
// one column, so that its bias stays in a register and it sums alone until the end.

constexpr int BLOCK_ROWS = 8;

struct Cell {  // where a thread begins, and how many rows further it goes on
    int i;
    long long r, step;

    __device__ Cell()
        : i(blockIdx.x * WARP + threadIdx.x), r((long long)blockIdx.y * BLOCK_ROWS + threadIdx.y),
          step((long long)gridDim.y * BLOCK_ROWS) {}
};

enum MaskKind { NO_MASK, BYTES, BITS };  // bits as kwta packs them

// The rows of a mask lie `pitch` bytes apart.
template <class T>
__device__ T masked(T x, const unsigned char* m, int kind, long long pitch, long long r, int i) {
    if (kind == NO_MASK) return x;
    m += r * pitch;
    return x * (kind == BYTES ? m[i] : m[i / 8] >> (7 - i % 8) & 1);
}

// Adds up the threads' sums of each column of the block. If the block is the only one over the
// rows, they are added to out (n); else they become row blockIdx.y of out (blocks, n), for a
// column_sum.
template <class T> __device__ void finish_columns(T sum, int i, int n, T* out) {
    __shared__ T sums[BLOCK_ROWS][WARP];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= n) return;
    for (int y = 1; y < BLOCK_ROWS; ++y) sum += sums[y][threadIdx.x];
    out += (long long)blockIdx.y * n;
    out[i] = gridDim.y == 1 ? out[i] + sum : sum;
}

template <class T> __device__ T sigmoid(T a) {
    const T t = exp(-fabs(a));  // never above 1, so it cannot overflow
    return (a >= 0 ? 1 : t) / (1 + t);
}
template <class T> __device__ T softplus(T a) { return fmax(a, (T)0) + log1p(exp(-fabs(a))); }
template <class T> __device__ T cdf(T a) { return (T)0.5 * (1 + erf(a * (T)0.7071067811865476)); }
template <class T> __device__ T pdf(T a) { return exp((T)-0.5 * a * a) * (T)0.3989422804014327; }
template <class T> __device__ T square(T a) { return a * a; }

// (1 + tanh(u)) / 2 of gelu_new, which is sigmoid(2 u), and 2 du/da.
template <class T> __device__ T gelu_gate(T a) {
    return sigmoid((T)1.5957691216057308 * a * (1 + (T)0.044715 * a * a));
}
template <class T> __device__ T gelu_slope(T a) {
    return (T)1.5957691216057308 * (1 + 3 * (T)0.044715 * a * a);
}

#define ACTIVATION(name, value, derivative)                                  \
    struct f_##name {                                                        \
        template <class T> static __device__ T f(T a) { return value; }      \
        template <class T> static __device__ T d(T a) { return derivative; } \
    };

ACTIVATION(identity, a, 1)
ACTIVATION(relu, a < 0 ? 0 : a, a > 0)
ACTIVATION(leaky_relu, a > 0 ? a : (T)0.1 * a, a > 0 ? (T)1 : (T)0.1)
ACTIVATION(tanh, tanh(a), 1 - square(tanh(a)))
ACTIVATION(sigmoid, sigmoid(a), sigmoid(a) * sigmoid(-a))
ACTIVATION(softplus, softplus(a), sigmoid(a))
ACTIVATION(silu, a * sigmoid(a), sigmoid(a) + a * (sigmoid(a) * sigmoid(-a)))
ACTIVATION(gelu, a * cdf(a), cdf(a) + a * pdf(a))
ACTIVATION(gelu_new, a * gelu_gate(a),
           gelu_gate(a) + a * (gelu_gate(a) * gelu_gate(-a)) * gelu_slope(a))
ACTIVATION(elu, a > 0 ? a : expm1(a), a > 0 ? 1 : exp(a))
constexpr double SELU_ALPHA = 1.6732632423543772, SELU_SCALE = 1.0507009873554805;
ACTIVATION(selu, (T)SELU_SCALE * (a > 0 ? a : (T)SELU_ALPHA * expm1(a)),
           (T)SELU_SCALE * (a > 0 ? 1 : (T)SELU_ALPHA * exp(a)))
ACTIVATION(mish, a * tanh(softplus(a)),
           tanh(softplus(a)) + a * (1 - square(tanh(softplus(a)))) * sigmoid(a))
ACTIVATION(centred_sigmoid, sigmoid(a) - (T)0.5, sigmoid(a) * sigmoid(-a))
ACTIVATION(centred_softplus, softplus(a) - (T)0.6931471805599453, sigmoid(a))

// b and m may be null; without b, a is not written.
template <class T, class F>
__global__ void forward(T* a, const T* b, const unsigned char* m, int kind, long long pitch, T* h,
                        long long rows, int n) {
    Cell cell;
    if (cell.i >= n) return;
    const T bias = b ? b[cell.i] : 0;
    for (; cell.r < rows; cell.r += cell.step) {
        const long long at = cell.r * n + cell.i;
        T value = a[at];
        if (b) a[at] = value += bias;
        h[at] = masked(F::f(value), m, kind, pitch, cell.r, cell.i);
    }
}

// m and db may be null.
template <class T, class F>
__global__ void gradient(const T* dh, const T* a, const unsigned char* m, int kind, long long pitch,
                         T* da, T* db, long long rows, int n) {
    Cell cell;
    T sum = 0;
    for (; cell.i < n && cell.r < rows; cell.r += cell.step) {
        const long long at = cell.r * n + cell.i;
        sum += da[at] = masked(dh[at] * F::d(a[at]), m, kind, pitch, cell.r, cell.i);
    }
    if (db) finish_columns(sum, cell.i, n, db);
}

template <class T> __global__ void column_sum(const T* dy, T* db, long long rows, int n) {
    Cell cell;
    T sum = 0;
    for (; cell.i < n && cell.r < rows; cell.r += cell.step) sum += dy[cell.r * n + cell.i];
    finish_columns(sum, cell.i, n, db);
}
