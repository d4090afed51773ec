#include "mlp_adapt.h"

#include <algorithm>
#include <sstream>
#include <vector>

#include "isa/choose.h"
#include "memory.h"
#include "mlp_adapt_plan.h"

namespace mtml {
namespace {

// State and cotangents of a chunk of tasks stay within this where the forward sweep's state is not kept.
constexpr int64_t kChunkBytes = int64_t{256} << 20;
// Least work worth a thread of its own, in floating-point operations: some 20 us, where a second one costs 1 to 45.
constexpr double kOperationsPerThread = 1e6;

template <class T>
class Run {
 public:
  Run(const MlpArguments<T>& arguments, Parallel threads)
      : a(arguments),
        kernels_(kernels().mlp_adapt<T>()),
        parallel(threads),
        owned(make_plan(request())),
        plan(owned.plan) {
    call = {&a, &plan, owned.places.data(), owned.num_elements, nullptr, nullptr, nullptr};
  }

  int64_t state_size() const { return a.options.tasks * plan.state_size; }

  void forward(T* state) {
    if (a.options.tasks == 0) return;
    Shared shared(*this, /*first=*/true);
    Memory<T> none(0);
    over_blocks(
        0, a.options.tasks, 1,
        [&](int64_t begin, int64_t end, T* own_state, T* temp) {
          T* to = state ? state + begin * plan.state_size : own_state;
          kernels_.forward(call, begin, end, to, nullptr, temp);
        },
        !state);
  }

  // after a forward sweep that left `state`, or (null) with one of its own
  void backward(const T* state, bool with_results) {
    zero_rates();
    if (a.options.tasks == 0) return zero_gradients();
    MlpArguments<T> silent = a;
    if (!with_results) {
      silent.outputs = silent.losses = silent.fast = nullptr;
      call.arguments = &silent;
    }
    Shared shared(*this, /*first=*/!state);
    const bool factored = std::any_of(owned.layers.begin(), owned.layers.end(),
                                      [](const MlpLayer& x) { return x.form == Form::kFactored; });
    // the sums over tasks need the factors of all of them
    const bool keeps_state = !state && factored;
    const int64_t per_task = plan.kept_size + (keeps_state ? plan.state_size : 0);
    int64_t chunk = std::max<int64_t>(1, kChunkBytes / int64_t(sizeof(T)) / std::max<int64_t>(1, per_task));
    chunk = std::min(a.options.tasks, std::max(plan.block, chunk / plan.block * plan.block));

    Memory<T> kept(chunk * plan.kept_size), own(keeps_state ? chunk * plan.state_size : 0);
    Sums sums(*this);
    for (int64_t first = 0; first < a.options.tasks; first += chunk) {
      const int64_t last = std::min(a.options.tasks, first + chunk);
      over_blocks(
          first, last, 3,
          [&](int64_t begin, int64_t end, T* thread_state, T* temp) {
            T* kept_here = kept + (begin - first) * plan.kept_size;
            T* at = state         ? const_cast<T*>(state) + begin * plan.state_size
                    : keeps_state ? own + (begin - first) * plan.state_size
                                  : thread_state;
            if (!state) kernels_.forward(call, begin, end, at, kept_here, temp);
            kernels_.backward(call, begin, end, at, kept_here, temp);
          },
          !state && !keeps_state);
      const T* states = state ? state + first * plan.state_size : own;
      sums.add(first, last, states, kept);
    }
    sums.finish();
    call.arguments = &a;
  }

  std::string describe(bool backward) const;

 private:
  const MlpArguments<T>& a;
  const MlpAdapt<T>& kernels_;
  Parallel parallel;
  OwnedPlan owned;
  MlpPlan& plan;
  MlpCall<T> call;

  PlanRequest request() const {
    PlanRequest r;
    r.options = a.options;
    r.rate_rows = 0;
    for (int64_t p = 0; p < a.num_params; ++p) {
      const MlpParameter<T>& param = a.params[p];
      r.moves.push_back(param.moves);
      r.per_task.push_back(param.task_stride != 0);
      r.rate_by_element.push_back(param.rate_element != 0 && param.moves);
      if (param.rate_element != 0 && a.wants_rates) {
        r.rate_rows = std::max(r.rate_rows, param.rate_step == 0 ? int64_t{1} : a.options.steps);
      }
    }
    r.support_rows = a.support.max_rows;
    r.query_rows = a.query.max_rows;
    r.all_support_rows = a.support.offsets[a.options.tasks];
    r.all_query_rows = a.query.offsets[a.options.tasks];
    r.wants_fast = a.wants_fast;
    r.wants_rates = a.wants_rates;
    r.wants_support_x = a.wants_support_x;
    r.wants_query_x = a.wants_query_x;
    r.element_bytes = sizeof(T);
    r.lanes = kernels_.lanes;
    r.panel = kernels_.panel;
    r.packed_size = kernels_.packed_size;
    return r;
  }

