#include "blake2b.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <vector>

#include "error.hpp"

namespace transom {

namespace {

constexpr std::array<uint64_t, 8> initial = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
};

constexpr uint8_t sigma[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

constexpr size_t piece_bytes = size_t{32} << 20;

uint64_t rotated(uint64_t word, int bits) { return (word >> bits) | (word << (64 - bits)); }

// Assumes a little-endian machine, as are all that ONNX Runtime supports.
uint64_t word_at(const uint8_t* bytes) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    return word;
}

}  // namespace

Blake2b::Blake2b(size_t size) : size_(size), state_(initial) { state_[0] ^= 0x01010000 ^ size; }

void Blake2b::update(const void* data, size_t bytes) {
    const auto* next = static_cast<const uint8_t*>(data);
    while (bytes > 0) {
        if (filled_ == block_.size()) compress(false);  // not earlier, because the last block is compressed differently
        const size_t taken = std::min(bytes, block_.size() - filled_);
        std::memcpy(block_.data() + filled_, next, taken);
        filled_ += taken;
        next += taken;
        bytes -= taken;
    }
}

std::string Blake2b::digest() {
    std::fill(block_.begin() + static_cast<std::ptrdiff_t>(filled_), block_.end(), uint8_t{0});
    compress(true);
    std::string out(64, '\0');
    std::memcpy(out.data(), state_.data(), 64);
    out.resize(size_);
    return out;
}

void Blake2b::compress(bool last) {
    counted_ += filled_;
    filled_ = 0;
    uint64_t m[16];
    for (int i = 0; i < 16; ++i) m[i] = word_at(block_.data() + 8 * i);
    uint64_t v[16];
    std::copy(state_.begin(), state_.end(), v);
    std::copy(initial.begin(), initial.end(), v + 8);
    v[12] ^= counted_;
    if (last) v[14] = ~v[14];
    const auto mix = [&v](int a, int b, int c, int d, uint64_t x, uint64_t y) {
        v[a] += v[b] + x;
        v[d] = rotated(v[d] ^ v[a], 32);
        v[c] += v[d];
        v[b] = rotated(v[b] ^ v[c], 24);
        v[a] += v[b] + y;
        v[d] = rotated(v[d] ^ v[a], 16);
        v[c] += v[d];
        v[b] = rotated(v[b] ^ v[c], 63);
    };
    for (int round = 0; round < 12; ++round) {
        const uint8_t* s = sigma[round % 10];
        for (int i = 0; i < 4; ++i) mix(i, i + 4, i + 8, i + 12, m[s[2 * i]], m[s[2 * i + 1]]);
        for (int i = 0; i < 4; ++i)
            mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[s[2 * i + 8]], m[s[2 * i + 9]]);
    }
    for (size_t i = 0; i < 8; ++i) state_[i] ^= v[i] ^ v[i + 8];
}

std::string file_hash(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    const auto unreadable = [&path] {
        return Error(path.string() + " cannot be read", "Copy the bundle again from where it was made");
    };
    std::error_code code;
    const uint64_t bytes = std::filesystem::file_size(path, code);
    if (!file || code) throw unreadable();
    Blake2b whole(20);
    const std::string digits = std::to_string(bytes);
    whole.update(digits.data(), digits.size());
    std::vector<char> buffer(size_t{1} << 20);
    for (uint64_t start = 0; start == 0 || start < bytes; start += piece_bytes) {
        Blake2b piece(32);
        for (uint64_t left = std::min<uint64_t>(piece_bytes, bytes - start); left > 0;) {
            const size_t taken = std::min<uint64_t>(left, buffer.size());
            file.read(buffer.data(), static_cast<std::streamsize>(taken));
            if (!file) throw unreadable();
            piece.update(buffer.data(), taken);
            left -= taken;
        }
        const std::string digest = piece.digest();
        whole.update(digest.data(), digest.size());
    }
    std::string hexadecimal;
    for (const char byte : whole.digest()) {
        hexadecimal += "0123456789abcdef"[static_cast<uint8_t>(byte) >> 4];
        hexadecimal += "0123456789abcdef"[byte & 15];
    }
    return hexadecimal;
}

}  // namespace transom
