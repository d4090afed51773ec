#include "mlp_adapt_plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace mtml {
namespace {

// Cycles that one task spends on a layer in each form, by counted multiply-adds, passes over memory and calls
// (docs/maths/mlp_adapt.md). What a term weighs is a fit to some 170 networks on processors with AVX2 and AVX-512.
struct Cost {
  double multiply_adds, cycles;
};

class CostModel {
 public:
  CostModel(const PlanRequest& request, int64_t steps)
      : r(request),
        k(steps),
        n(average(request.all_support_rows)),
        q(average(request.all_query_rows) * (request.options.every_step ? steps + 1 : 1)),
        second(request.options.first_order ? 0 : 1) {}

  Cost dense(int64_t l) const {
    const bool first = l == 0;
    // the first layer's weight lies transposed, the others' are copied so
    const double weight = first ? width(l) * padded(l + 1) : width(l + 1) * padded(l);
    // a step is forward, weight and data, its reverse twice each; the first layer's input has neither data nor tangent
    const double products =
        k * n * weight * ((first ? 2 : 3) + second * (first ? 2 : 6)) + q * weight * (first ? 2 : 3);
    const double bytes = weight * double(r.element_bytes) * (first ? 1 : 2) * (k + 2);
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
    const double steps = moves ? k * n * n * out * 2 * (1 + second) + (query_dense ? 0 : 2 * q * n * out) : 0;
    return {shared + dots + steps, cycles(shared + steps) + 1.4 * cycles(dots) + rows + 150 * (3 * k + 8)};
  }

 private:
  const PlanRequest& r;
  double k, n, q, second;

  double average(int64_t rows) const { return r.options.tasks ? double(rows) / double(r.options.tasks) : 0; }
  double width(int64_t l) const { return double(r.options.widths[l]); }
  double padded(int64_t l) const { return double((r.options.widths[l] + r.lanes - 1) / r.lanes * r.lanes); }
  double vectors(double elements) const { return elements / double(r.lanes); }
  // two units, each a vector a cycle
  double cycles(double multiply_adds) const { return vectors(multiply_adds) / 2; }
};

// A form that the environment insists on, for tests: where it is possible.
bool forced(const char* form) {
  const char* wanted = std::getenv("MTML_FAST_FORM");
  return wanted && std::strcmp(wanted, form) == 0;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

OwnedPlan make_plan(const PlanRequest& r) {
  OwnedPlan result;
  MlpPlan& plan = result.plan;
  const MlpOptions& o = r.options;
  const int64_t L = o.layers, N = r.support_rows, Q = r.query_rows;
  plan.num_layers = L;
  plan.lanes = r.lanes;
  plan.steps = std::any_of(r.moves.begin(), r.moves.end(), [](bool moves) { return moves; }) ? o.steps : 0;
  plan.evaluations = o.every_step ? o.steps + 1 : 1;
  plan.support_rows = N;
  plan.query_rows = Q;
  const int64_t K = plan.steps, S = plan.evaluations;
  const bool clips = o.clip < __builtin_inf();
  const bool by_element = std::any_of(r.rate_by_element.begin(), r.rate_by_element.end(), [](bool b) { return b; });
  plan.plain = o.momentum == 0 && o.weight_decay == 0 && !clips;
  plan.theta_per_task = std::any_of(r.per_task.begin(), r.per_task.end(), [](bool own) { return own; });
  plan.direct = plan.plain && !by_element;
  plan.needs_gradient = clips || (r.wants_rates && o.momentum == 0);
  // the adapted weight itself is what was asked for, or what the step works on
  const bool only_dense = !plan.plain || plan.theta_per_task || r.wants_fast || by_element;
  const bool wants_features = r.wants_support_x || r.wants_query_x;

  auto pad = [&](int64_t n) { return round_up(n, r.lanes); };
  const CostModel cost(r, K);
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
    layer.form = Form::kDense;
    layer.query_dense = layer.first_dots = false;
    const Cost dense = cost.dense(l);
    Cost chosen = dense;
    if (!only_dense && l == 0) {
      const Cost by_gram = cost.gram(false, layer.moves), by_weight = cost.gram(true, layer.moves);
      layer.query_dense = layer.moves && !o.every_step && by_weight.cycles < by_gram.cycles;
      const Cost gram = layer.query_dense ? by_weight : by_gram;
      if ((gram.cycles < dense.cycles || forced("gram")) && !forced("dense")) layer.form = Form::kGram;
      if (forced("gram_cross")) {
        layer.form = Form::kGram;
        layer.query_dense = false;
      }
      if (layer.form != Form::kGram) layer.query_dense = false;
      if (layer.form == Form::kGram) chosen = gram;
      layer.first_dots = layer.form == Form::kGram && (layer.query_dense || layer.out <= r.lanes);
    }
    if (!only_dense && l > 0) {
      const Cost factored = cost.factored(l, layer.moves);
      if ((factored.cycles < dense.cycles || forced("factored")) && !forced("dense")) {
        layer.form = Form::kFactored;
        chosen = factored;
      }
    }
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
    plan.operations += 2 * chosen.multiply_adds * double(o.tasks);
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
  plan.u = take(plan.theta_size);
  plan.rate_u_rows = by_element && r.wants_rates ? r.rate_rows : 0;
  plan.rate_u = take_if(plan.rate_u_rows > 0, plan.rate_u_rows * plan.theta_size);
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

  // enough tasks for some thirty rows against a shared panel; a layer of its own weights gains nothing from company
  plan.block = any_factored ? std::clamp<int64_t>(32 / std::max<int64_t>(N, 1), 1, 8) : 1;

  plan.layers = result.layers.data();
  return result;
}

}  // namespace mtml
