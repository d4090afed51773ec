#include "mlp_adapt.h"

#include <algorithm>
#include <memory>
#include <sstream>
#include <utility>
#include <vector>

#include "check.h"
#include "isa/choose.h"
#include "memory.h"
#include "mlp_adapt_plan.h"
#include "phases.h"

namespace mtml {
namespace {

// State and cotangents of the tasks of a chunk: small enough to be in the last cache still when the sums over tasks
// read them.
constexpr int64_t kChunkBytes = int64_t{2} << 20;
// Tasks that are added up before they go into a total: as many rounding errors as in a short sum, or fewer.
constexpr int64_t kAddends = 16, kFewAddends = 4;
// The shared weights' copies and their gradients are divided into so many parts for threads.
constexpr int64_t kParts = 16;

template <class T>
PlanRequest request_of(const MlpArguments<T>& a, const MlpAdapt<T>& kernels) {
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
  r.wants_fast = a.wants_fast;
  r.wants_rates = a.wants_rates;
  r.wants_support_x = a.wants_support_x;
  r.wants_query_x = a.wants_query_x;
  r.element_bytes = sizeof(T);
  r.lanes = kernels.lanes;
  r.panel = kernels.panel;
  r.packed_size = kernels.packed_size;
  return r;
}

// The sums over tasks that go into the users' arrays: who comes first writes, the others add.
template <class T>
class Totals {
 public:
  explicit Totals(const MlpArguments<T>& arguments) : a(arguments), written_(a.num_params), rate_rows_(a.num_params) {}

  // whether to add; from now on it is so
  bool claim(int64_t p) { return std::exchange(written_[p], char(1)); }

  void add(int64_t p, const Place& place, const T* from) { copy(place, from, a.params[p].gradient, claim(p)); }

  void add_rate(int64_t p, const Place& place, const T* from, int64_t row) {
    std::vector<char>& written = rate_rows_[p];
    written.resize(std::max<size_t>(written.size(), size_t(row) + 1));
    T* to = a.params[p].rate_gradient + row * place.rows * place.cols;
    copy(place, from, to, std::exchange(written[row], char(1)));
  }

  // parameters to which no task added
  void finish(const std::vector<Place>& places) {
    for (int64_t p = 0; p < a.num_params; ++p) {
      const MlpParameter<T>& param = a.params[p];
      const int64_t size = places[p].rows * places[p].cols;
      if (param.gradient && param.task_stride == 0 && !written_[p]) std::fill_n(param.gradient, size, T(0));
      if (param.rate_gradient && rate_rows_[p].empty()) {
        std::fill_n(param.rate_gradient, size * (param.rate_step == 0 ? 1 : a.options.steps), T(0));
      }
    }
  }

 private:
  const MlpArguments<T>& a;
  std::vector<char> written_;
  std::vector<std::vector<char>> rate_rows_;  // [P][1 or K]

  static void copy(const Place& place, const T* from, T* to, bool add) {
    for (int64_t row = 0; row < place.rows; ++row) {
      for (int64_t col = 0; col < place.cols; ++col) {
        T& element = place.transposed ? to[col * place.rows + row] : to[row * place.cols + col];
        element = add ? element + from[row * place.ld + col] : from[row * place.ld + col];
      }
    }
  }
};

// The tasks of a call that share a plan: all of them, unless their row counts ask for different forms.
template <class T>
class Group {
 public:
  Group(const MlpArguments<T>& arguments, const PlanRequest& request, const std::vector<LayerChoice>& forms,
        std::vector<int64_t> order, Threads threads)
      : a(arguments),
        kernels_(kernels().mlp_adapt<T>()),
        threads_(threads),
        order_(std::move(order)),
        tasks(request.tasks),
        own_rows(request.all_support_rows + request.all_query_rows),
        owned(make_plan(request, forms)),
        plan(owned.plan) {
    const bool everyone = order_.empty() || tasks == a.options.tasks;
    call = {&a,      &plan,  owned.places.data(), owned.num_elements, everyone ? nullptr : order_.data(), nullptr,
            nullptr, nullptr};
  }
  Group(const Group&) = delete;

