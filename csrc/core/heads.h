// The head of one task, a linear layer or one with a hidden layer before it, on rows of the task:
//
//     h = x                  or   a = x V^T + c,  h = act(a)
//     z = h W^T + b
//
// Its backward pass, for the cotangent q of z:
//
//     dW = q^T h     db = 1^T q     e = q W
//     dx = e         or   da = act'(a) e,  dV = da^T x,  dc = 1^T da,  dx = da V
//
// And the reverse of that pass, for cotangents gx, gW, gb, gV, gc of its results; a', h', q' are those of da, e, q:
//
//     a' = gx V^T + x gV^T + gc     h' = act'(a) a'     r = act'(a) (q gW) + act''(a) e a'
//     q' = h' W^T + h gW^T + gb     W: q^T h'     V: r^T x + da^T gx     c: 1^T r     x: r V + da gV
//     without a hidden layer        q' = gx W^T + x gW^T + gb     W: q^T gx     x: q gW
//
// Rows are taken in blocks that stay in the second cache with all that is computed of them.
#pragma once

#include "core/activations.h"
#include "core/heads_args.h"
#include "core/mlp_vectors.h"
#include "core/packed.h"

namespace mtml::MTML_ISA {

// Pieces of one memory; without memory they are only counted.
template <class T>
class Scratch {
 public:
  explicit Scratch(T* data) : data_(data) {}

  T* take(int64_t elements) {
    constexpr int64_t kLine = 64 / sizeof(T);
    T* const piece = data_ ? data_ + used_ : nullptr;
    used_ += (elements + kLine - 1) / kLine * kLine;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  T* data_;
  int64_t used_ = 0;
};

// rows of a block; those of the second derivative come with twice as many values
template <class T>
int64_t head_block_rows(int64_t features, int64_t hidden, int64_t outputs, bool second) {
  constexpr int64_t kBytes = int64_t{192} << 10;
  const int64_t elements = (second ? 2 : 1) * (2 * features + 3 * padded<T>(hidden) + 2 * padded<T>(outputs));
  const int64_t rows = kBytes / static_cast<int64_t>(sizeof(T)) / (elements > 0 ? elements : 1);
  return rows < 48 ? 48 : rows > 512 ? 512 : rows;
}

template <class T>
constexpr int64_t panels(int64_t columns) {
  return (columns + kPanel<T> - 1) / kPanel<T>;
}

// b [K, N] by rows as a right operand: itself where its rows are whole vectors, else packed
template <class T>
Right<T> right_operand(int64_t K, int64_t N, const T* b, T* packed) {
  if (N % kLanes<T> == 0) return {b, N, kPanel<T>};
  pack<T>(K, N, b, N, 1, packed, 0, panels<T>(N));
  return {packed, kPanel<T>, K * kPanel<T>};
}
template <class T>
int64_t right_operand_size(int64_t K, int64_t N) {
  return N % kLanes<T> == 0 ? 0 : packed_size<T>(K, N);
}

// C [M, N], by rows of N elements, = start + products. `edge` [M, padded(N)] takes it where N is not whole vectors.
template <class T, class... Products>
void product_to_rows(int64_t M, int64_t N, T* c, Start start, T* edge, const Products&... products) {
  const int64_t ld = padded<T>(N);
  if (ld == N) return product<T>(M, N, c, N, start, nullptr, products...);
  if (start == kAdd) copy_rows<T>(M, N, c, N, edge, ld);
  product<T>(M, N, edge, ld, start, nullptr, products...);
  copy_rows<T>(M, N, edge, ld, c, N);
}

// One weight [O, I] of a task's head, ready for products with rows from both sides.
template <class T>
class HeadWeight {
 public:
  // scratch for any weight of these widths
  HeadWeight(int64_t in, int64_t out, Scratch<T>& scratch)
      : I(in),
        O(out),
        transposed_(scratch.take(packed_size<T>(I, O))),
        packed_(scratch.take(right_operand_size<T>(O, I))) {}

