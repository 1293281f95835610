// A file mapped into memory for reading: only the pages that are accessed are read.
#pragma once

#include <cstddef>
#include <filesystem>

namespace transom {

class MappedFile {
public:
    // Throws Error if it cannot be mapped, or has another size.
    MappedFile(const std::filesystem::path& path, size_t bytes);
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    ~MappedFile();

    const char* data() const { return data_; }

private:
    const char* data_;
    size_t bytes_;
};

}  // namespace transom
