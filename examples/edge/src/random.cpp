#include "random.hpp"

#include <algorithm>

namespace transom {

// The Mersenne Twister MT19937, seeded by an array (Matsumoto and Nishimura 1998, mt19937ar.c).
Random::Random(uint64_t seed) {
    const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    const uint32_t length = key[1] != 0 ? 2 : 1;
    start(19650218);
    uint32_t i = 1, j = 0;
    const auto wrap = [&] {
        if (++i == size) {
            state_[0] = state_[size - 1];
            i = 1;
        }
    };
    const auto mixed = [&](uint32_t factor) { return state_[i] ^ ((state_[i - 1] ^ (state_[i - 1] >> 30)) * factor); };
    for (uint32_t k = std::max(size, length); k > 0; --k) {
        state_[i] = mixed(1664525) + key[j] + j;
        j = (j + 1) % length;
        wrap();
    }
    for (uint32_t k = size - 1; k > 0; --k) {
        state_[i] = mixed(1566083941) - i;
        wrap();
    }
    state_[0] = 0x80000000;
}

void Random::start(uint32_t seed) {
    state_[0] = seed;
    for (uint32_t i = 1; i < size; ++i) state_[i] = 1812433253 * (state_[i - 1] ^ (state_[i - 1] >> 30)) + i;
}

uint32_t Random::next() {
    if (place_ == size) {
        for (uint32_t i = 0; i < size; ++i) {
            const uint32_t y = (state_[i] & 0x80000000) | (state_[(i + 1) % size] & 0x7fffffff);
            state_[i] = state_[(i + 397) % size] ^ (y >> 1) ^ ((y & 1) != 0 ? 0x9908b0df : 0);
        }
        place_ = 0;
    }
    uint32_t y = state_[place_++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return y ^ (y >> 18);
}

double Random::operator()() {
    const uint32_t high = next() >> 5, low = next() >> 6;
    return (high * 67108864.0 + low) / 9007199254740992.0;
}

}  // namespace transom
