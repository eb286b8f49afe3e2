// The library `torch.ops.pikv_ds`: the schemas of its ops, and the Python module that loads it.
//
// The other files of this folder have the ops themselves: each checks its arguments (checks.h),
// fills the params of ../launch.h, and launches the kernel (launch_kernel.h). An op is a template
// over its kernel, so CPU and CUDA share the checks, and is registered for both at its file's end.
// What an op means is told once, in pikv_ds/ops/reference.py.
//
// This folder is the only code of csrc/ that includes torch. It uses torch's stable ABI: a file
// compiles in seconds where torch/extension.h takes most of a minute, and one binary serves torch
// 2.11 and later (setup.py sets TORCH_TARGET_VERSION).

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "../cpu/isa.h"

namespace pikv_ds {
namespace {

// The types of the arguments that several ops take: storage, pages in it, attention's result.
#define PIKV_SLABS "Tensor slab_pointers, int slab_rows, int row_bytes, "
#define PIKV_LAYOUT "int element, int num_kv_heads, int page_size, int latent_dim, "
#define PIKV_PARTIAL "Tensor(a!) out, Tensor(b!) lse"

STABLE_TORCH_LIBRARY(pikv_ds, m) {
  m.def("seal_pages(Tensor keys, Tensor? values, " PIKV_LAYOUT
        "Tensor(a!) out, Tensor(b!)? bounds, Tensor(c!) flags) -> ()");
  m.def("gather_pages(" PIKV_SLABS "Tensor slots, Tensor(a!) out) -> ()");
  m.def("scatter_pages(" PIKV_SLABS "Tensor slots, Tensor pages) -> ()");
  m.def(
      "place_pages(Tensor preference, Tensor groups, Tensor limits, int source, Tensor(a!) loads, "
      "Tensor(b!) free, Tensor(c!) out) -> ()");
  m.def("decode_attention(Tensor query, " PIKV_SLABS "Tensor table, Tensor counts, " PIKV_LAYOUT
        "float scale, " PIKV_PARTIAL
        ", Tensor(c!)? page_lse, int num_splits, Tensor(d!)? scratch) -> ()");
  m.def("decode_lists(Tensor query, " PIKV_SLABS
        "Tensor slots, Tensor counts, Tensor directory, Tensor directories, Tensor rows, "
        "int width, int first, int step, int heads, " PIKV_LAYOUT "float scale, " PIKV_PARTIAL
        ", int num_splits, Tensor(c!)? scratch) -> ()");
  m.def("key_scores(Tensor query, " PIKV_SLABS "Tensor table, Tensor counts, " PIKV_LAYOUT
        "float scale, Tensor(a!) out, int num_splits) -> ()");
  m.def("prefill_attention(Tensor query, " PIKV_SLABS "Tensor slots, " PIKV_LAYOUT
        "float scale, " PIKV_PARTIAL ") -> ()");
  m.def(
      "context_attention(Tensor query, Tensor keys, Tensor values, float scale, "
      "int? first_query, " PIKV_PARTIAL ") -> ()");
  m.def(
      "tail_attention(Tensor query, Tensor keys, Tensor values, Tensor lengths, "
      "float scale, " PIKV_PARTIAL ", Tensor? indices) -> ()");
  m.def(
      "append_tokens(Tensor keys, Tensor? values, Tensor places, Tensor(a!) tail_keys, "
      "Tensor(b!)? tail_values, Tensor(c!) flags) -> ()");
  m.def("append_experts(Tensor experts, Tensor places, Tensor(a!) tail_experts) -> ()");
  m.def("merge_partials(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!)? lse) -> ()");
  m.def("page_scores(Tensor query, " PIKV_SLABS
        "Tensor table, Tensor counts, "
        "ScalarType bounds_dtype, int num_kv_heads, Tensor(a!) out) -> ()");
  m.def("subpage_scores(Tensor query, " PIKV_SLABS
        "Tensor table, Tensor counts, "
        "int num_kv_heads, int num_subpages, int bits, float scale, Tensor(a!) out) -> ()");
  m.def(
      "select_pages(Tensor table, Tensor counts, Tensor scores, Tensor pinned, Tensor budget, "
      "Tensor(a!) out) -> ()");
  m.def(
      "update_utility(Tensor slots, Tensor new_mass, int step, float decay, Tensor(a!) mass, "
      "Tensor(b!) last_step, Tensor(c!) visits) -> ()");
  m.def(
      "choose_victims(Tensor mass, Tensor last_step, Tensor visits, Tensor evictable, int step, "
      "float decay, float mass_weight, float recency_weight, float frequency_weight, "
      "Tensor(a!) out, Tensor(b!)? scratch) -> ()");
#if defined(PIKV_WITH_CUDA)
  m.def("decode_scratch_floats(int num_rows, int num_heads, int head_dim, int num_splits) -> int");
  m.def("choose_victims_scratch_bytes(int num_slots, int num_victims) -> int");
#endif
}

}  // namespace
}  // namespace pikv_ds

// `import pikv_ds._C` loads this library, and loading it registers the ops above. The Python module
// itself only tells what was built and what is used of it.
#if !defined(PIKV_CUDA_ARCHITECTURES)
#define PIKV_CUDA_ARCHITECTURES ""
#endif
#ifndef PIKV_WHY_NO_CUDA
#define PIKV_WHY_NO_CUDA ""
#endif

static PyObject* CpuIsa(PyObject*, PyObject*) { return PyUnicode_FromString(pikv_ds::CpuIsa()); }

static PyObject* CudaArchitectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(PIKV_CUDA_ARCHITECTURES);
}

static PyObject* WhyNoCuda(PyObject*, PyObject*) { return PyUnicode_FromString(PIKV_WHY_NO_CUDA); }

PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {
      {"cpu_isa", CpuIsa, METH_NOARGS, "Instruction set that the CPU kernels use."},
      {"cuda_architectures", CudaArchitectures, METH_NOARGS,
       "GPU architectures that the CUDA kernels were built for, empty without any."},
      {"why_no_cuda", WhyNoCuda, METH_NOARGS,
       "Why there are no CUDA kernels, as setup.py found when it built this; empty with them."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&module);
}
