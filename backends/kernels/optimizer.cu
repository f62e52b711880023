// Optimizers over flat buffers of n elements, one pass each. Plain reference, element by element:
//
//     shrunk:    out = (1 - decay) p - penalty sign(p)
//     sgd:       p -= lr (scale g + decay p)
//     momentum:  v = mu v + scale g + decay p,   p -= lr v
//     adam:      g = scale g + decay p           (decoupled: p *= 1 - lr decay instead)
//                u = beta1 u + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
//                p -= lr (u / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
//     squared_norm:  sum g^2 in float64, a partial sum a block
//
// scale clips the gradient, and undoes the scale of the loss; where it is NaN, the step is left out:
// nothing changes. It, lr and step come from the host, or from the device if their pointer is not
// null (see `number`).

#define EACH_ELEMENT(i, n)                                                              \
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n;         \
         i += (long long)gridDim.x * blockDim.x)

template <class T>
__global__ void shrunk(T* out, const T* p, long long n, const double* decay_at, double decay,
                       const double* penalty_at, double penalty) {
    const T factor = 1 - number(decay_at, decay), l1 = number(penalty_at, penalty);
    EACH_ELEMENT(i, n) out[i] = factor * p[i] - l1 * (T)((p[i] > 0) - (p[i] < 0));
}

template <class T>
__global__ void sgd(T* p, const T* g, long long n, const double* lr_at, double lr,
                    const double* scale_at, double scale, T decay) {
    const T rate = number(lr_at, lr), factor = number(scale_at, scale);
    if (factor != factor) return;
    EACH_ELEMENT(i, n) p[i] -= rate * (factor * g[i] + decay * p[i]);
}

template <class T>
__global__ void momentum(T* p, const T* g, T* v, long long n, const double* lr_at, double lr,
                         const double* scale_at, double scale, T mu, T decay) {
    const T rate = number(lr_at, lr), factor = number(scale_at, scale);
    if (factor != factor) return;
    EACH_ELEMENT(i, n) {
        v[i] = mu * v[i] + (factor * g[i] + decay * p[i]);
        p[i] -= rate * v[i];
    }
}

template <class T>
__global__ void adam(T* p, const T* g, T* u, T* v, long long n, const double* lr_at, double lr,
                     const double* scale_at, double scale, const long long* step_at, long long step,
                     double beta1, double beta2, T eps, double decay, int decoupled) {
    __shared__ T rate, root2, keep;  // lr / (1 - beta1^step), sqrt(1 - beta2^step), 1 - lr decay
    if (threadIdx.x == 0) {
        const double t = number(step_at, step), lr_now = number(lr_at, lr);
        rate = lr_now / (1 - pow(beta1, t));
        root2 = sqrt(1 - pow(beta2, t));
        keep = decoupled ? 1 - lr_now * decay : 1;
    }
    __syncthreads();
    const T factor = number(scale_at, scale), added_decay = decoupled ? 0 : decay;
    if (factor != factor) return;
    EACH_ELEMENT(i, n) {
        const T weight = p[i] * keep, gradient = factor * g[i] + added_decay * weight;
        u[i] = (T)beta1 * u[i] + (T)(1 - beta1) * gradient;
        v[i] = (T)beta2 * v[i] + (T)(1 - beta2) * gradient * gradient;
        p[i] = weight - rate * u[i] / (sqrt(v[i]) / root2 + eps);
    }
}

constexpr int NORM_THREADS = 256;

template <class T> __global__ void squared_norm(const T* g, double* parts, long long n) {
    double sum = 0;
    EACH_ELEMENT(i, n) sum += (double)g[i] * g[i];
    sum = group_sum<NORM_THREADS / WARP>(sum, 0);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