  int64_t state_size() const {
    int64_t size;
    if (__builtin_mul_overflow(tasks, plan.state_size * int64_t(sizeof(T)), &size)) {
      throw NoMemory(message("the state of ", tasks, " tasks of ", plan.state_size, " elements each"));
    }
    return tasks * plan.state_size;
  }

  // elements that a sweep takes besides the state between the sweeps, on one thread
  int64_t workspace(bool backward, bool kept_state) const {
    const int64_t of_tasks =
        backward ? chunk(1) * (plan.kept_size + (!kept_state && factored() ? plan.state_size : 0)) : 0;
    const bool own_state = !kept_state && !(backward && factored());
    const int64_t first = backward && kept_state ? 0 : first_size(a.support) + first_size(a.query);
    return plan.shared_size + first + of_tasks + plan.block * (plan.temp_size + (own_state ? plan.state_size : 0));
  }

  const OwnedPlan& plan_and_places() const { return owned; }

  void forward(T* state) {
    Phases phases(threads_, plan.operations / 4);
    const Shared shared(*this, /*first=*/true, phases);
    over_blocks(phases, 0, tasks, !state, [this, state](int64_t begin, int64_t end, T* own, T* temp) {
      kernels_.forward(call, begin, end, state ? state + begin * plan.state_size : own, nullptr, temp);
    });
    phases.run();
  }

  // after a forward sweep that left `state`, or (null) with one of its own
  void backward(const MlpArguments<T>& with, const T* state, Totals<T>& totals) {
    call.arguments = &with;
    Phases phases(threads_, plan.operations);
    const Shared shared(*this, /*first=*/!state, phases);
    const bool keeps = !state && factored();
    const int64_t step = chunk(phases.threads());

    Memory<T> kept(step * plan.kept_size), own(keeps ? step * plan.state_size : 0);
    Sums sums(*this);
    for (int64_t first = 0; first < tasks; first += step) {
      const int64_t last = std::min(tasks, first + step);
      over_blocks(phases, first, last, !state && !keeps,
                  [this, first, state, keeps, &kept, &own](int64_t begin, int64_t end, T* of_thread, T* temp) {
                    T* kept_here = kept + (begin - first) * plan.kept_size;
                    T* at = state   ? const_cast<T*>(state) + begin * plan.state_size
                            : keeps ? own + (begin - first) * plan.state_size
                                    : of_thread;
                    if (!state) kernels_.forward(call, begin, end, at, kept_here, temp);
                    kernels_.backward(call, begin, end, at, kept_here, temp);
                  });
      sums.then(phases, first, last, state ? state + first * plan.state_size : own, kept, totals);
    }
    sums.finish(phases, totals);
    phases.run();
    call.arguments = &a;
  }

 private:
  const MlpArguments<T>& a;
  const MlpAdapt<T>& kernels_;
  Threads threads_;
  std::vector<int64_t> order_;
  int64_t tasks, own_rows;
  OwnedPlan owned;
  MlpPlan& plan;
  MlpCall<T> call;

  bool factored() const {
    return std::any_of(owned.layers.begin(), owned.layers.end(),
                       [](const MlpLayer& layer) { return layer.form == Form::kFactored; });
  }

  // tasks that are added up before they go into a total: whole blocks, whatever the threads. Few where factors of all
  // of them are kept for that.
  int64_t addends() const { return ((factored() ? kFewAddends : kAddends) + plan.block - 1) / plan.block * plan.block; }

  // tasks whose arrays are held together for the sums over tasks: enough for all threads
  int64_t chunk(int64_t threads) const {
    const int64_t per_task = (plan.kept_size + (factored() ? plan.state_size : 0)) * int64_t(sizeof(T));
    const int64_t for_threads = threads == 1 ? 1 : 2 * threads * plan.block;
    const int64_t fit = std::max(kChunkBytes / std::max<int64_t>(1, per_task), for_threads);
    return std::min(tasks, std::max<int64_t>(1, fit / addends()) * addends());
  }

  // f(begin, end, state, temp) over blocks of the tasks [first, last), with a thread's own memory
  template <class F>
  void over_blocks(Phases& phases, int64_t first, int64_t last, bool needs_state, const F& f) {
    phases.then((last - first + plan.block - 1) / plan.block, 1, [=](int64_t begin, int64_t end) {
      Memory<T> temp(plan.block * plan.temp_size), state(needs_state ? plan.block * plan.state_size : 0);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t t = first + block * plan.block;
        f(t, std::min(last, t + plan.block), state, temp);
      }
    });
  }

