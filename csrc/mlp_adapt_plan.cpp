#include "mlp_adapt_plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace mtml {
namespace {

struct Cost {
  double multiply_adds, cycles;
};

// steps that are taken: none where nothing moves
int64_t steps_of(const PlanRequest& r) {
  return std::any_of(r.moves.begin(), r.moves.end(), [](bool moves) { return moves; }) ? r.options.steps : 0;
}

// tasks that go through the factored layers together: some thirty rows against a shared panel
int64_t company(int64_t support_rows) { return std::clamp<int64_t>(32 / std::max<int64_t>(support_rows, 1), 1, 8); }

bool is_plain(const MlpOptions& o) { return o.momentum == 0 && o.weight_decay == 0 && !(o.clip < __builtin_inf()); }

bool any(const std::vector<bool>& flags) {
  return std::any_of(flags.begin(), flags.end(), [](bool flag) { return flag; });
}

// Cycles that one task spends on a layer in each form, by counted multiply-adds, passes over memory and calls
// (docs/maths/mlp_adapt.md). What a term weighs is a fit to some 170 networks on processors with AVX2 and AVX-512.

class CostModel {
 public:
  CostModel(const PlanRequest& request, double support_rows, double query_rows)
      : r(request),
        k(double(steps_of(request))),
        n(support_rows),
        q(query_rows * (request.options.every_step ? k + 1 : 1)),
        second(request.options.first_order ? 0 : 1) {}

  // `company`: tasks whose weights take turns in the caches
  Cost dense(int64_t l, int64_t company) const {
    const bool first = l == 0;
    // the first layer's weight lies transposed, the others' are copied so
    const double weight = first ? width(l) * padded(l + 1) : width(l + 1) * padded(l);
    // a step is forward, weight and data, its reverse twice each; the first layer's input has neither data nor tangent
    const double products =
        k * n * weight * ((first ? 2 : 3) + second * (first ? 2 : 6)) + q * weight * (first ? 2 : 3);
    const double bytes = weight * double(r.element_bytes) * (first ? 1 : 2) * (k + 2) * double(company);
    const double far = bytes > 512 * 1024 ? 4 : bytes > 32 * 1024 ? 1.5 : 1;
    const double passes = vectors(k * weight) * (first ? 2 : 5) * far;
    return {products, cycles(products) * 1.15 + passes + 125 * ((first ? 5 : 10) * k + 3)};
  }

  Cost factored(int64_t l, bool moves) const {
    const double weight = width(l + 1) * padded(l), widths = padded(l) + padded(l + 1);
    const double shared = (k * n * (2 + 2 * second) + q * 2) * weight, outer = (q + 2 * second * k * n) * weight;
    double corrections = 0, calls = 4 * k + 2;
    if (moves) {
      const double before = n * k * (k - 1) / 2;
      corrections = 2 * (n * before + q * k * n) * widths + 2 * second * n * (3 * before + k * q) * widths;
      calls += 8 * std::max(k - 1, 0.0) + 12 * second * k;
    }
    return {shared + outer + corrections, cycles(shared + outer) * 0.85 + cycles(corrections) * 2.4 + 230 * calls +
                                              50 * vectors((k * n + q) * padded(l))};
  }

  Cost gram(bool query_dense, bool moves) const {
    const double weight = width(0) * padded(1), in = width(0), out = padded(1);
    const double shared = (n + q) * weight * 2;
    // the products of all rows go through memory, once each way
    const double rows = 2.7 * (n + q) * out + vectors(2 * k * n * out) * 4;
    // the Gram matrix is symmetric; dot products are slower than other ones
    const double dots = moves ? n * n * in * 0.6 + (query_dense ? 2 * n * weight : q * n * in) : 0;
    const double steps = moves ? k * n * n * out * (1 + second) + (query_dense ? 0 : 2 * q * n * out) : 0;
    return {shared + dots + steps, cycles(shared + steps) + 1.4 * cycles(dots) + rows + 150 * (3 * k + 8)};
  }

 private:
  const PlanRequest& r;
  double k, n, q, second;

