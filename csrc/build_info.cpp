// What this library was built from, as JSON; Python compares the version with its own.
#include <string>

#include "isa/choose.h"

#ifdef __clang__
#define MTML_COMPILER "clang " __clang_version__
#else
#define MTML_COMPILER "gcc " __VERSION__
#endif

extern "C" __attribute__((visibility("default"))) const char* mtml_fast_build_info() {
  static const std::string info = [] {
    std::string isas;
    for (const std::string& name : mtml::isas_built()) isas += (isas.empty() ? "\"" : ", \"") + name + "\"";
    // the first literal is also looked up in the file itself, before it is loaded: see mtml_fast/ops/_library.py
    return "{\"version\": \"" MTML_FAST_VERSION "\", \"compiler\": \"" MTML_COMPILER "\", \"isas_built\": [" + isas +
           "], \"isa\": \"" + mtml::kernels().isa + "\"}";
  }();
  return info.c_str();
}