  // for products with `rows` rows each, from the sides that are asked for; null: the products are zero
  void set(const T* weight, int64_t rows, bool forward, bool backward) {
    weight_ = weight;
    if (!weight) return;
    by_dots_ = dots_are_cheaper(rows);
    if (forward && !by_dots_) {
      pack<T>(I, O, weight, 1, I, transposed_, 0, panels<T>(O));
    }
    if (backward) right_ = right_operand<T>(O, I, weight, packed_);
  }

  // y [n, ld] = start + x W^T, ld = padded(O)
  void forward(int64_t n, const T* x, int64_t ldx, Start start, const T* row, T* y) const {
    const int64_t ld = padded<T>(O);
    if (!weight_ || !by_dots_) {
      const Right<T> right = {transposed_, kPanel<T>, I * kPanel<T>};
      return product<T>(n, O, y, ld, start, row, Product<T>{{x, ldx, 1}, right, weight_ ? I : 0});
    }
    if (start != kAdd) {
      // the columns behind O too
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t o = 0; o < ld; o += kLanes<T>) {
          store(y + i * ld + o, start == kRow ? load<Vector<T>>(row + o) : Vector<T>{});
        }
      }
    }
    dots<T>(n, O, I, x, ldx, weight_, I, y, ld, /*add=*/true);
  }

  // d W as a product, for d [n, ldd]
  Product<T> backward(const T* d, int64_t ldd) const { return {{d, ldd, 1}, right_, weight_ ? O : 0}; }

 private:
  int64_t I, O;
  T *transposed_, *packed_;
  const T* weight_ = nullptr;
  bool by_dots_ = false;
  Right<T> right_{};

  // Dot products need no transposition, but add up the lanes of each result; their rows are read whole.
  bool dots_are_cheaper(int64_t rows) const {
    constexpr int64_t L = kLanes<T>;
    // in instructions: a transposed vector takes some 6, the sum of a result's lanes 4
    const int64_t dots = rows * O * (I / L + 4 + I % L);
    const int64_t vectors = padded<T>(O) / L, transposition = 6 * I * vectors;
    return dots < rows * I * vectors + transposition;
  }
};

// The gradient [O, I] of a weight and [O] of its bias, summed over blocks of rows.
template <class T>
class HeadGradient {
 public:
  HeadGradient(int64_t in, int64_t out, Scratch<T>& scratch)
      : I(in), O(out), edge_(scratch.take(is_whole() ? 0 : O * padded<T>(I))) {}

  void set(T* weight, T* bias) {
    weight_ = weight;
    bias_ = bias;
    start_ = kZero;
  }

  bool wants_weight() const { return weight_; }

  // d^T h, of n rows d [n, ldd] and h [n, I]
  template <class... More>
  void add(int64_t n, const T* d, int64_t ldd, const Right<T>& h, const More&... more) {
    if (!weight_) return;
    product<T>(O, I, is_whole() ? weight_ : edge_, padded<T>(I), start_, nullptr, Product<T>{{d, 1, ldd}, h, n},
               more...);
    start_ = kAdd;
  }

  // 1^T d
  void add_columns(int64_t n, const T* d, int64_t ldd, bool first) {
    if (!bias_) return;
    for_each<T>(O, [&](int64_t o, auto lane) {
      using V = decltype(lane);
      V total{};
      for (int64_t i = 0; i < n; i += kShortSum) {
        const int64_t end = i + kShortSum < n ? i + kShortSum : n;
        V part{};
        for (int64_t r = i; r < end; ++r) part += load<V>(d + r * ldd + o);
        total += part;
      }
      store(bias_ + o, first ? total : load<V>(bias_ + o) + total);
    });
  }

  // after the last block
  void finish() {
    if (weight_ && !is_whole()) copy_rows<T>(O, I, edge_, padded<T>(I), weight_, I);
  }

 private:
  int64_t I, O;
  T *edge_, *weight_ = nullptr, *bias_ = nullptr;
  Start start_ = kZero;

  // whether products can write the rows where they belong
  bool is_whole() const { return I % kLanes<T> == 0; }
};