  double width(int64_t l) const { return double(r.options.widths[l]); }
  double padded(int64_t l) const { return double((r.options.widths[l] + r.lanes - 1) / r.lanes * r.lanes); }
  double vectors(double elements) const { return elements / double(r.lanes); }
  // two units, each a vector a cycle
  double cycles(double multiply_adds) const { return vectors(multiply_adds) / 2; }
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

std::vector<LayerChoice> choose_forms(const PlanRequest& r, int64_t support_rows, int64_t query_rows) {
  const MlpOptions& o = r.options;
  std::vector<LayerChoice> result(o.layers, {Form::kDense, false});
  // a form that the environment insists on, for tests: where it is possible
  const char* wanted = std::getenv("MTML_FAST_FORM");
  auto forced = [wanted](const char* form) { return wanted && std::strcmp(wanted, form) == 0; };
  // the adapted weight itself is what was asked for, or what the step works on
  if (!is_plain(o) || any(r.per_task) || any(r.rate_by_element) || r.wants_fast || forced("dense")) return result;
  const CostModel cost(r, double(support_rows), double(query_rows));
  const int64_t params = 1 + o.bias + 2 * o.norm;
  bool any_factored = false;
  for (int64_t l = 0; l < o.layers; ++l) {
    const bool moves = r.moves[l * params] && steps_of(r) > 0;
    const double dense = cost.dense(l, any_factored ? company(support_rows) : 1).cycles;
    if (l > 0) {
      if (cost.factored(l, moves).cycles < dense || forced("factored")) {
        result[l].form = Form::kFactored;
        any_factored = true;
      }
      continue;
    }
    const double by_gram = cost.gram(false, moves).cycles, by_weight = cost.gram(true, moves).cycles;
    const bool query_dense = moves && !o.every_step && by_weight < by_gram;
    if ((query_dense ? by_weight : by_gram) < dense || forced("gram")) result[l] = {Form::kGram, query_dense};
    if (forced("gram_cross")) result[l] = {Form::kGram, false};
  }
  return result;
}

OwnedPlan make_plan(const PlanRequest& r, const std::vector<LayerChoice>& forms) {
  OwnedPlan result;
  MlpPlan& plan = result.plan;
  const MlpOptions& o = r.options;
  result.layers.reserve(o.layers);
  result.places.reserve(r.moves.size());
  const int64_t L = o.layers, N = r.support_rows, Q = r.query_rows;
  plan.num_layers = L;
  plan.lanes = r.lanes;
  plan.steps = steps_of(r);
  plan.evaluations = o.every_step ? o.steps + 1 : 1;
  plan.support_rows = N;
  plan.query_rows = Q;
  const int64_t K = plan.steps, S = plan.evaluations;
  const bool clips = o.clip < __builtin_inf();
  const bool by_element = any(r.rate_by_element);
  plan.plain = is_plain(o);
  plan.theta_per_task = any(r.per_task);
  plan.direct = plan.plain && !by_element;
  plan.needs_gradient = clips || (r.wants_rates && o.momentum == 0);
  const bool wants_features = r.wants_support_x || r.wants_query_x;

  auto pad = [&](int64_t n) { return round_up(n, r.lanes); };
  auto average = [&](int64_t rows) { return r.tasks ? double(rows) / double(r.tasks) : 0; };
  const CostModel cost(r, average(r.all_support_rows), average(r.all_query_rows));
  const bool second_derivative = o.activation != Activation::kRelu && o.activation != Activation::kLeakyRelu &&
                                 o.activation != Activation::kIdentity;
  const bool needs_input = o.activation == Activation::kGelu || o.activation == Activation::kGeluTanh ||
                           o.activation == Activation::kSilu || o.activation == Activation::kSoftplus;

  // ---- forms, and the parameter vector
  int64_t at = 0, param = 0;
  auto place = [&](int64_t rows, int64_t cols, bool dense, bool transposed, bool is_weight) {
    result.places.push_back({rows, cols, pad(cols), dense ? at : kAbsent, transposed, is_weight});
    result.num_elements += rows * cols;
    if (dense) at += rows * pad(cols);
    ++param;
    return result.places.back().at;
  };
  for (int64_t l = 0; l < L; ++l) {
    MlpLayer layer{};
    layer.in = o.widths[l];
    layer.out = o.widths[l + 1];
    layer.ld_in = pad(layer.in);
    layer.ld_out = pad(layer.out);
    layer.hidden = l + 1 < L;
    layer.weight = param;
    layer.moves = r.moves[param] && K > 0;
    layer.form = forms[l].form;
    layer.query_dense = forms[l].query_dense;
    layer.first_dots = layer.form == Form::kGram && (layer.query_dense || layer.out <= r.lanes);
    const Cost work = layer.form == Form::kDense      ? cost.dense(l, 1)
                      : layer.form == Form::kFactored ? cost.factored(l, layer.moves)
                                                      : cost.gram(layer.query_dense, layer.moves);
    plan.operations += 2 * work.multiply_adds * double(r.tasks);
    const bool is_dense = layer.form == Form::kDense;
    layer.transposed = is_dense && l == 0 && !r.rate_by_element[param];
    layer.weight_at = layer.transposed ? place(layer.in, layer.out, true, true, true)
                                       : place(layer.out, layer.in, is_dense, false, true);
    layer.bias = layer.gain = layer.shift = layer.bias_at = layer.gain_at = layer.shift_at = kAbsent;
    if (o.bias) {
      layer.bias = param;
      layer.bias_at = place(1, layer.out, true, false, false);
    }
    if (o.norm && layer.hidden) {
      layer.gain = param;
      layer.gain_at = place(1, layer.out, true, false, false);
      layer.shift = param;
      layer.shift_at = place(1, layer.out, true, false, false);
    }
    plan.widest = std::max({plan.widest, layer.ld_in, layer.ld_out});
    result.layers.push_back(layer);
  }
  plan.theta_size = at;
  plan.copies_x = false;
  {
    const MlpLayer& first = result.layers[0];
    const bool dense_by_rows = first.form == Form::kDense && !first.transposed;
    const bool as_right_operand = dense_by_rows || first.query_dense || (wants_features && first.form == Form::kGram);
    plan.copies_x = first.ld_in != first.in && as_right_operand;
  }

  // ---- state
  at = 0;
  auto take = [&](int64_t elements) {
    const int64_t start = at;
    at += round_up(elements, 16);
    return start;
  };
  auto take_if = [&](bool wanted, int64_t elements) { return wanted ? take(elements) : kAbsent; };
  const bool any_factored = std::any_of(result.layers.begin(), result.layers.end(),
                                        [](const MlpLayer& x) { return x.form == Form::kFactored; });
  plan.theta = take((K + 1) * plan.theta_size);
  plan.velocity = take_if(o.momentum != 0 && r.wants_rates, K * plan.theta_size);
  const int64_t ld_classes = result.layers.back().ld_out;
  plan.p = take_if(o.loss != Loss::kMse, K * N * ld_classes);
  plan.zq = take(S * Q * ld_classes);
  for (int64_t l = 0; l < L; ++l) {
    MlpLayer& x = result.layers[l];
    x.h = l > 0 ? take(K * N * x.ld_in) : take_if(plan.copies_x, N * x.ld_in);
    x.hq = l > 0 ? take(S * Q * x.ld_in) : take_if(plan.copies_x, Q * x.ld_in);
    x.d = take(K * N * x.ld_out);
    x.y = take_if(x.hidden && needs_input, K * N * x.ld_out);
    x.yq = take_if(x.hidden && needs_input, S * Q * x.ld_out);
    x.e = take_if(x.hidden && second_derivative, K * N * x.ld_out);
    const bool norm = x.hidden && o.norm;
    x.xh = take_if(norm, K * N * x.ld_out);
    x.r = take_if(norm, K * x.ld_out);
    x.dy = take_if(norm, K * N * x.ld_out);
    x.xhq = take_if(norm, S * Q * x.ld_out);
    x.rq = take_if(norm, S * x.ld_out);
    const bool gram = x.form == Form::kGram && x.moves;
    // the widest set of coefficients of factors
    const int64_t factors = std::max({N, x.form == Form::kFactored ? std::max(K * N, S * Q) : 0});
    plan.small_ld = std::max(plan.small_ld, pad(factors));
    x.gram = x.cross = x.query_weight = kAbsent;
    // their rows are as long as the widest set, which the other layers have yet to say
    if (gram) x.gram = 0;
    if (gram && !x.query_dense) x.cross = 0;
    x.wt = take_if(x.form == Form::kDense && !x.transposed && x.moves, K * x.in * x.ld_out);
    x.query_weight = take_if(x.query_dense, x.out * x.ld_in);
  }
  for (MlpLayer& x : result.layers) {
    if (x.gram != kAbsent) x.gram = take(N * plan.small_ld);
    if (x.cross != kAbsent) x.cross = take(Q * plan.small_ld);
  }
  plan.state_size = at;

  // ---- kept
  at = 0;
  plan.rate_u_rows = by_element && r.wants_rates ? r.rate_rows : 0;
  plan.u = take((1 + plan.rate_u_rows) * plan.theta_size);
  plan.rate_u = plan.u + plan.theta_size;
  for (MlpLayer& x : result.layers) {
    const bool factored = x.form == Form::kFactored, gram = x.form == Form::kGram;
    x.rh = take_if(factored && !o.first_order, K * N * x.ld_in);
    x.rd = take_if(factored && !o.first_order, K * N * x.ld_out);
    x.qd = take_if(factored, S * Q * x.ld_out);
    x.row_sum = take_if(gram, N * x.ld_out);
    x.q_sum = take_if(gram, Q * x.ld_out);
    x.weight_u = take_if(gram && x.query_dense, x.out * x.ld_in);
  }
  plan.kept_size = at;

  // ---- shared
  at = 0;
  plan.theta_0 = take(plan.theta_size);
  for (MlpLayer& x : result.layers) {
    x.packed_in = x.packed_out = kAbsent;
    if (x.form == Form::kDense) {
      x.packed_in = take_if(!x.transposed, x.in * x.ld_out);
    } else {
      if (x.form == Form::kFactored || !x.first_dots) x.packed_in = take(r.packed_size(x.in, x.out));
      if (x.form == Form::kFactored || wants_features) x.packed_out = take(r.packed_size(x.out, x.in));
    }
  }
  plan.shared_size = at;

  // ---- temporaries
  at = 0;
  const int64_t rows = std::max<int64_t>({N, Q, 1});
  plan.t_a = take(rows * plan.widest);
  plan.t_b = take(rows * plan.widest);
  plan.t_c = take(rows * plan.widest);
  plan.t_d = take(rows * plan.widest);
  plan.t_scaled = take(std::max<int64_t>(N, 1) * plan.widest);
  for (const MlpLayer& x : result.layers) {
    if (x.form == Form::kDense && !x.transposed) plan.largest_dense = std::max(plan.largest_dense, x.in * x.ld_out);
  }
  plan.t_wt = take(plan.largest_dense);
  plan.t_vt = take(plan.largest_dense);
  plan.t_grad = take(plan.theta_size);
  plan.t_r = take(plan.theta_size);
  plan.t_w = take_if(o.momentum != 0, plan.theta_size);
  plan.t_small = take(rows * plan.small_ld);
  const bool gram = result.layers[0].form == Form::kGram;
  const int64_t ld_first = result.layers[0].ld_out;
  plan.t_z0 = take_if(gram && result.layers[0].first_dots, N * ld_first);
  plan.t_esum = take_if(gram, N * ld_first);
  plan.t_qx = take_if(gram, N * ld_first);
  plan.t_bb = take_if(gram && wants_features, N * plan.small_ld);
  plan.t_mm = take_if(gram && wants_features, Q * plan.small_ld);
  plan.t_xs = take_if(r.wants_support_x, N * result.layers[0].ld_in);
  plan.t_xq = take_if(r.wants_query_x, Q * result.layers[0].ld_in);
  for (int64_t l = 0; l < L; ++l) {
    MlpLayer& x = result.layers[l];
    x.t_rh = take_if(l > 0 && x.rh == kAbsent, N * x.ld_in);
    x.t_ry = take_if(x.hidden && second_derivative, N * x.ld_out);
    x.t_rxh = take_if(x.hidden && o.norm, N * x.ld_out);
    x.t_rr = take_if(x.hidden && o.norm, x.ld_out);
  }
  plan.temp_size = at;

  // blocks of equal size for 2, 4 or 8 threads; layers of their tasks' own weights gain nothing from company
  const int64_t most = any_factored ? company(N) : 1;
  const int64_t blocks = round_up((r.tasks + most - 1) / most, most > 1 ? 8 : 1);
  plan.block = std::max<int64_t>(1, (r.tasks + blocks - 1) / std::max<int64_t>(blocks, 1));

  plan.layers = result.layers.data();
  return result;
}

}  // namespace mtml
