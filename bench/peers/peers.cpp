// The list of the libraries that CMakeLists.txt has found.
#include "peers/peers.hpp"

namespace bench {

std::vector<Contender> peers([[maybe_unused]] Index threads) {
  std::vector<Contender> found;
#if defined(LONGSPAN_BENCH_GGML)
  found.push_back(ggml(threads));
#endif
#if defined(LONGSPAN_BENCH_ONEDNN)
  found.push_back(onednn(threads));
#endif
#if defined(LONGSPAN_BENCH_ONNXRUNTIME)
  found.push_back(onnxruntime(threads));
#endif
#if defined(LONGSPAN_BENCH_TORCH)
  found.push_back(torch(threads));
#endif
  return found;
}

}  // namespace bench
