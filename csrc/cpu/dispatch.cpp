// One table of kernels an instruction set; the best that this processor runs is picked at first use.
#include <atomic>
#include <cstring>

#include "cpu/drive.h"

namespace vlmfast {

#if defined(VLMFAST_X86)
namespace avx512 {
extern const Kernels table;
extern const Bytes bytes;
}  // namespace avx512
namespace avx2 {
extern const Kernels table;
}
#endif
#if defined(VLMFAST_ARM)
namespace neon {
extern const Kernels table;
}
#endif
namespace scalar {
extern const Kernels table;
}

struct Available {
  const Kernels* tables[5] = {};
  const char* names[6] = {};
#if defined(VLMFAST_X86)
  Kernels vnni = avx512::table;
#endif
  Available() {
    int n = 0;
#if defined(VLMFAST_X86)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      vnni.name = "avx512_vnni";
      vnni.bytes = &avx512::bytes;
      if (__builtin_cpu_supports("avx512vnni")) tables[n++] = &vnni;
      tables[n++] = &avx512::table;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables[n++] = &avx2::table;
#endif
#if defined(VLMFAST_ARM)
    tables[n++] = &neon::table;
#endif
    tables[n++] = &scalar::table;
    for (int i = 0; i < n; ++i) names[i] = tables[i]->name;
  }
};

static const Available& available() {
  static const Available all;
  return all;
}

static std::atomic<const Kernels*> forced{nullptr};

const Kernels& kernels() {
  const Kernels* table = forced;
  return table ? *table : *available().tables[0];
}

const char* isa() { return kernels().name; }
const char* const* isas() { return available().names; }

bool force_isa(const char* name) {
  if (!name) {
    forced = nullptr;
    return true;
  }
  for (const Kernels* table : available().tables)
    if (table && std::strcmp(table->name, name) == 0) {
      forced = table;
      return true;
    }
  return false;
}

}  // namespace vlmfast