// The head of one task and memory for a block of n of its rows.
template <class T>
class HeadPass {
 public:
  HeadPass(int64_t features, int64_t hidden, int64_t outputs, int64_t rows, Scratch<T>& scratch)
      : D(features),
        H(hidden),
        C(outputs),
        ld_h(padded<T>(hidden)),
        ld_z(padded<T>(outputs)),
        block(rows),
        W(H ? H : D, C, scratch),
        V(D, H, scratch),
        dW(H ? H : D, C, scratch),
        dV(D, H, scratch),
        b(scratch.take(ld_z)),
        c(scratch.take(ld_h)),
        a(scratch.take(block * ld_h)),
        h(scratch.take(block * ld_h)),
        e(scratch.take(block * ld_h)),
        z(scratch.take(block * ld_z)),
        x_packed(scratch.take(right_operand_size<T>(block, D))),
        x_edge(scratch.take(block * (padded<T>(D) - D ? padded<T>(D) : 0))) {}

  HeadPass(const HeadCall<T>& call, Scratch<T>& scratch)
      : HeadPass(call.features, call.hidden, call.outputs,
                 head_block_rows<T>(call.features, call.hidden, call.outputs, false), scratch) {}

  const int64_t D, H, C, ld_h, ld_z, block;
  HeadWeight<T> W, V;
  HeadGradient<T> dW, dV;
  T *b, *c;              // padded copies of the biases
  T *a, *h, *e;          // [block, ld_h]
  T* z;                  // [block, ld_z]
  T *x_packed, *x_edge;  // [block, padded(D)]
  Activation act = Activation::kIdentity;
  const T *bias = nullptr, *hidden_bias = nullptr;
  HeadTensors<T> to{};

  // the task's head, and where its gradients go; whether z is asked for, or everything that there is
  void set(const HeadCall<T>& call, const HeadTensors<T>& gradient, bool outputs, bool everything = false) {
    act = call.activation;
    to = gradient;
    bias = padded_row(C, call.in.bias, b);
    hidden_bias = padded_row(H, call.in.hidden_bias, c);
    W.set(call.in.weight, call.rows, outputs, to.x || wants_hidden() || everything);
    V.set(call.in.hidden_weight, call.rows, true, to.x || everything);
    dW.set(to.weight, to.bias);
    dV.set(to.hidden_weight, to.hidden_bias);
  }

  bool wants_any() const { return to.x || to.weight || to.bias || wants_hidden(); }

  // f(n, row, x): the blocks of the call's rows
  template <class F>
  void for_each_block(const HeadCall<T>& call, const F& f) {
    for (int64_t row = 0; row < call.rows; row += block) {
      f(call.rows - row < block ? call.rows - row : block, row, call.in.x + row * D);
    }
    dW.finish();
    dV.finish();
  }

  // a and h
  void forward_hidden(int64_t n, const T* x) {
    if (!H) return;
    V.forward(n, x, D, hidden_bias ? kRow : kZero, hidden_bias, a);
    with_activation(act, [&](auto named) { activate<decltype(named)::kValue>(n * ld_h, a, h); });
  }

  // z, after forward_hidden
  void forward_outputs(int64_t n, const T* x, T* outputs) const {
    W.forward(n, H ? h : x, H ? ld_h : D, bias ? kRow : kZero, bias, outputs);
  }

  // the gradients for the cotangent q [n, ldq] of the rows from `row` on, after forward_hidden
  void backward(int64_t n, int64_t row, const T* x, const T* q, int64_t ldq) {
    const bool first = row == 0;
    dW.add_columns(n, q, ldq, first);
    if (!H) {
      if (to.weight) dW.add(n, q, ldq, as_right(n, x));
      if (to.x) product_to_rows<T>(n, D, to.x + row * D, kZero, x_edge, W.backward(q, ldq));
      return;
    }
    dW.add(n, q, ldq, by_rows(h));
    if (!to.x && !wants_hidden()) return;
    product<T>(n, H, e, ld_h, kZero, nullptr, W.backward(q, ldq));
    with_activation(act, [&](auto named) { activate_backward<decltype(named)::kValue>(n * ld_h, e, a, h, e); });
    dV.add_columns(n, e, ld_h, first);
    if (to.hidden_weight) dV.add(n, e, ld_h, as_right(n, x));
    if (to.x) product_to_rows<T>(n, D, to.x + row * D, kZero, x_edge, V.backward(e, ld_h));
  }

