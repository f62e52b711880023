// The factor of inverted dropout. Plain reference, with the stream of comet_np.rng.random_bits:
//
//     factor[i] = kept if bits(i) >= least, else 0,   bits(i) = word i % 4 of philox(i / 4, key)
//
// Philox 4x32 with 10 rounds: Salmon et al., 'Parallel random numbers: as easy as 1, 2, 3', 2011.

template <class T>
__global__ void dropout_factor(T* factor, long long n, unsigned k0, unsigned k1,
                               unsigned long long least, T kept) {
    const long long block = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned c[4] = {(unsigned)block, (unsigned)(block >> 32), 0, 0};
    for (int round = 0; round < 10; ++round) {
        const unsigned long long p0 = c[0] * 0xD2511F53ull, p1 = c[2] * 0xCD9E8D57ull;
        c[0] = (unsigned)(p1 >> 32) ^ c[1] ^ k0;
        c[1] = (unsigned)p1;
        c[2] = (unsigned)(p0 >> 32) ^ c[3] ^ k1;
        c[3] = (unsigned)p0;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    for (int word = 0; word < 4; ++word)
        if (4 * block + word < n) factor[4 * block + word] = c[word] >= least ? kept : 0;
}
