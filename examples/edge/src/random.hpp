// Random numbers between 0 and 1, identical to Python's `random.Random(seed).random()`, so that a seed samples the same
// tokens here as in Transom.
#pragma once

#include <array>
#include <cstdint>

namespace transom {

class Random {
public:
    explicit Random(uint64_t seed);

    // 53 random bits, in [0, 1).
    double operator()();

private:
    void start(uint32_t seed);
    uint32_t next();

    static constexpr uint32_t size = 624;
    std::array<uint32_t, size> state_;
    uint32_t place_ = size;
};

}  // namespace transom
