// The kernels as a Python module, of the limited API of Python 3.10: one build serves all later versions.
//
// Arguments are addresses and sizes, as kernels.py takes them from tensors; that file checks them. The functions
// release the interpreter's lock while they compute.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "coded_format.h"
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
// The registers of AMX are for processes that ask Linux for them: ARCH_REQ_XCOMP_PERM for part 18 of a thread's state, the
// data of the tiles (Documentation/arch/x86/xstate.rst).
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d = 0;
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, BOTH = AMX_BF16 | AMX_TILE;
  return has_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BOTH) == BOTH &&
         syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// AMD's family 26 (Zen 5) or later.
bool is_zen5() {
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || d != signature_AMD_edx || c != signature_AMD_ecx)
    return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (a >> 8 & 15) != 15) return false;
  return 15 + (a >> 20 & 255) >= 26;  // the family and the extended one
}
// From so many rows on, integers are faster. Zen 5 multiplies fewer in float32 as fast as memory gives int8 weights.
int64_t least_integer_rows() { return is_zen5() ? 16 : 1; }
#else
int64_t least_integer_rows() { return 1; }
#endif

// What this processor can run, the best first.
int find_variants(const Kernels* (&found)[5]) {
  int count = 0;
#if defined(__x86_64__)
  if (has_amx()) found[count++] = &kernels_avx512_amx;
  if (has_bf16()) found[count++] = &kernels_avx512_bf16;
  if (has_vnni()) found[count++] = &kernels_avx512_vnni;
  if (has_avx512()) found[count++] = &kernels_avx512;
  if (has_avx2()) found[count++] = &kernels_avx2;
#elif defined(__aarch64__)
  found[count++] = &kernels_neon;
#endif
  return count;
}

const Kernels* variants[5];
int variant_count;

// The arguments of a call: integers, addresses as integers, and numbers by the bits of a double.
struct Arguments {
  const int64_t* words;
  int64_t count, at;
  // Why the call cannot run, and which numbers its text names; null if it can.
  const char* wrong;
  long long named[3];

  int64_t integer() {
    if (at < count) return words[at++];
    wrong = "too few arguments";
    return 0;
  }
  template <typename T>
  T* address() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }
  float number() {
    const int64_t bits = integer();
    double value;
    memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
  }
  const Kernels* kernels() {
    const int64_t variant = integer();
    if (variant >= 0 && variant < variant_count) return variants[variant];
    wrong = "no such variant";
    return nullptr;
  }
  Norm norm() {
    Norm read;
    read.weight = address<const float>();
    read.bias = address<const float>();
    read.eps = number();
    return read;
  }
  // All that are left, and how many, as structures whose members are words.
  template <typename T>
  const T* rest(int64_t* found) {
    static_assert(sizeof(T) % sizeof(int64_t) == 0);
    *found = (count - at) * sizeof(int64_t) / sizeof(T);
    return reinterpret_cast<const T*>(words + at);
  }
};
static_assert(sizeof(Output) == 7 * sizeof(int64_t) && sizeof(Input) == 5 * sizeof(int64_t));
static_assert(sizeof(Copy) == 4 * sizeof(int64_t));

// Computes a call, without Python, unless an argument is wrong; see `Kernels` for what it returns.
using Call = uint64_t (*)(Arguments&);

// variant, threads, dtype, bfloat16, least integers, m, k, x, relu, normed, norm weight, norm bias, eps,
// (w, n, ldw, scale, bias, y, coded)…
uint64_t linears(Arguments& given) {
  const Kernels* kernels = given.kernels();
  const int threads = static_cast<int>(given.integer());
  const Dtype dtype = static_cast<Dtype>(given.integer());
  const bool bfloat16 = given.integer();
  const int64_t least_integers = given.integer();
  const int64_t m = given.integer(), k = given.integer();
  const float* x = given.address<const float>();
  const bool relu = given.integer(), normed = given.integer();
  const Norm norm = given.norm();
  int64_t count;
  const Output* outputs = given.rest<Output>(&count);
  if (given.wrong) return 0;
  return kernels->linears(threads, dtype, bfloat16, least_integers, m, k, x, normed ? &norm : nullptr, relu, count,
                          outputs);
}

