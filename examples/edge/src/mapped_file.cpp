#include "mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "error.hpp"

namespace transom {

MappedFile::MappedFile(const std::filesystem::path& path, size_t bytes) : bytes_(bytes) {
    const char* const again = "Copy the bundle again from where it was made";
    std::error_code code;
    const auto size = std::filesystem::file_size(path, code);
    if (code) throw Error(path.string() + " cannot be read: " + code.message(), again);
    if (size != bytes)
        throw Error(path.string() + " has " + std::to_string(size) + " bytes, not " + std::to_string(bytes), again);
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    void* memory = file < 0 ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0);
    const int reason = errno;
    if (file >= 0) close(file);
    if (memory == MAP_FAILED) throw Error(path.string() + " cannot be mapped: " + std::strerror(reason), again);
    data_ = static_cast<const char*>(memory);
}

MappedFile::~MappedFile() { munmap(const_cast<char*>(data_), bytes_); }

}  // namespace transom
