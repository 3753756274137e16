#include "handlers.h"

#include <cstring>
#include <exception>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "conv.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace sparsetrain {
namespace {

namespace ffi = xla::ffi;
using Geometry = ffi::Span<const int64_t>;
using Operand = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

class XlaExecutor : public Executor {
 public:
  explicit XlaExecutor(ffi::ThreadPool pool) : pool_(pool), threads_(static_cast<int>(pool.num_threads())) {}
  // The caller may or may not be one of the pool's threads; a helper too many finds no work.
  int concurrency() const override { return threads_ > 1 ? threads_ : 1; }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool pool_;
  int threads_;
};

// lhs NHWC, rhs HWIO and out NHWC of the forward convolution, whichever of them this operation reads or writes.
ffi::Error make_shape(const char* op, Geometry geometry, ffi::Span<const int64_t> lhs, ffi::Span<const int64_t> rhs,
                      ffi::Span<const int64_t> out, int64_t mode, ConvShape* shape) {
  const auto fail = [op](const std::string& what) {
    return ffi::Error::InvalidArgument(std::string(op) + ": " + what);
  };
  if (geometry.size() != 6) {
    return fail("geometry must be [stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right], got " +
                std::to_string(geometry.size()) + " numbers");
  }
  if (mode < 0 || mode > 2) return fail("mode must be 0 (auto), 1 (sparse) or 2 (dense), got " + std::to_string(mode));
  const int64_t sh = geometry[0], sw = geometry[1];
  if (sh < 1 || sw < 1) return fail("strides must be positive");
  for (size_t i = 2; i < 6; ++i) {
    if (geometry[i] < 0) return fail("padding must not be negative");
  }
  *shape = {lhs[0], lhs[1], lhs[2], lhs[3], rhs[0], rhs[1], rhs[3], out[1], out[2], sh, sw, geometry[2], geometry[4]};
  if (shape->r < 1 || shape->s < 1) return fail("the kernel has no taps");
  if (rhs[2] != lhs[3]) {
    return fail("lhs has " + std::to_string(lhs[3]) + " features, rhs wants " + std::to_string(rhs[2]));
  }
  if (rhs[3] != out[3]) {
    return fail("rhs has " + std::to_string(rhs[3]) + " output features, out has " + std::to_string(out[3]));
  }
  if (lhs[0] != out[0]) {
    return fail("lhs has " + std::to_string(lhs[0]) + " images, out has " + std::to_string(out[0]));
  }
  const int64_t oh = out_pixels(shape->h, geometry[2], geometry[3], shape->r, sh);
  const int64_t ow = out_pixels(shape->w, geometry[4], geometry[5], shape->s, sw);
  if (out[1] != oh || out[2] != ow) {
    return fail("the geometry gives an output of " + std::to_string(oh) + "x" + std::to_string(ow) + ", out is " +
                std::to_string(out[1]) + "x" + std::to_string(out[2]));
  }
  return ffi::Error::Success();
}

std::optional<DType> dtype_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::F32:
      return DType::kF32;
    case ffi::BF16:
      return DType::kBf16;
    case ffi::F16:
      return DType::kF16;
    default:
      return std::nullopt;
  }
}

// Ranks and dtypes; make_shape may then index dimensions.
template <class... Operands>
ffi::Error check_buffers(const char* op, Result& result, const Operand& first, const Operands&... others) {
  const auto fail = [op](const std::string& what) {
    return ffi::Error::InvalidArgument(std::string(op) + ": " + what);
  };
  for (const Operand* buffer : std::initializer_list<const Operand*>{&first, &others..., &*result}) {
    if (buffer->dimensions().size() != 4) {
      return fail("every array must have 4 dimensions, one has " + std::to_string(buffer->dimensions().size()));
    }
    if (!dtype_of(*buffer)) return fail("every array must be float32, bfloat16 or float16");
  }
  if (((others.element_type() != first.element_type()) || ...)) return fail("operands must have one dtype");
  if (result->element_type() != first.element_type() && result->element_type() != ffi::F32) {
    return fail("the result must have the dtype of the operands or be float32");
  }
  return ffi::Error::Success();
}