// variant, threads, dtype, bfloat16, least integers, m, k, x, normed, norm weight, norm bias, eps, without, how many
// outputs, (w, n, ldw, 0, bias, y, coded)…, (copy, ldw, scale, error)…
uint64_t screened(Arguments& given) {
  const Kernels* kernels = given.kernels();
  const int threads = static_cast<int>(given.integer());
  const Dtype dtype = static_cast<Dtype>(given.integer());
  const bool bfloat16 = given.integer();
  const int64_t least_integers = given.integer();
  const int64_t m = given.integer(), k = given.integer();
  const float* x = given.address<const float>();
  const bool normed = given.integer();
  const Norm norm = given.norm();
  int64_t* without = given.address<int64_t>();
  const int64_t count = given.integer();
  int64_t found;
  const Output* outputs = given.rest<Output>(&found);
  if (given.wrong) return 0;
  return kernels->screened(threads, dtype, bfloat16, least_integers, m, k, x, normed ? &norm : nullptr, without, count,
                           outputs, reinterpret_cast<const Copy*>(outputs + count));
}

// variant, threads, dtype, bfloat16, least integers, m, n, by unit, coded by unit, skip, scale, bias, residual, y,
// (x, w, k, ldw, coded)…
uint64_t linear_sum(Arguments& given) {
  const Kernels* kernels = given.kernels();
  const int threads = static_cast<int>(given.integer());
  const Dtype dtype = static_cast<Dtype>(given.integer());
  const bool bfloat16 = given.integer();
  const int64_t least_integers = given.integer();
  const int64_t m = given.integer(), n = given.integer();
  const bool by_unit = given.integer(), coded_by_unit = given.integer(), skip = given.integer();
  const float* scale = given.address<const float>();
  const void* bias = given.address<const void>();
  const float* residual = given.address<const float>();
  float* y = given.address<float>();
  int64_t count;
  const Input* inputs = given.rest<Input>(&count);
  if (given.wrong) return 0;
  return kernels->linear_sum(threads, dtype, bfloat16, least_integers, m, n, by_unit, coded_by_unit, skip, scale, bias,
                             residual, y, count, inputs);
}

// variant, threads, dtype, tokens, heads, d, query, key, value, keys, values, slots, positions, y, scale, slots and
// length of the cache, its three strides
uint64_t attend(Arguments& given) {
  const Kernels* kernels = given.kernels();
  const int threads = static_cast<int>(given.integer());
  const Dtype dtype = static_cast<Dtype>(given.integer());
  const int64_t tokens = given.integer(), heads = given.integer(), d = given.integer();
  const float* query = given.address<const float>();
  const float* key = given.address<const float>();
  const float* value = given.address<const float>();
  void* keys = given.address<void>();
  void* values = given.address<void>();
  const int64_t* slots = given.address<const int64_t>();
  const int64_t* positions = given.address<const int64_t>();
  float* y = given.address<float>();
  const float scale = given.number();
  const int64_t held = given.integer(), length = given.integer();
  const int64_t strides[] = {given.integer(), given.integer(), given.integer()};
  if (given.wrong) return 0;
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] < 0 || slots[t] >= held || positions[t] < 0 || positions[t] >= length) {
      given.wrong = "token %lld is at slot %lld, position %lld, outside the cache";
      given.named[0] = t;
      given.named[1] = slots[t];
      given.named[2] = positions[t];
      return 0;
    }
  return kernels->attend(threads, dtype, tokens, heads, d, query, key, value, keys, values, strides, slots, positions,
                         scale, y);
}

// variant, threads, m, n, x, y, norm weight, norm bias, eps
uint64_t layer_norm(Arguments& given) {
  const Kernels* kernels = given.kernels();
  const int threads = static_cast<int>(given.integer());
  const int64_t m = given.integer(), n = given.integer();
  const float* x = given.address<const float>();
  float* y = given.address<float>();
  const Norm norm = given.norm();
  return given.wrong ? 0 : kernels->layer_norm(threads, m, n, x, &norm, y);
}