  // what all tasks share, for the length of a sweep
  struct Shared {
    Memory<T> shared, support, query;

    Shared(Group& group, bool first, Phases& phases)
        : shared(group.plan.shared_size),
          support(first ? group.first_size(group.a.support) : 0),
          query(first ? group.first_size(group.a.query) : 0) {
      group.call.shared = shared;
      group.call.first_support = support;
      group.call.first_query = query;
      phases.then(kParts, 1,
                  [&group](int64_t begin, int64_t end) { group.kernels_.prepare(group.call, begin, end, kParts); });
      if (!first || !group.has_first_product()) return;
      // rows that are worth the packed weight's way through the cache
      constexpr int64_t kRows = 24;
      const int64_t all_tasks = group.a.options.tasks, *support_at = group.a.support.offsets;
      const int64_t all_support_rows = support_at[all_tasks], *query_at = group.a.query.offsets;
      if (!group.call.order) {
        phases.then(all_support_rows + query_at[all_tasks], kRows,
                    [&group](int64_t begin, int64_t end) { group.kernels_.first_products(group.call, begin, end); });
        return;
      }
      // the rows of the group's own tasks
      phases.then(group.tasks, kRows / std::max<int64_t>(1, group.own_rows / group.tasks),
                  [=, &group](int64_t begin, int64_t end) {
                    for (int64_t place = begin; place < end; ++place) {
                      const int64_t t = group.call.order[place];
                      group.kernels_.first_products(group.call, support_at[t], support_at[t + 1]);
                      group.kernels_.first_products(group.call, all_support_rows + query_at[t],
                                                    all_support_rows + query_at[t + 1]);
                    }
                  });
    }
  };

  bool has_first_product() const { return owned.layers[0].form == Form::kGram && !owned.layers[0].first_dots; }
  int64_t first_size(const MlpRows<T>& rows) const {
    return has_first_product() ? rows.offsets[a.options.tasks] * owned.layers[0].ld_out : 0;
  }

  // The sums over tasks: so many tasks at a time that they do not depend on how many are held together.
  class Sums {
   public:
    explicit Sums(Group& group) : g(group), vectors_(group.plan.theta_size * (1 + group.plan.rate_u_rows)) {
      for (const MlpLayer& layer : g.owned.layers) {
        weights_.emplace_back(is_summed(layer) ? layer.out * layer.ld_in : 0);
      }
    }

    // adds the tasks [first, last), whose arrays these are
    void then(Phases& phases, int64_t first, int64_t last, const T* states, const T* kept, Totals<T>& totals) {
      const MlpPlan& plan = g.plan;
      const int64_t addends = g.addends();
      auto sum = [&](int64_t at, std::vector<T>& total) {
        const int64_t least = std::max<int64_t>(1024, 262144 / (last - first));
        phases.then(int64_t(total.size()), least, [=, &plan, &total](int64_t begin, int64_t end) {
          for (int64_t t = first; t < last; t += addends) {
            const T* vectors = kept + (t - first) * plan.kept_size + at;
            g.kernels_.sum_tasks(vectors, plan.kept_size, std::min(addends, last - t), begin, end, total.data());
          }
        });
      };
      // the cotangents of a task's parameter vector, and those of its rates behind them
      sum(plan.u, vectors_);
      std::vector<std::pair<int64_t, bool>> products;  // layers whose weights' gradients are products, whether to add
      for (int64_t l = 0; l < plan.num_layers; ++l) {
        const MlpLayer& layer = g.owned.layers[l];
        if (is_summed(layer)) {
          sum(layer.weight_u, weights_[l]);
        } else if (is_product(layer)) {
          products.emplace_back(l, totals.claim(layer.weight));
        }
      }
      if (products.empty()) return;
      // a thread takes its part of every layer's columns; each copies all rows of the other side
      phases.then(kParts, kParts / phases.threads(), [=](int64_t begin, int64_t end) {
        Memory<T> scratch(g.kernels_.outer_scratch);
        for (const auto& [l, add] : products) {
          const int64_t panels = (g.owned.layers[l].in + g.kernels_.panel - 1) / g.kernels_.panel;
          for (int64_t t = first; t < last; t += addends) {
            g.kernels_.weight_gradient(g.call, l, t, std::min(last, t + addends),
                                       states + (t - first) * g.plan.state_size, kept + (t - first) * g.plan.kept_size,
                                       add || t > first, panels * begin / kParts, panels * end / kParts, scratch);
          }
        }
      });
    }

