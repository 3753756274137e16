// The contract of the operations: shapes, layouts, modes, and what skipping a zero means.
//
//   conv_fwd          out[n,y,x,k]  = sum_{r,s,c} lhs[n, y*stride_h+r-pad_top, x*stride_w+s-pad_left, c] * rhs[r,s,c,k]
//   conv_bwd_input    dlhs = the transpose of conv_fwd in lhs, applied to g (the gradient of out)
//   conv_bwd_weights  drhs = the transpose of conv_fwd in rhs, applied to (lhs, g)
//   conv_bwd_input_masked
//                     what conv_bwd_input computes wherever x (of the shape of lhs) is non-zero, and exactly zero
//                     wherever x is zero, even if g or rhs holds Inf or NaN
//   conv_bwd_both     the last two of the same call, of which lhs is x: two results
//
// The operands of a call are all float32, all bfloat16 or all float16 (dtype.h); sums are float32, and the result is
// rounded once to the dtype of the operands, or stays float32.
//
// Layouts are Flax's own, dense and row-major: lhs and dlhs NHWC [n,h,w,c], rhs and drhs HWIO [r,s,c,k],
// out and g NHWC [n,oh,ow,k]. Indices outside lhs are zero padding.
//
// The *checked* operand is the one whose zeros are skipped: lhs in FWD, g in BWI, either in BWW, x or g in the masked
// BWI, x where both gradients are made at once.
// A skipped zero (+0.0, -0.0 or, under flush-to-zero, a subnormal) does not meet the other operand, so 0 * Inf and
// 0 * NaN count as 0 where it is skipped and as NaN where it is not. So do zeros beyond an image: padding of lhs, and
// what lies beyond g in the gradients. NaN and Inf in the checked operand are never skipped. Apart from that, skipping
// changes the order of summation only, and the order depends on the shapes, the ISA and the values' zero pattern, never
// on the number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace sparsetrain {

struct ConvShape {
  int64_t n, h, w, c;          // lhs
  int64_t r, s, k;             // kernel height and width, output features
  int64_t oh, ow;              // output image
  int64_t stride_h, stride_w;  // >= 1
  int64_t pad_top, pad_left;   // >= 0; bottom and right padding follow from oh, ow

  int64_t lhs_size() const { return n * h * w * c; }
  int64_t rhs_size() const { return r * s * c * k; }
  int64_t out_size() const { return n * oh * ow * k; }

  // A 1x1 kernel at stride 1 without padding does not see where a pixel lies.
  bool pixelwise() const {
    return r == 1 && s == 1 && stride_h == 1 && stride_w == 1 && oh == h && ow == w && pad_top == 0 && pad_left == 0;
  }
  // The same with all pixels in one long row, if it is pixelwise; else itself.
  ConvShape flattened() const {
    ConvShape flat = *this;
    if (!pixelwise()) return flat;
    flat.w = flat.ow = n * h * w;
    flat.n = flat.h = flat.oh = 1;
    return flat;
  }
};

// Whether vectors stored past the caches fill its lines: those of narrow values are half lines, which would leave the
// write-combining buffers one by one.
inline bool fills_lines(const Tensor& result) {
  return result.dtype == DType::kF32 && reinterpret_cast<uintptr_t>(result.data) % 64 == 0;
}

// Pixels of out along an axis with so many pixels and taps; 0 where the kernel is larger than the padded axis.
inline int64_t out_pixels(int64_t size, int64_t pad_low, int64_t pad_high, int64_t taps, int64_t stride) {
  const int64_t span = size + pad_low + pad_high - taps;
  return span < 0 ? 0 : span / stride + 1;
}

enum class Mode : int64_t {
  kAuto = 0,    // measure the zeros of this call, choose
  kSparse = 1,  // always skip
  kDense = 2,   // never skip
};

class Executor;  // parallel.h

void conv_fwd(const ConvShape& shape, Mode mode, ConstTensor lhs, ConstTensor rhs, Tensor out, Executor& executor);
void conv_bwd_input(const ConvShape& shape, Mode mode, ConstTensor g, ConstTensor rhs, Tensor dlhs, Executor& executor);
void conv_bwd_weights(const ConvShape& shape, Mode mode, ConstTensor lhs, ConstTensor g, Tensor drhs,
                      Executor& executor);
void conv_bwd_input_masked(const ConvShape& shape, Mode mode, ConstTensor g, ConstTensor rhs, ConstTensor x,
                           Tensor dlhs, Executor& executor);
void conv_bwd_both(const ConvShape& shape, Mode mode, ConstTensor g, ConstTensor rhs, ConstTensor x, Tensor dlhs,
                   Tensor drhs, Executor& executor);

}  // namespace sparsetrain