// variant, threads, m, n, ldx, x, masks, masked, k, values, places, mask
uint64_t best(Arguments& given) {
  const Kernels* kernels = given.kernels();
  const int threads = static_cast<int>(given.integer());
  const int64_t m = given.integer(), n = given.integer(), ldx = given.integer();
  const float* x = given.address<const float>();
  const int64_t masks = given.integer();
  const int32_t* masked = given.address<const int32_t>();
  const int64_t k = given.integer();
  float* values = given.address<float>();
  int32_t* places = given.address<int32_t>();
  const float mask = given.number();
  return given.wrong ? 0 : kernels->best(threads, m, n, ldx, x, masks, masked, mask, k, values, places);
}

// variant, threads, m, n, x, errors, factors, most, counts, places
uint64_t candidates(Arguments& given) {
  const Kernels* kernels = given.kernels();
  const int threads = static_cast<int>(given.integer());
  const int64_t m = given.integer(), n = given.integer();
  const float* x = given.address<const float>();
  const float* errors = given.address<const float>();
  const float* factors = given.address<const float>();
  const int64_t most = given.integer();
  int32_t* counts = given.address<int32_t>();
  int32_t* places = given.address<int32_t>();
  return given.wrong ? 0 : kernels->candidates(threads, m, n, x, errors, factors, most, counts, places);
}

int64_t word_of(PyObject* argument) {
  if (!PyFloat_Check(argument)) return PyLong_AsLongLong(argument);
  const double value = PyFloat_AsDouble(argument);
  int64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Whether a call failed; Python is told why.
bool failed(const Arguments& given, uint64_t handle) {
  if (given.wrong)
    PyErr_Format(PyExc_RuntimeError, given.wrong, given.named[0], given.named[1], given.named[2]);
  else if (handle == NO_MEMORY)
    PyErr_NoMemory();
  return PyErr_Occurred() != nullptr;
}

// A call from Python: a handle for `left`, or 0.
template <Call CALL>
PyObject* compute(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t few[96];
  int64_t* words = count <= 96 ? few : static_cast<int64_t*>(malloc(count * sizeof(int64_t)));
  if (words == nullptr) return PyErr_NoMemory();
  for (Py_ssize_t i = 0; i < count; i++) words[i] = word_of(args[i]);
  Arguments given{words, count, 0, nullptr, {}};
  uint64_t handle = 0;
  if (!PyErr_Occurred()) {
    pool_prepare();
    PyThreadState* state = PyEval_SaveThread();
    handle = CALL(given);
    PyEval_RestoreThread(state);
  }
  if (words != few) free(words);
  return PyErr_Occurred() || failed(given, handle) ? nullptr : PyLong_FromUnsignedLongLong(handle);
}

struct Named {
  const char* name;
  Call call;
};
constexpr Named calls[] = {
    {"linears", linears}, {"screened", screened}, {"linear_sum", linear_sum}, {"attend", attend},
    {"layer_norm", layer_norm}, {"best", best}, {"candidates", candidates}};
constexpr int CALLS = sizeof(calls) / sizeof(*calls);

// (address, words): computes recorded calls, each as its place in CALLS, how many arguments it has, and these. Returns
// the handles of the calls that threads are still in.
PyObject* replay(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "replay takes 2 arguments");
  const int64_t* words = reinterpret_cast<const int64_t*>(static_cast<uintptr_t>(PyLong_AsLongLong(args[0])));
  const int64_t* end = words + PyLong_AsLongLong(args[1]);
  if (PyErr_Occurred()) return nullptr;
  Arguments given{};
  uint64_t handle = 0, late[MOST_THREADS + 1];  // a thread is in one call at a time
  int lates = 0;
  const auto drop_left = [&] {
    int kept = 0;
    for (int i = 0; i < lates; i++)
      if (!pool_left(late[i])) late[kept++] = late[i];
    lates = kept;
  };
  pool_prepare();
  PyThreadState* state = PyEval_SaveThread();
  while (words < end && !given.wrong && handle != NO_MEMORY) {
    given = {words + 2, words[1], 0, nullptr, {}};
    handle = calls[words[0]].call(given);
    words += 2 + words[1];
    if (handle == 0 || handle == NO_MEMORY) continue;
    drop_left();
    late[lates++] = handle;
  }
  drop_left();
  PyEval_RestoreThread(state);
  if (failed(given, handle)) return nullptr;
  PyObject* handles = PyTuple_New(lates);
  for (int i = 0; handles != nullptr && i < lates; i++)
    PyTuple_SetItem(handles, i, PyLong_FromUnsignedLongLong(late[i]));
  return handles;
}

