// BLAKE2b (RFC 7693) without a key, and the file hash used in a bundle's manifest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace transom {

class Blake2b {
public:
    // `size`: bytes of the digest, 1 to 64.
    explicit Blake2b(size_t size);

    void update(const void* data, size_t bytes);
    // The digest, `size` bytes. Nothing may be added afterwards.
    std::string digest();

private:
    void compress(bool last);

    size_t size_;
    size_t filled_ = 0;
    uint64_t counted_ = 0;  // bytes compressed so far; no file reaches 2^64 bytes
    std::array<uint64_t, 8> state_;
    std::array<uint8_t, 128> block_;
};

// The hash of a file in hexadecimal digits, as docs/bundles.md defines it. Throws Error.
std::string file_hash(const std::filesystem::path& path);

}  // namespace transom