void zero(Result& result) {
  if (result->element_count() > 0) std::memset(result->untyped_data(), 0, result->size_bytes());
}

template <auto operation, class... Results, class... Operands>
ffi::Error run(const char* op, ffi::ThreadPool pool, const ConvShape& shape, int64_t mode,
               std::tuple<Results&...> results, const Operands&... operands) {
  const bool nothing = ((operands.element_count() == 0) || ...);  // to add up
  return std::apply(
      [&](Results&... result) {
        if (nothing) (zero(result), ...);
        if (nothing || ((result->element_count() == 0) && ...)) return ffi::Error::Success();
        try {
          XlaExecutor executor(pool);
          operation(shape, static_cast<Mode>(mode), ConstTensor{operands.untyped_data(), *dtype_of(operands)}...,
                    Tensor{result->untyped_data(), *dtype_of(*result)}..., executor);
        } catch (const std::exception& e) {
          return ffi::Error::Internal(std::string(op) + ": " + e.what());
        }
        return ffi::Error::Success();
      },
      results);
}

ffi::Error conv_fwd_handler(ffi::ThreadPool pool, Operand lhs, Operand rhs, Result out, Geometry geometry,
                            int64_t mode) {
  constexpr const char* kOp = "sparse_conv_fwd";
  ConvShape shape;
  ffi::Error error = check_buffers(kOp, out, lhs, rhs);
  if (error.failure()) return error;
  error = make_shape(kOp, geometry, lhs.dimensions(), rhs.dimensions(), out->dimensions(), mode, &shape);
  if (error.failure()) return error;
  return run<conv_fwd>(kOp, pool, shape, mode, std::tie(out), lhs, rhs);
}

ffi::Error conv_bwd_input_handler(ffi::ThreadPool pool, Operand g, Operand rhs, Result dlhs, Geometry geometry,
                                  int64_t mode) {
  constexpr const char* kOp = "sparse_conv_bwd_input";
  ConvShape shape;
  ffi::Error error = check_buffers(kOp, dlhs, g, rhs);
  if (error.failure()) return error;
  error = make_shape(kOp, geometry, dlhs->dimensions(), rhs.dimensions(), g.dimensions(), mode, &shape);
  if (error.failure()) return error;
  return run<conv_bwd_input>(kOp, pool, shape, mode, std::tie(dlhs), g, rhs);
}

ffi::Error conv_bwd_weights_handler(ffi::ThreadPool pool, Operand lhs, Operand g, Result drhs, Geometry geometry,
                                    int64_t mode) {
  constexpr const char* kOp = "sparse_conv_bwd_weights";
  ConvShape shape;
  ffi::Error error = check_buffers(kOp, drhs, lhs, g);
  if (error.failure()) return error;
  error = make_shape(kOp, geometry, lhs.dimensions(), drhs->dimensions(), g.dimensions(), mode, &shape);
  if (error.failure()) return error;
  return run<conv_bwd_weights>(kOp, pool, shape, mode, std::tie(drhs), lhs, g);
}

// Two arrays of 4 dimensions, `names` in a message.
ffi::Error check_same_shape(const char* op, const char* names, const Operand& a, const Operand& b) {
  for (size_t i = 0; i < 4; ++i) {
    if (a.dimensions()[i] == b.dimensions()[i]) continue;
    return ffi::Error::InvalidArgument(std::string(op) + ": " + names + " differ in dimension " + std::to_string(i) +
                                       ": " + std::to_string(a.dimensions()[i]) + " and " +
                                       std::to_string(b.dimensions()[i]));
  }
  return ffi::Error::Success();
}