// (threads, n, k, ldw, w, coded): see `encode` in coded_format.h; how many rows do not fit.
PyObject* encode_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) return PyErr_Format(PyExc_TypeError, "encode takes 6 arguments");
  int64_t words[6], failed;
  for (int i = 0; i < 6; i++) words[i] = PyLong_AsLongLong(args[i]);
  if (PyErr_Occurred()) return nullptr;
  pool_prepare();
  PyThreadState* state = PyEval_SaveThread();
  failed = encode(static_cast<int>(words[0]), words[1], words[2], words[3], reinterpret_cast<const uint16_t*>(words[4]),
                  reinterpret_cast<uint8_t*>(words[5]));
  PyEval_RestoreThread(state);
  return failed < 0 ? PyErr_NoMemory() : PyLong_FromLongLong(failed);
}

PyObject* left(PyObject*, PyObject* handle) {
  const uint64_t number = PyLong_AsUnsignedLongLong(handle);
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(pool_left(number));
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"linears", fast(compute<linears>), METH_FASTCALL, nullptr},
    {"screened", fast(compute<screened>), METH_FASTCALL, nullptr},
    {"linear_sum", fast(compute<linear_sum>), METH_FASTCALL, nullptr},
    {"attend", fast(compute<attend>), METH_FASTCALL, nullptr},
    {"layer_norm", fast(compute<layer_norm>), METH_FASTCALL, nullptr},
    {"best", fast(compute<best>), METH_FASTCALL, nullptr},
    {"candidates", fast(compute<candidates>), METH_FASTCALL, nullptr},
    {"encode", fast(encode_rows), METH_FASTCALL, nullptr},
    {"replay", fast(replay), METH_FASTCALL, nullptr},
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
  PyObject* kinds = PyTuple_New(CALLS);
  if (module == nullptr || names == nullptr || kinds == nullptr) return nullptr;
  for (int i = 0; i < variant_count; i++) PyTuple_SetItem(names, i, PyUnicode_FromString(variants[i]->name));
  for (int i = 0; i < CALLS; i++) PyTuple_SetItem(kinds, i, PyUnicode_FromString(calls[i].name));
  // What this processor can run, the best first; and what can be replayed.
  if (PyModule_AddObject(module, "VARIANTS", names) < 0 || PyModule_AddObject(module, "CALLS", kinds) < 0 ||
      PyModule_AddIntConstant(module, "LEAST_INTEGER_ROWS", least_integer_rows()) < 0 ||
      PyModule_AddIntConstant(module, "MOST_NORMED_ROWS", MOST_NORMED_ROWS) < 0 ||
      PyModule_AddIntConstant(module, "MOST_SCREENED_ROWS", MOST_SCREENED_ROWS) < 0 ||
      PyModule_AddIntConstant(module, "CODED_BLOCK", CODED_BLOCK) < 0 ||
      PyModule_AddIntConstant(module, "BLOCK_BYTES", BLOCK_BYTES) < 0 ||
      PyModule_AddIntConstant(module, "BLOCKS_BEGIN", BLOCKS_BEGIN) < 0 ||
      PyModule_AddIntConstant(module, "SCRATCH", SCRATCH) < 0)
    return nullptr;
  return module;
}