  // rows of the hidden layer, and rows of x, as a product's right operand
  Right<T> by_rows(const T* rows) const { return {rows, ld_h, kPanel<T>}; }
  Right<T> as_right(int64_t n, const T* x) const { return right_operand<T>(n, D, x, x_packed); }

  static const T* padded_row(int64_t n, const T* row, T* copy) {
    if (!row || n % kLanes<T> == 0) return row;
    for (int64_t i = 0; i < padded<T>(n); ++i) copy[i] = i < n ? row[i] : T(0);
    return copy;
  }

 private:
  bool wants_hidden() const { return to.hidden_weight || to.hidden_bias; }
};

template <class T>
void heads_forward(const HeadCall<T>& call, T* z, T* memory) {
  Scratch<T> scratch(memory);
  HeadPass<T> pass(call, scratch);
  pass.set(call, {}, /*outputs=*/true);
  const bool whole = pass.ld_z == pass.C;
  pass.for_each_block(call, [&](int64_t n, int64_t row, const T* x) {
    T* const to = z + row * pass.C;
    pass.forward_hidden(n, x);
    pass.forward_outputs(n, x, whole ? to : pass.z);
    if (!whole) copy_rows<T>(n, pass.C, pass.z, pass.ld_z, to, pass.C);
  });
}

template <class T>
void heads_backward(const HeadCall<T>& call, const T* q, const HeadTensors<T>& gradient, T* memory) {
  Scratch<T> scratch(memory);
  HeadPass<T> pass(call, scratch);
  pass.set(call, gradient, /*outputs=*/false);
  pass.for_each_block(call, [&](int64_t n, int64_t row, const T* x) {
    pass.forward_hidden(n, x);
    pass.backward(n, row, x, q + row * pass.C, pass.C);
  });
}

// The reverse of the backward pass: names as at the top of this file.
template <class T>
struct HeadReverse {
  HeadPass<T> pass;
  HeadWeight<T> gW, gV;
  T *gb, *gc;           // padded copies
  T *a1, *h1, *da, *r;  // a', h', da, r  [block, ld_h]
  T* gx_packed;         // [block, padded(D)]

  HeadReverse(int64_t features, int64_t hidden, int64_t outputs, int64_t rows, Scratch<T>& scratch)
      : pass(features, hidden, outputs, rows, scratch),
        gW(hidden ? hidden : features, outputs, scratch),
        gV(features, hidden, scratch),
        gb(scratch.take(pass.ld_z)),
        gc(scratch.take(pass.ld_h)),
        a1(scratch.take(pass.block * pass.ld_h)),
        h1(scratch.take(pass.block * pass.ld_h)),
        da(scratch.take(pass.block * pass.ld_h)),
        r(scratch.take(pass.block * pass.ld_h)),
        gx_packed(scratch.take(right_operand_size<T>(pass.block, features))) {}