// Of an operation whose result dlhs is masked by x.
ffi::Error make_masked_shape(const char* op, const Operand& g, const Operand& rhs, const Operand& x, Result& dlhs,
                             Geometry geometry, int64_t mode, ConvShape* shape) {
  ffi::Error error = check_buffers(op, dlhs, g, rhs, x);
  if (error.failure()) return error;
  error = make_shape(op, geometry, dlhs->dimensions(), rhs.dimensions(), g.dimensions(), mode, shape);
  if (error.failure()) return error;
  return check_same_shape(op, "x and the result", x, *dlhs);
}

ffi::Error conv_bwd_input_masked_handler(ffi::ThreadPool pool, Operand g, Operand rhs, Operand x, Result dlhs,
                                         Geometry geometry, int64_t mode) {
  constexpr const char* kOp = "sparse_conv_bwd_input_masked";
  ConvShape shape;
  ffi::Error error = make_masked_shape(kOp, g, rhs, x, dlhs, geometry, mode, &shape);
  if (error.failure()) return error;
  return run<conv_bwd_input_masked>(kOp, pool, shape, mode, std::tie(dlhs), g, rhs, x);
}

ffi::Error conv_bwd_both_handler(ffi::ThreadPool pool, Operand g, Operand rhs, Operand x, Result dlhs, Result drhs,
                                 Geometry geometry, int64_t mode) {
  constexpr const char* kOp = "sparse_conv_bwd_input_masked_sparse_conv_bwd_weights";
  ConvShape shape;
  ffi::Error error = make_masked_shape(kOp, g, rhs, x, dlhs, geometry, mode, &shape);
  if (error.failure()) return error;
  error = check_buffers(kOp, drhs, g);
  if (error.failure()) return error;
  error = check_same_shape(kOp, "rhs and its gradient", rhs, *drhs);
  if (error.failure()) return error;
  return run<conv_bwd_both>(kOp, pool, shape, mode, std::tie(dlhs, drhs), g, rhs, x);
}

// Everything after the operands and all results but the last.
template <class Binding>
auto finish(Binding binding) {
  return std::move(binding)
      .template Ret<ffi::AnyBuffer>()
      .template Attr<Geometry>("geometry")
      .template Attr<int64_t>("mode");
}
auto two_operands() { return finish(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Operand>().Arg<Operand>()); }
auto three_operands() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Operand>().Arg<Operand>().Arg<Operand>(); }

XLA_FFI_DEFINE_HANDLER(conv_fwd_v1, conv_fwd_handler, two_operands());
XLA_FFI_DEFINE_HANDLER(conv_bwd_input_v1, conv_bwd_input_handler, two_operands());
XLA_FFI_DEFINE_HANDLER(conv_bwd_weights_v1, conv_bwd_weights_handler, two_operands());
XLA_FFI_DEFINE_HANDLER(conv_bwd_input_masked_v1, conv_bwd_input_masked_handler, finish(three_operands()));
XLA_FFI_DEFINE_HANDLER(conv_bwd_both_v1, conv_bwd_both_handler, finish(three_operands().Ret<ffi::AnyBuffer>()));

}  // namespace

std::vector<std::pair<const char*, void*>> registrations() {
  return {
      {"sparsetrain_conv_fwd_v1", reinterpret_cast<void*>(conv_fwd_v1)},
      {"sparsetrain_conv_bwd_input_v1", reinterpret_cast<void*>(conv_bwd_input_v1)},
      {"sparsetrain_conv_bwd_weights_v1", reinterpret_cast<void*>(conv_bwd_weights_v1)},
      {"sparsetrain_conv_bwd_input_masked_v1", reinterpret_cast<void*>(conv_bwd_input_masked_v1)},
      {"sparsetrain_conv_bwd_both_v1", reinterpret_cast<void*>(conv_bwd_both_v1)},
  };
}

}  // namespace sparsetrain
