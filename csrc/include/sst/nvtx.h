// A named range for the profiler where NVTX is at hand, nothing elsewhere.
#pragma once

#if defined(SST_NVTX)
#include <nvtx3/nvToolsExt.h>
#endif

namespace sst {

class Range {
public:
#if defined(SST_NVTX)
    explicit Range(const char* name) { nvtxRangePushA(name); }
    ~Range() { nvtxRangePop(); }
#else
    explicit Range(const char*) {}
    ~Range() {}
#endif
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;
};

}  // namespace sst
