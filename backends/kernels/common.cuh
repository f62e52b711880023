// What the kernels share. Prepended to every .cu file before it is compiled.
//
// A block is made of warps of 32 threads. Sums are taken in a fixed order, so every result is the
// same bit for bit from run to run.

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;  // every lane of a warp
#define INF __uint_as_float(0x7f800000u)
#define NOT_A_NUMBER __uint_as_float(0x7fffffffu)

// Whether v >= threshold, as a bool and as 1 or 0. CuPy compiles with -ftz=true, under which a plain
// comparison of floats takes numbers below 1.2e-38 for 0; these instructions do not.
template <class T> __device__ bool reaches(T v, T threshold) { return v >= threshold; }
template <class T> __device__ float reached(T v, T threshold) { return v >= threshold ? 1 : 0; }
#ifdef __CUDACC__
template <> __device__ bool reaches(float v, float threshold) {
    unsigned yes;
    asm("{ .reg .pred p; setp.ge.f32 p, %1, %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(yes) : "f"(v), "f"(threshold));
    return yes;
}
template <> __device__ float reached(float v, float threshold) {
    float one;
    asm("set.ge.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(v), "f"(threshold));
    return one;
}
#endif

// A number from the host or, where `at` is not null, from the device: a captured graph replays its
// arguments unchanged, so what changes from step to step must lie in memory.
template <class T> __device__ T number(const T* at, T value) { return at ? *at : value; }

template <class T> __device__ T warp_sum(T x) {
    for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

__device__ int warp_sum(int x) {
#if __CUDA_ARCH__ >= 800  // one instruction
    return __reduce_add_sync(ALL, x);
#else
    return warp_sum<int>(x);
#endif
}

template <class T> __device__ T warp_max(T x) {
    for (int step = WARP / 2; step; step /= 2) {
        const T other = __shfl_xor_sync(ALL, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// Sum over the WARPS warps that work on one row, given to all their threads. Sums of one type that
// follow one another alternate `turn` between 0 and 1: a warp may still read the one while another
// writes the next, and no further, since each sum has a barrier.
template <int WARPS, class T> __device__ T group_sum(T x, int turn) {
    x = warp_sum(x);
    if constexpr (WARPS > 1) {
        __shared__ T slots[2][WARPS];
        if (threadIdx.x % WARP == 0) slots[turn][threadIdx.x / WARP] = x;
        __syncthreads();
        x = 0;
        for (int warp = 0; warp < WARPS; ++warp) x += slots[turn][warp];
    }
    return x;
}

// The same for the largest; one a kernel.
template <int WARPS, class T> __device__ T group_max(T x) {
    x = warp_max(x);
    if constexpr (WARPS > 1) {
        __shared__ T slots[WARPS];
        if (threadIdx.x % WARP == 0) slots[threadIdx.x / WARP] = x;
        __syncthreads();
        for (int warp = 0; warp < WARPS; ++warp) x = slots[warp] > x ? slots[warp] : x;
    }
    return x;
}

// Errors are noted here by kernels, and read by the host when it waits for the device anyway. Each
// is the place of the first offender: the row in the high 32 bits, the column or value in the low.
typedef unsigned long long Place;

__device__ void note_error(Place* first, long long row, int column) {
    atomicMin(first, (Place)row << 32 | (unsigned)column);
}
