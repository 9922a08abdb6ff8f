// The kernels as a Python module, of the limited API of Python 3.10: one build serves all later versions.
//
// Arguments are addresses and sizes, as kernels.py takes them from tensors; that file checks them. The functions
// release the interpreter's lock while they compute, and return a handle for `left`, or 0.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
#include "pool.h"

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  unsigned a, b, c = 0, d;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & bit_F16C);
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

// What this processor can run, the best first.
int find_variants(const Kernels* (&found)[4]) {
  int count = 0;
#if defined(__x86_64__)
  if (has_bf16()) found[count++] = &kernels_avx512_bf16;
  if (has_vnni()) found[count++] = &kernels_avx512_vnni;
  if (has_avx512()) found[count++] = &kernels_avx512;
  if (has_avx2()) found[count++] = &kernels_avx2;
#elif defined(__aarch64__)
  found[count++] = &kernels_neon;
#endif
  return count;
}

const Kernels* variants[4];
int variant_count;

// Reads integers from the arguments of a call, one after the other. Addresses are integers, too.
struct Reader {
  PyObject* const* args;
  Py_ssize_t count, at;

  int64_t number() {
    if (at >= count) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "too few arguments");
      return 0;
    }
    return PyLong_AsLongLong(args[at++]);
  }
  template <typename T>
  T* address() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(number()));
  }
  float real() { return at < count ? static_cast<float>(PyFloat_AsDouble(args[at++])) : 0.0f; }
  const Kernels* kernels() {
    const int64_t variant = number();
    if (!PyErr_Occurred() && (variant < 0 || variant >= variant_count))
      PyErr_SetString(PyExc_ValueError, "no such variant");
    return PyErr_Occurred() ? nullptr : variants[variant];
  }
};

// Runs `compute` without the interpreter's lock, unless an argument was wrong.
template <typename F>
PyObject* run(F compute) {
  if (PyErr_Occurred()) return nullptr;
  pool_prepare();
  PyThreadState* state = PyEval_SaveThread();
  const uint64_t handle = compute();
  PyEval_RestoreThread(state);
  if (handle == NO_MEMORY) return PyErr_NoMemory();
  return PyLong_FromUnsignedLongLong(handle);
}

// (variant, threads, dtype, bfloat16, m, k, x, relu, normed, norm weight, norm bias, eps, (w, n, ldw, scale, bias, y)…)
PyObject* linears(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader reader{args, count, 0};
  const Kernels* kernels = reader.kernels();
  const int threads = static_cast<int>(reader.number());
  const Dtype dtype = static_cast<Dtype>(reader.number());
  const bool bfloat16 = reader.number();
  const int64_t m = reader.number(), k = reader.number();
  const float* x = reader.address<const float>();
  const bool relu = reader.number(), normed = reader.number();
  Norm norm;
  norm.weight = reader.address<const float>();
  norm.bias = reader.address<const float>();
  norm.eps = reader.real();
  const int64_t outputs = (count - reader.at) / 6;
  Output few[8];
  Output* all = outputs <= 8 ? few : static_cast<Output*>(PyMem_Malloc(outputs * sizeof(Output)));
  if (all == nullptr) return PyErr_NoMemory();
  for (int64_t i = 0; i < outputs; i++) {
    all[i].w = reader.address<const void>();
    all[i].n = reader.number();
    all[i].ldw = reader.number();
    all[i].scale = reader.address<const float>();
    all[i].bias = reader.address<const void>();
    all[i].y = reader.address<float>();
  }
  PyObject* result = run(
      [&] { return kernels->linears(threads, dtype, bfloat16, m, k, x, normed ? &norm : nullptr, relu, outputs, all); });
  if (all != few) PyMem_Free(all);
  return result;
}

// (variant, threads, dtype, bfloat16, m, n, by unit, skip, scale, bias, residual, y, (x, w, k, ldw)…)
PyObject* linear_sum(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader reader{args, count, 0};
  const Kernels* kernels = reader.kernels();
  const int threads = static_cast<int>(reader.number());
  const Dtype dtype = static_cast<Dtype>(reader.number());
  const bool bfloat16 = reader.number();
  const int64_t m = reader.number(), n = reader.number();
  const bool by_unit = reader.number(), skip = reader.number();
  const float* scale = reader.address<const float>();
  const void* bias = reader.address<const void>();
  const float* residual = reader.address<const float>();
  float* y = reader.address<float>();
  const int64_t inputs = (count - reader.at) / 4;
  Input few[8];
  Input* all = inputs <= 8 ? few : static_cast<Input*>(PyMem_Malloc(inputs * sizeof(Input)));
  if (all == nullptr) return PyErr_NoMemory();
  for (int64_t i = 0; i < inputs; i++) {
    all[i].x = reader.address<const float>();
    all[i].w = reader.address<const void>();
    all[i].k = reader.number();
    all[i].ldw = reader.number();
  }
  PyObject* result = run([&] {
    return kernels->linear_sum(threads, dtype, bfloat16, m, n, by_unit, skip, scale, bias, residual, y, inputs, all);
  });
  if (all != few) PyMem_Free(all);
  return result;
}

