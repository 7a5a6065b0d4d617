// A file in memory: mapped where the system can, read otherwise; never more than it has.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "runtime/error.h"

namespace bellbox {

class Mapped {
  public:
    explicit Mapped(const std::string& path) {
        // O_NONBLOCK: a pipe in the place of a file would be waited for.
        const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (file < 0) throw Error(path + ": cannot be read (" + std::strerror(errno) + ")");
        struct stat about;
        const bool regular = ::fstat(file, &about) == 0 && S_ISREG(about.st_mode);
        size_ = regular ? static_cast<size_t>(about.st_size) : 0;
        if (size_ > 0) data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
        ::close(file);
        if (!regular) throw Error(path + ": is no regular file");
        if (data_ == MAP_FAILED) throw Error(path + ": cannot be mapped into memory");
    }
    ~Mapped() {
        if (size_ > 0) ::munmap(data_, size_);
    }
    Mapped(const Mapped&) = delete;
    Mapped& operator=(const Mapped&) = delete;

    // Bytes of this file that are not needed for now: their pages may leave memory, and come back when they are read.
    void forget(std::string_view some) const {
        static const uintptr_t page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
        const uintptr_t begin = (reinterpret_cast<uintptr_t>(some.data()) + page - 1) / page * page;
        const uintptr_t end = (reinterpret_cast<uintptr_t>(some.data()) + some.size()) / page * page;
        if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    }
    std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

inline bool is_file(const std::string& path) {
    struct stat about;
    return ::stat(path.c_str(), &about) == 0 && S_ISREG(about.st_mode);
}

}  // namespace bellbox