    void finish(Phases& phases, Totals<T>& totals) {
      phases.then(1, 1, [this, &totals](int64_t, int64_t) { copy_to(totals); });
    }

   private:
    Group& g;
    std::vector<T> vectors_;
    std::vector<std::vector<T>> weights_;  // [layers]

    bool is_product(const MlpLayer& layer) const {
      return layer.form != Form::kDense && g.a.params[layer.weight].gradient;
    }
    bool is_summed(const MlpLayer& layer) const { return is_product(layer) && layer.query_dense; }

    void copy_to(Totals<T>& totals) const {
      const MlpArguments<T>& a = g.a;
      for (int64_t p = 0; p < a.num_params; ++p) {
        const Place& place = g.owned.places[p];
        if (place.at == kAbsent || !a.params[p].gradient || a.params[p].task_stride != 0) continue;
        totals.add(p, place, vectors_.data() + place.at);
      }
      for (int64_t row = 0; row < g.plan.rate_u_rows; ++row) {
        const T* rates = vectors_.data() + (1 + row) * g.plan.theta_size;
        for (int64_t p = 0; p < a.num_params; ++p) {
          const MlpParameter<T>& param = a.params[p];
          if (!param.rate_gradient || (row > 0 && param.rate_step == 0)) continue;
          totals.add_rate(p, g.owned.places[p], rates + g.owned.places[p].at, row);
        }
      }
      for (const MlpLayer& layer : g.owned.layers) {
        if (!is_summed(layer)) continue;
        const T* weight = weights_[&layer - g.owned.layers.data()].data();
        totals.add(layer.weight, {layer.out, layer.in, layer.ld_in, 0, false, true}, weight);
      }
    }
  };
};

template <class T>
class Run {
 public:
  Run(const MlpArguments<T>& arguments, Threads threads) : a(arguments) {
    PlanRequest request = request_of(a, kernels().mlp_adapt<T>());
    // forms by row counts, and the tasks that share them in their order
    std::vector<Known> known;
    std::vector<std::vector<LayerChoice>> forms;
    std::vector<std::vector<int64_t>> orders;
    size_t last = 0;
    for (int64_t t = 0; t < a.options.tasks; ++t) {
      const int64_t support_rows = count(a.support, t), query_rows = count(a.query, t);
      auto fits = [&](const Known& k) { return k.support_rows == support_rows && k.query_rows == query_rows; };
      if (known.empty() || !fits(known[last])) {
        last = size_t(std::find_if(known.begin(), known.end(), fits) - known.begin());
      }
      if (last == known.size()) {
        const auto choice = choose_forms(request, support_rows, query_rows);
        const size_t form = size_t(std::find(forms.begin(), forms.end(), choice) - forms.begin());
        if (form == forms.size()) {
          forms.push_back(choice);
          orders.emplace_back().reserve(a.options.tasks);
        }
        known.push_back({support_rows, query_rows, form});
      }
      orders[known[last].form].push_back(t);
    }
    for (size_t i = 0; i < forms.size(); ++i) {
      request.tasks = int64_t(orders[i].size());
      request.support_rows = request.query_rows = request.all_support_rows = request.all_query_rows = 0;
      for (const int64_t t : orders[i]) {
        request.support_rows = std::max(request.support_rows, count(a.support, t));
        request.query_rows = std::max(request.query_rows, count(a.query, t));
        request.all_support_rows += count(a.support, t);
        request.all_query_rows += count(a.query, t);
      }
      groups.push_back(std::make_unique<Group<T>>(a, request, forms[i], std::move(orders[i]), threads));
    }
  }

  int64_t state_size() const {
    int64_t size = 0;
    for (const auto& group : groups) size += group->state_size();
    return size;
  }

  void forward(T* state) {
    for (const auto& group : groups) {
      group->forward(state);
      if (state) state += group->state_size();
    }
  }