  void run(const HeadCall<T>& call, const T* q, const HeadTensors<const T>& g, T* d_q, const HeadTensors<T>& gradient) {
    pass.set(call, gradient, /*outputs=*/true, /*everything=*/true);
    gW.set(g.weight, call.rows, true, true);
    gV.set(g.hidden_weight, call.rows, true, true);
    const T *row_gb = pass.padded_row(pass.C, g.bias, gb), *row_gc = pass.padded_row(pass.H, g.hidden_bias, gc);
    pass.for_each_block(call, [&](int64_t n, int64_t row, const T* x) {
      const T* gx = g.x ? g.x + row * pass.D : nullptr;
      const T* q_rows = q + row * pass.C;
      T* const dx = gradient.x ? gradient.x + row * pass.D : nullptr;
      if (pass.H) {
        hidden(n, row, x, gx, q_rows, row_gc, dx);
      } else if (dx) {
        product_to_rows<T>(n, pass.D, dx, kZero, pass.x_edge, gW.backward(q_rows, pass.C));
      }
      if (d_q) {
        gW.forward(n, pass.H ? pass.h : x, pass.H ? pass.ld_h : pass.D, row_gb ? kRow : kZero, row_gb, pass.z);
        const T* const moved = pass.H ? h1 : gx;
        if (moved) pass.W.forward(n, moved, pass.H ? pass.ld_h : pass.D, kAdd, nullptr, pass.z);
        copy_rows<T>(n, pass.C, pass.z, pass.ld_z, d_q + row * pass.C, pass.C);
      }
      if (!gradient.weight) return;
      if (pass.H) {
        pass.dW.add(n, q_rows, pass.C, pass.by_rows(h1));
      } else {
        // without gx the gradient is zero: a product of no rows
        pass.dW.add(gx ? n : 0, q_rows, pass.C, gx ? right_operand<T>(n, pass.D, gx, gx_packed) : Right<T>{});
      }
    });
  }

  // what goes through the hidden layer
  void hidden(int64_t n, int64_t row, const T* x, const T* gx, const T* q, const T* row_gc, T* dx) {
    const int64_t ld = pass.ld_h, size = n * ld;
    pass.forward_hidden(n, x);
    product<T>(n, pass.H, pass.e, ld, kZero, nullptr, pass.W.backward(q, pass.C));
    product<T>(n, pass.H, r, ld, kZero, nullptr, gW.backward(q, pass.C));
    gV.forward(n, x, pass.D, row_gc ? kRow : kZero, row_gc, a1);
    if (gx) pass.V.forward(n, gx, pass.D, kAdd, nullptr, a1);
    with_activation(pass.act, [&](auto named) {
      constexpr Activation A = decltype(named)::kValue;
      activate_tangent<A>(size, a1, pass.a, pass.h, h1);
      activate_backward<A>(size, pass.e, pass.a, pass.h, da);
      activate_backward_tangent<A>(size, r, pass.e, a1, pass.a, pass.h, r);
    });
    pass.dV.add_columns(n, r, ld, row == 0);
    if (pass.to.hidden_weight) {
      const Right<T> rows = pass.as_right(n, x);
      const Product<T> through_x = {{da, 1, ld}, gx ? right_operand<T>(n, pass.D, gx, gx_packed) : rows, gx ? n : 0};
      pass.dV.add(n, r, ld, rows, through_x);
    }
    if (dx) {
      product_to_rows<T>(n, pass.D, dx, kZero, pass.x_edge, pass.V.backward(r, ld), gV.backward(da, ld));
    }
  }
};

template <class T>
void heads_double_backward(const HeadCall<T>& call, const T* q, const HeadTensors<const T>& cotangent, T* d_q,
                           const HeadTensors<T>& gradient, T* memory) {
  Scratch<T> scratch(memory);
  const int64_t rows = head_block_rows<T>(call.features, call.hidden, call.outputs, true);
  HeadReverse<T>(call.features, call.hidden, call.outputs, rows, scratch).run(call, q, cotangent, d_q, gradient);
}

// elements that a pass takes for any number of outputs between these: the fewest have the largest blocks
template <class T>
int64_t heads_scratch(int64_t features, int64_t hidden, int64_t fewest, int64_t most, bool second) {
  const int64_t rows = head_block_rows<T>(features, hidden, fewest, second);
  Scratch<T> scratch(nullptr);
  if (second) {
    HeadReverse<T>(features, hidden, most, rows, scratch);
  } else {
    HeadPass<T>(features, hidden, most, rows, scratch);
    // what heads_loss takes besides
    scratch.take(padded<T>(most));
  }
  return scratch.used();
}

}  // namespace mtml::MTML_ISA