  // f(begin, end, state, temp) over blocks of the tasks [first, last), each with a thread's own memory
  template <class F>
  void over_blocks(int64_t first, int64_t last, double weight, const F& f, bool needs_state) {
    const int64_t blocks = (last - first + plan.block - 1) / plan.block;
    const double per_block = std::max(1.0, weight / 4 * plan.operations / double(a.options.tasks) * double(plan.block));
    const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kOperationsPerThread / per_block));
    parallel(blocks, grain, [&](int64_t begin, int64_t end) {
      Memory<T> temp(plan.block * plan.temp_size), state(needs_state ? plan.block * plan.state_size : 0);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t t = first + block * plan.block;
        f(t, std::min(last, t + plan.block), state, temp);
      }
    });
  }

  // what all tasks share, for the length of a call
  struct Shared {
    Memory<T> shared, support, query;

    Shared(Run& run, bool first)
        : shared(run.plan.shared_size),
          support(first ? run.first_size(run.a.support) : 0),
          query(first ? run.first_size(run.a.query) : 0) {
      run.call.shared = shared;
      run.call.first_support = support;
      run.call.first_query = query;
      run.kernels_.prepare(run.call);
      if (!first || !run.has_first_product()) return;
      const int64_t rows = run.a.support.offsets[run.a.options.tasks] + run.a.query.offsets[run.a.options.tasks];
      const MlpLayer& layer = run.owned.layers[0];
      const double per_row = 2.0 * double(layer.in) * double(layer.out);
      const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kOperationsPerThread / per_row));
      run.parallel(rows, grain, [&](int64_t begin, int64_t end) { run.kernels_.first_products(run.call, begin, end); });
    }
  };

  bool has_first_product() const { return owned.layers[0].form == Form::kGram && !owned.layers[0].first_dots; }
  int64_t first_size(const MlpRows<T>& rows) const {
    return has_first_product() ? rows.offsets[a.options.tasks] * owned.layers[0].ld_out : 0;
  }

  // The gradients that are sums over the tasks, chunk by chunk, in their order.
  struct Sums {
    Run& run;
    std::vector<T> theta, rates, weight;  // of parameter vectors, of rates by element, of the first layer's weight

    explicit Sums(Run& r)
        : run(r),
          theta(r.plan.theta_size),
          rates(r.plan.rate_u_rows * r.plan.theta_size),
          weight(r.owned.layers[0].query_dense ? r.owned.layers[0].out * r.owned.layers[0].ld_in : 0) {}

    void add(int64_t first, int64_t last, const T* states, const T* kept) {
      const MlpPlan& plan = run.plan;
      sum(last - first, kept + plan.u, theta);
      if (!rates.empty()) sum(last - first, kept + plan.rate_u, rates);
      if (!weight.empty()) sum(last - first, kept + run.owned.layers[0].weight_u, weight);
      for (int64_t l = 0; l < plan.num_layers; ++l) {
        const MlpLayer& layer = run.owned.layers[l];
        if (layer.form == Form::kDense || layer.query_dense || !run.a.params[layer.weight].gradient) continue;
        const int64_t panel = run.kernels_.panel, panels = (layer.in + panel - 1) / panel;
        run.parallel(panels, 1, [&](int64_t begin, int64_t end) {
          Memory<T> scratch(run.kernels_.outer_scratch);
          run.kernels_.weight_gradient(run.call, l, first, last, states, kept, begin, end, scratch);
        });
      }
    }

    void finish() {
      for (int64_t p = 0; p < run.a.num_params; ++p) {
        const MlpParameter<T>& param = run.a.params[p];
        const Place& place = run.owned.places[p];
        if (param.gradient && param.task_stride == 0 && place.at != kAbsent) {
          copy(place, theta.data() + place.at, param.gradient);
        }
        if (param.rate_gradient) {
          const int64_t rows = param.rate_step == 0 ? 1 : run.plan.rate_u_rows;
          for (int64_t row = 0; row < rows && !rates.empty(); ++row) {
            copy(place, rates.data() + row * run.plan.theta_size + place.at,
                 param.rate_gradient + row * place.rows * place.cols);
          }
        }
      }
      const MlpLayer& first = run.owned.layers[0];
      T* gradient = run.a.params[first.weight].gradient;
      if (!weight.empty() && gradient) copy({first.out, first.in, first.ld_in, 0, false, true}, weight.data(), gradient);
    }

   private:
    void sum(int64_t tasks, const T* vectors, std::vector<T>& total) {
      const int64_t grain = std::max<int64_t>(1024, 262144 / tasks);
      run.parallel(int64_t(total.size()), grain, [&](int64_t begin, int64_t end) {
        run.kernels_.sum_tasks(vectors, run.plan.kept_size, tasks, begin, end, total.data());
      });
    }
    static void copy(const Place& place, const T* from, T* to) {
      for (int64_t row = 0; row < place.rows; ++row) {
        if (!place.transposed) {
          std::copy_n(from + row * place.ld, place.cols, to + row * place.cols);
          continue;
        }
        for (int64_t col = 0; col < place.cols; ++col) to[col * place.rows + row] = from[row * place.ld + col];
      }
    }
  };

  // rates that no step uses
  void zero_rates() {
    for (int64_t p = 0; p < a.num_params; ++p) {
      const MlpParameter<T>& param = a.params[p];
      if (param.rate_sums) std::fill_n(param.rate_sums, a.options.tasks * a.options.steps, 0.0);
    }
  }

  void zero_gradients() {
    for (int64_t p = 0; p < a.num_params; ++p) {
      const Place& place = owned.places[p];
      if (a.params[p].gradient && a.params[p].task_stride == 0) {
        std::fill_n(a.params[p].gradient, place.rows * place.cols, T(0));
      }
      if (a.params[p].rate_gradient) {
        const int64_t rows = a.params[p].rate_step == 0 ? 1 : a.options.steps;
        std::fill_n(a.params[p].rate_gradient, rows * place.rows * place.cols, T(0));
      }
    }
  }
};

