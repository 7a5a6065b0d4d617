// A file in memory: mapped where the system can, read otherwise; never more than it has.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>

#include "runtime/error.h"

namespace bellbox {

class Mapped {
  public:
    explicit Mapped(const std::string& path) {
        const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
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
