// mtml_fast._numpy: the core on NumPy arrays, without torch. mtml_fast/numpy.py is its public face.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "isa/choose.h"
#include "sgd_step_check.h"

namespace py = pybind11;
extern "C" const char* mtml_fast_build_info();

namespace mtml {
namespace {

// only C-contiguous arrays of exactly this dtype: mtml_fast/numpy.py prepares them
template <class T>
using Arrays = std::vector<py::array_t<T, py::array::c_style>>;

// pybind's sizes are ssize_t: the same as int64_t, by another name on some platforms
static_assert(sizeof(py::ssize_t) == sizeof(int64_t), "a 64-bit platform");

template <class T>
std::vector<Shape> shapes(const Arrays<T>& arrays) {
  std::vector<Shape> result;
  for (const auto& x : arrays) result.push_back({reinterpret_cast<const int64_t*>(x.shape()), x.ndim()});
  return result;
}

template <class T>
Arrays<T> empty_like(const Arrays<T>& arrays) {
  Arrays<T> result;
  for (const auto& x : arrays) result.emplace_back(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  return result;
}

template <class T>
std::pair<Arrays<T>, Arrays<T>> sgd_step(const Arrays<T>& params, const Arrays<T>& grads, const Arrays<T>& lr,
                                         const Arrays<T>& momentum_buffers, double momentum, double weight_decay,
                                         std::optional<double> clip) {
  const SgdOptions options{momentum, weight_decay, clip.value_or(std::numeric_limits<double>::infinity())};
  const auto rates = check_sgd_step(shapes<T>(params), shapes<T>(grads), shapes<T>(lr), shapes<T>(momentum_buffers),
                                    momentum, weight_decay, options.clip);
  Arrays<T> new_params = empty_like<T>(params), new_buffers = empty_like<T>(momentum_buffers);
  const int64_t num_tasks = params[0].shape(0);
  std::vector<SgdLeaf<T>> leaves;
  for (size_t i = 0; i < params.size(); ++i) {
    const bool buffered = !momentum_buffers.empty();
    leaves.push_back({num_tasks > 0 ? params[i].size() / num_tasks : 0, params[i].data(), grads[i].data(),
                      buffered ? momentum_buffers[i].data() : nullptr, lr[lr.size() == 1 ? 0 : i].data(), rates[i].task,
                      rates[i].element, new_params[i].mutable_data(),
                      buffered ? new_buffers[i].mutable_data() : nullptr});
  }
  {
    py::gil_scoped_release release;
    kernels().sgd_step<T>().forward(leaves.data(), leaves.size(), options, 0, num_tasks);
  }
  return {std::move(new_params), std::move(new_buffers)};
}

py::dict cpu_features() {
  py::dict result;
  result["runnable"] = isas_runnable();
  result["chosen"] = kernels().isa;
  return result;
}

}  // namespace
}  // namespace mtml

PYBIND11_MODULE(_numpy, m) {
  m.doc() = "The core on NumPy arrays; use mtml_fast.numpy.";
  auto def = [&](auto function) {
    m.def("sgd_step", function, py::arg("params").noconvert(), py::arg("grads").noconvert(), py::arg("lr").noconvert(),
          py::arg("momentum_buffers").noconvert(), py::arg("momentum"), py::arg("weight_decay"), py::arg("clip"));
  };
  def(&mtml::sgd_step<float>);
  def(&mtml::sgd_step<double>);
  m.def(
      "build_info", [] { return std::string(mtml_fast_build_info()); },
      "JSON: version, compiler, instruction sets built, instruction set in use.");
  m.def("cpu_features", &mtml::cpu_features, "The instruction sets that this processor can run, and the chosen one.");
}
