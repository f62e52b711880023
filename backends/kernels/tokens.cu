// The embedding of tokens. Plain reference, for tokens t[r] of texts of T tokens, features i:
//
//     tokens_forward:   x[r, i] = table[t[r], i] + positions[r % T, i]
//     tokens_backward:  dtable[v, i] += sum of dx[r, i] over all r with t[r] == v, in their order
//
// where the positions begin with that of the first token. A token outside 0..V-1 is noted in
// `error`, and makes its row NaN.
//
// Backwards a block takes a place r, and works only if no place before it has the same token: then
// it adds up the rows of all places from there on that have, a chunk of places at a time. So sums
// have one order, and no two blocks write to one row. Each thread keeps its features in registers.

constexpr int THREADS = 256;  // a block of tokens_backward, and the places of a chunk
constexpr int FEATURES = 4;   // a thread of it
constexpr int WARPS_OF_BLOCK = THREADS / WARP;

template <class T>
__global__ void tokens_forward(const long long* tokens, const T* table, const T* positions, T* x,
                               long long rows, int V, int length, int n, Place* error) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    for (long long r = (long long)blockIdx.y * blockDim.y + threadIdx.y; r < rows;
         r += (long long)gridDim.y * blockDim.y) {
        const long long token = tokens[r];
        const bool fits = 0 <= token && token < V;
        x[r * n + i] =
            fits ? table[token * n + i] + positions[r % length * n + i] : (T)NOT_A_NUMBER;
        if (!fits && i == 0) note_error(error, r, token);
    }
}

template <class T>
__global__ void tokens_backward(const T* dx, const long long* tokens, T* dtable, long long rows,
                                int V, int n) {
    __shared__ unsigned found[2][WARPS_OF_BLOCK];
    const long long place = blockIdx.x, token = tokens[place];
    if (token < 0 || token >= V) return;
    int before = 0;
    for (long long r = threadIdx.x; r < place; r += THREADS) before += tokens[r] == token;
    if (group_sum<WARPS_OF_BLOCK>(before, 0)) return;
    const long long first = (long long)blockIdx.y * THREADS * FEATURES + threadIdx.x;
    T sums[FEATURES] = {};
    int turn = 0;  // as that of group_sum
    for (long long start = place; start < rows; start += THREADS, turn = 1 - turn) {
        const long long mine = start + threadIdx.x;
        const unsigned same = __ballot_sync(ALL, mine < rows && tokens[mine] == token);
        if (threadIdx.x % WARP == 0) found[turn][threadIdx.x / WARP] = same;
        __syncthreads();
        for (int warp = 0; warp < WARPS_OF_BLOCK; ++warp) {
            for (unsigned left = found[turn][warp]; left; left &= left - 1) {
                const long long r = start + warp * WARP + __ffs(left) - 1;
#pragma unroll
                for (int k = 0; k < FEATURES; ++k)
                    if (first + k * THREADS < n) sums[k] += dx[r * n + first + k * THREADS];
            }
        }
    }
#pragma unroll
    for (int k = 0; k < FEATURES; ++k)
        if (first + k * THREADS < n) dtable[token * n + first + k * THREADS] += sums[k];
}
