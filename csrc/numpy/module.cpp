// mtml_fast._numpy: the core on NumPy arrays, without torch. mtml_fast/numpy.py is its public face.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gradients_check.h"
#include "heads_check.h"
#include "isa/choose.h"
#include "mlp_adapt.h"
#include "mlp_adapt_check.h"
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

Array array(const py::array& x) {
  MTML_CHECK(x.flags() & py::array::c_style, "mlp_adapt: arrays must be contiguous");
  const Dtype dtype = py::isinstance<py::array_t<float>>(x)     ? Dtype::kFloat32
                      : py::isinstance<py::array_t<double>>(x)  ? Dtype::kFloat64
                      : py::isinstance<py::array_t<int64_t>>(x) ? Dtype::kInt64
                      : py::isinstance<py::array_t<bool>>(x)    ? Dtype::kBool
                                                                : Dtype::kOther;
  return {{reinterpret_cast<const int64_t*>(x.shape()), x.ndim()}, dtype, x.data()};
}

std::optional<Array> array(const std::optional<py::array>& x) {
  return x ? std::optional<Array>(array(*x)) : std::nullopt;
}

std::vector<Array> arrays(const std::vector<py::array>& list) {
  std::vector<Array> result;
  for (const py::array& x : list) result.push_back(array(x));
  return result;
}

// Outputs, losses and fast, each with its axis of steps; with `gradient` also the mean over the tasks of the last
// losses, and the gradients of this mean with respect to params.
template <class T>
std::vector<py::array> mlp_adapt_of(const MlpInputs& call, bool gradient) {
  MlpSetup<T> setup(call);
  MlpArguments<T>& a = setup.arguments();
  std::vector<py::array> made;
  // room for a result, kept in `made`
  auto room = [&](const int64_t* sizes, int64_t dim) {
    py::array_t<T> x(std::vector<py::ssize_t>(sizes, sizes + dim));
    made.push_back(x);
    return x.mutable_data();
  };
  for (const auto& [shape, result] :
       {std::pair{setup.outputs_shape(), &a.outputs}, std::pair{setup.losses_shape(), &a.losses},
        std::pair{setup.fast_shape(), &a.fast}}) {
    *result = room(shape.data(), static_cast<int64_t>(shape.size()));
  }
  const int64_t tasks = setup.tasks(), last = (setup.evaluations() - 1) * tasks;
  T* const losses = a.losses;
  std::fill_n(losses, last + tasks, T(0));
  if (!setup.labelled()) a.losses = nullptr;
  if (!a.wants_fast) a.fast = nullptr;
  T* mean = nullptr;
  std::vector<T> d_losses(last + tasks);
  if (gradient) {
    MTML_CHECK(setup.labelled(), "mlp_adapt: query_y must be given where the gradient is wanted");
    mean = room(nullptr, 0);
    std::vector<bool> needs(call.params.size() + call.lr.size() + 2);
    std::fill_n(needs.begin(), call.params.size(), true);
    setup.give_gradients(needs, [&](const Shape& shape) { return room(shape.sizes, shape.dim); });
    std::fill_n(d_losses.data() + last, tasks, static_cast<T>(1.0 / static_cast<double>(tasks)));
    a.d_losses = d_losses.data();
  }

  py::gil_scoped_release release;
  if (tasks == 0) {
    setup.zero_gradients();
  } else if (gradient) {
    mlp_adapt_gradients(a, Threads());
  } else {
    mlp_adapt_forward(a, static_cast<T*>(nullptr), Threads());
  }
  if (gradient) {
    double sum = 0;
    for (int64_t t = 0; t < tasks; ++t) sum += losses[last + t];
    *mean = static_cast<T>(sum / static_cast<double>(tasks));
  }
  return made;
}

std::vector<py::array> mlp_adapt(const std::vector<py::array>& params, const std::vector<py::array>& lr,
                                 const py::array& support_x, const py::array& support_y, const py::array& query_x,
                                 const std::optional<py::array>& query_y,
                                 const std::optional<py::array>& support_offsets,
                                 const std::optional<py::array>& query_offsets,
                                 const std::optional<py::array>& class_mask, const std::vector<bool>& adapted,
                                 int64_t steps, const std::string& loss, const std::string& activation, bool bias,
                                 bool norm, double norm_eps, double momentum, double weight_decay,
                                 std::optional<double> clip, bool first_order, bool every_step, bool return_parameters,
                                 bool gradient) {
  const MlpInputs call{arrays(params),
                       arrays(lr),
                       array(support_x),
                       array(support_y),
                       array(query_x),
                       array(query_y),
                       array(support_offsets),
                       array(query_offsets),
                       array(class_mask),
                       adapted,
                       steps,
                       loss,
                       activation,
                       bias,
                       norm,
                       norm_eps,
                       momentum,
                       weight_decay,
                       clip,
                       first_order,
                       every_step,
                       return_parameters};
  MTML_CHECK(!params.empty(), "mlp_adapt: params must hold at least one layer, got none");
  const Dtype dtype = call.params[0].dtype;
  MTML_CHECK(dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64, "mlp_adapt: params must be float32 or float64");
  return dtype == Dtype::kFloat32 ? mlp_adapt_of<float>(call, gradient) : mlp_adapt_of<double>(call, gradient);
}

