// Random masks from a key and a counter. Plain reference:
//
//     dropout_factor:  factor[i] = kept if bits(step, i) >= least, else 0
//     example_mask:    mask[r, i] = bits(example[r], i) < limit
//
// bits(counter, i) as in comet_np.rng.random_bits: 32-bit word i % 8, the lowest first, of the
// Philox block of the counter (1 + i / 8, 0, counter, 0). A thread takes one block. Philox 4x64 with
// 10 rounds: Salmon et al., 'Parallel random numbers: as easy as 1, 2, 3', 2011.

typedef unsigned long long Word;
constexpr int WORDS = 8;  // 32-bit words a block

struct Philox {
    Word c[4];

    __device__ Philox(long long block, long long counter, Word k0, Word k1)
        : c{(Word)block + 1, 0, (Word)counter, 0} {
        constexpr Word M0 = 0xD2E7470EE14C6C93, M1 = 0xCA5A826395121157;
        for (int round = 0; round < 10; ++round) {
            const Word high0 = __umul64hi(M0, c[0]), low0 = M0 * c[0];
            const Word high1 = __umul64hi(M1, c[2]), low1 = M1 * c[2];
            c[0] = high1 ^ c[1] ^ k0;
            c[1] = low1;
            c[2] = high0 ^ c[3] ^ k1;
            c[3] = low0;
            k0 += 0x9E3779B97F4A7C15;
            k1 += 0xBB67AE8584CAA73B;
        }
    }
    __device__ unsigned bits(int i) const { return c[i / 2] >> 32 * (i % 2); }
};

template <class T>
__global__ void dropout_factor(T* factor, long long n, const long long* step_at, long long step,
                               Word k0, Word k1, Word least, T kept) {
    const long long block = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (WORDS * block >= n) return;
    const Philox drawn(block, number(step_at, step), k0, k1);
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
        if (WORDS * block + i < n) factor[WORDS * block + i] = drawn.bits(i) >= least ? kept : 0;
}

__global__ void example_mask(const long long* example, unsigned char* mask, long long rows, int n,
                             Word k0, Word k1, Word limit) {
    const int blocks = (n + WORDS - 1) / WORDS;  // a row
    const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x, r = at / blocks;
    if (r >= rows) return;
    const int block = at % blocks;
    const Philox drawn(block, example[r], k0, k1);
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
        if (WORDS * block + i < n) mask[r * n + WORDS * block + i] = drawn.bits(i) < limit;
}