// (variant, threads, dtype, tokens, heads, d, query, key, value, keys, values, slots, positions, y, scale, slots and
// length of the cache, its three strides)
PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader reader{args, count, 0};
  const Kernels* kernels = reader.kernels();
  const int threads = static_cast<int>(reader.number());
  const Dtype dtype = static_cast<Dtype>(reader.number());
  const int64_t tokens = reader.number(), heads = reader.number(), d = reader.number();
  const float *query = reader.address<const float>(), *key = reader.address<const float>(),
              *value = reader.address<const float>();
  void *keys = reader.address<void>(), *values = reader.address<void>();
  const int64_t *slots = reader.address<const int64_t>(), *positions = reader.address<const int64_t>();
  float* y = reader.address<float>();
  const float scale = reader.real();
  const int64_t held = reader.number(), length = reader.number();
  const int64_t strides[] = {reader.number(), reader.number(), reader.number()};
  if (PyErr_Occurred()) return nullptr;
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] < 0 || slots[t] >= held || positions[t] < 0 || positions[t] >= length)
      return PyErr_Format(PyExc_RuntimeError, "token %lld is at slot %lld, position %lld, outside the cache",
                          static_cast<long long>(t), static_cast<long long>(slots[t]),
                          static_cast<long long>(positions[t]));
  return run([&] {
    return kernels->attend(threads, dtype, tokens, heads, d, query, key, value, keys, values, strides, slots, positions,
                           scale, y);
  });
}

// (variant, threads, m, n, x, y, norm weight, norm bias, eps)
PyObject* layer_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader reader{args, count, 0};
  const Kernels* kernels = reader.kernels();
  const int threads = static_cast<int>(reader.number());
  const int64_t m = reader.number(), n = reader.number();
  const float* x = reader.address<const float>();
  float* y = reader.address<float>();
  Norm norm;
  norm.weight = reader.address<const float>();
  norm.bias = reader.address<const float>();
  norm.eps = reader.real();
  return run([&] { return kernels->layer_norm(threads, m, n, x, &norm, y); });
}

// (variant, threads, m, n, ldx, x, masks, masked, k, values, places, mask)
PyObject* best(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader reader{args, count, 0};
  const Kernels* kernels = reader.kernels();
  const int threads = static_cast<int>(reader.number());
  const int64_t m = reader.number(), n = reader.number(), ldx = reader.number();
  const float* x = reader.address<const float>();
  const int64_t masks = reader.number();
  const int32_t* masked = reader.address<const int32_t>();
  const int64_t k = reader.number();
  float* values = reader.address<float>();
  int32_t* places = reader.address<int32_t>();
  const float mask = reader.real();
  return run([&] { return kernels->best(threads, m, n, ldx, x, masks, masked, mask, k, values, places); });
}

PyObject* left(PyObject*, PyObject* handle) {
  const uint64_t number = PyLong_AsUnsignedLongLong(handle);
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(pool_left(number));
}

PyMethodDef methods[] = {
    {"linears", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linears)), METH_FASTCALL, nullptr},
    {"linear_sum", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_sum)), METH_FASTCALL, nullptr},
    {"attend", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(attend)), METH_FASTCALL, nullptr},
    {"layer_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(layer_norm)), METH_FASTCALL, nullptr},
    {"best", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(best)), METH_FASTCALL, nullptr},
    {"left", left, METH_O, "Whether all threads have left the call with this handle."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", "The kernels of the cpu target; see kernels.py.", -1,
                          methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
  variant_count = find_variants(variants);
  PyObject* module = PyModule_Create(&definition);
  PyObject* names = PyTuple_New(variant_count);
  if (module == nullptr || names == nullptr) return nullptr;
  for (int i = 0; i < variant_count; i++) PyTuple_SetItem(names, i, PyUnicode_FromString(variants[i]->name));
  // What this processor can run, the best first.
  if (PyModule_AddObject(module, "VARIANTS", names) < 0 ||
      PyModule_AddIntConstant(module, "MOST_NORMED_ROWS", MOST_NORMED_ROWS) < 0 ||
      PyModule_AddIntConstant(module, "MOST_UNIT_ROWS", MOST_UNIT_ROWS) < 0 ||
      PyModule_AddIntConstant(module, "SCRATCH", SCRATCH) < 0)
    return nullptr;
  return module;
}