// The outputs; or, with losses, the losses, and with `gradient` the gradients of their sum with respect to x and the
// parameters that there are.
template <class T>
std::vector<py::array> heads_of(const HeadsInputs& call, const HeadsLossInputs* losses, bool gradient) {
  const HeadsSetup<T> setup(call);
  std::vector<py::array> made;
  auto room = [&](const Shape& shape) {
    py::array_t<T> x(std::vector<py::ssize_t>(shape.sizes, shape.sizes + shape.dim));
    made.push_back(x);
    return x.mutable_data();
  };
  const int64_t size = losses ? setup.batch().tasks : setup.num_outputs();
  T* const results = room({&size, 1});
  if (!losses) {
    py::gil_scoped_release release;
    heads_forward(setup.batch(), results, Threads());
    return made;
  }
  const HeadsTargets<T> targets = setup.targets(*losses);
  HeadTensors<T> to{};
  if (gradient) {
    to.x = room(call.x.shape);
    to.weight = room(call.weight.shape);
    if (call.bias) to.bias = room(call.bias->shape);
    if (call.hidden_weight) to.hidden_weight = room(call.hidden_weight->shape);
    if (call.hidden_bias) to.hidden_bias = room(call.hidden_bias->shape);
  }
  py::gil_scoped_release release;
  heads_loss<T>(setup.batch(), targets, results, nullptr, to, Threads());
  return made;
}

HeadsInputs heads_inputs(const py::array& x, const py::array& offsets, const py::array& weight,
                         const std::optional<py::array>& bias, const std::optional<py::array>& out_offsets,
                         const std::optional<py::array>& hidden_weight, const std::optional<py::array>& hidden_bias,
                         const std::string& activation) {
  HeadsInputs call{array(x),           array(offsets),       array(weight),      array(bias),
                   array(out_offsets), array(hidden_weight), array(hidden_bias), activation};
  MTML_CHECK(call.x.dtype == Dtype::kFloat32 || call.x.dtype == Dtype::kFloat64, "x must be float32 or float64");
  return call;
}

std::vector<py::array> heads(const py::array& x, const py::array& offsets, const py::array& weight,
                             const std::optional<py::array>& bias, const std::optional<py::array>& out_offsets,
                             const std::optional<py::array>& hidden_weight, const std::optional<py::array>& hidden_bias,
                             const std::string& activation) {
  const HeadsInputs call = heads_inputs(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation);
  return call.x.dtype == Dtype::kFloat32 ? heads_of<float>(call, nullptr, false)
                                         : heads_of<double>(call, nullptr, false);
}

std::vector<py::array> heads_losses(const py::array& x, const std::optional<py::array>& labels,
                                    const std::optional<py::array>& targets, const py::array& offsets,
                                    const py::array& weight, const std::optional<py::array>& bias,
                                    const std::optional<py::array>& out_offsets,
                                    const std::optional<py::array>& hidden_weight,
                                    const std::optional<py::array>& hidden_bias,
                                    const std::optional<py::array>& class_weights, const std::optional<py::array>& mask,
                                    const std::string& activation, const std::vector<int64_t>& losses,
                                    double label_smoothing, int64_t ignore_index, double delta, bool gradient) {
  const HeadsInputs call = heads_inputs(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation);
  const HeadsLossInputs with{array(labels), array(targets),  array(class_weights), array(mask),
                             losses,        label_smoothing, ignore_index,         delta};
  return call.x.dtype == Dtype::kFloat32 ? heads_of<float>(call, &with, gradient)
                                         : heads_of<double>(call, &with, gradient);
}

template <class T>
py::array gram_of(const GradientInputs& inputs) {
  const auto leaves = inputs.leaves<T>([](size_t) { return nullptr; });
  py::array_t<double> gram({inputs.tasks(), inputs.tasks()});
  double* const to = gram.mutable_data();
  {
    py::gil_scoped_release release;
    gradient_gram(inputs.view(leaves), to, Threads());
  }
  return gram;
}

py::array gradient_gram_of(const std::vector<py::array>& gradients) {
  const GradientInputs inputs(arrays(gradients));
  return inputs.is_float() ? gram_of<float>(inputs) : gram_of<double>(inputs);
}

template <class T>
std::vector<py::array> combined(const GradientInputs& inputs, const py::array& weights) {
  const T* w = inputs.weights<T>(array(weights));
  std::vector<py::array> made;
  const auto leaves = inputs.leaves<T>([&](size_t i) {
    const Shape shape = inputs.task_shape(i);
    py::array_t<T> x(std::vector<py::ssize_t>(shape.sizes, shape.sizes + shape.dim));
    made.push_back(x);
    return x.mutable_data();
  });
  py::gil_scoped_release release;
  gradient_combine(inputs.view(leaves), w, Threads());
  return made;
}

std::vector<py::array> gradient_combine_of(const std::vector<py::array>& gradients, const py::array& weights) {
  const GradientInputs inputs(arrays(gradients));
  return inputs.is_float() ? combined<float>(inputs, weights) : combined<double>(inputs, weights);
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
  m.def("mlp_adapt", &mtml::mlp_adapt, "Arguments as of the operator, then whether the gradient is wanted.");
  m.def("gradient_gram", &mtml::gradient_gram_of, "M [T, T].");
  m.def("gradient_combine", &mtml::gradient_combine_of, "The weighted sum of each leaf.");
  m.def("heads", &mtml::heads, "Arguments as of the operator.");
  m.def("heads_loss", &mtml::heads_losses, "Arguments as of the operator, then whether the gradients are wanted.");
  m.def(
      "build_info", [] { return std::string(mtml_fast_build_info()); },
      "JSON: version, compiler, instruction sets built, instruction set in use.");
  m.def("cpu_features", &mtml::cpu_features, "The instruction sets that this processor can run, and the chosen one.");
}