template <class T>
std::string Run<T>::describe(bool backward) const {
  static const char* const kNames[] = {"dense", "factored", "gram"};
  std::ostringstream out;
  out << "{\"layers\": [";
  for (size_t l = 0; l < owned.layers.size(); ++l) {
    const MlpLayer& layer = owned.layers[l];
    out << (l ? ", " : "") << "{\"in\": " << layer.in << ", \"out\": " << layer.out << ", \"form\": \""
        << kNames[static_cast<int>(layer.form)] << "\"}";
  }
  const int64_t states = a.options.tasks * plan.state_size;
  const int64_t bytes = sizeof(T) * (plan.shared_size + plan.block * plan.temp_size + states +
                                     (backward ? a.options.tasks * plan.kept_size : 0));
  out << "], \"block\": " << plan.block << ", \"operations\": " << static_cast<int64_t>(plan.operations)
      << ", \"bytes\": " << bytes << "}";
  return out.str();
}

}  // namespace

template <class T>
int64_t mlp_adapt_state_size(const MlpArguments<T>& arguments) {
  return Run<T>(arguments, nullptr).state_size();
}

template <class T>
void mlp_adapt_forward(const MlpArguments<T>& arguments, T* state, Parallel parallel) {
  Run<T>(arguments, parallel).forward(state);
}

template <class T>
void mlp_adapt_backward(const MlpArguments<T>& arguments, const T* state, Parallel parallel) {
  Run<T>(arguments, parallel).backward(state, /*with_results=*/false);
}

template <class T>
void mlp_adapt_gradients(const MlpArguments<T>& arguments, Parallel parallel) {
  Run<T>(arguments, parallel).backward(nullptr, /*with_results=*/true);
}

template <class T>
std::string mlp_adapt_plan(const MlpArguments<T>& arguments, bool backward) {
  return Run<T>(arguments, nullptr).describe(backward);
}

#define MTML_INSTANTIATE(T)                                                        \
  template int64_t mlp_adapt_state_size<T>(const MlpArguments<T>&);                \
  template void mlp_adapt_forward<T>(const MlpArguments<T>&, T*, Parallel);        \
  template void mlp_adapt_backward<T>(const MlpArguments<T>&, const T*, Parallel); \
  template void mlp_adapt_gradients<T>(const MlpArguments<T>&, Parallel);          \
  template std::string mlp_adapt_plan<T>(const MlpArguments<T>&, bool);
MTML_INSTANTIATE(float)
MTML_INSTANTIATE(double)

}  // namespace mtml
