// The ops of `torch.ops.pikv_ds`, and the only file of csrc/ that includes torch.
//
// It uses torch's stable ABI: it compiles in seconds where torch/extension.h takes most of a
// minute, and one binary serves torch 2.11 and later (setup.py sets TORCH_TARGET_VERSION).
//
// Per op: check the arguments, fill the params of launch.h, call the kernel. The op's meaning is
// told once, in pikv_ds/ops/reference.py.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace pikv_ds {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A named argument, so that an error can say which one is wrong.
struct Arg {
  const char* name;
  const Tensor& tensor;
};

// STD_TORCH_CHECK would put this file's path and line before the message; callers need neither.
template <typename... Parts>
[[noreturn]] void Fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename Sizes>
std::string ShapeString(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "";
  text << "[";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

void CheckFloat32(const char* op, const Arg& arg) {
  const ScalarType dtype = arg.tensor.scalar_type();
  if (dtype != ScalarType::Float) Fail(op, arg.name, " must be float32, got ", dtype);
}

void CheckCpu(const char* op, const Arg& arg) {
  // The dispatcher picks the CPU kernel when any argument is on the CPU, so the others may not be.
  if (!arg.tensor.is_cpu()) Fail(op, arg.name, " must be on the CPU, got another device");
}

void CheckContiguous(const char* op, const Arg& arg) {
  if (!arg.tensor.is_contiguous()) {
    Fail(op, arg.name, " must be contiguous, got shape ", ShapeString(arg.tensor.sizes()),
         " with strides ", ShapeString(arg.tensor.strides()));
  }
}

void CheckDim(const char* op, const Arg& arg, int64_t dim, const char* layout) {
  if (arg.tensor.dim() != dim) {
    Fail(op, arg.name, " must have ", dim, " dimensions ", layout, ", got shape ",
         ShapeString(arg.tensor.sizes()));
  }
}

void CheckShape(const char* op, const Arg& arg, std::initializer_list<int64_t> expected,
                const char* layout) {
  const auto sizes = arg.tensor.sizes();
  bool matches = sizes.size() == expected.size();
  for (size_t i = 0; matches && i < expected.size(); ++i) {
    matches = sizes[i] == expected.begin()[i];
  }
  if (!matches) {
    Fail(op, arg.name, " must have shape ", layout, " = ", ShapeString(expected), ", got ",
         ShapeString(sizes));
  }
}

// Kernels write their outputs while they still read their inputs. Both must be contiguous.
void CheckNoOverlap(const char* op, const Arg& a, const Arg& b) {
  const auto begin = [](const Arg& arg) { return static_cast<const char*>(arg.tensor.data_ptr()); };
  const auto end = [&begin](const Arg& arg) {
    return begin(arg) + arg.tensor.numel() * static_cast<int64_t>(arg.tensor.element_size());
  };
  const std::less<const char*> before;  // defined for pointers into different arrays, unlike <
  if (before(begin(a), end(b)) && before(begin(b), end(a))) {
    Fail(op, a.name, " must not share memory with ", b.name, ", got overlapping tensors");
  }
}

MergePartialsParams CheckMergePartials(const Arg& outs, const Arg& lses, const Arg& out,
                                       const Arg& lse) {
  constexpr const char* kOp = "merge_partials";
  CheckDim(kOp, outs, 3, "[P, N, D]");
  const int64_t num_partials = outs.tensor.size(0);
  const int64_t num_rows = outs.tensor.size(1);
  const int64_t head_dim = outs.tensor.size(2);
  CheckShape(kOp, lses, {num_partials, num_rows}, "[P, N]");
  CheckShape(kOp, out, {num_rows, head_dim}, "[N, D]");
  CheckShape(kOp, lse, {num_rows}, "[N]");
  for (const Arg& arg : {outs, lses, out, lse}) {
    CheckFloat32(kOp, arg);
    CheckContiguous(kOp, arg);
  }
  for (const Arg& output : {out, lse}) {
    for (const Arg& input : {outs, lses}) CheckNoOverlap(kOp, output, input);
  }
  CheckNoOverlap(kOp, out, lse);

  MergePartialsParams params;
  params.outs = static_cast<const float*>(outs.tensor.data_ptr());
  params.lses = static_cast<const float*>(lses.tensor.data_ptr());
  params.out = static_cast<float*>(out.tensor.data_ptr());
  params.lse = static_cast<float*>(lse.tensor.data_ptr());
  params.num_partials = num_partials;
  params.num_rows = num_rows;
  params.head_dim = head_dim;
  return params;
}

void MergePartialsCpuOp(const Tensor& outs, const Tensor& lses, Tensor out, Tensor lse) {
  const Arg args[] = {{"outs", outs}, {"lses", lses}, {"out", out}, {"lse", lse}};
  for (const Arg& arg : args) CheckCpu("merge_partials", arg);
  MergePartialsCpu(CheckMergePartials(args[0], args[1], args[2], args[3]));
}

STABLE_TORCH_LIBRARY(pikv_ds, m) {
  m.def("merge_partials(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CPU, m) {
  m.impl("merge_partials", TORCH_BOX(&MergePartialsCpuOp));
}

}  // namespace
}  // namespace pikv_ds

// `import pikv_ds._C` loads this library, and loading it registers the ops above. The Python module
// itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