  void backward(const T* state, bool with_results) {
    for (int64_t p = 0; p < a.num_params; ++p) {
      if (a.params[p].rate_sums) std::fill_n(a.params[p].rate_sums, a.options.tasks * a.options.steps, 0.0);
    }
    MlpArguments<T> with = a;
    if (!with_results) with.outputs = with.losses = with.fast = nullptr;
    Totals<T> totals(a);
    for (const auto& group : groups) {
      group->backward(with, state, totals);
      if (state) state += group->state_size();
    }
    totals.finish(sizes());
  }

  std::string describe(bool backward, bool keeps_state) const;

 private:
  const MlpArguments<T>& a;
  std::vector<std::unique_ptr<Group<T>>> groups;

  struct Known {
    int64_t support_rows, query_rows;
    size_t form;
  };

  static int64_t count(const MlpRows<T>& rows, int64_t t) { return rows.offsets[t + 1] - rows.offsets[t]; }

  // the parameters' shapes, also where there are no tasks
  std::vector<Place> sizes() const {
    std::vector<Place> result;
    const MlpOptions& o = a.options;
    for (int64_t l = 0; l < o.layers; ++l) {
      const int64_t vectors = o.bias + (o.norm && l + 1 < o.layers ? 2 : 0);
      result.push_back({o.widths[l + 1], o.widths[l], 0, 0, false, true});
      for (int64_t i = 0; i < vectors; ++i) result.push_back({1, o.widths[l + 1], 0, 0, false, false});
    }
    return result;
  }
};

template <class T>
std::string Run<T>::describe(bool backward, bool keeps_state) const {
  static const char* const kNames[] = {"dense", "factored", "gram"};
  double operations = 0;
  const bool kept_state = backward && keeps_state;
  int64_t workspace = 0;
  const Group<T>* largest = nullptr;
  for (const auto& group : groups) {
    operations += group->plan_and_places().plan.operations;
    workspace = std::max({workspace, group->workspace(false, kept_state), group->workspace(backward, kept_state)});
    if (!largest || group->state_size() > largest->state_size()) largest = group.get();
  }
  const int64_t elements = workspace + (kept_state ? state_size() : 0);
  std::ostringstream out;
  out << "{\"layers\": [";
  for (size_t l = 0; largest && l < largest->plan_and_places().layers.size(); ++l) {
    const MlpLayer& layer = largest->plan_and_places().layers[l];
    out << (l ? ", " : "") << "{\"in\": " << layer.in << ", \"out\": " << layer.out << ", \"form\": \""
        << kNames[static_cast<int>(layer.form)] << "\"}";
  }
  out << "], \"operations\": " << static_cast<int64_t>(operations)
      << ", \"bytes\": " << elements * static_cast<int64_t>(sizeof(T)) << "}";
  return out.str();
}

}  // namespace

template <class T>
int64_t mlp_adapt_state_size(const MlpArguments<T>& arguments) {
  return Run<T>(arguments, Threads()).state_size();
}

template <class T>
void mlp_adapt_forward(const MlpArguments<T>& arguments, T* state, Threads threads) {
  Run<T>(arguments, threads).forward(state);
}

template <class T>
void mlp_adapt_backward(const MlpArguments<T>& arguments, const T* state, Threads threads) {
  Run<T>(arguments, threads).backward(state, /*with_results=*/false);
}

template <class T>
void mlp_adapt_gradients(const MlpArguments<T>& arguments, Threads threads) {
  Run<T>(arguments, threads).backward(nullptr, /*with_results=*/true);
}

template <class T>
std::string mlp_adapt_plan(const MlpArguments<T>& arguments, bool backward, bool keeps_state) {
  return Run<T>(arguments, Threads()).describe(backward, keeps_state);
}

#define MTML_INSTANTIATE(T)                                                       \
  template int64_t mlp_adapt_state_size<T>(const MlpArguments<T>&);               \
  template void mlp_adapt_forward<T>(const MlpArguments<T>&, T*, Threads);        \
  template void mlp_adapt_backward<T>(const MlpArguments<T>&, const T*, Threads); \
  template void mlp_adapt_gradients<T>(const MlpArguments<T>&, Threads);          \
  template std::string mlp_adapt_plan<T>(const MlpArguments<T>&, bool, bool);
MTML_INSTANTIATE(float)
MTML_INSTANTIATE(double)

}  // namespace mtml
